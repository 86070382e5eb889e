"""Claims of the papers on attention that this package builds on, as code that checks them, each with a control."""

from . import (
    bandits,
    bounded_entries,
    caches,
    combiner,
    crate,
    decisions,
    decoding,
    ecoformer,
    flash_io,
    flash_lower,
    hyper,
    hyper_spectral,
    kinetics,
    lightning,
    match3_layers,
    merging,
    perturbation,
    power_softmax,
    quantised,
    reach,
    softmax_rounding,
    sparse,
    systems,
    universal,
    urpe,
    virtual_node,
)
from .claim import Claim, Evidence, Result, run

__all__ = ["CLAIMS", "Claim", "Evidence", "Result", "run"]

MODULES = (
    flash_io,
    flash_lower,
    sparse,
    quantised,
    merging,
    perturbation,
    decoding,
    caches,
    power_softmax,
    bounded_entries,
    softmax_rounding,
    hyper,
    hyper_spectral,
    urpe,
    universal,
    virtual_node,
    decisions,
    bandits,
    crate,
    systems,
    reach,
    combiner,
    kinetics,
    lightning,
    ecoformer,
    match3_layers,
)
CLAIMS = {claim.name: claim for module in MODULES for claim in module.CLAIMS}
"""All claims, by name."""
