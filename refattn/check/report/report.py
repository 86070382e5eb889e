"""What a check found: every check by name, with the worst element, its place and a command that repeats it."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from xml.etree import ElementTree as ET

from ...problem import VARIANT
from ...variants.own import named
from ..compare import Worst
from .agreed import agreed
from .machine import machine, versions

__all__ = ["Check", "Diagnosis", "Report", "junit", "summary"]

ROW = ("batch", "head", "row", "column")
PLACES: dict[str, tuple[str, ...]] = dict.fromkeys(("dk", "dv"), ("batch", "head", "key", "column"))
PLACES |= {"dbias": ("batch", "head", "row", "key"), "dstate": ("batch", "head", "channel", "column")}
PLACES |= dict.fromkeys(("dalpha", "dbeta", "deta"), ("batch", "head", "token", "channel"))
PLACES |= dict.fromkeys(("dsink", "dalibi_slopes"), ("head",))
PLACES |= dict.fromkeys(("dquery_norm", "dkey_norm"), ("column",))
VERDICTS = ("passed", "failed", "edge", "known", "unread", "unsupported")


@dataclass(frozen=True)
class Check:
    """One check of a kernel.

    Attributes
    ----------
    name : str
        ``family/label[dtype]`` or ``law/name[dtype]``.
    verdict : str
        "passed"; "failed", a wrong answer; "edge", where only contracts of ``refattn.check.EDGES`` are broken;
        "unread", where it does not read an option that it never said it has; "unsupported", where it raised, or lacks
        what the check needs; "known", where a baseline has it.
    worst : Worst or None
        The element furthest from its exact value, where arrays were compared.
    message : str
        Why it failed or is unsupported.
    seconds : float
        Time spent in the kernel and in comparing.
    arrays : tuple of Worst
        Every array that was compared, with its figures.
    rules : dict
        What other projects' rules say of out (:mod:`refattn.check.diagnose.rules`).
    edges : tuple of str
        The contracts that it breaks.
    call : str
        The call, of a check that did not pass.
    either : int
        Rows in which the kernel's rounding may choose other keys than the exact scores do: each was compared with the
        choice that it is nearest to.
    features : tuple of str
        The features of its call, where that was compared with the exact answer.
    """

    name: str
    verdict: str
    worst: Worst | None = None
    message: str = ""
    seconds: float = 0.0
    arrays: tuple[Worst, ...] = ()
    rules: dict[str, bool | None] = field(default_factory=dict)
    edges: tuple[str, ...] = ()
    call: str = ""
    either: int = 0
    features: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The format, from the name's end."""
        return self.name.rpartition("[")[2].rstrip("]")

    @property
    def ratio(self) -> float:
        """Worst error in units of its bound; NaN where nothing was compared."""
        return math.nan if self.worst is None else self.worst.ratio


@dataclass(frozen=True)
class Diagnosis:
    """What can be said of a report's failures beyond each check's own message.

    Attributes
    ----------
    shared : tuple of str
        What all failed checks have and not all passed ones.
    alike : tuple of (str, str, float)
        Planted bugs whose failed checks are much the same: name, what is wrong in a sentence, share in common.
    check, smallest : str
        A failed check, and the smallest call found that still fails.
    boundary : str
        Where that call turns from passing to failing.
    program : str
        It as a program, where it is small.
    """

    shared: tuple[str, ...] = ()
    alike: tuple[tuple[str, str, float], ...] = ()
    check: str = ""
    smallest: str = ""
    boundary: str = ""
    program: str = ""

    @property
    def lines(self) -> list[str]:
        """What it says, a sentence a line, the program apart."""
        found = [f"every failed check is {', '.join(self.shared)}"] if self.shared else []
        found += [f"looks like: {text} ({100 * share:.0f} % alike)" for _, text, share in self.alike]
        found += [f"{self.check} still fails on {self.smallest}"] if self.smallest else []
        return found + ([f"the smallest failing call {self.boundary}"] if self.boundary else [])


@dataclass(frozen=True)
class Report:
    """All checks of one kernel.

    Attributes
    ----------
    kernel, variant, version : str
        What was checked, for which operator, in which version of its package.
    checks : tuple of Check
        Every check, those not run for lack of a capability included.
    models : dict
        The rounding model by format.
    edges : frozenset of str
        The contracts that the kernel declares to differ from.
    whole : bool
        Whether every check of the budget ran, so that a declared contract must be broken somewhere.
    seed : int
        What the calls were drawn by.
    left : int
        How many checks did not run because the time was over, or the device was lost.
    budget : str
        What was run; calls that are drawn depend on it.
    diagnosis : Diagnosis, optional
        What failures say, from :func:`refattn.check.diagnose.explain.explain`.
    flags : str
        What its repeat commands need besides: how the kernel was run.
    unasked : tuple of str
        The features that the kernel declares and that no check which ran had, of a run of all checks of a budget;
        "gradients" where they were to be checked on a call and could not.
    truth : str
        Where exact answers were made, of a kernel on a GPU.
    lost : str
        The check in which the kernel's device was lost for the process: those after it did not run.
    """

    kernel: str
    variant: str
    checks: tuple[Check, ...]
    version: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    edges: frozenset[str] = frozenset()
    whole: bool = False
    seed: int = 0
    left: int = 0
    budget: str = "ci"
    diagnosis: Diagnosis | None = None
    flags: str = ""
    unasked: tuple[str, ...] = ()
    truth: str = ""
    lost: str = ""

    @property
    def right(self) -> bool:
        """Tell whether at least one check ran, none found a wrong answer, and not only laws hold."""
        return self.count("failed") == 0 and self.ran > 0 and self.agreed

    @property
    def agreed(self) -> bool:
        """Tell whether an answer agreed with the exact one, where any differed for an option that was not read."""
        return agreed(self.checks, self.variant)

    @property
    def ran(self) -> int:
        """How many checks ran: all but those that the kernel has not what is needed for."""
        return len(self.checks) - self.count("unread") - self.count("unsupported")

    @property
    def passed(self) -> bool:
        """Tell whether it is right and keeps every contract but those that it declares to differ from."""
        return self.right and not self.failures and not self.kept

    @property
    def broken(self) -> dict[str, int]:
        """By contract, how many checks found it broken and nothing else wrong."""
        found: dict[str, int] = {}
        for c in self.checks:
            for name in c.edges if c.verdict == "edge" else ():
                found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    @property
    def kept(self) -> list[str]:
        """The contracts that the kernel declares to differ from, and keeps."""
        return sorted(self.edges - set(self.broken)) if self.whole else []

    @property
    def verdict(self) -> str:
        """The verdict in words: right, right with the edges that differ or what was not judged, WRONG, not judged."""
        if self.count("failed"):
            return "WRONG"
        if not self.ran:
            return "nothing ran"
        if not self.agreed:
            return "not judged: no answer agreed, and it read none of the options asked for"
        n = len(self.broken)
        edges = f" · {n} edge{'s differ' if n > 1 else ' differs'}" if n else ""
        m = len(self.unasked)
        asked = f", {self.unasked[0] if m == 1 else f'{m} features'} not judged" if m else ""
        return "right" + edges + asked + ("" if self.fits else f", {self.ran} of {len(self.checks)} checks fit")

    @property
    def fits(self) -> bool:
        """Tell whether at least half of the checks ran."""
        return 2 * self.ran >= len(self.checks)

    @property
    def either(self) -> int:
        """Rows in which the kernel's rounding may choose other keys than the exact scores do, over all checks."""
        return sum(c.either for c in self.checks)

    def of_format(self, dtype: str) -> Report:
        """Return the same report for one format."""
        return replace(self, checks=tuple(c for c in self.checks if c.dtype == dtype))

    def count(self, verdict: str) -> int:
        """Return the number of checks with a verdict."""
        return sum(c.verdict == verdict for c in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that found a wrong answer, or a contract broken that is not declared."""
        return [c for c in self.checks if c.verdict == "failed" or set(c.edges) - self.edges]

    def worst(self, dtype: str | None = None) -> float:
        """Return the largest finite ratio (of one format)."""
        ratios = [c.ratio for c in self.checks if math.isfinite(c.ratio) and (dtype is None or c.dtype == dtype)]
        return max(ratios, default=math.nan)

    @property
    def correctly_rounded(self) -> dict[str, float]:
        """By format, the mean share of outputs that equal the correctly rounded value, over the cases compared."""
        shares: dict[str, list[float]] = {}
        for c in self.checks:
            for a in c.arrays:
                if a.array == "out" and a.figures is not None:
                    shares.setdefault(c.dtype, []).append(a.figures.correctly_rounded)
        return {d: sum(x) / len(x) for d, x in sorted(shares.items())}

    def command(self, check: Check) -> str:
        """Return the command that repeats one check."""
        more = "" if self.variant == VARIANT else f" --variant {shlex.quote(named(self.variant))}"
        budget = "" if self.budget == "ci" else f" --budget {self.budget}"
        seed = f" --seed {self.seed}" if check.name.startswith("calls/") else ""
        more += f" {self.flags}" if self.flags else ""
        more += "" if self.flags.startswith("--problem") else f" --only {shlex.quote(check.name)}{budget}{seed}"
        return f"refattn check {shlex.quote(self.kernel)}{more}"

    def __str__(self) -> str:
        """Return the verdict and the count of checks in a line, then each failure in words."""
        head = f"{self.kernel}, {self.variant}: {self.verdict} ({self.count('passed')} of {len(self.checks)} passed)"
        return "\n".join([head, *(self.describe(c) for c in self.failures)])

    def describe(self, check: Check, command: str = "") -> str:
        """Return a failed check in words: what, where, got, exact, allowed, and how to repeat it (by `command`)."""
        lines = [f"{self.kernel} fails {check.name}: {check.message}"]
        w = check.worst
        if w is not None and w.place:
            lines.append(f"  {element(w)}")
        if check.call:
            lines.append(f"  the call: {check.call}")
        lines.append(f"  repeat it: {command or self.command(check)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values; numbers that JSON lacks become "nan", "inf" or "-inf"."""
        checks = [asdict(c) | {"ratio": c.ratio, "reproduce": self.command(c)} for c in self.checks]
        plain: dict[str, Any] = _plain(
            {
                "kernel": self.kernel,
                "variant": self.variant,
                "version": self.version,
                "verdict": self.verdict,
                "right": self.right,
                "passed": self.passed,
                "edges": self.broken,
                "edges_declared": sorted(self.edges),
                "edges_kept": self.kept,
                "seed": self.seed,
                "budget": self.budget,
                "diagnosis": None if self.diagnosis is None else asdict(self.diagnosis),
                "either": self.either,
                "left": self.left,
                "unasked": self.unasked,
                "truth": self.truth,
                "lost": self.lost,
                "counts": {v: self.count(v) for v in VERDICTS},
                "models": self.models,
                "correctly_rounded": self.correctly_rounded,
                "checks": checks,
            }
        )
        return plain

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def element(w: Worst) -> str:
    """Return the worst element in words: its place, what was got, what is exact, what was allowed."""
    names = PLACES.get(w.array, ROW) if len(w.place) != 2 else ROW  # of slopes by batch item
    place = ", ".join(f"{n} {i}" for n, i in zip(names, w.place, strict=False))
    return (
        f"{w.array} at {place}: got {w.got:.9g}, exact {w.exact:.9g}, allowed error {w.allowed:.3g}, "
        f"{_ratio(w.ratio)} times that; {w.failures} of {w.elements} elements fail"
    )


def summary(reports: list[Report]) -> str:
    """Return several reports as one JSON text: ``kernels``, ``machine``, ``versions``."""
    whole = {"kernels": [r.to_dict() for r in reports], "machine": machine(), "versions": versions()}
    return json.dumps(whole, indent=1, allow_nan=False)


def junit(reports: list[Report]) -> str:
    """Return several reports as JUnit XML: a suite a kernel, a case a check, unsupported ones as skipped."""
    root = ET.Element("testsuites")
    for r in reports:
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{r.kernel} ({r.variant})",
            tests=str(len(r.checks)),
            failures=str(len(r.failures)),
            errors="0",
            skipped=str(len(r.checks) - r.count("passed") - len(r.failures)),
            time=f"{sum(c.seconds for c in r.checks):.3f}",
        )
        for c in r.checks:
            case = ET.SubElement(
                suite, "testcase", classname=f"refattn.{r.kernel}", name=c.name, time=f"{c.seconds:.3f}"
            )
            if c in r.failures:
                ET.SubElement(case, "failure", message=c.message).text = r.describe(c)
            elif c.verdict != "passed":
                ET.SubElement(case, "skipped", message=c.message)
        if r.diagnosis is not None:
            ET.SubElement(suite, "system-out").text = "\n".join([*r.diagnosis.lines, r.diagnosis.program])
    ET.indent(root)
    text = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", ET.tostring(root, encoding="unicode"))
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text + "\n"


def _ratio(x: float) -> str:
    return "infinitely many" if math.isinf(x) else f"{x:.3g}"


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x
