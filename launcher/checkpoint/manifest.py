"""The manifest of a checkpoint as one type: everything it records besides tensors and configuration.

Every writer fills the same fields, and every reader gets them checked, so that nothing later has to doubt a type or a
bound: digests prove that a file is as it was written, not that it was written right, or by Tritrain.
"""

import dataclasses
import functools
import json
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, ClassVar

import xxhash

from launcher.checkpoint.folders import CHAT_TEMPLATE, CONFIG, TOKENIZERS
from launcher.checkpoint.tensor_file import is_count
from launcher.config.strict import STRICT
from launcher.plan.course import Course
from quant.config import QuantConfig
from quant.ramp import Rounding

FORMAT_VERSION = 2


READABLE_VERSIONS = (1, FORMAT_VERSION)


LATER_THAN_1: dict[str, Any] = {
    "spikes": None, "teacher": None, "world_size": None, "engine": None, "zero_stage": None, "provenance": None,
    "precision": None,
}  # fmt: skip
"""Values of the fields that some or all manifests of version 1 lack."""


TENSOR_FILE = re.compile(r"rank-[0-9]{5}\.safetensors")


DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass
class Progress:
    """The progress of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    step: int
    """Steps finished."""
    phase: int
    """Index of the phase that the model is in; -1 before the first."""
    skipped_steps: int
    """Steps so far that had no finite gradient."""
    block_order: tuple[int, ...] | None = None
    """Blocks in the order of their turns on the phase's ramp; None where it was not measured."""

    def __post_init__(self) -> None:
        if not (is_count(self.step) and is_count(self.phase + 1) and is_count(self.skipped_steps)):
            raise ValueError("is not a count of steps, the index of a phase and a count of skipped steps")
        if self.block_order is not None and sorted(self.block_order) != list(range(len(self.block_order))):
            raise ValueError("has an order of blocks that does not name each of them once")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The precision of a step: 16 bits, or a quantization at the strengths of that step."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    quantization: QuantConfig | None
    """None in 16 bits."""
    weight_strengths: tuple[float, ...]
    """How much of the weights' quantization is on in each block, 0 to 1; 0 in 16 bits."""
    activation_strengths: tuple[float, ...]
    """The same of the activations' quantization."""
    rounding: Rounding = "blend"
    """Of weights between strengths 0 and 1."""

    def __post_init__(self) -> None:
        strengths = (*self.weight_strengths, *self.activation_strengths)
        if not self.weight_strengths or len(self.weight_strengths) != len(self.activation_strengths):
            raise ValueError("does not have a strength of weights and one of activations for each block")
        if not all(0 <= strength <= 1 for strength in strengths):
            raise ValueError("has a strength outside of 0 to 1")
        if self.quantization is None and any(strengths):
            raise ValueError("has strengths without a quantization")

    @classmethod
    def in_16_bits(cls, num_layers: int) -> "Precision":
        """The precision of a model of ``num_layers`` blocks without quantization."""
        zeros = (0.0,) * num_layers
        return cls(quantization=None, weight_strengths=zeros, activation_strengths=zeros)

    @classmethod
    def full(cls, quantization: QuantConfig, num_layers: int) -> "Precision":
        """The precision of a model of ``num_layers`` blocks at strength 1."""
        ones = (1.0,) * num_layers
        return cls(quantization=quantization, weight_strengths=ones, activation_strengths=ones)

    @property
    def strength(self) -> float:
        """The strength of the block with the least; 0 in 16 bits."""
        quantizes_inputs = self.quantization is not None and self.quantization.activations != "none"
        return min(self.weight_strengths + self.activation_strengths if quantizes_inputs else self.weight_strengths)


def precision_at(course: Course, at: Progress) -> Precision:
    """The precision of a run's last finished step."""
    phase = course.phases[at.phase] if at.phase >= 0 else None
    if phase is None or phase.quantization is None or not at.step:
        return Precision.in_16_bits(course.config.model.num_layers)
    weights, activations = course.strengths_at(at.step - 1, at.block_order)
    return Precision(
        quantization=phase.quantization,
        weight_strengths=tuple(weights),
        activation_strengths=tuple(activations),
        rounding=phase.transition.ramp.rounding,
    )


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The size and the digest of a file."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: int
    """In bytes."""
    digest: str
    """XXH3-128 in hexadecimal: of the whole file, or, of a file of tensors, its root (`tensor_file`)."""

    def __post_init__(self) -> None:
        if not is_count(self.size) or not DIGEST.fullmatch(self.digest):
            raise ValueError("is not the size and the digest of a file")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a checkpoint. Every writer fills every field; None means that it does not apply.

    Raises:
        ValueError: a field is not as it should be; says which.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {**STRICT, "extra": "ignore"}

    milestone: bool
    """Whether the checkpoint is kept for good."""
    has_moments: bool
    """Whether Adam's moments and steps are in it."""
    step: int
    """Steps finished, those of earlier phases included."""
    tokens: int
    """Tokens trained on in these steps."""
    progress: Progress
    precision: Precision | None
    """What the weights were trained in, in the last step; None in manifests of version 1."""
    data_fingerprint: str | None
    """Fingerprint of the data to which the position refers; None if the run starts its data over."""
    spikes: dict[str, Any] | None
    """State of the guards against loss spikes (`launcher.training.guard`); None where no step was taken."""
    teacher: str | None
    """Identity of the phase's teacher; None without one."""
    world_size: int | None
    """Number of ranks that trained it; None for a conversion."""
    engine: str | None
    """Name of the engine that trained it; None for a conversion."""
    zero_stage: int | None
    """Of DeepSpeed; None for a conversion."""
    provenance: dict[str, Any] | None
    """What a conversion or an average was made from (`launcher.formats`); None for a checkpoint of training."""
    averaged_tokens: int | None = None
    """Tokens of the steps in the averaged weights; None if it has none. Filled in when the checkpoint is written."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """All files but the manifest, by name; filled in when the checkpoint is complete."""
    digest: str = ""
    """Of all other fields as they are written; filled in like the files."""

    def __post_init__(self) -> None:
        for key in ("step", "tokens"):
            if not is_count(getattr(self, key)):
                raise ValueError(f"its {key!r} is not a count")
        if self.averaged_tokens is not None and not is_count(self.averaged_tokens):
            raise ValueError("its 'averaged_tokens' is not a count")
        if self.progress.step != self.step:
            raise ValueError(f"its 'step' is {self.step}, and in 'progress' {self.progress.step}")
        order, precision = self.progress.block_order, self.precision
        if order is not None and (precision is None or len(order) != len(precision.weight_strengths)):
            num = len(order)
            raise ValueError(f"its 'progress' has an order of {num} blocks, and its 'precision' is not of {num}")
        if self.spikes is not None:
            check_guard_state(self.spikes)
        for name in self.files:
            if name not in (CONFIG, CHAT_TEMPLATE, *TOKENIZERS) and not TENSOR_FILE.fullmatch(name):
                raise ValueError(f"its 'files' names {reprlib.repr(name)}, which is not a file of a checkpoint")

    @property
    def average(self) -> dict[str, Any] | None:
        """What the weights are the average of (`launcher.formats.average`); None if they are none."""
        found = (self.provenance or {}).get("average")
        return found if isinstance(found, dict) else None

    def sealed(self, files: dict[str, FileRecord]) -> str:
        """The text of `manifest.json` for a checkpoint of these files."""
        tree = {"format_version": FORMAT_VERSION, **dataclasses.asdict(dataclasses.replace(self, files=files))}
        return json.dumps(tree | {"digest": manifest_digest(tree)}, indent=2)


def manifest_digest(tree: dict[str, Any]) -> str:
    """The digest of a manifest without its own."""
    content = {key: value for key, value in tree.items() if key != "digest"}
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def manifest_of(tree: dict[str, Any]) -> Manifest:
    """The manifest that was read from JSON, checked.

    Raises:
        ValueError: says which key is not as it should be.
    """
    from pydantic import ValidationError

    if tree["format_version"] == 1:
        tree = LATER_THAN_1 | tree
    try:
        manifest: Manifest = _adapter().validate_json(json.dumps(tree))
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where = repr(".".join(map(str, detail["loc"]))[:100])
        reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
        raise ValueError(f"its {where}: {reason[:300]}" if detail["loc"] else reason) from error
    if CONFIG not in manifest.files or not any(map(TENSOR_FILE.fullmatch, manifest.files)):
        raise ValueError(f"its 'files' lacks {CONFIG}, or files of tensors")
    return manifest


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def check_guard_state(state: Any) -> None:
    """Check that a value has the form of `SpikeGuard.state`.

    Raises:
        ValueError: it does not.
    """
    sound = (
        isinstance(state, dict)
        and isinstance(state.get("windows"), dict)
        and all(map(_is_window, state["windows"].values()))
        and is_count(state.get("skipped"))
        and "loss_before" in state
        and (state["loss_before"] is None or _is_number(state["loss_before"]))
    )
    if not sound:
        raise ValueError("its 'spikes' is not the state of the guards against loss spikes")


def _is_window(window: Any) -> bool:
    return (
        isinstance(window, dict)
        and isinstance(window.get("values"), list)
        and all(map(_is_number, window["values"]))
        and is_count(window.get("count"))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
