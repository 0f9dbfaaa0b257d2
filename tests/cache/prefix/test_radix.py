from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.prefix.pages import PagePool, PoolEmpty
from cache.prefix.radix import Match, Node, RadixTree
from tests.cache.prefix.checks import check_tree, nodes


def word(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


@dataclass
class Shelf:
    """A tree, and pages given to it as a sequence would: filled, inserted, and let go."""

    pool: PagePool = field(default_factory=lambda: PagePool(64, 4))

    def __post_init__(self) -> None:
        self.tree = RadixTree(self.pool)

    def put(self, text: str, salt: str = "") -> list[int]:
        pages = self.pool.allocate(self.pool.covering(len(text)))
        self.tree.insert(word(text), pages, salt)
        for page in pages:
            self.pool.release(page)
        return pages

    def match(self, text: str, salt: str = "") -> Match:
        return self.tree.match(word(text), salt)

    def length(self, text: str, salt: str = "") -> int:
        return self.tree.length(word(text), salt)

    def check(self, *locked: Node) -> None:
        check_tree(self.tree, self.pool, locked)


def test_an_empty_tree_knows_nothing():
    shelf = Shelf()
    assert shelf.match("abc") == Match(None, [], 0)
    assert shelf.length("abc") == 0
    assert shelf.tree.insert((), [], "") == Match(None, [], 0)
    assert shelf.tree.evict(5) == 0
    shelf.check()


def test_a_match_ends_at_any_token_and_has_the_pages_that_cover_it():
    shelf = Shelf()
    pages = shelf.put("abcdefghij")
    for length in range(1, 11):
        match = shelf.match("abcdefghij"[:length] + "zz")
        assert (match.length, match.pages) == (length, pages[: shelf.pool.covering(length)])
        shelf.check()


def test_looking_changes_nothing():
    shelf = Shelf()
    shelf.put("abcdefghij")
    assert [shelf.length(text) for text in ("abcdefghijk", "abcx", "x", "")] == [10, 3, 0, 0]
    assert len(list(nodes(shelf.tree))) == 2


def test_the_deepest_node_tells_which_page_it_is():
    """As in the module's drawing: two users after one system prompt that ends inside a page."""
    shelf = Shelf()
    first = shelf.put("abcdefghijk")
    second = shelf.put("abcdefxy")
    assert shelf.match("abcdefghijk").pages == first
    assert shelf.match("abcdefxy").pages == [first[0], second[1]]
    assert shelf.match("abcdef").pages == first[:2]
    shelf.check()


def test_what_was_known_keeps_its_pages_and_the_caller_learns_them():
    shelf = Shelf()
    known = shelf.put("abcdefgh")
    again = shelf.pool.allocate(3)
    match = shelf.tree.insert(word("abcdefghijkl"), again, "")
    assert match.pages == [*known, again[2]]
    assert [shelf.pool.references(page) for page in again] == [1, 1, 2]


def test_a_page_that_begins_another_is_given_back():
    """A turn of a conversation ends inside a page; the next turn fills that page further, in a copy."""
    shelf = Shelf()
    shelf.put("abcdef")
    longer = shelf.put("abcdefgh")
    assert shelf.match("abcdef").pages[1] == longer[1]
    assert shelf.pool.free == shelf.pool.pages - 2
    shelf.check()


def test_salts_share_nothing():
    shelf = Shelf()
    ours, theirs = shelf.put("abcdefgh", "us"), shelf.put("abcdefgh", "them")
    assert shelf.length("abcdefgh", "others") == 0
    assert shelf.match("abcdefgh", "us").pages == ours
    assert shelf.match("abcdefgh", "them").pages == theirs
    assert not set(ours) & set(theirs)


def test_the_least_recently_used_leaf_goes_first_and_from_its_end():
    shelf = Shelf()
    shelf.put("aaaabbbbcc")
    shelf.put("xxxxyyyy")
    shelf.match("aaaabbbbcc")
    assert shelf.tree.evict(1) == 1
    assert (shelf.length("xxxxyyyy"), shelf.length("aaaabbbbcc")) == (4, 10)
    assert shelf.tree.evict(2) == 2
    assert (shelf.length("xxxxyyyy"), shelf.length("aaaabbbbcc")) == (0, 8)
    shelf.check()


def test_a_parent_goes_after_its_children():
    shelf = Shelf()
    shelf.put("aaaabbbb")
    shelf.put("aaaacccc")
    shelf.match("aaaa")
    assert shelf.tree.evict(2) == 2
    assert shelf.length("aaaabbbb") == 4
    assert shelf.tree.evict(9) == 1
    assert shelf.tree.roots == {}


def test_locked_nodes_stay_and_what_hangs_below_them_goes():
    shelf = Shelf()
    shelf.put("aaaabbbb")
    node = shelf.match("aaaabb").node
    assert node is not None
    shelf.tree.lock(node)
    shelf.check(node)
    assert shelf.tree.evict(9) == 0  # the page in which the lock ends is held for its first half
    assert shelf.length("aaaabbbb") == 6
    shelf.tree.unlock(node)
    assert shelf.tree.evict(9) == 2
    shelf.check()


def test_a_lock_taken_before_a_split_holds_both_halves():
    shelf = Shelf()
    shelf.put("aaaabbbb")
    node = shelf.match("aaaabbbb").node
    assert node is not None
    shelf.tree.lock(node)
    shelf.match("aaaa")
    shelf.check(node)
    assert shelf.tree.evict(9) == 0
    shelf.tree.unlock(node)
    shelf.check()


def test_unlocking_what_is_not_locked_is_an_error():
    shelf = Shelf()
    shelf.put("aaaa")
    node = shelf.match("aaaa").node
    assert node is not None
    with pytest.raises(ValueError, match="not locked"):
        shelf.tree.unlock(node)


def test_pages_that_do_not_cover_the_tokens_are_an_error():
    shelf = Shelf()
    with pytest.raises(ValueError, match="1 pages for 5 tokens of 4"):
        shelf.tree.insert(word("abcde"), shelf.pool.allocate(1), "")


def test_pages_held_elsewhere_are_let_go_but_not_counted_as_freed():
    shelf = Shelf()
    pages = shelf.pool.allocate(1)
    shelf.tree.insert(word("aaaa"), pages, "")
    shelf.put("bbbb")
    assert shelf.tree.evict(1) == 1
    assert (shelf.length("aaaa"), shelf.length("bbbb")) == (0, 0)
    assert shelf.pool.references(pages[0]) == 1


words = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)
salts = st.sampled_from(["", "tenant"])


class Trees(RuleBasedStateMachine):
    """Against a memory that knows which history of tokens every place of every page was filled with."""

    @initialize(pages=st.integers(4, 20), size=st.integers(1, 4))
    def start(self, pages: int, size: int):
        self.pool = PagePool(pages, size)
        self.tree = RadixTree(self.pool)
        self.memory: dict[tuple[int, int], object] = {}  # (page, place): (salt, tokens up to there)
        self.inserted: list[tuple[str, tuple[int, ...]]] = []
        self.locked: list[Node] = []
        self.evicted = False

    @rule(tokens=words, salt=salts)
    def insert(self, tokens: tuple[int, ...], salt: str):
        try:
            pages = self.pool.allocate(self.pool.covering(len(tokens)))
        except PoolEmpty:
            return
        for at in range(len(tokens)):
            page, place = divmod(at, self.pool.page_size)
            self.memory[pages[page], place] = (salt, tokens[: at + 1])
        match = self.tree.insert(tokens, pages, salt)
        assert match.length == len(tokens)
        self.holds(match, tokens, salt)
        for page in pages:
            self.pool.release(page)
        self.inserted.append((salt, tokens))

    @rule(tokens=words, salt=salts, lock=st.booleans())
    def match(self, tokens: tuple[int, ...], salt: str, lock: bool):
        known = [common(tokens, other) for name, other in self.inserted if name == salt]
        length = self.tree.length(tokens, salt)
        match = self.tree.match(tokens, salt)
        assert match.length == length <= max(known, default=0)
        assert self.evicted or length == max(known, default=0)
        self.holds(match, tokens, salt)
        if lock and match.node is not None:
            self.tree.lock(match.node)
            self.locked.append(match.node)

    def holds(self, match: Match, tokens: tuple[int, ...], salt: str):
        for at in range(match.length):
            page, place = divmod(at, self.pool.page_size)
            assert self.memory[match.pages[page], place] == (salt, tokens[: at + 1])

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject):
        self.tree.unlock(self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1))))

    @rule(salt=salts)
    def forget(self, salt: str):
        before = self.pool.free
        assert self.tree.forget(salt) == self.pool.free - before
        self.evicted = True

    @rule(count=st.integers(1, 6))
    def evict(self, count: int):
        free = self.pool.free
        freed = self.tree.evict(count)
        assert self.pool.free == free + freed
        assert freed == count or self.tree.evictable == 0
        self.evicted = True

    @invariant()
    def exact(self):
        check_tree(self.tree, self.pool, self.locked)

    def teardown(self):
        if not hasattr(self, "tree"):
            return
        for node in self.locked:
            self.tree.unlock(node)
        self.tree.evict(self.pool.pages)
        assert (self.pool.free, self.tree.roots) == (self.pool.pages, {})


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_salt_is_forgotten_but_for_what_is_locked():
    shelf = Shelf()
    for text, salt in (("system ada", "ada"), ("system bob", "ada"), ("other", "ada"), ("system ada", "bob")):
        shelf.put(text, salt)
    kept = shelf.match("other", "ada").node
    assert kept is not None
    shelf.tree.lock(kept)
    before = shelf.pool.free
    assert shelf.tree.forget("ada") == shelf.pool.free - before > 0
    assert [shelf.length("system ada", salt) for salt in ("ada", "bob")] == [0, 10]
    assert shelf.length("other", "ada") == 5
    check_tree(shelf.tree, shelf.pool, [kept])
    shelf.tree.unlock(kept)
    assert shelf.tree.forget("ada") == 2
    assert shelf.tree.forget("ada") == shelf.tree.forget("nobody") == 0
    assert set(shelf.tree.roots) == {"bob"}
    check_tree(shelf.tree, shelf.pool)
    shelf.tree.evict(64)
    assert shelf.pool.free == 64
