"""Pictures, pixel by pixel, against what they should show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract.table import METHODS, Row
from pictures import photo, pixels, traced
from PIL import Image

from foveate import viz
from foveate.data import Preprocessing
from foveate.viz.colours import BROUGHT_BACK, blend, dimmed, group_colours, overlay
from foveate.viz.grid import as_image, panel, seen
from foveate.viz.steps import steps
from foveate.viz.tokens import with_depth, with_groups

KINDS = (viz.kept, viz.groups, viz.depth, viz.brought_back)
NAMES = ("siglip",)  # the other forms are in test_steps


def cells(image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """Patch of every pixel, where the patch divides the image."""
    rows = np.arange(image.height) * grid[0] // image.height
    return rows[:, None] * grid[1] + np.arange(image.width) * grid[1] // image.width


def inside(cell: np.ndarray, margin: int = 4) -> np.ndarray:
    """Pixels that are not near the edge of their cell."""
    far = np.ones(cell.shape, dtype=bool)
    for axis in (0, 1):
        for shift in range(-margin, margin + 1):
            far &= np.roll(cell, shift, axis) == cell
    return far


def strip(picture: Image.Image, number: int) -> np.ndarray:
    """A panel of a picture, found by the input, which is the first."""
    whole, image = pixels(picture), pixels(photo())
    height, width = image.shape[:2]
    at = [
        (y, x)
        for y in range(whole.shape[0] - height + 1)
        for x in range(min(60, whole.shape[1] - width + 1))
        if (whole[y, x : x + 3] == image[0, :3]).all()
        and (whole[y : y + height, x : x + width] == image).all()
    ]
    assert len(at) == 1
    (y, x) = at[0]
    # The next panel begins at the first column that is not paper again.
    columns = np.flatnonzero((whole[y : y + height] != 255).any((0, 2)))
    starts = [c for c in columns if c == 0 or (whole[y : y + height, c - 1] == 255).all()]
    begin = starts[number]
    return whole[y : y + height, begin : begin + width]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.method)
def test_every_method_draws(row: Row) -> None:
    for name in NAMES:
        model, trace = traced(row.method, name)
        for draw in KINDS:
            picture = draw(trace, photo(), index=1, model=model)
            assert picture.mode == "RGB" and picture.width >= 2 * photo().width
    wide = traced(row.method)[0]
    x = torch.randn(1, 3, 32, 72, generator=torch.manual_seed(0))
    trace = wide.trace(x, torch.arange(36).view(1, 4, 9) % 5 > 0)  # not square, and a keep mask
    for draw in KINDS:
        assert draw(trace, photo()).width > photo().width


def test_kept_patches_are_untouched_and_the_others_darker() -> None:
    _, trace = traced("evit(keep=0.6, blocks=[1])")
    picture = viz.kept(trace, photo())
    working = trace.blocks[1].active()[0].numpy()
    cell, before, now = cells(photo(), (6, 6)), pixels(photo()), strip(picture, 1)
    assert (now[working[cell]] == before[working[cell]]).all()
    out = ~working[cell] & inside(cell)
    assert (now[out].sum(-1) < 0.8 * before[out].sum(-1)).all()
    assert np.abs(now[out] - dimmed(before[out])).max() <= 1


def test_black_stays_black_where_it_is_kept_only() -> None:
    _, trace = traced("evit(keep=0.6, blocks=[1])")
    working = trace.blocks[1].active()[0].numpy()
    black = panel(Image.new("RGB", (240, 240)), (6, 6))
    drawn = with_groups(black, steps(trace)[1]).pixels
    assert (drawn[working[black.cell]] == 0).all() and (drawn[~working[black.cell]] > 0).all()


@pytest.mark.parametrize("method", ["tome(r=6)", "structural(after_block=0)", "tokenmergence"])
def test_groups_are_outlined_exactly_where_tokens_differ(method: str) -> None:
    _, trace = traced(method)
    step, base = steps(trace)[-1], panel(photo(), (6, 6))
    drawn = with_groups(base, step).pixels
    source = trace.blocks[-1].mlp.source[0].numpy()
    count = np.bincount(source, minlength=99)
    cell = cells(photo(), (6, 6))
    line = (drawn == 0).all(-1)
    down = np.zeros(line.shape, dtype=bool)
    carrier = source[cell]
    down[1:] |= carrier[1:] != carrier[:-1]
    down[:-1] |= carrier[1:] != carrier[:-1]
    down[:, 1:] |= carrier[:, 1:] != carrier[:, :-1]
    down[:, :-1] |= carrier[:, 1:] != carrier[:, :-1]
    merged = count[carrier] > 1
    assert line[down & merged].all() and not line[~merged].any()
    assert not line[inside(cell)].any()
    fill = inside(cell) & merged
    colours = group_colours(36)[step.hue][cell]
    assert np.abs(drawn - blend(base.pixels, colours, 0.6))[fill].max() < 1e-3
    assert (drawn[~merged] == base.pixels[~merged]).all()


def test_depth_is_the_number_of_blocks() -> None:
    _, trace = traced("svit(keep=0.5)")
    base = panel(photo(), (6, 6))
    drawn, mean = with_depth(base, trace, 1)
    worked = trace.depth()[1].numpy()
    assert mean == pytest.approx(worked.mean())
    expected = overlay(base.pixels, (worked / 4)[cells(photo(), (6, 6))])
    assert np.abs(drawn.pixels - expected).max() < 1e-3


def test_brought_back_is_unused_now_and_used_later() -> None:
    _, trace = traced("svit(keep=0.5, gate='topk')")
    active = np.stack([b.active()[0].numpy() for b in trace.blocks])
    picture = viz.brought_back(trace, photo())
    stages = [n for n in range(4) if n and not np.array_equal(active[n], active[n - 1])]
    cell = cells(photo(), (6, 6))
    before = pixels(photo())
    for number, block in enumerate(stages, 1):
        later = active[block + 1 :].any(0)
        now = strip(picture, number)
        mid = inside(cell)
        back = (~active[block] & later)[cell] & mid
        gone = (~active[block] & ~later)[cell] & mid
        assert np.abs(now - blend(before, np.array(BROUGHT_BACK), 0.6))[back].max(initial=0) <= 1
        assert np.abs(now - dimmed(before))[gone].max(initial=0) <= 1
        assert (now == before)[active[block][cell]].all()
    assert any((~active[b] & active[b + 1 :].any(0)).any() for b in stages)


def test_methods_that_drop_for_good_bring_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    words = said(monkeypatch, lambda: viz.brought_back(traced("evit")[1], photo()))
    assert [w for w in words if "brought" in w] == ["0 brought back later"] * 3


def said(monkeypatch: pytest.MonkeyPatch, draw: object) -> list[str]:
    """Every caption of the panels that are drawn."""
    from foveate.viz import tokens

    words: list[str] = []
    page = tokens.page

    def note(panels, title=(), **options):
        words.extend([*title, *(w for p in panels for w in p.words)])
        return page(panels, title, **options)

    monkeypatch.setattr(tokens, "page", note)
    draw()  # type: ignore[operator]
    return words


def test_captions_say_method_rate_tokens_and_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    import foveate

    model = traced("spvit(keep=0.6)")[0]
    prepared = Preprocessing.of(model)(photo())
    trace = model.trace(prepared.tensor[None])
    words = said(monkeypatch, lambda: viz.kept(trace, photo(), model=model))
    count = foveate.count(model, trace=trace)
    assert words[0] == "spvit(keep=0.6)"
    assert words[1] == "tokens per block: " + " ".join(
        str(b.mlp.layout.total) for b in trace.blocks
    )
    assert f"{count.macs / 1e9:.4f} of {count.dense_macs / 1e9:.4f} GMACs" in words[2]
    assert f"({count.ratio:.0%})" in words[2]
    assert "14 patches" not in words and "6 x 6 patches" in words


def test_each_image_of_a_batch_has_its_own_numbers() -> None:
    model, trace = traced("ats(K=12)")
    one = [viz.caption(model, trace, index) for index in range(2)]
    assert one[0][0] == one[1][0]
    for index in range(2):
        counts = [block.mlp.layout.lengths[index] for block in trace.blocks]
        assert one[index][1] == "tokens per block: " + " ".join(map(str, counts))


def test_a_masked_pass_counts_the_tokens_that_take_part() -> None:
    model, _ = traced("dynamicvit(keep=0.7)")
    x = Preprocessing.of(model)(photo()).tensor[None]
    gathered = viz.caption(model, model.trace(x))
    model.mode, model.gate = "masked", "topk"
    assert viz.caption(model, model.trace(x)) == [repr(model.reducer), *gathered[1:]]


# Geometry ----------------------------------------------------------------------------------------


def test_pictures_have_the_images_own_resolution() -> None:
    base = panel(photo(500, 333), (6, 6))
    assert base.pixels.shape == (333, 500, 3) and (base.pixels == pixels(photo(500, 333))).all()


@pytest.mark.parametrize("size", [(28, 28), (1, 1), (100, 30), (3, 5000), (5000, 1)])
def test_small_images_grow_by_whole_factors(size: tuple[int, int]) -> None:
    base = panel(Image.new("RGB", size, "red"), (6, 6))
    height, width = base.pixels.shape[:2]
    assert width % size[0] == 0 and height % size[1] == 0
    assert max(width, height) >= 224 and min(width, height) >= 24
    assert set(np.unique(base.cell)) == set(range(36))


def test_a_strip_of_large_images_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.viz.grid._MOST_PIXELS", 100_000)
    _, trace = traced("evit")
    assert viz.kept(trace, photo(1200, 1000)).size < (1200, 1000)


def test_cells_cover_the_box_and_nothing_else() -> None:
    base = panel(photo(400, 200), (2, 4), (100.0, 0.0, 300.0, 200.0))
    assert (base.cell[:, :100] == -1).all() and (base.cell[:, 300:] == -1).all()
    assert (base.cell[10, 100:300] == np.repeat(range(4), 50)).all()
    assert (base.cell[190, 100:300] == np.repeat(range(4, 8), 50)).all()
    faded = seen(base).pixels
    assert (faded[:, 100:300] == base.pixels[:, 100:300]).all()
    assert (faded[:, :100] > base.pixels[:, :100]).all()


def test_patches_stand_where_the_model_sees_them() -> None:
    """A bright square in the image lights the same cell of the tensor and of the panel."""
    for fit in ("stretch", "crop", "aspect"):
        image = Image.new("RGB", (300, 240))
        image.paste("white", (160, 100, 220, 140))
        model = traced("evit")[0]
        prepared = Preprocessing.of(model, fit=fit)(image)
        _, height, width = prepared.tensor.shape
        grid = (height // 8, width // 8)
        light = prepared.tensor.mean(0).unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3)).flatten()
        base = panel(image, grid, prepared.box)
        mean = [base.pixels[base.cell == p].mean() for p in range(grid[0] * grid[1])]
        assert np.corrcoef(light.numpy(), mean)[0, 1] > 0.97


def test_images_come_as_paths_pixels_or_pictures(tmp_path) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    grey = torch.arange(28 * 28, dtype=torch.uint8).view(1, 28, 28)
    assert as_image(path).size == as_image(str(path)).size == photo().size
    assert (pixels(as_image(grey)) == grey[0, :, :, None].numpy()).all()
    assert as_image(photo().convert("CMYK")).mode == "RGB"
    for wrong in (grey.float(), grey[0], 3):
        with pytest.raises(ValueError, match="image must be a path, a PIL image or uint8 pixels"):
            as_image(wrong)


# From models and images --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", viz.KINDS)
def test_draw_preprocesses_and_runs(kind: str) -> None:
    model = traced("evit(keep=0.7)")[0]
    model.train()
    picture = viz.draw(model, photo(), kind)
    assert model.training and model.vit.training
    trace = model.eval().trace(Preprocessing.of(model)(photo()).tensor[None])
    draw = {"brought-back": viz.brought_back}.get(kind) or getattr(viz, kind)
    assert (pixels(picture) == pixels(draw(trace, photo(), model=model))).all()


def test_draw_refuses_plain_models_and_unknown_kinds() -> None:
    model = traced("evit")[0]
    with pytest.raises(ValueError, match="a model from foveate.apply is needed"):
        viz.draw(model.vit, photo())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be one of"):
        viz.draw(model, photo(), "keept")


@pytest.mark.parametrize("kind", viz.SHEETS)
def test_sheet_has_a_column_a_method_and_a_row_an_image(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.viz import show

    seen_cells: list = []
    page = show.page

    def note(cells, title=(), **options):
        seen_cells.append((cells, options))
        return page(cells, title, **options)

    monkeypatch.setattr(show, "page", note)
    models = [traced(m)[0] for m in ("evit(keep=0.7)", "tome(r=4)", "svit(keep=0.7)")]
    picture = viz.sheet(models, {"one": photo(), "two": photo(100, 300)}, kind=kind)
    (cells, options), *_ = seen_cells
    assert options["columns"] == 4 and len(cells) == 8
    assert [h[0] for h in options["heads"]] == ["input", *(repr(m.reducer) for m in models)]
    assert [cells[0].words, cells[4].words] == [["one"], ["two"]]
    assert max(cells[0].image.size) == 256 and cells[4].image.height == 256
    assert picture.width > 4 * cells[0].image.width
    named = viz.sheet({"mine": models[0]}, [photo()], kind=kind)
    assert named.width < picture.width


def test_sheet_needs_models_and_images() -> None:
    with pytest.raises(ValueError, match="at least one model and one image"):
        viz.sheet([], [photo()])
    with pytest.raises(ValueError, match="at least one model and one image"):
        viz.sheet([traced("evit")[0]], [])


def test_a_picture_that_no_file_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.viz.layout._MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large for one file"):
        viz.draw(traced("evit")[0], photo())
