"""What arrives over HTTP: bodies with the most bytes that they may have, a least rate, and a bound on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["Bodies", "Refused"]

GRACE = 10.0
"""Seconds that a body may take before its rate counts."""
IDLE = 10.0
"""Seconds that may pass without a byte of it."""
LEAST_RATE = 2.0**16
"""Bytes a second, on average, that it must have."""


class Refused(Exception):
    """A status and a text for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Bodies:
    """Reads bodies; all that are in memory together have a bound.

    A slow or stalled one costs the bytes that it has sent and a few seconds, and no place that others wait for.

    Parameters
    ----------
    most : int
        The most bytes of all bodies that are in memory at once.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @asynccontextmanager
    async def read(self, request: Any, most: int) -> AsyncIterator[bytes]:
        """Give a request's body; one that is too long, or too slow, is not read to its end.

        Parameters
        ----------
        request : starlette.requests.Request
            Whose.
        most : int
            The most bytes that it may have.

        Raises
        ------
        Refused
            It has more, comes too slowly, or there is no room for it now; or its sender has left.
        """
        said = request.headers.get("content-length", "0")
        if not (said.isascii() and said.isdecimal() and len(said) < 20) or int(said) > most:
            raise Refused(413, f"the body says it has {said[:20]} bytes, expected at most {most}")
        parts: list[bytes] = []
        size = 0
        try:
            async for part in _in_time(request.stream().__aiter__()):
                size += len(part)
                if size > most:
                    raise Refused(413, f"the body has more than {most} bytes")
                if self.held + len(part) > self.most:
                    raise Refused(503, f"the server holds {self.most} bytes of others' messages and no more; try later")
                self.held += len(part)
                parts.append(part)
            yield b"".join(parts)
        finally:
            self.held -= sum(map(len, parts))


async def _in_time(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a stream's parts while they keep to the least rate."""
    from starlette.requests import ClientDisconnect

    now = asyncio.get_running_loop().time
    start, size = now(), 0
    while True:
        end = min(now() + IDLE, start + GRACE + size / LEAST_RATE)
        try:
            async with asyncio.timeout_at(end):
                part = await anext(stream)
        except StopAsyncIteration:
            return
        except ClientDisconnect as e:  # nobody reads this, and the log need not hold where it was noticed
            raise Refused(400, f"the sender left after {size} bytes of the body") from e
        except TimeoutError as e:
            raise Refused(
                408,
                f"the body came too slowly: {size} bytes in {now() - start:.0f} s; send it at {LEAST_RATE:.0f} bytes/s",
            ) from e
        size += len(part)
        yield part
