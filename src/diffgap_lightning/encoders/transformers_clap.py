"""`TransformersClapEncoder`: CLAP as Hugging Face's `transformers` has it, `ClapModel`, from a hub id or a folder.

Its feature extractor crops long audio at random and marks a random item of a batch as long, so that a row depends on
its neighbours. Here audio is cut as `waveforms.py` says, the same log-mel spectrogram is computed on the network's own
device, and only recordings that are longer than the model hears are marked so. For audio of at most 10 s the numbers
are those of `ClapModel` after `ClapFeatureExtractor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder, Transform
from diffgap_lightning.encoders.checks import check_at_load, check_vocabulary
from diffgap_lightning.encoders.hub import local_folder
from diffgap_lightning.encoders.optional import need
from diffgap_lightning.encoders.precision import InFloat32
from diffgap_lightning.encoders.texts import check_texts
from diffgap_lightning.encoders.waveforms import FitWaveform, LongAudio, fused_mel, item_means, log_mel
from diffgap_lightning.encoders.weights import loading, weights_digest

EXTRA = "transformers"
_FILES = (
    "config.json",
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json"),
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PATTERNS = ("*.json", "*.txt", "*.safetensors")
_BATCH = 32  # windows at a time
_PREPROCESSING = 1  # raise whenever the same input would give other embeddings


class TransformersClapEncoder(ContrastiveEncoder):
    """`transformers.ClapModel` for audio and text.

    Args:
        model: A folder that `save_pretrained` wrote, or a hub id that is in the cache.
        revision: Branch, tag or commit of a hub id; pin a commit for runs that must repeat.
        long_audio: Of recordings over 10 s, `"mean"` of windows or the `"first"` window; with feature fusion, neither.
        download: Fetch a hub id that is not in the cache.
        safetensors_only: Refuse weights that are stored as pickles.
        check: Look at a few texts after loading (see `checks.py`).

    Raises:
        ImportError: the extra `transformers` is not installed.
        FileNotFoundError: the model is not on disk; the message says how to get it.
        ValueError: not a CLAP model, or a check that failed.
    """

    modalities = ("audio", "text")
    requires = ("transformers", EXTRA)
    model: Any

    def __init__(
        self,
        model: str = "laion/clap-htsat-unfused",
        revision: str | None = None,
        long_audio: LongAudio = "mean",
        download: bool = False,
        safetensors_only: bool = True,
        check: bool = True,
    ) -> None:
        super().__init__()
        if long_audio not in ("mean", "first"):
            raise ValueError(f"long_audio: got {long_audio!r}, expected 'mean' or 'first'")
        transformers: Any = need("transformers", EXTRA)
        weights = _WEIGHTS if safetensors_only else _WEIGHTS + _PICKLES
        patterns = _PATTERNS if safetensors_only else (*_PATTERNS, "*.bin")
        files = (*_FILES, weights)
        folder = local_folder(model, files, extra=EXTRA, revision=revision, download=download, patterns=patterns)
        config = transformers.AutoConfig.from_pretrained(str(folder))
        if config.model_type != "clap":
            raise ValueError(f"{model}: holds a model of type {config.model_type}, expected clap")
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder))
        check_vocabulary(len(self.tokenizer), config.text_config.vocab_size, str(folder))
        # Without the keyword a newer version would take half precision where the file has it.
        safe = True if safetensors_only or not any((folder / name).is_file() for name in _PICKLES) else None
        with loading(str(folder)):
            self.model = transformers.ClapModel.from_pretrained(str(folder), use_safetensors=safe).float()
        self._digest = weights_digest(self.model.state_dict())
        self.fusion: bool = config.audio_config.enable_fusion
        self.dim, self._max_tokens = config.projection_dim, config.text_config.max_position_embeddings - 2
        if self.fusion:
            encoder = self.model.audio_model.audio_encoder
            encoder.patch_embed = InFloat32(encoder.patch_embed)
        self._read_extractor(transformers.ClapFeatureExtractor.from_pretrained(str(folder)), long_audio)
        self.eval().requires_grad_(False)
        if check:
            check_at_load(self)

    @property
    def fingerprint(self) -> str:
        """Digest of the weights, the extractor's settings, version of the preprocessing."""
        kind = "fusion" if self.fusion else "single"
        return f"transformers-clap/{kind}/sha256:{self._digest[:16]}/{self._mel_name}/v{_PREPROCESSING}"

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Tokens of the tokenizer, and tokens that the model knows."""
        return len(self.tokenizer), self.model.config.text_config.vocab_size

    def transform(self, modality: str) -> Transform | None:
        """Cut and repeat waveforms."""
        return self._fit if modality == "audio" else None

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_audio`.

        Raises:
            ValueError: no waveform, or one that is empty or not mono.
        """
        if len(waveforms) == 0:
            raise ValueError("embed_audio: got no waveform, expected at least one")
        device = next(self.parameters()).device
        items = [self._fit(w).to(device, torch.float32) for w in waveforms]
        if self.fusion:
            parts = [self._fused_input(item) for item in items]
            mels, longer = torch.stack([mel for mel, _ in parts]), torch.tensor([[long] for _, long in parts])
            counts = [1] * len(items)
        else:
            windows = torch.cat([item.reshape(-1, self._fit.samples) for item in items])
            mels, longer = self._mel(windows)[:, None], torch.zeros(len(windows), 1, dtype=torch.bool)
            counts = [item.numel() // self._fit.samples for item in items]
        batches = zip(mels.split(_BATCH), longer.to(device).split(_BATCH), strict=True)
        rows = [_pooled(self.model.get_audio_features(input_features=m, is_longer=long)) for m, long in batches]
        return item_means(torch.cat(rows), counts)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `ContrastiveEncoder.embed_text`; texts are cut after the tokens that the model has positions for.

        Raises:
            ValueError: no text, or an empty one.
        """
        check_texts(texts)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        device = next(self.parameters()).device
        inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        return item_means(_pooled(self.model.get_text_features(**inputs)), [1] * len(texts))

    def _mel(self, waveforms: Tensor) -> Tensor:
        return log_mel(waveforms, self.get_buffer("mel_filters"), self._n_fft, self._hop)

    def _fused_input(self, waveform: Tensor) -> tuple[Tensor, bool]:
        return fused_mel(self._mel(waveform[None])[0], self._fit.samples // self._hop + 1)

    def _read_extractor(self, extractor: Any, long_audio: LongAudio) -> None:
        """Take over what `ClapFeatureExtractor` would do, without its randomness."""
        if extractor.padding != "repeatpad":
            raise ValueError(f"feature extractor: pads by {extractor.padding!r}, expected 'repeatpad'")
        self.sample_rate = extractor.sampling_rate
        self._n_fft, self._hop = extractor.fft_window_size, extractor.hop_length
        fused = extractor.truncation == "fusion"
        filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
        self.register_buffer("mel_filters", torch.as_tensor(filters, dtype=torch.float32), persistent=False)
        self._mel_name = (
            f"{'htk' if fused else 'slaney'}{extractor.feature_size}-{extractor.frequency_min:g}-"
            f"{extractor.frequency_max:g}"
        )
        self.window = None if self.fusion else float(extractor.max_length_s)
        whole = "whole" if self.fusion else long_audio
        self._fit = FitWaveform(extractor.nb_max_samples, extractor.sampling_rate, whole)


def _pooled(features: Any) -> Tensor:
    """`(B, D)`: before version 5 the features are this tensor, later they hold it."""
    return features if isinstance(features, Tensor) else features.pooler_output
