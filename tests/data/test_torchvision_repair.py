"""The repair lets `streaming` and Transformers' Llama be imported, and keeps out of the way otherwise."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


def test_streaming_and_llama_import_after_the_repair():
    code = """
from data.torchvision_repair import repair_torchvision
print(repair_torchvision(), repair_torchvision())
import streaming
from transformers.models.llama import modeling_llama
print(streaming.StreamingDataset.__name__, modeling_llama.LlamaForCausalLM.__name__)
"""
    alone = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torchvision"], capture_output=True, check=False
    )
    was_needed = alone.returncode != 0
    assert run(code) == f"{was_needed} {was_needed}\nStreamingDataset LlamaForCausalLM"


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
