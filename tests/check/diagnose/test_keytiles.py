import numpy as np
import pytest

from refattn import Capabilities, Problem, check_problem, evaluate
from refattn.check.diagnose.keytiles import weights_off
from refattn.check.kernels.tiled import tiled

from ...conftest import tensor


def problem(variant="softmax", **more):
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 2, n, 32), "float32") for n in (37, 128, 128))
    return Problem(q, k, v, variant=variant, **more)


def without(p, start, stop):
    allowed = np.ones((1, 1, p.n_q, p.n_k), bool)
    allowed[..., start:stop] = False
    return p.replace(allowed=allowed)


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (32, 64), (96, 128)])
def test_keys_that_are_left_out(start, stop):
    p = problem()

    def kernel(p):
        return tiled(without(p, start, stop))

    kernel.capabilities = Capabilities(lse=True)
    (check,) = check_problem(kernel, p, "mine").checks
    assert f"as if the weights of keys {start} to {stop - 1} were 100% too small" in check.message


def test_keys_that_are_counted_twice():
    p = problem()
    a = evaluate(p)
    doubled = p.replace(
        key=np.concatenate([p.key, p.key[:, :, 40:48]], 2), value=np.concatenate([p.value, p.value[:, :, 40:48]], 2)
    )
    assert weights_off(a, tiled(doubled)[0]) == ("as if the weights of keys 40 to 47 were 100% too large",)


def test_without_a_denominator():
    p = problem("linear", options={"feature": "identity", "normalize": False})
    half = p.value.copy()
    half[:, :, 64:80] *= 0.5
    out = evaluate(p.replace(value=half)).out.astype(np.float32)
    assert weights_off(evaluate(p), out) == ("as if the weights of keys 64 to 79 were 50% too small",)


def test_other_errors_name_no_keys():
    p = problem()
    a, out = evaluate(p), tiled(p)[0]
    assert weights_off(a, out * np.float32(1.5)) == ()
    assert weights_off(a, np.full_like(out, np.nan)) == ()
    assert weights_off(a, a.out) == ()
    noise = np.random.default_rng(1).standard_normal(out.shape)
    assert weights_off(a, out + noise) == ()


def test_few_elements_and_weights_below_zero_explain_nothing(make):
    """As many unknowns as elements explain anything; and the right answer turned around would need such weights."""
    few = make(1, 64, 8, dtype="float32")
    assert weights_off(evaluate(few), np.zeros(few.out_shape, np.float32)) == ()
    many = make(64, 64, 8, dtype="float32")
    random = np.random.default_rng(0).standard_normal(many.out_shape).astype(np.float32)
    assert weights_off(evaluate(many), random) == ()
