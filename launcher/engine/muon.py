"""Muon on sharded matrices: momentum, made orthogonal by a Newton-Schulz iteration.

The method is Keller Jordan's (https://kellerjordan.github.io/posts/muon/), as `torch.optim.Muon` computes it; AdamW
updates what is not a matrix of a block. The iteration needs whole matrices. Each is put together, in bf16, on one rank,
which sends the result back in parts, and the work is spread over the ranks. So a matrix is updated by the same bits
however it is sharded.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.optimizer import MuonConfig, OptimizerConfig
from launcher.engine.adamw import build_adamw, create_state
from launcher.plan.muon import orthogonalize_flops

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by its author for the steepest slope at 0."""
LEAST_NORM = 1e-7

TYPICAL_RMS = 0.2
"""Root mean square of AdamW's updates (arXiv 2502.16982, section 2.2)."""


@torch.no_grad()
def orthogonalize(matrix: Tensor, num_steps: int) -> Tensor:
    """Return, in bf16, about the nearest matrix whose singular values are all 1; they come to lie around it.

    Args:
        matrix: [rows, columns].
        num_steps: of the iteration, in bf16.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    wide = wide / wide.norm().clamp(min=LEAST_NORM)
    for _ in range(num_steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def size_of_update(shape: tuple[int, ...], config: MuonConfig) -> float:
    """Factor on an orthogonal update of a matrix of this shape, see `MuonConfig.scale`."""
    rows, columns = shape
    return TYPICAL_RMS * math.sqrt(max(shape)) if config.scale == "match-adamw" else math.sqrt(max(1, rows / columns))


@dataclass(frozen=True)
class Piece:
    """This rank's part of a matrix: a range of it, flattened, that lies in a tensor of the optimizer."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element of the range."""
    length: int
    """0 if this rank has no part."""
    offset: int
    """Of the range in the tensor."""


class Exchange:
    """Puts matrices together on their owners, and sends them back.

    Args:
        pieces: of every matrix, in the same order on all ranks.
        group: the ranks that hold a matrix together; None if each holds all.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._shapes = {piece.name: piece.shape for piece in pieces}
        self._ranges: list[dict[str, tuple[int, int]]] = []
        """By rank and matrix: first element and length."""
        if group is not None:
            held = torch.tensor([(piece.start, piece.length) for piece in pieces]).reshape(-1, 2)
            everyones = [torch.empty_like(held) for _ in range(group.size())]
            dist.all_gather(everyones, held, group=group)
            self._ranges = [
                {piece.name: (start, length) for piece, (start, length) in zip(pieces, ranges.tolist(), strict=True)}
                for ranges in everyones
            ]

    def apply_(self, parts: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        """Replace the parts of matrices by those of a function of each whole matrix; a collective.

        Args:
            parts: flat, bf16, in the same order on all ranks; empty where this rank has no part.
            function: of a matrix in bf16; of the same shape.
        """
        if self._group is None:
            for name, part in parts.items():
                part.copy_(function(part.view(self._shapes[name])).reshape(-1))
            return
        mine, nothing = self._group.rank(), next(iter(parts.values())).new_empty(0)
        for owned in self._rounds(parts):
            sent = [parts.get(name, nothing) for name in owned]
            places = [ranges.get(owned[mine], (0, 0)) for ranges in self._ranges]
            arrived = self._all_to_all(sent, [length for _, length in places])
            whole = nothing
            if shape := self._shapes.get(owned[mine]):
                whole = nothing.new_empty(math.prod(shape))
                for (start, length), part in zip(places, arrived, strict=True):
                    whole[start : start + length] = part
                whole = function(whole.view(shape)).reshape(-1)
            answers = [whole[start : start + length] for start, length in places]
            for part, answer in zip(sent, self._all_to_all(answers, [len(part) for part in sent]), strict=True):
                part.copy_(answer)

    def _rounds(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The matrix of each rank in each round, "" for none; the largest go to the ranks that have the least work."""
        work = [0] * len(self._ranges)
        owned: list[list[str]] = [[] for _ in self._ranges]
        for name in sorted(names, key=lambda name: -orthogonalize_flops(self._shapes[name], 1)):
            owner = work.index(min(work))
            owned[owner].append(name)
            work[owner] += orthogonalize_flops(self._shapes[name], 1)
        return list(zip_longest(*owned, fillvalue=""))

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send a part to each rank; return what each has sent, of these lengths."""
        sent = torch.cat(list(parts))
        arrived = sent.new_empty(sum(lengths))
        width = sent.element_size()
        dist.all_to_all_single(
            arrived.view(torch.uint8),  # gloo does not know bf16
            sent.view(torch.uint8),
            [width * length for length in lengths],
            [width * len(part) for part in parts],
            group=self._group,
        )
        return list(arrived.split(list(lengths)))


class MuonAdamW(torch.optim.AdamW):
    """Muon for groups of matrices, while it is on; AdamW for all others.

    Args:
        groups: of `launcher.engine.adamw.parameter_groups`.
        config: rates and sizes.
        fused: whether AdamW is.
        device: where matrices are made orthogonal.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool, device: torch.device
    ) -> None:
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
        self.muon = config.muon_or_default
        self.is_on = False
        """Whether matrices are updated by Muon at present."""
        self.matrices: set[str] = set()
        """Those that Muon updates while it is on."""
        self.updated: set[str] = set()
        """Those that it has updated."""
        self._rate_factor = (self.muon.learning_rate or config.learning_rate) / config.learning_rate
        self._device = device
        self._pieces: dict[int, Sequence[Piece]] = {}
        self._exchange: Exchange | None = None

    def find_matrices(self, pieces: Mapping[Tensor, Sequence[Piece]], group: dist.ProcessGroup | None) -> None:
        """Say where the parts of matrices lie, which is known once the model is sharded; a collective.

        Args:
            pieces: of each tensor in the groups of matrices; tensors and pieces in the same order on all ranks.
            group: the ranks that hold a matrix together; None if each holds all.
        """
        self._tensors = list(pieces)
        self.matrices = {piece.name for held in pieces.values() for piece in held}
        self._pieces = {id(tensor): held for tensor, held in pieces.items()}
        self._exchange = Exchange([piece for held in pieces.values() for piece in held], group)

    def turn(self, *, on: bool) -> None:
        """Have matrices updated by Muon, which goes on with AdamW's first moments, or by AdamW, which starts anew."""
        self.is_on = on
        for group in self.param_groups:
            group["rate_factor"] = self._rate_factor if self._is_ours(group) else 1.0
        for tensor in self._tensors:
            if on:
                self.state[tensor].pop("exp_avg_sq", None)
            else:
                self.state[tensor].clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a collective.

        As with the fused AdamW, nothing changes if the tensor ``found_inf``, set from outside, is 1.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if not self._is_ours(group)]
        try:
            if self.param_groups:
                super().step(closure)
        finally:
            self.param_groups = groups
        ours = [(group, tensor) for group in groups if self._is_ours(group) for tensor in group["params"]]
        if ours:
            self._update(ours)

    def _is_ours(self, group: dict[str, Any]) -> bool:
        return self.is_on and group["matrices"]

    def _update(self, pairs: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
        assert self._exchange is not None
        parts: dict[str, Tensor] = {}
        for _, tensor in pairs:
            direction = self._direction(tensor).view(-1)
            for piece in self._pieces[id(tensor)]:
                parts[piece.name] = direction[piece.offset : piece.offset + piece.length]
        self._exchange.apply_(parts, self._orthogonalize)
        self.updated |= parts.keys()
        for group, tensor in pairs:
            flat, rate, taken = tensor.view(-1), group["lr"], self._taken(tensor)
            tensor.mul_(1 - rate * group["weight_decay"] * taken)
            for piece in self._pieces[id(tensor)]:
                size = size_of_update(piece.shape, self.muon)
                flat[piece.offset : piece.offset + piece.length].add_(parts[piece.name] * taken, alpha=-rate * size)

    def _direction(self, tensor: Tensor) -> Tensor:
        """Take the gradient into the momentum; return what is to be made orthogonal, in bf16, of the tensor's shape."""
        gradient, taken = tensor.grad, self._taken(tensor)
        assert gradient is not None
        if isinstance(taken, Tensor):
            gradient = gradient.where(taken > 0, 0)
        state = create_state(self, tensor, variance=False)
        state["step"] += taken
        momentum = state["exp_avg"].lerp_(gradient, (1 - self.muon.momentum) * taken)
        direction = gradient.lerp(momentum, self.muon.momentum) if self.muon.nesterov else momentum
        return direction.to(torch.bfloat16, copy=True)

    def _orthogonalize(self, matrix: Tensor) -> Tensor:
        return orthogonalize(matrix.to(self._device), self.muon.newton_schulz_steps).to(matrix.device)

    def _taken(self, tensor: Tensor) -> Any:
        """1, or 0 if the step is to be skipped: then on the device, so that the host need not wait."""
        found_inf = getattr(self, "found_inf", None)
        return 1 if found_inf is None else (1 - found_inf).to(tensor)


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool, muon: bool | None, device: torch.device
) -> torch.optim.AdamW:
    """Build what updates ``groups``: AdamW, or, unless ``muon`` is None, `MuonAdamW`, which is off yet."""
    if muon is None:
        return build_adamw(groups, config, fused=fused)
    return MuonAdamW(groups, config, fused=fused, device=device)
