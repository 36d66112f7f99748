"""Files and folders that a run reads: which of them are missing or do not fit, before anything is built.

Only names, sizes and small manifests are read here; URLs and data sets of a hub are left to the libraries that read
them. What is in checkpoints is looked at by `launcher.inference.inputs`, which `tritrain plan` and a start ask.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.added_tokens import num_new
from data.config import PrepareConfig
from data.errors import DataError
from data.hub_tokenizer import is_on_hub
from data.messages import looked_for_in
from data.mixture import rows_per_epoch
from data.prepared import (
    TRAIN,
    VALIDATION,
    content_of,
    fit_problems,
    is_compressed,
    is_yet_to_be_prepared,
    no_held_out_text,
    read_manifest,
    unlike_problem,
)
from data.survey import check_input, is_path
from data.tokenizer import TRAINED_SPEC, load_tokenizer
from eval.tasks import task_problems
from launcher.config.averaging import without_averaged
from launcher.config.mixtures import named_sources
from launcher.config.sections import Config
from launcher.plan.course import Phase, make_course
from launcher.plan.objectives import objective_problem


def missing_inputs(config: Config) -> list[tuple[str, str]]:
    """List what is missing or does not fit: pairs of a key and a sentence that says what would be right."""
    return [
        *_source_problems(config),
        *_text_problems(config),
        *_checkpoint_problems(config),
        *_task_problems(config),
        *_tracker_problems(config),
    ]


def needed_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Yield each local file and folder that the run still reads, after the key that names it."""
    yield from _sources(config)
    yield from ((key, text) for key, text in _texts(config) if is_path(text))
    yield from _tokenizers(config)
    yield from _checkpoints(config)
    if config.evaluation.task_data is not None:
        yield "evaluation.task_data", config.evaluation.task_data


def _sources(config: Config) -> Iterator[tuple[str, str]]:
    """Local folders of tokens, each once; not the one that the run makes itself."""
    seen = {source.path for source in config.data.sources} if _to_prepare(config) else set()
    for key, source in named_sources(config.data, config.phases):
        if not source.is_remote and source.path not in seen:
            seen.add(source.path)
            yield f"{key}.path", source.path


def _to_prepare(config: Config) -> PrepareConfig | None:
    """How the only folder of tokens is to be made; None if it is there, or not for the run to make."""
    return config.data.prepare if is_yet_to_be_prepared(Path(config.data.sources[0].path)) else None


def _source_problems(config: Config) -> Iterator[tuple[str, str]]:
    manifests: dict[str, dict[str, Any]] = {}
    course = make_course(config)
    for key, path in _sources(config):
        try:
            manifest = read_manifest(Path(path))
            if config.data.cache is None and is_compressed(Path(path), manifest):
                yield "data.cache", f"is needed for {path}, whose shards are compressed; name a folder on each node"
        except DataError as error:
            yield key, str(error)
            continue
        manifests[path] = manifest
        for phase in course.phases:
            if path in [source.path for source in phase.sources] and (
                problem := objective_problem(phase, content_of(manifest))
            ):
                yield key, problem
                break
        for problem in fit_problems(path, manifest, config.data.sequence_length, config.model.vocab_size):
            yield key, problem
        tokenizer = Path(path) / manifest["tokenizer"]["file"]
        if not tokenizer.is_file():
            yield key, f"{tokenizer}: missing; copy the folder again"
        first, of_first = next(iter(manifests.items()))
        if unlike := unlike_problem(path, manifest, first, of_first, Path(first) / of_first["tokenizer"]["file"]):
            yield key, unlike
    yield from _mixture_problems(config, {path: each["splits"][TRAIN]["rows"] for path, each in manifests.items()})
    yield from _held_out_problems(config, manifests)


def _mixture_problems(config: Config, rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Mixtures whose epoch has no batch, or nothing of a source; of those whose rows are known, by path."""
    course = make_course(config)
    multiple = math.lcm(course.batch.unit, config.data.canonical_nodes)
    for phase in {phase.sources: phase for phase in reversed(course.phases)}.values():  # each where it is used first
        if all(source.path in rows for source in phase.sources):
            try:
                rows_per_epoch(
                    [rows[source.path] for source in phase.sources],
                    [source.weight for source in phase.sources],
                    multiple,
                )
            except DataError as error:
                is_own = config.phases[phase.index].sources is not None
                yield f"phases.{phase.index}.sources" if is_own else "data.sources", str(error)


def _held_out_problems(config: Config, manifests: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Held-out rows that are asked for and not there, or not to be made; nothing if a source is not known here."""
    if not config.data.validation_rows:
        return
    course, prepare = make_course(config), _to_prepare(config)
    measured = {course.held_out_of(phase).sources: phase for phase in reversed(course.phases)}
    for sources, phase in reversed(measured.items()):  # each where it is measured first
        paths = [source.path for source in sources]
        is_own = sources == config.phases[phase.index].sources
        if prepare and sources == config.data.sources:
            if not prepare.holds_text_out:
                yield (
                    "data.prepare",
                    f"holds no text out, but data.validation_rows is {config.data.validation_rows}; set "
                    "validation_fraction or validation_inputs, or data.validation_rows to 0",
                )
        elif all(path in manifests and VALIDATION not in manifests[path]["splits"] for path in paths):
            yield f"phases.{phase.index}.sources" if is_own else "data.validation_rows", no_held_out_text(paths)


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    """Inputs that the folder of tokens is to be made from."""
    if prepare := _to_prepare(config):
        for name in ("inputs", "validation_inputs", "decontaminate"):
            for index, text in enumerate(getattr(prepare, name)):
                yield f"data.prepare.{name}.{index}", text


def _tokenizers(config: Config) -> Iterator[tuple[str, str]]:
    """The file of the tokenizer for these inputs, if there is one."""
    prepare = _to_prepare(config)
    if prepare is not None and not TRAINED_SPEC.fullmatch(prepare.tokenizer) and not is_on_hub(prepare.tokenizer):
        yield "data.prepare.tokenizer", prepare.tokenizer


def _text_problems(config: Config) -> Iterator[tuple[str, str]]:
    for key, text in _texts(config):
        try:
            check_input(text)
        except DataError as error:
            yield key, str(error)
    prepare, vocab_size = _to_prepare(config), config.model.vocab_size
    if prepare is None:
        return
    key = "data.prepare.tokenizer"
    if trained := TRAINED_SPEC.fullmatch(prepare.tokenizer):
        num_tokens = int(trained[2]) + len(prepare.add_tokens)
    else:
        try:
            tokenizer = load_tokenizer(prepare.tokenizer, prepare.end_of_document)
            num_tokens = tokenizer.vocab_size + num_new(tokenizer, prepare.add_tokens)
        except DataError as error:
            yield key, str(error)
            return
    if num_tokens > vocab_size:
        yield (
            key,
            f"{prepare.tokenizer} has {num_tokens} tokens, the model's vocabulary {vocab_size}; "
            f"set model.vocab_size to {num_tokens} or more",
        )


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint that a configuration names, and what the run still needs it for."""

    key: str
    text: str
    is_begun_with: bool = False
    """Whether the run begins with its weights."""
    teaches: Phase | None = None
    """The phase whose teacher, or reference, it is."""

    @property
    def path(self) -> str | None:
        """The local folder of it; None of a URL."""
        if "://" in self.text:
            return None
        return self.text if Path(self.text).exists() else without_averaged(self.text)


def named_checkpoints(config: Config) -> Iterator[NamedCheckpoint]:
    """Yield the checkpoint that the run begins with, and its teachers, as far as it still needs them."""
    saved, phases, checkpoint = _saved_steps(config), make_course(config).phases, config.checkpoint
    to_do = [phase for phase in phases if phase.end > max(saved, default=0)]
    if checkpoint.start_from is not None:
        first = phases[checkpoint.start_phase]
        is_teacher = first.has_second_model and (first.distillation is None or first.distillation.teacher is None)
        # A run that `tritrain convert` has made holds what it begins with.
        teaches = first if is_teacher and first in to_do and first.start not in saved else None
        if not saved or teaches:
            yield NamedCheckpoint("checkpoint.start_from", checkpoint.start_from, not saved, teaches)
    for phase in to_do:
        if phase.distillation and phase.distillation.teacher is not None:
            key = f"phases.{phase.index}.distillation.teacher"
            yield NamedCheckpoint(key, phase.distillation.teacher, teaches=phase)


def _checkpoints(config: Config) -> Iterator[tuple[str, str]]:
    """Local folders of checkpoints that the run still needs."""
    yield from ((named.key, named.path) for named in named_checkpoints(config) if named.path is not None)


def _checkpoint_problems(config: Config) -> Iterator[tuple[str, str]]:
    for key, path in _checkpoints(config):
        if not Path(path).is_dir():
            there = (
                "is a file, and a checkpoint is a folder"
                if Path(path).exists()
                else f"no such folder{looked_for_in(path)}"
            )
            yield key, f"{path}: {there}; name a checkpoint, a run, or a folder of DeepSpeed or Hugging Face"


def _saved_steps(config: Config) -> set[int]:
    """Steps after which the run has a complete checkpoint; empty also where that is not known, as in a remote store."""
    if "://" in config.checkpoints:
        return set()
    names = [path.parent.name for path in Path(config.checkpoints).glob("step-*/manifest.json")]
    return {int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8}", name)}


def _task_problems(config: Config) -> Iterator[tuple[str, str]]:
    tasks = config.evaluation
    if tasks.tasks:
        yield from ((f"evaluation.{key}", problem) for key, problem in task_problems(tasks.tasks, tasks.task_data))


def _tracker_problems(config: Config) -> Iterator[tuple[str, str]]:
    for index, name in enumerate(config.logging.trackers):
        if find_spec(name) is None:
            yield (
                f"logging.trackers.{index}",
                f"is {name}, which is not installed: `pip install -e '.[{name}]'` brings it",
            )
