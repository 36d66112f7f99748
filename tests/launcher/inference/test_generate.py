"""`tritrain generate`: many prompts, JSON, and llama.cpp in the place of our own computing."""

import builtins
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import narrow, random_model, read_tensors
from hf_folders import ModelSource, edit_config, write_variant
from llama_environment import LLAMA_ENVIRONMENT
from tokenizer_files import write_bytes_tokenizer
from typer.testing import CliRunner

from data.errors import DataError
from launcher.cli import app
from launcher.errors import ConfigError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_folder import write_hf
from launcher.formats.opened import open_exportable
from launcher.inference.generate import write_texts
from launcher.inference.load import load_model
from model.transformer import Transformer

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def generated(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model that writes bytes."""
    folder = tmp_path_factory.mktemp("model")
    write_variant(folder, "bitnet", vocab_size=260)
    edit_config(folder, quantization_config=ONLINE)
    write_bytes_tokenizer(folder / "tokenizer.json")
    return folder


OPTIONS = ("--max-tokens", 6, "--seed", 5, "--dtype", "fp32")


def test_each_prompt_of_a_file_is_continued_as_it_is_alone(model: Path, tmp_path: Path) -> None:
    prompts = ["a", "longer text, \\ and é", '  "c"']
    (tmp_path / "lines.txt").write_text("\n".join([prompts[0], "", *prompts[1:], " "]), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in [*prompts, "\x1b\n"])
    )
    alone = [json.loads(generated(model, p, "--json", *OPTIONS).stdout) for p in [*prompts, "\x1b\n"]]
    loaded = load_model(model, dtype=torch.float32)
    for answer in alone:
        assert answer["text"] == "".join(loaded.generate(answer["prompt"], max_tokens=6, seed=5))
        assert answer["tokens"] == 6
        assert answer["seconds"] >= 0
        assert list(answer) == ["prompt", "text", "tokens", "seconds"]
    for name, expected in {"lines.txt": alone[:3], "lines.jsonl": alone}.items():
        lines = generated(model, "--prompts", tmp_path / name, "--json", *OPTIONS).stdout.splitlines()
        assert [json.loads(line) | {"seconds": 0} for line in lines] == [each | {"seconds": 0} for each in expected]
    readable = generated(model, "--prompts", tmp_path / "lines.txt", *OPTIONS).stdout
    assert readable == "\n".join(generated(model, p, *OPTIONS).stdout for p in prompts)


def test_the_cache_of_a_prompt_is_gone_before_the_next_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(model, dtype=torch.float32)
    caches: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    make = Transformer.new_cache

    def watched(*given: Any) -> Any:
        caches.add(cache := make(*given))
        alive.append(len(caches))
        return cache

    monkeypatch.setattr(Transformer, "new_cache", watched)
    write_texts(loaded, ["a", "b", "c", "d"], max_tokens=8, seed=5, end_tokens=tuple(range(0, 260, 2)))
    assert alive == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", b" \n\n", "has no prompt"),
        ("latin.txt", b"caf\xe9", "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', "line 3: must be a JSON object"),
        ("b.jsonl", b'["prompt"]', "line 1: must be a JSON object"),
        ("c.jsonl", b'{"prompt": 5}', "line 1: must be a JSON object"),
        ("d.jsonl", b"[" * 200_000, "line 1: must be a JSON object"),
    ],
)
def test_a_file_that_holds_no_prompts(model: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        generated(model, "--prompts", tmp_path / name)


def test_what_is_refused_before_anything_is_written(model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.txt").write_text("a\n" + "b" * 40)
    with pytest.raises(ConfigError, match="prompt 2: the prompt has 41 tokens, but the model's context is 32"):
        generated(model, "--prompts", tmp_path / "p.txt")
    assert not capsys.readouterr().out
    for arguments in (("a", "--prompts", tmp_path / "p.txt"), ()):
        with pytest.raises(ConfigError, match="name either a text to continue, or a file"):
            generated(model, *arguments)
    for option in (("--dtype", "fp32"), ("--packed",)):
        with pytest.raises(ConfigError, match=r"only for --with tritrain"):
            generated(model, "a", "--with", "llama.cpp", *option)


def test_llama_cpp_that_is_not_installed_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *arguments: Any) -> Any:
        if name == "llama_cpp":
            raise ImportError(name)
        return real(name, *arguments)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs the `llama-cpp-python` package: pip install -e '.\[llama\]'"):
        generated(model, "a", "--with", "llama.cpp")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp, of this environment or of the one that the tests of GGUF have built."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, LLAMA_ENVIRONMENT.glob("lib/python3*/site-packages"))])
    pytest.importorskip("llama_cpp", reason="pip install -e '.[llama]'", exc_type=ImportError)


def folder_of(tmp_path: Path, kind: str, width: int = 256) -> Path:
    """A model with a tokenizer that no GGUF file can hold."""
    sizes = {"num_layers": 2, "num_kv_heads": 2, "vocab_size": 260, "intermediate_size": width}
    config = replace(narrow(**sizes), max_sequence_length=64)
    write_hf(ModelSource(random_model(config, std=0.08)), config, tmp_path / "hf", torch.float32)
    if kind == "ternary":
        edit_config(tmp_path / "hf", quantization_config=ONLINE)
    write_bytes_tokenizer(tmp_path / "hf" / "tokenizer.json")
    return tmp_path / "hf"


def test_the_file_for_llama_cpp_has_no_vocabulary(tmp_path: Path) -> None:
    opened = open_exportable(str(folder_of(tmp_path, "ternary")), ternary=True)
    export_gguf(opened, tmp_path / "model.gguf", tokenizer=None)
    fields = read_tensors(tmp_path / "model.gguf")[1]
    assert {name: value for name, value in fields.items() if name.startswith("tokenizer.")} == {
        "tokenizer.ggml.model": "none"
    }
    assert fields["llama.vocab_size"] == 260


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(("kind", "into"), [("ternary", "tq2_0"), ("16-bit", "f16")])
def test_llama_cpp_writes_what_we_do(tmp_path: Path, kind: str, into: str) -> None:
    """Greedily, and with the same seed."""
    folder = folder_of(tmp_path, kind)
    for options in (("--temperature", 0), ("--temperature", 0.5, "--top-p", 0.9, "--seed", 3)):
        ours = generated(folder, "Once", "--dtype", "fp32", "--json", *options).stdout
        theirs = generated(folder, "Once", "--with", "llama.cpp", "--json", *options)
        assert json.loads(ours)["text"] == json.loads(theirs.stdout)["text"]
        assert json.loads(theirs.stdout)["tokens"] == 59
        assert f"written as {into} in" in theirs.stderr
        assert "the context of 64 tokens is full" in theirs.stderr


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(("width", "into"), [(256, "tq2_0"), (320, "q2_0"), (272, "f16")])
def test_llama_cpp_computes_the_logits_whatever_it_has_seen(tmp_path: Path, capsys: Any, width: int, into: str) -> None:
    """But for the rounding of inputs, which is by blocks there, or none."""
    from launcher.inference.llama import load_llama

    folder = folder_of(tmp_path, "ternary", width)
    model, ours = load_llama(str(folder)), load_model(folder, dtype=torch.float32).model
    assert f"written as {into} in" in capsys.readouterr().err
    sequences = [[5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 1], [5, 6, 1], [5], [9, 9, 9]]
    for tokens in sequences:
        with torch.no_grad():
            expected = ours(torch.tensor([tokens])).logits[0, -1]
        difference = model.next_logits(tokens) - expected
        assert difference.norm() < 0.05 * expected.norm()
    fresh = load_llama(str(folder))
    torch.testing.assert_close(fresh.next_logits(sequences[2]), model.next_logits(sequences[2]), rtol=0, atol=1e-3)
