"""`tritrain export`: which options belong together, and what they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import HfWeights, export_hf
from launcher.formats.opened import Exportable, open_exportable
from launcher.plan.exports import EMBEDDING_TYPES, EmbeddingType, LinearClass
from launcher.process.console import Console
from quant.gguf import BLOCK_TYPES, TERNARY_TYPES, BlockType

FORMATS = ("hf", "hf-ternary", "gguf")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options as they were given; None where nothing was said.

    Raises:
        ConfigError: one is unknown, or belongs to another format.
    """

    into: str
    """The format."""
    weights: str | None
    """`hf`: `latent` or `dequantized`."""
    dtype: str | None
    linear_class: str | None
    """`hf-ternary`: what computes the packed weights."""
    block_type: str | None
    """`gguf`: of the projections."""
    embeddings: str | None
    """`gguf`: type of the embedding and the head."""
    tokenizer: Path | None
    no_tokenizer: bool

    def __post_init__(self) -> None:
        if self.into not in FORMATS:
            raise ConfigError(f"--format {self.into}: {' and '.join(FORMATS)} are there")
        for option, value, known, formats in (
            ("--dtype", self.dtype, COMPUTE_DTYPES, ("hf", "hf-ternary")),
            ("--weights", self.weights, ("latent", "dequantized"), ("hf",)),
            ("--linear-class", self.linear_class, get_args(LinearClass), ("hf-ternary",)),
            ("--type", self.block_type, BLOCK_TYPES, ("gguf",)),
            ("--embeddings", self.embeddings, EMBEDDING_TYPES, ("gguf",)),
        ):
            if value is not None and value not in known:
                raise ConfigError(f"{option} {value}: {' and '.join(known)} are there")
            if value is not None and self.into not in formats:
                raise ConfigError(f"{option} {value}: belongs to --format {' and '.join(formats)}")
        if self.no_tokenizer and self.into == "gguf":
            raise ConfigError("--no-tokenizer: a GGUF file holds one")
        if self.tokenizer and self.no_tokenizer:
            raise ConfigError("--tokenizer and --no-tokenizer exclude each other")


def export_checkpoint(checkpoint: str, to: Path, options: ExportOptions, console: Console) -> None:
    """Write what the options ask for of a checkpoint, or of a run's newest.

    Raises:
        ConfigError: ``to`` is there, an option is missing, or the `gguf` package is.
        CheckpointError: the checkpoint is unknown or damaged, or the format cannot express it.
        DataError: the format cannot express its tokenizer.
    """
    if to.exists():
        raise ConfigError(f"{to}: is there already; name what is not")
    block_type = cast(BlockType, options.block_type or "tq2_0")
    wants_codes = {"hf": options.weights == "dequantized", "hf-ternary": True, "gguf": block_type in TERNARY_TYPES}
    opened = open_exportable(checkpoint, ternary=wants_codes[options.into])
    weights = "packed" if options.into == "hf-ternary" else options.weights
    if options.into == "hf" and weights is None:
        weights = weights_of_16_bits(opened)
    tokenizer = tokenizer_of(opened, options)
    if options.into == "gguf":
        assert tokenizer is not None
        embeddings = cast(EmbeddingType | None, options.embeddings)
        console.line(export_gguf(opened, to, into=block_type, embeddings=embeddings, tokenizer=tokenizer))
    else:
        export_hf(
            opened,
            to,
            weights=cast(HfWeights, weights),
            dtype=COMPUTE_DTYPES[options.dtype] if options.dtype else None,
            linear_class=cast(LinearClass, options.linear_class or "bitlinear"),
            tokenizer=tokenizer,
        )
    console.line(f"Written: {to}")


def weights_of_16_bits(opened: Exportable) -> HfWeights:
    """The only weights that a 16-bit model has; a ternary one has two kinds, and does not say which are wanted."""
    if opened.quantization is not None:
        raise ConfigError(
            f"--weights: is missing; {opened.source.location} is of a ternary phase. latent are the 16-bit weights "
            "that it trains, dequantized those that it computes with"
        )
    return "latent"


def tokenizer_of(opened: Exportable, options: ExportOptions) -> Path | None:
    """The tokenizer's file; None where it is to be left out."""
    if options.no_tokenizer:
        return None
    file = options.tokenizer or opened.tokenizer
    if file is None:
        raise ConfigError(
            f"{opened.source.location}: its tokenizer was not found; name it with --tokenizer"
            + ("" if options.into == "gguf" else ", or leave it out with --no-tokenizer")
        )
    return file
