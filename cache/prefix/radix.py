"""A radix tree over token prefixes, whose nodes hold the pages of their keys and values.

RadixAttention (Zheng et al. 2024): edges are labelled with runs of tokens and split on a partial match; nodes that
running requests use are locked, up to the root; memory is taken back from the least recently used unlocked leaves. The
tree and the running requests share one pool of pages.

A node holds the pages that cover its own tokens. Matches end at any token, so a node may start or end inside a page:

    page size 4      page |    p0     |    p1     |    p2     |
    system prompt         | a  b  c  d  e  f |                     pages p0, p1
    └─ one user's                            | g  h  i  j  k |     pages p1, p2
    └─ another's                             | x  y |              pages q1: a copy of p1 up to f, then x, y

The first page of a node has the tokens before it in that page too, because it was filled by a sequence that had them.
So along a path, the deepest node that covers a page tells which one it is. Every salt has a root of its own.

Not thread-safe: one thread calls every method.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.prefix.pages import PagePool

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    tokens: Tokens
    start: int  # position of its first token
    pages: list[int]  # covering positions [start, end)
    parent: Node | None  # None: a root, which has no tokens
    salt: str
    used: int  # the tree's clock when it was last walked through
    children: dict[int, Node] = field(default_factory=dict)  # by their first token
    locks: int = 0  # of this node and of all below it
    queued: bool = False  # in the heap of leaves

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def evictable(self) -> bool:
        return not self.locks and not self.children and self.parent is not None


class Match(NamedTuple):
    """The longest prefix that the tree knows: its last node (None: no token is known), its pages, its tokens."""

    node: Node | None
    pages: list[int]
    length: int


class RadixTree:
    """Prefixes in the pages of a pool; it holds one reference to a page for each node that has it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[str, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []  # (used, serial, node): a node at most once, perhaps outdated
        self._clock = 0
        self._serial = 0
        self._evictable = 0

    @property
    def roots(self) -> dict[str, Node]:
        """The tree of each salt, to look at."""
        return self._roots

    @property
    def evictable(self) -> int:
        """Pages that unlocked nodes hold: as many as `evict` could free, or more if they are held elsewhere too."""
        return self._evictable

    def length(self, tokens: Tokens, salt: str) -> int:
        """How many leading tokens the tree knows; changes nothing."""
        node, at = self._roots.get(salt), 0
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at])
            if node is not None:
                common = _common(tokens, at, node.tokens)
                at += common
                if common < len(node.tokens):
                    break
        return at

    def match(self, tokens: Tokens, salt: str) -> Match:
        """The longest known prefix, as used now. A node in which it ends is split, so that a lock holds no more."""
        node = self._roots.get(salt)
        if node is None:
            return Match(None, [], 0)
        self._clock += 1
        pages: list[int] = []
        node = self._walk(node, tokens, pages)
        return Match(node, pages, node.end) if node.tokens else Match(None, [], 0)

    def insert(self, tokens: Tokens, pages: list[int], salt: str) -> Match:
        """Remember that `pages` hold the keys and values of `tokens`.

        The caller keeps its references; the tree takes its own for what it did not know. The match says which pages the
        tree has for these tokens, which are others where it knew them.
        """
        if len(pages) != self._pool.covering(len(tokens)):
            raise ValueError(f"{len(pages)} pages for {len(tokens)} tokens of {self._pool.page_size} a page")
        if not tokens:
            return Match(None, [], 0)
        self._clock += 1
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node((), 0, [], None, salt, self._clock)
        known: list[int] = []
        node = self._walk(root, tokens, known)
        if node.end == len(tokens):
            return Match(node, known, len(tokens))
        leaf = self._add_leaf(node, tokens[node.end :], pages[node.end // self._pool.page_size :])
        return Match(leaf, known[: leaf.start // self._pool.page_size] + leaf.pages, len(tokens))

    def lock(self, node: Node) -> None:
        """Keep a node, and all above it, from being evicted; locks are counted."""
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self._evictable -= len(at.pages)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                raise ValueError("this node is not locked")
            at.locks -= 1
            if at.locks == 0:
                self._evictable += len(at.pages)
                self._queue(at)
            at = at.parent

    def evict(self, count: int) -> int:
        """Free so many pages of unlocked leaves, the least recently used first and from their ends; how many it freed.

        Fewer only when nothing unlocked is left.
        """
        freed = 0
        while freed < count and self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            leaf.queued = False
            if leaf.evictable and leaf.used == used:
                freed += self._shorten(leaf, count - freed)
            self._queue(leaf)
        return freed

    def forget(self, salt: str) -> int:
        """Free what the unlocked nodes of a salt hold; how many pages. What running requests use stays with them."""
        nodes = [root] if (root := self._roots.get(salt)) is not None else []
        for node in nodes:  # which grows: parents before their children
            nodes += node.children.values()
        freed = 0
        for node in reversed(nodes):
            if node.evictable:
                freed += self._shorten(node, self._pool.pages + 1)
        return freed

    def _walk(self, node: Node, tokens: Tokens, pages: list[int]) -> Node:
        """The last node on the path of these tokens, split off where they part; `pages` gets those of the path."""
        size = self._pool.page_size
        node.used = self._clock
        while node.end < len(tokens):
            child = node.children.get(tokens[node.end])
            if child is None:
                break
            common = _common(tokens, child.start, child.tokens)
            node = child if common == len(child.tokens) else self._split(child, common)
            node.used = self._clock
            del pages[node.start // size :]
            pages += node.pages
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Put the first `at` tokens of a node into a new one above it, which is returned.

        The node itself stays the lower one: whoever has locked it has locked both.
        """
        size, parent = self._pool.page_size, node.parent
        assert parent is not None
        middle, first = node.start + at, node.start // size
        pages = node.pages[: self._pool.covering(middle) - first]
        upper = Node(node.tokens[:at], node.start, pages, parent, node.salt, node.used, locks=node.locks)
        upper.children[node.tokens[at]] = node
        parent.children[node.tokens[0]] = upper
        node.tokens, node.start, node.parent = node.tokens[at:], middle, upper
        node.pages = node.pages[middle // size - first :]
        if middle % size:  # both have the page in the middle
            self._pool.share(node.pages[0])
            self._evictable += not node.locks
        return upper

    def _add_leaf(self, parent: Node, tokens: Tokens, pages: list[int]) -> Node:
        leaf = Node(tokens, parent.end, pages, parent, parent.salt, self._clock)
        for page in pages:
            self._pool.share(page)
        if parent.end % self._pool.page_size and self._pool.writable(parent.pages[-1]):
            # No one else has the parent's last page, and the leaf's first begins with the same tokens: one will do.
            self._pool.share(pages[0])
            self._pool.release(parent.pages[-1])
            parent.pages[-1] = pages[0]
        parent.children[tokens[0]] = leaf
        self._evictable += len(pages)
        self._queue(leaf)
        return leaf

    def _shorten(self, leaf: Node, count: int) -> int:
        """Take pages from the end of a leaf until so many are free, or the leaf is gone; how many are."""
        freed = 0
        while leaf.pages and freed < count:
            freed += self._pool.release(leaf.pages.pop())
            self._evictable -= 1
        if leaf.pages:
            end = (leaf.start // self._pool.page_size + len(leaf.pages)) * self._pool.page_size
            leaf.tokens = leaf.tokens[: end - leaf.start]
        else:
            self._remove(leaf)
        return freed

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[0]]
        leaf.parent = None
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]
        self._queue(parent)

    def _queue(self, node: Node) -> None:
        """Let a node that may be evicted be found."""
        if node.evictable and not node.queued:
            node.queued = True
            self._serial += 1
            heapq.heappush(self._leaves, (node.used, self._serial, node))


def _common(tokens: Tokens, at: int, label: Tokens) -> int:
    """How many tokens from position `at` agree with a label; by halves, because comparing slices is fast."""
    low, high = 0, min(len(label), len(tokens) - at)
    if tokens[at : at + high] == label[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if tokens[at + low : at + middle] == label[low:middle]:
            low = middle
        else:
            high = middle
    return low
