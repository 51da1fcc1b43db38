"""The direction of imports: the refiner is the waist, everything above knows it, nothing below does.

Imports are read from the source, those inside functions and under `TYPE_CHECKING` included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "diffgap_lightning"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# Part -> parts that it may import. A part is the first name after the package's; it may always import itself.
BASE = {"functional", "checkpoint", "atomic", "torch_files"}
ALLOWED: dict[str, set[str]] = {
    "atomic": set(),
    "functional": set(),
    "checkpoint": {"atomic"},
    "torch_files": set(),
    "diffusion": BASE,
    "space": BASE,
    "gaussian": BASE | {"space"},
    "data": BASE,
    "encoders": BASE | {"data"},
    "embedding": BASE | {"data", "encoders"},
    "denoiser": BASE | {"diffusion"},
    "sequence_denoiser": BASE | {"denoiser"},
    "losses": BASE | {"diffusion"},
    "metrics": BASE,
    "plotting": BASE,
    "bridges": BASE | {"space", "losses", "gaussian"},
    "mixture_denoiser": BASE | {"gaussian", "bridges", "space"},
    "cdm": BASE | {"diffusion", "denoiser", "sequence_denoiser", "gaussian", "space"},
    "refiner": BASE
    | {"diffusion", "space", "gaussian", "denoiser", "sequence_denoiser", "mixture_denoiser", "cdm", "bridges"},
    "training": BASE | {"diffusion", "losses", "metrics", "refiner", "cdm", "plotting"},
    "integrations": BASE | {"refiner", "bridges", "encoders", "data", "diffusion", "losses"},
    "generation": BASE | {"integrations", "embedding", "encoders", "data", "refiner"},
    "evaluation": BASE | {"refiner", "bridges", "metrics", "plotting", "data", "encoders"},
}
# Packages beyond torch that a part may import at the top of a file, where importing it must stay cheap.
HEAVY = {"lightning", "torchmetrics", "webdataset", "matplotlib", "tensorboard", "jsonargparse", "transformers"}
HEAVY_ALLOWED: dict[str, set[str]] = {
    "training": {"lightning", "torchmetrics"},
    "integrations": {"lightning"},
    "metrics": {"torchmetrics"},
    "data": {"lightning", "webdataset"},
    "embedding": {"lightning"},
    "generation": {"lightning"},
    "cli": {"lightning", "jsonargparse"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Absolute names of everything that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                folder = (PACKAGE, *path.relative_to(SOURCE).parent.parts)
                module = ".".join([*folder[: len(folder) - node.level + 1], *([module] if module else [])])
            names |= {module} if module != PACKAGE else {f"{PACKAGE}.{alias.name}" for alias in node.names}
    return names


def own_parts(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != "__version__"}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED or part == "cli", f"{part} is new: give it a row in ALLOWED"
    wrong = own_parts(path) - {part} - ALLOWED.get(part, set(ALLOWED))
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_packages_are_imported_at_the_top_only_where_they_belong(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, top_only=True)}
    wrong = roots & HEAVY - HEAVY_ALLOWED.get(part_of(path), set())
    assert not wrong, f"import {', '.join(sorted(wrong))} where it is used"


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, may in ALLOWED.items() if part not in done and may <= done}
        assert ready, f"cycle among {set(ALLOWED) - done}"
        done |= ready


def test_nothing_below_the_refiner_knows_it() -> None:
    above = {"training", "integrations", "evaluation", "generation"}
    assert not {part for part, may in ALLOWED.items() if "refiner" in may} - above
    knowing = {part for part, may in ALLOWED.items() if may & (above | {"cli"})}
    assert knowing <= {"generation"}  # it runs what the integrations offer
    assert ALLOWED["generation"] & above == {"integrations"}


def test_relative_imports_and_imports_in_functions_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    path = tmp_path / "training" / "callbacks" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..module import M\nfrom ...data import table\nfrom diffgap_lightning import cli\n"
        "def f():\n    import diffgap_lightning.integrations.attach\n"
    )
    assert own_parts(path) == {"training", "data", "cli", "integrations"}
    assert "diffgap_lightning.integrations.attach" not in imports(path, top_only=True)
