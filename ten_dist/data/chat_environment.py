"""Templates of conversations compiled by Jinja2, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ten_dist.data.chat_tokens import SAID_START, SAID_STOP
from ten_dist.errors import ConfigurationError

INSTALL_COMMAND = "pip install 'ten_dist[chat]'"


def compile_template(source: str, name: str) -> Any:
    """The template of Jinja2, as transformers sets it up.

    Raises:
        ConfigurationError: it does not parse, or Jinja2 is not installed.
    """
    try:
        import jinja2
        from jinja2 import ext, sandbox
    except ImportError as error:
        raise ConfigurationError(
            f"chat templates need a package that is not installed ({error}): "
            f"{INSTALL_COMMAND} brings it"
        ) from None

    class Generation(ext.Extension):
        """Marks what stands between the tags."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_said")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return f"{SAID_START}{caller()}{SAID_STOP}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    # The one of Jinja2 is for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigurationError(
            f"{name} does not parse: line {error.lineno}: {error.message}"
        ) from None


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)
