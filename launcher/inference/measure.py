"""One rank of `tritrain eval` and `tritrain perplexity`, which measures models together with the others.

`python -m launcher.inference.measure JSON` is what the command starts on every rank; the JSON is an `Evaluation` or a
`TextMeasurement`.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from data.readers import read_documents
from data.survey import survey
from eval.perplexity import text_loss
from eval.rows import Scorer
from eval.score import scores_of
from eval.task_index import THEIRS, split_names
from eval.tasks import NOT_INSTALLED, VERSION, Task, choose_tasks, digest_of, load_rows, task_problems
from launcher.checkpoint.location import check_writable, reaching
from launcher.errors import ConfigError, report_error
from launcher.inference.any_task import Prompting, score_loaded
from launcher.inference.results import add_result, default_results, write_points
from launcher.inference.sharded import Subject, open_measurable, open_subject, subject_of
from launcher.process.console import Console, print_results, without_nan
from launcher.process.exchange import failing_alike
from launcher.process.ranks import Ranks, process_group
from launcher.process.streams import lack_characters
from launcher.run.scores import HARNESS_COLUMNS, TASK_COLUMNS, harness_table_of, read_results, table_of

TIMEOUT_SECONDS = 1800
COLLECTIVE_SECONDS = 7 * 86_400
"""For hours of work that one rank does alone, such as the bootstrap of 40,000 examples; a rank that fails ends all."""

DEFAULT = Prompting()


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
    as_json: bool = False
    prompting: Prompting = DEFAULT


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
    as_json: bool = False


def check_tasks(
    tasks: list[str], task_data: str | None, prompting: Prompting = DEFAULT, option: str = "tasks"
) -> tuple[list[Task], list[str]]:
    """The tasks of these names, Tritrain's own and names of lm-evaluation-harness's.

    Args:
        tasks: names.
        task_data: folder of local copies of their data; None loads these from the hub.
        prompting: how lm-evaluation-harness's are asked; Tritrain's own are asked in one way.
        option: the one that names the tasks.

    Raises:
        ConfigError: no task is named, or an unknown one, data are missing, or nothing can run tasks; lists all.
    """
    problems: list[tuple[str, str]] = []
    ours, theirs = tasks, list[str]()
    try:
        ours, theirs = split_names(tasks)
    except ValueError as error:
        problems.append(("tasks", str(error)))
    else:
        if ours and prompting != DEFAULT:
            problems.append(
                (
                    "tasks",
                    f"{', '.join(ours)}: Tritrain's own tasks have no examples, chat template, system instruction or "
                    f"choice of a first token; {THEIRS}{choose_tasks(ours)[0].name} is lm-evaluation-harness's",
                )
            )
        if ours or not theirs:
            problems += task_problems(ours, task_data)
        elif find_spec("lm_eval") is None:
            problems.append(("tasks", NOT_INSTALLED))
        if task_data is not None and not Path(task_data).is_dir():
            problems.append(("task_data", f"{task_data}: is not a folder"))
    if problems:
        options = {"tasks": option, "task_data": "task-data"}
        raise ConfigError("\n".join(f"--{options[key]}: {problem}" for key, problem in problems))
    return choose_tasks(ours), theirs


def evaluate(asked: Evaluation, ranks: Ranks, console: Console) -> None:
    """Score models on tasks, one after the other, without those already in the results; a collective."""
    tasks, names = check_tasks(asked.tasks, asked.task_data, asked.prompting)
    models = (open_measurable(text, asked.tokenizer) for text in asked.models)
    first = next(models)  # is looked at before data are fetched, which may take minutes
    folder = Path(asked.task_data) if asked.task_data else None
    rows = {task: load_rows(task, folder)[: asked.limit] for task in tasks}
    loaded = None
    if names:
        from eval.harness_tasks import load_tasks

        loaded = load_tasks(names, folder, asked.prompting.num_fewshot)
    answered = []
    for opened, tokenizer in chain([first], models):
        subject = subject_of(opened, tokenizer, ranks)
        out = Path(asked.out) if asked.out else default_results(subject)
        is_part = bool(asked.limit or asked.tokenizer)
        title = f"{subject.location}{f', step {subject.step:,}' if subject.step is not None else ''}"
        if rows:
            records = score_tasks(rows, subject, out, ranks, console, is_part=is_part)
            answered += records
            console.table(title, TASK_COLUMNS, table_of(records))
        if loaded is not None:
            records = score_loaded(loaded, subject, out, console, asked.prompting, asked.limit, is_part=is_part)
            answered += records
            console.table(title, HARNESS_COLUMNS, harness_table_of(records))
        console.line(f"Written: {out}")
    if asked.as_json and ranks.is_first:
        print_results("eval", answered)


def key_of(task: Task, rows: list[dict[str, Any]], subject: Subject) -> dict[str, Any]:
    """Everything that the scores of a task depend on; a result with another key is another result."""
    return {
        "task": task.label,
        "model": subject.identity,
        "examples": digest_of(rows),
        "scoring": VERSION,
        "harness": version("lm_eval"),
        "puts_first_token": subject.puts_first_token,
        **subject.computation,
    }


def score_tasks(
    rows: dict[Task, list[dict[str, Any]]],
    subject: Subject,
    out: Path,
    ranks: Ranks,
    console: Console,
    *,
    is_part: bool = False,
) -> list[dict[str, Any]]:
    """The records of tasks, from the results or measured now; a collective.

    All examples are checked before the model runs. A part of a task makes no points in TensorBoard, where curves would
    mix it with the whole; nor does another tokenizer.

    Args:
        rows: of each task, as `eval.tasks.load_rows` returns them.
        subject: the model.
        out: file of results, which each new record is added to.
        ranks: this rank among all.
        console: where progress is shown.
        is_part: whether the examples are not all, or the tokenizer is not the model's.

    Raises:
        CheckpointError: the results cannot be written.
        DataError: the tokenizer and an example do not fit; or the file holds no results.
        NotFiniteError: a log-likelihood is not finite.
    """
    from eval.harness import Encoding, answer_questions, open_questions

    keys = {task: key_of(task, rows[task], subject) for task in rows}
    earlier = read_results(out)
    records = {task: record for task in rows for record in earlier if keys[task].items() <= record.items()}
    to_do = [task for task in rows if task not in records]
    with failing_alike():
        if to_do and ranks.is_first:
            check_writable(out.absolute().parent)  # before the work of hours, not after it
    questions = {
        task: open_questions(
            task.label,
            rows[task],
            Encoding(
                subject.tokenizer,
                subject.first_token,
                separately=not task.is_harness,
                puts_first_token=subject.puts_first_token,
            ),
            subject.scorer.window_tokens,
        )
        for task in to_do
    }
    for task in to_do:
        num_answers = sum(len(question.rows) for question in questions[task])
        with console.counting(task.label, num_answers, "answers") as advance:
            examples = answer_questions(task.label, questions.pop(task), subject.scorer, advance)
        scores = scores_of(examples, task.definition.metric)
        records[task] = {
            **keys[task],
            "location": subject.location,
            "step": subject.step,
            "metric": task.definition.metric,
            "num_examples": len(rows[task]),
            "scores": {name: without_nan(asdict(score)) for name, score in scores.items()},
        }
        with failing_alike(), reaching(out):
            if ranks.is_first:
                add_result(Path(os.path.realpath(out)), records[task])
                if subject.step is not None and subject.run is not None and not is_part:
                    values = {name: score.value for name, score in scores.items()}
                    write_points(subject.run / "tensorboard" / "evaluation", task.label, values, subject.step)
    return [records[task] for task in rows]


def measure_text(asked: TextMeasurement, ranks: Ranks, console: Console) -> None:
    """Measure a model on files of text; a collective."""
    files = survey(asked.files)
    subject = open_subject(asked.model, ranks, asked.tokenizer)
    longest = subject.scorer.window_tokens
    window = asked.window_tokens or longest
    stride = asked.stride_tokens or window
    if window > longest:
        raise ConfigError(f"--window {window}: must be no longer than the model's {longest} tokens")
    if stride > window:
        raise ConfigError(f"--stride {stride}: must be no longer than the window's {window} tokens")
    scorer = Scorer(**{**vars(subject.scorer), "window_tokens": window})
    total = sum(len(document.text.encode()) for document in read_documents(asked.files, files))
    with console.counting("text", total, "bytes") as advance:
        loss = text_loss(
            scorer,
            subject.tokenizer,
            read_documents(asked.files, files),
            first_token=subject.first_token,
            stride_tokens=stride,
            apart=asked.apart,
            advance=advance,
        )
    if asked.as_json and ranks.is_first:
        about = {"model": subject.identity, "location": subject.location, "step": subject.step, **subject.computation}
        seen = {"window_tokens": window, "stride_tokens": stride, "apart": asked.apart}
        measured = {"bits_per_byte": loss.bits_per_byte, "perplexity": loss.perplexity}
        print_results("perplexity", [without_nan(about | seen | asdict(loss) | measured)])
    changed = (
        f"the tokenizer does not give {loss.num_changed_documents:,} documents back: characters that it loses cost no "
        "bits, so the results are not comparable with those of another tokenizer"
    )
    console.aligned(
        [
            ["model", subject.location],
            ["text", f"{loss.num_documents:,} documents, {loss.num_bytes:,} bytes, {loss.num_tokens:,} tokens"],
            *([["changed", changed]] if loss.num_changed_documents else []),
            ["seen", f"windows of {window:,} tokens, moved by {stride:,}, "
             + ("each document by itself" if asked.apart else "documents as one stream")],
            ["bits per byte", f"{loss.bits_per_byte:.6f}"],
            ["perplexity", f"{loss.perplexity:.4f} per token of this tokenizer"],
        ]
    )  # fmt: skip


def run(asked: Evaluation | TextMeasurement) -> int:
    """Join the other ranks and measure; returns an exit code."""
    with process_group(TIMEOUT_SECONDS, collective_seconds=COLLECTIVE_SECONDS) as ranks:
        console = Console(silent=asked.as_json or not ranks.is_first)
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
        if "tasks" not in asked:
            return run(TextMeasurement(**asked))
        return run(Evaluation(**asked | {"prompting": Prompting(**asked["prompting"])}))
    except Exception as error:
        return report_error(error)


if __name__ == "__main__":
    lack_characters()
    sys.exit(main(sys.argv[1]))
