"""Losses followed by matrices, against sums over paths; and what a node loses by itself."""

import numpy as np

from refattn.check.bounds import followed as module
from refattn.check.bounds.followed import KEPT, Followed, own_losses
from refattn.check.bounds.losses import Losses
from refattn.check.model import flash


def test_each_loss_comes_as_the_product_of_later_moves():
    rng = np.random.default_rng(0)
    moves = rng.integers(-2, 3, (5, 3, 3)).astype(float)
    own, var = rng.integers(0, 4, (2, 5, 3, 2)).astype(float)
    reads = rng.integers(-2, 3, (2, 3)).astype(float)
    followed = Followed(3, 2)
    for t in range(5):
        error, scatter = followed.step(moves[t], own[t], var[t])
        want, spread, seen, far = np.zeros((2, 3, 2)), np.zeros((2, 3, 2)), np.zeros((2, 2)), np.zeros((2, 2))
        want, spread = want[0], spread[0]
        for s in range(t + 1):
            by = np.eye(3)
            for move in moves[s + 1 : t + 1]:
                by = move @ by
            want, spread = want + abs(by) @ own[s], spread + by**2 @ var[s]
            seen, far = seen + abs(reads @ by) @ own[s], far + (reads @ by) ** 2 @ var[s]
        met = followed.met(reads)
        for got, due in ((error, want), (scatter, spread), (met[0], seen), (met[1], far)):
            assert (got == due).all()  # small whole numbers


def test_a_reflection_keeps_a_loss():
    """Steps of 2 turn an error round: its size stays, where the sizes of I - 2 k k^T double it and more."""
    k = np.full((1, 4), 0.5)
    move, followed = np.eye(4) - 2 * k.T @ k, Followed(4, 1)
    loss = np.array([[1.0], [0.0], [0.0], [0.0]])
    error, _ = followed.step(move, loss, 0 * loss)
    for t in range(1, 50):
        error, _ = followed.step(move, 0 * loss, 0 * loss)
        assert (error == (abs(move[:, :1]) if t % 2 else loss)).all()
    assert np.linalg.matrix_power(abs(move), 49).max() == 2.0**47


def test_what_a_node_loses_itself_is_the_rest():
    """a S + S with S off by e: 3 e of it is S's own, the rest are roundings of sizes below 4 (|S| + e)."""
    f = Losses(flash("float32"), 1)
    state = f.leaf(np.array([[8.0]]), ("d", "v"), np.array([[2.0]]), np.array([[0.25]]))
    y = f.leaf(np.array([[2.0]]), ("d", "d")) @ state + state
    ((own, var),) = own_losses([state.node], [y.node])
    assert y.node.span.item() > 6
    assert 0 < own.item() < 2.0**-24 * 4 * 4 * 10
    assert 0 < var.item() < (2.0**-24 * 4 * 10) ** 2
    ((whole, _),) = own_losses([], [y.node])
    assert whole.item() == y.node.span.item()
    assert own_losses([state.node], [state.node])[0][0].item() < 2.0**-48


def test_losses_of_long_ago_are_held_by_an_ellipsoid(monkeypatch):
    """Of 4 KEPT pieces: no sum of losses is past it, it allows a few percent more, and keeps as many matrices."""
    rng = np.random.default_rng(0)
    few, all_of_them, worst = Followed(6, 2), Followed(6, 2), np.zeros((6, 2))
    moves, losses = [], []
    for t in range(4 * KEPT):
        k = rng.standard_normal((6, 1))
        moves.append(np.eye(6) - rng.uniform(0, 2) * k @ k.T / (k.T @ k))
        losses.append(np.abs(rng.standard_normal((6, 2))))
        error, var = few.step(moves[-1], losses[-1], losses[-1] ** 2)
        monkeypatch.setattr(module, "KEPT", 10**9)
        due, spread = all_of_them.step(moves[-1], losses[-1], losses[-1] ** 2)
        monkeypatch.undo()
        assert (error >= due * (1 - 2.0**-40)).all(), t
        assert (abs(var - spread) <= 2.0**-40 * spread).all(), t
    assert len(few.own) <= 2 * KEPT * 6 < len(all_of_them.own)
    assert few.moves.shape == (6, len(few.own))
    assert (error <= 1.1 * due).all()
    reads = rng.standard_normal((3, 6))
    assert (few.largest(reads) >= all_of_them.largest(reads) * (1 - 2.0**-40)).all()
    by = reads
    for move, loss in zip(moves[::-1], losses[::-1], strict=True):  # losses that all go one way attain the sum
        worst[:3] += abs(by) @ loss
        by = by @ move
    assert (few.largest(reads) >= worst[:3] * (1 - 2.0**-40)).all()


def test_an_ellipsoid_holds_what_no_move_shrinks():
    """One segment, kept by every move: after it is folded it is as long as it was, along it and across."""
    followed, none = Followed(2, 1), np.zeros((2, 1))
    followed.step(np.eye(2), np.array([[3.0], [0.0]]), none)
    for _ in range(3 * KEPT):
        error, _ = followed.step(np.eye(2), none, none)
    assert followed.old.any()
    assert abs(error - [[3.0], [0.0]]).max() <= 3 * 2.0**-22  # the root of what is added for float64


def test_errors_of_one_state_that_meet_again_keep_their_signs():
    """a S - b S with S off by e is off by (a - b) e and roundings; without its matrices by (a + b) e."""
    f = Losses(flash("float32"), 1)
    states = [f.leaf(np.array([[8.0]]), ("d", "v"), np.array([[2.0]])) for _ in range(2)]
    states[0].node.follow(lambda by: abs(by) @ np.array([[2.0]]))
    found = []
    for state in states:
        y = f.leaf(np.array([[3.0]]), ("d", "d")) @ state - state * 2.0
        ((own, _),) = own_losses([state.node], [y.node])
        found.append((y.node.span.item(), own.item()))
    assert found[0][0] - found[0][1] <= 2.0 < found[0][0] < 2.001
    assert found[1][0] > 10
    assert found[0][1] <= found[1][1] < 0.001
    assert not y.node.followed
