"""What a client believes of a server that lies, and what a server takes from a client that does."""

import os
import re

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, he
from refattn.he import wire
from refattn.he.plausible import check_out
from refattn.he.seal import from_bytes, to_bytes

from . import forge
from .apart import apart
from .make import planned, problem
from .test_layer import layer

pytest.importorskip("tenseal")
CALL = problem(4, 4, 4, epsilon=1.0)
PLAN = planned(CALL)


@pytest.fixture(scope="module")
def exchange():
    """Return a client, its keys, its server, a query and the right reply."""
    client = he.Client(PLAN)
    keys = client.evaluation_keys()
    server = he.Server(PLAN, keys)
    query = client.encrypt(CALL)
    return client, keys, server, query, server.attend(query)


def changed(**fields):
    return lambda parts, fresh: [forge.with_fields(p, **fields) for p in parts]


REPLIES = {
    "no parts": (lambda parts, fresh: [], "got a reply of 0 parts, expected 1 by the plan"),
    "more parts": (lambda parts, fresh: parts * 2, "got a reply of 2 parts, expected 1 by the plan"),
    "millions of parts": (
        lambda parts, fresh: [b""] * 10**5,
        "got .* bytes, expected at most|got a reply of 100000 parts",
    ),
    "scale 1": (changed(scale=1.0), "of scale 1, expected"),
    "scale 0": (changed(scale=0.0), "of scale 0, expected|no Ciphertext of this plan"),
    "scale -1": (changed(scale=-1.0), "of scale -1, expected|no Ciphertext of this plan"),
    "scale tiny": (changed(scale=5e-324), "of scale 4.94066e-324, expected"),
    "scale large": (changed(scale=1e300), "of scale 1e\\+300, expected"),
    "scale NaN": (changed(scale=float("nan")), "of scale nan, expected|no Ciphertext of this plan"),
    "scale inf": (changed(scale=float("inf")), "of scale inf, expected|no Ciphertext of this plan"),
    "scale a little less": (changed(times=1 - 1e-6), "of scale .*, expected"),
    "not ready for products": (changed(ntt=False), "form for products: False|no Ciphertext of this plan"),
    "one polynomial": (changed(size=1), "no Ciphertext of this plan"),
    "three polynomials": (changed(size=3), "no Ciphertext of this plan"),
    "zeros": (changed(zero=True), "no Ciphertext of this plan"),
    "noise": (changed(noise=True), "no Ciphertext of this plan|expected at most the plan's"),
    "no ciphertext": (lambda parts, fresh: [os.urandom(5000)], "no Ciphertext of this plan"),
    "nothing": (lambda parts, fresh: [b""], "no Ciphertext of this plan"),
    "a ciphertext of the query": (lambda parts, fresh: fresh[:1], "primes: 11, expected 1|primes: .*, expected"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_cannot_be_right_is_not_believed(exchange, name):
    client, _, server, query, reply = exchange
    change, text = REPLIES[name]
    parts = forge.parts_of(reply, wire.REPLY, PLAN)
    fresh = forge.parts_of(query, wire.QUERY, PLAN)
    with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
        client.decrypt(forge.repacked(reply, wire.REPLY, PLAN, change(parts, fresh)))
    again = client.encrypt(CALL)  # and the client goes on
    assert np.abs(client.decrypt(server.attend(again)) - he.reference(CALL)).max() <= PLAN.error


def test_a_refused_reply_leaves_its_query_waiting(exchange):
    client, _, server, *_ = exchange
    query = client.encrypt(CALL)
    reply = server.attend(query)
    parts = forge.parts_of(reply, wire.REPLY, PLAN)
    with pytest.raises(InvalidInput, match="of scale 1, expected"):
        client.decrypt(forge.repacked(reply, wire.REPLY, PLAN, changed(scale=1.0)(parts, None)))
    assert np.abs(client.decrypt(reply) - he.reference(CALL)).max() <= PLAN.error


def test_one_bit_of_a_reply_flipped_is_not_believed(exchange):
    client, _, server, query, _ = exchange
    rng = np.random.default_rng(0)
    query = client.encrypt(CALL)
    reply = server.attend(query)
    (part,) = forge.parts_of(reply, wire.REPLY, PLAN)
    plain = np.frombuffer(forge.body(part), np.uint8)
    for _ in range(50):
        bad = plain.copy()
        # of the low 40 bits of a number: a higher one makes it larger than its prime, which SEAL refuses
        at = 65 + 8 * rng.integers((len(bad) - 65) // 8) + rng.integers(5)
        bad[at] ^= 1 << rng.integers(8)
        with pytest.raises(InvalidInput, match=r"expected at most the plan's|no Ciphertext"):
            client.decrypt(forge.repacked(reply, wire.REPLY, PLAN, [forge.saved_as(part, bad.tobytes())]))


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_believed(what):
    for plan in (PLAN, he.Layer(layer(classes=3)[0]).plan):
        with pytest.raises(InvalidInput, match="he: got a reply with numbers that are not finite; the server computed"):
            check_out(plan, np.array([0.0, what]))
    check_out(PLAN, np.array([PLAN.value_most]))
    with pytest.raises(InvalidInput, match="expected at most the plan's"):
        check_out(PLAN, np.array([-PLAN.value_most - 2 * PLAN.error]))


@apart
def test_a_layers_reply_of_another_scale_is_not_believed():
    program = he.Layer(layer(n=4, d=4, heads=1, d_k=4, classes=2)[0])
    client = he.Client(program.plan)
    reply = he.Server(program, client.evaluation_keys()).attend(client.encrypt(np.ones((4, 4))))
    parts = forge.parts_of(reply, wire.REPLY, program.plan)
    for times in (1e-3, 1e3):
        bad = [forge.with_fields(p, times=times) for p in parts]
        with pytest.raises(InvalidInput, match=r"of scale .*, expected"):
            client.decrypt(forge.repacked(reply, wire.REPLY, program.plan, bad))
    assert client.decrypt(reply).shape == (2,)


def test_a_row_without_keys_is_not_divided_by_noise():
    seen = np.ones((1, 1, 4, 4), bool)
    seen[0, 0, 1] = False
    x = problem(4, 4, 4, epsilon=0.0, allowed=seen)
    plan = planned(x, normalize="client")
    with pytest.raises(
        InvalidProblem, match=r"row 1 has 0, outside .*, or normalize='server' for rows that see no key"
    ):
        plan.encoded(x)
    y = problem(4, 4, 4, epsilon=1e-9, allowed=seen)
    with pytest.raises(InvalidProblem, match=r"row 1 has 1e-09, outside .*, or normalize='server'"):
        planned(y, normalize="client").encoded(y)
    y = problem(4, 4, 4, epsilon=0.1, allowed=seen)
    plan = planned(y, normalize="client")
    assert plan.noise * plan.denominator[0] <= plan.tolerance * 0.1
    client = he.Client(plan)
    out = client.decrypt(he.Server(plan, client.evaluation_keys()).attend(client.encrypt(y)))
    assert np.abs(out - he.reference(y)).max() <= plan.tolerance
    y = problem(4, 4, 4, epsilon=0.5, allowed=seen)
    plan = planned(y)
    client = he.Client(plan)
    out = client.decrypt(he.Server(plan, client.evaluation_keys()).attend(client.encrypt(y)))
    assert np.abs(out - he.reference(y)).max() <= plan.error


@apart
def test_keys_of_another_structure_are_refused(exchange):
    client, keys, *_ = exchange
    relin, galois = forge.parts_of(keys, wire.KEYS, PLAN)
    other = he.Client(planned(CALL, normalize="client"))
    few = client._generator.create_galois_keys([2 * PLAN.ring.degree - 1])
    elements = len(PLAN.rotations) + 1
    more = client._generator.create_galois_keys([2 * i + 3 for i in range(elements + 1)])
    cases = [
        ((galois, relin), f"got {elements} relinearisation keys, expected the plan's 1"),
        ((relin, relin), f"got 1 rotation keys, expected the plan's {elements}"),
        ((galois, galois), f"got {elements} relinearisation keys"),
        ((relin, to_bytes(few)), f"got 1 rotation keys, expected the plan's {elements}"),
        ((relin, to_bytes(more)), f"got {elements + 1} rotation keys, expected the plan's {elements}"),
        (
            (forge.with_digits(relin, 3), galois),
            f"got relinearisation keys of 3 digits, expected {PLAN.ring.levels + 1}",
        ),
        ((relin, relin[:-100]), "bytes that are no GaloisKeys"),
        ((relin,), "got evaluation keys of 1 parts, expected 2 by the plan"),
        ((relin, galois, galois), "got evaluation keys of 3 parts, expected 2 by the plan"),
    ]
    for parts, text in cases:
        with pytest.raises(InvalidInput, match=f"^he: .*{text}"):
            he.Server(PLAN, forge.repacked(keys, wire.KEYS, PLAN, parts))
    with pytest.raises(InvalidInput, match="another plan"):
        he.Server(PLAN, other.evaluation_keys())
    wrong = to_bytes(
        client._generator.create_galois_keys([2 * PLAN.ring.degree - 1, *range(3, 3 + 2 * elements - 2, 2)])
    )
    with pytest.raises(InvalidInput, match=r"got rotation keys without that of \d+; make them by the plan's client"):
        he.Server(PLAN, forge.repacked(keys, wire.KEYS, PLAN, (relin, wrong)))


QUERIES = {
    "scale": (lambda parts: [forge.with_fields(parts[0], times=1 - 1e-6), *parts[1:]], "of scale"),
    "level": (lambda parts: [*parts[:-1], parts[len(parts) // 2]], "primes: "),
    "zeros": (lambda parts: [forge.with_fields(p, size=2, zero=True) for p in parts], "no Ciphertext"),
    "fewer": (lambda parts: parts[:-1], "parts, expected"),
    "more": (lambda parts: [*parts, parts[0]], "parts, expected"),
    "millions": (lambda parts: [b""] * 10**6, "expected at most|parts, expected"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_of_another_structure_is_refused(exchange, name):
    _, _, server, query, _ = exchange
    change, text = QUERIES[name]
    parts = change(forge.parts_of(query, wire.QUERY, PLAN))
    with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
        server.attend(forge.repacked(query, wire.QUERY, PLAN, parts))


def test_parts_are_counted_before_they_are_hashed(exchange, monkeypatch):
    _, _, server, query, _ = exchange
    many = forge.repacked(query, wire.QUERY, PLAN, [b""] * 10**5)
    monkeypatch.setattr(wire, "_digests", lambda data: pytest.fail("a part was looked at"))
    with pytest.raises(
        InvalidInput, match=re.escape(f"of 100000 parts, expected {len(PLAN.part_limbs())} by the plan")
    ):
        server.attend(many)
    with pytest.raises(InvalidInput, match="of 100000 parts, expected at most 65536 by the plan"):
        wire.unpack(many, wire.QUERY, PLAN.digest, len(many))


def test_the_plan_knows_the_parts_of_a_query():
    for plan, x in (
        (PLAN, CALL),
        (planned(problem(128, 60, 64, 64, 1, epsilon=6.0), upload="compact"), problem(128, 60, 64, 64, 1, epsilon=6.0)),
        (he.Layer(layer(classes=3)[0]).plan, None),
        (he.Layer(layer(classes=0)[0]).plan, None),
    ):
        y = np.ones((plan.n, plan.d)) if x is None else x
        assert plan.part_limbs() == [limbs for _, limbs in plan.encoded(y)[1]]
        assert plan.loads() == {(plan.load, n): plan.part_limbs().count(n) for n in set(plan.part_limbs())}


@apart
def test_what_is_kept_of_a_layers_weights_does_not_grow_with_scales():
    program = he.Layer(layer(n=4, d=4, heads=1, d_k=4, classes=2)[0])
    plan, x = program.plan, np.ones((4, 4))
    client = he.Client(plan)
    server = he.Server(program, client.evaluation_keys())
    query = client.encrypt(x)
    expected = client.decrypt(server.attend(query))
    kept = server._worker._arithmetic._plains
    size = len(kept)
    assert size > 0
    parts = forge.parts_of(query, wire.QUERY, plan)
    for i in range(3):
        bad = [forge.with_fields(p, times=1 - 1e-9 * (i + 2)) for p in parts]
        with pytest.raises(InvalidInput, match="of scale"):
            server.attend(forge.repacked(query, wire.QUERY, plan, bad, os.urandom(16)))
        # and below that check, too
        found = [from_bytes("Ciphertext", plan.ring, p) for p in bad]
        program.compute(server._worker._arithmetic, (), found)
        assert len(kept) == size
    np.testing.assert_allclose(client.decrypt(server.attend(client.encrypt(x))), expected, atol=1e-4)
