"""Stand-ins of public models: their published `config.json` with smaller numbers, and random weights.

Everything that chooses a way of computing is as published; sizes are divided.
"""

import json
from typing import Any

import pytest
import torch
from hf_folders import DTYPES, edit_config, load, pack_folder
from models import random_tokens
from safetensors.torch import save_file

from launcher.errors import CheckpointError
from launcher.formats.hf_source import HuggingFaceSource
from launcher.inference.load import load_model
from quant.config import BITNET
from quant.linear import quantize_

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SIXTEEN_BITS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "is_llama_config": True,
        "pretraining_tp": 1, "initializer_range": 0.041666666666666664, "bos_token_id": 0, "eos_token_id": 0,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 40960, "max_window_layers": 28,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "bos_token_id": 90, "eos_token_id": 91,
    },
    "OLMo-2-0425-1B": {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "eos_token_id": 90, "pad_token_id": 91,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 131072, "mlp_bias": False,
        "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "pretraining_tp": 1, "bos_token_id": 90, "eos_token_id": 91,
    },
    "Falcon-E, prequantized": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768, "mlp_bias": False,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000042, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 11,
    },
}  # fmt: skip
BITNET_2B4T = {
    "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2", "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "initializer_range": 0.02, "bos_token_id": 90, "eos_token_id": 91, "use_cache": True,
}  # fmt: skip
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def write(transformers: Any, folder: Any, published: dict[str, Any]) -> None:
    """Save a model with random weights, norms included, in bf16 as it is released."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**published, vocab_size=96))
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.3) if "norm" in name else (0.0, 0.15)
        parameter.data = mean + std * torch.randn_like(parameter)
    model.bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**published, "vocab_size": 96}))


def their_logits(transformers: Any, folder: Any, dtype: torch.dtype) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # unpacking is compiled, which takes a minute
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
        for parameter in model.parameters():  # version 5.24 leaves embeddings of a packed folder as they are stored
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model.eval()(random_tokens(3, 60)).logits


def logits_here(folder: Any, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype).model(random_tokens(3, 60)).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).std() / expected.std())


@pytest.mark.parametrize("published", SIXTEEN_BITS.values(), ids=SIXTEEN_BITS)
def test_a_model_in_16_bits_computes_the_same_bits(transformers: Any, tmp_path: Any, published: Any) -> None:
    write(transformers, tmp_path, published)
    for dtype in DTYPES:
        expected = their_logits(transformers, tmp_path, dtype)
        assert torch.equal(logits_here(tmp_path, dtype), expected), dtype


def test_the_bf16_release_of_bitnet_rounds_as_transformers_does(transformers: Any, tmp_path: Any) -> None:
    """Latent weights, rounded to codes while computing, and inputs to 8 bits: the same up to the order of sums."""
    write(transformers, tmp_path, BITNET_2B4T)
    edit_config(tmp_path, quantization_config=ONLINE)
    source = HuggingFaceSource(tmp_path)
    assert len(source.ternary) == 3 * 7
    expected = their_logits(transformers, tmp_path, torch.float32)
    assert distance(logits_here(tmp_path, torch.float32), expected) < 0.02
    assert distance(our_latent(tmp_path), expected) > 0.2  # the latent weights are another model
    trained = load(tmp_path)  # as a ternary phase computes that starts from the folder
    quantize_(trained, BITNET)
    with torch.no_grad():
        assert distance(trained(random_tokens(3, 60)).logits, expected) < 0.02


def our_latent(folder: Any) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(random_tokens(3, 60)).logits


@pytest.mark.parametrize(
    ("published", "quantization"),
    [
        (BITNET_2B4T, {"linear_class": "autobitlinear", "quantization_mode": "offline"}),
        (SIXTEEN_BITS["Falcon-E, prequantized"], {"modules_to_not_convert": ["lm_head"]}),
    ],
    ids=["bitnet-b1.58-2B-4T", "Falcon-E"],
)
def test_packed_releases_compute_by_their_own_scales(
    transformers: Any, tmp_path: Any, published: Any, quantization: Any
) -> None:
    """2B4T multiplies by the scale (autobitlinear), Falcon-E divides (bitlinear, the default)."""
    write(transformers, tmp_path, published)
    linear_class = quantization.get("linear_class", "bitlinear")
    pack_folder(tmp_path, linear_class, BITNET)
    edit_config(tmp_path, quantization_config={"quant_method": "bitnet", **quantization})
    expected = their_logits(transformers, tmp_path, torch.float32)
    assert distance(logits_here(tmp_path, torch.float32), expected) < 0.02
    other = {"autobitlinear": "bitlinear", "bitlinear": "autobitlinear"}[linear_class]
    edit_config(tmp_path, quantization_config={"quant_method": "bitnet", **quantization, "linear_class": other})
    assert distance(logits_here(tmp_path, torch.float32), expected) > 0.2


def test_prequantized_weights_of_falcon_e_round_to_the_released_codes(transformers: Any, tmp_path: Any) -> None:
    """The latent weights and the packed release are one model: absmean finds the packed codes and their scale."""
    published = SIXTEEN_BITS["Falcon-E, prequantized"]
    write(transformers, tmp_path / "latent", published)
    write(transformers, tmp_path / "packed", published)
    pack_folder(tmp_path / "packed", "bitlinear", BITNET, modules_to_not_convert=["lm_head"])
    trained = load(tmp_path / "latent")
    quantize_(trained, BITNET)
    with torch.no_grad():
        found = trained(random_tokens(3, 60)).logits
    assert distance(logits_here(tmp_path / "packed", torch.float32), found) < 0.02
    assert distance(our_latent(tmp_path / "latent"), found) > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not known; .*Gemma scales its embeddings"),
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text' is not known; .*Gemma scales its embeddings"),
        ({"model_type": "phi3"}, "model_type 'phi3' is not known"),
    ],
)
def test_other_families_are_refused_in_a_sentence(tmp_path: Any, changes: Any, message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIXTEEN_BITS["SmolLM2-135M"] | {"vocab_size": 96} | changes))
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceSource(tmp_path)
