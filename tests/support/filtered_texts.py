"""Inputs in which documents come again, or hold passages of an evaluation set."""

import json
from pathlib import Path
from typing import Any

import numpy as np

ANIMALS = "ant bee cat dog elk fox gnu hen ibis jay kiwi lynx mole newt owl pig rat seal toad vole wolf yak zebu"
WORDS = ANIMALS.split(" ")


def corpus(rng: np.random.Generator, num_documents: int) -> list[str]:
    """Random texts, of which some are equal, and some hold passages of an evaluation set."""
    texts = []
    for _ in range(num_documents):
        text = " ".join(rng.choice(WORDS, rng.integers(3, 60)))
        if texts and rng.random() < 0.3:
            text = texts[rng.integers(len(texts))]
        texts.append(text)
    return texts


def write_corpora(tmp_path: Path) -> dict[str, list[str]]:
    """Inputs in many files, held-out text and an evaluation set; the texts of each file, in the order of reading."""
    rng = np.random.default_rng(3)
    texts = corpus(rng, 130)
    passages = [" ".join(rng.choice(WORDS, 20)) for _ in range(40)]
    for place in rng.choice(130, 25):
        texts[place] = f"{texts[place][:50]} {rng.choice(passages).upper().replace(' ', ', ')}"
    files = {
        "in/a.jsonl": texts[:60],
        "in/b.jsonl": texts[60:75],
        "in/c.txt": [texts[0]],
        "in/d.txt": ["\n".join(texts[3:50])],
        "in/e.txt": ["\n".join(texts[3:50])],
        "more.jsonl": texts[75:100] + texts[:10],
        "held.jsonl": texts[100:] + texts[5:20],
    }
    (tmp_path / "in").mkdir()
    for name, of_file in files.items():
        path = tmp_path / name
        if path.suffix == ".txt":
            path.write_text(of_file[0])
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in of_file))
    examples = [{"question": passage[:40], "choices": [passage[40:], "no"], "number": 3} for passage in passages]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return files


def options_of(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """A configuration that reads these inputs."""
    return {
        "inputs": (str(tmp_path / "in"), str(tmp_path / "more.jsonl")),
        "validation_inputs": (str(tmp_path / "held.jsonl"),),
        "tokenizer": "bpe:340",
        **options,
    }
