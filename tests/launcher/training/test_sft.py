"""Phases of supervised fine-tuning: the loss against every chat by itself, runs in pieces, and what is refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from chat_files import CHATML, chat, prepare_chats, prepare_text, some_chats, write_chats
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config

from data.chat_template import ChatTemplate
from data.chats import ChatEncoder
from data.errors import DataError
from data.tokenizer import load_tokenizer
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.engine.contract import Engine, load_weights
from launcher.errors import ConfigError
from launcher.plan.inputs import missing_inputs
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.table import describe, plan_rows
from launcher.plan.traffic import describe_traffic
from launcher.process.ranks import ALONE, Ranks
from launcher.report.summary import summarize, verdict
from launcher.run.metrics_log import read_metrics
from launcher.training.begin import first_value
from launcher.training.held_out import HeldOut
from launcher.training.step import accumulate_gradients, open_data
from model.init import initialize_
from model.transformer import Transformer

LENGTH = 96
MODEL = {"vocab_size": 320, "max_sequence_length": LENGTH}
KEYS = ("step", "train/loss", "train/grad_norm", "validation/bits_per_byte")
SFT_16, SFT = ({"precision": precision, "steps": 5, "objective": "sft"} for precision in ("16-bit", "ternary"))


def config_of(text: str, chats: str, folder: Path, engine: str = "fsdp2", **sections: Any) -> Config:
    """Text, then chats over several epochs, in 16 bits and ternary, with a teacher."""
    given: dict[str, Any] = {
        "engine": ENGINES[engine],
        "model": MODEL,
        "data": {"sequence_length": LENGTH, "validation_rows": 8},
        "training": {"global_batch_sequences": 4, "micro_batch_sequences": 1},
        "phases": [
            {"precision": "16-bit", "steps": 2},
            SFT_16 | {"sources": [{"path": chats}]},
            SFT | {"transition": {"ramp": {"steps": 2}}, "distillation": {"weight": 1.0, "relation_weight": 0.5}},
        ],
    }
    return tiny_config(Path(text), folder, **given | sections)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sft")
    chats = prepare_chats(folder, LENGTH, *some_chats(24), validation_fraction=0.3)
    return str(prepare_text(folder, LENGTH)), str(chats)


def uneven_chats() -> list[dict[str, Any]]:
    """Six that each take more than half of a row, and six that fit beside one; answers of a letter, or of a line."""
    long = [("q" * 40, "a"), ("?", "b" * 40), ("q", "c" * 45), ("q" * 44, "d"), ("r" * 38, "e"), ("?", "f" * 50)]
    return [chat(*pair) for pair in [*long, *zip("ghijkl", "lmnopq", strict=True)]]


def one_batch(chats: str, out: str) -> dict[str, Any]:
    """The loss and the gradients of the first global batch, which is the whole folder, and its held-out loss."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    config = config_of(
        chats, chats, Path(out),
        training={"global_batch_sequences": 6, "micro_batch_sequences": 1, "compute_dtype": "fp32"},
        phases=[SFT_16],
    )  # fmt: skip
    plan = make_plan(config, ranks.world_size)
    data = open_data(plan, ranks, 0)
    engine = build_engine(plan, plan.phases[0], ranks)
    engine.keep_apart(data.first_token)
    load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, config))
    held_out = HeldOut(plan, ranks, data, plan.held_out_of(plan.phases[0])).measure(engine)
    assert held_out is not None
    result = accumulate_gradients(engine, iter(data), plan.micro_batches_at(0), uneven=data.has_padding)
    loss = result.loss.clone()
    dist.all_reduce(loss)
    squares = engine.gradient_squares()
    norm = torch.stack(list(squares.values())).sum().double()
    dist.all_reduce(norm)
    data.close()
    return {"loss": loss.item() / ranks.world_size, "norm": norm.sqrt().item(), "held out": held_out.nats_per_token}


def test_the_loss_is_the_mean_over_all_answers_on_any_number_of_ranks(tmp_path: Path) -> None:
    same = write_chats(tmp_path / "held-out.jsonl", *uneven_chats())  # so that both losses have one oracle
    prepared = prepare_chats(tmp_path, LENGTH, *uneven_chats(), validation_inputs=(str(same),))
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["splits"]["train"]["rows"] == 6
    encoder = ChatEncoder(ChatTemplate(load_tokenizer(prepared)), LENGTH + 1, "error")
    config = config_of(str(prepared), str(prepared), tmp_path / "run", phases=[SFT_16])
    model = Transformer(config.model)
    initialize_(model, config.run.seed)
    model = model.double()
    sums, counts = [], []
    for each in uneven_chats():
        ids, counted = encoder.encode_chat(each["messages"])
        tokens = torch.from_numpy(ids)
        nll = F.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        sums.append(nll[torch.from_numpy(counted)[1:]].sum())
        counts.append(int(counted.sum()))
    assert max(counts) > 10 * min(counts)
    expected = torch.stack(sums).sum() / sum(counts)
    expected.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    for world_size in (1, 2, 3):
        for found in run_group(world_size, one_batch, str(prepared), str(tmp_path / str(world_size))):
            assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
            assert found["held out"] == pytest.approx(expected.item(), rel=1e-6)
            assert found["norm"] == pytest.approx(norm.item(), rel=1e-5)


def whole_and_in_pieces(text: str, chats: str, out: str, engines: list[str]) -> None:
    for engine in engines:
        assert run(config_of(text, chats, Path(out) / engine / "whole", engine)) == "complete"
        for steps in (2, 3, 2, 9):
            run(config_of(text, chats, Path(out) / engine / "pieces", engine), steps)


def rows_of(folder: Path) -> list[list[object]]:
    return [[row.get(key) for key in KEYS] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero-1"])
def test_runs_are_the_same_in_pieces_and_alike_on_two_ranks(
    folders: tuple[str, str], tmp_path: Path, engine: str
) -> None:
    text, chats = folders
    rows = json.loads((Path(chats) / "manifest.json").read_text())["splits"]["train"]["rows"]
    assert rows < 5 * 4  # each phase goes around more than once
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        run_group(world_size, whole_and_in_pieces, text, chats, str(out), [engine])
        whole, pieces = out / engine / "whole", out / engine / "pieces"
        assert rows_of(whole) == rows_of(pieces)
        last = "checkpoints/step-00000012"
        for path in sorted((whole / last).glob("*.safetensors")):
            ours, theirs = load_file(path), load_file(pieces / last / path.name)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        for place in (whole, whole / last):
            assert (place / "chat_template.jinja").read_text() == CHATML
        summary = summarize(whole)
        assert [phase.is_of_other_text for phase in summary.phases] == [False, True, False]
        assert [transition.to_phase for transition in summary.transitions] == [2]  # text and answers do not compare
        assert verdict(summary).count("%") == 1
    one, two = (rows_of(tmp_path / str(world_size) / engine / "whole") for world_size in (1, 2))
    for ours, theirs in zip(one, two, strict=True):  # the ternary phase is chaotic, see tests of the engines
        if isinstance(ours[0], int) and ours[0] <= 7:
            assert [each for each in ours if each] == pytest.approx([each for each in theirs if each], rel=1e-5)


def test_each_phase_is_measured_on_what_it_learns(folders: tuple[str, str], tmp_path: Path) -> None:
    text, chats = folders
    plan = make_plan(config_of(text, chats, tmp_path), 1)
    assert [[source.path for source in plan.held_out_of(phase).sources] for phase in plan.phases] == [
        [text], [chats], [chats],
    ]  # fmt: skip
    rows = plan_rows(describe(plan) | describe_traffic(plan) | {"events": [], "counted_as": {}})
    named = [row[0] for row in rows if row[0].startswith("phase")]
    assert named == ["phase 0: 16-bit", "phase 1: 16-bit, sft", "phase 2: ternary, sft"]
    back = [SFT_16, {"precision": "16-bit", "steps": 5, "sources": [{"path": text}]}]
    plan = make_plan(config_of(chats, chats, tmp_path, phases=back), 1)
    assert [plan.held_out_of(phase).sources[0].path for phase in plan.phases] == [chats, text]


def test_what_does_not_fit_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    text, chats = folders
    wrong = [{"precision": "16-bit", "steps": 3, "sources": [{"path": chats}]}, SFT | {"sources": [{"path": text}]}]
    config = config_of(text, chats, tmp_path, phases=wrong)
    assert dict(missing_inputs(config)) == {
        "data.sources.0.path": "holds text, but phases.1.objective is sft; name chats in phases.1.sources, which "
        "`tritrain prepare` makes with --content chats",
        "phases.0.sources.0.path": "holds chats, but phases.0.objective is next-token, which learns from text; set it "
        "to sft",
    }
    both = [SFT_16 | {"sources": [{"path": chats}, {"path": text}]}]
    with pytest.raises(DataError, match=r"holds chats, and .*text text; a phase trains on one of both"):
        run_group(1, one_start, text, chats, str(tmp_path), both)
    with pytest.raises(DataError, match=r"holds chats, but phases\.0\.objective is next-token"):
        run_group(1, one_start, chats, chats, str(tmp_path), [wrong[0]])
    with pytest.raises(ConfigError, match=r"phases\.1\.objective: is sft.*some sequences of the phase have 48 tokens"):
        make_plan(config_of(text, chats, tmp_path, phases=[wrong[0] | {"sequence_length": 48}, SFT]), 1)
    with pytest.raises(ConfigError, match=r"rollback: compares the loss .* whose objective is next-token"):
        config_of(text, chats, tmp_path, phases=[wrong[0], SFT | {"transition": {"rollback": {"after_tokens": 800}}}])
    apart, joined = (
        memory_bytes_per_rank(make_plan(config_of(text, text, tmp_path, phases=phases), 1))["activations"]
        for phases in ([SFT_16], [{"precision": "16-bit", "steps": 5}])
    )
    assert apart > joined


def one_start(text: str, chats: str, out: str, phases: Any) -> None:
    run(config_of(text, chats, Path(out) / "run", phases=phases))


def test_a_sample_is_the_answer_to_a_question(folders: tuple[str, str], tmp_path: Path) -> None:
    """Written as the template does, up to the token that ends an answer."""
    asked = {"sample_prompts": ["why"], "sample_tokens": 4}
    tokenizer = load_tokenizer(Path(folders[0]) / "tokenizer.json")
    written = tokenizer.encode_special("hi<|im_end|>x")
    seen = []

    def logits(tokens_BT: torch.Tensor) -> torch.Tensor:
        seen.append(tokens_BT[0])
        return 1e4 * F.one_hot(torch.tensor(written[len(seen) - 1]), 320).expand(*tokens_BT.shape, 320)

    config = config_of(*folders, tmp_path / "run", evaluation=asked)
    held_out = HeldOut(plan := make_plan(config, 1), ALONE, open_data(plan, ALONE, 0))
    [sample] = held_out.sample(SimpleNamespace(keeping_apart=lambda first_token: nullcontext(), logits=logits))
    prompt = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    assert sample == (prompt, "hi")
    expected = tokenizer.encode_special(prompt)
    assert seen[0][: len(expected)].tolist() == expected


def asked_of_masked_text(text: str, chats: str, out: str) -> list[int | None]:
    """By which token the engine kept documents apart at each token that it wrote."""
    config = config_of(
        text, chats, Path(out),
        data={"sequence_length": LENGTH, "validation_rows": 8, "documents": "masked"},
        evaluation={"sample_prompts": ["What is 2 + 2?"], "sample_tokens": 2},
        schedule={"warmup_steps": 0},
        phases=[{"precision": "16-bit", "steps": 1}, SFT_16 | {"steps": 1, "sources": [{"path": chats}]}],
    )  # fmt: skip
    found, logits = [], Engine.logits

    def watched(engine: Engine, tokens_BT: torch.Tensor) -> torch.Tensor:
        found.append(engine._decoder.first_token)
        return logits(engine, tokens_BT)

    with patch.object(Engine, "logits", watched):
        assert run(config) == "complete"
    return found


def test_a_model_of_masked_text_sees_the_question_that_ends_like_a_document(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    [found] = run_group(1, asked_of_masked_text, *folders, str(tmp_path))
    assert len(found) >= 2
    assert set(found) == {None}
