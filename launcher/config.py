"""The configuration of a run: one YAML file, ``a.b=value`` overrides, checked as a whole before anything is built.

Each folder owns its part as a frozen dataclass that checks itself and lists its problems in a ``ValueError`` of
``{key: what is wrong and what would be right}``. This module composes the parts, lets pydantic read them strictly
(no coercion, unknown keys are errors), adds the rules that span several parts, and reports every problem at once.
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from data.loader import DataConfig
from launcher.engine import EngineConfig
from launcher.optim import OptimizerConfig
from launcher.schedule import ScheduleConfig
from launcher.transition import TransitionConfig
from model.size import parameter_shapes
from model.transformer import ModelConfig
from quant.linear import QuantConfig

STRICT: dict[str, Any] = {
    "extra": "forbid",
    "strict": True,
    "use_attribute_docstrings": True,
    "allow_inf_nan": False,
}


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem a line, each beginning with the key's path."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    """Name of the run."""
    folder: str | None = None
    """Where everything the run writes goes; null: `runs/NAME`."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError({"name": f"{self.name!r} may hold letters, digits, '_', and behind the first '.' and '-'"})

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) if self.folder else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, precision and what is traded between memory and speed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    global_batch_sequences: int | None = None
    """Sequences of one step, over all ranks; give this or `global_batch_tokens`."""
    global_batch_tokens: int | None = None
    """Tokens of one step, over all ranks; a multiple of data.sequence_length."""
    micro_batch_sequences: int
    """Sequences that one rank runs at once; the number of micro-batches follows."""
    total_steps: int | None = None
    """Length of the run that a phase's `fraction` refers to; this or `total_tokens`."""
    total_tokens: int | None = None
    """Length of the run that a phase's `fraction` refers to, in tokens."""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the forward and backward passes; latent weights, gradients' sum and optimizer are fp32."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and run the block again: less memory, a third more work."""
    compile: bool = False
    """Compile each block with torch.compile."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row without a finite gradient; each of them is skipped."""

    def __post_init__(self) -> None:
        problems = {}
        if (self.global_batch_sequences is None) == (self.global_batch_tokens is None):
            problems["global_batch_sequences"] = "give exactly one of global_batch_sequences and global_batch_tokens"
        if self.total_steps is not None and self.total_tokens is not None:
            problems["total_steps"] = "give at most one of total_steps and total_tokens"
        for name in ("global_batch_sequences", "global_batch_tokens", "micro_batch_sequences", "total_steps"):
            problems |= _at_least(self, name, 1)
        problems |= _at_least(self, "total_tokens", 1) | _at_least(self, "max_skipped_steps", 1)
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A stretch of the run with one precision. Its length is one of `steps`, `tokens` and `fraction`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Literal["16-bit", "ternary"]
    """`16-bit`, or `ternary`: 1.58-bit weights with 8-bit activations."""
    steps: int | None = None
    """Length in steps."""
    tokens: int | None = None
    """Length in tokens, rounded up to whole steps."""
    fraction: float | None = None
    """Length as a share of training.total_steps or total_tokens."""
    quantization: QuantConfig | None = None
    """What is quantized in a ternary phase, and how; null: BitNet b1.58."""
    transition: TransitionConfig | None = None
    """What happens where this phase begins; null: keep all, switch at once."""

    def __post_init__(self) -> None:
        problems = {}
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            problems["steps"] = f"give exactly one of steps, tokens and fraction, not {' and '.join(given) or 'none'}"
        problems |= _at_least(self, "steps", 1) | _at_least(self, "tokens", 1)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            problems["fraction"] = f"is {self.fraction}; must be above 0 and at most 1"
        if self.precision == "16-bit":
            if self.quantization is not None:
                problems["quantization"] = "is given for a 16-bit phase; only ternary phases quantize"
            if self.transition is not None and self.transition.ramp.steps:
                problems["transition.ramp"] = "is given for a 16-bit phase; only ternary phases have a strength"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Save every so many steps; null: only at transitions, at the end and when interrupted."""
    keep_last: int = 2
    """Checkpoints kept besides the milestones (transitions and the end): 0 keeps all, else at least 2."""
    start_from: str | None = None
    """Begin with this checkpoint folder's weights, and with its optimizer state unless the first phase's transition
    resets it; schedule and data begin anew."""

    def __post_init__(self) -> None:
        problems = _at_least(self, "interval_steps", 1)
        if self.keep_last < 0 or self.keep_last == 1:
            problems["keep_last"] = f"is {self.keep_last}; 0 (keep all) or at least 2, so that one is always complete"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written down while training."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int = 10
    """Log every so many steps; only then does the host wait for the device."""
    tensorboard: bool = True
    """Write RUN/tensorboard beside RUN/metrics.jsonl."""

    def __post_init__(self) -> None:
        if problems := _at_least(self, "interval_steps", 1):
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss at both ends of every phase, and in between."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int | None = None
    """Also evaluate every so many steps."""
    sample_prompt: str | None = None
    """Text that the finished model continues; null: no sample."""
    sample_tokens: int = 120
    """Length of that continuation."""

    def __post_init__(self) -> None:
        if problems := _at_least(self, "interval_steps", 1) | _at_least(self, "sample_tokens", 1):
            raise ValueError(problems)


def _at_least(part: Any, name: str, least: int) -> dict[str, str]:
    value = getattr(part, name)
    return {name: f"is {value}; must be {least} or more"} if value is not None and value < least else {}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, complete."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    phases: tuple[PhaseConfig, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if problems := spanning_problems(vars(self)):
            raise ValueError(problems)


def spanning_problems(parts: dict[str, Any]) -> dict[str, str]:
    """Check the rules that span several parts, as far as the parts are there.

    Args:
        parts: those sections of a `Config` that are valid in themselves, by name.
    """
    problems: dict[str, str] = {}
    model, data, training = parts.get("model"), parts.get("data"), parts.get("training")
    phases, checkpoint, engine = parts.get("phases"), parts.get("checkpoint"), parts.get("engine")
    if model and data and data.sequence_length > model.max_sequence_length:
        problems["data.sequence_length"] = (
            f"is {data.sequence_length}, beyond model.max_sequence_length {model.max_sequence_length}"
        )
    if data and training and training.global_batch_tokens and training.global_batch_tokens % data.sequence_length:
        below = training.global_batch_tokens // data.sequence_length * data.sequence_length
        nearest = [str(tokens) for tokens in (below, below + data.sequence_length) if tokens]
        problems["training.global_batch_tokens"] = (
            f"is {training.global_batch_tokens}, no multiple of data.sequence_length {data.sequence_length}; "
            f"{' or '.join(nearest)} would be"
        )
    if training and training.global_batch_sequences:
        total, micro = training.global_batch_sequences, training.micro_batch_sequences
        if total % micro:
            problems["training.micro_batch_sequences"] = (
                f"{micro} does not divide the global batch of {total} sequences; {divisors(total)} do"
            )
    if training and engine and training.compile and engine.zero_stage == 3:
        problems["training.compile"] = (
            "is true, but the hooks of engine.zero_stage 3 cut every graph at each layer; "
            "compile with zero_stage 1 or 2, or with engine.name fsdp2"
        )
    if phases is not None and not phases:
        problems["phases"] = "is empty; list at least one phase with its precision and length"
    if phases and training:
        share = sum(phase.fraction or 0 for phase in phases)
        length = "total_steps" if training.total_steps else "total_tokens"
        if not share and getattr(training, length):
            problems[f"training.{length}"] = "does nothing, because no phase's length is a fraction; leave it out"
        if share > 1 + 1e-9:
            problems["phases"] = f"have fractions of {share:g} in sum; 1 is the whole run"
    for index, phase in enumerate(phases or ()):
        path = f"phases.{index}"
        if phase.fraction and training and not (training.total_steps or training.total_tokens):
            problems[f"{path}.fraction"] = "needs training.total_steps or training.total_tokens to be a fraction of"
        if phase.precision == "ternary" and model:
            include = (phase.quantization or QuantConfig()).include
            names = [name.removesuffix(".weight") for name in parameter_shapes(model)]
            if not any(re.search(include, name) for name in names):
                problems[f"{path}.quantization.include"] = (
                    f"{include!r} matches no layer of the model, such as model.layers.0.mlp.up_proj"
                )
        if index == 0 and phase.transition and checkpoint and not checkpoint.start_from:
            ramp_only = dataclasses.replace(TransitionConfig(), ramp=phase.transition.ramp)
            if phase.transition != ramp_only:
                problems[f"{path}.transition"] = "the first phase has nothing to keep but with checkpoint.start_from"
    return problems


def divisors(number: int) -> str:
    """All divisors of a number, as a list for a message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `on` and `no` are words; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))  # 010 is ten


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; ``origin`` names it in the error."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply ``a.b=value`` overrides, and check everything.

    Raises:
        ConfigError: lists every problem, each with the key's path, what is wrong and what would be right.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections such as run, model and data")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in a tree of mappings and lists; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or the path leads through something that has no such element.
    """
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"{override!r}: an override is key.sub=value, such as optimizer.learning_rate=3e-4")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise ConfigError(f"{override!r}: {'.'.join(parents[: depth + 1])} is not there")
    parsed = parse_yaml(value, repr(override))
    if isinstance(node, dict):
        node[last] = parsed
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = parsed
    else:
        raise ConfigError(f"{override!r}: {path} is not there")


def parse_config(tree: dict[str, Any]) -> Config:
    """Turn nested mappings, as YAML gives them, into a `Config`.

    Raises:
        ConfigError: as `load_config`.
    """
    sections = {part.name: part for part in fields(Config)}
    types = typing.get_type_hints(Config)
    problems = {str(key): f"unknown section{_suggestion(str(key), Config)}" for key in tree if key not in sections}
    parts: dict[str, Any] = {}
    for name, part in sections.items():
        if name not in tree and part.default_factory is dataclasses.MISSING:
            problems[name] = "the section is missing"
            continue
        parts[name] = _parse_part(types[name], tree.get(name, {}), name, problems)
    problems |= spanning_problems({name: part for name, part in parts.items() if part is not None})
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for path, problem in problems.items()))
    return Config(**parts)


_adapter = functools.cache(TypeAdapter)  # building one takes longer than reading with it


def _parse_part(kind: Any, tree: Any, path: str, problems: dict[str, str]) -> Any:
    """Read one part, adding what is wrong to ``problems``; None if anything is.

    A part checks itself as a whole only once every key of it is well-formed. So what is not is left out and the part
    read again, until nothing new is found. What is then said about a key that was left out does not count.
    """
    tree = json.loads(json.dumps(tree, default=str))  # a copy, in JSON's types
    adapter = _adapter(kind)
    left_out: list[str] = []
    while True:
        try:
            part = adapter.validate_json(json.dumps(tree))
            return None if left_out else part
        except ValidationError as error:
            found: dict[str, str] = {}
            removed: list[str] = []
            for detail in error.errors():
                location = tuple(str(key) for key in detail["loc"])
                where = ".".join((path, *location))
                if detail["type"] == "value_error":
                    reason = detail["ctx"]["error"].args[0]
                    nested = reason if isinstance(reason, dict) else {"": str(reason)}
                    found |= {f"{where}.{key}".rstrip("."): text for key, text in nested.items()}
                else:
                    found[where] = _explain(detail, kind, location)
                if not detail["type"].startswith("missing") and _remove(tree, location):
                    removed.append(location[-1])
            for where, text in found.items():
                if not any(re.search(rf"\b{re.escape(key)}\b", f"{where}: {text}") for key in left_out):
                    problems[where] = text
            if not removed:
                return None
            left_out += removed


def _remove(tree: Any, location: tuple[str, ...]) -> bool:
    """Take what stands at ``location`` out of the tree; False where nothing stands there."""
    for key in location[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else tree[int(key)] if isinstance(tree, list) else None
    if location and isinstance(tree, dict) and location[-1] in tree:
        del tree[location[-1]]
        return True
    return False


def _explain(detail: Any, kind: Any, location: tuple[str, ...]) -> str:
    match detail["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key{_suggestion(location[-1], _owner(kind, location[:-1]))}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return "is missing"
        case "dataclass_type":
            return f"is {detail['input']!r}; must be a mapping of keys"
        case _:
            return f"is {detail['input']!r}; {detail['msg'].replace('Input should be', 'must be')}"


def _owner(kind: Any, location: Sequence[str]) -> Any:
    """The dataclass that stands at ``location`` under the type ``kind``."""
    for key in location:
        kind = typing.get_args(kind)[0] if key.isdecimal() else typing.get_type_hints(_dataclass_of(kind))[key]
    return _dataclass_of(kind)


def _dataclass_of(kind: Any) -> Any:
    return next(option for option in (kind, *typing.get_args(kind)) if is_dataclass(option))


def _suggestion(key: str, owner: Any) -> str:
    names = [part.name for part in fields(owner)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    for section, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind) and key in (part.name for part in fields(kind)):
            return f"; did you mean {section}.{key}?"
    return f"; there are {', '.join(names)}"


# Writing


def to_tree(config: Any) -> Any:
    """Turn a configuration back into nested mappings and lists, as YAML writes them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat_lines(tree: Any, prefix: str = "") -> Iterator[str]:
    """The resolved form of a configuration: one ``a.b: value`` line for every leaf."""
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from flat_lines(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield f"{prefix}: {json.dumps(tree)}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Config).json_schema()}
