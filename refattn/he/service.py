"""A server over HTTP, and its client: sessions that expire, limits on sizes, a process for each client's keys.

GET /plan gives the plan. POST /sessions with evaluation keys opens a session; its name, which only that client knows,
is the way to POST /sessions/NAME/queries and to DELETE /sessions/NAME. Errors are JSON: {"error": text}.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from ..errors import InvalidInput, ServiceError, UnsupportedProblem
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan
from .saved import plan_from_json, plan_to_json
from .sessions import SLACK, Server
from .wire import QUERY, unpack

__all__ = ["Remote", "service"]

WAITING = 4
"""Queries of a session that may wait or run at once."""
BODY_SECONDS = 600.0
"""The longest that a body may take to arrive."""


@dataclass
class _Session:
    """A client's process, and what it has asked."""

    pool: ProcessPoolExecutor
    used: float
    asked: set[bytes] = field(default_factory=set)
    running: int = 0

    def close(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()  # what runs is of nobody any more
        self.pool.shutdown(wait=False, cancel_futures=True)


class _Refused(Exception):
    """A status and a text for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def service(program: Plan | Layer, sessions: int = 8, seconds: float = 3600.0) -> Any:
    """Return a Starlette application that serves a plan or a layer.

    Parameters
    ----------
    program : Plan or Layer
        What is computed.
    sessions : int
        The most sessions at once. Each has a process of its own, and its keys in memory.
    seconds : float
        After how long without a query a session ends.

    Raises
    ------
    UnsupportedProblem
        Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("he: serving needs the package starlette; pip install 'refattn[he]'") from e
    if sessions < 1 or not seconds > 0:
        raise InvalidInput(f"he: got {sessions} sessions and {seconds} seconds, expected at least 1 and above 0")
    plan, open_sessions = program.plan, {}  # type: tuple[Any, dict[str, _Session]]
    text = plan_to_json(plan)

    async def show(request: Any) -> Any:
        return Response(text, media_type="application/json")

    async def begin(request: Any) -> Any:
        _expire(open_sessions, seconds)
        if len(open_sessions) >= sessions:
            raise _Refused(503, f"all {sessions} sessions are in use; try later")
        name = secrets.token_hex(32)
        session = open_sessions[name] = _Session(ProcessPoolExecutor(1, get_context("spawn")), _now())
        session.running += 1  # does not expire while it begins
        try:
            keys = await _body(request, SLACK * (plan.key_bytes + 2**20))
            await _in_process(session, _begin, program, keys)
        except BaseException:
            del open_sessions[name]
            session.close()
            raise
        session.running -= 1
        session.used = _now()
        return JSONResponse({"session": name, "seconds": seconds}, 201)

    async def ask(request: Any) -> Any:
        name, session = _session(open_sessions, request, seconds)
        if session.running >= WAITING:
            raise _Refused(429, f"{WAITING} queries of this session are waiting; send the next when one is answered")
        session.running += 1
        try:
            most = SLACK * (plan.upload_bytes + 2**20)
            query = await _body(request, most)
            asked = unpack(query, QUERY, plan.digest, most).query
            if asked in session.asked:
                raise _Refused(409, "this query was asked before; encrypt the input anew")
            session.asked.add(asked)
            reply = await _in_process(session, _attend, query)
        except BrokenProcessPool as e:
            open_sessions.pop(name, None)
            session.close()
            raise _Refused(500, "the session's process ended; open another session") from e
        finally:
            session.running -= 1
            session.used = _now()
        return Response(reply, media_type="application/octet-stream")

    async def end(request: Any) -> Any:
        name, session = _session(open_sessions, request, seconds)
        del open_sessions[name]
        session.close()
        return Response(status_code=204)

    async def refused(request: Any, error: Any) -> Any:
        return JSONResponse({"error": str(error)}, getattr(error, "status", 400))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(seconds, 5.0))
                _expire(open_sessions, seconds)

        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        for session in open_sessions.values():
            session.close()

    routes = [
        Route("/plan", show),
        Route("/sessions", begin, methods=["POST"]),
        Route("/sessions/{name}/queries", ask, methods=["POST"]),
        Route("/sessions/{name}", end, methods=["DELETE"]),
    ]
    handlers: dict[Any, Any] = {_Refused: refused, InvalidInput: refused, UnsupportedProblem: refused}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _session(sessions: dict[str, _Session], request: Any, seconds: float) -> tuple[str, _Session]:
    _expire(sessions, seconds)
    name = request.path_params["name"]
    if name not in sessions:
        raise _Refused(404, "there is no such session; it may have expired")
    return name, sessions[name]


def _now() -> float:
    return time.monotonic()


def _expire(sessions: dict[str, _Session], seconds: float) -> None:
    """End the sessions that have not been used for so long."""
    for name, session in list(sessions.items()):
        if not session.running and _now() - session.used > seconds:
            del sessions[name]
            session.close()


async def _body(request: Any, most: int) -> bytes:
    """Return a request's body; one that is too long is not read to its end."""
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > most:
        raise _Refused(413, f"the body says it has {said[:20]} bytes, expected at most {most}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _Refused(413, f"the body has more than {most} bytes")
                parts.append(part)
    except TimeoutError as e:
        raise _Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from e
    return b"".join(parts)


async def _in_process(session: _Session, call: Any, *arguments: Any) -> Any:
    return await asyncio.wrap_future(session.pool.submit(call, *arguments))


_HERE: dict[str, Server] = {}
"""The server of a session's process."""


def _begin(program: Plan | Layer, keys: bytes) -> None:
    _HERE["server"] = Server(program, keys)


def _attend(query: bytes) -> bytes:
    return _HERE["server"].attend(query)


class Remote:
    """A server elsewhere: its plan, a session, queries. A context manager, which ends the session.

    Parameters
    ----------
    url : str
        Where it is, e.g. ``"http://127.0.0.1:8000"``.
    seconds : float
        The longest that an answer may take.
    transport : httpx transport, optional
        Another way to it, e.g. for tests.

    Raises
    ------
    UnsupportedProblem
        httpx is not installed.
    """

    def __init__(self, url: str, seconds: float = 600.0, transport: Any = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError as e:
            raise UnsupportedProblem("he: asking a server needs the package httpx; pip install 'refattn[he]'") from e
        self._http, self._errors = httpx.Client(base_url=url, timeout=seconds, transport=transport), httpx.HTTPError
        self._session: str | None = None

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def plan(self) -> Plan | LayerPlan:
        """Return the server's plan, checked to be within 128 bits of security."""
        return plan_from_json(self._call("GET", "/plan"))

    def open(self, keys: bytes) -> None:
        """Open a session with a client's evaluation keys."""
        import json

        self._session = json.loads(self._call("POST", "/sessions", keys))["session"]

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query.

        Raises
        ------
        InvalidInput
            The server refuses it, with what it says.
        ServiceError
            The server cannot be reached, or fails.
        """
        if self._session is None:
            raise InvalidInput("he: open a session with evaluation keys first")
        return self._call("POST", f"/sessions/{self._session}/queries", query)

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            name, self._session = self._session, None
            self._call("DELETE", f"/sessions/{name}")
        self._http.close()

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            answer = self._http.request(method, path, content=body)
        except self._errors as e:
            raise ServiceError(f"he: {self._http.base_url} does not answer: {type(e).__name__}: {e}") from e
        if answer.is_success:
            return bytes(answer.content)
        try:
            text = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            text = answer.reason_phrase
        error = InvalidInput if answer.is_client_error else ServiceError
        raise error(f"he: the server refuses it ({answer.status_code}): {text}")
