from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.refined_writer import RefinedEmbeddingWriter

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec")


def refined(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a refiner would predict for these rows: a vector that encodes the row."""
    angle = rows.double() / 100
    vector = torch.stack([angle.cos(), angle.sin()], dim=1).float()
    return {"text_to_audio": vector, "text_to_audio_id": 1000 + rows // 2, "text_to_audio_row": rows}


class Predictor(LightningModule):
    """Predicts directions of unequal lengths; rows repeat as padding samplers make them."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
        forward = refined(batch)
        backward = {k.replace("text_to_audio", "audio_to_text"): v[::2] for k, v in forward.items()}
        return forward | backward


def predict(path: Path, rows: list[int], **options: Any) -> list[Any] | None:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RefinedEmbeddingWriter(str(path), **options)],
    )  # fmt: skip
    return trainer.predict(Predictor(), DataLoader(torch.tensor(rows), batch_size=4))  # type: ignore[arg-type]


ORDER = [7, 3, 9, 0, 1, 2, 8, 5, 4, 6, 7, 3]  # each of 0..9, two of them twice


@pytest.mark.parametrize("name", ["out.npz", "out.safetensors"])
def test_table_holds_each_row_once_in_order(tmp_path: Path, name: str) -> None:
    assert predict(tmp_path / name, ORDER, rows_per_part=3) is None
    table = EmbeddingTable.read(tmp_path / name, require_pairs=False)
    expected = refined(torch.arange(10))
    assert torch.equal(table.embeddings["text_to_audio"], expected["text_to_audio"])
    assert torch.equal(table.ids["text_to_audio"], expected["text_to_audio_id"])
    assert table.columns["text_to_audio_row"].tolist() == list(range(10))
    back = table.columns["audio_to_text_row"].tolist()
    assert back == sorted({row for start in (0, 4, 8) for row in ORDER[start : start + 4 : 2]})
    assert torch.equal(table.embeddings["audio_to_text"], refined(torch.tensor(back))["text_to_audio"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_shards_hold_each_row_once_and_the_order_comes_back_by_row(tmp_path: Path) -> None:
    predict(tmp_path / "out", ORDER, rows_per_part=3, dtype="float16")
    assert verify_shards(tmp_path / "out") == []
    assert open_shards(tmp_path / "out").manifest.kind == "rows"
    table = read_embedding_shards(tmp_path / "out")
    order = table.columns["text_to_audio_row"].argsort()
    assert table.columns["text_to_audio_row"][order].tolist() == list(range(10))
    expected = refined(torch.arange(10))
    assert torch.allclose(table.embeddings["text_to_audio"][order], expected["text_to_audio"], atol=1e-3)
    assert torch.equal(table.ids["text_to_audio"][order], expected["text_to_audio_id"])


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    for name in ("out.npz", "out"):
        predict(tmp_path / name, [0, 1])
        with pytest.raises(ValueError, match="exists; choose another path or set overwrite"):
            predict(tmp_path / name, [0])
        predict(tmp_path / name, [0, 1, 2, 3], overwrite=True)
    assert EmbeddingTable.read(tmp_path / "out.npz", require_pairs=False).num_rows["text_to_audio"] == 4
    assert open_shards(tmp_path / "out").manifest.num_rows["text_to_audio"] == 4


def test_parts_of_a_killed_run_do_not_mix_in(tmp_path: Path) -> None:
    predict(tmp_path / "a.npz", [5, 6])
    (tmp_path / "out.npz.parts").mkdir()
    (tmp_path / "a.npz").rename(tmp_path / "out.npz.parts" / "text_to_audio-00000-000000.npz")
    predict(tmp_path / "out.npz", [0, 1])
    table = EmbeddingTable.read(tmp_path / "out.npz", require_pairs=False)
    assert table.columns["text_to_audio_row"].tolist() == [0, 1]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        RefinedEmbeddingWriter("x.npz", dtype="int8")
    with pytest.raises(ValueError, match="nothing was refined"):
        predict(tmp_path / "out.npz", [])

    class Wrong(Predictor):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
            return {"audio": batch}

    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        callbacks=[RefinedEmbeddingWriter(str(tmp_path / "out.npz"))],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got \['audio'\], expected <source>_to_<target>"):
        trainer.predict(Wrong(), DataLoader(torch.arange(2)))  # type: ignore[arg-type]


SCRIPT = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from diffgap_lightning.embedding import RefinedEmbeddingWriter

class Predictor(LightningModule):
    def predict_step(self, batch, batch_idx):
        angle = batch.double() / 100
        return {
            "text_to_audio": torch.stack([angle.cos(), angle.sin()], dim=1).float(),
            "text_to_audio_id": 1000 + batch // 2,
            "text_to_audio_row": batch,
        }

trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
                  callbacks=[RefinedEmbeddingWriter(sys.argv[1], rows_per_part=4)])
trainer.predict(Predictor(), DataLoader(torch.arange(11), batch_size=3))
"""


@pytest.mark.slow
def test_two_ranks_with_a_padding_sampler_give_each_row_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "script.py",
        "out.npz",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, timeout=120, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = EmbeddingTable.read(tmp_path / "out.npz", require_pairs=False)
    assert table.columns["text_to_audio_row"].tolist() == list(range(11))  # 12 were predicted: the sampler padded one
    assert torch.equal(table.embeddings["text_to_audio"], refined(torch.arange(11))["text_to_audio"])
