"""How the tokens of a batch lie in one flat tensor.

All tokens of all images stand in one ``[T, C]`` tensor, image after image. When every image has
the same count, the layout is *even* and ``[B, N, C]`` is a free view; otherwise it is *ragged*.

Decisions (scores, matches) are small, so methods make them on *rectangles* ``[B, longest]``: a
free view when even, padded when ragged. One algorithm then serves both layouts, and only scores
are ever padded, never tokens.

An even layout computes nothing from the number of images on the host. A compiled or exported
model therefore serves every batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveate.core.selection import Selection

__all__ = ["Layout"]


class Layout:
    """Token counts per image and the index arithmetic that follows from them."""

    def __init__(self, batch: int, count: int | None, lens: tuple[int, ...] | None) -> None:
        self.batch = batch
        self.count = count
        self.lens = lens
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def even(cls, batch: int, count: int) -> Layout:
        """Give every image the same number of tokens."""
        return cls(batch, count, None)

    @classmethod
    def ragged(cls, lens: Sequence[int]) -> Layout:
        """Give each image its own number of tokens; a single image is always even."""
        if len(lens) == 1:
            return cls.even(1, lens[0])
        return cls(len(lens), None, tuple(lens))

    @property
    def is_even(self) -> bool:
        """Whether all images share one count and ``[B, N, C]`` is a view."""
        return self.count is not None

    @property
    def longest(self) -> int:
        """The largest token count of any image."""
        return self.count if self.count is not None else max(self.lengths)

    @property
    def total(self) -> int:
        """The number of tokens of all images together."""
        return self.batch * self.count if self.count is not None else sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Token count of each image, on the host."""
        if self.lens is not None:
            return self.lens
        assert self.count is not None
        return (self.count,) * self.batch

    def resized(self, change: int) -> Layout:
        """Return the layout with ``change`` more (or fewer) tokens in every image."""
        if self.count is not None:
            return Layout.even(self.batch, self.count + change)
        return Layout.ragged([n + change for n in self.lengths])

    # Index tensors -------------------------------------------------------------------------

    def start(self, device: torch.device) -> Tensor:
        """Return the row of each image's first token, ``[B]``."""
        if self.count is not None:
            return self._cached("start", device, self._even_start)
        return self._cached("start", device, self._make_start)

    def image(self, device: torch.device) -> Tensor:
        """Return the image that each row belongs to, ``[T]``."""
        if self.count is not None:
            return torch.arange(self.batch, device=device).repeat_interleave(self.count)
        return self._cached("image", device, self._make_image)

    def valid(self, device: torch.device) -> Tensor | None:
        """Mark the cells of the rectangle that hold a token, ``[B, longest]``; None means all."""
        if self.count is not None:
            return None
        return self._cached("valid", device, self._make_valid)

    def _cached(
        self, name: str, device: torch.device, make: Callable[[torch.device], Tensor]
    ) -> Tensor:
        key = (name, device)
        if key not in self._tensors:
            self._tensors[key] = make(device)
        return self._tensors[key]

    def _even_start(self, device: torch.device) -> Tensor:
        assert self.count is not None
        return torch.arange(self.batch, device=device) * self.count

    def _make_start(self, device: torch.device) -> Tensor:
        starts = [0]
        for n in self.lengths[:-1]:
            starts.append(starts[-1] + n)
        return torch.tensor(starts, device=device)

    def _make_image(self, device: torch.device) -> Tensor:
        lens = torch.tensor(self.lengths, device=device)
        return torch.arange(self.batch, device=device).repeat_interleave(
            lens, output_size=self.total
        )

    def _make_valid(self, device: torch.device) -> Tensor:
        lens = torch.tensor(self.lengths, device=device)
        return torch.arange(self.longest, device=device) < lens[:, None]

    def _cells(self, device: torch.device) -> Tensor:
        """Return the cell of the flattened rectangle that each row falls in, ``[T]``."""
        image = self.image(device)
        within = torch.arange(self.total, device=device) - self.start(device)[image]
        return image * self.longest + within

    # Between flat and rectangle --------------------------------------------------------------

    def rect(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Arrange flat values ``[T, ...]`` as ``[B, longest, ...]``, padding with ``fill``."""
        if self.count is not None:
            return values.view(self.batch, self.count, *values.shape[1:])
        cells = self._cached("cells", values.device, self._cells)
        out = values.new_full((self.batch * self.longest, *values.shape[1:]), fill)
        return out.index_copy(0, cells, values).view(self.batch, self.longest, *values.shape[1:])

    def flat(self, rect: Tensor) -> Tensor:
        """Turn a rectangle ``[B, longest, ...]`` back into flat values ``[T, ...]``."""
        if self.count is not None:
            return rect.reshape(self.batch * self.count, *rect.shape[2:])
        cells = self._cached("cells", rect.device, self._cells)
        return rect.reshape(self.batch * self.longest, *rect.shape[2:]).index_select(0, cells)

    def rows(self, selection: Selection) -> Tensor:
        """Turn a selection's positions inside the images into rows of the flat tensor."""
        # A batch of one is common where every call counts. A graph must serve all batch sizes.
        if self.batch == 1 and self.count is not None and not torch.compiler.is_compiling():
            return selection.index.flatten()
        rows = selection.index + self.start(selection.index.device)[:, None]
        valid = selection.valid
        return rows.flatten() if valid is None else rows[valid]

    def spread(self, per_image: Tensor) -> Tensor:
        """Repeat each image's value ``[B, ...]`` for all of its tokens, ``[T, ...]``."""
        if self.count is not None:
            shape = (self.batch, self.count, *per_image.shape[1:])
            return per_image[:, None].expand(shape).flatten(0, 1)
        return per_image.index_select(0, self.image(per_image.device))

    def sum(self, values: Tensor) -> Tensor:
        """Sum flat values ``[T, ...]`` over the tokens of each image, ``[B, ...]``."""
        if self.count is not None:
            return values.view(self.batch, self.count, *values.shape[1:]).sum(1)
        out = values.new_zeros((self.batch, *values.shape[1:]))
        return out.index_add(0, self.image(values.device), values)

    def __repr__(self) -> str:
        if self.count is not None:
            return f"Layout.even(batch={self.batch}, count={self.count})"
        return f"Layout.ragged({list(self.lengths)})"
