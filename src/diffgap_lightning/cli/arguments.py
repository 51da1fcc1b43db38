"""An `argparse.ArgumentParser` that reports a wrong flag in one line, with the nearest flag that exists."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """For the commands that are not Lightning's: raises instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`, which `cli.main` prints as one line with exit status 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{message}; see `{self.prog} --help`")
