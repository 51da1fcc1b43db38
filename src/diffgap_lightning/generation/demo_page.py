"""The demo's page and its server, with Gradio (the optional extra `demo`).

The server listens on the loopback interface alone, takes one request at a time, limits the size and the duration of
uploads and the length of prompts, and asks no other server for anything: Gradio's analytics are off and its theme uses
the system's fonts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.encoders.optional import need
from diffgap_lightning.generation.demo import MAX_PROMPT, Demo
from diffgap_lightning.generation.rendering import VERSIONS, Renderer, Sound
from diffgap_lightning.generation.spectrogram import spectrogram_pngs

HOST = "127.0.0.1"
_FONTS = ["system-ui", "sans-serif"]
# A picture takes the height that its width asks for, also on a phone; words of the tables stay whole.
_CSS = """
.picture, .picture * { height: auto !important; min-height: 0; }
.similarities th, .similarities td { overflow-wrap: normal; word-break: normal; hyphens: none; }
"""


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
        label="Prompt", placeholder="a dog barks in the rain", max_length=MAX_PROMPT, elem_id="prompt", autofocus=True
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
    table = gr.Markdown(elem_id="similarities-text", elem_classes="similarities")

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
    table = gr.Markdown(elem_id="similarities-video", elem_classes="similarities")

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
        except ValueError as error:
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
        enable_monitoring=False, pwa=False, css=_CSS,
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
        show_label=False,
        interactive=False,
        elem_id=f"picture-{version}",
        elem_classes="picture",
        buttons=[],
        container=False,
    )


def _pictures(sounds: Sequence[Sound], sample_rate: int) -> list[Any]:
    from PIL import Image

    pngs = spectrogram_pngs([sound.waveforms[0] for sound in sounds], sample_rate)
    return [Image.open(BytesIO(png)) for png in pngs]


def _pcm(waveform: Tensor) -> np.ndarray:
    """`(T,)` int16: Gradio would scale floating samples to full loudness, each version by a factor of its own."""
    return (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
