"""How fast one core decodes media and writes shards: the measured inputs of `benchmarks/scaling_table.py`.

    python benchmarks/embedding.py FOLDER_OF_CLIPS --json rates.json

Rates are per second of processor time of one process with one thread, so that a busy machine does not change them much;
the network of the encoder is not in them (see the encoders' own benchmark).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.media import Media
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.video import video_windows


def rate(work: Callable[[], int], seconds: float) -> float:
    """Units of work a second of processor time, after one warm-up call."""
    work()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        count += work()
    return count / (time.process_time() - start)


def decode_rates(clips: list[Path], seconds: float) -> dict[str, float]:
    media = [Media(path, duration=10.0) for path in clips]

    def audio(source: list[Media], sample_rate: int) -> int:
        return sum(len(list(audio_windows(m, sample_rate, 10.0))) for m in source)

    def video(fps: float, side: int) -> int:
        return sum(len(list(video_windows(m, fps, 10.0, short_side=side))) for m in media)

    rates = {"mp4 -> 48 kHz mono": rate(lambda: audio(media, 48_000), seconds)}
    rates["mp4 -> 4 frames/s, short side 224"] = rate(lambda: video(4.0, 224), seconds)
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        for suffix, source_rate in (("flac", 44_100), ("wav", 48_000)):
            files = []
            for i, m in enumerate(media):
                ((_, waveform),) = audio_windows(m, source_rate, 10.0)
                path = Path(folder) / f"{i}.{suffix}"
                soundfile.write(path, waveform.numpy(), source_rate)
                files.append(Media(path))
            rates[f"{suffix} {source_rate / 1000:g} kHz -> 48 kHz mono"] = rate(
                lambda f=files: audio(f, 48_000), seconds
            )
    return rates


def write_rate(pairs: int) -> tuple[float, float]:
    """Pairs a second of `write_embedding_shards`, shuffle included, and bytes a pair on disk; 512-d audio and text."""
    generator = torch.Generator().manual_seed(0)

    def chunks() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, pairs, 4096):
            n = min(4096, pairs - start)
            rows = torch.nn.functional.normalize(torch.randn(2 * n, 512, generator=generator), dim=1)
            ids = torch.arange(start, start + n)
            yield {"audio": rows[:n], "audio_id": ids, "text": rows[n:], "text_id": ids}

    begin = time.process_time()
    for _ in chunks():
        pass
    drawing = time.process_time() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        write_embedding_shards(chunks(), Path(folder) / "shards", memory=64 << 20)
        seconds = time.process_time() - begin - drawing
        size = sum(path.stat().st_size for path in (Path(folder) / "shards").iterdir())
    return pairs / seconds, size / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of ten-second .mp4 clips with sound")
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time for each rate")
    parser.add_argument("--pairs", type=int, default=100_000, help="pairs to write")
    parser.add_argument("--json", type=Path, help="also write the rates here")
    args = parser.parse_args()
    clips = sorted(args.clips.glob("*.mp4"))
    if not clips:
        sys.exit(f"{args.clips}: no .mp4 files")
    torch.set_num_threads(1)
    decode = decode_rates(clips, args.seconds)
    pairs, size = write_rate(args.pairs)
    clip_bytes = sum(path.stat().st_size for path in clips) / len(clips)
    result = {
        "decode_clips_per_core_second": {name: round(value, 1) for name, value in decode.items()},
        "write_pairs_per_core_second": round(pairs),
        "bytes_per_pair": round(size),
        "bytes_per_clip": round(clip_bytes),
    }
    for name, value in decode.items():
        print(f"{name:<40} {value:10.1f} clips/s a core")
    print(f"{'shuffle and write 512-d pairs, float16':<40} {pairs:10.0f} pairs/s a core")
    print(f"{'shards':<40} {size:10.0f} bytes a pair\n{'mp4 clips':<40} {clip_bytes / 1e6:10.2f} MB a clip")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
