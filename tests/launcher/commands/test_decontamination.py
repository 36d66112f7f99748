"""`tritrain prepare` leaves out duplicates and examples of tasks, and says what it left out."""

import json

import pytest
from tiny_tasks import EXAMPLES, write_tasks
from typer.testing import CliRunner

from data.errors import DataError
from launcher.cli import app
from launcher.commands.decontamination import ngrams_of_sets
from launcher.errors import ConfigError

TEXT = "A sentence of several words that fills rows, number {}, and says nothing else of interest to anybody at all. "
PROMPT = "Bo has two cats. Question: Bo has cats. True or False? Answer: True"
"""Of RTE, with its answer: 13 words."""


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_examples_of_tasks_are_found_with_each_of_their_answers(tmp_path):
    folder = str(write_tasks(tmp_path / "tasks"))
    ngrams = ngrams_of_sets(["rte", "mrpc-harness"], folder)
    assert ngrams.names == ("rte", "mrpc-harness")
    assert ngrams.examples == (len(EXAMPLES["rte"]), len(EXAMPLES["mrpc"]))
    for text in (PROMPT, PROMPT.replace("True", "true").replace(". ", "\n\n"), PROMPT.replace(": True", ": False")):
        assert ngrams.set_of([text]) == 1
    assert not ngrams.set_of([PROMPT.replace("two", "three")])
    assert ngrams_of_sets([], None) is None


def test_examples_of_other_tasks_and_of_files_count_too(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    passage = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [
        {"question": f"Ann has {number} {passage}.", "answer": f"So she has it. #### {number}"} for number in (7, 8)
    ]
    for split in ("train", "test"):
        (folder / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"any": {"key": [passage.replace("one", "ONE!"), 3]}}) + "\n")
    ngrams = ngrams_of_sets([str(own), "gsm8k"], str(folder))
    assert ngrams.names == (str(own), "gsm8k")
    assert ngrams.set_of([passage]) == 1
    assert ngrams.set_of([f"Then Ann has 7 {passage[:50]}"]) == 2


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["ret"], None, "--decontaminate: task 'ret' is not known; did you mean rte"),
        (["rte"], "none", "--task-data: .*: lacks rte_validation.jsonl"),
        (["none/a.jsonl"], None, "none/a.jsonl: no such file or folder"),
        (["piqa"], None, r"piqa: is a task and also a file or folder here; write \./piqa"),
        ([], "none", "--task-data: is for tasks that --decontaminate names"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, names, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    with pytest.raises((ConfigError, DataError), match=message):
        ngrams_of_sets(names, data and str(tmp_path / data))


def test_the_command_says_what_was_left_out(tmp_path):
    write_tasks(tmp_path / "tasks")
    texts = [TEXT.format(number) for number in range(40)] + [TEXT.format(7), f"He wrote: {PROMPT}", TEXT.format(7)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXT.format(8)}) + "\n")
    options = ["--tokenizer", "bpe:300", "--sequence-length", "16", "--out", tmp_path / "out"]
    (tmp_path / "own.jsonl").write_text('{"text": "too short"}\n' + json.dumps({"text": "long " * 20}) + "\n")
    filters = ["--deduplicate", "--decontaminate", "rte", "--task-data", tmp_path / "tasks"]
    filters += ["--decontaminate", tmp_path / "own.jsonl"]
    done = run("prepare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *options, *filters)
    assert done.exit_code == 0, done.output
    lines = [line.replace(str(tmp_path), "") for line in done.output.splitlines()]
    at = lines.index(next(line for line in lines if line.startswith("Duplicates")))
    assert lines[at : at + 7] == [
        "Duplicates of earlier documents: 3 left out, 324B of text",
        "  /a.jsonl: 2 left out, 216B of text",
        "  /b.jsonl: 1 left out, 108B of text",
        "Documents with evaluation examples: 1 left out, 77B of text",
        "  rte: 1 left out, 77B of text",
        "  /own.jsonl: 0 left out, 0B of text",
        "  4 of 5 examples have no 13 words of their own, and are not found",
    ]
    again = run("prepare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *options, *filters)
    assert again.exit_code == 0
    assert "Preparing" not in again.output
    shown = run("inspect", tmp_path / "out").output
    assert "Duplicates of earlier documents: 3 left out" in shown
    facts = json.loads(run("inspect", tmp_path / "out", "--json").output)
    assert facts["filters"]["evaluation"]["sets"]["rte"]["documents"] == 1
