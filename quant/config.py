"""The configuration of quantization, and published recipes by name."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from quant.strict import STRICT

WeightScale = Literal["absmean", "absmedian", "twn", "gaussian", "absmax", "learned"]
Levels = Literal["binary", "ternary", "int2", "int3", "int4"]
Granularity = Literal["matrix", "row", "group"]
Activations = Literal["int8", "int8-127.5", "int8-128", "int4", "none"]
Gradient = Literal["identity", "clipped", "trust"]
Backward = Literal["exact", "int8-input", "int8"]

SCALES_OF_LEVELS: dict[Levels, tuple[WeightScale, ...]] = {
    "ternary": ("absmean", "absmedian", "twn", "gaussian", "learned"),
    "binary": ("absmean", "gaussian"),
    "int2": ("gaussian", "absmax", "learned"),
    "int3": ("gaussian", "absmax", "learned"),
    "int4": ("gaussian", "absmax", "learned"),
}
"""The scales that are defined for a set of levels."""

IN_2_BITS: tuple[Levels, ...] = ("ternary", "binary")
"""Levels whose codes fit 2 bits: -1, 0 and +1."""

OUTPUTS = ("o_proj", "down_proj")
"""Projections back to the residual stream, whose inputs have the outliers."""


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The quantization of a ternary phase."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    preset: Literal["bitnet-b1.58", "nielsen-2025", "paretoq", "bitnet-v2", "quest"] | None = None
    """A published recipe, which the other keys change; null: `bitnet-b1.58`, but with `weights: gaussian`."""
    weights: WeightScale = "gaussian"
    """How the scale of the weights is found: `absmean` (BitNet b1.58), `absmedian` (b1.58 Reloaded), `twn` (threshold
    0.7 times the mean, least-squares level), `gaussian` (least squared error for normal weights, QuEST), `absmax`, or
    `learned` (a parameter for each row, ParetoQ)."""
    levels: Levels = "ternary"
    """`ternary`; `binary`, `int2`, `int3` and `int4` are for comparison."""
    granularity: Granularity = "matrix"
    """Weights that share a scale: the `matrix`, a `row` (an output feature) or a `group` of neighbors in a row."""
    group_size: int = 128
    """Weights in a group; must divide the length of a row."""
    fused: bool = False
    """Use one scale for queries, keys and values, and one for gate and up, as if each were one matrix."""
    activations: Activations = "int8"
    """Quantization of the layers' inputs, absmax per token: `int8`, `int4`, `int8-127.5` (as Transformers rounds the
    inputs of compressed-tensors models), `int8-128` (127 and 128 of the paper's code: the largest positive value is
    clipped), or `none` (left in 16 bits)."""
    gradient: Gradient = "identity"
    """Gradient through the rounding of weights: `identity` (straight through), `clipped` (none beyond the outermost
    levels) or `trust` (none where rounding moves a weight by more than half a step, QuEST)."""
    backward: Backward = "exact"
    """Products of the backward pass: `exact`, in the compute dtype; `int8-input`: the gradient of the inputs from
    incoming gradients that are rounded to 8 bits, absmax per token; `int8`: the gradient of the weights, too."""
    hadamard: Literal["none", "outputs", "all"] = "none"
    """Rotate inputs and weights before rounding: at the attention-output and down projections (`outputs`,
    BitNet v2), or of `all`."""
    layer_norm: bool = False
    """Normalize inputs inside the layer, without parameters, as the `bitlinear` package does."""
    dead_zone_bias: float = 0.0
    """Add this share of the weights with code 0 to the output, as a bias (Tequila: 1e-3)."""
    include: str = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
    """Regular expression searched in the dotted names of the linear layers; those that match are quantized.
    The output head is not one of them."""

    def __post_init__(self) -> None:
        problems = {}
        try:
            re.compile(self.include)
        except re.error as error:
            problems["include"] = f"{self.include!r} is not a regular expression: {error}"
        if self.weights not in (known := SCALES_OF_LEVELS[self.levels]):
            problems["weights"] = f"is {self.weights}; for {self.levels} weights choose {', '.join(known)}"
        if self.weights == "learned" and self.granularity != "row":
            problems["granularity"] = f"is {self.granularity}; learned scales need granularity row"
        if self.weights == "learned" and self.hadamard != "none":
            problems["hadamard"] = f"is {self.hadamard}; learned scales need hadamard none"
        if self.group_size < 2:
            problems["group_size"] = f"is {self.group_size}; must be 2 or more"
        if self.fused and self.granularity != "matrix":
            problems["fused"] = f"is true, but needs granularity matrix, not {self.granularity}"
        if self.layer_norm and self.activations == "none":
            problems["layer_norm"] = "is true, but has no effect with activations none"
        if self.backward != "exact" and self.granularity == "group":
            problems["backward"] = f"is {self.backward}, but with granularity group choose exact"
        if self.backward == "int8" and self.activations == "none":
            problems["backward"] = (
                "is int8, but with activations none there are no codes to multiply; choose int8-input"
            )
        if self.dead_zone_bias < 0:
            problems["dead_zone_bias"] = f"is {self.dead_zone_bias}; must be 0 or more"
        if self.dead_zone_bias and self.levels != "ternary":
            problems["dead_zone_bias"] = f"is {self.dead_zone_bias}, but {self.levels} weights have no dead zone"
        if problems:
            raise ValueError(problems)

    @property
    def learned(self) -> bool:
        """Return whether scales are parameters."""
        return self.weights == "learned"

    @property
    def recipe(self) -> str:
        """The preset, if there is one, and every key that differs from it or from the defaults, `include` aside."""
        base = QuantConfig() if self.preset is None else PRESETS[self.preset]
        keys = [field.name for field in fields(self) if field.name not in ("preset", "include")]
        changed = {key: getattr(self, key) for key in keys if getattr(self, key) != getattr(base, key)}
        named = {"weights": self.weights} | changed if self.preset is None else {"preset": self.preset} | changed
        return ", ".join(f"{key}={value}" for key, value in named.items())


BITNET = QuantConfig(preset="bitnet-b1.58", weights="absmean")
"""BitNet b1.58 as published."""

PRESETS: dict[str, QuantConfig] = {
    # arXiv 2402.17764, eq. 1 to 3 and section 2.
    "bitnet-b1.58": BITNET,
    # The `bitlinear` package 2.4 with its defaults, on fused matrices, as its authors patched it into OLMo for
    # arXiv 2502.11895. Its ramp is `tanh`. It normalizes at every strength; we blend the norm in with the rest.
    "nielsen-2025": replace(
        BITNET, preset="nielsen-2025", weights="absmedian", activations="int8-128", layer_norm=True, fused=True
    ),
    # arXiv 2502.02631: stretched elastic quantization (SEQ) of the weights alone.
    "paretoq": replace(
        BITNET, preset="paretoq", weights="learned", granularity="row", activations="none", gradient="clipped"
    ),
    # arXiv 2504.18415: 8 bits first; `activations: int4` is its second stage.
    "bitnet-v2": replace(BITNET, preset="bitnet-v2", hadamard="outputs"),
    # arXiv 2502.05003, with 8-bit activations by absmax in place of its own 1 to 4 bits.
    "quest": replace(BITNET, preset="quest", weights="gaussian", granularity="row", gradient="trust", hadamard="all"),
}
"""Published recipes by name. In Python, begin with one of these: `QuantConfig(preset=...)` gives the other keys their
defaults, since only the reader of configuration files fills in a preset's keys."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """A fit of the codes and levels of a ternary phase to training data, at the switch."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sequences: int
    """Sequences of training data to fit to, the next ones, rounded up to whole batches. They are trained on as well."""
    method: Literal["error-feedback", "scales"] = "error-feedback"
    """`error-feedback`: round column after column, and let the later ones make up for the errors (GPTQ); `scales`: fit
    thresholds and levels alone."""
    damping: float = 0.01
    """Added to the second moments of inputs, in means of their diagonal, for `error-feedback`."""

    def __post_init__(self) -> None:
        problems = {}
        if self.sequences < 1:
            problems["sequences"] = f"is {self.sequences}; must be 1 or more"
        if self.damping <= 0:
            problems["damping"] = f"is {self.damping}; must be above 0"
        if problems:
            raise ValueError(problems)


def is_rotated(name: str, config: QuantConfig) -> bool:
    """Return whether inputs and weights of the layer of this name are rotated before they are rounded."""
    return config.hadamard == "all" or (config.hadamard == "outputs" and name.endswith(OUTPUTS))


def is_rotatable(width: int) -> bool:
    """Return whether there is a rotation for rows of this width."""
    return width % 2 == 0


def width_problem(name: str, width: int, config: QuantConfig) -> str | None:
    """Say why a layer with `width` input features cannot be quantized with this recipe; None if it can."""
    if config.granularity == "group" and width % config.group_size:
        return f"group_size {config.group_size} does not divide the {width} inputs of {name}"
    if is_rotated(name, config) and not is_rotatable(width):
        return f"hadamard {config.hadamard} cannot rotate the {width} inputs of {name}; the number must be even"
    return None


def soft_problem(config: QuantConfig) -> str | None:
    """Say why weights cannot be rounded softly (`quant.soft`) with this recipe; None if they can."""
    if config.levels != "ternary":
        return f"is softmax, which is for levels ternary, not {config.levels}; choose blend"
    if config.learned:
        return "is softmax, but learned scales get no gradient from it; choose blend, or weights other than learned"
    return None


def gather_problems(config: QuantConfig) -> dict[str, str]:
    """Why layers that are quantized like this cannot be gathered as codes, by key of the configuration; {} if they can.

    Their codes must fit into 2 bits, their scale must come from sums over the matrix or from how often a magnitude
    occurs in it, and neither the output nor the gradient may need the latent weights.
    """
    needed: dict[str, tuple[Any, ...]] = {
        "levels": IN_2_BITS,
        "weights": ("absmean", "gaussian", "absmedian"),
        "granularity": ("matrix",),
        "gradient": ("identity",),
        "hadamard": ("none",),
        "dead_zone_bias": (0.0,),
    }
    return {
        key: f"is {getattr(config, key)}; engine.gather codes needs {' or '.join(map(str, fitting))}"
        for key, fitting in needed.items()
        if getattr(config, key) not in fitting
    }


def calibration_problems(config: QuantConfig) -> dict[str, str]:
    """Why layers that are quantized like this cannot be calibrated, by key of the configuration; {} if they can.

    Latent weights must be able to have any level, and the output must be that of the codes alone.
    """
    needed: dict[str, tuple[tuple[Any, ...], str]] = {
        "levels": (("ternary",), "codes are fitted as -1, 0 and 1"),
        "weights": (
            ("absmean", "gaussian", "twn", "learned"),
            "a median is the level only while fewer than half of the codes are 0",
        ),
        "fused": ((False,), "each matrix has a level of its own"),
        "dead_zone_bias": ((0.0,), "the codes are fitted without it"),
    }
    return {
        key: f"is {getattr(config, key)}; a calibration needs {' or '.join(map(str, fitting))}, because {reason}"
        for key, (fitting, reason) in needed.items()
        if getattr(config, key) not in fitting
    }
