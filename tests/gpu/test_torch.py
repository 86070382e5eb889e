"""PyTorch's graph and torch.compile: the operators' shapes without a GPU, their gradients on one."""

import pytest

from refattn import InvalidProblem
from refattn.check.kernels import KERNELS

torch = pytest.importorskip("torch")
gpu = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")


def test_a_call_is_one_operator_of_a_whole_graph():
    from refattn.gpu import attention

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, bias):
        return attention(q, k, v, causal="bottom_right", window=(3, None), bias=bias, scale=0.5).sum()

    torch._dynamo.reset()
    q = torch.zeros(1, 2, 5, 8, dtype=torch.float16)
    with pytest.raises(InvalidProblem, match="query: is on device cpu, expected a GPU"):
        torch.compile(call, backend=keep, fullgraph=True)(q, q, q, q[..., :5])
    (graph,) = graphs
    assert any("attention" in str(n.target) for n in graph.graph.nodes)


def test_shapes_of_results_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from refattn.gpu import attention

    with FakeTensorMode():
        q, k = (torch.empty(2, h, n, 64, dtype=torch.bfloat16, device="cpu") for h, n in ((4, 7), (2, 9)))
        v = torch.empty(2, 2, 9, 32, dtype=torch.bfloat16, requires_grad=True)
        out, lse = attention(q, k, v, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 4, 7, 32), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)
    assert out.requires_grad


def test_tuples_are_checked():
    from refattn.gpu import attention

    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(InvalidProblem, match="block_mask: got 5, expected a tuple of 3"):
        attention(q, q, q, block_mask=5)
    with pytest.raises(InvalidProblem, match=r"query: is on device cpu, expected a GPU"):
        attention(q, q, q)


@pytest.fixture
def on_cpu(monkeypatch):
    """The operators over a stand-in for the kernels, written in PyTorch."""
    from refattn.gpu import torch_operators

    def scores(q, k, bias, sink):
        s = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + (0 if bias is None else bias)
        column = (
            torch.full_like(s[..., :1], -torch.inf) if sink is None else sink.view(1, -1, 1, 1).expand(s[..., :1].shape)
        )
        return torch.cat([s, column], 3)

    def forward(q, k, v, *, bias, sink, **_):
        s = scores(q, k, bias, sink)
        return (torch.softmax(s, 3)[..., :-1] @ v).contiguous(), torch.logsumexp(s, 3)

    def backward(q, k, v, out, lse, dout, *, bias, sink, dlse, wanted, **_):
        p = torch.exp(scores(q, k, bias, sink) - lse[..., None])
        delta = (dout * out).sum(3, keepdim=True) - (0 if dlse is None else dlse[..., None])
        ds, scale = p[..., :-1] * (dout @ v.transpose(2, 3) - delta), q.shape[3] ** -0.5
        found = {"dq": ds @ k * scale, "dk": ds.transpose(2, 3) @ q * scale, "dv": p[..., :-1].transpose(2, 3) @ dout}
        found |= {
            "dbias": None if bias is None else ds.sum_to_size(bias.shape),
            "dsink": -(p[..., -1:] * delta).sum((0, 2, 3)),
        }
        return {n: found[n].contiguous() for n in wanted}

    monkeypatch.setattr(torch_operators, "forward", forward)
    monkeypatch.setattr(torch_operators, "attention_backward", backward)
    return forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_gradients_reach_every_input_of_a_whole_graph(on_cpu, backend):
    from refattn.gpu import attention

    torch.manual_seed(0)
    leaves = [
        torch.randn(s, requires_grad=True) for s in ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 4), (1, 2, 1, 7), (2,))
    ]

    def call(q, k, v, bias, sink):
        out, lse = attention(q * 2, k, v, bias=bias, sink=sink, return_lse=True)
        return (out**2).sum() + lse.sum()

    def direct(q, k, v, bias, sink):
        out, lse = on_cpu(q * 2, k, v, bias=bias, sink=sink)
        return (out**2).sum() + lse.sum()

    torch._dynamo.reset()
    expected = torch.autograd.grad(direct(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(call, backend=backend, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(call(*leaves), leaves), expected)
    (only,) = torch.autograd.grad(call(*leaves), leaves[3:4])
    torch.testing.assert_close(only, expected[3])


def test_the_operators_keep_their_contract_without_a_gpu(on_cpu):
    from refattn.gpu import torch_operators

    assert torch_operators.needed(torch.zeros(1, requires_grad=True))
    assert not torch_operators.needed(torch.zeros(1))
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7, 7))
    rest = (None,) * 10 + (None, 0, 0, None, "fast", False)
    torch.library.opcheck(torch.ops.refattn.attention.default, (q, k, v, *rest))


@gpu
def test_gradients_flow():
    from refattn.gpu import attention, attention_backward

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 70, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    bias, sink = torch.randn(1, 4, 1, 70, device="cuda"), torch.randn(4, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, bias, sink)]
    options = {"bias": bias, "sink": sink, "causal": "bottom_right", "window": [30, None]}
    dout = torch.randn_like(q)
    out, lse = attention(q, k, v, **options, return_lse=True)
    found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    detached = {n: x.detach() if hasattr(x, "detach") else x for n, x in options.items()}
    given = [x.detach() for x in (q, k, v, out, lse)]
    expected = attention_backward(*given, dout, **detached)
    for n, x in zip(("dq", "dk", "dv", "dbias", "dsink"), found, strict=True):
        assert torch.equal(x, expected[n])
    out.sum().backward(retain_graph=True)  # a gradient with strides of 0
    assert all(x.grad is not None for x in leaves)
    (only,) = torch.autograd.grad(lse.sum(), [sink])  # of lse alone: the sink's weights
    weight = torch.exp(sink.detach()[None, :, None] - lse.detach()).sum((0, 2))
    torch.testing.assert_close(only, weight, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pickle looks into all modules, mpmath's old ones too
def test_a_compiled_call_gives_the_same_bits():
    from refattn.gpu import attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 130, 64, device="cuda", dtype=torch.float16).requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 50, 130], device="cuda", dtype=torch.int32)

    def call(q, k, v):
        return attention(q * 2, k, v, causal="top_left", cu_seqlens=(cu, cu), softcap=5.0)

    torch._dynamo.reset()
    found = []
    for f in (call, torch.compile(call, fullgraph=True)):
        out = f(q, k, v)
        found.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@gpu
def test_the_operators_keep_their_contract():
    from refattn.gpu import torch_operators

    q = torch.randn(1, 2, 20, 32, device="cuda", dtype=torch.float64, requires_grad=True)
    rest = (None,) * 7 + ("bottom_right", None, None, None, 0, 0, None, "fast", False)
    assert torch_operators.needed(q)
    torch.library.opcheck(torch.ops.refattn.attention.default, (q, q, q, *rest))


def test_a_second_derivative_is_refused(on_cpu):
    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7, 7))
    (dq,) = torch.autograd.grad((attention(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"through refattn\.attention_backward.*no autograd formula"):
        torch.autograd.grad(dq.sum(), q)


def test_a_term_in_place_of_a_bias_is_refused():
    from refattn.gpu import attention, attention_backward
    from refattn.rules.terms import alibi

    q, bias = torch.zeros(1, 2, 5, 8), alibi([0.5, 0.25])
    for call in (lambda: attention(q, q, q, bias=bias), lambda: attention_backward(*(q,) * 6, bias=bias)):
        with pytest.raises(InvalidProblem, match=r"bias: got a term .*; pass term.written\(batch, heads, n_q, n_k\)"):
            call()


@gpu
def test_gradients_are_those_of_differences():
    """PyTorch's own check in float64, of every input at once."""
    from refattn.gpu import attention

    torch.manual_seed(0)
    sizes = ((1, 2, 5, 8), (1, 1, 7, 8), (1, 1, 7, 4), (1, 2, 1, 7), (2,))
    leaves = [torch.randn(s, device="cuda", dtype=torch.float64, requires_grad=True) for s in sizes]

    def call(q, k, v, bias, sink):
        return attention(q, k, v, bias=bias, sink=sink, causal="bottom_right", softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(call, leaves)
