"""What the levels take for granted of this machine, checked at first use. A failed check raises."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import UntrustedArithmetic
from .doubledouble import two_prod, two_sum

__all__ = ["check_machine", "check_thread"]


def check_thread() -> None:
    """Check that this thread keeps subnormal numbers and rounds to nearest: libraries change both by thread.

    Raises
    ------
    UntrustedArithmetic
        What is wrong, and what to change.
    """
    small = np.full(16, 2.0**-1022)
    if (small * 0.5 != 2.0**-1023).any() or (np.full(16, 2.0**-1074) * 1.0 == 0).any():
        raise UntrustedArithmetic(
            "float64: subnormal numbers are taken for zero in this thread; turn flush-to-zero off "
            "(torch.set_flush_denormal(False)), or use bits= for Arb alone"
        )
    one, half = np.full(16, 1.0), np.full(16, 2.0**-53)
    nearest = (one + half == 1).all() and (one + half * 1.0000001 == 1 + 2.0**-52).all()
    if not (nearest and (-one - half == -1).all() and ((one + 2.0**-52) + half == 1 + 2.0**-51).all()):
        raise UntrustedArithmetic("float64: sums are not rounded to nearest, ties to even; reset the rounding mode")


@lru_cache(maxsize=1)
def check_machine() -> None:
    """Check, once, that matrix products are classical and exact where they must be, and that error-free steps are.

    Raises
    ------
    UntrustedArithmetic
        What is wrong, and what to change.
    """
    check_thread()
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**21), 2**21, s) for s in ((70, 1000), (1000, 90)))
    if (a.astype(np.float64) @ b.astype(np.float64) != (a @ b).astype(np.float64)).any():
        raise UntrustedArithmetic("BLAS: a product of integers below 2**53 is not exact; use another BLAS")
    # rows of very different sizes stay apart in a classical product, not in Strassen's nor in fixed point
    x, y = rng.standard_normal((64, 200)), rng.standard_normal((200, 64))
    size = 2.0 ** rng.integers(-200, 200, (64, 1))
    if ((size * x) @ y != size * (x @ y)).any():
        raise UntrustedArithmetic("BLAS: rows of a product disturb one another (emulated float64?); turn that off")
    p, e = two_prod(x[0], y[:, 0])
    exact = [float.fromhex(v.hex()) for v in (x[0] * y[:, 0]).tolist()]
    if (p != exact).any() or (two_sum(p, e)[1] != e).any():
        raise UntrustedArithmetic("float64: products are evaluated in another precision; use another build of NumPy")
