"""What may be exported, and the codes: against the layers that train."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import make_older, ternary_config, write_checkpoint
from hf_folders import ModelSource
from models import VARIANTS, build

from launcher.checkpoint.manifest import Precision
from launcher.errors import CheckpointError
from launcher.formats.codes import CodedMatrices
from launcher.formats.opened import open_exportable
from launcher.run.rollbacks import Rollback, write_rollbacks
from model.transformer import Transformer
from quant.config import PRESETS, QuantConfig
from quant.linear import add_learned_scales_, quantize_, quantized_layers
from quant.rounding import dequantize


@pytest.fixture
def tiny(shards: Path, tmp_path: Path) -> Iterator[Any]:
    def make(step: int, phase: int, *, rollbacks: dict[int, int] | None = None, **transition: Any) -> Path:
        config = ternary_config(shards, tmp_path / "run", VARIANTS["llama"], **transition)
        write_checkpoint(config, build(config.model), step=step, phase=phase, rollbacks=rollbacks)
        return tmp_path / "run"

    return make


def test_a_ternary_checkpoint_opens_with_its_recipe_and_tokenizer(tiny: Any, shards: Path) -> None:
    run = tiny(8, 1)
    opened = open_exportable(str(run), ternary=True)
    assert opened.quantization == QuantConfig()
    assert (opened.strength, opened.tokenizer, opened.run) == (1.0, shards / "tokenizer.model", run)
    assert opened.model == opened.config.model  # type: ignore[union-attr]


def test_a_checkpoint_s_own_tokenizer_comes_before_its_run_s(shards: Path, tmp_path: Path) -> None:
    own, run = tmp_path / "own.json", tmp_path / "run"
    own.write_text("{}")
    config = ternary_config(shards, run, VARIANTS["llama"])
    checkpoint = write_checkpoint(config, build(config.model), step=8, phase=1, tokenizer=own)
    (run / "tokenizer.model").write_bytes(b"of a later start with other data")
    assert open_exportable(str(run), ternary=True).tokenizer == checkpoint / "tokenizer.json"
    make_older(checkpoint)
    assert open_exportable(str(run), ternary=True).tokenizer == run / "tokenizer.model"


def test_16_bit_phases_have_no_codes(tiny: Any) -> None:
    run = tiny(4, 0)
    with pytest.raises(CheckpointError, match=r"after step 4, is of a 16-bit phase and has no codes; --format hf"):
        open_exportable(str(run), ternary=True)
    assert open_exportable(str(run), ternary=False).strength == 0


def test_codes_are_refused_until_every_block_computes_with_them(tiny: Any) -> None:
    ramp = {"shape": "linear", "steps": 2}
    for step, strength in ((5, 0.0), (6, 0.5)):
        run = tiny(step, 1, ramp=ramp)
        assert open_exportable(str(run), ternary=False).strength == strength
        with pytest.raises(CheckpointError, match=f"after step {step}, is on a ramp, at strength {strength:.3g}"):
            open_exportable(str(run / "checkpoints" / f"step-0000000{step}"), ternary=True)
    assert open_exportable(str(tiny(7, 1, ramp=ramp)), ternary=True).strength == 1


def test_the_last_ramp_and_the_last_block_count(tiny: Any) -> None:
    for transition, strength in (
        ({"activation_ramp": {"steps": 3}}, "0.333"),
        ({"ramp": {"steps": 2, "order": "front-to-back"}}, "0"),
    ):
        with pytest.raises(CheckpointError, match=f"at strength {strength}, and did not"):
            open_exportable(str(tiny(6, 1, **transition)), ternary=True)


ROLLED_BACK: dict[str, Any] = {"ramp": {"steps": 1}, "rollback": {"after_tokens": 256, "max_attempts": 1}}


def test_a_ramp_that_was_stretched_by_going_back_counts_in_a_copy_of_the_checkpoint(tiny: Any, tmp_path: Path) -> None:
    run = tiny(6, 1, rollbacks={1: 1}, **ROLLED_BACK)
    alone = (run / "checkpoints" / "step-00000006").rename(tmp_path / "alone")
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match=r"on a ramp, at strength 0\.5"):
        open_exportable(str(alone), ternary=True)
    assert open_exportable(str(alone), ternary=False).precision == Precision(
        quantization=QuantConfig(), weight_strengths=(0.5, 0.5), activation_strengths=(0.5, 0.5)
    )


def test_an_older_checkpoint_computes_as_its_configuration_and_its_run_s_rollbacks_say(tiny: Any) -> None:
    run = tiny(6, 1, **ROLLED_BACK)
    make_older(run / "checkpoints" / "step-00000006")
    run = run.rename(run.with_name("moved"))
    assert open_exportable(str(run), ternary=True).run == run
    write_rollbacks(run, {1: Rollback(1, 1.0, 2.0, 4, discarding=False)})
    with pytest.raises(CheckpointError, match="on a ramp"):
        open_exportable(str(run), ternary=True)


def test_a_copy_of_a_checkpoint_takes_no_other_run_for_its_own(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, transition in (("here", {}), ("elsewhere", {"ramp": {"steps": 1}})):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        config = ternary_config(shards, Path("run"), VARIANTS["llama"], **transition)
        write_checkpoint(config, build(config.model), step=8, phase=1)
    copy = (tmp_path / "here" / "run" / "checkpoints" / "step-00000008").rename(tmp_path / "copy")
    assert open_exportable(str(copy), ternary=True).run is None
    monkeypatch.chdir(tmp_path / "here")
    assert open_exportable(str(copy), ternary=True).run == Path("run")


RECIPES = {
    **PRESETS,
    "group": QuantConfig(granularity="group", group_size=4, weights="twn"),
    "fused": QuantConfig(fused=True, weights="absmedian"),
    "binary": QuantConfig(levels="binary"),
    "all-rotated": QuantConfig(hadamard="all"),
    "part": QuantConfig(include=r"layers\.1\.mlp\.\w+_proj$"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_codes_are_those_of_the_layers_that_train(recipe: QuantConfig) -> None:
    model = Transformer(replace(VARIANTS["llama"], num_kv_heads=2))
    model.load_state_dict(build(model.config).state_dict())
    if recipe.learned:
        add_learned_scales_(model, recipe)
        for name, parameter in model.named_parameters():
            if name.endswith("weight_scale"):
                parameter.data.uniform_(0.01, 0.2)
    matrices = CodedMatrices(ModelSource(model), model.config, recipe)
    quantize_(model, recipe)
    layers = quantized_layers(model)
    assert matrices.names == tuple(f"{name}.weight" for name in layers)
    for name, layer in layers.items():
        codes_OI, level = layer.weight_codes()
        assert f"{name}.weight" in matrices
        found_OI, found_level = matrices.codes(f"{name}.weight")
        assert torch.equal(found_OI, codes_OI)
        assert torch.equal(found_level, level)
        x_NI = torch.randn(5, layer.in_features)
        rotated = layer.rounded_input(x_NI) if not recipe.layer_norm else x_NI
        expected = rotated @ dequantize(codes_OI, level).T
        torch.testing.assert_close(x_NI @ matrices.dequantized(f"{name}.weight").T, expected, rtol=1e-4, atol=1e-5)
