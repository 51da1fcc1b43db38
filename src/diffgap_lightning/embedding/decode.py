"""One clip to the inputs of an encoder: what data-loading workers do, and all that they need of the encoder.

Long media are cut in windows (`data.windows`):

    windows "all"     every window is a row; all rows of a clip share its id, so all are positives of each other
    windows "mean"    one row a clip: the normalised mean of its windows' embeddings
    windows "first"   one row a clip: its first window

A clip counts only if every modality asked for can be had; otherwise it is skipped with its reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.catalog import Clip
from diffgap_lightning.data.media import Media, MediaError, MediaLimits, need
from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.data.video import video_windows
from diffgap_lightning.encoders.base import ContrastiveEncoder

WINDOWS = ("all", "mean", "first")
_PACKAGES = {"audio": ("soundfile", "av", "torchaudio.transforms"), "video": ("av",)}


@dataclass(frozen=True)
class EmbedSettings:
    """What decides the rows that a corpus gives, beside the encoder.

    Args:
        modalities: Which of `"audio"`, `"text"`, `"video"`.
        window: In s; None takes clips whole.
        hop: In s; `window` by default.
        windows: `"all"`, `"mean"` or `"first"`.
        template: Put around every text, e.g. `"This is a sound of {}."`.
        limits: What one medium may cost.

    Raises:
        ValueError: an unknown policy or a template without `{}`.
    """

    modalities: tuple[str, ...]
    window: float | None = None
    hop: float | None = None
    windows: str = "all"
    template: str = "{}"
    limits: MediaLimits = field(default_factory=lambda: MediaLimits(max_seconds=600.0))

    def __post_init__(self) -> None:
        """Check the policy and the template."""
        if not self.modalities:
            raise ValueError("modalities: none; give at least one of audio, text, video")
        if self.windows not in WINDOWS:
            raise ValueError(f"windows: got {self.windows!r}, expected {', '.join(WINDOWS)}")
        if self.template.count("{}") != 1:
            raise ValueError(f"template: got {self.template!r}, expected text with one {{}} for the caption")
        for name in ("window", "hop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value} s, expected a positive number of seconds")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"modalities": list(self.modalities)}


@dataclass
class DecodedClip:
    """An encoder's inputs for one clip.

    Attributes:
        id: The clip's.
        items: Modality -> texts, or one tensor a window.
        starts: Modality -> seconds from the clip's beginning, one an item; 0 for texts.
    """

    id: str
    items: dict[str, list[Any]]
    starts: dict[str, list[float]]


class ClipDecoder:
    """Decodes clips for one encoder; it pickles without the encoder's weights.

    Args:
        settings: Modalities and windows.
        encoder: Gives sample rate, frame rate and transforms.

    Raises:
        ValueError: a modality that the encoder does not have.
        ImportError: a package of the extra `media` is missing.
    """

    def __init__(self, settings: EmbedSettings, encoder: ContrastiveEncoder) -> None:
        for modality in settings.modalities:
            if modality not in encoder.modalities:
                raise ValueError(
                    f"{type(encoder).__name__} embeds {', '.join(encoder.modalities)}, got {modality}; choose others"
                )
            for package in _PACKAGES.get(modality, ()):
                need(package)
        self.settings = settings
        self._sample_rate, self._fps = encoder.sample_rate, encoder.fps
        self._frames: dict[str, Any] = {"phase": encoder.frame_phase, "short_side": encoder.frame_size}
        self._transforms = {m: encoder.transform(m) for m in settings.modalities}

    def __call__(self, clip: Clip) -> DecodedClip | Skip:
        """Decode a clip, or say why not."""
        items: dict[str, list[Any]] = {}
        starts: dict[str, list[float]] = {}
        for modality in self.settings.modalities:
            try:
                pairs = self._texts(clip) if modality == "text" else self._windows(clip, modality)
            except ImportError:
                raise
            except Exception as error:  # whatever a decoder makes of a broken file, the run goes on and counts it
                reason = str(error) if isinstance(error, MediaError) else f"{type(error).__name__}: {error}"
                return Skip(clip.id, f"{modality}: {' '.join(reason.split())}", _path(clip, modality))
            starts[modality] = [start for start, _ in pairs]
            items[modality] = [item for _, item in pairs]
        return DecodedClip(clip.id, items, starts)

    def _texts(self, clip: Clip) -> list[tuple[float, str]]:
        if not clip.texts:
            raise MediaError("none")
        return [(0.0, self.settings.template.replace("{}", text)) for text in clip.texts]

    def _windows(self, clip: Clip, modality: str) -> list[tuple[float, Tensor]]:
        media: Media | None = clip.audio if modality == "audio" else clip.video
        if media is None:
            raise MediaError("no file found")
        settings = self.settings
        cut: dict[str, Any] = {"first_only": settings.windows == "first", "limits": settings.limits}
        if modality == "audio":
            assert self._sample_rate is not None
            windows = audio_windows(media, self._sample_rate, settings.window, settings.hop, **cut)
        else:
            assert self._fps is not None
            windows = video_windows(media, self._fps, settings.window, settings.hop, **cut, **self._frames)
        transform = self._transforms[modality]
        return [(start, item if transform is None else transform(item)) for start, item in windows]


def _path(clip: Clip, modality: str) -> str:
    media: Media | None = getattr(clip, modality, None)
    return "" if media is None or isinstance(media.source, bytes) else str(media.source)
