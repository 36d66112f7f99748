"""A study of tiny runs."""

from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_tree


def write_study(folder: Path, shards: Path, sections: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A study file in a folder, and its base: tiny runs, with these sections of the base and keys of the study."""
    tree = tiny_tree(shards, Path("unused"))
    del tree["run"]["folder"]
    tree["schedule"] = {"shape": "wsd", "warmup_steps": 2, "decay_fraction": 0.25}
    for name, section in (sections or {}).items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml"} | keys, sort_keys=False))
    return path
