"""Client and server, on ciphertexts."""

import copy
import os
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings, target
from hypothesis import strategies as st

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, he
from refattn.he import wire
from refattn.he.circuit import attend
from refattn.he.seal import Sealed, from_bytes, to_bytes, zstandard
from refattn.he.worker import Sent

from .apart import apart
from .make import planned, problem
from .test_circuit import exact

pytest.importorskip("tenseal")

LENGTHS = np.arange(3) < np.random.default_rng(0).integers(1, 4, (50, 1, 1, 1))
CALLS = {
    "small, p=2": (problem(5, 7, 6, 4, epsilon=0.5), {}),
    "causal, several heads, p=4": (problem(16, 16, 32, 32, 4, 4, 3.0, causal="bottom_right"), {"tolerance": 3e-2}),
    "the client divides": (problem(16, 16, 32, 32, 2, epsilon=0.0), {"normalize": "client"}),
    "two batches": (problem(5, 7, 6, 4, 2, epsilon=0.5, batch=2), {}),
    "throughput": (problem(2, 3, 4, 6, 2, epsilon=0.5, batch=50), {"mode": "throughput"}),
    "throughput, inputs of different lengths": (
        problem(2, 3, 4, 6, 2, epsilon=0.5, batch=50, allowed=np.broadcast_to(LENGTHS, (50, 1, 2, 3)).copy()),
        {"mode": "throughput"},
    ),
    "throughput, p=4": (problem(2, 3, 4, 6, 2, 4, 0.5, batch=5), {"mode": "throughput", "tolerance": 1.0}),
    "throughput, the client divides": (problem(2, 3, 4, batch=9), {"mode": "throughput", "normalize": "client"}),
    "compact": (problem(16, 16, 32, 32, 4, 2, 3.0, causal="bottom_right"), {"upload": "compact"}),
    "compact, the client divides": (problem(5, 7, 6, 4, 3, epsilon=0.5), {"upload": "compact", "normalize": "client"}),
    "compact, many parts": (problem(128, 60, 16, 16, 1, epsilon=6.0), {"upload": "compact"}),
    "whole": (problem(16, 16, 32, 32, 4, 2, 3.0, causal="bottom_right"), {"upload": "whole"}),
    "whole, throughput": (problem(2, 3, 4, 6, 2, epsilon=0.5, batch=50), {"mode": "throughput", "upload": "whole"}),
    "many parts": (problem(128, 64, 16, 16, 1, epsilon=6.0), {}),
}


@pytest.mark.parametrize("name", CALLS)
@apart
def test_encrypted_is_the_simulation_within_its_noise(name):
    x, more = CALLS[name]
    plan = planned(x, **more)
    client = he.Client(plan)
    server = he.Server(plan, client.evaluation_keys())
    query = client.encrypt(x)
    out = client.decrypt(server.attend(query))
    noise = np.abs(out - he.simulate(plan, x)).max()
    # bounds are for the worst inputs; these are random ones
    assert plan.noise / 20000 <= noise <= plan.noise
    assert np.abs(out - exact(x)).max() <= plan.error
    assert 0.8 <= len(query) / plan.upload_bytes <= 1.25


@pytest.fixture(scope="module")
def narrow():
    """Return a plan with wide ranges, its client and its server."""
    given = {"denominator": (0.5, 20.0), "epsilon": 0.5, "norms": (6.0, 6.0), "value_most": 2.0, "tolerance": 5.0}
    plan = he.plan(2, 4, 4, p=2, normalize="client", **given)
    client = he.Client(plan)
    return plan, client, he.Server(plan, client.evaluation_keys())


@settings(max_examples=int(os.environ.get("REFATTN_HE_EXAMPLES", "60")))
@given(data=st.data())
def test_no_input_in_range_breaks_the_bound(narrow, data):
    """Hypothesis seeks the worst inputs: all weight on one key, equal keys, large values of one sign."""
    plan, client, server = narrow
    entries = st.floats(-3, 3).map(lambda v: round(v, 3))
    q, k, v = (np.array(data.draw(st.lists(entries, min_size=m, max_size=m))).reshape(1, 1, -1, 4) for m in (8, 16, 16))
    x = Problem(q, k, np.clip(v, -2, 2), variant="power", options={"p": 2, "epsilon": 0.5})
    try:
        query = client.encrypt(x)
    except InvalidProblem:
        assume(False)
    error = np.abs(client.decrypt(server.attend(query)) - exact(x)).max()
    target(error / plan.error)
    assert error <= plan.error


@pytest.fixture(scope="module")
def session():
    x = problem(4, 4, 4, epsilon=0.5)
    plan = planned(x, normalize="client")
    client = he.Client(plan)
    return x, plan, client, client.evaluation_keys()


def test_the_planner_counts_what_the_engine_does(session):
    x, plan, client, keys = session
    server = he.Server(plan, keys)
    engine = server._worker._arithmetic
    done = []

    class Watched(Sealed):
        def __getattribute__(self, name):
            done.append(name)
            return super().__getattribute__(name)

    parts = wire.unpack(client.encrypt(x), wire.QUERY, plan.digest, 2**30).parts
    each = plan.layout.parts
    sent = list(map(Sent, parts, plan.part_limbs()))
    tokens = [server._worker.loaded(sent[i : i + each]) for i in range(0, len(parts), each)]
    watched = Watched(plan.ring, engine.relin_keys, engine.galois_keys)
    attend(watched, plan.layout, plan.p, plan.inverse, plan.epsilon, tokens[2], tokens[0], tokens[1])
    kinds = {"switch_key": ("relinearize", "rotate", "conjugate"), "multiply": ("mul",), "rescale": ("rescale",)}
    for kind, names in kinds.items():
        assert sum(c for (n, _), c in plan.counts.items() if n == kind) == sum(d in names for d in done)


def test_workers_give_the_same(session):
    x = problem(128, 128, 8, 8, epsilon=12.0)
    plan = planned(x, workers=2)
    assert plan.layout.blocks_per_head == 2  # which share keys and values
    other = x.replace(key=x.key[:, :, ::-1].copy(), value=-x.value)
    client = he.Client(plan)
    with he.Server(plan, client.evaluation_keys(), workers=2) as server:
        for y in (x, other):
            out = client.decrypt(server.attend(client.encrypt(y)))
            assert np.abs(out - exact(y)).max() <= plan.error
    with pytest.raises(InvalidInput, match="workers: got 0, expected an integer from 1 to 1024"):
        he.Server(plan, b"", workers=0)


def test_what_is_not_for_this_server_is_refused(session):
    x, plan, client, keys = session
    server = he.Server(plan, keys)
    query = client.encrypt(x)
    other = he.Client(plan)
    wider = planned(x, normalize="client", value_most=100.0)
    cases = [
        (lambda: client.decrypt(query), "got a query, expected a reply"),
        (lambda: server.attend(query[:-1]), "was cut short or changed on its way"),
        (lambda: server.attend(b"hello"), "got 5 bytes that are no message; expected a query"),
        (lambda: server.attend(query + bytes(2**24)), "expected at most .* for a query of this plan"),
        (lambda: server.attend(other.encrypt(x)), "a query of another client than the one whose keys are here"),
        (lambda: he.Server(wider, keys), "evaluation keys of another plan; client and server must use the same one"),
        (lambda: he.Server(plan, query), "got a query, expected evaluation keys"),
        (lambda: other.decrypt(server.attend(query)), "a reply to another client or to no query that waits for one"),
    ]
    for call, text in cases:
        with pytest.raises(InvalidInput, match=text):
            call()
    reply = server.attend(query)
    assert np.abs(client.decrypt(reply) - exact(x)).max() <= plan.error  # the server is still up
    with pytest.raises(InvalidInput, match="no query that waits for one"):
        client.decrypt(reply)  # a reply counts once


def test_bytes_that_seal_does_not_know(session):
    _, plan, _, keys = session
    m = wire.unpack(keys, wire.KEYS, plan.digest, 2**30)
    broken = wire.pack(wire.Message(m.kind, m.plan, m.client, m.query, (b"no keys", m.parts[1])))
    with pytest.raises(InvalidInput, match="he: got bytes that are no RelinKeys of this plan"):
        he.Server(plan, broken)
    one = wire.pack(wire.Message(m.kind, m.plan, m.client, m.query, m.parts[:1]))
    with pytest.raises(InvalidInput, match="he: got evaluation keys of 1 parts, expected 2"):
        he.Server(plan, one)


def test_a_shorter_object_has_nothing_of_a_longer_before_it(session):
    x, plan, client, _ = session
    part = bytes(wire.unpack(client.encrypt(x), wire.QUERY, plan.digest, 2**30).parts[0])
    assert to_bytes(from_bytes("Ciphertext", plan.ring, part))
    with pytest.raises(InvalidInput, match="he: got bytes that are no Ciphertext of this plan"):
        from_bytes("Ciphertext", plan.ring, part[: len(part) // 2])


def test_files_where_the_system_has_none_in_memory(session, monkeypatch):
    x, plan, client, _ = session
    part = bytes(wire.unpack(client.encrypt(x), wire.QUERY, plan.digest, 2**30).parts[0])
    expected = to_bytes(from_bytes("Ciphertext", plan.ring, part))
    monkeypatch.delattr(os, "memfd_create")
    assert to_bytes(from_bytes("Ciphertext", plan.ring, part)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_files_of_its_own(session):
    x, plan, client, _ = session
    parts = [bytes(p) for p in wire.unpack(client.encrypt(x), wire.QUERY, plan.digest, 2**30).parts]
    expected = [to_bytes(from_bytes("Ciphertext", plan.ring, p)) for p in parts]
    child = os.fork()
    mine = child == 0
    found = all(to_bytes(from_bytes("Ciphertext", plan.ring, parts[mine])) == expected[mine] for _ in range(200))
    if child == 0:
        os._exit(not found)
    assert found
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def has_one(message, chunks):
    """Return whether one of the chunks of 32 bytes stands in a message: `in` for each takes some milliseconds."""
    x = np.frombuffer(message, np.uint8).astype(np.uint16)
    pairs = x[:-1] | x[1:] << 8
    at = np.arange(len(message) - 31)
    for i in range(0, 8, 2):
        wanted = np.zeros(2**16, bool)
        wanted[[int.from_bytes(c[i : i + 2], "little") for c in chunks]] = True
        at = at[wanted[pairs[at + i]]]
    return any(message[i : i + 32] in chunks for i in at)


def test_the_secret_key_stays(session):
    x, _, client, keys = session
    whole = he.Client(planned(x, upload="whole"))
    sent = ((client, keys + client.encrypt(x)), (whole, whole.evaluation_keys() + whole.encrypt(x)))
    for holder, message in sent:
        secret = to_bytes(holder._generator.secret_key())
        bare = zstandard().ZstdDecompressor().decompressobj().decompress(secret[16:])
        chunks = {s[i : i + 32] for s in (secret, bare) for i in range(64, len(s) - 64, 997)}
        assert len(chunks) > 100
        assert not has_one(message, chunks)
        assert has_one(message + min(chunks), chunks)
    for way_out in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a client holds a secret key and is not pickled or copied"):
            way_out(client)
    assert "Client(degree" in repr(client)


def test_a_client_refuses_what_would_go_wrong_in_silence(session):
    x, _, client, _ = session
    with pytest.raises(InvalidProblem, match="query: its largest row norm"):
        client.encrypt(x.replace(query=x.query * 3))


@given(data=st.data())
def test_no_changed_message_is_taken(data):
    m = wire.Message(wire.QUERY, bytes(32), bytes(16), bytes(range(16)), (b"abc", b"", b"defg"))
    good = wire.pack(m)
    assert wire.unpack(good, wire.QUERY, bytes(32), 1000) == m
    at, by = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    changed = good[:at] + bytes([good[at] ^ by]) + good[at + 1 :]
    for bad in (changed, good[:at], good + bytes(by)):
        with pytest.raises(InvalidInput, match=r"^he: "):
            wire.unpack(bad, wire.QUERY, bytes(32), 1000)


def test_drawn_noise_looks_like_the_schemes():
    x = problem(16, 16, 32, 32, 4, epsilon=3.0)
    plan = planned(x)
    client = he.Client(plan)
    server = he.Server(plan, client.evaluation_keys())
    plain = he.simulate(plan, x)
    drawn = [np.abs(he.simulate(plan, x, seed) - plain) for seed in range(3)]
    real = [np.abs(client.decrypt(server.attend(client.encrypt(x))) - plain) for _ in range(3)]
    assert np.array_equal(he.simulate(plan, x, 0) - plain, he.simulate(plan, x, 0) - plain)
    # the middle and the largest of 2048 errors: the median is stable to a few percent, the largest is of slot 0
    assert 0.6 <= np.median(real) / np.median(drawn) <= 1.6
    assert 0.1 <= np.max(real) / np.max(drawn) <= 10


def test_a_result_to_be_shared_is_drowned(narrow):
    plan, client, server = narrow
    q = np.full((1, 1, 2, 4), 1.0)
    x = Problem(q, np.ones((1, 1, 4, 4)), np.ones((1, 1, 4, 4)), variant="power", options={"p": 2, "epsilon": 0.5})
    share = he.Sharing(bits=20, results=3)
    deviation = 6 * 2**10 * plan.noise
    assert share.deviation(plan.noise) == pytest.approx(deviation)
    errors = []
    for _ in range(20):
        errors.append(client.decrypt(server.attend(client.encrypt(x)), share) - he.reference(x))
    # 160 numbers: five standard errors
    assert np.std(errors) == pytest.approx(deviation, rel=5 / np.sqrt(2 * 160))
    with pytest.raises(InvalidInput, match="got 0 bits and 1 results, expected integers of at least 1"):
        he.Sharing(bits=0)


def test_what_no_bound_is_known_of_is_not_shared():
    from .test_layer import layer

    client = he.Client(he.Layer(layer(n=4, d=4, heads=1, d_k=4, classes=2)[0]).plan)
    with pytest.raises(UnsupportedProblem, match="the plan of a layer has no bound on its noise"):
        client.decrypt(b"", he.Sharing())


def test_compact_queries_need_less_and_refuse_what_they_cannot_carry():
    x = problem(128, 128, 64, 64, epsilon=6.0)
    full, compact = planned(x), planned(x, upload="compact")
    whole = planned(x, upload="whole")
    assert compact.upload_bytes < 0.6 * full.upload_bytes < 0.3 * whole.upload_bytes
    assert whole.noise == full.noise
    assert whole.predicted_ms() < 0.7 * full.predicted_ms()
    assert full.noise < compact.noise <= compact.error <= 1e-2
    masked = problem(128, 128, 64, 64, epsilon=6.0, causal="bottom_right")
    with pytest.raises(UnsupportedProblem, match="takes no masks where a head's queries need several blocks"):
        he.simulate(planned(masked, upload="compact"), masked)
    with pytest.raises(UnsupportedProblem, match="upload='compact' is for mode='latency'"):
        planned(problem(2, 3, 4), upload="compact", mode="throughput")
    with pytest.raises(InvalidInput, match="upload: got 'small', expected one of full, compact, whole"):
        planned(problem(2, 3, 4), upload="small")


def test_what_is_no_plan_or_no_keys_is_refused():
    with pytest.raises(InvalidInput, match="plan: got NoneType, expected a plan"):
        he.Client(None)
    with pytest.raises(InvalidInput, match=r"program: got str, expected a plan, a he\.Layer or a he\.Encoder"):
        he.Server("plan.json", b"")
    made = he.plan(2, 2, 2, denominator=(1.0, 2.0), epsilon=1.0, norms=(1.0, 1.0), value_most=1.0)
    with pytest.raises(InvalidInput, match=r"keys: got NoneType, expected the bytes of client\.evaluation_keys\(\)"):
        he.Server(made, None)
    with pytest.raises(InvalidInput, match="workers: got '2', expected an integer from 1 to 1024"):
        he.Server(made, b"", workers="2")
    with pytest.raises(InvalidInput, match="got 'a' bits and 1 results, expected integers"):
        he.Sharing(bits="a")
    with pytest.raises(InvalidInput, match=r"share: got 3, expected he\.Sharing\(bits, results\) or None"):
        he.Client(made).decrypt(b"", share=3)
