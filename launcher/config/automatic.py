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


ANY_GPU = Device("cuda", "a GPU")
"""The device that a plan counts with where no run has begun, since most are planned for machines with GPUs."""


def compute_dtype_for(device: Device) -> tuple[str, str]:
    """The value of `training.compute_dtype` on a device, and a clause that gives the reason."""
    if device.type == "cuda" or device.has_bf16:
        return "bf16", f"which {device.name} computes in hardware"
    if device.has_bf16 is None:
        return "fp32", f"because {device.name} does not say whether it computes in bf16"
    return "fp32", f"because {device.name} only emulates bf16"


class Automatic(NamedTuple):
    """A key that may be `auto`."""

    choose: Callable[[Device], tuple[Any, str]]
    """The value on a device, and the reason."""
    values: tuple[Any, ...]
    """Those besides `auto`."""
    former_default: Any
    """The default in versions without `auto`: the value in a stored configuration that does not have the key."""


AUTOMATIC: Mapping[str, Automatic] = {"training.compute_dtype": Automatic(compute_dtype_for, ("bf16", "fp32"), "bf16")}


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
        value, reason = (stored[key], "as this run began") if stored and key in stored else automatic.choose(device)
        config = replace(config, **{section: replace(part, **{name: value})})
        said[key] = f"{value}, {reason}"
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


def with_former_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration in which none of these keys is missing."""
    for key, automatic in AUTOMATIC.items():
        section, name = key.split(".")
        if isinstance(part := tree.get(section), dict):
            tree = tree | {section: {name: automatic.former_default} | part}
    return tree
