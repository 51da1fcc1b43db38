"""The demo: a prompt or a video in a browser, both versions out, and how near they come before and after.

The server listens on the loopback interface alone, takes one request at a time, limits the size and the duration of
uploads and the length of prompts, and asks no other server for anything: Gradio's analytics are off and its theme uses
the system's fonts. Gradio is the optional extra `demo`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.media import Media, MediaError
from diffgap_lightning.data.mux import playable_suffix, write_video_with_audio
from diffgap_lightning.encoders.optional import need

from .items import text_item, video_item
from .page import SCORES
from .rendering import VERSIONS, Renderer, Sound
from .spectrogram import spectrogram_pngs

HOST = "127.0.0.1"
_MAX_PROMPT = 500  # characters
_KEPT = 8  # requests whose videos stay on disk
_FONTS = ["system-ui", "sans-serif"]


class Demo:
    """What the demo's buttons call; it knows nothing of Gradio.

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
        if len(prompt) > _MAX_PROMPT:
            raise ValueError(f"The prompt has {len(prompt)} characters; at most {_MAX_PROMPT} are taken.")
        item = text_item(prompt)
        sounds = self._adjusted(strength, seed).texts([item.text], [item.key])[0]
        return sounds, self.similarities(sounds)

    def video(self, path: str, strength: float, seed: float) -> tuple[list[Path], list[Sound], str]:
        """Videos with the sound of each version, the sounds, and the table of similarities.

        Raises:
            ValueError: no video.
            MediaError: it cannot be used.
        """
        if not path:
            raise ValueError("Choose a video.")
        item = video_item(Path(path))
        sounds = self._adjusted(strength, seed).video_sounds(Media(Path(path)), item.key)
        self._requests += 1
        stem = f"{self._requests % _KEPT}"
        files = [
            write_video_with_audio(
                self._folder / f"{stem}-{sound.version}{playable_suffix(Path(path))}",
                Path(path), sound.waveforms[0], self.renderer.generator.sample_rate,
            )
            for sound in sounds
        ]  # fmt: skip
        return files, sounds, self.similarities(sounds)

    def similarities(self, sounds: Sequence[Sound]) -> str:
        """A Markdown table: of conditions to the centre of audio embeddings, and of sounds as the scorer says."""
        names = " | ".join(VERSIONS[sound.version] for sound in sounds)
        lines = [f"| similarity | {names} |", "|---|" + "---|" * len(sounds)]
        if self.renderer.refiner is not None:
            centre = self.renderer.refiner.space.mean("audio").float().cpu()
            values = [float(torch.cosine_similarity(s.conditions, centre[None], dim=1).mean()) for s in sounds]
            lines.append(_row("condition to the centre of audio embeddings", values))
        for name in [name for name in SCORES if all(name in sound.scores[0] for sound in sounds)]:
            label = {"clap": "sound to prompt (CLAP)", "refiner": "sound to prompt, the refiner's score"}[name]
            lines.append(_row(label, [sound.scores[0][name] for sound in sounds]))
        return "\n".join(lines)

    def _adjusted(self, strength: float, seed: float) -> Renderer:
        settings = self.renderer.settings
        refine = replace(settings.refine, strength=float(strength))
        return self.renderer.with_settings(replace(settings, refine=refine, seed=int(seed or 0)))


def build_demo(renderer: Renderer, folder: Path) -> Any:
    """The Gradio app.

    Args:
        renderer: Makes the sounds; videos can be given if it has an encoder of video.
        folder: Where videos are written; see `Demo`.

    Raises:
        ImportError: the extra `demo` is not installed.
    """
    gr = _gradio()
    demo = Demo(renderer, folder)
    with gr.Blocks(
        title="DiffGAP: with and without the refiner", analytics_enabled=False, delete_cache=(600, 3600)
    ) as app:
        gr.Markdown(
            "# With and without the refiner\n"
            f"{renderer.generator.name}: both versions start from the same noise; what differs is the embedding that "
            "conditions the generator."
        )
        with gr.Row():
            strength = gr.Slider(
                0, 1, value=_strength(renderer), step=0.05, label="Strength", elem_id="strength", min_width=300,
                info="0: the posterior mean, nothing added. 1: a sample from pure noise.",
            )  # fmt: skip
            seed = gr.Number(
                renderer.settings.seed, precision=0, minimum=0, maximum=2**31, label="Seed", elem_id="seed",
                min_width=300, info="Of all noise: the same seed makes the same sounds.",
            )  # fmt: skip
        with gr.Tabs():
            with gr.Tab("Text"):
                _text_tab(gr, demo, strength, seed)
            if renderer.video is not None:
                with gr.Tab("Video", elem_id="video-tab"):
                    _video_tab(gr, demo, strength, seed)
    return app.queue(max_size=16)


def _text_tab(gr: Any, demo: Demo, strength: Any, seed: Any) -> None:
    prompt = gr.Textbox(
        label="Prompt", placeholder="a dog barks in the rain", max_length=_MAX_PROMPT, elem_id="prompt", autofocus=True
    )
    button = gr.Button("Make both sounds", variant="primary", elem_id="make-text")
    versions = ["plain", "refined"] if demo.renderer.refines_text else ["plain"]
    outputs = []
    with gr.Row():
        for version in versions:
            with gr.Column(min_width=280):
                outputs.append(
                    gr.Audio(
                        label=VERSIONS[version], interactive=False, elem_id=f"audio-{version}", buttons=["download"]
                    )
                )
                outputs.append(_picture(gr, version))
    table = gr.Markdown(elem_id="similarities-text")

    def make(text: str, strength: float, seed: float) -> list[Any]:
        sounds, similarities = demo.text(text, strength, seed)
        rate = demo.renderer.generator.sample_rate
        pictures = _pictures(sounds, rate)
        pairs = [
            x for sound, png in zip(sounds, pictures, strict=True) for x in ((rate, _pcm(sound.waveforms[0])), png)
        ]
        return [*pairs, similarities]

    for event in (button.click, prompt.submit):
        _on(gr, event, make, [prompt, strength, seed], [*outputs, table])


def _video_tab(gr: Any, demo: Demo, strength: Any, seed: Any) -> None:
    source = gr.Video(label="Video", sources=["upload"], elem_id="video-in", height=260)
    button = gr.Button("Make both sounds", variant="primary", elem_id="make-video")
    outputs = []
    with gr.Row():
        for version in ("regression", "refined"):
            with gr.Column(min_width=280):
                outputs.append(
                    gr.Video(label=VERSIONS[version], interactive=False, elem_id=f"video-{version}", height=300)
                )
                outputs.append(_picture(gr, version))
    table = gr.Markdown(elem_id="similarities-video")

    def make(path: str, strength: float, seed: float) -> list[Any]:
        files, sounds, similarities = demo.video(path, strength, seed)
        pictures = _pictures(sounds, demo.renderer.generator.sample_rate)
        pairs = [x for pair in zip(map(str, files), pictures, strict=True) for x in pair]
        return [*pairs, similarities]

    _on(gr, button.click, make, [source, strength, seed], [*outputs, table])


def _on(gr: Any, event: Any, make: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any]) -> None:
    """Connect a button; all share one place in the queue, and a user's mistake is shown as a message."""

    def guarded(*values: Any) -> list[Any]:
        try:
            return make(*values)
        except (ValueError, MediaError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    event(
        guarded, inputs, outputs, concurrency_limit=1, concurrency_id="generator", api_visibility="private",
        show_progress="full",
    )  # fmt: skip


def serve(
    renderer: Renderer,
    port: int | None = None,
    max_megabytes: float = 100.0,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the demo on the loopback interface until Ctrl-C.

    Args:
        renderer: Makes the sounds.
        port: Where; None: the first free one from 7860.
        max_megabytes: Of an upload.
        ready: Called with the address.

    Raises:
        OSError: the port is taken.
        ImportError: the extra `demo` is not installed.
    """
    from threading import Event

    with tempfile.TemporaryDirectory(prefix="diffgap-demo-") as folder:
        app = build_demo(renderer, Path(folder))
        url = launch(app, port, max_megabytes)
        try:
            if ready is not None:
                ready(url)
            Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            app.close(verbose=False)


def launch(app: Any, port: int | None = None, max_megabytes: float = 100.0) -> str:
    """Start the server in threads of its own; returns its address."""
    gr = _gradio()
    theme = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
    )
    _, url, _ = app.launch(
        server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
        show_error=False, max_file_size=int(max_megabytes * 1e6), theme=theme, footer_links=[], ssr_mode=False,
        enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return url


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return need("gradio", "demo")


def _strength(renderer: Renderer) -> float:
    """What the slider shows first: the settings' strength, or the refiner's own."""
    if renderer.settings.refine.strength is not None:
        return renderer.settings.refine.strength
    return 0.0 if renderer.refiner is None else renderer.refiner.config.strength


def _picture(gr: Any, version: str) -> Any:
    return gr.Image(
        show_label=False, interactive=False, height=220, elem_id=f"picture-{version}", buttons=[], container=False
    )


def _pictures(sounds: Sequence[Sound], sample_rate: int) -> list[Any]:
    from PIL import Image

    pngs = spectrogram_pngs([sound.waveforms[0] for sound in sounds], sample_rate)
    return [Image.open(BytesIO(png)) for png in pngs]


def _pcm(waveform: Tensor) -> np.ndarray:
    """`(T,)` int16: Gradio would scale floating samples to full loudness, each version by a factor of its own."""
    return (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()


def _row(label: str, values: Sequence[float]) -> str:
    return f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
