"""Models whose weights or activations are not finite: an error that says where, never a score or a text."""

import json

import pytest
import torch
from command import outcome
from hf_folders import write_variant
from safetensors.torch import load_file, save_file
from tiny_tasks import write_tasks
from tokenizer_files import write_bytes_tokenizer

COMMANDS = ("eval", "perplexity", "generate")
LAYER = "model.layers.1.mlp.up_proj.weight"


def weights_with(value):
    def change(tensors):
        tensors[LAYER].view(-1)[3] = value

    return change


def too_large(tensors):
    """Every weight is finite, but not the product of two layers."""
    for name in tensors:
        if "_proj" in name or "lm_head" in name:
            tensors[name].mul_(1e20)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "hf"
    write_variant(folder, vocab_size=257)
    write_bytes_tokenizer(folder / "tokenizer.json")
    (tmp_path / "text.txt").write_text("Some words.")
    write_tasks(tmp_path / "tasks")
    return folder


def arguments_of(command, folder):
    root = folder.parent
    return {
        "eval": ["--tasks", "copa,sst2", "--task-data", root / "tasks", "--out", root / "scores.json"],
        "perplexity": [root / "text.txt"],
        "generate": ["So", "--dtype", "fp32", "--max-tokens", 3],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "change", [weights_with(torch.nan), weights_with(-torch.inf), too_large], ids=["nan", "inf", "overflow"]
)
def test_it_is_an_error_before_there_is_a_result(folder, command, change):
    if command == "eval":
        pytest.importorskip("lm_eval")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    code, out, err = outcome(command, folder, *arguments_of(command, folder))
    assert code == 2, out
    assert "Traceback" not in err
    assert not (folder.parent / "scores.json").exists()
    if change is not too_large:
        assert LAYER in err
    else:
        place = {"eval": "copa, example 1: ", "perplexity": "text.txt: ", "generate": "the logits of the next token "}
        assert place[command] in err
        assert "overflow" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_sound_models_have_results(folder, command):
    if command == "eval":
        pytest.importorskip("lm_eval")
    code, _, err = outcome(command, folder, *arguments_of(command, folder))
    assert code == 0, err


def test_scores_hold_no_nan(folder):
    """One example says nothing of the error of a mean; JSON has no number for that."""
    pytest.importorskip("lm_eval")
    code, out, err = outcome("eval", folder, *arguments_of("eval", folder), "--limit", 1, "--json")
    assert code == 0, err

    def refuse(name):
        raise AssertionError(name)

    for text in (out, (folder.parent / "scores.json").read_text()):
        for record in json.loads(text, parse_constant=refuse)["results"]:
            assert record["scores"]["acc"]["standard_error"] is None
