"""Where arithmetic runs: devices by name, the buffers and the stream of one thread, and in what precision."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from nlora_surgery.errors import OptionError
from nlora_surgery.factor import TILE_BYTES, row_tiles

__all__ = [
    "MemoryGrowth",
    "Workspace",
    "compute_dtype",
    "cpu_cores",
    "resolve_devices",
    "single_threaded_torch",
    "tile_bytes",
]

_GPU_TILE_BYTES = 64 << 20  # large enough that starting a kernel or a copy costs nothing beside it


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """What arithmetic on a weight is done in: fp32, and fp64 where the weight itself is fp32 or fp64."""
    return torch.float64 if stored in {torch.float32, torch.float64} else torch.float32


def cpu_cores() -> int:
    """How many cores this process may use, which in a container are often fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_devices(name: str) -> list[torch.device]:
    """The devices that `--device NAME` means.

    Args:
        name: `auto` (GPUs if there are any), `cpu`, `mps`, `cuda` (all that are visible; under torchrun this
            rank's own), or `cuda:N`.

    Raises:
        OptionError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name} is not a device; give auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cpu":
        return [device]
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError("--device mps, but torch finds no Metal device here; use --device cpu")
        return [device]
    if device.type != "cuda":
        raise OptionError(f"--device {name} is not supported; give auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if count == 0 or (device.index is not None and device.index >= count):
        raise OptionError(f"--device {name}, but torch sees {count} CUDA devices here; use --device cpu")
    if device.index is not None:
        return [device]
    if "LOCAL_RANK" in os.environ:
        return [torch.device("cuda", int(os.environ["LOCAL_RANK"]) % count)]
    return [torch.device("cuda", index) for index in range(count)]


def tile_bytes(device: torch.device) -> int:
    """Bytes of the tiles in which a tensor goes by."""
    return TILE_BYTES if device.type == "cpu" else _GPU_TILE_BYTES


class Workspace:
    """The buffers of one thread, and the stream that it computes on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tile_bytes = tile_bytes(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, use: str, dtype: torch.dtype, shape: tuple[int, ...], *, on_host: bool = False) -> Tensor:
        """Uninitialized memory of that shape, the same one at each call with the same `use`."""
        count = math.prod(shape)
        flat = self._buffers.get((use, dtype))
        if flat is None or flat.numel() < count:
            if on_host:
                flat = torch.empty(count, dtype=dtype, pin_memory=self.stream is not None)
            else:
                flat = torch.empty(count, dtype=dtype, device=self.device)
            self._buffers[use, dtype] = flat
        return flat[:count].view(shape)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Run what is inside on this thread's own stream."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield

    def upload(self, view: Tensor) -> Tensor:
        """The tensor on this thread's device; on the CPU, the view of the mapped file itself."""
        if self.stream is None:
            return view if self.device.type == "cpu" else view.to(self.device)
        resident = torch.empty(view.shape, dtype=view.dtype, device=self.device)
        source, target = (tensor.reshape(-1, view.shape[-1]) for tensor in (view, resident))
        arrived = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        for index, rows in enumerate(row_tiles(source.shape, view.dtype.itemsize, self.tile_bytes)):
            half = index % 2
            arrived[half].synchronize()  # until its last upload is done, this half is not to be filled anew
            pinned = self.buffer(f"upload {half}", view.dtype, tuple(source[rows].shape), on_host=True)
            pinned.copy_(source[rows])
            target[rows].copy_(pinned, non_blocking=True)
            arrived[half].record()
        return resident

    def download(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory, complete."""
        if self.device.type == "cpu":
            return tensor
        host = self.buffer("download", tensor.dtype, tuple(tensor.shape), on_host=True)
        host.copy_(tensor, non_blocking=self.stream is not None)
        if self.stream is not None:
            self.stream.synchronize()
        return host


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Sums in the order of one thread and in full precision, whatever the machine; for threads of our own."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32: it has fewer bits than the factors
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


class MemoryGrowth:
    """How much anonymous memory this process has taken since it began to look.

    Mapped files do not count: the kernel takes their pages back whenever it needs them.

    Attributes:
        peak_bytes: the most that any look saw; None where the system does not tell.
    """

    def __init__(self) -> None:
        self._start = self._anonymous()
        self.peak_bytes: int | None = None

    def look(self) -> None:
        """Compare with the start."""
        now = self._anonymous()
        if now is not None and self._start is not None:
            self.peak_bytes = max(self.peak_bytes or 0, now - self._start)

    @staticmethod
    def _anonymous() -> int | None:
        try:
            with open("/proc/self/status", encoding="ascii") as status:
                line = next((line for line in status if line.startswith("RssAnon:")), None)
        except OSError:
            return None
        return None if line is None else int(line.split()[1]) * 1024
