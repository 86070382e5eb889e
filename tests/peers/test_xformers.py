"""xformers' reference, `ref_attention`, under each of its masks, beside the calls that say the same."""

import numpy as np
import pytest

from refattn import MismatchError, Problem
from refattn.check.kernels import find

from ..conftest import tensor
from .references import Call

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
WHY = "xformers is not installed: pip install --no-deps xformers"
utils = pytest.importorskip("xformers.attn_bias_utils", reason=WHY)
masks = pytest.importorskip("xformers.ops.fmha.attn_bias", reason=WHY)

H, D, N_Q, N_K = 2, 8, 7, 12
Q, K, ROOM = [2, 4, 1], [5, 4, 3], [6, 6, 6]
ENDS = {"cu_seqlens_q": np.array([0, 2, 6, 7], np.int32), "cu_seqlens_k": np.array([0, 5, 9, 12], np.int32)}
GAPS = {
    "cu_seqlens_q": ENDS["cu_seqlens_q"],
    "cu_seqlens_k": np.array([0, 6, 12, 18], np.int32),
    "lengths_q": np.array(Q, np.int32),
    "lengths_k": np.array(K, np.int32),
}
PADDED = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
CALLS = {
    "none": (lambda: None, {}),
    "LowerTriangularMask": (masks.LowerTriangularMask, {"causal": "top_left"}),
    "LowerTriangularFromBottomRightMask": (masks.LowerTriangularFromBottomRightMask, {"causal": "bottom_right"}),
    "LowerTriangularFromBottomRightLocalAttentionMask": (
        lambda: masks.LowerTriangularFromBottomRightLocalAttentionMask(3),
        {"causal": "bottom_right", "window": (2, None)},
    ),
    "LocalAttentionFromBottomRightMask": (
        lambda: masks.LocalAttentionFromBottomRightMask(3, 1),
        {"window": (3, 1)},
    ),
    "BlockDiagonalMask": (lambda: masks.BlockDiagonalMask.from_seqlens(Q, K), ENDS),
    "BlockDiagonalCausalMask": (
        lambda: masks.BlockDiagonalCausalMask.from_seqlens(Q, K),
        ENDS | {"causal": "top_left"},
    ),
    "BlockDiagonalCausalFromBottomRightMask": (
        lambda: masks.BlockDiagonalCausalFromBottomRightMask.from_seqlens(Q, K),
        ENDS | {"causal": "bottom_right"},
    ),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (
        lambda: PADDED.from_seqlens(q_seqlen=Q, kv_padding=ROOM[0], kv_seqlen=K),
        GAPS | {"causal": "bottom_right"},
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        lambda: masks.BlockDiagonalMask.from_seqlens(Q, K).make_local_attention_from_bottomright(3),
        ENDS | {"causal": "bottom_right", "window": (2, None)},
    ),
}


def called(name):
    make, more = CALLS[name]
    rng, n_k = np.random.default_rng(0), sum(ROOM) if "Padded" in name else N_K
    q, k, v = (tensor(rng, (1, H, n, D)) for n in (N_Q, n_k, n_k))
    out = utils.ref_attention(*(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), make(), scale=0.4)
    p = Problem(q, k, v, 0.4, **more)
    return Call(name, p, out.transpose(1, 2).numpy(), find("torch-sdpa-math")[0].model("float32"))


@pytest.mark.parametrize("name", CALLS)
def test_they_agree(name):
    called(name).judge()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("LowerTriangularMask", {"causal": "bottom_right"}),
        ("LowerTriangularFromBottomRightLocalAttentionMask", {"window": (3, None)}),
        ("LocalAttentionFromBottomRightMask", {"window": (2, 1)}),
        ("BlockDiagonalCausalMask", {"causal": "bottom_right"}),
        ("BlockDiagonalCausalWithOffsetPaddedKeysMask", {"lengths_k": None}),
    ],
)
def test_another_reading_differs(name, wrong):
    call = called(name)
    with pytest.raises(MismatchError):
        Call(name, call.problem.replace(**wrong), call.out, call.model).judge()


def test_a_row_that_sees_no_key_is_nan_there():
    mask = masks.LowerTriangularFromBottomRightMask()
    q, k, v = (torch.ones(1, n, 1, 4) for n in (3, 2, 2))
    out = utils.ref_attention(q, k, v, mask)
    assert out[0, 0].isnan().all()
    assert (out[0, 1:] == 1).all()
