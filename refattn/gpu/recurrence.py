"""Recurrences on a GPU, forward: Lightning attention and the gated delta rule, in time O(n) (recurrence.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..arrays import dtype_name, kind_of
from ..dtypes import FORMATS
from ..errors import InvalidProblem, UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from . import delta_mma, lightning_mma
from .build import text_of
from .launch import capability
from .recorded import recording, replay
from .request import Kept
from .views import (
    View,
    capturing,
    cast,
    check_devices,
    device_of,
    empty,
    finish,
    layout,
    library,
    on,
    side_by_side,
    stream_of,
    view,
)

__all__ = ["WIDTHS", "gated_delta", "lightning", "macros", "rates_of", "run", "shared_bytes", "source"]

FILE = "recurrence.cu"
TYPES = ("float16", "bfloat16", "float32")
WIDTHS = (64, 128)
COLUMNS, CHUNK = 32, 32


def macros(dtype: str, d: int, gate: int) -> dict[str, Any]:
    """Return what the kernels are compiled with; gate: 0 without alpha, 1 with one a token, 2 one for each channel."""
    return {"T": dtype, "D": min(w for w in WIDTHS if w >= d), "WARPS": 4, "GATE": gate}


def source(m: Mapping[str, Any]) -> str:
    """Return the kernels' text."""
    return text_of(FILE, m)


def shared_bytes(entry: str, m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    d = m["D"]
    if entry == "lightning":
        return int(4 * (2 * CHUNK * (d + 4) + CHUNK * COLUMNS + CHUNK * (CHUNK + 4) + d * COLUMNS + CHUNK + 1))
    return int(4 * (2 * CHUNK * d + CHUNK * COLUMNS + CHUNK + CHUNK * (0, 1, d)[m["GATE"]]))


def lightning(
    query: Any, key: Any, value: Any, *, decay: Sequence[float], scale: float | None = None, state: Any = None,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return Lightning attention and its last state, computed on the GPU that the arrays are on.

    ``S_t = exp(-decay) S_(t-1) + k_t^T v_t``, ``out_t = scale q_t S_t``; sums and the state are in float32. Gradients
    of out and of the last state flow through PyTorch's graph (:func:`refattn.gpu.lightning_backward`).

    Parameters
    ----------
    query : (b, h_q, n, d_k) array of CuPy, PyTorch or JAX
        float16, bfloat16 or float32; d_k up to 128; any strides with a contiguous last axis.
    key, value : (b, h_kv, n, d_k) and (b, h_kv, n, d_v) arrays
        Of query's library, type and device; h_kv divides h_q.
    decay : sequence of h_q floats
        The rates, in 1/position.
    scale : float, optional
        None is 1.
    state : (b, h_q, d_k, d_v) array, optional
        What it starts from; None is 0. With `cu_seqlens` it is (m, h_q, d_k, d_v).
    cu_seqlens : (m + 1,) integer array, optional
        Offsets of m packed sequences (b is 1), each with a state of its own. Their values are not checked.

    Returns
    -------
    out : (b, h_q, n, d_v) array
        Of query's type.
    state : array
        After the last token, in float32, of the shape that `state` has.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        A type, a width or a GPU that the kernel does not take; gradients with d_v past 128.

    Notes
    -----
    Source: Qin et al., Lightning Attention-2, arXiv 2401.04658: chunks of 32 tokens.
    """
    rates = tuple(map(float, decay))
    if _in_graph([query, key, value, state]):
        from .recurrence_backward import function

        found: tuple[Any, Any] = function().apply(query, key, value, state, cu_seqlens, rates, scale)
        return found
    given = {"query": query, "key": key, "value": value}
    return run("lightning", given, scale, state, cu_seqlens, {"decay": rates})


def gated_delta(
    query: Any, key: Any, value: Any, *, beta: Any, alpha: Any = None, scale: float | None = None, state: Any = None,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return the gated delta rule's output and its last state, computed on the GPU that the arrays are on.

    ``S' = alpha_t S_(t-1)``, ``S_t = S' + beta_t k_t^T (v_t - k_t S')``, ``out_t = scale q_t S_t``, token by token.

    Parameters
    ----------
    query, key, value, scale, state, cu_seqlens
        As in :func:`lightning`; also what is returned and raised. Gradients of out and of the last state flow through
        PyTorch's graph (:func:`refattn.gpu.gated_delta_backward`).
    beta : (b, h_q, n, 1) array
        How far each token moves the state, 0 to 2.
    alpha : (b, h_q, n, 1 or d_k) array, optional
        What each token keeps of it, 0 to 1; None keeps all. The gates' values are not checked.

    Notes
    -----
    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; Kimi Linear, arXiv 2510.26692; both recalled.
    """
    given = {"query": query, "key": key, "value": value, "alpha": alpha, "beta": beta}
    if _in_graph([*given.values(), state]):
        from .delta_backward import function

        found: tuple[Any, Any] = function().apply(*given.values(), state, cu_seqlens, scale)
        return found
    return run("gated_delta", given, scale, state, cu_seqlens, {})


def run(
    entry: str, given: dict[str, Any], scale: float | None, state: Any, cu_seqlens: Any, options: dict[str, Any],
    back: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Return a recurrence's out and last state; back: the last token comes first, in out, too."""
    query = given["query"]
    device = device_of(query, "query")
    with on(device):
        arrays = {n: view(x, n) for n, x in given.items() if n in ("query", "key", "value")}
        if back:
            arrays = {n: _turned(x) for n, x in arrays.items()}
        places = tuple((n, x.shape, x.strides, x.dtype) for n, x in arrays.items())
        kinds = tuple((n, *_kind(given.get(n))) for n in ("alpha", "beta"))
        asked = (entry, places, kinds, _kind(state), _kind(cu_seqlens), scale, type(scale), *options.items(), device)
        if _KNOWN.find(asked) is None:
            _check(entry, given, arrays, device, scale, options)
        (b, h, n, d_k), d_v = arrays["query"].shape, arrays["value"].shape[3]
        many = b if cu_seqlens is None else _sequences(cu_seqlens, b)
        gates = {n: _float32(given[n], n, side_by_side) for n in ("alpha", "beta") if given.get(n) is not None}
        start = None if state is None else _float32(state, "state", _contiguous)
        if start is not None and tuple(start.shape) != (many, h, d_k, d_v):
            raise InvalidProblem(f"state: got shape {tuple(start.shape)}, expected {(many, h, d_k, d_v)}")
        cu = None if cu_seqlens is None else _contiguous(cast(cu_seqlens, "int32", "cu_seqlens"))
        rates = rates_of(query, device, options["decay"]) if "decay" in options else None
        more = {"state": start, "cu_seqlens": cu, "decay": rates} | gates
        arrays |= {n: view(x, n) for n, x in more.items() if x is not None}
        check_devices(arrays)
        _KNOWN[asked] = True
        out, arrays["out"] = empty(query, (b, h, n, d_v), arrays["query"].dtype)
        if back:
            arrays["out"] = _turned(arrays["out"])
        last, arrays["last"] = empty(query, (many, h, d_k, d_v), "float32")
        if min(many, h, d_v):
            _queue(entry, query, arrays, many, 1.0 if scale is None else float(scale), asked)
        out, last = finish(query, [out, last], list(arrays.values()))
    return out, last


_KNOWN: Kept[bool] = Kept()
"""Calls that were checked before, by all that the checks depend on."""


def _turned(x: View) -> View:
    """Return the same array from its last token to its first."""
    b, h, row, d = x.strides
    start = x.pointer + max(0, x.shape[2] - 1) * row * FORMATS[x.dtype].dtype.itemsize
    return replace(x, pointer=start, strides=(b, h, -row, d))


def _kind(x: Any) -> tuple[Any, ...]:
    """Return what the checks depend on of an array."""
    return (type(x), *(() if kind_of(x) is None else (tuple(x.shape), x.dtype)))


def _queue(
    entry: str, like: Any, arrays: dict[str, View], sequences: int, scale: float, asked: tuple[Any, ...]
) -> None:
    """Queue a call's kernels: those of one of its kind again, with other addresses, or new ones."""
    stream = stream_of(like, arrays["query"].device)
    kind = (asked, *((x.strides, x.pointer % 16) for x in arrays.values()), stream)
    count, graph = _KEPT.find(kind), capturing(stream)
    if count:
        arrays["kept"] = empty(like, (count,), "float32")[1]
    if count is None or graph or not replay(kind, arrays):
        with nullcontext() if graph else recording(kind):
            _launch(entry, like, arrays, sequences, scale, stream)
        _KEPT[kind] = arrays["kept"].shape[0] if "kept" in arrays else 0


_KEPT: Kept[int] = Kept()
"""How many numbers are kept between the kernels of a kind of call."""


def _launch(entry: str, like: Any, arrays: dict[str, View], sequences: int, scale: float, stream: int) -> None:
    """Queue a call on tensor cores where a kernel takes it, else on the CUDA cores."""
    q, d_v, device = arrays["query"], arrays["value"].shape[3], arrays["query"].device
    (_, h, n, d_k), h_kv = q.shape, arrays["value"].shape[1]
    sizes = {"heads": h, "group": h // h_kv, "n": n, "d_k": d_k, "d_v": d_v}
    values = _values(entry, arrays) | {"z": sizes, "scale": scale}
    faster = lightning_mma if entry == "lightning" else delta_mma
    if faster.takes(arrays):
        faster.launch(like, arrays, values, sequences, stream)
        return
    gate = 0 if "alpha" not in arrays else 1 if arrays["alpha"].shape[3] == 1 else 2
    m = macros(q.dtype, d_k, gate)
    grids, shared = {entry: sequences * h * -(-d_v // COLUMNS)}, {entry: shared_bytes(entry, m)}
    lightning_mma.queue_all(FILE, source(m), grids, shared, values, device, stream)


def _check(
    entry: str, given: dict[str, Any], arrays: dict[str, View], device: int, scale: float | None, options: Any
) -> None:
    """Refuse what does not fit together, and what the kernels do not take; nothing on the device is read."""
    p = Problem(**given, scale=scale, causal="bottom_right", variant=entry, options=options)
    variant_of(entry).settings(p)
    if p.dtype not in TYPES:
        raise UnsupportedProblem(f"gpu: {entry} takes {', '.join(TYPES)}, got {p.dtype}")
    if p.d_k > WIDTHS[-1]:
        raise UnsupportedProblem(f"gpu: {entry} takes queries and keys of up to {WIDTHS[-1]} columns, got {p.d_k}")
    if capability(device) < (8, 0):
        raise UnsupportedProblem(f"gpu: {entry} needs compute capability 8.0 or later, got {capability(device)}")
    layout(list(arrays.values()))


def _in_graph(arrays: list[Any]) -> bool:
    """Tell whether PyTorch's graph wants a gradient."""
    return any(getattr(x, "requires_grad", False) for x in arrays) and bool(library("torch").is_grad_enabled())


def _sequences(cu: Any, batch: int) -> int:
    if kind_of(cu) is None or len(cu.shape) != 1 or cu.shape[0] < 2 or "int" not in dtype_name(cu):
        raise InvalidProblem("cu_seqlens: expected at least 2 integers on one axis, the offsets of packed sequences")
    if batch != 1:
        raise InvalidProblem(f"query: axis batch is {batch}, expected 1 with cu_seqlens; pack along the seq axis")
    return int(cu.shape[0]) - 1


def _float32(x: Any, name: str, lie: Any) -> Any:
    return lie(cast(x, "float32", name))


def _contiguous(x: Any) -> Any:
    return (
        x.contiguous() if kind_of(x) == "torch" else x if kind_of(x) == "jax" else library("cupy").ascontiguousarray(x)
    )


def rates_of(like: Any, device: int, decay: tuple[float, ...]) -> Any:
    """Return the rates on the GPU; they are kept, as copying them there waits for it."""
    key = (kind_of(like) == "torch", device, decay)
    if key not in _RATES:
        if key[0]:
            torch = library("torch")
            _RATES[key] = torch.tensor(decay, dtype=torch.float64, device=like.device)
        else:
            _RATES[key] = library("cupy").array(decay, "float64")
    return _RATES[key]


_RATES: Kept[Any] = Kept()


def _values(entry: str, arrays: Mapping[str, View]) -> dict[str, Any]:
    """Return the kernel's arrays by the names of its parameters."""

    def pointer(name: str) -> int:
        return arrays[name].pointer if name in arrays else 0

    def tensor(name: str) -> tuple[int, ...]:
        return (arrays[name].pointer, *arrays[name].spread()[:3]) if name in arrays else (0, 0, 0, 0)

    found: dict[str, Any] = {"q": tensor("query"), "k": tensor("key"), "v": tensor("value"), "out": tensor("out")}
    found |= {"start": pointer("state"), "last": pointer("last"), "cu": pointer("cu_seqlens")}
    own: dict[str, Any] = (
        {"rates": pointer("decay")} if entry == "lightning" else {n: tensor(n) for n in ("alpha", "beta")}
    )
    return found | own
