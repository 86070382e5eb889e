"""Small calls of every kernel between borders of NaN, for compute-sanitizer.

``python -m tests.gpu.sanitized memcheck racecheck initcheck synccheck`` runs them under these tools, in as many
processes side by side as there are cores (``--jobs=N`` for fewer), and prints what each tool says;
``python -m tests.gpu.sanitized`` runs them as they are.
"""

import importlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from refattn.gpu import backward_launch, views
from refattn.gpu.views import view

CALLS = [
    # impl, dtype, (b, h, h_kv, n_q, n_k, d_k, d_v), options
    ("sm90", "bfloat16", (1, 2, 2, 128, 128, 64, 64), {}),
    ("sm90", "float16", (2, 2, 1, 70, 200, 64, 64), {"causal": "bottom_right"}),
    ("sm90", "bfloat16", (1, 1, 1, 193, 129, 128, 128), {"accuracy": "high"}),
    ("sm90", "float16", (1, 2, 1, 65, 33, 200, 200), {"causal": "bottom_right"}),
    ("sm90", "bfloat16", (1, 2, 2, 300, 1300, 64, 64), {"blocks": 128}),
    ("sm90", "float16", (2, 4, 2, 150, 300, 96, 96), {"window": (40, 3), "sink": True, "softcap": 5.0}),
    ("sm90", "bfloat16", (1, 2, 1, 130, 270, 192, 128), {"bias": True, "causal": "top_left"}),
    ("sm90", "float16", (1, 2, 2, 70, 150, 64, 64), {"allowed": True, "accuracy": "high"}),
    ("sm90", "bfloat16", (1, 2, 2, 200, 200, 128, 128), {"packed": True, "causal": "bottom_right"}),
    ("decode", "bfloat16", (2, 4, 1, 3, 1100, 64, 64), {"causal": "bottom_right", "sink": True}),
    ("decode", "float16", (1, 2, 2, 5, 70, 20, 50), {"window": (40, 3), "softcap": 5.0}),
    ("latent", "bfloat16", (1, 6, 2, 70, 150, 576, 512), {"causal": "bottom_right", "sink": True}),
    ("latent", "float16", (2, 16, 1, 2, 1100, 328, 264), {"window": (700, 3), "softcap": 5.0}),
    ("mma", "bfloat16", (1, 2, 2, 129, 65, 64, 64), {"window": (40, 3)}),
    ("mma", "float16", (1, 2, 1, 33, 70, 20, 50), {"allowed": True, "softcap": 5.0}),
    ("mma", "bfloat16", (1, 2, 2, 100, 100, 128, 128), {"packed": True, "causal": "top_left"}),
    ("mma", "float16", (1, 1, 1, 90, 130, 256, 256), {"bias": True, "sink": True}),
    ("mma", "bfloat16", (1, 2, 2, 150, 150, 64, 64), {"blocks": 40, "accuracy": "high"}),
    ("mma", "float16", (1, 2, 2, 150, 2200, 64, 64), {"blocks": 64, "causal": "bottom_right"}),
    ("simt", "float32", (1, 2, 1, 70, 100, 64, 64), {"causal": "bottom_right", "window": (20, None)}),
    ("simt", "float64", (1, 1, 1, 20, 33, 7, 9), {"allowed": True, "bias": True}),
    ("simt", "bfloat16", (1, 2, 2, 100, 100, 128, 128), {"packed": True, "sink": True}),
    ("simt", "float16", (1, 1, 1, 60, 60, 40, 40), {"blocks": 16, "softcap": 3.0}),
]
BACKWARD = [
    # impl, dtype, (b, h, h_kv, n_q, n_k, d_k, d_v), options
    ("sm90", "bfloat16", (1, 2, 1, 129, 270, 128, 128), {"causal": "bottom_right"}),
    ("sm90", "float16", (2, 2, 2, 70, 150, 64, 64), {"window": (20, None)}),
    ("sm90", "bfloat16", (1, 4, 2, 200, 300, 96, 72), {"deterministic": False}),
    ("sm90", "bfloat16", (1, 2, 1, 300, 300, 64, 64), {"packed": True, "softcap": 5.0, "causal": "bottom_right"}),
    ("sm90", "bfloat16", (1, 4, 2, 70, 150, 256, 200), {"causal": "bottom_right"}),
    ("sm90", "float16", (1, 2, 2, 130, 130, 136, 256), {"packed": True, "softcap": 5.0, "deterministic": False}),
    ("sm90", "float16", (1, 2, 2, 200, 200, 128, 128), {"packed": True, "softcap": 5.0, "deterministic": False}),
    ("mma", "bfloat16", (1, 2, 1, 129, 70, 128, 128), {"causal": "bottom_right"}),
    ("mma", "float16", (1, 2, 2, 33, 150, 20, 50), {"softcap": 5.0, "bias": (1, 2, 33, 150)}),
    ("simt", "bfloat16", (1, 2, 1, 70, 90, 64, 64), {"window": (20, None), "bias": (1, 1, 1, 90)}),
    ("simt", "float32", (2, 2, 1, 20, 33, 40, 40), {}),
    ("simt", "float64", (1, 1, 1, 20, 33, 7, 9), {"causal": "top_left"}),
]
CACHE = [
    # dtype, keys' dtype, (h, h_kv, n_q, d), lengths, rows of a page (0: no pages), by token, options
    ("bfloat16", "bfloat16", (4, 1, 1, 64), (70, 0, 600), 16, False, {"causal": "bottom_right"}),
    ("float16", "float16", (2, 2, 3, 40), (33, 300, 1), 0, False, {"window": (20, 3)}),
    ("bfloat16", "float8_e4m3fn", (4, 2, 1, 128), (1, 257, 90), 7, True, {}),
    ("float16", "float8_e4m3fn", (8, 1, 2, 96), (64, 5, 300), 32, False, {"softcap": 5.0}),
]
TRILINEAR = [
    # (b, h, h_kv, n_q, n1, n2, d), options
    ((1, 64, 1, 9, 9, 80, 128), {"causal": "bottom_right", "window": (4, 70)}),
    ((2, 2, 1, 40, 7, 33, 64), {"causal": "top_left", "window": (5, 20)}),
    ((1, 3, 3, 30, 70, 5, 72), {}),
]
ENGINE = [
    # dtype, (h, h_kv, n_q, n_k, d_k, d_v), options, whether with gradients: exact/device/*.cu
    ("float64", (2, 1, 33, 70, 16, 9), {"causal": "bottom_right", "softcap": 3.0}, False),
    ("bfloat16", (1, 1, 5, 2100, 8, 8), {"window": (1500, None)}, False),
    ("float64", (1, 1, 17, 40, 7, 5), {"causal": "bottom_right", "softcap": 3.0}, True),
    ("float32", (2, 1, 20, 33, 8, 8), {"sink": True}, True),
]
BORDER = 512
EMPTY = views.empty


def bordered(cupy, shape, dtype, fill=None):
    """Return an array inside a longer one whose ends are NaN, and that one."""
    size = math.prod(shape)
    whole = cupy.full(size + 2 * BORDER, np.nan, dtype)
    inner = whole[BORDER : BORDER + size].reshape(shape)
    if fill is not None:
        inner[...] = cupy.asarray(fill, dtype)
    return inner, whole


def run(cupy, impl, dtype, shape, options):
    """Call a kernel and hold it to the exact answer; borders must stay NaN."""
    from refattn.check.bounds.expected import expected
    from refattn.check.compare import against
    from refattn.check.model import flash
    from refattn.gpu.attention import attention
    from refattn.problem import Problem

    kind, rng, host = numbers(dtype, shape)
    q, k, v = (bordered(cupy, x.shape, kind, x)[0] for x in host)
    wholes = []

    def empty(like, shape, dtype):
        inner, whole = bordered(cupy, shape, kind if dtype not in ("float32", "float64") else dtype)
        wholes.append((inner, whole))
        return inner, view(inner, "out")

    given, meant = made(cupy, shape, kind, rng, options)
    views.empty = empty
    out, lse = attention(q, k, v, return_lse=True, impl=impl, **given)
    cupy.cuda.get_current_stream().synchronize()
    assert wholes
    known = expected(Problem(*host, **meant), flash(dtype))
    for name, x in (("out", out.get()), ("lse", lse.get())):
        found = against(known, name, x, x.dtype.name)
        assert found.failures == 0, found
    bordered_still(cupy, wholes)


def numbers(dtype, shape):
    """Return a NumPy type, what draws, and query, key and value."""
    import ml_dtypes

    b, h, h_kv, n_q, n_k, d_k, d_v = shape
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    sizes = ((b, h, n_q, d_k), (b, h_kv, n_k, d_k), (b, h_kv, n_k, d_v))
    return kind, rng, [rng.standard_normal(s).astype(kind) for s in sizes]


def made(cupy, shape, kind, rng, options):
    """Return the options as the kernel takes them, and as Problem does."""
    h, n_q, n_k = shape[1], shape[3], shape[4]
    given, meant = dict(options), {n: x for n, x in options.items() if n in ("causal", "window", "softcap")}
    if given.pop("allowed", False):
        meant["allowed"] = rng.random((1, h, n_q, n_k)) < 0.7
        given["allowed"] = bordered(cupy, (1, h, n_q, n_k), np.float32)[0] < 0  # of the same shape
        given["allowed"][...] = cupy.asarray(meant["allowed"])
    if size := given.pop("blocks", 0):
        blocks = rng.random((1, h, -(-n_q // size), -(-n_k // size))) < 0.6
        given["block_mask"] = (cupy.asarray(blocks), size, size)
        meant["allowed"] = np.repeat(np.repeat(blocks, size, 2), size, 3)[:, :, :n_q, :n_k]
    if given.get("bias") is True:
        meant["bias"] = rng.standard_normal((1, h, n_q, n_k)).astype(kind)
        given["bias"] = bordered(cupy, meant["bias"].shape, kind, meant["bias"])[0]
    if given.pop("sink", False):
        meant["sink"] = rng.standard_normal(h).astype(np.float32)
        given["sink"] = cupy.asarray(meant["sink"])
    if given.pop("packed", False):
        ends = np.array([0, n_q // 3, n_q // 3, n_q], np.int32)
        given["cu_seqlens"] = (cupy.asarray(ends), cupy.asarray(ends))
        meant |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    return given, meant


def bordered_still(cupy, wholes):
    """Refuse a number that was written past the end of an array."""
    for inner, whole in wholes:
        ends = cupy.concatenate([whole[:BORDER], whole[BORDER + inner.size :]]).astype(np.float32)
        assert bool(cupy.isnan(ends).all()), "written past the end"


def run_backward(cupy, impl, dtype, shape, options):
    """Call a backward pass between borders of NaN: they stay, and no result is NaN."""
    import ml_dtypes

    from refattn.gpu.attention import attention
    from refattn.gpu.backward import attention_backward

    b, h, h_kv, n_q, n_k, d_k, d_v = shape
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng, wholes, rooms, given = np.random.default_rng(0), [], [], dict(options)
    ordered = given.pop("deterministic", True)

    def make(size):
        return bordered(cupy, size, kind, rng.standard_normal(size).astype(kind))[0]

    q, k, v, dout = (make(s) for s in ((b, h, n_q, d_k), (b, h_kv, n_k, d_k), (b, h_kv, n_k, d_v), (b, h, n_q, d_v)))
    if "bias" in given:
        given["bias"] = make(given["bias"])
    given, _ = made(cupy, shape, kind, rng, given)
    out, lse = attention(q, k, v, return_lse=True, impl="simt", **given)

    def empty(like, size, name):
        inner, whole = bordered(cupy, size, kind)
        wholes.append((inner, whole))
        return inner, view(inner, "out")

    def room(like, size, name):
        """What is allocated in between is NaN, so what nobody wrote is seen: initcheck knows no bulk copies."""
        if name != "float32":
            return EMPTY(like, size, name)
        inner, whole = bordered(cupy, size, np.float32)
        rooms.append((inner, whole))
        return inner, view(inner, "room")

    views.empty, backward_launch.empty = empty, room
    found = attention_backward(q, k, v, out, lse, dout, impl=impl, deterministic=ordered, **given)
    cupy.cuda.get_current_stream().synchronize()
    assert len(wholes) == len(found) == 3 + ("bias" in given)
    assert not any(bool(cupy.isnan(inner.astype(np.float32)).any()) for inner, _ in wholes), "not written"
    bordered_still(cupy, wholes + rooms)


def run_cache(cupy, dtype, narrow, shape, lengths, size, by_token, options):
    """Call the kernel over a cache between borders of NaN; what belongs to no sequence is NaN."""
    import torch

    from refattn.gpu import attention_with_cache

    torch.manual_seed(0)
    h, h_kv, n_q, d = shape
    b, rows = len(lengths), size or max(lengths)
    each = -(-max(lengths) // rows)  # pages of a sequence; without a table, its own rows
    pages = b * each + (1 if size else 0)

    def bordered_in_torch(*sizes, dtype):
        whole = torch.full((math.prod(sizes) + 2 * BORDER,), math.nan, device="cuda").to(getattr(torch, dtype))
        return whole[BORDER:-BORDER].view(sizes)

    query = bordered_in_torch(b, h, n_q, d, dtype=dtype)
    query.copy_(torch.randn(query.shape))
    caches = [bordered_in_torch(pages, h_kv, rows, d, dtype=narrow) for _ in range(2)]
    scales = [bordered_in_torch(pages, h_kv, rows, dtype="float32") for _ in range(2)] if by_token else []
    table = torch.arange(b * each, device="cuda").reshape(b, each)
    for i, n in enumerate(lengths):
        for j in range(0, n, rows):
            page, count = int(table[i, j // rows]), min(rows, n - j)
            for x in (*caches, *scales):
                x[page, :, :count] = torch.randn(x[page, :, :count].shape, device="cuda").to(x.dtype)
    more = dict(zip(("key_scale", "value_scale"), scales, strict=False)) | options
    if size:
        more["page_table"] = table
    found = attention_with_cache(query, *caches, lengths=torch.tensor(lengths, device="cuda"), return_lse=True, **more)
    torch.cuda.synchronize()
    assert found[0].isfinite().all()
    assert found[1].isfinite().all(2).all(1).tolist() == [n > 0 for n in lengths]


def run_trilinear(cupy, shape, options):
    """Call the trilinear kernels, forward and backward, between borders of NaN; results are within their bounds."""
    import ml_dtypes

    from tests.tensor.rounding import bounds

    module = importlib.import_module("refattn.gpu.trilinear")
    b, h, h_kv, n_q, n1, n2, d = shape
    rng, kind, wholes = np.random.default_rng(0), ml_dtypes.bfloat16, []
    sizes = [(b, h, n_q, d), *((b, h_kv, n, d) for n in (n1, n2, n1, n2)), (b, h, n_q, d)]
    host = [rng.standard_normal(s).astype(kind) for s in sizes]
    given = [bordered(cupy, x.shape, kind, x)[0] for x in host]

    def empty(like, shape, dtype):
        inner, whole = bordered(cupy, shape, np.float32 if dtype == "float32" else kind)
        wholes.append((inner, whole))
        return inner, view(inner, "out")

    module.empty = empty
    options = {"causal": None, "window": (None, None), **options, "scale": d**-0.5}
    out, lse = module.forward(*given[:5], **options)
    found = [out, lse, *module.backward(*given[:5], out, lse, given[5], **options)]
    cupy.cuda.get_current_stream().synchronize()
    wanted_out, wanted_lse, gradients = bounds(*(x.astype(np.float64) for x in host), **options)
    for i, (x, (value, bound)) in enumerate(zip(found, [wanted_out, wanted_lse, *gradients], strict=True)):
        here = np.isfinite(value)  # lse of a row without keys is not
        assert (np.abs(x.get().astype(np.float64) - np.where(here, value, 0))[here] <= bound[here]).all(), f"result {i}"
    bordered_still(cupy, wholes)


def run_engine(dtype, shape, options, gradients):
    """Evaluate a call on the GPU: its bits are the CPU's. CuPy's arrays have no borders here, and no pool."""
    from refattn import Problem, evaluate
    from tests.exact.device.drawn import compare

    _, rng, host = numbers(dtype, (1, *shape))
    more = {**options, "sink": rng.standard_normal(shape[0]).astype(host[0].dtype)} if "sink" in options else options
    p = Problem(*host, **more)
    dout = rng.standard_normal(p.out_shape) if gradients else None
    asked = {"rounding": dtype, "lse_rounding": "float64", "gradients": dout}
    assert compare(evaluate(p, device="cuda", **asked), evaluate(p, **asked)) == 0


def every_call():
    """Return what runs each call, and what is printed of it."""
    import cupy

    parts = [(run, CALLS), (run_backward, BACKWARD), (run_cache, CACHE), (run_trilinear, TRILINEAR)]
    each = [(partial(runner, cupy, *call), call) for runner, calls in parts for call in calls]
    return each + [(partial(run_engine, *call), call) for call in ENGINE]


def run_share(share, of):
    """Run every `of`-th call from number `share` on; each begins with the arrays that the package makes."""
    import cupy

    cupy.cuda.set_allocator(None)  # no pool: the sanitizer sees the end of every array
    for call, told in every_call()[share::of]:
        views.empty = backward_launch.empty = importlib.import_module("refattn.gpu.trilinear").empty = EMPTY
        call()
        print("ok", *told, flush=True)


def under(tool, jobs):
    """Return (whether a tool found nothing, the calls that ran, what was printed), with `jobs` processes."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}

    def share(i):
        mine = [*command, sys.executable, "-m", "tests.gpu.sanitized", f"--share={i}/{jobs}"]
        return subprocess.run(mine, capture_output=True, text=True, check=False, cwd=root, env=env)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(share, range(jobs)))
    printed = "".join(x.stdout + x.stderr for x in done)
    return all(x.returncode == 0 for x in done), sum(x.stdout.count("ok ") for x in done), printed


def main(arguments):
    """Run what the command line asks for; returns the exit code."""
    jobs = os.cpu_count() or 1
    tools = []
    for x in arguments:
        if x.startswith("--share="):
            share, of = map(int, x.removeprefix("--share=").split("/"))
            run_share(share, of)
            return 0
        if x.startswith("--jobs="):
            jobs = int(x.removeprefix("--jobs="))
        else:
            tools.append(x)
    if not tools:
        run_share(0, 1)
        return 0
    clean = True
    for tool in tools:
        good, ran, printed = under(tool, jobs)
        clean = clean and good
        print(f"{tool}: {ran} calls ran, {'nothing found' if good else 'NOT CLEAN'}", flush=True)
        if not good:
            print(printed)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
