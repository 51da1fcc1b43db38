"""Tables of sequences: `<modality>` (N, T, D) of unit frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.datamodules import EmbeddingDataModule
from diffgap_lightning.data.packing import pack
from diffgap_lightning.data.table import EmbeddingTable


def frames(n: int, t: int = 4, dim: int = 6, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, t, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=2, keepdims=True)


def save(path: Path, **fields: np.ndarray) -> Path:
    ids = {f"{name}_id": np.arange(len(x)) for name, x in fields.items() if not name.endswith("_id")}
    np.savez(path, **ids | fields)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_sequences_survive_writing_reading_and_selecting(tmp_path: Path, suffix: str) -> None:
    read = EmbeddingTable.read(save(tmp_path / "a.npz", video=frames(7), audio=frames(7, dim=5, seed=1)))
    assert read.dims == {"video": 6, "audio": 5}
    again = EmbeddingTable.read(read.write(tmp_path / f"b{suffix}"))
    for m in read.modalities:
        assert torch.equal(again.embeddings[m], read.embeddings[m])
    assert torch.equal(read.select([2, 5]).embeddings["video"], read.embeddings["video"][[2, 5]])


def test_half_precision_and_normalize_act_on_every_frame(tmp_path: Path) -> None:
    half = save(tmp_path / "half.npz", video=frames(7).astype(np.float16), audio=frames(7, seed=1))
    long = save(tmp_path / "long.npz", video=3 * frames(7), audio=frames(7, seed=1))
    for table in (EmbeddingTable.read(half), EmbeddingTable.read(long, normalize=True)):
        assert torch.allclose(table.embeddings["video"].norm(dim=-1), torch.ones(7, 4), atol=1e-6)
    with pytest.raises(ValueError, match="L2 norm different from 1"):
        EmbeddingTable.read(long)


def test_one_bad_frame_is_refused(tmp_path: Path) -> None:
    x = frames(7)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"a\.npz: video: 1 of 28 rows \(first: row 14\) have NaN"):
        EmbeddingTable.read(save(tmp_path / "a.npz", video=x, audio=frames(7)))
    np.savez(tmp_path / "b.npz", video=frames(7))
    with pytest.raises(ValueError, match="video: no video_id beside it"):
        EmbeddingTable.read(tmp_path / "b.npz")


def test_batches_keep_the_frames(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", video=frames(20), audio=frames(20, seed=1))
    data = EmbeddingDataModule(path=path, batch_size=5, val_fraction=0.25)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (5, 4, 6)
    whole = EmbeddingTable.read(path)
    assert torch.equal(batch["audio"], whole.embeddings["audio"][batch["audio_id"]])
    assert next(iter(data.val_dataloader()))["video"].shape[1:] == (4, 6)


def test_shards_refuse_sequences(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", video=frames(20), audio=frames(20, seed=1))
    with pytest.raises(ValueError, match=r"video: got shape .*, but shards hold embeddings \(N, D\)"):
        pack(str(path), str(tmp_path / "shards"))
    assert not list(tmp_path.glob("shards/*.tar"))
