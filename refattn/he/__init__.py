"""Power-softmax attention on ciphertexts (CKKS, by TenSEAL's binding of SEAL): plan, simulate, client, server."""

from .decoding import DecodingClient, DecodingServer
from .decoding_plan import DecodingPlan, plan_decoding
from .device.predict import GpuTimes, on_gpu
from .drawn import noise_bound
from .encoder import Encoder
from .encoder_plan import EncoderPlan
from .inputs import reference, simulate
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan, plan
from .ranges import ranges
from .sessions import Client, Server, Sharing
from .sigmoid import SigmoidPlan, plan_sigmoid
from .sigmoid_decoding import SigmoidDecodingPlan, plan_sigmoid_decoding
from .weights import EncoderWeights, Feedforward, Weights

__all__ = [
    "Client", "DecodingClient", "DecodingPlan", "DecodingServer", "Encoder", "EncoderPlan", "EncoderWeights",
    "Feedforward", "GpuTimes", "Layer", "LayerPlan", "Plan", "Server", "Sharing", "SigmoidDecodingPlan",
    "SigmoidPlan", "Weights", "noise_bound", "on_gpu", "plan", "plan_decoding", "plan_sigmoid", "plan_sigmoid_decoding",
    "ranges", "reference", "simulate",
]  # fmt: skip
