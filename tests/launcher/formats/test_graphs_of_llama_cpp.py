"""The table of `docs/gguf.md`: which traits each graph of llama.cpp computes, found by running it.

A model with one trait more than its family has is written for the graph all the same, and its predictions are compared
with the model's.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from documented import export_bounds
from exports import exportable, ternary
from generated_tables import GeneratedTable, Rows
from gguf_files import narrow, random_model
from places import ROOT

import launcher.formats.gguf_export
import launcher.plan.exports
import model.gguf
from launcher.formats.gguf_export import export_gguf
from model.gguf import ARCHITECTURES, gguf_architecture
from model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TRAITS: dict[tuple[str, str], dict[str, Any]] = {
    ("`tie_embeddings: true`", "the embedding as head"): {"tie_embeddings": True},
    ("`tie_embeddings: false`", "a head of its own"): {"tie_embeddings": False},
    ("`num_kv_heads`", "fewer heads for keys and values"): {"num_kv_heads": 2},
    ("`head_dim`", "heads wider than hidden_size / num_heads"): {"head_dim": 128},
    ("`sub_norm: true`", "SubLN"): {"sub_norm": True},
    ("`activation: relu2`", "squared ReLU"): {"activation": "relu2"},
    ("`qkv_bias: true`", "biases of queries and keys and values"): {"qkv_bias": True},
    ("`qk_norm: head`", "queries and keys normalized by head"): {"qk_norm": "head"},
    ("`qk_norm: full`", "queries and keys normalized as a whole"): {"qk_norm": "full"},
    ("`norm_position: post`", "norms after the layers"): {"norm_position": "post"},
    ("`norm: layernorm-nonparametric`", "layer norm without weights"): {"norm": "layernorm-nonparametric"},
}
TABLE = GeneratedTable(
    ROOT / "docs" / "gguf.md",
    "tests/launcher/formats/test_graphs_of_llama_cpp.py",
    ("key of `model`", "trait"),
    [*ARCHITECTURES],
)
TOKENS = torch.randint(384, (4, 48), generator=torch.Generator().manual_seed(0))


def model_with(graph: str, changes: dict[str, Any]) -> Transformer:
    """A model of a family with a trait that shows in its predictions."""
    built = random_model(narrow(graph, num_layers=2, **changes))
    for name, parameter in built.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            parameter.data *= 2
    return built


def outcome(
    ask: Any, monkeypatch: pytest.MonkeyPatch, graph: str, built: Transformer, tokenizer: Path, to: Path
) -> str:
    """What llama.cpp does with a model that is written for a graph."""
    for module in (model.gguf, launcher.formats.gguf_export, launcher.plan.exports):
        monkeypatch.setattr(module, "gguf_architecture", lambda config: graph)
    export_gguf(exportable(built), to, tokenizer=tokenizer, embeddings="f16")
    monkeypatch.undo()
    try:
        found = torch.from_numpy(ask(to, sequences=TOKENS.tolist())["logits"]).log_softmax(-1)
    except AssertionError:
        return "refuses"
    with torch.no_grad():
        ours = ternary(built)(TOKENS).logits.log_softmax(-1)
    divergence = (ours.exp() * (ours - found)).sum(-1).mean()
    print(f"{to.name}: divergence of {divergence:.2g} nats")  # noqa: T201
    return "yes" if divergence < export_bounds()["gguf"] else "wrong"


def writes(graph: str, built: Transformer) -> bool:
    """Whether a model is exported for a graph."""
    try:
        return gguf_architecture(built.config) == graph
    except ValueError:
        return False


def test_golden_table_of_graphs(ask: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Rows = {trait: {} for trait in TRAITS}
    for graph in ARCHITECTURES:
        for number, (trait, changes) in enumerate(TRAITS.items()):
            built = model_with(graph, changes)
            to = tmp_path / f"{graph}-{number}.gguf"
            rows[trait][graph] = outcome(ask, monkeypatch, graph, built, shards / "tokenizer.model", to)
            assert rows[trait][graph] == "yes" or not writes(graph, built), (graph, trait)
    TABLE.check(rows, [*TRAITS])
