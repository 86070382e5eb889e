"""The driver: run a definition in balls, raise the precision until the answer is decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64, kind_of, to_float64, to_numpy
from ..dtypes import Format, format_of
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .arithmetics import Balls, Floats
from .enclosure import Enclosure
from .slabs import Slab, matrix_of, slabs
from .tape import Tape, gradients
from .ties import decide_by_sign, exact_ties, lone_key_lse

__all__ = ["Answer", "evaluate", "reference", "run"]

LADDER = tuple(128 * 2**i for i in range(12))  # 128 ... 262144 bits
TILE = 2**16  # scores alive at a time: rows are taken in tiles, so memory stays O(n d)

Raw = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Answer:
    """What a definition gives.

    Attributes
    ----------
    problem : Problem
        The call.
    values : dict
        Arrays by name: ``out`` (b, h_q, n_q, d_v), ``lse`` (b, h_q, n_q) where the operator has one; with gradients
        ``dq``, ``dk``, ``dv`` and, where present, ``dbias`` and ``dsink``, of their inputs' shapes.
        Float64 nearest to the enclosure's middle, or correctly rounded numbers in the asked format.
    enclosures : dict
        An :class:`Enclosure` for each, with a proven radius for every element.
    rounding : str or None
        The format that the values are correctly rounded to.
    undecided : dict
        How many elements of each could not be decided; their enclosure still holds.
    balls : dict
        The Arb balls themselves (object arrays), where `rounding` is None.
    """

    problem: Problem
    values: dict[str, NDArray[Any]]
    enclosures: dict[str, Enclosure]
    rounding: str | None
    undecided: dict[str, int]
    balls: Raw

    @property
    def out(self) -> NDArray[Any]:
        """The output, (b, h_q, n_q, d_v)."""
        return self.values["out"]

    @property
    def lse(self) -> NDArray[Any] | None:
        """The log-sum-exp, (b, h_q, n_q), natural log; None where the operator has none."""
        return self.values.get("lse")

    @property
    def dq(self) -> NDArray[Any] | None:
        """The gradient by query."""
        return self.values.get("dq")

    @property
    def dk(self) -> NDArray[Any] | None:
        """The gradient by key, summed over the query heads of a group."""
        return self.values.get("dk")

    @property
    def dv(self) -> NDArray[Any] | None:
        """The gradient by value, summed over the query heads of a group."""
        return self.values.get("dv")

    @property
    def dbias(self) -> NDArray[Any] | None:
        """The gradient by bias, summed over the axes along which bias was spread."""
        return self.values.get("dbias")

    @property
    def dsink(self) -> NDArray[Any] | None:
        """The gradient by sink."""
        return self.values.get("dsink")

    def radius(self, name: str = "out") -> NDArray[np.float64]:
        """Return the proven bound on ``|value - exact|`` for every element of an array."""
        e = self.enclosures[name]
        return e.error(to_float64(self.values[name]))


def evaluate(
    problem: Problem,
    bits: int = 128,
    *,
    rounding: str | None = None,
    lse_rounding: str | None = None,
    gradients: Any = None,
) -> Answer:
    """Evaluate one attention call exactly.

    Inputs are taken as the exact numbers that they are; scale None is the exact real number.

    Parameters
    ----------
    problem : Problem
        The call.
    bits : int
        Working precision of the balls (from 32); the radius is proven whatever it is. Not used with `rounding`.
    rounding : str, optional
        A format of ``refattn.dtypes.FORMATS``: every value is then the correctly rounded one, to nearest, ties to even,
        found by raising the precision until the rounding is decided; exact ties and zeros are recognised.
    lse_rounding : str, optional
        Another format for lse, which is often kept wider than out.
    gradients : (b, h_q, n_q, d_v) array, optional
        The gradient arriving at out: asks for dq, dk, dv, dbias, dsink.

    Returns
    -------
    Answer
        Values with a proven radius for each element.

    Raises
    ------
    InvalidProblem, InvalidInput
        An option that the operator does not take; `bits`, `rounding` or `gradients` that make no sense.
    UnsupportedProblem
        An option of Problem that means nothing for the operator; gradients of non-finite inputs.
    """
    variant_of(problem.variant).settings(problem)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 32 <= bits <= 2**20:
        raise InvalidInput(f"bits: got {bits!r}, expected an integer from 32 to {2**20}")
    dout = None if gradients is None else _arriving(problem, gradients)
    if rounding is None:
        balls = Balls(bits)
        with balls.working():
            raw = run(problem, balls, dout)
            enclosures = {n: Enclosure.of(x) for n, x in raw.items()}
        return Answer(problem, {n: e.mid for n, e in enclosures.items()}, enclosures, None, {}, raw)
    return _rounded(problem, format_of(rounding), format_of(lse_rounding or rounding), dout)


def reference(problem: Problem, dtype: Any = np.float64) -> dict[str, NDArray[Any]]:
    """Return the definition run in plain NumPy floating point, by name: what a careful user would write, no proof."""
    return run(problem, Floats(dtype), None)


def run(problem: Problem, f: Any, dout: NDArray[np.float64] | None, need: NDArray[np.bool_] | None = None) -> Raw:
    """Run the definition of a call over one arithmetic.

    Parameters
    ----------
    problem : Problem
        The call.
    f : arithmetic
        As in ``refattn.exact.arithmetics``.
    dout : (b, h_q, n_q, d_v) float64, optional
        The gradient arriving at out.
    need : (b, h_q, n_q) bool, optional
        The rows to compute; others keep 0 (and gradients by key and value count only these rows).

    Returns
    -------
    dict
        Arrays of the arithmetic's numbers by name; numbers that the contract fixes are plain floats.
    """
    variant = variant_of(problem.variant)
    p = problem.to("numpy")
    kind = f.dtype if isinstance(f, Floats) else np.dtype(object)
    raw: Raw = {"out": np.full(p.out_shape, 0.0, kind)}
    if variant.has_lse:
        raw["lse"] = np.full(p.out_shape[:3], -np.inf, kind)
    if dout is not None:
        shapes = {"dq": p.query.shape, "dk": p.key.shape, "dv": p.value.shape}
        shapes |= {n: getattr(p, n[1:]).shape for n in ("dbias", "dsink") if getattr(p, n[1:]) is not None}
        raw |= {n: np.full(s, 0, object) for n, s in shapes.items()}
    for slab in slabs(p):
        if dout is not None and not _finite(slab):
            raise UnsupportedProblem("gradients: NaN or inf in sight of a query has no gradient; remove or mask it")
        lines = np.nonzero(slab.live if need is None else slab.live & need[slab.batch, slab.head, slab.rows])[0]
        for tile in _tiles(lines, slab.k.shape[0]):
            _tile(slab, f, tile, raw, dout)
        _specials(slab, raw)
    return raw


def _tile(slab: Slab, f: Any, tile: NDArray[np.intp], raw: Raw, dout: NDArray[np.float64] | None) -> None:
    define = variant_of(slab.problem.variant).define
    o = slab.options(f, tile)
    q, k, v = (matrix_of(f, x) for x in (slab.q[tile], slab.k, slab.v))
    at = (slab.batch, slab.head, np.arange(slab.rows.start, slab.rows.stop)[tile])
    with np.errstate(all="ignore"):
        if dout is None:
            out, lse = define(q, k, v, o)
        else:
            leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
            for name in ("bias", "sink"):
                if getattr(o, name) is not None:
                    leaves["d" + name] = Tape(getattr(o, name))
                    setattr(o, name, leaves["d" + name])
            out, lse = define(leaves["dq"], leaves["dk"], leaves["dv"], o)
            grads = gradients(out, matrix_of(f, dout[at]), list(leaves.values()))
            _collect(slab, at, dict(zip(leaves, grads, strict=True)), raw)
            out, lse = out.value, None if lse is None else lse.value
        raw["out"][at] = _numbers(out)
        if lse is not None:
            raw["lse"][at] = _numbers(lse)[:, 0]


def _collect(slab: Slab, at: Any, grads: dict[str, Any], raw: Raw) -> None:
    b, h, lines = at
    raw["dq"][at] = _numbers(grads["dq"])
    for name in ("dk", "dv"):
        raw[name][b, slab.head_kv, slab.keys] = raw[name][b, slab.head_kv, slab.keys] + _numbers(grads[name])
    if "dsink" in grads:
        raw["dsink"][h] = raw["dsink"][h] + _numbers(grads["dsink"])[0, 0]
    if "dbias" in grads:
        target, g = raw["dbias"], _numbers(grads["dbias"])
        keys = np.arange(slab.keys.start, slab.keys.stop)
        plane = target[b if target.shape[0] > 1 else 0, h if target.shape[1] > 1 else 0]
        i = lines if plane.shape[0] > 1 else np.zeros_like(lines)
        j = keys if plane.shape[1] > 1 else np.zeros_like(keys)
        for r, row in enumerate(i):
            for c, col in enumerate(j):
                plane[row, col] = plane[row, col] + g[r, c]


def _numbers(m: Any) -> NDArray[Any]:
    return np.asarray(m.image if hasattr(m, "image") else m.a)


def _tiles(lines: NDArray[np.intp], n_k: int) -> Iterator[NDArray[np.intp]]:
    size = max(1, TILE // max(n_k, 1))
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _finite(slab: Slab) -> bool:
    seen = slab.allowed.any(0)
    return not slab.spoilt.any() and bool(np.isfinite(slab.values[seen]).all())


def _specials(slab: Slab, raw: Raw) -> None:
    """Write what the contract fixes: rows without keys, rows that see NaN or inf."""
    at = (slab.batch, slab.head, slab.rows)
    out = raw["out"][at]
    if "lse" in raw:
        lse = raw["lse"][at]
        lse[~slab.allowed.any(1)] = -np.inf if slab.sink is None else slab.sink
        lse[slab.spoilt] = np.nan
    positive = slab.problem.variant in ("softmax", "sigmoid")  # every weight is above 0
    for j, c in zip(*np.nonzero(~np.isfinite(slab.values)), strict=True):
        for i in np.nonzero(slab.allowed[:, j])[0]:
            x = float(slab.values[j, c]) if positive else np.nan
            known = out[i, c]
            clash = isinstance(known, float) and not np.isfinite(known) and known != x
            out[i, c] = np.nan if clash else x
    out[slab.spoilt] = np.nan


def _arriving(problem: Problem, dout: Any) -> NDArray[np.float64]:
    if kind_of(dout) is None or tuple(dout.shape) != problem.out_shape:
        got = tuple(getattr(dout, "shape", ())) or type(dout).__name__
        raise InvalidProblem(f"gradients: got {got}, expected an array of out's shape {problem.out_shape}")
    x = to_float64(to_numpy(dout))
    if not np.isfinite(x).all():
        raise UnsupportedProblem("gradients: NaN or inf in the arriving gradient; remove it")
    return x


def _rounded(problem: Problem, form: Format, lse_form: Format, dout: NDArray[np.float64] | None) -> Answer:
    need = np.ones(problem.out_shape[:3], bool)
    raw: Raw = {}
    enclosures: dict[str, Enclosure] = {}
    values: dict[str, NDArray[np.float64]] = {}
    decided: dict[str, NDArray[np.bool_]] = {}
    for step, bits in enumerate(LADDER):
        balls = Balls(bits)
        everything = bool(need.all())
        with balls.working():
            new = run(problem, balls, dout, need)
            for name, x in new.items():
                if not raw or everything or name in ("out", "lse", "dq"):
                    old = ~decided[name] if name in decided else np.ones(x.shape, bool)
                    fresh = old & (
                        need if x.shape == need.shape else need[..., None] if name in ("out", "dq") else True
                    )
                    _update(name, x, fresh, raw, enclosures)
        for name, e in enclosures.items():
            value, sure = e.settle(lse_form if name == "lse" else form)
            if name in decided:
                value, sure = np.where(decided[name], values[name], value), decided[name] | sure
            values[name], decided[name] = value, sure
        if step:
            with balls.working():
                decide_by_sign(raw, {"lse": lse_form}, form, enclosures, values, decided)
        if step == 1:
            lone_key_lse(problem, lse_form, values, decided)
            exact_ties(problem, form, dout, enclosures, values, decided)
        need = _undecided_rows(problem, decided)
        if not need.any():
            break
    typed = {n: from_float64(v, (lse_form if n == "lse" else form).name) for n, v in values.items()}
    return Answer(problem, typed, enclosures, form.name, {n: int((~d).sum()) for n, d in decided.items()}, {})


def _update(name: str, x: NDArray[Any], fresh: NDArray[np.bool_], raw: Raw, enclosures: dict[str, Enclosure]) -> None:
    if name not in raw:
        raw[name], enclosures[name] = x, Enclosure.of(x)
        return
    raw[name][fresh] = x[fresh]
    better, e = Enclosure.of(x[fresh]), enclosures[name]
    for field in ("mid", "tail", "radius"):
        getattr(e, field)[fresh] = getattr(better, field)


def _undecided_rows(problem: Problem, decided: dict[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    need = np.zeros(problem.out_shape[:3], bool)
    for name, d in decided.items():
        if name in ("out", "dq"):
            need |= ~d.all(-1)
        elif name == "lse":
            need |= ~d
        elif not d.all():
            need[...] = True  # sums over rows
    return need
