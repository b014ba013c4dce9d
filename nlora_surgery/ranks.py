"""The processes of one command: alone, or those that torchrun started, on one machine or several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from nlora_surgery.errors import OutputError, SurgeryError

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """This process among those that do one job together.

    Attributes:
        rank: from 0.
        world_size: how many there are.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self._opened_group = False

    @classmethod
    def from_environment(cls) -> Ranks:
        """The ranks that torchrun's environment variables describe; one rank without them.

        Uses gloo, whatever the device: the ranks exchange figures, never tensors.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        ranks = cls(int(os.environ["RANK"]), world_size)
        if not dist.is_initialized():
            dist.init_process_group("gloo")
            ranks._opened_group = True
        return ranks

    @property
    def first(self) -> bool:
        """Whether this rank is the one that stages, finishes and commits."""
        return self.rank == 0

    def share(self, items: Sequence[T], size: Callable[[T], int]) -> list[T]:
        """This rank's part of the items: the largest first, each to whoever has least (LPT scheduling)."""
        loads = [0] * self.world_size
        mine = []
        for index in sorted(range(len(items)), key=lambda index: (-size(items[index]), index)):
            rank = loads.index(min(loads))
            loads[rank] += size(items[index])
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._exchange(lambda: dist.all_gather_object(values, value))
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        return self.gather(value)[0]

    @contextlib.contextmanager
    def agreement(self, what: str) -> Iterator[None]:
        """Wait for all ranks at the end of the block; the failure of one is the failure of all.

        Args:
            what: is being done, for the message.

        Raises:
            SurgeryError: the block failed on this rank (its own error), or on another.
        """
        try:
            yield
        except SurgeryError as error:
            if self.world_size > 1:
                self.gather((str(error), error.resumable))
            raise
        if self.world_size == 1:
            return
        for rank, failure in enumerate(self.gather(None)):
            if failure is not None:
                message, resumable = failure
                raise OutputError(f"rank {rank} failed while {what}: {message}", resumable=resumable)

    def _exchange(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except (RuntimeError, ValueError) as error:
            raise OutputError(
                "another rank stopped answering; what is finished is kept: run the same command again "
                f"({str(error).splitlines()[0][:200]})",
                resumable=True,
            ) from error

    def close(self) -> None:
        """Leave the process group, if this object joined it."""
        if self._opened_group:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
            self._opened_group = False
