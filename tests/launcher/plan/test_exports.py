"""What the plan says of exports, compared with the exports themselves."""

import json
import struct
from dataclasses import replace
from importlib.util import find_spec

import pytest
from exports import ternary_config, write_checkpoint
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import narrow, random_model, read_tensors
from places import ROOT
from tiny import tiny_config
from tokenizer_zoo import LOSSLESS

from data.errors import DataError
from data.tokenizer import train_tokenizer
from launcher.commands.export import ExportOptions, export_checkpoint
from launcher.config.file import load_config
from launcher.errors import CheckpointError
from launcher.plan.course import make_course
from launcher.plan.exports import exports_of, gguf_tokenizer_problems, tokenizer_problems
from launcher.process.console import Console
from quant.gguf import BLOCK_BYTES, BLOCK_WIDTHS, ggml_type
from quant.linear import add_learned_scales_

BITNET = {"preset": "bitnet-b1.58"}
NARROW = narrow("bitnet")
CASES = {
    "bitnet": (NARROW, BITNET),
    "odd widths": (replace(NARROW, hidden_size=192, num_heads=3, num_kv_heads=3, intermediate_size=320), BITNET),
    "odd intermediate size": (replace(NARROW, intermediate_size=288), BITNET),
    "rows no multiple of 4": (replace(NARROW, intermediate_size=258), BITNET),
    "no such family": (replace(NARROW, qk_norm="full"), BITNET),
    "no such activation": (replace(NARROW, activation="relu2"), BITNET),
    "own head": (replace(NARROW, tie_embeddings=False), BITNET),
    "qwen2": (narrow("qwen2"), BITNET),
    "learned scales": (narrow("llama"), {"preset": "paretoq"}),
    "rotated": (narrow("llama"), {"preset": "bitnet-v2"}),
    "normalized": (narrow("llama"), {"preset": "nielsen-2025"}),
    "groups": (narrow("llama"), {"granularity": "group", "group_size": 128}),
    "int3": (narrow("llama"), {"levels": "int3", "weights": "absmax"}),
    "part": (narrow("llama"), {"include": r"mlp\.\w+_proj$"}),
}
SHORT = ("bitnet", "odd widths", "no such family", "learned scales")


def options_of(name):
    """The options of `tritrain export` that an export's name stands for."""
    words = name.split()
    given = dict(zip((word.removeprefix("--").replace("-", "_") for word in words[1::2]), words[2::2], strict=True))
    given["block_type"] = given.pop("type", None)
    nothing = dict.fromkeys(("weights", "dtype", "linear_class", "embeddings", "tokenizer"))
    return ExportOptions(**nothing | {"into": words[0], "no_tokenizer": False} | given)


def stored_bytes(path):
    """Bytes of all tensors in a GGUF file or a folder of safetensors."""
    if path.is_file():
        return sum(tensor.data.size for tensor in read_tensors(path)[0].values())
    total = sum(file.stat().st_size for file in path.glob("*.onnx.data"))
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        header.pop("__metadata__", None)
        total += max(entry["data_offsets"][1] for entry in header.values())
    return total


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in SHORT else pytest.mark.slow) for case in CASES]
)
def test_the_plan_says_of_every_export_what_the_export_does(shards, tmp_path, case):
    model, quantization = CASES[case]
    config = ternary_config(shards, tmp_path / "run", model, quantization)
    made = random_model(config.model)
    recipe = config.phases[1].quantization
    if recipe.learned:
        add_learned_scales_(made, recipe)
    write_checkpoint(config, made, step=8, phase=1)
    for export in exports_of(make_course(config)):
        if export.name == "onnx" and find_spec("onnx") is None:
            continue
        to = tmp_path / export.name.replace(" ", "_")
        if export.problems:
            with pytest.raises((CheckpointError, DataError)) as caught:
                export_checkpoint(str(tmp_path / "run"), to, options_of(export.name), Console(silent=True))
            assert any(problem in str(caught.value) for problem in export.problems), (export, str(caught.value))
        else:
            export_checkpoint(str(tmp_path / "run"), to, options_of(export.name), Console(silent=True))
            assert stored_bytes(to) == pytest.approx(export.num_bytes, rel=1e-3), export.name


def test_the_quickstart_has_every_export_but_one_that_has_no_subln():
    course = make_course(load_config(ROOT / "configs" / "quickstart.yaml"))
    assert [export.name for export in exports_of(course) if export.problems] == ["mlx"]


def test_blocks_are_as_large_as_ggml_has_them():
    for kind in BLOCK_WIDTHS.keys() - {"q2_0"}:  # which the package does not know
        assert GGML_QUANT_SIZES[ggml_type(kind)] == (BLOCK_WIDTHS[kind], BLOCK_BYTES[kind])


def test_a_run_that_ends_in_16_bits_or_on_its_ramp_has_no_codes(shards, tmp_path):
    def named(phases):
        config = tiny_config(shards, tmp_path, phases=phases, model={"intermediate_size": 52})
        return {export.name: export.problems for export in exports_of(make_course(config))}

    dense = named([{"precision": "16-bit", "steps": 9}])
    assert dense["hf"] == []
    assert dense["gguf --type f16"] == []
    assert dense["hf-ternary"] == ["the last phase is in 16 bits, so the model has no codes"]
    assert "the last phase is in 16 bits, so the model has no codes" in dense["gguf --type tq2_0"]
    ramp = named([{"precision": "ternary", "steps": 9, "transition": {"ramp": {"steps": 9}}}])
    assert ramp["hf --weights latent"] == []
    assert ramp["hf-ternary"] == ["the last phase ends on its ramp, where the model computes with more than its codes"]
    assert named([{"precision": "ternary", "steps": 9, "transition": {"ramp": {"steps": 8}}}])["hf-ternary"] == []


def test_tokenizers_that_other_programs_do_not_read_alike(shards, tmp_path):
    def problems(tokenizer, folder="nowhere"):
        prepare = {"inputs": ["python-stdlib"], "tokenizer": tokenizer}
        config = tiny_config(tmp_path / folder, tmp_path, data={"prepare": prepare})
        return tokenizer_problems(config), gguf_tokenizer_problems(config)

    train_tokenizer(["some words, some more words"] * 9, "unigram:269", tmp_path / "unigram.model")
    LOSSLESS["gpt2-prefix.json"](tmp_path / "tokenizer.json")
    assert problems("bpe:320") == ([], [])
    assert "is a unigram model" in problems("unigram:320")[0][0]
    assert "is a unigram model" in problems(str(tmp_path / "unigram.model"))[0][0]
    assert problems(str(tmp_path / "tokenizer.json"))[0] == []
    assert "divides texts into words in a way of its own" in problems(str(tmp_path / "tokenizer.json"))[1][0]
    LOSSLESS["gpt2.json"](tmp_path / "tokenizer.json")
    assert problems(str(tmp_path / "tokenizer.json")) == ([], [])
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a tokenizer of the `tokenizers` library" in problems(str(tmp_path / "tokenizer.json"))[1][0]
    assert tokenizer_problems(tiny_config(shards, tmp_path)) == []
