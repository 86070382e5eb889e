"""What a definition of one's own must show on small calls: every arithmetic agrees, and all it says it reads, it reads.

No tolerance: enclosures of the same number must overlap, and what is read must move them apart somewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.bounds.forward import bounds
from ..check.inputs.draw import Draw
from ..check.inputs.families import cases
from ..check.laws import LAWS, law_problem
from ..check.model import Capabilities, flash
from ..check.trial import Trial
from ..dtypes import FORMATS
from ..errors import InvalidInput, InvalidProblem, RefattnError, UnsupportedProblem
from ..exact.agree import differing_form
from ..exact.answer import Answer
from ..exact.arithmetics import Floats
from ..exact.driver import enclose, evaluate
from ..exact.enclosure import Enclosure
from ..exact.field import Field
from ..exact.heads import Given, heads, matrix_of, rows_of
from ..exact.lowering import core_of, lower
from ..exact.parts import parts
from ..gates import RECURRENT
from ..problem import Problem
from ..variants import Lowered, Option, Rows, Selected, Steps, Variant
from ..variants.variant import CALL_LAWS

__all__ = ["calls_of", "guarded", "vet"]

SIZES: tuple[dict[str, int], ...] = ({"n_q": 5, "n_k": 7, "d": 4, "d_v": 3}, {"n_q": 5, "n_k": 5, "d": 4})
"""A call whose sizes differ, and one for operators that need as many keys as queries."""


def vet(v: Variant) -> None:
    """Refuse a definition that does not do what its row says; the operator must be known under its name.

    Raises
    ------
    InvalidInput
        What is wrong, and on which kind of call.
    """
    found: list[Problem] = []
    guarded(v, "options", lambda: found.extend(calls_of(v)))
    for p in found:
        for what, run in (("arithmetics", _arithmetics), ("parts", _parts)):
            guarded(v, what, run, v, p)
    for what, check in (
        ("reads", _reads),
        ("forms", _forms),
        ("positive", _positive),
        ("full", _full),
        ("steps", _linear),
        ("laws", _laws),
        ("cases", _cases),
    ):
        guarded(v, what, check, v, found)


def guarded(v: Variant, what: str, run: Callable[..., None], *given: Any) -> None:
    """Run one check; what the operator's own functions raise in it becomes an error that says so."""
    try:
        run(*given)
    except (InvalidInput, InvalidProblem, KeyboardInterrupt):
        raise
    except BaseException as e:
        raise InvalidInput(f"{v.name}: checking its {what} raised {type(e).__name__}: {e}") from e


def calls_of(v: Variant) -> list[Problem]:
    """Return small calls that an operator takes: plain, with its own options, and with each option of Problem.

    Raises
    ------
    InvalidInput
        It takes none of them.
    """
    found: list[Problem] = []
    refused = ""
    for size in SIZES:
        for settings in _settings(v, size):
            d = Draw(FORMATS["float32"], np.random.default_rng(0), v.name)
            more: dict[str, Any] = {**size, **settings}
            try:
                p = d.problem(b=1, h=2, h_kv=1, **more)
                v.settings(p)
            except RefattnError as e:
                refused = refused or str(e)
            else:
                found.append(p)
        if found:
            return found
    raise InvalidInput(f"{v.name}: takes no call of 5 queries and keys: {refused}")


def _settings(v: Variant, size: dict[str, int]) -> Iterator[dict[str, Any]]:
    d = Draw(FORMATS["float32"], np.random.default_rng(1), v.name)
    given = d.options(2, size["n_q"], size["n_k"], size["d"], size.get("d_v"))
    given |= {"window": (2, 1), "softcap": 0.5}  # so small a call must feel them
    uses = {n: given[n] for n in sorted(v.uses & set(given))}
    causal = [{"causal": "bottom_right"}] if "causal" in v.uses else []
    own = [
        {"options": v.fitted(c.get("options", {}), 2), **{n: c[n] for n in RECURRENT if n in c}}
        for c in v.cases.values()
    ]
    own += [{"options": {n: x}} for n, o in v.options.items() for x in o.draws(2)]
    yield from ({}, *own, *({n: x} for n, x in uses.items()), *(c | {n: x} for c in causal for n, x in uses.items()))
    yield from (o | c for o in own for c in causal)
    yield uses
    yield from (o | uses for o in own)


def _enclosures(answer: Answer) -> dict[str, Enclosure]:
    return {n: e for n, e in answer.enclosures.items() if n in ("out", "lse", "state")}


def _apart(a: Enclosure, b: Enclosure) -> bool:
    """Tell whether two enclosures cannot hold the same numbers somewhere."""
    with np.errstate(all="ignore"):
        gap = np.abs((a.mid - b.mid) + (a.tail - b.tail))
        # float64's own rounding of that difference comes on top of both radii
        room = a.radius + b.radius + 2.0**-50 * (np.abs(a.mid) + np.abs(b.mid))
        return bool((gap > room).any() or (np.isnan(a.mid) != np.isnan(b.mid)).any())


def _differ(a: Answer, b: Answer) -> bool:
    x, y = _enclosures(a), _enclosures(b)
    return any(_apart(x[n], y[n]) for n in x)


def _arithmetics(v: Variant, p: Problem) -> None:
    """Run the definition and its gradients over every arithmetic; the same numbers must come of all."""
    model, dout = flash("float64"), np.ones(p.out_shape)
    exact = _over(v, "balls", lambda: evaluate(p))
    for n, e in _enclosures(exact).items():
        fine = np.isfinite(e.mid) | (np.isneginf(e.mid) & (n == "lse"))
        if not p.options and not fine.all():
            at = tuple(int(i) for i in np.argwhere(~fine)[0])
            raise InvalidInput(f"{v.name}: its definition gives {e.mid[at]} in {n} at {at} of a call of numbers: {p}")
    if ("lse" in exact.enclosures) != v.has_lse:
        does = "gives an lse" if not v.has_lse else "gives none"
        raise InvalidInput(f"{v.name}: has_lse is {v.has_lse}, and what it is lowered to {does}")
    floats = _over(v, "certified floats", lambda: evaluate(p, rounding="float32"))
    limit = _over(v, "losses", lambda: bounds(exact, model))
    others = [("certified floats", floats)]
    with suppress(UnsupportedProblem):  # there is none at this point, as of a largest value that two share
        others.append(("gradients", _over(v, "gradients", lambda: evaluate(p, gradients=dout))))
    for what, other in others:
        if _differ(exact, other):
            raise InvalidInput(f"{v.name}: its definition over {what} gives something else than over balls")
    if isinstance(v.shape, Rows):
        for one in heads(p):
            f = Floats()
            with np.errstate(all="ignore"):
                out, _ = v.shape.define(*(matrix_of(f, x) for x in (one.q, one.k, one.v)), one.options(f))
            where = (one.batch, one.head, one.rows)
            off = np.abs(out.a - exact.enclosures["out"].mid[where])[one.live]
            if (off > limit["out"][where][one.live]).any():
                raise InvalidInput(
                    f"{v.name}: its definition over NumPy's float64 gives something else than over balls"
                )


def _over(v: Variant, what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except RefattnError as e:
        if what == "gradients" and isinstance(e, UnsupportedProblem):
            raise
        raise InvalidInput(f"{v.name}: its definition over {what}: {e}") from e
    except KeyboardInterrupt:
        raise
    except (AttributeError, NotImplementedError) as e:
        raise InvalidInput(
            f"{v.name}: its definition uses what {what} do not have: {type(e).__name__}: {e}; definitions are written "
            "with @ + - * /, .T, exp, log, tanh, sigmoid, relu, power, sum, where, positive, shift and absmax"
        ) from e
    except BaseException as e:
        raise InvalidInput(f"{v.name}: its definition over {what} raised {type(e).__name__}: {e}") from e


def _parts(v: Variant, p: Problem) -> None:
    """Refuse a definition whose rows, heads or batches are not what they are alone, where it says nothing of that."""
    whole = enclose(p)
    for part in parts(p, None, rows=2):
        alone = enclose(part.problem)
        for n, e in _enclosures(whole).items():
            at = part.place(n)
            if _apart(Enclosure(e.mid[at], e.tail[at], e.radius[at]), alone.enclosures[n]):
                raise InvalidInput(
                    f"{v.name}: some rows or heads alone give something else; set places=True where the definition "
                    "reads where rows and keys stand or an option by head, together=True in Rows where it mixes rows"
                )


def _reads(v: Variant, found: list[Problem]) -> None:
    """Refuse what changes no call: an option of its own, one of Problem, or the scale where nothing reads it."""
    calls = [*found, *(c.problem("float32") for c in cases(v.name) if c.label in v.cases)]
    answers: dict[int, Answer] = {}

    def changes(others: Callable[[Problem], list[Problem]]) -> bool | None:
        """Tell whether something changes a call; None where there are no two calls to compare."""
        seen = None
        for i, p in enumerate(calls):
            for other in others(p):
                if not v.takes(other):
                    continue
                if i not in answers:
                    answers[i] = enclose(p)
                if _differ(answers[i], enclose(other)):
                    return True
                seen = False
        return seen

    for name in sorted(v.uses):

        def without(p: Problem, n: str = name) -> list[Problem]:
            gone = (n, "state") if n == "eta" else (n,)  # a state has another shape where there is no momentum
            return [] if getattr(p, n) is None else [p.replace(**dict.fromkeys(gone))]

        if changes(without) is False:
            raise InvalidInput(
                f"{v.name}: uses has {name!r}, and no call changes by it: the definition does not read it"
            )
    for name, option in v.options.items():

        def another(p: Problem, n: str = name, o: Option = option) -> list[Problem]:
            values = [
                o.default,
                *o.draws(p.heads),
                *(c["options"][n] for c in v.cases.values() if n in c.get("options", {})),
            ]
            return [p.replace(options={**p.options, n: x}) for x in values if x != p.options.get(n, o.default)]

        if changes(another) is not True:
            raise InvalidInput(f"{v.name}: option {name!r} changes no call: the definition does not read it")
    if not _reads_scale(v, found[0]):
        raise InvalidInput(f"{v.name}: its definition does not read o.scale, which every call may set")


def _reads_scale(v: Variant, p: Problem) -> bool:
    """Tell whether the definition asks for the scale; a lowering must pass it on, selected scores may not need it."""
    if isinstance(v.shape, Lowered):
        scaled = [lower(p.replace(scale=x)).problem for x in (0.5, 0.25)]
        return scaled[0].scale != scaled[1].scale or _differ(*(enclose(x) for x in scaled))
    if isinstance(v.shape, Selected):
        return True
    one, f = next(iter(heads(p))), Floats()
    read: list[str] = []

    class Noting(Given):
        def __getattribute__(self, name: str) -> Any:
            read.append(name)
            return super().__getattribute__(name)

    known = one.options(f)
    o = Noting(known._make, **{n: x for n, x in vars(known).items() if n != "_make"})
    with np.errstate(all="ignore"):
        if isinstance(v.shape, Steps):
            v.shape.prepare(o)
            (q, k, value), gates = one.tokens(f)[0]
            vars(o).update(gates, token=0)
            v.shape.take([matrix_of(f, x) for x in one.start(v.shape.held)], q, k, value, o)
        else:
            rows_of(one).define(*(matrix_of(f, x) for x in (one.q, one.k, one.v)), o)
    return "scale" in read


def _forms(v: Variant, found: list[Problem]) -> None:
    """Refuse forms that disagree, on the small calls and on every case of the operator's own."""
    own = [c for c in cases(v.name) if c.label in v.cases] if v.forms else []
    for p in [*found, *(c.problem("float32") for c in own)]:
        wrong = differing_form(p)
        if wrong:
            raise InvalidInput(f"{v.name}: {wrong}; both must be the same operator")


def _positive(v: Variant, found: list[Problem]) -> None:
    """Refuse positive=True where a key in sight weighs 0 or less."""
    if not v.positive:
        return
    for p in found:
        ones = np.broadcast_to(np.eye(p.n_k, dtype=p.value.dtype), (*p.value.shape[:3], p.n_k))
        call = p.replace(value=ones.copy(), **({} if p.state is None else {"state": None}))
        if not v.takes(call):
            continue
        answer = enclose(call)
        weights = answer.enclosures["out"]
        for one in heads(answer.call):
            w: NDArray[Any] = weights.mid[one.batch, one.head, one.rows]
            if (w[one.allowed & one.live[:, None]] <= 0).any():
                raise InvalidInput(f"{v.name}: positive is True, and a key in sight weighs 0 or less in a call: {call}")


def _full(v: Variant, found: list[Problem]) -> None:
    """Refuse a whole budget under which the operator is not its core on every key."""
    if not isinstance(v.shape, Selected):
        return
    alien = sorted(set(v.shape.full) - set(v.options), key=str)
    if alien:
        raise InvalidInput(f"{v.name}: full sets an option {alien[0]!r} that it does not have")
    for n, x in v.shape.full.items():
        wrong = v.options[n].check(x, 2)
        if wrong:
            raise InvalidInput(f"{v.name}: full sets {n!r} to {x!r}, expected {wrong}")
    for p in found:
        call = p.replace(options={**p.options, **v.shape.full})
        if v.takes(call) and _differ(enclose(call), enclose(core_of(call, v.shape))):
            raise InvalidInput(
                f"{v.name}: full={dict(v.shape.full)} does not choose everything: it differs from its core"
            )


def _linear(v: Variant, found: list[Problem]) -> None:
    """Refuse linear=True where a step is no matrix times the state and something that does not depend on it."""
    if not isinstance(v.shape, Steps) or not v.shape.linear:
        return
    f = Field(found[0].d_k)
    for one in (one for p in found for one in heads(p)):
        o, d = one.options(f), one.q.shape[1]
        v.shape.prepare(o)
        (q, k, value), gates = one.tokens(f)[0]
        parts = len(one.start(v.shape.held))

        def step(state: Any, value: Any, q: Any = q, k: Any = k, o: Any = o, parts: int = parts) -> Any:
            found, out = v.shape.take([f.array(x) for x in np.split(state, parts)], q, k, value, o)  # type: ignore
            return [*found, out]

        state = np.arange(1.0, parts * d * value.shape[1] + 1).reshape(parts * d, -1)
        for token in range(2):  # the first may differ, in what a step holds
            vars(o).update(gates, token=token)
            moves = step(np.eye(parts * d), f.array(np.zeros((1, parts * d))))
            for whole, alone, move in zip(step(state, value), step(0 * state, value), moves, strict=True):
                if (whole - alone - move @ f.array(state)).is_zero().all():
                    continue
                raise InvalidInput(f"{v.name}: linear is True, and a step is not linear in the state")


def _laws(v: Variant, found: list[Problem]) -> None:
    """Refuse a law that the operator's own correctly rounded answers break, or that no call of it can be tried on."""

    def rounded(p: Problem) -> Any:
        values = evaluate(p, rounding=p.out_type).values
        more = "lse" if v.has_lse else "state" if isinstance(v.shape, Steps) else ""
        return (values["out"], values[more]) if more else values["out"]

    for law in (LAWS[n] for n in v.laws if n not in CALL_LAWS):
        p = law_problem(law, "float32", v.name)
        missing = sorted(n for n in law.uses if getattr(p, n) is None)
        if missing or (law.shape is not None and not isinstance(v.shape, law.shape)):
            what = f"an operator with {missing[0]}" if missing else f"one defined by {law.shape.__name__}"  # type: ignore[union-attr]
            raise InvalidInput(f"{v.name}: laws has {law.name!r}, which is about {what}")
        if law.named_only or law.needs not in ("", "lse", "state"):
            continue
        worst = law.test(Trial(rounded, flash("float32"), Capabilities(frozenset({"float32"}))), p)
        if worst.ratio > 1:
            raise InvalidInput(
                f"{v.name}: laws has {law.name!r}, which its exact answers break: {'; '.join(worst.symptoms)}"
            )
    for law in LAWS.values():
        if law.shape is not None and isinstance(v.shape, law.shape) and law.name not in v.laws:
            raise InvalidInput(f"{v.name}: laws lacks {law.name!r}, which every {law.shape.__name__} must keep")


def _cases(v: Variant, found: list[Problem]) -> None:
    """Refuse a case that cannot be built, or that the operator itself does not take."""
    for case in cases(v.name):
        if case.label in v.cases:
            v.settings(case.problem("float32"))
    if not cases(v.name):
        raise InvalidInput(f"{v.name}: no input case fits it; add some to cases=")
    unknown = sorted(v.quick - {c.name for c in cases(v.name)})
    if unknown:
        raise InvalidInput(f"{v.name}: quick has {unknown[0]!r}, which is none of its cases")
