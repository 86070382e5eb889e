"""compute-sanitizer finds nothing in small calls of every kernel. Without a GPU they do not run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refattn.check.kernels import KERNELS

from .sanitized import BACKWARD, CACHE, CALLS, ENGINE, TRILINEAR

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "tests.gpu.sanitized"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    calls = CALLS, BACKWARD, CACHE, TRILINEAR, ENGINE
    assert done.stdout.count("ok ") == sum(map(len, calls))
