"""An operator defined here, outside the package: everything that refattn does, it does for it."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import refattn
from refattn import VARIANTS, Capabilities, InvalidInput, InvalidProblem, Problem, check_kernel, evaluate, strategies
from refattn.arrays import to_float64
from refattn.check.bugs.planted import plain, planted
from refattn.cli.main import main
from refattn.exact.agree import under
from refattn.golden.make import make, verify
from refattn.variants import Lowered, Option
from refattn.variants.option import above_zero, finite

from ..conftest import SMALL

TEXT = """
import numpy as np

import refattn
from refattn.variants.option import Option, above_zero


def cauchy(q, k, v, o):
    s = q @ k.T * o.scale / o.width
    w = (1 / (1 + s * s)).where(o.allowed)
    return (w @ v) / w.sum(), None


def by_rows(q, k, v, o):
    w = (q @ k.T * o.scale / o.width).power(2)
    w = (o.one / (w + o.one)).where(o.allowed)
    return (w / w.sum()) @ v, None


CAUCHY = refattn.Variant(
    name="cauchy",
    define=cauchy,
    formula="out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = 1 / (1 + (scale·q_i·k_j / width)^2)",
    unit="u · sum_j p_ij |v_jc|",
    source="made up for a test",
    uses=frozenset({"causal", "allowed"}),
    options={"width": Option(1.0, "of the bell", above_zero, (1.0, 0.5))},
    forms={"by_rows": by_rows},
    cases={"narrow": {"n_q": 37, "n_k": 37, "options": {"width": 0.5}}},
)


def kernel(problem):
    p = problem.to("numpy")
    group = p.heads // p.heads_kv
    k, v = p.key.repeat(group, 1).astype("f4"), p.value.repeat(group, 1).astype("f4")
    scale, width = p.scale or p.d_k**-0.5, p.options.get("width", 1.0)
    s = p.query.astype("f4") @ k.swapaxes(2, 3) * np.float32(scale) / np.float32(width)
    w = 1 / (1 + s * s)
    return (w / w.sum(-1, keepdims=True) @ v).astype(p.query.dtype)
"""


def namespace():
    room = {}
    exec(TEXT.split("def kernel")[0], room)
    return room


CAUCHY = namespace()["CAUCHY"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    refattn.register(CAUCHY)
    yield
    VARIANTS.pop("cauchy", None)


@pytest.fixture(autouse=True)
def as_it_was():
    """Registering takes two seconds, so only a test that replaces it has it done again."""
    yield
    if VARIANTS.get("cauchy") is not CAUCHY:
        refattn.register(CAUCHY)


def test_it_has_exact_answers_and_gradients(make):
    p = make(5, 7, variant="cauchy", causal="bottom_right", options={"width": 0.25})
    s = to_float64(p.query) @ to_float64(p.key).swapaxes(2, 3) / np.sqrt(8) / 0.25
    w = np.where(np.tril(np.ones((5, 7), bool), 2), 1 / (1 + s * s), 0)
    plain_answer = w @ to_float64(p.value) / w.sum(-1, keepdims=True)
    answer = evaluate(p)
    # float64's own rounding of some twenty operations on numbers of this size
    assert (np.abs(answer.out - plain_answer) <= 2.0**-46 * np.abs(p.value).max()).all()
    assert (answer.enclosures["out"].radius < 2.0**-60).all()
    assert evaluate(p, rounding="bfloat16").undecided == {"out": 0}
    dout = np.random.default_rng(0).standard_normal(p.out_shape)
    graded, step = evaluate(p, gradients=dout), 2.0**-20
    for name in ("query", "key", "value"):
        x = getattr(p, name).astype(np.float64)
        wide = p.replace(**{n: getattr(p, n).astype(np.float64) for n in ("query", "key", "value")})
        up, down = (evaluate(wide.replace(**{name: x + by * step * np.sign(x)})).out for by in (1, -1))
        change = ((up - down) * dout).sum() / (2 * step)
        said = (graded.values["d" + name[0]] * np.sign(x)).sum()
        assert abs(change - said) <= 2.0**-16 * max(1.0, abs(said))  # the square of the step, and float64's rounding


def test_its_kernels_are_judged():
    able = Capabilities({"float32"}, features={"causal_bottom_right", "allowed", "scale", "lengths_differ"})
    report = check_kernel(plain, "cauchy", capabilities=able, only=SMALL)
    assert report.passed, [report.describe(c) for c in report.failures]
    assert report.count("passed") > 40
    for bug in ("last_key_dropped", "causal_ignored", "wrong_scale", "zeroed_head"):
        assert not check_kernel(planted(bug), "cauchy", capabilities=able, only="gaussian/*").passed, bug


def test_gradients_of_its_kernels_are_judged():
    def kernel(p):
        return plain(p)

    def gradients(p, dout):
        answer = evaluate(p, gradients=dout, rounding="float32")
        return {n: answer.values[n] for n in ("dq", "dk", "dv")}

    able = Capabilities({"float32"}, features={"scale", "lengths_differ"}, gradients={"dq", "dk", "dv"})
    kernel.gradients = gradients
    assert check_kernel(kernel, "cauchy", capabilities=able, only="gaussian/*/gradients*").passed
    kernel.gradients = lambda p, dout: {n: x * x.dtype.type(1.5) for n, x in gradients(p, dout).items()}
    assert not check_kernel(kernel, "cauchy", capabilities=able, only="gaussian/*/gradients*").passed


@given(st.deferred(lambda: strategies.problems("cauchy", max_rows=8, max_keys=8, max_dim=8)))
@settings(max_examples=20)
def test_it_has_strategies(problem):
    assert problem.variant == "cauchy"
    assert set(problem.options) <= {"width"}
    assert np.isfinite(evaluate(problem, rounding="float32").out).all() or problem.n_k == 0


def test_it_has_golden_files(tmp_path):
    names = make(tmp_path / "golden", "cauchy", ["float32"], "gaussian/narrow*", gradients=True)
    assert names[-1] == "manifest.json"
    stored = json.loads((tmp_path / "golden" / names[0]).read_text())
    assert stored["variant"] == "cauchy"
    assert "dout" in stored["inputs"]
    assert all(c.verdict == "passed" for c in verify(tmp_path / "golden"))


def test_the_command_line_takes_it_from_a_file(tmp_path):
    """In a fresh process, which knows nothing of it."""
    (tmp_path / "mine.py").write_text(TEXT)
    run = [sys.executable, "-m", "refattn"]

    def ask(*arguments):
        return subprocess.run([*run, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    shown = ask("show", "mine.py:CAUCHY")
    assert shown.returncode == 0, shown.stderr
    assert "cauchy attention" in shown.stdout
    assert "option width (default 1.0): of the bell" in shown.stdout
    judged = ask("check", "mine.py:kernel", "--variant", "mine.py:CAUCHY", "--only", "gaussian/narrow[float32]")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    missing = ask("show", "mine.py:NOBODY")
    assert missing.returncode == 2
    assert "variant: mine.py has no Variant 'NOBODY'" in missing.stderr
    absent = ask("show", "nobody.py:X")
    assert "variant: there is no Python file nobody.py; name yours as path/file.py:NAME" in absent.stderr


def test_another_process_knows_it(tmp_path):
    """Repeat lines, golden files, time limits and worker processes, each in a process that is told of its file."""
    (tmp_path / "mine.py").write_text(TEXT + "\n\nCAUCHY = refattn.register(CAUCHY)\n")
    (tmp_path / "wrong.py").write_text("from mine import kernel as right\n\n\ndef kernel(p):\n    return -right(p)\n")

    def ask(*arguments):
        run = [sys.executable, "-m", "refattn", *arguments]
        return subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)

    own = ("--variant", "mine.py:CAUCHY")
    judged = ask("check", "mine.py:kernel", *own, "--only", "gaussian/narrow[float32]", "--time-limit", "60")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    wrong = ask("check", "wrong.py:kernel", *own, "--only", "gaussian/narrow[float32]")
    assert wrong.returncode == 1, wrong.stderr
    assert "repeat it: refattn check wrong.py:kernel --variant mine.py:CAUCHY --only" in wrong.stdout
    assert "refattn.register('mine.py:CAUCHY')" in wrong.stdout
    made = ask("golden", "make", "golden", *own, "--dtypes", "float32", "--only", "gaussian/narrow*")
    assert made.returncode == 0, made.stderr
    assert "Warning" not in made.stderr
    verified = ask("golden", "verify", "golden", *own)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    unknown = ask("golden", "verify", "golden")
    assert "got 'cauchy', expected one of softmax" in unknown.stdout + unknown.stderr
    assert "name it as --variant path/file.py:NAME" in unknown.stdout + unknown.stderr


def test_its_parts_may_run_in_other_processes(make):
    p = make(5, 7, variant="cauchy", causal="bottom_right", options={"width": 0.25})
    assert evaluate(p, rounding="float32", n_jobs=2).out.tobytes() == evaluate(p, rounding="float32").out.tobytes()


def test_a_checkpoint_is_of_one_definition(make, tmp_path):
    p = make(5, 7, variant="cauchy", options={"width": 0.25})
    before = evaluate(p, rounding="float32", checkpoint=tmp_path).out
    twice = replace(CAUCHY, define=lambda q, k, v, o: (cauchy(q, k, v, o)[0] * 2.0, None), forms={})
    refattn.register(twice)
    assert (evaluate(p, rounding="float32", checkpoint=tmp_path).out == 2 * before).all()
    refattn.register(CAUCHY)
    files = sorted(tmp_path.iterdir())
    assert (evaluate(p, rounding="float32", checkpoint=tmp_path).out == before).all()
    assert sorted(tmp_path.iterdir()) == files  # what was there answers


def test_a_replaced_operator_is_judged_anew():
    def half(p):
        return plain(p) / np.float32(2)

    able = Capabilities({"float32"}, features={"lengths_differ"})
    assert check_kernel(plain, "cauchy", capabilities=able, only="gaussian/plain").passed
    refattn.register(replace(CAUCHY, define=lambda q, k, v, o: (cauchy(q, k, v, o)[0] * 2.0, None), forms={}))
    kept = evaluate(Problem(*(np.ones((1, 1, 2, 2), np.float32),) * 3, variant="cauchy")).out
    assert (kept == 2).all()
    assert not check_kernel(
        lambda p: plain(p) / np.float32(2), "cauchy", capabilities=able, only="gaussian/plain"
    ).passed


def variant(**changes):
    parts = {n: getattr(CAUCHY, n) for n in ("define", "formula", "unit", "source", "uses", "options", "cases")}
    return refattn.Variant(**({"name": "other"} | parts | changes))


def no_such_operation(q, k, v, o):
    return (q @ k.T).sin() @ v, None


def differs(q, k, v, o):
    return v.where(v.positive()) if False else (q @ k.T * o.scale).where(o.allowed) @ v, None


def reads_what_is_not_there(q, k, v, o):
    return (q @ k.T * o.temperature).where(o.allowed) @ v, None


def centred_on_all(q, k, v, o):
    return ((q.T - q.T.sum() / 7.0).T @ k.T * o.scale).where(o.allowed) @ v, None


def says_lse(q, k, v, o):
    w = (q @ k.T * o.scale).exp(o.allowed)
    return (w @ v) / w.sum(), w.sum().log()


def same_but_for_width(q, k, v, o):
    s = q @ k.T * o.scale
    w = (1 / (1 + s * s)).where(o.allowed)
    return (w @ v) / w.sum(), None


def same_but_for_masks(q, k, v, o):
    s = q @ k.T * o.scale / o.width
    w = 1 / (1 + s * s)
    return (w @ v) / w.sum(), None


def negative_power(q, k, v, o):
    return (q @ k.T * o.scale).power(-1).where(o.allowed) @ v, None


def to_itself(problem, o):
    return problem


def without_scale(q, k, v, o):
    w = (q @ k.T / o.width).power(2, where=o.allowed)
    return (w @ v) / (w.sum() + 1.0), None


def by_distance(q, k, v, o):
    return ((q @ k.T * o.scale / o.width) * (o.distance * -0.1).exp(o.allowed)) @ v, None


def scores_for_out(q, k, v, o):
    return (q @ k.T * o.scale / o.width).where(o.allowed), None


def not_a_number(q, k, v, o):
    return (q @ k.T * o.scale / o.width).log().where(o.allowed) @ v, None


def other_over_levels(q, k, v, o):
    out, _ = cauchy(q, k, v, o)
    return out * (2.0 if hasattr(q, "h") else 1.0), None


def if_matrix(q, k, v, o):
    return cauchy(q, k, v, o) if q @ k.T else (v, None)


def ends(q, k, v, o):
    raise SystemExit(0)


def wrong_from_eight_keys(q, k, v, o):
    out, _ = cauchy(q, k, v, o)
    return out * (1.0 if k.shape[0] < 8 else 1.5), None


cauchy = CAUCHY.define
WIDTH = {"width": 0.5}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"formula": " "}, "other: has no formula; say it in a line"),
        ({"source": ""}, "other: has no source"),
        ({"name": "softmax"}, "variant: 'softmax' is known already; choose another name"),
        ({"name": "two words"}, "variant: got name 'two words', expected an identifier"),
        ({"cases": {}}, "other: option 'width' is 1.0 in every case; add one to cases= that sets it"),
        ({"cases": {"x": {"options": {"hight": 2.0}}}}, "other: case 'x' sets an option 'hight' that it does not have"),
        (
            {"uses": frozenset({"masks"})},
            "other: uses has 'masks', expected some of alibi_slopes, alignment, allowed, alpha, beta",
        ),
        ({"laws": ("associativity",)}, "other: laws has 'associativity', expected some of"),
        ({"bugs": ("a_typo",)}, "other: bugs has 'a_typo'"),
        ({"families": ("huge",)}, "other: families has 'huge'"),
        ({"define": no_such_operation}, "other: its definition uses what balls do not have: .*sin.*; definitions are"),
        ({"define": reads_what_is_not_there}, "definition: options have no 'temperature'; they have .*allowed"),
        ({"formula": None}, "variant: got formula None, expected a text"),
        ({"uses": ("causal",)}, r"variant: got uses \('causal',\), expected a set of names"),
        ({"define": 3}, "variant: got define 3, expected a function of q, k, v, o or a shape"),
        ({"options": {"width": 1.0}}, "other: option 'width' is 1.0, expected an Option"),
        ({"cases": {"narrow": "0.5"}}, "other: case 'narrow' is '0.5', expected a dict"),
        (
            {"define": centred_on_all},
            "other: some rows or heads alone give something else; .*together=True in Rows where it mixes",
        ),
        ({"define": says_lse}, "other: has_lse is False, its definition returns an lse"),
        ({"has_lse": True}, "other: has_lse is True, its definition returns no lse"),
        ({"forms": {"flat": same_but_for_width}}, "other: form 'flat' differs in out"),
        ({"forms": {"flat": same_but_for_masks}}, "other: form 'flat' differs in out"),
        ({"define": negative_power}, "power: got -1, expected an integer of at least 0"),
        ({"define": Lowered(to_itself)}, "lower: must return another operator's call, got other again"),
        ({"forms": {"flat": differs}}, r"other: form 'flat' differs in out at \(0, 0, 0, 0\) .*both must be the same"),
        (
            {"uses": frozenset({"causal", "allowed", "softcap"})},
            "other: uses has 'softcap', and no call changes by it: the definition does not read it",
        ),
        (
            {
                "options": {**CAUCHY.options, "more": Option(0.0, "m", finite, (1.0,))},
                "cases": {"x": {"options": {**WIDTH, "more": 1.0}}},
            },
            "other: option 'more' changes no call: the definition does not read it",
        ),
        (
            {"options": {"width": Option(1.0, "of the bell", above_zero, (-1.0,))}},
            "other: option 'width' is -1.0 among its samples, expected a finite number above 0",
        ),
        (
            {"cases": {"x": {"options": {"width": -0.5}}}},
            "other: option 'width' is -0.5 in case 'x', expected a finite number above 0",
        ),
        (
            {"cases": {"plain": {"options": WIDTH}}},
            "other: case 'plain' has the name of a case of every operator; choose another",
        ),
        (
            {"cases": {"a/b": {"options": WIDTH}}},
            "other: got case 'a/b', expected a label of small letters, digits, - and _",
        ),
        (
            {"cases": {"x": {"options": WIDTH, "nq": 3}}},
            "other: case 'x' sets 'nq', expected some of alibi_slopes, alignment, allowed, alpha, b, ",
        ),
        (
            {"cases": {"x": {"options": WIDTH, "softcap": 3.0}}},
            "other: case 'x' sets 'softcap', which is not in uses",
        ),
        (
            {"cases": {"x": {"options": WIDTH, "n_q": -5}}},
            "other: checking its .* raised ValueError: negative dimensions",
        ),
        (
            {"define": without_scale},
            "other: its definition does not read o.scale, which every call may set",
        ),
        (
            {"define": by_distance},
            "other: some rows or heads alone give something else; set places=True where",
        ),
        (
            {"define": scores_for_out},
            r"other: its definition returns out of shape \(5, 7\), expected \(5, 3\)",
        ),
        (
            {"define": not_a_number},
            "other: its definition gives nan in out at .* of a call of numbers",
        ),
        (
            {"define": other_over_levels},
            "other: its definition over certified floats gives something else than over balls",
        ),
        (
            {"define": if_matrix},
            "other: .*a matrix is neither true nor false; choose elements with where",
        ),
        (
            {"define": ends},
            "other: its definition over balls raised SystemExit: 0",
        ),
        (
            {"forms": {"flat": wrong_from_eight_keys}},
            "other: form 'flat' differs in out",
        ),
        (
            {"wrong": {"late": "a text"}},
            "variant: got 'a text' as wrong 'late', expected a pair",
        ),
        (
            {"tries": 3},
            "variant: got tries 3, expected a function of n_q and n_k, or None",
        ),
        (
            {"forms": {"flat": 3}},
            "variant: got form 'flat' 3, expected a function of q, k, v, o or a shape",
        ),
        (
            {"positive": True, "define": lambda q, k, v, o: ((q @ k.T * o.scale / o.width).where(o.allowed) @ v, None)},
            "other: positive is True, and a key in sight weighs 0 or less in a call",
        ),
        (
            {"default_scale": "sqrt"},
            "other: default_scale is 'sqrt', expected one of rsqrt, one",
        ),
        (
            {"fused": "softmax"},
            "other: fused is 'softmax'; only refattn's own operators have a fast implementation",
        ),
        (
            {"quick": frozenset({"gaussian/nothing"})},
            "other: quick has 'gaussian/nothing', which is none of its cases",
        ),
        (
            {"always": frozenset({"casual"})},
            "other: always has 'casual', expected some of alibi_slopes, alignment, allowed, alpha, appending",
        ),
        (
            {"contract": "a row"},
            "variant: got contract 'a row', expected a tuple of texts",
        ),
        (
            {"laws": ("bias_shifted",)},
            "other: laws has 'bias_shifted', which is about an operator with bias",
        ),
        (
            {"laws": ("full_budget_is_dense",)},
            "other: laws has 'full_budget_is_dense', which is about one defined by Selected",
        ),
        (
            {"laws": ("split_and_merge",)},
            "other: laws has 'split_and_merge', which its exact answers break",
        ),
        (
            {"fits": lambda: None},
            "other: checking its options raised TypeError",
        ),
        (
            {"options": {"width": Option(1.0, "of the bell", None)}},
            "other: the check of option 'width' raised TypeError",
        ),
        (
            {"fits": lambda p: "nothing fits"},
            "other: takes no call of 5 queries and keys: nothing fits",
        ),
    ],
)
def test_what_is_missing_is_named(changes, text):
    with pytest.raises((InvalidInput, InvalidProblem), match=text):
        refattn.register(variant(**changes))
    assert "other" not in VARIANTS


def test_a_file_without_a_name_is_no_operator():
    with pytest.raises(InvalidInput, match=r"variant: got 'mine.py', expected one of .* --variant path/file.py:NAME"):
        refattn.register("mine.py")


def test_the_cli_says_what_a_file_lacks(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    done = CliRunner().invoke(main, ["show", f"{tmp_path / 'broken.py'}:X"])
    assert done.exit_code == 2
    assert "raised ModuleNotFoundError" in done.stderr
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    done = CliRunner().invoke(main, ["show", f"{tmp_path / 'leaves.py'}:X"])
    assert done.exit_code == 2
    assert "raised SystemExit" in done.stderr


def test_three_lines_are_enough():
    def mean(q, k, v, o):
        w = (q @ k.T * o.scale).power(2, where=o.allowed)
        return (w @ v) / (w.sum() + 1.0), None

    with under(refattn.Variant("mean", mean, "a formula", "u", "here", frozenset({"causal"}))):
        assert check_kernel(plain, "mean", only="gaussian/plain[float32]").passed
