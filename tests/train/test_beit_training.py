"""timm's Beit in training: fine-tuned on whole images, probed, exported, opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import DATA, LOOP, exported, finetune, run
from small import images, randomise, vit
from timm.models.beit import Beit
from torch import nn

import foveate
from foveate.backbones import backbone_for
from foveate.backbones.timm_beit import TABLE
from foveate.convert import save_plain
from foveate.train import recipe as recipes
from foveate.train.build import make_finetune
from foveate.train.probe import features, probe

MODEL = {
    "name": "beit_base_patch16_224",
    "options": {
        **{"img_size": 28, "patch_size": 7, "in_chans": 1},
        **{"embed_dim": 32, "depth": 3, "num_heads": 2},
    },
}


def start(path: Path) -> str:
    """What pre-training leaves: no head, a norm over all tokens, blocks with a bias each."""
    small = dict(img_size=28, patch_size=7, in_chans=1, embed_dim=32, depth=3, num_heads=2)
    relative = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    first = dict(num_classes=0, global_pool="token", use_fc_norm=False)
    model = randomise(Beit(**small, **relative, **first))
    save_plain(model, path)
    return str(path)


@pytest.mark.parametrize("name", [None, MODEL["name"]])
def test_finetuning(name: str | None, tmp_path: Path) -> None:
    """Two updates; the export is a model that opens and can be trained again."""
    path = start(tmp_path / "start.safetensors")
    data = {**DATA, "limit": 32}
    model = {"start": path} if name is None else {**MODEL, "start": path}
    words = ["model.drop_path=0.1", "optim.layer_decay=0.75", "model.pool=avg"]
    recipe = finetune(*words, model=model, data=data, loop={**LOOP, "epochs": 1})
    run(recipe, tmp_path / "run")
    again = foveate.load(tmp_path / "run")
    assert type(again) is Beit and again.num_classes == 10 and again.global_pool == "avg"
    assert isinstance(again.fc_norm, nn.Identity) == (name is None)
    state, before = exported(tmp_path / "run"), foveate.load(path).state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    key = f"blocks.2.attn.{TABLE}"
    assert not torch.equal(state[key], before[key])
    model = {"start": str(tmp_path / "run")}
    assert make_finetune(finetune(model=model), 10).model.global_pool == "avg"


def test_masked_finetuning_is_refused() -> None:
    masked = finetune("masking.ratios=[0.5]", model=MODEL)
    words = "relative position bias, and methods that drop tokens do not carry it; dense"
    with pytest.raises(ValueError, match=words) as error:
        make_finetune(masked, 10)
    assert "\n" not in str(error.value)


def test_probing() -> None:
    model, labels = (
        randomise(vit(Beit, use_rel_pos_bias=True, use_fc_norm=False)).eval(),
        torch.arange(3),
    )
    batch = (images(), labels, labels)
    with torch.no_grad():
        tokens = model.forward_features(images())
    for feature, wanted in (("token", tokens[:, 0]), ("avg", tokens[:, 1:].mean(1))):
        found, y = features(backbone_for(model), iter([batch]), recipes.Reading(feature=feature))
        torch.testing.assert_close(found, wanted)
        assert torch.equal(y, labels) and not found.requires_grad
    first, _ = features(backbone_for(model), iter([batch]), recipes.Reading(depth=1))
    model.blocks = model.blocks[:1]
    with torch.no_grad():
        torch.testing.assert_close(first, model.forward_features(images())[:, 0])


def test_a_probe_from_a_file(tmp_path: Path) -> None:
    recipe = recipes.Probe(
        model=recipes.Model(start=start(tmp_path / "x.safetensors")),
        data=recipes.Data(limit=40, val_limit=20, batch=20),
        linear=False,
        neighbours=5,
    )
    assert probe(recipe, tmp_path / "out")["accuracy"] > 0
