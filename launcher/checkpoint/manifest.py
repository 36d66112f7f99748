"""What a checkpoint says of itself, checked in one place, so that nothing behind it has to doubt a type or a bound.

Digests prove that a file is as it was written, not that it was written right, or by us.
"""

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from launcher.checkpoint.folders import CONFIG
from launcher.checkpoint.source import KINDS
from launcher.checkpoint.tensor_file import DIGESTS, MAX_DIMENSIONS, TensorFile, TensorFileError, is_count


@dataclass
class Progress:
    """Where a run is. Everything of it goes into a checkpoint."""

    step: int = 0
    """Steps finished."""
    phase: int = 0
    """Index of the phase that the model is in."""
    skipped_steps: int = 0
    """Steps so far that had no finite gradient."""


def check_guard_state(state: Any) -> None:
    """Make sure that a checkpoint holds what `SpikeGuard.state` gives.

    Raises:
        ValueError: it does not.
    """
    sound = (
        isinstance(state, dict)
        and isinstance(state.get("windows"), dict)
        and all(map(_is_window, state["windows"].values()))
        and _is_count(state.get("skipped"))
        and "loss_before" in state
        and (state["loss_before"] is None or _is_number(state["loss_before"]))
    )
    if not sound:
        raise ValueError("its 'spikes' is not what the guards against spikes remember")


def _is_window(window: Any) -> bool:
    return (
        isinstance(window, dict)
        and isinstance(window.get("values"), list)
        and all(map(_is_number, window["values"]))
        and _is_count(window.get("count"))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


FILE_NAME = re.compile(r"rank-[0-9]{5}\.safetensors")


DIGEST = re.compile(r"[0-9a-f]{32}")


Check = Callable[[Any], bool]


FIELDS: dict[str, tuple[str, Check]] = {
    "milestone": ("true or false", lambda value: type(value) is bool),
    "has_moments": ("true or false", lambda value: type(value) is bool),
    "step": ("a count", is_count),
    "tokens": ("a count", is_count),
    "data_fingerprint": ("text or null", lambda value: value is None or isinstance(value, str)),
    "progress": ("an object", lambda value: isinstance(value, dict)),
    "files": ("an object", lambda value: isinstance(value, dict)),
}
"""What a manifest must have, and of what kind each is; more may be there."""


@dataclasses.dataclass
class Parameter:
    """Where a parameter's values are, all files together."""

    shape: tuple[int, ...]
    step: float
    """Number of updates behind the moments."""
    ranges: list[tuple[int, int, str]]
    """First element, the one behind the last, and the file, in ascending order and without a gap."""


def check_manifest(manifest: dict[str, Any]) -> None:
    """Make sure that a manifest has what is read from it.

    Raises:
        ValueError: says which key is not as it should be.
    """
    for key, (kind, check) in FIELDS.items():
        if key not in manifest or not check(manifest[key]):
            raise ValueError(f"its {key!r} is not {kind}")
    progress, names = manifest["progress"], {field.name for field in dataclasses.fields(Progress)}
    if progress.keys() != names or not all(
        type(value) is int and is_count(value + (key == "phase"))  # which is -1 before the first
        for key, value in progress.items()
    ):
        raise ValueError(f"its 'progress' is not a count for each of {', '.join(sorted(names))}")
    if progress["step"] != manifest["step"]:
        raise ValueError(f"its 'step' is {manifest['step']}, and in 'progress' {progress['step']}")
    if "spikes" in manifest:
        check_guard_state(manifest["spikes"])
    for name, record in manifest["files"].items():
        if name != CONFIG and not FILE_NAME.fullmatch(name):
            raise ValueError(f"its 'files' names {reprlib.repr(name)}, which is no file of a checkpoint")
        sound = isinstance(record, dict) and is_count(record.get("size")) and isinstance(record.get("digest"), str)
        if not sound or not DIGEST.fullmatch(record["digest"]):
            raise ValueError(f"its 'files' has no size and digest for {name}")
    if CONFIG not in manifest["files"] or len(manifest["files"]) < 2:
        raise ValueError(f"its 'files' lacks {CONFIG}, or files of tensors")


def parameters_of(files: Mapping[str, TensorFile], *, has_moments: bool) -> dict[str, Parameter]:
    """Put together what the files' headers say of the ranges in them.

    Raises:
        TensorFileError: with the file's name in front, where a header does not fit its tensors or another header, or
            where the ranges of a parameter do not make up the whole of it, once.
    """
    parameters: dict[str, Parameter] = {}
    for file_name, file in files.items():
        try:
            _add_ranges(parameters, file_name, file, KINDS if has_moments else KINDS[:1])
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


def _add_ranges(parameters: dict[str, Parameter], file_name: str, file: TensorFile, kinds: tuple[str, ...]) -> None:
    try:
        ranges = json.loads(file.metadata["ranges"])
    except (KeyError, ValueError, RecursionError) as error:
        raise TensorFileError("does not say in its header which ranges it holds") from error
    if not isinstance(ranges, dict):
        raise TensorFileError("does not say in its header which ranges it holds")
    expected = {f"{kind}/{name}" for name in ranges for kind in kinds}
    others = {name for name in file.entries if not name.startswith("rng/")} - {DIGESTS}
    if wrong := sorted(expected ^ others):
        raise TensorFileError(f"has tensors without a range, or ranges without a tensor: {', '.join(wrong[:5])}")
    if any(entry.dtype != torch.uint8 for name, entry in file.entries.items() if name.startswith("rng/")):
        raise TensorFileError("holds a generator's state as something else than bytes")
    for name, about in ranges.items():
        shape, start, step = _checked_range(name, about)
        lengths = {file.entries[f"{kind}/{name}"].num_elements for kind in kinds}
        dtypes = {file.entries[f"{kind}/{name}"].dtype for kind in kinds}
        if len(lengths) != 1 or dtypes != {torch.float32}:
            raise TensorFileError(f"holds {name} in other lengths or types than fp32 of one length")
        parameter = parameters.setdefault(name, Parameter(shape, step, []))
        if (parameter.shape, parameter.step) != (shape, step):
            raise TensorFileError(f"says another shape or number of updates of {name} than another file")
        parameter.ranges.append((start, start + lengths.pop(), file_name))


def _checked_range(name: str, about: Any) -> tuple[tuple[int, ...], int, float]:
    sound = (
        isinstance(about, dict)
        and isinstance(about.get("shape"), list)
        and len(about["shape"]) <= MAX_DIMENSIONS
        and all(map(is_count, about["shape"]))
        and is_count(about.get("start"))
        and type(about.get("step")) in (int, float)
        and 0 <= about["step"] < 2**63  # not so of a NaN either
    )
    if not sound:
        raise TensorFileError(f"does not say which range of {name} it holds")
    return tuple(about["shape"]), about["start"], float(about["step"])
