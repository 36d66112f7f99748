"""SubLN in a model that was trained without it: gains, and what the start is worth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import tritrain
from exports import ternary_config
from hf_folders import ModelSource, edit_config, write_variant
from models import TINY, VARIANTS, build, random_tokens

from data.labels import IGNORED_LABEL, MARKED, texts_of
from launcher.config.file import to_tree
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.open import check_model, open_source
from launcher.inference.load import load_model
from launcher.inference.sub_norms import insert_sub_norms_, lacks_sub_norms, measure_sub_norms
from model.transformer import Transformer

CPU = torch.device("cpu")


def with_sub_norms(
    model: Transformer, rows: torch.Tensor, texts: list[tuple[torch.Tensor, torch.Tensor]] | None = None
) -> tuple[Transformer, Any]:
    """The model with SubLN, filled by way of a source, and what was measured on rows or texts."""
    config = replace(model.config, sub_norm=True)
    source = ModelSource(model)
    assert lacks_sub_norms(source, config)
    insertion = measure_sub_norms(source, config, texts or [(row[:-1], row[1:]) for row in rows], CPU)
    insert_sub_norms_(source, config, insertion.gains)
    changed = Transformer(config)
    changed.load_state_dict({
        name: source.read_finite("weight", name, 0, torch.Size(shape).numel()).view(shape)
        for name, shape in source.shapes.items()
    })  # fmt: skip
    return changed, insertion


def loss_of(model: Transformer, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(rows[:, :-1], rows[:, 1:], reduction="none").token_nll.mean())


def test_a_gain_is_the_median_size_of_what_the_projection_is_given() -> None:
    model, rows = build(replace(TINY, num_kv_heads=2)), random_tokens(4, 32)
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            sizes = found.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(inputs[0].norm(dim=-1)))
    before = loss_of(model, rows)
    changed, insertion = with_sub_norms(model, rows)
    assert insertion.nats_before == pytest.approx(before, abs=1e-5)
    assert insertion.nats_after == pytest.approx(loss_of(changed, rows), abs=1e-5)
    assert len(insertion.gains) == len(found) == 4
    for name, sizes in found.items():
        layer, _, projection = name.rpartition(".")
        norm = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}[projection]
        width = model.get_submodule(name).in_features
        expected = (sizes[0] ** 2 / width + TINY.norm_eps).sqrt().median()
        assert insertion.gains[f"{layer}.{norm}.weight"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("marked", [False, True], ids=["documents", "chats"])
def test_texts_that_share_a_row_are_measured_apart(marked: bool) -> None:
    """As training computes their loss, which is another one than that of the row as a whole."""
    model, rows = build(replace(TINY, num_kv_heads=2)), random_tokens(4, 33)
    rows[rows == 95] = 0
    rows[:3, [0, 9, 20]] = 95
    tokens, labels = rows[:, :-1].clone(), rows[:, 1:].clone()
    if marked:
        labels[:, 3:9], labels[0, 20:] = IGNORED_LABEL, IGNORED_LABEL
        tokens = tokens.where(tokens != 95, ~tokens)
    first_token = MARKED if marked else 95
    texts = texts_of(tokens, labels, first_token)
    assert len(texts) == 3 * 3 + 1 - marked
    changed, insertion = with_sub_norms(model, rows, texts)
    assert insertion.gains != with_sub_norms(model, rows)[1].gains

    def loss(of: Transformer, first: int | None) -> float:
        of.model.first_token = first
        given = tokens if first is not None else tokens.where(tokens >= 0, ~tokens)
        with torch.no_grad():
            nll = of(given, labels, reduction="none").token_nll
        of.model.first_token = None
        return float(nll.sum() / (labels != IGNORED_LABEL).sum())

    assert insertion.nats_before == pytest.approx(loss(model, first_token), abs=1e-5)
    assert insertion.nats_after == pytest.approx(loss(changed, first_token), abs=1e-5)
    assert insertion.nats_after != pytest.approx(loss(changed, None), abs=1e-4)


def test_where_a_norm_follows_the_function_is_the_same() -> None:
    """The norm after a projection takes out what SubLN divided each token by."""
    model, rows = build(replace(VARIANTS["olmo2"], norm_eps=1e-20)), random_tokens(4, 32)
    changed, insertion = with_sub_norms(model, rows)
    with torch.no_grad():
        torch.testing.assert_close(changed.double()(rows).logits, model.double()(rows).logits, atol=1e-6, rtol=0)
    assert insertion.nats_after == pytest.approx(insertion.nats_before, abs=1e-5)


def test_fitted_gains_are_closer_than_a_start_of_one() -> None:
    model, rows = build(replace(TINY, num_kv_heads=2)), random_tokens(8, 32)
    changed, _ = with_sub_norms(model, rows)
    with torch.no_grad():
        expected, fitted = model(rows).logits, changed(rows).logits
        for name, parameter in changed.named_parameters():
            if "_sub_norm" in name:
                parameter.fill_(1.0)
        ones = changed(rows).logits
    assert (fitted - expected).std() < 0.5 * (ones - expected).std()


# Runs


def configured(shards: Path, tmp_path: Path, **changes: Any) -> Path:
    model = replace(VARIANTS["llama"], vocab_size=384, max_sequence_length=128)
    config = to_tree(ternary_config(shards, tmp_path / "run", replace(model, **changes)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write_variant(tmp_path / "hf", "llama", vocab_size=384)
    edit_config(tmp_path / "hf", max_position_embeddings=128)
    return tmp_path / "config.yaml"


def test_a_converted_run_begins_with_fitted_norms(shards: Path, tmp_path: Path) -> None:
    config = configured(shards, tmp_path, sub_norm=True)
    convert = ("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config, "--optimizer", "reset")
    with pytest.raises(CheckpointError, match=r"the checkpoint has no SubLN; .*checkpoint.sub_norm_sequences"):
        tritrain(*convert)
    printed = tritrain(*convert, "checkpoint.sub_norm_sequences=4")
    assert "SubLN was put in, with gains from 4 training sequences, on which the loss is" in printed
    model = load_model(tmp_path / "run", dtype=torch.float32).model
    gains = {name: value for name, value in model.named_parameters() if "_sub_norm" in name}
    assert len(gains) == 4
    for value in gains.values():
        assert value.unique().numel() == 1
        assert 0 < float(value[0]) != 0.03
    check_model(open_source(str(tmp_path / "run")), model.config)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    source = open_source(str(run))
    return {name: source.read("weight", name, 0, torch.Size(shape).numel()) for name, shape in source.shapes.items()}


def test_a_conversion_that_puts_norms_in_and_calibrates_is_one_after_the_other(shards: Path, tmp_path: Path) -> None:
    config = configured(shards, tmp_path, sub_norm=True)
    asked = ("--config", config, "--optimizer", "reset", "--phase", 1)
    put_in, calibrate = "checkpoint.sub_norm_sequences=4", ("--calibrate", 8)
    said = tritrain("convert", tmp_path / "hf", "--to", tmp_path / "both", *asked, *calibrate, put_in)
    assert "SubLN was put in, with gains from 4 training sequences" in said
    assert "The model is calibrated on 8 sequences" in said
    tritrain("convert", tmp_path / "hf", "--to", tmp_path / "first", *asked, put_in)
    tritrain("convert", tmp_path / "first", "--to", tmp_path / "then", *asked, *calibrate)
    both, then, first = (weights_of(tmp_path / name) for name in ("both", "then", "first"))
    assert both.keys() == then.keys()
    for name, weight in both.items():
        assert torch.equal(weight, then[name]), name
        assert torch.equal(weight, first[name]) != name.endswith("_proj.weight"), name


def test_what_cannot_have_norms_put_in_is_refused(shards: Path, tmp_path: Path) -> None:
    config = configured(shards, tmp_path, sub_norm=True)
    asked = "checkpoint.sub_norm_sequences=2"
    convert = ("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config, "--optimizer", "reset", asked)
    with pytest.raises(ConfigError, match=r"sub_norm_sequences: is set, but model.sub_norm is false"):
        tritrain(*convert, "model.sub_norm=false")
    with pytest.raises(ConfigError, match="has no weights to fit"):
        tritrain(*convert, "model.norm=layernorm-nonparametric")
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path / "hf", quantization_config=online)
    with pytest.raises(CheckpointError, match="is ternary; SubLN can be put into 16-bit weights alone"):
        tritrain(*convert)
    write_variant(tmp_path / "bitnet", "bitnet", vocab_size=384)
    with pytest.raises(CheckpointError, match="has SubLN already"):
        tritrain("convert", tmp_path / "bitnet", *convert[2:])


def test_sub_norms_that_no_shape_shows_are_noticed(tmp_path: Path) -> None:
    """OLMo's norms have no weights, so a run with SubLN has the same parameters as a folder without."""
    write_variant(tmp_path / "hf", "olmo")
    with pytest.raises(CheckpointError, match=r"model.sub_norm is true, and the checkpoint has no SubLN"):
        check_model(open_source(str(tmp_path / "hf")), replace(VARIANTS["olmo"], sub_norm=True))
