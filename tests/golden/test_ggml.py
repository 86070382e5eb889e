"""A call in ggml's layout: a C++ program reads it and agrees, and one that is wrong does not."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate
from refattn.check.model import flash
from refattn.golden.ggml import make_ggml

PAGE = Path(__file__).parents[2] / "docs" / "golden.md"


def call(rng, n_q=7, **more):
    q = rng.normal(size=(2, 4, n_q, 32)).astype(np.float16).astype(np.float32)
    k, v = (rng.normal(size=(2, 2, 40, d)).astype(np.float16) for d in (32, 16))
    return Problem(q, k, v, **{"out_dtype": "float32"} | more)


def test_a_program_in_c_agrees_and_wrong_ones_do_not(tmp_path):
    """What a wrong kernel does is done to its inputs: the program is compiled once."""
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(1, 4, 7, 40)).astype(np.float16)
    sink = rng.normal(size=4).astype(np.float32)
    p = call(rng, causal="bottom_right", softcap=5.0, bias=bias, sink=sink, scale=0.5)
    cases = {"plain": call(rng, 70), "window": call(rng, window=(3, 2)), "all": p}
    for name, x in cases.items():
        make_ggml(tmp_path / name, x)
    text = re.findall(r"```cpp\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "a.cpp").write_text(text)
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-o", "a", "a.cpp"], cwd=tmp_path, check=True)

    def ended(name):
        return subprocess.run([tmp_path / "a", tmp_path / name], capture_output=True).returncode

    assert [ended(n) for n in cases] == [0, 0, 0]
    header = (tmp_path / "all" / "case.txt").read_text()
    wrong = {  # heads of another group, no sink, the mask of another head, rows and heads taken for each other
        "k": lambda x: x.reshape(2, 2, -1)[:, ::-1],
        "sinks": lambda x: x - np.float32(99),
        "mask": lambda x: np.roll(x.reshape(4, -1), 1, 0),
        "dst": lambda x: x.reshape(2, 7, 4, -1).swapaxes(1, 2),
    }
    for name, edit in wrong.items():
        file = tmp_path / "all" / f"{name}.bin"
        kept = file.read_bytes()
        x = np.frombuffer(kept, "<f2" if name in ("k", "mask") else "<f4")
        file.write_bytes(np.ascontiguousarray(edit(x)).tobytes())
        assert ended("all") == 1, name
        file.write_bytes(kept)
    for old, new in (("softcap 5.0", "softcap 0.0"), ("scale 0.5", "scale 0.51")):
        (tmp_path / "all" / "case.txt").write_text(header.replace(old, new))
        assert ended("all") == 1, new
    (tmp_path / "all" / "case.txt").write_text("scale")
    assert ended("all") == 2


def test_what_is_written_is_the_answer(tmp_path):
    p = call(np.random.default_rng(1), scale=0.25)
    assert make_ggml(tmp_path / "x", p) == [
        "case.txt",
        *(f"{n}.bin" for n in ("q", "k", "v", "mask", "dst", "allowed")),
    ]
    assert (tmp_path / "x" / "case.txt").read_text().splitlines()[:5] == [
        "scale 0.25", "max_bias 0", "logit_softcap 0.0", "tensors 6", "q F32 32 7 4 2",
    ]  # fmt: skip
    dst = np.fromfile(tmp_path / "x" / "dst.bin", "<f4").reshape(2, 7, 4, 16).swapaxes(1, 2)
    assert (dst == evaluate(p, rounding="float32").out).all()
    mask = np.fromfile(tmp_path / "x" / "mask.bin", "<f2").reshape(2, 1, 64, 40)
    assert (mask[:, :, :7] == 0).all()
    assert np.isneginf(mask[:, :, 7:]).all()
    with pytest.raises(InvalidInput, match="expected a new or empty one"):
        make_ggml(tmp_path / "x", p)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"weight": np.ones((1, 1, 1, 40), np.float32)},
            "problem: has weight, which ggml_flash_attn_ext does not take",
        ),
        ({"out_dtype": "float16"}, "out: got float16, expected float32"),
        ({"query": np.full((2, 4, 7, 32), 0.1, np.float32)}, "query: has numbers that float16 has not"),
        ({"bias": np.full((1, 1, 7, 40), 0.1, np.float32)}, "bias: has numbers that float16 has not"),
        ({"bias": np.full((1, 1, 7, 40), np.inf, np.float32)}, r"bias: has \+inf, of which ggml makes NaN"),
        ({"softcap": 1e60}, "softcap: has numbers that float32 has not"),
        ({"softcap": 1e-60}, "softcap: has numbers that float32 has not"),
        ({"sink": np.array([0.0, 0.0, 1e300, 0.0])}, "sink: has numbers that float32 has not"),
        ({"scale": 1e300}, "scale: got 1e\\+300, expected a number in float32's range"),
        ({"scale": 1e-300}, "scale: got 1e-300, expected a number in float32's range"),
        ({"window": (None, -40)}, "problem: head 0 of item 0 has a row without keys"),
        ({"value": np.full((2, 2, 40, 16), np.inf, np.float16)}, "query, key, value: have NaN or inf"),
        ({"key": np.ones((2, 2, 40, 32), np.float32)}, "key: got float32, expected float16"),
        ({"variant": "sigmoid"}, "problem: has "),
    ],
)
def test_calls_that_it_does_not_take_are_refused(tmp_path, change, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        make_ggml(tmp_path / "x", call(np.random.default_rng(2)).replace(**change))
    assert not (tmp_path / "x").exists()


def test_what_is_no_problem_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="problem: got 3, expected a Problem"):
        make_ggml(tmp_path, 3)
    p = call(np.random.default_rng(2))
    for folder in (None, 3):
        with pytest.raises(InvalidInput, match=f"folder: got {folder}, expected a path"):
            make_ggml(folder, p)
    for model in ("flash", flash):
        with pytest.raises(InvalidInput, match=r"model: got .*flash.*, expected a Model, such as"):
            make_ggml(tmp_path / "x", p, model)
    assert not (tmp_path / "x").exists()
