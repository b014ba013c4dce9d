"""`nlora_surgery report`: the page's figures, and the page in a real browser.

Oracles: the manifest, `inspect --json`, dense deltas in fp64, the run's own metrics, html.parser and Chromium.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.manifest import read_manifest, summarize
from nlora_surgery.report import ReportOptions, gather, report
from nlora_surgery.spectra import SpectraOptions, place
from tests.adapters import make_adapter, save_model
from tests.checkpoints import llama_tensors, write_llama
from tests.chromium import Chromium, find_chromium
from tests.test_bad_input import assert_refused, nothing_changes

Surgery = Callable[..., Any]

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="there is no chromium here")
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """What a page says: its text, the tables by the id of their titles, the figures for machines, its JSON.

    Attributes:
        tables: rows of cells by the title's id, a cell being its text or, of a figure, its whole number.
        elements: every start tag with its attributes.
        data: of the script that holds them.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.text = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._rows: list[list[Any]] = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes))
        if tag == "table":
            self._rows = self.tables[str(attributes["aria-labelledby"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"th", "td"}:
            self._rows[-1].append("")
        elif tag == "data":
            value = attributes["value"]
            self._rows[-1][-1] = float(value) if value else None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        inside = {tag for tag, _ in self._open}
        if self._open and self._open[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data = json.loads(data)
        elif not inside & {"script", "style"}:
            self.text += data
            if inside & {"td", "th"} and "data" not in inside:
                self._rows[-1][-1] += data

    def column(self, table: str, name: str) -> dict[str, Any]:
        """The cells of a column by the first of their rows."""
        head, *rows = self.tables[table]
        return {row[0]: row[head.index(name)] for row in rows}

    def map(self, figure: str) -> dict[tuple[str, int], float]:
        """The cells of a heat map by kind of module and layer."""
        head, *rows = self.tables[f"map-{figure}-0"]
        layers = [(index, int(name)) for index, name in enumerate(head) if name.isdigit()]
        return {(row[0], layer): row[index] for row in rows for index, layer in layers}


def init(model: Path, out: Path, method: str = "sketch", residual: str = "baked", rank: int = 8) -> Path:
    from nlora_surgery.options import FactorOptions
    from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare

    options = InitOptions(rank=rank, factor=FactorOptions(method=method), residual=residual)  # type: ignore[arg-type]
    prepare(plan_init(model, out, options))
    return out


def page_of(directory: Path, out: Path, **options: Any) -> Page:
    report(directory, out, ReportOptions(**options))
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init(tiny_llama, tmp_path_factory.mktemp("prepared") / "out", rank=16)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on a baked output of init."""
    pytest.importorskip("accelerate")
    from nlora_surgery.training.trainer import TrainOptions, train

    directory = tmp_path_factory.mktemp("run")
    data = directory / "data.jsonl"
    rows = [{"prompt": f"the red fox {n}", "completion": "sees two birds"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = TrainOptions(max_steps=3, grad_accum=1, device="cpu", learning_rate=1e-3)
    train(prepared, prepared / "adapter", str(data), directory / "run", options, eval_data=str(data))
    return directory / "run"


# --- the figures -------------------------------------------------------------------------------------------


def test_a_prepared_checkpoint_shows_its_manifest(prepared: Path, tmp_path: Path) -> None:
    page = page_of(prepared, tmp_path / "page.html")
    assert_maps_are(page, prepared)
    rows, _ = summarize(read_manifest(prepared))
    for figure in ("energy", "delta_ratio", "drift"):
        means = page.column(f"map-{figure.replace('_', '-')}-0", "mean")
        assert means == {row["kind"]: pytest.approx(row[figure], rel=1e-12) for row in rows}
    starts = page.column("at-rank", "energy of the start")
    assert {row["kind"]: row["energy"] for row in rows} == pytest.approx(
        {kind: starts[kind] for kind in starts if kind != "all"}
    )
    assert "sketch, leading sampling" in page.text


def assert_maps_are(page: Page, prepared: Path) -> None:
    """The heat maps hold the manifest's figures, every one of them, to the last bit."""
    modules = read_manifest(prepared)["modules"]
    for figure in ("energy", "delta_ratio", "drift"):
        wanted = {(place(m["module"]).kind, place(m["module"]).layer): m[figure] for m in modules}
        assert page.map(figure.replace("_", "-")) == wanted


def test_the_start_is_never_better_than_the_best(prepared: Path, tmp_path: Path) -> None:
    """The sketch's energy is within a few percent of, and not above, what the page says that rank 16 can capture."""
    page = page_of(prepared, tmp_path / "page.html")
    best, start = page.column("at-rank", "energy, at best"), page.column("at-rank", "energy of the start")
    for kind in best:
        assert 0.95 * best[kind] < start[kind] < best[kind] + 1e-3  # the bf16 rounding of the original's reconstruction


@pytest.mark.parametrize("kind", ["checkpoint", "prepared", "adapter", "run"])
def test_inspect_tells_the_same(
    kind: str, surgery: Surgery, tiny_llama: Path, prepared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = {"checkpoint": tiny_llama, "prepared": prepared, "adapter": prepared / "adapter", "run": None}[kind]
    path = path or request.getfixturevalue("run")
    done = surgery("report", path, "-o", tmp_path / "page.html", "--rank", 32, "--ranks", "16,32,64", "--json")
    assert done.code == 0, done.stderr
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    printed = json.loads(done.stdout)
    assert page.data["kind"] == printed["kind"] == kind
    # Of an adapter inspect reads no weights; what the page has is what it has of the weights that it belongs to.
    inspected = json.loads(
        surgery("inspect", tiny_llama if kind == "checkpoint" else prepared, "-r", 32, "--json").stdout
    )
    wanted = inspected["spectra"]
    for found in (printed["spectra"], page.data["spectra"]):
        assert {name: found[name] for name in ("energy", "costs", "ranks", "layers", "not_finite")} == {
            name: wanted[name] for name in ("energy", "costs", "ranks", "layers", "not_finite")
        }
        for one, other in zip(found["kinds"], wanted["kinds"], strict=True):
            assert {name: one[name] for name in other} == other
    for rank in (16, 32, 64):
        column = page.column("by-rank", f"r = {rank}")
        assert {kind["kind"]: kind["energy"][str(rank)] for kind in wanted["kinds"]}.items() <= column.items()
        assert column["all"] == wanted["energy"][str(rank)]
        assert column["LoRA parameters"] == wanted["costs"][str(rank)]["lora"]
        assert column["SLoRA file, fp32"] == wanted["costs"][str(rank)]["adapter_bytes"]
    at = page.column("at-rank", "IntTune")
    assert at["all"] == wanted["costs"]["32"]["inttune"]


def test_the_terminal_shows_them_too(surgery: Surgery, tiny_llama: Path) -> None:
    shown = surgery("inspect", tiny_llama, "--rank", 16)
    found = json.loads(surgery("inspect", tiny_llama, "--rank", 16, "--json").stdout)["spectra"]
    lines = {line.split()[0]: line.split() for line in shown.stdout.splitlines() if line.count("%") == 3}
    assert len(lines) == 8
    for kind in found["kinds"]:
        wanted = [f"{kind['energy'][rank]:.1%}" for rank in ("8", "16", "32")]
        assert lines[kind["kind"]][1:] == [str(kind["measured"]), "of", str(kind["modules"]), *wanted]
    assert lines["all"][1:] == [f"{found['energy'][rank]:.1%}" for rank in ("8", "16", "32")]


def test_inspect_without_a_rank_reads_headers_only(
    surgery: Surgery, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    done = surgery("inspect", tiny_llama)
    assert done.code == 0
    assert "can capture" not in done.stdout


def test_a_checkpoint_has_a_map_of_the_layers_that_were_measured(tmp_path: Path) -> None:
    tensors = llama_tensors(layers=9)
    page = page_of(write_llama(tmp_path / "model", layers=9), tmp_path / "page.html", rank=8)
    assert sorted({layer for _, layer in page.map("best")}) == [0, 2, 4, 6, 8]
    for (kind, layer), value in page.map("best").items():
        values = torch.linalg.svdvals(tensors[f"model.layers.{layer}.{kind}.weight"].double()).square()
        assert value == pytest.approx(float(values[:8].sum() / values.sum()), abs=1e-6)  # curves have six digits
    everything = page_of(tmp_path / "model", tmp_path / "all.html", spectra=SpectraOptions(layers=None))
    assert sorted({layer for _, layer in everything.map("best")}) == list(range(9))
    assert "Measured on all 63 weights" in everything.text
    assert "Measured on 35 of 63 weights: 5 layers" in page.text


def test_a_run_shows_its_losses_and_how_far_it_went(run: Path, prepared: Path, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "page.html")
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [[entry["step"], entry["loss"]] for entry in entries if "loss" in entry]
    assert page.data["training"]["losses"] == losses
    assert page.column("losses", "first") == {
        "training": losses[0][1],
        "evaluation": next(entry["eval_loss"] for entry in entries if "eval_loss" in entry),
    }
    assert_maps_are(page, prepared)
    assert page.data["change"]["since"] == "start"
    now, start = Adapter.open(run), Adapter.open(prepared / "adapter")
    manifest = {module["module"]: module for module in read_manifest(prepared)["modules"]}
    for module in page.data["change"]["modules"]:
        name = module["module"]
        moved = dense(now, name) - dense(start, name)
        norm = float(moved.norm())
        assert module["norm"] == pytest.approx(norm, rel=1e-9)
        assert module["ratio"] == pytest.approx(norm / manifest[name]["weight_norm"], rel=1e-9)
        squares = torch.linalg.svdvals(moved).square().cumsum(0)
        assert module["rank90"] == int((squares < 0.9 * squares[-1]).sum()) + 1
        assert page.map("ratio")[place(name).kind, place(name).layer] == module["ratio"]


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    factors = adapter.factors(module)
    product = factors.lora_B.double()
    if factors.lora_N is not None:
        product = product @ factors.lora_N.double()
    return adapter.scaling(module) * product @ factors.lora_A.double()


# --- every kind of PATH ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "residual"),
    [("nystrom", "baked"), ("nystrom", "virtual"), ("nystrom", "none"), ("lora", "baked"), ("slora", "virtual")],
)
def test_every_output_of_init(method: str, residual: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    out = init(model, tmp_path / "out", method, residual, rank=4)
    page = page_of(out, tmp_path / "page.html")
    wanted = gather(model, ReportOptions(rank=4))["spectra"]["energy"]
    # A baked residual of the raw start is up to some times the weight, and what it lost comes in as noise.
    assert page.data["spectra"]["energy"] == pytest.approx(wanted, abs=1e-2 if residual == "baked" else 1e-12)
    assert ("the residual plus the product of the start" in page.text) == (method == "nystrom" and residual == "baked")
    adapter = page_of(out / "adapter", tmp_path / "adapter.html")
    assert adapter.data["kind"] == "adapter"
    assert "None: the adapter stands where it started." in adapter.text
    assert adapter.data["spectra"]["energy"] == pytest.approx(page.data["spectra"]["energy"], abs=1e-9)


def test_an_adapter_of_peft_on_its_base_and_alone(surgery: Surgery, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    make_adapter(base, tmp_path / "lora")
    shutil.copytree(tmp_path / "lora", tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/x"}))
    adapter = Adapter.open(tmp_path / "lora")
    with Checkpoint.open(base) as checkpoint:
        norms = {module: float(checkpoint.tensor(f"{module}.weight").norm()) for module in adapter.parts}

    for path, extra in (("lora", ()), ("alone", ("--base", base))):
        done = surgery("report", tmp_path / path, "-o", tmp_path / f"{path}.html", "--json", *extra)
        assert done.code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["change"]["since"] == "zero"
        assert {module["module"]: module["ratio"] for module in found["change"]["modules"]} == pytest.approx(
            {module: float(dense(adapter, module).norm()) / norm for module, norm in norms.items()}, rel=1e-6
        )
        assert found["spectra"]["kinds"]
    alone = surgery("report", tmp_path / "alone", "-o", tmp_path / "only.html")
    assert (alone.code, "org/x, is no directory here" in alone.stderr) == (0, True)
    page = Page((tmp_path / "only.html").read_text(encoding="utf-8"))
    assert "spectra" not in page.data
    assert page.map("norm")
    assert "What the adapter adds" in page.text


def test_a_run_that_started_from_a_plain_model(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the red fox", "completion": "runs"}\n' * 8, encoding="utf-8")
    run = tmp_path / "run"
    done = surgery("train", tiny_llama, "--init", "lora", "--rank", 4, "--data", data, "-o", run, "--max-steps", 2,
                   "--save-steps", 1, "--batch-size", 4, "--grad-accum", 1, "--device", "cpu")  # fmt: skip
    assert done.code == 0, done.stderr
    with Checkpoint.open(tiny_llama) as checkpoint:
        for path in (run, run / "checkpoint-1"):
            page = page_of(path, tmp_path / f"{path.name}.html")
            adapter = Adapter.open(path)
            assert (page.data["kind"], page.data["change"]["since"]) == ("run", "start")
            for module in page.data["change"]["modules"]:
                wanted = (
                    dense(adapter, module["module"]).norm()
                    / checkpoint.tensor(f"{module['module']}.weight").double().norm()
                )
                assert module["ratio"] == pytest.approx(float(wanted), rel=1e-6)
    (run / "adapter_config.json").unlink()
    assert_refused(surgery("report", run), 3, "has not finished", "checkpoint")


@pytest.mark.parametrize("kind", ["gpt2", "gpt-oss"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    out = init(save_model(kind, tmp_path / "model"), tmp_path / "out", rank=4)
    page = page_of(out, tmp_path / "page.html")
    assert_maps_are(page, out)
    assert page.data["spectra"]["kinds"]


def test_merged_models_are_checkpoints(surgery: Surgery, prepared: Path, tmp_path: Path) -> None:
    """They have a manifest, but not one of init."""
    merged = tmp_path / "merged"
    assert surgery("merge", prepared, prepared / "adapter", "-o", merged).code == 0
    assert json.loads(surgery("inspect", merged, "--json").stdout)["kind"] == "checkpoint"
    assert page_of(merged, tmp_path / "page.html").data["kind"] == "checkpoint"


# --- the file ----------------------------------------------------------------------------------------------


def test_where_it_goes(surgery: Surgery, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    done = surgery("report", model)
    assert done.code == 0, done.stderr
    page = tmp_path / "model-report.html"
    assert str(page) in done.stdout
    first = page.read_bytes()
    assert_refused(surgery("report", model), 8, "exists", "--overwrite")
    assert surgery("report", model, "--overwrite").code == 0
    assert page.read_bytes() == first, "the same figures make the same page"
    foreign = tmp_path / "notes.html"
    foreign.write_text("<html>mine</html>")
    assert_refused(surgery("report", model, "-o", foreign, "--overwrite"), 8, "no page of nlora_surgery report")
    assert_refused(surgery("report", model, "-o", tmp_path), 8, "is a directory")
    assert foreign.read_text() == "<html>mine</html>"
    assert surgery("report", model, "-o", tmp_path / "new" / "page.html").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-report.html", "new", "notes.html"]


def test_bad_input_ends_in_one_sentence(surgery: Surgery, prepared: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    other = write_llama(tmp_path / "other", seed=1)
    virtual = init(model, tmp_path / "virtual", residual="virtual", rank=4)
    broken = init(model, tmp_path / "broken", rank=4)
    manifest = json.loads((broken / "nlora_surgery.json").read_text())
    del manifest["modules"][0]["shape"]
    (broken / "nlora_surgery.json").write_text(json.dumps(manifest))
    with nothing_changes(tmp_path):
        for arguments, code, words in (
            ((model, "--ranks", "8,x"), 2, ("--ranks", "8,x")),
            ((model, "--ranks", "0,8"), 2, ("--ranks", "from 1 to 4096")),
            ((model, "--rank", "0"), 2, ("--rank must be",)),
            ((model, "--layers", "some"), 2, ("--layers", "all")),
            ((model, "--layers", "0"), 2, ("--layers",)),
            ((model, "--device", "cuda:9"), 2, ("--device cuda:9",)),
            ((model, "--targets", "nothing"), 5, ("--targets nothing",)),
            ((model, "--base", other), 2, ("--base",)),
            ((prepared, "--targets", "q_proj"), 2, ("--targets",)),
            ((virtual, "--base", other), 7, ("another model",)),
            ((virtual / "adapter", "--base", other), 7, ("another base",)),
            ((broken,), 3, ("not a manifest of init",)),
            ((tmp_path / "nothing",), 3, ("no model at",)),
            ((tmp_path,), 3, ("no safetensors weights",)),
        ):
            assert_refused(surgery("report", *arguments, "-o", tmp_path / "page.html"), code, *words)


def test_without_matplotlib_the_extra_is_named(
    surgery: Surgery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with nothing_changes(tmp_path):
        assert_refused(surgery("report", model), 12, 'pip install "nlora-surgery[report]"')


def test_of_a_model_of_32_layers_it_stays_below_2_mb(tmp_path: Path) -> None:
    """Every layer measured and drawn, 256 values each."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 256), "self_attn.v_proj": (256, 256),
              "self_attn.o_proj": (256, 256), "mlp.gate_proj": (260, 256), "mlp.up_proj": (260, 256),
              "mlp.down_proj": (256, 260)}  # fmt: skip
    names = {f"model.layers.{layer}.{kind}.weight": shape for layer in range(32) for kind, shape in shapes.items()}
    from tests.checkpoints import write_checkpoint

    model = write_checkpoint(
        tmp_path / "model", {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in names.items()}
    )
    out = init(model, tmp_path / "out")
    page = page_of(out, tmp_path / "page.html", spectra=SpectraOptions(layers=None))
    assert len(page.data["spectra"]["modules"]) == 224
    assert {len(module["curve"]) for module in page.data["spectra"]["modules"]} == {256}
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


# --- the page ----------------------------------------------------------------------------------------------

EVIL = "<!--<script >alert('$x^{2')</script >&quot;\"><img src=x onerror=alert(1)>-->]]></style>"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of init whose module is named as an attack, and a model type that is one."""
    tensors = llama_tensors()
    directory = tmp_path_factory.mktemp("evil")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    changes = {f"model.layers.{layer}.{EVIL}.weight": weight.clone() for layer in range(2)}
    return init(write_llama(directory / "<b>model", changes=changes, shards=1), directory / "out", rank=4)


def test_names_from_files_stay_text(evil: Path, tmp_path: Path) -> None:
    page = page_of(evil, tmp_path / "page.html")
    assert page.text.count(EVIL) >= 5
    assert {tag for tag, _ in page.elements if tag in {"img", "b"}} == set()
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert any(EVIL in module["module"] for module in page.data["start"]["modules"])
    assert_maps_are(page, evil)


def test_the_page_loads_nothing(prepared: Path, tmp_path: Path) -> None:
    """No element names anything outside of the page, and its policy forbids it to."""
    text_path = tmp_path / "page.html"
    page = page_of(prepared, text_path)
    text = text_path.read_text(encoding="utf-8")
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in {"src", "href"}]
    assert all(value is not None and (value.startswith("#") or value == "data:,") for value in links)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a[n] for _, a in page.elements for n in ("aria-labelledby", "for") if n in a]
    anchors = [str(a["href"])[1:] for t, a in page.elements if t in {"a", "use"}]
    assert {*named, *anchors} <= set(ids)
    charts = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "chart"]
    assert len(charts) == 8
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert "#0101" not in text
    assert "#0102" not in text


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_in_light_and_in_dark() -> None:
    """WCAG's AA: 4.5 for text, 3 for lines."""
    css = (Path(sys.modules["nlora_surgery"].__path__[0]) / "templates" / "report.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("text", "soft", "accent"):
            assert contrast(scheme[text], scheme["page"]) >= 4.5
            assert contrast(scheme[text], scheme["raised"]) >= 4.5
        for line in ("mark", *(f"c{index}" for index in range(7)), *(f"d{index}" for index in range(1, 5))):
            assert contrast(scheme[line], scheme["page"]) >= 3, line
        for step in range(10):
            ink = scheme["low" if step < 5 else "high"]
            assert contrast(ink, scheme[f"h{step}"]) >= 4.5, step
        steps = [luminance(scheme[f"h{step}"]) for step in range(10)]
        assert steps in (sorted(steps), sorted(steps, reverse=True)), "more is not always darker, or always lighter"


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_chromium
@pytest.mark.browser
def test_a_browser_that_sees_problems_says_so(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('no'); undefinedName()</script><img src='http://127.0.0.1:9/x.png'>")
    browser.problems.clear()
    browser.open(page)
    found = " ".join(browser.problems)
    assert all(word in found for word in ("no", "undefinedName", "127.0.0.1:9/x.png"))


@needs_chromium
@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["prepared", "run", "evil"])
def test_in_a_browser(kind: str, dark: bool, browser: Chromium, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No problem in the console, no request, the manifest's figures in the DOM, nothing wider than a phone."""
    directory = request.getfixturevalue(kind)
    manifest_of = request.getfixturevalue("prepared") if kind == "run" else directory
    report(directory, tmp_path / "page.html")
    browser.problems.clear()
    browser.open(tmp_path / "page.html", dark=dark)
    assert_maps_are(Page(browser.evaluate("new XMLSerializer && document.documentElement.outerHTML")), manifest_of)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 19, 23)" if dark else "rgb(255, 255, 255)")
    for width in (1280, 360):
        browser.open(tmp_path / "page.html", dark=dark, width=width)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")
    assert browser.problems == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@needs_chromium
@pytest.mark.browser
def test_the_rank_is_chosen_by_keyboard(browser: Chromium, tiny_llama: Path, tmp_path: Path) -> None:
    report(tiny_llama, tmp_path / "page.html", ReportOptions(rank=64))
    browser.problems.clear()
    browser.open(tmp_path / "page.html")
    before = Page(browser.evaluate("document.documentElement.outerHTML"))

    def tab_to(name: str) -> None:
        for _ in range(40):
            browser.press("Tab", 9)
            if browser.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"Tab does not lead to {name}")

    tab_to("rank")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ArrowLeft", 37)
    wanted = gather(tiny_llama, ReportOptions(rank=63))["spectra"]
    page = Page(browser.evaluate("document.documentElement.outerHTML"))
    assert browser.evaluate("document.getElementById('rank-number').value") == "63"
    energies = page.column("at-rank", "energy, at best")
    assert energies["all"] == pytest.approx(wanted["energy"]["63"], abs=1e-12)
    assert {
        kind["kind"]: pytest.approx(kind["energy"]["63"], abs=1e-12) for kind in wanted["kinds"]
    }.items() <= energies.items()
    for name, what in (
        ("LoRA", "lora"),
        ("SLoRA, NLoRA", "slora"),
        ("IntTune", "inttune"),
        ("file, fp32", "adapter_bytes"),
    ):
        costs = page.column("at-rank", name)
        assert costs["all"] == wanted["costs"]["63"][what]
        assert {kind["kind"]: kind["costs"]["63"][what] for kind in wanted["kinds"]}.items() <= costs.items()
    for (kind, layer), value in page.map("best").items():
        curve = next(m["curve"] for m in wanted["modules"] if m["module"] == f"model.layers.{layer}.{kind}")
        assert value == pytest.approx(curve[62], abs=1e-12)
    assert browser.evaluate("document.querySelectorAll('.chosen').length") == 0
    shifts = browser.evaluate("[...document.querySelectorAll('.rank-marker')].map(e => e.getAttribute('transform'))")
    assert len(shifts) == 8
    assert all(-2 < float(str(shift)[10:-3]) < 0 for shift in shifts), shifts
    browser.press("ArrowRight", 39)
    again = Page(browser.evaluate("document.documentElement.outerHTML"))
    for table in ("at-rank", "by-rank"):
        for row, earlier in zip(again.tables[table], before.tables[table], strict=True):
            assert row == [pytest.approx(cell, abs=1e-12) if isinstance(cell, float) else cell for cell in earlier]
    for _ in range(60):
        if "scroll" in str(browser.evaluate("document.activeElement.className")):
            break
        browser.press("Tab", 9)
    else:
        raise AssertionError("Tab does not lead to a table")
    assert browser.problems == []


def texts(browser: Chromium, selector: str) -> list[str]:
    found = browser.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")
    return [str(text) for text in found]


@needs_chromium
@pytest.mark.browser
def test_what_the_script_writes_is_what_the_page_said(browser: Chromium, tiny_llama: Path, tmp_path: Path) -> None:
    """To another rank and back: the same words, though JavaScript and not Python has put them there."""
    report(tiny_llama, tmp_path / "page.html", ReportOptions(rank=16))
    browser.open(tmp_path / "page.html")
    before = texts(browser, "main")
    for rank in (17, 16):
        typed = f"e.value = {rank}; e.dispatchEvent(new Event('input'))"
        browser.evaluate(f"(e => {{ {typed} }})(document.getElementById('rank-number'))")
        assert (texts(browser, "main") == before) == (rank == 16)


@needs_chromium
@pytest.mark.browser
def test_without_scripts_the_tables_are_there(browser: Chromium, tiny_llama: Path, tmp_path: Path) -> None:
    report(tiny_llama, tmp_path / "page.html")
    browser.open(tmp_path / "page.html", script=False)
    answer = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    found = browser.call("DOM.getOuterHTML", nodeId=answer)["outerHTML"]
    page = Page(found.partition("<!DOCTYPE html>")[2])
    assert page.tables["by-rank"]
    assert page.tables["at-rank"]
    chooser = next(attributes for _, attributes in page.elements if attributes.get("id") == "chooser")
    assert "hidden" in chooser
