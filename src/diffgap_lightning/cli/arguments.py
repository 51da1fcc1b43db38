"""One-line messages for wrong flags: an `argparse` parser that gives them, and what makes jsonargparse's readable."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (--[^\s=]+)")


class ArgumentParser(argparse.ArgumentParser):
    """For the commands that are not Lightning's: raises instead of printing the whole usage; takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`, which `cli.main` prints as one line with exit status 2."""
        raise ValueError(f"{suggest_flag(message, self._option_string_actions)}; see `{self.prog} --help`")


def suggest(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what there is if nothing is near."""
    names = list(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names)}"


def suggest_flag(message: str, flags: Iterable[str]) -> str:
    """Add the nearest existing flag to a message about an unrecognized one."""
    wrong = _UNRECOGNIZED.search(message)
    near = difflib.get_close_matches(wrong[1], list(flags), n=1) if wrong else []
    return f"{message}; did you mean {near[0]}?" if near else message


def read_config(path: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or no mapping.
    """
    import yaml

    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "not found"
        raise FileNotFoundError(f"--config: {path} {what}; give a YAML file such as configs/quickstart.yaml")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML ({error})") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"--config: {path} holds {found}, expected sections such as trainer:, model: and data:")
    return content


def one_line(text: str) -> str:
    r"""Text from elsewhere as one line that cannot steer a terminal, whatever a file's name holds.

    Example:
        >>> one_line("a\x1b[31m  name\n of 2 lines")
        'a\\x1b[31m name of 2 lines'
    """
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def tidy(message: str) -> str:
    r"""Jsonargparse's message about a wrong value as one line: the field, what was expected and what was got.

    Example:
        >>> tidy('Parser key "trainer.max_epochs":\n  Expected a <class \'int\'>. Got value: x')
        '--trainer.max_epochs: expected int, got x'
    """
    text = " ".join(message.split())
    for pattern, replacement in (
        (r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ", ""),
        (r"- Expected a path but (?:(?! - ).)* - ", ""),
        (r" ?- Expected a <class 'NoneType'>", ""),
        (r" ?Given value type: <class '[\w.]*(?:NestedArg|dict|list)'>.*$", ""),
        (r"(: -)? ?Given value type: <class '\w+'> Given value: (.*)$", r", got \2"),
        (r"\. Got value: ", ", got "),
        (r"Expected a <class '(\w+)'>", r"expected \1"),
        (r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
        (
            r"Expected a dot import path string: [^\s,]+( - Expected a dot import path string: [^\s,]+)*",
            "no such class",
        ),
        (r"the following arguments are required: \w+\.data", "no data: give --config FILE"),
        (r"Problem with given class_path '([^']+)': ", r"\1: "),
        (r" ?-? ?Not a valid subclass of .*$", ""),
        (r"Subcommand '\w+' does not accept option '([^']+)'", r"unrecognized arguments: --\1"),
        (r'^Parser key "([^"]+)": (- )?', r"--\1: "),
        (r'Parser key "([^"]+)": ', r"\1: "),
    ):
        text = re.sub(pattern, replacement, text)
    return text
