"""The network class of the package laion-clap, built for a checkpoint without that package's downloads.

`import laion_clap` fetches three tokenizers for its training code and `CLAP_Module()` fetches 500 MB of RoBERTa that
the checkpoint then overwrites; without a network both try for minutes. Neither is needed: the network lies in the
package's inner module `clap_module`, and the checkpoint's own shapes say how large its text tower is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

from torch import Tensor, nn

from diffgap_lightning.encoders.optional import missing, package_folder

EXTRA = "laion-clap"
_TEXT = "text_branch."
_WIDTHS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}  # of the first patch embedding
_HEAD = 64  # width of an attention head in every RoBERTa


def audio_model(state: Mapping[str, Tensor]) -> str:
    """Which audio tower a checkpoint holds, as laion-clap names it.

    Raises:
        ValueError: not a LAION-CLAP checkpoint with an HTSAT tower.
    """
    key = "audio_branch.patch_embed.proj.weight"
    width = len(state[key]) if key in state else None
    if width not in _WIDTHS:
        raise ValueError(
            f"checkpoint: no LAION-CLAP model with an HTSAT audio tower (width {width} at {key}); "
            "PANN towers and other models are not supported"
        )
    return _WIDTHS[width]


def has_fusion(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint was trained with feature fusion."""
    return "audio_branch.patch_embed.mel_conv2d.weight" in state


def text_config(state: Mapping[str, Tensor]) -> Any:
    """The RoBERTa configuration that fits a checkpoint's shapes.

    Raises:
        ValueError: the text tower is not RoBERTa.
    """
    transformers: Any = _import("transformers")
    try:
        words, places, types = (
            state[f"{_TEXT}embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        intermediate = len(state[f"{_TEXT}encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise ValueError(f"checkpoint: its text tower is not RoBERTa, it has no {error}") from error
    layers = {key.split(".")[3] for key in state if key.startswith(f"{_TEXT}encoder.layer.")}
    return transformers.RobertaConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=words.shape[1] // _HEAD,
        intermediate_size=intermediate,
        max_position_embeddings=len(places),
        type_vocab_size=len(types),
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def build_clap(amodel: str, fusion: bool, config: Any) -> nn.Module:
    """laion_clap's `CLAP` with random weights.

    Args:
        amodel: Such as `"HTSAT-tiny"`.
        fusion: With feature fusion.
        config: Of the text tower.
    """
    factory = _import("clap_module.factory")
    model_module = _import("clap_module.model")
    transformers: Any = _import("transformers")
    # The constructor asks for pretrained weights by name; they would be overwritten by the checkpoint's.
    roberta = mock.Mock(from_pretrained=lambda name: transformers.RobertaModel(config))
    with mock.patch.object(model_module, "RobertaModel", roberta):
        options = {"enable_fusion": True, "fusion_type": "aff_2d"} if fusion else {}
        model, _ = factory.create_model(amodel, "roberta", device="cpu", **options)
    return model.eval()


def load_clap(state: Mapping[str, Tensor]) -> nn.Module:
    """The network of a checkpoint.

    `text_branch.embeddings.position_ids` is a constant that some versions of transformers keep as a weight and others
    do not: it is passed over on both sides.

    Raises:
        ValueError: the checkpoint lacks weights or holds others.
    """
    model = build_clap(audio_model(state), has_fusion(state), text_config(state))
    result = model.load_state_dict(dict(state), strict=False)
    lacking = [key for key in result.missing_keys if not key.endswith("position_ids")]
    extra = [key for key in result.unexpected_keys if not key.endswith("position_ids")]
    if lacking or extra:
        raise ValueError(
            f"checkpoint: lacks {len(lacking)} weights ({', '.join(lacking[:3]) or 'none'}) and holds {len(extra)} "
            f"others ({', '.join(extra[:3]) or 'none'}); it belongs to another model"
        )
    return model


def _import(module: str) -> Any:
    """Import a module of laion-clap's inner package, or one that it needs."""
    try:
        with _inner_packages():
            return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, EXTRA) from error


@contextmanager
def _inner_packages() -> Iterator[None]:
    """Let laion-clap's folder be searched, as the package itself does it, but only for a moment."""
    folder = str(package_folder("laion_clap", EXTRA))
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
