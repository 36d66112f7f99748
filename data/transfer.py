"""The way of tensors from the memory of the host to a device."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it: CUDA copies pageable memory only when all before is done."""
    leaves_host = tensor.device.type == "cpu" and device.type == "cuda"
    return (tensor.pin_memory() if leaves_host else tensor).to(device, non_blocking=True)


def widened(rows: NDArray[Any], device: torch.device) -> Tensor:
    """Rows in the memory of the device as int64; they travel as they are stored, in 2 or 4 bytes a token.

    The copy is queued where it is used, so that the host, which is ahead of the device, has it sent early; a queue of
    its own would save microseconds.
    """
    if device.type == "cpu":
        return torch.from_numpy(rows.astype(np.int64))  # in half of torch's time
    return to_device(torch.from_numpy(rows.copy()), device).long()  # a copy, since what is read cannot be written
