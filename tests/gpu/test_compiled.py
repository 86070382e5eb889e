"""What is known to compile: by text, command and compiler, and only where the assembler said so."""

import pytest

from refattn.gpu.build import text_of

from . import compiled
from .compiled import NVCC, check_compiles

COPIED = """extern "C" __global__ void __launch_bounds__(1024, 2) twice(float* x) {
  float kept[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) kept[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) x[threadIdx.x + 1024 * i] = 2 * kept[ITEMS - 1 - i];
}
"""


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(compiled, "KNOWN", set())


@NVCC
@pytest.mark.parametrize(
    ("items", "more"),
    [(64, ""), (4, '#warning "told"\n'), (4, "int f() { return x; }\n")],
    ids=["spill", "warning", "error"],
)
def test_what_does_not_compile_cleanly_is_not_known(tmp_path, items, more):
    with pytest.raises(AssertionError, match=r"spill stores|told|undefined"):
        check_compiles(tmp_path / "x.cu", f"#define ITEMS {items}\n{more}{COPIED}")
    assert not compiled.KNOWN


@NVCC
def test_what_compiled_is_known_to_this_compiler_alone(tmp_path, monkeypatch):
    text = text_of("pack.cu", {})
    check_compiles(tmp_path / "x.cu", text)
    assert (tmp_path / "x.cubin").is_file()
    check_compiles(tmp_path / "y.cu", text)
    assert not (tmp_path / "y.cu").exists()
    assert compiled.digest(text + " ") not in compiled.KNOWN
    monkeypatch.setattr(compiled, "_compiler", lambda: "another")
    assert compiled.digest(text) not in compiled.KNOWN


@NVCC
def test_digests_are_kept():
    """Not one of this compiler's would mean that the kept file is of another, and that tests compile all again."""
    assert len(compiled.KEPT.read_text().split()) > 100
