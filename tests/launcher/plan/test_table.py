"""What `tritrain plan` prints."""

import json

import pytest
import yaml
from command import tritrain
from tiny import tiny_tree

from launcher.errors import ConfigError
from launcher.plan.gpus import GPUS, find_gpu, gpu_of_this_machine, named_gpu


@pytest.fixture
def config(shards, tmp_path):
    tree = tiny_tree(shards, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def test_the_table_comes_before_the_keys(config):
    shown = tritrain("plan", config)
    assert shown.index("Plan of tiny") < shown.index('run.name: "tiny"')


def test_json_has_time_disk_exports_and_missing_files(config):
    numbers = json.loads(
        tritrain("plan", config, "data.sequence_length=16", "model.vocab_size=64", "--json", "--ranks", "2")
    )["plan"]
    assert numbers["time"] == {"hours": None, "gpu": None, "utilization": 0.4}
    assert numbers["disk"]["needed_bytes"] == numbers["disk"]["checkpoints_bytes"] + numbers["disk"]["exports_bytes"]
    assert [each["name"] for each in numbers["exports"]] == [
        "hf --weights latent", "hf --weights dequantized", "hf-ternary", "compressed-tensors", "mlx", "onnx",
        "gguf --type tq2_0", "gguf --type q2_0", "gguf --type tq1_0", "gguf --type q8_0", "gguf --type f16",
    ]  # fmt: skip
    assert [each["key"] for each in numbers["missing"]] == ["data.sources.0.path"] * 2
    assert ["sequence_length 32" in each["problem"] for each in numbers["missing"]] == [True, False]


def test_the_table_has_each_problem_of_a_source(config):
    shown = tritrain("plan", config, "data.sequence_length=16", "model.vocab_size=64")
    assert shown.count("missing: data.sources.0.path") == 2


def test_time_is_flops_over_the_speed_that_is_reached(config):
    def numbers(*options):
        return json.loads(tritrain("plan", config, "--json", *options))["plan"]

    found = numbers("--gpu", "A100", "--utilization", "0.5", "--ranks", "2")
    assert found["time"]["hours"] == pytest.approx(found["total_flops"] / (0.5 * 312e12 * 2) / 3600)
    assert found["time"]["gpu"] == "NVIDIA A100"
    assert "not estimated: no GPU" in tritrain("plan", config)


def test_gpus_are_found_by_the_names_that_drivers_give(tmp_path):
    assert find_gpu("NVIDIA H100 80GB HBM3") == GPUS["NVIDIA H100"]
    assert find_gpu("NVIDIA H100 PCIe") == GPUS["NVIDIA H100 PCIe"]
    assert find_gpu("NVIDIA A100-SXM4-40GB").memory_gib == 40
    assert find_gpu("NVIDIA A100-SXM4-80GB").memory_gib == 80
    assert find_gpu("GeForce") is None
    assert named_gpu("h100") == ("NVIDIA H100", GPUS["NVIDIA H100"])
    with pytest.raises(ConfigError, match="--gpu V100 is not known; choose one of A100, "):
        named_gpu("V100")
    assert gpu_of_this_machine(tmp_path) is None
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n")
    assert gpu_of_this_machine(tmp_path) == ("NVIDIA H200", GPUS["NVIDIA H200"])
