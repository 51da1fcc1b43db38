from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.catalog import read_catalog
from diffgap_lightning.data.media import MediaLimits
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.embedding.corpus import CatalogCorpus, RawCorpus
from diffgap_lightning.embedding.decode import EmbedSettings
from diffgap_lightning.embedding.engine import cluster_options, embed_corpus
from diffgap_lightning.embedding.merge import EmbedSummary
from diffgap_lightning.encoders.hashing import HashingEncoder

pytest.importorskip("soundfile")
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't infer", "ignore:.*treespec")
Make = Callable[..., Path]
RATE = 8000
OPTIONS: dict[str, Any] = {"progress": False, "trainer_options": {"accelerator": "cpu", "devices": 1}}


def encoder(**options: Any) -> HashingEncoder:
    return HashingEncoder(**{"dim": 16, "sample_rate": RATE, "window": 2.0, **options})


class CountingEncoder(HashingEncoder):
    """Remembers the texts that it embedded."""

    def __init__(self) -> None:
        super().__init__(dim=16, sample_rate=RATE)
        self.seen: list[str] = []

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.seen += texts
        return super().embed_text(texts)


@pytest.fixture
def corpus(tmp_path: Path, make_audio: Make) -> CatalogCorpus:
    """Seven clips: five good ones (one of 5 s), one broken, one missing; two captions each."""
    rows = []
    for i in range(5):
        make_audio(
            tmp_path / "media" / f"{i}.wav", seconds=5.0 if i == 4 else 1.0 + 0.1 * i, sample_rate=RATE, hz=200 + 90 * i
        )
    (tmp_path / "media" / "5.wav").write_bytes(b"RIFF but no audio" * 9)
    for i in range(7):
        rows.append({"id": f"clip{i}", "audio": f"{i}.wav", "text": [f"sound {i}", f"noise number {i}"]})
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return CatalogCorpus(read_catalog(path, tmp_path / "media"), part_size=3)


def settings(**options: Any) -> EmbedSettings:
    return EmbedSettings(**{"modalities": ("audio", "text"), "window": 2.0, **options})


def test_rows_are_those_of_the_encoder_and_bad_files_are_counted(corpus: CatalogCorpus, tmp_path: Path) -> None:
    summary = embed_corpus(corpus, encoder(), tmp_path / "out", settings(), kind="rows", dtype="float32", **OPTIONS)
    assert summary is not None
    assert (summary.clips, summary.embedded) == (7, 5)
    assert summary.rows == {"audio": 4 + 3, "text": 10}  # 5 s are windows [0, 2), [2, 4), [4, 5)
    assert summary.skipped == {"audio: cannot open audio: Format not recognised.": 1, "audio: file not found": 1}
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["id"], Path(s["path"]).name) for s in listed] == [("clip5", "5.wav"), ("clip6", "6.wav")]
    assert EmbedSummary.read(tmp_path / "out") == summary
    assert not (tmp_path / "out.parts").exists()
    assert verify_shards(tmp_path / "out") == []

    table = read_embedding_shards(tmp_path / "out")
    assert table.encoder == encoder().fingerprint
    texts = {name: row for name, row in zip(table.columns["text_caption"], table.embeddings["text"], strict=True)}
    expected = encoder().embed_text(["sound 3", "noise number 0"])
    assert torch.allclose(torch.stack([texts["sound 3"], texts["noise number 0"]]), expected, atol=1e-6)
    names = table.names["audio"].tolist()
    assert sorted(names) == sorted(["clip0", "clip1", "clip2", "clip3", *["clip4"] * 3])
    starts = [s for s, n in zip(table.columns["audio_start"].tolist(), names, strict=True) if n == "clip4"]
    assert sorted(starts) == [0.0, 2.0, 4.0]


def test_pairs_hold_every_caption_of_a_clip(corpus: CatalogCorpus, tmp_path: Path) -> None:
    summary = embed_corpus(corpus, encoder(), tmp_path / "out", settings(), **OPTIONS)
    assert summary is not None
    assert summary.pairs == 2 * (4 + 3)
    manifest = open_shards(tmp_path / "out").manifest
    assert (manifest.kind, manifest.dtype, manifest.num_rows) == ("pairs", "float16", {"audio": 14, "text": 14})


@pytest.mark.parametrize(("windows", "rows"), [("all", 7), ("mean", 5), ("first", 5)])
def test_windows(corpus: CatalogCorpus, tmp_path: Path, windows: str, rows: int) -> None:
    out = tmp_path / "out"
    summary = embed_corpus(corpus, encoder(), out, settings(windows=windows), kind="rows", dtype="float32", **OPTIONS)
    assert summary is not None
    assert summary.rows["audio"] == rows
    table = read_embedding_shards(out)
    row = table.embeddings["audio"][table.names["audio"].tolist().index("clip4")]
    clip = corpus.catalog.clips[4].audio
    assert clip is not None
    ((_, whole),) = audio_windows(clip, RATE)
    cut = encoder().embed_audio([whole[: 2 * RATE], whole[2 * RATE : 4 * RATE], whole[4 * RATE :]])
    expected = {"all": cut[0], "first": cut[0], "mean": torch.nn.functional.normalize(cut.sum(0), dim=0)}[windows]
    assert torch.allclose(row, expected, atol=1e-5)


def test_workers_batch_sizes_and_raw_tars_give_the_same_rows(corpus: CatalogCorpus, tmp_path: Path) -> None:
    first = tmp_path / "a"
    embed_corpus(corpus, encoder(), first, settings(), **OPTIONS)
    second = tmp_path / "b"
    embed_corpus(corpus, encoder(), second, settings(), batch_size=2, num_workers=2, **OPTIONS)
    assert (first / "manifest.json").read_text() == (second / "manifest.json").read_text()

    with tarfile.open(tmp_path / "raw.tar", "w") as tar:
        for clip in corpus.catalog.clips[:6]:
            assert clip.audio is not None
            data = {"wav": Path(str(clip.audio.source)).read_bytes(), "json": json.dumps({"text": clip.texts}).encode()}
            for extension, content in data.items():
                info = tarfile.TarInfo(f"{clip.id}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    summary = embed_corpus(RawCorpus(tmp_path / "raw.tar"), encoder(), tmp_path / "c", settings(), **OPTIONS)
    assert summary is not None
    assert (summary.clips, summary.embedded, summary.pairs) == (6, 5, 14)
    tables = [read_embedding_shards(folder) for folder in (first, tmp_path / "c")]
    rows = [
        {n.removeprefix("raw/"): e for n, e in zip(t.names["audio"], t.embeddings["audio"], strict=True)}
        for t in tables
    ]
    assert rows[0].keys() == rows[1].keys()
    for name in ("clip0", "clip3"):
        assert torch.equal(rows[0][name], rows[1][name])


def test_mixed_precision_gives_unit_rows_near_those_of_float32(corpus: CatalogCorpus, tmp_path: Path) -> None:
    tables = {}
    for precision in ("32-true", "bf16-mixed"):
        options = {"progress": False, "trainer_options": {"accelerator": "cpu", "devices": 1, "precision": precision}}
        embed_corpus(corpus, encoder(), tmp_path / precision, settings(), kind="rows", dtype="float32", **options)
        tables[precision] = read_embedding_shards(tmp_path / precision)
    exact, mixed = (t.embeddings["audio"] for t in tables.values())
    assert not torch.equal(exact, mixed)  # it was on
    assert torch.allclose(mixed.norm(dim=1), torch.ones(len(mixed)), atol=1e-5)
    assert (exact * mixed).sum(dim=1).min() > 0.999


def test_finished_parts_are_not_embedded_again(
    corpus: CatalogCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*args: Any, **options: Any) -> None:
        raise KeyError("stopped before the shards")

    text = settings(modalities=("text",))
    with monkeypatch.context() as patch:
        patch.setattr("diffgap_lightning.embedding.engine.finish", stop)
        with pytest.raises(KeyError):
            embed_corpus(corpus, CountingEncoder(), out, text, **OPTIONS)
    assert not out.exists()
    parts = out.with_name("out.parts")
    assert len(list(parts.glob("part-*.json"))) == 3
    (parts / "part-0000001.json").unlink()  # as if killed between a part's rows and its record
    (parts / ".part-0000001.npz.x.tmp").write_bytes(b"half")
    again = CountingEncoder()
    summary = embed_corpus(corpus, again, out, text, **OPTIONS)
    assert sorted(again.seen) == sorted(t for i in (3, 4, 5) for t in (f"sound {i}", f"noise number {i}"))
    assert summary is not None
    assert summary.rows == {"text": 14}
    assert not parts.exists()


def test_nothing_left_but_the_shards(corpus: CatalogCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, text, done = tmp_path / "out", settings(modalities=("text",)), CountingEncoder()
    with monkeypatch.context() as patch:
        patch.setattr("diffgap_lightning.embedding.merge.PartStore.remove", lambda self: None)
        summary = embed_corpus(corpus, encoder(), out, text, **OPTIONS)  # killed after the shards, before the parts go
    assert summary is not None
    assert out.with_name("out.parts").is_dir()
    again = embed_corpus(corpus, done, out, text, **OPTIONS)
    assert again is not None
    assert dataclasses.replace(again, seconds=summary.seconds) == summary
    assert not out.with_name("out.parts").exists()
    assert embed_corpus(corpus, done, out, text, **OPTIONS) == again  # complete: not even Lightning starts
    assert done.seen == []


def test_another_runs_folder_is_refused(corpus: CatalogCorpus, tmp_path: Path) -> None:
    out, text = tmp_path / "out", settings(modalities=("text",))
    embed_corpus(corpus, encoder(), out, text, **OPTIONS)
    with pytest.raises(ValueError, match=r"holds another run \(encoder: 'hashing/dim16.*' there, 'hashing/dim8"):
        embed_corpus(corpus, encoder(dim=8), out, text, **OPTIONS)
    summary = embed_corpus(corpus, encoder(dim=8), out, text, overwrite=True, **OPTIONS)
    assert summary is not None
    assert open_shards(out).manifest.dims == {"text": 8}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds shards that no `diffgap embed` wrote"):
        embed_corpus(corpus, encoder(), tmp_path / "other", text, **OPTIONS)


def test_nan_from_the_encoder_is_a_skip(corpus: CatalogCorpus, tmp_path: Path) -> None:
    class Failing(HashingEncoder):
        def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
            rows = super().embed_text(texts)
            rows[[i for i, text in enumerate(texts) if "2" in text]] = float("nan")
            rows[[i for i, text in enumerate(texts) if "3" in text]] = 0.0
            return rows

    summary = embed_corpus(corpus, Failing(dim=8), tmp_path / "out", settings(modalities=("text",)), **OPTIONS)
    assert summary is not None
    assert (summary.embedded, summary.rows) == (5, {"text": 10})
    assert summary.skipped == {"text: the encoder gave NaN or a zero vector": 2}


def test_nothing_embedded_is_an_error_that_says_why(corpus: CatalogCorpus, tmp_path: Path) -> None:
    short = settings(limits=MediaLimits(max_seconds=0.5))
    with pytest.raises(
        ValueError, match=r"none of 7 clips could be embedded; most often: audio: longer than # s \(5\)"
    ):
        embed_corpus(corpus, encoder(), tmp_path / "out", short, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_template_and_no_strings(corpus: CatalogCorpus, tmp_path: Path) -> None:
    plain = settings(modalities=("text",), template="This is a {}.")
    embed_corpus(corpus, encoder(), tmp_path / "out", plain, strings=False, dtype="float32", **OPTIONS)
    table = read_embedding_shards(tmp_path / "out")
    assert (table.names, table.columns) == ({}, {})
    distance = torch.cdist(encoder().embed_text(["This is a sound 0."]), table.embeddings["text"])
    assert distance.min() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": "some"}, "windows: got 'some'"),
        ({"template": "x"}, "template: got 'x'"),
        ({"window": -1.0}, "window: got -1.0 s"),
        ({"modalities": ()}, "modalities: none"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_wrong_modalities_and_kind(corpus: CatalogCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HashingEncoder embeds audio, text, video, got image"):
        embed_corpus(corpus, encoder(), tmp_path / "out", settings(modalities=("image",)), **OPTIONS)
    with pytest.raises(ValueError, match="kind 'pairs' needs two modalities"):
        embed_corpus(corpus, encoder(), tmp_path / "out", settings(modalities=("text",)), kind="pairs", **OPTIONS)


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert cluster_options(3) == {"devices": 3}
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert cluster_options() == {"devices": 8, "num_nodes": 2, "strategy": "ddp"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert cluster_options(1) == {"devices": 4, "num_nodes": 3, "strategy": "ddp"}
