"""One logging setup for Headstart, uvicorn and the libraries: lines on stderr, plain or JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from service.config import LogSettings

# They install handlers of their own and stop their records from reaching the root logger.
LIBRARIES = ("diffusers", "huggingface_hub", "transformers", "uvicorn", "uvicorn.error", "uvicorn.access")
QUIET = ("httpx", "httpcore", "huggingface_hub", "faiss", "PIL", "asyncio", "urllib3", "uvicorn", "uvicorn.error")


def setup(settings: LogSettings) -> None:
    """Send every record to stderr, and Python warnings with them. Call again after libraries were imported."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.json else PlainFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level.upper())
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
    if settings.level != "debug":
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class PlainFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO service.app: message`; a message's line breaks are escaped, a traceback's are not."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class's name)
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
