"""`attach` at a named method, on Diff-Foley's methods, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffgap_lightning.bridges import CentreBridge, IdentityBridge
from diffgap_lightning.integrations import Conditioner, attach
from diffgap_lightning.integrations.diff_foley import refine_features
from diffgap_lightning.refiner import DiffGAPRefiner

DIM = 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(n: int = 80, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 4, generator=g)
    return {
        m: normalize(latent @ torch.randn(4, DIM, generator=g) + torch.randn(DIM, generator=g), dim=1)
        for m in ("text", "video", "audio")
    }


IDS = dict.fromkeys(("text", "video", "audio"), torch.arange(80))


@pytest.fixture(scope="module")
def refiner() -> DiffGAPRefiner:
    made = DiffGAPRefiner.measure(rows(), IDS, width=8, depth=0, rank=4, encoder="space-a")
    g = torch.Generator().manual_seed(1)
    for parameter in made.cdm.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return made


class TextModel(nn.Module):
    """A latent diffusion model as far as conditioning goes: one method for both branches of guidance."""

    def __init__(self, layout: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.layout = layout
        self.encoder = nn.Embedding(256, DIM)

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        found = torch.stack([self.encoder(torch.tensor(list(t.encode()) or [0])).mean(0) for t in texts])
        return normalize(found, dim=1).view(len(texts), *self.layout, DIM)

    def sizes(self, texts: list[str]) -> list[int]:
        return [len(t) for t in texts]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = TextModel()


@pytest.mark.parametrize("layout", [(), (1,)])
def test_the_empty_prompt_stays_and_equal_prompts_share_a_sample(
    refiner: DiffGAPRefiner, layout: tuple[int, ...]
) -> None:
    model = TextModel(layout)
    texts = ["rain", "", "dog", "rain", ""]
    with torch.no_grad():
        plain = model.get_learned_conditioning(texts)
        with attach(refiner, model, method="get_learned_conditioning", strength=0.5):
            seen = model.get_learned_conditioning(texts)
            empty = model.get_learned_conditioning(["", ""])
        with attach(refiner, model, method="get_learned_conditioning", strength=0.5, per_candidate=True):
            own = model.get_learned_conditioning(texts)
    assert seen.shape == plain.shape
    assert torch.equal(empty, plain[[1, 4]])
    for found, count in ((seen, 2), (own, 3)):
        assert torch.equal(found[[1, 4]], plain[[1, 4]])
        assert len(found[[0, 2, 3]].unique(dim=0)) == count
    noise = torch.Generator().manual_seed(0)
    expected = refiner.refine(
        plain[[0, 2]].view(2, DIM), source="text", target="audio", strength=0.5, generator=noise
    )  # fmt: skip
    assert torch.equal(seen[[0, 2]].view(2, DIM), expected)


def test_a_method_is_found_by_its_path_and_restored(refiner: DiffGAPRefiner) -> None:
    model = Nested()
    before = dict(vars(model.model))
    plain = model.model.get_learned_conditioning(["rain"])
    with attach(refiner, model, method="model.get_learned_conditioning", strength=0):
        assert not torch.equal(model.model.get_learned_conditioning(["rain"]), plain)
    assert vars(model.model) == before
    assert torch.equal(model.model.get_learned_conditioning(["rain"]), plain)


def test_an_input_is_refined_on_its_way_in(refiner: DiffGAPRefiner) -> None:
    model = nn.Module()
    model.encode = lambda x, scale=1.0: x * scale
    video = rows(3, seed=2)["video"]
    with attach(refiner, model, method="encode", refine_input=True, source="video", strength=0):
        found = model.encode(video, scale=2.0)
    expected = refiner.refine(video, source="video", target="audio", strength=0)
    assert torch.equal(found, 2 * expected)


def test_gradients_of_the_generator_do_not_reach_a_frozen_refiner(refiner: DiffGAPRefiner) -> None:
    model = TextModel()
    with attach(refiner, model, method="get_learned_conditioning"):
        assert not model.get_learned_conditioning(["rain"]).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_identity_changes_no_bit_of_a_named_method(dtype: torch.dtype) -> None:
    identity, model, texts = IdentityBridge().fit(rows(), IDS), TextModel().to(dtype), ["rain", "", "dog"]
    with torch.no_grad():
        plain = model.get_learned_conditioning(texts)
        with attach(identity, model, method="get_learned_conditioning", strength=0):
            seen = model.get_learned_conditioning(texts)
    assert seen.dtype == dtype
    assert torch.equal(seen, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_named_method_gives_what_refine_gives_in_its_dtype(refiner: DiffGAPRefiner, dtype: torch.dtype) -> None:
    model = TextModel().to(dtype)
    with torch.no_grad():
        plain = model.get_learned_conditioning(["rain", "", "dog"])
        with attach(refiner, model, method="get_learned_conditioning", strength=0):
            seen = model.get_learned_conditioning(["rain", "", "dog"])
    expected = refiner.refine(plain[[0, 2], 0], source="text", target="audio", strength=0)
    assert expected.dtype == dtype
    assert torch.equal(seen[[0, 2], 0], expected)
    assert torch.equal(seen[1], plain[1])


def test_a_named_method_is_restored_after_an_exception_too(refiner: DiffGAPRefiner) -> None:
    model = TextModel()
    before = dict(vars(model))
    with pytest.raises(ZeroDivisionError), attach(refiner, model, method="get_learned_conditioning"):
        _ = 1 / len(model.get_learned_conditioning([""])[:0])
    assert vars(model) == before


# ---- Diff-Foley ---------------------------------------------------------------------------------------------------


class Foley(nn.Module):
    """The methods of Diff-Foley's LatentDiffusion that its sampling script calls, with its conditioning stage."""

    def __init__(self) -> None:
        super().__init__()
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.embedder = nn.Sequential(nn.Linear(DIM, 6))
        self.seen: dict[str, Any] = {}

    def get_learned_conditioning(self, c: Tensor) -> Tensor:
        return self.cond_stage_model.embedder(c)

    def sample_log_diff_sampler(self, cond: Tensor, batch_size: int, **kwargs: Any) -> Tensor:
        self.seen = {"cond": cond, **kwargs}
        return cond

    def sample_log_with_classifier_diff_sampler(self, embed_cond: Tensor, origin_cond: Tensor, **kwargs: Any) -> Tensor:
        self.seen = {"cond": embed_cond, "origin": origin_cond, **kwargs}
        return embed_cond


def script(model: Foley, features: Tensor, double_guidance: bool) -> dict[str, Any]:
    """What the repository's notebook does with features `(T, D)`: four samples."""
    video = features.unsqueeze(0).repeat(4, 1, 1)
    cond = model.get_learned_conditioning(video[:, :5])
    unconditional = torch.zeros(cond.shape)
    common = {"batch_size": 4, "unconditional_conditioning": unconditional}
    if double_guidance:
        model.sample_log_with_classifier_diff_sampler(cond, origin_cond=video, **common)
    else:
        model.sample_log_diff_sampler(cond, **common)
    return model.seen


@pytest.mark.parametrize("double_guidance", [False, True])
@pytest.mark.parametrize("per_candidate", [False, True])
def test_diff_foley_and_its_classifier_get_the_same_refined_features(
    refiner: DiffGAPRefiner, double_guidance: bool, per_candidate: bool
) -> None:
    model, features = Foley(), rows(5, seed=3)["video"]
    options: dict[str, Any] = {"strength": 0.4, "per_candidate": per_candidate, "per_frame": True}
    with torch.no_grad(), attach(refiner, model, source="video", **options):
        seen = script(model, features, double_guidance)
    expected = refine_features(refiner, features.expand(4, -1, -1), **options)
    assert torch.equal(seen["cond"], model.cond_stage_model.embedder(expected))
    assert torch.equal(seen["unconditional_conditioning"], torch.zeros_like(seen["cond"]))
    assert len(expected.flatten(1).unique(dim=0)) == (4 if per_candidate else 1)
    if double_guidance:
        assert torch.equal(seen["origin"], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_diff_foleys_dtype_is_kept(refiner: DiffGAPRefiner, dtype: torch.dtype) -> None:
    model, features = Foley().to(dtype), rows(5, seed=3)["video"].to(dtype)
    with torch.no_grad(), attach(refiner, model, source="video", strength=0, per_frame=True):
        seen = script(model, features, True)
    expected = refiner.refine(features, source="video", target="audio", strength=0)
    assert torch.equal(seen["origin"], expected.expand(4, -1, -1))
    assert seen["origin"].dtype == seen["cond"].dtype == dtype


def test_diff_foley_is_restored_after_an_exception_too(refiner: DiffGAPRefiner) -> None:
    model, features = Foley(), rows(5, seed=3)["video"]
    before = dict(vars(model))
    with pytest.raises(ValueError, match="dimension"), attach(refiner, model, source="video", per_frame=True):
        script(model, features[:, :3], True)
    assert vars(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_identity_leaves_diff_foley_as_it_is(dtype: torch.dtype) -> None:
    identity = IdentityBridge().fit(rows(), IDS)
    model, features = Foley().to(dtype), rows(5, seed=3)["video"].to(dtype)
    with torch.no_grad():
        plain = script(model, features, True)
        before = dict(vars(model))
        with attach(identity, model, source="video", strength=0, per_frame=True):
            seen = script(model, features, True)
    assert all(torch.equal(seen[k], plain[k]) for k in ("cond", "origin", "unconditional_conditioning"))
    assert vars(model).keys() == before.keys()


def test_each_frame_of_each_row_is_refined_as_a_row_of_its_own(refiner: DiffGAPRefiner) -> None:
    features = torch.stack([rows(5, seed=s)["video"] for s in (3, 4)])
    found = refine_features(refiner, features, strength=0, per_frame=True)
    for sequence, refined in zip(features, found, strict=True):
        expected = refiner.refine(sequence, source="video", target="audio", strength=0)
        torch.testing.assert_close(refined, expected)
    condition = Conditioner(refiner, source="video", strength=0, num_samples=3, per_frame=True, per_candidate=True)
    torch.testing.assert_close(condition(features, 2), found.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        refine_features(refiner, features)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_generators_without_a_contrastive_embedding_are_refused(tiny_generators: ModuleType) -> None:
    from diffusers import StableAudioPipeline

    pipe = StableAudioPipeline.__new__(StableAudioPipeline)
    with pytest.raises(TypeError, match=r"StableAudioPipeline: .* T5 sequences, not on a contrastive embedding"):
        attach(tiny_generators.refiner(), pipe)
    tango = type("Tango", (), {})()
    with pytest.raises(TypeError, match="Tango: it is conditioned on T5 sequences"):
        attach(tiny_generators.refiner(), tango)
    with pytest.raises(TypeError, match=r"generator: got int, expected one of AudioLDMPipeline.*name its conditioning"):
        attach(tiny_generators.refiner(), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "encode"}, "has no method 'encode'; it has get_learned_conditioning"),
        ({"method": "encoder.missing"}, "has no method 'encoder.missing'"),
        ({"source": "image"}, "source='image', target='audio': this DiffGAPRefiner knows text->audio"),
        ({"strength": 1.5}, r"strength: got 1.5, expected 0 \(the start itself\) to 1"),
        ({"num_samples": 0}, "num_samples: got 0, expected at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan, expected a finite number"),
        ({"encoder": "space-b"}, "space of encoder 'space-a', but TextModel.get_learned_conditioning uses 'space-b'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_touched(
    refiner: DiffGAPRefiner, options: dict[str, Any], message: str
) -> None:
    model = TextModel()
    with pytest.raises(ValueError, match=message):
        attach(refiner, model, **{"method": "get_learned_conditioning", **options})


def test_an_encoder_may_stand_for_its_fingerprint(refiner: DiffGAPRefiner) -> None:
    class Encoder:
        fingerprint = "space-a"

    attach(refiner, TextModel(), method="get_learned_conditioning", encoder=Encoder())
    Encoder.fingerprint = "space-c"
    with pytest.raises(ValueError, match=r"'space-a', .* uses 'space-c'"):
        attach(refiner, TextModel(), method="get_learned_conditioning", encoder=Encoder())


def test_a_refiner_of_another_width_is_refused_with_both_names(
    tiny_generators: ModuleType, refiner: DiffGAPRefiner, tmp_path: Any
) -> None:
    pipe = tiny_generators.audioldm(tmp_path)
    with pytest.raises(ValueError, match=r"12-d audio embeddings of encoder 'space-a', but AudioLDMPipeline .* 32-d"):
        attach(refiner, pipe)
    bridge = CentreBridge().fit(rows(), IDS)
    with pytest.raises(ValueError, match="gives 12-d audio embeddings, but AudioLDMPipeline"):
        attach(bridge, pipe)


def test_a_refiner_in_training_mode_and_no_refiner_are_refused(refiner: DiffGAPRefiner) -> None:
    model = TextModel()
    refiner.train()
    with pytest.raises(ValueError, match=r"training mode, with dropout; call refiner.eval\(\) first"):
        attach(refiner, model, method="get_learned_conditioning")
    refiner.eval()
    with pytest.raises(TypeError, match="refiner: got str, expected a DiffGAPRefiner, a bridge or another"):
        attach("folder", model, method="get_learned_conditioning")  # type: ignore[arg-type]
    with attach(refiner, model, method="sizes"), pytest.raises(TypeError, match="sizes returned list, expected an emb"):
        model.sizes(["rain"])


def test_embeddings_of_another_space_of_the_same_width_are_noticed(shared_data: Path) -> None:
    """Real CLAP embeddings: half of the captions fit a refiner, the others condition, as they are and rotated."""
    table = np.load(shared_data / "real_clap" / "audiocaps_dev.npz", allow_pickle=False)
    text, ids = torch.from_numpy(table["text"]), torch.from_numpy(table["text_id"])
    audio, audio_ids = torch.from_numpy(table["audio"]), torch.from_numpy(table["audio_id"])
    half = len(text) // 2
    refiner = DiffGAPRefiner.measure(
        {"text": text[:half], "audio": audio}, {"text": ids[:half], "audio": audio_ids}, width=8, depth=0
    )
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(512, 512, generator=g)).Q
    own = Conditioner(refiner, strength=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(half, len(text) - 8, 4):
            own(text[i : i + 8])
            own.reset()
    foreign = Conditioner(refiner, strength=0)
    message = r"mean cosine of -?0.0\d to the text centroid .* 0.4\d is expected: was it trained with another encoder"
    for row in (text[half:] @ rotation)[:7].split(1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            foreign(row)
    with pytest.warns(UserWarning, match=message):
        foreign(text[-1:] @ rotation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foreign(text[half:] @ rotation)  # said once
