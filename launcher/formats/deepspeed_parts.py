"""The places in which DeepSpeed's stages keep the elements of each parameter.

Each stage keeps fp32 weights and moments in its own way (as of DeepSpeed 0.19.8):

- 1 and 2: the parameters of a group are one flat tensor, in the order of `param_shapes` and padded as
  `param_alignment_paddings` says, cut into equal parts of which the last ones lose the padding. DeepSpeed's own
  `zero_to_fp32` reads it so. The `param_slice_mappings` beside it say otherwise, and wrongly, if
  ``round_robin_gradients`` was on.
- 3: each parameter is cut into parts of ceil(elements / ranks), the last one padded. A rank's parts of all parameters
  of a group (or of a part of it, a sub-group) are one flat tensor, in the order of `param_shapes`.
- 0: nothing is cut. torch's own optimizer state, in which parameters have numbers instead of names.

Whatever the stage, a `Part` says where some elements of a parameter are. They are read when they are asked for, and
weights are then compared with those that the model computed with, where the folder holds them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from launcher.engine.contract import MOMENTS
from launcher.errors import CheckpointError
from launcher.formats.pickled import PickledFile

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Some consecutive elements of a flattened parameter, the same ones of its weight and its moments."""

    name: str
    file: PickledFile
    tensors: Mapping[str, Any]
    """Where they are, by kind."""
    offset: int
    """The first one's place in these tensors, flattened."""
    length: int
    step: float | None = None
    """The number of updates that the moments have seen; None without moments."""


def find_parts(
    models: Sequence[PickledFile], ranks: Sequence[PickledFile]
) -> tuple[dict[str, Shape], list[Part], list[Part]]:
    """Shapes in the order of the model, the parts that the optimizer had, and those of frozen parameters."""
    model = models[0].tree
    left_out = {*model["buffer_names"], *(model["shared_params"] or {})}
    module = {n: value for n, value in model["module"].items() if n not in left_out and isinstance(value, Tensor)}
    if model["param_shapes"] is None:
        module = dict(_unshared(module))
        shapes = {name: tuple(value.shape) for name, value in module.items()}
        return shapes, *_uncut_parts(models[0], module)
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    stages = set()
    for rank in ranks:
        optimizer = rank.tree["optimizer_state_dict"]
        counts = optimizer["partition_count"]
        if {len(ranks)} != set(counts if isinstance(counts, list) else [counts]):
            raise CheckpointError(f"{rank.path} is one of {counts} partitions, and {len(ranks)} ranks have written")
        stages.add(rank.read_number(optimizer.get("zero_stage", 1)))
    if len(stages) > 1:
        raise CheckpointError(f"{ranks[0].path.parent} is a mixture: its ranks have written stages {sorted(stages)}")
    if stages == {3}:
        trained = [
            part for number, rank in enumerate(ranks) for part in _cut_parameters(rank, groups, number, len(ranks))
        ]
    else:
        trained = list(_cut_groups(ranks, groups))
    frozen_shapes = {name: tuple(shape) for name, shape in (model["frozen_param_shapes"] or {}).items()}
    frozen_shapes |= {n: tuple(v.shape) for n, v in module.items() if n not in shapes and n not in frozen_shapes}
    shapes |= frozen_shapes
    frozen = [part for name, shape in frozen_shapes.items() for part in _frozen_parts(name, shape, models)]
    return {name: shapes[name] for name in (*module, *(shapes.keys() - module.keys()))}, trained, frozen


def _adam(file: PickledFile, states: Any, index: int, settings: Any) -> tuple[dict[str, Any], float | None]:
    """Moments and step of an entry of torch's optimizer state; nothing if it lacks one of them."""
    state = dict(enumerate(states)).get(index, {}) if isinstance(states, list) else states.get(index, {})
    step = state.get("step", settings[0].get("step") if settings else None)
    if step is None or any(kind not in state for kind in MOMENTS):
        return {}, None
    return {kind: state[kind] for kind in MOMENTS}, file.read_number(step)


def _cut_groups(ranks: Sequence[PickledFile], groups: Sequence[dict[str, Shape]]) -> Iterator[Part]:
    """The parts in the files of stage 1 or 2: those of each parameter in order."""
    paddings = ranks[0].tree["optimizer_state_dict"].get("param_alignment_paddings")
    for index, shapes in enumerate(groups):
        places, end = {}, 0
        for (name, shape), padding in zip(
            shapes.items(), paddings[index] if paddings else [0] * len(shapes), strict=True
        ):
            places[name] = end, end + math.prod(shape)
            end += math.prod(shape) + padding
        begin = 0
        for rank in ranks:
            optimizer = rank.tree["optimizer_state_dict"]
            base = optimizer["base_optimizer_state"]  # a list with `elastic_checkpoint`
            states, settings = (base, ()) if isinstance(base, list) else (base["state"], base["param_groups"])
            moments, step = _adam(rank, states, index, settings[index : index + 1])
            tensors = {"weight": optimizer["single_partition_of_fp32_groups"][index], **moments}
            own = tensors["weight"].numel()
            for name, (first, last) in places.items():
                start, stop = max(first, begin), min(last, begin + own)
                if start < stop:
                    yield Part(name, rank, tensors, start - begin, stop - start, step)
            begin += own
        if not end <= begin < end + 2 * len(ranks):  # the whole is padded to a multiple of twice the ranks
            raise CheckpointError(f"{ranks[0].path.parent} holds {begin} elements in a group of {end}")


def _cut_parameters(rank: PickledFile, groups: list[dict[str, Shape]], number: int, num_ranks: int) -> Iterator[Part]:
    """The parts in the file of rank ``number`` of stage 3."""
    optimizer = rank.tree["optimizer_state_dict"]
    base = optimizer["optimizer_state_dict"]
    for index, shapes in enumerate(groups):
        moments, step = _adam(rank, base["state"], index, base["param_groups"])
        tensors = {"weight": optimizer["fp32_flat_groups"][index], **moments}
        offset = 0
        for name, shape in shapes.items():
            num_elements = math.prod(shape)
            width = math.ceil(num_elements / num_ranks)
            yield Part(name, rank, tensors, offset, max(0, min(width, num_elements - number * width)), step)
            offset += width
        if offset != tensors["weight"].numel():
            raise CheckpointError(f"{rank.path} holds {tensors['weight'].numel()} elements in a group of {offset}")


def _frozen_parts(name: str, shape: Shape, models: Sequence[PickledFile]) -> Iterator[Part]:
    left = math.prod(shape)
    for file in models:  # several in stage 3, the last fragment padded
        fragment = (file.tree["frozen_param_fragments"] or file.tree["module"])[name]
        length = min(left, fragment.numel())
        yield Part(name, file, {"weight": fragment}, 0, length)
        left -= length


def _unshared(module: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors without those that share their storage with an earlier one; empty tensors share none."""
    seen = set()
    for name, tensor in module.items():
        storage: Any = tensor.untyped_storage()
        place = (storage._checkpoint_offset, tensor.storage_offset(), tensor.shape)
        if place not in seen or not tensor.numel():
            yield name, tensor
        seen.add(place)


def _uncut_parts(file: PickledFile, module: Mapping[str, Tensor]) -> tuple[list[Part], list[Part]]:
    """The parts of stage 0; a model that was saved without its optimizer counts as frozen."""
    optimizer = file.tree["optimizer"]
    if optimizer is None:
        return [], [Part(name, file, {"weight": tensor}, 0, tensor.numel()) for name, tensor in module.items()]
    base = optimizer.get("optimizer_state_dict", optimizer)  # in the wrapper's for 16 bits
    if ("fp32_groups" in optimizer) != (base is not optimizer):
        raise CheckpointError(f"{file.path} comes from an fp16 optimizer of stage 0, which is not read")
    groups = [group["params"] for group in base["param_groups"]]
    numbers = [number for group in groups for number in group]
    masters = dict(
        zip(numbers, (master for group in optimizer.get("fp32_groups", ()) for master in group), strict=False)
    )
    adam = {number: _adam(file, base["state"], number, ()) for number in numbers}
    if not masters and any(step is None for _, step in adam.values()):
        return [Part(name, file, {"weight": tensor}, 0, tensor.numel()) for name, tensor in module.items()], []
    shapes = {number: tuple((masters[number] if masters else adam[number][0]["exp_avg"]).shape) for number in numbers}
    trained = []
    for name, number in _match(file, module, [[(number, shapes[number]) for number in group] for group in groups]):
        moments, step = adam[number]
        tensors = {"weight": masters.get(number, module[name]), **moments}
        trained.append(Part(name, file, tensors, 0, module[name].numel(), step))
    return trained, []


def _match(
    file: PickledFile, module: Mapping[str, Tensor], groups: list[list[tuple[int, Shape]]]
) -> Iterator[tuple[str, int]]:
    """The optimizer's number of each parameter, if each group is in the order of the model.

    The next parameter is the first that is left of one of the groups. Its shape must say of which.
    """
    if len(module) != sum(len(group) for group in groups):
        raise CheckpointError(f"{file.path} has {len(module)} weights, and not as many parameters in the optimizer")
    for name, tensor in module.items():
        fitting = [group for group in groups if group and group[0][1] == tuple(tensor.shape)]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{file.path} numbers the optimizer's parameters (stage 0), and {name} may be any of {len(fitting)}; "
                "let DeepSpeed load it and save it with stage 1"
            )
        yield name, fitting[0].pop(0)[0]
