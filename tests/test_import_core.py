"""Inference needs torch, numpy and safetensors alone; this file is also the program that a bare process runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
import torch

HEAVY = (
    "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "webdataset", "jsonargparse", "matplotlib",
    "tensorboard", "soundfile", "av", "torchaudio", "transformers",
)  # fmt: skip


class Absent(MetaPathFinder):
    """Makes packages that are installed behave as if they were not."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def loaded() -> set[str]:
    return {name.split(".")[0] for name in sys.modules} & set(HEAVY)


def main(folder: Path) -> None:
    """Import, load, refine and score as somebody without Lightning would."""
    import diffgap_lightning

    assert not loaded(), f"import diffgap_lightning imports {loaded()}"
    assert "diffgap_lightning.refiner" not in sys.modules
    assert set(diffgap_lightning.__all__) <= set(dir(diffgap_lightning))

    sys.meta_path.insert(0, Absent())
    rows = torch.load(folder / "rows.pt", weights_only=True)
    refiner = diffgap_lightning.DiffGAPRefiner.from_pretrained(folder / "refiner")
    text, audio = rows["text"], rows["audio"]
    refined = refiner.refine(text, source="text", target="audio", generator=torch.Generator().manual_seed(0))
    assert torch.equal(refined, rows["refined"])
    assert torch.equal(refiner.score(text, audio, source="text", target="audio"), rows["score"])
    ids = {m: torch.arange(len(text)) for m in ("text", "audio")}
    small = diffgap_lightning.DiffGAPRefiner.measure({"text": text, "audio": audio}, ids, width=8, depth=0)
    small.save_pretrained(folder / "measured")
    assert diffgap_lightning.EmbeddingSpace.fit({"text": text}).modalities == ("text",)
    assert not loaded(), f"using a refiner imports {loaded()}"

    for name in ("DiffGAPModule", "PairedRetrieval"):  # these need what is absent, and say so
        with pytest.raises(ModuleNotFoundError, match="No module named '(lightning|torchmetrics)"):
            getattr(diffgap_lightning, name)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchName'"):
        _ = diffgap_lightning.NoSuchName


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved refiner, rows, and what it makes of them here."""
    from diffgap_lightning.refiner import DiffGAPRefiner

    g = torch.Generator().manual_seed(0)
    latent = torch.randn(40, 4, generator=g)
    rows = {
        m: torch.nn.functional.normalize(latent @ torch.randn(4, 8, generator=g) + torch.randn(8, generator=g), dim=1)
        for m in ("text", "audio")
    }
    refiner = DiffGAPRefiner.measure(rows, dict.fromkeys(rows, torch.arange(40)), width=8, depth=1)
    refiner.save_pretrained(tmp_path / "refiner")
    way = {"source": "text", "target": "audio"}
    refined = refiner.refine(rows["text"], **way, generator=torch.Generator().manual_seed(0))
    score = refiner.score(rows["text"], rows["audio"], **way)
    torch.save(rows | {"refined": refined, "score": score}, tmp_path / "rows.pt")
    return tmp_path


def test_a_refiner_works_where_lightning_cannot_be_imported(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
