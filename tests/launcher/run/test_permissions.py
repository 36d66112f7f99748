"""Who may read what a run writes."""

import json
import os
import stat
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import tiny_config

from launcher.pretrain import COMPLETE, run
from launcher.slurm.submit import snapshot


def train_under(rank: int, world_size: int, mask: int, shards: str, out: str) -> int:
    import launcher.report.ending

    os.umask(mask)
    launcher.report.ending.show_ending = lambda folder, console: None  # type: ignore[assignment]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    config = tiny_config(Path(shards), Path(out), logging={"tensorboard": True})
    (Path(out)).mkdir()
    snapshot(config, Path(out) / "submitted" / "1")
    return run(config)


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_files_have_the_permissions_of_the_umask(shards: Path, tmp_path: Path, mask: int) -> None:
    out = tmp_path / "run"
    assert run_ranks(1, train_under, mask, str(shards), str(out)) == [COMPLETE]
    wider = [path for path in [out, *out.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & mask]
    assert wider == []
    assert {"starts.jsonl", "state.json", "checkpoints", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    [line] = (out / "starts.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"time", "step", "world_size", "host", "job", "engine"}
