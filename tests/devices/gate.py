"""Rings of 2 and 4 ranks in every layout: ``python -m tests.devices.gate [short] [RANKS ...]``, minutes.

With ``short`` in front on one small call, which on two cores 4 ranks get through in about two minutes. With ``nccl`` in
place of the numbers, a short run on as many GPUs as there are, up to 4; on one, ours alone.

Ours and PyTorch's must pass on every call, each planted bug must be caught on each layout where it is one, and a rank
that waits for nobody, inside a collective, must be ended. Prints a row for each.
"""

import sys
import time

import numpy as np

from refattn import KernelError, Problem
from refattn.devices.context_parallel import _cases, _merging, judged_ranks
from refattn.devices.ranks import Ranks, function_of
from refattn.devices.shards import LAYOUTS

from . import rings

KNOWN = {"tests.peers.torch_ring:ring": {"out"}, "tests.peers.torch_ring:ring_by_all_to_all": {"out"}}
"""What PyTorch's merge is known to lose, on some calls (docs/devices.md)."""
RIGHT = ("refattn.devices.ring:ring", "refattn.devices.tree:tree", *KNOWN)


def calls(size, short=False):
    """The drawn calls of several seeds, and some of other shapes; or one of 4 rows to a rank."""
    if short:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, h, 4 * size, 8)).astype(np.float32) for h in (4, 2, 2))
        yield "small", Problem(q, k, v, causal="bottom_right")
        return
    for seed in range(3):
        for label, p in _cases(None, size, "zigzag", seed).items():
            yield f"{label}-{seed}", p
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 8 * size, d)).astype(np.float32) for d in (8, 8, 8))
    yield "scale", Problem(q, k, v, scale=2.0, causal="bottom_right")
    yield "wide", Problem(q, k * np.float32(8), v * np.float32(2.0**20), causal="bottom_right")


def waits_for_nobody(shard):
    import torch
    from torch import distributed

    if shard.rank == 0:
        distributed.recv(torch.empty(1), 1)
    return {"out": shard.query} if shard.rank else {}


def main(sizes, short=False):
    failed = 0

    def row(good, *text):
        nonlocal failed
        failed += not good
        print("ok  " if good else "BAD ", *text, flush=True)

    for size in sizes:
        with Ranks(size, seconds=120) as ranks:
            for name in RIGHT:
                sent = function_of(name)[1]
                for layout in LAYOUTS:
                    worst, ran = {}, 0
                    for label, p in calls(size, short):
                        for c in judged_ranks(ranks, sent, p, layout, _merging(p, size, layout)):
                            ran += c.verdict != "unsupported"
                            for w in c.arrays:
                                worst[w.array] = max(worst.get(w.array, (0.0, "")), (w.ratio, label))
                    said = ", ".join(f"{n} {x:.3g} ({label})" for n, (x, label) in worst.items()) or "refused"
                    past = {n for n, (x, _) in worst.items() if x > 1}
                    row(past <= KNOWN.get(name, set()), size, name, layout, f"{ran} checks, error/bound:", said)
            for name in rings.EDITS:
                sent = function_of(f"tests.devices.rings:{name}")[1]
                for layout in LAYOUTS:
                    _, p = next(calls(size, short))
                    found = judged_ranks(ranks, sent, p, layout, _merging(p, size, layout))
                    wrong = sorted({w.array for c in found for w in c.arrays if not w.passed})
                    row(bool(wrong), size, name, layout, "wrong:", *wrong)
        start = time.monotonic()
        try:
            with Ranks(size, seconds=20 * size) as ranks:  # the start of the processes included
                p = _cases(None, size, "contiguous", 0)["gaussian"]
                judged_ranks(ranks, function_of(waits_for_nobody)[1], p, "contiguous", _merging(p, size, "contiguous"))
            row(False, size, "a hang was not told")
        except KernelError as e:
            row("rank 0 of" in str(e) and time.monotonic() - start < 20 * size + 10, size, e)
    return failed


def nccl(size):
    """Ring and tree, causal zig-zag, forward and backward, each option alone, planted bugs; PyTorch's own is shown."""
    p, failed = _cases(None, size, "zigzag", 0), 0
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, h, 512, 64)).astype(np.float32) for h in (2, 1, 1))
    p |= {"longer": Problem(q, k, v, causal="bottom_right")}
    bugs = [f"tests.devices.rings:{n}" for n in (*rings.EDITS, "unweighed")]
    with Ranks(size, "nccl", seconds=40) as ranks:
        for name in (*RIGHT[:2], *bugs, "tests.peers.torch_ring:whole"):
            if size < 2 and name not in RIGHT[:2]:  # most bugs are between ranks, and PyTorch's takes no mesh of one
                print("not run", name, "needs two ranks", flush=True)
                continue
            for label, call in p.items():
                if name in bugs and label != "gaussian":
                    continue
                try:
                    checks = judged_ranks(ranks, function_of(name)[1], call, "zigzag", _merging(call, size, "zigzag"))
                except KernelError as e:
                    print("raised", name, label, e, flush=True)
                    break
                worst = {w.array: max(x.ratio for c in checks for x in c.arrays if x.array == w.array)
                    for w in checks[0].arrays}  # fmt: skip
                said = {c.verdict for c in checks}
                good = said == ({"passed"} if name in RIGHT else {"failed"} if name in bugs else said)
                failed += not good
                print("ok  " if good else "BAD ", size, name, label, *said, {n: f"{x:.3g}" for n, x in worst.items()},
                    checks[0].message if "unsupported" in said else "", flush=True)  # fmt: skip
    return failed


if __name__ == "__main__":
    from tests.devices import gate  # functions under a name that ranks find

    if sys.argv[1:] == ["nccl"]:
        import torch

        sys.exit(bool(gate.nccl(min(4, torch.cuda.device_count()))))
    short = sys.argv[1:2] == ["short"]
    sys.exit(bool(gate.main([int(x) for x in sys.argv[1 + short :]] or [2, 4], short)))
