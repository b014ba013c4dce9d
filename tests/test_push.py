"""`nlora_surgery push`, with the real client against a Hub on the loopback interface.

Oracles: what the Hub holds and which requests it saw; the files as they were made; for the cards the loopback Hub's
validation, and transformers and PEFT, which run what the cards say.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nlora_surgery.options import FactorOptions
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from tests.conftest import Finished, Result, Runner
from tests.loopback_hub import LoopbackHub
from tests.test_hub import COMMAND, FETCH, NO_WAITING, TOKEN, assert_one_sentence, closed_endpoint, contents, write

BASE_CARD = """---
license: mit
language: en
tags: [tiny]
model-index: []
extra_gated_prompt: no
---
# Tiny

What its makers say.
"""

Pusher = Callable[..., Result]


@pytest.fixture(scope="session")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and what is made of it, in one directory: `base`, `baked`, `virtual`, `pissa`, `merged`, `run`."""
    folder = tmp_path_factory.mktemp("made")
    write(shutil.copytree(tiny_llama, folder / "base"), {"README.md": BASE_CARD})

    def init(name: str, source_name: str, options: InitOptions) -> None:
        prepare(plan_init(folder / "base", folder / name, options, source_name=source_name, device="cpu"), device="cpu")

    sketch = InitOptions(rank=8, factor=FactorOptions(method="sketch"), targets=("q_proj", "down_proj"))
    init("baked", "org/base", sketch)
    init("virtual", "org/base@v1", replace(sketch, residual="virtual"))
    init("pissa", "org/base", replace(sketch, factor=FactorOptions(method="pissa-fast", two_matrix=True)))
    plan = plan_merge(folder / "pissa", [(folder / "pissa" / "adapter", 1.0)], folder / "merged", device="cpu")
    merge(plan, device="cpu")
    # As train leaves it, with what must stay at home.
    run = shutil.copytree(folder / "virtual" / "adapter", folder / "run")
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    report = {"mode": "nlora", "trainable": 1234, "steps": 7, "train_loss": 1.25, "eval_loss": None}
    write(
        run,
        {
            "adapter_config.json": json.dumps({**config, "base_model_name_or_path": str(folder / "base")}),
            "train_options.json": json.dumps({"data": "/home/me/private.jsonl"}),
            "train_report.json": json.dumps(report),
            "metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
            **dict.fromkeys(
                ["checkpoint-7/optimizer.pt", "checkpoint-7/adapter_model.safetensors", "optimizer.pt"], "x"
            ),
            **dict.fromkeys([".secret", "runs/events.out", "notes.txt", "adapter_model.unfinished"], "private"),
        },
    )
    return folder


@pytest.fixture
def push(run: Runner, hub: LoopbackHub) -> Pusher:
    """`nlora_surgery push`, logged in; whatever it prints, the token is not in it, nor a signature."""
    hub.add_user(TOKEN, "me", ["org"])

    def push(directory: Path, *args: str, **env: str) -> Result:
        result = run(NO_WAITING + COMMAND, "push", str(directory), *args, **{"HF_TOKEN": TOKEN, **env})
        assert TOKEN not in result.stdout + result.stderr
        assert "Signature" not in result.stdout + result.stderr
        return result

    return push


def sent(hub: LoopbackHub) -> list[str]:
    """What changed something: uploads, commits, branches; the creation of a repository aside."""
    changing = re.compile(r"/lfs/.*|.*/commit/.*|.*/branch/.*")
    return [f"{each.method} {each.path}" for each in hub.requests if changing.fullmatch(each.path)]


def copy(directory: Path, to: Path, *without: str) -> Path:
    return shutil.copytree(directory, to, ignore=shutil.ignore_patterns(*without))


# What goes up


def test_a_prepared_checkpoint_goes_up_whole_and_only_once(
    hub: LoopbackHub, made: Path, push: Pusher, run: Runner
) -> None:
    hub.add_repo("org/base", made / "base")
    hub.part_bytes = 300_000  # so that some shards go in parts and others whole
    before = contents(made / "baked")
    result = push(made / "baked", "org/out")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(f"{hub.endpoint}/org/out\n")
    assert hub.is_private("org/out")
    assert any(request.path.endswith("/1") for request in hub.requests if request.method == "PUT")
    assert contents(made / "baked") == before

    there = hub.contents("org/out")
    assert there.keys() - before.keys() == {".gitattributes"}
    different = {name for name, content in before.items() if there[name] != content}
    assert different == {"README.md", "adapter/adapter_config.json"}
    config = json.loads(there["adapter/adapter_config.json"])
    assert config.pop("base_model_name_or_path") == "org/out"  # the residual base, not the original
    local = json.loads(before["adapter/adapter_config.json"])
    assert local.pop("base_model_name_or_path") == str(made / "baked")
    assert config == local

    hub.requests.clear()
    again = push(made / "baked", "org/out", "--json")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout)["changed"] is False
    assert sent(hub) == []

    fetched = run(FETCH, "org/out", HF_TOKEN=TOKEN)
    assert fetched.returncode == 0, fetched.stderr
    down = Path(fetched.stdout.removesuffix("\n"))
    assert contents(down) == there
    # And what comes down is what verify accepts, against the original too.
    from nlora_surgery.surgery.verify import Prepared, verify

    assert Prepared.open(down).base is not None
    assert verify(down).failures == []
    # Its card is pushed again as it is, not card below card.
    other = push(down, "org/other", "--dry-run", "--json")
    card = json.loads(other.stdout)["card"]
    assert card.count("## Load it") == 1
    assert card.endswith("What its makers say.\n")


def test_a_run_goes_up_without_its_checkpoints_and_its_secrets(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    dry = push(made / "run", "org/out", "--base-id", "org/base", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert hub.requests == []
    result = push(made / "run", "org/out", "--base-id", "org/base", "--public")
    assert (result.returncode, result.stderr) == (0, "")
    assert not hub.is_private("org/out")
    there = hub.contents("org/out")
    assert sorted(there.keys() - {".gitattributes"}) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "train_report.json",
    ]  # fmt: skip
    sizes = {name: len(content) for name, content in there.items() if name != ".gitattributes"}
    assert json.loads(dry.stdout)["files"] == sizes
    text = b"".join(content for name, content in there.items() if not name.endswith(".safetensors")).decode()
    assert str(made) not in text
    assert "/home/me" not in text
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert "| loss of the last step | 1.2500 |" in there["README.md"].decode()


def test_only_the_adapter(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base", revisions={"v1": made / "base"})
    result = push(made / "virtual", "org/out", "--adapter-only")
    assert (result.returncode, result.stderr) == (0, "")
    there = hub.contents("org/out")
    assert sorted(there) == [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(there["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


def test_a_merged_model_goes_up_without_local_paths_and_pickles(
    hub: LoopbackHub, made: Path, push: Pusher, tmp_path: Path
) -> None:
    left = [".env", "checkpoint-3/trainer_state.json", "optimizer.pt", "vocab.pickle"]
    merged = write(copy(made / "merged", tmp_path / "merged"), dict.fromkeys([*left, "extra.py"], "text"))
    result = push(merged, "org/out")
    assert result.returncode == 0, result.stderr
    there = hub.contents("org/out")
    assert there.keys() - {".gitattributes", "extra.py"} == contents(made / "merged").keys()
    text = there["nlora_surgery.json"].decode() + there["README.md"].decode()
    assert str(made) not in text
    assert "base_model" not in yaml.safe_load(text.partition("---\n")[2].partition("\n---")[0])
    hub.requests.clear()
    assert push(merged, "org/out", "--base-id", "org/nowhere").returncode == 0  # a model is of use without its base


def test_revisions_and_pull_requests(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    hub.add_repo("other/public", made / "base")
    arguments = [made / "run", "org/out", "--base-id", "org/base@v1", "--revision", "try/1"]
    assert_one_sentence(push(*arguments), 11, "org/base@v1", "no such revision")
    hub.add_repo("org/base", made / "base", revisions={"v1": made / "base"})
    result = push(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(hub.contents("org/out")) == [".gitattributes"]
    branch = hub.contents("org/out", "try/1")
    assert json.loads(branch["adapter_config.json"])["revision"] == "v1"
    assert 'from_pretrained(model, "org/out", revision="try/1")' in branch["README.md"].decode()
    assert 'from_pretrained("org/base", revision="v1")' in branch["README.md"].decode()

    result = push(made / "run", "other/public", "--base-id", "org/base", "--create-pr", "--public", "--json")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    report = json.loads(result.stdout)
    assert report["pull_request"] == "refs/pr/1"
    assert report["url"] == f"{hub.endpoint}/other/public/discussions/1"
    assert "model.safetensors.index.json" in report["others"]
    assert "adapter_config.json" in hub.contents("other/public", "refs/pr/1")
    assert hub.contents("other/public") == contents(made / "base")
    assert_one_sentence(
        push(made / "run", "other/public", "--base-id", "org/base", "--create-pr", "--revision", "x"), 2, "--create-pr"
    )


def test_a_push_that_broke_off_goes_on(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    shard = sorted((made / "baked").glob("model-*.safetensors"))[1]
    oid = hub_oid(shard)
    hub.fail(f"/lfs/{oid}", method="PUT", status=200, body=b"whole", cut_after=0)
    result = push(made / "baked", "org/out")
    assert_one_sentence(result, 11, "cannot push to org/out: the connection broke off", "same command", notices=True)
    assert len(hub.objects) == 4  # of four shards and the adapter
    assert sorted(hub.contents("org/out")) == [".gitattributes"]
    hub.heal()
    assert push(made / "baked", "org/out").returncode == 0
    assert [line for line in sent(hub) if line.startswith("PUT")] == [f"PUT /lfs/{oid}"]


def test_by_xet(hub: LoopbackHub, made: Path, push: Pusher, run: Runner, tmp_path: Path) -> None:
    """The storage server is a directory, which the client's own library for Xet writes and reads."""
    hub.xet = tmp_path / "xet"
    hub.add_repo("org/base", made / "base")
    xet = {"HF_HUB_DISABLE_XET": "0"}
    result = push(made / "baked", "org/out", **xet)
    assert (result.returncode, result.stderr) == (0, "")
    assert [request for request in hub.requests if request.method == "PUT"] == []
    fetched = run(FETCH, "org/out", HF_TOKEN=TOKEN, **xet)
    assert fetched.returncode == 0, fetched.stderr
    down, local = contents(Path(fetched.stdout.removesuffix("\n"))), contents(made / "baked")
    weights = [name for name in local if name.endswith(".safetensors")]
    assert len(weights) == 5
    assert [name for name in weights if down[name] != local[name]] == []

    hub.requests.clear()
    assert push(made / "baked", "org/out", **xet).stdout.startswith("Nothing had to be sent")
    assert sent(hub) == []
    hub.fail("*/xet-write-token/*", status=403)
    assert_one_sentence(push(made / "baked", "org/other", **xet), 11, "cannot push to org/other: ", "403", "HF_TOKEN")


def test_a_silent_xet_storage_ends_an_upload(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    hub.xet = f"{hub.endpoint}/storage"
    hub.fail("/storage/*", hang=True)
    xet = {"HF_HUB_DISABLE_XET": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}
    result = push(made / "run", "org/out", "--base-id", "org/base", **xet)
    assert_one_sentence(result, 11, "cannot push to org/out: the connection broke off", "same command", notices=True)
    assert any(request.path.startswith("/storage/") for request in hub.requests)


def hub_oid(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is refused before anything is sent


def refusals(made: Path, tmp_path: Path) -> Mapping[str, tuple[Path, Sequence[str], int, Sequence[str]]]:
    damaged = copy(made / "baked", tmp_path / "damaged")
    shard = next(damaged.glob("model-*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][3, 40] += 1  # not where the fingerprint looks
    save_file(tensors, shard, {"format": "pt"})
    merged = copy(made / "merged", tmp_path / "spoilt")
    for file in merged.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "q_proj" in name:
                tensors[name][3, 40] += 1
        save_file(tensors, file, {"format": "pt"})
    nan = copy(made / "run", tmp_path / "nan")
    tensors = load_file(nan / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, nan / "adapter_model.safetensors", {"format": "pt"})
    headless = copy(made / "baked", tmp_path / "headless", "model-00002*")
    return {
        "damaged": (damaged, [], 10, ["damaged", "checksum"]),
        "spoilt merge": (merged, [], 10, ["damaged", "merge again"]),
        "not finite": (nan, ["--base-id", "org/base"], 6, ["NaN"]),
        "a shard is missing": (headless, [], 3, ["no such file"]),
        "unfinished run": (
            copy(made / "run", tmp_path / "unfinished", "train_report.json"),
            ["--base-id", "org/base"],
            7,
            ["not finished", "--resume"],
        ),
        "half an adapter": (
            copy(made / "run", tmp_path / "half", "adapter_model.safetensors"),
            ["--base-id", "org/base"],
            7,
            ["no adapter_model.safetensors"],
        ),
        "a model of someone else": (made / "base", [], 3, ["neither", "nlora_surgery.json"]),
        "no directory": (tmp_path / "none", [], 3, ["no directory"]),
        "a local base": (made / "run", [], 2, [str(made / "base"), "--base-id"]),
        "the original for a residual": (made / "baked", ["--adapter-only"], 2, ["residual base", "--base-id"]),
        "a base that is no id": (made / "run", ["--base-id", "/x/y"], 2, ["--base-id", "org/name"]),
    }


REFUSED = [
    "damaged", "spoilt merge", "not finite", "a shard is missing", "unfinished run", "half an adapter",
    "a model of someone else", "no directory", "a local base", "the original for a residual", "a base that is no id",
]  # fmt: skip


def test_what_is_not_whole_is_refused(hub: LoopbackHub, made: Path, push: Pusher, tmp_path: Path) -> None:
    cases = refusals(made, tmp_path)
    assert list(cases) == REFUSED
    for case, (directory, options, code, words) in cases.items():
        result = push(directory, "org/out", *options, "--dry-run")
        assert result.returncode == code, (case, result.stderr)
        assert_one_sentence(result, code, *words)
    assert hub.requests == []
    # And without --dry-run nothing is sent either: only who it is was asked.
    assert push(tmp_path / "damaged", "org/out").returncode == 10
    assert sent(hub) == []
    assert "/api/repos/create" not in [request.path for request in hub.requests]


# Faults


def fault(pattern: str, **kind: Any) -> Mapping[str, Any]:
    return {"pattern": pattern, **kind}


PREUPLOAD, COMMIT, BLOB = "/api/models/org/out/preupload/*", "/api/models/org/out/commit/*", "/lfs/*"
FAULTS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str], Sequence[str]]] = {
    "no token": ("org/out", {}, {"HF_TOKEN": ""}, ["no login", "hf auth login", "HF_TOKEN"]),
    "bad token": ("org/out", {}, {"HF_TOKEN": "hf_wrong"}, ["401", "hf auth login", "HF_TOKEN"]),
    "unsendable token": ("org/out", {}, {"HF_TOKEN": f"{TOKEN}é"}, ["HF_TOKEN"]),
    "no permission": ("they/out", {}, {}, ["403", "hf auth login"]),
    "no permission to commit": ("org/out", fault(COMMIT, status=403), {}, ["403"]),
    "no repository": ("org/out", fault(PREUPLOAD, status=404, error_code="RepoNotFound"), {}, ["write role"]),
    "invalid name": ("org/na--me", {}, {}, ["not a valid repository id"]),
    "no name": ("out", {}, {}, ["written org/name"]),
    "a revision in the name": ("org/out@v1", {}, {}, ["--revision"]),
    "Hub down": ("org/out", {}, {"HF_ENDPOINT": "closed"}, ["cannot be reached", "network"]),
    "offline": ("org/out", {}, {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE"]),
    "not a Hub": ("org/out", fault("/api/whoami-v2", status=200, body=b"<html>"), {}, ["HF_ENDPOINT"]),
    "503": ("org/out", fault(BLOB, method="PUT", status=503), {}, ["503", "later"]),
    "503 on commit": ("org/out", fault(COMMIT, status=503), {}, ["503", "later"]),
    "cut": ("org/out", fault(PREUPLOAD, cut_after=5), {}, ["broke off", "same command"]),
    "409": ("org/out", fault(COMMIT, status=409), {}, ["changed meanwhile", "same command again"]),
    "412": ("org/out", fault(COMMIT, status=412), {}, ["changed meanwhile", "same command again"]),
    "429": ("org/out", fault(COMMIT, status=429, headers={"Retry-After": "17"}), {}, ["429", "in 17 seconds"]),
    "429 on whoami": ("org/out", fault("/api/whoami-v2", status=429), {}, ["429", "in some minutes"]),
    "stall": ("org/out", fault(COMMIT, hang=True), {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, ["silent for 1 seconds"]),
    "bad card": (
        "org/out",
        fault("/api/validate-yaml", status=400, body=b'{"errors": [{"message": "\\"license\\" is unknown"}]}'),
        {},
        ["card's metadata", "license"],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_sentence(hub: LoopbackHub, made: Path, push: Pusher, case: str) -> None:
    repo_id, what, env, words = FAULTS[case]
    hub.add_repo("org/base", made / "base")
    if what:
        hub.fail(**what)
    env = {name: closed_endpoint() if value == "closed" else value for name, value in env.items()}
    result = push(made / "run", repo_id, "--base-id", "org/base", **env)
    assert_one_sentence(result, 11, f"cannot push to {repo_id}: ", *words, notices=True)


def test_the_visibility_must_be_as_asked(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    hub.add_repo("org/private", made / "base", private=True)
    hub.add_repo("org/public", made / "base")
    for name, options, words in (
        ("org/private", ["--public"], "is private; give --private"),
        ("org/public", [], "is public; give --public"),
    ):
        result = push(made / "run", name, "--base-id", "org/base", *options)
        assert_one_sentence(result, 11, words)
    assert sent(hub) == []


def test_what_arrives_otherwise_is_found(hub: LoopbackHub, made: Path, push: Pusher) -> None:
    hub.add_repo("org/base", made / "base")
    tree = json.dumps([{"type": "file", "path": "metrics.jsonl", "size": 1, "oid": "0" * 40}]).encode()
    hub.fail("/api/models/org/out/tree/*", status=200, body=tree)
    result = push(made / "run", "org/out", "--base-id", "org/base")
    assert_one_sentence(result, 11, "metrics.jsonl", "did not arrive as sent")


# Cards

EXECUTE = """
import json, re, sys
import torch
from transformers.utils import logging
logging.disable_progress_bar()
logits = {}
for repo_id, file in json.loads(sys.argv[1]).items():
    names = {}
    exec(re.search(r"```python\\n(.*?)```", open(file).read(), re.DOTALL)[1], names)
    ids = names["tokenizer"]("two plus two", return_tensors="pt").input_ids
    assert ids.numel()
    with torch.inference_mode():
        logits[repo_id] = names["model"].float()(input_ids=ids).logits
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("org/base").float()
with torch.inference_mode():
    expected = base(input_ids=ids).logits
size = expected.abs().max()
print(json.dumps({name: float((found - expected).abs().max() / size) for name, found in logits.items()}))
"""


def test_cards_are_valid_and_do_what_they_say(
    hub: LoopbackHub, made: Path, push: Pusher, run: Runner, here: Path, environment: Mapping[str, str]
) -> None:
    hub.add_repo("org/base", made / "base", revisions={"v1": made / "base"})
    cards: dict[str, str] = {}
    for name, options in {
        "baked": [], "virtual": [], "pissa": [], "merged": ["--base-id", "org/base"],
    }.items():  # fmt: skip
        result = push(made / name, f"org/{name}", *options)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        text = hub.contents(f"org/{name}")["README.md"].decode()
        cards[name] = text
        metadata = yaml.safe_load(text.split("---\n")[1])
        is_adapter = name == "virtual"
        assert metadata["base_model"] == "org/base"
        assert metadata["base_model_relation"] == ("adapter" if is_adapter else "finetune")
        assert metadata["library_name"] == ("peft" if is_adapter else "transformers")
        assert (metadata["license"], metadata["language"]) == ("mit", "en")
        assert "nlora" in metadata["tags"]
        assert not {"model-index", "extra_gated_prompt"} & metadata.keys()
        assert "2502.14482" in text
        # The base's own text stays where the base's files do.
        assert text.endswith("What its makers say.\n") is not is_adapter
    assert "| method | `sketch` |" in cards["baked"]
    assert "| `mlp.down_proj` | 4 | 8 |" in cards["baked"]
    assert [request for request in hub.requests if request.path == "/api/validate-yaml"]

    files = {f"org/{name}": str(write(here, {f"{name}.md": text}) / f"{name}.md") for name, text in cards.items()}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, json.dumps(files)],
        env={**environment, "HF_TOKEN": TOKEN}, cwd=here, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert differences.keys() == files.keys()
    # Of a residual or a merge in bf16 that is its rounding: 2^-9 for each weight, about as much in the logits. An
    # adapter on the wrong base, or none where there should be one, changes them by as much as they are.
    assert differences["org/virtual"] < 1e-5
    assert max(differences.values()) < 0.05

    merged = {}
    for name in ("baked", "virtual"):
        found = re.search(r"```sh\nnlora_surgery (.*?)\n```", cards[name])
        assert found is not None
        arguments = [*found[1].replace("-o merged", f"-o {name}-merged").split(), "--device", "cpu"]
        result = run(COMMAND, *arguments, HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
        merged[name] = load_all(here / f"{name}-merged")
    original = load_all(made / "base")
    assert merged["virtual"].keys() == original.keys()
    assert all(torch.equal(merged["virtual"][name], original[name]) for name in original)  # the start is bit-exact
    for name, weight in original.items():
        # Two roundings to bf16, of the residual and of the sum: 2^-9 of each, and the residual is the smaller.
        assert (merged["baked"][name].float() - weight.float()).norm() <= 2**-8 * weight.float().norm()


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_cards_of_what_was_extracted_and_converted(
    made: Path, push: Pusher, surgery: Callable[..., Finished], tmp_path: Path
) -> None:
    """With the base's own manifest nearby, which is not theirs."""
    extracted, converted = tmp_path / "extracted", tmp_path / "converted"
    assert surgery("extract", made / "base", made / "merged", "-o", extracted, "--rank", 4).code == 0
    assert surgery("convert", made / "pissa" / "adapter", "-o", converted, "--to", "slora").code == 0
    for directory, how in ((extracted, "extracted from a fine-tuned model"), (converted, "converted")):
        result = push(directory, "org/out", "--base-id", "org/base", "--dry-run", "--json")
        assert result.returncode == 0, result.stderr
        card = json.loads(result.stdout)["card"]
        assert f"| method | {how} |" in card
        assert "| module | count | mean relative error |" in card
        assert str(tmp_path) not in card


def test_the_bases_license_comes_from_the_hub(hub: LoopbackHub, made: Path, push: Pusher, tmp_path: Path) -> None:
    """Where no card of the base lies here; its evaluation, tags and gate stay the base's."""
    hub.add_repo("org/base", made / "base")
    adapter = write(copy(made / "virtual" / "adapter", tmp_path / "adapter"), {"README.md": "My own words."})
    result = push(adapter, "me/out", "--base-id", "org/base")
    assert (result.returncode, result.stderr) == (0, "")
    text = hub.contents("me/out")["README.md"].decode()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["license"], metadata["language"], metadata["tags"]) == ("mit", "en", ["nlora", "slora"])
    assert text.endswith("\n\nMy own words.\n")
    absent = push(adapter, "me/out", "--base-id", "org/nowhere")
    assert_one_sentence(absent, 11, "org/nowhere", "--base-id")
