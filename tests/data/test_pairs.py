"""Pairs of answers: what their tokens are, how they lie in rows, and which records are refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_files import CHATML, chat_tokenizer, pair, prepare_pairs
from command import tritrain
from transformers import PreTrainedTokenizerFast

from data.chat_template import ChatTemplate
from data.errors import DataError
from data.labels import inputs_and_labels
from data.loader import DataConfig, TrainingData
from data.marks import BEGINS, COUNTS, ids_of
from data.mixture import Source
from data.pair_records import pair_of
from data.pairs import PairEncoder
from data.prepared import read_manifest
from data.tokenizer import load_tokenizer
from model.preference import num_pairs


def encoder(folder: Path) -> PairEncoder:
    return PairEncoder(ChatTemplate(load_tokenizer(chat_tokenizer(folder / "tokenizer"))), 4096, "error")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION, FOLLOWING = message("user", "What?"), [message("assistant", "This."), message("user", "And?")]
GOOD, BAD = message("assistant", "good \u00e9"), message("assistant", "bad")
EXPLICIT = {"prompt": [QUESTION, *FOLLOWING], "chosen": [GOOD], "rejected": [BAD, message("user", "No"), GOOD]}
IMPLICIT = {side: [QUESTION, *FOLLOWING, *EXPLICIT[side]] for side in ("chosen", "rejected")}


def test_tokens_are_those_of_transformers_and_count_after_the_prompt(tmp_path: Path) -> None:
    ours = encoder(tmp_path)
    theirs: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"))
    tokens = [ours.marked(json.loads(pair_of(record, "x"))) for record in (EXPLICIT, IMPLICIT)]
    assert np.array_equal(*tokens)
    chosen, rejected = np.split(tokens[0], np.flatnonzero(tokens[0] & BEGINS)[1:])
    for side, found in (("chosen", chosen), ("rejected", rejected)):
        options = {"chat_template": CHATML, "tokenize": True, "return_dict": False}
        whole = theirs.apply_chat_template(EXPLICIT["prompt"] + EXPLICIT[side], **options)
        prompt = theirs.apply_chat_template(EXPLICIT["prompt"], add_generation_prompt=True, **options)
        assert ids_of(found).tolist() == whole
        assert whole[: len(prompt)] == prompt  # so that TRL takes all after it as the answer, and so do we
        assert ((found & COUNTS) > 0).tolist() == [index >= len(prompt) for index in range(len(whole))]


def test_text_begins_and_ends_as_a_document(tmp_path: Path) -> None:
    ours = encoder(tmp_path)
    tokenizer = ours.template.tokenizer
    end, name = tokenizer.end_of_document, tokenizer.name_of(tokenizer.end_of_document)
    explicit = {"prompt": "1 + 1 is", "chosen": " 2", "rejected": f" 3{name}"}
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    tokens = [ours.marked(json.loads(pair_of(record, "x"))) for record in (explicit, implicit)]
    assert np.array_equal(*tokens)
    chosen, rejected = np.split(tokens[0], np.flatnonzero(tokens[0] & BEGINS)[1:])
    assert ids_of(chosen).tolist() == [end, *tokenizer.encode("1 + 1 is 2"), end]
    assert ids_of(rejected).tolist() == [end, *tokenizer.encode("1 + 1 is 3"), end]
    num_answer = len(tokenizer.encode("1 + 1 is 2")) - len(tokenizer.encode("1 + 1 is")) + 1
    assert np.flatnonzero(chosen & COUNTS).tolist() == [*range(len(chosen) - num_answer, len(chosen))]


def test_rows_hold_whole_pairs(tmp_path: Path) -> None:
    pairs = [pair("q" * index, "a" * (1 + 3 * (index % 3)), "b" * (1 + index % 5)) for index in range(1, 12)]
    folder = prepare_pairs(tmp_path, 200, *pairs)
    manifest = read_manifest(folder)
    assert manifest["format_version"] == 3
    assert manifest["splits"]["train"]["documents"] == 11
    rows = manifest["splits"]["train"]["rows"]
    assert rows < 11
    config = DataConfig(sources=(Source(path=str(folder)),), sequence_length=200, workers=0)
    data = TrainingData(
        config, vocab_size=320, global_batch_sequences=rows, micro_batch_sequences=rows, rank=0, world_size=1
    )
    tokens, labels = next(iter(data))
    data.close()
    assert num_pairs(tokens, labels) == 11
    ours = encoder(tmp_path)
    found = set()
    for row, counted in zip(tokens, labels, strict=True):
        begins = [*torch.nonzero(row < 0).flatten().tolist(), len(row)]
        sides = [row[begin:end].where(row[begin:end] >= 0, ~row[begin:end]) for begin, end in pairwise(begins)]
        answers = [counted[begin:end] for begin, end in pairwise(begins)]
        for index in range(0, len(sides) - 1, 2):
            if (answers[index] != -100).any():
                found.add(tuple(tuple(each[each != -100].tolist()) for each in answers[index : index + 2]))
    expected = set()
    for each in pairs:
        marked = torch.from_numpy(ours.marked(each).astype(np.int64))
        _, counts = inputs_and_labels(marked[None], "marked")
        half = int(torch.nonzero(marked & BEGINS).flatten()[1])
        expected.add(tuple(tuple(part[part != -100].tolist()) for part in (counts[0, :half], counts[0, half:])))
    assert found == expected


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a"}, r'a pair is an object with the keys "chosen" and "rejected"; its keys are \[\'prompt\'\]'),
        ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are equal"),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION]}, "rejected has no answer to the prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen has no answer to the prompt"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "all text, or all lists of messages; prompt is str"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt, neither as prompt nor"),
        ({"prompt": [QUESTION, GOOD], "chosen": [BAD], "rejected": [GOOD]}, "the prompt ends with an answer"),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [GOOD]}, "its message after it is of user"),
        ({"prompt": [QUESTION], "chosen": [{"role": "x"}], "rejected": [GOOD]}, "chosen, message 1 has the role 'x'"),
        (pair("q" * 300, "a", "b"), "the pair has 6.. tokens, and a row 129; .* or choose --too-long drop$"),
        ({"tools": [1], **EXPLICIT}, '"tools" must be a list of JSON schemas'),
        ({"tools": [{}], "prompt": "a", "chosen": "b", "rejected": "c"}, "has tools, but its answers are text"),
    ],
)
def test_bad_pairs_are_named_by_file_and_line(tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{problem}"):
        prepare_pairs(tmp_path, 128, pair("q", "a", "b"), record)


def test_templates_that_write_the_prompt_in_another_way_are_refused(tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages|length }}" + CHATML)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .* does not write the prompt before the chosen"):
        prepare_pairs(tmp_path, 128, pair("q", "a", "b"), chat_template=str(template))


def test_answers_that_become_equal_are_named_by_file_and_line(tmp_path: Path) -> None:
    template = tmp_path / "trims.jinja"
    template.write_text(CHATML.replace("message['content']", "message['content'] | trim"))
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: chosen and rejected are the same tokens"):
        prepare_pairs(tmp_path, 128, pair("q", "a", "b"), pair("q", "a", " a"), chat_template=str(template))


def test_long_pairs_can_be_left_out_but_not_cut(tmp_path: Path) -> None:
    folder = prepare_pairs(tmp_path, 128, pair("q", "a", "b"), pair("q" * 300, "a", "b"), too_long="drop")
    facts = read_manifest(folder)["splits"]["train"]
    assert (facts["documents"], facts["dropped_chats"]) == (1, 1)
    with pytest.raises(ValueError, match="pairs are compared as a whole"):
        prepare_pairs(tmp_path, 128, pair("q", "a", "b"), out="cut", too_long="truncate")


def test_what_a_folder_of_pairs_holds_is_shown(tmp_path: Path) -> None:
    pairs = [pair("q", "a" * (1 + index), "b") for index in range(7)]
    folder = prepare_pairs(tmp_path, 200, *pairs, pair("q" * 300, "a", "b"), too_long="drop")
    found = json.loads(tritrain("inspect", folder, "--json"))
    train = found["splits"]["train"]
    assert (found["content"], train["documents"], train["whole_documents"]) == ("pairs", 7, 14)
    sides = [len(side) for side in encoder_sides(folder, pairs)]
    powers, counts = np.unique([1 << (length.bit_length() - 1) for length in sides], return_counts=True)
    assert {int(power): count for power, count in train["lengths"].items()} == dict(zip(powers, counts, strict=True))
    assert train["samples"][0].startswith("<|im_start|>user\nq<|im_end|>")
    said = tritrain("inspect", folder)
    assert f"{folder}: pairs in rows of 200 tokens" in said
    assert ", 7 pairs, " in said
    assert "Lengths in tokens of the 14 answers, each after its prompt, that are whole in them:" in said


def encoder_sides(folder: Path, pairs: list[Any]) -> list[Any]:
    """The tokens of both sides of each pair, with marks."""
    ours = PairEncoder(ChatTemplate(load_tokenizer(folder)), 1000, "error")
    marked = [ours.marked(each) for each in pairs]
    return [side for each in marked for side in np.split(each, np.flatnonzero(each & BEGINS)[1:])]
