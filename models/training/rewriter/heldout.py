"""The held-out prompts: noise, words and phrasings that are kept out of training, as records that can be judged."""

from collections.abc import Sequence

from models.training.concepts import Concept
from models.training.prompts import TWINS, Record
from models.training.rewriter.pairs import FOREIGN, KINDS, Pair, PairWriter
from models.training.rewriter.scenes import record_of

EACH = 20  # of every kind
SEED = "held out"


def held_out(writer: PairWriter, each: int = EACH) -> list[Pair]:
    """So many prompts of every kind, 200 in all; `writer` writes what is unseen."""
    return [pair for kind in KINDS for pair in writer.write(f"{SEED} {kind}", each, [kind])]


def other_wordings(writer: PairWriter, pairs: Sequence[Pair]) -> list[Pair]:
    """Another prompt of each pair's meaning, as a trained noise spoils it; of a foreign subject, the same again."""
    known = [pair.meaning for pair in pairs if pair.meaning is not None]
    noisy = [kind for kind in KINDS if kind != FOREIGN]
    again = iter(writer.word(f"{SEED} again", known, noisy))
    return [pair if pair.meaning is None else next(again) for pair in pairs]


def records(pairs: Sequence[Pair], concepts: Sequence[Concept]) -> list[Record]:
    """A record a pair with its prompt, then twins with the captions; a foreign subject shows nothing that is judged."""
    noisy: list[Record] = []
    twins: list[Record] = []
    nothing: Record = {"objects": None, "relation": None, "style": None, "background": None}
    for row, pair in enumerate(pairs):
        name = f"{pair.kind}-{row:03d}"
        shown = nothing if pair.meaning is None else record_of(pair.meaning, concepts)
        record = {"id": name, "group": pair.kind, "prompt": pair.prompt, **shown, "seed": row, "twin": None}
        if pair.meaning is not None:
            record["twin"] = f"{name}-twin"
            twins.append({**record, "id": record["twin"], "group": TWINS, "prompt": pair.caption, "twin": name})
        noisy.append(record)
    return noisy + twins
