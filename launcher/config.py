"""The configuration of a run: its sections, and the rules that span several of them.

Each folder owns its part as a frozen dataclass that checks itself and lists its problems in a ``ValueError`` of
``{key: what is wrong and what would be right}``. This module composes the parts; `launcher.config_file` reads them from
YAML, strictly, and reports every problem at once.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.loader import DataConfig
from data.urls import url_problem
from eval.tasks import choose_tasks
from launcher.engine import EngineConfig
from launcher.heartbeat import WatchConfig
from launcher.optim import OptimizerConfig
from launcher.schedule import ScheduleConfig
from launcher.spikes import OutlierConfig
from launcher.strict import STRICT
from launcher.transition import TransitionConfig
from model.distillation import DistillationConfig
from model.size import parameter_shapes
from model.transformer import ModelConfig
from quant.config import QuantConfig
from quant.gather import gather_problems
from quant.linear import width_problem
from quant.ramp import RampConfig


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem a line, each beginning with the key's path."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    """Name of the run."""
    folder: str | None = None
    """Where everything the run writes goes; null: `runs/NAME`."""
    seed: int = 0
    """Seed of the initial weights."""
    stop_before_end_seconds: int = 180
    """In a job of limited time, save and stop so long before its end; must cover the longest step and saving."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "stop_before_end_seconds", 0)
        if problem := local_problem(self.folder or ""):
            problems["folder"] = problem
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            problems["name"] = f"{self.name!r} may hold letters, digits, '_', and behind the first '.' and '-'"
        if problems:
            raise ValueError(problems)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) if self.folder else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, precision and what is traded between memory and speed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    global_batch_sequences: int | None = None
    """Sequences of one step, over all ranks; give this or `global_batch_tokens`."""
    global_batch_tokens: int | None = None
    """Tokens of one step, over all ranks; a multiple of data.sequence_length."""
    micro_batch_sequences: int
    """Sequences that one rank runs at once; the number of micro-batches follows."""
    total_steps: int | None = None
    """Length of the run that a phase's `fraction` refers to; this or `total_tokens`."""
    total_tokens: int | None = None
    """Length of the run that a phase's `fraction` refers to, in tokens."""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the forward and backward passes; latent weights, gradients' sum and optimizer are fp32."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and run the block again: less memory, a third more work."""
    compile: bool = False
    """Compile each block with torch.compile."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row without a finite gradient; each of them is skipped."""
    skip_outliers: OutlierConfig | None = None
    """Also skip steps whose loss or gradient norm stands out from those before; null: do not."""

    def __post_init__(self) -> None:
        problems = {}
        if (self.global_batch_sequences is None) == (self.global_batch_tokens is None):
            problems["global_batch_sequences"] = "give exactly one of global_batch_sequences and global_batch_tokens"
        if self.total_steps is not None and self.total_tokens is not None:
            problems["total_steps"] = "give at most one of total_steps and total_tokens"
        for name in ("global_batch_sequences", "global_batch_tokens", "micro_batch_sequences", "total_steps"):
            problems |= _at_least(self, name, 1)
        problems |= _at_least(self, "total_tokens", 1) | _at_least(self, "max_skipped_steps", 1)
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A stretch of the run with one precision. Its length is one of `steps`, `tokens` and `fraction`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Literal["16-bit", "ternary"]
    """`16-bit`, or `ternary`: 1.58-bit weights with 8-bit activations."""
    steps: int | None = None
    """Length in steps."""
    tokens: int | None = None
    """Length in tokens, rounded up to whole steps."""
    fraction: float | None = None
    """Length as a share of training.total_steps or total_tokens."""
    quantization: QuantConfig | None = None
    """What is quantized in a ternary phase, and how; null: BitNet b1.58 with scales of least squared error."""
    transition: TransitionConfig | None = None
    """What happens where this phase begins; null: keep all, switch at once."""
    distillation: DistillationConfig | None = None
    """A 16-bit teacher that a ternary phase learns from besides the text; null: none."""

    def __post_init__(self) -> None:
        problems = {}
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            problems["steps"] = f"give exactly one of steps, tokens and fraction, not {' and '.join(given) or 'none'}"
        problems |= _at_least(self, "steps", 1) | _at_least(self, "tokens", 1)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            problems["fraction"] = f"is {self.fraction}; must be above 0 and at most 1"
        transition = self.transition or TransitionConfig()
        if self.precision == "16-bit":
            if self.quantization is not None:
                problems["quantization"] = "is given for a 16-bit phase; only ternary phases quantize"
            if self.distillation is not None:
                problems["distillation"] = "is given for a 16-bit phase; only ternary phases have a teacher"
            for name in ("ramp", "activation_ramp", "rollback"):
                if getattr(transition, name) not in (RampConfig(), None):
                    problems[f"transition.{name}"] = "is given for a 16-bit phase; only ternary phases have a strength"
        elif transition.activation_ramp and self.quantization and self.quantization.activations == "none":
            problems["transition.activation_ramp"] = "does nothing, because quantization.activations is none"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which stay, and what a run begins with."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Save every so many steps; null: only at transitions, at the end and when interrupted."""
    keep_last: int = 2
    """Checkpoints kept besides the milestones (transitions and the end): 0 keeps all, else at least 2."""
    folder: str | None = None
    """Where checkpoints go: a folder, or a URL such as `s3://bucket/run`; null: `checkpoints` in the run's folder."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits."""
    start_from: str | None = None
    """Begin with the weights of this checkpoint (ours, DeepSpeed's or Hugging Face's), a folder or a URL, and with its
    optimizer state unless the transition of the phase that the run begins in resets it."""
    start_phase: int = 0
    """Index of the phase that a run with `start_from` begins in. Those before it are taken as done: steps, schedule and
    data go on behind them."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1)
        if self.keep_last < 0 or self.keep_last == 1:
            problems["keep_last"] = f"is {self.keep_last}; 0 (keep all) or at least 2, so that one is always complete"
        for name in ("folder", "start_from"):
            if problem := url_problem(getattr(self, name) or "") or home_problem(getattr(self, name) or ""):
                problems[name] = problem
        problems |= _at_least(self, "start_phase", 0)
        if self.start_phase and self.start_from is None:
            problems["start_phase"] = f"is {self.start_phase}, but there is no start_from to take the place of a phase"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written down while training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int = 10
    """Log every so many steps; only then does the host wait for the device."""
    tensorboard: bool = True
    """Write RUN/tensorboard beside RUN/metrics.jsonl."""
    quantization_interval_steps: int | None = 100
    """In ternary phases, look at every layer's codes, scales, flips and errors every so many steps; null: never."""

    def __post_init__(self) -> None:
        if problems := _at_least(self, "interval_steps", 1) | _at_least(self, "quantization_interval_steps", 1):
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss at both ends of every phase, and in between; tasks while training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Also evaluate every so many steps."""
    sample_prompt: str | None = None
    """Text that the finished model continues; null: no sample."""
    sample_tokens: int = 120
    """Length of that continuation."""
    tasks: tuple[str, ...] = ()
    """Tasks that the model does while it trains: `paper11`, `paper11-harness`, or single ones such as `piqa`."""
    task_data: str | None = None
    """Folder of JSON lines with their examples; null: the Hugging Face hub."""
    tasks_interval_steps: int | None = None
    """Do them every so many steps, and at the end of each phase."""
    tasks_limit: int | None = 100
    """So many examples of each task, its first; null: all."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1) | _at_least(self, "sample_tokens", 1)
        problems |= _at_least(self, "tasks_interval_steps", 1) | _at_least(self, "tasks_limit", 1)
        try:
            choose_tasks(self.tasks)
        except ValueError as error:
            problems["tasks"] = str(error)
        if bool(self.tasks) != (self.tasks_interval_steps is not None):
            problems["tasks_interval_steps"] = "goes with evaluation.tasks: give both, or none of them"
        if problems:
            raise ValueError(problems)


def local_problem(text: str) -> str | None:
    """Say what is wrong with a path that must be on this machine's file systems; None if nothing is."""
    if "://" in text:
        return f"{text!r} is a URL; give a folder of this machine's file systems"
    return home_problem(text)


def home_problem(text: str) -> str | None:
    """Say what is wrong with a path that begins with `~`, which the shell replaces only at the beginning of a word."""
    if text.startswith("~/"):
        return f"{text!r} would be a folder named '~'; write {str(Path.home() / text[2:])!r}"
    return None


def _at_least(part: Any, name: str, least: int) -> dict[str, str]:
    value = getattr(part, name)
    return {name: f"is {value}; must be {least} or more"} if value is not None and value < least else {}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, complete."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    phases: tuple[PhaseConfig, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if problems := spanning_problems(vars(self)):
            raise ValueError(problems)


def spanning_problems(parts: dict[str, Any]) -> dict[str, str]:
    """Check the rules that span several parts, as far as the parts are there.

    Args:
        parts: those sections of a `Config` that are valid in themselves, by name.
    """
    problems: dict[str, str] = {}
    model, data, training = parts.get("model"), parts.get("data"), parts.get("training")
    phases, checkpoint, engine = parts.get("phases"), parts.get("checkpoint"), parts.get("engine")
    if model and data and data.sequence_length > model.max_sequence_length:
        problems["data.sequence_length"] = (
            f"is {data.sequence_length}, beyond model.max_sequence_length {model.max_sequence_length}"
        )
    if data and (problem := home_problem(data.cache or "")):
        problems["data.cache"] = problem
    for index, source in enumerate(data.sources if data else ()):
        if problem := home_problem(source.path):
            problems[f"data.sources.{index}.path"] = problem
    if data and training and training.global_batch_tokens and training.global_batch_tokens % data.sequence_length:
        below = training.global_batch_tokens // data.sequence_length * data.sequence_length
        nearest = [str(tokens) for tokens in (below, below + data.sequence_length) if tokens]
        problems["training.global_batch_tokens"] = (
            f"is {training.global_batch_tokens}, no multiple of data.sequence_length {data.sequence_length}; "
            f"{' or '.join(nearest)} would be"
        )
    if training and training.global_batch_sequences:
        total, micro = training.global_batch_sequences, training.micro_batch_sequences
        if total % micro:
            problems["training.micro_batch_sequences"] = (
                f"{micro} does not divide the global batch of {total} sequences; {divisors(total)} do"
            )
    if training and engine and training.compile and engine.zero_stage == 3:
        problems["training.compile"] = (
            "is true, but the hooks of engine.zero_stage 3 cut every graph at each layer; "
            "compile with zero_stage 1 or 2, or with engine.name fsdp2"
        )
    if phases is not None and not phases:
        problems["phases"] = "is empty; list at least one phase with its precision and length"
    if phases and training:
        share = sum(phase.fraction or 0 for phase in phases)
        length = "total_steps" if training.total_steps else "total_tokens"
        if not share and getattr(training, length):
            problems[f"training.{length}"] = "does nothing, because no phase's length is a fraction; leave it out"
        if share > 1 + 1e-9:
            problems["phases"] = f"have fractions of {share:g} in sum; 1 is the whole run"
    if phases and checkpoint and checkpoint.start_phase >= len(phases):
        problems["checkpoint.start_phase"] = (
            f"is {checkpoint.start_phase}; the last of the {len(phases)} phases is {len(phases) - 1}"
        )
    if phases:
        problems |= _switch_problems(parts)
    for index, phase in enumerate(phases or ()):
        path = f"phases.{index}"
        if phase.fraction and training and not (training.total_steps or training.total_tokens):
            problems[f"{path}.fraction"] = "needs training.total_steps or training.total_tokens to be a fraction of"
        if phase.precision == "ternary" and model:
            quantization = phase.quantization or QuantConfig()
            layers = {
                name.removesuffix(".weight"): shape[-1]
                for name, shape in parameter_shapes(model).items()
                if len(shape) == 2 and re.search(quantization.include, name.removesuffix(".weight"))
            }
            if not layers:
                problems[f"{path}.quantization.include"] = (
                    f"{quantization.include!r} matches no layer of the model, such as model.layers.0.mlp.up_proj"
                )
            for name, width in layers.items():
                if problem := width_problem(name, width, quantization):
                    problems[f"{path}.quantization"] = problem
            if quantization.fused and engine and engine.zero_stage == 3:
                problems[f"{path}.quantization.fused"] = (
                    "is true, but engine.zero_stage 3 gathers one layer at a time; "
                    "take zero_stage 1 or 2, engine.name fsdp2, or fused: false"
                )
            if engine and engine.gather == "codes":
                for key, problem in gather_problems(quantization).items():
                    problems[f"{path}.quantization.{key}"] = problem
        if phase.distillation:
            for key, problem in distillation_problems(phase.distillation, index, parts).items():
                problems[f"{path}.distillation.{key}"] = problem
        if index == 0 and phase.transition and checkpoint and not checkpoint.start_from:
            given = phase.transition
            if given != TransitionConfig(ramp=given.ramp, activation_ramp=given.activation_ramp):
                problems[f"{path}.transition"] = "the first phase has nothing to keep but with checkpoint.start_from"
    return problems


def _switch_problems(parts: dict[str, Any]) -> dict[str, str]:
    """Rules between phases, optimizer and schedule about what changes where a phase begins."""
    problems: dict[str, str] = {}
    phases, optimizer, schedule = parts["phases"], parts.get("optimizer"), parts.get("schedule")
    checkpoint = parts.get("checkpoint")
    includes = {(phase.quantization or QuantConfig()).include for phase in phases if phase.precision == "ternary"}
    if optimizer and optimizer.ternary_learning_rate_factor is not None and len(includes) != 1:
        problems["optimizer.ternary_learning_rate_factor"] = (
            f"is for the layers that ternary phases quantize, and they name {len(includes)} selections of layers; "
            "there must be one"
        )
    if schedule and schedule.decay_from_phase is not None:
        if schedule.decay_from_phase >= len(phases):
            problems["schedule.decay_from_phase"] = (
                f"is {schedule.decay_from_phase}; the last of the {len(phases)} phases is {len(phases) - 1}"
            )
        for index, phase in enumerate(phases):
            if phase.transition and phase.transition.schedule == "restart":
                problems[f"phases.{index}.transition.schedule"] = "is restart; with schedule.decay_from_phase it cannot"
    for index, phase in enumerate(phases):
        starts_here = checkpoint and checkpoint.start_from and checkpoint.start_phase == index
        if starts_here and phase.transition and phase.transition.rollback:
            problems[f"phases.{index}.transition.rollback"] = (
                "needs the loss before the switch, and the run begins with it; leave it out"
            )
    return problems


def distillation_problems(distillation: DistillationConfig, index: int, parts: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the distillation of the phase of this index, by its key; `parts` as for the other rules."""
    problems: dict[str, str] = {}
    phases, checkpoint = parts["phases"], parts.get("checkpoint")
    model, training = parts.get("model"), parts.get("training")
    if distillation.teacher is not None:
        if problem := url_problem(distillation.teacher):
            problems["teacher"] = problem
    elif checkpoint and not (checkpoint.start_from and index <= checkpoint.start_phase):
        if index == 0:
            problems["teacher"] = "is missing; the first phase begins with nothing that could teach, so name a teacher"
        elif phases[index - 1].precision == "ternary":
            problems["teacher"] = "is missing; the phase before is ternary, and a teacher must be in 16 bits: name one"
    layer = distillation.relation_layer
    if model and layer is not None and layer >= model.num_layers:
        problems["relation_layer"] = f"is {layer}; the last of the {model.num_layers} blocks is {model.num_layers - 1}"
    if training and training.compile and distillation.relation_weight:
        problems["relation_weight"] = (
            f"is {distillation.relation_weight}, but training.compile hides what is inside of a block; turn off one"
        )
    return problems


def divisors(number: int) -> str:
    """All divisors of a number, as a list for a message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
