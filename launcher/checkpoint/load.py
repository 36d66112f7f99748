"""Load state into an engine from any source; check that a source fits a model."""

from collections.abc import Collection, Iterable, Mapping

import torch

from launcher.checkpoint.reader import CheckpointReader, DamageError
from launcher.checkpoint.source import Source
from launcher.engine.contract import AVERAGE, Engine
from launcher.errors import CheckpointError
from launcher.process.ranks import Ranks
from quant.linear import is_learned_scale, quantized_layers


@torch.no_grad()
def load_state(source: Source, engine: Engine, *, with_optimizer: bool) -> None:
    """Write a source's weights, and the optimizer's state if asked for, into this rank's shards.

    Averaged weights go on with the source's, if the engine has an average and the source one as well. Learned scales
    that the source lacks begin as in a new run: as ones.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape; or the source has
            no moments.
    """
    shards = list(engine.shards())
    names = {name for name, _ in engine.model.named_parameters()}
    check_fits(source, {shard.name: shard.shape for shard in shards}, names)
    lacking = [shard for shard in shards if shard.name not in source.shapes]
    if lacking and any(layer.quant_config.learned for layer in quantized_layers(engine.model).values()):
        raise CheckpointError(f"{source.location} is of a phase without learned scales; it lacks {lacking[0].name}")
    for shard in lacking:  # learned scales, as they are before they are used
        for kind, tensor in shard.tensors.items():
            tensor.fill_(1 if kind in ("weight", AVERAGE) else 0)
        shard.step.fill_(0)
    shards = [shard for shard in shards if shard.name in source.shapes]
    if with_optimizer:
        check_moments(source, {shard.name: shard.tensors.keys() - {AVERAGE} for shard in shards})
    with_average = engine.average is not None and source.averaged_tokens is not None
    for shard in shards:
        for kind, tensor in shard.tensors.items():
            if kind == "weight" or (with_average if kind == AVERAGE else with_optimizer):
                tensor.copy_(source.read_finite(kind, shard.name, shard.start, len(tensor)))
        if with_optimizer:
            shard.step.fill_(source.read_step(shard.name))
    if engine.average is not None and source.averaged_tokens is not None:
        engine.average.tokens.fill_(source.averaged_tokens)
    engine.refresh_weights()


def check_moments(source: Source, needed: Mapping[str, Collection[str]]) -> None:
    """Check that a source has the moments, by parameter, that an optimizer goes on with.

    Raises:
        CheckpointError: it has none, or was trained with Muon and AdamW is to go on.
    """
    if not source.has_moments:
        raise CheckpointError(
            f"{source.location} has no optimizer moments to keep; set the transition's optimizer to reset"
        )
    lacking = [name for name, kinds in needed.items() if not set(kinds) <= set(source.kinds(name))]
    if lacking:
        raise CheckpointError(
            f"{source.location} was trained with Muon, which has no second moments of {len(lacking)} matrices, such as "
            f"{lacking[0]}; set optimizer.name to muon, or the transition's optimizer to reset"
        )


def check_fits(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    names: Collection[str] | None = None,
    others: Iterable[str] = (),
) -> None:
    """Make sure that a source holds the parameters of a model.

    Learned scales may be missing on either side: see `launcher.engine.learned_scales`.

    Args:
        source: of the parameters.
        shapes: of the model's parameters, as far as they are known here.
        names: of all of the model's parameters; None: those that have a shape.
        others: what else is known not to fit, a sentence each, to be listed with the parameters.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape.
    """
    problems = []
    for name in sorted((shapes.keys() if names is None else set(names)) ^ source.shapes.keys()):
        if not is_learned_scale(name):
            has, has_not = ("checkpoint", "model") if name in source.shapes else ("model", "checkpoint")
            problems.append(f"{name}: the {has} has it, the {has_not} does not")
    for name, shape in shapes.items():
        if name in source.shapes and source.shapes[name] != shape:
            problems.append(f"{name}: {list(source.shapes[name])} in the checkpoint, {list(shape)} in the model")
    if problems := [*problems, *others]:
        raise CheckpointError(f"{source.location} does not fit the model:\n" + "\n".join(problems))


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
            raise DamageError(
                f"{reader.folder}: rank {ranks.rank}'s random state cannot be restored: {error}"
            ) from error
