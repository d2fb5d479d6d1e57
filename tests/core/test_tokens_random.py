"""Any sequence of verbs leaves source, size, place, canvas and extras right."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_tokens import Naive, beginning, padded, snapshot, unchanged
from small import noise
from torch import Tensor

from foveate.core import TokenState

COUNTS = st.one_of(
    st.none(),  # even: all patches of all images
    st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any),
)


class Walk:
    """One state, its naive twin, and random verbs on both."""

    def __init__(self, state: TokenState, naive: Naive, seed: int) -> None:
        self.state, self.naive, self.dice = state, naive, random.Random(seed)

    def counts(self) -> tuple[int, ...]:
        return self.state.counts

    def chosen(self, at_least: int = 0) -> list[list[int]]:
        """Some tokens of each image in a random order; the same number if the layout is even."""
        counts = self.counts()
        share = self.dice.random()
        return [self.dice.sample(range(n), max(min(n, at_least), round(share * n))) for n in counts]

    def tensors(self, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        idx, valid = padded(rows)
        return idx, None if self.state.layout.is_even and valid.all() else valid

    def weights(self) -> Tensor:
        return noise(self.state.batch, max(self.counts()), seed=self.dice.randrange(999)).exp()

    def tokens(self) -> Tensor:
        return noise(self.state.batch, 4, seed=self.dice.randrange(999))

    def some_images(self) -> list[bool]:
        return [self.dice.random() < 0.6 for _ in range(self.state.batch)]

    def compute(self) -> None:
        self.naive.compute(0.5)
        self.state = self.state.replace(x=self.state.x * 0.5 + 1)

    def mark(self) -> None:
        """What a method does with an extra, say a running score."""
        for image in self.naive.images:
            for token in image.tokens:
                token.mark += 100
        self.state = self.state.replace(extras={"mark": self.state.extras["mark"] + 100})

    def keep(self) -> None:
        rows = self.chosen()
        self.naive.keep(rows)
        self.state = self.state.keep(*self.tensors(rows))

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
        idx_keep, valid_keep = self.tensors(keep)
        idx_src, valid_src = self.tensors(src)
        targets = padded(into)[0]
        self.naive.merge(keep, src, into, weight, track)
        self.state = self.state.merge(
            idx_keep,
            idx_src,
            targets,
            weight,
            valid_keep=valid_keep,
            valid_src=valid_src,
            track_size=track,
        )

    def fuse(self) -> None:
        rows, weight = self.chosen(), self.weights()
        some = [len(row) < n for row, n in zip(rows, self.counts(), strict=True)]
        exists = None if all(some) else torch.tensor(some)
        self.naive.fuse(rows, weight, some)
        idx, valid = self.tensors(rows)
        self.state = self.state.fuse(idx, weight, valid, exists)

    def append(self) -> None:
        tokens, some = self.tokens(), self.some_images()
        exists = None if all(some) else torch.tensor(some)
        self.naive.append(tokens, some)
        self.state = self.state.append(tokens, exists)

    def discard(self) -> None:
        some = [gone and n > 0 for gone, n in zip(self.some_images(), self.counts(), strict=True)]
        mask = None if all(some) else torch.tensor(some)
        self.naive.discard(some)
        self.state = self.state.discard(mask)

    def park_and_recall(self) -> None:
        """A stage: park, append a stand-in, compute, take it away, bring everything back."""
        rows = [sorted(row) for row in self.chosen()]
        prefix = self.state.prefix
        front = list(range(prefix))
        if self.dice.random() < 0.5:
            self.naive.park([front + [i + prefix for i in row] for row in rows])
            self.state = self.state.park(*self.tensors(rows))
        else:  # prefix tokens may wait too
            front = [i for i in front if self.dice.random() < 0.5]
            whole = [front + [i + prefix for i in row] for row in rows]
            mask = torch.zeros(self.state.batch, self.state.layout.longest, dtype=torch.bool)
            for b, row in enumerate(whole):
                mask[b, row] = True
            self.naive.park(whole)
            self.state = self.state.park_but(mask)
        some = self.some_images()
        tokens = self.tokens()
        self.naive.append(tokens, some)
        self.state = self.state.append(tokens, torch.tensor(some))
        self.check()
        self.compute()
        self.mark()
        self.naive.discard(some)
        self.state = self.state.discard(torch.tensor(some))
        change = self.tokens() if self.dice.random() < 0.5 else None
        self.naive.recall(change)
        self.state = self.state.recall(change)

    def check(self) -> None:
        self.naive.check(self.state)

    VERBS = (
        "compute",
        "mark",
        "keep",
        "keep_where",
        "merge",
        "fuse",
        "append",
        "discard",
        "park_and_recall",
    )


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
        start, before = walk.state, snapshot(walk.state)
        getattr(walk, verb)()
        walk.check()
        unchanged(start, before)


@settings(max_examples=40)
@given(st.integers(0, 2), st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 10**6))
def test_switching_tokens_off(prefix: int, appends: list[bool], seed: int) -> None:
    """Masked mode: tokens die for good, keep their value, and may be joined by new ones."""
    state, naive = beginning(None, prefix=prefix)
    walk = Walk(state.replace(alive=torch.ones(3, state.layout.longest)), naive, seed)
    for append in appends:
        start, before = walk.state, snapshot(walk.state)
        if append:
            some, tokens = walk.some_images(), walk.tokens()
            walk.naive.append(tokens, [True] * 3)
            for image, there in zip(walk.naive.images, some, strict=True):
                image.tokens[-1].alive = float(there)
            walk.state = walk.state.append(tokens, alive=torch.tensor(some))
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
