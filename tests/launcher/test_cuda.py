"""A whole run on a GPU, started by torchrun: through the switch, and again from the midst of the ramp, bit for bit."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from tiny import tiny_tree

pytestmark = pytest.mark.gpu

KEYS = (
    "step",
    "phase",
    "train/loss",
    "train/grad_norm",
    "quant/strength",
    "quant/zero_share",
    "validation/bits_per_byte",
)


def start(config: Path, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [*command, str(ROOT / "launcher" / "pretrain.py"), "--config", str(config)],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def run_through(config: Path) -> str:
    done = start(config)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run: Path) -> list[list[Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(key) for key in KEYS] for row in found]


@pytest.mark.parametrize(
    "engine",
    [{"name": "fsdp2"}, {"name": "fsdp2", "gather": "codes"}, {"name": "deepspeed", "zero_stage": 2}],
    ids=["fsdp2", "codes", "zero-2"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    dtype: str, engine: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    for package in ("streaming", "pydantic", *(["deepspeed"] if engine["name"] == "deepspeed" else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    from safetensors.torch import load_file

    run = tmp_path / "run"
    tree = tiny_tree(request.getfixturevalue("shards"), run) | {
        "engine": engine,
        "checkpoint": {"interval_steps": 1, "keep_last": 0},
        "phases": [
            {"precision": "16-bit", "steps": 4},
            {"precision": "ternary", "steps": 5, "transition": {"ramp": {"shape": "linear", "steps": 3}}},
        ],
    }
    tree["training"]["compute_dtype"] = dtype
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(tree))
    run_through(config)
    whole, state = rows(run), run / "checkpoints" / "step-00000009"
    expected = {path.name: load_file(path) for path in state.glob("*.safetensors")}
    assert [row[4] for row in whole if row[2] is not None] == [0.0] * 4 + [0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    for step in (6, 7, 8, 9):  # on from inside the ramp
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    run_through(config)
    found = {path.name: load_file(path) for path in state.glob("*.safetensors")}
    assert found.keys() == expected.keys()
    assert expected
    for name, tensors in expected.items():
        assert tensors.keys() == found[name].keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name
    assert rows(run) == whole


def test_a_run_takes_no_more_memory_than_the_plan_says(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    for package in ("streaming", "pydantic"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    from launcher.config.file import parse_config
    from launcher.plan.memory import memory_bytes_per_rank
    from launcher.plan.plan import make_plan

    tree = tiny_tree(request.getfixturevalue("shards"), tmp_path / "run") | {
        "engine": {"name": "fsdp2"},
        "phases": [
            {"precision": "16-bit", "steps": 2},
            {"precision": "ternary", "steps": 4, "transition": {"ramp": {"shape": "linear", "steps": 2}}},
        ],
    }
    tree["model"] |= {
        "hidden_size": 1024,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 2816,
    }
    tree["training"] = {"global_batch_sequences": 256, "micro_batch_sequences": 128, "compute_dtype": "bf16"}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(tree))
    estimate = sum(memory_bytes_per_rank(make_plan(parse_config(tree), 1)).values())
    run_through(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peak = max(row["memory/peak_gib"] for row in map(json.loads, lines) if "memory/peak_gib" in row) * 2**30
    assert 0.6 * estimate < peak <= estimate


def test_more_ranks_than_gpus_are_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    for package in ("streaming", "pydantic"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    config = tmp_path / "run.yaml"
    tree = tiny_tree(request.getfixturevalue("shards"), tmp_path / "run") | {"engine": {"name": "fsdp2"}}
    tree["training"] = {"global_batch_sequences": 8 * (torch.cuda.device_count() + 1), "micro_batch_sequences": 4}
    config.write_text(json.dumps(tree))
    done = start(config, torch.cuda.device_count() + 1)
    assert done.returncode != 0
    assert "each rank needs one of its own" in done.stdout + done.stderr
