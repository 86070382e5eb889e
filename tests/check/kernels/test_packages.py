"""Adapters of packages that need a GPU, with stand-ins of the same signature: layouts, corners, windows, lse."""

import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from refattn import Capabilities, InvalidInput, Problem, UnsupportedProblem, check_problem
from refattn.check.kernel import Kernel
from refattn.check.kernels import KERNELS, find
from refattn.check.kernels.packages import PACKAGES
from refattn.check.model import FEATURES, FURTHER, flash
from refattn.pages import gathered, in_pages

from . import newer_stand_ins, stand_ins

MAKERS = {
    "flash-attn-2": stand_ins.flash_attn,
    "flash-attn-3": stand_ins.flash_3,
    "flash-attn-4": newer_stand_ins.flash_4,
    "sglang-native": newer_stand_ins.sglang,
    "fa3-fwd": lambda calls: stand_ins.flash_3(calls, "fa3_fwd_interface"),
    "vllm-flash": stand_ins.vllm,
    "flashinfer-prefill": stand_ins.flashinfer,
    "flashinfer-decode": stand_ins.flashinfer,
    "xformers": stand_ins.xformers,
    "transformer-engine": stand_ins.transformer_engine,
    "sageattention": stand_ins.sageattention,
}


def kernel_of(name, monkeypatch):
    """Return the kernel with its package stood in for, on a CPU, and the list of the calls that it makes."""
    calls = []
    for module, found in MAKERS[name](calls).items():
        monkeypatch.setitem(sys.modules, module, found)
    entry = KERNELS[name]
    able = replace(entry.capabilities, device="", deterministic=True)
    call = replace(entry, capabilities=able, package="").kernel().call
    # the stand-ins compute in float64, which any model allows for
    return Kernel.of(call, model=flash, capabilities=able, name=name), calls


def small(n_q=5, n_k=9, b=2, h=4, h_kv=2, d=16, d_v=None, n=0, **more):
    rng = np.random.default_rng(n)
    shapes = ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v or d))
    q, k, v = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in shapes)
    return Problem(q, k, v, **more)


def paged(layout, n_q=3, n=0, new=0, size=256, **more):
    p = small(n_q, 512, n=n, d=8, lengths_k=np.array([300, 7], np.int32), **more)
    return in_pages(p, size, layout, np.random.default_rng(n), new=new, fill=np.nan)


def packed(**more):
    ends = {"cu_seqlens_q": np.array([0, 4, 5, 12], np.int32), "cu_seqlens_k": np.array([0, 6, 9, 20], np.int32)}
    return small(12, 20, b=1, **ends, **more)


SLOPES = np.array([0.5, 0.25, 0.125, 1.0], np.float32)
DOWN, UP = {"causal": "bottom_right"}, {"causal": "top_left"}
CALLS = {
    "plain": small(),
    "square": small(9, 9, **DOWN),
    "scale": small(scale=0.3),
    "bottom right": small(**DOWN),
    "top left": small(**UP),
    "more queries": small(9, 5, **DOWN),
    "window": small(window=(3, 1)),
    "left side": small(window=(2, None)),
    "right side": small(window=(None, 1)),
    "causal window": small(window=(2, 3), **DOWN),
    "window top left": small(window=(2, None), **UP),
    "softcap": small(softcap=2.0, **DOWN),
    "slopes": small(alibi_slopes=SLOPES, softcap=3.0),
    "slopes by batch": small(alibi_slopes=np.stack([SLOPES, SLOPES[::-1]])),
    "narrow values": small(d_v=8),
    "bias": small(bias=np.random.default_rng(0).standard_normal((1, 4, 5, 9)).astype(ml_dtypes.bfloat16)),
    "allowed": small(allowed=np.random.default_rng(0).random((2, 1, 5, 9)) < 0.7),
    "packed": packed(**DOWN),
    "packed top left": packed(**UP),
    "packed window": packed(window=(2, 0), softcap=2.0),
    "packed lengths": packed(lengths_k=np.array([5, 3, 8], np.int32), lengths_q=np.array([4, 0, 3], np.int32)),
    "lengths": small(5, 9, lengths_k=np.array([9, 6], np.int32), **DOWN),
    "decoding": small(1, 9, window=(4, None), softcap=2.0),
    "pages": paged("NHD", **DOWN),
    "pages HND": paged("HND", window=(20, None), scale=0.2),
    "pages of 16": paged("NHD", size=16, softcap=2.0, **DOWN),
    "pages, one row": paged("HND", n_q=1, size=8),
    "appended": paged("NHD", new=3, **DOWN),
    "sink": small(sink=np.array([0.5, -1, 2, 0], np.float32), **DOWN),
}
RUNS = {
    "flash-attn-2": {
        "plain", "square", "scale", "bottom right", "more queries", "window", "left side", "right side",
        "causal window", "softcap", "slopes", "slopes by batch", "packed", "packed window", "lengths", "decoding",
        "pages", "appended",
    },
    "flash-attn-3": {
        "plain", "square", "scale", "bottom right", "more queries", "window", "left side", "right side",
        "causal window", "softcap", "narrow values", "packed", "packed window", "packed lengths", "lengths",
        "decoding", "pages", "pages of 16", "appended",
    },
    "flash-attn-4": {
        "plain", "square", "scale", "bottom right", "more queries", "window", "left side", "right side",
        "causal window", "softcap", "narrow values", "packed", "packed window", "packed lengths", "lengths",
        "decoding", "pages", "pages of 16", "sink",
    },
    "sglang-native": {
        "plain", "square", "scale", "bottom right", "causal window", "narrow values", "packed", "packed lengths",
        "lengths", "pages",
    },
    "fa3-fwd": {
        "plain", "square", "scale", "bottom right", "more queries", "softcap", "narrow values", "packed",
        "packed lengths", "lengths",
    },
    "vllm-flash": {
        "plain", "square", "scale", "bottom right", "more queries", "window", "left side", "right side",
        "causal window", "softcap", "packed", "packed window", "decoding", "pages", "pages of 16",
    },
    "flashinfer-prefill": {
        "plain", "square", "scale", "bottom right", "more queries", "left side", "causal window", "softcap", "packed",
        "decoding", "pages", "pages HND", "pages of 16", "pages, one row",
    },
    "flashinfer-decode": {"decoding", "pages, one row"},
    "xformers": {
        "plain", "square", "scale", "bottom right", "top left", "more queries", "window", "left side", "right side",
        "causal window", "narrow values", "bias", "packed", "packed top left",
    },
    "transformer-engine": {
        "plain", "square", "scale", "bottom right", "top left", "more queries", "window", "left side", "right side",
        "causal window", "window top left", "narrow values", "bias", "allowed", "packed", "packed top left",
    },
    "sageattention": set(),
}  # fmt: skip
"""What each runs of these calls; it refuses the others."""


@pytest.mark.parametrize("name", [n for n in RUNS if n != "sageattention"])
def test_calls_are_right_or_refused(name, monkeypatch):
    """Each with the exact answer, out and lse; what a package has no argument for is refused by name."""
    kernel, calls = kernel_of(name, monkeypatch)
    done = set()
    for label, p in CALLS.items():
        calls.clear()
        report = check_problem(kernel, p, label)
        verdicts = {c.verdict for c in report.checks}
        assert verdicts <= {"passed", "unsupported"}, (label, [c.message for c in report.checks])
        assert not report.edges, label
        if "passed" in verdicts:
            done.add(label)
            assert calls, label
            arrays = {w.array for c in report.checks for w in c.arrays}
            assert arrays == ({"out"} if name in ("transformer-engine", "sglang-native") else {"out", "lse"}), label
    assert done == RUNS[name]


def test_sageattention(monkeypatch):
    kernel, calls = kernel_of("sageattention", monkeypatch)
    for p in (small(9, 9, d=64, scale=0.2, **DOWN), small(5, 9, d=128)):
        assert check_problem(kernel, p, "x").passed
    assert [c[1]["is_causal"] for c in calls] == [True, False]
    with pytest.raises(UnsupportedProblem, match="causal: SageAttention takes it where there are as many keys"):
        kernel.call(small(5, 9, d=64, **DOWN))
    with pytest.raises(UnsupportedProblem, match="dim 16"):
        kernel.call(small(9, 9))
    model = KERNELS["sageattention"].model("bfloat16")
    assert (model.operands, model.weights, model.smoothed) == ("int8", "float8_e4m3fn", True)


@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "transformer-engine"])
def test_gradients_are_autograds_of_the_packages_function(name, monkeypatch):
    kernel, _ = kernel_of(name, monkeypatch)
    for p in (small(window=(3, 1)), packed(**DOWN)):
        dout = np.random.default_rng(1).standard_normal(p.out_shape).astype(ml_dtypes.bfloat16)
        report = check_problem(kernel, p, "x", gradients=dout)
        verdicts = [c.verdict for c in report.checks]
        assert verdicts == ["passed", "passed"], [c.message for c in report.checks]
    if "lengths_k" in kernel.capabilities.features:
        with pytest.raises(UnsupportedProblem, match="caches and lengths has none"):
            kernel.call.gradients(CALLS["lengths"], np.zeros((2, 4, 5, 16), ml_dtypes.bfloat16))


def test_new_keys_lie_in_the_cache_afterwards(monkeypatch):
    for name in ("flash-attn-2", "flash-attn-3"):
        kernel, _ = kernel_of(name, monkeypatch)
        p = paged("NHD", new=3, **DOWN)
        kernel.call(p)
        kept = gathered(p.replace(new_key=None, new_value=None))
        for b, n in enumerate((300, 7)):
            assert (kept.key[b, :, n - 3 : n] == p.new_key[b]).all()


def test_what_the_packages_are_told(monkeypatch):
    """Sides of -1, a right side of 0 beside causal, an lse to base 2, keys in use before the call writes."""
    kernel, calls = kernel_of("flash-attn-2", monkeypatch)
    kernel.call(CALLS["left side"])
    assert calls[-1][1]["window_size"] == (2, -1)
    kernel.call(CALLS["causal window"])
    assert calls[-1][1] | {"window_size": (2, 0), "causal": True} == calls[-1][1]
    kernel.call(CALLS["appended"])
    assert calls[-1][1]["cache_seqlens"].tolist() == [297, 4]
    kernel, calls = kernel_of("transformer-engine", monkeypatch)
    kernel.call(CALLS["packed"])
    assert calls[-1][1] == {"attn_mask_type": "padding_causal_bottom_right", "window_size": (-1, 0)}
    kernel, calls = kernel_of("flashinfer-prefill", monkeypatch)
    kernel.call(CALLS["pages HND"])
    assert calls[-1][1] == {"causal": False, "window_left": 20, "q_data_type": torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("flash-attn-2", "pages of 16", "pages of 16 keys, which are no multiple of 256"),
        ("flash-attn-2", "top left", "causal_top_left"),
        ("flash-attn-2", "narrow values", "d_v_differs"),
        ("flash-attn-3", "slopes", "alibi_slopes"),
        ("flash-attn-4", "slopes", "alibi_slopes"),
        ("flash-attn-4", "appended", "appending"),
        ("sglang-native", "more queries", "seq: SGLang's queries are the last of a request's tokens"),
        ("sglang-native", "left side", "window: SGLang has a left side beside causal alone"),
        ("fa3-fwd", "window", "window"),
        ("fa3-fwd", "pages", "paged_nhd"),
        ("vllm-flash", "lengths", "lengths_k: it takes them of keys in pages"),
        ("flashinfer-prefill", "window", "window: flashinfer has no right side but causal's"),
        ("flashinfer-decode", "plain", "query: 5 rows, decoding takes one"),
        ("xformers", "window top left", "window: xFormers counts it from the bottom right"),
        ("xformers", "packed window", "softcap"),
    ],
)
def test_what_is_refused_is_named(name, label, text, monkeypatch):
    kernel, _ = kernel_of(name, monkeypatch)
    with pytest.raises(UnsupportedProblem, match=text):
        kernel.call(CALLS[label])


@pytest.mark.parametrize("name", ["fa3-fwd", "flash-attn-3", "flash-attn-4"])
def test_widths_that_flash_attention_has_no_kernel_for_are_refused(name, monkeypatch):
    kernel, _ = kernel_of(name, monkeypatch)
    with pytest.raises(UnsupportedProblem, match=r"dim: FlashAttention [34] takes multiples of 8, got 16 and 12"):
        kernel.call(small(d_v=12))
    if name == "flash-attn-4":
        return

    def refuses(text):
        def call(*args, **more):
            raise RuntimeError(text)

        monkeypatch.setattr(sys.modules[KERNELS[name].package], "flash_attn_func", call)

    refuses("mha_fwd: If V headdim is different from Q/K dim, we only support some\nat")
    with pytest.raises(UnsupportedProblem, match=r"FlashAttention 3: mha_fwd: If V headdim .* we only support some$"):
        kernel.call(small(d_v=8))
    refuses("misaligned address")
    with pytest.raises(Exception, match="misaligned address"):
        kernel.call(small(d_v=8))


def test_two_things_for_one_argument_are_refused(monkeypatch):
    bias = CALLS["bias"].bias
    kernel, _ = kernel_of("xformers", monkeypatch)
    with pytest.raises(UnsupportedProblem, match="causal: beside bias"):
        kernel.call(small(bias=bias, **DOWN))
    with pytest.raises(UnsupportedProblem, match=r"bias: is torch\.float32, the package takes query's torch\.bfloat16"):
        kernel.call(small(bias=bias.astype(np.float32)))
    kernel, _ = kernel_of("transformer-engine", monkeypatch)
    for more, text in (
        ({"allowed": CALLS["allowed"].allowed, "window": (2, 2)}, "window: beside allowed"),
        ({"bias": np.concatenate([bias, bias])}, "bias: Transformer Engine takes one for all batches"),
    ):
        with pytest.raises(UnsupportedProblem, match=text):
            kernel.call(small(**more))
    kernel, _ = kernel_of("flashinfer-prefill", monkeypatch)
    with pytest.raises(UnsupportedProblem, match="an item without keys has no last page"):
        kernel.call(paged("NHD").replace(lengths_k=np.array([300, 0], np.int32)))


@pytest.mark.parametrize("entry", PACKAGES, ids=lambda e: e.name)
def test_a_missing_package_is_named_with_how_to_install_it(entry):
    assert not entry.here
    with pytest.raises(InvalidInput) as e:
        find(entry.name)
    assert str(e.value) == f"kernel: {entry.name} needs an NVIDIA GPU and the package {entry.package}; {entry.how}"
    assert "install" in entry.how
    assert entry.capabilities.features <= FEATURES | FURTHER
    assert entry.capabilities.device == "cuda"
    assert set(MAKERS) == {e.name for e in PACKAGES}


WRONG = {
    "sides swapped": ("flash_attn", "_sides", lambda p: (1, 3) if p.window else (-1, -1), "window"),
    "lse to base 2": ("flashinfer", "_natural", lambda lse: lse, "plain"),
    "rows for heads": ("flash_attn", "rows", lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[1], -1), "plain"),
}


@pytest.mark.parametrize("label", WRONG)
def test_a_wrong_adapter_fails(label, monkeypatch):
    module, function, wrong, call = WRONG[label]
    kernel, _ = kernel_of("flash-attn-2" if module == "flash_attn" else "flashinfer-prefill", monkeypatch)
    monkeypatch.setattr(f"refattn.check.kernels.{module}.{function}", wrong)
    assert not check_problem(kernel, CALLS[call], "x").right


def test_stand_ins_know_no_argument_that_the_packages_have_not(monkeypatch):
    kernel_of("flash-attn-2", monkeypatch)
    import flash_attn

    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(TypeError, match="scale"):
        flash_attn.flash_attn_func(q, q, q, scale=1.0)
    assert Capabilities(frozenset({"bfloat16"})).features == FEATURES
