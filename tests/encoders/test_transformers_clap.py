"""`TransformersClapEncoder` against direct calls of `ClapModel`, and what its feature extractor leaves to chance."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffgap_lightning.encoders.transformers_clap import TransformersClapEncoder, _pooled

transformers = pytest.importorskip("transformers", reason="needs transformers")

Encoder = Callable[[str], TransformersClapEncoder]
Files = Callable[[str], Path]


def direct(folder: Path, waveforms: list[torch.Tensor], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by the documented calls; each waveform on its own, because the extractor marks a random one as long."""
    model = transformers.ClapModel.from_pretrained(folder).eval()
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = []
        for x in waveforms:
            inputs = extractor(x.numpy(), sampling_rate=48000, return_tensors="pt")
            inputs["is_longer"] = torch.tensor([[len(x) > 480_000]])
            rows.append(_pooled(model.get_audio_features(**inputs)))
        text = _pooled(model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")))
    return torch.cat(rows), text


@pytest.mark.parametrize("name", ["clap", "clap-fusion"])
def test_rows_are_those_of_the_model(
    name: str, tiny_encoder: Encoder, model_files: Files, make_noise: Callable[..., torch.Tensor]
) -> None:
    encoder = tiny_encoder(name)
    waveforms, texts = [make_noise(3.3), make_noise(10.0, seed=1)], ["a dog barks", "rain on a tin roof, and wind"]
    audio, text = direct(model_files(name), waveforms, texts)
    assert torch.allclose(encoder.embed_audio(waveforms), audio, atol=1e-5)
    assert torch.allclose(encoder.embed_text(texts), text, atol=1e-5)
    assert float(audio[0] @ audio[1]) < 0.9999  # else the comparison says nothing


def test_long_audio_of_a_fused_model_is_the_models_with_the_middle_places(
    tiny_encoder: Encoder,
    model_files: Files,
    make_noise: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    long = make_noise(23.0)
    audio, _ = direct(model_files("clap-fusion"), [long], ["a"])
    assert torch.allclose(tiny_encoder("clap-fusion").embed_audio([long]), audio, atol=1e-5)


@pytest.mark.parametrize("name", ["clap", "clap-fusion"])
def test_rows_do_not_depend_on_chance_or_neighbours(
    name: str, tiny_encoder: Encoder, make_noise: Callable[..., torch.Tensor]
) -> None:
    encoder = tiny_encoder(name)
    items = [make_noise(27.0), make_noise(0.2, seed=1), make_noise(10.004, seed=2)]
    rows = encoder.embed_audio(items)
    assert rows.shape == (3, encoder.dim)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(rows, encoder.embed_audio(items))
    assert torch.allclose(rows, torch.cat([encoder.embed_audio([x]) for x in items]), atol=1e-5)
    prepare = pickle.loads(pickle.dumps(encoder.transform("audio")))
    assert torch.equal(rows, encoder.embed_audio([prepare(x) for x in items]))


def test_long_audio_is_the_mean_of_its_windows_or_the_first(
    tiny_encoder: Encoder, model_files: Files, make_noise: Callable[..., torch.Tensor]
) -> None:
    long = make_noise(25.0)  # windows of 10 s, 10 s and 5 s
    encoder, first = tiny_encoder("clap"), TransformersClapEncoder(str(model_files("clap")), long_audio="first")
    rows = encoder.embed_audio(list(long.split(480_000)))
    mean = torch.nn.functional.normalize(rows.mean(0, keepdim=True), dim=1)
    assert torch.allclose(encoder.embed_audio([long]), mean, atol=1e-6)
    assert torch.allclose(first.embed_audio([long]), rows[:1], atol=1e-6)
    with pytest.raises(ValueError, match="long_audio: got 'random'"):
        TransformersClapEncoder(str(model_files("clap")), long_audio="random")  # type: ignore[arg-type]


def test_features_of_version_4_and_5_are_taken() -> None:
    rows = torch.rand(2, 4)
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=rows)
    assert torch.equal(_pooled(rows), rows)
    assert torch.equal(_pooled(output), rows)


def test_half_precision_weights_are_used_in_full(model_files: Files, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_files("clap"), tmp_path / "half")
    model = transformers.ClapModel.from_pretrained(folder).half()
    model.save_pretrained(folder)
    encoder = TransformersClapEncoder(str(folder))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder.embed_text(["a dog"]).dtype == torch.float32


def test_the_hub_cache_and_revisions(
    tiny_models: ModuleType, model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    hub = pytest.importorskip("huggingface_hub")
    for revision, seed in (("main", 0), ("v2", 1)):
        snapshot = tiny_models.hub_snapshot(tmp_path, f"owner/tiny-{revision}")
        tiny_models.transformers_clap(snapshot, seed=seed)
        shutil.copytree(snapshot, tmp_path / "hub" / "models--owner--tiny" / "snapshots" / f"{seed:040x}")
        reference = tmp_path / "hub" / "models--owner--tiny" / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(f"{seed:040x}")
    snapshots = hub.snapshot_download
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: snapshots(*a, **k | {"cache_dir": tmp_path / "hub"}))
    newest, second = (TransformersClapEncoder("owner/tiny", revision=r) for r in (None, "v2"))
    assert newest.fingerprint == TransformersClapEncoder(str(model_files("clap"))).fingerprint
    assert second.fingerprint != newest.fingerprint
    with pytest.raises(FileNotFoundError, match=r"owner/tiny: .*config.json.* not in the hub cache; run `hf download"):
        TransformersClapEncoder("owner/tiny", revision="v3")


def test_nothing_is_fetched_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download laion/never-there.*download=True"):
        TransformersClapEncoder("laion/never-there")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        TransformersClapEncoder("laion/never-there", download=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TransformersClapEncoder(str(tmp_path / "nowhere"))


def test_pickles_are_refused_unless_allowed(model_files: Files, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_files("clap"), tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    model = transformers.ClapModel.from_pretrained(model_files("clap"))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors or"):
        TransformersClapEncoder(str(folder))
    encoder = TransformersClapEncoder(str(folder), safetensors_only=False)
    assert encoder.fingerprint == TransformersClapEncoder(str(model_files("clap"))).fingerprint


def test_the_broken_tokenizer_and_other_models_are_caught(model_files: Files, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_files("clap"), tmp_path / "broken")
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    (folder / "vocab.json").write_text(json.dumps(special))
    with pytest.raises(ValueError, match="vocabulary is 5 tokens, expected 261 tokens"):
        TransformersClapEncoder(str(folder), check=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="type bert, expected clap"):
        TransformersClapEncoder(str(folder))


def test_truncated_weights_are_one_error(model_files: Files, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_files("clap"), tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be loaded.*copy them again"):
        TransformersClapEncoder(str(folder))


def test_autocast_runs(tiny_encoder: Encoder, make_noise: Callable[..., torch.Tensor]) -> None:
    for name in ("clap", "clap-fusion"):
        encoder, items = tiny_encoder(name), [make_noise(13.0), make_noise(1.0, seed=1)]
        with torch.autocast("cpu", torch.bfloat16):
            rows = encoder.embed_audio(items)
        assert rows.dtype == torch.float32
        assert float((rows * encoder.embed_audio(items)).sum(1).min()) > 0.99


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"^this needs the package transformers: pip install 'diffgap-lightning\[transformers\]'$"
    ):
        TransformersClapEncoder()
