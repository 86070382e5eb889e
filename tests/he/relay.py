"""An encoder that computes next to nothing, in a small ring: what its messages do is what an encoder's do."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from refattn.he.encoder import Encoder
from refattn.he.encoder_plan import EncoderPlan
from refattn.he.layout import Layout
from refattn.he.noise import Ring

RING = Ring(8192, 52, 40, 60, 2)
LIMBS = ((3, 2, 0), (3, 2, 3), (3, 3, 2))
FACTORS = ((1.0, 1.0), (0.3, 0.25), (-0.7, 0.125))


def plan(rounds=2, queries=4, **more):
    layout = Layout(4096, 4, 2 * queries, 2, 1, queries, 2)
    given = {"out_factor": 1.0, "levels": {}, "counts": Counter(), "rotations": (1,), "upload": "full"} | more
    return EncoderPlan(
        3, 5, 2, 0, RING, layout, 2, 2, LIMBS[:rounds], FACTORS[:rounds], 1e-3, given["out_factor"], given["levels"],
        given["counts"], given["rotations"], given["upload"],
    )  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Adds up what it gets, and multiplies the sum with itself until one prime is left."""

    last: bool
    parts: int

    def compute(self, m: Any, shared: Any, parts: Any) -> list[Any]:
        total = parts[0]
        for x in parts[1:]:
            total = m.add(total, x)
        if not self.last:
            return [total, *parts[1 : 2 * self.parts]]
        total = m.rescale(m.relinearize(m.square(total)))
        return [total, *(m.negate(total) for _ in range(1, self.parts))]


class Relay(Encoder):
    """Blocks that are none; with `queries` below 4 the tokens come in parts of so many."""

    def __init__(self, rounds: int = 2, upload: str = "full", queries: int = 4) -> None:
        self.plan = plan(rounds, queries, upload=upload)
        parts = self.plan.query_parts
        self.stages = tuple(Block(k == rounds - 1, parts) for k in range(rounds))  # type: ignore[assignment]
