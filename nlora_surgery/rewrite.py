"""The one engine under everything that writes a checkpoint.

An operation says which tensors it edits and gives a function from tensor to `Edit`; the engine plans every
output file's header first, streams the tensors through the edit, copies what is untouched without reading it
into memory, fills an adapter file on the way if there is one, and commits by one rename (see `staging`).

**Speed.** One thread per core (several per GPU) takes whole tensors. Inside, a tensor goes by in row tiles
that stay in the core's cache: converted to the compute dtype, edited, measured, rounded, written. Every buffer
is allocated once per thread.

**The same bytes, always.** Inside a thread torch runs single-threaded, so no sum is split differently because
there are more cores or more processes: a run on one core, on many, or under torchrun writes the same bytes.

**Units.** A source shard is the unit of resuming and of sharing the work between ranks. Its record in the
journal holds a checksum of each tensor that was computed for it; copies are compared with the source.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import queue
import shutil
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlora_surgery.checkpoint import Checkpoint, FileLayout, TensorInfo, append_tensor
from nlora_surgery.devices import (
    MemoryGrowth,
    Workspace,
    compute_dtype,
    cpu_cores,
    resolve_devices,
    single_threaded_torch,
    tile_bytes,
)
from nlora_surgery.errors import NonFiniteError, OptionError, OutputError, SurgeryError
from nlora_surgery.factor import TILE_BYTES, row_tiles
from nlora_surgery.ranks import Ranks
from nlora_surgery.staging import Stage, check_output, disk_errors

__all__ = ["Edit", "Plan", "Progress", "rewrite"]

_WORKERS_PER_GPU = 3  # one reads and uploads while one computes and one downloads and writes


@dataclass(frozen=True, slots=True)
class Edit:
    """What an operation wants done with one tensor.

    Attributes:
        apply: changes the tensor's rows `rows`, given in the compute dtype, in place; None leaves the tensor.
        columns: how long a row is; None is the tensor's last dimension.
        sides: tensors for the plan's side file, by name.
        figures: numbers about the edit, for the report.
    """

    apply: Callable[[slice, Tensor], None] | None = None
    columns: int | None = None
    sides: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


class Progress:
    """Listens to a long operation; does nothing by itself. Called from several threads, one at a time."""

    def start(self, total_bytes: int) -> None:
        """The work begins; `advance` will add up to `total_bytes`."""

    def advance(self, count: int) -> None:
        """So many more bytes of the source are done."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""

    def stop(self) -> None:
        """The work ended, well or not."""


@dataclass(frozen=True)
class Plan:
    """What will be written, before any of it is.

    Attributes:
        source: the checkpoint to read.
        out: the directory to make.
        edits: names of the floating-point tensors that go through the edit function, which sees their rows:
            all but the last dimension taken as one, unless its `Edit.columns` says otherwise.
        identity: everything that decides the output's bytes, as JSON values.
        write_shards: False writes only the side file.
        side: layout of the adapter file to be filled, its name relative to `out`.
        carried: other files of the source to be copied, relative to its directory.
        needs_whole: whether the edit reads all of a tensor (GPUs then get it whole, once).
        worker_bytes: what the edit itself allocates at most, per thread.
        appended: tensors that the source lacks, each put at the end of the file that holds the source tensor
            from which its edit starts: its name, and that tensor's. They are among `edits`.
        inputs: directories that the output must not touch; None is the source's.
        mend_source: what can be done where a tensor of the source is not finite, for the message.
        mend_result: the same where the edited tensor is not.
    """

    source: Checkpoint
    out: Path
    edits: Sequence[str]
    identity: Mapping[str, Any]
    write_shards: bool = True
    side: FileLayout | None = None
    carried: Sequence[str] = ()
    needs_whole: bool = True
    worker_bytes: int = 0
    appended: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[Path] | None = None
    mend_source: str = "repair it"
    mend_result: str = "repair it"

    @cached_property
    def layouts(self) -> dict[str, FileLayout]:
        """The output's shards: those of the source, and what is appended."""
        layouts = dict(self.source.files)
        for name, origin in self.appended.items():
            info = self.source.tensors[origin]
            layouts[info.file] = append_tensor(layouts[info.file], name, info)
        return layouts

    def origin(self, name: str) -> TensorInfo:
        """The source tensor from which the edit of `name` starts."""
        return self.source.tensors[self.appended.get(name, name)]

    @property
    def size_bytes(self) -> int:
        """Bytes that the output takes."""
        shards = sum(layout.size_bytes for layout in self.layouts.values()) if self.write_shards else 0
        carried = sum((self.source.directory / name).stat().st_size for name in self.carried)
        return shards + carried + (self.side.size_bytes if self.side else 0)


@dataclass
class _Unit:
    """One shard's work: tensors to edit, byte ranges of the source to copy and how far they move."""

    name: str
    edits: list[TensorInfo]
    copies: list[tuple[int, int]]
    shift: int

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.edits) + sum(end - start for start, end in self.copies)


def rewrite(
    plan: Plan,
    edit: Callable[[TensorInfo, Tensor], Edit],
    finish: Callable[[Path, dict[str, dict[str, Any]]], None],
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint, an adapter, or both.

    Under torchrun the ranks share the shards between them; the first writes the rest and commits.

    Args:
        plan: what is to be written.
        edit: called with each tensor of `plan.edits`, on the device that computes; in several threads.
        finish: called once, before the commit, with the staged directory and for each of `plan.edits` its
            `figures` and the `checksums` (CRC-32, by tensor) of what was written for it; writes what is left:
            configuration, and the manifest with `staging.run_id(plan.identity)` as its `run`.
        device: see `resolve_devices`.
        overwrite: replace an earlier output, and an unfinished one of another command.
        max_memory: bytes that buffers may take in all; fewer threads are used to keep it.
        progress: listens.

    Raises:
        OptionError: no such device, or `max_memory` is below what one thread needs.
        OutputError: see `check_output`; no space; not writable.
        StageError: another process, or an unfinished run of another command, has this output.
        NonFiniteError: a result is not finite.
    """
    progress = progress or Progress()
    devices = resolve_devices(device)
    wide = [info.name for info in map(plan.origin, plan.edits) if info.dtype in {"F32", "F64"}]
    if devices[0].type == "mps" and wide:
        raise OptionError(f"{wide[0]!r} is computed in fp64, which Metal does not have; use --device cpu")
    workers = _Workers.plan(devices, plan, max_memory)
    ranks = Ranks.from_environment()
    stage = Stage(plan.out, ranks.rank)
    try:
        with ranks.agreement("preparing the output"):
            if ranks.first:
                _open_stage(plan, stage, overwrite)
        finished: dict[str, dict[str, Any]]
        complete, finished = ranks.from_first((stage.complete, stage.finished))
        if complete:
            progress.notice(f"{plan.out} was finished by an earlier run of this command")
            if ranks.first:
                stage.discard()
            return
        mine = ranks.share(_units(plan), lambda unit: unit.size_bytes)
        records: dict[str, dict[str, Any]] = {}
        with ranks.agreement("writing the shards"):
            records = _run_units(plan, mine, edit, stage, finished, workers, progress)
        everyone = ranks.gather(records)
        with ranks.agreement("finishing the output"):
            if ranks.first:
                tensors = {
                    name: record
                    for rank_records in everyone
                    for unit_record in rank_records.values()
                    for name, record in unit_record["tensors"].items()
                }
                with disk_errors(plan.out):
                    for name in plan.carried:
                        _copy_file(plan.source.directory / name, stage.tree / name)
                    finish(stage.tree, {name: tensors[name] for name in plan.edits})
                stage.commit()
    except SurgeryError as error:
        if ranks.first and not error.resumable:
            stage.discard()
        raise
    finally:
        progress.stop()
        stage.release()
        ranks.close()


def _open_stage(plan: Plan, stage: Stage, overwrite: bool) -> None:
    exists = os.path.lexists(plan.out)
    inputs = [plan.source.directory] if plan.inputs is None else plan.inputs
    try:
        check_output(plan.out, inputs, overwrite=overwrite)
    except OutputError:
        # Killed between the commit and the tidying up: the output is there, and so is what is left of the stage.
        if overwrite or not exists or not stage.directory.exists():
            raise
        stage.acquire(plan.identity, overwrite=False)
        if stage.complete:
            return
        stage.release()
        raise
    stage.acquire(plan.identity, overwrite=overwrite)
    if stage.complete:
        return
    if not exists and os.path.lexists(plan.out) and not overwrite:  # what a killed run had put aside is back
        stage.release()
        check_output(plan.out, inputs, overwrite=False)
    with disk_errors(plan.out):
        staged = sum(path.stat().st_blocks * 512 for path in stage.tree.rglob("*") if path.is_file())
        free = shutil.disk_usage(stage.directory).free
        if plan.size_bytes > free + staged:
            raise OutputError(
                f"no space left for {plan.out}: it needs {plan.size_bytes:,} bytes, {free:,} are free there",
                resumable=bool(stage.finished),
            )
        layouts = list(plan.layouts.values()) if plan.write_shards else []
        edited = set(plan.edits)
        for layout in [*layouts, *([plan.side] if plan.side else [])]:
            path = stage.tree / layout.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size == layout.size_bytes and stage.finished:
                continue  # left by the run that this one goes on with, header and all
            with open(path, "wb") as file:
                file.write(layout.header)
                file.flush()
                if layout is plan.side or not edited.isdisjoint(layout.tensors):
                    _reserve(file.fileno(), layout.size_bytes)
                file.truncate(layout.size_bytes)


def _units(plan: Plan) -> list[_Unit]:
    edited = set(plan.edits)
    units = []
    for layout in plan.source.files.values():
        edits = [info for name, info in plan.layouts[layout.name].tensors.items() if name in edited]
        copies: list[tuple[int, int]] = []
        if plan.write_shards:
            position = 0 if not edits else len(layout.header)
            replaced = [layout.tensors[info.name] for info in edits if info.name in layout.tensors]
            for info in sorted(replaced, key=lambda info: info.start):
                if info.start > position:
                    copies.append((position, info.start))
                position = info.end
            if position < layout.size_bytes:
                copies.append((position, layout.size_bytes))
        if edits or copies:
            shift = len(plan.layouts[layout.name].header) - len(layout.header)
            units.append(_Unit(layout.name, edits, copies, shift))
    return units


# --- threads, devices, buffers ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Workers:
    devices: list[torch.device]
    count: int

    @classmethod
    def plan(cls, devices: list[torch.device], plan: Plan, max_memory: int | None) -> _Workers:
        if devices[0].type == "cpu":
            count = max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        else:
            count = _WORKERS_PER_GPU * len(devices)
        each = cls.bytes_each(devices[0], plan)
        if max_memory is not None:
            if each > max_memory:
                raise OptionError(
                    f"--max-memory {max_memory:,} bytes is too little: one thread needs {each:,} for the "
                    "largest tensor at this rank"
                )
            count = min(count, max_memory // each)
        return cls(devices, count)

    @staticmethod
    def bytes_each(device: torch.device, plan: Plan) -> int:
        """Bytes of buffers per thread: three tiles, and what the edit allocates."""
        tile = tile_bytes(device)
        longest = max((plan.origin(name).shape[-1] for name in plan.edits), default=0)
        return 3 * max(tile, 8 * longest) + plan.worker_bytes


class _Canceled(Exception):  # noqa: N818  (no error: another thread's is the one to report)
    """Raised in a thread that stops because another one failed, or because of an interrupt."""


# --- the work --------------------------------------------------------------------------------------------


def _run_units(
    plan: Plan,
    units: Sequence[_Unit],
    edit: Callable[[TensorInfo, Tensor], Edit],
    stage: Stage,
    finished: Mapping[str, dict[str, Any]],
    workers: _Workers,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Do these units, or find them done; return their records."""
    memory = MemoryGrowth()
    each = workers.bytes_each(workers.devices[0], plan)
    progress.notice(f"buffers of {workers.count} threads: {workers.count * each / 1e6:.0f} MB at most")
    progress.start(sum(unit.size_bytes for unit in units))
    free_devices: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for index in range(workers.count):
        free_devices.put(workers.devices[index % len(workers.devices)])
    canceled = threading.Event()
    lock = threading.Lock()
    records: dict[str, dict[str, Any]] = {}
    file_locks = {unit.name: threading.Lock() for unit in units}
    if plan.side is not None:
        file_locks[plan.side.name] = threading.Lock()

    def run_jobs(jobs: _Jobs) -> None:
        torch.set_num_threads(1)
        writer = _TensorWriter(plan, stage, Workspace(free_devices.get()), file_locks, canceled)
        unit = None
        while (job := jobs.take(unit)) is not None:
            unit, part = job
            try:
                with disk_errors(plan.out):
                    if isinstance(part, TensorInfo):
                        result, count = writer.write(part, edit), part.size_bytes
                        with lock:
                            records[unit.name]["tensors"][part.name] = result
                    else:
                        writer.copy(unit, *part)
                        count = part[1] - part[0]
                with lock:
                    remaining[unit.name] -= 1
                    if remaining[unit.name] == 0:
                        with disk_errors(plan.out):
                            stage.record(unit.name, records[unit.name])
                    progress.advance(count)
                    memory.look()
            except BaseException:
                canceled.set()
                raise

    with single_threaded_torch(), ThreadPoolExecutor(workers.count, "surgery") as pool:
        try:
            whole = list(
                pool.map(
                    lambda unit: unit.name in finished and _still_whole(plan, stage, unit, finished[unit.name]), units
                )
            )
            if any(whole):
                progress.notice(f"going on with an earlier run: {sum(whole)} of {len(units)} shards are finished")
            for unit, is_whole in zip(units, whole, strict=True):
                records[unit.name] = finished[unit.name] if is_whole else {"tensors": {}}
                if is_whole:
                    progress.advance(unit.size_bytes)
            todo = [unit for unit, is_whole in zip(units, whole, strict=True) if not is_whole]
            remaining = {unit.name: len(unit.edits) + len(unit.copies) for unit in todo}
            jobs = _Jobs(todo, canceled)
            threads = [pool.submit(run_jobs, jobs) for _ in range(workers.count)]
            wait(threads, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt: what runs stops at its next tile
            canceled.set()
            raise
        wait(threads)
        errors = [error for thread in threads if (error := thread.exception()) is not None]
        for error in errors:
            if not isinstance(error, _Canceled):
                raise error
    if memory.peak_bytes is not None:
        progress.notice(f"anonymous memory grew by {memory.peak_bytes / 1e6:.0f} MB at most")
    return records


class _Jobs:
    """The tensors to edit and the ranges to copy that are left, handed out to threads.

    A thread stays with its unit while it has work, then goes to the one with the fewest threads: two threads that
    write to one file wait for each other in the kernel, at several times the cost of the writing.
    """

    def __init__(self, units: Sequence[_Unit], canceled: threading.Event) -> None:
        self._canceled = canceled
        self._lock = threading.Lock()
        self._parts: dict[str, deque[TensorInfo | tuple[int, int]]] = {
            unit.name: deque([*unit.copies, *unit.edits]) for unit in units
        }
        self._units = {unit.name: unit for unit in units}
        self._threads = Counter[str]()

    def take(self, unit: _Unit | None) -> tuple[_Unit, TensorInfo | tuple[int, int]] | None:
        """The next job for a thread that has done one of `unit`; None when none is left."""
        with self._lock:
            if self._canceled.is_set():
                raise _Canceled
            if unit is None or not self._parts[unit.name]:
                if unit is not None:
                    self._threads[unit.name] -= 1
                open_units = [name for name, parts in self._parts.items() if parts]
                if not open_units:
                    return None
                unit = self._units[min(open_units, key=lambda name: (self._threads[name], -len(self._parts[name])))]
                self._threads[unit.name] += 1
            return unit, self._parts[unit.name].popleft()


class _TensorWriter:
    """Takes a thread's tensors through their edit and into the output."""

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        workspace: Workspace,
        file_locks: Mapping[str, threading.Lock],
        canceled: threading.Event,
    ) -> None:
        self.plan = plan
        self.stage = stage
        self.workspace = workspace
        self.file_locks = file_locks
        self.canceled = canceled

    def copy(self, unit: _Unit, start: int, end: int) -> None:
        """Copy a range of the unit's shard as it is."""
        with _open_pair(self.plan, self.stage, unit.name) as (source, output):
            _copy_range(source, output, start, end, unit.shift, self.file_locks[unit.name], self.canceled)

    def write(self, info: TensorInfo, edit: Callable[[TensorInfo, Tensor], Edit]) -> dict[str, Any]:
        source, workspace, origin = self.plan.source, self.workspace, self.plan.origin(info.name)
        view = source.tensor(origin.name)
        if self.plan.needs_whole:
            source.prefetch(origin.name)
        with torch.inference_mode(), workspace.computing():
            weight = workspace.upload(view) if self.plan.needs_whole else view
            change = edit(info, weight)
            checksums: dict[str, int] = {}
            figures = dict(change.figures)
            if change.apply is not None:
                checksum, measured = self._edit_tiles(info, weight, change)
                figures.update(measured)
                if self.plan.write_shards:
                    checksums[info.name] = checksum
            elif self.plan.write_shards:
                shift = info.start - origin.start
                with _open_pair(self.plan, self.stage, info.file) as (reader, writer):
                    _copy_range(
                        reader, writer, origin.start, origin.end, shift, self.file_locks[info.file], self.canceled
                    )
            if self.plan.side is not None:
                with _opened(self.stage.tree / self.plan.side.name) as side:
                    for name, tensor in change.sides.items():
                        data = _bytes_of(tensor.contiguous().to("cpu"))
                        with self.file_locks[self.plan.side.name]:
                            _write_all(side, data, self.plan.side.tensors[name].start)
                        checksums[name] = zlib.crc32(data)
        source.release(origin.name)
        return {"checksums": checksums, "figures": figures}

    def _edit_tiles(self, info: TensorInfo, weight: Tensor, change: Edit) -> tuple[int, dict[str, float]]:
        """Edit, measure, round and (if shards are written) write a tensor tile by tile.

        Returns:
            The result's checksum, and Frobenius norms: of the weight, of the exact result, and of the
            difference that rounding it made.
        """
        workspace, dtype, apply = self.workspace, compute_dtype(weight.dtype), change.apply
        assert apply is not None
        weight = weight.reshape(-1, change.columns or weight.shape[-1])
        checksum = 0
        squares = {"weight_norm": 0.0, "result_norm": 0.0, "rounding_norm": 0.0}
        output_file = _opened(self.stage.tree / info.file) if self.plan.write_shards else contextlib.nullcontext()
        with output_file as output:
            offset = info.start
            for rows in row_tiles(weight.shape, dtype.itemsize, workspace.tile_bytes):
                if self.canceled.is_set():
                    raise _Canceled
                shape = (rows.stop - rows.start, weight.shape[1])
                exact = workspace.buffer("exact", dtype, shape).copy_(weight[rows])
                squares["weight_norm"] += _norm(exact, self.plan, info.name) ** 2
                apply(rows, exact)
                rounded = workspace.buffer("rounded", weight.dtype, shape).copy_(exact)
                squares["result_norm"] += _norm(exact, self.plan, info.name, "after the edit") ** 2
                again = workspace.buffer("again", dtype, shape).copy_(rounded)
                rounding = exact.sub_(again)
                squares["rounding_norm"] += _norm(rounding, self.plan, info.name, f"as {info.dtype}") ** 2
                data = _bytes_of(workspace.download(rounded))
                checksum = zlib.crc32(data, checksum)
                if output is not None:
                    with self.file_locks[info.file]:  # sleep, where the kernel would spin
                        _write_all(output, data, offset)
                offset += len(data)
        return checksum, {name: math.sqrt(square) for name, square in squares.items()}


def _norm(tile: Tensor, plan: Plan, name: str, when: str = "") -> float:
    norm = float(torch.linalg.vector_norm(tile))
    if not math.isfinite(norm):  # either it is so, or squares of huge numbers overflowed fp32
        norm = float(torch.linalg.vector_norm(tile, dtype=torch.float64))
    if not math.isfinite(norm):
        if not when:
            raise NonFiniteError(name, f"weight {name!r} holds NaN or infinity; {plan.mend_source}")
        raise NonFiniteError(name, f"weight {name!r} is finite, but {when} it is not; {plan.mend_result}")
    return norm


def _still_whole(plan: Plan, stage: Stage, unit: _Unit, record: Mapping[str, Any]) -> bool:
    """Whether a finished unit's bytes in the stage are those that its record promises."""
    try:
        if plan.side is not None:
            with _opened(stage.tree / plan.side.name) as side:
                for tensor in record["tensors"].values():
                    for name, checksum in tensor["checksums"].items():
                        where = plan.side.tensors.get(name)
                        if where is not None and _checksum(side, where) != checksum:
                            return False
        if plan.write_shards:
            with _open_pair(plan, stage, unit.name) as (source, output):
                for info in unit.edits:
                    expected = record["tensors"][info.name]["checksums"].get(info.name)
                    if expected is None:  # the edit left it as it was
                        origin = plan.origin(info.name)
                        if not _same_range(source, output, origin.start, origin.end, info.start - origin.start):
                            return False
                    elif _checksum(output, info) != expected:
                        return False
                return all(_same_range(source, output, start, end, unit.shift) for start, end in unit.copies)
    except (OSError, KeyError, TypeError):
        return False
    return {info.name for info in unit.edits} == set(record["tensors"])


# --- bytes -----------------------------------------------------------------------------------------------


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _open_pair(plan: Plan, stage: Stage, file: str) -> Iterator[tuple[int, int]]:
    with (
        _opened(plan.source.directory / file, os.O_RDONLY) as source,
        _opened(stage.tree / file) as output,
    ):
        yield source, output


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Have the file's blocks allocated at once, where the file system can: writing then costs a third less.

    By hand, since `os.posix_fallocate` fills the file with zeros where the file system cannot.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is not None and fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) != 0:
        error = ctypes.get_errno()
        if error in {errno.ENOSPC, errno.EDQUOT}:
            raise OSError(error, os.strerror(error))


_COPY_CHUNK = 16 << 20  # small enough that an interrupt is heard soon, and that others get at the file between


def _copy_range(
    source: int,
    output: int,
    start: int,
    end: int,
    shift: int = 0,
    lock: contextlib.AbstractContextManager[Any] | None = None,
    canceled: threading.Event | None = None,
) -> None:
    """Copy bytes between files, to `shift` behind where they are, inside the kernel where it can."""
    in_kernel = hasattr(os, "copy_file_range")
    lock = lock or contextlib.nullcontext()
    while start < end:
        if canceled is not None and canceled.is_set():
            raise _Canceled
        count = min(end - start, _COPY_CHUNK)
        if in_kernel:
            try:
                with lock:
                    copied = os.copy_file_range(source, output, count, start, start + shift)
            except OSError as error:
                if error.errno not in {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}:
                    raise
                in_kernel = False  # this pair of file systems cannot
                continue
        else:
            data = os.pread(source, min(count, TILE_BYTES), start)
            with lock:
                _write_all(output, memoryview(data), start + shift)
            copied = len(data)
        if copied == 0:
            raise OSError(errno.EIO, "the source became shorter while it was read")
        start += copied


def _copy_file(source: Path, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        _opened(source, os.O_RDONLY) as reader,
        _opened(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as writer,
    ):
        _copy_range(reader, writer, 0, os.fstat(reader).st_size)
        os.fchmod(writer, os.fstat(reader).st_mode & 0o777)


def _checksum(descriptor: int, info: TensorInfo) -> int:
    checksum, position = 0, info.start
    while position < info.end:
        data = os.pread(descriptor, min(TILE_BYTES, info.end - position), position)
        if not data:
            return -1
        checksum, position = zlib.crc32(data, checksum), position + len(data)
    return checksum


def _same_range(source: int, output: int, start: int, end: int, shift: int = 0) -> bool:
    while start < end:
        count = min(TILE_BYTES, end - start)
        data = os.pread(source, count, start)
        if not data or data != os.pread(output, count, start + shift):
            return False
        start += len(data)
    return True
