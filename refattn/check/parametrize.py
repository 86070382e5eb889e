"""One pytest item for each check of a kernel."""

from __future__ import annotations

import os
import secrets
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput
from ..problem import VARIANT

if TYPE_CHECKING:
    from .call import Function
    from .model import Capabilities, Model, ModelFor

__all__ = ["parametrize_with_checks"]


def parametrize_with_checks(
    kernel: Function,
    variant: str = VARIANT,
    *,
    capabilities: Capabilities | None = None,
    model: Model | ModelFor | None = None,
    dtypes: Sequence[str] | None = None,
    only: str | None = None,
    budget: str = "ci",
    seed: int | None = None,
    strict: bool = False,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Give a test one item for each check of a kernel.

    The test takes an argument ``check`` and calls it: ``def test_kernel(check): check()``. A check outside the kernel's
    capabilities is skipped with what it lacks; so is one that only differs at an edge (docs/edges.md).

    Parameters
    ----------
    kernel, variant, capabilities, model, dtypes, only, budget
        As in :func:`refattn.check_kernel`.
    seed : int
        What draws the family "calls". By default the environment's REFATTN_SEED, else another in every run; a failure
        names it.
    strict : bool
        Whether an edge that differs, or an option that is not read, fails.
    expected_failures : mapping
        From a check's name to the reason that it fails, e.g. ``{"poison/key-behind-mask[float32]": "#12"}``. It is
        strict: when the check passes, the test fails.

    Returns
    -------
    callable
        A decorator.

    Raises
    ------
    InvalidInput
        An expected failure names no check, or gives no reason.
    """
    import pytest

    from .kernel import name_of
    from .runner import plan

    seed = _seed() if seed is None else seed
    more: dict[str, Any] = {"dtypes": dtypes, "only": only, "budget": budget, "seed": seed}
    items = plan(kernel, variant, capabilities=capabilities, model=model, **more)
    expected = dict(expected_failures or {})
    names = {i.name for i in items}
    for name, reason in expected.items():
        if name not in names:
            raise InvalidInput(
                f"expected_failures: {name!r} is no check of this kernel; "
                f"refattn list --checks {variant} shows the names"
            )
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidInput(f"expected_failures: {name!r} needs a reason, e.g. the number of its issue")
    label = name_of(kernel)
    marks = {n: [pytest.mark.xfail(strict=True, reason=r)] for n, r in expected.items()}
    values = [
        pytest.param(
            _Runner(i, label, variant, seed, strict or i.name in expected), id=i.name, marks=marks.get(i.name, [])
        )
        for i in items
    ]
    return pytest.mark.parametrize("check", values)


class _Runner:
    """One check as a call that raises where the check fails."""

    def __init__(self, item: Any, kernel: str, variant: str, seed: int, strict: bool) -> None:
        self.item, self.kernel, self.variant, self.seed, self.strict = item, kernel, variant, seed, strict

    def __call__(self) -> None:
        __tracebackhide__ = True
        import pytest

        from ..errors import MismatchError
        from .report.report import Report

        check = self.item.run()
        if check.verdict == "failed" or (self.strict and check.verdict in ("edge", "unread")):
            report = Report(self.kernel, self.variant, (check,), seed=self.seed)
            raise MismatchError(report.describe(check, _repeat(self.seed)))
        if check.verdict != "passed":
            pytest.skip(f"differs at {', '.join(check.edges)}: {check.message}" if check.edges else check.message)


def _seed() -> int:
    """Return REFATTN_SEED, or a seed of this run that every worker of pytest-xdist has, too."""
    given = os.environ.get("REFATTN_SEED", "")
    if given:
        if not given.isdecimal():
            raise InvalidInput(f"REFATTN_SEED: got {given!r}, expected an integer")
        return int(given)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return zlib.crc32(run.encode()) if run else secrets.randbelow(2**31)


def _repeat(seed: int) -> str:
    """Return the command that repeats the running test; nothing outside pytest."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return f"REFATTN_SEED={seed} pytest {shlex.quote(test)}" if test else ""
