"""What differs between the configurations of two versions."""

from pathlib import Path

from tiny import tiny_config

from launcher.config.file import to_tree
from launcher.run.changes import changes


def test_a_key_of_a_later_version_counts_as_its_default(tmp_path: Path) -> None:
    config = tiny_config(Path("shards"), tmp_path)
    before = to_tree(config)
    del before["optimizer"]["eps"], before["model"]["sub_norm"]
    assert changes(before, config) == []
    other = tiny_config(Path("shards"), tmp_path, optimizer={"learning_rate": 3e-3, "eps": 1e-5})
    assert [(change.key, change.before) for change in changes(before, other)] == [("optimizer.eps", "1e-08")]


def test_a_key_of_an_earlier_version_is_a_change(tmp_path: Path) -> None:
    config = tiny_config(Path("shards"), tmp_path)
    before = to_tree(config)
    before["optimizer"]["amsgrad"] = True
    found = [(change.key, change.before, change.now) for change in changes(before, config)]
    assert found == [("optimizer.amsgrad", "true", "not set")]
