"""The input families: small problems, each named by the bug that it exposes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS
from ...errors import InvalidInput, InvalidProblem
from ...gates import RECURRENT
from ...masks import unused
from ...problem import Problem
from ...variants import variant_of
from ..model import FURTHER, Capabilities, Model
from .builders import BUILDERS, Build
from .calls import Call, drawn
from .draw import Draw
from .dropped import DROPPED
from .models import known
from .sample import Sample, sample_of, separate

__all__ = ["BUDGETS", "FAMILIES", "Case", "calls", "cases", "fitted", "forget"]

FAMILIES = {
    "gaussian": "plain random data through every option: a flag ignored, a head or a broadcast axis mapped wrongly",
    "ragged": "lengths at tile edges, primes, one query, one key, none, packed sequences: off-by-one and tail bugs",
    "peaked": "one key holds nearly all the weight: a key that is dropped or added shows",
    "probe": "values that reveal P: one-hot columns, heads of different size, one large value",
    "shifted": "scores far from 0 or nearly tied, far biases and sinks: sentinels such as -1e4, missing shift",
    "sparse": "small integers, equal scores, zero scale: answers that are exact ties or known by hand",
    "drift": "similar rows, positive sums, fractions of the last place: biased rounding, narrow sums, truncation",
    "empty": "rows without keys: NaN, garbage, the mean of all values, an lse that is not -inf",
    "extreme": "the largest and smallest values, in one key or all, products that leave float32's range",
    "poison": "NaN and inf behind the mask, and in sight of some rows only",
    "positions": "rotary positions, ALiBi slopes: pairs, signs and places mistaken, a slope of the next head",
    "types": "types of their own and scales: a descale lost, another head's or block's, a narrow out",
    "dropout": "weights that a given mask drops: a scale forgotten, a softmax of what is kept, another head's mask",
    "pages": "keys in pages of a cache, NaN where nobody owns them; new keys written: tables, strides, tails, slots",
    "models": "calls that models in use make, the same in every run; some rows are compared",
    "calls": "calls as models make them, drawn by a seed: every two options meet; some rows are compared",
}
"""Family names, and what they expose."""
INFINITE = ("poison/query-inf", "poison/key-inf", "poison/bias-inf", "poison/sink-inf")
"""Cases for softmax: in other operators an infinite score may weigh nothing, or as much as another."""
FORWARD_ONLY = (
    "poison/value-seen-by-some",
    "poison/key-seen-by-some",
    "poison/query-nan",
    "poison/query-inf",
    "poison/key-inf",
    "poison/bias-nan",
    "poison/bias-inf",
    "poison/sink-nan",
    "poison/sink-inf",
    "extreme/huge-values",
    "extreme/one-huge-value",
)
"""Cases without a gradient: NaN in sight, or dout·v past the type's range."""
SIDE = frozenset({"lengths_q", "lengths_k", "offset", "positions", "rotary_partial"})
"""Features of kernels that say so which a case may have beside what it is about."""
_DROPPED = tuple(f"dropout/{n}" for n in DROPPED if n != "plain")
BESIDE = (
    "pages/options",
    "pages/rotary",
    "positions/norm",
    "positions/norm-aligned",
    "positions/norm-rotary",
    *_DROPPED,
)
"""Cases of one more option beside others: kernels without pages, or dropout, do not list them."""
ALIGNED = ("positions/norm-aligned",)
"""Cases at whose output their queries arrive."""


@dataclass(frozen=True)
class Case:
    """One problem of a family.

    Attributes
    ----------
    family, label : str
        Its name is ``family/label``.
    variant : str
        The operator.
    build : callable
        ``build(draw) -> Problem``.
    dtypes : tuple of str
        The formats that it makes sense in; empty means all.
    draw : int
        Which draw of the numbers.
    sampled : bool
        Whether some rows of a large call are compared, not all.
    gradients : bool
        Whether its gradients are checked, too.
    able : Capabilities, optional
        Those of a kernel: options that it does not have are left out.
    """

    family: str
    label: str
    variant: str
    build: Build
    dtypes: tuple[str, ...] = ()
    draw: int = 0
    sampled: bool = False
    gradients: bool = True
    able: Capabilities | None = None

    def sample(self, problem: Problem) -> Sample | None:
        """Return the rows that are compared; None where all are."""
        return sample_of(problem, np.random.default_rng(zlib.crc32(self.name.encode()))) if self.sampled else None

    @property
    def backward(self) -> bool:
        """Tell whether its gradient can be asked for: finite in sight of every query, and dout·v within the type."""
        return (
            self.gradients
            and self.family not in ("types", "pages")
            and f"{self.family}/{self.label}" not in FORWARD_ONLY
        )

    def arriving(self, dtype: str) -> NDArray[Any]:
        """Return a gradient arriving at out, (b, h_q, n_q, d_v), 0 in rows not compared, NaN in unused ones."""
        draw = Draw(FORMATS[dtype], np.random.default_rng(zlib.crc32(f"dout {self.name}".encode())), self.variant)
        problem = self.problem(dtype)
        size = 1.0
        if isinstance(self.build, Call) and self.build.faint_dout:  # as of a mean over many, but of normal numbers
            size = max(1e-7, 2.0**12 * FORMATS[dtype].smallest_normal)
        if f"{self.family}/{self.label}" in ALIGNED:
            return np.array(problem.query)
        dout, sample = draw.tensor(size * draw.normal(*problem.out_shape)), self.sample(problem)
        if sample is not None:
            return sample.only(dout)
        if (gone := unused(problem)) is not None:  # what arrives there may be anything
            dout = np.where(gone[0][:, None, :, None], dout.dtype.type(np.nan), dout)
        return dout

    def says(self, model: Model) -> bool:
        """Tell whether it says something of a kernel: values that show narrow scores do not where it stores such.

        Nor where it rounds weights that may be the scores themselves: those of an operator that may be 0 or below.
        """
        matched = isinstance(self.build, Call) and self.build.numbers == "matched"
        v = variant_of(self.variant)
        scores = model.loss(model.scores) or (model.loss(model.weights) and not (v.has_lse or v.positive))
        return not (matched and scores)

    @property
    def name(self) -> str:
        """family/label, and #draw from the second on."""
        return f"{self.family}/{self.label}" + (f"#{self.draw}" if self.draw else "")

    def problem(self, dtype: str) -> Problem:
        """Return the problem in a format; the same every time."""
        return _built(self, dtype)


@lru_cache(maxsize=4)  # a check asks for it a few times
def _built(case: Case, dtype: str) -> Problem:
    seed = zlib.crc32(f"{case.variant} {case.name}".encode())
    return case.build(Draw(FORMATS[dtype], np.random.default_rng(seed), case.variant, case.able))


def fitted(case: Case, able: Capabilities) -> Case | None:
    """Return a case as a kernel can do it.

    What a case has beside what it is about is left out where the kernel lacks it. A case stays as it is where the
    kernel has all of it, or not what it is about; it is None where it would stay and is one of ``BESIDE``.

    Parameters
    ----------
    case : Case
        As :func:`cases` returns it.
    able : Capabilities
        What the kernel can do.
    """
    if _traits(replace(case, draw=0))[1] & FURTHER - SIDE and able.features & FURTHER - SIDE:
        return _refitted(case, able)
    return None if case.name.partition("#")[0] in BESIDE else case


@lru_cache(maxsize=4096)
def _refitted(case: Case, able: Capabilities) -> Case | None:
    dtype = next((n for n in FORMATS if n in able.dtypes and n in (case.dtypes or FORMATS)), "float32")
    if not able.missing(case.problem(dtype)):
        return case
    made = replace(case, able=able)
    try:
        problem = made.problem(dtype)
        if problem.features() & FURTHER - SIDE and not able.missing(problem):
            return made
    except InvalidProblem:  # its arrays are of another width, say
        pass
    return None if case.name.partition("#")[0] in BESIDE else case


BUDGETS = ("quick", "ci", "nightly")
"""How much to run: a few cases that catch nearly all planted bugs, every case, every case in several draws."""
NIGHTLY_DRAWS = 8


def cases(variant: str, budget: str = "ci") -> list[Case]:
    """Return the cases of an operator, family by family.

    Parameters
    ----------
    variant : str
        The operator.
    budget : str
        One of ``BUDGETS``.

    Raises
    ------
    InvalidInput
        There is no such operator or budget.
    """
    if budget not in BUDGETS:
        raise InvalidInput(f"budget: got {budget!r}, expected one of {', '.join(BUDGETS)}")
    known = _cases(variant)
    if budget == "quick":
        quick = variant_of(variant).quick
        return [c for c in known if not quick or c.name in quick]
    return [replace(c, draw=i) for i in range(NIGHTLY_DRAWS) for c in known] if budget == "nightly" else known


def calls(variant: str, able: Capabilities, budget: str = "ci", seed: int | None = 0) -> list[Case]:
    """Return the calls of models and the drawn ones of an operator that a kernel says it can do.

    Parameters
    ----------
    variant, budget : str
        As in :func:`cases`.
    able : Capabilities
        What the kernel can do.
    seed : int
        What draws those that are drawn; None for the calls of models alone.
    """
    found = [] if seed is None else drawn(variant, able, budget, seed)
    usual = [("models", *x) for x in known(able, variant_of(variant).uses, budget)] if separate(variant) else []
    named = usual + [("calls", f"{i:03d}-{c.kind}", c, i % 3 == 0) for i, c in enumerate(found)]
    return [Case(family, label, variant, c, sampled=True, gradients=back) for family, label, c, back in named]


def forget() -> None:
    """Drop what is kept of operators that were replaced."""
    _built.cache_clear()
    _refitted.cache_clear()
    _traits.cache_clear()


def _cases(variant: str) -> list[Case]:
    v = variant_of(variant)
    found: list[Case] = []
    for family in v.families:
        for label, (build, needs, dtypes) in BUILDERS[family].items():
            if needs <= v.uses and (v.has_lse or f"{family}/{label}" not in INFINITE):
                found.append(Case(family, label, variant, build, dtypes))
    found = [c for c in found if _fits(c)]
    own = [Case("gaussian", label, variant, _own(settings)) for label, settings in v.cases.items()]
    # an option that is right alone may be wrong beside a mask, a sink, a scale, groups of heads
    crossed = [Case("gaussian", f"{n}-and-all", variant, _crossed(variant, s)) for n, s in v.cases.items()]
    return found + own + [c for c in crossed if _fits(c)]


def _crossed(variant: str, settings: Mapping[str, Any]) -> Build:
    """Return a case of an operator's own with all else that the operator has."""

    def build(d: Draw) -> Problem:
        v, n_q, n_k = variant_of(variant), settings.get("n_q", 37), settings.get("n_k", 67)
        h, h_kv = settings.get("h", 4), settings.get("h_kv", 2)
        width = settings.get("d", 32)
        many = len(settings["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in settings else 1
        given = d.options(h, n_q, n_k, width, settings.get("d_v", width), many)
        more = {n: x for n, x in given.items() if n in v.uses} | dict(settings)
        more |= {"h": h, "h_kv": h_kv, "b": 1, "scale": 0.3, "options": v.fitted(settings.get("options", {}), h)}
        more |= {
            n: given[n]
            for n in RECURRENT
            if n in v.uses and settings.get(n) not in ("channels", "strong channels", "large")
        }
        return d.problem(**more)

    return build


def _fits(case: Case) -> bool:
    """Tell whether an operator takes a case at all: some have no masks, some need as many keys as queries."""
    return _traits(case)[0]


@lru_cache(maxsize=4096)
def _traits(case: Case) -> tuple[bool, frozenset[str]]:
    """Return whether its operator takes a case, and the features of its call."""
    problem = case.problem(case.dtypes[0] if case.dtypes else "float32")
    return variant_of(case.variant).takes(problem), problem.features()


def _own(settings: Mapping[str, Any]) -> Build:
    return lambda d: d.problem(**settings)
