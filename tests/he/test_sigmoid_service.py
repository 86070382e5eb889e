"""Sigmoid attention from data to an answer over HTTP, by commands; and liars on both sides."""

import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem, he, save_problem
from refattn.cli.main import main
from refattn.he import wire
from refattn.he.device.schedule import schedule_of
from refattn.he.device.session import bytes_of
from refattn.he.inputs import called
from refattn.he.saved import plan_from_json

from . import forge
from .device.exchange import exchange
from .make import problem
from .make_sigmoid import call
from .test_hostile import QUERIES, REPLIES

pytest.importorskip("tenseal")
NAME = "sigmoid, several heads, causal"


def run(*arguments):
    done = CliRunner().invoke(main, ["he", *map(str, arguments)])
    assert done.exit_code != 1, done.exception  # an error of the package's own is 2
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("offset", [None, 0.75])
def test_ranges_are_those_of_the_pairs_that_are_seen(offset):
    x = call(5, 6, 4, heads=2, causal="bottom_right", options={"offset": offset}, scale=-0.4)
    q, k = x.query.copy(), x.key.copy()
    q[0, 0, :, 0], q[0, 0, 0, 0], k[0, 0, 5] = 0.0, 5.0, (10.0, 0.0, 0.0, 0.0)  # a large score that is masked
    x = x.replace(query=q, key=k)
    added = -math.log(6) if offset is None else offset
    low = high = 0.0
    for h in range(2):
        for i in range(5):
            for j in range(i + 2):  # 6 keys, of which row i sees i + 2
                s = -0.4 * sum(float(a) * float(b) for a, b in zip(x.query[0, h, i], x.key[0, h, j], strict=True))
                low, high = min(low, s), max(high, s)
    found = he.ranges(x, margin=0.25)
    # four products and sums, each of a few units of 2**-53 of numbers below 8
    assert np.abs(np.array(found["scores"]) - (added + 1.25 * low, added + 1.25 * high)).max() <= 64 * 2.0**-53
    assert (found["offset"], found["scale"], found.keys() - he.ranges(problem()).keys()) == (
        added, -0.4, {"scores", "offset"},
    )  # fmt: skip
    assert low < 0 < high
    plan = he.plan_sigmoid(5, 6, 4, heads=2, **he.ranges(x, margin=0.0))
    assert len(plan.encoded(x)[1]) == len(plan.part_limbs())  # its own call is in its ranges
    with pytest.raises(InvalidProblem, match=r"scores: head 0, row .*, outside the plan's"):
        plan.encoded(x.replace(query=-0.999 * x.query))


def test_data_that_has_no_ranges_is_refused():
    x = call()
    for other, error, text in (
        (x.replace(query=0 * x.query), InvalidInput, "x: all its products of queries and keys are 0"),
        (x.replace(key=np.inf * x.key), InvalidInput, "x: has numbers that are not finite"),
        (x.replace(bias=np.zeros((1, 2, 5, 7))), UnsupportedProblem, "planned without a bias"),
        (x.replace(variant="softmax", options={}), UnsupportedProblem, "computes variant 'power', got 'softmax'"),
    ):
        with pytest.raises(error, match=text):
            he.ranges(other)


def test_the_commands_plan_serve_and_query(tmp_path, served):
    """The file has arrays of another operator: --operator makes it a call of this one."""
    for package in ("httpx", "starlette", "uvicorn"):
        pytest.importorskip(package)
    x = call(3, 3, 4, heads=2, causal="top_left").replace(variant="softmax", options={})
    save_problem(x, tmp_path / "x.npz")
    at = tmp_path / "plan.json"
    measured = ("plan", "--operator", "sigmoid", "--from", tmp_path / "x.npz", "--tolerance", 0.3, "-o", at)
    code, text = run(*measured, "--json", "--device", "cuda")
    assert code == 0, text
    plan, told = plan_from_json(at.read_bytes()), json.loads(text)
    assert (plan.operator, told["scores"], told["polynomial_degree"]) == (
        "sigmoid", list(plan.scores), plan.polynomial.degree,
    )  # fmt: skip
    assert told["gpu"]["memory_bytes"] == he.on_gpu(plan).memory_bytes == bytes_of(schedule_of(plan))
    assert plan.scores == he.ranges(called(plan, x))["scores"]
    url = served(at, "--operator", "sigmoid")
    ask = ("query", url, tmp_path / "x.npz", "-o", tmp_path / "out.npy", "--plan", at)
    code, text = run(*ask, "--operator", "sigmoid")
    assert code == 0, text
    exact = he.reference(x.replace(variant="sigmoid", options={"offset": -math.log(3)}))
    assert np.abs(np.load(tmp_path / "out.npy") - exact).max() <= plan.error
    for arguments, wanted in (
        (ask, "computes variant 'sigmoid', got 'softmax'"),
        ((*ask, "--operator", "power"), f"--operator: {url} computes 'sigmoid', the command says 'power'"),
        (("serve", at, "--operator", "power"), "plan.json computes 'sigmoid', the command says 'power'"),
        ((*measured, "--operator", "tanh"), "--operator: got 'tanh', expected power or sigmoid"),
        ((*measured, "--p", 4), "plan: --p goes with --operator power"),
        ((*measured, "--upload", "compact"), "upload='compact' is not for sigmoid attention"),
        ((*measured, "--offset", -50), "the sigmoid is too near a constant for a polynomial"),
        (("plan", 3, 3, 4, 4, 2, "--operator", "sigmoid"), "plan: say --scores, --norms, --value-most, or --from"),
        (("plan", 3, 3, 4, 4, 2, "--scores", -6, 2), "plan: --scores goes with --operator sigmoid"),
    ):
        code, text = run(*arguments)
        assert (code, wanted in text) == (2, True), text
    code, text = run(*measured, "--decoding")
    decoding = plan_from_json(at.read_bytes())
    assert (code, decoding.operator, decoding.longest, decoding.scores) == (0, "sigmoid", 3, plan.scores), text
    code, text = run(*measured, "--mode", "throughput")
    assert (code, plan_from_json(at.read_bytes()).mode) == (0, "throughput"), text


def test_a_call_of_another_operator_takes_the_plans_options():
    plan, x = exchange(NAME).plan, exchange(NAME).x
    assert called(plan, x) is x
    made = called(plan, problem(3, 3, 4, heads=2, causal="top_left"))
    assert (made.variant, made.options) == ("sigmoid", {"offset": plan.offset})
    assert called(plan, np.ones(3)).shape == (3,)
    power = he.plan(3, 3, 4, heads=2, p=4, denominator=(1, 9), epsilon=1, norms=(9, 9), value_most=9, tolerance=9.0)
    made = called(power, x)
    assert (made.variant, made.options) == ("power", {"p": 4, "epsilon": 1.0})


def test_liars_are_refused_as_with_power_softmax():
    """Replies and queries that are changed in all the ways that power-softmax attention's are."""
    e = exchange(NAME)
    parts, fresh = forge.parts_of(e.reply, wire.REPLY, e.plan), forge.parts_of(e.query, wire.QUERY, e.plan)
    client = he.Client(e.plan)
    keys = client.evaluation_keys()
    query = client.encrypt(e.x)
    with he.Server(e.plan, keys) as server:
        reply = server.attend(query)
        for name, (change, text) in QUERIES.items():
            bad = change(forge.parts_of(query, wire.QUERY, e.plan))
            with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
                server.attend(forge.repacked(query, wire.QUERY, e.plan, bad)), name
        with pytest.raises(InvalidInput, match="another client"):
            server.attend(e.query)
    for name, (change, text) in REPLIES.items():
        with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
            client.decrypt(forge.repacked(reply, wire.REPLY, e.plan, change(parts, fresh))), name
    assert np.abs(client.decrypt(reply) - he.reference(e.x)).max() <= e.plan.error
    # a result may be as large as all keys with a whole weight, not as the largest value
    assert re.search(r"expected at most the plan's", _too_large(client, e.plan))


def _too_large(client, plan):
    from refattn.he.plausible import check_out

    check_out(plan, np.array([plan.n_k * plan.value_most]))
    with pytest.raises(InvalidInput) as refused:
        check_out(plan, np.array([plan.n_k * plan.value_most + 2 * plan.error]))
    return str(refused.value)
