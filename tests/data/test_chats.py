"""Chats as rows: tokens and answers against Transformers, marks on their way to batches, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_files import CHATML, chat, write_chats
from command import tritrain
from tokenizer_files import write_bytes_tokenizer
from tokenizer_zoo import sentencepiece_tokenizer

from data.chat_template import ChatTemplate
from data.chats import ChatEncoder
from data.config import DataConfig, PrepareConfig
from data.errors import DataError
from data.inspection import decoded
from data.loader import IGNORED_LABEL, MARKED, TrainingData, validation_rows
from data.marks import ids_of
from data.mixture import Source
from data.parts import SHARED_FOLDER
from data.shards import PrepareProgress, prepare
from data.sources import open_source
from data.tokenizer import Tokenizer, load_tokenizer
from data.torchvision_repair import repair_torchvision

MARKED_CHATML = """{{ bos_token }}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{{ '\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{% endfor %}
"""
CHAT = [
    {"role": "system", "content": "Be kind & <brief>."},
    {"role": "user", "content": "Grüße <|im_end|> 😀\n\nnext "},
    {"role": "assistant", "content": "An answer 😀"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "No."},
]


def tokenizer_in(folder: Path, template: str | None = CHATML, *special: str) -> Tokenizer:
    """A tokenizer of bytes whose end of document ends turns too."""
    folder.mkdir(exist_ok=True)
    write_bytes_tokenizer(folder / "tokenizer.json", *(special or ("<|im_start|>", "<|im_end|>", "<s>")))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named if special == () else {}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder, "<|im_end|>" if special == () else "<|endoftext|>")


def options(tokenizer: Path, *inputs: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(inputs=tuple(map(str, inputs)), tokenizer=str(tokenizer), content="chats", **more)


def text_of(tokenizer: Tokenizer, ids: Any, counts: Any) -> str:
    return tokenizer.decode([int(token) for token, counted in zip(ids, counts, strict=True) if counted])


def test_answers_that_a_template_marks_are_those_of_transformers(tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_in(tmp_path, MARKED_CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, counts = ChatEncoder(ChatTemplate(tokenizer), 4096, "error").encode_chat(CHAT)
    assert ids.tolist() == theirs["input_ids"]
    assert counts.tolist() == [bool(each) for each in theirs["assistant_masks"]]
    assert text_of(tokenizer, ids, counts) == "An answer 😀<|im_end|>No.<|im_end|>"


def test_answers_of_a_plain_template_are_what_follows_the_generation_prompt(tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_in(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids, counts = ChatEncoder(ChatTemplate(tokenizer), 4096, "error").encode_chat(CHAT)
    assert ids.tolist() == theirs.apply_chat_template(CHAT)
    expected = np.zeros(len(ids), bool)
    for place in (2, 4):
        prompt = theirs.apply_chat_template(CHAT[:place], add_generation_prompt=True)
        expected[len(prompt) : len(theirs.apply_chat_template(CHAT[: place + 1]))] = True
    assert counts.tolist() == expected.tolist()
    assert text_of(tokenizer, ids, counts) == "An answer 😀<|im_end|>\nNo.<|im_end|>\n"


@pytest.mark.parametrize("prefix", [False, True])
def test_answers_of_a_sentencepiece_tokenizer(tmp_path: Path, prefix: bool) -> None:
    sentencepiece_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role + ': ' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = load_tokenizer(tmp_path)
    messages = chat("a ▁ b 😀", " yes", "no 😀")["messages"]
    ids, counts = ChatEncoder(ChatTemplate(tokenizer), 4096, "error").encode_chat(messages)
    text = ChatTemplate(tokenizer).text(messages, to_answer=False)
    assert ids.tolist() == tokenizer.encode_special(text)
    _, spans = tokenizer.encode_special_spans(text)
    assert [text[begin:end] for begin, end in spans if end - begin == 4] == ["</s>"] * 2
    answers = [text[begin:end] for (begin, end), counted in zip(spans, counts, strict=True) if counted]
    assert answers[:2] == [" ", " "] or answers[0].startswith(" ")
    assert [token for token, counted in zip(ids, counts, strict=True) if counted].count(tokenizer.end_of_document) == 2
    assert not any(counts[: tokenizer.encode_special(text.partition("yes")[0].rstrip(" ")).__len__()])


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["plain", "marked"])
def test_rows_hold_each_chat_once_with_its_answers(tmp_path: Path, template: str) -> None:
    tokenizer = tokenizer_in(tmp_path / "tokenizer", template)
    chats = [chat(f"{n} {'q' * (n % 7)}", *["a" * (n % 11 + 1)] * (n % 3 + 1)) for n in range(60)]
    source = write_chats(tmp_path / "chats.jsonl", *chats)
    manifest = prepare(options(tmp_path / "tokenizer", source, validation_fraction=0.2), 150, tmp_path / "out")
    encoder = ChatEncoder(ChatTemplate(tokenizer), 151, "error")
    expected = sorted(tuple(encoder.encode_chat(each["messages"])[0].tolist()) for each in chats)
    counted = sum(int(encoder.encode_chat(each["messages"])[1].sum()) for each in chats)
    config = DataConfig(
        sources=(Source(path=str(tmp_path / "out")),), sequence_length=150, shuffle=False, workers=0,
        validation_rows=1000,
    )  # fmt: skip
    loaded = TrainingData(
        config, vocab_size=tokenizer.vocab_size, global_batch_sequences=1, micro_batch_sequences=1, rank=0, world_size=1
    )
    assert (loaded.content, loaded.has_padding, loaded.first_token) == ("chats", True, MARKED)
    batches = iter(loaded)
    rows = [next(batches) for _ in range(manifest["splits"]["train"]["rows"])]
    loaded.close()
    rows += validation_rows(config, vocab_size=tokenizer.vocab_size, micro_batch_sequences=1, rank=0, world_size=1)
    seen, labels_seen = [], 0
    for tokens_BT, labels_BT in rows:
        tokens, labels = tokens_BT[0], labels_BT[0]
        ids = torch.where(tokens < 0, ~tokens, tokens)
        counts = labels != IGNORED_LABEL
        labels_seen += int(counts.sum())
        assert torch.equal(labels[:-1][counts[:-1]], ids[1:][counts[:-1]])
        assert bool((tokens[1:][counts[:-1]] >= 0).all())  # nothing predicts the first token of the next chat
        begins = (tokens < 0).nonzero().flatten().tolist()
        parts = np.split(ids.numpy(), begins[1:])
        parts[-1] = np.append(parts[-1], labels[-1:].clamp(min=0)) if counts[-1] else parts[-1]
        seen += [tuple(part.tolist()) for part in parts if len(part) > 1]
    whole = [each for each in seen if each in expected]
    assert labels_seen == counted == sum(split["counted_tokens"] for split in manifest["splits"].values())
    cut = sorted({*expected} - {*whole})  # the last token of a full row is a label that does not count
    assert all(any(each[:-1] == part for part in seen) for each in cut)
    assert len(seen) == len(chats)


def test_any_number_of_workers_and_any_format_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    tokenizer_in(tmp_path / "tokenizer")
    chats = [chat(f"{n}", "a" * n) for n in range(1, 40)]
    source = write_chats(tmp_path / "chats.jsonl", *chats)
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    made = [
        prepare(options(tmp_path / "tokenizer", each, workers=workers), 64, tmp_path / f"{index}")["splits"]
        for index, (each, workers) in enumerate(
            [
                (source, 1),
                (source, 2),
                (tmp_path / "chats.jsonl.gz", 1),
                (tmp_path / "chats.parquet", 1),
            ]
        )
    ]
    assert made[0] == made[1] == made[2] == made[3]
    hub = PrepareConfig(inputs=(f"hf:{tmp_path}/hub:train",), tokenizer=str(tmp_path / "tokenizer"), content="chats")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(source.read_bytes())
    assert prepare(hub, 64, tmp_path / "of hub")["splits"] == made[0]


@pytest.mark.parametrize("stop", [2, 5])
def test_chats_go_on_where_a_command_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    monkeypatch.setattr("data.encoding.CHUNK_CHARS", 500)
    monkeypatch.setattr("data.shards.SECONDS_BETWEEN_RECORDS", 0.0)
    monkeypatch.setattr("data.writers.SHARD_BYTES", 2000)
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", *(chat(f"{n}", "a" * (n % 30) + "b") for n in range(60)))
    config = options(tmp_path / "tokenizer", source, validation_fraction=0.2)
    whole = prepare(config, 64, tmp_path / "whole")
    calls = 0

    def interrupt(progress: PrepareProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, 64, tmp_path / "out", interrupt)
    said: list[str] = []
    assert prepare(config, 64, tmp_path / "out", lambda progress: said.append(progress.earlier)) == whole
    assert said[0].startswith("An earlier attempt was stopped; going on after")


def test_processes_share_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.parts.PART_BYTES", 1000)
    monkeypatch.setattr("data.parts.BLOCK_DOCUMENTS", 8)
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", *(chat(f"{n}", "a" * (n % 30) + "b") for n in range(60)))
    config = options(tmp_path / "tokenizer", source, validation_fraction=0.2, too_long="drop")
    shared = prepare(config, 44, tmp_path / "shared", on=SHARED_FOLDER)
    assert shared == prepare(config, 44, tmp_path / "one")
    assert shared["splits"]["train"]["dropped_chats"] > 0


def test_a_folder_has_its_template_with_its_special_tokens(tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    template = "\n  {% if true %}{{ bos_token + eos_token }}{% endif %}\n" + CHATML
    tokenizer = tokenizer_in(tmp_path / "tokenizer", None)
    (tmp_path / "mine.jinja").write_text(template)
    source = write_chats(tmp_path / "chats.jsonl", chat("q", "a"))
    config = options(tmp_path / "tokenizer", source, chat_template=str(tmp_path / "mine.jinja"))
    prepare(config, 64, tmp_path / "out")
    kept = ChatTemplate(load_tokenizer(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for answers in (False, True):
        assert kept.text(CHAT, to_answer=answers) == theirs.apply_chat_template(
            CHAT, chat_template=template, tokenize=False, add_generation_prompt=answers
        )
    assert kept.self_contained() == (tmp_path / "out" / "chat_template.jinja").read_text()
    assert kept.prompt_tokens(CHAT) == ChatTemplate(tokenizer, tmp_path / "mine.jinja").prompt_tokens(CHAT)
    (tmp_path / "mine.jinja").write_text(CHATML)
    with pytest.raises(DataError, match="was prepared with a different chat_template"):
        prepare(config, 64, tmp_path / "out")
    with pytest.raises(DataError, match="was prepared with a different content"):
        prepare(
            PrepareConfig(inputs=config.inputs, tokenizer=config.tokenizer, packing="best-fit"), 64, tmp_path / "out"
        )
    (tmp_path / "out" / "chat_template.jinja").write_text("other")
    with pytest.raises(DataError, match="is not the template of the chats"):
        validation_rows(
            DataConfig(sources=(Source(path=str(tmp_path / "out")),), sequence_length=64),
            vocab_size=300, micro_batch_sequences=1, rank=0, world_size=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"an object with the key \"messages\"; its keys are \['text'\]"),
        ([1], "it is list"),
        ({"messages": "a"}, '"messages" is str; must be a list'),
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
        ({"messages": [1]}, "message 1 is int; must be an object"),
        ({"messages": [{"from": "human", "value": "a"}]}, "message 1 has the role None; choose one of system"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "message 1 has the role 'gpt'; choose one of system"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"message 1 \(assistant\) has NoneType as content"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, r"message 1 \(assistant\) has empty content"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            r"message 1 \(assistant\) has the weight 0; all answers count, so remove the weight or the chat",
        ),
        (chat("q", "a") | {"tools": [1]}, '"tools" must be a list of JSON schemas, each an object'),
        (chat("q", "a") | {"tools": "[{]"}, '"tools" is text that is not JSON'),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
            r"message 1 \(user\) has tool_calls; only the assistant calls tools",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
            r"message 1 \(assistant\) has tool_calls that are no list of objects",
        ),
        (chat("q", "a" * 80), r"has 102 tokens, and a row 65; .* --too-long drop or truncate"),
        (chat("<|im_end|", "\ud800"), "half of a surrogate pair"),
    ],
)
def test_a_chat_that_cannot_be_learned_from_is_named(tmp_path: Path, record: Any, message: str) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", chat("q", "a"), record)
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: .*{message}"):
        prepare(options(tmp_path / "tokenizer", source), 64, tmp_path / "out")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "refuses this conversation: no system message"),
        (
            "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}",
            "does not write message 2",
        ),
        ("{{ messages[0].content }}", "writes no answer of this chat"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "writes no answer of this chat"),
        (
            "a{% macro m() %}b{% generation %}c{% endgeneration %}{% endmacro %}{{ m() }}",
            r"\{% generation %\} where its text is written later",
        ),
        ("<|user|>" + CHATML, r"writes <\|user\|>, which the tokenizer does not have as one token"),
    ],
)
def test_a_template_that_does_not_serve_is_named(tmp_path: Path, template: str, message: str) -> None:
    tokenizer_in(tmp_path / "tokenizer", template)
    source = write_chats(tmp_path / "chats.jsonl", chat("q", "a", "b"))
    with pytest.raises(DataError, match=rf"chats\.jsonl:1: .*{message}"):
        prepare(options(tmp_path / "tokenizer", source), 64, tmp_path / "out")


def test_text_that_spells_a_token_that_is_none_is_text(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", chat("<|user|>", "a"))
    assert prepare(options(tmp_path / "tokenizer", source), 64, tmp_path / "out")["splits"]["train"]["documents"] == 1


def test_chats_that_are_too_long_are_left_out_or_cut_and_counted(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(
        tmp_path / "chats.jsonl", chat("q", "a"), chat("q", "b" * 80), chat("q" * 80, "c"), chat("q", "d")
    )
    dropped = prepare(options(tmp_path / "tokenizer", source, too_long="drop"), 64, tmp_path / "drop")
    counts = ("documents", "dropped_chats", "truncated_chats")
    assert [dropped["splits"]["train"][key] for key in counts] == [2, 2, 0]
    cut = prepare(options(tmp_path / "tokenizer", source, too_long="truncate"), 64, tmp_path / "cut")
    assert [cut["splits"]["train"][key] for key in counts] == [3, 1, 1]  # one has no answer in what is left
    for too_long in ("drop", "truncate"):  # in four tokens no answer begins
        with pytest.raises(DataError, match="has none of 4 chats: none fits into 5 tokens or, with --too-long"):
            prepare(options(tmp_path / "tokenizer", source, too_long=too_long), 4, tmp_path / "none")


def test_chats_need_records_and_a_tokenizer(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: chats are read from \.jsonl .*, not from a\.txt"):
        prepare(options(tmp_path / "tokenizer", tmp_path / "a.txt"), 64, tmp_path / "out")
    for changes, message in [
        ({"tokenizer": "bpe:320"}, "chats need a tokenizer that is there"),
        ({"lossy_tokenizer": True}, "is for text"),
        ({"content": "text", "chat_template": "a"}, "set content to chats"),
        ({"content": "text", "too_long": "drop"}, "set content to chats"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**{"inputs": ("a",), "tokenizer": "t", "content": "chats"} | changes)
    tokenizer_in(tmp_path / "bare", None)
    config = options(tmp_path / "bare", write_chats(tmp_path / "c.jsonl", chat("q", "a")))
    with pytest.raises(DataError, match=r"no chat template beside the tokenizer.*--chat-template FILE"):
        prepare(config, 64, tmp_path / "out")


def test_the_commands(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", *(chat(f"{n}", "a" * n) for n in range(1, 30)))
    said = tritrain(
        "prepare", source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", "--content", "chats",
        "--sequence-length", 64, "--validation-fraction", 0.2, "--too-long", "drop",
    )  # fmt: skip
    assert "of their tokens are answers" in said
    found = json.loads(tritrain("inspect", tmp_path / "out", "--json"))["splits"]["train"]
    assert found["whole_documents"] == found["documents"]
    assert sum(found["lengths"].values()) == found["documents"]
    assert found["samples"][0].startswith("<|im_start|>user\n")
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    assert found["padding"] == facts["padding_tokens"] / (facts["rows"] * 64) > 0


def test_samples_show_special_tokens_by_name(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=True)
    tokenizer = load_tokenizer(tmp_path)
    control, text = tokenizer.control_tokens[0], tokenizer.encode("a b")
    tokens = np.asarray([control, *text, tokenizer.end_of_document, tokenizer.end_of_document, *text])
    end = tokenizer.name_of(tokenizer.end_of_document)
    assert decoded(tokenizer, tokens) == f"{tokenizer.name_of(control)}a b{end}{end}a b"


@pytest.mark.parametrize("legacy", [None, False])
def test_rows_of_a_llama_tokenizer_are_those_of_transformers(tmp_path: Path, legacy: bool | None) -> None:
    """Of `legacy` ones each text after a special token begins with the dummy prefix."""
    repair_torchvision()
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece_tokenizer(folder / "tokenizer.model", add_dummy_prefix=True)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **named}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    source = write_chats(tmp_path / "chats.jsonl", chat("the cat", "sat", "on the mat"))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(chat("the cat", "sat", "on the mat")["messages"])
    for out, on in (("out", None), ("shared", SHARED_FOLDER)):
        prepare(options(folder, source), 200, tmp_path / out, on=on)
        [row] = open_source(Source(path=str(tmp_path / out)), None).read_first_rows("train", 1)
        assert ids_of(row)[: len(expected)].tolist() == expected
    (tmp_path / "copy.model").write_bytes(load_tokenizer(tmp_path / "out").file_content())  # as runs keep it
    text = theirs.decode(expected)
    assert load_tokenizer(tmp_path / "copy.model").encode_special(text) == load_tokenizer(folder).encode_special(text)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **named, "legacy": legacy is False})
    )
    with pytest.raises(DataError, match="was prepared with a different prefix_after_special_tokens"):
        prepare(options(folder, source), 200, tmp_path / "out")
