from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffgap_lightning.evaluation.panns import MIN_SAMPLES, PannsCnn14

pytest.importorskip("torchaudio", reason="gives the mel bands")

CHANNELS = (3, 4, 5, 6, 7, 8)


def tiny(sample_rate: int = 16000) -> PannsCnn14:
    torch.manual_seed(0)
    network = PannsCnn14(sample_rate, CHANNELS, classes=9).eval()
    for name, value in network.named_buffers():  # statistics as if trained
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn_like(value) - (20 if name.startswith("bn0") else 0))
        if name.endswith("running_var"):
            value.copy_(1 + torch.rand_like(value) + (100 if name.startswith("bn0") else 0))
    return network


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sample_rate", [8000, 16000, 32000])
def test_the_spectrogram_is_that_of_torchlibrosa(sample_rate: int) -> None:
    """The front end of the original network."""
    stft = pytest.importorskip("torchlibrosa.stft", reason="the reference for the spectrogram")
    size, hop, top = sample_rate * 32 // 1000, sample_rate // 100, {8000: 4000, 16000: 8000, 32000: 14000}[sample_rate]
    spectrogram = stft.Spectrogram(n_fft=size, hop_length=hop, win_length=size)
    log_mel = stft.LogmelFilterBank(sr=sample_rate, n_fft=size, n_mels=64, fmin=50, fmax=top, top_db=None)
    x = noise(2 * sample_rate)[None]
    mine = tiny(sample_rate)
    assert torch.allclose(mine.logmel_extractor.melW, log_mel.melW, atol=1e-6)
    assert torch.allclose(mine.log_mel(x), log_mel(spectrogram(x))[:, 0], atol=2e-3)  # decibels


def test_the_network_is_that_of_the_layers_written_out() -> None:
    network = tiny()
    w = network.state_dict()

    def normalised(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        mean, var, scale, shift = (w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return x * scale.view(shape) + shift.view(shape)

    log_mel = -20 + 10 * torch.randn(2, 101, 64, generator=torch.Generator().manual_seed(0))
    x = normalised(log_mel.transpose(1, 2)[..., None], "bn0")[..., 0].transpose(1, 2)[:, None]
    for block in range(1, 7):
        for layer in (1, 2):
            x = functional.conv2d(x, w[f"conv_block{block}.conv{layer}.weight"], padding=1)
            x = torch.relu(normalised(x, f"conv_block{block}.bn{layer}"))
        x = functional.avg_pool2d(x, 2) if block < 6 else x
    x = x.mean(3)
    x = x.max(2).values + x.mean(2)
    features = torch.relu(functional.linear(x, w["fc1.weight"], w["fc1.bias"]))
    logits = functional.linear(features, w["fc_audioset.weight"], w["fc_audioset.bias"])
    with torch.no_grad():
        mine = network.network(log_mel)
    assert torch.allclose(mine[0], features, atol=1e-5)
    assert torch.allclose(mine[1], logits, atol=1e-5)


def test_one_row_a_clip_that_does_not_depend_on_the_clips_beside_it() -> None:
    network = tiny()
    clips = [noise(n, n) for n in (48000, 1000, 48000, 40000, 32000)]
    together = network(clips)
    assert together.counts == [1] * 5
    assert together.rows.shape == (5, 8)
    assert together.logits.shape == (5, 9)
    for i, clip in enumerate(clips):
        alone = network([clip])
        assert torch.allclose(alone.rows[0], together.rows[i], atol=1e-5)
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-5)


def test_the_mean_is_removed_before_a_short_clip_is_padded_with_zeros() -> None:
    network = tiny()
    seen = []
    network.bn0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = noise(9000)
    padded = functional.pad(x - x.mean(), (0, MIN_SAMPLES - 9000))
    for clip in (x, x + 0.3, padded):
        network([clip])
    decibels = network.log_mel(padded[None]).transpose(1, 2)[..., None]
    assert all(torch.allclose(heard, decibels, atol=0.05) for heard in seen)  # a step of 0.3 is 20 dB at its frame


def test_the_full_network_has_the_keys_and_shapes_of_the_public_checkpoint() -> None:
    with torch.device("meta"):
        state = {k: tuple(v.shape) for k, v in PannsCnn14().state_dict().items() if "num_batches" not in k}
    widths = (1, 64, 128, 256, 512, 1024, 2048)
    expected = {"logmel_extractor.melW": (513, 64), "fc1.weight": (2048, 2048), "fc1.bias": (2048,)}
    expected |= {"fc_audioset.weight": (527, 2048), "fc_audioset.bias": (527,)}
    norms = {"bn0": 64}
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
        expected[f"conv_block{i}.conv1.weight"] = (after, before, 3, 3)
        expected[f"conv_block{i}.conv2.weight"] = (after, after, 3, 3)
        norms |= {f"conv_block{i}.bn1": after, f"conv_block{i}.bn2": after}
    kinds = ("weight", "bias", "running_mean", "running_var")
    expected |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in kinds}
    assert state == expected


@pytest.mark.parametrize("sample_rate", [8000, 16000, 32000])
def test_a_training_checkpoint_is_loaded_and_tells_its_rate(sample_rate: int, tmp_path: Path) -> None:
    """As published: beside the tensors lie counters, the sampler's order and the Fourier matrices."""
    network = tiny(sample_rate)
    state = network.state_dict() | {"spectrogram_extractor.stft.conv_real.weight": torch.zeros(5, 1, 8)}
    state["logmel_extractor.melW"] = state["logmel_extractor.melW"] * 1.5  # the file's bands are used
    sampler = {"indexes": np.arange(5), "pointer": np.int64(3)}
    torch.save({"iteration": 3, "model": state, "sampler": sampler}, tmp_path / "Cnn14.pth")
    loaded = PannsCnn14.from_file(tmp_path / "Cnn14.pth")
    assert (loaded.sample_rate, loaded.dim) == (sample_rate, 8)
    assert loaded.name == "panns-cnn14 (Cnn14.pth)"
    network.logmel_extractor.melW.mul_(1.5)
    x = [noise(40000)]
    assert torch.equal(loaded(x).rows, network(x).rows)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    state = tiny().state_dict()
    path = tmp_path / "w.pth"
    for key, value, message in (
        ("logmel_extractor.melW", None, "logmel_extractor.melW: no such tensor"),
        ("logmel_extractor.melW", torch.zeros(100, 64), r"mel bands of shape \(100, 64\), expected 129, 257 or 513"),
        ("fc1.bias", None, "lacks 1 tensors, first fc1.bias"),
        ("attention.weight", torch.zeros(2), "has unknown 1 tensors, first attention.weight"),
    ):
        changed = {k: v for k, v in (state | {key: value}).items() if v is not None}
        torch.save({"model": changed}, path)
        with pytest.raises(ValueError, match=message):
            PannsCnn14.from_file(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="holds no state_dict of tensors, got Tensor"):
        PannsCnn14.from_file(path)
    with pytest.raises(ValueError, match="sample_rate: got 44100"):
        PannsCnn14(44100)
