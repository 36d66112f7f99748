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
repair_torchvision()
repair_torchvision()
import streaming
from transformers.models.llama import modeling_llama
print(streaming.StreamingDataset.__name__, modeling_llama.LlamaForCausalLM.__name__)
"""
    assert run(code) == "StreamingDataset LlamaForCausalLM"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("VALUE = 1", "1"),
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
    repair_torchvision()
    print(sys.modules["torchvision"].VALUE, "torch" in sys.modules)
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
repair_torchvision()
print("torchvision" in sys.modules)
"""
    assert run(code) == "False"
