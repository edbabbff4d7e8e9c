"""The text of a chat template, with a date and the run's arguments written into it: all who have it render the same."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError

if TYPE_CHECKING:
    from jinja2 import nodes

# The date that the Llama-3.1 and 3.2 Instruct templates write into the prompt when no clock is offered to them.
TEMPLATE_DATE = datetime.date(2024, 7, 26)


def pin_date(template: str) -> str:
    """The chat template with a fixed date in the place of today's, so that a prompt is the same on every day.

    The pinned text is saved with the adapter's tokenizer. So it holds for all who render it: SFT, GRPO, evaluation, and
    whoever serves the adapter.

    Raises:
        UserError: the template reads the clock in a way that cannot be replaced.
    """
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    pinned = re.sub(call, lambda match: repr(TEMPLATE_DATE.strftime(match[2])), template)
    if "strftime_now" in re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", pinned):
        raise UserError(
            "the chat template puts the date of today into the prompt (strftime_now): "
            "set model.chat_template to a copy with a fixed date in its place"
        )
    return pinned


def pin_arguments(template: str, arguments: dict[str, Any]) -> str:
    """The chat template with `model.template_kwargs` set at its top. It is saved with the adapter, as a pinned date is.

    A renderer drops the line break after a block (`trim_blocks`), so the template's own text stays as it is.

    Raises:
        UserError: the template reads no argument of that name.
    """
    known = argument_names(template)
    for name in sorted(arguments.keys() - set(known)):
        reads = f"it reads {', '.join(known)}" if known else "it reads no argument"
        raise UserError(f"template_kwargs.{name}: the chat template never reads it; {reads}")
    lines = [f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in arguments.items()]
    return "".join(lines) + template


# What every renderer passes, and what the tokenizer itself stands for.
_NOT_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


def argument_names(template: str) -> list[str]:
    """The arguments that a template takes from outside.

    Jinja also lists names that a template sets in one branch only. Of these, an argument is what the template asks for
    before it sets it: `x is defined`, or `x | default(...)`.
    """
    from jinja2 import meta

    tree = _parsed(template)
    own = set(_assigned(tree)) - set(_asked_for(tree))
    names = meta.find_undeclared_variables(tree) - own - _NOT_ARGUMENTS
    return sorted(name for name in names if not name.endswith("_token"))


def _parsed(template: str) -> nodes.Template:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(template).environment.parse(template)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from error


def _assigned(tree: nodes.Template) -> Iterator[str]:
    from jinja2 import nodes

    yield from (name.name for name in tree.find_all(nodes.Name) if name.ctx != "load")


def _asked_for(tree: nodes.Template) -> Iterator[str]:
    from jinja2 import nodes

    for asked in (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)):
        if asked.name in ("defined", "undefined", "default", "d") and isinstance(asked.node, nodes.Name):
            yield asked.node.name
