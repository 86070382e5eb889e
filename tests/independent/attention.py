"""Attention in mpmath, written from docs/contract.md alone: no line of refattn is used here.

Numbers carry 2400 bits. A result below half of the smallest float64 rounds to 0, and one nearer than 2**-1000 to the
middle between two numbers of a format is taken for the middle: then the even one is the answer.
"""

from mpmath import MPContext

mp = MPContext()  # of its own: the precision of everybody else's stays as it is
mp.prec = 2400
mpf = mp.mpf
INF = mpf("inf")
FORMATS = {
    # precision, least and largest exponent
    "float64": (53, -1022, 1023),
    "float32": (24, -126, 127),
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float8_e5m2": (3, -14, 15),
}


def nearest(x, dtype):
    """The number of a format that is nearest to x, as a Python float."""
    precision, low, high = FORMATS[dtype]
    if x == 0 or mp.isinf(x) or mp.isnan(x):
        return float(x)
    exponent = max(mp.frexp(x)[1] - 1, low) - (precision - 1)
    steps = abs(x) / mpf(2) ** exponent
    whole = mp.floor(steps)
    over = steps - whole - mpf(1) / 2
    up = int(whole) % 2 == 1 if abs(over) < mpf(2) ** -1000 else over > 0
    found = (whole + up) * mpf(2) ** exponent
    found = INF if found >= mpf(2) ** (high + 1) else found
    return float(-found if x < 0 else found)


def softmax(call):
    """out, lse and gradients of a call, which is a dict of nested lists and numbers by the names of Problem."""
    b, h, n_q, n_k = (call[n] for n in ("batch", "heads", "n_q", "n_k"))
    d_k, d_v, group = call["d_k"], call["d_v"], call["heads"] // call["heads_kv"]
    scale = 1 / mp.sqrt(d_k) if call["scale"] is None else mpf(call["scale"])
    found = {"out": zeros(b, h, n_q, d_v), "lse": zeros(b, h, n_q)}
    dout = call["dout"]
    if dout is not None:
        found |= {
            "dq": zeros(b, h, n_q, d_k),
            "dk": zeros(b, h // group, n_k, d_k),
            "dv": zeros(b, h // group, n_k, d_v),
        }
        found |= {} if call["bias"] is None else {"dbias": zeros(*shape(call["bias"]))}
        found |= {} if call["sink"] is None else {"dsink": zeros(h)}
    for i_b in range(b):
        for i_h in range(h):
            q, k, v = call["query"][i_b][i_h], call["key"][i_b][i_h // group], call["value"][i_b][i_h // group]
            for i in range(n_q):
                if unused(call, i_b, i):
                    found["lse"][i_b][i_h][i] = -INF
                    continue
                arriving = dout and (dout[i_b][i_h][i], call["dlse"][i_b][i_h][i] if call["dlse"] else 0)
                row(call, found, (i_b, i_h, i_h // group, i), scale, q[i], k, v, arriving)
    return found


def row(call, found, place, scale, q, k, v, arriving):
    """Add what one row gives."""
    i_b, i_h, i_kv, i = place
    seen = [j for j in range(call["n_k"]) if visible(call, i_b, i_h, i, j)]
    raw = {j: scale * dot(q, k[j]) for j in seen}
    cap = None if call["softcap"] is None else mpf(call["softcap"])
    slope = {j: mpf(1) if cap is None else 1 - mp.tanh(raw[j] / cap) ** 2 for j in seen}
    score = {j: raw[j] if cap is None else cap * mp.tanh(raw[j] / cap) for j in seen}
    for j in seen:
        if call["bias"] is not None:
            score[j] += spread(call["bias"], i_b, i_h, i, j)
    sink = None if call["sink"] is None else mpf(call["sink"][i_h])
    top = max([*score.values(), *([] if sink is None else [sink])], default=None)
    if top is None or mp.isinf(top):
        found["lse"][i_b][i_h][i] = -INF
        return
    weight = {j: mp.exp(score[j] - top) for j in seen}
    for j in seen:
        if call["weight"] is not None:
            weight[j] *= spread(call["weight"], i_b, i_h, i, j)
    alone = mpf(0) if sink is None else mp.exp(sink - top)
    total = mp.fsum(weight.values()) + alone
    if total == 0:
        found["lse"][i_b][i_h][i] = -INF
        return
    p = {j: w / total for j, w in weight.items()}
    out = [mp.fsum(p[j] * v[j][c] for j in seen) for c in range(call["d_v"])]
    found["out"][i_b][i_h][i], found["lse"][i_b][i_h][i] = out, top + mp.log(total)
    if arriving is None:
        return
    dout, dlse = arriving
    delta = dot(dout, out) - mpf(dlse)
    for j in seen:
        ds = p[j] * (dot(dout, v[j]) - delta)
        for c in range(call["d_v"]):
            found["dv"][i_b][i_kv][j][c] += p[j] * dout[c]
        for c in range(call["d_k"]):
            found["dq"][i_b][i_h][i][c] += scale * ds * slope[j] * k[j][c]
            found["dk"][i_b][i_kv][j][c] += scale * ds * slope[j] * q[c]
        if call["bias"] is not None:
            at = [x if n > 1 else 0 for x, n in zip((i_b, i_h, i, j), shape(call["bias"]), strict=True)]
            found["dbias"][at[0]][at[1]][at[2]][at[3]] += ds
    if sink is not None:
        found["dsink"][i_h] -= alone / total * delta


def other(call):
    """out of linear, power and sigmoid attention, whose rows weigh keys by a number each."""
    b, h, n_q = (call[n] for n in ("batch", "heads", "n_q"))
    group, found = h // call["heads_kv"], zeros(b, h, n_q, call["d_v"])
    one = call["variant"] == "linear"
    scale = mpf(call["scale"]) if call["scale"] is not None else mpf(1) if one else 1 / mp.sqrt(call["d_k"])
    for i_b in range(b):
        for i_h in range(h):
            q, k, v = call["query"][i_b][i_h], call["key"][i_b][i_h // group], call["value"][i_b][i_h // group]
            for i in range(n_q):
                seen = [j for j in range(call["n_k"]) if visible(call, i_b, i_h, i, j)]
                if seen:
                    w, by = WEIGHTS[call["variant"]](call, (i_b, i_h, i), seen, scale, q[i], k)
                    top = [mp.fsum(x * v[j][c] for j, x in w.items()) for c in range(call["d_v"])]
                    found[i_b][i_h][i] = [x / by if by else mp.nan for x in top]
    return {"out": found}


def linear(call, place, seen, scale, q, k):
    phi = {
        "identity": mpf,
        "relu": lambda x: max(mpf(x), mpf(0)),
        "elu1": lambda x: mpf(x) + 1 if x > 0 else mp.exp(x),
        "exp": mp.exp,
    }[call["options"].get("feature", "elu1")]
    w = {j: scale * dot([phi(x) for x in q], [phi(x) for x in k[j]]) for j in seen}
    return w, mp.fsum(w.values()) if call["options"].get("normalize", True) else mpf(1)


def power(call, place, seen, scale, q, k):
    options = {"p": 4, "epsilon": 0.001, "form": "plain", "delta": 1e-6, **call["options"]}
    x = {j: scale * dot(q, k[j]) for j in seen}
    if options["form"] == "stable":
        most = max(abs(y) for y in x.values()) + mpf(options["delta"])
        x = {j: y / most for j, y in x.items()}
    w = {j: y ** options["p"] / (len(seen) if options["form"] == "mean" else 1) for j, y in x.items()}
    return w, mpf(options["epsilon"]) + mp.fsum(w.values())


def sigmoid(call, place, seen, scale, q, k):
    i_b, i_h, i = place
    ends = next(s for s in call["sequences"] if s[0] <= i < s[1])
    offset = call["options"].get("offset")
    add = -mp.log(ends[3] - ends[2]) if offset is None else mpf(offset)
    score = {j: scale * dot(q, k[j]) + add for j in seen}
    if call["bias"] is not None:
        score = {j: x + spread(call["bias"], i_b, i_h, i, j) for j, x in score.items()}
    return {j: 1 / (1 + mp.exp(-x)) for j, x in score.items()}, mpf(1)


WEIGHTS = {"linear": linear, "power": power, "sigmoid": sigmoid}


def unused(call, i_b, i):
    """Whether a row lies behind those that are used."""
    if call["lengths_q"] is None:
        return False
    many = len(call["sequences"])
    ends = [(s[0], s[0] + call["lengths_q"][at if many > 1 else i_b]) for at, s in enumerate(call["sequences"])]
    return not any(first <= i < end for first, end in ends)


def visible(call, i_b, i_h, i, j):
    """Whether a row may see a key."""
    for number, (first_q, end_q, first_k, end_k) in enumerate(call["sequences"]):
        at = number if len(call["sequences"]) > 1 else i_b
        if call["lengths_q"] is not None:
            end_q = first_q + call["lengths_q"][at]
        if call["lengths_k"] is not None:
            end_k = first_k + call["lengths_k"][at]
        if first_q <= i < end_q:
            if not first_k <= j < end_k:
                return False
            corner = 0 if "top_left" in (call["causal"], call["alignment"]) else (end_k - first_k) - (end_q - first_q)
            if call["offset"] is not None:
                corner += call["offset"] if isinstance(call["offset"], int) else call["offset"][at]
            ahead = (j - first_k) - (i - first_q) - corner
            break
    else:
        return False
    left, right = call["window"] or (None, None)
    return not (
        (call["causal"] is not None and ahead > 0)
        or (left is not None and ahead < -left)
        or (right is not None and ahead > right)
        or (call["allowed"] is not None and not spread(call["allowed"], i_b, i_h, i, j))
        or (call["bias"] is not None and mp.isinf(spread(call["bias"], i_b, i_h, i, j)))
        or (call["weight"] is not None and spread(call["weight"], i_b, i_h, i, j) == 0)
    )


def spread(x, i_b, i_h, i, j):
    """An element of an array whose axes of length 1 stand for all."""
    for at in (i_b, i_h, i, j):
        x = x[at if len(x) > 1 else 0]
    return x


def dot(x, y):
    return mp.fsum(mpf(a) * b for a, b in zip(x, y, strict=True))


def zeros(*size):
    return [zeros(*size[1:]) for _ in range(size[0])] if size else mpf(0)


def shape(x):
    return [len(x), len(x[0]), len(x[0][0]), len(x[0][0][0])]
