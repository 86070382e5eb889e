"""A two-layer model trained for 200 steps in bfloat16 under torch.compile: our operator beside PyTorch's own.

Floor: two runs of one kernel whose weights differ by one rounding part from each other, too, as training is chaotic.
Eight such runs of PyTorch's flash kernel say how far; ours must be no further off than their mean and five standard
deviations, and so must cuDNN's. REFATTN_STEPS shortens a trial. The losses by step are in the JSON.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from refattn.bench import Row, gpu_torch

STEPS = int(os.environ.get("REFATTN_STEPS", "200"))
BATCH, LENGTH, WORDS, WIDTH, HEADS, LAYERS = 16, 256, 64, 256, 4, 2
RATE, RUNS = 1e-3, 8
Attend = Callable[[Any, Any, Any], Any]


def attends(torch: Any) -> dict[str, Attend]:
    """Return causal attention of (b, h, n, d) by each kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention

    def peer(backend: str) -> Attend:
        def attend(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    return {
        "refattn": lambda q, k, v: attention(q, k, v, causal="bottom_right"),
        "flash": peer("FLASH_ATTENTION"),
        "cuDNN": peer("CUDNN_ATTENTION"),
    }


def model(torch: Any, attend: Attend) -> Any:
    """Return a decoder: embeddings of words and places, layers of attention and a feed-forward part, a word's score."""
    nn = torch.nn

    class Layer(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
            self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.rest = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Any) -> Any:
            b, n, _ = x.shape
            parts = self.into(self.norms[0](x)).view(b, n, 3, HEADS, WIDTH // HEADS)
            q, k, v = (parts[:, :, i].transpose(1, 2) for i in range(3))
            x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
            return x + self.rest(self.norms[1](x))

    class Model(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.score = nn.Linear(WIDTH, WORDS)

        def forward(self, x: Any) -> Any:
            return self.score(self.layers(self.words(x) + self.places.weight))

    return Model()


def sentences(torch: Any) -> Any:
    """Return the batches: a word depends on the one before and on one far back, which attention has to find."""
    source = torch.Generator(device="cuda").manual_seed(1)
    follows = torch.randint(WORDS, (WORDS, WORDS), device="cuda", generator=source)
    x = torch.randint(WORDS, (STEPS, BATCH, LENGTH + 1), device="cuda", generator=source)
    for i in range(17, LENGTH + 1):
        known = torch.rand((STEPS, BATCH), device="cuda", generator=source) < 0.9
        x[..., i] = torch.where(known, follows[x[..., i - 1], x[..., i - 17]], x[..., i])
    return x


def losses(torch: Any, attend: Attend, data: Any, nudged: int | None = None) -> list[float]:
    """Return the loss by step; nudged: the seed of changes of the weights by up to half a place of bfloat16."""
    torch.manual_seed(0)
    net = model(torch, attend).cuda()
    if nudged is not None:
        source = torch.Generator(device="cuda").manual_seed(nudged)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + 2.0**-9 * (2 * torch.rand(p.shape, device="cuda", generator=source) - 1))
    compiled = torch.compile(net, fullgraph=True)
    steps = torch.optim.AdamW(net.parameters(), RATE)
    found = []
    for batch in data:
        with torch.autocast("cuda", torch.bfloat16):
            score = compiled(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(score.float().reshape(-1, WORDS), batch[:, 1:].reshape(-1))
        steps.zero_grad()
        loss.backward()
        steps.step()
        found.append(loss.detach())
    return [float(x) for x in torch.stack(found).cpu()]


def gap(one: list[float], other: list[float]) -> float:
    """Return how far two curves are from each other: the mean of the distances by step."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def rows() -> Iterator[Row]:
    """Losses at the end, distances to PyTorch's flash kernel, and the curves."""
    torch = gpu_torch()
    torch._dynamo.config.recompile_limit = 64
    data, kernels = sentences(torch), attends(torch)
    curves = {name: losses(torch, attend, data) for name, attend in kernels.items()}
    nudged = [losses(torch, kernels["flash"], data, seed) for seed in range(RUNS)]
    apart = [gap(x, curves["flash"]) for x in nudged]
    most = statistics.fmean(apart) + 5 * statistics.stdev(apart)
    for name, curve in curves.items():
        yield Row(f"{name}: loss of the first step", curve[0], "nats")
        yield Row(f"{name}: mean loss of the last ten steps", statistics.fmean(curve[-10:]), "nats")
    yield Row(f"{RUNS} runs of flash, weights nudged: mean distance to flash", statistics.fmean(apart), "nats")
    for name in ("refattn", "cuDNN"):
        yield Row(f"{name}: mean distance to flash", gap(curves[name], curves["flash"]), "nats", at_most=most)
    for i in range(0, len(data), 5):
        for name, curve in (*curves.items(), ("flash, nudged", nudged[0])):
            yield Row(f"step {i + 1}: {name}", curve[i], "nats")
