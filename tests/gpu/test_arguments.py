"""Kernels' arguments as the host reads them from CUDA text, against the layout of a C++ compiler."""

import re
import shutil
import subprocess

import pytest

from refattn.gpu import arguments as module
from refattn.gpu.arguments import Arguments, Record, arguments_of
from refattn.gpu.build import text_of

KERNELS = [
    ("simt.cu", "attention"),
    ("mma.cu", "attention"),
    ("decode.cu", "decode"),
    ("decode.cu", "merge"),
    ("sm90.cu", "attention_forward"),
    *(("latent.cu", x) for x in ("attention_latent", "merge", "repair")),
    ("pack.cu", "pack"),
    *(("backward.cu", x) for x in ("keys_of_rows", "row_products", "sinks", "add_parts")),
    ("mma_backward.cu", "backward"),
    ("simt_backward.cu", "backward"),
    ("trilinear.cu", "trilinear_forward"),
    ("trilinear_backward.cu", "trilinear_backward"),
    ("trilinear_backward.cu", "trilinear_delta"),
    ("recurrence.cu", "lightning"),
    ("recurrence.cu", "gated_delta"),
]
TYPES = """
typedef unsigned short u16; typedef unsigned u32; struct alignas(64) TensorMap { char bytes[128]; };
struct float2; struct int2; struct int4;
"""


def declared(record, name, text):
    """Return a struct's declaration, and assertions that its members lie where the host puts them."""
    lines, at = [], 0
    for member, x in record.members.items():
        size = x.format()[1] if isinstance(x, Record) else module.struct.calcsize("<" + x)
        at += -at % module._alignment(x)
        lines += [f"static_assert(__builtin_offsetof({name}, {member}) == {at});"]
        lines += [f"static_assert(sizeof({name}::{member}) == {size});"]
        at += size
    return text + "\n".join([*lines, f"static_assert(sizeof({name}) == {record.format()[1]});"])


@pytest.mark.parametrize(("file", "entry"), KERNELS)
def test_members_lie_where_a_compiler_puts_them(tmp_path, file, entry):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    text = re.sub(r"//[^\n]*", "", text_of(file, {}))
    takes = arguments_of(file, entry)
    used = {x.name: x for x in records(takes.parameters)}
    bodies = "\n".join(re.search(rf"^struct {n} {{.*?}};", text, re.MULTILINE | re.DOTALL)[0] for n in reversed(used))
    given = re.search(rf"\b{entry}\(([^)]*)\)", text)[1].replace("__grid_constant__", "")
    # a kernel's parameters lie like the members of a struct
    own = f"struct Own {{ {';'.join(given.replace('const ', '').split(','))}; }};"
    checks = "\n".join(declared(x, n, "") for n, x in {**used, "Own": takes.parameters}.items())
    (tmp_path / "layout.cpp").write_text("\n".join([TYPES, bodies, own, checks]))
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "layout.cpp"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def records(x):
    """Return the structs in a record, what holds them first."""
    inner = [m for m in x.members.values() if isinstance(m, Record)]
    return [*inner, *(r for m in inner for r in records(m))]


def test_what_is_packed_is_read_back():
    inner = Record("Keys", {"n": "i", "data": "Q"})
    takes = Arguments.of(Record("f", {"scale": "f", "keys": inner, "last": "i"}))
    assert takes.offsets == (0, 8, 24)
    packed = takes.pack(scale=0.5, keys={"data": 7, "n": 3}, last=-1)
    assert len(packed) == len(takes) == 32
    assert packed == takes.pack(scale=0.5, keys=(3, 7), last=-1)
    assert takes.unpack(packed) == {"scale": 0.5, "keys.n": 3, "keys.data": 7, "last": -1}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"scale": 1.0}, r"struct f: missing \['n'\], unknown \[\]"),
        ({"scale": 1.0, "n": (1,), "m": 2}, r"struct f: missing \[\], unknown \['m'\]"),
        ({"scale": 1.0, "n": (1, 2)}, "struct Keys: got 2 values, has 1 members"),
    ],
)
def test_values_that_do_not_fit(values, text):
    with pytest.raises(TypeError, match=text):
        Arguments.of(Record("f", {"scale": "f", "n": Record("Keys", {"n": "i"})})).pack(**values)


def test_kernels_that_the_host_cannot_call(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"pack.cu: defines no kernel 'unpack'"):
        arguments_of("pack.cu", "unpack")
    text = 'extern "C" __global__ void f(half x) {}'
    monkeypatch.setattr(module, "text_of", lambda file, macros: text)
    with pytest.raises(ValueError, match=r"new.cu: the kernel 'f' takes 'half x', which the host cannot pack"):
        arguments_of("new.cu", "f")
