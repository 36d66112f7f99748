"""A run that puts SubLN into the model that it starts from: `checkpoint.sub_norm_sequences`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_files import chat_tokenizer, prepare_chats, some_chats
from command import tritrain
from exports import model_tree
from hf_folders import edit_config, write_variant
from models import VARIANTS
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config, write_corpus

import launcher.training.begin
from data.prepared import read_manifest
from data.shards import PrepareConfig, prepare
from launcher.config.file import to_tree
from launcher.config.sections import Config
from launcher.inference.load import load_model
from launcher.run.metrics_log import read_metrics

STEPS = 3
LENGTH = 96


def prepared(root: Path, kind: str) -> tuple[Path, int]:
    """A folder whose training rows are one batch of a run, and their number."""
    if kind == "chats":
        folder = prepare_chats(root, LENGTH, *some_chats(8), validation_fraction=0.0)
    else:
        corpus = write_corpus(root / "corpus.jsonl", 8)
        folder, tokenizer = root / "rows", str(chat_tokenizer(root / "tokenizer"))
        prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=tokenizer, validation_fraction=0.0), LENGTH, folder)
    return folder, read_manifest(folder)["splits"]["train"]["rows"]


def configured(
    data: Path, num_rows: int, source: Path, folder: Path, /, *, phase: dict[str, Any], documents: str, **engine: Any
) -> Config:
    model = replace(VARIANTS["llama"], vocab_size=320, sub_norm=True, max_sequence_length=128)
    return tiny_config(
        data,
        folder,
        model=model_tree(model),
        data={"validation_rows": 0, "sequence_length": LENGTH, "documents": documents},
        training={"global_batch_sequences": num_rows, "micro_batch_sequences": 1},
        engine=engine,
        checkpoint={"start_from": str(source), "sub_norm_sequences": num_rows},
        phases=[
            {"precision": "16-bit", "steps": STEPS - 1, "transition": {"optimizer": "reset"}, **phase},
            {"precision": "ternary", "steps": 1, **phase},
        ],
    )


def train_in_two(configs: list[Config]) -> list[tuple[list[str], dict[str, float]]]:
    """Train one step of each run, and the others as a run that goes on; what was put in, each time that it was."""
    found = []
    put_in = launcher.training.begin.put_sub_norms_in

    def recording(source: Any, *given: Any) -> list[str]:
        sentences = put_in(source, *given)
        found.append((sentences, dict(source.constants)))
        return sentences

    launcher.training.begin.put_sub_norms_in = recording
    for config in configs:
        assert run(config, 1) == "interrupted"
        assert run(config) == "complete"
    return found


def losses_of(config: Config) -> list[float]:
    return [row["train/loss"] for row in read_metrics(config.run.path / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "engine", "kind"),
    [
        (2, "fsdp2", "text"),
        (1, "fsdp2", "chats"),
        (1, "fsdp2", "masked text"),
        (2, "zero-2", "chats"),
    ],
)
def test_a_run_puts_in_what_convert_does(tmp_path: Path, world_size: int, engine: str, kind: str) -> None:
    write_variant(tmp_path / "hf", vocab_size=320)
    edit_config(tmp_path / "hf", max_position_embeddings=128)
    data, num_rows = prepared(tmp_path, kind)
    assert num_rows % 2 == 0
    about = {
        "phase": {"objective": "sft"} if kind == "chats" else {},
        "documents": "masked" if kind == "masked text" else "joined",
        **ENGINES[engine],
    }
    started, converted = (
        configured(data, num_rows, tmp_path / "hf", tmp_path / name, **about) for name in ("started", "converted")
    )
    tree = to_tree(converted)
    del tree["run"]["folder"], tree["checkpoint"]["start_from"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    printed = tritrain("convert", tmp_path / "hf", "--to", tmp_path / "converted", "--config", tmp_path / "config.yaml")
    [sentence] = [line.strip() for line in printed.splitlines() if "SubLN" in line]
    model = load_model(tmp_path / "converted", dtype=torch.float32).model
    gains = {name: float(value[0]) for name, value in model.named_parameters() if "_sub_norm" in name}

    found = run_group(world_size, train_in_two, [started, converted])
    assert found == [[([sentence], gains)]] * world_size  # once, of four times that a run has begun
    losses = losses_of(started)
    assert len(losses) == STEPS
    assert losses_of(converted) == losses
    [nats] = map(float, re.findall(r"([\d.]+) with it, before any step", sentence))
    assert losses[0] == pytest.approx(nats, abs=1e-4)
