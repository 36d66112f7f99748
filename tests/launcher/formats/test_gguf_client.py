"""llama.cpp itself runs our GGUF files, and computes what training computes."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import tritrain
from documented import export_bounds
from exports import ternary_config, write_checkpoint
from gguf_files import changed, export, narrow, random_model, read_tensors
from hf_folders import edit_config, write_variant
from texts import SPECIAL, TEXTS
from tokenizer_zoo import byte_level_family

import launcher.formats.gguf_export
from data.gguf_byte_level import PRE_TOKENIZERS
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


@pytest.mark.parametrize("family", [name for name, _ in PRE_TOKENIZERS])
def test_byte_level_tokenizers_divide_texts_there_as_here(ask: Any, tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    write_variant(folder, "llama", vocab_size=704)
    byte_level_family(folder / "tokenizer.json", family)
    tokenizer = load_tokenizer(folder)
    end = tokenizer.name_of(tokenizer.end_of_document)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end, "chat_template": "{{ eos_token }}"}))
    edit_config(folder, bos_token_id=None)
    tritrain("export", folder, "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16")
    draw = random.Random(0)
    corpus = "".join(TEXTS)
    cuts = [(draw.randrange(len(corpus)), draw.randrange(1, 200)) for _ in range(1500)]
    alphabet = " \t\n\rabéß日😀'sLL19.,!?\u00a0\u3000_-<|"
    texts = [corpus[start : start + length] for start, length in cuts]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(1500)]
    texts += [text for text in SPECIAL if text] + ["12345 67", "I'LL can't we've", "  \n\n \n x", "e\u0301"[:1]]
    answer = ask(tmp_path / "model.gguf", texts=texts)
    got = np.split(answer["text_tokens"], answer["text_lengths"].cumsum()[:-1])
    different = [text for text, tokens in zip(texts, got, strict=True) if tokens.tolist() != tokenizer.encode(text)]
    assert different == []
    (special,) = np.split(ask(tmp_path / "model.gguf", texts=[f"a{end}b"], special=True)["text_tokens"], 1)
    assert special.tolist() == [*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("b")]
    assert read_tensors(tmp_path / "model.gguf")[1]["tokenizer.chat_template"] == "{{ eos_token }}"
