"""Load tasks, groups and tags of lm-evaluation-harness (pinned: 0.4.13) by name, as it defines them.

Tasks that need what Tritrain does not do are refused in a sentence: code that a model writes, images and sounds, and
metrics whose code is on the hub. Everything else is lm-evaluation-harness's own: prompts, few-shot examples, filters,
metrics and the aggregation of groups.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory, _ctor_accepts_config
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from data.errors import DataError
from eval.harness_data import NO_CODE, FromFolder, FromHub, no_code_from_hub, quiet
from eval.task_index import definitions

logging.getLogger("lm_eval").setLevel(logging.ERROR)

FEWSHOT_SEED = 1234
"""lm-evaluation-harness's own, of the choice of few-shot examples."""
CODE = {".py", ".yaml", ".yml"}
"""What a task is defined by, and the functions that it names."""
SENTENCES = "tokenizers/punkt_tab"
"""What NLTK has learned of where sentences end."""


@dataclass(frozen=True)
class Loaded:
    """Tasks and groups of lm-evaluation-harness, by name."""

    tasks: dict[str, Any]
    """Single tasks, of groups and tags too."""
    groups: dict[str, Any]
    """Groups, in which others may be."""
    own: frozenset[str] = frozenset()
    """Names of the tasks that files of one's own define."""
    own_files: tuple[Path, ...] = ()
    """These files, and the others beside them that definitions and their code may use."""


def load_tasks(names: Sequence[str], folder: Path | None, num_fewshot: int | None) -> Loaded:
    """Load tasks with their data.

    Args:
        names: of `eval.task_index.split_names`.
        folder: of local copies of their data, see `eval.harness_data`; None loads these from the hub.
        num_fewshot: examples in each prompt; None leaves it to each task. As in lm-evaluation-harness, a task that says
            0 keeps it.

    Raises:
        DataError: data are missing or are not those of the task, or it needs what Tritrain does not do; says what.
    """
    import datasets

    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=False)
    # Copies, because a file of one's own may add to a tag.
    manager.task_index.update((name, replace(entry, tags=set(entry.tags))) for name, entry in _index().items())
    manager._factory = Factory(folder, num_fewshot)
    with no_code_from_hub(), quiet():
        try:
            found = manager.load([_registered(name, manager.task_index) for name in names])
        except ValueError as error:
            if str(error).startswith("Duplicate task"):
                raise DataError(f"{error}; evaluate these in two commands") from error
            raise
    for task in found["tasks"].values():
        shots = shots_of(num_fewshot, task.get_config("num_fewshot"), task.OUTPUT_TYPE)
        task.set_config(key="num_fewshot", value=shots)
    folders = {Path(name).resolve().parent for name in names if name not in _index()}
    return Loaded(
        tasks=dict(found["tasks"]),
        groups=dict(found.get("groups", {})),
        own=frozenset(found["tasks"].keys() - _index().keys()),
        own_files=tuple(
            sorted(file for folder in folders for file in folder.iterdir() if file.suffix in CODE and file.is_file())
        ),
    )


@cache
def _index() -> dict[str, Entry]:
    """lm-evaluation-harness's tasks, groups and tags by name, made once: for 14,000 it takes half a second."""
    index: dict[str, Entry] = {}
    for path, keys in definitions():
        TaskIndex.process_cfg(keys, path, index)
    return index


def _registered(name: str, index: dict[str, Entry]) -> str:
    """The name of a task or group, which a YAML file may define."""
    if name in index:
        return name
    path = Path(name).resolve()
    try:
        defined = load_yaml(path, resolve_func=False)
        TaskIndex.process_cfg(defined, path, index)
    except Exception as error:  # of PyYAML and of what it reads
        raise DataError(f"{name}: does not define a task or group of lm-evaluation-harness: {error}") from error
    return str(defined["task"] if "group" not in defined else defined["group"])


class Factory(TaskFactory):
    """Builds tasks with data from a folder or the hub, and refuses what Tritrain does not do."""

    def __init__(self, folder: Path | None, num_fewshot: int | None) -> None:
        super().__init__()
        self._folder, self._num_fewshot = folder, num_fewshot

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        name = (overrides or {}).get("task", entry.name)
        try:
            config = self._load_full_config(entry, overrides)
            for key in ("tag", "group", "task_list"):
                config.pop(key, None)
            if problem := problem_of(config):
                raise DataError(problem)
            return self._built(config)
        except DataError as error:
            text = str(error)
            raise DataError(text if text.startswith(f"{name}:") or ".jsonl" in text else f"{name}: {text}") from error
        except ModuleNotFoundError as error:
            raise DataError(
                f"{name}: needs the Python package {error.name}, which is not installed; what tasks may need is in the "
                f"extras of lm-evaluation-harness: pip install 'lm-eval[tasks]=={version('lm-eval')}'"
            ) from error
        except Exception as error:  # of templates, of functions of the task and of packages that these import
            if NO_CODE in str(error):
                raise DataError(f"{name}: needs a metric that {NO_CODE}") from error
            where = "the hub" if self._folder is None else f"the files in {self._folder}"
            raise DataError(
                f"{name}: cannot be made from {where} ({type(error).__name__}: {error}); each example must have the "
                "columns that the task reads"
            ) from error

    def _built(self, config: dict[str, Any]) -> Any:
        base = config.get("class", ConfigurableTask)
        shots = shots_of(self._num_fewshot, config.get("num_fewshot"), config.get("output_type"))
        about = {"name": config["task"], "folder": self._folder, "num_fewshot": shots}
        source = FromHub if self._folder is None else FromFolder
        kind = type(base.__name__, (source, base), about)
        task = kind(config=config) if _ctor_accepts_config(kind) else kind()
        if hasattr(task.config, "task"):
            task.config.task = config["task"]
        return task

    def _build_group_members(
        self, member_list: list[Any], group_name: str, overrides: dict[str, Any] | None, registry: dict[str, Entry]
    ) -> list[Any]:
        """Give tasks that a group defines for itself a name of their own, so that `_build_task` builds them too."""
        members = []
        for member in member_list:
            if isinstance(member, dict) and "group" not in member and member.get("task") not in registry:
                name = f"{group_name}::{member.get('task')}"
                member = {**member, "task": name}
                registry[name] = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg=member)
            members.append(member)
        return super()._build_group_members(members, group_name, overrides, registry)


def shots_of(asked: int | None, defined: int | None, output_type: str | None) -> int:
    """The number of examples in a prompt: a text whose own log-likelihood is asked for has no prompt."""
    if output_type == "loglikelihood_rolling" or defined == 0:
        return 0
    return (defined or 0) if asked is None else asked


def problem_of(config: dict[str, Any]) -> str | None:
    """Why a task cannot be done; None if it can."""
    if config.get("unsafe_code"):
        return "runs code that the model writes, which Tritrain does not do"
    if config.get("doc_to_image") is not None or config.get("doc_to_audio"):
        return "asks about images or sounds, and the model reads only text"
    if (process := config.get("process_results")) is not None:
        follows = "instructions_registry" in getattr(process, "__globals__", {})  # ifeval, in all its languages
        return lacking_sentences() if follows else None
    for metric in config.get("metric_list") or []:
        name = metric["metric"]
        if isinstance(name, str) and (metric.get("hf_evaluate") or name not in metric_registry):
            return f"the metric {name!r} {NO_CODE}"
    return None


def lacking_sentences() -> str | None:
    """What is to be done before answers can be split into sentences; None if they can.

    lm-evaluation-harness would find it out with the first answer that it scores, when all of them are generated.
    """
    import nltk

    try:
        nltk.data.find(SENTENCES)
    except LookupError:
        return (
            f"splits answers into sentences with NLTK's {SENTENCES}, which is not on this machine. Where there is a "
            "network, `python -m nltk.downloader -d FOLDER punkt_tab` writes it; set NLTK_DATA=FOLDER here"
        )
    return None
