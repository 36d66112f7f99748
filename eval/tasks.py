"""The eleven zero-shot tasks of OLMo's in-loop evaluation, in two styles of prompt.

`paper11` asks as OLMo does (allenai/OLMo, olmo/eval/downstream.py, the tasks that configs/official-0724/OLMo-1B.yaml
turns on): on the validation split, with contexts and continuations tokenized apart. `paper11-harness` asks as
lm-evaluation-harness does, whose tasks of the same names are taken: on the test split where there is one, and with the
continuation's tokens as they are after the context. One task of a group has its name: `piqa`, `piqa-harness`.

Data come from JSON lines that mirror lm-evaluation-harness, one example a line: `query`, `choices` and `gold` (or
`contexts`, `continuation` and `gold`, for Winogrande), and in `fields` the columns of the data set. Or its own task
loads them from the hub and renders the same. OLMo's prompts are made of either.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.pointers import pointer_problem
from eval.score import POSITIVE

GROUP = "paper11"
NOT_INSTALLED = "lm-evaluation-harness is not installed: `pip install -e '.[eval]'` brings it"
HARNESS = "-harness"
VERSION = 3
"""Of the prompts and of the scores; a finished task's result is of use as long as it stays. Raise it with any change
after which the same model and data give other scores."""


@dataclass(frozen=True)
class Definition:
    """A task, independent of its style of prompt."""

    metric: str
    """`acc`, `acc_norm` (length-normalized) or `f1`."""
    yaml: str
    """lm-evaluation-harness's own definition, below its folder of tasks."""
    harness_split: str = "validation"
    """The split that lm-evaluation-harness asks for; OLMo's is always `validation`."""


DEFINITIONS = {
    "piqa": Definition("acc_norm", "piqa/piqa.yaml"),
    "hellaswag": Definition("acc_norm", "hellaswag/hellaswag.yaml"),
    "winogrande": Definition("acc", "winogrande/default.yaml"),
    "openbookqa": Definition("acc_norm", "openbookqa/openbookqa.yaml", "test"),
    "sciq": Definition("acc", "sciq/sciq.yaml", "test"),
    "arc_easy": Definition("acc", "arc/arc_easy.yaml", "test"),
    "copa": Definition("acc", "super_glue/copa/default.yaml"),
    "rte": Definition("acc_norm", "glue/rte/default.yaml"),
    "cb": Definition("acc", "super_glue/cb/default.yaml"),
    "mrpc": Definition("f1", "glue/mrpc/default.yaml"),
    "sst2": Definition("acc", "glue/sst2/default.yaml"),
}


@dataclass(frozen=True)
class Task:
    """A task in one style."""

    name: str
    """Of the task alone, such as `piqa`."""
    is_harness: bool
    """Whether prompts and tokens are lm-evaluation-harness's, or else OLMo's."""

    @property
    def label(self) -> str:
        """The name by which it is asked for and reported."""
        return self.name + HARNESS * self.is_harness

    @property
    def definition(self) -> Definition:
        """Properties common to both styles."""
        return DEFINITIONS[self.name]

    @property
    def split(self) -> str:
        """The split that is asked for."""
        return self.definition.harness_split if self.is_harness else "validation"


def choose_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, groups among them, each once and in the order in which it was named first.

    Raises:
        ValueError: a name is unknown; says which is nearest.
    """
    chosen: dict[str, Task] = {}
    labels = [name + style for style in ("", HARNESS) for name in (GROUP, *DEFINITIONS)]
    for label in names:
        if label not in labels:
            near = get_close_matches(label, labels, n=1, cutoff=0.0)[0]
            there = ", ".join(labels[: len(labels) // 2])
            raise ValueError(f"task {label!r} is not known; did you mean {near}? choose {there}, and with {HARNESS}")
        name = label.removesuffix(HARNESS)
        for member in DEFINITIONS if name == GROUP else [name]:
            task = Task(member, label.endswith(HARNESS))
            chosen.setdefault(task.label, task)
    return list(chosen.values())


def load_rows(task: Task, task_data: Path | None) -> list[dict[str, Any]]:
    """The examples of a task, in its style: `query`, `choices` and `gold`, or `contexts`, `continuation` and `gold`.

    Args:
        task: see `load_examples`, as for the last and for errors.
        task_data: of the task.
    """
    return [row for _, row in load_examples(task, task_data)]


def load_examples(task: Task, task_data: Path | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The examples of a task, each as its mirror has it and as a row of `load_rows`.

    Args:
        task: the task.
        task_data: folder of JSON lines, `NAME_SPLIT.jsonl`; None loads the data set from the hub.

    Raises:
        DataError: they are not there, or not what they must be; says which example.
    """
    where = f"{task.name}_{task.split}" if task_data is None else str(task_data / f"{task.name}_{task.split}.jsonl")
    examples = rows_of_hub(task) if task_data is None else rows_of_file(Path(where))
    rows = []
    for number, example in enumerate(examples, start=1):
        try:
            check_example(task.name, example)
            row = harness_row(example) if task.is_harness else olmo_row(task.name, example)
            check_example(task.name, row)
            if task.definition.metric == "f1" and POSITIVE not in row["choices"]:
                raise ValueError(f"no choice is {POSITIVE!r}, which F1 is of")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}:{number}: not an example of {task.label}: {what}") from error
        rows.append((example, row))
    if not rows:
        raise DataError(f"{where}: contains no example")
    return rows


def check_example(name: str, example: Any) -> None:
    """Check an example of the task of this name, as a mirror or a style has it.

    Raises:
        KeyError: it lacks a field.
        ValueError: a field is not what it must be.
    """
    if not isinstance(example, dict):
        raise ValueError("it must be a JSON object")
    several, single = ("contexts", "continuation") if name == "winogrande" else ("choices", "query")
    options = example[several]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(text, str) for text in options):
        raise ValueError(f"{several} must be a list of two or more strings")
    if not isinstance(example[single], str):
        raise ValueError(f"{single} must be a string")
    if not all(text.strip() for text in (options if several == "choices" else [example[single]])):
        raise ValueError("an answer must not be blank")
    for text in (*options, example[single]):
        text.encode()  # raises for half of a surrogate pair, which JSON can hold and no tokenizer takes
    if type(example["gold"]) is not int or not 0 <= example["gold"] < len(options):
        raise ValueError(f"gold is {example['gold']!r}; must be the index of one of {len(options)} {several}")


def task_problems(tasks: Sequence[str], folder: str | None) -> Iterator[tuple[str, str]]:
    """What keeps tasks from being evaluated: pairs of `tasks` or `task_data` and a sentence.

    Args:
        tasks: names.
        folder: of local copies of their data; None loads these from the hub.
    """
    if find_spec("lm_eval") is None:
        yield "tasks", NOT_INSTALLED
    try:
        chosen = choose_tasks(tasks)
    except ValueError as error:
        yield "tasks", str(error)
        return
    if not chosen:
        yield "tasks", f"names no task; choose {GROUP}, or single tasks such as piqa"
    names = [f"{task.name}_{task.split}.jsonl" for task in chosen]
    if folder is not None and (absent := [name for name in names if not (Path(folder) / name).is_file()]):
        yield (
            "task_data",
            f"{folder}: lacks {', '.join(absent)}; a mirror has one file TASK_SPLIT.jsonl for each task. "
            "Without a mirror, data sets come from the Hugging Face hub",
        )


def rows_of_file(path: Path) -> list[Any]:
    """Read a mirror of one split.

    Raises:
        DataError: it is not there, or not JSON lines; says which line.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist. --task-data (evaluation.task_data) names a folder with a file TASK_SPLIT.jsonl "
            "for each task; without it data sets come from the Hugging Face hub"
        )
    if problem := pointer_problem(path):
        raise DataError(f"{path}: {problem}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not an example of a task: {error}") from error
    return rows


def rows_of_hub(task: Task) -> list[dict[str, Any]]:
    """Load a data set by lm-evaluation-harness's own task, and let that render its prompts.

    Raises:
        DataError: the hub cannot be reached.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    path = Path(lm_eval.tasks.__file__).parent / task.definition.yaml
    manager = TaskManager(include_defaults=False, include_path=str(path.parent))
    try:
        theirs: Any = manager.load([task.name])["tasks"][task.name]
    except Exception as error:  # of `datasets`, of the hub's client and of what these use, of many kinds
        raise DataError(
            f"{task.label}: its data set cannot be loaded from the Hugging Face hub ({type(error).__name__}: {error}). "
            "Without a network, --task-data (evaluation.task_data) names a folder of local copies"
        ) from error
    assert isinstance(theirs, ConfigurableTask)
    docs = theirs.test_docs() if task.split == "test" else theirs.validation_docs()
    return [rendered(theirs, doc) for doc in docs]


def rendered(theirs: Any, doc: Mapping[str, Any]) -> dict[str, Any]:
    """One example of a task of lm-evaluation-harness, as in a mirror."""
    text, choices, target = theirs.doc_to_text(doc), theirs.doc_to_choice(doc), theirs.doc_to_target(doc)
    if isinstance(text, int):  # their form of several contexts with one continuation
        return {"contexts": choices, "continuation": target, "gold": text, "fields": dict(doc)}
    gold = choices.index(target) if target in choices else target
    return {"query": text, "choices": choices, "gold": gold, "fields": dict(doc)}


def harness_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The example as lm-evaluation-harness asks it."""
    return {key: row[key] for key in ("query", "choices", "contexts", "continuation", "gold") if key in row}


def olmo_row(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The example as OLMo asks it; most are asked alike."""
    if name == "winogrande":
        return {key: row[key] for key in ("contexts", "continuation", "gold")}
    query, choices, gold = row["query"], list(row["choices"]), row["gold"]
    if name == "sciq":
        query = f"{row['fields']['support'].strip()}\nQuestion: {row['fields']['question']}\nAnswer:"
    elif name == "copa":
        choices = [choice.lstrip() for choice in choices]
    elif name == "cb":
        query = query.replace(" True, False, or Neither?\nAnswer:", " True, False or Neither?\nAnswer:")
    elif name == "mrpc":
        first, second = detokenized(row["fields"]["sentence1"]), detokenized(row["fields"]["sentence2"])
        query = f"Sentence 1: {first}\nSentence 2: {second}\nQuestion: Do both sentences mean the same thing?\nAnswer:"
        choices, gold = choices[::-1], len(choices) - 1 - gold  # yes, no
    elif name == "sst2":
        query = f"{detokenized(row['fields']['sentence'])}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return {"query": query, "choices": choices, "gold": gold}


def detokenized(text: str) -> str:
    """Undo the spaces that GLUE's texts have around punctuation, as far as OLMo does."""
    for spaced, plain in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(spaced, plain)
    return re.sub(r" (?=['.,])", "", text)


def digest_of(content: list[Any]) -> str:
    """Tells content from other content: the examples of a task, their prompts included, for instance."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def harness_task(label: str, rows: list[dict[str, Any]]) -> Any:
    """A task of lm-evaluation-harness with these examples."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    text: Callable[[Any], Any]
    if "contexts" in rows[0]:
        text, choices, target = (lambda row: row["gold"]), "contexts", "continuation"
    else:
        text, choices, target = (lambda row: row["query"]), "choices", "gold"
    metrics = ("acc", "acc_norm", "f1")
    return ConfigurableTask(
        config={
            "task": label,
            "custom_dataset": lambda **metadata: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": choices,
            "doc_to_target": target,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
            "metadata": {"version": VERSION},
        }
    )
