"""Operators as block masks: what these leave is the operator; on a GPU, what it computes is the exact answer's."""

import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, UnsupportedProblem, check_problem, evaluate, masks
from refattn.check.kernels import KERNELS
from refattn.exact import lowering
from refattn.gpu.lowered import lowered

CAUSAL = {"causal": "bottom_right"}
SPARSE = {"block_size": 16, "window_blocks": 1}
BLOCKS = tuple(tuple((a + b) % 3 == 0 for b in range(3)) for a in range(3))
OPERATORS = {
    "moba": ({"block_size": 16, "topk": 2}, CAUSAL),
    "nsa_selected": ({"block_size": 8, "topk": 3}, CAUSAL),
    "topk": ({"topk": 3, "local": 2}, CAUSAL),
    "power_blocks": (SPARSE, CAUSAL),
    "titans_mac": ({"persistent": 5, "segment": 20}, {}),
    "neighborhood": ({"shape": (8, 11), "window": (3, 4)}, {}),
    "block_sparse": ({"blocks": BLOCKS, "block_q": 32, "block_k": 32}, {"softcap": 5.0}),
    "softmax": ({}, CAUSAL | {"window": (20, 0)}),
}


def call(variant, n=88, to=np.asarray):
    rng = np.random.default_rng(0)
    options, more = OPERATORS[variant]
    q, k, v = (rng.standard_normal((1, h, n, 16)).astype(np.float32) for h in (4, 2, 2))
    q, k, v = map(to, (q[:, :, options.get("persistent", 0) :], k, v))
    return Problem(q, k, v, variant=variant, options=options, **more)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("variant", OPERATORS)
def test_what_the_blocks_and_the_rest_leave_is_the_operator(monkeypatch, variant, long):
    p = call(variant)
    want = evaluate(p, rounding="float32")
    if long:
        monkeypatch.setattr(masks, "WRITTEN", 0)
        monkeypatch.setattr(lowering, "WRITTEN", 0)
    made = lowered(p, 32, 16)
    blocks, rest = made.pop("block_mask"), made.pop("allowed")
    if variant == "softmax":
        assert blocks is None
        assert rest is None
        return
    of = np.repeat(np.repeat(blocks[0], 32, 2), 16, 3)[:, :, : p.n_q, :88]
    seen = of if rest is None else of & rest
    got = evaluate(Problem(p.query, p.key, p.value, allowed=seen, **made), rounding="float32")
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)
    padded = np.zeros((*seen.shape[:2], 96, 96), bool)
    padded[:, :, : p.n_q, :88] = seen
    tiles = padded.reshape(*seen.shape[:2], 3, 32, 6, 16).any((3, 5))
    np.testing.assert_array_equal(np.broadcast_to(blocks[0], tiles.shape), tiles)


def test_whole_blocks_leave_no_rest():
    made = lowered(call("power_blocks", 96), 16, 16)
    assert made["allowed"] is None
    assert made["causal"] == "bottom_right"
    assert not made["block_mask"][0].all()
    torch_made = lowered(call("moba", to=torch.from_numpy))
    assert {type(torch_made["allowed"]), type(torch_made["block_mask"][0])} == {torch.Tensor}


def test_what_has_no_block_mask_is_refused():
    with pytest.raises(InvalidInput, match="block_k: got 0, expected a whole number from 1 on"):
        lowered(call("moba"), 16, 0)
    p = call("softmax")
    with pytest.raises(UnsupportedProblem, match="weight: gpu\\.attention has none"):
        lowered(p.replace(weight=np.ones((1, 1, 1, 88), np.float32)))
    with pytest.raises(UnsupportedProblem, match="variant: sigmoid attention has no block mask"):
        lowered(p.replace(variant="sigmoid", window=None))


@pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
@pytest.mark.parametrize("variant", OPERATORS)
def test_the_gpu_computes_the_operator(variant):
    from refattn.gpu import attention

    def kernel(p):
        given = [torch.from_numpy(x).cuda() for x in (p.query, p.key, p.value)]
        options = lowered(p.replace(query=given[0], key=given[1], value=given[2]))
        return attention(*given, **options).cpu().numpy()

    assert not check_problem(kernel, call(variant), variant).failures
