"""Files and folders that a run reads: which of them are missing or do not fit, before anything is built.

`tritrain plan` shows what is missing. A run refuses to start without it: text that is tokenized for hours is of no use
to a model with a smaller vocabulary, and a teacher that is missing is no surprise for the second day. Only names, sizes
and small manifests are read here; URLs and data sets of a hub are left to the libraries that read them.
"""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data.errors import DataError
from data.prepared import fit_problem, read_manifest
from data.readers import check_input
from data.tokenizer import TRAINED_SPEC, load_tokenizer
from eval.tasks import choose_tasks, missing_files
from launcher.config.sections import Config
from launcher.plan.course import make_course


def check_inputs(config: Config) -> None:
    """Make sure that everything that a run reads exists.

    Raises:
        DataError: lists every problem, each with the key that names the file or folder.
    """
    if problems := missing_inputs(config):
        raise DataError("\n".join(f"{key}: {problem}" for key, problem in problems.items()))


def missing_inputs(config: Config) -> dict[str, str]:
    """List what is missing or does not fit, by key, each with a sentence that says what would be right.

    A run that is complete reads nothing any more.
    """
    state = config.run.path / "state.json"
    if state.is_file() and json.loads(state.read_text()).get("status") == "complete":
        return {}
    return dict([*_sources(config), *_checkpoints(config), *_tasks(config)])


def _sources(config: Config) -> Iterator[tuple[str, str]]:
    first: tuple[str, str] | None = None
    for index, source in enumerate(config.data.sources):
        key = f"data.sources.{index}.path"
        if source.is_remote:
            continue
        if config.data.prepare is not None and not Path(source.path).exists():
            yield from _text(config)
            continue
        try:
            manifest = read_manifest(Path(source.path))
        except DataError as error:
            yield key, str(error)
            continue
        if problem := fit_problem(source.path, manifest, config.data.sequence_length, config.model.vocab_size):
            yield key, problem
        tokenizer = manifest["tokenizer"]
        if not (Path(source.path) / tokenizer["file"]).is_file():
            yield key, f"{source.path}/{tokenizer['file']}: missing; copy the folder again"
        first = first or (source.path, tokenizer["fingerprint"])
        if tokenizer["fingerprint"] != first[1]:
            yield key, f"{source.path}: was prepared with another tokenizer than {first[0]}; prepare it again with that"


def _text(config: Config) -> Iterator[tuple[str, str]]:
    """What the folder of tokens is to be made from."""
    prepare, vocab_size = config.data.prepare, config.model.vocab_size
    assert prepare is not None
    for name in ("inputs", "validation_inputs"):
        for index, text in enumerate(getattr(prepare, name)):
            try:
                check_input(text)
            except DataError as error:
                yield f"data.prepare.{name}.{index}", str(error)
    key = "data.prepare.tokenizer"
    if trained := TRAINED_SPEC.fullmatch(prepare.tokenizer):
        num_tokens = int(trained[2])
    else:
        try:
            num_tokens = load_tokenizer(prepare.tokenizer).vocab_size
        except DataError as error:
            yield key, str(error)
            return
    if num_tokens > vocab_size:
        yield (
            key,
            f"{prepare.tokenizer} has {num_tokens} tokens, the model's vocabulary {vocab_size}; "
            f"set model.vocab_size to {num_tokens} or more",
        )


def _checkpoints(config: Config) -> Iterator[tuple[str, str]]:
    """What the run begins with, and its teachers, as far as it still needs them."""
    named = []
    reached = reached_step(config)
    if config.checkpoint.start_from is not None and reached is None:
        named.append(("checkpoint.start_from", config.checkpoint.start_from))
    for phase in make_course(config).phases:
        if phase.distillation and phase.distillation.teacher is not None and phase.end > (reached or 0):
            named.append((f"phases.{phase.index}.distillation.teacher", phase.distillation.teacher))
    for key, text in named:
        if "://" in text or Path(text).is_dir():
            continue
        there = "is a file, and a checkpoint is a folder" if Path(text).exists() else "no such folder"
        yield key, f"{text}: {there}; name a checkpoint, a run, or a folder of DeepSpeed or Hugging Face"


def reached_step(config: Config) -> int | None:
    """The newest step that the run has a complete checkpoint of; None before its first, and where that is not known."""
    folder = config.checkpoint.folder or str(config.run.path / "checkpoints")
    if "://" in folder:
        return None
    steps = [re.fullmatch(r"step-(\d+)", path.parent.name) for path in Path(folder).glob("step-*/manifest.json")]
    return max((int(step[1]) for step in steps if step), default=None)


def _tasks(config: Config) -> Iterator[tuple[str, str]]:
    evaluation = config.evaluation
    if not evaluation.tasks:
        return
    if find_spec("lm_eval") is None:
        yield "evaluation.tasks", "lm-evaluation-harness is not installed: `pip install -e '.[eval]'` brings it"
    if evaluation.task_data is not None:
        absent = missing_files(choose_tasks(evaluation.tasks), Path(evaluation.task_data))
        if absent:
            yield (
                "evaluation.task_data",
                f"{evaluation.task_data}: lacks {', '.join(absent)}; a mirror has one file TASK_SPLIT.jsonl for "
                "each task. Without evaluation.task_data, data sets come from the Hugging Face hub",
            )
