"""Names of users, and their texts in the hub's pages."""

import re
import string

import jinja2
import pytest

from jupyterhub_upperdeck import owner_of
from jupyterhub_upperdeck.text import date, markup, shorten, size
from jupyterhub_upperdeck.words import _ENGLISH, _KOREAN, preferred

ODD = [
    "alice",
    "Alice",
    "alice@example.com",
    "alice@example-com",
    "한글",
    "a" * 65,
    "a--b",
    "a---b",
    "a__b",
    "a-sha-b",
    "-a",
    "a.",
    "../x",
    "A",
]


def test_owners_can_name_projects_of_harbor_and_differ() -> None:
    owners = [owner_of(name) for name in ODD]
    assert len(set(owners)) == len(ODD)
    assert owner_of("alice") == "alice"
    assert owner_of("a.b-c_d") == "a.b-c_d"
    for owner in owners:
        assert len(owner) <= 64
        # Harbor refuses two separators in a row, which a repository's path may have.
        assert re.fullmatch("[a-z0-9]+([._-][a-z0-9]+)*", owner), owner


def test_a_name_that_looks_like_a_made_one_is_not_taken_for_it() -> None:
    made = owner_of("Alice")
    assert made.startswith("alice-sha-")
    assert owner_of(made) != made


@pytest.mark.parametrize(
    "text", ["{{ 7 * 7 }}", "{% for x in y %}", "{# hidden #}", "<script>alert(1)</script>", "\"'&"]
)
def test_markup_is_text_for_a_template_and_for_html(text: str) -> None:
    said = markup(text)
    assert not set(said) & set("{}<>\"'")
    # The hub takes the form for a template.
    assert jinja2.Template(said).render() == said
    import html

    assert html.unescape(said) == text


def test_texts_are_short_and_on_one_line() -> None:
    assert shorten("a\n\tb\u202ec\u0000") == "a bc"
    assert len(shorten("x" * 10_000)) == 200
    assert size(123_456_789) == "123 MB"
    assert size(None) == ""
    assert date("2026-11-30T10:00:00Z") == "2026-11-30 10:00 UTC"


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("ko", "ko"),
        ("ko-KR,ko;q=0.9,en-US;q=0.8", "ko"),
        ("en-GB,ko;q=0.9", "en"),
        ("de,fr;q=0.9,ko;q=0.5,en;q=0.1", "ko"),
        ("ko;q=0", "en"),
        ("ko;q=x,*", "en"),
        ("x," * 10_000 + "ko", "en"),
    ],
)
def test_the_language_is_the_browsers(accepted: str, language: str) -> None:
    assert preferred(accepted) == language


def test_both_languages_say_the_same() -> None:
    def fields(words: dict[str, str]) -> dict[str, set[str]]:
        return {
            code: {field for _, field, _, _ in string.Formatter().parse(text) if field} for code, text in words.items()
        }

    assert fields(_ENGLISH) == fields(_KOREAN)
