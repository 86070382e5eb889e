import numpy as np
import pytest

from refattn import InvalidInput, Problem, masks


def test_causal_corners():
    assert masks.causal(2, 4).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert masks.causal(2, 4, "top_left").astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert masks.causal(4, 2).astype(int).tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_window_counts_both_ends():
    want = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert masks.sliding_window(4, 4, 2, 1).astype(int).tolist() == want
    assert masks.sliding_window(4, 4, None, 0).tolist() == masks.causal(4, 4).tolist()
    assert masks.sliding_window(3, 3, None, None).all()


def test_document_and_padding():
    assert masks.document([0, 0, 1], [0, 1]).astype(int).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert masks.padding([0, 2], 3)[:, 0, 0].astype(int).tolist() == [[0, 0, 0], [1, 1, 0]]
    assert masks.padding([3, 3], 3).all()
    with pytest.raises(InvalidInput, match="alignment: got 'left', expected one of bottom_right, top_left"):
        masks.causal(2, 2, "left")


@pytest.mark.parametrize("lengths", [[4], [-1], [0, 4], [[1]], 2])
def test_lengths_that_are_no_numbers_of_keys(lengths):
    with pytest.raises(InvalidInput) as e:
        masks.padding(lengths, 3)
    assert str(e.value) == f"lengths: got {lengths}, expected one axis of numbers from 0 to n_k=3"


def test_packed_sequences_of_one_token_see_their_own_part_of_a_mask():
    x, offsets = np.ones((1, 1, 2, 4), np.float32), np.array([0, 1, 2])
    allowed = np.array([[[[True, False], [True, False]]]])
    p = Problem(x, x, x, allowed=allowed, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    assert [masks.visible(p, 0, 0, rows, keys).tolist() for rows, keys in p.segments()] == [[[True]], [[False]]]


def test_visible_combines_everything():
    x = np.ones((1, 2, 3, 4), np.float32)
    bias = np.zeros((1, 1, 1, 3), np.float32)
    bias[..., 0] = -np.inf
    allowed = np.ones((1, 2, 3, 3), bool)
    allowed[:, 1, 2] = False
    p = Problem(x, x, x, causal="bottom_right", bias=bias, allowed=allowed)
    whole = slice(0, 3)
    assert masks.visible(p, 0, 0, whole, whole).astype(int).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert masks.visible(p, 0, 1, whole, whole).astype(int).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_window_follows_the_causal_corner():
    x, y = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 1, 4, 4), np.float32)
    rows, keys = slice(0, 2), slice(0, 4)
    right = masks.visible(Problem(x, y, y, window=(0, 0)), 0, 0, rows, keys)
    left = masks.visible(Problem(x, y, y, window=(0, 0), causal="top_left"), 0, 0, rows, keys)
    assert right.astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert left.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    "more", [{"causal": "top_left"}, {"causal": "bottom_right", "window": (5, 0)}, {"window": (3, 9)}]
)
def test_a_band_takes_no_memory(more):
    x, y = np.zeros((1, 1, 40, 2), np.float32), np.zeros((1, 1, 60, 2), np.float32)
    p = Problem(x, y, y, **more)
    seen = masks.visible(p, 0, 0, slice(0, 40), slice(0, 60))
    want = np.ones((40, 60), bool)
    if "causal" in more:
        want &= masks.causal(40, 60, more["causal"])
    if "window" in more:
        want &= masks.sliding_window(40, 60, *more["window"], more.get("causal", "bottom_right"))
    assert (seen == want).all()
    base = seen
    while base.base is not None:
        base = base.base
    assert base.nbytes < 200


@pytest.mark.parametrize("seed", range(24))
def test_a_long_mask_is_a_view_with_the_same_keys(seed, monkeypatch):
    """With diagonals in either corner, moved, windows of sides below 0, lengths and packed sequences."""
    rng = np.random.default_rng(seed)
    n_q, n_k = (int(n) for n in rng.integers(6, 12, 2))
    call = {"causal": [None, "top_left", "bottom_right"][seed % 3]}
    call["window"] = [None, (3, None), (5, -1), (None, 2), (-1, 4)][seed % 5 if call["causal"] is None else seed % 3]
    packed, many = seed % 2 == 0, [1, 3][seed % 2]
    if packed:
        call |= {"cu_seqlens_q": np.array([0, 2, 2, n_q]), "cu_seqlens_k": np.array([0, 3, 5, n_k])}
        call |= {"lengths_k": np.array([1, 2, n_k - 6])} if seed % 4 else {}
    else:
        call |= {"lengths_q": rng.integers(0, n_q, many), "lengths_k": rng.integers(0, n_k, many)}
    call["offset"] = [None, 2, rng.integers(-4, 4, 3)][seed % 7 % 3]
    call["alignment"] = "top_left" if call["causal"] is None and seed % 4 == 1 else None
    call["allowed"] = rng.random((many, 1, n_q, n_k)) < 0.7
    p = Problem(*(np.ones((many, 1, n, 2)) for n in (n_q, n_k, n_k)), **call)
    whole = [(b, s, masks.visible(p, b, 0, *s)) for b in range(many) for s in p.segments(b)]
    monkeypatch.setattr(masks, "WRITTEN", 0)
    for b, s, want in whole:
        assert np.array_equal(np.asarray(masks.visible(p, b, 0, *s, by_rules=True)), want)


def test_a_band_is_what_is_visible_where_only_a_diagonal_says_so():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n, m = (int(x) for x in rng.integers(1, 9, 2))
        more = {"causal": [None, "bottom_right", "top_left"][rng.integers(3)]}
        if rng.random() < 0.7:
            more["window"] = tuple(None if rng.random() < 0.3 else int(x) for x in rng.integers(0, 9, 2))
        if rng.random() < 0.3:
            more |= {"lengths_q": rng.integers(0, n + 1, 1), "lengths_k": rng.integers(0, m + 1, 1)}
        p = Problem(np.ones((1, 1, n, 1)), np.ones((1, 1, m, 1)), np.ones((1, 1, m, 1)), **more)
        for rows, keys in p.segments(0):
            first, end = masks.band(p, 0, rows, keys)
            places = np.arange(keys.stop - keys.start)
            expected = (places >= first[:, None]) & (places < end[:, None])
            np.testing.assert_array_equal(masks.visible(p, 0, 0, rows, keys), expected)
    masked = Problem(p.query, p.key, p.value, allowed=np.ones((1, 1, n, m), bool))
    assert masks.band(masked, 0, slice(0, n), slice(0, m)) is None
