import dataclasses

import numpy as np
import pytest
import torch

from refattn import InvalidProblem, Problem
from refattn.check import FEATURES, FURTHER


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def good(**more):
    parts = {"query": ones(1, 8, 5, 16), "key": ones(1, 4, 7, 16), "value": ones(1, 4, 7, 24)} | more
    return Problem(**parts)


def paged(**more):
    """A call of two pages of 4 keys, of which 5 are used."""
    parts = {"query": ones(1, 8, 5, 16), "key": ones(3, 4, 4, 16), "value": ones(3, 4, 4, 24)}
    return Problem(
        **parts | {"block_table": np.array([[2, 0]]), "page_layout": "NHD", "lengths_k": np.array([5])} | more
    )


class Unspeakable:
    def __repr__(self):
        raise RuntimeError


BAD = [
    ({"query": ones(8, 5, 16)}, r"query: got 3 axes \(8, 5, 16\), expected 4 \(batch, heads, seq, dim\)"),
    ({"query": [[1.0]]}, "query: got list, expected an array"),
    ({"query": ones(1, 8, 5, 16, dtype=np.int32)}, "query: got dtype int32, expected one of float64"),
    ({"key": ones(1, 3, 7, 16), "value": ones(1, 3, 7, 24)}, "key: axis heads is 3 and must divide query's 8"),
    (
        {"query": ones(1, 16, 8, 4), "key": ones(1, 7, 2, 4), "value": ones(1, 7, 2, 4)},
        r"repeat or slice the key heads; arrays are \(b, h, s, d\): is your layout \(b, s, h, d\)\?",
    ),
    ({"key": ones(2, 4, 7, 16)}, "key: axis batch is 2, expected query's 1"),
    ({"key": ones(1, 4, 7, 8)}, "key: axis dim is 8, expected query's 16"),
    ({"key": ones(1, 4, 7, 16, dtype=np.float64)}, "key: got dtype float64, expected query's float32"),
    ({"value": ones(1, 4, 6, 24)}, "value: axis seq is 6, expected key's 7"),
    ({"value": ones(1, 2, 7, 24)}, "value: axis heads is 2, expected key's 4"),
    ({"value": ones(1, 4, 7, 0)}, "value: axis dim is 0 and must be at least 1"),
    ({"key": torch.ones(1, 4, 7, 16)}, "key: is of torch and query of numpy"),
    ({"causal": True}, "causal: got True, expected None, 'bottom_right' or 'top_left'"),
    ({"causal": "upper"}, "causal: got 'upper'"),
    ({"window": 3}, r"window: got 3, expected \(left, right\)"),
    ({"window": (1.5, 0)}, "window: got"),
    ({"window": (-1, 0)}, r"window: got \(-1, 0\), which lets no query see a key; None \(not -1\) lifts a limit"),
    ({"window": (-1, -1)}, "window: got .* no query see a key"),
    ({"window": (-1, None), "causal": "top_left"}, "window: got .* no query see a key"),
    ({"alignment": "bottom"}, "alignment: got 'bottom', expected None, 'bottom_right' or 'top_left'"),
    ({"alignment": "top_left", "causal": "bottom_right"}, "alignment: got 'top_left' beside causal='bottom_right'"),
    ({"offset": 1.5}, r"offset: got 1.5, expected an integer from -2\*\*62 to 2\*\*62, or an array of 1"),
    ({"offset": True}, "offset: got True, expected an integer"),
    ({"offset": 2**63}, "offset: got 9223372036854775808, expected an integer"),
    ({"offset": np.array([1, 2, 3])}, r"offset: got int64 of shape \(3,\), expected \(1,\) integers, one for a batch"),
    ({"offset": np.array([2**62 + 1])}, "offset: got .*, expected integers from"),
    ({"lengths_k": np.array([8])}, r"lengths_k: got \[8\], expected numbers from 0 to \[7\], the rows that there are"),
    ({"lengths_q": np.array([-1])}, r"lengths_q: got \[-1\], expected numbers from 0 to \[5\]"),
    ({"lengths_q": np.array([1.0])}, r"lengths_q: got float64 of shape \(1,\), expected \(1,\) integers"),
    ({"lengths_q": 3}, "lengths_q: got int, expected an array"),
    (
        {"query": ones(1, 8, 5, 16, dtype=np.int8)},
        "query: got dtype int8, .*; cast it, or name out's type in out_dtype",
    ),
    ({"out_dtype": "int8"}, "out_dtype: got 'int8', expected one of float64"),
    ({"key_scale": 0.0}, "key_scale: has 0, expected finite numbers above 0; a block of zeros can have 1"),
    ({"key_scale": float("nan")}, "key_scale: has nan, expected finite numbers above 0"),
    ({"query_scale": -1}, "query_scale: has -1, expected finite numbers above 0"),
    ({"out_scale": 10**400}, "out_scale: has nan, expected finite numbers above 0"),
    ({"value_scale": np.array([[[[1.0, np.nan]]]])}, "value_scale: has nan, expected finite numbers above 0"),
    (
        {"key_scale": ones(1, 4, 3, 1)},
        r"key_scale: got shape \(1, 4, 3, 1\), expected 4 axes, each a divisor of",
    ),
    (
        {"query_scale": ones(1, 8, 5, 3)},
        r"query_scale: got shape \(1, 8, 5, 3\), expected 4 axes, each a divisor of the tensor's \(1, 8, 5, 16\); "
        "pad the last block, or add axes of length 1$",
    ),
    ({"value_scale": ones(1, 3, 7, 1)}, r"value_scale: got shape \(1, 3, 7, 1\), .*tensor's \(1, 4, 7, 24\); pad"),
    ({"value_scale": ones(1, 4, 0, 1)}, r"value_scale: got shape \(1, 4, 0, 1\), expected 4 axes, each a divisor of"),
    ({"key_scale": ones(4)}, r"key_scale: got shape \(4,\), expected 4 axes"),
    ({"key_scale": ones(1, 8, 1, 1)}, r"key_scale: got shape \(1, 8, 1, 1\), expected .*\(1, 4, 7, 16\)"),
    ({"out_scale": ones(1, 8, 5, 1)}, r"out_scale: got shape \(1, 8, 5, 1\), expected \(1, 8, 1, 1\) or 1"),
    ({"key_scale": torch.ones(1, 1, 1, 1)}, "key_scale: is of torch and query of numpy"),
    ({"key_scale": "1"}, "key_scale: got str, expected an array"),
    ({"key_scale": ones(1, 1, 1, 1, dtype=np.int32)}, "key_scale: got dtype int32, expected one of float64"),
    ({"softcap": 0}, "softcap: got 0, expected a finite number above 0"),
    ({"softcap": -2.0}, "softcap: got -2.0, expected a finite number above 0"),
    ({"scale": float("nan")}, r"scale: got nan, expected a finite number.*1/sqrt\(d_k\)"),
    ({"scale": "1"}, "scale: got '1', expected a real number or None"),
    ({"scale": True}, "scale: got True"),
    ({"sink": ones(4)}, r"sink: got shape \(4,\), expected \(8,\)"),
    ({"bias": ones(5, 7)}, r"bias: got shape \(5, 7\), expected \(1, 8, 5, 7\) or 1 in place of an axis"),
    ({"bias": ones(1, 1, 5, 7, dtype=bool)}, "bias: got dtype bool, .* a boolean mask goes into allowed"),
    ({"allowed": ones(1, 1, 5, 7)}, "allowed: got dtype float32, expected bool"),
    ({"allowed": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, "allowed: is of torch and query of numpy"),
    ({"allowed": ones(1, 2, 5, 7, dtype=bool)}, r"allowed: got shape \(1, 2, 5, 7\)"),
    ({"cu_seqlens_q": np.array([0, 5])}, "got only one, expected both or none"),
    ({"cu_seqlens_q": np.array([0, 4]), "cu_seqlens_k": np.array([0, 7])}, r"cu_seqlens_q: got \[0, 4\], .* end at 5"),
    ({"cu_seqlens_q": np.array([0, 3, 2, 5]), "cu_seqlens_k": np.array([0, 1, 2, 7])}, "never fall"),
    ({"cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_k": np.array([0, 7])}, "cu_seqlens_k: has 2 offsets"),
    ({"cu_seqlens_q": np.array([0.0, 5.0]), "cu_seqlens_k": np.array([0, 7])}, "cu_seqlens_q: got float64"),
    ({"scale": 10**400}, r"scale: got 10+\.\.\., expected a finite number; None is 1/sqrt\(d_k\)"),
    ({"softcap": np.nan}, "softcap: got nan, expected a finite number above 0; None turns it off"),
    ({"scale": 10**9999}, "scale: got a value of int that cannot be shown, expected a finite number"),
    ({"scale": np.longdouble(10) ** 400}, "scale: got .*, expected a finite number"),
    ({"scale": Unspeakable()}, "scale: got a value of Unspeakable that cannot be shown, expected a real number"),
    ({"causal": Unspeakable()}, "causal: got a value of Unspeakable that cannot be shown"),
    ({"causal": np.ones(2)}, r"causal: got array\(\[1., 1.\]\), expected None"),
    ({"window": Unspeakable()}, "window: got a value of Unspeakable that cannot be shown"),
    ({"window": (10**30, 0)}, r"window: got \(10+, 0\), expected sides from -2\*\*62 to 2\*\*62"),
    ({"options": None}, "options: got None, expected a mapping of names to values"),
    ({"options": {1: 2}}, "options: got {1: 2}, expected a mapping"),
    ({"variant": None}, "variant: got None, expected the name of an operator"),
    ({"query": np.ma.masked_array(ones(1, 8, 5, 16))}, r"query: is a masked array; pass x\.filled\(0\)"),
    ({"allowed": np.ma.masked_array(ones(1, 1, 5, 7, dtype=bool))}, "allowed: is a masked array"),
    ({"query": torch.ones(1, 8, 5, 16, device="meta")}, "query: is a meta tensor, which has no numbers; make it on"),
    ({"query": torch.ones(1, 8, 5, 16).to_sparse()}, r"query: is a sparse tensor \(torch.sparse_coo\); .*to_dense"),
    (
        {"query": lambda: torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged)},  # imports for seconds
        "query: is a nested tensor; pad it",
    ),
]


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[t[:40] for _, t in BAD])
def test_bad_input_names_the_argument(changes, text):
    made = {n: x() if callable(x) else x for n, x in changes.items()}
    with pytest.raises(InvalidProblem, match=text):
        good(**made)


TABLE = np.array([[2, 0]])
NEW = {"new_key": ones(1, 4, 1, 16), "new_value": ones(1, 4, 1, 24)}
TWO = {"query": ones(2, 8, 5, 16), "lengths_k": np.array([5, 3]), "block_table": np.array([[2, 0], [1, 0]])}
BOTH = {"new_key": ones(2, 4, 1, 16), "new_value": ones(2, 4, 1, 24)}
ENDS = {"query": ones(1, 8, 5, 16), "cu_seqlens_q": np.array([0, 5])}
BAD_PAGES = [
    ({"block_table": None}, "page_layout: means nothing without block_table"),
    ({"page_layout": None}, "page_layout: got None, expected 'NHD' for caches .* or 'HND' for"),
    ({"page_layout": "NDH"}, "page_layout: got 'NDH', expected 'NHD'"),
    (
        {"block_table": TABLE * 1.0},
        r"block_table: got float64 of shape \(1, 2\), expected \(1, pages\) integers, a row",
    ),
    ({"block_table": TABLE[0]}, r"block_table: got int64 of shape \(2,\), expected \(1, pages\) integers"),
    ({"block_table": [[2, 0]]}, r"block_table: got list, expected \(1, pages\) integers, a row for each batch item"),
    ({"block_table": np.array([[2, 0], [0, 1]])}, r"block_table: got .* \(2, 2\), expected \(1, pages\) integers"),
    ({"block_table": np.array([[2, 3]])}, r"block_table: item 0 reads page 3 \(entry 1\), expected 0 to 2, the pages"),
    ({"block_table": np.array([[-1, 0]])}, r"block_table: item 0 reads page -1 \(entry 0\)"),
    ({"lengths_k": np.array([9])}, r"lengths_k: got \[9\], expected numbers from 0 to \[8\]"),
    ({"lengths_k": np.array([5, 5])}, r"lengths_k: got int64 of shape \(2,\), expected \(1,\) integers"),
    ({"key": ones(3, 0, 4, 16), "value": ones(3, 0, 4, 24)}, "key: axis page is 0 and must be at least 1"),
    ({"key": ones(12, 4, 16)}, r"key: got 3 axes .*, expected 4 \(pages, page, heads, dim\)"),
    ({"value": ones(2, 4, 4, 24)}, "value: axis pages is 2, expected key's 3"),
    ({"value": ones(3, 2, 4, 24)}, "value: axis page is 2, expected key's 4"),
    ({"value": ones(3, 4, 2, 24)}, "value: axis heads is 2, expected key's 4"),
    ({"key": ones(3, 4, 3, 16), "value": ones(3, 4, 3, 24)}, "key: axis heads is 3 and must divide query's 8"),
    ({**ENDS, "cu_seqlens_k": np.array([0, 8])}, "cu_seqlens_k: got offsets beside block_table"),
    ({"cu_seqlens_q": np.array([0, 2, 5])}, r"block_table: got .*, expected \(2, pages\) .* for each packed sequence"),
    ({"new_key": ones(1, 4, 1, 16)}, "new_value: got nothing, expected an array of numpy; new keys come with new"),
    ({**NEW, "new_key": torch.ones(1, 4, 1, 16)}, "new_key: got torch, expected an array of numpy"),
    (
        {**NEW, "new_key": ones(1, 4, 1, 16, dtype=np.float64)},
        "new_key: got dtype float64, expected the cache's float32",
    ),
    ({**NEW, "new_key": ones(1, 4, 16)}, r"new_key: got shape \(1, 4, 16\), expected \(1, 4, new rows, 16\)"),
    ({**NEW, "new_value": ones(1, 4, 2, 24)}, r"new_value: got shape \(1, 4, 2, 24\), expected \(1, 4, 1, 24\)"),
    ({**NEW, "cu_seqlens_q": np.array([0, 5])}, r"new_key: got shape .*, expected \(1, 4, 5, 16\)"),
    ({**NEW, "lengths_k": np.array([0])}, "new_key: has 1 rows for item 0, whose lengths_k is 0; it counts new keys"),
    ({**NEW, "key": np.broadcast_to(ones(1, 1, 4, 16), (3, 4, 4, 16))}, "key: its elements share memory, and"),
    (
        {"block_table": torch.tensor([[2, 0]])},
        "block_table: is of torch and query of numpy; pass arrays of one library",
    ),
    ({"lengths_k": torch.tensor([5])}, "lengths_k: is of torch and query of numpy; pass arrays of one library"),
    ({"lengths_q": torch.tensor([5])}, "lengths_q: is of torch and query of numpy"),
    ({"offset": torch.tensor([0])}, "offset: is of torch and query of numpy"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens_q: is of torch and query of numpy"),
    ({"block_table": np.ma.array([[2, 0]], mask=[[0, 1]])}, "block_table: is a masked array"),
    ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_q: got list, expected an array of numpy"),
    ({"cu_seqlens_q": "x"}, "cu_seqlens_q: got str, expected an array of numpy"),
    ({"cu_seqlens_q": np.array(5)}, r"cu_seqlens_q: got int64 of shape \(\), expected at least 2 integers on one axis"),
    ({"cu_seqlens_q": np.array([5])}, r"cu_seqlens_q: got int64 of shape \(1,\), expected at least 2 integers"),
    (
        {**TWO, **BOTH, "block_table": np.array([[2, 0], [0, 1]])},
        "block_table: page 0 is written for items 0 and 1; copy",
    ),
    (
        {**TWO, **BOTH, "block_table": np.array([[2, 0], [2, 1]])},
        "block_table: page 2 is written for item 1 and listed 2",
    ),
    ({**NEW, "block_table": np.array([[2, 2]])}, "block_table: page 2 is written for item 0 and listed 2 times"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_PAGES, ids=[t[:40] for _, t in BAD_PAGES])
def test_bad_pages_name_the_argument(changes, text):
    with pytest.raises(InvalidProblem, match=text):
        paged(**changes)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 7, 8), (1, 4, 1, 16)])
def test_scales_whose_blocks_divide_each_axis_are_taken(shape):
    assert good(key_scale=ones(*shape)).key_scale.shape == shape


def test_good_pages():
    assert paged(block_table=np.array([[2, 99]]), lengths_k=np.array([4])).n_k == 8  # entries behind are not read
    assert paged(**TWO, **BOTH).features() >= {"appending", "paged_nhd"}
    assert paged(**TWO).replace(block_table=np.array([[2, 0], [2, 0]])).heads_kv == 4
    with pytest.raises(InvalidProblem, match="new_key: means nothing without block_table"):
        good(**NEW)


def test_packed_needs_one_batch():
    with pytest.raises(InvalidProblem, match="query: axis batch is 2, expected 1 with cu_seqlens"):
        Problem(*(ones(2, 1, 5, 4) for _ in range(3)), cu_seqlens_q=np.array([0, 5]), cu_seqlens_k=np.array([0, 5]))


def test_shapes_and_words():
    p = good(scale=0.5, window=(3, None), causal="top_left")
    assert (p.batch, p.heads, p.heads_kv, p.n_q, p.n_k, p.d_k, p.d_v) == (1, 8, 4, 5, 7, 16, 24)
    assert p.out_shape == (1, 8, 5, 24)
    assert p.dtype == "float32"
    assert repr(p) == (
        "Problem(softmax float32 numpy b=1 h_q=8 h_kv=4 n_q=5 n_k=7 d_k=16 d_v=24 scale=0.5 causal='top_left' "
        "window=(3, None))"
    )
    other = good(variant="linear", scale=2, bias=ones(1, 1, 1, 7), sink=ones(8))
    assert repr(other) == (
        "Problem(linear float32 numpy b=1 h_q=8 h_kv=4 n_q=5 n_k=7 d_k=16 d_v=24 scale=2.0 bias sink)"
    )


def test_empty_sequences_are_problems():
    assert Problem(ones(1, 1, 0, 4), ones(1, 1, 0, 4), ones(1, 1, 0, 4)).n_k == 0


def test_lengths_of_packed_sequences_leave_gaps():
    ends = {"cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_k": np.array([0, 3, 7])}
    p = good(**ends, lengths_k=np.array([3, 1]))
    assert p.segments() == [(slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 4))]
    with pytest.raises(InvalidProblem, match=r"lengths_k: got \[1, 5\], expected numbers from 0 to \[3, 4\]"):
        p.replace(lengths_k=np.array([1, 5]))
    with pytest.raises(InvalidProblem, match=r"lengths_k: got .* expected \(2,\) integers, one for a packed sequence"):
        p.replace(lengths_k=np.array([1]))


def test_offsets_are_settings_or_arrays():
    assert good(offset=np.int32(-3)).settings() == {"offset": -3}
    assert type(good(offset=np.int8(3)).offset) is int
    many = good(offset=np.array([4], np.int32))
    assert many.settings() == {}
    assert many.to("torch").offset.tolist() == [4]


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        good().scale = 2.0
    with pytest.raises(TypeError):
        good(options={"p": 2}).options["p"] = 4


def test_to_another_kind_and_back():
    p = good(bias=ones(1, 1, 1, 7), sink=ones(8), allowed=ones(1, 1, 5, 1, dtype=bool))
    t = p.to("torch")
    assert t.kind == "torch"
    assert all(isinstance(x, torch.Tensor) for x in t.arrays().values())
    assert p.to("numpy") is p
    assert t.to("numpy").query.tobytes() == p.query.tobytes()
    with pytest.raises(InvalidProblem) as e:
        p.to("torch", "meta")
    assert str(e.value) == "query: is a meta tensor, which has no numbers; make it on a device that keeps them"


def test_features_are_those_that_capabilities_know():
    everything = Problem(
        ones(1, 2, 3, 4),
        ones(1, 1, 5, 4),
        ones(1, 1, 5, 6),
        0.5,
        "bottom_right",
        (1, 0),
        1.0,
        ones(2),
        ones(1, 1, 1, 5),
        ones(1, 1, 1, 5, dtype=bool),
        np.array([0, 3]),
        np.array([0, 5]),
        weight=ones(1, 1, 1, 5),
        state=ones(1, 2, 4, 6),
        alpha=ones(1, 2, 5, 4),
        beta=ones(1, 2, 5, 1),
    )
    rest = Problem(*(ones(1, 1, 0, 4) for _ in range(3)), causal="top_left")
    one = np.array([2])
    narrow = good(query=ones(1, 8, 5, 0), key=ones(1, 4, 7, 0))
    assert narrow.features() == good().features() | {"d_k_zero"}
    ragged = good(window=(None, -1), alignment="top_left", offset=3, lengths_q=one, lengths_k=one)
    scaled = good(
        key=ones(1, 4, 7, 16, dtype=np.int8), value=ones(1, 4, 8, 24)[:, :, :7], out_dtype="bfloat16", out_scale=2,
        key_scale=ones(1, 4, 7, 1), query_scale=ones(1, 1, 1, 16), value_scale=ones(1, 1, 1, 12),
    )  # fmt: skip
    new = {"new_key": ones(1, 4, 1, 16), "new_value": ones(1, 4, 1, 24)}
    pages = [good(block_table=np.array([[0]]), page_layout="HND"), paged(**new)]
    table = {"rotary_cos": ones(9, 7), "rotary_sin": ones(9, 7)}
    turned = [good(rotary=style, **table, positions_q=np.arange(5)) for style in ("half", "interleaved")]
    assert turned[0].features() ^ turned[1].features() == {"rotary_half", "rotary_interleaved"}
    dropped = good(dropout_p=0.5, dropout_mask=ones(1, 8, 1, 7, dtype=bool))
    seeded = [good(dropout_p=0.5, philox_layout=x, philox_seed=1) for x in ("flash", "efficient")]
    seeded += [good(dropout_p=0.5, dropout_mask=ones(1, 8, 1, 1, dtype=np.uint8))]
    seeded += [good(query_norm=ones(16), key_norm=ones(16), norm_eps=1e-6)]
    seeded += [good(eta=ones(1, 8, 7, 1))]
    calls = (everything, scaled, rest, ragged, narrow, *pages, *turned, good(alibi_slopes=ones(8)), dropped, *seeded)
    assert frozenset().union(*(p.features() for p in calls)) == FEATURES | FURTHER
    assert Problem(*(ones(1, 1, 2, 4) for _ in range(3))).features() == frozenset()


def test_ipython_and_hypothesis_show_the_short_form(make):
    from hypothesis.vendor.pretty import pretty

    p = make(50, 60)
    assert pretty(p) == repr(p)
    assert len(repr(p)) < 100


def test_numbers_do_not_depend_on_the_order_of_their_bytes():
    given = {n: np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(">f4") for n in ("query", "key", "value")}
    given["cu_seqlens_q"] = given["cu_seqlens_k"] = np.array([0, 2, 5], ">i8")
    p = Problem(**given)
    for name, x in p.arrays().items():
        assert x.dtype.isnative
        np.testing.assert_array_equal(x, given[name])
    assert p.to("torch").query[0, 0, 0, 0] == given["query"][0, 0, 0, 0]


def test_numbers_of_numpy_in_options_are_pythons(make):
    given = {"a": np.int8(3), "b": (np.uint8(2), (np.bool_(True), None)), "c": np.float32(0.5), "d": [np.int8(1)]}
    options = make(variant="moba", options=given).options
    assert options == {"a": 3, "b": (2, (True, None)), "c": 0.5, "d": [1]}
    assert [type(options[n]) for n in "ac"] == [int, float]
    assert [type(x) for x in (options["b"][0], options["b"][1][0], options["d"][0])] == [int, bool, np.int8]
