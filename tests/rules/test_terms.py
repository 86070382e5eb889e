"""Terms of scores: by loops over every pair, by their text and FlexAttention, and their tables' gradients."""

import math
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, check_problem, evaluate, load_problem, rules, save_problem
from refattn.check.model import flash
from refattn.rules import terms
from refattn.scores import score_mod

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
RNG = np.random.default_rng(0)
SLOPES, FAR, T5 = np.array([0.5, 0.3]), RNG.standard_normal((2, 7)), RNG.standard_normal((2, 8))
KEYS, ROWS, WHOLE = RNG.standard_normal(9), RNG.standard_normal((2, 5)), RNG.standard_normal((2, 1, 5, 9))
IDS_Q, IDS_K = [0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 1, 2, 2]
DOCUMENT = rules.document(IDS_Q, IDS_K)
N_Q, N_K = 5, 9


def old_bucket(behind, buckets, most, both):
    """T5's released function, by logarithms, in float64."""
    n = buckets // 2 if both else buckets
    start = n if both and behind < 0 else 0
    size = abs(behind) if both else max(behind, 0)
    exact = n // 2
    if size < exact:
        return start + size
    step = math.log(size / exact) / math.log(most / exact) * (n - exact)
    return start + min(exact + int(step + 1e-9), n - 1)


TERMS = {
    "behind": (terms.behind(), lambda b, h, i, j: i + 4 - j),
    "distance": (terms.distance("top_left"), lambda b, h, i, j: abs(i - j)),
    "alibi": (terms.alibi(SLOPES), lambda b, h, i, j: -SLOPES[h] * abs(i + 4 - j)),
    "relative": (terms.relative(FAR), lambda b, h, i, j: FAR[h, min(max(i + 4 - j, -3), 3) + 3]),
    "t5": (terms.t5(T5, 6), lambda b, h, i, j: T5[h, old_bucket(i + 4 - j, 8, 6, True)]),
    "t5 behind": (terms.t5(T5[0], 7, both=False), lambda b, h, i, j: T5[0, old_bucket(i + 4 - j, 8, 7, False)]),
    "by_key": (terms.by_key(KEYS), lambda b, h, i, j: KEYS[j]),
    "by_query": (terms.by_query(ROWS), lambda b, h, i, j: ROWS[h, i]),
    "dense": (terms.dense(WHOLE), lambda b, h, i, j: WHOLE[b, 0, i, j]),
    "document": (-2.0 * terms.when(~DOCUMENT), lambda b, h, i, j: -2.0 * (IDS_Q[i] != IDS_K[j])),
    "product": (terms.by_key(KEYS) * terms.by_head(SLOPES) * 3, lambda b, h, i, j: KEYS[j] * SLOPES[h] * 3),
    "sum": (1 - terms.by_key(KEYS) - 0.5, lambda b, h, i, j: 1 + -KEYS[j] + -0.5),
    "grouped": (
        (terms.by_key(KEYS) + 1) * -(terms.by_query(ROWS) + terms.distance()),
        lambda b, h, i, j: (KEYS[j] + 1) * -(ROWS[h, i] + abs(i + 4 - j)),
    ),
}


def small(term, seed=1, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, 2, n, 8)).astype(np.float32) for n in (N_Q, N_K, N_K))
    return Problem(q, k, v, bias=term, **more)


@pytest.mark.parametrize("name", TERMS)
def test_every_number_is_the_formulas(name):
    term, formula = TERMS[name]
    got = np.broadcast_to(term.written(2, 2, N_Q, N_K, "float64"), (2, 2, N_Q, N_K))
    want = np.array([float(formula(*at)) for at in np.ndindex(2, 2, N_Q, N_K)]).reshape(got.shape)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        np.broadcast_to(term.written(2, 2, N_Q, N_K), want.shape), want.astype(np.float32), strict=True
    )
    np.testing.assert_array_equal(term.dense(N_Q, N_K, 1, 1), want[1, 1])
    assert repr(pickle.loads(pickle.dumps(term))) == repr(term)


@pytest.mark.parametrize("name", TERMS)
def test_score_mods_are_the_terms(name):
    term, _ = TERMS[name]
    text, tables = rules.score_mod_text(term, N_Q, N_K)
    space = {n: torch.as_tensor(x) for n, x in tables.items()}
    exec(text, space)
    at = [torch.as_tensor(x) for x in np.indices((2, 2, N_Q, N_K))]
    zero = torch.zeros(2, 2, N_Q, N_K, dtype=torch.float64)
    want = np.broadcast_to(term.written(2, 2, N_Q, N_K, "float64"), zero.shape)
    np.testing.assert_array_equal(space["score_mod"](zero, *at).numpy(), want, text)
    np.testing.assert_array_equal(rules.score_mod(term, N_Q, N_K, kind="float64")(zero, *at).numpy(), want)
    narrow = rules.score_mod(term, N_Q, N_K)(zero.float(), *at).numpy()
    assert np.abs(narrow - want).max() <= 8 * 2.0**-24 * 16  # at most 8 roundings of numbers below 16


@pytest.mark.parametrize("n", [16, 32, 6])
@pytest.mark.parametrize("most", [20, 128, 100])
def test_buckets_are_exact(n, most):
    """In rationals: the bucket's power brackets the distance's."""
    for both in (True, False):
        half = n // 2 if both else n
        exact = half // 2
        got = terms.bucket(np.arange(-300, 301), n, most, both)
        for d, b in zip(range(-300, 301), got.tolist(), strict=True):
            size = abs(d) if both else max(d, 0)
            t = b - (half if both and d < 0 else 0) - exact
            if size < exact:
                assert t == size - exact
                continue
            power, step = Fraction(size, exact) ** (half - exact), Fraction(most, exact)
            assert step**t <= power
            assert power < step ** (t + 1) or t == half - exact - 1


def test_t5s_own_code_in_float32_agrees():
    """Hugging Face's lines, float32: where a distance stands on a step, rounding decides, and here it goes right."""
    behind = torch.arange(-1000, 1001)
    n = behind.abs()
    val = 8 + (torch.log(n.float() / 8) / math.log(128 / 8) * 8).to(torch.long)
    want = torch.where(n < 8, n, val.clamp(max=15)) + (behind < 0) * 16
    np.testing.assert_array_equal(terms.bucket(behind.numpy(), 32), want.numpy())


def test_they_print_and_draw_themselves():
    term = terms.alibi([0.5, 0.25]) + 0.5 * terms.relative([1, 2, 3]) - terms.when(rules.causal())
    assert repr(term) == ("-(by_head([0.5, 0.25]) * distance()) + 0.5 * relative([1.0, 2.0, 3.0]) - when(causal())")
    assert repr((terms.distance() + 1) * 2.0) == "(distance() + 1.0) * 2.0"
    assert repr(terms.by_key(np.zeros(9))) == "by_key(<numbers 9>)"
    assert terms.alibi([1.0]).draw(3, 3) == "940\n494\n049"
    assert terms.distance().draw(2, 3) == "404\n940"
    assert terms.number(2).draw(2, 2) == "00\n00"
    assert terms.distance().draw(0, 3) == ""
    text, tables = rules.score_mod_text(terms.alibi([0.5]), 4, 4)
    want = "score + (-1.0 * (heads[0, 0] * (q_idx - kv_idx).abs()))"
    assert text == f"def score_mod(score, b, h, q_idx, kv_idx):\n    return {want}\n"
    assert {n: x.tolist() for n, x in tables.items()} == {"heads": [[0.5]]}


@pytest.mark.parametrize("name", ["t5", "grouped"])
def test_a_problem_takes_one(name, tmp_path):
    term, _ = TERMS[name]
    p = small(term, causal="bottom_right")
    plain = p.written_out()
    assert plain.bias.dtype == np.float32
    dout = np.ones(p.out_shape, np.float32)
    one, two = (evaluate(x, rounding="float32", gradients=dout) for x in (p, plain))
    for n, x in two.values.items():
        np.testing.assert_array_equal(one.values[n], x)
    assert one.problem is p
    assert repr(term) in repr(p)
    assert p.to("torch").bias is term
    assert isinstance(p.to("torch").written_out().bias, torch.Tensor)
    save_problem(p, tmp_path / "p.npz")
    np.testing.assert_array_equal(load_problem(tmp_path / "p.npz").bias, plain.bias)
    assert p.features() == plain.features()


def kernel_of(term, p):
    """What FlexAttention computes with a term, in float32; the call that is checked tells it nothing."""
    mod = score_mod(p.replace(bias=term))

    def kernel(x):
        q, k, v = (torch.as_tensor(y) for y in (x.query, x.key, x.value))
        s = mod(q @ k.mT * 8**-0.5, *(torch.as_tensor(y) for y in np.indices((2, 2, N_Q, N_K))))
        return s.softmax(-1) @ v

    return kernel


WRONG = {
    "alibi": [terms.alibi(-SLOPES), terms.alibi(SLOPES, "top_left"), -terms.by_head(SLOPES) * terms.behind()],
    "relative": [terms.relative(FAR[:, ::-1].copy()), terms.relative(FAR, "top_left"), terms.relative(FAR[0])],
    "t5": [terms.t5(T5, 40), terms.t5(T5, 6, both=False), terms.t5(np.roll(T5, 4, 1), 6)],
    "document": [-2.0 * terms.when(DOCUMENT), 2.0 * terms.when(~DOCUMENT)],
    "grouped": [(terms.by_key(KEYS) + 1) * -(terms.by_query(ROWS[::-1]) + terms.distance())],
}
"""By term, what implementers write in its place."""


@pytest.mark.parametrize("name", WRONG)
def test_kernels_are_judged_with_it(name):
    term, _ = TERMS[name]
    p = small(term)
    report = check_problem(kernel_of(term, p), p, name, model=flash)
    assert report.right, [c.message for c in report.checks]
    for wrong in WRONG[name]:
        assert not check_problem(kernel_of(wrong, p), p, name, model=flash).right, wrong


def test_flexattention_takes_it():
    p = small(TERMS["grouped"][0], softcap=2.0)
    q, k, v = (torch.as_tensor(x) for x in (p.query, p.key, p.value))
    report = check_problem(lambda x: flex.flex_attention(q, k, v, score_mod(p)), p, "flex", model=flash)
    assert report.right, [c.message for c in report.checks]


@pytest.mark.parametrize("name", ["alibi", "relative", "t5", "by_query", "dense", "product", "grouped"])
def test_gradients_of_tables_are_autograds(name):
    term, _ = TERMS[name]
    tables = {n: torch.tensor(x, requires_grad=True) for n, x in term.tables().items()}
    mod = rules.score_mod(term, N_Q, N_K, tables=tables, kind="float64")
    at = [torch.as_tensor(x) for x in np.indices((term.batches, term.heads, N_Q, N_K))]
    dbias = np.random.default_rng(3).standard_normal((term.batches, term.heads, N_Q, N_K))
    found = mod(torch.zeros(dbias.shape, dtype=torch.float64), *at)
    want = torch.autograd.grad((found * torch.as_tensor(dbias)).sum(), list(tables.values()))
    got, sizes = (term.gradients(dbias, N_Q, N_K, of=x) for x in ("summands", "sizes"))
    assert list(got) == list(tables)
    for (n, x), y in zip(got.items(), want, strict=True):
        assert (np.abs(x - y.numpy()) <= 2 * 100 * 2.0**-53 * sizes[n]).all()  # at most 90 summands, two ways


def test_summands_are_counted():
    term = terms.alibi(SLOPES) * terms.relative(FAR)
    far = np.clip(np.arange(5)[:, None] + 4 - np.arange(9), -3, 3) + 3
    many = term.gradients(np.zeros((1, 2, 5, 9)), 5, 9, of="count")
    assert {n: x.tolist() for n, x in many.items()} == {
        "heads": [[45.0, 45.0]],
        "relative": [np.bincount(far.ravel(), minlength=7).tolist()] * 2,
    }


def test_tables_of_one_name_have_numbers():
    term = terms.by_key(KEYS) + terms.by_key(KEYS) * 2
    assert list(term.tables()) == ["keys", "keys_2"]
    one = terms.by_key(KEYS)
    assert list((one * one).tables()) == ["keys"]


BAD = [
    (lambda: terms.distance("left"), "corner: got 'left'"),
    (lambda: terms.relative(np.zeros(4)), r"values: got 4 distances, expected 2m \+ 1"),
    (lambda: terms.by_head([np.nan]), "values: has NaN or inf"),
    (lambda: terms.by_head([[1], [1, 2]]), "values: got .* expected numbers, as many in each row"),
    (lambda: terms.by_head(True), "values: got bool of shape"),
    (lambda: terms.dense(np.zeros(3)), "values: got float64 of shape .3,., expected numbers on 2 to 4 axes"),
    (lambda: terms.t5(np.zeros(7)), "values: got 7 buckets, expected an even number"),
    (lambda: terms.t5(np.zeros(32), 8), "most: got 8 with 16 buckets to a side, expected at least 2 and most above 8"),
    (lambda: terms.t5(np.zeros(32), 2**21), "most: got 2097152, expected at most 1048576"),
    (lambda: terms.bucket([0.5], 32), "behind: got .*float64"),
    (lambda: terms.bucket([1], 32, both=1), "both: got 1, expected True or False"),
    (lambda: terms.when(3), "rule: got 3, expected a rule"),
    (lambda: terms.number("a"), "term: got 'a', expected a term or a finite number"),
    (lambda: terms.distance() + math.inf, "term: got inf, expected a term or a finite number"),
    (lambda: terms.by_key(np.zeros((3, 1, 9))) + terms.by_key(np.zeros((2, 1, 9))), "is made for 3 batches and"),
    (lambda: terms.by_key(KEYS).dense(5, 8), "by_key.* has numbers of 9 keys, and the call has 8"),
    (lambda: terms.dense(WHOLE).dense(4, 9), "dense.* does not fit the call's 4 queries and 9 keys"),
    (lambda: terms.distance().dense(-1, 8), "n_q: got -1, expected a whole number, at least 0"),
    (lambda: terms.distance().dense(4, None), "n_k: got None, expected a whole number, at least 0"),
    (lambda: terms.number(10**400), "term: got a int beyond float64, expected a term or a finite number"),
    (lambda: terms.by_head([10**400]), "values: got object of shape .1,., expected numbers"),
    (lambda: terms.by_head(["1"]), "values: got <U1 of shape .1,., expected numbers"),
    (lambda: terms.by_head(np.ma.array([1.0], mask=[True])), "values: got float64 of shape .1,., expected numbers"),
    (lambda: terms.by_head(torch.ones(2, requires_grad=True)), "values: got tensor.*requires_grad"),
    (lambda: sum([terms.distance()] * 101, start=terms.number(0)), "term: combines more than 100 terms in a row"),
    (lambda: terms.by_head(SLOPES).written(2, 3, 4, 4), "is made for 2 query heads, and the call has 3"),
    (lambda: terms.distance().written(1, 1, 4, 4, "float16"), "dtype: got 'float16', expected 'float32' or"),
    (lambda: (terms.distance() * 1e200).written(1, 1, 4, 4), "gives 3e.200, which float32 does not hold"),
    (lambda: (terms.distance() * 1e300 * 1e300).dense(4, 4), "gives numbers that are not finite"),
    (lambda: terms.by_key(KEYS).gradients(np.zeros((1, 1, 5, 8)), 5, 9), "dbias: got shape"),
    (lambda: terms.by_key(KEYS).gradients(np.zeros((1, 1, 5, 9)), 5, 9, of="all"), "of: got 'all', expected one of"),
    (lambda: rules.score_mod(3, 5, 9), "term: got 3, expected a term"),
    (lambda: rules.score_mod_text(3, 5, 9), "term: got 3, expected a term"),
    (lambda: rules.score_mod(terms.distance(), 5, 9, kind="float16"), "kind: got 'float16'"),
    (lambda: rules.score_mod(terms.distance(), 5, 9, tables={"a": 1}), "tables: got 'a', expected a name out of none"),
    (
        lambda: rules.score_mod(terms.by_key(KEYS), 5, 9, tables={"keys": torch.zeros(9)}),
        r"tables: keys: got \(9,\), expected shape \(1, 1, 9\)",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_what_is_no_term_is_said(make, text):
    with pytest.raises(InvalidInput, match=text):
        make()


def test_tables_may_be_of_narrow_types():
    bits = ml_dtypes.bfloat16(0.5)
    assert repr(terms.by_head(np.array([bits]))) == repr(terms.by_head(torch.tensor([0.5]))) == "by_head([0.5])"
    assert terms.t5(np.zeros(8), np.int8(9)).dense(30, 30).shape == (30, 30)


def test_a_problem_that_it_does_not_fit_is_refused():
    with pytest.raises(InvalidProblem, match=r"bias: term: by_key.* has numbers of 3 keys, and the call has 9"):
        small(terms.by_key([1, 2, 3]))
    with pytest.raises(TypeError, match="a term is neither true nor false"):
        bool(terms.distance())
    with pytest.raises(InvalidProblem, match="allowed: got Plain, expected an array of"):
        small(None, allowed=terms.distance())
