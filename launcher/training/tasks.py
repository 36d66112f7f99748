"""Downstream tasks during training: a few examples, often, on the live, sharded model."""

from collections.abc import Callable
from pathlib import Path

from data.tokenizer import load_tokenizer
from eval.errors import NotFiniteError
from eval.score import scores_of
from eval.tasks import choose_tasks, load_rows
from launcher.engine.contract import Engine
from launcher.inference.sharded import scorer_of
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks

NUM_SCORED = "tasks/num_scored"
"""Key of the number of tasks that have a score; every row of tasks has it."""


class TasksInTraining:
    """Scores a run's tasks.

    Args:
        plan: of a run that has `evaluation.tasks`.
        ranks: this rank among all.
        tokenizer_path: of the training data.

    Raises:
        DataError: the examples are not there, or the tokenizer gives an answer no token.
    """

    def __init__(self, plan: Plan, ranks: Ranks, tokenizer_path: Path) -> None:
        from eval.harness import Encoding, open_questions

        config = plan.config.evaluation
        folder = Path(config.task_data) if config.task_data else None
        tokenizer = load_tokenizer(tokenizer_path)
        self._plan, self._ranks = plan, ranks
        self._questions = {
            task: open_questions(
                task.label,
                load_rows(task, folder)[: config.tasks_limit],
                Encoding(tokenizer, tokenizer.end_of_document, separately=not task.is_harness),
                plan.config.model.max_sequence_length,
            )
            for task in choose_tasks(config.tasks)
        }

    def measure(self, engine: Engine, got_on: Callable[[], None]) -> tuple[dict[str, float], str]:
        """Return the scores of the current model, by keys of the log, and a line for the console; a collective.

        ``got_on`` is called after every few examples, because a task may take hours without being hung. A task with a
        log-likelihood that is not finite has no scores; the line says so.
        """
        from eval.harness import answer_questions

        scorer = scorer_of(engine.token_nll, self._plan.config.model, self._ranks)
        values: dict[str, float] = {NUM_SCORED: 0}
        words = []
        for task, questions in self._questions.items():
            try:
                with engine.keeping_apart(None):
                    examples = answer_questions(task.label, questions, scorer, lambda num_rows: got_on())
            except NotFiniteError as error:
                words.append(f"no score ({error})")
                continue
            scores = scores_of(examples, task.definition.metric)
            values[NUM_SCORED] += 1
            values |= {f"eval/{task.label}/{name}": score.value for name, score in scores.items()}
            words.append(f"{task.label} {100 * scores[task.definition.metric].value:.1f}")
        most = max(map(len, self._questions.values()))
        return values, f"tasks, {', '.join(words)} (per cent, of {most} examples at most)"


def open_tasks(plan: Plan, ranks: Ranks, tokenizer_path: Path) -> TasksInTraining | None:
    """Load the tasks of a run; None if it has none."""
    return TasksInTraining(plan, ranks, tokenizer_path) if plan.config.evaluation.tasks else None
