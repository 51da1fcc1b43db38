"""`attach` on diffusers' AudioLDM2Pipeline: the CLAP embedding is refined on its way into the projection model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.bridges import IdentityBridge
from diffgap_lightning.integrations import attach
from diffgap_lightning.refiner import DiffGAPRefiner

PROMPTS = ["a dog barks", "rain on a tin roof"]
NEGATIVE = ["low quality", "hiss"]
NAMES = ("encoder_hidden_states", "encoder_hidden_states_1", "encoder_attention_mask_1")
CLAP, T5 = "hidden_states", "hidden_states_1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(scope="module")
def refiner(tiny_generators: ModuleType) -> DiffGAPRefiner:
    return tiny_generators.refiner()


@pytest.fixture(scope="module")
def identity(tiny_generators: ModuleType) -> IdentityBridge:
    rows = normalize(torch.randn(8, tiny_generators.DIM, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(8)
    return IdentityBridge().fit({"text": rows, "audio": rows}, {"text": ids, "audio": ids})


@pytest.fixture(scope="module")
def pipe(tiny_generators: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_generators.audioldm2(tmp_path_factory.mktemp("tokenizer"))


class Seen:
    """What the modules of a pipeline were given."""

    def __init__(self) -> None:
        self.unet: dict[str, Tensor] = {}
        self.projection: list[dict[str, Tensor]] = []
        self.ranked_texts: list[Tensor] = []


@contextmanager
def watching(pipe: Any) -> Iterator[Seen]:
    seen = Seen()
    handles = [
        pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.unet.update({k: kwargs[k].clone() for k in NAMES}), with_kwargs=True
        ),
        pipe.projection_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.projection.append(dict(kwargs)), with_kwargs=True
        ),
        pipe.text_encoder.register_forward_hook(
            lambda module, args, out: seen.ranked_texts.append(out.text_embeds.clone())
        ),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def generate(pipe: Any, prompt: Any = PROMPTS, **options: Any) -> tuple[np.ndarray, Seen]:
    torch.manual_seed(3)
    with watching(pipe) as seen:
        audio = pipe(prompt, num_inference_steps=1, audio_length_in_s=0.02, **options).audios
    return audio, seen


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(("candidates", "per_candidate"), [(1, True), (4, False)])
def test_an_identity_changes_no_bit(
    pipe: Any,
    identity: IdentityBridge,
    guidance_scale: float,
    candidates: int,
    negative: list[str] | None,
    per_candidate: bool,
) -> None:
    options = {
        "guidance_scale": guidance_scale, "num_waveforms_per_prompt": candidates, "negative_prompt": negative,
    }  # fmt: skip
    expected, _ = generate(pipe, **options)
    with attach(identity, pipe, strength=0, per_candidate=per_candidate):
        audio, _ = generate(pipe, **options)
    np.testing.assert_array_equal(audio, expected)


def test_an_identity_for_each_candidate_changes_only_the_size_of_the_batch(pipe: Any, identity: IdentityBridge) -> None:
    options = {"num_waveforms_per_prompt": 4, "negative_prompt": NEGATIVE}
    _, expected = generate(pipe, **options)
    with attach(identity, pipe, strength=0, per_candidate=True):
        _, seen = generate(pipe, **options)
    for name in NAMES:  # products of another batch size may round differently
        torch.testing.assert_close(seen.unet[name], expected.unet[name])
        assert torch.equal(seen.unet[name][:8], expected.unet[name][:8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_identity_changes_no_bit_in_half_precision(
    tiny_generators: ModuleType, tmp_path: Path, identity: IdentityBridge, dtype: torch.dtype
) -> None:
    pipe = tiny_generators.audioldm2(tmp_path).to(dtype)
    expected, _ = generate(pipe, num_waveforms_per_prompt=2)
    with attach(identity, pipe, strength=0):
        audio, _ = generate(pipe, num_waveforms_per_prompt=2)
    np.testing.assert_array_equal(audio, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("candidates", "per_candidate"), [(1, False), (4, False), (4, True)])
def test_only_the_conditional_clap_embedding_is_refined(
    tiny_generators: ModuleType,
    tmp_path: Path,
    refiner: DiffGAPRefiner,
    dtype: torch.dtype,
    device: str,
    candidates: int,
    per_candidate: bool,
) -> None:
    pipe = tiny_generators.audioldm2(tmp_path).to(device, dtype)
    options = {"num_waveforms_per_prompt": candidates, "negative_prompt": NEGATIVE}
    _, plain = generate(pipe, **options)
    with attach(refiner, pipe, strength=0.5, per_candidate=per_candidate, seed=7):
        _, seen = generate(pipe, **options)
    half = 2 * candidates
    for name in NAMES:
        assert torch.equal(seen.unet[name][:half], plain.unet[name][:half])
    torch.testing.assert_close(seen.unet["encoder_hidden_states_1"], plain.unet["encoder_hidden_states_1"])
    assert torch.equal(seen.unet["encoder_attention_mask_1"], plain.unet["encoder_attention_mask_1"])
    assert not torch.equal(seen.unet["encoder_hidden_states"][half:], plain.unet["encoder_hidden_states"][half:])

    # plain: conditional, unconditional; with a sample for each: once more the plain pair, then the tiled conditional
    assert len(seen.projection) == (3 if per_candidate else 2)
    text = plain.projection[0][CLAP]
    own = seen.projection[-1 if per_candidate else 0]
    tiled = candidates if per_candidate else 1
    expected = refiner.refine(
        text.repeat_interleave(tiled, 0)[:, 0] if per_candidate else text[:, 0], source="text", target="audio",
        strength=0.5, generator=torch.Generator().manual_seed(7),
    )[:, None]  # fmt: skip
    assert own[CLAP].dtype == dtype
    torch.testing.assert_close(own[CLAP], expected)
    if not per_candidate:
        assert torch.equal(own[CLAP], expected)
    torch.testing.assert_close(own[T5], plain.projection[0][T5].repeat_interleave(tiled, 0))
    assert len(own[CLAP].float().unique(dim=0)) == 2 * tiled


def test_without_guidance_there_is_the_refined_half_alone(pipe: Any, refiner: DiffGAPRefiner) -> None:
    _, plain = generate(pipe, guidance_scale=1.0)
    with attach(refiner, pipe, strength=0):
        _, seen = generate(pipe, guidance_scale=1.0)
    ((own,), (text,)) = seen.projection, plain.projection
    assert torch.equal(own[CLAP][:, 0], refiner.refine(text[CLAP][:, 0], source="text", target="audio", strength=0))
    assert torch.equal(own[T5], text[T5])
    assert len(seen.unet["encoder_hidden_states"]) == len(PROMPTS)


def test_a_single_prompt_may_have_a_sample_for_each_waveform(pipe: Any, refiner: DiffGAPRefiner) -> None:
    options = {"num_waveforms_per_prompt": 3, "negative_prompt": "hiss"}
    _, plain = generate(pipe, "a dog barks", **options)
    with attach(refiner, pipe, strength=0.9, per_candidate=True):
        _, seen = generate(pipe, "a dog barks", **options)
    generated = "encoder_hidden_states"
    assert torch.equal(seen.unet[generated][:3], plain.unet[generated][:3])
    assert len(seen.unet[generated][3:].unique(dim=0)) == 3
    assert len(plain.unet[generated][3:].unique(dim=0)) == 1


def test_reranking_sees_the_prompts_own_embedding(pipe: Any, refiner: DiffGAPRefiner) -> None:
    pytest.importorskip("librosa", reason="the pipeline ranks only with librosa")
    _, plain = generate(pipe, num_waveforms_per_prompt=2)
    with attach(refiner, pipe):
        _, seen = generate(pipe, num_waveforms_per_prompt=2)
    assert len(plain.ranked_texts) == len(seen.ranked_texts) == 1
    assert torch.equal(plain.ranked_texts[0], seen.ranked_texts[0])


def test_everything_is_restored_after_an_exception_too(pipe: Any, refiner: DiffGAPRefiner) -> None:
    expected, _ = generate(pipe)
    before = dict(vars(pipe)), dict(vars(pipe.projection_model)), dict(pipe.projection_model._forward_pre_hooks)

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(refiner, pipe):
        generate(pipe, callback=stop)
    with pytest.raises(TypeError, match="same type"), attach(refiner, pipe):
        pipe("a", negative_prompt=["b"], num_inference_steps=1)  # fails in the encoder, after its first half
    after = dict(vars(pipe)), dict(vars(pipe.projection_model)), dict(pipe.projection_model._forward_pre_hooks)
    assert before == after
    audio, _ = generate(pipe)
    np.testing.assert_array_equal(audio, expected)


def test_a_second_refiner_and_embeddings_past_clap_are_refused(pipe: Any, refiner: DiffGAPRefiner) -> None:
    mask, hooks = torch.ones(1, 3, dtype=torch.long), len(pipe.projection_model._forward_pre_hooks)
    with attach(refiner, pipe):
        with pytest.raises(ValueError, match="attached already; detach it"):
            attach(refiner, pipe).attach()
        with pytest.raises(ValueError, match="hold no CLAP embedding any more; pass the prompt, or detach"):
            generate(
                pipe, None, prompt_embeds=torch.ones(1, 3, 24), attention_mask=mask,
                generated_prompt_embeds=torch.ones(1, 8, 16),
            )  # fmt: skip
    assert len(pipe.projection_model._forward_pre_hooks) == hooks
