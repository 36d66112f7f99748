"""What was published about when to switch from 16 bits to low bits: each figure with what it was found for.

None was found for a run like another one here, and they contradict each other. `launcher.study.switch_fit` fits one's
own studies instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

TERNARY_BITS = math.log2(3)

BUDGET_FACTOR = 2.0
"""A setting is like a published one if its parameters and tokens are within this factor of it."""

QAT_CONSTANT = 6.7297
"""The one constant of the law of arXiv 2509.22935, which its authors fitted; its mean error is 0.091 of the run."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run to be planned."""

    parameters: int
    """Of the whole model."""
    tokens: int
    """Of the whole run."""
    bits: float
    """Of a quantized weight."""

    def is_near(self, parameters: float, tokens: float) -> bool:
        """Return whether it is within `BUDGET_FACTOR` of another one."""
        ratios = (self.parameters / parameters, self.tokens / tokens)
        return all(1 / BUDGET_FACTOR <= ratio <= BUDGET_FACTOR for ratio in ratios)


@dataclass(frozen=True, kw_only=True)
class Law:
    """A published proposal."""

    name: str
    source: str
    found_for: str
    """Where it was found, and what is known to limit it."""
    share: Callable[[Setting], float | None]
    """Share of the run in 16 bits, 0 to 1; None where it has no value."""
    holds_for: Callable[[Setting], bool]
    """Whether a setting is like those that it was found for."""


def qat_share(setting: Setting) -> float | None:
    """Share of a run that is best trained with quantization, by arXiv 2509.22935.

    exp(-a / ln S), where S are the tokens for each byte of the model, D / (N B / 8), with all N parameters counted at B
    bits. None where S is at most 1, for which it has no value.
    """
    per_byte = setting.tokens / (setting.parameters * setting.bits / 8)
    return math.exp(-QAT_CONSTANT / math.log(per_byte)) if per_byte > 1 else None


def _share_before_qat(setting: Setting) -> float | None:
    share = qat_share(setting)
    return None if share is None else 1 - share


LAWS = (
    Law(
        name="Nielsen et al.",
        source="arXiv 2502.11895",
        found_for=(
            "the best of the few points that were tried, for 1 billion parameters, 42 billion tokens, a cosine "
            "schedule and AdamW; one seed, as far as is known"
        ),
        share=lambda setting: 0.2,
        holds_for=lambda setting: setting.is_near(1.2e9, 42e9),
    ),
    Law(
        name="Compute-optimal QAT",
        source="arXiv 2509.22935",
        found_for=(
            "86 million to 2.2 billion parameters, 2.3 billion to 1.4 trillion tokens and weights of 1, 2, 4 and 6 "
            "bits, whose activations are not quantized; 1.58 bits are interpolated. Mean error 9 % of the run. The "
            "formula is quoted from summaries of the paper"
        ),
        share=_share_before_qat,
        holds_for=lambda setting: 86e6 <= setting.parameters <= 2.2e9 and 2.3e9 <= setting.tokens <= 1.4e12,
    ),
    Law(
        name="ParetoQ",
        source="arXiv 2502.02631",
        found_for="one model of 125 million parameters and 100 billion tokens, whose activations are not quantized",
        share=lambda setting: 0.9,
        holds_for=lambda setting: setting.is_near(125e6, 100e9),
    ),
)
