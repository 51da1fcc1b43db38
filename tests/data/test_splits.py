from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.splits import sample_ids, split_by_fold, split_by_fraction
from diffgap_lightning.data.table import EmbeddingTable

SHARED = Path(os.environ.get("DIFFGAP_SHARED", Path(__file__).resolve().parents[2] / "../shared")) / "data/real_clap"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared embedding tables are not beside the checkout")


def table(columns: dict[str, np.ndarray] | None = None, **ids: list[int]) -> EmbeddingTable:
    x = {m: torch.nn.functional.one_hot(torch.arange(len(v)) % 4, 4).float() for m, v in ids.items()}
    return EmbeddingTable(x, {m: torch.tensor(v) for m, v in ids.items()}, columns=columns or {})


def clips(folds: list[int] | None = None) -> EmbeddingTable:
    """20 clips with 1 to 3 captions each."""
    audio = list(range(100, 120))
    text = [i for i in audio for _ in range(1 + i % 3)]
    columns = (
        {} if folds is None else {"audio_fold": np.array(folds), "text_fold": np.array([folds[i - 100] for i in text])}
    )
    return table(columns, audio=audio, text=text)


def classes() -> EmbeddingTable:
    """3 classes, 4 clips each in folds 1 to 4, and one prompt a class that has no fold."""
    return table({"audio_fold": np.array([1, 2, 3, 4] * 3)}, audio=[0] * 4 + [1] * 4 + [2] * 4, text=[0, 1, 2])


def ids_of(splits: dict[str, EmbeddingTable], name: str) -> set[int]:
    return set(splits[name].ids["audio"].tolist())


def test_fractions_hold_out_whole_ids() -> None:
    splits = split_by_fraction(clips(), 0.1, 0.25, seed=3)
    parts = [ids_of(splits, name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [13, 2, 5]
    assert set.union(*parts) == set(range(100, 120))
    for split in splits.values():
        assert set(split.ids["text"].tolist()) == set(split.ids["audio"].tolist())
    assert sum(len(split.ids["text"]) for split in splits.values()) == len(clips().ids["text"])


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    whole = clips()
    shuffled = whole.select_rows({m: torch.arange(n).flip(0) for m, n in whole.num_rows.items()})
    assert ids_of(split_by_fraction(whole, 0.1, 0.2, 0), "test") == ids_of(
        split_by_fraction(shuffled, 0.1, 0.2, 0), "test"
    )
    assert len({frozenset(ids_of(split_by_fraction(whole, 0.1, 0.2, seed), "test")) for seed in range(5)}) > 1


def test_a_fraction_of_zero_makes_no_split_and_a_small_one_at_least_one_id() -> None:
    assert set(split_by_fraction(clips(), 0, 0)) == {"train"}
    assert set(split_by_fraction(clips(), 0, 1)) == {"test"}
    assert len(ids_of(split_by_fraction(clips(), 0.001, 0), "val")) == 1


@pytest.mark.parametrize(
    ("val", "test", "words"),
    [
        (-0.1, 0, "val_fraction: got -0.1"),
        (0, 1.5, "test_fraction: got 1.5"),
        (0.6, 0.6, "got 1.2, expected at most 1"),
    ],
)
def test_fractions_that_are_no_shares_are_refused(val: float, test: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_by_fraction(clips(), val, test)


def test_too_few_ids_for_the_splits_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"two.npz: the train split is empty \(2 paired ids"):
        split_by_fraction(table(audio=[1, 2], text=[1, 2]), 0.1, 0.1, where="two.npz")


def test_rows_without_a_partner_are_in_no_split() -> None:
    splits = split_by_fraction(table(audio=list(range(10)), text=[*range(5, 15)]), 0.2, 0.2)
    assert set.union(*(ids_of(splits, name) for name in splits)) == set(range(5, 10))


def test_a_fold_of_clips_is_the_test_and_validation_ids_come_from_the_others() -> None:
    folds = [i % 5 for i in range(20)]
    splits = split_by_fold(clips(folds), 2, val_fraction=0.25)
    assert ids_of(splits, "test") == {102, 107, 112, 117}
    assert len(ids_of(splits, "val")) == 4
    assert len(ids_of(splits, "train")) == 12
    assert not ids_of(splits, "val") & ids_of(splits, "train")
    assert set(splits["val"].ids["text"].tolist()) == ids_of(splits, "val")


def test_captions_without_folds_go_with_their_clips() -> None:
    folds = [i % 5 for i in range(20)]
    whole = clips(folds)
    only_audio = EmbeddingTable(whole.embeddings, whole.ids, columns={"audio_fold": whole.columns["audio_fold"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, part in split_by_fold(only_audio, 2).items():
            assert part.ids["text"].tolist() == split_by_fold(whole, 2)[name].ids["text"].tolist()


def test_folds_through_classes_keep_every_prompt_everywhere_and_validate_on_the_next_fold() -> None:
    splits = split_by_fold(classes(), 4)
    folds = {name: set(part.columns["audio_fold"].tolist()) for name, part in splits.items()}
    assert folds == {"train": {2, 3}, "val": {1}, "test": {4}}
    assert all(part.ids["text"].tolist() == [0, 1, 2] for part in splits.values())


def test_validation_can_be_a_named_fold_or_none() -> None:
    splits = split_by_fold(classes(), "4", val_fold=2)
    assert {name: set(part.columns["audio_fold"].tolist()) for name, part in splits.items()}["val"] == {2}
    splits = split_by_fold(classes(), 4, val_fraction=0)
    assert set(splits["train"].columns["audio_fold"].tolist()) == {1, 2, 3}
    assert "val" not in splits


def test_folds_may_be_words() -> None:
    whole = table({"audio_split": np.array(["train"] * 3 + ["eval"])}, audio=[1, 2, 3, 4], text=[1, 2, 3, 4])
    splits = split_by_fold(whole, "eval", column="split", val_fraction=0)
    assert splits["test"].ids["text"].tolist() == [4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fold": 9}, "t.npz: fold=9 is not in ._fold; expected one of 1, 2, 3, 4"),
        ({"fold": 1, "val_fold": 7}, "t.npz: val_fold=7 is not in"),
        ({"fold": 1, "val_fold": 1}, "t.npz: val_fold=1 is the test fold"),
        ({"fold": 1, "column": "part"}, r"t.npz: fold=1 but no <modality>_part among its columns \(audio_fold\)"),
    ],
)
def test_folds_that_are_not_there_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_by_fold(classes(), where="t.npz", **arguments)


def test_two_folds_leave_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"the train split is empty \(fold=1 of 1, 2, val_fold='2'"):
        split_by_fold(table({"a_fold": np.array([1, 2, 1, 2])}, a=[0, 0, 1, 1], b=[0, 1]), 1)


def test_pairs_across_folds_are_in_no_split_and_counted() -> None:
    columns = {"a_fold": np.array([1, 1, 2, 2]), "b_fold": np.array([1, 2, 2, 2])}
    with pytest.warns(UserWarning, match="1 a rows, 1 b rows are in no split"):
        splits = split_by_fold(table(columns, a=[0, 1, 2, 3], b=[0, 1, 2, 3]), 1, val_fraction=0)
    assert splits["test"].ids["a"].tolist() == [0]
    assert splits["train"].ids["a"].tolist() == [2, 3]


def test_sampled_rows_are_whole_ids_up_to_the_number() -> None:
    for number in (5, 20, 21):
        part = sample_ids(clips(), number)
        assert max(part.num_rows.values()) <= number
        assert set(part.ids["text"].tolist()) == set(part.ids["audio"].tolist())
        assert len(part.ids["text"]) == sum(1 + i % 3 for i in part.ids["audio"].tolist())
        assert part.ids["audio"].tolist() == sorted(part.ids["audio"].tolist())
    assert max(sample_ids(clips(), 20).num_rows.values()) >= 18
    assert sample_ids(clips(), 1000).num_rows == clips().num_rows
    assert sample_ids(classes(), 2).num_rows == {"audio": 2, "text": 1}
    with pytest.raises(ValueError, match="max_rows: got 0"):
        sample_ids(clips(), 0)


@needs_shared
def test_the_folds_of_audiocaps_and_esc50() -> None:
    audiocaps = split_by_fold(EmbeddingTable.read(SHARED / "audiocaps_dev.npz"), 2, val_fraction=0)
    assert {name: part.num_rows for name, part in audiocaps.items()} == {
        "train": {"audio": 223, "text": 288},
        "test": {"audio": 56, "text": 66},
    }
    esc50 = split_by_fold(EmbeddingTable.read(SHARED / "esc50.npz"), 5)
    assert {name: part.num_rows for name, part in esc50.items()} == {
        "train": {"audio": 1200, "text": 50},
        "val": {"audio": 400, "text": 50},
        "test": {"audio": 400, "text": 50},
    }
