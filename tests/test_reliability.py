"""The table in docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
FAULTS = [line for line in ROWS if not line.startswith(("| fault", "| ---"))]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: cells(row)[0])
def test_a_fault_has_a_full_row_and_its_tests_exist(row: str) -> None:
    assert len(cells(row)) == 5
    assert all(cells(row))
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", cells(row)[-1])
    assert named, "name the test that holds it, as `file.py::test_name`"
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file} has no {name}"
