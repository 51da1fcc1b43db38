from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.evaluation.captions import read_captions
from diffgap_lightning.evaluation.clip_folder import ClipFolder, extract
from diffgap_lightning.evaluation.encoder_features import EncoderFeatures
from diffgap_lightning.evaluation.generation import evaluate_folders
from diffgap_lightning.evaluation.panns import PannsCnn14
from diffgap_lightning.evaluation.vggish import VGGish
from diffgap_lightning.functional.frechet import frechet_distance
from diffgap_lightning.functional.generation import inception_score, kernel_audio_distance, kl_divergences

soundfile = pytest.importorskip("soundfile", reason="writes and reads the clips")
pytest.importorskip("torchaudio", reason="resamples the clips")


def write(folder: Path, names: list[str], seed: int, sample_rate: int = 16000, seconds: float = 2.0) -> Path:
    """Clips of coloured noise; a different colour for each seed."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.standard_normal(round(seconds * sample_rate) + seed)
        smooth = np.convolve(noise, np.ones(1 + seed % 7) / (1 + seed % 7), mode="same")
        soundfile.write(path, 0.2 * smooth, sample_rate)
    return folder


@pytest.fixture(scope="module")
def extractors() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    panns = PannsCnn14(16000, (4, 4, 8, 8, 16, 32), classes=11).eval()
    panns.bn0.running_mean.fill_(-30)  # decibels
    panns.bn0.running_var.fill_(100)
    for parameter in panns.parameters():  # classes that differ from clip to clip
        parameter.data.mul_(2.5 if parameter.ndim == 4 else 1)
    panns.fc_audioset.weight.data.mul_(300)
    return {
        "vggish": VGGish(channels=(2, 2, 4, 4, 4, 4), hidden=16, dim=5).eval(),
        "panns": panns,
        "encoder": EncoderFeatures(HashingEncoder()),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("clips")
    names = [f"{i:02d}" for i in range(24)]
    return write(root / "generated", names, 3, 8000), write(root / "reference", names, 1)


def by_metric(report) -> dict[str, dict]:
    return {(r["metric"], r["extractor"]): r for r in report.records}


def test_every_figure_is_that_of_its_function_on_the_extractors_rows(extractors, folders) -> None:
    captions = {f"{i:02d}": [f"noise number {i}", "a hiss"] for i in range(24)}
    report = evaluate_folders(*folders, list(extractors.values()), captions=captions)
    found = by_metric(report)
    assert not report.skipped
    assert not report.failures
    names = {key: e.name for key, e in extractors.items()}
    assert set(found) == {
        *((m, names["vggish"]) for m in ("fad", "kad")),
        *((m, names["panns"]) for m in ("fd", "kad", "kl", "is")),
        *((m, names["encoder"]) for m in ("fd", "kad", "clap")),
    }
    rows = {k: [extract(ClipFolder.open(f), e).features for f in folders] for k, e in extractors.items()}
    for key, metric in (("vggish", "fad"), ("panns", "fd"), ("encoder", "fd")):
        x, y = (features.rows.double() for features in rows[key])
        assert found[metric, names[key]]["value"] == pytest.approx(frechet_distance(x, y))
        assert found["kad", names[key]]["value"] == pytest.approx(kernel_audio_distance(x, y))
    record = found["fad", names["vggish"]]
    assert (record["n_generated"], record["n_reference"]) == (48, 48)  # two seconds a clip
    left, right = (features.logits for features in rows["panns"])
    assert found["kl", names["panns"]]["value"] == pytest.approx(kl_divergences(left, right).mean().item())
    assert found["is", names["panns"]]["value"] == pytest.approx(inception_score(left)[0])
    encoder = extractors["encoder"].encoder
    cosines = [
        float(row @ text)
        for i, row in enumerate(rows["encoder"][0].rows)
        for text in encoder.embed_text(captions[f"{i:02d}"])
    ]
    clap = found["clap", names["encoder"]]
    assert clap["value"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert clap["ci"][0] < clap["value"] < clap["ci"][1]
    json.dumps(report.records, allow_nan=False)


def test_a_folder_against_itself(extractors, folders) -> None:
    report = evaluate_folders(folders[1], folders[1], [extractors["vggish"], extractors["panns"]])
    values = {r["metric"]: r["value"] for r in report.records if r["metric"] != "kad"}
    assert values["fad"] == pytest.approx(0, abs=1e-9)
    assert values["fd"] == pytest.approx(0, abs=1e-9)
    assert values["kl"] == pytest.approx(0, abs=11 * 1e-6)


def test_fewer_clips_than_dimensions_get_a_figure_and_a_warning(extractors, folders, tmp_path) -> None:
    few = write(tmp_path / "few", ["a", "b", "c"], 5)
    records = evaluate_folders(few, folders[1], [extractors["encoder"]], metrics=["fd", "kad"]).records
    assert np.isfinite([r["value"] for r in records]).all()
    assert records[0]["note"].startswith("3 rows <= 64 dimensions: biased upwards")
    assert records[1]["note"] == ""


def test_without_a_reference_inception_and_clap_score_remain(extractors, folders) -> None:
    captions = {f"{i:02d}": ["x"] for i in range(24)}
    report = evaluate_folders(folders[0], None, list(extractors.values()), captions=captions)
    assert {r["metric"] for r in report.records} == {"is", "clap"}
    assert report.skipped == dict.fromkeys(("fad", "fd", "kad", "kl"), "needs a reference folder")


def test_what_cannot_be_had_is_left_out_with_its_reason_or_refused_when_asked_for(extractors, folders) -> None:
    report = evaluate_folders(*folders, [extractors["vggish"]])
    assert {r["metric"] for r in report.records} == {"fad", "kad"}
    assert report.skipped["kl"] == "needs a classifier such as PANNs"
    assert report.skipped["clap"] == "needs an encoder of audio and text"
    with pytest.raises(ValueError, match="kl: needs a classifier such as PANNs"):
        evaluate_folders(*folders, [extractors["vggish"]], metrics=["fad", "kl"])
    with pytest.raises(ValueError, match="clap: needs captions"):
        evaluate_folders(*folders, list(extractors.values()), metrics=["clap"])
    with pytest.raises(ValueError, match="metrics: got 'fid', expected some of fad, fd"):
        evaluate_folders(*folders, [extractors["vggish"]], metrics=["fid"])
    with pytest.raises(ValueError, match="is: 24 clips for 13 splits, expected at least 26"):
        evaluate_folders(*folders, [extractors["panns"]], metrics=["is"], splits=13)


def test_a_folder_of_one_clip_is_refused_with_a_reason(extractors, folders, tmp_path) -> None:
    one = write(tmp_path / "one", ["a"], 1)
    for pair in ((one, folders[1]), (folders[0], one)):
        with pytest.raises(ValueError, match=r"one: holds 1 clip, expected at least 2: .* one clip has no spread"):
            evaluate_folders(*pair, [extractors["panns"]])
    with pytest.raises(FileNotFoundError, match="no such folder of clips"):
        evaluate_folders(tmp_path / "none", folders[1], [extractors["panns"]])


def test_unusable_clips_are_named_and_counted_against_the_budget(extractors, tmp_path) -> None:
    names = [f"{i:02d}" for i in range(40)]
    folder = write(tmp_path / "bad", names, 1, seconds=1.0)
    (folder / "03.wav").write_bytes(b"not audio")
    write(folder, ["17"], 1, seconds=0.4)
    reference = write(tmp_path / "reference", names, 2, seconds=1.0)
    report = evaluate_folders(folder, reference, [extractors["vggish"], extractors["panns"]])
    assert {Path(file).name for file in report.failures} == {"03.wav", "17.wav"}
    assert "0.40 s, vggish (random) needs 0.975 s" in report.failures[str(folder / "17.wav")]
    found = by_metric(report)
    assert found["fad", "vggish (random)"]["n_generated"] == 38
    kl = found["kl", "panns-cnn14 (random)"]  # a short clip is no failure for PANNs, which pads
    assert kl["n_generated"] == 39
    assert "03" in kl["note"]
    with pytest.raises(ValueError, match=r"bad: at least \d of 40 clips cannot be used, error_budget allows 2%: .*03"):
        evaluate_folders(folder, reference, [extractors["vggish"]], error_budget=0.02)
    with pytest.raises(ValueError, match="error_budget: got 5"):
        evaluate_folders(folder, reference, [extractors["vggish"]], error_budget=5)


def test_mismatched_pairs_are_named(extractors, tmp_path) -> None:
    names = [f"a/{i:02d}" for i in range(22)]
    generated = write(tmp_path / "generated", ["a/-extra", *names], 1, seconds=1.0)
    reference = write(tmp_path / "reference", [*names, "other"], 2, seconds=1.0)
    panns = [extractors["panns"]]
    with pytest.raises(ValueError, match=r"kl: 2 of 24 clips have no partner .*generated/a/-extra.*reference/other"):
        evaluate_folders(generated, reference, panns, metrics=["kl"])
    assert "generated/a/-extra" in evaluate_folders(generated, reference, panns).skipped["kl"]
    (kl,) = evaluate_folders(generated, reference, panns, metrics=["kl"], error_budget=0.1).records
    assert kl["n_generated"] == 22
    sides = [extract(ClipFolder.open(f), panns[0]) for f in (generated, reference)]
    left, right = ({k: row for k, row in zip(s.keys, s.features.logits, strict=True)} for s in sides)
    one_by_one = [kl_divergences(left[k][None], right[k][None]).item() for k in names]
    shifted = [kl_divergences(left[a][None], right[b][None]).item() for a, b in zip(names, names[1:], strict=False)]
    assert kl["value"] == pytest.approx(np.mean(one_by_one), rel=1e-3)
    assert kl["value"] != pytest.approx(np.mean(shifted), rel=1e-2)
    assert "generated/a/-extra" in kl["note"]
    with pytest.raises(ValueError, match=r"clap: 23 of 23 clips have no caption: .*a/00"):
        evaluate_folders(generated, None, [extractors["encoder"]], metrics=["clap"], captions={"zz": ["x"]})


def test_a_video_gives_way_to_its_sound_and_two_sounds_of_one_name_are_refused(tmp_path, make_video) -> None:
    folder = write(tmp_path / "f", ["a", "b"], 1)
    make_video(folder / "a.mp4")
    make_video(folder / "c.mp4")
    (folder / ".hidden.wav").write_bytes(b"")
    (folder / "index.html").write_text("")
    assert {k: p.suffix for k, p in ClipFolder.open(folder).clips.items()} == {"a": ".wav", "b": ".wav", "c": ".mp4"}
    soundfile.write(folder / "a.flac", np.zeros(100), 16000)
    with pytest.raises(ValueError, match=r"a\.flac and a\.wav are both clip 'a'"):
        ClipFolder.open(folder)


# --- captions


def test_captions_in_every_format(tmp_path) -> None:
    expected = {"a/rain": ["it rains, hard", "rain"], "v1.2": ["birds"]}
    files = {
        "c.csv": 'file,caption\na/rain.wav,"it rains, hard"\na/rain.wav,rain\nv1.2,birds\n',
        "c.tsv": "name\tprompt\na/rain\tit rains, hard\n./a/rain\train\nv1.2.mp3\tbirds\n",
        "c.json": '{"a/rain.wav": ["it rains, hard", "rain"], "v1.2": "birds"}',
        "c.jsonl": '{"id": "a/rain", "text": ["it rains, hard", "rain"]}\n\n{"key": "v1.2", "caption": "birds"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_captions(tmp_path / name) == expected
    records = tmp_path / "run" / "records"
    records.mkdir(parents=True)
    (records / "k1.json").write_text('{"key": "k1", "kind": "text", "text": "a dog"}')
    assert read_captions(tmp_path / "run") == {"k1": ["a dog"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"file,words\na,b\n", r"c\.csv, line 2: no caption; expected a field called caption, text or prompt"),
        ("c.csv", b"path,text\na,b\n", r"no clip; expected a field called file"),
        ("c.csv", b"file,text\na,b,c\n", r"line 2: another number of columns"),
        ("c.csv", b"file,text\n", r"holds no captions"),
        ("c.csv", b"\xff\xfe", r"not UTF-8"),
        ("c.json", b"[1]", r"got a list, expected an object"),
        ("c.json", b'{"a": 3}', r"clip 'a': got caption 3, expected text"),
        ("c.jsonl", b'{"id": "a", "text": "x"}\n{', r"line 2: not JSON"),
        ("c.txt", b"", r"expected captions as \.csv"),
    ],
)
def test_wrong_captions_are_one_line_that_names_the_place(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_captions(tmp_path / "missing.csv")
