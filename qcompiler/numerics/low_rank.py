"""The low-rank matrix that is nearest to a weight's error, as the products of its layer see it.

With H the sum over tokens of x x^T, the rank-r minimizer of ``tr((E - B A) H (E - B A)^T)`` is the truncated singular
value decomposition ``E H^(1/2) = U S V^T`` with H^(1/2) taken out again, ``B A = U_r S_r V_r^T H^(-1/2)`` (Yao et al.
2023, arXiv:2303.08302, for H = 1; Liu et al. 2024, arXiv:2410.21271). That is ``U_r U_r^T E``, which asks for no root
and no inverse of H: U_r are the leading eigenvectors of ``E H E^T``.

Shapes: E ``[N, K]``; H ``[K, K]``; B ``[N, r]``; A ``[r, K]``.
"""

import numpy as np

__all__ = ["low_rank_factors"]


def low_rank_factors(error: np.ndarray, hessian: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A of the least loss. B A is a projection of E, so that neither the loss nor ||E|| grows, whatever H is.

    Args:
        error: E, float32 ``[N, K]``.
        hessian: H, float64 ``[K, K]``; may be singular.
        rank: r, at least 1; from min(N, K) on B A is E.

    Returns:
        B float32 ``[N, r]`` and A float32 ``[r, K]``, where r is min(N, K) at most. Column i of B is as long as row i
        of A, so that both keep to the range of float16.
    """
    core, basis = error.astype(np.float64), None
    if len(error) > error.shape[1]:
        basis, core = np.linalg.qr(core)  # [N, K] and [K, K], as eigenvectors of [N, N] would be too many
    _, vectors = np.linalg.eigh(core @ hessian @ core.T)
    leading = vectors[:, ::-1][:, :rank]  # [min(N, K), r]
    inner = leading.T @ core  # [r, K]
    outer = leading if basis is None else basis @ leading  # [N, r]
    length = np.sqrt(np.linalg.norm(inner, axis=1))
    length[length == 0] = 1
    return (outer * length).astype(np.float32), (inner / length[:, None]).astype(np.float32)
