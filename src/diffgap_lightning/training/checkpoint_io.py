"""Checkpoints that are replaced whole.

Lightning writes a local checkpoint to the system's temporary folder and moves it: across file systems that is a copy
over the older checkpoint, and a process that is killed meanwhile leaves neither. Here the temporary name lies beside
the checkpoint, is flushed to the disk, and is renamed.

    Trainer(plugins=[AtomicCheckpointIO()])         what `diffgap fit` does by itself
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from diffgap_lightning.atomic import commit, naming


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints under a temporary name; remote ones (`s3://...`) as Lightning does."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write one file, durably.

        Raises:
            OSError: it cannot be written, e.g. the disk is full; an older checkpoint of that name is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        # One process writes a checkpoint, so its temporary name can be fixed: what a killed one left is written over.
        work = path.with_name(f".{path.name}.tmp")
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                work.write_bytes(content.getbuffer())
                commit(work, path)
            except OSError:
                work.unlink(missing_ok=True)
                raise
