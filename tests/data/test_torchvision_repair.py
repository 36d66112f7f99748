"""The repair lets `streaming` and Transformers' Llama be imported, and keeps out of the way otherwise."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.slow
def test_streaming_and_llama_import_after_the_repair():
    code = """
import contextlib, os, sys
import torch
from data.torchvision_repair import repair_torchvision
if (alone := os.fork()) == 0:
    with open(os.devnull, "w") as sys.stderr, contextlib.suppress(Exception):
        import torchvision
        os._exit(0)
    os._exit(1)
was_needed = os.waitpid(alone, 0)[1] != 0
print([repair_torchvision() == was_needed for _ in range(2)])
import streaming
from transformers.models.llama import modeling_llama
print(streaming.StreamingDataset.__name__, modeling_llama.LlamaForCausalLM.__name__)
"""
    assert run(code) == "[True, True]\nStreamingDataset LlamaForCausalLM"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("VALUE = 1", "False 1"),
        ("raise RuntimeError('another reason')", "another reason"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_healthy_or_otherwise_broken_torchvision_is_left_alone(body, expected, tmp_path):
    (tmp_path / "torchvision.py").write_text(body)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from data.torchvision_repair import repair_torchvision
try:
    print(repair_torchvision(), sys.modules["torchvision"].VALUE, "torch" in sys.modules)
except Exception as error:
    print(error)
"""
    assert run(code).startswith(expected)


def test_nothing_happens_without_torchvision():
    code = """
import sys, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
from data.torchvision_repair import repair_torchvision
print(repair_torchvision(), "torchvision" in sys.modules)
"""
    assert run(code) == "False False"
