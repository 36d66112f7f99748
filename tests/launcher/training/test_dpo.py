"""Phases of preference optimization: the loss against every pair by itself, runs in pieces, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from chat_files import pair, prepare_chats, prepare_pairs, prepare_text, some_chats, write_chats
from hf_folders import ModelSource
from models import build
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config
from torch import Tensor

from data.chat_template import ChatTemplate
from data.errors import DataError
from data.marks import BEGINS, COUNTS, ids_of
from data.pairs import PairEncoder
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import folder_of
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.errors import ConfigError
from launcher.formats.hf_folder import write_hf
from launcher.plan.inputs import missing_inputs
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.traffic import bytes_sent
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.study.branch import branch
from launcher.training.begin import first_value
from launcher.training.held_out import PREFERENCES, HeldOut
from launcher.training.meter import PREFERENCE_PARTS
from launcher.training.reference import open_second_model
from launcher.training.step import accumulate_gradients, open_data
from launcher.watch.stopping import StopRequest
from model.transformer import Transformer

LENGTH = 160
MODEL = {"vocab_size": 320, "max_sequence_length": LENGTH}
KEYS = ("step", "train/loss", "train/grad_norm", "validation/loss", *PREFERENCE_PARTS, *PREFERENCES)
TEXT = {"precision": "16-bit", "steps": 2}
DPO_16, DPO = ({"precision": precision, "steps": 4, "objective": "dpo"} for precision in ("16-bit", "ternary"))


def config_of(data: str, folder: Path, phases: Any, engine: Any = "fsdp2", **sections: Any) -> Config:
    given: dict[str, Any] = {
        "engine": ENGINES[engine] if isinstance(engine, str) else engine,
        "model": MODEL,
        "data": {"sequence_length": LENGTH, "validation_rows": 8},
        "training": {"global_batch_sequences": 6, "micro_batch_sequences": 1, "compute_dtype": "fp32"},
        "phases": phases,
    }
    return tiny_config(Path(data), folder, **given | sections)


def uneven_pairs() -> list[dict[str, Any]]:
    """Five that each take most of a row, and short ones; answers of a letter, or of a line."""
    long = [
        ("q" * 40, "a", "b"),
        ("?" * 15, "b" * 30, "c"),
        ("q" * 15, "c", "d" * 33),
        ("r" * 30, "e" * 9, "f" * 2),
        ("s" * 25, "g", "h"),
    ]
    return [pair(*each) for each in [*long, *zip("ghijk", "lmnop", "rstuv", strict=True)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dpo")
    same = write_chats(folder / "held-out.jsonl", *uneven_pairs())  # so that both have one oracle
    held_out = {"validation_inputs": (str(same),)}
    made = {
        "pairs": prepare_pairs(folder, LENGTH, *uneven_pairs(), **held_out),
        "chats": prepare_chats(folder, LENGTH, *some_chats(60), validation_fraction=0.3),
        "text": prepare_text(folder, LENGTH),
    }
    return {name: str(path) for name, path in made.items()}


def one_batch(pairs: str, start: str, out: str, normalized: bool) -> dict[str, Any]:
    """The loss and the gradients of a global batch, which is the whole folder, away from the reference."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    phase = DPO_16 | {"preference": {"beta": 0.5, "length_normalized": normalized}}
    config = config_of(pairs, Path(out), [phase], checkpoint={"start_from": start})
    plan = make_plan(config, ranks.world_size)
    data = open_data(plan, ranks, 0)
    engine = build_engine(plan, plan.phases[0], ranks)
    engine.keep_apart(data.first_token)
    load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, config))
    held_out, folder = HeldOut(plan, ranks, data, plan.held_out_of(plan.phases[0])), RunFolder(config)
    of_data = data.first_token, data.fingerprint
    reference = open_second_model(
        plan, plan.phases[0], ranks, folder, of_data, held_out.pairs, Console(silent=True), lambda: None,
        StopRequest(),
    )  # fmt: skip
    measured = held_out.measure_preferences(engine, reference)
    result = accumulate_gradients(
        engine, iter(data), plan.micro_batches_at(0), uneven=data.has_padding, teacher=reference
    )
    assert result.parts is not None
    parts = result.parts.clone()
    dist.all_reduce(parts)
    norm = torch.stack(list(engine.gradient_squares().values())).sum().double()
    dist.all_reduce(norm)
    data.close()
    return {
        "parts": (parts / ranks.world_size).tolist(),
        "norm": norm.sqrt().item(),
        "held out": [measured[key] for key in PREFERENCES],
    }


def answer_nll(model: Transformer, side: Any) -> tuple[Tensor, int]:
    """The summed cross-entropy of an answer by itself, and its tokens."""
    tokens, counts = torch.from_numpy(ids_of(side).astype("int64")), torch.from_numpy((side & COUNTS) > 0)
    nll = F.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
    return nll[counts[1:]].sum(), int(counts.sum())


@pytest.fixture(scope="module")
def start(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint after four steps."""
    folder = tmp_path_factory.mktemp("start")
    run_group(1, trained, folders["text"], str(folder), [TEXT | {"steps": 4}])
    return str(folder_of(folder / "checkpoints", 4))


def trained(data: str, out: str, phases: Any) -> None:
    run(config_of(data, Path(out), phases))


@pytest.mark.parametrize("normalized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_loss_is_the_mean_over_all_pairs_on_any_number_of_ranks(
    folders: dict[str, str], start: str, tmp_path: Path, normalized: bool
) -> None:
    prepared = Path(folders["pairs"])
    assert json.loads((prepared / "manifest.json").read_text())["splits"]["train"]["rows"] == 6
    encoder = PairEncoder(ChatTemplate(load_tokenizer(prepared)), LENGTH + 1, "error")
    config = config_of(str(prepared), tmp_path, [DPO_16], checkpoint={"start_from": start})
    policy, reference = Transformer(config.model), Transformer(config.model)
    policy.load_state_dict(
        {
            name: first_value(name, tuple(each.shape), range(len(each)), config)
            for name, each in policy.named_parameters()
        }
    )
    weights = {}
    for path in Path(start).glob("*.safetensors"):
        weights |= {name.removeprefix("weight/"): each for name, each in load_file(path).items()}
    reference.load_state_dict({name: weights[name].view_as(each) for name, each in reference.named_parameters()})
    margins = []
    for each in uneven_pairs():
        marked, gains = encoder.marked(each), []
        half = int((marked & BEGINS).nonzero()[0][1])
        for side in (marked[:half], marked[half:]):
            ours, count = answer_nll(policy.double(), side)
            theirs, _ = answer_nll(reference.double(), side)
            gains.append((theirs.detach() - ours) / (count if normalized else 1))
        margins.append(0.5 * (gains[0] - gains[1]))
    stacked = torch.stack(margins)
    expected = -torch.log(torch.sigmoid(stacked)).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None))
    parts = [expected.item(), stacked.mean().item(), (stacked > 0).double().mean().item()]
    assert parts[1] != pytest.approx(0, abs=1e-3)
    for world_size in (1, 2, 3):
        out = str(tmp_path / str(world_size))
        for found in run_group(world_size, one_batch, str(prepared), start, out, normalized):
            assert found["parts"] == pytest.approx(parts, rel=1e-5)
            assert found["held out"] == pytest.approx(parts, rel=1e-5)
            assert found["norm"] == pytest.approx(norm, rel=1e-4)


def phases_of(folders: dict[str, str]) -> list[dict[str, Any]]:
    """Text, chats and pairs, in 16 bits and ternary, and ternary pairs after ternary pairs."""
    return [
        TEXT,
        {"precision": "16-bit", "steps": 2, "objective": "sft", "sources": [{"path": folders["chats"]}]},
        DPO_16 | {"sources": [{"path": folders["pairs"]}]},
        DPO | {"transition": {"ramp": {"steps": 2}}, "preference": {"beta": 2.0, "length_normalized": True}},
        DPO,
    ]


def whole_and_in_pieces(folders: dict[str, str], out: str, engine: str) -> None:
    phases = phases_of(folders)
    assert run(config_of(folders["text"], Path(out) / "whole", phases, engine)) == "complete"
    measure, calls = HeldOut.measure_preferences, iter(range(1000))

    def failing_once(held_out: HeldOut, engine: Any, reference: Any, *options: Any) -> dict[str, float]:
        if reference is not None and next(calls) == 1:  # after the last step of the first phase with pairs
            raise RuntimeError("once")
        return measure(held_out, engine, reference, *options)

    with patch.object(HeldOut, "measure_preferences", failing_once):
        for steps in (2, 3, 2):
            run(config_of(folders["text"], Path(out) / "pieces", phases, engine), steps)
        if engine == "fsdp2" and dist.get_rank() == 0:
            branch(config_of(folders["text"], Path(out) / "branched", phases, engine), Path(out) / "pieces", 7)
        dist.barrier()
        with pytest.raises(RuntimeError, match="once"):
            run(config_of(folders["text"], Path(out) / "pieces", phases, engine), 3)
        for steps in (2, 2, 9):
            run(config_of(folders["text"], Path(out) / "pieces", phases, engine), steps)
    if engine == "fsdp2":  # as an arm of a study goes on from its trunk
        assert run(config_of(folders["text"], Path(out) / "branched", phases, engine)) == "complete"


def rows_of(folder: Path) -> list[list[Any]]:
    return [[row.get(key) for key in KEYS] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero-1"])
def test_runs_are_the_same_in_pieces(folders: dict[str, str], tmp_path: Path, engine: str) -> None:
    world_size = 2
    run_group(world_size, whole_and_in_pieces, folders, str(tmp_path), engine)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert rows_of(whole) == rows_of(pieces)
    if engine == "fsdp2":
        assert rows_of(whole) == rows_of(tmp_path / "branched")
    for path in sorted(folder_of(whole / "checkpoints", 16).glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(folder_of(pieces / "checkpoints", 16) / path.name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = read_metrics(whole / "metrics.jsonl")
    first = {key: row for row in reversed(metrics) for key in PREFERENCE_PARTS[1:2] if key in row and row["step"] > 4}
    assert first[PREFERENCE_PARTS[1]]["step"] == 5
    begins = {row["phase"]: row for row in metrics if row.get("validation/when") == "start of phase"}
    for index in (2, 4):  # a phase begins as its reference: in 16 bits, and in ternary
        assert begins[index][PREFERENCES[0]] == pytest.approx(math.log(2), abs=1e-6)
        assert begins[index][PREFERENCES[1]] == pytest.approx(0, abs=1e-5)
    ends = {row["phase"]: row for row in metrics if row.get("validation/when") == "end of phase"}
    assert ends[2][PREFERENCES[0]] < math.log(2)
    assert ends[2][PREFERENCES[2]] > 0.5
    assert PREFERENCES[0] not in ends[1]


def by_codes(folders: dict[str, str], out: str) -> None:
    phases = [TEXT | {"precision": "ternary"}, DPO | {"sources": [{"path": folders["pairs"]}]}]
    engine = {"name": "fsdp2", "gather": "codes"}
    training = {"global_batch_sequences": 6, "micro_batch_sequences": 1, "compute_dtype": "bf16"}
    assert run(config_of(folders["text"], Path(out), phases, engine=engine, training=training)) == "complete"


def from_a_folder(folders: dict[str, str], out: str, engine: str, compiles: bool) -> None:
    training = {"global_batch_sequences": 6, "micro_batch_sequences": 3, "compute_dtype": "bf16", "compile": compiles}
    start = {"start_from": folders["model"]}
    phases = [DPO_16 | {"transition": {"optimizer": "reset"}}]
    config = config_of(folders["pairs"], Path(out), phases, engine, training=training, checkpoint=start)
    assert run(config) == "complete"


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (by_codes, ()),
        pytest.param(from_a_folder, ("zero-3", False), marks=pytest.mark.slow),
        pytest.param(from_a_folder, ("fsdp2", True), marks=pytest.mark.slow),
    ],
    ids=["codes", "zero-3", "compiled"],
)
def test_a_phase_begins_as_its_reference_in_bf16_however_it_computes(
    folders: dict[str, str], tmp_path: Path, function: Any, options: Any
) -> None:
    model = build(config_of(folders["pairs"], tmp_path, [DPO_16], checkpoint={"start_from": "a"}).model)
    write_hf(ModelSource(model), model.config, tmp_path / "model", torch.float32)
    num_ranks = 1 if options == ("fsdp2", True) else 2  # to compile is slow
    run_group(num_ranks, function, folders | {"model": str(tmp_path / "model")}, str(tmp_path / "run"), *options)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if PREFERENCES[0] in row]
    begins, ends = (
        next(row for row in rows if row["validation/when"] == f"{each} of phase") for each in ("start", "end")
    )
    assert begins[PREFERENCES[0]] == pytest.approx(math.log(2), abs=1e-6)
    assert begins[PREFERENCES[1]] == pytest.approx(0, abs=1e-5)
    assert ends[PREFERENCES[0]] < math.log(2)


def test_what_does_not_fit_is_refused(folders: dict[str, str], start: str, tmp_path: Path) -> None:
    of_pairs = {"sources": [{"path": folders["pairs"]}]}
    wrong = [TEXT | of_pairs, DPO_16 | {"sources": [{"path": folders["chats"]}]}]
    assert dict(missing_inputs(config_of(folders["text"], tmp_path, wrong))) == {
        "phases.0.sources.0.path": "holds pairs, but phases.0.objective is next-token, which learns from text; set it "
        "to dpo",
        "phases.1.sources.0.path": "holds chats, but phases.1.objective is dpo; name pairs in phases.1.sources, which "
        "`tritrain prepare` makes with --content pairs",
    }
    for phases, problem in (
        ([DPO_16], r"phases\.0\.objective: is dpo, which compares .* checkpoint\.start_from"),
        ([TEXT | {"preference": {}}], r"preference: is given for objective next-token; only dpo learns from pairs"),
        ([TEXT, DPO | of_pairs | {"distillation": {}}], r"distillation: is given for objective dpo"),
        ([TEXT, DPO_16 | {"transition": {"optimizer": "rescale"}}], r"transition\.optimizer: is rescale, which"),
        ([TEXT, DPO_16 | {"preference": {"beta": 0}}], r"preference\.beta: is 0.*; must be above 0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            config_of(folders["text"], tmp_path, phases)
    both = [TEXT, DPO_16 | {"sources": [{"path": folders["chats"]}, {"path": folders["pairs"]}]}]
    with pytest.raises(DataError, match=r"chats: holds chats, and .*pairs pairs; a phase trains on one of both"):
        run_group(1, trained, folders["text"], str(tmp_path / "both"), both)


def test_the_plan_counts_the_reference_once_and_holds_no_second_model(folders: dict[str, str], tmp_path: Path) -> None:
    of_pairs = {"sources": [{"path": folders["pairs"]}]}
    plan, of_text = (
        make_plan(config_of(folders["text"], tmp_path, [TEXT, last]), 2)
        for last in (DPO_16 | of_pairs, TEXT | {"steps": 4})
    )
    assert plan.flops_per_token_at(2) == of_text.flops_per_token_at(2)
    forward = of_text.flops_per_token_at(2) // 3 * 4 * 6 * LENGTH
    assert plan.total_flops == of_text.total_flops + forward
    assert memory_bytes_per_rank(plan).keys() == memory_bytes_per_rank(of_text).keys()
    assert bytes_sent(plan) == bytes_sent(of_text)


def from_averaged(folders: dict[str, str], out: str) -> None:
    phases = [
        TEXT,
        DPO_16
        | {"steps": 1, "sources": [{"path": folders["pairs"]}]}
        | {"transition": {"weights": "averaged", "optimizer": "reset"}},
    ]
    config = config_of(folders["text"], Path(out), phases, averaging={"half_life_tokens": 2000})
    assert run(config) == "complete"


def test_the_reference_is_what_the_phase_begins_with_averaged_weights_too(
    folders: dict[str, str], tmp_path: Path
) -> None:
    run_group(1, from_averaged, folders, str(tmp_path / "run"))
    (begin,) = [
        row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if row["phase"] == 1 and row.get("validation/when") == "start of phase"
    ]  # fmt: skip
    loss, *_ = (begin[key] for key in PREFERENCES)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
