"""Decoding with an encrypted cache: every step against the exact operator, bounds, counts, and refusals."""

import dataclasses
import json
import re

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, he
from refattn.he.arithmetic import Counted, Levels
from refattn.he.cache import Cache, Tokens, context_of
from refattn.he.decoding_plan import DecodingPlan
from refattn.he.device.chain import chain_of
from refattn.he.device.trace import Trace
from refattn.he.layout import token_layouts
from refattn.he.linear import Plain
from refattn.he.noise import ERROR, Bounds, quantile
from refattn.he.plan import noise_of
from refattn.he.sampled import Sampled
from refattn.he.saved import plan_from_json, plan_to_json

from .apart import apart
from .make_decoding import begun, decoded, planned, sequence, taken, token, with_layouts

ROUNDING = 2.0**-38
"""float64's: some thousand operations of 2**-53, on numbers below 8."""
CLIENT = {"normalize": "client", "tolerance": 1.0}


@pytest.mark.parametrize("context", [0, 3, 8, 13])
@pytest.mark.parametrize("slots", [64, 128])
def test_every_step_is_exact_but_for_the_polynomial(slots, context):
    """In rings that are too small for anybody: heads in several blocks, and keys in several spans."""
    x = sequence(9, context, 6, 5, 3)
    plan = planned(x)
    layouts = token_layouts(slots, x.n_k, 6, 3)
    assert slots > 64 or any(y.spans > 1 for y in layouts)
    for layout in layouts:
        small = dataclasses.replace(plan, layout=layout)
        out = small.simulate(*taken(x))
        assert np.abs(out - he.reference(x)[0]).max() <= plan.approximation + ROUNDING
    # a step's token is the last that it sees, and the first token sees no other
    assert np.abs(out[:, 0] - out[:, -1]).max() > 0.1


@pytest.mark.parametrize("sizes", [(1, 0, 1, 1, 1), (1, 1, 1, 3, 1), (2, 1, 5, 1, 2), (3, 0, 3, 8, 5)], ids=str)
def test_sizes_that_fill_nothing(sizes):
    x = sequence(*sizes)
    plan = planned(x)
    assert np.abs(plan.simulate(*taken(x)) - he.reference(x)[0]).max() <= plan.approximation + ROUNDING


def test_heads_that_do_not_fit_come_in_blocks():
    x = sequence(12, 7, 4, heads=5)
    plan = dataclasses.replace(planned(x), layout=token_layouts(32, 64, 4, 5)[0])
    assert len(plan.layout.blocks()) > 1
    assert np.abs(plan.simulate(*taken(x)) - he.reference(x)[0]).max() <= plan.approximation + ROUNDING
    with pytest.raises(UnsupportedProblem, match="he: n_k = 4 and d = 65536 do not fit 8192 slots"):
        token_layouts(8192, 4, 65536, 1)


SESSIONS = {
    "the server divides": (sequence(4, 0, 6, 4, 3), {}, None),
    "p = 4, a context in the clear": (sequence(2, 6, 4, heads=2, p=4, epsilon=3.0), {"tolerance": 0.05}, None),
    "spans, the client divides": (sequence(7), CLIENT, (2, 2)),
    "spans of a context, and its rest": (sequence(4, 5), CLIENT, (2, 2)),
    "spans of a context, many parts": (sequence(4, 9, 8), CLIENT, (4, 1)),
    "spans of a context, no rest, whole": (sequence(3, 4), CLIENT | {"upload": "whole"}, (4, 4)),
}


@pytest.mark.parametrize("name", SESSIONS)
@apart
def test_encrypted_steps_are_within_the_bound(name, monkeypatch):
    x, more, layout = SESSIONS[name]
    if layout:
        with_layouts(monkeypatch, *layout)
    plan = planned(x, **more)
    client, server = begun(x, plan)
    out = decoded(client, server, x)
    assert np.abs(out - he.reference(x)[0]).max(initial=0) <= plan.error
    noise = np.abs(out - plan.simulate(*taken(x))).max()
    # bounds are for the worst inputs; these are random ones
    assert plan.noise / 20000 <= noise <= plan.noise
    assert server.tokens == client.tokens == x.n_q
    assert server.cache_bytes == plan.cache_bytes


def test_another_sequence_begins_where_the_cache_is_dropped(monkeypatch):
    x, y = sequence(3, 5), sequence(3, 5, seed=1)
    y = y.replace(key=np.concatenate([x.key[:, :, :5], y.key[:, :, 5:]], 2))
    y = y.replace(value=np.concatenate([x.value[:, :, :5], y.value[:, :, 5:]], 2))
    with_layouts(monkeypatch, 4, 2)
    plan = planned(x, **CLIENT, denominator=(1.0, 100.0), norms=(9.0, 9.0), value_most=9.0)
    client, server = begun(x, plan)
    first = decoded(client, server, x, 2)
    late = token(client, x, 2)
    server.drop()
    assert (server.tokens, server.cache_bytes) == (0, 0)
    client.begin()
    second = decoded(client, server, y)
    for out, z in ((first, x), (second, y)):
        assert np.abs(out - he.reference(z)[0, :, : out.shape[1]]).max() <= plan.error
    for message in (late, token(he.DecodingClient(plan), x, 0)):
        with pytest.raises(InvalidInput, match=r"a sequence whose cache was dropped|another client"):
            server.step(message)


def test_numbers_that_are_zero_in_the_clear(monkeypatch):
    """SEAL refuses products with nothing; a context may be it, in part."""
    with_layouts(monkeypatch, 2, 2)
    x = sequence(2, 8)
    k, v = x.key.copy(), x.value.copy()
    k[:, :, 2:4], v[:, :, 4:8] = 0.0, 0.0
    x = x.replace(key=k, value=v)
    plan = planned(x, **CLIENT)
    client, server = begun(x, plan)
    assert np.abs(decoded(client, server, x) - he.reference(x)[0]).max() <= plan.error
    nothing = x.replace(key=np.concatenate([0 * k[:, :, :8], k[:, :, 8:]], 2))
    client, server = begun(nothing, planned(nothing, **CLIENT))
    assert np.abs(decoded(client, server, nothing) - he.reference(nothing)[0]).max() <= plan.error


@pytest.mark.parametrize(("n", "context", "heads"), [(40, 0, 3), (20, 150, 12), (9, 64, 12)])
def test_no_step_takes_more_than_the_plan_says(n, context, heads):
    x = sequence(n, context, 12, heads=heads, epsilon=30.0)
    plan = planned(x)
    known = context_of(plan, taken(x)[3])
    cache, tokens = Cache(plan, known), [Counted(limbs) for limbs in plan.part_limbs()]
    before = 0
    for _ in range(n):
        m = Levels()
        cache = cache.appended(m, tokens)
        outs = cache.attend(m, tokens)
        assert {r % plan.ring.slots for r in m.rotations} <= set(plan.rotations)
        assert [y.limbs for y in outs] == [1] * plan.outs
        most = {what: c * len(plan.layout.blocks()) for what, c in plan.counts.items()}
        # but for the first token, to which the rest of the context is added
        assert all(most[what] >= c for what, c in m.counts.items() if what[0] != "add_plain" or before)
        switches = sum(c for (name, _), c in m.counts.items() if name == "switch_key")
        assert switches >= before
        before = switches
    assert switches == plan.report()["key_switches"]


def test_each_token_in_a_span_adds_its_noise():
    x = sequence(12, d=8, heads=2)
    plan = planned(x, **CLIENT)
    tokens, m = Tokens(plan), Sampled(plan.ring, 0)
    cache, exact = Cache(plan), 0
    q, k, v, _ = taken(x)
    for i in range(12):
        slots = tokens.encoded(q[:, i], k[:, i], v[:, i])
        cache = cache.appended(m, [m.fresh(s, limbs) for s, limbs in slots])
        exact = exact + slots[2][0]
    fresh = plan.ring.degree * (ERROR + 1 / 12) / 2.0 ** (2 * plan.ring.middle)
    seen = np.mean(np.abs(cache.values[0][0].slots - exact) ** 2)
    # 4096 complex numbers: their mean square is within 6 / sqrt(4096) of the variance but for a chance of 2e-9
    assert abs(seen / (12 * fresh) - 1) < 6 / np.sqrt(4096)
    assert plan.sums == 12
    # and the server's own cache has the same
    client, server = begun(x, plan)
    for i in range(2):
        server.step(token(client, x, i))
        held = client._decrypted(server._held.cache.values[0][0])
        own = Tokens(plan)
        wanted = sum(own.encoded(q[:, j], k[:, j], v[:, j])[2][0] for j in range(i + 1))
        # SEAL's noise in slots that belong together is not independent: half of it either way
        assert 0.5 < np.mean(np.abs(held - wanted) ** 2) / ((i + 1) * fresh) < 1.5


def test_the_noise_of_what_is_added_up_is_in_the_bound(monkeypatch):
    plan = planned(sequence(100, d=8, heads=1, epsilon=20.0))
    assert noise_of(plan) == plan.noise
    monkeypatch.setattr(DecodingPlan, "replies", 1)
    # the same but for how many results the chance is for
    assert abs(noise_of(plan) / plan.noise - quantile(8) / quantile(800)) < 1e-12
    found = []
    for sums in (1, 100, 10**10, 4 * 10**10):
        monkeypatch.setattr(DecodingPlan, "sums", sums)
        found.append(noise_of(plan))
    # a hundred is little beside the noise of key switching; where it is all that there is, its root counts
    assert found[0] < found[1] < 1.1 * found[0]
    assert 1.9 < found[3] / found[2] <= 2


@pytest.mark.parametrize(("p", "context"), [(2, 0), (4, 20)])
def test_steps_at_the_ends_of_the_ranges_come_near_the_bounds(p, context):
    """One key has all the weight of every later token, denominators go from the least to the largest."""
    n, d, epsilon, high = 32, 8, 0.5, 12.0
    most = 6.0
    plan = he.plan_decoding(
        n, d, heads=2, p=p, context=context, denominator=(epsilon, high), epsilon=epsilon, norms=(9.0, most),
        value_most=3.0, tolerance=0.03,
    )  # fmt: skip
    k = np.zeros((2, context + n, d))
    k[:, :, 1] = most
    k[0, 0], k[1, context] = most * np.eye(d)[0], most * np.eye(d)[0]  # of the context, and encrypted
    v = 3.0 * np.sign(np.random.default_rng(0).standard_normal((2, context + n, d)))
    wanted = np.geomspace(epsilon * (1 + 1e-6), high * (1 - 1e-9), n) - epsilon
    q = np.zeros((2, n, d))
    q[:, :, 0] = wanted ** (1 / p) * np.sqrt(d) / most
    given = (q, k[:, context:], v[:, context:], (k[:, :context], v[:, :context]) if context else None)
    x = Problem(q[None], k[None], v[None], variant="power", causal="bottom_right", options={"p": p, "epsilon": epsilon})
    exact, plain = he.reference(x)[0], plan.simulate(*given)
    drawn = [plan.simulate(*given, seed=seed) for seed in range(3)]
    error, noise = (max(float(np.abs(y - z).max()) for y in drawn) for z in (exact, plain))
    assert error <= plan.error <= 5 * error
    assert noise <= plan.noise <= 400 * noise  # a product's parts add up as if they were independent


def test_a_plan_says_what_a_token_and_the_cache_take():
    given = {"denominator": (12.0, 260.0), "epsilon": 12.0, "norms": (12.0, 12.0), "value_most": 4.5}
    plan = he.plan_decoding(128, 64, heads=12, **given)
    layout = plan.layout
    # at 1 Gbit/s two spans in four ciphertexts a key, not one span in eight
    assert (layout.columns, layout.rows, layout.groups, layout.parts, layout.spans) == (16, 64, 8, 4, 2)
    whole = he.plan_decoding(128, 64, heads=12, **given, upload="whole")
    assert (whole.layout.parts, whole.layout.spans) == (8, 1)
    limbs = plan.ring.levels + 1 + plan.value_limbs
    assert plan.cache_bytes == 8 * 16 * limbs * 16384
    assert 128 * plan.token_bytes >= plan.cache_bytes > 128 * (plan.token_bytes - 1)
    report = json.loads(json.dumps(plan.report()))
    assert (report["longest"], report["context"], report["cache_bytes"]) == (128, 0, plan.cache_bytes)
    assert re.fullmatch(
        r"a token: 0\.\d+ s on one core, [\d.]+ MB up, [\d.]+ MB of keys once, 128-bit security, error at most "
        r"0\.0\d+, of which noise \de-\d+, [\d.]+ kB of cache a token, [\d.]+ MB at 128",
        plan.words(),
    )
    longer = he.plan_decoding(68, 64, heads=12, context=60, **given)
    assert (plan.context_bytes, longer.context_bytes) == (0, 0)  # a rest is added to ciphertexts
    clear = dataclasses.replace(longer, context=128, n_k=200)
    assert (clear.context_bytes, clear.cache_bytes) == (plan.cache_bytes // 2, plan.cache_bytes)
    assert longer.words().endswith("after 60 in the clear")
    assert len({plan.digest, longer.digest, he.plan(1, 128, 64, heads=12, **given).digest}) == 3
    assert plan.warnings() == []
    large = dataclasses.replace(plan, n_k=64 * 128)
    assert large.warnings()[-1].startswith("the cache grows to ")
    for made in (plan, longer):
        again = plan_from_json(plan_to_json(made))
        assert (again, again.digest) == (made, made.digest)
    changed = json.loads(plan_to_json(longer))
    for name, value in (
        ("context", 99),
        ("context", -1),
        ("context", 10**9),
        ("n_q", 2),
        ("workers", 2),
        ("mode", "x"),
    ):
        text = json.dumps(changed | {"plan": changed["plan"] | {name: value}})
        with pytest.raises(InvalidInput, match=r"not what its digest says|what is no plan of decoding"):
            plan_from_json(text)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"longest": 0}, "longest: got 0, expected an integer of at least 1"),
        ({"longest": 2.0}, "longest: got 2.0, expected an integer"),
        ({"context": -1}, "context: got -1, expected an integer of at least 0"),
        ({"context": 2**14}, "n_k: got 16388, expected an integer of at least 1 and at most 16384"),
        ({"d": 0}, "d_k: got 0, expected an integer"),
        ({"p": 3}, "p: got 3, expected one of 2, 4, 6, 8"),
        ({"upload": "compact"}, "he: upload='compact' is not for decoding"),
        ({"upload": "x"}, "upload: got 'x', expected one of full, compact, whole"),
        ({"denominator": (0.5, 9.0)}, "with low at least epsilon = 1.0"),
    ],
)
def test_what_cannot_be_planned_has_no_meaning(changed, text):
    given = {"longest": 4, "d": 4, "denominator": (1.0, 9.0), "epsilon": 1.0, "norms": (3, 3), "value_most": 3}
    with pytest.raises((InvalidInput, UnsupportedProblem), match=text):
        he.plan_decoding(**given | changed)


def test_tokens_outside_the_plan_are_refused_and_are_none_of_the_sequence():
    x = sequence(3, 2, 4, heads=2)
    plan = planned(x, **CLIENT)
    q, k, v, context = taken(x)
    client = he.DecodingClient(plan, context[0])
    good = q[:, 0], k[:, 0], v[:, 0]
    for at, change, text in (
        (0, 100.0, "query: its largest row norm is .*, beyond the plan's"),
        (1, 100.0, "key: its largest row norm is .*, beyond the plan's"),
        (2, np.nan, "value: its largest element is nan, beyond the plan's"),
        (0, np.nan, "query: its largest row norm is nan, beyond the plan's"),
        (0, 0.001, r"denominator: head \d of token 0 has .*, outside the plan's \(.*\), where its inverse holds"),
    ):
        bad = list(good)
        bad[at] = bad[at] * change
        with pytest.raises(InvalidProblem, match=text):
            client.encrypt_token(*bad)
    for bad in (q[0], q[:, 0, :3], q, "x", q[:, 0] + 1j):
        with pytest.raises(InvalidProblem, match="query: got "):
            client.encrypt_token(bad, k[:, 0], v[:, 0])
    assert client.tokens == 0
    # without the context's keys a part of the denominator is known: too much is refused, too little is not
    blind = he.DecodingClient(plan)
    blind.encrypt_token(q[:, 0] * 0.001, k[:, 0], v[:, 0])
    wide = he.plan_decoding(2, 4, context=2, denominator=(1.0, 2.0), epsilon=1.0, norms=(9, 9), value_most=9, **CLIENT)
    with pytest.raises(InvalidProblem, match="denominator: head 0 of token 0 has "):
        he.DecodingClient(wide).encrypt_token(*[np.full((1, 4), 2.0)] * 3)


def test_denominators_are_those_over_all_tokens_so_far():
    given = {"denominator": (1.0, 5.0), "epsilon": 1.0, "norms": (9, 9), "value_most": 1, "scale": 1.0}
    client = he.DecodingClient(he.plan_decoding(4, 4, **given, **CLIENT))
    one = np.eye(4)[:1]
    for _ in range(2):
        client.encrypt_token(0 * one, one, one)
    # 1 + 4 + 4, though its own key adds nothing
    with pytest.raises(InvalidProblem, match=r"head 0 of token 2 has 9, outside the plan's \(1, 5\)"):
        client.encrypt_token(2 * one, np.eye(4)[1:2], one)


def test_contexts_that_are_not_the_plans_are_refused():
    x = sequence(2, 3, 4, heads=2)
    plan, none = planned(x, **CLIENT), planned(sequence(2, 0, 4, heads=2), **CLIENT)
    keys = he.DecodingClient(plan).evaluation_keys()
    k, v = taken(x)[3]
    for context, error, text in (
        (None, InvalidInput, r"context: got None, expected \(k, v\) of 3 tokens"),
        (k, InvalidInput, "context: got ndarray, expected"),
        ((k, v[:, :2]), InvalidProblem, r"context: got shape \(2, 2, 4\), expected \(2, 3, 4\)"),
        ((100 * k, v), InvalidProblem, "context: its largest row norm is .*, beyond"),
        ((k, v * np.inf), InvalidProblem, "context: its largest element is .*, beyond"),
    ):
        with pytest.raises(error, match=text):
            he.DecodingServer(plan, keys, context)
    for call in (
        lambda: he.DecodingServer(none, he.DecodingClient(none).evaluation_keys(), (k, v)),
        lambda: he.DecodingClient(none, k),
    ):
        with pytest.raises(InvalidInput, match="the plan has no tokens in the clear"):
            call()


def test_what_is_no_plan_of_decoding_is_refused():
    x = sequence(2, 0, 4, heads=2)
    plan = planned(x, **CLIENT)
    other = he.plan(1, 2, 4, denominator=(1.0, 2.0), epsilon=1.0, norms=(9, 9), value_most=9, **CLIENT)
    for call in (he.DecodingClient, lambda y: he.DecodingServer(y, b"")):
        with pytest.raises(InvalidInput, match=r"plan: got Plan, expected that of he.plan_decoding"):
            call(other)
    for call in (he.Client, lambda y: he.Server(y, b"")):
        with pytest.raises(InvalidInput, match="got DecodingPlan, expected a plan"):
            call(plan)
    with pytest.raises(InvalidInput, match="device: got 'tpu', expected 'cpu' or 'cuda'"):
        he.DecodingServer(plan, b"", device="tpu")
    with pytest.raises(InvalidInput, match="keys: got int, expected the bytes of"):
        he.DecodingServer(plan, 5)


def test_a_result_to_be_shown_has_noise_added():
    x = sequence(2, 0, 4, heads=2)
    plan = planned(x, **CLIENT)
    client, server = begun(x, plan)
    reply = server.step(token(client, x, 0))
    with pytest.raises(InvalidInput, match=r"share: got True, expected he.Sharing"):
        client.decrypt(reply, True)
    share = he.Sharing(20, 100)
    error = np.abs(client.decrypt(reply, share) - he.reference(x)[0, :, 0])
    # of 8 normal numbers the largest is below 0.1 deviations, or above 8, with a chance of 2e-9
    assert 0.1 < error.max() / share.deviation(plan.noise) < 8


def test_known_numbers_have_the_scale_and_the_noise_that_they_say():
    ring = planned(sequence(2)).ring
    m, ones = Sampled(ring, 0), np.ones(ring.slots, complex)
    a = m.rescale(m.square(m.fresh(ones, 4)))
    assert m.times(a, Plain(ones)).scale == a.scale**2
    traced = Trace(chain_of(ring))
    b = traced.input(3, 2.0**40)
    assert (traced.times(b, Plain(ones)).scale, traced.times(b, Plain(ones, 2.0**30)).scale) == (2.0**80, 2.0**70)
    bounds = Bounds(ring, 1.0, np.ones(1))
    for scale in (2.0**20, 2.0**30, 2.0**ring.middle):
        plain = Plain(3 * ones, scale)
        sampled, bound = m.times(m.fresh(ones, 4), plain), bounds.times(bounds.fresh(1.0), plain)
        assert (sampled.scale, bound.value) == (bound.scale, 3.0)
        seen = np.mean(np.abs(sampled.slots - 3) ** 2)
        # 8192 complex numbers: within 6 / sqrt(8192) but for a chance of 2e-9
        assert abs(seen / bound.variance[0] - 1) < 6 / np.sqrt(8192)
