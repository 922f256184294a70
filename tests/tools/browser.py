"""Debian's Chromium, without a window, for tests of pages."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def opened(url, **options):
    """A page of the browser that shows `url`, and what it complained of.

    Args:
        options: of the browser's context, such as `color_scheme` or `viewport`.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("pages are shown by chromium, which is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, in a container, it cannot make a sandbox of its own.
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )
        page = browser.new_context(**options).new_page()
        complaints = []
        page.on(
            "console",
            lambda m: complaints.append(m.text) if m.type == "error" else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            page.goto(url)
            yield page, complaints
        finally:
            browser.close()
