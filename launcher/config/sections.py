"""The configuration of a run: its sections, and the rules that span several of them.

Each folder owns its part as a frozen dataclass that checks itself and lists its problems in a ``ValueError`` of
``{key: what is wrong and what would be right}``. This module composes the parts; `launcher.config.file` reads them from
YAML, strictly, and reports every problem at once.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.config import DataConfig
from data.mixture import Source, sources_problem
from data.urls import url_problem
from eval.tasks import choose_tasks
from launcher.config.averaging import AveragingConfig
from launcher.config.engine import MOST_SECONDS, EngineConfig
from launcher.config.optimizer import OptimizerConfig, ScheduleConfig
from launcher.config.paths import local_problem, mistaken_path
from launcher.config.rules import spanning_problems
from launcher.config.strict import STRICT
from launcher.config.transition import TransitionConfig
from launcher.config.warmups import BatchStage, LengthStage, order_problems
from model.config import DistillationConfig, ModelConfig, PreferenceConfig
from quant.config import QuantConfig, soft_problem
from quant.ramp import RampConfig

Objective = Literal["next-token", "sft", "dpo"]

TrackerName = Literal["wandb", "trackio", "mlflow"]
"""As its package and Tritrain's extra are named."""

MOST_SIGMAS = 1000
"""So many standard deviations need a window of a million steps."""

SILENT_BEATS = 3
"""A rank that misses this many beats is silent; it is gone if other signs confirm it."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a rank counts as lost, and a step as hung."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    beat_seconds: float = 2.0
    """Interval between the heartbeats of a rank."""
    lost_seconds: float | None = 60.0
    """End the job when a rank has sent no heartbeat for this long; null: never."""
    step_seconds: float | None = 300.0
    """End the job, with the stacks of all ranks, when a step takes longer than this and than ten usual steps; null:
    never."""
    first_step_seconds: float | None = 1800.0
    """The same limit for the first step after a start or a switch, which may compile, and for work between steps:
    evaluation, each batch of a task, saving, a switch; null: never."""

    def __post_init__(self) -> None:
        problems = {}
        for name in ("beat_seconds", "lost_seconds", "step_seconds", "first_step_seconds"):
            value = getattr(self, name)
            if value is not None and value > MOST_SECONDS:
                problems[name] = f"is {value:g}; must be at most {MOST_SECONDS:g}, 31 years"
        if problems:
            raise ValueError(problems)
        if self.beat_seconds <= 0:
            problems["beat_seconds"] = f"is {self.beat_seconds:g}; must be above 0"
        elif self.lost_seconds is not None and self.lost_seconds < SILENT_BEATS * self.beat_seconds:
            problems["lost_seconds"] = (
                f"is {self.lost_seconds:g}; must be {SILENT_BEATS} beats, {SILENT_BEATS * self.beat_seconds:g}, or more"
            )
        for name in ("step_seconds", "first_step_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems[name] = f"is {value:g}; must be above 0"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class OutlierConfig:
    """Steps that count as outliers and are skipped (the `SkipStepOptimizer` of OLMo 2, arXiv 2501.00656)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    window_steps: int = 128
    """Number of preceding steps with which a step is compared; the guard starts this many steps after a switch."""
    sigmas: float = 6.0
    """Number of standard deviations above their mean at which a loss or gradient norm is an outlier."""

    def __post_init__(self) -> None:
        problems = {}
        if not 0 < self.sigmas <= MOST_SIGMAS:
            problems["sigmas"] = f"is {self.sigmas:g}; must be above 0, and at most {MOST_SIGMAS}"
        elif self.window_steps < self.sigmas**2 + 2:
            problems["window_steps"] = (
                f"is {self.window_steps}; must be {math.ceil(self.sigmas**2) + 2} or more, or no single step can be "
                f"{self.sigmas:g} standard deviations above the mean"
            )
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    """Name of the run."""
    folder: str | None = None
    """Folder for everything that the run writes; null: `runs/NAME`."""
    seed: int = 0
    """Seed of the initial weights."""
    stop_before_end_seconds: int = 180
    """In a job with a time limit, save and stop this long before the limit; must cover the longest step and a save."""
    allow_changes: tuple[str, ...] = ()
    """Keys and sections in which a resumed run may differ from its checkpoints, such as `optimizer.learning_rate` or
    `phases`; it goes on with the new values."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "stop_before_end_seconds", 0)
        if problem := local_problem(self.folder or ""):
            problems["folder"] = problem
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            problems["name"] = f"{self.name!r} may hold letters, digits and '_', and after the first also '.' and '-'"
        if problems:
            raise ValueError(problems)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) if self.folder else Path("runs") / self.name

    @property
    def key_of_path(self) -> str:
        """The key to change for another run, in another folder."""
        return "run.folder" if self.folder else "run.name"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, precision, and trade-offs between memory and speed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    global_batch_sequences: int | None = None
    """Sequences of one step, over all ranks; give this or `global_batch_tokens`."""
    global_batch_tokens: int | None = None
    """Tokens of one step, over all ranks; a multiple of data.sequence_length."""
    micro_batch_sequences: int
    """Sequences that one rank runs at once; the number of micro-batches follows."""
    batch_warmup: tuple[BatchStage, ...] = ()
    """Smaller global batches at the beginning of the run, such as `[{sequences: 64, until_tokens: 1e9}]`; the full one
    follows. Micro-batches and learning rate stay the same."""
    sequence_warmup: tuple[LengthStage, ...] = ()
    """Shorter sequences at the beginning of the run, such as `[{length: 256, until_tokens: 1e9}]`; the full length
    follows. Data and tokens of a step stay the same."""
    total_steps: int | None = None
    """Length of the run, in steps, to which a phase's `fraction` refers; give this or `total_tokens`."""
    total_tokens: int | None = None
    """Length of the run, in tokens, to which a phase's `fraction` refers."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward and backward passes; latent weights, summed gradients and optimizer state are fp32.
    `auto`, decided at the first start: bf16 on GPUs and on CPUs that have it, fp32 on CPUs that only emulate it."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and recompute the block: less memory, a third more work."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks and the loss with torch.compile; `auto`: on GPUs, and on CPUs in runs that are long enough."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row without a finite gradient; each of them is skipped."""
    skip_outliers: OutlierConfig | None = None
    """Also skip steps whose loss or gradient norm is an outlier among the steps before; null: do not."""

    def __post_init__(self) -> None:
        problems = {}
        if (self.global_batch_sequences is None) == (self.global_batch_tokens is None):
            problems["global_batch_sequences"] = "give exactly one of global_batch_sequences and global_batch_tokens"
        if self.total_steps is not None and self.total_tokens is not None:
            problems["total_steps"] = "give at most one of total_steps and total_tokens"
        for name in ("global_batch_sequences", "global_batch_tokens", "micro_batch_sequences", "total_steps"):
            problems |= _at_least(self, name, 1)
        problems |= _at_least(self, "total_tokens", 1) | _at_least(self, "max_skipped_steps", 1)
        problems |= order_problems("batch_warmup", self.batch_warmup, "sequences")
        problems |= order_problems("sequence_warmup", self.sequence_warmup, "length")
        if problems:
            raise ValueError(problems)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the forward and backward passes; `auto` counts as on GPUs."""
        return 4 if self.compute_dtype == "fp32" else 2


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
    fraction: float | Literal["rest"] | None = None
    """Length as a share of training.total_steps or total_tokens; `rest`: what the other phases leave of them."""
    sources: tuple[Source, ...] | None = None
    """The prepared folders to mix from this phase on; null: those of the phase before, at first `data.sources`. A
    mixture that was used before goes on where it stopped."""
    sequence_length: int | None = None
    """Tokens of a sequence from this phase on: rows are cut into pieces of this length, which must divide
    data.sequence_length; null: that of the phase before, at first data.sequence_length."""
    objective: Objective = "next-token"
    """What the model learns from its sources: the `next-token` of text; `sft`, supervised fine-tuning: the answers of
    chats, prepared with `--content chats`; or `dpo`, direct preference optimization: which of two answers is the better
    one, from pairs, prepared with `--content pairs`. Chats do not see one another."""
    preference: PreferenceConfig | None = None
    """How the pairs of a `dpo` phase are compared; null: with the defaults."""
    learning_rate: float | None = None
    """Peak learning rate from this phase on; null: that of the phase before, at first `optimizer.learning_rate`. Muon's
    rate changes in proportion."""
    schedule: ScheduleConfig | None = None
    """A schedule that begins with this phase, warm-up included, and holds until a later phase begins one; the schedule
    before ends here. null: go on with that of the phase before, at first `schedule`."""
    quantization: QuantConfig | None = None
    """What is quantized in a ternary phase, and how; null: BitNet b1.58 with scales of least squared error."""
    transition: TransitionConfig | None = None
    """The transition into this phase; null: keep everything, switch at once."""
    distillation: DistillationConfig | None = None
    """A 16-bit teacher from which a ternary phase learns, besides the text; null: none."""

    def __post_init__(self) -> None:
        problems = {}
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            problems["steps"] = f"give exactly one of steps, tokens and fraction, not {' and '.join(given) or 'none'}"
        for name in ("steps", "tokens", "sequence_length"):
            problems |= _at_least(self, name, 1)
        if self.learning_rate is not None and self.learning_rate <= 0:
            problems["learning_rate"] = f"is {self.learning_rate}; must be above 0"
        if self.sources is not None and (problem := sources_problem(self.sources)):
            problems["sources"] = problem
        if isinstance(self.fraction, float | int) and not 0 < self.fraction <= 1:
            problems["fraction"] = f"is {self.fraction}; must be above 0 and at most 1"
        transition = self.transition or TransitionConfig()
        if self.schedule is not None and transition.schedule == "restart":
            problems["transition.schedule"] = "is restart, but the phase begins a schedule of its own; leave it out"
        if self.objective == "dpo":
            if self.distillation is not None:
                problems["distillation"] = "is given for objective dpo, which compares with the phase's own beginning"
            if transition.optimizer == "rescale" and transition.rescale_factor is None:
                problems["transition.optimizer"] = (
                    "is rescale, which measures gradients before the phase, where dpo has none; set "
                    "transition.rescale_factor, or choose another"
                )
        elif self.preference is not None:
            problems["preference"] = f"is given for objective {self.objective}; only dpo learns from pairs"
        if self.precision == "16-bit":
            if self.quantization is not None:
                problems["quantization"] = "is given for a 16-bit phase; only ternary phases quantize"
            if self.distillation is not None:
                problems["distillation"] = "is given for a 16-bit phase; only ternary phases have a teacher"
            for name in ("ramp", "activation_ramp", "rollback"):
                if getattr(transition, name) not in (RampConfig(), None):
                    problems[f"transition.{name}"] = "is given for a 16-bit phase; only ternary phases have a strength"
            if transition.calibration is not None:
                problems["transition.calibration"] = "is given for a 16-bit phase; only ternary phases have codes"
        elif transition.activation_ramp and self.quantization and self.quantization.activations == "none":
            problems["transition.activation_ramp"] = "has no effect, because quantization.activations is none"
        if transition.ramp.rounding == "softmax" and (problem := soft_problem(self.quantization or QuantConfig())):
            problems["transition.ramp.rounding"] = problem
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and what a run starts from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Save every N steps, besides at transitions, at the end and when interrupted; null: do not."""
    interval_minutes: float | None = 30.0
    """Also save when the last checkpoint is N minutes old, at the next logged step; null: do not."""
    keep_last: int = 2
    """Checkpoints kept besides the milestones (transitions and the end): 0 keeps all, else at least 2."""
    folder: str | None = None
    """Where checkpoints go: a folder, or a URL such as `s3://bucket/run`; null: `checkpoints` in the run's folder."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training continues; false: training waits."""
    start_from: str | None = None
    """Start from the weights of this checkpoint (Tritrain's, DeepSpeed's or Hugging Face's), a folder or a URL, and
    from its optimizer state unless the transition of the first phase resets it."""
    start_phase: int = 0
    """Index of the phase in which a run with `start_from` begins. Earlier phases count as done: steps, schedule and
    data continue after them."""
    sub_norm_sequences: int | None = None
    """Put SubLN (`model.sub_norm`) into the 16-bit model of `start_from`, which was trained without, with gains that
    are measured on N training sequences; null: such a model is refused."""

    grow_vocabulary: bool = False
    """Give tokens that the model of `start_from` lacks rows in the embedding and the head, each the mean of the
    existing rows, without moments; false: such a model is refused."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1) | _above_zero(self, "interval_minutes")
        if self.keep_last < 0 or self.keep_last == 1:
            problems["keep_last"] = f"is {self.keep_last}; 0 (keep all) or at least 2, so that one is always complete"
        for name in ("folder", "start_from"):
            if problem := url_problem(getattr(self, name) or "") or mistaken_path(getattr(self, name) or ""):
                problems[name] = problem
        problems |= _at_least(self, "start_phase", 0) | _at_least(self, "sub_norm_sequences", 1)
        if self.start_phase and self.start_from is None:
            problems["start_phase"] = f"is {self.start_phase}, but needs start_from"
        if self.sub_norm_sequences is not None and self.start_from is None:
            problems["sub_norm_sequences"] = f"is {self.sub_norm_sequences}, but needs start_from"
        if self.grow_vocabulary and self.start_from is None:
            problems["grow_vocabulary"] = "is true, but needs start_from"
        if problems:
            raise ValueError(problems)

    def place(self, run: Path) -> str:
        """The folder or URL of the checkpoints of the run in this folder."""
        return self.folder or str(run / "checkpoints")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging during training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int = 10
    """Log every N steps; only then does the host wait for the device."""
    around_switch_steps: int = 0
    """Also log each of the N steps before and after every switch, so that a short spike is measured by the step."""
    tensorboard: bool = True
    """Write RUN/tensorboard beside RUN/metrics.jsonl."""
    trackers: tuple[TrackerName, ...] = ()
    """Also log to these, by their own clients, which must be installed."""
    project: str = "tritrain"
    """Project that the run belongs to in trackers; MLflow calls it an experiment."""
    quantization_interval_steps: int | None = 100
    """In ternary phases, measure codes, scales, flips and errors of every layer every N steps; null: never."""
    profile_steps: int = 0
    """Trace N steps of each phase on the first rank, after its first two, into RUN/profile; 0: none."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1) | _at_least(self, "quantization_interval_steps", 1)
        problems |= _at_least(self, "profile_steps", 0) | _at_least(self, "around_switch_steps", 0)
        if len(set(self.trackers)) < len(self.trackers):
            problems["trackers"] = f"is {', '.join(self.trackers)}; name each tracker once"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss at the start and end of every phase, and in between; tasks during training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Also evaluate every N steps; null: do not."""
    interval_minutes: float | None = 30.0
    """Also evaluate when the last evaluation was N minutes ago, at the next logged step; null: do not."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues, or answers if the last phase learns from chats: at the end of each phase and,
    with `checkpoint.start_from`, at the beginning. The report shows them side by side."""
    sample_tokens: int = 120
    """Length of a sample, in tokens."""
    tasks: tuple[str, ...] = ()
    """Tasks on which the model is scored during training: `paper11`, `paper11-harness`, or single ones such as
    `piqa`."""
    task_data: str | None = None
    """Folder of JSON lines with their examples; null: the Hugging Face hub."""
    tasks_interval_steps: int | None = None
    """Score the tasks every N steps, and at the end of each phase."""
    tasks_limit: int | None = 100
    """Use only the first N examples of each task; null: all."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1) | _at_least(self, "sample_tokens", 1)
        problems |= _above_zero(self, "interval_minutes")
        problems |= _at_least(self, "tasks_interval_steps", 1) | _at_least(self, "tasks_limit", 1)
        try:
            choose_tasks(self.tasks)
        except ValueError as error:
            problems["tasks"] = str(error)
        if any(not prompt.strip() for prompt in self.sample_prompts):
            problems["sample_prompts"] = "has one without text; remove it"
        elif len({*self.sample_prompts}) < len(self.sample_prompts):
            problems["sample_prompts"] = "has one twice; give each once"
        if bool(self.tasks) != (self.tasks_interval_steps is not None):
            problems["tasks_interval_steps"] = "goes with evaluation.tasks; set both or neither"
        if problems:
            raise ValueError(problems)


def _at_least(part: Any, name: str, least: int) -> dict[str, str]:
    value = getattr(part, name)
    return {name: f"is {value}; must be {least} or more"} if value is not None and value < least else {}


def _above_zero(part: Any, name: str) -> dict[str, str]:
    value = getattr(part, name)
    return {name: f"is {value:g}; must be above 0"} if value is not None and value <= 0 else {}


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
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    phases: tuple[PhaseConfig, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if problems := spanning_problems(vars(self)):
            raise ValueError(problems)

    @property
    def checkpoints(self) -> str:
        """The folder or URL of the run's checkpoints."""
        return self.checkpoint.place(self.run.path)
