"""The `audioldm` package's `LatentDiffusion`, and so its `text_to_audio`, `style_transfer` and inpainting.

`get_learned_conditioning(texts)` gives the condition `(B, 1, 512)`; guidance asks `get_unconditional_condition`, and
reranking runs the encoder itself, so neither sees the refiner. `generate_sample` tiles the condition for its candidates
afterwards: with `per_candidate` it is refined there, in `sample_log`.

The package (0.1.1) as it is drops one prompt in ten, also when generating, and runs on CUDA alone. `repaired` lifts
both for a while without editing it, and `attach` does so too; `load_audioldm` reads checkpoints that recent
transformers would refuse.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.encoders.weights import read_weights
from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.seam import Seam, class_names, override

_POSITION_IDS = "cond_stage_model.model.text_branch.embeddings.position_ids"
_DIM = 512
_users: list[Any] = []  # the package's own function, then an entry for each who has it replaced


def find(generator: Any) -> Seam | None:
    """The seam of a `LatentDiffusion` of the audioldm package, else None."""
    if "audioldm.LatentDiffusion" not in class_names(generator):
        return None
    encoder = f"CLAP with {getattr(generator.cond_stage_model, 'amodel', 'an unknown audio branch')}"
    return Seam("audioldm's LatentDiffusion", _DIM, encoder, partial(_patch, generator))


@contextmanager
def repaired(model: Any) -> Iterator[None]:
    """Let a `LatentDiffusion` obey every prompt and run where it is, not on CUDA alone; afterwards all is as it was.

    Args:
        model: The package's `LatentDiffusion`.
    """
    encoder = model.cond_stage_model
    rank = encoder.cos_similarity

    def cos_similarity(waveform: Tensor, text: list[str]) -> Tensor:
        return rank(waveform.to(_device(model)).as_subclass(_Here), text)

    with (
        override(encoder, "unconditional_prob", 0.0),
        override(encoder, "cos_similarity", cos_similarity, mark=False),
        _samplers_here(),
    ):
        yield


@contextmanager
def _samplers_here() -> Iterator[None]:
    """Samplers keep their schedules where the model is. The class is shared: the last to leave puts it back."""
    from audioldm.latent_diffusion.ddim import DDIMSampler

    def register_buffer(sampler: Any, name: str, value: Any) -> None:
        setattr(sampler, name, value.to(_device(sampler.model)) if isinstance(value, Tensor) else value)

    if not _users:
        _users.append(DDIMSampler.register_buffer)
        DDIMSampler.register_buffer = register_buffer
    _users.append(None)
    try:
        yield
    finally:
        _users.pop()
        if len(_users) == 1:
            DDIMSampler.register_buffer = _users.pop()


@contextmanager
def _patch(model: Any, condition: Conditioner) -> Iterator[None]:
    encode, sample = model.get_learned_conditioning, model.sample_log
    later = False  # whether sample_log will get these embeddings, tiled

    def refines() -> bool:  # an audio prompt has no gap to audio
        return getattr(model.cond_stage_model, "embed_mode", condition.source) == condition.source

    def get_learned_conditioning(c: Any) -> Tensor:
        out = encode(c)
        if later or not refines():
            return out
        return condition.tiled(out, c if isinstance(c, list) else None)

    def sample_log(cond: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sample(condition(cond) if later and refines() else cond, *args, **kwargs)

    def tiling(plain: Any) -> Any:
        def generate(*args: Any, **kwargs: Any) -> Any:
            nonlocal later
            call = inspect.signature(plain).bind(*args, **kwargs)
            later = condition.per_candidate and call.arguments.get("n_candidate_gen_per_text", 1) > 1
            try:
                return plain(*args, **kwargs)
            finally:
                later = False

        return generate

    with ExitStack() as stack:
        stack.enter_context(override(model, "get_learned_conditioning", get_learned_conditioning))
        stack.enter_context(override(model, "sample_log", sample_log))
        for name in ("generate_sample", "generate_sample_masked"):
            stack.enter_context(override(model, name, tiling(getattr(model, name))))
        stack.enter_context(repaired(model))
        yield


def load_audioldm(
    checkpoint: str | os.PathLike[str],
    model_name: str = "audioldm-s-full",
    device: str | torch.device = "cpu",
    config: dict[str, Any] | None = None,
) -> Any:
    """Build the package's `LatentDiffusion` from a local checkpoint, as its own `build_model` would on older versions.

    Args:
        checkpoint: A `.ckpt` file of the package.
        model_name: Which of the package's models it is.
        device: Where to put it.
        config: The package's configuration instead of that of `model_name`.

    Returns:
        The model in evaluation mode, conditioned on text.

    Raises:
        ModuleNotFoundError: without the package; the message names the extra.
        FileNotFoundError: no such file.
        ValueError: a file that holds more than tensors or does not fit the model, or a tokenizer without a vocabulary.
    """
    try:
        from audioldm import LatentDiffusion
        from audioldm.utils import default_audioldm_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("audioldm: not installed; pip install 'diffgap-lightning[audioldm]'") from error
    state = read_weights(Path(checkpoint))
    params = dict((config or default_audioldm_config(model_name))["model"]["params"])
    params |= {"device": torch.device(device), "cond_stage_key": "text"}
    model = LatentDiffusion(**params).eval()
    _check_tokenizer(model.cond_stage_model)
    if _POSITION_IDS not in model.state_dict():
        state = {k: v for k, v in state.items() if k != _POSITION_IDS}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ValueError(f"{checkpoint}: does not fit {model_name} ({detail:.300})") from error
    model.cond_stage_model.embed_mode = "text"
    return model.to(device)


def _check_tokenizer(encoder: Any) -> None:
    """Offline, transformers gives a vocabulary of five tokens without an error: all prompts would encode alike."""
    rows = encoder.tokenizer(["rain", "a dog"])["input_ids"]
    if torch.equal(rows[0], rows[1]):
        raise ValueError(
            'the tokenizer "roberta-base" has no vocabulary: all prompts encode alike. Download it once (unset '
            "HF_HUB_OFFLINE), or put it into a folder roberta-base in the working directory"
        )


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


class _Here(torch.Tensor):
    """A tensor that stays where it is when it is told to go to CUDA."""

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(torch.Tensor)
