import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn.arrays import dtype_name, from_float64, kind_of, like, to_float64, to_kind, to_numpy
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
