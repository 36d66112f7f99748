"""What leaves for other programs, opened: a checkpoint's weights, and all that must be known to write them elsewhere.

A ternary export holds codes and scales. It is right only where the last step computed with exactly these, so a model
that is still on a ramp, or in 16 bits, is refused.
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.prepared import read_manifest
from data.tokenizer import load_tokenizer
from launcher.checkpoint.location import is_local
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.formats.open import check_sound, config_of, model_of, open_source
from launcher.plan.course import make_course
from launcher.run.rollbacks import read_rollbacks
from model.transformer import ModelConfig
from quant.config import QuantConfig


@dataclass(frozen=True)
class Exportable:
    """A checkpoint that was found sound, ready to be exported."""

    source: Source
    """Weights by name; learned scales are parameters `NAME.weight_scale`."""
    model: ModelConfig
    quantization: QuantConfig | None
    """That of the phase the model is in; None in 16 bits."""
    strength: float
    """How much of the quantization was on in the last step, in the block with the least; 0 in 16 bits."""
    tokenizer: Path | None
    """The tokenizer's file, where it was found."""
    config: Config | None
    """The run's, for a checkpoint of ours."""
    run: Path | None
    """The run's folder, where it was found."""


def open_exportable(text: str, *, ternary: bool) -> Exportable:
    """Open what is to be exported, and read every byte of it once.

    Args:
        text: a checkpoint of ours, or a run, of which the newest is taken; or a folder of Hugging Face.
        ternary: whether codes are wanted.

    Raises:
        CheckpointError: it is none of these, or damaged; or codes are wanted, and its last step did not compute with
            codes alone.
    """
    source = open_source(text)
    model = model_of(source)
    if model is None:
        raise CheckpointError(
            f"{source.location} does not say what the model is; `tritrain convert` makes a run of it, to be exported"
        )
    if ternary and not isinstance(source, CheckpointReader):
        raise CheckpointError(
            f"{source.location} is no checkpoint of ours, so the recipe of its codes is not known; export it in 16 bits"
        )
    check_sound(source)
    if not isinstance(source, CheckpointReader):
        return Exportable(source, model, None, 0.0, _tokenizer_in(Path(source.location)), None, None)
    config = config_of(source)
    run = run_of(source, config)
    quantization, strength = _quantization_of(source, config, run)
    if ternary and (quantization is None or strength < 1):
        at = f"{source.location}, after step {source.manifest['step']},"
        if quantization is None:
            raise CheckpointError(
                f"{at} is of a 16-bit phase and has no codes; --format hf exports it in 16 bits, and "
                "--format gguf with --type f16 or q8_0"
            )
        raise CheckpointError(
            f"{at} is on a ramp, at strength {strength:.3g}, and did not compute with codes alone yet; train it to the "
            "end of the ramp, or export it in 16 bits with --format hf"
        )
    return Exportable(source, model, quantization, strength, _tokenizer_of(config), config, run)


def run_of(reader: CheckpointReader, config: Config) -> Path | None:
    """The folder of the run that wrote a checkpoint: around it, also where that was moved, or where it was."""
    around = reader.folder.parent.parent if is_local(reader.folder) else config.run.path
    return next((path for path in (around, config.run.path) if (path / "config.yaml").is_file()), None)


def _quantization_of(reader: CheckpointReader, config: Config, run: Path | None) -> tuple[QuantConfig | None, float]:
    """The quantization of the phase that the model is in, and its least strength in the last step."""
    progress = reader.manifest["progress"]
    if progress["phase"] < 0:
        return None, 0.0
    rollbacks = read_rollbacks(run) if run else {}
    attempts = {phase: rollback.attempts for phase, rollback in rollbacks.items()}
    course = make_course(config, attempts)
    quantization = course.phases[progress["phase"]].quantization
    if quantization is None:
        return None, 0.0
    weights, activations = course.strengths_at(progress["step"] - 1)
    return quantization, min(weights if quantization.activations == "none" else weights + activations)


def _tokenizer_of(config: Config) -> Path | None:
    """The tokenizer in a run's first folder of data; None if it is not on this machine's file systems."""
    first = config.data.sources[0]
    if first.is_remote:
        return None
    try:
        path = Path(first.path) / read_manifest(Path(first.path))["tokenizer"]["file"]
    except DataError:
        return None
    return path if path.is_file() else None


def _tokenizer_in(folder: Path) -> Path | None:
    try:
        return load_tokenizer(folder).path
    except DataError:
        return None
