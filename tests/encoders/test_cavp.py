from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.encoders import encoder_class
from diffgap_lightning.encoders.cavp import CavpEncoder
from diffgap_lightning.encoders.cavp_model import CavpModel, model_from_weights, random_model

pytest.importorskip("torchaudio", reason="needs the extra cavp")


@pytest.fixture(scope="module")
def encoder() -> CavpEncoder:
    return CavpEncoder(None, width=4, dim=16)


def frames(count: int, seed: int = 0, size: tuple[int, int] = (48, 64)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights drawn by key name, as those were that gave the reference's outputs."""
    state = {}
    for key, shape in shapes.items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif not shape:
            state[key] = torch.tensor(math.log(1 / 0.07))
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * r.abs()
        elif len(shape) > 1:
            state[key] = r * math.sqrt(2 / r[0].numel())
        else:
            state[key] = 0.1 * r + (1.0 if key.endswith("weight") else 0.0)
    return state


@pytest.mark.slow
def test_features_are_those_of_the_reference(shared_data: Path) -> None:
    shapes = json.loads((shared_data / "cavp" / "state_dict.json").read_text())
    model = model_from_weights(filled(shapes), "filled").eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    expected = np.load(shared_data / "cavp" / "parity.npz", allow_pickle=False)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 16, 3, 64, 64, generator=generator)
    spec = torch.rand(2, 128, 256, generator=generator)
    with torch.no_grad():
        for name, encode, x in (("video", model.encode_video, video), ("audio", model.encode_spec, spec)):
            for kind, pool in (("frames", False), ("pooled", True)):
                got = encode(x, normalize=True, pool=pool).numpy()
                assert got.shape == expected[f"{name}_{kind}"].shape
                assert np.abs(got - expected[f"{name}_{kind}"]).max() < 1e-5


@pytest.mark.parametrize("steps", [16, 23, 31])
def test_pooling_is_a_maximum_over_the_first_window_then_a_norm(encoder: CavpEncoder, steps: int) -> None:
    video, spec = torch.rand(2, steps, 3, 32, 40), torch.rand(2, 128, 16 * steps + 5)
    for encode, x in ((encoder.encode_video, video), (encoder.encode_spec, spec)):
        sequence = encode(x, normalize=False, pool=False)
        assert sequence.shape == (2, steps, 16)
        pooled = encode(x, normalize=False, pool=True)
        assert torch.equal(pooled, sequence[:, :16].amax(dim=1))
        assert torch.allclose(encode(x, normalize=True), torch.nn.functional.normalize(pooled, dim=1))
        unit = encode(x, normalize=True, pool=False)
        assert torch.allclose(unit.norm(dim=-1), torch.ones(2, steps))


def test_several_pooled_windows_stay_apart_as_in_the_reference(encoder: CavpEncoder) -> None:
    sequence = encoder.encode_video(video := torch.rand(1, 40, 3, 32, 32), pool=False)
    pooled = encoder.encode_video(video)
    assert pooled.shape == (1, 16, 2)
    assert torch.equal(pooled[:, :, 1], sequence[:, 16:32].amax(dim=1))
    assert torch.allclose(encoder.encode_video(video, normalize=True).norm(dim=-1), torch.ones(1, 16))


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_batches_of_different_lengths_equal_single_items(encoder: CavpEncoder, modality: str) -> None:
    generator = torch.Generator().manual_seed(1)
    if modality == "audio":
        items = [torch.rand(n, generator=generator) - 0.5 for n in (64000, 100, 20000, 160000, 64000)]
    else:
        items = [frames(count, seed) for seed, count in enumerate((16, 1, 7, 26, 16))]
    rows = encoder.embed(modality, items)
    assert rows.shape == (5, 16)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-5)
    transform = encoder.transform(modality)
    assert transform is not None
    single = torch.cat([encoder.embed(modality, [transform(item)]) for item in items])
    assert torch.allclose(rows, single, atol=1e-5)


def test_a_clip_of_one_window_is_the_references_pooled_vector(encoder: CavpEncoder) -> None:
    clip = frames(16, size=(224, 224))
    expected = encoder.encode_video(clip[None] / 255, normalize=True)
    assert torch.allclose(encoder.embed_video([clip]), expected, atol=1e-6)
    spec = torch.rand(128, 256)
    assert torch.allclose(encoder.embed_audio([spec]), encoder.encode_spec(spec[None], normalize=True), atol=1e-6)


def test_a_longer_clip_is_the_mean_of_its_windows(encoder: CavpEncoder) -> None:
    clip = frames(40, size=(224, 224))
    parts = [encoder.embed_video([clip[start : start + 16]]) for start in (0, 16, 32)]  # 32 to 40 is half a window
    mean = torch.nn.functional.normalize(torch.cat(parts).mean(dim=0), dim=0)
    assert torch.allclose(encoder.embed_video([clip])[0], mean, atol=1e-6)
    assert torch.allclose(encoder.embed_video([clip[:39]]), encoder.embed_video([clip[:32]]), atol=1e-6)


def test_sequences_run_in_passes_of_ten_seconds(encoder: CavpEncoder) -> None:
    clip = frames(45, size=(224, 224))
    sequence = encoder.embed_sequence("video", [clip, clip.flip(0)])
    assert sequence.shape == (2, 45, 16)
    assert torch.allclose(sequence.norm(dim=2), torch.ones(2, 45), atol=1e-5)
    first = encoder.encode_video(clip[None, :40] / 255, normalize=True, pool=False)
    assert torch.allclose(sequence[0, :40], first[0], atol=1e-6)
    sound = torch.rand(2, 11 * 16000) - 0.5
    assert encoder.embed_sequence("audio", list(sound)).shape == (2, 44, 16)
    with pytest.raises(ValueError, match="got 3 to 4 frames, expected one length"):
        encoder.embed_sequence("video", [frames(3), frames(4)])
    with pytest.raises(ValueError, match="gives sequences of audio, video, got text"):
        encoder.embed_sequence("text", [])


@pytest.mark.parametrize("wrap", ["", "module.", "model.", "module.model."])
def test_checkpoints_load_whatever_wrapped_them(tmp_path: Path, wrap: str) -> None:
    state = random_model(3, dim=8, width=2).state_dict()
    content = {f"{wrap}{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    content["another_model.weight"] = torch.zeros(3)
    torch.save({"epoch": 66, "name": "x", "state_dict": content, "optimizer": {"state": {}}}, tmp_path / "c.ckpt")
    encoder = CavpEncoder(str(tmp_path / "c.ckpt"))
    assert encoder.dim == 8
    assert not encoder.training
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, state[key])
    assert encoder.fingerprint.startswith("cavp/sha256:")
    torch.save(state, tmp_path / "plain.pt")
    assert CavpEncoder(str(tmp_path / "plain.pt")).fingerprint == encoder.fingerprint


def test_wrong_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    def refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
        state = dict(random_model(0, dim=8, width=2).state_dict())
        change(state)
        torch.save(state, tmp_path / "c.pt")
        with pytest.raises(ValueError, match=message):
            CavpEncoder(str(tmp_path / "c.pt"))

    refused(lambda s: s.pop("spec_encoder.fc1.bias"), r"c.pt: lacks spec_encoder.fc1.bias; is this a CAVP")
    refused(lambda s: s.clear() or s.update(x=torch.zeros(1)), r"lacks video_encoder.conv1.conv.weight \(it holds x\)")
    refused(lambda s: s.update({"spec_encoder.fc2.bias": torch.zeros(2)}), "has unexpected spec_encoder.fc2.bias")
    refused(lambda s: s.update({"spec_encoder.fc1.bias": torch.zeros(2)}), r"fc1.bias \(2,\) instead of \(64,\)")
    with pytest.raises(FileNotFoundError, match="no such file"):
        CavpEncoder(str(tmp_path / "none.pt"))


def test_random_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (CavpEncoder(None, seed=seed, width=2, dim=8) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert a.fingerprint == b.fingerprint == "cavp/random-seed0-width2-dim8/v1"
    assert a.fingerprint != c.fingerprint
    clip = [frames(3)]
    assert torch.equal(a.embed_video(clip), b.embed_video(clip))
    assert not torch.allclose(a.embed_video(clip), c.embed_video(clip))


def test_refusals(encoder: CavpEncoder) -> None:
    with pytest.raises(ValueError, match="got 15 steps, expected at least 16 to pool"):
        encoder.encode_video(torch.rand(1, 15, 3, 32, 32))
    with pytest.raises(ValueError, match=r"uint8 \(1, 16, 3, 8, 8\), expected \(B, T, 3, H, W\) floats"):
        encoder.encode_video(torch.zeros(1, 16, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got 15 columns, expected at least 16"):
        encoder.encode_spec(torch.rand(1, 128, 15))
    with pytest.raises(ValueError, match=r"expected \(B, 128, L\)"):
        encoder.encode_spec(torch.rand(1, 64, 256))
    with pytest.raises(ValueError, match="got nothing"):
        encoder.embed_audio([])
    with pytest.raises(ValueError, match="embeds audio, video, got text"):
        encoder.embed("text", ["x"])
    with pytest.raises(ValueError, match="width: got 0"):
        CavpEncoder(None, width=0)
    assert encoder_class("cavp") is CavpEncoder


def test_forward_gives_both_pooled_vectors_and_the_scale() -> None:
    model: CavpModel = random_model(0, dim=8, width=2).eval()
    video, spec, scale = model(torch.rand(2, 16, 3, 32, 32), torch.rand(2, 128, 256))
    assert video.shape == spec.shape == (2, 8)
    assert float(scale.detach()) == pytest.approx(1 / 0.07)
