"""On a CPU there are no streams: what is issued within one is issued all the same, in any thread."""

from __future__ import annotations

import threading

import torch

from accel.streams import urgent_stream


def test_a_cpu_has_no_streams_and_needs_none() -> None:
    around = urgent_stream(torch.device("cpu"))
    sums: list[float] = []

    def work() -> None:
        with around():
            sums.append(float(torch.ones(3).sum()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with around(), around():
        work()
    assert sums == [3.0] * 3
