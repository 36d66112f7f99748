"""Read files of `torch.save` without executing their content and without loading their tensors.

Such a file is a zip archive, uncompressed: one pickle, `data.pkl`, and the bytes of each tensor's storage as a record
beside it (pytorch.org/docs/stable/notes/serialization.html). A pickle is a program: whoever unpickles a stranger's file
runs the stranger's code. So there are two walls. The names of classes and functions that the pickle asks for must be on
the list below; those of DeepSpeed and of users are all replaced by one class that does nothing. Then torch unpickles
with `weights_only=True`, which calls nothing else.

Tensors come out on the meta device: dtype and shape without memory, each knowing where its bytes are. A range of them
is read when it is asked for. The first time a record is touched, its bytes are compared with the archive's CRC-32,
which torch itself does not do.
"""

import bisect
import pickletools
import struct
import threading
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32  # nine times as fast as zlib's
from torch import Tensor

from data.messages import safe_message
from data.pointers import pointer_problem
from launcher.checkpoint.tensor_file import CHUNK_BYTES, DTYPES, TensorFileError, range_reader
from launcher.errors import CheckpointError

STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


TORCH_NAMES = {
    "collections.OrderedDict",
    "__builtin__.set",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch._tensor._rebuild_from_type_v2",
    "_codecs.encode",
    *(f"torch.{name}Storage" for name in STORAGES),
    *(str(dtype) for dtype in DTYPES.values()),
}
"""What torch may make, a part of what `weights_only` allows."""


INERT_NAMES = (
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # From here on: what users put into a DeepSpeed checkpoint as `client_state`.
    "argparse.Namespace",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)
"""Of these nothing is imported or called: each is `Inert`."""


PROTOCOL = 2
"""The protocol in which torch.save pickles, unless asked for another."""


PROTO = b"\x80"
"""The instruction before the protocol's number; protocols 0 and 1 have none."""


MAX_LISTED = 5


def asked_names(pickle: bytes) -> set[str]:
    """The names of the classes and functions that a pickle of any protocol asks for; nothing of it is run.

    Protocols 0 to 3 have a name in the instruction, 4 and later take it from two texts before it, directly or by
    reference. Where these two are not simply there, the name is `?`, which is on no list.
    """
    names: set[str] = set()
    texts: deque[str | None] = deque([None, None], maxlen=2)  # of the last two instructions; None for anything else
    memo: dict[Any, str | None] = {}
    for code, argument, _ in pickletools.genops(pickle):
        if code.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
            texts.append(None)
        elif code.name == "STACK_GLOBAL":
            module, name = texts
            names.add(f"{module}.{name}" if module and name else "?")
            texts.append(None)
        elif code.name.startswith("EXT"):
            names.add(f"extension {argument}")
        elif code.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = texts[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append(memo.get(argument))
        elif code.name not in ("PROTO", "FRAME"):
            texts.append(argument if isinstance(argument, str) and "UNICODE" in code.name else None)
    return names


class Inert:
    """Stands for an object of a class that is not imported; keeps what it would have been made from."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> "Inert":
        """Keep the arguments."""
        instance = super().__new__(cls)
        instance.arguments = arguments
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PickledFile:
    """A file of `torch.save`, opened: its objects have been read, its tensors have not.

    Args:
        path: of the file; a `pathlib.Path`, or a `upath.UPath` into a remote store.

    Attributes:
        tree: what was saved, with tensors on the meta device for `read`, and `Inert` for foreign objects.

    Raises:
        CheckpointError: it is not there, is no such file, is damaged, or asks for what is not on the list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = range_reader(path)
        if problem := pointer_problem(path):
            raise CheckpointError(f"{path} {problem}")
        self._checked: set[int] = set()
        self._locks: dict[int, threading.Lock] = {}
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                self._records = [info for info in infos if "/data/" in info.filename]
                self._starts = [info.header_offset for info in self._records]
                (pickle,) = [info for info in infos if info.filename.endswith("/data.pkl")]
                if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or pickle.file_size > file.seek(
                    0, 2
                ):
                    raise ValueError("torch.save compresses nothing")
                self._refuse_unlisted(archive.read(pickle))
                file.seek(0)
                with torch.serialization.safe_globals([(Inert, name) for name in INERT_NAMES]):
                    self.tree: Any = torch.load(file, map_location="meta", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # whatever a mutilated archive or pickle makes of its readers
            detail = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it, torch says how to run it anyway
            reason = (safe_message(detail).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{path} is damaged, or was not written by torch.save: {reason}") from error

    def _refuse_unlisted(self, pickle: bytes) -> None:
        unlisted = sorted(asked_names(pickle).difference(TORCH_NAMES, INERT_NAMES))
        if unlisted:
            more = f" and {len(unlisted) - MAX_LISTED} others" if len(unlisted) > MAX_LISTED else ""
            raise CheckpointError(
                f"its pickle asks for {', '.join(unlisted[:MAX_LISTED])}{more}, and only classes on a list are read, "
                "since others could run anything; nothing was run"
            )
        protocol = pickle[1] if pickle[:1] == PROTO else 0
        if protocol != PROTOCOL:
            raise CheckpointError(
                f"its pickle has protocol {protocol}, and only {PROTOCOL} is read, which is torch.save's default"
            )

    def read(self, tensor: Any, start: int = 0, length: int | None = None, into: Tensor | None = None) -> Tensor:
        """Elements ``start`` up to ``start + length`` of a flattened tensor of `tree`, in the dtype it is stored in.

        They are read into a contiguous tensor of that length and dtype, if one is given.

        Raises:
            CheckpointError: this is no tensor, its bytes are damaged, or it holds less.
        """
        record, position = self.locate(tensor)
        length = tensor.numel() - start if length is None else length
        if not 0 <= start <= start + length <= tensor.numel():
            raise CheckpointError(f"{self.path}: a tensor holds {tensor.numel()} elements, not {start + length}")
        if not length:
            return torch.empty(0, dtype=tensor.dtype)
        size = tensor.dtype.itemsize
        try:
            self._check(record, position)
            view = None if into is None else into.view(torch.uint8).numpy().data
            data = self._read_bytes(position + (tensor.storage_offset() + start) * size, length * size, view)
        except (TensorFileError, OSError) as error:
            raise CheckpointError(f"{self.path} {error}") from error
        return torch.frombuffer(data, dtype=tensor.dtype) if into is None else into

    def locate(self, tensor: Any) -> tuple[zipfile.ZipInfo, int]:
        """The record that holds a tensor of `tree`, and where in the file its bytes begin.

        Raises:
            CheckpointError: this is no tensor of the file, or one that cannot be read by range.
        """
        position = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if isinstance(tensor, Tensor) else None
        if position is None or tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{self.path} has no tensor where one should be")
        if not tensor.is_contiguous():
            raise CheckpointError(f"{self.path}: a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}")
        record = self._records[max(0, bisect.bisect_right(self._starts, position) - 1)]
        if (tensor.storage_offset() + tensor.numel()) * tensor.dtype.itemsize > record.file_size:
            raise CheckpointError(f"{self.path}: a tensor of {tensor.numel()} elements is larger than its record")
        return record, position

    def check(self, tensor: Any) -> None:
        """Verify the checksum of the record that holds a tensor of `tree`, once.

        Raises:
            CheckpointError: as `read`.
        """
        record, position = self.locate(tensor)
        try:
            self._check(record, position)
        except (TensorFileError, OSError) as error:
            raise CheckpointError(f"{self.path} {error}") from error

    def _check(self, record: zipfile.ZipInfo, position: int) -> None:
        """Verify the checksum of a record, whose bytes begin at ``position``, once for all threads."""
        with self._locks.setdefault(position, threading.Lock()):
            if position not in self._checked:
                self._hold_against_checksum(record, position)
                self._checked.add(position)

    def _hold_against_checksum(self, record: zipfile.ZipInfo, position: int) -> None:
        header_bytes = 30
        header = self._read_bytes(record.header_offset, header_bytes)
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", header)
        if signature != b"PK\3\4" or position != record.header_offset + header_bytes + name_bytes + extra_bytes:
            raise TensorFileError(f"is damaged: its header does not say where {record.filename} is")
        checksum, end = 0, position + record.file_size
        chunk = memoryview(bytearray(CHUNK_BYTES))  # one for all: new memory costs more time than reading into it
        for start in range(position, end, CHUNK_BYTES):
            length = min(CHUNK_BYTES, end - start)
            checksum = crc32(self._read_bytes(start, length, chunk[:length]), checksum)
        if checksum != record.CRC:
            raise TensorFileError(f"is damaged: the bytes of {record.filename} do not have the checksum of its header")

    def read_number(self, value: Any) -> float:
        """A number of `tree`, which may be a tensor, an enum's member or plain."""
        if isinstance(value, Inert):
            (value,) = value.arguments
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise CheckpointError(
                    f"{self.path} has a tensor of shape {tuple(value.shape)} where a number should be"
                )
            return float(self.read(value).item())
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.path} has {value!r} where a number should be")
        return float(value)
