"""diffusers' `AudioLDMPipeline`, `MusicLDMPipeline` and `AudioLDM2Pipeline`.

AudioLDM and MusicLDM: `_encode_prompt` returns `(B n, D)`, or `[unconditional; conditional]` of twice as many rows with
guidance. It runs as ever, with prompts, negative prompts and given embeddings, and then its conditional rows alone are
exchanged for refined ones. Reranking encodes the prompt by itself and sees no difference.

AudioLDM2: the CLAP embedding enters `projection_model` beside T5's sequence and only then the language model. Of one
`encode_prompt`, the first call of `projection_model` is the conditional one; a hook refines what goes into that.

MusicLDM under transformers 5 fails at plain prompts, because `get_text_features` returns an output object: while a
refiner is attached it returns the tensor that the pipeline expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.seam import Seam, class_names, override


def find(generator: Any) -> Seam | None:
    """The seam of a supported pipeline, else None."""
    kinds = class_names(generator)
    patches: dict[str, Callable[[Any, Conditioner], Any]] = {
        "diffusers.AudioLDMPipeline": _film,
        "diffusers.MusicLDMPipeline": _musicldm,
        "diffusers.AudioLDM2Pipeline": _audioldm2,
    }
    for kind, patch in patches.items():
        if kind in kinds:
            config = generator.text_encoder.config
            dim = getattr(config, "projection_dim", None)
            encoder = getattr(config, "_name_or_path", "") or None
            return Seam(type(generator).__name__, dim, encoder, partial(patch, generator))
    return None


@contextmanager
def _film(pipe: Any, condition: Conditioner) -> Iterator[None]:
    """AudioLDM: one embedding a prompt."""
    plain = pipe._encode_prompt

    def encode(*args: Any, **kwargs: Any) -> Tensor:
        call = inspect.signature(plain).bind(*args, **kwargs)
        n = call.arguments["num_waveforms_per_prompt"]
        given, refined = call.arguments.get("prompt_embeds"), None
        if given is not None:  # of the source modality, perhaps of another width than the generator's
            refined = condition(given, n)
            call.arguments["prompt_embeds"] = refined[::n]
        out = plain(*call.args, **call.kwargs)
        half = len(out) // 2 if call.arguments["do_classifier_free_guidance"] else 0
        if refined is None:
            refined = condition(out[half::n], n)
        return torch.cat([out[:half], refined.to(out)])

    with override(pipe, "_encode_prompt", encode):
        yield


@contextmanager
def _musicldm(pipe: Any, condition: Conditioner) -> Iterator[None]:
    plain = pipe.text_encoder.get_text_features

    def features(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        return getattr(out, "pooler_output", out)

    with _film(pipe, condition), override(pipe.text_encoder, "get_text_features", features):
        yield


@contextmanager
def _audioldm2(pipe: Any, condition: Conditioner) -> Iterator[None]:
    """AudioLDM2: the embedding is one of two sequences that a language model turns into the condition."""
    plain = pipe.encode_prompt
    pending = False  # whether the next call of the projection model is a conditional one

    def before_projection(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal pending
        if not pending:
            return None
        pending = False
        return args, {**kwargs, "hidden_states": condition(kwargs["hidden_states"])}

    def once(arguments: Any, refine: bool) -> tuple[Tensor, ...]:
        nonlocal pending
        pending = refine
        try:
            return plain(*arguments.args, **arguments.kwargs)
        finally:
            pending = False

    def encode(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call = inspect.signature(plain).bind(*args, **kwargs)
        asked = call.arguments
        if asked.get("prompt_embeds") is not None:
            raise ValueError(
                "AudioLDM2Pipeline: prompt_embeds and generated_prompt_embeds hold no CLAP embedding any more; "
                "pass the prompt, or detach the refiner first"
            )
        n = asked["num_waveforms_per_prompt"]
        if n == 1 or not condition.per_candidate:
            return once(call, refine=True)
        return _per_candidate(call, n, once)

    handle = pipe.projection_model.register_forward_pre_hook(before_projection, with_kwargs=True)
    try:
        with override(pipe, "encode_prompt", encode):
            yield
    finally:
        handle.remove()


def _per_candidate(call: Any, n: int, once: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The unconditional half of the plain call, and a conditional half whose prompts were tiled before encoding."""
    asked = call.arguments
    guided = asked["do_classifier_free_guidance"]
    unconditional = [x[: len(x) // 2] for x in once(call, refine=False)] if guided else None
    for name in ("prompt", "transcription"):
        texts = asked.get(name)
        if texts is not None:
            asked[name] = [t for t in ([texts] if isinstance(texts, str) else texts) for _ in range(n)]
    asked |= {"num_waveforms_per_prompt": 1, "do_classifier_free_guidance": False}
    conditional = once(call, refine=True)
    if unconditional is None:
        return conditional
    return tuple(torch.cat(halves) for halves in zip(unconditional, conditional, strict=True))
