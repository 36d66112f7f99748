"""Learned scales on sharded models: what they begin with, how they go through checkpoints, and that they learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODEL, shard, step_once
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config

from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError
from launcher.formats.convert import convert_to_run, not_carried
from launcher.formats.open import open_source
from launcher.run.metrics_log import read_metrics
from model.transformer import Transformer
from quant.config import PRESETS
from quant.linear import add_learned_scales_, is_learned_scale
from quant.rounding import bf16_values

PARETOQ = {"precision": "ternary", "steps": 3, "quantization": {"preset": "paretoq"}}
PLAIN = {"precision": "16-bit", "steps": 3}
INTERVAL = {"interval_steps": 1, "keep_last": 0}


def train_on(shards: str, out: str, engines: list[str], sections: dict[str, Any], pieces: list[int]) -> None:
    for name in engines:
        keys = {"phases": [PLAIN, PARETOQ], "engine": ENGINES[name], "checkpoint": INTERVAL} | sections
        config = tiny_config(Path(shards), Path(out) / name, **keys)
        for steps in (*pieces, 10**6):
            run(config, steps)


def tensors(run: Path, step: int, kind: str = "weight") -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08}")
    return {name: reader.read(kind, name, 0, shape.numel()).view(shape) for name, shape in
            ((name, torch.Size(shape)) for name, shape in reader.shapes.items())}  # fmt: skip


def scales(run: Path, step: int, kind: str = "weight") -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(run, step, kind).items() if is_learned_scale(name)}


def check_scales(run: Path) -> None:
    """Ones until the switch; then within a step's reach of the rows' largest weights; moments of their own."""
    assert all((scale == 1).all() for scale in scales(run, 3).values())
    assert all((moment == 0).all() for moment in scales(run, 3, "exp_avg_sq").values())
    at_switch, first = tensors(run, 3), scales(run, 4)
    assert len(first) == 14
    for name, scale in first.items():
        largest = bf16_values(at_switch[name.replace("_scale", "")]).abs().amax(1)
        # AdamW's first step moves by the learning rate and no further, since the moments begin anew.
        assert 0 < (scale - largest).abs().max() <= 3e-3 * 1.001
    reader = CheckpointReader(run / "checkpoints" / "step-00000004")
    assert reader.read_step(next(iter(first))) == 1
    assert reader.read_step(next(iter(first)).replace("_scale", "")) == 4
    assert any((after - first[name]).abs().max() > 0 for name, after in scales(run, 6).items())


@pytest.mark.parametrize(
    "engines", [["fsdp2", "zero-2"], pytest.param(["zero-0", "zero-1", "zero-3"], marks=pytest.mark.slow)]
)
def test_scales_begin_at_the_switch_on_every_engine(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, train_on, str(shards), str(tmp_path), engines, {}, [])
    run_group(1, train_on, str(shards), str(tmp_path / "single"), ["fsdp2"], {}, [])
    for name in engines:
        check_scales(tmp_path / name)
        alone = scales(tmp_path / "single" / "fsdp2", 4)
        for parameter, scale in scales(tmp_path / name, 4).items():
            torch.testing.assert_close(scale, alone[parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_learned_scales_resumes_bitwise(shards: Path, tmp_path: Path) -> None:
    for name, pieces in (("whole", []), ("pieces", [2, 2, 1])):
        run_group(2, train_on, str(shards), str(tmp_path / name), ["fsdp2"], {}, pieces)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        whole, pieces = (tensors(tmp_path / name / "fsdp2", 6, kind) for name in ("whole", "pieces"))
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def steps_with_and_without_scales() -> list[list[tuple[float, ...]]]:
    found = []
    for learned in (False, True):
        with torch.device("meta"):
            model = Transformer(MODEL)
            if learned:
                add_learned_scales_(model, PRESETS["paretoq"])
        engine = shard(model, "fsdp2", torch.float32)
        found.append([step_once(engine, step) for step in range(8)])
    return found


def test_scales_change_no_bit_of_a_16_bit_phase() -> None:
    """Its norm of gradients, which clips them, has no terms for scales: arms share a trunk that knows of none."""
    [(without, with_scales)] = run_group(1, steps_with_and_without_scales)
    assert with_scales == without


def test_scales_that_a_checkpoint_lacks_are_ones_until_the_switch(shards: Path, tmp_path: Path) -> None:
    """Memory that nothing has written to may hold anything."""
    run_group(1, train_on, str(shards), str(tmp_path / "plain"), ["fsdp2"], {"phases": [PLAIN]}, [])
    start = {"checkpoint": INTERVAL | {"start_from": str(tmp_path / "plain" / "fsdp2")}}
    for engine in ("fsdp2", "zero-1"):
        run_group(1, train_on, str(shards), str(tmp_path / "learned"), [engine], start, [2])
        for step in (1, 2, 3):
            assert all((scale == 1).all() for scale in scales(tmp_path / "learned" / engine, step).values())
            moments = scales(tmp_path / "learned" / engine, step, "exp_avg")
            assert len(moments) == 14
            assert not any(moment.any() for moment in moments.values())


@pytest.mark.slow
def test_a_plain_16_bit_checkpoint_becomes_a_run_with_learned_scales_and_back(shards: Path, tmp_path: Path) -> None:
    run_group(1, train_on, str(shards), str(tmp_path / "plain"), ["fsdp2"], {"phases": [PLAIN]}, [])
    source = str(tmp_path / "plain" / "fsdp2")
    start = {"checkpoint": INTERVAL | {"start_from": source, "start_phase": 1}}
    run_group(1, train_on, str(shards), str(tmp_path / "learned"), ["fsdp2"], start, [])
    run_group(1, train_on, str(shards), str(tmp_path / "within"), ["fsdp2"], {}, [])
    started, within = (tensors(tmp_path / name / "fsdp2", 6) for name in ("learned", "within"))
    assert all(torch.equal(started[name], within[name]) for name in within)
    learned = open_source(str(tmp_path / "learned" / "fsdp2"))
    assert any("Learned scales are not carried" in sentence for sentence in not_carried(learned, "hf"))
    back = {"phases": [PLAIN, PLAIN], "checkpoint": INTERVAL | {"start_from": learned.location}}
    run_group(1, train_on, str(shards), str(tmp_path / "back"), ["fsdp2"], back, [])
    assert not scales(tmp_path / "back" / "fsdp2", 6)


@pytest.mark.slow
def test_scales_that_were_trained_for_the_same_levels_stay(shards: Path, tmp_path: Path) -> None:
    """In the next phase, in a run that starts from the checkpoint, and in one that it is converted for."""
    of_mlp = PARETOQ | {"quantization": {"preset": "paretoq", "include": r"mlp\.\w+_proj$"}}
    four_bits = PARETOQ | {"quantization": PARETOQ["quantization"] | {"levels": "int4"}}
    run_group(1, train_on, str(shards), str(tmp_path), ["fsdp2"], {"phases": [of_mlp, PARETOQ, four_bits]}, [])
    first = tmp_path / "fsdp2"
    source = str(first / "checkpoints" / "step-00000006")
    start = {"phases": [PARETOQ], "checkpoint": INTERVAL | {"start_from": source}}
    run_group(1, train_on, str(shards), str(tmp_path / "started"), ["fsdp2"], start, [])
    converted = tiny_config(shards, tmp_path / "converted" / "fsdp2", engine=ENGINES["fsdp2"], **start)
    convert_to_run(converted, open_source(source))
    run_group(1, train_on, str(shards), str(tmp_path / "converted"), ["fsdp2"], start, [])
    reached = 3e-3 * 1.001, 1 / 128  # the learning rate, and bf16's half step of what scales are used with

    def is_near(scale: torch.Tensor, other: torch.Tensor) -> bool:
        return bool(((scale - other).abs() <= reached[0] + reached[1] * other.abs()).all())

    weights, moved = tensors(first, 6), []
    for name, scale in scales(first, 6).items():
        largest = bf16_values(weights[name.replace("_scale", "")]).abs().amax(1)
        moved.append(not is_near(scale, largest))
        assert is_near(scales(first, 4)[name], scales(first, 3)[name]) == (".mlp." in name), name
        assert is_near(scales(first, 7)[name], largest / 7)
        for folder in ("started", "converted"):
            assert is_near(scales(tmp_path / folder / "fsdp2", 1)[name], scale)
    assert any(moved)  # so far that an initial value would not do


def test_a_checkpoint_without_scales_is_refused_within_their_phase(shards: Path, tmp_path: Path) -> None:
    run_group(1, train_on, str(shards), str(tmp_path), ["fsdp2"], {"phases": [PLAIN, PLAIN]}, [5])
    with pytest.raises(CheckpointError, match="is of a phase without learned scales"):
        run_group(1, train_on, str(shards), str(tmp_path), ["fsdp2"], {"run": {"allow_changes": ["phases.1"]}}, [])


@pytest.mark.parametrize(
    "engines", [["fsdp2"], pytest.param(["zero-0", "zero-1", "zero-2", "zero-3"], marks=pytest.mark.slow)]
)
def test_a_ramp_is_looked_at_while_scales_have_no_gradient(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    ramped = PARETOQ | {"transition": {"ramp": {"shape": "linear", "steps": 2}}}
    run_group(1, train_on, str(shards), str(tmp_path), engines, {"phases": [PLAIN, ramped]}, [])
    for name in engines:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        norms = [row["quant/grad_norm"] for row in rows if "quant/grad_norm" in row]
        assert norms
        assert min(norms) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-0", "zero-1", "zero-2", "zero-3", "zero-3-offload"])
def test_scales_without_a_gradient_take_the_steps_that_they_take_on_other_engines(
    shards: Path, tmp_path: Path, name: str
) -> None:
    """Of the block that a ramp reaches last, and of all blocks in a phase without learned scales."""
    ramp = {"shape": "linear", "steps": 4, "order": "front-to-back"}
    phases = [PLAIN, PARETOQ | {"steps": 5, "transition": {"ramp": ramp}}, PLAIN]
    run_group(1, train_on, str(shards), str(tmp_path), ["fsdp2", name], {"phases": phases}, [])
    for step in range(4, 12):
        folders = (tmp_path / each / "checkpoints" / f"step-{step:08}" for each in ("fsdp2", name))
        ours, theirs = map(CheckpointReader, folders)
        for parameter, scale in scales(tmp_path / "fsdp2", step).items():
            assert ours.read_step(parameter) == theirs.read_step(parameter)
            torch.testing.assert_close(scale, scales(tmp_path / name, step)[parameter], rtol=1e-4, atol=2e-5)
    at_end, later = (scales(tmp_path / "fsdp2", step) for step in (8, 11))
    assert all(torch.equal(later[parameter], scale) for parameter, scale in at_end.items())
