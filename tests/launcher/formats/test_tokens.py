"""Exports of other programs' models keep the tokens that these were trained on; Transformers is the oracle."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command import outcome, tritrain
from gguf_files import read_tensors
from hf_folders import edit_config, write_variant
from safetensors.torch import load_file, save_file
from tokenizer_files import write_bytes_tokenizer

from data.chat_template import ChatTemplate
from data.tokenizer import load_tokenizer
from data.torchvision_repair import repair_torchvision
from data.transformers_files import puts_first_token
from launcher.errors import CheckpointError
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.opened import open_exportable
from launcher.formats.provenance import source_digest
from launcher.formats.published_gguf import PublishedGGUF
from launcher.formats.tokens import gguf_tokens
from launcher.inference.load import load_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [{"role": "user", "content": "Hello <there>."}]
BEGIN, START, END, LAST = 256, 257, 258, 259
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "chat_template": TEMPLATE,
}


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A folder of Hugging Face: texts begin with <s>, and answers end with <|im_end|>."""
    folder = tmp_path / "chat-model"
    write_variant(folder, "llama", vocab_size=320)
    write_bytes_tokenizer(folder / "tokenizer.json", "<s>", "<|im_start|>", "<|im_end|>")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, LAST], "temperature": 0.5}))
    edit_config(folder, bos_token_id=BEGIN, eos_token_id=[END, LAST])
    return folder


def test_folders_keep_the_tokenizer_of_the_model(chat_model: Path, tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    (chat_model / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"auto_map": {"AutoTokenizer": "code.X"}}))
    tritrain("export", chat_model, "--to", tmp_path / "out", "--format", "hf")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == SETTINGS
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for folder in (tmp_path / "out", chat_model)
    )
    assert ours("a text <|im_end|>").input_ids == theirs("a text <|im_end|>").input_ids
    assert ours("a").input_ids[0] == BEGIN
    asked = ours.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert asked == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert START in asked
    written, source = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", chat_model))
    assert {key: written[key] for key in ("bos_token_id", "eos_token_id")} == {
        "bos_token_id": BEGIN,
        "eos_token_id": [END, LAST],
    }
    assert written["eos_token_id"] == source["eos_token_id"]
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_bytes() == (chat_model / generation).read_bytes()


@pytest.mark.parametrize("adds", [None, False])
def test_gguf_files_begin_texts_as_the_model_does_and_have_its_template(
    chat_model: Path, tmp_path: Path, adds: bool | None
) -> None:
    if adds is not None:
        (chat_model / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"add_bos_token": adds}))
    tritrain("export", chat_model, "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16")
    _, fields = read_tensors(tmp_path / "model.gguf")
    keys = ("bos_token_id", "eos_token_id", "add_bos_token")
    assert [fields[f"tokenizer.ggml.{key}"] for key in keys] == [BEGIN, END, adds is None]
    assert fields["tokenizer.ggml.token_type"][BEGIN : LAST + 1] == [3, 3, 3, 3]
    opened = open_exportable(str(tmp_path / "model.gguf"), ternary=False)
    assert opened.tokenizer is not None
    assert (opened.source.first_token, opened.source.puts_first_token) == (BEGIN, adds is None)
    read, source = ChatTemplate(load_tokenizer(opened.tokenizer)), ChatTemplate(load_tokenizer(chat_model))
    assert read.prompt_tokens(CONVERSATION) == source.prompt_tokens(CONVERSATION)
    assert read.prompt_tokens(CONVERSATION)[:2] == [BEGIN, START]
    loaded = load_model(tmp_path / "model.gguf")  # with all that the template needs, as long as it is there
    del opened
    gc.collect()
    assert ChatTemplate(loaded.tokenizer).prompt_tokens(CONVERSATION) == read.prompt_tokens(CONVERSATION)
    # A file says how texts begin; a folder that is made of it does too.
    tritrain("export", tmp_path / "model.gguf", "--to", tmp_path / "again", "--format", "hf")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (BEGIN, END)
    assert puts_first_token(tmp_path / "again") is (adds is None)
    again = ChatTemplate(load_tokenizer(tmp_path / "again"))
    assert again.prompt_tokens(CONVERSATION) == source.prompt_tokens(CONVERSATION)
    tritrain("export", tmp_path / "model.gguf", "--to", tmp_path / "again.gguf", "--format", "gguf", "--type", "f16")
    _, second = read_tensors(tmp_path / "again.gguf")
    assert second["tokenizer.ggml.token_type"][BEGIN : LAST + 1] == [3, 3, 3, 3]


def test_the_tokenizer_of_another_model_is_refused(chat_model: Path, tmp_path: Path) -> None:
    edit_config(chat_model, bos_token_id="<s>")
    with pytest.raises(CheckpointError, match="bos_token_id '<s>' must be one token"):
        tritrain("export", chat_model, "--to", tmp_path / "out", "--format", "hf")


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"add_bos_token": False}, (), False),
        ({}, (), True),
        ({}, ("tokenizer.json",), False),
    ],
)
def test_what_puts_the_first_token(tmp_path: Path, settings: Any, files: tuple[str, ...], expected: bool) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in files:
        write_bytes_tokenizer(tmp_path / name)
    assert puts_first_token(tmp_path) is expected


@pytest.mark.parametrize(("changes", "puts"), [({}, False), ({"pre": "llama-bpe"}, True), ({"model": "llama"}, True)])
def test_a_gguf_file_that_does_not_say_begins_texts_as_llama_cpp_does(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], puts: bool
) -> None:
    def tokens(*asked: Any) -> dict[str, object]:
        keys = gguf_tokens(*asked) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return {key: value for key, value in keys.items() if not key.endswith("add_bos_token")}

    monkeypatch.setattr("launcher.formats.gguf_export.gguf_tokens", tokens)
    tritrain("export", chat_model, "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16")
    assert PublishedGGUF(tmp_path / "model.gguf").puts_first_token is puts


def test_a_first_token_in_rows_that_are_no_tokens_is_refused(chat_model: Path, tmp_path: Path) -> None:
    edit_config(chat_model, bos_token_id=300)
    asked = ["export", chat_model, "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16"]
    code, _, said = outcome(*asked)
    assert (code, "has 260 tokens, and 300 is to begin or end texts" in said) == (2, True)


def test_file_names_that_are_no_text_are_no_hindrance(chat_model: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(chat_model) + b"/\xff.txt"))).touch()
    tritrain("export", chat_model, "--to", tmp_path / "out", "--format", "hf")


def test_a_tokenizer_is_the_same_by_its_folder_and_by_its_file(chat_model: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("folder", chat_model), ("file", chat_model / "tokenizer.json")):
        tritrain("export", chat_model, "--to", tmp_path / name, "--format", "hf", "--tokenizer", tokenizer)
        gguf = tmp_path / f"{name}.gguf"
        tritrain("export", chat_model, "--to", gguf, "--format", "gguf", "--type", "f16", "--tokenizer", tokenizer)
    for file in (tmp_path / "file").iterdir():
        if file.name != "README.md":
            assert (tmp_path / "folder" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "folder.gguf").read_bytes() == (tmp_path / "file.gguf").read_bytes()


def test_a_folder_of_hugging_face_names_the_tokens_of_its_source(chat_model: Path, tmp_path: Path) -> None:
    tritrain("convert", chat_model, "--to", tmp_path / "out", "--format", "hf")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (BEGIN, [END, LAST])
    tritrain("export", chat_model, "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16")
    tritrain("convert", tmp_path / "model.gguf", "--to", tmp_path / "again", "--format", "hf")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (BEGIN, END)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
def test_weights_that_are_rounded_are_said_to_be(chat_model: Path, tmp_path: Path, stored: torch.dtype) -> None:
    file = chat_model / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    said = f"Weights in {str(stored).removeprefix('torch.')} are rounded to bf16; --dtype fp32 keeps them."
    for command in ("convert", "export"):
        for dtype in ((), ("--dtype", "fp32")):
            out = tmp_path / f"{command}{len(dtype)}"
            output = tritrain(command, chat_model, "--to", out, "--format", "hf", *dtype)
            assert (said in output) == (stored != torch.bfloat16 and not dtype), (command, output)


def test_a_manifest_of_something_else_hides_no_model(chat_model: Path) -> None:
    (chat_model / "manifest.json").write_text(json.dumps({"name": "x"}))
    assert open_exportable(str(chat_model), ternary=False).source.first_token == BEGIN
    assert "sound" in tritrain("verify", chat_model)


def test_a_damaged_archive_beside_a_model_is_a_file_as_any(chat_model: Path, tmp_path: Path) -> None:
    source = HuggingFaceSource(chat_model)
    before = source_digest(source)
    (chat_model / "original.zip").write_bytes(os.urandom(1000) + b"PK\x05\x06" + b"\x01\x00" * 9)
    assert source_digest(source) != before
