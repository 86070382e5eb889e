"""The gate of the bounds: kernels that round as badly as their Model allows, or at random, stay within the bound.

``python -m tests.check.bounds.gate COUNT`` compares about so many elements of each definition; CI runs a smaller count.
"""

import sys
import time

import numpy as np

from refattn import VARIANTS
from refattn.check.bounds.choices import score_errors
from refattn.check.bounds.expected import exact
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.rounded import HOWS, simulate, simulate_scores, simulate_steps
from refattn.check.inputs.draw import Draw
from refattn.check.inputs.families import cases
from refattn.check.inputs.values import numbers
from refattn.check.model import MODELS, Model, materialised
from refattn.dtypes import FORMATS
from refattn.exact.choosing import candidates, choosers
from refattn.gates import RECURRENT
from refattn.variants import Selected, Steps

TYPES = ("float32", "bfloat16", "float16")
FAMILIES = ("normal", "integers", "peaked", "head_scales", "positive", "shifted", "near_tie", "similar_rows")


def models(dtype):
    """Return the models that a kernel of a type may have."""
    wide = {"flash": MODELS["flash"](dtype), "stored": materialised(dtype)}
    split = Model(weights=dtype, lse="float32", split=7, tile=3)
    narrow = MODELS["tf32" if dtype == "float32" else "float8"](dtype)
    return [*wide.values(), split, narrow, Model(scores=dtype)]


def definitions():
    """Return what is compared, (operator, part): its rows, and of a recurrence its steps, of a choice its scores."""
    found = [(n, "rows") for n in VARIANTS]
    found += [(n, "steps") for n, v in VARIANTS.items() if isinstance(v.shape, Steps)]
    return found + [(n, "scores") for n, v in VARIANTS.items() if isinstance(v.shape, Selected)]


def problem(variant, rng):
    """Draw a call: a case of the operator with other numbers, or other sizes without options but those it needs."""
    v, d = VARIANTS[variant], Draw(FORMATS[str(rng.choice(TYPES))], rng, variant)
    usual = [c for c in cases(variant) if not c.dtypes and "past-16" not in c.name and c.family != "poison"]
    if rng.random() < 0.5:
        return usual[rng.integers(len(usual))].build(d)
    while True:
        b, h, n_q, n_k, width = (int(rng.integers(1, n)) for n in (2, 3, 12, 90, 40))
        n_k = n_q if isinstance(v.shape, Steps) else n_k  # each token brings a query and a key
        q, k, value = numbers(str(rng.choice(FAMILIES)), d, (b, h, n_q, width), (b, h, n_k, width), (b, h, n_k, width))
        more: dict = {"causal": "bottom_right"} if "causal_bottom_right" in v.always else {}
        more |= {n: True for n in RECURRENT if n in v.always or (n in v.uses and rng.random() < 0.5)}
        p = d.problem(n_q, n_k, b=b, h=h, d=width, q=q, k=k, v=value, options=v.fitted({}, h), **more)
        if v.takes(p):
            return p


def judged(definition, p, answer, model, rng):
    """Yield for each way of rounding and array: its name, errors, what is allowed, and which elements are compared."""
    part, shape = definition[1], VARIANTS[definition[0]].shape
    if part == "scores":
        for ones in choosers(p, shape):
            c = candidates(ones[0], shape)
            s, limit = score_errors(ones, shape, c, model)
            for how in HOWS:
                got = simulate_scores(ones, shape, c, model, how, rng)
                yield f"scores {how}", np.abs(got - s), limit, np.isfinite(limit) & np.isfinite(got)
        return
    limits, forms = bounds(answer, model), {"out": p.dtype, "lse": model.lse, "state": model.accumulator}
    for how in HOWS:
        steps = part == "steps"
        found = simulate_steps(p, shape, model, how, rng) if steps else simulate(answer.call, model, how, rng)
        for name, got in found.items():
            e, form, limit = answer.enclosures[name], FORMATS[forms[name]], limits[name]
            # past the type's range a right kernel gives inf, which the table of what passes allows
            seen = np.isfinite(e.mid) & (np.abs(e.mid) + limit < form.largest) & np.isfinite(got)
            yield f"{name} {how}", e.error(got), limit, seen


def compared(definition, rng):
    """Compare one drawn call under every model and way of rounding; return how many elements, and those past."""
    p = problem(definition[0], rng)
    answer = None if definition[1] == "scores" else exact(p)
    count, past = 0, []
    for model in models(p.dtype):
        with np.errstate(all="ignore"):
            for what, error, limit, seen in judged(definition, p, answer, model, rng):
                count += int(seen.sum())
                wrong = np.argwhere(seen & ~(error <= limit))
                past += [(definition, p, model, what, tuple(map(int, at))) for at in wrong[:1]]
    return count, past


def run(count, seed=0, names=None):
    """Compare until each definition has so many elements; return counts and seconds by it, and what is past."""
    rng, found, past = np.random.default_rng(seed), {}, []
    for definition in names or definitions():
        start, n = time.perf_counter(), 0
        while n < count:
            more, wrong = compared(definition, rng)
            n += more
            past += wrong
        found[definition] = n, time.perf_counter() - start
    return found, past


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10**6
    found, past = run(count)
    for definition, (n, seconds) in found.items():
        wrong = sum(x[0] == definition for x in past)
        print(f"{' '.join(definition)}: {n} elements, {wrong} past their bound, {seconds:.1f} s")
    for x in past[:5]:
        print(x)
    sys.exit(bool(past))


if __name__ == "__main__":
    main()
