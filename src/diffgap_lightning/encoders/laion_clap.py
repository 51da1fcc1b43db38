"""`LaionClapEncoder`: LAION-CLAP (Wu et al. 2023, arXiv 2211.06687) from its published checkpoints.

Audio: 48 kHz mono through an HTSAT transformer over log-mel spectrograms of 10 s; text: RoBERTa, at most 77 tokens;
both projected to 512 dimensions. The network is the package laion-clap's own. What surrounds it is ours, because there
it crops at random, downloads at import, unpickles code and takes a broken tokenizer without a word:

- audio is cut and repeated as `waveforms.py` says, and quantised to 16 bits as the authors do;
- spectrograms are computed in float32 also under autocast;
- checkpoint and tokenizer come from local files unless a download is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder, Transform
from diffgap_lightning.encoders.checks import check_at_load, check_vocabulary
from diffgap_lightning.encoders.hub import ALLOW, cached_file, download_file, local_folder
from diffgap_lightning.encoders.laion_network import EXTRA, audio_model, has_fusion, load_clap
from diffgap_lightning.encoders.optional import need, package_folder
from diffgap_lightning.encoders.precision import InFloat32
from diffgap_lightning.encoders.texts import check_texts
from diffgap_lightning.encoders.waveforms import FitWaveform, LongAudio, fused_mel, item_means, log_mel
from diffgap_lightning.encoders.weights import read_weights, weights_digest

CHECKPOINTS = (
    "630k-best",
    "630k-audioset-best",
    "630k-fusion-best",
    "630k-audioset-fusion-best",
    "music_audioset_epoch_15_esc_90.14",
    "music_speech_epoch_15_esc_89.25",
    "music_speech_audioset_epoch_15_esc_89.98",
)
REPOSITORY = "lukewys/laion_clap"
_TOKENIZER_FILES = (("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt"))
_TOKENS = 77
_BATCH = 32  # windows at a time
_PREPROCESSING = 1  # raise whenever the same input would give other embeddings


class LaionClapEncoder(ContrastiveEncoder):
    """LAION-CLAP for audio and text.

    Args:
        checkpoint: A published name (see `CHECKPOINTS`) or a local `.pt` or `.safetensors` file.
        fusion: Whether the checkpoint must have feature fusion; None takes what it has.
        tokenizer: A folder with RoBERTa's `vocab.json` and `merges.txt`, or a hub id in the cache.
        folder: Where a published checkpoint may lie, searched first.
        long_audio: Of recordings over 10 s, `"mean"` of windows or the `"first"` window; with fusion, neither.
        download: Fetch a checkpoint and tokenizer that are not on disk.
        check: Look at a few texts after loading (see `checks.py`).

    Raises:
        ImportError: the extra `laion-clap` is not installed.
        FileNotFoundError: the checkpoint or tokenizer is not on disk; the message says where to get it.
        ValueError: a file that is no such checkpoint, or a check that failed.
    """

    modalities = ("audio", "text")
    requires = ("laion_clap", EXTRA)
    sample_rate = 48000
    model: Any

    def __init__(
        self,
        checkpoint: str = "630k-audioset-best",
        fusion: bool | None = None,
        tokenizer: str = "roberta-base",
        folder: str | None = None,
        long_audio: LongAudio = "mean",
        download: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        package_folder("laion_clap", EXTRA)  # refuse before 2 GB are read
        if long_audio not in ("mean", "first"):
            raise ValueError(f"long_audio: got {long_audio!r}, expected 'mean' or 'first'")
        path = find_checkpoint(checkpoint, folder, download)
        state = read_weights(path)
        self.fusion = has_fusion(state)
        if fusion is not None and fusion != self.fusion:
            has = "has" if self.fusion else "has no"
            raise ValueError(f"{path}: {has} feature fusion, got fusion={fusion}; choose another checkpoint")
        self.tokenizer = load_tokenizer(tokenizer, download)
        check_vocabulary(len(self.tokenizer), len(state["text_branch.embeddings.word_embeddings.weight"]), tokenizer)
        self._name = f"laion-clap/{audio_model(state)}{'-fusion' if self.fusion else ''}"
        self.model = load_clap(state)
        # Hashed as loaded, so that constants which only some versions store do not count.
        self._digest = weights_digest(self.model.state_dict())
        config: Any = self.model.audio_cfg
        self.dim, self._n_fft, self._hop = self.model.joint_embed_shape, config.window_size, config.hop_size
        self.window = None if self.fusion else config.clip_samples / self.sample_rate
        self._fit = FitWaveform(config.clip_samples, self.sample_rate, "whole" if self.fusion else long_audio)
        self._keep_front_end_exact()
        self.eval().requires_grad_(False)
        if check:
            check_at_load(self)

    @property
    def fingerprint(self) -> str:
        """Architecture, digest of the weights, version of the preprocessing."""
        return f"{self._name}/sha256:{self._digest[:16]}/v{_PREPROCESSING}"

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Tokens of the tokenizer, and tokens that the model knows."""
        return len(self.tokenizer), self.model.text_branch.embeddings.word_embeddings.num_embeddings

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
            inputs = [self._fused_input(quantise(item)) for item in items]
            batches = [inputs[i : i + _BATCH] for i in range(0, len(inputs), _BATCH)]
            return item_means(torch.cat([self.model.get_audio_embedding(b) for b in batches]), [1] * len(items))
        windows = torch.cat([item.reshape(-1, self._fit.samples) for item in items])
        rows = [self.model.get_audio_embedding([{"waveform": x} for x in quantise(w)]) for w in windows.split(_BATCH)]
        return item_means(torch.cat(rows), [item.numel() // self._fit.samples for item in items])

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `ContrastiveEncoder.embed_text`; texts are cut after 77 tokens.

        Raises:
            ValueError: no text, or an empty one.
        """
        check_texts(texts)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
        )  # masked padding does not change a row, so the longest text decides instead of 77 tokens always
        rows = self.model.get_text_embedding({key: tokens[key] for key in ("input_ids", "attention_mask")})
        return item_means(rows, [1] * len(texts))

    def _fused_input(self, waveform: Tensor) -> dict[str, Tensor]:
        frames = self._fit.samples // self._hop + 1
        mel = log_mel(waveform[None], self.get_buffer("mel_filters"), self._n_fft, self._hop)[0]
        fused, longer = fused_mel(mel, frames)
        return {"mel_fusion": fused, "longer": torch.tensor([longer], device=waveform.device)}

    def _keep_front_end_exact(self) -> None:
        """Spectrograms in float32; the fused models' filters, which the authors take from torchaudio."""
        branch, config = self.model.audio_branch, self.model.audio_cfg
        if not self.fusion:
            branch.spectrogram_extractor = InFloat32(branch.spectrogram_extractor)
            branch.logmel_extractor = InFloat32(branch.logmel_extractor)
            return
        functional: Any = need("torchaudio.functional", EXTRA)
        branch.patch_embed = InFloat32(branch.patch_embed)
        filters = functional.melscale_fbanks(
            self._n_fft // 2 + 1, config.fmin, config.fmax, config.mel_bins, config.sample_rate
        )
        self.register_buffer("mel_filters", filters, persistent=False)


def quantise(waveform: Tensor) -> Tensor:
    """Round towards zero to 16 bits, as the authors' training data were."""
    return (waveform.clamp(-1.0, 1.0) * 32767.0).trunc() / 32767.0


def find_checkpoint(name: str, folder: str | None = None, download: bool = False) -> Path:
    """The file of a checkpoint: a path, or a published name looked up on this machine.

    Raises:
        FileNotFoundError: not there; the message lists the places and the address.
        ConnectionError: a download was asked for and the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    published = name.removesuffix(".pt")
    if published not in CHECKPOINTS:
        raise FileNotFoundError(f"checkpoint: no file {name}, and the published ones are {', '.join(CHECKPOINTS)}")
    file = f"{published}.pt"
    places = [Path(torch.hub.get_dir()) / "checkpoints", package_folder("laion_clap", EXTRA)]
    places = [Path(folder).expanduser(), *places] if folder else places
    for place in places:
        for candidate in (place / file, place / f"{published}.safetensors"):
            if candidate.is_file():
                return candidate
    if cached := cached_file(REPOSITORY, file, EXTRA):
        return cached
    if download:
        return download_file(REPOSITORY, file, EXTRA)
    raise FileNotFoundError(
        f"checkpoint {file}: not in {', '.join(map(os.fspath, places))}, nor in the hub cache; fetch "
        f"https://huggingface.co/{REPOSITORY}/resolve/main/{file} into one of them, give its path as checkpoint, or "
        f"{ALLOW}"
    )


def load_tokenizer(tokenizer: str, download: bool = False) -> Any:
    """RoBERTa's tokenizer from a folder or the hub cache.

    Raises:
        FileNotFoundError: its files are not there.
    """
    names = [tokenizer, *(["FacebookAI/roberta-base"] if tokenizer == "roberta-base" else [])]
    errors = []
    for name in names:
        try:
            path = local_folder(name, _TOKENIZER_FILES, extra=EXTRA, download=download and name == names[-1])
        except FileNotFoundError as error:
            errors.append(error)
        else:
            return need("transformers", EXTRA).RobertaTokenizer.from_pretrained(str(path))
    raise FileNotFoundError(f"tokenizer {errors[0]}") from errors[0]
