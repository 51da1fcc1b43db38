from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffgap_lightning.data.catalog import read_catalog
from diffgap_lightning.data.media_index import MediaIndex

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def test_audiocaps_rows_of_one_clip_are_its_captions(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    path.write_text(
        AUDIOCAPS + '1,vfY_TJq7n_U,130,"A duck, quacking"\n2,tdWhHV3X25Q,60,Applause\n3,vfY_TJq7n_U,130,Ducks\n'
    )
    catalog = read_catalog(path)
    assert [(c.id, c.texts) for c in catalog.clips] == [
        ("vfY_TJq7n_U_130", ("A duck, quacking", "Ducks")),
        ("tdWhHV3X25Q_60", ("Applause",)),
    ]
    assert len(catalog.missing("audio")) == 2
    assert not catalog.missing("text")


def test_vggsound_has_no_header_and_sometimes_quotes(tmp_path: Path) -> None:
    path = tmp_path / "vggsound.csv"
    path.write_text('---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"waterfall, burbling",train\n')
    catalog = read_catalog(path)
    assert [(c.id, c.texts, c.split) for c in catalog.clips] == [
        ("---g-f_I2yQ_1", ("people marching",), "test"),
        ("--0PQM4-hqg_30", ("waterfall, burbling",), "train"),
    ]
    assert catalog.splits == {"test": 1, "train": 1}
    assert [c.id for c in catalog.select("train").clips] == ["--0PQM4-hqg_30"]
    with pytest.raises(ValueError, match=r"no clips of split 'val'; it has test \(1\), train \(1\)"):
        catalog.select("val")


@pytest.mark.parametrize(
    ("name", "start", "maybe_cut"),
    [
        ("-abcdefghi__30.wav", 0.0, False),
        ("-abcdefghi__30_40.flac", 0.0, False),
        ("sub/folder/-abcdefghi__30000_40000.mp4", 0.0, False),
        ("-abcdefghi__000030.MP4", 0.0, False),
        ("Y-abcdefghi__30.000_40.000.wav", 0.0, False),
        ("4711.mp3", 0.0, False),
        ("-abcdefghi_.wav", 30.0, True),
        ("Y-abcdefghi_.m4a", 30.0, True),
    ],
)
def test_files_are_found_by_the_usual_names(tmp_path: Path, name: str, start: float, maybe_cut: bool) -> None:
    (tmp_path / "c.csv").write_text(AUDIOCAPS + "4711,-abcdefghi_,30,Rain\n")
    folder = touch(tmp_path / "media", name, "abcdefghij__30.wav", "-abcdefghi__31.wav", "notes.txt")
    (clip,) = read_catalog(tmp_path / "c.csv", folder).clips
    assert clip.audio is not None
    assert (clip.audio.source, clip.audio.start, clip.audio.maybe_cut) == (folder / name, start, maybe_cut)
    assert clip.audio.duration == 10.0
    assert (clip.video is not None) == name.lower().endswith(".mp4")


def test_audio_files_go_before_containers_and_cut_clips_before_whole_videos(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("abcdefghijk,5,rain,train\n")
    folder = touch(tmp_path / "media", "abcdefghijk.wav", "abcdefghijk_5000_15000.mp4", "abcdefghijk_5.flac")
    (clip,) = read_catalog(tmp_path / "c.csv", folder).clips
    assert clip.audio is not None
    assert clip.video is not None
    assert Path(str(clip.audio.source)).name == "abcdefghijk_5.flac"
    assert Path(str(clip.video.source)).name == "abcdefghijk_5000_15000.mp4"


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("abcdefghijk,5,rain,train\n")
    elsewhere = touch(tmp_path / "elsewhere", "abcdefghijk_5.wav")
    folder = touch(tmp_path / "media", "readme.txt")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert len(MediaIndex(folder)) == 1
    (clip,) = read_catalog(tmp_path / "c.csv", folder).clips
    assert clip.audio is not None
    assert clip.audio.source == folder / "link" / "abcdefghijk_5.wav"


def test_csv_and_jsonl_hold_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "v.mp4")
    (tmp_path / "c.csv").write_text(
        "split,id,text,audio,video,start,end,note\nvalid,x,rain,a.wav,v.mp4,1.5,4,?\nvalid,x,drops,a.wav,v.mp4,1.5,4,\ntest,y,sun,,,,,\n"
    )
    rows = [
        {
            "id": "x",
            "text": ["rain", "drops"],
            "audio": "a.wav",
            "video": "v.mp4",
            "start": 1.5,
            "end": 4,
            "split": "val",
        },
        {"id": "y", "text": "sun", "split": "test"},
    ]
    (tmp_path / "c.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    from_csv, from_jsonl = read_catalog(tmp_path / "c.csv"), read_catalog(tmp_path / "c.jsonl")
    assert from_csv.clips == from_jsonl.clips
    x, y = from_csv.clips
    assert x.texts == ("rain", "drops")
    assert x.audio is not None
    assert (x.audio.source, x.audio.start, x.audio.duration) == (tmp_path / "a.wav", 1.5, 2.5)
    assert (y.audio, y.video, y.split) == (None, None, "test")
    assert [c.id for c in from_csv.missing("video")] == ["y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", AUDIOCAPS + "1,vfY_TJq7n_U,soon,Ducks\n", "a.csv, line 2, field start_time: got 'soon'"),
        ("a.csv", AUDIOCAPS + "1,vfY_TJq7n_U,-3,Ducks\n", "line 2, field start_time: got '-3'"),
        (
            "a.csv",
            AUDIOCAPS + "1,vfY_TJq7n_U,3,Ducks\n2,x,4, \n",
            "line 3, field caption: got ' ', expected a non-empty",
        ),
        ("a.csv", AUDIOCAPS + "1,../../etc,3,Ducks\n", "line 2, field youtube_id: got '../../etc'"),
        ("a.csv", AUDIOCAPS + "1,x,3,Ducks, quacking\n", "line 2, field caption: got 5 columns, expected 4; quote"),
        ("a.csv", AUDIOCAPS, "a.csv: no rows"),
        ("a.csv", "youtube_id,caption\nx,y\n", "line 1, field audiocap_id: missing in the header"),
        ("v.csv", "abcdefghijk,5,rain,train\nabcdefghijk,5,rain\n", "v.csv, line 2, field split: got 3 columns"),
        ("v.csv", "abcdefghijk,5,rain,train\nabcdefghijk,nan,rain,test\n", "line 2, field start_seconds: got 'nan'"),
        ("g.csv", "id,txt\n1,2\n", "line 1, field audio, video, text: none of them in the header 'id,txt'"),
        ("g.csv", "id,text\n,rain\n", "line 2, field id: got '', expected a non-empty string"),
        ("g.csv", "id,text,audio\n1,,\n", "line 2, field audio, video, text: all empty"),
        ("g.csv", "id,text,start,end\n1,a,5,5\n", "line 2, field end: got '5', expected more than the start, 5 s"),
        (
            "g.csv",
            "id,audio\n1,a.wav\n1,b.wav\n",
            "line 3, field audio: got '.*b.wav', an earlier row of id '1' has another",
        ),
        ("g.csv", "name,value\n1,2\n", "g.csv, line 1: cannot tell the catalog's format"),
        ("g.csv", b"id,text\n1,\xff\xfe\n", "g.csv, line 2: not UTF-8"),
        ("g.jsonl", '{"id": 1, "text": "a"}\n{"id": 2,\n', "g.jsonl, line 2, field .line.: not JSON"),
        ("g.jsonl", "[1]\n", "line 1, field .line.: got a list, expected an object"),
        ("g.jsonl", '{"id": null, "text": "a"}\n', "line 1, field id: got None"),
        ("g.jsonl", '{"id": 1, "text": 7}\n', "line 1, field text: got 7, expected a string or a list"),
        ("g.jsonl", '{"id": 1, "text": "a", "start": "x"}\n', "line 1, field start: got 'x'"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_catalog(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_catalog_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such catalog"):
        read_catalog(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("abcdefghijk,5,rain,train\n")
    with pytest.raises(FileNotFoundError, match="no such folder of media"):
        read_catalog(tmp_path / "c.csv", tmp_path / "none")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfid,text\n\n1,rain\n\n")
    assert read_catalog(tmp_path / "c.csv").clips[0].texts == ("rain",)


def test_the_official_sample(shared_data: Path) -> None:
    catalog = read_catalog(shared_data / "csv" / "audiocaps_val_first200.csv", shared_data / "vggsound_sample")
    assert sum(len(clip.texts) for clip in catalog.clips) == 200
    assert len(catalog.missing("audio")) == len(catalog)


def test_the_real_clips_are_found(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "vggsound_sample"
    names = [path.stem.rsplit("_", 2) for path in sorted(folder.glob("*.mp4"))]
    (tmp_path / "v.csv").write_text("".join(f"{y},{int(start) // 1000},label,train\n" for y, start, _ in names))
    catalog = read_catalog(tmp_path / "v.csv", folder)
    assert len(catalog) == 4
    assert not catalog.missing("audio")
    assert not catalog.missing("video")
