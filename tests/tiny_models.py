"""Small models with random weights, built from the real packages without a network.

    roberta_tokenizer(folder)        byte-level RoBERTa tokenizer files, 261 tokens
    roberta_model(folder)            the same, and a one-layer RobertaModel of width 768
    fake_hub(hf_home)                a hub cache in which `import laion_clap` and `CLAP_Module()` find all they ask for
    laion_checkpoint(path)           a checkpoint file as LAION publishes them, for a one-layer text tower
    transformers_clap(folder)        ClapModel, feature extractor and tokenizer, as `save_pretrained` writes them
    open_clip_folder(folder)         open_clip_config.json beside open_clip_model.safetensors
    cavp_checkpoint(path)            a checkpoint file as Diff-Foley publishes it, for towers of 4 channels

With `real_size=True` those of CLAP and open_clip have the towers of the published models, for measuring speed.
Tests get this module from the fixture `tiny_models`. Weights are drawn wide enough that rows differ (random
transformers map all texts to nearly the same vector) and not so wide that rounding decides where a row lies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BYTES = 256
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
VOCABULARY = len(SPECIAL) + BYTES + 1


def _byte_symbols() -> list[str]:
    """The printable symbol that byte-level BPE gives each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {b: chr(b) for b in plain}
    for extra, byte in enumerate(b for b in range(BYTES) if b not in symbols):
        symbols[byte] = chr(BYTES + extra)
    return [symbols[b] for b in range(BYTES)]


def roberta_tokenizer(folder: Path) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json of a byte-level tokenizer without merges."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = SPECIAL | {symbol: len(SPECIAL) + i for i, symbol in enumerate(_byte_symbols())}
    vocabulary["<mask>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def roberta_model(folder: Path, layers: int = 1) -> Path:
    """Write a tokenizer, config.json and random weights."""
    from transformers import RobertaConfig, RobertaModel

    roberta_tokenizer(folder)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=64,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = RobertaModel(config)
    draw_weights(model, seed=1)
    model.save_pretrained(folder)
    return folder


def fake_hub(hf_home: Path) -> Path:
    """Fill a hub cache with the three tokenizers that laion-clap asks for at import, and a small roberta-base.

    Use it with `HF_HOME` (or `HF_HUB_CACHE=<hf_home>/hub`) and `HF_HUB_OFFLINE=1` set before anything is imported.
    """
    roberta_model(hub_snapshot(hf_home, "roberta-base"))
    roberta_tokenizer(hub_snapshot(hf_home, "facebook/bart-base"))
    bert = hub_snapshot(hf_home, "bert-base-uncased")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    (bert / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}), encoding="utf-8")
    return hf_home


def hub_snapshot(hf_home: Path, repository: str, revision: str = "main") -> Path:
    """The (new) snapshot folder of a repository in a hub cache."""
    commit = f"{abs(hash_text(repository)):040x}"
    repo = hf_home / "hub" / f"models--{repository.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit, encoding="utf-8")
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def hash_text(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(text.encode(), "big") % (1 << 150)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, gain: float = 1.4) -> None:
    """Draw every matrix at `gain` times the scale that keeps the variance, vectors near their usual values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "extractor" in name:  # the Fourier transform
            continue
        if parameter.ndim == 0:
            parameter.fill_(2.66)  # log(1 / 0.07), of a temperature
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
        elif "embedding" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
    for name, module in model.named_modules():
        if name.endswith(("bn0", "batch_norm")):  # takes log-mel spectrograms, which are about -40 +- 30 dB
            module.running_mean.fill_(-40.0)
            module.running_var.fill_(900.0)


def laion_state(
    amodel: str = "HTSAT-tiny", fusion: bool = False, seed: int = 0, real_size: bool = False
) -> dict[str, Tensor]:
    """The state of laion_clap's own `CLAP` class with random weights; its audio tower is always of real size."""
    from diffgap_lightning.encoders.laion_network import build_clap, text_config

    hidden = {
        "word_embeddings": (VOCABULARY, 768),
        "position_embeddings": (514, 768),
        "token_type_embeddings": (1, 768),
    }
    shapes = {f"text_branch.embeddings.{name}.weight": torch.empty(shape) for name, shape in hidden.items()}
    for layer in range(12 if real_size else 1):
        name = f"text_branch.encoder.layer.{layer}.intermediate.dense.weight"
        shapes[name] = torch.empty(3072 if real_size else 64, 768)
    model = build_clap(amodel, fusion, text_config(shapes))
    draw_weights(model, seed)
    return model.state_dict()


def laion_checkpoint(
    path: Path,
    amodel: str = "HTSAT-tiny",
    fusion: bool = False,
    *,
    position_ids: bool = True,
    extra: dict[str, Any] | None = None,
    seed: int = 0,
    real_size: bool = False,
) -> Path:
    """Write a training checkpoint: prefix `module.`, epoch, name, a NumPy scalar, with or without `position_ids`."""
    import numpy as np

    state = {f"module.{key}": value for key, value in laion_state(amodel, fusion, seed, real_size).items()}
    state.pop("module.text_branch.embeddings.position_ids", None)
    if position_ids:
        state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"epoch": 1, "name": "tiny", "best": np.float64(0.5), "state_dict": state}
    torch.save(record | (extra or {}), path)
    return path


def transformers_clap(folder: Path, fusion: bool = False, seed: int = 0, real_size: bool = False) -> Path:
    """Write a small ClapModel, its feature extractor and a tokenizer."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio = {"enable_fusion": fusion, "fusion_type": "aff_2d" if fusion else None}
    text = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 514, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2,
    }  # fmt: skip
    if not real_size:
        audio |= {
            "patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
            "hidden_size": 64, "num_hidden_layers": 4,
        }  # fmt: skip
        text |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dim = 512 if real_size else 32
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=dim))
    draw_weights(model, seed)
    roberta_tokenizer(folder)
    model.save_pretrained(folder, safe_serialization=True)
    extractor = ClapFeatureExtractor(
        frequency_min=50, frequency_max=14000, truncation="fusion" if fusion else "rand_trunc"
    )
    extractor.save_pretrained(folder)
    return folder


OPEN_CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def open_clip_folder(folder: Path, seed: int = 0, real_size: bool = False, **preprocess: Any) -> Path:
    """Write a small open_clip model as its `push_to_hub` would; `preprocess` goes into its preprocess_cfg."""
    from open_clip import get_model_config
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = get_model_config("ViT-B-32") if real_size else OPEN_CLIP_CONFIG
    model = CLIP(**sizes)
    draw_weights(model, seed)
    config = {"model_cfg": sizes, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    config["preprocess_cfg"] |= preprocess
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@torch.no_grad()
def cavp_checkpoint(path: Path, dim: int = 16, width: int = 4) -> Path:
    """Write random weights whose batch normalisations have seen noise, without which all rows are nearly one vector."""
    from diffgap_lightning.encoders.cavp_model import random_model

    model = random_model(0, dim, width).train()
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None  # the mean over all batches
    scale = torch.rand(4, 1, 1, 1, 1, generator=generator)
    model.encode_video(scale * torch.rand(4, 4, 3, 64, 64, generator=generator), pool=False)
    model.encode_spec(scale[..., 0, 0] * torch.rand(4, 128, 64, generator=generator), pool=False)
    torch.save({"state_dict": model.state_dict()}, path)
    return path
