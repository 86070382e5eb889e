"""The masked refresh: exact, hiding, used once; attacked as a server and as a client that lie would."""

import asyncio
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from refattn import InvalidInput, he
from refattn.he import refresh, wire
from refattn.he.integers import composed, transformed, words_of
from refattn.he.refresh import check_masked
from refattn.he.saved import plan_from_json, plan_to_json
from refattn.he.seal import from_bytes, level, primes, to_bytes

from . import forge
from .make import planned, problem
from .relay import RING, Relay

pytest.importorskip("tenseal")
X = np.random.default_rng(0).standard_normal((3, 5)) / 4
MOST = 2**32


def begun(rounds=2, queries=4):
    program = Relay(rounds, queries=queries)
    client = he.Client(program.plan)
    return program, client, he.Server(program, client.evaluation_keys())


@pytest.fixture(scope="module")
def session():
    return begun()


def masked_words(client, masked, plan):
    """Return what a client decrypts of a masked result: whole numbers."""
    m = wire.unpack(masked, wire.MASKED, plan.digest, MOST)
    found = []
    for part in m.parts[1:]:
        words = words_of(plan.ring, client._opened(from_bytes("Ciphertext", plan.ring, part)))
        found.append(composed(transformed(plan.ring, words, False), primes(plan.ring)[:2]))
    return found


@pytest.mark.parametrize(("rounds", "queries"), [(1, 4), (2, 4), (3, 2)])
def test_what_comes_back_is_what_was_masked(rounds, queries):
    program, client, server = begun(rounds, queries)
    out = client.ask(X, server.attend)
    expected = program.simulate(X)
    assert np.abs(expected).max() > 0.1
    # noise of fresh ciphertexts, 8192 coefficients of 3.2, and of a rescaling, 45; times sums and products of a few
    noise = 200 * 45 * np.sqrt(8192) * 6 / 2**40
    assert np.abs(out - expected).max() <= noise + 200 * program.plan.refresh_error
    assert noise < 1e-5


def test_a_refresh_is_as_near_as_it_says(session, monkeypatch):
    """Without noise: of the numbers that were masked, what the server subtracts leaves their encoding."""
    program, _, _ = session
    plan, moduli = program.plan, primes(RING)[:2]
    rng = np.random.default_rng(1)
    value = [np.rint(rng.standard_normal(8192) * 2.0**34) for _ in range(2)]
    from refattn.he import embedding, integers

    m = [integers.transformed(RING, integers.residues((v, 0 * v), moduli), True) for v in value]
    r = [integers.drawn(moduli, 8192) for _ in range(2)]
    y = [integers.add(a, b, moduli) for a, b in zip(m, r, strict=True)]
    sets = [[refresh._slots(plan, w, 2.0**40) for w in x] for x in (y, r, m)]
    seen, mask, plain = (plan.placed(1, *plan.taken(s)) for s in sets)
    for a, b, c in zip(seen, mask, plain, strict=True):
        one, two = (
            [
                int(h) + int(low)
                for h, low in zip(*embedding.coefficients((z[0][0] * 2.0**40, z[0][1] * 2.0**40)), strict=True)
            ]
            for z in (a, b)
        )
        left = np.array([float(s - t) for s, t in zip(one, two, strict=True)])
        slots = embedding.slots((left, 0 * left))[0] / 2.0**40
        assert np.abs(slots - (c[0][0] + c[0][1])).max() <= plan.refresh_error
    assert plan.refresh_error < 1e-7


def test_what_a_client_sees_is_uniform_whatever_the_values_are(session, monkeypatch):
    program, client, server = session
    plan, size = program.plan, primes(RING)[0] * primes(RING)[1]

    def statistic(x):
        found = np.concatenate([h for h, _ in masked_words(client, server.attend(client.encrypt(x)), plan)])
        counts, _ = np.histogram(found / size, 64, (-0.5 - 2**-30, 0.5 + 2**-30))
        return ((counts - len(found) / 64) ** 2).sum() / (len(found) / 64)

    # 63 degrees of freedom: above 200 has a chance below 1e-15
    assert statistic(0 * X) < 200
    assert statistic(X * 4) < 200
    zeros = lambda moduli, degree: np.zeros((2, degree), np.uint64)  # noqa: E731
    monkeypatch.setattr(refresh, "drawn", zeros)  # the control: without a mask it is not
    assert statistic(X) > 10**4


def test_the_second_polynomial_is_another_each_time(session, monkeypatch):
    """The same ciphertexts give the same second polynomials, from which weights could be read: they are hidden."""
    program, client, server = session
    query = client.encrypt(X)

    def second():
        m = wire.unpack(server.attend(query), wire.MASKED, program.plan.digest, MOST)
        return words_of(RING, from_bytes("Ciphertext", RING, m.parts[1]))[1]

    a, b = second(), second()
    assert (a == b).mean() < 1e-3
    counts, _ = np.histogram(a[0], 64, (0, primes(RING)[0]))
    assert ((counts - 128) ** 2 / 128).sum() < 200
    monkeypatch.setattr(refresh, "flooded", lambda ring, x, zero, mask: x)  # the control
    assert (second() == second()).all()


def test_each_mask_is_used_once(session):
    program, client, server = session
    answer = client.refresh(server.attend(client.encrypt(X)))
    reply = server.attend(answer)
    with pytest.raises(InvalidInput, match="got an answer to no masked result that waits for one"):
        server.attend(answer)
    assert np.abs(client.decrypt(reply) - program.simulate(X)).max() < 1e-5


def test_a_client_that_never_answers_is_forgotten(session):
    program, client, server = session
    first = server.attend(client.encrypt(X))
    later = [server.attend(client.encrypt(X)) for _ in range(refresh.WAITING + 3)]
    assert len(server._masks._waiting) == refresh.WAITING
    with pytest.raises(InvalidInput, match="no masked result that waits for one; encrypt the input anew"):
        server.attend(client.refresh(first))
    reply = server.attend(client.refresh(later[-1]))
    assert np.abs(client.decrypt(reply) - program.simulate(X)).max() < 1e-5


def test_another_sessions_masked_results_are_not_answered(session):
    program, client, server = session
    other = he.Client(program.plan)
    there = he.Server(program, other.evaluation_keys())
    theirs = there.attend(other.encrypt(X))
    with pytest.raises(InvalidInput, match="a masked result of another client or of no query"):
        client.refresh(theirs)
    answer = other.refresh(theirs)
    with pytest.raises(InvalidInput, match="no masked result that waits"):
        server.attend(answer)
    mine = client.refresh(server.attend(client.encrypt(X)))
    m = wire.unpack(mine, wire.FRESH, program.plan.digest, MOST)
    forged = wire.pack(wire.Message(m.kind, m.plan, other._name, m.query, m.parts))
    with pytest.raises(InvalidInput, match="a query of another client than the one whose keys are here"):
        server.attend(forged)
    assert server.attend(mine)  # which still waits
    assert other.decrypt(there.attend(answer)).shape == (3, 5)


def changed(parts, i, **fields):
    return [forge.with_fields(p, **fields) if k == i else p for k, p in enumerate(parts)]


ANSWERS = {
    "fewer": (lambda parts: parts[:-1], "parts, expected"),
    "more": (lambda parts: [*parts, parts[0]], "parts, expected"),
    "none": (lambda parts: [], "of 0 parts, expected"),
    "millions": (lambda parts: [b""] * 10**5, "expected at most|parts, expected"),
    "another level": (lambda parts: [*parts[:-1], parts[-3]], "primes: 2, expected 3"),
    "another scale": (lambda parts: changed(parts, 2, times=1 - 1e-6), "of scale"),
    "zeros": (lambda parts: changed(parts, 0, size=2, zero=True), "no Ciphertext"),
    "noise": (lambda parts: [os.urandom(99) for _ in parts], "no Ciphertext"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_another_structure_is_refused(session, name):
    program, client, server = session
    answer = client.refresh(server.attend(client.encrypt(X)))
    change, text = ANSWERS[name]
    bad = forge.repacked(answer, wire.FRESH, program.plan, change(forge.parts_of(answer, wire.FRESH, program.plan)))
    with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
        server.attend(bad)


def test_an_answer_that_was_changed_on_its_way_is_refused_and_may_come_again(session):
    _, client, server = session
    answer = client.refresh(server.attend(client.encrypt(X)))
    rng = np.random.default_rng(0)
    for at in rng.integers(200, len(answer), 20):
        bad = bytearray(answer)
        bad[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(InvalidInput, match="cut short or changed"):
            server.attend(bytes(bad))
    for end in (0, 5, 60, len(answer) // 2, len(answer) - 1):
        with pytest.raises(InvalidInput, match=r"^he: "):
            server.attend(answer[:end])
    assert client.decrypt(server.attend(answer)).shape == (3, 5)


def test_parts_of_an_answer_are_counted_before_they_are_hashed(session, monkeypatch):
    program, client, server = session
    answer = client.refresh(server.attend(client.encrypt(X)))
    bad = forge.repacked(answer, wire.FRESH, program.plan, [b""] * 10**5)
    monkeypatch.setattr(wire, "_digests", lambda data: pytest.fail("a part was looked at"))
    with pytest.raises(InvalidInput, match=re.escape("of 100000 parts, expected")):
        server.attend(bad)


RESULTS = {
    "no parts": (lambda parts: [], "of 0 parts, expected 3"),
    "one more": (lambda parts: [*parts, parts[1]], "of 4 parts, expected 3|bytes, expected at most"),
    "a long name": (lambda parts: [bytes(17), *parts[1:]], "a name of 17 bytes, expected 16"),
    "no name": (lambda parts: [b"", *parts[1:]], "a name of 0 bytes, expected 16"),
    "scale 1": (lambda parts: changed(parts, 1, scale=1.0), "of scale 1, expected"),
    "scale NaN": (lambda parts: changed(parts, 2, scale=float("nan")), "of scale nan, expected|no Ciphertext"),
    "scale 0": (lambda parts: changed(parts, 2, scale=0.0), "of scale 0, expected|no Ciphertext"),
    "not ready": (lambda parts: changed(parts, 1, ntt=False), "form for products: False|no Ciphertext"),
    "noise": (lambda parts: [parts[0], os.urandom(5000), parts[2]], "no Ciphertext"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_masked_result_of_another_structure_is_not_answered(session, name):
    program, client, server = session
    masked = server.attend(client.encrypt(X))
    change, text = RESULTS[name]
    parts = forge.parts_of(masked, wire.MASKED, program.plan)
    with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
        client.refresh(forge.repacked(masked, wire.MASKED, program.plan, change(parts)))
    assert client.decrypt(server.attend(client.refresh(masked))).shape == (3, 5)


def test_a_client_answers_as_often_as_there_are_blocks_and_no_more(session):
    program, client, server = session
    query = client.encrypt(X)
    masked = server.attend(query)
    early = server.attend(client.refresh(masked))
    with pytest.raises(InvalidInput, match="a masked result of another client or of no query that waits"):
        client.refresh(masked)  # a second answer of two blocks
    again = server.attend(client.encrypt(X))
    m = wire.unpack(again, wire.MASKED, program.plan.digest, MOST)
    r = wire.unpack(early, wire.REPLY, program.plan.digest, MOST)
    with pytest.raises(InvalidInput, match="got a reply after 0 of 1 masked results; it is not believed"):
        client.decrypt(wire.pack(wire.Message(wire.REPLY, r.plan, r.client, m.query, r.parts)))
    assert client.decrypt(early).shape == (3, 5)
    with pytest.raises(InvalidInput, match="a masked result of another client or of no query that waits"):
        client.refresh(masked)


def test_a_client_answers_whatever_the_numbers_are(session):
    """A server that lies learns nothing from whether it is answered, or how long the answer is."""
    program, client, server = session
    sizes = []
    for noise in (False, True):
        masked = server.attend(client.encrypt(X))
        name, *rest = forge.parts_of(masked, wire.MASKED, program.plan)
        if noise:  # words drawn below their primes
            x = from_bytes("Ciphertext", RING, rest[0])
            words = words_of(RING, x)
            from refattn.he.integers import ciphertext, drawn

            moduli = primes(RING)[:2]
            rest = [to_bytes(ciphertext(RING, np.stack([drawn(moduli, 8192)] * 2), x.scale, True)) for _ in rest]
            assert words.shape == (2, 2, 8192)
        answer = client.refresh(forge.repacked(masked, wire.MASKED, program.plan, [name, *rest]))
        sizes.append(len(forge.parts_of(answer, wire.FRESH, program.plan)))
        assert 0.8 < len(answer) / 1e6 < 5
    assert sizes[0] == sizes[1]


def test_keys_bring_an_encryption_of_zero_from_a_seed(session):
    program, client, _ = session
    keys = client.evaluation_keys()
    relin, galois, zero = forge.parts_of(keys, wire.KEYS, program.plan)
    chosen = from_bytes("Ciphertext", RING, zero)  # its second polynomial in full: anybody could have chosen it
    higher = to_bytes(client._encryptor.encrypt_zero_symmetric(level(RING, 3)))
    for bad, text in (
        ([relin, galois], "got evaluation keys of 2 parts, expected 3"),
        ([relin, galois, to_bytes(chosen)], "an encryption of zero that is not made from a seed"),
        ([relin, galois, higher], "an encryption of zero that is not made from a seed"),
        ([relin, galois, b""], "fewer than SEAL's header"),
        ([relin, galois, relin], "an encryption of zero that is not made from a seed"),
        ([galois, relin, zero], "relinearisation keys, expected the plan's 1"),
    ):
        with pytest.raises(InvalidInput, match=text):
            he.Server(program, forge.repacked(keys, wire.KEYS, program.plan, bad))


def test_other_plans_have_no_masked_results(session):
    _, client, server = session
    call = problem(4, 4, 4, epsilon=1.0)
    plan = planned(call, normalize="client")
    other = he.Client(plan)
    masked = server.attend(client.encrypt(X))
    with pytest.raises(InvalidInput, match="got a masked result, which this plan has none of"):
        other.refresh(masked)
    with pytest.raises(InvalidInput, match="got a refreshed result, expected a query"):
        he.Server(plan, other.evaluation_keys()).attend(client.refresh(masked))
    assert other.ask(call, he.Server(plan, other.evaluation_keys()).attend).shape == (1, 1, 4, 4)


def test_sharing_an_encoders_result_is_refused(session):
    from refattn import UnsupportedProblem

    _, client, server = session
    with pytest.raises(UnsupportedProblem, match="no bound on its noise"):
        client.ask(X, server.attend, he.Sharing())


def test_a_scale_may_be_off_by_as_much_as_the_plan_says(session):
    program, client, server = session
    parts = forge.parts_of(server.attend(client.encrypt(X)), wire.MASKED, program.plan)[1:]
    off = [from_bytes("Ciphertext", RING, forge.with_fields(p, times=3.0)) for p in parts]
    with pytest.raises(InvalidInput, match=r"of scale .*, expected"):
        check_masked(program.plan, off)
    assert check_masked(replace(program.plan, drift=(4.0, 2.0)), off) == [x.scale for x in off]


def test_plans_of_encoders_survive_json_and_are_checked():
    import json

    plan = Relay(3).plan
    again = plan_from_json(plan_to_json(plan))
    assert (again.digest, again.limbs, again.factors) == (plan.digest, plan.limbs, plan.factors)
    good = json.loads(plan_to_json(plan))
    for change, text in (
        ({"limbs": []}, "limbs and factors are no lists of as many blocks"),
        ({"limbs": [[3, 2, 0]] * 999, "factors": [[1, 1]] * 999}, "at most 256"),
        ({"factors": [[1.0, 1.0]]}, "limbs and factors are no lists of as many blocks"),
        ({"limbs": [[3, 2, 0], [3, 2, 3], [4, 3, 2]]}, "limbs of .* integers from 1 to 3"),
        ({"limbs": [[3, 2, 0], [3, 2, 0], [3, 3, 2]]}, "limbs of .* integers from 1 to 3"),
        ({"limbs": [[3, 2], [3, 2, 1], [3, 3, 2]]}, "limbs of .* integers from 1 to 3"),
        ({"factors": [[1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0]]}, "factors of .* two finite numbers"),
        ({"drift": [2.0, 17.0]}, "drift of .* two numbers from 2 to 16"),
        ({"drift": [1.5, 2.0]}, "drift of .* two numbers from 2 to 16"),
        ({"drift": [2.0]}, "drift of .* two numbers from 2 to 16"),
        ({"drift": 2.0}, "got what is no plan: TypeError"),
        ({"factors": [[1.0, 1.0], [1e200, 1.0], [1.0, 1.0]]}, "factors of .* two finite numbers"),
        ({"ring": good["plan"]["ring"] | {"first": 54}}, "ring.first of 54, expected at most 52"),
        ({"out_factor": 0.0}, "out_factor of .*, expected a finite number other than 0"),
        ({"d": 10**9}, "the plan's sizes do not fit its slots"),
        ({"classes": 99}, "the plan's sizes do not fit its slots"),
        ({"rotations": [0]}, "a rotation of 0"),
    ):
        bad = json.dumps(good | {"plan": good["plan"] | change})
        with pytest.raises(InvalidInput, match=text):
            plan_from_json(bad)


def test_over_http_each_answer_counts_once():
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("starlette")
    from refattn.he.service import service

    program = Relay()

    async def go():
        app = service(program)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            places, clients = [], [he.Client(plan_from_json((await http.get("/plan")).text)) for _ in range(2)]
            for client in clients:
                answer = await http.post("/sessions", content=client.evaluation_keys())
                assert answer.status_code == 201, answer.text
                places.append(f"/sessions/{answer.json()['session']}/queries")
            (a, b), (at_a, at_b) = clients, places
            masked = (await http.post(at_a, content=a.encrypt(X))).content
            fresh = a.refresh(masked)
            for where, body, status, text in (
                (at_b, fresh, 400, "no masked result that waits"),
                (at_a, fresh[:-9], 400, "cut short or changed"),
                (at_a, masked, 409, "this query was asked before"),
            ):
                answer = await http.post(where, content=body)
                assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text
            reply = await http.post(at_a, content=fresh)
            assert np.abs(a.decrypt(reply.content) - program.simulate(X)).max() < 1e-5
            answer = await http.post(at_a, content=fresh)
            assert (answer.status_code, "asked before" in answer.json()["error"]) == (409, True)
            masked = (await http.post(at_b, content=b.encrypt(X))).content
            reply = await http.post(at_b, content=b.refresh(masked))
            assert np.abs(b.decrypt(reply.content) - program.simulate(X)).max() < 1e-5

    asyncio.run(go())


def test_a_result_that_is_too_large_for_a_refresh_is_named(session):
    program, *_ = session
    with pytest.raises(InvalidInput, match=r"block 0 has a result of root mean square .*, above the 11.\d+ that"):
        program.simulate(X * 100)
    assert round(program.plan.refresh_most, 9) == round(2.0 ** (52 - 40 - 6.5 - 2), 9)


def test_the_mask_is_what_was_drawn(session, monkeypatch):
    """And nothing less: what is left without it is the result, which is small."""
    from refattn.he import integers

    program, client, server = session
    masks = []

    def drawn(moduli, degree):
        masks.append(integers.drawn(moduli, degree))
        return masks[-1]

    monkeypatch.setattr(refresh, "drawn", drawn)
    masked = wire.unpack(server.attend(client.encrypt(X)), wire.MASKED, program.plan.digest, MOST)
    moduli = primes(RING)[:2]
    assert len(masks) == 2
    for part, mask in zip(masked.parts[1:], masks, strict=True):
        words = words_of(RING, client._opened(from_bytes("Ciphertext", RING, part)))
        less = integers.add(words, np.array(moduli, np.uint64)[:, None] - mask, moduli)
        left, _ = composed(transformed(RING, less, False), moduli)
        # slots of at most 8 times 2**40; what was drawn is of 92 bits
        assert 2.0**30 < np.abs(left).max() < 2.0**43
        assert np.abs(composed(transformed(RING, mask, False), moduli)[0]).max() > 2.0**90


def test_places_of_a_refresh():
    """By loops: tokens along queries and along keys, the residual and the sums of squares with their factors."""
    plan = Relay().plan
    rng = np.random.default_rng(2)
    x, s = rng.standard_normal((3, 5)), rng.standard_normal(3)
    parts = [(z[0] + z[1], limbs) for z, limbs in plan.placed(1, (x, 0 * x), (s, 0 * s))]
    assert [limbs for _, limbs in parts] == plan.part_limbs(1)
    *along, residual, along_i, along_j = (z for z, _ in parts)
    of = plan.layout
    assert len(along) == 2 * plan.copies == 4
    for slot in range(of.slots):
        rest, i = divmod(slot, of.queries)
        rest, h = divmod(rest, of.heads)
        rest, j = divmod(rest, of.keys)
        repeat, f = divmod(rest, of.groups)
        for copy in range(plan.copies):
            feature = (copy * plan.apart + repeat % plan.apart) * plan.spread + f % plan.spread
            for z, t in ((along[copy], i), (along[plan.copies + copy], j)):
                assert z[slot] == (x[t, feature] if t < 3 and feature < 5 else 0)
        pair = 2 * (f * of.heads + h)
        two = [x[i, c] if i < 3 and c < 5 and j == 0 else 0 for c in (pair, pair + 1)]
        assert abs(residual[slot] - 0.3 * (two[0] + 1j * two[1])) < 2.0**-50
        assert abs(along_i[slot] - (0.25 * s[i] if i < 3 else 0)) < 2.0**-50
        assert abs(along_j[slot] - (0.25 * s[j] if j < 3 else 0)) < 2.0**-50
