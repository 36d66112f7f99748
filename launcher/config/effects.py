"""Rules about keys that have no effect, or a length so small that nobody can mean it.

They hold for a run that is to start. A key without effect is one that differs from its default and is never read beside
what the others say: whoever set it believes in something that does not happen.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from data.config import DataConfig
from launcher.config.averaging import AveragingConfig
from launcher.config.optimizer import OptimizerConfig, ScheduleConfig
from launcher.config.schedules import schedules_of
from launcher.config.transition import TransitionConfig
from model.config import ModelConfig

if TYPE_CHECKING:
    from launcher.config.sections import (
        CheckpointConfig,
        EvaluationConfig,
        LoggingConfig,
        PhaseConfig,
        TrainingConfig,
        WatchConfig,
    )

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""

LEAST_INTERVAL_MINUTES = 0.01
LEAST_SECONDS = {"beat_seconds": 0.1, "step_seconds": 1.0, "first_step_seconds": 1.0}
LEAST_SHARE = 1e-4
"""Of a run: a shorter part of most would be no step at all."""


def model_keys_have_an_effect(model: ModelConfig) -> Problems:
    """Initial values are of something that the model has."""
    if not model.sub_norm:
        yield from _idle(model, "model", "sub_norm_init", "model.sub_norm is false")
    if model.initialization == "mitchell":
        yield from _idle(model, "model", "init_std", "model.initialization is mitchell")


def data_keys_have_an_effect(data: DataConfig) -> Problems:
    """Blocks need shuffling, and a weight another source."""
    if not data.shuffle:
        yield from _idle(data, "data", "shuffle_block_rows", "data.shuffle is false")
    if len(data.sources) == 1:
        yield from _idle(data.sources[0], "data.sources.0", "weight", "there is no other source")


def schedule_keys_have_an_effect(phases: "tuple[PhaseConfig, ...]", schedule: ScheduleConfig) -> Problems:
    """A schedule has a decay where something is said of it."""
    for _, path, each in schedules_of(phases, schedule):
        if each.shape != "wsd":
            for name in ("decay_fraction", "decay"):
                yield from _idle(each, path, name, f"{path}.shape is {each.shape}, not wsd")
        if each.shape == "constant":
            for name in ("final_fraction", "horizon_steps"):
                yield from _idle(each, path, name, f"{path}.shape is constant")


def optimizer_keys_have_an_effect(optimizer: OptimizerConfig) -> Problems:
    """The weights have a decay where something is said of it."""
    if not optimizer.weight_decay:
        yield from _idle(optimizer, "optimizer", "decay_embeddings", "optimizer.weight_decay is 0")


def phases_have_what_the_optimizer_says(optimizer: OptimizerConfig, phases: "tuple[PhaseConfig, ...]") -> Problems:
    """A phase has Muon, or is ternary, where something is said of that."""
    names = {optimizer.name, *(phase.transition.optimizer_name for phase in phases if phase.transition)}
    if phases and "muon" not in names:
        yield from _idle(optimizer, "optimizer", "muon", "optimizer.name is adamw")
    if optimizer.weight_decay_until == "ternary" and not any(phase.precision == "ternary" for phase in phases):
        yield from _idle(optimizer, "optimizer", "weight_decay_until", "no phase is ternary")


def averaging_keys_have_an_effect(averaging: AveragingConfig, phases: "tuple[PhaseConfig, ...]") -> Problems:
    """There are an average and a ternary phase, where something is said of both."""
    if averaging.half_life_tokens is None:
        yield from _idle(averaging, "averaging", "across_ternary", "averaging.half_life_tokens is null")
    elif phases and all(phase.precision == "16-bit" for phase in phases):
        yield from _idle(averaging, "averaging", "across_ternary", "no phase is ternary")


def phase_keys_have_an_effect(phases: "tuple[PhaseConfig, ...]") -> Problems:
    """A weight has another source, weights have groups, and a ramp has steps, where something is said of them."""
    for index, phase in enumerate(phases):
        path, quantization = f"phases.{index}", phase.quantization
        if phase.sources is not None and len(phase.sources) == 1:
            yield from _idle(phase.sources[0], f"{path}.sources.0", "weight", "there is no other source")
        if quantization and quantization.granularity != "group":
            reason = f"granularity is {quantization.granularity}; for groups, set granularity: group"
            yield from _idle(quantization, f"{path}.quantization", "group_size", reason)
        transition = phase.transition or TransitionConfig()
        for name in ("ramp", "activation_ramp"):
            ramp = getattr(transition, name)
            if ramp and not (ramp.steps or ramp.fraction) and not transition.rollback:  # which may lengthen it
                for key in ("shape", "sharpness", "stairs"):
                    yield from _idle(ramp, f"{path}.transition.{name}", key, "steps is 0, which switches at once")


def evaluation_keys_have_an_effect(evaluation: "EvaluationConfig") -> Problems:
    """A sample has a prompt, and tasks are named."""
    if not evaluation.sample_prompts:
        yield from _idle(evaluation, "evaluation", "sample_tokens", "evaluation.sample_prompts is empty")
    if not evaluation.tasks:
        for name in ("task_data", "tasks_limit"):
            yield from _idle(evaluation, "evaluation", name, "evaluation.tasks is empty")


def logging_keys_have_an_effect(logging: "LoggingConfig") -> Problems:
    """A project is one of a tracker."""
    if not logging.trackers:
        yield from _idle(logging, "logging", "project", "logging.trackers is empty")


def intervals_are_long_enough(
    watch: "WatchConfig", checkpoint: "CheckpointConfig", evaluation: "EvaluationConfig"
) -> Problems:
    """No interval is so short that a run would do nothing else, and no limit so short that none could keep it."""
    for name, least in LEAST_SECONDS.items():
        yield from _too_short(watch, "watch", name, least)
    for path, part in (("checkpoint", checkpoint), ("evaluation", evaluation)):
        yield from _too_short(part, path, "interval_minutes", LEAST_INTERVAL_MINUTES)


def averages_are_long_enough(averaging: AveragingConfig, training: "TrainingConfig", data: DataConfig) -> Problems:
    """An average is of several steps: a half-life in tokens that is shorter than a step was meant in steps."""
    step_tokens = training.global_batch_tokens or (training.global_batch_sequences or 0) * data.sequence_length
    if averaging.half_life_tokens is not None and averaging.half_life_tokens < step_tokens:
        yield (
            "averaging.half_life_tokens",
            f"is {averaging.half_life_tokens}, less than the {step_tokens} tokens of a step; it counts tokens, so 100 "
            f"steps are {100 * step_tokens}",
        )


def shares_are_long_enough(
    phases: "tuple[PhaseConfig, ...]", schedule: ScheduleConfig, optimizer: OptimizerConfig
) -> Problems:
    """No part of a run is so short that it would be no step."""
    for index, phase in enumerate(phases):
        if phase.fraction != "rest":
            yield from _too_short(phase, f"phases.{index}", "fraction", LEAST_SHARE)
    for _, path, each in schedules_of(phases, schedule):
        yield from _too_short(each, path, "decay_fraction", LEAST_SHARE)
        yield from _too_short(each, path, "drop_at", LEAST_SHARE)
    if optimizer.weight_decay_until != "ternary":
        yield from _too_short(optimizer, "optimizer", "weight_decay_until", LEAST_SHARE)


def _idle(part: Any, path: str, name: str, reason: str) -> Problems:
    value, default = getattr(part, name), next(field.default for field in fields(part) if field.name == name)
    if value != default:
        advice = "" if ";" in reason else "; leave it out"
        yield f"{path}.{name}", f"is {value}, but has no effect, because {reason}{advice}"


def _too_short(part: Any, path: str, name: str, least: float) -> Problems:
    value = getattr(part, name)
    if value is not None and value < least:
        default = next(field.default for field in fields(part) if field.name == name)
        suggestion = "" if default is None else f"; the default is {default:g}"
        yield f"{path}.{name}", f"is {value:g}; must be {least:g} or more{suggestion}"


EFFECTS = (
    model_keys_have_an_effect,
    data_keys_have_an_effect,
    optimizer_keys_have_an_effect,
    schedule_keys_have_an_effect,
    phases_have_what_the_optimizer_says,
    averaging_keys_have_an_effect,
    phase_keys_have_an_effect,
    evaluation_keys_have_an_effect,
    logging_keys_have_an_effect,
)
LENGTHS = (intervals_are_long_enough, averages_are_long_enough, shares_are_long_enough)
