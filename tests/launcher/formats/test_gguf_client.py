"""llama.cpp itself runs our GGUF files, and computes what training computes.

It is built from the source distribution of `llama-cpp-python`, in an environment of its own: some ten minutes the first
time. `TRITRAIN_LLAMA_ENVIRONMENT` names the environment's folder; the user's cache has it by default.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documented import export_bounds
from exports import ternary_config, write_checkpoint
from gguf_files import changed, export, narrow, random_model
from places import LLAMA, LLAMA_ENVIRONMENT, SUPPORT
from texts import SPECIAL, TEXTS

import launcher.formats.gguf_export
from data.tokenizer import SPACE_MARK, load_tokenizer, train_tokenizer
from launcher.formats.gguf_export import export_gguf
from launcher.formats.opened import open_exportable
from model.gguf import ARCHITECTURES
from model.transformer import ModelConfig, Transformer
from quant.config import QuantConfig
from quant.gguf import BLOCK_TYPES, BlockType
from quant.linear import dequantize_, quantize_

BOUND = export_bounds()["gguf"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NO_INDEX = ("No matching distribution", "Temporary failure in name resolution", "Connection", "timed out")


@pytest.fixture(scope="session")
def llama_python() -> Path:
    """The Python of an environment that has llama.cpp."""
    python = LLAMA_ENVIRONMENT / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        return python
    subprocess.run([sys.executable, "-m", "venv", LLAMA_ENVIRONMENT], check=True)
    pip = [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", LLAMA]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        if any(sign in installed.stderr for sign in NO_INDEX):
            pytest.skip(f"{LLAMA} cannot be had here: {installed.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{LLAMA} could not be built:\n{installed.stdout[-3000:]}\n{installed.stderr[-3000:]}")
    return python


@pytest.fixture
def ask(llama_python: Path, tmp_path: Path) -> Any:
    """Ask llama.cpp about a file; see `llama_client.py`."""

    def client(path: Path, **request: Any) -> dict[str, np.ndarray]:
        (tmp_path / "request.json").write_text(json.dumps(request))
        script = SUPPORT / "llama_client.py"
        arguments = [path, tmp_path / "request.json", tmp_path / "answer.npz"]
        done = subprocess.run([llama_python, script, *arguments], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return dict(np.load(tmp_path / "answer.npz"))

    return client


NUM_TOKENS = 128
"""Of a sequence: as many as the models of `ternary_config` may see."""


@pytest.fixture(scope="module")
def text_rows(shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Python sources in the tokens of `shards`, [rows, tokens]: to train on, and 24 held out."""
    tokenizer = load_tokenizer(shards / "tokenizer.model")
    ids = [token for text in TEXTS for token in [tokenizer.end_of_document, *tokenizer.encode(text)]]
    rows = torch.tensor(ids[: len(ids) // NUM_TOKENS * NUM_TOKENS]).view(-1, NUM_TOKENS)
    held_out = torch.arange(len(rows)) % (len(rows) // 24) == 0
    return rows[~held_out], rows[held_out][:24]


def log_likelihoods(model: Transformer, rows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens at all places, [rows, tokens, vocabulary]."""
    with torch.no_grad():
        return F.linear(model.model(rows), model.head).log_softmax(-1)


def trained(config: ModelConfig, rows: torch.Tensor, num_steps: int = 120) -> Transformer:
    """A model after a few ternary steps, in fp32."""
    model = random_model(config, std=0.02)
    quantize_(model, QuantConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10, (num_steps - step) / (num_steps / 2))
        batch = rows[torch.randint(len(rows), (8,), generator=generator)]
        logits = F.linear(model.model(batch[:, :-1]), model.head)
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model: Transformer, shards: Path, run: Path) -> Path:
    """The run that ends with this ternary model."""
    dequantize_(model)
    write_checkpoint(ternary_config(shards, run, model.config), model, step=8, phase=1)
    quantize_(model, QuantConfig())
    return run


class Comparison(NamedTuple):
    """Of llama.cpp's predictions with ours, in nats."""

    difference: float
    """Of the mean log-likelihoods of the text."""
    divergence: float
    """Mean Kullback-Leibler divergence."""
    furthest: float
    """Largest difference of the log-likelihood of one of the two likeliest tokens."""


def compare(ours: torch.Tensor, logits: np.ndarray, rows: torch.Tensor) -> Comparison:
    theirs, targets = torch.from_numpy(logits).log_softmax(-1), rows[:, 1:, None]
    return Comparison(
        float((theirs[:, :-1].gather(-1, targets) - ours[:, :-1].gather(-1, targets)).mean()),
        float((ours.exp() * (ours - theirs)).sum(-1).mean()),
        float((ours - theirs).gather(-1, ours.topk(2).indices).abs().max()),
    )


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_a_trained_model_computes_there_what_it_does_here(
    ask: Any, shards: Path, tmp_path: Path, text_rows: Any, family: str
) -> None:
    config = narrow(family, num_layers=4, num_kv_heads=2, intermediate_size=768, max_sequence_length=NUM_TOKENS)
    model = trained(config, text_rows[0])
    held_out, run = text_rows[1], save(model, shards, tmp_path / "run")
    ours = log_likelihoods(model, held_out)
    prompts = [row[: 8 + number].tolist() for number, row in enumerate(held_out[:20])]
    answers = {}
    for into in BLOCK_TYPES:
        export(run, tmp_path / f"{into}.gguf", into)
        request = {"sequences": held_out.tolist(), "prompts": prompts, "num_tokens": 64}
        answers[into] = answer = ask(tmp_path / f"{into}.gguf", **request)
        compared = compare(ours, answer["logits"], held_out)
        assert abs(compared.difference) < BOUND
        assert compared.divergence < BOUND
        assert_greedy(model, prompts, answer["continuations"], 2 * compared.furthest)
    assert np.array_equal(answers["tq1_0"]["logits"], answers["tq2_0"]["logits"])


def assert_greedy(model: Transformer, prompts: list[list[int]], continuations: np.ndarray, tie: float) -> None:
    """All but a few tokens that llama.cpp chose are our choice, and those are within ``tie`` nats of it."""
    assert continuations.shape == (20, 64)
    gaps = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        row = torch.tensor([[*prompt, *continuation.tolist()]])
        ours_TV = log_likelihoods(model, row)[0, len(prompt) - 1 : -1]
        gaps.append(ours_TV.amax(-1) - ours_TV.gather(-1, row[0, len(prompt) :, None])[:, 0])
    assert (torch.cat(gaps) == 0).float().mean() > 0.99
    assert torch.cat(gaps).max() < tie


GRAPHS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "llama untied, wide heads": (narrow(num_layers=2, num_kv_heads=2, head_dim=128, tie_embeddings=False), {}),
    "llama, norm_eps and theta": (narrow(num_layers=2, norm_eps=1e-2, rope_theta=100.0), {}),
    "llama, rows": (narrow(num_layers=2), {"granularity": "row", "weights": "twn"}),
    "llama, groups": (narrow(num_layers=2, intermediate_size=512), {"granularity": "group", "group_size": 256}),
    "qwen2": (narrow("qwen2", num_layers=2, num_kv_heads=2), {}),
    "qwen3": (narrow("qwen3", num_layers=2, num_kv_heads=2, head_dim=128), {}),
    "olmo": (narrow("olmo", num_layers=2), {}),
    "olmo2": (narrow("olmo2", num_layers=2, num_kv_heads=2, tie_embeddings=False), {}),
    "olmo2 tied": (narrow("olmo2", num_layers=2), {}),
}
NARROW = {"hidden_size": 192, "num_heads": 3, "num_kv_heads": 3, "intermediate_size": 320, "num_layers": 2}
GRAPHS_OF_64: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    family: (narrow(family, **NARROW), {}) for family in ARCHITECTURES
} | {"groups": (narrow(**NARROW), {"granularity": "group", "group_size": 64})}
"""With rows that only the blocks of Q2_0 divide."""


def predictions(
    ask: Any,
    shards: Path,
    folder: Path,
    config: ModelConfig,
    recipe: dict[str, Any],
    rows: torch.Tensor,
    into: BlockType = "tq2_0",
) -> Comparison:
    """Of a model with random weights, large enough that its predictions are far from even."""
    model = random_model(config, std=0.05)
    run = ternary_config(shards, folder / "run", config, {"preset": "bitnet-b1.58"} | recipe)
    write_checkpoint(run, model, step=8, phase=1)
    quantize_(model, run.phases[1].quantization or QuantConfig())
    export(folder / "run", folder / "model.gguf", into, embeddings="f16")
    return compare(log_likelihoods(model, rows), ask(folder / "model.gguf", sequences=rows.tolist())["logits"], rows)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_computes_the_model(ask: Any, shards: Path, tmp_path: Path, text_rows: Any, graph: str) -> None:
    compared = predictions(ask, shards, tmp_path, *GRAPHS[graph], text_rows[1])
    assert abs(compared.difference) < BOUND
    assert compared.divergence < BOUND


@pytest.mark.parametrize("graph", GRAPHS_OF_64)
def test_every_graph_computes_rows_that_64_divides(
    ask: Any, shards: Path, tmp_path: Path, text_rows: Any, graph: str
) -> None:
    """By the divergence: under random weights, the likelihood of a text is that of a few frequent tokens."""
    assert predictions(ask, shards, tmp_path, *GRAPHS_OF_64[graph], text_rows[1], "q2_0").divergence < BOUND


def test_rows_in_the_wrong_order_would_be_noticed(
    ask: Any, shards: Path, tmp_path: Path, text_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.formats.gguf_export, "gguf_rows", lambda values, name, config: values)
    assert predictions(ask, shards, tmp_path, narrow(num_layers=2), {}, text_rows[1]).divergence > 1e-3


# Tokenizers


@pytest.mark.parametrize("prefix", [False, True])
def test_text_is_tokenized_as_by_sentencepiece(ask: Any, shards: Path, tmp_path: Path, prefix: bool) -> None:
    import sentencepiece

    train_tokenizer(TEXTS, "bpe:2000", tmp_path / "tokenizer.model")
    changed(tmp_path / "tokenizer.model", "normalizer_spec", add_dummy_prefix=prefix)
    draw = random.Random(0)
    corpus = "".join(TEXTS)
    cuts = [(draw.randrange(len(corpus)), draw.randrange(1, 300)) for _ in range(1500)]
    alphabet = " \t\n\rab1<>/sx0Aé😀中\u200d\u00a0\u3000[]{}"
    texts = [corpus[start : start + length] for start, length in cuts]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(500)]
    texts += [text for text in SPECIAL if SPACE_MARK not in text]
    config = narrow(vocab_size=2048)
    model = random_model(config)
    write_checkpoint(ternary_config(shards, tmp_path / "run", config), model, step=8, phase=1)
    tokenizer = tmp_path / "tokenizer.model"
    opened = open_exportable(str(tmp_path / "run"), ternary=True)
    export_gguf(opened, tmp_path / "model.gguf", tokenizer=tokenizer)
    for special in (False, True):
        if special:  # names of special tokens in a prompt become these, as most programs ask for
            texts = [text for text in texts if "</s>" not in text] + ["<s>", "<unk>", "a<s> b<unk>"]
        answer = ask(tmp_path / "model.gguf", texts=texts, special=special)
        expected = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(texts)
        got = np.split(answer["text_tokens"], answer["text_lengths"].cumsum()[:-1])
        different = [text for text, a, b in zip(texts, got, expected, strict=True) if a.tolist() != b]
        assert different == []
    assert answer["bos_eos"].tolist() == [2, 2]
