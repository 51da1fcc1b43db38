from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffgap_lightning.evaluation.vggish import PATCH, VGGish, mel_matrix


@pytest.fixture
def tiny() -> VGGish:
    torch.manual_seed(0)
    return VGGish(channels=(3, 4, 5, 6, 7, 8), hidden=10, dim=12).eval()


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_mel_bands_are_those_of_an_independent_implementation() -> None:
    utils = pytest.importorskip("transformers.audio_utils", reason="the reference for the mel bands")
    theirs = utils.mel_filter_bank(
        257, 64, 125.0, 7500.0, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    assert mel_matrix().numpy() == pytest.approx(theirs, abs=1e-6)


def test_patches_are_those_of_the_loop_over_frames() -> None:
    """A 25 ms window every 10 ms, magnitudes of a 512-point transform, log(mel + 0.01), 96 frames a patch."""
    x = noise(16000 * 2 + 321)
    frames = [x[k * 160 : k * 160 + 400].double().numpy() for k in range(1 + (len(x) - 400) // 160)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    log_mel = np.stack([np.log(np.abs(np.fft.rfft(f * window, 512)) @ mel_matrix().numpy() + 0.01) for f in frames])
    patches = VGGish(channels=(1,) * 6, hidden=1).patches(x)
    assert patches.shape == (2, 96, 64)
    assert patches.reshape(-1, 64).numpy() == pytest.approx(log_mel[: 2 * PATCH], abs=1e-5)


def test_one_row_for_each_patch_and_clips_do_not_depend_on_each_other(tiny: VGGish) -> None:
    clips = [noise(16000, 1), noise(5 * 16000, 2), noise(2 * 16000, 3)]
    together = tiny(clips)
    assert together.counts == [1, 5, 2]
    assert together.rows.shape == (8, 12)
    assert together.logits is None
    alone = torch.cat([tiny([clip]).rows for clip in clips])
    assert torch.allclose(together.rows, alone, atol=1e-6)


def test_the_last_layer_has_no_activation_and_features_are_flattened_channels_last(tiny: VGGish) -> None:
    x = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0))
    h = x[:, None]
    for i, layer in enumerate(tiny.features):
        if isinstance(layer, nn.Conv2d):
            h = torch.relu(nn.functional.conv2d(h, layer.weight, layer.bias, padding=1))
            h = nn.functional.max_pool2d(h, 2) if i in (0, 3, 8, 13) else h
    flat = torch.stack([h[:, :, i, j] for i in range(6) for j in range(4)], dim=1).flatten(1)
    w = tiny.state_dict()
    for i in (0, 2):
        flat = torch.relu(flat @ w[f"embeddings.{i}.weight"].T + w[f"embeddings.{i}.bias"])
    expected = flat @ w["embeddings.4.weight"].T + w["embeddings.4.bias"]
    with torch.no_grad():
        assert torch.allclose(tiny.network(x), expected, atol=1e-5)
    assert (expected < 0).any()


def test_the_shortest_clip_is_one_patch(tiny: VGGish) -> None:
    shortest = round(tiny.min_seconds * 16000)
    assert tiny([noise(shortest)]).counts == [1]
    with pytest.raises(ValueError, match=r"expected at least 0.975 s"):
        tiny([noise(shortest - 1)])


def test_the_full_network_has_the_keys_and_shapes_of_the_public_checkpoint() -> None:
    with torch.device("meta"):
        state = VGGish().state_dict()
    convolutions = {0: (64, 1), 3: (128, 64), 6: (256, 128), 8: (256, 256), 11: (512, 256), 13: (512, 512)}
    linear = {0: (4096, 12288), 2: (4096, 4096), 4: (128, 4096)}
    expected = {f"features.{i}.weight": (*shape, 3, 3) for i, shape in convolutions.items()}
    expected |= {f"embeddings.{i}.weight": shape for i, shape in linear.items()}
    expected |= {key.replace("weight", "bias"): shape[:1] for key, shape in expected.items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_loaded_with_its_own_widths(tiny: VGGish, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vggish{suffix}"
    if suffix == ".pth":
        torch.save(tiny.state_dict() | {"classifier.0.weight": torch.zeros(3)}, path)
    else:
        from safetensors.torch import save_file

        save_file(tiny.state_dict(), path)
    loaded = VGGish.from_file(path)
    assert loaded.name == f"vggish (vggish{suffix})"
    assert len(loaded.sha256) == 64
    assert not loaded.training
    assert torch.equal(loaded([noise(16000)]).rows, tiny([noise(16000)]).rows)


def test_wrong_files_are_refused_by_name(tiny: VGGish, tmp_path: Path) -> None:
    state = tiny.state_dict()
    path = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match=r"w\.pth: no such file"):
        VGGish.from_file(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"w\.pth"):
        VGGish.from_file(path)
    for change, message in (
        ({"fc1.weight": torch.zeros(2)}, "has unknown 1 tensors, first fc1.weight"),
        ({"embeddings.2.bias": torch.zeros(3)}, "has other shapes of 1 tensors, first embeddings.2.bias"),
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=message):
            VGGish.from_file(path)
    for key, message in (("features.0.bias", "lacks 1 tensors"), ("features.0.weight", "features.0.weight: no such")):
        torch.save({k: v for k, v in state.items() if k != key}, path)
        with pytest.raises(ValueError, match=message):
            VGGish.from_file(path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_that_would_run_code_is_refused(tiny: VGGish, tmp_path: Path, capsys) -> None:
    torch.save(tiny.state_dict() | {"extra": Payload()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: holds more than tensors .*would run code"):
        VGGish.from_file(tmp_path / "w.pth")
    assert "executed" not in capsys.readouterr().out
