"""Classifiers on ciphertexts, on data sets that scikit-learn brings: each test input, encrypted and in the clear.

A model is trained for seconds: a map of tokens to 64 features, power-softmax attention of 4 heads, p = 2, the mean over
tokens, a linear map. The server has the weights. "digits": images of 8 x 8, in 16 tokens of 2 x 2 pixels. "cells":
breast cancer, 10 measurements of cells as tokens, each with its mean, error and worst, scaled by the training inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import he
from refattn.bench import Row, load
from refattn.errors import UnsupportedProblem

Float = NDArray[np.float64]


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


def rows() -> Iterator[Row]:
    """Yield the figures of each data set."""
    for name, tokens, target, count in data_sets():
        order = np.random.default_rng(0).permutation(len(tokens))
        train, test = order[:count], order[count:]
        if name == "cells":
            tokens = np.clip((tokens - tokens[train].mean(0)) / tokens[train].std(0), -3, 3) / 3
        layer, clear = trained(tokens, target, train, test)
        client = he.Client(layer.plan)
        with he.Server(layer, client.evaluation_keys()) as server:
            query = client.encrypt(tokens[test[0]])
            seconds, ratio = load("he").compared(layer.plan, 3, partial(server.attend, query))
            found = [int(client.decrypt(server.attend(client.encrypt(tokens[i]))).argmax()) for i in test]
        at = f"{name}, {len(test)} inputs"
        up = f"degree {layer.plan.ring.degree}, {layer.plan.upload_bytes / 1e6:.0f} MB up"
        yield Row(f"{at}, encrypted class as in the clear", float(np.mean(found == clear)), "share", at_least=1.0)
        yield Row(f"{at}, right", float(np.mean(found == target[test])), "share")
        yield Row(f"{at}, right in the clear", float(np.mean(clear == target[test])), "share")
        yield Row(f"{name}, {up}, server", seconds, "s")
        yield Row(f"{name}, predicted over measured time", ratio, "ratio")


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
