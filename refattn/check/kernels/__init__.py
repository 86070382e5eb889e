"""The attention kernels that refattn knows how to call, each found only where its package can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...dtypes import ELEMENTS, FORMATS
from ...errors import InvalidInput, KernelError, RefattnError, install
from ...modules import module_of
from ...problem import VARIANT, Problem
from ...version import VERSION
from ..call import Function
from ..kernel import Kernel
from ..model import FEATURES, FURTHER, GRADIENTS, Capabilities, Model, ModelFor, flash, materialised
from ..state import restored
from . import tiled

__all__ = ["EXAMPLE", "KERNELS", "Entry", "find", "found"]

SPARSE = ("block_sparse", "power_blocks", "neighborhood", "titans_mac", "moba", "topk", "nsa_selected", "view_local")
EXAMPLE = "example-no-rescale"
"""A wrong kernel's name."""


@dataclass(frozen=True)
class Entry:
    """A kernel by name.

    Attributes
    ----------
    name : str
        What the command line calls it.
    package : str
        The package that must be importable; "" for our own.
    load : callable
        Returns the kernel.
    capabilities : Capabilities
        What it can do.
    model : callable
        From a format's name to its rounding model.
    named_only : str
        Why it runs only when it is named, "" where it always runs.
    gpu : bool
        Whether it needs an NVIDIA GPU.
    variants : frozenset of str
        The operators that it computes.
    """

    name: str
    package: str
    load: Callable[[], Function]
    capabilities: Capabilities
    model: ModelFor
    named_only: str = ""
    gpu: bool = False
    variants: frozenset[str] = frozenset({VARIANT})

    def kernel(self) -> Kernel:
        """Return the kernel; one that we call by an adapter of ours raises outside its capabilities."""
        loaded = self.load()
        call = loaded if ":" in self.name else declared(loaded, self.capabilities)
        return Kernel.of(call, model=self.model, capabilities=self.capabilities, name=self.name, version=self.version)

    @property
    def here(self) -> bool:
        """Tell whether its package can be imported, and its GPU is there."""
        if self.gpu and not Path("/dev/nvidia0").exists():
            return False
        return not self.package or importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package: for our own kernels, refattn's."""
        package = "refattn" if self.name.startswith("refattn") else self.package or "refattn"
        return f"{package} {VERSION if package == 'refattn' else metadata.version(package)}"


def _load(module: str, name: str) -> Callable[[], Function]:
    return lambda: getattr(importlib.import_module(f"{__name__}.{module}"), name)


def declared(kernel: Function, able: Capabilities) -> Function:
    """Return a kernel that raises outside its capabilities: our adapters leave such options out."""

    def call(problem: Problem) -> Any:
        able.require(problem)
        return kernel(problem)

    call.__name__ = getattr(kernel, "__name__", "kernel")
    call.serial = getattr(kernel, "serial", False)  # type: ignore[attr-defined]
    if hasattr(kernel, "gradients"):

        def gradients(problem: Problem, *arriving: Any) -> Any:
            able.require(problem)
            return kernel.gradients(problem, *arriving)

        call.gradients = gradients  # type: ignore[attr-defined]
    return call


def _able(dtypes: str, features: str, *, lse: bool = False, gradients: str = "", refuses: bool = False) -> Capabilities:
    given = frozenset(features.split()) | {"lengths_differ"}
    back = frozenset(gradients.split())
    return Capabilities(frozenset(dtypes.split()), given, lse=lse, gradients=back, refuses=refuses)


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


def _cuda(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU: ex2.approx is within 2**-22, subnormal float32 is zero."""
    ulps = 4.0 if FORMATS[dtype].precision <= 24 else 3.0
    return replace(flash(dtype), exp_ulps=ulps, subnormals=dtype == "float16", group_sum=dtype)


def _unrounded(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU that does not round P to the input's type."""
    model = _cuda(dtype)
    return replace(model, weights=model.accumulator)


def _split(dtype: str) -> Model:
    """Return the model of a flash kernel on a GPU that merges parts of at least 16 keys."""
    return replace(_cuda(dtype), split=16)


def _gpu(name: str, package: str, dtypes: str, features: str, lse: bool = False, named_only: str = "") -> Entry:
    # PyTorch and cuDNN say at a call what they have no kernel for
    able = _able(dtypes, features, lse=lse, gradients="" if name == "cuda-triton" else "dq dk dv", refuses=True)
    load = _load("cuda", name.removeprefix("cuda-").replace("-", "_"))
    return Entry(name, package, load, able, _cuda, named_only, gpu=True)


_HALF = "float16 bfloat16"
_STEPS = "causal_bottom_right grouped_heads d_v_differs scale variable_lengths state alpha beta"
_OF_STEPS = frozenset({"dq", "dk", "dv", "dalpha", "dbeta", "dstate"})


def _recurrent(name: str, package: str, load: Callable[[], Function], **more: Any) -> Entry:
    able = Capabilities(frozenset(f"float32 {_HALF}".split()), frozenset(_STEPS.split()), **more)
    return Entry(
        name, package, load, able, flash, gpu="device" in more, variants=frozenset({"gated_delta", "lightning"})
    )


_PLAIN = "causal_top_left grouped_heads scale"


def _flushing(*dtypes: str) -> ModelFor:
    """Return the model of a kernel that stores S and P, and takes subnormal numbers of some formats for zero."""
    return lambda dtype: replace(materialised(dtype), subnormals=dtype not in dtypes)


KERNELS: dict[str, Entry] = {
    e.name: e
    for e in (
        Entry(
            "refattn-tiled",
            "",
            _load("tiled", "tiled"),
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
            _load("example", "no_rescale"),
            _able("float32", "d_v_differs scale"),
            flash,
            named_only="it is wrong on purpose, to show what is said of such a kernel",
        ),
        Entry(
            "refattn-sparse",
            "",
            _load("sparse", "sparse"),
            Capabilities(
                frozenset({"float32", "float16", "bfloat16"}),
                (FEATURES - {"variable_lengths"}) | {"weight"},
                lse=True,
            ),
            flash,
            variants=frozenset(SPARSE),
        ),
        _recurrent("refattn-chunked", "torch", _load("chunked", "chunked"), gradients=_OF_STEPS),
        _recurrent("refattn-recurrent", "cupy", _load("cuda", "recurrent"), arrays="torch", device="cuda"),
        Entry(
            "torch-sdpa-flash",
            "torch",
            _load("torch_sdpa", "sdpa_flash"),
            _able("float32 float16 bfloat16 float64", _SDPA, lse=True, gradients="dq dk dv"),
            _torch_flash,
        ),
        Entry(
            "torch-sdpa-math",
            "torch",
            _load("torch_sdpa", "sdpa_math"),
            _able("float32 float16 bfloat16 float64", f"{_SDPA} d_v_differs", gradients="dq dk dv dbias"),
            materialised,
        ),
        Entry(
            "torch-flex",
            "torch",
            _load("torch_sdpa", "flex"),
            _able("float32 float16 bfloat16 float64", f"{_PARTS} {_FLEX}"),
            _flushing("bfloat16"),
        ),
        Entry(
            "torch-flex-compiled",
            "torch",
            _load("torch_sdpa", "flex_compiled"),
            _able("float32 bfloat16", f"{_PARTS} {_FLEX}"),
            flash,
            "it compiles C++ for each shape, minutes in all",
        ),
        Entry(
            "jax",
            "jax",
            _load("others", "jax_attention"),
            _able(
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
                _load("cuda", function),
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
                ("refattn-gpu", "ours", f"float64 float32 {_HALF}", 256, _cuda),
                ("refattn-gpu-decode", "ours_decode", _HALF, 128, _split),
                ("refattn-gpu-high", "ours_high", _HALF, 256, _unrounded),
                ("refattn-gpu-invariant", "ours_invariant", f"float32 {_HALF}", 256, _cuda),
                ("refattn-gpu-mma", "ours_mma", _HALF, 256, _cuda),
                ("refattn-gpu-mma-high", "ours_mma_high", _HALF, 128, _unrounded),
                ("refattn-gpu-simt", "ours_simt", f"float64 float32 {_HALF}", 256, _unrounded),
            )
        ),
        _gpu("cuda-flash", "torch", _HALF, _PLAIN),
        _gpu("cuda-efficient", "torch", f"float32 {_HALF}", f"{_PLAIN} bias allowed d_v_differs"),
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
            _load("others", "onnxruntime_attention"),
            _able("float32 float16", "causal_top_left bias allowed softcap grouped_heads scale d_v_differs"),
            materialised,
        ),
        Entry(
            "openvino",
            "openvino",
            _load("others", "openvino_attention"),
            _able("float32", "causal_top_left bias allowed scale d_v_differs"),
            flash,
        ),
        Entry(
            "keras",
            "keras",
            _load("others", "keras_attention"),
            _able("float32 float16 bfloat16", "causal_top_left bias allowed scale", gradients="dq dk dv dbias"),
            _flushing("bfloat16"),
        ),
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
        raise InvalidInput(
            f"kernel: {name} needs an NVIDIA GPU and the package {missing[0].package}"
            if missing[0].gpu
            else f"kernel: {name} needs the package {missing[0].package}; {install(missing[0].package)}"
        )
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
