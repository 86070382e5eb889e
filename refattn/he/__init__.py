"""Power-softmax attention on ciphertexts (CKKS, by TenSEAL's binding of SEAL): plan, simulate, client, server."""

from .inputs import simulate
from .plan import Plan, plan
from .sessions import Client, Server

__all__ = ["Client", "Plan", "Server", "plan", "simulate"]
