"""Losses of chats and of pairs against TRL's trainers, on the same records and weights, example by example.

`TRITRAIN_TRL_PYTHON` names the Python of an environment that has TRL; by default it is this one.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_files import chat, pair, prepare_chats, prepare_pairs
from command import tritrain
from exports import exportable
from models import VARIANTS, build
from places import ROOT, SUPPORT
from torch import Tensor

from data.config import DataConfig
from data.labels import IGNORED_LABEL, MARKED
from data.loader import first_training_rows
from data.mixture import Source
from launcher.formats.hf_export import export_hf
from launcher.inference.load import load_model
from model.config import PreferenceConfig
from model.preference import Reference, by_side
from model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LENGTH = 256
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '<|im_end|>' }}{%- endif %}{{ '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Marks answers, as TRL wants it for the loss of these alone; that of pairs counts the line's end after them too."""
CHATS = [
    chat("?", "yes"),
    chat("a longer question", "no", "but that is not all there is to say"),
    chat("😀", "x" * 70),
    chat("and", "a", "b", "c"),
]
PAIRS = [
    pair("?", "yes", "no"),
    pair("which is longer", "x" * 50, "y"),
    pair("which is shorter", "x", "y" * 60),
    pair("😀", "Grüße", "!" * 9),
]
LOSSES = {"sigmoid": 0.3, "sigmoid_norm": 5.0}
CLOSE = 1e-6
"""Relative; both compute in fp32."""
CLOSE_OF_PAIRS = 1e-5
"""TRL adds the log-probabilities of an answer in fp32, in which a sum of 350 nats is rounded by 1.5e-5."""


@pytest.fixture(scope="module")
def python() -> str:
    python = os.environ.get("TRITRAIN_TRL_PYTHON", sys.executable)
    tried = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True, timeout=300)
    if tried.returncode:
        pytest.skip(f"{python} has no TRL: {tried.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def models() -> list[Transformer]:
    """The model and its reference."""
    config = replace(VARIANTS["llama"], vocab_size=320, max_sequence_length=LENGTH)
    model, reference = build(config), build(config, seed=1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(model.get_parameter(name) + 0.02 * parameter)
    return [model, reference]


@pytest.fixture(scope="module")
def folder(models: list[Transformer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared chats and pairs, and both models for Transformers."""
    folder = tmp_path_factory.mktemp("trl")
    (folder / "template.jinja").write_text(TEMPLATE)
    for prepared, records in ((prepare_chats, CHATS), (prepare_pairs, PAIRS)):
        prepared(folder, LENGTH, *records, chat_template=str(folder / "template.jinja"))
    for model, name in zip(models, ("model", "reference"), strict=True):
        export_hf(exportable(model), folder / name, weights="latent", dtype=torch.float32, tokenizer=None)
    shutil.copytree(folder / "tokenizer", folder / "model", dirs_exist_ok=True)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def answer(python: str, folder: Path) -> dict[str, Any]:
    """What TRL says of the records."""
    request = {"model": str(folder / "model"), "reference": str(folder / "reference")}
    request |= {"chats": CHATS, "pairs": PAIRS, "losses": LOSSES}
    (folder / "request.json").write_text(json.dumps(request))
    command = [python, SUPPORT / "trl_client.py", folder / "request.json", folder / "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return found


def rows_of(prepared: Path) -> tuple[Tensor, Tensor]:
    data = DataConfig(sources=(Source(path=str(prepared)),), sequence_length=LENGTH)
    tokens, labels, first_token = first_training_rows(data, vocab_size=320, num_rows=99)
    assert first_token == MARKED
    return tokens, labels


def place_of(ids: list[int], tokens: Tensor) -> tuple[int, slice]:
    """The row of a text, and where it is; its last token may be a label alone."""
    ids = [~ids[0], *ids[1:-1]]
    found = [
        (number, slice(at, at + len(ids)))
        for number, row in enumerate(tokens.tolist())
        for at in range(LENGTH - len(ids) + 1)
        if row[at : at + len(ids)] == ids
    ]
    assert len(found) == 1
    return found[0]


def gradient_norm(loss: Tensor, model: Transformer) -> float:
    loss.backward()
    squares = [each.grad.square().sum() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    return float(torch.stack(squares).sum().sqrt())


def test_chats_have_the_losses_of_the_sft_trainer(
    answer: dict[str, Any], models: list[Transformer], folder: Path
) -> None:
    theirs, model, (tokens, labels) = answer["sft"], models[0], rows_of(folder / "chats")
    assert len(theirs["rows"]) == len(CHATS) > len(tokens) > 1
    model.model.first_token = MARKED
    for row, loss in zip(theirs["rows"], theirs["each"], strict=True):
        number, place = place_of(row["input_ids"], tokens)
        assert labels[number, place].tolist() == row["labels"][1:]
        alone = torch.full_like(labels, IGNORED_LABEL)
        alone[number, place] = labels[number, place]
        assert model(tokens, alone).loss.item() == pytest.approx(loss, rel=CLOSE)
    together = model(tokens, labels).loss
    assert together.item() == pytest.approx(theirs["loss"], rel=CLOSE)
    assert gradient_norm(together, model) == pytest.approx(theirs["gradient_norm"], rel=10 * CLOSE)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_pairs_have_the_losses_of_the_dpo_trainer(
    answer: dict[str, Any], models: list[Transformer], folder: Path, loss_type: str
) -> None:
    theirs, (tokens, labels) = answer[loss_type], rows_of(folder / "pairs")
    for model in models:
        model.model.first_token = MARKED
    model, reference = models
    nll = reference(tokens, labels, reduction="none").token_nll
    config = PreferenceConfig(beta=LOSSES[loss_type], length_normalized=loss_type == "sigmoid_norm")
    given = Reference(-by_side(nll, tokens), config)
    assert len(theirs["rows"]) == len(PAIRS) > len(tokens) > 1
    for row, loss in zip(theirs["rows"], theirs["each"], strict=True):
        alone = torch.full_like(labels, IGNORED_LABEL)
        for side in ("chosen_ids", "rejected_ids"):
            ids, num_prompt = row["prompt_ids"] + row[side], len(row["prompt_ids"])
            number, place = place_of(ids, tokens)
            assert labels[number, place].tolist() == [IGNORED_LABEL] * (num_prompt - 1) + row[side]
            alone[number, place] = labels[number, place]
        assert model(tokens, alone, teacher=given).loss.item() == pytest.approx(loss, rel=CLOSE_OF_PAIRS)
    together = model(tokens, labels, teacher=given).loss
    assert together.item() == pytest.approx(theirs["loss"], rel=CLOSE_OF_PAIRS)
    assert gradient_norm(together, model) == pytest.approx(theirs["gradient_norm"], rel=10 * CLOSE_OF_PAIRS)


def python_block(page: Path) -> str:
    (block,) = [part for part in page.read_text().split("```python\n")[1:] if "SFTTrainer" in part]
    return block.partition("```")[0]


IN_FP32 = """
trained = AutoModelForCausalLM.from_pretrained("models/base", dtype=torch.float32)
tritrain.quantize_(trained, tritrain.QuantConfig(weights="absmean"))
trained.load_state_dict(model.state_dict())
torch.save(trained.eval()(torch.arange(66).view(2, 33)).logits.detach(), "out/logits.pt")
"""
"""Follows the script: the logits of what was trained, without the autocast that TRL leaves on the model."""


def test_a_model_that_trl_has_trained_in_ternary_comes_back_whole(python: str, folder: Path) -> None:
    """The script of the page, with fewer steps and on the processor; it is given `models/base` and `chats.jsonl`."""
    shutil.copytree(folder / "model", folder / "models" / "base")
    script = python_block(ROOT / "docs" / "fine-tuning.md").replace("max_steps=300", "max_steps=2, use_cpu=True")
    script = "import sys\nsys.modules['torchvision'] = None\n" + script
    script += IN_FP32
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=800
    )
    assert not done.returncode, done.stderr[-3000:]
    trained = torch.load(folder / "out" / "logits.pt", weights_only=True)
    tokens = torch.arange(66).view(2, 33)
    found = load_model(folder / "out" / "model", dtype=torch.float32)
    assert torch.equal(found.model(tokens).logits, trained)
    assert not torch.equal(load_model(folder / "models" / "base", dtype=torch.float32).model(tokens).logits, trained)
    tritrain("export", folder / "out" / "model", "--to", folder / "codes", "--format", "hf-ternary", "--dtype", "fp32")
    exported = load_model(folder / "codes", dtype=torch.float32).model(tokens).logits
    torch.testing.assert_close(exported, trained, rtol=1e-5, atol=1e-5)
