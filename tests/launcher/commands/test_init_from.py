"""`tritrain init --from`: configurations that go on with a model of another program, of what it says of itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_files import NAMES, pair, prepare_chats, prepare_pairs, some_chats
from command import outcome, tritrain
from hf_folders import ModelSource, pack_folder
from models import FAMILIES, build
from tiny import write_corpus
from tokenizer_files import write_bytes_tokenizer

from data.config import PrepareConfig
from data.shards import prepare
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.formats.hf_folder import write_hf
from launcher.formats.open import model_of, open_source
from launcher.formats.start import check_start, open_start
from launcher.inference.vocabulary import grow_vocabulary_
from launcher.plan.inputs import missing_inputs
from launcher.plan.plan import make_plan


def model_in(folder: Path, variant: str = "llama", **changes: object) -> Path:
    model = replace(FAMILIES[variant], **changes)  # type: ignore[arg-type]
    write_hf(ModelSource(build(model)), model, folder, torch.float32)
    write_bytes_tokenizer(folder / "tokenizer.json", *NAMES)
    return folder


def init(to: Path, start: Path, data: Path | str, *options: object) -> Config:
    tritrain("init", to, "--from", start, "--data", data, "--gpus", 0, *options)
    return load_config(to)


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_the_model_is_the_one_of_the_folder(tmp_path: Path, variant: str) -> None:
    start = model_in(tmp_path / "model", variant)
    config = init(tmp_path / "a.yaml", start, "later")
    described = model_of(source := open_source(str(start)))
    assert config.model == described
    check_start(source, plan := make_plan(config, 1))
    [phase] = plan.phases
    assert (phase.precision, phase.objective, phase.transition.optimizer) == ("ternary", "next-token", "reset")
    assert phase.distillation is not None
    assert phase.distillation.teacher == config.checkpoint.start_from == str(start)
    assert config.data.sequence_length == min(2048, config.model.max_sequence_length)
    assert f"--tokenizer {start} --sequence-length" in (tmp_path / "a.yaml").read_text()


def test_text_is_tokenized_as_the_model_knows_it(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model", vocab_size=320)
    (tmp_path / "text.txt").write_text("some text")
    config = init(tmp_path / "a.yaml", start, tmp_path / "text.txt", "--tokens", "1M")
    assert config.data.prepare is not None
    assert config.data.prepare.tokenizer == str(start)
    assert missing_inputs(config) == []
    assert config.training.total_tokens == 10**6


def test_chats_and_pairs_fine_tune(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model", vocab_size=320, max_sequence_length=128)
    chats = prepare_chats(tmp_path, 96, *some_chats(300), validation_fraction=0.1)
    config = init(tmp_path / "chats.yaml", start, chats)
    assert missing_inputs(config) == []
    assert config.data.validation_rows > 0
    plan = make_plan(config, 1)
    assert [(phase.precision, phase.objective) for phase in plan.phases] == [("16-bit", "sft"), ("ternary", "sft")]
    assert [curve.peak for curve in plan.curves] == [1e-5, 1e-4]
    assert plan.curves[1].origin == plan.phases[1].start
    assert open_start(plan)[1] is False
    pairs = prepare_pairs(tmp_path, 96, *[pair(f"{index}?", "a", "b") for index in range(50)])
    config = init(tmp_path / "pairs.yaml", start, pairs)
    assert config.data.validation_rows == 0  # the folder has none
    plan = make_plan(config, 1)
    assert [(phase.precision, phase.objective) for phase in plan.phases] == [("16-bit", "dpo")]


def test_tokens_that_the_data_have_more_get_rows(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model", vocab_size=256, max_sequence_length=128)
    config = init(tmp_path / "a.yaml", start, prepare_chats(tmp_path, 96, *some_chats(300)))
    assert (config.model.vocab_size, config.checkpoint.grow_vocabulary) == (384, True)
    assert "128 rows more" in (tmp_path / "a.yaml").read_text()
    source, _ = open_start(make_plan(config, 1), complete=lambda source: grow_vocabulary_(source, config) and None)
    assert source.shapes["model.embed_tokens.weight"][0] == 384


def test_a_ternary_model_stays_ternary(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model", "bitnet", max_sequence_length=128)
    pack_folder(start, "autobitlinear")
    config = init(tmp_path / "a.yaml", start, "later")
    [phase] = make_plan(config, 1).phases
    assert phase.quantization is not None
    assert (phase.quantization.weights, phase.transition.ramp.steps, phase.distillation) == ("absmean", 0, None)


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model")
    for options, said in (
        (("--gpus", 0), "--data: missing; --from needs to know it"),
        (("--gpus", 0, "--data", "x", "--size", "1B"), "--size: not with --from, which names a model; leave it out"),
    ):
        code, _, error = outcome("init", tmp_path / "a.yaml", "--from", start, *options)
        assert (code, said in error) == (2, True), error
    code, _, error = outcome("init", tmp_path / "a.yaml", "--from", tmp_path, "--gpus", 0, "--data", "x")
    assert "not a checkpoint of a known kind" in error
    assert not (tmp_path / "a.yaml").exists()


def test_data_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    start = model_in(tmp_path / "model", vocab_size=320, max_sequence_length=128)
    write_corpus(tmp_path / "text.jsonl", num_documents=60)
    config = PrepareConfig(inputs=(str(tmp_path / "text.jsonl"),), tokenizer="bpe:300")
    prepare(config, 96, tmp_path / "data")
    with pytest.raises(ConfigError, match=f"--from {start}: its tokenizer, .* is another than that of the data"):
        init(tmp_path / "a.yaml", start, tmp_path / "data")
    assert not (tmp_path / "a.yaml").exists()
