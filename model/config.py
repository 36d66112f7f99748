"""The architecture, and how a student is distilled: what a configuration says of a model. Needs no torch."""

import math
from dataclasses import dataclass, fields
from math import inf, isqrt, log
from typing import Any, ClassVar, Literal

from model.strict import STRICT

MOST = {
    "vocab_size": 2**31, "hidden_size": 2**24, "num_layers": 1024, "num_heads": 2**20, "num_kv_heads": 2**20,
    "head_dim": 2**20, "intermediate_size": 2**26, "max_sequence_length": 2**31, "loss_chunk_tokens": 2**31,
}  # fmt: skip
"""Far beyond any model; sizes of what cannot exist would take for ever to work out."""


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Scaled rotary frequencies, with which a model sees longer sequences than it was first trained on.

    A key that the method does not use is an error.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Literal["linear", "llama3", "yarn"]
    """`linear` (arXiv 2306.15595), `llama3` (Llama 3.1 and later), or `yarn` (arXiv 2309.00071)."""
    factor: float
    """By how much low frequencies are divided, `linear`: all of them; 1 or more."""
    original_max_sequence_length: int | None = None
    """Longest sequence, in tokens, before scaling; `llama3` and `yarn` need it."""
    low_freq_factor: float = 1.0
    """`llama3`: waves that fit into the original length less often than this are divided by the factor."""
    high_freq_factor: float = 4.0
    """`llama3`: waves that fit into it more often than this are left alone."""
    beta_slow: float = 1.0
    """`yarn`: pairs that turn less often than this in the original length are divided by the factor."""
    beta_fast: float = 32.0
    """`yarn`: pairs that turn more often than this are left alone."""
    truncate: bool = True
    """`yarn`: whether the pairs at which these two lie are rounded outwards to whole ones."""
    attention_factor: float | None = None
    """`yarn`: factor of cosines and sines; null: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        problems: dict[str, str] = {}
        for name in ("factor", "original_max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems[name] = f"is {value}; must be 1 or more"
        for name in ("low_freq_factor", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems[name] = f"is {value}; must be above 0"
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, high) <= getattr(self, low):
                problems[high] = f"is {getattr(self, high)}; must be above {low} {getattr(self, low)}"
        if self.method != "linear" and self.original_max_sequence_length is None:
            problems["original_max_sequence_length"] = f"is missing; {self.method} needs it"
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("method", "factor", *ROPE_KEYS[self.method]):
                problems.setdefault(field.name, f"is {value}, which {self.method} does not use; leave it out")
        if problems:
            raise ValueError(problems)

    def __str__(self) -> str:
        """As in a configuration, without defaults."""
        changed = (
            (each.name, getattr(self, each.name)) for each in fields(self) if getattr(self, each.name) != each.default
        )
        return f"{{{', '.join(f'{name}: {value}' for name, value in changed)}}}"

    @property
    def original_context(self) -> int:
        """The original length, of a method that needs one."""
        assert self.original_max_sequence_length is not None
        return self.original_max_sequence_length

    @property
    def attention_scale(self) -> float:
        """The factor of cosines and sines, resolved; 1 but for YaRN."""
        if self.method != "yarn":
            return 1.0
        return yarn_attention(self.factor) if self.attention_factor is None else self.attention_factor


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of cosines and sines, from the factor of the frequencies."""
    return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0


ROPE_KEYS = {
    "linear": (),
    "llama3": ("original_max_sequence_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_sequence_length", "beta_slow", "beta_fast", "truncate", "attention_factor"),
}
"""Keys that each method uses, besides its factor."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, how its parameters start, and how its loss is computed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    vocab_size: int
    """Rows of the embedding; at least the tokenizer's vocabulary. A multiple of 64 or 128 runs faster."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks of attention and MLP."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key-value heads (grouped queries, arXiv 2305.13245); a divisor of `num_heads`, which is the default."""
    head_dim: int | None = None
    """Width of a head, even; hidden_size / num_heads if not given."""
    intermediate_size: int
    """Width of the gated MLP."""
    activation: Literal["silu", "relu2"] = "silu"
    """Activation of the MLP's gate: `silu` (SwiGLU), or `relu2`, the squared ReLU of BitNet b1.58 2B4T."""
    norm: Literal["rmsnorm", "layernorm-nonparametric"] = "rmsnorm"
    """`rmsnorm` has a weight; OLMo's `layernorm-nonparametric` has none."""
    norm_position: Literal["pre", "post"] = "pre"
    """`pre` normalizes the input of a sublayer; `post` normalizes its output before adding it (OLMo 2)."""
    norm_eps: float = 1e-5
    """Added to the mean square (or variance) of every norm."""
    qk_norm: Literal["none", "full", "head"] = "none"
    """A norm on queries and keys: over all heads at once (`full`, OLMo 2) or within each (`head`, Qwen3)."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias (Qwen2)."""
    sub_norm: bool = False
    """SubLN: a norm before the attention-output and the down projections, as in BitNet."""
    sub_norm_init: float = 0.03
    """Initial weights of SubLN's norms; 1, as of other norms, trains worse (docs/decisions/model.md)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaled rotary frequencies, as the model has them that a run starts from; null: none."""
    tie_embeddings: bool = True
    """The output head is the embedding."""
    max_sequence_length: int = 2048
    """Longest sequence, in tokens."""
    initialization: Literal["normal", "mitchell"] = "normal"
    """`normal`: one standard deviation, residual projections smaller; `mitchell`: by fan-in and depth (OLMo)."""
    init_std: float = 0.02
    """Standard deviation of the `normal` initialization."""
    embedding_init_std: float | None = None
    """Standard deviation of the embedding's initial values, so also of a tied head; null: as of other matrices. 1 is
    to avoid spikes of the loss (arXiv 2312.16903)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition in the loss (PaLM, arXiv 2204.02311); OLMo 2 takes 1e-5."""
    loss_chunk_tokens: int = 1024
    """Rows of logits that exist at once while the loss is computed."""

    def __post_init__(self) -> None:
        """Raise ValueError with a dict from field to what is wrong with it, all of it at once."""
        problems: dict[str, str] = {}
        counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*counts, "intermediate_size", "max_sequence_length", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems[name] = f"is {value}; must be 1 or more"
            elif value is not None and value > MOST[name]:
                problems[name] = f"is {value}; must be {MOST[name]} or less"
        for name in ("norm_eps", "rope_theta", "init_std", "embedding_init_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems[name] = f"is {value}; must be above 0"
        if not 0 <= self.sub_norm_init < inf:
            problems["sub_norm_init"] = f"is {self.sub_norm_init}; must be 0 or more, and finite"
        if self.rope_scaling is not None and self.rope_scaling.method == "yarn" and self.rope_theta <= 1:
            problems["rope_theta"] = f"is {self.rope_theta}; must be above 1 with rope_scaling.method yarn"
        if self.z_loss < 0:
            problems["z_loss"] = f"is {self.z_loss}; must be 0 (off) or more"
        if not problems:
            if self.hidden_size % self.num_heads and self.head_dim is None:
                problems["num_heads"] = (
                    f"{self.num_heads} does not divide hidden_size {self.hidden_size} and head_dim is not set; "
                    f"choose {_divisors_near(self.hidden_size, self.num_heads)}"
                )
            elif self.head_width % 2:
                problems["head_dim"] = f"{self.head_width} is odd, but rotary positions need pairs; choose an even one"
            if self.num_heads % self.kv_heads:
                problems["num_kv_heads"] = (
                    f"{self.kv_heads} does not divide num_heads {self.num_heads}; "
                    f"choose {_divisors_near(self.num_heads, self.kv_heads)}"
                )
        if problems:
            raise ValueError(problems)

    @property
    def kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head, resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rounds_once(self) -> bool:
        """Return whether norm weights and rotations apply in float32, as in OLMo; in the Llama line, after rounding."""
        return self.norm_position == "post" or self.norm == "layernorm-nonparametric"


def _divisors_near(number: int, target: int) -> str:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - target))[:3])
    return " or ".join(", ".join(map(str, nearest)).rsplit(", ", 1))


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A teacher for a ternary phase, and how much it counts (BitDistill, arXiv 2510.13998)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    teacher: str | None = None
    """A 16-bit checkpoint of any kind, a folder or a URL; null: the run's own, from where this phase begins."""
    temperature: float = 5.0
    """T, by which the logits of teacher and student are divided before the softmax."""
    weight: float = 1.0
    """Weight of T^2 * KL(teacher || student), which is added to the cross-entropy."""
    relation_weight: float = 0.0
    """Weight of the divergence of attention relations, which is added as well; 0 turns it off."""
    relation_layer: int | None = None
    """Block, counted from 0, whose attention relations are compared; null: the one at three quarters of the depth."""

    def __post_init__(self) -> None:
        problems = {}
        if self.temperature <= 0:
            problems["temperature"] = f"is {self.temperature}; must be above 0"
        for name in ("weight", "relation_weight", "relation_layer"):
            value = getattr(self, name)
            if value is not None and value < 0:
                problems[name] = f"is {value}; must be 0 or more"
        if self.relation_layer is not None and not self.relation_weight:
            problems["relation_layer"] = f"is {self.relation_layer}, but has no effect while relation_weight is 0"
        if problems:
            raise ValueError(problems)

    def layer_of(self, num_layers: int, student_layers: int) -> int:
        """The block of a model of ``num_layers`` at the depth of the student's block that is compared."""
        layer = 3 * student_layers // 4 if self.relation_layer is None else self.relation_layer
        return layer * num_layers // student_layers


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How a phase learns from pairs (DPO, arXiv 2305.18290)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    beta: float = 0.1
    """How soon a gain on the reference model is enough: the loss of a pair is -log sigmoid of beta times the gain of
    its chosen answer over its rejected one."""
    length_normalized: bool = False
    """Whether the gain of an answer is the mean over its tokens, not the sum; beta is then larger, such as 5."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError({"beta": f"is {self.beta}; must be above 0"})
