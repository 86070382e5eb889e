"""An operator of one's own: checked as those of the package are, then known to everything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..check.bounds import expected
from ..check.bugs.planted import PLANTED
from ..check.inputs import families
from ..check.inputs.builders import BUILDERS
from ..check.inputs.families import FAMILIES
from ..check.laws import LAWS
from ..check.model import FEATURES, FURTHER
from ..errors import InvalidInput, RefattnError
from ..exact.agree import under
from ..gates import GATES
from ..problem import MEANINGS
from ..validation import OFFSETS
from ..variants import VARIANTS, Option, Steps, Variant, variant_of
from ..variants.own import BUILT_IN, FILES, from_file
from ..variants.shapes import Shape
from .vetting import guarded, vet

__all__ = ["load", "register"]

SCALES = ("rsqrt", "one")
LABEL = re.compile(r"[a-z0-9][a-z0-9_-]*")
SETTINGS = frozenset(
    {"n_q", "n_k", "b", "h", "h_kv", "d", "d_v", "scale", "options", "codes", "ties", *OFFSETS, *MEANINGS}
)
"""What a case may set: lengths, the scale, options, packed sequences, whether queries and keys are codes, or tie."""
TAKEN = frozenset(
    {"allowed", "behind", "bias", "count", "distance", "length", "matrix", "of_keys", "one", "place", "queries", "rows",
     "scale", "sink", "softcap", "state", "token", "toeplitz", "weight"}
)  # fmt: skip
"""What every definition has; gates have their names where they are used."""


def register(variant: Variant | str) -> Variant:
    """Make an operator known to refattn: exact answers, gradients, bounds, laws, strategies, golden files, checks.

    Parameters
    ----------
    variant : Variant or str
        The operator, or where it is defined, as ``path/file.py:NAME``. Three lines are enough: ``Variant("mine",
        define, formula=..., unit=..., source=..., uses=frozenset({"causal"}))``. One of your own that has the same name
        is replaced.

    Returns
    -------
    Variant
        The same, so that ``MINE = refattn.register(refattn.Variant(...))`` is one line.

    Raises
    ------
    InvalidInput
        What is missing or wrong: a formula, an option that no case tries or that the definition does not read, an
        operation that an arithmetic does not have, forms that disagree, a name that is taken.
    """
    if isinstance(variant, str):
        return variant_of(load(variant))
    if not isinstance(variant, Variant):
        raise InvalidInput(f"variant: got {type(variant).__name__}, expected a refattn.Variant or path/file.py:NAME")
    _types(variant)
    _row(variant)
    guarded(variant, "options", _settings, variant)
    families.forget()
    with under(variant):
        vet(variant)
    VARIANTS[variant.name] = variant
    FILES.pop(variant.name, None)
    families.forget()  # answers of one that it replaces
    expected.forget()
    return variant


def load(name: str) -> str:
    """Return the name of an operator, registering it first where `name` is ``path/file.py:NAME``.

    Raises
    ------
    InvalidInput
        No such file, no such name in it, or what :func:`register` refuses.
    """
    if ":" not in name:
        return name
    found = from_file(name)
    if VARIANTS.get(found.name) is not found:
        register(found)
    FILES[found.name] = name
    return found.name


def _types(v: Variant) -> None:
    """Refuse what is not of its type."""
    for what, given, kind, wanted in (
        ("name", v.name, str, "a text"),
        ("formula", v.formula, str, "a text"),
        ("unit", v.unit, str, "a text"),
        ("source", v.source, str, "a text"),
        ("default_scale", v.default_scale, str, "a text"),
        ("fused", v.fused, str, "a text"),
        ("has_lse", v.has_lse, bool, "True or False"),
        ("positive", v.positive, bool, "True or False"),
        ("places", v.places, bool, "True or False"),
        ("narrowest", v.narrowest, int, "a whole number"),
        ("options", v.options, Mapping, "a dict of Option by name"),
        ("cases", v.cases, Mapping, "a dict of settings by label"),
        ("forms", v.forms, Mapping, "a dict of definitions by name"),
        ("wrong", v.wrong, Mapping, "a dict of pairs (text, shape) by name"),
        *((n, getattr(v, n), frozenset | set, "a set of names") for n in ("uses", "quick", "always", "never")),
        *((n, getattr(v, n), tuple, "a tuple of texts") for n in ("laws", "bugs", "families", "contract")),
    ):
        if not isinstance(given, kind):
            raise InvalidInput(f"variant: got {what} {given!r}, expected {wanted}")
    for what, define in (("define", v.define), *((f"form {n!r}", x) for n, x in v.forms.items())):
        if not callable(define) and not isinstance(define, Shape):
            raise InvalidInput(f"variant: got {what} {define!r}, expected a function of q, k, v, o or a shape")
    for n, pair in v.wrong.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Shape)):
            raise InvalidInput(f"variant: got {pair!r} as wrong {n!r}, expected a pair (text, shape)")
    if not callable(v.fits):
        raise InvalidInput(f"variant: got fits {v.fits!r}, expected a function of a problem")
    if v.tries is not None and not callable(v.tries):
        raise InvalidInput(f"variant: got tries {v.tries!r}, expected a function of n_q and n_k, or None")
    for n, s in v.cases.items():
        if not isinstance(s, Mapping):
            raise InvalidInput(f"{v.name}: case {n!r} is {s!r}, expected a dict")


def _row(v: Variant) -> None:
    """Refuse a row that is not complete, or that names what there is not."""
    if not v.name.isidentifier():
        raise InvalidInput(f"variant: got name {v.name!r}, expected an identifier such as 'mine'")
    if v.name in BUILT_IN:
        raise InvalidInput(f"variant: {v.name!r} is known already; choose another name")
    for name in ("formula", "unit", "source"):
        if not getattr(v, name).strip():
            raise InvalidInput(f"{v.name}: has no {name}; say it in a line")
    if v.has_lse and isinstance(v.shape, Steps):
        raise InvalidInput(f"{v.name}: has_lse is True, and a recurrence has none: it returns its state")
    if v.default_scale not in SCALES:
        raise InvalidInput(f"{v.name}: default_scale is {v.default_scale!r}, expected one of {', '.join(SCALES)}")
    if v.fused:
        raise InvalidInput(f"{v.name}: fused is {v.fused!r}; only refattn's own operators have a fast implementation")
    for what, given, known in (
        ("uses", v.uses, set(MEANINGS)),
        ("laws", v.laws, set(LAWS)),
        ("bugs", v.bugs, set(PLANTED)),
        ("families", v.families, set(FAMILIES)),
        ("always", v.always, set(FEATURES | FURTHER)),
        ("never", v.never, set(FEATURES | FURTHER)),
    ):
        unknown = sorted(set(given) - known, key=str)
        if unknown:
            raise InvalidInput(f"{v.name}: {what} has {unknown[0]!r}, expected some of {', '.join(sorted(known))}")


def _settings(v: Variant) -> None:
    """Refuse options without values to try, and cases that set what there is not."""
    tried: dict[str, list[Any]] = {n: [] for n in v.options}
    for label, settings in v.cases.items():
        if not isinstance(label, str) or not LABEL.fullmatch(label):
            raise InvalidInput(f"{v.name}: got case {label!r}, expected a label of small letters, digits, - and _")
        if label in BUILDERS["gaussian"]:
            raise InvalidInput(f"{v.name}: case {label!r} has the name of a case of every operator; choose another")
        unknown = sorted(set(settings) - SETTINGS, key=str)
        if unknown:
            raise InvalidInput(f"{v.name}: case {label!r} sets {unknown[0]!r}, expected some of {_listed(SETTINGS)}")
        alien = sorted(set(settings) & set(MEANINGS) - v.uses)
        if alien:
            raise InvalidInput(f"{v.name}: case {label!r} sets {alien[0]!r}, which is not in uses")
        options, heads = settings.get("options", {}), settings.get("h", 2)
        if not isinstance(options, Mapping):
            raise InvalidInput(f"{v.name}: case {label!r} has options {options!r}, expected a dict")
        for n, x in options.items():
            if n not in tried:
                raise InvalidInput(f"{v.name}: case {label!r} sets an option {n!r} that it does not have")
            _value(v, n, x, heads, f"in case {label!r}")
            tried[n].append(x)
    for n, values in tried.items():
        for x in v.options[n].draws(2):
            if x is not v.options[n].default:  # one that is no value makes the option one that every call must set
                _value(v, n, x, 2, "among its samples")
        if all(x == v.options[n].default for x in values):
            raise InvalidInput(
                f"{v.name}: option {n!r} is {v.options[n].default!r} in every case; add one to cases= that sets it"
            )


def _value(v: Variant, name: str, value: Any, heads: int, where: str) -> None:
    """Refuse a value that an option itself does not take."""
    option = v.options[name]
    if not isinstance(option, Option):
        raise InvalidInput(f"{v.name}: option {name!r} is {option!r}, expected an Option")
    if option.needs not in ("", *MEANINGS):
        raise InvalidInput(f"{v.name}: option {name!r} needs {option.needs!r}, expected one of {_listed(MEANINGS)}")
    if name in v.uses & set(GATES) or name in TAKEN:
        raise InvalidInput(f"{v.name}: option {name!r} has the name of something that every definition has")
    try:
        wrong = option.check(value, heads)
    except (RefattnError, KeyboardInterrupt):
        raise
    except BaseException as e:
        raise InvalidInput(f"{v.name}: the check of option {name!r} raised {type(e).__name__}: {e}") from e
    if wrong:
        raise InvalidInput(f"{v.name}: option {name!r} is {value!r} {where}, expected {wrong}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
