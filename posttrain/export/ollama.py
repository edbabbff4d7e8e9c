"""A Modelfile for Ollama: the chat template in Go's language, the stop token, greedy answers as they were measured.

Ollama does not read Jinja. Its template is made from what ours renders: the text before and after a message of each role, and
before an answer. A template that does more than that, as one that drops an earlier turn's thoughts, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.models.chat import chat_text, stop_token

CONTENT = "\ue000CONTENT\ue001"  # private use: no template writes it
ROLES = ("system", "user", "assistant")
TOO_MUCH = (
    "the chat template does more than to write around contents, and Ollama's cannot: use --format gguf, which keeps the template "
    "as it is"
)
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a chat template writes around contents."""

    begin: str  # of every chat
    around: dict[str, tuple[str, str]]  # role -> before and after its content
    answer: str  # before an answer
    default_system: str | None  # the system prompt of a chat that has none
    joined: bool  # the system prompt stands inside the first user turn, as in Gemma's chats

    def render(self, chat: Chat) -> str:
        messages = (
            chat
            if chat[0]["role"] == "system" or self.default_system is None
            else [_message("system", self.default_system), *chat]
        )
        return self.begin + "".join(self._text(place, messages) for place in range(len(messages))) + self.answer

    def _text(self, place: int, messages: Chat) -> str:
        before, after = self.around[messages[place]["role"]]
        inside = self.joined and place == 1 and messages[0]["role"] == "system"
        return ("" if inside else before) + messages[place]["content"] + after


def _message(role: str, content: str = CONTENT) -> dict[str, str]:
    return {"role": role, "content": content}


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The pieces of a template, tried on chats of several forms.

    Raises:
        UserError: the template cannot be said in pieces.
    """

    def rendered(*chat: dict[str, str], prompt: bool = False) -> str:
        return chat_text(tokenizer, list(chat), add_generation_prompt=prompt)

    def around(whole: str, before: str = "") -> tuple[str, str]:
        """What stands before and after the last content, behind a text that the whole begins with."""
        first, found, last = whole.removeprefix(before).rpartition(CONTENT)
        if not whole.startswith(before) or not found or CONTENT in first:
            raise UserError(TOO_MUCH)
        return first, last

    user, reply, system = _message("user"), _message("assistant"), _message("system")
    alone = rendered(user)
    answer = rendered(user, prompt=True).removeprefix(alone)
    pairs = {"assistant": around(rendered(user, reply), alone)}
    pairs["user"] = around(rendered(user, reply, user), rendered(user, reply))
    begin, default, joined = around(alone)[0].removesuffix(pairs["user"][0]), None, False
    if takes_system := _takes_system(tokenizer):
        texts = rendered(system, user).split(CONTENT)
        if len(texts) != 3:
            raise UserError(TOO_MUCH)
        joined = not texts[1].endswith(pairs["user"][0])
        opening, closing = texts[0], texts[1] if joined else texts[1].removesuffix(pairs["user"][0])
        if begin.startswith(opening) and begin.endswith(closing) and len(begin) > len(opening) + len(closing):
            default, begin = begin[len(opening) : len(begin) - len(closing)], ""
        pairs["system"] = (opening.removeprefix(begin), closing)
    pieces = Pieces(begin, pairs, answer, default, joined)
    _check(pieces, tokenizer, takes_system)
    return pieces


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        chat_text(tokenizer, [_message("system"), _message("user")])
    except UserError:  # the template says so itself
        return False
    return True


def _check(pieces: Pieces, tokenizer: PreTrainedTokenizerBase, takes_system: bool) -> None:
    turns = [_message("user", "1+1?"), _message("assistant", "2"), _message("user", "2+2?\nSay #### 4.")]
    chats = [turns[:1], turns, *([[_message("system", "Be brief."), *turns]] if takes_system else [])]
    for chat in chats:
        if pieces.render(chat) != chat_text(tokenizer, chat, add_generation_prompt=True):
            raise UserError(TOO_MUCH)


def modelfile(tokenizer: PreTrainedTokenizerBase, file_name: str, system: str | None = None) -> str:
    """The text of a Modelfile beside a GGUF file. `system` is the system prompt of the run's own prompts, where they have one."""
    pieces = pieces_of(tokenizer)
    system = pieces.default_system if system is None else system
    if '"""' in (system or ""):
        raise UserError('the system prompt holds """, which ends a text in a Modelfile: use --format gguf')
    roles = [role for role in ROLES if role in pieces.around]
    cases = []
    for number, role in enumerate(roles):
        before, after = pieces.around[role]
        if role == "user" and pieces.joined:
            before = f'{{{{ if or (ne $i 1) (ne (index $.Messages 0).Role "system") }}}}{before}{{{{ end }}}}'
        cases.append(f'{{{{ {"if" if not number else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    each = "$i, $message := .Messages" if pieces.joined else ".Messages"
    begin = pieces.begin
    if tokenizer.bos_token and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin = begin.removeprefix(tokenizer.bos_token)  # the file says that the runtime adds it
    begin += _empty_turn(pieces, tokenizer) if system == "" else ""
    template = f"{begin}{{{{ range {each} }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{pieces.answer}"
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{template}"""']
    if system:
        lines += [f'SYSTEM """{system}"""']
    stop = stop_token(tokenizer)
    return "\n".join([*lines, f'PARAMETER stop "{stop}"', "PARAMETER temperature 0", ""])


def _empty_turn(pieces: Pieces, tokenizer: PreTrainedTokenizerBase) -> str:
    """What our template makes of an empty system prompt, for chats without one: Ollama takes an empty SYSTEM for none."""
    chat = [_message("system", ""), _message("user")]
    text, (before, after) = chat_text(tokenizer, chat, add_generation_prompt=True), pieces.around.get("system", ("", ""))
    if pieces.joined or text != pieces.render(chat):
        return ""  # the template leaves it out, or it is no turn of its own
    return f'{{{{ if ne (index .Messages 0).Role "system" }}}}{before}{after}{{{{ end }}}}'
