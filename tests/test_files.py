import contextlib
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, load_problem, save_problem
from refattn.dtypes import FORMATS
from refattn.files import load_arrays, save_arrays, write_text, write_whole


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


def test_what_a_dead_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    stale, other = tmp_path / f".a.txt.{16 * '0'}", tmp_path / f".b.txt.{16 * '0'}"
    for path in (stale, other):
        path.write_text("half")

    def meanwhile(f):
        f.write(b"first")
        write_text(tmp_path / "a.txt", "second")
        assert len(os.listdir(tmp_path)) == 3

    write_whole(tmp_path / "a.txt", meanwhile)
    assert (tmp_path / "a.txt").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [other.name, "a.txt"]


def test_a_disk_that_may_not_keep_a_name_is_told(tmp_path, monkeypatch):
    def failing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(InvalidInput, match=r"written, but the disk may not keep it \(Input/output error\)"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="cannot write there"):
        write_text(tmp_path / "no" / "a.txt", "x")


def test_problem_is_validated_on_load(tmp_path, make):
    p = make()
    save_problem(p, tmp_path / "p.npz")
    assert isinstance(load_problem(str(tmp_path / "p.npz")), Problem)


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "hello")
    assert os.read(reader, 100) == b"hello"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_stays_one(tmp_path):
    null = "/dev/null"
    if os.geteuid() == 0:  # who could replace the real one tries a copy
        null = str(tmp_path / "null")
        os.mknod(null, 0o666 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
    before = os.stat(null)
    write_text(null, "hello")
    save_arrays({"x": np.ones(3)}, null)
    after = os.stat(null)
    assert (before.st_ino, before.st_rdev, stat.S_ISCHR(after.st_mode)) == (after.st_ino, after.st_rdev, True)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("to_file", [False, True])
def test_the_own_output_is_written_into(tmp_path, to_file):
    (tmp_path / "out").symlink_to("/proc/self/fd/1")
    (tmp_path / "again").symlink_to("out")
    code = "import sys; from refattn.files import write_text; print('first', flush=True);"
    code += "[write_text(p, 'report\\n') for p in sys.argv[1:]]; print('last')"
    command = [sys.executable, "-c", code, str(tmp_path / "again"), "/dev/fd/1"]
    if to_file:  # what was written to it before is kept, and what comes after is behind the report
        with open(tmp_path / "file", "w") as f:
            subprocess.run(command, check=True, stdout=f)
        found = (tmp_path / "file").read_text()
    else:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found == "first\nreport\nreport\nlast\n"
    assert os.readlink(tmp_path / "out") == "/proc/self/fd/1"
    assert os.readlink(tmp_path / "again") == "out"


def test_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    write_text(tmp_path / "link", "new")  # one that leads nowhere yet
    assert (tmp_path / "folder" / "file").read_text() == "new"
    write_text(tmp_path / "link", "newer")
    assert (tmp_path / "folder" / "file").read_text() == "newer"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput, match="loop: cannot write it"):
        write_text(tmp_path / "loop", "x")


def test_a_file_keeps_its_mode_and_a_new_one_takes_the_umask(tmp_path):
    target = tmp_path / "a"
    write_text(target, "x")
    mask = os.umask(0o077)
    try:
        write_text(tmp_path / "b", "x")
    finally:
        os.umask(mask)
    assert (mode_of(target), mode_of(tmp_path / "b")) == (0o666 & ~mask, 0o600)
    for mode in (0o600, 0o640, 0o755):
        target.chmod(mode)
        seen = []
        write_whole(target, lambda f, seen=seen: seen.append(mode_of(f.name)))
        assert mode_of(target) == mode
        assert seen == [0o600]  # at no time more than before


def test_the_umask_of_the_process_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("another thread's file would get its mode"))
    write_text(tmp_path / "a", "x")
    write_text(tmp_path / "a", "y")


def test_file_and_folder_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    write_text(tmp_path / "a", "x")
    assert synced == [False, True]


def test_a_folder_and_a_long_name_are_told(tmp_path):
    with pytest.raises(InvalidInput, match=r"cannot write it .*; choose another file"):
        write_text(tmp_path, "x")
    write_text(tmp_path / ("a" * 255), "x")
    with pytest.raises(InvalidInput, match="cannot write"):
        write_text(tmp_path / ("a" * 256), "x")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_not_replaced(tmp_path):
    write_text(tmp_path / "a", "old")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(InvalidInput, match="it is read-only"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_what_fails_writes_nothing_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    def broken(f):
        f.write(b"half")
        raise KeyError

    with pytest.raises(KeyError):
        write_whole(tmp_path / "pipe", broken)
    assert os.read(reader, 100) == b""
    os.close(reader)


@pytest.mark.parametrize("dtype", FORMATS)
def test_files_do_not_depend_on_the_order_of_bytes(tmp_path, make, dtype):
    p = make(dtype=dtype)
    swapped = {n: x.astype(x.dtype.newbyteorder("S")) for n, x in p.arrays().items()}
    save_problem(p.replace(**swapped), tmp_path / "p.npz")
    save_arrays(swapped, tmp_path / "a.npz")
    for found in (load_problem(tmp_path / "p.npz").arrays(), load_arrays(tmp_path / "a.npz")):
        assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in p.arrays().items()}


def test_options_of_numpy_survive(tmp_path, make):
    p = make(
        variant="linear", causal="top_left", options={"decay": np.array([0.5, 0.25]), "normalize": np.bool_(False)}
    )
    save_problem(p, tmp_path / "p.npz")
    assert load_problem(tmp_path / "p.npz").options == {"decay": (0.5, 0.25), "normalize": False}
    with pytest.raises(InvalidInput, match="object: cannot be kept in a file; pass numbers"):
        save_problem(p.replace(options={"decay": object()}), tmp_path / "p.npz")


def rewritten(tmp_path, make, change):
    """Return a problem's file with its head changed."""
    save_problem(make(), tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as f:
        parts = dict(f)
    head = json.loads(str(parts.pop("refattn")))
    change(head, parts)
    np.savez(tmp_path / "p.npz", refattn=np.array(json.dumps(head)), **parts)
    return tmp_path / "p.npz"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda head, parts: head.update(settings=None), "its settings are no mapping of names to values"),
        (lambda head, parts: head.pop("settings"), "its settings are no mapping of names to values"),
        (lambda head, parts: head.update(settings={"options": None}), "its settings are no mapping"),
        (lambda head, parts: head.update(settings={"colour": 1}), "has colour, which Problem does not know"),
        (lambda head, parts: head.update(settings={"query": 1}), "has query twice"),
        (lambda head, parts: head["types"].pop("key"), "has no key; write it with save_problem again"),
        (lambda head, parts: head.update(types=None), "is not a problem file of refattn"),
        (lambda head, parts: head["types"].update(key="float64"), "is not a problem file|key: "),
        (lambda head, parts: head.update(settings={"scale": 10**400}), "scale: got 1000"),
        (lambda head, parts: head.update(settings={"window": 3}), "window: got 3"),
        (lambda head, parts: head.update(settings={"variant": None}), "variant: got None"),
    ],
)
def test_a_head_that_is_none(tmp_path, make, change, text):
    path = rewritten(tmp_path, make, change)
    with pytest.raises((InvalidInput, InvalidProblem), match=text):
        load_problem(path)


def test_an_archive_broken_anywhere_is_named(tmp_path, make):
    save_problem(make(), tmp_path / "p.npz")
    np.savez_compressed(tmp_path / "c.npz", **dict(np.load(tmp_path / "p.npz")))
    rng = np.random.default_rng(0)
    for name in ("p.npz", "c.npz"):
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(300):
            broken = whole.copy()
            broken[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "broken.npz").write_bytes(broken.tobytes())
            with contextlib.suppress(InvalidInput, InvalidProblem):  # and nothing else
                load_problem(tmp_path / "broken.npz")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_problem(tmp_path)
