"""The numerics against oracles: exact SVD, fp64 formulas, scipy, stock PEFT.

Products are compared, not singular vectors, whose signs are arbitrary. A tolerance is `eps` of the dtype that
was computed in, times the sizes of the sums, times the norms (and condition numbers) that the textbook bound
names; each says so where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from nlora_surgery import factor
from nlora_surgery.factor import (
    TILE_BYTES,
    Factors,
    delta_norm,
    factorize,
    initial_zero,
    low_rank_svd,
    nystrom,
    nystrom_optimal,
    nystrom_pinv,
    product_svd,
    randomized_svd,
    row_tiles,
    sample_rows_and_columns,
    split_scale,
    times,
    truncated_svd,
)
from nlora_surgery.options import (
    APPROXIMATIONS,
    FAMILY_NYSTROM,
    METHODS,
    SAMPLINGS,
    SCALE_SPLITS,
    STARTS_AT_ZERO,
    FactorOptions,
    Method,
    Sampling,
    ScaleSplit,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COMPUTE_DTYPES = (torch.float32, torch.float64)
SVD_METHODS = ("pissa", "pissa-fast", "sketch")
# Their product is an orthogonal projection of the weight (of both its sides), so never further off than zero.
PROJECTIONS = ("nystrom-optimal", *SVD_METHODS)
# out, in, r: single entries, vectors, square, tall, wide, r = min, r = 1.
SHAPES = ((1, 1, 1), (1, 9, 1), (9, 1, 1), (12, 12, 5), (33, 9, 9), (9, 33, 9), (40, 24, 6), (24, 40, 1))

ids = str  # dtypes and shapes as their own test ids
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# --- helpers ----------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def with_spectrum(out_features: int, in_features: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(gaussian(out_features, len(spectrum), seed=seed)).Q
    right = torch.linalg.qr(gaussian(in_features, len(spectrum), seed=seed + 1)).Q
    return left * spectrum @ right.T


def realistic(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A few large singular values, a power law, then a nearly flat bulk, as trained projections have."""
    k = torch.arange(1, min(out_features, in_features) + 1, dtype=torch.float64)
    bulk = 1 - k / (2 * len(k))
    return with_spectrum(out_features, in_features, 8 * k.pow(-0.8) + bulk, seed)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def product(factors: Factors) -> Tensor:
    left, right = factors.sides(1.0, torch.float64)
    return left @ right


def magnitude(factors: Factors) -> float:
    """`‖ |lora_B| |lora_N| |lora_A| ‖`: one relative error in every entry moves the product by that times this."""
    core = None if factors.lora_N is None else factors.lora_N.abs()
    return float(product(Factors(factors.lora_A.abs(), factors.lora_B.abs(), core)).norm())


def matrices(factors: Factors) -> list[Tensor]:
    return [matrix for matrix in (factors.lora_A, factors.lora_N, factors.lora_B) if matrix is not None]


def equal(one: Factors, other: Factors) -> bool:
    return all(map(torch.equal, matrices(one), matrices(other)))


def residual(weight: Tensor, factors: Factors, scaling: float = 1.0) -> float:
    """Relative Frobenius norm, in fp64."""
    weight = weight.double()
    return float((weight - scaling * product(factors)).norm() / weight.norm())


def best_residual(weight: Tensor, r: int) -> float:
    """Eckart and Young: the tail of the exact spectrum, in fp64."""
    values = torch.linalg.svdvals(weight.double())
    return float(values[r:].norm() / values.norm())


def truncation_bound(weight: Tensor, r: int, dtype: torch.dtype) -> float:
    """How far a backward stable SVD in `dtype` may move the truncated product.

    LAPACK's SVD is exact for a weight that is off by p(m, n) eps ‖weight‖₂, with p of about max(m, n). A change E
    moves the best rank-r product by at most ‖E‖ σ_r / (σ_r - σ_{r+1}), to first order.
    """
    values = [*torch.linalg.svdvals(weight.double()).tolist(), 0.0]
    amplification = values[r - 1] / (values[r - 1] - values[r])
    return max(weight.shape) * eps(dtype) * values[0] * math.sqrt(r) * amplification


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # TILE_BYTES is bound as row_tiles' default when the module is read; to patch it would change nothing.
    monkeypatch.setattr(factor, "row_tiles", partial(row_tiles, tile_bytes=256))


def rows_in_memory(weight: Tensor) -> Tensor:
    return weight.contiguous()


def columns_in_memory(weight: Tensor) -> Tensor:
    return weight.T.contiguous().T


def strided(weight: Tensor) -> Tensor:
    grid = weight.new_full((2 * weight.shape[0], 3 * weight.shape[1]), math.nan)
    grid[::2, ::3] = weight
    return grid[::2, ::3]


LAYOUTS = (rows_in_memory, columns_in_memory, strided)


# --- row_tiles, times -------------------------------------------------------------------------------------


@examples
@given(st.integers(0, 300), st.integers(1, 300), st.sampled_from([2, 4, 8]), st.integers(1, 5000))
def test_row_tiles_partition_the_rows(out_features: int, in_features: int, itemsize: int, tile_bytes: int) -> None:
    tiles = list(row_tiles((out_features, in_features), itemsize, tile_bytes))
    assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(out_features))
    for tile in tiles:
        height = tile.stop - tile.start
        assert height == 1 or height * in_features * itemsize <= tile_bytes


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (23, 23), (70, 11), (11, 70)], ids=ids)
@pytest.mark.usefixtures("small_tiles")
def test_times_is_matmul_in_fp64(shape: tuple[int, int], dtype: torch.dtype, compute: torch.dtype) -> None:
    weight = gaussian(*shape).to(dtype)
    right = gaussian(shape[1], 5, seed=1).to(compute)
    # Higham, Accuracy and Stability, (3.13): |error| <= n u |weight| |right| by element; one more u for the
    # conversion of fp64 to fp32, and twice that for the oracle's own rounding where it is fp64 too.
    bound = 2 * (shape[1] + 2) * eps(compute) * (weight.double().abs() @ right.double().abs())
    for layout in LAYOUTS:
        result = times(layout(weight), right)
        assert result.dtype == compute
        assert ((result.double() - weight.double() @ right.double()).abs() <= bound).all()


@pytest.mark.parametrize("layout", [rows_in_memory, columns_in_memory])
def test_times_over_several_tiles_of_the_real_size_is_matmul_in_fp64(
    layout: Callable[[Tensor], Tensor],
) -> None:
    weight = layout(gaussian(1500, 1200).to(torch.bfloat16))
    assert weight.numel() * 4 > TILE_BYTES
    right = gaussian(1200, 3, seed=1).float()
    bound = 1202 * eps(torch.float32) * (weight.double().abs() @ right.double().abs())
    assert ((times(weight, right).double() - weight.double() @ right.double()).abs() <= bound).all()


# --- which rows and columns -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_samples_are_sorted_distinct_and_in_range(shape: tuple[int, int, int], sampling: Sampling) -> None:
    out_features, in_features, r = shape
    weight = gaussian(out_features, in_features).to(torch.bfloat16)
    for indices, size in zip(
        sample_rows_and_columns(weight, r, sampling, seeded()), (out_features, in_features), strict=True
    ):
        assert indices.dtype == torch.int64
        assert indices.device.type == "cpu"
        values = indices.tolist()
        assert len(values) == r
        assert values == sorted(set(values))
        assert values[0] >= 0
        assert values[-1] < size
        if sampling == "leading":
            assert values == list(range(r))


@pytest.mark.parametrize("sampling", ["uniform", "norm"])
def test_samples_follow_the_seed_alone(sampling: Sampling, threads: Callable[[int], None]) -> None:
    weight = gaussian(600, 500).to(torch.bfloat16)
    drawn = []
    for count, seed in ((1, 0), (2, 0), (2, 1)):
        threads(count)
        drawn.append(sample_rows_and_columns(weight, 16, sampling, seeded(seed)))
    (rows, columns), (rows_again, columns_again), (other_rows, other_columns) = drawn
    assert torch.equal(rows, rows_again)
    assert torch.equal(columns, columns_again)
    assert not torch.equal(rows, other_rows)
    assert not torch.equal(columns, other_columns)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_samples_do_not_depend_on_layout_or_tiles(sampling: Sampling, request: pytest.FixtureRequest) -> None:
    weight = gaussian(50, 30).float()
    expected = sample_rows_and_columns(weight, 7, sampling, seeded())
    request.getfixturevalue("small_tiles")
    for layout in LAYOUTS:
        found = sample_rows_and_columns(layout(weight), 7, sampling, seeded())
        assert all(map(torch.equal, found, expected))


def inclusion(mass: Tensor, r: int) -> Tensor:
    """Exact probabilities to be among r = 1 or 2 draws without replacement."""
    share = mass / mass.sum()
    if r == 1:
        return share
    second = (share / (1 - share)).sum() - share / (1 - share)
    return share + share * second


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("sampling", ["uniform", "norm"])
def test_draws_are_in_proportion_to_exact_probabilities(sampling: Sampling, r: int) -> None:
    weight = gaussian(6, 5) * torch.arange(1, 7)[:, None].sqrt()
    generator, draws = seeded(), 3000
    counts = [torch.zeros(size, dtype=torch.float64) for size in weight.shape]
    for _ in range(draws):
        for count, indices in zip(counts, sample_rows_and_columns(weight, r, sampling, generator), strict=True):
            count[indices] += 1
    for axis, count in enumerate(counts):
        mass = weight.square().sum(1 - axis) if sampling == "norm" else torch.ones_like(count)
        expected = inclusion(mass, r)
        # A count is binomial: five standard deviations, which 22 counts together miss once in 80,000 seeds.
        bound = 5 * (expected * (1 - expected) / draws).sqrt()
        assert ((count / draws - expected).abs() <= bound).all()
        if sampling == "norm":  # and the test could tell: uniform draws are outside
            assert ((r / len(mass) - expected).abs() > bound).any()


@pytest.mark.parametrize("small", [1.0, 1e-9, 1e-18])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_zeros_are_drawn_only_when_nothing_else_is_left(seed: int, small: float) -> None:
    """However small the others are: 1e-9 squared is below eps, 1e-18 is below what bfloat16 sums would keep."""
    weight = torch.zeros(16, 14)
    weight[2:10, 3:11] = gaussian(8, 8, seed=seed).float()
    weight[6:10] *= small
    weight[:, 7:11] *= small
    weight = weight.to(torch.bfloat16)
    for r in (5, 8, 12):
        rows, columns = sample_rows_and_columns(weight, r, "norm", seeded(seed))
        for indices, nonzero in ((rows, range(2, 10)), (columns, range(3, 11))):
            inside = set(indices.tolist()) & set(nonzero)
            assert len(indices) == r
            assert len(inside) == min(r, 8)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_weight_of_zeros_can_be_sampled(sampling: Sampling) -> None:
    rows, columns = sample_rows_and_columns(torch.zeros(6, 4), 4, sampling, seeded())
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 4


# --- the contract of factorize ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("small_tiles")
def test_factorize_against_the_exact_svd(
    method: Method, dtype: torch.dtype, compute: torch.dtype, shape: tuple[int, int, int]
) -> None:
    out_features, in_features, r = shape
    weight = realistic(out_features, in_features).to(dtype)
    options = FactorOptions(method=method)
    before = weight.clone()
    factors = factorize(weight, r, options, generator=seeded(), dtype=compute)
    assert torch.equal(weight, before)

    assert factors.lora_A.shape == (r, in_features)
    assert factors.lora_B.shape == (out_features, r)
    assert (factors.lora_N is None) == (method == "lora")
    assert factors.lora_N is None or factors.lora_N.shape == (r, r)
    for matrix in matrices(factors):
        assert matrix.dtype == compute
        assert matrix.device == weight.device
        assert matrix.isfinite().all()
        assert not matrix.requires_grad

    # Backward errors of a few orthogonal steps, each of max(out, in) eps ‖weight‖, and the rounded factors.
    rounding = 10 * max(weight.shape) * eps(compute)
    best = best_residual(weight, r)
    found = residual(weight, factors)
    assert found >= best - rounding  # Eckart and Young
    if method in PROJECTIONS:
        assert found <= 1 + rounding
    if method in SVD_METHODS:
        assert found <= 1.03 * best + rounding
    if r == min(weight.shape) and method in PROJECTIONS:
        # Rank r is all there is; the sampled blocks' condition numbers amplify rounding (see below).
        block = weight.double()[:, :r] if out_features >= in_features else weight.double()[:r]
        assert found <= rounding * (1 if method in SVD_METHODS else float(torch.linalg.cond(block)) ** 2)

    # The layout in memory changes nothing: bit for bit where no sum is taken, else by rounding alone.
    for layout in (columns_in_memory, strided):
        again = factorize(layout(weight), r, options, generator=seeded(), dtype=compute)
        if options.samples_only:
            assert equal(again, factors)
        else:
            assert abs(residual(weight, again) - found) <= rounding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [-1, 0, 6, 100])
def test_r_out_of_range_is_a_value_error(method: Method, r: int) -> None:
    weight = gaussian(5, 8).float()
    with pytest.raises(ValueError, match=rf"r = {r} is not within 1 and 5"):
        factorize(weight, r, FactorOptions(method=method), generator=seeded())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_samples_only_is_what_stays_finite_where_the_unsampled_is_nan(method: Method, sampling: Sampling) -> None:
    weight = gaussian(20, 16).to(torch.bfloat16)
    rows, columns = sample_rows_and_columns(weight, 4, sampling, seeded())
    holed = torch.full_like(weight, math.nan)
    if method in FAMILY_NYSTROM:
        holed[rows] = weight[rows]
        holed[:, columns] = weight[:, columns]
    options = FactorOptions(method=method, sampling=sampling)
    try:
        factors = factorize(holed, 4, options, generator=seeded())
        finite = all(bool(matrix.isfinite().all()) for matrix in matrices(factors))
    except RuntimeError:  # LinAlgError, or multinomial's refusal of NaN
        finite = False
    assert finite == options.samples_only
    if finite:
        assert equal(factors, factorize(weight, 4, options, generator=seeded()))


@pytest.mark.parametrize("split", SCALE_SPLITS)
@pytest.mark.parametrize("method", ["nystrom", "nystrom-pinv"])
def test_scale_splits_of_samples_read_no_more(method: Method, split: ScaleSplit) -> None:
    holed = torch.full((20, 16), math.nan)
    holed[:4], holed[:, :4] = gaussian(4, 16), gaussian(20, 4, seed=1)
    factors = factorize(holed, 4, FactorOptions(method=method, scale_split=split), generator=seeded())
    assert all(matrix.isfinite().all() for matrix in matrices(factors))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_alone_decides(method: Method, sampling: Sampling, threads: Callable[[int], None]) -> None:
    """Same samples and sketches on one thread and on two; other seeds, others; torch's own generator untouched."""
    weight = realistic(300, 260).to(torch.bfloat16)
    options = FactorOptions(method=method, sampling=sampling)
    state = torch.get_rng_state()
    one, two, other = (
        (threads(count), factorize(weight, 8, options, generator=seeded(seed)))[1]
        for count, seed in ((1, 0), (2, 0), (2, 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    again = factorize(weight, 8, options, generator=seeded(1))
    assert equal(other, again)
    if options.samples_only or method in FAMILY_NYSTROM:
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, two.lora_B)
    # Thread counts reorder sums: a backward error, which an SVD cut at r amplifies by its gap, a core by its factors.
    bound = truncation_bound(weight, 8, torch.float32) + max(weight.shape) * eps(torch.float32) * magnitude(one)
    assert float((product(one) - product(two)).norm()) <= bound
    deterministic = method == "pissa" or (method in FAMILY_NYSTROM and sampling == "leading")
    assert torch.equal(two.lora_A, other.lora_A) == deterministic


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_gives_the_factors_of_its_data_and_shares_no_memory(method: Method) -> None:
    weight = nn.Parameter(gaussian(12, 10).float())
    before = weight.detach().clone()
    factors = factorize(weight, 3, FactorOptions(method=method), generator=seeded())
    assert equal(factors, factorize(before, 3, FactorOptions(method=method), generator=seeded()))
    for matrix in matrices(factors):
        assert not matrix.requires_grad
        matrix.add_(1)
    assert torch.equal(weight, before)


# --- nystrom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_raw_factors_are_blocks_of_the_weight_bit_for_bit(
    shape: tuple[int, int, int], sampling: Sampling, dtype: torch.dtype, compute: torch.dtype
) -> None:
    out_features, in_features, r = shape
    weight = gaussian(out_features, in_features).to(dtype)
    exact = weight.to(compute, copy=True)  # widening, or the one rounding of fp64 to fp32
    rows, columns = sample_rows_and_columns(weight, r, sampling, seeded())
    options = FactorOptions(sampling=sampling)
    for layout in LAYOUTS:
        stored = layout(weight)
        # Scaling does not touch the raw core, and nothing touches the weight.
        factors = factorize(stored, r, options, scaling=0.3, generator=seeded(), dtype=compute)
        assert torch.equal(stored.to(compute), exact)
        assert torch.equal(factors.lora_A, exact[rows])
        assert torch.equal(factors.lora_B, exact[:, columns])
        assert factors.lora_N is not None
        assert torch.equal(factors.lora_N, exact[rows][:, columns])


def test_the_raw_product_is_no_approximation() -> None:
    """facts.md: its relative norm grows as r σ², so that on large weights zero is closer."""
    weight = gaussian(128, 128)
    assert residual(weight, factorize(weight, 32, FactorOptions(), generator=seeded())) > 2
    assert residual(weight * 0.01, factorize(weight * 0.01, 32, FactorOptions(), generator=seeded())) < 1.01


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("method", sorted(FAMILY_NYSTROM))
def test_condition_is_the_cores_in_fp64(method: Method, compute: torch.dtype) -> None:
    weight = gaussian(20, 16)
    factors = factorize(weight, 6, FactorOptions(method=method), generator=seeded(), dtype=compute)
    expected = float(torch.linalg.cond(weight[:6, :6]))
    # Singular values are off by r eps σ_1, which the smallest feels condition times as much.
    assert factors.condition == pytest.approx(expected, rel=10 * 6 * eps(compute) * expected)
    assert factorize(torch.zeros(4, 4), 2, FactorOptions(method=method), generator=seeded()).condition == math.inf


# --- nystrom-pinv -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("rtol", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("r", [1, 2, 7])
def test_nystrom_pinv_is_scipys_formula_in_fp64(r: int, rtol: float, compute: torch.dtype) -> None:
    weight = with_spectrum(30, 20, torch.linspace(1, 2, 20, dtype=torch.float64)).float()
    rows, columns = sample_rows_and_columns(weight, r, "uniform", seeded())
    factors = nystrom_pinv(weight, rows, columns, compute, rtol)
    exact = weight.double()
    core = exact[rows][:, columns]
    values = torch.linalg.svdvals(core)
    assert values[0] / values[-1] < 100
    assert ((values / values[0] - rtol).abs() > 1e-3).all()  # no singular value on the edge
    expected = torch.from_numpy(scipy.linalg.pinv(core.numpy(), rtol=rtol))
    assert factors.lora_N is not None
    # One rounding to `compute`, and an fp64 inverse: r eps condition ‖pinv‖.
    bound = eps(compute) * expected.abs() + 10 * r * eps(torch.float64) * 100 * expected.norm()
    assert ((factors.lora_N.double() - expected).abs() <= bound).all()
    # Cut means cut: the rank of lora_N is the number of singular values above the cutoff.
    kept = int((values > rtol * values[0]).sum())
    left = torch.linalg.svdvals(factors.lora_N.double())
    assert int((left > 10 * r * eps(compute) * left[0]).sum()) == kept
    if rtol == 0.5 and r == 7:
        assert kept < r


def test_pinv_of_an_ill_conditioned_core_is_worse_than_zero_and_the_optimal_core_never_is() -> None:
    """facts.md: on a real model the exact pseudo-inverse is off by 9 to 48 times ‖weight‖."""
    weight, r = realistic(192, 160).to(torch.bfloat16), 48

    def off(method: Method, rtol: float = 0.1) -> float:
        return residual(weight, factorize(weight, r, FactorOptions(method=method, pinv_rtol=rtol), generator=seeded()))

    assert off("nystrom-pinv", 0.0) > 2
    assert off("nystrom-pinv", 0.1) < off("nystrom-pinv", 0.0) / 2
    assert off("nystrom-optimal") < 1
    assert off("nystrom-optimal") < off("nystrom-pinv", 0.1)


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
def test_the_nystrom_formula_recovers_a_weight_of_rank_r(compute: torch.dtype) -> None:
    weight = gaussian(40, 5) @ gaussian(5, 30, seed=1)
    for method in ("nystrom-pinv", "nystrom-optimal"):
        factors = factorize(weight, 5, FactorOptions(method=method, pinv_rtol=0.0), generator=seeded(), dtype=compute)
        assert residual(weight, factors) <= 10 * 5 * eps(compute) * magnitude(factors) / weight.norm()
    # The simplified core does not, nor does a pseudo-inverse with too little of the core left.
    for options in (FactorOptions(), FactorOptions(method="nystrom-pinv", pinv_rtol=0.9)):
        assert residual(weight, factorize(weight, 5, options, generator=seeded(), dtype=compute)) > 0.1


# --- nystrom-optimal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(30, 20, 7), (20, 30, 7), (24, 24, 1), (9, 33, 9)], ids=ids)
def test_nystrom_optimal_is_the_projection_in_fp64(
    shape: tuple[int, int, int], sampling: Sampling, dtype: torch.dtype, compute: torch.dtype
) -> None:
    out_features, in_features, r = shape
    weight = realistic(out_features, in_features).to(dtype)
    rows, columns = sample_rows_and_columns(weight, r, sampling, seeded())
    factors = nystrom_optimal(weight, rows, columns, compute)
    exact = weight.to(compute).double()
    col_block, row_block = exact[:, columns], exact[rows]
    expected = col_block @ torch.linalg.pinv(col_block) @ exact @ torch.linalg.pinv(row_block) @ row_block
    # QR spans are off by eps times the block's condition number, and so is either triangle's inverse.
    condition = float(torch.linalg.cond(col_block) * torch.linalg.cond(row_block))
    assert condition < 2e4
    bound = max(shape) * eps(compute) * condition * float(exact.norm())
    assert float((product(factors) - expected).norm()) <= bound


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_other_core_is_better_than_the_optimal_one(sampling: Sampling) -> None:
    weight = realistic(40, 28)
    rows, columns = sample_rows_and_columns(weight, 6, sampling, seeded())
    factors = nystrom_optimal(weight, rows, columns, torch.float64)
    assert factors.lora_N is not None
    rest = (weight - product(factors)).norm().square()
    # The normal equations, to rounding ...
    slope = factors.lora_B.T @ (weight - product(factors)) @ factors.lora_A.T
    scale = factors.lora_B.norm() * weight.norm() * factors.lora_A.norm()
    assert slope.norm() <= 40 * eps(torch.float64) * 1e3 * scale
    for seed in range(20):
        step = 10.0 ** (seed % 5 - 3) * gaussian(6, 6, seed=seed) * factors.lora_N.norm()
        moved = Factors(factors.lora_A, factors.lora_B, factors.lora_N + step)
        # ... and so Pythagoras: every step away adds its own square.
        added = (factors.lora_B @ step @ factors.lora_A).norm().square()
        found = (weight - product(moved)).norm().square()
        assert found > rest
        assert float(found) == pytest.approx(float(rest + added), rel=1e-9)
    for other in (
        nystrom(weight, rows, columns, torch.float64),
        nystrom_pinv(weight, rows, columns, torch.float64, 0.1),
    ):
        assert residual(weight, other) > residual(weight, factors)


@pytest.mark.parametrize(("tilt", "captured"), [(1e-1, True), (3e-3, True), (1e-4, False), (1e-6, False)])
@pytest.mark.parametrize("r", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_directions_that_samples_barely_hold_are_dropped_before_they_cancel(
    seed: int, r: int, tilt: float, captured: bool
) -> None:
    """Nearly parallel rows and columns, `tilt` apart, in the very directions that hold most of the weight."""

    def pair(size: int, seed: int) -> tuple[Tensor, Tensor]:
        first, second = torch.linalg.qr(gaussian(size - r, 2, seed=seed)).Q.T
        return tuple(torch.cat([torch.zeros(r, dtype=torch.float64), part]) for part in (first, second))

    (common_out, heavy_out), (common_in, heavy_in) = pair(16, 2 * seed), pair(14, 2 * seed + 1)
    ones = torch.ones(r, dtype=torch.float64)
    apart = torch.tensor([1.0, -1.0] * (r // 2), dtype=torch.float64)
    weight = torch.outer(heavy_out, heavy_in)
    weight[:, :r] += 0.01 * (torch.outer(common_out, ones) + tilt * torch.outer(heavy_out, apart))
    weight[:r] += 0.01 * (torch.outer(ones, common_in) + tilt * torch.outer(apart, heavy_in))
    weight = weight.float()
    factors = factorize(weight, r, FactorOptions(method="nystrom-optimal"), generator=seeded())
    # The core grows as tilt^-2 and so does what its rounding costs: eps tilt^-2 of the weight, 1 % at 3e-3.
    # Below sqrt(eps) that would be more than the weight itself.
    found = residual(weight, factors)
    assert found <= 1 + 10 * 16 * eps(torch.float32)
    assert (found < 0.06) == captured
    assert (found > 0.9) == (not captured)


@st.composite
def awkward_weights(draw: st.DrawFn) -> Tensor:
    """Any shape, rank from 0 up, graded spectra, repeated or zero rows and columns, any scale."""
    out_features, in_features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(0, min(out_features, in_features)))
    seed = draw(st.integers(0, 2**20))
    grading = 10.0 ** -(draw(st.floats(0, 8)) * torch.arange(rank, dtype=torch.float64) / max(1, rank - 1))
    weight = gaussian(out_features, rank, seed=seed) * grading @ gaussian(rank, in_features, seed=seed + 1)
    lines = st.lists(st.integers(0, 11), max_size=4)
    for row in draw(lines):
        weight[row % out_features] = draw(st.sampled_from([0.0, 1.0])) * weight[0]
    for column in draw(lines):
        weight[:, column % in_features] = draw(st.sampled_from([0.0, 1.0])) * weight[:, 0]
    return weight * 10.0 ** draw(st.integers(-6, 3))


@pytest.mark.parametrize(
    ("method", "sampling"),
    [*(("nystrom-optimal", sampling) for sampling in SAMPLINGS), *((method, "leading") for method in SVD_METHODS)],
)
@settings(examples)
@given(data=st.data(), weight=awkward_weights(), dtype=st.sampled_from(DTYPES), compute=st.sampled_from(COMPUTE_DTYPES))
def test_projections_are_never_further_off_than_zero(
    method: Method, sampling: Sampling, data: st.DataObject, weight: Tensor, dtype: torch.dtype, compute: torch.dtype
) -> None:
    weight = weight.clamp(-1e4, 1e4).to(dtype)
    r = data.draw(st.integers(1, min(weight.shape)))
    factors = factorize(weight, r, FactorOptions(method=method, sampling=sampling), generator=seeded(), dtype=compute)
    assert all(matrix.isfinite().all() for matrix in matrices(factors))
    exact = weight.double()
    # What the product captures leaves the residual, up to backward errors of a few max(out, in) eps ‖weight‖.
    bound = (1 + 10 * max(weight.shape) * eps(compute)) * float(exact.norm())
    assert float((exact - product(factors)).norm()) <= bound


# --- pissa ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("two_matrix", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_pissa_is_the_exact_svd_in_fp64(
    shape: tuple[int, int, int], two_matrix: bool, dtype: torch.dtype, compute: torch.dtype
) -> None:
    out_features, in_features, r = shape
    weight = realistic(out_features, in_features).to(dtype)
    options = FactorOptions(method="pissa", two_matrix=two_matrix)
    factors = factorize(weight, r, options, generator=seeded(), dtype=compute)
    assert (factors.lora_N is None) == two_matrix
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = U[:, :r] * S[:r] @ Vh[:r]
    bound = 2 * truncation_bound(weight, r, compute)
    assert float((product(factors) - expected).norm()) <= bound
    assert factors.condition == pytest.approx(float(S[0] / S[r - 1]), rel=100 * eps(compute) * float(S[0] / S[r - 1]))


class Tiny(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def stock_peft(weight: Tensor, r: int, alpha: int, init: str | bool) -> tuple[Tensor, Tensor, float, Tensor]:
    """lora_A, lora_B, the scaling and the base weight that PEFT's own initialization leaves."""
    config = LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=init, target_modules=["proj"])
    layer = get_peft_model(Tiny(weight), config).base_model.model.proj
    lora_A, lora_B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return lora_A, lora_B, layer.scaling["default"], layer.base_layer.weight.detach()


@pytest.mark.parametrize("alpha", [4, 16, 1])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=ids)
def test_two_matrix_pissa_is_stock_pefts(shape: tuple[int, int], alpha: int) -> None:
    weight, r = realistic(*shape).float(), 4
    lora_A, lora_B, scaling, base = stock_peft(weight, r, alpha, "pissa")
    assert scaling == alpha / r
    factors = factorize(weight, r, FactorOptions(method="pissa", two_matrix=True), scaling=scaling, generator=seeded())
    ours, theirs = scaling * product(factors), scaling * (lora_B.double() @ lora_A.double())
    # Both are fp32 SVDs of one matrix, so each is within the bound of the exact one.
    bound = 2 * truncation_bound(weight, r, torch.float32)
    assert float((ours - theirs).norm()) <= 2 * bound
    assert float((weight.double() - ours - base.double()).norm()) <= 3 * bound
    # The scale is spread alike, too, and norms know no signs.
    for one, other in ((factors.lora_A, lora_A), (factors.lora_B.T, lora_B.T)):
        assert torch.allclose(one.norm(dim=1), other.norm(dim=1), rtol=100 * eps(torch.float32))


# --- sketch, pissa-fast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(192, 160), (160, 192), (320, 96)], ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=ids)
@pytest.mark.parametrize("method", ["sketch", "pissa-fast"])
@pytest.mark.parametrize("r", [1, 8, 32])
def test_sketches_are_within_three_percent_of_the_exact_svd(
    method: Method, dtype: torch.dtype, shape: tuple[int, int], r: int
) -> None:
    weight = realistic(*shape).to(dtype)
    best = best_residual(weight, r)
    rounding = max(shape) * eps(torch.float32)
    for seed in range(2):
        found = residual(weight, factorize(weight, r, FactorOptions(method=method), generator=seeded(seed)))
        assert best - rounding <= found <= 1.03 * best


def test_a_sketch_without_power_steps_or_oversampling_is_outside_three_percent() -> None:
    weight, r = realistic(192, 160), 32
    options = FactorOptions(method="sketch", power_steps=0, oversampling=0)
    assert residual(weight, factorize(weight, r, options, generator=seeded())) > 1.03 * best_residual(weight, r)


@pytest.mark.parametrize("seed", range(3))
def test_more_power_steps_are_never_much_worse(seed: int) -> None:
    weight, r = realistic(160, 128, seed=seed), 16
    best = best_residual(weight, r)
    excess = [
        residual(
            weight,
            factorize(
                weight,
                r,
                FactorOptions(method="sketch", power_steps=steps),
                generator=seeded(seed),
                dtype=torch.float64,
            ),
        )
        - best
        for steps in range(7)
    ]
    # The expected excess falls by (σ_{l+1}/σ_r)² or more a step; 1 % of the residual is what cutting to r may cost.
    assert all(later <= sooner + 0.01 * best for sooner, later in pairwise(excess))
    assert excess[6] < excess[0] / 10


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("rank", [0, 1, 5, 8])
def test_a_weight_of_rank_r_or_less_is_recovered_to_rounding(rank: int, method: Method, compute: torch.dtype) -> None:
    weight = gaussian(60, rank) @ gaussian(rank, 40, seed=1)
    factors = factorize(weight, 8, FactorOptions(method=method), generator=seeded(), dtype=compute)
    # Backward errors of some QRs of max(out, in) rows.
    assert float((weight - product(factors)).norm()) <= 10 * 60 * eps(compute) * float(weight.norm())


@settings(examples)
@given(data=st.data(), weight=awkward_weights(), oversampling=st.integers(0, 8), power_steps=st.integers(0, 3))
def test_a_sketch_is_never_better_than_the_exact_svd(
    data: st.DataObject, weight: Tensor, oversampling: int, power_steps: int
) -> None:
    r = data.draw(st.integers(1, min(weight.shape)))
    U, S, Vh = randomized_svd(
        weight,
        r,
        oversampling=oversampling,
        power_steps=power_steps,
        generator=seeded(),
        dtype=torch.float64,
    )
    values = torch.linalg.svdvals(weight)
    slack = 10 * max(weight.shape) * eps(torch.float64) * float(values[0])
    assert (S - values[:r] <= slack).all()  # Cauchy: a compression has no larger singular values
    assert float((weight - U * S @ Vh).norm()) >= float(values[r:].norm()) - slack
    assert (S[:-1] >= S[1:]).all()


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
def test_the_leading_singular_values_of_a_sketch_are_the_exact_ones(compute: torch.dtype) -> None:
    weight = realistic(160, 128)
    exact = truncated_svd(weight, 8, torch.float64)
    sketched = randomized_svd(weight, 8, oversampling=16, power_steps=8, generator=seeded(), dtype=compute)
    # After q steps the error is (σ_25/σ_k)^(4q+2), below 1e-4 at k = 4.
    assert torch.allclose(sketched.S[:4].double(), exact.S[:4], rtol=1e-4)
    assert not torch.allclose(
        randomized_svd(weight, 8, oversampling=0, power_steps=0, generator=seeded(), dtype=compute).S.double(),
        exact.S,
        rtol=1e-2,
    )


# --- scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if method not in STARTS_AT_ZERO])
@settings(examples)
@given(
    data=st.data(),
    weight=awkward_weights(),
    compute=st.sampled_from(COMPUTE_DTYPES),
    scaling=st.sampled_from([0.25, 1.0, 3.0]),
)
def test_scale_splits_share_one_product(
    method: Method, data: st.DataObject, weight: Tensor, compute: torch.dtype, scaling: float
) -> None:
    r = data.draw(st.integers(1, min(weight.shape)))
    keep, balanced, core = (
        factorize(
            weight,
            r,
            FactorOptions(method=method, scale_split=split),
            scaling=scaling,
            generator=seeded(),
            dtype=compute,
        )
        for split in SCALE_SPLITS
    )
    # QRs of the sides and an SVD of what is between: backward errors of max(out, in) eps ‖B‖ ‖N‖ ‖A‖.
    bound = 10 * max(weight.shape) * eps(compute) * math.prod(float(matrix.norm()) for matrix in matrices(keep))
    for other in (balanced, core):
        assert float((product(other) - product(keep)).norm()) <= bound

    identity = torch.eye(r, dtype=torch.float64)
    orthonormal = 10 * max(weight.shape) * eps(compute)
    U, Vh = core.lora_B.double(), core.lora_A.double()
    assert float((U.T @ U - identity).norm()) <= orthonormal
    assert float((Vh @ Vh.T - identity).norm()) <= orthonormal

    assert core.lora_N is not None
    assert balanced.lora_N is not None
    S = core.lora_N.diagonal().double()
    assert torch.equal(core.lora_N, torch.diag(core.lora_N.diagonal()))
    assert (S >= 0).all()
    assert torch.equal(balanced.lora_N, identity.to(compute))
    for norms in (balanced.lora_B.double().norm(dim=0), balanced.lora_A.double().norm(dim=1)):
        assert torch.allclose(norms, S.sqrt(), rtol=orthonormal, atol=0)


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("split", SCALE_SPLITS)
@pytest.mark.parametrize("method", sorted(APPROXIMATIONS))
def test_scaling_times_product_does_not_depend_on_alpha(
    method: Method, split: ScaleSplit, compute: torch.dtype
) -> None:
    weight, options = realistic(30, 24), FactorOptions(method=method, scale_split=split)
    one, *others = (
        (scaling, factorize(weight, 6, options, scaling=scaling, generator=seeded(), dtype=compute))
        for scaling in (1.0, 1 / 3, 2.0, 16.0)
    )
    for scaling, factors in others:
        # A division and a square root more: a few eps in every entry.
        bound = 8 * eps(compute) * magnitude(one[1])
        assert float((scaling * product(factors) - product(one[1])).norm()) <= bound


@pytest.mark.parametrize("split", SCALE_SPLITS)
def test_the_raw_core_does_not_depend_on_alpha(split: ScaleSplit) -> None:
    weight = realistic(30, 24)
    one, other = (
        factorize(weight, 6, FactorOptions(scale_split=split), scaling=scaling, generator=seeded())
        for scaling in (1.0, 16.0)
    )
    assert equal(one, other)


@pytest.mark.parametrize("alpha", [1, 4, 16])
@pytest.mark.parametrize("method", ["pissa", "pissa-fast"])
def test_two_matrices_are_the_balanced_three_folded(method: Method, alpha: int) -> None:
    weight = realistic(30, 24)
    three, two = (
        factorize(weight, 4, FactorOptions(method=method, two_matrix=fold), scaling=alpha / 4, generator=seeded())
        for fold in (False, True)
    )
    assert two.lora_N is None
    assert torch.equal(two.lora_A, three.lora_A)
    assert torch.equal(two.lora_B, three.lora_B)
    assert two.condition == three.condition


# --- slora, lora ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("method", sorted(STARTS_AT_ZERO))
def test_zero_starts_are_kaiming_uniform(method: Method, compute: torch.dtype) -> None:
    out_features, in_features, r = 30, 200, 25
    factors = factorize(
        torch.zeros(out_features, in_features, dtype=torch.bfloat16),
        r,
        FactorOptions(method=method),
        generator=seeded(),
        dtype=compute,
    )
    assert torch.equal(factors.lora_B, torch.zeros(out_features, r, dtype=compute))
    assert factors.condition is None
    assert (factors.lora_N is None) == (method == "lora")
    drawn = [factors.lora_A] if factors.lora_N is None else [factors.lora_A, factors.lora_N]
    for matrix in drawn:
        count, bound = matrix.numel(), 1 / math.sqrt(matrix.shape[1])
        largest = float(matrix.abs().max())
        assert largest <= bound * (1 + eps(compute))
        # All of n uniform draws fall short by a share t with probability (1 - t)^n < exp(-t n): 1e-6 here.
        assert largest >= bound * (1 - 14 / count)
        # Mean 0 and variance bound²/3, within five standard errors (the square's variance is 4 bound⁴/45).
        assert abs(float(matrix.double().mean())) <= 5 * bound / math.sqrt(3 * count)
        assert float(matrix.double().square().mean()) == pytest.approx(
            bound**2 / 3, abs=5 * bound**2 * math.sqrt(4 / 45 / count)
        )


def test_lora_has_the_distribution_of_stock_pefts() -> None:
    weight, r = gaussian(48, 400).float(), 32
    torch.manual_seed(0)
    lora_A, lora_B, _, base = stock_peft(weight, r, r, True)
    zero = initial_zero(48, 400, r, three_matrix=False, generator=seeded(), dtype=torch.float32)
    assert torch.equal(zero.lora_B, lora_B)
    assert torch.equal(base, weight)
    # Kolmogorov-Smirnov: two samples of n exceed c sqrt(2/n) with probability 2 exp(-2 c²), 1e-6 for c = 2.7.
    count = lora_A.numel()
    distance = scipy.stats.ks_2samp(lora_A.flatten().numpy(), zero.lora_A.flatten().numpy()).statistic
    assert distance <= 2.7 * math.sqrt(2 / count)


# --- products of factors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("with_core", [False, True])
@pytest.mark.parametrize("shape", [(30, 20, 4), (20, 30, 4), (3, 30, 8), (30, 3, 8), (3, 2, 8), (1, 1, 1)], ids=ids)
def test_product_svd_is_the_dense_svd_in_fp64(
    shape: tuple[int, int, int], with_core: bool, compute: torch.dtype
) -> None:
    out_features, in_features, k = shape
    left, right = gaussian(out_features, k).to(compute), gaussian(k, in_features, seed=1).to(compute)
    core = gaussian(k, k, seed=2).to(compute) if with_core else None
    U, S, Vh = (matrix.double() for matrix in product_svd(left, core, right))
    count = min(shape)
    assert (U.shape, S.shape, Vh.shape) == ((out_features, count), (count,), (count, in_features))
    dense = left.double() @ (torch.eye(k).double() if core is None else core.double()) @ right.double()
    # Weyl: singular values move by no more than the backward error, max(sizes) eps ‖left‖ ‖core‖ ‖right‖.
    bound = max(shape) * eps(compute) * float(left.norm() * (1 if core is None else core.norm()) * right.norm())
    assert float((S - torch.linalg.svdvals(dense)[:count]).abs().max()) <= bound
    assert float((U * S @ Vh - dense).norm()) <= bound
    for gram in (U.T @ U, Vh @ Vh.T):
        assert float((gram - torch.eye(count).double()).norm()) <= 10 * max(shape) * eps(compute)
    if core is not None:
        assert torch.equal(low_rank_svd(Factors(right, left, core)).S.double(), S)


@pytest.mark.parametrize("split", SCALE_SPLITS)
def test_split_scale_carries_condition_and_product(split: ScaleSplit) -> None:
    svd = truncated_svd(realistic(20, 30), 5, torch.float64)
    factors = split_scale(svd, split, condition=7.0)
    assert factors.condition == 7.0
    expected = svd.U * svd.S @ svd.Vh
    assert float((product(factors) - expected).norm()) <= 10 * eps(torch.float64) * magnitude(factors)


@pytest.mark.parametrize("compute", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 25, 6), (25, 40, 6), (300, 200, 16)], ids=ids)
def test_delta_norm_is_the_dense_norm_in_fp64(shape: tuple[int, int, int], compute: torch.dtype) -> None:
    out_features, in_features, r = shape
    left, right = gaussian(out_features, r).to(compute), gaussian(r, in_features, seed=1).to(compute)
    dense = float((left.double() @ right.double()).norm())
    # Gram matrices are sums of out and of in terms, and the squared norm is bilinear in them.
    bound = (out_features + in_features) * eps(compute) * float(left.double().norm() * right.double().norm()) ** 2
    assert abs(delta_norm(left, right) ** 2 - dense**2) <= bound
    assert delta_norm(0 * left, right) == 0


def test_delta_norm_of_cancelling_factors_needs_fp64() -> None:
    """Half the digits are lost to squaring: what is below sqrt(eps) ‖left‖ ‖right‖ cannot be seen."""
    column, row = gaussian(50, 1), gaussian(1, 40, seed=1)
    left, right = torch.cat([column, column], 1), torch.cat([row, row * (2**-20 - 1)])
    dense = float((left @ right).norm())
    assert delta_norm(left, right) == pytest.approx(dense, rel=1e-3)
    assert delta_norm(left.float(), right.float()) != pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=ids)
@pytest.mark.parametrize("stored", DTYPES, ids=ids)
@pytest.mark.parametrize("two_matrix", [False, True])
def test_sides_are_the_dense_product_in_fp64(stored: torch.dtype, dtype: torch.dtype, two_matrix: bool) -> None:
    lora_A, lora_N, lora_B = gaussian(4, 20), gaussian(4, 4, seed=1), gaussian(30, 4, seed=2)
    factors = Factors(lora_A, lora_B, None if two_matrix else lora_N, 3.0).to(stored)
    assert all(matrix.dtype == stored for matrix in matrices(factors))
    assert factors.condition == 3.0
    left, right = factors.sides(0.7, dtype)
    assert left.dtype == right.dtype == dtype
    assert left.shape == (30, 4)
    assert torch.equal(right, factors.lora_A.to(dtype))
    expected = 0.7 * factors.lora_B.double()
    if factors.lora_N is not None:
        expected = expected @ factors.lora_N.double()
    # A sum of r terms and a scaling, from factors as they are stored (fp64 ones are rounded to fp32 first).
    bound = (4 + 4) * eps(dtype) * magnitude(factors)
    assert float((left.double() @ right.double() - expected @ factors.lora_A.double()).norm()) <= bound
    # Rounding the factors is what the residual has to make up for: to bfloat16, it is no rounding error of fp32.
    if stored is torch.bfloat16:
        unrounded = 0.7 * lora_B @ (torch.eye(4).double() if two_matrix else lora_N) @ lora_A
        assert float((left.double() @ right.double() - unrounded).norm()) > 100 * bound
