"""Codes of whole weights, made once for as long as these stay as they are: once an optimizer step.

Without them, each pass of each micro-batch rounds the latent weights anew, the backward pass too, and one that
recomputes activations once more. `quant.gather` does the same where a layer's rows lie on several ranks.
"""

from itertools import groupby

import torch
from torch import nn

from quant.held import HeldCodes, round_weights
from quant.linear import quantized_layers


class CodeKeeper:
    """Holds the codes of a model's layers between two changes of its weights.

    Args:
        model: the root module.
        whole: whether each layer always has its whole weight. Else a layer's first pass makes the codes, when its
            weight has been gathered.
        compiled: whether to compile what makes them.
    """

    def __init__(self, model: nn.Module, *, whole: bool, compiled: bool) -> None:
        self.fresh = False
        """Whether the codes are those of the weights; to be unset by whoever changes weights."""
        self._model = model
        self._whole = whole
        self._compiled = torch.compile(round_weights, dynamic=False) if compiled else round_weights

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the codes again if weights have changed. To be called before each forward pass."""
        if self.fresh:
            return
        layers = quantized_layers(self._model).values()
        for layer in layers:
            layer.held, layer.holds = None, not self._whole
        # Block by block: to call what is compiled takes longer than what a GPU does in it for one layer.
        for _, together in groupby(layers if self._whole else (), lambda layer: layer.depth):
            coded = [layer for layer in together if layer.mode == "codes"]
            if coded:
                # A median counts magnitudes, which compiled code does slowly.
                is_median = coded[0].quant_config.weights == "absmedian"
                round_ = round_weights if is_median else self._compiled
                # As compiled as ever: a measurement forces all else to be eager, and training goes on with these codes.
                with torch.compiler.set_stance("default"):
                    rounded = round_([layer.unrounded() for layer in coded])
                for layer, made in zip(coded, rounded, strict=True):
                    layer.held = HeldCodes(*made)
        self.fresh = True
