"""GGUF files: every code of training is in them, in llama.cpp's layout; and nothing is written that it would run wrong.

What llama.cpp itself makes of them is in `test_gguf_client.py`.
"""

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import tritrain
from exports import ternary_config, write_checkpoint
from gguf_files import changed, export, narrow, random_model, read_tensors
from texts import TEXTS

from data.errors import DataError
from data.gguf_vocabulary import gguf_vocabulary
from data.tokenizer import train_tokenizer
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from model.gguf import (
    ARCHITECTURES,
    config_from_gguf,
    gguf_architecture,
    gguf_metadata,
    gguf_name,
    gguf_rows,
)
from model.rotary import rotary_tables, rotate
from model.size import parameter_shapes
from model.transformer import ModelConfig, Transformer
from quant.gguf import ggml_type, to_blocks
from quant.linear import add_learned_scales_, quantize_, quantized_layers

gguf = pytest.importorskip("gguf")


@pytest.fixture
def checkpoint(shards: Path, tmp_path: Path) -> Callable[..., tuple[Transformer, Path]]:
    """A model with random weights, and a run that has just ended with it."""

    def make(model: ModelConfig, quantization: dict[str, Any] | None = None) -> tuple[Transformer, Path]:
        config: Config = ternary_config(shards, tmp_path / "run", model, quantization or {"preset": "bitnet-b1.58"})
        made = random_model(config.model)
        recipe = config.phases[1].quantization
        assert recipe is not None
        if recipe.learned:
            add_learned_scales_(made, recipe)
            for name, parameter in made.named_parameters():
                if name.endswith("weight_scale"):
                    torch.nn.init.uniform_(parameter, 0.05, 0.15)
        write_checkpoint(config, made, step=8, phase=1)
        quantize_(made, recipe)
        return made, tmp_path / "run"

    return make


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_back(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


RECIPES: dict[str, dict[str, Any]] = {
    "bitnet-b1.58": {},
    "fused": {"fused": True, "weights": "absmedian"},
    "rows": {"granularity": "row", "weights": "twn"},
    "groups": {"granularity": "group", "group_size": 256},
    "learned": {"preset": "paretoq"},
    "binary": {"levels": "binary"},
}


@pytest.mark.parametrize("into", ["tq2_0", "tq1_0"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_codes_of_training_are_in_the_file(checkpoint: Any, tmp_path: Path, recipe: str, into: Any) -> None:
    config = narrow(intermediate_size=512, num_kv_heads=2)
    model, run = checkpoint(config, RECIPES[recipe])
    export(run, tmp_path / "model.gguf", into)
    tensors = stored(tmp_path / "model.gguf")
    layers = quantized_layers(model)
    assert len(layers) == 7
    for name, layer in layers.items():
        tensor = tensors[gguf_name(f"{name}.weight", config)]
        assert tensor.tensor_type.name == into.upper()
        values, (codes, level) = read_back(tensor), layer.weight_codes()
        if name.endswith(("q_proj", "k_proj")):  # row 2 i of a head is its row i, row 2 i + 1 its row 32 + i
            order = [64 * (row // 64) + row % 64 // 2 + 32 * (row % 2) for row in range(len(codes))]
            codes, level = codes[order], level[order] if len(level) > 1 else level
        assert torch.equal(values.sign().to(torch.int8), codes)
        if level.shape[1] > 1:
            level = level.repeat_interleave(256, dim=1)
        assert torch.equal(values.abs(), (codes.abs() * level).half().float())


def test_what_has_no_codes_keeps_its_values(checkpoint: Any, tmp_path: Path) -> None:
    config = narrow(tie_embeddings=False)
    model, run = checkpoint(config, {"include": r"mlp\.\w+_proj$"})
    export(run, tmp_path / "model.gguf", embeddings="f16")
    tensors, parameters = stored(tmp_path / "model.gguf"), dict(model.named_parameters())
    assert tensors.keys() == {gguf_name(name, config) for name in parameters}
    for name, parameter in parameters.items():
        tensor = tensors[gguf_name(name, config)]
        expected = gguf_rows(parameter.detach(), name, config)
        if parameter.ndim == 1:
            assert torch.equal(read_back(tensor).flatten(), expected)
        elif "mlp" not in name:
            assert torch.equal(read_back(tensor).view(expected.shape), expected.half().float())
    assert {name for name in tensors if tensors[name].tensor_type.name == "TQ2_0"} == {
        f"blk.0.ffn_{each}.weight" for each in ("gate", "up", "down")
    }


@pytest.mark.parametrize(("into", "error"), [("f16", 2**-11), ("q8_0", 2**-8)])
def test_other_types_hold_codes_times_their_level(checkpoint: Any, tmp_path: Path, into: Any, error: float) -> None:
    config = narrow("bitnet")
    model, run = checkpoint(config, {"levels": "int2", "weights": "absmax", "granularity": "group"})
    export(run, tmp_path / "model.gguf", into)
    tensors = stored(tmp_path / "model.gguf")
    for name, layer in quantized_layers(model).items():
        codes, level = layer.weight_codes()
        expected = codes * level.repeat_interleave(128, dim=1)
        difference = read_back(tensors[gguf_name(f"{name}.weight", config)]).view(expected.shape) - expected
        assert difference.abs().max() <= error * expected.abs().max()
    assert tensors["token_embd.weight"].tensor_type.name == into.upper()


def test_a_file_says_what_it_holds(checkpoint: Any, tmp_path: Path) -> None:
    config = narrow(num_kv_heads=2, head_dim=128, rope_theta=5e5, norm_eps=1e-6)
    _, run = checkpoint(config)
    output = tritrain("export", run, "--to", tmp_path / "model.gguf", "--format", "gguf")
    assert "are codes, as tq2_0; embedding and head as q8_0." in output
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert (
        fields.items()
        >= {
            "general.architecture": "llama",
            "general.name": "tiny",
            "general.file_type": 37,
            "llama.vocab_size": 384,
            "llama.context_length": 128,
            "llama.embedding_length": 256,
            "llama.block_count": 1,
            "llama.feed_forward_length": 256,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 128,
            "llama.attention.value_length": 128,
            "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
            "llama.rope.dimension_count": 128,
            "llama.rope.freq_base": 5e5,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": False,
            "tritrain.step": 8,
        }.items()
    )
    assert len(fields["tokenizer.ggml.tokens"]) == 384
    assert fields["tokenizer.ggml.token_type"][:4] == [5, 5, 3, 6]
    assert fields["tokenizer.ggml.token_type"][320:] == [5] * 64


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Any, tmp_path: Path) -> None:
    _, run = checkpoint(narrow())
    for name in ("first", "second"):
        export(run, tmp_path / f"{name}.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


WRONG_MODELS = {
    "activation relu2 without a word": {"family": "bitnet", "activation": "relu2"},
    "uses the embedding as its head": {"family": "bitnet", "tie_embeddings": False},
    "num_heads \\* head_dim is 128 and must be hidden_size 256": {"family": "qwen2", "head_dim": 32},
    "has no graph with .* qk_norm head, sub_norm True": {"family": "bitnet", "qk_norm": "head"},
    "mlp.down_proj.weight has rows of 320 weights; tq2_0 has blocks of 256": {"intermediate_size": 320},
}


@pytest.mark.parametrize("message", WRONG_MODELS)
def test_what_llama_cpp_computes_differently_is_refused(checkpoint: Any, tmp_path: Path, message: str) -> None:
    _, run = checkpoint(narrow(**WRONG_MODELS[message]))
    with pytest.raises(CheckpointError, match=message):
        export(run, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


WRONG_RECIPES: dict[str, dict[str, Any]] = {
    "hadamard outputs: llama.cpp does not rotate": {"hadamard": "outputs"},
    "layer_norm true": {"layer_norm": True},
    "dead_zone_bias 0.001": {"dead_zone_bias": 1e-3},
    "levels int4: tq2_0 holds the codes": {"levels": "int4", "weights": "gaussian"},
    "group_size 128: tq2_0 has one scale for 256": {"granularity": "group"},
}


@pytest.mark.parametrize("message", WRONG_RECIPES)
def test_recipes_that_are_no_product_of_codes_are_refused(checkpoint: Any, tmp_path: Path, message: str) -> None:
    _, run = checkpoint(narrow(), WRONG_RECIPES[message])
    with pytest.raises(CheckpointError, match=f"cannot be written as tq2_0: quantization.{message}"):
        export(run, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "bf16"), "--dtype bf16: belongs to --format hf, hf-ternary, compressed-tensors and mlx"),
        (("--no-tokenizer",), "--no-tokenizer: a GGUF file always holds a tokenizer"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tritrain("export", tmp_path, "--to", tmp_path / "model.gguf", "--format", "gguf", *options)


@pytest.mark.parametrize(("device", "file_type"), [("gpu", 28), ("phone", 28), ("x86", 37)])
def test_a_device_chooses_the_type(checkpoint: Any, tmp_path: Path, device: str, file_type: int) -> None:
    _, run = checkpoint(narrow())
    export = ("export", run, "--format", "gguf", "--for", device)
    tritrain(*export, "--to", tmp_path / "model.gguf", "--license", "mit")
    _, fields = read_tensors(tmp_path / "model.gguf")
    assert (fields["general.file_type"], fields["general.license"]) == (file_type, "mit")
    with pytest.raises(ConfigError, match="--type and --for exclude each other"):
        tritrain(*export, "--to", tmp_path / "other.gguf", "--type", "f16")


def test_what_holds_for_several_matrices_is_said_once(checkpoint: Any, tmp_path: Path) -> None:
    _, run = checkpoint(narrow(hidden_size=192, intermediate_size=320))
    with pytest.raises(CheckpointError) as caught:
        export(run, tmp_path / "model.gguf")
    blocks = "tq2_0 has blocks of 256, which must divide them; q2_0 has blocks of 64, which fit"
    assert str(caught.value).splitlines()[1:] == [
        f"  model.layers.0.self_attn.q_proj.weight has rows of 192 weights; {blocks} (and 5 more like it)",
        f"  model.layers.0.mlp.down_proj.weight has rows of 320 weights; {blocks}",
    ]


def test_narrow_rows_and_groups_are_told_of_the_type_that_has_them(checkpoint: Any, tmp_path: Path) -> None:
    _, run = checkpoint(narrow(intermediate_size=320), {"granularity": "group", "group_size": 64})
    with pytest.raises(CheckpointError, match=r"one scale for 256 weights; .* q2_0 has blocks of 64, which fit"):
        export(run, tmp_path / "model.gguf")
    _, run = checkpoint(narrow(intermediate_size=320))
    with pytest.raises(
        CheckpointError, match=r"blocks of 256, which must divide them; q2_0 has blocks of 64, which fit"
    ):
        export(run, tmp_path / "model.gguf")
    export(run, tmp_path / "model.gguf", "q2_0")
    _, run = checkpoint(narrow(intermediate_size=288))
    with pytest.raises(CheckpointError, match=r"rows of 288 weights; q2_0 has blocks of 64, which must divide them$"):
        export(run, tmp_path / "other.gguf", "q2_0")


def test_only_gguf_has_its_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--type f16: belongs to --format gguf"):
        tritrain("export", tmp_path, "--to", tmp_path / "folder", "--format", "hf", "--type", "f16")


def test_16_bit_phases_and_ramps_have_no_ternary_file(shards: Path, tmp_path: Path) -> None:
    config = ternary_config(shards, tmp_path / "run", narrow(), ramp={"steps": 2})
    for step, phase, message in ((4, 0, "has no codes"), (6, 1, "on a ramp, at strength 0.5")):
        write_checkpoint(config, random_model(config.model), step=step, phase=phase)
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / "run", tmp_path / "model.gguf")
        if phase:
            with pytest.raises(CheckpointError, match=message):
                export(tmp_path / "run", tmp_path / "model.gguf", "f16")
        else:
            assert export(tmp_path / "run", tmp_path / "16.gguf", "f16").startswith("0.0% of")


def test_a_full_disk_leaves_no_file(checkpoint: Any, tmp_path: Path) -> None:
    _, run = checkpoint(narrow())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model\.gguf: OSError"):
            export(run, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.gguf*"))


def test_weights_beyond_half_precision_are_refused(checkpoint: Any, shards: Path, tmp_path: Path) -> None:
    config = ternary_config(shards, tmp_path / "run", narrow())
    model = random_model(config.model)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 1e5
    write_checkpoint(config, model, step=8, phase=1)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: the largest magnitude is 1.*half precision ends"):
        export(tmp_path / "run", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(("into", "level"), [("tq2_0", 1e-9), ("tq1_0", 1e-7), ("f16", 1e-8), ("q8_0", 1e-5)])
def test_weights_that_half_precision_rounds_to_nothing_are_refused(into: Any, level: float) -> None:
    values = level * torch.randint(-1, 2, (4, 256)).float()
    with pytest.raises(ValueError, match="which half precision rounds to 0, or coarsely"):
        to_blocks(values, into)
    for sound in (0.0, 1e-2, 1e-3):
        blocks = to_blocks(sound / level * values, into)
        found = torch.from_numpy(gguf.quants.dequantize(blocks, ggml_type(into))).float()
        assert (found - sound / level * values).abs().max() <= 1e-2 * sound


# The model in llama.cpp's words


def test_every_family_has_names_for_all_its_parameters() -> None:
    for family in ARCHITECTURES:
        config = narrow(family)
        names = [gguf_name(name, config) for name in parameter_shapes(config)]
        assert gguf_architecture(config) == family
        assert len(names) == len(set(names))
        assert gguf_metadata(config)[f"{family}.block_count"] == 1


@pytest.mark.parametrize("key", ["clamp_kqv", "max_alibi_bias", "scale"])
def test_keys_that_change_attention_are_refused(key: str) -> None:
    model = ModelConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16, intermediate_size=128,
        tie_embeddings=True, norm="layernorm-nonparametric",
    )  # fmt: skip
    fields = {"general.architecture": "olmo", **gguf_metadata(model), f"olmo.attention.{key}": 0.0}
    shapes = {"token_embd.weight": (64, 64)}
    assert config_from_gguf(fields, shapes) == model
    with pytest.raises(ValueError, match=rf"olmo\.attention\.{key} is 8\.0, which is not computed here; only 0 is"):
        config_from_gguf(fields | {f"olmo.attention.{key}": 8.0}, shapes)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**41, 2**63])
def test_numbers_that_no_model_has_are_refused(value: float) -> None:
    model = narrow("llama", max_sequence_length=64, head_dim=64)
    fields = {"general.architecture": "llama"} | gguf_metadata(model)
    shapes = {gguf_name(name, model): shape for name, shape in parameter_shapes(model).items()}
    for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor"):
        with pytest.raises(ValueError, match=rf"llama\.{key} .*: is no number of a model"):
            config_from_gguf(fields | {f"llama.{key}": value}, shapes)


def test_a_window_that_is_shorter_than_the_context_is_refused() -> None:
    model = narrow("llama", max_sequence_length=64, head_dim=64)
    fields = {"general.architecture": "llama"} | gguf_metadata(model)
    shapes = {gguf_name(name, model): shape for name, shape in parameter_shapes(model).items()}
    for window in (0, 64, 4096):
        assert config_from_gguf(fields | {"llama.attention.sliding_window": window}, shapes) == model
    with pytest.raises(ValueError, match=r"llama\.attention\.sliding_window is 63: .*context_length, 64, no larger"):
        config_from_gguf(fields | {"llama.attention.sliding_window": 63}, shapes)


def test_interleaved_rows_rotated_by_neighbors_give_the_same_scores() -> None:
    config = narrow(num_kv_heads=2)
    torch.manual_seed(0)
    x_BTD = torch.randn(1, 5, 256, dtype=torch.float64)
    cos_TE, sin_TE = rotary_tables(config, 5, torch.device("cpu"))

    def scores(interleaved: bool) -> torch.Tensor:
        turned = []
        for name, heads in (("q_proj", 4), ("k_proj", 2)):
            rows = torch.randn(heads * 64, 256, generator=torch.Generator().manual_seed(heads)).double()
            if interleaved:
                rows = gguf_rows(rows, f"model.layers.0.self_attn.{name}.weight", config)
            heads_BHTE = (x_BTD @ rows.T).unflatten(-1, (heads, 64)).transpose(1, 2)
            if interleaved:  # as ggml's rope of the kind NORM
                even, odd, cos, sin = heads_BHTE[..., ::2], heads_BHTE[..., 1::2], cos_TE[:, :32], sin_TE[:, :32]
                turned.append(torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2))
            else:
                turned.append(rotate(heads_BHTE, cos_TE, sin_TE))
        return turned[0] @ turned[1].repeat_interleave(2, 1).transpose(-1, -2)

    torch.testing.assert_close(scores(True), scores(False))


def test_only_queries_and_keys_of_graphs_that_rotate_neighbors_are_reordered() -> None:
    values = torch.arange(256.0)[:, None].expand(256, 256)
    for family in ARCHITECTURES:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = gguf_rows(values, f"model.layers.0.self_attn.{projection}.weight", narrow(family))
            assert torch.equal(rows, values) == (family not in ("llama", "olmo") or projection[0] in "vo")


# Tokenizers


def trained(folder: Path, spec: str) -> Path:
    train_tokenizer(TEXTS[:3], spec, folder / "tokenizer.model")
    return folder / "tokenizer.model"


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a unigram model, .*llama\.cpp tokenizes as SentencePiece BPE"):
        gguf_vocabulary(trained(tmp_path, "unigram:400"), 400)
    with pytest.raises(DataError, match="has 400 tokens, but the model has only 384"):
        gguf_vocabulary(trained(tmp_path, "bpe:400"), 384)
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.BPE())
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: divides texts into words in a way of its own; .*llama\.cpp"):
        gguf_vocabulary(tmp_path / "tokenizer.json", 400)


def test_only_the_end_of_a_document_is_a_control_token(tmp_path: Path) -> None:
    vocabulary = gguf_vocabulary(trained(tmp_path, "bpe:400"), 402)
    types = vocabulary["token_type"]
    assert isinstance(types, list)
    assert types[:4] == [5, 5, 3, 6]  # llama.cpp finds names of control (3) and unknown (2) tokens in prompts
    assert set(types[259:400]) == {1}
    assert types[400:] == [5, 5]


def test_text_that_llama_cpp_would_merge_into_a_special_token_is_refused(tmp_path: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    path = trained(tmp_path, "bpe:400")
    model = ModelProto.FromString(path.read_bytes())
    model.pieces[300].piece = "</s"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="would take '</s>' in a text for the special token of this name"):
        gguf_vocabulary(path, 400)


def test_normalization_is_refused_and_a_prefix_kept(tmp_path: Path) -> None:
    path = trained(tmp_path, "bpe:400")
    assert gguf_vocabulary(path, 400)["add_space_prefix"] is False
    changed(path, "normalizer_spec", add_dummy_prefix=True)
    assert gguf_vocabulary(path, 400)["add_space_prefix"] is True
    changed(path, "normalizer_spec", remove_extra_whitespaces=True)
    with pytest.raises(DataError, match="changes texts"):
        gguf_vocabulary(path, 400)
