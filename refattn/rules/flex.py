"""Rules and terms for FlexAttention: ``mask_mod`` and ``score_mod`` as functions and as text, and its block masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import expect
from .places import Places
from .rule import Rule
from .spans import FULL, PARTIAL
from .term import Term, named

__all__ = ["block_mask", "mask_mod", "mask_mod_text", "score_mod", "score_mod_text"]


class _Tensors(Places):
    """Places as tensors, tables on a device."""

    def __init__(self, held: dict[int, Any], device: Any, *where: Any, kind: str = "float32") -> None:
        super().__init__(*where)
        self._held, self._device, self._kind = held, device, kind

    def table(self, name: str, x: NDArray[Any], at: tuple[Any, ...]) -> Any:
        if id(x) not in self._held:
            import torch

            x_typed = x.astype(self._kind) if x.dtype.kind == "f" else x
            self._held[id(x)] = torch.as_tensor(np.ascontiguousarray(x_typed), device=self._device)
        return self._held[id(x)][at]

    def clip(self, x: Any, least: int, most: int) -> Any:
        return x.clamp(least, most)

    def number(self, x: Any) -> Any:
        import torch

        return x.to(getattr(torch, self._kind))


class _Text(Places):
    """Places as names: every operation writes itself down."""

    def __init__(self, n_q: int, n_k: int) -> None:
        super().__init__(_Word("q_idx"), _Word("kv_idx"), _Word("b"), _Word("h"), n_q, n_k)
        self.tables: dict[str, NDArray[Any]] = {}

    def table(self, name: str, x: NDArray[Any], at: tuple[Any, ...]) -> Any:
        known = next((n for n, y in self.tables.items() if y is x), None)
        known = known or (name if name not in self.tables else f"{name}_{len(self.tables)}")
        self.tables[known] = x
        return _Word(f"{known}[{', '.join(_inside(i) for i in at)}]")

    def clip(self, x: Any, least: int, most: int) -> Any:
        return _Word(f"{x.text}.clamp({least}, {most})")

    def number(self, x: Any) -> Any:
        return _Word(f"{x.text}.float()")


class _Word:
    """Text of an expression; one of two sides has brackets around it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: str) -> None:
        self.text = text

    def __invert__(self) -> _Word:
        return _Word(f"(~{self.text})")

    def __abs__(self) -> _Word:
        return _Word(f"{self.text}.abs()")

    def __radd__(self, o: float) -> _Word:
        return _Word(f"({o} + {self.text})")

    def __rmul__(self, o: float) -> _Word:
        return _Word(f"({o} * {self.text})")


def _inside(x: Any) -> str:
    text = x.text if isinstance(x, _Word) else str(x)
    return text[1:-1] if text.startswith("(") and text.endswith(")") and _closes(text) else text


def _closes(text: str) -> bool:
    """Tell whether a text's first bracket closes with its last."""
    depth = 0
    for c in text[:-1]:
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return False
    return True


def _operator(sign: str) -> Callable[[_Word, Any], _Word]:
    def written(a: _Word, b: Any) -> _Word:
        return _Word(f"({a.text} {sign} {b.text if isinstance(b, _Word) else b})")

    return written


for _name, _sign in {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "le": "<=", "lt": "<", "ge": ">=", "gt": ">",
    "eq": "==", "and": "&", "or": "|",
}.items():  # fmt: skip
    setattr(_Word, f"__{_name}__", _operator(_sign))


def mask_mod(rule: Rule, n_q: int, n_k: int, device: Any = "cpu") -> Callable[[Any, Any, Any, Any], Any]:
    """Return a rule as FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)``, its tables as tensors of a device.

    Raises
    ------
    InvalidInput
        The rule does not fit so many queries and keys.
    """
    expect(isinstance(rule, Rule), "rule", rule, "a rule, such as refattn.rules.causal()")
    rule.check(rule.batches, rule.heads, n_q, n_k)
    held: dict[int, Any] = {}
    import torch

    zero = torch.zeros((), dtype=torch.int64, device=device)
    rule.at(_Tensors(held, device, zero, zero, zero, zero, n_q, n_k))  # tables are there before anything is traced

    def rule_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return rule.at(_Tensors(held, device, q_idx, kv_idx, b, h, n_q, n_k))

    return rule_mod


def mask_mod_text(rule: Rule, n_q: int, n_k: int) -> tuple[str, dict[str, NDArray[Any]]]:
    """Return the text of a rule's ``mask_mod``, and the tables that it names, which are to be tensors where it stands.

    Raises
    ------
    InvalidInput
        The rule does not fit so many queries and keys.
    """
    rule.check(rule.batches, rule.heads, n_q, n_k)
    places = _Text(n_q, n_k)
    return f"def mask_mod(b, h, q_idx, kv_idx):\n    return {_inside(rule.at(places))}\n", places.tables


def score_mod(
    term: Term,
    n_q: int,
    n_k: int,
    device: Any = "cpu",
    *,
    tables: Mapping[str, Any] | None = None,
    kind: str = "float32",
) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """Return ``score_mod(score, b, h, q_idx, kv_idx)`` of FlexAttention that adds a term, in float32.

    Parameters
    ----------
    term : Term
        What is added.
    n_q, n_k : int
        How many queries and keys the call has.
    device : str or torch.device
        Where the tables lie.
    tables : mapping, optional
        From names of ``term.tables()`` to PyTorch's tensors of their shapes that stand for them: gradients reach these.
    kind : {"float32", "float64"}
        What the term is computed in.

    Raises
    ------
    InvalidInput
        The term does not fit so many queries and keys; a table that it has not, or of another shape.
    """
    expect(isinstance(term, Term), "term", term, "a term, such as refattn.rules.terms.alibi(slopes)")
    expect(kind in ("float32", "float64"), "kind", kind, "'float32' or 'float64'")
    term.check(term.batches, term.heads, n_q, n_k)
    import torch

    held: dict[int, Any] = {}
    known, tables = dict(named(term)), {} if tables is None else tables
    expect(isinstance(tables, Mapping), "tables", tables, "a mapping of names to tensors")
    for name, x in tables.items():
        expect(name in known, "tables", name, f"a name out of {', '.join(known) or 'none: the term has no table'}")
        wanted = known[name].table.shape
        expect(isinstance(x, torch.Tensor), f"tables: {name}", x, "one of PyTorch's tensors")
        expect(tuple(x.shape) == wanted, f"tables: {name}", tuple(x.shape), f"shape {wanted}")
        held[id(known[name].table)] = x
    zero = torch.zeros((), dtype=torch.int64, device=device)
    term.at(_Tensors(held, device, zero, zero, zero, zero, n_q, n_k, kind=kind))  # tables are there before a trace

    def term_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + term.at(_Tensors(held, device, q_idx, kv_idx, b, h, n_q, n_k, kind=kind))

    return term_mod


def score_mod_text(term: Term, n_q: int, n_k: int) -> tuple[str, dict[str, NDArray[Any]]]:
    """Return the text of a term's ``score_mod``, and the tables that it names, which are to be tensors where it stands.

    Raises
    ------
    InvalidInput
        The term does not fit so many queries and keys.
    """
    expect(isinstance(term, Term), "term", term, "a term, such as refattn.rules.terms.alibi(slopes)")
    term.check(term.batches, term.heads, n_q, n_k)
    places = _Text(n_q, n_k)
    found = term.at(places)
    found = found.text if isinstance(found, _Word) else str(found)
    return f"def score_mod(score, b, h, q_idx, kv_idx):\n    return score + {found}\n", places.tables


def block_mask(rule: Rule, n_q: int, n_k: int, block: int = 128, device: Any = "cpu") -> Any:
    """Return a rule as FlexAttention's BlockMask, from its tiles: no pair of a full or an empty one is looked at.

    Parameters
    ----------
    rule : Rule
        Of one batch and head, or of as many as it is made for.
    n_q, n_k : int
        How many queries and keys the call has.
    block : int
        Queries and keys of a block.
    device : str or torch.device
        Where it lies.

    Raises
    ------
    InvalidInput
        The rule does not fit so many queries and keys.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    tiles = np.array(
        [[rule.tiles(n_q, n_k, block, block, b, h) for h in range(rule.heads)] for b in range(rule.batches)]
    )

    # a block that reaches over an end is never full to FlexAttention
    for last in (tiles[..., -1:, :] if n_q % block else tiles[:0], tiles[..., -1:] if n_k % block else tiles[:0]):
        last[last == FULL] = PARTIAL

    def listed(kind: int) -> tuple[Any, Any]:
        here = tiles == kind
        first = np.argsort(~here, axis=-1, kind="stable")
        return tuple(torch.as_tensor(x.astype(np.int32), device=device) for x in (here.sum(-1), first))

    return BlockMask.from_kv_blocks(
        *listed(PARTIAL),
        *listed(FULL),
        BLOCK_SIZE=block,
        mask_mod=mask_mod(rule, n_q, n_k, device),
        seq_lengths=(n_q, n_k),
    )
