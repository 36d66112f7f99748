"""Score a model on tasks of lm-evaluation-harness, which renders the prompts and computes the scores.

The model is asked as its own `hf` model would ask an export of it (`eval.harness_model`). Each task is recorded when it
is finished, and the scores of a group are made of those of its tasks.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from math import nan
from numbers import Real
from pathlib import Path
from typing import Any

import xxhash

from data.chat_template import ChatTemplate
from data.errors import DataError
from data.tokenizer_json import tokenizer_files
from data.transformers_files import CHAT_TEMPLATE, has_settings
from eval.sample import generate
from eval.task_index import THEIRS
from eval.tasks import DEFINITIONS, digest_of
from launcher.checkpoint.location import check_writable, reaching, to_location
from launcher.errors import ConfigError
from launcher.formats.hf_source import read_json
from launcher.inference.results import add_result, write_points
from launcher.inference.sharded import Subject, digest_of_files, gathered
from launcher.process.console import Console, without_nan
from launcher.process.exchange import failing_alike
from launcher.run.scores import read_results

VERSION = 3
"""Of the way in which the model is asked; raise it with any change after which the same model and task give other
scores."""
BOOTSTRAP_ITERATIONS = 100_000
"""lm-evaluation-harness's own, for standard errors that have no formula."""


@dataclass(frozen=True)
class Prompting:
    """How tasks of lm-evaluation-harness are asked."""

    num_fewshot: int | None = None
    """Examples in each prompt; None leaves it to each task."""
    chat_template: bool = False
    system_instruction: str | None = None
    add_bos_token: bool | None = None
    """Whether the first token is put in front of each text; None leaves it to the tokenizer."""


def label_of(name: str) -> str:
    """The name that a task of lm-evaluation-harness is reported by: another than that of Tritrain's own tasks."""
    return THEIRS * (name in DEFINITIONS) + name


def score_loaded(
    loaded: Any,
    subject: Subject,
    out: Path,
    console: Console,
    prompting: Prompting,
    limit: int | None,
    *,
    is_part: bool = False,
) -> list[dict[str, Any]]:
    """The records of tasks and groups, from the results or measured now; a collective.

    All prompts are rendered before the model runs.

    Args:
        loaded: of `eval.harness_tasks.load_tasks`.
        subject: the model.
        out: file of results, which each new record is added to.
        console: where progress is shown.
        prompting: how the model is asked.
        limit: the number of examples to use of each task, from its first; None uses all.
        is_part: as for `launcher.inference.measure.score_tasks`.

    Raises:
        CheckpointError: the results cannot be written.
        ConfigError: there is no chat template.
        DataError: an example and the task, or the model, do not fit; or the file holds no results.
        NotFiniteError: a log-likelihood is not finite.
    """
    ranks = subject.ranks
    with opened_model(subject, prompting) as (model, tokenizer_digest):
        about = way_of_asking(subject, prompting, tokenizer_digest, model.end_tokens)
        own = {"definition": digest_of_files(loaded.own_files)}
        keys = {
            name: about
            | {
                "task": label_of(name),
                "examples": build_requests(task, model, prompting, limit),
                "num_fewshot": task.get_config("num_fewshot"),
            }
            | (own if name in loaded.own else {})
            for name, task in loaded.tasks.items()
        }
        earlier = read_results(out)
        records = {name: record for name, key in keys.items() for record in earlier if key.items() <= record.items()}
        with failing_alike():
            if records.keys() < keys.keys() and ranks.is_first:
                check_writable(out.absolute().parent)  # before the work of hours, not after it
        for name, task in loaded.tasks.items():
            if name not in records:
                with console.counting(label_of(name), len(task.instances), "requests") as model.advance:
                    found = answer(task, model, limit, with_errors=ranks.is_first)
                records[name] = keys[name] | record_of(found, task.VERSION, subject)
                keep(records[name], out, subject, is_part=is_part)
    groups = [group for group in loaded.groups.values() if group.has_aggregation]
    for group in groups:
        members = [task.task_name for task in group.get_all_tasks()]
        found = group.aggregate({name: as_found(records[name]) for name in members})
        key = about | {
            "task": label_of(group.name),
            "examples": digest_of([keys[name] for name in members]),
            "tasks": [label_of(name) for name in members],
            "num_fewshot": shots.pop() if len(shots := {keys[name]["num_fewshot"] for name in members}) == 1 else None,
        }
        records[group.name] = key | record_of(found, group.version, subject)
        if not any(key.items() <= record.items() for record in earlier):
            keep(records[group.name], out, subject, is_part=is_part)
    return [*(records[group.name] for group in groups), *(records[name] for name in loaded.tasks)]


def way_of_asking(
    subject: Subject, prompting: Prompting, tokenizer_digest: str, end_tokens: Iterable[int]
) -> dict[str, Any]:
    """What the scores of every task depend on; an earlier result is used again only where all of it is the same."""
    return {
        "model": subject.identity,
        "scoring": VERSION,
        "harness": version("lm_eval"),
        **subject.computation,
        **asdict(prompting),
        "transformers_tokenizer": tokenizer_digest,
        "end_tokens": sorted(end_tokens),
    }


def record_of(found: Mapping[str, Any], task_version: Any, subject: Subject) -> dict[str, Any]:
    """The results of a task or a group, without its key."""
    scores: dict[str, Any] = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            error = found.get(f"{metric}_stderr,{chosen}")
            score = {"value": float(value), "standard_error": float(error) if isinstance(error, Real) else None}
            scores[metric if chosen == "none" else key] = without_nan(score)
    return {
        "location": subject.location,
        "step": subject.step,
        "version": str(task_version),
        "metric": next(iter(scores), ""),
        "num_examples": found["sample_len"],
        "scores": scores,
    }


def as_found(record: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a record as lm-evaluation-harness has them."""
    found: dict[str, Any] = {"sample_len": record["num_examples"]}
    for name, score in record["scores"].items():
        metric, _, chosen = name.partition(",")
        error = score["standard_error"]
        found[f"{metric},{chosen or 'none'}"] = nan if score["value"] is None else score["value"]
        found[f"{metric}_stderr,{chosen or 'none'}"] = "N/A" if error is None else error
    return found


def keep(record: dict[str, Any], out: Path, subject: Subject, *, is_part: bool) -> None:
    """Add a record to the results, and its scores to the run's TensorBoard; a collective."""
    with failing_alike(), reaching(out):
        if subject.ranks.is_first:
            add_result(Path(os.path.realpath(out)), record)
            if subject.step is not None and subject.run is not None and not is_part:
                values = {name: score["value"] for name, score in record["scores"].items()}
                write_points(subject.run / "tensorboard" / "evaluation", curve_of(record), values, subject.step)


def curve_of(record: Mapping[str, Any]) -> str:
    """The name of a task's curves: another for another way of asking."""
    shots = f"-{record['num_fewshot']}-shot" if record["num_fewshot"] else ""
    return f"{record['task']}{shots}{'-chat' * record['chat_template']}"


@contextlib.contextmanager
def opened_model(subject: Subject, prompting: Prompting) -> Iterator[tuple[Any, str]]:
    """The model as lm-evaluation-harness asks it, and a digest of its tokenizer.

    Raises:
        ConfigError: a chat template is asked for, and the tokenizer has none.
        DataError: Transformers cannot have the tokenizer.
    """
    from eval.harness_model import HarnessModel, Writer

    with tokenizer_folder(subject, prompting) as folder:
        tokenizer = transformers_tokenizer(folder)
        ranks = subject.ranks
        ready = partial(gathered, subject)
        writer = Writer(
            partial(generate, subject.model), ready, ranks.rank, ranks.world_size, subject.scorer.reduce_sum
        )
        model = HarnessModel(subject.scorer, writer, tokenizer, end_tokens_of(subject, folder), prompting.add_bos_token)
        if prompting.chat_template and not tokenizer.chat_template:
            raise ConfigError(
                f"--chat-template: the tokenizer of {subject.location} has none, neither in a chat_template.jinja "
                "beside it nor in its tokenizer_config.json; choose a model with one, or leave the option out"
            )
        named = [path for path in folder.iterdir() if "token" in path.name or "template" in path.name]
        yield model, digest_of_files([*named, *folder.glob("vocab*"), *folder.glob("merges*")])


@contextlib.contextmanager
def tokenizer_folder(subject: Subject, prompting: Prompting) -> Iterator[Path]:
    """The folder with the model's tokenizer for Transformers: its own, or the one that an export of it would hold.

    Raises:
        DataError: Transformers would make other tokens than the model's own tokenizer.
    """
    path = subject.tokenizer.path
    if has_settings(path.parent):
        yield path.parent
        return
    written = partial(
        tokenizer_files,
        path,
        vocab_size=subject.model.config.vocab_size,
        max_sequence_length=subject.scorer.window_tokens,
        first_token=subject.first_token,
        puts_first_token=subject.puts_first_token,
    )
    files = None
    if path.with_name(CHAT_TEMPLATE).is_file():
        try:
            # As in an export of a checkpoint; a file of another program may begin chats with a token.
            puts_first_token = subject.puts_first_token and subject.step is None
            files = written(template=ChatTemplate(subject.tokenizer), puts_first_token=puts_first_token)
        except DataError:  # texts can be asked without what Transformers cannot make of chats
            if prompting.chat_template:
                raise
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (files or written()).items():
            Path(folder, name).write_bytes(content)
        yield Path(folder)


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as the `hf` model of lm-evaluation-harness loads it; never with code from the folder.

    Raises:
        DataError: Transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        # Texts may be of any length here: windows are laid over them, without a warning.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, use_fast=True, model_max_length=10**30
        )
    except Exception as error:  # of Transformers and of `tokenizers`, of many kinds
        raise DataError(f"{folder}: Transformers cannot load the tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer has no eos_token; name it in its tokenizer_config.json")
    return tokenizer


def end_tokens_of(subject: Subject, folder: Path) -> list[int]:
    """The tokens after which Transformers stops generating."""
    for place in (to_location(subject.location), folder):
        for name in ("generation_config.json", "config.json"):
            if (place / name).is_file():
                said = read_json(place / name).get("eos_token_id")
                if said is not None:
                    return said if isinstance(said, list) else [said]
    return [subject.tokenizer.end_of_document]


def build_requests(task: Any, model: Any, prompting: Prompting, limit: int | None) -> str:
    """Render the prompts of a task; returns a digest of them, and of all else in the task that scores depend on.

    Raises:
        DataError: an example is not what the task needs.
    """
    from eval.harness_data import quiet
    from eval.harness_tasks import FEWSHOT_SEED

    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        with quiet():
            task.build_all_requests(
                limit=limit,
                system_instruction=prompting.system_instruction,
                apply_chat_template=prompting.chat_template,
                fewshot_as_multiturn=True,
                chat_template=model.apply_chat_template if prompting.chat_template else None,
            )
    except DataError:
        raise
    except Exception as error:  # of templates and of functions of the task
        raise DataError(
            f"{task.task_name}: the prompts cannot be made ({type(error).__name__}: {error}); each example must have "
            "the columns that the task reads"
        ) from error
    config = task.dump_config()
    check_answers(task, config)
    config.pop("metadata", None)  # says where the definition lies
    asked = [[request.arguments, request.doc, request.repeats] for request in task.instances]
    return xxhash.xxh3_128_hexdigest(json.dumps([config, asked], default=name_of, sort_keys=True).encode())


def check_answers(task: Any, config: Mapping[str, Any]) -> None:
    """Refuse right answers that are none of the choices; lm-evaluation-harness would count the examples as wrong.

    Raises:
        DataError: there is one.
    """
    if config.get("output_type") != "multiple_choice" or config.get("process_results") is not None:
        return
    for number, example in {request.doc_id: request.doc for request in task.instances}.items():
        choices = task.doc_to_choice(example)
        right = task.doc_to_text(example) if task.multiple_input else task.doc_to_target(example)
        for each in right if isinstance(right, list) else [right]:
            if each not in (choices if isinstance(each, str) else range(len(choices))):
                raise DataError(
                    f"{task.task_name}: example {number + 1}: its answer {each!r} is none of its choices "
                    f"{choices!r}, nor the number of one, counted from 0"
                )


def name_of(value: Any) -> str:
    """A name for what JSON cannot hold, without its address in memory."""
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def answer(task: Any, model: Any, limit: int | None, *, with_errors: bool) -> dict[str, Any]:
    """The metrics of a task whose requests are built, by lm-evaluation-harness; a collective.

    Returns:
        `METRIC,FILTER` and `METRIC_stderr,FILTER`, and the number of examples as `sample_len`.
    """
    from lm_eval.evaluator import evaluate

    from eval.harness_data import no_code_from_hub, quiet

    task.build_all_requests = lambda **about: None  # they are built
    try:
        with quiet(), no_code_from_hub():
            found = evaluate(
                model,
                {"tasks": {task.task_name: task}},
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS if with_errors else 0,
                log_samples=False,
            )
    finally:
        del task.build_all_requests
    assert found is not None
    return dict(found["results"][task.task_name])
