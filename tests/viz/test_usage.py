"""The usage of patches over a data set that has an unreadable image."""

from __future__ import annotations

from typing import Any

import pytest
from small import randomise, vit

import foveate
from foveate import viz
from foveate.data import Unreadable, open_source
from foveate.data.sources import SceneSource
from foveate.dense import pyramid


def test_unreadable_images_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = foveate.apply(randomise(vit(in_chans=1)).eval(), "svit(keep=0.7)", check=False)
    model = pyramid(randomise(body), channels=8).eval()
    source, sample = open_source("scenes:size=48,seed=5,val=4", "val"), SceneSource.sample

    def torn(self: SceneSource, index: int) -> dict[str, Any]:
        if index == 1:
            raise Unreadable(f"{self.name(index)}: torn")
        return sample(self, index)

    monkeypatch.setattr(SceneSource, "sample", torn)
    assert viz.usage(model, source).images == 3 and caplog.text.count("torn") == 1
    assert viz.usage(model, source, images=2).images == 2  # the first and the third
