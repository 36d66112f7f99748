"""What a run begins with when that is not chance: whose checkpoint, and what of it.

`checkpoint.start_from` and `tritrain convert` begin runs in the same place, before the transition into the phase that
`checkpoint.start_phase` names, and the training loop takes it from there: so a switch inside a run, a start and a
conversion are one code path.
"""

from launcher.checkpoint import CONFIG, MANIFEST, checkpoints_under
from launcher.checkpoint_reader import CheckpointReader, everyones, mismatches
from launcher.config import Config
from launcher.config_file import DERIVED_KEYS, parse_config, parse_yaml
from launcher.location import is_local, reaching, to_location
from launcher.metrics import Progress
from launcher.plan import Plan
from launcher.runtime import ALONE, Ranks
from launcher.source import CheckpointError, Source
from model.size import parameter_shapes
from model.transformer import ModelConfig

TRAITS = ("num_heads", "kv_heads", "head_width", "activation", "norm", "norm_position", "norm_eps", "qk_norm")
"""What a model computes with its parameters, and their shapes do not say."""


def open_source(text: str) -> Source:
    """Open a checkpoint of any kind that is known, by what is in the folder.

    Args:
        text: a folder or URL: one of our checkpoints, or a run with some, of which the newest is taken; a folder
            of DeepSpeed (ZeRO or universal); a folder of Hugging Face.

    Raises:
        CheckpointError: it is none of these, or not complete, or damaged.
    """
    folder = to_location(text)
    with reaching(folder):
        if (folder / MANIFEST).is_file():
            return CheckpointReader(folder)
        if found := checkpoints_under(folder):
            return CheckpointReader(found[-1])
        if not folder.is_dir():
            there = "is a file, and checkpoints are folders" if folder.exists() else "there is no such folder"
            raise CheckpointError(f"{text}: {there}")
    from launcher.deepspeed_native import DeepSpeedSource, is_deepspeed
    from launcher.deepspeed_universal import UniversalSource, is_universal
    from launcher.hf_source import HuggingFaceSource, is_hf

    if is_hf(folder):
        return HuggingFaceSource(folder)
    if is_local(folder):
        if is_universal(folder):
            return UniversalSource(folder)
        if is_deepspeed(folder):
            return DeepSpeedSource(folder)
    raise CheckpointError(
        f"{text}: no checkpoint that is known. A checkpoint of ours has {MANIFEST}, a Hugging Face folder config.json, "
        "a DeepSpeed folder `latest` or *_model_states.pt, a universal one zero/ beside that; DeepSpeed's must be local"
    )


def first_progress(plan: Plan) -> Progress:
    """Where a run begins: inside its first phase, or, with ``start_from``, before the transition into one."""
    checkpoint = plan.config.checkpoint
    if checkpoint.start_from is None:
        return Progress()
    return Progress(step=plan.phases[checkpoint.start_phase].start, phase=checkpoint.start_phase - 1)


def open_start(plan: Plan, data_fingerprint: str | None = None) -> tuple[Source, bool]:
    """Open what a run begins with.

    Args:
        plan: of a run with ``checkpoint.start_from``.
        data_fingerprint: of the run's data; None leaves them unchecked.

    Returns:
        The source, and whether its optimizer state is taken.

    Raises:
        CheckpointError: as `open_source` and `check_start`.
    """
    checkpoint = plan.config.checkpoint
    assert checkpoint.start_from is not None
    source = open_source(checkpoint.start_from)
    check_start(source, plan, data_fingerprint)
    return source, plan.phases[checkpoint.start_phase].transition.optimizer != "reset"


def check_start(source: Source, plan: Plan, data_fingerprint: str | None = None) -> None:
    """Make sure that a run can begin with a source.

    Args:
        source: what it begins with.
        plan: of the run; `checkpoint.start_phase` is the phase that it begins in.
        data_fingerprint: of the run's data; None leaves them unchecked.

    Raises:
        CheckpointError: the source does not fit the model, or the phase that the run begins in.
    """
    check_model(source, plan.config.model)
    phase = plan.phases[plan.config.checkpoint.start_phase]
    if phase.transition.optimizer != "reset" and not source.has_moments:
        raise CheckpointError(
            f"{source.location} has no optimizer moments, and phases.{phase.index}.transition.optimizer is "
            f"{phase.transition.optimizer}; set it to reset"
        )
    if isinstance(source, CheckpointReader) and phase.index:
        manifest = source.manifest
        if (manifest["step"], manifest["tokens"]) != (phase.start, phase.start * plan.tokens_per_step):
            raise CheckpointError(
                f"{source.location} is at step {manifest['step']} with {manifest['tokens']} tokens, but phase "
                f"{phase.index} begins at step {phase.start} with {phase.start * plan.tokens_per_step}; change the "
                "lengths of the phases before it, take another checkpoint, or set checkpoint.start_phase to 0"
            )
        if data_fingerprint is not None and phase.transition.data == "continue":
            check_data(source, data_fingerprint)


def check_sound(source: Source, ranks: Ranks = ALONE) -> None:
    """Make sure that every byte of a checkpoint of ours is as it was written; a collective, in which ranks share.

    Raises:
        CheckpointError: names what is damaged.
    """
    if not isinstance(source, CheckpointReader):
        return
    if problems := everyones(list(source.damage(ranks.rank, ranks.world_size)), ranks):
        raise CheckpointError("\n".join(problems))


def check_data(reader: CheckpointReader, data_fingerprint: str) -> None:
    """Make sure that a checkpoint's position is one in these data.

    Raises:
        CheckpointError: it was trained on others.
    """
    if reader.manifest["data_fingerprint"] not in (data_fingerprint, None):
        raise CheckpointError(
            f"{reader.folder}: was trained on other data, another mixture or another order; restore the data "
            "configuration, or begin a new run with checkpoint.start_from and, in the transition, data: restart"
        )


def check_model(source: Source, model: ModelConfig) -> None:
    """Make sure that a source holds a model: the same parameters, and the same use of them.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape, and every key of the
            model that is another one where the source says so.
    """
    shapes = parameter_shapes(model)
    problems = list(mismatches(source, set(shapes), shapes))
    if theirs := model_of(source):
        # Of a run of ours, the rotary base may be changed on purpose, for a longer context.
        traits = TRAITS if isinstance(source, CheckpointReader) else (*TRAITS, "rope_theta")
        problems += [
            f"model.{trait} is {getattr(model, trait)}, and {getattr(theirs, trait)} there"
            for trait in traits
            if getattr(model, trait) != getattr(theirs, trait)
        ]
    if problems:
        raise CheckpointError(f"{source.location} does not fit the model:\n" + "\n".join(problems))


def model_of(source: Source) -> ModelConfig | None:
    """The model that a source says it is of; None for DeepSpeed's, which do not."""
    from launcher.hf_source import HuggingFaceSource

    if isinstance(source, HuggingFaceSource):
        return source.model_config
    return config_of(source).model if isinstance(source, CheckpointReader) else None


def config_of(reader: CheckpointReader) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    path = reader.folder / CONFIG
    tree = parse_yaml(path.read_text(), str(path))
    return parse_config({key: value for key, value in tree.items() if key not in DERIVED_KEYS})
