"""The contract between the training loop and whatever shards and steps the model.

An engine owns the sharded model and its optimizer, and nothing else: no data, no schedule, no log. Gradients are the
mean over ranks of what `Engine.backward` was given; an engine never divides by the number of micro-batches.

State goes in and out through `Engine.shards`: every rank's part of every parameter, as contiguous flat ranges that
alias the live fp32 tensors. FSDP2 shards rows and ZeRO shards flat buffers, and both are such ranges, so that one
checkpoint format serves both without any rank ever holding a whole model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.distillation import Lesson
from model.transformer import Output


@dataclass(frozen=True)
class Shard:
    """A contiguous range of one flattened parameter, with its optimizer state, as live fp32 tensors of this rank."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    tensors: dict[str, Tensor]
    """`weight`, `exp_avg` and `exp_avg_sq`: flat tensors of one length that alias the state; writing changes it."""
    step: Tensor
    """Number of updates behind the moments, a 0-dim tensor; parameters may share it."""
    primary: bool
    """Whether this rank is the one that saves the range; the other holders of a replicated range do not."""


class Engine(ABC):
    """Owns the sharded model and its optimizer. The module's docstring has the contract."""

    model: nn.Module
    device: torch.device

    @abstractmethod
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: str = "mean",
        teacher: Lesson | None = None,
    ) -> Output:
        """Run the model; the arguments are those of `model.transformer.Transformer.forward`."""

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits, [B, T, V], of tokens from any device."""
        logits_BTV = self.forward(tokens_BT.to(self.device)).logits
        assert logits_BTV is not None
        return logits_BTV

    def token_nll(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of every label, from any device, in nats and in the shape of the labels."""
        nll_BT = self.forward(tokens_BT.to(self.device), labels_BT.to(self.device), reduction="none").token_nll
        assert nll_BT is not None
        return nll_BT

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of ``loss``; ``last`` marks the step's last micro-batch, when ranks reduce."""

    @abstractmethod
    def gradient_squares(self) -> dict[str, Tensor]:
        """This rank's part of the squared L2 norm of each parameter's gradient, before clipping.

        To be asked for between the last `backward` of a step and `step`. The parts are 0-dim tensors on the device,
        and add up to the whole over all ranks; a parameter of which this rank has no part may be left out.
        """

    @abstractmethod
    def step(
        self,
        learning_rate: float,
        *,
        ternary_factor: float = 1.0,
        decay_factor: float = 1.0,
        grad_norm_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clip, update and clear the gradients.

        A step whose gradient norm is not finite, or above the limit, is skipped: it clears the gradients and changes
        nothing else, neither weights nor optimizer state.

        Args:
            learning_rate: of this step.
            ternary_factor: multiplies it for the parameters that have a group of their own.
            decay_factor: multiplies the weight decay.
            grad_norm_limit: 0-dim, on the device, equal on all ranks; -1 skips the step in any case.

        Returns:
            The gradient norm before clipping and whether the step was skipped (1.0) or taken (0.0), both as 0-dim
            fp32 tensors on the device, equal on all ranks.
        """

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's part of the state, parameter by parameter in the model's order."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Renew what is derived from the fp32 weights (16-bit copies) after `shards` were written to."""


@torch.no_grad()
def load_weights(engine: Engine, value_of: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Fill the weights of ``engine`` from whole tensors, given one at a time by name and shape."""
    for shard in engine.shards():
        weight = shard.tensors["weight"]
        weight.copy_(value_of(shard.name, shard.shape).flatten()[shard.start : shard.start + weight.numel()])
    engine.refresh_weights()
