"""refattn: the exact answer for attention, and a check for any kernel."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from . import masks
from .check import (
    Capabilities,
    Law,
    Model,
    Report,
    check_kernel,
    check_problem,
    compare,
)
from .check.parametrize import parametrize_with_checks
from .check.register import register
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
    reference,
    sigmoid_attention,
    softmax_attention,
)
from .files import load_problem, save_problem
from .problem import Problem
from .variants import VARIANTS, Variant

try:
    __version__ = _version("refattn")
except _NotInstalled:  # a plain checkout
    __version__ = "0+unknown"

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
    "check_kernel",
    "check_problem",
    "compare",
    "evaluate",
    "linear_attention",
    "load_problem",
    "masks",
    "parametrize_with_checks",
    "power_attention",
    "reference",
    "register",
    "save_problem",
    "sigmoid_attention",
    "softmax_attention",
]
