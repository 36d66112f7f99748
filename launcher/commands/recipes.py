"""`tritrain init --recipe`: a training recipe in a commented configuration, with the comments of both."""

import re
from pathlib import Path

from launcher.config.file import merge, parse_yaml, read_mapping
from launcher.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"


def recipe_file(name: str) -> Path:
    """The file of a recipe that comes with the project.

    Raises:
        ConfigError: there is none of this name.
    """
    files = {file.stem: file for file in RECIPES.glob("*.yaml")}
    if name not in files:
        raise ConfigError(f"--recipe {name}: there is no such recipe; choose one of {', '.join(sorted(files))}")
    return files[name]


def with_recipe(text: str, recipe: Path) -> str:
    """A configuration with the values of a recipe in the place of its own.

    Args:
        text: YAML, a key of a section on each line.
        recipe: file of a JSON Merge Patch of the same form.

    Raises:
        ConfigError: the file cannot be read, or is not of this form.
    """
    expected = parse_yaml(text, "the configuration")
    merge(expected, read_mapping(recipe, "sections such as schedule and phases"))
    head, sections = _sections(recipe.read_text(encoding="utf-8"))
    opening, merged = _sections(text)
    for name, lines in sections.items():
        merged[name] = lines if name == "phases" else _merged(merged.get(name, [f"{name}:"]), lines[1:])
    body = "\n\n".join("\n".join(lines) for lines in merged.values())
    result = "\n".join([*opening, *head, body]) + "\n"
    if parse_yaml(result, str(recipe)) != expected:
        raise ConfigError(f"{recipe}: is not of the form that --recipe reads: a key of a section on each line")
    return result


def _sections(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The comment at the top, and the lines of each section by its name."""
    head, *blocks = (block.rstrip().splitlines() for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE))
    return head, {lines[0].partition(":")[0]: lines for lines in blocks}


def _merged(section: list[str], patch: list[str]) -> list[str]:
    """The lines of a section with those of a patch in the place of the ones with the same key."""
    lines = list(section)
    for line in patch:
        key, _, value = line.strip().partition(":")
        at = next((index for index, each in enumerate(lines) if re.match(rf"  {key}:", each)), None)
        is_removed = value.partition("#")[0].strip() == "null"
        if at is not None:
            lines[at : at + 1] = [] if is_removed else [line]
        elif not is_removed:
            lines.append(line)
    return lines
