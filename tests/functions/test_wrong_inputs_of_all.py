"""Every public function beside wrong inputs: an error by the argument's name, or an answer that is meant.

Each argument of a valid call is replaced by what has no meaning there: another rank or size, an empty axis, NaN, counts
below 0, fractions, text, None, functions that return nothing. What a function takes all the same is listed in
accepted.toml, exactly: taking more fails, and taking less.
"""

import importlib
import inspect
import pkgutil
import tomllib
import types
from pathlib import Path

import pytest

from refattn import functions, variants

from .valid_calls import CALLS, HELPERS
from .wrong import answer, of_argument, said_of

ACCEPTED = tomllib.loads(Path(__file__).with_name("accepted.toml").read_text())


def short(module):
    return module.removeprefix("refattn.").removeprefix("functions.")


def public():
    """Return the functions that modules of functions and variants make public, by name."""
    found = {}
    for root in (functions, variants):
        for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            module = importlib.import_module(info.name)
            own = {n: getattr(module, n) for n in getattr(module, "__all__", ())}
            found |= {
                f"{short(info.name)}.{n}": f
                for n, f in own.items()
                if isinstance(f, types.FunctionType) and f.__module__ == info.name
            }
    return found


PUBLIC = public()


def helper(name):
    return name in HELPERS or name.rsplit(".", 1)[0] in HELPERS


def test_every_public_function_has_a_valid_call():
    assert sorted(n for n in PUBLIC if not helper(n)) == sorted(CALLS)
    modules = {n.rsplit(".", 1)[0] for n in PUBLIC}
    assert [n for n in HELPERS if n not in PUBLIC and n not in modules] == []


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_valid_call_has_every_argument(name):
    """But for what is None by default, where another argument may stand for it, and functions."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    left = [p.name for p in parameters if p.name not in CALLS[name] and p.kind not in kinds]
    assert [n for n in left if not callable(d := inspect.signature(PUBLIC[name]).parameters[n].default) and d] == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(CALLS))
def test_wrong_inputs_are_refused_by_name(name):
    call, arguments = PUBLIC[name], CALLS[name]
    answer(call, arguments)
    parameters, found, taken = inspect.signature(call).parameters, [], {}
    for argument, x in arguments.items():
        for label, wrong in of_argument(x):
            if label == "None" and argument in parameters and parameters[argument].default is None:
                continue
            said = said_of(call, arguments, argument, label, wrong)
            if said == "accepted":
                taken.setdefault(argument, []).append(label)
            elif said:
                found.append((argument, label, said))
    assert found == []
    assert taken == ACCEPTED.get(name, {})


def _wrong(call, label, wrong):
    return said_of(call, {"n": 3}, "n", label, wrong)


def test_the_check_finds_what_is_wrong():
    def silent(n):
        return 1.0

    def raw(n):
        return n + 1

    def unnamed(n):
        from refattn import InvalidInput

        raise InvalidInput("something is wrong")

    assert _wrong(silent, "NaN", float("nan")) == "accepted"
    assert _wrong(raw, "NaN", float("nan")) == ""
    assert "TypeError" in _wrong(raw, "None", None)
    assert _wrong(unnamed, "None", None).startswith("names no argument")
