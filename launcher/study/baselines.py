"""Arms that are made from a whole configuration: a share of the run in 16 bits, and the baselines of a study.

A baseline has the architecture, data, optimizer, schedule and number of tokens of the arm that it is made from.
"""

from dataclasses import replace
from typing import Any

from launcher.config.averaging import AveragingConfig
from launcher.config.file import apply_override, parse_config, to_tree
from launcher.config.sections import Config, PhaseConfig
from launcher.config.transition import TransitionConfig
from launcher.errors import ConfigError
from launcher.plan.course import make_course
from launcher.study.config import POST_TRAINING, Baseline
from quant.config import CalibrationConfig, QuantConfig

CALIBRATION_SEQUENCES = 128
"""Training sequences that the codes of `post-training` are fitted to."""


def set_switch(tree: dict[str, Any], share: float) -> None:
    """Give the 16-bit phase this share of the run, and the ternary phase the rest.

    Raises:
        ConfigError: the configuration does not have these two phases, or not one length.
    """
    phases = tree.get("phases")
    precisions = [phase.get("precision") for phase in phases if isinstance(phase, dict)] if phases else []
    if phases is None or precisions != ["16-bit", "ternary"]:
        raise ConfigError("switch: needs a base with two phases, 16-bit and ternary; write other runs as an axis")
    training = tree.setdefault("training", {})
    if training.get("total_steps") is None and training.get("total_tokens") is None:
        unit = next((unit for unit in ("steps", "tokens") if all(phase.get(unit) for phase in phases)), None)
        if unit is None:
            raise ConfigError("switch: needs the length of the run; set training.total_steps or training.total_tokens")
        training[f"total_{unit}"] = sum(phase[unit] for phase in phases)
    for phase, fraction in zip(phases, (share, "rest"), strict=True):
        phase |= {"steps": None, "tokens": None, "fraction": fraction}


def baseline_of(config: Config, baseline: Baseline) -> Config:
    """The baseline of an arm's configuration.

    With `schedule.decay_from_phase`, or phases that have data, a schedule or a learning rate of their own or begin one
    anew, the phases keep their lengths, since these depend on them; so they do if the first of them is not trained.
    Otherwise they become one, and arms that differ in the switch alone have one baseline.

    Raises:
        ConfigError: lists what does not fit.
    """
    quantization = next((phase.quantization for phase in config.phases if phase.precision == "ternary"), None)
    if baseline == POST_TRAINING:
        return _rounded_at_the_end(baseline_of(config, "16-bit"), quantization)
    precision = "16-bit" if baseline == "16-bit" else "ternary"
    about: dict[str, Any] = {
        "precision": precision,
        "quantization": quantization if precision == "ternary" else None,
        "distillation": None,
    }
    first, *later = config.phases
    transitions = [phase.transition for phase in later if phase.transition is not None]
    is_one = (
        config.schedule.decay_from_phase is None
        and not config.checkpoint.start_phase
        and not any(
            getattr(phase, name)
            for phase in later
            for name in ("sources", "sequence_length", "schedule", "learning_rate")
        )
        and not any("restart" in (each.schedule, each.data) for each in transitions)
    )
    if is_one:
        has_total = config.training.total_steps or config.training.total_tokens
        length: dict[str, Any] = {"fraction": 1.0} if has_total else {"steps": make_course(config).total_steps}
        kept = {name: getattr(first, name) for name in ("sources", "sequence_length", "objective", "preference")}
        phases = [PhaseConfig(**length, **about, **kept)]
    else:
        phases = [replace(phase, transition=_restarts_of(phase.transition), **about) for phase in config.phases]
    optimizer = config.optimizer
    if precision == "16-bit" and optimizer.ternary_learning_rate_factor is not None:
        optimizer = replace(optimizer, ternary_learning_rate_factor=None)
    if optimizer.weight_decay_until == "ternary":
        optimizer = replace(optimizer, weight_decay_until=None)
    averaging = config.averaging
    if precision == "ternary" and not averaging.across_ternary:
        averaging = AveragingConfig()
    changed = {"phases": [to_tree(phase) for phase in phases]}
    changed |= {"optimizer": to_tree(optimizer), "averaging": to_tree(averaging)}
    tree = to_tree(config) | changed
    return parse_config(tree)


def _rounded_at_the_end(config: Config, quantization: QuantConfig | None) -> Config:
    """A run in 16 bits, and after it a switch whose codes are fitted to data.

    A phase has a step at least; the result is the held-out loss before it.
    """
    course = make_course(config)
    phases = [
        replace(phase, steps=resolved.end - resolved.start, tokens=None, fraction=None)
        for phase, resolved in zip(config.phases, course.phases, strict=True)
    ]
    calibration = CalibrationConfig(sequences=CALIBRATION_SEQUENCES)
    transition = TransitionConfig(calibration=calibration)
    learned = {name: getattr(phases[-1], name) for name in ("objective", "preference")}
    phases.append(
        PhaseConfig(precision="ternary", steps=1, quantization=quantization, transition=transition, **learned)
    )
    tree = to_tree(config) | {"phases": [to_tree(phase) for phase in phases]}
    tree["training"] |= {"total_steps": None, "total_tokens": None}
    if course.weight_decay_end and config.optimizer.weight_decay_until != "ternary":
        tree["optimizer"]["weight_decay_until"] = course.weight_decay_end / (course.total_steps + 1)
    last = course.curves[-1]
    if last.schedule.shape != "constant":
        apply_override(tree, f"{last.key}.horizon_steps={last.horizon_steps}")
    return parse_config(tree)


def _restarts_of(transition: TransitionConfig | None) -> TransitionConfig:
    """A transition that only begins the schedule or the data anew where another one does."""
    given = transition or TransitionConfig()
    return TransitionConfig(schedule=given.schedule, data=given.data)
