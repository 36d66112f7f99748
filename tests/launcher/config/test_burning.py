"""Small inputs that stand for endless work: each ends in an error, or in a plan, at once."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from models import VARIANTS
from tiny import tiny_tree

from data.errors import DataError
from data.tokenizer import load_tokenizer
from eval.tasks import rows_of_file
from launcher.config.file import MAX_YAML_DEPTH, apply_override, flat_lines, load_config, parse_config, parse_yaml
from launcher.config.rules import divisors
from launcher.errors import CheckpointError, ConfigError, LogError
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.hf_source import HuggingFaceSource
from launcher.plan.plan import make_plan
from launcher.plan.table import show_plan
from launcher.process.console import Console
from launcher.report.status import status_of
from launcher.report.summary import summarize
from model.hf import config_to_hf

SECONDS = 2.0
"""Of this process, which a busy machine does not lengthen by as much as those of a clock; most take a tenth."""


@contextmanager
def at_once() -> Iterator[None]:
    gc.freeze()  # what the tests before have left would be looked through again and again
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < SECONDS
    finally:
        gc.unfreeze()


def chained(first: str, link: Callable[[str], str], length: int) -> str:
    names = [f"n{number}" for number in range(length)]
    lines = [f"{name}: &{name} {link(before)}" for before, name in pairwise(names)]
    return "\n".join([f"n0: &n0 {first}", *lines])


BOMBS = {
    "lists of aliases": chained("[x, x]", lambda name: f"[{', '.join([f'*{name}'] * 9)}]", 30),
    "mappings of aliases": chained("{x: 1}", lambda name: f"{{p: *{name}, q: *{name}}}", 60),
    "merged aliases": chained("{x: 1}", lambda name: f"{{<<: [*{name}, *{name}, *{name}]}}", 30),
    "itself in a list": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: [*a, *a]}",
    "nested lists": "[" * 20_000,
    "nested mappings": "{a: " * 20_000,
    "nested items": "- " * 20_000,
    "nested keys": "? " * 20_000,
    "nested and closed": "[" * 500 + "]" * 500,
    "many keys": "\n".join(f"k{number}: 1" for number in range(15_000)),
    "many items": f"[{'1,' * 90_000}]",
    "much space": " " * 10**7 + "x: 1",
    "a long word": "x" * 10**7,
    "a huge integer": "a: " + "9" * 150_000,
    "an integer of 4000 digits": "a: " + "9" * 4000,
    "an integer of 65 bits": f"a: {2**64}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_grows(bomb: str, tmp_path: Path) -> None:
    with at_once(), pytest.raises(ConfigError) as caught:
        parse_yaml(BOMBS[bomb], "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert len(str(caught.value)) < 1000
    assert "set_int_max_str_digits" not in str(caught.value)
    (tmp_path / "x.yaml").write_text(BOMBS[bomb])
    with at_once(), pytest.raises(ConfigError, match=r"x\.yaml: "):
        load_config(tmp_path / "x.yaml")
    with at_once(), pytest.raises(ConfigError):
        apply_override({}, f"a.b={BOMBS[bomb]}")


def test_digits_that_are_no_number_are_no_work() -> None:
    digits = "1" * 150_000
    with at_once():
        assert parse_yaml(f"a: {digits}x\nb: 1_000\nc: 1.5e3\nd: .5\ne: 1.\nf: 0x10", "x") == {
            "a": f"{digits}x", "b": 1000, "c": 1500.0, "d": 0.5, "e": 1.0, "f": "0x10",
        }  # fmt: skip


def test_what_people_write_is_read() -> None:
    text = "base: &base {a: 1, b: [2, 3]}\none: [*base, *base]\ntwo: *base\nthree: *base"
    assert parse_yaml(text, "x") == yaml.safe_load(text)
    nested = "[" * (MAX_YAML_DEPTH - 1) + "1" + "]" * (MAX_YAML_DEPTH - 1)
    assert parse_yaml(nested, "x") == yaml.safe_load(nested)
    with pytest.raises(ConfigError, match="the key 'a' appears twice"):
        parse_yaml("a: 1\na: 2", "x")
    assert parse_yaml(f"a: {2**63 - 1}\nb: {-(2**63)}", "x") == {"a": 2**63 - 1, "b": -(2**63)}


def test_the_text_of_dev_zero_is_not_read_for_ever() -> None:
    with at_once(), pytest.raises(ConfigError, match="/dev/zero: has more than"):
        load_config(Path("/dev/zero"))


@pytest.mark.parametrize(
    "override", [".".join("a" * 20_000) + "=1", f"data.sources.{'9' * 5000}.path=x", f"data.sources.{10**18}.path=x"]
)
def test_overrides_that_lead_nowhere(override: str) -> None:
    with at_once(), pytest.raises(ConfigError):
        apply_override(tiny_tree(Path("/shards"), Path("/run")), override)


NUMBERS = (10**9, 10**15, 10**18, 999_999_999_989, 2**63 - 1)
TREE = tiny_tree(Path("/shards"), Path("/run"))
TREE["training"]["batch_warmup"] = [{"sequences": 4, "until_tokens": 300}]
TREE["training"]["sequence_warmup"] = [{"length": 8, "until_tokens": 300}]
TREE["phases"][1]["transition"] = {"ramp": {"steps": 2, "shape": "staircase", "stairs": 2}}
KEYS = [
    *(key for key, _, value in (line.partition(": ") for line in flat_lines(TREE)) if value.strip("-").isdigit()),
    "training.total_steps", "training.global_batch_tokens", "schedule.horizon_steps", "phases.1.tokens",
    "phases.1.quantization.group_size", "data.workers", "data.canonical_nodes", "checkpoint.interval_steps",
    "evaluation.sample_tokens", "engine.replicas", "model.num_kv_heads", "model.head_dim", "model.loss_chunk_tokens",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_huge_numbers(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in NUMBERS:
        tree = json.loads(json.dumps(TREE))
        apply_override(tree, f"{key}={number}")
        with at_once():
            try:
                plan = make_plan(parse_config(tree), 1)
            except ConfigError as error:
                assert len(str(error)) < 3000  # noqa: PT017
                continue
            show_plan(plan, Console(silent=False), as_json=False, gpu=None, utilization=0.4, missing=())
            for step in (0, plan.total_steps // 2, plan.total_steps - 1):
                plan.sizes_at(step)
                plan.strengths_at(step)
                plan.first_sequence_at(step)


@pytest.mark.parametrize("num_ranks", NUMBERS)
def test_huge_numbers_of_ranks(num_ranks: int) -> None:
    config = parse_config(tiny_tree(Path("/shards"), Path("/run")))
    with at_once(), pytest.raises(ConfigError, match=r"global_batch_sequences: 8 sequences do not divide"):
        make_plan(config, num_ranks)


def test_divisors() -> None:
    for number in range(1, 400):
        expected = [str(n) for n in range(1, number + 1) if number % n == 0]
        assert divisors(number) == ", ".join(expected)
    with at_once():
        many = divisors(2**20 * 3**10).split(", ")
        assert (many[:4], many[-2:], len(many)) == (["1", "2", "3", "4"], ["...", str(2**20 * 3**10)], 32)
        assert divisors(10**15 + 37) == "1, 1000000000000037"


def test_many_mistakes_are_found_at_once() -> None:
    tree = tiny_tree(Path("/shards"), Path("/run"))
    tree["model"] |= {f"key{number}" * 3: number for number in range(1500)}
    with at_once(), pytest.raises(ConfigError):
        parse_config(tree)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_models_of_others(key: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(VARIANTS["llama"]) | {key: number}))
    says = rf"config\.json: .*\n.*{key}" if (key, number) != ("vocab_size", 10**9) else "has neither"
    with at_once(), pytest.raises(CheckpointError, match=says):
        HuggingFaceSource(tmp_path)


def test_ranks_that_a_checkpoint_of_others_claims(tmp_path: Path) -> None:
    model = {"param_shapes": [], "dp_world_size": 10**12}
    torch.save(model, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with at_once(), pytest.raises(CheckpointError, match="was written by 1000000000000 ranks, and rank 1's file"):
        DeepSpeedSource(tmp_path)


DEEP = "[" * 100_000


def test_deep_json(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(DEEP)
        with at_once(), pytest.raises(CheckpointError, match=rf"{name}: is not JSON"):
            HuggingFaceSource(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(VARIANTS["llama"])))
    (tmp_path / "task.jsonl").write_text(DEEP)
    with at_once(), pytest.raises(DataError, match=r"task\.jsonl:1: not an example"):
        rows_of_file(tmp_path / "task.jsonl")


@pytest.mark.parametrize("token", [10**9, 10**18, -1, "5", 2**24, None, True])
def test_ids_that_a_tokenizer_of_others_claims(token: object, tmp_path: Path) -> None:
    added = [{"content": "</s>", "id": token, "special": True}]
    definition = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with at_once(), pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer .*an id is no number from 0"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(DEEP)
    with at_once(), pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_runs_of_others(tmp_path: Path) -> None:
    """A status and a report are about folders that others may have written."""
    files = ("state.json", "metrics.jsonl", "heartbeats.json", "config.yaml", "starts.jsonl")
    for content in (DEEP, BOMBS["lists of aliases"], BOMBS["itself in a list"]):
        for name in files:
            (tmp_path / name).write_text(content)
        with at_once():
            notes = status_of(tmp_path, 0.0).notes
        assert {note.partition(" ")[0] for note in notes} >= {"state.json", "config.yaml"}
        with at_once(), pytest.raises(LogError, match=r"config\.yaml: not valid YAML"):
            summarize(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {name: x}")
    (tmp_path / "metrics.jsonl").write_text(DEEP + "\n")
    with at_once(), pytest.raises(LogError, match=r"metrics\.jsonl:1: not JSON"):
        summarize(tmp_path)
