"""experiments/: the page says what its results say, and the runner makes such results."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import vision
from experiments.compare import Trained, language, near_rates, vision_transformer
from experiments.markdown import tables
from experiments.page import PAGE, fill
from experiments.run import RESULTS, Runner, append_result, losses_by_rate, read_results
from experiments.table import GRID_STEPS, LEAST_RATES, LONG_STEPS, RATES, STAGES, Run, Start, Trial

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
    made = tables(language(read_results().values()), vision_transformer(read_results(vision.RESULTS).values()))
    assert fill(page, made) == page, "run python -m experiments.page"
    assert {*re.findall(r"<!-- table: ([^>]+) -->", page)} == {*made}
    pictures = re.findall(r"\]\((experiments/[^)]+)\)", page)
    assert pictures
    assert [name for name in pictures if not (PAGE.parent / name).exists()] == []
    assert {Path(name).name for name in pictures} == {path.name for path in PAGE.with_suffix("").iterdir()}


def test_losses_on_the_page_are_those_of_the_file(page: str) -> None:
    """Read from the lines themselves, past the code that makes the tables."""
    grid = cells(page, "language, starts")
    rates = [float(rate) for rate in grid["start"] if re.fullmatch(r"\de-\d", rate)]
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        run, start = result["run"], result["run"]["start"]
        changed = start["split"], start["two_matrix"], start["folded"]
        plain = start["rank"] == 64 and start["residual"] == "baked" and not any(changed)
        if run["steps"] == GRID_STEPS and run["seed"] == 0 and run["mode"] != "inttune" and plain:
            found[start["method"], run["lr"]] = result["eval"][-1]
    checked = 0
    first = grid["start"].index("2e-5")
    for method in ("lora", "slora", "nystrom", "nystrom-pinv", "nystrom-optimal", "sketch"):
        row = dict(zip(rates, grid[method][first:], strict=False))
        for lr, cell in row.items():
            if cell:
                step, loss = found[method, lr]
                assert (step, cell) == (GRID_STEPS, f"{loss:.3f}")
                checked += 1
        shown = [float(cell) for cell in row.values() if cell]
        assert grid[method][first + len(rates)] == f"{min(shown):.3f}"
    assert checked >= 6 * 4  # four learning rates for every start


def test_losses_of_the_vision_transformer_are_those_of_the_file(page: str) -> None:
    """The mean over three seeds, read from the lines themselves."""
    table = cells(page, "vision, starts")
    rates = [float(rate) for rate in table["start"] if re.fullmatch(r"\de-\d", rate)]
    losses: dict[tuple[str, float], list[float]] = {}
    for line in vision.RESULTS.read_text(encoding="utf-8").splitlines():
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
    trials = {(trial.start.name, trial.mode): trial for stage in STAGES for trial in stage.trials}
    others = {run.name: run for stage in STAGES for run in stage.others}
    assert len(trials) == sum(len(stage.trials) for stage in STAGES), "two trials have one name"
    for name, result in read_results().items():
        assert result.keys() >= RESULT_KEYS
        run = Run(**{**result["run"], "start": Start(**result["run"]["start"])})
        assert run.name == name
        assert run.lr in RATES
        trial = trials.get((run.start.name, run.mode))
        allowed = [] if trial is None else [trial.short(run.lr), *trial.long(run.lr)]
        assert run in [*allowed, others.get(name)]
        steps = [step for step, _ in result["eval"]]
        assert steps == sorted(steps)
        assert "failed" in result or steps[-1] == run.steps
    images = read_results(vision.RESULTS).values()
    planned = {run.name for trial in vision.TRIALS for lr in RATES for run in vision.runs_at(trial, lr)}
    assert {result["name"] for result in images} <= planned
    for trial in vision.TRIALS:
        assert trial.next_rate(vision.mean_losses(trial, images)) is None, f"{trial.name} is not finished"


def test_what_is_compared_had_a_search_of_its_own() -> None:
    """At least four learning rates, and a worse one on either side of the best; read from the lines themselves."""
    compared = language(read_results().values())
    assert len(compared) > 10
    alone = {(run.start.name, run.mode) for stage in STAGES for run in stage.others}
    for (start, mode), trained in compared.items():
        if not trained.losses:
            assert (start, mode) in alone  # runs without a search, beside what had one
            continue
        losses = {
            result["run"]["lr"]: math.inf if "failed" in result else result["eval"][-1][1]
            for result in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
            if Start(**result["run"]["start"]).name == start
            and (result["run"]["mode"], result["run"]["steps"], result["run"]["seed"]) == (mode, GRID_STEPS, 0)
        }
        assert losses == trained.losses
        assert len(losses) >= LEAST_RATES
        at = RATES.index(trained.best_rate)
        assert losses[RATES[at - 1]] >= trained.best_loss <= losses[RATES[at + 1]]
        for run in trained.long:
            assert (run["run"]["lr"], run["eval"][-1][0]) == (trained.best_rate, LONG_STEPS)


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
    assert near_rates(losses) == near


def test_losses_between_the_rates_that_were_tried() -> None:
    """Linear in the logarithm: half-way between 1e-4 and 1e-2 is 1e-3."""
    trained = Trained("nystrom", "nlora", [], {1e-4: 1.0, 1e-2: 3.0, 2e-2: 9.0})
    assert trained.loss_at(1e-3) == pytest.approx(2.0)
    assert (trained.loss_at(1e-4), trained.loss_at(1e-2), trained.loss_at(2e-2)) == pytest.approx((1.0, 3.0, 9.0))
    assert trained.loss_at(5e-5) is trained.loss_at(5e-2) is None


def test_some_rates_are_tried_wherever_the_search_goes() -> None:
    trial = Trial(start=Start(method="slora"), mode="slora", first=2e-3, always=(2e-4,))
    losses = {5e-4: 1.2, 1e-3: 1.1, 2e-3: 1.0, 5e-3: 1.1}
    assert trial.next_rate(losses) == 2e-4
    assert trial.next_rate({2e-4: 1.3} | losses) is None
    assert trial.next_rate({2e-4: 0.9} | losses) == 1e-4  # the lowest so far, and nothing known below it


@given(
    best=st.integers(0, len(RATES) - 1),
    first=st.integers(0, len(RATES) - 1),
    slopes=st.lists(st.floats(0.01, 1), min_size=2 * len(RATES), max_size=2 * len(RATES)),
)
def test_the_search_finds_the_lowest_of_a_valley(best: int, first: int, slopes: list[float]) -> None:
    """Oracle: all rates tried."""
    falling, rising = slopes[: len(RATES)], slopes[len(RATES) :]
    valley = {lr: sum(falling[i:best]) + sum(rising[best:i]) for i, lr in enumerate(RATES)}
    trial = Trial(start=Start(method="nystrom"), mode="nlora", first=RATES[first])
    losses: dict[float, float] = {}
    while (lr := trial.next_rate(losses)) is not None:
        assert lr not in losses
        losses[lr] = valley[lr]
    assert min(losses, key=losses.__getitem__) == RATES[best] == min(valley, key=valley.__getitem__)
    assert {*RATES[max(best - 1, 0) : best + 2]} <= {*losses}
    assert len(losses) >= LEAST_RATES


def result_of(lr: float, loss: float, **more: Any) -> dict[str, Any]:
    run = Run(start=Start(method="nystrom"), mode="nlora", lr=lr)
    init = {"seconds": 1.0, "energy": None, "delta_ratio": None, "drift": None}
    return {"name": run.name, "run": asdict(run), "init": init, "eval": [[0, 2.0], [GRID_STEPS, loss]], **more}


def test_long_runs_take_the_best_learning_rate_of_their_own_start(tmp_path: Path) -> None:
    trial = Trial(start=Start(method="nystrom"), mode="nlora", first=2e-4, long_seeds=(0, 1))
    results = tmp_path / "results.jsonl"
    runner = Runner(model=tmp_path, train_data=tmp_path, test_data=tmp_path, work=tmp_path, results=results)
    lines = [result_of(1e-4, 1.2), result_of(2e-4, 1.0), result_of(5e-5, 1.3), {**result_of(5e-4, 0.1), "failed": "…"}]
    for line in lines:
        append_result(results, line)
    assert losses_by_rate(trial.start, trial.mode, lines) == {5e-5: 1.3, 1e-4: 1.2, 2e-4: 1.0, 5e-4: math.inf}
    long = trial.short(2e-4).long()
    assert runner.pending(trial) == long
    append_result(results, {**lines[0], "name": long.name, "run": asdict(long)})
    assert runner.pending(trial) == trial.short(2e-4).long(seed=1)
    other = Trial(start=Start(method="sketch"), mode="nlora", first=2e-4)
    assert runner.pending(other) == other.short(2e-4)


def test_a_trial_that_always_diverges_says_so(tmp_path: Path) -> None:
    trial = Trial(start=Start(method="nystrom"), mode="nlora", first=1e-6)
    results = tmp_path / "results.jsonl"
    runner = Runner(model=tmp_path, train_data=tmp_path, test_data=tmp_path, work=tmp_path, results=results)
    for lr in RATES[:4]:
        append_result(results, {**result_of(lr, 0.1), "failed": "not finite"})
    with pytest.raises(LookupError, match="at none of 4 learning rates"):
        runner.pending(trial)


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
    run = Run(start=Start(method="nystrom", rank=4), mode="inttune", lr=1e-3, steps=2, eval_steps=1, problems=3)
    assert runner.pending(run) == run
    (result,) = runner.finish(run)
    assert runner.pending(run) is None
    assert [*runner.finish(run)] == []
    assert read_results(runner.results) == {run.name: json.loads(json.dumps(result))}
    assert result.keys() == RESULT_KEYS | {"trainable", "step_per_rate", "resumed"}
    assert result["trainable"] == 4 * 7 * 4**2  # lora_N of seven projections in four layers
    assert [step for step, _ in result["eval"]] == [0, 1, 2]
    assert len((runner.work / "test-3.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert "left out" not in (runner.work / "test-3.jsonl").read_text(encoding="utf-8")
    assert [*(runner.work / "runs").iterdir()] == []


def test_a_folded_start_is_the_same_start_in_two_matrices(runner: Runner) -> None:
    whole = Run(start=Start(method="nystrom", rank=4), mode="nlora", lr=1e-3, steps=1, eval_steps=1, problems=3)
    folded = Run(
        start=Start(method="nystrom", rank=4, folded=True), mode="lora", lr=1e-3, steps=1, eval_steps=1, problems=3
    )
    first, second = runner.run(whole), runner.run(folded)
    assert first["trainable"] - second["trainable"] == 4 * 7 * 4**2
    # One and the same product, summed in another order, in a model that computes in bf16 (8 bits).
    assert first["eval"][0][1] == pytest.approx(second["eval"][0][1], rel=2**-8)
