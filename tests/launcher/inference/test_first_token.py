"""The token before texts, tasks and samples, and which of them it precedes; Transformers is given the same tokens."""

import json
import math
import shutil

import pytest
import torch
from command import outcome
from hf_folders import edit_config, write_variant
from tiny_tasks import asked
from tokenizer_files import write_bytes_tokenizer

from launcher.inference.load import load_model

BEGIN, END = 256, 257
TEXT = "Some words, once more."


SETTINGS = {"eos_token": "<|endoftext|>", "bos_token": "<s>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama that names `<s>` for the beginning of texts, which its tokenizer does not put there, as those of Qwen."""
    folder = tmp_path_factory.mktemp("begin") / "hf"
    write_variant(folder, vocab_size=258)
    edit_config(folder, bos_token_id=BEGIN, eos_token_id=END)
    write_bytes_tokenizer(folder / "tokenizer.json", "<s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def putting(folder, tmp_path_factory):
    """The same, but its tokenizer puts `<s>` in front of each text, as Llama's."""
    other = tmp_path_factory.mktemp("putting") / "hf"
    shutil.copytree(folder, other)
    (other / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"add_bos_token": True}))
    return other


@pytest.fixture(scope="module")
def theirs(folder, transformers):
    """Log-likelihood of a continuation by Transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = load_model(folder).tokenizer.encode

    def log_likelihood(context, continuation, first):
        before, after = [*first, *ids(context)], ids(continuation)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        places = torch.arange(len(before) - 1, len(before) + len(after) - 1)
        return log_probabilities[places, torch.tensor(after)].sum().item()

    return log_likelihood


def test_generation_begins_with_it_where_the_tokenizer_puts_it(folder, putting):
    assert load_model(putting).prompt_tokens("ab") == [BEGIN, 64, 65]
    assert load_model(folder).prompt_tokens("ab") == [64, 65]
    assert load_model(folder).prompt_tokens("") == [BEGIN]


def test_generation_begins_with_the_token_that_ends_documents(folder, tmp_path):
    """As training does; the tokenizer of an export need not put it there."""
    shutil.copytree(folder, tmp_path / "hf")
    edit_config(tmp_path / "hf", bos_token_id=END)
    assert load_model(tmp_path / "hf").prompt_tokens("ab") == [END, 64, 65]


@pytest.mark.parametrize("documents", ["--documents", "--stream"])
def test_perplexity_begins_with_it_in_any_case(folder, theirs, tmp_path, documents):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = outcome("perplexity", folder, tmp_path / "text.txt", documents, "--json")
    assert code == 0, err
    [found] = json.loads(out)["results"]
    assert found["first_token"] == BEGIN
    assert found["num_tokens"] == len(TEXT)
    nats = -theirs("", TEXT, [BEGIN])
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)
    assert abs(nats + theirs("", TEXT, [END])) > 0.01  # the other token would be noticed


@pytest.mark.parametrize("style", ["", "-harness"])
def test_tasks_begin_with_it_where_the_tokenizer_puts_it_or_nothing_else_precedes(
    folder, putting, theirs, tmp_path, style
):
    pytest.importorskip("lm_eval")
    example = asked("Ask:", ["yes", "no"], 1)
    (tmp_path / "copa_validation.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"query": ""}))
    for model, first in ((folder, []), (putting, [BEGIN])):  # into one file, where they are results of different models
        arguments = ["eval", model, "--tasks", f"copa{style}", "--task-data", tmp_path, "--out", tmp_path / "s.json"]
        code, out, err = outcome(*arguments, "--json")
        assert code == 0, err
        [found] = json.loads(out)["results"]
        bits = [-theirs("Ask:", " no", first), -theirs("", " no", [BEGIN])]
        expected = sum(bits) / math.log(2) / 2 / 2
        assert found["scores"]["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-5)
