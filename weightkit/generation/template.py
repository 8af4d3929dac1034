"""Chat templates: Jinja written by whoever published the checkpoint, so rendered in a sandbox.

The environment is what templates expect since transformers' ``apply_chat_template``: ``trim_blocks``,
``lstrip_blocks``, loop controls, ``raise_exception``, ``strftime_now``, a ``tojson`` that leaves HTML and non-ASCII
alone, ``generation`` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from weightkit.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_template(source: str, variables: Mapping[str, Any], *, where: object) -> str:
    """Render a chat template.

    Raises:
        TokenizerError: it does not parse, does what the sandbox forbids, or raised (for a role it does not know, say).
    """
    import jinja2

    try:
        # templates test these two for truth; that they are absent would be an error in some
        return _compiled(source).render({"tools": None, "documents": None, **variables})
    except jinja2.TemplateSyntaxError as exc:
        raise TokenizerError(
            f"the chat template does not parse (line {exc.lineno}: {exc.message})", where=where
        ) from exc
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as exc:
        what = f"the chat template refused these messages ({exc or type(exc).__name__})"
        raise TokenizerError(what, where=where, fix="Check the messages' roles and order.") from exc


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """A template ready to render: compiling takes longer than a short conversation, and there may be thousands."""
    return _environment().from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words for training. Here its body is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own convention

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
