from __future__ import annotations

import http.server
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from diffgap_lightning.data import WebDatasetDataModule
from diffgap_lightning.data.shards import write_embedding_shards

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Recorder(LightningModule):
    """Learns nothing and remembers the ids of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, tuple[int, ...]]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        self.trained.append((self.current_epoch, tuple(batch["audio_id"].tolist())))
        return self.weight * batch["audio"].sum()

    def validation_step(self, batch: dict, index: int) -> None:
        self.evaluated += batch["text_row"].tolist()

    def predict_step(self, batch: dict, index: int) -> list[int]:
        return batch["audio_row"].tolist()

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: WebDatasetDataModule, tmp_path: Path, ckpt: str | None = None, **options) -> Recorder:
    model = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(**(QUIET | {"default_root_dir": tmp_path} | options)).fit(model, module, ckpt_path=ckpt)
    return model


def test_fit_validate_test_and_predict(shards: Callable, tmp_path: Path) -> None:
    module = WebDatasetDataModule(
        train=str(shards(100, count=3)),
        val=str(shards(20, kind="rows", name="val", captions=5)),
        test=str(shards(30, name="test")),
        batch_size=8,
        num_workers=0,
        shuffle_buffer=32,
    )
    model = fit(module, tmp_path, max_epochs=2, num_sanity_val_steps=0)
    epochs = [[i for e, ids in model.trained if e == n for i in ids] for n in range(2)]
    assert [len(set(e)) for e in epochs] == [96, 96]
    assert epochs[0] != epochs[1]
    assert sorted(model.evaluated) == sorted(2 * list(range(100)))
    trainer = Trainer(**QUIET)
    model = Recorder()
    trainer.test(model, module, verbose=False)
    assert sorted(model.evaluated) == list(range(30))
    predicted = trainer.predict(Recorder(), module)
    assert sorted(i for batch in predicted for i in batch) == list(range(30))


class Saver(Callback):
    """Saves once, at one of the points where checkpoints are written."""

    def __init__(self, path: Path, hook: str, epoch: int, step: int) -> None:
        self.path, self.hook, self.when = path, hook, (epoch, step)

    def _save(self, trainer: Trainer, hook: str, step: int) -> None:
        if (hook, trainer.current_epoch, step) == (self.hook, *self.when):
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, out: object, batch: object, index: int
    ) -> None:
        self._save(trainer, "batch", index)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "validation", trainer.fit_loop.batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "epoch", 11)


@pytest.mark.parametrize(
    ("hook", "epoch", "step"),
    [("batch", 0, 0), ("batch", 1, 4), ("batch", 1, 11), ("validation", 1, 5), ("validation", 1, 11), ("epoch", 0, 11)],
)
def test_lightnings_checkpoint_resumes_at_the_next_batch(
    shards: Callable, tmp_path: Path, hook: str, epoch: int, step: int
) -> None:
    def module() -> WebDatasetDataModule:
        return WebDatasetDataModule(
            train=str(tmp_path / "train"), val=str(tmp_path / "val"), batch_size=8, num_workers=0
        )

    shards(100, count=2)
    shards(9, name="val")
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "val_check_interval": 6}
    whole = fit(module(), tmp_path, callbacks=[Saver(tmp_path / "c.ckpt", hook, epoch, step)], **options)
    resumed = fit(module(), tmp_path, ckpt=str(tmp_path / "c.ckpt"), **options)
    assert whole.trained[epoch * 12 + step + 1 :] == resumed.trained
    assert len(whole.trained) == 36


def test_max_steps_and_limits_do_not_shift_the_order(shards: Callable, tmp_path: Path) -> None:
    shards(100, count=2)

    def module() -> WebDatasetDataModule:
        return WebDatasetDataModule(train=str(tmp_path / "train"), batch_size=8, num_workers=0)

    whole = fit(module(), tmp_path, max_epochs=3).trained
    keep = [ModelCheckpoint(tmp_path / "k", every_n_train_steps=5, save_top_k=-1)]
    first = fit(module(), tmp_path, max_steps=20, max_epochs=-1, callbacks=keep, enable_checkpointing=True).trained
    assert first == whole[:20]
    last = max((tmp_path / "k").glob("*.ckpt"), key=lambda p: int(p.stem.rpartition("step=")[2]))
    rest = fit(module(), tmp_path, str(last), max_steps=36, max_epochs=-1).trained
    assert first[: 36 - len(rest)] + rest == whole
    limited = fit(module(), tmp_path, max_epochs=3, limit_train_batches=5).trained
    assert limited == [w for e in range(3) for w in whole[12 * e : 12 * e + 5]]


def test_steps_per_epoch_let_a_pass_go_on_over_epochs(shards: Callable, tmp_path: Path) -> None:
    module = WebDatasetDataModule(train=str(shards(80)), batch_size=8, num_workers=0, steps_per_epoch=5)
    trained = fit(module, tmp_path, max_epochs=2).trained
    assert len({i for _, ids in trained for i in ids}) == 80


def test_rows_are_a_bounded_sample_of_distinct_rows(shards: Callable) -> None:
    module = WebDatasetDataModule(train=str(shards(50, captions=5)), val=str(shards(20, kind="rows", name="val")))
    module.setup("fit")
    assert module.rows("train").num_rows == {"audio": 50, "text": 250}
    assert module.rows("val").num_rows == {"audio": 20, "text": 20}
    sample = module.rows("train", max_rows=40)
    assert max(sample.num_rows.values()) <= 40
    assert torch.equal(sample.ids["text"], module.rows("train", max_rows=40).ids["text"])


def test_splits_of_different_encoders_or_dimensions_are_refused(shards: Callable, tmp_path: Path) -> None:
    eye = torch.eye(5)
    chunk = {"audio": eye, "audio_id": torch.arange(5), "text": eye, "text_id": torch.arange(5)}
    write_embedding_shards([chunk], tmp_path / "other")
    first, second = shards(9, name="a", encoder="clap-1"), shards(9, name="b", encoder="clap-2")
    cases = [
        ({"train": first, "val": second}, r"different encoders \(train clap-1, val clap-2\)"),
        ({"train": shards(9, name="c"), "val": first, "test": second}, "different encoders"),
        ({"train": first, "val": tmp_path / "other"}, "val shards: audio has dimension 5, in train it has 6"),
        ({"train": shards(9, name="d", kind="rows")}, "kind 'rows' .* cannot be streamed in pairs"),
    ]
    for specs, words in cases:
        with pytest.raises(ValueError, match=words):
            WebDatasetDataModule(**{k: str(v) for k, v in specs.items()}).setup()
    module = WebDatasetDataModule(train=str(first), val=str(shards(9, name="e")))
    module.setup()
    assert module.encoder == "clap-1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no shards: give train"),
        ({"train": "x", "batch_size": 0}, "batch_size: got 0"),
        ({"train": "x", "num_workers": -1}, "num_workers: got -1"),
        ({"train": "x", "seed": -1}, "seed: got -1"),
        ({"train": "x", "error_budget": 2.0}, "error_budget: got 2.0"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WebDatasetDataModule(**options)


def test_asking_for_what_is_not_there(shards: Callable) -> None:
    module = WebDatasetDataModule(train=str(shards(9)), num_workers=0)
    with pytest.raises(RuntimeError, match="call setup"):
        module.rows("train")
    module.setup()
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="no test shards were given"):
        module.test_dataloader()
    with pytest.raises(ValueError, match="split: got 'dev'"):
        module.rows("dev")
    with pytest.raises(ValueError, match="never opened"):
        WebDatasetDataModule(train="pipe:cat x.tar").setup()


def test_a_fit_over_http(shards: Callable, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    folder = shards(60, count=3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = {"batch_size": 8, "num_workers": 0}
        remote = fit(
            WebDatasetDataModule(train=f"{url}/shard-{{000000..000002}}.tar", **options), tmp_path, max_epochs=1
        )
        server.shutdown()
    local = fit(WebDatasetDataModule(train=str(folder), **options), tmp_path, max_epochs=1)
    assert remote.trained == local.trained
    assert len(local.trained) == 7


def test_remote_shards_get_spawned_workers_unless_told_otherwise(
    shards: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    module = WebDatasetDataModule(train=str(shards(9)))
    module.setup()
    local = module._sets["train"]
    remote = dataclasses.replace(local, urls=("https://host/a.tar",))
    assert module._options(local)["multiprocessing_context"] is None
    assert module._options(remote)["multiprocessing_context"] == "spawn"
    module.multiprocessing_context = "fork"
    assert module._options(remote)["multiprocessing_context"] == "fork"
