import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check import LAWS
from refattn.check.bugs import broken
from refattn.check.kernels.tiled import tiled
from refattn.check.planted import plain

ABLE = Capabilities(lse=True)


def law(kernel, name, able=ABLE):
    (check,) = check_kernel(kernel, only=f"law/{name}[float32]", capabilities=able).checks
    return check


@pytest.mark.parametrize("name", LAWS)
def test_the_right_kernel_obeys(name):
    assert law(tiled, name).verdict == "passed"


def test_nondeterminism():
    calls = []

    def kernel(p):
        calls.append(p)
        out, lse = tiled(p)
        return np.nextafter(out, np.float32(len(calls) % 2)), lse

    check = law(kernel, "determinism")
    assert check.verdict == "failed"
    assert "two runs on the same input differ" in check.message


def test_order_dependence():
    def kernel(p):
        out, lse = tiled(p)
        return out + p.value[:, :, :1] * np.float32(1e-3), lse

    assert "the order of the keys matters" in law(kernel, "key_permutation").message


def test_a_masked_key_that_is_read():
    def kernel(p):
        out, lse = tiled(p)
        return out + np.float32(1e-30) + np.float32(1e-6) * p.key[:, :, 3:4], lse

    assert "a key that no row may see changes the output" in law(kernel, "masked_keys_unread").message


def test_heads_mapped_wrongly():
    def kernel(p):
        at = np.arange(p.heads) % p.heads_kv
        return tiled(p.replace(key=p.key[:, at], value=p.value[:, at]))

    assert "grouped heads differ from repeated ones" in law(kernel, "grouped_heads").message


def test_batches_that_meet():
    def kernel(p):
        out, lse = tiled(p)
        return out + np.float32(1e-6) * p.query[-1:, :, :, :1], lse

    assert "what another batch holds changes the output" in law(kernel, "batch_independence").message


def test_values_that_saturate():
    def kernel(p):
        out, lse = tiled(p)
        return np.clip(out, -0.5, 0.5), lse

    assert "values twice as large do not double the output" in law(kernel, "values_doubled").message


def test_strides_that_are_ignored():
    assert "strides change the output" in law(broken("strides_ignored"), "layout").message


def test_scores_that_are_not_shifted():
    def kernel(p):
        return tiled(p if p.bias is None else p.replace(bias=np.minimum(p.bias, np.float32(3))))

    assert "a constant added to all scores changes the output" in law(kernel, "bias_shifted").message


def test_an_lse_that_does_not_merge():
    def kernel(p):
        out, lse = tiled(p)
        return out, np.where(np.isneginf(lse), 0, lse).astype(np.float32)

    assert "two halves merged through lse differ from the whole" in law(kernel, "split_and_merge").message


def test_no_lse():
    check = law(lambda p: tiled(p)[0], "split_and_merge")
    assert check.verdict == "failed"
    assert "no lse was returned" in check.message
    assert law(plain, "split_and_merge", Capabilities()).message == "not in its capabilities: lse"
