"""Neighborhood attention as the package natten computes it on a CPU (its flex backend), beside the definition."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn.variants.neighborhood import OPTIONS, grid_mask

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch warns of flex_attention without a compiler
natten = pytest.importorskip("natten", reason="natten is not installed: in a clone: pip install '.[peers]'")


def seen_by_natten(shape, window, stride, dilation, is_causal):
    """Which tokens a query sees: equal scores, and values that name their token."""
    from natten.functional import neighborhood_attention_generic

    n = int(np.prod(shape))
    q = torch.zeros(1, *shape, 1, 16)
    found = np.zeros((n, n), bool)
    for first in range(0, n, 16):
        v = torch.zeros(1, n, 1, 16)
        for j in range(first, min(n, first + 16)):
            v[0, j, 0, j - first] = 1
        out = neighborhood_attention_generic(
            q, q, v.reshape(1, *shape, 1, 16), kernel_size=window, stride=stride, dilation=dilation,
            is_causal=is_causal, backend="flex-fna", torch_compile=False,
        )  # fmt: skip
        part = out.reshape(n, 16)[:, : min(n, first + 16) - first]
        found[:, first : first + part.shape[1]] = (part > 0).numpy()
    return found


def draw(seed):
    """Return a grid and options that natten takes."""
    rng = np.random.default_rng(seed)
    axes = int(rng.integers(1, 4))
    shape = tuple(int(x) for x in rng.integers(4, (40, 12, 6)[axes - 1], axes))
    dilation = tuple(int(rng.integers(1, max(2, n // 3 + 1))) for n in shape)
    window = tuple(int(rng.integers(2, max(3, n // d + 1))) for n, d in zip(shape, dilation, strict=True))
    dilation = tuple(d if w * d <= n else 1 for n, w, d in zip(shape, window, dilation, strict=True))
    stride = tuple(int(rng.integers(1, w + 1)) for w in window)
    return shape, window, stride, dilation, tuple(bool(x) for x in rng.random(axes) < 0.4)


@pytest.mark.parametrize("seed", range(40))
def test_the_masks_are_the_same(seed):
    shape, window, stride, dilation, is_causal = draw(seed)
    given = dict(zip(OPTIONS, (shape, window, stride, dilation, is_causal), strict=True))
    try:
        seen = seen_by_natten(shape, window, stride, dilation, is_causal)
    except NotImplementedError as e:
        pytest.skip(f"natten does not compute it here: {e}")
    assert (seen == grid_mask(shape, SimpleNamespace(**given))).all()
