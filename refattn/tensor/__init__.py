"""Triple-wise ("tensor") attention: exact, streaming, and approximated with a certificate."""

from .approximations import Measured, centroids, windowed
from .collisions import Collision, collide
from .forms import FORMS, as_pairs, exact
from .gradients import exact_gradients
from .polynomial import Certified, polynomial
from .polynomial_gradients import polynomial_backward
from .routing import auto, crossover
from .stream import attention, backward

__all__ = [
    "FORMS",
    "Certified",
    "Collision",
    "Measured",
    "as_pairs",
    "attention",
    "auto",
    "backward",
    "centroids",
    "collide",
    "crossover",
    "exact",
    "exact_gradients",
    "polynomial",
    "polynomial_backward",
    "windowed",
]
