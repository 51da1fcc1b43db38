"""Raw media in WebDataset tars: `.flac/.wav/.mp3/.mp4 ...` beside `.txt` or `.json`, decoded from memory.

    000017.flac   000017.json     one key, one clip (consecutive members with the same name up to the first dot)

Text comes from `.txt` (UTF-8, the whole file is one caption) or from `text`, `caption` or `captions` of the `.json`
object (a string or a list of strings). Every other member is passed over undecoded: pickles, arrays and links are never
opened. A clip's id is `<tar's stem>/<key>`, because keys are often numbered anew in every tar.

What cannot be used is yielded as a `Skip` with its reason, a damaged tar included; nothing is passed over in silence.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from diffgap_lightning.data.catalog import Clip
from diffgap_lightning.data.media import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, Media
from diffgap_lightning.data.tar import iter_headers
from diffgap_lightning.data.urls import check_url, expand_braces, expand_glob, is_remote, open_binary

MAX_MEMBER_BYTES = 1 << 30
_TEXT_BYTES = 1 << 20
_TEXT_FIELDS = ("text", "caption", "captions")
_USED = (*AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS, "txt", "json")


class Skip(NamedTuple):
    """A clip that cannot be used, and why."""

    id: str
    reason: str
    path: str = ""


def raw_shard_ids(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Address -> id prefix of every raw tar that a specification names, in order.

    Args:
        spec: A folder, path, glob or brace pattern, local or remote, or several of them.

    Raises:
        ValueError: two tars with one stem in folders of one name, or an address that may not be opened.
        FileNotFoundError: nothing matches.
    """
    urls: list[str] = []
    for part in [spec] if isinstance(spec, str | os.PathLike) else list(spec):
        for text in expand_braces(check_url(os.fspath(part))):
            urls += expand_glob(os.path.join(glob.escape(text), "*.tar") if os.path.isdir(text) else text)
    urls = list(dict.fromkeys(urls))
    for url in urls:
        if not is_remote(url) and not os.path.isfile(url):
            raise FileNotFoundError(f"{url}: no such tar")
    prefixes = {url: PurePosixPath(url).stem for url in urls}
    if len(set(prefixes.values())) < len(urls):
        prefixes = {url: "/".join(PurePosixPath(url).with_suffix("").parts[-2:]) for url in urls}
    if len(set(prefixes.values())) < len(urls):
        raise ValueError(f"{spec}: two tars share folder and name, so ids would repeat; embed them in two runs")
    return prefixes


def iter_raw_clips(url: str, prefix: str, max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[Clip | Skip]:
    """The clips of one tar, in its order, their media as bytes in memory.

    Args:
        url: The tar.
        prefix: Opens the ids.
        max_bytes: A larger member is not read, and its clip skipped.

    Yields:
        A clip with `Media` over bytes, or what could not be used.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    problem = ""
    done = 0
    try:
        with open_binary(url) as file:
            for member in iter_headers(file, whole=True):
                own, extension = _split_name(member.name)
                if own != key:
                    if key is not None:
                        yield _clip(f"{prefix}/{key}", members, problem, url)
                        done += 1
                    key, members, problem = own, {}, ""
                if not member.isreg() or member.issparse() or extension not in _USED:
                    continue
                limit = min(max_bytes, _TEXT_BYTES) if extension in ("txt", "json") else max_bytes
                if extension in members:
                    problem = problem or f"{extension}: twice in the tar"
                elif member.size > limit:
                    problem = problem or f"{extension}: {member.size} bytes, the limit is {limit}"
                else:
                    members[extension] = _read(file, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Skip(prefix, f"damaged tar after {done} whole clips: {' '.join(str(error).split())}", url)
        return
    if key is not None:
        yield _clip(f"{prefix}/{key}", members, problem, url)


def _read(file: IO[bytes] | Any, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes, {len(data)} are there")
    return data


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's convention: the key ends at the first dot of the base name; the last suffix says what it is."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.rpartition(".")[2].lower()


def _clip(name: str, members: dict[str, bytes], problem: str, url: str) -> Clip | Skip:
    """What the members of one key amount to."""
    if problem:
        return Skip(name, problem, url)
    try:
        texts = _texts(members)
    except ValueError as error:
        return Skip(name, str(error), url)
    found = {}
    for modality, extensions in (("audio", (*AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS)), ("video", VIDEO_EXTENSIONS)):
        extension = next((e for e in extensions if e in members), None)
        found[modality] = None if extension is None else Media(members[extension], extension)
    if not (texts or found["audio"] or found["video"]):
        return Skip(name, "no audio, video, txt or json member", url)
    return Clip(name, texts, found["audio"], found["video"])


def _texts(members: dict[str, bytes]) -> tuple[str, ...]:
    """Captions from `.txt` and `.json`.

    Raises:
        ValueError: a member that is not what its name says.
    """
    texts: list[str] = []
    if "txt" in members:
        try:
            texts.append(members["txt"].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"txt: not UTF-8 ({error.reason})") from error
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise ValueError("json: not valid JSON") from error
        if not isinstance(record, dict):
            raise ValueError(f"json: got a {type(record).__name__}, expected an object")
        for field in _TEXT_FIELDS if not texts else ():
            value = record.get(field) or []
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise ValueError(f"json: {field} is not a string or a list of strings")
            texts += values
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
