"""Tools in chats: rendered as Transformers renders them, from files of every kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_files import NAMES, write_chats
from tokenizer_files import write_bytes_tokenizer

from data.chat_template import ChatTemplate
from data.chats import ChatEncoder
from data.config import PrepareConfig
from data.marks import COUNTS, ids_of
from data.pairs import PairEncoder
from data.readers import RECORDS
from data.shards import prepare
from data.tokenizer import load_tokenizer
from data.torchvision_repair import repair_torchvision

TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""In the manner of Qwen 2.5's."""


def schema(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": "Grüße & <b>", "parameters": parameters}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [schema("weather", city={"type": "string", "enum": ["Bern", "Zürich"]}), schema("add", a={"type": "number"})]
CALLING = [
    {"role": "user", "content": "Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Bern"), call("add", a=1.5)]},
    {"role": "tool", "name": "weather", "content": "12 °C"},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "It has 12 °C."},
]


def template_in(folder: Path) -> ChatTemplate:
    folder.mkdir(exist_ok=True)
    write_bytes_tokenizer(folder / "tokenizer.json", *NAMES)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ChatTemplate(load_tokenizer(folder))


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_they_are_rendered_as_transformers_renders_them(tmp_path: Path, tools: Any) -> None:
    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    ours = template_in(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for answer in (False, True):
        assert ours.text(CALLING, tools, to_answer=answer) == theirs.apply_chat_template(
            CALLING, tools=tools, tokenize=False, add_generation_prompt=answer
        )
    ids, counts = ChatEncoder(ours, 4096, "error").encode_chat(CALLING, tools)
    assert ids.tolist() == theirs.apply_chat_template(CALLING, tools=tools)
    expected = np.zeros(len(ids), bool)  # the calls, and the answer to what came back
    for place in (1, 4):
        before = theirs.apply_chat_template(CALLING[:place], tools=tools, add_generation_prompt=True)
        expected[len(before) : len(theirs.apply_chat_template(CALLING[: place + 1], tools=tools))] = True
    assert counts.tolist() == expected.tolist()
    counted = ours.tokenizer.decode(ids[counts].tolist())
    assert counted.startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}')
    assert counted.endswith("It has 12 °C.<|im_end|>\n")


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    """A table fills in the keys of other rows, which are left out again, and holds tools as text."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    template_in(tmp_path / "tokenizer")
    plain = {"messages": [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c"}]}
    calls = [call("weather", city=city) for city in ("Bern", "Zürich")]
    calling = {"messages": [CALLING[0], {"role": "assistant", "tool_calls": calls}, *CALLING[2:]], "tools": TOOLS}
    records = [calling, plain]
    as_text = [each | {"tools": json.dumps(each["tools"]) if "tools" in each else None} for each in records]
    write_chats(tmp_path / "chats.jsonl", *records)
    write_chats(tmp_path / "text.jsonl", *as_text)
    parquet.write_table(pyarrow.Table.from_pylist(as_text), tmp_path / "chats.parquet")
    rows = []
    for name in ("chats.jsonl", "text.jsonl", "chats.parquet"):
        config = PrepareConfig(inputs=(str(tmp_path / name),), tokenizer=str(tmp_path / "tokenizer"), content="chats")
        out = tmp_path / name.replace(".", "-")
        manifest = prepare(config, 1024, out)
        [shard] = sorted((out / "train").glob("shard*"))
        rows.append((manifest["splits"]["train"]["counted_tokens"], shard.read_bytes()))
    assert rows[0] == rows[1] == rows[2]


def test_pairs_have_them_too(tmp_path: Path) -> None:
    ours = template_in(tmp_path)
    _, pair_of = RECORDS["pairs"]
    chosen, rejected = CALLING[1], {"role": "assistant", "content": "no"}
    record = {"prompt": CALLING[:1], "chosen": [chosen], "rejected": [rejected], "tools": TOOLS}
    tokens = PairEncoder(ours, 4096, "error").marked(json.loads(pair_of(record, "x")))
    ids = ours.tokenizer.encode_special(ours.text([CALLING[0], chosen], TOOLS, to_answer=False))
    assert ids_of(tokens)[: len(ids)].tolist() == ids
    assert np.count_nonzero(tokens & np.uint32(COUNTS))


def test_chats_without_tools_are_as_they_were() -> None:
    """What is held out depends on the text of a chat, so that of others must not change."""
    _, chat_of = RECORDS["chats"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools in ({}, {"tools": None}, {"tools": []}, {"tools": ""}):
        assert chat_of({"messages": messages} | tools, "x") == json.dumps(messages)
