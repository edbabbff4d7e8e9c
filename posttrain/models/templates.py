"""The text of a chat template, with a date and the run's arguments written into it: all who have it render the same.

And whether it comes to an end: `Steps`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment, nodes
    from jinja2 import Template as JinjaTemplate

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

    try:
        return _environment().parse(template)
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


# --- how long it takes ------------------------------------------------------------------------------------------------

# Templates of known models take some passes for each message or tool, and a few for each sign where they look at signs.
MOST_STEPS, STEPS_PER_SIGN = 100_000, 100
MOST_POWER = 1_000


class TooManySteps(ValueError):
    """A template does more than any conversation needs. Its text is what."""


class Steps:
    """A template rendered with a count of its steps, before it is rendered as it is: its loops may take days, and so does none.

    Passes of loops, calls of macros, and the length of what `range` and `*` make are steps. It is asked once for each
    sequence of roles, so it costs nothing where thousands of rows are rendered.
    """

    def __init__(self, template: str) -> None:
        self._left = 0
        self._seen = set[tuple[object, ...]]()
        self._template = self._compiled(template)

    def check(self, messages: list[dict[str, str]], add_generation_prompt: bool, specials: dict[str, str]) -> None:
        """Render once, and stop it where it takes too long.

        Raises:
            TooManySteps: it does. What else the template raises is raised as it is.
        """
        shape = (*(message["role"] for message in messages), add_generation_prompt)
        if shape in self._seen:
            return
        self._left = MOST_STEPS + STEPS_PER_SIGN * sum(len(message["content"]) for message in messages)
        shown = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        self._template.render(**shown, **specials)
        self._seen.add(shape)

    def _compiled(self, template: str) -> JinjaTemplate:
        from jinja2 import nodes

        environment, tree = _environment().overlay(), _parsed(template)
        blocks: list[Any] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for block in blocks:
            block.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name("_one_step", "load"), [], [], None, None)))
        # Jinja's way to look at operators, off by default: https://jinja.palletsprojects.com/en/stable/sandbox/#operator-intercepting
        environment.intercepted_binops = frozenset(("*", "**"))  # type: ignore[attr-defined]
        environment.call_binop = self._operator  # type: ignore[attr-defined]
        names = environment.globals | {"_one_step": self._take, "range": self._range}  # a copy: an overlay shares them
        tree.set_environment(environment)
        return environment.template_class.from_code(environment, environment.compile(tree), names)

    def _take(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise TooManySteps("its loops do not come to an end in any reasonable time")

    def _range(self, *ends: int) -> range:
        found = range(*ends)
        self._take(len(found))
        return found

    def _operator(self, context: object, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if abs(right) > MOST_POWER:
                raise TooManySteps(f"it computes a power of {right}")
            if isinstance(left, int):
                self._take(int(left.bit_length() * abs(right)))  # the result's bits: powers of powers grow as well
            return left**right
        for one, times in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(times, int):
                self._take(len(one) * max(0, times))
        return left * right


def _environment() -> Environment:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    found: Environment = _compile_jinja_template("").environment.overlay()
    found.intercepted_binops = frozenset(("*", "**"))  # type: ignore[attr-defined]  # so that Jinja computes no constant as it reads
    return found


@functools.lru_cache(maxsize=16)
def steps_of(template: str) -> Steps:
    return Steps(template)
