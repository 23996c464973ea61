import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; the suite runs on two processes

import glmtune  # noqa: F401  (sets how threads wait, before torch is loaded)

from . import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the project, where it is there."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the real data is not beside the project")
    return folder
