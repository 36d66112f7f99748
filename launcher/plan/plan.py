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
    num_micro_batches: int
    """Micro-batches of each rank in a step."""


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
    sequences = course.global_batch_sequences
    at_once = training.micro_batch_sequences * world_size
    if sequences % at_once:
        key = "global_batch_sequences" if training.global_batch_sequences else "global_batch_tokens"
        raise ConfigError(
            f"training.{key}: {sequences} sequences do not divide into micro-batches of "
            f"{training.micro_batch_sequences} on {world_size} ranks; "
            + (
                f"training.micro_batch_sequences of {divisors(sequences // world_size)} would"
                if sequences % world_size == 0
                else f"a multiple of {at_once} sequences would, such as {math.ceil(sequences / at_once) * at_once}"
            )
        )
    return Plan(**vars(course), world_size=world_size, num_micro_batches=sequences // at_once)
