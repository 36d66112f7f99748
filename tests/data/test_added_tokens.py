"""Special tokens that are added to a tokenizer: ids against Transformers, texts as before, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_files import CHATML, NAMES, chat, write_chats
from command import tritrain
from tokenizer_files import write_bytes_tokenizer
from tokenizer_zoo import sentencepiece_tokenizer

from data.added_tokens import num_new, with_tokens
from data.chat_template import ChatTemplate
from data.config import PrepareConfig
from data.errors import DataError
from data.gguf_vocabulary import gguf_vocabulary
from data.parts import SHARED_FOLDER
from data.sentencepiece_model import CONTROL
from data.shards import prepare
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_json import tokenizer_files
from data.torchvision_repair import repair_torchvision

TEXTS = ("", " a <|im_start|>b<|im_end|>", "Grüße 😀\n\n  x", "</s>")
CONVERSATION = chat("Grüße <|im_end|>?", "a 😀", "b")["messages"]
BYTE_LEVEL, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def write_tokenizer(folder: Path, name: str) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    if name == BYTE_LEVEL:
        write_bytes_tokenizer(folder / name)
    else:
        sentencepiece_tokenizer(folder / name, add_dummy_prefix=False)
    (folder / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(folder)


def added(folder: Path, name: str, *names: str) -> Tokenizer:
    (folder / "added").mkdir(exist_ok=True)
    (folder / "added" / name).write_bytes(with_tokens(load_tokenizer(folder / name), names))
    (folder / "added" / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(folder / "added" / name)


@pytest.mark.parametrize("name", [BYTE_LEVEL, SENTENCEPIECE])
def test_they_follow_the_others_and_no_text_becomes_them(tmp_path: Path, name: str) -> None:
    before = write_tokenizer(tmp_path, name)
    # Names that usually end documents do not become the end of documents.
    after = added(tmp_path, name, *NAMES, "<|eot_id|>")
    size = before.vocab_size
    assert after.vocab_size == size + 3
    assert [after.name_of(token) for token in range(size)] == [before.name_of(token) for token in range(size)]
    assert (after.end_of_document, size + 1 in after.control_tokens) == (before.end_of_document, True)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == text
    assert after.encode_special("a<|im_start|>b") == [*before.encode("a"), size, *before.encode("b")]
    assert (after.token_bytes()[:size] == before.token_bytes()).all()
    assert not after.token_bytes()[size:].any()
    with pytest.raises(DataError, match=r"<\|im_start\|> is a special token already; do not add it"):
        with_tokens(after, NAMES[:1])
    assert [num_new(after, [*NAMES, "<x>"]), num_new(before, [*NAMES, "<x>"])] == [1, 3]


@pytest.mark.parametrize("name", [BYTE_LEVEL, SENTENCEPIECE])
def test_exports_have_them_as_special_tokens(tmp_path: Path, name: str) -> None:
    """Transformers makes the ids of a chat, and llama.cpp takes them for control tokens."""
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    size = write_tokenizer(tmp_path, name).vocab_size
    template = ChatTemplate(added(tmp_path, name, *NAMES))
    (tmp_path / "out").mkdir()
    path = template.tokenizer.path
    files = tokenizer_files(path, vocab_size=size + 8, max_sequence_length=64, template=template)
    for file, content in files.items():
        (tmp_path / "out" / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    ids = template.prompt_tokens(CONVERSATION)
    assert theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True) == ids
    assert ids[0] == size
    assert {*NAMES} <= {*theirs.all_special_tokens} | {*theirs.get_added_vocab()}
    assert theirs.decode([size, size + 1], skip_special_tokens=True) == ""
    vocabulary = gguf_vocabulary(path, size + 8, has_special=True)
    assert vocabulary["token_type"][size : size + 2] == [CONTROL, CONTROL]
    assert vocabulary["tokens"][size : size + 2] == [*NAMES]


def test_a_chat_is_that_of_a_tokenizer_which_transformers_has_given_them(tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, BYTE_LEVEL)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / BYTE_LEVEL), chat_template=CHATML)
    theirs.add_special_tokens({"additional_special_tokens": [*NAMES]})
    ours = ChatTemplate(added(tmp_path, BYTE_LEVEL, *NAMES))
    assert ours.prompt_tokens(CONVERSATION) == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)


def test_a_token_that_is_there_as_text_becomes_a_special_one(tmp_path: Path) -> None:
    for name, token in ((BYTE_LEVEL, "a"), (SENTENCEPIECE, "e")):
        before = write_tokenizer(tmp_path / token, name)
        after = added(tmp_path / token, name, token)
        assert after.vocab_size == before.vocab_size
        assert after.encode_special(token) == before.encode(token)
        assert before.encode(token)[0] in after.control_tokens


def options(folder: Path, **more: Any) -> PrepareConfig:
    source = write_chats(folder / "chats.jsonl", *[chat(f"{index}?", "a", "b") for index in range(20)])
    return PrepareConfig(inputs=(str(source),), **{"tokenizer": str(folder), "content": "chats"} | more)


def test_a_prepared_folder_has_the_tokenizer_with_them(tmp_path: Path) -> None:
    before = write_tokenizer(tmp_path, BYTE_LEVEL)
    missing = (
        r"chats\.jsonl:1: the chat template writes <\|im_start\|> and <\|im_end\|>, which the tokenizer does not have "
        r"as one token; add --add-token '<\|im_start\|>' --add-token '<\|im_end\|>', or choose another tokenizer"
    )
    with pytest.raises(DataError, match=missing):
        prepare(options(tmp_path), 64, tmp_path / "out")
    manifest = prepare(options(tmp_path, add_tokens=NAMES), 64, tmp_path / "out")
    assert manifest["vocab_size"] == before.vocab_size + 2
    assert load_tokenizer(tmp_path / "out").encode_special(NAMES[0]) == [before.vocab_size]
    assert manifest["end_of_document"] == before.end_of_document
    with pytest.raises(DataError, match=r"prepared with a different add_tokens"):
        prepare(options(tmp_path), 64, tmp_path / "out")
    in_parts = prepare(options(tmp_path, add_tokens=NAMES), 64, tmp_path / "parts", on=SHARED_FOLDER)
    assert {**in_parts, "files": None} == {**manifest, "files": None}
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} words"}) + "\n" for number in range(200)))
    config = options(tmp_path, content="text", add_tokens=NAMES)
    of_text = prepare(PrepareConfig(**vars(config) | {"inputs": (str(text),)}), 64, tmp_path / "text")
    assert of_text["tokenizer"]["fingerprint"] == manifest["tokenizer"]["fingerprint"]


def test_a_tokenizer_that_is_trained_has_them_too(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} words and {number * 7}"}) + "\n" for number in range(300)))
    out = tmp_path / "out"
    tritrain(
        "prepare", text, "--out", out, "--tokenizer", "bpe:290", "--sequence-length", "32",
        *(part for name in NAMES for part in ("--add-token", name)),
    )  # fmt: skip
    tokenizer = load_tokenizer(out)
    assert [tokenizer.encode_special(name) for name in NAMES] == [[290], [291]]
    assert json.loads((out / "manifest.json").read_text())["vocab_size"] == 292


@pytest.mark.parametrize("names", [("",), (" a",), ("<a>", "<a>")])
def test_names_that_cannot_be_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name") as caught:
        PrepareConfig(inputs=("x",), tokenizer="t", add_tokens=names)
    assert [*caught.value.args[0]] == ["add_tokens"]
