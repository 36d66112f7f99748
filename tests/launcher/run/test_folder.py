"""Whose a run's folder is, when hosts are lost and come back."""

import json
import shlex
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import Job, job_tree
from tiny import tiny_config
from tokenizer_files import write_bytes_tokenizer
from tokenizer_zoo import sentencepiece_tokenizer

from data.private import no_follow
from data.tokenizer import load_tokenizer
from launcher.config.file import load_config, num_values, parse_config, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.process.ranks import ALONE
from launcher.run.folder import RunFolder, check_place
from launcher.watch.failure import say_failure


def test_a_rank_of_an_earlier_job_leaves_the_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(Path("shards"), tmp_path / "run")
    old, new = RunFolder(config), RunFolder(config)
    old.claim()
    monkeypatch.setattr(socket, "gethostname", lambda: "host2")
    new.claim()
    new.write_state("running")
    say_failure(old, ALONE, "a host was asleep, and wakes")
    assert new.read_state() == {"status": "running"}
    say_failure(new, ALONE, "now it has failed")
    assert new.read_state() == {"status": "failed", "message": "now it has failed"}


def test_a_start_knows_whether_it_made_the_folder_once_it_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job may have begun to train, or have failed and removed the folder, while this one waited to be first."""
    folder, opened = RunFolder(tiny_config(Path("shards"), tmp_path / "run")), 0

    def meanwhile(path: str, flags: int) -> int:
        nonlocal opened
        opened += 1
        descriptor = no_follow(path, flags)
        if opened == 1:
            shutil.rmtree(tmp_path / "run")
        else:
            (tmp_path / "run" / "tokenizer.json").touch()
        return descriptor

    monkeypatch.setattr("launcher.run.folder.no_follow", meanwhile)
    folder.claim()
    assert opened == 2
    assert folder.is_ours()
    assert not folder.is_of_first_start()
    new = RunFolder(tiny_config(Path("shards"), tmp_path / "new"))
    monkeypatch.setattr("launcher.run.folder.no_follow", no_follow)
    new.claim()
    assert new.is_of_first_start()


@pytest.mark.parametrize("content", ["", '{"status": "compl'])
def test_a_state_that_a_power_cut_has_damaged_counts_as_none(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    assert folder.read_state() == {}
    folder.path.mkdir()
    (folder.path / "state.json").write_text(content)
    assert folder.read_state() == {}


def test_the_tokenizer_is_kept_under_the_name_of_its_kind(tmp_path: Path) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    folder.path.mkdir()
    sentencepiece_tokenizer(tmp_path / "of-others.model")
    write_bytes_tokenizer(tmp_path / "mine.json", "<one>")
    write_bytes_tokenizer(tmp_path / "another.json", "<two>")
    for name in ("of-others.model", "mine.json", "another.json"):
        kept = folder.keep_tokenizer(tmp_path / name)
        assert [*folder.path.iterdir()] == [kept]
        assert kept.name == f"tokenizer{Path(name).suffix}"
        assert kept.read_bytes() == (tmp_path / name).read_bytes()


def test_the_tokenizer_of_data_of_an_earlier_version_is_kept_with_the_token_that_their_manifest_names(
    tmp_path: Path,
) -> None:
    file = write_bytes_tokenizer(tmp_path / "tokenizer.json", "</s>")
    (tmp_path / "manifest.json").write_text(json.dumps({"end_of_document": 257}))
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    folder.path.mkdir()
    kept = folder.keep_tokenizer(file)
    alone = shutil.copy(kept, tmp_path / "run" / "copy.json")
    for path in (kept, alone):
        tokenizer = load_tokenizer(path)
        assert tokenizer.name_of(tokenizer.end_of_document) == "<|endoftext|>"


def test_what_is_wrong_is_said_at_every_start(shards: Path, tmp_path: Path) -> None:
    batch: dict[str, Any] = {"global_batch_sequences": 3, "micro_batch_sequences": 1}
    tree = job_tree(shards, tmp_path / "run", training=batch)
    for _ in range(2):
        job = Job(tree)
        assert job.wait() == [2, 2]
        assert job.output.count("training.global_batch_sequences") == 1, job.output
        assert not job.run.exists()  # a first start that failed leaves nothing


def test_a_refused_configuration_leaves_the_state_of_a_run_alone(shards: Path, tmp_path: Path) -> None:
    tree = job_tree(shards, tmp_path / "run")
    folder = RunFolder(parse_config(tree))
    folder.prepare([6, 6])
    folder.note_start(3, 2)
    state = {"status": "interrupted", "reason": "signal", "checkpoint": "step-00000003", "job": None}
    folder.write_state(**state)
    job = Job(tree | {"training": {"global_batch_sequences": 3, "micro_batch_sequences": 1}})
    assert job.wait() == [2, 2]
    assert folder.read_state() == state


def test_a_start_that_failed_before_its_first_step_does_not_hold_the_folder(tmp_path: Path) -> None:
    wrong, right = (tiny_config(Path(name), tmp_path / "run") for name in ("shrads", "shards"))
    folder = RunFolder(wrong)
    folder.prepare([4, 4])
    folder.write_state("failed")
    RunFolder(right).check_configuration()
    folder.note_start(step=0, world_size=1)
    with pytest.raises(ConfigError, match=r"data.sources.0.path: \"shrads\" in .*, \"shards\" now"):
        RunFolder(right).check_configuration()


def many_sources(tmp_path: Path, count: int, path: str) -> Config:
    config = tiny_config(Path("shards"), tmp_path / "run")
    sources = tuple(replace(config.data.sources[0], path=f"{path}-{number}") for number in range(count))
    return replace(config, data=replace(config.data, sources=sources))


def test_a_run_reads_its_own_configuration_again_however_large(tmp_path: Path) -> None:
    config = many_sources(tmp_path, 2000, f"/{'shards/' * 14}")
    folder = RunFolder(config)
    folder.prepare([4, 4])
    assert load_config(folder.path / "config.yaml") == config


def test_values_are_counted_as_they_are_read(tmp_path: Path) -> None:
    tree = to_tree(many_sources(tmp_path, 3, "shards"))
    assert num_values(tree) == sum(1 for event in yaml.parse(yaml.safe_dump(tree)) if isinstance(event, yaml.NodeEvent))


@pytest.mark.parametrize(("count", "path"), [(4000, "shards"), (1000, "s" * 500)])
def test_a_configuration_that_a_run_could_not_read_again_is_refused(tmp_path: Path, count: int, path: str) -> None:
    with pytest.raises(ConfigError, match=r"^data: with its defaults written out, .* fit into a run's config\.yaml"):
        RunFolder(many_sources(tmp_path, count, path))


def test_a_configuration_that_a_person_wrote_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# a year of work\n")
    with pytest.raises(ConfigError, match=r"config\.yaml was not written by a run, and would be overwritten"):
        RunFolder(tiny_config(Path("shards"), tmp_path)).check_configuration()


def test_a_runs_own_configuration_leads_to_it_or_is_refused(tmp_path: Path) -> None:
    config = tiny_config(Path("shards"), tmp_path / "run")
    folder = RunFolder(config)
    folder.prepare([4, 4])
    folder.write_state("interrupted")
    check_place(tmp_path / "run" / "config.yaml", [], config)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "config.yaml"
    with pytest.raises(ConfigError, match=f"add run.folder={tmp_path}/moved; to begin another one, run.folder="):
        check_place(moved, ["logging.interval_steps=1"], config)
    check_place(moved, [f"run.folder={tmp_path}/moved"], tiny_config(Path("shards"), tmp_path / "moved"))
    with pytest.raises(ConfigError, match=r"run\.folder=FOLDER run\.name=NAME"):  # its configuration has a run.folder
        check_place(moved, ["run.name=new"], config)
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    check_place(moved, [], tiny_config(Path("shards"), tmp_path / "link"))
    check_place(moved, [f"run.folder={tmp_path}/new"], tiny_config(Path("shards"), tmp_path / "new"))
    elsewhere = tmp_path / "config.yaml"
    moved.rename(elsewhere)
    check_place(elsewhere, [], config)


def test_the_way_to_a_moved_run_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    config = tiny_config(Path("shards"), tmp_path / "run")
    folder = RunFolder(config)
    folder.prepare([4, 4])
    folder.write_state("interrupted")
    moved = (tmp_path / "run").rename(tmp_path / "wörk space")
    with pytest.raises(ConfigError, match=r"add 'run\.folder=") as caught:
        check_place(moved / "config.yaml", [], config)
    told = str(caught.value).partition(" add ")[2].partition(";")[0]
    assert shlex.split(told) == [f"run.folder={moved}"]


OF_OTHERS = {
    "manifest.json": "is the folder of a checkpoint or prepared data",
    "owner.json": "is the folder of checkpoints",
    "config.json": "is the folder of a model",
    "tokenizer.json": "has files that no run wrote and that a run would replace: tokenizer.json",
    "metrics.jsonl": "has files that no run wrote and that a run would replace: metrics.jsonl",
    "report.html": "has files that no run wrote and that a run would replace: report.html",
}


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^run.folder: .*corpus\.jsonl is a file, not a folder"):
        RunFolder(tiny_config(Path("shards"), tmp_path / "corpus.jsonl")).check_configuration()


@pytest.mark.parametrize("key", ["run.folder", "run.name"])
def test_the_way_to_another_run_is_one_that_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = to_tree(tiny_config(Path("shards"), Path("run")))
    tree["run"]["folder"] = "run" if key == "run.folder" else None
    folder = RunFolder(parse_config(tree))
    folder.prepare([4, 4])
    folder.note_start(0, 1)
    tree["optimizer"]["learning_rate"] = 1e-3
    with pytest.raises(ConfigError, match=f"Set {key} to begin another run"):
        RunFolder(parse_config(tree)).check_configuration()
    tree["run"][key.partition(".")[2]] = "another"
    RunFolder(parse_config(tree)).check_configuration()


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_run_begins_in_no_folder_of_others(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path))
    folder.check_configuration()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "job-17.out").touch()
    folder.check_configuration()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=OF_OTHERS[name]):
        folder.check_configuration()
    folder.write_state("failed")  # a run has been here
    folder.check_configuration()
    (tmp_path / "state.json").unlink()
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").touch()
    folder.check_configuration()  # one that has lost all but its checkpoints


@pytest.mark.parametrize("there", [[], ["lock"], ["config.yaml", "lock"]])
def test_a_folder_is_new_if_it_holds_no_more_than_a_lock_once_that_is_held(tmp_path: Path, there: list[str]) -> None:
    """Looked at before, it might be filled by another process in between, and then be removed."""
    for name in there:
        (tmp_path / name).touch()
    folder = RunFolder(tiny_config(Path("shards"), tmp_path))
    folder.claim()
    assert folder.is_of_first_start() == ("config.yaml" not in there)
