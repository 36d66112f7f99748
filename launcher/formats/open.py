"""Open checkpoints of every known kind."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.messages import looked_for_in
from launcher.checkpoint.averaged import AveragedReader
from launcher.checkpoint.folders import CONFIG, MANIFEST, checkpoints_under, is_checkpoint
from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import is_local, reaching, to_location
from launcher.checkpoint.manifest import Precision, precision_at
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.checkpoint.strangers import not_a_model
from launcher.config.averaging import AVERAGED, without_averaged
from launcher.config.file import DERIVED_KEYS, parse_config, parse_yaml
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.plan.course import make_course
from launcher.process.ranks import ALONE, Ranks, everyones
from launcher.run.folder import holds_run
from launcher.run.rollbacks import read_rollbacks
from model.size import parameter_shapes
from model.transformer import ModelConfig
from quant.config import BITNET

if TYPE_CHECKING:
    from launcher.formats.hf_source import FolderModel

TRAITS = ("num_heads", "kv_heads", "head_width", "activation", "norm", "norm_position", "norm_eps", "qk_norm")
"""What a model computes with its parameters, and their shapes do not say."""

ROTARY = ("rope_theta", "rope_scaling")
"""The same of rotary positions."""

NO_SUB_NORM = (
    "model.sub_norm is true, and the checkpoint has no SubLN; set it to false, or set "
    "checkpoint.sub_norm_sequences to put SubLN into the model that the run starts from"
)
LACKS_ROWS = (
    "model.vocab_size is {}, and the checkpoint has {} rows; set checkpoint.grow_vocabulary to true to give the other "
    "tokens the mean of these rows"
)
HAS_SUB_NORM = "model.sub_norm is false, and the checkpoint has SubLN, which changes what it computes; set it to true"


def open_source(text: str) -> Source:
    """Open a checkpoint; its kind follows from the files in the folder.

    Args:
        text: a folder or URL: one of our checkpoints, or a run with some, of which the newest is taken; a folder of
            DeepSpeed (ZeRO or universal); a folder of Hugging Face, compressed-tensors, MLX or ONNX; or a GGUF file. Of
            a folder that holds both DeepSpeed's files and Hugging Face's, as Transformers' Trainer saves them,
            DeepSpeed's are taken, unless the folder that its pointer names was removed. With `@averaged` after one of
            our checkpoints, or a run, the averaged weights of the checkpoint.

    Raises:
        CheckpointError: it is none of these, or not complete, or damaged.
    """
    from launcher.formats.published_kinds import published_at
    from launcher.formats.published_source import PublishedSource

    folder = to_location(text)
    with reaching(folder):
        if text.endswith(AVERAGED) and not folder.exists():
            return _averaged(text)
        if is_checkpoint(folder):
            return CheckpointReader(folder)
        if found := checkpoints_under(folder):
            return CheckpointReader(found[-1])
        if published := published_at(folder):
            return PublishedSource(published)
        if not folder.is_dir():
            if folder.exists():
                raise CheckpointError(f"{text}: is a file, and checkpoints are folders")
            place = looked_for_in(folder) if is_local(folder) else ""
            raise CheckpointError(f"{text}: there is no such folder{place}")
    from launcher.formats.hf_source import HuggingFaceSource, is_hf

    if is_local(folder) and (source := _deepspeed_source(folder)):
        return source
    if is_hf(folder):
        return HuggingFaceSource(folder)
    with reaching(folder):
        if problem := not_a_model(folder):
            raise CheckpointError(f"{text} {problem}")
    raise CheckpointError(
        f"{text}: not a checkpoint of a known kind. Tritrain's have {MANIFEST}, a Hugging Face folder config.json, "
        "a DeepSpeed folder `latest` or *_model_states.pt, a universal one zero/ as well; DeepSpeed's must be local"
    )


def _averaged(text: str) -> AveragedReader:
    """The averaged weights of a checkpoint, or of the newest of a run."""
    live = open_source(without_averaged(text))
    if not isinstance(live, CheckpointReader):
        raise CheckpointError(f"{text}: only checkpoints of Tritrain have averaged weights; leave out {AVERAGED}")
    return AveragedReader(live.folder)


def _deepspeed_source(folder: Path) -> Source | None:
    """What DeepSpeed has saved in a folder; None if it has not, or if only Hugging Face's weights are left there."""
    from launcher.formats.deepspeed_native import POINTER, DeepSpeedSource, is_deepspeed, is_left_over
    from launcher.formats.deepspeed_universal import POINTER as UNIVERSAL_POINTER
    from launcher.formats.deepspeed_universal import UniversalSource, is_universal
    from launcher.formats.hf_source import has_weights

    kind: type[UniversalSource | DeepSpeedSource]
    if is_universal(folder):
        kind, pointer = UniversalSource, UNIVERSAL_POINTER
    elif is_deepspeed(folder):
        kind, pointer = DeepSpeedSource, POINTER
    else:
        return None
    if not has_weights(folder):
        return kind(folder)
    if is_left_over(folder, pointer):
        return None
    try:
        return kind(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} also holds weights of Hugging Face: to take those, copy its config.json, safetensors "
            "and tokenizer files to another folder, and name that"
        ) from error


def check_sound(source: Source, ranks: Ranks = ALONE) -> None:
    """Verify every byte of a Tritrain checkpoint; a collective, in which ranks share the work.

    Raises:
        CheckpointError: names what is damaged.
    """
    if not isinstance(source, CheckpointReader):
        return
    if problems := everyones(list(source.damage(ranks.rank, ranks.world_size)), ranks):
        raise CheckpointError("\n".join(problems))


def check_model(source: Source, model: ModelConfig) -> None:
    """Check that a source holds a model: the same parameters, used in the same way.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape, and every key of the
            model that is another one where the source says so.
    """
    from launcher.formats.hf_source import EMBEDDING

    problems = []
    rows = source.shapes.get(EMBEDDING, (model.vocab_size,))[0]
    if rows < model.vocab_size:
        problems.append(LACKS_ROWS.format(model.vocab_size, rows))
    if theirs := model_of(source):
        if model.sub_norm != theirs.sub_norm and not source.constants:
            problems.append(NO_SUB_NORM if model.sub_norm else HAS_SUB_NORM)
        # In a Tritrain run, rotary positions may be changed on purpose, for a longer context.
        traits = TRAITS if isinstance(source, CheckpointReader) else (*TRAITS, *ROTARY)
        problems += [
            f"model.{trait} is {getattr(model, trait)}, and {getattr(theirs, trait)} in the checkpoint"
            for trait in traits
            if getattr(model, trait) != getattr(theirs, trait)
        ]
    check_fits(source, parameter_shapes(model), others=problems)


def model_of(source: Source) -> ModelConfig | None:
    """The model that a source describes; None for DeepSpeed's without a `config.json`, which describe none."""
    from launcher.formats.published_source import PublishedSource

    if isinstance(source, PublishedSource):
        return source.model_config
    if described := described_model(source):
        return described.config
    return config_of(source).model if isinstance(source, CheckpointReader) else None


def described_model(source: Source) -> "FolderModel | None":
    """The model of the `config.json` beside a source's weights; None if it has none."""
    from launcher.formats.deepspeed_native import DeepSpeedSource
    from launcher.formats.hf_source import HuggingFaceSource

    return source.model if isinstance(source, HuggingFaceSource | DeepSpeedSource) else None


def computed_precision(source: Source) -> Precision | None:
    """The precision that a source's model computes in; None for DeepSpeed's, which do not say.

    Raises:
        CheckpointError: as `precision_of`.
    """
    from launcher.formats.published_source import PublishedSource

    if isinstance(source, PublishedSource):
        return source.precision
    if described := described_model(source):
        return precision_of_folder(described)
    return precision_of(source) if isinstance(source, CheckpointReader) else None


def is_ternary(source: Source) -> bool:
    """Return whether a source says that it computes with ternary weights."""
    precision = computed_precision(source)
    return precision is not None and precision.quantization is not None


def precision_of_folder(model: "FolderModel") -> Precision:
    """The precision that Transformers computes in: 8-bit activations and codes in a folder's ternary layers.

    The scales of packed codes are those that are stored with them.
    """
    num_layers = model.config.num_layers
    if not model.ternary:
        return Precision.in_16_bits(num_layers)
    include = "|".join(f"^{re.escape(name.removesuffix('.weight'))}$" for name in model.ternary)
    return Precision.full(replace(BITNET, include=include), num_layers)


def precision_of(reader: CheckpointReader) -> Precision:
    """The precision of a checkpoint's last step.

    Manifests of version 1 do not say it. For them it follows from the configuration and from how often the run went
    back to a switch, if the run's folder is found; a copy of such a checkpoint counts as one of a run that never did.

    Raises:
        CheckpointError: the manifest is not one of the configuration beside it.
    """
    config, manifest = config_of(reader), reader.manifest
    precision, phase = manifest.precision, manifest.progress.phase
    if precision is None and phase < len(config.phases):
        run = run_of(reader, config)
        rollbacks = read_rollbacks(run) if run else {}
        attempts = {phase: rollback.attempts for phase, rollback in rollbacks.items()}
        precision = precision_at(make_course(config, attempts), manifest.progress)
    if precision is None or len(precision.weight_strengths) != config.model.num_layers:
        raise CheckpointError(f"{reader.folder}: {MANIFEST} does not fit {CONFIG}: other phases, or another depth")
    return precision


def run_of(reader: CheckpointReader, config: Config) -> Path | None:
    """The folder of the run that wrote a checkpoint: the one around it, or the one in its configuration.

    No run wrote an average: what its run measured at that step was measured on other weights.
    """
    if reader.manifest.average is not None:
        return None
    around = reader.folder.parent.parent if is_local(reader.folder) else config.run.path
    run_id = _tree_of(reader).get("run_id")
    return next((path for path in (around, config.run.path) if holds_run(path, config, run_id)), None)


def config_of(reader: CheckpointReader) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    return parse_config({key: value for key, value in _tree_of(reader).items() if key not in DERIVED_KEYS}, stored=True)


def _tree_of(reader: CheckpointReader) -> dict[str, Any]:
    path = reader.folder / CONFIG
    tree: dict[str, Any] = parse_yaml(path.read_text(), str(path))
    return tree
