"""Output directories that are either absent or whole: a stage beside the target, a journal, one rename.

While OUT is being made, everything about it lies in one hidden directory beside it::

    .OUT.nlora-stage/
      identity.json      what would be written: command, options, source, tool version
      lock               held by the process that writes, names it
      journal-R.jsonl    one line per finished unit of work of rank R
      tree/              what becomes OUT
      replaced/          what was OUT, while --overwrite takes its place

A process that is killed leaves this directory; the same command finds in the journal what is finished, checks
it, and does the rest. Durability is that of `cp`: nothing is forced to the disk, so after a power failure the
journal's checksums, not its lines, decide what counts as finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nlora_surgery.checkpoint import MANIFEST
from nlora_surgery.errors import OutputError, StageError

__all__ = ["Stage", "check_output", "describe_os_error", "disk_errors", "run_id"]


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output that would touch an input, or something that is not ours to replace.

    Args:
        out: the directory to be made.
        inputs: directories that are read.
        overwrite: whether an earlier output may be replaced.

    Raises:
        OutputError: `out` is, holds or lies in an input; it exists and `overwrite` is off; or it exists and
            is neither empty nor an earlier output.
    """
    resolved = Path(os.path.realpath(out))  # Path.resolve raises on a loop of links
    for source in (path.resolve() for path in inputs):
        if resolved == source:
            raise OutputError(f"the output {out} is the source itself; name another directory with -o")
        if source in resolved.parents:
            raise OutputError(f"the output {out} lies inside the source {source}; name one outside of it")
        if resolved in source.parents:
            raise OutputError(f"the output {out} contains the source {source}; name another directory")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a directory; name another output with -o")
    with disk_errors(out):
        here, empty = Path.cwd(), not any(out.iterdir())
    if resolved == here or resolved in here.parents:
        raise OutputError(
            f"the output {out} is or holds the directory that you are in, which cannot be replaced; name another "
            "with -o"
        )
    if not overwrite and not empty:
        raise OutputError(f"{out} exists; name another output with -o, or replace it with --overwrite")
    if not empty and not (out / MANIFEST).exists():
        raise OutputError(
            f"{out} was not written by nlora_surgery (it has no {MANIFEST}), so --overwrite will not replace it; "
            "remove it yourself or name another output"
        )


def describe_os_error(error: OSError, out: Path) -> OutputError:
    """What a failed system call means for somebody who wants `out`."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return OutputError(
            f"no space left for {out}; what is finished is kept: make space and run the same command again",
            resumable=True,
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        where = error.filename or out
        return OutputError(f"cannot write {where}: {error.strerror}; name an output in a writable place with -o")
    return OutputError(f"cannot write {out}: {error.strerror or error} ({error.filename or 'input/output'})")


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn any `OSError` inside into an `OutputError` about `out`."""
    try:
        yield
    except OSError as error:
        raise describe_os_error(error, out) from error


def run_id(identity: Mapping[str, Any]) -> str:
    """A short name of everything that decides what a command writes; stands as `run` in the manifest."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Stage:
    """The unfinished form of one output directory.

    Attributes:
        out: the directory that `commit` makes.
        tree: the directory that becomes it.
        finished: the journal's record of each finished unit of an earlier run of the same command.
        complete: an earlier run of the same command had committed and was killed while tidying up.
    """

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out = out
        self.directory = out.parent / f".{out.name}.nlora-stage"
        self.tree = self.directory / "tree"
        self.finished: dict[str, dict[str, Any]] = {}
        self.complete = False
        self._journal = self.directory / f"journal-{rank}.jsonl"
        self._identity = self.directory / "identity.json"
        self._lock: int | None = None
        self._made: list[Path] = []

    def acquire(self, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        """Take the stage for this process, and find out what an earlier run left in it.

        Args:
            identity: everything that decides what is written, as JSON values.
            overwrite: start over where the stage is of another command.

        Raises:
            StageError: another process holds the stage, or it is of another command.
            OutputError: the stage cannot be made.
        """
        with disk_errors(self.out):
            self._make_directory()
            self._take_lock()
            replaced = self.directory / "replaced"
            if replaced.exists() and not os.path.lexists(self.out):
                replaced.rename(self.out)  # killed between the two renames of an --overwrite: undo the first
            if not overwrite and self._committed(identity) and not self.tree.exists():
                self.complete = True
                return
            found = self._read_identity()
            if found is not None and found != json.loads(json.dumps(identity)):
                if not overwrite:
                    self.release()
                    raise StageError(
                        f"{self.directory} holds an unfinished run of another command or source "
                        f"({_difference(found, identity)}); run that command again to finish it, or add --overwrite "
                        "to start over"
                    )
                found = None
            if found is None:
                self._clear()
                _write_atomically(self._identity, json.dumps(identity, indent=1))
            self.tree.mkdir(exist_ok=True)
            self._read_journals()

    def record(self, unit: str, record: Mapping[str, Any]) -> None:
        """Note that a unit is finished; its bytes must have been written before."""
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"unit": unit, **record}) + "\n")

    def commit(self) -> None:
        """Make the tree the output, in one rename, and tidy up."""
        with disk_errors(self.out):
            replaced = self.directory / "replaced"
            replaces = os.path.lexists(self.out)
            if replaces:
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
            try:
                self.tree.rename(self.out)
            except OSError:
                if replaces:
                    replaced.rename(self.out)  # or discarding the stage would take it away
                raise
        self.discard()

    def discard(self) -> None:
        """Remove the stage and whatever directories were made for it, if this process holds it."""
        if self._lock is None:
            return
        for path in (self.tree, self.directory / "replaced"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob("*"):
            path.unlink(missing_ok=True)
        self.release()
        self._remove_directories()

    def release(self) -> None:
        """Let another process have the stage."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make_directory(self) -> None:
        missing = []
        parent = self.directory.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        self.directory.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_directories(self) -> None:
        with contextlib.suppress(OSError):  # a second process may have put its lock there in the meantime
            self.directory.rmdir()
            for parent in self._made:
                parent.rmdir()

    def _take_lock(self) -> None:
        try:
            lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            self._remove_directories()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise StageError(f"{holder} is writing {self.out}; wait for it, or name another output with -o") from None
        os.truncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._lock = lock

    def _committed(self, identity: Mapping[str, Any]) -> bool:
        try:
            manifest = json.loads((self.out / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(manifest, dict) and manifest.get("run") == run_id(identity)

    def _read_identity(self) -> dict[str, Any] | None:
        try:
            identity = json.loads(self._identity.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return identity if isinstance(identity, dict) else None

    def _read_journals(self) -> None:
        for path in sorted(self.directory.glob("journal-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    unit = record.pop("unit")
                except (ValueError, TypeError, AttributeError, LookupError):
                    continue  # the line that a kill cut short, or a power failure damaged: its unit is done again
                if isinstance(unit, str):
                    self.finished[unit] = record

    def _clear(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        for path in self.directory.glob("journal-*.jsonl"):
            path.unlink()


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    return "; ".join(f"{key} was {found.get(key)!r}, now {wanted.get(key)!r}" for key in keys[:3])


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
