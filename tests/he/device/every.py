"""A program of every operation, in a ring of any degree: the least that a plan or a layer could be."""

from dataclasses import dataclass, field

import numpy as np

from refattn.he.linear import Plain
from refattn.he.noise import Ring

__all__ = ["RINGS", "Every"]

RINGS = {8192: Ring(8192, 43, 30, 60, 2), 16384: Ring(16384, 53, 48, 60, 4), 32768: Ring(32768, 53, 45, 60, 3)}


@dataclass(frozen=True, eq=False)
class Every:
    """A plan and its program in one, of queries of three ciphertexts."""

    ring: Ring
    upload: str = "full"
    rotations: tuple[int, ...] = (1, 3)
    digest: bytes = bytes(32)
    plain: Plain = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng(3)
        numbers = rng.standard_normal(self.ring.slots) + 1j * rng.standard_normal(self.ring.slots)
        object.__setattr__(self, "plain", Plain(numbers))

    @property
    def plan(self):
        return self

    def part_limbs(self):
        top = self.ring.levels + 1
        return [top, top, top - 1]

    def tasks(self, parts):
        return [((), parts)]

    def compute(self, m, shared, parts):
        a, b, c = parts
        product = m.dot([a, b], [c, c])  # of two levels
        d = m.add(c, c)
        for second in (*2 * ([c, d], [d, c], [d, d]), [c, d]):  # seven sums with one first operand: four and three
            product = m.add(product, m.dot([a, b], second))
        square = m.rescale(m.relinearize(m.square(c)))
        once = m.rotate(product, 1)
        turned = m.add(once, m.rotate(product, 3))
        both = m.add(product, once)  # of which one is used elsewhere, too
        total = m.add(m.add(turned, m.conjugate(square)), product)
        three = m.rescale(m.mul(a, m.add(a, c)))
        scaled = m.rescale(m.times_constant(m.add_constant(m.negate(c), 0.37), -0.2))
        plain = m.plus(m.rescale(m.times(a, self.plain)), self.plain)
        last = m.like(c, product)  # of product's scale, a level below
        return [m.relinearize(m.add(three, three)), total, both, scaled, plain, m.add(last, m.conjugate(last))]
