"""The exact answer where other benchmarks judge: KernelBench's modules, flashinfer-bench's evaluators."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import kind_of, to_numpy
from ..errors import InvalidInput, MismatchError, UnsupportedProblem, expect
from ..problem import Problem
from .close import assert_close
from .model import Capabilities

__all__ = ["call_of", "flashinfer_evaluator", "of_module"]

OPERATIONS = ("gqa_ragged", "gqa_paged")
"""The attention of flashinfer-bench that a Problem can say; pages are gathered."""
AXES_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "gqa_ragged": {"q": ("rows", "h_q", "d"), "k": ("keys", "h_kv", "d"), "v": ("keys", "h_kv", "d")}
    | {"kv_indptr": ("offsets",)},
    "gqa_paged": {"q": ("rows", "h_q", "d")}
    | dict.fromkeys(("k_cache", "v_cache"), ("pages", "page", "h_kv", "d"))
    | dict.fromkeys(("kv_indptr", "kv_indices"), ("numbers",)),
}
"""The arrays that each must have, and their axes."""
ONLY = frozenset({"lengths_differ", "d_v_differs"})


def of_module(module: Any, capabilities: Capabilities | None = None) -> Any:
    """Return as a kernel a PyTorch module whose forward takes query, key and value, as KernelBench's ``ModelNew`` does.

    Parameters
    ----------
    module : callable
        ``module(query, key, value) -> out``, tensors of shape (b, h, n, d).
    capabilities : Capabilities
        By default float32, float16 and bfloat16 tensors on the CPU, lengths and widths that differ, and nothing else.
        ``Capabilities({"float16"}, ..., arrays="torch", device="cuda")`` says where it runs.
    """
    types = {"float32", "float16", "bfloat16"}
    able = capabilities or Capabilities(frozenset(types), ONLY, arrays="torch")
    if able.arrays != "torch":
        raise InvalidInput(f"capabilities: got arrays={able.arrays!r}, expected 'torch': a module takes tensors")

    def kernel(problem: Problem) -> Any:
        import torch

        able.require(problem.to("numpy"))
        with torch.no_grad():
            return module(problem.query, problem.key, problem.value)

    kernel.__name__ = type(module).__name__ if not hasattr(module, "__name__") else module.__name__
    kernel.capabilities = able  # type: ignore[attr-defined]
    return kernel


def call_of(op_type: str, inputs: Mapping[str, Any], causal: bool) -> Problem:
    """Return the call that a workload of flashinfer-bench means.

    Parameters
    ----------
    op_type : str
        "gqa_ragged": q (rows, h_q, d), k and v (keys, h_kv, d), qo_indptr, kv_indptr. "gqa_paged": q, k_cache and
        v_cache (pages, page, h_kv, d), kv_indptr and kv_indices, with qo_indptr in prefill and one row for each
        sequence without, and kv_last_page_len where pages have more than one key. sm_scale in both.
    inputs : mapping
        By the definition's names; arrays of any library.
    causal : bool
        Whether a row sees no key after it, its sequence's last row every key.

    Raises
    ------
    UnsupportedProblem
        Another operation.
    InvalidInput
        An input that is missing, is of another shape or type, or names pages that are not there.
    InvalidProblem
        Numbers that do not fit together.
    """
    if op_type not in OPERATIONS:
        raise UnsupportedProblem(f"op_type: got {op_type!r}; a Problem says {', '.join(OPERATIONS)}")
    expect(isinstance(causal, bool | np.bool_), "causal", causal, "True or False")
    given = _given(op_type, inputs)
    q = given["q"]
    ends_q = given.get("qo_indptr", np.arange(len(q) + 1)).astype(np.int32)
    if op_type == "gqa_ragged":
        k, v, ends_k = given["k"], given["v"], given["kv_indptr"].astype(np.int32)
    else:
        places, ends_k = _places(given)
        k, v = (given[n].reshape(-1, *given[n].shape[2:])[places] for n in ("k_cache", "v_cache"))
    query, key, value = (np.ascontiguousarray(x.swapaxes(0, 1))[None] for x in (q[: ends_q[-1]], k, v))
    return Problem(
        query,
        key,
        value,
        scale=float(np.asarray(given["sm_scale"]).item()),
        causal="bottom_right" if causal else None,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
    )


def _given(op_type: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a workload's arrays as NumPy's, after looking whether each is there and of its shape."""
    expect(isinstance(inputs, Mapping), "inputs", inputs, "a mapping of the definition's names to arrays")
    given = {n: to_numpy(x, n) if kind_of(x) is not None else x for n, x in inputs.items()}
    shapes = AXES_OF[op_type]
    for name in (*shapes, "sm_scale"):
        expect(name in given, "inputs", list(given), f"{name!r} among them, as {op_type} needs")
    for name, axes in shapes.items():
        x = given[name]
        good = kind_of(x) is not None and x.ndim == len(axes)
        got = f"shape {x.shape}" if kind_of(x) is not None else type(x).__name__
        if not good:
            raise InvalidInput(f"{name}: got {got}, expected an array ({', '.join(axes)})")
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len"):
        x = given.get(name)
        if x is not None and (kind_of(x) is None or x.ndim != 1 or x.dtype.kind not in "iu"):
            raise InvalidInput(f"{name}: got {getattr(x, 'dtype', type(x).__name__)}, expected integers on one axis")
    for name in ("qo_indptr", "kv_indptr"):
        x = given.get(name)
        if x is not None and (x.size < 2 or int(x[0]) != 0 or (np.diff(x.astype(np.int64)) < 0).any()):
            raise InvalidInput(f"{name}: got {x.tolist()}, expected at least 2 offsets that start at 0 and never fall")
    scale = np.asarray(given["sm_scale"])
    expect(scale.size == 1 and scale.dtype.kind in "iuf", "sm_scale", given["sm_scale"], "one number")
    return given


def _expect_pages(given: Mapping[str, Any]) -> None:
    """Refuse pages that are not there, and lengths of last pages that no page has."""
    (pages, size), cache = given["k_cache"].shape[:2], given["v_cache"]
    if cache.shape[:3] != given["k_cache"].shape[:3]:
        raise InvalidInput(f"v_cache: shape is {cache.shape}, expected k_cache's {given['k_cache'].shape} but for d")
    starts, named = given["kv_indptr"].astype(np.int64), given["kv_indices"]
    if starts[-1] > len(named):
        raise InvalidInput(f"kv_indptr: ends at {starts[-1]}, expected at most {len(named)}, the length of kv_indices")
    used = named[: starts[-1]]
    if wrong := [n for n in used.tolist() if not 0 <= n < pages]:
        raise InvalidInput(f"kv_indices: names page {wrong[0]}, expected 0 to {pages - 1}, the pages that there are")
    last = given.get("kv_last_page_len")
    if last is None:
        return
    if len(last) != len(starts) - 1:
        raise InvalidInput(f"kv_last_page_len: has {len(last)} numbers, expected {len(starts) - 1}, one a sequence")
    if wrong := [n for n, m in zip(last.tolist(), np.diff(starts).tolist(), strict=True) if m and not 1 <= n <= size]:
        raise InvalidInput(f"kv_last_page_len: has {wrong[0]}, expected 1 to {size}, the keys that a page has")


def _places(given: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return where in the cache the keys of all sequences lie, one after another, and where each sequence ends."""
    _expect_pages(given)
    size, starts = given["k_cache"].shape[1], given["kv_indptr"]
    found: list[NDArray[np.int64]] = []
    for i, (first, end) in enumerate(pairwise(starts)):
        pages = given["kv_indices"][first:end].astype(np.int64)
        places = (pages[:, None] * size + np.arange(size)).ravel()
        last = given.get("kv_last_page_len")
        found.append(places[: len(places) - (size - int(last[i])) if last is not None and len(pages) else None])
    ends = np.cumsum([0, *map(len, found)]).astype(np.int32)
    return np.concatenate(found) if found else np.zeros(0, np.int64), ends


def flashinfer_evaluator(base: Any) -> Any:
    """Return an evaluator of flashinfer-bench that also compares with the exact answer.

    A solution must pass the base class's check, and then every element of out and lse must be within what its
    arithmetic must lose, on the trial's own inputs, called again.

    Parameters
    ----------
    base : class
        ``flashinfer_bench.bench.evaluators.default.DefaultEvaluator``, or one of yours.
    """

    class Exact(base):  # type: ignore[misc]
        @classmethod
        def can_evaluate(cls, definition: Any) -> bool:
            return definition.op_type in OPERATIONS

        @classmethod
        def check_correctness(
            cls, definition: Any, sol_runnable: Any, inputs: Any, ref_outputs: Any, *more: Any, **named: Any
        ) -> Any:
            found = super().check_correctness(definition, sol_runnable, inputs, ref_outputs, *more, **named)
            if found[1] is not None:
                return found
            for asked, wanted in zip(inputs, ref_outputs, strict=True):
                if said := _wrong(definition, sol_runnable, asked, wanted):
                    return found[0], _failed(said, *more, **named)
            return found

    return Exact


def _wrong(definition: Any, solution: Any, asked: Any, wanted: Any) -> str:
    """Return what is wrong with a solution's answer, "" where nothing is."""
    import torch

    with torch.no_grad():
        if solution.metadata.destination_passing_style:
            parts = [torch.full_like(x, math.nan) for x in wanted]
            solution(*asked, *parts)
        else:
            result = solution(*asked)
            parts = list(result.values()) if isinstance(result, dict) else list(result)
    problem = call_of(definition.op_type, dict(zip(definition.inputs, asked, strict=True)), "causal" in definition.name)
    out = to_numpy(parts[0]).swapaxes(0, 1)[None, :, : problem.n_q]
    lse = to_numpy(parts[1]).astype(np.float64).swapaxes(0, 1)[None, :, : problem.n_q] * math.log(2)  # theirs is base 2
    try:
        assert_close(np.ascontiguousarray(out), problem, lse=lse)
    except MismatchError as e:
        return str(e)
    except Exception:
        return traceback.format_exc()
    return ""


def _failed(said: str, cfg: Any, log_path: Any, device: str) -> Any:
    utils, data = (importlib.import_module(f"flashinfer_bench.{n}") for n in ("bench.utils", "data"))
    numbers = data.Correctness(max_relative_error=math.nan, max_absolute_error=math.nan)
    status = data.EvaluationStatus.INCORRECT_NUMERICAL
    return utils.make_eval(status=status, device=device, log_path=log_path, correctness=numbers, extra_msg=said)
