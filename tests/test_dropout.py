"""Dropout of a call against a loop, kernels' masks against Random123 and their threads, and what kernels get wrong."""

from fractions import Fraction

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from refattn import (
    Capabilities,
    InvalidInput,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    assert_close,
    check_kernel,
    check_problem,
    dropout_mask,
    evaluate,
    load_problem,
    query_rows,
    save_problem,
    simulate,
    strategies,
)
from refattn.check.bugs.dropped import DROPOUT_BUGS, SEED_BUGS
from refattn.check.bugs.planted import planted
from refattn.check.inputs.families import cases
from refattn.check.kernels import KERNELS
from refattn.check.kernels import tiled as module
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER, MODELS, flash
from refattn.dropout import philox

ABLE = Capabilities({"float32", "bfloat16"}, FEATURES | FURTHER, lse=True)
DRAWN = ["dropout_mask", "lengths_k", "offset", "weight", *FEATURES]


def small(n_q=5, n_k=7, seed=1, p=0.25, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.integers(-4, 5, s).astype(np.float32) / 4 for s in ((2, 4, n_q, 8), (2, 2, n_k, 8), (2, 2, n_k, 6)))
    more.setdefault("dropout_mask", rng.random((2, 4, n_q, n_k)) >= p)
    return Problem(q, k, v, dropout_p=p, **more)


def test_the_answer_is_the_loops():
    """Every bit of out and lse, by mpmath from the formula's words; a row of which nothing is kept gives 0."""
    mask = np.random.default_rng(3).random((2, 4, 5, 7)) >= 0.3
    mask[0, 1, 2] = False
    p = small(p=0.3, dropout_mask=mask, causal="bottom_right", sink=np.linspace(-1, 1, 4, dtype=np.float32), scale=0.5)
    answer = evaluate(p, rounding="float64")
    with mpmath.workdps(60):
        for b, h, i in np.ndindex(2, 4, 5):
            seen = range(i + 3)
            q, k, v = p.query[b, h, i], p.key[b, h // 2], p.value[b, h // 2]
            w = [mpmath.exp(mpmath.mpf(float(q @ k[j])) / 2) for j in seen]  # products of quarters are exact
            z = sum(w) + mpmath.exp(mpmath.mpf(float(p.sink[h])))
            assert answer.lse[b, h, i] == float(mpmath.log(z))
            share = mpmath.mpf(1) - mpmath.mpf(0.3)  # exactly the float64 number's
            for c in range(6):
                exact = sum(w[j] * mpmath.mpf(float(v[j, c])) for j in seen if mask[b, h, i, j]) / z / share
                assert answer.out[b, h, i, c] == float(exact)
    assert (answer.out[0, 1, 2] == 0).all()


def test_gradients_are_autograds():
    p = small(softcap=2.0, bias=np.random.default_rng(2).standard_normal((1, 4, 1, 7)).astype(np.float32))
    dout = np.random.default_rng(0).standard_normal(p.out_shape)
    answer = evaluate(p, gradients=dout, rounding="float64")
    q, k, v, bias = leaves = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (p.query, p.key, p.value, p.bias)
    ]
    s = torch.tanh(q @ k.repeat_interleave(2, 1).mT / 8**0.5 / 2) * 2 + bias
    out = s.softmax(-1) * torch.tensor(p.dropout_mask) / 0.75 @ v.repeat_interleave(2, 1)
    for name, x in zip(("dq", "dk", "dv", "dbias"), torch.autograd.grad(out, leaves, torch.tensor(dout)), strict=True):
        # some hundred roundings of sums whose terms stay below 16
        assert np.abs(x.numpy() - answer.values[name]).max() <= 200 * 2.0**-53 * 16, name


def test_ties_decide_in_fractions():
    """Equal scores: out is a fraction with 1 - p below, which lies on a tie where p is a power of two."""
    n, value = 4, np.array([1, 2**24 + 1, 3, 5], np.float64)
    p = Problem(
        np.zeros((1, 1, 1, 1)),
        np.zeros((1, 1, n, 1)),
        value.reshape(1, 1, n, 1),
        dropout_p=0.5,
        dropout_mask=np.array([True, True, False, False]).reshape(1, 1, 1, n),
    )
    exact = Fraction(1 + 2**24 + 1, n) * 2
    assert Fraction(float(evaluate(p, rounding="float64").out.item())) == exact
    assert evaluate(p, rounding="float32").out.item() == np.float32(float(exact))


def test_masks_of_every_shape_are_spread():
    whole = small()
    for shape in ((1, 1, 1, 7), (2, 1, 5, 1), (1, 4, 1, 1)):
        mask = np.random.default_rng(1).random(shape) < 0.5
        one, two = (whole.replace(dropout_mask=m) for m in (mask, np.broadcast_to(mask, (2, 4, 5, 7)).copy()))
        assert (evaluate(one, rounding="float64").out == evaluate(two, rounding="float64").out).all()


def test_it_comes_along(tmp_path):
    p = small(causal="bottom_right")
    assert "dropout_mask" in p.features()
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert (again.dropout_p, again.dropout_mask.tolist()) == (0.25, p.dropout_mask.tolist())
    whole = evaluate(p, rounding="float64")
    assert (evaluate(query_rows(p, 1, 3), rounding="float64").out == whole.out[:, :, 1:3]).all()
    for kind, array in (("torch", torch.Tensor), ("jax", jnp.ndarray)):
        moved = p.to(kind)
        assert isinstance(moved.dropout_mask, array)
        assert (np.asarray(evaluate(moved, rounding="float64").out) == whole.out).all()


def test_packed_sequences_and_lengths_have_their_part_of_the_mask():
    p = small(lengths_k=np.array([7, 4]), lengths_q=np.array([5, 3]))
    one = Problem(
        p.query[1:, :, :3],
        p.key[1:, :, :4],
        p.value[1:, :, :4],
        dropout_p=0.25,
        dropout_mask=p.dropout_mask[1:, :, :3, :4],
    )
    whole, alone = (evaluate(x, rounding="float64").out for x in (p, one))
    assert (whole[1:, :, :3] == alone).all()


def test_a_value_that_is_no_number_shows_where_it_is_dropped_too():
    """A kernel multiplies it by 0."""
    p = small()
    value = p.value.copy()
    value[0, 0, 3, 2] = np.inf
    out = evaluate(p.replace(value=value), rounding="float64").out
    assert np.isnan(out[0, :2, :, 2]).all()
    assert np.isfinite(out[0, 2:]).all()


# how kernels draw ----------------------------------------------------------------------------------------------------

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
# Random123's examples/kat_vectors
KNOWN = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(rounds, counter, key, words):
    assert tuple(philox(np.array(counter), key, rounds).tolist()) == words


def test_philox_is_what_pytorch_draws_on_a_gpu():
    """torch.manual_seed(0); torch.rand(8, device="cuda"), as printed in many places: subsequence i, first word."""
    words = philox(np.array([[0, 0, i, 0] for i in range(8)]), (0, 0))[:, 0]
    printed = ["0.3990", "0.5167", "0.0249", "0.9401", "0.9459", "0.7967", "0.4150", "0.8203"]
    assert [f"{w / 2**32:.4f}" for w in words.tolist()] == printed


def round_of(x, k):
    hi_lo = lambda a, b: divmod(a * b, 2**32)  # noqa: E731
    (ha, la), (hb, lb) = hi_lo(0xD2511F53, x[0]), hi_lo(0xCD9E8D57, x[2])
    return (hb ^ x[1] ^ k[0], lb, ha ^ x[3] ^ k[1], la)


def by_rounds(counter, key, rounds):
    for _ in range(rounds):
        counter = round_of(counter, key)
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def by_threads(seed, offset, shape, p):
    """FlashAttention's mask as its threads make it: warps of 16 rows, accumulators of 16 by 8, four numbers a lane."""
    b, h, n_q, n_k = shape
    mask, most = np.zeros((b, h, -(-n_q // 16) * 16, -(-n_k // 32) * 32), bool), int((1 - p) * 255)
    for batch, head, block, column in np.ndindex(b, h, mask.shape[2] // 16, mask.shape[3] // 32):
        for lane in range(32):
            at = (offset + (batch * h + head) * 32 + lane) % 2**64
            words = by_rounds((at % 2**32, at >> 32, block, column), (seed % 2**32, seed >> 32), 7)
            drawn = b"".join(w.to_bytes(4, "little") for w in words)
            for tile in range(4):  # of 8 keys: tensor(i, m, 2 n + j), i = number + 4 (tile mod 2), j = tile div 2
                for number in range(4):
                    row, key = lane // 4 + 8 * (number // 2), 8 * tile + 2 * (lane % 4) + number % 2
                    byte = drawn[(tile // 2) * 8 + number + 4 * (tile % 2)]
                    mask[batch, head, 16 * block + row, 32 * column + key] = byte <= most
    return mask[:, :, :n_q, :n_k]


def by_stream(seed, offset, shape, p):
    """The memory-efficient kernel's mask, number by number of one stream."""
    found = []
    for n in range(offset, offset + int(np.prod(shape))):
        word = by_rounds(((n // 4) % 2**32, n // 4 >> 32, 0, 0), (seed % 2**32, seed >> 32), 10)[n % 4]
        found.append(np.float32(np.float32(word) * np.float32(2**-32)) + np.float32(2**-33) > np.float32(p))
    return np.array(found).reshape(shape)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (2**63 + 12345, 2**32 - 40), (7, 2**64 - 3)])
def test_masks_are_those_of_the_threads(seed, offset):
    shape = (2, 2, 21, 37)
    assert (dropout_mask(seed, offset, shape, 0.25) == by_threads(seed, offset, shape, 0.25)).all()
    if offset < 2**63:
        assert (dropout_mask(seed, offset, shape, 0.25, "efficient") == by_stream(seed, offset, shape, 0.25)).all()


def test_masks_keep_as_many_as_they_say():
    """FlashAttention keeps (floor(255 (1 - p)) + 1) of 256, not 1 - p."""
    shape = (2, 4, 64, 256)
    n = np.prod(shape)
    for drawn_as, p, share in (("flash", 0.1, 230 / 256), ("flash", 0.5, 128 / 256), ("efficient", 0.1, 0.9)):
        kept = dropout_mask(3, 64, shape, p, drawn_as=drawn_as).mean()
        assert abs(kept - share) <= 5 * (share * (1 - share) / n) ** 0.5, (drawn_as, p)  # five standard errors
    assert dropout_mask(3, 64, shape, 0.0).all()


def test_what_belongs_to_whom():
    """An offset of one warp more is the next head's mask; a longer call has a shorter one's as its corner."""
    mask = dropout_mask(5, 8, (2, 3, 40, 70), 0.4)
    heads = mask.reshape(6, 40, 70)
    assert (dropout_mask(5, 40, (2, 3, 40, 70), 0.4).reshape(6, 40, 70)[:-1] == heads[1:]).all()
    assert (dropout_mask(5, 8, (2, 3, 21, 33), 0.4) == mask[:, :, :21, :33]).all()
    assert dropout_mask(5, 8, (2, 3, 0, 7), 0.4).shape == (2, 3, 0, 7)
    assert dropout_mask(5, 8, (0, 3, 2, 7), 0.4, "efficient").shape == (0, 3, 2, 7)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": -1}, "seed: got -1, expected an integer of at least 0 and below 2\\*\\*64"),
        ({"offset": 2**64}, "offset: got 18446744073709551616"),
        ({"offset": 1.0}, "offset: got 1.0"),
        ({"shape": (1, 2, 3)}, "shape: got \\(1, 2, 3\\), expected \\(b, h_q, n_q, n_k\\)"),
        ({"shape": (1, 2, 3, -1)}, "shape: got"),
        ({"shape": (2**40, 2**40, 1, 1)}, "shape: got .* expected at most 2\\*\\*36 weights"),
        ({"shape": (2**31, 2**31, 0, 1), "drawn_as": "efficient"}, "shape: got .* axes of 0 counted as 1"),
        ({"shape": (np.int64(2**31), np.int64(2**33), 1, 1)}, "shape: got .* at most"),
        ({"p": 1.0}, "p: got 1.0, expected a number of at least 0 and below 1"),
        ({"p": np.nan}, "p: got nan"),
        ({"drawn_as": "fa3"}, "drawn_as: got 'fa3', expected one of flash, efficient$"),
        ({"drawn_as": "cudnn"}, "cuDNN's layout is not public"),
        ({"drawn_as": "math"}, "torch.native_dropout"),
        ({"drawn_as": ["flash"]}, "drawn_as: got"),
    ],
)
def test_what_nobody_draws_is_refused(change, text):
    with pytest.raises(InvalidInput, match=text):
        dropout_mask(**{"seed": 1, "offset": 0, "shape": (1, 1, 2, 2), "p": 0.5} | change)


# kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DROPOUT_BUGS, *SEED_BUGS, "dropout_in_lse"])
def test_what_kernels_get_wrong_is_caught(name):
    case = "philox" if name.startswith("philox") else "bits" if "bits" in name else "plain"
    more = {"dtypes": ["bfloat16"], "only": f"dropout/{case}", "budget": "quick", "model": tiled.model}
    assert not check_kernel(planted(name), capabilities=ABLE, **more).right


def whole(p):
    return np.broadcast_to(p.dropout_mask, (p.batch, p.heads, p.n_q, p.n_k))


def of_first(axis, n):
    return lambda p: p.replace(dropout_mask=np.take(whole(p), np.arange(whole(p).shape[axis]) % n, axis))


def where(condition, change):
    return lambda p: p.replace(**change(p)) if condition(p) else p


def from_the_masks_corner(p):
    mask = whole(p).copy()
    for rows, keys in p.segments():
        mask[:, :, rows, keys] = whole(p)[:, :, : rows.stop - rows.start, : keys.stop - keys.start]
    return p.replace(dropout_mask=mask) if p.batch == 1 else p


def square(p):
    return p.n_q == p.n_k


def ignored(p):
    return {"dropout_p": None, "dropout_mask": None}


LARGER = {
    "mask of the first 64 rows": ("square", of_first(2, 64)),
    "mask of the first 64 keys": ("square", of_first(3, 64)),
    "mask of four heads": ("square", of_first(1, 4)),
    "mask transposed": ("square", where(square, lambda p: {"dropout_mask": whole(p).swapaxes(2, 3)})),
    "own key kept": ("square", where(square, lambda p: {"dropout_mask": whole(p) | np.eye(p.n_q, dtype=bool)})),
    "lost beside allowed": ("square", where(lambda p: p.allowed is not None, ignored)),
    "p in float16": ("square", lambda p: p.replace(dropout_p=float(np.float16(p.dropout_p)))),
    "p in bytes": ("square", lambda p: p.replace(dropout_p=1 - (int(255 * (1 - p.dropout_p)) + 1) / 256)),
    "mask of the first 256 keys": ("spread", of_first(3, 256)),
    "one row ignored": ("spread", where(lambda p: p.dropout_mask.shape[2] < p.n_q, ignored)),
    "packs read from the mask's corner": ("packed", from_the_masks_corner),
}
"""Kernels that are wrong where calls are larger or have more, and the case that says so."""


@pytest.mark.parametrize("name", LARGER)
def test_what_shows_in_larger_calls_alone_is_caught(name):
    case, change = LARGER[name]
    p = next(c for c in cases("softmax") if c.name == f"dropout/{case}").problem("float32")
    report = check_problem(lambda p: tiled(change(p)), p, name, model=tiled.model)
    assert not report.right


def test_what_shows_in_larger_calls_is_asked_of_kernels_with_dropout():
    def asked(without):
        able = Capabilities({"float32"}, ABLE.features - without, lse=True)
        return {c.name for c in check_kernel(tiled, capabilities=able, only="dropout/*").checks}

    def named(*labels):
        return {f"dropout/{n}[float32]" for n in labels}

    masks, seeds, bits = ("plain", "options", "decoding", "square", "spread"), ("philox", "philox-efficient"), ("bits",)
    assert asked({"grouped_heads"}) == named(*masks, "packed", *seeds, *bits)
    assert asked({"variable_lengths"}) == named(*masks, *seeds, *bits)
    assert asked({"dropout_mask", "dropout_bits"}) == named("plain", *seeds)  # the first is listed as what is missing
    assert asked({"philox_flash", "philox_efficient"}) == named(*masks, "packed", *bits)
    assert asked({"philox_flash", "dropout_bits"}) == named(*masks, "packed", *seeds)  # by the layout that is there


def test_a_right_kernel_passes_and_is_predicted():
    able = Capabilities({"bfloat16"}, ABLE.features, lse=True, gradients={"dq", "dk", "dv", "dbias", "dsink"})
    report = check_kernel(tiled, capabilities=able, dtypes=["bfloat16"], only="dropout/*", model=tiled.model)
    assert report.passed, report.failures
    assert report.count("passed") == 18
    found = {}
    for w in (w for c in report.checks for w in c.arrays):
        found.setdefault(w.array, []).append(w.figures.rms)
    assert set(found) == {"out", "lse", "dq", "dk", "dv", "dbias", "dsink"}
    for name, least in (("out", 0.8), ("dq", 0.8), ("dk", 0.6), ("dv", 0.6)):  # less where few rows are summed
        assert least < min(found[name]) < max(found[name]) < 1.2, name


def test_pytorchs_math_backend_passes_with_its_mask():
    report = check_kernel(KERNELS["torch-sdpa-math"].kernel(), dtypes=["bfloat16"], only="dropout/options*")
    assert report.passed, report.failures
    assert report.count("passed") == 2


@pytest.mark.parametrize(("turn", "array"), [(1, "dq"), (0, "dv")])
def test_a_gradient_without_the_mask_fails(turn, array, monkeypatch):
    """Of dP, or of the weights that meet dout: what a tile of the backward pass drops first and second."""
    p = next(c for c in cases("softmax") if c.name == "dropout/plain").problem("float32")
    right, pass_over, calls = module._Call.dropped, module._backward, []

    def backward(*args):
        calls.append(0)
        pass_over(*args)
        calls.clear()

    def dropped(self, x, *at):
        if not calls:  # forward
            return right(self, x, *at)
        calls[0] += 1
        return x if calls[0] % 2 == turn else right(self, x, *at)

    monkeypatch.setattr(module, "_backward", backward)
    monkeypatch.setattr(module._Call, "dropped", dropped)
    report = check_problem(tiled, p, "x", gradients=np.ones(p.out_shape, np.float32), model=tiled.model)
    assert [c.verdict for c in report.checks] == ["passed", "failed"]
    wrong = {w.array for w in report.checks[1].arrays if w.failures}
    assert wrong == ({"dv"} if array == "dv" else {"dq", "dk"})


@given(strategies.problems(dtypes=["float32", "bfloat16"], max_rows=9, max_keys=40, max_dim=16, features=DRAWN))
@settings(max_examples=10)
def test_drawn_calls_pass(p):
    report = check_problem(tiled, p, "drawn", model=tiled.model)
    assert report.right, (p, report.failures)


def test_simulated_kernels_pass():
    p = next(c for c in cases("softmax") if c.name == "dropout/plain").problem("bfloat16")
    for name in ("flash", "math", "float8"):
        model = MODELS[name]("bfloat16")
        assert check_problem(lambda p, model=model: simulate(p, model), p, name, model=model).passed, name
    with pytest.raises(UnsupportedProblem, match="divides weights by 1 - dropout_p"):
        simulate(p, MODELS["hopper-float8"]("bfloat16"))
    narrow = check_problem(lambda p: simulate(p, MODELS["float8"]("bfloat16")), p, "x", model=flash("bfloat16"))
    assert not narrow.right


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dropout_p": None}, "dropout_mask: got a mask without dropout_p"),
        ({"dropout_mask": None}, "dropout_p: got a probability without dropout_mask"),
        ({"dropout_p": 1.0}, "dropout_p: got 1.0, expected a number of at least 0 and below 1"),
        ({"dropout_p": True}, "dropout_p: got True"),
        ({"dropout_p": np.longdouble(1) - np.longdouble(2) ** -60}, "dropout_p: got .* below 1 \\(in float64"),
        ({"dropout_p": np.nan}, "dropout_p: got nan"),
        ({"dropout_mask": np.ones((2, 4, 5, 7))}, "dropout_mask: got dtype float64, expected bool"),
        ({"dropout_mask": np.ones((5, 7), bool)}, "dropout_mask: got shape \\(5, 7\\), expected \\(2, 4, 5, 7\\)"),
        ({"dropout_mask": np.ones((2, 2, 5, 7), bool)}, "dropout_mask: got shape \\(2, 2, 5, 7\\)"),
        ({"dropout_mask": torch.ones(2, 4, 5, 7, dtype=torch.bool)}, "dropout_mask: is of torch and query of numpy"),
        ({"dropout_mask": "all"}, "dropout_mask: got str, expected an array"),
    ],
)
def test_bad_arguments_are_refused(change, text):
    with pytest.raises(InvalidProblem, match=text):
        small().replace(**change)


def test_what_has_no_dropout_says_so():
    p = small()
    with pytest.raises((InvalidProblem, UnsupportedProblem), match="dropout_mask"):
        evaluate(p.replace(variant="sigmoid"))
    with pytest.raises(UnsupportedProblem, match="dropout_mask"):
        Capabilities({"float32"}).require(p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_a_gpu_draws_these_masks(p):
    """PyTorch's kernels return their masks where they are asked to: FlashAttention's copy, and the efficient kernel."""
    ops, (b, h, n, m, d) = torch.ops.aten, (2, 3, 200, 333, 64)
    torch.manual_seed(7)
    q, k, v = (torch.randn(b, h, x, d, device="cuda", dtype=torch.float16) * 0.3 for x in (n, m, m))
    found = ops._scaled_dot_product_flash_attention(q, k, v, p, False, True)
    seed, offset = (x % 2**64 for x in found[6].view(torch.int64).tolist())
    mask = dropout_mask(seed, offset, (b, h, n, m), p)
    assert (mask == (found[8][:, :, :n, :m] > 0).cpu().numpy()).all()
    call = Problem(*(x.cpu().numpy() for x in (q, k, v)), dropout_p=p, dropout_mask=mask)
    assert_close(found[0].cpu().numpy(), call)
    found = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, p)
    seed, offset = (int(x) % 2**64 for x in found[2:4])
    drawn = torch.empty(b, h, n, m, device="cuda")
    ops._fill_mem_eff_dropout_mask_(drawn, p, seed, offset)
    assert (dropout_mask(seed, offset, (b, h, n, m), p, "efficient") == (drawn > p).cpu().numpy()).all()


def test_a_probability_that_is_1_in_float32_bounds_nothing():
    x = np.ones((1, 1, 2, 4), np.float32)
    p = Problem(x, x, x, dropout_p=1 - 2.0**-25, dropout_mask=np.ones((1, 1, 1, 1), bool))
    check = check_problem(tiled, p, "x").checks[0]
    assert check.verdict == "unsupported"
    assert check.message == "dropout_p: 0.9999999701976776 has no bounds in float32, where 1 - p is 0"
    assert check_problem(tiled, p.replace(dropout_p=1 - 2.0**-24), "x").passed
