"""Completion, as a shell asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
source <({tritrain} --show-completion bash)
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_tritrain_completion {tritrain}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tritrain per", ["perplexity"]),
        ("tritrain convert --dry", ["--dry-run"]),
        ("tritrain export RUN --format hf", ["hf", "hf-ternary"]),
    ],
)
def test_bash_completes_commands_options_and_values(words: str, found: list[str]) -> None:
    script = SCRIPT.format(tritrain=Path(sys.executable).with_name("tritrain"), words=words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.stdout.split() == found, done.stderr
