"""The order in which blocks become ternary: first the one whose rounding alone raises the loss least."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import IGNORED_LABEL
from launcher.engine.contract import Engine
from launcher.errors import TrainingError
from launcher.process.exchange import value_of_first
from quant.linear import set_strength_, set_strengths_


@torch.no_grad()
def measure_sensitivity(
    engine: Engine,
    batches: Sequence[tuple[Tensor, Tensor]],
    num_blocks: int,
    got_on: Callable[[], None] = lambda: None,
) -> list[float]:
    """By how much the loss rises if one block alone is rounded, weights and inputs; a collective.

    Every rank gets the same numbers. The model is at strength 1 afterwards.

    Args:
        engine: of a model that has just been quantized.
        batches: tokens and labels, int64 [B, T], as many on every rank.
        num_blocks: of the model.
        got_on: is called after every batch.

    Returns:
        The rise for each block, in nats per token.

    Raises:
        TrainingError: a loss is not finite.
    """

    def loss(strengths_L: Sequence[float]) -> float:
        set_strengths_(engine.model, strengths_L, strengths_L)
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for tokens_BT, labels_BT in batches:
            counted_BT = labels_BT.to(engine.device) != IGNORED_LABEL
            nll_BT = engine.token_nll(tokens_BT, labels_BT).double()
            sums += torch.stack([(nll_BT * counted_BT).sum(), counted_BT.sum()])
            got_on()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    before = loss([0.0] * num_blocks)
    rises = [loss([float(depth == rounded) for depth in range(num_blocks)]) - before for rounded in range(num_blocks)]
    set_strength_(engine.model, 1.0)
    if not all(map(math.isfinite, rises)):
        raise TrainingError(
            f"the loss rises by {rises} if one block alone is rounded, so blocks have no order of sensitivity; set "
            "transition.ramp.order to front-to-back, and look at the loss before the switch"
        )
    return list(value_of_first(rises))


def order_of(rises: Sequence[float]) -> tuple[int, ...]:
    """Blocks by the rise of the loss, the least first; of equal ones the front."""
    return tuple(sorted(range(len(rises)), key=rises.__getitem__))


def sensitivity_note(rises: Sequence[float]) -> tuple[dict[str, float], str]:
    """Values for the log and a line for the console."""
    values = {f"transition/sensitivity_{depth}": rise for depth, rise in enumerate(rises)}
    turns = ", ".join(f"{depth} ({rises[depth]:+.4g})" for depth in order_of(rises))
    return values, f"blocks become ternary in this order, by what their rounding alone adds to the loss: {turns}"
