import os

import numpy as np
import pytest

from refattn import InvalidInput, Problem, load_problem, save_problem
from refattn.dtypes import FORMATS
from refattn.files import write_text, write_whole


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_format_survives(tmp_path, make, dtype):
    p = make(dtype=dtype, causal="top_left", window=(2, None), scale=0.3, allowed=np.ones((1, 1, 5, 7), bool))
    save_problem(p, tmp_path / "p.npz")
    q = load_problem(tmp_path / "p.npz")
    assert q.settings() == p.settings()
    assert {n: (x.dtype, x.tobytes()) for n, x in q.arrays().items()} == {
        n: (x.dtype, x.tobytes()) for n, x in p.arrays().items()
    }


def test_options_survive(tmp_path, make):
    p = make(variant="linear", causal="top_left", options={"decay": (0.5, 0.25), "normalize": False})
    save_problem(p, tmp_path / "p.npz")
    assert load_problem(tmp_path / "p.npz").options == p.options


def test_torch_problem(tmp_path, make):
    save_problem(make(dtype="bfloat16").to("torch"), tmp_path / "p.npz")
    assert load_problem(tmp_path / "p.npz").dtype == "bfloat16"


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there is no such file"):
        load_problem(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.save(tmp_path / "plain.npy", np.ones(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "other.npz", "plain.npy", "empty.npz"):
        with pytest.raises(InvalidInput, match="is not a problem file of refattn"):
            load_problem(tmp_path / name)


def test_a_torn_file_is_refused(tmp_path, make):
    save_problem(make(), tmp_path / "p.npz")
    whole = (tmp_path / "p.npz").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "torn.npz").write_bytes(whole[:size])
        with pytest.raises(InvalidInput, match="is not a problem file"):
            load_problem(tmp_path / "torn.npz")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def broken(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        InvalidInput, match=r"a.txt: cannot write it \(No space left on device\); the file is as it was"
    ):
        write_whole(target, broken)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, lambda f: (_ for _ in ()).throw(KeyboardInterrupt))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="cannot write there"):
        write_text(tmp_path / "no" / "a.txt", "x")


def test_problem_is_validated_on_load(tmp_path, make):
    p = make()
    save_problem(p, tmp_path / "p.npz")
    assert isinstance(load_problem(str(tmp_path / "p.npz")), Problem)
