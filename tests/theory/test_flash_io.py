"""The bytes that a claim is held to are those that were measured, as benchmarks/results has them."""

import json
import re
from pathlib import Path

from refattn.functions.costs import hbm_bytes
from refattn.theory.flash_io import MEASURED

PROFILE = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-profile-h100.json"


def moved(counters):
    names = ("read from device memory", "written to device memory")
    return sum(int(counters[name].removesuffix(" byte").replace(",", "")) for name in names)


def test_measured_bytes_are_those_of_the_results():
    calls = json.loads(PROFILE.read_text())["calls"]
    assert [moved(counters) for counters in calls.values()] == [found for _, found in MEASURED]
    shapes = [re.fullmatch(r"bfloat16 d=(\d+) n=(\d+)( causal)?", name).groups() for name in calls]
    assert [(int(d), int(n)) for d, n, _ in shapes] == [(d, n) for (_, _, n, d), _ in MEASURED]
    assert [bool(causal) for *_, causal in shapes] == [False, False, True, False]


def test_calls_have_one_size_of_heads_together():
    assert {b * h * d for (b, h, _, d), _ in MEASURED} == {4 * 2048}
    assert len({hbm_bytes(b, h, h, n, n, d) - 4 * b * h * n for (b, h, n, d), _ in MEASURED}) == 1
