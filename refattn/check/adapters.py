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

from ..arrays import to_numpy
from ..errors import InvalidInput, MismatchError, UnsupportedProblem
from ..problem import Problem
from .close import assert_close
from .model import Capabilities

__all__ = ["call_of", "flashinfer_evaluator", "of_module"]

OPERATIONS = ("gqa_ragged", "gqa_paged")
"""The attention of flashinfer-bench that a Problem can say; pages are gathered."""
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
    """
    if op_type not in OPERATIONS:
        raise UnsupportedProblem(f"op_type: got {op_type!r}; a Problem says {', '.join(OPERATIONS)}")
    given = {n: to_numpy(x, n) if hasattr(x, "shape") else x for n, x in inputs.items()}
    q = given["q"]
    ends_q = given.get("qo_indptr", np.arange(len(q) + 1, dtype=np.int32)).astype(np.int32)
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
        scale=float(given["sm_scale"]),
        causal="bottom_right" if causal else None,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
    )


def _places(given: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return where in the cache the keys of all sequences lie, one after another, and where each sequence ends."""
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
