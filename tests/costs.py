"""CPU seconds of tests by folder: ``python -m pytest -n 2 -p tests.costs``, which adds tables at the end.

Other processes on the machine change a wall time, and hardly change these. What a test's own processes take counts,
and so does what its file imports. Then come the longest tests, the files at whose tests a process held most memory, and
what `slow.txt` lacks and lists in vain.
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
SPENT, BY_TEST, HELD = Counter(), Counter(), Counter()
SLOW = 6.0
"""Seconds of one core from which on `slow.txt` lists a test, all its cases together."""
LISTED = set(Path(__file__).with_name("slow.txt").read_text().splitlines()[1:])


def used():
    """Return the CPU seconds of this process and of those that it has waited for."""
    mine, theirs = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in (mine, theirs))


def held():
    """Return the MiB that this process holds; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() >> 20 if pages.exists() else 0


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
    report.cpu, item.config.cpu, report.held = now - item.config.cpu, now, held()
    return report


def pytest_runtest_logreport(report):
    """Add up, in the process that prints."""
    file = report.nodeid.split("::")[0]
    folder = file.split("/")[1]
    if not hasattr(report, "cpu"):  # of a worker that ended: nobody measured it
        return
    SPENT[folder if folder in BUDGETS else "files"] += report.cpu
    BY_TEST[report.nodeid.partition("[")[0]] += report.cpu
    HELD[file] = max(HELD[file], report.held)


def slow_tests():
    """Return the tests that `slow.txt` lacks, and those that it lists in vain by a third and more."""
    lacks = sorted(n for n, seconds in BY_TEST.items() if seconds > SLOW and n not in LISTED)
    return lacks, sorted(n for n in LISTED & set(BY_TEST) if BY_TEST[n] < SLOW * 2 / 3)


def pytest_terminal_summary(terminalreporter):
    """Print the tables, of folders what is over its budget first."""
    terminalreporter.section("CPU seconds")
    for folder, seconds in sorted(SPENT.items(), key=lambda x: x[1] - BUDGETS.get(x[0], 0.0), reverse=True):
        terminalreporter.write_line(f"{folder:12} {seconds:7.1f} of {BUDGETS.get(folder, 0.0):g}")
    terminalreporter.write_line(f"{'all':12} {sum(SPENT.values()):7.1f} of {sum(BUDGETS.values()):g}")
    for title, found, unit in (("longest tests", BY_TEST, "s"), ("most memory held", HELD, "MiB")):
        terminalreporter.section(title)
        for name, x in found.most_common(40):
            terminalreporter.write_line(f"{x:7.1f} {unit} {name}")
    for what, names in zip(("lacks", "lists in vain"), slow_tests(), strict=True):
        terminalreporter.section(f"slow.txt {what}")
        for name in names:
            terminalreporter.write_line(name)
