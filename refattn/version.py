"""The version of refattn that runs: the installed one's, or that of a plain checkout, which has none."""

from __future__ import annotations

from importlib import metadata

__all__ = ["VERSION"]


def _installed() -> str:
    try:
        return metadata.version("refattn")
    except metadata.PackageNotFoundError:  # a plain checkout
        return "0+unknown"


VERSION = _installed()
"""Such as "0.2.0"."""
