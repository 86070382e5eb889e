import contextlib
import errno
import fcntl
import os
import secrets
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from refattn import InvalidInput, files
from refattn.files import check_folders, load_arrays, save_arrays, sync, write_text, write_whole

PROC = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")


@pytest.mark.parametrize("swept", [False, True])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, swept):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def broken(error):
        def write(f):
            f.write(b"half")
            for path in tmp_path.glob(".a.txt.*") if swept else ():
                path.unlink()
            raise error

        return write

    with pytest.raises(InvalidInput) as caught:
        write_whole(target, broken(OSError(28, "No space left on device")))
    assert str(caught.value) == f"{target}: cannot write it (No space left on device); the file is as it was"
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, broken(KeyboardInterrupt()))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["a.txt", 40 * "long"])
def test_what_dead_writers_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path, name):
    target, live = tmp_path / name, []
    write_whole(target, lambda f: live.extend(set(os.listdir(tmp_path)) - {name}))
    stem = live[0][:-16]
    stale = [*live, *(f"{stem}{i:016x}" for i in range(0xABCDEF, 0xABCDEF + 8))]
    kept = [f".b.txt.{i:016x}" for i in range(8)]
    for left in stale + kept:
        (tmp_path / left).write_text("half")
    link = f"{stem}{16 * 'f'}"
    (tmp_path / link).symlink_to(kept[0])

    def meanwhile(f):
        f.write(b"first")
        write_text(target, "second")
        assert len(os.listdir(tmp_path)) == len(kept) + 3

    write_whole(target, meanwhile)
    assert target.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, link, name])


def test_a_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    replace = os.replace

    def late(name, target):
        monkeypatch.setattr(os, "replace", replace)
        write_text(target, "second")
        replace(name, target)

    monkeypatch.setattr(os, "replace", late)
    write_text(tmp_path / "a", "first")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_swept_before_its_lock_is_made_again_and_locks_may_fail(tmp_path, monkeypatch):
    swept = []

    def flock(fd, how):
        if swept:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        swept.extend(os.listdir(tmp_path))
        (tmp_path / swept[0]).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    write_text(tmp_path / "a", "new")
    assert swept != ["a"]
    assert os.listdir(tmp_path) == ["a"]


def test_another_programs_file_is_never_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "token")
    (tmp_path / ".a.token").write_text("other")
    with pytest.raises(InvalidInput) as caught:
        write_text(tmp_path / "a", "new")
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot write there (File exists); choose another folder"
    assert (tmp_path / ".a.token").read_text() == "other"
    assert os.listdir(tmp_path) == [".a.token"]


def test_a_system_without_locks_owners_and_folders_that_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.delattr(os, "chown")
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "O_BINARY", os.O_APPEND, raising=False)  # a flag that an open file shows
    stale, binary = f".a.{16 * '0'}", []
    (tmp_path / stale).write_text("half")
    for _ in range(2):
        write_whole(tmp_path / "a", lambda f: binary.append(bool(fcntl.fcntl(f, fcntl.F_GETFL) & os.O_BINARY)))
    assert binary == [True, True]
    assert sorted(os.listdir(tmp_path)) == [stale, "a"]


def test_the_owner_is_kept_where_the_system_allows_it(tmp_path, monkeypatch):
    asked = []

    def chown(path, *owner):
        asked.append(owner)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_text(tmp_path / "a", "old")
    found = os.stat(tmp_path / "a")
    monkeypatch.setattr(os, "chown", chown)
    write_text(tmp_path / "a", "new")
    assert asked == [(found.st_uid, found.st_gid)]
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("call", "number", "told"),
    [
        ("fsync", errno.EIO, True),
        ("fsync", errno.EINVAL, False),
        ("fsync", errno.ENOTSUP, False),
        ("open", errno.EACCES, False),
    ],
)
def test_a_disk_that_may_not_keep_a_name_is_told(tmp_path, monkeypatch, call, number, told):
    real = getattr(os, call)

    def failing(x, *more):
        if os.path.isdir(x):
            raise OSError(number, os.strerror(number))
        return real(x, *more)

    monkeypatch.setattr(os, call, failing)
    text = f"{tmp_path / 'a'}: written, but the disk may not keep it ({os.strerror(number)}); look at the disk"
    with pytest.raises(InvalidInput) if told else contextlib.nullcontext() as caught:
        write_text(tmp_path / "a", "new")
    assert not told or str(caught.value) == text
    assert (tmp_path / "a").read_text() == "new"


def test_only_a_folder_has_names_that_can_last(tmp_path):
    (tmp_path / "a").write_text("x")
    sync(tmp_path)
    with pytest.raises(NotADirectoryError):
        sync(tmp_path / "a")


def test_a_missing_folder_is_named(tmp_path):
    target = tmp_path / "no" / "a.txt"
    with pytest.raises(InvalidInput) as caught:
        write_text(target, "x")
    assert str(caught.value) == f"{target}: cannot write there (No such file or directory); choose another folder"


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


@PROC
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


@PROC
@pytest.mark.parametrize(("folder", "linked"), [("/dev/fd", True), ("/dev/fd", False), ("/proc/self/fd", True)])
def test_an_open_file_is_written_into_where_it_stands(tmp_path, monkeypatch, folder, linked):
    with open(tmp_path / "file", "wb", buffering=0) as f, monkeypatch.context() as patch:
        if not linked:  # as where /dev/fd is a folder of its own
            patch.setattr(os.path, "realpath", lambda path: path)
        f.write(b"first ")
        write_text(f"{folder}/{f.fileno()}", "report ")
        f.write(b"last")
    assert (tmp_path / "file").read_text() == "first report last"
    with pytest.raises(InvalidInput) as caught:
        write_text(f"{folder}/99999", "x")
    assert str(caught.value) == f"{folder}/99999: cannot write it (Bad file descriptor); choose another file"


def test_a_number_is_a_name_as_any(tmp_path):
    write_text(tmp_path / "1", "x")
    assert (tmp_path / "1").read_text() == "x"


@PROC
def test_a_full_pipe_takes_all_under_any_of_its_names(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"-" * 4096)
    found, text = [], "0123456789" * 20000

    def read():
        time.sleep(0.2)
        with open(reader) as f:
            found.append(f.read())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        write_text(f"/dev/fd/{writer}", text)
        write_text(f"/proc/thread-self/fd/{writer}", "end")
    finally:
        os.close(writer)
        thread.join()
    assert found[0].lstrip("-") == text + "end"


def test_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    write_text(tmp_path / "link", "new")  # one that leads nowhere yet
    assert (tmp_path / "folder" / "file").read_text() == "new"
    write_text(tmp_path / "link", "newer")
    assert (tmp_path / "folder" / "file").read_text() == "newer"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput) as caught:
        write_text(tmp_path / "loop", "x")
    why = os.strerror(errno.ELOOP)
    assert str(caught.value) == f"{tmp_path / 'loop'}: cannot write it ({why}); choose another file"


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


@pytest.mark.parametrize("use", [lambda p: write_text(p, "x"), load_arrays, check_folders])
def test_a_name_with_a_nul_is_refused(use):
    with pytest.raises(InvalidInput, match=r"'a\\x00b': holds a NUL, as no file's name does"):
        use("a\0b")


@pytest.mark.parametrize("name", ["99999999999999999999", "\u0661"])
def test_no_descriptor_of_ours_has_such_a_number(name):
    with pytest.raises(InvalidInput, match="cannot write"):
        write_text(f"/dev/fd/{name}", "x")


def test_half_of_a_pair_is_written_as_a_question_mark(tmp_path):
    write_text(tmp_path / "a", "a\ud800b")
    assert (tmp_path / "a").read_text() == "a?b"
