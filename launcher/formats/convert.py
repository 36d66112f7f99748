"""Convert checkpoints between phases, engines and formats: offline, and tensor by tensor.

A conversion into a run makes what the run itself would have at the transition: the checkpoint before it. The transition
then happens when the run starts, by the same code as inside a run, so that both continue with the same bits. That is
why converting one of our own checkpoints costs nothing: its files are immutable, and the new checkpoint links to them.
"""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from pathlib import Path

import torch

from data.chat_template import self_contained
from data.tokenizer import load_tokenizer
from launcher.checkpoint.averaged import AveragedReader
from launcher.checkpoint.folders import complete_checkpoints, folder_of
from launcher.checkpoint.location import reaching
from launcher.checkpoint.manifest import FileRecord, Manifest, precision_at
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import KINDS, Source, in_pieces, start_checking
from launcher.checkpoint.writer import CheckpointWriter, range_of
from launcher.config.averaging import AVERAGED
from launcher.config.sections import Config
from launcher.engine.contract import MOMENTS
from launcher.errors import ConfigError
from launcher.formats.choices import Dtype
from launcher.formats.open import check_model, computed_precision, model_of
from launcher.formats.opened import tokenizer_of
from launcher.formats.provenance import provenance
from launcher.formats.start import check_start, first_progress
from launcher.plan.course import Course, check_whole, make_course
from launcher.plan.exports import tokenizer_of_data
from launcher.run.folder import RunFolder
from model.hf import config_to_hf
from model.transformer import ModelConfig, Transformer
from quant.linear import is_learned_scale, matching_layers

Contents = Callable[[Course, RunFolder, Source, CheckpointWriter], tuple[dict[str, FileRecord], Manifest]]
"""Writes the tensors of a converted checkpoint; returns the files' records and the manifest."""


def starting_phase(config: Config, source: Source) -> int:
    """The phase that begins at the step of a Tritrain checkpoint; the first if none does."""
    course = make_course(config)
    if isinstance(source, CheckpointReader):
        at = (source.manifest.step, source.manifest.tokens)
        for phase in course.phases[1:]:
            if at == (phase.start, course.tokens_before(phase.start)):
                return phase.index
    return 0


def begins_anew(config: Config, source: Source) -> list[str]:
    """A sentence if a Tritrain checkpoint has steps that the run does not continue."""
    if config.checkpoint.start_phase or not isinstance(source, CheckpointReader) or not source.manifest.step:
        return []
    starts = ", ".join(str(phase.start) for phase in make_course(config).phases)
    return [
        f"The checkpoint is at step {source.manifest.step}, and the phases begin at {starts}. The run "
        "begins with the first of them: steps, schedule and data start over."
    ]


def check_begins_calibrated(config: Config) -> None:
    """Check that a run can begin with the weights after the transition into its first phase, which were calibrated.

    Raises:
        ConfigError: the phase needs the weights before the transition.
    """
    phase = make_course(config).phases[config.checkpoint.start_phase]
    if phase.preference is not None:
        raise ConfigError(
            f"phases.{phase.index}.objective: is dpo, which compares with the model that the phase begins with; a run "
            "that begins calibrated does not hold it"
        )
    if phase.distillation is not None and phase.distillation.teacher is None:
        raise ConfigError(
            f"phases.{phase.index}.distillation.teacher: is missing; a run that begins calibrated does not hold the "
            "16-bit weights, so name the teacher"
        )


def first_token_note(source: Source) -> list[str]:
    """A sentence if texts of the source begin with a token of their own, which no run puts there."""
    if source.first_token is None:
        return []
    return [
        f"The token that texts begin with, {source.first_token}, is not carried: in the run and its exports, texts "
        "come after the end of a document, and chats are as the template writes them."
    ]


def preview(config: Config, source: Source) -> list[list[str]]:
    """For each tensor, what a conversion into this run will do: name, shape, weight, moments.

    Raises:
        ConfigError, CheckpointError, DataError: as `convert_to_run`.
    """
    course = course_of_conversion(config, source)
    if tokenizer := tokenizer_for(config, source):
        load_tokenizer(tokenizer)
    phase = course.phases[config.checkpoint.start_phase]
    quantization = phase.quantization
    with torch.device("meta"):
        model = Transformer(config.model)
    ternary = {f"{name}.weight" for name in matching_layers(model, quantization)} if quantization else set()
    as_ternary = f"latent of {quantization.levels} codes, {quantization.weights}" if quantization else ""
    moments = {
        "keep": "both kept",
        "keep-variance": "first cleared, second kept",
        "reset": "cleared",
        "rescale": "rescaled",
    }
    return [
        [
            name,
            " x ".join(map(str, shape)),
            as_ternary if name in ternary else "16-bit",
            moments[phase.transition.optimizer],
        ]
        for name, shape in source.shapes.items()
    ]


def course_of_conversion(config: Config, source: Source) -> Course:
    """The course of the run that is made; raises what `convert_to_run` does before it writes."""
    course, folder = make_course(config), RunFolder(config)
    check_whole(course)
    with reaching(folder.checkpoints):
        if complete_checkpoints(folder.checkpoints):
            raise ConfigError(f"{folder.checkpoints}: already holds checkpoints; convert to another folder")
    folder.check_new()
    folder.check_configuration()
    check_start(source, course)
    return course


def tokenizer_for(config: Config, source: Source) -> Path | None:
    """The tokenizer that a run is given which begins with a source; None if there is none."""
    own, of_data = tokenizer_of(source), tokenizer_of_data(config)
    return (of_data or own) if source.grown else (own or of_data)


def unchanged(
    course: Course, folder: RunFolder, source: Source, writer: CheckpointWriter
) -> tuple[dict[str, FileRecord], Manifest]:
    """The `Contents` that are the source's; the transition is left to the run."""
    is_stored = not (isinstance(source, AveragedReader) or source.constants or source.grown)
    if isinstance(source, CheckpointReader) and is_stored:
        files = {n: record for n, record in source.manifest.files.items() if n.endswith(".safetensors")}
        for name in files:
            writer.link(source.folder / name)
    else:
        files = write_streamed(writer, source)
    return files, manifest_of_conversion(course, source)


def convert_to_run(config: Config, source: Source, contents: Contents = unchanged) -> Path:
    """Make the folder of a run that begins with a checkpoint, ready to be trained.

    Args:
        config: of the run, with ``checkpoint.start_from`` and ``start_phase``.
        source: that checkpoint, opened.
        contents: of the new checkpoint.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: the folder holds a run already.
        CheckpointError: the source does not fit, or a file cannot be read or written.
        DataError: the tokenizer of the source cannot be read.
    """
    course, folder = course_of_conversion(config, source), RunFolder(config)
    tokenizer = tokenizer_for(config, source)
    with self_contained(tokenizer) if tokenizer else nullcontext() as copy:  # other files may name the end of documents
        return _write_run(course, folder, source, copy, contents)


def _write_run(course: Course, folder: RunFolder, source: Source, tokenizer: Path | None, contents: Contents) -> Path:
    try:
        with reaching(folder.path):
            folder.claim()
        return _write_claimed(course, folder, source, tokenizer, contents)
    except BaseException:
        if folder.is_of_first_start():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _write_claimed(
    course: Course, folder: RunFolder, source: Source, tokenizer: Path | None, contents: Contents
) -> Path:
    course_of_conversion(course.config, source)  # another process may have converted into it meanwhile
    folder.prepare([phase.end - phase.start for phase in course.phases])
    at = first_progress(course)
    writer = CheckpointWriter(folder_of(folder.checkpoints, at.step))
    with reaching(writer.final):
        writer.begin()
        try:
            files, manifest = contents(course, folder, source, writer)
            writer.finish(files, folder.config_text, tokenizer, manifest)
        except BaseException:
            writer.abandon()
            raise
    folder.write_state("converted", source=source.location)
    return writer.final


def manifest_of_conversion(course: Course, source: Source) -> Manifest:
    """The manifest of a converted checkpoint: its place in the run, and the precision of its source.

    If the source does not say its precision, it follows from the phases before, which count as done. So it does for
    weights that are read from packed codes.
    """
    at = first_progress(course)
    precision = computed_precision(source)
    is_ternary = precision is not None and precision.quantization is not None
    if precision is None or source.is_packed or not (is_ternary or isinstance(source, CheckpointReader)):
        precision = precision_at(course, at)
    return Manifest(
        milestone=True,
        has_moments=source.has_moments,
        step=at.step,
        tokens=course.tokens_before(at.step),
        progress=at,
        precision=precision,
        data_fingerprint=carried_fingerprint(course, source),
        spikes=None,
        teacher=None,
        world_size=None,
        engine=None,
        zero_stage=None,
        provenance=provenance(source, course),
        averaged_tokens=source.averaged_tokens,
    )


def write_streamed(writer: CheckpointWriter, source: Source) -> dict[str, FileRecord]:
    """Write all of a source into one file, a piece of a tensor at a time; returns its record."""
    stored = [(kind, name) for name in source.shapes for kind in source.kinds(name)]
    entries = [(f"{kind}/{name}", torch.float32, (prod(source.shapes[name]),)) for kind, name in stored]
    values = (in_pieces(source, kind, name) for kind, name in stored)
    ranges = {
        name: range_of(shape, 0, source.read_step(name) if source.has_moments else 0.0, source.kinds(name))
        for name, shape in source.shapes.items()
    }
    start_checking(source, KINDS if source.has_moments else KINDS[:1])
    return writer.write_tensors("rank-00000.safetensors", entries, values, ranges)


def carried_fingerprint(course: Course, source: Source) -> str | None:
    """The fingerprint of the data that the run must continue with; None if it starts its data over."""
    phase = course.phases[course.config.checkpoint.start_phase]
    if phase.index and phase.transition.data == "continue" and isinstance(source, CheckpointReader):
        return source.manifest.data_fingerprint
    return None


def check_hf(
    source: Source, config: Config | None, folder: Path, dtype: Dtype
) -> tuple[ModelConfig, dict[str, object] | None]:
    """Check that a Hugging Face folder with 16-bit weights can be made of a source.

    Of a ternary model these are the latent weights, with a `quantization_config` that makes Transformers round them
    while it computes (mode `online`), so that the folder computes what its source does.

    Args:
        source: what is converted.
        config: whose model it is; None if the source says so itself: a Tritrain checkpoint, a Hugging Face folder.
        folder: what is to be made.
        dtype: of the weights.

    Returns:
        The model, and the `quantization_config`, None in 16 bits.

    Raises:
        CheckpointError: the source is of another model, or Transformers does not compute what it does.
        ConfigError: the configuration is needed and not there.
    """
    from launcher.formats.hf_export import online_quantization
    from launcher.formats.hf_source import naming

    model = config.model if config else model_of(source)
    if model is None:
        raise ConfigError(f"{source.location}: does not describe its model; name a configuration with --config")
    check_model(source, model)
    with naming(folder):
        config_to_hf(model)
    quantization = online_quantization(source, model)
    if quantization is not None and dtype != "bf16":
        raise ConfigError(
            f"--dtype: {source.location} is ternary, and Transformers would round latent weights in fp32 to other "
            "codes than training does, which takes them in bf16; leave it out"
        )
    return model, quantization


def not_carried(source: Source, into: str) -> list[str]:
    """One sentence for each thing that is lost because the other format does not carry it."""
    sentences = []
    if into == "universal" and (precision := computed_precision(source)) and precision.quantization:
        sentences.append("The quantization is not carried: DeepSpeed computes with the weights as they are.")
    if source.has_moments and into == "hf":
        sentences.append(
            f"Adam's moments ({', '.join(MOMENTS)}) and steps are not carried: the format has no place for them."
        )
    if source.averaged_tokens:
        sentences.append(f"The averaged weights are not carried; convert {source.location}{AVERAGED} to have them.")
    if into == "hf" and any(map(is_learned_scale, source.shapes)):
        sentences.append("Learned scales are not carried: the format has latent weights alone.")
    if isinstance(source, CheckpointReader):
        sentences.append("The data position, the counters and the generators' states are not carried.")
    return sentences
