"""The shape of the code: floors, public names, light imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from nlora_surgery_cli import COMMANDS

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "nlora_surgery"

# Imports go down only. A new module gets its place here.
FLOORS = [
    {"errors", "options", "version", "markup"},
    {"factor", "checkpoint", "adapter_keys", "charts"},
    {"devices", "ranks", "staging"},
    {"rewrite", "targets", "adapter"},
    {"manifest", "spectra", "training.layers"},
    {
        "surgery.prepare",
        "surgery.convert",
        "surgery.extract",
        "surgery.merge",
        "surgery.verify",
        "surgery.inspect",
        "hub",
        "training.data",
        "training.loading",
        "card",
        "page",
    },
    {"training.trainer", "training.generate", "push", "report"},
    {"peft_plugin"},
]
ENTRY_POINTS = {"", "surgery", "training", "__main__"}  # packages hold no code; __main__ starts the command line


def modules() -> dict[str, Path]:
    found = {}
    for path in LIBRARY.rglob("*.py"):
        name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_floor() -> None:
    assert set().union(*FLOORS) == set(modules()) - ENTRY_POINTS


@pytest.mark.parametrize("name", sorted(set().union(*FLOORS)))
def test_imports_go_down_only(name: str) -> None:
    own = next(level for level, floor in enumerate(FLOORS) if name in floor)
    below = set().union(*FLOORS[:own])
    imported = imported_modules(modules()[name])
    ours = {each.removeprefix("nlora_surgery.") for each in imported if each.startswith("nlora_surgery.")}
    assert ours & set(modules()) <= below
    assert not any(each.startswith("nlora_surgery_cli") for each in imported), "the library imports the CLI"


def test_only_hub_imports_huggingface_hub() -> None:
    users = {name for name, path in modules().items() if any("huggingface_hub" in n for n in imported_modules(path))}
    assert users == {"hub"}


def test_only_the_plugin_imports_peft() -> None:
    users = {name for name, path in modules().items() if any(n.split(".")[0] == "peft" for n in imported_modules(path))}
    assert users == {"peft_plugin"}


@pytest.mark.parametrize("name", sorted(set().union(*FLOORS)))
def test_all_is_complete_and_true(name: str) -> None:
    module = importlib.import_module(f"nlora_surgery.{name}")
    defined = {
        node.name
        for node in ast.parse(modules()[name].read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(module.__all__)
    assert all(hasattr(module, each) for each in module.__all__)


def test_the_public_names_exist() -> None:
    import nlora_surgery

    for name in nlora_surgery.__all__:
        assert getattr(nlora_surgery, name) is not None
    with pytest.raises(AttributeError):
        _ = nlora_surgery.no_such_name


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    """`--help` must answer at once; torch alone takes over a second to import."""
    script = (
        "import sys; from nlora_surgery_cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split(), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
