"""Texts for messages: safe to print, a few of many names, and the nearest known name."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.recipe.problems import suggestion
from merge_engine.text import did_you_mean, printable, some, without_common_folder

NAMES = st.lists(st.text("abc", min_size=1, max_size=8), unique=True)


@given(st.text())
def test_what_is_printable_has_no_control_character_and_can_be_read_back(text: str) -> None:
    safe = printable(text)
    assert not {unicodedata.category(one) for one in safe} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(safe.splitlines()) <= 1
    assert printable(safe) == safe
    if "\\" not in text:
        assert safe.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


@pytest.mark.parametrize(
    "text",
    ["a b", "Größe", "模型", "नमस्ते", "สวัสดี", "e\u0301", "\U0001f600", "C:\\a", "[red]x[/red]"],
)
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("\r\n\t\a", r"\r\n\t\x07"),
        ("\x85\x9b\x7f", r"\x85\x9b\x7f"),
        ("\u202e\u2066\u200f\u200b\ufeff", r"\u202e\u2066\u200f\u200b\ufeff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_moves_or_hides_text_is_escaped(text: str, safe: str) -> None:
    assert printable(text) == safe


@given(NAMES)
def test_some_names_five_and_counts_the_rest(names: list[str]) -> None:
    text = some(names)
    shown, _, rest = text.partition(" and ")
    assert shown == ", ".join(names[:5])
    assert rest == (f"{len(names) - 5} more" if len(names) > 5 else "")


@given(st.text("abcd", max_size=8), NAMES)
def test_only_a_known_name_is_meant(name: str, known: list[str]) -> None:
    assert did_you_mean(name, known) in {"", *(f'; did you mean "{other}"?' for other in known)}
    if name in known:
        assert did_you_mean(name, known) == f'; did you mean "{name}"?'


def test_the_nearest_is_meant_if_it_is_near() -> None:
    assert did_you_mean("wieght", ["height", "weight"]) == '; did you mean "weight"?'
    assert did_you_mean("seed", ["weight"]) == ""
    assert did_you_mean("weigh", ["weight"], cutoff=0.99) == ""
    assert did_you_mean("weigh", ["weight"], quoted=str.upper) == "; did you mean WEIGHT?"


def test_where_none_is_near_all_are_named() -> None:
    assert suggestion("seed", ["weight", "lambda"]) == "; known here: lambda, weight"
    assert suggestion("seed", []) == ""
    with pytest.raises(me.RecipeError, match='there is no method "average"; known here: arcee_fusion, '):
        me.run({"merge_method": "average", "models": [{"model": "a"}]})


@given(st.lists(st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=4).map("/".join)))
def test_what_all_paths_begin_with_is_left_out(paths: list[str]) -> None:
    rest = without_common_folder(paths)
    begins = {path.removesuffix(end) for path, end in zip(paths, rest, strict=True)}
    assert len(begins) <= 1 and all(begin == "" or begin.endswith("/") for begin in begins)
    firsts = {end.split("/")[0] for end in rest if "/" in end}
    assert not paths or len(firsts) > 1 or any("/" not in end for end in rest)
