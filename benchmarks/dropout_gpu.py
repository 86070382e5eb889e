"""Dropout of PyTorch's fused kernels on a GPU: the mask that a seed draws, read off, and a call judged with it.

PyTorch hands out no mask. With queries and keys of zeros and a unit vector for each key's value, out is 0 where a
weight was dropped; the same seed then draws the same mask for another call of the shape, which is judged with it.
Floor: the mask is the same each time, every element is within its bound, and the next row's mask fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refattn import Problem, check_problem, dropout_mask
from refattn.arrays import from_float64, to_kind
from refattn.bench import Row, gpu_torch
from refattn.check.kernels.packages import on_gpu
from refattn.check.kernels.torch_sdpa import sdpa

BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")
SHAPE = (2, 4, 100, 128)
SEED, OFFSET, P = 7, 4, 0.25


def rows() -> Iterator[Row]:
    """How often weights are kept, which layout of Philox the mask is, and the verdict."""
    torch = gpu_torch()
    rng, (b, h, n, m) = np.random.default_rng(0), SHAPE
    q, k, v = (from_float64(rng.standard_normal((b, h, x, 128)), "bfloat16") for x in (n, m, m))
    seed = {"dropout_p": P, "philox_layout": "flash", "philox_seed": SEED, "philox_offset": OFFSET}
    unit = np.broadcast_to(np.eye(m), v.shape).astype(v.dtype)

    for name in BACKENDS:

        def out(*tensors: np.ndarray, name: str = name) -> np.ndarray:
            p = Problem(*(to_kind(np.ascontiguousarray(x), "torch", "cuda") for x in tensors), **seed)
            return sdpa(p, name).to(torch.float32).cpu().numpy()

        mask = out(q * 0, k * 0, unit) != 0
        yield Row(f"{name}: weights kept", mask.mean(), "share")
        for what, other in (("twice", out(q * 0, k * 0, unit) != 0), ("of other scores", out(q, k, unit) != 0)):
            yield Row(f"{name}: the same mask {what}", (mask == other).mean(), "share", at_least=1)
        for layout in ("flash", "efficient"):
            same = (mask == dropout_mask(SEED, OFFSET, SHAPE, P, layout)).mean()
            yield Row(f"{name}: agrees with philox_layout={layout!r}", same, "share")
        got = from_float64(out(q, k, v).astype(np.float64), "bfloat16")
        for label, kept in (("its mask", mask), ("the next row's", np.roll(mask, 1, 2))):
            p = Problem(q, k, v, dropout_p=P, dropout_mask=kept)
            (check,) = check_problem(lambda _, got=got: got, p, label, model=on_gpu).checks
            (worst,) = check.arrays
            if kept is mask:
                yield Row(f"{name}: out with {label}, error/allowed", worst.ratio, "ratio", at_most=1)
                yield Row(f"{name}: out with {label}, rms/predicted", worst.figures.rms, "ratio", at_most=1.2)
            else:
                yield Row(f"{name}: out with {label}, error/allowed", worst.ratio, "ratio", at_least=1)
