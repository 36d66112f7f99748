"""DeepSpeed's universal checkpoints, read and written without DeepSpeed.

    FOLDER/latest_universal                     the name of TAG
    FOLDER/TAG/zero/NAME/fp32.pt                one parameter, whole: {"param": tensor}, or a flat tensor from stage 3
                         exp_avg.pt, exp_avg_sq.pt      likewise
                         step.pt                stages 1 and 2
               zero/optimizer_state.pt          hyper-parameters of the groups; the step of stage 3
               *_model_states.pt                counters, and the shapes by group

`python -m deepspeed.checkpoint.ds_to_universal` makes one from a native folder (of stage 1 or 2 with
``--inject_missing_state``), and any number of ranks with stage 1, 2 or 3 goes on from it.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.names import bare_name
from launcher.checkpoint.location import new_location
from launcher.checkpoint.source import KINDS, Source
from launcher.engine.contract import MOMENTS
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import MISSING, Computed, naming_content, tag_folder, unwrapped
from launcher.formats.pickled import PickledFile

POINTER = "latest_universal"


FILES = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


FORMAT_OF = "0.19.8"
"""Version of DeepSpeed whose files these are; it looks for one."""


def is_universal(folder: Path) -> bool:
    """Return whether this is a universal checkpoint, or the folder of one that holds no native checkpoint as well."""
    return (folder / "zero").is_dir() or ((folder / POINTER).is_file() and not (folder / "latest").is_file())


class UniversalSource(Source):
    """A universal checkpoint, of DeepSpeed's own making or by `write_universal`.

    Parameters that were frozen have no moments: these read as zeros, with step 0.

    Args:
        folder: the one with the file `latest_universal`, or the one with `zero/`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = tag_folder(folder, POINTER)
        self.location = str(self.folder)
        self._files: dict[tuple[str, str], PickledFile] = {}
        with naming_content(self.location):
            shapes = self._find_shapes()
        self._names = unwrapped(shapes)
        self.shapes = {short: shapes[name] for short, name in self._names.items()}
        self.has_moments = bool(self._trained)
        frozen = [name for name in shapes if name not in self._trained]
        self.missing = MISSING
        if not self._trained:
            self.missing += ("Adam's moments are missing: the optimizer starts over.",)
        elif frozen:
            self.missing += (f"Moments of {', '.join(frozen)} are missing: they start at zero.",)

    def _find_shapes(self) -> dict[str, tuple[int, ...]]:
        models = sorted(self.folder.glob("*_model_states.pt"))
        if not models or not (self.folder / "zero").is_dir():
            raise CheckpointError(f"{self.location} lacks {'zero/' if models else '*_model_states.pt'}")
        file = PickledFile(models[0])
        model = file.tree
        self._computed = Computed(file, model.get("module") or {})
        left_out = {*(model.get("buffer_names") or ()), *(model.get("shared_params") or ())}
        groups = {name: tuple(shape) for group in model.get("param_shapes") or () for name, shape in group.items()}
        found = sorted(path.parent.name for path in (self.folder / "zero").glob("*/fp32.pt"))
        names = [  # of folders in zero/
            bare_name(name)
            for name in dict.fromkeys([*(model.get("module") or ()), *groups, *found])
            if name not in left_out
        ]
        shapes = {name: groups.get(name, tuple(self._tensor("weight", name)[1].shape)) for name in names}
        for name, shape in shapes.items():
            self._check(*self._tensor("weight", name), math.prod(shape))
        self._trained = {name for name in names if all(self._path(kind, name).is_file() for kind in MOMENTS)}
        if lacking := sorted(groups.keys() - self._trained) if self._trained else []:
            raise CheckpointError(f"{self._path('exp_avg', lacking[0]).parent} lacks moments, which others have")
        return shapes

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / "zero" / name / FILES[kind]

    def _tensor(self, kind: str, name: str) -> tuple[PickledFile, Tensor]:
        if (kind, name) not in self._files:
            self._files[kind, name] = PickledFile(self._path(kind, name))
        file = self._files[kind, name]
        tensor: Any = file.tree.get("param") if isinstance(file.tree, dict) else file.tree
        file.locate(tensor)
        return file, tensor

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        name, num_elements = self._names[name], math.prod(self.stored_shape(name))
        if kind in MOMENTS and name not in self._trained:
            return torch.zeros(min(length, num_elements - start))
        file, tensor = self._tensor(kind, name)
        self._check(file, tensor, num_elements)
        found = file.read(tensor, start, length).float()
        if kind == "weight":
            self._computed.hold_against(name, start, found)
        return found

    def _check(self, file: PickledFile, tensor: Tensor, num_elements: int) -> None:
        if tensor.numel() != num_elements:
            raise CheckpointError(f"{file.path} holds {tensor.numel()} elements instead of {num_elements}")

    def read_step(self, name: str) -> float:
        name = self._names[name]
        if name not in self._trained:
            return 0.0
        path = self.folder / "zero" / name / "step.pt"
        if path.is_file():
            file = PickledFile(path)
            return file.read_number(file.tree)
        return self._common_step

    @cached_property
    def _common_step(self) -> float:
        file = PickledFile(self.folder / "zero" / "optimizer_state.pt")
        try:
            base = file.tree["optimizer_state_dict"]
            return file.read_number(base["state"][0]["step"] if 0 in base["state"] else base["param_groups"][0]["step"])
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{file.path} has no step: {error!r}") from error


def check_universal(source: Source) -> float:
    """Check that the format can hold a source; returns its optimizer's step, 0 if it has no moments.

    Raises:
        CheckpointError: steps differ, for which the format has no place, or a name cannot be that of a folder.
    """
    if source.has_moments and any(not set(KINDS) <= set(source.kinds(name)) for name in source.shapes):
        raise CheckpointError(
            f"{source.location} was trained with Muon, and the format is for AdamW: matrices have no second moments"
        )
    steps = {source.read_step(name) if source.has_moments else 0.0 for name in source.shapes}
    if len(steps) != 1:
        raise CheckpointError(
            f"{source.location} has parameters after {min(steps):g} and after {max(steps):g} steps, and DeepSpeed "
            "counts the steps of all parameters together"
        )
    for name in source.shapes:
        try:
            bare_name(name)
        except ValueError as error:
            raise CheckpointError(f"{source.location}: a parameter becomes a folder, and it {error}") from error
    (step,) = steps
    return step


def write_universal(
    source: Source, folder: Path, *, learning_rate: float | None = None, files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a universal checkpoint, from which plain DeepSpeed continues with ZeRO stage 1, 2 or 3 on any ranks.

    With ``"checkpoint": {"load_universal": true}`` in its configuration, and before its first step::

        engine.load_checkpoint(folder)

    The hyper-parameters of every group stay those of the engine's own optimizer. A learning-rate scheduler goes on from
    the optimizer's step. ZeRO-3 in DeepSpeed 0.19.8 gives all groups of parameters, and all sub-groups, the
    very same tensor as their step, so that a step of torch's AdamW counts once for each. A line after loading helps
    (the optimizers of DeepSpeed itself count in plain numbers, and need none)::

        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()

    One tensor is in memory at a time. If the source has no moments, they are written as zeros with step 0, which is
    how Adam starts.

    Args:
        source: what to write.
        folder: where to; must not be there yet, and is there only once it is complete.
        learning_rate: of the next step, which comes before a scheduler's; None leaves the engine's.
        files: what else is put there, by name.

    Returns:
        The folder of the tag in it.

    Raises:
        CheckpointError: it is there already, it cannot be written, or steps differ, for which the format has no place.
    """
    step = check_universal(source)
    tag = f"global_step{step:.0f}"
    try:
        with new_location(folder) as building:
            _write_tag(source, building / tag, step, learning_rate)
            (building / POINTER).write_text(tag)
            for name, content in (files or {}).items():
                (building / name).write_bytes(content)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # torch has no better name for a full disk
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return folder / tag


def _write_tag(source: Source, folder: Path, step: float, learning_rate: float | None) -> None:
    for name, shape in source.shapes.items():
        (folder / "zero" / name).mkdir(parents=True)
        for kind, file_name in FILES.items():
            if kind in MOMENTS and not source.has_moments:
                tensor = torch.zeros(shape)
            else:
                tensor = source.read_finite(kind, name, 0, math.prod(shape)).reshape(shape)
            torch.save({"param": tensor, "cat_dim": 0}, folder / "zero" / name / file_name)
        torch.save(torch.tensor(step), folder / "zero" / name / "step.pt")
    # The engine's hyper-parameters are overwritten with what is here: in stages 1 and 2 group by group (at most as many
    # as there are parameters), in stage 3 those of all groups with the first one's.
    group = {} if learning_rate is None else {"lr": learning_rate}
    groups = [group for _ in source.shapes]
    state = {"state": {0: {"step": torch.tensor(step)}}, "param_groups": groups}
    optimizer = {"ds_version": FORMAT_OF, "param_groups": groups, "optimizer_state_dict": state}
    torch.save(optimizer, folder / "zero" / "optimizer_state.pt")
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in source.shapes.items()}],
        "shared_params": {},
        "optimizer": None,
        # For any of torch's, for `LambdaLR`, for any of DeepSpeed's.
        "lr_scheduler": {"last_epoch": int(step), "lr_lambdas": [], "last_batch_iteration": int(step) - 1},
        "skipped_steps": 0,
        "global_steps": int(step),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": FORMAT_OF,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    for file_name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # the latter: stage 3
        torch.save(model, folder / file_name)
