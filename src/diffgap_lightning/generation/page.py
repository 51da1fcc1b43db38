"""The page of a generation run: what a person opens to hear the difference.

Media are files beside the page, so it works from a disk as well as from a server; styles and the script are inline and
nothing is loaded from elsewhere. Without the script everything plays too; with it, one sound plays at a time and
"switch version" goes on at the same moment of the other one. Every text is escaped, every file name quoted.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any
from urllib.parse import quote

from diffgap_lightning.generation.folder import Record
from diffgap_lightning.generation.rendering import VERSIONS

SCORES = {
    "clap": ("CLAP", "cosine of the sound's and the prompt's embedding, as the scorer gives them"),
    "refiner": ("refiner", "the refiner's own score of prompt and sound, the modality gap taken into account"),
}
_MANY = 60  # items; beyond, players fetch nothing before they are used


def render_page(records: Sequence[Record], *, title: str, facts: Mapping[str, object]) -> str:
    """The page as a string.

    Args:
        records: Of finished items, in the order of the page.
        title: Of the page.
        facts: Where the sounds come from, printed as they are.
    """
    preload = "none" if len(records) > _MANY else "metadata"
    names = [name for name in SCORES if any(name in v["scores"] for r in records for v in r["versions"])]
    notes = [f"{label}: {meaning}; more is better" for label, meaning in (SCORES[name] for name in names)]
    notes += _conditions_note(records)
    return _PAGE.substitute(
        title=_text(title),
        style=_STYLE,
        script=_SCRIPT,
        summary=_summary(records, names),
        items="\n".join(_item(record, number, preload) for number, record in enumerate(records, start=1)),
        notes="".join(f"<li>{_text(note)}</li>" for note in (*_NOTES, *notes)),
        facts="".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items()),
    )


def mean_scores(records: Sequence[Record], name: str) -> tuple[float, float, int, int] | None:
    """Means of a score before and after, how often the refined version has more, and of how many items.

    Items without the score in both versions are left out; None if none is left.
    """
    pairs = []
    for record in records:
        scores = {v["name"]: v["scores"].get(name) for v in record["versions"]}
        before, after = scores.get("plain", scores.get("regression")), scores.get("refined")
        if before is not None and after is not None:
            pairs.append((before, after))
    if not pairs:
        return None
    better = sum(after > before for before, after in pairs)
    before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return before, after, better, len(pairs)


def _summary(records: Sequence[Record], names: Sequence[str]) -> str:
    """How many items, and the mean of every score before and after."""
    videos = sum(record["kind"] == "video" for record in records)
    texts = len(records) - videos
    counts = [f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((texts, "prompt"), (videos, "video")) if n]
    lines = [f"<p>{' and '.join(counts)}, each with the same initial noise in every version.</p>"]
    rows = []
    for name in names:
        if found := mean_scores(records, name):
            before, after, better, pairs = found
            rows.append(
                f'<tr><th scope="row">{SCORES[name][0]}</th><td>{before:.3f}</td><td>{after:.3f}</td>'
                f"<td>{better} of {pairs}</td></tr>"
            )
    if rows:
        head = "<tr><th>mean score</th><th>before</th><th>after</th><th>higher after</th></tr>"
        lines.append(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
    return "\n".join(lines)


def _item(record: Record, number: int, preload: str) -> str:
    versions = record["versions"]
    shown = [_version(version, record, preload) for version in versions]
    switch = '<button type="button" class="switch" hidden>switch version</button>' if len(versions) > 1 else ""
    facts = f"{record['seconds']:.1f} s"
    if record.get("conditions") is not None:
        facts += f", conditions: cosine {record['conditions']:.3f}"
    return (
        f'<article id="{_text(record["key"])}" data-kind="{_text(record["kind"])}">\n'
        f'<header><h2><span class="number">{number}</span>{_text(record["text"])}</h2>'
        f"<p>{_text(facts)}</p>{switch}</header>\n"
        f'<div class="versions">{"".join(shown)}</div>\n</article>'
    )


def _version(version: Mapping[str, Any], record: Record, preload: str) -> str:
    label = VERSIONS.get(version["name"], version["name"])
    candidates = "".join(_candidate(c, rank, "none") for rank, c in enumerate(version["candidates"], start=2))
    if candidates:
        candidates = f"<details><summary>other candidates, best first</summary><ol>{candidates}</ol></details>"
    what = f"{record['text']}, {label}"
    return (
        f'<section class="{_text(version["name"])}"><h3>{_text(label)}</h3>'
        f"{_player(version, preload, what)}"
        f'<img loading="lazy" width="800" height="288" alt="Spectrogram: {_text(what)}" '
        f'src="{_url(version["picture"])}">'
        f"{_scores(version['scores'])}{candidates}</section>"
    )


def _candidate(candidate: Mapping[str, Any], rank: int, preload: str) -> str:
    return f"<li>{_player(candidate, preload, f'candidate {rank}')}{_scores(candidate['scores'])}</li>"


def _player(files: Mapping[str, Any], preload: str, label: str) -> str:
    if files.get("video"):
        return (
            f'<video controls playsinline preload="{preload}" aria-label="{_text(label)}" '
            f'src="{_url(files["video"])}"></video>'
        )
    return f'<audio controls preload="{preload}" aria-label="{_text(label)}" src="{_url(files["audio"])}"></audio>'


def _scores(scores: Mapping[str, float]) -> str:
    known = [(SCORES[name][0], value) for name, value in scores.items() if name in SCORES]
    if not known:
        return ""
    return f'<p class="scores">{"".join(f"<span>{label} <b>{value:.3f}</b></span>" for label, value in known)}</p>'


def _conditions_note(records: Sequence[Record]) -> list[str]:
    if all(record.get("conditions") is None for record in records):
        return []
    return ["conditions: cosine between what the generator was conditioned on in the two versions; 1 would be the same"]


def _url(name: str) -> str:
    return _text(quote(name))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_NOTES = (
    "switch version goes on at the same moment of the other version: the quickest way to hear a difference",
    "both versions start from the same noise: what differs is the embedding that conditions the generator",
    "spectrograms of one row share their colours: 0 dB (light) is the loudest point of the row, black is -80 dB",
)

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$summary
<main>
$items
</main>
<h2>How to read it</h2>
<ul>$notes</ul>
<h2>Where it comes from</h2>
<dl>$facts</dl>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5a6070; --line: #dcdfe5; --page: #fff; --card: #f7f8fa;
  --refined: #1d7a2c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --soft: #a4abba; --line: #3a3f48; --page: #16181c; --card: #1e2127; --refined: #6fce83; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1240px;
  margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); }
article { border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 1.2rem 0;
  padding: .8rem 1rem 1rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; margin-bottom: .6rem; }
header h2 { margin: 0; flex: 1 1 18rem; font-size: 1.05rem; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); font-size: .85rem; }
.number { color: var(--soft); font-weight: 400; margin-right: .6rem; }
.versions { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
section { min-width: 0; }
h3 { margin: 0 0 .35rem; font-size: .9rem; font-weight: 600; color: var(--soft); }
section.refined h3 { color: var(--refined); }
audio, video, img { display: block; width: 100%; }
audio { height: 40px; }
video { aspect-ratio: 16 / 9; background: #000; border-radius: 4px; }
img { height: auto; margin-top: .5rem; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.scores { margin: .4rem 0 0; color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
.scores span { margin-right: 1rem; } .scores b { color: var(--ink); font-weight: 600; }
details { margin-top: .5rem; font-size: .85rem; color: var(--soft); } summary { cursor: pointer; }
ol { padding-left: 1.3rem; } li { margin: .3rem 0; }
button { font: inherit; font-size: .85rem; padding: .15rem .8rem; border: 1px solid var(--line); border-radius: 999px;
  background: var(--page); color: var(--ink); cursor: pointer; }
button:hover { border-color: var(--soft); }
ul, dl { color: var(--soft); } dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
"""

# One sound at a time; "switch" plays the next version of the item from the same moment on.
_SCRIPT = """
const media = [...document.querySelectorAll("audio, video")];
media.forEach(m => m.addEventListener("play", () => media.forEach(o => { if (o !== m) o.pause(); })));
document.querySelectorAll("button.switch").forEach(button => {
  const own = [...button.closest("article").querySelectorAll("section")]
    .map(s => s.querySelector("audio, video"));
  let last = 0;
  own.forEach((m, i) => m.addEventListener("play", () => { last = i; }));
  button.hidden = false;
  button.addEventListener("click", () => {
    const from = own[last], to = own[(last + 1) % own.length];
    const seconds = from.ended ? 0 : from.currentTime;
    from.pause();
    to.currentTime = Math.min(seconds, to.duration || seconds);
    to.play();
  });
});
"""
