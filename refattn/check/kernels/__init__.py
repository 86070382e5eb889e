"""The attention kernels that refattn knows how to call, each found only where its package can be imported."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...dtypes import ELEMENTS, FORMATS
from ...errors import InvalidInput, KernelError, RefattnError
from ...modules import module_of
from ...problem import VARIANT
from ..call import Function
from ..kernel import Kernel
from ..model import FEATURES, FURTHER, GRADIENTS, Capabilities, Model, ModelFor, flash, materialised
from ..state import restored
from . import tiled
from .entry import Entry, able, declared, load
from .packages import PACKAGES, on_gpu

__all__ = ["EXAMPLE", "KERNELS", "Entry", "declared", "find", "found"]

BRANCHES = ("nsa",)
WEIGHED = ("relu", "ecoformer", "urpe")
POOLED = ("codebook", "spark", "hyper")
SPARSE = (
    "block_sparse",
    "power_blocks",
    "neighborhood",
    "titans_mac",
    "moba",
    "topk",
    "nsa_selected",
    "dsa",
    "seer",
    "view_local",
)
EXAMPLE = "example-no-rescale"
"""A wrong kernel's name."""


_PARTS = "causal_top_left bias allowed grouped_heads scale"
_SDPA = f"{_PARTS} no_rows_or_keys"
_FLEX = "d_v_differs causal_bottom_right window softcap variable_lengths"

# PyTorch's vectorised fexp_u20 (ATen/cpu/vec/vec512/vec512_float.h) replaces 2**f by 1 + f - cubic(f), whose
# equal ripples are the cubic's constant term, and then truncates f to 2**-18: a relative error of ln 2 times their sum.
_FEXP_ERROR = math.log(2) * (1.0703434948458272e-4 + 2.0**-18) / 2.0**-24


def _torch_flash(dtype: str) -> Model:
    model = flash(dtype)
    return (
        replace(model, exp_ulps=_FEXP_ERROR, subnormals=dtype != "bfloat16") if FORMATS[dtype].precision < 24 else model
    )


def _unrounded(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU that does not round P to the input's type."""
    model = on_gpu(dtype)
    return replace(model, weights=model.accumulator)


def _split(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU that merges parts of at least 16 keys."""
    return replace(on_gpu(dtype), split=16)


def _latent(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU that merges parts of at least 128 keys."""
    return replace(on_gpu(dtype), split=128)


def _gpu(name: str, package: str, dtypes: str, features: str, lse: bool = False, named_only: str = "") -> Entry:
    # PyTorch and cuDNN say at a call what they have no kernel for
    given = able(dtypes, features, lse=lse, gradients="" if name == "cuda-triton" else "dq dk dv", refuses=True)
    kernel = load("cuda", name.removeprefix("cuda-").replace("-", "_"))
    if package != "jax":
        given = replace(given, arrays="torch", device="cuda")
    return Entry(name, package, kernel, given, on_gpu, named_only, gpu=True)


_HALF = "float16 bfloat16"
_STEPS = "causal_bottom_right grouped_heads d_v_differs scale variable_lengths state alpha beta"
_OF_STEPS = frozenset({"dq", "dk", "dv", "dalpha", "dbeta", "dstate"})
_LINEAR = ("gated_delta", "lightning")


def _recurrent(name: str, package: str, load: Callable[[], Function], *others: str, **more: Any) -> Entry:
    """Return a kernel of recurrences; others than those of one matrix have a momentum."""
    features = frozenset(_STEPS.split()) | ({"eta"} if others else set())
    gradients = _OF_STEPS | ({"deta"} if others else set())
    able = Capabilities(frozenset(f"float32 {_HALF}".split()), features, gradients=gradients, dstate_out=True, **more)
    return Entry(name, package, load, able, flash, gpu="device" in more, variants=frozenset({*_LINEAR, *others}))


_ON_GPU: Any = {"refuses": True, "arrays": "torch", "device": "cuda"}
_PLAIN = "causal_top_left grouped_heads scale"
_EFFICIENT = "causal_top_left scale bias allowed d_v_differs philox_efficient"  # PyTorch has no grouped heads there


def _flushing(*dtypes: str) -> ModelFor:
    """Return the model of a kernel that stores S and P, and takes subnormal numbers of some formats for zero."""
    return lambda dtype: replace(materialised(dtype), subnormals=dtype not in dtypes)


KERNELS: dict[str, Entry] = {
    e.name: e
    for e in (
        Entry(
            "refattn-tiled",
            "",
            load("tiled", "tiled"),
            Capabilities(
                frozenset({"float32", "float16", "bfloat16"}),
                FEATURES | FURTHER,
                lse=True,
                gradients=GRADIENTS,
                batch_invariant=True,
                elements=frozenset(ELEMENTS),
                dlse=True,
            ),
            tiled.model,
        ),
        Entry(
            EXAMPLE,
            "",
            load("example", "no_rescale"),
            able("float32", "d_v_differs scale"),
            flash,
            named_only="it is wrong on purpose, to show what is said of such a kernel",
        ),
        Entry(
            "refattn-sparse",
            "",
            load("sparse", "sparse"),
            Capabilities(
                frozenset({"float32", "float16", "bfloat16"}),
                (FEATURES - {"variable_lengths"}) | {"weight"},
                lse=True,
            ),
            flash,
            variants=frozenset(SPARSE),
        ),
        Entry(
            "refattn-weighed",
            "",
            load("weighed", "weighed"),
            Capabilities(
                frozenset({"float32", "float16", "bfloat16"}),
                FEATURES - {"variable_lengths", "softcap", "sink"},
                lse=True,
            ),
            flash,
            variants=frozenset(WEIGHED),
        ),
        Entry(
            "refattn-pooled",
            "",
            load("pooled", "pooled"),
            Capabilities(
                frozenset({"float32", "float16", "bfloat16"}),
                FEATURES - {"variable_lengths", "softcap", "sink", "bias"},
                lse=True,
            ),
            flash,
            variants=frozenset(POOLED),
        ),
        Entry(
            "refattn-branches",
            "",
            load("branches", "branches"),
            able("float32 float16 bfloat16", "causal_bottom_right grouped_heads d_v_differs scale"),
            flash,
            variants=frozenset(BRANCHES),
        ),
        _recurrent("refattn-chunked", "torch", load("chunked", "chunked"), "titans"),
        _recurrent("refattn-recurrent", "cupy", load("cuda", "recurrent"), **_ON_GPU),
        Entry(
            "torch-sdpa-flash",
            "torch",
            load("torch_sdpa", "sdpa_flash"),
            able("float32 float16 bfloat16 float64", _SDPA, lse=True, gradients="dq dk dv"),
            _torch_flash,
        ),
        Entry(
            "torch-sdpa-math",
            "torch",
            load("torch_sdpa", "sdpa_math"),
            able("float32 float16 bfloat16 float64", f"{_SDPA} d_v_differs dropout_mask", gradients="dq dk dv dbias"),
            materialised,
        ),
        Entry(
            "torch-flex",
            "torch",
            load("torch_sdpa", "flex"),
            able("float32 float16 bfloat16 float64", f"{_PARTS} {_FLEX} alibi_slopes positions"),
            _flushing("bfloat16"),
        ),
        Entry(
            "torch-flex-compiled",
            "torch",
            load("torch_sdpa", "flex_compiled"),
            able("float32 bfloat16", f"{_PARTS} {_FLEX}"),
            flash,
            "it compiles C++ for each shape, minutes in all",
        ),
        Entry(
            "jax",
            "jax",
            load("others", "jax_attention"),
            able(
                "float32 float16 bfloat16",
                "causal_top_left window bias allowed grouped_heads scale no_rows_or_keys",
                gradients="dq dk dv dbias",
                refuses=True,  # windows that it counts from the top left
            ),
            _flushing("float32", "bfloat16"),
        ),
        *(
            Entry(
                name,
                "cupy",
                load("cuda", function),
                Capabilities(
                    frozenset(dtypes.split()),
                    FEATURES - {"bias", "allowed", "variable_lengths"} if "decode" in function else FEATURES,
                    d_max=d_max,
                    lse=True,
                    # after "high", P and dS are rounded backward
                    gradients=frozenset() if "high" in function or "decode" in function else GRADIENTS,
                    batch_invariant=True,
                    arrays="torch",
                    device="cuda",
                    edges=frozenset({"overflow"}),
                    refuses="decode" in function,  # more than 16 queries
                    last_axis_contiguous=True,
                    row_invariant="invariant" in function,
                ),
                model,
                gpu=True,
                variants=frozenset({VARIANT} if "decode" in function else {VARIANT, "block_sparse"}),
            )
            for name, function, dtypes, d_max, model in (
                ("refattn-gpu", "ours", f"float64 float32 {_HALF}", 256, on_gpu),
                ("refattn-gpu-decode", "ours_decode", _HALF, 128, _split),
                ("refattn-gpu-high", "ours_high", _HALF, 256, _unrounded),
                ("refattn-gpu-invariant", "ours_invariant", f"float32 {_HALF}", 256, on_gpu),
                ("refattn-gpu-mma", "ours_mma", _HALF, 256, on_gpu),
                ("refattn-gpu-mma-high", "ours_mma_high", _HALF, 128, _unrounded),
                ("refattn-gpu-simt", "ours_simt", f"float64 float32 {_HALF}", 256, _unrounded),
            )
        ),
        Entry(
            "refattn-gpu-latent",
            "cupy",
            load("cuda", "ours_latent"),
            Capabilities(
                frozenset(_HALF.split()),
                FEATURES - {"bias", "allowed", "variable_lengths"},
                lse=True,
                head_dims=frozenset({576, 512}),
                arrays="torch",
                device="cuda",
                edges=frozenset({"overflow"}),
                last_axis_contiguous=True,
            ),
            _latent,
            gpu=True,
        ),
        _gpu("cuda-flash", "torch", _HALF, f"{_PLAIN} philox_flash"),
        _gpu("cuda-efficient", "torch", f"float32 {_HALF}", _EFFICIENT),
        _gpu("cuda-cudnn", "torch", _HALF, f"{_PLAIN} bias allowed d_v_differs"),
        _gpu("cuda-math", "torch", f"float64 float32 {_HALF}", f"{_PLAIN} bias allowed d_v_differs"),
        _gpu(
            "cuda-flex",
            "torch",
            f"float32 {_HALF}",
            f"{_PLAIN} causal_bottom_right bias allowed softcap d_v_differs",
            named_only="it compiles a kernel for each shape, seconds each",
        ),
        _gpu("cuda-jax-cudnn", "jax", _HALF, f"{_PLAIN} bias allowed"),
        _gpu("cuda-triton", "triton", f"float32 {_HALF}", f"{_PLAIN} causal_bottom_right", lse=True),
        Entry(
            "onnxruntime",
            "onnxruntime",
            load("others", "onnxruntime_attention"),
            able("float32 float16", "causal_top_left bias allowed softcap grouped_heads scale d_v_differs"),
            materialised,
        ),
        Entry(
            "openvino",
            "openvino",
            load("others", "openvino_attention"),
            able("float32", "causal_top_left bias allowed scale d_v_differs"),
            flash,
        ),
        Entry(
            "keras",
            "keras",
            load("others", "keras_attention"),
            able("float32 float16 bfloat16", "causal_top_left bias allowed scale", gradients="dq dk dv dbias"),
            _flushing("bfloat16"),
        ),
        *PACKAGES,
    )
}
"""The kernels by name."""


def found(variant: str = VARIANT) -> list[Entry]:
    """Return the kernels of an operator whose packages are here, those that must be named left out."""
    return [e for e in KERNELS.values() if e.here and not e.named_only and variant in e.variants]


def find(name: str) -> list[Entry]:
    """Return the kernels that a name of the command line means.

    Parameters
    ----------
    name : str
        A kernel's name, the beginning of several up to a dash ("torch-sdpa"), ``package.module:function``, or
        ``path/file.py:function``.

    Raises
    ------
    InvalidInput
        There is no such kernel, package, module, file or function.
    """
    if ":" in name:
        return [_custom(name)]
    exact = (
        [KERNELS[name]]
        if name in KERNELS
        else [e for e in KERNELS.values() if e.name.startswith(f"{name}-") and not e.named_only]
    )
    if not exact:
        file = f"; the function's name is missing: {name}:NAME" if name.endswith(".py") else ""
        raise InvalidInput(
            f"kernel: got {name!r}, expected one of {', '.join(KERNELS)}, package.module:function or "
            f"path/file.py:function{file}"
        )
    missing = [e for e in exact if not e.here]
    if missing:
        raise InvalidInput(f"kernel: {name} {missing[0].needs}")
    return exact


def _module(name: str) -> Any:
    if name.endswith(".py"):
        return module_of(name, "kernel")
    if not name:
        raise InvalidInput("kernel: got no module before ':'; name yours as path/file.py:function")
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (RefattnError, KeyboardInterrupt):
        raise
    except BaseException as e:
        raise InvalidInput(f"kernel: importing {name} raised {type(e).__name__}: {e}") from e


def _custom(name: str) -> Entry:
    module_name, function = name.rsplit(":", 1)
    try:
        with restored():
            module = _module(module_name)
    except KernelError as e:
        raise InvalidInput(f"kernel: importing {module_name}: {e}") from e
    kernel = getattr(module, function, None)
    if not callable(kernel):
        raise InvalidInput(f"kernel: {module_name} has no function {function!r}")
    record = Kernel.of(kernel)
    return Entry(name, "", lambda: kernel, record.capabilities, record.model)
