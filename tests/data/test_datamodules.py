from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from diffgap_lightning.data import EmbeddingDataModule, EmbeddingTable, SyntheticDataModule, SyntheticWorld

Batch = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:.*using `ckpt_path`",
    "ignore:predict returned None",
)


class Recorder(LightningModule):
    """Learns nothing worth knowing and remembers the batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_ids: list[tuple[int, list[int]]] = []
        self.rows: dict[str, list[int]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert torch.equal(batch["audio_id"], batch["text_id"])
        self.train_ids.append((self.current_epoch, batch["audio_id"].tolist()))
        return (self.weight - batch["audio"].mean()) ** 2

    def _record(self, batch: Batch) -> None:
        for name in ("audio", "text"):
            self.rows.setdefault(name, []).extend(batch[f"{name}_row"].tolist())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._record(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._record(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        self._record(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | options)


def tiny_world(**options: Any) -> SyntheticDataModule:
    world = SyntheticWorld(latent_dim=3, num_concepts=5, num_modes=2, dim=8, hidden_dim=6)
    sizes = {"num_pairs": 20, "num_val": 7, "num_test": 6, "batch_size": 4}
    return SyntheticDataModule(**sizes | {"world": world} | options)


def write_clips(path: Path, ids: range = range(20), **changes: Any) -> Path:
    audio = torch.tensor(list(ids))
    text = audio.repeat_interleave(2)
    x = torch.nn.functional.normalize(torch.randn(len(text), 6, generator=torch.Generator().manual_seed(0)), dim=1)
    columns = {"audio_fold": audio.numpy() % 4, "text_fold": text.numpy() % 4}
    parts = {"embeddings": {"audio": x[::2], "text": x}, "ids": {"audio": audio, "text": text}, "columns": columns}
    EmbeddingTable(**parts | changes).write(path)
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips.npz")


def ready(data: Any) -> Any:
    data.setup()
    return data


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trainer_sees_every_pair_and_every_row_once(clips: Path, num_workers: int) -> None:
    for data in (tiny_world(num_workers=num_workers), EmbeddingDataModule(clips, 4, num_workers=num_workers)):
        module = Recorder()
        trainer(max_epochs=2).fit(module, data)
        orders = [[ids for e, ids in module.train_ids if e == epoch] for epoch in (0, 1)]
        assert orders[0] != orders[1]
        for order in orders:  # each caption has one clip, so captions and pairs are the same
            assert sorted(i for ids in order for i in ids) == sorted(data.rows("train").ids["text"].tolist())
        for name in ("audio", "text"):
            assert sorted(module.rows[name]) == sorted([*range(data.rows("val").num_rows[name])] * 2)
        for run in (trainer().test, trainer().predict):
            module.rows = {}
            run(module, datamodule=data)
            for name in ("audio", "text"):
                assert sorted(module.rows[name]) == list(range(data.rows("test").num_rows[name]))


def test_workers_give_the_batches_that_no_workers_give() -> None:
    alone, helped = ready(tiny_world()), ready(tiny_world(num_workers=2))
    for loader in ("train_dataloader", "val_dataloader"):
        for one, two in zip(getattr(alone, loader)(), getattr(helped, loader)(), strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_resumed_after_any_step_sees_what_an_uninterrupted_one_would_have(tmp_path: Path) -> None:
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep]).fit(whole, tiny_world())
    assert len(whole.train_ids) == 15
    for step in range(1, 15):
        rest = Recorder()
        trainer(max_epochs=3).fit(rest, tiny_world(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert rest.train_ids == whole.train_ids[step:], f"resumed after step {step}"


def test_a_run_resumed_after_an_epoch_goes_on_with_the_next_order(tmp_path: Path) -> None:
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep]).fit(whole, tiny_world())
    for epoch in range(2):
        rest = Recorder()
        trainer(max_epochs=3).fit(rest, tiny_world(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert rest.train_ids == whole.train_ids[5 * (epoch + 1) :]


DDP_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_datamodules import Recorder, tiny_world, trainer

if __name__ == "__main__":
    num_workers, sampler = int(sys.argv[3]), sys.argv[4] == "True"
    data, module = tiny_world(batch_size=3, num_workers=num_workers), Recorder()
    options = dict(devices=2, strategy="ddp", use_distributed_sampler=sampler)
    run = trainer(max_epochs=2, **options)
    run.fit(module, data)
    out = {"train": module.train_ids, "val": module.rows, "ids": data.rows("train").ids["text"].tolist()}
    for name in ("test", "predict"):
        module.rows = {}
        getattr(run, name)(module, datamodule=data)
        out[name] = module.rows
    torch.save(out, f"{sys.argv[2]}/rank{run.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "sampler"), [(0, True), (2, False)])
def test_two_processes_share_pairs_and_rows(tmp_path: Path, num_workers: int, sampler: bool) -> None:
    script = tmp_path / "run.py"
    script.write_text(DDP_SCRIPT)
    arguments = [str(Path(__file__).parent), str(tmp_path), str(num_workers), str(sampler)]
    run = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = run.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == 0, errors[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for epoch in (0, 1):
        steps = [[ids for e, ids in rank["train"] if e == epoch] for rank in ranks]
        assert [len(rank) for rank in steps] == [3, 3]
        seen = [i for rank in steps for ids in rank for i in ids]
        assert len(set(seen)) == len(seen) == 18
        assert set(seen) <= set(ranks[0]["ids"])
    for name, number, epochs in (("val", 7, 2), ("test", 6, 1), ("predict", 6, 1)):
        for modality in ("audio", "text"):
            seen = [row for rank in ranks for row in rank[name][modality]]
            assert sorted(seen) == sorted([*range(number)] * epochs)


def test_the_splits_of_a_file(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips, fold=3, val_fraction=0.2))
    assert set((data.rows("test").ids["audio"] % 4).tolist()) == {3}
    assert data.rows("val").num_rows == {"audio": 3, "text": 6}
    assert data.rows("train").num_rows == {"audio": 12, "text": 24}
    data = ready(EmbeddingDataModule(clips, fold=3, val_fold=1))
    assert set((data.rows("val").ids["text"] % 4).tolist()) == {1}


def test_separate_files_are_their_splits(tmp_path: Path) -> None:
    paths = [write_clips(tmp_path / f"{i}.npz", range(10 * i, 10 * i + 10)) for i in range(3)]
    data = ready(EmbeddingDataModule(paths[0], val_path=paths[1], test_path=paths[2]))
    sizes = {split: set((data.rows(split).ids["audio"] // 10).tolist()) for split in ("train", "val", "test")}
    assert sizes == {"train": {0}, "val": {1}, "test": {2}}
    assert data.rows("train").num_rows["audio"] == 10
    data = ready(EmbeddingDataModule(paths[0], test_path=paths[2], val_fraction=0.2))
    assert [data.rows(split).num_rows["audio"] for split in ("train", "val", "test")] == [8, 2, 10]


def test_another_file_may_hold_more_modalities(tmp_path: Path) -> None:
    one, two = write_clips(tmp_path / "one.npz"), EmbeddingTable.read(write_clips(tmp_path / "two.npz"))
    two.embeddings = {"video": two.embeddings["audio"]} | two.embeddings
    two.ids = {"video": two.ids["audio"]} | two.ids
    data = ready(EmbeddingDataModule(one, test_path=two.write(tmp_path / "three.npz")))
    assert data.rows("test").modalities == ("audio", "text")


def test_another_file_must_have_the_same_dimension_and_encoder(tmp_path: Path) -> None:
    one = write_clips(tmp_path / "one.npz", encoder="clap-a")
    two = write_clips(tmp_path / "two.npz", encoder="clap-b")
    with pytest.raises(ValueError, match=r"two.npz: encoder: got clap-b, expected clap-a as in .*one.npz"):
        EmbeddingDataModule(one, test_path=two).setup()
    x, ids = torch.eye(3), torch.arange(3)
    EmbeddingTable({"audio": x, "text": x}, {"audio": ids, "text": ids}).write(tmp_path / "three.npz")
    with pytest.raises(ValueError, match=r"three.npz: audio: got dimension 3, expected 6"):
        EmbeddingDataModule(one, val_path=tmp_path / "three.npz").setup()
    assert ready(EmbeddingDataModule(one)).encoder == "clap-a"


def test_options_that_contradict_each_other_are_refused(clips: Path) -> None:
    with pytest.raises(ValueError, match="got fold=1 and test_path="):
        EmbeddingDataModule(clips, fold=1, test_path=clips)
    with pytest.raises(ValueError, match="got val_fold=1 without fold"):
        EmbeddingDataModule(clips, val_fold=1)
    with pytest.raises(ValueError, match="got val_fold=1 and val_path="):
        EmbeddingDataModule(clips, fold=2, val_fold=1, val_path=clips)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        EmbeddingDataModule(clips, batch_size=0)
    with pytest.raises(ValueError, match="predict_split: got 'all', expected one of train, val, test"):
        EmbeddingDataModule(clips, predict_split="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_val: got -1"):
        SyntheticDataModule(num_val=-1)


def test_a_split_that_was_asked_to_be_empty_says_so(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips, val_fraction=0, test_fraction=0))
    assert data.val_dataloader() == []
    assert data.rows("train").num_rows["audio"] == 20
    for ask in (data.test_dataloader, data.predict_dataloader, lambda: data.rows("val")):
        with pytest.raises(ValueError, match="the (test|val) split is empty"):
            ask()
    with pytest.raises(ValueError, match="split: got 'dev', expected one of train, val, test"):
        data.rows("dev")
    with pytest.raises(RuntimeError, match=r"EmbeddingDataModule: call setup\(\) before"):
        EmbeddingDataModule(clips).val_dataloader()


def test_training_without_validation_runs(clips: Path) -> None:
    module = Recorder()
    trainer(max_epochs=1).fit(module, EmbeddingDataModule(clips, 8, val_fraction=0))
    assert module.train_ids
    assert not module.rows


def test_a_batch_larger_than_the_data_takes_all_of_it(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips, batch_size=10_000, val_fraction=0, test_fraction=0))
    batches = list(data.train_dataloader())
    assert [len(batch["audio"]) for batch in batches] == [40]


def test_predicting_a_chosen_split(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips, 4, predict_split="train"))
    rows = torch.cat([batch["text_row"] for batch in data.predict_dataloader()])
    assert sorted(rows.tolist()) == list(range(data.rows("train").num_rows["text"]))


def test_row_numbers_point_into_the_rows_of_the_split(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips, 3))
    for batch in data.test_dataloader():
        for m in ("audio", "text"):
            assert torch.equal(data.rows("test").embeddings[m][batch[f"{m}_row"]], batch[m])
            assert torch.equal(data.rows("test").ids[m][batch[f"{m}_row"]], batch[f"{m}_id"])


def test_setup_reads_once_and_rows_can_be_bounded(clips: Path) -> None:
    data = ready(EmbeddingDataModule(clips))
    first = data.rows("train")
    data.setup("test")
    assert data.rows("train") is first
    assert max(data.rows("train", max_rows=5).num_rows.values()) <= 5


def test_the_synthetic_splits_are_different_and_known() -> None:
    data = ready(tiny_world())
    ids = [set(data.rows(split).ids["audio"].tolist()) for split in ("train", "val", "test")]
    assert [len(i) for i in ids] == [20, 7, 6]
    assert len(set.union(*ids)) == 33
    assert not torch.equal(data.rows("train").embeddings["audio"][:6], data.rows("test").embeddings["audio"])
    assert data.encoder == data.world.fingerprint
    again = ready(tiny_world())
    assert torch.equal(again.rows("test").embeddings["text"], data.rows("test").embeddings["text"])
    alike = ready(tiny_world(num_val=9, num_test=9))
    assert not torch.equal(alike.rows("val").embeddings["text"], alike.rows("test").embeddings["text"])
    other = ready(tiny_world(seed=1))
    assert not torch.equal(other.rows("test").embeddings["text"], data.rows("test").embeddings["text"])


def test_the_optimum_belongs_to_the_rows_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(SyntheticDataModule(num_pairs=10, num_val=0, num_test=300))
    scores = data.optimum("test")
    assert scores.shape == (300, 300)
    assert (scores.argmax(1) == torch.arange(300)).float().mean() > 0.9
    with pytest.raises(ValueError, match="the val split is empty"):
        data.optimum("val")
    monkeypatch.setattr("diffgap_lightning.data.datamodules.MAX_OPTIMUM", 99)
    with pytest.raises(ValueError, match="optimum of the train split: .* too large a matrix"):
        data.optimum("train")


def test_yaml_names_the_datamodules(clips: Path, tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = f"{{class_path: diffgap_lightning.data.EmbeddingDataModule, init_args: {{path: {clips}, fold: 3}}}}"
    data = parser.instantiate_classes(parser.parse_args(["--data", config, "--data.batch_size", "7"])).data
    assert (data.path, data.fold, data.batch_size) == (clips, 3, 7)
    config = (
        "{class_path: diffgap_lightning.data.SyntheticDataModule, init_args: {num_pairs: 30, world: "
        "{class_path: diffgap_lightning.data.SyntheticWorld, init_args: {dim: 8, num_concepts: 4}}}}"
    )
    data = parser.instantiate_classes(parser.parse_args(["--data", config])).data
    assert ready(data).rows("train").dims == {"audio": 8, "text": 8}


@pytest.mark.parametrize(
    "options", [{"overfit_batches": 1}, {"fast_dev_run": 2}, {"limit_train_batches": 2, "limit_val_batches": 1}]
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*val_dataloader", "ignore:.*train_dataloader")
def test_shortcuts_of_the_trainer_get_whole_batches(options: dict[str, Any]) -> None:
    module = Recorder()
    trainer(max_epochs=1, **options).fit(module, tiny_world())
    assert all(len(ids) == 4 for _, ids in module.train_ids)
    assert len(module.train_ids) == options.get("overfit_batches", 2)


def test_tables_and_the_world_do_not_import_lightning() -> None:
    code = (
        "import sys, diffgap_lightning.data as d; d.EmbeddingTable; d.SyntheticWorld; print('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "False\n"
