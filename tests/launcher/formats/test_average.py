"""Averages equal a mean over whole tensors, are checkpoints like any other, and are refused where they mean nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import tritrain
from exports import make_older, model_tree, write_checkpoint
from hf_folders import ModelSource, whole, write_variant
from hypothesis import given
from hypothesis import strategies as st
from models import VARIANTS, build
from places import ROOT
from ranks import run_group
from runs import run as train
from tiny import tiny_config

from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.average import AverageSource
from launcher.formats.hf_folder import write_hf
from launcher.formats.open import open_source
from launcher.formats.opened import open_exportable
from launcher.formats.start import open_start
from launcher.inference.load import load_model
from launcher.plan.course import make_course
from launcher.run.metrics_log import read_metrics
from model.transformer import ModelConfig, Transformer

LLAMA = VARIANTS["llama"]
PHASES: list[dict[str, Any]] = [
    {"precision": "16-bit", "steps": 8},
    {"precision": "ternary", "steps": 8, "transition": {"optimizer": "reset", "ramp": {"steps": 4}}},
    {"precision": "16-bit", "steps": 8, "transition": {"optimizer": "reset"}},
]


@pytest.fixture
def make(shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of a run with phases of 8 steps: 16-bit, ternary, 16-bit."""

    def checkpoint(step: int, phase: int = 0, *, name: str = "run", model: ModelConfig = LLAMA, **options: Any) -> Path:
        config = config_of_run(shards, tmp_path / name, model)
        return write_checkpoint(config, build(model, seed=step), step=step, phase=phase, **options)

    return checkpoint


def config_of_run(shards: Path, run: Path, model: ModelConfig = LLAMA, **sections: Any) -> Config:
    tree = {**model_tree(model), "max_sequence_length": 128}
    return tiny_config(shards, run, run={"name": run.name}, model=tree, phases=PHASES, **sections)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: whole(reader, name) for name in reader.shapes}


def mean(folders: Sequence[Path], weights: Sequence[int] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """The oracle: every tensor in memory, in the widest floats that numpy has, rounded to fp32 at the end."""
    weights, loaded = weights or [1] * len(folders), [tensors(folder) for folder in folders]
    result = {}
    for name in loaded[0]:
        wide = [tree[name].numpy().astype(np.longdouble) for tree in loaded]
        total = sum((weight * values for weight, values in zip(weights, wide, strict=True)), np.longdouble(0))
        result[name] = (total / sum(weights)).astype(np.float32)
    return result


def test_the_mean_of_one_is_that_one(make: Any, tmp_path: Path) -> None:
    source = make(4)
    tritrain("average", source, "--out", tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)


@pytest.mark.parametrize("count", [2, 4])
def test_the_mean_of_a_power_of_two_is_exact(make: Any, tmp_path: Path, count: int) -> None:
    sources = [make(step) for step in range(1, count + 1)]
    tritrain("average", *sources, "--out", tmp_path / "out")
    expected = mean(sources)
    assert all(np.array_equal(tensor.numpy(), expected[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_decay_halves_the_weight_of_each_earlier_checkpoint(make: Any, tmp_path: Path) -> None:
    sources = [make(step) for step in (2, 4, 6)]
    said = tritrain("average", *reversed(sources), "--decay", "0.5", "--out", tmp_path / "out")
    shares = [line.split()[-2:] for line in said.splitlines()[1:4]]
    assert shares == [["2", "0.1429"], ["4", "0.2857"], ["6", "0.5714"]]
    expected = mean(sources, [1, 2, 4])
    assert all(np.array_equal(tensor.numpy(), expected[name]) for name, tensor in tensors(tmp_path / "out").items())


class Values:
    """One tensor, as `CheckpointReader` would read it."""

    location = "values"

    def __init__(self, values: Sequence[float]) -> None:
        self.values = torch.tensor(values)
        self.shapes = {"x": tuple(self.values.shape)}

    def read_finite(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        return self.values[start : start + length].clone()


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(FLOATS, min_size=37, max_size=37), min_size=1, max_size=5), st.sampled_from([None, 0.5, 0.9]))
def test_every_element_is_averaged_alike(rows: list[list[float]], decay: float | None) -> None:
    source = AverageSource([Values(row) for row in rows], decay)  # type: ignore[list-item,arg-type]
    result = source.read("weight", "x", 0, 37)
    weights = [(decay or 1.0) ** k for k in reversed(range(len(rows)))]
    assert source.weights == pytest.approx(weights, rel=1e-15)
    for index in range(37):
        column = [row[index] for row in rows]
        total = weights_times(source.weights, column)
        expected = float(np.float32(total / math.fsum(source.weights)))
        assert result[index].item() == expected
        assert source.read("weight", "x", index, 1).item() == expected
        assert min(column) <= expected <= max(column)


def weights_times(weights: list[float], column: list[float]) -> float:
    """Sum in Python's floats, which no vector unit fuses."""
    total = weights[0] * column[0]
    for weight, value in zip(weights[1:], column[1:], strict=True):
        total += weight * value
    return total


def test_the_average_is_independent_of_order_and_of_pieces(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [make(step) for step in (1, 2, 3, 5)]
    tritrain("average", *sources, "--out", tmp_path / "one")
    monkeypatch.setattr("launcher.checkpoint.source.PIECE_ELEMENTS", 13)
    tritrain("average", *reversed(sources), "--out", tmp_path / "two")
    name = "rank-00000.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_manifest_names_sources_and_has_the_place_of_the_newest(make: Any, tmp_path: Path, shards: Path) -> None:
    sources = [make(step, tokenizer=shards / "tokenizer.model") for step in (6, 8)]
    tritrain("average", *sources, "--out", tmp_path / "out")
    manifest, newest = CheckpointReader(tmp_path / "out").manifest, CheckpointReader(sources[1]).manifest
    assert (manifest.step, manifest.tokens, manifest.progress, manifest.precision) == (
        newest.step, newest.tokens, newest.progress, newest.precision,
    )  # fmt: skip
    assert not manifest.has_moments
    assert manifest.files["tokenizer.model"] == newest.files["tokenizer.model"]
    assert manifest.average == {
        "kind": "mean",
        "decay": None,
        "across_ternary": False,
        "of": "mean of steps 6, 8",
        "sources": [
            {
                "run": "run",
                "step": step,
                "source": str(source),
                "source_digest": json.loads((source / "manifest.json").read_text())["digest"],
                "share": 0.5,
            }
            for step, source in zip((6, 8), sources, strict=True)
        ],
    }
    assert tritrain("verify", tmp_path / "out").endswith("out: sound\n")


def test_checkpoints_of_version_1_are_averaged_too(make: Any, tmp_path: Path, shards: Path) -> None:
    sources = [make(step, tokenizer=shards / "tokenizer.model") for step in (6, 8)]
    make_older(sources[0])
    tritrain("average", *sources, "--out", tmp_path / "out")
    make_older(sources[1])
    tritrain("average", *sources, "--out", tmp_path / "older")
    first, second = (CheckpointReader(tmp_path / name).manifest for name in ("out", "older"))
    assert first.precision == second.precision == Precision.in_16_bits(LLAMA.num_layers)
    assert first.files["tokenizer.model"] == second.files["tokenizer.model"]  # which the run's data have
    assert first.files["rank-00000.safetensors"] == second.files["rank-00000.safetensors"]


def test_last_takes_the_newest_of_the_last_16_bit_phase(make: Any, tmp_path: Path) -> None:
    for step, phase in ((2, 0), (6, 0), (8, 0), (12, 1), (16, 1)):
        make(step, phase)
    run = tmp_path / "run"
    said = tritrain("average", run, "--last", "2", "--out", tmp_path / "out")
    assert [Path(line.split()[0]).name for line in said.splitlines()[1:3]] == ["step-00000006", "step-00000008"]
    few = r"--last 4: .*checkpoints has only 3 of phase 0, at steps 2, 6, 8; lower it, or keep more .*\.keep_last"
    with pytest.raises(ConfigError, match=few):
        tritrain("average", run / "checkpoints", "--last", "4", "--out", tmp_path / "more")
    make(20, 2)
    with pytest.raises(ConfigError, match=r"only 1 of phase 2, at step 20;"):
        tritrain("average", run, "--last", "2", "--out", tmp_path / "more")
    tritrain("average", run, "--last", "1", "--out", tmp_path / "latest")
    assert CheckpointReader(tmp_path / "latest").manifest.step == 20


@pytest.mark.parametrize("step", [9, 12, 16])
def test_ternary_and_ramped_checkpoints_are_refused_unless_they_are_to_be_measured(
    make: Any, tmp_path: Path, step: int
) -> None:
    sources, out = [make(step - 1 if step > 9 else 15, 1), make(step, 1)], tmp_path / "out"
    reason = r"after step \d+, is of a ternary phase, and the mean of latent weights rounds to other codes"
    with pytest.raises(CheckpointError, match=reason):
        tritrain("average", *sources, "--out", out)
    with pytest.raises(CheckpointError, match=r"all of its checkpoints are of ternary phases, and the mean"):
        tritrain("average", sources[0].parent, "--last", "2", "--out", out)
    assert not out.exists()
    tritrain("average", *sources, "--across-ternary", "--out", out)
    manifest = CheckpointReader(out).manifest
    assert manifest.average is not None
    assert manifest.average["across_ternary"] is True
    assert manifest.average["of"].endswith("latent weights of ternary phases, for measurement only")
    newest = max(sources, key=lambda source: source.name)
    assert manifest.precision == CheckpointReader(newest).manifest.precision


def test_a_ternary_phase_between_is_one_across(make: Any, tmp_path: Path) -> None:
    sources = [make(8), make(20, 2)]
    with pytest.raises(CheckpointError, match=r"a ternary phase lies between .*step-00000008 and .*step-00000020, and"):
        tritrain("average", *sources, "--out", tmp_path / "out")
    tritrain("average", *sources, "--across-ternary", "--out", tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").manifest.average["across_ternary"] is True  # type: ignore[index]


def test_what_does_not_fit_together_is_refused(make: Any, shards: Path, tmp_path: Path) -> None:
    first, out = make(4, tokenizer=shards / "tokenizer.model"), tmp_path / "out"

    def said(*others: Path, options: Sequence[str] = ()) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as refused:
            tritrain("average", first, *others, *options, "--out", out)
        assert not out.exists()
        return str(refused.value)

    def other(**changes: Any) -> Path:
        return Path(make(6, name=f"other-{len(list(tmp_path.iterdir()))}", **changes))

    assert "model.embed_tokens.weight: [96, 32] in the checkpoint, [100, 32] in the model" in said(
        other(model=ModelConfig(**{**vars(LLAMA), "vocab_size": 100}))
    )
    assert "model.rope_theta is 10000.0 in it, and 500.0 in" in said(
        other(model=ModelConfig(**{**vars(LLAMA), "rope_theta": 500.0}))
    )
    another = tmp_path / "tokenizer.json"
    another.write_text("{}")
    assert f"{first} has another tokenizer than" in said(other(tokenizer=another))
    assert "step-00000004: is named twice, or a copy of it is" in said(first)
    shutil.copytree(first, tmp_path / "copy")
    assert "is named twice, or a copy of it is" in said(tmp_path / "copy")
    assert "are of different precision" in said(make(12, 1), options=["--across-ternary"])
    assert "of one step, among steps 4, 4" in said(make(4, name="third"), options=["--decay", "0.5"])
    for decay in ("0", "1", "-0.5", "nan"):
        assert f"--decay {float(decay):g}: must be above 0 and below 1" in said(make(6), options=["--decay", decay])
    assert "--last 2: belongs to one run, and 2 places are named" in said(make(6), options=["--last", "2"])
    write_variant(tmp_path / "hf")
    assert "hf: is no checkpoint of Tritrain" in said(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"run: is a run; say with --last N how many"):
        tritrain("average", tmp_path / "run", "--out", out)
    with pytest.raises(CheckpointError, match="has no complete checkpoints"):
        tritrain("average", first, "--last", "1", "--out", out)


def test_a_damaged_source_is_named_and_nothing_is_written(make: Any, tmp_path: Path) -> None:
    sources = [make(4), make(6)]
    file = sources[1] / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-400] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000006/rank-00000.safetensors: \S+ is damaged"):
        tritrain("average", *sources, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_average_takes_no_other_s_place(make: Any, tmp_path: Path) -> None:
    source = make(4)
    building = source.parent / "step-00000005.tmp"  # what the run is writing
    building.mkdir()
    with pytest.raises(CheckpointError, match="step-00000005: a run would take it for a checkpoint of its own"):
        tritrain("average", source, "--out", folder_of(source.parent, 5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(CheckpointError, match="full: already exists; choose another name, or remove it"):
        tritrain("average", source, "--out", tmp_path / "full")
    tritrain("average", source, "--out", source.parent / "average")
    assert open_source(str(tmp_path / "run")).location == str(source)
    assert building.is_dir()
    assert not [path for path in source.parent.iterdir() if "tritrain-" in path.name]


KILLED = """
import os, signal, sys
from launcher.checkpoint import writer
from launcher.cli import main

def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(writer.CheckpointWriter, sys.argv.pop(1), killed)
main()
"""


@pytest.mark.slow
def test_a_killed_average_leaves_nothing_under_its_name(make: Any, tmp_path: Path) -> None:
    source, out = make(4), tmp_path / "averages" / "out"
    command = [sys.executable, "-c", KILLED, "finish", "average", source, "--out", out]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    tritrain("average", source, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_average_loads_and_is_exported_as_what_it_is(make: Any, tmp_path: Path) -> None:
    sources, out = [make(6), make(8)], tmp_path / "out"
    run = tmp_path / "run"
    row = {"step": 8, "phase": 0, "validation/loss": 1.2345}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    tritrain("average", *sources, "--out", out)
    expected = Transformer(LLAMA)
    expected.load_state_dict({name: torch.from_numpy(value) for name, value in mean(sources).items()})
    tokens = torch.arange(17)[None]
    with torch.no_grad():
        logits = load_model(out, dtype=torch.float32).model(tokens).logits
        assert torch.equal(logits, expected.eval()(tokens).logits)
    tritrain("export", out, "--to", tmp_path / "hf", "--format", "hf", "--no-tokenizer", "--dtype", "fp32")
    assert json.loads((tmp_path / "hf" / "provenance.json").read_text())["average"] == "mean of steps 6, 8"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| average | `mean of steps 6, 8` |" in card
    assert "1.2345" not in card  # which the run measured on the live weights
    tritrain("export", sources[1], "--to", tmp_path / "live", "--format", "hf", "--no-tokenizer")
    assert "1.2345" in (tmp_path / "live" / "README.md").read_text()


def test_scores_of_an_average_do_not_mix_with_its_run_s(make: Any, tmp_path: Path) -> None:
    source = make(8)
    tritrain("average", source, "--out", tmp_path / "out")
    assert open_exportable(str(source), ternary=False).run == tmp_path / "run"
    assert open_exportable(str(tmp_path / "out"), ternary=False).run is None


def start_from_an_average(shards: str, out: str) -> None:
    phases = [{"precision": "16-bit", "steps": 6}, {"precision": "ternary", "steps": 2}]
    folder = Path(out)
    checkpoint = {"interval_steps": 2, "keep_last": 0}
    trunk = tiny_config(Path(shards), folder / "trunk", phases=phases[:1], checkpoint=checkpoint)
    train(trunk)
    tritrain("average", folder / "trunk", "--last", "3", "--out", folder / "average")
    expected = Transformer(trunk.model)
    sources = [folder_of(folder / "trunk" / "checkpoints", step) for step in (2, 4, 6)]
    expected.load_state_dict({name: torch.from_numpy(value) for name, value in mean(sources).items()})
    write_hf(ModelSource(expected), trunk.model, folder / "hf", torch.float32)

    def starting(name: str, optimizer: str) -> Config:
        start = {"start_from": str(folder / name), "start_phase": 1}
        ternary = phases[1] | {"transition": {"optimizer": optimizer}}
        return tiny_config(Path(shards), folder / f"from-{name}", phases=[phases[0], ternary], checkpoint=start)

    no_moments = r"average has no optimizer moments, and phases.1.transition.optimizer is keep; set it to reset"
    with pytest.raises(CheckpointError, match=no_moments):
        open_start(make_course(starting("average", "keep")))
    for name in ("average", "hf"):
        train(starting(name, "reset"))


def test_a_run_starts_from_an_average_as_from_its_weights(shards: Path, tmp_path: Path) -> None:
    run_group(1, start_from_an_average, str(shards), str(tmp_path))
    losses = [
        {
            row["step"]: row["train/loss"]
            for row in read_metrics(tmp_path / run / "metrics.jsonl")
            if "train/loss" in row
        }
        for run in ("from-average", "from-hf")
    ]
    assert list(losses[0]) == [7, 8]
    assert losses[0] == losses[1]
