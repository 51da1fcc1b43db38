"""One rank of a distributed run, started by `test_stream_ranks.py`: fits on shards and writes down what it saw.

    python stream_ranks.py JOBS.json        with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment

A job is a dict: train, val, context, out, and where asked for epochs, ckpt, save_at, die_at, workers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any


def run(job: dict[str, Any], rank: int, world: int) -> None:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from diffgap_lightning.data import WebDatasetDataModule
    from diffgap_lightning.metrics import PairedRetrieval

    log = Path(job["out"]).with_suffix(f".{rank}.jsonl").open("a", buffering=1)

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.metric = PairedRetrieval("text", "audio")

        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            log.write(json.dumps([self.current_epoch, index, batch["audio_id"].tolist()]) + "\n")
            if [self.current_epoch, index] == job.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.weight * batch["audio"].sum()

        def on_train_batch_end(self, out: object, batch: object, index: int) -> None:
            if [self.current_epoch, index] == job.get("save_at"):
                self.trainer.save_checkpoint(Path(job["out"]).with_suffix(".ckpt"))

        def validation_step(self, batch: dict, index: int) -> None:
            self.metric.update(
                source_features=torch.nn.functional.normalize(batch["text"], dim=1),
                target_features=torch.nn.functional.normalize(batch["audio"][:, :4], dim=1),
                source_ids=batch["text_id"],
                target_ids=batch["audio_id"],
                source_rows=batch["text_row"],
                target_rows=batch["audio_row"],
            )

        def on_validation_epoch_end(self) -> None:
            values = {name: float(value) for name, value in self.metric.compute().items()}
            log.write(json.dumps(["val", values]) + "\n")
            self.metric.reset()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = WebDatasetDataModule(
        train=job["train"],
        val=job["val"],
        batch_size=8,
        num_workers=job.get("workers", 2),
        shuffle_buffer=32,
        multiprocessing_context=job["context"] if job.get("workers", 2) else None,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
        max_epochs=job.get("epochs", 1),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=Path(job["out"]).parent,
    )
    trainer.fit(Model(), data, ckpt_path=job.get("ckpt"))
    log.write(json.dumps(["end", trainer.global_step]) + "\n")
    log.close()


def main(jobs: str) -> None:
    """Run the jobs of a file, one after the other."""
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # a trainer removes them at its end
    for job in json.loads(Path(jobs).read_text()):
        run(job, rank, world)


if __name__ == "__main__":
    main(sys.argv[1])
