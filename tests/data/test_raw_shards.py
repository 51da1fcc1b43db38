from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from diffgap_lightning.data.catalog import Clip
from diffgap_lightning.data.media import Media
from diffgap_lightning.data.raw_shards import Skip, iter_raw_clips, raw_shard_ids


class Bomb:
    """Unpickling this would be noticed."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **options: int) -> list[Clip | Skip]:
    return list(iter_raw_clips(str(path), "s", **options))


def test_members_with_one_key_are_one_clip(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        {
            "dir/000.flac": b"audio",
            "dir/000.txt": b" rain \n",
            "dir/001.mp4": b"video",
            "dir/001.json": json.dumps({"text": ["a", "b", "a"], "tag": 3}).encode(),
            "002.MP3": b"mp3",
            "002.mp4": b"mp4",
        },
    )
    assert read(path) == [
        Clip("s/dir/000", ("rain",), Media(b"audio", "flac"), None),
        Clip("s/dir/001", ("a", "b"), Media(b"video", "mp4"), Media(b"video", "mp4")),
        Clip("s/002", (), Media(b"mp3", "mp3"), Media(b"mp4", "mp4")),
    ]


def test_foreign_members_are_never_opened(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb())
    path = write_tar(tmp_path / "s.tar", {"0.wav": b"w", "0.pyd": bomb, "0.pth": bomb, "1.pkl": bomb, "2.npy": bomb})
    assert read(path) == [
        Clip("s/0", (), Media(b"w", "wav"), None),
        Skip("s/1", "no audio, video, txt or json member", str(path)),
        Skip("s/2", "no audio, video, txt or json member", str(path)),
    ]


def test_links_devices_and_oversized_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("0.wav", tarfile.SYMTYPE), ("1.wav", tarfile.LNKTYPE), ("2.wav", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("3.wav")
        info.size = 101
        tar.addfile(info, io.BytesIO(b"x" * 101))
    found = read(path, max_bytes=100)
    assert [(s.id, s.reason) for s in found if isinstance(s, Skip)] == [
        *((f"s/{i}", "no audio, video, txt or json member") for i in range(3)),
        ("s/3", "wav: 101 bytes, the limit is 100"),
    ]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.wav": b"w", "0.txt": b"\xff\xfe\xff"}, "txt: not UTF-8"),
        ({"0.wav": b"w", "0.json": b"{"}, "json: not valid JSON"),
        ({"0.wav": b"w", "0.json": b"[]"}, "json: got a list"),
        ({"0.wav": b"w", "0.json": b'{"caption": 3}'}, "json: caption is not a string"),
    ],
)
def test_bad_captions_are_reported(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    (skip,) = read(write_tar(tmp_path / "s.tar", members))
    assert isinstance(skip, Skip)
    assert skip.reason.startswith(reason)


def test_a_member_twice_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.wav"))
    assert read(path) == [Skip("s/0", "wav: twice in the tar", str(path))]


def test_damaged_tars_give_what_is_whole_and_say_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {f"{i}.wav": bytes([i]) * 700 for i in range(4)})
    data = path.read_bytes()
    step = 512 + 1024

    def damaged(content: bytes) -> tuple[int, str]:
        path.write_bytes(content)
        *clips, last = read(path)
        assert isinstance(last, Skip)
        assert all(isinstance(clip, Clip) for clip in clips)
        return len(clips), last.reason

    assert damaged(data[: 2 * step + 600])[1].startswith("damaged tar after")  # ends within a member
    assert damaged(data[: 2 * step])[1].startswith("damaged tar after")  # ends between two members
    flipped = bytearray(data)
    flipped[3 * step + 5] ^= 0xFF  # a header that Python's reader takes for the end
    count, reason = damaged(bytes(flipped))
    assert count == 2
    assert "no end mark" in reason
    assert damaged(b"not a tar" * 500)[0] == 0
    assert damaged(b"")[0] == 0


def test_ids_are_unique_over_tars(tmp_path: Path) -> None:
    for name in ("a/0.tar", "b/0.tar", "b/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, {"0.wav": b"w"})
    assert list(raw_shard_ids(tmp_path / "b").values()) == ["0", "1"]
    assert list(raw_shard_ids(str(tmp_path / "b" / "{0..1}.tar")).values()) == ["0", "1"]
    assert list(raw_shard_ids([tmp_path / "a", tmp_path / "b"]).values()) == ["a/0", "b/0", "b/1"]
    with pytest.raises(FileNotFoundError):
        raw_shard_ids(tmp_path / "none.tar")
    with pytest.raises(ValueError, match="never opened"):
        raw_shard_ids("pipe:cat x.tar")
