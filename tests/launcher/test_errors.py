"""One family of errors, and the same answer from every entry."""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

from data.errors import DataError
from launcher.errors import ConfigError, report_error


def test_every_error_of_the_launcher_belongs_to_the_family() -> None:
    """All but four: `TensorFileError`, which another module turns into a `CheckpointError`; `StartError`, which is an
    error of the network: each rank reports it, and its job may be queued again; `FirstRankError`, with which the other
    ranks end in silence; and `StoppedError`, with which all end as they were asked to."""
    classes = [
        node
        for path in (ROOT / "launcher").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    ]
    bases = {node.name: ast.unparse(node.bases[0]) for node in classes}
    assert {"UserError", "ConfigError", "DamageError"} <= bases.keys()

    def family_of(name: str) -> str:
        return family_of(bases[name]) if name in bases and name != "UserError" else name

    assert {name for name in bases if family_of(name) != "UserError"} == {
        "TensorFileError",
        "StartError",
        "FirstRankError",
        "StoppedError",
    }


def cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from launcher.cli import main

    monkeypatch.setattr(sys, "argv", ["tritrain", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def pretrain(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from launcher.pretrain import main

    return main(arguments)


def doctor(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from launcher.doctor.doctor import main

    return main(arguments)


def measure(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from launcher.inference.measure import main

    asked = {"files": [__file__], "window_tokens": None, "stride_tokens": None, "apart": True, "tokenizer": None}
    return main(json.dumps(asked | {"model": arguments[0]}))


@pytest.mark.parametrize(
    ("entry", "arguments", "says"),
    [
        (cli, ["plan", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
        (cli, ["report", "absent", "--out", "out.html"], "absent: no such folder; a run's folder has a config.yaml"),
        (cli, ["prepare", "absent.txt", "--out", "shards", "--tokenizer", "bpe:300"], "absent.txt"),
        (cli, ["verify", "s3:///"], "s3:///: names no bucket"),
        (pretrain, ["--config", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
        (doctor, ["--config", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
        (measure, ["absent"], "absent"),
    ],
)
def test_every_entry_answers_in_a_sentence(
    entry: Callable[[list[str], pytest.MonkeyPatch], int],
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry(arguments, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown


def test_a_refusal_is_left_for_the_job_but_a_disk_that_fails_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused configuration is not queued again; what a disk or network does may be over at the next start."""
    import launcher.pretrain

    monkeypatch.setenv("TRITRAIN_REFUSED", str(tmp_path / "refused"))

    def fails(path: Path, overrides: list[str]) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(launcher.pretrain, "load_config", fails)
        patched.setenv("RANK", "5")
        assert launcher.pretrain.main(["--config", "config.yaml"]) == 1
    assert not (tmp_path / "refused").exists()
    assert capsys.readouterr().err == "rank 5: config.yaml: Input/output error\n"
    assert launcher.pretrain.main(["--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml: cannot be read" in (tmp_path / "refused").read_text()


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "shown", "of_rank_1"),
    [
        (ConfigError("run.name: is missing"), "run.name: is missing\n", ""),
        (DataError("shards: damaged"), "shards: damaged\n", ""),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            "x.txt: No such file or directory\n",
            "rank 1: x.txt: No such file or directory\n",
        ),
        (OSError("the store says no"), "the store says no\n", "rank 1: the store says no\n"),
    ],
)
def test_what_all_ranks_share_is_one_sentence_of_the_first_and_a_disk_fails_on_one(
    error: Exception, shown: str, of_rank_1: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert report_error(raised(error)) == 2
    assert capsys.readouterr().err == shown
    monkeypatch.setenv("RANK", "1")
    assert report_error(raised(error)) == 2
    assert capsys.readouterr().err == of_rank_1
    assert report_error(raised(error), rank=1) == 2
    assert capsys.readouterr().err == f"rank 1: {shown}"


def test_a_defect_has_its_traceback_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert report_error(raised(KeyError("world_size"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("rank 1: Traceback (most recent call last)")
    assert shown.endswith("KeyError: 'world_size'\n")
