"""`--json`: one shape, and nothing else on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import outcome
from hf_folders import write_variant
from tiny import tiny_tree
from tiny_tasks import write_tasks
from tokenizer_files import write_bytes_tokenizer


def printed(*arguments, code=0):
    """What a command printed: an object whose parts are those of all commands."""
    found, out, err = outcome(*arguments, "--json")
    assert found == code, err
    return told(arguments[0], out)


def told(command, out):
    read = json.loads(out)
    assert read["command"] == command
    assert isinstance(read["results"], list)
    return read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json") / "hf"
    write_variant(folder, vocab_size=257)
    write_bytes_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    tree = tiny_tree(folder.parent / "shards", folder.parent / "unused")
    tree["phases"] = [{"precision": "16-bit", "steps": 4, "transition": {"optimizer": "reset"}}]
    tree["model"] = {
        "vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 56, "max_sequence_length": 32, "norm_eps": 1e-6, "tie_embeddings": False,
    }  # fmt: skip
    path = folder.parent / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_dry_runs_of_convert(folder, config, tmp_path):
    run = printed("convert", folder, "--to", tmp_path / "run", "--config", config, "--dry-run")
    assert (run["source"], run["to"], run["format"], run["phase"]) == (str(folder), str(tmp_path / "run"), "run", 0)
    assert "the optimizer starts over" in " ".join(run["notes"])
    tensors = {tensor["tensor"]: tensor for tensor in run["results"]}
    assert tensors["lm_head.weight"] == {
        "tensor": "lm_head.weight", "shape": [257, 32], "weight": "16-bit", "moments": "cleared",
    }  # fmt: skip
    universal = printed("convert", folder, "--to", tmp_path / "hf", "--format", "hf", "--dry-run")
    assert {tensor["tensor"] for tensor in universal["results"]} == tensors.keys()
    assert not list(tmp_path.iterdir())
    code, out, err = outcome("convert", folder, "--to", tmp_path / "hf", "--format", "hf", "--json")
    assert (code, out) == (2, "")
    assert "--json: belongs to --dry-run" in err


def test_verify(folder, config, tmp_path):
    code, _, err = outcome("convert", folder, "--to", tmp_path / "run", "--config", config)
    assert code == 0, err
    [sound] = printed("verify", tmp_path / "run")["results"]
    assert sound == {"location": sound["location"], "sound": True, "problems": []}
    [file] = Path(sound["location"]).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    [damaged] = printed("verify", tmp_path / "run", code=1)["results"]
    assert not damaged["sound"]
    assert file.name in damaged["problems"][0]


@pytest.mark.slow
def test_measurements_on_two_ranks(folder, tmp_path):
    """In processes of their own, whose launcher and libraries print nothing to stdout either; the results are equal."""
    (tmp_path / "text.txt").write_text("Some words, once more. " * 20)
    measured = printed("perplexity", folder, tmp_path / "text.txt")
    command = [Path(sys.executable).with_name("tritrain"), "perplexity", folder, tmp_path / "text.txt", "--json"]
    done = subprocess.run([*command, "--ranks", "2"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert told("perplexity", done.stdout) == measured


def test_eval_prints_what_it_writes(folder, tmp_path):
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path / "tasks")
    out = tmp_path / "scores.json"
    records = printed("eval", folder, "--tasks", "copa,cb", "--task-data", tmp_path / "tasks", "--out", out)["results"]
    assert records == json.loads(out.read_text())["results"]


def test_a_mistake_prints_nothing_to_stdout(folder, tmp_path):
    for arguments in (["verify", tmp_path / "none"], ["perplexity", folder, tmp_path / "none.txt"]):
        code, out, err = outcome(*arguments, "--json")
        assert (code, out) == (2, "")
        assert str(tmp_path) in err
