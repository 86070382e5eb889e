"""Titans as titans-pytorch has it, beside ours: the mask of memory as context, and the memory that learns."""

from fractions import Fraction

import numpy as np
import pytest

from refattn.functions.memory import neural_memory, start_memory
from refattn.variants.titans_mac import segment_mask

torch = pytest.importorskip("torch")
pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: in a clone: pip install '.[peers]'")


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(("n", "window", "persistent"), [(67, 16, 5), (33, 1, 0), (40, 64, 3), (21, 7, 1)])
def test_the_masks_are_the_same(monkeypatch, n, window, persistent, sliding):
    from titans_pytorch import mac_transformer

    rules = []
    monkeypatch.setattr(mac_transformer, "create_block_mask", lambda rule, **_: rules.append(rule))
    mac_transformer.create_mac_block_mask(n, window, persistent, sliding)
    q, k = torch.arange(n)[:, None], torch.arange(n + persistent)[None]
    seen = rules[0](None, None, q, k).numpy()
    assert (seen == segment_mask(n, n + persistent, persistent, window, sliding)).all()
    assert not np.array_equal(seen, segment_mask(n, n + persistent, persistent, window + 1, sliding)) or window >= n


D = 4
fractions = np.frompyfunc(Fraction, 1, 1)


class Reads(torch.nn.Module):
    """Features of a token as they are: no rounding comes from a projection."""

    def __init__(self, *which, sign=1):
        super().__init__()
        self.which, self.sign = list(which), sign

    def forward(self, x):
        return self.sign * x[..., self.which]


def memory_of_theirs(chunk, batch, momentum=True):
    """Return their memory with one matrix, without norms and residual: queries, keys and values are signed features."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    torch.manual_seed(0)
    plain = {"pre_rmsnorm": False, "mem_model_norm_add_residual": False}
    m = NeuralMemory(
        D, chunk_size=chunk, batch_size=batch, model=MemoryMLP(D, depth=1), momentum=momentum, **plain
    ).double()
    m.to_queries, m.to_keys, m.to_values = Reads(1, 2, 3, 0), Reads(0, 1, 2, 3), Reads(2, 0, 3, 1, sign=-1)
    m.to_adaptive_step[0], m.to_decay_factor[0] = Reads(0), Reads(2)
    if momentum:
        m.to_momentum[0] = Reads(1)
    return m


def given(x, start, momentum=True, first_of_chunk=1):
    """Return what ours takes for the same: fractions of their numbers, a step for the sum of squares, not the mean."""
    theta, eta, alpha = (x[:, i].sigmoid().numpy() for i in range(3))
    late = np.arange(len(x)) % first_of_chunk > 0
    q, k, v = (x[:, [1, 2, 3, 0]], x, -x[:, [2, 0, 3, 1]])
    arrays = [fractions(y.numpy()) for y in (q, k, v)] + [start_memory(fractions(start.detach().numpy()))]
    gates = {"theta": fractions(theta) / D, "eta": fractions(eta * momentum), "alpha": fractions(alpha * ~late)}
    return arrays, gates


def difference_and_bound(theirs, x, arrays, gates, **more):
    """Return how far their numbers are from our fractions, over what a sum of products loses in float64.

    A memory is a sum of products of inputs, linear in the one before: each product is rounded once for each operation
    on its way. Their sizes are what the same function gives of absolute values, with signs that let nothing cancel.
    A token is a product of D terms, a difference, 4 factors of the gradient, the outer product, a chunk's sum, three
    sigmoids (4 each), 1 - alpha, two products and two sums, which a scan takes in another order: less than D + 40.
    """
    wanted, _ = neural_memory(*arrays, **gates, **more)
    q, k, v, m = arrays
    signed = {"theta": -gates["theta"], "eta": gates["eta"], "alpha": -gates["alpha"]}
    size, _ = neural_memory(abs(q), abs(k), -abs(v), start_memory(abs(m.weights[0])), **signed, **more)
    loss = (len(x) * (D + 40) + D) * Fraction(1, 2**53)
    return (abs(fractions(theirs) - wanted) / (loss / (1 - loss) * size)).astype(float)


@pytest.mark.parametrize(("batch", "at"), [(1, "current"), (None, "initial")])
def test_the_memories_say_the_same(batch, at):
    """Without a batch size they take every gradient at the first memory."""
    m = memory_of_theirs(1, batch)
    x = torch.randn(9, D, dtype=torch.float64)
    theirs = m(x[None])[0][0].detach().numpy()
    call = given(x, m.memory_model_parameters[0][0])
    assert (difference_and_bound(theirs, x, *call, grad_at=at) <= 1).all()
    other = {"initial": "current", "current": "initial"}[at]
    assert (difference_and_bound(theirs, x, *call, grad_at=other) > 1).any()
    sum_of_squares = {**call[1], "theta": call[1]["theta"] * D}
    assert (difference_and_bound(theirs, x, call[0], sum_of_squares, grad_at=at) > 1).any()


@pytest.mark.parametrize("momentum", [False, True])
def test_their_chunk_is_one_step(momentum):
    """A token reads the memory of the chunks before its successor; a chunk has one eta and alpha, of its mean token.

    Ours gives each token its own. They are the same where there is no momentum, and alpha is the chunk's first.
    """
    m = memory_of_theirs(3, 3, momentum)
    x = torch.randn(9, D, dtype=torch.float64)
    x[:, 1:3] = x[::3, 1:3].repeat_interleave(3, 0)  # so that a mean is each of its tokens but for a rounding
    theirs = m(x[None])[0][0].detach().numpy()
    arrays, gates = given(x, m.memory_model_parameters[0][0], momentum, first_of_chunk=3)
    at_end = [2, 5, 8]
    off = difference_and_bound(theirs, x, arrays, gates, chunk=3)[at_end]
    assert (off <= 1).all() != momentum
    assert (off[0] > 1).any() == momentum
