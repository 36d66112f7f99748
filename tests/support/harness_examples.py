"""Hand-written examples for tasks of lm-evaluation-harness, with the columns of their data sets."""

import json
from pathlib import Path
from typing import Any

LONG = "The river ran past the mill, and the miller counted the sacks of grain. " * 12
"""Longer than the windows of the models in tests."""


def choice(question: str, right: str, *wrong: str) -> dict[str, Any]:
    texts = [right, *wrong]
    labels = ["A", "B", "C", "D"][: len(texts)]
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": "A"}


def letter(question: str, answer: int) -> dict[str, Any]:
    return {"question": question, "choices": ["ice", "steam", "wood", "sand é"], "answer": answer}


def alias(question: str, *answers: str) -> dict[str, Any]:
    return {"question": question, "answer": {"aliases": list(answers), "value": answers[0]}}


def instructions(key: int, prompt: str, **asked: dict[str, Any]) -> dict[str, Any]:
    names = [name.replace("__", ":") for name in asked]
    return {"key": key, "prompt": prompt, "instruction_id_list": names, "kwargs": list(asked.values())}


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "arc_challenge_test": [
        choice("Which is a fruit?", "apple", "stone", "chair"),
        choice(f"{LONG} Which is warm?", "fire", "snow", "ice", "frost"),
        choice("Which is a bird?", "crow", "cod", "oak", "ant"),
    ],
    "arc_challenge_train": [choice("What is wet?", "rain", "dust"), choice("What is loud?", "thunder", "snow", "dew")],
    "lambada_openai_test": [
        {"text": "She opened the door and saw the garden"},
        {"text": "alone"},  # without a context
        {"text": f"{LONG.strip()} twice"},
        {"text": "naïve café société"},
    ],
    "wikitext_test": [
        {"page": f" = Mills = \n {LONG} \n It 's old , and ( so ) slow . \n"},
        {"page": " A short page . "},
    ],
    "gsm8k_test": [
        {"question": "Ann has 2 cups and buys 3. How many has she?", "answer": "2 + 3 = 5\n#### 5"},
        {"question": f"{LONG} How many sacks?", "answer": "#### 12"},
    ],
    "gsm8k_train": [
        {"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(6)
    ],
    "triviaqa_validation": [
        alias("What do bees make", "honey", "Honey"),
        alias("Who wrote Emma", "Jane Austen", "Austen", "J. Austen"),
    ],
    "wmdp_bio_test": [letter(f"What is {thing}?", n % 4) for n, thing in enumerate(("a cell", "a leaf", "a root"))],
    "wmdp_chem_test": [letter("What rusts?", 2)],
    "wmdp_cyber_test": [letter("What is a port?", 0), letter("What is a key?", 3)],
    "ifeval_train": [
        instructions(
            1,
            "Write without the word zebra, in at least two words.",
            keywords__forbidden_words={"forbidden_words": ["zebra"]},
            length_constraints__number_words={"relation": "at least", "num_words": 2},
        ),
        instructions(
            2,
            "Write JSON, in English, all in small letters.",
            detectable_format__json_format={},
            change_case__english_lowercase={},
        ),
        instructions(
            3,
            "Write at least one sentence with the word zebra.",
            length_constraints__number_sentences={"relation": "at least", "num_sentences": 1},
            keywords__existence={"keywords": ["zebra"]},
        ),
    ],
}


def write_examples(folder: Path, *names: str) -> Path:
    """Write the files of all tasks, or those named."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in EXAMPLES.items():
        if not names or name in names:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
