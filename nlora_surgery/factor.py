"""The mathematics: a weight in, the factors of a low-rank adapter out. No files, no configuration.

A stored linear weight is `weight (out, in)`; a three-matrix adapter adds to it

    delta = scaling * lora_B @ lora_N @ lora_A        lora_A (r, in)   lora_N (r, r)   lora_B (out, r)

and a two-matrix one lacks `lora_N`. The paper (NLoRA, arXiv 2502.14482) writes row vectors: its W is
`weight.T`, and its A, N and B are `lora_A.T`, `lora_N.T` and `lora_B.T`, so that its product A N B is the
transpose of ours.

Nothing here needs the weight in floating point 32 as a whole, except the exact SVD: products with it run
over row tiles that stay in the processor's cache, so a bfloat16 view of a mapped file is a fine argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from nlora_surgery.options import APPROXIMATIONS, FAMILY_NYSTROM, STARTS_AT_ZERO, FactorOptions, Sampling, ScaleSplit

__all__ = [
    "SVD",
    "Factors",
    "adam_step_norm",
    "adding_product",
    "change_sides",
    "coarse_times",
    "delta_norm",
    "factorize",
    "initial_zero",
    "is_finite",
    "low_rank_svd",
    "module_generator",
    "moved_sides",
    "nystrom",
    "nystrom_optimal",
    "nystrom_pinv",
    "product_svd",
    "randomized_svd",
    "row_tiles",
    "sample_rows_and_columns",
    "split_scale",
    "times",
    "truncated_svd",
]

# 4 MB of fp32: the tile, its factors and its result share the second- and third-level caches of one core.
TILE_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrices of one module's adapter, or for fused experts stacks of them, (experts, …) each.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        lora_N: (r, r), or None for a two-matrix adapter.
        condition: of the core that the method had to work with; None where there is none.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_N: Tensor | None = None
    condition: float | None = None

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> Factors:
        """Factors from what `matrices` gives."""
        return cls(matrices[0], matrices[-1], matrices[1] if len(matrices) == 3 else None)

    @classmethod
    def stack(cls, experts: Sequence[Factors]) -> Factors:
        """One for each expert, as stacks; the condition is the worst."""
        cores = [each.lora_N for each in experts if each.lora_N is not None]
        conditions = [each.condition for each in experts if each.condition is not None]
        return cls(
            torch.stack([each.lora_A for each in experts]),
            torch.stack([each.lora_B for each in experts]),
            torch.stack(cores) if cores else None,
            max(conditions) if conditions else None,
        )

    def expert(self, index: int) -> Factors:
        """Those of one expert, out of stacks."""
        lora_N = None if self.lora_N is None else self.lora_N[index]
        return Factors(self.lora_A[index], self.lora_B[index], lora_N, self.condition)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors rounded to `dtype`."""
        lora_N = None if self.lora_N is None else self.lora_N.to(dtype)
        return Factors(self.lora_A.to(dtype), self.lora_B.to(dtype), lora_N, self.condition)

    def padded(self, r: int) -> Factors:
        """The same product at a higher rank, with zeros in what is added; these themselves at their own rank."""
        missing = r - self.lora_A.shape[-2]
        if missing <= 0:
            return self
        pad = torch.nn.functional.pad
        lora_N = None if self.lora_N is None else pad(self.lora_N, (0, missing, 0, missing))
        return Factors(pad(self.lora_A, (0, 0, 0, missing)), pad(self.lora_B, (0, missing)), lora_N, self.condition)

    def matrices(self) -> list[Tensor]:
        """`lora_A`, `lora_N` if there is one, `lora_B`: in the order in which an input passes through them."""
        return [matrix for matrix in (self.lora_A, self.lora_N, self.lora_B) if matrix is not None]

    def sides(self, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`left (out, r)` and `right (r, in)` with `left @ right = scaling * lora_B @ lora_N @ lora_A`.

        Args:
            scaling: alpha / r.
            dtype: to compute in, and of the results.
        """
        left = self.lora_B.to(dtype)
        if self.lora_N is not None:
            left = left @ self.lora_N.to(dtype)
        return left * scaling, self.lora_A.to(dtype)


def change_sides(
    factors: Factors, initial: Factors | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a weight, as `left (out, k) @ right (k, in)`.

    Args:
        factors: as they are now; k = r.
        initial: the frozen start of a virtual residual, which is subtracted: k = 2 r, and exactly zero where nothing
            moved.
        scaling: alpha / r.
        dtype: to compute in, and of the results.
    """
    left, right = factors.sides(scaling, dtype)
    if initial is None:
        return left, right
    if all(map(torch.equal, factors.matrices(), initial.matrices())):
        return torch.zeros_like(left), right
    initial_left, initial_right = initial.sides(scaling, dtype)
    return torch.cat([left, -initial_left], -1), torch.cat([right, initial_right], -2)


def moved_sides(now: Factors, start: Factors, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far a product is from its start, as `left (out, 2 r) @ right (2 r, in)`.

    The difference of the products, written with the differences of the factors, so that a small step is not what is
    left of two large products: with P = lora_B lora_N, `P A - P' A' = (P - P') A + P' (A - A')`, and P - P' likewise.

    Args:
        now: the factors, or stacks of them.
        start: of the same shapes.
        scaling: alpha / r.
        dtype: to compute in, and of the results.
    """
    lora_A, lora_B = now.lora_A.to(dtype), now.lora_B.to(dtype)
    start_A, start_B = start.lora_A.to(dtype), start.lora_B.to(dtype)
    moved_B, start_product = lora_B - start_B, start_B
    if now.lora_N is not None and start.lora_N is not None:
        lora_N, start_N = now.lora_N.to(dtype), start.lora_N.to(dtype)
        moved_B, start_product = moved_B @ lora_N + start_B @ (lora_N - start_N), start_B @ start_N
    return torch.cat([moved_B, start_product], -1) * scaling, torch.cat([lora_A, lora_A - start_A], -2)


def adding_product(left: Tensor, right: Tensor, sign: int = 1) -> Callable[[slice, Tensor], None]:
    """A function that adds `sign * left @ right` to rows of a matrix, in place.

    Args:
        left: (out, k), or a stack (experts, out, k); then the rows of all experts count as one another's continuation.
        right: (k, in), or (experts, k, in).
        sign: 1 or -1.

    Returns:
        Takes the rows' range and the rows.
    """
    if left.ndim == 2:
        left, right = left[None], right[None]
    height = left.shape[1]

    def add(rows: slice, tile: Tensor) -> None:
        start = rows.start
        while start < rows.stop:
            expert, first = divmod(start, height)
            count = min(height - first, rows.stop - start)
            tile[start - rows.start :][:count].addmm_(left[expert, first : first + count], right[expert], alpha=sign)
            start += count

    return add


def module_generator(seed: int, module: str) -> torch.Generator:
    """One stream of random numbers per module, so that neither order nor threads change what it draws."""
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # aminmax passes NaN on, makes no temporary, and is many times faster than isfinite().all().
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def row_tiles(shape: tuple[int, ...] | torch.Size, itemsize: int, tile_bytes: int = TILE_BYTES) -> Iterator[slice]:
    """Consecutive row ranges of a matrix, each of about `tile_bytes` at `itemsize` bytes per element."""
    out_features, in_features = shape
    step = max(1, tile_bytes // max(1, itemsize * in_features))
    for start in range(0, out_features, step):
        yield slice(start, min(out_features, start + step))


def times(weight: Tensor, right: Tensor) -> Tensor:
    """`weight @ right` in the dtype and on the device of `right`, converting `weight` tile by tile.

    Args:
        weight: (out, in), any floating dtype; its transpose may be what lies in memory.
        right: (in, k).

    Returns:
        (out, k).
    """
    out_features, in_features = weight.shape
    by_rows = weight.stride(-1) == 1 or in_features == 1
    stored = weight if by_rows else weight.T
    # One buffer for all tiles: fresh memory for each would cost more in page faults than the arithmetic.
    tiles = list(row_tiles(stored.shape, right.dtype.itemsize))
    height = max((tile.stop - tile.start for tile in tiles), default=0)
    buffer = torch.empty(height, stored.shape[1], dtype=right.dtype, device=right.device)
    if by_rows:
        result = torch.empty(out_features, right.shape[1], dtype=right.dtype, device=right.device)
    else:
        result = torch.zeros(out_features, right.shape[1], dtype=right.dtype, device=right.device)
    for tile in tiles:
        rows = buffer[: tile.stop - tile.start].copy_(stored[tile])
        if by_rows:
            torch.mm(rows, right, out=result[tile])
        else:
            result.addmm_(rows.T, right[tile])
    return result


def coarse_times(weight: Tensor, right: Tensor) -> Tensor:
    """`weight @ right` to about three digits, for a bfloat16 weight on hardware that multiplies it as it is.

    The weight is exact in bfloat16; `right` and the product are rounded to it, sums are taken in fp32. That halves
    the time of a power step, whose result is a direction that the next step corrects. Elsewhere it is `times`.

    Args:
        weight: (out, in).
        right: (in, k).

    Returns:
        (out, k), in the dtype of `right`.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch tells nowhere else
    native = weight.device.type == "cuda" or (supported is not None and bool(supported()))
    if weight.dtype != torch.bfloat16 or not native:
        return times(weight, right)
    return (weight @ right.to(torch.bfloat16)).to(right.dtype)


def delta_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of `left (out, r) @ right (r, in)`, or of all of a stack, from the two Gram matrices.

    These are taken in the factors' dtype: a product much smaller than `sqrt(eps) * ‖left‖ * ‖right‖` is lost.
    """
    left_gram = (left.mT @ left).to("cpu", torch.float64)
    right_gram = (right @ right.mT).to("cpu", torch.float64)
    square = float((left_gram * right_gram).sum())
    return math.sqrt(square) if not square < 0 else 0.0  # below zero by rounding; NaN stays what it is


def adam_step_norm(factors: Factors, scaling: float, *, core_only: bool = False) -> float:
    """How far the first step of Adam moves `scaling * lora_B @ lora_N @ lora_A`, per unit of the learning rate.

    That step moves every trained entry by the learning rate, up or down (Kingma and Ba 2015, algorithm 1 at t = 1), and
    the product, to first order, by the sum of the three products in which one matrix is replaced by those signs. The
    signs are taken for independent and fair here, which makes the expected square of the Frobenius norm

        scaling² (out ‖lora_N lora_A‖² + ‖lora_B‖² ‖lora_A‖² + in ‖lora_B lora_N‖²),

    without the middle term for two matrices. The signs of real gradients are not independent: a yardstick to compare
    starts by, no forecast.

    Args:
        factors: of one module, lora_A (r, in), lora_N (r, r) or None, lora_B (out, r).
        scaling: alpha / r.
        core_only: lora_N alone is trained (IntTune).
    """
    lora_A, lora_N, lora_B = factors.lora_A.float(), factors.lora_N, factors.lora_B.float()
    core = 0.0 if lora_N is None else scaling * float(lora_B.norm()) * float(lora_A.norm())
    if core_only:
        return core
    left, _ = factors.sides(scaling, lora_A.dtype)
    right = lora_A if lora_N is None else lora_N.float() @ lora_A
    out_features, in_features = len(lora_B), lora_A.shape[1]
    sides = scaling * math.sqrt(out_features) * float(right.norm()), math.sqrt(in_features) * float(left.norm())
    return math.hypot(core, *sides)


# --- which rows and columns ------------------------------------------------------------------------------


def sample_rows_and_columns(
    weight: Tensor, r: int, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The r rows I and r columns J that a Nyström method works from.

    Args:
        weight: (out, in).
        r: how many of each, at most min(out, in).
        sampling: see `options.FactorOptions`.
        generator: a CPU generator, so that the choice does not depend on the device.

    Returns:
        Two sorted int64 CPU tensors of r indices.
    """
    out_features, in_features = weight.shape
    if sampling == "leading":
        return torch.arange(r), torch.arange(r)
    if sampling == "uniform":
        rows = torch.randperm(out_features, generator=generator)[:r]
        columns = torch.randperm(in_features, generator=generator)[:r]
    else:
        row_mass = torch.zeros(out_features, dtype=torch.float64)
        column_mass = torch.zeros(in_features, dtype=torch.float64)
        for tile in row_tiles(weight.shape, 8):
            squares = weight[tile].to("cpu", torch.float64).square()
            row_mass[tile] = squares.sum(1)
            column_mass += squares.sum(0)
        rows = _draw(row_mass, r, generator)
        columns = _draw(column_mass, r, generator)
    return rows.sort().values, columns.sort().values


def _draw(mass: Tensor, r: int, generator: torch.Generator) -> Tensor:
    # The least of floors lets rows of zeros be drawn, and drawn last, where there are fewer than r others.
    floor = torch.finfo(mass.dtype).tiny
    return torch.multinomial(mass + floor, r, replacement=False, generator=generator)


# --- the methods ------------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    col_block: Tensor  # (out, r)  weight[:, J]
    row_block: Tensor  # (r, in)   weight[I, :]
    core: Tensor  # (r, r)   weight[I][:, J]


def _samples(weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> _Samples:
    rows, columns = rows.to(weight.device), columns.to(weight.device)
    r = len(rows)
    leading = torch.arange(r, device=weight.device)
    row_block = weight[:r] if torch.equal(rows, leading) else weight[rows]
    # A slice reads one page per row of a mapped file, just as an index does, but without an index's overhead.
    col_block = weight[:, :r] if torch.equal(columns, leading) else weight[:, columns]
    # Copies, or who trains the factors in place would train the weight.
    return _Samples(col_block.to(dtype, copy=True), row_block.to(dtype, copy=True), row_block[:, columns].to(dtype))


def nystrom(weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Factors:
    """The paper's start: sampled columns, the block where they cross the sampled rows, those rows.

    With the paper's simplification, N = A_W in place of its pseudo-inverse. The product is no approximation
    of `weight`: its relative norm grows as r times the weights' variance.
    """
    col_block, row_block, core = _samples(weight, rows, columns, dtype)
    return Factors(row_block, col_block, core.contiguous(), _condition(core))


def nystrom_pinv(weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, rtol: float) -> Factors:
    """The textbook formula: `lora_N` is the pseudo-inverse of the core, before the paper simplifies it away.

    Args:
        rtol: singular values of the core below this share of the largest count as zero.
    """
    col_block, row_block, core = _samples(weight, rows, columns, dtype)
    return Factors(row_block, col_block, _pinv(core, rtol), _condition(core))


def nystrom_optimal(weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Factors:
    """The core that is best for these rows and columns: `pinv(col_block) @ weight @ pinv(row_block)`.

    Both pseudo-inverses come from a QR decomposition (Stewart 1999, for CUR), so the product is the
    projection of `weight` onto the span of the columns and the span of the rows: never further from
    `weight` than zero is.
    """
    col_block, row_block, core = _samples(weight, rows, columns, dtype)
    q_left, r_left = torch.linalg.qr(col_block)
    q_right, r_right = torch.linalg.qr(row_block.T)
    projected = q_left.T @ times(weight, q_right)
    # Directions that the sample hardly holds would come out as large factors that cancel, and cancelling
    # factors lose what rounding them to fp32 takes; dropping them keeps the product a projection.
    rtol = torch.finfo(torch.float32).eps ** 0.5
    return Factors(row_block, col_block, _pinv(r_left, rtol) @ projected @ _pinv(r_right, rtol).T, _condition(core))


class SVD(NamedTuple):
    """`U (out, r) @ diag(S) @ Vh (r, in)`, S descending."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def truncated_svd(weight: Tensor, r: int, dtype: torch.dtype) -> SVD:
    """The exact rank-r SVD, the reference (Eckart and Young 1936; PiSSA, arXiv 2404.02948).

    Args:
        weight: (out, in); converted to `dtype` as a whole.
        r: how many singular triplets.
        dtype: to compute in.
    """
    U, S, Vh = torch.linalg.svd(weight.to(dtype), full_matrices=False)
    return SVD(U[:, :r], S[:r], Vh[:r])


def randomized_svd(
    weight: Tensor,
    r: int,
    *,
    oversampling: int,
    power_steps: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    coarse: Tensor | None = None,
) -> SVD:
    """A nearly best rank-r SVD from Gaussian sketches of both ranges.

    Alternating products with `weight` and its transpose (subspace iteration; Halko, Martinsson and Tropp
    2011, algorithm 4.4) give an orthonormal basis of either range. The weight seen in those two bases is a
    small core, whose SVD is cut to r: generalized Nyström with orthonormal bases (Nakatsukasa, arXiv
    2009.11392). It costs `2 * power_steps + 2` products with the weight.

    Args:
        weight: (out, in).
        r: how many singular triplets.
        oversampling: extra columns of the sketches.
        power_steps: more of them bring a slowly falling spectrum closer to the exact SVD.
        generator: a CPU generator, so that the sketch does not depend on the device.
        dtype: to compute in.
        coarse: the weight rounded to bfloat16, for the steps that a further one corrects (see `coarse_times`); the
            weight itself by default.
    """
    out_features, in_features = weight.shape
    coarse = weight if coarse is None else coarse
    width = min(r + oversampling, out_features, in_features)
    omega = torch.randn(in_features, width, generator=generator, dtype=dtype).to(weight.device)
    # Steps that a further one follows only have to point the right way: they may be coarse, see there.
    left_basis = torch.linalg.qr(coarse_times(coarse, omega) if power_steps else times(weight, omega)).Q
    for step in range(power_steps):
        right_basis = torch.linalg.qr(coarse_times(coarse.T, left_basis)).Q
        last = step == power_steps - 1
        left_basis = torch.linalg.qr(times(weight, right_basis) if last else coarse_times(coarse, right_basis)).Q
    # `left_basis.T @ weight @ right_basis` is the transposed triangle of this last QR: no product to do.
    right_basis, triangle = torch.linalg.qr(times(weight.T, left_basis))
    U, S, Vh = torch.linalg.svd(triangle.T)
    return SVD(left_basis @ U[:, :r], S[:r], Vh[:r] @ right_basis.T)


def product_svd(left: Tensor, core: Tensor | None, right: Tensor) -> SVD:
    """The SVD of `left (out, k) @ core (k, k) @ right (k, in)` by QR of both sides and an SVD of k × k.

    Args:
        left, right: the outer factors.
        core: None for the identity.

    Returns:
        min(out, in, k) singular triplets.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    small = r_left @ r_right.T if core is None else r_left @ core @ r_right.T
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    return SVD(q_left @ U, S, Vh @ q_right.T)


def low_rank_svd(factors: Factors) -> SVD:
    """The SVD of `lora_B @ lora_N @ lora_A`, r triplets, without forming the product."""
    return product_svd(factors.lora_B, factors.lora_N, factors.lora_A)


def split_scale(svd: SVD, split: ScaleSplit, condition: float | None = None) -> Factors:
    """Spread the singular values over three factors.

    It changes nothing at the start and much in training, where Adam moves every entry by about the
    learning rate.

    Args:
        svd: the product.
        split: `balanced` is `U sqrt(S)`, identity, `sqrt(S) Vh`; `core` (and `keep`, since an SVD comes so)
            is `U`, `diag(S)`, `Vh`, the choice of LoRA-XS (arXiv 2405.17604).
        condition: carried over into the result.
    """
    U, S, Vh = svd
    if split == "balanced":
        root = S.sqrt()
        identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
        return Factors(root[:, None] * Vh, U * root, identity, condition)
    return Factors(Vh.clone(), U.clone(), torch.diag(S), condition)  # clones let the whole of an SVD go


def initial_zero(
    out_features: int,
    in_features: int,
    r: int,
    *,
    three_matrix: bool,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Factors:
    """Plain LoRA's start, or SLoRA's: Kaiming uniform `lora_A` (and `lora_N`), zero `lora_B`.

    As PEFT does, with a = sqrt(5): uniform within 1 / sqrt(fan_in).
    """

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns)
        return torch.empty(rows, columns, dtype=dtype).uniform_(-bound, bound, generator=generator)

    lora_A = kaiming(r, in_features)
    lora_N = kaiming(r, r) if three_matrix else None
    return Factors(lora_A, torch.zeros(out_features, r, dtype=dtype), lora_N)


def factorize(
    weight: Tensor,
    r: int,
    options: FactorOptions,
    *,
    scaling: float = 1.0,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """The factors of one weight.

    Args:
        weight: (out, in), finite, any floating dtype, on any device; may be a lazy view.
        r: at least 1 and at most min(out, in).
        options: the method and its parameters.
        scaling: alpha / r. Methods that approximate the weight divide by it, so that
            `scaling * lora_B @ lora_N @ lora_A` is the approximation whatever alpha is.
        generator: a CPU generator; the same seed gives the same samples and sketches whatever the thread count,
            and so the same product up to rounding.
        dtype: to compute in, fp32 or fp64, and of the results.

    Returns:
        The factors, on the weight's device.

    Raises:
        ValueError: r is out of range.
    """
    weight = weight.detach()
    out_features, in_features = weight.shape
    if not 1 <= r <= min(out_features, in_features):
        raise ValueError(f"r = {r} is not within 1 and {min(out_features, in_features)} for {tuple(weight.shape)}")
    method, split = options.method, options.split

    if method in STARTS_AT_ZERO:
        three = method == "slora"
        zero = initial_zero(out_features, in_features, r, three_matrix=three, generator=generator, dtype=dtype)
        return Factors(
            zero.lora_A.to(weight.device),
            zero.lora_B.to(weight.device),
            None if zero.lora_N is None else zero.lora_N.to(weight.device),
        )

    if method in FAMILY_NYSTROM:
        rows, columns = sample_rows_and_columns(weight, r, options.sampling, generator)
        if method == "nystrom":
            factors = nystrom(weight, rows, columns, dtype)
        elif method == "nystrom-pinv":
            factors = nystrom_pinv(weight, rows, columns, dtype, options.pinv_rtol)
        else:
            factors = nystrom_optimal(weight, rows, columns, dtype)
        if split == "keep":
            if method in APPROXIMATIONS:
                assert factors.lora_N is not None
                return Factors(factors.lora_A, factors.lora_B, factors.lora_N / scaling, factors.condition)
            return factors
        U, S, Vh = low_rank_svd(factors)
        share = scaling if method in APPROXIMATIONS else 1.0
        return split_scale(SVD(U, S / share, Vh), split, factors.condition)

    if method == "pissa":
        U, S, Vh = truncated_svd(weight, r, dtype)
    else:
        default_steps = 4 if method == "pissa-fast" else 2
        U, S, Vh = randomized_svd(
            weight,
            r,
            oversampling=options.oversampling,
            power_steps=default_steps if options.power_steps is None else options.power_steps,
            generator=generator,
            dtype=dtype,
        )
    condition = float(S[0] / S[-1]) if S[-1] > 0 else math.inf
    scaled = SVD(U, S / scaling, Vh)
    if options.two_matrix:
        halves = split_scale(scaled, "balanced")
        return Factors(halves.lora_A, halves.lora_B, None, condition)
    return split_scale(scaled, split, condition)


def _pinv(matrix: Tensor, rtol: float) -> Tensor:
    # By SVD in fp64: r × r is small, and the inverse of an ill-conditioned core is no place to save bits.
    exact = matrix.to("cpu", torch.float64)
    rtol = max(rtol, len(exact) * torch.finfo(matrix.dtype).eps)
    inverse: Tensor = torch.linalg.pinv(exact, rtol=rtol)
    return inverse.to(matrix.device, matrix.dtype)


def _condition(core: Tensor) -> float:
    values = torch.linalg.svdvals(core.to("cpu"))
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf
