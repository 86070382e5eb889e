"""The mask of Titans' memory as context as titans-pytorch makes it, beside the definition's."""

import numpy as np
import pytest

from refattn.variants.titans_mac import segment_mask

torch = pytest.importorskip("torch")
pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: in a clone: pip install '.[peers]'")


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(("n", "window", "persistent"), [(67, 16, 5), (33, 1, 0), (40, 64, 3), (21, 7, 1)])
def test_the_masks_are_the_same(monkeypatch, n, window, persistent, sliding):
    from titans_pytorch import mac_transformer

    rules = []
    monkeypatch.setattr(mac_transformer, "create_block_mask", lambda rule, **_: rules.append(rule))
    mac_transformer.create_mac_block_mask(n, window, persistent, sliding)
    q, k = torch.arange(n)[:, None], torch.arange(n + persistent)[None]
    seen = rules[0](None, None, q, k).numpy()
    assert (seen == segment_mask(n, n + persistent, persistent, window, sliding)).all()
    assert not np.array_equal(seen, segment_mask(n, n + persistent, persistent, window + 1, sliding)) or window >= n
