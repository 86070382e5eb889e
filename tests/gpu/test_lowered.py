"""Operators as block masks: what these leave is the operator; on a GPU, what it computes is the exact answer's."""

import sys

import numpy as np
import pytest
import torch

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, check_problem, evaluate, masks
from refattn.check.kernels import KERNELS
from refattn.exact import lowering
from refattn.gpu import attention
from refattn.gpu.lowered import lowered
from refattn.gpu.plan import plan
from refattn.variants.view_local import view

lowered_module = sys.modules[lowered.__module__]

CAUSAL = {"causal": "bottom_right"}
SPARSE = {"block_size": 16, "window_blocks": 1}
BLOCKS = tuple(tuple((a + b) % 3 == 0 for b in range(3)) for a in range(3))
OPERATORS = {
    "moba": ({"block_size": 16, "topk": 2}, CAUSAL),
    "nsa_selected": ({"block_size": 8, "topk": 3}, CAUSAL),
    "topk": ({"topk": 3, "local": 2}, CAUSAL),
    "dsa": ({"topk": 20}, CAUSAL),
    "seer": ({"block_size": 16, "ratio": 0.5}, CAUSAL),
    "power_blocks": (SPARSE, CAUSAL),
    "titans_mac": ({"persistent": 5, "segment": 20}, {}),
    "neighborhood": ({"shape": (8, 11), "window": (3, 4)}, {}),
    "view_local": ({"projection": view(56, 30.0, ahead=True), "image": 56, "patches": 8, "radius": 2.0}, {}),
    "block_sparse": ({"blocks": BLOCKS, "block_q": 32, "block_k": 32}, {"softcap": 5.0}),
    "softmax": ({}, CAUSAL | {"window": (20, 0)}),
}


def call(variant, n=88, to=np.asarray):
    rng = np.random.default_rng(0)
    options, more = OPERATORS[variant]
    q, k, v = (rng.standard_normal((1, h, n, 16)).astype(np.float32) for h in (4, 2, 2))
    first = n - 64 if variant == "view_local" else options.get("persistent", 0)  # 64 voxels are a cube
    q, k, v = map(to, (q[:, :, first:], k, v))
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
    padded = np.zeros((*seen.shape[:2], 32 * blocks[0].shape[2], 96), bool)
    padded[:, :, : p.n_q, :88] = seen
    tiles = padded.reshape(*seen.shape[:2], -1, 32, 6, 16).any((3, 5))
    np.testing.assert_array_equal(np.broadcast_to(blocks[0], tiles.shape), tiles)


def test_whole_blocks_leave_no_rest():
    made = lowered(call("power_blocks", 96), 16, 16)
    assert made["allowed"] is None
    assert made["causal"] == "bottom_right"
    assert not made["block_mask"][0].all()
    torch_made = lowered(call("moba", to=torch.from_numpy))
    assert {type(torch_made["allowed"]), type(torch_made["block_mask"][0])} == {torch.Tensor}


@pytest.mark.parametrize("variant", ["moba", "topk", "neighborhood"])
def test_bits_of_blocks_are_the_rest(variant):
    p = call(variant, to=lambda x: torch.from_numpy(np.float32(x)).to(torch.bfloat16))
    blocks, *size, bits = lowered(p, 64, 32)["block_mask"]
    words = bits.numpy().view(np.uint32)
    assert (size, words.shape[1:], lowered(p, 64, 32)["allowed"]) == ([64, 32], (64, 1), None)
    mask, keys = evaluate(p, rounding="float32").core.allowed, np.arange(88)
    mask = np.broadcast_to(mask if isinstance(mask, np.ndarray) else mask.written(1, 4, 88, 88), (1, 4, 88, 88))
    for b, h, i, j in np.ndindex(1, 4, 88, 88):
        kind = int(blocks[b, h if blocks.shape[1] > 1 else 0, i // 64, j // 32])
        seen = kind == 1 or (kind > 1 and words[kind - 2, i % 64, 0] >> keys[j] % 32 & 1)
        assert bool(seen) == mask[b, h, i, j]
    found = plan(p.replace(variant="softmax", options={}), block_mask=(blocks, *size, bits))
    assert (found.impl, found.macros["BLOCKS"]) == ("mma", 3)
    learning = p.replace(query=p.query.clone().requires_grad_())
    for other, sizes in ((learning, (64, 32)), (p, (64, 48)), (p, (32, 32))):
        made = lowered(other, *sizes)
        assert len(made["block_mask"]) == 3
        assert made["allowed"] is not None


def test_bits_that_do_not_fit_are_named():
    p = call("softmax", 64, lambda x: torch.from_numpy(np.float32(x)).to(torch.bfloat16))
    blocks, bits = torch.ones((1, 1, 1, 2), dtype=torch.int32), torch.zeros((3, 64, 1), dtype=torch.int32)
    for mask, text in [
        ((blocks.bool(), 64, 32, bits), "got dtype bool, expected int32 with bits of blocks"),
        ((blocks, 64, 32, bits[:, :32]), r"got bits of shape \(3, 32, 1\), expected \(tiles, 64, 1\)"),
        ((blocks, 64, 32, bits, 1), r"expected \(blocks, block_q, block_k\), or bits of blocks as a fourth"),
    ]:
        with pytest.raises(InvalidProblem, match=f"block_mask: {text}"):
            plan(p, block_mask=mask)
    for impl, text in (("simt", "takes no bits of blocks"), ("sm90", "takes block masks without window, bits of")):
        with pytest.raises(UnsupportedProblem, match=text):
            plan(p, block_mask=(blocks, 64, 32, bits), impl=impl)


def test_bits_have_no_gradients():
    q = torch.zeros((1, 1, 64, 16), dtype=torch.bfloat16, requires_grad=True)
    blocks, bits = torch.ones((1, 1, 1, 2), dtype=torch.int32), torch.zeros((3, 64, 1), dtype=torch.int32)
    with pytest.raises(UnsupportedProblem, match="block_mask: has no gradients with bits of blocks"):
        attention(q, q, q, block_mask=(blocks, 64, 32, bits))


def test_more_booleans_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(lowered_module, "MOST", 4 * 88 * 88 - 1)
    with pytest.raises(UnsupportedProblem, match="allowed: needs 4 times 88 by 88 booleans; bits of blocks take their"):
        lowered(call("moba"))


def test_what_has_no_block_mask_is_refused():
    with pytest.raises(InvalidInput, match="block_k: got 0, expected a whole number from 1 on"):
        lowered(call("moba"), 16, 0)
    p = call("softmax")
    with pytest.raises(UnsupportedProblem, match="weight: gpu\\.attention has none"):
        lowered(p.replace(weight=np.ones((1, 1, 1, 88), np.float32)))
    seeds = {"dropout_p": 0.5, "philox_layout": "flash", "philox_seed": 1, "philox_offset": 0}
    for name, more in (("dropout_p", seeds), ("out_dtype", {"out_dtype": "float16"})):
        with pytest.raises(UnsupportedProblem, match=f"{name}: gpu\\.attention has none"):
            lowered(p.replace(**more))
    with pytest.raises(InvalidInput, match="problem: got int, expected a Problem"):
        lowered(3)
    with pytest.raises(UnsupportedProblem, match="variant: sigmoid attention has no block mask"):
        lowered(p.replace(variant="sigmoid", window=None))


@pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("variant", OPERATORS)
def test_the_gpu_computes_the_operator(variant, dtype):
    def kernel(p):
        given = [torch.from_numpy(x).cuda() for x in (p.query, p.key, p.value)]
        options = lowered(p.replace(query=given[0], key=given[1], value=given[2]))
        return attention(*given, **options).cpu().numpy()

    assert not check_problem(kernel, call(variant, to=lambda x: x.astype(dtype)), variant).failures
