"""One pytest item for each check of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Give a test one item for each check of a kernel.

    The test takes an argument ``check`` and calls it: ``def test_kernel(check): check()``. A check outside the kernel's
    capabilities is skipped with what it lacks.

    Parameters
    ----------
    kernel, variant, capabilities, model, dtypes, only, budget
        As in :func:`refattn.check_kernel`.
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

    from ..errors import InvalidInput
    from .kernel import name_of
    from .runner import plan

    items = plan(kernel, variant, capabilities=capabilities, model=model, dtypes=dtypes, only=only, budget=budget)
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
    values = [pytest.param(_Runner(i, label, variant), id=i.name, marks=marks.get(i.name, [])) for i in items]
    return pytest.mark.parametrize("check", values)


class _Runner:
    """One check as a call that raises where the check fails."""

    def __init__(self, item: Any, kernel: str, variant: str) -> None:
        self.item, self.kernel, self.variant = item, kernel, variant

    def __call__(self) -> None:
        __tracebackhide__ = True
        import pytest

        from ..errors import MismatchError
        from .report.report import Report

        check = self.item.run()
        if check.verdict == "unsupported":
            pytest.skip(check.message)
        if check.verdict == "failed":
            raise MismatchError(Report(self.kernel, self.variant, (check,)).describe(check))
