"""Runs that average their weights: beside training, resumed, moved, taken over at a switch, and started from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import Tensor

from launcher.checkpoint.averaged import AveragedReader
from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.reader import CheckpointReader
from launcher.commands.verify import verify
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError, TrainingError
from launcher.formats import open as opening
from launcher.formats.average import average_of
from launcher.formats.convert import convert_to_run, not_carried
from launcher.formats.open import open_source
from launcher.plan.inputs import missing_inputs
from launcher.plan.memory import checkpoint_bytes, memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.report.summary import summarize
from launcher.run.metrics_log import read_metrics

TOKENS_PER_STEP = 8 * 32
AVERAGING = {"half_life_tokens": 2 * TOKENS_PER_STEP}
PHASES: list[dict[str, Any]] = [
    {"precision": "16-bit", "steps": 4},
    {"precision": "ternary", "steps": 3, "transition": {"ramp": {"shape": "linear", "steps": 2}}},
]


def config_of(shards: str | Path, folder: Path, engine: str = "fsdp2", **sections: Any) -> Config:
    sections = {"averaging": AVERAGING, "phases": PHASES, "engine": ENGINES[engine]} | sections
    evaluation = {"interval_steps": 1, "interval_minutes": None}
    checkpoint = {"interval_steps": 1, "keep_last": 0} | sections.pop("checkpoint", {})
    return tiny_config(Path(shards), folder, evaluation=evaluation, checkpoint=checkpoint, **sections)


def begun_with_averaged(*, optimizer: str = "keep") -> list[dict[str, Any]]:
    """The phases, of which the ternary one begins with averaged weights."""
    return [PHASES[0], PHASES[1] | {"transition": {"weights": "averaged", "optimizer": optimizer}}]


def rows_of(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [tuple(row[key] for key in ("step", "phase", *keys)) for row in rows if set(keys) <= row.keys()]


def whole(folder: Path, step: int, kind: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    reader = CheckpointReader(folder_of(folder / "checkpoints", step))
    return {name: reader.read(kind, name, 0, torch.Size(shape).numel()) for name, shape in reader.shapes.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_and_without(shards: str, out: str, engines: list[str]) -> None:
    for engine in engines:
        assert run(config_of(shards, Path(out, engine, "with"), engine)) == "complete"
        assert run(config_of(shards, Path(out, engine, "without"), engine, averaging={})) == "complete"


@pytest.mark.parametrize(
    ("world_size", "engines"),
    [
        (1, ["fsdp2"]),
        pytest.param(2, ["hsdp", "fsdp2-offload", "zero-0", "zero-1", "zero-2", "zero-3"], marks=pytest.mark.slow),
        pytest.param(2, ["zero-2-offload", "zero-3-offload"], marks=pytest.mark.slow),
    ],
)
def test_an_average_changes_no_bit_of_a_run(shards: Path, tmp_path: Path, world_size: int, engines: list[str]) -> None:
    run_group(world_size, with_and_without, str(shards), str(tmp_path), engines)
    for engine in engines:
        averaged, plain = tmp_path / engine / "with", tmp_path / engine / "without"
        for keys in (("train/loss", "train/grad_norm"), ("validation/loss",)):
            assert rows_of(averaged, *keys) == rows_of(plain, *keys)
        for step in range(1, 8):
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert same(whole(averaged, step, kind), whole(plain, step, kind)), (engine, step, kind)
        measured = rows_of(averaged, "validation/loss_averaged", "validation/bits_per_byte_averaged")
        assert [row[:2] for row in measured] == [(step, 0) for step in range(1, 5)]
        live = {row[0]: row[2] for row in rows_of(averaged, "validation/loss")}
        assert measured[0][2] == live[1], "the average of one step is its weights"
        assert measured[3][2] != live[4]
        assert rows_of(plain, "validation/loss_averaged") == []
        check_saved(averaged)


def check_saved(folder: Path) -> None:
    """The average in each checkpoint is by its definition, that of the weights so far; ternary ones have none."""
    weights = [whole(folder, step, "weight") for step in range(1, 5)]
    for step in range(1, 5):
        factors = [0.5 ** ((step - each) / 2) for each in range(1, step + 1)]
        for name, average in whole(folder, step, "average").items():
            terms = (factor * each[name].double() for factor, each in zip(factors, weights, strict=False))
            assert torch.allclose(average.double(), sum(terms) / sum(factors), rtol=0, atol=5e-7), name
        assert CheckpointReader(folder_of(folder / "checkpoints", step)).averaged_tokens == step * TOKENS_PER_STEP
    for step in range(5, 8):
        reader = CheckpointReader(folder_of(folder / "checkpoints", step))
        assert reader.averaged_tokens is None
        assert not any(name.startswith("average/") for file in reader._files.values() for name in file.entries)


def in_pieces(shards: str, out: str, name: str, engines: list[str], steps: list[int]) -> None:
    for engine, count in zip(engines, steps, strict=True):
        run(config_of(shards, Path(out, name), engine, phases=begun_with_averaged()), count)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow), pytest.param((2, 1), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit(shards: Path, tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Stopped within the first phase, and at the switch, which takes the averaged weights over."""
    first, second = sizes
    run_group(first, in_pieces, str(shards), str(tmp_path), "whole", ["fsdp2"], [10**6])
    run_group(first, in_pieces, str(shards), str(tmp_path), "pieces", ["fsdp2"], [2])
    run_group(second, in_pieces, str(shards), str(tmp_path), "pieces", ["fsdp2", "fsdp2"], [2, 10**6])
    keys = ("train/loss",)
    ours, theirs = rows_of(tmp_path / "whole", *keys), rows_of(tmp_path / "pieces", *keys)
    assert len(ours) == 7
    if first == second:
        assert ours == theirs
        for step in (3, 4, 7):
            assert same(whole(tmp_path / "whole", step, "weight"), whole(tmp_path / "pieces", step, "weight"))
        averages = [whole(tmp_path / name, 4, "average") for name in ("whole", "pieces")]
        assert same(*averages)
    else:
        assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=5e-3)


MOVES = [
    ["fsdp2", "zero-3", "hsdp", "zero-1"],
    ["zero-2", "fsdp2", "zero-0", "zero-3"],
]


def saved_again(shards: str, out: str, engines: list[str]) -> None:
    """Go on with other engines, one step each."""
    for engine in engines:
        run(config_of(shards, Path(out), engine, phases=[PHASES[0] | {"steps": 6}]), 1)


@pytest.mark.slow
@pytest.mark.parametrize("engines", MOVES)
def test_the_average_moves_between_engines(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, saved_again, str(shards), str(tmp_path), engines)
    weights = [whole(tmp_path, step, "weight") for step in range(1, 5)]
    factors = [0.5 ** ((4 - step) / 2) for step in range(1, 5)]
    for name, average in whole(tmp_path, 4, "average").items():
        terms = (factor * each[name].double() for factor, each in zip(factors, weights, strict=True))
        assert torch.allclose(average.double(), sum(terms) / sum(factors), rtol=0, atol=5e-7), name


def trained(shards: str, out: str) -> None:
    assert run(config_of(shards, Path(out))) == "complete"


@pytest.fixture(scope="module")
def trunk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    run_group(1, trained, str(shards), str(folder))
    return folder


def switched(shards: str, out: str, trunk: str) -> None:
    assert run(config_of(shards, Path(out, "switched"), phases=begun_with_averaged())) == "complete"
    start = {"start_from": f"{folder_of(Path(trunk, 'checkpoints'), 4)}@averaged", "start_phase": 1}
    plain = [PHASES[0], PHASES[1] | {"transition": {}}]
    assert run(config_of(shards, Path(out, "started"), phases=plain, checkpoint=start, averaging={})) == "complete"
    converted = config_of(shards, Path(out, "converted"), phases=plain, checkpoint=start, averaging={})
    convert_to_run(converted, open_source(start["start_from"]))
    assert run(converted) == "complete"


@pytest.mark.slow
def test_a_switch_a_start_and_a_conversion_take_the_averaged_weights(shards: Path, tmp_path: Path, trunk: Path) -> None:
    run_group(1, switched, str(shards), str(tmp_path), str(trunk))
    runs = [tmp_path / name for name in ("switched", "started", "converted")]
    losses = [[row for row in rows_of(folder, "train/loss") if row[1] == 1] for folder in runs]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]
    assert losses[0] != [row for row in rows_of(trunk, "train/loss") if row[1] == 1]
    ends = [whole(folder, 7, "weight") for folder in runs]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert same(whole(runs[2], 4, "weight"), whole(trunk, 4, "average"))
    assert same(whole(runs[2], 4, "exp_avg"), whole(trunk, 4, "exp_avg"))


def test_averaged_weights_are_read_as_a_checkpoint_of_no_run(trunk: Path) -> None:
    checkpoint = folder_of(trunk / "checkpoints", 4)
    source, live = open_source(f"{checkpoint}@averaged"), open_source(str(checkpoint))
    assert isinstance(source, AveragedReader)
    assert isinstance(live, CheckpointReader)
    assert source.location == f"{checkpoint}@averaged"
    for name, shape in source.shapes.items():
        length = torch.Size(shape).numel()
        assert torch.equal(source.read("weight", name, 0, length), live.read("average", name, 0, length))
        assert torch.equal(source.read("exp_avg", name, 0, length), live.read("exp_avg", name, 0, length))
        assert live.kinds(name) == (*source.kinds(name), "average")
    assert source.manifest.digest != live.manifest.digest
    assert source.manifest.average is not None
    assert source.manifest.average["of"] == "exponential average of the weights over 1024 tokens, up to step 4"
    assert source.manifest.average["sources"][0]["source_digest"] == live.manifest.digest
    config = opening.config_of(live)
    assert opening.run_of(live, config) == trunk
    assert opening.run_of(source, config) is None
    [sentence] = [text for text in not_carried(live, "hf") if "averaged" in text]
    assert sentence == f"The averaged weights are not carried; convert {checkpoint}@averaged to have them."
    assert not [text for text in not_carried(source, "hf") if "averaged" in text]
    assert verify([source.location], Console(silent=True), as_json=False) == 0
    mean = average_of([source, live])
    assert mean.weights == [1.0, 1.0]


def test_where_there_are_no_averaged_weights_is_said(trunk: Path, tmp_path: Path) -> None:
    ternary = folder_of(trunk / "checkpoints", 7)
    message = r"step-00000007: has no averaged weights; a run saves them in its 16-bit phases if it has averaging"
    for name in (f"{ternary}@averaged", f"{trunk}@averaged"):  # the newest is ternary
        with pytest.raises(CheckpointError, match=message):
            open_source(name)
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such folder"):
        open_source(f"{tmp_path}/nowhere@averaged")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    with pytest.raises(CheckpointError):
        open_source(f"{model}@averaged")
    named = tmp_path / "run@averaged"  # a folder that is really called so
    named.mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint of a known kind"):
        open_source(str(named))


def test_the_folder_of_averaged_weights_is_looked_for(shards: Path, trunk: Path, tmp_path: Path) -> None:
    for place, found in ((trunk, []), (tmp_path / "nowhere", ["no such folder"])):
        config = config_of(shards, tmp_path / "run", checkpoint={"start_from": f"{place}@averaged"})
        problems = missing_inputs(config)
        assert [key for key, _ in problems] == ["checkpoint.start_from"] * len(found)
        assert all(problem.startswith(f"{place}: {what}") for (_, problem), what in zip(problems, found, strict=True))


def test_a_damaged_average_is_named(trunk: Path, tmp_path: Path) -> None:
    checkpoint = folder_of(trunk / "checkpoints", 4)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    [file] = copy.glob("*.safetensors")
    tensors = load_file(file)
    name = "average/model.norm.weight"
    content, wanted = bytearray(file.read_bytes()), tensors[name].numpy().tobytes()
    assert content.count(wanted) == 1
    content[content.index(wanted)] ^= 1
    file.write_bytes(content)
    assert any(name in problem for problem in CheckpointReader(copy).damage())


def test_the_summary_has_the_averaged_loss(trunk: Path) -> None:
    phases = summarize(trunk).phases
    last = rows_of(trunk, "validation/bits_per_byte_averaged")[-1][2]
    assert phases[0].averaged_bits_per_byte == last
    assert phases[1].averaged_bits_per_byte is None


def across(shards: str, out: str) -> None:
    averaging = AVERAGING | {"across_ternary": True}
    phases = [*PHASES[:1], PHASES[1] | {"quantization": {"preset": "paretoq"}}]
    assert run(config_of(shards, Path(out), averaging=averaging, phases=phases)) == "complete"


def test_a_flag_measures_across_a_switch(shards: Path, tmp_path: Path) -> None:
    run_group(1, across, str(shards), str(tmp_path))
    measured = rows_of(tmp_path, "validation/loss_averaged")
    assert [row[:2] for row in measured] == [*((step, 0) for step in range(1, 5)), *((step, 1) for step in range(4, 8))]
    assert CheckpointReader(folder_of(tmp_path / "checkpoints", 7)).averaged_tokens == 7 * TOKENS_PER_STEP
    source = open_source(f"{tmp_path}@averaged")
    assert isinstance(source, AveragedReader)
    assert source.manifest.average is not None
    assert "latent weights of ternary phases, for measurement only" in source.manifest.average["of"]


def with_no_average_yet(shards: str, out: str) -> list[str]:
    """Runs that begin to average where a checkpoint has nothing of it; the weights' average after that, and errors."""
    problems = []
    assert run(config_of(shards, Path(out, "late"), averaging={}), 2) == "interrupted"
    allowed = {"folder": str(Path(out, "late")), "allow_changes": ["averaging", "phases"]}
    assert run(config_of(shards, Path(out, "late"), run=allowed), 2) == "interrupted"
    assert run(config_of(shards, Path(out, "at-the-switch"), averaging={}), 4) == "interrupted"
    allowed |= {"folder": str(Path(out, "at-the-switch"))}
    try:
        run(config_of(shards, Path(out, "at-the-switch"), run=allowed, phases=begun_with_averaged()))
    except TrainingError as error:
        problems.append(str(error))
    return problems


def test_an_average_begins_anew_where_there_was_none(shards: Path, tmp_path: Path) -> None:
    [problems] = run_group(1, with_no_average_yet, str(shards), str(tmp_path))
    assert len(problems) == 1
    assert "no step before this phase is averaged" in problems[0]
    reader = CheckpointReader(folder_of(tmp_path / "late" / "checkpoints", 4))
    assert reader.averaged_tokens == 2 * TOKENS_PER_STEP
    third, fourth = (whole(tmp_path / "late", step, "weight") for step in (3, 4))
    for name, average in whole(tmp_path / "late", 4, "average").items():
        expected = (0.5**0.5 * third[name].double() + fourth[name].double()) / (0.5**0.5 + 1)
        assert torch.allclose(average.double(), expected, rtol=0, atol=5e-7), name


TERNARY = PHASES[1] | {"transition": {}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"averaging": {"half_life_tokens": 0}}, r"averaging\.half_life_tokens: is 0; must be 1 or more, or null"),
    ({"averaging": {"half_life_tokens": 100}}, r"is 100, less than the 256 tokens of a step; it counts tokens, so 100"),
    ({"averaging": {"ema_decay": 0.9}}, r"averaging\.ema_decay: unknown key; did you mean averaging\.half_life_tokens"),
    ({"phases": [TERNARY]}, r"all phases are ternary, and the mean of latent weights rounds to other codes"),
    ({"averaging": {"across_ternary": True}}, r"across_ternary: .*because averaging\.half_life_tokens is null"),
    (
        {"averaging": AVERAGING | {"across_ternary": True}, "phases": PHASES[:1]},
        r"across_ternary: .*because no phase is ternary",
    ),
    (
        {"phases": [PHASES[0], TERNARY, PHASES[0] | {"transition": {"weights": "averaged"}}]},
        r"phases\.2\.transition\.weights: is averaged, but the phase before is ternary, and the mean of latent",
    ),
    (
        {"phases": begun_with_averaged(), "averaging": {}},
        r"weights: is averaged, but averaging\.half_life_tokens is null; set it",
    ),
    (
        {"phases": begun_with_averaged(), "checkpoint": {"start_from": "trunk", "start_phase": 1}},
        r"weights: is averaged, but the run begins with this phase; set checkpoint\.start_from to trunk@averaged",
    ),
    (
        {"phases": [PHASES[0] | {"transition": {"weights": "averaged"}}]},
        r"phases\.0\.transition: has nothing to carry over",
    ),
]


@pytest.mark.parametrize(("sections", "message"), WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("shards", tmp_path, **sections)


def test_a_checkpoint_without_an_average_starts_no_run_with_it(shards: Path, tmp_path: Path, trunk: Path) -> None:
    start = {"start_from": f"{folder_of(trunk / 'checkpoints', 6)}@averaged"}
    with pytest.raises(CheckpointError, match="step-00000006: has no averaged weights"):
        convert_to_run(config_of(shards, tmp_path, checkpoint=start), open_source(start["start_from"]))


def test_the_plan_counts_the_average(shards: Path, tmp_path: Path) -> None:
    elements = sum(torch.Size(shape).numel() for shape in make_shapes(shards, tmp_path).values())
    for engine, copies in (("fsdp2", 1 / 4), ("hsdp", 1 / 2), ("zero-0", 1), ("zero-1", 1 / 4), ("zero-3", 1 / 4)):
        plan = make_plan(config_of(shards, tmp_path, engine), 4)
        plain = make_plan(config_of(shards, tmp_path, engine, averaging={}), 4)
        sizes, without = memory_bytes_per_rank(plan), memory_bytes_per_rank(plain)
        assert sizes.pop("average") == 4 * elements * copies
        assert sizes == without
        assert checkpoint_bytes(plan) - checkpoint_bytes(plain) == 4 * elements
    assert memory_bytes_per_rank(make_plan(config_of(shards, tmp_path, "fsdp2-offload"), 4))["average"] == 0


def make_shapes(shards: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    from model.size import parameter_shapes

    return dict(parameter_shapes(config_of(shards, folder).model))
