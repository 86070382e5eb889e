"""Attention whose queries and keys are spread over several devices: shards, their merge, and a check of real runs."""

from .context_parallel import check_context_parallel
from .ranks import Shard
from .shards import LAYOUTS, ORDERS, arriving, exact_shards, merged, parts_of, places

__all__ = [
    "LAYOUTS",
    "ORDERS",
    "Shard",
    "arriving",
    "check_context_parallel",
    "exact_shards",
    "merged",
    "parts_of",
    "places",
]
