"""Work in a forked process, whose memory is gone with it: SEAL's pools keep what sessions took until a process ends."""

import functools
import os
import pickle
import traceback
import warnings

import pytest

__all__ = ["apart"]


def apart(work):
    """Have a function, or a test, run in a process of its own; what it returns or raises comes back.

    Nothing that it makes stays: it is for work with large keys. PyTorch may not be used in it, whose threads do not
    survive a fork.
    """

    @functools.wraps(work)
    def run(*given, **more):
        if not hasattr(os, "fork"):
            return work(*given, **more)
        out, back = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's: this process has threads, of BLAS
            child = os.fork()
        if child == 0:
            _told(back, work, given, more)
        os.close(back)
        with os.fdopen(out, "rb") as pipe:
            told = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert told, f"the process ended with {code}"
        what, found = pickle.loads(told)
        if what == "skipped":
            pytest.skip(found)
        assert what == "returned", found
        return found

    return run


def _told(back, work, given, more):
    """Write what work returns or raises, and end the process."""
    try:
        told = "returned", work(*given, **more)
    except pytest.skip.Exception as e:
        told = "skipped", str(e)
    except BaseException:
        told = "raised", traceback.format_exc()
    try:
        with os.fdopen(back, "wb") as pipe:
            pickle.dump(told, pipe)
    finally:
        os._exit(0)
