"""Scaled rotary positions in every format: written, read again, and computed by other programs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import export_bounds
from exports import exportable, ternary
from gguf_files import narrow, random_model, read_tensors, values_of
from hf_folders import ModelSource, edit_config, our_logits, write_variant
from models import VARIANTS, build, random_tokens

from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.open import check_model, open_source
from launcher.formats.published_gguf import PublishedGGUF
from launcher.inference.streamed import streamed_nll
from model.config import ModelConfig, RopeScalingConfig
from model.gguf import ARCHITECTURES, gguf_architecture, gguf_metadata
from model.mlx import mlx_problems
from model.rotary import rotary_frequencies

SCALED = {
    "linear": RopeScalingConfig(method="linear", factor=4.0),
    "llama3": RopeScalingConfig(method="llama3", factor=8.0, original_max_sequence_length=64),
    "yarn": RopeScalingConfig(method="yarn", factor=4.0, original_max_sequence_length=64),
    "yarn with an attention factor": RopeScalingConfig(
        method="yarn", factor=2.0, original_max_sequence_length=32, attention_factor=1.5
    ),
}
IN_DECIMALS = {
    "linear": RopeScalingConfig(method="linear", factor=3.3),
    "llama3": RopeScalingConfig(
        method="llama3", factor=6.7, original_max_sequence_length=64, low_freq_factor=1.1, high_freq_factor=4.3
    ),
    "yarn": RopeScalingConfig(method="yarn", factor=2.7, original_max_sequence_length=64, attention_factor=1.0),
    "yarn with an attention factor": RopeScalingConfig(
        method="yarn", factor=3.3, original_max_sequence_length=32, attention_factor=1.0948236
    ),
}
"""Numbers that float32, in which a GGUF file holds them, does not hold exactly."""


def scaled(scaling: RopeScalingConfig, family: str = "llama", **changes: Any) -> ModelConfig:
    return narrow(family, rope_theta=100.0, rope_scaling=scaling, max_sequence_length=128, **changes)


@pytest.mark.parametrize("name", SCALED)
def test_a_folder_written_here_is_read_alike(transformers: Any, tmp_path: Path, name: str) -> None:
    model = build(replace(VARIANTS["llama"], rope_theta=100.0, rope_scaling=SCALED[name]))
    write_hf(ModelSource(model), model.config, tmp_path / "hf", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="sdpa").eval()
    tokens = random_tokens(3, 17)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(our_logits(tmp_path / "hf", torch.float32), logits)
        assert torch.equal(theirs(tokens).logits, logits)


def test_a_run_that_scales_otherwise_than_the_folder_is_refused(tmp_path: Path) -> None:
    write_variant(tmp_path / "hf", "llama")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    edit_config(tmp_path / "hf", rope_scaling=yarn)
    source = open_source(str(tmp_path / "hf"))
    with pytest.raises(CheckpointError) as caught:
        check_model(source, VARIANTS["llama"])
    assert (
        "model.rope_scaling is None, and {method: yarn, factor: 4.0, original_max_sequence_length: 8} in the checkpoint"
    ) in str(caught.value)
    assert isinstance(source, HuggingFaceSource)
    check_model(source, source.model_config)


# GGUF


@pytest.mark.parametrize("name", SCALED)
def test_a_gguf_file_says_how_positions_are_scaled(shards: Path, tmp_path: Path, name: str) -> None:
    built = random_model(scaled(SCALED[name]))
    export_gguf(exportable(built), tmp_path / "model.gguf", tokenizer=shards / "tokenizer.model")
    tensors, fields = read_tensors(tmp_path / "model.gguf")
    method = SCALED[name].method
    assert fields.get("llama.rope.scaling.type") == (None if method == "llama3" else method)
    assert ("rope_freqs.weight" in tensors) == (method == "llama3")
    if method == "llama3":  # llama.cpp divides the frequencies by these
        plain = rotary_frequencies(replace(built.config, rope_scaling=None), torch.device("cpu"))
        factors = torch.from_numpy(values_of(tensors["rope_freqs.weight"])).flatten()
        expected = rotary_frequencies(built.config, torch.device("cpu"))
        torch.testing.assert_close(plain / factors, expected)
        assert factors.min() == 1
        assert factors.max() == 8
    published = PublishedGGUF(tmp_path / "model.gguf")
    assert published.problems == published.notes == []
    assert published.config is not None
    again = published.config.rope_scaling
    assert again == SCALED[name]
    rows = torch.randint(384, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ternary(built)(rows[:, :-1], rows[:, 1:], reduction="none").token_nll.flatten()
    ours = torch.tensor(streamed_nll(published, rows.tolist()))
    assert (ours - expected).abs().mean() < 0.02  # embeddings have 8 bits in the file, and levels 16


@pytest.mark.parametrize("name", IN_DECIMALS)
def test_a_gguf_file_describes_the_model_that_it_was_written_from(shards: Path, tmp_path: Path, name: str) -> None:
    built = random_model(replace(scaled(IN_DECIMALS[name], norm_eps=1e-5), rope_theta=1234.567))
    export_gguf(exportable(built), tmp_path / "model.gguf", tokenizer=shards / "tokenizer.model")
    check_model(open_source(str(tmp_path / "model.gguf")), built.config)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scale_linear": 4.0}, "linear"),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_factor_without_a_type_is_a_linear_one(
    shards: Path, tmp_path: Path, monkeypatch: Any, fields: dict[str, Any], method: str | None
) -> None:
    """As in llama.cpp, which also reads the key that older files have."""
    monkeypatch.setattr("model.gguf.rope_fields", lambda config: fields)
    built = random_model(narrow("llama"))
    export_gguf(exportable(built), tmp_path / "model.gguf", tokenizer=shards / "tokenizer.model")
    config = PublishedGGUF(tmp_path / "model.gguf").config
    assert config is not None
    assert config.rope_scaling == (method and RopeScalingConfig(method=method, factor=4.0))


def test_frequencies_of_another_making_are_refused(shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """llama.cpp's own conversion writes no more than the factors; those of Llama 3.1 are recognized."""
    llama31 = RopeScalingConfig(method="llama3", factor=6.7, original_max_sequence_length=8192)
    built = random_model(replace(scaled(llama31, head_dim=128), rope_theta=5e5))
    monkeypatch.setattr("model.gguf.rope_fields", lambda config: {})
    export_gguf(exportable(built), tmp_path / "model.gguf", tokenizer=shards / "tokenizer.model")
    published = PublishedGGUF(tmp_path / "model.gguf")
    assert published.config is not None
    assert published.config.rope_scaling == llama31
    built = random_model(replace(built.config, rope_scaling=SCALED["llama3"]))
    export_gguf(exportable(built), tmp_path / "other.gguf", tokenizer=shards / "tokenizer.model")
    published = PublishedGGUF(tmp_path / "other.gguf")
    assert published.config is None
    assert "rope_freqs.weight holds other factors than those of Llama 3.1 and later" in published.notes[0]


@pytest.mark.parametrize("graph", ARCHITECTURES)
def test_graphs_that_do_not_read_frequencies_are_refused(graph: str) -> None:
    for name, scaling in SCALED.items():
        config = scaled(scaling, graph)
        if name == "llama3" and graph != "llama":
            with pytest.raises(ValueError, match=f"graph {graph} does not read the frequencies of rope_scaling.method"):
                gguf_architecture(config)
        else:
            assert gguf_metadata(config)[f"{graph}.rope.freq_base"] == 100.0
    for changes in ({"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}):
        (key,) = changes
        with pytest.raises(ValueError, match=f"rope_scaling.{key} is .* whatever the file says"):
            gguf_architecture(scaled(replace(SCALED["yarn"], **changes), graph))


GRAPHS = [(graph, name) for graph in ARCHITECTURES for name in SCALED if name != "llama3" or graph == "llama"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("graph", "name"), GRAPHS)
def test_llama_cpp_turns_by_the_same_angles(ask: Any, shards: Path, tmp_path: Path, graph: str, name: str) -> None:
    built = random_model(scaled(SCALED[name], graph, num_layers=2))
    tokens = torch.randint(384, (4, 120), generator=torch.Generator().manual_seed(0))
    export_gguf(exportable(built), tmp_path / "model.gguf", tokenizer=shards / "tokenizer.model", embeddings="f16")
    found = torch.from_numpy(ask(tmp_path / "model.gguf", sequences=tokens.tolist())["logits"]).log_softmax(-1)

    def divergence(scaling: RopeScalingConfig | None) -> float:
        other = random_model(replace(built.config, rope_scaling=scaling))
        with torch.no_grad():
            ours = ternary(other)(tokens).logits.log_softmax(-1)
        return float((ours.exp() * (ours - found)).sum(-1).mean())

    assert divergence(SCALED[name]) < export_bounds()["gguf"]
    assert divergence(None) > 3 * divergence(SCALED[name])  # so the scaling shows


# MLX


def test_what_mlx_does_not_read_is_refused() -> None:
    for name, scaling in SCALED.items():
        assert bool(mlx_problems(scaled(scaling))) == (name == "yarn with an attention factor")
    (problem,) = mlx_problems(scaled(replace(SCALED["yarn"], truncate=False)))
    assert "mlx-lm reads neither attention_factor nor truncate" in problem
