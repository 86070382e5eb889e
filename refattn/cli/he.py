"""The command line: refattn he, attention on ciphertexts: plan, serve, query."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np

from ..errors import InvalidInput
from ..files import load_problem, write_text, write_whole

__all__ = ["he"]


@click.group()
def he() -> None:
    """Power-softmax or sigmoid attention on encrypted inputs: plan a call, serve it, query a server."""


@he.command(name="plan")
@click.argument("sizes", metavar="[N_Q N_K D_K D_V HEADS]", nargs=-1, type=int)
@click.option("--from", "data", type=click.Path(exists=True, dir_okay=False), help="Measure sizes and ranges on this.")
@click.option("--margin", type=float, help="With --from: the room that ranges get.  [default: 0.2]")
@click.option("--operator", help="What is computed: power or sigmoid.  [default: power]")
@click.option("--p", type=int, help="The even power: 2, 4, 6 or 8.  [default: 2]")
@click.option("--denominator", type=(float, float), help="The range of the denominators.")
@click.option("--epsilon", type=float, help="Added to the denominators.  [default: 0]")
@click.option("--scores", type=(float, float), help="Of sigmoid attention: the range of scale·q·k + offset.")
@click.option("--offset", type=float, help="Of sigmoid attention: added to every score.  [default: -log(N_K)]")
@click.option("--norms", type=(float, float), help="The largest norms of a query and of a key row.")
@click.option("--value-most", type=float, help="The largest size of an element of value.")
@click.option("--tolerance", default=1e-2, show_default=True, help="The largest error of an element of out.")
@click.option("--normalize", type=click.Choice(["server", "client"]), default="server", show_default=True)
@click.option("--mode", type=click.Choice(["latency", "throughput"]), default="latency", show_default=True)
@click.option("--upload", type=click.Choice(["full", "compact", "whole"]), default="full", show_default=True)
@click.option("--decoding", is_flag=True, help="Plan N_Q encrypted tokens, one by one, after N_K - N_Q in the clear.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What to predict times for."
)
@click.option("-o", "--output", help="Write the plan to this file, for `serve` and for clients.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--raw", is_flag=True, help="Print all numbers as a table.")
def plan_(
    sizes: tuple[int, ...], data: str | None, margin: float | None, device: str, output: str | None, as_json: bool,
    raw: bool, operator: str | None, **given: Any,
) -> None:  # fmt: skip
    """Plan an encrypted call: ring, levels, keys, time, bytes and error, before any key exists.

    The operator is power-softmax attention, or sigmoid attention: --scores stands for --denominator then.

    Sizes and ranges are told, or measured on a problem's .npz file (--from); what is told counts before what is
    measured. With --device cuda the plan is the same, and what a GPU takes for it is told beside one core's time.
    """
    from ..he import on_gpu
    from ..he.commanded import planned
    from ..he.saved import plan_to_json

    made = planned(sizes, data, margin, operator, given)
    if output:
        write_text(output, plan_to_json(made))
    gpu = on_gpu(made) if device == "cuda" else None
    if as_json:
        click.echo(json.dumps(made.report() | ({} if gpu is None else {"gpu": asdict(gpu)}), indent=1))
    else:
        click.echo(made.table() if raw else made.words())
        if gpu is not None:
            click.echo(gpu.words())
    for text in made.warnings(None if gpu is None else gpu.bytes_ms / 1e3):
        click.echo(f"warning: {text}", err=True)


@he.command()
@click.argument("program", metavar="PLAN.json|WEIGHTS.npz", type=click.Path(exists=True, dir_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one; it is printed.")
@click.option("--operator", help="Refuse a plan of another.  [default: the plan's]")
@click.option("--sessions", default=8, show_default=True, help="The most sessions at once: a process and keys each.")
@click.option("--expire", default=3600.0, show_default=True, help="Seconds without a query after which one ends.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
@click.option("--tolerance", default=1e-2, show_default=True, help="Of a layer's polynomial for 1/D, relative.")
@click.option("--upload", type=click.Choice(["full", "whole"]), help="Of a layer; a plan has its own.  [default: full]")
@click.option("--context", type=click.Path(exists=True, dir_okay=False), help="A plan's tokens in the clear: .npz.")
@click.option("--certificate", help="A file with a TLS certificate.")
@click.option("--key", help="The file with its key.")
@click.option(
    "--tokens", "token_file", help="A file with bearer tokens, one a line; others may not read it (mode 600)."
)
def serve(
    program: str,
    host: str,
    port: int,
    certificate: str | None,
    key: str | None,
    token_file: str | None,
    context: str | None,
    operator: str | None,
    **given: Any,
) -> None:
    """Serve a plan of attention or of decoding, or a layer with its weights, over HTTP.

    Beyond this machine (--host) a token is demanded of every request. A context has arrays key and value, (heads,
    tokens, d).
    """
    from ..arrays import cupy_with_gpu
    from ..he import DecodingPlan, Encoder, EncoderWeights, Layer, Plan
    from ..he.commanded import check_operator
    from ..he.listen import listen
    from ..he.saved import load_weights, plan_from_json
    from ..he.service import service
    from ..he.tokens import demand, read_tokens

    tokens = None if token_file is None else read_tokens(token_file)
    demand(host, tokens)
    if (certificate is None) != (key is None):
        raise InvalidInput("serve: --certificate and --key go together")
    for name, file in (("certificate", certificate), ("key", key)):
        if file is not None and not Path(file).is_file():
            raise InvalidInput(f"serve: --{name}: there is no file {file}")
    if given["device"] == "cuda":
        cupy_with_gpu()  # refused now where there is none, not with the first client
    what: Any
    if program.endswith(".npz"):
        weights = load_weights(program)
        made = (given["tolerance"], given["upload"] or "full")
        if isinstance(weights, EncoderWeights):
            what = Encoder(weights, *made, device=given["device"])
        else:
            what = Layer(weights, *made)
    else:
        what = plan_from_json(Path(program).read_bytes())
        if not isinstance(what, Plan | DecodingPlan):
            raise InvalidInput(f"serve: {program} is no plan of attention; serve a layer's or an encoder's weights")
        if given["upload"]:
            raise InvalidInput(f"serve: --upload is for a layer's weights; {program} is a plan, which has its own")
    check_operator(operator, program, what.plan)
    known = None if context is None else _context(context)
    app = service(what, given["sessions"], given["expire"], tokens=tokens, device=given["device"], context=known)
    where = {"certificate": certificate, "key": key}
    listen(app, host, port, **where, announce=lambda url: click.echo(f"listening at {url}"))  # type: ignore[arg-type]


def _context(path: str) -> tuple[Any, Any]:
    """Return the keys and values of a file."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return found["key"], found["value"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, BadZipFile) as e:
        raise InvalidInput(f"serve: --context: {path} is no .npz file of key and value: {e}") from e


class _Steps:
    """Tells on stderr how long each step of a query took; an upload ends a step of its own."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def sent(self, part: int, whole: int) -> None:
        """Tell when all bytes of a message are sent."""
        if part == whole:
            self.done(f"upload {whole / 1e6:.1f} MB")

    def done(self, what: str) -> None:
        now = time.monotonic()
        click.echo(f"{what:24} {now - self._since:6.2f} s", err=True)
        self._since = now


@he.command()
@click.argument("url")
@click.argument("source", metavar="INPUT", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, help="The .npy file for the result.")
@click.option("--plan", "expected", type=click.Path(exists=True, dir_okay=False), help="Refuse a server with another.")
@click.option("--operator", help="Take INPUT's arrays as its call; refuse a server of another.")
@click.option("--token-file", help="A file with the token that the server demands (mode 600).")
def query(
    url: str, source: str, output: str, expected: str | None, operator: str | None, token_file: str | None
) -> None:
    """Encrypt INPUT, have a server compute, decrypt the result.

    INPUT is a problem's .npz file for a plan of attention or of decoding, whose queries are those of the tokens, or a
    .npy file with an (n, d) array for a layer. Keys are made for this one query; the secret one stays here.
    """
    from ..he import Client, DecodingClient, DecodingPlan
    from ..he.commanded import check_operator
    from ..he.inputs import called, sequence_of
    from ..he.remote import Remote
    from ..he.saved import plan_from_json
    from ..he.tokens import read_tokens
    from ..he.wire import MASKED, kind_of

    token = None if token_file is None else read_tokens(token_file)[0]
    x: Any
    if source.endswith(".npz"):
        x = load_problem(source)
    else:
        try:
            x = np.load(source, allow_pickle=False)
        except (OSError, ValueError) as e:
            raise InvalidInput(f"{source}: not a .npy file: {e}") from e
    steps = _Steps()
    with Remote(url, token=token, sent=steps.sent) as server:
        plan = server.plan()
        if expected is not None and plan_from_json(Path(expected).read_bytes()).digest != plan.digest:
            raise InvalidInput(f"{url} has another plan than {expected}")
        check_operator(operator, url, plan)
        x = x if operator is None else called(plan, x)
        if isinstance(plan, DecodingPlan):
            tokens, known = sequence_of(plan, x)
        else:
            plan.encoded(x)  # a wrong input is refused before keys are made
        click.echo(plan.words(), err=True)
        client = DecodingClient(plan, known) if isinstance(plan, DecodingPlan) else Client(plan)
        keys = client.evaluation_keys()
        steps.done("keys")
        server.open(keys)
        steps.done("server reads keys")
        if isinstance(client, DecodingClient):
            found = []
            for i, part in enumerate(tokens):
                found.append(client.decrypt(server.step(client.encrypt_token(*part))))
                steps.done(f"token {i}")
            return _written(output, np.stack(found, 1)[None])
        answer = client.encrypt(x)
        steps.done("encrypt")
        answer = server.attend(answer)
        steps.done("compute")
        while kind_of(answer) == MASKED:
            fresh = client.refresh(answer)
            steps.done("refresh")
            answer = server.attend(fresh)
            steps.done("compute")
        out = client.decrypt(answer)
        steps.done("decrypt")
    _written(output, out)


def _written(output: str, out: Any) -> None:
    write_whole(output, lambda f: np.save(f, out))
    click.echo(f"{output}: {' x '.join(map(str, out.shape))}")
