"""The sections `optimizer` and `schedule`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from launcher.config.strict import STRICT


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, or from a phase on, as a factor of the peak."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shape: Literal["cosine", "linear", "wsd", "two-stage", "constant"] = "cosine"
    """After the warm-up: `cosine`, `linear`, `wsd` (warm-up, stable, linear decay at the end), `constant`, or
    `two-stage`: linear with one drop (BitNet b1.58's)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a factor of the peak."""
    decay_fraction: float = 0.2
    """Share of its steps in which `wsd` decays."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """How `wsd` decays: `linear`, or `1-sqrt`, which falls faster at first (arXiv 2405.18392)."""
    drop_at: float | None = None
    """Share of its steps after which `two-stage` drops; null: 0.5."""
    drop_factor: float | None = None
    """Factor on `two-stage` after the drop; null: 2/3."""
    decay_from_phase: int | None = None
    """Keep `cosine` or `linear` at the peak until the phase of this index begins, and decay from there on, so that the
    cool-down and the training with quantization are one (arXiv 2509.22935); null: decay after the warm-up."""
    horizon_steps: int | None = None
    """Steps after which the schedule ends; null: where a phase begins a schedule of its own, or with the run."""

    def __post_init__(self) -> None:
        problems = {}
        if self.warmup_steps < 0:
            problems["warmup_steps"] = f"is {self.warmup_steps}; must be 0 or more"
        if not 0 <= self.final_fraction <= 1:
            problems["final_fraction"] = f"is {self.final_fraction}; must be between 0 and 1"
        if not 0 < self.decay_fraction <= 1:
            problems["decay_fraction"] = f"is {self.decay_fraction}; must be above 0 and at most 1"
        for name in ("drop_at", "drop_factor"):
            value = getattr(self, name)
            if value is not None and self.shape != "two-stage":
                problems[name] = f"has no effect for {self.shape}; only two-stage has it"
            elif value is not None and not 0 < value < 1:
                problems[name] = f"is {value}; must be between 0 and 1"
        if self.decay_from_phase is not None:
            if self.shape not in ("cosine", "linear"):
                problems["decay_from_phase"] = f"is not for {self.shape}; set it only for cosine or linear"
            elif self.decay_from_phase < 1:
                problems["decay_from_phase"] = f"is {self.decay_from_phase}; must be 1 or more, the index of a phase"
        if self.horizon_steps is not None and self.horizon_steps <= self.warmup_steps:
            problems["horizon_steps"] = f"is {self.horizon_steps}; must be above warmup_steps {self.warmup_steps}"
        if problems:
            raise ValueError(problems)


OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon: momentum, made orthogonal (https://kellerjordan.github.io/posts/muon/)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    learning_rate: float | None = None
    """Peak learning rate of the matrices; null: `optimizer.learning_rate`."""
    scale: Literal["match-adamw", "shape"] = "match-adamw"
    """Size of an update: `match-adamw` has a root mean square of about 0.2, as AdamW's, so that its learning rate and
    weight decay fit (arXiv 2502.16982); `shape` has singular values of about sqrt(max(1, rows / columns))."""
    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the current gradient counts once more (Nesterov)."""
    newton_schulz_steps: int = 5
    """Steps of the iteration that makes an update orthogonal."""

    def __post_init__(self) -> None:
        problems = {}
        if self.learning_rate is not None and self.learning_rate <= 0:
            problems["learning_rate"] = f"is {self.learning_rate}; must be above 0, or null"
        if not 0 <= self.momentum < 1:
            problems["momentum"] = f"is {self.momentum}; must be 0 or more and below 1, such as 0.95"
        if not 1 <= self.newton_schulz_steps <= 20:
            problems["newton_schulz_steps"] = f"is {self.newton_schulz_steps}; must be between 1 and 20, such as 5"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """A factor that changes linearly from the beginning of each ternary phase on, and then stays."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    start: float
    """Factor in the first step of the phase."""
    end: float
    """Factor that it reaches."""
    steps: int | None = None
    """Steps until it does; give at most one of this and `fraction`, and none for the whole phase."""
    fraction: float | None = None
    """Share of the phase's steps until it does."""

    def __post_init__(self) -> None:
        problems = {}
        for name in ("start", "end"):
            if getattr(self, name) <= 0:
                problems[name] = f"is {getattr(self, name)}; must be above 0"
        if self.steps is not None and self.fraction is not None:
            problems["steps"] = "give at most one of steps and fraction"
        elif self.steps is not None and self.steps < 1:
            problems["steps"] = f"is {self.steps}; must be 1 or more"
        if self.fraction is not None and not 0 < self.fraction <= 1:
            problems["fraction"] = f"is {self.fraction}; must be above 0 and at most 1"
        if problems:
            raise ValueError(problems)

    def num_steps(self, phase_steps: int) -> int:
        """Steps until the end is reached, in a phase of this many steps."""
        return self.steps or max(1, round((self.fraction or 1.0) * phase_steps))

    def at(self, step: int, phase_steps: int) -> float:
        """Factor in a step, counted from 0, of a phase of this many steps."""
        progress = min(1.0, step / self.num_steps(phase_steps))
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: AdamW with decoupled weight decay (arXiv 1711.05101), alone or with Muon for matrices."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: OptimizerName = "adamw"
    """`adamw` for all parameters, or `muon` for the matrices of blocks, and AdamW for embeddings, head, norms and
    learned scales. A transition can change it."""
    muon: MuonConfig | None = None
    """Settings of Muon; null: the defaults."""
    learning_rate: float
    """Peak learning rate; the schedule scales it. A phase may have another."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms are not decayed."""
    weight_decay_until: float | Literal["ternary"] | None = None
    """Share of the run after which weight decay is 0 (BitNet: 0.5), or `ternary`: 0 from the first ternary phase on;
    null: never."""
    ternary_learning_rate_factor: float | RateCurve | None = None
    """Factor on the learning rate of the quantized layers in ternary phases: a number, or a curve over each phase,
    such as `{start: 2.0, end: 1.0}`; null: none."""
    decay_embeddings: bool = True
    """Whether weight decay applies to the embedding (and an untied head)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global L2 norm are scaled down to it."""

    @property
    def muon_or_default(self) -> MuonConfig:
        """Settings of Muon."""
        return self.muon or MuonConfig()

    def __post_init__(self) -> None:
        problems = {}
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                problems[name] = f"is {getattr(self, name)}; must be above 0"
        if self.weight_decay < 0:
            problems["weight_decay"] = f"is {self.weight_decay}; must be 0 or more"
        until = self.weight_decay_until
        if until is not None:
            if until != "ternary" and not 0 < until < 1:
                problems["weight_decay_until"] = f"is {until}; must be between 0 and 1, ternary, or null"
            elif not self.weight_decay:
                problems["weight_decay_until"] = "has no effect, because weight_decay is 0"
        factor = self.ternary_learning_rate_factor
        if isinstance(factor, float | int) and factor <= 0:
            problems["ternary_learning_rate_factor"] = f"is {factor}; must be above 0"
        if not all(0 <= beta < 1 for beta in self.betas):
            problems["betas"] = f"is {list(self.betas)}; both must be 0 or more and below 1, such as [0.9, 0.95]"
        if problems:
            raise ValueError(problems)
