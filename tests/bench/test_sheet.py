"""The sheets of docs/: every picture in its cell, every prompt below it."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import sheet


def test_cells_have_their_pictures_and_prompts() -> None:
    prompts = ["a cat", "clock on a striped yellow and black background, and much more of it than fits one line", "fox"]
    pictures = [[np.full((8, 8, 3), 10 * (3 * run + i), np.uint8) for i in range(3)] for run in range(2)]
    made = np.asarray(sheet.make_sheet(prompts, pictures, "two runs"))
    step = 2 * sheet.SIDE + 2 * sheet.GAP
    assert made.shape[1] == 3 * step + sheet.GAP
    grey = made[..., 0]
    rows = np.flatnonzero(grey[:, sheet.GAP + 5] == 0)  # the first prompt's first picture is black
    top = int(rows[rows > 2 * sheet.FONT][0])
    for run in range(2):
        for number in range(3):
            left = sheet.GAP + number * step + run * sheet.SIDE
            assert (grey[top : top + sheet.SIDE, left : left + sheet.SIDE] == 10 * (3 * run + number)).all()
    below = grey[top + sheet.SIDE :]
    inks = [int((below[:, sheet.GAP + i * step : (i + 1) * step] < 128).sum()) for i in range(3)]
    assert inks[1] > 2 * inks[0] > 0
    assert inks[2] > 0


def test_runs_are_a_sampler_and_steps() -> None:
    assert sheet.parse_run("ddim:50") == ("ddim", 50)
    for wrong in ("ddim", ":4", "lcm:few"):
        with pytest.raises(argparse.ArgumentTypeError, match="SAMPLER:STEPS, such as ddim:50"):
            sheet.parse_run(wrong)
