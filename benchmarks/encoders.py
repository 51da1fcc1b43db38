"""How fast each encoder embeds real clips, what of it is not the network, and how much of that the engine hides.

    python benchmarks/encoders.py FOLDER_OF_CLIPS --json encoders.json
    python benchmarks/encoders.py FOLDER_OF_CLIPS --device cuda --copies 64 --workers 8
    python benchmarks/encoders.py FOLDER_OF_CLIPS --tiny                          in half a minute, to see that it runs

Rows of the table, clips a second: `decode` turns an mp4 into the encoder's sample rate or frame rate, `prepare` is the
encoder's `transform`, and `network` is `embed_*` on what that gives. On the CPU all three are per second of processor
time of one thread, so that a busy machine does not change them much; on a GPU the network is per second of wall time.

Below each encoder, wall time of `diffgap embed`'s engine over the same clips: `serial` without a decoding process, of
which `outside` is the share not spent in `embed_*`; `parallel` with `--workers` of them. `at once` is the time in which
decoding and network both ran, of the time that the shorter of them took: 100 % is perfect, and about one batch is lost
at either end. It is measured from the times at which each began and ended, so that it also holds on a busy machine.

Weights are random, drawn by the packages' own classes at the published models' sizes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.catalog import Catalog, Clip
from diffgap_lightning.data.media import Media
from diffgap_lightning.data.video import video_windows
from diffgap_lightning.embedding import CatalogCorpus, EmbedSettings, embed_corpus, module
from diffgap_lightning.embedding.decode import ClipDecoder
from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.encoders.cavp import CavpEncoder
from diffgap_lightning.encoders.laion_clap import LaionClapEncoder
from diffgap_lightning.encoders.open_clip import OpenClipEncoder
from diffgap_lightning.encoders.transformers_clap import TransformersClapEncoder
from embedding import rate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_models

CAPTIONS = [f"a {what} is heard {where}" for what in ("dog", "train", "violin", "crowd") for where in ("far", "near")]


def build(name: str, folder: Path, real_size: bool) -> ContrastiveEncoder:
    if name == "cavp":
        return CavpEncoder(None) if real_size else CavpEncoder(None, width=4)
    if name == "open-clip":
        return OpenClipEncoder(str(tiny_models.open_clip_folder(folder, real_size=real_size)), check=False)
    if name == "transformers-clap":
        return TransformersClapEncoder(str(tiny_models.transformers_clap(folder, real_size=real_size)), check=False)
    checkpoint = tiny_models.laion_checkpoint(folder / "laion.pt", real_size=real_size)
    tokenizer = tiny_models.roberta_tokenizer(folder / "tokenizer")
    return LaionClapEncoder(str(checkpoint), tokenizer=str(tokenizer), check=False)


def decode(encoder: ContrastiveEncoder, modality: str, clips: list[Path]) -> list[torch.Tensor]:
    """Each clip's windows, as `ClipDecoder` decodes them."""
    media = [Media(path) for path in clips]
    if modality == "audio":
        windows = [audio_windows(m, encoder.sample_rate or 0, encoder.window) for m in media]
    else:
        frames: dict[str, Any] = {"phase": encoder.frame_phase, "short_side": encoder.frame_size}
        windows = [video_windows(m, encoder.fps or 0, encoder.window, **frames) for m in media]
    return [item for clip in windows for _, item in clip]


def rates(encoder: ContrastiveEncoder, modality: str, clips: list[Path], seconds: float) -> dict[str, float | None]:
    """Clips (or texts) a second of each stage; None where a modality has no such stage."""
    if modality == "text":
        return {"decode": None, "prepare": None, "network": network_rate(encoder, modality, CAPTIONS, 8, seconds)}
    items = decode(encoder, modality, clips)
    transform = encoder.transform(modality) or (lambda x: x)

    def work(stage: Callable[[], Any]) -> Callable[[], int]:
        return lambda: (stage(), len(clips))[1]

    prepared = [transform(item) for item in items]
    return {
        "decode": rate(work(lambda: decode(encoder, modality, clips)), seconds),
        "prepare": rate(work(lambda: [transform(item) for item in items]), seconds),
        "network": network_rate(encoder, modality, prepared, len(clips), seconds),
    }


def network_rate(encoder: ContrastiveEncoder, modality: str, items: Any, count: int, seconds: float) -> float:
    device = next(encoder.parameters()).device
    if device.type == "cpu":
        return rate(lambda: (encoder.embed(modality, items), count)[1], seconds)
    on_device = items if modality == "text" else [item.to(device) for item in items]
    encoder.embed(modality, on_device)
    torch.cuda.synchronize()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        encoder.embed(modality, on_device)
        torch.cuda.synchronize()
        done += count
    return done / (time.perf_counter() - start)


Intervals = list[tuple[float, float]]


class TimedDecoder(ClipDecoder):
    """Notes when each clip was decoded, in a file, because it runs in other processes."""

    notes: Path

    def __call__(self, clip: Clip) -> Any:
        """Decode it and note the time."""
        start = time.perf_counter()
        result = super().__call__(clip)
        with self.notes.open("a") as file:
            file.write(f"{start} {time.perf_counter()}\n")
        return result


def engine(encoder: ContrastiveEncoder, clips: list[Clip], workers: int, batch_size: int) -> dict[str, float]:
    """One run of the engine, in s: its wall time, and how long it decoded, embedded, and did both at once."""
    network: Intervals = []
    embed = encoder.embed

    def timed(modality: str, items: Any) -> torch.Tensor:
        start = time.perf_counter()
        rows = embed(modality, items).cpu()
        network.append((start, time.perf_counter()))
        return rows

    modalities = tuple(m for m in encoder.modalities if m != "image")
    settings = EmbedSettings(modalities, encoder.window)
    part = max(batch_size, math.ceil(len(clips) / max(1, workers)))
    corpus = CatalogCorpus(Catalog(Path("clips"), clips), part_size=part)
    accelerator = "cpu" if next(encoder.parameters()).device.type == "cpu" else "gpu"
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(encoder, "embed", timed),
        mock.patch.object(module, "ClipDecoder", TimedDecoder),
    ):
        TimedDecoder.notes = Path(folder) / "decoded"
        summary = embed_corpus(
            corpus, encoder, Path(folder) / "shards", settings, kind="rows", batch_size=batch_size,
            num_workers=workers, progress=False, trainer_options={"accelerator": accelerator, "devices": 1},
        )  # fmt: skip
        lines = TimedDecoder.notes.read_text().splitlines()
    assert summary is not None
    assert summary.embedded == len(clips)
    decoding = merged([(float(start), float(end)) for start, end in map(str.split, lines)])
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in decoding for b in network)
    return {"wall": summary.seconds, "decode": length(decoding), "network": length(network), "both": both}


def merged(intervals: Intervals) -> Intervals:
    """The same time, without overlaps."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def overlap(encoder: ContrastiveEncoder, clips: list[Clip], args: argparse.Namespace) -> dict[str, float]:
    """Medians over runs without and with decoding processes, which take turns."""
    serial, parallel = [], []
    for _ in range(args.repeats):
        serial.append(engine(encoder, clips, 0, args.batch_size))
        parallel.append(engine(encoder, clips, args.workers, args.batch_size))
    return {
        "serial": statistics.median(run["wall"] for run in serial),
        "outside": statistics.median(1 - run["network"] / run["wall"] for run in serial),
        "parallel": statistics.median(run["wall"] for run in parallel),
        "at_once": statistics.median(run["both"] / min(run["decode"], run["network"]) for run in parallel),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of short .mp4 clips with sound")
    parser.add_argument("--encoders", nargs="+", default=["laion-clap", "transformers-clap", "open-clip", "cavp"])
    parser.add_argument("--tiny", action="store_true", help="tiny networks instead of the published models' sizes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each rate")
    parser.add_argument("--copies", type=int, default=4, help="times that the engine embeds the folder's clips")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the engine of each kind")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes of the overlapped runs")
    parser.add_argument("--batch-size", type=int, default=2, help="clips; many batches let the engine show")
    parser.add_argument("--device", default="cpu", help="of the network: cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    paths = sorted(args.clips.glob("*.mp4"))
    if not paths:
        sys.exit(f"{args.clips}: no .mp4 files")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    clips = [
        Clip(f"{path.stem}-{i}", (CAPTIONS[i % len(CAPTIONS)],), Media(path), Media(path))
        for i in range(args.copies)
        for path in paths
    ]
    result: dict[str, Any] = {"clips": len(clips), "device": args.device, "tiny": args.tiny, "encoders": {}}
    print(f"{'clips/s':<26}{'decode':>10}{'prepare':>10}{'network':>10}")
    for name in args.encoders:
        with tempfile.TemporaryDirectory() as folder:
            encoder = build(name, Path(folder), not args.tiny).to(args.device)
        found: dict[str, Any] = {"rates": {}}
        for modality in (m for m in encoder.modalities if m != "image"):
            row = found["rates"][modality] = rates(encoder, modality, paths, args.seconds)
            cells = "".join("         -" if value is None else f"{value:10.1f}" for value in row.values())
            print(f"{name + ' ' + modality:<26}{cells}", flush=True)
        e = found["engine"] = overlap(encoder, clips, args)
        print(
            f"{name} engine, {len(clips)} clips: serial {e['serial']:.1f} s, of which outside {e['outside']:.0%}; "
            f"parallel {e['parallel']:.1f} s; at once {e['at_once']:.0%}",
            flush=True,
        )
        result["encoders"][name] = found
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
