"""Triple-wise ("tensor") attention: exact, streaming, and approximated with a certificate."""

from .forms import FORMS, as_pairs, exact
from .gradients import exact_gradients
from .polynomial import Certified, polynomial
from .routing import auto, crossover
from .stream import attention, backward

__all__ = [
    "FORMS",
    "Certified",
    "as_pairs",
    "attention",
    "auto",
    "backward",
    "crossover",
    "exact",
    "exact_gradients",
    "polynomial",
]
