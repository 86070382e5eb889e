"""Classifiers on ciphertexts, on data sets that scikit-learn brings: each test input, encrypted and in the clear.

A model is trained for seconds: a map of tokens to 64 features, power-softmax attention of 4 heads, p = 2, the mean over
tokens, a linear map. The server has the weights. "digits": images of 8 x 8, in 16 tokens of 2 x 2 pixels. "cells":
breast cancer, 10 measurements of cells as tokens, each with its mean, error and worst, scaled by the training inputs.
Processes share the inputs: each has a client and a server of its own. A GPU's server gets all test inputs, a CPU's the
first hundred of each set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import he
from refattn.arrays import cupy_with_gpu
from refattn.bench import Row, load
from refattn.errors import UnsupportedProblem

Float = NDArray[np.float64]
MOST = {"cpu": 100, "cuda": 1000}
"""Test inputs of a data set at most, by where the server computes."""


def data_sets() -> Iterator[tuple[str, Float, NDArray[np.int64], int]]:
    """Yield names, tokens (inputs, n, features), classes, and how many inputs are to train with.

    Raises
    ------
    UnsupportedProblem
        scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer, load_digits
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"bench he_data: needs PyTorch and scikit-learn: {e}") from e
    digits = load_digits()
    patches = (digits.images / 16).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    yield "digits", patches, digits.target, 1347
    cells = load_breast_cancer()
    yield "cells", cells.data.reshape(-1, 3, 10).transpose(0, 2, 1), cells.target, 427


def rows(device: str = "cpu") -> Iterator[Row]:
    """Yield the figures of each data set.

    Raises
    ------
    UnsupportedProblem
        PyTorch or scikit-learn is not installed; or there is no GPU where one is asked for.
    """
    if device == "cuda":
        cupy_with_gpu()
    for name, tokens, target, count in data_sets():
        order = np.random.default_rng(0).permutation(len(tokens))
        train, test = order[:count], order[count:][: MOST[device]]
        if name == "cells":
            tokens = np.clip((tokens - tokens[train].mean(0)) / tokens[train].std(0), -3, 3) / 3
        layer, clear = trained(tokens, target, train, test)
        seconds, ratio = timed(layer, tokens[test[0]], device)
        start = time.perf_counter()
        found = shared(layer, tokens[test], device)
        took = time.perf_counter() - start
        at = f"{name}, {len(test)} inputs"
        up = f"degree {layer.plan.ring.degree}, {layer.plan.upload_bytes / 1e6:.0f} MB up"
        yield Row(f"{at}, encrypted class as in the clear", float(np.mean(found == clear)), "share", at_least=1.0)
        yield Row(f"{at}, right", float(np.mean(found == target[test])), "share")
        yield Row(f"{at}, right in the clear", float(np.mean(clear == target[test])), "share")
        yield Row(f"{at}, all of them, clients and servers", took, "s")
        yield Row(f"{name}, {up}, server on {device}", seconds, "s")
        yield Row(f"{name}, predicted over measured time", ratio, "ratio")


def timed(layer: he.Layer, x: Float, device: str) -> tuple[float, float]:
    """Return the median seconds of a server, and predicted over measured time."""
    client = he.Client(layer.plan)
    with he.Server(layer, client.evaluation_keys(), device=device) as server:
        serve = partial(server.attend, client.encrypt(x))
        if device == "cpu":
            seconds, ratio = load("he").compared(layer.plan, 3, serve)
            return float(seconds), float(ratio)
        seconds = float(load("he_gpu").seconds(serve))
        return seconds, he.on_gpu(layer).bytes_ms / 1e3 / seconds


def shared(layer: he.Layer, x: Float, device: str) -> NDArray[np.int64]:
    """Return the classes of inputs, which processes share."""
    from joblib import Parallel, delayed  # scikit-learn brings it

    parts = np.array_split(x, min(8, os.cpu_count() or 1))
    return np.concatenate(Parallel(n_jobs=len(parts))(delayed(classes)(layer, part, device) for part in parts))


def classes(layer: he.Layer, x: Float, device: str) -> NDArray[np.int64]:
    """Return the classes of inputs, encrypted by one client and computed by one server."""
    client = he.Client(layer.plan)
    with he.Server(layer, client.evaluation_keys(), device=device) as server:
        return np.array([int(client.ask(tokens, server.attend).argmax()) for tokens in x])


def trained(
    tokens: Float, target: NDArray[np.int64], train: NDArray[np.int64], test: NDArray[np.int64]
) -> tuple[he.Layer, NDArray[np.int64]]:
    """Return a trained layer, and the classes that its model finds for the test inputs in the clear."""
    try:
        import torch

        from refattn.he import torch as nets
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"bench he_data: needs PyTorch and scikit-learn: {e}") from e
    x, y = torch.tensor(tokens, dtype=torch.float32), torch.tensor(target)
    torch.manual_seed(0)
    attention = nets.PowerSoftmaxAttention(64, 4, p=2, epsilon=1.0, denominator=(1.0, 12.0))
    n, features = tokens.shape[1:]
    model: Any = nets.Classifier(n, features, int(target.max()) + 1, attention, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for _ in range(60):
        for part in torch.randperm(len(train)).split(64):
            i = torch.tensor(train)[part]
            scores = model(x[i] + 0.03 * torch.randn(len(i), n, features))
            loss = torch.nn.functional.cross_entropy(scores, y[i]) + 30 * nets.range_penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        clear = model(x[test]).argmax(1).numpy()
        nets.polynomial(model, False)
        model(x[train])
    attention.set_range((1.0, 1.3 * attention.seen[1]), tolerance=3e-3)
    return he.Layer(nets.weights_of(model), tolerance=3e-3), clear
