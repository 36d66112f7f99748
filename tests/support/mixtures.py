"""Two small prepared folders, and batches that ranks read of them."""

import json
from pathlib import Path

import numpy as np

from data.loader import DataConfig, Source, TrainingData, validation_rows

LENGTH = 16
GLOBAL = 8


def write_text(path: Path, seed: int, num_lines: int) -> str:
    """Write lines of words, most of them unlike any other line."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 8))}) for _ in range(num_lines)]
    path.write_text("\n".join(lines))
    return str(path)


def mixture(folders: tuple[str, str], **changes) -> DataConfig:
    big, small = folders
    options = {
        "sources": (Source(path=big, weight=0.4), Source(path=small, weight=0.6)),
        "sequence_length": LENGTH,
        "shuffle_block_rows": 512,
        "workers": 0,
    }
    return DataConfig(**options | changes)


def open_data(config: DataConfig, rank: int = 0, world_size: int = 1, micro: int = 1, **options) -> TrainingData:
    options = {"vocab_size": 400, "global_batch_sequences": GLOBAL} | options
    return TrainingData(config, micro_batch_sequences=micro, rank=rank, world_size=world_size, **options)


def rank_validates(rank: int, world_size: int, config: DataConfig, micro: int) -> list:
    options = {"vocab_size": 400, "micro_batch_sequences": micro, "rank": rank, "world_size": world_size}
    return [(tokens.numpy(), labels.numpy()) for tokens, labels in validation_rows(config, **options)]
