"""Training recipes: files that are merged into any configuration, and what `tritrain init --recipe` writes."""

import pytest
import yaml
from command import outcome, tritrain
from places import ROOT

from launcher.commands.recipes import RECIPES, with_recipe
from launcher.config.file import load_config, to_tree
from launcher.errors import ConfigError
from launcher.plan.plan import make_plan

FILES = sorted(RECIPES.glob("*.yaml"))
every_recipe = pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.stem)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@every_recipe
def test_a_recipe_fits_every_shipped_configuration(recipe):
    for config in CONFIGS:
        plan = make_plan(
            load_config(config, [str(recipe), "training.total_steps=40000", "training.total_tokens=null"]), 1
        )
        own = yaml.safe_load(recipe.read_text())
        assert [phase.precision for phase in plan.phases] == [phase["precision"] for phase in own["phases"]]
        assert plan.total_steps == 40_000
        assert plan.config.schedule.shape == own["schedule"]["shape"]


@every_recipe
def test_nothing_is_left_of_another_recipe(recipe):
    base, steps = ROOT / "configs" / "english-4m.yaml", "training.total_steps=1000"
    own = load_config(base, [str(recipe), steps])
    for before in FILES:
        both = load_config(base, [str(before), str(recipe), steps])
        assert (both.optimizer, both.schedule, both.phases) == (own.optimizer, own.schedule, own.phases), before.stem


@every_recipe
def test_init_writes_what_the_files_merge_to(tmp_path, recipe):
    options = ("--size", "20M", "--gpus", 1, "--gpu", "H100", "--data", "shards")
    tritrain("init", tmp_path / "plain.yaml", *options)
    tritrain("init", tmp_path / "run.yaml", *options, "--recipe", recipe.stem)
    written = load_config(tmp_path / "run.yaml")
    merged = load_config(tmp_path / "plain.yaml", [str(recipe), "run.name=run"])
    assert to_tree(written) == to_tree(merged)
    text = (tmp_path / "run.yaml").read_text()
    assert "null" not in text
    for line in recipe.read_text().splitlines():
        assert not line.startswith("#") or line in text


def test_a_recipe_that_is_not_there(tmp_path):
    options = ("--size", "20M", "--data", "x", "--gpus", 1)
    code, _, said = outcome("init", tmp_path / "x.yaml", "--recipe", "mion", *options)
    assert code == 2
    assert "--recipe mion: there is no such recipe; choose one of cooldown-fusion, late-switch, muon," in said
    assert not (tmp_path / "x.yaml").exists()


def test_keys_of_a_patch_take_the_place_of_the_same_ones(tmp_path):
    (tmp_path / "r.yaml").write_text("# why\na:\n  x: 2   # two\n  y: null\n  w: 4\nphases: [1]\nb:\n  z: 5\n")
    text = with_recipe("# head\na:\n  x: 1 # one\n  y: 3\n\nphases:\n  - 7\n", tmp_path / "r.yaml")
    assert text == "# head\n# why\na:\n  x: 2   # two\n  w: 4\n\nphases: [1]\n\nb:\n  z: 5\n"


def test_a_patch_of_another_form_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("a: {x: 2}\n")
    with pytest.raises(ConfigError, match="is not of the form that --recipe reads"):
        with_recipe("a:\n  x: 1\n  y: 3\n", tmp_path / "r.yaml")
