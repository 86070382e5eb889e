"""The command line, as a person calls it."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from refattn import __version__, check_kernel, save_problem
from refattn.check.kernels import KERNELS
from refattn.cli.main import main

WRONG = """
import numpy as np
from refattn import Capabilities
from refattn.check.kernels.tiled import tiled

def right(problem):
    return tiled(problem)

def wrong(problem):
    out, lse = tiled(problem)
    out = out.copy()
    out[:, 0, 2:3] = 0
    return out, lse

def none(problem):
    return tiled(problem)

none.capabilities = Capabilities({"float32"}, features=set())
"""


@pytest.fixture
def kernels(tmp_path):
    (tmp_path / "kernels.py").write_text(WRONG)
    return str(tmp_path / "kernels.py")


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_right_kernel_exits_with_0(kernels):
    result = call("check", f"{kernels}:right", "--only", "gaussian/*")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    assert "float32" in result.output
    assert "error/allowed" in result.output
    assert "right" in result.output


def test_a_wrong_kernel_exits_with_1_and_tells_where(kernels):
    result = call("check", f"{kernels}:wrong", "--only", "gaussian/*")
    assert result.exit_code == 1
    assert "checks fail alike; the smallest:" in result.output
    assert "[float32]: out: error above the bound" in result.output
    assert "head 0, row 2" in result.output
    assert "allowed error" in result.output
    assert f"repeat it: refattn check {kernels}:wrong --only 'gaussian/" in result.output


def test_the_command_that_repeats_it_does(kernels):
    first = call("check", f"{kernels}:wrong", "--only", "gaussian/plain*").output
    line = next(x for x in first.splitlines() if "repeat it" in x)
    import shlex

    again = call(*shlex.split(line.split("refattn ", 1)[1]))
    assert again.exit_code == 1
    assert "fails gaussian/plain[float32]" in again.output


def test_nothing_ran_is_2(kernels):
    result = call("check", f"{kernels}:none", "--only", "gaussian/window*")
    assert result.exit_code == 2
    assert "nothing ran: no check is within the kernel's capabilities" in result.output
    assert "not in its capabilities" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "flashy"], "error: kernel: got 'flashy', expected one of"),
        (["check", "refattn-tiled", "--dtype", "int8"], "error: dtype: got 'int8'"),
        (["check", "refattn-tiled", "--variant", "cosine"], "error: variant: got 'cosine'"),
        (["check", "refattn-tiled", "--variant", "power"], "error: kernel: refattn-tiled computes softmax, not power"),
        (["check", "--variant", "power"], "error: kernel: no kernel here computes power"),
        (["check", "refattn-tiled", "--only", "nothing"], "error: only: no check of softmax is named 'nothing'"),
        (["check", "refattn-tiled", "--json", "/no/such/folder/x.json"], "its folder does not exist"),
        (["check", "refattn-tiled", "--html", "/no/such/folder/x.html"], "its folder does not exist"),
        (["check", "refattn-tiled", "--problem", "/no/such/file"], "there is no such file"),
        (["check", "refattn-tiled", "--json", "."], "error: .: is a folder; name a file"),
        (["check", "refattn-tiled", "--json", "x.out", "--junit", "x.out"], "error: x.out: is named twice"),
        (["check", "refattn-tiled", "--only", "a", "--only", "b"], "error: only: got 2 patterns, expected one"),
        (["check", "refattn-tiled", "--time-limit", "inf"], "time-limit: got inf seconds, expected more than 0 and"),
        (["check", "kernel.py"], "the function's name is missing: kernel.py:NAME"),
        (["check", ":attention"], "error: kernel: got no module before ':'"),
        (["check", "--tolerance", "1e-3"], "No such option"),
        (["show", "cosine"], "error: variant: got 'cosine'"),
        (["list", "--checks", "cosine"], "error: variant: got 'cosine'"),
        (["bench", "everything"], "error: bench: got 'everything', expected one of accuracy, accuracy_long, decode"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_bad_input_is_2_and_one_line(arguments, text):
    result = call(*arguments)
    assert result.exit_code == 2
    assert text in result.output
    assert "Traceback" not in result.output


def test_json_and_junit_are_written(kernels, tmp_path):
    out, xml = tmp_path / "r.json", tmp_path / "r.xml"
    result = call(
        "check", f"{kernels}:wrong", "refattn-tiled", "--only", "gaussian/plain*", "--json", out, "--junit", xml
    )
    assert result.exit_code == 1
    whole = json.loads(out.read_text())
    assert set(whole) == {"kernels", "machine", "versions"}
    assert [k["passed"] for k in whole["kernels"]] == [False, True]
    assert xml.read_text().count("<testsuite ") == 2


def test_the_page_is_written(kernels, tmp_path):
    target = tmp_path / "r.html"
    result = call("check", f"{kernels}:wrong", "refattn-tiled", "--only", "gaussian/plain*", "--html", target)
    assert result.exit_code == 1
    text = target.read_text()
    assert "✗ failed" in text
    assert "✓ passed" in text
    assert "refattn-tiled" in text
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".html"] == ["r.html"]


def test_a_problem_of_ones_own(kernels, tmp_path, make):
    save_problem(make(7, 9, causal="bottom_right"), tmp_path / "mine.npz")
    assert call("check", f"{kernels}:right", "--problem", tmp_path / "mine.npz").exit_code == 0
    result = call("check", f"{kernels}:wrong", "--problem", tmp_path / "mine.npz")
    assert result.exit_code == 1
    assert "fails file/mine[float32]" in result.output
    assert re.search(r"repeat it: refattn check \S+:wrong --problem \S+mine.npz$", result.output, re.MULTILINE)
    (tmp_path / "other.npz").write_text("hello")
    result = call("check", f"{kernels}:right", "--problem", tmp_path / "other.npz")
    assert result.exit_code == 2
    assert "is not a problem file of refattn" in result.output


def test_formats_that_fail_alike_are_told_once():
    result = call("check", "torch-sdpa-math", "--only", "poison/value-behind*")
    assert result.exit_code == 0
    assert "differs at an edge, 8 checks: nan-behind-mask, the contract that NaN or inf" in result.output
    assert "right · 1 edge differs" in result.output
    assert call("check", "torch-sdpa-math", "--only", "poison/value-behind*", "--strict").exit_code == 1


def test_without_other_kernels_a_wrong_one_is_shown(monkeypatch):
    """It does not count: what it gets wrong is said, and the exit code is that of our kernel."""
    from refattn.check import kernels

    ours = [kernels.KERNELS["refattn-tiled"]]
    monkeypatch.setattr("refattn.cli.check.found", lambda variant: ours)
    monkeypatch.setattr("refattn.cli.check.EVERY", -1.0)
    result = call("check", "--dtype", "float32", "--only", "gaussian/dim-4*", "--seed", "3")
    assert result.exit_code == 0
    for text in (
        "example-no-rescale fails gaussian/dim-40[float32]: out: error above the bound",
        "an edge of tiles of 32",
        "WRONG",
        "refattn-tiled: 1 of 3 checks, ",
    ):
        assert text in result.output
    assert call("check", "example-no-rescale", "--only", "gaussian/dim-40*", "--no-explain").exit_code == 1
    assert "runs only when named, it is wrong on purpose" not in result.output


def test_laws_whose_calls_are_wrong_are_one_line():
    from refattn.cli.output import print_failures

    kernel = KERNELS["example-no-rescale"].kernel()
    call_, law = (check_kernel(kernel, only=n).checks for n in ("gaussian/dim-40*", "law/key_permutation*"))
    for checks, alone in (((*call_, *law), False), (law, True)):
        console = Console(file=io.StringIO(), width=200)
        print_failures(console, [replace(check_kernel(kernel, only="law/key_permutation*"), checks=checks)])
        text = console.file.getvalue()
        assert ("fails law/key_permutation" in text) == alone
        assert ("1 check of a law may fail for the same reason, its call being wrong: law/key_perm" in text) != alone


def test_list_show_and_doctor():
    listed = call("list").output
    assert all(v in listed for v in ("softmax", "linear", "power", "sigmoid"))
    (row,) = [x for x in listed.splitlines() if "hyper_attention" in x and "HyperAttention" in x]
    assert all(x in row for x in ("HyperAttention", "refattn.functions.hyper", "arXiv 2310.05869"))
    kernels = call("list", "--kernels").output
    assert "torch-flex" in kernels
    assert max(map(len, (listed + kernels).splitlines())) <= 160
    names = call("list", "--checks", "softmax").output.split()
    assert "gaussian/plain" in names
    assert "law/split_and_merge" in names
    shown = call("show", "power").output
    for text in ("error unit", "contract:", "epsilon (default 0.001)", "arXiv 2410.09457", "planted bugs"):
        assert text in shown
    told = call("doctor")
    assert told.exit_code == 0
    assert __version__ in told.output
    assert "GPU" in told.output
    assert "; in a clone of refattn: pip install '.[" in told.output or "every extra is here" in told.output


def test_doctor_prints_json():
    told = json.loads(call("doctor", "--json").output)
    assert told["found"]["refattn"] == __version__
    assert set(told) == {"found", "missing", "cupy"}


def test_help_lists_what_there_is_to_choose():
    """Of every option and argument that takes one of a list of names."""
    from refattn.bench import benchmarks
    from refattn.check.model import MODELS
    from refattn.dtypes import FORMATS
    from refattn.variants import VARIANTS

    def words(*arguments):
        text = re.sub(r"-\n +", "-", call(*arguments, "--help").output)  # a name may go on in the next line
        return set(text.replace(",", " ").replace(".", " ").split())

    assert words("check") >= {*VARIANTS, *MODELS, *FORMATS, "quick", "ci", "nightly"}
    assert words("exact") >= {*VARIANTS, *FORMATS}
    assert words("init") >= set(VARIANTS)
    assert words("bench") >= set(benchmarks())


def test_doctor_shows_the_driver_and_compute_capability(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.159.04, 9.0'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    told = " ".join(call("doctor").output.split())
    assert "driver 580.159.04, compute capability 9.0" in told
    assert "CUDA" in told
    fake.write_text("#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    assert "no devices were found" in call("doctor").output


def test_bench_names_itself(tmp_path, monkeypatch):
    """The benchmark's own folder is found, and a figure that breaks its bound exits with 1."""
    from refattn import bench

    (tmp_path / "toy.py").write_text(
        "from refattn.bench import Row\n"
        "def rows():\n    yield Row('a', 1.0, 's', at_most=2.0)\n    yield Row('b', 1.0, 'ratio', at_least=2.0)\n"
    )
    assert "exact" in bench.benchmarks()
    monkeypatch.setattr(bench, "_folder", lambda: tmp_path)
    result = call("bench", "toy", "--json", tmp_path / "toy.json")
    assert result.exit_code == 1
    whole = json.loads((tmp_path / "toy.json").read_text())
    assert set(whole) == {"machine", "versions", "rows"}
    assert whole["rows"][0] == {"name": "a", "value": 1.0, "unit": "s", "at_most": 2.0, "at_least": None, "holds": True}
    assert whole["rows"][1]["holds"] is False
    assert call("bench", "toy", "--json", "/no/such/folder/x").exit_code == 2


def test_the_console_script_and_interrupts():
    done = subprocess.run([sys.executable, "-m", "refattn", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_exact_from_a_problem_file(tmp_path, make):
    from refattn import evaluate
    from refattn.files import load_arrays

    p = make(5, 9, causal="bottom_right", dtype="bfloat16")
    save_problem(p, tmp_path / "in.npz")
    dout = np.ones(p.out_shape, np.float32)
    np.save(tmp_path / "dout.npy", dout)
    result = call("exact", tmp_path / "in.npz", "--rounding", "bfloat16", "--out", tmp_path / "out.npz",
                  "--gradients", tmp_path / "dout.npy", "--checkpoint", tmp_path / "parts")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "0 undecided" in result.output
    assert "float64 enclosures, L = 0" in result.output
    want = evaluate(p, rounding="bfloat16", gradients=dout).values
    got = load_arrays(tmp_path / "out.npz")
    assert {n: x.tobytes() for n, x in got.items()} == {n: x.tobytes() for n, x in want.items()}
    assert got["out"].dtype.name == "bfloat16"


def test_exact_from_plain_arrays(tmp_path, make):
    from refattn import evaluate
    from refattn.files import load_arrays

    p = make(5, 9, scale=0.5, causal="top_left", softcap=3.0)
    np.savez(tmp_path / "in.npz", query=p.query, key=p.key, value=p.value)
    result = call("exact", tmp_path / "in.npz", "--rounding", "float64", "--out", tmp_path / "out.npz",
                  "--scale", "0.5", "--causal", "top_left", "--softcap", "3", "--n-jobs", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (load_arrays(tmp_path / "out.npz")["out"] == evaluate(p, rounding="float64").out).all()


def test_exact_rows(tmp_path, make):
    from refattn import evaluate
    from refattn.files import load_arrays

    p = make(9, 9, causal="bottom_right")
    save_problem(p, tmp_path / "in.npz")
    dout = np.ones(p.out_shape, np.float32)
    np.save(tmp_path / "dout.npy", dout)
    arguments = ("exact", tmp_path / "in.npz", "--rounding", "float32", "--out", tmp_path / "out.npz")
    result = call(*arguments, "--gradients", tmp_path / "dout.npy", "--rows", "2:5")
    assert result.exit_code == 0, result.output
    assert "dk" not in result.output
    want, got = evaluate(p, rounding="float32", gradients=dout).values, load_arrays(tmp_path / "out.npz")
    assert sorted(got) == ["dq", "lse", "out"]
    assert all((x == want[n][:, :, 2:5]).all() for n, x in got.items())
    np.save(tmp_path / "dout.npy", dout[:, :, :4])
    for rows, text in (
        ("2-5", "rows: got '2-5', expected START:STOP, such as 0:1024"),
        ("5:10", "rows: got 5:10, expected 0 <= start < stop <= 9, the queries of the call"),
        ("2:5", "gradients: got shape (1, 2, 4, 8), expected (1, 2, 9, 8), out's"),
    ):
        result = call(*arguments, "--gradients", tmp_path / "dout.npy", "--rows", rows)
        assert (result.exit_code, text in result.output) == (2, True), result.output


def test_exact_on_a_gpu_says_where_there_is_none(tmp_path, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    save_problem(make(2, 3), tmp_path / "in.npz")
    more = ("--rounding", "float64", "--out", tmp_path / "out.npz", "--device", "cuda", "--rows", "0:1")
    result = call("exact", tmp_path / "in.npz", *more)
    assert (result.exit_code, "device='cuda' needs the package cupy" in result.output) == (2, True), result.output


def test_exact_says_that_gradients_take_long(tmp_path, make, monkeypatch):
    module = importlib.import_module("refattn.cli.exact")
    monkeypatch.setattr(module, "LARGE", 81)
    monkeypatch.setattr(module, "PROBED", 3)
    p = make(9, 9)
    save_problem(p, tmp_path / "in.npz")
    np.save(tmp_path / "dout.npy", np.ones(p.out_shape, np.float32))
    for seconds, told in ((20.0, True), (1.0, False)):
        monkeypatch.setattr(module, "_seconds", lambda problem, dout, rounding, rows, took=seconds: took)
        result = call("exact", tmp_path / "in.npz", "--rounding", "float32", "--out", tmp_path / "out.npz",
                      "--gradients", tmp_path / "dout.npy")  # fmt: skip
        assert result.exit_code == 0, result.output
        text = "gradients of 18 rows on 9 keys take about 60 s here; --rows 0:3 gives out, lse and dq of some"
        assert (text in result.output) == told


def test_exact_and_bad_files(tmp_path, make):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "half.npz", query=np.ones(3))
    np.savez(tmp_path / "short.npz", q=np.ones(3), k=np.ones(3), v=np.ones(3))
    three = {n: np.ones(3) for n in ("query", "key", "value")}
    np.savez(tmp_path / "mask.npz", **three, mask=np.ones(3))
    np.savez(tmp_path / "causal.npz", **three, causal=True)
    np.savez(tmp_path / "flat.npz", query=np.ones(3), key=np.ones(3), value=np.ones(3))
    save_problem(make(), tmp_path / "good.npz")
    (tmp_path / "bad.npy").write_text("hello")
    out = ("--out", tmp_path / "out.npz")
    for arguments, text in (
        (("none.npz", "--rounding", "float32", *out), "there is no such file"),
        ((tmp_path / "text.npz", "--rounding", "float32", *out), "is no .npz file that can be read"),
        (
            (tmp_path / "half.npz", "--rounding", "float32", *out),
            "has no key but query; expected query, key, value and, ",
        ),
        ((tmp_path / "short.npz", "--rounding", "float32", *out), "has no query but k, q, v; expected query, key, "),
        (
            (tmp_path / "mask.npz", "--rounding", "float32", *out),
            "no array of a call is; a boolean mask is called allo",
        ),
        ((tmp_path / "causal.npz", "--rounding", "float32", *out), "has causal, which no array of a call is; give it "),
        ((tmp_path / "flat.npz", "--rounding", "float32", *out), "query: got 1 axes"),
        ((tmp_path / "good.npz", "--rounding", "float20", *out), "rounding: got 'float20'"),
        ((tmp_path / "good.npz", "--rounding", "fp16", *out), "rounding: got 'fp16'; write 'float16'"),
        (
            (tmp_path / "good.npz", "--rounding", "float32", "--scale", "2", *out),
            "carries its own options; leave out --scale",
        ),
        ((tmp_path / "good.npz", "--rounding", "float32", "--out", "/no/such/x.npz"), "its folder does not exist"),
        (
            (tmp_path / "good.npz", "--rounding", "float32", "--gradients", tmp_path / "bad.npy", *out),
            "is no .npy file",
        ),
        ((tmp_path / "good.npz", *out), "Missing option '--rounding'"),
    ):
        result = call("exact", *arguments)
        assert result.exit_code == 2, result.output
        assert text in result.output
    assert not (tmp_path / "out.npz").exists()


def test_init_prints_what_a_kernel_can_do(kernels):
    result = call("init", f"{kernels}:right")
    assert result.exit_code == 0
    assert "# right: float64, float32, float16, bfloat16" in result.output
    assert "right.capabilities = Capabilities(" in result.output
    assert '"softcap"' in result.output or "dtypes=" in result.output
    assert call("init", "nothing.py:f").exit_code == 2


def test_failures_of_one_cause_are_one_line(kernels):
    output = call("check", f"{kernels}:wrong", "--only", "gaussian/*", "--no-explain").output
    assert output.count("checks fail alike; the smallest:") == 1
    assert " and " in next(x for x in output.splitlines() if x.startswith("  the same in "))
    assert output.count("repeat it:") == 1


def test_the_seed_is_printed_and_repeats(kernels):
    first = call("check", f"{kernels}:right", "--only", "calls/000-*", "--seed", "7")
    assert "calls drawn by seed 7; --seed 7 draws them again" in first.output
    assert first.exit_code == 0


def test_a_call_is_checked_as_what_it_is(kernels, tmp_path, make):
    save_problem(make(), tmp_path / "p.npz")
    for more, says in (
        (["--dtype", "bfloat16"], "problem: one call is checked; leave out --only, --seconds, --budget and --dtype"),
        (["--variant", "linear"], "is a call of softmax, not of linear"),
    ):
        result = call("check", f"{kernels}:attention", "--problem", str(tmp_path / "p.npz"), *more)
        assert result.exit_code == 2
        assert says in result.output


def test_names_with_brackets_are_printed_as_they_are(kernels, tmp_path):
    folder = tmp_path / "[" / "[red]"
    folder.mkdir(parents=True)
    path = folder / "k[bold].py"
    path.write_text("def wrong(p):\n    return p.query * 0\n")
    result = call("check", f"{path}:wrong", "--only", "gaussian/plain", "--no-explain")
    assert result.exit_code == 1
    assert "k[bold].py:wrong" in result.output


def test_escape_codes_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "k.py"
    path.write_text("raise RuntimeError('\\x1b]0;title\\x07')\n")
    for more in ([], ["--untrusted"]):
        result = call("check", f"{path}:attention", *more)
        assert result.exit_code == 2
        assert "RuntimeError" in result.output
        assert "\x1b" not in result.output


def test_an_untrusted_kernel_stays_one_in_its_repeat_line(tmp_path):
    """A line that ran it where it sees its judge would undo what was asked for."""
    path = tmp_path / "k.py"
    path.write_text("def wrong(p):\n    return p.query * 0\n")
    found = CliRunner().invoke(
        main, ["check", f"{path}:wrong", "--untrusted", "--only", "gaussian/plain", "--no-explain"]
    )
    assert found.exit_code == 1
    assert f"refattn check {path}:wrong --untrusted --only 'gaussian/plain[float32]'" in found.output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--memory-limit", "4"], "memory-limit: only an --untrusted kernel has one"),
        (["--untrusted", "--variant", "linear"], "untrusted: name a kernel of softmax attention"),
        (["--untrusted", "--time-limit", "0"], "time-limit: got 0.0 seconds"),
        (["--untrusted", "--time-limit", "inf"], "time-limit: got inf seconds"),
        (["--untrusted", "--memory-limit", "inf"], "memory-limit: got inf GiB"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, more, says):
    path = tmp_path / "k.py"
    path.write_text("def wrong(p):\n    return p.query * 0\n")
    found = CliRunner().invoke(main, ["check", f"{path}:wrong", *more])
    assert found.exit_code == 2
    assert says in found.output
