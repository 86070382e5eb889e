"""Decoding on a device that is emulated: words are SEAL's, the cache stays as it was where a step fails."""

import numpy as np
import pytest

from refattn import InvalidInput, UnsupportedProblem, he
from refattn.he import decoding, wire
from refattn.he.cache import context_of
from refattn.he.device.decoding import is_zero, kinds_of, step_of
from refattn.he.device.predict import COSTS, on_gpu
from refattn.he.device.session import ROOM
from refattn.he.linear import Plain
from refattn.he.seal import to_bytes

from .. import forge, make_sigmoid
from ..make_decoding import planned, sequence, taken, token, with_layouts
from .emulated import GXX, Emulated
from .rounds import contents

pytest.importorskip("tenseal")
CLIENT = {"normalize": "client", "tolerance": 1.0}
SESSIONS = {
    "spans, keys of several parts": (sequence(3, 0, 4, heads=2), CLIENT, (2, 1)),
    "spans of a context, and its rest, whole": (sequence(2, 5, 2, heads=1), CLIENT | {"upload": "whole"}, (4, 1)),
}


@pytest.fixture
def stands_for(folder, monkeypatch):
    """Have servers use what stands for a GPU; the devices that were made are returned."""
    made = []

    def of(degree):
        made.append(Emulated(degree, folder, order=len(made) % 2))
        return made[-1]

    monkeypatch.setattr(decoding, "Card", of)
    return made


def three(x, plan):
    """Return a client, SEAL's server and one with a GPU."""
    context = taken(x)[3]
    client = he.DecodingClient(plan, None if context is None else context[0])
    keys = client.evaluation_keys()
    return client, he.DecodingServer(plan, keys, context), he.DecodingServer(plan, keys, context, device="cuda")


@GXX
@pytest.mark.parametrize("name", SESSIONS)
def test_words_are_seals(name, stands_for, monkeypatch):
    x, more, layout = SESSIONS[name]
    with_layouts(monkeypatch, *layout)
    plan = planned(x, **more)
    client, cpu, gpu = three(x, plan)
    exact = he.reference(x)[0]
    with gpu:
        for i in range(x.n_q):
            message = token(client, x, i)
            theirs, ours = cpu.step(message), gpu.step(message)
            assert contents(plan, ours) == contents(plan, theirs), i
            assert np.abs(client.decrypt(ours) - exact[:, i]).max() <= plan.error
            assert (gpu.tokens, gpu.cache_bytes) == (cpu.tokens, cpu.cache_bytes)
        (device,) = stands_for
        assert device.ends_are_whole()
        given, found = sum(x.nbytes - 512 for x in device.given), on_gpu(plan)
        assert found.memory_bytes + ROOM >= given > found.ciphertext_bytes + plan.cache_bytes
        # what the cache holds is what SEAL's holds
        (keys, values), held = gpu._held._places(0, 1)[:2], cpu._held.cache
        for at, of in ((keys, held.keys[0]), (values, held.values[0])):
            for address, theirs in zip(at, of, strict=False):
                limbs = theirs.coeff_modulus_size()
                assert device.get(address, 16 * limbs * plan.ring.degree).tobytes() in forge.body(to_bytes(theirs))
        gpu.drop()
        assert not any(device.get(x, 8).any() for x in (*keys, *values))
        client.begin()
        cpu.drop()
        message = token(client, x, 0)
        assert contents(plan, gpu.step(message)) == contents(plan, cpu.step(message))
    assert device.ended
    with pytest.raises(InvalidInput, match="the session on the GPU is closed; make another Server"):
        gpu.step(token(client, x, 1))


@GXX
def test_words_of_sigmoid_attention_are_seals(stands_for):
    x = make_sigmoid.call(2, 2, 2, heads=1, causal="bottom_right")
    plan = he.plan_sigmoid_decoding(2, 2, heads=1, **he.ranges(x), tolerance=0.2)
    client, cpu, gpu = three(x, plan)
    with gpu:
        for i in range(2):
            message = token(client, x, i)
            assert contents(plan, gpu.step(message)) == contents(plan, cpu.step(message))


@GXX
def test_a_step_that_fails_leaves_the_cache_as_it_was(stands_for, monkeypatch):
    x = sequence(2, 0, 4, heads=2)
    with_layouts(monkeypatch, 2, 1)  # two ciphertexts of a key: with one of them cancelled the reply is still a secret
    plan = planned(x, **CLIENT, upload="whole")
    client, cpu, gpu = three(x, plan)
    first = token(client, x, 0)
    assert contents(plan, gpu.step(first)) == contents(plan, cpu.step(first))
    message = token(client, x, 1)
    parts = forge.parts_of(message, wire.TOKEN, plan)
    m, held = cpu._held.arithmetic, cpu._held.cache
    # the sum with the negative of what the cache holds has no second polynomial
    of_k, of_v = (
        [forge.saved_as(parts[3], forge.body(to_bytes(m.negate(x)))) for x in of[0]] for of in (held.keys, held.values)
    )
    for bad, text in (
        ([*parts[:3], forge.with_fields(parts[3], scale=1.0), *parts[4:]], "no Ciphertext of this plan"),
        ([*parts[:-1], b""], "no Ciphertext of this plan"),
        ([*parts[:3], of_k[0], *parts[4:]], "the cache would lie open; encrypt it anew"),
        ([*parts[:-1], of_v[1]], "the cache would lie open; encrypt it anew"),
        ([*parts[:-2], *of_v], "a result's second polynomial is zero"),
    ):
        with pytest.raises(InvalidInput, match=text):
            gpu.step(forge.repacked(message, wire.TOKEN, plan, bad))
        assert gpu.tokens == 1
    with pytest.raises(InvalidInput, match="got token 0 again, expected token 1"):
        gpu.step(first)
    assert contents(plan, gpu.step(message)) == contents(plan, cpu.step(message))


@GXX
def test_a_session_without_memory_is_refused(folder, monkeypatch):
    plan = planned(sequence(2, 0, 2, heads=1), **CLIENT)
    most = on_gpu(plan).memory_bytes
    monkeypatch.setattr(decoding, "Card", lambda degree: Emulated(degree, folder, most=most))
    with pytest.raises(UnsupportedProblem, match=r"takes \d\.\d\d GB of the GPU's memory, of which"):
        he.DecodingServer(plan, he.DecodingClient(plan).evaluation_keys(), device="cuda")


def test_kinds_are_those_of_a_cache_that_grows(monkeypatch):
    for n, context, rows in ((9, 0, 4), (9, 5, 4), (4, 3, 4), (6, 8, 2), (3, 0, 1)):
        with_layouts(monkeypatch, rows, 1)
        plan, spans, seen = planned(sequence(n, context), **CLIENT), 0, {}
        at = context % rows
        for count in range(n):  # by filling rows
            fresh = count == 0 or at == rows
            at = (at if count == 0 else 0 if fresh else at) + 1
            spans += fresh
            seen.setdefault((spans, fresh), count)
        assert kinds_of(plan) == seen
        assert plan.shared_of(plan.layout, plan.n_k, plan.context)[0] == spans * plan.layout.parts


def test_a_step_has_the_operations_that_the_plan_counts():
    x = sequence(4, 2, 6, heads=2)
    plan = planned(x)
    k, v = taken(x)[3]
    schedule = step_of(plan, context_of(plan, (k, v)), plan.longest - 1)
    switches = sum(
        1 for s in schedule.steps for op in s.operations if op.name in ("relinearize", "shrink", "galois")
    )  # fmt: skip
    assert switches == sum(c for (name, _), c in plan.counts.items() if name == "switch_key")
    assert (schedule.came, schedule.held, schedule.kept) == (len(plan.part_limbs()), 2, 2)


def test_zeros_in_the_clear_are_told_as_seal_tells_them():
    x = sequence(2, 8)
    plan = planned(x, **CLIENT)
    ones = np.ones(plan.ring.slots, complex)
    found = [is_zero(plan, Plain(factor * ones)) for factor in (0.0, 0.4 * 2.0**-plan.ring.middle, 1.0)]
    assert found == [True, True, False]


def test_a_token_is_predicted_with_the_longest_cache():
    x = sequence(4, 2, 6, heads=2)
    plan = planned(x)
    found = on_gpu(plan)
    shorter = on_gpu(planned(sequence(2, 2, 6, heads=2)))
    assert found.computing_ms > 0
    assert found.memory_bytes > shorter.ciphertext_bytes
    assert f"by what an {COSTS.machine}" in found.words()
