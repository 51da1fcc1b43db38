"""Import the package and refine where Lightning, torchmetrics and webdataset cannot be imported."""

from __future__ import annotations

import importlib.abc
import sys

BLOCKED = {"lightning", "pytorch_lightning", "torchmetrics", "webdataset", "matplotlib", "tensorboard", "jsonargparse"}


class Blocker(importlib.abc.MetaPathFinder):
    """Makes the blocked packages look uninstalled."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse a blocked package; leave every other name to the next finder."""
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{fullname} is blocked: the core must do without it", name=fullname)


def main() -> None:
    """Measure a tiny space, save the refiner, load it and refine."""
    import tempfile

    import torch

    import diffgap_lightning
    from diffgap_lightning import DiffGAPRefiner

    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(64, 16, generator=generator) for name in ("text", "audio")}
    rows = {name: torch.nn.functional.normalize(draw, dim=1) for name, draw in draws.items()}
    ids = dict.fromkeys(rows, torch.arange(64))
    with tempfile.TemporaryDirectory() as folder:
        DiffGAPRefiner.measure(rows, ids, width=16, depth=1).save_pretrained(f"{folder}/refiner")
        refiner = DiffGAPRefiner.from_pretrained(f"{folder}/refiner")
    refined = refiner.refine(rows["text"], source="text", target="audio")
    assert refined.shape == (64, 16)
    assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
    print(f"core only: diffgap-lightning {diffgap_lightning.__version__} refines without {', '.join(sorted(BLOCKED))}")


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    main()
