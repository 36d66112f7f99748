"""Choose among several ways to compute one product, by trying them on the device, once for each shape.

No way is fastest everywhere: there are cards on which int8 is slow, and shapes for which Triton is. One that fails, or
whose result differs from the first one's in a single bit, is left out and named.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Way = tuple[str, Callable[..., Tensor]]
"""A name, and a function of the operands."""

ROUNDS = 5

_chosen: dict[tuple[object, ...], Callable[..., Tensor]] = {}


def fastest(
    key: tuple[object, ...], ways: Sequence[Way], operands: tuple[Tensor, ...], seconds: Callable[..., float]
) -> Tensor:
    """The product, by the way that was fastest for this key the first time.

    Args:
        key: of what decides: shapes, strides, dtype, device.
        ways: the first is the reference, and must not fail.
        operands: of the product.
        seconds: measures a call.
    """
    if key in _chosen:
        return _chosen[key](*operands)
    (_, reference), *others = ways
    expected = reference(*operands)
    times = {reference: seconds(reference, operands)}
    for name, way in others:
        try:
            found = way(*operands)
            if not torch.equal(found, expected):
                warnings.warn(f"{name} gives other bits for {key}, and is not used", stacklevel=2)
                continue
            times[way] = seconds(way, operands)
        except Exception as error:  # whatever a compiler or a driver raises
            warnings.warn(f"{name} fails for {key}, and is not used: {error}", stacklevel=2)
    _chosen[key] = min(times, key=lambda way: times[way])
    return expected


def cuda_seconds(way: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> float:
    """Seconds of a call that has been made before, on the device; the least of some."""
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        way(*operands)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times) / 1e3
