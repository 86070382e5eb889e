"""Plans as JSON and weights as .npz files: nothing in them is run when they are read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..files import load_arrays, save_arrays
from .inverse import Inverse
from .layer_plan import LayerPlan, period_of
from .layout import Layout
from .noise import Ring
from .plan import MOST_BITS, Plan, plan
from .polynomials import Activation, Polynomial
from .weights import Feedforward, Weights, check

__all__ = ["load_weights", "plan_from_json", "plan_to_json", "save_weights"]

VERSION, PLAN_VERSION = 1, 2
ARGUMENTS = ("n_q", "n_k", "d_k", "d_v", "heads", "p")
RANGES = (
    "denominator",
    "epsilon",
    "scale",
    "norms",
    "value_most",
    "tolerance",
    "normalize",
    "mode",
    "upload",
    "workers",
)


def plan_to_json(made: Plan | LayerPlan) -> str:
    """Return a plan as JSON, for a client elsewhere. No weight is in it."""
    if isinstance(made, Plan):
        what: dict[str, Any] = {n: getattr(made, n) for n in (*ARGUMENTS, *RANGES)}
        if made.inverse is not None:
            what["inverse"] = [made.inverse.doublings, made.inverse.odd]
    else:
        what = {f.name: getattr(made, f.name) for f in fields(made)}
        what |= {"ring": asdict(made.ring), "layout": asdict(made.layout)}
        what["counts"] = [[name, limbs, count] for (name, limbs), count in sorted(made.counts.items())]
    kind = "attention" if isinstance(made, Plan) else "layer"
    return json.dumps(
        {"refattn": f"he {kind} plan", "version": PLAN_VERSION, "digest": made.digest.hex(), "plan": what}
    )


def plan_from_json(text: str | bytes) -> Plan | LayerPlan:
    """Return the plan of some JSON.

    Raises
    ------
    InvalidInput
        It is none, of another version, or not within 128 bits of security.
    """
    try:
        whole = json.loads(text)
        kind, version, digest, what = (whole[n] for n in ("refattn", "version", "digest", "plan"))
        if version != PLAN_VERSION:
            raise InvalidInput(f"he: got a plan of version {version}, expected {PLAN_VERSION}")
        if kind == "he attention plan":
            made: Plan | LayerPlan = _attention(dict(what))
        elif kind == "he layer plan":
            made = _layer(dict(what))
        else:
            raise InvalidInput(f"he: got {kind!r}, expected a plan of attention or of a layer")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidInput(f"he: got what is no plan: {type(e).__name__}: {e}") from e
    if made.digest.hex() != digest:
        raise InvalidInput("he: the plan is not what its digest says: it was changed, or made by another version")
    return made


def _attention(what: dict[str, Any]) -> Plan:
    given = [what.pop(n) for n in ARGUMENTS]
    of, (low, high) = what.pop("inverse", None), what["denominator"]
    if of is not None:
        what["inverse"] = Inverse(low, high, *map(int, of))
    what["denominator"], what["norms"] = (low, high), tuple(what["norms"])
    return plan(*given, **what)


def _layer(what: dict[str, Any]) -> LayerPlan:
    what["ring"], what["layout"] = Ring(**what["ring"]), Layout(**what["layout"])
    what["counts"] = Counter({(str(n), int(limbs)): int(c) for n, limbs, c in what["counts"]})
    what["rotations"] = tuple(int(r) for r in what["rotations"])
    made = LayerPlan(**what)
    ring, layout = made.ring, made.layout
    if ring.degree not in MOST_BITS or sum(ring.bits) > MOST_BITS[ring.degree] or layout.slots != ring.slots:
        raise InvalidInput("he: the plan's ring is not within 128 bits of security")
    sizes = (made.n, made.d, made.heads, made.spread, made.apart, layout.groups, layout.rows, layout.columns)
    if min(sizes) < 1 or max(made.n, made.d, made.classes) > layout.slots or layout.slots % period_of(layout):
        raise InvalidInput("he: the plan's sizes do not fit its slots")
    return made


def save_weights(weights: Weights, path: str | Path) -> None:
    """Write a layer's weights to an .npz file, whole.

    Parameters
    ----------
    weights : Weights
        The layer's.
    path : str or Path
        The target.
    """
    arrays: dict[str, Any] = {f.name: getattr(weights, f.name) for f in fields(weights)}
    then = arrays.pop("then")
    rest: dict[str, Any] = {
        n: arrays.pop(n) for n in ("p", "epsilon", "scale", "denominator", "causal", "first_epsilon")
    }
    if isinstance(then, Feedforward):
        parts = {f.name: getattr(then, f.name) for f in fields(then)}
        norm, act = parts.pop("norm"), parts.pop("activation")
        rest |= {"norm": asdict(norm), "norm_epsilon": parts.pop("norm_epsilon"), "activation": asdict(act)}
        arrays |= {f"then_{n}": x for n, x in parts.items()}
    else:
        arrays["then"] = then
    text = np.frombuffer(json.dumps({"version": VERSION, **rest}).encode(), np.uint8)
    save_arrays(arrays | {"settings": text}, path)


def load_weights(path: str | Path) -> Weights:
    """Read weights that :func:`save_weights` wrote.

    Raises
    ------
    InvalidInput
        There is no such file, or it is not one of ours.
    """
    arrays: dict[str, Any] = dict(load_arrays(path))
    try:
        rest = json.loads(arrays.pop("settings").tobytes())
        if rest.pop("version") != VERSION:
            raise InvalidInput(f"{path}: weights of another version")
        rest["denominator"] = tuple(rest["denominator"])
        then: Any = arrays.pop("then", None)
        if then is None:
            act = rest.pop("activation")
            parts = {n.removeprefix("then_"): arrays.pop(n) for n in list(arrays) if n.startswith("then_")}
            then = Feedforward(
                **parts, norm=_polynomial(rest.pop("norm")), norm_epsilon=rest.pop("norm_epsilon"),
                activation=Activation(act["name"], act["most"], _polynomial(act["even"])),
            )  # fmt: skip
        found = Weights(**arrays, **rest, then=then)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidInput(f"{path}: not a layer's weights: {type(e).__name__}: {e}") from e
    check(found)
    return found


def _polynomial(what: dict[str, Any]) -> Polynomial:
    return Polynomial(what["low"], what["high"], tuple(what["coefficients"]), what["error"])
