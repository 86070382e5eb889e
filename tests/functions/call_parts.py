"""What valid calls of functions are made of: small arrays, masks, graphs, mixtures, a memory, functions."""

import numpy as np
import torch

from refattn.functions.costs.decoding import Decoder
from refattn.functions.hashing import Hash
from refattn.functions.memory import start_memory


def some(*shape):
    """Return numbers in (0, 1), none twice."""
    return (np.random.default_rng(len(shape)).permutation(int(np.prod(shape))).reshape(shape) + 1.0) / (
        np.prod(shape) + 1
    )


def ints(*numbers):
    return np.array(numbers)


def tensor(*shape):
    return torch.asarray(some(*shape))


def drawer():
    rng = np.random.default_rng(0)
    return lambda n: rng.integers(n, size=2)


def generator():
    return torch.Generator().manual_seed(0)


def mixture(k=2, d=1, make=np.asarray, lead=()):
    covariances = np.broadcast_to(np.eye(d), (*lead, k, d, d)).copy()
    return make(some(*lead, k) / 2), make(some(*lead, k, d)), make(covariances)


SEEN, EYE = np.tri(4, dtype=bool), np.eye(4)
Q, K, V = some(1, 4, 4, 6), some(1, 2, 4, 6), some(1, 2, 4, 5)
TQ, TK, TV = (torch.asarray(x) for x in (Q, K, V))
FEW = (some(1, 2, 4, 6), K, V)
ROW = (some(4, 6), some(4, 6), some(4, 5))
CODES = np.where(some(2, 4, 3) > 0.5, 1.0, -1.0)
GRAPH = (ints(0, 2, 4, 6), ints(1, 2, 0, 2, 0, 1))
SQUARE = some(1, 2, 3, 3)
BASES = np.eye(4)[None, :, :2]
ROWS = some(3, 4)
MEMORY = start_memory(some(4, 4), some(4, 4))
GATES = {"theta": some(3), "eta": some(3), "alpha": some(3), "chunk": 2, "grad_at": "current"}
MODEL = Decoder(1000, 2, 4, 2, 8)
HASH = Hash(some(2, 5, 6), some(2, 5), some(2, 3, 5))
BANDIT = (some(5, 2), some(5), some(3, 2))
LATENT = {
    "query": some(1, 2, 3, 4),
    "query_rope": some(1, 2, 3, 2),
    "latent": some(1, 5, 6),
    "key_rope": some(1, 5, 2),
    "w_uk": some(2, 4, 6),
    "scale": 0.5,
}
OBSERVED = {"z": some(2, 1), "H": np.ones((1, 1)), "R": np.ones((1, 1))}
MIXED = {"weights": mixture()[0], "means": mixture()[1], "covariances": mixture()[2]}
VISITS, SIZES = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 1]]), (2, 2, 2)
FIELD = {"sinks": 1, "local": 1}
PROJECTION = np.array([[100.0, 0, 4, 0], [0, 100.0, 4, 0], [0, 0, 1, 3]])


def message(*parts):
    return parts[-1]


LAYER = {
    "to_virtual": message,
    "from_virtual": lambda x, virtual: x,
    "along_edges": message,
    "update_virtual": lambda virtual, said: virtual,
    "update": lambda x, told, near: x,
    "aggregate_virtual": lambda x: x.sum(0),
    "aggregate": lambda x: x.sum(0),
}


def uniform(tokens):
    return np.full((len(tokens), 4), 0.25)
