"""vLLM computes folders of compressed-tensors as codes times level, where one is installed.

`TRITRAIN_VLLM_PYTHON` names the Python of an environment that has vLLM and `humming-kernels`; by default it is this
one. This test has not been run: it was written by vLLM's documentation.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_folders import model_of
from exports import exportable, ternary
from places import SUPPORT

from launcher.formats.hf_export import export_hf
from quant.config import QuantConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

RECIPES = {
    "matrix": QuantConfig(),
    "row": QuantConfig(granularity="row"),
    "group": QuantConfig(granularity="group", group_size=128),
}
NUM_TOKENS = 16
NATS = 0.1
"""Of a token's log-likelihood: what bf16 may change in it."""


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get("TRITRAIN_VLLM_PYTHON", sys.executable)
    tried = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{python} has no vLLM: {tried.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.parametrize("inputs", ["none", "int8"])
@pytest.mark.parametrize("granularity", RECIPES)
def test_vllm_computes_codes_times_level(vllm_python: str, tmp_path: Path, granularity: str, inputs: Any) -> None:
    """W2A16, and W2A8 with inputs on the grid of Humming's kernels, which is that of `int8`."""
    model = model_of("llama with a head", head_dim=64, num_heads=4)
    recipe = RECIPES[granularity]
    export_hf(exportable(model, recipe), tmp_path / "out", weights="compressed-tensors", inputs=inputs, tokenizer=None)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(384, (8 + number,), generator=draw).tolist() for number in range(8)]
    (tmp_path / "request.json").write_text(json.dumps({"prompts": prompts, "num_tokens": NUM_TOKENS}))
    command = [
        vllm_python,
        SUPPORT / "vllm_client.py",
        *(tmp_path / name for name in ("out", "request.json", "answer")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer").read_text())

    computed, latent = ternary(model, replace(recipe, activations=inputs)), model
    differences, of_latent = [], []
    for prompt, tokens, logprobs in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        assert len(tokens) == NUM_TOKENS
        row, theirs = torch.tensor([[*prompt, *tokens]]), torch.tensor(logprobs)
        chosen = torch.tensor(tokens)[:, None]
        with torch.no_grad():
            ours, without_codes = (
                each(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for each in (computed, latent)
            )
        assert (ours.amax(-1) - ours.gather(-1, chosen)[:, 0]).max() < NATS
        differences.append((ours.gather(-1, chosen)[:, 0] - theirs).abs())
        of_latent.append((without_codes.gather(-1, chosen)[:, 0] - theirs).abs())
    assert torch.cat(differences).mean() < NATS
    assert torch.cat(of_latent).mean() > NATS  # so weak a bound would still notice other weights
