"""Eviction as kvpress's SnapKV does it, beside SpecKV's: the same scores where heads and queries are averaged."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn.functions.eviction import evict, speckv_scores

from ..functions.selector_calls import call, exact_probabilities, relative_error

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
WHY = "kvpress is not installed, or a transformers beside it that it does not take: pip install kvpress"
kvpress = pytest.importorskip("kvpress", reason=WHY, exc_type=ImportError)

W, H, N, D = 5, 4, 37, 8
AVERAGED = {"reduce": "mean", "pooling": "average", "pool": 5}


class Layer(torch.nn.Module):
    """What they read of a model's layer: its numbers of heads, and a projection, which passes queries on."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=H, num_key_value_heads=2)
        self.head_dim, self.q_proj = D, torch.nn.Identity()


def pressed(q, k, v, capacity=17):
    """Return their scores without the window, which they force, and what they keep."""
    press = kvpress.SnapKVPress(compression_ratio=1 - capacity / N, window_size=W, kernel_size=5)
    hidden = torch.zeros(len(q), N, H * D)
    hidden[:, -W:] = torch.from_numpy(q).transpose(1, 2).flatten(2)
    still = {"position_embeddings": (torch.ones(1, N, D), torch.zeros(1, N, D))}
    given = Layer(), hidden, torch.from_numpy(k), torch.from_numpy(v), None, still
    return press.score(*given)[..., :-W].numpy(), [x.numpy() for x in press.compress(*given)]


def test_the_scores_and_the_kept_keys_are_the_same():
    q, k, v = call(0, n_q=W, n_k=N, d=D, d_v=D)
    theirs, (their_k, their_v) = pressed(q, k, v)
    p = torch.from_numpy(exact_probabilities(q, k)[..., :-W]).reshape(2, 2, 2, W, N - W).mean((2, 3))
    padded = np.pad(p.numpy(), ((0, 0), (0, 0), (2, 2)))
    exact = sum(padded[..., i : i + N - W] for i in range(5)) / 5
    # means add the roundings of at most 10 rows, 5 places and two divisions to those of probabilities
    share = relative_error(q, k) + 17 * np.finfo(np.float32).eps
    for scores in (theirs, speckv_scores(q, k, **AVERAGED)):
        assert (np.abs(scores - exact) <= share * exact).all()
    our_k, our_v, kept = evict(k, v, speckv_scores(q, k, **AVERAGED), capacity=17)
    best = np.sort(exact, axis=-1)
    assert (best[..., -12] * (1 - share) > best[..., -13] * (1 + share)).all()  # no rounding moves a key in or out
    for ours, others in ((our_k, their_k), (our_v, their_v)):  # they put the window first, ours last
        assert (np.concatenate([ours[:, :, -W:], ours[:, :, :-W]], 2)[:, :, W:] == others[:, :, W:]).all()
        assert (np.sort(ours[:, :, -W:], axis=2) == np.sort(others[:, :, :W], axis=2)).all()
    assert (kept[:, :, -W:] == np.arange(N - W, N)).all()


def test_by_default_speckv_is_another_function():
    """It takes the largest weight of heads and queries, and the largest of 7 neighbours."""
    q, k, v = call(0, n_q=W, n_k=N, d=D, d_v=D)
    assert (speckv_scores(q, k) > pressed(q, k, v)[0]).all()
