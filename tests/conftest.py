"""What all tests share: the trained fixture model, the command line, processes that use a Hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import LoopbackHub

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny-llama"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained Llama of fixtures/: bf16, four shards, 4 layers of hidden size 128."""
    return FIXTURE


@dataclass(frozen=True)
class Finished:
    """A command that ran."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`nlora_surgery ARGUMENTS` in this process, through its real entry point and its exit codes."""
    from nlora_surgery_cli import main

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["nlora_surgery", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Finished(int(end.value.code or 0), captured.out, captured.err)

    return run


# A Hub, and processes that use it: huggingface_hub reads its environment when it is imported.

Result = subprocess.CompletedProcess[str]
Runner = Callable[..., Result]
Fork = Callable[[Mapping[str, Any]], int]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The working directory of the processes."""
    path = tmp_path / "here"
    path.mkdir()
    return path


# To load torch and to take it down again lasts longer than all that is tested here. So one process loads it and
# forks for each job: a process with its own environment, in which huggingface_hub has not been imported yet.
FORKS = """
import json, os, signal, sys, traceback
import nlora_surgery.surgery.prepare, nlora_surgery.surgery.merge, nlora_surgery.push
import nlora_surgery_cli.init, nlora_surgery_cli.push, yaml
import importlib.util
if importlib.util.find_spec("httpx2"):  # what huggingface_hub is slow to import, by its version
    import httpx2
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(50)
    for descriptor, path in enumerate([os.devnull, job["stdout"], job["stderr"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv[1:] = job["args"]
    status = 0
    try:
        exec(job["code"])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)
"""


@pytest.fixture(scope="session")
def fork() -> Iterator[Fork]:
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        requests, codes = server.stdin, server.stdout
        assert requests is not None
        assert codes is not None

        def fork(job: Mapping[str, Any]) -> int:
            requests.write(json.dumps(job).encode() + b"\n")
            requests.flush()
            return int(codes.readline())

        yield fork


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """No login, an empty cache that the processes of one test share, no Hub but ours."""
    theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def run(fork: Fork, environment: dict[str, str], here: Path, tmp_path: Path) -> Runner:
    """Run Python code in a process of its own, in `here`."""

    def run(code: str, *args: str, **env: str) -> Result:
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        out.write_bytes(b"")
        err.write_bytes(b"")
        job = {"code": code, "args": args, "cwd": str(here), "stdout": str(out), "stderr": str(err)}
        status = fork({**job, "env": environment | env})
        return Result(args, status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    return run
