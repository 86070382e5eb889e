"""What one row of the table VARIANTS holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InvalidProblem, UnsupportedProblem
from ..problem import MEANINGS, Problem
from .option import Option
from .shapes import Rows, Shape, Steps

__all__ = ["CALL_LAWS", "COMMON_BUGS", "COMMON_FAMILIES", "COMMON_LAWS", "STEP_BUGS", "STEP_LAWS", "Variant"]

CALL_LAWS = (
    "determinism",
    "changed_in_place",
    "results_kept",
    "shapes_between",
    "options_between",
    "many_repeats",
    "two_threads",
    "calls_between",
)
"""What holds between calls, whatever the operator."""
COMMON_LAWS = (
    *CALL_LAWS,
    "key_permutation",
    "masked_keys_unread",
    "grouped_heads",
    "batch_independence",
    "batch_invariance",
    "row_invariance",
    "past_31_bits",
    "values_doubled",
    "layout",
    "spread_gradient",
)
STEP_LAWS = (
    "determinism",
    "batch_independence",
    "batch_invariance",
    "values_doubled",
    "grouped_heads",
    "state_carried",
    "state_gradient",
    "last_state_gradient",
)
STEP_BUGS = ("zeroed_head", "wrong_scale", "heads_tiled", "sequences_joined", "value_of_next_key")
"""Laws and planted bugs of recurrences."""
COMMON_BUGS = (
    "zeroed_head",
    "own_key_dropped",
    "last_key_dropped",
    "tail_tile_dropped",
    "wrong_scale",
    "causal_off_by_one",
    "causal_ignored",
    "causal_corner_swapped",
    "window_off_by_one",
    "window_ignored",
    "allowed_ignored",
    "heads_tiled",
    "sequences_joined",
    "value_of_next_key",
    "empty_row_nan",
    "neighbour_row",
    "output_too_narrow",
    "masked_value_read",
)
COMMON_FAMILIES = ("gaussian", "peaked", "probe", "sparse", "drift", "empty", "poison", "ragged")


@dataclass(frozen=True)
class Variant:
    """One operator.

    Attributes
    ----------
    name : str
        The operator's name.
    define : callable or Shape
        The definition: for :class:`Rows` the function alone, else one of the other shapes.
    formula : str
        The definition as a formula.
    unit : str
        The error unit: what one rounding costs an output element.
    source : str
        Paper and equation, and what of it was read.
    cumulated : callable, optional
        ``cumulated(head, dout, tokens, of_state)`` returns what meets in the gradients by the logarithm of decays that
        a kernel multiplies up in chunks of so many tokens, from each token on: the sizes of all products and of sums.
    compared : str
        With which implementation that nobody here wrote it was compared, and what came of it.
    uses : frozenset of str
        The options of Problem that mean something here; another one raises UnsupportedProblem.
    options : mapping
        The operator's own options.
    laws, bugs, families : tuple of str
        Names of the laws that hold, the planted bugs that must be caught, the input families that apply.
    contract : tuple of str
        What holds at the edges, a sentence each.
    default_scale : str
        "rsqrt" (scale None is 1/sqrt(d_k)) or "one".
    has_lse : bool
        Whether the definition returns a log-sum-exp.
    positive : bool
        Whether every weight is above 0: an infinite value that a row sees is then the row's output.
    fused : str
        Which of the package's fast implementations knows this definition: "softmax", or "" for none.
    cases : mapping
        Input cases of the operator's own, by label: what ``Draw.problem`` takes (lengths, options of Problem, options).
        Every option of its own must differ from its default in one of them.
    quick : frozenset of str
        The cases of the quick budget; empty means all.
    forms : mapping
        The same operator written another way, by name: each a definition or shape. All must agree exactly.
    wrong : mapping
        What implementers get wrong, by name: a sentence, and the definition with that mistake (a Lowered, Rows,
        Selected or Steps).
        The checks of the operator's cases must fail each of them.
    fits : callable
        ``fits(problem)`` returns what a call must change to fit the operator, or None.
    tries : callable, optional
        ``tries(n_q, n_k)`` returns options to try in a call of that size, the simplest first, where options depend on
        each other or on sizes; else each is drawn by itself.
    places : bool
        Whether the definition always reads where rows and keys stand (``o.distance``, ``o.place``).
    narrowest : int
        The least d_k that a call can have, for tests that draw calls.
    always, never : frozenset of str
        Features that every call has, or none can have, for tests that draw calls.
    """

    name: str
    define: Callable[..., Any] | Shape
    formula: str
    unit: str
    source: str
    uses: frozenset[str]
    options: Mapping[str, Option] = field(default_factory=dict)
    laws: tuple[str, ...] = COMMON_LAWS
    bugs: tuple[str, ...] = COMMON_BUGS
    families: tuple[str, ...] = COMMON_FAMILIES
    contract: tuple[str, ...] = ("A row without any key gives out 0.", "A key that is not allowed is never read.")
    default_scale: str = "rsqrt"
    has_lse: bool = False
    positive: bool = False
    fused: str = ""
    cases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quick: frozenset[str] = frozenset()
    forms: Mapping[str, Any] = field(default_factory=dict)
    wrong: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    compared: str = "none yet"
    cumulated: Callable[..., Any] | None = None
    fits: Callable[[Problem], str | None] = lambda problem: None
    tries: Callable[[int, int], Sequence[Mapping[str, Any]]] | None = None
    places: bool = False
    narrowest: int = 1
    always: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()

    @property
    def shape(self) -> Shape:
        """The definition as one of the four shapes."""
        return shape_of(self.define)

    @property
    def rows(self) -> Rows | None:
        """The definition, or the first form, that gives all rows of a head at once; None where there is none."""
        shapes = (self.shape, *(shape_of(x) for x in self.forms.values()))
        return next((x for x in shapes if isinstance(x, Rows)), None)

    def settings(self, problem: Problem) -> dict[str, Any]:
        """Return the operator's options for a call, defaults filled in, after checking that the call fits.

        Raises
        ------
        UnsupportedProblem
            The call sets an option of Problem that means nothing here.
        InvalidProblem
            The call sets an option that the operator does not have, or to a value that it cannot take.
        """
        for name in MEANINGS:
            if getattr(problem, name) is not None and name not in self.uses:
                known = ", ".join(sorted(self.uses)) or "none of Problem's options"
                raise UnsupportedProblem(f"{name}: {self.name} attention does not have it; it has {known}")
        if problem.d_k == 0 and not self.fused:
            raise UnsupportedProblem(f"query: axis dim is 0, which {self.name} attention has no meaning for; give it 1")
        unknown = sorted(set(problem.options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InvalidProblem(f"options: {self.name} attention has no {unknown[0]!r}; it has {known}")
        values = {name: problem.options.get(name, option.default) for name, option in self.options.items()}
        for name, value in values.items():
            option = self.options[name]
            wrong = option.check(value, problem.heads)
            if wrong:
                raise InvalidProblem(f"{name}: got {value!r}, expected {wrong}")
            if option.needs and value != option.default and getattr(problem, option.needs) is None:
                raise InvalidProblem(
                    f"{name}: needs {option.needs}; set {option.needs}={NEEDED.get(option.needs, '...')}"
                )
        unfit = (self.fits(problem) or _no_sequence(problem)) if isinstance(self.shape, Steps) else self.fits(problem)
        if unfit:
            raise InvalidProblem(unfit)
        return values

    def fitted(self, options: Mapping[str, Any], heads: int) -> dict[str, Any]:
        """Return options that fit a number of query heads: one that is by head is drawn anew where it does not."""
        own = {n: options.get(n, o.default) for n, o in self.options.items()}
        for n, o in self.options.items():
            by_head = o.by_head and isinstance(own[n], tuple)
            if o.check(own[n], heads) is not None or (by_head and len(own[n]) not in (1, heads)):
                own[n] = o.draws(heads)[-1]
        return {n: x for n, x in own.items() if n in options or x != self.options[n].default}

    def takes(self, problem: Problem) -> bool:
        """Tell whether a call fits the operator."""
        try:
            self.settings(problem)
        except (InvalidProblem, UnsupportedProblem):
            return False
        return True


def packed(p: Problem, what: str) -> str | None:
    """Return why an operator whose blocks or the like (`what`) belong to one sequence takes no packed call, or None."""
    if p.cu_seqlens_q is None:
        return None
    return f"cu_seqlens_q: {what} of packed sequences are not defined; pass one sequence at a time"


def packed_at(*ends: int) -> dict[str, Any]:
    """Return the offsets of packed sequences with as many queries as keys, for a case."""
    return {f"cu_seqlens_{x}": np.array(ends, np.int32) for x in "qk"}


def unplaced(p: Problem, what: str) -> str | None:
    """Return why a call has no key at which each query stands, or is packed, or None."""
    if p.n_q > p.n_k:
        more = f"query: axis seq is {p.n_q}, expected at most key's {p.n_k}: each query stands at a key"
        return packed(p, what) or more
    return packed(p, what)


NEEDED = {"causal": "'bottom_right' or 'top_left'"}


def _no_sequence(p: Problem) -> str | None:
    """Return why a recurrence cannot take a call, or None."""
    if p.causal is None:
        return "causal: a recurrence sees no later token; set causal='bottom_right'"
    if p.n_q != p.n_k:
        return f"key: axis seq is {p.n_k}, expected query's {p.n_q}: each token brings a query, a key and a value"
    if any(rows != keys for rows, keys in p.segments()):
        return "cu_seqlens_k: expected cu_seqlens_q's offsets: each token brings a query, a key and a value"
    return None


def shape_of(define: Any) -> Shape:
    """Return a definition as one of the four shapes."""
    return define if isinstance(define, Shape) else Rows(define)
