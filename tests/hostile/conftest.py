"""The malicious corpus, the fuzzer's readers, a canary that must stay silent, and a bound on memory."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    """A module beside this file, under its own name, as `python tests/hostile/fuzz.py` sees it."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """The module `corpus.py`: files that a stranger might send."""
    return load("corpus")


@pytest.fixture(scope="session")
def fuzz(corpus: ModuleType) -> ModuleType:
    """The module `fuzz.py`: every reader as a function of bytes."""
    load("mutations")
    return load("fuzz")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that only executed code would create; its absence is asserted when the test ends."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code in a data file was executed"


@pytest.fixture
def bounded() -> Callable[[int], AbstractContextManager[None]]:
    """`with bounded(megabytes):` lets the process claim only so much more memory, touched or not."""

    @contextmanager
    def bound(megabytes: int) -> Iterator[None]:
        status = Path("/proc/self/status")
        if not status.exists():
            pytest.skip("needs /proc to know how much address space is in use")
        found = re.search(r"VmSize:\s+(\d+)", status.read_text())
        assert found is not None
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, ((int(found.group(1)) << 10) + (megabytes << 20), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return bound


@pytest.fixture(scope="session")
def honest(fuzz: ModuleType) -> Path:
    """A folder with an honest `refiner`, bridges `ridge` and `mlp`, `x.ckpt` and weight files."""
    return fuzz.honest()
