"""Host memory that a checkpoint is copied to before it is written, the same for every checkpoint.

torch rounds each piece of pinned memory up to a power of two: up to twice what a tensor takes. So many tensors share a
slab, whose size is a power of two already.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; each tensor begins at a multiple of it."""


class Staging:
    """Copies of tensors in host memory.

    Args:
        pinned: whether it is locked, so that a GPU copies to it while training goes on.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._places: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy tensors, each to the place that its key had; places of other keys are given up.

        The shape and dtype of a key's tensor must stay as they are. A GPU may not have copied yet when this returns.
        """
        self._places = {key: place for key, place in self._places.items() if key in tensors}
        sizes = {key: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for key, tensor in tensors.items()}
        new = sorted((key for key in tensors if key not in self._places), key=lambda key: -sizes[key])
        left, used, slab = sum(sizes[key] for key in new), 0, torch.empty(0, dtype=torch.uint8)
        for key in new:
            if used + sizes[key] > len(slab):
                slab = torch.empty(slab_bytes(left, sizes[key]), dtype=torch.uint8, pin_memory=self._pinned)
                used = 0
            tensor, place = tensors[key], slab[used:]
            self._places[key] = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            used, left = used + sizes[key], left - sizes[key]
        return {key: self._places[key].copy_(tensor, non_blocking=True) for key, tensor in tensors.items()}


def slab_bytes(left: int, largest: int) -> int:
    """The largest power of two that ``left`` bytes fill, or the smallest that ``largest`` bytes fit into."""
    return int(2 ** max(left.bit_length() - 1, (largest - 1).bit_length()))
