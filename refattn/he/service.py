"""A server over HTTP: sessions that expire, limits on sizes, rates, memory and time, a process for each client's keys.

GET /plan gives the plan. POST /sessions with evaluation keys opens a session; its name, which only that client knows,
is the way to POST /sessions/NAME/queries and to DELETE /sessions/NAME. Of decoding a query is a token, and DELETE
/sessions/NAME/sequence forgets the cache. Errors are JSON: {"error": text}.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from ..errors import InvalidInput, UnsupportedProblem, install
from .bodies import Bodies, Refused
from .cache import context_of
from .decoding_plan import DecodingPlan
from .encoder import Encoder
from .hosted import MOST_ASKED, Ended, Hosted, seconds_of
from .layer import Layer
from .plan import Plan
from .remote import Remote
from .saved import plan_to_json
from .sessions import SLACK
from .tokens import Tokens
from .wire import query_of

__all__ = ["Remote", "service"]

WAITING = 4
"""Queries of a session that may wait or run at once."""


def service(
    program: Plan | DecodingPlan | Layer | Encoder,
    sessions: int = 8,
    seconds: float = 3600.0,
    tokens: Iterable[str] | None = None,
    device: str = "cpu",
    context: Any = None,
) -> Any:
    """Return a Starlette application that serves a plan or a layer.

    Parameters
    ----------
    program : Plan, DecodingPlan, Layer or Encoder
        What is computed.
    sessions : int
        The most sessions at once. Each has a process of its own, and its keys in memory.
    seconds : float
        After how long without a query a session ends.
    tokens : iterable of str, optional
        One of them is demanded with every request, as ``Authorization: Bearer TOKEN``, and a session answers the one
        that opened it. None: requests from this machine need none, and others are refused.
    device : {"cpu", "cuda"}
        Where queries are computed. A session that the GPU has no memory for is refused.
    context : (k, v), optional
        Of decoding: keys and values in the clear, the same for all sessions, as ``DecodingServer`` takes them.

    Raises
    ------
    InvalidInput
        Numbers that have no meaning, a token that is too short, or a context that is not the plan's.
    UnsupportedProblem
        Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"he: serving needs the package starlette; {install('he')}") from e
    if sessions < 1 or not seconds > 0:
        raise InvalidInput(f"he: got {sessions} sessions and {seconds} seconds, expected at least 1 and above 0")
    if isinstance(program, DecodingPlan):
        context_of(program, context)  # refused now, not with the first client
    elif context is not None:
        raise InvalidInput("context: got one, expected None: it is for a plan of decoding")
    desk = _Desk(program, sessions, seconds, Tokens(tokens), device, context)

    async def refused(request: Any, error: Any) -> Any:
        return JSONResponse({"error": str(error)}, getattr(error, "status", 400), getattr(error, "headers", None))

    routes = [
        Route("/plan", desk.show),
        Route("/sessions", desk.begin, methods=["POST"]),
        Route("/sessions/{name}/queries", desk.ask, methods=["POST"]),
        Route("/sessions/{name}", desk.end, methods=["DELETE"]),
        Route("/sessions/{name}/sequence", desk.drop, methods=["DELETE"]),
    ]
    handlers: dict[Any, Any] = {Refused: refused, InvalidInput: refused, UnsupportedProblem: refused}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=desk.lifespan)


class _Unknown(Refused):
    """Somebody without a token."""

    def __init__(self, text: str) -> None:
        super().__init__(401, text)
        self.headers = {"WWW-Authenticate": "Bearer"}


class _Desk:
    """The sessions of a service, and what is done for each kind of request."""

    def __init__(
        self, program: Plan | DecodingPlan | Layer | Encoder, sessions: int, seconds: float, tokens: Tokens,
        device: str, context: Any,
    ) -> None:  # fmt: skip
        self.device, self.context = device, context
        self.program, self.plan = program, program.plan
        self.sessions, self.seconds, self.tokens = sessions, seconds, tokens
        self.text = plan_to_json(self.plan)
        self.most_keys = SLACK * (self.plan.key_bytes + 2**20)
        self.most_query = SLACK * (self.plan.upload_bytes + 2**20)
        # what all sessions may send at once, if each sends its keys or its queries
        self.bodies = Bodies(sessions * max(self.most_keys, self.most_query))
        self.open: dict[str, Hosted] = {}

    async def show(self, request: Any) -> Any:
        from starlette.responses import Response

        self._owner(request)
        return Response(self.text, media_type="application/json")

    async def begin(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        owner = self._owner(request)
        self._free()  # before the body, which is sent for nothing else; and after it, when the place is taken
        async with self.bodies.read(request, self.most_keys) as keys:
            self._free()
            name = secrets.token_hex(32)
            limit = seconds_of(self.plan)
            session = Hosted(self.program, owner, _now(), limit, self.device, context=self.context)
            self.open[name] = session
            session.running += 1  # does not expire while it begins
            try:
                await session.begin(keys)
            except BaseException:
                self.open.pop(name, None)
                session.close()
                raise
        session.running -= 1
        session.used = _now()
        return JSONResponse({"session": name, "seconds": self.seconds}, 201)

    async def ask(self, request: Any) -> Any:
        from starlette.responses import Response

        name, session = self._session(request)
        session.used = _now()
        async with self.bodies.read(request, self.most_query) as query:
            self._session(request)  # it may have ended meanwhile
            if session.running >= WAITING:
                raise Refused(429, f"{WAITING} queries of this session are waiting; send the next when one is answered")
            asked = query_of(query)
            if asked in session.asked:
                raise Refused(409, "this query was asked before; encrypt the input anew")
            if len(session.asked) >= MOST_ASKED:
                raise Refused(429, f"this session has answered {MOST_ASKED} queries; open another one")
            session.asked.add(asked)
            try:
                async with self._running(name, session):
                    reply = await session.attend(query)
            except InvalidInput:
                session.asked.discard(asked)  # nothing was computed
                raise
        return Response(reply, media_type="application/octet-stream")

    async def drop(self, request: Any) -> Any:
        from starlette.responses import Response

        name, session = self._session(request)
        if not isinstance(self.plan, DecodingPlan):
            raise Refused(404, "nothing is decoded here: the plan has no sequence to forget")
        if session.running >= WAITING:
            raise Refused(429, f"{WAITING} tokens of this session are waiting; drop the sequence when one is answered")
        async with self._running(name, session):
            await session.drop()
        return Response(status_code=204)

    @asynccontextmanager
    async def _running(self, name: str, session: Hosted) -> AsyncIterator[None]:
        """Count what a session does as long as it is done; a session that it ends is none of ours after."""
        session.running += 1
        try:
            yield
        except Ended:
            self.open.pop(name, None)
            raise
        finally:
            session.running -= 1
            session.used = _now()

    async def end(self, request: Any) -> Any:
        from starlette.responses import Response

        name, session = self._session(request)
        del self.open[name]
        session.close()
        return Response(status_code=204)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(self.seconds, 5.0))
                self._expire()

        task = asyncio.create_task(sweep())
        try:
            yield
        finally:
            task.cancel()
            while self.open:
                self.open.popitem()[1].close()

    def _owner(self, request: Any) -> bytes:
        """Return who asks; somebody who may not is refused before a byte of the body is read."""
        address = None if request.client is None else request.client.host
        owner = self.tokens.owner(request.headers.get("authorization"), address)
        if owner is None:
            raise _Unknown("who asks is not known: send one of the server's tokens as 'Authorization: Bearer TOKEN'")
        return owner

    def _session(self, request: Any) -> tuple[str, Hosted]:
        owner = self._owner(request)
        self._expire()
        name = request.path_params["name"]
        session = self.open.get(name)
        if session is None or session.owner != owner:
            raise Refused(404, "there is no such session; it may have expired")
        return name, session

    def _free(self) -> None:
        self._expire()
        if len(self.open) >= self.sessions:
            raise Refused(503, f"all {self.sessions} sessions are in use; try later")

    def _expire(self) -> None:
        """End the sessions that have not been used for so long."""
        for name, session in list(self.open.items()):
            if not session.running and _now() - session.used > self.seconds:
                del self.open[name]
                session.close()


def _now() -> float:
    return time.monotonic()
