"""The verbs of TokenState on lists of single tokens: slow, and plain enough to be right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.core import Context, Layout, Selection, TokenState

NOWHERE = -1  # place of tokens that stand for no patch, until compared


@dataclass
class Token:
    x: Tensor
    place: int
    patches: set[int]
    size: float
    mark: float  # an extra
    alive: float = 1.0
    homes: tuple[int | None, ...] = ()  # where it stood when the others were parked, level by level


@dataclass
class Image:
    """One image's tokens, prefix first, and the last value of every patch that is gone."""

    tokens: list[Token]
    last: dict[int, Tensor] = field(default_factory=dict)

    def forget(self, token: Token) -> None:
        for patch in token.patches:
            self.last[patch] = token.x

    def copied(self) -> Image:
        return Image([copy.copy(token) for token in self.tokens], dict(self.last))


class Naive:
    """A batch of images; every verb changes it in place. ``prefix`` as in TokenState.

    ``outer`` has the images as they were when the others were parked, and whether there were sizes
    then; the last parking is last.
    """

    def __init__(self, state: TokenState) -> None:
        """Read off a state at its beginning, when every patch has its own token."""
        self.prefix, self.patches = state.prefix, state.patches
        self.sized = state.size is not None
        self.images: list[Image] = []
        assert state.place is not None
        row = 0
        for count in state.layout.lengths:
            tokens = []
            for _ in range(count):
                place = int(state.place[row])
                real = place < state.patches
                tokens.append(
                    Token(
                        state.x[row],
                        place if real else NOWHERE,
                        {place} if real else set(),
                        1.0,
                        float(state.extras["mark"][row]),
                    )
                )
                row += 1
            self.images.append(Image(tokens))
        self.outer: list[tuple[list[Image], bool]] = []

    def front(self, image: Image) -> list[Token]:
        return image.tokens[: self.prefix]

    def rest(self, image: Image) -> list[Token]:
        return image.tokens[self.prefix :]

    # Verbs; positions count after the prefix unless said otherwise ----------------------------

    def keep(self, idx: Sequence[Sequence[int]]) -> None:
        for image, kept in zip(self.images, idx, strict=True):
            rest = self.rest(image)
            for i, token in enumerate(rest):
                if i not in kept:
                    image.forget(token)
            image.tokens = self.front(image) + [rest[i] for i in kept]

    def merge(
        self,
        idx_keep: Sequence[Sequence[int]],
        idx_src: Sequence[Sequence[int]],
        into: Sequence[Sequence[int]],
        weight: Tensor,
        track_size: bool,
    ) -> None:
        self.sized = self.sized or track_size
        for b, image in enumerate(self.images):
            rest, taken = self.rest(image), set(idx_keep[b]) | set(idx_src[b])
            for i, token in enumerate(rest):
                if i not in taken:
                    image.forget(token)
            kept = [copy.copy(rest[i]) for i in idx_keep[b]]
            for slot, target in enumerate(idx_keep[b]):
                group = [target] + [
                    src for src, t in zip(idx_src[b], into[b], strict=True) if t == slot
                ]
                if len(group) == 1:
                    continue
                total = sum(float(weight[b, i]) for i in group)
                mean = sum(float(weight[b, i]) * rest[i].x for i in group)
                kept[slot].x = mean / total
                kept[slot].patches = set().union(*(rest[i].patches for i in group))
                if self.sized:  # sizes count from the first merge that tracks them
                    kept[slot].size = sum(rest[i].size for i in group)
            image.tokens = self.front(image) + kept

    def append(self, tokens: Tensor, exists: Sequence[bool]) -> None:
        homes = (None,) * len(self.outer)
        for image, x, there in zip(self.images, tokens, exists, strict=True):
            if there:
                image.tokens.append(Token(x, NOWHERE, set(), 0.0, 0.0, homes=homes))

    def fuse(self, idx: Sequence[Sequence[int]], weight: Tensor, exists: Sequence[bool]) -> None:
        fused = []
        for b, image in enumerate(self.images):
            total = torch.zeros(4)
            for i, token in enumerate(self.rest(image)):
                if i not in idx[b]:
                    total = total + float(weight[b, i]) * token.x
            fused.append(total)
        self.keep(idx)
        self.append(torch.stack(fused), exists)

    def discard(self, mask: Sequence[bool]) -> None:
        for image, gone in zip(self.images, mask, strict=True):
            if gone:
                image.forget(image.tokens.pop())

    def park(self, stay: Sequence[Sequence[int]]) -> None:
        """Positions of the whole image."""
        self.outer.append(([image.copied() for image in self.images], self.sized))
        for image, row in zip(self.images, stay, strict=True):
            image.tokens = [image.tokens[i] for i in row]
            for i, token in zip(row, image.tokens, strict=True):
                token.homes = (*token.homes, i)

    def recall(self, change: Tensor | None = None) -> None:
        inner = self.images
        self.images, self.sized = self.outer.pop()
        for b, image in enumerate(self.images):
            if change is not None:
                for token in image.tokens:
                    token.x = token.x + change[b]
            for token in inner[b].tokens:
                home = token.homes[-1]
                assert home is not None, "a guest has no place to go back to"
                image.tokens[home].x, image.tokens[home].mark = token.x, token.mark

    def guests(self) -> list[list[int]]:
        """Positions in the whole image of tokens that were appended since the last parking."""
        return [
            [i for i, token in enumerate(image.tokens) if token.homes[-1] is None]
            for image in self.images
        ]

    def recalled(self) -> Naive:
        """A copy with nothing parked; guests are left behind."""
        seen = copy.copy(self)
        seen.images = [image.copied() for image in self.images]
        seen.outer = [([i.copied() for i in images], sized) for images, sized in self.outer]
        while seen.outer:
            for image, gone in zip(seen.images, seen.guests(), strict=True):
                image.tokens = [t for i, t in enumerate(image.tokens) if i not in gone]
            seen.recall()
        return seen

    def add(self, values: Tensor) -> None:
        """``values [B, H*W, C]``: to every patch, whatever became of it."""
        for images in (self.images, *(images for images, _ in self.outer)):
            for b, image in enumerate(images):
                for token in image.tokens:
                    if token.patches:
                        token.x = token.x + values[b, sorted(token.patches)].mean(0)
                image.last = {p: x + values[b, p] for p, x in image.last.items()}

    def mask_out(self, alive: Tensor) -> None:
        for b, image in enumerate(self.images):
            for i, token in enumerate(self.rest(image)):
                before, token.alive = token.alive, token.alive * float(alive[b, i])
                if before > 0 and token.alive <= 0:
                    image.forget(token)

    def compute(self, factor: float) -> None:
        """What a block does: new values everywhere."""
        for image in self.images:
            for token in image.tokens:
                token.x = token.x * factor + 1

    # Reading -------------------------------------------------------------------------------------

    def restored(self, gone: str) -> Tensor:
        values = []
        for image in self.images:
            carried = {p: t.x for t in image.tokens for p in t.patches if t.alive > 0}
            zeros = torch.zeros(4)
            for patch in range(self.patches):
                other = zeros if gone == "zero" else image.last.get(patch, zeros)
                values.append(carried.get(patch, other))
        return torch.stack(values).view(len(self.images), self.patches, -1)

    def check(self, state: TokenState) -> None:
        """Everything that a state says about its tokens is as it should be."""
        tokens = [t for image in self.images for t in image.tokens]
        assert state.layout.lengths == tuple(len(image.tokens) for image in self.images)
        assert state.layout.total == len(tokens) == len(state.x)
        if tokens:
            torch.testing.assert_close(state.x, torch.stack([t.x for t in tokens]))
        places = [self.patches if t.place == NOWHERE else t.place for t in tokens]
        assert state.place is not None and state.place.tolist() == places
        assert state.is_patch().tolist() == [t.place != NOWHERE for t in tokens]
        assert state.extras["mark"].tolist() == [t.mark for t in tokens]
        assert state.patch_counts().tolist() == [float(len(t.patches)) for t in tokens]
        if self.sized:
            assert state.size is not None
            assert state.size.tolist() == [t.size for t in tokens]
        else:
            assert state.size is None
        if state.alive is not None:
            assert state.layout.flat(state.alive).tolist() == [t.alive for t in tokens]
        assert state.source is not None
        for b, image in enumerate(self.images):
            carrier = {p: i for i, t in enumerate(image.tokens) for p in t.patches}
            expected = [carrier.get(p, -1) for p in range(self.patches)]
            assert state.source[b].tolist() == expected
        depth, parked = 0, state.parked
        while parked is not None:
            depth, parked = depth + 1, parked.state.parked
        assert depth == len(self.outer)
        seen = self.recalled() if self.outer else self
        for gone in ("last", "zero"):
            torch.testing.assert_close(state.restore(gone), seen.restored(gone))


def beginning(
    counts: Sequence[int] | None, *, prefix: int, grid: tuple[int, int] = (2, 4), batch: int = 3
) -> tuple[TokenState, Naive]:
    """A tracked state with places and an extra; ``counts`` patches of each image are there."""
    patches, noise = grid[0] * grid[1], torch.Generator().manual_seed(0)
    x = torch.randn(batch, prefix + patches, 4, generator=noise)
    state = TokenState.begin(x, Context(prefix, grid), place=True, track=True)
    mark = torch.arange(float(len(state.x)))
    state = state.replace(extras={"mark": mark})
    naive = Naive(state)
    if counts is None:
        return state, naive
    rows = [torch.randperm(patches, generator=noise)[:n].sort().values.tolist() for n in counts]
    mask = torch.zeros(batch, patches, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, row] = True
    naive.keep(rows)
    return state.replace(layout=Layout.ragged(state.layout.lengths)).keep_where(mask), naive


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Lists as a rectangle."""
    longest = max(len(row) for row in rows)
    index = torch.full((len(rows), longest), fill)
    for b, row in enumerate(rows):
        index[b, : len(row)] = torch.tensor(row, dtype=torch.long)
    return index


def chosen(rows: Sequence[Sequence[int]], fill: int = 0) -> Selection:
    """The selection of these positions; it has lengths only where images differ."""
    lengths = tuple(map(len, rows))
    return Selection(padded(rows, fill), None if len(set(lengths)) == 1 else lengths)


def snapshot(state: TokenState) -> list[object]:
    """Copies of everything in a state, to see later that nothing changed in place."""
    values: list[object] = [state.layout.lengths, state.context, state.block]
    named = (state.x, state.place, state.source, state.size, state.alive, state.canvas)
    for tensor in (*named, *state.extras.values()):
        values.append(None if tensor is None else tensor.clone())
    if state.parked is not None:
        values += [state.parked.rows.clone(), *snapshot(state.parked.state)]
    return [*values, sorted(state.extras), dict(state.notes)]


def unchanged(state: TokenState, before: list[object]) -> None:
    for now, then in zip(snapshot(state), before, strict=True):
        if isinstance(now, Tensor):
            assert isinstance(then, Tensor) and torch.equal(now, then)
        else:
            assert now == then
