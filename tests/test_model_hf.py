import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_transformer import VARIANTS, build, random_tokens

from data.torchvision_repair import repair_torchvision
from model.hf import config_from_hf, config_to_hf, load_hf, save_hf
from model.transformer import Transformer

TINY_HF = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
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
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}),
}
FAMILIES = {name: config for name, config in VARIANTS.items() if name != "no-family"}


@pytest.fixture(scope="module")
def transformers():
    repair_torchvision()
    return pytest.importorskip("transformers")


def logits_of(transformers, folder, dtype):
    """Logits of Transformers' model, which must have taken every tensor of the folder and lacked none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        return model.eval()(random_tokens(3, 17)).logits


def our_logits(folder, dtype):
    config, tensors = load_hf(folder)
    model = Transformer(config)
    model.load_state_dict(dict(tensors))
    with torch.no_grad():
        return model.to(dtype)(random_tokens(3, 17))


@pytest.mark.parametrize(("family", "options"), MODELS.values(), ids=MODELS)
def test_a_transformers_model_computes_the_same_bits_here(transformers, tmp_path, family, options):
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{family}Config")(**TINY_HF, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config)
    for name, parameter in model.named_parameters():
        parameter.data = (
            0.15 * torch.randn_like(parameter) if "norm" not in name else 1 + 0.3 * torch.randn_like(parameter)
        )
    model.save_pretrained(tmp_path, safe_serialization=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(our_logits(tmp_path, dtype), logits_of(transformers, tmp_path, dtype)), dtype


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_our_model_computes_the_same_bits_in_transformers(transformers, tmp_path, config):
    model = build(config)
    save_hf(tmp_path, config, model.state_dict(), bos_token_id=1, eos_token_id=2)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            expected = model.to(dtype)(random_tokens(3, 17))
        assert torch.equal(logits_of(transformers, tmp_path, dtype), expected), dtype
    hf_config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (hf_config.bos_token_id, hf_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_configuration_survives_the_round_trip(config):
    config = replace(config, init_std=0.03)
    explicit = replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == explicit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 9_000])
def test_tensors_survive_the_round_trip(tmp_path, dtype, max_shard_bytes):
    config = VARIANTS["bitnet"]
    weights = build(config).to(dtype).state_dict()
    save_hf(tmp_path, config, weights, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 9_000) == (tmp_path / "model.safetensors.index.json").exists()
    for file in files:
        assert len(load_file(file)) == 1 or sum(each.nbytes for each in load_file(file).values()) <= max_shard_bytes
    loaded = dict(load_hf(tmp_path)[1])
    assert loaded.keys() == weights.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], weights[name]) for name in weights)


def test_sharded_folders_open_in_transformers(transformers, tmp_path):
    model = build(VARIANTS["olmo2"])
    save_hf(tmp_path, model.config, model.state_dict(), max_shard_bytes=9_000)
    with torch.no_grad():
        assert torch.equal(logits_of(transformers, tmp_path, torch.float32), model(random_tokens(3, 17)))


def test_a_head_stored_beside_a_tied_embedding_is_left_out(tmp_path):
    config = VARIANTS["bitnet"]
    weights = build(config).state_dict()
    save_hf(tmp_path, config, weights)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    stored = weights | {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(stored, tmp_path / "model.safetensors")
    assert dict(load_hf(tmp_path)[1]).keys() == weights.keys()


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path):
    config = VARIANTS["llama"]
    weights = build(config).state_dict()
    save_hf(tmp_path, config, weights)
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(31)
    expected = (
        r"does not hold the model:\n  missing: lm_head\.weight \(96, 32\)"
        r"\n  not in the model: model\.layers\.0\.self_attn\.q_proj\.bias \(32,\)"
        r"\n  shape: model\.norm\.weight is \(31,\) and must be \(32,\)$"
    )
    with pytest.raises(ValueError, match=expected):
        save_hf(tmp_path / "out", config, weights)
    assert not (tmp_path / "out").exists()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=expected):
        load_hf(tmp_path)


def test_files_that_are_not_there_or_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(VARIANTS["llama"])))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_hf(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"outside of its folder: \.\./model\.safetensors"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; llama, olmo"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.*'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias True: the model has only False"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only silu and relu2"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types sliding_attention",
        ),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "(?s)attention_bias.*hidden_act"),
    ],
)
def test_what_the_model_cannot_express_is_refused(change, message):
    hf_config = {**config_to_hf(VARIANTS["llama"]), **change}
    hf_config = {key: value for key, value in hf_config.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf_config)


def test_keys_that_change_nothing_are_accepted():
    hf_config = config_to_hf(VARIANTS["llama"])
    del hf_config["rope_theta"]
    neutral = {
        "model_type": "mistral",
        "sliding_window": 4096,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "clip_qkv": None,
        "transformers_version": "5.0.0",
    }
    config = config_from_hf({**hf_config, **neutral})
    assert config == replace(VARIANTS["llama"], rope_theta=1e6, head_dim=8)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Olmo", "Olmo2", "BitNet", "Qwen3"])
def test_absent_keys_mean_what_they_mean_in_transformers(transformers, family):
    hf_config = getattr(transformers, f"{family}Config")()
    whole = hf_config.to_dict()
    needed = ("model_type", *(key for key in TINY_HF if key != "pad_token_id"))
    whole["sliding_window"] = None
    sparse = {key: whole[key] for key in needed} | {"sliding_window": None}
    assert config_from_hf(sparse) == replace(
        config_from_hf(whole),
        num_kv_heads=config_from_hf(sparse).num_kv_heads,
        head_dim=config_from_hf(sparse).head_dim,
    )
    assert config_from_hf(sparse).kv_heads == config_from_hf(whole).kv_heads
    assert config_from_hf(sparse).head_width == config_from_hf(whole).head_width


def test_combinations_without_a_family_are_refused():
    with pytest.raises(ValueError, match="no Hugging Face family has norm layernorm-nonparametric, norm_position post"):
        config_to_hf(VARIANTS["no-family"])
    with pytest.raises(ValueError, match="num_heads \\* head_dim is 64 and must be hidden_size 32"):
        config_to_hf(replace(VARIANTS["bitnet"], head_dim=16))
    with pytest.raises(ValueError, match="olmo in Hugging Face always has 1e-05"):
        config_to_hf(replace(VARIANTS["olmo"], norm_eps=1e-6))


def test_tensors_of_several_dtypes_are_refused(tmp_path):
    weights = build(VARIANTS["llama"]).state_dict()
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    with pytest.raises(ValueError, match="several dtypes, bfloat16, float32"):
        save_hf(tmp_path, VARIANTS["llama"], weights)
