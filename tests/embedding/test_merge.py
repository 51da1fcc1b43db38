from __future__ import annotations

import numpy as np
import torch

from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.merge import pair_rows, to_pairs


def table(**rows: list[tuple[int, float]]) -> EmbeddingTable:
    """Modality -> (clip, start) of each row."""
    embeddings = {m: torch.eye(max(8, len(r)))[: len(r)] for m, r in rows.items()}
    ids = {m: torch.tensor([clip for clip, _ in r]) for m, r in rows.items()}
    columns = {f"{m}_start": np.array([start for _, start in r]) for m, r in rows.items() if m != "text"}
    return EmbeddingTable(embeddings, ids, columns=columns)


def test_every_window_with_every_caption() -> None:
    got = pair_rows(table(audio=[(7, 0.0), (7, 10.0), (8, 0.0)], text=[(7, 0.0), (8, 0.0), (7, 0.0)]))
    assert list(zip(got["audio"], got["text"], strict=True)) == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1)]


def test_windows_pair_by_their_start_and_those_of_one_modality_alone_are_left_out() -> None:
    got = pair_rows(table(audio=[(7, 0.0), (7, 5.0), (7, 10.0)], video=[(7, 5.0), (7, 0.0)]))
    assert got == {"audio": [0, 1], "video": [1, 0]}


def test_three_modalities() -> None:
    got = pair_rows(table(text=[(1, 0.0), (1, 0.0), (2, 0.0)], video=[(2, 0.0), (1, 0.0)], audio=[(1, 0.0), (2, 0.0)]))
    triples = set(zip(got["text"], got["video"], got["audio"], strict=True))
    assert triples == {(0, 1, 0), (1, 1, 0), (2, 0, 1)}


def test_chunks_have_equal_ids_row_by_row() -> None:
    chunk = to_pairs(table(audio=[(7, 0.0), (8, 0.0)], text=[(8, 0.0), (7, 0.0), (7, 0.0)]))
    assert chunk["audio_id"].tolist() == chunk["text_id"].tolist() == [7, 7, 8]
    assert chunk["audio_start"].tolist() == [0.0, 0.0, 0.0]
