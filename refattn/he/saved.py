"""Plans as JSON and weights as .npz files: nothing in them is run when they are read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInput, RefattnError
from ..files import load_arrays, save_arrays
from ..validation import shown
from .arguments import MOST_SIZE, is_count, is_number
from .decoding_plan import DecodingPlan, plan_decoding
from .encoder_plan import EncoderPlan
from .foreign import encoder_plan_of, layer_plan_of
from .inverse import Inverse
from .layer_plan import LayerPlan
from .plan import Plan, plan
from .polynomials import Activation, Polynomial
from .sigmoid import SigmoidPlan, arguments_of
from .sigmoid import plan_of as sigmoid_plan_of
from .sigmoid_decoding import SigmoidDecodingPlan
from .sigmoid_decoding import arguments_of as sigmoid_decoding_of
from .sigmoid_decoding import plan_of as sigmoid_decoding_plan_of
from .weights import EncoderWeights, Feedforward, Weights, check, check_encoder

__all__ = ["load_weights", "plan_from_json", "plan_to_json", "save_weights"]

VERSION, PLAN_VERSION = 1, 2
MOST_TEXT = 2**20
"""Bytes of a plan as JSON."""
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


def plan_to_json(made: Plan | DecodingPlan | LayerPlan | EncoderPlan) -> str:
    """Return a plan as JSON, for a client elsewhere. No weight is in it."""
    if isinstance(made, SigmoidPlan):
        what: dict[str, Any] = arguments_of(made)
    elif isinstance(made, SigmoidDecodingPlan):
        what = sigmoid_decoding_of(made)
    elif isinstance(made, Plan | DecodingPlan):
        what = {n: getattr(made, n) for n in (*ARGUMENTS, *RANGES)}
        if made.inverse is not None:
            what["inverse"] = [made.inverse.doublings, made.inverse.odd]
        if isinstance(made, DecodingPlan):
            what["context"] = made.context
    else:
        what = {f.name: getattr(made, f.name) for f in fields(made)}
        what |= {"ring": asdict(made.ring), "layout": asdict(made.layout)}
        what["counts"] = [[name, limbs, count] for (name, limbs), count in sorted(made.counts.items())]
    kinds = {Plan: "attention", SigmoidPlan: "sigmoid", DecodingPlan: "decoding", LayerPlan: "layer"}
    kind = {**kinds, SigmoidDecodingPlan: "sigmoid decoding", EncoderPlan: "encoder"}[type(made)]
    return json.dumps(
        {"refattn": f"he {kind} plan", "version": PLAN_VERSION, "digest": made.digest.hex(), "plan": what}
    )


def plan_from_json(text: str | bytes, most_bytes: int = 2**40) -> Plan | DecodingPlan | LayerPlan | EncoderPlan:
    """Return the plan of some JSON.

    Parameters
    ----------
    text : str or bytes
        What :func:`plan_to_json` returned; it may come from a server that nobody trusts.
    most_bytes : int
        The most bytes that the plan's keys, or a query, may have.

    Raises
    ------
    InvalidInput
        It is none, of another version, not within 128 bits of security, or asks for more than `most_bytes`.
    UnsupportedProblem
        Sizes that no ring has room for.
    """
    if len(text) > MOST_TEXT:
        raise InvalidInput(f"he: got {len(text)} bytes of a plan, expected at most {MOST_TEXT}")
    try:
        whole = json.loads(text)
        kind, version, digest, what = (whole[n] for n in ("refattn", "version", "digest", "plan"))
        if version != PLAN_VERSION:
            raise InvalidInput(f"he: got a plan of version {shown(version)}, expected {PLAN_VERSION}")
        if kind == "he decoding plan":
            made: Plan | DecodingPlan | LayerPlan | EncoderPlan = _decoding(dict(what))
        elif kind == "he sigmoid plan":
            made = sigmoid_plan_of(dict(what))
        elif kind == "he sigmoid decoding plan":
            made = sigmoid_decoding_plan_of(dict(what))
        elif kind == "he attention plan":
            made = _attention(dict(what))
        elif kind == "he layer plan":
            made = layer_plan_of(dict(what))
        elif kind == "he encoder plan":
            made = encoder_plan_of(dict(what))
        else:
            raise InvalidInput(
                f"he: got {shown(kind)}, expected a plan of attention, of decoding, of a layer or of an encoder"
            )
    except RefattnError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise InvalidInput(f"he: got what is no plan: {type(e).__name__}: {str(e)[:200]}") from e
    if made.digest.hex() != digest:
        raise InvalidInput("he: the plan is not what its digest says: it was changed, or made by another version")
    for name, n in (("keys", made.key_bytes), ("a query", made.upload_bytes)):
        if n > most_bytes:
            raise InvalidInput(f"he: the plan asks for {n} bytes of {name}, expected at most most_bytes = {most_bytes}")
    return made


def _attention(what: dict[str, Any]) -> Plan:
    given = [what.pop(n) for n in ARGUMENTS]
    return plan(*given, **_ranges(what))


def _decoding(what: dict[str, Any]) -> DecodingPlan:
    n_q, n_k, d, d_v, heads, p = (what.pop(n) for n in ARGUMENTS)
    if (n_q, what.pop("mode"), what.pop("workers")) != (1, "latency", 1) or not is_count(what["context"], 0, MOST_SIZE):
        raise InvalidInput("he: got what is no plan of decoding: it has one query at a time, and one process")
    longest = n_k - what["context"]
    return plan_decoding(longest, d, d_v, heads, p, **_ranges(what))


def _ranges(what: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON holds of ranges and the polynomial as a plan takes them."""
    of, denominator = what.pop("inverse", None), what["denominator"]
    for name in ("denominator", "norms"):
        if isinstance(what[name], list):
            what[name] = tuple(what[name])
    if of is not None:
        if not isinstance(of, list) or len(of) != 2 or not isinstance(denominator, list):
            raise InvalidInput(f"inverse: got {shown(of)}, expected [doublings, order]")
        low, high = map(_float, denominator)
        what["inverse"] = Inverse(low, high, *of)
    return what


def _float(x: Any) -> float:
    if not is_number(x):
        raise InvalidInput(f"denominator: got {shown(x)}, expected a finite number above 0")
    return float(x)


def save_weights(weights: Weights | EncoderWeights, path: str | Path) -> None:
    """Write a layer's or an encoder's weights to an .npz file, whole.

    Parameters
    ----------
    weights : Weights or EncoderWeights
        What is written.
    path : str or Path
        The target.
    """
    if isinstance(weights, Weights):
        arrays, rest = _parts(weights)
        text: dict[str, Any] = {"version": VERSION, **rest}
    else:
        arrays, text = {}, {"version": VERSION, "blocks": []}
        for k, block in enumerate(weights.blocks):
            more, rest = _parts(block)
            arrays |= {f"{k}_{n}": x for n, x in more.items()}
            text["blocks"].append(rest)
        if weights.head is not None:
            arrays |= {"head": weights.head, "head_bias": weights.head_bias}
    save_arrays(arrays | {"settings": np.frombuffer(json.dumps(text).encode(), np.uint8)}, path)


def _parts(weights: Weights) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a layer's arrays, and what JSON holds of the rest."""
    arrays: dict[str, Any] = {f.name: getattr(weights, f.name) for f in fields(weights)}
    then, first = arrays.pop("then"), arrays.pop("first")
    names = ("p", "epsilon", "scale", "denominator", "causal", "first_epsilon", "centred")
    rest: dict[str, Any] = {n: arrays.pop(n) for n in names}
    if first is not None:
        rest["first"] = asdict(first)
    if isinstance(then, Feedforward):
        parts = {f.name: getattr(then, f.name) for f in fields(then)}
        norm, act = parts.pop("norm"), parts.pop("activation")
        rest |= {"norm": asdict(norm), "norm_epsilon": parts.pop("norm_epsilon"), "activation": asdict(act)}
        arrays |= {f"then_{n}": x for n, x in parts.items()}
    else:
        arrays["then"] = then
    return arrays, rest


def load_weights(path: str | Path) -> Weights | EncoderWeights:
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
        if "blocks" not in rest:
            found = _weights(arrays, rest)
            check(found)
            return found
        head = {n: arrays.pop(n) for n in ("head", "head_bias") if n in arrays}
        blocks = []
        for k, block in enumerate(rest["blocks"]):
            mine = {n.removeprefix(f"{k}_"): arrays.pop(n) for n in list(arrays) if n.startswith(f"{k}_")}
            blocks.append(_weights(mine, block))
        whole = EncoderWeights(tuple(blocks), **head)
        check_encoder(whole)
    except InvalidInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidInput(f"{path}: not a layer's weights: {type(e).__name__}: {e}") from e
    return whole


def _weights(arrays: dict[str, Any], rest: dict[str, Any]) -> Weights:
    rest["denominator"] = tuple(rest["denominator"])
    if "first" in rest:
        rest["first"] = _polynomial(rest["first"])
    then: Any = arrays.pop("then", None)
    if then is None:
        act = rest.pop("activation")
        parts = {n.removeprefix("then_"): arrays.pop(n) for n in list(arrays) if n.startswith("then_")}
        then = Feedforward(
            **parts, norm=_polynomial(rest.pop("norm")), norm_epsilon=rest.pop("norm_epsilon"),
            activation=Activation(act["name"], act["most"], _polynomial(act["even"])),
        )  # fmt: skip
    return Weights(**arrays, **rest, then=then)


def _polynomial(what: dict[str, Any]) -> Polynomial:
    return Polynomial(what["low"], what["high"], tuple(what["coefficients"]), what["error"])
