"""Small files of chats, a tokenizer with a template for them, and the folders that are prepared from both."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizer_files import write_bytes_tokenizer

from data.config import PrepareConfig
from data.pair_records import SIDES
from data.shards import prepare

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>")


def chat(question: str, *answers: str) -> dict[str, Any]:
    """A chat in which one question is answered again and again."""
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def write_chats(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in chats))
    return path


def chat_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of bytes and a template, in which the token that ends documents ends turns too."""
    folder.mkdir(exist_ok=True)
    write_bytes_tokenizer(folder / "tokenizer.json", *NAMES)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def prepare_chats(folder: Path, length: int, *chats: Any, out: str = "chats", **options: Any) -> Path:
    """Prepare chats with the `chat_tokenizer` of a folder; returns the prepared folder."""
    tokenizer = chat_tokenizer(folder / "tokenizer")
    source = write_chats(folder / f"{out}.jsonl", *chats)
    config = PrepareConfig(inputs=(str(source),), tokenizer=str(tokenizer), **{"content": "chats"} | options)
    prepare(config, length, folder / out)
    return folder / out


def prepare_pairs(folder: Path, length: int, *pairs: Any, out: str = "pairs", **options: Any) -> Path:
    """As `prepare_chats`, of pairs."""
    return prepare_chats(folder, length, *pairs, out=out, content="pairs", **options)


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """Two answers to one question."""
    answers = {
        side: [{"role": "assistant", "content": each}] for side, each in zip(SIDES, (chosen, rejected), strict=True)
    }
    return {"prompt": [{"role": "user", "content": question}], **answers}


def prepare_text(folder: Path, length: int) -> Path:
    """Prepare some text with the same tokenizer."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiou", k=4)) for _ in range(30)]
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(100):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=20))}) + "\n")
    config = PrepareConfig(
        inputs=(str(folder / "text.jsonl"),), tokenizer=str(chat_tokenizer(folder / "tokenizer")),
        validation_fraction=0.2,
    )  # fmt: skip
    prepare(config, length, folder / "text")
    return folder / "text"


def some_chats(number: int) -> list[dict[str, Any]]:
    """Chats of very different lengths, with very different numbers of answers."""
    draw = random.Random(1)
    return [
        chat(f"{index}?", *["".join(draw.choices("abc", k=draw.choice((1, 2, 9)))) for _ in range(1 + index % 2)])
        for index in range(number)
    ]
