"""Conversations: their tokens against Transformers', and what the terminal shows."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_folders import write_variant
from models import TINY
from tokenizer_files import write_bytes_tokenizer
from tokenizer_zoo import sentencepiece_tokenizer
from typer.testing import CliRunner

from data.chat_template import ChatTemplate, Message
from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from data.torchvision_repair import repair_torchvision
from launcher.cli import app
from launcher.inference.chat import chat
from launcher.inference.text_model import TextModel

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message['content'] | trim + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
PARTS = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {% endif %}
    {{- message | tojson }}{% generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}
"""
NAMES = ("<|im_start|>", "<|im_end|>", "<s>")
CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be kind & <brief>."},
    {"role": "user", "content": "  Grüße <|im_end|> 😀\n\nnext "},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "?"},
]


def tokenizer_in(folder: Path, template: Any, *, beside: bool = False, **config: Any) -> Tokenizer:
    """A tokenizer of bytes with a chat template, in a file of its own or in the configuration."""
    folder.mkdir(exist_ok=True)
    write_bytes_tokenizer(folder / "tokenizer.json", *NAMES)
    if beside:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("beside", [False, True], ids=["in the configuration", "in a file"])
@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["chatml", "parts"])
def test_tokens_are_those_of_transformers(tmp_path: Path, template: str, beside: bool) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_in(tmp_path, template, beside=beside)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = CONVERSATION[template == PARTS :]
    ours = ChatTemplate(tokenizer).prompt_tokens(messages)
    assert ours == theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.encode_special("<s>a<|im_end|>") == theirs("<s>a<|im_end|>").input_ids


def test_several_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    assert ChatTemplate(tokenizer_in(tmp_path, named)).text(CONVERSATION[-1:], to_answer=False) == (
        "<|im_start|>user\n?<|im_end|>\n"
    )


def test_special_tokens_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=True)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    ids = tokenizer.encode_special("<s>a b</s> c")
    assert [place for place, token in enumerate(ids) if token in (1, 2)] == [0, ids.index(2)]
    assert tokenizer.decode(ids) == "a b c"
    assert tokenizer.encode_special("a b") == tokenizer.encode("a b")
    assert 1 not in tokenizer.encode("<s>")


def test_the_tokens_that_end_an_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, CHATML)
    start, end, begin = (tokenizer.encode_special(name)[0] for name in NAMES)
    assert ChatTemplate(tokenizer).end_tokens() == {end, tokenizer.end_of_document}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, begin]}))
    assert ChatTemplate(tokenizer).end_tokens() == {start, end, begin, tokenizer.end_of_document}
    plain = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (tmp_path / "generation_config.json").unlink()
    assert ChatTemplate(tokenizer_in(tmp_path, plain)).end_tokens() == {tokenizer.end_of_document}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template beside the tokenizer.*--tokenizer FOLDER names.*`tritrain generate` needs none"),
        ("{% if %}", "the chat template is no Jinja template"),
        ([{"name": "tools", "template": "x"}], "no chat template"),
    ],
)
def test_a_template_that_is_none(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(tokenizer_in(tmp_path, template))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "refuses this conversation: no system message"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this conversation: .*unsafe|not safely"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses this conversation: .*unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses this conversation: .*[Rr]ange too big"),
        ("{{ messages[9].content }}", "refuses this conversation"),
    ],
)
def test_a_template_of_a_stranger_reaches_nothing(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(tokenizer_in(tmp_path, template)).text(CONVERSATION, to_answer=True)


class Parrot(TextModel):
    """Answers with what it was told to, and remembers what it was asked."""

    first_token, puts_first_token, tokenizer_problem, weights_bytes = None, False, None, 0

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], context: int = 4096) -> None:
        self.tokenizer, self.asked, self._answers = tokenizer, [], iter(answers)  # type: ignore[var-annotated]
        self.config = replace(TINY, max_sequence_length=context)

    def continuation(self, prompt_tokens: Sequence[int], **choice: Any) -> Iterator[int]:
        assert self.tokenizer is not None
        self.asked.append(self.tokenizer.decode(prompt_tokens))
        yield from self.tokenizer.encode(next(self._answers))


def talked(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, model: Parrot, lines: str, system: str | None = None
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat(model, system=system)
    shown = capsys.readouterr()
    return shown.out, shown.err


def turns(*contents: str, system: str | None = None) -> str:
    roles = [*(["system"] if system else []), *["user", "assistant"] * len(contents)]
    contents = (system, *contents) if system else contents
    return "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in zip(roles, contents, strict=False)) + (
        "<|im_start|>assistant\n"
    )


def test_a_conversation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = Parrot(tokenizer_in(tmp_path, CHATML), ["One.", "T\x1b[2Jwo.", "Three.", "Four."])
    lines = "first\n\nsecond\n/drop\nthird\n/nonsense\n/reset\nfourth"
    out, err = talked(monkeypatch, capsys, model, lines, system="Be kind.")
    assert out == "One.\nT\\x1b[2Jwo.\nThree.\nFour.\n"
    assert "/nonsense: no such command; /exit or Ctrl-D ends" in err
    assert model.asked == [
        turns("first", system="Be kind."),
        turns("first", "One.", "second", system="Be kind."),
        turns("second", "T\x1b[2Jwo.", "third", system="Be kind."),
        turns("fourth", system="Be kind."),
    ]


def test_it_ends_with_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = Parrot(tokenizer_in(tmp_path, CHATML), ["One."])
    assert talked(monkeypatch, capsys, model, "a\n/exit\nb\n")[0] == "One.\n"


def test_a_full_context_loses_no_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tokenizer = tokenizer_in(tmp_path, CHATML)
    model = Parrot(tokenizer, ["One.", "Two.", "Three."], context=60)
    too_many = len(tokenizer.encode_special(turns("a", "One.", "b" * 40)))
    out, err = talked(monkeypatch, capsys, model, "a\n" + "b" * 40 + "\nc\n/drop\nd\n")
    assert out == "One.\nTwo.\nThree.\n"
    assert f"The conversation would have {too_many} tokens, and the model's context is 60, including the answer" in err
    assert model.asked == [turns("a"), turns("a", "One.", "c"), turns("c", "Two.", "d")]
    model = Parrot(tokenizer_in(tmp_path, CHATML), ["x" * (60 - len(tokenizer.encode_special(turns("a"))))], context=60)
    assert "The context of 60 tokens is full" in talked(monkeypatch, capsys, model, "a\n")[1]


def test_a_message_that_cannot_be_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = Parrot(tokenizer_in(tmp_path, CHATML), ["One."])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nb\n"), encoding="utf-8"))
    chat(model, system=None)
    out, err = capsys.readouterr()
    assert out == "One.\n"
    assert "the message is not text" in err
    assert model.asked == [turns("b")]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tokenizer = tokenizer_in(tmp_path, CHATML)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    model = Parrot(tokenizer, ["One.", "Two."])
    real, calls = model.generate_tokens, []

    def interrupted(prompt: Sequence[int], **choice: Any) -> Iterator[int]:
        calls.append(prompt)
        for place, token in enumerate(real(prompt, **choice)):
            if len(calls) == 1 and place == 2:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(model, "generate_tokens", interrupted)
    chat(model, system=None)
    assert capsys.readouterr().out == "On\nTwo.\n"
    assert model.asked[1] == turns("a", "On", "b")


def test_the_command_answers_with_a_real_model(tmp_path: Path) -> None:
    write_variant(tmp_path, "bitnet", vocab_size=260)
    tokenizer_in(tmp_path, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    options = ["--max-tokens", "4", "--temperature", "0", "--dtype", "fp32", "--system", "S"]
    done = CliRunner().invoke(app, ["chat", str(tmp_path), *options], input="a\nb\n")
    assert done.exit_code == 0, done.exception
    assert done.stdout.count("\n") >= 2
    assert "/exit or Ctrl-D ends" in done.stderr
    (tmp_path / "tokenizer_config.json").unlink()
    refused = CliRunner().invoke(app, ["chat", str(tmp_path)], input="a\n")
    assert isinstance(refused.exception, DataError)
