"""Exports of models that Tritrain has trained on chats: their template, and the tokens that it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_files import CHATML, chat, prepare_chats, some_chats, write_chats
from command import tritrain
from gguf_files import read_tensors
from ranks import run_group
from runs import run
from tiny import tiny_config
from tokenizer_zoo import sentencepiece_tokenizer

from data.chat_template import ChatTemplate
from data.config import PrepareConfig
from data.errors import DataError
from data.shards import prepare
from data.tokenizer import load_tokenizer
from data.tokenizer_json import tokenizer_files
from data.torchvision_repair import repair_torchvision

LENGTH = 96
PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONVERSATION = chat("Grüße?", "a 😀", "b")["messages"]


def trained(chats: str, folder: str, vocab_size: int) -> None:
    config = tiny_config(
        Path(chats), Path(folder),
        model={"vocab_size": vocab_size, "max_sequence_length": LENGTH},
        data={"sequence_length": LENGTH, "validation_rows": 0},
        schedule={"warmup_steps": 0},
        phases=[{"precision": "16-bit", "steps": 1, "objective": "sft"}],
    )  # fmt: skip
    assert run(config) == "complete"


def test_exports_have_the_template_of_the_chats(tmp_path: Path) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    chats = prepare_chats(tmp_path, LENGTH, *some_chats(24))
    run_group(1, trained, str(chats), str(tmp_path / "run"), 320)
    ours = ChatTemplate(load_tokenizer(tmp_path / "run"))
    assert ours.self_contained() == CHATML
    tritrain("export", tmp_path / "run", "--to", tmp_path / "hf", "--format", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True) == ours.prompt_tokens(CONVERSATION)
    text = ours.text(CONVERSATION, to_answer=True)
    assert theirs(text).input_ids == ours.prompt_tokens(CONVERSATION)  # no chat of training had a token before it
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ours.tokenizer.end_of_document  # which ends answers too
    exported = ChatTemplate(load_tokenizer(tmp_path / "hf"))
    assert exported.prompt_tokens(CONVERSATION) == ours.prompt_tokens(CONVERSATION)
    assert exported.end_tokens() == ours.end_tokens()

    # A checkpoint that is converted has the template, so its exports are of chats as well.
    chats_again = ["run.name=again", "checkpoint.keep_last=0", f"data.sources.0.path={chats}", "phases.0.steps=2"]
    config = tmp_path / "run" / "config.yaml"
    tritrain("convert", tmp_path / "run", "--to", tmp_path / "again", "--config", config, *chats_again)
    tritrain("export", tmp_path / "again", "--to", tmp_path / "converted", "--format", "hf")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_gguf_files_have_it_too(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    source = write_chats(tmp_path / "chats.jsonl", *some_chats(24))
    config = PrepareConfig(inputs=(str(source),), tokenizer=str(tmp_path / "tokenizer.model"), content="chats")
    manifest = prepare(config, LENGTH, tmp_path / "chats")
    run_group(1, trained, str(tmp_path / "chats"), str(tmp_path / "run"), manifest["vocab_size"])
    tritrain("export", tmp_path / "run", "--to", tmp_path / "model.gguf", "--format", "gguf", "--type", "f16")
    _, fields = read_tensors(tmp_path / "model.gguf")
    ours = ChatTemplate(load_tokenizer(tmp_path / "run"))
    assert fields["tokenizer.chat_template"] == ours.self_contained()
    assert fields["tokenizer.ggml.add_bos_token"] is False  # no chat of training had a token before it
    assert fields["tokenizer.ggml.token_type"][ours.tokenizer.end_of_document] == 3


@pytest.mark.parametrize("prefix", [False, True])
def test_transformers_makes_the_same_tokens_of_chats_or_there_is_no_export(tmp_path: Path, prefix: bool) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    sentencepiece_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    ours = ChatTemplate(load_tokenizer(tmp_path / "tokenizer.model"))
    options: Any = {"vocab_size": ours.tokenizer.vocab_size, "max_sequence_length": 64, "template": ours}
    if prefix:
        with pytest.raises(DataError, match="would make other tokens of chats"):
            tokenizer_files(tmp_path / "tokenizer.model", **options)
        return
    (tmp_path / "out").mkdir()
    for name, content in tokenizer_files(tmp_path / "tokenizer.model", **options).items():
        (tmp_path / "out" / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    for answers in (False, True):
        text = ours.text(CONVERSATION, to_answer=answers)
        assert theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=answers) == text
        found = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=answers)
        assert found == ours.tokenizer.encode_special(text)
