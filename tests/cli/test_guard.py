"""Exit code 0 comes only from a run that reached its end."""

import os
import signal
import subprocess
import sys
import time

import pytest

TEXT = """
import os, signal, sys, time
from refattn.check.bugs.planted import plain
calls = [0]

def ending(end):
    def kernel(p):
        calls[0] += 1
        if calls[0] == 2:
            end()
        return plain(p)
    return kernel

leaves = ending(lambda: os._exit(0))
crashes = ending(lambda: os.kill(os.getpid(), signal.SIGSEGV))
exits = ending(lambda: sys.exit(0))
waits = ending(lambda: (print("waiting", file=sys.stderr, flush=True), time.sleep(60)))
right = plain

class Untold(Exception):
    def __str__(self):
        sys.exit(0)

def raises():
    raise Untold

untold = ending(raises)

def rings():
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

later = ending(rings)

def turned():
    import refattn.check.runner
    refattn.check.runner.against = print

turns = ending(turned)
"""


def start(folder, name, *more):
    (folder / "kernels.py").write_text(TEXT)
    command = [sys.executable, "-m", "refattn", "check", f"kernels.py:{name}", "--dtype", "float32"]
    command += ["--only", "gaussian/w*", "--no-explain", *more]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("right", 0, ""),
        ("leaves", 1, "error: the run ended with exit code 0 at kernels.py:leaves gaussian/window"),
        ("crashes", 1, "error: the run ended by signal 11 at kernels.py:crashes gaussian/window"),
        ("exits", 1, "the kernel raised SystemExit: 0"),
        ("untold", 0, "the kernel raised Untold: its text raised SystemExit"),
        ("turns", 1, "the kernel replaced refattn.check.runner.against; it must leave the process that judges it"),
    ],
)
def test_a_kernel_cannot_end_the_run_for_others(tmp_path, name, code, text):
    process = start(tmp_path, name)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    assert text in out + err


def test_what_a_kernel_does_later_does_not_end_the_run_with_success(tmp_path):
    """Its signal comes where it may: in a call of its own, in the judge, in what starts Python."""
    process = start(tmp_path, "later")
    out, err = process.communicate()
    assert process.returncode == 1, out + err


def test_init_is_guarded_too(tmp_path):
    (tmp_path / "kernels.py").write_text(TEXT)
    command = [sys.executable, "-m", "refattn", "init", "kernels.py:leaves"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: the run ended with exit code 0" in done.stderr


def test_the_process_limit_says_which_call_it_was(tmp_path):
    process = start(tmp_path, "leaves", "--time-limit", "60")
    out, err = process.communicate()
    assert process.returncode == 1
    assert "kernels.py:leaves fails gaussian/window" in out + err


def test_bad_input_keeps_its_exit_code(tmp_path):
    process = start(tmp_path, "nobody")
    out, err = process.communicate()
    assert process.returncode == 2, out + err
    assert "nobody" in err


def test_ending_it_ends_the_kernel(tmp_path):
    process = start(tmp_path, "waits")
    while "waiting" not in process.stderr.readline():
        assert process.poll() is None
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: the run was told to end by signal 15 (SIGTERM); it has no verdict" in err
    assert "kernel left" not in err
    assert time.monotonic() - began < 30
