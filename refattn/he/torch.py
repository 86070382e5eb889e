"""PyTorch: modules that are trained in the clear and computed on ciphertexts, and conversion of one's own model."""

from __future__ import annotations

from .blocks import Block, Classifier, Encoder, weights_of
from .convert import Converted, convert
from .modules import (
    PolynomialActivation,
    PolynomialLayerNorm,
    PolynomialRMSNorm,
    PowerMultiheadAttention,
    PowerSoftmaxAttention,
    anneal,
    measured,
    polynomial,
    range_penalty,
)

__all__ = [
    "Block", "Classifier", "Converted", "Encoder", "PolynomialActivation", "PolynomialLayerNorm", "PolynomialRMSNorm",
    "PowerMultiheadAttention", "PowerSoftmaxAttention", "anneal", "convert", "measured", "polynomial", "range_penalty",
    "weights_of",
]  # fmt: skip
