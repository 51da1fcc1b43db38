"""`OpenClipEncoder` against direct calls of open_clip."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.encoders.open_clip import OpenClipEncoder, PrepareFrames

pytest.importorskip("open_clip", reason="needs open_clip")

Encoder = Callable[[str], OpenClipEncoder]
Files = Callable[[str], Path]


def pictures(count: int = 1, size: tuple[int, int] = (90, 120), seed: int = 0) -> Tensor:
    """`(count, 3, H, W)` uint8: smooth random colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    return (255 * torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)).to(torch.uint8)


def direct(folder: Path) -> tuple[Any, Any, Any]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_preprocessing_is_open_clips_own(mode: str, tiny_models: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    folder = tiny_models.open_clip_folder(tmp_path / mode, resize_mode=mode, interpolation="bilinear")
    _, preprocess, _ = direct(folder)
    encoder = OpenClipEncoder(str(folder))
    prepare = pickle.loads(pickle.dumps(encoder.transform("image")))
    for picture in (pictures()[0], pictures(size=(33, 31), seed=1)[0], pictures(size=(20, 64), seed=2)[0]):
        pixels = prepare(picture)
        assert pixels.dtype == torch.uint8
        expected = preprocess(Image.fromarray(picture.permute(1, 2, 0).numpy()))
        assert torch.equal((pixels / 255 - encoder.mean) / encoder.std, expected)
        assert torch.equal(prepare(pixels), pixels)


def test_transforms_carry_no_weights(tiny_encoder: Encoder) -> None:
    encoder = tiny_encoder("open-clip")
    assert isinstance(encoder.transform("video"), PrepareFrames)
    assert len(pickle.dumps(encoder.transform("video"))) < 5000
    assert encoder.transform("text") is None


def test_rows_are_those_of_open_clip(tiny_encoder: Encoder, model_files: Files) -> None:
    from PIL import Image

    encoder, images, texts = tiny_encoder("open-clip"), list(pictures(3)), ["a dog barks", "rain"]
    model, preprocess, tokenizer = direct(model_files("open-clip"))
    with torch.no_grad():
        inputs = torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
        expected = model.encode_image(inputs, normalize=True)
        expected_text = model.encode_text(tokenizer(texts), normalize=True)
    assert torch.allclose(encoder.embed_image(images), expected, atol=1e-5)
    assert torch.allclose(encoder.embed_text(texts), expected_text, atol=1e-5)
    assert float(expected[0] @ expected[1]) < 0.999


def test_a_video_is_its_frames_or_their_mean(tiny_encoder: Encoder) -> None:
    encoder = tiny_encoder("open-clip")
    clips = [pictures(5), pictures(5, seed=1)]
    frames = encoder.embed_sequence("video", clips)
    assert frames.shape == (2, 5, encoder.dim)
    assert torch.allclose(frames.flatten(0, 1), encoder.embed_image([f for c in clips for f in c]), atol=1e-6)
    assert torch.allclose(frames.norm(dim=2), torch.ones(2, 5), atol=1e-5)
    pooled = encoder.embed_video([*clips, clips[0][:2]])
    mean = torch.nn.functional.normalize(torch.stack([*frames.mean(1), frames[0, :2].mean(0)]), dim=1)
    assert torch.allclose(pooled, mean, atol=1e-6)
    prepare = encoder.transform("video")
    assert prepare is not None
    assert torch.equal(pooled, encoder.embed_video([prepare(c) for c in (*clips, clips[0][:2])]))
    with pytest.raises(ValueError, match="clips of 2 to 5 frames, expected one length"):
        encoder.embed_sequence("video", [clips[0], clips[1][:2]])
    with pytest.raises(ValueError, match="gives sequences of video, got image"):
        encoder.embed_sequence("image", [])


def test_a_batch_larger_than_one_pass_equals_single_clips(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_encoder("open-clip")
    clips = [pictures(n, seed=n) for n in (3, 7, 1)]
    alone = torch.cat([encoder.embed_video([clip]) for clip in clips])
    monkeypatch.setattr("diffgap_lightning.encoders.open_clip._BATCH", 4)
    assert torch.allclose(encoder.embed_video(clips), alone, atol=1e-5)


def test_weights_and_preprocessing_decide_the_fingerprint(
    tiny_models: ModuleType, model_files: Files, tmp_path: Path
) -> None:
    base = OpenClipEncoder(str(model_files("open-clip")))
    moved = shutil.copytree(model_files("open-clip"), tmp_path / "moved")
    others = [
        tiny_models.open_clip_folder(tmp_path / "seed", seed=1),
        tiny_models.open_clip_folder(tmp_path / "squash", resize_mode="squash"),
    ]
    assert OpenClipEncoder(str(moved), fps=2.0).fingerprint == base.fingerprint
    assert len({base.fingerprint, *(OpenClipEncoder(str(folder)).fingerprint for folder in others)}) == 3


def test_a_tag_and_a_file_with_its_weights(tmp_path: Path) -> None:
    """The smallest architecture that has tags, with random weights in the file that the tag stands for."""
    import open_clip

    name, tag = "ViT-S-32", "datacompxl"
    open_clip.add_model_config(_small_config(tmp_path / name, name))
    entry = {"hf_hub": "owner/never-there/", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    table = open_clip.pretrained._PRETRAINED
    table[name] = {tag: entry}
    try:
        torch.save(open_clip.create_model(name).state_dict(), tmp_path / "w.pt")
        encoder = OpenClipEncoder(name, tag, weights=str(tmp_path / "w.pt"), check=False)
        assert encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # the tag's
        plain = OpenClipEncoder(name, str(tmp_path / "w.pt"), check=False)
        assert torch.equal(plain.embed_text(["a dog"]), encoder.embed_text(["a dog"]))
        assert plain.fingerprint != encoder.fingerprint  # not preprocessed alike
        with pytest.raises(FileNotFoundError, match=r"hf download owner/never-there.*as weights"):
            OpenClipEncoder(name, tag)
        with pytest.raises(ValueError, match=f"the tags of {name} are {tag}"):
            OpenClipEncoder(name, "no-such-tag")
        with pytest.raises(ValueError, match="a random network embeds nothing"):
            OpenClipEncoder(name, None)
    finally:
        del table[name]


def _small_config(folder: Path, name: str) -> Path:
    import json

    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def test_refusals(tiny_encoder: Encoder, model_files: Files, tmp_path: Path) -> None:
    encoder = tiny_encoder("open-clip")
    with pytest.raises(ValueError, match=r"expected uint8 RGB \(3, H, W\)"):
        encoder.embed_image([torch.rand(3, 32, 32)])
    with pytest.raises(ValueError, match=r"expected uint8 RGB \(T, 3, H, W\)"):
        encoder.embed_video([torch.zeros(0, 3, 32, 32, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="expected at least one video"):
        encoder.embed_video([])
    with pytest.raises(ValueError, match="open_clip has no 'ViT-Z'"):
        OpenClipEncoder("ViT-Z")
    folder = shutil.copytree(model_files("open-clip"), tmp_path / "no weights")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks open_clip_model.safetensors"):
        OpenClipEncoder(str(folder))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_files_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_files: Files) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").touch()
    torch.save({"x": Evil()}, "evil.pt")
    for file, words in (("empty.pt", "ViT-S-32: cannot be loaded"), ("evil.pt", "ViT-S-32: holds more than tensors")):
        with pytest.raises(ValueError, match=words):
            OpenClipEncoder("ViT-S-32", file)
    assert not Path("executed").exists()
    folder = shutil.copytree(model_files("open-clip"), tmp_path / "cut")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded.*copy them again"):
        OpenClipEncoder(str(folder))


def test_a_text_tower_of_the_hub_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    (tmp_path / "w.pt").touch()
    with pytest.raises(FileNotFoundError, match="text tower needs roberta-base in the hub cache; run `hf download"):
        OpenClipEncoder("roberta-ViT-B-32", str(tmp_path / "w.pt"))


def test_autocast_runs(tiny_encoder: Encoder) -> None:
    encoder, clips = tiny_encoder("open-clip"), [pictures(4)]
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder.embed_video(clips)
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows.numpy(), encoder.embed_video(clips).numpy(), atol=0.02)


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        ImportError, match=r"^this needs the package open_clip: pip install 'diffgap-lightning\[open-clip\]'$"
    ):
        OpenClipEncoder()
