import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refattn.arrays import (
    dtype_name,
    from_float64,
    kind_of,
    laid_out,
    like,
    memory_of,
    native,
    overlapping,
    to_float64,
    to_kind,
    to_numpy,
)
from refattn.dtypes import FORMATS
from refattn.errors import InvalidInput, InvalidProblem

NAMES = [*FORMATS, "bool", "int32"]


def sample(name):
    if name in FORMATS:
        return from_float64(np.array([[0.0, -1.5, 0.25], [2.0, 448.0, -0.5]]), name)
    return np.array([[0, 1, 1], [1, 0, 1]], name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_there_and_back_bit_for_bit(name, kind):
    x = sample(name)
    if kind == "jax" and name == "float64":
        with pytest.raises(InvalidInput, match=r"float64 needs jax\.config\.update"):
            to_kind(x, "jax")
        return
    there = to_kind(x, kind)
    assert kind_of(there) == kind
    assert dtype_name(there) == name
    back = to_numpy(there)
    assert back.dtype == x.dtype
    assert back.tobytes() == x.tobytes()
    again = like(back, there)
    assert kind_of(again) == kind
    assert dtype_name(again) == name


def test_strided_and_gradient_tensors():
    t = torch.arange(12.0, requires_grad=True).reshape(3, 4).T[::2]
    assert (to_numpy(t) == np.arange(12.0).reshape(3, 4).T[::2]).all()
    assert (to_numpy(jnp.ones((2, 3)).T) == 1).all()


def test_to_kind_copies():
    x = np.zeros(3, np.float32)
    to_kind(x, "torch")[0] = 1
    assert x[0] == 0


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_where_an_array_begins_within_16_bytes_is_kept(name, kind):
    dtype = FORMATS[name].dtype
    whole = np.arange(40, dtype=np.float32).astype(dtype)
    for first in range(4):
        x = whole[first : first + 8]
        place = x.__array_interface__["data"][0]
        got = laid_out(x)[0] if kind == "numpy" else to_kind(x, kind)
        there = got.__array_interface__["data"][0] if kind == "numpy" else got.data_ptr()
        assert there % 16 == place % 16
        assert (to_numpy(got) == x).all()


def test_device_is_kept():
    model = jax.device_put(jnp.ones(2), jax.devices("cpu")[0])
    assert like(np.ones(2, np.float32), model).devices() == model.devices()


def test_float64_holds_every_format_exactly():
    for name in FORMATS:
        x = sample(name)
        assert (from_float64(to_float64(x), name).tobytes()) == x.tobytes()
    with pytest.raises(InvalidInput, match="dtype: got 'int32'"):
        to_float64(sample("int32"))


def test_errors_name_what_was_got():
    with pytest.raises(InvalidProblem, match="query: got list, expected an array of numpy, torch, cupy, jax; wrap it"):
        to_numpy([1, 2], "query")
    with pytest.raises(InvalidInput, match="kind: got 'tensorflow'"):
        to_kind(np.ones(1), "tensorflow")
    with pytest.raises(InvalidInput, match="like: got int"):
        like(np.ones(1), 3)


@pytest.mark.parametrize("dtype", [*FORMATS, "int32", "bool"])
def test_the_other_byte_order_becomes_this_ones(dtype):
    x = sample(dtype)
    y = x.astype(x.dtype.newbyteorder("S"))
    for found in (to_numpy(y), native(y)):
        assert found.dtype.isnative
        assert found.tobytes() == x.tobytes()
    if dtype != "float64":
        assert (to_numpy(to_kind(y, "torch")) == x).all()


def test_what_has_no_numbers_is_refused():
    x = torch.ones(2, 3)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for y, text in (
        (np.ma.masked_array([1.0, 2.0], [True, False]), r"x: is a masked array; pass x\.filled"),
        (x.to("meta"), "x: is a meta tensor, which has no numbers"),
        (fake, "x: is a fake tensor, which has no numbers"),
        (x.to_sparse(), r"x: is a sparse tensor \(torch.sparse_coo\)"),
    ):
        with pytest.raises(InvalidProblem, match=text):
            to_numpy(y, "x")
    with pytest.raises(InvalidProblem, match=r"x: JAX does not give its numbers \(TracerArrayConversionError\); pass"):
        jax.jit(lambda y: to_numpy(y, "x"))(jnp.ones(3))
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(InvalidProblem, match=r"x: JAX does not give its numbers \(RuntimeError\)"):
        to_numpy(gone, "x")


def test_a_tensor_that_only_says_it_is_negated():
    z = torch._neg_view(torch.tensor([2.0, -4.0]))
    assert z.is_neg()
    assert (to_numpy(z) == [-2, 4]).all()


@pytest.mark.parametrize(
    ("kind", "device", "text"),
    [
        ("torch", "cuda:7", "device: got 'cuda:7', which torch does not have here"),
        ("torch", "tpu", "device: got 'tpu', which torch does not have here"),
        ("torch", [1], r"device: got \[1\], which torch does not have here"),
        ("jax", "cuda:7", "device: got 'cuda:7', which jax does not have here"),
        ("numpy", "cuda", "device: got 'cuda' for numpy, which has none; leave it out"),
    ],
)
def test_a_device_that_is_not_there(kind, device, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        to_kind(np.ones(3, np.float32), kind, device)


def test_elements_that_share_memory():
    """Beside a count of the bytes that an array's elements have."""
    for shape in ((3,), (3, 1, 2), (2, 3, 2), (1, 1), (2, 0)):
        for strides in np.ndindex(*([9] * len(shape))):
            places = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)]
            taken = [p + i for p in places for i in range(2)]
            assert overlapping(shape, strides, 2) == (len(set(taken)) < len(taken)), (shape, strides)
            assert overlapping(shape, tuple(-s for s in strides), 2) == overlapping(shape, strides, 2)


def test_where_an_array_lies():
    x = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    one, two, row = (memory_of(y) for y in (x[:, :2], x[:, 2:], x[1]))
    assert (one.shape, one.strides, one.itemsize) == ((3, 2), (8, 2), 2)
    assert [np.shares_memory(one, y) for y in (two, row)] == [False, True]
    assert memory_of(jnp.ones(3)) is memory_of(x[:0]) is None
    y = np.ones(3)
    assert np.shares_memory(memory_of(y), y)
