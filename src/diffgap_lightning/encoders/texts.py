"""What every text encoder refuses."""

from __future__ import annotations

from collections.abc import Sequence


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what would be embedded as something else than it says.

    Raises:
        TypeError: a single string, which is a sequence of letters.
        ValueError: no text, or an empty one.
    """
    if isinstance(texts, str):
        raise TypeError("embed_text: got one string, expected a list of strings")
    if len(texts) == 0:
        raise ValueError("embed_text: got no text, expected at least one")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"embed_text: text {place} is a {type(text).__name__}, expected a string")
        if not text.strip():
            raise ValueError(f"embed_text: text {place} is empty, expected at least one word")
