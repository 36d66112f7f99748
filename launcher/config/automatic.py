"""Keys that may be `auto`: their value follows from the device.

A run decides them once, when it first starts, and says so. Its own `config.yaml`, its checkpoints and everything after
have the value. A run that resumes, perhaps on another device, takes the values that it began with (`stored_values`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from launcher.config.sections import Config

AUTO = "auto"


@dataclass(frozen=True)
class Device:
    """The facts that values follow from."""

    type: Literal["cuda", "cpu"]
    name: str
    """The device in a sentence, such as `this processor`."""
    has_bf16: bool | None = None
    """Whether a CPU has instructions for bf16; None if it does not say."""
    can_compile: bool = True
    """Whether there is what torch.compile needs: a C++ compiler, and Python's headers."""
    run_flops: float = 0.0
    """What the whole run computes on it; 0 if that is not known."""


ANY_GPU = Device("cuda", "a GPU")
"""The device that a plan counts with where no run has begun, since most are planned for machines with GPUs."""


def compute_dtype_for(device: Device) -> tuple[str, str]:
    """The value of `training.compute_dtype` on a device, and a clause that gives the reason."""
    if device.type == "cuda" or device.has_bf16:
        return "bf16", f"which {device.name} computes in hardware"
    if device.has_bf16 is None:
        return "fp32", f"because {device.name} does not say whether it computes in bf16"
    return "fp32", f"because {device.name} only emulates bf16"


LONG_ON_CPU = 2e14
"""FLOPs of a process above which compiling pays on a CPU. A core computes 1e11 a second, compiling a run's graphs takes
it one to two minutes, and a compiled step takes a tenth to a fourth less."""


def compile_for(config: "Config", device: Device) -> tuple[bool, str]:
    """The value of `training.compile` on a device, and a clause that gives the reason."""
    if config.engine.zero_stage == 3:
        return False, "because the hooks of engine.zero_stage 3 break every graph"
    if any(phase.distillation and phase.distillation.relation_weight for phase in config.phases):
        return False, "because a teacher looks inside of blocks"
    if not device.can_compile:
        return False, "because there is no C++ compiler, or Python's headers (Debian: g++ python3-dev) are missing"
    if device.type == "cuda":
        return True, f"which pays on {device.name}"
    if device.run_flops > LONG_ON_CPU:
        return True, "which pays in a run of this length"
    return False, f"because the run is too short for it to pay on {device.name}"


class Automatic(NamedTuple):
    """A key that may be `auto`."""

    choose: Callable[["Config", Device], tuple[Any, str]]
    """The value on a device, and the reason."""
    values: tuple[Any, ...]
    """Those besides `auto`."""
    former_default: Any
    """The default in versions without `auto`: the value in a stored configuration that does not have the key."""


AUTOMATIC: Mapping[str, Automatic] = {
    "training.compute_dtype": Automatic(lambda _, device: compute_dtype_for(device), ("bf16", "fp32"), "bf16"),
    "training.compile": Automatic(compile_for, (True, False), False),
}


def made_concrete(
    config: "Config", device: Device, stored: Mapping[str, Any] | None = None
) -> tuple["Config", dict[str, str]]:
    """Give every key that is `auto` its value.

    Args:
        config: any; without `auto` it is returned as it is.
        device: that the run computes on.
        stored: the values of a run that has begun, from `stored_values`.

    Returns:
        The configuration, and for each of these keys its value and the reason, in words.
    """
    said = {}
    for key, automatic in AUTOMATIC.items():
        section, name = key.split(".")
        part = getattr(config, section)
        if getattr(part, name) != AUTO:
            continue
        value, reason = (
            (stored[key], "as this run began") if stored and key in stored else automatic.choose(config, device)
        )
        config = replace(config, **{section: replace(part, **{name: value})})
        said[key] = f"{str(value).lower() if isinstance(value, bool) else value}, {reason}"
    return config, said


def stored_values(tree: dict[str, Any] | None) -> dict[str, Any]:
    """The values of these keys in the configuration that a run or a checkpoint has stored, without those still `auto`.

    Args:
        tree: as it was read; None gives no values.
    """
    stored = {}
    for key, automatic in AUTOMATIC.items():
        section, name = key.split(".")
        part = with_former_defaults(tree or {}).get(section)
        if isinstance(part, dict) and part[name] in automatic.values:
            stored[key] = part[name]
    return stored


def with_new_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that were renamed since."""
    evaluation = tree.get("evaluation")
    if not (isinstance(evaluation, dict) and "sample_prompt" in evaluation):
        return tree
    given = evaluation["sample_prompt"]
    others = {key: value for key, value in evaluation.items() if key != "sample_prompt"}
    return tree | {"evaluation": {"sample_prompts": [given] if given else [], **others}}


def with_former_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration in which none of these keys is missing."""
    for key, automatic in AUTOMATIC.items():
        section, name = key.split(".")
        if isinstance(part := tree.get(section), dict):
            tree = tree | {section: {name: automatic.former_default} | part}
    return tree
