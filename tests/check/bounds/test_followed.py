"""Losses followed by matrices, against sums over paths; and what a node loses by itself."""

import numpy as np

from refattn.check.bounds.followed import Followed, own_losses
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
