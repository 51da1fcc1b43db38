from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.data.media import MediaLimits
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.generation.demo import Demo
from diffgap_lightning.generation.demo_page import HOST, build_demo, launch
from diffgap_lightning.generation.loading import load_generator
from diffgap_lightning.generation.rendering import Renderer
from diffgap_lightning.generation.settings import GenerationSettings
from diffgap_lightning.refiner import DiffGAPRefiner

pytest.importorskip("av", reason="needs the extra media")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def renderer(generator_folder: Path, sound_refiner: DiffGAPRefiner) -> Renderer:
    settings = GenerationSettings(num_steps=2, window=4.0)
    return Renderer(
        load_generator(str(generator_folder), device="cpu"), sound_refiner, settings,
        video_encoder=HashingEncoder(dim=24), scorer=HashingEncoder(dim=32), limits=MediaLimits(max_seconds=20),
    )  # fmt: skip


def cells(table: str, label: str) -> list[float]:
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell) for cell in row.split("|")[2:-1]]


def test_similarities_before_and_after(renderer: Renderer, tmp_path: Path) -> None:
    sounds, table = Demo(renderer, tmp_path).text("a dog", strength=0.0, seed=3)
    assert renderer.refiner is not None
    centre = renderer.refiner.space.mean("audio")
    expected = [float(torch.cosine_similarity(s.conditions[0], centre, dim=0)) for s in sounds]
    found = cells(table, "condition to the centre of audio embeddings")
    assert found == pytest.approx(expected, abs=6e-4)
    assert found[1] > found[0] + 0.2  # the gap that the refiner closes
    assert cells(table, "sound to prompt (CLAP)") == pytest.approx([s.scores[0]["clap"] for s in sounds], abs=6e-4)


def test_strength_and_seed_are_the_requests_own(renderer: Renderer, tmp_path: Path) -> None:
    demo = Demo(renderer, tmp_path)
    (plain, weak), (again, strong), (other, _) = (
        demo.text("a dog", strength=s, seed=n)[0] for s, n in ((0.0, 3), (1.0, 3), (0.0, 4))
    )
    torch.testing.assert_close(plain.waveforms[0], again.waveforms[0])
    assert not torch.allclose(weak.conditions, strong.conditions, atol=1e-3)
    assert not torch.allclose(plain.waveforms[0], other.waveforms[0])


def test_what_is_refused(renderer: Renderer, tmp_path: Path, make_video: Callable[..., Path]) -> None:
    demo = Demo(renderer, tmp_path)
    for prompt, message in ((" ", "Write what"), ("x" * 501, "501 characters")):
        with pytest.raises(ValueError, match=message):
            demo.text(prompt, 0.0, 0)
    with pytest.raises(ValueError, match="Choose a video"):
        demo.video("", 0.0, 0)
    (tmp_path / "x.mp4").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"^The video cannot be used: cannot open container"):
        demo.video(str(tmp_path / "x.mp4"), 0.0, 0)
    long = make_video(tmp_path / "long.mp4", seconds=21.0, fps=1)
    with pytest.raises(ValueError, match=r"^The video cannot be used: 21\.0 s long, more than 20 s\.$"):
        demo.video(str(long), 0.0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.mp4", "x.mp4"]  # nothing was made


@pytest.fixture(scope="module")
def address(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs the extra demo")
    app = build_demo(renderer, tmp_path_factory.mktemp("videos"))
    try:
        yield launch(app, max_megabytes=5)
    finally:
        app.close(verbose=False)


@pytest.mark.slow
def test_the_server_is_on_loopback_alone_and_limits_uploads(address: str) -> None:
    import urllib.error
    import urllib.request

    assert address.startswith(f"http://{HOST}:")
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with socket.socket() as other:  # nobody listens on the machine's other addresses
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port)) != 0
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n' + b"0" * 6_000_000
    request = urllib.request.Request(
        f"{address}gradio_api/upload", body + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request, timeout=30)
    if isinstance(refused.value, urllib.error.HTTPError):
        assert refused.value.code == 413


@pytest.mark.slow
def test_a_too_long_video_is_refused_in_words(address: str, tmp_path: Path, make_video: Callable[..., Path]) -> None:
    """As the page asks: upload, join the queue, read the events."""
    import json
    import urllib.request

    video = make_video(tmp_path / "v.mp4", seconds=21.0, fps=1).read_bytes()
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="v.mp4"\r\n\r\n' + video + b"\r\n--x--\r\n"

    def ask(path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    (name,) = json.loads(ask("gradio_api/upload", body, "multipart/form-data; boundary=x"))
    config = json.loads(ask("config"))
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "make-video")
    make = next(d["id"] for d in config["dependencies"] if d["targets"][0][0] == button)
    file = {"path": name, "meta": {"_type": "gradio.FileData"}}
    ask("gradio_api/queue/join", json.dumps({"data": [file, 0.0, 0], "fn_index": make, "session_hash": "s"}).encode())
    lines = ask("gradio_api/queue/data?session_hash=s").decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    (done,) = (event for event in events if event["msg"] == "process_completed")
    assert not done["success"]
    assert done["output"]["error"] == "The video cannot be used: 21.0 s long, more than 20 s."


def seen(selector: str) -> str:
    """A promise of the text of an element, once it is there."""
    return (
        f"new Promise(done => {{ const look = () => {{ const e = document.querySelector({selector!r}); "
        "e ? done(e.innerText || true) : setTimeout(look, 50); }; look(); })"
    )


def typed(prompt: str) -> str:
    return (
        "(() => { const area = document.querySelector('#prompt textarea');"
        " Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(area, " + repr(prompt) + ");"
        " area.dispatchEvent(new Event('input', {bubbles: true}));"
        " document.querySelector('#make-text').click(); })()"
    )


TAB = "[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.trim() === 'Video').click()"
VIDEOS = """
new Promise(done => { const look = () => {
  const all = ["regression", "refined"].map(n => document.querySelector(`#video-${n} video`));
  all.every(v => v && v.readyState >= 2) ? done(all.map(v => [v.duration, v.videoWidth])) : setTimeout(look, 50);
}; look(); })
"""


@pytest.mark.slow
def test_a_prompt_and_a_real_video_in_a_browser(address: str, browser: Any, shared_data: Path) -> None:
    page = browser.open(address, width=1280, height=900)
    page.evaluate(seen("#prompt textarea"))
    page.evaluate(seen("#make-text"))
    page.evaluate(typed("a dog barks in the rain"))
    table = page.evaluate(seen("#similarities-text table"))
    assert "without refiner" in table
    assert "sound to prompt (CLAP)" in table
    for version in ("plain", "refined"):
        link = page.evaluate(f"document.querySelector('#audio-{version} a[download]').href")
        size = page.evaluate(f"fetch({link!r}).then(r => r.arrayBuffer()).then(b => b.byteLength)")
        assert size > 2 * 0.6 * 16000
        assert page.evaluate(f"document.querySelector('#picture-{version} img').naturalWidth") > 300

    page.evaluate(
        "[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.trim() === 'Video').click()"
    )
    page.evaluate(seen("#video-in input[type=file]"))
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    node = page.send("DOM.querySelector", nodeId=root, selector="#video-in input[type=file]")["nodeId"]
    video = sorted((shared_data / "vggsound_sample").glob("*.mp4"))[0]
    page.send("DOM.setFileInputFiles", nodeId=node, files=[str(video)])
    page.evaluate(seen("#video-in video"))
    page.evaluate("document.querySelector('#make-video').click()")
    table = page.evaluate(seen("#similarities-video table"))
    assert "posterior mean only" in table
    assert "sound to video, the refiner's score" in table
    for duration, width in page.evaluate(VIDEOS):
        assert duration == pytest.approx(10, abs=0.05)
        assert width > 0
    assert not [url for url in page.requests() if not url.startswith((address, "data:", "blob:" + address))]
    assert page.errors() == []


@pytest.mark.slow
def test_it_fits_on_a_phone(address: str, browser: Any) -> None:
    page = browser.open(address, width=390, height=844, phone=True)
    page.evaluate(seen("#prompt textarea"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
