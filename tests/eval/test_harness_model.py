"""Any task of lm-evaluation-harness on our model, against its own `hf` model, example by example."""

import contextlib
import json
import shutil
from functools import partial

import pytest
import torch
from harness_examples import LONG, write_examples
from hf_folders import ModelSource
from tokenizer_files import write_bytes_tokenizer

from data.errors import DataError
from data.torchvision_repair import repair_torchvision
from eval.errors import NotFiniteError
from eval.rows import Scorer
from eval.sample import generate
from launcher.formats.hf_folder import write_hf
from model.transformer import ModelConfig, Transformer

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
from eval.harness_model import HarnessModel, Writer
from eval.harness_tasks import FEWSHOT_SEED, load_tasks

WINDOW = 384
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if loop.last and continue_final_message %}{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")


def make_model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96, max_sequence_length=WINDOW
    )
    model = Transformer(config)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else noise * 0.2
    return config, model


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(tmp_path_factory, request):
    """A random Llama in a folder; its tokenizer puts nothing in front of a text, or `<s>`."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("hf") / "model"
    config, model = make_model()
    write_hf(ModelSource(model), config, folder, torch.float32)
    names = ["<s>", "<|im_start|>", "<|im_end|>"]
    write_bytes_tokenizer(folder / "tokenizer.json", *names)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    if request.param == "bos":
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model


def models_of(folder, add_bos_token=None):
    """Ours and theirs, on the same weights."""
    repair_torchvision()
    from lm_eval.models.huggingface import HFLM

    path, model = folder
    theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, add_bos_token=add_bos_token)
    return ours_of(model, theirs.tokenizer, add_bos_token), theirs


def ours_of(model, tokenizer, add_bos_token=None, nll=None):
    def both(tokens, labels):
        found = model(tokens, labels, reduction="greedy")
        return found.token_nll, found.token_misses

    scorer = Scorer(
        lambda tokens, labels: model(tokens, labels, reduction="none").token_nll,
        WINDOW,
        batch_tokens=512,
        token_nll_and_misses=nll or both,
    )
    writer = Writer(partial(generate, model), contextlib.nullcontext)
    return HarnessModel(scorer, writer, tokenizer, [tokenizer.eos_token_id], add_bos_token)


def answers(model, names, data, num_fewshot=None, system_instruction=None, chat=False):
    """What lm-evaluation-harness makes of a model's answers; `simple_evaluate` does the same, and looks for git."""
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(names, data, num_fewshot)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    return evaluate(
        model,
        vars(loaded),
        bootstrap_iters=10,
        system_instruction=system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )


def assert_equal(ours, theirs):
    """All answers of all examples, and all scores."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    for name in ours["samples"]:
        for found, expected in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert found["arguments"] == expected["arguments"]
            for [mine], [other] in zip(found["resps"], expected["resps"], strict=True):
                if isinstance(mine, tuple):
                    assert mine == (pytest.approx(other[0], rel=2e-6), other[1])
                elif isinstance(mine, float):
                    assert mine == pytest.approx(other, rel=2e-6)
                else:
                    assert mine == other
    for name, expected in theirs["results"].items():
        for key, value in expected.items():
            found = ours["results"][name][key]
            assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (name, key)


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["arc_challenge"], {}),
        (["arc_challenge"], {"num_fewshot": 2}),
        (["lambada_openai"], {}),
        (["wikitext"], {}),
        (["gsm8k"], {"num_fewshot": 2}),
        (["triviaqa"], {}),
        (["wmdp"], {}),
        (["arc_challenge", "triviaqa"], {"chat": True, "num_fewshot": 1, "system_instruction": "Be brief."}),
    ],
    ids=["choices", "few-shot", "log-likelihood", "rolling", "generate", "several answers", "group", "chat"],
)  # fmt: skip
def test_answers_equal_those_of_the_harness_s_own_hf_model(folder, tmp_path, names, asked):
    data = write_examples(tmp_path / "data")
    if "triviaqa" in names and "num_fewshot" in asked:
        shutil.copy(data / "triviaqa_validation.jsonl", data / "triviaqa_train.jsonl")
    ours, theirs = models_of(folder)
    assert_equal(answers(ours, names, data, **asked), answers(theirs, names, data, **asked))
