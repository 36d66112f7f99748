"""Choose among several ways to compute one product, by trying them on the device, once for each shape.

No way is fastest everywhere: there are cards on which int8 is slow, and shapes for which Triton is. One that fails, or
whose result differs from the first one's in a single bit, is left out and named.
"""

import statistics
import warnings
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

Way = Callable[..., Tensor]
"""A function of the operands."""

ROUNDS = 7

HEAD_START = 2_000_000
"""Cycles that the device is kept busy, so that calls are waiting for it and not it for them: about a millisecond."""

_chosen: dict[Hashable, Way] = {}


def fastest(
    key: Hashable,
    ways: Callable[[], Mapping[str, Way]],
    operands: tuple[Tensor, ...],
    seconds: Callable[[Way, tuple[Tensor, ...]], float],
) -> Tensor:
    """The product, by the way that was fastest for this key the first time.

    Args:
        key: of what decides: shapes, dtype, device.
        ways: makes them, by name; the first is the reference, and must not fail.
        operands: of the product.
        seconds: measures a call.
    """
    if (way := _chosen.get(key)) is not None:
        return way(*operands)
    (_, reference), *others = ways().items()
    expected = reference(*operands)
    times = {reference: seconds(reference, operands)}
    for name, way in others:
        try:
            found = way(*operands)
            if not torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
                warnings.warn(f"{name} gives other bits for {key}, and is not used", stacklevel=2)
                continue
            times[way] = seconds(way, operands)
        except OutOfResources:  # of a smaller device
            continue
        except Exception as error:  # whatever a compiler or a driver raises
            warnings.warn(f"{name} fails for {key}, and is not used: {error}", stacklevel=2)
    _chosen[key] = min(times, key=lambda way: times[way])
    return expected


def cuda_seconds(way: Way, operands: tuple[Tensor, ...]) -> float:
    """Seconds of a call that has been made before, on the device; the median of some."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    torch.cuda._sleep(HEAD_START)
    for begin, end in events:
        begin.record()
        way(*operands)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3
