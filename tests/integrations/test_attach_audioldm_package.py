"""`attach` on the audioldm package's own `LatentDiffusion`, `text_to_audio` and `style_transfer`.

The package pins an old numpy, so these tests usually run in an environment of its own and skip elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.bridges import IdentityBridge
from diffgap_lightning.integrations import attach
from diffgap_lightning.integrations.audioldm import load_audioldm, repaired
from diffgap_lightning.integrations.seam import override
from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = [
    pytest.mark.skipif(find_spec("audioldm") is None, reason="needs pip install 'diffgap-lightning[audioldm]'"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]
SECONDS = 0.3125  # eight frames of latents
DIM = 512


@pytest.fixture(scope="module")
def tiny() -> Any:
    spec = spec_from_file_location("tiny_audioldm", Path(__file__).parents[1] / "tiny_audioldm.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny.roberta_base(folder)
    return folder


@pytest.fixture(scope="module")
def shared_model(tiny: Any, home: Path) -> Any:
    return tiny.latent_diffusion(home)


@pytest.fixture
def model(shared_model: Any) -> Any:
    """With text as its condition: the package's functions leave the model in the mode that they set."""
    shared_model.cond_stage_key = shared_model.cond_stage_model.embed_mode = "text"
    return shared_model


def rows(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(100, 6, generator=g)
    return {
        m: normalize(latent @ torch.randn(6, DIM, generator=g) + torch.randn(DIM, generator=g), dim=1)
        for m in ("text", "audio")
    }


@pytest.fixture(scope="module")
def refiner() -> DiffGAPRefiner:
    made = DiffGAPRefiner.measure(rows(0), dict.fromkeys(("text", "audio"), torch.arange(100)), width=8, depth=0)
    g = torch.Generator().manual_seed(1)
    for parameter in made.cdm.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return made


@pytest.fixture(scope="module")
def identity() -> IdentityBridge:
    return IdentityBridge().fit(rows(0), dict.fromkeys(("text", "audio"), torch.arange(100)))


@contextlib.contextmanager
def conditions(model: Any) -> Iterator[list[Tensor]]:
    """What the UNet is conditioned on, `(2 B, 1, D)` a step: unconditional, then conditional."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["c_film"][0].clone())

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def generate(model: Any, text: str = "a dog barks", **options: Any) -> tuple[np.ndarray, Tensor]:
    from audioldm.pipeline import text_to_audio

    with conditions(model) as seen, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waveform = text_to_audio(
            model, text, duration=SECONDS, **{"ddim_steps": 2, "n_candidate_gen_per_text": 1, **options}
        )
    assert all(torch.equal(c, seen[0]) for c in seen)
    return waveform, seen[0]


def state(model: Any) -> list[dict[str, int]]:
    """Which object is behind each attribute; without those that generating itself sets."""
    from audioldm.latent_diffusion.ddim import DDIMSampler

    own = {"unconditional_token", "latent_t_size"}
    return [
        {k: id(v) for k, v in vars(owner).items() if k not in own}
        for owner in (model, model.cond_stage_model, DDIMSampler)
    ]


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package reads files with `torchaudio.load`, which since 2.9 needs torchcodec."""
    import soundfile

    def load(path: str) -> tuple[Tensor, int]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T), rate

    if find_spec("torchcodec") is None:
        monkeypatch.setattr("torchaudio.load", load)


@pytest.mark.parametrize("per_candidate", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"batchsize": 2}, {"n_candidate_gen_per_text": 4}, {"batchsize": 2, "guidance_scale": 1.0}],
    ids=["batch", "candidates", "unguided"],
)
def test_an_identity_changes_no_bit(
    model: Any, identity: IdentityBridge, options: dict[str, Any], per_candidate: bool
) -> None:
    with repaired(model):
        expected, condition = generate(model, **options)
    with attach(identity, model, strength=0, per_candidate=per_candidate):
        waveform, seen = generate(model, **options)
    assert torch.equal(seen, condition)
    np.testing.assert_array_equal(waveform, expected)


@pytest.mark.parametrize("per_candidate", [False, True])
@pytest.mark.parametrize(("option", "n"), [("batchsize", 2), ("n_candidate_gen_per_text", 4)])
def test_only_the_conditional_half_is_refined(
    model: Any, refiner: DiffGAPRefiner, option: str, n: int, per_candidate: bool
) -> None:
    options = {option: n}
    with repaired(model):
        _, plain = generate(model, **options)
    with attach(refiner, model, strength=0.5, per_candidate=per_candidate, seed=5):
        _, seen = generate(model, **options)
    assert seen.shape == (2 * n, 1, DIM)
    assert torch.equal(seen[:n], plain[:n])
    noise = torch.Generator().manual_seed(5)
    text = plain[n:, 0] if per_candidate else plain[n : n + 1, 0]
    expected = refiner.refine(text, source="text", target="audio", strength=0.5, generator=noise)
    assert torch.equal(seen[n:, 0], expected if per_candidate else expected.expand(n, -1))
    assert len(seen[n:].unique(dim=0)) == (n if per_candidate else 1)


def test_the_refined_condition_is_heard(model: Any, refiner: DiffGAPRefiner, identity: IdentityBridge) -> None:
    """The package generates with averaged weights: they must hear the condition, or comparing sounds proves nothing."""
    with repaired(model):
        plain, condition = generate(model)
    with attach(identity, model, strength=0):
        same, _ = generate(model)
    with attach(refiner, model, strength=0):
        refined, seen = generate(model)
    np.testing.assert_array_equal(same, plain)
    assert np.abs(refined - plain).std() > 1e-3 * plain.std()
    encode = model.get_learned_conditioning  # draws from the global generator, as the sampler does after it
    with repaired(model), override(model, "get_learned_conditioning", lambda c: seen[1:] if len(encode(c)) else c):
        np.testing.assert_array_equal(generate(model)[0], refined)
    assert torch.equal(seen[:1], condition[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_identity_changes_no_bit_under_autocast(model: Any, identity: IdentityBridge, dtype: torch.dtype) -> None:
    """Half of a model's weights fail in the package; autocast works, but NumPy takes no bfloat16 from the vocoder."""
    found = []
    with torch.autocast("cpu", dtype), override(model, "mel_spectrogram_to_waveform", lambda mel: mel.float().numpy()):
        for attached in (repaired(model), attach(identity, model, strength=0)):
            with attached:
                found.append(generate(model))
    (expected, condition), (spectrogram, seen) = found
    assert torch.equal(seen, condition)
    np.testing.assert_array_equal(spectrogram, expected)


def test_reranking_gets_the_prompt_itself(model: Any, refiner: DiffGAPRefiner) -> None:
    encoder, texts = model.cond_stage_model, []

    def look(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        if module.embed_mode == "text":
            texts.append((args[0], out.clone()))

    handle = encoder.register_forward_hook(look)
    try:
        with repaired(model):
            generate(model, n_candidate_gen_per_text=2)
        with attach(refiner, model):
            generate(model, n_candidate_gen_per_text=2)
    finally:
        handle.remove()
    plain, attached = texts[:2], texts[2:]
    assert [t for t, _ in plain] == [t for t, _ in attached] == [["a dog barks"] * 2] * 2
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(plain, attached, strict=True))


@pytest.mark.usefixtures("readable")
def test_style_transfer_is_refined(
    model: Any, refiner: DiffGAPRefiner, identity: IdentityBridge, make_audio: Any, tmp_path: Path
) -> None:
    from audioldm.pipeline import style_transfer

    source = make_audio(tmp_path / "source.wav", seconds=2.0)

    def transfer() -> tuple[np.ndarray, Tensor]:
        with conditions(model) as seen, contextlib.redirect_stdout(io.StringIO()):
            waveform = style_transfer(model, "rain", str(source), 0.5, duration=SECONDS * 2, batchsize=2, ddim_steps=4)
        return waveform, seen[0]

    with repaired(model):
        expected, condition = transfer()
    with attach(identity, model):
        waveform, _ = transfer()
    np.testing.assert_array_equal(waveform, expected)
    with attach(refiner, model, strength=0):
        _, seen = transfer()
    assert torch.equal(seen[:2], condition[:2])
    refined = refiner.refine(condition[2:3, 0], source="text", target="audio", strength=0)
    assert torch.equal(seen[2:, 0], refined.expand(2, -1))


@pytest.mark.usefixtures("readable")
def test_an_audio_prompt_stays_as_it_is(model: Any, refiner: DiffGAPRefiner, make_audio: Any, tmp_path: Path) -> None:
    source = str(make_audio(tmp_path / "source.wav", seconds=1.0))
    with repaired(model):
        _, plain = generate(model, original_audio_file_path=source)
    for per_candidate in (False, True):
        with attach(refiner, model, per_candidate=per_candidate):
            _, seen = generate(model, original_audio_file_path=source)
        assert torch.equal(seen, plain)


def test_prompts_are_never_dropped_while_attached(model: Any, refiner: DiffGAPRefiner) -> None:
    texts = ["rain"] * 30
    null = model.cond_stage_model.get_unconditional_condition(1)

    def dropped(condition: Tensor) -> int:
        return int((condition == null).all(dim=(1, 2)).sum())

    torch.manual_seed(0)
    assert dropped(model.get_learned_conditioning(texts)) > 0
    torch.manual_seed(0)
    with repaired(model):
        kept = model.get_learned_conditioning(texts)
    assert dropped(kept) == 0
    with attach(refiner, model, strength=0):
        refined = refiner.refine(kept[:1, 0], source="text", target="audio", strength=0)
        torch.testing.assert_close(model.get_learned_conditioning(texts)[:, 0], refined.expand(30, -1))


def test_everything_is_restored_after_an_exception_too(model: Any, refiner: DiffGAPRefiner, tiny: Any) -> None:
    before = state(model)
    with pytest.raises(ZeroDivisionError), attach(refiner, model):
        generate(model, ddim_steps=0)
    assert state(model) == before
    assert model.cond_stage_model.unconditional_prob == 0.1


def test_two_models_may_be_detached_in_any_order(model: Any, refiner: DiffGAPRefiner, tiny: Any, home: Path) -> None:
    other = tiny.latent_diffusion(home, seed=1)
    before = state(model)[2]
    first, second = attach(refiner, model).attach(), attach(refiner, other).attach()
    with pytest.raises(ValueError, match="attached already"):
        attach(refiner, other).attach()
    first.detach()
    generate(other)
    second.detach()
    assert state(model)[2] == before


def test_another_dimension_is_refused_with_both_names(model: Any) -> None:
    small = {m: x[:, :32] / x[:, :32].norm(dim=1, keepdim=True) for m, x in rows(0).items()}
    ids = dict.fromkeys(small, torch.arange(100))
    other = DiffGAPRefiner.measure(small, ids, width=8, depth=0, encoder="clip-tiny")
    with pytest.raises(
        ValueError, match=r"32-d audio embeddings of encoder 'clip-tiny', .*512-d ones of CLAP with HTS"
    ):
        attach(other, model)


def test_a_checkpoint_is_loaded_as_the_package_saved_it(tiny: Any, home: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    tensors = {k: v for k, v in model.state_dict().items()}
    ids = "cond_stage_model.model.text_branch.embeddings.position_ids"
    torch.save({"state_dict": {**tensors, ids: torch.arange(520)[None]}}, path)  # as older versions wrote it
    with tiny.at_home(home):
        loaded = load_audioldm(path, config=tiny.small_config())
    assert all(torch.equal(v, tensors[k]) for k, v in loaded.state_dict().items())
    with repaired(model), repaired(loaded):
        np.testing.assert_array_equal(generate(loaded)[0], generate(model)[0])


def test_unusable_checkpoints_are_named(tiny: Any, home: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.ckpt: no such file"):
        load_audioldm(tmp_path / "absent.ckpt")
    bad, other = tmp_path / "bad.ckpt", tmp_path / "other.ckpt"
    bad.write_bytes(b"nonsense")
    torch.save({"state_dict": {"x": torch.zeros(1)}}, other)
    with tiny.at_home(home):
        with pytest.raises(ValueError, match="bad.ckpt: "):
            load_audioldm(bad)
        with pytest.raises(ValueError, match="does not fit audioldm-s-full"):
            load_audioldm(other, config=tiny.small_config())
