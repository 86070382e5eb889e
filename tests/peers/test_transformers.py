"""The plain attention functions of transformers' models, with its masks and caches, beside the calls that say the same.

Theirs of Llama, Gemma 2 (softcap) and gpt-oss (sinks) are `eager_attention_forward`; masks and keys come from what a
model calls: `create_causal_mask`, `create_sliding_window_causal_mask`, a cache that grows or has its length.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from refattn import MismatchError, Problem
from refattn.check.kernels import find

from ..conftest import tensor
from .references import Call

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own
WHY = "transformers is not installed: pip install transformers"
transformers = pytest.importorskip("transformers", reason=WHY)
theirs = {
    n: pytest.importorskip(f"transformers.models.{n}.modeling_{n}", reason=WHY).eager_attention_forward
    for n in ("llama", "gemma2", "gpt_oss")
}
masks = transformers.masking_utils

B, H, H_KV, D, PAST, NEW, ROOM, WINDOW = 2, 4, 2, 8, 5, 3, 12, 4
SIZES = {"num_attention_heads": H, "num_key_value_heads": H_KV, "head_dim": D, "num_hidden_layers": 2}
CALLS = ("prefill", "window", "growing", "growing window", "static", "static window")


def config():
    """Return Gemma 2's, whose first layer has a window and whose second has none."""
    more = {"hidden_size": H * D, "sliding_window": WINDOW, "vocab_size": 8, "intermediate_size": 8}
    return transformers.Gemma2Config(**SIZES, **more, attn_implementation="eager")


def given(kind, dtype, rng):
    """Return queries, keys and values as a layer gets them, its mask, and what refattn calls that mask."""
    windowed, cache = "window" in kind, None
    whole = [tensor(rng, (B, H_KV, PAST + NEW, D), dtype) for _ in range(2)]
    made = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in whole]
    if kind.startswith("growing"):
        cache = transformers.DynamicCache(config=config())
    elif kind.startswith("static"):
        cache = transformers.StaticCache(config=config(), max_cache_len=ROOM)
    layer, rows = 0 if windowed else 1, PAST + NEW if cache is None else NEW
    if cache is not None:
        for i in range(2):
            cache.update(*(x[:, :, :PAST] for x in made), i)
    make = masks.create_sliding_window_causal_mask if windowed else masks.create_causal_mask
    mask = make(config(), torch.zeros(B, rows, H * D, dtype=made[0].dtype), None, cache)
    if cache is not None:
        made = list(cache.update(*(x[:, :, PAST:] for x in made), layer))
    more = {"causal": "bottom_right"} | ({"window": (WINDOW - 1, 0)} if windowed else {})
    if kind == "static":  # a layer with a window hands out no more keys than there are
        more["lengths_k"] = np.full(B, PAST + NEW, np.int32)
    query = tensor(rng, (B, H, rows, D), dtype)
    q = torch.from_numpy(query.astype(np.float32)).to(made[0].dtype)
    back = [x.float().numpy().astype(query.dtype) for x in made]
    return (q, *made, mask), (query, *back), more


def called(name, kind, dtype, seed=0):
    """Return a call of one model's function."""
    rng = np.random.default_rng(seed)
    args, parts, more = given(kind, dtype, rng)
    module = SimpleNamespace(num_key_value_groups=H // H_KV, training=False, head_dim=D)
    options = {"scaling": 0.3}
    if name == "gemma2":
        options["softcap"] = more["softcap"] = 2.0
    if name == "gpt_oss":
        more["sink"] = tensor(rng, (H,), dtype).astype(np.float32)
        module.sinks = torch.from_numpy(more["sink"]).to(args[0].dtype)
    out, weights = theirs[name](module, *args, **options)
    p = Problem(*parts, scale=0.3, **more)
    out, weights = (x.float().numpy().astype(parts[0].dtype) for x in (out.transpose(1, 2), weights))
    return Call(f"{name} {kind}", p, out, find("torch-sdpa-math")[0].model(dtype), probabilities=weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", theirs)
def test_they_agree(name, kind, dtype):
    called(name, kind, dtype).judge()


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("llama", "window", {"window": (WINDOW, 0)}),
        ("llama", "static window", {"window": (WINDOW, 0)}),
        ("llama", "growing", {"causal": "top_left"}),
        ("llama", "static", {"lengths_k": None, "offset": PAST}),
        ("gemma2", "prefill", {"softcap": None}),
        ("gpt_oss", "prefill", {"sink": None}),
    ],
)
def test_another_reading_differs(name, kind, wrong):
    call = called(name, kind, "float32")
    with pytest.raises(MismatchError):
        replace(call, problem=call.problem.replace(**wrong), probabilities=None).judge()


def test_a_row_that_sees_no_key_is_a_mean_there():
    """Their mask is the least number of the type, not -inf: with padding on the left the first rows weigh all alike."""
    seen = torch.ones(1, 4, dtype=torch.long)
    seen[0, :2] = 0
    mask = masks.create_causal_mask(config(), torch.zeros(1, 4, H * D), seen, None)
    q, k, v = (torch.randn(1, 1, 4, D) for _ in range(3))
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    out, weights = theirs["llama"](module, q, k, v, mask, scaling=1.0)
    assert (weights[0, 0, :2] == 0.25).all()
    # four quarters are added up twice, three roundings each
    assert ((out[0, :2, 0] - v.mean(2)[0]).abs() <= 6 * 2.0**-24 * v.abs().mean(2)[0]).all()
