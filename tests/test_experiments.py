"""experiments/: the page says what its results say, and the runner makes such results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments import vision
from experiments.page import PAGE, VISION_RESULTS, fill, tables, trials, vision_tables
from experiments.run import RESULTS, Runner, best_rate, read_results
from experiments.table import GRID_STEPS, STAGES, Run, Start

RESULT_KEYS = {"name", "run", "init", "eval", "data", "seconds", "machine", "versions", "date"}


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def cells(page: str, name: str) -> dict[str, list[str]]:
    """The rows of a table of the page, by their first cell."""
    table = page.partition(f"<!-- table: {name} -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in [rows[0], *rows[2:]]}


def test_the_page_holds_the_tables_that_the_results_make(page: str) -> None:
    made = tables(read_results().values()) | vision_tables(read_results(VISION_RESULTS).values())
    assert fill(page, made) == page, "run python -m experiments.page"
    assert {*re.findall(r"<!-- table: ([^>]+) -->", page)} == {*made}
    pictures = re.findall(r"\]\((experiments/[^)]+)\)", page)
    assert pictures
    assert [name for name in pictures if not (PAGE.parent / name).exists()] == []


def test_losses_on_the_page_are_those_of_the_file(page: str) -> None:
    """Read from the lines themselves, past the code that makes the tables."""
    grid = cells(page, "initialization, grid")
    rates = [float(rate) for rate in grid["start"] if re.fullmatch(r"\de-\d", rate)]
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        run, start = result["run"], result["run"]["start"]
        plain = start["rank"] == 64 and start["residual"] == "baked" and not start["split"] and not start["two_matrix"]
        if run["steps"] == GRID_STEPS and run["seed"] == 0 and run["mode"] != "inttune" and plain:
            found[start["method"], run["lr"]] = result["eval"][-1]
    checked = 0
    for method in ("lora", "slora", "nystrom", "nystrom-optimal", "sketch"):
        row = dict(zip(rates, grid[method], strict=False))
        for lr, cell in row.items():
            if cell:
                step, loss = found[method, lr]
                assert (step, cell) == (GRID_STEPS, f"{loss:.3f}")
                checked += 1
        shown = [float(cell) for cell in row.values() if cell]
        assert grid[method][len(rates)] == f"{min(shown):.3f}"
    assert checked >= 5 * 4  # four learning rates for every start


def test_losses_of_the_vision_transformer_are_those_of_the_file(page: str) -> None:
    """The mean over three seeds, read from the lines themselves."""
    table = cells(page, "vision, starts")
    rates = [float(rate) for rate in table["start"] if re.fullmatch(r"\de-\d", rate)]
    losses: dict[tuple[str, float], list[float]] = {}
    for line in VISION_RESULTS.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if result["run"]["mode"] not in {"inttune", "dora"}:
            losses.setdefault((result["run"]["start"], result["run"]["lr"]), []).append(result["after"]["loss"])
    first = table["start"].index("5e-4")
    for method in ("lora", "slora", "nystrom", "nystrom-optimal", "sketch"):
        for lr, cell in zip(rates, table[method][first:], strict=False):
            seeds = losses[f"{method}-r16", lr]
            assert len(seeds) == 3
            assert cell == f"{sum(seeds) / 3:.3f}"


def test_every_result_is_of_the_table_and_says_how_it_came_about() -> None:
    planned = {run.name: run for stage in STAGES for run in stage.runs}
    assert len(planned) == sum(len(stage.runs) for stage in STAGES), "two runs have one name"
    for name, result in read_results().items():
        assert result.keys() >= RESULT_KEYS
        assert asdict(planned[name].at(result["run"]["lr"])) == result["run"]
        if planned[name].lr is not None:
            assert planned[name].lr == result["run"]["lr"]
        steps = [step for step, _ in result["eval"]]
        assert steps == sorted(steps)
        assert "failed" in result or steps[-1] == result["run"]["steps"]
    assert {*read_results(VISION_RESULTS)} == {run.name for run in vision.RUNS}


def result_of(lr: float, loss: float, **more: Any) -> Mapping[str, Any]:
    run = Run(start=Start(method="nystrom"), mode="nlora", lr=lr)
    init = {"seconds": 1.0, "energy": None, "delta_ratio": None, "drift": None}
    return {"name": run.name, "run": asdict(run), "init": init, "eval": [[0, 2.0], [GRID_STEPS, loss]], **more}


@pytest.mark.parametrize(
    ("losses", "near"),
    [
        ({1e-4: 1.0, 2e-4: 1.01, 5e-4: 1.03}, [1e-4, 2e-4]),
        ({1e-4: 1.03, 2e-4: 1.0, 5e-4: 1.02}, [2e-4, 5e-4]),
        ({1e-4: 1.01, 2e-4: 1.5, 5e-4: 1.0}, [5e-4]),  # what lies behind a bad one does not count
        ({1e-4: 1.3, 2e-4: 1.0, 5e-4: math.inf}, [2e-4]),
    ],
)
def test_the_range_of_learning_rates(losses: dict[float, float], near: list[float]) -> None:
    results = [
        result_of(lr, loss) if loss < math.inf else {**result_of(lr, 0), "failed": "not finite"}
        for lr, loss in losses.items()
    ]
    (trial,) = trials(results).values()
    assert trial.near == near
    assert trial.best == (1.0, next(lr for lr, loss in losses.items() if loss == 1.0))


def test_long_runs_take_the_best_learning_rate_of_their_own_start() -> None:
    run = Run(start=Start(method="nystrom"), mode="nlora", lr=None).long()
    results = [result_of(1e-4, 1.2), result_of(2e-4, 1.0), {**result_of(5e-4, 0.1), "failed": "not finite"}]
    assert best_rate(run, results) == 2e-4
    with pytest.raises(LookupError, match="no short run"):
        best_rate(Run(start=Start(method="sketch"), mode="nlora", lr=None).long(), results)


@pytest.fixture
def runner(tiny_llama: Path, tmp_path: Path) -> Runner:
    problems = [{"question": f"{a} plus {b}?", "answer": f"{a + b}"} for a in range(4) for b in range(4)]
    problems.insert(1, {"question": "long " * 80, "answer": "left out"})
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    return Runner(model=tiny_llama, train_data=data, test_data=data, work=work, results=tmp_path / "results.jsonl")


def test_a_run_becomes_a_line(runner: Runner) -> None:
    short = Run(start=Start(method="nystrom", rank=4), mode="inttune", lr=1e-3, steps=2, eval_steps=1, problems=3)
    long = Run(start=Start(method="nystrom", rank=4), mode="inttune", lr=None, steps=3, eval_steps=3, problems=3)
    assert runner.pending([short, long]) == [short, long]
    result = runner.run(short)
    assert runner.pending([short, long]) == [long]
    assert read_results(runner.results) == {short.name: json.loads(json.dumps(result))}
    assert result.keys() == RESULT_KEYS | {"trainable", "resumed"}
    assert result["trainable"] == 4 * 7 * 4**2  # lora_N of seven projections in four layers
    assert [step for step, _ in result["eval"]] == [0, 1, 2]
    assert len((runner.work / "test-3.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert "left out" not in (runner.work / "test-3.jsonl").read_text(encoding="utf-8")
    assert [*(runner.work / "runs").iterdir()] == []

    result = runner.run(long)
    assert (result["name"], result["run"]["lr"]) == (long.name, 1e-3)


def test_a_folded_start_is_the_same_start_in_two_matrices(runner: Runner) -> None:
    whole = Run(start=Start(method="nystrom", rank=4), mode="nlora", lr=1e-3, steps=1, eval_steps=1, problems=3)
    folded = Run(
        start=Start(method="nystrom", rank=4, folded=True), mode="lora", lr=1e-3, steps=1, eval_steps=1, problems=3
    )
    first, second = runner.run(whole), runner.run(folded)
    assert first["trainable"] - second["trainable"] == 4 * 7 * 4**2
    # One and the same product, summed in another order, in a model that computes in bf16 (8 bits).
    assert first["eval"][0][1] == pytest.approx(second["eval"][0][1], rel=2**-8)
