"""Power-softmax attention on ciphertexts (CKKS, by TenSEAL's binding of SEAL): plan, simulate, client, server."""

from .inputs import reference, simulate
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan, plan
from .sessions import Client, Server, Sharing
from .weights import Feedforward, Weights

__all__ = [
    "Client", "Feedforward", "Layer", "LayerPlan", "Plan", "Server", "Sharing", "Weights", "plan", "reference",
    "simulate",
]  # fmt: skip
