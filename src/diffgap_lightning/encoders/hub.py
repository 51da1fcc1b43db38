"""Files of pretrained models on this machine: a hub cache or a plain folder first, the network only if asked.

Everything is resolved to a local folder before a model package sees it, so nothing waits for a server that is not
there: an offline machine gets an error at once, naming the files, where to get them and where to put them. The hub
cache is `$HF_HUB_CACHE`, or `$HF_HOME/hub`; with `HF_HUB_OFFLINE=1` a download is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffgap_lightning.encoders.optional import need

ALLOW = "allow it with download=True (--encoder.download true)"
_TIMEOUT = 10.0  # s


def local_folder(
    model: str,
    files: Sequence[str | tuple[str, ...]],
    *,
    extra: str,
    revision: str | None = None,
    download: bool = False,
    patterns: Sequence[str] = (),
) -> Path:
    """The folder that holds a model: a path as it is, or a hub id's snapshot in the cache.

    Args:
        model: A folder, or a hub id such as `laion/clap-htsat-unfused`.
        files: Names that must be there; of a tuple one is enough.
        extra: That brings `huggingface_hub`.
        revision: Branch, tag or commit of a hub id.
        download: Fetch what is missing.
        patterns: What a download fetches; `files` by default.

    Raises:
        FileNotFoundError: a file is missing; the message says which and what to do.
        ConnectionError: a download was asked for and the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: got {revision!r} for the folder {model}; it belongs to hub ids only")
        if lacking := missing_files(folder, files):
            raise FileNotFoundError(f"{folder}: lacks {', '.join(lacking)}; copy the whole folder of the model there")
        return folder
    if folder.is_file():
        raise NotADirectoryError(f"{model}: is a file, expected a folder of the model or a hub id such as owner/name")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model}: no such folder; give a folder or a hub id such as owner/name")
    return _snapshot(model, files, extra, revision, download, patterns)


def _snapshot(
    model: str,
    files: Sequence[str | tuple[str, ...]],
    extra: str,
    revision: str | None,
    download: bool,
    patterns: Sequence[str],
) -> Path:
    hub: Any = need("huggingface_hub", extra)
    cached: Path | None
    try:
        cached = Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
    except FileNotFoundError:
        cached = None
    except ValueError as error:  # the hub's word for an impossible id
        raise ValueError(f"{model!r}: neither a folder nor a hub id ({error})") from error
    lacking = missing_files(cached, files) if cached else missing_files(Path("/nonexistent"), files)
    if cached and not lacking:
        return cached
    if not download:
        raise FileNotFoundError(f"{model}: {', '.join(lacking)} not in the hub cache; {how_to_fetch(model, revision)}")
    check_reachable(extra)
    wanted = list(patterns) or [name for group in files for name in ((group,) if isinstance(group, str) else group)]
    folder = Path(hub.snapshot_download(model, revision=revision, allow_patterns=wanted))
    if lacking := missing_files(folder, files):
        raise FileNotFoundError(f"{model}: the repository has no {', '.join(lacking)}")
    return folder


def missing_files(folder: Path, files: Sequence[str | tuple[str, ...]]) -> list[str]:
    """Those of `files` that a folder lacks; alternatives are joined by " or "."""
    groups = [(group,) if isinstance(group, str) else group for group in files]
    return [" or ".join(group) for group in groups if not any((folder / name).exists() for name in group)]


def cached_file(repository: str, name: str, extra: str) -> Path | None:
    """A file of a hub repository, if the cache has it."""
    path = need("huggingface_hub", extra).try_to_load_from_cache(repository, name)
    return Path(path) if isinstance(path, str) else None


def download_file(repository: str, name: str, extra: str) -> Path:
    """Fetch one file into the hub cache.

    Raises:
        ConnectionError: the hub cannot be reached.
    """
    check_reachable(extra)
    return Path(need("huggingface_hub", extra).hf_hub_download(repository, name))


def check_reachable(extra: str) -> None:
    """Ask the hub for an answer within ten seconds, because its own downloader retries for minutes.

    Raises:
        ConnectionError: offline by `HF_HUB_OFFLINE`, or no answer.
    """
    hub: Any = need("huggingface_hub", extra)
    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("download=True, but HF_HUB_OFFLINE is set: unset it, or copy the files and leave it out")
    try:
        need("huggingface_hub.utils", extra).get_session().head(hub.constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # the transport library's own exceptions differ from version to version
        raise ConnectionError(
            f"download=True, but {hub.constants.ENDPOINT} does not answer ({type(error).__name__}): "
            "fetch the files elsewhere and give their folder"
        ) from error


def how_to_fetch(model: str, revision: str | None = None) -> str:
    """What somebody with a network does."""
    at = f" --revision {revision}" if revision else ""
    return (
        f"run `hf download {model}{at}` where there is a network and copy the hub cache (HF_HOME) or give a folder "
        f"with the files, or {ALLOW}"
    )
