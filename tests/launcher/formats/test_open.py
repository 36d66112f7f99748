"""What is opened: checkpoints of earlier versions, and folders that hold several kinds."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from command import outcome
from exports import model_tree, write_checkpoint
from hf_folders import write_variant
from models import VARIANTS, build
from ranks import run_group
from runs import run
from tiny import SEQUENCE_LENGTH, tiny_config, tiny_tree, write_corpus
from tokenizer_files import write_bytes_tokenizer

from data.config import PrepareConfig
from data.shards import prepare
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.file import load_config, parse_config, to_tree
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.deepspeed_universal import UniversalSource
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.open import config_of, open_source
from launcher.formats.opened import open_exportable
from launcher.inference.load import load_model
from launcher.plan.course import make_course
from launcher.plan.plan import make_plan
from launcher.report.run import open_run
from launcher.run.changes import changes, course_of
from launcher.run.folder import RunFolder, holds_run

MODEL = {**model_tree(VARIANTS["llama"]), "max_sequence_length": 128}
SHORTER = {
    "fractions": ("fraction: 0.2", "fraction: 0.6", {"total_steps": 10}, "the fractions add up to 0.8, not to 1"),
    "mixed": ("steps: 2", "fraction: 0.6", {"total_steps": 10}, "phases: have 8 steps together, which are not the 10"),
}


def stored(shards: Path, folder: Path, first: str, second: str, training: dict[str, Any]) -> Config:
    tree = tiny_tree(shards, folder)
    lengths = [yaml.safe_load(length) for length in (first, second)]
    phases = [{"precision": kind} | length for kind, length in zip(("16-bit", "ternary"), lengths, strict=True)]
    tree |= {"model": MODEL, "training": tree["training"] | training, "phases": phases}
    return parse_config(tree, stored=True)


@pytest.mark.parametrize(("first", "second", "training", "said"), SHORTER.values(), ids=SHORTER)
def test_a_run_whose_phases_did_not_make_the_whole_is_read_and_not_started(
    shards: Path, tmp_path: Path, first: str, second: str, training: dict[str, Any], said: str
) -> None:
    config = stored(shards, tmp_path / "run", first, second, training)
    write_checkpoint(config, build(config.model), step=8, phase=1)
    made = tmp_path / "run"
    (made / "state.json").write_text('{"status": "complete"}')
    reader = open_source(str(made))
    assert isinstance(reader, CheckpointReader)
    assert config_of(reader) == config == open_run(made).config
    assert [phase.end for phase in make_course(config).phases] == [2, 8]
    assert load_model(made).config == config.model
    assert open_exportable(str(made), ternary=True).run == made
    assert holds_run(made, config)
    tree = to_tree(config)
    assert changes(tree, config) == []
    assert course_of(tree) == make_course(config)
    with pytest.raises(ConfigError, match=f"{said}.*write fraction: rest for one"):
        make_plan(load_config(made / "config.yaml"), 1)


def pointed(folder: Path, pointer: str, tag: str = "global_step7") -> Path:
    (folder / pointer).write_text(tag)
    return folder


@pytest.mark.parametrize("pointer", ["latest", "latest_universal"])
def test_a_pointer_to_a_folder_that_was_removed_hides_no_other_weights(tmp_path: Path, pointer: str) -> None:
    model = write_variant(tmp_path / "hf")
    source = open_source(str(pointed(tmp_path / "hf", pointer)))
    assert isinstance(source, HuggingFaceSource)
    name, weight = next(iter(model.named_parameters()))
    assert torch.equal(source.read("weight", name, 0, weight.numel()), weight.detach().flatten())
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{pointer} names 'global_step7', but there is no such folder beside it"):
        open_source(str(tmp_path / "hf"))


@pytest.mark.parametrize(("pointer", "kind"), [("latest", DeepSpeedSource), ("latest_universal", UniversalSource)])
def test_where_the_part_of_deepspeed_cannot_be_read_the_other_is_named(
    tmp_path: Path, pointer: str, kind: type
) -> None:
    write_variant(tmp_path / "hf")
    pointed(tmp_path / "hf", pointer)
    (tmp_path / "hf" / "global_step7").mkdir()
    with pytest.raises(CheckpointError) as alone:
        kind(tmp_path / "hf")
    advice = f"\n{tmp_path / 'hf'} also holds weights of Hugging Face: to take those, copy its config.json, safetensors"
    with pytest.raises(CheckpointError, match="^" + re.escape(str(alone.value) + advice)):
        open_source(str(tmp_path / "hf"))


def test_a_checkpoint_of_an_earlier_version_keeps_the_token_that_ended_its_documents(
    shards: Path, tmp_path: Path
) -> None:
    file = write_bytes_tokenizer(tmp_path / "tokenizer.json", "</s>")
    config = stored(shards, tmp_path / "run", "steps: 4", "steps: 4", {})
    checkpoint = write_checkpoint(config, build(config.model), step=8, phase=1, tokenizer=file)
    opened = open_exportable(str(checkpoint), ternary=True)
    assert opened.tokenizer == checkpoint / "tokenizer.json"
    tokenizer = load_tokenizer(opened.tokenizer)
    assert tokenizer.name_of(tokenizer.end_of_document) == "</s>"


def train_on(shards: str, folder: str) -> None:
    run(
        tiny_config(
            Path(shards), Path(folder), phases=[{"precision": "16-bit", "steps": 1}], schedule={"warmup_steps": 0}
        )
    )


def test_a_run_on_data_of_an_earlier_version_keeps_the_token_of_their_manifest(tmp_path: Path) -> None:
    file = write_bytes_tokenizer(tmp_path / "tokenizer.json", "</s>")
    corpus = write_corpus(tmp_path / "corpus.jsonl", 20)
    data = tmp_path / "data"
    prepare(
        PrepareConfig(
            inputs=(str(corpus),), tokenizer=str(file), end_of_document="<|endoftext|>", validation_fraction=0.2
        ),
        SEQUENCE_LENGTH,
        data,
    )
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(file, data / "tokenizer.json")  # without a mark
    run_group(1, train_on, str(data), str(tmp_path / "run"))
    [checkpoint] = complete_checkpoints(tmp_path / "run" / "checkpoints")
    for folder in (tmp_path / "run", checkpoint):
        alone = shutil.copy(folder / "tokenizer.json", tmp_path / "alone.json")
        tokenizer = load_tokenizer(alone)
        assert tokenizer.name_of(tokenizer.end_of_document) == "<|endoftext|>"


def test_a_remote_folder_s_tokenizer_comes_with_the_files_that_name_its_token(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    write_variant(tmp_path / "hf")
    write_bytes_tokenizer(tmp_path / "hf" / "tokenizer.json", "</s>")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for path in (tmp_path / "hf").iterdir():
        store.pipe(f"/remote-hf/{path.name}", path.read_bytes())
    opened = open_exportable("memory://remote-hf", ternary=False)
    assert opened.tokenizer is not None
    tokenizer = load_tokenizer(opened.tokenizer)
    assert tokenizer.name_of(tokenizer.end_of_document) == "</s>"


def test_what_holds_no_model_is_named_with_what_to_name_instead(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(shards, tmp_path / "study" / "arms" / "a-seed17")
    RunFolder(config).prepare([4, 4])
    for name in ("study.yaml", "results.json"):
        (tmp_path / "study" / name).write_text("{}")
    (tmp_path / "data").symlink_to(shards)
    instead = {
        "data": "data is prepared data (of `tritrain prepare`), not a model; name a run, a checkpoint or an export",
        "study": "study is a study, not a model; name one of its runs, which are in study/arms",
        "study/arms": "study/arms holds runs, and is no model; name one of them, such as study/arms/a-seed17",
        "study/arms/a-seed17": "study/arms/a-seed17 is a run without a complete checkpoint; where checkpoint.folder "
        "puts them elsewhere, name that folder",
    }
    for folder, said in instead.items():
        for opening in (open_source, load_model):
            with pytest.raises(CheckpointError) as caught:
                opening(folder)
            assert str(caught.value) == said
        assert outcome("verify", folder) == (2, "", f"{said}\n")
