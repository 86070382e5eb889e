"""What the command line says of an operator and its options, as the planners take it."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidInput
from ..validation import shown
from .decoding_plan import DecodingPlan, plan_decoding
from .plan import Plan, plan
from .ranges import ranges_of_file
from .sigmoid import plan_sigmoid
from .sigmoid_decoding import plan_sigmoid_decoding

__all__ = ["check_operator", "planned"]

OPERATORS = ("power", "sigmoid")
OWN: dict[str, dict[str, Any]] = {
    "power": {
        "p": None, "denominator": None, "epsilon": None, "normalize": "server",
    },
    "sigmoid": {"scores": None, "offset": None},
}  # fmt: skip
"""Options that one operator alone has, with what they are where nobody says them."""


def check_operator(operator: str | None, where: str = "", made: Any = None) -> None:
    """Refuse what is no operator, and a plan from somewhere that is of another one; None is any.

    Raises
    ------
    InvalidInput
        It is so.
    """
    if operator is None:
        return
    if operator not in OPERATORS:
        raise InvalidInput(f"--operator: got {shown(operator)}, expected {' or '.join(OPERATORS)}")
    if made is not None and made.operator != operator:
        raise InvalidInput(f"--operator: {where} computes {made.operator!r}, the command says {operator!r}")


def planned(
    sizes: tuple[int, ...], data: str | None, margin: float | None, operator: str | None, given: dict[str, Any]
) -> Plan | DecodingPlan:
    """Return the plan that a command asks for.

    Parameters
    ----------
    sizes : tuple of int
        n_q, n_k, d_k, d_v and heads; or none, to be measured.
    data : str or None
        A problem's file, on which sizes and ranges are measured; what is given counts before that.
    margin : float or None
        The room of what is measured.
    operator : str or None
        "power", where nothing else is said, or "sigmoid".
    given : dict
        The command's other options by name; None where they were not said.

    Raises
    ------
    InvalidInput
        Options that do not go together, or too few.
    """
    check_operator(operator)
    operator = operator or OPERATORS[0]
    given = {n: x for n, x in given.items() if x is not None}
    for other in OPERATORS:
        for name, usual in OWN[other].items() if other != operator else ():
            if given.pop(name, usual) != usual:
                raise InvalidInput(f"plan: --{name} goes with --operator {other}")
    if data is not None:
        found, measured = ranges_of_file(data, 0.2 if margin is None else margin, given, operator)
        if sizes and sizes != found:
            raise InvalidInput(f"plan: {data} has sizes {found}, the command says {sizes}; leave them out")
        sizes, given = found, measured | given
    elif margin is not None:
        raise InvalidInput("plan: --margin goes with --from")
    range_of = "scores" if operator == "sigmoid" else "denominator"
    missing = [n for n in (range_of, "norms", "value_most") if n not in given]
    if missing or len(sizes) != 5:
        wanted = ["N_Q N_K D_K D_V HEADS"] * (len(sizes) != 5) + [f"--{n.replace('_', '-')}" for n in missing]
        raise InvalidInput(f"plan: say {', '.join(wanted)}, or --from a problem's file to measure it")
    n_q, n_k, d_k, d_v, heads = sizes
    decoding = given.pop("decoding", False)
    if decoding and (given.pop("mode") != "latency" or n_k < n_q):
        raise InvalidInput(f"plan: --decoding goes with --mode latency and N_K of at least N_Q = {n_q}")
    if operator == "sigmoid" and decoding:
        return plan_sigmoid_decoding(n_q, d_k, d_v, heads, context=n_k - n_q, **given)
    if operator == "sigmoid":
        return plan_sigmoid(n_q, n_k, d_k, d_v, heads, **given)
    if not decoding:
        return plan(n_q, n_k, d_k, d_v, heads, given.pop("p", 2), **given)
    return plan_decoding(n_q, d_k, d_v, heads, given.pop("p", 2), context=n_k - n_q, **given)
