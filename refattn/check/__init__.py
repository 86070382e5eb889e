"""How a kernel is judged: bounds, laws, input families, planted bugs, report, pytest plugin."""

from .call import call_kernel
from .compare import Worst, compare
from .inputs.families import FAMILIES, cases
from .laws import LAWS, Law
from .model import EDGES, FEATURES, FURTHER, Capabilities, Model, flash, materialised
from .report.report import Check, Report
from .runner import check_kernel

__all__ = [
    "EDGES",
    "FAMILIES",
    "FEATURES",
    "FURTHER",
    "LAWS",
    "Capabilities",
    "Check",
    "Law",
    "Model",
    "Report",
    "Worst",
    "call_kernel",
    "cases",
    "check_kernel",
    "compare",
    "flash",
    "materialised",
]
