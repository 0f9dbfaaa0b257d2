"""Hypothesis: no time limit an example, since the machine may be busy; the same examples each time in CI."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("headstart", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("headstart")
