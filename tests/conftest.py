import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning"  # of torch and its kin, in subprocesses


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of the tiny corpus."""
    from tiny import SEQUENCE_LENGTH, write_corpus

    from data.shards import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder / "corpus.jsonl")
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320", validation_fraction=0.1)
    prepare(config, SEQUENCE_LENGTH, folder / "shards")
    return folder / "shards"
