"""What a kernel can do, found by trying: for a kernel that does not say, and for `refattn init`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..dtypes import FORMATS
from ..errors import KernelError, UnsupportedProblem
from ..problem import VARIANT, Problem
from ..variants import variant_of
from .bounds.expected import expected
from .call import call_gradients, call_kernel
from .compare import compare
from .inputs.draw import Draw
from .kernel import Kernel
from .model import FEATURES, FURTHER, GRADIENTS, Capabilities
from .reading import unread

__all__ = ["WIDTHS", "found", "probed", "tried"]

WIDTHS = (16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 512)
LENGTHS = (1, 2, 8, 16, 32, 64, 128)
CALLS: dict[str, Callable[[Draw], Problem]] = {
    "causal_bottom_right": lambda d: d.problem(64, 64, causal="bottom_right"),
    "causal_top_left": lambda d: d.problem(64, 64, causal="top_left"),
    "window": lambda d: d.problem(64, 64, window=(9, 4)),
    "softcap": lambda d: d.problem(64, 64, softcap=2.0),
    "sink": lambda d: d.problem(64, 64, sink=d.normal(2)),
    "bias": lambda d: d.problem(64, 64, bias=d.normal(1, 2, 64, 64)),
    "allowed": lambda d: d.problem(64, 64, allowed=d.mask(1, 2, 64, 64)),
    "weight": lambda d: d.problem(64, 64, weight=np.exp(d.normal(1, 2, 64, 64))),
    "variable_lengths": lambda d: d.problem(64, 64, cu_seqlens_q=_ends(), cu_seqlens_k=_ends()),
    "grouped_heads": lambda d: d.problem(64, 64, h=4, h_kv=2),
    "d_v_differs": lambda d: d.problem(64, 64, d_v=64),
    "lengths_differ": lambda d: d.problem(64, 128),
    "scale": lambda d: d.problem(64, 64, scale=0.3),
    "no_rows_or_keys": lambda d: d.problem(5, 0),
}
"""A call for each feature that has it and nothing else."""


def _ends() -> Any:
    return np.array([0, 16, 48, 64], np.int32)


def tried(kernel: Kernel, problem: Problem) -> str:
    """Return what a kernel does with a call: it is "right" or "wrong", leaves an option "unread", or "raises"."""
    try:
        result = call_kernel(kernel.call, problem)
    except (KernelError, UnsupportedProblem):
        return "raises"
    if unread(problem, result.read):
        return "unread"
    known = expected(problem, kernel.model(problem.dtype))
    return "wrong" if compare("out", result.out, known.answer, known.allowed["out"], problem.dtype).wrong else "right"


def probed(kernel: Kernel, variant: str = VARIANT) -> Capabilities:
    """Return the capabilities of a kernel without the features that it raises for or does not read."""
    v, able = variant_of(variant), kernel.capabilities
    dtype = next((n for n in FORMATS if n in able.dtypes), "float32")
    lacks = set()
    for name in able.features & set(CALLS):
        problem = _call(CALLS[name], dtype, variant)
        if v.takes(problem) and tried(kernel, problem) in ("raises", "unread"):
            lacks.add(name)
    return replace(able, features=able.features - lacks)


def _call(build: Callable[[Draw], Problem], dtype: str, variant: str) -> Problem:
    return build(Draw(FORMATS[dtype], np.random.default_rng(5), variant))


def found(kernel: Kernel) -> tuple[Capabilities, dict[str, str]]:
    """Return the capabilities that trying shows, and what became of each feature, width and length.

    Parameters
    ----------
    kernel : Kernel
        Whatever it declares is not looked at, but for the library of its arrays.
    """
    given = kernel.capabilities
    said: dict[str, str] = {}

    def plain(draw: Draw, **more: Any) -> Problem:
        return draw.problem(**{"n_q": 128, "n_k": 128, "d": 64} | more)

    dtypes = []
    for dtype in FORMATS:
        said[dtype] = tried(kernel, _call(plain, dtype, VARIANT))
        if said[dtype] in ("right", "wrong"):
            dtypes.append(dtype)
    dtype = dtypes[0] if dtypes else "float32"

    def ask(name: str, build: Callable[[Draw], Problem]) -> bool:
        said[name] = tried(kernel, _call(build, dtype, VARIANT))
        return said[name] in ("right", "wrong")

    widths = [w for w in WIDTHS if ask(f"width {w}", lambda draw, w=w: plain(draw, d=w))]  # type: ignore[misc]
    step = next((n for n in LENGTHS if ask(f"lengths {n}", lambda draw, n=n: plain(draw, n_q=3 * n, n_k=3 * n))), 1)  # type: ignore[misc]
    features = frozenset(n for n, build in CALLS.items() if n in FEATURES | FURTHER and ask(n, build))
    call = _call(plain, dtype, VARIANT)
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
    )
    return able, said


def _gradients(kernel: Kernel, call: Problem) -> frozenset[str]:
    if not hasattr(kernel.call, "gradients"):
        return frozenset()
    try:
        names, _ = call_gradients(kernel.call, call, np.zeros_like(np.asarray(call.value)))
    except (KernelError, UnsupportedProblem):
        return frozenset()
    return frozenset(names) & GRADIENTS
