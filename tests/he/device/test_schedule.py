"""Schedules: what is done in which order and where, and that words come out as SEAL's, on NumPy."""

from dataclasses import dataclass

import numpy as np
import pytest

from refattn import UnsupportedProblem, he
from refattn.he.device.chain import chain_of
from refattn.he.device.encode import encoded
from refattn.he.device.executor import execute
from refattn.he.device.schedule import MOST_SCRATCH, schedule_of, scratch_limbs
from refattn.he.device.trace import Trace, trace_of
from refattn.he.noise import Ring

from ..make import planned, problem
from .every import RINGS, Every
from .exchange import PLANS, SMALL, Setup, exchange

pytest.importorskip("tenseal")


@pytest.mark.parametrize("name", PLANS)
def test_words_are_seals(name):
    e = exchange(name)
    schedule = schedule_of(e.program)
    keys, parts = e.given_words()
    found = execute(schedule, keys, parts)
    assert len(found) == e.plan.outs
    for ours, theirs in zip(found, e.replied_words(schedule.outs), strict=True):
        assert np.array_equal(ours, theirs)


def test_every_operation_is_seals():
    """With plaintexts and levels that differ, as layers have them."""
    program = Every(RINGS[8192])
    s = Setup(program.ring, program.rotations)
    parts = [s.encrypted(i, limbs) for i, limbs in enumerate(program.part_limbs())]
    schedule = schedule_of(program)
    found = execute(schedule, s.keys, [s.words(x) for x in parts], lambda x: encoded(x, program.ring))
    for ours, theirs, node in zip(found, program.compute(s.seal, (), parts), schedule.outs, strict=True):
        assert np.array_equal(ours, s.words(theirs))
        assert node.scale == theirs.scale


def large(heads=12, **more):
    """Return a plan of 128 x 64, by the ranges of normal inputs alone."""
    given = {"denominator": (60.0, 300.0), "epsilon": 13.0, "norms": (11.0, 11.0), "value_most": 4.5, "upload": "whole"}
    return he.plan(128, 128, 64, heads=heads, **(given | more))


@pytest.mark.parametrize("plan", [lambda: exchange("the server divides").plan, large], ids=["small", "large"])
def test_nothing_lies_where_something_else_lives(plan):
    """By a table of who holds each limb: what is read was written last by its owner."""
    schedule = schedule_of(plan())
    n = schedule.chain.degree
    owner = np.full(schedule.words // n, -1)
    assert schedule.words % n == 0

    def limbs(node):
        start = schedule.place(node) // n
        return slice(start, start + node.size * node.limbs)

    for step in schedule.steps:
        for i in step.loaded:
            owner[limbs(schedule.inputs[i])] = schedule.inputs[i].number
        scratch = [(s // n, scratch_limbs(op)) for op, s in zip(step.operations, step.scratch, strict=True)]
        for start, count in scratch:
            assert (owner[start : start + count] != -2).all()
            owner[start : start + count] = -2
        for op in step.operations:  # a step's results are written while its operands are read
            assert not set(range(*limbs(op.out).indices(len(owner)))) & {x for s, c in scratch for x in range(s, s + c)}
            owner[limbs(op.out)] = op.out.number
        for op in step.operations:
            for x in op.operands:
                assert (owner[limbs(x)] == x.number).all()
        assert sum(c for _, c in scratch) * n <= max(MOST_SCRATCH * 2, max((c for _, c in scratch), default=0) * n)
        owner[owner == -2] = -1
    for x in schedule.outs:
        assert (owner[limbs(x)] == x.number).all()


def test_twelve_heads_take_less_memory_than_their_ciphertexts():
    schedule = schedule_of(large())
    n = schedule.chain.degree
    given = sum(x.size * x.limbs * n for x in schedule.inputs)
    assert 8 * schedule.words < 10**9 < 2 * 10**9 < 8 * given
    assert len(schedule.phases) == 6
    assert len(schedule_of(large(1)).phases) == 2
    # every operand lives at the end of the step that it is read in, so this much is needed whatever lies where
    needed = max(
        sum({x.number: x.size * x.limbs * n for op in s.operations for x in (*op.operands, op.out)}.values())
        for s in schedule.steps
    )
    assert needed <= schedule.words <= 1.2 * needed + MOST_SCRATCH


def test_all_blocks_are_done_together():
    one, twelve = schedule_of(large(1)), schedule_of(large())
    assert max(len(s.operations) for s in twelve.steps) >= 12
    assert len(twelve.steps) <= len(one.steps) + 12  # what is taken in by parts
    for schedule in (one, twelve):
        done = {x.number for x in schedule.inputs}
        for step in schedule.steps:
            assert len({(op.name, op.out.limbs) for op in step.operations}) <= 1
            assert all(x.number in done for op in step.operations for x in op.operands)
            done |= {op.out.number for op in step.operations}


def test_a_trace_has_the_operations_of_the_plan():
    plan = exchange("the server divides").plan
    trace, outs = trace_of(plan)
    names = [op.name for op in trace.operations]
    counts = {n: sum(c for (name, _), c in plan.counts.items() if name == n) for n, _ in plan.counts}
    assert names.count("galois") + names.count("relinearize") == counts["switch_key"] * len(plan.layout.blocks())
    assert names.count("rescale") == counts["rescale"]
    assert [x.limbs for x in outs] == [plan.ring.levels + 1 - sum(plan.levels.values())] * plan.outs


@dataclass(frozen=True)
class Squares(Every):
    """The sum of a ciphertext's products with itself."""

    count: int = 300

    def part_limbs(self):
        return [2]

    def compute(self, m, shared, parts):
        return [m.products(parts * self.count, parts * self.count)]


def test_long_sums_of_products_do_not_pass_128_bits():
    program = Squares(Ring(8192, 60, 30, 60, 1), rotations=())
    schedule = schedule_of(program)
    q = schedule.chain.q[:2, None]
    largest = np.broadcast_to(q - np.uint64(1), (2, 2, 8192))  # -1 at every point
    (found,) = execute(schedule, {}, [largest])
    assert [len(np.unique(x)) for x in found.reshape(6, -1)] == [1] * 6
    assert found[:, :, 0].tolist() == [[n % int(p) for p in q[:, 0]] for n in (300, 600, 300)]
    assert sorted(len(op.operands) // 2 for s in schedule.steps for op in s.operations if op.name == "dot") == [
        44,
        128,
        128,
    ]


def test_constants_are_rounded_as_seal_does():
    trace = Trace(chain_of(SMALL))
    a = trace.input(2, 4.0)
    for c, rounded in ((0.125, 1), (-0.125, -1), (0.12, 0), (3.0, 12), (-3.1, -12)):
        trace.add_constant(a, c)
        assert trace.operations[-1].what == tuple(rounded % q for q in chain_of(SMALL).primes[:2])


def test_what_does_not_fit_is_refused():
    trace = Trace(chain_of(SMALL))
    with pytest.raises(UnsupportedProblem, match=r"a sum of scales 1.07374e\+09 and 2.14748e\+09"):
        trace.add(trace.input(2, 2.0**30), trace.input(2, 2.0**31))
    with pytest.raises(UnsupportedProblem, match=r"a scale of 1.84467e\+19 leaves no room for numbers in 1 primes"):
        trace.square(trace.input(1, 2.0**32))
    with pytest.raises(UnsupportedProblem, match="no level is left"):
        trace.like(trace.input(1, 2.0**30), trace.input(1, 2.0**30))


def test_a_rotation_by_nothing_is_nothing():
    trace = Trace(chain_of(SMALL))
    a = trace.input(2, 2.0**30)
    assert trace.rotate(a, SMALL.slots) is a
    assert trace.rotate(a, -1) is not a
    assert trace.operations[-1].what == pow(3, SMALL.slots - 1, 2 * SMALL.degree)


def test_plans_of_all_modes_are_scheduled():
    for more in ({"mode": "throughput"}, {"upload": "compact"}, {"p": 8}, {"p": 6, "normalize": "client"}):
        x = problem(4, 8, 4, p=more.pop("p", 2), epsilon=20.0)
        schedule = schedule_of(planned(x, tolerance=0.1, **more))
        assert schedule.words
        assert schedule.steps[0].name == "load"
