"""`attach` on diffusers' AudioLDMPipeline and MusicLDMPipeline, built from their real classes at tiny size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

Generate = Callable[..., tuple[np.ndarray, Tensor]]
PROMPTS = ["a dog barks", "rain on a tin roof"]
NEGATIVE = ["low quality", "hiss"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(scope="module")
def refiner(tiny_generators: ModuleType) -> DiffGAPRefiner:
    return tiny_generators.refiner()


@pytest.fixture(scope="module")
def identity(tiny_generators: ModuleType) -> IdentityBridge:
    rows = normalize(torch.randn(8, tiny_generators.DIM, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(8)
    return IdentityBridge().fit({"text": rows, "audio": rows}, {"text": ids, "audio": ids})


@pytest.fixture(scope="module", params=["audioldm", "musicldm"])
def pipe(request: pytest.FixtureRequest, tiny_generators: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return getattr(tiny_generators, request.param)(tmp_path_factory.mktemp("tokenizer"))


@contextmanager
def conditions(pipe: Any) -> Iterator[list[Tensor]]:
    """What the UNet is conditioned on, a tensor a step."""
    seen: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def generate(pipe: Any, prompt: Any = PROMPTS, **options: Any) -> tuple[np.ndarray, Tensor]:
    """Waveforms and the condition; the noise comes from torch's global generator, as a user's would."""
    torch.manual_seed(3)
    with conditions(pipe) as seen:
        audio = pipe(prompt, num_inference_steps=2, audio_length_in_s=0.02, **options).audios
    assert all(torch.equal(c, seen[0]) for c in seen)
    return audio, seen[0]


def features(pipe: Any, texts: list[str]) -> Tensor:
    """`(B, D)` by the pipeline's own text encoder, as the pipeline calls it."""
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    tokens = {k: tokens[k].to(pipe.device) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if hasattr(pipe.text_encoder, "get_text_features"):
            return pipe.text_encoder.get_text_features(**tokens).pooler_output
        return normalize(pipe.text_encoder(**tokens).text_embeds, dim=-1)


def plain(
    pipe: Any, prompts: list[str], negative: list[str] | None = None, **options: Any
) -> tuple[np.ndarray, Tensor]:
    """The plain pipeline; MusicLDM cannot encode prompts under transformers 5 and is given the embeddings."""
    if type(pipe).__name__ == "AudioLDMPipeline":
        return generate(pipe, prompts, negative_prompt=negative, **options)
    unconditional = features(pipe, negative or [""] * len(prompts))
    given = {"prompt_embeds": features(pipe, prompts), "negative_prompt_embeds": unconditional}
    return generate(pipe, None, **given, **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("per_candidate", [False, True])
def test_an_identity_changes_no_bit(
    pipe: Any,
    identity: IdentityBridge,
    guidance_scale: float,
    candidates: int,
    negative: list[str] | None,
    per_candidate: bool,
) -> None:
    options = {"guidance_scale": guidance_scale, "num_waveforms_per_prompt": candidates}
    expected, condition = plain(pipe, PROMPTS, negative, **options)
    with attach(identity, pipe, strength=0, per_candidate=per_candidate):
        audio, seen = generate(pipe, negative_prompt=negative, **options)
    assert torch.equal(seen, condition)
    if candidates > 1 and type(pipe).__name__ == "MusicLDMPipeline":
        # Where it encodes the prompts itself it picks each prompt's waveforms among those of all prompts.
        assert {row.tobytes() for row in audio} <= {row.tobytes() for row in expected}
    else:
        np.testing.assert_array_equal(audio, expected)


@pytest.mark.parametrize("kind", ["audioldm", "musicldm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_identity_changes_no_bit_in_half_precision(
    tiny_generators: ModuleType, tmp_path: Path, identity: IdentityBridge, kind: str, dtype: torch.dtype
) -> None:
    pipe = getattr(tiny_generators, kind)(tmp_path).to(dtype)
    expected, condition = plain(pipe, PROMPTS, NEGATIVE)
    with attach(identity, pipe, strength=0):
        audio, seen = generate(pipe, negative_prompt=NEGATIVE)
    assert torch.equal(seen, condition)
    np.testing.assert_array_equal(audio, expected)


@pytest.mark.parametrize("kind", ["audioldm", "musicldm"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("candidates", "per_candidate"), [(1, False), (4, False), (4, True)])
def test_only_the_conditional_half_is_refined(
    kind: str,
    tiny_generators: ModuleType,
    tmp_path: Path,
    refiner: DiffGAPRefiner,
    dtype: torch.dtype,
    device: str,
    candidates: int,
    per_candidate: bool,
) -> None:
    pipe = getattr(tiny_generators, kind)(tmp_path).to(device, dtype)
    options = {"num_waveforms_per_prompt": candidates, "guidance_scale": 2.5}
    _, condition = plain(pipe, PROMPTS, NEGATIVE, **options)
    with attach(refiner, pipe, strength=0.5, per_candidate=per_candidate, seed=7):
        _, seen = generate(pipe, negative_prompt=NEGATIVE, **options)
    half = 2 * candidates
    assert torch.equal(seen[:half], condition[:half])
    expected = refiner.refine(
        features(pipe, PROMPTS).to(dtype), source="text", target="audio", strength=0.5,
        num_samples=candidates if per_candidate else 1, generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    expected = expected.flatten(0, 1) if per_candidate else expected.repeat_interleave(candidates, 0)
    assert seen.dtype == dtype
    assert torch.equal(seen[half:], expected)
    distinct = len(seen[half:].float().unique(dim=0))
    assert distinct == (8 if per_candidate else 2)


@pytest.mark.parametrize("per_candidate", [False, True])
def test_several_samples_are_averaged_on_the_sphere(pipe: Any, refiner: DiffGAPRefiner, per_candidate: bool) -> None:
    options = {"guidance_scale": 1.0, "num_waveforms_per_prompt": 2}
    with attach(refiner, pipe, strength=1.0, num_samples=5, per_candidate=per_candidate):
        _, seen = generate(pipe, **options)
    noise = torch.Generator().manual_seed(0)
    samples = refiner.refine(
        features(pipe, PROMPTS), source="text", target="audio", strength=1.0,
        num_samples=10 if per_candidate else 5, generator=noise,
    )  # fmt: skip
    mean = normalize(samples.view(2, -1, 5, samples.shape[-1]).mean(2), dim=-1)
    torch.testing.assert_close(seen, mean.expand(2, 2, -1).flatten(0, 1))


def test_reranking_sees_the_prompts_own_embedding(
    tiny_generators: ModuleType, tmp_path: Path, refiner: DiffGAPRefiner, identity: IdentityBridge
) -> None:
    """MusicLDM ranks a prompt's waveforms; compared with an identity, because plain it cannot encode the prompt."""
    pytest.importorskip("librosa", reason="the pipeline ranks only with librosa")
    pipe, texts = tiny_generators.musicldm(tmp_path), []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, out: texts.append(out.text_embeds.clone()))
    try:
        for attached in (identity, refiner):
            with attach(attached, pipe):
                generate(pipe, num_waveforms_per_prompt=2)
    finally:
        handle.remove()
    assert len(texts) == 2
    assert torch.equal(*texts)


def test_the_generators_own_noise_does_not_shift(pipe: Any, refiner: DiffGAPRefiner) -> None:
    text = features(pipe, PROMPTS)
    with attach(refiner, pipe):
        attached, seen = generate(pipe, guidance_scale=1.0)
    torch.manual_seed(3)  # the same condition, given by hand
    audio = pipe(prompt_embeds=seen, num_inference_steps=2, audio_length_in_s=0.02, guidance_scale=1.0).audios
    np.testing.assert_array_equal(attached, audio)
    assert not torch.equal(seen, text)


def test_noise_goes_on_between_calls_and_begins_anew_when_attached_again(pipe: Any, refiner: DiffGAPRefiner) -> None:
    attachment = attach(refiner, pipe, strength=0.8)
    runs = []
    for _ in range(2):
        with attachment:
            runs.append([generate(pipe)[1] for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])
    noise = torch.Generator().manual_seed(0)
    with attach(refiner, pipe, strength=0.8, noise=noise):
        assert torch.equal(generate(pipe)[1], runs[0][0])
    with attach(refiner, pipe, strength=0.8, noise=noise):
        assert torch.equal(generate(pipe)[1], runs[0][1])


def test_given_embeddings_of_another_modality_and_width_are_refined(tiny_generators: ModuleType, pipe: Any) -> None:
    rows = normalize(torch.randn(60, 12, generator=torch.Generator().manual_seed(1)))
    audio = normalize(torch.randn(60, tiny_generators.DIM, generator=torch.Generator().manual_seed(2)))
    ids = dict.fromkeys(("video", "audio"), torch.arange(60))
    refiner = DiffGAPRefiner.measure({"video": rows, "audio": audio}, ids, width=8, depth=0, rank=4)
    with attach(refiner, pipe, source="video", strength=None):
        _, seen = generate(pipe, None, prompt_embeds=rows[:2], num_waveforms_per_prompt=3)
    noise = torch.Generator().manual_seed(0)
    expected = refiner.refine(rows[:2], source="video", target="audio", generator=noise).repeat_interleave(3, 0)
    assert torch.equal(seen[6:], expected)
    assert torch.equal(seen[:6], features(pipe, ["", ""]).repeat_interleave(3, 0))


def test_everything_is_restored_after_an_exception_too(pipe: Any, refiner: DiffGAPRefiner) -> None:
    before, encoder = dict(vars(pipe)), dict(vars(pipe.text_encoder))

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    with pytest.raises(StopError), attach(refiner, pipe):
        generate(pipe, callback=stop)
    for owner, state in ((pipe, before), (pipe.text_encoder, encoder)):
        assert vars(owner).keys() == state.keys()
        assert all(vars(owner)[k] is v for k, v in state.items())


def test_attaching_twice_is_refused_and_leaves_the_first(pipe: Any, refiner: DiffGAPRefiner) -> None:
    first = attach(refiner, pipe).attach()
    assert first.attached
    with pytest.raises(ValueError, match="attached already"):
        first.attach()
    with pytest.raises(ValueError, match=r"_encode_prompt has a refiner attached already; detach it"):
        attach(refiner, pipe, strength=0.5).attach()
    _, seen = generate(pipe)
    first.detach()
    assert not first.attached
    first.detach()  # once more does nothing
    with attach(refiner, pipe):
        assert torch.equal(generate(pipe)[1], seen)


def test_wrong_prompts_fail_as_in_the_plain_pipeline(pipe: Any, refiner: DiffGAPRefiner) -> None:
    with attach(refiner, pipe):
        with pytest.raises(ValueError, match="batch size"):
            generate(pipe, negative_prompt=["one", "two", "three"])
        with pytest.raises(TypeError, match="same type"):
            generate(pipe, negative_prompt="one")
