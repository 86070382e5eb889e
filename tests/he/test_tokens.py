"""Bearer tokens: who is answered, and who is not."""

import asyncio

import pytest

from refattn import InvalidInput, he
from refattn.he.service import service
from refattn.he.tokens import Tokens, demand, is_loopback, new_token, read_tokens

from .test_service import CALL, PLAN, opened, running

pytest.importorskip("tenseal")
httpx = pytest.importorskip("httpx")
A, B = "a" * 40, "b" * 40


def bearer(token, kind="Bearer"):
    return {"authorization": f"{kind} {token}"}


def test_without_a_token_nobody_is_answered():
    async def go():
        client = he.Client(PLAN)
        async with running(tokens=[A, B]) as http:
            at = None
            for headers in ({}, bearer("c" * 40), bearer(A, "Basic"), bearer(""), bearer(A[:-1]), bearer(A + "a")):
                for method, path in (
                    ("GET", "/plan"), ("POST", "/sessions"), ("POST", "/sessions/x/queries"), ("DELETE", "/sessions/x"),
                ):  # fmt: skip
                    answer = await http.request(method, path, headers=headers)
                    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                    assert "Authorization: Bearer TOKEN" in answer.json()["error"]
            http.headers.update(bearer(A))
            assert (await http.get("/plan")).status_code == 200
            at = await opened(http, client)
            # a session is of the token that opened it
            for method, path in (("POST", at + "/queries"), ("DELETE", at)):
                assert (await http.request(method, path, headers=bearer(B))).status_code == 404
                assert (await http.request(method, path, headers=bearer("c" * 40))).status_code == 401
            answer = await http.post(at + "/queries", content=client.encrypt(CALL), headers=bearer(A, "bearer"))
            assert answer.status_code == 200
            assert (await http.delete(at)).status_code == 204

    asyncio.run(go())


async def unread():
    pytest.fail("a stranger's body was read")
    yield b""


def test_a_strangers_body_is_not_read():
    async def go():
        async with running(tokens=[A]) as http:
            assert (await http.post("/sessions", content=unread())).status_code == 401

    asyncio.run(go())


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("127.0.0.1", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("10.0.0.1", 401),
        ("::ffff:10.0.0.1", 401),
        ("x", 401),
    ],
)
def test_without_tokens_this_machine_alone_is_answered(address, status):
    async def go():
        transport = httpx.ASGITransport(service(PLAN), client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            assert (await http.get("/plan")).status_code == status

    asyncio.run(go())


def test_hosts_that_others_reach_demand_tokens():
    for host in ("127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        demand(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""):
        assert not is_loopback(host)
        demand(host, [A])
        with pytest.raises(
            InvalidInput, match=r"host: got .*, where other machines can ask, and no tokens; pass tokens"
        ):
            demand(host, None)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], "tokens: got none, expected at least one, or None"),
        ("a" * 40, "tokens: got one text, expected a list"),
        (["short"], "got one that is not a text of at least 32 characters"),
        ([A, "a b" * 20], "without spaces"),
        ([A, "ä" * 40], "make it with new_token"),
        ([A, 5], "got one that is not a text"),
    ],
)
def test_tokens_that_are_none(tokens, text):
    with pytest.raises(InvalidInput, match=text) as refused:
        service(PLAN, tokens=tokens)
    assert A not in str(refused.value)  # it is not for logs


def test_tokens_are_not_shown():
    found = Tokens([A])
    assert A not in repr(found) + str(vars(found))
    assert found.owner(f"Bearer {A}", None) == found.owner(f"bearer  {A} ", "10.0.0.1") != b""
    assert Tokens(None).owner(None, None) == b""
    assert new_token() != new_token()
    assert len(new_token()) >= 43


def test_tokens_come_from_a_file_of_its_owner(tmp_path):
    path = tmp_path / "tokens"
    with pytest.raises(InvalidInput, match=r"tokens: .* cannot be read"):
        read_tokens(path)
    path.write_text(f"# who asks\n\n{A}  # the first\n{B}\n")
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="may be read by others than its owner; chmod 600 it"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path) == [A, B]
    for text, wrong in (("", "got none"), ("short\n", "at least 32 characters"), ("ä" * 40, "cannot be read")):
        path.write_text(text, "utf-8")
        with pytest.raises(InvalidInput, match=wrong):
            read_tokens(path)
