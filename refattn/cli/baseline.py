"""Failures that are known: a file of their names, so that only new ones count. It is strict both ways."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

from ..check.report.report import Check, Report
from ..errors import InvalidInput
from ..files import write_text

__all__ = ["Baseline"]


class Baseline:
    """The known failures of kernels: by kernel and check, what differs.

    Parameters
    ----------
    path : str
        A TOML file: ``seed``, and a table for each kernel from a check's name to what differs.
    new : bool
        Whether the file is to be written, and need not be there.
    """

    def __init__(self, path: str, new: bool) -> None:
        self.path = path
        self.known: dict[str, dict[str, str]] = {}
        self.seed: int | None = None
        if new and not Path(path).exists():
            return
        try:
            found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise InvalidInput(f"baseline: cannot read {path} ({e.strerror}); --update-baseline writes it") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise InvalidInput(f"baseline: {path} is no TOML file: {e}") from e
        seed = found.pop("seed", None)
        if type(seed) is not int or seed < 0 or any(not isinstance(x, dict) for x in found.values()):
            raise InvalidInput(f"baseline: {path} needs a seed, an integer of at least 0, and a table for each kernel")
        self.seed, self.known = seed, found

    def without_known(self, report: Report) -> tuple[Report, list[str]]:
        """Return a report in which known failures count as known, and the names that are known and pass now."""
        known = self.known.get(report.kernel, {})
        failing = {c.name for c in report.failures}
        ran = {c.name for c in report.checks}
        stale = sorted(n for n in known if n in ran and n not in failing)

        def settled(c: Check) -> Check:
            if c.name not in known or c.name not in failing or known[c.name] != _how(c):
                return c
            return replace(c, verdict="known", message=f"known: {c.message}", edges=())

        return replace(report, checks=tuple(map(settled, report.checks))), stale

    def write(self, reports: list[Report]) -> None:
        """Write the failures of reports as the known ones; what did not run stays as it was."""
        seed = reports[0].seed if reports else self.seed or 0
        table = {k: {n: x for n, x in known.items() if seed == self.seed or not n.startswith("calls/")}
                 for k, known in self.known.items()}  # fmt: skip
        for r in reports:
            mine = table.setdefault(r.kernel, {})
            for c in r.checks:
                mine.pop(c.name, None)
            mine |= {c.name: _how(c) for c in r.failures}
        lines = ["# Written by refattn check --update-baseline", f"seed = {seed}"]
        for kernel, known in table.items():
            lines += ["", f"[{json.dumps(kernel)}]", *(f"{json.dumps(n)} = {json.dumps(x)}" for n, x in known.items())]
        write_text(self.path, "\n".join(lines) + "\n")


def _how(c: Check) -> str:
    """Return how a check failed: the edges at which it differs, or "wrong"."""
    return ", ".join(c.edges) or "wrong"
