"""CPU seconds of tests by folder: ``python -m pytest -n 2 -p tests.costs``, which adds a table at the end.

Other processes on the machine change a wall time, and hardly change these. What a test's own processes take counts,
and so does what its file imports.
"""

import re
import resource
from collections import Counter
from pathlib import Path

import pytest

BUDGETS = {
    folder: float(seconds)
    for folder, seconds in re.findall(
        r"^\| (\S+) \| ([\d.]+) \|$", Path(__file__).with_name("README.md").read_text(), re.MULTILINE
    )
}
SPENT = Counter()


def used():
    """Return the CPU seconds of this process and of those that it has waited for."""
    mine, theirs = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in (mine, theirs))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Note what a test takes with its fixtures."""
    item.config.cpu = used()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Have a worker send it with the report of each phase."""
    report = yield
    now = used()
    report.cpu, item.config.cpu = now - item.config.cpu, now
    return report


def pytest_runtest_logreport(report):
    """Add up, in the process that prints."""
    folder = report.nodeid.split("::")[0].split("/")[1]
    SPENT[folder if folder in BUDGETS else "files"] += report.cpu


def pytest_terminal_summary(terminalreporter):
    """Print the table, what is over its budget first."""
    terminalreporter.section("CPU seconds")
    for folder, seconds in sorted(SPENT.items(), key=lambda x: x[1] - BUDGETS.get(x[0], 0.0), reverse=True):
        terminalreporter.write_line(f"{folder:12} {seconds:7.1f} of {BUDGETS.get(folder, 0.0):g}")
    terminalreporter.write_line(f"{'all':12} {sum(SPENT.values()):7.1f} of {sum(BUDGETS.values()):g}")
