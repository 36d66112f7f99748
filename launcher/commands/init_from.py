"""`tritrain init --from`: write a commented configuration that goes on with a model of another program.

The section `model` is read from the folder. Phases follow from the data and from the model: text makes a 16-bit model
ternary, chats fine-tune it first, pairs are preferences; a model that is ternary already stays so.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.prepared import MANIFEST, TRAIN, content_of, read_manifest
from launcher.commands.init import (
    VOCABULARY_MULTIPLE,
    InitOptions,
    commented,
    describe_data,
    parse_count,
    run_name,
    write_checked,
)
from launcher.config.file import to_tree
from launcher.errors import ConfigError
from launcher.formats.open import computed_precision, described_model, open_source
from launcher.formats.vocabularies import vocabulary_problem
from launcher.plan.gpus import gpu_of_this_machine, named_gpu
from launcher.plan.proposal import FEWEST_STEPS, Tree, Wish, propose
from launcher.process.console import Console
from model.config import ModelConfig
from model.size import num_parameters

TOKENS_OF_TEXT = 300_000_000
EPOCHS = {"text": 1, "chats": 3, "pairs": 1}
SEQUENCE_LENGTH = 2048
RATES = {"chats": 1e-5, "pairs": 1e-6}
TERNARY_RATE = 1e-4
PROMPTS = {"text": "The", "chats": "What is 2 + 2?", "pairs": "What is 2 + 2?"}


def write_configuration_from(to: Path, start: str, options: InitOptions, console: Console) -> None:
    """Write a configuration that `tritrain plan` accepts.

    Args:
        to: the YAML file, which must not exist.
        start: folder of the model.
        options: as they were given.
        console: to print to.

    Raises:
        ConfigError: the file exists, an option is missing or wrong, or it does not fit into memory.
        CheckpointError: the folder holds no model that can be read.
    """
    if to.exists():
        raise ConfigError(f"{to}: exists, and nothing is overwritten; name another file")
    if unfit := [f"--{name}" for name in ("size", "recipe") if getattr(options, name) is not None]:
        raise ConfigError(f"{' and '.join(unfit)}: not with --from, which names a model; leave it out")
    if missing := [f"--{name}" for name in ("data", "gpus") if getattr(options, name) is None]:
        raise ConfigError(f"{' and '.join(missing)}: missing; --from needs to know it")
    assert options.data is not None
    assert options.gpus is not None
    source = open_source(start)
    described = described_model(source)
    if described is None:
        raise ConfigError(
            f"--from {start}: is no folder of Hugging Face. To go on with a run, copy its config.yaml, and set "
            "checkpoint.start_from and run.name"
        )
    model = described.config
    precision = computed_precision(source)
    manifest = read_manifest(Path(options.data)) if (Path(options.data) / MANIFEST).is_file() else None
    data = describe_data(options.data, start, model.vocab_size, min(SEQUENCE_LENGTH, model.max_sequence_length))
    content = "text" if manifest is None else content_of(manifest)
    if manifest and (problem := vocabulary_problem(source, Path(options.data, manifest["tokenizer"]["file"]))):
        raise ConfigError(f"--from {start}: {problem}")
    rows = model.vocab_size
    if data.vocab_size > rows:
        rows = VOCABULARY_MULTIPLE * -(-data.vocab_size // VOCABULARY_MULTIPLE)
    least = FEWEST_STEPS * max(1, options.gpus) * data.sequence_length
    if options.tokens is not None:
        tokens, length_reason = parse_count(options.tokens, "--tokens"), "as asked for"
    elif manifest is None:
        tokens, length_reason = TOKENS_OF_TEXT, "shows whether it works; BitDistill has 10 billion (arXiv 2510.13998)"
    else:
        epochs = EPOCHS[content]
        tokens = max(least, epochs * manifest["splits"][TRAIN]["rows"] * data.sequence_length)
        length_reason = (
            f"all of the data {'once' if epochs == 1 else f'{epochs} times'}, and {FEWEST_STEPS} steps at least"
        )
    name, gpu = named_gpu(options.gpu) if options.gpu else gpu_of_this_machine() or named_gpu("H100")
    architecture = _differing(model) | {"vocab_size": rows}
    wish = Wish(
        num_parameters=num_parameters(model),
        num_tokens=tokens,
        num_gpus=options.gpus,
        gpu=gpu,
        engine=options.engine or "fsdp2",
        vocab_size=rows,
        sequence_length=data.sequence_length,
        model=architecture,
    )
    tree = propose(wish)
    tree["optimizer"]["learning_rate"] = RATES.get(content, tree["optimizer"]["learning_rate"] / 2)
    about: Tree = {
        "start": start,
        "start_from": json.dumps(start),
        "architecture": {key: json.dumps(value) for key, value in architecture.items()},
        "grows": rows - model.vocab_size,
        "content": content,
        "is_ternary": precision is not None and precision.quantization is not None,
        "length_reason": length_reason,
        "rate_reason": "fine-tuning takes a small one" if content in RATES else "half of what pretraining takes",
        "ternary_rate": TERNARY_RATE,
        "prompt": json.dumps(PROMPTS[content]),
    }
    write_checked(to, commented(tree, wish, data, run_name(to), name, "init_from.yaml.j2", **about), wish, console)


def _differing(model: ModelConfig) -> dict[str, Any]:
    """The keys of a model that are required, or differ from their defaults."""
    tree = to_tree(model)
    return {field.name: tree[field.name] for field in fields(model) if getattr(model, field.name) != field.default}
