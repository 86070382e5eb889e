"""Changes of valid input: of bytes, of a zip's members, of JSON values."""

import io
import json
import zipfile

ODD = (
    0,
    -1,
    2**31,
    2**63,
    10**400,
    1e308,
    5e-324,
    float("nan"),
    True,
    None,
    "",
    "inf",
    "0x1p9999",
    "[/red]",
    [],
    {},
    [[1]],
)


def of_bytes(rng, data):
    """Bytes with a few changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(found) + 1), rng.choice((1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + n] = b""
        elif kind == 2:
            found[at:at] = rng.randbytes(n)
        elif kind == 3:
            found[at : at + n] = bytes(rng.choice((0x00, 0xFF, 0x7F)) for _ in range(n))
        elif kind == 4:
            del found[at:]
        else:
            found[at:at] = found[at // 2 : at // 2 + n]
    return bytes(found)


def of_json(rng, text):
    """JSON text with one value, or one name, that is another."""
    value = json.loads(text)
    places = list(_places(value))
    inside, at = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        inside.pop(at)
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(("x", "", "scale", at.upper()))] = inside.pop(at)
    elif kind == 2:
        other, there = rng.choice(places)
        inside[at] = other[there] if there in (other if isinstance(other, dict) else range(len(other))) else None
    else:
        inside[at] = rng.choice(ODD)
    return json.dumps(value).encode()


def _places(value):
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, x in inside:
        yield value, at
        yield from _places(x)


def of_zip(rng, data):
    """A zip with a member that is changed, missing, twice there or another's."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(n, file.read(n)) for n in file.namelist()]
    at, other = rng.randrange(len(members)), rng.randrange(len(members))
    name, content = members[at]
    kind = rng.randrange(4)
    if kind == 0:
        members.pop(at)
    elif kind == 1:
        members[at] = (name, members[other][1])
    elif kind == 2:
        members[at] = (name + rng.choice((".npy", "x", "/..")), content)
    else:
        members[at] = (name, of_bytes(rng, content))
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as file:
        for n, x in members:
            file.writestr(n, x)
    return found.getvalue()
