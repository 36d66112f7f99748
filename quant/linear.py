"""Quantization-aware linear layers that attach to a finished 16-bit model from outside.

`quantize_` changes the class of matching ``nn.Linear`` modules to `QuantLinear`. Parameters stay the very same
objects under the same names, so optimizers, sharding and checkpoints do not notice.

A layer computes in one of three modes, which follow from its strengths. Dimensions: N rows (tokens), I input features,
O output features, G groups of a row::

    mode    strengths   forward                                             saved for the backward pass
    plain   both 0      y = x_NI @ W_OI.T, at the cost of the 16-bit model  x, W
    ramp    between     x' = x + strength * (round(x) - x)                  x', W
                        W' = W + strength * (round(W) - W), or as in
                        `quant.soft` with rounding softmax
                        y  = x' @ W'.T
    codes   both 1      y = (int8 codes of x @ codes of W.T) * both scales  int8 codes and fp32 scale of x; held codes
                                                                            of W, or W

    forward in mode "codes"

    x_NI --largest magnitude of a token--> int8 codes_NI, fp32 scale_N1 -------------------------+
                                                                                                  +--> y_NO
    W_OI --statistic of what shares a scale--> codes_OI of -1, 0, +1, fp32 level [1, 1] to [O, G] +

    backward in mode "codes", from g_NO, the gradient of y

    gradient of x_NI = g_NO   @ (codes_OI * level)
    gradient of W_OI = g_NO.T @ (codes_NI * scale_N1)

    and with ``backward: int8``, of which ``int8-input`` takes the first line alone

    gradient of x_NI = (int8 rows of (g_NO * level) @ codes_OI) * their scales
    gradient of W_OI = (int8 columns of (g_NO * scale_N1).T @ codes_NI) * their scales

``W`` is the latent weight, the same parameter in every mode. Rounding has no useful derivative, so gradients pass
straight through it (arXiv 1308.3432): the gradient of the rounded operand is taken as the gradient of the exact one.
The product itself is differentiated at its rounded operands. ``gradient: clipped`` and ``trust`` zero some of the
weight's gradient, and learned scales get one of their own (`quant.rounding.weight_gradients`).

Sums of integer codes are exact (`quant.integers`), so that mode "codes" gives the same bits in every engine and export.
While W stays as it is, over all passes of an optimizer step, its codes can be held (`quant.keeper`); without them, the
backward pass makes them again from W. What is made of an input that several layers are given is made once
(`SharedInput`). On the ramp, rounded operands are made in the dtype of the weight, and the backward pass blends W
again; activations that the recipe leaves in 16 bits enter every mode as they are.

Under `quant.gather`, ranks send 2-bit codes instead of W. Mode "codes" then reads ``held.codes`` (J = I / 4 bytes), in
the forward and the backward pass, and never the values of W; the results are the same, bit for bit.

Strengths are 0-dim tensors that the layers of a block share, so that a compiled block has one graph for a whole ramp,
and three at most.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.codes import from_held
from quant.config import QuantConfig, is_rotated, width_problem
from quant.hadamard import rotate, rotate_weight
from quant.held import HeldCodes, SharedInput, Unrounded, round_weights
from quant.integers import activation_codes
from quant.product import BlendedProduct, CodeProduct, StraightThrough
from quant.ramp import Rounding
from quant.rounding import (
    Scale,
    autocast_dtype,
    learned_scale,
    quantize_activation,
    weight_codes,
    weight_scale,
    without_autocast,
)

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that are one matrix in fused implementations, in order."""

LEARNED_SCALE = "weight_scale"
"""Name of the parameter that a layer with learned scales has beside its weight."""


class QuantLinear(nn.Linear):
    """An ``nn.Linear`` whose forward sees quantized weights and activations, by its strengths."""

    quant_config: QuantConfig
    depth: int
    """Index of its block, see `depth_of`."""
    mode: Literal["plain", "ramp", "codes"]
    weight_strength: Tensor
    activation_strength: Tensor
    rounding: Rounding
    """Of the weights in mode "ramp"."""
    rotated: bool
    sharers: tuple[nn.Linear, ...]
    """Layers whose weights share the scale, in the order of the fused matrix, this one included; () for none."""
    probe: "Callable[[QuantLinear, Tensor], None] | None"
    """Is called with the layer and its input at every forward pass, if set; nothing is compiled then."""
    held: HeldCodes | None
    """Codes of the weight as it is now. Without them each pass makes its own."""
    holds: bool
    """Whether the next pass in mode "codes" holds the codes that it makes."""
    shared_input: SharedInput
    """Of the layers that are given the same input."""

    def extra_repr(self) -> str:
        """Shapes, recipe, mode and strengths, for `print`. It waits for the device only on a ramp, once."""
        if self.mode == "ramp":
            weights, activations = torch.stack((self.weight_strength, self.activation_strength)).tolist()
        else:
            weights = activations = 0.0 if self.mode == "plain" else 1.0
        shown = f"{super().extra_repr()}, {self.quant_config.recipe}, mode={self.mode}, weight_strength={weights:g}"
        return shown if self.quant_config.activations == "none" else f"{shown}, activation_strength={activations:g}"

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is [..., I], the result [..., O]; both in the dtype of the weight.

        Under ``torch.autocast`` codes are those of the same ``x`` without it, and are multiplied exactly, for a result
        in the dtype of ``x``. Modes "plain" and "ramp" multiply as autocast does.
        """
        if self.probe is not None:
            self.probe(self, x.detach())
        if self.mode == "plain":
            return F.linear(x, self.weight, self.bias)
        ramp_dtype = autocast_dtype(x) or x.dtype
        with without_autocast(x):
            return self._rounding_forward(x, ramp_dtype)

    def _rounding_forward(self, x: Tensor, ramp_dtype: torch.dtype) -> Tensor:
        config = self.quant_config
        if self.holds and self.held is None and self.mode == "codes":
            with torch.no_grad():
                self.held = HeldCodes(*round_weights([self.unrounded()])[0])
        held = self.held
        # Held codes replace the weight's values. Where it is rotated, its gradient reaches the latent one through it.
        needs_values = config.learned or config.dead_zone_bias or config.gradient != "identity"
        needs_weight = held is None or needs_values or self.rotated
        weight_OI = self.rotated_weight() if needs_weight else self.weight
        scale = self.rounding_scale(weight_OI) if held is None or config.learned else held.scale
        if self.mode == "codes":
            prepared, *rounded = self.shared_input.of(x, self._input_codes)
            codes_OI = None if held is None else held.codes
            y = CodeProduct.apply(x if prepared is None else prepared, *rounded, weight_OI, *scale, codes_OI, config)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        else:
            blended = x if config.activations == "none" else self.shared_input.of(x, self._blended_input)
            how = config, self.rotated, self.rounding
            y = BlendedProduct.apply(blended.to(ramp_dtype), self.weight, *scale, self.weight_strength, self.bias, *how)
        return y + self._dead_zone(weight_OI, scale).to(y.dtype) if config.dead_zone_bias else y

    def dead_zone(self) -> Tensor:
        """The bias that replaces the layer's weights with code 0, fp32 [O]."""
        weight_OI = self.rotated_weight()
        return self._dead_zone(weight_OI, self.rounding_scale(weight_OI))

    def rotated_weight(self) -> Tensor:
        """The latent weight to be rounded, [O, I]."""
        return rotate_weight(self.weight) if self.rotated else self.weight

    def rounded_input(self, x: Tensor) -> Tensor:
        """The input to be rounded: normalized and rotated, if the configuration says so."""
        return prepared_input(x, self.quant_config, rotated=self.rotated)

    def rounding_scale(self, weight_OI: Tensor) -> Scale:
        """Scale of the weight to be rounded."""
        if self.quant_config.learned:
            return learned_scale(getattr(self, LEARNED_SCALE), self.quant_config.levels)
        with torch.no_grad():
            weights = [layer.rotated_weight() for layer in self.sharers] if self.sharers else [weight_OI]  # type: ignore[operator]
            return weight_scale(weights, self.quant_config)

    @torch.no_grad()
    def weight_codes(self) -> tuple[Tensor, Tensor]:
        """Codes as int8 [O, I], and the fp32 level, [1, 1], [O, 1] or [O, G]."""
        if self.held is not None:
            codes = self.held.codes
            assert codes.untyped_storage().nbytes(), "the layer's block is not gathered"
            return from_held(codes, self.in_features), self.held.scale.level
        weight_OI = self.rotated_weight()
        scale = self.rounding_scale(weight_OI)
        return weight_codes(weight_OI, scale, self.quant_config).to(torch.int8), scale.level

    @torch.no_grad()
    def unrounded(self) -> Unrounded:
        """The weight as it is now, with what decides its codes."""
        config, weight_OI = self.quant_config, self.rotated_weight()
        weights = tuple(layer.rotated_weight() for layer in self.sharers) if self.sharers else (weight_OI,)  # type: ignore[operator]
        return Unrounded(weight_OI, weights, getattr(self, LEARNED_SCALE) if config.learned else None, config)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Codes of an input as int8, and the fp32 scale of each token; None where activations stay in 16 bits."""
        if self.quant_config.activations == "none":
            return None
        return activation_codes(self.rounded_input(x), self.quant_config.activations)

    def _input_codes(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The prepared input, None if it is the input; its codes, int8, and the scale of each token, or None."""
        prepared = self.rounded_input(x)
        if self.quant_config.activations == "none":
            return None if prepared is x else prepared, None, None
        with torch.no_grad():
            codes, scale = activation_codes(prepared, self.quant_config.activations)
        return None if prepared is x else prepared, codes, scale

    def _blended_input(self, x: Tensor) -> Tensor:
        config, strength = self.quant_config, self.activation_strength
        if config.layer_norm:
            normalized = F.layer_norm(x, x.shape[-1:])
            rounded = StraightThrough.apply(normalized, self._rounded(normalized), torch.ones_like(strength))
            return torch.lerp(x, rounded, strength.to(x.dtype))
        return StraightThrough.apply(x, self._rounded(x), strength)

    @torch.no_grad()
    def _rounded(self, x: Tensor) -> Tensor:
        codes, scale = quantize_activation(rotate(x) if self.rotated else x, self.quant_config.activations)
        rounded = (codes * scale).to(x.dtype)
        return rotate(rounded) if self.rotated else rounded

    def _dead_zone(self, weight_OI: Tensor, scale: Scale) -> Tensor:
        """Sum of each row's weights with code 0, times the configured share and the strength (arXiv 2509.23809)."""
        with torch.no_grad():
            is_dead = weight_codes(weight_OI, scale, self.quant_config) == 0
        return self.weight_strength * self.quant_config.dead_zone_bias * (weight_OI.float() * is_dead).sum(-1)


def prepared_input(x: Tensor, config: QuantConfig, *, rotated: bool) -> Tensor:
    """The input to be rounded: normalized and rotated, if the configuration says so."""
    if config.layer_norm:
        x = F.layer_norm(x, x.shape[-1:])
    return rotate(x) if rotated else x


def quantize_(
    model: nn.Module, config: QuantConfig, device: torch.device | None = None, *, rounding: Rounding = "blend"
) -> list[str]:
    """Turn every matching ``nn.Linear`` of ``model`` into a `QuantLinear` in place, at strength 1.

    Args:
        model: what is changed; its parameters stay the same objects. With learned scales it has them already, see
            `add_learned_scales_`.
        config: which layers, and how.
        device: where the strengths live; by default where the parameters do, which must be given on the meta device.
        rounding: of the weights between strengths 0 and 1; see `RampConfig.rounding`.

    Returns:
        The dotted names of the layers that were changed.

    Raises:
        ValueError: the pattern matches no linear layer, a layer's width cannot be grouped or rotated, the model is
            quantized already, or it is on the meta device and ``device`` is not given.
    """
    if quantized_layers(model):
        raise ValueError("the model is already quantized")
    matches = matching_layers(model, config)
    device = device or next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("the model is on the meta device; pass the device on which it will compute")
    for name, module in matches.items():
        if problem := width_problem(name, module.in_features, config):
            raise ValueError(problem)
        if config.learned and not hasattr(module, LEARNED_SCALE):
            raise ValueError(f"{name} has no {LEARNED_SCALE}; call add_learned_scales_ before the model is sharded")
    strengths: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[tuple[nn.Linear, ...], SharedInput] = {}
    for name, module in matches.items():
        module.__class__ = QuantLinear
        assert isinstance(module, QuantLinear)
        module.depth = depth_of(name)
        if module.depth not in strengths:
            weights, activations = torch.ones(2, dtype=torch.float32, device=device).unbind()
            strengths[module.depth] = weights, activations
        module.weight_strength, module.activation_strength = strengths[module.depth]
        module.quant_config, module.mode, module.probe = config, "codes", None
        module.held, module.holds, module.rounding = None, False, rounding
        together = sharers(name, matches)
        module.shared_input = inputs.setdefault(together, SharedInput(len(together)))
        module.rotated, module.sharers = is_rotated(name, config), together if config.fused else ()
    return list(matches)


STATE = tuple(QuantLinear.__annotations__)
"""Attributes that a layer has only while it is quantized."""


def dequantize_(model: nn.Module) -> None:
    """Undo `quantize_`: the layers compute with their latent weights again, as plain ``nn.Linear``.

    Raises:
        ValueError: no layer is quantized.
    """
    for module in _expect_quantized(model).values():
        module.__class__ = nn.Linear  # type: ignore[assignment]
        for name in STATE:
            delattr(module, name)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of ``model`` by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def set_strength_(model: nn.Module, strength: float) -> None:
    """Set how much of the quantization is on in all layers, from 0 (none: the 16-bit model) to 1 (all of it).

    Raises:
        ValueError: the strength is outside of 0 to 1, or no layer is quantized.
    """
    num_blocks = 1 + max(map(depth_of, _expect_quantized(model)))
    set_strengths_(model, [strength] * num_blocks, [strength] * num_blocks)


def set_strengths_(model: nn.Module, weights_L: Sequence[float], activations_L: Sequence[float]) -> None:
    """Set the strengths of weights and of activations block by block; layers outside of blocks follow the first.

    Raises:
        ValueError: a strength is outside of 0 to 1, or no layer is quantized.
    """
    layers = _expect_quantized(model)
    for strength in (*weights_L, *activations_L):
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; must be between 0 and 1")
    for depth, layer in {layer.depth: layer for layer in layers.values()}.items():  # the tensors are the block's
        layer.weight_strength.fill_(weights_L[depth])
        layer.activation_strength.fill_(activations_L[depth])
    for layer in layers.values():
        relevant = {weights_L[layer.depth]}
        if layer.quant_config.activations != "none":
            relevant.add(activations_L[layer.depth])
        layer.mode = "plain" if relevant == {0.0} else "codes" if relevant == {1.0} else "ramp"


def depth_of(name: str) -> int:
    """Index of the block that a layer of this dotted name belongs to; 0 for one outside of blocks."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match else 0


def sharers(name: str, layers: Mapping[str, nn.Linear]) -> tuple[nn.Linear, ...]:
    """Those of the quantized layers that are one matrix with the layer of this name where they are fused."""
    parent, _, last = name.rpartition(".")
    parts = next((parts for parts in FUSED if last in parts), (last,))
    names = [f"{parent}.{part}".lstrip(".") for part in parts]
    return tuple(layers[name] for name in names if name in layers)


def matching_layers(model: nn.Module, config: QuantConfig) -> dict[str, nn.Linear]:
    """The plain linear layers that a configuration is for, by dotted name.

    An output head `lm_head` is none of them: a model uses its weight without calling it as a layer.

    Raises:
        ValueError: there is none.
    """
    linears = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"
    }
    matches = {name: module for name, module in linears.items() if re.search(config.include, name)}
    if not matches:
        raise ValueError(
            f"include={config.include!r} matches no linear layer; there are, for example, {list(linears)[:3]}"
        )
    return matches


def add_learned_scales_(model: nn.Module, config: QuantConfig) -> list[str]:
    """Give the layers that a configuration with learned scales is for a parameter `weight_scale`, [O], each.

    It belongs to the model from its first step, so that a switch adds no parameter to an optimizer; a layer that is
    not quantized leaves it alone.

    Returns:
        The dotted names of the parameters.
    """
    layers = matching_layers(model, config)
    for layer in layers.values():
        if not hasattr(layer, LEARNED_SCALE):
            weight = layer.weight
            scale = nn.Parameter(torch.ones(layer.out_features, dtype=weight.dtype, device=weight.device))
            layer.register_parameter(LEARNED_SCALE, scale)
    return [f"{name}.{LEARNED_SCALE}" for name in layers]


def _expect_quantized(model: nn.Module) -> dict[str, QuantLinear]:
    if layers := quantized_layers(model):
        return layers
    raise ValueError("the model has no quantized layer; call quantize_ first")


def is_learned_scale(name: str) -> bool:
    """Return whether a parameter of this name is a layer's learned scales."""
    return name.endswith(f".{LEARNED_SCALE}")
