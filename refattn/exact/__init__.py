"""How a definition is evaluated with proof: arithmetics, rounding, gradients."""

from .answer import Answer
from .cut import query_rows
from .driver import evaluate, reference
from .enclosure import Enclosure
from .functions import linear_attention, power_attention, sigmoid_attention, softmax_attention

__all__ = [
    "Answer",
    "Enclosure",
    "evaluate",
    "linear_attention",
    "power_attention",
    "query_rows",
    "reference",
    "sigmoid_attention",
    "softmax_attention",
]
