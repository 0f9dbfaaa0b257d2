"""The prompts of evaluation: records of what each prompt asks for, as JSON Lines, and free ones for a sheet.

A record is a plain dictionary, so that the service can score pictures without this package:

    {"id", "group", "prompt", "objects": [{"concept", "count", "colour", "size"}, ...], "relation", "style",
     "background": {"ground", "colours"}, "seed", "twin"}

What the prompt does not say is null: an object's colour and size, the relation of a single object, style, background.
The scenes of SYNONYMS and PHRASINGS are trained ones, told in words that are not; each has a twin in the group TWINS,
the same scene and seed in trained words, and the two name each other in "twin".
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.training.captions import CaptionWriter, describe
from models.training.concepts import COLOUR_NAMES, STYLES, TINTS, WHITE
from models.training.grounds import COLOURED, GROUNDS, PLAIN
from models.training.layouts import RELATIONS
from models.training.scenes import Scenes, Stage

Record = dict[str, Any]

# Groups by the kind of held-out scene that they are made of.
HELD_OUT = {
    "single": ("single", 200),
    "recoloured": ("recoloured", 150),
    "sized": ("sized", 50),
    "relations": ("pair", 250),
    "counts": ("counts", 150),
    "mixed": ("mixed", 100),
}
SYNONYMS, PHRASINGS, TWINS = "synonyms", "phrasings", "twins"
PARAPHRASES = 50  # prompts in each of the two
_SIZES = (None, "small", "large")
_CANDIDATES = 2000
_NAMES = ("concept", "count", "tint", "size", "relation", "style", "ground", "top", "bottom", "styled", "named")


def records(stage: Stage, writer: CaptionWriter, seed: int) -> list[Record]:
    """1,000 prompts and the 100 twins, the same for the same seed on the same device; `writer` writes unseen wordings.

    Raises ValueError where the concepts have too few unseen words or nothing held out.
    """
    with torch.random.fork_rng(devices=[] if stage.device.type == "cpu" else [stage.device]):
        torch.manual_seed(seed)
        out: list[Record] = []
        for group, (kind, count) in HELD_OUT.items():
            scenes = stage.sample_held_out(count, kind)
            out += records_of(group, scenes, describe(scenes, stage.concepts), stage, len(out))
        twins: list[Record] = []
        for group, (scenes, prompts) in (
            (SYNONYMS, _synonyms(stage)),
            (PHRASINGS, _phrasings(stage, writer)),
        ):
            paraphrased = records_of(group, scenes, prompts, stage, len(out))
            plain = records_of(TWINS, scenes, describe(scenes, stage.concepts), stage, len(out))
            for one, twin in zip(paraphrased, plain, strict=True):
                twin["id"] = one["twin"] = f"{one['id']}-twin"
                twin["twin"] = one["id"]
            out += paraphrased
            twins += plain
    return out + twins


def records_of(group: str, scenes: Scenes, prompts: Sequence[str], stage: Stage, start: int) -> list[Record]:
    """Records of scenes and their prompts; seeds count on from `start`."""
    columns = zip(*(getattr(scenes, name).tolist() for name in _NAMES), prompts, strict=True)
    out: list[Record] = []
    for row, (concept, count, tint, size, relation, style, ground, top, bottom, styled, named, prompt) in enumerate(
        columns
    ):
        objects = [
            {
                "concept": stage.concepts[concept[g]].name,
                "count": count[g],
                "colour": TINTS[tint[g] - 1] if tint[g] else None,
                "size": _SIZES[size[g]],
            }
            for g in (0, 1)
            if count[g]
        ]
        colours = [] if ground >= COLOURED else [top] if ground == PLAIN else [top, bottom]
        background = {"ground": GROUNDS[ground], "colours": [COLOUR_NAMES[colour] for colour in colours]}
        out.append(
            {
                "id": f"{group}-{row:03d}",
                "group": group,
                "prompt": prompt,
                "objects": objects,
                "relation": RELATIONS[relation] if len(objects) == 2 else None,
                "style": STYLES[style] if styled else None,
                "background": background if named else None,
                "seed": start + row,
                "twin": None,
            }
        )
    return out


def _synonyms(stage: Stage) -> tuple[Scenes, list[str]]:
    """Trained scenes of one object, and their plain prompts with a word for it that was never trained."""
    scenes = stage.sample(_CANDIDATES)
    one = (scenes.count[:, 0] == 1) & (scenes.count[:, 1] == 0)
    bare = (one & (scenes.tint[:, 0] == 0) & (scenes.size[:, 0] == 0)).tolist()
    uses: Counter[int] = Counter()
    candidates = []
    for row, (concept, suits) in enumerate(zip(scenes.concept[:, 0].tolist(), bare, strict=True)):
        # "blue whale" would ask for a colour.
        unseen = [word for word in stage.concepts[concept].unseen if not set(word.split()) & {*COLOUR_NAMES, *TINTS}]
        if suits and unseen:
            candidates.append((uses[concept], row, unseen[uses[concept] % len(unseen)]))
            uses[concept] += 1
    chosen = sorted(candidates)[:PARAPHRASES]  # as many different concepts as there are
    if len(chosen) < PARAPHRASES:
        raise ValueError("too few of these concepts have unseen words")
    scenes = scenes[torch.tensor([row for _, row, _ in chosen], device=stage.device)]
    return scenes, describe(scenes, stage.concepts, [word for *_, word in chosen])


def _phrasings(stage: Stage, writer: CaptionWriter) -> tuple[Scenes, list[str]]:
    """Trained scenes, and captions with phrases that were never trained."""
    scenes = stage.sample(_CANDIDATES)
    slots = writer.slots(scenes)
    unseen = torch.tensor(sorted(writer.phrases.unseen), device=slots.device)
    chosen = torch.isin(slots, unseen).any(1).nonzero()[:PARAPHRASES, 0]
    if len(chosen) < PARAPHRASES:
        raise ValueError("the writer uses no unseen wordings")
    return scenes[chosen], writer.texts(slots[chosen])


def scenes_of(records: Sequence[Record], stage: Stage) -> Scenes:
    """Scenes that show what the records ask for, arranged at random.

    Where a record names no style it is drawn in 3d if that draws its concepts, as in training; where it names no
    background, on white.
    """
    index = {concept.name: number for number, concept in enumerate(stage.concepts)}
    drawn = stage.drawn.tolist()
    rows = []
    for record in records:
        objects = [*record["objects"], *([None] if len(record["objects"]) == 1 else [])]
        concepts = [index[thing["concept"]] for thing in record["objects"]]
        styles = [style for style in range(len(STYLES)) if all(drawn[concept][style] for concept in concepts)]
        background = record["background"] or {"ground": "plain", "colours": []}
        colours = [COLOUR_NAMES.index(colour) for colour in background["colours"]] or [WHITE]
        rows.append(
            (
                [concepts[0], concepts[-1]],
                [thing["count"] if thing else 0 for thing in objects],
                [1 + TINTS.index(thing["colour"]) if thing and thing["colour"] else 0 for thing in objects],
                [_SIZES.index(thing["size"]) if thing else 0 for thing in objects],
                RELATIONS.index(record["relation"] or "and"),
                STYLES.index(record["style"]) if record["style"] else styles[0],
                GROUNDS.index(background["ground"]),
                colours[0],
                colours[-1],
                record["style"] is not None,
                record["background"] is not None,
            )
        )
    return stage.arrange(*(torch.tensor(column, device=stage.device) for column in zip(*rows, strict=True)))


def write_records(path: Path, records: Sequence[Record]) -> None:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """The records of `write_records`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


# As people type them: of the trained domain, of its words in other combinations, and a little beyond.
SHEET_PROMPTS = (
    "blue apple",
    "a cat on a skateboard",
    "three bananas on a purple background",
    "a dog and a cat on the beach",
    "robot at night",
    "A tiny penguin under a starry sky",
    "two red cars",
    "a dragon behind a castle, flat style",
    "pizza, noto",
    "a green horse in a meadow",
    "rocket above a volcano",
    "an owl to the left of a full moon at night",
    "purple elephant on a wooden table",
    "five mushrooms in the grass",
    "a whale by the sea",
    "kitty, pink background",
    "Draw me a unicorn on a rainbow gradient",
    "crab on the beach, 3d",
    "a cup of coffee next to a croissant on a table",
    "a big pumpkin and two small pumpkins",
    "snowman on a sky blue to white gradient",
    "sad face with red and white stripes",
    "a frog sitting on a mushroom",
    "yellow submarine",
    "ghost under the stars, twemoji style",
    "a pair of shoes",
    "fox in front of a tree",
    "4 cupcakes with polka dots",
    "an astronaut riding a horse",
    "a turtle below a balloon",
    "hot dog on orange background",
    "camel in the desert",
    "a sailboat at sea in flat style",
    "bee next to a sunflower in a field",
    "There is a lion to the right of a tiger.",
    "teddy bear with a red balloon",
    "a giant strawberry",
    "cactus, sand, minimal",
    "a violin and a trumpet on a navy background",
    "a pink dinosaur on a lawn",
    "shark over a boat",
    "christmas tree with three gifts",
    "a monkey eating a banana",
    "an umbrella in the rain",
    "two parrots and a pineapple",
    "clock on a striped yellow and black background",
    "a spooky skull at night",
    "green book on a table",
    "an orange ship on the ocean",
    "panda, emoji, google style",
    "a wolf howling at the moon",
    "heart",
    "a queen's crown on top of a blue box",
    "snail in front of a house in a meadow",
    "alien and ufo, black background",
    "octopus playing drums",
    "a glossy cherry on white",
    "chess game",
    "train left of bus",
    "a rose in a vase by candlelight",
    "happy birthday cake, mint background with pink dots",
    "gray rabbit and orange carrot",
    "a city skyline at sunset",
    "the last dinosaur looks at a comet",
)
