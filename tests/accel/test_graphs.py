"""Buckets of captured graphs: which size a batch runs in, and that a replay does what the function does."""

from __future__ import annotations

import itertools

import pytest
import torch

from accel.graphs import BucketGraphs, bucket_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_sizes_grow_up_to_the_largest() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(12) == [1, 2, 4, 8, 12]
    sizes = bucket_sizes(256)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 256
    assert all(after - before <= 32 for before, after in itertools.pairwise(sizes))


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it() -> None:
    graphs = BucketGraphs(lambda size: size, [4, 1, 2], CUDA)
    assert [graphs.bucket(count) for count in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]


def test_without_cuda_the_function_runs_as_it_is() -> None:
    data = torch.arange(4.0)
    graphs = BucketGraphs(lambda size: data[:size] * 2, [4], CPU)
    graphs.capture()
    assert graphs.bucket(3) == 3
    assert graphs.bucket(5) is None
    data += 1
    assert graphs(3).tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("sizes", [[], [0, 1]])
def test_sizes_must_be_positive(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sizes: .* allowed: at least one"):
        BucketGraphs(lambda size: size, sizes, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replay_reads_what_the_buffers_hold_now() -> None:
    data = torch.zeros(8, device=CUDA)
    calls = []

    def function(size: int) -> torch.Tensor:
        calls.append(size)
        return data[:size] * 2

    graphs = BucketGraphs(function, [2, 4, 8], CUDA)
    graphs.capture()
    seen = len(calls)
    data.copy_(torch.arange(8.0))
    assert graphs(4).tolist() == [0.0, 2.0, 4.0, 6.0]
    data += 1
    assert graphs(2).tolist() == [2.0, 4.0]
    assert len(calls) == seen
