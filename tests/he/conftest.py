"""A server by the command line, and what is forgotten after each file."""

import subprocess
import sys

import pytest

from refattn.he import seal


@pytest.fixture(autouse=True, scope="module")
def contexts():
    """Forget SEAL's contexts after a file: one of degree 32768 has 350 MB, which the next ones then take."""
    yield
    seal.context.cache_clear()


@pytest.fixture
def served(tmp_path):
    """Return a function that serves a file by the command line in a process of its own, and the URL."""
    started = []

    def serve(path, *more):
        command = [sys.executable, "-m", "refattn", "he", "serve", str(path), "--port", "0", *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process.stdout.readline().removeprefix("listening at ").strip()

    yield serve
    for process in started:
        process.terminate()
        process.wait(30)
        process.stdout.close()
