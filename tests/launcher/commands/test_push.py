"""`tritrain export --push`, against a server of the hub's protocol on loopback."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from exports import write_checkpoint
from hub import Hub, hub_of
from speaking import speaking, write_tokenizer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import report_error

TOKEN = "hf_thisTokenIsForNobodysEyes"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    from exports import ternary_config

    folder = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    model = speaking(tokenizer)
    config = ternary_config(shards, folder / "run", model.config)
    write_checkpoint(config, model, step=8, phase=1, tokenizer=tokenizer)
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub_of(TOKEN) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def export(run: Path, to: Path, *options: str) -> tuple[int, str]:
    arguments = ["export", str(run), "--to", str(to), *options]
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, Exception):
        return report_error(result.exception), result.output + str(result.exception)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "options", [("--format", "hf-ternary"), ("--format", "onnx"), ("--format", "gguf", "--type", "q2_0")], ids=str
)
def test_what_is_exported_is_in_the_repository(run: Path, tmp_path: Path, hub: Hub, options: tuple[str, ...]) -> None:
    to = tmp_path / ("out.gguf" if "gguf" in options else "out")
    code, output = export(run, to, *options, "--push", "me/model")
    assert code == 0, output
    written = {file.name: file.read_bytes() for file in (to.iterdir() if to.is_dir() else [to])}
    assert hub.repositories == {"me/model": written}
    assert hub.private == {"me/model": True}
    assert f"{hub.url}/me/model" in output
    assert str(tmp_path) not in hub.messages[0]
    assert TOKEN not in output
    assert not any(TOKEN.encode() in content for content in written.values())
    # A second time into the same repository, which stays as visible as it is.
    hub.private["me/model"] = False
    code, output = export(run, to.with_name("again" + to.suffix), *options, "--push", "me/model")
    assert code == 0, output
    assert hub.private == {"me/model": False}


def test_files_of_an_earlier_export_do_not_stay_to_be_read(run: Path, tmp_path: Path, hub: Hub) -> None:
    older = {
        **{f"model-0000{number}-of-00002.safetensors": b"older" for number in (1, 2)},
        "model.safetensors.index.json": b"{}",
        "chat_template.jinja": b"older",
        "added_tokens.json": b"{}",
    }
    own = {"LICENSE": b"mine", "other.gguf": b"another format", "model.onnx": b"too", "8-bit/model.safetensors": b"too"}
    hub.repositories["me/model"], hub.private["me/model"] = {**older, **own}, True
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "me/model")
    assert code == 0, output
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.repositories == {"me/model": {**own, **written}}
    assert len(hub.messages) == 1
    assert all(name in output for name in older)
    code, output = export(run, tmp_path / "a.gguf", "--format", "gguf", "--type", "q2_0", "--push", "me/model")
    assert code == 0, output
    assert hub.repositories == {"me/model": {**own, **written, "a.gguf": (tmp_path / "a.gguf").read_bytes()}}


def test_nothing_is_uploaded_that_verify_refuses(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.formats.codes import CodedMatrices

    codes = CodedMatrices.codes

    def lost(self: CodedMatrices, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        found, level = codes(self, name)
        return (torch.zeros_like(found) if "layers.1.mlp.up_proj" in name else found), level

    monkeypatch.setattr(CodedMatrices, "codes", lost)
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "me/model")
    assert code == 2
    assert "was not uploaded; tritrain verify finds" in output
    assert "zeros only: model.layers.1.mlp.up_proj.weight" in output
    assert hub.requests == []
    assert (tmp_path / "out" / "config.json").exists()


def test_a_mistake_is_found_before_the_export(run: Path, tmp_path: Path, hub: Hub, monkeypatch: Any) -> None:
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "model")
    assert code == 2
    assert "--push 'model': must be OWNER/NAME" in output
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "me/model")
    assert code == 2
    assert "--push: no token was found; set HF_TOKEN" in output
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repository", "token", "reason"), [("somebody-else/model", TOKEN, "403"), ("me/model", "hf_another", "401")]
)
def test_a_refusal_leaves_the_export_and_does_not_show_the_token(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: Any, capfd: Any, repository: str, token: str, reason: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", repository)
    assert code == 2
    assert f"{repository}: the upload failed" in output
    assert reason in output
    assert f"hf upload {repository} {tmp_path / 'out'}" in output
    assert token not in output + "".join(capfd.readouterr())
    assert not hub.objects
    assert (tmp_path / "out" / "config.json").exists()


def test_a_hub_that_repeats_the_token_is_not_quoted(run: Path, tmp_path: Path, hub: Hub, monkeypatch: Any) -> None:
    from hub import Handler

    monkeypatch.setattr(Handler, "create", lambda self, _: self.answer({"error": f"bad token {TOKEN}"}, 400))
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "me/model")
    assert code == 2
    assert "bad token ***" in output
    assert TOKEN not in output


def test_a_hub_out_of_reach(run: Path, tmp_path: Path, hub: Hub, monkeypatch: Any) -> None:
    hub.shutdown()
    hub.server_close()
    code, output = export(run, tmp_path / "out", "--format", "hf-ternary", "--push", "me/model")
    assert code == 2
    assert "me/model: the upload failed" in output
