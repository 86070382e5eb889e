"""What a server that decodes takes from a client that lies, and what a client believes of such a server."""

import os
import struct

import numpy as np
import pytest

from refattn import InvalidInput, RefattnError, he
from refattn.he import wire
from refattn.he.cache import Cache
from refattn.he.decoding import PLACE
from refattn.he.seal import from_bytes, to_bytes

from . import forge
from .make_decoding import begun, decoded, planned, sequence, taken, token

pytest.importorskip("tenseal")
X = sequence(6, 0, 4, heads=2)
PLAN = planned(X, normalize="client", tolerance=1.0)
EXACT = he.reference(X)[0]


@pytest.fixture(scope="module")
def pair():
    return begun(X, PLAN)


@pytest.fixture
def session(pair):
    """Return a client and a server that have had two tokens, and the third."""
    client, server = pair
    client.begin()
    server.drop()
    server._dropped.clear()
    assert np.abs(decoded(client, server, X, 2) - EXACT[:, :2]).max() <= PLAN.error
    return client, server, token(client, X, 2)


def parts_of(message):
    return forge.parts_of(message, wire.TOKEN, PLAN)


def repacked(message, parts, query=None):
    return forge.repacked(message, wire.TOKEN, PLAN, parts, query)


def goes_on(client, server, message, at=2):
    """Check that a server still has its cache as it was, and answers the token that it waits for."""
    assert server.tokens == at
    assert np.abs(client.decrypt(server.step(message)) - EXACT[:, at]).max() <= PLAN.error


def placed(change):
    def of(parts):
        return [PLACE.pack(*change(*PLACE.unpack(parts[0]))), *parts[1:]]

    return of


TOKENS = {
    "scale": (lambda p: [p[0], forge.with_fields(p[1], times=1 - 1e-6), *p[2:]], "of scale"),
    "scale NaN": (
        lambda p: [*p[:2], forge.with_fields(p[2], scale=float("nan")), *p[3:]],
        "of scale|no Ciphertext of this plan",
    ),
    "level of the value": (lambda p: [*p[:-1], p[1]], "primes: "),
    "level of the key": (lambda p: [*p[:2], p[3], p[3]], "primes: "),
    "three polynomials": (
        lambda p: [*p[:2], forge.with_fields(p[2], size=3), p[3]],
        "no Ciphertext|polynomials: 3, expected 2",
    ),
    "zeros": (lambda p: [*p[:2], forge.with_fields(p[2], size=2, zero=True), p[3]], "no Ciphertext"),
    "noise": (lambda p: [*p[:3], os.urandom(5000)], "no Ciphertext"),
    "nothing": (lambda p: [*p[:3], b""], "no Ciphertext"),
    "fewer": (lambda p: p[:-1], "got a token of 3 parts, expected 4 by the plan"),
    "more": (lambda p: [*p, p[-1]], "got a token of 5 parts, expected 4 by the plan"),
    "millions": (lambda p: [b""] * 10**6, "expected at most|parts, expected"),
    "no place": (lambda p: [b"", *p[1:]], "a token whose place has 0 bytes, expected 20"),
    "a long place": (lambda p: [p[0] * 10**4, *p[1:]], "a token whose place has 200000 bytes, expected 20"),
    "twice": (placed(lambda s, n: (s, n - 1)), "got token 1 again, expected token 2"),
    "before another": (placed(lambda s, n: (s, n + 1)), "got token 3 before those between, expected token 2"),
    "a huge count": (placed(lambda s, n: (s, 2**32 - 1)), "got token 4294967295 before those between, expected"),
    "another sequence": (placed(lambda s, n: (os.urandom(16), 0)), "another sequence than the one in the cache, of 2"),
    "another sequence's place": (placed(lambda s, n: (bytes(16), n)), "another sequence than the one in the cache"),
}


def test_tokens_of_another_structure_or_place_leave_the_cache_as_it_was(session):
    client, server, message = session
    for name, (change, text) in TOKENS.items():
        with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
            server.step(repacked(message, change(parts_of(message))))
        assert server.tokens == 2, name
    goes_on(client, server, message)


def test_a_token_comes_once_and_no_more_than_the_longest(session):
    client, server, message = session
    server.step(message)
    with pytest.raises(InvalidInput, match="got token 2 again, expected token 3: each comes once, in order"):
        server.step(message)
    late, early = token(client, X, 3), token(client, X, 4)
    with pytest.raises(InvalidInput, match="got token 4 before those between, expected token 3"):
        server.step(early)
    server.step(late)
    goes_on(client, server, early, 4)
    last = token(client, X, 5)
    goes_on(client, server, last, 5)
    with pytest.raises(InvalidInput, match="he: the sequence has its longest, 6 tokens; begin another one"):
        token(client, X, 0)
    with pytest.raises(InvalidInput, match="he: the cache has its longest, 6 tokens; drop it, or plan a longer one"):
        server.step(repacked(last, placed(lambda s, n: (s, 6))(parts_of(last))))
    assert server.cache_bytes == PLAN.cache_bytes


def test_what_is_dropped_is_not_used_again(session):
    client, server, message = session
    first = PLACE.unpack(parts_of(message)[0])[0]
    server.drop()
    for number in (0, 2):
        with pytest.raises(InvalidInput, match="a sequence whose cache was dropped; begin another one"):
            server.step(repacked(message, placed(lambda s, n, k=number: (s, k))(parts_of(message))))
    with pytest.raises(InvalidInput, match="got token 2 before those between, expected token 0"):
        server.step(repacked(message, placed(lambda s, n: (bytes(16), n))(parts_of(message))))
    server.drop()  # nothing
    assert server._dropped == {first}
    client.begin()
    goes_on(client, server, token(client, X, 0), 0)


def test_names_of_sequences_do_not_grow_without_an_end(session, monkeypatch):
    client, server, _ = session
    monkeypatch.setattr("refattn.he.decoding.MOST_SEQUENCES", 1)
    server.drop()
    client.begin()
    with pytest.raises(InvalidInput, match="he: 1 sequences of this client were dropped; make another client"):
        server.step(token(client, X, 0))


def test_other_clients_tokens_and_replies_are_refused(session):
    client, server, message = session
    other, theirs = begun(X, PLAN)
    with pytest.raises(InvalidInput, match="a token of another client than the one whose keys are here"):
        server.step(token(other, X, 0))
    reply = server.step(message)
    for call, text in (
        (lambda: other.decrypt(reply), "a reply to another client or to no token that waits for one"),
        (lambda: client.decrypt(message), "got a token, expected a reply"),
        (lambda: server.step(reply), "got a reply, expected a token"),
        (lambda: server.step(message[:-1]), "cut short or changed on its way"),
        (lambda: server.step(message + bytes(2**24)), "expected at most .* for a token of this plan"),
        (lambda: he.DecodingServer(PLAN, message), "got a token, expected evaluation keys"),
    ):
        with pytest.raises(InvalidInput, match=text):
            call()
    assert theirs.tokens == 0


def test_keys_of_another_plan_or_structure_are_refused(session):
    client, _, _ = session
    keys = client.evaluation_keys()
    relin, galois = forge.parts_of(keys, wire.KEYS, PLAN)
    for parts, text in (
        ((galois, relin), "relinearisation keys, expected the plan's 1"),
        ((relin, relin), "got 1 rotation keys, expected"),
        ((relin,), "got evaluation keys of 1 parts, expected 2"),
        ((relin, galois[:-100]), "bytes that are no GaloisKeys"),
    ):
        with pytest.raises(InvalidInput, match=f"^he: .*{text}"):
            he.DecodingServer(PLAN, forge.repacked(keys, wire.KEYS, PLAN, parts))
    longer = planned(sequence(7, 0, 4, heads=2), normalize="client", tolerance=1.0)
    with pytest.raises(InvalidInput, match="evaluation keys of another plan"):
        he.DecodingServer(longer, keys)


def test_a_key_that_cancels_the_cache_is_refused(session):
    """The sum of such keys has no second polynomial: what it holds would lie open."""
    client, server, message = session
    held = server._held.cache.keys[0][0]
    m = server._held.arithmetic
    against = to_bytes(m.negate(held))
    parts = parts_of(message)
    with pytest.raises(InvalidInput, match=r"he: the token cannot be computed: .*; encrypt it anew"):
        server.step(repacked(message, [*parts[:2], against, *parts[3:]]))
    goes_on(client, server, message)


def test_a_step_that_fails_late_leaves_the_cache_as_it_was(session, monkeypatch):
    client, server, message = session

    def fails(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "attend", fails)
        with pytest.raises(InvalidInput, match="he: the token cannot be computed: no; encrypt it anew"):
            server.step(message)
    goes_on(client, server, message)


def test_bytes_changed_anywhere_are_refused_or_give_a_reply(session):
    """With a digest that fits. A change that SEAL cannot see is the client's own loss: its cache is wrong then."""
    client, server, message = session
    rng = np.random.default_rng(0)
    parts = parts_of(message)
    refused = sure = 0
    for _ in range(40):
        bad = [bytearray(p) for p in parts]
        at = rng.integers(len(bad))
        part = bad[at]
        part[rng.integers(min(len(part), 200))] ^= 1 << rng.integers(8)
        sure += at == 0  # another place than the next one
        cache = server._held.cache
        try:
            server.step(repacked(message, bad))
        except RefattnError:
            refused += 1
            assert server._held.cache is cache
        else:
            server._held.cache = cache
    assert refused >= sure > 5
    goes_on(client, server, message)


def test_a_reply_that_cannot_be_right_is_not_believed(session):
    client, server, message = session
    reply = server.step(message)
    parts = forge.parts_of(reply, wire.REPLY, PLAN)
    for bad, text in (
        (parts[:1], "got a reply of 1 parts, expected 2 by the plan"),
        ([forge.with_fields(p, times=0.5) for p in parts], "of scale"),
        ([parts_of(message)[1]] * 2, "primes: "),
        (parts[::-1], "primes: "),
    ):
        with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
            client.decrypt(forge.repacked(reply, wire.REPLY, PLAN, bad))
    other = forge.repacked(reply, wire.REPLY, PLAN, parts, os.urandom(16))
    with pytest.raises(InvalidInput, match="to no token that waits for one"):
        client.decrypt(other)
    assert np.abs(client.decrypt(reply) - EXACT[:, 2]).max() <= PLAN.error
    with pytest.raises(InvalidInput, match="to no token that waits for one"):
        client.decrypt(reply)


def test_parts_of_a_token_are_counted_before_they_are_hashed(session, monkeypatch):
    _, server, message = session
    many = repacked(message, [b""] * 10**5)
    monkeypatch.setattr(wire, "_digests", lambda data: pytest.fail("a part was looked at"))
    with pytest.raises(InvalidInput, match="of 100000 parts, expected 4 by the plan"):
        server.step(many)


def test_a_context_stays_at_the_server():
    """What a server sends has nothing of it but what attention to it is; the plan has its number of tokens."""
    x = sequence(2, 3, 4, heads=2)
    plan = planned(x, normalize="client", tolerance=1.0)
    context = taken(x)[3]
    client, server = begun(x, plan, known=False)
    assert server._held.cache.context is not None
    assert all(struct.pack("<d", float(y)) not in client.evaluation_keys() for y in context[0].ravel()[:2])
    assert np.abs(decoded(client, server, x) - he.reference(x)[0]).max() <= plan.error


def test_ciphertexts_in_the_cache_are_those_that_were_checked(session):
    """A token is loaded once: the cache does not keep its bytes, which could change."""
    client, server, message = session
    data = bytearray(message)
    reply = server.step(bytes(data))
    data[:] = bytes(len(data))
    assert np.abs(client.decrypt(reply) - EXACT[:, 2]).max() <= PLAN.error
    held = server._held.cache.keys[0][0]
    again = from_bytes("Ciphertext", PLAN.ring, to_bytes(held))
    assert again.coeff_modulus_size() == PLAN.ring.levels + 1
    goes_on(client, server, token(client, X, 3), 3)
