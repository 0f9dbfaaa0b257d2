"""How captions are worded: weighted options for every part of a caption.

An option is its weight and one or several phrases. A star before a phrase keeps the option out of training: such
wordings test whether words never trained are understood. Weights in one row count relative to each other; those of
starred options, among themselves.
"""

from collections.abc import Mapping, Sequence

Option = tuple[float, str, *tuple[str, ...]]
Options = Sequence[Option]

# What opens a caption, before one thing and before several.
_OPENINGS = (
    (6, "a picture of"), (4, "an emoji of"), (3, "draw"), (3, "an image of"), (3, "a drawing of"), (2, "draw me"),
    (2, "an illustration of"), (2, "an icon of"), (1, "show me"), (1, "i want"), (1, "please draw"), (1, "picture of"),
    (1, "emoji of"), (1, "a cartoon of"), (1, "make"), (1, "*a depiction of"), (1, "*can you sketch"),
    (1, "*let me see"),
)  # fmt: skip
LEAD: Options = (
    (65, "", ""), (8, "there is", "there are"), (1, "here is", "here are"),
    *((weight, text, text) for weight, text in _OPENINGS)
)  # fmt: skip
TELEGRAM_LEAD: Options = ((92, ""), (4, "emoji of"), (2, "draw"), (2, "picture of"))

# Adjectives of each style, its own name foremost.
STYLE_WORDS: Mapping[str, Options] = {
    "3d": ((72, "3d"), (8, "rendered"), (8, "glossy"), (6, "3d rendered"),
           (1, "*three-dimensional")),
    "flat": ((76, "flat"), (14, "minimal"), (10, "simple flat"), (1, "*minimalist"), (1, "*two-dimensional")),
    "noto": ((76, "noto"), (14, "google"), (10, "google noto"), (1, "*android")),
    "twemoji": ((76, "twemoji"), (14, "twitter"), (10, "twitter emoji"), (1, "*tweet")),
}  # fmt: skip
# Where a style is named, with {a} for its article: opening, before everything, after the subject, at the end.
STYLED_LEAD: Options = (
    (3, "{a} {style} emoji of"), (2, "{a} {style} icon of"), (2, "{a} {style} picture of"), (2, "{style} emoji of"),
    (1, "draw {a} {style} picture of"), (1, "{a} {style} drawing of"), (1, "*{a} {style} pictogram of"),
)  # fmt: skip
STYLED_FRONT: Options = ((3, "{style} style ,"), (2, "{style} emoji ,"), (2, "{style} ,"), (1, "in {style} style ,"))
STYLED_MANNER: Options = (
    (5, "in {style} style"), (3, "in {a} {style} style"), (1, "drawn in {style} style"),
    (1, "*done the {style} way"), (1, "*with {a} {style} look"),
)  # fmt: skip
STYLED_AFTER: Options = (
    (5, ", {style} style"), (4, ", {style}"), (3, "in {style} style"), (1, ", drawn in {style} style"),
    (1, "*, {style} design"), (1, "*with {a} {style} look"),
)  # fmt: skip

FILLER: Options = ((94, ""), (3, "cute"), (1, "nice"), (1, "beautiful"), (0.5, "simple"), (0.5, "funny"))
SUFFIX: Options = ((93, ""), (4, "emoji"), (2, "icon"), (1, "sticker"))
SIZES: Mapping[str, Options] = {
    "small": ((5, "small"), (3, "tiny"), (2, "little"), (1, "*miniature"), (1, "*teeny")),
    "large": ((4, "large"), (4, "big"), (1, "huge"), (1, "giant"), (1, "*enormous"), (1, "*gigantic")),
}
# A colour said after its thing: one, several.
TINT_AFTER: Options = (
    (5, "in", "in"), (2, "that is", "that are"), (1, "coloured", "coloured"), (1, "painted", "painted"),
    (1, "*dyed", "*dyed"),
)  # fmt: skip
ARTICLES: Options = ((90, "a", "an"), (4, "the", "the"), (4, "one", "one"), (2, "", ""))

# Counts of two to five; of things whose word has no plural of its own ("scissors"), only the plain numbers.
NUMBERS: Mapping[int, Options] = {
    2: ((7, "two"), (3, "2")),
    3: ((7, "three"), (3, "3")),
    4: ((7, "four"), (3, "4")),
    5: ((7, "five"), (3, "5")),
}
COUNTS: Mapping[int, Options] = {
    2: (*NUMBERS[2], (1, "a pair of"), (1, "a couple of"), (1, "*twin"), (1, "*a duo of")),
    3: (*NUMBERS[3], (1, "a group of three"), (0.5, "a trio of"), (1, "*a set of three"), (1, "*a triplet of")),
    4: (*NUMBERS[4], (1, "a group of four"), (1, "*a set of four"), (1, "*a quartet of")),
    5: (*NUMBERS[5], (1, "a group of five"), (1, "*a set of five"), (1, "*a bunch of five")),
}

# Where the first group stands to the second. "under" is "on" told from below. After a verb: one phrase. Without one, or
# in telegram style: what comes between the groups, and what follows the second.
AFTER_VERB: Mapping[str, Options] = {
    "and": ((4, "next to"), (3, "beside"), (1, "side by side with"), (1, "*adjacent to")),
    "left of": ((6, "to the left of"), (3, "left of"), (2, "on the left of"), (1, "on the left side of"),
                (1, "*off to the left of"), (1, "*leftward of")),
    "right of": ((6, "to the right of"), (3, "right of"), (2, "on the right of"), (1, "on the right side of"),
                 (1, "*off to the right of"), (1, "*rightward of")),
    "above": ((6, "above"), (2, "over"), (1, "high above"), (1, "*higher than"), (1, "*up above")),
    "below": ((6, "below"), (2, "beneath"), (2, "underneath"), (1, "*lower than"), (1, "*down below")),
    "behind": ((7, "behind"), (1, "in back of"), (1, "*at the rear of"), (1, "*partly hidden by")),
    "in front of": ((8, "in front of"), (1, "right in front of"), (1, "*before")),
    "on": ((5, "on"), (4, "on top of"), (1, "*atop"), (1, "*upon")),
    "under": ((1, "under"),),
}  # fmt: skip
BETWEEN: Mapping[str, Options] = {
    "and": ((12, "and"), (3, "with"), (2, "next to"), (2, "beside"), (1, "*along with"), (1, "*together with")),
    "left of": (*AFTER_VERB["left of"], (1, "on the left and", "on the right"), (1, "on the left ,", "on the right"),
                (1, "*at the left side and", "at the right side")),
    "right of": (*AFTER_VERB["right of"], (1, "on the right and", "on the left"), (1, "on the right ,", "on the left"),
                 (1, "*at the right side and", "at the left side")),
    "above": (*AFTER_VERB["above"], (1, "at the top and", "at the bottom")),
    "below": (*AFTER_VERB["below"], (1, "at the bottom and", "at the top")),
    "behind": (*AFTER_VERB["behind"], (1, "with", "in front"), (1, "in the back and", "in the front")),
    "in front of": (*AFTER_VERB["in front of"], (1, "with", "behind"), (1, "in the front and", "in the back")),
    "on": AFTER_VERB["on"],
    "under": ((3, "under"), (4, "with", "on top"), (2, "carrying"), (1, "*topped by")),
}  # fmt: skip
TELEGRAM_BETWEEN: Mapping[str, Options] = {
    "and": ((5, "and"), (4, ","), (1, "+"), (1, "next to"), (1, "with")),
    "left of": ((3, "left of"), (1, "left ,", "right"), (1, "to the left of")),
    "right of": ((3, "right of"), (1, "right ,", "left"), (1, "to the right of")),
    "above": ((4, "above"), (1, "over"), (1, "top ,", "bottom")),
    "below": ((4, "below"), (1, "beneath"), (1, "bottom ,", "top")),
    "behind": ((1, "behind"),),
    "in front of": ((1, "in front of"),),
    "on": ((3, "on"), (2, "on top of")),
    "under": ((3, "under"), (1, "with", "on top")),
}
# Verbs before AFTER_VERB, of one thing and of several; "" is for a group that stands alone.
_STANDING: Options = (
    (6, "is", "are"), (2, "sits", "sit"), (2, "stands", "stand"), (1, "is placed", "are placed"),
    (1, "*is located", "*are located"), (1, "*rests", "*rest"),
)  # fmt: skip
_FLOATING: Options = ((5, "is", "are"), (2, "floats", "float"), (1, "hovers", "hover"), (1, "*is suspended", "*hang"))
_LYING: Options = ((5, "is", "are"), (1, "sits", "sit"), (1, "*rests", "*rest"))
VERBS: Mapping[str, Options] = {
    **dict.fromkeys(("and", "left of", "right of", "behind", "in front of", "on"), _STANDING),
    "above": _FLOATING,
    "below": _LYING,
    "under": _LYING,
    "": ((2, "is shown", "are shown"), (1, "can be seen", "can be seen")),
}
_STANDING_THERE: Options = ((86, ""), (6, "sitting"), (6, "standing"), (2, "placed"))
PARTICIPLES: Mapping[str, Options] = {
    **dict.fromkeys(("and", "left of", "right of", "behind", "in front of", "on"), _STANDING_THERE),
    "above": ((88, ""), (8, "floating"), (4, "hovering")),
}
STOP: Options = ((96, ""), (4, "."))
SENTENCE_STOP: Options = ((60, ""), (40, "."))

# Other words for a colour of the background or of a thing, kept out of training.
UNSEEN_COLOURS: Mapping[str, tuple[str, ...]] = {
    "red": ("scarlet",), "orange": ("tangerine",), "yellow": ("lemon yellow",), "green": ("emerald",),
    "blue": ("azure",), "purple": ("amethyst",), "pink": ("rosy",), "gray": ("ash gray",), "black": ("pitch black",),
    "white": ("snow white",), "brown": ("chestnut brown",),
}  # fmt: skip
# Trained ones, for things only (concepts.COLOUR_WORDS has those of backgrounds).
TINT_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("bright red",), "orange": ("bright orange",), "yellow": ("bright yellow",), "green": ("bright green",),
    "blue": ("bright blue",), "purple": ("violet",), "pink": ("bright pink",), "gray": ("grey",),
}  # fmt: skip

# Backgrounds: before the first colour ({a} is its article), between the colours, after. Pictorial ones have no colour.
GROUND: Mapping[str, Options] = {
    "plain": (
        (34, "on {a}", "", "background"), (8, "on", "", "background"), (14, "on", "", ""),
        (14, ",", "", "background"), (12, "with {a}", "", "background"), (4, "against {a}", "", "background"),
        (3, "on {a} plain", "", "background"), (2, "on {a} solid", "", "background"), (2, "on {a}", "", "backdrop"),
        (3, "in front of {a}", "", "background"),
        (1, "*in front of {a} plain", "", "backdrop"), (1, "*set against plain", "", ""),
        (1, "*with everything behind in", "", ""),
    ),
    "gradient": (
        (28, "on {a}", "to", "gradient"), (18, "on {a}", "to", "gradient background"), (8, ",", "to", "gradient"),
        (10, "with {a}", "to", "gradient background"), (10, "on a gradient from", "to", ""),
        (8, "on a gradient background from", "to", ""), (4, "on {a}", "and", "gradient"),
        (5, "with a gradient from", "to", ""), (3, "on a background fading from", "to", ""),
        (1, "*against a blend from", "to", ""), (1, "*on a backdrop that turns from", "to", ""),
    ),
    "stripes": (
        (4, "on", "and", "stripes"), (4, "with", "and", "stripes"), (3, "on {a}", "and", "striped background"),
        (3, "on {a}", "background with", "stripes"), (2, "on a striped", "and", "background"),
        (2, "in front of", "and", "stripes"), (2, "with {a}", "and", "striped background"),
        (2, "on", "with", "stripes"), (1, "*against", "and", "bands"), (1, "on {a}", "*backdrop striped in", ""),
    ),
    "dots": (
        (4, "on {a}", "background with", "dots"), (3, "on", "with", "polka dots"),
        (3, "on {a}", "background with", "polka dots"), (2, "on", "with", "dots"),
        (2, "with {a}", "background and", "dots"), (2, "with {a}", "background and", "polka dots"),
        (1, "*against", "dotted in", ""), (1, "on {a}", "*backdrop with", "spots"),
    ),
    "sky and grass": (
        (4, "in a meadow under a blue sky"), (4, "on the grass"), (3, "in a meadow"), (3, "on grass under a blue sky"),
        (2, "in a field"), (2, "on green grass"), (2, "in a grassy field"), (2, "with sky and grass"),
        (2, "on the grass under the sky"), (1, "in the park"), (1, "with a grass and sky background"),
        (1, "*out in a green pasture"), (1, "*on a lawn under blue skies"),
    ),
    "sea": (
        (4, "by the sea"), (3, "at sea"), (3, "on the sea"), (2, "in front of the sea"), (2, "on the ocean"),
        (2, "with the sea in the background"), (2, "by the ocean"), (1, "on the water"), (1, "with a sea background"),
        (1, "over the waves"), (1, "*out on the open ocean"), (1, "*amid the ocean waves"),
    ),
    "night": (
        (5, "at night"), (4, "under a starry sky"), (2, "under the stars"), (2, "in front of a night sky"),
        (2, "with a night sky"), (2, "on a starry night"), (2, "in the night"), (1, "against a starry night sky"),
        (1, "with stars in the background"), (1, "*beneath the night stars"), (1, "*after dark"),
    ),
    "sand": (
        (5, "on the beach"), (4, "on sand"), (3, "on the sand"), (2, "on a beach"), (2, "on a sandy beach"),
        (2, "in the desert"), (2, "in the sand"), (1, "with a sand background"),
        (1, "*on a sandy shore"), (1, "*among desert dunes"),
    ),
    "table": (
        (5, "on a wooden table"), (5, "on a table"), (3, "on the table"), (1, "on top of a wooden table"),
        (1, "on a brown table"), (1, "with a table background"), (1, "on a table top"),
        (1, "*on a wooden desk"), (1, "*on a wooden countertop"),
    ),
}  # fmt: skip
TELEGRAM_GROUND: Mapping[str, Options] = {
    "plain": ((5, ",", "", "background"), (3, "on", "", ""), (2, "on", "", "background"), (1, "", "", "background")),
    "gradient": ((4, ",", "to", "gradient"), (2, ",", "and", "gradient"), (2, "on", "to", "gradient"),
                 (1, ", gradient", "to", "")),
    "stripes": ((4, ",", "and", "stripes"), (2, ",", "with", "stripes"), (1, "on", "and", "stripes"),
                (1, ", stripes", "and", "")),
    "dots": ((4, ",", "with", "dots"), (3, ",", "with", "polka dots"), (1, "on", "with", "dots"),
             (1, ",", "and", "dots")),
    "sky and grass": ((3, ", meadow"), (3, ", grass and sky"), (2, ", grass"), (2, "in meadow"), (1, "on grass"),
                      (1, ", field"), (1, ", sky and grass")),
    "sea": ((4, ", sea"), (3, ", ocean"), (1, "at sea"), (1, ", sea background"), (1, ", waves")),
    "night": ((4, ", night"), (3, ", night sky"), (2, "at night"), (2, ", starry sky"), (1, ", stars")),
    "sand": ((4, ", beach"), (3, ", sand"), (2, "on beach"), (1, "on sand"), (1, ", desert")),
    "table": ((3, ", table"), (3, ", wooden table"), (2, "on table"), (1, "on wooden table")),
}  # fmt: skip
FRONT_GROUND: Mapping[str, Options] = {
    "plain": ((5, "on {a}", "", "background ,"), (4, "", "", "background ,")),
    "gradient": ((3, "on {a}", "to", "gradient ,"), (2, "", "to", "gradient background ,"),
                 (1, "", "to", "gradient ,")),
    "stripes": ((3, "on", "and", "stripes ,"), (2, "", "and", "stripes ,")),
    "dots": ((3, "on", "with", "dots ,"), (2, "", "background with", "polka dots ,")),
    "sky and grass": ((2, "in a meadow under a blue sky ,"), (2, "on the grass ,"), (1, "in a meadow ,"),
                      (1, "meadow ,"), (1, "grass and sky ,")),
    "sea": ((2, "by the sea ,"), (1, "at sea ,"), (1, "sea ,"), (1, "ocean ,")),
    "night": ((3, "at night ,"), (2, "under a starry sky ,"), (1, "night sky ,"), (1, "night ,")),
    "sand": ((3, "on the beach ,"), (1, "on sand ,"), (1, "beach ,")),
    "table": ((2, "on a wooden table ,"), (2, "on a table ,"), (1, "wooden table ,")),
}  # fmt: skip
