from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.functional.pairs import hash_ids

Fields = dict[str, np.ndarray]


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def good() -> Fields:
    return {
        "audio": unit(4, 6),
        "audio_id": np.array([3, 1, 2, 4]),
        "audio_fold": np.array([0, 0, 1, 1]),
        "text": unit(5, 5, seed=1),
        "text_id": np.array([1, 1, 2, 3, 4]),
        "text_caption": np.array(["a dog", "ein Hund", "rain", "été", ""]),
    }


def save(path: Path, fields: Fields, **more: Any) -> Path:
    np.savez(path, **fields | more)
    return path


def same(a: EmbeddingTable, b: EmbeddingTable) -> bool:
    return (
        a.modalities == b.modalities
        and a.encoder == b.encoder
        and all(torch.equal(a.embeddings[m], b.embeddings[m]) and torch.equal(a.ids[m], b.ids[m]) for m in a.modalities)
        and all(np.array_equal(x[k], y[k]) for x, y in ((a.names, b.names), (a.columns, b.columns)) for k in x | y)
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("encoder", [None, "clap-630k"])
def test_a_table_survives_writing_and_reading(tmp_path: Path, suffix: str, encoder: str | None) -> None:
    table = EmbeddingTable.read(save(tmp_path / "in.npz", good()))
    table.encoder = encoder
    again = EmbeddingTable.read(table.write(tmp_path / f"out{suffix}"), modalities=table.modalities)
    assert same(table, again)
    assert table.columns["text_caption"].tolist() == good()["text_caption"].tolist()
    assert table.dims == {"audio": 6, "text": 5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", f"out{suffix}"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_string_ids_pair_by_their_hash_and_keep_their_names(tmp_path: Path, suffix: str) -> None:
    fields = good() | {"audio_id": np.array(list("cabd")), "text_id": np.array(list("aabcd"))}
    table = EmbeddingTable.read(save(tmp_path / "in.npz", fields))
    table = EmbeddingTable.read(table.write(tmp_path / f"out{suffix}"))
    assert table.names["audio"].tolist() == list("cabd")
    assert torch.equal(table.ids["text"], hash_ids("aabcd"))
    assert table.select(hash_ids("a")).names["text"].tolist() == ["a", "a"]


def test_one_tensor_may_be_the_ids_of_two_modalities(tmp_path: Path) -> None:
    ids, x = torch.arange(4), torch.from_numpy(unit(4, 3))
    table = EmbeddingTable({"a": x, "b": x}, {"a": ids, "b": ids})
    assert same(table, EmbeddingTable.read(table.write(tmp_path / "t.safetensors")))


def test_select_keeps_rows_columns_and_names_together(tmp_path: Path) -> None:
    table = EmbeddingTable.read(save(tmp_path / "t.npz", good()))
    part = table.select(torch.tensor([1, 4]))
    assert part.ids["audio"].tolist() == [1, 4]
    assert part.ids["text"].tolist() == [1, 1, 4]
    assert part.columns["text_caption"].tolist() == ["a dog", "ein Hund", ""]
    assert torch.equal(part.embeddings["audio"], table.embeddings["audio"][[1, 3]])


def test_select_rows_takes_numbers_or_masks_and_leaves_other_modalities_whole(tmp_path: Path) -> None:
    table = EmbeddingTable.read(save(tmp_path / "t.npz", good()))
    assert table.select_rows({"audio": [2, 0]}).columns["audio_fold"].tolist() == [1, 0]
    mask = table.select_rows({"audio": torch.tensor([True, False, False, True])})
    assert mask.num_rows == {"audio": 2, "text": 5}
    assert mask.ids["audio"].tolist() == [3, 4]


def test_a_column_belongs_to_the_longest_modality(tmp_path: Path) -> None:
    fields = {"audio": unit(2, 3), "audio_id": np.arange(2), "audio_noisy": unit(2, 3), "audio_noisy_id": np.arange(2)}
    table = EmbeddingTable.read(
        save(tmp_path / "t.npz", fields, audio_noisy_level=np.arange(2), audio_fold=np.arange(2))
    )
    assert table.modalities == ("audio", "audio_noisy")
    part = table.select_rows({"audio": [1]})
    assert {name: column.tolist() for name, column in part.columns.items()} == {
        "audio_noisy_level": [0, 1],
        "audio_fold": [1],
    }


def test_reading_some_modalities_in_a_chosen_order(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", good(), video=unit(4, 3), video_id=np.arange(1, 5))
    assert EmbeddingTable.read(path, modalities=["video", "audio"]).modalities == ("video", "audio")


@pytest.mark.parametrize("kind", ["float16", "float64", ">f4", "float128"])
def test_other_float_types_become_float32_unit_rows(tmp_path: Path, kind: str) -> None:
    if not hasattr(np, "float128") and kind == "float128":
        pytest.skip("this platform has no float128")
    fields = good() | {"audio": good()["audio"].astype(kind), "audio_id": good()["audio_id"].astype("uint8")}
    table = EmbeddingTable.read(save(tmp_path / "t.npz", fields))
    assert table.embeddings["audio"].dtype == torch.float32
    assert table.ids["audio"].dtype == torch.int64
    assert (table.embeddings["audio"].norm(dim=1) - 1).abs().max() < 1e-6
    np.testing.assert_allclose(table.embeddings["audio"], good()["audio"], atol=1e-3)


def test_bfloat16_safetensors_become_float32_unit_rows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    x = torch.from_numpy(unit(3, 64)).bfloat16()
    save_file({"a": x, "a_id": torch.arange(3), "b": x.clone(), "b_id": torch.arange(3)}, tmp_path / "t.safetensors")
    rows = EmbeddingTable.read(tmp_path / "t.safetensors").embeddings["a"]
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-6


def test_fortran_order_is_read_right_and_stored_by_rows(tmp_path: Path) -> None:
    fields = good() | {"audio": np.asfortranarray(good()["audio"])}
    rows = EmbeddingTable.read(save(tmp_path / "t.npz", fields)).embeddings["audio"]
    assert rows.is_contiguous()
    assert torch.equal(rows, torch.from_numpy(good()["audio"]))


def test_normalize_repairs_length_but_not_nan(tmp_path: Path) -> None:
    table = EmbeddingTable.read(save(tmp_path / "t.npz", good() | {"audio": 7 * good()["audio"]}), normalize=True)
    np.testing.assert_allclose(table.embeddings["audio"], good()["audio"], atol=1e-6)
    with pytest.raises(ValueError, match="audio: .*NaN"):
        EmbeddingTable.read(save(tmp_path / "n.npz", good() | {"audio": good()["audio"] * np.nan}), normalize=True)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Fields], Fields]:
    return lambda fields: fields | {name: change(fields[name])}


def without(name: str) -> Callable[[Fields], Fields]:
    return lambda fields: {k: v for k, v in fields.items() if k != name}


def put(x: np.ndarray, row: int, value: float) -> np.ndarray:
    x = x.copy()
    x[row] = value
    return x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("audio", lambda x: put(x, 2, np.nan)), r"audio: 1 of 4 rows \(first: row 2\) have NaN"),
        (replaced("text", lambda x: put(x, 0, np.inf)), r"text: .*row 0\) have NaN or infinite"),
        (replaced("audio", lambda x: put(x, 1, 0.0)), r"audio: .*row 1\) have zero vectors"),
        (replaced("audio", lambda x: 3 * x), "audio: 4 of 4 rows.*first: 3.*or read with normalize=True"),
        (replaced("audio", lambda x: x[:, 0]), r"audio: got shape \(4,\), expected \(B, D\)"),
        (replaced("audio", lambda x: x[:, None, None]), r"audio: got shape \(4, 1, 1, 6\)"),
        (replaced("audio", lambda x: (100 * x).astype(int)), "audio: got int64, expected floating"),
        (replaced("audio", lambda x: x[:0]), r"audio: got shape \(0, 6\).*empty"),
        (replaced("audio_id", lambda x: x + 100), "audio_id: shares no id with text_id"),
        (replaced("audio_id", lambda x: x[:3]), r"audio_id: got shape \(3,\), expected \(4,\)"),
        (replaced("audio_id", lambda x: x[:, None]), r"audio_id: got shape \(4, 1\), expected \(4,\)"),
        (replaced("audio_id", lambda x: x.astype(float)), "audio_id: got float64, expected integers or strings"),
        (replaced("audio_id", lambda x: x > 2), "audio_id: got bool, expected integers or strings"),
        (replaced("audio_id", lambda x: x.astype(str)), "text_id holds integers but audio_id strings"),
        (replaced("audio_id", lambda x: x.astype("u8") + np.uint64(2**63)), "audio_id: got .* int64 cannot hold"),
        (replaced("audio_fold", lambda x: x[:2]), r"audio_fold: got shape \(2,\), expected \(4, ...\)"),
        (without("audio_id"), "audio: no audio_id beside it"),
        (without("audio"), "audio_id: no audio beside it"),
        (lambda fields: {}, "no <modality> with <modality>_id among its fields .none."),
        (lambda fields: {"seed": np.array(3)}, "among its fields .seed."),
        (
            lambda fields: {k: v for k, v in fields.items() if k[0] == "a"},
            "audio_id: shares no id with another modality",
        ),
        (lambda fields: fields | {"encoder": np.arange(2)}, "encoder: got shape .2,. of int64, expected one string"),
    ],
)
def test_malformed_fields_get_one_line_that_names_file_and_field(
    tmp_path: Path, change: Callable[[Fields], Fields], words: str
) -> None:
    path = save(tmp_path / "clips.npz", change(good()))
    with pytest.raises(ValueError, match=f"clips.npz: .*{words}|clips.npz: {words}") as caught:
        EmbeddingTable.read(path)
    assert "\n" not in str(caught.value)


def test_an_unexpected_dimension_or_modality_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", good())
    with pytest.raises(ValueError, match=r"t.npz: audio: got dimension 6, expected 512"):
        EmbeddingTable.read(path, dims={"audio": 512})
    with pytest.raises(ValueError, match=r"t.npz: no video and video_id among its fields"):
        EmbeddingTable.read(path, modalities=["audio", "video"])


def test_single_rows_without_a_partner_are_counted_in_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", good() | {"text_id": np.array([1, 1, 2, 9, 8])})
    with pytest.warns(UserWarning, match=r"t.npz: 2 of 4 audio rows, 2 of 5 text rows have no partner"):
        table = EmbeddingTable.read(path)
    assert table.num_rows == {"audio": 4, "text": 5}
    assert table.paired()["audio"].tolist() == [False, True, True, False]


def test_a_table_of_one_modality_is_read_when_no_pairs_are_required(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", {"audio": unit(2, 3), "audio_id": np.arange(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EmbeddingTable.read(path, require_pairs=False).num_rows == {"audio": 2}


@pytest.mark.parametrize(
    "change", [{"embeddings": {}}, {"ids": {"a": torch.arange(2.0)}}, {"columns": {"a_fold": np.arange(3)}}]
)
def test_a_table_of_unequal_lengths_is_not_built(change: dict[str, Any]) -> None:
    parts = {"embeddings": {"a": torch.eye(2)}, "ids": {"a": torch.arange(2)}} | change
    with pytest.raises(ValueError, match="a"):
        EmbeddingTable(**parts)


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    ids = {"a": torch.arange(2), "b": torch.arange(2)}
    with pytest.raises(ValueError, match=r"t.npz: b: .*NaN"):
        EmbeddingTable({"a": torch.eye(2), "b": torch.eye(2) * torch.nan}, ids).write(tmp_path / "t.npz")
    columns = {"a_what": np.array([{}, []], dtype=object)}
    with pytest.raises(ValueError, match=r"t.npz: a_what: got dtype object"):
        EmbeddingTable({"a": torch.eye(2), "b": torch.eye(2)}, ids, columns=columns).write(tmp_path / "t.npz")
    assert list(tmp_path.iterdir()) == []
