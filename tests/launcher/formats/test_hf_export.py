"""Exports to Transformers: the same codes, the same integers, the same logits bit for bit, the same text."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import tritrain
from documented import export_bounds
from exports import exportable, ternary, ternary_config, write_checkpoint
from models import FAMILIES, TINY, build, random_tokens
from places import ROOT
from program_order import loaded, order_matched
from safetensors.torch import load_file

from data.errors import DataError
from data.tokenizer import load_tokenizer
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_export import export_hf
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.model_card import _public
from launcher.inference.load import load_model
from model.transformer import ModelConfig, Transformer
from quant.codes import unpack
from quant.config import PRESETS, QuantConfig
from quant.integers import integer_product
from quant.linear import quantized_layers

CLASSES = ("bitlinear", "autobitlinear")
MODEL = replace(TINY, vocab_size=320, num_kv_heads=2, sub_norm=True, activation="relu2", max_sequence_length=128)


PACKED = {
    "absmean": QuantConfig(),
    "fused": QuantConfig(weights="absmedian", fused=True),
    "twn": QuantConfig(weights="twn"),
    "gaussian": QuantConfig(weights="gaussian", gradient="trust"),
    "binary": QuantConfig(levels="binary"),
}


@pytest.fixture(scope="module")
def transformers(uncompiled_transformers: Any) -> Any:
    return uncompiled_transformers


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_an_order_matched_reference_bit_for_bit(transformers, tmp_path, family, kind):
    model, tokens_BT = build(FAMILIES[family]), random_tokens(3, 17)
    if model.config.qkv_bias and kind == "autobitlinear":
        with pytest.raises(CheckpointError, match="qkv_bias true: autobitlinear multiplies the bias"):
            export_hf(exportable(model), tmp_path / "hf", weights="packed", linear_class=kind, tokenizer=None)
        return
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        export_hf(exportable(model), folder, weights="packed", dtype=dtype, linear_class=kind, tokenizer=None)
        with torch.no_grad():
            theirs = loaded(transformers, folder, dtype)(tokens_BT).logits
            expected = order_matched(model, kind, dtype)(tokens_BT).logits
            trained = ternary(model)(tokens_BT).logits
        assert (theirs - expected).abs().max() <= export_bounds()["hf-ternary, fp32 and bf16"], dtype
        assert (theirs - trained).std() < (0.02 if dtype == torch.float32 else 0.1) * trained.std()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_packed_export_read_back_computes_what_training_did(tmp_path, kind):
    """Bit for bit where the folder holds the level; `bitlinear` folders hold its reciprocal, rounded once more."""
    model, tokens_BT = build(MODEL), random_tokens(3, 17)
    export_hf(
        exportable(model), tmp_path / "hf", weights="packed", dtype=torch.float32, linear_class=kind, tokenizer=None
    )
    with torch.no_grad():
        read = load_model(tmp_path / "hf", dtype=torch.float32).model(tokens_BT).logits
        trained = ternary(model)(tokens_BT).logits
    if kind == "autobitlinear":
        assert torch.equal(read, trained)
    else:
        torch.testing.assert_close(read, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_wrong_convention_of_the_scale_is_far_off(transformers, tmp_path, kind):
    model, tokens_BT = build(MODEL), random_tokens(3, 17)
    export_hf(exportable(model), tmp_path / "hf", weights="packed", linear_class=kind, tokenizer=None)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == kind
    config["quantization_config"]["linear_class"] = CLASSES[1 - CLASSES.index(kind)]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        trained = ternary(model)(tokens_BT).logits
        wrong = loaded(transformers, tmp_path / "hf")(tokens_BT).logits
    assert not (wrong - trained).std() < 0.2 * trained.std()


@pytest.mark.parametrize("recipe", PACKED.values(), ids=PACKED)
def test_integer_products_are_those_of_training(transformers, tmp_path, recipe):
    """Codes of weights and of inputs, and so their products, in fp32 where `bitlinear` has the same integers."""
    model = build(MODEL)
    export_hf(exportable(model, recipe), tmp_path / "hf", weights="packed", dtype=torch.float32, tokenizer=None)
    theirs, ours = loaded(transformers, tmp_path / "hf"), ternary(model, recipe)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    x_NI = torch.randn(5, MODEL.hidden_size, generator=torch.Generator().manual_seed(1))
    for name, layer in quantized_layers(ours).items():
        codes_OI, level = layer.weight_codes()
        assert torch.equal(unpack(stored[f"{name}.weight"]), codes_OI)
        assert stored[f"{name}.weight_scale"].dtype == torch.float32
        assert torch.equal(stored[f"{name}.weight_scale"], level.reciprocal().reshape(1))
        if layer.in_features != MODEL.hidden_size:
            continue
        found, _ = theirs.get_submodule(name).activation_quant(x_NI)
        expected, scale_N1 = layer.input_codes(x_NI)  # type: ignore[misc]
        assert torch.equal(found, expected)
        y_NO = theirs.get_submodule(name)(x_NI)
        integers_NO = y_NO / (scale_N1 * level)
        assert torch.equal(integers_NO.round(), integer_product(expected, codes_OI))
        torch.testing.assert_close(y_NO, layer(x_NI), rtol=1e-6, atol=0)


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Any:
    """Make a run with a checkpoint, and the model in it."""

    def make(model: ModelConfig = MODEL, *, step: int = 8, phase: int = 1, **options: Any) -> tuple[Path, Transformer]:
        config = ternary_config(shards, tmp_path / "run", model, **options)
        built = build(config.model)
        write_checkpoint(config, built, step=step, phase=phase)
        (tmp_path / "run" / "metrics.jsonl").write_text(
            '{"step": 4, "phase": 0, "validation/loss": 2.5, "validation/bits_per_byte": 1.25}\n'
            '{"step": 4, "phase": 1, "validation/loss": 9.5, "validation/bits_per_byte": 9.25}\n'
            '{"step": 7, "phase": 1, "train/loss": 4.25, "train/cross_entropy": 3.25, "train/learning_rate": 0.1}\n'
            '{"step": 8, "phase": 1, "validation/loss": 3.5, "validation/bits_per_byte": 1.75}\n'
            '{"step": 9, "phase": 1, "train/loss": 9.99, "train/learning_rate": 0.1}\n'
        )
        digest = CheckpointReader(tmp_path / "run" / "checkpoints" / f"step-{step:08}").manifest.digest
        score = {"value": 0.625, "standard_error": 0.01}
        records = [
            {
                "task": task,
                "model": model_digest,
                "num_examples": 40,
                "metric": "acc",
                "scores": {"acc": score, "bits_per_byte": score},
            }
            for task, model_digest in (("sciq", digest), ("copa", "of another"))
        ]
        (tmp_path / "run" / "scores.json").write_text(json.dumps({"results": records}))
        return tmp_path / "run", built

    return make


@pytest.mark.slow
def test_a_run_becomes_a_folder_that_writes_the_same_text(transformers, run, shards, tmp_path):
    folder, model = run()
    assert "Written" in tritrain("export", folder, "--to", tmp_path / "hf", "--format", "hf-ternary")
    theirs, ours = loaded(transformers, tmp_path / "hf"), ternary(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    spm = load_tokenizer(shards / "tokenizer.model")
    for seed in range(20):
        prompt = spm.decode(torch.randint(3, 320, (5,), generator=torch.Generator().manual_seed(seed)).tolist())
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = [spm.end_of_document, *spm.encode(prompt)]
        assert inputs["input_ids"].tolist() == [tokens]
        found = theirs.generate(**inputs, max_new_tokens=64, min_new_tokens=64)[0]
        with torch.no_grad():
            logits_TV = ours(found[None, :-1]).logits[0, len(tokens) - 1 :]
        logits_TV[:, spm.end_of_document] = -torch.inf  # as with min_new_tokens
        assert len(logits_TV) == 64
        assert torch.equal(found[len(tokens) :], logits_TV.argmax(-1)), prompt
    card = (tmp_path / "hf" / "README.md").read_text()
    for line in (
        "# tiny", "8 steps of 256 tokens, 2,048 (2.05 k)", "| 1 | ternary | next-token | 4 | 8 |",
        "| `shards` | 1 | corpus.jsonl |",
        "| `weights` | `gaussian` |", r"\.(self_attn\|mlp)\.", "| training loss, nats per token | 3.2500 | 7 |",
        "| held-out loss, bits per byte of text | 1.7500 | 8 |", "source_digest", "AutoTokenizer", "(bitlinear)",
    ):  # fmt: skip
        assert line in card, line
    assert "| sciq | 40 | acc | 62.5 ± 1.0 | 0.625 ± 0.010 |" in card
    assert "copa" not in card
    record = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert (record["source"], record["step"]) == ("tiny", 8)
    assert not list(tmp_path.glob("*.tmp"))
    assert HuggingFaceSource(tmp_path / "hf").is_packed


def test_a_card_has_the_measurements_of_its_own_phase_and_without_a_teacher_s_losses(run, tmp_path):
    folder, _ = run()
    tritrain("export", folder, "--to", tmp_path / "ternary", "--format", "hf-ternary")
    card = (tmp_path / "ternary" / "README.md").read_text()
    assert "| training loss, nats per token | 3.2500 | 7 |" in card
    assert "| held-out loss, nats per token | 3.5000 | 8 |" in card
    run(step=4, phase=0)
    tritrain("export", folder / "checkpoints" / "step-00000004", "--to", tmp_path / "16-bit", "--format", "hf")
    card = (tmp_path / "16-bit" / "README.md").read_text()
    assert "| held-out loss, nats per token | 2.5000 | 4 |" in card
    assert "| held-out loss, bits per byte of text | 1.2500 | 4 |" in card
    assert "training loss" not in card


@pytest.mark.parametrize(
    ("format_name", "model", "library"),
    [
        ("hf-ternary", MODEL, "transformers"),
        ("compressed-tensors", MODEL, "transformers"),
        ("mlx", replace(TINY, vocab_size=320, intermediate_size=64), "mlx"),
    ],
)
def test_the_card_names_the_license_that_is_given(run, tmp_path, format_name, model, library):
    folder, _ = run(model)
    export = ("export", folder, "--format", format_name)
    said = tritrain(*export, "--to", tmp_path / "none")
    assert "No license is named in it; --license NAME does that" in said
    assert "license:" not in (tmp_path / "none" / "README.md").read_text()
    said = tritrain(*export, "--to", tmp_path / "licensed", "--license", "apache-2.0")
    assert "No license" not in said
    head = yaml.safe_load((tmp_path / "licensed" / "README.md").read_text().split("---")[1])
    assert (head["license"], head["library_name"]) == ("apache-2.0", library)
    for license_name in ("", "a b", "mit\ntags: [x]", "'"):
        with pytest.raises(ConfigError, match="must be an identifier of a license, such as"):
            tritrain(*export, "--to", tmp_path / "other", "--license", license_name)


def test_cards_name_data_without_their_folders():
    assert [
        _public(name)
        for name in ("/home/me/data/shards", "s3://bucket/some/shards/", "hf:roneneldan/TinyStories:train",
                     "hf:/home/me/texts:train[:10]", "hf:./texts:train", "python-stdlib", "corpus.jsonl")
    ] == ["shards", "shards", "hf:roneneldan/TinyStories:train", "hf:texts:train[:10]", "hf:texts:train",
          "python-stdlib", "corpus.jsonl"]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\n", b"[1]\n", b'{"a": 1}\n', b'{"step": 8, "phase": 1, "validation/loss": "x"}\n', b"[" * 10**5],
)
def test_damaged_measurements_stop_no_export(run, tmp_path, content):
    folder, _ = run()
    for name in ("metrics.jsonl", "scores.json"):
        (folder / name).write_bytes(content)
    tritrain("export", folder, "--to", tmp_path / "hf", "--format", "hf-ternary")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# tiny" in card
    assert "Last measured" not in card
    assert "Tasks, by" not in card


def test_16_bit_exports(transformers, run, tmp_path):
    folder, model = run(quantization={"hadamard": "all", "granularity": "row"})
    checkpoint = folder / "checkpoints" / "step-00000008"
    with pytest.raises(ConfigError, match=r"--weights: is missing; .*step-00000008 is ternary"):
        tritrain("export", checkpoint, "--to", tmp_path / "hf", "--format", "hf")
    tokens_BT = random_tokens(3, 17)
    for weights, expected, tolerance in (("latent", model, 0.0), ("dequantized", None, 0.02)):
        out = tmp_path / weights
        tritrain("export", checkpoint, "--to", out, "--format", "hf", "--weights", weights)
        recipe = QuantConfig(hadamard="all", granularity="row", activations="none")
        with torch.no_grad():
            logits = loaded(transformers, out)(tokens_BT).logits
            reference = (expected or ternary(model, recipe))(tokens_BT).logits
        assert (logits - reference).std() <= tolerance * reference.std()
    assert not (out / "config.json").read_text().count("quantization_config")


def test_a_16_bit_phase(transformers, run, tmp_path):
    folder, model = run(step=4, phase=0)
    tritrain("export", folder, "--to", tmp_path / "hf", "--format", "hf", "--no-tokenizer")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "provenance.json",
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(
            loaded(transformers, tmp_path / "hf")(random_tokens(3, 17)).logits, model(random_tokens(3, 17)).logits
        )
    for arguments in (("hf-ternary",), ("hf", "--weights", "dequantized")):
        with pytest.raises(CheckpointError, match="is of a 16-bit phase and has no codes"):
            tritrain("export", folder, "--to", tmp_path / "other", "--format", *arguments)
    # And from there on.
    tritrain(
        "export", tmp_path / "hf", "--to", tmp_path / "again", "--format", "hf", "--no-tokenizer", "--dtype", "fp32"
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    with pytest.raises(CheckpointError, match="hf is a 16-bit model and has no codes"):
        tritrain("export", tmp_path / "hf", "--to", tmp_path / "other", "--format", "hf-ternary")
    assert not (tmp_path / "other").exists()


def test_a_part_of_the_layers(transformers, tmp_path):
    recipe = QuantConfig(include=r"layers\.1\.mlp\.\w+_proj$")
    model, tokens_BT = build(MODEL), random_tokens(3, 17)
    export_hf(exportable(model, recipe), tmp_path / "hf", weights="packed", dtype=torch.float32, tokenizer=None)
    with torch.no_grad():
        theirs, ours = loaded(transformers, tmp_path / "hf")(tokens_BT).logits, ternary(model, recipe)(tokens_BT).logits
    assert (theirs - ours).std() < 0.02 * ours.std()
    source = HuggingFaceSource(tmp_path / "hf")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read("weight", name, 0, 8), model.get_parameter(name).detach().flatten()[:8])


REFUSED = {
    "int8-128": (PRESETS["nielsen-2025"], r"layer_norm true.*--weights latent(?s:.*)activations int8-128.*dequantized"),
    "paretoq": (PRESETS["paretoq"], r"learned scales: a packed matrix has one(?s:.*)activations none"),
    "bitnet-v2": (PRESETS["bitnet-v2"], "hadamard outputs: packed layers do not rotate"),
    "row": (QuantConfig(granularity="row"), "granularity row: a packed matrix has one scale"),
    "int2": (QuantConfig(levels="int2", weights="absmax"), "levels int2: only -1, 0 and"),
    "dead-zone": (QuantConfig(dead_zone_bias=1e-3), "dead_zone_bias 0.001"),
}


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=REFUSED)
def test_recipes_that_transformers_cannot_compute(tmp_path, recipe, message):
    model = build(replace(MODEL, tie_embeddings=False))
    with pytest.raises(CheckpointError, match=message):
        export_hf(exportable(model, recipe), tmp_path / "hf", weights="packed", tokenizer=None)
    if recipe.layer_norm or recipe.dead_zone_bias:
        with pytest.raises(CheckpointError, match="Transformers cannot compute this"):
            export_hf(exportable(model, recipe), tmp_path / "hf", weights="dequantized", tokenizer=None)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing(run, shards, tmp_path, monkeypatch):
    folder, _ = run(replace(MODEL, intermediate_size=50))
    arguments = ("export", folder, "--to", tmp_path / "hf", "--format", "hf-ternary")
    said = r"layers.0.mlp.gate_proj.weight has 50 rows, and only a multiple of 4 .* \(and 3 more like it\)$"
    with pytest.raises(CheckpointError, match=said):
        tritrain(*arguments)
    folder, _ = run()
    for changed, message in (
        (("--weights", "latent"), "--weights latent: belongs to --format hf"),
        (("--tokenizer", shards, "--no-tokenizer"), "--tokenizer and --no-tokenizer exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            tritrain(*arguments, *changed)
    with pytest.raises(ConfigError, match="--linear-class bitlinear: belongs to --format hf-ternary"):
        tritrain(*arguments[:-1], "hf", "--linear-class", "bitlinear")
    with pytest.raises(DataError, match="no such tokenizer file"):
        tritrain(*arguments, "--tokenizer", tmp_path / "absent.model")
    monkeypatch.setattr("launcher.formats.opened.tokenizer_of", lambda source: None)
    with pytest.raises(ConfigError, match="its tokenizer was not found; name it with --tokenizer"):
        tritrain(*arguments)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launcher.formats.hf_export.pack", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        tritrain(*arguments, "--tokenizer", shards)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_truncated_export_is_noticed(run, tmp_path):
    folder, _ = run()
    tritrain("export", folder, "--to", tmp_path / "hf", "--format", "hf-ternary")
    with pytest.raises(ConfigError, match=r"hf: exists already"):
        tritrain("export", folder, "--to", tmp_path / "hf", "--format", "hf-ternary")
    path = tmp_path / "hf" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        HuggingFaceSource(tmp_path / "hf")


NEWEST = """
import sys
from pathlib import Path
import torch
from data.torchvision_repair import repair_torchvision
repair_torchvision()
import transformers
assert transformers.__version__.startswith("5."), transformers.__version__
tokens_BT, texts = torch.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        logits_BTV = model.eval()(tokens_BT).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
    ids = [tokenizer(text)["input_ids"] for text in texts] if tokenizer else []
    torch.save((logits_BTV, ids), folder / "result.pt")
"""


@pytest.mark.slow
def test_the_newest_transformers_computes_the_same_bits(shards, tmp_path):
    """Release 5, in a folder that comes before the installed packages; it loads in the dtype of the folder."""
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), "transformers>=5,<6"]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if installed.returncode:
        pytest.skip(f"Transformers 5 cannot be installed here: {installed.stderr[-300:]}")
    spm, tokens_BT, expected = load_tokenizer(shards / "tokenizer.model"), random_tokens(3, 17), {}
    texts = [" of text", "a  b", "\n", "naïve 日本 🙂", ""]
    for family, config in FAMILIES.items():
        model = build(replace(config, vocab_size=320))
        for kind, dtype in ((CLASSES[0], torch.float32), (CLASSES[0], torch.bfloat16), (CLASSES[1], torch.float32)):
            if model.config.qkv_bias and kind == "autobitlinear":
                continue
            folder = tmp_path / f"{family}-{kind}-{dtype}"
            tokenizer = None if expected else shards / "tokenizer.model"
            export_hf(exportable(model), folder, weights="packed", dtype=dtype, linear_class=kind, tokenizer=tokenizer)
            with torch.no_grad():
                expected[folder] = order_matched(model, kind, dtype)(tokens_BT).logits
    torch.save((tokens_BT, texts), tmp_path / "inputs.pt")
    path = os.pathsep.join([str(packages), str(ROOT)])
    subprocess.run(
        [sys.executable, "-c", NEWEST, str(tmp_path / "inputs.pt"), *map(str, expected)],
        env={**os.environ, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=500,
    )
    for folder, logits_BTV in expected.items():
        found, ids = torch.load(folder / "result.pt")
        assert torch.equal(found, logits_BTV), folder.name
        assert ids in ([], [[spm.end_of_document, *spm.encode(text)] for text in texts])
    assert any((folder / "tokenizer.json").exists() for folder in expected)
