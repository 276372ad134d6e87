"""Rounding with second-order information: what GPTQ and its relatives are made of.

With H the sum over tokens of x x^T, the loss of codes Q for a weight W is ``tr((W - Q) H (W - Q)^T)``, the squared
error of the products. Frantar et al. 2022, arXiv:2210.17323, in the form of Chee et al. 2023, arXiv:2307.13304; see the
pass `gptq`.

Shapes: W, Q ``[N, K]``; H ``[K, K]``; scale, zero point ``[N, G]``.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qcompiler.numerics.affine import Grid, WeightSpec, dequantize, round_between, round_to_grid, stored_scale

__all__ = [
    "damped",
    "descend",
    "refit_scales",
    "row_losses",
    "shift",
    "supported_share",
    "sweep",
    "sweep_groups",
    "sweep_losses",
    "upper_factor",
]


def damped(hessian: np.ndarray, percdamp: float) -> np.ndarray:
    """H with ``percdamp * (H_jj + mean(diag H) / 10)`` added to its diagonal.

    The paper adds a fraction of the mean alone. Where a few channels are a thousand times louder than the rest, which
    is the rule in transformers, that drowns the quiet channels' correlations; a fraction of each channel's own energy
    does not depend on how channels are scaled. The mean keeps channels that hardly ever fire from having their way.

    Args:
        hessian: ``[K, K]``.
        percdamp: Fraction.

    Returns:
        float64 ``[K, K]``.
    """
    result = hessian.astype(np.float64)
    diagonal = np.einsum("kk->k", result)
    dead = diagonal <= 0
    mean = 1.0 if dead.all() else float(diagonal[~dead].mean())
    diagonal += percdamp * (diagonal + mean / 10)
    # Columns that never fire are coupled to nothing, so any positive number serves; a large one would fill the loss.
    diagonal[diagonal <= 0] = mean
    return result


def upper_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular A with ``A A^T = H``; raises numpy's LinAlgError where H is not positive definite."""
    return np.ascontiguousarray(np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1])


def shift(weight: np.ndarray, drift: np.ndarray, hessian: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
    """What is added to a weight to make up for what happened to the activations before: ``(W D + R) H^-1``.

    With x_f the float model's activations and x those of the quantized one, ``D = sum (x_f - x) x^T``; then
    ``||Q X - W X_f||^2`` is ``||(Q - W - W D H^-1) X||^2`` and a constant. With r what the product is added to and
    ``R = sum (r_f - r) x^T`` the same holds of ``||(Q X + r) - (W X_f + r_f)||^2``.

    Args:
        weight: float32 ``[N, K]``.
        drift: D, float64 ``[K, K]``.
        hessian: float64 ``[K, K]``, damped.
        residual: R, ``[N, K]``.

    Returns:
        float32 ``[N, K]``.
    """
    # On a unit diagonal, what damping leaves is conditioned well enough for float32, which is twice as fast.
    unit = 1 / np.sqrt(np.diagonal(hessian))
    scaled, small = (hessian * unit * unit[:, None]).astype(np.float32), unit.astype(np.float32)
    if residual is None and len(weight) > len(hessian):
        found = weight @ np.linalg.solve(scaled, (drift * unit).astype(np.float32).T).T
    else:
        found = np.linalg.solve(scaled, (_missing(weight, drift, residual) * small).T).T
    return np.asarray(found * small)


def _missing(weight: np.ndarray, drift: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    """W D + R, float32."""
    product = weight @ drift.astype(np.float32)
    return np.asarray(product if residual is None else product + residual.astype(np.float32))


def supported_share(
    weight: np.ndarray,
    change: np.ndarray,
    drift: np.ndarray,
    hessian: np.ndarray,
    residual: np.ndarray | None = None,
) -> float:
    """The share, 0 to 1, of a `shift` found on other data that brings products closest to the float model's.

    ``||(W + share * change) X - W X_f||^2`` is least where the share is ``<W D, change> / <change H, change>``, with R
    added to W D where there is a residual.

    Args:
        weight: float32 ``[N, K]``.
        change: float32 ``[N, K]``.
        drift: D of these data, float64 ``[K, K]``.
        hessian: H of these data, float64 ``[K, K]``.
        residual: R of these data, ``[N, K]``.
    """
    cost = float(row_losses(change, hessian.astype(np.float32)).sum())
    gain = float(np.einsum("nk,nk->", _missing(weight, drift, residual), change, dtype=np.float64))
    return min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0


def sweep(
    weight: np.ndarray,
    factor: np.ndarray,
    grid: Grid,
    spec: WeightSpec,
    order: np.ndarray,
    lazy_block: int = 128,
    zeros: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize the columns of a weight one after the other.

    Args:
        weight: float32 ``[N, K]``.
        factor: float64 ``[K, K]``, `upper_factor` of the damped Hessian in visiting order.
        grid: Scale and zero point ``[N, G]`` of the columns in their own order.
        spec: Target format.
        order: int ``[K]``, the visiting order.
        lazy_block: Columns between two updates with matrix products; the result does not depend on it but for rounding.
        zeros: bool ``[N, K]``, values that get the code of zero whatever they are; None for none.

    Returns:
        Codes uint8 ``[N, K]`` and the loss of each row, float64 ``[N]``: the diagonal of ``(W - Q) H (W - Q)^T``.
    """
    scale, zero = np.ascontiguousarray(grid.scale.T), np.ascontiguousarray(grid.zero_point.T)  # [G, N]
    group = order // spec.group_size
    values = np.ascontiguousarray(weight.T[order])  # [K, N], so that a column of W is contiguous
    fixed = None if zeros is None else np.ascontiguousarray(zeros.T[order])
    codes, loss = _swept(values, factor, lambda k: (scale[group[k]], zero[group[k]]), spec.limits, lazy_block, fixed)
    result = np.empty(weight.shape, np.uint8)
    result[:, order] = codes.T
    return result, loss


def sweep_losses(
    weight: np.ndarray, factor: np.ndarray, grids: Sequence[Grid], specs: Sequence[WeightSpec], order: np.ndarray
) -> np.ndarray:
    """The losses that `sweep` leaves in several formats, found in one go.

    Args:
        weight: float32 ``[N, K]``.
        factor: See `sweep`.
        grids: For each format, scale and zero point ``[N, G]``.
        specs: The S formats.
        order: int ``[K]``, the visiting order.

    Returns:
        float64 ``[S, N]``.
    """
    count, rows = len(specs), len(weight)
    values = np.tile(np.ascontiguousarray(weight.T[order]), (1, count))  # [K, S N]
    scale, zero = np.empty_like(values), np.empty_like(values)
    low, high = np.empty(count * rows, np.float32), np.empty(count * rows, np.float32)
    for number, (grid, spec) in enumerate(zip(grids, specs, strict=True)):
        part, group = slice(number * rows, (number + 1) * rows), order // spec.group_size
        scale[:, part], zero[:, part] = grid.scale.T[group], grid.zero_point.T[group]
        low[part], high[part] = spec.limits
    _, loss = _swept(values, factor, lambda k: (scale[k], zero[k]), (low, high), 128)
    return loss.reshape(count, rows)


def _swept(
    values: np.ndarray,
    factor: np.ndarray,
    grid: Callable[[int], tuple[np.ndarray, np.ndarray]],
    limits: tuple[float | np.ndarray, float | np.ndarray],
    lazy_block: int,
    zeros: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 ``[K, N]`` and losses ``[N]`` of columns float32 ``[K, N]`` in visiting order.

    `grid` has scale and zero point ``[N]`` of the k-th column; `zeros` ``[K, N]`` names values that become zero.
    """
    columns, rows = values.shape
    diagonal = np.diagonal(factor)
    feedback = np.ascontiguousarray((factor / diagonal).T, np.float32)  # [K, K], row k holds A_jk / A_kk for j < k
    errors = np.empty_like(values)
    codes = np.empty((columns, rows), np.uint8)
    loss = np.zeros(rows, np.float64)
    for start in range(0, columns, lazy_block):
        stop = min(start + lazy_block, columns)
        carried = feedback[start:stop, :start] @ errors[:start]  # [block, N]
        for k in range(start, stop):
            value = values[k] + carried[k - start] + feedback[k, start:k] @ errors[start:k]
            s, z = grid(k)
            code = round_between(value, s, z, *limits)
            if zeros is not None:
                code = np.where(zeros[k], z, code)
            codes[k] = code
            quantized = (code - z) * s
            np.subtract(values[k], quantized, out=errors[k])
            value -= quantized
            value = value.astype(np.float64)
            loss += np.square(diagonal[k] * value)
    return codes, loss


def sweep_groups(
    weight: np.ndarray, hessians: np.ndarray, grid: Grid, spec: WeightSpec, *, act_order: bool, percdamp: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sweep all groups of a convolution at once, each with a Hessian of its own.

    Args:
        weight: float32 ``[N, K]``, N / groups rows a group.
        hessians: float64 ``[groups, K, K]``.
        grid: Scale and zero point ``[N, 1]``.
        spec: Target format, one scale a row.
        act_order: Visit columns in the order of falling diag(H).
        percdamp: Damping as in `damped`.

    Returns:
        Codes uint8 ``[N, K]``, the loss of each row and the loss with all codes zero, float64 ``[N]``.
    """
    groups, columns, rows = len(hessians), weight.shape[1], len(weight) // len(hessians)
    diagonal = np.einsum("gkk->gk", hessians)
    order = np.argsort(-diagonal, axis=1, kind="stable") if act_order else np.tile(np.arange(columns), (groups, 1))
    damp = np.stack([damped(hessian, percdamp) for hessian in hessians])
    each = np.arange(groups)[:, None, None]
    ordered = damp[each, order[:, :, None], order[:, None, :]]
    factors = np.linalg.cholesky(ordered[:, ::-1, ::-1])[:, ::-1, ::-1]  # [g, K, K]
    values = np.take_along_axis(weight.reshape(groups, rows, columns), order[:, None], axis=2)
    scale, zero = grid.scale.reshape(groups, rows), grid.zero_point.reshape(groups, rows)
    errors, codes, loss = np.zeros_like(values), np.empty(values.shape, np.uint8), np.zeros((groups, rows))
    for k in range(columns):
        pivot = factors[:, k, k]
        feedback = (factors[:, :k, k] / pivot[:, None]).astype(np.float32)  # [g, k]
        value = values[..., k] + np.einsum("grk,gk->gr", errors[..., :k], feedback)
        code = round_to_grid(value, scale, zero, spec)
        quantized = (code - zero) * scale
        codes[..., k], errors[..., k] = code, values[..., k] - quantized
        loss += np.square(pivot[:, None] * (value - quantized))
    result = np.empty_like(codes)
    np.put_along_axis(result, np.broadcast_to(order[:, None], codes.shape), codes, axis=2)
    wide = weight.reshape(groups, rows, columns).astype(np.float64)
    energy = np.einsum("grk,gkl,grl->gr", wide, hessians, wide, optimize=True)
    return result.reshape(weight.shape), loss.reshape(-1), energy.reshape(-1)


def row_losses(error: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The diagonal of ``E H E^T``, float64 ``[N]``, of E ``[N, K]`` and H ``[K, K]``, multiplied in their own dtype."""
    return np.asarray(np.einsum("nk,nk->n", error @ hessian, error, dtype=np.float64))


def refit_scales(weight: np.ndarray, codes: np.ndarray, hessian: np.ndarray, grid: Grid, spec: WeightSpec) -> Grid:
    """Move each group's scale to the least loss with the codes held fixed, one group after the other (Gauss-Seidel).

    For group g with values c = code - zero: ``s_g += c^T (H E)_g / (c^T H_gg c)``, E the error so far; the loss never
    grows, up to the rounding of the scale to its stored dtype.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        hessian: float32 ``[K, K]``.
        grid: Scale and zero point ``[N, G]``.
        spec: Target format.

    Returns:
        The grid with new scales.
    """
    columns = weight.shape[1]
    scale = grid.scale.copy()
    error = weight - dequantize(codes, scale, grid.zero_point, spec.group_size)  # [N, K]
    gradient = error @ hessian  # [N, K]
    for group in range(spec.groups(columns)):
        part = slice(group * spec.group_size, min((group + 1) * spec.group_size, columns))
        values = codes[:, part] - grid.zero_point[:, group, None]
        curvature = np.einsum("nk,nk->n", values @ hessian[part, part], values)
        slope = np.einsum("nk,nk->n", values, gradient[:, part])
        moved = stored_scale(
            scale[:, group] + np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0), spec
        )
        gradient -= ((moved - scale[:, group])[:, None] * values) @ hessian[part]
        scale[:, group] = moved
    return Grid(scale, grid.zero_point)


def descend(
    weight: np.ndarray,
    codes: np.ndarray,
    hessian: np.ndarray,
    grid: Grid,
    spec: WeightSpec,
    lazy_block: int = 128,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """One round of coordinate descent on the codes: each column moves to its best code with all others held fixed.

    ``q_k <- round_to_grid(q_k + (H E)_k / H_kk)``; the loss never grows.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        hessian: float32 ``[K, K]``.
        grid: Scale and zero point ``[N, G]``.
        spec: Target format.
        lazy_block: Columns between two updates with matrix products.
        zeros: bool ``[N, K]``, values that keep the code of zero; None for none.

    Returns:
        Codes uint8 ``[N, K]``.
    """
    columns = weight.shape[1]
    scale, zero = np.ascontiguousarray(grid.scale.T), np.ascontiguousarray(grid.zero_point.T)  # [G, N]
    error = weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size)
    gradient = hessian @ error.T  # [K, N]
    result = np.ascontiguousarray(codes.T)
    for start in range(0, columns, lazy_block):
        stop = min(start + lazy_block, columns)
        moves = np.empty((stop - start, weight.shape[0]), np.float32)
        for k in range(start, stop):
            s, z = scale[k // spec.group_size], zero[k // spec.group_size]
            old = (result[k] - z) * s
            slope = gradient[k] - hessian[k, start:k] @ moves[: k - start]
            code = round_to_grid(old + slope / hessian[k, k], s, z, spec)
            if zeros is not None:
                code = np.where(zeros[:, k], z, code)
            result[k] = code
            np.subtract((code - z) * s, old, out=moves[k - start])
        gradient[stop:] -= hessian[stop:, start:stop] @ moves
    return np.ascontiguousarray(result.T)
