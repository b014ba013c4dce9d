"""Killed, interrupted, out of space, started twice, started as ranks: nothing half-written, the same bytes.

The oracle is an uninterrupted run of the same command.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nlora_surgery_cli import main
from nlora_surgery_cli.render import ProgressBar
from safetensors.torch import save_file

from nlora_surgery.errors import OutputError, StageError
from nlora_surgery.options import FactorOptions
from nlora_surgery.rewrite import Progress
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from tests.test_convert import trained
from tests.test_init import same_files

Surgery = Callable[..., Any]
Uninterrupted = Callable[[str], tuple[Path, float]]

SHARDS = 6
OPTIONS = InitOptions(rank=8, factor=FactorOptions(method="sketch"), adapter_dtype="bfloat16")

# A server that has imported torch forks each run: a kill costs milliseconds, not an import.
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [f"nlora_surgery.surgery.{name}" for name in ("prepare", "merge", "convert", "extract")]
PRELOAD += [f"nlora_surgery_cli.{name}" for name in ("init", "merge", "convert", "extract")]
PRELOAD += ["nlora_surgery.hub", "rich.progress", "tests.test_resume"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of two layers' linears and an untouched tensor each, and one shard that is untouched."""
    directory = tmp_path_factory.mktemp("inputs") / "model"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS + 1:05d}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.up_proj.weight": random_tensor(700, 300),
            f"model.layers.{shard}.norm.weight": random_tensor(300),
            f"model.layers.{shard}.mlp.down_proj.weight": random_tensor(300, 700),
        }
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    name = f"model-{SHARDS + 1:05d}-of-{SHARDS + 1:05d}.safetensors"
    save_file({"lm_head.weight": random_tensor(500, 300)}, directory / name, metadata={"format": "pt"})
    weight_map["lm_head.weight"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture(scope="module")
def commands(model: Path) -> dict[str, list[str]]:
    """The command lines under test, with an output whose name is the same everywhere.

    The model is prepared, its adapter trained, merged and brought back to the model; what the merge changed is
    extracted.
    """
    folder = model.parent
    prepared, adapter, tuned = folder / "prepared", folder / "trained", folder / "tuned"
    prepare(plan_init(model, prepared, OPTIONS))
    trained(prepared, adapter)
    merge(plan_merge(prepared, [(adapter, 1.0)], tuned))
    lines = {
        "init": ["init", model, "-r", 8, "--method", "sketch", "--adapter-dtype", "bfloat16"],
        "merge": ["merge", prepared, adapter],
        "convert": ["convert", adapter, "--base", model, "--initial", prepared / "adapter", "-r", 8],
        "extract": ["extract", model, tuned, "-r", 8],
    }
    return {name: [*map(str, words), "-o", "out"] for name, words in lines.items()}


OTHERS = ["merge", "convert", "extract"]  # than init, which most tests take


def run(line: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    """`nlora_surgery LINE` in `folder`, all that it prints in `log`."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["nlora_surgery", *line]
    with open(log, "w", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        main()


def start(line: Sequence[str], folder: Path, log: Path = Path(os.devnull), **environment: str) -> Any:
    FORKS.set_forkserver_preload(PRELOAD)
    process = FORKS.Process(target=run, args=(line, folder, log, environment))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """A command's output without interruptions, made once, and how long it takes."""
    done: dict[str, tuple[Path, float]] = {}

    def get(name: str) -> tuple[Path, float]:
        if name not in done:
            start(commands[name], tmp_path_factory.mktemp("warm-up")).join()
            folder, begin = tmp_path_factory.mktemp("reference"), time.monotonic()
            process = start(commands[name], folder)
            process.join()
            assert process.exitcode == 0
            done[name] = folder / "out", time.monotonic() - begin
        return done[name]

    return get


@pytest.fixture(scope="module")
def reference(uninterrupted: Uninterrupted) -> tuple[Path, float]:
    """The same of init."""
    return uninterrupted("init")


@pytest.mark.parametrize(
    ("command", "attempt"),
    [*itertools.product(["init"], range(24)), *itertools.product(OTHERS, range(6))],
)
def test_killed_at_any_moment(
    command: str, attempt: int, commands: dict[str, list[str]], uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """SIGKILL at a random moment, up to three times in a row; then the same command finishes the work."""
    line = commands[command]
    whole, duration = uninterrupted(command)
    rng = random.Random(attempt)
    for _ in range(rng.randint(1, 3)):
        process = start(line, tmp_path)
        process.join(rng.uniform(0, 1.1 * duration))
        process.kill()
        process.join()
        if (tmp_path / "out").exists():  # the commit came first: then the output is whole
            same_files(whole, tmp_path / "out")
            break
    else:
        last = start(line, tmp_path)
        last.join()
        assert last.exitcode == 0
    same_files(whole, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] in (
        ["out"],
        ["out", ".out.nlora-stage"],
        [".out.nlora-stage", "out"],
    )
    # A stage that outlived the commit (killed while tidying up) goes when the command is run once more.
    if (tmp_path / ".out.nlora-stage").exists():
        again = start(line, tmp_path)
        again.join()
        assert again.exitcode == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class _Stop(Progress):
    """Raises in the middle of the work, as Ctrl-C does."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left = after
        self.error = error
        self.notices: list[str] = []

    def advance(self, count: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def notice(self, text: str) -> None:
        self.notices.append(text)


def test_finished_shards_are_used_again(
    model: Path, reference: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after some shards: their files in the output are the very ones that were staged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread: the shards finish in order
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_init(model, Path("out"), OPTIONS), progress=_Stop(9, KeyboardInterrupt))
    assert not (tmp_path / "out").exists()
    stage = tmp_path / ".out.nlora-stage"
    finished = {json.loads(line)["unit"] for line in (stage / "journal-0.jsonl").read_text().splitlines()}
    assert 0 < len(finished) < SHARDS
    before = {name: (stage / "tree" / name).stat() for name in finished}
    listener = _Stop(10**6, KeyboardInterrupt)
    prepare(plan_init(model, Path("out"), OPTIONS), progress=listener)
    assert any(f"{len(finished)} of {SHARDS + 1} shards" in notice for notice in listener.notices)
    for name, stat in before.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), f"{name} was written again"
    same_files(reference[0], tmp_path / "out")


def test_a_damaged_staged_shard_is_done_again(
    model: Path, reference: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure can leave a journal line whose data never reached the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_init(model, Path("out"), OPTIONS), progress=_Stop(13, KeyboardInterrupt))
    stage = tmp_path / ".out.nlora-stage"
    finished = [json.loads(line)["unit"] for line in (stage / "journal-0.jsonl").read_text().splitlines()]
    assert len(finished) >= 2
    for name, offset in ((finished[0], -5000), (finished[1], -1)):  # edited weights, and a copied tensor or weight
        with open(stage / "tree" / name, "r+b") as file:
            file.seek(offset, os.SEEK_END)
            file.write(b"\0" if offset == -1 else b"\1" * 64)
    with open(stage / "journal-0.jsonl", "a") as journal:
        journal.write('{"unit": "model-0000')  # a line that was cut short
    prepare(plan_init(model, Path("out"), OPTIONS))
    same_files(reference[0], tmp_path / "out")


def test_another_command_does_not_mix(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_init(model, Path("out"), OPTIONS), progress=_Stop(9, KeyboardInterrupt))
    other = InitOptions(rank=9, factor=FactorOptions(method="sketch"), adapter_dtype="bfloat16")
    with pytest.raises(StageError, match=r"unfinished run of another command.*rank was 8, now 9"):
        prepare(plan_init(model, Path("out"), other))
    assert (tmp_path / ".out.nlora-stage").exists(), "the refused command removed the other's work"
    prepare(plan_init(model, Path("out"), other), overwrite=True)
    (tmp_path / "fresh").mkdir()
    monkeypatch.chdir(tmp_path / "fresh")
    prepare(plan_init(model, Path("out"), other))
    same_files(tmp_path / "fresh" / "out", tmp_path / "out")


@pytest.mark.parametrize("command", ["init", *OTHERS])
def test_two_processes_on_one_output(
    command: str,
    commands: dict[str, list[str]],
    uninterrupted: Uninterrupted,
    surgery: Surgery,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one says who holds it, and does the first no harm."""
    log = tmp_path_factory.mktemp("log") / "second"
    seconds = []

    def start_second(*_: object) -> None:
        second = start(commands[command], tmp_path, log)
        second.join()
        seconds.append(second.exitcode)

    monkeypatch.setattr(ProgressBar, "start", start_second)
    monkeypatch.chdir(tmp_path)
    done = surgery(*commands[command])
    assert done.code == 0, done.stderr
    assert seconds == [9]
    assert f"process {os.getpid()} on" in log.read_text()
    same_files(uninterrupted(command)[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_replacing_leaves_the_old_or_the_new(
    commands: dict[str, list[str]], reference: tuple[Path, float], tmp_path: Path
) -> None:
    whole, duration = reference
    rng = random.Random(0)
    line = commands["init"]
    first = start(line, tmp_path)
    first.join()
    for _ in range(6):
        process = start([*line, "--overwrite"], tmp_path)
        process.join(rng.uniform(0.3, 1.1) * duration)
        process.kill()
        process.join()
        if (tmp_path / "out").exists():
            same_files(whole, tmp_path / "out")
        else:  # between the two renames: both are still there
            assert (tmp_path / ".out.nlora-stage" / "tree").exists()
            same_files(whole, tmp_path / ".out.nlora-stage" / "replaced")
    last = start([*line, "--overwrite"], tmp_path)
    last.join()
    assert last.exitcode == 0
    same_files(whole, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_put_aside_comes_back(
    model: Path, reference: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames of an --overwrite, then a command that is refused: the old output is there."""
    monkeypatch.chdir(tmp_path)
    prepare(plan_init(model, Path("out"), OPTIONS))
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_init(model, Path("out"), OPTIONS), overwrite=True, progress=_Stop(9, KeyboardInterrupt))
    stage = tmp_path / ".out.nlora-stage"
    (tmp_path / "out").rename(stage / "replaced")  # what commit does first
    with pytest.raises(OutputError, match="out exists"):
        prepare(plan_init(model, Path("out"), OPTIONS))
    same_files(reference[0], tmp_path / "out")
    prepare(plan_init(model, Path("out"), OPTIONS), overwrite=True)
    same_files(reference[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """SIGINT as in the foreground of a shell; a suite in the background has it ignored, and so have its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_says_that_the_stage_can_be_resumed(model: Path, tmp_path: Path) -> None:
    """A real SIGINT to the real command."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "nlora_surgery", "init", str(model), "-r", "200", "--method", "pissa", "-o", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    stage = tmp_path / ".out.nlora-stage" / "tree"
    deadline = time.monotonic() + 60
    while not stage.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with it" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert stage.exists()


@pytest.mark.usefixtures("heard_ctrl_c")
@pytest.mark.parametrize("command", OTHERS)
def test_ctrl_c_leaves_a_stage_that_the_same_command_finishes(
    command: str,
    commands: dict[str, list[str]],
    uninterrupted: Uninterrupted,
    surgery: Surgery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real SIGINT amid the tensors; convert has one file to read, so for it there is no finished shard."""
    count = itertools.count(1)

    def interrupt(*_: object) -> None:
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the main thread hears it, and tells this one to stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread: the shards finish in order
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "advance", interrupt)
        done = surgery(*commands[command])
    assert done.code == 130
    assert "the same command goes on with it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.nlora-stage"]
    done = surgery(*commands[command])
    assert done.code == 0, done.stderr
    assert ("going on with an earlier run" in done.stderr) == (command != "convert")
    same_files(uninterrupted(command)[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- ranks --------------------------------------------------------------------------------------------------


def rank_environments(count: int) -> list[dict[str, str]]:
    """What torchrun would set for the processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [{**group, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@pytest.mark.parametrize("command", OTHERS)
def test_two_ranks_write_the_bytes_of_one_process(
    command: str, commands: dict[str, list[str]], uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """Two processes with the environment that torchrun would give them; they meet over gloo."""
    ranks = [start(commands[command], tmp_path, **environment) for environment in rank_environments(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    same_files(uninterrupted(command)[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def torchrun(count: int, folder: Path, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        "-m", "nlora_surgery", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_write_the_bytes_of_one_process(
    count: int, model: Path, reference: tuple[Path, float], tmp_path: Path
) -> None:
    done = torchrun(
        count, tmp_path, "init", model, "-r", 8, "--method", "sketch", "--adapter-dtype", "bfloat16", "-o", "out"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote out") == 1, "each rank reports"
    same_files(reference[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_ranks_failure_fails_all(model: Path, tmp_path: Path) -> None:
    """A NaN in the shard of one rank: no rank commits, nothing is left, and each says why.

    Without torchrun, which kills the others as soon as one has ended.
    """
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shard = broken / f"model-{SHARDS:05d}-of-{SHARDS + 1:05d}.safetensors"
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 4 * 2)  # in the middle of a weight
        file.write(b"\xff\xff")  # a bf16 NaN
    command = [sys.executable, "-m", "nlora_surgery", "init", str(broken), "-r", "8", "-o", "out"]
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        for environment in rank_environments(2)
    ]
    said = [rank.communicate(timeout=120)[1].splitlines()[-1] for rank in ranks]
    assert all(rank.returncode for rank in ranks), said
    assert all("NaN or infinity" in line for line in said), said
    assert sum("failed while writing the shards" in line for line in said) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_shares_are_balanced_by_bytes() -> None:
    from nlora_surgery.ranks import Ranks

    sizes = [7, 1, 1, 1, 5, 3, 2, 8]
    shares = [Ranks(rank, 3).share(sizes, int) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == sorted(sizes)
    # Graham's bound for largest-first: 4/3 - 1/(3 ranks) of the best possible, which is at least the mean.
    assert max(map(sum, shares)) <= (4 / 3 - 1 / 9) * max(max(sizes), sum(sizes) / 3)


def test_a_disk_error_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OutputError, match="cannot write out: Input/output error"):
        prepare(plan_init(model, Path("out"), OPTIONS))
