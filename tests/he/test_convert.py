"""One's own model converted: weights kept, the same numbers where nothing changed, ranges measured, what was left."""

import copy

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, he

from .make import problem

torch = pytest.importorskip("torch")
nets = pytest.importorskip("refattn.he.torch")
nn, functional = torch.nn, torch.nn.functional
EPS = 2.0**-52


def drawn(module, seed=0):
    """Return a module with all its numbers drawn, in float64."""
    torch.manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) / max(1, x.shape[-1]) ** 0.5)
    return module


def stock(layers=None, d=16, norm_first=True, activation="gelu", norm=None):
    layer = nn.TransformerEncoderLayer(d, 2, 24, 0.0, activation, batch_first=True, norm_first=norm_first)
    if layers is None:
        return drawn(layer)
    return drawn(nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False))


def soft(module):
    """Let converted attention be the softmax it replaces: nothing else may differ."""
    nets.anneal(module, 0.0)
    return module


def near(a, b, size=1e4):
    """Tell whether two computations of some thousand operations in float64 agree: 1e4 roundings of their largest."""
    return float((a - b).detach().abs().max()) <= size * EPS * float(b.detach().abs().max())


def tokens(d=16, centred=True):
    x = torch.randn(3, 5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x - x.mean(-1, keepdim=True) if centred else x


@pytest.mark.parametrize("layers", [None, 1, 3])
@pytest.mark.parametrize("activation", ["gelu", functional.silu])
def test_layers_that_normalise_first_become_blocks_of_the_same_numbers(layers, activation):
    model = stock(layers, activation=activation)
    before = copy.deepcopy(model.state_dict())
    done = nets.convert(model)
    assert isinstance(done.model, nets.Block if layers is None else nets.Encoder)
    assert (done.encryptable, done.left) == (True, {})
    assert "of tokens without their mean over features" in str(done)
    x = tokens(centred=False)
    expected = model(x)
    found = soft(done.model)(x)
    # of a residual that is centred only the mean is not there
    assert near(found, expected - expected.mean(-1, keepdim=True))
    nets.anneal(done.model, 1.0)
    assert not near(done.model(x), expected - expected.mean(-1, keepdim=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_converted_encoder_is_computed_on_ciphertexts():
    done = nets.convert(stock(2), tolerance=1e-3)
    x = tokens(centred=False)  # the client takes the mean over features out, as the model does
    ranges = he.ranges(done.model, x, margin=0.1)
    assert set(ranges) == {f"blocks.{k}.{n}" for k in (0, 1) for n in ("attention", "norm", "activation")} | {
        "blocks.1.first"
    }
    weights = nets.weights_of(done.model, 5)
    assert len(weights.blocks) == 2
    made = he.Encoder(weights, 1e-3)
    assert made.plan.centred
    with torch.no_grad():
        exact = done.model(x)
        stand_in = nets.polynomial(done.model)(x)
    for a, b in zip(x.numpy(), stand_in.numpy(), strict=True):
        assert np.abs(made.simulate(a) - b).max() <= 1e5 * EPS * np.abs(b).max()
    assert 0 < float((stand_in - exact).abs().max()) < 0.2 * float(exact.abs().max())
    with pytest.raises(
        InvalidProblem, match=r"x: its tokens have a root mean square of .* that a refresh is right for"
    ):
        made.plan.encoded(1e6 * x[0].numpy())
    with pytest.raises(InvalidProblem, match="x: got Tensor, expected an array of real numbers"):
        made.plan.encoded(x[0].requires_grad_())
    with pytest.raises(InvalidProblem, match="x: got ndarray, expected an array of real numbers"):
        made.plan.encoded(1j * x[0].detach().numpy())


@pytest.mark.parametrize("layers", [None, 1])
def test_what_no_ring_has_slots_for_is_said(layers):
    weights = nets.weights_of(nets.convert(stock(layers, 64)).model, 512)
    with pytest.raises(
        UnsupportedProblem, match="slots, and no ring at 128 bits of security has more than 16384: take"
    ):
        (he.Layer if layers is None else he.Encoder)(weights)


def test_layers_that_normalise_last_are_converted_by_parts():
    for activation in ("gelu", "relu"):
        model = stock(2, norm_first=False, activation=activation)
        done = nets.convert(model)
        assert not done.encryptable
        assert "normalises after the residual" in done.left["layers.0"]
        kinds = {type(m).__name__ for m in done.model.modules()}
        assert {"PowerMultiheadAttention", "PolynomialLayerNorm"} <= kinds
        assert ("PolynomialActivation" in kinds) == (activation == "gelu")
        x = tokens(centred=False)
        assert near(soft(done.model)(x), model(x))
        nets.anneal(done.model, 1.0)
        assert not near(done.model(x), model(x))
        with torch.no_grad():
            assert not near(done.model.eval()(x), model(x))  # the fused kernel, which knows softmax only, is not taken
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        found, expected = (m(x, src_key_padding_mask=padding) for m in (soft(done.model), model))
        assert near(found, expected)


def hooked(module):
    module.register_forward_hook(lambda module, args, out: 3 * out)
    return module


def with_eps(layer):
    layer.norm2.eps = 1e-3
    return layer


def with_rms(layer):
    layer.norm1, layer.norm2 = (drawn(nn.RMSNorm(16, eps=1e-5)) for _ in range(2))
    return layer


class Twice(nn.TransformerEncoderLayer):
    def forward(self, *args, **more):
        return 2 * super().forward(*args, **more)


@pytest.mark.parametrize("change", ["norm", "hook", "again"])
def test_pytorchs_encoder_runs_where_its_layers_cannot_become_blocks(change):
    model = stock(2, norm=drawn(nn.LayerNorm(16)) if change == "norm" else None)
    if change == "hook":
        hooked(model.layers[1])
    if change == "again":
        model.layers[1] = model.layers[0]
    done = nets.convert(model)
    assert type(done.model) is nn.TransformerEncoder
    assert done.left
    x = tokens(centred=False)
    with torch.no_grad():
        assert near(soft(done.model)(x), model(x))


def test_what_is_met_again_stays_one():
    part = nn.GELU()
    made = nets.convert(nn.Sequential(part, nn.Linear(2, 2), part)).model
    assert made[0] is made[2]


def test_a_converted_model_refuses_masks():
    x = tokens()
    for layers, name in ((2, "Encoder"), (None, "Block")):
        made = nets.convert(stock(layers)).model
        made(x, None, is_causal=False)
        with pytest.raises(
            UnsupportedProblem, match=f"a converted {name} takes tokens alone, got src_key_padding_mask"
        ):
            made(x, src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))
        with pytest.raises(UnsupportedProblem, match="got a mask"):
            made(x, torch.zeros(5, 5))


def test_what_has_nothing_to_change_says_so():
    assert str(nets.convert(nn.Linear(2, 2))).startswith("nothing was found to change: what a forward calls")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"p": 3}, "p: got 3, expected one of 2, 4, 6, 8"),
        ({"p": True}, "p: got True, expected one of"),
        ({"epsilon": 0}, "epsilon: got 0, expected a number above 0"),
        ({"tolerance": float("nan")}, "tolerance: got nan, expected a number above 0"),
        ({"margin": "a"}, "margin: got 'a', expected from 0 to below 1"),
        ({"causal": 1}, "causal: got 1, expected True or False"),
        ({"data": torch.full((1, 5, 16), torch.nan, dtype=torch.float64)}, "data: has numbers that are not finite"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(given, text):
    with pytest.raises(InvalidInput, match=text):
        nets.convert(stock(), **given)


def test_weights_that_mean_nothing_are_refused():
    block = nets.convert(stock()).model
    for n in (0, -1, 2.5, "4", True, 10**9):
        with pytest.raises(InvalidInput, match=r"n: got .*, expected a number of tokens from 1 to 16384"):
            nets.weights_of(block, n)
    nets.anneal(block, 0.75)
    with pytest.raises(InvalidInput, match=r"its attention is softmax still, by a share of 0\.25"):
        nets.weights_of(block, 4)
    nets.anneal(block, 1.0)
    with pytest.raises(InvalidInput, match=r"weights: got Weights, expected EncoderWeights; he\.Layer takes one block"):
        he.Encoder(nets.weights_of(block, 4))
    with pytest.raises(InvalidInput, match=r"weights: got EncoderWeights, expected Weights; he\.Encoder takes several"):
        he.Layer(nets.weights_of(nets.convert(stock(1)).model, 4))
    with pytest.raises(InvalidInput, match=r"head: got Sequential, expected nn\.Linear or None"):
        nets.Encoder([block], nn.Sequential())
    head = nets.Encoder([block], nn.Linear(16, 3, bias=False).double())
    assert nets.weights_of(head, 4).head_bias.tolist() == [0, 0, 0]
    with torch.no_grad():
        block.up.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="up: has numbers that are not finite; training left them there"):
        he.Layer(nets.weights_of(block, 4))


def test_what_cannot_be_converted_is_said():
    for model, name, text in (
        (stock(2, activation="relu"), "layers.1", "activation relu: expected GELU or SiLU"),
        (stock(1, norm=nn.LayerNorm(16)), "norm", "after the last layer is not computed on ciphertexts"),
        (stock(norm_first=False), "", "normalises after the residual"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", "ReLU has no polynomial here"),
        (nn.Sequential(nn.LayerNorm((2, 3))), "0", "normalises 2 axes"),
        (nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3)), "0", "keys of another size"),
        (nn.Sequential(nn.GELU("tanh")), "0", "GELU by tanh"),
        (stock(activation=nn.GELU("tanh")), "", "GELU by tanh"),
        (drawn(nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", norm_first=True)), "", "batch_first=True"),
        (with_eps(stock()), "", "have eps 1e-05 and 0.001: a block has one"),
        (hooked(stock()), "", "has a forward or hooks of its own"),
        (Twice(16, 2, 24, 0.0, "gelu", norm_first=True, batch_first=True), "", "has a forward or hooks of its own"),
        (nn.Sequential(hooked(nn.LayerNorm(4))), "0", "has a forward or hooks of its own"),
        (nn.Sequential(*[stock()] * 2), "1", "the same layer again: two blocks have weights of their own"),
        (nn.Sequential(stock(), with_rms(stock())), "the whole", "some layers take the mean away and others do not"),
    ):
        name = "" if name == "the whole" else name
        done = nets.convert(model)
        assert text in done.left[name], done.left
        assert f"left: {name or 'the model'}: " in str(done)
        assert done.recipe in str(done)
    with pytest.raises(InvalidInput, match=r"model: got int, expected a torch\.nn\.Module"):
        nets.convert(3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_anywhere_keeps_weights_and_masks(batch_first, bias):
    model = drawn(nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first))
    done = soft(nets.convert(nn.ModuleList([model])).model)[0]
    x = tokens(centred=False)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for more in (
        {},
        {"attn_mask": causal},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "key_padding_mask": padding},
    ):
        expected, _ = model(x, x, x, need_weights=False, **more)
        assert near(done(x, x, x, **more)[0], expected)
    each = torch.zeros(12, 5, 5, dtype=torch.bool)
    each[3, :, 1:] = True
    assert near(done(x, x, x, attn_mask=each)[0], model(x, x, x, need_weights=False, attn_mask=each)[0])
    for call, text in (
        (lambda: done(x, x + 1, x), "to itself"),
        (lambda: done(x, x, x, need_weights=True), "returns no weights"),
        (lambda: done(x, x, x, attn_mask=torch.ones(5, 5)), "masks that hide keys"),
    ):
        with pytest.raises(UnsupportedProblem, match=text):
            call()


def test_a_hidden_key_has_no_weight():
    module = nets.PowerSoftmaxAttention(16, 2, denominator=(1.0, 99.0), tolerance=1e-3).double()
    x = tokens()
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[:, 4] = True
    y = x.clone()
    y[:, 4] = 7.0
    assert torch.equal(module(x, hidden)[:, :4], module(y, hidden)[:, :4])
    assert not torch.equal(module(x)[:, :4], module(y)[:, :4])
    assert torch.equal(module(x, torch.ones(5, 5, dtype=torch.bool).triu(1)), drawn_like(module, causal=True)(x))


def drawn_like(module, **change):
    other = copy.deepcopy(module)
    for name, value in change.items():
        setattr(other, name, value)
    return other


class ViTSelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x, mask=None):
        q, k, v = (
            f(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        return (functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2),)


class Dense(nn.Module):
    def __init__(self, a, b, **more):
        super().__init__()
        self.dense = nn.Linear(a, b)
        for name, part in more.items():
            setattr(self, name, part)


class ViTLayer(nn.Module):
    """As Hugging Face's is laid out (recalled)."""

    def __init__(self, d=16, heads=2, hidden=24):
        super().__init__()
        self.attention = nn.Module()
        self.attention.attention, self.attention.output = ViTSelfAttention(d, heads), Dense(d, d)
        self.intermediate = Dense(d, hidden, intermediate_act_fn=nn.GELU())
        self.output = Dense(hidden, d)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(d, 1e-12), nn.LayerNorm(d, 1e-12)

    def forward(self, x):
        x = x + self.attention.output.dense(self.attention.attention(self.layernorm_before(x))[0])
        inner = self.intermediate
        return x + self.output.dense(inner.intermediate_act_fn(inner.dense(self.layernorm_after(x))))


class BertLayer(nn.Module):
    """As Hugging Face's is laid out (recalled): normalised after the residual."""

    def __init__(self, d=16, heads=2, hidden=24):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = type("BertSelfAttention", (ViTSelfAttention,), {})(d, heads)
        self.attention.output = Dense(d, d, LayerNorm=nn.LayerNorm(d))
        self.intermediate = Dense(d, hidden, intermediate_act_fn=nn.GELU())
        self.output = Dense(hidden, d, LayerNorm=nn.LayerNorm(d))

    def forward(self, x, mask=None):
        out, inner = self.attention.output, self.intermediate
        x = out.LayerNorm(out.dense(self.attention.self(x, mask)[0]) + x)
        return self.output.LayerNorm(self.output.dense(inner.intermediate_act_fn(inner.dense(x))) + x)


def test_a_vits_layers_become_an_encoder():
    model = drawn(nn.Sequential(ViTLayer(), ViTLayer()))
    done = nets.convert(model)
    assert isinstance(done.model, nets.Encoder)
    x = tokens(centred=False)
    expected = model(x)
    assert near(soft(done.model)(x), expected - expected.mean(-1, keepdim=True))
    assert isinstance(nets.convert(model[0]).model, nets.Block)


def test_a_berts_layer_is_converted_by_parts():
    model = drawn(BertLayer())
    done = nets.convert(model)
    assert set(done.changed) == {
        "attention.self", "attention.output.LayerNorm", "intermediate.intermediate_act_fn", "output.LayerNorm",
    }  # fmt: skip
    x = tokens(centred=False)
    mask = torch.zeros(3, 1, 1, 5, dtype=torch.float64)
    mask[1, ..., 2:] = -1e300
    assert near(soft(done.model)(x), model(x))
    assert near(done.model(x, mask), model(x, mask))
    assert not near(done.model(x), model(x, mask))


def test_a_converted_model_is_trained_from_softmax_to_the_power():
    """The recipe on a small task: the loss falls, ranges are kept, and the polynomials compute what was trained."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8)
    target = x.roll(1, 1)[..., :2].mean((1, 2)) + x[:, 0, 0]
    done = nets.convert(nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True), 2,
        enable_nested_tensor=False,
    ), x)  # fmt: skip
    model, head = done.model, nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    losses = []
    for step in range(60):
        nets.anneal(model, min(1.0, step / 30))
        loss = (head(model(x).mean(1))[:, 0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + nets.range_penalty(model)).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    he.ranges(model, x)
    with torch.no_grad():
        exact, stand_in = model(x), nets.polynomial(model)(x)
    assert float((stand_in - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_ranges_of_parts_are_what_they_see():
    model = nn.Sequential(nets.PolynomialActivation("gelu"), nets.PolynomialRMSNorm(4)).double()
    x = torch.tensor([[[-3.0, 1.0, 2.0, 0.5]]], dtype=torch.float64)
    found = he.ranges(model, x, margin=0.5)
    square = float(functional.gelu(x).square().mean()) + 1e-5
    assert found["0"] == (-4.5, 4.5)
    assert np.abs(np.array(found["1"]) / square - (0.5, 1.5)).max() < 1e-9
    assert (model[0].stand_in.most, model[1].stand_in.high) == (4.5, found["1"][1])
    for margin in (-0.1, 1.0, float("nan"), "x"):
        with pytest.raises(InvalidInput, match=r"margin: got .*, expected from 0 to below 1"):
            he.ranges(model, x, margin=margin)
    with pytest.raises(InvalidInput, match="k: got no data"):
        he.ranges(model)
    with pytest.raises(InvalidInput, match="data: has numbers that are not finite"):
        he.ranges(model, x * float("inf"))
    with pytest.raises(
        UnsupportedProblem, match=r"0: activation: gelu .*; it sees -3e\+06 to 2e\+06: train with range_penalty, or"
    ):
        he.ranges(model, x * 1e6)


@pytest.mark.parametrize("more", [{}, {"causal": "bottom_right"}, {"scale": 0.7}, {"p": 4}])
def test_ranges_are_what_a_plan_takes(more):
    x = problem(5, 7, 6, heads=2, batch=2, epsilon=0.5, **more)
    found = he.ranges(x)
    p, scale = more.get("p", 2), more.get("scale", 6**-0.5)
    sums = (scale * np.einsum("bhid,bhjd->bhij", x.query, x.key)) ** p
    if "causal" in more:
        sums = np.tril(sums, 2)
    sums = sums.sum(3) + 0.5
    # sums of 7 powers of sums of 6 products: some 60 roundings, in another order
    assert np.abs(found["denominator"] / np.array([max(0.5, sums.min() * 0.8), sums.max() * 1.2]) - 1).max() < 60 * EPS
    assert found["value_most"] == np.abs(x.value).max() * 1.2
    assert found["norms"][1] == np.linalg.norm(x.key, axis=3).max() * 1.2
    plan = he.plan(5, 7, 6, heads=4, **found, tolerance=1.0)
    plan.encoded(x)  # what was measured is in range
    again = he.ranges(x.query, x.key, x.value, epsilon=0.5, **more)
    assert again == found
    with pytest.raises(InvalidProblem, match="beyond the plan's"):
        plan.encoded(x.replace(value=x.value * 1.3))


def test_ranges_of_what_has_none_are_refused():
    x = problem(3, 3, 4)
    zero = Problem(0 * x.query, x.key, x.value, variant="power", options={"p": 2, "epsilon": 0.0})
    with pytest.raises(InvalidInput, match="its least denominator is 0; choose an epsilon above 0"):
        he.ranges(zero)
    with pytest.raises(InvalidInput, match="expected all three, or a Problem"):
        he.ranges(x.query)
    with pytest.raises(InvalidInput, match="pass either a Problem, or queries"):
        he.ranges(x, p=2)
    with pytest.raises(InvalidInput, match="not finite"):
        he.ranges(x.query * np.inf, x.key, x.value)
