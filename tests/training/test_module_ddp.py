"""Two gloo processes train one refiner; this file is also the program that they run, with the argument FOLDER."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffgap_lightning.refiner import DiffGAPRefiner


def main(folder: Path) -> None:
    """One rank: fit, then validate on batches of which only the first rank's hold a pair."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from diffgap_lightning.data.datamodules import SyntheticDataModule
    from diffgap_lightning.data.synthetic import SyntheticWorld
    from diffgap_lightning.training.callbacks import AverageWeights, SaveRefiner
    from diffgap_lightning.training.module import DiffGAPModule

    world = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
    data = SyntheticDataModule(num_pairs=90, num_val=21, num_test=0, batch_size=9, world=world)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(rank)  # the ranks agree although nobody seeded them alike
    module = DiffGAPModule(width=16, depth=1, split="alternate", num_steps=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[SaveRefiner(), AverageWeights(decay=0.9)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    table, first = data.rows("val"), torch.arange(5)
    pairs = {k: v for m in ("text", "audio") for k, v in (
        (m, table.embeddings[m][first]), (f"{m}_id", table.ids[m][first]), (f"{m}_row", first)
    )}  # fmt: skip
    text = {"text": table.embeddings["text"][5:7], "text_id": table.ids["text"][5:7], "text_row": first[:2] + 5}
    alone = trainer.validate(module, DataLoader([pairs if rank == 0 else text], batch_size=None), verbose=False)[0]
    weight = torch.cat([p.detach().flatten() for p in module.refiner.parameters()])
    result = {"config": asdict(module.refiner.config), "figures": figures, "alone": alone, "weight": weight.tolist()}
    (folder / f"{rank}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_ranks_train_and_validate_one_refiner(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["config"] == second["config"]
    assert first["weight"] == second["weight"]
    assert first["figures"] == second["figures"]
    # The second rank had no pair to measure a loss on, and neither waited for the other for ever.
    assert first["alone"] == second["alone"]
    assert first["alone"]["val/loss"] > 0
    saved = DiffGAPRefiner.from_pretrained(tmp_path / "refiner")
    assert saved.config.ranks == first["config"]["ranks"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
