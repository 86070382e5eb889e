"""The recurrences' kernels on tensor cores, their text run on the CPU: what a call launches, in its order."""

import ctypes

import numpy as np

from refattn.gpu import delta_mma, lightning_mma

from . import warps_host
from .recurrence_host import Tensor, pointer, tensor

__all__ = ["libraries", "run"]

LIGHTNING = r"""
extern "C" void lightning_states_on(int grid, const Tensor* x, const float* start, float* last, unsigned char* kept,
                                    const double* rates, const Gate*, const int* cu, const Sizes* z, float) {
    blocks(grid, 128, [=] { lightning_states(x[1], x[2], start, (float*)kept, rates, cu, *z); });
}
extern "C" void lightning_scan_on(int grid, const Tensor*, const float*, float*, unsigned char* kept,
                                  const double* rates, const Gate*, const int*, const Sizes* z, float) {
    blocks(grid, 256, [=] { lightning_scan((float*)kept, rates, *z); });
}
extern "C" void lightning_on(int grid, const Tensor* x, const float* start, float* last, unsigned char* kept,
                             const double* rates, const Gate*, const int* cu, const Sizes* z, float scale) {
    blocks(grid, 128, [=] { lightning(x[0], x[1], x[2], x[3], start, (float*)kept, last, rates, cu, *z, scale); });
}
"""
DELTA = r"""
extern "C" void delta_chunks_on(int grid, const Tensor* x, const float*, float*, unsigned char* kept, const double*,
                                const Gate* g, const int* cu, const Sizes* z, float) {
    blocks(grid, 128, [=] { delta_chunks(x[0], x[1], g[0], g[1], kept, cu, *z); });
}
extern "C" void gated_delta_on(int grid, const Tensor* x, const float* start, float* last, unsigned char* kept,
                               const double*, const Gate*, const int* cu, const Sizes* z, float scale) {
    blocks(grid, 128, [=] { gated_delta(x[0], x[1], x[2], x[3], start, last, kept, cu, *z, scale); });
}
"""


def libraries(folder):
    """Return what compiles the kernels for a call, each text once."""
    made = {}

    def of(p):
        if p.variant == "lightning":
            m, file, after = lightning_mma.macros(p.d_k, p.d_v), lightning_mma.FILE, "struct Gate;" + LIGHTNING
        else:
            m, file, after = delta_mma.macros(p.d_k, int(p.alpha is not None)), delta_mma.FILE, DELTA
        key = (file, *m.values())
        if key not in made:
            made[key] = warps_host.library(folder, file, m, after)
        return made[key], m

    return of


def run(made, p, room=1):
    """Return out and the last state of a call of bfloat16; room: blocks that the parts of a sequence may fill."""
    library, m = made(p)
    sequences, h = p.state_shape[:2]
    if p.variant == "lightning":
        sizes, grids, kept = lightning_mma.shape(m, (h, p.n_q, p.d_v), sequences, room)
    else:
        sizes, grids, kept = delta_mma.shape((h, p.n_q, p.d_v), sequences, p.batch, p.cu_seqlens_q is not None)
    names = {"heads": h, "group": h // p.heads_kv, "n": p.n_q, "d_k": p.d_k, "d_v": p.d_v} | sizes
    z = (ctypes.c_int * len(names))(*names.values())
    out, last = np.full(p.out_shape, np.nan, p.value.dtype), np.full(p.state_shape, np.nan, np.float32)
    x = (Tensor * 4)(*(tensor(y) for y in (p.query, p.key, p.value, out)))
    gates = (Tensor * 2)(tensor(p.alpha), tensor(p.beta))
    work, rates = np.full(kept + 4, np.nan, np.float32), np.array(p.options.get("decay", (0.0,)), np.float64)
    cu = None if p.cu_seqlens_q is None else np.ascontiguousarray(p.cu_seqlens_q, np.int32)
    start = pointer(p.state)
    scale = ctypes.c_float(1.0 if p.scale is None else p.scale)
    for entry, grid in grids.items():
        if grid:
            call = getattr(library, f"{entry}_on")
            call(grid, x, start, pointer(last), pointer(work), pointer(rates), gates, pointer(cu), z, scale)
    return out, last
