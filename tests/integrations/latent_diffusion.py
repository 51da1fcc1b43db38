"""A small latent-diffusion LightningModule: latents that follow an audio embedding, generated from a text's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from diffgap_lightning.refiner import DiffGAPRefiner

DIM, LATENT, CLIPS = 16, 6, 192


def world(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Text and audio embeddings `(CLIPS, DIM)` with a gap between them, and latents `(CLIPS, LATENT)` of the audio."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(CLIPS, 5, generator=g)

    def modality(noise: float) -> Tensor:
        shift = 2 * torch.randn(DIM, generator=g)
        rows = latent @ torch.randn(5, DIM, generator=g) + shift + noise * torch.randn(CLIPS, DIM, generator=g)
        return normalize(rows, dim=1)

    text, audio = modality(0.5), modality(0.3)
    centred = audio - audio.mean(0)
    latents = centred @ torch.randn(DIM, LATENT, generator=g)
    return text, audio, latents / latents.std()


def measured(**choices: object) -> DiffGAPRefiner:
    """A refiner fitted on the world, its networks not trained yet."""
    text, audio, _ = world()
    ids = dict.fromkeys(("text", "audio"), torch.arange(CLIPS))
    options = {"width": 16, "depth": 1, "rank": 5, "dropout": 0.0, **choices}
    return DiffGAPRefiner.measure({"text": text, "audio": audio}, ids, **options)


class Clips(Dataset):
    def __init__(self) -> None:
        self.text, self.audio, self.latents = world()

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"caption": f"clip {i}", "audio_embedding": self.audio[i], "latents": self.latents[i]}


def loader(batch_size: int = 48, shuffle: bool = False) -> DataLoader:
    return DataLoader(Clips(), batch_size=batch_size, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


class TinyLatentDiffusion(LightningModule):
    """Predicts the noise in latents from a condition `(B, 1, DIM)`; text is looked up, as a frozen encoder would."""

    def __init__(self, own_parameters_only: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.own_parameters_only, self.drop = own_parameters_only, drop
        self.register_buffer("table", world()[0], persistent=False)
        self.network = nn.Sequential(nn.Linear(LATENT + DIM + 1, 64), nn.SiLU(), nn.Linear(64, LATENT))

    def get_learned_conditioning(self, captions: list[str]) -> Tensor:
        rows = [self.table[int(c.split()[1])] if c else torch.full((DIM,), DIM**-0.5) for c in captions]
        return torch.stack(rows)[:, None]

    def audio_of(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["audio_embedding"]

    def errors(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        captions = list(batch["caption"])
        if self.drop:
            captions = [c if torch.rand((), generator=generator) >= self.drop else "" for c in captions]
        condition = self.get_learned_conditioning(captions)[:, 0]
        x0 = batch["latents"]
        t = torch.rand(len(x0), 1, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        x_t = (1 - t).sqrt() * x0 + t.sqrt() * eps
        estimate = self.network(torch.cat([x_t, 4 * condition, t], dim=1))
        return (estimate - x0).square().mean(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.errors(batch, torch.Generator().manual_seed(self.global_step)).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.errors(batch, torch.Generator().manual_seed(batch_idx)).mean()
        self.log("val/loss", loss, batch_size=len(batch["latents"]), sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.get_learned_conditioning(list(batch["caption"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.network.parameters() if self.own_parameters_only else self.parameters()
        return torch.optim.Adam([p for p in parameters if p.requires_grad], lr=3e-3)


def main(folder: Path) -> None:
    """One of two ranks: train both, print nothing, write the refiner's weights as this rank has them."""
    import os

    from lightning.pytorch import Trainer

    from diffgap_lightning.integrations.lightning import FinetuneRefiner

    torch.manual_seed(0)
    callback = FinetuneRefiner(measured(), paired="audio_embedding", folder=str(folder / "refiner"))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(TinyLatentDiffusion(own_parameters_only=True), loader(24))
    rank = os.environ.get("LOCAL_RANK", "0")
    torch.save({k: v.cpu() for k, v in callback.refiner.state_dict().items()}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
