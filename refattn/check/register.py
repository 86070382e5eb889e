"""An operator of one's own: checked as those of the package are, then known to everything."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import FORMATS
from ..errors import InvalidInput, InvalidProblem, RefattnError
from ..exact.agree import differing_form, under
from ..exact.driver import evaluate
from ..problem import MEANINGS, Problem
from ..variants import VARIANTS, Lowered, Option, Rows, Selected, Steps, Variant
from .bounds.forward import bounds
from .bugs.planted import PLANTED
from .inputs.draw import Draw
from .inputs.families import FAMILIES, cases
from .laws import LAWS
from .model import flash

__all__ = ["load", "register"]

SMALL = {"n_q": 5, "n_k": 5, "d": 4}


def register(variant: Variant) -> Variant:
    """Make an operator known to refattn: exact answers, gradients, bounds, laws, strategies, golden files, checks.

    Parameters
    ----------
    variant : Variant
        The operator. Three lines are enough: ``Variant("mine", define, formula=..., unit=..., source=...,
        uses=frozenset({"causal"}))``.

    Returns
    -------
    Variant
        The same, so that ``MINE = refattn.register(refattn.Variant(...))`` is one line.

    Raises
    ------
    InvalidInput
        What is missing or wrong: a formula, an option that no case tries, an operation that an arithmetic does not
        have, forms that disagree, a name that is taken.
    """
    _types(variant)
    _row(variant)
    with under(variant):
        _options(variant)
        calls = _calls(variant)
        for call in calls:
            _arithmetics(variant, call)
            _rows_alone(variant, call)
        for call in calls:
            wrong = differing_form(call)
            if wrong:
                raise InvalidInput(f"{variant.name}: {wrong}; both must be the same operator")
        if not cases(variant.name):
            raise InvalidInput(f"{variant.name}: no input case fits it; add some to cases=")
    VARIANTS[variant.name] = variant
    return variant


def load(name: str) -> str:
    """Return the name of an operator, registering it first where `name` is ``path/file.py:NAME``.

    Raises
    ------
    InvalidInput
        No such file, no such name in it, or what :func:`register` refuses.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon:
        return name
    file = Path(path)
    if not file.is_file():
        raise InvalidInput(f"variant: {path} is no file; name yours as path/file.py:NAME")
    label = f"_refattn_variant_{file.stem}"
    spec = importlib.util.spec_from_file_location(label, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module
    try:
        spec.loader.exec_module(module)
    except RefattnError:
        raise
    except (Exception, SystemExit) as e:
        raise InvalidInput(f"variant: {path} raised {type(e).__name__}: {e}") from e
    found = getattr(module, attribute, None)
    if not isinstance(found, Variant):
        raise InvalidInput(f"variant: {path} has no Variant {attribute!r}")
    if VARIANTS.get(found.name) is not found:
        register(found)
    return found.name


def _row(v: Variant) -> None:
    """Refuse a row that is not complete."""
    if not v.name.isidentifier():
        raise InvalidInput(f"variant: got name {v.name!r}, expected an identifier such as 'mine'")
    if v.name in VARIANTS:
        raise InvalidInput(f"variant: {v.name!r} is known already; choose another name")
    for name in ("formula", "unit", "source"):
        if not getattr(v, name).strip():
            raise InvalidInput(f"{v.name}: has no {name}; say it in a line")
    for what, given, known in (
        ("uses", v.uses, set(MEANINGS)),
        ("laws", v.laws, set(LAWS)),
        ("bugs", v.bugs, set(PLANTED)),
        ("families", v.families, set(FAMILIES)),
    ):
        unknown = sorted(set(given) - known)
        if unknown:
            raise InvalidInput(f"{v.name}: {what} has {unknown[0]!r}, expected some of {', '.join(sorted(known))}")


def _options(v: Variant) -> None:
    """Refuse an option that no case of the operator's own sets to something else than its default."""
    tried: dict[str, list[Any]] = {n: [] for n in v.options}
    for label, settings in v.cases.items():
        for n, x in settings.get("options", {}).items():
            if n not in tried:
                raise InvalidInput(f"{v.name}: case {label!r} sets an option {n!r} that it does not have")
            tried[n].append(x)
    for n, values in tried.items():
        if all(x == v.options[n].default for x in values):
            raise InvalidInput(
                f"{v.name}: option {n!r} is {v.options[n].default!r} in every case; add one to cases= that sets it"
            )


def _calls(v: Variant) -> list[Problem]:
    """Return small calls that the operator takes: plain, its own cases, and each option of Problem that it has."""
    rng, form = np.random.default_rng(0), FORMATS["float32"]
    d = Draw(form, rng, v.name)
    given = d.options(2, SMALL["n_q"], SMALL["n_k"], SMALL["d"])
    given |= {"window": (2, 1), "softcap": 2.0}  # so small a call must feel them
    uses = {n: given[n] for n in sorted(v.uses & set(given))}
    own = [{k: x for k, x in c.items() if k == "options"} for c in v.cases.values()]
    causal = [{"causal": "bottom_right"}] if "causal" in v.uses else []
    one_each = [{n: x} for n, x in uses.items()] + [causal[0] | {n: x} for n, x in uses.items() if causal]
    found, tried = [], []
    for settings in ({}, *own, *one_each, *(o | c for o in own for c in causal), uses, *(o | uses for o in own)):
        options = v.fitted(settings.get("options", {}), 2)
        p = d.problem(**SMALL | {"b": 1, "h": 2, "h_kv": 1} | settings | {"options": options})
        try:
            v.settings(p)
        except RefattnError as e:
            tried.append(str(e))
            continue
        found.append(p)
    if not found:
        raise InvalidInput(f"{v.name}: none of its cases fits a call of 5 queries and keys: {tried[0]}")
    return found


def _arithmetics(v: Variant, p: Problem) -> None:
    """Run the definition and its gradients over every arithmetic, and name what one of them does not have."""
    for what, run in (
        ("balls", lambda: evaluate(p)),
        ("certified floats", lambda: evaluate(p, rounding="float32")),
        ("losses", lambda: bounds(evaluate(p), flash("float32"))),
        ("gradients", lambda: evaluate(p, gradients=np.ones(p.out_shape))),
    ):
        try:
            run()
        except (InvalidProblem, RefattnError) as e:
            raise InvalidInput(f"{v.name}: its definition over {what}: {e}") from e
        except Exception as e:
            raise InvalidInput(
                f"{v.name}: its definition uses what {what} do not have: {type(e).__name__}: {e}; definitions are "
                "written with @ + - * /, .T, exp, log, tanh, sigmoid, relu, power, sum, where, shift and absmax"
            ) from e


def _rows_alone(v: Variant, p: Problem) -> None:
    """Refuse a definition by rows whose last row is another one alone."""
    if not isinstance(v.shape, Rows):
        return
    last = {n: x[..., -1:, :] for n in ("query", "bias", "allowed") if (x := getattr(p, n)) is not None}
    alone = p.replace(**last)
    if not v.takes(alone) or p.window is not None:
        return
    one, all_ = (evaluate(x).enclosures["out"] for x in (alone, p))
    apart = np.abs((one.mid - all_.mid[..., -1:, :]) + (one.tail - all_.tail[..., -1:, :]))
    # float64's own rounding of that difference comes on top of both radii
    room = one.radius + all_.radius[..., -1:, :] + 2.0**-50 * np.abs(one.mid)
    if (apart > room).any():
        raise InvalidInput(f"{v.name}: the last row alone gives something else; a definition by rows must not mix rows")


def _types(v: Variant) -> None:
    """Refuse what is not of its type."""
    for what, given, kind, expected in (
        ("name", v.name, str, "a text"),
        ("formula", v.formula, str, "a text"),
        ("unit", v.unit, str, "a text"),
        ("source", v.source, str, "a text"),
        ("uses", v.uses, frozenset | set, "a set of names"),
        ("options", v.options, Mapping, "a dict of Option by name"),
        ("cases", v.cases, Mapping, "a dict of settings by label"),
        ("forms", v.forms, Mapping, "a dict of definitions by name"),
    ):
        if not isinstance(given, kind):
            raise InvalidInput(f"variant: got {what} {given!r}, expected {expected}")
    if not callable(v.define) and not isinstance(v.define, Rows | Lowered | Selected | Steps):
        raise InvalidInput(f"variant: got define {v.define!r}, expected a function of q, k, v, o or a shape")
    for n, x in v.options.items():
        if not isinstance(x, Option):
            raise InvalidInput(f"{v.name}: option {n!r} is {x!r}, expected an Option")
    for n, s in v.cases.items():
        if not isinstance(s, Mapping):
            raise InvalidInput(f"{v.name}: case {n!r} is {s!r}, expected a dict")
