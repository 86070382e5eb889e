"""Bearer tokens: who may ask a server; not needed on the machine itself, demanded from everywhere else."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InvalidInput

__all__ = ["Tokens", "demand", "is_loopback", "new_token", "read_tokens"]

LEAST = 32
"""Characters of a token: guessing one of `new_token` is guessing 256 bits."""


class Tokens:
    """The tokens that a server takes; it keeps their digests only.

    Parameters
    ----------
    tokens : iterable of str, optional
        None: requests of this machine need none, and others are refused.

    Raises
    ------
    InvalidInput
        One is too short or has characters that a header cannot carry; or there is none in it.
    """

    def __init__(self, tokens: Iterable[str] | None) -> None:
        if isinstance(tokens, str):
            raise InvalidInput("tokens: got one text, expected a list of tokens; put it into a list")
        found = None if tokens is None else list(tokens)
        if found is not None and not found:
            raise InvalidInput("tokens: got none, expected at least one, or None to answer this machine only")
        for token in found or ():
            _check(token)
        self._digests = None if found is None else [_digest(x) for x in found]

    def __repr__(self) -> str:
        return f"Tokens({'none' if self._digests is None else len(self._digests)})"

    def owner(self, header: str | None, address: str | None) -> bytes | None:
        """Return who asks, as what can be compared, or None for somebody who may not.

        Parameters
        ----------
        header : str or None
            What the request says after ``Authorization:``.
        address : str or None
            Where it comes from; None is a socket in this machine's files.
        """
        if self._digests is None:
            return b"" if address is None or is_loopback(address) else None
        kind, _, token = (header or "").partition(" ")
        given = _digest(token.strip())
        # each is compared, and each takes as long whatever is in it
        same = [x for x in self._digests if hmac.compare_digest(x, given)]
        return same[0] if same and kind.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Tell whether an address or name is this machine's own, for sure."""
    try:
        address: Any = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def demand(host: str, tokens: Iterable[str] | None) -> None:
    """Refuse to listen where other machines can ask and no token is demanded of them.

    Raises
    ------
    InvalidInput
        `host` is not this machine's own, and there are no tokens.
    """
    if tokens is None and not is_loopback(host):
        raise InvalidInput(
            f"host: got {host}, where other machines can ask, and no tokens; pass tokens, or listen at 127.0.0.1"
        )


def new_token() -> str:
    """Return a token that nobody can guess."""
    return secrets.token_urlsafe(32)


def read_tokens(path: str | Path) -> list[str]:
    """Return the tokens of a file, one a line; what is behind ``#`` is a remark.

    Raises
    ------
    InvalidInput
        There is no such file, others than its owner may read it, or a line is no token.
    """
    try:
        mode, text = Path(path).stat().st_mode, Path(path).read_text("ascii")
    except (OSError, ValueError) as e:
        raise InvalidInput(f"tokens: {path} cannot be read: {e}") from e
    if mode & 0o077:
        raise InvalidInput(f"tokens: {path} may be read by others than its owner; chmod 600 it")
    found = [x for x in (line.partition("#")[0].strip() for line in text.splitlines()) if x]
    Tokens(found)
    return found


def _check(token: Any) -> None:
    if (
        not isinstance(token, str)
        or len(token) < LEAST
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise InvalidInput(
            f"tokens: got one that is not a text of at least {LEAST} characters without spaces; make it with new_token"
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
