"""The core refines in a process where the packages for training, data and reports cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "core_only.py"


@pytest.mark.slow
def test_the_core_needs_torch_numpy_and_safetensors_alone() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refines without" in done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, diffgap_lightning; assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
