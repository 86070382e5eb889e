import numpy as np
import pytest

from refattn import InvalidInput, rules

from .drawn import drawn

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")


@pytest.mark.parametrize("seed", range(3))
def test_mask_mods_make_the_masks(seed):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        n_q, n_k = (int(x) for x in rng.integers(1, 30, 2))
        rule, _ = drawn(rng, n_q, n_k, int(rng.integers(4)))
        text, tables = rules.mask_mod_text(rule, n_q, n_k)
        names = {n: torch.as_tensor(x) for n, x in tables.items()}
        exec(text, names)
        want = rule.written(rule.batches, rule.heads, n_q, n_k)
        for mod in (rules.mask_mod(rule, n_q, n_k), names["mask_mod"]):
            got = flex.create_mask(mod, rule.batches, rule.heads, n_q, n_k, device="cpu")
            np.testing.assert_array_equal(got.numpy(), want, text)


def test_the_text_is_plain():
    rule = rules.causal() & rules.document([0, 0, 1])
    text, tables = rules.mask_mod_text(rule, 3, 3)
    assert text == (
        "def mask_mod(b, h, q_idx, kv_idx):\n    return (kv_idx <= q_idx) & (ids_q[0, q_idx] == ids_q[0, kv_idx])\n"
    )
    assert {n: x.tolist() for n, x in tables.items()} == {"ids_q": [[0, 0, 1]]}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n", [128, 257])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: rules.causal(),
        lambda n: rules.causal() & rules.window(70, 0) | rules.sinks(3),
        lambda n: rules.causal() & rules.document(np.sort(np.arange(2 * n).reshape(2, n) * 7 % 4)),
        lambda n: ~rules.array(np.random.default_rng(n).random((2, 1, n)) < 0.01),
    ],
)
def test_block_masks_are_those_of_pytorch(make, n):
    rule = make(n)
    got = rules.block_mask(rule, n, n, 64)
    want = flex.create_block_mask(
        rules.mask_mod(rule, n, n), rule.batches, rule.heads, n, n, device="cpu", BLOCK_SIZE=64
    )
    assert got.shape == want.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.to_dense(), want.to_dense())
    q, k, v = torch.randn(3, 2, 2, n, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    outs = [flex.flex_attention(q, k, v, block_mask=m) for m in (got, want)]
    assert torch.equal(*outs)


def test_calls_that_do_not_fit():
    for make in (rules.mask_mod, rules.mask_mod_text, rules.block_mask):
        with pytest.raises(InvalidInput, match="prefix\\(9\\) needs 9 keys, and the call has 4"):
            make(rules.prefix(9), 4, 4)


@pytest.mark.parametrize("n", [float("nan"), "3", None, 2.5, True, -1])
def test_sizes_that_are_none(n):
    term = rules.terms.alibi([0.5])
    makers = {m: rules.causal() for m in (rules.mask_mod, rules.mask_mod_text, rules.block_mask)}
    for make, what in (makers | dict.fromkeys((rules.score_mod, rules.score_mod_text), term)).items():
        for name, sizes in (("n_q", (n, 4)), ("n_k", (4, n))):
            with pytest.raises(InvalidInput, match=f"^{name}: got {n!r}, expected a whole number, at least 0$"):
                make(what, *sizes)


def test_tables_that_are_none():
    term = rules.terms.alibi([0.5])
    for tables, text in (
        ([1], r"tables: got \[1\], expected a mapping of names to tensors"),
        ({"heads": [0.5]}, r"tables: heads: got \[0.5\], expected one of PyTorch's tensors"),
        ({"other": [0.5]}, "tables: got 'other', expected a name out of heads"),
    ):
        with pytest.raises(InvalidInput, match=f"^{text}$"):
            rules.score_mod(term, 4, 4, tables=tables)
