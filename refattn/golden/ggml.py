"""One call as ggml lays it out for ggml_flash_attn_ext, with the exact result and what each element may be off by.

Shapes and types are those of llama.cpp's tests/test-backend-ops.cpp (test_flash_attn_ext, a version of early 2025,
read): Q float32 (d, n_q, h_q, b), K and V float16 (d, n_k, h_kv, b), a mask of float16 (n_k, n_q padded to 64, heads,
b), and dst float32 (d_v, h_q, n_q, b), the first axis running fastest. That test allows an nmse of 5e-4 between two
backends; here each element has its own bound.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.bounds.forward import bounds
from ..check.model import Model, flash
from ..errors import InvalidInput, expect
from ..exact.driver import evaluate
from ..files import write_text, write_whole
from ..masks import visible
from ..problem import VARIANT, Problem

__all__ = ["make_ggml"]

TAKEN = frozenset(
    {"causal_bottom_right", "causal_top_left", "window", "negative_window", "alignment", "offset", "softcap", "sink"}
    | {"bias", "allowed", "grouped_heads", "d_v_differs", "lengths_differ", "scale", "types_differ", "out_dtype"}
)
"""What ggml_flash_attn_ext is told by a mask, a scale, a softcap and sinks."""
PAD = 64
"""GGML_KQ_MASK_PAD: the mask's rows are a multiple of it; later versions no longer ask for that."""


def make_ggml(folder: str | Path, problem: Problem, model: Model | None = None) -> list[str]:
    """Write a call for a C++ program that calls ggml_flash_attn_ext: a header, tensors, the result and its bounds.

    Parameters
    ----------
    folder : path
        A new or empty folder.
    problem : Problem
        Softmax; query of float32 whose numbers float16 has, key and value of float16, out_dtype "float32". Masks are
        written as one tensor; biases must be float16 numbers, and each row must see a key.
    model : Model, optional
        How the kernel rounds; by default P is rounded to float16 and all sums are float32 (GGML_PREC_F32).

    Returns
    -------
    list of str
        The names of the files: case.txt, and a .bin for each tensor, little-endian.

    Raises
    ------
    InvalidInput
        A folder with files in it, a call that ggml_flash_attn_ext does not take, and why.
    """
    expect(isinstance(folder, str | os.PathLike), "folder", folder, "a path")
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    expect(isinstance(model, Model | None), "model", model, "a Model, such as refattn.check.model.flash('float16')")
    p, path = problem.to("numpy").with_bias(), Path(folder)
    _expect_taken(p)
    p = p.replace(scale=_scale(p))
    answer = evaluate(p, rounding="float32")
    near = evaluate(p)
    limit = bounds(near, model or replace(flash("float16"), rotated=""))["out"]
    allowed = limit.astype(np.float32)
    allowed = np.where(allowed < limit, np.nextafter(allowed, np.float32(np.inf)), allowed)
    tensors: dict[str, NDArray[Any]] = {"q": p.query, "k": p.key, "v": p.value, "mask": _mask(p)}
    tensors |= {} if p.sink is None else {"sinks": np.asarray(p.sink, np.float32)}
    tensors |= {"dst": answer.out.swapaxes(1, 2), "allowed": allowed.swapaxes(1, 2)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        full = any(path.iterdir())
    except OSError as e:
        raise InvalidInput(f"{folder}: got {e.strerror}, expected a folder that can be written") from e
    if full:
        raise InvalidInput(f"{folder}: got a folder with files in it, expected a new or empty one")
    cap = 0.0 if p.softcap is None else float(p.softcap)
    lines = [f"scale {p.scale!r}", "max_bias 0", f"logit_softcap {cap!r}", f"tensors {len(tensors)}"]
    for name, x in tensors.items():
        kind = {"float16": "F16", "float32": "F32"}[x.dtype.name]
        ne = (*x.shape[::-1], *(1,) * (4 - x.ndim))
        lines.append(f"{name} {kind} {' '.join(map(str, ne))}")
        write_whole(path / f"{name}.bin", _writer(x))
    write_text(path / "case.txt", "\n".join(lines) + "\n")
    return ["case.txt", *(f"{n}.bin" for n in tensors)]


def _scale(p: Problem) -> float:
    """Return the scale that ggml is told, of float32."""
    scale = 1 / math.sqrt(p.d_k) if p.scale is None else p.scale
    with np.errstate(over="ignore"):
        found = float(np.float32(scale))
    expect(math.isfinite(found) and bool(found) == bool(scale), "scale", scale, "a number in float32's range")
    return found


def _writer(x: NDArray[Any]) -> Any:
    data = np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<")).tobytes()
    return lambda file: file.write(data)


def _mask(p: Problem) -> NDArray[Any]:
    """Return the mask, (b, heads or 1, rows, n_k): what is added to scores, -inf where a key is hidden."""
    heads = 1 if all(x is None or x.shape[1] == 1 for x in (p.bias, p.written_out().allowed)) else p.heads
    found = np.full((p.batch, heads, -(-p.n_q // PAD) * PAD, p.n_k), -np.inf, np.float16)
    for b in range(p.batch):
        for h in range(heads):
            seen = visible(p, b, h, slice(0, p.n_q), slice(0, p.n_k))
            bias = 0.0
            if p.bias is not None:
                at = b if p.bias.shape[0] > 1 else 0, h if p.bias.shape[1] > 1 else 0
                bias = p.bias[at].astype(np.float64)
            found[b, h, : p.n_q] = np.where(seen, bias, -np.inf)
    return found


def _expect_taken(p: Problem) -> None:
    """Refuse what a mask, a scale, a softcap and sinks do not say."""
    lacks = sorted(p.features() - TAKEN)
    if p.variant != VARIANT or lacks:
        raise InvalidInput(f"problem: has {lacks[0] if lacks else p.variant}, which ggml_flash_attn_ext does not take")
    kinds = {n: getattr(p, n).dtype.name for n in ("query", "key", "value")} | {"out": p.out_type}
    for name, kind in kinds.items():
        wanted = "float16" if name in ("key", "value") else "float32"
        if kind != wanted:
            raise InvalidInput(f"{name}: got {kind}, expected {wanted}; say out_dtype='float32' for types that differ")
    for name, x in (("query", p.query), ("bias", p.bias)):
        with np.errstate(over="ignore"):
            if x is not None and not np.array_equal(x.astype(np.float16).astype(x.dtype), x):
                raise InvalidInput(f"{name}: has numbers that float16 has not, to which ggml rounds; round them first")
    for name, x in (("softcap", p.softcap), ("sink", p.sink)):
        wide = np.asarray(0.0 if x is None else x, np.float64)
        with np.errstate(over="ignore"):
            if not np.array_equal(wide.astype(np.float32).astype(np.float64), wide):
                raise InvalidInput(f"{name}: has numbers that float32 has not, which is what ggml takes; round them")
    if p.bias is not None and (p.bias == np.inf).any():
        raise InvalidInput("bias: has +inf, of which ggml makes NaN; expected finite numbers or -inf")
    if not all(np.isfinite(x.astype(np.float64)).all() for x in (p.query, p.key, p.value)):
        raise InvalidInput("query, key, value: have NaN or inf, expected finite numbers")
    for b in range(p.batch):
        for h in range(p.heads):
            if not visible(p, b, h, slice(0, p.n_q), slice(0, p.n_k)).any(1).all():
                raise InvalidInput(f"problem: head {h} of item {b} has a row without keys; ggml gives NaN there")
