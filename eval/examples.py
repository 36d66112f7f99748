"""The texts of evaluation examples, to be found again in training data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.decontamination import Example
from data.errors import DataError
from data.readers import strings_in
from eval.tasks import Task, load_examples


def examples_of(tasks: Sequence[Task], names: Sequence[str], folder: Path | None) -> dict[str, list[Example]]:
    """The examples of tasks: the texts of their data sets, and each prompt with each of its answers.

    Args:
        tasks: Tritrain's own.
        names: of tasks and groups of lm-evaluation-harness; each task of a group has a name of its own.
        folder: of local copies of their data; None loads these from the hub.

    Raises:
        DataError: data are missing, or are not those of the task.
    """
    found = {task.label: examples_of_rows(load_examples(task, folder)) for task in tasks}
    if names:
        from eval.harness_tasks import load_tasks

        for name, task in load_tasks(names, folder, num_fewshot=0).tasks.items():
            found[name] = examples_of_task(name, task)
    return found


def examples_of_rows(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Example]:
    """The examples of `eval.tasks.load_examples`.

    Answers such as "True" and "False", which are those of all examples, are words of the task.
    """
    same_for_all = len({tuple(row.get("choices", ())) for _, row in rows}) == 1
    found = []
    for example, row in rows:
        texts = [*strings_in(example.get("fields", {})), *([] if same_for_all else row["choices"])]
        found.append(Example(texts, prompts_of_row(row)))
    return found


def prompts_of_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a model is shown of a row of `eval.tasks.load_rows`: the prompt with each answer."""
    if "contexts" in row:
        return tuple(f"{context} {row['continuation']}" for context in row["contexts"])
    return tuple(f"{row['query']} {choice}" for choice in row["choices"])


def examples_of_task(name: str, task: Any) -> list[Example]:
    """The examples of a task of lm-evaluation-harness, without examples of other splits in the prompt.

    Raises:
        DataError: an example is not what the task needs.
    """
    from eval.harness_data import quiet
    from eval.harness_tasks import FEWSHOT_SEED

    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    texts: dict[int, list[str]] = {}
    prompts: dict[int, list[str]] = {}
    try:
        with quiet():
            task.build_all_requests(limit=None)
            for request in task.instances:
                prompt, *others = request.arguments
                if request.request_type == "generate_until":
                    target = task.doc_to_target(request.doc)
                    answers = target if isinstance(target, list) else [target]
                else:
                    answers = others or [""]
                texts[request.doc_id] = [*strings_in(request.doc)]
                prompts.setdefault(request.doc_id, []).extend(f"{prompt} {answer}" for answer in answers)
    except DataError:
        raise
    except Exception as error:  # of templates and of functions of the task
        raise DataError(
            f"{name}: the prompts cannot be made ({type(error).__name__}: {error}); each example must have the columns "
            "that the task reads"
        ) from error
    return [Example(texts[number], prompts[number]) for number in texts]
