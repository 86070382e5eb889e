"""What a GPU is predicted to take, beside every measurement that is kept; of blocks: tests.he.device.gate predicted."""

import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from refattn import he
from refattn.cli.main import main
from refattn.he.baselines import random_call
from refattn.he.device.build import KERNELS
from refattn.he.device.predict import COSTS, MB, WITHOUT_ROW, counted, fitted, on_gpu
from refattn.he.device.schedule import schedule_of

from ..make import planned, problem
from .predicted import ROWS, THEN, bound, measured, ratios

ATTENTION = [(1, 16, 32, 2, "full"), (1, 128, 64, 2, "full"), (1, 128, 64, 4, "full"), (12, 128, 64, 2, "full")]
PLANS = {
    f"{heads} x {n} x {d}, p = {p}, {upload}": he.plan(
        n, n, d, heads=heads, p=p, upload=upload, **random_call(n, d, heads, p)[1]
    )
    for heads, n, d, p, upload in [*ATTENTION, (1, 128, 64, 2, "whole")]
}


@pytest.fixture(scope="module")
def again():
    return fitted([{"name": n, "value": x} for n, x in ROWS.items()], COSTS.machine, COSTS.threads, THEN.chunk)


def test_the_table_is_what_the_rows_give(again):
    # least squares of a few numbers: the last of four digits may differ by the machine's own arithmetic
    def near(a, b):
        return abs(a - b) <= 10.0 ** (-3) * abs(b)

    assert again.kernels.keys() == COSTS.kernels.keys()
    assert all(near(x, y) for k in COSTS.kernels for x, y in zip(again.kernels[k], COSTS.kernels[k], strict=True))
    assert all(near(x, y) for x, y in zip(again.host, COSTS.host, strict=True))
    assert near(again.whole, COSTS.whole)
    assert max(abs(again.of_kernels - COSTS.of_kernels), abs(again.of_host - COSTS.of_host)) <= 1e-3


def test_every_kernel_has_a_cost():
    named = {"seeds" if k.startswith("seed_") else k for k in KERNELS}
    assert named == COSTS.kernels.keys() | WITHOUT_ROW.keys()


@pytest.mark.parametrize("name", PLANS)
def test_times_are_within_the_fits_residual(name):
    found = list(ratios(name, PLANS[name]))
    assert {what for what, _, _ in found} >= {"computing", "bytes to bytes"}
    for what, ratio, most in found:
        assert 1 / most <= ratio <= most, (name, what, ratio)


def test_launches_and_items_are_those_that_ran_and_each_kernels_time_is_within_the_residual():
    seen = 0
    for name, plan in PLANS.items():
        counts = counted(schedule_of(plan), True)
        for row, ms in ROWS.items():
            m = re.fullmatch(re.escape(name) + r", (\d+) launches of (\w+), (\d+) items", row)
            if m:
                n, kernel, items = int(m[1]), m[2], int(m[3])
                assert (counts[kernel, "launches"], counts[kernel, "items"]) == (n, items)
                a, b = COSTS.kernels[kernel]  # the rows are of degree 16384
                ratio = (a * n + b * counts[kernel, "limbs"]) / ms
                assert 1 / COSTS.of_kernels <= ratio <= COSTS.of_kernels, row
                seen += 1
    assert seen == 32  # eight kernels of four plans


def test_memory_is_what_sessions_asked_for():
    for name, plan in PLANS.items():
        found = on_gpu(plan)
        assert found.memory_bytes == round(1e9 * ROWS[f"{name}, memory of the session"])
        assert found.ciphertext_bytes == round(1e9 * ROWS[f"{name}, of it ciphertexts at their peak"])


def test_a_decoded_token_is_within_the_fits_residual():
    """Its costs are those of attention: nothing was fitted to it."""
    x = random_call(128, 64, 12, 2)[0].replace(causal="bottom_right")
    plan = he.plan_decoding(128, 64, heads=12, **he.ranges(x, margin=0.05))
    rows, at = measured("he-gpu-decoding-h200.json"), "decoding 12 x 128 x 64, p = 2, full"
    found = on_gpu(plan, THEN)
    for row, ms in (("computing", found.computing_ms), ("bytes to bytes", found.bytes_ms)):
        ratio, most = ms / rows[f"{at}, the last token, {row}"], bound(row)
        assert 1 / most <= ratio <= most, (row, ratio)
    assert found.memory_bytes == round(1e9 * rows[f"{at}, memory of the session"])


def test_few_ciphertexts_are_shared_by_all_threads():
    """One of a key, one of a query and one of values: a thread each, where it took three of them one after another."""
    plan = PLANS["1 x 16 x 32, p = 2, full"]
    now, then = on_gpu(plan), on_gpu(plan, THEN)
    assert now.computing_ms == then.computing_ms
    assert now.bytes_ms < then.bytes_ms
    alone = on_gpu(plan, replace(COSTS, chunk=1))
    assert now == replace(alone, costs=COSTS)


def test_times_follow_the_costs():
    plan = PLANS["1 x 16 x 32, p = 2, full"]
    once = on_gpu(plan)
    twice = replace(COSTS, kernels={k: (2 * a, 2 * b) for k, (a, b) in COSTS.kernels.items()})
    assert on_gpu(plan, twice).computing_ms == 2 * once.computing_ms  # a power of 2 rounds nothing
    free = on_gpu(plan, replace(COSTS, host=(0.0, 0.0, 0.0)))
    assert free.bytes_ms == free.computing_ms == once.computing_ms
    by_megabyte = on_gpu(plan, replace(COSTS, host=(1.0, 0.0, 0.0)))
    assert abs(by_megabyte.bytes_ms - by_megabyte.computing_ms - plan.upload_bytes / MB) < 1e-12 * by_megabyte.bytes_ms


def test_limbs_that_are_read_are_those_of_the_launches():
    # by another way: the operations themselves
    schedule = schedule_of(planned(problem(2, 2, 2)))
    operations = list(itertools.chain.from_iterable(s.operations for s in schedule.steps))
    dots = sum(len(op.operands) // 2 * op.out.limbs for op in operations if op.name == "dot")
    sums = sum(len(op.operands) * op.out.limbs * op.out.size for op in operations if op.name == "sum")
    switched = [op.operands[0].limbs for op in operations if op.name in ("relinearize", "shrink", "galois")]
    counts = counted(schedule, True)
    assert counts["dot", "limbs"] == dots > 0
    assert counts["sum", "limbs"] == sums
    assert counts["times_key", "limbs"] == sum(n * (n + 1) for n in switched) > 0
    assert counts["seeds", "limbs"] == 3 * sum(x.limbs for x in schedule.inputs)


def test_the_command_says_it_and_on_what_it_was_measured():
    sizes = ["16", "16", "32", "32", "1", "--denominator", "5", "40", "--epsilon", "5", "--norms", "9", "9"]
    command = ["he", "plan", *sizes, "--value-most", "4", "--device", "cuda"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    first, second = done.output.splitlines()
    assert "on one core" in first
    assert re.fullmatch(
        r"on a GPU \S+ ms of computing, \S+ ms from a query's bytes to the reply's, \d+ MB of its memory "
        r"\(by what an NVIDIA H200 and 16 cores of its host took\)",
        second,
    )
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
    plan = he.plan(16, 16, 32, denominator=(5, 40), epsilon=5, norms=(9, 9), value_most=4)
    assert told["gpu"] == json.loads(json.dumps(asdict(on_gpu(plan))))
    plain = CliRunner().invoke(main, [x for x in command if x not in ("--device", "cuda")])
    assert plain.output.splitlines() == [first]


def test_a_long_time_on_a_core_is_no_warning_for_a_gpu():
    plan = PLANS["12 x 128 x 64, p = 2, full"]
    assert plan.warnings(40.0)[0] == "the server will take about 40 s a query"
    assert not any("seconds" in x or "will take" in x for x in plan.warnings(0.4))


def test_the_page_says_the_worst_ratios():
    page = (Path(__file__).parents[3] / "docs" / "he.md").read_text(encoding="utf-8")
    assert f"{COSTS.of_kernels:.2f} for kernels" in page
    assert f"{COSTS.of_host:.2f} from bytes to bytes" in page
    assert bound("computing") == COSTS.of_kernels
