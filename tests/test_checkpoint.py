"""Reading and planning safetensors files, against the safetensors library and transformers as oracles."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlora_surgery.checkpoint import FLOAT_DTYPES, Checkpoint, plan_file, read_header
from nlora_surgery.errors import CheckpointError, UnsupportedCheckpointError
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama, write_raw_file

STORABLE = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64,
    torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the examples of one property share."""
    return tmp_path_factory.mktemp("scratch")


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bit patterns at all, NaN payloads and subnormal numbers among them."""
    count = torch.empty(shape, dtype=dtype).nbytes
    generator = torch.Generator().manual_seed(seed)
    highest = 2 if dtype == torch.bool else 256
    return torch.randint(highest, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def oracle(path: Path) -> dict[str, dict[str, Any]]:
    """Every tensor's dtype, shape and bytes, as the safetensors library reads them from a file."""
    return dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 4])
def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path, shards: int) -> None:
    tensors = {
        f"{str(dtype).removeprefix('torch.')}.{len(shape)}d": random_bytes(dtype, shape, seed)
        for seed, dtype in enumerate(STORABLE)
        for shape in [(3, 5), (), (2, 3, 4)]
    }
    write_checkpoint(tmp_path, tensors, shards=shards, metadata={"format": "pt", "note": "ünï"})
    seen = []
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len(checkpoint.files) == shards
        for file, layout in checkpoint.files.items():
            with safetensors.safe_open(tmp_path / file, "pt") as library:
                assert layout.metadata == library.metadata()
                assert layout.size_bytes == (tmp_path / file).stat().st_size
                assert (tmp_path / file).read_bytes().startswith(layout.header)
                assert layout.tensors.keys() == set(library.keys())
                for name, info in layout.tensors.items():
                    expected = library.get_tensor(name)
                    assert (info.name, info.file) == (name, file)
                    assert info.shape == tuple(expected.shape)
                    assert info.size_bytes == expected.nbytes
                    assert bytes(checkpoint.raw(name)) == bytes_of(expected) == bytes_of(tensors[name])
                    assert info.torch_dtype == (expected.dtype if expected.dtype in FLOAT_DTYPES.values() else None)
                    if info.torch_dtype is not None:
                        ours = checkpoint.tensor(name)
                        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
                        assert bytes_of(ours) == bytes_of(expected)
            for name, found in oracle(tmp_path / file).items():
                assert checkpoint.tensors[name].dtype == found["dtype"]
                seen.append(name)
    assert sorted(seen) == sorted(tensors)


def test_dtypes_that_torch_cannot_store_are_sized_as_the_library_sizes_them(tmp_path: Path) -> None:
    header: dict[str, Any] = {}
    position = 0
    for dtype, shape, size in [("F8_E8M0", [3], 3), ("F4", [2, 3], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [2, 2], 3)]:
        header[dtype] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    path = write_raw_file(tmp_path / "model.safetensors", header, bytes(range(position)))
    expected = oracle(path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys() == header.keys()
        for name, info in checkpoint.tensors.items():
            assert (info.dtype, list(info.shape)) == (expected[name]["dtype"], expected[name]["shape"])
            assert bytes(checkpoint.raw(name)) == bytes(expected[name]["data"])
            assert info.torch_dtype is None


def test_tensors_come_in_the_order_of_files_and_of_their_bytes(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [1]}
    header = {name: {**entry, "data_offsets": [at, at + 1]} for name, at in [("a", 2), ("b", 0), ("c", 1)]}
    write_raw_file(tmp_path / "model.safetensors", header, b"bca")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [info.name for info in checkpoint] == list(checkpoint.tensors) == ["b", "c", "a"]
        assert list(checkpoint.files["model.safetensors"].tensors) == ["a", "b", "c"]
        assert {name: bytes(checkpoint.raw(name)) for name in header} == {"a": b"a", "b": b"b", "c": b"c"}


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=FLOAT_DTYPES.keys())
def test_unaligned_tensors_read_the_same(tmp_path: Path, dtype: torch.dtype, padding: int) -> None:
    expected = random_bytes(dtype, (4, 3))
    code = next(code for code, known in FLOAT_DTYPES.items() if known == dtype)
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "weight": {"dtype": code, "shape": [4, 3], "data_offsets": [1, 1 + expected.nbytes]},
        }
    ).encode()
    header += b" " * (-len(header) % 8 + padding)
    path = write_raw_file(tmp_path / "model.safetensors", header, b"\xff" + bytes_of(expected))
    assert bytes(oracle(path)["weight"]["data"]) == bytes_of(expected)
    with Checkpoint.open(tmp_path) as checkpoint:
        tensor = checkpoint.tensor("weight")
        assert tensor.data_ptr() % dtype.itemsize == 0
        assert bytes_of(tensor) == bytes_of(expected)
        assert bytes_of(tensor[1:3, 2]) == bytes_of(expected[1:3, 2])
        assert bytes(checkpoint.raw("weight")) == bytes_of(expected)


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {
        "a.empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "b.full": torch.arange(6, dtype=torch.float32).view(2, 3),
        "c.empty": torch.empty(3, 0, 2, dtype=torch.float16),
        "d.scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    write_checkpoint(tmp_path / "some", tensors)
    write_checkpoint(tmp_path / "none", {"only": torch.empty(0, dtype=torch.float32)})
    for folder in ("some", "none"):
        with Checkpoint.open(tmp_path / folder) as checkpoint:
            for info in checkpoint:
                expected = tensors.get(info.name, torch.empty(0))
                checkpoint.prefetch(info.name)
                assert checkpoint.tensor(info.name).shape == expected.shape
                assert torch.equal(checkpoint.tensor(info.name), expected)
                assert bytes(checkpoint.raw(info.name)) == bytes_of(expected)
                checkpoint.release(info.name)
            assert checkpoint.fingerprint().startswith("sha256:")


def test_writing_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(64, 64)}
    path = write_checkpoint(tmp_path, tensors) / "model.safetensors"
    before = path.read_bytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("weight").fill_(7)
    assert path.read_bytes() == before


def test_a_view_outlives_the_checkpoint_that_gave_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"weight": torch.full((64, 64), 3.0)})
    checkpoint = Checkpoint.open(tmp_path)
    view = checkpoint.tensor("weight")[5:]
    checkpoint.close()
    assert view.sum() == 3.0 * 59 * 64


def resident_bytes(path: Path) -> int:
    """How much of a mapped file this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mapped memory")
def test_a_slice_reads_its_own_pages_only(tmp_path: Path) -> None:
    rows, columns = 32, 1 << 20
    size = rows * columns * 4
    header = {"weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}}
    path = write_raw_file(tmp_path / "model.safetensors", header)
    start = path.stat().st_size
    with open(path, "r+b") as file:  # sparse: what is not written takes no disk
        file.truncate(start + size)
        for row in range(rows):
            file.seek(start + row * columns * 4)
            file.write(struct.pack("<4f", *(10 * row + column for column in range(4))))
    with Checkpoint.open(tmp_path) as checkpoint:
        weight = checkpoint.tensor("weight")
        assert resident_bytes(path) < size / 8
        expected = 10 * torch.arange(rows)[:, None] + torch.arange(4)
        assert torch.equal(weight[:, :4], expected.float())
        assert torch.equal(weight[3, :6], torch.tensor([30.0, 31, 32, 33, 0, 0]))
        assert 0 < resident_bytes(path) < size / 8
        assert weight.sum() == expected.sum()
        assert resident_bytes(path) > 0.9 * size  # or the measurement would measure nothing
        checkpoint.release("weight")
        assert resident_bytes(path) < size / 8
        assert weight[31, 3] == 313


# --- what counts as a sound file --------------------------------------------------------------------------------


@st.composite
def nearly_sound_files(draw: st.DrawFn) -> bytes:
    """A file as the library would write it, with at most two things changed."""
    entries: list[tuple[str, dict[str, Any]]] = []
    position = 0
    for number in range(draw(st.integers(0, 3))):
        dtype, bits = draw(st.sampled_from([("F32", 32), ("BF16", 16), ("U8", 8), ("F4", 4), ("F6_E2M3", 6)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        count = 1
        for size in shape:
            count *= size
        end = position + count * bits // 8
        entries.append((f"t{number}", {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}))
        position = end
    header: dict[str, Any] = dict(draw(st.permutations(entries)))
    for _ in range(draw(st.integers(0, 2))):
        of_an_entry = draw(st.booleans())
        if header and of_an_entry:
            entry = header[draw(st.sampled_from(sorted(header)))]
            if not isinstance(entry, dict) or "dtype" not in entry:
                continue
            sizes = st.integers(-2, 14)
            changes: dict[str, st.SearchStrategy[Any]] = {
                "dtype": st.sampled_from(["F16", "I8", "F64", "f32", "", "F4", 3]),
                "shape": st.lists(sizes, max_size=2) | st.sampled_from([None, "2", [1.5], [True], 2]),
                "data_offsets": st.lists(sizes, min_size=1, max_size=3) | st.sampled_from([None, {}, 1]),
            }
            field = draw(st.sampled_from(sorted(changes)))
            entry[field] = draw(changes[field])
        else:
            header["__metadata__"] = draw(
                st.sampled_from([None, {}, {"format": "pt"}, {"n": 1}, {"n": None}, [], "x", 0, {"": ""}])
            )
    data = bytes(max(0, position + draw(st.sampled_from([0, 0, 0, 1, -1, 5]))))
    text = json.dumps(header).encode() + b" " * draw(st.integers(0, 3))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 1000, 1 << 40]))
    return struct.pack("<Q", max(0, length)) + text + data


@settings(max_examples=400, deadline=None)
@given(content=nearly_sound_files())
def test_a_file_is_sound_exactly_if_the_library_takes_it(scratch: Path, content: bytes) -> None:
    path = scratch / "nearly.safetensors"
    path.write_bytes(content)
    try:
        expected = oracle(path)
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match=r"nearly.safetensors is damaged: .*fetch the file again$"):
            read_header(path)
        return
    layout = read_header(path)
    assert {name: (info.dtype, list(info.shape)) for name, info in layout.tensors.items()} == {
        name: (found["dtype"], found["shape"]) for name, found in expected.items()
    }
    for name, info in layout.tensors.items():
        assert info.size_bytes == len(expected[name]["data"])


SOUND = safetensors.torch.save(
    {"a": torch.arange(3, dtype=torch.int16), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"format": "pt"}
)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@example(changes=[(9, 0xFF)])
@example(changes=[(7, 0x80)])
def test_changed_bytes_are_never_more_than_a_checkpoint_error(scratch: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND)
    for position, value in changes:
        content[position] = value
    path = scratch / "changed.safetensors"
    path.write_bytes(content)
    try:
        layout = read_header(path)
    except CheckpointError:
        return
    assert {name: info.size_bytes for name, info in layout.tensors.items()} == {
        name: len(found["data"]) for name, found in oracle(path).items()
    }


# --- planning ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHAPE = st.lists(st.integers(0, 5), max_size=3).map(tuple)
FLOATS = st.sampled_from(list(FLOAT_DTYPES.values()))


def fill(path: Path, layout: Any, tensors: dict[str, Tensor]) -> None:
    """Write a planned file as the engine does: header first, then each tensor at its place."""
    with open(path, "wb") as file:
        file.write(layout.header)
        file.truncate(layout.size_bytes)
        for name, tensor in tensors.items():
            file.seek(layout.tensors[name].start)
            file.write(bytes_of(tensor))
    assert path.stat().st_size == layout.size_bytes


@settings(max_examples=150, deadline=None)
@given(
    specs=st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), st.tuples(FLOATS, SHAPE), max_size=6),
    metadata=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
)
@example(specs={'é\n"\\\x7f\u2028': (torch.bfloat16, (2, 3)), "": (torch.float64, ())}, metadata={"\t": "😀"})
def test_a_planned_file_reads_back_once_it_is_filled(
    scratch: Path, specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    path = scratch / "planned.safetensors"
    path.unlink(missing_ok=True)
    layout = plan_file(path.name, [(name, dtype, shape) for name, (dtype, shape) in specs.items()], metadata)
    tensors = {name: random_bytes(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(specs.items())}
    fill(path, layout, tensors)

    with safetensors.safe_open(path, "pt") as library:
        assert set(library.keys()) == specs.keys()
        assert (library.metadata() or {}) == (metadata or {})
        for name, tensor in tensors.items():
            found = library.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(found) == bytes_of(tensor)
    read = read_header(path)
    assert read.header == layout.header
    assert read.tensors == layout.tensors
    assert all(info.start % specs[name][0].itemsize == 0 for name, info in layout.tensors.items())


@settings(max_examples=100, deadline=None)
@given(
    dtype=FLOATS,
    shapes=st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), SHAPE, max_size=6),
    metadata=st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=1),  # the library's order is random
)
def test_a_planned_file_of_one_dtype_is_the_library_s_byte_for_byte(
    scratch: Path, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: random_bytes(dtype, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    path = scratch / "same.safetensors"
    fill(path, plan_file(path.name, [(name, dtype, shape) for name, shape in shapes.items()], metadata), tensors)
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)


# --- which files are the model ----------------------------------------------------------------------------------


def test_the_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    write_llama(tmp_path, seed=1, shards=3)
    write_llama(tmp_path, seed=2, shards=1)
    loaded = LlamaForCausalLM.from_pretrained(str(tmp_path)).state_dict()
    assert torch.equal(loaded[Q_PROJ], llama_tensors(seed=2)[Q_PROJ])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.files) == ["model.safetensors"]
        assert checkpoint.tensors.keys() == loaded.keys()
        for name in checkpoint.tensors:
            assert torch.equal(checkpoint.tensor(name), loaded[name])


def test_shards_that_the_index_does_not_name_are_ignored(tmp_path: Path) -> None:
    write_llama(tmp_path, seed=1, shards=4)
    (tmp_path / "model-00002-of-00004.safetensors").write_bytes(b"stale, and no safetensors file at all")
    write_llama(tmp_path, seed=2, shards=3)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.files) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        for name, expected in llama_tensors(seed=2).items():
            assert torch.equal(checkpoint.tensor(name), expected)
        left_out = checkpoint.other_files()[1]
        assert left_out == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def test_config_json_is_read_and_may_be_missing(tmp_path: Path) -> None:
    write_llama(tmp_path / "with")
    write_checkpoint(tmp_path / "without", llama_tensors())
    with Checkpoint.open(tmp_path / "with") as checkpoint:
        assert checkpoint.config == llama_config()
    with Checkpoint.open(str(tmp_path / "without")) as checkpoint:
        assert checkpoint.config == {}


def test_open_file_opens_one_file_by_itself(tmp_path: Path) -> None:
    write_llama(tmp_path, shards=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    with Checkpoint.open_file(path) as checkpoint:
        expected = safetensors.torch.load_file(path)
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


CARRIED = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "modeling_custom.py",
    "original/params.json",
    "original/tokenizer.model",
    "tokenizer.json",
    "tokenizer.model",
]
LEFT_OUT = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model-Q4_K_M.GGUF",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rust_model.ot",
    "tf_model.h5",
    "training_args.bin",
]
IGNORED = [".cache/huggingface/download/config.json.metadata", ".git/HEAD", "__pycache__/modeling_custom.pyc"]


@pytest.mark.parametrize("shards", [1, 3])
def test_other_files_are_carried_unless_they_hold_other_weights(tmp_path: Path, shards: int) -> None:
    write_llama(tmp_path, shards=shards)
    for name in [*CARRIED, *LEFT_OUT, *IGNORED, "nlora_surgery.json"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "config.json":
            path.write_text("{}")
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    left_out = [*LEFT_OUT, "model.fp16.safetensors.index.json"]
    carried = [*CARRIED]
    if shards == 1:
        (tmp_path / "model.safetensors.index.json").write_text("{}")  # stale: the single file wins
        left_out.append("model.safetensors.index.json")
    else:
        carried.append("model.safetensors.index.json")
    with Checkpoint.open(tmp_path) as checkpoint:
        found = checkpoint.other_files()
    assert (sorted(found[0]), sorted(found[1])) == (sorted(carried), sorted(left_out))


def test_links_to_files_are_followed_as_in_the_hub_s_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    write_llama(blobs)
    (blobs / "tokenizer.json").write_text("{}")
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / path.name)
    (snapshot / "gone.txt").symlink_to("nowhere")
    with Checkpoint.open(snapshot) as linked, Checkpoint.open(blobs) as plain:
        assert linked.fingerprint() == plain.fingerprint()
        assert linked.other_files() == plain.other_files()


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedCheckpointError, "is an adapter"),
        (["pytorch_model.bin"], UnsupportedCheckpointError, "save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], UnsupportedCheckpointError, "pickled"),
        (["consolidated.00.pth"], UnsupportedCheckpointError, "consolidated.00.pth"),
        (["consolidated.safetensors"], CheckpointError, "expected model.safetensors"),
    ],
)
def test_what_is_no_safetensors_model_is_told_apart(
    tmp_path: Path, files: list[str], error: type[CheckpointError], words: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert type(caught.value) is error


# --- fingerprints -----------------------------------------------------------------------------------------------


def fingerprint(directory: Path) -> str:
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.fingerprint()


def test_a_fingerprint_does_not_depend_on_shards_order_or_metadata(tmp_path: Path) -> None:
    tensors = llama_tensors()
    backwards = dict(reversed(tensors.items()))
    names = list(tensors)
    found = {
        fingerprint(write_llama(tmp_path / "three")),
        fingerprint(write_llama(tmp_path / "single", shards=1)),
        fingerprint(write_llama(tmp_path / "seven", shards=7)),
        fingerprint(write_checkpoint(tmp_path / "backwards", backwards, shards=2, metadata={"format": "np"})),
        fingerprint(write_checkpoint(tmp_path / "odd and even", tensors, shards=[names[::2], names[1::2]])),
    }
    assert len(found) == 1


def _bit(at: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    def flip(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        data = changed.view(-1).view(torch.uint8)
        data[at(len(data))] ^= 1
        return changed

    return flip


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_bit(lambda size: 0), id="first byte"),
        pytest.param(_bit(lambda size: size // 2), id="middle byte"),
        pytest.param(_bit(lambda size: size - 1), id="last byte"),
        pytest.param(lambda tensor: tensor.view(64, 16), id="shape"),
        pytest.param(lambda tensor: tensor.view(torch.float16), id="dtype"),
    ],
)
def test_a_fingerprint_tells_one_tensor_s_change(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = llama_tensors()
    changed = tensors | {Q_PROJ: change(tensors[Q_PROJ])}
    original = fingerprint(write_checkpoint(tmp_path / "a", tensors))
    assert fingerprint(write_checkpoint(tmp_path / "b", changed)) != original
    assert fingerprint(write_checkpoint(tmp_path / "c", tensors)) == original


def test_a_fingerprint_tells_names_apart(tmp_path: Path) -> None:
    first, second = torch.zeros(4), torch.ones(4)
    one = write_checkpoint(tmp_path / "a", {"x": first, "y": second})
    other = write_checkpoint(tmp_path / "b", {"x": second, "y": first})
    assert fingerprint(one) != fingerprint(other)


def test_a_fingerprint_tells_the_residual_from_the_original(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    manifest = prepare(plan_init(model, tmp_path / "out", InitOptions(rank=4)))
    assert manifest["source"]["fingerprint"] == fingerprint(model)
    assert manifest["base_fingerprint"] == fingerprint(tmp_path / "out")
    assert fingerprint(model) != fingerprint(tmp_path / "out")
