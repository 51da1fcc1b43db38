from __future__ import annotations

from pathlib import Path

import pytest

TINY = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {{ decay: 0.5, use_buffers: false }}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{ filename: best, monitor: val/r1, mode: max, enable_version_counter: false }}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{ filename: last, enable_version_counter: false }}
    - class_path: diffgap_lightning.training.callbacks.SaveRefiner
    - class_path: diffgap_lightning.training.callbacks.EmbeddingMap
      init_args: {{ every_n_epochs: 2, max_points: 20 }}
model:
  pairs: [[text, audio]]
  width: 16
  depth: 1
  rank: 8
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{ lr: 5.0e-4, weight_decay: 0.01 }}
data:
  class_path: diffgap_lightning.data.SyntheticDataModule
  init_args:
    num_pairs: 400
    num_val: 60
    num_test: 50
    batch_size: 64
    world:
      class_path: diffgap_lightning.data.SyntheticWorld
      init_args: {{ latent_dim: 6, num_concepts: 16, dim: 24, hidden_dim: 16, gap: 2.0 }}
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file whose run takes a second; its folder is `run` beside it."""
    import torch

    torch.set_num_threads(1)  # for such sizes, threads only wait for each other
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder / "run"))
    return path


@pytest.fixture(scope="session")
def trained(tiny_config: Path) -> Path:
    """The folder of a run that `fit` has finished."""
    from diffgap_lightning.cli.main import main

    main(["fit", "--config", str(tiny_config)])
    return tiny_config.parent / "run"
