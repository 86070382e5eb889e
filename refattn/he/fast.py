"""Which transforms a client takes: compiled ones where numba is here (the extra `fast`), NumPy's otherwise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["compiled"]


@lru_cache(maxsize=1)
def compiled() -> Any:
    """Return the compiled transforms, or None without numba. Both give the same words and numbers."""
    try:
        from . import compiled as found
    except ImportError:
        return None
    return found
