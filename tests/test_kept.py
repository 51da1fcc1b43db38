"""What older versions wrote, kept in `tests/kept/VERSION/`, still loads, gives the same numbers and trains on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.table_module import TableDataModule

KEPT = Path(__file__).with_name("kept")
VERSIONS = sorted(p for p in KEPT.iterdir() if (p / "expected.json").is_file())
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]


@pytest.fixture(scope="module")
def make() -> Any:
    """The script that keeps them."""
    spec = importlib.util.spec_from_file_location("make", KEPT / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(found: Any, expected: Any, where: str = "") -> None:
    """Numbers to the rounding of another machine, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-4, msg=where)
    else:
        assert found == expected, where


def test_there_is_one_and_it_is_small() -> None:
    assert VERSIONS
    for folder in VERSIONS:
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 200_000


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
def test_what_an_older_version_wrote_gives_its_numbers(folder: Path, make: Any) -> None:
    same(make.numbers(folder), json.loads((folder / "expected.json").read_text()))


class Rows(TableDataModule):
    """The kept rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(batch_size=12, seed=0, num_workers=0, drop_last=True, pin_memory=False, predict_split="val")
        self.folder = folder

    def make_splits(self) -> Any:
        return {
            "train": EmbeddingTable.read(self.folder / "table.npz"),
            "val": read_embedding_shards(self.folder / "shards"),
        }


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
def test_a_run_of_an_older_version_goes_on(folder: Path, make: Any, tmp_path: Path) -> None:
    fit = make.trainer(tmp_path, 3)
    fit.fit(make.module(), datamodule=Rows(folder), ckpt_path=str(folder / "last.ckpt"), weights_only=True)
    before = torch.load(folder / "last.ckpt", weights_only=True)
    assert fit.current_epoch == 3
    assert fit.global_step == before["global_step"] * 3 // 2
