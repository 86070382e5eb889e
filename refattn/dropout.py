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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import dtype_name, kind_of
from .errors import InvalidInput, InvalidProblem
from .validation import expect_array, shown

__all__ = ["check_dropout", "dropout_mask", "philox"]

Words = NDArray[np.uint32]
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
GROWTH = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
BELOW_ONE = "a number of at least 0 and below 1 (in float64)"
MOST_WEIGHTS = 2**36
"""The weights of a mask, at most: drawing takes some dozens of bytes for each."""


def check_dropout(p: Any) -> None:
    """Refuse a mask without a probability, the other way round, and either that does not fit a call."""
    if p.dropout_mask is None and p.dropout_p is None:
        return
    if p.dropout_p is None:
        raise InvalidProblem("dropout_mask: got a mask without dropout_p; what is kept is divided by 1 - dropout_p")
    if p.dropout_mask is None:
        raise InvalidProblem(
            "dropout_p: got a probability without dropout_mask; an exact answer needs to know which weights are kept, "
            "and refattn.dropout_mask makes the masks that kernels draw"
        )
    if not _probability(p.dropout_p):
        raise InvalidProblem(f"dropout_p: got {shown(p.dropout_p)}, expected {BELOW_ONE}")
    object.__setattr__(p, "dropout_p", float(p.dropout_p))
    x, full = p.dropout_mask, (p.batch, p.heads, p.n_q, p.n_k)
    expect_array("dropout_mask", x)
    if kind_of(x) != p.kind:
        raise InvalidProblem(f"dropout_mask: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")
    if dtype_name(x) != "bool":
        raise InvalidProblem(f"dropout_mask: got dtype {dtype_name(x)}, expected bool, True where a weight is kept")
    if len(x.shape) != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise InvalidProblem(
            f"dropout_mask: got shape {tuple(x.shape)}, expected {full} or 1 in place of an axis; add axes of length 1"
        )


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
        if not isinstance(x, int | np.integer) or isinstance(x, bool) or not 0 <= x < 2**64:
            raise InvalidInput(f"{name}: got {shown(x)}, expected an integer of at least 0 and below 2**64")
    sizes = shape if isinstance(shape, tuple | list) else ()
    if len(sizes) != 4 or any(not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 0 for n in sizes):
        raise InvalidInput(f"shape: got {shown(shape)}, expected (b, h_q, n_q, n_k)")
    if not _probability(p):
        raise InvalidInput(f"p: got {shown(p)}, expected {BELOW_ONE}")
    if not isinstance(drawn_as, str) or drawn_as not in DRAWN:
        more = f"; {ELSEWHERE[drawn_as]}" if isinstance(drawn_as, str) and drawn_as in ELSEWHERE else ""
        raise InvalidInput(f"drawn_as: got {shown(drawn_as)}, expected one of {', '.join(DRAWN)}{more}")
    b, h, n_q, n_k = (int(n) for n in sizes)
    # NumPy multiplies the axes other than those of 0, in 64 bits
    if math.prod(n or 1 for n in (b, h, n_q, n_k)) > MOST_WEIGHTS:
        raise InvalidInput(f"shape: got {shown(shape)}, expected at most 2**36 weights, axes of 0 counted as 1")
    return DRAWN[drawn_as](int(seed), int(offset), (b, h, n_q, n_k), float(p))


Shape = tuple[int, int, int, int]


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
