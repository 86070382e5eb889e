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
        ("leaves", 1, "error: the run ended with exit code 0 before its report: a kernel left the process or crashed"),
        ("crashes", 1, "error: the run ended by signal 11 before its report"),
        ("exits", 1, "the kernel raised SystemExit: 0"),
    ],
)
def test_a_kernel_cannot_end_the_run_with_success(tmp_path, name, code, text):
    process = start(tmp_path, name)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    assert text in out + err


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
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert time.monotonic() - began < 30
