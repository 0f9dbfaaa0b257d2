"""`headstart serve --gpus 2` on the CPU, a process for each rank, over HTTP: degrees, and ranks that die or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.cli import main
from tests import tiny

TIMEOUT_S = 6
LONG = {"prompt": "a red fox", "num_inference_steps": 200, "n": 2, "sampler": "ddim"}
SHORT = {"prompt": "a red fox", "num_inference_steps": 6, "n": 3, "sampler": "ddim", "seed": 5}


class Server:
    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def generate(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    @property
    def followers(self) -> list[int]:
        return [rank for server in children(self.process.pid) for rank in children(server)]


def parents() -> dict[int, int]:
    """Of the processes that have not ended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def children(pid: int) -> list[int]:
    return [child for child, parent in parents().items() if parent == pid]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--model", str(folder), "--dtype", "float32", "--cache", "off"]
    command += ["--llm", "off", "--port", str(port), "--device", "cpu", "--gpus", "2", "--max-pixels", "16384"]
    command += ["--rank-timeout-s", str(TIMEOUT_S)]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 200
        while not is_ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Server(process, url)
        process.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_a_request_names_its_degree_and_the_reply_says_it(server: Server) -> None:
    assert server.metric("headstart_gpus") == 2
    for degree in (1, 2):
        ticks = f'headstart_ticks_total{{patch_degree="{degree}"}}'
        reply = server.generate(**SHORT, patch_degree=degree, size="64x128").json()
        assert reply["timings"]["patch_degree"] == degree
        assert [picture["steps_run"] for picture in reply["data"]] == [6, 6, 6]
        assert server.metric(ticks) >= 6
    assert server.generate(**SHORT).json()["timings"]["patch_degree"] in (1, 2)  # by measured times


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"patch_degree": 4}, "patch_degree: 4 is not allowed; this server draws on 2 GPUs: one of 1, 2"),
        ({"patch_degree": 0}, "patch_degree: 0 is not allowed; this server draws on 2 GPUs: one of 1, 2"),
        (
            {"patch_degree": 2, "size": "64x72", "guidance_scale": 1.0},
            "patch_degree: 2 is not allowed; patch_degree 2 needs latent rows in multiples of 4, and",
        ),
        ({"patch_degree": "two"}, "patch_degree: 'two' is not allowed; an integer"),
    ],
)
def test_degrees_that_cannot_be(server: Server, body: dict[str, Any], told: str) -> None:
    reply = server.generate(**SHORT | body)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == "patch_degree"
    assert reply.json()["error"]["message"].startswith(told)


@pytest.mark.parametrize(
    ("fault", "degree", "told"),
    [(signal.SIGKILL, 1, "rank 1: has died"), (signal.SIGSTOP, 2, f"for {TIMEOUT_S} s"), (signal.SIGKILL, 2, "died")],
)
def test_a_rank_that_dies_or_hangs(server: Server, fault: signal.Signals, degree: int, told: str) -> None:
    """What runs fails with a reason, promptly; the ranks are started anew, also when no request comes."""
    before = server.generate(**SHORT, patch_degree=degree).json()
    restarts = server.metric("headstart_rank_restarts_total")
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.generate, **LONG, patch_degree=degree) for _ in range(2)]
        while server.metric("headstart_requests_running") < 2:
            time.sleep(0.01)
        (follower,) = server.followers
        os.kill(follower, fault)
        replies = [each.result() for each in running]
    assert [reply.status_code for reply in replies] == [503, 503]
    error = replies[0].json()["error"]
    assert error["code"] == "rank_lost"
    assert told in error["message"] or "a step took more than" in error["message"]
    end = time.monotonic() + 30
    while server.metric("headstart_rank_restarts_total") == restarts:
        assert time.monotonic() < end
        time.sleep(0.05)
    after = server.generate(**SHORT, patch_degree=degree).json()
    assert [picture["b64_json"] for picture in after["data"]] == [picture["b64_json"] for picture in before["data"]]
    assert follower not in server.followers


def test_a_rank_that_dies_while_nothing_runs_is_replaced(server: Server) -> None:
    (follower,) = server.followers
    os.kill(follower, signal.SIGKILL)
    end = time.monotonic() + 30
    while server.followers in ([], [follower]):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.generate(**SHORT).status_code == 200


def test_followers_end_with_a_server_that_is_killed(server: Server) -> None:
    """The last test of this server."""
    helpers = children(server.process.pid)
    followers = server.followers
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 10
    while parents().keys() & {*helpers, *followers}:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_generate_on_two_ranks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "a red fox",
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--size",
        "64x128",
        "--seed",
        "3",
    ]
    arguments += ["--device", "cpu", "--sampler", "ddim", "--steps", "3", "--quiet", "--json"]
    pictures = []
    for more in ([], ["--gpus", "2", "--patch-degree", "2"]):
        path = tmp_path / f"{len(more)}.png"
        assert main([*arguments, "-o", str(path), *more]) == 0
        pictures.append(path)
    assert '"patch_degree": 2' in capsys.readouterr().out
    assert difference(*pictures) <= 1


def difference(one: Path, other: Path) -> int:
    with Image.open(one) as first, Image.open(other) as second:
        return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


def test_fewer_gpus_than_are_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red fox", "--model", str(folder), "--gpus", "64"]) == 2
    assert "headstart: ranks.gpus: 64 is not allowed; " in capsys.readouterr().err
