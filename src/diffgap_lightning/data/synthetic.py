"""A synthetic world of audio and captions in which the best possible retrieval score is known exactly.

A caption names a concept k out of K; its audio realises the concept in one of J modes j. With u what the two share
beyond the concept, and d latent dimensions:

    u ~ N(0, s_u^2 I)    y_audio = c_k + m_kj + u + s_a noise    y_text = c_k + rho u + s_t noise

An injective map per modality makes embeddings of the latents, a random network and an offset that opens the gap:

    e_m = normalise(tanh(y W1_m) W2 + gap b_m),    W1_m = W1 + mix V_m

So the mutual information of the embeddings is that of the latents. No retrieval score beats the pointwise mutual
information log p(y_a, y_t) - log p(y_a) - log p(y_t). Every density here is an even mixture of Gaussians with one
covariance; the joint is sum_kj N([y_a, y_t]; [c_k + m_kj, c_k], C (x) I) / KJ with C (2, 2). Its quadratic form splits
into one part for each latent, so the sum over components is a matrix product.

Draws come from NumPy's PCG64 with explicit seeds; the global generators are neither read nor changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AUDIO, TEXT = 0, 1
CHUNK = 8192


class SyntheticSample(NamedTuple):
    """Aligned pairs: embeddings `(N, D)` float32 of unit norm, latents `(N, d)` float64."""

    audio: Tensor
    text: Tensor
    audio_latent: Tensor
    text_latent: Tensor


class SyntheticWorld:
    """The joint distribution of audio and text; one seed fixes its concepts, modes and maps.

    Args:
        seed: Of the world itself; `sample` has its own.
        latent_dim: d.
        num_concepts: K.
        num_modes: J, audio modes of each concept.
        dim: D, of the embeddings.
        hidden_dim: Width of the random maps.
        mode_scale: Spread of the modes around their concept.
        shared_std: s_u.
        audio_noise: s_a.
        text_noise: s_t.
        text_gain: rho, how much of u the caption tells.
        map_mix: How far the modalities' maps differ.
        gap: Length of the modality's offset b_m before normalisation.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        latent_dim: int = 48,
        num_concepts: int = 512,
        num_modes: int = 3,
        dim: int = 512,
        hidden_dim: int = 256,
        mode_scale: float = 0.8,
        shared_std: float = 0.8,
        audio_noise: float = 0.9,
        text_noise: float = 0.9,
        text_gain: float = 0.8,
        map_mix: float = 0.35,
        gap: float = 8.0,
    ) -> None:
        sizes = {"latent_dim": latent_dim, "num_concepts": num_concepts, "num_modes": num_modes, "dim": dim}
        sizes["hidden_dim"] = hidden_dim
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        for name, std in {"audio_noise": audio_noise, "text_noise": text_noise}.items():
            if not std > 0:
                raise ValueError(f"{name}: got {std}, expected more than 0; without noise the optimum has no density")
        scales = (mode_scale, shared_std, audio_noise, text_noise, text_gain, map_mix, gap)
        self._parameters = (seed, *sizes.values(), *(float(scale) for scale in scales))
        self.latent_dim = latent_dim
        self.shared_std, self.text_gain = shared_std, text_gain
        self.audio_noise, self.text_noise = audio_noise, text_noise
        normal = np.random.default_rng(seed).standard_normal
        taper = np.linspace(1.6, 0.4, latent_dim)
        self.concepts = normal((num_concepts, latent_dim)) * taper
        modes = normal((num_concepts, num_modes, latent_dim)) * mode_scale * taper
        self.modes = modes - modes.mean(1, keepdims=True)
        shared_map = normal((latent_dim, hidden_dim))
        own_maps = normal((2, latent_dim, hidden_dim))
        self.first_maps = (shared_map + map_mix * own_maps) / math.sqrt(latent_dim)
        self.second_map = normal((hidden_dim, dim)) / math.sqrt(hidden_dim)
        offsets = normal((2, dim))
        self.offsets = gap * offsets / np.linalg.norm(offsets, axis=1, keepdims=True)

    @property
    def fingerprint(self) -> str:
        """Names the world in place of an encoder: equal for equal parameters."""
        return "synthetic-world-" + hashlib.blake2b(repr(self._parameters).encode(), digest_size=8).hexdigest()

    def sample(self, n: int, seed: int | Sequence[int]) -> SyntheticSample:
        """Draw `n` independent pairs; the same seed gives the same pairs."""
        if n < 1:
            raise ValueError(f"n: got {n}, expected at least one pair")
        rng = np.random.default_rng(seed)
        concept = rng.integers(len(self.concepts), size=n)
        mode = rng.integers(self.modes.shape[1], size=n)
        shape = (n, self.latent_dim)
        shared = self.shared_std * rng.standard_normal(shape)
        audio = self.concepts[concept] + self.modes[concept, mode] + shared
        audio += self.audio_noise * rng.standard_normal(shape)
        text = self.concepts[concept] + self.text_gain * shared
        text += self.text_noise * rng.standard_normal(shape)
        return SyntheticSample(
            self._embed(audio, AUDIO), self._embed(text, TEXT), torch.from_numpy(audio), torch.from_numpy(text)
        )

    def pointwise_mutual_information(self, audio_latent: Tensor, text_latent: Tensor) -> Tensor:
        """Exact log p(a, t) - log p(a) - log p(t), the optimal retrieval score in both directions.

        Args:
            audio_latent: `(A, d)`.
            text_latent: `(T, d)`.

        Returns:
            `(T, A)` float64, in nats.
        """
        y_a, y_t = audio_latent.double().numpy(), text_latent.double().numpy()
        d, num_modes = self.latent_dim, self.modes.shape[1]
        mu_a = (self.concepts[:, None] + self.modes).reshape(-1, d)
        mu_t = np.repeat(self.concepts, num_modes, axis=0)
        var_a = self.shared_std**2 + self.audio_noise**2
        var_t = (self.text_gain * self.shared_std) ** 2 + self.text_noise**2
        cov = self.text_gain * self.shared_std**2
        det = var_a * var_t - cov**2
        # C^-1 = [[p_aa, p_at], [p_at, p_tt]]; the exponent has one part a text row, one an audio row, and a cross term
        p_aa, p_tt, p_at = var_t / det, var_a / det, -cov / det
        of_audio = y_a @ (p_aa * mu_a + p_at * mu_t).T - 0.5 * p_aa * _square(y_a)[:, None]
        of_text = y_t @ (p_at * mu_a + p_tt * mu_t).T - 0.5 * p_tt * _square(y_t)[:, None]
        of_text -= 0.5 * (p_aa * _square(mu_a) + p_tt * _square(mu_t) + 2 * p_at * (mu_a * mu_t).sum(1))
        joint = _log_matmul_exp(of_text, of_audio) - p_at * (y_t @ y_a.T)
        joint -= 0.5 * d * math.log(det) + math.log(len(mu_a))
        marginals = _log_mixture(y_a, mu_a, var_a)[None] + _log_mixture(y_t, self.concepts, var_t)[:, None]
        return torch.from_numpy(joint - marginals)

    def _embed(self, latent: np.ndarray, modality: int) -> Tensor:
        """`(N, d)` latents -> `(N, D)` float32 unit rows, some thousands at a time to bound the memory."""
        rows = torch.empty(len(latent), self.second_map.shape[1], dtype=torch.float32)
        for start in range(0, len(latent), CHUNK):
            hidden = np.tanh(latent[start : start + CHUNK] @ self.first_maps[modality])
            raw = hidden @ self.second_map + self.offsets[modality]
            rows[start : start + CHUNK] = torch.from_numpy(raw / np.linalg.norm(raw, axis=1, keepdims=True))
        return rows


def _square(x: np.ndarray) -> np.ndarray:
    return (x**2).sum(1)


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def _log_mixture(y: np.ndarray, means: np.ndarray, variance: float) -> np.ndarray:
    """`(N,)` log density of an even mixture of N(mean, variance I)."""
    distance = _square(y)[:, None] - 2 * y @ means.T + _square(means)[None]
    log_norm = 0.5 * y.shape[1] * math.log(variance) + math.log(len(means))
    return _log_sum_exp(-0.5 * distance / variance) - log_norm


def _log_matmul_exp(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`(N, M)` log sum_c exp(x_nc + y_mc) of `(N, C)`, `(M, C)`; summed in logarithms where the product underflows."""
    top_x, top_y = x.max(1, keepdims=True), y.max(1, keepdims=True)
    product = np.exp(x - top_x) @ np.exp(y - top_y).T
    with np.errstate(divide="ignore"):
        result = np.log(product) + top_x + top_y.T
    rows, columns = np.nonzero(product < 1e-280)
    for start in range(0, len(rows), CHUNK):
        r, c = rows[start : start + CHUNK], columns[start : start + CHUNK]
        result[r, c] = _log_sum_exp(x[r] + y[c])
    return result
