"""The page about public models: every command of it, on a small stand-in for the download."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import tritrain
from gguf_files import random_model
from hf_folders import ModelSource
from places import ROOT
from texts import TEXTS
from tokenizer_zoo import byte_level_family

from data.tokenizer import load_tokenizer
from launcher.formats.hf_folder import to_json, write_hf
from launcher.inference.load import load_model
from model.transformer import ModelConfig

PAGE = ROOT / "docs" / "convert-a-public-model.md"
SMALLER = {
    "vocab_size": 768,
    "hidden_size": 192,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "intermediate_size": 320,
    "max_sequence_length": 512,
}


def blocks(language: str) -> list[str]:
    parts = PAGE.read_text().split("```")[1::2]
    return [part.removeprefix(language) for part in parts if part.startswith(f"{language}\n")]


def stand_in(folder: Path, config: ModelConfig) -> None:
    """What `hf download` would have put there."""
    write_hf(ModelSource(random_model(config, std=0.02)), config, folder, torch.bfloat16)
    byte_level_family(folder / "tokenizer.json", "smollm")
    (folder / "tokenizer_config.json").write_bytes(to_json({"eos_token": "<|endoftext|>"}))


def made_shorter(path: Path) -> None:
    """Let the run that `init` has written be one of seconds; it has the phase that the page shows."""
    tree = yaml.safe_load(path.read_text())
    (text,) = blocks("yaml")
    (phase,), (shown,) = tree["phases"], yaml.safe_load(text)["phases"]
    shown["transition"]["ramp"]["steps"] = phase["transition"]["ramp"]["steps"]
    assert phase == shown
    tree["training"] |= {"global_batch_sequences": 4, "micro_batch_sequences": 2, "total_tokens": 6 * 4 * 256}
    tree["schedule"]["warmup_steps"] = 2
    phase["transition"]["ramp"]["steps"] = 3
    tree["data"] |= {"workers": 0, "validation_rows": 2}
    tree["evaluation"] = {"sample_prompts": ["The"], "sample_tokens": 3}
    path.write_text(yaml.safe_dump(tree))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path / "smollm2", ModelConfig(**SMALLER, norm_eps=1e-5, rope_theta=1e5))
    (tmp_path / "my-text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "my-text" / f"{number}.txt").write_text(text)
    (tmp_path / "held-out.txt").write_text(TEXTS[0][:2000])
    printed = {}
    for line in filter(None, "".join(blocks("bash")).splitlines()):
        program, *words = shlex.split(line)
        assert program in ("tritrain", "hf", "llama-cli")
        if words[0] == "train":  # starts ranks, in the place of the process that it is called in
            command = [sys.executable, "-c", "from launcher.cli import main; main()", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
        elif program == "tritrain":
            printed[" ".join(words[:2])] = tritrain(*words)
        if words[0] == "init":
            made_shorter(tmp_path / words[1])
    assert "bits per byte" in printed["perplexity smollm2"]
    assert "bits per byte" in printed["perplexity runs/smollm2-ternary"]
    model = load_model(tmp_path / "smollm2.gguf", dtype=torch.float32)
    trained = load_model(tmp_path / "runs/smollm2-ternary", dtype=torch.float32)
    tokenizer = load_tokenizer(tmp_path / "smollm2")
    tokens = torch.tensor([tokenizer.encode(TEXTS[0][:400])])
    with torch.no_grad():
        found, expected = (each.model(tokens).logits.log_softmax(-1) for each in (model, trained))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
