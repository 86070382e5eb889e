"""What runs an untrusted kernel: a program that imports nothing of refattn, and hides it from the kernel.

It is started by its path. Calls come as bytes over a pipe and leave as bytes: nothing is unpickled on either side. In
place of refattn the kernel finds a module with the few names that a kernel's file uses.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
import types
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["receive", "send"]

NARROW = {
    n: getattr(ml_dtypes, n) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu")
}
BORDER, LINE = 2**14, 16


def send(pipe: Connection, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Send a header that JSON can hold, and arrays."""
    about = {n: (x.dtype.name, x.shape, x.strides, _place(x) % LINE) for n, x in arrays.items()}
    pipe.send_bytes(json.dumps(header | {"arrays": about}).encode())
    for x in arrays.values():
        pipe.send_bytes(np.ascontiguousarray(x).view(np.uint8).tobytes() if x.size else b"")


def receive(pipe: Connection) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a header and arrays, with what is beside their elements in memory NaN."""
    header = json.loads(pipe.recv_bytes())
    arrays = {}
    for name, (dtype, shape, strides, away) in header.pop("arrays").items():
        data = np.frombuffer(pipe.recv_bytes(), np.uint8).view(np.dtype(NARROW.get(dtype, dtype))).reshape(shape)
        arrays[name] = _laid(data, strides, away)
    return header, arrays


def _place(x: Any) -> int:
    return int(x.__array_interface__["data"][0])


def _laid(x: Any, strides: list[int], away: int) -> Any:
    item = x.dtype.itemsize
    if not x.size or any(s < 0 or s % item for s in strides):
        return x.copy()
    size = item + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    block = np.empty((size + 2 * BORDER + 2 * LINE) // item, x.dtype)
    block.view(np.uint8).fill(0xFF)
    start = BORDER + (away - _place(block)) % LINE // item * item
    found = np.ndarray(x.shape, x.dtype, block, start, tuple(strides))
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
    found[once] = x[once]
    return found


class Unsupported(Exception):
    """Raised by a kernel for a call that it cannot do."""


ARRAYS = ["query", "key", "value", "sink", "bias", "allowed", "cu_seqlens_q", "cu_seqlens_k", "weight", "state"]
ARRAYS += [
    "alpha",
    "beta",
    "eta",
    "lengths_q",
    "lengths_k",
    "offset",
    "query_scale",
    "key_scale",
    "value_scale",
    "out_scale",
]
ARRAYS += ["block_table", "new_key", "new_value", "dropout_mask"]
ARRAYS += ["rotary_cos", "rotary_sin", "alibi_slopes", "positions_q", "positions_k", "query_norm", "key_norm"]
SETTINGS = ["scale", "causal", "window", "softcap", "alignment", "out_dtype", "page_layout", "rotary"]
SETTINGS += ["norm_eps", "dropout_p", "philox_layout", "philox_seed", "philox_offset", "variant", "options"]


class Problem:
    """One attention call, with the names of refattn's; it notes which options are read."""

    def __init__(
        self, values: dict[str, Any], seen: set[str], kind: str = "numpy", lacks: tuple[str, ...] = ()
    ) -> None:
        self._values, self._seen, self.kind, self.lacks = values, seen, kind, lacks

    def __getattr__(self, name: str) -> Any:
        if name not in ARRAYS + SETTINGS:
            raise AttributeError(f"Problem has no {name!r}")
        self._seen.add(name)
        found = self._values.get(name)
        return tuple(found) if name == "window" and found is not None else found

    batch = property(lambda self: int(self._values["query"].shape[0]))
    heads = property(lambda self: int(self._values["query"].shape[1]))
    n_q = property(lambda self: int(self._values["query"].shape[2]))
    d_k = property(lambda self: int(self._values["query"].shape[3]))
    heads_kv = property(lambda self: int(self._values["key"].shape[1 + self._by_slot]))
    _by_slot = property(lambda self: self._values.get("page_layout") == "NHD")
    _paged = property(lambda self: self._values.get("block_table") is not None)
    _rows = property(lambda self: len(self._values["block_table"]) if self._paged and self._packed else 1)
    _packed = property(lambda self: self._values.get("cu_seqlens_q") is not None)
    page_size = property(lambda self: int(self._values["key"].shape[2 - self._by_slot]) if self._paged else 0)
    n_k = property(lambda self: self._rows * self.room)
    d_v = property(lambda self: int(self._values["value"].shape[3]))
    out_shape = property(lambda self: (self.batch, self.heads, self.n_q, self.d_v))
    state_parts = property(lambda self: 1 if self.eta is None else 2)
    state_shape = property(lambda self: (self._states, self.heads, self.d_k * self.state_parts, self.d_v))
    _states = property(lambda self: len(self._values["cu_seqlens_q"]) - 1 if self._packed else self.batch)
    out_type = property(lambda self: self.out_dtype or self.dtype)
    dtype = property(lambda self: str(self._values["query"].dtype).removeprefix("torch."))

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that are there, by name."""
        self._seen.update(ARRAYS)
        return {n: self._values[n] for n in ARRAYS if hasattr(self._values.get(n), "shape")}

    corner = property(lambda self: self.causal or self.alignment or "bottom_right")

    @property
    def room(self) -> int:
        """The number of keys that an item's pages have room for."""
        return int(self._values["block_table"].shape[1]) * self.page_size if self._paged else int(self.key.shape[2])

    def segments(self, batch: int = 0) -> list[tuple[slice, slice]]:
        """Return the used query rows and key rows of each packed sequence of a batch item."""
        self._seen.update({"cu_seqlens_q", "cu_seqlens_k", "lengths_q", "lengths_k"})
        return list(zip(self._spans("q", self.n_q, batch), self._spans("k", self.n_k, batch), strict=True))

    def _spans(self, axis: str, n: int, batch: int) -> list[slice]:
        starts, lengths = (self._values.get(f"{x}_{axis}") for x in ("cu_seqlens", "lengths"))
        if axis == "k" and self._paged and self._packed:
            starts = [i * self.room for i in range(self._rows + 1)]
        ends = [0, n] if starts is None else list(map(int, starts))
        if lengths is None:
            return [slice(a, b) for a, b in pairwise(ends)]
        used = list(map(int, lengths)) if starts is not None else [int(lengths[batch])]
        return [slice(a, a + m) for a, m in zip(ends, used, strict=False)]

    def to(self, kind: str, device: Any = None) -> Problem:
        """Return the same call with arrays of another library."""
        values = {
            n: _to(x, kind, device) if n in ARRAYS and hasattr(x, "shape") else x for n, x in self._values.items()
        }
        return Problem(values, self._seen, kind, self.lacks)


def _to(x: Any, kind: str, device: Any) -> Any:
    if kind == "numpy":
        return x
    if kind == "torch":
        import torch

        if x.dtype.name in NARROW:
            bits = np.int16 if x.dtype.itemsize == 2 else np.uint8
            found = torch.from_numpy(x.view(bits)).view(getattr(torch, x.dtype.name))
        else:
            found = torch.from_numpy(x)
        return found if device is None else found.to(device)
    if kind == "jax":
        import jax

        return jax.device_put(x, device)
    import cupy

    with cupy.cuda.Device(device):
        return cupy.asarray(x)


def _numpy(x: Any) -> Any:
    """Return a result's numbers; torch's narrow types by their bits."""
    if type(x).__module__.startswith("torch"):
        x, name = x.detach().cpu().contiguous(), str(x.dtype).removeprefix("torch.")
        if name not in NARROW:
            return x.numpy()
        import torch

        bits = torch.int16 if x.element_size() == 2 else torch.uint8
        return x.view(bits).numpy().view(NARROW[name])
    return np.asarray(x.get() if hasattr(x, "get") and not isinstance(x, dict) else x)


class Capabilities(dict[str, Any]):
    """What a kernel declares, as it is sent; what a call needs is looked at on the other side, not here."""

    def __init__(self, dtypes: Any = ("float32",), features: Any = None, **more: Any) -> None:
        said = {"dtypes": dtypes} | ({} if features is None else {"features": features}) | more
        super().__init__({n: _plain(x) for n, x in said.items()})

    def require(self, problem: Problem) -> None:
        """Raise Unsupported where the judge says that a call needs what the kernel does not have."""
        if problem.lacks:
            raise Unsupported(f"not in its capabilities: {', '.join(problem.lacks)}")


def _plain(x: Any) -> Any:
    """Return a set as a list, which JSON has."""
    return sorted(x) if isinstance(x, set | frozenset | tuple) else x


class _Nothing(importlib.abc.MetaPathFinder):
    """Refuse every import of refattn but that of the module that stands for it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "refattn":
            raise ImportError("refattn is not here: an untrusted kernel has Capabilities and UnsupportedProblem alone")


def _hide() -> None:
    found: Any = types.ModuleType("refattn")
    found.Capabilities = Capabilities
    found.UnsupportedProblem, found.Problem = Unsupported, Problem
    sys.modules["refattn"] = found
    sys.meta_path.insert(0, _Nothing())


def _limit(gib: float) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if gib:
        size = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _answer(
    kernel: Any, header: dict[str, Any], arrays: dict[str, Any], able: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what goes back for one call: a header and arrays."""
    dout, seen = arrays.pop("dout", None), set[str]()
    before = {n: x.tobytes() for n, x in arrays.items()}
    kind, device = able.get("arrays", "numpy"), able.get("device") or None
    asked = Problem(header["settings"] | arrays, seen, lacks=tuple(header["lacks"])).to(kind, device)
    if dout is None:
        parts = kernel(asked)
        parts = parts if isinstance(parts, tuple | list) else (parts,)
        names = ("out", "lse")[: len(parts)]
        found = {n: x for n, x in zip(names, parts, strict=True) if x is not None}
        if "new_key" in arrays:
            found |= {"cache_key": asked.key, "cache_value": asked.value}
    else:
        found = dict(kernel.gradients(asked, _to(dout, kind, device)))
    found = {str(n): _numpy(x) for n, x in found.items()}
    caches = ("key", "value") if "new_key" in arrays else ()
    changed = [n for n, x in arrays.items() if n not in caches and x.tobytes() != before[n]]
    return {"kind": "answer", "read": sorted(seen), "changed": changed}, found


def main(number: str, path: str, function: str, memory: str) -> None:
    """Load a kernel and answer calls until the other end closes."""
    pipe = Connection(int(number))
    _limit(float(memory))
    _hide()
    try:
        sys.path.insert(0, str(Path(path).parent))
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, function)
        able = getattr(kernel, "capabilities", None)
        header = {"kind": "ready", "capabilities": able, "gradients": hasattr(kernel, "gradients")}
    except BaseException as e:
        send(pipe, {"kind": "broken", "text": f"{type(e).__name__}: {e}"}, {})
        return
    send(pipe, header, {})
    while True:
        try:
            header, arrays = receive(pipe)
        except EOFError:
            return
        try:
            send(pipe, *_answer(kernel, header, arrays, able or {}))
        except Unsupported as e:
            send(pipe, {"kind": "unsupported", "text": str(e)}, {})
        except BaseException as e:
            send(pipe, {"kind": "error", "text": f"the kernel raised {type(e).__name__}: {e}"[:400]}, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
