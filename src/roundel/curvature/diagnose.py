"""How good factors are, judged by gradients that they have not seen.

For factors `K = blockdiag_k(scale_k kron(H_out_k, H_in_k))` of one linear and held-out per-sequence weight gradients `G_s`:

Cosine. `<F, K> / (|F| |K|)` in the Frobenius norm, nothing of the Fisher's size ever formed (YAQA, arXiv 2505.22988):

    <F, K>  = E_s sum_k scale_k <G_k, H_out_k G_k H_in_k>          |K|^2 = sum_k scale_k^2 |H_out_k|^2 |H_in_k|^2
    |F|^2   = E <G_s, G_s'>^2 over pairs of *different* sequences

With `s = s'` the last would be too large by `E |G|^4 / N`. Only pairs within a batch are taken, so gradients of one batch at a time are
enough, and the pairs (and with them the last digits) depend on the batch size. The estimate can exceed 1 by its error.

J ratio. Feedback with the unit lower LDL factors `A`, `B` of the damped factors leaves the grid's own error; taking that as white, the
expected loss is proportional to (`sketches.triangular`)

    J = E_s sum_k |A_k^-1 G_k B_k^-T|_F^2 = E_s sum_k <G_k, (A_k A_k^T)^-1 G_k (B_k B_k^T)^-1>

and its ratio to that of nearest rounding, `E |G|^2`, says how much of the loss feedback leaves. Unlike the cosine it ranked the
estimators as the measured KL does.

Predicted KL. `1/2 E_s <G_s, E>^2`, as in `collect.predicted_kl`.

Standard errors: delete-one-sequence jackknife (the pairs of the sequence go with it); of the predicted KL the plain one. `total` adds
linears up sequence by sequence, so that its errors know that linears are correlated: the cosine of the block-diagonal Fisher,
`sum J / sum E|G|^2` (as if the grid's error had the same variance in all linears), the sum of the KL.

Cost: one forward and one backward pass for all labels. For each label and sequence two quadratic forms of
`2 d_in d_out (d_in + d_out)` flops with `G`, or `2 T (d_in^2 + d_out^2) + 2 T^2 (d_in + d_out)` with

    <G, M_out G M_in> = sum((g M_out g^T) * (x M_in x^T));

once, `2 T d_in d_out` for `G` and `d_in d_out` for each pair, or `2 T^2 (d_in + d_out)` for each pair from
`<G, G'> = sum((g g'^T) * (x x'^T))`. Whichever is cheaper is taken. For each label and linear `d_in^3 + d_out^3` flops in float64, once.
Memory: a batch of `G` in float32, and as much again as the factors for the inverses.

Not done: pairs across batches, cosines between linears (cross-layer blocks of the Fisher).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.curvature.collect import IN_MEMORY
from roundel.errors import DataError, in_layer
from roundel.linalg.ldl import damped_ldl
from roundel.sweeps import HiddenStore, Layers, gradient_visits
from roundel.sweeps.gradients import batches
from roundel.types import Factors, LayerGrad, TokenBatch

__all__ = ["Diagnosis", "Samples", "diagnose", "total"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a diagnosis is made of: one value for each held-out sequence, in float64."""

    length: int
    """Tokens in a sequence."""
    inner: Float[Tensor, " sequences"]
    """`<G, K G>`."""
    squares: Float[Tensor, " sequences"]
    """`|G|^2`."""
    pairs: Float[Tensor, " sequences"]
    """`<G, G'>^2`, summed over the other sequences of the batch."""
    partners: Float[Tensor, " sequences"]
    """How many those are."""
    remaining: Float[Tensor, " sequences"]
    """`|A^-1 G B^-T|^2`."""
    kl: Float[Tensor, " sequences"] | None
    """`1/2 <G, E>^2 / length`, where an error was given."""
    norm: float
    """`|K|^2`."""
    damping: float
    """The largest that was really added."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Held-out diagnostics of the factors of one linear, or of all."""

    cosine: float
    """Between the Fisher and its approximation."""
    cosine_stderr: float
    j_ratio: float
    """`J(A, B) / J(I, I)`: the share of nearest rounding's expected loss that feedback leaves; lower is better."""
    j_ratio_stderr: float
    j: float
    """`J(A, B)` per token: half of it times the variance of the grid's error is a KL in nats per token."""
    j_identity: float
    """The same of nearest rounding: the trace of the Fisher per token."""
    predicted_kl: float | None
    """Nats per token, where an error was given."""
    predicted_kl_stderr: float | None
    damping: float
    """Relative damping of the factors in `J`; the largest of all."""
    samples: Samples = field(repr=False, compare=False)

    @classmethod
    def of(cls, samples: Samples) -> Diagnosis:
        """Estimates and their standard errors; `nan` where there are too few sequences for an error."""
        count = len(samples.inner)

        def cosine(inner: Tensor, sequences: float, pairs: Tensor, partners: Tensor) -> Tensor:
            return inner / sequences / (pairs / partners).sqrt() / math.sqrt(samples.norm)

        inner, pairs, partners = samples.inner.sum(), samples.pairs.sum(), samples.partners.sum()
        without = cosine(inner - samples.inner, count - 1, pairs - 2 * samples.pairs, partners - 2 * samples.partners)
        remaining, squares = samples.remaining.sum(), samples.squares.sum()
        ratios = (remaining - samples.remaining) / (squares - samples.squares)
        kl = samples.kl
        return cls(
            cosine=cosine(inner, count, pairs, partners).item(),
            cosine_stderr=_jackknife(without),
            j_ratio=(remaining / squares).item(),
            j_ratio_stderr=_jackknife(ratios),
            j=remaining.item() / (count * samples.length),
            j_identity=squares.item() / (count * samples.length),
            predicted_kl=None if kl is None else kl.mean().item(),
            predicted_kl_stderr=None if kl is None else kl.std().item() / math.sqrt(count),
            damping=samples.damping,
            samples=samples,
        )

    def as_json(self) -> dict[str, float | None]:
        """Plain values by name; None for what is not known."""
        names = [name for name in self.__dataclass_fields__ if name != "samples"]
        values: dict[str, float | None] = {name: getattr(self, name) for name in names}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def _jackknife(without: Tensor) -> float:
    """Standard error of an estimate from what it is without each of its sequences."""
    return math.sqrt((len(without) - 1) * without.var(correction=0).item())


def total(diagnoses: Iterable[Diagnosis]) -> Diagnosis:
    """All linears of one label together (see the module's docstring); there must be one or more, of the same sequences."""
    parts = [diagnosis.samples for diagnosis in diagnoses]
    first = parts[0]
    known = [part.kl for part in parts if part.kl is not None]
    samples = Samples(
        length=first.length,
        inner=torch.stack([part.inner for part in parts]).sum(0),
        squares=torch.stack([part.squares for part in parts]).sum(0),
        pairs=torch.stack([part.pairs for part in parts]).sum(0),
        partners=first.partners,
        remaining=torch.stack([part.remaining for part in parts]).sum(0),
        kl=torch.stack(known).sum(0) if len(known) == len(parts) else None,
        norm=sum(part.norm for part in parts),
        damping=max(part.damping for part in parts),
    )
    return Diagnosis.of(samples)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A group of rows: its factors, and the inverses that give `J`."""

    rows: slice
    H_out: Tensor
    H_in: Tensor
    scale: float
    P_out: Tensor
    P_in: Tensor
    damping: float


def _groups(factors: Factors, damping: float) -> list[_Group]:
    found = []
    for rows, group in factors.row_groups():
        _, A, used_out = damped_ldl(group.H_out, damping)
        _, B, used_in = damped_ldl(group.H_in, damping)
        found.append(
            _Group(
                rows=rows,
                H_out=group.H_out.float(),
                H_in=group.H_in.float(),
                scale=group.scale,
                P_out=torch.cholesky_inverse(A).float(),
                P_in=torch.cholesky_inverse(B).float(),
                damping=max(used_out, used_in),
            )
        )
    return found


class _Gradients:
    """The gradients of one linear in one batch, as matrices or as tokens."""

    def __init__(self, grad: LayerGrad) -> None:
        self.grad = grad
        sequences, tokens, d_out = grad.g.shape
        d_in = grad.input.x.shape[2]
        sides, squares = d_in + d_out, d_in**2 + d_out**2
        self.as_matrices = d_in * d_out * sides <= tokens * squares + tokens**2 * sides
        by_matrices = 2 * tokens * d_in * d_out + sequences * d_in * d_out
        self.G: Tensor | None = None
        if self.as_matrices or by_matrices <= sequences * tokens**2 * sides:
            self.G = torch.stack([grad.weight_gradient(s) for s in grad.sequences()])

    def products(self) -> Float[Tensor, "sequences sequences"]:
        """`<G_s, G_s'>`."""
        if self.G is not None:
            flat = self.G.flatten(1)
            return (flat @ flat.T).double()
        found = torch.zeros(len(self.grad.sequences()), len(self.grad.sequences()), dtype=torch.float64, device=self.grad.g.device)
        for s in self.grad.sequences():
            x, g = self.grad.input.x[s].float(), self.grad.g[s].float()
            for other in range(s + 1):
                other_x, other_g = self.grad.input.x[other].float(), self.grad.g[other].float()
                found[s, other] = found[other, s] = ((x @ other_x.T) * (g @ other_g.T)).sum(dtype=torch.float64)
        return found

    def quadratic(self, rows: slice, M_out: Tensor, M_in: Tensor) -> Float[Tensor, " sequences"]:
        """`<G_s, M_out G_s M_in>` over a group of rows."""
        M_out, M_in = M_out.to(self.grad.g.device), M_in.to(self.grad.g.device)
        found = []
        for s in self.grad.sequences():
            if self.as_matrices and self.G is not None:
                G = self.G[s, rows]
                value = (M_out @ G @ M_in) * G
            else:
                x, g = self.grad.input.x[s].float(), self.grad.g[s, :, rows].float()
                value = (g @ M_out @ g.T) * (x @ M_in @ x.T)
            found.append(value.sum(dtype=torch.float64))
        return torch.stack(found)

    def inner(self, E: Tensor) -> Float[Tensor, " sequences"]:
        """`<G_s, E>`."""
        E = E.to(self.grad.g.device)
        if self.G is not None:
            return torch.stack([(G * E).sum(dtype=torch.float64) for G in self.G])
        return torch.stack([self.grad.inner(s, E) for s in self.grad.sequences()])


def diagnose(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, Mapping[str, Factors]],
    tokens: TokenBatch,
    *,
    seed: int,
    batch_size: int,
    damping: float,
    advance: Callable[[int], None] = lambda _sequences: None,
    errors: Mapping[str, Callable[[str], Tensor]] | None = None,
    store: HiddenStore | None = None,
) -> dict[str, dict[str, Diagnosis]]:
    """Judges factors of several origins by the same gradients, with labels sampled from the model.

    Args:
        layers: A causal language model.
        linears: The modules to look at, by name.
        factors: For each label (such as an estimator's name) the factors of linears, by name.
        tokens: Sequences that no factors have seen; two or more.
        seed: Seeds the labels, together with each sequence's id.
        batch_size: Sequences in a forward pass and in the pairs that give the Fisher's norm: two or more, better 16.
        damping: Relative, for `J`.
        advance: Called with the number of sequences done by one group of layers.
        errors: For some of the labels, `error(name) = W - W_hat` of each linear in `factors[label]`, to predict its KL.
        store: Where hidden states go; in memory by default.

    Returns:
        By label and linear. Left out are linears whose factors are unusable (`scale` 0) and those that no gradient reached.

    Raises:
        DataError: fewer than two sequences, in all or in a batch.
        NumericalError: factors that are not finite or stay indefinite.
        ValueError: `errors` of a label that has no factors.
    """
    if len(tokens) < 2 or batch_size < 2:
        raise DataError(f"{len(tokens)} held-out sequences in batches of {batch_size}: expected 2 or more, the Fisher's norm needs pairs")
    errors = errors or {}
    if unknown := set(errors) - set(factors):
        raise ValueError(f"errors for {sorted(unknown)}, which have no factors")
    groups: dict[tuple[str, str], list[_Group]] = {}
    for label, own in factors.items():
        for name in linears:
            if name in own and own[name].scale > 0:
                with in_layer(name):
                    groups[label, name] = _groups(own[name], damping)
    diagnosed = {name: linear for name, linear in linears.items() if any((label, name) in groups for label in factors)}
    parts = tokens.split(batch_size)
    partners = torch.tensor([len(part) - 1.0 for part in parts for _ in range(len(part))], dtype=torch.float64)

    def zeros() -> Tensor:
        return torch.zeros(len(tokens), dtype=torch.float64)

    squares, pairs = {name: zeros() for name in diagnosed}, {name: zeros() for name in diagnosed}
    inner, remaining = {key: zeros() for key in groups}, {key: zeros() for key in groups}
    along = {key: zeros() for key in groups if key[0] in errors}
    here = slice(0, 0)

    def consume(name: str, grad: LayerGrad) -> None:
        with torch.no_grad():
            gradients = _Gradients(grad)
            products = gradients.products()
            squares[name][here] = products.diagonal().cpu()
            pairs[name][here] = (products.square().sum(1) - products.diagonal().square()).cpu()
            for label in factors:
                for group in groups.get((label, name), []):
                    inner[label, name][here] += group.scale * gradients.quadratic(group.rows, group.H_out, group.H_in).cpu()
                    remaining[label, name][here] += gradients.quadratic(group.rows, group.P_out, group.P_in).cpu()
                if (label, name) in along:
                    along[label, name][here] = gradients.inner(errors[label](name)).cpu()

    store = HiddenStore(memory=IN_MEMORY) if store is None else store
    for visit in gradient_visits(
        layers, diagnosed, tokens, seed=seed, labels="sampled", batch_size=batch_size, store=store, advance=advance
    ):
        for rows in batches(range(len(tokens)), batch_size):
            here = slice(rows[0], rows[-1] + 1)
            visit.replay(rows, consume)

    length = tokens.ids.shape[1]
    found: dict[str, dict[str, Diagnosis]] = {label: {} for label in factors}
    for (label, name), own_groups in groups.items():
        if pairs[name].sum() == 0:
            continue
        found[label][name] = Diagnosis.of(
            Samples(
                length=length,
                inner=inner[label, name],
                squares=squares[name],
                pairs=pairs[name],
                partners=partners,
                remaining=remaining[label, name],
                kl=0.5 * along[label, name].square() / length if (label, name) in along else None,
                norm=sum((g.scale * torch.linalg.norm(g.H_out) * torch.linalg.norm(g.H_in)).square().item() for g in own_groups),
                damping=max(g.damping for g in own_groups),
            )
        )
    return found
