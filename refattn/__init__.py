"""refattn: the exact answer for attention, and a check for any kernel."""

from importlib import import_module as _import
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import masks, rules
    from .check import (
        Capabilities,
        Law,
        Model,
        Report,
        check_kernel,
        compare,
    )
    from .check.close import allowed_error, assert_close
    from .check.kernels.problem import check_problem
    from .check.parametrize import parametrize_with_checks
    from .check.simulate import simulate
    from .devices.context_parallel import check_context_parallel
    from .dropout import dropout_mask
    from .errors import (
        InvalidInput,
        InvalidProblem,
        KernelError,
        MismatchError,
        RefattnError,
        UnsupportedProblem,
    )
    from .exact import (
        Answer,
        evaluate,
        linear_attention,
        power_attention,
        query_rows,
        reference,
        sigmoid_attention,
        softmax_attention,
    )
    from .files import load_problem, save_problem
    from .operators import register
    from .problem import Problem
    from .variants import VARIANTS, Variant

    __version__: str

_WHERE = {
    "check": ("Capabilities", "Law", "Model", "Report", "check_kernel", "compare"),
    "check.kernels.problem": ("check_problem",),
    "check.close": ("allowed_error", "assert_close"),
    "check.parametrize": ("parametrize_with_checks",),
    "check.simulate": ("simulate",),
    "devices.context_parallel": ("check_context_parallel",),
    "dropout": ("dropout_mask",),
    "errors": (
        "InvalidInput",
        "InvalidProblem",
        "KernelError",
        "MismatchError",
        "RefattnError",
        "UnsupportedProblem",
    ),
    "exact": (
        "Answer",
        "evaluate",
        "linear_attention",
        "power_attention",
        "query_rows",
        "reference",
        "sigmoid_attention",
        "softmax_attention",
    ),
    "files": ("load_problem", "save_problem"),
    "operators": ("register",),
    "problem": ("Problem",),
    "variants": ("VARIANTS", "Variant"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
_ROOMS = (
    "bench",
    "check",
    "cli",
    "devices",
    "dtypes",
    "exact",
    "functions",
    "golden",
    "gpu",
    "he",
    "masks",
    "operators",
    "rules",
    "strategies",
    "tensor",
    "theory",
)

__all__ = [
    "VARIANTS",
    "Answer",
    "Capabilities",
    "InvalidInput",
    "InvalidProblem",
    "KernelError",
    "Law",
    "MismatchError",
    "Model",
    "Problem",
    "RefattnError",
    "Report",
    "UnsupportedProblem",
    "Variant",
    "__version__",
    "allowed_error",
    "assert_close",
    "check_context_parallel",
    "check_kernel",
    "check_problem",
    "compare",
    "dropout_mask",
    "evaluate",
    "linear_attention",
    "load_problem",
    "masks",
    "parametrize_with_checks",
    "power_attention",
    "query_rows",
    "reference",
    "register",
    "rules",
    "save_problem",
    "sigmoid_attention",
    "simulate",
    "softmax_attention",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a room, when it is first asked for."""
    if name == "__version__":
        value: Any = _import(".version", __name__).VERSION
    elif name in _HOME:
        value = getattr(_import(f".{_HOME[name]}", __name__), name)
    elif name in _ROOMS:
        return _import(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'refattn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
