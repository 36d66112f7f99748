"""Scaled rotary frequencies in a GGUF file, as llama.cpp reads them.

Keys hold `linear` and `yarn`. Of `llama3` there is no key: the tensor `rope_freqs.weight`, [E / 2] in float32, holds
what each frequency is divided by, and only the graph llama reads it. The keys that say how these factors were made are
llama.cpp's names, continued; it ignores them, and they are read here.
"""

from collections.abc import Callable
from ctypes import c_float
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig, RopeScalingConfig, yarn_attention

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = "rope_freqs.weight"
ONLY_IN_LLAMA = "llama3"
BETAS = ("beta_fast", "beta_slow")
USUAL = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Values of YaRN that programs around llama.cpp put in the place of a file's own, or that it knows alone."""

Field = Callable[..., Any]
"""Reads a key without the name of the architecture: of the key, the types that it may have, and a default."""


def rope_problem(config: ModelConfig, graph: str) -> str | None:
    """Why a graph of llama.cpp does not scale rotary frequencies as the model does; None if it does."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.method == ONLY_IN_LLAMA and graph != "llama":
        return f"llama.cpp's graph {graph} does not read the frequencies of rope_scaling.method llama3; only llama does"
    for name, usual in USUAL.items():
        if getattr(scaling, name) != usual:
            return (
                f"rope_scaling.{name} is {getattr(scaling, name)}, and llama.cpp, or programs around it, compute with "
                f"{usual} whatever the file says"
            )
    return None


def rope_fields(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys that describe a model's scaling, without the name of the architecture."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.method == "llama3":
        return {
            "rope.scaling.llama3_factor": scaling.factor,
            "rope.scaling.llama3_low_freq_factor": scaling.low_freq_factor,
            "rope.scaling.llama3_high_freq_factor": scaling.high_freq_factor,
            "rope.scaling.original_context_length": scaling.original_context,
        }
    fields: dict[str, int | float | str] = {"rope.scaling.type": scaling.method, "rope.scaling.factor": scaling.factor}
    if scaling.method == "yarn":
        fields["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.attention_factor is not None:  # llama.cpp multiplies its own factor by it
            fields["rope.scaling.attn_factor"] = scaling.attention_factor / yarn_attention(scaling.factor)
    return fields


def rope_factors(config: ModelConfig) -> "Tensor | None":
    """The content of `rope_freqs.weight`; None where keys hold the scaling."""
    if config.rope_scaling is None or config.rope_scaling.method != "llama3":
        return None
    import torch

    from model.rotary import rotary_frequencies

    plain = replace(config, rope_scaling=None)
    cpu = torch.device("cpu")
    return rotary_frequencies(plain, cpu) / rotary_frequencies(config, cpu)


def scaling_from_gguf(field: Field, factors: "Tensor | None", plain: ModelConfig) -> RopeScalingConfig | None:
    """The scaling that a file describes.

    Args:
        field: reads a key.
        factors: its tensor `rope_freqs.weight`.
        plain: its model, without scaling.

    Raises:
        ValueError: it is not computed here; says why.
    """
    factor = field("rope.scaling.factor", (float, int), field("rope.scale_linear", (float, int), 0.0))
    # llama.cpp takes a factor without a type for a linear one, and 0 for none.
    method = field("rope.scaling.type", (str,), "none" if factor in (0, 1) else "linear")
    if factors is not None and method == "none":
        return _llama3(field, factors, plain)
    if factors is not None or method not in ("none", "linear", "yarn"):
        raise ValueError(f"its rotary positions are scaled by {method!r}, which is not computed here")
    if method == "none":
        return None
    if method == "linear":
        return _checked(method="linear", factor=float(factor))
    betas = {name: float(field(f"rope.scaling.yarn_{name}", (float, int), USUAL[name])) for name in BETAS}
    attention, usual = field("rope.scaling.attn_factor", (float, int), 1.0), yarn_attention(factor)
    if field("rope.scaling.yarn_log_multiplier", (float, int), 0.0):
        raise ValueError("its rope.scaling.yarn_log_multiplier changes the attention, which is not computed here")
    return _checked(
        method="yarn",
        factor=float(factor),
        original_max_sequence_length=field("rope.scaling.original_context_length", (int,), plain.max_sequence_length),
        attention_factor=None if attention == 1 else _shortest(attention * usual, lambda value: value / usual),
        **betas,
    )


def _shortest(value: float, stored: Callable[[float], float]) -> float:
    """The shortest decimal of which a file holds the same float32 as of a value.

    Args:
        value: what was read.
        stored: gives what a file holds of it, before that becomes float32.
    """
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((each for each in decimals if c_float(stored(each)).value == c_float(stored(value)).value), value)


def _llama3(field: Field, factors: "Tensor", plain: ModelConfig) -> RopeScalingConfig:
    """The scaling whose factors a file holds; llama.cpp's own conversion does not write how they were made."""
    largest = float(f"{factors.max().item() if len(factors) else 0.0:.6g}")  # all digits that are float32's for certain
    scaling = _checked(
        method="llama3",
        factor=float(field("rope.scaling.llama3_factor", (float, int), largest)),
        original_max_sequence_length=field("rope.scaling.original_context_length", (int,), 8192),
        low_freq_factor=float(field("rope.scaling.llama3_low_freq_factor", (float, int), 1.0)),
        high_freq_factor=float(field("rope.scaling.llama3_high_freq_factor", (float, int), 4.0)),
    )
    expected = rope_factors(replace(plain, rope_scaling=scaling))
    assert expected is not None
    if factors.shape != expected.shape or not factors.allclose(expected, rtol=1e-5):
        raise ValueError(
            f"{FACTORS} holds other factors than those of Llama 3.1 and later (factor {scaling.factor:g}, original "
            f"length {scaling.original_context}), which are not computed here"
        )
    return scaling


def _checked(**values: Any) -> RopeScalingConfig:
    try:
        return RopeScalingConfig(**values)
    except ValueError as error:
        raise ValueError(f"its keys describe no scaling of rotary positions: {error}") from error
