"""`hub.fetch` and the commands that use it, with the real client against a Hub on the loopback interface.

huggingface_hub reads its environment when it is imported, so everything here runs in a process of its own.
Oracles: the files that were put on the Hub, the requests that the Hub saw, and for `init` its own result from
a local directory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.loopback_hub import LoopbackHub

TOKEN = "hf_" + "secret" * 6
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SMALL = [".gitattributes", "README.md", "config.json", INDEX, "nested/notes.txt", "tokenizer.json"]
NOT_NEEDED = [
    "consolidated.safetensors", "model-00001-of-00003.safetensors", "model.fp16.gguf", "onnx/config.json",
    "onnx/model.onnx", "optimizer.pt", "original/params.json", "original/consolidated.00.pth",
    "pytorch_model.bin", "sub/model.safetensors", "tf_model.h5",
]  # fmt: skip

INIT = ["--rank", "4", "--device", "cpu"]

Result = subprocess.CompletedProcess[str]
Runner = Callable[..., Result]
Fetcher = Callable[..., Path]


def write_model(directory: Path, seed: int = 0) -> Path:
    """A random Llama of two layers in two shards, with the small files that a model has."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj.weight": (16, 8), "mlp.gate_proj.weight": (12, 8), "input_layernorm.weight": (8,)}
    weight_map: dict[str, str] = {}
    directory.mkdir(parents=True)
    for layer, shard in enumerate(SHARDS):
        tensors = {
            f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    write(directory, {"config.json": json.dumps(config), INDEX: json.dumps({"weight_map": weight_map})})
    write(directory, {name: f"{name} of seed {seed}" for name in SMALL if not (directory / name).exists()})
    return directory


def write(directory: Path, texts: Mapping[str, str]) -> Path:
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


FETCH = "import sys; from nlora_surgery.hub import fetch; print(fetch(sys.argv[1]))"
COMMAND = "from nlora_surgery_cli import main; main()"
# The client waits between its attempts, for 23 seconds in all; nothing here depends on that.
NO_WAITING = "import time; time.sleep = lambda seconds: None\n"


@pytest.fixture
def fetch(run: Runner, here: Path) -> Fetcher:
    """`hub.fetch`, which has to succeed and to say nothing."""

    def fetch(name: str, **env: str) -> Path:
        result = run(FETCH, name, **env)
        assert (result.returncode, result.stderr) == (0, "")
        return here / result.stdout.removesuffix("\n")

    return fetch


@pytest.fixture
def init(run: Runner) -> Runner:
    """`nlora_surgery init`."""
    return lambda name, *options, **env: run(NO_WAITING + COMMAND, "init", name, *INIT, *options, **env)


def assert_one_sentence(result: Result, code: int, *words: str, notices: bool = False) -> None:
    """A failure as the command line promises it; `notices` allows the client's lines about its retries."""
    lines = result.stderr.splitlines()
    assert result.returncode == code, result.stderr
    assert [line.startswith("Error: ") for line in lines] == [False] * (len(lines) - 1) + [True], result.stderr
    assert notices or len(lines) == 1, result.stderr
    assert not re.search(r"[.!?] [A-Z]", lines[-1]), "more than one sentence"
    assert [word for word in words if word not in lines[-1]] == [], lines[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert TOKEN not in result.stderr


# What comes from where


def test_a_local_directory_wins(hub: LoopbackHub, model: Path, here: Path, fetch: Fetcher) -> None:
    hub.add_repo("org/name", model)
    local = write(here / "org" / "name", {"config.json": "local"})
    assert fetch("org/name") == local
    assert hub.requests == []


def test_comes_what_transformers_would_load_and_no_more(hub: LoopbackHub, model: Path, fetch: Fetcher) -> None:
    needed = contents(model)
    assert sorted(needed) == sorted(SMALL + SHARDS)
    hub.add_repo("org/name", write(model, dict.fromkeys(NOT_NEEDED, "large")))
    assert contents(fetch("org/name")) == needed
    assert hub.downloads("org/name") == sorted(needed)  # each once


def test_a_single_file_wins_over_an_index(hub: LoopbackHub, model: Path, fetch: Fetcher) -> None:
    hub.add_repo("org/name", write(model, {"model.safetensors": "single"}))
    fetch("org/name")
    assert hub.downloads("org/name") == sorted([*SMALL, "model.safetensors"])


@pytest.mark.parametrize("folder", ["", "adapter/"], ids=["alone", "with its residual base"])
def test_an_adapter_comes(hub: LoopbackHub, model: Path, fetch: Fetcher, folder: str) -> None:
    names = [f"{folder}adapter_config.json", f"{folder}adapter_model.safetensors"]
    adapter = write(model if folder else model.parent / "adapter", dict.fromkeys(names, "adapter"))
    hub.add_repo("org/name", write(adapter, {f"{folder}adapter_model.bin": "pickled"}))
    fetched = contents(fetch("org/name"))
    assert sorted(fetched) == sorted(names + (SMALL + SHARDS if folder else []))


def test_the_revision_that_is_named_comes(hub: LoopbackHub, model: Path, tmp_path: Path, fetch: Fetcher) -> None:
    other = write_model(tmp_path / "other", seed=1)
    old = hub.add_repo("org/name", write_model(tmp_path / "old", seed=2))
    hub.add_repo("org/name", model, revisions={"v2.0": other, "branch/of-two": other})
    for name, directory in {
        "org/name": model,
        "org/name@main": model,
        "org/name@v2.0": other,
        "org/name@branch/of-two": other,
        f"org/name@{old}": tmp_path / "old",
    }.items():
        assert contents(fetch(name)) == contents(directory), name


def test_all_files_are_of_one_commit(hub: LoopbackHub, model: Path, tmp_path: Path, fetch: Fetcher) -> None:
    hub.add_repo("org/name", model)
    later = write_model(tmp_path / "later", seed=1)
    hub.fail("*/README.md", method="GET", call=lambda: hub.add_repo("org/name", later), times=1)
    assert contents(fetch("org/name")) == contents(model)
    assert contents(fetch("org/name")) == contents(later)


def test_what_was_fetched_is_not_fetched_again(hub: LoopbackHub, model: Path, fetch: Fetcher) -> None:
    hub.add_repo("org/name", model)
    first = fetch("org/name")
    assert hub.downloads("org/name") != []

    hub.heal()
    assert fetch("org/name") == first
    assert [request.path for request in hub.requests if not request.path.startswith("/api/")] == []

    hub.add_repo("org/name", write(model, {"README.md": "main has moved"}))
    assert contents(fetch("org/name")) == contents(model)
    assert hub.downloads("org/name") == ["README.md"]


def test_the_login_is_used(hub: LoopbackHub, model: Path, fetch: Fetcher) -> None:
    hub.add_repo("org/name", model)
    fetch("org/name", HF_TOKEN=TOKEN)
    sent = {request.headers["Authorization"] for request in hub.requests if "org/name" in request.path}
    assert sent == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("down", [False, True], ids=["offline mode", "Hub down"])
def test_a_filled_cache_needs_no_hub(hub: LoopbackHub, model: Path, fetch: Fetcher, down: bool) -> None:
    hub.add_repo("org/name", model)
    first = fetch("org/name")
    hub.heal()
    assert fetch("org/name", **({"HF_ENDPOINT": closed_endpoint()} if down else {"HF_HUB_OFFLINE": "1"})) == first
    assert hub.requests == []


def closed_endpoint() -> str:
    """An address at which nothing listens any more."""
    with LoopbackHub() as stopped:
        return stopped.endpoint


# Downloads that break


def test_a_connection_that_breaks_is_taken_up(hub: LoopbackHub, model: Path, run: Runner) -> None:
    hub.add_repo("org/name", model)
    hub.fail(f"*/{SHARDS[1]}", method="GET", cut_after=100, times=1)
    # In pieces that are smaller than the file: the client keeps whole pieces only.
    result = run(f"import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 64; {FETCH}", "org/name")
    assert result.returncode == 0, result.stderr
    assert contents(Path(result.stdout.removesuffix("\n"))) == contents(model)
    gets = [request for request in hub.requests if request.method == "GET" and request.path.endswith(SHARDS[1])]
    assert [request.headers["Range"] for request in gets] == [None, "bytes=64-"]


def test_a_download_that_broke_off_goes_on(hub: LoopbackHub, model: Path, init: Runner, fetch: Fetcher) -> None:
    hub.add_repo("org/name", model)
    hub.fail(f"*/{SHARDS[1]}", method="GET", status=503)
    assert_one_sentence(init("org/name"), 11, "org/name", "503")
    hub.heal()
    assert contents(fetch("org/name")) == contents(model)
    assert hub.downloads("org/name") == [SHARDS[1]]


# The command line


def test_init_from_the_hub_is_init_from_a_directory(
    hub: LoopbackHub, model: Path, here: Path, init: Runner, environment: dict[str, str]
) -> None:
    hub.add_repo("org/name", model)
    command = [sys.executable, "-m", "nlora_surgery", "init", "org/name", *INIT]
    from_hub = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert from_hub.returncode == 0, from_hub.stderr
    assert [path.name for path in here.iterdir()] == ["name-nlora-r4"]
    out = (here / "name-nlora-r4").rename(here / "from_hub")
    assert [path for path in out.rglob("*") if path.is_symlink()] == []

    model.rename(here / "name")  # so that the output is called the same, and only the source is not
    from_directory = init("name")
    assert from_directory.returncode == 0, from_directory.stderr
    expected = contents(here / "name-nlora-r4")
    found = contents(out)
    expected_manifest, found_manifest = (json.loads(files.pop("nlora_surgery.json")) for files in (expected, found))
    names = [files["source"].pop("name") for files in (expected_manifest, found_manifest)]
    assert names == ["name", "org/name"]
    for files in (expected_manifest, found_manifest):
        files.pop("run", None)  # the run's identity: the options, and the source's name among them
    assert found_manifest == expected_manifest
    assert found == expected
    assert {*SHARDS, "adapter/adapter_model.safetensors"} < set(found)
    assert found[SHARDS[0]] != (here / "name" / SHARDS[0]).read_bytes()  # something was done at all


def test_a_virtual_residual_names_the_hub_id(hub: LoopbackHub, model: Path, here: Path, init: Runner) -> None:
    hub.add_repo("org/name", model, revisions={"v2": model})
    result = init("org/name@v2", "--residual", "virtual")
    assert result.returncode == 0, result.stderr
    config = json.loads((here / "name-nlora-r4" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/name@v2"


@pytest.mark.parametrize("residual", ["baked", "virtual"])
def test_an_output_of_init_comes_whole(
    hub: LoopbackHub, model: Path, here: Path, init: Runner, run: Runner, residual: str
) -> None:
    (here / "org").mkdir()
    assert init(str(model), "--residual", residual, "--out", "org/out").returncode == 0
    hub.add_repo("org/out", here / "org" / "out")
    from_directory = run(COMMAND, "inspect", "org/out")
    assert hub.requests == []
    (here / "org").rename(here / "away")
    from_hub = run(COMMAND, "inspect", "org/out")
    assert (from_hub.returncode, from_hub.stdout) == (0, from_directory.stdout), from_hub.stderr
    assert "adapter/adapter_model.safetensors" in hub.downloads("org/out")


def test_a_report_of_what_is_on_the_hub(hub: LoopbackHub, model: Path, here: Path, init: Runner, run: Runner) -> None:
    """The page lies here; its spectra are those of the base, which is on the Hub as well."""
    assert init(str(model), "--residual", "virtual", "--out", "out").returncode == 0
    hub.add_repo("org/out", here / "out")
    hub.add_repo("org/base", model)
    model.rename(model.with_name("away"))  # or it would be found where init found it
    alone = run(COMMAND, "report", "org/out", "--json")
    assert alone.returncode == 0, alone.stderr
    assert "No spectra" in alone.stderr
    assert (here / "out-report.html").exists()
    whole = run(COMMAND, "report", "org/out", "--base", "org/base", "--overwrite", "--json")
    assert whole.returncode == 0, whole.stderr
    assert "spectra" not in json.loads(alone.stdout)
    assert json.loads(whole.stdout)["spectra"]["kinds"]


API = "/api/models/org/name*"
FILES = "/org/name/resolve/*"
ERRORS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str], Sequence[str]]] = {
    "no repository": ("org/absent", {}, {}, ["no such local directory", "no such repository"]),
    "no repository, logged in": ("org/absent", {}, {"HF_TOKEN": TOKEN}, ["no such repository"]),
    "no revision": ("org/name@v3", {}, {}, ["org/name@v3", "no such revision"]),
    "invalid id": ("org/na--me", {}, {}, ["not a valid repository id"]),
    "gated": ("org/name", {"pattern": API, "status": 401, "error_code": "GatedRepo"}, {}, ["on request"]),
    "gated files": (
        "org/name",
        {"pattern": FILES, "status": 403, "error_code": "GatedRepo"},
        {"HF_TOKEN": TOKEN},
        ["on request"],
    ),
    "login refused": ("org/name", {"pattern": API, "status": 401}, {"HF_TOKEN": TOKEN}, ["401", "HF_TOKEN"]),
    "login unsendable": ("org/name", {}, {"HF_TOKEN": f"{TOKEN}é"}, ["HF_TOKEN"]),
    "forbidden": ("org/name", {"pattern": API, "status": 403}, {}, ["403"]),
    "500": ("org/name", {"pattern": API, "status": 500}, {}, ["500", "try again later"]),
    "connection cut": ("org/name", {"pattern": API, "cut_after": 10}, {}, ["broke off"]),
    "no Hub": ("org/name", {"pattern": API, "status": 200, "body": b"<html>"}, {}, ["not a Hub", "HF_ENDPOINT"]),
    "other JSON": ("org/name", {"pattern": API, "status": 200, "body": b"{}"}, {}, ["not a Hub", "HF_ENDPOINT"]),
    "no answer": ("org/name", {"pattern": API, "hang": True}, {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, ["be reached"]),
    "Hub down": ("org/name", {}, {"HF_ENDPOINT": "closed"}, ["be reached", "cache does not hold"]),
    "offline": ("org/name", {}, {"HF_HUB_OFFLINE": "1"}, ["offline mode is on", "cache does not hold"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_hub_that_fails_is_one_sentence(hub: LoopbackHub, model: Path, here: Path, init: Runner, case: str) -> None:
    name, fault, env, words = ERRORS[case]
    hub.add_repo("org/name", model)
    if fault:
        hub.fail(**fault)
    if env.get("HF_ENDPOINT") == "closed":
        env = {"HF_ENDPOINT": closed_endpoint()}
    assert_one_sentence(init(name, **env), 11, f"cannot fetch {name}: ", *words)
    assert list(here.iterdir()) == []


RETRIED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "503": ({"status": 503}, "503"),
    "connection cut": ({"method": "GET", "cut_after": 10}, "broke off"),
}


@pytest.mark.parametrize("case", RETRIED)
def test_weights_that_never_come_are_one_sentence(
    hub: LoopbackHub, model: Path, here: Path, init: Runner, case: str
) -> None:
    hub.add_repo("org/name", model)
    fault, word = RETRIED[case]
    hub.fail(f"*/{SHARDS[1]}", **fault)
    assert_one_sentence(init("org/name"), 11, "cannot fetch org/name: ", word, notices=True)
    assert list(here.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(
    hub: LoopbackHub, model: Path, tmp_path: Path, init: Runner
) -> None:
    hub.add_repo("org/name", model)
    write(tmp_path, {"file": ""})
    result = init("org/name", HF_HOME=str(tmp_path / "file"))
    assert_one_sentence(result, 11, "Not a directory", str(tmp_path / "file"), notices=True)


def test_half_a_cache_and_no_hub_is_one_sentence(hub: LoopbackHub, model: Path, init: Runner) -> None:
    hub.add_repo("org/name", model)
    hub.fail("*.safetensors", method="GET", status=503)
    assert init("org/name").returncode == 11
    assert_one_sentence(init("org/name", HF_HUB_OFFLINE="1"), 11, "offline mode is on", "cache does not hold")


NO_MODELS: Sequence[tuple[str, str]] = [
    ("nosuchdir", "no such directory, and a Hub id is written org/name"),
    ("a/b/c", "no such directory"),
    ("../x", "no such directory"),
    ("org/..", "no such directory"),
    ("org/name@", "no such directory"),
    ("file.txt", "it is a file"),
    ("", "empty"),
    ("n" * 300 + "/name", "name too long"),
]


@pytest.mark.parametrize(("name", "words"), NO_MODELS, ids=lambda value: value[:10])
def test_a_name_that_is_neither_is_one_sentence(
    hub: LoopbackHub, here: Path, init: Runner, name: str, words: str
) -> None:
    (here / "file.txt").touch()
    assert_one_sentence(init(name), 3, words)
    assert hub.requests == []


@pytest.mark.parametrize("index", ["[]", "no JSON", '{"weight_map": 1}', '{"weight_map": {"a": "b"}}'])
def test_a_damaged_index_is_told_by_who_opens_it(hub: LoopbackHub, model: Path, init: Runner, index: str) -> None:
    hub.add_repo("org/name", write(model, {INDEX: index}))
    assert_one_sentence(init("org/name"), 3, notices=True)
