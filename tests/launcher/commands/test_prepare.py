"""`tritrain prepare` says which files it reads and which it leaves out, before the work."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from tiny import write_corpus

from data.config import PrepareConfig
from data.shards import PrepareProgress, prepare
from data.survey import check_input, survey
from launcher.commands.prepare import prepare_with_progress, remaining
from launcher.process.console import Console


def test_what_is_read_and_left_out_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, linked, out = tmp_path / "in", tmp_path / "elsewhere", tmp_path / "out"
    for path in (folder / "a", folder / "_temporary", linked):
        path.mkdir(parents=True)
        write_corpus(path / "x.jsonl", num_documents=40)
    for number in range(3):
        (folder / f"{number}.json.gz").touch()
    (folder / "linked").symlink_to(linked)
    held_out = write_corpus(tmp_path / "held-out.jsonl", num_documents=20)
    config = PrepareConfig(inputs=(str(folder),), validation_inputs=(str(held_out),), tokenizer="bpe:300")
    prepare_with_progress(config, 16, out, Console(silent=False))
    said = (
        "2 files read; 5 left out: 3 of unknown kind .json.gz, 1 unfinished output or log of Spark, 1 linked folder "
        f"(name it as an input). All are listed in {out}/files.json"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == said
    assert lines.count(said) == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == {"read": 2, "left_out": 5}  # each rank reads the manifest at each start
    files = json.loads((out / "files.json").read_text())
    assert files["read"] == [str(folder / "a" / "x.jsonl"), str(held_out)]
    assert files["left_out"] == {
        **{str(folder / f"{number}.json.gz"): "of unknown kind .json.gz" for number in range(3)},
        str(folder / "_temporary"): "unfinished output or log of Spark",
        str(folder / "linked"): "linked folder (name it as an input)",
    }
    assert manifest["splits"]["train"]["documents"] == 40
    held_out.unlink()  # text is of no use once it is tokenized
    prepare_with_progress(config, 16, out, Console(silent=False))
    assert capsys.readouterr().out == ""


def test_inputs_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders on a network's file system may hold 100,000 files, each of which takes a while to look up."""
    folder, asked = tmp_path / "in", Counter()
    for name in ("a", "b/c"):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            (folder / name / f"{number}.txt").write_text(f"Text {number} of {name}, which is not long. " * 9)

    def counted(name: str) -> None:
        call = getattr(os, name)

        def counting(path, *args, **kwargs):
            asked[name] += str(path).startswith(str(folder))
            return call(path, *args, **kwargs)

        monkeypatch.setattr(os, name, counting)

    for name in ("scandir", "stat", "lstat"):
        counted(name)
    config = PrepareConfig(inputs=(str(folder),), tokenizer="bpe:300")
    prepare_with_progress(config, 16, tmp_path / "out", Console(silent=True))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["files"] == {"read": 40, "left_out": 0}
    assert asked["scandir"] == 4  # in, a, b and c
    # Text is read twice, to train the tokenizer and to use it; before that, a file's size tells what is only a pointer.
    # A command that goes on where another one stopped compares sizes and times once more. Two files would tell that the
    # folder is prepared data.
    assert asked["stat"] + asked["lstat"] <= 3 * 40 + 2 + 2
    asked.clear()
    check_input(str(folder))  # as every rank does
    assert asked["scandir"] <= 3
    assert asked["stat"] + asked["lstat"] <= 2


def test_the_time_that_is_left_is_by_the_parts_of_this_attempt(tmp_path: Path) -> None:
    progress = PrepareProgress(survey([]), "parts", 0, 0, 0, seconds=60.0, parts=(901, 1000))
    assert remaining(progress, 900) == ", 1:39:00 left"
    assert remaining(progress, 901) == ""


def test_what_prepared_data_lack_as_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "x.jsonl", num_documents=40)
    first = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300")
    prepare_with_progress(first, 500, tmp_path / "first", Console(silent=True))
    split = tmp_path / "first" / "train"
    dropped = json.loads((split.parent / "manifest.json").read_text())["splits"]["train"]["dropped_tokens"]
    second = PrepareConfig(inputs=(str(split),), tokenizer="bpe:300")
    prepare_with_progress(second, 16, tmp_path / "second", Console(silent=False))
    said = f"{split}: its last {dropped} tokens, which filled no row, are not there, nor are the documents that end in"
    assert f"{said} them" in capsys.readouterr().out.splitlines()


def test_where_it_is_stopped_it_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("once upon a time there was a text. " * 300)
    config, out = PrepareConfig(inputs=(str(text),), tokenizer="bpe:300"), tmp_path / "out"

    def stopped(config, sequence_length, out, show, *rest):
        def interrupt(progress: PrepareProgress) -> None:
            show(progress)
            if progress.stage == "tokens":
                raise KeyboardInterrupt

        return prepare(config, sequence_length, out, interrupt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("launcher.commands.prepare.prepare", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare_with_progress(config, 16, out, Console(silent=False))
    said = f"Stopped. The same command goes on from what is done, which is kept hidden beside {out}."
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert not out.exists()
    prepare_with_progress(config, 16, out, Console(silent=False))
    assert out.exists()
