from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from service import logs
from service.config import LogSettings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    names = {*logs.LIBRARIES, *logs.QUIET}
    kept = {name: (logging.getLogger(name).level, logging.getLogger(name).handlers) for name in names}
    handlers, level = root.handlers, root.level
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level
    for name, (its_level, its_handlers) in kept.items():
        logging.getLogger(name).handlers = its_handlers
        logging.getLogger(name).setLevel(its_level)


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings())
    logging.getLogger("service.test").info("one\nline\r")
    logging.getLogger("service.test").debug("too small")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("Z INFO service.test: one\\nline\\r\n")


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings(level="debug", json=True))
    try:
        raise ValueError("é")
    except ValueError:
        logging.getLogger("service.test").exception("it\nfailed")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["logger"], line["message"]) == ("error", "service.test", "it\nfailed")
    assert line["traceback"].endswith("ValueError: é")


def test_libraries_and_warnings_are_folded_in(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("diffusers")
    library.propagate = False
    library.addHandler(logging.StreamHandler())
    logs.setup(LogSettings())
    logging.getLogger("diffusers.models").warning("from a library")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.setup(LogSettings())
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old", UserWarning, stacklevel=1)
    err = capsys.readouterr().err
    assert err.count("from a library") == 1
    assert "WARNING py.warnings: " in err
    assert "UserWarning: old" in err
