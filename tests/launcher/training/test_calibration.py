"""Calibration at a switch: against one process by hand, on every engine, resumed and converted bitwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from command import outcome, tritrain
from engines import MODEL, NUM_SEQUENCES, batch, build, gathered
from ranks import run_group
from runs import ENGINES as ENGINE_CONFIGS
from runs import run
from safetensors.torch import load_file
from tiny import tiny_config, tiny_tree
from torch import Tensor

from launcher.checkpoint.reader import CheckpointReader
from launcher.config.file import load_config
from launcher.engine.learned_scales import initialize_scales_
from launcher.errors import TrainingError
from launcher.inference.load import load_model
from launcher.plan.plan import make_plan
from launcher.run.metrics_log import read_metrics
from launcher.training.calibration import calibrate_, moment_of
from launcher.training.switch import batches_needed, calibration_batches
from model.init import initialize_
from model.transformer import Transformer
from quant.calibration import calibrate
from quant.config import CalibrationConfig, QuantConfig
from quant.linear import LEARNED_SCALE, add_learned_scales_, quantize_, quantized_layers
from quant.rounding import bf16_values, first_alpha

CALIBRATION = CalibrationConfig(sequences=NUM_SEQUENCES)
RECIPES = {
    "gaussian": QuantConfig(),
    "rotated rows": QuantConfig(granularity="row", hadamard="outputs", include=r"(o|up)_proj"),  # other widths are odd
    "learned": QuantConfig(weights="learned", granularity="row", activations="none"),
}
MICRO = 2


def micro_batches(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    tokens, labels = batch(0)
    rows = NUM_SEQUENCES // world_size
    mine = range(rank * rows, (rank + 1) * rows, MICRO)
    return [(tokens[at : at + MICRO], labels[at : at + MICRO]) for at in mine]


def calibrated_by_engines(names: list[str], recipe: str) -> dict[str, Any]:
    """Weights after a calibration of each engine's initial model."""
    results = {}
    for name in names:
        config, kind, keys = RECIPES[recipe], name, {}
        if name == "hsdp":
            kind, keys = "fsdp2", {"replicas": 2}
        engine = build_with_scales(kind, config, **keys)
        quantize_(engine.model, config, engine.device)
        initialize_scales_(engine)
        lines: list[str | None] = []
        found = calibrate_(engine, CALIBRATION, micro_batches(dist.get_rank(), dist.get_world_size()), lines.append)
        said = [line for line in lines if line is not None]
        assert [line.split(":")[0] for line in said] == ["block 0", "block 1"]
        assert said[1].endswith("; 0 s remain")
        assert found.num_sequences == NUM_SEQUENCES
        assert found.error_after < found.error_before
        # The model computes with what was written.
        nll = engine.token_nll(*(part[:2] for part in batch(0)))
        results[name] = {"weights": gathered(engine, "weight"), "nll": nll, "errors": [*found[:2]]}
    return results


def build_with_scales(name: str, config: QuantConfig, **keys: Any) -> Any:
    import engines

    with torch.device("meta"):
        model = Transformer(MODEL)
    if config.learned:
        add_learned_scales_(model, config)
    original = engines.initial_value
    engines.initial_value = lambda name, shape, model, seed, rows: (  # type: ignore[assignment]
        torch.ones(len(rows)) if name.endswith(LEARNED_SCALE) else original(name, shape, model, seed, rows)
    )
    try:
        return engines.shard(model, name, torch.float32, **keys)
    finally:
        engines.initial_value = original


@torch.no_grad()
def calibrated_by_hand(recipe: str, world_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same in one process, on a plain model: hooks, one layer after the other, and no part of an engine."""
    config, model = RECIPES[recipe], Transformer(MODEL)
    initialize_(model, 0)
    if config.learned:
        add_learned_scales_(model, config)
    quantize_(model, config)
    layers = quantized_layers(model)
    if config.learned:
        for layer in layers.values():
            getattr(layer, LEARNED_SCALE).copy_(first_alpha(bf16_values(layer.weight).abs().amax(1), config.levels))
    # Queries, keys and values first, then the output projection, and so on: all that share an input at once.
    order: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        block, part = name.rsplit(".", 1)[0], name.rsplit(".", 1)[1]
        kind = {"q_proj": "in", "k_proj": "in", "v_proj": "in", "gate_proj": "in", "up_proj": "in"}.get(part, part)
        order.setdefault((block, kind), []).append(name)
    for names in order.values():
        moment = torch.zeros(layers[names[0]].in_features, layers[names[0]].in_features, dtype=torch.float64)

        def add(layer: Any, inputs: tuple[Tensor], moment: Tensor = moment) -> None:
            codes = layer.input_codes(inputs[0])
            x = (inputs[0] if codes is None else codes[0] * codes[1]).flatten(0, -2).float()
            moment += x.T @ x

        hook = layers[names[0]].register_forward_pre_hook(add)
        for rank in range(world_size):
            for tokens, labels in micro_batches(rank, world_size):
                model(tokens, labels)
        hook.remove()
        for name in names:
            layer = layers[name]
            fit = calibrate(layer.weight, moment, config, CALIBRATION, rotated=layer.rotated)
            layer.weight.copy_(fit.weight)
            if fit.alpha is not None:
                getattr(layer, LEARNED_SCALE).copy_(fit.alpha)
    nll = model(*(part[:2] for part in batch(0)), reduction="none").token_nll
    return {name: parameter.clone() for name, parameter in model.named_parameters()}, nll


@pytest.mark.parametrize(
    ("world_size", "engines", "recipes"),
    [
        pytest.param(1, ["fsdp2"], list(RECIPES), marks=pytest.mark.slow),
        (2, ["fsdp2", "zero-1"], ["gaussian"]),
        pytest.param(2, ["fsdp2", "zero-0", "zero-1", "zero-2", "zero-3"], list(RECIPES), marks=pytest.mark.slow),
        pytest.param(4, ["fsdp2", "hsdp", "zero-2", "zero-3"], list(RECIPES), marks=pytest.mark.slow),
    ],
)
def test_every_engine_calibrates_as_one_process_by_hand(world_size: int, engines: list[str], recipes: Any) -> None:
    for recipe in recipes:
        [first, *others] = run_group(world_size, calibrated_by_engines, engines, recipe)
        expected, nll = calibrated_by_hand(recipe, world_size)
        for other in others:
            assert other["fsdp2"]["errors"] == first["fsdp2"]["errors"]
        for name, found in first.items():
            for key, value in expected.items():
                torch.testing.assert_close(found["weights"][key], value, rtol=1e-6, atol=1e-8, msg=f"{name} {key}")
            torch.testing.assert_close(found["nll"], nll, rtol=1e-5, atol=1e-6, msg=name)


def poisoned() -> str:
    engine = build("fsdp2", torch.float32)
    quantize_(engine.model, QuantConfig(), engine.device)
    for shard in engine.shards():
        if shard.name == "model.layers.1.mlp.gate_proj.weight":
            shard.tensors["weight"].fill_(torch.nan)
    engine.refresh_weights()
    try:
        calibrate_(engine, CALIBRATION, micro_batches(dist.get_rank(), dist.get_world_size()))
    except TrainingError as error:
        return str(error)
    return ""


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    for said in run_group(2, poisoned):
        assert said.startswith("the calibration finds inputs of model.layers.1.mlp.down_proj that are not finite")


def moments_with_and_without_padding() -> list[Tensor]:
    engine = build("fsdp2", torch.float32)
    quantize_(engine.model, QuantConfig(), engine.device)
    layer = quantized_layers(engine.model)["model.layers.1.mlp.down_proj"]
    tokens, labels = (part[:2].clone() for part in batch(0))
    labels[0, 20:], labels[1] = -100, -100
    shorter = tokens[:1, :20], labels[:1, :20]
    return [moment_of(engine, layer, [each], lambda line: None) for each in ((tokens, labels), shorter)]


def test_inputs_where_nothing_is_predicted_do_not_count() -> None:
    [[padded, shorter]] = run_group(1, moments_with_and_without_padding)
    torch.testing.assert_close(padded, shorter, rtol=1e-4, atol=1e-6)


# Runs


def phases(**transition: Any) -> list[dict[str, Any]]:
    calibration = {"calibration": {"sequences": 12}} | transition  # of batches of 8: 16
    return [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 3, "transition": calibration}]


def calibrated_run(shards: str, folder: Path, engine: str = "fsdp2", **sections: Any) -> Any:
    given = {"engine": ENGINE_CONFIGS[engine], "phases": phases(ramp={"steps": 1}, optimizer="rescale")} | sections
    return tiny_config(Path(shards), folder, **given)


def final_state(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted((folder / "checkpoints" / "step-00000007").glob("*.safetensors"))]


def assert_same_end(one: Path, other: Path) -> None:
    for ours, theirs in zip(final_state(one), final_state(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], f"{one} and {other}"


@pytest.mark.parametrize(("sequences", "rows"), [(1, 4), (4, 4), (5, 8), (12, 12)])
def test_the_rows_are_whole_batches_of_the_order_on_any_number_of_ranks(
    tmp_path: Path, sequences: int, rows: int
) -> None:
    training = {"batch_warmup": [{"sequences": 4, "until_tokens": 256}]}  # and then 8
    config = tiny_config(
        tmp_path, tmp_path / "run", training={"micro_batch_sequences": 2, "global_batch_sequences": 8, **training},
        phases=phases(calibration={"sequences": sequences}, optimizer="rescale"),
    )  # fmt: skip
    for world_size in (1, 2):
        plan = make_plan(config, world_size)
        assert calibration_batches(plan.phases[1], plan) * 2 * world_size == rows
        assert batches_needed(plan.phases[1], plan) * 2 * world_size == max(rows, 8)
        assert batches_needed(plan.phases[0], plan) == 0


def whole_and_in_pieces(shards: str, out: str, engines: list[str]) -> None:
    for engine in engines:
        folder = Path(out) / engine
        run(calibrated_run(shards, folder / "whole", engine))
        for steps in (4, 1):  # right before the switch, and after it
            assert run(calibrated_run(shards, folder / "pieces", engine), steps) == "interrupted"
        run(calibrated_run(shards, folder / "pieces", engine))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines",
    [
        ["fsdp2"],
        ["hsdp", "fsdp2-offload"],
        ["zero-0", "zero-1", "zero-2"],
        ["zero-3", "zero-2-offload", "zero-3-offload"],
    ],
)
def test_a_calibrated_run_is_resumed_bitwise(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, whole_and_in_pieces, str(shards), str(tmp_path), engines)
    for engine in engines:
        whole, pieces = tmp_path / engine / "whole", tmp_path / engine / "pieces"
        assert_same_end(whole, pieces)
        rows = [row for row in read_metrics(whole / "metrics.jsonl") if "transition/calibration_error_after" in row]
        [row] = rows
        assert row["step"] == 4
        assert 0 < row["transition/calibration_error_after"] < row["transition/calibration_error_before"] < 1
        again = [row for row in read_metrics(pieces / "metrics.jsonl") if "transition/calibration_error_after" in row]
        for key in ("transition/calibration_error_before", "transition/calibration_error_after"):
            assert {each[key] for each in again} == {row[key]}


# Conversions


def packable_tree(shards: Path, folder: Path) -> dict[str, Any]:
    tree = tiny_tree(shards, folder)
    return tree | {"model": tree["model"] | {"intermediate_size": 52}}


def train_all(folders: list[str]) -> None:
    for folder in folders:
        assert run(load_config(Path(folder, "config.yaml"))) == "complete"


@pytest.fixture(scope="module")
def switched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that calibrates at its switch."""
    folder = tmp_path_factory.mktemp("runs") / "switched"
    folder.mkdir()
    tree = packable_tree(shards, folder) | {"phases": phases(optimizer="keep-variance")}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run_group(1, train_all, [str(folder)])
    return folder


def config_file(shards: Path, folder: Path, transition: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    keys = {"calibration": None, "optimizer": "keep-variance"} | transition
    tree = packable_tree(shards, folder) | {"phases": phases(**keys)}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_conversion_that_calibrates_is_the_switch_of_a_run(switched: Path, shards: Path, tmp_path: Path) -> None:
    source, made = switched / "checkpoints" / "step-00000004", tmp_path / "made"
    config = config_file(shards, tmp_path / "given", {})
    said = tritrain("convert", source, "--to", made, "--config", config, "--calibrate", 12)
    assert f"to {made}, at the beginning of phase 1 (ternary)" in said
    assert said.count("s remain") == 2
    assert "The model is calibrated on 16 sequences" in said
    rows = read_metrics(switched / "metrics.jsonl")
    [after_switch] = [row for row in rows if row.get("validation/when") == "start of phase" and row["step"] == 4]
    assert f"({after_switch['validation/loss']:.4f} nats per token)" in said

    # Without a step, it is a ternary model for everything that reads checkpoints.
    checkpoint = CheckpointReader(made / "checkpoints" / "step-00000004")
    assert checkpoint.manifest.precision is not None
    assert checkpoint.manifest.precision.strength == 1
    assert checkpoint.manifest.provenance is not None
    assert checkpoint.manifest.provenance["transition"]["calibration"]["sequences"] == 12
    tritrain("export", made, "--to", tmp_path / "exported", "--format", "hf-ternary", "--dtype", "fp32")
    tokens = torch.arange(24).view(1, -1)
    ours, exported = (load_model(folder, dtype=torch.float32).model for folder in (made, tmp_path / "exported"))
    torch.testing.assert_close(ours(tokens).logits, exported(tokens).logits, rtol=1e-5, atol=1e-5)

    # With steps, it goes on as the run does.
    run_group(1, train_all, [str(made)])
    assert_same_end(switched, made)
    losses = [
        [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row and row["step"] > 4]
        for folder in (switched, made)
    ]
    assert losses[0] == losses[1]


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    source = CheckpointReader(checkpoint)
    return {name: source.read("weight", name, 0, torch.Size(shape).numel()) for name, shape in source.shapes.items()}


@pytest.mark.slow
def test_other_programs_checkpoints_are_calibrated_alike(switched: Path, shards: Path, tmp_path: Path) -> None:
    source = switched / "checkpoints" / "step-00000004"
    config = config_file(shards, tmp_path / "given", {"optimizer": "reset"})
    tritrain("convert", source, "--to", tmp_path / "hf", "--format", "hf", "--dtype", "fp32")
    tritrain("convert", source, "--to", tmp_path / "universal", "--format", "universal")
    made = {}
    for kind, given in {"ours": source, "hf": tmp_path / "hf", "universal": tmp_path / "universal"}.items():
        options = ["--config", config, "--phase", 1, "--calibrate", 8]
        tritrain("convert", given, "--to", tmp_path / f"{kind}-made", *options)
        made[kind] = weights_of(tmp_path / f"{kind}-made" / "checkpoints" / "step-00000004")
    before = weights_of(source)
    for name, weight in made["ours"].items():
        assert torch.equal(made["hf"][name], weight)
        assert torch.equal(made["universal"][name], weight)
        assert torch.equal(weight, before[name]) != name.endswith("_proj.weight")


def test_what_cannot_be_calibrated_is_refused(switched: Path, shards: Path, tmp_path: Path) -> None:
    ternary = switched / "checkpoints" / "step-00000007"
    config = config_file(shards, tmp_path / "given", {"optimizer": "reset"})
    asked = ["convert", ternary, "--to", tmp_path / "made", "--config", config, "--phase", 1, "--calibrate", 8]
    code, _, said = outcome(*asked)
    assert code
    assert f"{ternary} is ternary, and phases.1.transition.calibration fits codes to 16-bit weights" in said
    assert not (tmp_path / "made").exists()
    code, _, said = outcome(*asked[:4], "--format", "hf", "--calibrate", 8)
    assert (code, "--calibrate 8: belongs to --format run" in said) == (2, True)
    source = switched / "checkpoints" / "step-00000004"
    code, _, said = outcome("convert", source, *asked[2:], "phases.1.quantization.weights=absmedian")
    assert (code, "phases.1.quantization.weights: is absmedian; a calibration needs" in said) == (2, True)
    for dry_run in ([], ["--dry-run"]):
        changes = ["phases.1.distillation={}", "phases.1.transition.ramp={}"]
        code, _, said = outcome("convert", source, *asked[2:], *dry_run, *changes)
        assert "phases.1.distillation.teacher: is missing; a run that begins calibrated does not hold" in said
        code, _, said = outcome("convert", source, *asked[2:], *dry_run, f"data.sources.0.path={tmp_path / 'none'}")
        assert (code, "data.sources.0.path: " in said) == (2, True)
    assert not (tmp_path / "made").exists()
