"""Names and texts that an attacker would write into a file, and seals that make such a file look whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE_NAMES: tuple[Any, ...] = (
    "", ".", "..", " ", "...", ". .",
    "../x", "../../../home/u/.bashrc", "a/b", "a/../../x", "/etc/passwd", "//x", "./x", "x/",
    "..\\x", "a\\b", "\\\\host\\share", "C:", "c:x", "C:\\x", "file:///etc/passwd", "~/x",
    "\0", "x\0.mds", "x\n", "\nx", "x\r", "\t", "\x1b[2J", "\x1b]0;title\x07x", "x\x7f", "\x9b2J",
    "\u202ex", "x\u200b", "\ufeffx", "\u2028", "\ud800", "x\ue000",
    "\uff0fetc", "..\uff0fx", "\u2025", "\uff0e\uff0e", "\u2024.", "a\uff3cb", "\ufe68", "\uff23\uff1ax",
    "x" * 256, "x" * 100_000, "\u00e4" * 128,
    None, 5, True, [], ["x"], {}, {"x": 1},
)  # fmt: skip
"""Of what should be the bare name of a file: none is."""

BARE_NAMES = (
    "shard.00000.mds", "tokenizer.model", "model-00001-of-00002.safetensors", "global_step10", "epoch=1-step=3.ckpt",
    ".hidden", "a b", "...x", "x..", "2026-11-26T03:48", "naïve", "模型.safetensors", "x" * 255,
)  # fmt: skip


def edited(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def reseal(folder: Path) -> None:
    """Make the manifest of a prepared folder vouch for its indexes, as whoever wrote both would."""

    def vouch(manifest: Any) -> None:
        for split, facts in manifest["splits"].items():
            facts["fingerprint"] = hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest()

    edited(folder / "manifest.json", vouch)
