"""Every row of every branch is computed by exactly one rank, and neighbours hold neighbouring rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.patch.mesh import places


@given(st.integers(1, 16), st.booleans(), st.integers(1, 20), st.data())
def test_shares_cover_the_picture_once(half: int, split: bool, band: int, data: st.DataObject) -> None:
    degree = 2 * half if split else half
    shares = places(degree, split=split)
    assert len(shares) == degree
    height = band * shares[0].parts
    computed = [
        (branch, row)
        for share in shares
        for branch in ((0, 1) if share.branch is None else (share.branch,))
        for row in range(height)[share.rows(height)]
    ]
    assert sorted(computed) == [(branch, row) for branch in (0, 1) for row in range(height)]
    rank = data.draw(st.integers(0, degree - 1))
    if shares[rank].part:
        above, below = shares[rank - 1], shares[rank]
        assert above.branch == below.branch
        assert above.rows(height).stop == below.rows(height).start


@pytest.mark.parametrize(
    ("degree", "split", "allowed"), [(0, False, "at least 1"), (3, True, "even"), (0, True, "even")]
)
def test_degrees_that_cannot_be(degree: int, split: bool, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"degree: {degree}; allowed: {allowed}"):
        places(degree, split=split)
