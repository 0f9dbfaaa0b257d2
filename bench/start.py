"""Start-up time and resident memory of `headstart serve`, weights on disk: the figures of docs/benchmarks.md.

python bench/start.py [--runs 3] [-- extra flags of headstart serve]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def get(url: str, body: dict[str, object] | None = None) -> bytes | None:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return bytes(reply.read())
    except (urllib.error.URLError, ConnectionError):
        return None


def resident_mib(pid: int) -> tuple[float, float]:
    """(now, peak) resident memory in MiB, from /proc."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024


def one_run(flags: list[str]) -> tuple[float, float, float, float]:
    """Seconds to answering, seconds to ready, resident MiB ready, peak MiB after 16 pictures at 8 at once."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", str(port), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        answering = None
        while get(f"{base}/health/ready") is None:
            if server.poll() is not None:
                raise SystemExit(f"headstart serve ended with status {server.returncode} before it was ready")
            if answering is None and get(f"{base}/health") is not None:
                answering = time.perf_counter() - started
            time.sleep(0.05)
        ready = time.perf_counter() - started
        idle, _ = resident_mib(server.pid)
        for prompt in ("a red apple on a blue background", "two cats on a green background"):
            if get(f"{base}/generate", {"prompt": prompt, "n": 8}) is None:
                raise SystemExit("POST /generate failed")
        _, peak = resident_mib(server.pid)
        return answering or ready, ready, idle, peak
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of headstart serve, after --")
    args = parser.parse_args()
    rows = [one_run(args.flags) for _ in range(args.runs)]
    print("| figure | min | median | max |")
    print("| --- | --- | --- | --- |")
    names = ("answers /health, s", "ready, s", "resident when ready, MiB", "peak resident after 16 pictures, MiB")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"| {name} | {min(values):.1f} | {statistics.median(values):.1f} | {max(values):.1f} |")


if __name__ == "__main__":
    main()
