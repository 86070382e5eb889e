"""Golden files: written, read back, verified, and used to judge results."""

import hashlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput
from refattn.check import cases
from refattn.check.kernels.tiled import gradients, tiled
from refattn.cli.main import main
from refattn.dtypes import FORMATS
from refattn.golden.file import array_of, document_of, parse, problem_of, spell, text_of
from refattn.golden.make import check_results, make, verify

PLAIN = "sparse.integers.float32.json"


def call(*arguments):
    return CliRunner().invoke(main, ["golden", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "set"
    make(folder, only="sparse/*", text=True)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "set")


def rewrite(folder, name, change):
    """Change a document and its digest."""
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(f for f in manifest["files"] if f["name"] == name)
    entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_tiled(folder, results):
    results.mkdir()
    for path in folder.glob("*.*.json"):
        out, lse = tiled(problem_of(json.loads(path.read_text())))
        parts = {"out": out.astype(float).tolist(), "lse": [spell(x) for x in lse.ravel().tolist()]}
        (results / path.name).write_text(json.dumps(parts))
    return results


@pytest.mark.parametrize("dtype", FORMATS)
@given(data=st.data())
def test_numbers_of_every_format_survive(dtype, data):
    form = FORMATS[dtype]
    bits = data.draw(st.integers(0, 2 ** (8 * form.dtype.itemsize) - 1))
    x = float(np.array([bits], f"u{form.dtype.itemsize}").view(form.dtype).astype(np.float64)[0])
    back = parse(spell(x))
    assert (math.isnan(back) and math.isnan(x)) or (back, math.copysign(1, back)) == (x, math.copysign(1, x))


def test_spelling():
    numbers = (3.0, -0.0, 0.0, 2.0**-149, 5e-324, math.inf, -math.inf, math.nan, 1.0)
    text = "0x1.8p+1 -0x0p+0 0x0p+0 0x1p-149 0x0.0000000000001p-1022 inf -inf nan 0x1p+0"
    assert " ".join(map(spell, numbers)) == text
    assert [parse(x) for x in ("10", "0x10", 2, "-INF", "1e-3")] == [10, 16, 2, -math.inf, 1e-3]
    for x in ("ten", True, None, [1], 10**400, "0x1p5000"):
        with pytest.raises(InvalidInput, match=r"number: got .*, expected a hex or decimal number"):
            parse(x)


@pytest.mark.parametrize(
    ("variant", "name", "dtype"),
    [
        ("softmax", name, dtype)
        for name in ("poison/value-behind-mask", "poison/inf-behind-mask", "extreme/tiny-values", "ragged/packed")
        for dtype in ("float64", "float16", "float8_e4m3fn")
    ]
    + [("softmax", f"ragged/no-{x}", "float32") for x in ("keys", "queries")]
    + [("softmax", f"gaussian/{x}", "bfloat16") for x in ("everything", "window-causal")]
    + [("softmax", "empty/rows-bias", "float32"), ("power", "gaussian/form-mean", "float32")]
    + [("linear", "gaussian/decay", "bfloat16"), ("sigmoid", "gaussian/offset-of-scores", "float32")],
)
def test_calls_and_answers_survive_exactly(variant, name, dtype):
    p = next(c for c in cases(variant) if c.name == name).problem(dtype)
    document = json.loads(json.dumps(document_of(name, p)))
    q = problem_of(document)
    assert (q.settings() | {"options": 0}) == (p.settings() | {"options": 0})
    same = [{n: (x.dtype, x.shape, x.tobytes()) for n, x in a.arrays().items()} for a in (p, q)]
    assert same[0] == same[1]
    assert document_of(name, q) == document
    for part in document["exact"].values():
        rounded, near, allowed = (array_of(part, n) for n in ("rounded", "float64", "allowed"))
        assert rounded.dtype.name == part["type"]
        assert ((rounded.astype(float) == near) | ~(allowed == 0)).all()
    lines = text_of(document).splitlines()
    assert f"query {dtype} {p.query.size} {' '.join(map(str, p.query.shape))}" in lines


def test_make_and_verify(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arguments"] == {
        "variant": "softmax", "dtypes": ["float32", "bfloat16"], "only": "sparse/*", "format": "text",
    }  # fmt: skip
    assert {f["name"] for f in manifest["files"]} | {"manifest.json"} == {p.name for p in folder.iterdir()}
    assert len(manifest["files"]) == 8
    result = call("verify", folder)
    assert result.exit_code == 0, result.output
    assert re.search(r"float32 +│ +4 +│ +0 +│ +0", result.output)


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    assert call("make", tmp_path / "b", "--only", "sparse/*", "--format", "text").exit_code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["exact"]["out"]["rounded"].__setitem__(5, "0x1p+0"), "exact: out: rounded: 5: got 0x1p\\+0, exp"),
        (lambda d: d["exact"]["lse"]["allowed"].__setitem__(0, "0x1p+0"), "exact: lse: allowed: 0: got 0x1p\\+0, exp"),
        (lambda d: d["inputs"]["query"]["data"].__setitem__(0, "0x1.00000001p+0"), "inputs: query: data: 0: got"),
        (lambda d: d.update(case="sparse/other"), "got .*, expected what the manifest says"),
        (lambda d: d.update(scale="none"), "is not a golden file of refattn"),
        (lambda d: d.pop("inputs"), "is not a golden file of refattn"),
    ],
)
def test_changed_documents_no_longer_hold(folder, change, text):
    rewrite(folder, PLAIN, change)
    messages = [c.message for c in verify(folder) if c.verdict == "failed"]
    assert any(re.search(f"^{PLAIN}: {text}", m) for m in messages), messages


def test_a_text_twin_says_what_its_json_file_says(folder):
    name = PLAIN.replace("json", "txt")
    old = (folder / name).read_bytes()
    (folder / name).write_bytes(old.replace(b"h_q 2", b"h_q 1"))
    manifest = (folder / "manifest.json").read_text()
    digests = [hashlib.sha256(x).hexdigest() for x in (old, (folder / name).read_bytes())]
    (folder / "manifest.json").write_text(manifest.replace(*digests))
    (failed,) = [c for c in verify(folder) if c.verdict == "failed"]
    assert failed.message == f"{name}: got another text, expected that of its JSON file"


def test_wrong_digests_and_lost_files(folder, tmp_path):
    results = run_tiled(folder, tmp_path / "results")
    (folder / PLAIN).write_text((folder / PLAIN).read_text() + " ")
    (folder / PLAIN.replace("float32", "bfloat16")).unlink()
    (folder / "sparse.scale-zero.float32.txt").write_text("golden 1\n")
    result = call("verify", folder)
    assert result.exit_code == 1
    assert f"{PLAIN}: got SHA-256" in result.output
    assert "No such file or directory, expected a golden file" in result.output
    assert "sparse.scale-zero.float32.txt: got SHA-256" in result.output
    assert f"{PLAIN}: got SHA-256" in call("verify", folder, "--results", results).output  # it must not judge


def test_results_are_judged(folder, tmp_path):
    results = run_tiled(folder, tmp_path / "results")
    result = call("verify", folder, "--results", results)
    assert result.exit_code == 0, result.output
    assert re.search(r"bfloat16 │ 2 +│ 0 +│ 0 +│ 0\.\d+", result.output)
    parts = json.loads((results / PLAIN).read_text())
    parts["out"][0][1][3][2] += 1e-3
    (results / PLAIN).write_text(json.dumps(parts))
    (results / "sparse.scale-zero.float32.json").unlink()
    result = call("verify", folder, "--results", results)
    assert result.exit_code == 1
    assert "sparse/integers[float32]: failed: error above the bound (1 of 1184)" in result.output
    assert "out at batch 0, head 1, row 3, column 2: got" in result.output
    assert "sparse/scale-zero[float32]: not run: " in result.output
    assert re.search(r"float32 +│ 0 +│ 1 +│ 1", result.output)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "got a file that is not JSON"),
        ("[]", "got list, expected an object with out"),
        ('{"lse": []}', "got lse, expected an object with out"),
        ('{"out": 3}', r"out: got shape \(\), expected \(1, 2, 37, 16\) or 1184 numbers"),
        ('{"out": [[1], [1, 2]]}', r"out: got shape \(2,\), expected"),
        (json.dumps({"out": ["x"] * 1184}), "out: got 'x', expected a hex or decimal number"),
    ],
)
def test_malformed_results_fail(folder, tmp_path, content, text):
    (tmp_path / PLAIN).write_text(content)
    check = next(c for c in check_results(folder, tmp_path) if c.verdict != "not run")
    assert check.verdict == "failed"
    assert re.search(text, check.message)


def test_bad_input_is_2_and_one_line(folder, tmp_path):
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").touch()
    for arguments, text in (
        (("make", new, "--dtypes", "float32,int8"), "dtypes: got 'int8', expected one of float64"),
        (("make", new, "--dtypes", ","), "dtypes: got '', expected one of float64"),
        (("make", new, "--variant", "cosine"), "variant: got 'cosine'"),
        (("make", new, "--only", "none"), "only: got 'none', expected a name such as"),
        (("make", folder), "got a folder with files in it, expected a new or empty one"),
        (("make", tmp_path / "file"), "expected a folder that can be written"),
        (("verify", empty), "there is no such file"),
        (("verify", folder, "--results", new), "results: got"),
        (("verify", folder, "--results", empty), "nothing ran: there is no file to judge"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert f"error: {text}" in result.output or text in result.output
    assert not new.exists()
    for content, text in (
        ('{"golden": 2}', "got format 2, expected 1"),
        ('{"golden": 1}', "got the entry None, expected name, sha256"),
        ('{"golden": 1, "files": [{"name": "../x"}]}', "got the entry"),
    ):
        (empty / "manifest.json").write_text(content)
        with pytest.raises(InvalidInput, match=text):
            verify(empty)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_documented_program_passes(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "golden.md").read_text()
    (tmp_path / "a.cpp").write_text(re.search(r"```cpp\n(.*?)```", page, re.DOTALL)[1])
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-o", "a", "a.cpp"], cwd=tmp_path, check=True)
    names = ("plain", "grouped-heads", "narrow-values", "negative-scale")
    for n in names:
        make(tmp_path / n, dtypes=("float32",), only=f"gaussian/{n}[float32]", text=True)
        (text,) = (tmp_path / n).glob("*.txt")
        (tmp_path / f"r-{n}").mkdir()
        done = subprocess.run([tmp_path / "a", text], capture_output=True, text=True, check=True)
        (tmp_path / f"r-{n}" / f"{text.stem}.json").write_text(done.stdout)
        (check,) = check_results(tmp_path / n, tmp_path / f"r-{n}")
        assert check.verdict == "passed", check


def test_gradients(tmp_path):
    folder, results = tmp_path / "set", tmp_path / "results"
    done = call("make", folder, "--gradients", "--only", "gaussian/everything[*", "--format", "text")
    assert (done.exit_code, done.output.strip()) == (0, f"{folder}: 5 files")
    assert call("verify", folder).exit_code == 0
    text = (folder / "gaussian.everything.float32.txt").read_text()
    assert all(f"\n{n}_allowed float64 " in text for n in ("dq", "dk", "dv", "dbias", "dsink"))
    results.mkdir()
    for wrong in ("", "dk", "dsink"):
        for path in folder.glob("*.*.json"):
            document = json.loads(path.read_text())
            problem, dout = problem_of(document), array_of(document["inputs"]["dout"])
            found = dict(zip(("out", "lse"), tiled(problem), strict=True)) | gradients(problem, dout)
            parts = {n: (x.astype(float) * (3 if n == wrong else 1)).tolist() for n, x in found.items()}
            (results / path.name).write_text(json.dumps(parts))
        checks = check_results(folder, results)
        assert [c.verdict for c in checks] == 2 * ["failed" if wrong else "passed"]
        assert all(c.worst.array == wrong for c in checks if wrong)


def test_gradients_where_there_are_none(tmp_path):
    """A case without one stores none: values at the type's edge, and a form that has no derivative at its maximum."""
    make(tmp_path / "stable", "power", only="gaussian/form-*[float32]", gradients=True)
    for form, there in (("stable", False), ("mean", True)):
        stored = json.loads((tmp_path / "stable" / f"gaussian.form-{form}.float32.json").read_text())
        assert ("dout" in stored["inputs"]) == there
    make(tmp_path / "forward", only="extreme/huge-values[float32]", gradients=True)
    document = json.loads((tmp_path / "forward" / "extreme.huge-values.float32.json").read_text())
    assert "dout" not in document["inputs"]
    assert set(document["exact"]) == {"out", "lse"}


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("dropout/philox", {"dropout_p", "philox_layout", "philox_seed", "philox_offset"}),
        ("positions/norm-rotary", {"rotary", "norm_eps"}),
        ("gaussian/offset", {"offset"}),
    ],
)
def test_what_else_a_call_says_is_kept(case, settings, tmp_path):
    make(tmp_path / "set", dtypes=("float32",), only=case, text=True)
    assert {c.verdict for c in verify(tmp_path / "set")} == {"passed"}
    name = f"{case.replace('/', '.')}.float32.json"
    document = json.loads((tmp_path / "set" / name).read_text())
    assert set(document["settings"]) == settings
    call = next(c for c in cases("softmax") if c.name == case).problem("float32")
    assert problem_of(document).settings() == call.settings()
    for n in settings:
        assert f"\n{n} " in (tmp_path / "set" / name.replace(".json", ".txt")).read_text()
    rewrite(tmp_path / "set", name, lambda d: d.pop("settings"))
    assert "failed" in {c.verdict for c in verify(tmp_path / "set")}
