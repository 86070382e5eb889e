"""How good the checker is: planted bugs caught, right runs failed, sharpness of the bound, what other rules accept.

Floor: a checker that catches everything and fails nothing has 1 and 0. The bound cannot be sharper than the worst a
right kernel meets; the predicted rms is 1 for a kernel whose roundings are independent.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from refattn.arrays import from_float64
from refattn.bench import Row, load
from refattn.check import Capabilities, check_kernel
from refattn.check.bounds.expected import expected
from refattn.check.bugs.edits import BUGS, CLASSES, broken
from refattn.check.call import call_gradients, call_kernel
from refattn.check.compare import against
from refattn.check.diagnose.explain import SIGNATURES
from refattn.check.diagnose.rules import RULES
from refattn.check.diagnose.shrink import shrink
from refattn.check.inputs.families import cases
from refattn.check.kernels.tiled import SPLIT, gradients, tiled
from refattn.check.model import GRADIENTS, Model, flash
from refattn.check.runner import failing, plan
from refattn.dtypes import FORMATS
from refattn.problem import Problem

TYPES = ("float32", "bfloat16")
RUNS, SEEDS = 100, 4
SMALL = 8


def able(dtype: str) -> Capabilities:
    return Capabilities(frozenset({dtype}), lse=True, gradients=GRADIENTS)


@dataclass(frozen=True)
class Caught:
    """What the quick budget says of one planted bug, over both types; ci where that says nothing."""

    quick: bool
    ci: bool
    small: bool
    models: bool
    asked: dict[str, int]
    accepted: dict[str, int]


def caught(name: str) -> Caught:
    """Check one planted bug."""
    accepted, asked, failed = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0), set()
    for dtype in TYPES:
        report = check_kernel(broken(name), capabilities=able(dtype), dtypes=[dtype], budget="quick", seed=0)
        for c in report.failures:
            failed.add(c.name.partition("/")[0])
            if c.rules and any(a.array == "out" and not a.passed for a in c.arrays):
                for rule, said in c.rules.items():
                    asked[rule] += said is not None
                    accepted[rule] += said is True
    ci = bool(failed) or any(
        check_kernel(broken(name), capabilities=able(d), dtypes=[d], seed=0).failures for d in TYPES
    )
    return Caught(bool(failed), ci, bool(failed - {"models", "calls"}), "models" in failed, asked, accepted)


def planted() -> Iterator[Row]:
    """The whole corpus by class and by size of the calls that show it, and what each rule says of the wrong outputs."""
    found = dict(zip(BUGS, Parallel(n_jobs=2)(delayed(caught)(n) for n in BUGS), strict=True))
    n = len(found)
    yield Row(
        f"{n} planted bugs, caught by the ci budget", sum(c.ci for c in found.values()) / n, "share", at_least=1.0
    )
    quick = sum(c.quick for c in found.values()) / n
    yield Row(f"{n} planted bugs, caught by the quick budget", quick, "share", at_least=1.0)
    yield Row(f"{n} planted bugs, shown by small problems", sum(c.small for c in found.values()) / n, "share")
    yield Row(f"{n} planted bugs, shown by models' calls", sum(c.models for c in found.values()) / n, "share")
    for kind in CLASSES:
        of = [c.quick for b, c in found.items() if BUGS[b].kind == kind]
        yield Row(f"class {kind}, {len(of)} bugs, caught by the quick budget", sum(of) / len(of), "share")
    for rule in RULES:
        asked, accepted = (sum(getattr(c, x)[rule] for c in found.values()) for x in ("asked", "accepted"))
        yield Row(f"wrong outputs that {rule} accepts, of {asked}", accepted / max(asked, 1), "share")


def shrunk() -> Iterator[Row]:
    """How small the calls are that planted bugs are shrunk to; those that come and go (class K) are left out."""
    known = json.loads(SIGNATURES.read_text())
    by_name = {c.name: c for c in cases("softmax")}
    small = {n: [c for c in (known["checks"][i] for i in at) if _case(c) in by_name] for n, at in known["bugs"].items()}
    lasting = [n for n, b in BUGS.items() if b.kind != "K" and small[n]]  # others need a call of real size
    sizes = []
    for name in lasting:
        dtype = "bfloat16" if name in known["bfloat16"] else "float32"
        fails = failing(broken(name), flash(dtype), GRADIENTS)
        costly = ("past-16", "extreme", "poison")
        checks = sorted(small[name], key=lambda c: any(x in c for x in costly))
        best = 10**6
        for check in checks[:3]:
            case = by_name[_case(check)]
            p, dout = case.problem(dtype), case.arriving(dtype) if check.endswith("/gradients") else None
            if best > SMALL and fails(p, dout):
                p, _ = shrink(p, dout, fails, 6.0)
                best = min(best, max(p.n_q, p.n_k, p.d_k, p.d_v))
        sizes.append(best)
    for most, why in (
        (SMALL, "n and d of 8"),
        (SPLIT + 1, f"n and d of {SPLIT + 1}, one past the kernel's largest tile"),
    ):
        share = sum(s <= most for s in sizes) / len(sizes)
        yield Row(f"{len(lasting)} lasting planted bugs, shrunk to at most {why}", share, "share")


def _case(check: str) -> str:
    return check.removesuffix("/gradients")


def right_run(name: str, dtype: str) -> tuple[int, float, list[float]]:
    """Run checks of a right kernel drawn from all of ci's, of several seeds; return alarms, worst ratio, rms."""
    kernel, rng = _right().kernels()[name, dtype], np.random.default_rng(zlib.crc32(f"{name} {dtype}".encode()))
    alarms, worst, rms = 0, 0.0, []
    for seed in range(SEEDS):
        items = plan(kernel, dtypes=[dtype], seed=seed)
        for i in rng.choice(len(items), RUNS // SEEDS, replace=False):
            check = items[i].run()
            alarms += check.verdict == "failed"
            worst = max([worst, *(w.ratio for w in check.arrays if w.passed)])
            rms += [w.figures.rms for w in check.arrays if w.figures is not None and w.figures.rms > 0]
    return alarms, worst, rms


def right_runs() -> Iterator[Row]:
    """Right kernels of different algorithms, types and libraries, on cases, laws and calls of real sizes."""
    names = list(_right().kernels())
    found = Parallel(n_jobs=2)(delayed(right_run)(*x) for x in names)
    total = sum(alarms for alarms, _, _ in found)
    yield Row(f"{len(names)} right kernels: false alarms in {RUNS * len(names)} runs", total, "runs", at_most=0.0)
    for (name, dtype), (alarms, worst, rms) in zip(names, found, strict=True):
        yield Row(f"{name}, {dtype}: false alarms in {RUNS} runs", alarms, "runs", at_most=0.0)
        yield Row(f"{name}, {dtype}: largest error ÷ allowed error", worst, "ratio", at_most=1.0)
        if rms:
            yield Row(f"{name}, {dtype}: rms measured/predicted, median", float(np.median(rms)), "ratio")


def _right() -> ModuleType:
    return load("_right")


def _judged(p: Problem, dout: Any, dtype: str, tile: int) -> list[Any]:
    model = Model(flash(dtype).accumulator, dtype, flash(dtype).accumulator, lse=flash(dtype).lse, split=64)
    kernel: Any = partial(tiled, keys=tile)
    known = expected(p, model)
    out = call_kernel(kernel, p).out
    found = [against(known, "out", out, dtype)]
    if dout is not None:
        kernel.gradients = partial(gradients, keys=tile)
        known = expected(p, model, dout)
        for name, x in call_gradients(kernel, p, dout)[0].items():
            found.append(against(known, name, x, x.dtype.name))
    return found


def sharpness() -> Iterator[Row]:
    """Worst error/bound and rms of the tiled kernel as rows grow longer."""
    for n in (64, 1024, 4096):
        for dtype in ("float32", "float16", "bfloat16"):
            rng, form = np.random.default_rng(n), FORMATS[dtype]
            shapes = ((1, 1, 64, 64), (1, 1, n, 64), (1, 1, n, 64), (1, 1, 64, 64))
            q, k, v, g = (from_float64(form.round_array(rng.standard_normal(s)), dtype) for s in shapes)
            for w in _judged(Problem(q, k, v), g, dtype, 64):
                at = f"n={n} {dtype} {w.array}"
                yield Row(f"{at}, worst error/bound", w.ratio, "ratio", at_most=1.0)
                if w.figures is not None:
                    yield Row(f"{at}, rms measured/predicted", w.figures.rms, "ratio", at_most=1.5)


def times() -> Iterator[Row]:
    """Seconds of a whole check of one kernel in one format, exact answers included, once numba has compiled."""
    from refattn.check.bounds.expected import forget

    check_kernel(tiled, capabilities=able("float32"), dtypes=["float32"], budget="quick", seed=0)
    for budget, bound in (("quick", 10.0), ("ci", 60.0)):
        forget()
        start = time.perf_counter()
        check_kernel(tiled, capabilities=able("float32"), dtypes=["float32"], budget=budget, seed=0, n_jobs=2)
        yield Row(
            f"check of one kernel, float32, {budget}, 2 processes", time.perf_counter() - start, "s", at_most=bound
        )


def rows() -> Iterator[Row]:
    yield from times()
    yield from sharpness()
    yield from right_runs()
    yield from shrunk()
    yield from planted()
