"""How a definition is evaluated with proof: arithmetics, rounding, gradients."""

from .evaluate import Answer, evaluate, reference

__all__ = ["Answer", "evaluate", "reference"]
