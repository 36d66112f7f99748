"""Runs that give tokens to the model that they start from: `checkpoint.grow_vocabulary`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chat_files import prepare_chats, prepare_pairs, some_chats
from command import outcome, tritrain
from exports import model_tree
from hf_folders import ModelSource
from models import VARIANTS, build
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config

from data.torchvision_repair import repair_torchvision
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.engine.contract import MOMENTS
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_folder import write_hf
from launcher.formats.open import open_source
from launcher.inference.load import load_model
from launcher.inference.vocabulary import grow_vocabulary_
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.training.begin import fill
from launcher.training.guard import SpikeGuard

OLD, NEW = 320, 325
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def config_of(data: Path, folder: Path, engine: str, *, vocab_size: int, tied: bool, **sections: Any) -> Config:
    model = {"vocab_size": vocab_size, "tie_embeddings": tied, "max_sequence_length": 96}
    given = {
        "phases": [{"precision": "16-bit", "steps": 2}],
        "model": model,
        "engine": ENGINES[engine],
        "schedule": {"warmup_steps": 0},
    }
    return tiny_config(data, folder, **given | sections)


def trained(data: str, out: str, *ties: bool) -> None:
    """Runs with and without tied embeddings."""
    for tied in ties:
        config = config_of(
            Path(data), Path(out) / str(tied), "fsdp2", vocab_size=OLD, tied=tied, averaging={"half_life_tokens": 512}
        )
        assert run(config) == "complete"


@pytest.fixture(scope="module")
def old(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs with fewer tokens, `True` with tied embeddings and `False` without."""
    folder = tmp_path_factory.mktemp("old")
    run_group(1, trained, str(shards), str(folder), True, False)
    return folder


Part = tuple[str, tuple[int, ...], int, torch.Tensor]
"""Of a rank's state: kind and name, the shape of the whole, the first element, and the values from there on."""


def filled(data: str, start: str, out: str, engine: str, tied: bool) -> list[Part]:
    """This rank's part of the state of a run that begins with another one."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    config = config_of(
        Path(data), Path(out), engine, vocab_size=NEW, tied=tied, averaging={"half_life_tokens": 512},
        checkpoint={"start_from": start, "grow_vocabulary": True},
    )  # fmt: skip
    plan = make_plan(config, ranks.world_size)
    built = build_engine(plan, plan.phases[0], ranks)
    fill(built, plan, ranks, None, "", SpikeGuard(None, smooths=False, ranks=ranks), Console(silent=True))
    return [
        (f"{kind}/{shard.name}", shard.shape, shard.start, tensor.clone())
        for shard in built.shards()
        for kind, tensor in shard.tensors.items()
    ]


def both_filled(data: str, old: str, out: str, engine: str) -> list[list[Part]]:
    return [filled(data, f"{old}/{tied}", out, engine, tied) for tied in (True, False)]


def whole_of(parts: list[Part]) -> dict[str, torch.Tensor]:
    """The state by kind and name; of what ranks hold alike, the last one's."""
    found: dict[str, torch.Tensor] = {}
    for key, shape, start, values in parts:
        whole = found.setdefault(key, torch.full(shape, torch.nan)).view(-1)
        whole[start : start + len(values)] = values
    return found


def state_of(start: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has stored, whole, by kind and name."""
    source = open_source(str(start))
    return {
        f"{kind}/{name}": source.read(kind, name, 0, math.prod(shape)).view(shape)
        for name, shape in source.shapes.items()
        for kind in source.kinds(name)
    }


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in (0, 1, 3))]
)
def test_new_rows_are_the_mean_and_have_no_moments(shards: Path, old: Path, tmp_path: Path, engine: str) -> None:
    given = (str(shards), str(old), str(tmp_path / "new"), engine)
    of_ties = zip(*run_group(2, both_filled, *given), strict=True)
    for tied, of_ranks in zip((True, False), of_ties, strict=True):
        found, before = whole_of([part for parts in of_ranks for part in parts]), state_of(old / str(tied))
        assert found.keys() <= before.keys()
        assert {key.split("/")[0] for key in found} >= {"weight", "exp_avg"}
        for key, values in found.items():
            kind, name = key.split("/", 1)
            if name not in TABLES:
                assert torch.equal(values, before[key]), key
                continue
            assert values.shape[0] == NEW
            assert torch.equal(values[:OLD], before[key]), key
            mean = before[f"weight/{name}"].double().mean(0).float()
            expected = torch.zeros_like(mean) if kind in MOMENTS else mean
            torch.testing.assert_close(values[OLD:], expected.expand(NEW - OLD, -1), rtol=0, atol=1e-9)
            assert values[OLD:].unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_public_model_goes_on_with_more_tokens(shards: Path, tmp_path: Path, tied: bool) -> None:
    """The old tokens have the logits that they had, and a new one no more probability than those on average."""
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    model = replace(VARIANTS["llama"], tie_embeddings=tied)
    write_hf(ModelSource(build(model)), model, tmp_path / "hf", torch.float32)
    sizes = {"vocab_size": model.vocab_size + 6}
    config = config_of(
        shards, tmp_path / "run", "fsdp2", vocab_size=0, tied=tied, model=model_tree(model) | sizes,
        phases=[{"precision": "16-bit", "steps": 2, "transition": {"optimizer": "reset"}}],
        checkpoint={"start_from": str(tmp_path / "hf"), "grow_vocabulary": True},
    )  # fmt: skip
    source = open_source(str(tmp_path / "hf"))
    [sentence] = grow_vocabulary_(source, config)
    assert sentence.startswith(f"6 rows were added to the {model.vocab_size} of ")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    theirs.resize_token_embeddings(model.vocab_size + 6, mean_resizing=True)  # around the mean, with noise
    for name, table in ((TABLES[0], theirs.get_input_embeddings()), (TABLES[1], theirs.get_output_embeddings())):
        if name in source.shapes:
            shape = source.shapes[name]
            ours = source.read_finite("weight", name, 0, math.prod(shape)).view(shape)
            torch.testing.assert_close(ours, table.weight.detach(), rtol=0, atol=1e-3)
    with pytest.raises(CheckpointError, match=r"leave out checkpoint\.grow_vocabulary"):
        grow_vocabulary_(source, config)


def fine_tuned(chats: str, pairs: str, start: str, out: str) -> None:
    length = {"max_sequence_length": 96, "vocab_size": NEW}
    for name, data, phases in (
        ("taught", chats, [{"precision": "ternary", "objective": "sft", "distillation": {"weight": 1.0}}]),
        ("preferred", pairs, [{"precision": "16-bit", "objective": "dpo"}]),
    ):
        phases[0] |= {"steps": 2, "transition": {"optimizer": "reset"}}
        config = tiny_config(
            Path(data), Path(out) / name, model=length, phases=phases, schedule={"warmup_steps": 0},
            data={"sequence_length": 96, "validation_rows": 0},
            training={"global_batch_sequences": 1, "micro_batch_sequences": 1, "compute_dtype": "fp32"},
            checkpoint={"start_from": start, "grow_vocabulary": True},
        )  # fmt: skip
        for steps in (1, 9):
            run(config, steps)


@pytest.mark.slow
def test_teachers_and_references_have_the_new_tokens_too(old: Path, tmp_path: Path) -> None:
    chats = prepare_chats(tmp_path, 96, *some_chats(24))
    pairs = prepare_pairs(tmp_path, 96, *({"prompt": "a", "chosen": c, "rejected": "x"} for c in "bcdefghi"))
    # The chats have a tokenizer of their own, with which a model that has another is refused.
    tritrain("convert", old / "True", "--to", tmp_path / "model", "--format", "hf", "--dtype", "fp32")
    run_group(1, fine_tuned, str(chats), str(pairs), str(tmp_path / "model"), str(tmp_path))
    rows = {
        name: [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("taught", "preferred")
    }
    assert [row["step"] for row in rows["taught"]] == [1, 2]
    assert rows["preferred"][0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_convert_makes_a_run_with_them(old: Path, tmp_path: Path) -> None:
    text = (old / "True/config.yaml").read_text().replace(f"vocab_size: {OLD}", f"vocab_size: {NEW}")
    (tmp_path / "new.yaml").write_text(text)
    given = ("convert", old / "True", "--to", tmp_path / "new", "--config", tmp_path / "new.yaml", "--phase", "0")
    code, _, said = outcome(*given)
    assert code == 2
    assert (
        f"model.vocab_size is {NEW}, and the checkpoint has {OLD} rows; set checkpoint.grow_vocabulary to true to give "
        "the other tokens the mean of these rows"
    ) in " ".join(said.split())
    tritrain(*given, "checkpoint.grow_vocabulary=true")
    weight = load_model(tmp_path / "new").model.get_parameter(TABLES[0])
    assert weight.shape[0] == NEW
    assert weight[OLD:].unique(dim=0).shape[0] == 1


def test_it_needs_a_model_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.grow_vocabulary: is true, but needs start_from"):
        tiny_config(tmp_path, tmp_path, checkpoint={"grow_vocabulary": True})
