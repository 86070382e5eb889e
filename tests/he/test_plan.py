import json
import re

import numpy as np
import pytest
from rich.console import Console

from refattn import InvalidInput, UnsupportedProblem, he
from refattn.he.baselines import edge_call, random_call
from refattn.he.plan import MOST_BITS

from .make import planned, problem

GIVEN = {"denominator": (1.0, 10.0), "norms": (8.0, 8.0), "value_most": 3.0}


def test_a_plan_says_all():
    p = he.plan(16, 16, 32, **GIVEN)
    assert sum(p.ring.bits) <= MOST_BITS[p.ring.degree]
    assert p.error <= p.tolerance
    report = json.loads(json.dumps(p.report()))
    assert report["levels"] == {"products": 1, "power": 1, "values": 1, "division": 3}
    assert report["chain_bits"] == p.ring.bits
    assert report["key_switches"] == sum(c for n, c in report["operations_of_a_block"].items() if "switch" in n)
    assert 0 < report["error_noise"] < report["error_approximation"] < 1e-2
    console = Console(record=True, width=200, quiet=True, file=None)
    console.print(p.table())
    assert len(p.table().rows) == len(report) - 1


def test_more_costs_more():
    first = he.plan(16, 16, 32, **GIVEN)
    assert he.plan(16, 16, 32, p=4, **GIVEN).predicted_ms() > first.predicted_ms()
    assert he.plan(128, 128, 64, **GIVEN).predicted_ms() > 3 * first.predicted_ms()
    assert he.plan(16, 16, 32, **GIVEN, normalize="client").ring.degree == 8192
    assert first.inverse.order > he.plan(16, 16, 32, **GIVEN, tolerance=0.2).inverse.order


def test_heads_share_spare_slots():
    p = he.plan(16, 16, 32, heads=4, **GIVEN)
    assert len(p.layout.blocks()) == 1
    assert p.layout.heads_per_block == 4


def test_names_differ_where_plans_do():
    plans = [he.plan(16, 16, 32, **GIVEN), he.plan(16, 16, 32, p=4, **GIVEN), he.plan(16, 15, 32, **GIVEN)]
    plans.append(he.plan(16, 16, 32, **GIVEN | {"denominator": (1.0, 10.1)}))
    assert len({p.digest for p in plans}) == 4
    assert he.plan(16, 16, 32, **GIVEN).digest == plans[0].digest


def test_what_cannot_be_had_says_which_step_ran_out():
    with pytest.raises(UnsupportedProblem) as e:
        he.plan(16, 16, 32, p=8, **GIVEN | {"denominator": (1e-20, 1e12)}, tolerance=1e-3)
    assert "he: " in str(e.value)
    assert "a smaller p, a narrower denominator (a larger epsilon), a larger tolerance or" in str(e.value)
    with pytest.raises(UnsupportedProblem, match=r"error's bound is .* above the tolerance 1e-15"):
        he.plan(16, 16, 32, **GIVEN, normalize="client", tolerance=1e-15)
    with pytest.raises(
        UnsupportedProblem, match=r"levels are needed \(products 1, power 3, .*step 'division' runs out"
    ):
        he.plan(16, 16, 32, p=8, **GIVEN | {"denominator": (1e-19, 1e2)}, tolerance=0.5)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"n_q": 0}, "n_q: got 0, expected an integer of at least 1"),
        ({"workers": 0}, "workers: got 0, expected an integer of at least 1"),
        ({"p": 3}, "p: got 3, expected one of 2, 4, 6, 8"),
        ({"denominator": (0.0, 1.0)}, r"denominator: got \(0.0, 1.0\), expected 0 < low < high"),
        ({"epsilon": 2.0}, "with low at least epsilon = 2.0"),
        ({"epsilon": -1.0}, "epsilon: got -1.0, expected a finite number of at least 0"),
        ({"norms": (0.0, 1.0)}, "norms: got 0.0, expected a finite number above 0"),
        ({"tolerance": float("nan")}, "tolerance: got nan, expected a finite number above 0"),
        ({"mode": "fast"}, "mode: got 'fast', expected 'latency' or 'throughput'"),
        ({"normalize": "both"}, "normalize: got 'both', expected 'server' or 'client'"),
    ],
)
def test_what_has_no_meaning(changed, text):
    given = {"n_q": 4, "n_k": 4, "d_k": 4, **GIVEN} | changed
    with pytest.raises(InvalidInput, match=text):
        he.plan(**given)


@pytest.mark.parametrize(
    ("call", "planned", "names", "instead"),
    [
        (he.plan, "power-softmax", ["offset"], "call he.plan_sigmoid"),
        (he.plan_decoding, "power-softmax", ["scores", "offset"], "call he.plan_sigmoid_decoding"),
        (he.plan_sigmoid, "sigmoid", ["denominator", "epsilon"], "call he.plan"),
        (he.plan_sigmoid_decoding, "sigmoid", ["p", "denominator"], "call he.plan_decoding"),
        (he.Layer, "power-softmax", ["scores"], "there is no such layer; he.plan_sigmoid plans the attention alone"),
        (he.Encoder, "power-softmax", ["scores"], "there is no such layer; he.plan_sigmoid plans the attention alone"),
    ],
)
def test_the_other_operators_arguments_say_what_to_call(call, planned, names, instead):
    other = {"sigmoid": "power-softmax", "power-softmax": "sigmoid"}[planned]
    verb = "is" if len(names) == 1 else "are"
    text = f"he: {planned} attention is planned here, and {', '.join(names)} {verb} of {other} attention; {instead}"
    with pytest.raises(UnsupportedProblem, match=f"^{text}$"):
        call(**dict.fromkeys(names, (1.0, 2.0)), norms=(1, 1), value_most=1)


def test_a_plan_of_a_real_call():
    p = planned(problem(128, 128, 64, 64, 12, epsilon=12.8))
    # two heads' queries, their keys in four spans
    assert (len(p.layout.blocks()), p.layout.heads_per_block, p.layout.spans) == (6, 2, 4)
    assert p.loads().total() == 32 * 6 * (1 + 2 * 4)
    assert p.predicted_ms(workers=2) == pytest.approx(p.predicted_ms() / 2)


def test_a_plan_for_many_workers_cuts_queries_apart():
    x = problem(128, 128, 64, 64, epsilon=12.8)
    one, two = planned(x), planned(x, workers=2)
    assert (len(one.layout.blocks()), one.layout.spans) == (1, 2)
    assert (len(two.layout.blocks()), two.layout.spans) == (2, 1)
    assert one.predicted_ms() < two.predicted_ms()
    assert one.predicted_ms(workers=2) == one.predicted_ms()
    assert two.predicted_ms(workers=2) < 0.8 * one.predicted_ms()


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("size", [(16, 32, 1), (16, 64, 4), (32, 64, 1)], ids=str)
def test_inputs_at_the_ends_of_the_ranges_come_near_the_bounds(size, p):
    n, d, heads = size
    x, given = random_call(n, d, heads, p)
    plan = he.plan(n, n, d, None, heads, p, **given)
    worst = edge_call(x, given)
    exact, plain = he.reference(worst), he.simulate(plan, worst)
    drawn = [he.simulate(plan, worst, seed=seed) for seed in range(4)]
    error, noise = (max(float(np.abs(y - z).max()) for y in drawn) for z in (exact, plain))
    assert error <= plan.error <= 5 * error
    assert noise <= plan.noise <= 200 * noise  # a product's parts add up as if they were independent


def test_a_plan_says_in_words_what_it_costs():
    x = problem(5, 7, 6, epsilon=0.5)
    p = planned(x)
    assert re.fullmatch(
        r"0\.\d+ s on one core, [\d.]+ [kM]B up, [\d.]+ MB of keys once, 128-bit security, error at most 0\.0\d+, of "
        r"which noise \de-\d+",
        p.words(),
    )
    assert p.warnings() == []
    assert "key switches" in str(p.table())
    assert max(map(len, str(p.table()).splitlines())) <= 120


def test_a_plan_warns_of_a_long_time_and_of_many_bytes():
    large = he.plan(128, 128, 64, 64, 64, p=2, denominator=(2.0, 60.0), epsilon=1.5, norms=(9.0, 9.0), value_most=4.0)
    assert large.predicted_ms() > 30e3
    time, upload = large.warnings()
    assert re.fullmatch(r"the server will take about \d+ s a query", time)
    assert re.fullmatch(r"a query sends [\d.]+ GB", upload)


def test_the_command_measures_a_file(tmp_path):
    from click.testing import CliRunner

    from refattn.cli.main import main
    from refattn.files import save_problem
    from refattn.he.saved import plan_from_json

    x = problem(5, 7, 6, 4, heads=2, epsilon=0.5)
    save_problem(x, tmp_path / "x.npz")

    def run(*arguments):
        done = CliRunner().invoke(main, ["he", "plan", *map(str, arguments)])
        return done.exit_code, done.output

    at = tmp_path / "plan.json"
    code, text = run("--from", tmp_path / "x.npz", "--margin", 0.1, "-o", at)
    assert (code, "128-bit security, error at most" in text) == (0, True), text
    made = plan_from_json(at.read_bytes())
    assert (made.n_q, made.n_k, made.d_k, made.d_v, made.heads) == (5, 7, 6, 4, 2)
    assert made.denominator == he.ranges(x, margin=0.1)["denominator"]
    code, text = run("--from", tmp_path / "x.npz", "--value-most", 50, "--tolerance", 1, "-o", at, "--raw")
    assert (code, "key switches" in text) == (0, True), text
    assert plan_from_json(at.read_bytes()).value_most == 50
    soft = problem(5, 7, 6, 4, heads=2).replace(variant="softmax", options={})
    save_problem(soft, tmp_path / "soft.npz")
    assert run("--from", tmp_path / "soft.npz", "--p", 4, "--epsilon", 2, "-o", at)[0] == 0
    assert (plan_from_json(at.read_bytes()).p, plan_from_json(at.read_bytes()).epsilon) == (4, 2.0)
    for arguments, wanted in (
        ((5, 7, 6, 4, 3, "--from", tmp_path / "x.npz"), "has sizes (5, 7, 6, 4, 2), the command says (5, 7, 6, 4, 3)"),
        ((5, 7, 6, 4, 2), "say --denominator, --norms, --value-most, or --from a problem's file"),
        ((5, 7), "say N_Q N_K D_K D_V HEADS, --denominator"),
        ((5, 7, 6, 4, 2, "--margin", 0.1), "--margin goes with --from"),
        (("--from", tmp_path / "x.npz", "--margin", 2), "margin: got 2.0, expected from 0 to below 1"),
    ):
        code, text = run(*arguments)
        assert (code, wanted in " ".join(text.split())) == (2, True), text
