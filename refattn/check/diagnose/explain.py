"""Failures in more words: what failed checks share, which planted bugs fail alike, the smallest call that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...problem import Problem
from ..call import Function
from ..inputs.families import Case, cases
from ..inputs.models import MODELS
from ..kernel import Kernel
from ..model import Capabilities, Model, ModelFor
from ..report.report import Check, Diagnosis, Report
from ..runner import failing, plan
from ..settle import RAISED
from .shrink import boundary, program, shrink

__all__ = ["alike", "explain", "pattern", "shared"]

LEAST = 10
"""Checks that must have run before planted bugs can be told apart."""
ALIKE = 0.6
"""The least share of failed checks in common of a bug that is named."""
NOT_RUN = ("unsupported", "unread")
SMALL = 16
"""The largest axis of a call that is printed as a program."""
SIGNATURES = Path(__file__).parents[1] / "bugs" / "signatures.json"


def explain(
    kernel: Function | Kernel,
    report: Report,
    *,
    model: Model | ModelFor | None = None,
    capabilities: Capabilities | None = None,
    seconds: float = 10.0,
) -> Diagnosis:
    """Return what can be said of a report's failures beyond each check's own message.

    Parameters
    ----------
    kernel : callable
        The kernel that was checked.
    report : Report
        With failures.
    model, capabilities
        As :func:`refattn.check_kernel` was given them.
    seconds : float
        For shrinking.
    """
    judged = Kernel.of(kernel, model=model, capabilities=capabilities)
    bugs = tuple((n, _sentence(n), share) for n, share in alike(report) if share >= ALIKE)
    found = Diagnosis(shared(report), bugs)
    for check in sorted(report.failures, key=lambda c: (c.verdict != "failed", c.name.startswith("calls/"))):
        if check.worst is not None and not check.name.startswith("law/"):
            return _smallest(judged, report, check, found, seconds)
    return found


def _smallest(judged: Kernel, report: Report, check: Check, found: Diagnosis, seconds: float) -> Diagnosis:
    """Add the smallest call that fails as a check does."""
    how: dict[str, Any] = {"dtypes": [check.dtype], "budget": report.budget, "seed": report.seed}
    key = next((i.key for i in plan(judged, report.variant, only=check.name, **how)), None)
    if key is None:
        return found
    case, dtype, model, backward = key
    fails = failing(judged.call, model, judged.capabilities.gradients)
    small, arriving = shrink(case.problem(dtype), case.arriving(dtype) if backward else None, fails, seconds)
    fits = max(small.n_q, small.n_k, small.d_k, small.d_v) <= SMALL
    return replace(
        found,
        check=check.name,
        smallest=repr(small),
        boundary=boundary(small, arriving, fails),
        program=program(report.kernel, small, arriving) if fits else "",
    )


def _sentence(bug: str) -> str:
    origin = _stored()["origins"].get(bug, "")
    return bug.replace("_", " ") + (f", as in {origin}" if origin else "")


def shared(report: Report) -> tuple[str, ...]:
    """Say what all failed checks have and not all passed ones: a feature, an option, a gradient."""
    failed, passed = ([c.name for c in report.checks if c.verdict == v] for v in ("failed", "passed"))
    if not failed or not passed:
        return ()
    sets = {n: _traits(report.variant, n) for n in failed + passed}
    common = frozenset.intersection(*(sets[n] for n in failed))
    return tuple(sorted(t for t in common if any(t not in sets[n] for n in passed)))


def _traits(variant: str, name: str) -> frozenset[str]:
    plain, dtype = name.rsplit("[", 1)
    traits = {f"in {dtype.rstrip(']')}"}
    if plain.endswith("/gradients"):
        traits.add("in gradients")
    case = _cases(variant).get(plain.removesuffix("/gradients"))
    if case is not None:
        p: Problem = case.problem("float32" if not case.dtypes else case.dtypes[0])
        traits |= {f"with {f.replace('_', ' ')}" for f in p.features()}
        traits |= {
            f"where {t}"
            for t, yes in (("n_k > 64", p.n_k > 64), ("n_q > 64", p.n_q > 64), ("b > 1", p.batch > 1))
            if yes
        }
    return frozenset(traits)


@lru_cache(maxsize=8)
def _cases(variant: str) -> dict[str, Any]:
    real = [Case("models", n, variant, c, sampled=True, gradients=back) for n, (c, back) in MODELS.items()]
    return {c.name: c for c in [*cases(variant), *real]}


def pattern(report: Report, dtype: str) -> frozenset[str]:
    """Return the names of the failed checks of a format."""
    names = [c.name for c in report.failures if c.name.endswith(f"[{dtype}]") and not _varies(c)]
    return frozenset(n.rsplit("[", 1)[0] for n in names)


def _varies(check: Check) -> bool:
    """Tell whether another run has other checks of this name, or it says nothing of what was computed."""
    return check.name.startswith("calls/") or check.message.startswith(RAISED)


def alike(report: Report, most: int = 3) -> tuple[tuple[str, float], ...]:
    """Return the planted bugs whose failed checks are most like a report's, each with the share in common (0 to 1).

    The table of what each bug fails is ``signatures.json``; ``python -m refattn.check.bugs.signatures`` makes it.
    """
    table = _signatures()
    dtypes = sorted({c.name.rsplit("[", 1)[1].rstrip("]") for c in report.failures})
    known = frozenset().union(*table.values())
    ran = {c.name.rsplit("[", 1)[0] for c in report.checks if c.verdict not in NOT_RUN and not _varies(c)} & known
    seen = (frozenset().union(*(pattern(report, d) for d in dtypes)) if dtypes else frozenset()) & known
    scores = []
    if len(ran) < LEAST:
        return ()
    for bug, names in table.items():
        both, either = seen & names, (seen | names) & ran
        if both:
            scores.append((bug, len(both) / len(either)))
    return tuple(sorted(scores, key=lambda x: -x[1])[:most])


@lru_cache(maxsize=1)
def _stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SIGNATURES.read_text(encoding="utf-8"))
    return found


def _signatures() -> dict[str, frozenset[str]]:
    names = _stored()["checks"]
    return {bug: frozenset(names[i] for i in at) for bug, at in _stored()["bugs"].items()}
