"""Writes what a version saves, for later versions to load: `python tests/kept/make.py` at every release.

It makes `tests/kept/VERSION/` with a refiner, a checkpoint, a table, block shards, and `expected.json`: numbers that
they give. `tests/test_kept.py` loads every version that is there. A folder of a released version is never made again;
that of a version in development is, where a format changes before its release.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from diffgap_lightning import DiffGAPRefiner, EmbeddingTable, __version__
from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.training.callbacks import AverageWeights, SaveRefiner
from diffgap_lightning.training.module import DiffGAPModule

PAIRS = 36


def data() -> SyntheticDataModule:
    """The rows of the kept run; the training rows are stored as a table, the validation rows as shards."""
    world = SyntheticWorld(latent_dim=3, num_concepts=3, dim=6, hidden_dim=8)
    made = SyntheticDataModule(PAIRS, 10, 0, batch_size=12, world=world)
    made.setup()
    return made


def trainer(folder: Path, epochs: int, *callbacks: Any) -> Trainer:
    """One that prints nothing."""
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=bool(callbacks), num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[AverageWeights(0.8), *callbacks],
    )  # fmt: skip


def module() -> DiffGAPModule:
    """The settings of the kept run."""
    torch.manual_seed(0)
    return DiffGAPModule(width=8, depth=1, dropout=0.0, rank=3, num_steps=2, capture="off")


def numbers(folder: Path) -> dict[str, Any]:
    """What a kept folder gives, read by the present version."""
    table = EmbeddingTable.read(folder / "table.npz")
    loaded = DiffGAPModule.load_from_checkpoint(folder / "last.ckpt", map_location="cpu", weights_only=True)
    found: dict[str, Any] = {}
    for name, refiner in (
        ("refiner", DiffGAPRefiner.from_pretrained(folder / "refiner")),
        ("last.ckpt", loaded.refiner),
    ):
        assert refiner is not None
        rows = table.embeddings["text"][:3]
        refined = refiner.refine(rows, source="text", target="audio", strength=0.0, start="posterior_mean")
        score = refiner.score(rows, table.embeddings["audio"][:3], source="text", target="audio")
        found[name] = {"refined": refined.tolist(), "score": score.tolist()}
    shards = read_embedding_shards(folder / "shards")
    order = torch.argsort(shards.ids["audio"])
    found["table"] = {"audio": table.embeddings["audio"][-1].tolist(), "encoder": table.encoder}
    found["shards"] = {"audio": shards.embeddings["audio"][order][0].tolist(), "encoder": shards.encoder}
    return found


def main() -> None:
    """Write the present version's folder."""
    folder = Path(__file__).parent / __version__
    shutil.rmtree(folder, ignore_errors=True)
    rows = data()
    rows.rows("train").write(folder / "table.npz")
    write_embedding_shards(rows.rows("val"), folder / "shards", kind="rows")
    saving = ModelCheckpoint(folder, "last", save_weights_only=False)
    trainer(folder, 2, saving, SaveRefiner(str(folder / "refiner"))).fit(module(), datamodule=rows)
    kept = torch.load(folder / "last.ckpt", weights_only=True)  # without its paths on this machine
    kept["callbacks"] = {name: state for name, state in kept["callbacks"].items() if "ModelCheckpoint" not in name}
    torch.save(kept, folder / "last.ckpt")
    (folder / "expected.json").write_text(json.dumps(numbers(folder), indent=1) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
