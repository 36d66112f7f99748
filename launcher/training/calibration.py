"""Calibration at a switch: codes of a ternary phase that are fitted to training data, layer by layer.

Layers that are given one input are calibrated together, in the order of the forward pass. Each group sees the inputs
that the finished model gives it: all layers before it are calibrated, and at full strength. So each group takes a
forward pass over the sequences; a block has four groups. The second moments of inputs are summed over the ranks, and
every matrix is fitted whole, on one rank (`launcher.engine.matrices`, `quant.calibration`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import IGNORED_LABEL
from launcher.engine.contract import Engine
from launcher.engine.matrices import Exchange, Piece
from launcher.errors import TrainingError
from quant.calibration import calibrate
from quant.config import CalibrationConfig
from quant.linear import LEARNED_SCALE, QuantLinear, is_learned_scale, quantized_layers


class Calibrated(NamedTuple):
    """The result of a calibration, over all layers."""

    error_before: float
    """Mean over layers of the change of their outputs by plain rounding, relative, as L2 norms."""
    error_after: float
    """The same with the fitted codes."""
    num_sequences: int
    seconds: float

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {
            "transition/calibration_error_before": self.error_before,
            "transition/calibration_error_after": self.error_after,
            "transition/calibration_seconds": self.seconds,
        }

    def sentence(self) -> str:
        """For the console."""
        return (
            f"calibrated on {self.num_sequences} sequences in {self.seconds:.1f} s: rounding changes the outputs of "
            f"layers by {self.error_after:.3f} of their size, where plain rounding does by {self.error_before:.3f}"
        )


@torch.no_grad()
def calibrate_(
    engine: Engine,
    calibration: CalibrationConfig,
    batches: Sequence[tuple[Tensor, Tensor]],
    got_on: Callable[[str | None], None] = lambda line: None,
) -> Calibrated:
    """Calibrate the quantized layers of a model at full strength, in place; a collective.

    Args:
        engine: with its model quantized.
        calibration: the method.
        batches: this rank's micro-batches of tokens and labels, as many on every rank.
        got_on: is called with each micro-batch, and with a sentence after each block.

    Raises:
        TrainingError: an input of a layer is not finite.
    """
    began = time.perf_counter()
    layers = quantized_layers(engine.model)
    exchange = Exchange(pieces(engine, layers), engine.group)
    errors: list[Tensor] = []
    for depth, groups in groupby(groups_of(layers), key=lambda group: layers[group[0]].depth):
        first = len(errors)
        for group in groups:
            moment_II = moment_of(engine, layers[group[0]], batches, got_on)
            if not moment_II.isfinite().all():
                raise TrainingError(
                    f"the calibration finds inputs of {group[0]} that are not finite; begin the ternary phase with "
                    "another checkpoint"
                )
            errors += fit_(engine, {name: layers[name] for name in group}, moment_II, calibration, exchange)
        before, after = relative(errors[first:])
        seconds = time.perf_counter() - began
        got_on(
            f"block {depth}: outputs of layers change by {after:.3f} of their size (plain rounding: {before:.3f}); "
            f"{seconds * (len(layers) - len(errors)) / len(errors):.0f} s remain"
        )
    num_sequences = sum(len(tokens_BT) for tokens_BT, _ in batches) * dist.get_world_size()
    return Calibrated(*relative(errors), num_sequences, time.perf_counter() - began)


def relative(errors: Sequence[Tensor]) -> tuple[float, float]:
    """Relative changes of outputs by plain and by fitted codes, as means over layers, from their `Fit.errors`."""
    sums = torch.stack(list(errors))
    before, after = (sums[:, :2] / sums[:, 2:].clamp(min=1e-30)).sqrt().mean(0).tolist()
    return before, after


def groups_of(layers: dict[str, QuantLinear]) -> Iterator[list[str]]:
    """Names of the layers that are given the same input, in the order of the forward pass."""
    for _, group in groupby(layers, key=lambda name: id(layers[name].shared_input)):
        yield list(group)


def pieces(engine: Engine, layers: dict[str, QuantLinear]) -> list[Piece]:
    """This rank's parts of the layers' weights."""
    held = {shard.name: (shard.start, len(shard.tensors["weight"])) for shard in engine.shards()}
    return [
        Piece(name, (layer.out_features, layer.in_features), *held.get(f"{name}.weight", (0, 0)), offset=0)
        for name, layer in layers.items()
    ]


def moment_of(
    engine: Engine,
    layer: QuantLinear,
    batches: Sequence[tuple[Tensor, Tensor]],
    got_on: Callable[[str | None], None],
) -> Tensor:
    """Sum of x xT over all ranks' inputs of a layer as it multiplies them, fp64 [I, I]; a forward pass.

    Inputs where nothing is to be predicted, such as padding, are left out.
    """
    moment_II = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=engine.device)
    counts_N1 = torch.empty(0)

    def add(layer: QuantLinear, x: Tensor) -> None:
        codes = layer.input_codes(x)
        x_NI = (layer.rounded_input(x) if codes is None else codes[0] * codes[1]).float().flatten(0, -2) * counts_N1
        moment_II.add_(x_NI.T @ x_NI)

    layer.probe = add
    try:
        for tokens_BT, labels_BT in batches:
            counts_N1 = (labels_BT != IGNORED_LABEL).view(-1, 1).to(engine.device)
            engine.token_nll(tokens_BT, labels_BT)
            got_on(None)
    finally:
        layer.probe = None
    dist.all_reduce(moment_II)
    return moment_II


def fit_(
    engine: Engine,
    layers: dict[str, QuantLinear],
    moment_II: Tensor,
    calibration: CalibrationConfig,
    exchange: Exchange,
) -> list[Tensor]:
    """Calibrate layers that are given the same input; returns the `Fit.errors` of each. A collective."""
    errors = {name: torch.zeros(3, dtype=torch.float64, device=engine.device) for name in layers}
    alphas = {name: torch.zeros(layer.out_features, device=engine.device) for name, layer in layers.items()}

    def fit(name: str, weight_OI: Tensor) -> Tensor:
        config, rotated = layers[name].quant_config, layers[name].rotated
        fitted = calibrate(weight_OI.to(engine.device), moment_II, config, calibration, rotated=rotated)
        errors[name].copy_(fitted.errors)
        if fitted.alpha is not None:
            alphas[name].copy_(fitted.alpha)
        return fitted.weight.to(weight_OI)

    held = {shard.name: shard.tensors["weight"] for shard in engine.shards()}
    nothing = next(iter(held.values())).new_empty(0)
    exchange.apply_({name: held.get(f"{name}.weight", nothing) for name in layers}, fit)
    for found in (*errors.values(), *alphas.values()):
        # Some ranks have fitted a matrix, all to the same end, and others have zeros; nothing is negative.
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    for shard in engine.shards():
        name = shard.name.removesuffix(f".{LEARNED_SCALE}")
        if is_learned_scale(shard.name) and name in layers and layers[name].quant_config.learned:
            weight = shard.tensors["weight"]
            weight.copy_(alphas[name][shard.start : shard.start + len(weight)])
    engine.refresh_weights()
    return list(errors.values())
