"""What a kernel can do, found by trying: for a kernel that does not say, and for `refattn init`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import ELEMENTS, FORMATS
from ..errors import KernelError, UnsupportedProblem
from ..exact.blas import one_thread
from ..problem import VARIANT, Problem
from ..variants import Steps, variant_of
from .bounds.expected import expected
from .call import call_gradients, call_kernel
from .compare import compare
from .inputs.draw import Draw
from .inputs.dropped import bits, philox
from .inputs.paged import paged
from .inputs.positioned import norms, rotary, slopes
from .inputs.typed import ONE, WIDE, typed
from .kernel import Kernel
from .model import FEATURES, FURTHER, GRADIENTS, Capabilities
from .reading import unread

__all__ = ["WIDTHS", "found", "has", "probed", "tried"]

WIDTHS = (16, 32, 33, 40, 64, 72, 80, 96, 128, 160, 192, 256, 512)
LENGTHS = (1, 2, 8, 16, 32, 64, 128)
Build = Callable[..., Problem]
PLAIN: dict[str, Any] = {"h": 2, "h_kv": 2}
CALLS: dict[str, Build] = {
    "causal_bottom_right": lambda draw, n=64, **w: draw.problem(n, n, causal="bottom_right", **w),
    "causal_top_left": lambda draw, n=64, **w: draw.problem(n, n, causal="top_left", **w),
    "window": lambda draw, n=64, **w: draw.problem(n, n, window=(9, 4), **w),
    "softcap": lambda draw, n=64, **w: draw.problem(n, n, softcap=2.0, **w),
    "sink": lambda draw, n=64, **w: draw.problem(n, n, sink=draw.normal(2), **w),
    "bias": lambda draw, n=64, **w: draw.problem(n, n, bias=draw.normal(1, 2, n, n), **w),
    "allowed": lambda draw, n=64, **w: draw.problem(n, n, allowed=draw.mask(1, 2, n, n), **w),
    "weight": lambda draw, n=64, **w: draw.problem(n, n, weight=np.exp(draw.normal(1, 2, n, n)), **w),
    "dropout_mask": lambda draw, n=64, **w: draw.problem(n, n, dropout_p=0.25, dropout_mask=draw.mask(1, 2, n, n), **w),
    "dropout_bits": lambda draw, n=64, **w: draw.problem(n, n, **bits(draw, 0.25, 1, 2, n, n), **w),
    "philox_flash": lambda draw, n=64, **w: draw.problem(n, n, **philox(draw, 0.25, "flash"), **w),
    "philox_efficient": lambda draw, n=64, **w: draw.problem(n, n, **philox(draw, 0.25, "efficient"), **w),
    "lengths_q": lambda draw, n=64, **w: draw.problem(n, n, b=2, lengths_q=_used(n), **w),
    "lengths_k": lambda draw, n=64, **w: draw.problem(n, n, b=2, lengths_k=_used(n), **w),
    "offset": lambda draw, n=64, **w: draw.problem(n, n, causal="top_left", offset=n // 2, **w),
    "alignment": lambda draw, n=64, **w: draw.problem(n, 2 * n, window=(9, 4), alignment="top_left", **w),
    "negative_window": lambda draw, n=64, **w: draw.problem(n, n, window=(n, -1), **w),
    "variable_lengths": lambda draw, n=64, **w: draw.problem(3 * n, 3 * n, **_packed(n), **w),
    "grouped_heads": lambda draw, n=64, **w: draw.problem(n, n, h=4, h_kv=2, **w),
    "d_v_differs": lambda draw, n=64, **w: draw.problem(n, n, **(w | {"d_v": 2 * w.get("d", 32)})),
    "lengths_differ": lambda draw, n=64, **w: draw.problem(n, 2 * n, **w),
    "scales": lambda draw, **w: _typed(draw, ONE, **w),
    "scales_by_head": lambda draw, **w: _typed(draw, (1, 2, 1, 1), **w),
    "scales_by_token": lambda draw, n=64, **w: _typed(draw, (1, 1, n, 1), n, **w),
    "scales_by_channel": lambda draw, n=64, **w: _typed(draw, (1, 1, 1, w.get("d", 32)), n, **w),
    "scales_by_block": lambda draw, n=64, **w: _typed(draw, (1, 1, n // 2, 1), n, **w),
    "out_scale": lambda draw, n=64, **w: draw.problem(n, n, out_scale=0.25, **w),
    "out_dtype": lambda draw, n=64, **w: draw.problem(n, n, out_dtype=_other(draw), **w),
    "types_differ": lambda draw, **w: _typed(draw, None, **w),
    "paged_nhd": lambda draw, n=64, **w: paged(draw, 16, "NHD", (n, n - 7), n_q=n, n_k=n, **PLAIN | w),
    "paged_hnd": lambda draw, n=64, **w: paged(draw, 16, "HND", (n, n - 7), n_q=n, n_k=n, **PLAIN | w),
    "appending": lambda draw, n=64, **w: paged(draw, 16, "NHD", (n, n - 7), new=3, n_q=n, n_k=n, **PLAIN | w),
    "rotary_half": lambda draw, n=64, **w: draw.problem(n, n, **_rotary(draw, "half", n, **w), **w),
    "rotary_interleaved": lambda draw, n=64, **w: draw.problem(n, n, **_rotary(draw, "interleaved", n, **w), **w),
    "rotary_partial": lambda draw, n=64, **w: draw.problem(n, n, **_rotary(draw, "half", n, 4, **w), **w),
    "positions": lambda draw, n=64, **w: draw.problem(n, n, **_rotary(draw, "half", n, **w), **_places(n), **w),
    "query_norm": lambda draw, n=64, **w: draw.problem(n, n, **_norm(draw, "query_norm", **w), **w),
    "key_norm": lambda draw, n=64, **w: draw.problem(n, n, **_norm(draw, "key_norm", **w), **w),
    "alibi_slopes": lambda draw, n=64, **w: draw.problem(n, n, alibi_slopes=slopes(draw, 2), **w),
    "d_k_zero": lambda draw, n=64, **w: draw.problem(n, n, **(w | {"d": 0, "d_v": w.get("d", 32)})),
    "scale": lambda draw, n=64, **w: draw.problem(n, n, scale=0.3, **w),
    "no_rows_or_keys": lambda draw, n=64, **w: draw.problem(n, 0, **w),
}
"""A call for each feature that has it and nothing else: of a length and a width."""


def _columns(draw: Draw, **size: Any) -> Problem:
    p = draw.problem(**{"n_q": 64, "n_k": 64} | size)
    return p.replace(key=np.ascontiguousarray(p.key.swapaxes(2, 3)).swapaxes(2, 3))


def _other(draw: Draw) -> str:
    return "bfloat16" if draw.form.name == "float32" else "float32"


def _typed(draw: Draw, blocks: Any, n: int = 64, elements: str = "float8_e4m3fn", **size: Any) -> Problem:
    """Return a call of float8 keys and values, and queries where `blocks` says how they are scaled, too."""
    return typed(draw, elements, blocks, blocks or ONE, blocks or ONE, **{"n_q": n, "n_k": n, "b": 1, "h": 2} | size)


def _norm(draw: Draw, name: str, **size: Any) -> dict[str, Any]:
    found = norms(draw, size.get("d", 32))
    return {name: found[name], "norm_eps": found["norm_eps"]}


def _rotary(draw: Draw, style: str, n: int, part: int = 2, **size: Any) -> dict[str, Any]:
    return rotary(draw, style, size.get("d", 32) // part, n + 9)


def _places(n: int) -> dict[str, Any]:
    return {"positions_q": np.arange(n) + 7, "positions_k": np.arange(n)[::-1].copy()}


def _used(n: int) -> Any:
    return np.array([n // 2, n], np.int32)


def _packed(n: int) -> dict[str, Any]:
    ends = np.array([0, n, 3 * n], np.int32)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends.copy()}


@one_thread()
def tried(kernel: Kernel, problem: Problem) -> str:
    """Return what a kernel does with a call: it is "right" or "wrong", leaves an option "unread", or "raises"."""
    try:
        result = call_kernel(kernel.call, problem)
    except (KernelError, UnsupportedProblem):
        return "raises"
    if unread(problem, result.read):
        return "unread"
    known = expected(problem, kernel.model(problem.out_type))
    found = compare("out", result.out, known.answer, known.allowed["out"], problem.out_type)
    return "wrong" if found.wrong else "right"


def probed(kernel: Kernel, variant: str = VARIANT) -> Capabilities:
    """Return the capabilities of a kernel without the features that it raises for or does not read."""
    v, able = variant_of(variant), kernel.capabilities
    dtype = next((n for n in FORMATS if n in able.dtypes), "float32")
    lacks = set()
    for name in able.features & set(CALLS):
        problem = _call(CALLS[name], dtype, variant)
        if v.takes(problem) and tried(kernel, problem) in ("raises", "unread"):
            lacks.add(name)
    columns = _call(_columns, dtype, variant)
    side_by_side = able.last_axis_contiguous or (v.takes(columns) and tried(kernel, columns) == "raises")
    return replace(able, features=_with_layout(able.features - lacks), last_axis_contiguous=side_by_side)


def _with_layout(features: frozenset[str]) -> frozenset[str]:
    """Return features without appending where no layout of pages is among them: a kernel that always appends."""
    return features if features & {"paged_nhd", "paged_hnd"} else features - {"appending"}


def _call(build: Callable[[Draw], Problem], dtype: str, variant: str) -> Problem:
    problem = build(Draw(FORMATS[dtype], np.random.default_rng(5), variant))
    always = "causal_bottom_right" in variant_of(variant).always and problem.causal is None
    always = always and problem.alignment is None  # no operator that is always causal has the other corner
    return problem.replace(causal="bottom_right") if always else problem


def has(variant: str, feature: str) -> bool:
    """Tell whether an operator takes calls that have a feature and nothing else."""
    if feature not in CALLS:
        return False
    problem = _call(CALLS[feature], "float32", variant)
    return feature in problem.features() and variant_of(variant).takes(problem)


FIRST = ("float32", "float16", "bfloat16")
"""Formats in which options are tried, the first that is right: float64 is often computed in float32."""


def found(kernel: Kernel, variant: str = VARIANT) -> tuple[Capabilities, dict[str, str], str]:
    """Return the capabilities that trying shows, what became of each feature, width and length, and in which format.

    Parameters
    ----------
    kernel : Kernel
        Whatever it declares is not looked at, but for the library of its arrays.
    variant : str
        The operator that it computes.
    """
    given = kernel.capabilities
    said: dict[str, str] = {}

    def plain(draw: Draw, **more: Any) -> Problem:
        return draw.problem(**{"n_q": 128, "n_k": 128, "d": 64} | more)

    dtypes = []
    for dtype in FORMATS:
        said[dtype] = tried(kernel, _call(plain, dtype, variant))
        if said[dtype] in ("right", "wrong"):
            dtypes.append(dtype)
    rank = [n for n in (*FIRST, *FORMATS) if n in dtypes]
    dtype = next((n for n in rank if said[n] == "right"), rank[0] if rank else "float32")

    def ask(name: str, build: Callable[[Draw], Problem]) -> bool:
        call = _call(build, dtype, variant)
        if not variant_of(variant).takes(call):
            return False
        said[name] = tried(kernel, call)
        return said[name] in ("right", "wrong")

    widths = [w for w in WIDTHS if ask(f"width {w}", lambda draw, w=w: plain(draw, d=w))]  # type: ignore[misc]
    step = next((n for n in LENGTHS if ask(f"lengths {n}", lambda draw, n=n: plain(draw, n_q=3 * n, n_k=3 * n))), 1)  # type: ignore[misc]
    size: dict[str, Any] = {"n": max(64, step), "d": 64 if 64 in widths or not widths else widths[0]}
    features = frozenset(n for n, build in CALLS.items() if n in FEATURES | FURTHER and ask(n, partial(build, **size)))
    stored = [t for t in ELEMENTS if t not in (*dtypes, *WIDE, "float64")]
    elements = frozenset(t for t in stored if ask(f"elements {t}", partial(_typed, blocks=ONE, elements=t, **size)))
    ask("keys by column", partial(_columns, n_q=size["n"], n_k=size["n"], d=size["d"]))
    features = _with_layout(features - _other_corner(kernel, features, dtype, size, said, variant))
    call = _call(plain, dtype, variant)
    lse = said[dtype] != "raises" and call_kernel(kernel.call, call).lse is not None
    able = Capabilities(
        frozenset(dtypes) or frozenset({"float32"}),
        features,
        lse=lse,
        gradients=_gradients(kernel, call),
        arrays=given.arrays,
        device=given.device,
        head_dims=frozenset() if widths == list(WIDTHS) else frozenset(widths),
        seq_multiple=step,
        elements=elements,
        dlse=lse and _takes(kernel, call, call.out_shape[:3], "dq"),
        dstate_out=isinstance(variant_of(variant).shape, Steps) and _takes(kernel, call, call.state_shape, "dk"),
        last_axis_contiguous=said.get("keys by column") == "raises" and said[dtype] != "raises",
    )
    return able, said, dtype


def _other_corner(
    kernel: Kernel, features: frozenset[str], dtype: str, size: dict[str, int], said: dict[str, str], variant: str
) -> set[str]:
    """Return the causal corner that a kernel takes for the other: on square calls they are one."""
    both = {f"causal_{corner}" for corner in ("bottom_right", "top_left")}
    if not both | {"lengths_differ"} <= features:
        return set()
    n, d = size["n"], size["d"]
    right = {
        name
        for name in both
        if tried(kernel, _call(lambda draw, c=name[7:]: draw.problem(n, 2 * n, d=d, causal=c), dtype, variant))  # type: ignore[misc]
        == "right"
    }
    if len(right) != 1:
        return set()
    said.update(dict.fromkeys(both - right, "other"))
    return both - right


def _takes(kernel: Kernel, call: Problem, shape: tuple[int, ...], name: str) -> bool:
    """Tell whether a gradient arriving at lse or at the last state, and it alone, changes one that comes back."""
    if not hasattr(kernel.call, "gradients"):
        return False
    dout, other = np.zeros(call.out_shape, call.query.dtype), np.ones(shape, np.float32)
    try:
        found, _ = call_gradients(kernel.call, call, dout, other)
    except (KernelError, UnsupportedProblem):
        return False
    return bool(np.asarray(found.get(name, 0)).any())


def _gradients(kernel: Kernel, call: Problem) -> frozenset[str]:
    if not hasattr(kernel.call, "gradients"):
        return frozenset()
    try:
        names, _ = call_gradients(kernel.call, call, np.zeros_like(np.asarray(call.value)))
    except (KernelError, UnsupportedProblem):
        return frozenset()
    return frozenset(names) & GRADIENTS
