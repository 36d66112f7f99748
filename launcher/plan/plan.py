"""A course distributed over a number of ranks. `tritrain plan` prints it, and the training loop follows it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.rules import divisors
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.course import Course, check_whole, make_course


@dataclass(frozen=True, kw_only=True)
class Plan(Course):
    """The course of a run on ``world_size`` ranks."""

    world_size: int

    def micro_batches_at(self, step: int) -> int:
        """Micro-batches of each rank in the step of this number, counted from 0."""
        return self._micro_batches_of(self.sequences_at(step))

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches of each rank in a step with the full global batch."""
        return self._micro_batches_of(self.batch.full)

    def _micro_batches_of(self, sequences: int) -> int:
        return sequences // (self.config.training.micro_batch_sequences * self.world_size)


def make_plan(config: Config, world_size: int, rollbacks: Mapping[int, int] | None = None) -> Plan:
    """Resolve the course of a run, and divide its batch among the ranks.

    Args:
        config: to be resolved.
        world_size: number of ranks.
        rollbacks: of the `Course`.

    Raises:
        ConfigError: the batch or the replicas do not divide on this many ranks, or as `make_course` and `check_whole`.
    """
    training, replicas = config.training, config.engine.replicas
    course = make_course(config, rollbacks)
    check_whole(course)
    if world_size % replicas:
        raise ConfigError(f"engine.replicas: {replicas} does not divide {world_size} ranks; {divisors(world_size)} do")
    micro, unit = training.micro_batch_sequences, course.batch.unit
    at_once = micro * world_size
    for index, stage in enumerate(course.batch.stages):
        if stage.sequences % at_once:
            full = "global_batch_sequences" if training.global_batch_sequences else "global_batch_tokens"
            key = full if stage is course.batch.stages[-1] else f"batch_warmup.{index}.sequences"
            raise ConfigError(
                f"training.{key}: {stage.sequences} sequences do not divide into micro-batches of {micro} on "
                f"{world_size} ranks; "
                + (
                    f"training.micro_batch_sequences of {divisors(unit // world_size)} would"
                    if unit % world_size == 0
                    else f"a multiple of {at_once} sequences would, such as "
                    f"{math.ceil(stage.sequences / at_once) * at_once}"
                )
            )
    return Plan(**vars(course), world_size=world_size)
