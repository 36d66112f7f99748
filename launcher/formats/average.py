"""Average checkpoints of a 16-bit phase into one checkpoint.

At a constant learning rate, weights wander around a minimum, and their mean over the last part of a run lies nearer to
it: about where the run would be after its learning rate had decayed (Izmailov et al., arXiv 1803.05407; for language
models, Sanyal et al., arXiv 2306.03241). So an average tells early what a decay would gain.

A ternary model computes with codes and scales that are rounded from its latent weights. The mean of latent weights
rounds to other codes than any of the averaged models has, so it is another model, and usually a bad one.

The mean is `sum(w_i * x_i) / sum(w_i)`, in fp64, oldest checkpoint first, and rounded to fp32 once. Every element is
computed by itself, so the bits depend neither on the machine nor on the order of the arguments.
"""

import math
import time
from collections.abc import Sequence
from itertools import accumulate, repeat
from operator import mul
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.checkpoint.folders import CONFIG, NAME, complete_checkpoints
from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import new_location, reaching
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.averaging import OTHER_CODES
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.convert import write_streamed
from launcher.formats.open import ROTARY, TRAITS, check_sound, config_of, precision_of
from launcher.formats.opened import tokenizer_of
from launcher.run.belonging import OWNER
from launcher.version import tritrain_version
from quant.linear import is_learned_scale

REASON = f"{OTHER_CODES}; --across-ternary writes it all the same, to be measured"


class AverageSource(Source):
    """The mean of checkpoints that fit together (`check_together`), without moments.

    Args:
        readers: the checkpoints, oldest first.
        decay: each checkpoint weighs this much of the one after it, above 0 and below 1; None weighs all alike.
    """

    has_moments = False

    def __init__(self, readers: Sequence[CheckpointReader], decay: float | None = None) -> None:
        self.readers, self.decay = readers, decay
        self.location = f"the average of {len(readers)} checkpoints up to {readers[-1].location}"
        self.shapes = readers[-1].shapes
        newest_first = accumulate(repeat(1.0 if decay is None else decay, len(readers) - 1), mul, initial=1.0)
        self.weights = list(newest_first)[::-1]
        """Of each checkpoint; the newest weighs 1."""

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        total: Tensor | None = None
        for reader, weight in zip(self.readers, self.weights, strict=True):
            # One product, then one sum: `add_(alpha=)` may fuse them, and then does so only in a CPU's full vectors.
            term = reader.read_finite(kind, name, start, length).double().mul_(weight)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total.div_(math.fsum(self.weights)).float()

    def read_step(self, name: str) -> float:
        raise NotImplementedError


def average_of(
    readers: Sequence[CheckpointReader], *, decay: float | None = None, across_ternary: bool = False
) -> AverageSource:
    """The average of checkpoints, which are put in order by their steps.

    Args:
        readers: the checkpoints, in any order.
        decay: as `AverageSource` has it.
        across_ternary: whether checkpoints of ternary phases are accepted.

    Raises:
        ConfigError: the decay is none, or it is not clear which checkpoint is newer.
        CheckpointError: as `check_together`.
    """
    in_order = sorted(readers, key=lambda reader: (reader.manifest.step, reader.manifest.digest))
    steps = [reader.manifest.step for reader in in_order]
    if decay is not None and not 0 < decay < 1:
        raise ConfigError(f"--decay {decay:g}: must be above 0 and below 1; leave it out for the plain mean")
    if decay is not None and len(set(steps)) < len(steps):
        raise ConfigError(f"--decay: two checkpoints are of one step, among {listed(steps)}, and none is the newer one")
    check_together(in_order, across_ternary=across_ternary)
    return AverageSource(in_order, decay)


def is_quantized(reader: CheckpointReader) -> bool:
    """Return whether a checkpoint is of a ternary phase, its ramp included."""
    return precision_of(reader).quantization is not None


def ternary_among(readers: Sequence[CheckpointReader]) -> str | None:
    """The ternary phase that checkpoints are of, or that lies between them, oldest first; None if there is none."""
    for reader in readers:
        if is_quantized(reader):
            return f"{reader.location}, after step {reader.manifest.step}, is of a ternary phase"
    indices = [max(0, reader.manifest.progress.phase) for reader in readers]
    between = config_of(readers[-1]).phases[min(indices) : max(indices)]
    if any(phase.precision == "ternary" for phase in between):
        return f"a ternary phase lies between {readers[0].location} and {readers[-1].location}"
    return None


def check_together(readers: Sequence[CheckpointReader], *, across_ternary: bool) -> None:
    """Check that checkpoints are different ones of one model, in one precision, with one tokenizer.

    Args:
        readers: the checkpoints, oldest first; the newest is what the others are compared with.
        across_ternary: whether they may be of ternary phases, or have one between them.

    Raises:
        CheckpointError: they are not; says which, and why that matters.
    """
    newest = readers[-1]
    model, quantization = config_of(newest).model, precision_of(newest).quantization
    digests = [reader.manifest.digest for reader in readers]
    if repeated := [reader.location for reader in readers if digests.count(reader.manifest.digest) > 1]:
        raise CheckpointError(f"{repeated[-1]}: is named twice, or a copy of it is; name each checkpoint once")
    if not across_ternary and (found := ternary_among(readers)):
        raise CheckpointError(f"{found}, and {REASON}")
    tokenizers = {}
    for reader in readers:
        theirs = config_of(reader).model
        check_fits(
            reader,
            newest.shapes,
            others=[
                *(
                    f"{name}: only one of them has it"
                    for name in sorted(reader.shapes.keys() ^ newest.shapes.keys())
                    if is_learned_scale(name)
                ),
                *(
                    f"model.{trait} is {getattr(theirs, trait)} in it, and {getattr(model, trait)} in {newest.location}"
                    for trait in (*TRAITS, *ROTARY)
                    if getattr(theirs, trait) != getattr(model, trait)
                ),
            ],
        )
        if precision_of(reader).quantization != quantization:
            raise CheckpointError(
                f"{reader.location} and {newest.location} are of different precision or quantization; an average "
                "computes in one"
            )
        if tokenizer := tokenizer_of(reader):
            tokenizers[reader.location] = tokenizer.read_bytes()
    if len(set(tokenizers.values())) > 1:
        own = tokenizers.get(newest.location)
        other = next(location for location, content in tokenizers.items() if content != own)
        raise CheckpointError(f"{other} has another tokenizer than {newest.location}: its tokens mean something else")


def listed(steps: Sequence[int]) -> str:
    """Steps for a sentence."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def record_of(source: AverageSource) -> dict[str, Any]:
    """What an average was made of, for its manifest: every checkpoint with run, step, digest and share."""
    total = math.fsum(source.weights)
    made_of = [
        {
            "run": config_of(reader).run.name,
            "step": reader.manifest.step,
            "source": reader.location,
            "source_digest": reader.manifest.digest,
            "share": weight / total,
        }
        for reader, weight in zip(source.readers, source.weights, strict=True)
    ]
    is_across = ternary_among(source.readers) is not None
    kind = "mean" if source.decay is None else f"exponential average (decay {source.decay:g})"
    of = f"{kind} of {listed([reader.manifest.step for reader in source.readers])}"
    return {
        "kind": "mean" if source.decay is None else "exponential",
        "decay": source.decay,
        "across_ternary": is_across,
        "of": f"{of}; latent weights of ternary phases, for measurement only" if is_across else of,
        "sources": made_of,
    }


def manifest_of_average(source: AverageSource) -> Manifest:
    """The manifest of an average: in the place of its newest checkpoint, so that a run can go on from there."""
    newest = source.readers[-1].manifest
    return Manifest(
        milestone=True,
        has_moments=False,
        step=newest.step,
        tokens=newest.tokens,
        progress=newest.progress,
        precision=precision_of(source.readers[-1]),
        data_fingerprint=newest.data_fingerprint,
        spikes=None,
        teacher=None,
        world_size=None,
        engine=None,
        zero_stage=None,
        provenance={
            "average": record_of(source),
            "tritrain_version": tritrain_version(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def check_name(to: Path) -> None:
    """Check that no run would resume from a folder as from a checkpoint of its own.

    Raises:
        CheckpointError: it would.
    """
    with reaching(to.parent):
        is_of_run = bool(complete_checkpoints(to.parent)) or (to.parent / OWNER).exists()
    if is_of_run and NAME.fullmatch(to.name):
        raise CheckpointError(f"{to}: a run would take it for a checkpoint of its own; give it another name")


def write_average(source: AverageSource, to: Path) -> None:
    """Write an average as a checkpoint, a piece of a tensor at a time; it has its name when it is complete.

    Args:
        source: what is written.
        to: its folder, which must not exist, or be empty.

    Raises:
        CheckpointError: a checkpoint is damaged, the folder is taken, or something cannot be read or written.
    """
    check_name(to)
    for reader in source.readers:
        check_sound(reader)
    newest = source.readers[-1]
    with reaching(newest.folder):
        config_text = (newest.folder / CONFIG).read_text()
    with reaching(to), new_location(to) as building:
        writer = CheckpointWriter(building, in_place=True)
        files = write_streamed(writer, source)
        writer.finish(files, config_text, tokenizer_of(newest), manifest_of_average(source))
