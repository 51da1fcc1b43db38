"""Train a refiner from Python: a datamodule, a module, a Trainer. Writes OUT/refiner; seconds on a laptop.

python examples/train_from_python.py --epochs 3 --out runs/example
"""

from __future__ import annotations

import argparse

from lightning.pytorch import Trainer

from diffgap_lightning import DiffGAPModule, SyntheticDataModule
from diffgap_lightning.training.callbacks import AverageWeights, SaveRefiner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000, help="training pairs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/example", help="the run's folder")
    options = parser.parse_args()

    # Any datamodule with the same batches will do; EmbeddingDataModule("table.npz") reads your own embeddings.
    data = SyntheticDataModule(num_pairs=options.pairs, num_val=500, num_test=500)
    module = DiffGAPModule(pairs=[("text", "audio")], width=128, depth=2)
    trainer = Trainer(
        max_epochs=options.epochs,
        default_root_dir=options.out,
        devices=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[AverageWeights(decay=0.99), SaveRefiner()],
    )
    trainer.fit(module, data)
    trainer.test(module, data)
    print(f"next: python examples/load_and_refine.py {options.out}/refiner")


if __name__ == "__main__":
    main()
