"""`tritrain init`: every configuration that it writes is one that `tritrain plan` accepts, of the size asked for."""

import sys

import pytest
import torch
from command import tritrain
from tiny import SEQUENCE_LENGTH

from launcher.commands.init import InitOptions, aligned, parse_count, run_name, write_configuration
from launcher.config.file import load_config
from launcher.errors import ConfigError
from launcher.plan.exports import exports_of
from launcher.plan.gpus import GPUS
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from model.transformer import Transformer

SIZES = {
    "10M": 10e6, "15M": 15e6, "20M": 20e6, "35M": 35e6, "60M": 60e6, "125M": 125e6, "350M": 350e6, "760M": 760e6,
    "1B": 1e9, "1.3B": 1.3e9, "2.7B": 2.7e9, "7B": 7e9, "13B": 13e9,
}  # fmt: skip
NUM_GPUS = (1, 2, 6, 8, 64, 512)


def write(to, *options):
    """The configuration that the command writes, with its text."""
    tritrain("init", to, *options)
    return load_config(to), to.read_text()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_on_every_number_of_gpus_is_a_plan_that_fits(tmp_path, size):
    for index, num_gpus in enumerate(NUM_GPUS):
        engine = ("fsdp2", "deepspeed")[(index + len(size)) % 2]
        options = ("--size", size, "--gpus", num_gpus, "--gpu", "A100", "--data", "shards/none", "--engine", engine)
        config, _ = write(tmp_path / f"{num_gpus}.yaml", *options)
        plan = make_plan(config, num_gpus)
        assert sum(memory_bytes_per_rank(plan).values()) < 0.9 * 2**30 * GPUS["NVIDIA A100"].memory_gib
        assert config.engine.name == engine
        assert plan.total_steps * plan.tokens_at(0) >= 20 * SIZES[size]
        assert plan.phases[0].end >= config.schedule.warmup_steps, "the switch falls into the warm-up"
        assert config.checkpoint.interval_steps < plan.total_steps
        assert [each.name for each in exports_of(plan) if each.problems] == ["mlx"]  # it has no SubLN
    with torch.device("meta"):
        built = Transformer(config.model)
    assert sum(each.numel() for each in built.parameters()) == pytest.approx(SIZES[size], rel=0.05)


def test_what_is_not_said_about_the_data_follows_from_them(tmp_path, shards):
    prepared, _ = write(tmp_path / "a.yaml", "--size", "10M", "--gpus", 1, "--data", shards)
    assert prepared.data.sources[0].path == str(shards)
    assert (prepared.data.sequence_length, prepared.model.vocab_size) == (SEQUENCE_LENGTH, 384)  # 320, rounded up
    text, _ = write(tmp_path / "b.yaml", "--size", "10M", "--gpus", 1, "--data", shards.parent / "corpus.jsonl")
    assert text.data.prepare.inputs == (str(shards.parent / "corpus.jsonl"),)
    assert text.data.prepare.tokenizer == f"bpe:{text.model.vocab_size}"
    hub, _ = write(tmp_path / "c.yaml", "--size", "10M", "--gpus", 1, "--data", "hf:owner/name:train")
    assert (hub.data.sources[0].path, hub.data.prepare.inputs) == (
        "runs/data/owner-name-train",
        ("hf:owner/name:train",),
    )
    none, written = write(tmp_path / "d.yaml", "--size", "10M", "--gpus", 1, "--data", "later")
    assert none.data.prepare is None
    command = f"tritrain prepare TEXT --out later --tokenizer bpe:{none.model.vocab_size} --sequence-length 512"
    assert command in written


def test_gpus_need_no_dtype(tmp_path):
    config, written = write(tmp_path / "a.yaml", "--size", "10M", "--gpus", 1, "--tokens", "20M", "--data", "none")
    assert config.training.compute_dtype == "auto"
    assert "compute_dtype" not in written


def test_a_cpu_computes_in_fp32(tmp_path):
    config, written = write(tmp_path / "a.yaml", "--size", "10M", "--gpus", 0, "--tokens", "20M", "--data", "none")
    assert config.training.compute_dtype == "fp32"
    assert written.startswith("# 10M parameters, 20M tokens, on a CPU. Written by `tritrain init`.\n")
    assert make_plan(config, 1).most_micro_batches


def test_every_choice_has_a_reason(tmp_path):
    _, written = write(tmp_path / "a.yaml", "--size", "1B", "--gpus", 8, "--data", "none")
    for key in (
        "sub_norm",
        "z_loss",
        "total_tokens",
        "learning_rate",
        "warmup_steps",
        "optimizer: keep",
        "interval_steps",
    ):
        assert any(key in line and " # " in line for line in written.splitlines()), key
    assert "open question" in written
    assert max(map(len, written.splitlines())) <= 130


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.yaml: exists, and nothing is overwritten; name another file"):
        write(tmp_path / "mine.yaml", "--size", "10M", "--gpus", 1, "--data", "x")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


REFUSALS = {
    "--gpus, --data: missing, and there is no terminal to ask on; give all of them": ("--size", "10M"),
    "--size lots: is no count; 350M or 7B would be one": ("--size", "lots", "--gpus", 1, "--data", "x"),
    "--gpu V100 is not known; choose one of": ("--size", "10M", "--gpus", 1, "--data", "x", "--gpu", "V100"),
    "--size: no model of 100,000 parameters has widths": ("--size", "100k", "--gpus", 1, "--data", "x"),
    "--tokens: 1,000 are 2 steps": ("--size", "10M", "--gpus", 1, "--data", "x", "--tokens", "1000"),
    "--data: hf:name: write a data set as": ("--size", "10M", "--gpus", 1, "--data", "hf:name"),
    "--data s3://bucket/a: is a URL": ("--size", "10M", "--gpus", 1, "--data", "s3://bucket/a"),
    "--size: 13,000,000,000 parameters need": ("--size", "13B", "--gpus", 0, "--data", "x"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, message):
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "new.yaml", *REFUSALS[message])
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_terminal_is_asked(tmp_path, monkeypatch):
    answers = iter(["20M", "30M", 2, "shards/x", "deepspeed"])
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    nothing = InitOptions(size=None, tokens=None, gpus=None, gpu=None, data=None, engine=None)
    write_configuration(tmp_path / "new.yaml", nothing, Console(silent=True))
    config = load_config(tmp_path / "new.yaml")
    assert (config.training.total_tokens, config.engine.name) == (30_000_000, "deepspeed")
    assert config.data.sources[0].path == "shards/x"


def test_counts():
    for text, count in {"350M": 350e6, "7B": 7e9, "1.3b": 1.3e9, "2e9": 2e9, "1_000": 1000, "500 k": 5e5}.items():
        assert parse_count(text, "--size") == count
    for text in ("", "-1", "M", "0", "1.2.3", "7X", "1e999", "1e20", "9" * 400):
        with pytest.raises(ConfigError):
            parse_count(text, "--size")


def test_names_and_comments(tmp_path):
    assert [run_name(tmp_path / name) for name in ("my run.yaml", "-.yaml", "a.b.yaml")] == ["my-run", "run", "a.b"]
    assert aligned("  a: 1 # why") == f"{'  a: 1':<33} # why"
    assert aligned("  # about") == "  # about"
    assert aligned('  a: "b # c"') == '  a: "b # c"'
    code, comment = r'  a: "b\" # c"', ' # why "d" # e'
    assert aligned(code + comment) == f"{code:<33}{comment}"
