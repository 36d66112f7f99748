"""The eleven tasks: their names, their data, and their prompts in both styles."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from places import SHARED
from tiny_tasks import EXAMPLES, NUM_EXAMPLES, write_tasks

from data.errors import DataError
from eval.tasks import DEFINITIONS, Task, choose_tasks, detokenized, digest_of, load_rows, task_problems

MIRROR = Path(os.environ.get("TRITRAIN_TASK_DATA", SHARED / "data/eval"))
SIZES = {
    "piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "openbookqa": 500, "sciq": 1000, "arc_easy": 570,
    "copa": 100, "rte": 277, "cb": 56, "mrpc": 408, "sst2": 872,
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("mirror") / "tasks")


def test_groups_have_eleven_members_each_and_names_are_kept_in_order():
    assert [task.label for task in choose_tasks(["paper11"])] == list(DEFINITIONS)
    both = choose_tasks(["sst2-harness", "paper11-harness", "piqa", "piqa"])
    assert [task.label for task in both] == [
        "sst2-harness", *(f"{name}-harness" for name in DEFINITIONS if name != "sst2"), "piqa",
    ]  # fmt: skip
    by_metric = {metric: {n for n, d in DEFINITIONS.items() if d.metric == metric} for metric in ("acc_norm", "f1")}
    assert by_metric == {"acc_norm": {"piqa", "hellaswag", "openbookqa", "rte"}, "f1": {"mrpc"}}


@pytest.mark.parametrize(("name", "near"), [("hellaswagg", "hellaswag"), ("paper12", "paper11"), ("boolq", "copa")])
def test_unknown_task_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"task '{name}' is not known; did you mean") as error:
        choose_tasks(["piqa", name])
    if name != "boolq":  # nothing is near it
        assert f"did you mean {near}?" in str(error.value)


def row(name, index, *, is_harness=False, folder):
    return load_rows(Task(name, is_harness), folder)[index]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_harness_s_style_asks_what_the_mirror_says(name, tasks):
    expected = [{key: value for key, value in example.items() if key != "fields"} for example in EXAMPLES[name]]
    assert load_rows(Task(name, True), tasks) == expected


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "winogrande", "openbookqa", "arc_easy", "rte"])
def test_most_tasks_ask_alike_in_both_styles(name, tasks):
    assert load_rows(Task(name, False), tasks) == load_rows(Task(name, True), tasks)


def test_olmo_s_own_prompts(tasks):
    assert row("sciq", 0, folder=tasks)["query"] == "Ice floats.\nQuestion: What floats?\nAnswer:"
    assert row("sciq", 0, is_harness=True, folder=tasks)["query"].startswith("Ice floats. \n")
    assert row("sciq", 1, folder=tasks)["query"] == "\nQuestion: What do bees make?\nAnswer:"
    assert row("copa", 1, folder=tasks)["choices"] == ["it was full.", "it fell."]
    question = "I know that it rained.\nQuestion: it rained. True, False or Neither?\nAnswer:"
    assert row("cb", 0, folder=tasks)["query"] == question
    assert row("cb", 2, folder=tasks)["query"].startswith("Did it hail? True, False, or Neither?\n")
    assert row("mrpc", 1, folder=tasks) == {
        "query": 'Sentence 1: She said"no"(twice).\nSentence 2: It\'s raining.\n'
        "Question: Do both sentences mean the same thing?\nAnswer:",
        "choices": ["yes", "no"],
        "gold": 1,
    }
    assert row("mrpc", 0, folder=tasks)["gold"] == 0
    joyful = "it's a joy, really. \nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert row("sst2", 0, folder=tasks)["query"] == joyful


def test_detokenized():
    assert detokenized('He did n\'t go ( at all ) , " they said " .') == 'He didn\'t go (at all),"they said".'


def test_splits():
    assert {name for name in DEFINITIONS if Task(name, True).split == "test"} == {"openbookqa", "sciq", "arc_easy"}
    assert {Task(name, False).split for name in DEFINITIONS} == {"validation"}


def test_digest_knows_style_and_number_of_examples(tasks):
    digests = {
        digest_of(load_rows(Task(name, style), tasks)[:count])
        for name in ("mrpc", "copa")
        for style in (True, False)
        for count in (1, 2)
    }
    assert len(digests) == 8


def test_missing_and_malformed_data_are_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"piqa_validation\.jsonl: does not exist\. --task-data"):
        load_rows(Task("piqa", False), tmp_path)
    path = tmp_path / "piqa_validation.jsonl"
    good = json.dumps(EXAMPLES["piqa"][0])
    for line, problem in (
        ("{", "not an example"),
        ("[" * 20_000, "not an example"),
        ('{"query": "a"}', "has no 'choices'"),
        ('{"contexts": ["a", "b"], "continuation": "c", "gold": 0}', "has no 'choices'"),
        ('{"query": "a", "choices": ["b", "c"]}', "has no 'gold'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2; must be the index of one of 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold is True; must be the index of one of 2"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "an answer must not be blank"),
        ('{"query": "a", "choices": [" \\n", "b"], "gold": 0}', "an answer must not be blank"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "choices must be a list of two or more strings"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "choices must be a list of two or more strings"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "choices must be a list of two or more strings"),
        ('{"query": 7, "choices": ["b", "c"], "gold": 0}', "query must be a string"),
        ('{"query": "\\ud800", "choices": ["b", "c"], "gold": 0}', "surrogates not allowed"),
        ("[]", "must be a JSON object"),
    ):
        path.write_text(f"{good}\n{line}\n")
        for is_harness in (False, True):
            with pytest.raises(DataError, match=r"piqa_validation\.jsonl:2: ") as error:
                load_rows(Task("piqa", is_harness), tmp_path)
            assert problem in str(error.value)
    path.write_bytes(good.encode() + b'\n{"query": "\xff"}')
    with pytest.raises(DataError, match=r"piqa_validation\.jsonl:2: .*utf-8"):
        load_rows(Task("piqa", False), tmp_path)
    path.write_text("")
    with pytest.raises(DataError, match="contains no example"):
        load_rows(Task("piqa", False), tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("winogrande", {"continuation": " "}, "an answer must not be blank"),
        ("winogrande", {"contexts": ["a"]}, "contexts must be a list of two or more strings"),
        ("sciq", {"fields": {"support": "a"}}, "has no 'question'"),
        ("sciq", {"fields": {"support": None, "question": "a"}}, "'NoneType' object has no attribute 'strip'"),
        ("sst2", {"fields": {"sentence": 3}}, "'int' object has no attribute 'replace'"),
        ("mrpc", {"choices": ["no", "Yes"]}, "no choice is 'yes', which F1 is of"),
    ],
)
def test_examples_that_a_style_cannot_ask_are_refused(name, change, problem, tmp_path):
    path = tmp_path / f"{name}_validation.jsonl"
    path.write_text(json.dumps(EXAMPLES[name][0] | change))
    with pytest.raises(DataError, match=re.escape(f"{path}:1: not an example of {name}: {problem}")):
        load_rows(Task(name, False), tmp_path)


def test_a_hub_s_examples_are_checked_too(monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    rows = [HUB["piqa"], HUB["piqa"] | {"sol2": ""}, HUB["piqa"] | {"label": -1}]
    for broken, problem in ((rows[:2], "an answer must not be blank"), ([rows[0], rows[2]], "gold is -1")):

        def load_dataset(path, name=None, content=broken, **options):
            return {split: datasets.Dataset.from_list(content) for split in ("train", "validation", "test")}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match=f"piqa_validation:2: not an example of piqa: {problem}"):
            load_rows(Task("piqa", False), None)


def test_problems_of_tasks_are_said_once_for_commands_and_configurations(tmp_path, monkeypatch):
    assert list(task_problems([], None)) == [("tasks", "names no task; choose paper11, or single tasks such as piqa")]
    [(key, problem)] = task_problems(["sst2", "copa-harness"], str(tmp_path))
    assert key == "task_data"
    assert problem.startswith(f"{tmp_path}: lacks sst2_validation.jsonl, copa_validation.jsonl; a mirror")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    [(key, problem), (_, unknown)] = task_problems(["pika"], None)
    assert (key, "pip install -e '.[eval]'" in problem) == ("tasks", True)
    assert "did you mean piqa?" in unknown


# What lm-evaluation-harness's own tasks find in the hub's data sets: columns as they are there.
HUB = {
    "piqa": {
        "goal": "How do I dry a cup?", "sol1": "With a towel.", "sol2": "With a wet stone from the river.", "label": 0,
    },
    "hellaswag": {
        "activity_label": "Cooking", "ctx_a": "A man stands in a kitchen.", "ctx_b": "he", "label": "0",
        "endings": ["cuts an onion.", "is the kitchen.", "flies.", "rains."],
    },
    "winogrande": {
        "sentence": "The cup did not fit into the box because the _ was too large.", "option1": "cup",
        "option2": "box", "answer": "1",
    },
    "openbookqa": {
        "question_stem": "Water that is very cold turns into", "answerKey": "A",
        "choices": {"text": ["ice", "steam", "wood", "sand"], "label": ["A", "B", "C", "D"]},
    },
    "sciq": {
        "support": " Ice floats. ", "question": "What floats?", "distractor1": "iron", "distractor2": "lead",
        "distractor3": "gold", "correct_answer": "ice",
    },
    "arc_easy": {
        "question": "Which is a fruit?", "answerKey": "A",
        "choices": {"text": ["apple", "stone", "chair"], "label": ["A", "B", "C"]},
    },
    "copa": {
        "premise": "It rained.", "question": "effect", "label": 0, "choice1": "The street was wet.",
        "choice2": "The street was dry.",
    },
    "rte": {"sentence1": "It rains in Rome.", "sentence2": "Rome is wet.", "label": 0},
    "cb": {"premise": "I know that it rained.", "hypothesis": "it rained", "label": 0},
    "mrpc": {"sentence1": "He did n't go .", "sentence2": "He stayed , it is said .", "label": 1},
    "sst2": {"sentence": "it 's a joy , really . ", "label": 1},
}  # fmt: skip


@pytest.mark.parametrize("is_harness", [False, True])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_hub_s_columns_lead_to_the_same_examples(name, is_harness, tasks, monkeypatch):
    """The prompts are rendered by the definitions that lm-evaluation-harness comes with; only the download is not."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    loaded = []

    def load_dataset(path, name=None, **options):
        loaded.append(path)
        return {split: datasets.Dataset.from_list([HUB[task]]) for split in ("train", "validation", "test")}

    task = name
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(Task(name, is_harness), None) == load_rows(Task(name, is_harness), tasks)[:1]
    assert loaded


def test_no_hub_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")

    def load_dataset(path, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"copa: its data set cannot be loaded.*no route to host.*--task-data"):
        load_rows(Task("copa", False), None)


@pytest.mark.skipif(not MIRROR.is_dir(), reason=f"no mirror of the tasks in {MIRROR} (TRITRAIN_TASK_DATA names one)")
@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_real_data_are_read_and_complete(name):
    rows = load_rows(Task(name, False), MIRROR)
    assert len(rows) == SIZES[name]
    assert len(load_rows(Task(name, True), MIRROR)) == {"arc_easy": 2376}.get(name, SIZES[name])
    for example in rows:
        assert all(answer == answer.strip() != "" for answer in example.get("choices", ["a"])) or name in (
            "piqa", "hellaswag", "sciq", "arc_easy", "openbookqa",
        )  # fmt: skip
    assert len(EXAMPLES[name]) == NUM_EXAMPLES
