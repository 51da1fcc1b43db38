"""From real videos and captions to shards to a trained refiner, with each encoder that ships, as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from diffgap_lightning.cli.main import main
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.refiner import DiffGAPRefiner

pytest.importorskip("av", reason="needs the extra media")
trainer = pytest.importorskip("diffgap_lightning.cli.trainer")

CAPTIONS = ("a man shouts", "water runs in a sink", "an engine idles", "somebody plays the trumpet")
TEMPLATES = ("{}", "the sound of this: {}", "{}, recorded outdoors", "{} and silence after it", "a video in which {}")


@pytest.fixture
def catalog(tmp_path: Path, shared_data: Path) -> Path:
    """Four videos, five captions each."""
    path = tmp_path / "clips.jsonl"
    clips = sorted((shared_data / "vggsound_sample").glob("*.mp4"))
    rows = [
        {"id": clip.stem, "audio": str(clip), "video": str(clip), "text": [t.format(caption) for t in TEMPLATES]}
        for clip, caption in zip(clips, CAPTIONS, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(name: str, tiny_models: ModuleType, folder: Path) -> list[str]:
    if name == "laion-clap":
        checkpoint = tiny_models.laion_checkpoint(folder / "laion.pt")
        tokenizer = tiny_models.roberta_tokenizer(folder / "tokenizer")
        return ["--encoder.checkpoint", str(checkpoint), "--encoder.tokenizer", str(tokenizer)]
    if name == "cavp":
        return ["--encoder.checkpoint", str(tiny_models.cavp_checkpoint(folder / "cavp.ckpt"))]
    make: Callable[[Path], Path] = {
        "transformers-clap": tiny_models.transformers_clap,
        "open-clip": tiny_models.open_clip_folder,
    }[name]
    return ["--encoder.model", str(make(folder / name))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "pairs", "rows"),
    [  # what four clips of 10 s give: five captions each, or windows of 4, 4 and 2 s
        ("laion-clap", "laion_clap", {"text": 20, "audio": 20}, {"text": 20, "audio": 4}),
        ("transformers-clap", "transformers", {"text": 20, "audio": 20}, {"text": 20, "audio": 4}),
        ("open-clip", "open_clip", {"text": 20, "video": 20}, {"text": 20, "video": 4}),
        ("cavp", "torchaudio", {"video": 12, "audio": 12}, {"video": 12, "audio": 12}),
    ],
)
def test_videos_to_shards_to_a_refiner(
    name: str,
    package: str,
    pairs: dict[str, int],
    rows: dict[str, int],
    tmp_path: Path,
    catalog: Path,
    tiny_models: ModuleType,
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    common = ["--encoder", name, *flags(name, tiny_models, tmp_path), "--catalog", str(catalog), "--accelerator", "cpu"]
    for kind, expected in (("pairs", pairs), ("rows", rows)):
        main(["embed", *common, "--kind", kind, "--out", str(tmp_path / kind), "--num-workers", "1", "--no-progress"])
        assert verify_shards(tmp_path / kind) == []
        assert open_shards(tmp_path / kind).manifest.num_rows == expected
    manifest = open_shards(tmp_path / "pairs").manifest
    assert manifest.encoder is not None
    assert manifest.encoder.startswith(f"{name}/")

    data = ["--data", "diffgap_lightning.data.WebDatasetDataModule", "--data.train", str(tmp_path / "pairs")]
    data += ["--data.val", str(tmp_path / "rows"), "--data.batch_size", "10", "--data.num_workers", "0"]
    model = [
        "--model.pairs",
        f"[[{', '.join(pairs)}]]",
        "--model.width",
        "16",
        "--model.depth",
        "1",
        "--model.rank",
        "3",
    ]
    where = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    save = ["--trainer.callbacks", "diffgap_lightning.training.callbacks.SaveRefiner"]
    main(["fit", *data, *model, *where, *quiet, *save])
    refiner = DiffGAPRefiner.from_pretrained(tmp_path / "run" / "refiner", encoder=manifest.encoder)
    assert refiner.config.encoder == manifest.encoder
