"""What differs between the configurations of two versions."""

from pathlib import Path

import pytest
from tiny import tiny_config

from launcher.config.file import to_tree
from launcher.config.sections import Config
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


def with_dtype(dtype: str) -> Config:
    return tiny_config(Path("shards"), Path("run"), training={"compute_dtype": dtype})


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_auto_differs_from_nothing(dtype: str) -> None:
    assert changes(to_tree(with_dtype("auto")), with_dtype(dtype)) == []  # a converted run that has not trained
    assert changes(to_tree(with_dtype(dtype)), with_dtype("auto")) == []


def test_auto_is_a_change_of_a_key_that_cannot_be_auto() -> None:
    before = to_tree(with_dtype("fp32"))
    before["optimizer"]["amsgrad"] = "auto"
    assert [change.key for change in changes(before, with_dtype("fp32"))] == ["optimizer.amsgrad"]
