"""The gate of the bounds: kernels that round as badly as their Model allows, or at random, stay within the bound.

``python -m tests.check.bounds.gate COUNT`` compares about so many elements of each operator; CI runs a smaller count.
"""

import sys

import numpy as np

from refattn import VARIANTS
from refattn.check.bounds.expected import exact
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.rounded import HOWS, simulate
from refattn.check.inputs.draw import Draw
from refattn.check.inputs.families import cases
from refattn.check.inputs.values import numbers
from refattn.check.model import MODELS, Model, materialised
from refattn.dtypes import FORMATS
from refattn.variants import Rows

TYPES = ("float32", "bfloat16", "float16")
FAMILIES = ("normal", "integers", "peaked", "head_scales", "positive", "shifted", "near_tie", "similar_rows")


def models(dtype):
    """Return the models that a kernel of a type may have."""
    wide = {"flash": MODELS["flash"](dtype), "stored": materialised(dtype)}
    split = Model(weights=dtype, lse="float32", split=7, tile=3)
    return [*wide.values(), split, MODELS["tf32" if dtype == "float32" else "float8"](dtype)]


def operators():
    """Return the operators whose rows run at once; recurrences and choices are tested beside their own forms."""
    return [n for n, v in VARIANTS.items() if isinstance(v.shape, Rows)]


def problem(variant, rng):
    """Draw a call: a case of the operator with other numbers, or other sizes without options."""
    form = FORMATS[str(rng.choice(TYPES))]
    d = Draw(form, rng, variant)
    usual = [c for c in cases(variant) if not c.dtypes and "past-16" not in c.name and c.family != "poison"]
    if rng.random() < 0.5:
        return usual[rng.integers(len(usual))].build(d)
    b, h, n_q, n_k, width = (int(rng.integers(1, n)) for n in (2, 3, 12, 90, 40))
    q, k, v = numbers(str(rng.choice(FAMILIES)), d, (b, h, n_q, width), (b, h, n_k, width), (b, h, n_k, width))
    return d.problem(n_q, n_k, b=b, h=h, d=width, q=q, k=k, v=v)


def compared(variant, rng):
    """Compare one drawn call under every model and way of rounding; return how many elements, and those past."""
    p = problem(variant, rng)
    answer = exact(p)
    count, past = 0, []
    for model in models(p.dtype):
        limit = bounds(answer, model)
        for how in HOWS:
            for name, got in simulate(p, model, how, rng).items():
                e, form = answer.enclosures[name], FORMATS[p.dtype if name == "out" else model.lse]
                with np.errstate(all="ignore"):
                    # past the type's range a right kernel gives inf, which the table of what passes allows
                    seen = np.isfinite(e.mid) & (np.abs(e.mid) + limit[name] < form.largest) & np.isfinite(got)
                    wrong = seen & ~(e.error(got) <= limit[name])
                count += int(seen.sum())
                past += [(variant, p, model, how, name, tuple(map(int, at))) for at in np.argwhere(wrong)[:1]]
    return count, past


def run(count, seed=0, names=None):
    """Compare until each operator has so many elements; return the counts by operator, and what is past its bound."""
    rng, found, past = np.random.default_rng(seed), {}, []
    for variant in names or operators():
        found[variant] = 0
        while found[variant] < count:
            n, wrong = compared(variant, rng)
            found[variant] += n
            past += wrong
    return found, past


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10**6
    found, past = run(count)
    for variant, n in found.items():
        print(f"{variant}: {n} elements, {sum(x[0] == variant for x in past)} past their bound")
    for x in past[:5]:
        print(x)
    sys.exit(bool(past))


if __name__ == "__main__":
    main()
