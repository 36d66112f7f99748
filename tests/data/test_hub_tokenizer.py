"""Tokenizers by the name of a model on the hub, from a server on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.file_download
import pytest
from hub import Hub, hub_of
from tokenizer_zoo import LOSSLESS

from data.config import PrepareConfig
from data.errors import DataError
from data.prepared import open_prepared
from data.shards import prepare
from data.tokenizer import load_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model `someone/model`, whose configuration says which of two usual tokens ends documents."""
    with hub_of("hf_token") as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        LOSSLESS["gpt2.json"](tmp_path / "tokenizer.json")
        end = load_tokenizer(tmp_path / "tokenizer.json").end_of_document
        server.repositories["someone/model"] = {
            "tokenizer.json": (tmp_path / "tokenizer.json").read_bytes(),
            "config.json": json.dumps({"eos_token_id": end, "auto_map": {"AutoTokenizer": "code.Evil"}}).encode(),
            "tokenizer_config.json": b"{}",
            "code.py": b"raise SystemExit",
            "model.safetensors": bytes(1000),
            "sub/tokenizer.json": b"{}",
        }
        yield server


def test_a_tokenizer_is_named_by_its_model_and_nothing_else_is_fetched(hub, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat, which was Ünïcödé. " * 20)
    outs = []
    for name, tokenizer in (("hub", "hf:someone/model"), ("file", str(tmp_path / "tokenizer.json"))):
        config = PrepareConfig(inputs=(str(tmp_path / "a.txt"),), tokenizer=tokenizer)
        prepare(config, 8, tmp_path / name)
        outs.append(open_prepared(tmp_path / name))
    assert outs[0] == outs[1]
    fetched = {request.split("/")[-1].partition("?")[0] for request in hub.requests if "resolve" in request}
    assert fetched == {"tokenizer.json", "config.json", "tokenizer_config.json"}
    assert not any("/sub/" in request for request in hub.requests)
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_the_cache_serves_when_the_hub_is_gone(hub, monkeypatch):
    before = load_tokenizer("hf:someone/model").fingerprint
    hub.shutdown()
    hub.server_close()
    assert load_tokenizer("hf:someone/model").fingerprint == before
    with pytest.raises(DataError, match=r"hf:someone/other: cannot be fetched"):
        load_tokenizer("hf:someone/other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:someone/nothing", r"hf:someone/nothing: cannot be fetched \(Repository.*check the name and the network"),
        ("hf:", "write a tokenizer on the hub as hf:NAME"),
        ("hf:../../etc", "write a tokenizer on the hub as hf:NAME|cannot be fetched"),
        ("hf:a b", "write a tokenizer on the hub as hf:NAME"),
        ("hf:someone/empty", "hf:someone/empty: has no tokenizer.model and no tokenizer.json"),
    ],
)
def test_what_cannot_be_fetched_is_named(hub, spec, message):
    hub.repositories["someone/empty"] = {"README.md": b"nothing"}
    with pytest.raises(DataError, match=message):
        load_tokenizer(spec)
