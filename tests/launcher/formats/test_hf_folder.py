"""Hugging Face's folders, written: Transformers opens them, and they are whole or not there."""

import json
import subprocess
import sys

import pytest
import torch
from hf_folders import DTYPES, ModelSource, logits_of, whole, write_variant
from models import FAMILIES, VARIANTS, build, random_tokens
from safetensors.torch import load_file

from launcher.checkpoint.location import to_location
from launcher.errors import CheckpointError
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource, is_hf

# Writing


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_our_model_computes_the_same_bits_in_transformers(transformers, tmp_path, config):
    model = build(config)
    for dtype in DTYPES:
        folder = tmp_path / str(dtype)
        write_hf(ModelSource(model), config, folder, dtype)
        with torch.no_grad():
            expected = model.to(dtype)(random_tokens(3, 17)).logits
        assert torch.equal(logits_of(transformers, folder, dtype), expected), dtype
        assert transformers.AutoConfig.from_pretrained(folder).torch_dtype == dtype


def test_a_folder_holds_the_parameters_and_nothing_else(tmp_path):
    model = build(VARIANTS["qwen2"])
    write_hf(ModelSource(model), model.config, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shards_open_in_transformers(transformers, tmp_path):
    model = write_variant(tmp_path / "hf", "olmo2", max_shard_bytes=9_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert len(load_file(file)) == 1 or sum(each.nbytes for each in load_file(file).values()) <= 9_000
    with torch.no_grad():
        assert torch.equal(logits_of(transformers, tmp_path / "hf", torch.float32), model(random_tokens(3, 17)).logits)


def test_a_folder_is_complete_or_not_there(tmp_path, monkeypatch):
    class Failing(ModelSource):
        def read(self, kind, name, start, length):
            if name == "model.norm.weight":
                raise OSError("No space left on device")
            return super().read(kind, name, start, length)

    model = build(VARIANTS["llama"])
    (tmp_path / "hf.tmp").mkdir()
    (tmp_path / "hf.tmp" / "of the user").touch()
    with pytest.raises(CheckpointError, match=r"hf: OSError: No space left"):
        write_hf(Failing(model), model.config, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf.tmp"]
    assert (tmp_path / "hf.tmp" / "of the user").exists()
    write_hf(ModelSource(model), model.config, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="already exists; choose another name"):
        write_hf(ModelSource(model), model.config, tmp_path / "hf")


def test_a_folder_in_a_store(tmp_path):
    model, folder = build(VARIANTS["qwen2"]), to_location(f"memory://bucket{tmp_path}/hf")
    write_hf(ModelSource(model), model.config, folder, torch.float32, max_shard_bytes=9_000)
    assert is_hf(folder)
    source = HuggingFaceSource(folder)
    assert all(torch.equal(whole(source, name), value) for name, value in model.named_parameters())
    name = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]["model.norm.weight"]
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"names files that do not exist: {name}"):
        HuggingFaceSource(folder)


def test_what_no_family_has_or_does_not_fit_is_refused(tmp_path):
    model = build(VARIANTS["no-family"])
    with pytest.raises(CheckpointError, match="no Hugging Face family has norm layernorm-nonparametric"):
        write_hf(ModelSource(model), model.config, tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"(?s)a module does not fit the model:\n.*q_norm.weight: the model has it"
    ):
        write_hf(ModelSource(model), VARIANTS["qwen3"], tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_stays_small(tmp_path):
    """A process copies a folder of one large embedding; its peak stays far below the tensor."""
    program = """
import resource, sys
from pathlib import Path
import torch
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource
from launcher.checkpoint.source import Source
from model.size import parameter_shapes
from model.transformer import ModelConfig

class Zeros(Source):
    location, has_moments = "zeros", False
    config = ModelConfig(vocab_size=2**19, hidden_size=128, num_layers=1, num_heads=1, intermediate_size=8)
    shapes = parameter_shapes(config)
    def read(self, kind, name, start, length):
        return torch.zeros(length)
    def read_step(self, name):
        raise NotImplementedError

folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_hf(Zeros(), Zeros.config, folder / "a")
source = HuggingFaceSource(folder / "a")
write_hf(source, source.model_config, folder / "b")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert (tmp_path / "b" / "model.safetensors").stat().st_size > 125 * 2**20
    assert int(result.stdout) / 1024 < 230  # MiB; in fp32 the tensor has 256 of them
