"""`tritrain verify` on exports: sound ones of every format, and each again after it was damaged here."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import tritrain
from exports import exportable
from gguf_files import read_tensors
from hf_folders import edit_config
from safetensors.torch import load_file, save_file
from speaking import speaking, write_tokenizer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import report_error
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from launcher.inference.verdict import SAMPLE
from quant.config import QuantConfig
from quant.linear import quantize_, quantized_layers

FOLDERS = ("packed", "compressed-tensors", "mlx", "dequantized", "latent")
EXPORTS = (*FOLDERS, "onnx")
FILES = ("tq2_0", "q2_0", "tq1_0", "f16", "q8_0")
UP = "model.layers.1.mlp.up_proj.weight"
CODES = {"packed": UP, "compressed-tensors": UP + "_packed", "mlx": UP, "dequantized": UP}
ZERO_BYTE = {"packed": 0b01010101, "compressed-tensors": 0b10101010 - 256, "mlx": 0b01010101, "dequantized": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model that predicts a text, in every format."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    model = speaking(tokenizer)
    for weights in FOLDERS:
        options: Any = {"weights": weights, "dtype": torch.float32, "tokenizer": tokenizer}
        export_hf(exportable(model, QuantConfig()), folder / weights, **options)
    export_onnx(exportable(model, QuantConfig()), folder / "onnx", tokenizer=tokenizer)
    for into in FILES:
        export_gguf(exportable(model, QuantConfig()), folder / f"{into}.gguf", into=into, tokenizer=tokenizer)
    (folder / "text.txt").write_text(SAMPLE)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        to = tmp_path / name
        if (made / name).is_dir():
            shutil.copytree(made / name, to)
        else:
            shutil.copy(made / name, to)
        return to

    return copied


def verify(place: Path, *options: str | Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["verify", str(place), "--json", *map(str, options)])
    assert not isinstance(result.exception, Exception), result.exception
    [found] = json.loads(result.output)["results"]
    assert result.exit_code == int(not found["sound"]) == int(bool(found["problems"]))
    return result.exit_code, found


def problem(place: Path, *options: str | Path) -> str:
    """The one thing that is wrong."""
    code, found = verify(place, *options)
    assert code == 1, found
    [text] = found["problems"]
    return str(text)


def change(folder: Path, change_: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change_(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", [*EXPORTS, *(f"{into}.gguf" for into in FILES)])
def test_sound_exports(made: Path, name: str) -> None:
    code, found = verify(made / name, "--text", made / "text.txt")
    assert code == 0, found
    model = speaking(made / "tokenizer.model")
    quantize_(model, QuantConfig())
    assert found["num_parameters"] == sum(each.numel() for each in model.parameters())
    if name in ("latent", "q8_0.gguf"):  # Q8_0 has a scale for 32 weights, and 127 times it for each code
        assert found["text"]["num_tokens"] > 200
    if name == "latent":
        assert found["scales"] == "no codes"
        assert found["layers"] == []
        return
    assert found["scales"] == "as declared"
    for key, layer in quantized_layers(model).items():
        codes, _ = layer.weight_codes()
        shares = [(codes == code).double().mean().item() for code in (-1, 0, 1)]
        assert [*found["matrices"][f"{key}.weight"].values()] == pytest.approx(shares, abs=1e-6)
    with torch.no_grad():
        from data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(made / "tokenizer.model")
        tokens = torch.tensor([[tokenizer.end_of_document, *tokenizer.encode(SAMPLE)]])
        nll = model(tokens[:, :-1], tokens[:, 1:], reduction="none").token_nll.mean().item()
    assert found["text"]["nats_per_token"] == pytest.approx(nll, abs=1e-3)
    assert found["notes"] == []


def test_a_text_is_measured_as_by_perplexity(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.inference.verdict.WINDOW_TOKENS", 16)
    text = made / "long.txt"
    text.write_text(f"{SAMPLE} " * 3)
    code, found = verify(made / "packed", "--text", text)
    assert code == 0
    measured = json.loads(tritrain("perplexity", made / "packed", text, "--window", "16", "--json"))
    [loss] = measured["results"]
    assert found["text"]["num_tokens"] == loss["num_tokens"]
    assert math.exp(found["text"]["nats_per_token"]) == pytest.approx(loss["perplexity"], rel=1e-4)


@pytest.mark.parametrize("name", CODES)
def test_a_matrix_of_zeros(copy: Any, name: str) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        stored = tensors[CODES[name]]
        zeros = torch.full((stored.nbytes,), ZERO_BYTE[name] % 256, dtype=torch.uint8)
        tensors[CODES[name]] = zeros.view(stored.dtype).view(stored.shape)

    text = problem(change(copy(name), zero))
    assert text.startswith(f"1 parameter with zeros only: {UP}; ")


def test_a_matrix_of_one_code_and_codes_that_are_none(copy: Any) -> None:
    ones = change(copy("packed"), lambda tensors: tensors[UP].fill_(0b10101010))
    assert f"with the same code everywhere: {UP}" in problem(ones)
    damaged = change(ones, lambda tensors: tensors[UP][3].fill_(255))
    assert f"{UP}: 1024 of 65536 codes are none of -1, 0 and +1" in problem(damaged)


@pytest.mark.parametrize("name", ["packed", "compressed-tensors", "mlx", "dequantized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(copy: Any, name: str, value: float) -> None:
    norm = "model.layers.2.input_layernorm.weight"
    folder = change(copy(name), lambda tensors: tensors[norm][5:7].fill_(value))
    assert f"{norm}: 2 of 256 values are NaN or infinite, the first at (5,)" in problem(folder)
    if name == "packed":
        change(folder, lambda tensors: (tensors[norm].fill_(1), tensors[f"{UP}_scale"].fill_(float("nan"))))
        assert f"{UP}: 1 of 1 scales are NaN or infinite" in problem(folder)


def test_scales_for_the_other_class(copy: Any) -> None:
    folder = copy("packed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**config, "linear_class": "autobitlinear"})
    text = problem(folder)
    assert "scales are stored as their reciprocals" in text
    assert 'Set "linear_class" in config.json to "bitlinear"' in text
    assert verify(folder)[1]["scales"] == "inverted"


@pytest.mark.parametrize(("name", "suffix"), [("packed", "_scale"), ("compressed-tensors", "_scale")])
def test_the_scale_of_one_matrix_is_inverted(copy: Any, name: str, suffix: str) -> None:
    folder = change(copy(name), lambda tensors: tensors[UP + suffix].reciprocal_())
    text = problem(folder)
    assert text.startswith("1 matrix with a scale that looks like its reciprocal (")
    assert f": {UP}; " in text
    # Without a tokenizer nothing can be computed, and the suspicion stays.
    (folder / "tokenizer.json").unlink()
    assert UP in problem(folder)


def test_scales_that_are_not_positive(copy: Any) -> None:
    folder = change(copy("compressed-tensors"), lambda tensors: tensors[f"{UP}_scale"].neg_())
    assert f"1 parameter with scales that are 0 or negative: {UP}; " in problem(folder)


def test_what_cannot_be_decided_is_a_note(copy: Any) -> None:
    """A model that has learned nothing predicts as badly with any scales."""

    def forget(tensors: dict[str, torch.Tensor]) -> None:
        torch.nn.init.normal_(tensors["lm_head.weight"], std=0.02, generator=torch.Generator().manual_seed(1))

    folder = change(copy("packed"), forget)
    code, found = verify(folder)
    assert code == 0, found
    assert found["scales"] == "not decided"
    assert any("whether scales are s or 1/s was not decided" in note for note in found["notes"])


def test_a_model_that_predicts_nothing(made: Path, copy: Any) -> None:
    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)

    text = problem(change(copy("latent"), wrong), "--text", made / "text.txt")
    assert "the model predicts nothing" in text
    assert "guessing among 320 tokens 5.77" in text


def test_names_that_are_missing_or_not_known(copy: Any) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up.weight"] = tensors.pop(UP)

    _, found = verify(change(copy("dequantized"), rename))
    first, second = found["problems"]
    assert first.startswith(f"1 parameter of the architecture is missing: {UP}; ")
    assert second.startswith("1 tensor is not known to the architecture: model.layers.1.mlp.up.weight; ")


def test_shapes_and_parts(copy: Any) -> None:
    folder = change(copy("packed"), lambda tensors: tensors.pop(f"{UP}_scale"))
    assert f"{UP} is there, but its scale is missing" in problem(folder)
    other = change(copy("latent"), lambda tensors: tensors.update({UP: tensors[UP][:128].clone()}))
    assert f"{UP} is (128, 256), and the architecture has (256, 256)" in problem(other)


def test_codes_without_a_configuration(copy: Any) -> None:
    folder = copy("packed")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json has no quantization_config" in verify(folder)[1]["problems"][0]


def test_a_tokenizer_of_another_model(copy: Any, tmp_path: Path) -> None:
    folder = copy("mlx")
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    write_tokenizer(folder / "tokenizer.model", 390)
    assert "its tokenizer has 390 tokens and the embedding 384 rows" in problem(folder)
    edit_config(folder, eos_token_id=384)
    assert "config.json: eos_token_id 384 is no token of the model, which has 0 to 383" in verify(folder)[1]["problems"]


def test_files_that_are_cut_off(copy: Any) -> None:
    folder, file = copy("packed"), copy("q2_0.gguf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: has " in problem(folder)
    content = file.read_bytes()
    for length in (len(content) - 100, 5000, 20, 3, 0):
        file.write_bytes(content[:length])
        assert "is cut off" in problem(file)


def test_a_pickle_is_not_opened(copy: Any) -> None:
    folder = copy("latent")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is never opened" in problem(folder)


def test_an_index_names_only_files_of_its_folder(copy: Any) -> None:
    folder = copy("latent")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {UP: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not the bare name" in problem(folder)


def test_an_unknown_architecture_is_looked_at_as_far_as_it_goes(copy: Any) -> None:
    folder = copy("packed")
    edit_config(folder, model_type="falcon_h1")
    code, found = verify(folder)
    assert code == 0, found
    assert len(found["layers"]) == 3
    assert any("model_type 'falcon_h1' is not known" in note for note in found["notes"])
    assert "zeros only" in problem(change(folder, lambda tensors: tensors[UP].fill_(0b01010101)))


def place_of(file: Path, name: str) -> tuple[int, np.ndarray]:
    """The first byte of a tensor in a GGUF file, and its bytes."""
    content, tensors = file.read_bytes(), read_tensors(file)[0]
    return content.index(tensors[name].data.tobytes()), tensors[name].data


def test_damage_in_gguf_files(copy: Any) -> None:
    file = copy("q2_0.gguf")
    start, data = place_of(file, "blk.1.ffn_up.weight")
    content = bytearray(file.read_bytes())
    blocks = np.frombuffer(content, np.uint8, data.size, start).reshape(-1, 18)
    blocks[:, 2:] = 0b01010101
    file.write_bytes(content)
    assert f"zeros only: {UP}" in problem(file)
    blocks[:, 2:] = 0b10010001
    blocks[7, 4] = 255
    file.write_bytes(content)
    assert "blk.1.ffn_up.weight holds codes other than -1, 0 and +1" in problem(file)
    blocks[:, 2:] = 0b10010001
    blocks[7, :2] = np.array([np.nan], np.float16).view(np.uint8)
    file.write_bytes(content)
    assert f"{UP}: 1 of 1024 scales are NaN or infinite, the first at (1, 3)" in problem(file)


def test_names_and_vocabulary_of_gguf_files(copy: Any) -> None:
    file = copy("tq2_0.gguf")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    first, second = verify(file)[1]["problems"]
    assert "1 parameter of the architecture is missing: blk.1.ffn_up.weight" in first
    assert "1 tensor is not known to the architecture: blk.1.ffn_xx.weight" in second
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    file.write_bytes(content.replace(key + struct.pack("<I", 2), key + struct.pack("<I", 999)))
    assert "tokenizer.ggml.eos_token_id 999 is no token of the vocabulary, which has 0 to 383" in problem(file)


def test_a_folder_that_is_no_export_and_options_of_others(made: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([made / "text.txt"], "is a file and no GGUF; name the folder"),
        ([tmp_path / "none"], "there is no such folder"),
    ):
        result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
        assert isinstance(result.exception, Exception)
        assert report_error(result.exception) == 2
        assert message in str(result.exception)


def test_what_is_printed(made: Path, copy: Any) -> None:
    result = CliRunner().invoke(app, ["verify", str(made / "packed"), "--text", str(made / "text.txt")])
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert lines[0].endswith("weights are codes / scale, 1,378,048 parameters")
    assert lines[1].split() == ["layer", "-1", "0", "+1"]
    assert lines[2].split()[0] == "0"
    assert lines[5] == "scales: as declared"
    assert lines[6].startswith("perplexity ")
    assert lines[-1] == f"{made / 'packed'}: sound"


@pytest.mark.parametrize(
    ("number", "num_bytes", "message"),
    [
        (42, 34 * 64, "a fork's, with blocks of 128 weights"),
        (36, 64 + 32, "1 tensor of type 36, bitnet.cpp's I2_S, which llama.cpp does not read"),
    ],
)
def test_types_of_other_programs(tmp_path: Path, number: int, num_bytes: int, message: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    kind: Any = number
    writer.add_tensor_info("blk.0.ffn_up.weight", (64, 128), np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(np.zeros(num_bytes, np.uint8))
    writer.close()
    assert any(message in each for each in verify(tmp_path / "other.gguf")[1]["problems"])
