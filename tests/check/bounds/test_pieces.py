"""Linear recurrences in pieces: bounds that do not grow, that no rounding passes, and that wrong gradients do."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS, InvalidInput, evaluate
from refattn.check.bounds.cumulated import ratios_lost
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.bounds.pieces import BLOCK, Pieces, Trace, gradients_of, ways_of
from refattn.check.bounds.rounded import HOWS, Rounded, Rounding
from refattn.check.kernels import chunked as kernel
from refattn.check.model import MODELS, flash
from refattn.exact.agree import under
from refattn.exact.heads import heads
from refattn.exact.tape import Tape, gradients
from refattn.variants import Rows, gated_delta

from .lengths import call

SHAPE = VARIANTS["gated_delta"].shape


def test_a_trace_is_the_recurrence_in_loops():
    p, _ = call("channels", 5, d=3)
    (one,) = heads(p)
    found, k, state = Trace(one, SHAPE), one.k, one.state
    for t in range(5):
        fade = np.diag(one.gates["alpha"][t])
        move = (np.eye(3) - one.gates["beta"][t] * np.outer(k[t], k[t])) @ fade
        state = move @ state + one.gates["beta"][t] * np.outer(k[t], one.v[t])
        # sums of a dozen products of numbers of at most 8 in float64
        assert abs(found.states[t + 1] - state).max() <= 2.0**-53 * 16 * 8
        assert abs(found.moves[t] - move).max() <= 2.0**-53 * 16
        assert abs(found.reads[t] - one.q[t] @ move).max() <= 2.0**-53 * 16 * 8
    along, back, m = found.along(slice(1, 4)), found.back(slice(1, 4)), found.moves
    assert (along[3] == m[3] @ (m[2] @ m[1])).all()
    assert (along[0] == np.eye(3)).all()
    assert (back[0] == m[2].T @ m[3].T).all()
    assert (back[2] == np.eye(3)).all()


def test_a_trace_keeps_one_state_a_block():
    """And makes the others again, to the bit, in whatever order they are asked for."""
    (one,) = heads(call("gated", 130, d=2)[0])
    found, states = Trace(one, SHAPE), [one.state]
    assert len(found._kept) == 130 // BLOCK + 1
    for t in range(130):
        k, beta = one.k[t : t + 1], one.gates["beta"][t]
        state = states[-1] * one.gates["alpha"][t]
        states.append(state + k.T @ ((one.v[t : t + 1] - k @ state) * beta))
    for t in (130, 3, 128, 64, 63, 0, -1):
        assert abs(found.states[t] - states[t]).max() <= 2.0**-40
    assert len(found.states[60:70]) == 10
    assert (found.states[60:70][4] == found.states[64]).all()
    assert (len(found.moves), len(found.reads)) == (130, 130)
    with pytest.raises(IndexError):
        found.moves[130]


class Sparse(Rounding):
    """A sum rounds no more often than it has terms that are not 0."""

    def added(self, x, y, steps):
        return super().added(x, y, np.minimum(steps, (x != 0).sum(1, keepdims=True)))


class Plain(Rounded):
    """Weights are rounded where they meet values; backward nothing is called so."""

    __slots__ = ()

    @property
    def T(self):
        return Plain(self.f, self.a.T, None)


def simulated(one, model, how, rng, dout, size):
    """Return gradients of a head whose chunks, or tokens, round as badly as the model allows."""
    f = Sparse(model, how, rng, len(one.q))
    leaf = lambda x: Tape(Plain(f, x, None))  # noqa: E731
    o = one.options(f, wrap=Tape)
    q, k, v = map(leaf, (one.q, one.k, one.v))
    o.alpha, o.beta, o.state = leaf(one.gates["alpha"]), leaf(one.gates["beta"]), leaf(one.state)
    leaves = [q, k, v, o.alpha, o.beta, o.state]
    out, _ = gated_delta.chunked(q, k, v, o, size=size)
    found = gradients([out], [Plain(f, dout, None)], leaves)
    return {n: x.a for n, x in zip(("dq", "dk", "dv", "dalpha", "dbeta", "dstate"), found, strict=True)}


@pytest.mark.parametrize("name", ["gated", "channels"])
def test_no_rounding_of_a_backward_pass_is_past_its_bound(name):
    model, rng, worst = flash("float32"), np.random.default_rng(1), 0.0
    p, dout = call(name, 19, d=3)
    (one,) = heads(p)
    arriving = dout[0, 0].astype(float)
    answer = evaluate(p, gradients=dout)
    limit = gradients_of(ways_of(one, model), arriving, 0.0, None)
    for how in HOWS:
        for size in (8, 64):
            got = simulated(one, model, how, rng, arriving, size)
            for n, x in got.items():
                error = abs(x - answer.enclosures[n].mid[0, 0])
                assert (error <= limit[n][1]).all(), (n, how, size)
                worst = max(worst, float((error / limit[n][1]).max()))
    assert worst > 0.02  # the bound is not idle


def wrong_gradients(p, dout, name):
    """Return float32 gradients of ours with a mistake: they stop at a chunk, or one decay has none."""
    if name == "right":
        return kernel._gradients(p, dout)
    n, found = p.n_q, kernel._gradients(p, dout)
    late = dout.copy()
    late[:, :, n // 2 :] = 0
    part = kernel._gradients(p, late)  # what the second half's outputs say of the first half's tokens is lost
    if name == "half":
        for x in ("dk", "dv", "dalpha", "dbeta"):
            found[x][:, :, : n // 2] = part[x][:, :, : n // 2]
    if name == "percent":
        found["dk"] = found["dk"] * np.float32(1.02)
    if name == "decay":
        found["dalpha"][:, :, n // 2] = 0
    return found


def test_wrong_gradients_of_a_hundred_tokens_fail_where_right_ones_pass():
    """Sizes alone, carried on from chunk to chunk, allowed 24 times a gradient's own size, and 1e9 times at 256."""
    p, dout = call("gated", 100, d=4)
    answer, model = evaluate(p, gradients=dout), MODELS["flash"]("float32")
    limit = gradient_bounds(answer, model, dout, bounds(answer, model))

    def past(name):
        got = wrong_gradients(p, dout, name)
        return {x for x, lim in limit.items() if not (answer.enclosures[x].error(got[x].astype(float)) <= lim).all()}

    for n, x in limit.items():
        assert np.median(x) < 2.0**-6 * np.sqrt(np.mean(np.square(answer.enclosures[n].mid))), n
    assert past("right") == set()
    assert past("half") == {"dk", "dv", "dalpha", "dbeta"}
    assert past("percent") == {"dk"}
    assert past("decay") == {"dalpha"}


def test_as_many_tokens_as_columns_are_not_taken_for_rows_that_read_the_end():
    """The gradient at the last state is read by as many unit rows as the state has."""
    p, dout = call("gated", 8, d=8)
    p, dout = p.replace(state=None), 0 * dout
    end = np.ones((1, 1, 8, 8), np.float32)
    answer = evaluate(p, gradients=dout, dstate_out=end)
    limit = gradient_bounds(answer, flash("float32"), dout, bounds(answer, flash("float32")), end)
    got = kernel._gradients(p, dout, end)
    for n in ("dk", "dv", "dalpha", "dbeta"):
        assert (answer.enclosures[n].error(got[n].astype(float)) <= limit[n]).all()
        assert np.median(limit[n]) < 2.0**-24 * 2**12


def test_without_chunks_or_signs_there_are_no_ways():
    (one,) = heads(call("lightning", 5)[0])
    assert ways_of(one, flash("float32")) == []
    (one,) = heads(call("gated", 5)[0])
    assert [x.size for x in ways_of(one, flash("float32"))] == [8]
    (one,) = heads(call("gated", 9)[0])
    assert [x.size for x in ways_of(one, flash("float32"))] == [8, 64]
    assert Pieces(Trace(one, SHAPE), SHAPE, flash("float32")).forward()[0][0].shape == (9, 16)


def test_what_a_chunk_loses_comes_to_later_outputs_and_gradients():
    """Later tokens leave the state alone, and read its first row: out is off by its error, dq by its first column's."""
    p, dout = call("gated", 16, d=3)
    p.key[:, :, 8:], p.beta[:, :, 8:], p.alpha[:, :, 8:] = 0, 0, 1
    p.query[:, :, 8:] = dout[:, :, 8:] = np.eye(3)[0]
    (one,) = heads(p)
    ways = ways_of(one, flash("float32"))
    (out, _), _, before = ways[0].forward(keep=True)
    assert (before[8] > 0).all()
    assert (out[8:] >= before[8][0]).all()
    arriving = dout[0, 0].astype(float)
    found = gradients_of(ways[:1], arriving, 0.0, None)
    assert (found["dq"][1][8:] >= before[8][:, 0]).all()


def test_what_a_chunk_loses_comes_to_gradients_of_earlier_tokens():
    """Of the first chunk's last value: beta k times the gradient by the state after it, in whose error all may meet."""
    p, dout = call("gated", 16, d=3)
    (one,) = heads(p)
    (way, _), arriving = ways_of(one, flash("float32")), dout[0, 0].astype(float)
    _, after = way.backward(arriving, 0.0, None, way.forward(keep=True)[2])
    far = one.gates["beta"][7] * (abs(one.k[7]) @ after[7])
    assert (gradients_of([way], arriving, 0.0, None)["dv"][1][7] >= far * (1 - 2.0**-50)).all()
    tokens = Pieces(way.trace, SHAPE, flash("float32"))
    assert (tokens.backward(arriving, 0.0, None, tokens.forward(keep=True)[2])[0]["dv"][1][7] < far).any()


def test_ratios_are_off_by_their_own_errors_and_no_more():
    """From the state alone, one decay a token: out after t is off by what c_t is, and by some roundings."""
    p, _ = call("gated", 12, d=3)
    p = p.replace(beta=0 * p.beta)
    (one,) = heads(p)
    model = MODELS["flash-ratios"]("float32")
    (plain, _), _, _ = ways_of(one, flash("float32"))[-1].forward()
    (found, _), _, _ = ways_of(one, model)[-1].forward()
    size = abs(one.q) @ abs(one.state)
    far = ratios_lost(one, model)[1:] * np.cumprod(one.gates["alpha"], 0)[1:]
    assert (found[1:] - plain[1:] >= 0.5 * far * size[1:]).all()
    assert (found[1:] - plain[1:] <= 2 * far * size[1:]).all()


def test_a_form_that_leaves_no_state_is_named():
    def silent(q, k, v, o, size=8):
        found = gated_delta.chunked(q, k, v, o, size=size)
        del o.last
        return found

    v = replace(VARIANTS["gated_delta"], name="silent", forms={"x": Rows(silent, together=True, cuts=(8,))})
    with under(v):
        (one,) = heads(call("gated", 3)[0].replace(variant="silent"))
        (way,) = ways_of(one, flash("float32"))
        with pytest.raises(InvalidInput, match=r"silent: has a form with cuts=\(8,\) that leaves no state; set o.last"):
            way.forward()
