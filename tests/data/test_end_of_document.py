"""The token that ends a document is the one that the user or the tokenizer's own files name; nothing is guessed."""

import json
from pathlib import Path

import pytest
from tokenizer_zoo import byte_level, library_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, models

from data.config import PrepareConfig
from data.errors import DataError
from data.prepared import open_prepared
from data.shards import prepare
from data.tokenizer import load_tokenizer

TEXT = "the cat sat on the mat. " * 9


def make(folder: Path, *special: str, **files: dict) -> Path:
    """A folder with a word tokenizer.json that has special tokens, and with other JSON files."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, TEXT: 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 3}}, "</s>"),
        ({"tokenizer_config": {"bos_token": "<s>"}, "generation_config": {"eos_token_id": 4}}, "<|im_end|>"),
        ({"config": {"eos_token_id": [4]}}, "<|im_end|>"),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": 2}}, "<|im_end|>"),
        ({"special_tokens_map": {"eos_token": "</s>"}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        (
            {
                "tokenizer_config": {"eos_token": 2},
                "config": {"eos_token_id": "</s>"},
                "manifest": {"end_of_document": 4},
            },
            "<|im_end|>",
        ),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [None, 4]}}, "<|im_end|>"),
        ({"generation_config": {"eos_token_id": [4, 2]}}, "</s>"),  # the only one with a usual name
        ({"manifest": {"end_of_document": 3}}, "<|endoftext|>"),  # data that were prepared by a guess
    ],
)
def test_files_beside_the_tokenizer_name_it(tmp_path, files, end):
    folder = make(tmp_path / "f", "</s>", "<|endoftext|>", "<|im_end|>", **files)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.name_of(tokenizer.end_of_document) == end
    chosen = load_tokenizer(folder, "<|im_end|>")
    assert chosen.end_of_document == 4


@pytest.mark.parametrize("wrong", [True, False, [True], 4.0])
def test_what_is_neither_a_name_nor_an_id_names_no_token(tmp_path, wrong):
    folder = make(tmp_path / "f", "<|im_end|>", "<|endoftext|>", config={"eos_token_id": wrong})
    assert load_tokenizer(folder).end_of_document == 3


@pytest.mark.parametrize(
    ("special", "end"),
    [
        (["<|endoftext|>", "</s>"], "</s>"),
        (["<eos>", "x", "<|end_of_text|>"], "<|end_of_text|>"),
        (["<\uff5cend▁of▁sentence\uff5c>", "<|end▁of▁sentence|>"], "<|end▁of▁sentence|>"),
    ],
)
def test_a_run_s_copy_of_an_earlier_version_keeps_the_token_that_it_was_trained_with(tmp_path, special, end):
    folder = make(tmp_path / "f", *special)
    for config in ("run: {name: x}\n", "# tritrain_version: 0.1.0\n"):
        (folder / "config.yaml").write_text(config)
        with pytest.raises(DataError, match="may end a document"):
            load_tokenizer(folder)
    (folder / "config.yaml").write_text("tritrain_version: 0.1.0\nrun: {name: x}\n")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.name_of(tokenizer.end_of_document) == end
    (tmp_path / "marked.json").write_bytes(tokenizer.file_content())
    assert load_tokenizer(tmp_path / "marked.json").end_of_document == tokenizer.end_of_document
    marked = load_tokenizer(folder, special[0]).file_content()  # as copies are now
    (folder / "tokenizer.json").write_bytes(marked)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.name_of(tokenizer.end_of_document) == special[0]


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "<\uff5cend▁of▁sentence\uff5c>", "<eos>"])
def test_a_single_usual_name_is_enough(tmp_path, name):
    tokenizer = load_tokenizer(make(tmp_path / "f", "<|begin|>", name, "<|eot_id|>"))
    assert tokenizer.end_of_document == 3


@pytest.mark.parametrize(
    ("special", "files", "message"),
    [
        (["</s>", "<|endoftext|>"], {}, r"any of \['</s>', '<\|endoftext\|>'\] may end a document; name it with"),
        (["a", "b"], {"config": {"eos_token_id": [2, 3]}}, r"config\.json: any of \[2, 3\] may end"),
        (["<|finis|>"], {}, r"none of its special tokens \['<\|finis\|>'\]"),
        (["</s>"], {"tokenizer_config": {"eos_token": "<x>"}}, r"tokenizer_config\.json: says that '<x>' .*no such"),
        (["</s>"], {"config": {"eos_token_id": 77}}, r"config\.json: says that 77 ends a document"),
    ],
)
def test_what_is_not_known_is_not_guessed(tmp_path, special, files, message):
    folder = make(tmp_path / "f", *special, **files)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder)
    with pytest.raises(DataError, match="end_of_document: says that '<none>' ends a document"):
        load_tokenizer(folder, "<none>")
    assert load_tokenizer(folder, special[0]).end_of_document == 2
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(folder)


def test_a_tokenizer_json_without_added_tokens_loads(tmp_path):
    byte_level(tmp_path / "tokenizer.json", "<|endoftext|>")
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    end = definition["added_tokens"].pop()
    del definition["added_tokens"]
    definition["model"]["vocab"]["<|endoftext|>"] = end["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_document == end["id"]
    assert end["id"] not in tokenizer.encode("a <|endoftext|> b")


def test_of_a_folder_with_both_kinds_the_file_with_all_tokens_is_read(tmp_path):
    sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    library_tokenizer(tmp_path / "tokenizer.json", models.BPE(), end="<|endoftext|>")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"  # of another vocabulary
    model = load_tokenizer(tmp_path / "tokenizer.model")
    same = {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {model.name_of(i).replace("\u2581", " "): i for i in range(700)},
            "merges": [],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(same))
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    more = same | {"added_tokens": [{"id": 700, "content": "<|im_end|>", "special": True}]}
    for each in more["added_tokens"]:
        each |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(more))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert load_tokenizer(tmp_path).end_of_document == 700
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    assert load_tokenizer(tmp_path).end_of_document == 700
    with pytest.raises(DataError, match=r"not a SentencePiece model .*if it is tiktoken's"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_prepared_folder_and_copies_of_its_tokenizer_know_the_token(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    if kind == "model":
        sentencepiece_tokenizer(source / "tokenizer.model", user_defined_symbols=["<doc>"])
    else:
        byte_level(source / "tokenizer.json", "<|endoftext|>", first=("<doc>",))
    (tmp_path / "a.txt").write_text(TEXT * 9 + "<doc>")
    text = str(tmp_path / "a.txt")
    chosen = PrepareConfig(inputs=(text,), tokenizer=str(source), end_of_document="<doc>")
    manifest = prepare(chosen, 8, tmp_path / "out")
    assert manifest["end_of_document_token"] == "<doc>"
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / f"tokenizer.{kind}"
    copy.write_bytes((tmp_path / "out" / f"tokenizer.{kind}").read_bytes())
    tokenizer = load_tokenizer(copy)
    assert tokenizer.end_of_document == manifest["end_of_document"]
    assert tokenizer.end_of_document not in tokenizer.encode("<doc>")
    assert tokenizer.decode(tokenizer.encode("<doc>")) == "<doc>"
    again = prepare(PrepareConfig(inputs=(text,), tokenizer=str(copy)), 8, tmp_path / "again")
    assert again["tokenizer"] == manifest["tokenizer"]  # so that a mixture may have both
    with pytest.raises(DataError, match=r"prepared with a different end_of_document \(there \d+, wanted \d+\)"):
        prepare(PrepareConfig(inputs=(text,), tokenizer=str(source)), 8, tmp_path / "out")


def test_data_prepared_before_stay_loadable_and_done(tmp_path):
    source = make(tmp_path / "source", "</s>", "<|endoftext|>")
    (tmp_path / "a.txt").write_text(TEXT)
    config = PrepareConfig(inputs=(str(tmp_path / "a.txt"),), tokenizer=str(source), end_of_document="</s>")
    out = tmp_path / "out"
    prepare(config, 1, out)
    # As an older version wrote it: the tokenizer's file as it was, and without the new facts.
    (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = load_tokenizer(source, "</s>").fingerprint
    for key in ("end_of_document_token", "compared_documents", "changed_documents"):
        del manifest[key]
    for key in ("end_of_document", "lossy_tokenizer"):
        del manifest["options"][key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert open_prepared(out) == prepare(config, 1, out) == manifest
    assert load_tokenizer(out).end_of_document == 2


def test_a_trained_tokenizer_has_its_own():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PrepareConfig(inputs=("a",), tokenizer="bpe:400", end_of_document="<x>")
    assert "is for a tokenizer's file" in caught.value.args[0]["end_of_document"]
