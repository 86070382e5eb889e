"""A valid call of every public function: what wrong inputs are made of."""

from . import calls_a_to_h, calls_i_to_z
from .call_parts import some

__all__ = ["CALLS", "HELPERS"]

CALLS = calls_a_to_h.CALLS | calls_i_to_z.CALLS
CALLS["alignment.ssa_step"] = {**CALLS["alignment.ssa_streams"], "stream": "full"}
CALLS["memory.memory_as_layer"] |= {"alpha": some(3)}
HELPERS = {
    "arguments": "what checks arguments, tested in test_arguments.py",
    "dense.as_index": "internal: takes what a function made",
    "dense.check_call": "internal",
    "dense.check_floats": "internal",
    "parts.expect_part": "internal",
    "parts.numbers": "internal",
    "parts.rounded": "internal",
    "probabilities.causal_mask": "internal: takes the library",
    "probabilities.probabilities": "internal: takes the library",
    "probabilities.rank": "internal: takes the library",
    "probabilities.scored": "internal: takes the library",
    "variants.loops": "second forms of operators, tested in variants/test_selected.py",
    "variants.neighborhood.grid_mask": "internal: takes an operator's settings",
    "variants.option": "checks of options, tested through Problem",
    "variants.own": "a name or a variant, tested in variants/test_own.py",
    "variants.power_blocks.block_mask": "internal: sizes that the variant checked",
    "variants.shapes.hidden_by_head": "internal: takes a problem that was checked",
    "variants.shapes.parted": "internal",
    "variants.softmax.scores": "a definition",
    "variants.titans_mac.segment_mask": "internal: sizes that the variant checked",
}
"""Public by their module, but no function for users, and why."""
