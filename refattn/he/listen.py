"""Listening: uvicorn with limits, and an end that does not wait for those who do not finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedProblem, install

__all__ = ["listen"]

CONNECTIONS = 512
"""The most connections at once; more are answered 503."""


def listen(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    certificate: str | None = None,
    key: str | None = None,
    announce: Callable[[str], Any] = print,
    grace: float = 10.0,
) -> None:
    """Serve an application until SIGTERM or SIGINT.

    Parameters
    ----------
    app : Starlette application
        What :func:`refattn.he.service.service` returned.
    host, port : str, int
        Where; port 0 takes a free one.
    certificate, key : str, optional
        Files of a TLS certificate and its key.
    announce : callable
        Called with the URL when requests are answered.
    grace : float
        Seconds that what is under way has to finish after the signal; then it is given up.

    Raises
    ------
    UnsupportedProblem
        uvicorn is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"he: serving needs the package uvicorn; {install('he')}") from e
    config = uvicorn.Config(
        app, host, port, log_level="warning", ssl_certfile=certificate, ssl_keyfile=key, access_log=False,
        server_header=False, timeout_graceful_shutdown=max(1, round(grace)), limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
    )  # fmt: skip

    class Announced(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.servers:
                bound = self.servers[0].sockets[0].getsockname()
                announce(f"http{'s' if certificate else ''}://{host}:{bound[1]}")

    Announced(config).run()
