"""Downstream tasks during training: a few examples, often, on the live, sharded model."""

from collections.abc import Callable
from pathlib import Path

from data.tokenizer import load_tokenizer
from eval.score import scores_of
from eval.tasks import load_rows
from launcher.engine.contract import Engine
from launcher.inference.measure import check_tasks
from launcher.inference.sharded import scorer_of
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks


class TasksInTraining:
    """Scores a run's tasks.

    Args:
        plan: of a run that has `evaluation.tasks`.
        ranks: this rank among all.
        tokenizer_path: of the training data.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.
        DataError: the examples are not there.
    """

    def __init__(self, plan: Plan, ranks: Ranks, tokenizer_path: Path) -> None:
        config = plan.config.evaluation
        folder = Path(config.task_data) if config.task_data else None
        tasks = check_tasks(list(config.tasks), config.task_data)
        self._rows = {task: load_rows(task, folder)[: config.tasks_limit] for task in tasks}
        self._plan, self._ranks, self._tokenizer = plan, ranks, load_tokenizer(tokenizer_path)

    def measure(self, engine: Engine, got_on: Callable[[], None]) -> tuple[dict[str, float], str]:
        """Return the scores of the current model, by keys of the log, and a line for the console; a collective.

        ``got_on`` is called after every few examples, because a task may take hours without being hung.
        """
        from eval.harness import answer_rows

        scorer = scorer_of(engine.token_nll, self._plan.config.model, self._ranks)
        values: dict[str, float] = {}
        words = []
        for task, rows in self._rows.items():
            examples = answer_rows(
                task.label,
                rows,
                scorer,
                self._tokenizer,
                separately=not task.is_harness,
                advance=lambda num_rows: got_on(),
            )
            scores = scores_of(examples, task.definition.metric)
            values |= {f"eval/{task.label}/{name}": score.value for name, score in scores.items()}
            words.append(f"{task.label} {100 * scores[task.definition.metric].value:.1f}")
        return values, f"tasks, {', '.join(words)} (per cent, of {max(map(len, self._rows.values()))} examples at most)"


def open_tasks(plan: Plan, ranks: Ranks, tokenizer_path: Path) -> TasksInTraining | None:
    """Load the tasks of a run; None if it has none."""
    return TasksInTraining(plan, ranks, tokenizer_path) if plan.config.evaluation.tasks else None
