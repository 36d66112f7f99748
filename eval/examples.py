"""The texts of evaluation examples, to be found again in training data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from eval.tasks import Task, load_rows

Texts = tuple[str, ...]


def example_texts(tasks: Sequence[Task], names: Sequence[str], folder: Path | None) -> dict[str, list[Texts]]:
    """The examples of tasks, each as the texts that a model is shown: the prompt with each of the answers.

    Args:
        tasks: Tritrain's own.
        names: of tasks and groups of lm-evaluation-harness; each task of a group has a name of its own.
        folder: of local copies of their data; None loads these from the hub.

    Raises:
        DataError: data are missing, or are not those of the task.
    """
    found = {task.label: [texts_of_row(row) for row in load_rows(task, folder)] for task in tasks}
    if names:
        from eval.harness_tasks import load_tasks

        for name, task in load_tasks(names, folder, num_fewshot=0).tasks.items():
            found[name] = texts_of_task(name, task)
    return found


def texts_of_row(row: Mapping[str, Any]) -> Texts:
    """The texts of an example of `eval.tasks.load_rows`."""
    if "contexts" in row:
        return tuple(f"{context} {row['continuation']}" for context in row["contexts"])
    return tuple(f"{row['query']} {choice}" for choice in row["choices"])


def texts_of_task(name: str, task: Any) -> list[Texts]:
    """The texts of each example of a task of lm-evaluation-harness, without examples of other splits in the prompt.

    Raises:
        DataError: an example is not what the task needs.
    """
    from eval.harness_data import quiet
    from eval.harness_tasks import FEWSHOT_SEED

    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    texts: dict[int, list[str]] = {}
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
                texts.setdefault(request.doc_id, []).extend(f"{prompt} {answer}" for answer in answers)
    except DataError:
        raise
    except Exception as error:  # of templates and of functions of the task
        raise DataError(
            f"{name}: the prompts cannot be made ({type(error).__name__}: {error}); each example must have the columns "
            "that the task reads"
        ) from error
    return [tuple(each) for each in texts.values()]
