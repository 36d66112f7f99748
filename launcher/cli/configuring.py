"""Commands on configurations."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import Overrides, local_target, path
from launcher.config.engine import EngineName
from launcher.process.console import Console


def init(
    to: Annotated[str, typer.Argument(help="YAML file to write; must not exist.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="Parameters, such as 350M.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs; 0 trains on the CPU.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as H100; by default this machine's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens, such as 7B; by default 20 for each parameter.")] = None,
    data: Annotated[str | None, typer.Option(help="A prepared folder, text, or hf:NAME[:CONFIG]:SPLIT.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Engine; default: fsdp2.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Phases, schedule and optimizer of a recipe in configs/recipes, such as muon.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Go on with the model in this folder of Hugging Face.")
    ] = None,
) -> None:
    """Write a commented configuration for a model size, or for a model; asks for what is not given."""
    from launcher.commands.init import InitOptions, write_configuration
    from launcher.commands.init_from import write_configuration_from

    options = InitOptions(size=size, tokens=tokens, gpus=gpus, gpu=gpu, data=data, engine=engine, recipe=recipe)
    if start is None:
        write_configuration(local_target(to, "TO"), options, Console(silent=False))
    else:
        write_configuration_from(local_target(to, "TO"), start, options, Console(silent=False))


def explain(
    key: Annotated[str, typer.Argument(help="A key such as schedule.warmup_steps, or a section.", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(parser=path, help="Also print the value in this configuration.")
    ] = None,
) -> None:
    """Explain a key of the configuration: its type, its default and its meaning."""
    from launcher.commands.explain import explain as explain_key

    explain_key(key, config, overrides or [], Console(silent=False))


def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from launcher.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
