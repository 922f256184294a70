"""The page of the server, in a browser: a prompt goes in, tokens come out as they are made."""

import os

import pytest

from tests.serving.conftest import served
from tests.tools.browser import opened

SEEN = os.environ.get("SCREENSHOTS")
"""A folder for pictures, to look at."""


def continued(page, prompt="the state", tokens=40):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("document.getElementById('stop').disabled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_appear_with_their_probabilities(server, scheme):
    with opened(server.url, color_scheme=scheme) as (page, complaints):
        page.wait_for_function("document.title === 'tiny'")
        continued(page)
        asked = {
            "model": "tiny",
            "prompt": "the state",
            "max_tokens": 40,
            "temperature": 0,
        }
        wanted = server.client().completions.create(**asked).choices[0].text
        assert page.locator("#text").inner_text() == "the state" + wanted
        assert "40 tokens" in page.locator("#speed").inner_text()
        token = page.locator(".token").nth(3)
        token.click()
        rows = page.locator("#detail tr")
        # The likeliest tokens; at temperature 0 the chosen one is the first.
        assert rows.count() == 5
        assert rows.nth(0).inner_text().endswith("%")
        assert token.get_attribute("title") in rows.nth(0).inner_text()
        assert complaints == []
        if SEEN:
            page.screenshot(path=f"{SEEN}/serve-{scheme}.png", full_page=True)


def test_an_answer_can_be_stopped_on_a_narrow_screen(server):
    with opened(server.url, viewport={"width": 390, "height": 800}) as (
        page,
        complaints,
    ):
        page.get_by_label("Prompt").fill("a")
        page.get_by_label("Tokens").fill("20000")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_function("document.querySelectorAll('.token').length > 20")
        page.get_by_role("button", name="Stop").click()
        page.wait_for_function("document.getElementById('stop').disabled")
        count = page.locator(".token").count()
        page.wait_for_timeout(200)
        assert page.locator(".token").count() == count < 20_000
        wide = "document.documentElement.scrollWidth > window.innerWidth"
        assert not page.evaluate(wide)
        assert complaints == []
        if SEEN:
            page.screenshot(path=f"{SEEN}/serve-narrow.png", full_page=True)


def test_a_prompt_can_be_said_in_a_conversation(server):
    with opened(server.url) as (page, complaints):
        page.get_by_label("Prompt").fill("Hello")
        page.get_by_label("Tokens").fill("12")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="As a conversation").click()
        page.wait_for_function("document.getElementById('stop').disabled")
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        said = server.client().chat.completions.create(**asked).choices[0].message
        shown = page.locator("#text").inner_text()
        assert shown.strip() == f"Hello\n\n{said.content}".strip()
        assert complaints == []


def test_refusals_are_shown_and_a_key_is_asked_for(run_folder):
    locked = served(run_folder, environment={"TEN_DIST_API_KEY": "sesame"})
    with locked as server, opened(server.url) as (page, _):
        key = page.get_by_label("API key")
        key.wait_for(state="visible")
        assert "key" in page.get_by_role("alert").inner_text()
        key.fill("sesame")
        page.get_by_label("Top k").fill("1")
        continued(page, tokens=5)
        assert page.get_by_role("alert").inner_text() == ""
        assert page.locator(".token").count() == 5
        page.get_by_label("Tokens").fill("100000000")
        page.locator("#form").evaluate("form => form.requestSubmit()")
        page.wait_for_function(
            "document.getElementById('problem').textContent.includes('max_tokens')"
        )
