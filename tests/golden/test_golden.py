"""The same weights give the same answers as the code that each method's authors released."""

from __future__ import annotations

import torch
from golden_files import golden, images, plain_vit
from torch import Tensor

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


def test_tome() -> None:
    for name, options in (("tome", {}), ("tome_plain", {"prop_attn": False})):
        state, answers = golden(name)
        model = foveate.apply(plain_vit(state), "tome", r=13, **options).eval()
        trace = model.trace(images())
        assert_logits(trace.logits, answers)
        final = trace.final
        assert torch.equal(final.source, answers["assignment"][:, 1:].long())
        assert torch.equal(final.layout.rect(final.size), answers["size"])


def test_evit() -> None:
    for name, fuse in (("evit", True), ("evit_nofuse", False)):
        state, answers = golden(name)
        model = foveate.apply(plain_vit(state), "evit", keep=0.7, fuse=fuse)
        logits, blocks = run(model)
        assert_logits(logits, answers)
        for block, expected in zip((3, 6, 9), chain_kept(answers, fuse), strict=True):
            assert left_patches(blocks[block].left) == expected


def test_dynamicvit() -> None:
    state, answers = golden("dynamicvit")
    names = {"in_conv.0": "local.0", "in_conv.1": "local.1"}
    names |= {f"out_conv.{i}": f"out.{i}" for i in (0, 2, 4)}
    new, plain = {}, {}
    for key, value in state.items():
        if not key.startswith("score_predictor."):
            plain[key] = value
            continue
        _, stage, rest = key.split(".", 2)
        layer, leaf = rest.rsplit(".", 1)
        new[f"predictors.{stage}.{names[layer]}.{leaf}"] = value
    model = foveate.apply(plain_vit(plain), "dynamicvit", keep=0.7)
    model.reducer.load_state_dict(new)
    logits, blocks = run(model)
    assert_logits(logits, answers)
    for stage, block in enumerate((3, 6, 9)):
        kept = [set(row) for row in answers[f"kept{stage}"].tolist()]
        assert left_patches(blocks[block].attended) == kept


def test_dynamicvit_scores() -> None:
    """The predictor's log-probabilities, not only their order."""
    state, answers = golden("dynamicvit")
    from foveate.methods.dynamicvit import Predictor

    predictor = Predictor(48)
    names = {"in_conv.0": "local.0", "in_conv.1": "local.1"}
    names |= {f"out_conv.{i}": f"out.{i}" for i in (0, 2, 4)}
    weights = {}
    for key, value in state.items():
        if key.startswith("score_predictor.0."):
            layer, leaf = key.removeprefix("score_predictor.0.").rsplit(".", 1)
            weights[f"{names[layer]}.{leaf}"] = value
    predictor.load_state_dict(weights)
    plain = {k: v for k, v in state.items() if not k.startswith("score_predictor.")}
    model = foveate.apply(plain_vit(plain), "random", keep=1.0).eval()
    entering = model.trace(images()).blocks[3].attended
    got = entering.after_prefix(predictor(entering))[..., 0]
    torch.testing.assert_close(got, answers["keep_logprob0"], atol=TOLERANCE, rtol=0)


def test_evovit_deit() -> None:
    state, answers = golden("evovit_deit")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        head, *rest = key.split(".")
        if head in ("head_cls", "norm_cls"):
            continue  # used in training only
        if head == "norms":
            plain[f"blocks.{rest[0]}.norm1.{rest[1]}"] = value
        elif head == "projs":
            plain[f"blocks.{rest[0]}.attn.proj.{rest[1]}"] = value
        elif head == "qks":
            block, _, leaf = rest
            both = torch.cat([value, state[f"vs.{block}.v.{leaf}"]])
            plain[f"blocks.{block}.attn.qkv.{leaf}"] = both
        elif head == "norm":
            plain[f"fc_norm.{rest[0]}"] = value
        elif head != "vs":
            plain[key] = value
    vit = plain_vit(plain, global_pool="avg")
    model = foveate.apply(vit, "evovit", keep=0.5, variant="deit")
    assert_logits(run(model)[0], answers)


def test_svit() -> None:
    state, answers = golden("svit")
    layer_names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.proj.weight",
        "self_attn.out_proj.bias": "attn.proj.bias",
    }
    plain, gates = {}, {}
    gate_names = {"norm": "0", "mlp.fc1": "1", "mlp.fc2": "3"}
    for key, value in state.items():
        if key.startswith("selective_modules."):
            _, stage, rest = key.split(".", 2)
            layer, leaf = rest.rsplit(".", 1)
            gates[f"gates.{stage}.{gate_names[layer]}.{leaf}"] = value
        elif ".TransformerEncoderLayer." in key:
            block, rest = key.removeprefix("blocks.").split(".TransformerEncoderLayer.")
            rest = layer_names.get(rest, rest)
            rest = rest.replace("linear1", "mlp.fc1").replace("linear2", "mlp.fc2")
            plain[f"blocks.{block}.{rest}"] = value
        else:
            plain[key] = value
    vit = plain_vit(plain)
    for block in vit.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5
    for gate_prefix_last in (True, False):  # the class token stays active in these images
        model = foveate.apply(vit, "svit", gate_prefix_last=gate_prefix_last)
        model.reducer.load_state_dict(gates)
        logits, blocks = run(model)
        assert_logits(logits, answers)
        active = answers["active"].bool()
        for gate in range(9):
            assert torch.equal(blocks[3 + gate].active(), active[:, gate, 1:])
