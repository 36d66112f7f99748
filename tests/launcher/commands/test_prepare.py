"""`tritrain prepare` says which files it reads and which it leaves out, before the work and at its end."""

import json
from pathlib import Path

import pytest
from tiny import write_corpus

from data.config import PrepareConfig
from launcher.commands.prepare import prepare_with_progress
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
    assert lines[1] == lines[-2] == said
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
