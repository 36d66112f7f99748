"""A tiny corpus and a tiny run on it, for tests that train for real."""

import json
import random
from pathlib import Path
from typing import Any

from launcher.config.file import parse_config
from launcher.config.sections import Config

SEQUENCE_LENGTH = 32


def write_corpus(path: Path, num_documents: int = 300) -> Path:
    """JSON lines with text that has something to learn, the same every time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(2, 7))) for _ in range(60)]
    with path.open("w") as file:
        for _ in range(num_documents):
            text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 120)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def tiny_tree(shards: Path, run: Path) -> dict[str, Any]:
    """Configuration of a run of a second or two: 4 steps in 16 bits and 4 ternary ones."""
    return {
        "run": {"name": "tiny", "folder": str(run)},
        "model": {
            "vocab_size": 320,
            "hidden_size": 36,
            "num_layers": 2,
            "num_heads": 3,
            "num_kv_heads": 1,
            "intermediate_size": 51,
            "max_sequence_length": SEQUENCE_LENGTH,
        },
        "data": {
            "sources": [{"path": str(shards)}],
            "sequence_length": SEQUENCE_LENGTH,
            "validation_rows": 8,
            "workers": 0,
        },
        "training": {"global_batch_sequences": 8, "micro_batch_sequences": 2, "compute_dtype": "fp32"},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"shape": "cosine", "warmup_steps": 2},
        "phases": [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 4}],
        "logging": {"interval_steps": 1, "tensorboard": False},
    }


def tiny_config(shards: Path, run: Path, /, **sections: dict[str, Any]) -> Config:
    """`tiny_tree` with some keys of some sections changed."""
    tree = tiny_tree(shards, run)
    for name, keys in sections.items():
        tree[name] = keys if isinstance(keys, list) else tree.get(name, {}) | keys
    return parse_config(tree)
