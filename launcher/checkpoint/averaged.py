"""The averaged weights of a checkpoint, read as a checkpoint of their own: `CHECKPOINT@averaged`."""

import dataclasses
from pathlib import Path

import xxhash
from torch import Tensor

from launcher.checkpoint.reader import CheckpointReader
from launcher.config.averaging import AVERAGED
from launcher.engine.contract import AVERAGE
from launcher.errors import CheckpointError


class AveragedReader(CheckpointReader):
    """A checkpoint with its averaged weights in the place of the live ones, and the moments of these.

    Like an average of checkpoints, it belongs to no run: what was measured there is of the live weights.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: as `CheckpointReader`; or nothing is averaged in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        live = self.manifest
        if not live.averaged_tokens:
            raise CheckpointError(
                f"{folder}: has no averaged weights; a run saves them in its 16-bit phases if it has "
                "averaging.half_life_tokens. `tritrain average` averages several checkpoints"
            )
        is_across = live.precision is not None and live.precision.quantization is not None
        of = f"exponential average of the weights over {live.averaged_tokens} tokens, up to step {live.step}"
        record = {
            "kind": "exponential over steps",
            "across_ternary": is_across,
            "of": f"{of}; latent weights of ternary phases, for measurement only" if is_across else of,
            "sources": [{"step": live.step, "source": str(folder), "source_digest": live.digest, "share": 1.0}],
        }
        self.location = f"{folder}{AVERAGED}"
        self.averaged_tokens = None
        self.manifest = dataclasses.replace(
            live,
            averaged_tokens=None,
            provenance={"average": record},
            digest=xxhash.xxh3_128_hexdigest(f"{live.digest}{AVERAGED}"),
        )

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        return super().read(AVERAGE if kind == "weight" else kind, name, start, length)

    def kinds(self, name: str) -> tuple[str, ...]:
        return tuple(kind for kind in super().kinds(name) if kind != AVERAGE)
