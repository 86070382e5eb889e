"""Kernels compile for sm_90a without spills: those of tests and of every option; they run where there is a GPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import pytest

from refattn.gpu import delta_mma, lightning_mma, recurrence, trilinear
from refattn.gpu.build import text_of
from refattn.gpu.kernel import ACCURACIES, Call
from refattn.gpu.plan import KERNELS, configured

from .compiled import NVCC, check_compiles, core

PLAIN = Call(
    dtype="bfloat16",
    n_q=128,
    n_k=128,
    d_k=64,
    d_v=64,
    group=1,
    causal=None,
    window=None,
    softcap=False,
    sink=False,
    bias=None,
    allowed=False,
    packed=False,
    blocks=None,
    positive_scale=True,
    aligned=True,
    mapped=True,
    accuracy="fast",
)
OPTIONS = (
    {},
    {"causal": "bottom_right"},
    {"window": (3, 0), "sink": True},
    {"softcap": True, "aligned": False},
    {"allowed": True},
    {"bias": "float32"},
    {"packed": True, "causal": "top_left"},
    {"blocks": (128, 128)},
    {"blocks": (40, 40), "allowed": True, "bias": "own", "softcap": True, "window": (3, 3), "sink": True},
    {"blocks": (64, 32), "tiles": True, "bias": "own", "softcap": True, "window": (3, 3), "sink": True},
    {"blocks": (128, 128), "tiles": True, "causal": "bottom_right", "sink": True},
)
MANY = {"bias": "bfloat16", "softcap": True, "window": (3, 3), "sink": True, "causal": None}
MOST = 232448  # bytes of shared memory that a block of sm_90 may have


def calls():
    """Return (kernel, call) for every kernel: widths, accuracies, each option, and many of them together."""
    wide = [replace(PLAIN, d_k=d, d_v=d) for d in (64, 128, 256)]
    for c in wide:
        for i, causal, j in product((0, 1), (None, "bottom_right"), (0, 1)):
            # the format changes types of instructions only: it alternates
            changed = replace(c, causal=causal, accuracy=ACCURACIES[i], blocks=(None, (128, 128))[j])
            yield "sm90", replace(changed, dtype=("float16", "bfloat16")[(i + j + (causal is None)) % 2])
        for i, options in enumerate(OPTIONS):
            narrow = ("float16", "bfloat16")
            for kernel, dtypes in (("sm90", narrow), ("mma", narrow), ("simt", ("float32", "float64", "bfloat16"))):
                dtype, accuracy = dtypes[i % len(dtypes)], ACCURACIES[i % 2]
                own = {"bias": dtype} if options.get("bias") == "own" else {}
                own |= {"bias": "float64"} if dtype == "float64" and "bias" in options else {}
                call = replace(c, dtype=dtype, accuracy=accuracy, **(options | own))
                if not KERNELS[kernel].obstacle(call, (9, 0)):
                    yield kernel, call
        yield from (("simt", replace(c, dtype=t)) for t in ("float32", "float64"))
    yield "sm90", replace(PLAIN, n_q=1024, n_k=1024, d_k=64, d_v=64, causal="bottom_right")
    for d_k, d_v in ((96, 96), (192, 192), (192, 128), (64, 256)):
        c = replace(PLAIN, d_k=d_k, d_v=d_v, causal="bottom_right")
        yield from (("sm90", x) for x in (c, replace(c, **MANY), replace(c, accuracy="high", allowed=True)))


CALLS = list(calls())
TRILINEAR = [trilinear.macros(d, keys) for d in (64, 128) for keys in (64, 65)]
TRILINEAR += [trilinear.macros_backward(d, query) for d in (64, 128) for query in (True, False)]

RECURRENT = [recurrence.macros(t, d, gate) for t in recurrence.TYPES for d in (64, 128) for gate in (0, 1, 2)]
ON_TENSOR_CORES = [(lightning_mma, lightning_mma.macros(d, d_v)) for d in (64, 128) for d_v in (64, 128)]
ON_TENSOR_CORES += [(delta_mma, delta_mma.macros(d, gate)) for d in (64, 128) for gate in (0, 1)]


def text(kernel, call):
    return KERNELS[kernel].source(configured(kernel, call).macros)


@NVCC
def test_every_kernel_compiles_without_spills(tmp_path):
    texts = core({"pack": text_of("pack.cu", {})} | {call: text(*call) for call in CALLS})
    texts |= {str(m): trilinear.source(m) for m in TRILINEAR}
    texts |= core({str(m): recurrence.source(m) for m in RECURRENT})
    texts |= core({str(m): module.source(m) for module, m in ON_TENSOR_CORES})

    def build(item):
        i, (call, written) = item
        check_compiles(tmp_path / f"{i}.cu", written, call)

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(build, enumerate(texts.items())))) == len(texts)


@pytest.mark.parametrize("m", TRILINEAR)
def test_shared_memory_suffices_for_the_trilinear_kernels(m):
    bytes_of = trilinear.shared_bytes_backward if "QUERY" in m else trilinear.shared_bytes
    assert bytes_of(m) <= MOST


@pytest.mark.parametrize("m", RECURRENT)
def test_shared_memory_suffices_for_the_recurrences(m):
    assert max(recurrence.shared_bytes(entry, m) for entry in ("lightning", "gated_delta")) <= MOST // 3


def test_shared_memory_suffices_for_the_recurrences_on_tensor_cores():
    """As many blocks as the kernels are compiled for fit, with the 1 KiB that each costs besides."""
    for d in (64, 128):
        for d_v in (64, 128):
            m = lightning_mma.macros(d, d_v)
            for entry in ("lightning", "lightning_states"):
                assert m["MIN_BLOCKS"] * (lightning_mma.shared_bytes(entry, m) + 1024) <= MOST + 1024
        m = delta_mma.macros(d, 1)
        assert 3 * (delta_mma.shared_bytes("delta_chunks", m) + 1024) <= MOST + 1024
        assert delta_mma.shared_bytes("gated_delta", m) <= MOST


@pytest.mark.parametrize("call", CALLS)
def test_shared_memory_suffices(call):
    assert configured(*call).shared_bytes <= MOST
