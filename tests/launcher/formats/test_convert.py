"""A conversion and a switch inside a run continue with the same bits; and nothing is converted that does not fit."""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import tritrain
from exports import ternary_config
from hf_folders import edit_config, write_variant
from models import VARIANTS
from ranks import CONTEXT, run_group
from runs import run
from tiny import tiny_config, tiny_tree
from tokenizer_files import write_bytes_tokenizer
from tokenizers import Tokenizer, models

from data.errors import DataError
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import KINDS, Source
from launcher.checkpoint.writer import CheckpointWriter
from launcher.commands import convert as convert_command
from launcher.config.file import load_config, to_tree
from launcher.errors import CheckpointError, ConfigError, UserError
from launcher.formats.deepspeed_universal import UniversalSource
from launcher.formats.hf_source import HuggingFaceSource
from launcher.formats.open import open_source
from launcher.inference.load import load_model
from launcher.run.metrics_log import read_metrics

SWITCHED: dict[str, Any] = {
    "keep": {"ramp": {"shape": "linear", "steps": 2}},
    "reset": {"optimizer": "reset", "schedule": "restart", "rewarm_tokens": 600},
    "keep-variance": {"optimizer": "keep-variance", "data": "restart", "ramp": {"shape": "tanh", "steps": 3}},
}


def phases(transition: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 4, "transition": transition}]


def trunk_and_switched(shards: str, out: str) -> None:
    """A 16-bit run of 8 steps with a checkpoint at 4, and one that switches there."""
    trunk = [{"precision": "16-bit", "steps": 8}]
    run(tiny_config(Path(shards), Path(out, "trunk"), phases=trunk, checkpoint={"interval_steps": 4}))
    run(tiny_config(Path(shards), Path(out, "keep"), phases=phases(SWITCHED["keep"])))


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_group(2, trunk_and_switched, str(shards), str(out))
    return out


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def train_converted(folders: list[str]) -> None:
    for folder in folders:
        assert run(load_config(Path(folder, "config.yaml"))) == "complete"


def losses(folder: Path, after: int) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > after]


def same_state(first: Path, second: Path) -> bool:
    a, b = CheckpointReader(first), CheckpointReader(second)
    return a.shapes == b.shapes and all(
        torch.equal(a.read(kind, name, 0, torch.Size(shape).numel()), b.read(kind, name, 0, torch.Size(shape).numel()))
        for name, shape in a.shapes.items()
        for kind in KINDS
    )


def train_switched_and_converted(shards: str, out: str, name: str) -> None:
    run(tiny_config(Path(shards), Path(out, "switched"), phases=phases(SWITCHED[name])))
    train_converted([f"{out}/converted", f"{out}/started"])


@pytest.mark.parametrize(
    "name", ["keep-variance", *(pytest.param(name, marks=pytest.mark.slow) for name in ("keep", "reset"))]
)
def test_a_converted_run_is_the_run_that_switched(runs: Path, shards: Path, tmp_path: Path, name: str) -> None:
    source, transition = runs / "trunk" / "checkpoints" / "step-00000004", SWITCHED[name]
    # The choice for the optimizer is given to the command, all else by the configuration.
    given = {key: value for key, value in transition.items() if key != "optimizer"}
    config = write_config(tmp_path / "given.yaml", tiny_tree(shards, tmp_path) | {"phases": phases(given)})
    said = tritrain("convert", source, "--to", tmp_path / "converted", "--config", config, "--optimizer", name)
    assert "before phase 1 (ternary)" in said
    (tmp_path / "started").mkdir()
    tree = tiny_tree(shards, tmp_path / "started") | {
        "phases": phases(transition),
        "checkpoint": {"start_from": str(source), "start_phase": 1},
    }
    write_config(tmp_path / "started" / "config.yaml", tree)
    run_group(2, train_switched_and_converted, str(shards), str(tmp_path), name)
    for kind in ("converted", "started"):
        assert losses(tmp_path / kind, 0) == losses(tmp_path / "switched", 4), kind
        newest = [complete_checkpoints(tmp_path / each / "checkpoints")[-1] for each in (kind, "switched")]
        assert same_state(*newest), kind


def test_one_checkpoint_seeds_many_runs_without_being_copied(runs: Path, shards: Path, tmp_path: Path) -> None:
    source = runs / "trunk" / "checkpoints" / "step-00000004"
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path))
    for name in ("one", "two"):
        tritrain("convert", source, "--to", tmp_path / name, "--config", config)
        made = tmp_path / name / "checkpoints" / "step-00000004"
        for path in source.glob("*.safetensors"):
            assert (made / path.name).samefile(path)
        provenance = CheckpointReader(made).manifest.provenance
        assert provenance is not None
        assert provenance["source"] == str(source)
        assert provenance["source_digest"] == json.loads((source / "manifest.json").read_text())["digest"]
        assert provenance["transition"]["optimizer"] == "keep"
        assert provenance["tritrain_version"]
    assert "sound" in tritrain("verify", tmp_path / "one", tmp_path / "two")


def test_a_tokenizer_of_hugging_face_keeps_its_end_of_documents(runs: Path, shards: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    tritrain("convert", runs / "trunk" / "checkpoints" / "step-00000004", "--format", "hf", "--to", hf)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(hf / "tokenizer.json"))
    (hf / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    config = write_config(tmp_path / "config.yaml", tiny_tree(tmp_path / "yet-to-be-prepared", tmp_path))
    tritrain("convert", hf, "--to", tmp_path / "run", "--config", config, "--optimizer", "reset")
    assert load_tokenizer(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]).end_of_document == 2


def test_a_tokenizer_that_cannot_be_read_is_not_replaced_by_another(shards: Path, tmp_path: Path) -> None:
    write_variant(tmp_path / "hf")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_tree(ternary_config(shards, tmp_path / "run", VARIANTS["llama"]))))
    command = ("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config, "--optimizer", "reset")
    write_bytes_tokenizer(tmp_path / "hf" / "tokenizer.json", "</s>")
    with pytest.raises(DataError, match=r"hf/tokenizer\.json: any of .* may end a document"):
        tritrain(*command)
    with pytest.raises(DataError, match=r"hf/tokenizer\.json: any of .* may end a document"):
        tritrain(*command, "--dry-run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "hf" / "tokenizer.json").unlink()
    tritrain(*command)
    [made] = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert (made / "tokenizer.model").read_bytes() == (shards / "tokenizer.model").read_bytes()


def test_a_source_is_opened_once(runs: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(convert_command, "open_source", lambda text: (opened.append(text), open_source(text))[1])
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path))
    source = runs / "trunk" / "checkpoints" / "step-00000004"
    tritrain("convert", source, "--to", tmp_path / "run", "--config", config)
    assert opened == [str(source)]


def test_where_no_phase_begins_at_the_checkpoint_that_is_said(runs: Path, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path))
    arguments = ("convert", runs / "trunk" / "checkpoints" / "step-00000004", "--to", tmp_path / "run", "--dry-run")
    said = tritrain(*arguments, "--config", config, "phases.0.steps=3")
    assert "is at step 4, and the phases begin at 0, 3. The run begins with the first of them: steps, schedule" in said
    assert "anew" not in tritrain(*arguments, "--config", config)


def test_no_option_of_a_conversion_is_left_out_silently(runs: Path, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path))
    for arguments, problem in (
        (("--format", "hf", "--optimizer", "reset"), "--optimizer reset: belongs to --format run"),
        (("--format", "universal", "--phase", 1), "--phase 1: belongs to --format run"),
        (("--format", "universal", "--dtype", "fp32"), "--dtype fp32: belongs to --format hf"),
        (("--config", config, "--dtype", "fp32"), "--dtype fp32: belongs to --format hf"),
        (("--format", "hf", "model.norm_eps=1"), "model.norm_eps=1: there is no configuration to override"),
        (("--config", config, "run.folder=there"), "run.folder: --to sets it"),
        (("--config", config, "checkpoint.start_from=there"), "checkpoint.start_from: SOURCE sets it"),
        (("--format", "hf", "--config", config, "model.num_heads=6", "model.num_kv_heads=2"), "model.num_heads is 6"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=re.escape(problem)):
            tritrain("convert", runs / "trunk", "--to", tmp_path / "made", *arguments)
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("folder", ["s3://bucket/made", "~/made"])
def test_a_target_is_the_folder_that_was_meant(runs: Path, tmp_path: Path, folder: str) -> None:
    with contextlib.chdir(tmp_path):
        for command in (
            ("convert", runs / "trunk", "--format", "hf", "--to", folder),
            ("export", runs / "trunk", "--format", "hf", "--to", folder),
            ("prepare", "python-stdlib", "--tokenizer", "bpe:300", "--out", folder),
        ):
            with pytest.raises(ConfigError, match="is a URL" if "://" in folder else "would be a folder named '~'"):
                tritrain(*command)
        assert not list(tmp_path.iterdir())


def test_every_command_wants_a_name_for_what_it_writes(runs: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for command in (
            ("convert", runs / "trunk", "--format", "hf", "--to"),
            ("export", runs / "trunk", "--format", "hf", "--to"),
            ("prepare", "python-stdlib", "--tokenizer", "bpe:300", "--out"),
            ("report", runs / "trunk", "--out"),
            ("init", "--size", "1M", "--gpus", "0", "--tokens", "1M", "--data", "data"),
        ):
            for name, problem in (("", "is empty"), ("~/made", "named '~'"), ("s3:/bucket/made", "named 's3:'")):
                with pytest.raises(ConfigError, match=problem):
                    tritrain(*command, name)
        assert not list(tmp_path.iterdir())


def test_a_new_run_takes_no_folder_with_other_files(runs: Path, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path / "unused"))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(runs / "trunk" / "checkpoints" / "step-00000004", checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder in ("checkpoint", "mine", "."):
        with pytest.raises(ConfigError, match=r"holds other files \(.*\); name a new folder"):
            tritrain("convert", checkpoint, "--to", tmp_path / folder, "--config", config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_conversion_that_fails_leaves_no_folder(
    runs: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path / "unused"))
    source = runs / "trunk" / "checkpoints" / "step-00000004"
    command = ("convert", source, "--to", tmp_path / "run", "--config", config)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for part, name in ((CheckpointWriter, "finish"), (os, "fsync")):  # the latter of the lock
        with monkeypatch.context() as patched:
            patched.setattr(part, name, full)
            with pytest.raises(CheckpointError, match=r"run.*No space left"):
                tritrain(*command)
        assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # as a killed conversion leaves it
    for name in ("lock", "config.yaml"):
        (tmp_path / "run" / name).write_text("" if name == "lock" else "tritrain_version: 0.1.0\n")
    tritrain(*command)
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_ternary_run_returns_to_16_bits(runs: Path, shards: Path, tmp_path: Path) -> None:
    there_and_back = [*phases(SWITCHED["keep"]), {"precision": "16-bit", "steps": 2}]
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path) | {"phases": there_and_back})
    said = tritrain("convert", runs / "keep", "--to", tmp_path / "back", "--config", config)
    assert "before phase 2 (16-bit)" in said
    run_group(1, train_converted, [str(tmp_path / "back")])
    first = read_metrics(tmp_path / "back" / "metrics.jsonl")[0]
    assert (first["precision"], first["validation/when"]) == ("16-bit", "start of phase")
    assert len(losses(tmp_path / "back", 8)) == 2


def test_out_to_hugging_face_and_in_again(runs: Path, shards: Path, tmp_path: Path) -> None:
    said = tritrain("convert", runs / "trunk", "--to", tmp_path / "hf", "--format", "hf", "--dtype", "fp32")
    assert "moments (exp_avg, exp_avg_sq) and steps are not carried" in said
    ours = CheckpointReader(complete_checkpoints(runs / "trunk" / "checkpoints")[-1])
    theirs = HuggingFaceSource(tmp_path / "hf")
    for name, shape in ours.shapes.items():
        length = torch.Size(shape).numel()
        assert torch.equal(ours.read("weight", name, 0, length), theirs.read("weight", name, 0, length))
    record = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert (record["source"], record["step"], record["source_digest"]) == ("tiny", 8, ours.manifest.digest)

    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path) | {"phases": phases({})[1:]})
    with pytest.raises(CheckpointError, match=r"no optimizer moments.*set it to reset"):
        tritrain("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config)
    reset = ("--config", config, "--optimizer", "reset")
    with pytest.raises(CheckpointError, match=r"model.rope_theta is 500.0, and 10000.0 in the checkpoint"):
        tritrain("convert", tmp_path / "hf", "model.rope_theta=500.0", "--to", tmp_path / "run", *reset)
    assert not (tmp_path / "run").exists()
    tritrain("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config, "--optimizer", "reset")
    run_group(2, train_converted, [str(tmp_path / "run")])
    assert len(losses(tmp_path / "run", 0)) == 4


def test_a_ternary_model_that_transformers_would_round_otherwise(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"weights gaussian: .*; export the latent weights \(--format hf --weights"
    ):
        tritrain("convert", runs / "keep", "--to", tmp_path / "hf", "--format", "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_is_rounded_while_it_computes_is_measured_like_that(shards: Path, tmp_path: Path) -> None:
    model = write_variant(tmp_path / "hf", "llama")
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path / "hf", quantization_config=online)
    tree = to_tree(ternary_config(shards, tmp_path / "run", model.config))
    config = write_config(tmp_path / "config.yaml", {**tree, "run": {"name": "tiny"}})
    tritrain("convert", tmp_path / "hf", "--to", tmp_path / "run", "--config", config, "--optimizer", "reset")
    logits = [
        load_model(tmp_path / name, dtype=torch.float32).model(torch.arange(9)[None]).logits for name in ("hf", "run")
    ]
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], model(torch.arange(9)[None]).logits, atol=0.01)


def convert_when_told(source: str, target: str, into: str, reads: Any, may_read: Any) -> None:
    """In a process of its own: convert, waiting at the first tensor that is read."""
    read = Source.read_finite

    def wait_and_read(*arguments: Any) -> Any:
        reads.set()
        may_read.wait(100)
        return read(*arguments)

    Source.read_finite = wait_and_read  # type: ignore[method-assign]
    tritrain("convert", source, "--to", target, "--format", into)


@pytest.mark.parametrize(("into", "reader"), [("hf", HuggingFaceSource), ("universal", UniversalSource)])
def test_two_conversions_to_one_target_at_once(runs: Path, tmp_path: Path, into: str, reader: Any) -> None:
    (tmp_path / "to.tmp").write_text("of the user")
    arguments, reads, may_read = (str(runs / "trunk"), str(tmp_path / "to"), into), CONTEXT.Event(), CONTEXT.Event()
    first = CONTEXT.Process(target=convert_when_told, args=(*arguments, reads, may_read))
    first.start()
    try:
        assert reads.wait(100)
        with pytest.raises(CheckpointError, match=rf"to: is being written by process {first.pid} on .*; wait, or"):
            tritrain("convert", runs / "trunk", "--to", tmp_path / "to", "--format", into)
    finally:
        may_read.set()
        first.join(100)
        first.kill()
    assert first.exitcode == 0
    assert len(reader(tmp_path / "to").shapes) == 20
    assert (tmp_path / "to" / "provenance.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["to", "to.tmp"]
    assert (tmp_path / "to.tmp").read_text() == "of the user"


def test_a_dry_run_says_what_happens_to_each_tensor_and_writes_nothing(
    runs: Path, shards: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path))
    arguments = ("convert", runs / "trunk" / "checkpoints" / "step-00000004", "--to", tmp_path / "run", "--dry-run")
    said = tritrain(*arguments, "--config", config, "--optimizer", "keep-variance")
    lines = {found[0]: line for line in said.splitlines() if (found := re.search(r"model\.[\w.]+", line))}
    assert len(lines) == 20
    assert "latent of ternary codes, gaussian" in lines["model.layers.0.mlp.up_proj.weight"]
    assert "51 x 36" in lines["model.layers.0.mlp.up_proj.weight"]
    assert "16-bit" in lines["model.embed_tokens.weight"]
    assert all("first cleared, second kept" in line for line in lines.values())
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_conversion_refuses(runs: Path, shards: Path, tmp_path: Path) -> None:
    trunk, ternary = runs / "trunk", runs / "keep"
    (tmp_path / "taken").mkdir()
    shutil.copytree(trunk / "checkpoints" / "step-00000008", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    other = tiny_tree(shards, tmp_path / "run")
    other["model"] |= {"norm_eps": 1e-3}
    config = write_config(tmp_path / "config.yaml", other)
    for source, to, *options in (
        (trunk, "taken", "hf"),
        (trunk, "taken", "universal"),
        (tmp_path / "damaged", "to", "hf"),
        (tmp_path / "damaged", "to", "universal"),
        (ternary, "to", "hf"),
        (trunk, "to", "hf", "--config", config),
    ):
        command = ("convert", source, "--to", tmp_path / to, "--format", *options)
        said = []
        for arguments in (command, (*command, "--dry-run")):
            with pytest.raises(UserError) as caught:
                tritrain(*arguments)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert not (tmp_path / "to").exists()


def test_a_run_s_own_configuration_describes_its_model_whatever_a_run_may_start_with_now(
    runs: Path, tmp_path: Path
) -> None:
    old = yaml.safe_load((runs / "trunk" / "config.yaml").read_text())
    old["evaluation"] |= {"task_data": "s3://me:secret@bucket/tasks"}  # which an earlier version took
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    command = ("convert", runs / "trunk", "--to", tmp_path / "to", "--config", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"evaluation\.task_data"):
        tritrain(*command, "--format", "run")
    tritrain(*command, "--format", "hf", "--dry-run")
    assert tritrain("explain", "model.hidden_size", "--config", tmp_path / "config.yaml").endswith("hidden_size: 36\n")
    said = tritrain("explain", "evaluation.task_data", "--config", tmp_path / "config.yaml")
    assert "bucket/tasks" in said
    assert "secret" not in said
    del old["tritrain_version"]  # as a person writes a configuration, to start a run with
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    for refused in ((*command, "--format", "hf"), ("explain", "run.seed", "--config", tmp_path / "config.yaml")):
        with pytest.raises(ConfigError, match=r"evaluation\.task_data"):
            tritrain(*refused)


def test_what_does_not_fit_is_refused(runs: Path, shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(shards, tmp_path)
    config = write_config(tmp_path / "config.yaml", tree)
    source = runs / "trunk" / "checkpoints" / "step-00000004"
    arguments = ("--to", tmp_path / "run", "--config", config)
    with pytest.raises(CheckpointError, match="is at step 8 with 2048 tokens, but phase 1 begins at step 4 with 1024"):
        tritrain("convert", runs / "trunk", *arguments, "--phase", 1)
    with pytest.raises(CheckpointError, match=r"36, 51. in the checkpoint, .36, 60. in the model"):
        tritrain("convert", source, "model.intermediate_size=60", *arguments)
    with pytest.raises(CheckpointError, match=r"model.norm_eps is 0.001, and 1e-05 in the checkpoint"):
        tritrain("convert", source, "model.norm_eps=1e-3", *arguments)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        tritrain("convert", tmp_path / "nothing", *arguments)
    with pytest.raises(CheckpointError, match=r"config.yaml: is a file, and checkpoints are folders"):
        tritrain("convert", config, *arguments)
    with pytest.raises(CheckpointError, match="nothing: there is no such folder"):
        tritrain("verify", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"not a checkpoint of a known kind"):
        tritrain("convert", tmp_path / "empty", *arguments)
    tritrain("convert", source, *arguments)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        tritrain("convert", source, *arguments)


def test_a_run_that_is_to_go_on_after_a_ternary_phase_is_measured_as_what_it_was_made_of(
    runs: Path, shards: Path, tmp_path: Path
) -> None:
    source = runs / "keep" / "checkpoints" / "step-00000008"
    three = [*phases({}), {"precision": "16-bit", "steps": 2}]
    config = write_config(tmp_path / "config.yaml", tiny_tree(shards, tmp_path) | {"phases": three})
    assert "before phase 2 (16-bit)" in tritrain("convert", source, "--to", tmp_path / "run", "--config", config)
    (tmp_path / "text.txt").write_text("a text to be measured\n" * 20)
    measured = [
        re.findall(r"bits per byte +([\d.]+)", tritrain("perplexity", model, tmp_path / "text.txt"))
        for model in (source, tmp_path / "run")
    ]
    assert measured[0]
    assert measured[0] == measured[1]
