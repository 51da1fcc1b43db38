"""Do the fast tests of the core pass with the oldest and with the newest versions that `pyproject.toml` allows?

    python .ci/bounds.py                            every Python from 3.10 to 3.13 at hand, both ends
    python .ci/bounds.py --python 3.10 --end oldest
    python .ci/bounds.py -- -x -k retrieval         what follows `--` goes to pytest

`oldest` takes the lowest allowed version of each dependency that has a wheel for that Python, and the newest of what
they depend on themselves. It needs `uv` (pip install uv), which resolves in that direction; pip cannot. An environment
lasts as long as its tests, unless `--keep DIR` says where it stays and is used again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDS = {"oldest": "lowest-direct", "newest": "highest"}
TOOLS = ("pytest", "hypothesis", "scipy")  # those of the dev extra that the tests below import
FOLDERS = ("functional", "diffusion", "bridges", "refiner")


def interpreters() -> dict[str, str]:
    """Python 3.10 to 3.13 at hand: on PATH, this one, or pyenv's; version -> executable, each known to start."""
    found = {}
    for version in ("3.10", "3.11", "3.12", "3.13"):
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        for path in filter(None, (shutil.which(f"python{version}"), sys.executable, *map(str, pyenv))):
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            said = subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip()
            if said == version:
                found[version] = path
                break
    return found


def tools() -> list[str]:
    """The requirements of `TOOLS`, as the dev extra bounds them."""
    dev = (ROOT / "pyproject.toml").read_text().partition("\ndev = [")[2].partition("]\n")[0]
    return [r for r in re.findall(r'"([^"]+)"', dev) if re.match(r"[\w-]+", r)[0] in TOOLS]  # type: ignore[index]


def check(python: str, end: str, folder: Path, arguments: list[str]) -> bool:
    """Make one environment, if it is not there, and run the tests in it."""
    uv = [shutil.which("uv") or sys.exit("uv is needed: pip install uv")]
    inside = str(folder / "bin" / "python")
    if not Path(inside).exists():
        subprocess.run([*uv, "venv", "--quiet", "--python", python, str(folder)], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", inside, "--resolution", ENDS[end]]
    # Binaries alone: an old sdist that no longer builds says nothing about the bound. This package itself is built.
    wheels = ["--only-binary", ":all:", "--no-binary", "diffgap-lightning"]
    if subprocess.run([*install, *wheels, "-e", str(ROOT), *tools()]).returncode:
        return False
    subprocess.run([*uv, "pip", "list", "--python", inside], check=True)
    tests = [f"tests/{name}" for name in FOLDERS] + sorted(
        str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_*.py")
    )
    command = [inside, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests, *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> None:
    """Check every Python and both ends; the status is 1 if one of them fails."""
    at_hand = interpreters()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=list(at_hand), choices=at_hand)
    parser.add_argument("--end", nargs="+", default=list(ENDS), choices=ENDS)
    parser.add_argument("--keep", type=Path, help="folder for the environments")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    passed = {}
    with tempfile.TemporaryDirectory(prefix="diffgap-bounds-") as temporary:
        for version in options.python:
            for end in options.end:
                folder = (options.keep or Path(temporary)) / f"{version}-{end}"
                print(f"== Python {version}, {end}", flush=True)
                passed[version, end] = check(at_hand[version], end, folder, options.pytest)
                if not options.keep:
                    shutil.rmtree(folder, ignore_errors=True)
    for (version, end), good in passed.items():
        print(f"Python {version}, {end}: {'passed' if good else 'FAILED'}")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
