"""Packed BitNet folders against Transformers' own layers, and ranges of any folder."""

import re
from dataclasses import replace

import pytest
import torch
from hf_folders import ModelSource, edit_config, load, our_logits, pack_folder, whole, write_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, build, random_tokens
from safetensors.torch import load_file, save_file

from launcher.errors import CheckpointError
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource, Packing
from quant.codes import unpack
from quant.config import QuantConfig
from quant.linear import quantize_
from quant.rounding import quantize_weight


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain and a packed folder, opened, with all their weights."""
    plain, packed = tmp_path_factory.mktemp("hf") / "plain", tmp_path_factory.mktemp("hf") / "packed"
    write_variant(plain, "bitnet", max_shard_bytes=9_000)
    write_variant(packed, "bitnet")
    pack_folder(packed, "autobitlinear")
    result = []
    for folder in (plain, packed):
        source = HuggingFaceSource(folder)
        result.append((source, {name: whole(source, name).flatten() for name in source.shapes}))
    return result


@settings(max_examples=200)
@given(data=st.data())
def test_any_range_is_that_of_the_whole(folders, data):
    source, weights = data.draw(st.sampled_from(folders))
    name = data.draw(st.sampled_from(sorted(weights)))
    start = data.draw(st.integers(0, len(weights[name])))
    length = data.draw(st.integers(0, len(weights[name]) - start))
    value = source.read("weight", name, start, length)
    assert value.dtype == torch.float32
    assert torch.equal(value, weights[name][start : start + length])
    value.fill_(7)  # its own memory
    assert torch.equal(source.read("weight", name, start, length), weights[name][start : start + length])
    with pytest.raises(CheckpointError, match=f"{name} holds {len(weights[name])}"):
        source.read("weight", name, start, len(weights[name]) - start + 1)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_packed_weights_are_those_that_transformers_unpacks(transformers, tmp_path, linear_class):
    from transformers.integrations.bitnet import unpack_weights

    folder = tmp_path / "hf"
    write_variant(folder, "bitnet")
    pack_folder(folder, linear_class)
    tensors, source = load_file(folder / "model.safetensors"), HuggingFaceSource(folder)
    assert "packed" in source.missing[-1]
    for name in source.shapes:
        expected = tensors[name]
        if expected.dtype == torch.uint8:
            with torch.compiler.set_stance("force_eager"):
                codes, scale = unpack_weights(expected, dtype=torch.float32), tensors[f"{name}_scale"]
            expected = codes * scale if linear_class == "autobitlinear" else codes / scale
        assert torch.equal(whole(source, name), expected), name


def test_requantizing_finds_the_same_codes_and_absmedian_the_same_scale(tmp_path):
    write_variant(tmp_path / "hf", "bitnet")
    pack_folder(tmp_path / "hf", "autobitlinear")
    tensors, source = load_file(tmp_path / "hf" / "model.safetensors"), HuggingFaceSource(tmp_path / "hf")
    for name in [name for name in source.shapes if name.endswith("_proj.weight")]:
        codes, scale = unpack(tensors[name]).float(), tensors[f"{name}_scale"][0].bfloat16().float()
        requantized, same_scale = quantize_weight(whole(source, name), QuantConfig(weights="absmedian"))
        assert torch.equal(requantized, codes)
        assert same_scale[0, 0] == scale
        requantized, smaller_scale = quantize_weight(whole(source, name), QuantConfig(weights="absmean"))
        assert torch.equal(requantized, codes)
        torch.testing.assert_close(smaller_scale[0, 0], scale * codes.abs().mean())


def packed_logits(transformers, folder, linear_class):
    """Logits with Transformers' layers, put in as its quantizer does, which needs `accelerate` where this does not."""
    from transformers.integrations import bitnet

    layer_class = {"bitlinear": bitnet.BitLinear, "autobitlinear": bitnet.AutoBitLinear}[linear_class]
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    del hf_config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa").eval()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            layer = layer_class(module.in_features, module.out_features, bias=False, dtype=torch.float32)
            model.set_submodule(name, layer)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
        return model(random_tokens(3, 17)).logits


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_packed_model_computes_the_same_up_to_rounding(transformers, tmp_path, linear_class):
    """Activations are rounded in another order, so not bit for bit; the wrong convention of the scale is far off."""
    folder = tmp_path / "hf"
    write_variant(folder, "bitnet")
    pack_folder(folder, linear_class)
    expected = packed_logits(transformers, folder, linear_class)

    def distance():
        model = load(folder)
        quantize_(model, QuantConfig(weights="absmedian"))
        with torch.no_grad():
            return (model(random_tokens(3, 17)).logits - expected).std() / expected.std()

    assert distance() < 0.02
    other = "autobitlinear" if linear_class == "bitlinear" else "bitlinear"
    edit_config(folder, quantization_config={"quant_method": "bitnet", "linear_class": other})
    assert distance() > 0.2


def test_modules_that_are_not_packed(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder, "llama")
    before = load_file(folder / "model.safetensors")
    pack_folder(folder, "bitlinear", modules_to_not_convert=["lm_head", "model.layers.1.mlp"])
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in before.items() if "layers.1.mlp" in name}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(kept))} | kept
    save_file(tensors, folder / "model.safetensors")
    source = HuggingFaceSource(folder)
    assert all(torch.equal(whole(source, name), value) for name, value in kept.items())
    edit_config(folder, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(
        CheckpointError, match=r"(?s)missing: model.layers.1.mlp.gate_proj.weight_scale \(1,\).*must be uint8"
    ):
        HuggingFaceSource(folder)


def test_weights_that_are_quantized_while_computing_are_16_bit(tmp_path):
    folder = tmp_path / "hf"
    model = write_variant(folder, "bitnet")
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config=online)
    assert torch.equal(our_logits(folder, torch.float32), model(random_tokens(3, 17)).logits)
    source = HuggingFaceSource(folder)
    assert "rounds to ternary codes while it computes" in source.missing[-1]
    assert len(source.missing) == 4


ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["llama", "olmo", "olmo2", "bitnet", "qwen3"])
def test_without_a_list_modules_are_left_out_as_transformers_does(transformers, tmp_path, variant, tied):
    from transformers.quantizers.base import HfQuantizer

    model = build(replace(VARIANTS[variant], tie_embeddings=tied))
    write_hf(ModelSource(model), model.config, tmp_path / "hf", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    left_out = {f"{name}.weight" for name in HfQuantizer.get_modules_to_not_convert(theirs)}
    edit_config(tmp_path / "hf", quantization_config=ONLINE)
    projections = {name for name, _ in theirs.named_parameters() if name.endswith("_proj.weight")}
    assert set(HuggingFaceSource(tmp_path / "hf").ternary) == projections - left_out


@pytest.mark.parametrize("left_out", [[], ["model"], ["model.layers.0"], ["lm_head.weight"], ["LM_HEAD"]])
def test_a_head_that_transformers_would_round_is_refused(tmp_path, left_out):
    write_variant(tmp_path / "hf", "llama")
    for head in ("lm_head", "head"):
        edit_config(tmp_path / "hf", quantization_config=ONLINE | {"modules_to_not_convert": [*left_out, head]})
        HuggingFaceSource(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=ONLINE | {"modules_to_not_convert": left_out})
    with pytest.raises(
        CheckpointError, match=r"config.json: .*without lm_head, so that Transformers rounds the output"
    ):
        HuggingFaceSource(tmp_path / "hf")


def transformers_5_converts(name, left_out):
    """`should_convert_module` of Transformers 5.24."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return not any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in left_out)


@given(
    left_out=st.lists(
        st.sampled_from(
            ["lm_head", "mlp", "model", "model.layers.1", "model.layers.1.", "model.layers.1.mlp", "layers.1", "down",
             "proj", "q_proj", "mlp.up_proj", "model.layers.1.self_attn.q_proj", "self_attn.q", "odel.layers.0"]
        ),
        max_size=4,
    )
)  # fmt: skip
def test_modules_are_left_out_as_transformers_5_does(left_out):
    packing = Packing(divides=True, left_out=tuple(left_out), online=False)
    for layer in (0, 1, 10, 11):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}"
            assert packing.applies_to(f"{name}.weight") == transformers_5_converts(name, left_out), name


@pytest.mark.parametrize("pattern", ["model.layers.*", "(a+)+$", "lm_head|mlp"])
def test_patterns_of_modules_are_refused(tmp_path, pattern):
    write_variant(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config={"quant_method": "bitnet", "modules_to_not_convert": [pattern]})
    with pytest.raises(CheckpointError, match="are patterns, and only names of whole modules are read"):
        HuggingFaceSource(tmp_path / "hf")


def test_damaged_codes_and_scales(tmp_path):
    folder, name = tmp_path / "hf", "model.layers.0.self_attn.q_proj.weight"
    write_variant(folder, "bitnet")
    pack_folder(folder, "bitlinear")
    sound = load_file(folder / "model.safetensors")
    for change, message in (
        ({name: torch.full_like(sound[name], 0xFF)}, "model.safetensors: a packed byte holds a code other"),
        ({f"{name}_scale": torch.zeros(1)}, f"{name}_scale is 0.0 and must be positive"),
        ({f"{name}_scale": torch.full((1,), torch.nan)}, f"{name}_scale is nan"),
        ({f"{name}_scale": torch.full((1,), 1e-40)}, f"{name}_scale is .*e-4"),  # by which codes become infinite
    ):
        save_file(sound | change, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            whole(HuggingFaceSource(folder), name)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "only quant_method 'bitnet' is read"),
        ("bitnet", "only quant_method 'bitnet' is read"),
        ({"quant_method": "bitnet", "linear_class": "other"}, "linear_class 'other'"),
        ({"quant_method": "bitnet", "quantization_mode": "both"}, "quantization_mode 'both'"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm true"),
        ({"quant_method": "bitnet", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head': must be"),
    ],
)
def test_quantizations_that_are_not_read(tmp_path, quantization, message):
    write_variant(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=quantization)
    with pytest.raises(CheckpointError, match=f"config.json: .*(?s:.*){message}"):
        HuggingFaceSource(tmp_path / "hf")


def test_folders_of_mlx_are_not_read(tmp_path):
    write_variant(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization={"group_size": 64, "bits": 2, "mode": "affine"})
    with pytest.raises(CheckpointError, match=r"config.json: quantization: is of a folder of MLX, which is not read"):
        HuggingFaceSource(tmp_path / "hf")


def test_a_bias_that_is_scaled_with_the_weights_is_refused_where_codes_are_multiplied(tmp_path):
    write_variant(tmp_path / "hf", "qwen2")
    pack_folder(tmp_path / "hf", "autobitlinear")
    source = HuggingFaceSource(tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"autobitlinear multiplies the bias of model\.layers\.0\.self_attn\.q_proj"
    ):
        source.packed("model.layers.0.self_attn.q_proj.weight")
    source.packed("model.layers.0.self_attn.o_proj.weight")
