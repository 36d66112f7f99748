"""Muon on sharded matrices: momentum, made orthogonal by a Newton-Schulz iteration.

The method is Keller Jordan's (https://kellerjordan.github.io/posts/muon/), as `torch.optim.Muon` computes it; AdamW
updates what is not a matrix of a block. The iteration needs whole matrices: each is put together, in bf16, on one rank
(`launcher.engine.matrices`). So a matrix is updated by the same bits however it is sharded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.optimizer import MuonConfig, OptimizerConfig
from launcher.engine.adamw import build_adamw, create_state
from launcher.engine.matrices import Exchange, Piece

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

    def _orthogonalize(self, name: str, matrix: Tensor) -> Tensor:
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
