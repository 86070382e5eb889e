"""Indexes of keys by inner product: exact, faiss's, and a graph that training queries shape (RoarGraph)."""

from __future__ import annotations

import heapq
import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import axes, whole
from .parts import numbers

__all__ = ["FaissIndex", "FlatIndex", "Index", "RoarGraph"]

Array = NDArray[Any]


class Index(Protocol):
    """What retrieval asks of an index."""

    def search(self, queries: Array, k: int) -> Array:
        """Return for (n, d) queries the places (n, k) of keys with large inner products; -1 where it found fewer."""


def _best(scores: Array, k: int) -> Array:
    """Return the places of the k largest scores, in descending order, the lower place where equal."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


class FlatIndex:
    """The exact index: every key is scanned, in float64; of equal products the lower place comes first.

    Parameters
    ----------
    keys : (n, d) float array
    """

    def __init__(self, keys: Any) -> None:
        self.keys = numbers("keys", keys)
        axes("keys", self.keys, "keys", "features")

    def search(self, queries: Any, k: int) -> Array:
        """Return the places (n, k) of the k keys with the largest inner products, the largest first."""
        queries = numbers("queries", queries)
        axes("queries", queries, "queries", self.keys.shape[1])
        return _best(queries @ self.keys.T, whole("k", k, 1, len(self.keys)))


class FaissIndex:
    """An index of faiss by inner product.

    Parameters
    ----------
    keys : (n, d) float array
        Rounded to float32, which faiss computes in.
    kind : {"hnsw", "ivf"}
        A navigable graph, or cells around k-means' centroids.
    links : int
        HNSW: neighbours of a node.
    cells : int, optional
        IVF: how many; None is about the square root of n.
    effort : int
        HNSW: efSearch; IVF: nprobe, the cells that are scanned.

    Raises
    ------
    InvalidInput
        faiss is not installed; another kind.
    """

    def __init__(
        self, keys: Any, *, kind: str = "hnsw", links: int = 32, cells: int | None = None, effort: int = 16
    ) -> None:
        if kind not in ("hnsw", "ivf"):
            raise InvalidInput(f"kind: got {kind!r}, expected 'hnsw' or 'ivf'")
        try:
            faiss: Any = importlib.import_module("faiss")
        except ModuleNotFoundError as e:
            raise InvalidInput("faiss: is not installed; pip install faiss-cpu, or use FlatIndex") from e
        keys = numbers("keys", keys).astype(np.float32)
        axes("keys", keys, "keys", "features")
        n, d = keys.shape
        if kind == "hnsw":
            self.index = faiss.IndexHNSWFlat(d, whole("links", links, 2), faiss.METRIC_INNER_PRODUCT)
            self.counts, self.cells = faiss.cvar.hnsw_stats, 0
        else:
            cells = whole("cells", round(n**0.5) if cells is None else cells, 1, n)
            self.centres = faiss.IndexFlatIP(d)  # faiss does not keep it
            self.index = faiss.IndexIVFFlat(self.centres, d, cells, faiss.METRIC_INNER_PRODUCT)
            self.index.cp.min_points_per_centroid = 1  # faiss warns of few
            self.index.train(keys)
            self.counts, self.cells = faiss.cvar.indexIVF_stats, cells
        self.index.add(keys)
        self.effort = whole("effort", effort, 1)

    def search(self, queries: Any, k: int) -> Array:
        """Return the places (n, k) that faiss finds, -1 where it finds fewer."""
        return self.scan(queries, k)[0]

    def scan(self, queries: Any, k: int) -> tuple[Array, float]:
        """Return :meth:`search` and the inner products with keys that a query took, by faiss's own count."""
        queries = numbers("queries", queries).astype(np.float32)
        axes("queries", queries, "queries", self.index.d)
        k = whole("k", k, 1, self.index.ntotal)
        if self.cells:
            self.index.nprobe = min(self.effort, self.cells)
        else:
            self.index.hnsw.efSearch = max(self.effort, k)
        self.counts.reset()
        found = self.index.search(queries, k)[1]
        return found, self.counts.ndis / len(queries) + self.cells


class RoarGraph:
    """A graph of keys whose edges follow which keys training queries have in common, searched by beam.

    A training query's nearest key takes the query's other near keys as candidates. The occlusion rule keeps a candidate
    c, the nearest first, iff no kept s is nearer to c than x is: ``c·s < c·x`` for every kept s; where fewer than
    `degree` are kept the nearest dropped ones fill up. Edges are reversed and pruned again. Then every key is searched
    for from the entry, and what the search meets are more candidates, so that the entry reaches them.

    Parameters
    ----------
    keys : (n, d) float array
    training : (m, d) float array
        Queries of the distribution that will be searched for.
    near : int
        Nearest keys of a training query.
    degree : int
        Edges that a key keeps.
    beam : int
        Width of the search that connects.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    The distance is minus the inner product. The entry is the medoid: the key nearest to the mean. Source: Chen et al.,
    RoarGraph (arXiv 2408.08933; recalled), parameters as its public code has them (read): 100 near keys, 35 edges, beam
    500.
    """

    def __init__(self, keys: Any, training: Any, *, near: int = 100, degree: int = 35, beam: int = 500) -> None:
        self.keys, training = numbers("keys", keys), numbers("training", training)
        axes("keys", self.keys, "keys", "features")
        axes("training", training, "queries", self.keys.shape[1])
        n = len(self.keys)
        self.degree, beam = whole("degree", degree, 1), whole("beam", beam, 1)
        self.entry = int(_best(-((self.keys - self.keys.mean(0)) ** 2).sum(1), 1)[0])
        candidates: list[set[int]] = [set() for _ in range(n)]
        for row in _best(training @ self.keys.T, min(whole("near", near, 2), n)):
            candidates[row[0]].update(map(int, row[1:]))
        self.edges = [self._pruned(x, c, self.degree) for x, c in enumerate(candidates)]
        self._reverse()
        for x in range(n):
            _, seen = self._walk(self.keys[x], beam)
            candidates[x] = seen | set(self.edges[x])
        self.edges = [self._pruned(x, c, self.degree) for x, c in enumerate(candidates)]
        self._reverse()
        self._connect()

    def _pruned(self, x: int, candidates: set[int], degree: int) -> list[int]:
        places = np.array(sorted(candidates - {x}), dtype=int)
        if not len(places):
            return []
        places = places[_best(self.keys[places] @ self.keys[x], len(places))]
        products = self.keys[places] @ self.keys[places].T
        to_x = self.keys[places] @ self.keys[x]
        kept: list[int] = []
        for c in range(len(places)):
            if len(kept) == degree:
                break
            if (products[c, kept] < to_x[c]).all():
                kept.append(c)
        fill = [c for c in range(len(places)) if c not in kept][: degree - len(kept)]
        return [int(places[c]) for c in kept + fill]

    def _reverse(self) -> None:
        """Give every edge its reverse; a key with more than its degree is pruned again."""
        back: list[set[int]] = [set(e) for e in self.edges]
        for x, e in enumerate(self.edges):
            for y in e:
                back[y].add(x)
        self.edges = [
            self._pruned(x, b, self.degree) if len(b) > self.degree else sorted(b) for x, b in enumerate(back)
        ]

    def reached(self) -> set[int]:
        """Return the keys that edges lead to from the entry."""
        seen, todo = {self.entry}, [self.entry]
        while todo:
            new = set(self.edges[todo.pop()]) - seen
            seen |= new
            todo += new
        return seen

    def _connect(self) -> None:
        """Give every key that cannot be reached an edge from the reached key that is nearest to it."""
        seen = self.reached()
        for x in range(len(self.keys)):
            if x not in seen:
                places = np.array(sorted(seen))
                self.edges[int(places[_best(self.keys[places] @ self.keys[x], 1)[0]])].append(x)
                seen = self.reached()

    def _walk(self, query: Array, beam: int) -> tuple[list[tuple[float, int]], set[int]]:
        """Return the beam's keys as (-product, place), the nearest first, and all keys whose product was computed."""
        first = (-float(self.keys[self.entry] @ query), self.entry)
        seen, todo, best = {self.entry}, [first], [(-first[0], -first[1])]
        while todo:
            distance, x = heapq.heappop(todo)
            if len(best) == beam and distance > -best[0][0]:
                break
            new = [y for y in self.edges[x] if y not in seen]
            seen.update(new)
            for y, product in zip(new, self.keys[new] @ query if new else (), strict=True):
                if len(best) < beam or product > best[0][0]:
                    heapq.heappush(todo, (-float(product), y))
                    heapq.heappush(best, (float(product), -y))
                    if len(best) > beam:
                        heapq.heappop(best)
        return sorted((-p, -y) for p, y in best), seen

    def scan(self, queries: Any, k: int, *, beam: int | None = None) -> tuple[Array, float]:
        """Return :meth:`search` by a beam of some width (None: k), and the inner products that a query took."""
        queries = numbers("queries", queries)
        axes("queries", queries, "queries", self.keys.shape[1])
        k = whole("k", k, 1, len(self.keys))
        beam = k if beam is None else whole("beam", beam, k)
        found, scanned = np.full((len(queries), k), -1), 0
        for row, query in zip(found, queries, strict=True):
            best, seen = self._walk(query, beam)
            row[: min(k, len(best))] = [y for _, y in best[:k]]
            scanned += len(seen)
        return found, scanned / len(queries)

    def search(self, queries: Any, k: int) -> Array:
        """Return the places (n, k) of keys with large inner products; -1 where it found fewer."""
        return self.scan(queries, k)[0]
