"""A session's process at the server: a client's keys in it, and limits on what it may take."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import RefattnError
from .bodies import Refused
from .decoding import DecodingServer
from .decoding_plan import DecodingPlan
from .planned import Program
from .processes import limit_memory, pool_of, stop
from .sessions import Server

__all__ = ["Hosted", "memory_of", "seconds_of"]

MOST_ASKED = 2**16
"""Queries of a session: their names are kept, so that none is computed twice."""
CLOSE_SECONDS = 5.0
"""The longest that a process with a GPU may take to write over its memory there."""
BEGIN_SECONDS = 300.0
"""The longest that a process may take to start and to read keys."""


def memory_of(plan: Any) -> int:
    """Return the bytes that a session's process may take: keys and ciphertexts unpacked, thrice, and 2 GiB.

    Of decoding a step's cache stands beside that before it, and the context has its numbers beside its plaintexts.
    """
    ring, operations = plan.ring, plan.counts
    limb = 8 * ring.degree
    keys = (len(plan.rotations) + 2) * (ring.levels + 1) * 2 * (ring.levels + 2) * limb
    query = sum(2 * limbs * limb for limbs in plan.part_limbs())
    plains = sum(c * limbs * limb for (n, limbs), c in operations.items() if n in ("multiply_plain", "add_plain"))
    kept = plan.cache_bytes + 3 * plan.context_bytes if isinstance(plan, DecodingPlan) else 0
    return int(3 * (keys + query + plains + kept) + 2 * (plan.key_bytes + plan.upload_bytes) + 2**31)


def seconds_of(plan: Any) -> float:
    """Return how long a query may be computed: as on a machine a hundred times slower than the planner's, and 60 s."""
    return 60.0 + float(plan.predicted_ms()) / 10


@dataclass
class Hosted:
    """A client's process, and what it has asked.

    Attributes
    ----------
    owner : bytes
        Who opened it.
    used : float
        When it was used last.
    seconds : float
        How long a query may be computed.
    device : str
        Where. What CUDA maps of memory is far more than it uses: there is no limit on a process that has a GPU.
    asked : set of bytes
        Names of its queries.
    running : int
        Queries that wait or run.
    context : (k, v) or None
        Of decoding, what is in the clear.
    """

    program: Program
    owner: bytes
    used: float
    seconds: float
    device: str = "cpu"
    asked: set[bytes] = field(default_factory=set)
    running: int = 0
    context: Any = None

    def __post_init__(self) -> None:
        limit = () if self.device == "cuda" else (limit_memory, memory_of(self.program.plan))
        self._pool = pool_of(1, *limit)
        self._turn = asyncio.Lock()

    def close(self) -> None:
        """End the process; what it computes is of nobody any more. A GPU's memory is written over before."""
        if self.device == "cuda":
            threading.Thread(target=_end, args=(self._pool,)).start()
        else:
            stop(self._pool)

    async def begin(self, keys: bytes) -> None:
        """Give the process a client's keys; they are looked at there."""
        await self._call(BEGIN_SECONDS, _begin, self.program, keys, self.device, self.context)

    async def attend(self, query: bytes) -> bytes:
        """Return the reply to a query, one at a time; the query is looked at in the process."""
        async with self._turn:
            return bytes(await self._call(self.seconds, _attend, query))

    async def drop(self) -> None:
        """Forget the cache of a sequence that is decoded, after the tokens that wait."""
        async with self._turn:
            await self._call(self.seconds, _drop)

    async def _call(self, seconds: float, call: Any, *given: Any) -> Any:
        """Return what the process does; whatever goes wrong there but for a refusal ends the session.

        Raises
        ------
        Refused
            The process ended, took too long or too much memory, or failed; it is ended then.
        """
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(self._pool.submit(call, *given))
        except RefattnError:  # it refuses what it was given
            raise
        except BrokenProcessPool as e:
            self.close()
            raise Ended(500, "the session's process ended; open another session") from e
        except TimeoutError as e:
            self.close()
            raise Ended(504, f"it took longer than {math.ceil(seconds)} s; the session was ended") from e
        except MemoryError as e:
            self.close()
            raise Ended(413, "it needs more memory than a session may take; the session was ended") from e
        except Exception as e:
            self.close()
            raise Ended(500, f"the session's process failed ({type(e).__name__}); open another session") from e


class Ended(Refused):
    """A refusal that ends the session."""


_HERE: dict[str, Server | DecodingServer] = {}
"""The server of a session's process."""


def _begin(program: Any, keys: bytes, device: str, context: Any) -> None:
    if isinstance(program, DecodingPlan):
        _HERE["server"] = DecodingServer(program, keys, context, device)
    else:
        _HERE["server"] = Server(program, keys, device=device)


def _close() -> None:
    if "server" in _HERE:
        _HERE.pop("server").close()


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool whose process has a GPU: it is given some seconds to write over what is there."""
    with suppress(Exception):  # it has ended, or does not answer
        pool.submit(_close).result(CLOSE_SECONDS)
    stop(pool)


def _attend(query: bytes) -> bytes:
    server = _HERE["server"]
    return server.step(query) if isinstance(server, DecodingServer) else server.attend(query)


def _drop() -> None:
    server = _HERE["server"]
    if isinstance(server, DecodingServer):
        server.drop()
