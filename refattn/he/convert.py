"""From one's own PyTorch model: attention, activations and normalisations replaced by those that ciphertexts allow.

Weights stay. Softmax and an even power are different functions: a converted model is fine-tuned before it is used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import InvalidInput
from ..validation import shown
from .arguments import check_margin, check_power, is_number
from .blocks import Block, Encoder
from .modules import (
    PolynomialActivation,
    PolynomialLayerNorm,
    PolynomialRMSNorm,
    PowerMultiheadAttention,
    PowerSoftmaxAttention,
    measured,
)

__all__ = ["RECIPE", "Converted", "PowerSelfAttention", "convert"]

RECIPE = """\
1. Train a while with he.torch.anneal(model, share), share from 0 to 1: from softmax to the even power.
2. Add 1 to 30 times he.torch.range_penalty(model) to the loss: it keeps what the polynomials see in range.
3. he.ranges(model, data) with training data takes the polynomials for the ranges that are seen, with room.
4. Train a few more epochs with he.torch.polynomial(model): what is trained is then what is computed on ciphertexts.
5. he.torch.weights_of(model, n) and he.Encoder(...), for one block he.Layer(...), plan the encrypted model."""
NOTHING = "nothing was found to change: what a forward calls as a function (torch.nn.functional) is not seen"


@dataclass(frozen=True)
class Converted:
    """What became of a model.

    Attributes
    ----------
    model : module
        The converted copy.
    changed : dict of str to str
        By name of the part, what it is now.
    left : dict of str to str
        By name of the part, why it was left as it is, or what of it ciphertexts do not allow.
    recipe : str
        How it is fine-tuned.
    """

    model: nn.Module
    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    recipe: str = RECIPE

    @property
    def encryptable(self) -> bool:
        """Whether ``weights_of`` takes the model as it is."""
        return isinstance(self.model, Block | Encoder)

    def __str__(self) -> str:
        lines = [f"{name or 'the model'}: {what}" for name, what in self.changed.items()] or [NOTHING]
        lines += [f"left: {name or 'the model'}: {why}" for name, why in self.left.items()]
        return "\n".join([*lines, "", self.recipe])


class PowerSelfAttention(nn.Module):  # type: ignore[misc]
    """What calls the self-attention of Hugging Face's BERT calls this: no output projection, masks that add numbers."""

    def __init__(self, attention: PowerSoftmaxAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Any, attention_mask: Any = None, *args: Any, **kwargs: Any) -> tuple[Any]:
        """Return attention in a tuple; a key is hidden where the mask is below 0."""
        return (self.attention(hidden_states, None if attention_mask is None else attention_mask < 0),)


@dataclass(frozen=True)
class _Choice:
    """What parts are made with."""

    p: int
    epsilon: float
    tolerance: float
    causal: bool
    done: dict[int, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    """What stands for a part that is met again, which so stays one part; by identity."""


def convert(
    model: nn.Module, data: Any = None, *, p: int = 2, epsilon: float = 1.0, tolerance: float = 1e-2,
    causal: bool = False, margin: float = 0.2,
) -> Converted:  # fmt: skip
    """Return a copy of a model with power-softmax attention and polynomial parts, its weights kept.

    Converted whole, to a ``Block`` or an ``Encoder`` that is computed on ciphertexts: ``nn.TransformerEncoderLayer``
    and ``nn.TransformerEncoder`` with ``norm_first=True``, layers like those of Hugging Face's ViT and an
    ``nn.Sequential`` of them, with GELU or SiLU.
    Layer normalisation becomes root-mean-square normalisation there: the mean over features is taken out of all that is
    written to the residual instead, which gives the same numbers after every normalisation. The result lacks its mean,
    too: what follows, a linear head for one, is trained on as well. Converted by parts, to be
    trained in the clear: ``nn.MultiheadAttention``, attention as in Hugging Face's BERT, ``nn.GELU``, ``nn.SiLU``,
    ``nn.LayerNorm`` and ``nn.RMSNorm`` wherever they are.

    Parameters
    ----------
    model : module
        It stays as it is.
    data : tensor, optional
        What its forward takes: the polynomials are taken for the ranges that are seen, as by ``he.ranges``.
    p, epsilon : int, float
        The even power, and what is added to denominators.
    tolerance : float
        The largest relative error of polynomials for 1/D; 2e-2 is that of the others.
    causal : bool
        Whether tokens see themselves and those before them only.
    margin : float
        The room that ranges get.

    Raises
    ------
    InvalidInput
        It is no module, or a number is out of its range.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    check_power(p)
    for name, x in (("epsilon", epsilon), ("tolerance", tolerance)):
        if not is_number(x) or x <= 0:
            raise InvalidInput(f"{name}: got {shown(x)}, expected a number above 0")
    check_margin(margin)
    if not isinstance(causal, bool):
        raise InvalidInput(f"causal: got {shown(causal)}, expected True or False")
    found = Converted(nn.Module())
    made = _walked(copy.deepcopy(model), "", _Choice(p, float(epsilon), tolerance, causal), found)
    done = Converted(made, found.changed, found.left)
    if data is not None:
        was = made.training
        measured(made.eval(), data, margin)
        made.train(was)
    return done


def _walked(module: nn.Module, name: str, of: _Choice, found: Converted, whole: bool = True) -> nn.Module:
    """Return what a module becomes, and note it."""
    if id(module) not in of.done:
        of.done[id(module)] = module, _made(module, name, of, found, whole)
    return of.done[id(module)][1]


def _made(module: nn.Module, name: str, of: _Choice, found: Converted, whole: bool) -> nn.Module:
    made = (_whole(module, name, of, found) if whole else None) or _part(module, name, of, found)
    if made is not None:
        found.changed[name] = f"{type(module).__name__} is {type(made).__name__} now"
        if isinstance(made, Block | Encoder) and next(x for x in made.modules() if isinstance(x, Block)).centred:
            found.changed[name] += ", of tokens without their mean over features: it takes that out, and returns none"
        return made
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation in (functional.gelu, functional.silu):
        module.activation = PolynomialActivation(module.activation.__name__)
        found.changed[f"{name}.activation".strip(".")] = "a function is PolynomialActivation now"
    whole = whole and not isinstance(module, nn.TransformerEncoder)  # which looks into its layers
    for child, part in list(module._modules.items()):
        if part is not None:
            module.add_module(child, _walked(part, f"{name}.{child}".strip("."), of, found, whole))
    return module


PARTS = (nn.GELU, nn.SiLU, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)
TANH = "GELU by tanh: its polynomial is near the exact one, which differs by up to 5e-4"
OWN = "has a forward or hooks of its own, which nobody can read here"


def _by_tanh(function: Any) -> bool:
    return getattr(function, "approximate", "none") != "none"


def _own(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module of some kind does other things than its kind."""
    theirs = [k.forward for k in kinds if isinstance(module, k)]
    changed = bool(theirs) and type(module).forward not in theirs
    return changed or bool(module._forward_hooks or module._forward_pre_hooks)


def _part(module: nn.Module, name: str, of: _Choice, found: Converted) -> nn.Module | None:
    """Return what stands for one part, or None for one that has no such."""
    kind = type(module).__name__
    if isinstance(module, PARTS) and _own(module, *PARTS):
        found.left[name] = OWN
        return None
    if isinstance(module, nn.GELU | nn.SiLU) or kind in ("GELUActivation", "SiLUActivation"):
        if _by_tanh(module):
            found.left[name] = TANH
        return PolynomialActivation(kind.lower().removesuffix("activation"))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            found.left[name] = f"normalises {len(module.normalized_shape)} axes; expected one"
            return None
        return _norm(module, isinstance(module, nn.LayerNorm))
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            found.left[name] = "attention with keys of another size, bias_k or add_zero_attn"
            return None
        w, b = module.in_proj_weight.chunk(3), [None] * 3
        if module.in_proj_bias is not None:
            b = module.in_proj_bias.chunk(3)
        parts = [*zip(w, b, strict=True), (module.out_proj.weight, module.out_proj.bias)]
        return PowerMultiheadAttention(_attention(parts, module.num_heads, of), module.batch_first)
    if kind.endswith("SelfAttention") and all(hasattr(module, n) for n in ("query", "key", "value")):
        linears: list[Any] = [module.query, module.key, module.value]
        d = linears[0].in_features
        if any(x.weight.shape != (d, d) for x in linears):
            found.left[name] = "attention with heads of another size"
            return None
        one = (torch.eye(d).to(linears[0].weight), None)
        made = _attention([*((x.weight, x.bias) for x in linears), one], int(module.num_attention_heads), of)
        made.out = nn.Identity()
        return PowerSelfAttention(made)
    if isinstance(module, nn.ReLU):
        found.left[name] = "ReLU has no polynomial here; train with GELU or SiLU"
    return None


def _attention(parts: Any, heads: int, of: _Choice) -> PowerSoftmaxAttention:
    """Return attention with given projections: (weight, bias or None) of query, key, value and output."""
    made: PowerSoftmaxAttention = PowerSoftmaxAttention(
        parts[0][0].shape[1], heads, of.p, epsilon=of.epsilon, denominator=(of.epsilon, 50 * of.epsilon),
        tolerance=of.tolerance, causal=of.causal,
    ).to(parts[0][0])  # fmt: skip
    with torch.no_grad():
        for linear, (weight, bias) in zip((made.query, made.key, made.value, made.out), parts, strict=True):
            linear.weight.copy_(weight)
            linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
    return made


def _norm(module: Any, centred: bool) -> PolynomialRMSNorm:
    """Return a normalisation with polynomial, its gain and bias kept."""
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    bias = getattr(module, "bias", None)
    kind = PolynomialLayerNorm if centred else PolynomialRMSNorm
    made = kind(module.normalized_shape[0], eps=eps, bias=bias is not None)
    with torch.no_grad():
        if module.weight is not None:
            made.to(module.weight).gain.copy_(module.weight)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
    return made


@dataclass(frozen=True)
class _Layer:
    """The parts of a transformer's layer, whatever it is called."""

    attention: Any
    heads: int
    norms: tuple[Any, Any]
    up: Any
    down: Any
    activation: str
    tanh: bool
    norm_first: bool = True
    why: str | None = None


def _read(module: nn.Module) -> _Layer | None:
    """Return the parts of a layer of PyTorch's or of Hugging Face's ViT; None of another."""
    if isinstance(module, nn.TransformerEncoderLayer):
        inner = module.self_attn
        w = inner.in_proj_weight.chunk(3)
        b = [None] * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3)
        parts = [*zip(w, b, strict=True), (inner.out_proj.weight, inner.out_proj.bias)]
        function = module.activation
        name = getattr(function, "__name__", type(function).__name__).lower()
        norms = module.norm1, module.norm2
        why = OWN if _own(module, nn.TransformerEncoderLayer) else None
        if not inner.batch_first:
            why = "takes tokens as (n, batch, d): expected batch_first=True"
        up, down = module.linear1, module.linear2
        return _Layer(parts, inner.num_heads, norms, up, down, name, _by_tanh(function), module.norm_first, why)
    try:
        inner, outer = module.attention.attention, module.attention.output.dense
        linears = inner.query, inner.key, inner.value, outer
        function = module.intermediate.intermediate_act_fn
        name = type(function).__name__.lower().removesuffix("activation")
        parts = [(x.weight, x.bias) for x in linears]
        norms = module.layernorm_before, module.layernorm_after
        up, down = module.intermediate.dense, module.output.dense
        why = OWN if _own(module) else None
        return _Layer(parts, inner.num_attention_heads, norms, up, down, name, _by_tanh(function), why=why)
    except AttributeError:
        return None


def _obstacle(layer: _Layer) -> str | None:
    """Return why a layer cannot become a block."""
    if layer.why is not None:
        return layer.why
    if not layer.norm_first:
        return "normalises after the residual (norm_first=False): trained in the clear by parts, not on ciphertexts"
    if layer.activation not in ("gelu", "silu"):
        return f"activation {layer.activation}: expected GELU or SiLU, which have polynomials"
    if not all(isinstance(x, nn.LayerNorm | nn.RMSNorm) for x in layer.norms):
        return "another normalisation than LayerNorm or RMSNorm"
    if isinstance(layer.norms[0], nn.LayerNorm) != isinstance(layer.norms[1], nn.LayerNorm):
        return "one normalisation takes the mean away and the other does not"
    if layer.norms[0].eps != layer.norms[1].eps:
        return f"its normalisations have eps {layer.norms[0].eps} and {layer.norms[1].eps}: a block has one"
    return None


def _whole(module: nn.Module, name: str, of: _Choice, found: Converted) -> nn.Module | None:
    """Return the block or encoder that a module becomes; None, noting why, for one that becomes neither."""
    several = isinstance(module, nn.TransformerEncoder | nn.Sequential)
    if several and _own(module, nn.TransformerEncoder, nn.Sequential):
        return None
    named = _layers(module) if several else {"": module}
    read = {f"{name}.{k}".strip("."): _read(x) for k, x in named.items()}
    layers = [x for x in read.values() if x is not None]
    if not layers or len(layers) < len(read):
        return None
    whys = {k: why for k, x in read.items() if x is not None and (why := _obstacle(x))}
    for at, k in enumerate(read):
        if list(named.values())[at] in list(named.values())[:at]:
            whys[k] = "the same layer again: two blocks have weights of their own"
    if len({isinstance(x.norms[0], nn.LayerNorm) for x in layers}) > 1:
        whys[name] = "some layers take the mean away and others do not"
    if getattr(module, "norm", None) is not None and isinstance(module, nn.TransformerEncoder):
        whys[f"{name}.norm".strip(".")] = "a normalisation after the last layer is not computed on ciphertexts"
    found.left.update(whys or {k: TANH for k, x in read.items() if x is not None and x.tanh})
    if whys:
        return None
    blocks = [_block(x, k > 0, of) for k, x in enumerate(layers)]
    return Encoder(blocks) if several else blocks[0]


def _layers(module: Any) -> dict[str, nn.Module]:
    """Return the layers of PyTorch's encoder, or of a sequence, by name."""
    if isinstance(module, nn.TransformerEncoder):
        return {f"layers.{k}": x for k, x in module.layers._modules.items()}
    return dict(module._modules.items())


def _block(layer: _Layer, later: bool, of: _Choice) -> Block:
    """Return a layer as a block: means taken out of what is written to the residual, where its normalisations do so."""
    centred = isinstance(layer.norms[0], nn.LayerNorm)
    first, norm = (_norm(x, False) for x in layer.norms)
    made: Block = Block(
        _attention(layer.attention, layer.heads, of), norm, layer.up.out_features,
        PolynomialActivation(layer.activation), first if later else None, centred,
    ).to(layer.up.weight)  # fmt: skip
    with torch.no_grad():
        for mine, theirs in ((made.up, layer.up), (made.down, layer.down)):
            mine.weight.copy_(theirs.weight)
            mine.bias.zero_() if theirs.bias is None else mine.bias.copy_(theirs.bias)
        if not later:  # the client normalises without gain and bias: both go into the projections
            made.first_gain.copy_(first.gain)
            for linear in (made.attention.query, made.attention.key, made.attention.value):
                linear.bias += 0 if first.bias is None else linear.weight @ first.bias
        if centred:
            for linear in (made.attention.out, made.down):
                linear.weight -= linear.weight.mean(0, keepdim=True)
                linear.bias -= linear.bias.mean()
    return made
