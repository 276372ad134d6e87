"""Hadamard matrices, and orthogonal matrices made of them, that spread what is loud over all channels.

Paley 1933, "On Orthogonal Matrices": for a prime q and chi(x), 1 for a square modulo q, -1 for another number, 0 for
zero, let Q[i, j] = chi(i - j). There is a Hadamard matrix of order q + 1 where q is 3 modulo 4, and one of order
2 (q + 1) where q is 1 modulo 4. A Kronecker product with the matrix of order two doubles the order (Sylvester).
"""

import numpy as np

__all__ = ["hadamard", "orthogonal", "random_hadamard"]


def hadamard(order: int) -> np.ndarray | None:
    """A matrix int8 ``[order, order]`` of ones and minus ones with orthogonal rows; None where we know none.

    Orders 2^k m are known, where m is 1, q + 1 or 2 (q + 1) as above: all multiples of four up to 48, for example.
    """
    core, doublings = order, 0
    while True:
        matrix = np.ones((1, 1), np.int8) if core == 1 else _paley(core)
        if matrix is not None:
            break
        if core % 2 or core < 2:
            return None
        core, doublings = core // 2, doublings + 1
    for _ in range(doublings):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def random_hadamard(size: int, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
    """An orthogonal matrix float64 ``[size, size]``, and whether it is a Hadamard matrix with signs drawn for its rows.

    Where no Hadamard matrix is known, it is drawn from all orthogonal matrices.
    """
    matrix = hadamard(size)
    if matrix is None:
        return orthogonal(size, generator), False
    signs = generator.choice([-1.0, 1.0], size)
    return signs[:, None] * matrix / np.sqrt(size), True


def orthogonal(size: int, generator: np.random.Generator, *, keep_ones: bool = False) -> np.ndarray:
    """An orthogonal matrix float64 ``[size, size]``, drawn uniformly (Mezzadri 2007, arXiv:math-ph/0609050).

    Args:
        size: Rows and columns.
        generator: Where the random numbers come from.
        keep_ones: Whether the vector of ones is mapped to itself, so that means over the channels stay what they are.
    """
    if not keep_ones:
        return _basis(generator.standard_normal((size, size)))
    ones = np.ones((size, 1))
    first, second = (
        _basis(np.hstack([ones, generator.standard_normal((size, size - 1))])) for _ in range(2)
    )  # both begin with ones / sqrt(size)
    return np.asarray(first @ second.T)


def _basis(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis in which each of `columns` has a positive last coordinate (the sign that QR leaves open)."""
    q, r = np.linalg.qr(columns)
    return np.asarray(q * np.sign(np.diag(r)))


def _paley(order: int) -> np.ndarray | None:
    """A matrix of Paley's, or None where there is none of this order over a field of prime size."""
    if order < 4 or order % 4:
        return None
    q = order - 1
    if _is_prime(q):  # 3 modulo 4
        skew = _bordered(q, -1)
        return np.asarray(skew + np.eye(order, dtype=np.int8), np.int8)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        symmetric, identity = _bordered(q, 1), np.eye(q + 1, dtype=np.int8)
        off, on = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.asarray(np.kron(symmetric, off) + np.kron(identity, on), np.int8)
    return None


def _bordered(q: int, corner: int) -> np.ndarray:
    """Q with a row of ones above and a column of `corner` at its left: a conference matrix int8 ``[q + 1, q + 1]``."""
    chi = np.full(q, -1, np.int8)
    chi[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    chi[0] = 0
    index = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = chi[(index[:, None] - index[None]) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
