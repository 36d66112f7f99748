"""`tritrain export`: checks which options belong together, then writes the folder or file."""

import re
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import load_tokenizer
from launcher.commands.push import check_push, push
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.choices import (
    BlockType,
    Device,
    Dtype,
    EmbeddingType,
    ExportFormat,
    ExportWeights,
    InputBits,
    LinearClass,
)
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import HfWeights, default_dtype, export_hf
from launcher.formats.hf_folder import rounding_note
from launcher.formats.onnx_export import export_onnx
from launcher.formats.opened import Exportable, open_exportable
from launcher.process.console import Console
from quant.compressed_tensors import default_inputs
from quant.gguf import TERNARY_TYPES, TYPES_OF_DEVICES

OF_A_DTYPE: tuple[ExportFormat, ...] = ("hf", "hf-ternary", "compressed-tensors", "mlx")

WEIGHTS: dict[ExportFormat, HfWeights] = {
    "hf-ternary": "packed",
    "compressed-tensors": "compressed-tensors",
    "mlx": "mlx",
}
"""The kind of weights of each format that has only one."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options as they were given; None for those that were not.

    Raises:
        ConfigError: one belongs to another format.
    """

    into: ExportFormat
    """The format."""
    weights: ExportWeights | None
    """`hf` alone."""
    dtype: Dtype | None
    linear_class: LinearClass | None
    """`hf-ternary`: what computes the packed weights."""
    inputs: InputBits | None = None
    """`compressed-tensors` and `onnx`: what is done to the inputs of quantized layers."""
    block_type: BlockType | None
    """`gguf`: of the projections."""
    device: Device | None = None
    """`gguf`: what the file is to run on, which chooses the type."""
    embeddings: EmbeddingType | None
    """`gguf`: of the embedding and the head."""
    tokenizer: Path | None
    no_tokenizer: bool
    license_name: str | None = None
    push: str | None = None
    """OWNER/NAME on the Hugging Face hub."""

    def __post_init__(self) -> None:
        for option, value, formats in (
            ("--dtype", self.dtype, OF_A_DTYPE),
            ("--weights", self.weights, ("hf",)),
            ("--linear-class", self.linear_class, ("hf-ternary",)),
            ("--activations", self.inputs, ("compressed-tensors", "onnx")),
            ("--type", self.block_type, ("gguf",)),
            ("--for", self.device, ("gguf",)),
            ("--embeddings", self.embeddings, ("gguf",)),
        ):
            if value is not None and self.into not in formats:
                *others, last = formats
                named = f"{', '.join(others)} and {last}" if others else last
                raise ConfigError(f"{option} {value}: belongs to --format {named}")
        if self.block_type and self.device:
            raise ConfigError("--type and --for exclude each other")
        if self.license_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.license_name):
            raise ConfigError(
                f"--license {self.license_name!r}: must be an identifier of a license, such as apache-2.0, mit or other"
            )
        if self.no_tokenizer and self.into == "gguf":
            raise ConfigError("--no-tokenizer: a GGUF file always holds a tokenizer")
        if self.tokenizer and self.no_tokenizer:
            raise ConfigError("--tokenizer and --no-tokenizer exclude each other")


def export_checkpoint(checkpoint: str, to: Path, options: ExportOptions, console: Console) -> None:
    """Export a checkpoint, or the newest one of a run.

    Raises:
        ConfigError: ``to`` exists, or an option or the `gguf` package is missing.
        CheckpointError: the checkpoint is unknown or damaged, or the format cannot express it.
        DataError: the format cannot express its tokenizer.
    """
    if to.exists():
        raise ConfigError(f"{to}: exists already; name a new path")
    if options.push is not None:
        check_push(options.push)
    block_type = TYPES_OF_DEVICES[options.device] if options.device else options.block_type or "tq2_0"
    in_codes = options.into in (*WEIGHTS, "onnx") or options.weights == "dequantized"
    opened = open_exportable(checkpoint, ternary=block_type in TERNARY_TYPES if options.into == "gguf" else in_codes)
    weights = WEIGHTS.get(options.into, options.weights)
    if options.into == "hf" and weights is None:
        weights = weights_of_16_bits(opened)
    tokenizer = tokenizer_of(opened, options)
    if options.into == "gguf":
        assert tokenizer is not None
        sentence = export_gguf(
            opened,
            to,
            into=block_type,
            embeddings=options.embeddings,
            tokenizer=tokenizer,
            license_name=options.license_name,
        )
        console.line(sentence)
    elif options.into == "onnx":
        export_onnx(opened, to, inputs=options.inputs, tokenizer=tokenizer, license_name=options.license_name)
    else:
        assert weights is not None
        dtype = COMPUTE_DTYPES[options.dtype] if options.dtype else default_dtype(opened)
        if rounding := rounding_note(opened.source, dtype):
            console.line(rounding)
        export_hf(
            opened,
            to,
            weights=weights,
            dtype=dtype,
            linear_class=options.linear_class or "bitlinear",
            inputs=options.inputs,
            tokenizer=tokenizer,
            license_name=options.license_name,
        )
        if options.into == "compressed-tensors":
            console.line(inputs_sentence(opened, options.inputs))
    console.line(f"Written: {to}")
    if options.license_name is None:
        console.line("No license is named in it; --license NAME does that: apache-2.0, mit, ...")
    if options.push is not None:
        push(to, options.push, console)


def inputs_sentence(opened: Exportable, inputs: InputBits | None) -> str:
    """What programs do to the inputs of the layers, compared with training."""
    quantization = opened.quantization
    assert quantization is not None
    trained, inputs = quantization.activations, inputs or default_inputs(quantization)
    if inputs == "none":
        end = "." if trained == "none" else f"; {trained} in training."
        return f"Inputs of the layers stay in 16 bits{end}"
    if trained == "int8-127.5":
        same, other = "Transformers", "Humming (vLLM, SGLang) divides by absmax / 127"
    else:
        same, other = "Humming (vLLM, SGLang)", "Transformers divides by absmax / 127.5"
    return f"Inputs of the layers are rounded to 8 bits: by {same} as in training; {other}."


def weights_of_16_bits(opened: Exportable) -> HfWeights:
    """The weights to export if none are named: a 16-bit model has one kind, a ternary one has two to choose from."""
    if opened.quantization is not None:
        raise ConfigError(
            f"--weights: is missing; {opened.source.location} is ternary. Choose latent, the 16-bit weights that are "
            "trained, or dequantized, those that the model computes with"
        )
    return "latent"


def tokenizer_of(opened: Exportable, options: ExportOptions) -> Path | None:
    """The tokenizer's file; None if it is left out."""
    if options.no_tokenizer:
        return None
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer).path  # of a folder, the file in it
    file = opened.tokenizer
    if file is None:
        raise ConfigError(
            f"{opened.source.location}: its tokenizer was not found; name it with --tokenizer"
            + ("" if options.into == "gguf" else ", or leave it out with --no-tokenizer")
        )
    return file
