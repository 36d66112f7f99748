"""Checkpoints and exports as plain modules: the bits of training's own layers, in a fraction of the memory."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import ModelSource, edit_config, load, pack_folder, whole, write_variant
from models import VARIANTS, random_tokens
from ranks import run_group
from runs import run
from tiny import tiny_config
from tokenizer_files import write_bytes_tokenizer
from torch import nn
from typer.testing import CliRunner

import launcher.inference.generate
import launcher.inference.load
from data.errors import DataError
from data.messages import printable
from launcher.checkpoint.reader import CheckpointReader
from launcher.cli import app
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.open import config_of
from launcher.inference.generate import open_model
from launcher.inference.load import load_model
from launcher.inference.sharded import open_subject
from launcher.process.ranks import ALONE
from launcher.run import automatic
from model.transformer import Transformer
from quant.config import PRESETS, QuantConfig
from quant.linear import QuantLinear, add_learned_scales_, quantize_
from quant.packed import PackedLinear, memory_bytes
from quant.rounding import quantize_activation

LEARNED = {"precision": "ternary", "steps": 2, "quantization": {"preset": "paretoq"}}


def two_runs(shards: str, out: str) -> None:
    """A run of 2 steps in 16 bits and 4 ternary ones, of which 2 are a ramp; and one with learned scales."""
    phases: list[Any] = [{"precision": "16-bit", "steps": 2}]
    ramp = {"precision": "ternary", "steps": 4, "transition": {"ramp": {"shape": "linear", "steps": 2}}}
    every_step = {"interval_steps": 1, "keep_last": 10}
    assert run(tiny_config(Path(shards), Path(out, "run"), phases=[*phases, ramp], checkpoint=every_step)) == "complete"

    config = tiny_config(Path(shards), Path(out, "learned"), phases=[*phases, LEARNED])
    assert run(config) == "complete"


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_group(1, two_runs, str(shards), str(out))
    return out


def step(runs: Path, number: int) -> Path:
    return runs / "run" / "checkpoints" / f"step-{number:08}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["run", "learned"])
def test_a_checkpoint_computes_the_bits_of_training(runs, name, dtype):
    """With 51 and 12 rows, which are padded and not."""
    recipe = PRESETS["paretoq"] if name == "learned" else QuantConfig()
    loaded = load_model(runs / name, dtype=dtype)
    source = CheckpointReader(sorted((runs / name / "checkpoints").glob("step-*"))[-1])
    expected = Transformer(config_of(source).model)
    if name == "learned":
        add_learned_scales_(expected, recipe)
    expected.load_state_dict({name: whole(source, name) for name in source.shapes})
    expected.to(dtype)
    quantize_(expected, recipe)
    tokens_BT = random_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens_BT).logits, expected(tokens_BT).logits)
        latent = load_model(runs / name, dtype=dtype, packed=False)
        assert torch.equal(latent.model(tokens_BT).logits, expected(tokens_BT).logits)
    assert sum(isinstance(layer, PackedLinear) for layer in loaded.model.modules()) == 14
    assert sum(isinstance(layer, QuantLinear) for layer in latent.model.modules()) == 14
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_the_default_dtype_is_what_the_device_computes_in_hardware(runs, has_bf16, name, monkeypatch, capsys):
    monkeypatch.setattr(automatic, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}
    assert load_model(step(runs, 2)).model.model.norm.weight.dtype == expected[name]

    taken = []
    real = launcher.inference.generate.load_model
    monkeypatch.setattr(
        launcher.inference.generate,
        "load_model",
        lambda path, dtype, **choice: taken.append(dtype) or real(path, dtype=dtype, **choice),
    )
    open_model(str(runs / "run"))
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"dtype: {name}, ")
    for chosen in ("bf16", "fp32"):
        open_model(str(runs / "run"), dtype=chosen)
        assert "dtype" not in capsys.readouterr().err
    assert taken == [expected[name], torch.bfloat16, torch.float32]


def test_a_16_bit_checkpoint_is_a_plain_model(runs):
    loaded = load_model(step(runs, 2))
    assert {type(layer) for layer in loaded.model.model.layers[0].mlp.children()} == {nn.Linear, nn.Identity}
    with pytest.raises(CheckpointError, match="is a 16-bit model, without codes to pack; packed=None"):
        load_model(step(runs, 2), packed=True)


def test_a_checkpoint_on_a_ramp_is_refused(runs):
    for number in (3, 4):
        with pytest.raises(CheckpointError, match=r"on a ramp, at strength 0(\.5)? where it is least"):
            load_model(step(runs, number))
    assert load_model(step(runs, 5)).model


class Reference(nn.Module):
    """What a packed layer of Transformers stands for, written out."""

    def __init__(self, weight_OI, scale):
        super().__init__()
        self.codes_OI, self.scale = (weight_OI / scale).round(), scale

    def forward(self, x):
        codes, scale = quantize_activation(x)
        assert set(self.codes_OI.unique().tolist()) == {-1.0, 0.0, 1.0}
        return (codes.double() @ self.codes_OI.double().T).float() * (scale * self.scale)


@pytest.mark.parametrize(
    ("variant", "linear_class"),
    # autobitlinear multiplies the biases of qwen2 by the scale; formats/test_hf_packed.py shows that refused
    [("bitnet", "bitlinear"), ("bitnet", "autobitlinear"), ("qwen2", "bitlinear")],
)
def test_a_packed_folder_computes_with_its_own_codes_and_scale(tmp_path, variant, linear_class):
    folder = tmp_path / "hf"
    write_variant(folder, variant)
    pack_folder(folder, linear_class)
    source, expected = HuggingFaceSource(folder), load(folder)
    for name in source.ternary:
        bias = expected.get_submodule(name.removesuffix(".weight")).bias
        layer = Reference(whole(source, name), source.packed(name)[1])
        layer.register_forward_hook(lambda _, __, y, bias=bias: y if bias is None else y + bias)
        expected.set_submodule(name.removesuffix(".weight"), layer)
    loaded = load_model(folder, dtype=torch.float32)
    tokens_BT = random_tokens(3, 17)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens_BT).logits, expected(tokens_BT).logits)
    assert sum(isinstance(layer, PackedLinear) for layer in loaded.model.modules()) == 14
    with pytest.raises(CheckpointError, match="holds packed codes, and no latent weights"):
        load_model(folder, packed=False)


def test_modules_that_a_folder_leaves_out_stay_plain(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder, "llama")
    left_out = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config=left_out | {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp"]})
    expected = load(folder)
    quantize_(expected, PRESETS["bitnet-b1.58"])
    loaded = load_model(folder, dtype=torch.float32).model
    tokens_BT = random_tokens(3, 17)
    with torch.no_grad():
        first, reference = loaded.model.layers[0], expected.model.layers[0]
        x, tables = torch.randn(1, 5, 32), torch.ones(2, 5, 8)
        assert torch.equal(first(x, *tables), reference(x, *tables))
        assert loaded(tokens_BT).logits.shape == (3, 17, 96)
    assert type(loaded.model.layers[1].mlp.up_proj) is nn.Linear


def test_a_block_without_a_ternary_layer(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder, "llama")
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config=online | {"modules_to_not_convert": ["lm_head", "model.layers.0"]})
    expected, loaded = load(folder), load_model(folder, dtype=torch.float32).model
    quantize_(expected, replace(PRESETS["bitnet-b1.58"], include=r"layers\.1\."))
    with torch.no_grad():
        assert torch.equal(loaded(random_tokens(3, 17)).logits, expected(random_tokens(3, 17)).logits)
    assert len([module for module in loaded.modules() if isinstance(module, PackedLinear)]) == 7


@pytest.mark.slow
def test_no_whole_copy_of_the_unpacked_model_is_ever_there(tmp_path, monkeypatch):
    """All tensors that are alive when the last one of a block has been read."""
    config = replace(VARIANTS["llama"], num_layers=8, hidden_size=64, intermediate_size=256)
    model = Transformer(config)
    whole_bytes = memory_bytes(model)
    block_bytes = memory_bytes(model.model.layers[0])
    write_hf(ModelSource(model), config, tmp_path / "hf", torch.float32)
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path / "hf", quantization_config=online)
    del model
    gc.collect()

    def alive():
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and not x.is_meta]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    before, peaks, in_pieces = alive(), [], launcher.inference.load.in_pieces

    def watched(source, kind, name):
        for piece in in_pieces(source, kind, name):
            if name.endswith("post_attention_layernorm.weight"):
                peaks.append(alive() - before)
            yield piece

    monkeypatch.setattr("launcher.inference.load.in_pieces", watched)
    loaded = load_model(tmp_path / "hf", dtype=torch.float32)
    packed_bytes = memory_bytes(loaded.model)
    assert packed_bytes < whole_bytes / 8
    assert len(peaks) == 8
    assert max(peaks) < packed_bytes + 1.5 * block_bytes < whole_bytes / 3


def generated(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_writes_what_the_library_does(runs):
    loaded = load_model(runs / "run")
    pieces = list(loaded.generate("te", max_tokens=12, seed=3))
    result = generated(runs / "run", "te", "--max-tokens", 12, "--seed", 3)
    assert result.exit_code == 0
    assert result.stdout == printable("te" + "".join(pieces)) + "\n"
    assert "tokens/s" in result.stderr
    assert len(pieces) > 1
    latent = generated(runs / "run", "te", "--max-tokens", 12, "--seed", 3, "--latent")
    assert latent.stdout == result.stdout
    full = generated(runs / "run", "te", "--temperature", 0, "--dtype", "fp32", "--top-p", 0.5)
    assert full.exit_code == 0


def test_an_export_needs_its_tokenizer_for_text_but_not_for_tokens(runs, tmp_path):
    write_variant(tmp_path / "hf", "llama")
    loaded = load_model(tmp_path / "hf")
    assert len(list(loaded.generate_tokens([1, 2, 3], max_tokens=5))) == 5
    with pytest.raises(CheckpointError, match="tokenizer was not found; name its file"):
        generated(tmp_path / "hf", "te")
    beside = load_model(runs / "run").tokenizer
    assert beside is not None
    assert generated(runs / "run", "te", "--max-tokens", 2, "--tokenizer", beside.path).exit_code == 0
    with pytest.raises(DataError, match="no such tokenizer file"):
        generated(runs / "run", "te", "--tokenizer", tmp_path / "none.model")


def test_the_tokenizer_of_another_model_is_noticed(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder)
    write_bytes_tokenizer(tmp_path / "tokenizer.json")
    assert load_model(folder).tokenizer is None
    message = r"tokenizer\.json: has \d+ tokens and the model 96; it is the tokenizer of another model"
    with pytest.raises(DataError, match=message):
        load_model(folder, tokenizer=tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    loaded = load_model(folder)
    assert list(loaded.generate_tokens([1], max_tokens=2))
    with pytest.raises(DataError, match=message):
        loaded.generate("a")


def test_a_prompt_that_is_no_text_is_named(runs):
    with pytest.raises(DataError, match=r"the prompt is not text: .*surrogates not allowed; write it in UTF-8"):
        load_model(runs / "run").generate("a\ud800")


def test_a_tokenizer_that_cannot_be_read_is_said_where_it_is_needed(runs, tmp_path):
    write_variant(tmp_path / "hf", "llama")
    write_bytes_tokenizer(tmp_path / "hf" / "tokenizer.json", "</s>")
    loaded = load_model(tmp_path / "hf")
    assert loaded.tokenizer is None
    assert len(list(loaded.generate_tokens([1, 2, 3], max_tokens=5))) == 5
    for use in (lambda: loaded.generate("te"), lambda: generated(tmp_path / "hf", "te")):
        with pytest.raises(DataError, match=r"tokenizer\.json: any of .* may end a document; name it with"):
            use()
    with pytest.raises(DataError, match="may end a document"):
        load_model(tmp_path / "hf", tokenizer=tmp_path / "hf")
    with pytest.raises(DataError, match="may end a document"):
        open_subject(str(tmp_path / "hf"), ALONE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("te" * 40,), ConfigError, r"the prompt has \d+ tokens, but the model's context is 32"),
        (("te", "--top-p", "0"), ConfigError, "must be above 0"),
    ],
)
def test_what_the_command_refuses(runs, arguments, error, message):
    with pytest.raises(error, match=message):
        generated(runs / "run", *arguments)


def test_damage_is_found_before_anything_is_said(runs, tmp_path):
    shutil.copytree(step(runs, 6), tmp_path / "step-00000006")
    path = next((tmp_path / "step-00000006").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path / "step-00000006")
