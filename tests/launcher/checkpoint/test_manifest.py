"""A manifest is one type: it is read as it was written, what is missing or wrong is named, and older ones load."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exports import ternary_config, write_checkpoint
from models import VARIANTS, build
from variants import manifest

from launcher.checkpoint.manifest import (
    FileRecord,
    Manifest,
    Precision,
    manifest_digest,
    manifest_of,
)
from launcher.checkpoint.reader import CheckpointReader, DamageError
from launcher.errors import CheckpointError
from launcher.formats.open import precision_of
from quant.config import PRESETS, QuantConfig

FILES = {
    name: FileRecord(size=1, digest="0" * 32)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "tokenizer.json", "config.yaml")
}
ON_A_RAMP = Precision(
    quantization=PRESETS["nielsen-2025"], weight_strengths=(0.1, 1 / 3), activation_strengths=(0.0, 1.0)
)
GUARD = {"windows": {"losses": {"values": [2.5, 0.1], "count": 7}}, "skipped": 1, "loss_before": 0.3}


def tree_of(manifest: Manifest) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(manifest.sealed(FILES))
    return tree


@pytest.mark.parametrize(
    "written",
    [
        manifest(3, milestone=True),
        replace(manifest(3), averaged_tokens=768),
        replace(manifest(3), precision=ON_A_RAMP, spikes=GUARD, teacher="a" * 32, data_fingerprint="b"),
        replace(
            manifest(3),
            precision=replace(ON_A_RAMP, rounding="softmax"),
            progress=replace(manifest(3).progress, block_order=(1, 0)),
        ),
        replace(manifest(0), world_size=None, engine=None, zero_stage=None, provenance={"source": {"nested": [1]}}),
    ],
)
def test_what_is_written_is_read(written: Manifest) -> None:
    tree = tree_of(written)
    assert tree["digest"] == manifest_digest(tree)
    assert manifest_of(tree) == replace(written, files=FILES, digest=tree["digest"])
    assert manifest_of(tree | {"of a later program": 1}) == manifest_of(tree)


def test_nothing_may_be_left_out() -> None:
    tree = tree_of(manifest(3))
    filled_in = {"format_version", "files", "digest", "averaged_tokens"}
    assert len(tree.keys() - filled_in) == 13
    for key in tree.keys() - filled_in:
        with pytest.raises(ValueError, match=rf"its '{key}': .*"):
            manifest_of({other: value for other, value in tree.items() if other != key})
    earlier = {key: value for key, value in tree.items() if key != "averaged_tokens"}
    assert manifest_of(earlier) == manifest_of(tree), "weights were not averaged"
    with pytest.raises(ValueError, match=r"its 'files' lacks config\.yaml"):
        manifest_of({key: value for key, value in tree.items() if key != "files"})
    with pytest.raises(ValueError, match="or files of tensors"):
        manifest_of(tree | {"files": {"config.yaml": {"size": 1, "digest": "0" * 32}}})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"step": 2}, "its 'step' is 2, and in 'progress' 3"),
        ({"tokens": -1}, "its 'tokens' is not a count"),
        ({"averaged_tokens": -1}, "its 'averaged_tokens' is not a count"),
        ({"averaged_tokens": "all"}, "its 'averaged_tokens': Input should be a valid integer"),
        ({"tokens": 1.0}, "its 'tokens': Input should be a valid integer"),
        ({"milestone": 1}, "its 'milestone': Input should be a valid boolean"),
        ({"progress": {"step": 3, "phase": -2, "skipped_steps": 0}}, "its 'progress': is not a count of steps, the"),
        ({"progress": {"step": 3, "phase": 0}}, "its 'progress.skipped_steps': Field required"),
        (
            {"progress": {"step": 3, "phase": 0, "skipped_steps": 0, "block_order": [0, 0]}},
            "its 'progress': has an order of blocks that does not name each of them once",
        ),
        (
            {"progress": {"step": 3, "phase": 0, "skipped_steps": 0, "block_order": [2, 1, 0]}},
            "its 'progress' has an order of 3 blocks, and its 'precision' is not of 3",
        ),
        ({"spikes": {"skipped": 1}}, "its 'spikes' is not the state of the guards"),
        ({"files": {"../a": {"size": 1, "digest": "0" * 32}}}, "its 'files' names '../a', which is not a file"),
        ({"files": {"config.yaml": {"size": 1, "digest": "x"}}}, "'files.config.yaml': is not the size and the digest"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        manifest_of(tree_of(manifest(3)) | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight_strengths": [0.5]}, "'precision': does not have a strength of weights and one of activations"),
        ({"weight_strengths": []}, "'precision': does not have a strength"),
        ({"weight_strengths": [0.5, 1.5]}, "'precision': has a strength outside of 0 to 1"),
        ({"weight_strengths": [0.5, float("nan")]}, "weight_strengths.1': Input should be a finite number"),
        ({"rounding": "stochastic"}, "rounding': Input should be 'blend' or 'softmax'"),
        ({"quantization": None}, "'precision': has strengths without a quantization"),
        ({"quantization": {"levels": "quaternary"}}, "quantization.levels': Input should be 'binary', 'ternary'"),
        (
            {"quantization": {"levels": "int4", "weights": "absmean"}},
            "precision.quantization': {'weights': 'is absmean; for int4 weights choose gaussian, absmax",
        ),
        ({"quantization": {"no_such_key": 1}}, "quantization.no_such_key'"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(change: dict[str, Any], complaint: str) -> None:
    tree = tree_of(replace(manifest(3), precision=ON_A_RAMP))
    tree["precision"] |= change
    with pytest.raises(ValueError, match=complaint):
        manifest_of(tree)


def test_a_manifest_without_rounding_and_order_is_of_a_blend() -> None:
    tree = tree_of(replace(manifest(3), precision=ON_A_RAMP))
    del tree["precision"]["rounding"], tree["progress"]["block_order"]
    assert manifest_of(tree).precision == ON_A_RAMP
    assert manifest_of(tree).progress.block_order is None


def test_the_strength_is_that_of_the_least_quantized_block_and_operand() -> None:
    assert ON_A_RAMP.strength == 0.0
    weights_alone = QuantConfig(activations="none")
    assert replace(ON_A_RAMP, quantization=weights_alone).strength == 0.1


# As training and `tritrain convert` wrote them before version 2.
OLDER = {
    "trained": """{"format_version": 1, "milestone": false, "has_moments": true, "step": 3, "tokens": 768,
        "progress": {"step": 3, "phase": 0, "skipped_steps": 1}, "spikes": {"windows": {}, "skipped": 0,
        "loss_before": null}, "data_fingerprint": "f", "teacher": null, "world_size": 2, "engine": "fsdp2",
        "zero_stage": 2, "files": {"rank-00000.safetensors": {"size": 1, "digest": "00000000000000000000000000000000"},
        "config.yaml": {"size": 1, "digest": "00000000000000000000000000000000"}}, "digest": "d"}""",
    "converted": """{"format_version": 1, "milestone": true, "has_moments": false, "step": 0, "tokens": 0,
        "progress": {"step": 0, "phase": -1, "skipped_steps": 0}, "data_fingerprint": null,
        "provenance": {"source": "hf"},
        "files": {"rank-00000.safetensors": {"size": 1, "digest": "00000000000000000000000000000000"},
        "config.yaml": {"size": 1, "digest": "00000000000000000000000000000000"}}, "digest": "d"}""",
}


def test_manifests_of_version_1_still_load() -> None:
    trained, converted = (manifest_of(json.loads(text)) for text in OLDER.values())
    assert (trained.world_size, trained.engine, trained.data_fingerprint) == (2, "fsdp2", "f")
    assert trained.progress.skipped_steps == 1
    assert (converted.world_size, converted.spikes, converted.provenance) == (None, None, {"source": "hf"})
    assert converted.progress.phase == -1
    assert trained.precision is converted.precision is None


def test_a_manifest_of_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    config = ternary_config(shards, tmp_path / "run", VARIANTS["llama"])
    folder = write_checkpoint(config, build(config.model), step=8, phase=1)
    tree = json.loads((folder / "manifest.json").read_text())

    def rewrite() -> CheckpointReader:
        (folder / "manifest.json").write_text(json.dumps(tree | {"digest": manifest_digest(tree)}))
        return CheckpointReader(folder)

    assert precision_of(rewrite()).strength == 1
    tree["precision"] |= {"weight_strengths": [1.0] * 3, "activation_strengths": [1.0] * 3}
    with pytest.raises(CheckpointError, match=r"manifest\.json does not fit config\.yaml"):
        precision_of(rewrite())
    tree["precision"]["weight_strengths"] = [1.0]
    with pytest.raises(DamageError, match=r"manifest\.json: its 'precision': does not have a strength"):
        rewrite()
