"""A safetensors checkpoint as it lies on disk: its index, its headers, its tensors as lazy views.

Opening reads headers only and validates all of them; a tensor is a view of the mapped file, so that a slice
of it reads the pages under that slice and nothing else. What is opened is what transformers would load:
`model.safetensors` if it is there, else what `model.safetensors.index.json` names. A directory is never
listed to find shards, because a stale second set may lie beside the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

import torch

from nlora_surgery.errors import CheckpointError, UnsupportedCheckpointError

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "FLOAT_DTYPES",
    "INDEX_FILE",
    "MANIFEST",
    "SINGLE_FILE",
    "Checkpoint",
    "FileLayout",
    "TensorInfo",
    "append_tensor",
    "plan_file",
    "read_header",
    "read_json",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MANIFEST = "nlora_surgery.json"

# safetensors dtype code -> torch dtype, for those that arithmetic is done on. Everything else is copied.
FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}

# Bits per element of every dtype of the safetensors format (sub-byte ones included).
_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

# Files that hold weights in some other form. They are not carried into an output: there they would be the
# old weights under another name, and some loaders would prefer them.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
                  ".ot", ".npz", ".pkl"}  # fmt: skip
_OTHER_INDEXES = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: its name on disk.
        dtype: the safetensors code of its dtype, `"BF16"` for instance.
        shape: its shape.
        file: the name of the file that holds it, relative to the checkpoint's directory.
        start, end: its first byte in that file and the one past its last, counted from the file's start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype if arithmetic can be done on it, else None: such tensors are only copied."""
        return FLOAT_DTYPES.get(self.dtype)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The header of one safetensors file: of one that exists, or of one that is about to be written.

    Attributes:
        name: the file's name relative to its checkpoint.
        header: the bytes before the data: length, JSON, padding.
        tensors: by name, in the order in which the header lists them.
        metadata: the header's `__metadata__`.
        size_bytes: of the whole file.
    """

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size_bytes: int


def read_header(path: Path, name: str | None = None) -> FileLayout:
    """Read and validate the header of a safetensors file.

    The safetensors library validates the same things when it opens a file, but gives neither the byte
    offsets nor duplicate names, and both are needed here.

    Args:
        path: the file.
        name: what to call it; the last component of `path` by default.

    Raises:
        CheckpointError: the file is missing or unreadable, truncated, its header is no JSON of the
            format's shape, a name stands twice, a dtype is unknown, or offsets overlap, leave gaps, reach
            out of the file or disagree with dtype and shape.
    """
    name = name or path.name

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {what}; fetch the file again")

    try:
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise damaged(f"it has {file_size} bytes, fewer than the 8 of a header's length")
            (length,) = struct.unpack("<Q", prefix)
            if length > file_size - 8:
                raise damaged(f"its header claims {length} bytes, but the file has only {file_size}")
            if length > _MAX_HEADER_BYTES:
                raise damaged(f"its header claims {length} bytes, more than the format's {_MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        keys = [key for key, _ in pairs]
        "".join(keys).encode()  # JSON can spell half of a surrogate pair, which no encoding can write again
        if len(entries) < len(pairs):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise damaged(f"its header has the name {twice!r} twice")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise damaged(f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise damaged("its header is not a JSON object")

    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # the safetensors library takes null for none, too
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("its __metadata__ is not a map of strings")
    data_start = 8 + length
    tensors = {tensor: _parse_entry(tensor, entry, name, data_start, damaged) for tensor, entry in entries.items()}

    position, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start < position:
            raise damaged(f"tensor {info.name!r} overlaps {before}")
        if info.start > position:
            raise damaged(f"{info.start - position} bytes before tensor {info.name!r} belong to no tensor")
        position, before = info.end, f"tensor {info.name!r}"
    if position > file_size:
        raise damaged(f"it is truncated: {before} ends at byte {position}, the file at {file_size}")
    if position < file_size:
        raise damaged(f"{file_size - position} bytes after {before} belong to no tensor")
    return FileLayout(name, prefix + text, tensors, metadata, file_size)


def _parse_entry(tensor: str, entry: Any, file: str, data_start: int, damaged: Any) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64

    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"the entry of tensor {tensor!r} lacks dtype, shape or two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise damaged(f"tensor {tensor!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise damaged(f"tensor {tensor!r} has the impossible shape {shape!r}")
    if not is_size(begin) or not is_size(end) or begin > end:
        raise damaged(f"tensor {tensor!r} has the impossible data_offsets [{begin!r}, {end!r}]")
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise damaged(f"tensor {tensor!r} takes {end - begin} bytes, which {dtype} of shape {shape} does not")
    return TensorInfo(tensor, dtype, tuple(shape), file, data_start + begin, data_start + end)


def plan_file(
    name: str,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """Lay out a safetensors file before any of its data exists.

    Args:
        name: the file's name relative to its checkpoint.
        tensors: name, dtype and shape of each tensor. They are laid out as the safetensors library does,
            wider dtypes first and names in order, so that every tensor is aligned.
        metadata: the header's `__metadata__`.

    Returns:
        The layout; `header` is complete, and writing each tensor at its `start` completes the file.
    """
    ordered = sorted(tensors, key=lambda entry: (-entry[1].itemsize, entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor, dtype, shape in ordered:
        end = position + math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return _lay_out(name, header, metadata or {})


def append_tensor(layout: FileLayout, name: str, like: TensorInfo) -> FileLayout:
    """The layout of a file with one tensor more at its end, everything before it in the same order.

    Args:
        layout: of the file as it is.
        name: of the new tensor.
        like: a tensor of the same dtype and shape.
    """
    data_start = len(layout.header)
    header: dict[str, Any] = {"__metadata__": dict(layout.metadata)} if layout.metadata else {}
    for info in layout.tensors.values():
        offsets = [info.start - data_start, info.end - data_start]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    end = layout.size_bytes - data_start
    header[name] = {"dtype": like.dtype, "shape": list(like.shape), "data_offsets": [end, end + like.size_bytes]}
    return _lay_out(layout.name, header, layout.metadata)


def _lay_out(name: str, header: Mapping[str, Any], metadata: Mapping[str, str]) -> FileLayout:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = size = 8 + len(text)
    infos = {}
    for tensor, entry in header.items():
        if tensor != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            infos[tensor] = TensorInfo(tensor, entry["dtype"], shape, name, data_start + begin, data_start + end)
            size = max(size, data_start + end)
    return FileLayout(name, struct.pack("<Q", len(text)) + text, infos, metadata, size)


def read_json(path: Path, error: type[CheckpointError] | type[Any] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        error: what to raise.

    Raises:
        error: the file is missing, unreadable, no JSON, or JSON of another kind than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason
    except (ValueError, RecursionError) as reason:  # not UTF-8, not JSON, or a number of thousands of digits
        raise error(f"{path} is not JSON ({reason}); restore it from where the model came from") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


class Checkpoint:
    """A directory of safetensors files, opened for reading.

    Use as a context manager, or call `close`; tensors handed out stay valid after that, too.

    Attributes:
        directory: where it lies.
        files: the layout of each safetensors file, by name, in the order of the index.
        tensors: every tensor by name, in the order of the files and, inside one, of its bytes.
        config: `config.json`, or an empty dict.
    """

    def __init__(self, directory: Path, files: Mapping[str, FileLayout], config: dict[str, Any]) -> None:
        self.directory = directory
        self.files = files
        self.config = config
        self.tensors: dict[str, TensorInfo] = {
            info.name: info
            for layout in files.values()
            for info in sorted(layout.tensors.values(), key=lambda info: (info.start, info.end))
        }
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Open a model directory.

        Args:
            directory: a local directory that holds `model.safetensors`, or the index of a sharded one.

        Raises:
            CheckpointError: no such directory, no weights in it, or damaged ones (see `read_header`); an
                index that disagrees with its shards or names a file outside the directory.
            UnsupportedCheckpointError: the directory holds pickled weights only, or an adapter.
        """
        directory = Path(directory)
        if not directory.is_dir():
            found = "a file" if directory.exists() else "nothing"
            raise CheckpointError(f"no model at {directory}: found {found}, expected a directory")
        config_path = directory / "config.json"
        config = read_json(config_path) if config_path.exists() else {}
        if (directory / SINGLE_FILE).exists():
            return cls(directory, {SINGLE_FILE: read_header(directory / SINGLE_FILE)}, config)
        if not (directory / INDEX_FILE).exists():
            raise _no_weights(directory)
        weight_map = _read_weight_map(directory / INDEX_FILE)
        files = {shard: read_header(directory / shard, shard) for shard in sorted(set(weight_map.values()))}
        for tensor, shard in weight_map.items():
            if tensor not in files[shard].tensors:
                raise CheckpointError(
                    f"{directory / INDEX_FILE} says that {tensor!r} is in {shard}, but that shard has no such "
                    "tensor: index and shards are not of one model; fetch them again"
                )
        for shard, layout in files.items():
            for tensor in layout.tensors:
                if weight_map.get(tensor) != shard:
                    where = f"to {weight_map[tensor]}" if tensor in weight_map else "nowhere"
                    raise CheckpointError(
                        f"{directory / shard} holds {tensor!r}, which {INDEX_FILE} assigns {where}: index "
                        "and shards are not of one model; fetch them again"
                    )
        return cls(directory, files, config)

    @classmethod
    def open_file(cls, path: Path) -> Checkpoint:
        """Open one safetensors file by itself, an adapter's for instance.

        Raises:
            CheckpointError: see `read_header`.
        """
        return cls(path.parent, {path.name: read_header(path)}, {})

    def tensor(self, name: str) -> torch.Tensor:
        """A view of a tensor in the mapped file; reading an element reads the page under it.

        Args:
            name: of a tensor whose dtype is one of `FLOAT_DTYPES`.

        Returns:
            A CPU tensor. The mapping is private: writing to it never reaches the file.
        """
        info = self.tensors[name]
        dtype = FLOAT_DTYPES[info.dtype]
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        mapped = self._map(info.file)
        if info.start % dtype.itemsize:  # legal in the format, but torch wants aligned memory
            buffer = bytearray(memoryview(mapped)[info.start : info.end])
            return torch.frombuffer(buffer, dtype=dtype).view(info.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.start).view(info.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor of any dtype, as a view of the mapped file."""
        info = self.tensors[name]
        return memoryview(self._map(info.file))[info.start : info.end]

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read a tensor's bytes ahead."""
        self._advise(name, "MADV_WILLNEED")

    def release(self, name: str) -> None:
        """Give back the memory under a tensor's bytes; they are read again if they are needed again."""
        self._advise(name, "MADV_DONTNEED")

    def _advise(self, name: str, advice: str) -> None:
        info = self.tensors[name]
        if info.size_bytes and hasattr(mmap, advice):
            start = info.start - info.start % mmap.PAGESIZE
            self._map(info.file).madvise(getattr(mmap, advice), start, info.end - start)

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                try:
                    with open(self.directory / file, "rb") as handle:
                        self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"cannot map {self.directory / file}: {error}") from error
            return self._maps[file]

    def other_files(self) -> tuple[list[str], list[str]]:
        """What else lies in the directory: what belongs to the model, and weights that nothing loads.

        Returns:
            Paths relative to the directory: every file to be carried over byte for byte (the index too), and
            those that are left out because they hold weights in another form, or a stale set of shards.
        """
        carried: list[str] = []
        left_out: list[str] = []
        for folder, folders, names in os.walk(self.directory):
            folders[:] = sorted(sub for sub in folders if sub not in {".git", ".cache", "__pycache__"})
            for name in sorted(names):
                path = Path(folder, name)
                relative = path.relative_to(self.directory).as_posix()
                if relative in self.files or relative == MANIFEST or not path.is_file():
                    continue
                stale_index = name.endswith(_OTHER_INDEXES) and not (
                    relative == INDEX_FILE and SINGLE_FILE not in self.files
                )
                # An adapter's configuration goes with its weights, and in `adapter` it would be in the way of ours.
                weights = path.suffix.lower() in _OTHER_WEIGHTS or stale_index or name == ADAPTER_CONFIG
                (left_out if weights else carried).append(relative)
        return carried, left_out

    def fingerprint(self) -> str:
        """An identity of the weights that is cheap to take and does not depend on how they are sharded.

        SHA-256 over each tensor's name, dtype and shape and three blocks of 256 bytes from its start, middle
        and end. It tells a model from its residual and from its fine-tunes; it is no check of integrity,
        which is what `verify` is for.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
            if info.size_bytes:
                data = self.raw(name)
                middle = len(data) // 2
                for start in (0, middle, max(0, len(data) - 256)):
                    digest.update(data[start : start + 256])
        return f"sha256:{digest.hexdigest()}"

    def close(self) -> None:
        """Let go of the mappings; each goes when the last view of it does.

        They are not closed: that would take the memory away under a tensor, which holds a reference to its
        mapping but no export of its buffer.
        """
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; fetch it again from where the model came from")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{path} puts {tensor!r} into {shard!r}, which is not the name of a file in its directory; "
                "do not trust this checkpoint"
            )
        if not os.path.isfile(path.parent / shard):  # noqa: PTH113  (Path.is_file raises if the name is too long)
            raise CheckpointError(f"{path} names {shard!r}, but there is no such file; fetch it again")
    return weight_map


def _is_plain_name(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return "\0" not in name and name not in {"", ".", ".."} and posix.name == name and windows.name == name


def _no_weights(directory: Path) -> CheckpointError:
    if (directory / ADAPTER_CONFIG).exists():
        return UnsupportedCheckpointError(
            f"{directory} is an adapter ({ADAPTER_CONFIG} is there, model weights are not); "
            "name the model that it was made for"
        )
    pickled = sorted(
        path.name for pattern in ("pytorch_model*.bin*", "*.pt", "*.pth") for path in directory.glob(pattern)
    )
    if pickled:
        return UnsupportedCheckpointError(
            f"{directory} has its weights pickled ({pickled[0]}), which can run code when read; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return CheckpointError(f"no safetensors weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}")
