"""Attention of packages for NVIDIA GPUs: FlashAttention 2 to 4, flashinfer, xFormers and others, by their functions.

What each takes was read in its source, of the version that docs/kernels.md names. Where that page does not say that
one was run, its adapter has met only a stand-in of the same signature.
"""

from __future__ import annotations

from dataclasses import replace

from ...dtypes import FORMATS
from ..model import Capabilities, Model, ModelFor, flash, sage
from .entry import Entry, load

__all__ = ["PACKAGES", "on_gpu"]


def on_gpu(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU: ex2.approx is within 2**-22, subnormal float32 is zero."""
    ulps = 4.0 if FORMATS[dtype].precision <= 24 else 3.0
    return replace(flash(dtype), exp_ulps=ulps, subnormals=dtype == "float16", group_sum=dtype)


def _in_parts(dtype: str) -> Model:
    """Return the model of such a kernel that merges parts of at least 64 keys."""
    return replace(on_gpu(dtype), split=64)


def _sage(dtype: str) -> Model:
    """Return the model of SageAttention 2: keys and queries in int8, P and values in float8."""
    float8 = "float8_e4m3fn"
    unit = {"aligned_bits": 13, "fused": 32, "promoted": 64, "tile": 64}
    return replace(sage(dtype, float8, float8, weights_scale="static", **unit), subnormals=dtype == "float16")


HALF = frozenset({"float16", "bfloat16"})
BACK = frozenset({"dq", "dk", "dv"})
_FLASH = "causal_bottom_right window softcap grouped_heads scale variable_lengths lengths_k paged_nhd appending"
_PAGED = "causal_bottom_right window softcap grouped_heads scale variable_lengths lengths_k paged_nhd paged_hnd"
_DECODE = "causal_bottom_right window softcap grouped_heads scale lengths_k paged_nhd paged_hnd"
_XFORMERS = "causal_bottom_right causal_top_left window bias grouped_heads scale variable_lengths d_v_differs"
_LAYER = "causal_bottom_right causal_top_left window bias allowed grouped_heads scale variable_lengths d_v_differs"


def _entry(
    name: str,
    package: str,
    module: str,
    function: str,
    features: str,
    how: str,
    model: ModelFor = _in_parts,
    distribution: str = "",
    dtypes: frozenset[str] = HALF,
    gradients: frozenset[str] = frozenset(),
    lse: bool = True,
    d_max: int = 256,
    head_dims: frozenset[int] = frozenset(),
    page_multiple: int = 1,
    edges: str = "",
) -> Entry:
    given = Capabilities(
        dtypes,
        frozenset(features.split()) | {"lengths_differ"},
        d_max=d_max,
        lse=lse,
        gradients=gradients,
        arrays="torch",
        device="cuda",
        refuses=True,  # a size or a page that it has no kernel for
        deterministic=not gradients,
        head_dims=head_dims,
        page_multiple=page_multiple,
        edges=frozenset(edges.split()),
        last_axis_contiguous=module == "flash_attn",
    )
    return Entry(
        name, package, load(module, function), given, model, gpu=True, how=how, distribution=distribution or package
    )


PACKAGES = (
    _entry(
        "flash-attn-2",
        "flash_attn",
        "flash_attn",
        "flash_2",
        f"{_FLASH} alibi_slopes",
        "pip install flash-attn --no-build-isolation",
        gradients=BACK,
        page_multiple=256,
    ),
    _entry(
        "flash-attn-3",
        "flash_attn_interface",
        "flash_attn",
        "flash_3",
        f"{_FLASH} lengths_q d_v_differs",
        "in a clone of Dao-AILab/flash-attention: cd hopper && python setup.py install",
        distribution="flash_attn_3",
        gradients=BACK,
    ),
    _entry(
        "flash-attn-4",
        "flash_attn.cute",
        "flash_attn",
        "flash_4",
        "causal_bottom_right window softcap sink grouped_heads scale variable_lengths lengths_q lengths_k d_v_differs "
        "paged_nhd",
        "pip install --pre flash-attn-4",
        on_gpu,
        distribution="flash-attn-4",
        gradients=BACK,
    ),
    _entry(
        "fa3-fwd",
        "fa3_fwd_interface",
        "flash_attn",
        "fa3_forward",
        "causal_bottom_right softcap grouped_heads scale variable_lengths lengths_q lengths_k d_v_differs",
        "pip install fa3-fwd",
        distribution="fa3_fwd",
        dtypes=frozenset({"bfloat16"}),
        edges="nan-behind-mask nan-in-sight overflow scale",
    ),
    _entry(
        "vllm-flash",
        "vllm",
        "flash_attn",
        "vllm_flash",
        "causal_bottom_right window softcap grouped_heads scale variable_lengths lengths_k paged_nhd",
        "pip install vllm",
    ),
    _entry(
        "sglang-native",
        "sglang",
        "sglang",
        "extend",
        "causal_bottom_right window grouped_heads scale variable_lengths lengths_q lengths_k d_v_differs paged_nhd",
        "pip install sglang",
        on_gpu,
        dtypes=HALF | {"float32"},
        lse=False,
    ),
    _entry(
        "flashinfer-prefill", "flashinfer", "flashinfer", "prefill", _PAGED, "pip install flashinfer-python",
        distribution="flashinfer-python",
    ),
    _entry(
        "flashinfer-decode", "flashinfer", "flashinfer", "decode", _DECODE, "pip install flashinfer-python",
        distribution="flashinfer-python",
    ),
    _entry(
        "xformers", "xformers", "layers", "xformers_attention", _XFORMERS, "pip install xformers", on_gpu,
        dtypes=HALF | {"float32"}, gradients=BACK,
    ),
    _entry(
        "transformer-engine", "transformer_engine", "layers", "transformer_engine", _LAYER,
        "pip install --no-build-isolation transformer_engine[pytorch]", on_gpu, gradients=BACK, lse=False,
    ),
    _entry(
        "sageattention", "sageattention", "layers", "sageattention", "causal_bottom_right grouped_heads scale",
        "pip install sageattention==2.2.0 --no-build-isolation", _sage, d_max=128, head_dims=frozenset({64, 128}),
    ),
)  # fmt: skip
"""Kernels of these packages."""
