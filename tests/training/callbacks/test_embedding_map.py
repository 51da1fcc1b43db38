from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

DIRECTIONS = (("text", "audio"), ("audio", "text"))


class Refiner:
    directions = DIRECTIONS

    def refine(self, embedding, *, source, target, generator):
        assert not torch.is_grad_enabled()
        return embedding


class Logger:
    def __init__(self) -> None:
        self.figures: list[tuple[str, int]] = []
        self.experiment = SimpleNamespace(add_figure=self.add)

    def add(self, tag, figure, global_step, close) -> None:
        self.figures.append((tag, global_step))


def rows(split: str, max_rows: int):
    assert split == "val"
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(max_rows)
    names = ("text", "audio")
    return SimpleNamespace(
        embeddings={m: torch.randn(max_rows, 4, generator=g) for m in names}, ids=dict.fromkeys(names, ids)
    )


@pytest.fixture
def trainer(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        current_epoch=0,
        global_step=11,
        sanity_checking=False,
        is_global_zero=True,
        default_root_dir=str(tmp_path),
        loggers=[Logger(), SimpleNamespace(experiment=object()), SimpleNamespace()],
        datamodule=SimpleNamespace(rows=rows),
    )


def validate(callback, trainer, batches: int = 3) -> list[str]:
    for batch_idx in range(batches):
        callback.on_validation_batch_end(trainer, SimpleNamespace(refiner=Refiner()), None, None, batch_idx)
    return sorted(p.name for p in Path(trainer.default_root_dir).rglob("*.png"))


def test_a_picture_every_few_epochs(trainer) -> None:
    from diffgap_lightning.training.callbacks import EmbeddingMap

    callback = EmbeddingMap(every_n_epochs=2, max_points=10)
    for trainer.current_epoch in range(4):
        names = validate(callback, trainer)
    assert names == ["epoch-0000.png", "epoch-0002.png"]
    assert trainer.loggers[0].figures == [("embedding_map", 11)] * 2


def test_rare_validations_are_not_missed(trainer) -> None:
    from diffgap_lightning.training.callbacks import EmbeddingMap

    callback = EmbeddingMap(every_n_epochs=7, max_points=10)
    for trainer.current_epoch in (4, 9, 19, 24):
        names = validate(callback, trainer)
    assert names == ["epoch-0004.png", "epoch-0019.png"]


@pytest.mark.parametrize("change", [{"sanity_checking": True}, {"is_global_zero": False}])
def test_nothing_is_drawn_when_it_is_not_its_turn(trainer, change: dict) -> None:
    from diffgap_lightning.training.callbacks import EmbeddingMap

    trainer.__dict__.update(change)
    assert validate(EmbeddingMap(every_n_epochs=2, max_points=10), trainer) == []


def test_validate_alone_always_draws_and_a_folder_may_be_given(trainer, tmp_path: Path) -> None:
    from diffgap_lightning.training.callbacks import EmbeddingMap

    trainer.state.fn, trainer.current_epoch, trainer.loggers = "validate", 7, []
    validate(EmbeddingMap(every_n_epochs=2, max_points=10, folder=str(tmp_path / "here")), trainer)
    assert (tmp_path / "here" / "epoch-0007.png").is_file()


def test_senseless_settings_are_refused() -> None:
    from diffgap_lightning.training.callbacks import EmbeddingMap

    with pytest.raises(ValueError, match="every_n_epochs=0"):
        EmbeddingMap(every_n_epochs=0)
    with pytest.raises(ValueError, match="max_points=1"):
        EmbeddingMap(max_points=1)
