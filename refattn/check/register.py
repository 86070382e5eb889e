"""An operator of one's own: checked as those of the package are, then known to everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import FORMATS
from ..errors import InvalidInput, InvalidProblem, RefattnError
from ..exact.agree import differing_form, under
from ..exact.driver import evaluate
from ..problem import MEANINGS, Problem
from ..variants import VARIANTS, Variant
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
    _row(variant)
    with under(variant):
        _options(variant)
        small = _small(variant)
        _arithmetics(variant, small)
        wrong = differing_form(small)
        if wrong:
            raise InvalidInput(f"{variant.name}: {wrong}; both must be the same operator")
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
    except Exception as e:
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


def _small(v: Variant) -> Problem:
    """Return a small call that the operator takes."""
    rng, form = np.random.default_rng(0), FORMATS["float32"]
    tried = []
    for settings in ({}, *v.cases.values()):
        for causal in (None, "bottom_right"):
            more: dict[str, Any] = SMALL | {k: x for k, x in settings.items() if k in ("options", "h", "h_kv")}
            if causal and "causal" in v.uses:
                more["causal"] = causal
            p = Draw(form, rng, v.name).problem(**more)
            try:
                v.settings(p)
            except RefattnError as e:
                tried.append(str(e))
                continue
            return p
    raise InvalidInput(f"{v.name}: none of its cases fits a call of 5 queries and keys: {tried[0]}")


def _arithmetics(v: Variant, p: Problem) -> None:
    """Run the definition over every arithmetic, and name what one of them does not have."""
    for what, run in (
        ("balls", lambda: evaluate(p)),
        ("certified floats", lambda: evaluate(p, rounding="float32")),
        ("losses", lambda: bounds(evaluate(p), flash("float32"))),
    ):
        try:
            run()
        except (InvalidProblem, RefattnError) as e:
            raise InvalidInput(f"{v.name}: its definition over {what}: {e}") from e
        except (AttributeError, TypeError, NotImplementedError, ValueError, NameError) as e:
            raise InvalidInput(
                f"{v.name}: its definition uses what {what} do not have: {e}; definitions are written with "
                "@ + - * /, .T, exp, log, tanh, sigmoid, relu, power, sum, where, shift and absmax"
            ) from e
    if not cases(v.name):
        raise InvalidInput(f"{v.name}: no input case fits it; add some to cases=")
