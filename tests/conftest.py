"""What all tests share: the trained fixture model, the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

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
