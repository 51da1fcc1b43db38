from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from diffgap_lightning.generation.page import mean_scores, render_page

Record = dict[str, Any]
EVIL = "<script>alert(\"x\")</script> & 'quotes'"


def record(key: str = "k", text: str = "a dog", before: float | None = 0.1, after: float | None = 0.3) -> Record:
    def version(name: str, score: float | None) -> Record:
        scores = {} if score is None else {"clap": score}
        files = {"audio": f"{name}/{key}.wav", "picture": f"spectrograms/{key}.{name}.png"}
        other = [{"audio": f"candidates/{name}/{key}.2.wav", "scores": scores}]
        return {"name": name, **files, "scores": scores, "candidates": other}

    return {
        "key": key, "kind": "text", "text": text, "seconds": 1.0, "conditions": 0.5,
        "versions": [version("plain", before), version("refined", after)],
    }  # fmt: skip


class Reader(HTMLParser):
    """Tags with their attributes, and whether every one that must be closed is."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_players_and_pictures_of_every_version() -> None:
    reader = read(render_page([record("one"), record("two")], title="T", facts={"seed": 0}))
    audio = [a["src"] for tag, a in reader.tags if tag == "audio"]
    assert len(audio) == 8
    assert audio[:2] == ["plain/one.wav", "candidates/plain/one.2.wav"]
    assert [a["src"] for tag, a in reader.tags if tag == "img"][:2] == [
        "spectrograms/one.plain.png",
        "spectrograms/one.refined.png",
    ]
    assert all(a.get("alt") for tag, a in reader.tags if tag == "img")
    assert all(a.get("aria-label") for tag, a in reader.tags if tag == "audio")


def test_nothing_is_executed_or_loaded_from_elsewhere() -> None:
    page = render_page([record("x#y?z", EVIL)], title=EVIL, facts={EVIL: EVIL})
    reader = read(page)
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert page.count("&lt;script&gt;") >= 5
    sources = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href")]
    assert not [s for s in sources if s and (":" in s or s.startswith("/"))]
    assert "plain/x%23y%3Fz.wav" in sources
    assert "http" not in re.sub(r"<script>.*</script>", "", page, flags=re.S)


def test_means_before_and_after() -> None:
    records = [record(before=0.1, after=0.3), record(before=0.2, after=0.1), record(before=None, after=0.9)]
    assert mean_scores(records, "clap") == (pytest.approx(0.15), pytest.approx(0.2), 1, 2)
    assert mean_scores(records, "refiner") is None
    page = render_page(records, title="T", facts={})
    assert "<td>0.150</td><td>0.200</td><td>1 of 2</td>" in page
    assert "mean score" not in render_page([record(before=None, after=None)], title="T", facts={})


def test_long_pages_load_nothing_before_it_is_played() -> None:
    page = render_page([record(str(i)) for i in range(61)], title="T", facts={})
    assert 'preload="metadata"' not in page
    assert 'preload="metadata"' in render_page([record()], title="T", facts={})
