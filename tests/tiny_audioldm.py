"""A small random `LatentDiffusion` of the audioldm package, built from its own classes without any download.

The package reads "roberta-base" by name when it is imported and when CLAP is built. A folder of that name in the
working directory is used instead of the hub: here a byte-level tokenizer and one layer. HTSAT and the vocoder have
their real sizes, since the package fixes them; the UNet and the autoencoder are tiny.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MODEL_NAME = "audioldm-s-full"


def roberta_base(folder: Path) -> Path:
    """Write `folder/roberta-base`: a model of one layer with the width that CLAP expects, and a tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    home = folder / "roberta-base"
    home.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"])}
    (home / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (home / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = RobertaConfig(
        vocab_size=len(vocabulary), num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=520, type_vocab_size=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(home)
    return home


@contextlib.contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """Work in `folder`, where "roberta-base" is found, and keep the package's chatter off the terminal."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.chdir(before)


def small_config() -> dict[str, Any]:
    """The package's default configuration with a tiny UNet and autoencoder."""
    from audioldm.utils import default_audioldm_config

    config = default_audioldm_config(MODEL_NAME)
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {
        "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2],
        "num_head_channels": 8,
    }  # fmt: skip
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1}
    params |= {"device": torch.device("cpu"), "cond_stage_key": "text"}
    return config


def latent_diffusion(folder: Path, seed: int = 0) -> Any:
    """The model in evaluation mode, with text as its condition; `folder` holds `roberta_base`."""
    with at_home(folder), torch.random.fork_rng(devices=[]):
        from audioldm import LatentDiffusion

        torch.manual_seed(seed)
        model = LatentDiffusion(**small_config()["model"]["params"]).eval()
    # The package starts what ends a block at zero, and generates with averaged weights: both would hide the condition.
    from audioldm.latent_diffusion.ema import LitEma

    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.model.named_parameters():
        parameter.data.add_((2.0 if "film" in name else 0.05) * torch.randn(parameter.shape, generator=g))
    model.model_ema = LitEma(model.model)
    model.cond_stage_model.embed_mode = "text"
    return model
