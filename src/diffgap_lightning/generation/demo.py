"""What the demo does for a prompt or a video: both versions, and how near they come before and after.

It knows nothing of the page that shows it; see `demo_page.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from diffgap_lightning.data.media import Media, MediaError
from diffgap_lightning.data.mux import playable_suffix, write_video_with_audio
from diffgap_lightning.generation.items import text_item, video_item
from diffgap_lightning.generation.page import SCORES
from diffgap_lightning.generation.rendering import VERSIONS, Renderer, Sound

MAX_PROMPT = 500  # characters
_KEPT = 8  # requests whose videos stay on disk


class Demo:
    """What the demo's buttons call.

    Args:
        renderer: Makes the sounds; its settings hold but for strength and seed.
        folder: Where videos are written for the browser to fetch.
    """

    def __init__(self, renderer: Renderer, folder: Path) -> None:
        self.renderer, self._folder = renderer, folder
        self._requests = 0

    def text(self, prompt: str, strength: float, seed: float) -> tuple[list[Sound], str]:
        """All versions of a prompt's sound, and the table of similarities.

        Raises:
            ValueError: an empty or too long prompt.
        """
        if not prompt.strip():
            raise ValueError("Write what should be heard.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT} are taken.")
        item = text_item(prompt)
        sounds = self._adjusted(strength, seed).texts([item.text], [item.key])[0]
        return sounds, self.similarities(sounds, "prompt")

    def video(self, path: str, strength: float, seed: float) -> tuple[list[Path], list[Sound], str]:
        """Videos with the sound of each version, the sounds, and the table of similarities.

        Raises:
            ValueError: no video, or one that is too long or cannot be decoded.
        """
        if not path:
            raise ValueError("Choose a video.")
        try:
            return self._video(Path(path), strength, seed)
        except MediaError as error:
            raise ValueError(f"The video cannot be used: {error}.") from error

    def _video(self, path: Path, strength: float, seed: float) -> tuple[list[Path], list[Sound], str]:
        item = video_item(path)
        sounds = self._adjusted(strength, seed).video_sounds(Media(path), item.key)
        self._requests += 1
        stem = f"{self._requests % _KEPT}"
        files = [
            write_video_with_audio(
                self._folder / f"{stem}-{sound.version}{playable_suffix(path)}",
                path, sound.waveforms[0], self.renderer.generator.sample_rate,
            )
            for sound in sounds
        ]  # fmt: skip
        return files, sounds, self.similarities(sounds, "video")

    def similarities(self, sounds: Sequence[Sound], asked: str) -> str:
        """A Markdown table: of conditions to the centre of audio embeddings, and of sounds to what was `asked` for."""
        names = " | ".join(VERSIONS[sound.version] for sound in sounds)
        lines = [f"| similarity | {names} |", "|---|" + "---|" * len(sounds)]
        if self.renderer.refiner is not None:
            centre = self.renderer.refiner.space.mean("audio").float().cpu()
            values = [float(torch.cosine_similarity(s.conditions, centre[None], dim=1).mean()) for s in sounds]
            lines.append(_row("condition to the centre of audio embeddings", values))
        for name in [name for name in SCORES if all(name in sound.scores[0] for sound in sounds)]:
            label = {"clap": f"sound to {asked} (CLAP)", "refiner": f"sound to {asked}, the refiner's score"}[name]
            lines.append(_row(label, [sound.scores[0][name] for sound in sounds]))
        return "\n".join(lines)

    def _adjusted(self, strength: float, seed: float) -> Renderer:
        settings = self.renderer.settings
        refine = replace(settings.refine, strength=float(strength))
        return self.renderer.with_settings(replace(settings, refine=refine, seed=int(seed or 0)))


def _row(label: str, values: Sequence[float]) -> str:
    return f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
