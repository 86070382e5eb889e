"""The PyTorch modules: the definition, stand-ins within their errors, and the same numbers from the encrypted layer."""

import numpy as np
import pytest

from refattn import InvalidInput, UnsupportedProblem, he, power_attention

torch = pytest.importorskip("torch")
nets = pytest.importorskip("refattn.he.torch")


def attention(d=16, heads=2, **more):
    torch.manual_seed(0)
    return nets.PowerSoftmaxAttention(d, heads, **{"denominator": (1.0, 30.0), "tolerance": 1e-3} | more).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [2, 4])
def test_attention_is_the_definition(p, causal):
    module = attention(p=p, causal=causal)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (
        f(x).detach().unflatten(-1, (2, 8)).transpose(1, 2).numpy() for f in (module.query, module.key, module.value)
    )
    o = power_attention(q, k, v, p=p, epsilon=1.0, causal="bottom_right" if causal else None)
    expected = module.out(torch.tensor(o).transpose(1, 2).flatten(2))
    assert torch.allclose(module(x), expected, atol=1e-12)
    low, high = module.seen
    assert 1.0 <= low < high
    stable = module(x)
    nets.polynomial(module)
    inside = torch.tensor(high) <= 30
    assert inside
    assert 0 < (module(x) - stable).abs().max() < 0.1
    nets.polynomial(module, False)
    assert torch.equal(module(x), stable)


def test_large_scores_do_not_overflow_in_training():
    module = attention(p=8).float()
    x = 1e8 * torch.randn(1, 5, 16)
    out = module(x)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_the_penalty_counts_what_leaves_the_range_and_trains_it_away():
    module = attention(denominator=(1.0, 4.0))
    x = torch.randn(4, 7, 16, dtype=torch.float64) * 2
    module(x)
    first = nets.range_penalty(module).item()
    assert first > 0
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        module(x)
        nets.range_penalty(module).backward()
        optimizer.step()
    assert nets.range_penalty(module).item() < 0.1 * first


@pytest.mark.parametrize("kind", ["PolynomialRMSNorm", "PolynomialLayerNorm"])
def test_normalisations_are_pytorchs_and_their_stand_ins_near(kind):
    module = getattr(nets, kind)(32, 0.1, 4.0, 5e-2).double()
    x = torch.randn(50, 32, dtype=torch.float64)
    with torch.no_grad():
        module.gain.copy_(torch.rand(32))
    function = torch.nn.functional.layer_norm if "Layer" in kind else torch.nn.functional.rms_norm
    exact = function(x, (32,), eps=1e-5) * module.gain
    assert torch.allclose(module(x), exact, atol=1e-12)
    nets.polynomial(module)
    assert ((module(x) - exact).abs() <= module.stand_in.error * exact.abs() + 1e-12).all()


def test_activations_are_pytorchs_and_their_stand_ins_near():
    module = nets.PolynomialActivation("silu", 3.0, 1e-2)
    u = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    exact = torch.nn.functional.silu(u)
    assert torch.equal(module(u), exact)
    assert nets.range_penalty(module).item() == 0
    nets.polynomial(module)
    assert 0 < (module(u) - exact).abs().max() <= module.stand_in.error
    module(2 * u)
    assert nets.range_penalty(module).item() > 0


def block(d=16, heads=2, hidden=32):
    torch.manual_seed(1)
    return nets.Block(
        attention(d, heads), nets.PolynomialRMSNorm(d, 0.1, 5.0, 5e-2), hidden, nets.PolynomialActivation("gelu", 4.0)
    ).double()


def test_a_block_becomes_a_layer():
    module = block()
    with torch.no_grad():
        module.first_gain.copy_(0.5 + torch.rand(16))
        module.norm.gain.copy_(0.5 + torch.rand(16))
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    layer = he.Layer(nets.weights_of(module, 8), module.attention.tolerance)
    with torch.no_grad():
        expected = nets.polynomial(module)(x)[0].numpy()
    np.testing.assert_allclose(layer.simulate(x[0].numpy()), expected, atol=1e-10)
    assert np.abs(expected - x[0].numpy()).max() > 0.1


def test_a_classifier_becomes_a_layer():
    torch.manual_seed(2)
    module = nets.Classifier(9, 5, 3, attention(), 16).double()
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    layer = he.Layer(nets.weights_of(module), module.attention.tolerance)
    with torch.no_grad():
        expected = nets.polynomial(module)(x)[0].numpy()
    np.testing.assert_allclose(layer.simulate(x[0].numpy()), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: attention(16, 3), InvalidInput, "heads: got 3, expected a divisor of d = 16"),
        (lambda: attention(epsilon=2.0), InvalidInput, "epsilon: got 2.0, expected above 0 and at most 1.0"),
        (lambda: nets.weights_of(block()), InvalidInput, "n: got None, expected a number of tokens from 1 to"),
        (lambda: nets.weights_of(torch.nn.Linear(1, 1)), UnsupportedProblem, "got Linear with NoneType"),
        (
            lambda: nets.weights_of(nets.Classifier(4, 2, 2, torch.nn.Identity(), 4)),
            UnsupportedProblem,
            "got Classifier with Identity",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_block_with_layer_normalisation_is_refused():
    module = block()
    module.norm = nets.PolynomialLayerNorm(16)
    with pytest.raises(UnsupportedProblem, match="takes PolynomialRMSNorm, got PolynomialLayerNorm"):
        nets.weights_of(module, 8)
