"""One scorer's folder for all of its tests, and one thread: the kernels are tiny."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.scorer import small


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scorer")
    small.save(root)
    return root
