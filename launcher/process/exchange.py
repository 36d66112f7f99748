"""Exchange of small values between ranks, as JSON.

`all_gather_object` and `broadcast_object_list` of torch unpickle what comes over the network, and a pickle may run any
code. Connections between ranks have no password, so nothing that arrives is unpickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError
from launcher.errors import CheckpointError, ConfigError, FirstRankError, NoTimeError, UserError

KINDS = (NoTimeError, ConfigError, CheckpointError, DataError, UserError, Exception)
"""The errors that ranks tell apart, the closest first."""

Element = TypeVar("Element", bound=np.generic)


def gather_values(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value on every rank; a collective, on the host.

    Args:
        value: of JSON's types; a tuple comes back as a list, a key as a string.
        group: the ranks that take part; all of them if None.
    """
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([content.numel()]), group=group)
    longest = int(max(sizes))
    contents = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(contents, torch.nn.functional.pad(content, (0, longest - content.numel())), group=group)
    return [json.loads(content[:size].numpy().tobytes()) for content, size in zip(contents, sizes, strict=True)]


def value_of_first(value: Any) -> Any:
    """Return the first rank's value on every rank; a collective, on the host. See `gather_values`."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return json.loads(_bytes_of_first(content).numpy().tobytes())


def array_of_first(array: NDArray[Element]) -> NDArray[Element]:
    """Return the first rank's array on every rank; a collective, on the host.

    Args:
        array: with one dimension; that of another rank has only the type.
    """
    return _bytes_of_first(torch.from_numpy(array.view(np.uint8))).numpy().view(array.dtype)


def _bytes_of_first(content: Tensor) -> Tensor:
    size = torch.tensor([content.numel()])
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    return content


@contextmanager
def failing_alike() -> Iterator[None]:
    """Fail on every rank where the first one fails in this block, which is its work alone; a collective, on the host.

    If it failed alone, the others would wait for it, see their connections break, and report that.

    Raises:
        Exception: the first rank's own error. On the others it is the same if a user can put it right, and else a
            `FirstRankError`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if dist.is_initialized():
        kind = next((number for number, kind in enumerate(KINDS) if isinstance(failure, kind)), None)
        kind, text = value_of_first([kind, str(failure)])
        if kind is not None and failure is None:
            raise FirstRankError(text) if KINDS[kind] is Exception else KINDS[kind](text)
    if failure is not None:
        raise failure
