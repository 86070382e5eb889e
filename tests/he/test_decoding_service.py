"""Decoding over HTTP: sequences of several clients, what is refused, what ends, and the commands."""

import asyncio
import os

import numpy as np
import pytest
from click.testing import CliRunner

from refattn import InvalidInput, InvalidProblem, he, save_problem
from refattn.cli.main import main
from refattn.he import hosted, service, wire
from refattn.he.inputs import sequence_of
from refattn.he.saved import plan_from_json

from . import forge
from .make import planned as planned_call
from .make import problem
from .make_decoding import planned, sequence, taken, token
from .test_service import opened, running

pytest.importorskip("tenseal")
pytest.importorskip("httpx")
pytest.importorskip("starlette")
X = sequence(3, 2, 2, heads=1)
PLAN = planned(X, normalize="client", tolerance=1.0)
KNOWN = taken(X)[3]
EXACT = he.reference(X)[0]


def near(client, answer, i):
    assert answer.status_code == 200, answer.text
    return np.abs(client.decrypt(answer.content) - EXACT[:, i]).max() <= PLAN.error


def dies():
    os._exit(1)


def test_sequences_do_not_get_in_each_others_way(monkeypatch):
    async def go():
        async with running(PLAN, context=KNOWN) as http:
            a, b = he.DecodingClient(PLAN, KNOWN[0]), he.DecodingClient(PLAN)
            at_a, at_b = [await opened(http, x) for x in (a, b)]
            one, two = token(a, X, 0), token(b, X, 0)
            answers = await asyncio.gather(
                *(http.post(at + "/queries", content=x) for at, x in ((at_a, one), (at_b, two)))
            )
            assert all(near(client, answer, 0) for client, answer in zip((a, b), answers, strict=True))
            late, early = token(a, X, 1), token(a, X, 2)
            renamed = forge.repacked(one, wire.TOKEN, PLAN, forge.parts_of(one, wire.TOKEN, PLAN), os.urandom(16))
            for where, body, status, text in (
                (at_a, one, 409, "this query was asked before"),
                (at_a, renamed, 400, "got token 0 again, expected token 1: each comes once, in order"),
                (at_a, early, 400, "got token 2 before those between, expected token 1"),
                (at_a, token(b, X, 1), 400, "got a token of another client"),
                (at_a, late[:-9], 400, "the message was cut short or changed"),
                (at_a, b"x" * 100, 400, "no message; expected a token"),
                (at_a, bytes(3 * (PLAN.upload_bytes + 2**20)), 413, "expected at most"),
                (at_b, a.evaluation_keys(), 413, "expected at most"),
                ("/sessions/" + "0" * 64, late, 404, "there is no such session"),
            ):
                answer = await http.post(where + "/queries", content=body)
                assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text
            # the cache is as it was, and what came too early may come again
            assert near(a, await http.post(at_a + "/queries", content=late), 1)
            assert near(a, await http.post(at_a + "/queries", content=early), 2)
            # a client whose sequence is dropped begins another; the other client's goes on
            assert (await http.delete(at_a + "/sequence")).status_code == 204
            a.begin()
            assert near(a, await http.post(at_a + "/queries", content=token(a, X, 0)), 0)
            b._tokens.count -= 1  # the token that another session refused
            b._tokens._keys = b._tokens._keys[:, :-1]
            assert near(b, await http.post(at_b + "/queries", content=token(b, X, 1)), 1)
            assert (await http.delete(at_a)).status_code == 204
            answer = await http.delete(at_a + "/sequence")
            assert (answer.status_code, "there is no such session" in answer.json()["error"]) == (404, True)
            # dropping waits its turn, and a process that dies takes its session with it
            desk = http._transport.app.routes[0].endpoint.__self__
            (session,) = desk.open.values()
            session.running = service.WAITING
            answer = await http.delete(at_b + "/sequence")
            assert (answer.status_code, "are waiting" in answer.json()["error"]) == (429, True)
            session.running = 0
            monkeypatch.setattr(hosted, "_drop", dies)
            answer = await http.delete(at_b + "/sequence")
            assert (answer.status_code, "process ended" in answer.json()["error"]) == (500, True)
            assert not desk.open

    asyncio.run(go())


def test_a_context_is_looked_at_before_a_client_comes():
    for program, context, error, text in (
        (PLAN, None, InvalidInput, r"context: got None, expected \(k, v\) of 2 tokens"),
        (PLAN, (KNOWN[0], KNOWN[1][:, :1]), InvalidProblem, r"context: got shape \(1, 1, 2\), expected \(1, 2, 2\)"),
        (planned_call(problem(2, 2, 2, epsilon=1.0)), KNOWN, InvalidInput, "context: got one, expected None"),
    ):
        with pytest.raises(error, match=text):
            service.service(program, context=context)


def test_a_session_may_take_what_its_cache_takes():
    given = {"denominator": (1.0, 9.0), "epsilon": 1.0, "norms": (9, 9), "value_most": 9, "tolerance": 1.0}
    few, many = (he.plan_decoding(n, 64, heads=12, normalize="client", **given) for n in (64, 512))
    grown = many.cache_bytes - few.cache_bytes
    assert hosted.memory_of(many) - hosted.memory_of(few) >= 3 * grown > 0


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda x: x.replace(causal=None), "causal: a token sees those before it and itself"),
        (lambda x: x.replace(causal="top_left"), "causal: a token sees those before it and itself"),
        (lambda x: sequence(4, 2, 2, heads=1), "query: got 4 tokens after 2 in the clear"),
        (lambda x: sequence(3, 1, 2, heads=1), "query: got 3 tokens after 1 in the clear"),
        (lambda x: sequence(3, 2, 3, heads=1), "d_k: got 3, expected the plan's 2"),
        (lambda x: x.replace(options={"p": 4, "epsilon": 1.0}), "p: got 4, expected the plan's 2"),
    ],
)
def test_what_is_no_sequence_of_the_plan_is_refused(changed, text):
    with pytest.raises(InvalidProblem, match=text):
        sequence_of(PLAN, changed(X))


def test_fewer_tokens_than_the_longest_are_a_sequence():
    tokens, known = sequence_of(PLAN, X.replace(query=X.query[:, :, :2], key=X.key[:, :, :4], value=X.value[:, :, :4]))
    assert len(tokens) == 2
    q, k, v, context = taken(X)
    assert all(np.array_equal(a, b) for a, b in zip(tokens[1], (q[:, 1], k[:, 1], v[:, 1]), strict=True))
    assert np.array_equal(known, context[0])


def test_the_commands_plan_serve_and_query(tmp_path, served):
    run = CliRunner().invoke
    save_problem(X, tmp_path / "in.npz")
    np.savez(tmp_path / "known.npz", key=KNOWN[0], value=KNOWN[1])
    np.savez(tmp_path / "half.npz", key=KNOWN[0])
    (tmp_path / "none.npz").write_text("none")
    path = str(tmp_path / "plan.json")
    command = ["he", "plan", "--from", str(tmp_path / "in.npz"), "--decoding", "--device", "cuda", "-o", path]
    done = run(main, [*command, "--normalize", "client"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("a token: ")
    assert "on a GPU" in done.output
    plan = plan_from_json((tmp_path / "plan.json").read_bytes())
    assert (plan.longest, plan.context) == (3, 2)
    for more, text in (
        ([], "context: got None, expected (k, v) of 2 tokens"),
        (["--context", str(tmp_path / "half.npz")], "is no .npz file of key and value"),
        (["--context", str(tmp_path / "none.npz")], "is no .npz file of key and value"),
    ):
        done = run(main, ["he", "serve", path, *more])
        assert (done.exit_code, text in done.output) == (2, True), done.output
    url = served(path, "--context", str(tmp_path / "known.npz"))
    done = run(main, ["he", "query", url, str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npy")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.npy'}: 1 x 1 x 3 x 2\n"), done.output
    assert [x[:7] for x in done.stderr.splitlines() if x.startswith("token")] == ["token 0", "token 1", "token 2"]
    assert np.abs(np.load(tmp_path / "out.npy") - he.reference(X)).max() <= plan.error
    refused = run(main, [*command, "--mode", "throughput"])
    assert (refused.exit_code, "--decoding goes with --mode latency" in refused.output) == (2, True)
