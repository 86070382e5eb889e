"""What a golden file holds: a call, its exact answer and allowed errors, as JSON values and as flat text."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64, to_float64
from ..check.bounds.forward import bounds
from ..check.bounds.gradients import gradient_bounds
from ..check.call import SOURCES
from ..check.model import Model, flash
from ..dtypes import FORMATS
from ..errors import InvalidInput
from ..exact.answer import Answer
from ..exact.driver import evaluate
from ..exact.enclosure import Enclosure
from ..problem import Problem
from ..variants import variant_of

__all__ = ["BITS", "VERSION", "answer_of", "array_of", "document_of", "parse", "problem_of", "spell", "text_of"]

VERSION = 1
BITS = 16  # allowed errors are rounded up to these: the last bits of a machine's exp do not show
NAMED = ("scale", "causal", "window", "softcap")
"""Settings that every document has."""
SIZES = {"b": "batch", "h_q": "heads", "h_kv": "heads_kv"} | {n: n for n in ("n_q", "n_k", "d_k", "d_v")}
Document = dict[str, Any]


def spell(x: float) -> str:
    """Return a number as C99 writes it in hex, without trailing zeros: ``0x1.8p+1``, ``-0x0p+0``, ``inf``, ``nan``."""
    if not math.isfinite(x):
        return str(x)
    digits, exponent = float(x).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}"


def parse(x: Any, name: str = "number") -> float:
    """Return a number from a JSON value: hex or decimal text, nan, inf, or a JSON number.

    Raises
    ------
    InvalidInput
        It is none of these, or too large for float64.
    """
    try:
        if isinstance(x, str):
            return float.fromhex(x) if "0x" in x.lower() else float(x)
        if isinstance(x, int | float) and not isinstance(x, bool):
            return float(x)
    except (ValueError, OverflowError):
        pass
    raise InvalidInput(f"{name}: got {str(x)[:40]!r}, expected a hex or decimal number, inf or nan")


def document_of(case: str, problem: Problem, dout: NDArray[Any] | None = None) -> Document:
    """Return a call, evaluated, as JSON values, with `dout` its gradients, too; docs/golden.md says what is what."""
    variant, model = variant_of(problem.variant), flash(problem.dtype)
    near = 1 / math.sqrt(problem.d_k) if variant.default_scale == "rsqrt" and problem.d_k else 1.0
    head = {"golden": VERSION, "case": case, "variant": problem.variant, "dtype": problem.dtype}
    further = {n: _plain(x) for n, x in problem.settings().items() if n not in (*NAMED, "variant", "options")}
    return head | {
        "sizes": {n: getattr(problem, attribute) for n, attribute in SIZES.items()},
        "scale": _plain(problem.scale),
        "scale_float64": spell(near if problem.scale is None else problem.scale),
        "causal": problem.causal,
        "window": _plain(problem.window),
        "softcap": _plain(problem.softcap),
        **({"settings": further} if further else {}),
        "options": _plain(variant.settings(problem)),
        "model": _plain(asdict(model)),
        "inputs": {n: _stored(x) for n, x in (problem.arrays() | ({} if dout is None else {"dout": dout})).items()},
        "exact": _exact(problem, model, dout),
    }


def _exact(problem: Problem, model: Model, dout: NDArray[Any] | None) -> Document:
    near = evaluate(problem, gradients=dout, rounding="float64")
    answer = evaluate(problem, rounding=problem.dtype, lse_rounding=model.lse)
    rounded, undecided = dict(answer.values), sum((*near.undecided.values(), *answer.undecided.values()))
    for name, source in SOURCES.items():
        if name in near.values:
            kind = getattr(problem, source).dtype.name
            value, decided = near.enclosures[name].settle(FORMATS[kind])
            if not decided.all():  # exact ties of the narrower type, which its own evaluation recognises
                own = evaluate(problem, gradients=dout, rounding=kind)
                rounded[name], undecided = own.values[name], undecided + own.undecided[name]
                continue
            rounded[name], undecided = from_float64(value, kind), undecided + int((~decided).sum())
    if undecided:
        raise InvalidInput(f"{problem!r}: got {undecided} elements without a decided rounding, expected 0")
    known = answer_of(problem, near.values)
    limit = bounds(known, model)
    if dout is not None:
        limit = limit | gradient_bounds(known, model, dout, limit)
    found = {}
    for name, x in near.values.items():
        # the stored exact value is off by up to half its last place
        use = np.isfinite(x) & (x != 0)
        allowed = limit[name] + np.where(use, FORMATS["float64"].ulp_array(x) / 2, 0.0)
        with np.errstate(over="ignore"):
            m, e = np.frexp(allowed)
            allowed = np.ldexp(np.ceil(np.ldexp(m, BITS)), e - BITS)
        stored = _stored(rounded[name])
        stored["rounded"] = stored.pop("data")
        found[name] = stored | {"float64": _spelled(x), "allowed": _spelled(allowed)}
    return found


def answer_of(problem: Problem, near: dict[str, NDArray[Any]]) -> Answer:
    """Return an Answer whose exact values are float64 arrays."""
    exact = {n: Enclosure(x, np.zeros_like(x), np.zeros_like(x)) for n, x in near.items()}
    return Answer(problem, near, exact, None, {}, {})


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {n: _plain(v) for n, v in x.items()}
    if isinstance(x, tuple):
        return [_plain(v) for v in x]
    return spell(x) if isinstance(x, float) else x


def _back(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(_back(v) for v in x)
    return float.fromhex(x) if isinstance(x, str) and "0x" in x else x


def _spelled(x: NDArray[Any]) -> list[str]:
    return [spell(v) for v in to_float64(x).ravel().tolist()]


def _stored(x: NDArray[Any]) -> Document:
    data: list[Any]
    if x.dtype == bool:
        data = ["".join("01"[v] for v in row) for row in x.reshape(-1, x.shape[-1]).tolist()] if x.size else []
    else:
        data = x.ravel().tolist() if x.dtype.kind in "iu" else _spelled(x)
    return {"type": x.dtype.name, "shape": list(x.shape), "data": data}


def array_of(stored: Document, key: str = "data") -> NDArray[Any]:
    """Return a stored array in its own type, or its float64 or allowed part."""
    kind, data, shape = stored["type"], stored[key], stored["shape"]
    if kind == "bool":
        return np.array([c == "1" for c in "".join(data)], bool).reshape(shape)
    if kind not in FORMATS:
        return np.array(data, kind).reshape(shape)
    x = np.array([parse(v) for v in data], np.float64).reshape(shape)
    return from_float64(x, kind) if key in ("data", "rounded") else x


def problem_of(document: Document) -> Problem:
    """Return the call that a document holds."""
    arrays: Any = {n: array_of(x) for n, x in document["inputs"].items() if n != "dout"}
    settings: Any = {n: _back(document[n]) for n in (*NAMED, "variant")}
    settings |= {n: _back(x) for n, x in document.get("settings", {}).items()}
    return Problem(**arrays, **settings, options={n: _back(x) for n, x in document["options"].items()})


def text_of(document: Document) -> str:
    """Return the flat text: lines of a word and a value, then arrays, each a line about it and a number a line."""
    left, right = document["window"] or (None, None)
    head = {n: document[n] for n in ("golden", "case", "variant", "dtype")} | document["sizes"]
    head |= {"scale": document["scale_float64"], "causal": document["causal"], "softcap": document["softcap"]}
    head |= {"window_left": left, "window_right": right} | document.get("settings", {}) | document["options"]
    arrays = [(n, x["type"], x["shape"], x["data"]) for n, x in document["inputs"].items()]
    for n, x in document["exact"].items():
        arrays.append((f"{n}_rounded", x["type"], x["shape"], x["rounded"]))
        arrays += [(f"{n}_{k}", "float64", x["shape"], x[k]) for k in ("float64", "allowed")]
    lines = [f"{n} {_word(v)}" for n, v in head.items()] + [f"arrays {len(arrays)}"]
    for n, kind, shape, data in arrays:
        lines.append(f"{n} {kind} {math.prod(shape)} {' '.join(map(str, shape))}")
        lines += list("".join(data)) if kind == "bool" else map(str, data)
    return "\n".join(lines) + "\n"


def _word(x: Any) -> str:
    if isinstance(x, list):
        return ",".join(map(_word, x))
    return "none" if x is None else str(int(x)) if isinstance(x, bool) else str(x)
