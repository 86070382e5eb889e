"""Operators of one's own: what they must show, and how they get known."""

from .register import load, register

__all__ = ["load", "register"]
