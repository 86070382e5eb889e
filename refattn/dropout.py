r"""Dropout of attention's weights: the mask that a call carries, and the masks that kernels draw from a seed.

A weight that the mask keeps is divided by 1 - p, one that it drops is 0; the denominator and lse are those of all keys:

    out_i = sum_j p_ij kept_ij v_j / (1 - p),    p_ij = exp(s_ij - lse_i)

Kernels make the mask again in the backward pass from a seed and an offset, by Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011; the Random123 library): a bijection of four 32-bit words under a key of two,
x -> (hi(B z) ^ y ^ k0, lo(B z), hi(A x) ^ w ^ k1, lo(A x)) in each round, the key's words growing by two constants.
Which counter belongs to which weight is each kernel's own. Read:

- FlashAttention 2.8.4 (``csrc/flash_attn/src/dropout.h``, ``philox.cuh``, ``flash_fwd_kernel.h``) and PyTorch's copy of
  these, which is the same;
- the memory-efficient kernel that PyTorch took over from xFormers (``mem_eff_attention/kernel_forward.h``), and
  cuRAND's ``skipahead``, which counts the words that it draws.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import dtype_name, kind_of, to_kind, to_numpy
from .errors import InvalidInput, InvalidProblem
from .validation import expect_array, shown

__all__ = ["PHILOX", "check_dropout", "drawn", "dropout_mask", "philox", "weights_shape"]

Words = NDArray[np.uint32]
Shape = tuple[int, int, int, int]
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
GROWTH = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
BELOW_ONE = "a number of at least 0 and below 1 (in float64)"
PHILOX = ("philox_layout", "philox_seed", "philox_offset")
"""What a call has that names a mask by its seed."""
MOST_WEIGHTS = 2**36
"""The weights of a mask, at most: drawing takes some dozens of bytes for each."""


def check_dropout(p: Any) -> None:
    """Refuse a mask without a probability, the other way round, and either that does not fit a call."""
    given = [n for n in PHILOX if getattr(p, n) is not None]
    if p.dropout_mask is None and p.dropout_p is None and not given:
        return
    if p.dropout_p is None:
        name = given[0] if given else "dropout_mask"
        what = "a seed's" if given else "a mask"
        raise InvalidProblem(f"{name}: got {what} without dropout_p; what is kept is divided by 1 - dropout_p")
    if p.dropout_mask is None and not given:
        raise InvalidProblem(
            "dropout_p: got a probability without dropout_mask; an exact answer needs to know which weights are kept, "
            "and refattn.dropout_mask makes the masks that kernels draw, philox_layout and philox_seed name them"
        )
    if not _probability(p.dropout_p):
        raise InvalidProblem(f"dropout_p: got {shown(p.dropout_p)}, expected {BELOW_ONE}")
    object.__setattr__(p, "dropout_p", float(p.dropout_p))
    if given:
        _check_philox(p, given)
        return
    x, full = p.dropout_mask, (p.batch, p.heads, p.n_q, p.n_k)
    expect_array("dropout_mask", x)
    if kind_of(x) != p.kind:
        raise InvalidProblem(f"dropout_mask: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")
    bits = dtype_name(x) == "uint8"
    if not bits and dtype_name(x) != "bool":
        raise InvalidProblem(
            f"dropout_mask: got dtype {dtype_name(x)}, expected bool, True where a weight is kept, or bits in uint8"
        )
    full = (*full[:3], -(-p.n_k // 8)) if bits else full
    spread = full[:3] if bits else full
    good = len(x.shape) == 4 and all(a in (1, b) for a, b in zip(x.shape[: len(spread)], spread, strict=True))
    if not good or (bits and x.shape[3] != full[3]):
        what = " (8 keys to a byte) or 1 in place of another axis" if bits else " or 1 in place of an axis"
        raise InvalidProblem(f"dropout_mask: got shape {tuple(x.shape)}, expected {full}{what}; add axes of length 1")


def _check_philox(p: Any, given: list[str]) -> None:
    if p.dropout_mask is not None:
        raise InvalidProblem(f"{given[0]}: got a seed's beside dropout_mask; give one of the two")
    for name in PHILOX[:2]:
        if getattr(p, name) is None:
            raise InvalidProblem(f"{name}: is missing beside {given[0]}; a mask is drawn by a layout and a seed")
    _known("philox_layout", p.philox_layout, InvalidProblem)
    for name in PHILOX[1:]:
        if (x := getattr(p, name)) is not None:
            _word(name, x, InvalidProblem)
            object.__setattr__(p, name, int(x))
    if p.philox_layout == "efficient":
        for name in ("cu_seqlens_q", "lengths_q", "lengths_k", "block_table"):
            if getattr(p, name) is not None:
                raise InvalidProblem(
                    f"philox_layout: got 'efficient' beside {name}; it counts the weights of whole arrays alone"
                )
    if math.prod(n or 1 for n in weights_shape(p)) > MOST_WEIGHTS:
        raise InvalidProblem("philox_layout: got a call of more than 2**36 weights; cut it into heads")


def weights_shape(p: Any) -> Shape:
    """Return the shape whose weights a seed names: of packed sequences each with as many as the longest."""
    if p.cu_seqlens_q is None:
        return p.batch, p.heads, p.n_q, p.n_k
    if p.block_table is not None:
        many, longest_k = int(p.block_table.shape[0]), p.room
    else:
        many, longest_k = int(p.cu_seqlens_k.shape[0]) - 1, _longest(p.cu_seqlens_k)
    return many, p.heads, _longest(p.cu_seqlens_q), longest_k


def _longest(ends: Any) -> int:
    return int(np.diff(to_numpy(ends).astype(np.int64)).max(initial=0))


def drawn(p: Any) -> Any:
    """Return the same call with booleans in dropout_mask where it names its mask by a seed or has it in bits."""
    if p.dropout_mask is not None and dtype_name(p.dropout_mask) == "uint8":
        bits = np.unpackbits(to_numpy(p.dropout_mask), axis=3, count=p.n_k, bitorder="little")
        return p.replace(dropout_mask=_like(p, bits.astype(bool)))
    if p.philox_seed is None:
        return p
    mask = dropout_mask(p.philox_seed, p.philox_offset or 0, weights_shape(p), p.dropout_p, p.philox_layout)
    if p.cu_seqlens_q is not None:
        packed = np.zeros((1, p.heads, p.n_q, p.n_k), bool)
        for one, q, k in zip(mask, *(_starts(p, x) for x in "qk"), strict=True):
            packed[0][:, q, k] = one[:, : q.stop - q.start, : k.stop - k.start]
        mask = packed
    return p.replace(dropout_mask=_like(p, mask), **dict.fromkeys(PHILOX))


def _starts(p: Any, axis: str) -> list[slice]:
    """Return where packed sequences lie, what is not used of them too."""
    ends = getattr(p, f"cu_seqlens_{axis}")
    at = np.arange(p.block_table.shape[0] + 1) * p.room if ends is None else to_numpy(ends)
    return [slice(int(a), int(b)) for a, b in pairwise(at.tolist())]


def _like(p: Any, mask: NDArray[np.bool_]) -> Any:
    return to_kind(mask, p.kind, getattr(p.query, "device", None) if p.kind == "torch" else None)


def _probability(x: Any) -> bool:
    real = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    # a wider type's number just below 1 is 1 in float64
    return bool(real and 0 <= x < 1 and float(x) < 1)


def philox(counter: Any, key: tuple[int, int], rounds: int = 10) -> Words:
    """Return Philox4x32 of many counters: four words of 32 bits for each.

    Parameters
    ----------
    counter : (..., 4) integer array
        Words below 2**32, the lowest first.
    key : (int, int)
        Two words.
    rounds : int
        10 in Random123's and cuRAND's default, 7 in FlashAttention.

    Returns
    -------
    (..., 4) uint32 array

    Notes
    -----
    Salmon et al., SC 2011, section 3.3. Recalled; tests hold it to Random123's published known answers.
    """
    x, y, z, w = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(rounds):
        a, b = x * np.uint64(MULTIPLIERS[0]), z * np.uint64(MULTIPLIERS[1])
        x, y, z, w = (b >> 32) ^ y ^ np.uint64(k0), b & LOW, (a >> 32) ^ w ^ np.uint64(k1), a & LOW
        k0, k1 = (k0 + GROWTH[0]) & int(LOW), (k1 + GROWTH[1]) & int(LOW)
    return np.stack([x, y, z, w], -1).astype(np.uint32)


def dropout_mask(
    seed: int, offset: int, shape: tuple[int, int, int, int], p: float, drawn_as: str = "flash"
) -> NDArray[np.bool_]:
    r"""Return which weights a kernel keeps that draws its dropout mask from a seed and an offset.

    "flash" is FlashAttention 2, and PyTorch's copy of it: a warp's lane owns 16 weights of a block of 16 rows and 32
    keys, a byte each of Philox with 7 rounds. With lane = 4 (i mod 8) + ((j mod 8) div 2), the counter is
    (offset + 32 (b h_q + h) + lane, i div 16, j div 32), 64 bits and two words, and the byte is number
    4 ((j mod 32) div 8) + 2 ((i mod 16) div 8) + j mod 2. A weight is kept where its byte is at most
    floor(255 (1 - p)): with probability (floor(255 (1 - p)) + 1) / 256, though it is divided by 1 - p.

    "efficient" is PyTorch's memory-efficient kernel: weight number n of all, in the order of the axes, has word
    offset + n of Philox's stream with 10 rounds, as cuRAND counts it. A weight is kept where (word + 1/2) / 2^32, in
    float32, is above p.

    Parameters
    ----------
    seed, offset : int
        Of 64 bits, as the kernel returns them: FlashAttention's ``rng_state``, PyTorch's ``rng_state`` or
        ``philox_seed`` and ``philox_offset``.
    shape : (b, h_q, n_q, n_k)
        Of the scores. With packed sequences b counts them, and rows and keys count from their first: call it for the
        longest and cut.
    p : float
        The probability that a weight is dropped, at least 0 and below 1.
    drawn_as : {"flash", "efficient"}
        The kernel.

    Returns
    -------
    (b, h_q, n_q, n_k) bool array
        True where a weight is kept: the ``dropout_mask`` of a Problem.

    Raises
    ------
    InvalidInput
        An argument that is none of these, or a shape of more than 2**36 weights. PyTorch's math backend on a CPU draws
        from another generator, and on a GPU from Philox by a layout that hangs on the card and the version:
        ``torch.native_dropout`` returns its mask. cuDNN's layout is not public.
    """
    for name, x in (("seed", seed), ("offset", offset)):
        _word(name, x, InvalidInput)
    sizes = shape if isinstance(shape, tuple | list) else ()
    if len(sizes) != 4 or any(not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 0 for n in sizes):
        raise InvalidInput(f"shape: got {shown(shape)}, expected (b, h_q, n_q, n_k)")
    if not _probability(p):
        raise InvalidInput(f"p: got {shown(p)}, expected {BELOW_ONE}")
    _known("drawn_as", drawn_as, InvalidInput)
    b, h, n_q, n_k = (int(n) for n in sizes)
    # NumPy multiplies the axes other than those of 0, in 64 bits
    if math.prod(n or 1 for n in (b, h, n_q, n_k)) > MOST_WEIGHTS:
        raise InvalidInput(f"shape: got {shown(shape)}, expected at most 2**36 weights, axes of 0 counted as 1")
    return DRAWN[drawn_as](int(seed), int(offset), (b, h, n_q, n_k), float(p))


def _known(name: str, x: Any, error: type[Exception]) -> None:
    if not isinstance(x, str) or x not in DRAWN:
        more = f"; {ELSEWHERE[x]}" if isinstance(x, str) and x in ELSEWHERE else ""
        raise error(f"{name}: got {shown(x)}, expected one of {', '.join(DRAWN)}{more}")


def _word(name: str, x: Any, error: type[Exception]) -> None:
    if not isinstance(x, int | np.integer) or isinstance(x, bool) or not 0 <= x < 2**64:
        raise error(f"{name}: got {shown(x)}, expected an integer of at least 0 and below 2**64")


def _flash(seed: int, offset: int, shape: Shape, p: float) -> NDArray[np.bool_]:
    b, h, n_q, n_k = shape
    i, j = np.arange(n_q)[:, None], np.arange(n_k)
    lane, byte = 4 * (i % 8) + j % 8 // 2, 4 * (j % 32 // 8) + 2 * (i % 16 // 8) + j % 2
    first = np.uint64(offset) + np.uint64(32) * np.arange(b * h, dtype=np.uint64)  # wraps at 2**64, as theirs
    low = first[:, None, None] + lane.astype(np.uint64)
    counter = np.stack(np.broadcast_arrays(low & LOW, low >> np.uint64(32), i // 16, j // 32), -1)
    words = philox(counter, (seed & int(LOW), seed >> 32), rounds=7)
    word = np.take_along_axis(words, np.broadcast_to(byte // 4, low.shape)[..., None], -1)[..., 0]
    drawn_byte = word >> (8 * (byte % 4)).astype(np.uint32) & np.uint32(255)
    # 1 - p in float32, its product with 255 in float64
    most = int(np.floor(float(np.float32(1) - np.float32(p)) * 255.0))
    return np.asarray(drawn_byte <= most).reshape(shape)


def _efficient(seed: int, offset: int, shape: Shape, p: float) -> NDArray[np.bool_]:
    at = np.uint64(offset) + np.arange(math.prod(shape), dtype=np.uint64)
    block = at // np.uint64(4)
    zero = np.zeros_like(block)
    words = philox(np.stack([block & LOW, block >> np.uint64(32), zero, zero], -1), (seed & int(LOW), seed >> 32))
    word = np.take_along_axis(words, (at % np.uint64(4)).astype(np.intp)[:, None], -1)[:, 0]
    uniform = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return np.asarray(uniform > np.float32(p)).reshape(shape)


DRAWN = {"flash": _flash, "efficient": _efficient}
"""The kernels whose masks can be drawn again."""
ELSEWHERE = {
    "math": "torch.native_dropout returns the mask that the math backend draws",
    "torch": "torch.native_dropout returns the mask that it draws",
    "cudnn": "cuDNN's layout is not public; let it write its mask",
}
