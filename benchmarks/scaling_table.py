"""What a corpus of N clips costs, from measured rates: the tables of `docs/scaling.md`.

    python benchmarks/scaling_table.py                                   with the rates named in MEASURED and ASSUMED
    python benchmarks/scaling_table.py --rates rates.json --set gpu_price=4.0 nodes_gpus=4

`--rates` takes what `benchmarks/embedding.py --json` measured on your machine; `--set` replaces any input.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

SIZES = {"50k": 50_000, "200k": 200_000, "10M": 10_000_000, "1B": 1_000_000_000}
EPOCHS = {"50k": 100, "200k": 50, "10M": 10, "1B": 2}


@dataclass(frozen=True)
class Inputs:
    """Rates a second, sizes in bytes, prices in dollars."""

    # measured on a machine of 2 CPU cores, a core at a time
    audio_per_core: float = 59.2  # 10 s clips, mp4 -> 48 kHz mono
    video_per_core: float = 6.6  # 10 s clips of 480 x 360 at 30 frames/s -> 4 frames/s, short side 224
    write_per_core: float = 68_024.0  # 512-d pairs shuffled and written in float16
    read_per_core: float = 143_000.0  # 512-d pairs streamed from float16 blocks by one worker, warm cache
    bytes_per_pair: float = 2065.0
    bytes_per_clip: float = 553_477.0  # mp4
    train_cpu: float = 256 / 0.0241  # pairs/s on 2 cores, 2.1 M parameters, batch 256
    # measured on one H100: 3 blocks x 512, bf16, batch 16384, eager
    train_gpu: float = 16_384 / 0.0116
    # assumed; replace them by your encoder's and your provider's
    encode_audio_gpu: float = 400.0  # 10 s clips of a CLAP-sized audio tower
    encode_text_gpu: float = 2000.0
    encode_video_gpu: float = 100.0  # 40 frames of a ViT-B-sized image tower
    gpu_price: float = 2.5  # an hour
    core_price: float = 0.04  # an hour
    nodes_gpus: float = 8.0
    nodes_cores: float = 96.0


MEASURED = [f.name for f in fields(Inputs)][:8]
ASSUMED = [f.name for f in fields(Inputs)][8:]


@dataclass(frozen=True)
class Estimate:
    """What N clips cost."""

    media_tb: float
    shards_gb: float
    decode_core_hours: float
    encode_gpu_hours: float
    node_hours: float
    nodes_for_a_day: int
    embed_cost: float
    write_hours: float
    train_cpu_hours: float
    train_gpu_hours: float
    train_cost: float


def estimate(clips: int, epochs: int, inputs: Inputs, video: bool) -> Estimate:
    """Embed `clips` clips (audio with a caption each, or audio and video) and train for `epochs` epochs."""
    decode = clips / inputs.audio_per_core + (clips / inputs.video_per_core if video else 0.0)
    encode = clips / inputs.encode_audio_gpu
    encode += clips / inputs.encode_video_gpu if video else clips / inputs.encode_text_gpu
    node = max(decode / inputs.nodes_cores, encode / inputs.nodes_gpus)  # they overlap: the slower one decides
    # one process that reads and trains; with enough workers the GPU decides
    train = clips * epochs / inputs.train_gpu
    hour = 3600.0
    return Estimate(
        media_tb=clips * inputs.bytes_per_clip / 1e12,
        shards_gb=clips * inputs.bytes_per_pair / 1e9,
        decode_core_hours=decode / hour,
        encode_gpu_hours=encode / hour,
        node_hours=node / hour,
        nodes_for_a_day=max(1, math.ceil(node / hour / 24)),
        embed_cost=(decode * inputs.core_price + encode * inputs.gpu_price) / hour,
        write_hours=clips / inputs.write_per_core / hour,
        train_cpu_hours=clips * epochs / inputs.train_cpu / hour,
        train_gpu_hours=train / hour,
        train_cost=train / hour * inputs.gpu_price,
    )


ROWS = {
    "raw mp4, 10 s clips (TB)": "media_tb",
    "shards, 512-d float16 (GB)": "shards_gb",
    "decode (core hours)": "decode_core_hours",
    "encode (GPU hours, assumed rate)": "encode_gpu_hours",
    "embed on one node (hours)": "node_hours",
    "nodes to embed in 24 h": "nodes_for_a_day",
    "embed, dollars (assumed prices)": "embed_cost",
    "shuffle and write shards, one process (hours)": "write_hours",
    "train on 2 cores (hours)": "train_cpu_hours",
    "train on one H100 (hours)": "train_gpu_hours",
    "train, dollars (assumed price)": "train_cost",
}


def number(value: float) -> str:
    """Two significant digits below 10, none after the point above."""
    if value == 0 or value >= 9.95 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def table(inputs: Inputs, video: bool) -> str:
    """A Markdown table over `SIZES`."""
    columns = {name: estimate(clips, EPOCHS[name], inputs, video) for name, clips in SIZES.items()}
    lines = [f"| clips | {' | '.join(SIZES)} |", f"| --- |{' ---: |' * len(SIZES)}"]
    lines.append(f"| epochs | {' | '.join(str(EPOCHS[name]) for name in SIZES)} |")
    for label, field in ROWS.items():
        lines.append(f"| {label} | {' | '.join(number(getattr(e, field)) for e in columns.values())} |")
    return "\n".join(lines)


def read_inputs(rates: Path | None, changes: list[str]) -> Inputs:
    """The defaults with what was measured elsewhere and what the user sets."""
    inputs = Inputs()
    if rates is not None:
        record = json.loads(rates.read_text())
        decode = record["decode_clips_per_core_second"]
        inputs = replace(
            inputs,
            audio_per_core=next(v for k, v in decode.items() if k.startswith("mp4") and "kHz" in k),
            video_per_core=next(v for k, v in decode.items() if "frames" in k),
            write_per_core=record["write_pairs_per_core_second"],
            bytes_per_pair=record["bytes_per_pair"],
            bytes_per_clip=record["bytes_per_clip"],
        )
    names = {f.name for f in fields(Inputs)}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise SystemExit(f"--set {change}: expected one of {', '.join(sorted(names))}")
        inputs = replace(inputs, **{name: float(value)})
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, help="JSON of benchmarks/embedding.py")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace inputs")
    parser.add_argument("--json", type=Path, help="also write inputs and estimates here")
    args = parser.parse_args()
    inputs = read_inputs(args.rates, args.set)
    for title, video in (("Audio and one caption a clip", False), ("Audio and video", True)):
        print(f"{title}\n\n{table(inputs, video)}\n")
    print("measured: " + ", ".join(f"{n}={getattr(inputs, n):g}" for n in MEASURED))
    print("assumed:  " + ", ".join(f"{n}={getattr(inputs, n):g}" for n in ASSUMED))
    workers = math.ceil(inputs.train_gpu / inputs.read_per_core)
    print(f"reading workers that keep one GPU busy: {workers}")
    if args.json:
        estimates = {
            title: {name: vars(estimate(n, EPOCHS[name], inputs, video)) for name, n in SIZES.items()}
            for title, video in (("audio_text", False), ("audio_video", True))
        }
        args.json.write_text(json.dumps({"inputs": vars(inputs), "estimates": estimates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
