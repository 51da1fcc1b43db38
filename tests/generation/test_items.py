from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffgap_lightning.generation.items import read_items, text_item

Make = Callable[..., Path]


def test_texts_files_and_folders_in_order(tmp_path: Path, make_video: Make) -> None:
    folder = tmp_path / "clips"
    make_video(folder / "b.mp4", seconds=0.2, fps=5)
    make_video(folder / "deep" / "a.mp4", seconds=0.4, fps=5)
    (folder / "notes.md").write_text("no video")
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufeff# a comment\n\n  a dog barks \r\nün train\n", encoding="utf-8")
    items = read_items(["rain", str(lines), str(folder)])
    assert [item.text for item in items] == ["rain", "a dog barks", "ün train", "b.mp4", "a.mp4"]
    assert [item.kind for item in items] == ["text"] * 3 + ["video"] * 2
    assert len({item.key for item in items}) == 5


def test_equal_items_count_once() -> None:
    assert [item.text for item in read_items(["a dog", " a   dog ", "a cat"])] == ["a dog", "a cat"]


def test_keys_are_file_names_that_follow_the_content(tmp_path: Path, make_video: Make) -> None:
    assert text_item("A dog: barks/..!").key.startswith("a-dog-barks-")
    assert text_item("犬").key.startswith("item-")
    assert len(text_item("word " * 100).key) <= 60
    assert text_item("a").key != text_item("b").key
    one = make_video(tmp_path / "x.mp4", seconds=0.2, fps=5)
    before = read_items([str(one)])[0].key
    make_video(tmp_path / "x.mp4", seconds=0.4, fps=5)
    assert read_items([str(one)])[0].key != before


def test_mistakes_are_not_taken_for_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "sound.wav").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    for given, error, message in (
        ("  ", ValueError, "empty prompt"),
        ("prompts.txt", FileNotFoundError, "no such file"),
        ("clips/cat.MP4", FileNotFoundError, "no such file"),
        ("clips/", FileNotFoundError, "no such file or folder"),
        (str(tmp_path / "empty.txt"), ValueError, "no prompts"),
        (str(tmp_path / "latin.txt"), ValueError, "not a UTF-8"),
        (str(tmp_path / "sound.wav"), ValueError, "'wav', expected a .txt file or a video"),
        (str(tmp_path / "none"), ValueError, "no videos in this folder"),
    ):
        with pytest.raises(error, match=message):
            read_items([given])
    assert read_items(["x" * 5000])[0].kind == "text"  # too long for a file's name
