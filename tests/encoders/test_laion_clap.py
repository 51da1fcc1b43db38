"""`LaionClapEncoder` against laion_clap's own `CLAP_Module`, and what that package gets wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffgap_lightning.encoders.laion_clap import CHECKPOINTS, LaionClapEncoder, find_checkpoint, quantise

pytestmark = pytest.mark.skipif(find_spec("laion_clap") is None, reason="needs laion_clap")

Encoder = Callable[[str], LaionClapEncoder]
Files = Callable[[str], Path]

REFERENCE = """
import sys
import numpy as np, torch
import laion_clap
from laion_clap.training import data
out = sys.argv[1]
inputs = np.load(out + "/in.npz")
for name, checkpoint in (("laion", sys.argv[2]), ("laion-fusion", sys.argv[3])):
    model = laion_clap.CLAP_Module(enable_fusion=name == "laion-fusion", device="cpu")
    model.load_ckpt(checkpoint, verbose=False)
    rows = [model.get_audio_embedding_from_data([inputs[k]], use_tensor=False)[0] for k in ("short", "full")]
    text = model.get_text_embedding(["a dog barks", "rain on a tin roof, and wind"])
    np.savez(f"{out}/{name}.npz", audio=np.stack(rows), text=text)
# np.random.choice draws the place of each piece of long audio: take the middle one
np.random.choice = lambda places: places[len(places) // 2]
sample = data.get_audio_features({}, torch.from_numpy(inputs["long"]), 480000, "fusion", "repeatpad",
                                 model.model_cfg["audio_cfg"])
np.save(out + "/mel.npy", sample["mel_fusion"].numpy())
"""


@pytest.fixture(scope="module")
def reference(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory, model_files: Files
) -> dict[str, dict[str, np.ndarray]]:
    """Inputs and outputs of the package's own class, in a process whose hub cache is a fake one."""
    home, folder = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("reference")
    tiny_models.fake_hub(home)
    generator = np.random.default_rng(0)
    sizes = {"short": 130_001, "full": 480_000, "long": 1_100_000}
    inputs = {k: (0.2 * generator.standard_normal(n)).clip(-1, 1).astype(np.float32) for k, n in sizes.items()}
    np.savez(folder / "in.npz", **inputs)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    files = [str(model_files(name)) for name in ("laion", "laion-fusion")]
    command = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(folder), *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    mel = {"mel": np.load(folder / "mel.npy")}
    return {name: inputs | mel | dict(np.load(folder / f"{name}.npz")) for name in ("laion", "laion-fusion")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laion", "laion-fusion"])
def test_rows_are_those_of_the_package(name: str, tiny_encoder: Encoder, reference: Any) -> None:
    encoder, expected = tiny_encoder(name), reference[name]
    audio = encoder.embed_audio([torch.from_numpy(expected[key]) for key in ("short", "full")])
    np.testing.assert_allclose(audio.numpy(), expected["audio"], atol=1e-5)
    text = encoder.embed_text(["a dog barks", "rain on a tin roof, and wind"])
    np.testing.assert_allclose(text.numpy(), expected["text"], atol=1e-5)


@pytest.mark.slow
def test_pieces_of_long_audio_are_the_packages_with_the_middle_place(tiny_encoder: Encoder, reference: Any) -> None:
    expected = reference["laion-fusion"]
    inputs = tiny_encoder("laion-fusion")._fused_input(torch.from_numpy(expected["long"]))
    assert bool(inputs["longer"])
    np.testing.assert_allclose(inputs["mel_fusion"][1:].numpy(), expected["mel"][1:], atol=2e-2)  # dB
    # The shrunk spectrogram is interpolated as at training time; later versions of torchvision smooth it as well.
    assert np.abs(inputs["mel_fusion"][0].numpy() - expected["mel"][0]).mean() < 5.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laion", "laion-fusion"])
def test_long_audio_is_embedded_the_same_way_every_time(
    name: str, tiny_encoder: Encoder, make_noise: Callable[..., torch.Tensor]
) -> None:
    encoder, long = tiny_encoder(name), make_noise(17.0)
    items = [long, make_noise(0.5, seed=1)]
    torch.manual_seed(0)
    first = encoder.embed_audio(items)
    torch.manual_seed(1)
    assert torch.equal(first, encoder.embed_audio(items))
    assert torch.allclose(first, torch.cat([encoder.embed_audio([x]) for x in items]), atol=1e-5)
    prepared = [encoder.transform("audio")(x) for x in items]
    assert torch.equal(first, encoder.embed_audio(prepared))
    assert all(torch.equal(encoder.transform("audio")(x), x) for x in prepared)


@pytest.mark.slow
def test_the_mean_over_windows_is_the_mean_of_their_rows(
    tiny_encoder: Encoder, make_noise: Callable[..., torch.Tensor]
) -> None:
    encoder, long = tiny_encoder("laion"), make_noise(16.0)
    rows = encoder.embed_audio([long[:480_000], long[480_000:]])
    mean = torch.nn.functional.normalize(rows.mean(0, keepdim=True), dim=1)
    assert torch.allclose(encoder.embed_audio([long]), mean, atol=1e-6)
    assert float(rows[0] @ rows[1]) < 0.999


@pytest.mark.slow
def test_first_takes_the_first_window(model_files: Files, make_noise: Callable[..., torch.Tensor]) -> None:
    encoder = LaionClapEncoder(
        str(model_files("laion")), tokenizer=str(model_files("tokenizer")), long_audio="first", check=False
    )
    long = make_noise(16.0)
    assert torch.equal(encoder.embed_audio([long]), encoder.embed_audio([long[:480_000]]))


def test_quantising_is_the_packages_own() -> None:
    x = torch.linspace(-1.2, 1.2, 10_001)
    numpy = (np.clip(x.numpy(), -1, 1) * 32767.0).astype(np.int16)
    np.testing.assert_allclose(quantise(x).numpy(), (numpy / 32767.0).astype(np.float32), atol=1e-7)


@pytest.mark.slow
def test_loads_with_and_without_position_ids_and_from_safetensors(
    model_files: Files, tiny_models: ModuleType, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    tokenizer = str(model_files("tokenizer"))
    record = torch.load(model_files("laion"), weights_only=False)
    state = record["state_dict"]
    assert "module.text_branch.embeddings.position_ids" in state
    without = {k: v.clone() for k, v in state.items() if not k.endswith("position_ids")}
    torch.save(record | {"state_dict": without}, tmp_path / "without.pt")
    save_file({k.removeprefix("module."): v.contiguous() for k, v in without.items()}, tmp_path / "plain.safetensors")
    torch.save(without, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    paths = [model_files("laion"), tmp_path / "without.pt", tmp_path / "plain.safetensors", tmp_path / "old.pt"]
    encoders = [LaionClapEncoder(str(path), tokenizer=tokenizer, check=False) for path in paths]
    assert len({encoder.fingerprint for encoder in encoders}) == 1
    rows = [encoder.embed_text(["a dog barks"]) for encoder in encoders]
    assert all(torch.equal(rows[0], row) for row in rows)


@pytest.mark.slow
def test_weights_decide_the_fingerprint(model_files: Files, tiny_encoder: Encoder, tmp_path: Path) -> None:
    tiny_encoder("laion")
    record = torch.load(model_files("laion"), weights_only=False)
    record["state_dict"]["module.text_projection.0.bias"][0] += 1e-3
    torch.save(record, tmp_path / "changed.pt")
    changed = LaionClapEncoder(str(tmp_path / "changed.pt"), tokenizer=str(model_files("tokenizer")), check=False)
    assert changed.fingerprint != tiny_encoder("laion").fingerprint
    assert changed.fingerprint.split("/")[1] == "HTSAT-tiny"
    assert tiny_encoder("laion-fusion").fingerprint.split("/")[1] == "HTSAT-tiny-fusion"


@pytest.mark.slow
def test_a_base_model_and_fusion_are_recognised(model_files: Files, tiny_models: ModuleType, tmp_path: Path) -> None:
    path = tiny_models.laion_checkpoint(tmp_path / "music.pt", "HTSAT-base")
    encoder = LaionClapEncoder(str(path), tokenizer=str(model_files("tokenizer")), check=False)
    assert encoder.fingerprint.startswith("laion-clap/HTSAT-base/sha256:")
    with pytest.raises(ValueError, match="has no feature fusion, got fusion=True"):
        LaionClapEncoder(str(path), fusion=True, tokenizer=str(model_files("tokenizer")))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_run(
    model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: ModuleType
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "optimizer": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"would run code when loaded.*weights_only=False"):
        LaionClapEncoder(str(tmp_path / "evil.pt"), tokenizer=str(model_files("tokenizer")))
    assert not (tmp_path / "executed").exists()


def test_the_broken_tokenizer_is_caught(model_files: Files, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    (broken / "vocab.json").write_text(json.dumps(special))
    (broken / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocabulary is 5 tokens, expected 261 tokens.*vocab.json"):
        LaionClapEncoder(str(model_files("laion")), tokenizer=str(broken), check=False)
    (broken / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer.json or vocab.json"):
        LaionClapEncoder(str(model_files("laion")), tokenizer=str(broken))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_names_are_found_in_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"https://huggingface.co/lukewys/laion_clap/resolve/main/{name}.pt"):
        find_checkpoint(name, str(tmp_path))
    (tmp_path / f"{name}.pt").touch()
    assert find_checkpoint(name, str(tmp_path)) == tmp_path / f"{name}.pt"
    with pytest.raises(FileNotFoundError, match="published ones are 630k-best, "):
        find_checkpoint("630k-worst", str(tmp_path))


@pytest.mark.slow
def test_published_names_are_found_in_the_hub_cache(tiny_models: ModuleType, tmp_path: Path) -> None:
    snapshot = tiny_models.hub_snapshot(tmp_path, "lukewys/laion_clap")
    (snapshot / "630k-best.pt").write_bytes(b"x")
    code = "from diffgap_lightning.encoders.laion_clap import find_checkpoint; print(find_checkpoint('630k-best'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(snapshot / "630k-best.pt"), found.stderr[-500:]


def test_refusals(tiny_encoder: Encoder) -> None:
    encoder = tiny_encoder("laion")
    with pytest.raises(ValueError, match="got no waveform"):
        encoder.embed_audio([])
    with pytest.raises(ValueError, match=r"got shape \(2, 480000\), expected \(T,\), mono"):
        encoder.embed_audio([torch.zeros(2, 480_000)])
    with pytest.raises(ValueError, match="text 1 is empty"):
        encoder.embed_text(["a", " "])
    with pytest.raises(TypeError, match="one string"):
        encoder.embed_text("a dog")
    with pytest.raises(ValueError, match="embeds audio, text, got video"):
        encoder.embed("video", [])


@pytest.mark.slow
def test_audio_runs_where_its_weights_are(tiny_encoder: Encoder, make_noise: Callable[..., torch.Tensor]) -> None:
    """The meta device computes nothing, but refuses operations that mix devices, as a GPU does."""
    import copy

    encoder = copy.deepcopy(tiny_encoder("laion")).to("meta")
    assert encoder.embed_audio([make_noise(1.0)]).device.type == "meta"


@pytest.mark.slow
def test_it_needs_no_network_and_no_import_of_the_package(model_files: Files) -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from diffgap_lightning.encoders.laion_clap import LaionClapEncoder\n"
        "e = LaionClapEncoder(sys.argv[1], tokenizer=sys.argv[2])\n"
        "assert 'laion_clap' not in sys.modules\n"
        "print(e.embed_text(['a dog']).shape)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-W", "ignore", "-c", code, str(model_files("laion")), str(model_files("tokenizer"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch, model_files: Files) -> None:
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    started = time.process_time()
    with pytest.raises(
        ImportError, match=r"^this needs the package laion_clap: pip install 'diffgap-lightning\[laion-clap\]'$"
    ):
        LaionClapEncoder("630k-best")
    assert time.process_time() - started < 5
