"""Open a checkpoint for export: its weights, and everything that is needed to write them elsewhere.

A ternary export holds codes and scales. It is right only where the last step computed with exactly these, so a model
that is still on a ramp, or in 16 bits, is refused.
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import TOKENIZERS
from launcher.checkpoint.location import local_copy
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.open import check_sound, config_of, model_of, open_source, precision_of, run_of
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
    """What the last step computed in; 16 bits for a folder of Hugging Face, packed or not."""
    tokenizer: Path | None
    """The tokenizer's file, where it was found."""
    config: Config | None
    """The run's, for a Tritrain checkpoint."""
    run: Path | None
    """The run's folder, where it was found."""

    @property
    def quantization(self) -> QuantConfig | None:
        """The quantization of the last step; None in 16 bits."""
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
    if ternary and not isinstance(source, CheckpointReader):
        raise CheckpointError(
            f"{source.location} is not a Tritrain checkpoint, so its recipe is not known; export it in 16 bits"
        )
    check_sound(source)
    if not isinstance(source, CheckpointReader):
        return Exportable(source, model, Precision.in_16_bits(model.num_layers), tokenizer_of(source), None, None)
    config, precision = config_of(source), precision_of(source)
    if ternary and (precision.quantization is None or precision.strength < 1):
        at = f"{source.location}, after step {source.manifest.step},"
        if precision.quantization is None:
            raise CheckpointError(
                f"{at} is of a 16-bit phase and has no codes; --format hf exports it in 16 bits, and "
                "--format gguf with --type f16 or q8_0"
            )
        raise CheckpointError(
            f"{at} is on a ramp, at strength {precision.strength:.3g}, and did not compute with codes alone yet; "
            "train it to the end of the ramp, or export it in 16 bits with --format hf"
        )
    return Exportable(source, model, precision, tokenizer_of(source), config, run_of(source, config))


def tokenizer_of(source: Source) -> Path | None:
    """The tokenizer's file on this machine: the one in a checkpoint or folder of Hugging Face; None if there is none.

    Checkpoints of version 1 have none. For them it is the one in the run's folder, or in its first folder of data,
    where that was when the run was started.
    """
    if isinstance(source, HuggingFaceSource):
        try:
            return load_tokenizer(Path(source.location)).path
        except DataError:
            return None
    if not isinstance(source, CheckpointReader):
        return None
    for name in TOKENIZERS:
        if name in source.manifest.files:
            return local_copy(source.folder / name)
    config = config_of(source)
    run = run_of(source, config)
    for name in TOKENIZERS:
        if run is not None and (run / name).is_file():
            return run / name
    return tokenizer_of_data(config)
