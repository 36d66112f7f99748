"""The folders that DeepSpeed's `save_checkpoint` writes, read without DeepSpeed.

    FOLDER/latest                                          the name of the newest TAG
    FOLDER/TAG/mp_rank_00_model_states.pt                  stages 0 to 2: weights as the model computes with them
               zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: one per rank, without weights
               zero_pp_rank_R_mp_rank_00_optim_states.pt   what rank R has of the fp32 weights and the moments; with
                                                           `bf16_` in front where the model computes in that

What the stages have in these files, and where, is in `launcher.formats.deepspeed_parts`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.names import bare_name
from launcher.checkpoint.source import Source
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_parts import Part, Shape, find_parts
from launcher.formats.hf_source import CONFIG, read_model
from launcher.formats.pickled import PickledFile

POINTER, WHOLE_MODEL = "latest", "mp_rank_00_model_states.pt"


RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


UNREAD = {
    "tensor or pipeline parallelism": r".*mp_rank_(?!00_)\d.*_states\.pt|layer_\d+-model.*",
    "a mixture of experts": r"(layer_\d+_)?exp.*_states\.pt",
    "an optimizer offloaded to NVMe": "offloaded_tensors",
}
"""Kinds of checkpoint that are refused, by the name of a file that only they have."""


MISSING = (
    "The position in the data is not in a DeepSpeed checkpoint.",
    "The state of the random number generators is not in a DeepSpeed checkpoint.",
    "The learning-rate schedule is not taken from a DeepSpeed checkpoint: the configuration's applies.",
)


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that wrappers of a model add to every name."""


def is_deepspeed(folder: Path) -> bool:
    """Return whether this is a folder of DeepSpeed's `save_checkpoint`, or that of a tag in it."""
    return (folder / POINTER).is_file() or (any(folder.glob("*_model_states.pt")) and not (folder / "zero").is_dir())


def tag_folder(folder: Path, pointer: str) -> Path:
    """The folder that the file named ``pointer`` names; the given one if there is no such file."""
    if not (folder / pointer).is_file():
        return folder
    tag = (folder / pointer).read_text(errors="replace").strip()
    try:
        bare_name(tag)
    except ValueError as error:
        raise CheckpointError(f"{folder / pointer} {error}") from error
    if not (folder / tag).is_dir():
        raise CheckpointError(f"{folder / pointer} names {tag!r}, but there is no such folder beside it")
    return folder / tag


def is_left_over(folder: Path, pointer: str) -> bool:
    """Return whether there is a file named ``pointer``, and the folder that it names is not there any more."""
    try:
        tag_folder(folder, pointer)
    except CheckpointError:
        return True
    return False


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Parameter names by their short forms, without the wrapper prefixes that all of them must share."""
    short = {name: name for name in names}
    while short and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in short)), None)):
        short = {name.removeprefix(wrapper): full for name, full in short.items()}
    return short


class Computed:
    """The weights that a model computed with, in a file of model states: the fp32 weights, rounded.

    They do not depend on the layout of the fp32 weights, so every weight that is read is compared with them.

    Args:
        file: of model states.
        module: the weights in it by name; stage 3 has none.
    """

    def __init__(self, file: PickledFile, module: Mapping[str, Any]) -> None:
        self._file = file
        self._module = {name: value for name, value in module.items() if isinstance(value, Tensor) and value.numel()}

    def hold_against(self, name: str, start: int, weights: Tensor) -> None:
        """Compare consecutive elements of a flattened fp32 weight.

        Raises:
            CheckpointError: the model computed with others.
        """
        if name not in self._module:
            return
        computed = self._file.read(self._module[name], start, len(weights))
        different = computed != weights.to(computed.dtype)
        if (different & weights.isfinite()).any():
            dtype = str(computed.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self._file.path.parent}: {int(different.sum())} of {len(weights)} elements of {name} are not what "
                f"the model computed with in {dtype}: DeepSpeed has placed its fp32 weights in an order that is not "
                "known here. Save the weights with DeepSpeed's zero_to_fp32 or save_16bit_model, and start from these"
            )


@contextmanager
def naming_content(location: str) -> Iterator[None]:
    """Turn every failure to interpret a file's content into one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{location} does not hold what DeepSpeed 0.19 writes: {error!r}") from error


class DeepSpeedSource(Source):
    """A folder that plain DeepSpeed wrote with ZeRO stage 0, 1, 2 or 3, at any number of ranks.

    Parameters that were frozen have no moments: these read as zeros, with step 0. Of parameters that share their memory
    (tied embeddings) the first name is there, as in a model's `named_parameters`.

    Args:
        folder: the one with the file `latest`, or that of a tag in it. A `config.json` beside `latest` describes the
            model; Transformers' Trainer leaves one.

    Raises:
        CheckpointError: a file is missing or damaged, or the folder comes from a kind of training that is not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = tag_folder(folder, POINTER)
        self.model = read_model(folder) if folder != self.folder and (folder / CONFIG).is_file() else None
        self.location = str(folder if self.model else self.folder)
        if self.model and self.model.packing and not self.model.packing.online:
            raise CheckpointError(
                f"{folder / CONFIG} describes packed weights, and DeepSpeed has trained others beside it"
            )
        with naming_content(self.location):
            models, ranks = _open_files(self.folder)
            shapes, trained, frozen = find_parts(models, ranks)
            self._computed = Computed(models[0], models[0].tree["module"])
            self._parts: dict[str, list[Part]] = {name: [] for name in shapes}
            for part in (*trained, *frozen):
                self._parts[part.name].append(part)
            for name, shape in shapes.items():
                self._check(name, shape)
        self._names = unwrapped(shapes)
        self.shapes = {short: shapes[name] for short, name in self._names.items()}
        self.has_moments = bool(trained) and all(part.step is not None for part in trained)
        self.missing = (*MISSING, *self._shortcomings({part.name for part in frozen}))
        if self.has_moments and not ranks:
            self.missing += ("Stage 0 numbers the moments; they were given to parameters by order and shape.",)

    @property
    def first_token(self) -> int | None:
        """See `launcher.formats.hf_source.FolderModel.first_token`."""
        return self.model.first_token(self.location) if self.model else None

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        num_elements = math.prod(self.stored_shape(name))
        if not 0 <= start <= start + length <= num_elements:
            raise CheckpointError(f"{self.location}: {name} has {num_elements} elements, not {start + length}")
        # NumPy asks for huge pages, whose first touch costs a quarter of the time.
        found, position = torch.from_numpy(np.empty(length, np.float32)), 0
        for part in self._parts[self._names[name]]:
            first, end = max(start, position), min(start + length, position + part.length)
            if first < end:
                out, stored = found[first - start : end - start], part.tensors.get(kind)
                if stored is None:
                    out.zero_()
                elif stored.dtype == torch.float32:
                    part.file.read(stored, part.offset + first - position, end - first, into=out)
                else:
                    out.copy_(part.file.read(stored, part.offset + first - position, end - first))
            position += part.length
        if kind == "weight":
            self._computed.hold_against(self._names[name], start, found)
        return found

    def read_step(self, name: str) -> float:
        return next((part.step for part in self._parts[self._names[name]] if part.step is not None), 0.0)

    def check_ahead(self, kinds: Sequence[str]) -> None:
        for name in self._names.values():
            for kind in kinds:
                for part in self._parts[name]:
                    if kind in part.tensors:
                        part.file.check(part.tensors[kind])

    def _check(self, name: str, shape: Shape) -> None:
        """Check that the parts of a parameter are in place, complete, and of one save."""
        if any(type(size) is not int or size < 0 for size in shape):
            raise CheckpointError(f"{self.location} has {shape} as the shape of {name}")
        num_elements = 0
        for part in self._parts[name]:
            for kind, tensor in part.tensors.items():
                part.file.locate(tensor)
                if not 0 <= part.offset <= part.offset + part.length <= tensor.numel():
                    raise CheckpointError(
                        f"{part.file.path} has {tensor.numel()} elements where {name} ({kind}) should be"
                    )
            num_elements += part.length
        if num_elements != math.prod(shape):
            raise CheckpointError(f"{self.location} holds {num_elements} elements of {name}, whose shape is {shape}")
        if len({part.step for part in self._parts[name]}) > 1:
            raise CheckpointError(
                f"{self.location} is a mixture: its ranks hold {name} after different numbers of steps"
            )

    def _shortcomings(self, frozen: set[str]) -> Iterator[str]:
        if not self.has_moments:
            yield "Adam's moments are missing, or some of them: the optimizer starts over."
        elif frozen:
            yield f"Moments of {_some(frozen)} are missing because it was frozen: they start at zero."
        coarse = {
            part.name: str(part.tensors["weight"].dtype).removeprefix("torch.")
            for parts in self._parts.values()
            for part in parts
            if part.tensors["weight"].dtype.itemsize < 4
        }
        if coarse:
            yield f"The fp32 weight of {_some(coarse)} is missing: it is stored in {min(coarse.values())}."


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} (and of {len(others)} others)" if others else first


def _open_files(folder: Path) -> tuple[list[PickledFile], list[PickledFile]]:
    """The files of model states and those of optimizer states, each in the order of the ranks."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    for origin, pattern in UNREAD.items():
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            raise CheckpointError(f"{folder} comes from {origin} (see {found[0]}), which is not read")
    by_rank: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in names:
        if match := RANK_FILE.fullmatch(name):
            other = by_rank[match[2]].setdefault(int(match[1]), name)
            if other != name:
                raise CheckpointError(f"{folder} holds parts of two checkpoints: {other} and {name}")
    if WHOLE_MODEL in names or not by_rank["model"]:
        by_rank["model"] = {0: WHOLE_MODEL}
    models, ranks = ([PickledFile(folder / found[rank]) for rank in sorted(found)] for found in by_rank.values())
    if models[0].tree["param_shapes"] is None:
        return models, []
    num_ranks = models[0].tree["dp_world_size"]
    for kind, files in by_rank.items():
        expected = range(1 if files.get(0) == WHOLE_MODEL else num_ranks)  # which may be any number
        odd = next((rank for rank in expected if rank not in files), None)
        odd = next((rank for rank in sorted(files) if rank not in expected), None) if odd is None else odd
        if odd is not None:
            state = "missing" if odd in expected else "there as well"
            raise CheckpointError(
                f"{folder} was written by {num_ranks} ranks, and rank {odd}'s file of {kind} states is {state}"
            )
    return models, ranks
