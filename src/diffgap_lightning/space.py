"""The coordinates in which embeddings are diffused: per modality a mean, a basis and a scale, measured once.

    encode:  z = (x - mean) basis / scale          (B, D) -> (B, R)
    decode:  x = normalise(mean + scale z basis')  (B, R) -> (B, D)

The mean is the modality's centroid: subtracting it removes the constant part of the modality gap. The basis holds the
R leading principal directions, so that a few hundred clips do not have to fill 512 dimensions; `scale` gives the
coordinates unit variance on average, which is what a noise schedule expects. Statistics are summed in float64 and the
space is saved with the model: a refiner never sees an embedding in any other coordinates. Autocast is switched off
in both directions, so that coordinates are float32 in mixed-precision training too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffgap_lightning.functional.checks import check_embeddings

Rank = int | Literal["auto", "full"]

_KEPT_VARIANCE = 0.99
_ROWS_PER_DIRECTION = 10


class EmbeddingSpace(nn.Module):
    """Mean, basis and scale of each modality, as buffers.

    Args:
        dims: Embedding dimension D of each modality.
        ranks: Number of coordinates R of each modality, at most D.
    """

    def __init__(self, dims: Mapping[str, int], ranks: Mapping[str, int]) -> None:
        super().__init__()
        if set(dims) != set(ranks):
            raise ValueError(f"space: got dims of {sorted(dims)} and ranks of {sorted(ranks)}, expected the same")
        self.dims, self.ranks = dict(dims), dict(ranks)
        for modality, dim in self.dims.items():
            rank = self.ranks[modality]
            if not 1 <= rank <= dim:
                raise ValueError(f"space: got rank {rank} for {modality}, expected 1 to its dimension {dim}")
            self.register_buffer(f"{modality}_mean", torch.zeros(dim))
            self.register_buffer(f"{modality}_basis", torch.eye(dim, rank))
            self.register_buffer(f"{modality}_scale", torch.ones(()))

    @classmethod
    @torch.no_grad()
    def fit(cls, embeddings: Mapping[str, Tensor], rank: Rank | Mapping[str, Rank] = "auto") -> EmbeddingSpace:
        """Measure a space from training rows.

        Args:
            embeddings: Modality to `(N, D)` rows of unit norm; N and D may differ between modalities.
            rank: Number of coordinates, for all modalities or for each. `"full"`: D. `"auto"`: all directions in which
                the rows vary where there are at least 10 rows for each dimension, otherwise the leading directions that
                hold 99 % of the variance.

        Raises:
            ValueError: unusable rows (see `check_embeddings`), fewer than 2 of them, or a rank out of range.
        """
        if isinstance(rank, Mapping) and set(rank) != set(embeddings):
            got, expected = (", ".join(sorted(names)) for names in (rank, embeddings))
            raise ValueError(f"rank: got ranks of {got}, expected one for each of {expected}")
        fitted = {}
        for modality, x in embeddings.items():
            check_embeddings(x, modality, unit=True)
            if len(x) < 2:
                raise ValueError(f"{modality}: got 1 row, expected at least 2 to measure a mean and a spread")
            wanted = rank[modality] if isinstance(rank, Mapping) else rank
            fitted[modality] = _measure(x, wanted, modality)
        dims = {m: len(mean) for m, (mean, _, _) in fitted.items()}
        space = cls(dims, {m: basis.shape[1] for m, (_, basis, _) in fitted.items()})
        for modality, (mean, basis, scale) in fitted.items():
            space.mean(modality).copy_(mean)
            space.basis(modality).copy_(basis)
            space.scale(modality).copy_(scale)
        return space

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that this space was measured for."""
        return tuple(self.dims)

    def mean(self, modality: str) -> Tensor:
        """Centroid of a modality, `(D,)`."""
        return self._buffer(modality, "mean")

    def basis(self, modality: str) -> Tensor:
        """Orthonormal columns, `(D, R)`."""
        return self._buffer(modality, "basis")

    def scale(self, modality: str) -> Tensor:
        """Standard deviation of a coordinate, averaged over the R directions; a scalar."""
        return self._buffer(modality, "scale")

    def centre(self, embedding: Tensor, modality: str) -> Tensor:
        """Embedding minus its modality's centroid, `(B, D)` float32."""
        check_embeddings(embedding, modality, dim=self._dim(modality))
        return embedding.float() - self.mean(modality)

    def encode(self, embedding: Tensor, modality: str) -> Tensor:
        """Coordinates `(B, R)` float32 of embeddings `(B, D)`."""
        return self.coordinates(self.centre(embedding, modality), modality)

    def decode(self, coordinates: Tensor, modality: str) -> Tensor:
        """Unit embeddings `(..., D)` float32 of coordinates `(..., R)`."""
        return nn.functional.normalize(self.mean(modality) + self.offset(coordinates, modality), dim=-1)

    def coordinates(self, offset: Tensor, modality: str) -> Tensor:
        """Coordinates `(..., R)` of offsets from the centroid `(..., D)`; what lies outside the basis is left out."""
        with torch.autocast(offset.device.type, enabled=False):
            return offset.float() @ self.basis(modality) / self.scale(modality)

    def offset(self, coordinates: Tensor, modality: str) -> Tensor:
        """Offsets from the centroid `(..., D)` of coordinates `(..., R)`."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return self.scale(modality) * coordinates.float() @ self.basis(modality).T

    def shift(self, embedding: Tensor, source: str, target: str) -> Tensor:
        """The centred bridge: move the source's centroid onto the target's, `(B, D)` unit rows.

        Raises:
            ValueError: the two modalities differ in dimension.
        """
        if self._dim(source) != self._dim(target):
            raise ValueError(
                f"cannot shift {source} ({self._dim(source)}-d) onto {target} ({self._dim(target)}-d): "
                "the dimensions differ; start from the posterior mean instead (start='posterior_mean')"
            )
        return nn.functional.normalize(self.centre(embedding, source) + self.mean(target), dim=-1)

    def _dim(self, modality: str) -> int:
        if modality not in self.dims:
            raise ValueError(f"modality: got {modality!r}, expected one of {', '.join(self.dims)}")
        return self.dims[modality]

    def _buffer(self, modality: str, name: str) -> Tensor:
        self._dim(modality)
        return self.get_buffer(f"{modality}_{name}")


def _measure(x: Tensor, rank: Rank, modality: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(D,)`, leading principal directions `(D, R)` and scale, summed in float64 over chunks of rows."""
    n, dim = x.shape
    mean = torch.stack([c.double().sum(0) for c in x.split(65536)]).sum(0) / n
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=x.device)
    for chunk in x.split(65536):
        centred = chunk.double() - mean
        covariance += centred.T @ centred / n
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    present = int((variances > variances[0] * 1e-9).sum())
    if variances[0] <= 1e-12:
        raise ValueError(f"{modality}: all {n} rows are the same; is the encoder broken (collapsed)?")
    count = _choose_rank(rank, variances, n, dim, present, modality)
    # An eigenvector's sign is arbitrary and may differ between machines; fix it so that a seed gives one model.
    kept = directions[:, :count]
    kept = kept * kept.gather(0, kept.abs().argmax(0, keepdim=True)).sign()
    return mean.float(), kept.float(), variances[:count].mean().sqrt().float()


def _choose_rank(rank: Rank, variances: Tensor, n: int, dim: int, present: int, modality: str) -> int:
    if rank == "full":
        return dim
    if rank == "auto":
        if n >= _ROWS_PER_DIRECTION * dim:
            return present
        share = variances.cumsum(0) / variances.sum()
        return min(present, int((share < _KEPT_VARIANCE).sum()) + 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= dim:
        raise ValueError(f"rank: got {rank!r} for {modality}, expected 'auto', 'full' or 1 to its dimension {dim}")
    return rank
