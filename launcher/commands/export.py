"""`tritrain export`: checks which options belong together, then writes the folder or file."""

from dataclasses import dataclass
from pathlib import Path

from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.choices import BlockType, Dtype, EmbeddingType, ExportFormat, ExportWeights, LinearClass
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import HfWeights, export_hf
from launcher.formats.opened import Exportable, open_exportable
from launcher.process.console import Console
from quant.gguf import TERNARY_TYPES


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
    block_type: BlockType | None
    """`gguf`: of the projections."""
    embeddings: EmbeddingType | None
    """`gguf`: of the embedding and the head."""
    tokenizer: Path | None
    no_tokenizer: bool

    def __post_init__(self) -> None:
        for option, value, formats in (
            ("--dtype", self.dtype, ("hf", "hf-ternary")),
            ("--weights", self.weights, ("hf",)),
            ("--linear-class", self.linear_class, ("hf-ternary",)),
            ("--type", self.block_type, ("gguf",)),
            ("--embeddings", self.embeddings, ("gguf",)),
        ):
            if value is not None and self.into not in formats:
                raise ConfigError(f"{option} {value}: belongs to --format {' and '.join(formats)}")
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
    block_type: BlockType = options.block_type or "tq2_0"
    wants_codes = {"hf": options.weights == "dequantized", "hf-ternary": True, "gguf": block_type in TERNARY_TYPES}
    opened = open_exportable(checkpoint, ternary=wants_codes[options.into])
    weights: HfWeights | None = "packed" if options.into == "hf-ternary" else options.weights
    if options.into == "hf" and weights is None:
        weights = weights_of_16_bits(opened)
    tokenizer = tokenizer_of(opened, options)
    if options.into == "gguf":
        assert tokenizer is not None
        console.line(export_gguf(opened, to, into=block_type, embeddings=options.embeddings, tokenizer=tokenizer))
    else:
        assert weights is not None
        export_hf(
            opened,
            to,
            weights=weights,
            dtype=COMPUTE_DTYPES[options.dtype] if options.dtype else None,
            linear_class=options.linear_class or "bitlinear",
            tokenizer=tokenizer,
        )
    console.line(f"Written: {to}")


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
    file = options.tokenizer or opened.tokenizer
    if file is None:
        raise ConfigError(
            f"{opened.source.location}: its tokenizer was not found; name it with --tokenizer"
            + ("" if options.into == "gguf" else ", or leave it out with --no-tokenizer")
        )
    return file
