"""`tritrain eval` and `tritrain perplexity` on real runs and folders, and tasks while training."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hf_folders import edit_config, load, pack_folder, write_variant
from ranks import run_group
from runs import run as train_run
from tiny import tiny_config
from tiny_tasks import NUM_EXAMPLES, write_tasks
from tokenizer_files import write_bytes_tokenizer

from data.errors import DataError
from eval.tasks import DEFINITIONS, choose_tasks
from launcher.checkpoint.folders import complete_checkpoints
from launcher.config.file import parse_config, to_tree
from launcher.errors import CheckpointError, ConfigError
from launcher.inference import measure
from launcher.inference.measure import (
    Evaluation,
    TextMeasurement,
    add_result,
    check_tasks,
    evaluate,
    measure_text,
    score_tasks,
)
from launcher.inference.sharded import locations_of, open_subject
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.run.scores import RESULTS, read_results
from launcher.watch.heartbeat import Pulse

pytest.importorskip("lm_eval")

RAMP = {"shape": "linear", "steps": 3, "order": "sensitivity", "rounding": "softmax"}
QUANTIZATION = {"precision": "ternary", "steps": 4, "transition": {"ramp": RAMP}}


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def train_with_and_without_tasks(shards, folder, mirror):
    got_on = []
    Pulse.got_on = lambda pulse: got_on.append(pulse.at.doing)
    for name, tasks in (("with", ["paper11", "piqa-harness"]), ("without", [])):
        config = tiny_config(
            Path(shards),
            Path(folder) / name,
            model={"max_sequence_length": 160},
            training={"compute_dtype": "bf16"},
            phases=[{"precision": "16-bit", "steps": 4}, QUANTIZATION],
            checkpoint={"interval_steps": 2, "keep_last": 0},
            logging={"tensorboard": name == "with", "interval_steps": 5},
            evaluation={"tasks": tasks, "task_data": mirror, "tasks_interval_steps": 3, "tasks_limit": 2}
            if tasks
            else {},
        )
        train_run(config)
    assert set(got_on) == {"switch", "tasks", "evaluate"}
    # In both runs 2 batches, in 16 bits and with one block rounded, and 2 of the held-out text.
    assert got_on.count("switch") == 2 * (2 * (1 + 2) + 2)
    assert got_on.count("tasks") >= 3 * 12  # after 3 and 6 steps and at the ends of phases; each batch of each task


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("mirror") / "tasks")


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory, mirror):
    """A run that does tasks while it trains and one that does not, on two ranks, through a ramp."""
    folder = tmp_path_factory.mktemp("runs")
    run_group(2, train_with_and_without_tasks, str(shards), str(folder), str(mirror))
    return folder


def evaluate_here(*arguments):
    evaluate(Evaluation(*arguments), this_rank(), Console(silent=True))


def scores(path):
    return {(record["step"], record["task"]): record["scores"] for record in read_results(path)}


@pytest.mark.slow
def test_tasks_change_nothing_of_training(runs):
    rows = [
        {
            row["step"]: row["validation/loss"]
            for row in read_metrics(runs / name / "metrics.jsonl")
            if "validation/loss" in row
        }
        for name in ("with", "without")
    ]
    assert rows[0] == rows[1]
    last = [
        complete_checkpoints(runs / name / "checkpoints")[-1] / "rank-00000.safetensors" for name in ("with", "without")
    ]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_tasks_while_training_are_done_when_asked_and_no_step_s_loss_is_lost(runs):
    rows = read_metrics(runs / "with" / "metrics.jsonl")
    done = [row for row in rows if "eval/piqa/acc_norm" in row]
    assert [row["step"] for row in done] == [3, 4, 6, 8]
    labels = [*DEFINITIONS, "piqa-harness"]
    assert {key.split("/")[1] for key in done[0] if key.startswith("eval/")} == set(labels)
    assert all(key in done[0] for key in ("eval/mrpc/f1", "eval/mrpc/bits_per_byte", "eval/cb/acc"))
    logged = [row["step"] for row in rows if "train/loss" in row]
    assert set(logged) >= {3, 4, 5, 6, 8}


def test_a_run_is_evaluated_checkpoint_by_checkpoint_and_as_it_was_while_training(runs, mirror, tmp_path):
    """Neither ranks and sharding nor whether the model trains change a bit of a score, on the ramp or behind it."""
    every = locations_of(str(runs / "with"), every=True)
    assert [Path(folder).name for folder in every] == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for world_size, out in zip((1, 2), files, strict=True):
        run_group(world_size, evaluate_here, every, ["paper11", "piqa-harness"], str(mirror), 2, str(out), None)
    one, two = map(scores, files)
    assert one == two
    assert len(one) == 4 * 12
    for row in read_metrics(runs / "with" / "metrics.jsonl"):
        for key, value in row.items():
            if key.startswith("eval/") and row["step"] in (4, 6, 8):
                _, label, metric = key.split("/")
                assert one[row["step"], label][metric]["value"] == value, (row["step"], key)


def test_finished_tasks_are_reused_until_anything_changes(runs, mirror, tmp_path, monkeypatch, capsys):
    import eval.harness

    other_tokenizer = write_bytes_tokenizer(tmp_path / "tokenizer.json")

    calls = []
    original = eval.harness.answer_questions

    def answer_questions(label, *arguments, **keywords):
        calls.append(label)
        if label == "copa" and len(calls) == 2:
            raise KeyboardInterrupt
        return original(label, *arguments, **keywords)

    monkeypatch.setattr(eval.harness, "answer_questions", answer_questions)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks, out = this_rank(), tmp_path / "results.json"
        out.symlink_to("elsewhere.json")

        def do(tasks, limit=None, model="with", tokenizer=None):
            calls.clear()
            asked = Evaluation([str(runs / model)], tasks, str(mirror), limit, str(out), tokenizer)
            evaluate(asked, ranks, Console(silent=False))
            return list(calls)

        with pytest.raises(KeyboardInterrupt):
            do(["piqa", "copa", "cb"])
        assert do(["piqa", "copa", "cb"]) == ["copa", "cb"]
        assert do(["piqa", "copa", "cb"]) == []
        assert do(["copa"], limit=1) == ["copa"]
        assert do(["copa-harness"]) == ["copa-harness"]
        assert do(["copa"], tokenizer=str(runs / "with")) == []
        assert do(["copa"], tokenizer=str(other_tokenizer)) == ["copa"]
        table = capsys.readouterr().out
        assert re.search(r"copa-harness\s*│\s*3\s*│\s*acc\s*│\s*[\d.]+ ± [\d.]+\s*│", table)
        assert "piqa  3" not in table
        assert out.is_symlink()
        out.write_text("[]")
        with pytest.raises(DataError, match="holds no results"):
            do(["piqa"])
    finally:
        dist.destroy_process_group()


def test_results_and_points_go_into_the_run(runs, mirror):
    run_group(1, evaluate_here, [str(runs / "with")], ["sst2"], str(mirror), None, None, None)
    [record] = read_results(runs / "with" / RESULTS)
    assert (record["step"], record["task"], record["num_examples"]) == (8, "sst2", NUM_EXAMPLES)
    assert record["scores"].keys() == {"acc", "bits_per_byte"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def points(folder):
        events = EventAccumulator(str(folder))
        events.Reload()
        return [(point.step, point.value) for point in events.Scalars("eval/sst2/bits_per_byte")]

    found = points(runs / "with" / "tensorboard" / "evaluation")
    assert found == [(8, pytest.approx(record["scores"]["bits_per_byte"]["value"]))]
    assert [step for step, _ in points(runs / "with" / "tensorboard")] == [3, 4, 6, 8]


def measure_here(*arguments):
    import contextlib
    import io

    with pytest.raises(ConfigError, match="--window 161"):
        measure_text(TextMeasurement(*arguments[:2], 161, *arguments[3:]), this_rank(), Console(silent=True))
    with contextlib.redirect_stdout(io.StringIO()) as told:
        measure_text(TextMeasurement(*arguments), this_rank(), Console(silent=False))
    return told.getvalue()


def test_perplexity_is_the_same_on_any_number_of_ranks(runs, shards, tmp_path):
    path = tmp_path / "text.jsonl"
    texts = ["some words " * 40, "né", "more of them"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = str(runs / "with")
    one, two = (run_group(world_size, measure_here, run, [str(path)], 64, 16, True, None)[0] for world_size in (1, 2))
    assert one == two
    assert f"3 documents, {sum(len(text.encode()) for text in texts):,} bytes" in one
    assert re.search(r"bits per byte +\d\.\d{6}\n", one)
    assert "windows of 64 tokens, moved by 16, each document by itself" in one


def nll_here(folder, tokenizer, tokens, labels):
    return open_subject(folder, this_rank(), tokenizer).scorer.token_nll(tokens, labels)


@pytest.mark.parametrize("linear_class", [None, "bitlinear", "autobitlinear", "online"])
def test_folders_compute_as_stored(tmp_path, shards, linear_class):
    """A packed folder multiplies its own codes and scales by 8-bit activations, in either convention."""
    from quant.config import BITNET, QuantConfig
    from quant.linear import QuantLinear, quantize_

    write_variant(tmp_path / "hf", "bitnet")
    model = load(tmp_path / "hf")
    if linear_class == "online":
        quantize_(model, BITNET)
        online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
        edit_config(tmp_path / "hf", quantization_config=online)
    elif linear_class:
        quantize_(model, QuantConfig())  # not absmean, which `online` computes
        pack_folder(tmp_path / "hf", linear_class)
    assert any(isinstance(module, QuantLinear) for module in model.modules()) == bool(linear_class)
    tokens = torch.arange(24).view(2, 12)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", 20)
    [found] = run_group(1, nll_here, str(tmp_path / "hf"), str(tokenizer), tokens, tokens + 1)
    with torch.no_grad():
        assert torch.equal(found, model(tokens, tokens + 1, reduction="none").token_nll) or linear_class == "bitlinear"
        assert torch.allclose(found, model(tokens, tokens + 1, reduction="none").token_nll, atol=1e-4)


def write_tokenizer(path, vocab_size):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({chr(0x4E00 + n): n for n in range(vocab_size - 1)}, []))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))
    return path


def test_bad_input_is_one_clear_error(tmp_path, runs, mirror):
    with pytest.raises(ConfigError, match="task 'pika' is not known; did you mean piqa"):
        check_tasks(["pika"], None)
    with pytest.raises(ConfigError, match="--tasks: names no task"):
        check_tasks([], None)
    (tmp_path / "copa_validation.jsonl").touch()
    lacks = r"--task-data: .*lacks openbookqa_validation\.jsonl, sst2_validation\.jsonl; a mirror"
    with pytest.raises(ConfigError, match=lacks):
        check_tasks(["openbookqa", "sst2", "copa"], str(tmp_path))
    with pytest.raises(CheckpointError, match="is not a run with checkpoints"):
        locations_of(str(complete_checkpoints(runs / "with" / "checkpoints")[0]), every=True)
    write_variant(tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"tokenizer was not found \(no tokenizer\.model or tokenizer\.json\).*--tokenizer"
    ):
        open_subject(str(tmp_path / "hf"), Ranks(0, 1, 0, torch.device("cpu")))
    large = write_tokenizer(tmp_path / "tokenizer.json", 500)
    with pytest.raises(DataError, match=r"has 500 tokens and the model \d+; .*another model"):
        open_subject(str(tmp_path / "hf"), Ranks(0, 1, 0, torch.device("cpu")), str(large))


def test_models_are_looked_at_before_data_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "load_rows", lambda task, folder: pytest.fail("data were fetched"))
    write_variant(tmp_path / "hf")
    asked = Evaluation([str(tmp_path / "hf")], ["copa", "piqa"], None, None, None, None)
    with pytest.raises(CheckpointError, match="tokenizer was not found"):
        evaluate(asked, Ranks(0, 1, 0, torch.device("cpu")), Console(silent=True))


def test_results_that_cannot_be_written_are_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    task, subject = choose_tasks(["copa"])[0], SimpleNamespace(identity="a", computation={}, puts_first_token=False)
    with pytest.raises(CheckpointError, match="file: FileExistsError"):
        score_tasks(
            {task: []},
            subject,
            tmp_path / "file" / "scores.json",
            Ranks(0, 1, 0, torch.device("cpu")),
            Console(silent=True),
        )


def test_evaluations_that_write_to_one_file_at_once_lose_nothing(tmp_path):
    out = tmp_path / "scores.json"

    def add(model):
        for number in range(6):
            about = {"model": model, "task": f"task-{number}", "num_examples": 1, "metric": "acc", "scores": {}}
            add_result(out, about)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, "abc"))
    assert len({(record["model"], record["task"]) for record in read_results(out)}) == 18
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_without_the_harness_there_is_advice(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
        check_tasks(["piqa"], None)


def test_configuration_of_tasks_is_checked(shards, tmp_path):
    tree = to_tree(tiny_config(shards, tmp_path))
    for evaluation, message in (
        ({"tasks": ["hellaswga"], "tasks_interval_steps": 5}, r"evaluation.tasks: .*did you mean hellaswag"),
        ({"tasks": ["piqa"]}, r"evaluation.tasks_interval_steps: goes with evaluation.tasks"),
        ({"tasks_interval_steps": 5}, r"evaluation.tasks_interval_steps: goes with evaluation.tasks"),
        ({"tasks": ["piqa"], "tasks_interval_steps": 5, "tasks_limit": 0}, r"evaluation.tasks_limit: is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(tree | {"evaluation": evaluation})
