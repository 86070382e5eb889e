"""Kernels compile for sm_90a without spills; what Python says of them is what their text says."""

import re

import pytest

from refattn.he.device.build import HERE, ITEM, KERNELS, PRIME, geometry, text_of

from ...gpu.compiled import NVCC, check_compiles

MOST = 232448  # bytes of shared memory that a block of sm_90 may have
DEGREES = (8192, 16384, 32768)


@NVCC
def test_kernels_compile_without_spills(tmp_path):
    """For the degree that plans have most often; `python -m tests.he.device.gate` compiles them for all."""
    check_compiles(tmp_path / "kernels.cu", text_of(14))


def members(text, name):
    inside = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)[1]
    lines = re.findall(r"(u64|u32) ([\w, ]+);", re.sub(r"//.*", "", inside))
    return [(n.strip(), {"u64": "<u8", "u32": "<u4"}[kind]) for kind, names in lines for n in names.split(",")]


def test_structs_are_those_of_the_text():
    text = text_of(13)
    for name, of in (("Item", ITEM), ("Prime", PRIME)):
        assert members(text, name) == [(n, of[n].str) for n in of.names]
        assert of.itemsize % 8 == 0
    assert [n for n, _ in members(text, "Drop")] == ["inverse", "inverse_shifted", "fix"]


def test_arguments_are_those_of_the_text():
    text = re.sub(r"//.*", "", text_of(13))
    kinds = {"primes": "Prime", "roots": "ulonglong2", "inverse_roots": "ulonglong2", "drops": "Drop", "count": "int"}
    for name, takes in KERNELS.items():
        given = re.search(rf"\b{name}\(\s*((?:const|int)[^)]*)\)", text)[1]
        found = [re.sub(r"\s+|\*|const|__restrict__", " ", x).split() for x in given.split(",")]
        assert found == [["Item", "items"], *([kinds[n], n] for n in takes)]


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_grids_cover_a_limb(kernel, degree):
    limbs = 3
    blocks, threads, shared = geometry(kernel, degree, limbs)
    words = {"seed_roots": 512, "seed_words": 8, "each": 2, "sum": 2, "dot": 1}.get(kernel, 8)
    total = degree * (limbs if kernel.startswith("seed") else 1)
    assert shared <= MOST
    assert threads <= 1024
    if kernel != "seed_again":
        assert blocks * threads * words >= total > (blocks - 1) * threads * words


def test_the_text_is_all_there():
    assert "#include" not in text_of(13)
    assert text_of(15).startswith("#define LOG_DEGREE 15\n")
    assert {p.name for p in HERE.glob("*.cu*")} == {"fields.cuh", "kernels.cu", "modular.cuh", "seeds.cuh", "tiles.cuh"}
