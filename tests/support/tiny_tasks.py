"""Hand-written examples of all eleven tasks, in the form of a mirror: some lines for each, for machines without one."""

import json
from pathlib import Path
from typing import Any

NUM_EXAMPLES = 3


def asked(query: str, choices: list[str], gold: int, **fields: Any) -> dict[str, Any]:
    return {"query": query, "choices": choices, "gold": gold, "fields": fields}


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        asked(f"Question: {goal}\nAnswer:", [first, second], gold)
        for goal, first, second, gold in (
            ("How do I dry a cup?", "With a towel.", "With a wet stone from the river.", 0),
            ("How do I open a jar?", "Shout at it.", "Turn the lid.", 1),
            ("How do I cool tea?", "Wait.", "Heat it for an hour.", 0),
        )
    ],
    "hellaswag": [
        asked("Cooking: A man stands in a kitchen. He", ["cuts an onion.", "is the kitchen.", "flies.", "rains."], 0),
        asked("Rowing: Two girls sit in a boat. They", ["melt.", "row to the bank.", "fry it.", "are a boat."], 1),
        asked("Mowing the lawn: A woman", ["sings the lawn.", "eats.", "starts the mower.", "is mown."], 2),
    ],
    "winogrande": [
        {
            "contexts": [f"The cup did not fit into the box because the {thing}" for thing in ("cup", "box")],
            "continuation": f"was too {size}.",
            "gold": gold,
        }
        for size, gold in (("large", 0), ("small", 1), ("big", 0))
    ],
    "openbookqa": [
        asked("Water that is very cold turns into", ["ice", "steam", "wood", "sand"], 0),
        asked("A plant makes food from", ["night", "light", "noise", "iron"], 1),
        asked("The moon goes round", ["Mars", "the sun alone", "the earth", "a tree"], 2),
    ],
    "sciq": [
        asked(f"{support.lstrip()}\nQuestion: {question}\nAnswer:", choices, 3, support=support, question=question)
        for support, question, choices in (
            (" Ice floats. ", "What floats?", ["iron", "lead", "gold", "ice"]),
            ("", "What do bees make?", ["milk", "silk", "wool", "honey"]),
            ("Iron rusts.", "What rusts?", ["gold", "glass", "clay", "iron"]),
        )
    ],
    "arc_easy": [
        asked("Question: Which is a fruit?\nAnswer:", ["apple", "stone", "chair"], 0),
        asked("Question: Which is warm?\nAnswer:", ["snow", "fire", "ice", "frost"], 1),
        asked("Question: Which is a bird?\nAnswer:", ["cod", "oak", "ant", "crow", "cow"], 3),
    ],
    "copa": [
        asked("It rained therefore", [" the street was wet.", " the street was dry."], 0),
        asked("The cup broke because", [" it was full.", " it fell."], 1),
        asked("She was tired therefore", [" she slept.", " she ran."], 0),
    ],
    "rte": [
        asked("It rains in Rome.\nQuestion: Rome is wet. True or False?\nAnswer:", ["True", "False"], 0),
        asked("Ann is in Oslo.\nQuestion: Ann is in Rome. True or False?\nAnswer:", ["True", "False"], 1),
        asked("Bo has two cats.\nQuestion: Bo has cats. True or False?\nAnswer:", ["True", "False"], 0),
    ],
    "cb": [
        asked(f"{said}\nQuestion: {claim}. True, False, or Neither?\nAnswer:", ["True", "False", "Neither"], gold)
        for said, claim, gold in (
            ("I know that it rained.", "it rained", 0),
            ("It did not snow.", "it snowed", 1),
            ("Did it hail? True, False, or Neither?", "it hailed", 2),
        )
    ],
    "mrpc": [
        asked(
            f"Sentence 1: {first}\nSentence 2: {second}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
            ["no", "yes"],
            gold,
            sentence1=first,
            sentence2=second,
        )
        for first, second, gold in (
            ("He did n't go .", "He stayed , it is said .", 1),
            ('She said " no " ( twice ) .', "It 's raining .", 0),
            ("They won .", "They were the winners .", 1),
        )
    ],
    "sst2": [
        asked(
            f"{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ["negative", "positive"],
            gold,
            sentence=sentence,
        )
        for sentence, gold in (
            ("it 's a joy , really . ", 1),
            ("a dull ( and long ) film . ", 0),
            ("warm and clever . ", 1),
        )
    ],
}


def write_tasks(folder: Path) -> Path:
    """A mirror with these examples, in both splits."""
    folder.mkdir(parents=True)
    for name, examples in EXAMPLES.items():
        for split in ("validation", "test"):
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder
