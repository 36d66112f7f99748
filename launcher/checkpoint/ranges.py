"""The ranges of parameters that a checkpoint's files hold, put together from the headers of these files."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from launcher.checkpoint.source import stored_kinds
from launcher.checkpoint.tensor_file import DIGESTS, MAX_DIMENSIONS, TensorFile, TensorFileError, is_count


@dataclasses.dataclass
class Parameter:
    """The places of a parameter's values in all files."""

    shape: tuple[int, ...]
    step: float
    """The number of updates that the moments have seen."""
    ranges: list[tuple[int, int, str]]
    """First element, the one after the last, and the file, in ascending order and without a gap."""
    kinds: tuple[str, ...]
    """Of the tensors, see `launcher.checkpoint.source.Source.kinds`."""


def parameters_of(
    files: Mapping[str, TensorFile], *, has_moments: bool, has_average: bool = False
) -> dict[str, Parameter]:
    """Combine the ranges that the files' headers list.

    Raises:
        TensorFileError: with the file's name in front, where a header does not fit its tensors or another header, or
            where the ranges of a parameter do not make up the whole of it, once.
    """
    parameters: dict[str, Parameter] = {}
    for file_name, file in files.items():
        try:
            _add_ranges(parameters, file_name, file, has_moments=has_moments, has_average=has_average)
        except TensorFileError as error:
            raise TensorFileError(f"{file_name} {error}") from error
    for name, parameter in parameters.items():
        parameter.ranges.sort()
        position = 0
        for start, end, file_name in parameter.ranges:
            if start != position:
                raise TensorFileError(f"{file_name} holds {name} from element {start}, where {position} is the next")
            position = end
        if position != math.prod(parameter.shape):
            raise TensorFileError(
                f"{parameter.ranges[-1][2]} ends {name} at element {position} of {math.prod(parameter.shape)}"
            )
    return parameters


def _add_ranges(
    parameters: dict[str, Parameter], file_name: str, file: TensorFile, *, has_moments: bool, has_average: bool
) -> None:
    try:
        ranges = json.loads(file.metadata["ranges"])
    except (KeyError, ValueError, RecursionError) as error:
        raise TensorFileError("does not say in its header which ranges it holds") from error
    if not isinstance(ranges, dict):
        raise TensorFileError("does not say in its header which ranges it holds")
    places = {
        name: _checked_range(name, about, has_moments=has_moments, has_average=has_average)
        for name, about in ranges.items()
    }
    expected = {f"{kind}/{name}" for name, (*_, kinds) in places.items() for kind in kinds}
    others = {name for name in file.entries if not name.startswith("rng/")} - {DIGESTS}
    if wrong := sorted(expected ^ others):
        raise TensorFileError(f"has tensors without a range, or ranges without a tensor: {', '.join(wrong[:5])}")
    if any(entry.dtype != torch.uint8 for name, entry in file.entries.items() if name.startswith("rng/")):
        raise TensorFileError("holds the state of a random generator that is not bytes")
    for name, (shape, start, step, kinds) in places.items():
        lengths = {file.entries[f"{kind}/{name}"].num_elements for kind in kinds}
        dtypes = {file.entries[f"{kind}/{name}"].dtype for kind in kinds}
        if len(lengths) != 1 or dtypes != {torch.float32}:
            raise TensorFileError(f"holds tensors of {name} that are not fp32, or not of one length")
        parameter = parameters.setdefault(name, Parameter(shape, step, [], kinds))
        if (parameter.shape, parameter.step, parameter.kinds) != (shape, step, kinds):
            raise TensorFileError(f"has another shape, number of updates or moments for {name} than another file")
        parameter.ranges.append((start, start + lengths.pop(), file_name))


def _checked_range(
    name: str, about: Any, *, has_moments: bool, has_average: bool
) -> tuple[tuple[int, ...], int, float, tuple[str, ...]]:
    """The shape, the first element, the number of updates, and the kinds of tensors."""
    sound = (
        isinstance(about, dict)
        and isinstance(about.get("shape"), list)
        and len(about["shape"]) <= MAX_DIMENSIONS
        and all(map(is_count, about["shape"]))
        and is_count(about.get("start"))
        and type(about.get("step")) in (int, float)
        and 0 <= about["step"] < 2**63  # not so of a NaN either
        and type(about.get("variance", True)) is bool
    )
    if not sound:
        raise TensorFileError(f"does not say which range of {name} it holds")
    kinds = stored_kinds(has_moments=has_moments, has_variance=about.get("variance", True), has_average=has_average)
    return tuple(about["shape"]), about["start"], float(about["step"]), kinds
