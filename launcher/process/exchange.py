"""Exchange of small values between ranks, as JSON.

`all_gather_object` and `broadcast_object_list` of torch unpickle what comes over the network, and a pickle may run any
code. Connections between ranks have no password, so nothing that arrives is unpickled.
"""

import json
from typing import Any

import torch
import torch.distributed as dist


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
    size = torch.tensor([content.numel()])
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    return json.loads(content.numpy().tobytes())
