"""The architecture, and how a student is distilled: what a configuration says of a model. Needs no torch."""

from dataclasses import dataclass
from math import inf, isqrt
from typing import Any, ClassVar, Literal

from model.strict import STRICT

MOST = {
    "vocab_size": 2**31, "hidden_size": 2**24, "num_layers": 1024, "num_heads": 2**20, "num_kv_heads": 2**20,
    "head_dim": 2**20, "intermediate_size": 2**26, "max_sequence_length": 2**31, "loss_chunk_tokens": 2**31,
}  # fmt: skip
"""Far beyond any model; sizes of what cannot exist would take for ever to work out."""


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
    tie_embeddings: bool = True
    """The output head is the embedding."""
    max_sequence_length: int = 2048
    """Longest sequence, in tokens."""
    initialization: Literal["normal", "mitchell"] = "normal"
    """`normal`: one standard deviation, residual projections smaller; `mitchell`: by fan-in and depth (OLMo)."""
    init_std: float = 0.02
    """Standard deviation of the `normal` initialization."""
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
        for name in ("norm_eps", "rope_theta", "init_std"):
            if getattr(self, name) <= 0:
                problems[name] = f"is {getattr(self, name)}; must be above 0"
        if not 0 <= self.sub_norm_init < inf:
            problems["sub_norm_init"] = f"is {self.sub_norm_init}; must be 0 or more, and finite"
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
