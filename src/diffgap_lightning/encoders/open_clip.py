"""`OpenClipEncoder`: CLIP and its relatives from the package `open_clip`, for images, video frames and text.

A video is its frames at `fps`: one unit row each, `(B, T, D)`, or their normalised mean, `(B, D)`. Resizing and
cropping are the model's own (`preprocess_val`) and run in data-loading workers, which hand on 8-bit pixels; scaling and
normalising them is left to the network's device. Together they are exactly open_clip's preprocessing.

Where the weights are is `open_clip_files.py`'s question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diffgap_lightning.encoders.base import ContrastiveEncoder, Transform
from diffgap_lightning.encoders.checks import check_at_load
from diffgap_lightning.encoders.open_clip_files import EXTRA, find_model, offline_unless, text_tower_missing
from diffgap_lightning.encoders.optional import need
from diffgap_lightning.encoders.texts import check_texts
from diffgap_lightning.encoders.waveforms import item_means
from diffgap_lightning.encoders.weights import loading, weights_digest

_BATCH = 64  # frames at a time
_PREPROCESSING = 1  # raise whenever the same input would give other embeddings


class OpenClipEncoder(ContrastiveEncoder):
    """A model of `open_clip` for images, videos and texts.

    Args:
        model: An architecture such as `ViT-B-32`, `hf-hub:owner/name`, or a folder with `open_clip_config.json`.
        pretrained: Of an architecture: a tag of open_clip such as `laion2b_s34b_b79k`, or a local weight file.
        weights: A local file that holds the weights of the tag; the tag still decides the preprocessing.
        fps: Frames a second that are taken of videos.
        download: Fetch weights that are not on disk.
        check: Look at a few texts after loading (see `checks.py`).

    Raises:
        ImportError: the extra `open-clip` is not installed.
        FileNotFoundError: the weights are not on disk; the message says where to get them.
        ValueError: an unknown model or tag, or a check that failed.
    """

    modalities = ("image", "text", "video")
    requires = ("open_clip", EXTRA)
    model: Any
    sequence_modalities = ("video",)

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "laion2b_s34b_b79k",
        weights: str | None = None,
        fps: float = 4.0,
        download: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        if not fps > 0:
            raise ValueError(f"fps: got {fps}, expected a positive number of frames a second")
        open_clip: Any = need("open_clip", EXTRA)
        self.fps = fps
        with offline_unless(download):
            name, source, file = find_model(open_clip, model, pretrained, weights, download)
            # The tag's entry decides the preprocessing; its weights are the file found above.
            with mock.patch.object(open_clip.factory, "download_pretrained", return_value=str(file)), loading(name):
                try:
                    self.model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=source)
                    self.tokenizer: Any = open_clip.get_tokenizer(name)
                except OSError as error:
                    raise FileNotFoundError(text_tower_missing(open_clip, name)) from error
        self._digest = weights_digest(self.model.state_dict())
        self._settings = _settings_digest(open_clip.get_model_preprocess_cfg(self.model))
        geometry, mean, std, size = split_preprocess(preprocess, self.model)
        self._frames = PrepareFrames(tuple(geometry), size)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval().requires_grad_(False)
        self.dim = int(self.embed_text(["a sound"]).shape[1])
        if check:
            check_at_load(self)

    @property
    def fingerprint(self) -> str:
        """Digests of the weights and of the preprocessing's settings, version of the preprocessing."""
        size = "x".join(map(str, dict.fromkeys(self._frames.size)))
        return f"open-clip/{size}px-{self._settings[:8]}/sha256:{self._digest[:16]}/v{_PREPROCESSING}"

    @property
    def vocabulary(self) -> tuple[int, int] | None:
        """Tokens of the tokenizer, and tokens that the model knows."""
        known = [m.num_embeddings for name, m in self.model.named_modules() if _is_token_table(name, m)]
        inner = getattr(self.tokenizer, "tokenizer", None)
        tokens = len(inner) if inner is not None else getattr(self.tokenizer, "vocab_size", None)
        return (int(tokens), known[0]) if known and tokens is not None else None

    def transform(self, modality: str) -> Transform | None:
        """Resize and crop pictures."""
        return self._frames if modality in ("image", "video") else None

    @torch.no_grad()
    def embed_image(self, images: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_image`.

        Raises:
            ValueError: no image, or one of another shape or dtype.
        """
        return item_means(self._embed(images, "image"), [1] * len(images))

    @torch.no_grad()
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_video`: the normalised mean over frames.

        Raises:
            ValueError: no clip, or one of another shape or dtype.
        """
        return item_means(self._embed(clips, "video"), [len(clip) for clip in clips])

    @torch.no_grad()
    def embed_sequence(self, modality: str, items: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_sequence`: frames of video, at `fps`."""
        if modality not in self.sequence_modalities:
            return super().embed_sequence(modality, items)
        lengths = {len(clip) for clip in items}
        if len(lengths) > 1:
            raise ValueError(f"embed_sequence: clips of {min(lengths)} to {max(lengths)} frames, expected one length")
        rows = self._embed(items, "video")
        return item_means(rows, [1] * len(rows)).unflatten(0, (len(items), -1))

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `ContrastiveEncoder.embed_text`; texts are cut after the model's context.

        Raises:
            ValueError: no text, or an empty one.
        """
        check_texts(texts)
        rows = self.model.encode_text(self.tokenizer(list(texts)).to(self.get_buffer("mean").device))
        return item_means(rows, [1] * len(texts))

    def _embed(self, items: Sequence[Tensor], modality: str) -> Tensor:
        """Rows of all frames of all items, one after the other."""
        if len(items) == 0:
            raise ValueError(f"embed_{modality}: got nothing, expected at least one {modality}")
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        pixels = torch.cat([self._frames(check_pixels(x, modality)).reshape(-1, 3, *self._frames.size) for x in items])
        rows = []
        for chunk in pixels.split(_BATCH):
            x = chunk.to(mean.device, non_blocking=True).float().div(255).sub(mean).div(std)
            rows.append(self.model.encode_image(x))
        return torch.cat(rows)


@dataclass(frozen=True)
class PrepareFrames:
    """A model's resizing and cropping; for data-loading workers. Applied twice it changes nothing.

    Args:
        geometry: What open_clip applies to a PIL image before it becomes a tensor.
        size: (height, width) of the result.
    """

    geometry: tuple[Callable[[Any], Any], ...]
    size: tuple[int, int]

    def __call__(self, frames: Tensor) -> Tensor:
        """`([T,] 3, H, W)` uint8 -> `([T,] 3, *size)` uint8."""
        if frames.shape[-2:] == self.size:
            return frames
        if frames.ndim == 4:
            return torch.stack([self(frame) for frame in frames])
        functional: Any = need("torchvision.transforms.functional", EXTRA)
        image = functional.to_pil_image(frames.cpu())
        for step in self.geometry:
            image = step(image)
        return functional.pil_to_tensor(image).to(frames.device)


def check_pixels(pixels: Tensor, modality: str) -> Tensor:
    """The pixels as they are.

    Raises:
        ValueError: not 8-bit RGB frames.
    """
    ndim = 3 if modality == "image" else 4
    if pixels.dtype != torch.uint8 or pixels.ndim != ndim or pixels.shape[-3] != 3 or 0 in pixels.shape:
        shape = "(3, H, W)" if ndim == 3 else "(T, 3, H, W)"
        raise ValueError(f"{modality}: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 RGB {shape}")
    return pixels


def split_preprocess(preprocess: Any, model: Any) -> tuple[list[Any], Tensor, Tensor, tuple[int, int]]:
    """The part of open_clip's preprocessing before pixels become a tensor, and mean, std and size of the rest.

    Raises:
        ValueError: it has another form.
    """
    steps = list(getattr(preprocess, "transforms", ()))
    names = [type(step).__name__ for step in steps]
    if len(steps) < 3 or not names[-2].endswith("ToTensor") or names[-1] != "Normalize":
        raise ValueError(f"preprocessing of this model is {', '.join(names)}, expected ... ToTensor, Normalize")
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (torch.tensor(getattr(steps[-1], name)).float()[:, None, None] for name in ("mean", "std"))
    return steps[:-2], mean, std, (height, width)


def _is_token_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and name.rpartition(".")[2] in (
        "token_embedding",
        "word_embeddings",
        "shared",
    )


def _settings_digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
