"""Attention within clusters as the package routing_transformer computes it, beside the function here."""

import numpy as np
import pytest

from refattn.functions.clusters import commitment_loss, kmeans_step, moving_average, normalised, routing_attention

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
pytest.importorskip("routing_transformer", reason="not installed: pip install routing_transformer")

U = 2.0**-53


def make(causal, shared, seed, memory=0, window=8):
    from routing_transformer.routing_transformer import KmeansAttention

    torch.manual_seed(seed)
    peer = KmeansAttention(5, window, 2, 8, causal=causal, shared_qk=shared, num_mem_kv=memory).double()
    q, k, v = torch.randn(3, 2, 2, 40, 8, dtype=torch.float64)
    peer.kmeans.init(q)
    return peer, q, q if shared else k, v


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_outputs_are_the_same(causal, shared, memory):
    peer, q, k, v = make(causal, shared, 0, memory)
    theirs, loss = peer.eval()(q, k, v)
    means, kept = peer.kmeans.means, None
    if peer.num_mem_kv:
        kept = (peer.mem_key.detach(), peer.mem_value.detach())
    order = "top_left" if causal else None
    key = None if shared else k
    ours, _ = routing_attention(q, key, v, means, window=8, causal=order, memory=kept, mode="released")
    # both compute in float64: a logit of 8 products is off by 10u·|q||k| and a weight by that and 2 more, twice each
    # (numerator and divisor of at most 10 keys), and the mean of at most 5 clusters; their normalised keys count twice
    largest = max(x.abs().max().item() for x in (v, *(kept or ())))
    logit = 40 * q.norm(dim=-1).max() * max(x.norm(dim=-1).max() for x in (k, *(kept or ())[:1])) / 8**0.5
    assert (ours - theirs).abs().max() <= U * (2 * logit + 2 * 12 + 20) * largest
    assert abs(loss - commitment_loss(q if shared else torch.cat((q, k), 2), means)) <= 1e-4 * 64 * U * 4
    wrong, _ = routing_attention(q, key, v, means, window=7, causal=order, memory=kept, mode="released")
    assert (wrong - theirs).abs().max() > 1e-3


def test_the_means_are_updated_alike():
    peer, q, k, v = make(True, False, 0)
    means = peer.kmeans.means.clone()
    peer.train()(q, k, v)
    peer.kmeans.update()
    both = normalised(torch.cat((q, k), 2))
    ours = moving_average(means, kmeans_step(both, means), decay=0.999)
    # sums of at most 160 unit vectors, of a length above 1 here, in another order
    assert (ours - peer.kmeans.means).abs().max() <= 0.001 * 2 * 160 * 160 * U + 4 * U
    assert np.abs((ours - means).numpy()).max() > 1e-5
