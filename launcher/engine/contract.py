"""The interface between the training loop and an engine, which shards and steps the model.

An engine owns the sharded model and its optimizer, and nothing else: no data, no schedule, no log. Gradients are the
mean over ranks of the losses given to `Engine.backward`; an engine never divides by the number of micro-batches.

State goes in and out through `Engine.shards`: every rank's part of every parameter, as contiguous flat ranges that
alias the live fp32 tensors. FSDP2 shards rows and ZeRO shards flat buffers, and both are such ranges, so that one
checkpoint format serves both without any rank ever holding a whole model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.averaging import Average
from launcher.engine.muon import MuonAdamW
from launcher.plan.schedule import StepSizes
from model.distillation import Lesson
from model.preference import Reference
from model.size import is_matrix
from model.transformer import Decoder, Output

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The first and the second moment of gradients."""

AVERAGE = "average"
"""The exponential moving average of the weights."""


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
    """`weight`, `exp_avg` and, but for matrices that Muon updates, `exp_avg_sq`, and `average` while weights are
    averaged: flat tensors of one length that alias the state; writing changes it."""
    step: Tensor
    """Number of updates that the moments contain, a 0-dim tensor; parameters may share it."""
    primary: bool
    """Whether this rank saves the range; other ranks that hold a copy of it do not."""


def _eager() -> AbstractContextManager[None]:
    """Leave out what is compiled: what is evaluated comes in many shapes, and each would have a graph of its own."""
    return torch.compiler.set_stance("force_eager")


class Engine(ABC):
    """The sharded model and its optimizer. The module's docstring states the contract."""

    model: nn.Module
    device: torch.device
    group: dist.ProcessGroup | None
    """The ranks that hold the model together; None if each holds all of it."""
    muon: MuonAdamW | None = None
    """The optimizer, if Muon updates matrices in any phase of the run."""
    average: Average | None = None
    """The averaged weights, while there are any."""

    def has_variance(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether the optimizer has a second moment of a parameter now."""
        return self.muon is None or not self.muon.is_on or not is_matrix(name, len(shape))

    @abstractmethod
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: str = "mean",
        teacher: Lesson | Reference | None = None,
    ) -> Output:
        """Run the model; the arguments are those of `model.transformer.Transformer.forward`."""

    def keep_apart(self, first_token: int | None) -> None:
        """Keep the documents of a row apart that begin with this token; with None they see one another."""
        self._decoder.first_token = first_token

    @contextmanager
    def keeping_apart(self, first_token: int | None) -> Iterator[None]:
        """As `keep_apart`, for a while."""
        before = self._decoder.first_token
        self.keep_apart(first_token)
        try:
            yield
        finally:
            self.keep_apart(before)

    @property
    def _decoder(self) -> Decoder:
        decoder = self.model.model
        assert isinstance(decoder, Decoder)
        return decoder

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits, [B, T, V], of tokens from any device."""
        with _eager():
            logits_BTV = self.forward(tokens_BT.to(self.device)).logits
        assert logits_BTV is not None
        return logits_BTV

    def token_nll(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of every label, from any device, in nats and in the shape of the labels."""
        with _eager():
            nll_BT = self.forward(tokens_BT.to(self.device), labels_BT.to(self.device), reduction="none").token_nll
        assert nll_BT is not None
        return nll_BT

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of ``loss``; ``last`` marks the step's last micro-batch, when ranks reduce."""

    @abstractmethod
    def gradient_squares(self) -> dict[str, Tensor]:
        """Return this rank's part of the squared L2 norm of each parameter's gradient, before clipping.

        Call it between the last `backward` of a step and `step`. The parts are 0-dim tensors on the device whose sum
        over all ranks is the whole; parameters of which this rank holds nothing may be missing.
        """

    @abstractmethod
    def step(
        self,
        sizes: StepSizes,
        *,
        grad_norm_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clip the gradients, update the weights and clear the gradients.

        A step whose gradient norm is not finite, or above the limit, is skipped: it clears the gradients and changes
        nothing else, neither weights nor optimizer state.

        Args:
            sizes: of this step.
            grad_norm_limit: 0-dim, on the device, equal on all ranks; -1 skips the step in any case.

        Returns:
            The gradient norm before clipping and whether the step was skipped (1.0) or taken (0.0), both as 0-dim
            fp32 tensors on the device, equal on all ranks.
        """

    def shards(self) -> Iterator[Shard]:
        """Yield this rank's part of the state, parameter by parameter in the model's order."""
        for shard in self.own_shards():
            if self.average is not None:
                shard.tensors[AVERAGE] = self.average.tensors[shard.name]
            yield shard

    @abstractmethod
    def own_shards(self) -> Iterator[Shard]:
        """Yield the shards without an average."""

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of the weights, by name, as `shards` has it."""
        return {shard.name: shard.tensors["weight"] for shard in self.own_shards()}

    @abstractmethod
    def refresh_weights(self) -> None:
        """Recompute what is derived from the fp32 weights (16-bit copies, codes) after writing to `shards`."""


@torch.no_grad()
def load_weights(engine: Engine, rows_of: Callable[[str, tuple[int, ...], range], Tensor]) -> None:
    """Fill the weights of ``engine`` from rows of whole tensors, by name, shape and range; a rank asks for its own."""
    for shard in engine.shards():
        weight, width = shard.tensors["weight"], math.prod(shard.shape[1:])
        rows = range(shard.start // width, -(-(shard.start + weight.numel()) // width))
        before = shard.start - rows.start * width
        weight.copy_(rows_of(shard.name, shard.shape, rows).flatten()[before : before + weight.numel()])
    engine.refresh_weights()
