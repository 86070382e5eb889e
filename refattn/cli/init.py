"""`refattn init`: try what a kernel can do, and print it to be pasted."""

from __future__ import annotations

import click
from rich.console import Console

from ..check.kernels import find
from ..check.model import FEATURES, Capabilities
from ..check.probe import found
from ..operators import load
from ..problem import VARIANT
from .guard import reached
from .output import OPERATORS

__all__ = ["init", "pasted"]


@click.command()
@click.argument("kernel")
@click.option("--variant", default=VARIANT, show_default=True, help="The operator that KERNEL computes: " + OPERATORS)
def init(kernel: str, variant: str) -> None:
    """Try the options, widths, lengths and formats of KERNEL and print its Capabilities to paste.

    KERNEL is package.module:function or path/file.py:function.
    """
    able, said, dtype = found(find(kernel)[0].kernel(), load(variant))
    if not {"right", "wrong"} & set(said.values()):
        raise click.ClickException(f"{kernel} answers none of the calls that were tried: nothing is known of it")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"# options, widths and lengths were tried in {dtype}", markup=False)
    for outcome in MEANINGS:
        names = [n for n, x in said.items() if x == outcome]
        if names:
            console.print(f"# {MEANINGS[outcome]}: {', '.join(names)}", markup=False)
    console.print(pasted(able, kernel.rpartition(":")[2]), markup=False)
    reached()


MEANINGS = {
    "right": "right",
    "wrong": "WRONG (refattn check says where)",
    "unread": "not read",
    "raises": "raises",
    "other": "taken for the other corner where n_q and n_k differ",
}


def pasted(able: Capabilities, name: str) -> str:
    """Return the Python text that gives a kernel its capabilities."""
    lines = ["from refattn import Capabilities", "", f"{name}.capabilities = Capabilities("]
    features = "FEATURES" if able.features == FEATURES else _set(able.features)
    lines.append(f"    dtypes={_set(able.dtypes)},")
    if features != "FEATURES":
        lines.append(f"    features={features},")
    for field in (
        "elements",
        "lse",
        "gradients",
        "dlse",
        "dstate_out",
        "head_dims",
        "seq_multiple",
        "page_multiple",
        "last_axis_contiguous",
        "arrays",
        "device",
    ):
        value, usual = getattr(able, field), getattr(Capabilities(), field)
        if value != usual:
            lines.append(f"    {field}={_set(value) if isinstance(value, frozenset) else repr(value)},")
    return "\n".join([*lines, ")"])


def _set(names: frozenset[str] | frozenset[int]) -> str:
    return "{" + ", ".join(repr(n).replace("'", '"') for n in sorted(names)) + "}" if names else "set()"
