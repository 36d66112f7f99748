"""Ternary models that predict a text, without training: their heads know which token follows which."""

from itertools import pairwise
from pathlib import Path

import torch
from gguf_files import narrow

from data.tokenizer import load_tokenizer, train_tokenizer
from launcher.inference.verdict import SAMPLE
from model.transformer import Transformer

LEVEL = 1e-3
"""Of the weights of blocks: so small that blocks hardly matter, unless their scales are wrong."""


def write_tokenizer(path: Path, vocab_size: int = 320) -> Path:
    """A tokenizer of the text that models are tried on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer([SAMPLE], f"bpe:{vocab_size}", path)
    return path


def speaking(tokenizer: Path, family: str = "llama") -> Transformer:
    """A model that gives the tokens of the text much more than even chances."""
    model = Transformer(narrow(family, num_layers=3, tie_embeddings=False, num_kv_heads=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=LEVEL, generator=generator)
    embedding_VD, head_VD = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    torch.nn.init.normal_(embedding_VD, generator=generator)
    loaded = load_tokenizer(tokenizer)
    tokens = [loaded.end_of_document, *loaded.encode(SAMPLE)]
    head_VD.zero_()
    for before, after in pairwise(tokens):
        head_VD[after] += 8 * embedding_VD[before] / embedding_VD[before].square().sum() / tokens.count(before)
    return model
