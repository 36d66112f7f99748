"""Open a checkpoint for export: its weights, and everything that is needed to write them elsewhere.

A ternary export holds codes and scales. It is right only where the model computes with exactly these: of a run, if its
last step did, so a model that is still on a ramp, or in 16 bits, is refused; of a folder of Hugging Face, if its
`quantization_config` makes Transformers do so.
"""

from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import file_in
from data.transformers_files import TOKENIZER_FILES
from launcher.checkpoint.folders import CHAT_TEMPLATE, CONFIG, TOKENIZERS
from launcher.checkpoint.location import local_folder, to_location
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.formats.open import (
    check_sound,
    computed_precision,
    config_of,
    described_model,
    model_of,
    open_source,
    run_of,
)
from launcher.formats.published_source import PublishedSource
from launcher.plan.exports import tokenizer_of_data
from model.transformer import ModelConfig
from quant.config import QuantConfig


@dataclass(frozen=True)
class Exportable:
    """An intact checkpoint, ready to be exported."""

    source: Source
    """Weights by name; learned scales are parameters `NAME.weight_scale`."""
    model: ModelConfig
    precision: Precision
    """What the model computes in: of a run in its last step, of a folder of Hugging Face in Transformers."""
    tokenizer: Path | None
    """The tokenizer's file, where it was found; it may still be none that can be read."""
    config: Config | None
    """The run's, for a Tritrain checkpoint."""
    run: Path | None
    """The run's folder, where it was found."""

    @property
    def quantization(self) -> QuantConfig | None:
        """The quantization that it computes with; None in 16 bits."""
        return self.precision.quantization

    @property
    def strength(self) -> float:
        """The strength of the quantization in the last step, in the block with the least; 0 in 16 bits."""
        return self.precision.strength


def open_exportable(text: str, *, ternary: bool) -> Exportable:
    """Open a checkpoint for export, and verify every byte of it.

    Args:
        text: a Tritrain checkpoint, or a run, of which the newest is taken; or a folder of Hugging Face.
        ternary: whether codes are wanted.

    Raises:
        CheckpointError: it is none of these, or damaged; or codes are wanted, and its last step did not compute with
            codes alone.
    """
    source = open_source(text)
    model = model_of(source)
    if model is None:
        raise CheckpointError(
            f"{source.location} does not describe its model; turn it into a run with `tritrain convert`, and use that"
        )
    check_sound(source)
    reader = source if isinstance(source, CheckpointReader) else None
    precision = computed_precision(source)
    assert precision is not None, "a source that describes its model says what it computes in"
    if ternary and (precision.quantization is None or precision.strength < 1):
        at = f"{source.location}, after step {reader.manifest.step}," if reader else source.location
        if precision.quantization is None:
            raise CheckpointError(
                f"{at} is {'of a 16-bit phase' if reader else 'a 16-bit model'} and has no codes; --format hf exports "
                "it in 16 bits, and --format gguf with --type f16 or q8_0"
            )
        raise CheckpointError(
            f"{at} is on a ramp, at strength {precision.strength:.3g}, and did not compute with codes alone yet; "
            "train it to the end of the ramp, or export it in 16 bits with --format hf"
        )
    config = config_of(reader) if reader else None
    run = run_of(reader, config) if reader and config else None
    return Exportable(source, model, precision, tokenizer_of(source), config, run)


def tokenizer_of(source: Source) -> Path | None:
    """The tokenizer's file on this machine: the one in a checkpoint or folder of Hugging Face; None if there is none.

    It is not opened: whoever needs it learns what is wrong with it, and nobody takes another one in its place.

    Checkpoints of version 1 have none. For them it is the one in the run's folder, or in its first folder of data,
    where that was when the run was started.
    """
    if isinstance(source, PublishedSource):
        return source.tokenizer_file()
    if described_model(source):
        return file_in(local_folder(to_location(source.location), (*TOKENIZER_FILES, "config.json")))
    if not isinstance(source, CheckpointReader):
        return None
    for name in TOKENIZERS:
        if name in source.manifest.files:
            return local_folder(source.folder, (name, CHAT_TEMPLATE, CONFIG)) / name
    config = config_of(source)
    run = run_of(source, config)
    for name in TOKENIZERS:
        if run is not None and (run / name).is_file():
            return run / name
    return tokenizer_of_data(config)
