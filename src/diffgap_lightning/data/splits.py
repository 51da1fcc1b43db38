"""Split a table into train, val and test without letting a positive pair fall on both sides.

    by fraction   whole ids are drawn with a seed, so all rows of a clip go to one side
    by fold       the test is one fold; rows of a modality without a fold column (class prompts) belong to every split

Validation, by fold: where each id lies in one fold (clips), whole ids are drawn from the other folds. Where folds cut
through ids (ESC-50: ids are classes, and its folds keep the clips of one recording together), whole ids would be whole
classes, so validation is the next fold. In every split, rows without a partner in it are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.table import EmbeddingTable

Masks = dict[str, Tensor]
Splits = dict[str, EmbeddingTable]


def split_by_fraction(
    table: EmbeddingTable, val_fraction: float, test_fraction: float, seed: int = 0, where: str = "table"
) -> Splits:
    """Split by whole ids, drawn with a seed; a fraction above 0 gets at least one id.

    Args:
        table: What to split.
        val_fraction: Share of the paired ids for validation; 0 for none.
        test_fraction: Share of the paired ids for the test; 0 for none.
        seed: Of the draw, which depends on the ids and not on the order of the rows.
        where: What opens the error messages.

    Returns:
        `"train"`, `"val"`, `"test"` -> table, without those that were asked to be empty.

    Raises:
        ValueError: fractions outside [0, 1], or too few ids for the splits.
    """
    for name, fraction in {"val": val_fraction, "test": test_fraction}.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}_fraction: got {fraction}, expected a share between 0 and 1")
    train_fraction = 1 - val_fraction - test_fraction
    if train_fraction < -1e-9:
        raise ValueError(f"val_fraction + test_fraction: got {val_fraction + test_fraction}, expected at most 1")
    ids = _draw(table, seed)
    num_test, num_val = _share(test_fraction, len(ids)), _share(val_fraction, len(ids))
    parts = {"train": ids[num_test + num_val :], "val": ids[num_test : num_test + num_val], "test": ids[:num_test]}
    asked = {"train": train_fraction > 1e-9, "val": val_fraction > 0, "test": test_fraction > 0}
    masks = {name: _with_ids(table, part) for name, part in parts.items() if asked[name]}
    return _cut(table, masks, where, f"{len(ids)} paired ids, {val_fraction=}, {test_fraction=}")


def split_by_fold(
    table: EmbeddingTable,
    fold: int | str,
    *,
    column: str = "fold",
    val_fold: int | str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    where: str = "table",
) -> Splits:
    """Split by the columns `<modality>_<column>`.

    Args:
        table: What to split.
        fold: The test fold.
        column: Name of the fold columns, without the modality.
        val_fold: The validation fold; by default validation is chosen as the module's text says.
        val_fraction: Share of the other folds' ids, where ids are drawn; 0 for no validation at all.
        seed: Of the draw.
        where: What opens the error messages.

    Raises:
        ValueError: no such column or fold, or an empty split.
    """
    folds = {
        m: table.columns[f"{m}_{column}"].astype(str) for m in table.modalities if f"{m}_{column}" in table.columns
    }
    if not folds:
        raise ValueError(f"{where}: fold={fold} but no <modality>_{column} among its columns ({_list(table.columns)})")
    known = sorted(set(np.concatenate(list(folds.values())).tolist()), key=lambda name: (len(name), name))
    for name, value in (("fold", fold), ("val_fold", val_fold)):
        if value is not None and str(value) not in known:
            raise ValueError(f"{where}: {name}={value} is not in *_{column}; expected one of {_list(known)}")
    if str(val_fold) == str(fold):
        raise ValueError(f"{where}: val_fold={val_fold} is the test fold; choose another of {_list(known)}")
    if val_fold is None and val_fraction > 0 and not _ids_within_folds(table, folds):
        val_fold = known[(known.index(str(fold)) + 1) % len(known)]

    test, others = _in_folds(table, folds, [str(fold)]), [name for name in known if name != str(fold)]
    if val_fold is not None:
        train = _in_folds(table, folds, [name for name in others if name != str(val_fold)])
        masks = {"train": train, "val": _in_folds(table, folds, [str(val_fold)]), "test": test}
    else:
        masks = {"test": test} | _hold_out(table, _in_folds(table, folds, others), val_fraction, seed)
    return _cut(table, masks, where, f"{fold=} of {_list(known)}, {val_fold=}, {val_fraction=}")


def sample_ids(table: EmbeddingTable, max_rows: int, seed: int = 0) -> EmbeddingTable:
    """Whole ids drawn with a seed until no modality has more than `max_rows` rows; the order of the rows is kept."""
    if max_rows < 1:
        raise ValueError(f"max_rows: got {max_rows}, expected at least 1")
    if max(table.num_rows.values()) <= max_rows:
        return table
    unique = torch.unique(torch.cat(list(table.ids.values())))
    drawn = unique[torch.from_numpy(np.random.default_rng(seed).permutation(len(unique)))]
    place = torch.empty_like(drawn)
    place[torch.searchsorted(unique, drawn)] = torch.arange(len(drawn))
    fits = torch.ones(len(drawn), dtype=torch.bool)
    for ids in table.ids.values():
        count = torch.bincount(place[torch.searchsorted(unique, ids)], minlength=len(drawn))
        fits &= torch.cumsum(count, 0) <= max_rows
    fits[0] = True
    chosen = table.select(drawn[fits])
    return chosen.select_rows({m: torch.arange(min(n, max_rows)) for m, n in chosen.num_rows.items()})


def _draw(table: EmbeddingTable, seed: int) -> np.ndarray:
    """All ids that occur in more than one modality, in random order."""
    paired = table.paired()
    ids = np.unique(np.concatenate([table.ids[m][paired[m]].numpy() for m in table.modalities]))
    return np.random.default_rng(seed).permutation(ids)


def _share(fraction: float, n: int) -> int:
    return 0 if fraction == 0 else max(1, round(fraction * n))


def _with_ids(table: EmbeddingTable, ids: np.ndarray) -> Masks:
    return {modality: torch.isin(own, torch.from_numpy(ids)) for modality, own in table.ids.items()}


def _in_folds(table: EmbeddingTable, folds: Mapping[str, np.ndarray], names: list[str]) -> Masks:
    """Rows in any of some folds; all rows of a modality that has no folds."""
    every = {modality: torch.ones(rows, dtype=torch.bool) for modality, rows in table.num_rows.items()}
    return every | {modality: torch.from_numpy(np.isin(values, names)) for modality, values in folds.items()}


def _ids_within_folds(table: EmbeddingTable, folds: Mapping[str, np.ndarray]) -> bool:
    """Whether each id lies in one fold only, over all modalities that have folds."""
    ids = np.concatenate([table.ids[modality].numpy() for modality in folds])
    _, number = np.unique(np.concatenate(list(folds.values())), return_inverse=True)
    return len(np.unique(ids)) == len(np.unique(np.stack([ids, number.ravel()]), axis=1).T)


def _hold_out(table: EmbeddingTable, rest: Masks, val_fraction: float, seed: int) -> dict[str, Masks]:
    """Take whole ids for validation out of some rows."""
    if val_fraction == 0:
        return {"train": rest}
    ids = _draw(table.select_rows(rest), seed)
    chosen = _with_ids(table, ids[: _share(val_fraction, len(ids))])
    return {"val": {m: rest[m] & chosen[m] for m in rest}, "train": {m: rest[m] & ~chosen[m] for m in rest}}


def _cut(table: EmbeddingTable, masks: Mapping[str, Masks], where: str, how: str) -> Splits:
    """The tables of the splits, less the rows without a partner in theirs; warns of rows that all splits lose so."""
    splits, used = {}, {modality: torch.zeros(rows, dtype=torch.bool) for modality, rows in table.num_rows.items()}
    for name, mask in masks.items():
        part = table.select_rows(mask)
        paired = part.paired()
        splits[name] = part.select_rows(paired)
        if 0 in splits[name].num_rows.values():
            raise ValueError(f"{where}: the {name} split is empty ({how}); choose other folds or fractions")
        for modality, rows in mask.items():
            used[modality][rows.nonzero()[:, 0][paired[modality]]] = True
    lost = {modality: int((mask & ~used[modality]).sum()) for modality, mask in table.paired().items()}
    if any(lost.values()):
        counts = ", ".join(f"{n} {modality} rows" for modality, n in lost.items() if n)
        warnings.warn(f"{where}: {counts} are in no split, their partners lie in another fold ({how})", stacklevel=2)
    return splits


def _list(names: object) -> str:
    return ", ".join(str(name) for name in names) or "none"  # type: ignore[attr-defined]
