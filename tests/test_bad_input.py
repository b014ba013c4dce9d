"""Broken, hostile and mistaken input through the real command line.

Whatever is wrong, the same holds: the exit code is that of errors.py, stderr is one sentence that says what was
found, stdout is empty, nothing is left behind, and the source is as it was.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nlora_surgery import checkpoint as checkpoint_module
from nlora_surgery.checkpoint import Checkpoint
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama, write_raw_file

Surgery = Callable[..., Any]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
MANIFEST = "nlora_surgery.json"
STAGE = ".out.nlora-stage"

Files = dict[str, tuple[bytes, int] | None]


def files_under(directory: Path) -> Files:
    """Every path below a directory, with bytes and modification time where it is a file."""
    found: Files = {}
    for path in sorted(directory.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(directory))] = (path.read_bytes(), path.stat().st_mtime_ns) if is_file else None
    return found


@contextmanager
def nothing_changes(directory: Path) -> Iterator[None]:
    """Assert that the block neither adds, removes nor touches anything below a directory."""
    before = files_under(directory)
    yield
    assert files_under(directory) == before


def assert_refused(finished: Any, code: int, *words: str) -> None:
    """Assert one sentence with these words (whatever their case), nothing on stdout, and the exit code."""
    assert "Traceback" not in finished.stderr
    assert finished.code == code, finished.stderr
    assert finished.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\n", finished.stderr), finished.stderr
    for word in words:
        assert word.lower() in finished.stderr.lower()


def assert_broke_off(finished: Any, code: int, *words: str) -> None:
    """Assert the same of a command that had begun to work: notices of its progress may precede the sentence."""
    notices, _, sentence = finished.stderr.rpartition("\nError: ")
    if notices:
        assert not re.search(r"error|warning|traceback", notices, re.IGNORECASE), finished.stderr
        finished = type(finished)(finished.code, finished.stdout, f"Error: {sentence}")
    assert_refused(finished, code, *words)


def assert_usage_error(finished: Any, *words: str) -> None:
    """Assert click's own form: the usage, then one sentence; exit code 2."""
    assert "Traceback" not in finished.stderr
    assert finished.code == 2
    assert finished.stdout == ""
    usage, _, sentence = finished.stderr.partition("\n\n")
    assert re.match(r"Usage: .*nlora_surgery", usage)  # `python -m nlora_surgery` under `python -m pytest`
    assert re.fullmatch(r"Error: [^\n]+\n", sentence), finished.stderr
    for word in words:
        assert word in sentence


def quietly(finished: Any) -> Any:
    """A command that must have succeeded."""
    assert finished.code == 0, finished.stderr
    return finished


# --- damaged checkpoints: init, inspect and verify --against refuse alike -------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (2, 2), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


ONE = json.dumps({Q_PROJ: entry()}).encode()

# What is wrong -> the header, the data behind it, the length claimed for the header, words of the message.
HEADERS: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None, tuple[str, ...]]] = {
    "header length beyond the file": (ONE, bytes(16), 5000, ("claims 5000 bytes", "has only")),
    "header length beyond all files": (ONE, bytes(16), (1 << 64) - 1, ("claims 18446744073709551615 bytes",)),
    "header cut short": (ONE[:-20], b"", None, ("not JSON",)),
    "header empty": (b"", b"", None, ("not JSON",)),
    "header not JSON": (b"pickle, perhaps", bytes(16), None, ("not JSON",)),
    "header not UTF-8": (b'{"\xff\xfe": {}}', b"", None, ("not JSON", "utf-8")),
    "header not an object": (b'["model.norm.weight"]', b"", None, ("not a JSON object",)),
    "header a number": (b"17", b"", None, ("not a JSON object",)),
    "header nested without end": (b'{"a":' * 100_000, b"", None, ("not JSON",)),
    "a number of thousands of digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, ("not JSON",)),
    "a name that is half a surrogate pair": (b'{"\\ud800": ' + ONE[len(Q_PROJ) + 5 :], bytes(16), None, ("not JSON",)),
    "overlapping offsets": (
        {Q_PROJ: entry(), NORM: entry(shape=(4,), begin=8, end=24)}, bytes(24), None,
        (repr(NORM), "overlaps", repr(Q_PROJ)),
    ),
    "two tensors in one place": ({Q_PROJ: entry(), NORM: entry()}, bytes(16), None, ("overlaps",)),
    "a gap between tensors": (
        {Q_PROJ: entry(), NORM: entry(begin=20, end=36)}, bytes(36), None, ("4 bytes before", repr(NORM)),
    ),
    "a gap before the first tensor": ({Q_PROJ: entry(begin=8, end=24)}, bytes(24), None, ("8 bytes before",)),
    "bytes after the last tensor": (ONE, bytes(19), None, ("3 bytes after", repr(Q_PROJ))),
    "data without tensors": ({}, bytes(3), None, ("3 bytes after",)),
    "offsets out of the file": (
        {Q_PROJ: entry(shape=(1000,), end=4000)}, bytes(16), None, ("truncated", repr(Q_PROJ)),
    ),
    "negative offsets": ({Q_PROJ: entry(begin=-16, end=0)}, bytes(16), None, ("impossible data_offsets", "-16")),
    "reversed offsets": ({Q_PROJ: entry(begin=16, end=0)}, bytes(16), None, ("impossible data_offsets", "[16, 0]")),
    "three offsets": (
        {Q_PROJ: entry() | {"data_offsets": [0, 8, 16]}}, bytes(16), None, (repr(Q_PROJ), "two data_offsets"),
    ),
    "offsets that are no integers": ({Q_PROJ: entry(end=16.0)}, bytes(16), None, ("impossible data_offsets",)),
    "offsets that are booleans": ({Q_PROJ: entry("U8", (1,), False, True)}, bytes(1), None, ("impossible",)),
    "size against dtype and shape": (
        {Q_PROJ: entry(shape=(2, 3))}, bytes(16), None, (repr(Q_PROJ), "takes 16 bytes", "F32 of shape [2, 3]"),
    ),
    "half a byte": ({Q_PROJ: entry("F4", (3,), 0, 1)}, bytes(1), None, ("F4 of shape [3]",)),
    "a shape of astronomic size": (
        {Q_PROJ: entry(shape=tuple([(1 << 64) - 1] * 300))}, bytes(16), None, (repr(Q_PROJ), "takes 16 bytes"),
    ),
    "a shape beyond 64 bits": ({Q_PROJ: entry(shape=(0, 1 << 64), end=0)}, b"", None, ("impossible shape",)),
    "a negative shape": ({Q_PROJ: entry(shape=(-2, -2))}, bytes(16), None, ("impossible shape [-2, -2]",)),
    "a shape that is no list": ({Q_PROJ: entry(shape=4)}, bytes(16), None, ("impossible shape 4",)),
    "an unknown dtype": ({Q_PROJ: entry("F31")}, bytes(16), None, (repr(Q_PROJ), "unknown dtype", "F31")),
    "a dtype that is no text": ({Q_PROJ: entry(["F32"])}, bytes(16), None, ("unknown dtype",)),
    "an entry without offsets": ({Q_PROJ: {"dtype": "F32", "shape": [4]}}, bytes(16), None, ("lacks dtype",)),
    "an entry that is a number": ({Q_PROJ: 5}, b"", None, (repr(Q_PROJ), "lacks dtype")),
    "an entry that is nothing": ({Q_PROJ: None}, b"", None, (repr(Q_PROJ), "lacks dtype")),
    "a name that stands twice": (ONE[:-1] + b"," + ONE[1:], bytes(16), None, (repr(Q_PROJ), "twice")),
    "metadata that are no map": ({"__metadata__": ["pt"], Q_PROJ: entry()}, bytes(16), None, ("__metadata__",)),
    "metadata of numbers": ({"__metadata__": {"step": 5}, Q_PROJ: entry()}, bytes(16), None, ("__metadata__",)),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_a_damaged_header(what: str, surgery: Surgery, tmp_path: Path) -> None:
    header, data, length, words = HEADERS[what]
    write_llama(tmp_path / "model")
    write_raw_file(tmp_path / "model" / SHARD, header, data, length)
    with nothing_changes(tmp_path):
        for command in (("init", "-o", tmp_path / "out"), ("inspect",)):
            finished = surgery(*command, tmp_path / "model")
            assert_refused(finished, 3, SHARD, "is damaged", "fetch the file again", *words)


def resized(size: Callable[[int], int]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        os.truncate(model / SHARD, size((model / SHARD).stat().st_size))

    return change


def reindexed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the index's weight_map in place."""

    def rewrite(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return rewrite


def put(name: Any) -> Callable[[Path], None]:
    """Let the index say that a tensor lies in `name`."""
    return reindexed(lambda weight_map: weight_map.update({Q_PROJ: name}))


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def without(*files: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for file in files:
            (model / file).unlink()

    return remove


def only(*files: str) -> Callable[[Path], None]:
    """An otherwise empty directory."""

    def replace(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        for file in files:
            (model / file).write_text("{}")

    return replace


def nothing_at_all(model: Path) -> None:
    shutil.rmtree(model)


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_bytes(b"no directory")


def a_second_copy(model: Path) -> None:
    tensors = load_file(model / SHARD)
    write_checkpoint(model / "extra", tensors | {NORM: torch.ones(32)})
    (model / "extra" / "model.safetensors").replace(model / SHARD)
    (model / "extra").rmdir()


def config_is_a_directory(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").mkdir()


# What is wrong -> how to break a sound three-shard model, the exit code, words of the message.
DAMAGES: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "no directory": (nothing_at_all, 3, ("no model at", "no such directory")),
    "a file": (a_file, 3, ("no model at", "is a file")),
    "an empty directory": (only(), 3, ("no safetensors weights", "expected model.safetensors")),
    "a configuration without weights": (only("config.json"), 3, ("no safetensors weights",)),
    "safetensors of another name": (only("consolidated.safetensors"), 3, ("expected model.safetensors",)),
    "pickled weights": (only("config.json", "pytorch_model.bin"), 4, ("pytorch_model.bin", "from_pretrained(DIR)",
                                                                      "save_pretrained(NEW_DIR)")),
    "pickled shards": (only("pytorch_model-00001-of-00002.bin"), 4, ("pickled", "convert")),
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), 4, ("is an adapter", "name the model")),
    "one byte less": (resized(lambda size: size - 1), 3, (SHARD, "truncated")),
    "half of a shard": (resized(lambda size: size // 2), 3, (SHARD, "truncated")),
    "a shard of seven bytes": (resized(lambda size: 7), 3, (SHARD, "7 bytes", "fewer than the 8")),
    "an empty shard": (resized(lambda size: 0), 3, (SHARD, "0 bytes")),
    "a shard that grew": (resized(lambda size: size + 5), 3, (SHARD, "5 bytes after")),
    "a missing shard": (without(SHARD), 3, (INDEX, SHARD, "no such file")),
    "a shard of another model": (text(SHARD, b"\x02\0\0\0\0\0\0\0{}"), 3, (INDEX, SHARD, "not of one model")),
    "a tensor that the shard lacks": (reindexed(lambda names: names.update({"model.extra": SHARD})), 3,
                                      ("'model.extra'", SHARD, "no such tensor")),
    "a tensor that the index lacks": (reindexed(lambda names: names.pop(Q_PROJ)), 3,
                                      (repr(Q_PROJ), "assigns nowhere", "not of one model")),
    "a tensor in two shards": (a_second_copy, 3, (SHARD, repr(NORM), "assigns to model-00003-of-00003.safetensors")),
    "a tensor in the wrong shard": (put("model-00003-of-00003.safetensors"), 3, (repr(Q_PROJ), "no such tensor")),
    "a shard above": (put("../model.safetensors"), 3, ("'../model.safetensors'", "do not trust")),
    "a shard at an absolute path": (put("/etc/passwd"), 3, ("'/etc/passwd'", "do not trust")),
    "a shard in a folder": (put("sub/model.safetensors"), 3, ("'sub/model.safetensors'", "do not trust")),
    "a shard behind backslashes": (put("..\\model.safetensors"), 3, ("do not trust",)),
    "a shard on another drive": (put("C:model.safetensors"), 3, ("do not trust",)),
    "a shard called ..": (put(".."), 3, ("do not trust",)),
    "a shard called .": (put("."), 3, ("do not trust",)),
    "a shard without a name": (put(""), 3, ("do not trust",)),
    "a shard with a NUL": (put("model\0.safetensors"), 3, ("'model\\x00.safetensors'", "do not trust")),
    "a shard that is a number": (put(5), 3, ("into 5", "do not trust")),
    "a shard that is a list": (put([SHARD]), 3, ("do not trust",)),
    "a shard with line breaks": (put("a\nb\x1b[31m"), 3, ("'a\\nb\\x1b[31m'", "no such file")),
    "a shard of too long a name": (put("x" * 300), 3, ("xxx", "no such file")),
    "a shard that is the configuration": (put("config.json"), 3, ("config.json", "is damaged")),
    "an index that is not JSON": (text(INDEX, "{"), 3, (INDEX, "not JSON", "restore it")),
    "an index that is not UTF-8": (text(INDEX, b"\xff\xfe{}"), 3, (INDEX, "not JSON")),
    "an index that is a list": (text(INDEX, "[]"), 3, (INDEX, "a JSON list", "expected an object")),
    "an index nested without end": (text(INDEX, '{"a":' * 100_000), 3, (INDEX, "not JSON")),
    "an index of a huge number": (text(INDEX, '{"a":' + "9" * 5000 + "}"), 3, (INDEX, "not JSON")),
    "an index without weight_map": (text(INDEX, '{"metadata": {}}'), 3, (INDEX, "no weight_map")),
    "an index with an empty weight_map": (text(INDEX, '{"weight_map": {}}'), 3, (INDEX, "no weight_map")),
    "an index whose weight_map is a list": (text(INDEX, '{"weight_map": ["a"]}'), 3, (INDEX, "no weight_map")),
    "a configuration that is not JSON": (text("config.json", "{'model_type': 1}"), 3, ("config.json", "not JSON")),
    "a configuration that is a text": (text("config.json", '"llama"'), 3, ("config.json", "a JSON str")),
    "a configuration that is a directory": (config_is_a_directory, 3, ("cannot read", "config.json")),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint(what: str, surgery: Surgery, tmp_path: Path) -> None:
    damage, code, words = DAMAGES[what]
    model = write_llama(tmp_path / "model")
    damage(model)
    with nothing_changes(tmp_path):
        assert_refused(surgery("init", model, "-o", tmp_path / "out"), code, *words)
    if what != "an adapter":  # which inspect describes
        with nothing_changes(tmp_path):
            assert_refused(surgery("inspect", model), code, *words)


@pytest.mark.parametrize("what", ["half of a shard", "a missing shard", "pickled weights", "an index that is not JSON"])
def test_verify_against_a_damaged_checkpoint(what: str, surgery: Surgery, tmp_path: Path) -> None:
    damage, code, words = DAMAGES[what]
    model = write_llama(tmp_path / "model")
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    damage(model)
    with nothing_changes(tmp_path):
        assert_refused(surgery("verify", tmp_path / "out", "--against", model), code, *words)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_shard_that_cannot_be_read(
    number: int, surgery: Surgery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "model")

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path).name == SHARD:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(checkpoint_module, "open", refuse, raising=False)
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out")
        assert_refused(finished, 3, "cannot read", SHARD, os.strerror(number))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["init", "model", "-o", "out"], 3, ("is damaged", "truncated", "fetch the file again")),
        (["verify", "model"], 3, ("not an output of init",)),
        (["init", "model", "--method", "svd"], 2, ("Usage: ", "--method", "'svd'")),
    ],
    ids=["damaged", "verify", "usage"],
)
def test_in_a_process_of_its_own(arguments: list[str], code: int, words: tuple[str, ...], tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    resized(lambda size: size - 100)(tmp_path / "model")
    with nothing_changes(tmp_path):
        command = [sys.executable, "-m", "nlora_surgery", *arguments]
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == code
        assert finished.stdout == ""
        assert "Traceback" not in finished.stderr
        assert [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
        assert all(word in finished.stderr for word in words)


# --- checkpoints of a kind that cannot be factored ----------------------------------------------------------------


QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "in the configuration": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "(gptq)"),
    "in text_config": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, "(fp8)"),
    "without a method": ({"quantization_config": {"bits": 4}}, {}, "(unnamed)"),
    "as a text": ({"quantization_config": "int4"}, {}, "(unnamed)"),
    "by a companion": ({}, {f"{Q_PROJ}_scale_inv": torch.ones(1)}, f"'{Q_PROJ}_scale_inv'"),
    "by packed codes": ({}, {"model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}, ".qweight'"),
}


@pytest.mark.parametrize("what", QUANTIZED)
def test_a_quantized_checkpoint(what: str, surgery: Surgery, tmp_path: Path) -> None:
    config, changes, word = QUANTIZED[what]
    model = write_llama(tmp_path / "model", changes=changes, config=config)
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out")
        assert_refused(finished, 4, "is quantized", word, "use the checkpoint that it was quantized from")


@pytest.mark.parametrize("residual", ["baked", "virtual"])
def test_an_output_of_init_is_no_model_to_init(residual: str, surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    quietly(surgery("init", model, "-o", tmp_path / "first", "--rank", 4, "--residual", residual))
    with nothing_changes(tmp_path):
        finished = surgery("init", tmp_path / "first", "-o", tmp_path / "second")
        assert_refused(finished, 4, "is an output of", "already", MANIFEST, "name the original")
        finished = surgery("init", tmp_path / "first" / "adapter", "-o", tmp_path / "second")
        assert_refused(finished, 4, "is an adapter", "name the model")


@pytest.mark.parametrize(
    "config", [{"model_type": ["gpt2"]}, {"model_type": None}, {"text_config": [1]}, {"text_config": None}]
)
def test_odd_values_in_the_configuration_do_no_harm(config: Any, surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", config=config)
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    quietly(surgery("verify", tmp_path / "out", "--against", model))


# --- options ------------------------------------------------------------------------------------------------------

# Options -> exit code and words of the sentence.
OPTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "--rank 0": (2, ("--rank must be at least 1", "not 0")),
    "--rank -1": (2, ("--rank must be at least 1", "not -1")),
    f"--rank 1{'0' * 400}": (2, ("--rank", "below 2^31")),
    "--alpha 0": (2, ("--alpha must be positive and finite", "not 0")),
    "--alpha -3": (2, ("--alpha must be positive and finite",)),
    "--alpha nan": (2, ("--alpha must be positive and finite", "not nan")),
    "--alpha inf": (2, ("--alpha must be positive and finite", "not inf")),
    "--oversampling -1": (2, ("--oversampling", "must not be negative")),
    "--power-steps -1 --method sketch": (2, ("--power-steps", "must not be negative")),
    "--pinv-rtol 1": (2, ("--pinv-rtol", "below 1")),
    "--pinv-rtol nan": (2, ("--pinv-rtol", "not nan")),
    "--format lora": (2, ("--format lora is for pissa", "nystrom has three matrices", "convert --to lora")),
    "--format lora --method sketch": (2, ("--format lora", "sketch")),
    "--method slora --scale-split core": (2, ("--scale-split", "slora")),
    "--method lora --scale-split keep": (2, ("--scale-split", "lora")),
    "--method pissa --format lora --scale-split balanced": (2, ("--scale-split", "pissa")),
    "--method sketch --sampling uniform": (2, ("--sampling is for the Nyström methods", "sketch")),
    "--method pissa --sampling norm": (2, ("--sampling", "pissa")),
    "--method pissa --format lora --residual virtual": (2, ("--residual virtual needs three matrices", "baked")),
    "--device tpu-9": (2, ("--device tpu-9", "is not a device")),
    "--device meta": (2, ("--device meta is not supported", "cpu")),
    "--max-memory 1000": (2, ("--max-memory 1,000 bytes is too little", "one thread needs")),
    "--targets qproj": (5, ("--targets qproj matches no linear weight", "self_attn.q_proj", "mlp.down_proj")),
    "--targets q_proj,input_layernorm": (5, ("--targets input_layernorm matches no", "self_attn.q_proj")),
    "--targets embed_tokens": (5, ("--targets embed_tokens matches no", "self_attn.q_proj")),
    "--targets model\\.layers\\.9\\..*": (5, ("matches no linear weight", "self_attn.q_proj")),
    "--targets q_proj(": (5, ("'q_proj('", "neither a module name nor a regular expression")),
    "--targets a{99999999999999}": (5, ("neither a module name nor a regular expression",)),
    "--targets " + "(" * 2000 + ")" * 2000: (5, ("neither a module name nor a regular expression",)),
    "--exclude *q": (5, ("'*q'", "neither a module name nor a regular expression")),
    "--exclude qproj": (5, ("--exclude qproj matches no linear weight", "self_attn.q_proj")),
    "--exclude .*": (5, ("--exclude takes away every target",)),
    "--targets q_proj --exclude self_attn.q_proj": (5, ("--exclude takes away every target",)),
}

USAGE: dict[str, tuple[str, ...]] = {
    "--method svd": ("--method", "'svd'", "nystrom-optimal"),
    "--sampling first": ("--sampling", "'first'", "leading"),
    "--residual bake": ("--residual", "virtual"),
    "--adapter-dtype int8": ("--adapter-dtype", "bfloat16"),
    "--rank many": ("--rank", "'many'"),
    "--max-memory much": ("--max-memory", "'much' is no size", "500MB"),
    "--max-memory -1": ("--max-memory", "no possible size"),
    "--rnak 4": ("--rnak",),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound model in three shards."""
    return write_llama(tmp_path / "model")


@pytest.mark.parametrize("options", OPTIONS)
def test_impossible_options(options: str, surgery: Surgery, model: Path, tmp_path: Path) -> None:
    code, words = OPTIONS[options]
    with nothing_changes(tmp_path):
        assert_refused(surgery("init", model, "-o", tmp_path / "out", *options.split()), code, *words)


@pytest.mark.parametrize("options", USAGE)
def test_options_that_click_refuses(options: str, surgery: Surgery, model: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path):
        assert_usage_error(surgery("init", model, "-o", tmp_path / "out", *options.split()), *USAGE[options])


def test_no_cuda_here(surgery: Surgery, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with nothing_changes(tmp_path):
        for device in ("cuda", "cuda:3"):
            finished = surgery("init", model, "-o", tmp_path / "out", "--device", device)
            assert_refused(finished, 2, f"--device {device}", "0 CUDA devices", "use --device cpu")


def test_a_command_line_that_is_no_command(surgery: Surgery, tmp_path: Path) -> None:
    with nothing_changes(tmp_path):
        assert_usage_error(surgery("init"), "MODEL")
        assert_usage_error(surgery("initialize", tmp_path), "initialize")
        assert_refused(surgery("verify", tmp_path, "--logits"), 2, "--logits needs --against")
        assert_refused(surgery("inspect", tmp_path, "--rank", 0), 2, "--rank must be at least 1")


# --- numbers that are not finite ----------------------------------------------------------------------------------


def poisoned(value: float, row: int = 1, column: int = 2) -> dict[str, Tensor]:
    weight = llama_tensors()[Q_PROJ].clone()
    weight[row, column] = value
    return {Q_PROJ: weight}


BEYOND = (20, 30)  # outside of the leading 4 rows and columns
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("at", [(1, 2), BEYOND], ids=["sampled", "beyond"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "method", ["nystrom", "nystrom-pinv", "nystrom-optimal", "sketch", "pissa", "pissa-fast", "nystrom --sampling norm"]
)
def test_a_target_that_is_not_finite(
    method: str, value: float, at: tuple[int, int], surgery: Surgery, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model", changes=poisoned(value, *at))
    words = (repr(Q_PROJ), "holds NaN or infinity", "--allow-nonfinite")
    with nothing_changes(tmp_path):
        for residual in ("baked", "none"):
            options = ("--rank", 4, "--residual", residual, "--method", *method.split())
            assert_broke_off(surgery("init", model, "-o", tmp_path / "out", *options), 6, *words)


@pytest.mark.parametrize("at", [(1, 2), (1, 30), (20, 2)], ids=["core", "row", "column"])
@pytest.mark.parametrize("method", ["nystrom", "nystrom-pinv"])
def test_a_virtual_residual_finds_what_it_samples(
    method: str, at: tuple[int, int], surgery: Surgery, tmp_path: Path
) -> None:
    options = ("--rank", 4, "--method", method, "--residual", "virtual")
    model = write_llama(tmp_path / "model", changes=poisoned(NAN, *at))
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", *options)
        assert_broke_off(finished, 6, repr(Q_PROJ), "holds NaN or infinity", "--allow-nonfinite")


@pytest.mark.parametrize("method", ["nystrom-optimal", "sketch", "pissa", "nystrom --sampling norm"])
def test_a_virtual_residual_finds_all_where_it_reads_all(method: str, surgery: Surgery, tmp_path: Path) -> None:
    options = ("--rank", 4, "--residual", "virtual", "--method", *method.split())
    model = write_llama(tmp_path / "model", changes=poisoned(NAN, *BEYOND))
    with nothing_changes(tmp_path):
        assert_broke_off(surgery("init", model, "-o", tmp_path / "out", *options), 6, repr(Q_PROJ))


def test_a_virtual_residual_reads_no_more_than_it_samples(surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", changes=poisoned(NAN, *BEYOND))
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4, "--residual", "virtual"))
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_N.weight" in factors
    assert all(factor.isfinite().all() for factor in factors.values())


@pytest.mark.parametrize("residual", ["baked", "virtual"])
@pytest.mark.parametrize("method", ["nystrom", "sketch", "pissa", "slora"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_allow_nonfinite_leaves_the_module_alone(
    value: float, method: str, residual: str, surgery: Surgery, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model", changes=poisoned(value, *BEYOND))
    out = tmp_path / "out"
    options = ("--rank", 4, "--method", method, "--residual", residual, "--allow-nonfinite")
    finished = quietly(surgery("init", model, "-o", out, *options))
    assert Q_PROJ in finished.stderr  # a warning names it

    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["skipped"] == [Q_PROJ]
    assert Q_PROJ not in [module["tensor"] for module in manifest["modules"]]
    assert len(manifest["modules"]) == 13
    module = Q_PROJ.removesuffix(".weight")
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert not [name for name in factors if module in name]
    targets = json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert not [target for target in targets if module == target or module.endswith(f".{target}")]
    assert [target for target in targets if target.endswith("k_proj")]
    if residual == "baked":
        with Checkpoint.open(model) as source, Checkpoint.open(out) as base:
            assert source.raw(Q_PROJ) == base.raw(Q_PROJ)
            touched = [name for name in source.tensors if source.raw(name) != base.raw(name)]
            assert len(touched) == (0 if method == "slora" else 13)
    assert "nothing was lost" in quietly(surgery("verify", out, "--against", model)).stdout


def test_allow_nonfinite_needs_something_finite(surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", changes=poisoned(NAN), layers=1)
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--targets", "q_proj", "--allow-nonfinite")
        assert_refused(finished, 6, "every target weight holds NaN or infinity")


def test_what_is_no_target_is_carried_whatever_it_holds(surgery: Surgery, tmp_path: Path) -> None:
    norm = torch.tensor([NAN, INF, -INF, -0.0] * 8, dtype=torch.bfloat16)
    norm.view(torch.int16)[0] = 0x7FA5  # a NaN with a payload, which arithmetic would quiet
    codes = torch.arange(12, dtype=torch.int32).view(3, 4)
    model = write_llama(tmp_path / "model", changes={NORM: norm, "model.codes": codes})
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    with Checkpoint.open(model) as source, Checkpoint.open(tmp_path / "out") as base:
        for name in (NORM, "model.codes"):
            assert source.raw(name) == base.raw(name)
        assert bytes(base.raw(NORM)[:2]) == b"\xa5\x7f"
    quietly(surgery("verify", tmp_path / "out", "--against", model))


HUGE = torch.full((32, 32), 3e38, dtype=torch.bfloat16)
WIDE = 1e7 * llama_tensors(torch.float32)[Q_PROJ]

# What overflows -> dtype of the model, what to change in it, options, words of the message.
OVERFLOWS: dict[str, tuple[torch.dtype, dict[str, Tensor], str, tuple[str, ...]]] = {
    "the residual in fp16": (torch.float16, {}, "--alpha 1e9", ("is finite", "as F16 it is not")),
    "the start in fp16": (torch.float16, {}, "--alpha 1e9 --residual none", ("is finite", "as F16 it is not")),
    "the residual in fp32": (torch.bfloat16, {Q_PROJ: HUGE}, "", (repr(Q_PROJ), "is finite")),
    "the product of a virtual residual": (
        torch.bfloat16, {Q_PROJ: HUGE}, "--residual virtual", (repr(Q_PROJ), "is finite", "overflow"),
    ),
    "a virtual residual's alpha": (
        torch.bfloat16, {Q_PROJ: 1e10 * llama_tensors()[Q_PROJ]}, "--residual virtual --alpha 1e38",
        (repr(Q_PROJ), "is finite", "--alpha"),
    ),
    "singular values": (torch.bfloat16, {Q_PROJ: HUGE}, "--method pissa", (repr(Q_PROJ), "is finite", "overflow")),
    "fp64 factors in fp32": (
        torch.float64, {Q_PROJ: torch.full((32, 32), 1e60, dtype=torch.float64)}, "--method pissa --scale-split core",
        (repr(Q_PROJ), "is finite", "overflow"),
    ),
    "a division by a tiny alpha": (torch.bfloat16, {}, "--method sketch --alpha 1e-300", ("is finite", "--alpha")),
    "a factor in fp16": (
        torch.float32, {Q_PROJ: WIDE}, "--adapter-dtype float16",
        (repr(Q_PROJ), "overflows float16", "use --adapter-dtype float32"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OVERFLOWS)
def test_an_overflow(what: str, surgery: Surgery, tmp_path: Path) -> None:
    dtype, changes, options, words = OVERFLOWS[what]
    model = write_llama(tmp_path / "model", dtype, changes=changes)
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--rank", 4, *options.split())
        assert_broke_off(finished, 6, *words)
        assert "holds NaN" not in finished.stderr


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(0 * llama_tensors()[Q_PROJ], id="zero"),
        pytest.param(1e-18 * llama_tensors()[Q_PROJ], id="tiny"),
        pytest.param(1e10 * llama_tensors()[Q_PROJ], id="large"),
        pytest.param(1e10 + 0 * llama_tensors()[Q_PROJ], id="large and of one sign"),
    ],
)
@pytest.mark.parametrize("residual", ["baked", "virtual", "none"])
def test_extreme_weights_are_measured(weight: Tensor, residual: str, surgery: Surgery, tmp_path: Path) -> None:
    """The norm of the start is measured where its square leaves fp32."""
    changes = {Q_PROJ: weight}
    model = write_llama(tmp_path / "model", changes=changes)
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4, "--residual", residual))
    manifest = (tmp_path / "out" / MANIFEST).read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", manifest)
    modules = {module["tensor"]: module for module in json.loads(manifest)["modules"]}
    wide = weight.double()
    exact = torch.linalg.vector_norm(wide[:, :4] @ wide[:4, :4] @ wide[:4])
    assert modules[Q_PROJ]["delta_norm"] == pytest.approx(float(exact), rel=1e-4)


# --- outputs ------------------------------------------------------------------------------------------------------


def test_an_output_in_the_way_of_the_source(
    surgery: Surgery, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here").mkdir()
    outputs = {
        str(model): "is the source itself",
        str(tmp_path / "link"): "is the source itself",
        str(model / ".." / "model"): "is the source itself",
        str(model / "out"): "lies inside the source",
        str(model / "deep" / "out"): "lies inside the source",
        str(tmp_path / "link" / "out"): "lies inside the source",
        str(tmp_path): "contains the source",
        str(tmp_path.parent): "contains the source",
        str(tmp_path / "loop"): "not a directory",
        ".": "the directory that you are in",
        "": "the directory that you are in",
        str(tmp_path / "here"): "the directory that you are in",
    }
    monkeypatch.chdir(tmp_path / "here")
    with nothing_changes(tmp_path):
        for out, words in outputs.items():
            for overwrite in ((), ("--overwrite",)):
                assert_refused(surgery("init", model, "-o", out, *overwrite), 8, words, "name")


def test_an_output_that_exists(surgery: Surgery, model: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    with nothing_changes(tmp_path):
        for out in ("foreign", "out"):
            finished = surgery("init", model, "-o", tmp_path / out, "--rank", 4)
            assert_refused(finished, 8, f"{out} exists", "-o", "--overwrite")
        finished = surgery("init", model, "-o", tmp_path / "foreign", "--overwrite")
        assert_refused(finished, 8, "was not written by nlora_surgery", MANIFEST, "will not replace")
        for out in ("file", "dangling"):
            for overwrite in ((), ("--overwrite",)):
                finished = surgery("init", model, "-o", tmp_path / out, *overwrite)
                assert_refused(finished, 8, "is not a directory", "-o")
        assert_refused(surgery("init", model, "-o", tmp_path / "file" / "out"), 8, "cannot write", "Not a directory")
        finished = surgery("init", model, "-o", tmp_path / ("x" * 250))
        assert_refused(finished, 8, "cannot write", "File name too long")


def test_overwrite_replaces_an_earlier_output(surgery: Surgery, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    quietly(surgery("init", model, "-o", tmp_path / "fresh", "--rank", 8, "--method", "sketch"))
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    (tmp_path / "out" / "notes.txt").write_text("of the earlier output")
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 8, "--method", "sketch", "--overwrite"))
    quietly(surgery("init", model, "-o", tmp_path / "empty", "--rank", 8, "--method", "sketch"))
    fresh = load_file(tmp_path / "fresh" / "adapter" / "adapter_model.safetensors")
    for out in ("out", "empty"):
        assert {path.name for path in (tmp_path / out).iterdir()} == {
            path.name for path in (tmp_path / "fresh").iterdir()
        }
        factors = load_file(tmp_path / out / "adapter" / "adapter_model.safetensors")
        assert factors.keys() == fresh.keys()
        assert all(torch.equal(factors[name], fresh[name]) for name in fresh)
        quietly(surgery("verify", tmp_path / out, "--against", model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "fresh", "model", "out"]


def test_a_failed_overwrite_leaves_the_earlier_output(
    surgery: Surgery, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--alpha", "1e300", "--overwrite")
        assert_broke_off(finished, 6, "is finite")

    rename = Path.rename

    def fail(path: Path, target: Any) -> Path:
        if path.name == "tree":  # the last of the two steps that replace an output
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--rank", 8, "--overwrite")
        assert_broke_off(finished, 8, "cannot write", "Input/output error")


def test_directories_made_for_a_failed_output_go_again(surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", changes=poisoned(NAN))
    (tmp_path / "kept").mkdir()
    with nothing_changes(tmp_path):
        assert_broke_off(surgery("init", model, "-o", tmp_path / "kept" / "a" / "b" / "out"), 6, repr(Q_PROJ))


def test_no_space_is_told_before_anything_is_written(
    surgery: Surgery, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1234, 1234))
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--rank", 4)
        assert_refused(finished, 8, "no space left", "1,234 are free", "it needs")
        needed = int(re.search(r"it needs ([\d,]+) bytes", finished.stderr)[1].replace(",", ""))  # type: ignore[index]
    monkeypatch.undo()
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    source = sum(path.stat().st_size for path in model.iterdir())
    assert source < needed <= written


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """From its call on, the disk is full when the second shard's turn comes; one thread does the work."""
    pwrite = os.pwrite

    def start() -> None:
        def limited(descriptor: int, data: Any, offset: int) -> int:
            staged = tmp_path / STAGE / "tree" / SHARD
            if staged.exists() and os.fstat(descriptor).st_ino == staged.stat().st_ino:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", limited)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)

    return start


def test_a_full_disk_keeps_what_is_finished(
    full_disk: Callable[[], None],
    surgery: Surgery,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("init", model, "-o", tmp_path / "out", "--rank", 4)
    quietly(surgery(*command))
    uninterrupted = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    source = files_under(model)
    full_disk()
    finished = surgery(*command)
    words = ("no space left", "what is finished is kept", "make space and run the same command again")
    assert_broke_off(finished, 8, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGE, "model"]

    # Another command does not take the stage over in passing.
    monkeypatch.undo()
    finished = surgery("init", model, "-o", tmp_path / "out", "--rank", 5)
    assert_refused(finished, 9, STAGE, "unfinished run of another command", "rank was 4, now 5", "--overwrite")

    first = (tmp_path / STAGE / "tree" / SHARD.replace("2-of", "1-of")).stat().st_ino
    second = (tmp_path / STAGE / "tree" / SHARD).stat().st_ino
    pwrite = os.pwrite
    written = []

    def recorded(descriptor: int, data: Any, offset: int) -> int:
        written.append(os.fstat(descriptor).st_ino)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", recorded)
    quietly(surgery(*command))
    assert first not in written
    assert second in written
    assert contents(tmp_path / "out") == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert files_under(model) == source


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, b"\xff\xfe\n", b"5\nnull\n[]\n{}\n", b'{"unit": []}\n'])
@pytest.mark.parametrize("file", ["journal-0.jsonl", "identity.json"])
def test_a_stage_that_a_power_failure_damaged(
    damage: bytes,
    file: str,
    full_disk: Callable[[], None],
    surgery: Surgery,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_disk()
    assert_broke_off(surgery("init", model, "-o", tmp_path / "out", "--rank", 4), 8, "no space left")
    monkeypatch.undo()
    (tmp_path / STAGE / file).write_bytes(damage)
    again: tuple[object, ...] = ("init", model, "-o", tmp_path / "out", "--rank", 4)
    if file == "identity.json" and damage.startswith(b"{"):  # a whole one, but of another command
        assert_refused(surgery(*again), 9, "unfinished run of another command", "--overwrite")
        again = (*again, "--overwrite")
    quietly(surgery(*again))
    quietly(surgery("verify", tmp_path / "out", "--against", model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_an_output_where_nothing_may_be_written(
    call: str, number: int, surgery: Surgery, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, os_open = os.mkdir, os.open

    def refuse(path: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    def no_mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        return refuse(path) if STAGE in str(path) else mkdir(path, *arguments, **options)

    def no_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if STAGE in str(path) and flags & os.O_CREAT:
            refuse(path)
        return os_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, call, {"mkdir": no_mkdir, "open": no_open}[call])
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out", "--rank", 4)
        assert_refused(finished, 8, "cannot write", os.strerror(number), "in a writable place with -o")


# --- verify -------------------------------------------------------------------------------------------------------


def flip(path: Path, tensor: str, at: int) -> None:
    """Change one byte of a tensor in a safetensors file or a checkpoint."""
    is_file = path.is_file()
    with Checkpoint.open_file(path) if is_file else Checkpoint.open(path) as checkpoint:
        info = checkpoint.tensors[tensor]
        file = path if is_file else path / info.file
    assert 0 <= at < info.size_bytes
    with open(file, "r+b") as handle:
        handle.seek(info.start + at)
        byte = handle.read(1)[0]
        handle.seek(info.start + at)
        handle.write(bytes([byte ^ 0x01]))


ADAPTER = "adapter/adapter_model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
LORA_B = f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight"

# What happened to an output -> how, exit code and words by itself, exit code and words against the original.
# Byte 700 of a tensor is in none of the blocks that the fingerprint reads.
TAMPERED: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...], int, tuple[str, ...]]] = {
    "a byte of a target": (lambda out: flip(out, Q_PROJ, 700), 10, (Q_PROJ, "checksum"), 10, (Q_PROJ, "checksum")),
    "a byte of the adapter": (
        lambda out: flip(out / ADAPTER, LORA_B, 99), 10, (LORA_B, "checksum"), 10, (LORA_B, "checksum"),
    ),
    "a byte of what is no target": (
        lambda out: flip(out, EMBEDDING, 700), 0, (), 10, (EMBEDDING, "changed, but is no target"),
    ),
    "a byte that the fingerprint reads": (
        lambda out: flip(out, Q_PROJ, 0), 7, ("belongs to another base",), 7, ("belongs to another base",),
    ),
    "a missing tokenizer": (without("tokenizer.json"), 0, (), 10, ("tokenizer.json is not the original's",)),
    "a changed configuration": (text("config.json", "{}"), 0, (), 10, ("config.json is not the original's",)),
    "a missing shard": (without(SHARD), 3, (SHARD, "no such file"), 3, (SHARD, "no such file")),
    "a truncated shard": (resized(lambda size: size - 1), 3, (SHARD, "truncated"), 3, (SHARD, "truncated")),
    "a missing adapter file": (without(ADAPTER), 7, ("no adapter_model.safetensors",), 7, ("no whole adapter",)),
    "a missing adapter configuration": (
        without("adapter/adapter_config.json"), 7, ("no adapter at", "adapter_config.json"), 7, ("no adapter at",),
    ),
    "a truncated adapter": (
        lambda out: os.truncate(out / ADAPTER, 9000), 7, ("adapter_model.safetensors", "truncated"), 7, ("truncated",),
    ),
    "a manifest that is not JSON": (text(MANIFEST, "{"), 3, (MANIFEST, "not JSON"), 3, (MANIFEST, "not JSON")),
    "a manifest of something else": (
        text(MANIFEST, '{"command": "merge"}'), 3, (MANIFEST, "not a manifest of init"), 3, (MANIFEST,),
    ),
    "no manifest": (without(MANIFEST), 3, ("not an output of init", MANIFEST), 3, ("not an output of init",)),
}  # fmt: skip


def assert_failed(finished: Any, code: int, words: tuple[str, ...]) -> None:
    """As `assert_refused`, but a verification that fails may have printed what it compared."""
    assert finished.code == code, finished.stderr
    assert "OK" not in finished.stdout
    if code == 0:
        return
    if code != 10:
        assert finished.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\n", finished.stderr), finished.stderr
    for word in words:
        assert word in finished.stderr


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_finds_what_was_tampered_with(what: str, surgery: Surgery, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    quietly(surgery("init", model, "-o", out, "--rank", 4))
    assert "OK" in quietly(surgery("verify", out)).stdout
    assert "nothing was lost" in quietly(surgery("verify", out, "--against", model)).stdout

    tamper, code, words, code_against, words_against = TAMPERED[what]
    tamper(out)
    with nothing_changes(tmp_path):
        alone = surgery("verify", out)
        if code == 0:
            assert "OK" in quietly(alone).stdout
        else:
            assert_failed(alone, code, words)
        assert_failed(surgery("verify", out, "--against", model), code_against, words_against)


def test_verify_of_what_is_no_output(surgery: Surgery, model: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path):
        for path in (model, tmp_path, tmp_path / "nowhere"):
            assert_refused(surgery("verify", path), 3, "is not an output of init", MANIFEST)


@pytest.mark.parametrize("residual", ["baked", "virtual"])
def test_verify_against_another_original(residual: str, surgery: Surgery, model: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=1)
    quietly(surgery("init", model, "-o", tmp_path / "out", "--rank", 4, "--residual", residual))
    with nothing_changes(tmp_path):
        finished = surgery("verify", tmp_path / "out", "--against", other)
        assert_refused(finished, 7, str(other), "is another model", "fingerprints differ")
        finished = surgery("verify", tmp_path / "out", "--against", tmp_path / "nowhere")
        assert_refused(finished, 3, "no model at", "nowhere")


def test_a_model_of_embeddings_alone_has_nothing_to_adapt(surgery: Surgery, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name in {EMBEDDING, NORM}}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    with nothing_changes(tmp_path):
        finished = surgery("init", model, "-o", tmp_path / "out")
        assert_refused(finished, 5, "no linear weight inside numbered blocks", "no linear weights at all")
