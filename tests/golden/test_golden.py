"""The same weights give the same answers as the code that each method's authors released."""

from __future__ import annotations

from pathlib import Path

import torch
from golden_files import golden, images, released
from torch import Tensor, nn

import foveate

TOLERANCE = 1e-4


def run(model: foveate.core.ReducedViT) -> tuple[Tensor, list]:
    trace = model.eval().trace(images())
    return trace.logits, trace.blocks


def assert_logits(got: Tensor, answers: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, answers["logits"], atol=TOLERANCE, rtol=0)


def left_patches(state) -> list[set[int]]:
    """Patches of each image that some token still carries."""
    return [set((row >= 0).nonzero().flatten().tolist()) for row in state.source]


def chain_kept(answers: dict[str, Tensor], fused: bool) -> list[list[set[int]]]:
    """Original patches left after each stage, from indices into the tokens entering it."""
    batch = answers["kept0"].shape[0]
    entering = [list(range(196)) for _ in range(batch)]
    stages = []
    for stage in range(3):
        kept = answers[f"kept{stage}"].tolist()
        entering = [[entering[b][i] for i in kept[b]] for b in range(batch)]
        stages.append([{p for p in entering[b] if p >= 0} for b in range(batch)])
        if fused:  # the fused token stands last and carries no patch
            entering = [[*row, -1] for row in entering]
    return stages


def load(name: str, tmp_path: Path, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A case as its users get it, and the original's answers."""
    state, answers = golden(name)
    return foveate.load(released(state, tmp_path), num_heads=3, **options), answers


def test_tome(tmp_path: Path) -> None:
    for name, options in (("tome", {}), ("tome_plain", {"prop_attn": False})):
        model, answers = load(name, tmp_path, method="tome", r=13, **options)
        trace = model.trace(images())
        assert_logits(trace.logits, answers)
        final = trace.final
        assert torch.equal(final.source, answers["assignment"][:, 1:].long())
        assert torch.equal(final.layout.rect(final.size), answers["size"])


def test_evit(tmp_path: Path) -> None:
    for name, rest in (("evit", "fuse"), ("evit_nofuse", "drop")):
        model, answers = load(name, tmp_path, origin="evit", keep=0.7, rest=rest)
        logits, blocks = run(model)
        assert_logits(logits, answers)
        for block, expected in zip((3, 6, 9), chain_kept(answers, rest == "fuse"), strict=True):
            assert left_patches(blocks[block].output) == expected


def assert_kept(blocks: list, answers: dict[str, Tensor], stages: tuple[int, ...]) -> None:
    for stage, block in enumerate(stages):
        kept = [set(row) for row in answers[f"kept{stage}"].tolist()]
        assert left_patches(blocks[block].attention) == kept


def test_dynamicvit(tmp_path: Path) -> None:
    model, answers = load("dynamicvit", tmp_path)
    logits, blocks = run(model)
    assert_logits(logits, answers)
    assert_kept(blocks, answers, (3, 6, 9))


def test_dynamicvit_scores(tmp_path: Path) -> None:
    """The predictor's log-probabilities, not only their order."""
    model, answers = load("dynamicvit", tmp_path)
    entering = model.trace(images()).blocks[2].output
    got = model.reducer.logits(0, entering).log_softmax(-1)[..., 0]
    torch.testing.assert_close(got, answers["keep_logprob0"], atol=TOLERANCE, rtol=0)


def test_dynamicvit_lvvit(tmp_path: Path) -> None:
    model, answers = load("dynamicvit_lvvit", tmp_path)
    logits, blocks = run(model)
    assert_logits(logits, answers)
    assert_kept(blocks, answers, (2, 4, 6))


def test_lvvit(tmp_path: Path) -> None:
    state, answers = golden("dynamicvit_lvvit")
    dense = {key: value for key, value in state.items() if not key.startswith("score_predictor.")}
    model = foveate.load(released(dense, tmp_path), num_heads=3)
    with torch.no_grad():
        token, patches = model.forward_labels(images())
    torch.testing.assert_close(token, answers["dense_class"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(patches, answers["dense_aux"], atol=TOLERANCE, rtol=0)


def test_evovit_deit(tmp_path: Path) -> None:
    model, answers = load("evovit_deit", tmp_path)
    assert_logits(run(model)[0], answers)


def test_svit(tmp_path: Path) -> None:
    for gate_prefix_last in (True, False):  # the class token stays active in these images
        model, answers = load("svit", tmp_path, gate_prefix_last=gate_prefix_last)
        logits, blocks = run(model)
        assert_logits(logits, answers)
        active = answers["active"].bool()
        for gate in range(9):
            assert torch.equal(blocks[3 + gate].active(), active[:, gate, 1:])


def test_mae_encoder(tmp_path: Path) -> None:
    """Answers are of the whole autoencoder: here that its encoder is all there is."""
    model, _ = load("mae", tmp_path)
    state, _ = golden("mae")
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    assert model.state_dict().keys() == encoder.keys() and model.num_classes == 0
    assert all(torch.equal(value, encoder[key]) for key, value in model.state_dict().items())
