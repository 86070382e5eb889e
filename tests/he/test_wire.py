"""Messages: each byte of them, and what is refused and says why."""

import struct
from dataclasses import FrozenInstanceError, replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput
from refattn.he import wire

KINDS = {1: "evaluation keys", 2: "a query", 3: "a reply"}
HEAD, DIGEST, MOST_PARTS = 80, 32, 65536


def named(size):
    return st.binary(min_size=size, max_size=size)


MESSAGES = st.builds(
    wire.Message,
    kind=st.sampled_from(list(KINDS)),
    plan=named(32),
    client=named(16),
    query=named(16),
    parts=st.lists(st.binary(max_size=20), max_size=5).map(tuple),
)


def written(m, magic=b"refattn-he", version=2, count=None, sizes=None, more=b""):
    """Return a message's bytes, or those of one that is wrong though its digest fits."""
    head = magic + bytes((version, m.kind)) + m.plan + m.client + m.query
    head += struct.pack("<I", len(m.parts) if count is None else count)
    head += b"".join(struct.pack("<Q", x) for x in (map(len, m.parts) if sizes is None else sizes))
    digest = sha256(head + b"".join(sha256(p).digest() for p in m.parts)).digest()
    return head + b"".join(m.parts) + more + digest


def refused(data, m, text, **given):
    """Assert that what is no message as m is refused with a text."""
    with pytest.raises(InvalidInput) as e:
        wire.unpack(data, m.kind, m.plan, given.pop("most", len(data)), **given)
    assert str(e.value) == text


def other(value, values):
    return values.filter(lambda x: x != value)


def changed(data, start, stop):
    """Yield some bytes with one bit of a slice changed, for each of it."""
    for at in range(start, stop):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@given(m=MESSAGES)
def test_each_byte_of_a_message_is_known(m):
    data = wire.pack(m)
    assert data == written(m)
    assert wire.unpack(data, m.kind, m.plan, len(data)) == m
    assert wire.unpack(data, m.kind, m.plan, len(data), parts=len(m.parts)) == m


def test_kinds_have_numbers():
    assert list(KINDS) == [wire.KEYS, wire.QUERY, wire.REPLY]


@given(m=MESSAGES)
def test_a_message_does_not_change(m):
    with pytest.raises(FrozenInstanceError):
        m.parts = ()


@given(m=MESSAGES)
def test_what_looks_at_parts_is_what_was_given(m):
    seen = []

    def each(function, some):
        seen.extend(x for parts in some for x in parts)
        return map(function, some)

    data = wire.pack(m)
    assert wire.unpack(data, m.kind, m.plan, len(data), each) == m
    assert seen == list(m.parts)


@given(m=MESSAGES)
def test_what_is_no_message_is_refused(m):
    good = written(m)
    text = f"he: got {len(good)} bytes, expected at most {len(good) - 1} for {KINDS[m.kind]} of this plan"
    refused(good, m, text, most=len(good) - 1)
    for size in range(HEAD + DIGEST):
        refused(good[:size], m, f"he: got {size} bytes that are no message; expected {KINDS[m.kind]}")
    for magic in changed(b"refattn-he", 0, 10):
        refused(written(m, magic), m, f"he: got {len(good)} bytes that are no message; expected {KINDS[m.kind]}")


@given(m=MESSAGES, data=st.data())
def test_what_is_for_something_else_is_refused(m, data):
    version, kind = (data.draw(other(x, st.integers(0, 255))) for x in (2, m.kind))
    refused(written(m, version=version), m, f"he: got a message of version {version}, expected 2")
    for found in {kind, *KINDS} - {m.kind}:
        text = f"he: got {KINDS.get(found, f'kind {found}')}, expected {KINDS[m.kind]}"
        refused(written(replace(m, kind=found)), m, text)
    text = f"he: got {KINDS[m.kind]} of another plan; client and server must use the same one"
    for plan in changed(m.plan, 0, 32):
        refused(written(replace(m, plan=plan)), m, text)


@given(m=MESSAGES, data=st.data())
def test_another_number_of_parts_is_refused(m, data):
    count = len(m.parts)
    parts = data.draw(other(count, st.integers(0, 2**32 - 1)))
    text = f"he: got {KINDS[m.kind]} of {count} parts, expected {parts} by the plan"
    refused(written(m), m, text, parts=parts)
    many = data.draw(st.integers(MOST_PARTS + 1, 2**32 - 1))
    text = f"he: got {KINDS[m.kind]} of {many} parts, expected at most {MOST_PARTS} by the plan"
    refused(written(m, count=many), m, text)
    text = f"he: got {KINDS[m.kind]} of {many} parts, expected {count} by the plan"
    refused(written(m, count=many), m, text, parts=count)


def test_the_most_parts_are_taken_where_no_number_is_said():
    m = wire.Message(wire.QUERY, bytes(32), bytes(16), bytes(16), (b"",) * MOST_PARTS)
    data = wire.pack(m)
    assert wire.unpack(data, m.kind, m.plan, len(data)) == m
    more = replace(m, parts=(*m.parts, b""))
    data = wire.pack(more)
    text = f"he: got a query of {MOST_PARTS + 1} parts, expected at most {MOST_PARTS} by the plan"
    refused(data, m, text)
    assert wire.unpack(data, m.kind, m.plan, len(data), parts=MOST_PARTS + 1) == more


@given(m=MESSAGES, data=st.data())
def test_what_was_changed_on_its_way_says_how(m, data):
    begin = "he: the message was cut short or changed on its way: "
    count = data.draw(st.integers(1, MOST_PARTS))
    short = bytes(8 * count - data.draw(st.integers(1, 8)))
    bad = written(replace(m, parts=()), count=count, more=short)
    refused(bad, m, f"{begin}it says it has {count} parts, more than its bytes hold")
    more = data.draw(st.binary(min_size=1, max_size=20))
    refused(written(m, more=more), m, f"{begin}its parts do not fill it")
    sizes = [len(p) for p in m.parts]
    if sizes:
        sizes[data.draw(st.integers(0, len(sizes) - 1))] += data.draw(st.integers(1, 2**32))
        refused(written(m, sizes=sizes), m, f"{begin}its parts do not fill it")
    size = data.draw(st.integers(1, 2**64 - 1))  # and one that makes up for it, were it read as less than 0
    bad = written(replace(m, parts=(*m.parts, b"", b"")), sizes=[*map(len, m.parts), size, 2**64 - size])
    refused(bad, m, f"{begin}its parts do not fill it")
    good = written(m)
    first = HEAD + 8 * len(m.parts)  # of the parts
    for bad in (*changed(good, HEAD - 36, HEAD - 4), *changed(good, first, len(good))):
        refused(bad, m, f"{begin}its digest does not fit")


@given(m=MESSAGES)
def test_what_a_query_is_named_by_needs_its_head_alone(m):
    good = wire.pack(m)
    assert wire.query_of(good) == m.query
    assert wire.query_of(good[:HEAD]) == m.query
    for size in range(HEAD):
        assert wire.query_of(good[:size]) == b""
    for bad in changed(good, 0, 10):
        assert wire.query_of(bad) == b""
