"""How captions are worded: weighted phrases for every part of a caption."""

from collections.abc import Sequence

Weighted = Sequence[tuple[float, str]]

PREFIX: Weighted = (
    (0.72, ""), (0.06, "a picture of"), (0.05, "an emoji of"), (0.03, "an icon of"), (0.02, "a drawing of"),
    (0.02, "an image of"), (0.02, "an illustration of"), (0.02, "emoji of"), (0.02, "picture of"), (0.01, "a photo of"),
    (0.01, "draw"), (0.01, "a cartoon of"), (0.01, "a cute emoji of"),
)  # fmt: skip
STYLED_PREFIX: dict[str, Weighted] = {
    "3d": ((0.3, "a 3d emoji of"), (0.2, "a 3d icon of"), (0.2, "a 3d render of"), (0.2, "3d emoji of"),
           (0.1, "a 3d picture of")),
    "flat": ((0.3, "a flat emoji of"), (0.2, "a flat icon of"), (0.2, "a flat drawing of"), (0.2, "flat emoji of"),
             (0.1, "a flat picture of")),
}  # fmt: skip
MANNER: dict[str, Weighted] = {
    "3d": ((0.5, "in 3d"), (0.5, "in 3d style")),
    "flat": ((0.7, "in flat style"), (0.3, "in a flat style")),
}
AFTER: dict[str, Weighted] = {
    "3d": ((0.5, ", 3d"), (0.3, ", 3d style"), (0.2, "in 3d")),
    "flat": ((0.5, ", flat"), (0.3, ", flat style"), (0.2, "in flat style")),
}
FILLER: Weighted = (
    (0.93, ""), (0.035, "cute"), (0.01, "nice"), (0.01, "beautiful"), (0.005, "cartoon"), (0.005, "simple"),
    (0.005, "funny"),
)  # fmt: skip
SUFFIX: Weighted = ((0.93, ""), (0.04, "emoji"), (0.02, "icon"), (0.01, "sticker"))
SMALL: Weighted = ((0.5, "small"), (0.3, "tiny"), (0.2, "little"))
LARGE: Weighted = ((0.4, "large"), (0.4, "big"), (0.1, "huge"), (0.1, "giant"))
TWO: Weighted = ((0.7, "two"), (0.15, "2"), (0.08, "a pair of"), (0.07, "a couple of"))
THREE: Weighted = ((0.8, "three"), (0.2, "3"))
LEFT: Weighted = (
    (0.32, "and"), (0.15, "next to"), (0.08, "beside"), (0.2, "to the left of"), (0.1, "left of"), (0.05, "with"),
    (0.1, "on the left of"),
)  # fmt: skip
RIGHT: Weighted = ((0.55, "to the right of"), (0.25, "right of"), (0.2, "on the right of"))
STOP: Weighted = ((0.96, ""), (0.04, "."))

# Background wordings: weight, before the colour ({a} is its article), between two colours, after.
Wording = tuple[float, str, str, str]
PLAIN: Sequence[Wording] = (
    (0.34, "on {a}", "", "background"), (0.08, "on", "", "background"), (0.16, "on", "", ""),
    (0.16, ",", "", "background"), (0.12, "with {a}", "", "background"), (0.03, "against {a}", "", "background"),
    (0.02, "", "", "background"), (0.02, "on {a} plain", "", "background"), (0.02, "on {a} solid", "", "background"),
    (0.02, "on {a}", "", "backdrop"), (0.02, "in front of {a}", "", "background"),
)  # fmt: skip
GRADIENT: Sequence[Wording] = (
    (0.28, "on {a}", "to", "gradient"), (0.2, "on {a}", "to", "gradient background"), (0.1, ",", "to", "gradient"),
    (0.1, "with {a}", "to", "gradient background"), (0.1, "on a gradient from", "to", ""),
    (0.08, "on a gradient background from", "to", ""), (0.05, "on {a}", "and", "gradient"),
    (0.05, "with a gradient from", "to", ""), (0.04, ",", "to", "gradient background"),
)  # fmt: skip
FRONT_PLAIN: Sequence[Wording] = ((0.6, "on {a}", "", "background ,"), (0.4, "", "", "background ,"))
FRONT_GRADIENT: Sequence[Wording] = ((0.6, "on {a}", "to", "gradient ,"), (0.4, "", "to", "gradient background ,"))
