"""One rank of `tritrain eval` and `tritrain perplexity`, which measures models together with the others.

`python -m launcher.inference.measure JSON` is what the command starts on every rank; the JSON is an `Evaluation` or a
`TextMeasurement`.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.readers import read_documents
from eval.perplexity import text_loss
from eval.rows import Scorer
from eval.score import Score, scores_of
from eval.tasks import Task, choose_tasks, digest_of, load_rows, missing_files
from launcher.checkpoint.location import check_writable, is_local, to_location
from launcher.errors import ConfigError, report_error
from launcher.inference.sharded import Subject, open_subject
from launcher.process.console import Console
from launcher.process.ranks import Ranks, process_group
from launcher.run.folder import replace_file
from launcher.run.scores import RESULTS, TASK_COLUMNS, read_results, table_of

TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Evaluation:
    """The options of `tritrain eval`."""

    models: list[str]
    """Checkpoints or folders of Hugging Face."""
    tasks: list[str]
    task_data: str | None
    limit: int | None
    """The number of examples to use of each task, from its first; None uses all."""
    out: str | None
    tokenizer: str | None


@dataclass(frozen=True)
class TextMeasurement:
    """The options of `tritrain perplexity`."""

    model: str
    files: list[str]
    window_tokens: int | None
    """None takes the model's longest sequence."""
    stride_tokens: int | None
    """None takes the window."""
    apart: bool
    tokenizer: str | None


def check_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("lm-evaluation-harness is not installed: `pip install -e '.[eval]'` brings it") from error


def check_tasks(tasks: list[str], task_data: str | None) -> list[Task]:
    """The tasks of these names; their local data are checked.

    Raises:
        ConfigError: no task is named, or an unknown one, or nothing can run tasks.
        DataError: data that should be in ``task_data`` are not; lists all.
    """
    check_harness()
    if not tasks:
        raise ConfigError("--tasks: names no task; choose paper11, or single tasks such as piqa")
    try:
        chosen = choose_tasks(tasks)
    except ValueError as error:
        raise ConfigError(f"tasks: {error}") from error
    if task_data is not None and (absent := missing_files(chosen, Path(task_data))):
        raise DataError(
            f"{task_data}: lacks {', '.join(absent)}; a mirror has one file TASK_SPLIT.jsonl for each task. "
            "Without --task-data, data sets come from the Hugging Face hub"
        )
    return chosen


def evaluate(asked: Evaluation, ranks: Ranks, console: Console) -> None:
    """Score models on tasks, one after the other, without those already in the results; a collective."""
    tasks = check_tasks(asked.tasks, asked.task_data)
    folder = Path(asked.task_data) if asked.task_data else None
    rows = {task: load_rows(task, folder)[: asked.limit] for task in tasks}
    for text in asked.models:
        subject = open_subject(text, ranks, asked.tokenizer)
        out = Path(asked.out) if asked.out else default_results(subject)
        is_part = asked.limit is not None
        records = [answer(task, rows[task], subject, out, ranks, console, is_part=is_part) for task in tasks]
        console.table(
            f"{subject.location}{f', step {subject.step:,}' if subject.step is not None else ''}",
            TASK_COLUMNS,
            table_of(records),
        )
        console.line(f"Written: {out}")


def answer(
    task: Task,
    rows: list[dict[str, Any]],
    subject: Subject,
    out: Path,
    ranks: Ranks,
    console: Console,
    *,
    is_part: bool = False,
) -> dict[str, Any]:
    """The record of one task, from the results or measured now; a collective.

    A part of a task makes no points in TensorBoard, where curves would mix it with the whole.
    """
    from eval.harness import answer_rows

    key = {"task": task.label, "model": subject.identity, "examples": digest_of(rows)}
    for record in read_results(out):
        if key.items() <= record.items():
            return record
    if ranks.is_first:
        check_writable(out.absolute().parent)  # before the work of hours, not after it
    num_answers = sum(len(row.get("contexts") or row["choices"]) for row in rows)
    with console.counting(task.label, num_answers, "answers") as advance:
        examples = answer_rows(
            task.label, rows, subject.scorer, subject.tokenizer, separately=not task.is_harness, advance=advance
        )
    scores = scores_of(examples, task.definition.metric)
    record = {
        **key,
        "location": subject.location,
        "step": subject.step,
        "metric": task.definition.metric,
        "num_examples": len(rows),
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    if ranks.is_first:
        replace_file(out, json.dumps({"results": [*read_results(out), record]}, indent=2))
        if subject.step is not None and subject.run is not None and not is_part:
            write_points(subject.run / "tensorboard" / "evaluation", task, scores, subject.step)
    return record


def default_results(subject: Subject) -> Path:
    """The default file of results: in the run's folder, or beside an export's.

    Raises:
        ConfigError: the model is in a store of objects, and its run is not here.
    """
    if subject.run is not None:
        return subject.run / RESULTS
    location = to_location(subject.location)
    if not is_local(location):
        raise ConfigError(f"--out: is missing; the run of {location} was not found, so name a file for the results")
    return location.with_name(f"{location.name}.{RESULTS}")


def write_points(folder: Path, task: Task, scores: dict[str, Score], step: int) -> None:
    """Write scores beside a run's TensorBoard, as a curve of their own, at the step of the checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, score in scores.items():
            writer.add_scalar(f"eval/{task.label}/{name}", score.value, step)


def measure_text(asked: TextMeasurement, ranks: Ranks, console: Console) -> None:
    """Measure a model on files of text; a collective."""
    subject = open_subject(asked.model, ranks, asked.tokenizer)
    longest = subject.scorer.window_tokens
    window = asked.window_tokens or longest
    stride = asked.stride_tokens or window
    if not 0 < stride <= window <= longest:
        raise ConfigError(
            f"--stride {stride}, --window {window}: a stride must be no longer than the window, and that no longer "
            f"than the model's {longest} tokens"
        )
    scorer = Scorer(**{**vars(subject.scorer), "window_tokens": window})
    total = sum(len(document.text.encode()) for document in read_documents(asked.files))
    texts = (document.text for document in read_documents(asked.files))
    if not total:
        raise DataError(f"{', '.join(asked.files)}: holds no text")
    with console.counting("text", total, "bytes") as advance:
        loss = text_loss(scorer, subject.tokenizer, texts, stride_tokens=stride, apart=asked.apart, advance=advance)
    console.aligned(
        [
            ["model", subject.location],
            ["text", f"{loss.num_documents:,} documents, {loss.num_bytes:,} bytes, {loss.num_tokens:,} tokens"],
            ["seen", f"windows of {window:,} tokens, moved by {stride:,}, "
             + ("each document by itself" if asked.apart else "documents as one stream")],
            ["bits per byte", f"{loss.bits_per_byte:.6f}"],
            ["perplexity", f"{loss.perplexity:.4f} per token of this tokenizer"],
        ]
    )  # fmt: skip


def run(asked: Evaluation | TextMeasurement) -> int:
    """Join the other ranks and measure; returns an exit code."""
    with process_group(TIMEOUT_SECONDS) as ranks:
        console = Console(silent=not ranks.is_first)
        try:
            if isinstance(asked, Evaluation):
                evaluate(asked, ranks, console)
            else:
                measure_text(asked, ranks, console)
            return 0
        except Exception as error:
            code = report_error(error, ranks.rank if ranks.world_size > 1 else None)
            if ranks.world_size > 1:
                os._exit(code)  # the process group cannot be left in order: the others may be anywhere
            return code


def main(text: str) -> int:
    """Measure what the JSON asks for; returns an exit code."""
    asked = json.loads(text)
    try:
        return run(Evaluation(**asked) if "tasks" in asked else TextMeasurement(**asked))
    except Exception as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
