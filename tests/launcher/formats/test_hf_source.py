"""Hugging Face's folders, read: the model computes the same bits, and what is wrong is said."""

import json
import os
import struct

import pytest
import torch
from hf_folders import DTYPES, edit_config, logits_of, our_logits, whole, write_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, random_tokens
from safetensors.torch import load_file, save_file

from launcher.errors import CheckpointError
from launcher.formats.hf_source import HuggingFaceSource, is_hf
from model.hf import config_to_hf

TINY_HF = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 4.0}
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"head_dim": 12, "rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "llama-relu2": ("Llama", {"num_key_value_heads": 1, "hidden_act": "relu2"}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "olmo": ("Olmo", {"tie_word_embeddings": True}),
    "olmo-grouped": ("Olmo", {"num_key_value_heads": 2, "rope_theta": 5e5}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo2-tied": ("Olmo2", {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "bitnet": ("BitNet", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bitnet-silu": ("BitNet", {"num_key_value_heads": 4, "hidden_act": "silu", "rope_theta": 1e4}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "use_sliding_window": False}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "llama-linear": ("Llama", {"head_dim": 24, "rope_scaling": LINEAR}),
    "llama-llama3": ("Llama", {"head_dim": 24, "rope_theta": 100.0, "rope_scaling": LLAMA3}),
    "llama-yarn": ("Llama", {"head_dim": 24, "rope_theta": 100.0, "rope_scaling": YARN}),
    "mistral-yarn": (
        "Mistral",
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, "rope_scaling": YARN},
    ),
    "olmo-linear": ("Olmo", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "olmo2-linear": ("Olmo2", {"num_key_value_heads": 2, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "qwen2-yarn": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 100.0, "rope_scaling": YARN}),
    "qwen3-yarn": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 100.0, "rope_scaling": YARN}),
    "bitnet-llama3": ("BitNet", {"num_key_value_heads": 2, "rope_theta": 100.0, "rope_scaling": LLAMA3}),
    "qwen3-tied": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}),
}


def hf_model(transformers, family, options):
    """A random model of Transformers, its norms and biases random too."""
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{family}Config")(**TINY_HF, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config)
    for name, parameter in model.named_parameters():
        parameter.data = (
            0.15 * torch.randn_like(parameter) if "norm" not in name else 1 + 0.3 * torch.randn_like(parameter)
        )
    return model


# Reading


@pytest.mark.parametrize(("family", "options"), MODELS.values(), ids=MODELS)
def test_a_transformers_model_computes_the_same_bits_here(transformers, tmp_path, family, options):
    hf_model(transformers, family, options).save_pretrained(tmp_path)
    for dtype in DTYPES:
        assert torch.equal(our_logits(tmp_path, dtype), logits_of(transformers, tmp_path, dtype)), dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_shards_of_16_bits_are_read_exactly(transformers, tmp_path, stored):
    hf_model(transformers, *MODELS["qwen2"]).to(stored).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    source = HuggingFaceSource(tmp_path)
    assert any(str(stored).removeprefix("torch.") in sentence for sentence in source.missing)
    assert torch.equal(our_logits(tmp_path, torch.float32), logits_of(transformers, tmp_path, torch.float32))


def test_what_a_folder_does_not_hold_is_said(tmp_path):
    write_variant(tmp_path / "hf")
    source = HuggingFaceSource(tmp_path / "hf")
    assert not source.has_moments
    assert [word for word in ("moments", "data position", "random generators") if word in " ".join(source.missing)]
    assert len(source.missing) == 3
    for read in (
        lambda: source.read("exp_avg", "model.norm.weight", 0, 1),
        lambda: source.read_step("model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match="holds no"):
            read()


def test_a_head_stored_beside_a_tied_embedding_is_left_out(tmp_path):
    folder = tmp_path / "hf"
    model = write_variant(folder, "bitnet")
    file = folder / "model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    head = model.model.embed_tokens.weight.detach().clone()
    save_file(load_file(file) | {"lm_head.weight": head, "model.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert list(HuggingFaceSource(folder).shapes) == [name for name, _ in model.named_parameters()]
    assert torch.equal(our_logits(folder, torch.float32), model(random_tokens(3, 17)).logits)


def test_a_trained_head_beside_a_tied_embedding_is_not_dropped(tmp_path):
    folder = tmp_path / "hf"
    model = write_variant(folder, "bitnet")
    trained = model.model.embed_tokens.weight.detach().clone()
    trained[-1, -1] += 1
    for head in (trained, torch.zeros(3)):
        file = folder / "model.safetensors"
        save_file(load_file(file) | {"lm_head.weight": head}, file)
        with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight, and config"):
            HuggingFaceSource(folder)


@pytest.mark.parametrize("token", [[1, 2], "<s>", True, -1, 96, 1.5])
def test_an_odd_first_token_is_named_when_it_is_needed(tmp_path, token):
    folder = tmp_path / "hf"
    write_variant(folder)
    edit_config(folder, bos_token_id=95)
    assert HuggingFaceSource(folder).first_token == 95
    edit_config(folder, bos_token_id=None)
    assert HuggingFaceSource(folder).first_token is None
    edit_config(folder, bos_token_id=token)
    source = HuggingFaceSource(folder)
    with pytest.raises(CheckpointError, match=r"hf/config.json: bos_token_id .* must be one token, 0 to 95, or null"):
        _ = source.first_token


# What is wrong with a folder


def test_an_adapter_is_not_left_out(tmp_path):
    write_variant(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"holds an adapter .*merge it into the model"):
        HuggingFaceSource(tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "value"), [("weight_bits", 1), ("input_bits", 8), ("compression_config", {"format": "dense"})]
)
def test_quantization_by_other_keys_is_refused(tmp_path, key, value):
    write_variant(tmp_path / "hf")
    edit_config(tmp_path / "hf", **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json: .*(?s:.*){key} "):
        HuggingFaceSource(tmp_path / "hf")


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(31)
    weights["model.layers.0.input_layernorm.weight"] = torch.ones(32, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceSource(folder)
    assert str(caught.value).splitlines() == [
        f"{folder} does not hold the model that its config.json describes:",
        "  missing: model.layers.1.mlp.up_proj.weight (56, 32)",
        "  not in the model: model.layers.0.self_attn.q_proj.bias (32,)",
        "  dtype: model.layers.0.input_layernorm.weight is int64 and must be float32 or bfloat16 or float16",
        "  shape: model.norm.weight is (31,) and must be (32,)",
    ]


@pytest.mark.parametrize("name", ["llama", "bitnet"])  # untied, tied
def test_a_padded_vocabulary_is_named_with_the_right_number(tmp_path, name):
    write_variant(tmp_path / "hf", name)
    edit_config(tmp_path / "hf", vocab_size=90)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceSource(tmp_path / "hf")
    assert str(caught.value).splitlines()[1:] == [
        "  vocabulary: config.json says vocab_size 90 and the embedding has 96 rows; "
        '"vocab_size": 96 is right for these files, rows that no token uses included'
    ]
    edit_config(tmp_path / "hf", vocab_size=96)
    HuggingFaceSource(tmp_path / "hf")


def test_an_untied_head_is_required(tmp_path):
    write_variant(tmp_path / "hf", "bitnet")
    edit_config(tmp_path / "hf", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \(96, 32\)"):
        HuggingFaceSource(tmp_path / "hf")


def test_files_that_are_not_there_or_elsewhere(tmp_path):
    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    assert not is_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        HuggingFaceSource(tmp_path)
    config.write_text(json.dumps(config_to_hf(VARIANTS["llama"])))
    assert is_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle, which is never opened: save the model as safetensors"):
        HuggingFaceSource(tmp_path)
    for content, message in (
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', which is not the bare name"),
        ({"weight_map": {"a": "x.safetensors", "b": "y"}}, "names files that do not exist: x.safetensors, y"),
        ({"weight_map": {"a": "x" * 300}}, "xxx.*, which is not the bare name"),
        ({"weight_map": {"a": 5}}, "must have a weight_map"),
        ({"weight_map": {}}, "must have a weight_map"),
        ({}, "must have a weight_map"),
        ([], "must hold a JSON object, not a list"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"(?s)index.json.*{message}"):
            HuggingFaceSource(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    index.write_text(json.dumps({"weight_map": {"a": "pipe"}}))
    with pytest.raises(CheckpointError, match="do not exist: pipe"):  # opening it would wait for ever
        HuggingFaceSource(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder, max_shard_bytes=9_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(CheckpointError, match=f"{second.name}: model.embed_tokens.weight is also in {first.name}"):
        HuggingFaceSource(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"{}", "model_type None is not known"),
        (b'{"model_type": ["llama"]}', ".* is not known"),
    ],
)
def test_a_malformed_configuration(tmp_path, content, message):
    write_variant(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        HuggingFaceSource(tmp_path / "hf")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "vocab_size"])
def test_absurd_sizes_end_at_once(tmp_path, key):
    write_variant(tmp_path / "hf")
    for value in (10**12 + 39, 10**30, -1):
        edit_config(tmp_path / "hf", **{key: value})
        with pytest.raises(CheckpointError):
            HuggingFaceSource(tmp_path / "hf")


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "hf"
    write_variant(folder, max_shard_bytes=30_000)
    return sorted(folder.iterdir())


@settings(max_examples=200)
@given(data=st.data(), cut=st.booleans())
def test_a_damaged_folder_is_read_or_one_error(sound_files, data, cut):
    """Headers and JSON are overwritten, or files cut off; other programs' weights have no digests to tell damage by."""
    path = data.draw(st.sampled_from(sound_files), label="file")
    sound = path.read_bytes()
    header = 8 + struct.unpack("<Q", sound[:8])[0] if path.suffix == ".safetensors" else len(sound)
    damaged = bytearray(sound)
    if cut:
        del damaged[data.draw(st.integers(0, len(sound) - 2)) :]
    else:
        places = st.lists(
            st.tuples(st.integers(0, header - 1), st.sampled_from(b'0019{}[]",:-.ae\x00\xff')), max_size=3
        )
        for place, byte in data.draw(places):
            damaged[place] = byte
    path.write_bytes(damaged)
    try:
        source = HuggingFaceSource(path.parent)
        for name in source.shapes:
            whole(source, name)
    except CheckpointError as error:
        assert str(path.parent) in str(error)  # noqa: PT017
        assert not cut or path.name in str(error)  # noqa: PT017
    else:
        assert not cut
    finally:
        path.write_bytes(sound)
