"""The client of a server over HTTP: what it reads has limits on size and time, and is checked before it is used."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from ..errors import InvalidInput, ServiceError, UnsupportedProblem, install, printable
from .decoding_plan import DecodingPlan
from .encoder_plan import EncoderPlan
from .layer_plan import LayerPlan
from .plan import Plan
from .saved import MOST_TEXT, plan_from_json
from .tokens import is_loopback

__all__ = ["Remote"]

MOST_REPLY = 2**28
"""Bytes of a reply where the plan is not known."""
PIECE = 2**20
"""Bytes of a message that are sent at once."""
GRACE = 0.5
"""Seconds in which the connection itself may say that the time is over, and what it waited for."""


class Remote:
    """A server elsewhere: its plan, a session, queries. A context manager, which ends the session.

    Parameters
    ----------
    url : str
        Where it is, e.g. ``"http://127.0.0.1:8000"``.
    seconds : float
        The longest that an answer may take in all.
    transport : httpx transport, optional
        Another way to it, e.g. for tests.
    token : str, optional
        What the server demands to know who asks. It is sent over TLS, or within this machine, only.
    most_bytes : int
        The most bytes of keys, or of a query, that a server's plan may ask for.
    sent : callable, optional
        Called with the bytes of a message that are sent, and all of them, after each piece.

    Raises
    ------
    InvalidInput
        A token that would be sent in clear.
    UnsupportedProblem
        httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        seconds: float = 600.0,
        transport: Any = None,
        token: str | None = None,
        most_bytes: int = 2**32,
        sent: Callable[[int, int], Any] | None = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError as e:
            raise UnsupportedProblem(f"he: asking a server needs the package httpx; {install('he')}") from e
        headers = {"accept-encoding": "identity"}  # a few bytes that unpack to very many are not asked for
        if token is not None:
            where = httpx.URL(url)
            if where.scheme != "https" and not is_loopback(where.host):
                raise InvalidInput(f"token: is not sent to {url} in clear; use an https URL")
            if not token.isascii() or not token.isprintable():
                raise InvalidInput("token: has characters that a header cannot carry; read it from its file again")
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(base_url=url, timeout=seconds, transport=transport, headers=headers)
        self._errors, self._seconds, self._most = (httpx.HTTPError, httpx.InvalidURL), seconds, most_bytes
        self._session: str | None = None
        self._sent = sent
        self._reply_most = MOST_REPLY

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def plan(self) -> Plan | DecodingPlan | LayerPlan | EncoderPlan:
        """Return the server's plan, checked to be within 128 bits of security and within this client's limits."""
        made = plan_from_json(self._call("GET", "/plan", most=MOST_TEXT), self._most)
        self._reply_most = made.reply_most
        return made

    def open(self, keys: bytes) -> None:
        """Open a session with a client's evaluation keys.

        Raises
        ------
        InvalidInput
            The server refuses them, with what it says.
        ServiceError
            The server cannot be reached, fails, or does not name a session.
        """
        answer = self._call("POST", "/sessions", keys, most=2**16)
        try:
            name = json.loads(answer)["session"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
            raise ServiceError("he: the server opened a session without a name; is it one of refattn?")
        self._session = name

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query; of an encoder the masked result of its next block, until the last.

        Raises
        ------
        InvalidInput
            The server refuses it, with what it says.
        ServiceError
            The server cannot be reached, fails, or sends more than a reply has.
        """
        if self._session is None:
            raise InvalidInput("he: open a session with evaluation keys first")
        return self._call("POST", f"/sessions/{self._session}/queries", query, most=self._reply_most)

    def step(self, token: bytes) -> bytes:
        """Return the reply to a token of a sequence that is decoded; errors as of :meth:`attend`.

        Where the server cannot be reached, the token may be in the cache or not: drop the sequence and begin another.
        """
        return self.attend(token)

    def drop(self) -> None:
        """Have the server forget the cache of a sequence that is decoded.

        Raises
        ------
        InvalidInput
            There is no session, or the server refuses it, with what it says.
        ServiceError
            The server cannot be reached, or fails.
        """
        if self._session is None:
            raise InvalidInput("he: open a session with evaluation keys first")
        self._call("DELETE", f"/sessions/{self._session}/sequence", most=2**16)

    def close(self) -> None:
        """End the session."""
        try:
            if self._session is not None:
                name, self._session = self._session, None
                self._call("DELETE", f"/sessions/{name}", most=2**16)
        finally:
            self._http.close()

    def _call(self, method: str, path: str, body: bytes | None = None, *, most: int) -> bytes:
        """Return an answer's body, of which no more is read than it may have, within the time.

        It is read by another thread: heads that come byte by byte know no other end.
        """
        answer: Future[bytes] = Future()

        def read() -> None:
            try:
                answer.set_result(self._read(method, path, body, most))
            except BaseException as e:
                answer.set_exception(e)

        threading.Thread(target=read, daemon=True).start()
        try:
            return answer.result(self._seconds + GRACE)
        except TimeoutError as e:
            self._session = None
            self._http.close()
            raise self._late() from e

    def _content(self, body: bytes | None) -> dict[str, Any]:
        """Return a message as httpx takes it: in pieces, of which it copies what is left each time the network takes
        some, and of a message as a whole that would be many times the message."""
        sent = self._sent
        if body is None or (sent is None and len(body) <= PIECE):
            return {"content": body}

        def pieces() -> Iterator[bytes]:
            for i in range(0, len(body), PIECE):
                yield body[i : i + PIECE]
                if sent is not None:
                    sent(min(i + PIECE, len(body)), len(body))

        return {"content": pieces(), "headers": {"content-length": str(len(body))}}

    def _late(self) -> ServiceError:
        return ServiceError(f"he: {self._http.base_url} took longer than {self._seconds:g} s to answer")

    def _read(self, method: str, path: str, body: bytes | None, most: int) -> bytes:
        if self._http.is_closed:
            raise ServiceError(f"he: the connection to {self._http.base_url} is closed; make a new client")
        end = time.monotonic() + self._seconds
        parts, size = [], 0
        try:
            with self._http.stream(method, path, **self._content(body)) as answer:
                for part in [answer.content] if answer.is_stream_consumed else answer.iter_raw():
                    size += len(part)
                    limit = most if answer.is_success else 2**16
                    if size > limit:
                        raise ServiceError(
                            f"he: {self._http.base_url} sends more than the {limit} bytes of such an answer"
                        )
                    if time.monotonic() > end:
                        raise self._late()
                    parts.append(part)
        except self._errors as e:
            raise ServiceError(f"he: {self._http.base_url} does not answer: {type(e).__name__}: {e}") from e
        found = b"".join(parts)
        if answer.is_success:
            return found
        try:
            text = printable(str(json.loads(found)["error"])[:1000])
        except (ValueError, KeyError, TypeError, RecursionError):
            text = printable(answer.reason_phrase)
        error = InvalidInput if answer.is_client_error else ServiceError
        raise error(f"he: the server refuses it ({answer.status_code}): {text}")
