from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffgap_lightning.evaluation.page import render_html, write_html
from diffgap_lightning.evaluation.report import cells, format_table, mark, write_json

PNG = b"\x89PNG\r\n\x1a\n and more bytes"


def record(method: str = "ridge", **changes) -> dict:
    figures = {"r1": 0.5, "r5": 0.75, "r10": 0.875, "median_rank": 1.5, "mean_rank": 3.25, "map10": 0.6}
    produced = {"cosine": 0.4321, "mmd2": 0.0157, "frechet": 0.25, "cosine_ci": [0.4, 0.45]}
    paired = {"best_bridge": "ridge", "r1_minus_best_bridge": 0.0, "r1_minus_best_bridge_ci": [0.0, 0.0]}
    base = {"method": method, "direction": "text_to_audio", "r1_ci": [0.4, 0.6], "n_query": 60, "n_gallery": 30}
    return {**base, **figures, **produced, **paired, "seed": 0, **changes}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_cells_print_mmd_in_thousandths_and_a_dash_for_nothing() -> None:
    assert cells(record()) == ["0.500", "0.400 0.600", "0.750", "0.875", "1.5", "0.600", "0.432", "15.7", "0.250"]
    assert cells(record(mmd2=-1e-6))[-2] == "0.0"
    assert cells(record(cosine=None, mmd2=None, frechet=None))[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("method", "difference", "expected"),
    [("ridge", [0.0, 0.0], "*"), ("x", [0.01, 0.1], "+"), ("x", [-0.1, -0.01], "-"), ("x", [-0.1, 0.1], "")],
)
def test_marks_follow_the_interval_of_the_difference(method: str, difference: list[float], expected: str) -> None:
    assert mark(record(method, r1_minus_best_bridge_ci=difference)) == expected


def test_the_text_table_is_aligned_and_has_a_block_for_each_direction() -> None:
    rows = [record(), record("a-long-name"), record(direction="audio_to_text")]
    first, second = format_table(rows).split("\n\n")
    assert first.splitlines()[0] == "text to audio: 60 queries, 30 candidates"
    assert second.startswith("audio to text")
    header, *body = first.splitlines()[2:]
    assert [line.split()[0] for line in body] == ["ridge", "a-long-name"]
    assert len({len(line) for line in (header, *body)}) == 1


def test_json_is_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "r.json", [record()])
    assert json.loads(path.read_text()) == [record()]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, [record(r1=float("nan"))])
    assert json.loads(path.read_text()) == [record()]
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_the_page_holds_the_picture_and_every_row(tmp_path: Path) -> None:
    rows = [record(), record("diffgap", r1_minus_best_bridge_ci=[0.01, 0.2]), record(direction="audio_to_text")]
    text = write_html(tmp_path / "p.html", rows, PNG, title="T", facts={"seed": 7}).read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    (image,) = [a["src"] for tag, a in tags.seen if tag == "img"]
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == PNG
    assert [a["class"] for tag, a in tags.seen if tag == "tr" and "class" in a] == ["best", "above", "best"]
    for value in ("0.432", "15.7", "diffgap", "<dd>7</dd>"):
        assert value in text


def test_the_page_escapes_everything_and_loads_nothing() -> None:
    evil = '"><script>alert(1)</script>'
    rows = [record(evil, direction=f"{evil}_to_audio", best_bridge=evil)]
    text = render_html(rows, PNG, title=evil, facts={evil: evil, "dollar": "$title ${x}"})
    assert "<script" not in text
    assert "$title ${x}" in text
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", text)
