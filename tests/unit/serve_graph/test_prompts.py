"""`clean_prompt` against diffusers' own, and the prompt hash."""

import html
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_graph.prompts import PROMPT_HASH_CHARS, clean_prompt, prompt_hash

SECRET = b"a secret of the tests"

PROMPTS = [
    "a red circle moving left",
    "  two   spaces \t and\r\n a newline\u3000and an ideographic space\u00a0 ",
    "&lt;b&gt; &amp;lt; &amp;amp;lt; &amp;amp;amp;lt; &hellip; &#x2019; &#xD800; &nbsp;",
    "<b>tags keep ftfy from unescaping: &eacute;</b> &amp;eacute;",
    "âœ” mojibake and naÃ¯ve cafÃ© â€œquotesâ€\x9d",
    "“curly quotes” ’ and ﬁne ligatures, ＬＯＵＤ　ＮＯＩＳＥＳ",
    "色调艳丽，过曝，静态",
    "\x1b[36mterminal colours\x1b[0m and \x07 control \x9f characters \ufeff",
    "e\u0301 decomposed, \U0001f468\u200d\U0001f469\u200d\U0001f467 joined",
    "\ud83d\ude00 surrogates \ud800",
    "",
    " \n ",
]

TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="&amp;lt#x120; \t\n<>é“\u3000"),
    st.text().map(html.escape),
    st.text(alphabet="éü“”€中😀 ").map(lambda text: text.encode().decode("cp1252", errors="ignore")),
)


@pytest.fixture(scope="module")
def prompt_clean() -> Callable[[str], str]:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean as stock

    return stock


@pytest.mark.parametrize("text", PROMPTS)
def test_clean_prompt_equals_the_stock_pipelines(text: str, prompt_clean: Callable[[str], str]) -> None:
    assert clean_prompt(text) == prompt_clean(text)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text="&amp;amp;lt;")
def test_clean_prompt_equals_the_stock_pipelines_for_any_text(text: str, prompt_clean: Callable[[str], str]) -> None:
    assert clean_prompt(text) == prompt_clean(text)


def test_clean_prompt_collapses_white_space_and_resolves_entities_twice() -> None:
    assert clean_prompt(" a\n\tred &amp;amp;amp; blue\u3000dot ") == "a red & blue dot"


def test_prompts_import_neither_diffusers_nor_torch() -> None:
    program = "import sys, serve_graph.prompts; print(sorted({'diffusers', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompt_hash_is_a_stable_hmac_of_the_cleaned_prompt() -> None:
    # printf 'a red dot' | openssl dgst -sha256 -hmac 'a secret of the tests'
    assert prompt_hash(SECRET, "a red dot") == "bda2bf871686ecbb"


def test_prompt_hash_ignores_what_cleaning_removes() -> None:
    assert prompt_hash(SECRET, " a  red\ndot ") == prompt_hash(SECRET, "a red dot")


def test_prompt_hash_differs_by_prompt_and_by_secret() -> None:
    hashes = {prompt_hash(s, p) for s in (SECRET, b"another") for p in ("a red dot", "a blue dot")}
    assert len(hashes) == 4


@given(text=st.text(alphabet=st.characters(codec=None)))
def test_prompt_hash_has_its_length_for_any_text(text: str) -> None:
    digest = prompt_hash(SECRET, text)
    assert len(digest) == PROMPT_HASH_CHARS
    assert set(digest) <= set("0123456789abcdef")


def test_prompt_hash_refuses_an_empty_secret() -> None:
    with pytest.raises(ValueError, match="secret"):
        prompt_hash(b"", "a red dot")
