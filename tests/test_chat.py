"""The chat format: ids against Meta's own formatter, one end token, and prompts that no date and no answer changes."""

import datetime
import random
import shutil

import pytest
import transformers.utils.chat_template_utils as rendering
from conftest import CHATML, ROOT
from transformers import AutoTokenizer

from posttrain.config.schema import Tokenizer
from posttrain.errors import UserError
from posttrain.models.chat import chat_ids, load_tokenizer, special_ids, stop_token
from posttrain.models.special_tokens import template_specials
from posttrain.models.templates import pin_date

LLAMA3 = str(ROOT / "configs/templates/llama3.jinja")
PLAIN = str(ROOT / "configs/templates/plain.jinja")


def settings(folder, template=None):
    return Tokenizer(name_or_path=str(folder), chat_template=template)


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_dir):
    return load_tokenizer(settings(llama3_tokenizer_dir, LLAMA3))


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return load_tokenizer(settings(tiny_model_dir))


def turns(*contents, system=None):
    """Messages from alternating user and assistant texts."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


# --- Llama-3, against Meta's formatter --------------------------------------------------------------------------------

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
ANSWER = "In May she sold 48/2 = 24 clips.\nAltogether 48+24 = 72.\n#### 72"
CONVERSATIONS = {
    "question": turns(QUESTION),
    "answered": turns(QUESTION, ANSWER),
    "system": turns(QUESTION, ANSWER, system="You solve maths problems."),
    "several turns": turns("2+2?", "#### 4", "And 3+3?", "#### 6", "1,234.50 - 7?", system="Short."),
    "empty": turns("", ""),
    "empty system": turns("hi", system=""),
    "spaces around": turns("  two before, three after   ", " one before"),
    "only spaces": turns("   ", " "),
    "tab before": turns("\tindented", "\t\tmore"),
    "line breaks inside and after": turns("a\n\nb\r\n\tc\n\n", "d\n"),
    "no-break and ideographic spaces": turns("\u00a0a", "\u3000b\u3000", "\u2028c\u2029"),
    "accents, composed and not": turns("Zo\u00eb, Jose\u0301 and Ångström: ½ + ⅓ = ⅚"),
    "other scripts": turns("小明有12个苹果,给了小红5个。还剩多少?", "४२ + ٤٢ = קב", "Сколько?"),
    "emoji": turns("🦆🦆🦆 + 👩‍👩‍👧‍👦 = ? 🇨🇭", "\U0001f9ee"),
    "digits": turns("1234567890123 007 3.14159 1e-5 $1,000,000.00 50%", "#### 1234567890123"),
    "contractions": turns("I'M, they'Ll, we'd, it's, o'clock's"),
    "code and markup": turns("```python\nprint(  1)\n```\n<b>x</b> {{ messages }} {% raw %} \\boxed{72}"),
    "a role as text": turns("assistant\n\nuser: assistant", "system"),
    "begins with an answer": [{"role": "assistant", "content": "Ask."}, {"role": "user", "content": "2+2?"}],
}


@pytest.fixture(scope="module")
def meta():
    chat_format = pytest.importorskip("llama_models.llama3.chat_format", reason="llama-models is not installed")
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return chat_format.ChatFormat(MetaTokenizer.get_instance())


def meta_prompt(meta, messages):
    from llama_models.datatypes import RawMessage

    return meta.encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens


def meta_conversation(meta, messages):
    """What Meta's formatter gives without the header of the answer to come."""
    header = meta._encode_header("assistant")
    whole = meta_prompt(meta, messages)
    assert whole[-len(header) :] == header
    return whole[: -len(header)]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_llama3_ids_are_metas(llama3, meta, messages):
    assert chat_ids(llama3, messages, add_generation_prompt=True) == meta_prompt(meta, messages)
    assert chat_ids(llama3, messages) == meta_conversation(meta, messages)


def test_llama3_ids_are_metas_for_made_up_texts(llama3, meta):
    rng = random.Random(0)
    pieces = [*"aZ09 .,'#<>|$%éß水🦆\t\u00a0", "  ", "\n", "\r\n", "####", "The ", " answer", " 12,345", "'s", "eot_id"]
    for _ in range(400):
        texts = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 4))]
        texts = [text if "\n" not in leading_space(text) else text.lstrip() for text in texts]
        messages = turns(*texts, system=rng.choice((None, "Be brief.")))
        assert chat_ids(llama3, messages, add_generation_prompt=True) == meta_prompt(meta, messages), messages


def leading_space(text):
    return text[: len(text) - len(text.lstrip())]


@pytest.mark.parametrize("lead", ["\n", "\n\n", " \n ", "\r\n", "\t\n"])
def test_llama3_drops_leading_space_that_would_join_the_headers_line_break(llama3, meta, lead):
    messages = turns(lead + "two", lead + " four")
    assert chat_ids(llama3, messages) == meta_conversation(meta, turns("two", "four"))


@pytest.mark.parametrize("lead", ["", " ", "\n", "  \n"])
def test_llama3_prompt_is_a_prefix_of_its_answered_form(llama3, lead):
    prompt = turns(QUESTION, system="You solve maths problems.")
    whole = chat_ids(llama3, [*prompt, {"role": "assistant", "content": lead + ANSWER}])
    start = chat_ids(llama3, prompt, add_generation_prompt=True)
    assert whole[: len(start)] == start
    assert whole[-1] == llama3.eos_token_id
    assert llama3.eos_token_id not in whole[len(start) : -1]


def test_llama3_base_tokenizer_gets_the_end_and_pad_token_of_the_format(llama3, llama3_tokenizer_dir):
    assert AutoTokenizer.from_pretrained(llama3_tokenizer_dir).eos_token == "<|end_of_text|>"
    assert llama3.eos_token == "<|eot_id|>" == stop_token(llama3)
    assert llama3.pad_token == "<|finetune_right_pad_id|>"
    assert llama3.padding_side == "right"
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert [llama3.convert_ids_to_tokens(token) for token in template_specials(llama3)] == names


def test_llama3_saved_and_loaded_again_is_the_same(llama3, tmp_path):
    llama3.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token, again.pad_token) == (llama3.eos_token, llama3.pad_token)
    assert chat_ids(again, CONVERSATIONS["system"]) == chat_ids(llama3, CONVERSATIONS["system"])


# --- the end of a turn ------------------------------------------------------------------------------------------------


def test_a_base_models_end_token_gives_way_to_the_templates(tiny, tiny_model_dir):
    assert AutoTokenizer.from_pretrained(tiny_model_dir).eos_token == "<|endoftext|>"
    assert (tiny.eos_token, tiny.pad_token) == ("<|im_end|>", "<|endoftext|>")


def template(tmp_path, text):
    (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
    return str(tmp_path / "template.jinja")


ENDLESS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


REFUSED = {
    "no end": (ENDLESS + HEADER, "never ends an assistant turn"),
    "an end that is only text": (TURNS.replace("<|im_end|>", "</turn>") + HEADER, "never ends an assistant turn"),
    "another header in training": (TURNS + HEADER.replace("\n", "\n<think>\n"), "differently once it is answered"),
    "a hint that goes away": (
        TURNS.replace("<|im_end|>", "{% if loop.last and m['role'] == 'user' %} (think){% endif %}<|im_end|>") + HEADER,
        "differently once it is answered",
    ),
    "loops within loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + TURNS + HEADER,
        "does not take these messages .its loops do not come to an end in any reasonable time",
    ),
    "a loop in each of many": (
        "{% for a in range(999) %}{{ range(99999) | list | length }}{% endfor %}" + TURNS + HEADER,
        "its loops do not come to an end",
    ),
    "loops over each sign": (
        "{% for a in messages[0]['content'] * 99 %}{% for b in range(9999) %}{% endfor %}{% endfor %}" + TURNS + HEADER,
        "its loops do not come to an end",
    ),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}" + TURNS + HEADER, "recursion"),
    "a loop that calls itself": (
        "{% for m in messages recursive %}{{ loop([m, m]) }}{% endfor %}" + TURNS + HEADER,
        "does not take these messages .maximum recursion",
    ),
    "a power": ("{{ 10 ** 1000000000 }}" + TURNS + HEADER, "it computes a power of 1000000000"),
    "a power of powers": ("{{ ((10 ** 900) ** 900) ** 900 }}" + TURNS + HEADER, "its loops do not come to an end"),
    "a text without end": ("{{ 'a' * 1000000000 }}" + TURNS + HEADER, "its loops do not come to an end"),
    "a count of the messages": ("{{ messages | length }}" + TURNS + HEADER, "differently once it is answered"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_template_that_cannot_be_trained_on_is_refused(tiny_model_dir, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(settings(tiny_model_dir, template(tmp_path, text)))


def test_a_long_loop_that_only_some_messages_meet_is_told(tiny_model_dir, tmp_path):
    loops = "{% for a in range(99999) %}{% for b in 'ab' %}{% endfor %}{% endfor %}"
    slow = "{% if messages[0]['role'] == 'system' %}" + loops + "{% endif %}"
    tokenizer = load_tokenizer(settings(tiny_model_dir, template(tmp_path, slow + TURNS + HEADER)))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert chat_ids(tokenizer, asked[1:], add_generation_prompt=True)
    with pytest.raises(UserError, match="its loops do not come to an end"):
        chat_ids(tokenizer, asked, add_generation_prompt=True)


def test_a_template_that_looks_at_every_sign_of_a_long_prompt_is_taken(tiny_model_dir, tmp_path):
    signs = (
        "{% for m in messages %}{% for sign in m['content'] %}{% for one in 'abcdefghij' %}{% endfor %}{% endfor %}{% endfor %}"
    )
    tokenizer = load_tokenizer(settings(tiny_model_dir, template(tmp_path, signs + TURNS + HEADER)))
    assert chat_ids(tokenizer, [{"role": "user", "content": "1+1? " * 2000}], add_generation_prompt=True)


def test_an_added_token_that_is_not_special_ends_no_turn(tiny_model_dir, tmp_path):
    """Decoding leaves such a token in the text and transformers does not stop on it."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<done>"])
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<done>") not in special_ids(tokenizer)
    with pytest.raises(UserError, match="never ends an assistant turn"):
        load_tokenizer(settings(folder, template(tmp_path, TURNS.replace("<|im_end|>", "<done>") + HEADER)))


def test_no_template_and_no_template_file_are_told_apart(llama3_tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match=r"ships no chat template.*configs/templates/llama3\.jinja"):
        load_tokenizer(settings(llama3_tokenizer_dir))
    with pytest.raises(UserError, match=r"no chat template at .*missing\.jinja"):
        load_tokenizer(settings(llama3_tokenizer_dir, str(tmp_path / "missing.jinja")))


def test_a_template_file_is_text_in_utf8(tiny_model_dir, tmp_path):
    (tmp_path / "marked.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert load_tokenizer(settings(tiny_model_dir, str(tmp_path / "marked.jinja"))).chat_template == CHATML
    (tmp_path / "latin.jinja").write_bytes(b"{# \xe9 #}" + CHATML.encode())
    with pytest.raises(UserError, match=r"latin\.jinja is no text in UTF-8"):
        load_tokenizer(settings(tiny_model_dir, str(tmp_path / "latin.jinja")))


# --- plain text -------------------------------------------------------------------------------------------------------


def test_plain_template_is_the_text_itself(llama3_tokenizer_dir):
    """k-shot prompts: begin token, the text as it is, and after an answer the base model's own end token."""
    tokenizer = load_tokenizer(settings(llama3_tokenizer_dir, PLAIN))
    shots = "Q: 1+1?\nA: 2 #### 2\n\nQ: 2+2?\nA:"
    prompt = chat_ids(tokenizer, turns(shots), add_generation_prompt=True)
    assert prompt == [tokenizer.bos_token_id, *tokenizer.encode(shots, add_special_tokens=False)]
    whole = chat_ids(tokenizer, turns(shots, " 4 #### 4"))
    assert whole == [*prompt, *tokenizer.encode(" 4 #### 4", add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.eos_token == "<|end_of_text|>"


def test_plain_template_without_a_begin_token(tiny_model_dir):
    tokenizer = load_tokenizer(settings(tiny_model_dir, PLAIN))
    assert tokenizer.apply_chat_template(turns("2+2?", " 4"), tokenize=False) == "2+2? 4<|endoftext|>"


# --- the date ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_day(monkeypatch):
    """Sets the clock that transformers offers to chat templates as `strftime_now`."""

    def set_clock(year, month, day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 12)

        monkeypatch.setattr(rendering, "datetime", Clock)

    return set_clock


def instruct_template():
    """The template of Llama-3.2-3B-Instruct, as TRL ships it."""
    import trl

    return f"{trl.__path__[0]}/chat_templates/llama3_2.jinja"


def test_the_instruct_templates_date_is_pinned(llama3_tokenizer_dir, on_day):
    raw = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    with open(instruct_template(), encoding="utf-8") as file:
        raw.chat_template = file.read()
    pinned = load_tokenizer(settings(llama3_tokenizer_dir, instruct_template()))
    rendered = {}
    for day in ((2025, 1, 31), (2026, 11, 24), (2024, 7, 26)):
        on_day(*day)
        rendered[day] = [tuple(chat_ids(tokenizer, CONVERSATIONS["system"])) for tokenizer in (raw, pinned)]
    assert len({ids for ids, _ in rendered.values()}) == 3, "as it ships, the prompt changes from day to day"
    assert {ids for _, ids in rendered.values()} == {rendered[2024, 7, 26][0]}
    assert "Today Date: 26 Jul 2024\n" in pinned.decode(chat_ids(pinned, CONVERSATIONS["question"]))


def test_the_pinned_date_is_saved_with_the_tokenizer(llama3_tokenizer_dir, on_day, tmp_path):
    load_tokenizer(settings(llama3_tokenizer_dir, instruct_template())).save_pretrained(tmp_path)
    on_day(2031, 5, 5)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert "26 Jul 2024" in again.decode(chat_ids(again, CONVERSATIONS["question"]))


@pytest.mark.parametrize(
    ("call", "date"),
    [
        ("strftime_now('%Y-%m-%d')", "2024-07-26"),
        ('strftime_now( "%d %B %Y" )', "26 July 2024"),
        ('strftime_now("%d %b \'%y")', "26 Jul '24"),
        ("(strftime_now('%Y') if strftime_now is defined else '1999')", "2024"),
        ("('1999' if strftime_now is not defined else strftime_now('%Y'))", "2024"),
    ],
)
def test_every_written_date_format_is_pinned(tiny_model_dir, tmp_path, on_day, call, date):
    text = "<|im_start|>system\n{{ " + call + " }}<|im_end|>\n" + TURNS + HEADER
    tokenizer = load_tokenizer(settings(tiny_model_dir, template(tmp_path, text)))
    on_day(2031, 5, 5)
    rendered = tokenizer.apply_chat_template(turns("hi"), tokenize=False)
    assert rendered.startswith(f"<|im_start|>system\n{date}<|im_end|>")


@pytest.mark.parametrize(
    "text",
    ["{% set f = '%Y' %}{{ strftime_now(f) }}", "{% set now = strftime_now %}{{ now('%Y') }}"],
)
def test_a_date_that_cannot_be_pinned_is_refused(tiny_model_dir, tmp_path, text):
    with pytest.raises(UserError, match="date of today"):
        load_tokenizer(settings(tiny_model_dir, template(tmp_path, text + TURNS + HEADER)))


def test_a_template_without_a_date_is_left_as_it_is():
    with open(LLAMA3, encoding="utf-8") as file:
        text = file.read()
    assert pin_date(text) == text
