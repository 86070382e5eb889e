import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from refattn import Capabilities, InvalidInput, KernelError, Problem, check_kernel
from refattn.check.call import call_kernel
from refattn.check.kernels import find
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.native import lost, native
from refattn.cli.main import main

torch = pytest.importorskip("torch")
ABLE = Capabilities({"bfloat16"}, lse=True, gradients={"dq", "dk", "dv"}, arrays="torch", device="cpu")
NAME = "gaussian/plain[bfloat16]"


def kernel(p):
    """Compute in PyTorch, as a kernel that lives there."""
    out, lse = tiled(p)
    q = p.query
    assert isinstance(q, torch.Tensor)
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), torch.from_numpy(lse)


def backward(p, dout):
    assert isinstance(dout, torch.Tensor)
    found = gradients(p, dout.view(torch.int16).numpy().view(p.to("numpy").query.dtype))
    return {n: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for n, x in found.items() if n[1] in "qkv"}


kernel.gradients = backward


def said(changed, gradients=None, able=ABLE):
    def call(p):
        return changed(p)

    call.gradients = gradients or backward
    only = NAME if gradients is None else NAME.replace("[", "/gradients[")
    (check,) = check_kernel(call, capabilities=able, only=only).checks
    return check.verdict, check.message


def test_a_kernel_of_pytorch_arrays():
    report = check_kernel(kernel, capabilities=ABLE, only="gaussian/*")
    assert report.kernel == "kernel"
    assert report.count("passed") > 30
    assert report.passed


def test_an_answer_of_another_library():
    wrong = "out: got an array of numpy, expected torch as the inputs are"
    assert said(lambda p: tiled(p)) == ("failed", wrong)
    assert said(kernel, lambda p, g: {"dq": np.zeros(1)}) == ("failed", wrong.replace("out", "dq"))


def test_an_answer_on_another_device():
    wrong = "out: is on device meta, expected cpu as the inputs are"
    assert said(lambda p: kernel(p)[0].to("meta")) == ("failed", wrong)
    wrong = "lse: is on device meta, expected cpu as the inputs are"
    assert said(lambda p: (kernel(p)[0], kernel(p)[1].to("meta"))) == ("failed", wrong)
    moved = {"dk": torch.zeros(1, device="meta")}
    assert said(kernel, lambda p, g: moved) == ("failed", wrong.replace("lse", "dk"))


def test_a_view_of_an_input():
    def view(p):
        return p.query.view(p.query.shape)

    assert said(view) == ("failed", "out: shares memory with the input query; return an array of its own")


def test_arrays_of_no_elements_share_nothing():
    able = replace(ABLE, features=frozenset({"no_rows_or_keys", "lengths_differ"}))
    (check,) = check_kernel(kernel, capabilities=able, only="ragged/no-queries[bfloat16]").checks
    assert (check.verdict, check.message) == ("passed", "")


def test_a_changed_input():
    def changes(p):
        found = kernel(p)
        p.key[0, 0, 0, 0] = 7
        return found

    def changes_dout(p, dout):
        found = backward(p, dout)
        dout[0, 0, 0, 0] = 7
        return found

    assert said(changes) == ("failed", "the kernel changed its input key; it must leave its inputs as they are")
    text = "the kernel changed its input dout; it must leave its inputs as they are"
    assert said(kernel, changes_dout) == ("failed", text)


def test_capabilities_name_a_library():
    with pytest.raises(InvalidInput, match="got arrays='tensorflow' and device='', expected one of numpy, torch, cupy"):
        Capabilities(arrays="tensorflow")
    with pytest.raises(InvalidInput, match="got arrays='numpy' and device='cuda'"):
        replace(ABLE, arrays="numpy", device="cuda")


LOST = """
import torch
from refattn import Capabilities
from refattn.check.kernels.tiled import tiled

calls = []

def one(p):
    calls.append(p)
    if len(calls) == 3:
        open(__file__ + ".gone", "w").close()
        raise RuntimeError("CUDA error: misaligned address")
    return torch.from_numpy(tiled(p.to("numpy"))[0])

def two(p):
    raise AssertionError

one.capabilities = two.capabilities = Capabilities(arrays="torch")
"""


def test_a_device_that_is_lost_ends_the_run_and_what_was_judged_is_told(monkeypatch, tmp_path):
    path, to = tmp_path / "lost.py", tmp_path / "lost.json"
    monkeypatch.setattr("refattn.check.runner.lost", lambda able: path.with_suffix(".py.gone").exists())
    path.write_text(LOST)
    kernels = [f"{path}:{name}" for name in ("one", "two")]
    result = CliRunner().invoke(main, ["check", *kernels, "--only", "gaussian/w*", "--json", str(to)])
    assert result.exit_code == 1
    (report,) = json.loads(to.read_text())["kernels"]
    passed, text = report["checks"][:2], "the kernel lost the device: the kernel raised RuntimeError: CUDA error: mis"
    assert [c["verdict"] for c in report["checks"]] == ["passed", "passed", "failed"]
    assert report["checks"][2]["message"].startswith(text)
    assert report["left"] > 0
    assert all(c["worst"]["elements"] for c in passed)
    name = report["lost"]
    assert name == report["checks"][2]["name"]
    assert f"the device was lost in {name}; {report['left']} check" in result.output
    assert "--time-limit SECONDS runs each kernel in a process of its own and goes on" in result.output
    assert f"the device is lost for this process: {kernels[1]} did not run" in result.output


def test_a_device_that_was_never_there_is_not_lost():
    assert not lost(ABLE)
    nowhere = replace(ABLE, device="meta")  # it takes an array, and gives none back
    assert lost(nowhere)
    report = check_kernel(lambda p: p.query + 0, capabilities=nowhere, only=NAME)
    assert (report.lost, report.left, report.count("failed")) == ("", 0, 1)


def test_an_answer_that_cannot_be_read_is_the_kernels_failure():
    class Gone(torch.Tensor):
        def cpu(self):
            raise RuntimeError("CUDA error: misaligned address\nSearch for it in")

    p = Problem(*np.ones((3, 1, 1, 4, 8), np.float32))
    with pytest.raises(
        KernelError, match=r"reading what the kernel returned raised RuntimeError: CUDA error: mis.*ss$"
    ):
        call_kernel(lambda p: torch.zeros(p.out_shape).as_subclass(Gone), p)


def test_a_kernel_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "from refattn import Capabilities\n"
        "def attention(p):\n"
        "    return torch.nn.functional.scaled_dot_product_attention(p.query, p.key, p.value)\n"
        "attention.capabilities = Capabilities(features={'lengths_differ'}, arrays='torch')\n"
    )
    entry = find(f"{path}:attention")[0]
    report = check_kernel(entry.kernel(), capabilities=entry.capabilities, only="gaussian/plain*")
    assert report.passed


def test_what_arrives_further_on_is_of_the_kernels_library():
    """At lse, or at a recurrence's last state."""
    p, end = Problem(*np.ones((3, 1, 1, 4, 8), np.float32)), np.zeros((1, 1), np.float32)

    def call(p):
        raise AssertionError

    def back(p, dout, further):
        assert isinstance(dout, torch.Tensor)
        assert isinstance(further, torch.Tensor)
        if broken:
            further += 1
        return {"dq": dout.clone()}

    call.gradients, broken = back, False
    there = native(call, ABLE)
    assert there.gradients(p, p.query, end)["dq"].shape == p.query.shape
    broken = True
    with pytest.raises(KernelError, match="dlse"):
        there.gradients(p, p.query, end)
