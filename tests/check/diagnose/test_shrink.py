"""Failing calls become small, and their program runs and still fails."""

import subprocess
import sys

import numpy as np
import pytest

from refattn import VARIANTS, Capabilities, Problem
from refattn.check.bugs.edits import broken
from refattn.check.diagnose.shrink import boundary, program, shrink
from refattn.check.inputs.families import cases
from refattn.check.model import GRADIENTS, flash
from refattn.check.runner import failing

CASES = {c.name: c for c in cases("softmax")}
SMALL = {
    "heads_tiled": "gaussian/grouped-heads",
    "window_left_exclusive": "gaussian/window",
    "causal_corner_fixed": "gaussian/causal-bottom-right",
    "softcap_never_applied": "gaussian/softcap",
    "sink_left_out": "gaussian/everything",
    "bias_before_the_cap": "gaussian/everything",
    "lengths_ignored": "ragged/packed",
    "zero_by_zero": "empty/rows-allowed",
    "lse_base_two": "gaussian/plain",
    "no_shift": "shifted/large",
    "mask_added": "poison/key-behind-mask",
    "scale_not_considered": "gaussian/negative-scale",
    "batch_of_the_bias_ignored": "gaussian/allowed",
}
BACKWARD = {
    "no_delta": "gaussian/plain",
    "no_slope_of_the_cap": "gaussian/softcap",
    "group_not_summed": "gaussian/grouped-heads",
    "no_sink_gradient": "gaussian/everything",
    "bias_gradient_of_the_last_row": "gaussian/bias-for-all-rows",
}


def fails_of(name):
    return failing(broken(name), flash("float32"), GRADIENTS)


@pytest.mark.parametrize(("name", "case"), [*SMALL.items(), *BACKWARD.items()])
def test_a_bug_shrinks(name, case):
    fails, dout = fails_of(name), CASES[case].arriving("float32") if name in BACKWARD else None
    p, dout = shrink(CASES[case].problem("float32"), dout, fails, 20.0)
    assert fails(p, dout)
    assert max(p.n_q, p.n_k) <= 8
    assert max(p.d_k, p.d_v) <= 8
    assert p.batch <= 2
    assert p.heads <= 8


def test_what_a_bug_needs_is_kept():
    p, _ = shrink(CASES["gaussian/everything"].problem("float32"), None, fails_of("bias_before_the_cap"), 20.0)
    assert p.bias is not None
    assert p.softcap is not None
    assert p.sink is None
    assert p.allowed is None
    assert p.causal is None


def test_nothing_is_lost_when_time_is_up():
    p = CASES["gaussian/everything"].problem("float32")
    assert shrink(p, None, lambda p, dout: True, 0.0) == (p, None)


def test_a_call_that_the_operator_refuses_fails_nothing(make):
    """What is tried on the way to a small call may be none: without a causal mask, more queries than keys."""

    def wrong(p):
        return np.zeros(p.out_shape, np.float32)

    fails = failing(wrong, flash("float32"), frozenset())
    p = make(9, 9, causal="bottom_right", variant="moba", options={"block_size": 2, "topk": 2})
    assert fails(p, None)
    assert not fails(p.replace(causal=None), None)
    small, _ = shrink(p, None, fails, 5.0)
    assert small.causal == "bottom_right"
    assert small.n_q * small.n_k < 81


def test_the_program_runs_and_fails(tmp_path):
    name = "window_left_exclusive"
    p, _ = shrink(CASES["gaussian/window"].problem("float32"), None, fails_of(name), 20.0)
    (tmp_path / "kernel.py").write_text(f"from refattn.check.bugs.edits import broken\nkernel = broken({name!r})\n")
    text = program("kernel.py:kernel", p)
    assert len(text.splitlines()) == 3
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "error above the bound" in done.stdout


def test_the_program_holds_the_numbers_exactly():
    x = np.array([[[[0.1, -0.0, np.inf, np.nan]]]], np.float32)
    p = Problem(x, x, x, causal="top_left", scale=0.3, allowed=np.ones((1, 1, 1, 1), bool))
    text = program("k", p, x).splitlines()[1]
    scope = {}
    exec("import numpy as np, refattn\n" + text, scope)
    for name, a in p.arrays().items():
        assert a.tobytes() == scope["p"].arrays()[name].tobytes()
    assert scope["p"].settings() == p.settings()


def test_capabilities_name_the_gradients():
    with pytest.raises(Exception, match="capabilities: gradients has 'dx'"):
        Capabilities(gradients={"dx"})


def test_the_length_at_which_a_kernel_begins_to_fail_is_said():
    fails, case = fails_of("keys_past_512"), np.random.default_rng(0)
    q, k, v = (case.standard_normal((1, 1, n, 4)).astype(np.float32) for n in (1, 513, 513))
    p = Problem(q, k, v)
    assert fails(p, None)
    assert "passes with n_k = 512, fails with 513, an edge of tiles of 256" in boundary(p, None, fails)
    assert boundary(p.replace(key=k[:, :, :1], value=v[:, :, :1]), None, lambda p, dout: True) == ""


RECURRENT = {
    "state_of_the_sequence_before": ("lightning", "gaussian/packed"),
    "dstate_without_the_first_decay": ("gated_delta", "gaussian/state"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_bug_of_a_recurrence_shrinks(name):
    pytest.importorskip("torch")
    variant, case = RECURRENT[name]
    (found,) = (c for c in cases(variant) if c.name == case)
    dout = found.arriving("float32") if name.startswith("dstate") else None
    fails = failing(broken(name), flash("float32"), GRADIENTS)
    p, dout = shrink(found.problem("float32"), dout, fails, 20.0)
    assert fails(p, dout)
    assert p.n_q == p.n_k <= 3
    assert p.d_k <= 2
    assert p.d_v <= 2
    assert p.heads <= 2
    assert p.state is None or p.state.shape == p.state_shape


def test_a_recurrence_is_cut_by_tokens_heads_and_widths():
    """A kernel that forgets the state of head 3, from token 5 on."""
    (found,) = (c for c in cases("gated_delta") if c.name == "gaussian/gated-and-all")
    p = found.problem("float32")
    mark = p.query[0, 3, 5, 2]  # one number that the call must keep

    def fails(p, dout):
        return VARIANTS[p.variant].takes(p) and bool((p.query == mark).any()) and bool((p.beta > 0).all())

    small, _ = shrink(p, None, fails, 20.0)
    assert (small.heads, small.heads_kv, small.n_q, small.d_k, small.d_v) == (1, 1, 1, 1, 1)
    assert small.query.item() == mark
    assert small.state is small.alpha is None
    assert small.beta.item() == p.beta[0, 3, 5, 0]
    wide = p.replace(alpha=np.repeat(p.alpha, p.d_k, 3))
    kept, _ = shrink(wide, None, lambda x, dout: fails(x, dout) and x.alpha is not None, 20.0)
    assert kept.alpha.shape == (1, 1, 1, 1)
    assert boundary(wide, None, lambda x, dout: x.n_q > 5) == ""
    assert (
        boundary(
            wide.replace(**{n: x[:, :, :6] for n, x in wide.arrays().items() if n != "state"}),
            None,
            lambda x, dout: x.n_q > 5,
        )
        == "passes with n_q = 5, fails with 6"
    )
