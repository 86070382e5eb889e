"""Over HTTP: a server in a process of its own, its client, what it refuses, and that it stays up."""

import asyncio
import json
import os
import re
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from refattn import InvalidInput, he, save_problem
from refattn.cli.main import main
from refattn.errors import ServiceError
from refattn.he import hosted
from refattn.he.saved import load_weights, plan_from_json, plan_to_json, save_weights
from refattn.he.service import Remote, service

from .make import planned, problem
from .test_layer import layer

pytest.importorskip("tenseal")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
CALL = problem(4, 4, 4, epsilon=1.0)
PLAN = planned(CALL, normalize="client")


def test_plans_survive_json():
    for plan in (PLAN, planned(CALL), he.Layer(layer(classes=3)[0]).plan):
        again = plan_from_json(plan_to_json(plan))
        assert again.digest == plan.digest
        assert again.report() == plan.report()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda j: "{}", "got what is no plan: KeyError"),
        (lambda j: "[]", "got what is no plan: TypeError"),
        (lambda j: json.dumps(j | {"version": 1}), "got a plan of version 1, expected 2"),
        (lambda j: json.dumps(j | {"refattn": "x"}), "got 'x', expected a plan"),
        (lambda j: json.dumps(j | {"digest": "00"}), "the plan is not what its digest says"),
        (lambda j: json.dumps(j | {"plan": j["plan"] | {"n": 10**9}}), "the plan's sizes do not fit its slots"),
        (
            lambda j: json.dumps(j | {"plan": j["plan"] | {"ring": j["plan"]["ring"] | {"levels": 40}}}),
            "the plan's ring is not within 128 bits of security",
        ),
    ],
)
def test_what_is_no_plan_is_refused(change, text):
    good = json.loads(plan_to_json(he.Layer(layer(classes=3)[0]).plan))
    with pytest.raises(InvalidInput, match=re.escape(text)):
        plan_from_json(change(good))


@pytest.mark.parametrize("classes", [0, 3])
def test_weights_survive_a_file(tmp_path, classes):
    weights, x, _ = layer(classes=classes)
    save_weights(weights, tmp_path / "w.npz")
    again = load_weights(tmp_path / "w.npz")
    np.testing.assert_array_equal(he.Layer(again).simulate(x), he.Layer(weights).simulate(x))


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    from refattn.files import save_arrays

    with pytest.raises(InvalidInput, match=r"w\.npz"):
        load_weights(tmp_path / "w.npz")
    save_arrays({"settings": np.frombuffer(b'{"version": 1}', np.uint8)}, tmp_path / "w.npz")
    with pytest.raises(InvalidInput, match="not a layer's weights: KeyError"):
        load_weights(tmp_path / "w.npz")


@asynccontextmanager
async def running(program=PLAN, **more):
    """Yield an HTTP client of an application in this process."""
    app = service(program, **more)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
    ):
        yield client


async def opened(http, client):
    answer = await http.post("/sessions", content=client.evaluation_keys())
    assert answer.status_code == 201, answer.text
    return f"/sessions/{answer.json()['session']}"


def test_clients_do_not_get_in_each_others_way():
    async def go():
        async with running() as http:
            a, b = he.Client(PLAN), he.Client(PLAN)
            at_a, at_b = await asyncio.gather(opened(http, a), opened(http, b))
            one, two = a.encrypt(CALL), b.encrypt(CALL)
            answers = await asyncio.gather(
                http.post(at_a + "/queries", content=one), http.post(at_b + "/queries", content=two)
            )
            for client, answer in zip((a, b), answers, strict=True):
                out = client.decrypt(answer.content)
                assert np.abs(out - he.reference(CALL)).max() <= PLAN.error
            for where, body, status, text in (
                (at_a, one, 409, "this query was asked before"),
                (at_a, b.encrypt(CALL), 400, "got a query of another client"),
                (at_b, a.encrypt(CALL)[:-9], 400, "the message was cut short or changed"),
                (at_b, b"x" * 100, 400, "no message; expected a query"),
                (at_b, bytes(3 * (PLAN.upload_bytes + 2**20)), 413, "expected at most"),
                (at_b, a.evaluation_keys(), 413, "expected at most"),
                ("/sessions/" + "0" * 64, one, 404, "there is no such session"),
            ):
                answer = await http.post(where + "/queries", content=body)
                assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text
            answer = await http.delete(at_b + "/sequence")
            assert (answer.status_code, "nothing is decoded here" in answer.json()["error"]) == (404, True)
            # and it is still up
            answer = await http.post(at_b + "/queries", content=b.encrypt(CALL))
            assert np.abs(b.decrypt(answer.content) - he.reference(CALL)).max() <= PLAN.error
            assert (await http.delete(at_a)).status_code == 204
            assert (await http.post(at_a + "/queries", content=a.encrypt(CALL))).status_code == 404

    asyncio.run(go())


def test_sessions_have_limits_and_expire(monkeypatch):
    from refattn.he import service as module

    async def go():
        client = he.Client(PLAN)
        async with running(sessions=1, seconds=60.0) as http:
            at = await opened(http, client)
            answer = await http.post("/sessions", content=client.evaluation_keys())
            assert (answer.status_code, answer.json()["error"]) == (503, "all 1 sessions are in use; try later")
            later = module._now() + 61
            monkeypatch.setattr(module, "_now", lambda: later)
            answer = await http.post(at + "/queries", content=client.encrypt(CALL))
            assert answer.status_code == 404
            other = he.Client(planned(CALL, normalize="client", value_most=9.0))
            for body, text in (
                (other.evaluation_keys(), "got evaluation keys of another plan"),
                (client.encrypt(CALL), "got a query, expected evaluation keys"),
                (b"", "got 0 bytes that are no message"),
            ):
                answer = await http.post("/sessions", content=body)
                assert (answer.status_code, text in answer.json()["error"]) == (400, True), answer.text
            # what failed left no session behind
            await opened(http, client)

    asyncio.run(go())


def dies(query):
    os._exit(1)


def test_a_process_that_dies_takes_only_its_session(monkeypatch):
    async def go():
        monkeypatch.setattr(hosted, "_attend", dies)
        async with running() as http:
            client = he.Client(PLAN)
            at = await opened(http, client)
            answer = await http.post(at + "/queries", content=client.encrypt(CALL))
            assert (answer.status_code, "process ended" in answer.json()["error"]) == (500, True)
            assert (await http.post(at + "/queries", content=client.encrypt(CALL))).status_code == 404
            await opened(http, client)

    asyncio.run(go())


def test_the_commands_plan_serve_and_query(tmp_path, served):
    run = CliRunner().invoke
    low, high = PLAN.denominator
    arguments = [
        "he",
        "plan",
        "4",
        "4",
        "4",
        "4",
        "1",
        "--denominator",
        low,
        high,
        "--epsilon",
        "1",
        "--norms",
        *PLAN.norms,
    ]
    arguments += ["--value-most", PLAN.value_most, "--normalize", "client", "-o", tmp_path / "plan.json", "--json"]
    done = run(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["degree"] == PLAN.ring.degree
    save_problem(CALL, tmp_path / "in.npz")
    url = served(tmp_path / "plan.json")
    command = ["he", "query", url, str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npy")]
    done = run(main, [*command, "--plan", str(tmp_path / "plan.json")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.npy'}: 1 x 1 x 4 x 4\n")
    steps = [line[:24].split()[0] for line in done.stderr.splitlines()[1:]]
    assert steps == ["keys", "upload", "server", "encrypt", "upload", "compute", "decrypt"]
    assert "128-bit security" in done.stderr.splitlines()[0]
    assert np.abs(np.load(tmp_path / "out.npy") - he.reference(CALL)).max() <= PLAN.error
    (tmp_path / "other.json").write_text(plan_to_json(planned(CALL)))
    done = run(main, [*command, "--plan", str(tmp_path / "other.json")])
    assert (done.exit_code, "has another plan than" in done.output) == (2, True)
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    done = run(main, ["he", "query", url, str(tmp_path / "x.npy"), "-o", str(tmp_path / "out.npy")])
    assert (done.exit_code, "got ndarray, expected a Problem" in done.output) == (2, True)


def test_a_layer_is_served_from_its_file(tmp_path, served):
    weights, x, _ = layer(n=4, d=4, heads=1, d_k=4, classes=2)
    save_weights(weights, tmp_path / "w.npz")
    np.save(tmp_path / "x.npy", x)
    url = served(tmp_path / "w.npz", "--tolerance", "0.05")
    done = CliRunner().invoke(main, ["he", "query", url, str(tmp_path / "x.npy"), "-o", str(tmp_path / "out.npy")])
    assert done.exit_code == 0, done.output
    expected = he.Layer(weights, 0.05).simulate(x)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)


def test_a_server_that_is_not_there_is_named():
    with Remote("http://127.0.0.1:9") as server:
        with pytest.raises(ServiceError, match="does not answer: ConnectError"):
            server.plan()
        with pytest.raises(InvalidInput, match="open a session with evaluation keys first"):
            server.attend(b"")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--certificate", "x.pem"], "serve: --certificate and --key go together"),
        (["--certificate", "x.pem", "--key", "y.pem"], "serve: --certificate: there is no file x.pem"),
        (["--sessions", "0"], "got 0 sessions and 3600.0 seconds"),
        (["--upload", "whole"], "serve: --upload is for a layer's weights"),
    ],
)
def test_serving_refuses_what_it_cannot_do(tmp_path, arguments, text):
    (tmp_path / "plan.json").write_text(plan_to_json(PLAN))
    done = CliRunner().invoke(main, ["he", "serve", str(tmp_path / "plan.json"), *arguments])
    assert (done.exit_code, text in done.output) == (2, True), done.output


def test_the_plan_of_a_layer_alone_is_not_served(tmp_path):
    weights = layer(classes=3)[0]
    (tmp_path / "plan.json").write_text(plan_to_json(he.Layer(replace(weights, p=4)).plan))
    done = CliRunner().invoke(main, ["he", "serve", str(tmp_path / "plan.json")])
    assert (done.exit_code, "serve a layer's or an encoder's weights" in done.output) == (2, True), done.output
