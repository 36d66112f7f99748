"""A run goes on from checkpoints of its own, trained with its configuration, and never begins anew by itself."""

import contextlib
import json
import math
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from ranks import run_group
from runs import run
from tiny import tiny_config, tiny_tree

from launcher.config.file import parse_config
from launcher.errors import ConfigError, UserError
from launcher.process.console import Console
from launcher.run import belonging
from launcher.run.belonging import check_nothing_lost, check_owner, claim_checkpoints, release_checkpoints
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics

RATE = {"learning_rate": 1e-4}
LONGER = [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 8}]


def interrupted(shards: str, out: str, **sections: Any) -> None:
    """Train three steps of a run, of which each has a checkpoint."""
    assert run(tiny_config(Path(shards), Path(out), checkpoint={"interval_steps": 1}, **sections), 3) == "interrupted"


def start_on_a_disk_of_its_own(shards: str, out: str) -> str:
    belonging.SECONDS_TO_APPEAR = 0.3
    here = Path(out) / str(dist.get_rank())
    here.mkdir()
    with contextlib.chdir(here), pytest.raises(ConfigError) as caught:
        run(tiny_config(Path(shards), Path("run")))
    return str(caught.value)


def test_a_folder_that_hosts_do_not_share_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    for said in run_group(2, start_on_a_disk_of_its_own, str(shards), str(tmp_path)):
        assert f"the first rank writes to {tmp_path}" in said
        assert f"is not there on {socket.gethostname()}. It must lie on a disk that all hosts share" in said
    assert not list((tmp_path / "0" / "run" / "checkpoints").glob("*"))


def outcome_of(shards: str, out: str, steps: int = 10**6, named: str = "tiny", allow: Any = (), **sections: Any) -> str:
    """The outcome of going on with a run, or the sentence that refuses it."""
    tree = tiny_tree(Path(shards), Path(out))
    tree["run"] |= {"name": named, "allow_changes": list(allow)}
    for name, keys in sections.items():
        tree[name] = keys if isinstance(keys, list) else tree.get(name, {}) | keys
    config = parse_config(tree)
    try:
        RunFolder(config).check_configuration()
        return run(config, steps)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def refusals(shards: str, out: str, place: str) -> dict[str, str]:
    """What is said of a killed run that is spoiled in each way and then goes on, with other sections perhaps."""
    interrupted(shards, f"{out}/trained")
    RunFolder(tiny_config(Path(shards), Path(out) / "trained")).write_state("running")  # as one that was killed
    SPOILS["elsewhere"] = (lambda run: None, {"checkpoint": {"folder": place}})
    told = {}
    for name, (spoil, sections) in SPOILS.items():
        shutil.copytree(f"{out}/trained", f"{out}/{name}")
        spoil(Path(out) / name)
        told[name] = outcome_of(shards, f"{out}/{name}", 1, **sections)
    return told


def no_starts(run: Path) -> None:
    (run / "starts.jsonl").unlink()


def other_rate(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.0001"))


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


SPOILS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "other-rate-no-starts": (lambda run: (run / "starts.jsonl").unlink(), {"optimizer": RATE}),
    "other-rate-in-both": (other_rate, {"optimizer": RATE}),
    "other-rate-no-config": (lambda run: (run / "config.yaml").unlink(), {"optimizer": RATE}),
    "lost": (no_checkpoints, {}),
    "lost-with-state": (lambda run: (no_checkpoints(run), (run / "state.json").unlink()), {}),
    "lost-with-starts": (lambda run: (no_checkpoints(run), (run / "starts.jsonl").unlink()), {}),
    "elsewhere": (lambda run: None, {}),  # with another checkpoint.folder
}


@pytest.fixture(scope="module")
def refused(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folders of the spoiled runs, and what was said of each."""
    out = tmp_path_factory.mktemp("refused")
    return out, run_group(1, refusals, str(shards), str(out), str(out / "empty"))[0]


@pytest.mark.parametrize("spoil", [name for name in SPOILS if "rate" in name])
def test_a_run_keeps_the_configuration_of_its_checkpoint(refused: tuple[Path, dict[str, str]], spoil: str) -> None:
    told = refused[1][spoil]
    assert told.startswith("ConfigError: "), told
    assert "  optimizer.learning_rate: 0.003 in step-00000003, 0.0001 now\n" in told
    assert "Set run.folder to begin another run" in told
    assert told.endswith("add 'run.allow_changes=[optimizer.learning_rate]'.")
    assert list(losses(refused[0] / spoil)) == [1, 2, 3]


@pytest.mark.parametrize("spoil", [name for name in SPOILS if "rate" not in name])
def test_a_run_that_has_saved_does_not_begin_anew(refused: tuple[Path, dict[str, str]], spoil: str) -> None:
    told = refused[1][spoil]
    place = refused[0] / ("empty" if spoil == "elsewhere" else f"{spoil}/checkpoints")
    assert told.startswith(f"ConfigError: checkpoint.folder: {place} has no checkpoint")
    assert "trained and saved step 3; it does not begin anew by itself" in told
    assert list(losses(refused[0] / spoil)) == [1, 2, 3]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row}


def test_a_run_that_was_killed_before_it_saved_begins_again(shards: Path, tmp_path: Path) -> None:
    folder = RunFolder(tiny_config(shards, tmp_path / "run"))
    folder.prepare([4, 4])
    folder.note_start(0, 1)
    folder.write_state("running")
    assert run_group(1, outcome_of, str(shards), str(tmp_path / "run"), 1) == ["interrupted"]


def lines_of_going_back(shards: str, out: str) -> list[str]:
    lines: list[str] = []
    interrupted(shards, out)
    shutil.rmtree(Path(out) / "checkpoints" / "step-00000003")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Console, "line", lambda console, text="": lines.append(text))
        assert outcome_of(shards, out, 1) == "interrupted"
    return lines


def test_a_run_whose_newest_checkpoint_is_gone_says_so(shards: Path, tmp_path: Path) -> None:
    [lines] = run_group(1, lines_of_going_back, str(shards), str(tmp_path / "run"))
    assert lines[0].startswith("WARNING: the run had saved step 3, and the newest sound checkpoint is of step 2")


def allowed_and_plain(shards: str, out: str) -> list[str]:
    """Go on with another rate, allowed; and begin with it where the first left off, as a run of its own would."""
    for name in ("changed", "kept"):
        interrupted(shards, f"{out}/{name}")
    told = [outcome_of(shards, f"{out}/changed", 4, optimizer=RATE)]
    told += [outcome_of(shards, f"{out}/changed", 2, optimizer=RATE, allow=["optimizer"])]
    told += [outcome_of(shards, f"{out}/changed", 2, optimizer=RATE)]
    told += [outcome_of(shards, f"{out}/kept", 2)]
    return told


def test_changes_that_are_allowed_take_effect_from_there_on(shards: Path, tmp_path: Path) -> None:
    [told] = run_group(1, allowed_and_plain, str(shards), str(tmp_path))
    assert told[0].startswith("ConfigError: ")
    assert told[1:] == ["interrupted"] * 3  # the third has a checkpoint with the new rate, and needs no permission
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("changed", "kept")]
    rates = [{row["step"]: row.get("train/learning_rate") for row in run if "train/loss" in row} for run in rows]
    assert [rates[0][step] / rates[1][step] for step in (3, 4, 5)] == pytest.approx([1, 1 / 30, 1 / 30])
    assert losses(tmp_path / "changed")[4] == losses(tmp_path / "kept")[4]  # before the first step of another size
    assert losses(tmp_path / "changed")[5] != losses(tmp_path / "kept")[5]


def extended(shards: str, out: str) -> list[str]:
    assert run(tiny_config(Path(shards), Path(out))) == "complete"
    changes = {"phases": LONGER}
    told = [outcome_of(shards, out, **changes)]
    shorter: list[Any] = [{"precision": "16-bit", "steps": 3}, {"precision": "ternary", "steps": 9}]
    told += [outcome_of(shards, out, phases=shorter, allow=["phases"])]
    cut: list[Any] = [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 2}]
    told += [outcome_of(shards, out, phases=cut), outcome_of(shards, out, phases=cut, allow=["phases"])]
    batch = {"training": {"global_batch_sequences": 4, "micro_batch_sequences": 2, "compute_dtype": "fp32"}}
    told += [outcome_of(shards, out, **batch, allow=["training"])]
    return [*told, outcome_of(shards, out, **changes, allow=["phases"])]


def test_a_finished_run_is_extended_knowingly(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    [[refused, moved, cut, cut_allowed, batch, outcome]] = run_group(1, extended, str(shards), str(out))
    assert "  phases.1.steps: 4 in" in refused
    assert "phases.1.steps" in refused.splitlines()[-1]
    # A cosine from 3e-3 to a tenth, after 2 steps of warm-up: 5/6 and 6/10 of the way down.
    rates = [3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * way))) for way in (5 / 6, 6 / 10)]
    assert f"was {rates[0]:.3g} in step 8 and is {rates[1]:.3g} in step 9. That is a jump up." in refused
    assert "set schedule.horizon_steps=8" in refused
    assert "is at step 8, in phase 1, and that phase now has steps 3 to 12" in moved
    for told in (cut, cut_allowed):  # what run.allow_changes cannot help with does not advise it
        assert "has saved step 8, and would have 6 steps now. What is trained cannot be taken back: keep at le" in told
        assert "begin another run. With checkpoint.start_from=CHECKPOINT" in told
        assert "allow_changes" not in told
    assert batch.startswith("ConfigError: training: ")  # and none of them has changed the run's own configuration
    assert outcome == "complete"
    assert sorted(losses(out)) == list(range(1, 13))
    assert json.loads((out / "summary.json").read_text())["tokens"] == 12 * 8 * 32


def two_runs(shards: str, out: str, names: tuple[str, str]) -> list[str]:
    place = {"folder": f"{out}/shared"}
    return [
        outcome_of(shards, f"{out}/{folder}", named=name, checkpoint=place)
        for folder, name in zip(("one", "two"), names, strict=True)
    ]


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a")])
def test_a_folder_of_checkpoints_belongs_to_one_run(shards: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    [[first, second]] = run_group(1, two_runs, str(shards), str(tmp_path), names)
    assert first == "complete"
    assert second.startswith(f"ConfigError: checkpoint.folder: {tmp_path}/shared has the checkpoints of another run, a")
    assert f"remove {tmp_path}/shared/owner.json" in second
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


def moved_and_lost(shards: str, out: str) -> list[str]:
    place = {"folder": f"{out}/shared"}
    told = [outcome_of(shards, f"{out}/one", 2, checkpoint=place)]
    (Path(out) / "one").rename(f"{out}/moved")
    told += [outcome_of(shards, f"{out}/moved", 2, checkpoint=place)]
    shutil.rmtree(f"{out}/moved")
    told += [outcome_of(shards, f"{out}/moved", checkpoint=place)]
    (Path(out) / "shared" / "owner.json").unlink()
    return [*told, outcome_of(shards, f"{out}/moved", checkpoint=place)]


def test_it_stays_a_runs_own_where_the_run_is_moved(shards: Path, tmp_path: Path) -> None:
    [[first, moved, lost, told_to]] = run_group(1, moved_and_lost, str(shards), str(tmp_path))
    assert [first, moved, told_to] == ["interrupted", "interrupted", "complete"]
    assert lost.startswith("ConfigError: checkpoint.folder: ")


def test_a_first_start_that_failed_leaves_the_folder_of_checkpoints_free(tmp_path: Path) -> None:
    def owned(name: str) -> RunFolder:
        folder = RunFolder(
            tiny_config(Path("shards"), tmp_path / name, checkpoint={"folder": str(tmp_path / "shared")})
        )
        folder.prepare([4, 4])
        return folder

    (tmp_path / "shared").mkdir()
    claim_checkpoints(owned("one"))
    shutil.rmtree(tmp_path / "one")
    claim_checkpoints(owned("one"))  # with another id
    with pytest.raises(ConfigError, match=f"has the checkpoints of another run, tiny in {tmp_path}/one on "):
        claim_checkpoints(owned("two"))
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "shared" / "step-00000004").mkdir()
    (tmp_path / "shared" / "step-00000004" / "manifest.json").touch()
    with pytest.raises(ConfigError, match="If it is this run, and its folder was lost, remove "):
        claim_checkpoints(owned("one"))


def no_id(file: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    del tree["run_id"]
    file.write_text(yaml.safe_dump(tree))


LOSSES: dict[str, Callable[[Path], Any]] = {
    "of a version without ids": no_id,
    "damaged": lambda file: file.write_bytes(b"\0\0"),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_has_lost_its_id_keeps_its_checkpoints(tmp_path: Path, loss: str) -> None:
    shared = tmp_path / "shared"
    config = tiny_config(Path("shards"), tmp_path / "run", checkpoint={"folder": str(shared)})

    def start(*, fails: bool) -> str:
        folder = RunFolder(config)
        folder.claim()
        check_owner(folder)
        folder.set_damaged_aside()
        folder.write_state("running")
        folder.prepare([4, 4])
        claim_checkpoints(folder)
        if not fails:
            folder.note_start(0, 1)
        return json.loads((shared / "owner.json").read_text())["run_id"]  # type: ignore[no-any-return]

    (shared / "step-00000004").mkdir(parents=True)
    (shared / "step-00000004" / "manifest.json").touch()
    owner = start(fails=False)
    LOSSES[loss](tmp_path / "run" / "config.yaml")
    assert start(fails=True) == owner
    assert start(fails=False) == owner
    assert RunFolder(config).run_id == owner
    another = RunFolder(tiny_config(Path("shards"), tmp_path / "another", checkpoint={"folder": str(shared)}))
    another.claim()
    another.write_state("running")
    with pytest.raises(ConfigError, match="has the checkpoints of another run"):
        check_owner(another)


def test_of_two_runs_that_begin_at_once_one_has_the_folder_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    folders = [
        RunFolder(tiny_config(Path("shards"), tmp_path / name, checkpoint={"folder": str(tmp_path / "shared")}))
        for name in ("one", "two")
    ]
    for folder in folders:
        folder.prepare([4, 4])
        (folder.checkpoints / "step-00000001").mkdir(exist_ok=True)
        (folder.checkpoints / "step-00000001" / "manifest.json").touch()
    read_owner, both = belonging.read_owner, threading.Barrier(2, timeout=0.5)

    def slowly(folder: RunFolder) -> Any:
        found = read_owner(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()  # for the other, who has read as much
        return found

    def outcome(folder: RunFolder) -> str:
        try:
            claim_checkpoints(folder)
        except ConfigError as error:
            return str(error)
        return ""

    monkeypatch.setattr(belonging, "read_owner", slowly)
    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(outcome, folders))
    assert said[0] == ""
    assert "has the checkpoints of another run" in said[1]


def test_only_its_own_note_is_taken_from_a_folder_of_checkpoints(tmp_path: Path) -> None:
    folders = [
        RunFolder(tiny_config(Path("shards"), tmp_path / name, checkpoint={"folder": str(tmp_path / "shared")}))
        for name in ("one", "two")
    ]
    (tmp_path / "shared").mkdir()
    for folder in folders:
        folder.prepare([4, 4])
        release_checkpoints(folder)  # there is none
    claim_checkpoints(folders[0])
    release_checkpoints(folders[1])
    assert (tmp_path / "shared" / "owner.json").exists()
    release_checkpoints(folders[0])
    assert not (tmp_path / "shared" / "owner.json").exists()


def test_a_run_of_an_older_version_has_trained_if_its_state_or_its_starts_say_so(tmp_path: Path) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    folder.prepare([4, 4])
    folder.note_start(2, 1)  # with checkpoint.start_from, say
    folder.write_state("running")
    check_nothing_lost(folder, first_step=2)
    with pytest.raises(ConfigError, match="trained and saved step 2; it does not begin anew"):
        check_nothing_lost(folder, first_step=0)
    (folder.path / "starts.jsonl").unlink()
    check_nothing_lost(folder, first_step=0)
    folder.write_state("interrupted", reason="signal", checkpoint=None)  # before its first step
    check_nothing_lost(folder, first_step=0)
    folder.write_state("interrupted", reason="signal", checkpoint="x/step-00000003")
    with pytest.raises(ConfigError, match="has trained and saved; it does not begin anew"):
        check_nothing_lost(folder, first_step=0)
    folder.state_before = {"status": "converted"}
    with pytest.raises(ConfigError, match="was converted; it does not begin anew"):
        check_nothing_lost(folder, first_step=0)


def test_a_runs_id_is_no_part_of_its_configuration(tmp_path: Path) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    folder.prepare([4, 4])
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run_id"]
    again = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    again.prepare([4, 4])
    assert again.run_id == found
    assert len(found) == 32
