"""Titans' memory against the delta rule, closed forms, autograd and loops in fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate
from refattn.functions.memory import (
    Memory,
    memory_as_context,
    memory_as_gate,
    memory_as_layer,
    memory_gradient,
    memory_loss,
    neural_memory,
    read_memory,
    start_memory,
)

exact = np.frompyfunc(lambda a: Fraction(int(a), 4), 1, 1)


def tokens(n=6, d=3, d_v=2, seed=0):
    """Return q, k, v, theta, eta, alpha and a memory, all of quarters as fractions."""
    rng = np.random.default_rng(seed)
    q, k, v = (exact(rng.integers(-6, 7, (n, w))) for w in (d, d, d_v))
    gates = dict(zip(("theta", "eta", "alpha"), exact(rng.integers(0, 4, (3, n))), strict=True))
    return q, k, v, gates, exact(rng.integers(-6, 7, (d, d_v)))


def loop(q, k, v, gates, m, size=1, stale=False):
    """The paper's formula, number by number."""
    (n, d), d_v, first = q.shape, v.shape[1], m
    s, out = [[Fraction(0)] * d_v for _ in range(d)], []
    for t in range(n):
        if t % size == 0:
            at = first if stale else m
        off = [sum(k[t][i] * at[i][c] for i in range(d)) - v[t][c] for c in range(d_v)]
        s = [
            [gates["eta"][t] * s[i][c] - gates["theta"][t] * 2 * k[t][i] * off[c] for c in range(d_v)] for i in range(d)
        ]
        m = [[(1 - gates["alpha"][t]) * m[i][c] + s[i][c] for c in range(d_v)] for i in range(d)]
        out.append([sum(q[t][i] * m[i][c] for i in range(d)) for c in range(d_v)])
    return out, m, s


@pytest.mark.parametrize(
    ("size", "at"), [(1, "current"), (1, "initial"), (4, "current"), (4, "initial"), (9, "current")]
)
def test_a_linear_memory_is_the_formula_in_fractions(size, at):
    q, k, v, gates, m = tokens()
    out, memory = neural_memory(q, k, v, start_memory(m), **gates, chunk=size, grad_at=at)
    wanted = loop(q, k, v, gates, m, size, at == "initial")
    assert out.tolist() == wanted[0]
    assert memory.weights[0].tolist() == wanted[1]
    assert memory.momentum[0].tolist() == wanted[2]


def test_one_chunk_of_all_is_the_initial_memory_and_others_are_not():
    q, k, v, gates, m = tokens()
    whole, _ = neural_memory(q, k, v, start_memory(m), **gates, chunk=6)
    stale, _ = neural_memory(q, k, v, start_memory(m), **gates, grad_at="initial")
    current, _ = neural_memory(q, k, v, start_memory(m), **gates)
    assert (whole == stale).all()
    assert (current != stale).any()


def test_without_momentum_and_forgetting_it_is_the_delta_rule():
    """theta = beta/2 undoes the 2 of the square's slope: the operator's exact answer, number by number."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-2, 3, (7, 3)).astype(float) for _ in range(3))
    beta, m = rng.integers(0, 5, 7) / 8, rng.integers(-2, 3, (3, 3)).astype(float)
    zero = np.zeros(7)
    out, memory = neural_memory(q, k, v, start_memory(m), theta=beta / 2, eta=zero, alpha=zero)
    more = {"beta": beta.reshape(1, 1, 7, 1), "state": m[None, None]}
    p = Problem(*(x[None, None] for x in (q, k, v)), causal="bottom_right", variant="gated_delta", **more)
    a = evaluate(p, rounding="float64")
    # integers and eighths below 2**53: float64 rounds none of these sums
    assert (a.out[0, 0] == out).all()
    assert (a.state[0, 0] == memory.weights[0]).all()


def test_passes_over_unit_keys_end_at_the_least_squares_solution():
    """The error e of one pass is e Π(I - kᵀk): what lies along the keys shrinks, and nothing else moves."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((3, 5)), rng.standard_normal((3, 2))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    ones, zero, memory = np.ones(3), np.zeros(3), start_memory(np.zeros((5, 2)))
    best = np.linalg.pinv(k) @ v
    step = np.linalg.multi_dot([np.eye(5) - np.outer(x, x) for x in k[::-1]])
    rate = np.linalg.norm(step @ np.linalg.pinv(k) @ k, 2)
    assert rate < 1
    for passes in range(1, 101):
        _, memory = neural_memory(k, k, v, memory, theta=ones / 2, eta=zero, alpha=zero)
        off = np.linalg.norm(memory.weights[0] - best)
        # each pass rounds some 3 * 20 operations of numbers below 10, and pinv about as many
        assert off <= rate**passes * np.linalg.norm(best) + passes * 60 * 10 * 2.0**-53
    assert off < np.linalg.norm(best) * 2.0**-30


def test_a_call_in_two_is_the_whole():
    q, k, v, gates, m = tokens()
    out, memory = neural_memory(q, k, v, start_memory(m), **gates)
    first, half = neural_memory(q[:2], k[:2], v[:2], start_memory(m), **{n: x[:2] for n, x in gates.items()})
    rest, end = neural_memory(q[2:], k[2:], v[2:], half, **{n: x[2:] for n, x in gates.items()})
    assert (np.concatenate([first, rest]) == out).all()
    assert (end.weights[0] == memory.weights[0]).all()


@pytest.mark.parametrize("widths", [(3, 2), (3, 5, 2), (3, 4, 4, 2)])
def test_gradients_are_those_of_autograd(widths):
    torch = pytest.importorskip("torch")
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(a, b, generator=gen, dtype=torch.float64) for a, b in itertools.pairwise(widths)]
    k, v = (torch.randn(4, w, generator=gen, dtype=torch.float64) for w in (3, 2))
    found = memory_gradient(weights, k, v)
    leaves = [w.clone().requires_grad_() for w in weights]
    for t, loss in enumerate(memory_loss(leaves, k, v)):
        for got, wanted in zip(found, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
            # both lose at most 2 d + 8 roundings a layer and way, forward and back, of sums of sizes below `size`
            size = max(float(w.abs().sum()) for w in weights) ** len(weights) * float(k.abs().max() + v.abs().max() + 1)
            assert ((got[t] - wanted).abs() <= 2 * len(weights) * (2 * 5 + 8) * size**2 * 2.0**-53).all()


def test_a_memory_of_layers_learns_by_its_own_gradient():
    """Against autograd through the formula, token by token; the other memory, of the chunk's start, is not it."""
    torch = pytest.importorskip("torch")
    gen = torch.Generator().manual_seed(0)
    w = [torch.randn(3, 4, generator=gen, dtype=torch.float64), torch.randn(4, 3, generator=gen, dtype=torch.float64)]
    x = torch.randn(5, 3, generator=gen, dtype=torch.float64) / 2
    gates = {n: torch.full((5,), y, dtype=torch.float64) for n, y in (("theta", 0.05), ("eta", 0.5), ("alpha", 0.125))}
    out, memory = neural_memory(x, x, x, start_memory(*w), **gates)
    speed = [torch.zeros_like(y) for y in w]
    for t in range(5):
        leaves = [y.clone().requires_grad_() for y in w]
        back = torch.autograd.grad(memory_loss(leaves, x[t : t + 1], x[t : t + 1]).sum(), leaves)
        speed = [0.5 * s - 0.05 * g for s, g in zip(speed, back, strict=True)]
        w = [0.875 * y + s for y, s in zip(w, speed, strict=True)]
    # 5 steps of some 200 roundings each on numbers below 100, and each step's error grows by less than 4
    assert all(((a - b).abs() <= 4**5 * 1000 * 100 * 2.0**-53).all() for a, b in zip(memory.weights, w, strict=True))
    stale, _ = neural_memory(x, x, x, start_memory(*memory.weights), **gates, chunk=5)
    again, _ = neural_memory(x, x, x, start_memory(*memory.weights), **gates)
    assert (stale != again).any()
    assert out.shape == (5, 3)


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_blocks_are_written_out(kind):
    xp = {"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}[kind]
    xp = pytest.importorskip(xp)
    rng = np.random.default_rng(0)
    x, p, m = rng.standard_normal((5, 2)), rng.standard_normal((1, 2)), rng.standard_normal((2, 2))
    g = {n: np.full(6, y) for n, y in (("theta", 0.1), ("eta", 0.5), ("alpha", 0.25))}

    def ours(a):
        return xp.asarray(a)

    def block(f, n=5, **more):
        gates = {name: ours(y[:n]) for name, y in g.items()}
        out, memory = f(ours(x), start_memory(ours(m)), ours(p), **more, **gates)
        return np.asarray(out, float), np.asarray(memory.weights[0], float)

    def attend(tokens, row, seen):
        s = np.array([tokens[row] @ tokens[j] / 2**0.5 for j in seen])
        w = np.exp(s - s.max())
        return sum(a * tokens[j] for a, j in zip(w / w.sum(), seen, strict=True))

    def learn(tokens, memory, start):
        cut = {name: y[start : start + len(tokens)] for name, y in g.items()}
        return neural_memory(tokens, tokens, tokens, memory, **cut)

    def joined(y, said):
        return y / (1 + np.exp(-said))

    context, memory = [], start_memory(m)
    for start in (0, 3):
        s = x[start : start + 3]
        whole = np.concatenate([p, s @ memory.weights[0], s])
        first = 1 + len(s)
        y = np.array([attend(whole, first + i, range(first + i + 1)) for i in range(len(s))])
        _, memory = learn(y, memory, start)
        context.extend(joined(y, y @ memory.weights[0]))
    whole = np.concatenate([p, x])
    near = np.array([attend(whole, 1 + i, sorted({0, *range(max(0, i), i + 2)})) for i in range(5)])
    said, taught = learn(x, start_memory(m), 0)
    layer, after = learn(whole, start_memory(m), 0)
    layered = np.array([attend(layer, 1 + i, sorted({0, *range(max(0, i), i + 2)})) for i in range(5)])
    # JAX computes in float32 where it is not told otherwise: some 200 roundings of numbers below 4 and slopes below 4
    most = 200 * 16 * (2.0**-24 if kind == "jax" else 2.0**-53)
    blocks = [
        (memory_as_gate, 5, {"window": 2}, (joined(near, said), taught.weights[0])),
        (memory_as_layer, 6, {"window": 2}, (layered, after.weights[0])),
        (memory_as_context, 5, {"segment": 3}, (np.array(context), memory.weights[0])),
    ]
    for f, n, more, wanted in blocks[: 1 if kind == "jax" else 3]:  # JAX compiles each operation, for seconds
        got = block(f, n, **more)
        assert all(np.abs(a - b).max() <= most for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chunk": 0}, "chunk: got 0, expected a whole number from 1 on"),
        ({"grad_at": "last"}, "grad_at: got 'last', expected 'current' or 'initial'"),
        ({"theta": np.ones(4)}, r"theta: shape is \(4,\), expected \(3\)"),
        ({"query": np.ones((2, 2))}, r"query: shape is \(2, 2\), expected \(3, 2\)"),
        ({"value": np.ones((3, 1))}, r"value: shape is \(3, 1\), expected \(3, 2\)"),
        ({"key": [1.0]}, "key: got list, expected an array"),
    ],
)
def test_what_does_not_fit_is_named(changes, text):
    x, ones = np.ones((3, 2)), np.ones(3)
    given = {
        "query": x,
        "key": x,
        "value": x,
        "memory": start_memory(np.eye(2)),
        "theta": ones,
        "eta": ones,
        "alpha": ones,
    }
    with pytest.raises(InvalidInput, match=text):
        neural_memory(**(given | changes))


def test_memories_that_do_not_fit_are_named():
    with pytest.raises(InvalidInput, match="weights: got none"):
        start_memory()
    with pytest.raises(InvalidInput, match=r"weights\[1\]: shape is \(2, 2\), expected \(3, width\)"):
        start_memory(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(InvalidInput, match=r"query: shape is \(1, 3\), expected \(n, 2\)"):
        read_memory((np.eye(2),), np.ones((1, 3)))
    with pytest.raises(InvalidInput, match=r"value: shape is \(1, 2\), expected \(3, 2\)"):
        memory_loss((np.eye(2),), np.ones((3, 2)), np.ones((1, 2)))
    x, g = np.ones((3, 2)), dict.fromkeys(("theta", "eta", "alpha"), np.ones(3))
    with pytest.raises(InvalidInput, match=r"memory: its momentum is \(1, 2\), expected \(2, 2\)"):
        neural_memory(x, x, x, Memory((np.eye(2),), (np.ones((1, 2)),)), **g)
    with pytest.raises(InvalidInput, match=r"persistent: shape is \(0, 3\), expected \(p, 2\)"):
        memory_as_gate(x, start_memory(np.eye(2)), np.ones((0, 3)), window=1, **g)
    with pytest.raises(InvalidInput, match="memory: goes from 2 to 3 features, expected x's 2 on both sides"):
        memory_as_layer(x, Memory((np.ones((2, 3)),), (np.ones((2, 3)),)), np.ones((0, 2)), window=1, **g)


@pytest.mark.parametrize("part", ["weights", "momentum"])
def test_a_memory_that_holds_no_numbers_is_refused(part):
    m, bad, x = np.eye(2), np.array([[1.0, np.nan], [0, 1]]), np.ones((3, 2))
    memory = start_memory(m, m)._replace(**{part: (m, bad)})
    g = dict.fromkeys(("theta", "eta", "alpha"), np.ones(3))
    text = rf"^memory's {part}\[1\]: holds NaN, expected numbers; mend what made them$"
    with pytest.raises(InvalidInput, match=text):
        neural_memory(x, x, x, memory, **g)
    for block, more in (
        (memory_as_context, {"segment": 2}),
        (memory_as_gate, {"window": 1}),
        (memory_as_layer, {"window": 1}),
    ):
        with pytest.raises(InvalidInput, match=text):
            block(x, memory, x[:0], **more, **g)


def test_what_is_lost_on_the_way_shows_in_the_answer():
    """Tokens that are NaN: the memory that came in was not, and no error speaks of it."""
    x, g = np.ones((4, 2)), dict.fromkeys(("theta", "eta", "alpha"), np.ones(4))
    x[0, 0] = np.nan
    out, memory = memory_as_context(x, start_memory(np.eye(2)), x[:0], segment=2, **g)
    assert np.isnan(out).any()
    assert np.isnan(memory.weights[0]).any()
