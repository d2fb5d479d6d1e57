"""Methods by name and by string: what is read, and that nothing is ever evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate.core import Chain, Reducer, ScoreReducer
from foveate.methods import ATS, EViT, ToMe
from foveate.registry import list_methods, make, method_class, parse, register

NAMES = [
    "atm",
    "ats",
    "attention",
    "cropr",
    "dynamicvit",
    "evit",
    "evovit",
    "pitome",
    "random",
    "spvit",
    "static",
    "structural",
    "svit",
    "tokenmergence",
    "tome",
]


def test_the_twelve_methods() -> None:
    assert list_methods() == foveate.list_methods() == NAMES
    for name in NAMES:
        cls = method_class(name)
        assert cls.name == name and cls.paper and cls.summary and cls.hooks
        assert parse(name).config() == make(name).config() == cls().config()


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("evit(keep=0.5)", {"keep": 0.5}),
        ("  evit ( keep = 0.5 , rest = 'drop' )  ", {"keep": 0.5, "rest": "drop"}),
        ("evit(keep=[0.9, 0.8, 0.7], blocks=(2, 4, 6))", {"blocks": (2, 4, 6)}),
        ("evit(keep=1, warmup=[0, 0.5], warmup_steps=4)", {"warmup": (0, 0.5)}),
        ("evit(keep=+0.5, blocks=None,)", {"keep": 0.5, "blocks": None}),
    ],
)
def test_strings(text: str, config: dict) -> None:
    method = parse(text)
    assert isinstance(method, EViT)
    assert config.items() <= method.config().items()


def test_chains() -> None:
    chain = parse("evit(keep=0.8) + tome(r=4, blocks=[10, 11]) + ats(K=9)")
    assert isinstance(chain, Chain)
    assert [type(part) for part in chain.members] == [EViT, ToMe, ATS]
    assert chain.members[1].config()["blocks"] == (10, 11)
    assert chain.config()["evit"]["keep"] == 0.8
    assert parse("(evit + tome) + ats").config() == parse("evit + tome + ats").config()


@pytest.mark.parametrize("method", ["evit(keep=0.6, rest='drop')", "tome(r=(3, 1))", "svit"])
def test_repr_can_be_read_again(method: str) -> None:
    assert parse(repr(parse(method))).config() == parse(method).config()
    chain = parse(f"{method} + structural")
    assert parse(repr(chain)).config() == chain.config()


NASTY = [
    "__import__('os').system('touch {path}')",
    "evit(keep=__import__('os').system('touch {path}'))",
    "evit(keep=open('{path}', 'w'))",
    "evit(keep=[open('{path}', 'w') for _ in (1,)])",
    "evit(keep=(lambda: open('{path}', 'w'))())",
    "evit(keep=f\"{{open('{path}', 'w')}}\")",
    "evit(keep=(x := open('{path}', 'w')))",
    "evit(**{{'keep': open('{path}', 'w')}})",
    "evit(keep=0.5)(open('{path}', 'w'))",
    "[evit, open('{path}', 'w')][0]",
    "evit + open('{path}', 'w')",
    "evit.__class__.__mro__[1].__subclasses__()",
    "evit if open('{path}', 'w') else tome",
]


@pytest.mark.parametrize("text", NASTY)
def test_nothing_is_evaluated(text: str, tmp_path) -> None:
    path = tmp_path / "evaluated"
    with pytest.raises(ValueError):
        parse(text.format(path=path))
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "evit(keep=0.7",
        "evit keep=0.7",
        "evit(0.7)",
        "evit(*[0.7])",
        "evit(keep=half)",
        "evit(keep=0.5 * 0.5)",
        "evit - tome",
        "evit + ",
        "evit; tome",
        "evit\ntome",
        "'evit'",
        "7",
        "evit\0",
        "evit(keep=0.5, keep=0.6)",
        "(" * 1000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read the method|null bytes"):
        parse(text)


def test_a_string_without_end_is_a_value_error() -> None:
    try:
        parse("evit" + " + tome" * 3000)
    except (ValueError, RecursionError) as error:
        kind = type(error)  # a traceback as deep as this one takes minutes to print
    assert kind is ValueError


@given(st.text(alphabet="evitome(=)[],.+0123456789'\"#: \n", max_size=30))
def test_noise_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse(text), Reducer)
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("evitt", "evit"),
        ("tomee", "tome"),
        ("dynamic_vit", "dynamicvit"),
        ("EViT", "evit"),
        ("ToMe", "tome"),
        ("ATS", "ats"),
        ("SPViT", "spvit"),
    ],
)
def test_near_misses_of_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{name}'; did you mean '{near}'"):
        parse(name)


def test_names_that_resemble_nothing_get_the_list() -> None:
    with pytest.raises(ValueError) as error:
        make("pruning")
    assert "did you mean" not in str(error.value) and ", ".join(NAMES) in str(error.value)


@pytest.mark.parametrize(
    ("text", "option", "near"),
    [
        ("evit(kep=0.7)", "kep", "keep"),
        ("evit(Keep=0.7)", "Keep", "keep"),
        ("tome(R=4)", "R", "r"),
        ("ats(k=4)", "k", "K"),
        ("evit(warm_up=None)", "warm_up", "warmup"),
    ],
)
def test_near_misses_of_options(text: str, option: str, near: str) -> None:
    name = text.split("(")[0]
    expected = f"unknown option of {name} '{option}'; did you mean '{near}'"
    with pytest.raises(ValueError, match=expected) as error:
        parse(text)
    assert "Legal: " in str(error.value)


def test_inner_fields_are_no_options() -> None:
    for name in ("spec", "acts", "hooks", "training", "name", "needs"):
        with pytest.raises(ValueError, match="unknown option"):
            make("evit", {name: 1})


@pytest.mark.parametrize(
    "text",
    [
        "evit(rest=1)",
        "evit(recall_before=3.5)",
        "evovit(layerwise='off')",
        "spvit(accumulate=2)",
        "tome(prop_attn=0)",
        "tome(inflection='late')",
        "tome(blocks=3)",
        "evit(blocks='123')",
        "evovit(starts=4)",
        "evovit(tradeoff='half')",
        "random(seed=1.5)",
        "random(seed='a')",
        "svit(keep_bias='much')",
        "svit(reactivate='never')",
        "ats(K=0)",
        "ats(K=[9, 0])",
        "ats(K=2.5)",
        "tome(r=-1)",
        "tome(r=[4, -1])",
        "evit(keep=0)",
        "evit(keep=1.2)",
        "evit(keep=[0.5, 2, 0.5])",
        "evit(keep='0.5')",
        "evit(blocks=[3, 1])",
        "evit(blocks=[3, 3])",
        "evit(blocks=[])",
        "evit(blocks=[-1])",
        "svit(ratio='both')",
        "dynamicvit(gate='best')",
        "spvit(package='max')",
        "ats(variant='official')",
    ],
)
def test_wrong_values_are_refused_at_construction(text: str) -> None:
    """Before any model is there; the message names the option."""
    option = text.split("(")[1].split("=")[0].replace("starts", "(starts|blocks)")
    with pytest.raises(ValueError, match=rf"\b{option}\b"):
        parse(text)


@dataclass(eq=False, kw_only=True, repr=False)
class Odd(ScoreReducer):
    """Options of kinds that no built-in method has."""

    anything: Any = None
    one_of: Literal["a", "b"] = "a"
    table: dict[str, int] = field(default_factory=dict)
    function: Callable[[int], int] = abs


def test_options_of_any_kind_can_be_declared() -> None:
    assert Odd(anything=object(), one_of="b", table={"x": 1}, function=len).one_of == "b"
    with pytest.raises(ValueError, match="recall_before"):
        Odd(recall_before=0.5)


def test_registering() -> None:
    @dataclass(eq=False, kw_only=True, repr=False)
    class Own(ScoreReducer):
        paper: ClassVar[str] = "none"
        summary: ClassVar[str] = "a test"
        hooks: ClassVar[tuple[str, ...]] = ("before",)

    for name in ("Own", "own-method", "my_own", ""):
        with pytest.raises(ValueError, match="lower-case"):
            register(name)(Own)
    with pytest.raises(ValueError, match="'evit' is registered already"):
        register("evit")(Own)

    @dataclass(eq=False, kw_only=True, repr=False)
    class Bare(ScoreReducer):
        pass

    with pytest.raises(ValueError, match="Bare must declare its paper, summary and hooks"):
        register("bare")(Bare)
    assert list_methods() == NAMES
