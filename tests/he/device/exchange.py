"""What a client and SEAL's server say to each other, once for each plan; and what SEAL makes of bytes."""

from functools import cache

import numpy as np

from refattn import he
from refattn.he import seal, wire
from refattn.he.device.chain import chain_of
from refattn.he.device.format import read_ciphertext, read_keys, whole
from refattn.he.noise import Ring
from refattn.he.seal import galois_elements

from .. import make_sigmoid
from ..forge import body
from ..make import planned, problem

__all__ = ["PLANS", "SMALL", "Exchange", "Setup", "exchange", "setup"]

PLANS = {
    "the server divides": ((2, 2, 2), {}),
    "whole, several heads": ((2, 2, 2), {"heads": 2, "normalize": "client", "upload": "whole"}),
    "compact, p = 4": ((4, 4, 4), {"p": 4, "normalize": "client", "upload": "compact"}),
    "a slot is an input": ((1, 2, 2), {"normalize": "client", "mode": "throughput"}),
    "sigmoid, several heads, causal": ((3, 3, 4), {"heads": 2, "tolerance": 0.3}),
}


class Exchange:
    """A program's keys, a query and SEAL's reply, as bytes."""

    def __init__(self, program, x):
        self.program, self.plan, self.x = program, program.plan, x
        self.client = he.Client(self.plan)
        self.keys = self.client.evaluation_keys()
        self.query = self.client.encrypt(x)
        with he.Server(program, self.keys) as server:
            self.reply = server.attend(self.query)

    def parts(self, message, kind):
        return wire.unpack(message, kind, self.plan.digest, 2**40).parts

    @property
    def chain(self):
        return chain_of(self.plan.ring)

    def given_words(self):
        """Return the keys by element, and the query's ciphertexts."""
        relin, galois = self.parts(self.keys, wire.KEYS)
        elements = galois_elements(self.plan.ring, self.plan.rotations)
        keys = {0: read_keys("RelinKeys", relin, self.chain, [0])[0]}
        found = read_keys("GaloisKeys", galois, self.chain, [(e - 1) // 2 for e in elements])
        keys |= {2 * i + 1: x for i, x in found.items()}
        parts = zip(self.parts(self.query, wire.QUERY), self.plan.part_limbs(), strict=True)
        seeded, scale = self.plan.upload != "whole", 2.0**self.plan.ring.middle
        cts = [whole(read_ciphertext(x, self.chain, n, scale, seeded), self.chain) for x, n in parts]
        return {e: np.stack([whole(d, self.chain) for d in x]) for e, x in keys.items()}, cts

    def replied_words(self, outs, parts=None):
        parts = self.parts(self.reply, wire.REPLY) if parts is None else parts
        return [read_ciphertext(x, self.chain, o.limbs, o.scale, False).words for x, o in zip(parts, outs, strict=True)]


@cache
def exchange(name):
    sizes, more = PLANS[name]
    more = dict(more)
    if name.startswith("sigmoid"):
        x = make_sigmoid.call(*sizes, heads=more.pop("heads"), causal="top_left")
        return Exchange(make_sigmoid.planned(x, **more), x)
    x = problem(*sizes, heads=more.pop("heads", 1), p=more.pop("p", 2), epsilon=1.0)
    plan = planned(x, **more)
    return Exchange(plan, x)


class Setup:
    """SEAL's keys and ciphertexts of a ring, and their words."""

    def __init__(self, ring, rotations):
        self.ring, self.chain, s = ring, chain_of(ring), seal.api()
        made = seal.context(ring)
        generator, public = s.KeyGenerator(made), s.PublicKey()
        generator.create_public_key(public)
        self.encryptor = s.Encryptor(made, public, generator.secret_key())
        self.encoder = s.CKKSEncoder(made)
        self.saved = {
            "RelinKeys": seal.to_bytes(generator.create_relin_keys()),
            "GaloisKeys": seal.to_bytes(generator.create_galois_keys(galois_elements(ring, rotations))),
        }
        loaded = {n: seal.from_bytes(n, ring, x) for n, x in self.saved.items()}
        self.seal = seal.Sealed(ring, loaded["RelinKeys"], loaded["GaloisKeys"])
        self.indices = {
            "RelinKeys": [0],
            "GaloisKeys": [(e - 1) // 2 for e in galois_elements(ring, rotations)],
        }
        self.keys = {}
        for name, saved in self.saved.items():
            for i, digits in read_keys(name, saved, self.chain, self.indices[name]).items():
                self.keys[0 if name == "RelinKeys" else 2 * i + 1] = np.stack([whole(x, self.chain) for x in digits])

    def encrypted(self, seed, limbs):
        rng = np.random.default_rng(seed)
        slots = rng.standard_normal(self.ring.slots) + 1j * rng.standard_normal(self.ring.slots)
        plain = seal.encode(self.encoder, slots, self.ring, limbs)
        return seal.from_bytes("Ciphertext", self.ring, seal.to_bytes(self.encryptor.encrypt_symmetric(plain)))

    def words(self, x):
        data = body(seal.to_bytes(x))
        shape = (x.size(), x.coeff_modulus_size(), self.ring.degree)
        return np.frombuffer(data[-8 * int(np.prod(shape)) :], np.uint64).reshape(shape)


SMALL = Ring(8192, 43, 30, 60, 2)


@cache
def setup():
    return Setup(SMALL, [1, 5])
