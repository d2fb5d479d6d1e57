"""Any sequence of verbs leaves source, size, place, canvas, extras and parked tokens right."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_tokens import Naive, beginning, chosen, padded, snapshot, unchanged
from small import noise
from torch import Tensor

from foveate.core import Selection, TokenState, disposal

COUNTS = st.one_of(
    st.none(),  # even: all patches of all images
    st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any),
)


class Walk:
    """One state, its naive twin, and random verbs on both.

    ``bare`` says, for every parking in force, whether prefix tokens may wait too. What counts
    positions after the prefix is then left alone.
    """

    def __init__(self, state: TokenState, naive: Naive, seed: int) -> None:
        self.state, self.naive, self.dice = state, naive, random.Random(seed)
        self.bare: list[bool] = []

    def counts(self) -> tuple[int, ...]:
        return self.state.counts

    def chosen(self) -> list[list[int]]:
        """Some tokens of each image in a random order; the same number if the layout is even."""
        share = self.dice.random()
        return [self.dice.sample(range(n), round(share * n)) for n in self.counts()]

    def selection(self, rows: list[list[int]]) -> Selection:
        """The padding is any position that the batch has, and must not matter."""
        selection = chosen(rows, self.dice.randrange(max(1, *self.counts())))
        if selection.lengths is None and self.dice.random() < 0.5:
            return Selection(selection.index, tuple(map(len, rows)))
        return selection

    def weights(self) -> Tensor:
        return noise(self.state.batch, max(self.counts()), seed=self.dice.randrange(999)).exp()

    def tokens(self) -> Tensor:
        return noise(self.state.batch, 4, seed=self.dice.randrange(999))

    def some_images(self) -> list[bool]:
        return [self.dice.random() < 0.6 for _ in range(self.state.batch)]

    # Values --------------------------------------------------------------------------------------

    def compute(self) -> None:
        self.naive.compute(0.5)
        self.state = self.state.with_tokens(self.state.x * 0.5 + 1)

    def mark(self) -> None:
        """What a method does with an extra, say a running score."""
        for image in self.naive.images:
            for token in image.tokens:
                token.mark += 100
        self.state = self.state.replace(extras={"mark": self.state.extras["mark"] + 100})

    def add(self) -> None:
        values = noise(self.state.batch, self.state.patches, 4, seed=self.dice.randrange(999))
        self.naive.add(values)
        self.state = self.state.add(values)

    # Tokens --------------------------------------------------------------------------------------

    def keep(self) -> None:
        rows = self.chosen()
        self.naive.keep(rows)
        self.state = self.state.keep(self.selection(rows))

    def keep_where(self) -> None:
        rows = [sorted(row) for row in self.chosen()]
        # Marks on padding are no tokens.
        longest = max(self.counts())  # may be 0, and no values have no type of their own
        marks = torch.tensor(
            [[n <= i for i in range(longest)] for n in self.counts()], dtype=torch.bool
        )
        for b, row in enumerate(rows):
            marks[b, row] = True
        self.naive.keep(rows)
        self.state = self.state.keep_where(marks)

    def merge(self) -> None:
        order = [self.dice.sample(range(n), n) for n in self.counts()]
        sources = [self.dice.randint(0, n // 2) for n in self.counts()]
        if self.state.layout.is_even:
            sources = sources[:1] * len(sources)
        keep = [row[r:] for row, r in zip(order, sources, strict=True)]
        src = [row[:r] for row, r in zip(order, sources, strict=True)]
        into = [[self.dice.randrange(len(k)) for _ in s] for k, s in zip(keep, src, strict=True)]
        if not any(keep):
            return
        track, weight = self.dice.random() < 0.7, self.weights()
        self.naive.merge(keep, src, into, weight, track)
        self.state = self.state.merge(
            self.selection(keep), self.selection(src), padded(into), weight, track_size=track
        )

    def fuse(self) -> None:
        rows, weight = self.chosen(), self.weights()
        kept, some = self.selection(rows), [True] * self.state.batch
        if kept.lengths is not None:
            some = [len(row) < n for row, n in zip(rows, self.counts(), strict=True)]
        self.naive.fuse(rows, weight, some)
        self.state = disposal.fuse(self.state, kept, weight)

    def append(self) -> None:
        tokens, some = self.tokens(), self.some_images()
        exists = None if all(some) else torch.tensor(some)
        self.naive.append(tokens, some)
        self.state = self.state.append(tokens, exists)

    def discard(self) -> None:
        some = [
            gone and n > (0 if any(self.bare) else self.state.prefix)
            for gone, n in zip(self.some_images(), self.state.layout.lengths, strict=True)
        ]
        self.drop_last(some)

    def drop_last(self, some: list[bool]) -> None:
        self.naive.discard(some)
        self.state = self.state.discard_last(None if all(some) else torch.tensor(some))

    # Parking -------------------------------------------------------------------------------------

    def park(self) -> None:
        prefix = self.state.prefix
        if not any(self.bare) and self.dice.random() < 0.5:
            rows = self.chosen()
            front = list(range(prefix))
            self.naive.park([front + [i + prefix for i in row] for row in rows])
            self.state = self.state.park(self.selection(rows))
            self.bare.append(False)
        else:  # positions of the whole image: prefix tokens may wait too
            share = self.dice.random()
            rows = [self.dice.sample(range(n), round(share * n)) for n in self.state.layout.lengths]
            self.naive.park(rows)
            self.state = self.state.park(self.selection(rows), with_prefix=False)
            self.bare.append(prefix > 0)

    def recall(self) -> None:
        """Take guests away, as a method does with its stand-ins, and bring the others back."""
        if not self.bare:
            return
        guests = self.naive.guests()
        if not any(self.bare):
            prefix = self.state.prefix
            rows = [
                [i for i in range(n) if i + prefix not in gone]
                for n, gone in zip(self.counts(), guests, strict=True)
            ]
            self.naive.keep(rows)
            self.state = self.state.keep(self.selection(rows))
        while any(self.naive.guests()):  # nothing was reordered here: they stand behind
            self.drop_last([bool(gone) for gone in self.naive.guests()])
        change = self.tokens() if self.dice.random() < 0.5 else None
        self.naive.recall(change)
        self.state = self.state.recall(change)
        self.bare.pop()

    def recall_everything(self) -> None:
        """Guests or not."""
        self.naive = self.naive.recalled()
        self.state = self.state.recalled()
        self.bare = []

    def check(self) -> None:
        self.naive.check(self.state)

    VALUES = ("compute", "mark", "add")
    AFTER_PREFIX = ("keep", "keep_where", "merge", "fuse")
    VERBS = (*VALUES, *AFTER_PREFIX, "append", "discard", "park", "recall", "recall_everything")

    def do(self, verb: str) -> None:
        if verb in self.AFTER_PREFIX and any(self.bare):
            return
        start, before = self.state, snapshot(self.state)
        getattr(self, verb)()
        self.check()
        unchanged(start, before)


@settings(max_examples=150)
@given(
    COUNTS,
    st.integers(0, 2),
    st.lists(st.sampled_from(Walk.VERBS), min_size=1, max_size=6),
    st.integers(0, 10**6),
)
def test_any_sequence_of_verbs(
    counts: list[int] | None, prefix: int, verbs: list[str], seed: int
) -> None:
    walk = Walk(*beginning(counts, prefix=prefix), seed)
    walk.check()
    for verb in verbs:
        walk.do(verb)


@settings(max_examples=60)
@given(
    COUNTS,
    st.integers(0, 2),
    st.lists(st.lists(st.sampled_from(Walk.VERBS[:-3]), max_size=3), min_size=2, max_size=3),
    st.integers(0, 10**6),
)
def test_parked_within_parked(
    counts: list[int] | None, prefix: int, inside: list[list[str]], seed: int
) -> None:
    """Park, work, park again, work, and recall as often: each level comes back by itself."""
    walk = Walk(*beginning(counts, prefix=prefix), seed)
    for verbs in inside:
        walk.do("park")
        for verb in verbs:
            walk.do(verb)
    for _ in inside:
        walk.do("recall")
        walk.do("compute")
    assert walk.state.parked is None


@settings(max_examples=40)
@given(
    st.integers(0, 2),
    st.lists(st.sampled_from(["append", "draw", "add"]), min_size=1, max_size=6),
    st.integers(0, 10**6),
)
def test_switching_tokens_off(prefix: int, verbs: list[str], seed: int) -> None:
    """Masked mode: tokens die for good, keep their value, and may be joined by new ones."""
    state, naive = beginning(None, prefix=prefix)
    walk = Walk(state.replace(alive=torch.ones(3, state.layout.longest)), naive, seed)
    for verb in verbs:
        start, before = walk.state, snapshot(walk.state)
        if verb == "append":
            some, tokens = walk.some_images(), walk.tokens()
            walk.naive.append(tokens, [True] * 3)
            for image, there in zip(walk.naive.images, some, strict=True):
                image.tokens[-1].alive = float(there)
            walk.state = walk.state.append(tokens, alive=torch.tensor(some))
        elif verb == "add":
            walk.add()
        else:
            draw = (noise(3, max(walk.counts()), seed=walk.dice.randrange(999)) > -0.5).float()
            walk.naive.mask_out(draw)
            walk.state = walk.state.mask_out(draw)
        walk.compute()
        walk.check()
        present = walk.state.present()
        assert present is not None and walk.state.alive is not None
        assert torch.equal(present, walk.state.alive[:, prefix:] > 0)
        unchanged(start, before)
