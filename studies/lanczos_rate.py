"""How fast Lanczos and power iteration find a leading eigenvector: the table of docs/method.md.

    python studies/lanczos_rate.py

Operators are diagonal, with eigenvalues 1, q, and the rest spread evenly from q down to 0; the start has tan(angle) = 0.3 to the
leading eigenvector, spread evenly over the others. `q = lambda_2 / lambda_1`, for `R^T R` the squared ratio of singular values.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIZE, TANGENT = 400, 0.3


def problem(q: float) -> tuple[Array, Array]:
    """Eigenvalues in descending order, and the start; the leading eigenvector is the first unit vector."""
    eigenvalues = np.concatenate([[1.0], np.linspace(q, 0.0, SIZE - 1)])
    start = np.concatenate([[1.0], np.full(SIZE - 1, TANGENT / math.sqrt(SIZE - 1))])
    return eigenvalues, start / np.linalg.norm(start)


def sine(vector: Array) -> float:
    """Sine of the angle to the first unit vector."""
    return float(np.linalg.norm(vector[1:]) / np.linalg.norm(vector))


def krylov(eigenvalues: Array, start: Array, k: int) -> Array:
    """An orthonormal basis of `span(v, A v, .., A^(k-1) v)`, `(size, k)`: Lanczos with full reorthogonalisation."""
    basis = start[:, None] / np.linalg.norm(start)
    while basis.shape[1] < k:
        image = eigenvalues * basis[:, -1]
        for _twice in range(2):
            image -= basis @ (basis.T @ image)
        basis = np.column_stack([basis, image / np.linalg.norm(image)])
    return basis


def ritz_vector(eigenvalues: Array, start: Array, k: int) -> Array:
    """The leading Ritz vector of `k` steps, which need `k` products with the operator."""
    basis = krylov(eigenvalues, start, k)
    return np.asarray(basis @ np.linalg.eigh(basis.T @ (eigenvalues[:, None] * basis))[1][:, -1])


def power_iterate(eigenvalues: Array, start: Array, k: int) -> Array:
    """After `k` products."""
    return np.asarray(eigenvalues**k * start)


def rate(q: float) -> float:
    """What a Lanczos step divides the error by, in the long run."""
    root = math.sqrt(1 - q)
    return (1 - root) / (1 + root)


def space_bound(q: float, k: int) -> float:
    """Kaniel-Paige-Saad: tan(angle) between the leading eigenvector and the Krylov space of `k` steps is at most this."""
    gap = (1 - q) / q  # (lambda_1 - lambda_2) / (lambda_2 - lambda_n), lambda_n = 0
    return TANGENT / math.cosh((k - 1) * math.acosh(1 + 2 * gap))


def ritz_bound(q: float, k: int) -> float:
    """Bounds sin(angle) of the Ritz vector: `sqrt((lambda_1 - lambda_n) / (lambda_1 - lambda_2))` more than the space's."""
    return space_bound(q, k) / math.sqrt(1 - q)


def published(q: float, k: int) -> float:
    """The rate of FastKron's Theorem 3.1, as its proof has it."""
    return float(((1 - math.sqrt(q)) / (1 + math.sqrt(q))) ** k)


def main() -> None:
    print("| q | products | Lanczos | power | corrected bound | Theorem 3.1 |")
    print("|---|---|---|---|---|---|")
    for q in (0.05, 0.3, 0.6, 0.9, 0.99):
        eigenvalues, start = problem(q)
        for k in (2, 4, 8):
            errors = sine(ritz_vector(eigenvalues, start, k)), sine(power_iterate(eigenvalues, start, k))
            cells = " | ".join(f"{value:.1e}" for value in (*errors, ritz_bound(q, k), published(q, k)))
            print(f"| {q} | {k} | {cells} |")


if __name__ == "__main__":
    main()
