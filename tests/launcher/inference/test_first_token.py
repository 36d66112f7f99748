"""Texts, tasks and samples begin with one token, which Transformers is given too."""

import json
import math

import pytest
import torch
from command import outcome
from hf_folders import edit_config, write_variant
from tiny_tasks import asked
from tokenizer_files import write_bytes_tokenizer

from launcher.inference.load import load_model

BEGIN, END = 256, 257
TEXT = "Some words, once more."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama whose texts begin with `<s>` and whose documents end with another token."""
    folder = tmp_path_factory.mktemp("begin") / "hf"
    write_variant(folder, vocab_size=258)
    edit_config(folder, bos_token_id=BEGIN, eos_token_id=END)
    write_bytes_tokenizer(folder / "tokenizer.json", "<s>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<s>"}))
    return folder


@pytest.fixture(scope="module")
def theirs(folder, transformers):
    """Log-likelihood of a continuation by Transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = load_model(folder).tokenizer.encode

    def log_likelihood(context, continuation, first):
        before, after = [first, *ids(context)], ids(continuation)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        places = torch.arange(len(before) - 1, len(before) + len(after) - 1)
        return log_probabilities[places, torch.tensor(after)].sum().item()

    return log_likelihood


def test_generation_begins_with_the_model_s_first_token(folder):
    assert load_model(folder).prompt_tokens("ab")[0] == BEGIN


@pytest.mark.parametrize("documents", ["--documents", "--stream"])
def test_perplexity_begins_with_it(folder, theirs, tmp_path, documents):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = outcome("perplexity", folder, tmp_path / "text.txt", documents, "--json")
    assert code == 0, err
    [found] = json.loads(out)["results"]
    assert found["first_token"] == BEGIN
    assert found["num_tokens"] == len(TEXT)
    nats = -theirs("", TEXT, BEGIN)
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)
    assert abs(nats + theirs("", TEXT, END)) > 0.01  # the other token would be noticed


@pytest.mark.parametrize("style", ["", "-harness"])
def test_tasks_begin_with_it(folder, theirs, tmp_path, style):
    pytest.importorskip("lm_eval")
    example = asked("Ask:", ["yes", "no"], 1)
    (tmp_path / "copa_validation.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"query": ""}))
    arguments = ["eval", folder, "--tasks", f"copa{style}", "--task-data", tmp_path, "--out", tmp_path / "s.json"]
    code, out, err = outcome(*arguments, "--json")
    assert code == 0, err
    [found] = json.loads(out)["results"]
    bits = [-theirs(context, " no", BEGIN) / math.log(2) / 2 for context in ("Ask:", "")]
    assert found["scores"]["bits_per_byte"]["value"] == pytest.approx(sum(bits) / 2, rel=1e-5)
