"""What is measured in training: checked at its beginning, and no end of it."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import tiny_config
from tiny_tasks import EXAMPLES, write_tasks

from data.errors import DataError
from data.loader import IGNORED_LABEL, token_bytes, validation_rows
from launcher.errors import USER_ERRORS
from launcher.plan.plan import make_plan
from launcher.process.ranks import ALONE, Ranks
from launcher.training import held_out as held_out_module
from launcher.training.held_out import HeldOut
from launcher.training.tasks import TasksInTraining

pytest.importorskip("lm_eval")


def engine_of(**functions):
    """An engine that has these alone, and documents that need not be kept apart."""
    return SimpleNamespace(keeping_apart=lambda first_token: nullcontext(), **functions)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plan_of(shards, folder, **evaluation):
    model = {"max_sequence_length": 160}
    return make_plan(tiny_config(shards, folder / "run", model=model, evaluation=evaluation), 1)


def with_tasks(shards, folder):
    tasks = {"tasks": ["copa", "sst2"], "task_data": str(folder / "tasks"), "tasks_interval_steps": 2}
    return TasksInTraining(plan_of(shards, folder, **tasks), ALONE, shards / "tokenizer.model")


def test_a_task_that_is_not_finite_has_no_score_and_the_line_says_so(shards, tmp_path, group):
    write_tasks(tmp_path / "tasks")
    tasks, calls = with_tasks(shards, tmp_path), []

    def token_nll(tokens_BT, labels_BTA):
        calls.append(tokens_BT.shape)
        value = math.nan if len(calls) == 1 else 1.0
        return torch.where(labels_BTA == IGNORED_LABEL, 0.0, value)

    values, line = tasks.measure(engine_of(token_nll=token_nll), lambda: None)
    assert values.keys() == {"eval/sst2/acc", "eval/sst2/bits_per_byte", "tasks/num_scored"}
    assert values["tasks/num_scored"] == 1  # the row shows that both were tried
    assert "no score (copa, example " in line
    assert "log-likelihood of answer 1 is nan" in line


def test_examples_are_checked_when_the_run_starts(shards, tmp_path):
    write_tasks(tmp_path / "tasks")
    blank = EXAMPLES["sst2"][0] | {"choices": ["negative", " "]}
    (tmp_path / "tasks" / "sst2_validation.jsonl").write_text(json.dumps(blank))
    with pytest.raises(DataError, match=r"sst2_validation\.jsonl:1: .*an answer must not be blank"):
        with_tasks(shards, tmp_path)


def untrained_loss(rank, world_size, shards, out):
    """Loss of a model whose loss in each position is the label, by three rows, and the rows that it computed."""
    held_out_module.UNTRAINED_ROWS = 3
    plan = plan_of(Path(shards), Path(out))
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    held_out = HeldOut(plan, ranks, SimpleNamespace(tokenizer_path=Path(shards) / "tokenizer.model"))
    computed = []

    def token_nll(tokens_BT, labels_BT):
        computed.append(len(tokens_BT))
        return labels_BT.where(labels_BT != IGNORED_LABEL, 0).double()

    engine = engine_of(token_nll=token_nll)
    return held_out.estimate_untrained(engine), sum(computed)


@pytest.mark.usefixtures("group")
def test_an_untrained_model_is_measured_by_the_first_rows_the_same_on_any_number_of_ranks(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(held_out_module, "UNTRAINED_ROWS", 3)
    config = plan_of(shards, tmp_path).config
    [(_, labels_BT)] = validation_rows(config.data, vocab_size=320, micro_batch_sequences=8, rank=0, world_size=1)
    mean = float(labels_BT[:3].double().mean())
    sizes = token_bytes(config.data, 320)[labels_BT]
    bits_per_byte = mean * int((sizes > 0).sum()) / math.log(2) / float(sizes.sum())
    alone = untrained_loss(0, 1, shards, tmp_path)
    both = run_ranks(2, untrained_loss, str(shards), str(tmp_path))
    assert (alone[1], both[0][1], both[1][1]) == (4, 2, 2)  # micro-batches of two rows
    for loss, _ in (alone, *both):
        assert loss.nats_per_token == pytest.approx(mean, rel=1e-12)
        assert loss.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-12)
        assert loss.num_tokens == labels_BT.numel()


def test_a_sample_that_cannot_be_drawn_is_an_error_that_training_reports(shards, tmp_path):
    plan = plan_of(shards, tmp_path, sample_prompts=["a"], sample_tokens=4)
    held_out = HeldOut(plan, ALONE, SimpleNamespace(tokenizer_path=shards / "tokenizer.model"))
    broken = engine_of(logits=lambda tokens_BT: torch.full((*tokens_BT.shape, 320), math.nan))
    with pytest.raises(USER_ERRORS, match="the logits of the next token are not finite"):
        held_out.sample(broken)


def test_a_sample_keeps_the_space_after_its_prompt(shards, tmp_path):
    """A SentencePiece model with a dummy prefix leaves out the space that a text begins with."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["no yes no maybe so", "yes so"]), model_prefix=str(tmp_path / "spaces"), vocab_size=290,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spaces.model"))
    plan = plan_of(shards, tmp_path, sample_prompts=["no"], sample_tokens=1)
    held_out = HeldOut(plan, ALONE, SimpleNamespace(tokenizer_path=tmp_path / "spaces.model"))
    [word] = pieces.encode("yes")
    certain = torch.nn.functional.one_hot(torch.tensor(word), 320) * 1e4
    [sample] = held_out.sample(engine_of(logits=lambda tokens_BT: certain.expand(*tokens_BT.shape, 320)))
    assert sample[1] == " yes"


def sample_with_a_tokenizer_on_the_first_host_alone(rank, world_size, shards, out):
    """What each rank raises, or the number of its calls of the model, which are collectives."""
    plan = plan_of(Path(shards), Path(out), sample_prompts=["a"], sample_tokens=4)
    path = Path(shards) / "tokenizer.model" if rank == 0 else Path(out) / "none.model"
    held_out = HeldOut(plan, Ranks(rank, world_size, rank, torch.device("cpu")), SimpleNamespace(tokenizer_path=path))
    calls = []
    try:
        held_out.sample(engine_of(logits=lambda tokens_BT: calls.append(1) or torch.zeros(1, 1, 320)))
    except DataError as error:
        return str(error)
    return str(len(calls))


def test_a_tokenizer_that_one_host_cannot_read_leaves_no_rank_in_a_collective(shards, tmp_path):
    said = run_ranks(2, sample_with_a_tokenizer_on_the_first_host_alone, str(shards), str(tmp_path))
    assert said[0] == said[1]
    assert said[0].startswith(f"{tmp_path / 'none.model'}: no such tokenizer file")
