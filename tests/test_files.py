import contextlib
import json
import pickle

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, load_problem, save_problem
from refattn.dtypes import FORMATS
from refattn.files import load_arrays, save_arrays

FOREIGN = "is not a problem file of refattn; make one with refattn.save_problem"


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


def test_arguments_in_the_other_order_are_named(tmp_path, make):
    with pytest.raises(InvalidInput, match=r"problem: got '.*', expected a Problem; save_problem\(problem, path\)"):
        save_problem(str(tmp_path / "x.npz"), make())
    for path in (None, 3):
        with pytest.raises(InvalidInput, match=f"path: got {path}, expected a path"):
            save_problem(make(), path)


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


def test_problem_is_validated_on_load(tmp_path, make):
    p = make()
    save_problem(p, tmp_path / "p.npz")
    assert isinstance(load_problem(str(tmp_path / "p.npz")), Problem)


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


def rewritten(path, change):
    """Change the head and the arrays of a file."""
    with np.load(path) as f:
        parts = dict(f)
    head = json.loads(str(parts.pop("refattn")))
    change(head, parts)
    np.savez(path, refattn=np.array(json.dumps(head)), **parts)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda head, parts: head.update(settings=None), "its settings are no mapping of names to values; {}"),
        (lambda head, parts: head.pop("settings"), "its settings are no mapping of names to values; {}"),
        (
            lambda head, parts: head.update(settings={"options": None}),
            "its settings are no mapping of names to values; {}",
        ),
        (
            lambda head, parts: head.update(settings={"size": 1, "c" * 50: 1}),
            f"has {'c' * 40}, size, which Problem does not know; another version wrote it",
        ),
        (lambda head, parts: head.update(settings={"query": 1}), "has query twice; {}"),
        (lambda head, parts: head["types"].pop("key"), "has no key; {}"),
        (lambda head, parts: [head["types"].pop(n) for n in ("value", "query")], "has no query, value; {}"),
        (lambda head, parts: head.update(types=None), FOREIGN),
        (lambda head, parts: head["types"].update(key="float64"), FOREIGN),
    ],
)
def test_a_head_that_is_none(tmp_path, make, change, text):
    path = tmp_path / "p.npz"
    save_problem(make(), path)
    rewritten(path, change)
    with pytest.raises(InvalidInput) as caught:
        load_problem(path)
    assert str(caught.value) == f"{path}: {text.format('write it with save_problem again')}"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scale": 10**400}, "scale: got 1000"),
        ({"window": 3}, "window: got 3"),
        ({"variant": None}, "variant: got None"),
    ],
)
def test_settings_that_mean_nothing(tmp_path, make, settings, text):
    save_problem(make(), tmp_path / "p.npz")
    rewritten(tmp_path / "p.npz", lambda head, parts: head.update(settings=settings))
    with pytest.raises(InvalidProblem, match=text):
        load_problem(tmp_path / "p.npz")


def test_arrays_of_any_type_and_what_is_said_about_them(tmp_path):
    kinds = {"x": np.uint8, "uint64": np.uint64, "bool": np.bool_, "int16": np.int16, "complex64": np.complex64}
    arrays = {n: np.arange(3).astype(k) for n, k in kinds.items()}
    save_arrays(arrays, tmp_path / "a.npz", source="here", size=np.int64(3))
    assert {n: (x.dtype, x.tobytes()) for n, x in load_arrays(tmp_path / "a.npz").items()} == {
        n: (x.dtype, x.tobytes()) for n, x in arrays.items()
    }
    with np.load(tmp_path / "a.npz") as f:
        head = json.loads(str(f["refattn"]))
    types = {n: np.dtype(k).name for n, k in kinds.items()}
    assert head == {"mark": "refattn arrays 1", "types": types, "about": {"source": "here", "size": 3}}
    with pytest.raises(InvalidProblem, match="x: got list, expected an array of numpy, torch, cupy, jax; "):
        save_arrays({"x": [1]}, tmp_path / "b.npz")


def test_arrays_from_another_process_survive(tmp_path):
    arrays = {"bool": np.array([True, False]), "int64": np.arange(3), "float32": np.ones(2, np.float32)}
    sent = pickle.loads(pickle.dumps(arrays))  # their types are NumPy's own, and no longer say so
    save_arrays(sent, tmp_path / "a.npz")
    assert {n: (x.dtype, x.tobytes()) for n, x in load_arrays(tmp_path / "a.npz").items()} == {
        n: (x.dtype, x.tobytes()) for n, x in arrays.items()
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda head, parts: head.update(mark="refattn problem 1"), KeyError("mark")),
        (lambda head, parts: head["types"].update(x="float64"), ValueError("another type than the head says")),
        (lambda head, parts: (head.update(types={"x": "object"}), parts.update(x=parts["x"].astype(object))), None),
    ],
)
def test_arrays_that_are_not_ours(tmp_path, change, why):
    path = tmp_path / "a.npz"
    save_arrays({"x": np.ones(3, np.float32)}, path)
    rewritten(path, change)
    with pytest.raises(InvalidInput) as caught:
        load_arrays(path)
    assert str(caught.value) == f"{path}: is not an array file of refattn"
    assert why is None or repr(caught.value.__cause__) == repr(why)


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
