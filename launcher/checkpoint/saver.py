"""Save in the background: the state is copied, training continues, and a thread writes the copy."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.location import is_local, reaching
from launcher.checkpoint.manifest import FileRecord, Manifest
from launcher.checkpoint.staging import Staging
from launcher.checkpoint.writer import CheckpointWriter, prune_checkpoints
from launcher.engine.contract import Engine, Shard
from launcher.errors import CheckpointError
from launcher.process.exchange import gather_values
from launcher.process.ranks import Ranks

SAVER_GROUP = "saver"
"""Description of the process group of the threads that save, whose collectives go their own pace."""


LONGEST_WAIT = timedelta(hours=12)
"""For the slowest rank's file. torch's own limit is half an hour; the watchdog sees to ranks that hang."""

SECONDS_TO_WRITE = 600
"""How long a run that fails waits for a checkpoint that is being written."""


class Saver:
    """Writes a run's checkpoints, one at a time.

    Args:
        checkpoints: the run's folder of checkpoints.
        ranks: this rank among all.
        tokenizer: its file, of which each checkpoint gets a copy; None leaves it out.
        keep_last: how many are kept besides the milestones; 0 keeps all.
        asynchronous: copy the state to host memory and write it while training goes on; else write at once.
        say: prints a warning about a checkpoint that the run can do without.
        note: on the first rank, notes the step of a checkpoint that is complete.
    """

    def __init__(
        self,
        checkpoints: Path,
        ranks: Ranks,
        *,
        tokenizer: Path | None,
        keep_last: int,
        asynchronous: bool,
        say: Callable[[str], None],
        note: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._checkpoints, self._ranks, self._keep_last = checkpoints, ranks, keep_last
        self._asynchronous, self._say, self._note = asynchronous, say, note
        # The thread's collectives must not mix with training's.
        self._group = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT, group_desc=SAVER_GROUP)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._staging = Staging(pinned=ranks.device.type == "cuda")
        self.stalled_seconds = 0.0
        """How long training has waited for saving, in all."""

    def save(self, engine: Engine, *, manifest: Manifest, config_text: str, must: bool) -> None:
        """Begin to write a checkpoint; a collective. Waits for the one before it.

        Args:
            engine: whose state is written, as it is now.
            manifest: of the checkpoint; the files and the tokens of the average are filled in.
            config_text: the resolved configuration, as YAML.
            must: whether a failure is an error, raised by the next `save` or `wait`; otherwise it is only reported.

        Raises:
            CheckpointError: an earlier checkpoint that must be there could not be written.
        """
        self.wait()
        began = time.perf_counter()
        shards = [shard for shard in engine.shards() if shard.primary and len(shard.tensors["weight"])]
        rng = {"cpu": torch.get_rng_state()}
        if self._ranks.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        if engine.average is not None:
            manifest = dataclasses.replace(manifest, averaged_tokens=int(engine.average.tokens))
        if self._asynchronous:
            shards = self._copy(shards)
        copied = torch.cuda.Event() if self._ranks.device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def write() -> None:
            try:
                if copied is not None:
                    torch.cuda.set_device(self._ranks.device)  # of this thread: else it takes memory of the first GPU
                    copied.synchronize()
                self._write(shards, rng, manifest, config_text)
            except Exception as error:
                if must or not isinstance(error, CheckpointError):
                    self._failure = error
                else:
                    self._say(f"WARNING: {error} Training continues; the next interval tries again.")

        if self._asynchronous:
            self._thread = threading.Thread(target=write, name="saver", daemon=True)
            self._thread.start()
        else:
            write()
        self.stalled_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Wait until nothing is being written any more.

        Raises:
            CheckpointError: a checkpoint that must be there could not be written.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.stalled_seconds += time.perf_counter() - began
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def outlast_failure(self, got_on: Callable[[], None]) -> None:
        """Let a checkpoint that is being written be completed when the run fails, and the process is about to end.

        Args:
            got_on: called every second.
        """
        deadline = time.monotonic() + SECONDS_TO_WRITE
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            got_on()
            self._thread.join(1.0)
        if isinstance(self._failure, CheckpointError):
            self._say(f"WARNING: {self._failure}")

    def _copy(self, shards: list[Shard]) -> list[Shard]:
        """Copy shards into host memory."""
        if not shards:
            return []
        tensors = {f"{kind}/{shard.name}": tensor for shard in shards for kind, tensor in shard.tensors.items()}
        # In one piece: the writer reads each step, and would wait for the device as often.
        copies = self._staging.copy(tensors | {"steps": torch.stack([shard.step for shard in shards])})
        return [
            dataclasses.replace(
                shard, tensors={kind: copies[f"{kind}/{shard.name}"] for kind in shard.tensors}, step=step
            )
            for shard, step in zip(shards, copies["steps"], strict=True)
        ]

    def _write(self, shards: list[Shard], rng: dict[str, Tensor], manifest: Manifest, config_text: str) -> None:
        """Write one checkpoint, in step with the other ranks."""
        writer, first = CheckpointWriter(folder_of(self._checkpoints, manifest.step)), self._ranks.is_first
        self._all_ranks(writer.begin if first else None, writer)

        def write() -> dict[str, Any]:
            return {
                name: dataclasses.asdict(record)
                for name, record in writer.write_rank(self._ranks.rank, shards, rng).items()
            }

        files = {name: FileRecord(**record) for rank in self._all_ranks(write, writer) for name, record in rank.items()}

        def finish() -> None:
            writer.finish(files, config_text, self._tokenizer, manifest)

        self._all_ranks(finish if first else None, writer)
        if first:
            try:
                self._note(manifest.step)
            except OSError as error:
                self._say(f"WARNING: {error}")
            try:
                with reaching(self._checkpoints):
                    prune_checkpoints(self._checkpoints, self._keep_last)
            except CheckpointError as error:
                self._say(f"WARNING: old checkpoints could not be removed: {error} The next save tries again.")

    def _all_ranks(self, action: Callable[[], Any] | None, writer: CheckpointWriter) -> list[Any]:
        """Run one stage of saving on the ranks that have an action; returns each rank's result, of JSON's types.

        Raises:
            CheckpointError: on all of them, if it failed on any. What had been written is removed.
        """
        result, failure = None, None
        try:
            if action is not None:
                with reaching(writer.final):
                    result = action()
        except CheckpointError as error:
            failure = f"rank {self._ranks.rank}: {error}"
        outcomes = [[result, failure]]
        if self._group is not None:
            outcomes = gather_values([result, failure], self._group)
        failures = sorted({text for _, text in outcomes if text})
        if failures:
            if self._ranks.is_first:
                with reaching(writer.final):
                    writer.abandon()
            room = ""
            if is_local(self._checkpoints) and self._checkpoints.exists():
                room = f"({shutil.disk_usage(self._checkpoints).free / 2**30:.2f} GiB are free there.) "
            raise CheckpointError(
                f"{writer.final}: the checkpoint could not be written: {'; '.join(failures)} {room}"
                "Earlier checkpoints are complete and untouched."
            )
        return [outcome for outcome, _ in outcomes]
