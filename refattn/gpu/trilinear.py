"""Trilinear (2-simplicial) attention on Hopper, forward and backward: the kernels' source, arguments and launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedProblem
from .arguments import arguments_of
from .build import compiled, text_of
from .launch import attribute, capability, queue
from .sm90 import key_map, tensor_map, wgmma
from .views import View, check_devices, device_of, empty, finish, layout, on, stream_of, view

__all__ = ["backward", "forward", "macros", "macros_backward", "shared_bytes", "shared_bytes_backward", "source"]

FILE, BACKWARD = "trilinear.cu", "trilinear_backward.cu"
WIDTHS = (64, 128)
NAMES = ("query", "k1", "k2", "v1", "v2")


def macros(d: int, keys: int) -> dict[str, int]:
    """Return what the kernel is compiled with, for head dim d and the k2 that a tile of rows sees."""
    return {
        "HEAD_DIM": min(w for w in WIDTHS if w >= d),
        "HALVES": 2 if keys > 64 else 1,
        "STAGES": 2,
        "BF16": 1,
        "CONSUMER_REGISTERS": 240,
        "PRODUCER_REGISTERS": 24,
    }


def shared_bytes(m: Mapping[str, int]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    rows = 2 * 64 + 2 * m["STAGES"] * 64 * m["HALVES"] + 8 * 2 * (4 if m["HALVES"] == 2 else 8)
    return 1024 + 2 * m["HEAD_DIM"] * rows + 512 * (m["HEAD_DIM"] // 2 + 4) + 32 + 32 * m["STAGES"] + 16 * 256 + 64 * 8


def macros_backward(d: int, query: bool) -> dict[str, int]:
    """Return what the backward kernel is compiled with, for the gradient of the query or of keys and values."""
    width = min(w for w in WIDTHS if w >= d)
    keep = query or width == 64  # else there are no registers for it
    return {
        "HEAD_DIM": width,
        "QUERY": int(query),
        "KEEP": int(keep),
        "BF16": 1,
        "CONSUMER_REGISTERS": 184 if keep else 208,
        "BUILDER_REGISTERS": 72 if keep else 48,
    }


def shared_bytes_backward(m: Mapping[str, int]) -> int:
    """Return the dynamic shared memory of a block of the backward kernel, in bytes."""
    return 1024 + (10 if m["KEEP"] else 12) * 64 * 2 * m["HEAD_DIM"] + 4 * 512 + 64


def source(m: Mapping[str, int]) -> str:
    """Return a kernel's text, the backward one's for its macros: #defines, and the wgmma wrappers of its tiles."""
    backward, pairs = "QUERY" in m, (("first", True), ("next", False))
    wrappers = [wgmma(f"qk_{n}", 64, "bf16", first=f, from_registers=not backward) for n, f in pairs]
    wrappers += [
        wgmma(f"pv_{n}", m["HEAD_DIM"], "bf16", first=f, from_registers=True, rows=True)
        for n, f in pairs[int(backward) :]
    ]
    return text_of(BACKWARD if backward else FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def forward(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, *, scale: float, causal: str | None,
    window: tuple[int | None, int | None],
) -> tuple[Any, Any]:  # fmt: skip
    """Return out and lse of trilinear attention; shapes and options are those that `tensor.forms.check` has passed.

    Raises
    ------
    UnsupportedProblem
        No Hopper GPU, another type than bfloat16, a head dim or a layout that the kernel does not take.
    """
    device = device_of(query, "query")
    with on(device):
        arrays = {n: view(x, n) for n, x in zip(NAMES, (query, k1, k2, v1, v2), strict=True)}
        _check(arrays, scale, device)
        b, h, n_q, d = arrays["query"].shape
        out, arrays["out"] = empty(query, (b, h, n_q, d), "bfloat16")
        lse, arrays["lse"] = empty(query, (b, h, n_q), "float32")
        call = _Call.of(arrays, scale, causal, window)
        # a block of k2 stays in shared memory while k1 passes by: the more keys are blocks
        if call.span(0) > call.span(1):
            for x in "kv":
                arrays[x + "1"], arrays[x + "2"] = arrays[x + "2"], arrays[x + "1"]
            call = call.turned()
        m = macros(d, call.span(1))
        tiles = b * h // call.row_heads * -(-n_q // (64 // call.row_heads))
        grid = min(tiles, attribute(device, "MultiProcessorCount"))
        kernel = compiled(source(m), "trilinear_forward", shared_bytes(m), "sm_90a", device)
        takes = arguments_of(FILE, "trilinear_forward")
        values = _arguments(m, arrays, call, tiles)
        queue(kernel, grid, 384, shared_bytes(m), stream_of(query, device), takes, values)
        out, lse = finish(query, [out, lse], list(arrays.values()))
    return out, lse


def backward(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, out: Any, lse: Any, d_out: Any, *, scale: float,
    causal: str | None, window: tuple[int | None, int | None],
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Return the gradients of query, k1, k2, v1 and v2, given what `forward` returned and out's gradient.

    Raises
    ------
    UnsupportedProblem
        As in `forward`.
    """
    device = device_of(query, "query")
    with on(device):
        given = (query, k1, k2, v1, v2, out, d_out)
        arrays = {n: view(x, n) for n, x in zip((*NAMES, "out", "d_out"), given, strict=True)}
        _check(arrays, scale, device)
        sums = view(lse, "lse")
        (b, h, n_q, _), stream = arrays["query"].shape, stream_of(query, device)
        if any(n > 1 and s != e for n, s, e in zip(sums.shape, sums.strides, (h * n_q, n_q, 1), strict=True)):
            raise UnsupportedProblem(f"lse: the trilinear kernel takes a contiguous one, got strides {sums.strides}")
        kept, arrays["delta"] = empty(query, (b, h, n_q), "float32")
        found = []
        for name in NAMES:
            x, arrays["d_" + name] = empty(query, arrays[name].shape, "bfloat16")
            found.append(x)
        arrays["lse"] = sums
        _delta(arrays, stream)
        _gradients(_Call.of(arrays, scale, causal, window), arrays, stream)
        *results, _ = finish(query, [*found, kept], list(arrays.values()))
    return tuple(results)


def _delta(arrays: Mapping[str, View], stream: int) -> None:
    """Queue the sums of out times its gradient, of each row."""
    (b, h, n_q, d), device = arrays["query"].shape, arrays["query"].device
    tensors = {n: _tensor(arrays[n]) for n in ("out", "d_out")}
    sizes = {"heads": h, "n_q": n_q, "rows": b * h * n_q, "d": d}
    kernel = compiled(source(macros_backward(d, query=True)), "trilinear_delta", 0, "sm_90a", device)
    takes = arguments_of(BACKWARD, "trilinear_delta")
    queue(kernel, -(-b * h * n_q // 8), 256, 0, stream, takes, {**tensors, "delta": arrays["delta"].pointer, **sizes})


def _gradients(call: _Call, arrays: Mapping[str, View], stream: int) -> None:
    """Queue the gradient of the query, and those of k1 and v1, and of k2 and v2."""
    (_, h, n_q, d), device = arrays["query"].shape, arrays["query"].device
    takes = arguments_of(BACKWARD, "trilinear_backward")
    tensors = ("x", "x2", "y", "y2", "single", "single2", "dx", "dx2")
    q, a, k, x, v = (("query", "d_out"), ("k1", "v1"), ("k2", "v2"), ("d_k1", "d_v1"), ("d_k2", "d_v2"))
    wide = call.span(1) >= call.span(0)  # the rows of Y come in tiles: the more keys
    launches = [
        (True, (*q, *(k + a if wide else a + k), "d_query", "d_query"), call if wide else call.turned()),
        (False, (*k, *q, *a, *v), call),
        (False, (*a, *q, *k, *x), call.turned()),
    ]
    for of_query, names, c in launches:
        m = macros_backward(d, of_query)
        rows = h // call.row_heads * -(-n_q // (64 // call.row_heads)) if of_query else 0
        tiles = call.batch * (rows or call.heads_kv * -(-c.n[1] // 64))
        values = {
            **{to: _tensor(arrays[n]) for to, n in zip(tensors, names, strict=True)},
            **{"lse": arrays["lse"].pointer, "delta": arrays["delta"].pointer},
            **{"shape": c.shape(tiles), "scale": c.scale},
        }
        kernel = compiled(source(m), "trilinear_backward", shared_bytes_backward(m), "sm_90a", device)
        queue(kernel, tiles, 512, shared_bytes_backward(m), stream, takes, values)


@dataclass(frozen=True)
class _Call:
    """Sizes and masks; those of k1 and k2 in this order, or turned around.

    Attributes
    ----------
    batch, heads_kv, group, n_q, d : int
        Sizes.
    n, shift, window : (int, int)
        Keys, how much further a row sees than its own place, and how many keys back.
    causal : bool
        Whether rows see no keys after their place.
    scale : float
        Of the scores.
    """

    batch: int
    heads_kv: int
    group: int
    n_q: int
    d: int
    n: tuple[int, int]
    shift: tuple[int, int]
    window: tuple[int, int]
    causal: bool
    scale: float

    @classmethod
    def of(
        cls, arrays: Mapping[str, View], scale: float, causal: str | None, window: tuple[int | None, int | None]
    ) -> _Call:
        (b, h, n_q, d), (_, h_kv, n1, _), n2 = arrays["query"].shape, arrays["k1"].shape, arrays["k2"].shape[2]
        shift = tuple(n - n_q if causal == "bottom_right" else 0 for n in (n1, n2))
        back = tuple(n + n_q if w is None else min(w, n + n_q) for n, w in zip((n1, n2), window, strict=True))
        return cls(b, h_kv, h // h_kv, n_q, d, (n1, n2), shift, back, causal is not None, scale)  # type: ignore[arg-type]

    def turned(self) -> _Call:
        """Return the call with the keys' kinds turned around."""
        n, shift, window = (x[::-1] for x in (self.n, self.shift, self.window))
        return replace(self, n=n, shift=shift, window=window)

    @property
    def row_heads(self) -> int:
        """Heads of a key head's group in a tile: the largest power of 2 that divides it, up to 64."""
        return min(self.group & -self.group, 64)

    def span(self, kind: int) -> int:
        """Return how many keys of a kind a tile of rows sees."""
        return min(self.n[kind], self.window[kind] + 64 // self.row_heads - 1) if self.causal else self.n[kind]

    def shape(self, tiles: int) -> dict[str, Any]:
        """Return the kernels' struct Shape: k1 are the keys that come one by one."""
        single, tiled = zip(self.n, self.shift, self.window, strict=True)
        return {
            **{"batch": self.batch, "heads_kv": self.heads_kv, "group": self.group, "n_q": self.n_q, "d": self.d},
            **{"causal": int(self.causal), "row_heads_log2": self.row_heads.bit_length() - 1, "tiles": tiles},
            **{"single": single, "tiled": tiled},
        }


def _check(arrays: dict[str, View], scale: float, device: int) -> None:
    found = capability(device)
    if found != (9, 0):
        raise UnsupportedProblem(
            f"tensor: the trilinear kernel needs compute capability 9.0, got {found[0]}.{found[1]}"
        )
    query, value = arrays["query"], arrays["v1"]
    if query.dtype != "bfloat16":  # products of float16 may be infinite
        raise UnsupportedProblem(f"tensor: the trilinear kernel takes bfloat16, got {query.dtype}")
    d, d_v = query.shape[3], value.shape[3]
    if d != d_v or d % 8 or d > WIDTHS[-1]:
        raise UnsupportedProblem(
            f"tensor: the trilinear kernel takes equal head dims, multiples of 8 up to {WIDTHS[-1]}, got {d} and {d_v}"
        )
    if max(x.shape[2] for x in arrays.values()) >= 2**24:
        raise UnsupportedProblem("tensor: the trilinear kernel takes fewer than 2**24 rows and keys")
    if not scale > 0:
        raise UnsupportedProblem(f"tensor: the trilinear kernel takes a scale above 0, got {scale}")
    check_devices(arrays)
    for name, x in arrays.items():
        if not layout([x])[1]:
            raise UnsupportedProblem(
                f"{name}: the trilinear kernel takes rows that begin at multiples of 16 bytes, at strides above 0, got "
                f"strides {x.strides}; copy the array"
            )


def _tensor(x: View) -> tuple[int, ...]:
    """Return the backward kernel's struct Tensor."""
    return (x.pointer, *x.spread()[:3])


def _arguments(m: Mapping[str, int], arrays: Mapping[str, View], call: _Call, tiles: int) -> dict[str, Any]:
    """Return the forward kernel's arguments by name."""
    q, k2, v2 = (arrays[n] for n in ("query", "k2", "v2"))
    rows, (s_b, s_h, s_n, _) = call.row_heads, q.strides
    shape = (call.batch, call.heads_kv, call.group, call.n_q, call.d)
    grouped = View(q.pointer, shape, (s_b, call.group * s_h, s_h, s_n, 1), q.dtype, q.device)
    return {
        "map_q": tensor_map(grouped, (4, 2, 3, 1, 0), (64, rows, 64 // rows, 1, 1), "query"),
        **{f"map_{n}": key_map(x, 64 * m["HALVES"], n) for n, x in (("k2", k2), ("v2", v2))},
        **{n: arrays[n].pointer for n in ("k1", "v1", "out", "lse")},
        **{f"{n}_at": arrays[n].spread()[:3] for n in ("k1", "v1", "out")},
        **{"shape": call.shape(tiles), "scale": call.scale},
    }
