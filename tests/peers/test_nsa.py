"""Native sparse attention as native-sparse-attention-pytorch computes it, each of its three parts judged like a kernel.

Its projections pass features on, its rotary positions turn nothing, and its learned compression is a mean.
"""

import numpy as np
import pytest

from refattn import Problem, check_problem
from refattn.check.bugs.planted import mistaken
from refattn.functions.native import compressed_attention

from ..functions.rounding import softmax_error

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
pytest.importorskip("native_sparse_attention_pytorch", reason="not installed: in a clone: pip install '.[peers]'")

N, D, SIZE, CHOSEN, WINDOW = 45, 4, 8, 2, 5
PARTS = ("compressed", "selected", "window")


class Passes(torch.nn.Module):
    """What the package would learn, and what is not compared: all pass on what they get."""

    def forward(self, x):
        return x

    def rotate_queries_with_cached_keys(self, q, k):
        return q, k


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(-2)


class Only(torch.nn.Module):
    """Gates that let one part through."""

    def __init__(self, heads, part):
        super().__init__()
        self.heads, self.gates = heads, torch.eye(3, dtype=torch.float64)[PARTS.index(part)]

    def forward(self, x):
        return self.gates.expand(x.shape[0], self.heads, x.shape[1], 3)


def theirs(part):
    def kernel(p):
        from native_sparse_attention_pytorch import SparseAttention

        h, h_kv = p.query.shape[1], p.key.shape[1]
        m = SparseAttention(
            (h + 2 * h_kv) * D, D, h, WINDOW, SIZE, SIZE, SIZE, CHOSEN,
            kv_heads=h_kv, causal=True, norm=False, compress_mlp=Mean(),
        ).double()  # fmt: skip
        m.to_qkv = m.rotary_emb = m.combine_heads = Passes()
        m.to_strategy_combine = Only(h, part)
        x = torch.cat([torch.from_numpy(a).transpose(1, 2).flatten(2) for a in (p.query, p.key, p.value)], -1)
        return m(x).detach().unflatten(2, (h, D)).transpose(1, 2).numpy()

    return kernel


def call(h=2, h_kv=2, whole=False, **more):
    rng = np.random.default_rng(0)
    shapes = ((1, heads, N, D) for heads in (h, h_kv, h_kv))
    q, k, v = (rng.integers(-3, 4, s).astype(float) if whole else rng.standard_normal(s) for s in shapes)
    return Problem(q, k, v, causal="bottom_right", **more)


def agrees(kernel, p):
    return check_problem(kernel, p, "peer").passed


def test_their_window_has_a_key_more():
    assert agrees(theirs("window"), call(h=4, window=(WINDOW, 0)))
    assert not agrees(theirs("window"), call(h=4, window=(WINDOW - 1, 0)))


@pytest.mark.parametrize("topk", [CHOSEN, CHOSEN + 1])
def test_their_blocks_are_counted_beside_the_own_one(topk):
    p = call(variant="nsa_selected", options={"block_size": SIZE, "topk": topk})
    assert agrees(theirs("selected"), p) == (topk == CHOSEN + 1)


def test_their_heads_of_a_group_add_up_products():
    """Ours add up weights, as the paper does, which is another choice; what they do is a mistake that ours know."""
    p = call(h=4, variant="nsa_selected", options={"block_size": SIZE, "topk": CHOSEN + 1})
    found = theirs("selected")(p)
    assert not agrees(lambda _: found, p)
    as_released, _ = mistaken("nsa_selected", "products_summed")(p)
    grouped = (p.query.reshape(1, 2, 2 * N, D), p.key, p.value)
    assert np.abs(found - as_released).max() <= softmax_error(*grouped, 0.5, 2.0**-53)[0]


def test_their_compressed_part_has_a_key_of_zeros_and_waits_for_the_next_token():
    """A block is seen from the token after its last one on, beside a key and a value that are 0 before training."""
    p = call(h=4, whole=True)  # means of 8 whole numbers are exact
    k, v = (x[:, :, : N // SIZE * SIZE].reshape(1, 2, -1, SIZE, D).mean(3) for x in (p.key, p.value))
    ends = np.arange(1, k.shape[2] + 1) * SIZE - 1
    seen = {"<": ends < np.arange(N)[:, None], "<=": ends <= np.arange(N)[:, None]}
    as_released = Problem(p.query, k, v, allowed=seen["<"][None, None], sink=np.zeros(4))
    found = theirs("compressed")(p)
    assert agrees(lambda _: found, as_released)
    assert not agrees(lambda _: found, as_released.replace(sink=None))
    assert not agrees(lambda _: found, as_released.replace(allowed=seen["<="][None, None]))
    ours = as_released.replace(sink=None, allowed=seen["<="][None, None])
    assert agrees(lambda _: compressed_attention(p.query, p.key, p.value, block_size=SIZE)[0], ours)
