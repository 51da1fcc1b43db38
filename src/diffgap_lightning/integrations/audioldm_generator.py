"""The `audioldm` package's `LatentDiffusion` as an `EmbeddingGenerator`.

Its own `generate_sample` takes texts, draws its noise from the global generator and adds more at every step (eta = 1).
Here the same parts are called with a given condition, a given x_T a row and eta = 0 (deterministic DDIM), so that two
versions of a sound differ by their conditions alone.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.integrations.audioldm import load_audioldm, repaired
from diffgap_lightning.integrations.generator import check_request, fit_length
from diffgap_lightning.integrations.seam import class_names

MODEL_NAMES = (
    "audioldm-s-full", "audioldm-s-full-v2", "audioldm-s-text-ft", "audioldm-m-text-ft", "audioldm-m-full",
    "audioldm-l-full",
)  # fmt: skip
_FRAMES = 25.6  # latent frames a second
_SAMPLES = 640  # of a latent frame
_STEPS, _GUIDANCE = 200, 2.5  # the package's own defaults


class AudioLDMGenerator:
    """See `EmbeddingGenerator`.

    Args:
        model: A `LatentDiffusion` of the audioldm package, in evaluation mode.
        name: For records.

    Raises:
        ValueError: another class.
    """

    sample_rate, dim, native_seconds = 16000, 512, 10.0

    def __init__(self, model: Any, name: str = "audioldm") -> None:
        if "audioldm.LatentDiffusion" not in class_names(model):
            raise ValueError(f"got a {type(model).__name__}, expected a LatentDiffusion of the audioldm package")
        self.model, self.name = model, name
        levels = len(getattr(model.model.diffusion_model, "channel_mult", (1, 1, 1, 1)))
        self._multiple = 2 ** (levels - 1)  # the UNet halves the frames so often

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `EmbeddingGenerator.embed_text`."""
        with self._in_peace():
            return normalize(self.model.get_learned_conditioning(list(texts))[:, 0].float(), dim=1).cpu()

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        *,
        seconds: float,
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """See `EmbeddingGenerator.generate`; `texts` is not needed."""
        check_request(self, embeddings, seconds, seeds)
        model, count = self.model, len(embeddings)
        device = next(model.parameters()).device
        frames = math.ceil(seconds * _FRAMES / self._multiple) * self._multiple
        shape = (model.channels, frames, model.latent_f_size)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        scale = _GUIDANCE if guidance_scale is None else guidance_scale
        with self._in_peace(), model.ema_scope():
            unconditional = None
            if scale != 1.0 and negative_prompt is None:
                unconditional = model.cond_stage_model.get_unconditional_condition(count)
            elif scale != 1.0:
                unconditional = model.get_learned_conditioning([negative_prompt] * count)
            before, model.latent_t_size = model.latent_t_size, frames
            try:
                latents, _ = model.sample_log(
                    cond=embeddings[:, None].to(device),
                    batch_size=count,
                    ddim=True,
                    ddim_steps=num_steps or _STEPS,
                    x_T=noise.to(device),
                    eta=0.0,
                    unconditional_guidance_scale=scale,
                    unconditional_conditioning=unconditional,
                )
            finally:
                model.latent_t_size = before
            if float(latents.abs().max()) > 1e2:
                latents = latents.clip(-10, 10)  # as the package does
            waveforms = model.mel_spectrogram_to_waveform(model.decode_first_stage(latents))
        return fit_length(torch.as_tensor(waveforms).float().flatten(1), round(seconds * self.sample_rate))

    @contextlib.contextmanager
    def _in_peace(self) -> Iterator[None]:
        """The package obeys every prompt, draws from no global generator that others use and prints nothing."""
        sink = io.StringIO()
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            repaired(self.model),
            torch.random.fork_rng(),
        ):
            yield


def load_audioldm_generator(checkpoint: str, device: torch.device) -> AudioLDMGenerator:
    """Load a checkpoint file of the package, whose name says which of `MODEL_NAMES` it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not named after a model, or does not fit it.
        ImportError: the extra `audioldm` is not installed.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint}: not found; expected a checkpoint file of the audioldm package")
    if path.stem not in MODEL_NAMES:
        raise ValueError(f"{checkpoint}: its name must say what it is: {', '.join(MODEL_NAMES)}, and .ckpt")
    with contextlib.redirect_stdout(io.StringIO()):
        model = load_audioldm(path, path.stem, device)
    return AudioLDMGenerator(model, name=path.stem)
