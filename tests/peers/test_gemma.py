"""Spark's statistical top-k as transformers has it in Gemma 3n, beside the function here."""

from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest

from refattn.functions.statistical import spark_ffn, statistical_topk

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
WHY = "transformers with Gemma 3n is not installed: pip install transformers"
gemma = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n", reason=WHY, exc_type=ImportError)

N, D = 64, 6
U = 2.0**-53


def layer(k):
    """Return their feed-forward layer in float64 that lets about k of N neurons fire."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": [N], "activation_sparsity_pattern": [1 - k / N]}
    return gemma.Gemma3nTextMLP(SimpleNamespace(**sizes, hidden_activation="gelu_pytorch_tanh")).double()


def quantile(k):
    """Return theirs, which is taken in float32 whatever the input is, and the exact one to float64."""
    theirs = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(1 - k / N, dtype=torch.float32))
    return theirs.item(), NormalDist().inv_cdf(1 - k / N)


def loss(x, k):
    """Return how far both may be apart: by the quantile times the deviation, and by roundings of both in float64.

    A mean loses N roundings of the mean size, a deviation that and N/2 + 4 of itself, the threshold 3 of its terms.
    """
    theirs, exact = quantile(k)
    std, size = x.std(-1, correction=0, keepdim=True), x.abs().mean(-1, keepdim=True)
    mine = N * size + abs(exact) * (N * size + (N / 2 + 4) * std) + 3 * (size + abs(exact) * std)
    return abs(theirs - exact) * std + 1.1 * 2 * U * (mine + 2 * x.abs().amax(-1, keepdim=True))


@pytest.mark.parametrize("k", [5, 20, 50])
def test_the_thresholds_are_the_same(k):
    x = torch.randn(7, N, dtype=torch.float64)
    theirs = layer(k)._gaussian_topk(x)
    assert ((theirs - statistical_topk(x, k, ddof=0)).abs() <= loss(x, k)).all()
    assert ((theirs - statistical_topk(x, k, ddof=1)).abs() > loss(x, k)).any()
    z, exact = quantile(k)
    # the share and twice it less 1 are rounded to float32, over the normal density; the quantile by 4 units at most
    assert 0 < abs(z - exact) <= 2 * 2.0**-24 / NormalDist().pdf(exact) + 4 * 2.0**-23 * max(1, abs(z))


def test_their_layer_is_ours_of_a_token_that_is_given_twice():
    """Their predictor reads all features, as the other factor does; Spark's reads the first r."""
    m, k = layer(8), 8
    x = torch.randn(7, D, dtype=torch.float64)
    k1, k2, v = (w.weight.detach().T for w in (m.gate_proj, m.up_proj, m.down_proj))
    ours = spark_ffn(torch.cat([x, x], -1), k1, k2, v, k=k, ddof=0)
    before, other = x @ k1, x @ k2
    # gelu's slope is below 1.13; products add (D + 8) roundings of sizes before they are taken, sums N of the result's
    fired = 1.13 * loss(before, k) + (D + 8) * 4 * U * (x.abs() @ k1.abs() + before.abs())
    rounded = (2 * D + N + 8) * 2 * U * (before.abs() * (x.abs() @ k2.abs()))
    bound = (fired * other.abs() + rounded) @ v.abs()
    assert ((m(x) - ours).abs() <= bound).all()
    wrong = spark_ffn(torch.cat([x, x], -1), k1, k2, v, k=k, ddof=1)
    assert ((m(x) - wrong).abs() > bound).any()
    assert np.isfinite(bound.detach().numpy()).all()
