"""The section `averaging`, its rules, and the name of a checkpoint's averaged weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.strict import STRICT

if TYPE_CHECKING:
    from launcher.config.sections import CheckpointConfig, PhaseConfig

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""

OTHER_CODES = (
    "the mean of latent weights rounds to other codes than any of the averaged models has, so it is another model"
)
"""The reason why weights are not averaged over ternary phases."""

AVERAGED = "@averaged"
"""After the name of a checkpoint: its averaged weights."""


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """The exponential moving average of the weights of 16-bit phases: what a run would be worth after a decay."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    half_life_tokens: int | None = None
    """Average the weights after every step, where a step counts half as much as one that trained this many tokens
    later; null: do not. It is measured and saved beside the live weights, which it does not change."""
    across_ternary: bool = False
    """Go on averaging in ternary phases, for a measurement: the average of latent weights rounds to other codes."""

    def __post_init__(self) -> None:
        problems = {}
        if self.half_life_tokens is not None and self.half_life_tokens < 1:
            problems["half_life_tokens"] = f"is {self.half_life_tokens}; must be 1 or more, or null"
        if problems:
            raise ValueError(problems)


def without_averaged(place: str) -> str:
    """The name of the checkpoint whose averaged weights, or live ones, a text names."""
    return place.removesuffix(AVERAGED)


def averages_are_of_16_bit_phases(phases: "tuple[PhaseConfig, ...]", averaging: AveragingConfig) -> Problems:
    """There is a 16-bit phase to average, unless a measurement is asked for."""
    is_asked = averaging.half_life_tokens is not None and not averaging.across_ternary
    if is_asked and phases and all(phase.precision == "ternary" for phase in phases):
        yield (
            "averaging.half_life_tokens",
            f"is given, but all phases are ternary, and {OTHER_CODES}; leave it out, or set averaging.across_ternary "
            "to measure it all the same",
        )


def averaged_weights_are_there(
    phases: "tuple[PhaseConfig, ...]", averaging: AveragingConfig, checkpoint: "CheckpointConfig"
) -> Problems:
    """A phase that begins with averaged weights follows one in 16 bits, in which the run averages them."""
    for index, phase in enumerate(phases):
        path = f"phases.{index}.transition.weights"
        if not phase.transition or phase.transition.weights != "averaged":
            continue
        if checkpoint.start_from and checkpoint.start_phase == index:
            name = without_averaged(checkpoint.start_from) + AVERAGED
            yield path, f"is averaged, but the run begins with this phase; set checkpoint.start_from to {name} instead"
        elif averaging.half_life_tokens is None:
            yield path, "is averaged, but averaging.half_life_tokens is null; set it, such as to a tenth of the phase"
        elif index and phases[index - 1].precision == "ternary":
            yield path, f"is averaged, but the phase before is ternary, and {OTHER_CODES}; leave it out"
