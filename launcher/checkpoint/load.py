"""Loading state into an engine from any source, and comparing what the two hold."""

from collections.abc import Iterator

import torch

from launcher.checkpoint.reader import CheckpointReader, DamageError
from launcher.checkpoint.source import KINDS, Source
from launcher.engine.contract import Engine
from launcher.errors import CheckpointError
from launcher.process.ranks import Ranks
from quant.linear import is_learned_scale, quantized_layers


@torch.no_grad()
def load_state(source: Source, engine: Engine, *, with_optimizer: bool) -> None:
    """Write a source's weights, and Adam's state if asked for, into this rank's shards.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape; or the source has
            no moments.
    """
    shards = list(engine.shards())
    names = {name for name, _ in engine.model.named_parameters()}
    if problems := list(mismatches(source, names, {shard.name: shard.shape for shard in shards})):
        raise CheckpointError(f"{source.location} does not fit the model:\n" + "\n".join(problems))
    if with_optimizer and not source.has_moments:
        raise CheckpointError(
            f"{source.location} has no optimizer moments to keep; set the transition's optimizer to reset"
        )
    lacking = [shard.name for shard in shards if shard.name not in source.shapes]
    if lacking and any(layer.quant_config.learned for layer in quantized_layers(engine.model).values()):
        raise CheckpointError(f"{source.location} is of a phase without learned scales; it lacks {lacking[0]}")
    shards = [shard for shard in shards if shard.name in source.shapes]
    kinds = KINDS if with_optimizer else ("weight",)
    for shard in shards:
        for kind in kinds:
            tensor = shard.tensors[kind]
            tensor.copy_(source.read(kind, shard.name, shard.start, len(tensor)))
        if with_optimizer:
            shard.step.fill_(source.read_step(shard.name))
    engine.refresh_weights()


def mismatches(source: Source, names: set[str], shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Say how a source's parameters differ from a model's: all its ``names``, and ``shapes`` as far as known.

    Learned scales do not count: see `launcher.engine.learned_scales`.
    """
    for name in sorted(names ^ source.shapes.keys()):
        if not is_learned_scale(name):
            has, has_not = ("model", "checkpoint") if name in names else ("checkpoint", "model")
            yield f"{name}: the {has} has it, the {has_not} does not"
    for name, shape in shapes.items():
        if name in source.shapes and source.shapes[name] != shape:
            yield f"{name}: {list(source.shapes[name])} in the checkpoint, {list(shape)} in the model"


def restore_rng(reader: CheckpointReader, ranks: Ranks) -> None:
    """Set this rank's generators to where they were.

    Raises:
        CheckpointError: what is there is no generator's state.
    """
    for name, state in reader.rng_states(ranks.rank).items():
        try:
            if name == "cpu":
                torch.set_rng_state(state)
            elif ranks.device.type == "cuda":
                torch.cuda.set_rng_state(state)
        except RuntimeError as error:
            raise DamageError(f"{reader.folder}: rank {ranks.rank}'s random state is none: {error}") from error
