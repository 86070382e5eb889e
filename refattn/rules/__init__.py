"""Masks as rules: exact integers that combine by ``& | ~`` and are written out, block by block, only where asked for.

What is added to scores, as terms that combine by ``+ - *``: ``refattn.rules.terms``.
"""

from . import terms
from .atoms import array, behind, blocks, causal, chunk, dilated, document, prefix, sinks, tree, window
from .flex import block_mask, mask_mod, mask_mod_text, score_mod, score_mod_text
from .rule import Rule
from .spans import EMPTY, FULL, PARTIAL
from .term import Term
from .view import View

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Rule",
    "Term",
    "View",
    "array",
    "behind",
    "block_mask",
    "blocks",
    "causal",
    "chunk",
    "dilated",
    "document",
    "mask_mod",
    "mask_mod_text",
    "prefix",
    "score_mod",
    "score_mod_text",
    "sinks",
    "terms",
    "tree",
    "window",
]
