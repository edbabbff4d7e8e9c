"""Chat templates of many families on a run's own messages: the answer and its end are trained on, or one line refuses.

The inputs are TRL's copies of the models' own templates. The tokenizer is a real one, with the special tokens of each.
"""

import re
from pathlib import Path

import pytest
import trl
from conftest import ROOT, tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from posttrain.config.load import ConfigError, config_sha256
from posttrain.config.load import load as load_config
from posttrain.config.schema import EvalConfig, Tokenizer
from posttrain.errors import UserError
from posttrain.models.chat import chat_ids, chat_text, load_tokenizer
from posttrain.models.template_check import TemplateCheck, check_same_template, check_template
from posttrain.models.templates import argument_names
from posttrain.records import Example

TRL = Path(trl.__path__[0], "chat_templates")
OURS = ROOT / "configs/templates"
QUESTION, ANSWER = "Tom has 2 apples and buys 3. How many?", "2 + 3 = 5 apples.\n#### 5"
SYSTEM = "Answer briefly."
BAR = "\uff5c"
SPECIAL = re.compile(
    rf"<\|[^|<>\s]+\|>|<{BAR}[^{BAR}<>]+{BAR}>|<[a-z_]+\|>|<\|[a-z_]+>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]|\[gMASK\]|<sop>"
)


def example(content=ANSWER, system=None, question=QUESTION):
    prompt = [{"role": "user", "content": question}]
    if system is not None:
        prompt = [{"role": "system", "content": system}, *prompt]
    return Example("t-1", "train", QUESTION, prompt, [{"role": "assistant", "content": content}], "5", 1)


@pytest.fixture
def load(tmp_path):
    """Loads a tokenizer with a template, and with the special tokens that stand in it."""

    def load(template, **arguments):
        text = template.read_text(encoding="utf-8") if isinstance(template, Path) else template
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(set(SPECIAL.findall(text)))])
        tokenizer.add_tokens(["<think>", "</think>", "\n\n"])  # as in every large tokenizer
        tokenizer.chat_template = text
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        return load_tokenizer(Tokenizer(name_or_path=str(tmp_path), template_kwargs=arguments))

    return load


# --- the table --------------------------------------------------------------------------------------------------------

DIFFERENT = "differently once it is answered"
NO_ANSWER = "leaves out the answer"
# The template, or what its name begins with -> the token that ends a turn, or what the refusal says.
TABLE = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|>",
    "deepseek": DIFFERENT,
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "never ends an assistant turn with a special token",
    "glm4moe_training": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": NO_ANSWER,
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "does not take these messages ('str object' has no attribute 'text')",
    "muse_glimmer": "<|eot|>",
    "nemotron": DIFFERENT,
    "phi3": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": DIFFERENT,
    "qwen3_6": DIFFERENT,
    "qwen3_8": DIFFERENT,
    "smolvlm": NO_ANSWER,
}
NO_SYSTEM = "(System role not supported): put the system prompt into prompt.instruction (data_prep: prompt.system=null)"
TABLE_WITH_SYSTEM = TABLE | {"gemma": NO_SYSTEM, "gemma3": "<end_of_turn>"}
NAMES = sorted(file.stem for file in TRL.glob("*.jinja"))


def expected(name, table):
    return table[max((known for known in table if name.startswith(known)), key=len)]


def verdict(load, template, row, **arguments):
    """The token that ends a turn, once prompt and answer are known to be there; or the refusal."""
    try:
        tokenizer = load(template, **arguments)
        check_template(tokenizer, [row])
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    check_round_trip(tokenizer, row)
    return tokenizer.eos_token


def check_round_trip(tokenizer, row):
    """Prompt, answer and end, read back from the ids that TRL trains on."""
    prompt, whole = TemplateCheck(tokenizer).ids(row)
    assert whole[: len(prompt)] == prompt == chat_ids(tokenizer, row.prompt, add_generation_prompt=True)
    answer = whole[len(prompt) :]
    said = tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)])
    assert said.removesuffix("\n").endswith(row.completion[0]["content"])
    asked = tokenizer.decode(prompt)
    assert all(message["content"] in asked for message in row.prompt)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_of_a_known_model_is_right_or_refused(load, name):
    assert expected(name, TABLE) in verdict(load, TRL / f"{name}.jinja", example())
    assert expected(name, TABLE_WITH_SYSTEM) in verdict(load, TRL / f"{name}.jinja", example(system=SYSTEM))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("nemotron", "qwen3_5", "qwen3_6", "qwen3_8"))])
def test_reasoning_models_work_without_thinking(load, name):
    """The refusal of these names this setting."""
    for system in (None, SYSTEM):
        assert verdict(load, TRL / f"{name}.jinja", example(system=system), enable_thinking=False) == "<|im_end|>"


# --- short templates, each with one fault -----------------------------------------------------------------------------

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + HEADER
MISTRAL = """{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set turns = messages[1:] %}
{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}
{% if loop.last and sys is defined %}[INST] {{ sys }}

{{ m['content'] }}[/INST]{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}
{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"""
HARMONY = """{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final<|message|>
{{- m['content'] }}<|return|>{% else %}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
PHI = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
PHI += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# <|system|> <|user|> #}"
STRIPPED = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
USERS_ALONE = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}", 1)
DEFAULT = "{% if messages | length == 1 %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>"),
    "mistral": (MISTRAL, "</s>", "shows the system prompt differently once somebody has answered: put the system prompt into"),
    "harmony": (HARMONY, "<|return|>", "<|return|>"),
    "phi": (PHI, "<|end|>", "<|end|>"),
    "a default system prompt in one case": (DEFAULT, DIFFERENT, DIFFERENT),
    "no system message": (USERS_ALONE, "<|im_end|>", "leaves out or rewrites the system message: put the system prompt into"),
    "capitals": (CHATML.replace("m['content']", "m['content'].upper()"), "rewrites the user message", "rewrites the system"),
    "begin token twice": ("{{ bos_token }}{{ bos_token }}" + CHATML, "begins a prompt with <bos> twice", "<bos> twice"),
    "one token at both ends": (CHATML.replace("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "one token around the answer": (
        "{% for m in messages %}<|sep|>{{ m['content'] }}<|sep|>{% endfor %}",
        "ends a turn with <|sep|>, which also stands before the answer",
        "also stands before the answer",
    ),
    "an error": ("{{ raise_exception('no') }}", "does not take these messages (no)", "does not take these messages (no)"),
    "another file": ("{% include 'x' %}", "does not take these messages (no loader", "does not take these messages (no loader"),
    "a sum of text and number": (
        "{{ 'a' + 1 }}",
        "does not take these messages (can only",
        "does not take these messages (can only",
    ),
    "no Jinja": ("{% for %}", "cannot be read: line 1", "cannot be read: line 1"),
}


@pytest.mark.parametrize(("text", "alone", "with_system"), FAMILIES.values(), ids=FAMILIES.keys())
def test_families(load, text, alone, with_system):
    assert alone in verdict(load, text, example())
    assert with_system in verdict(load, text, example(system=SYSTEM))


REASONED = "<think>\n2 + 3 = 5.\n</think>\n\n#### 5"


def test_an_answer_whose_reasoning_is_cut_out_is_refused(load):
    assert "rewrites the answer: '<think>" in verdict(load, STRIPPED, example(REASONED))
    assert verdict(load, TRL / "qwen3.jinja", example(REASONED)) == "<|im_end|>"
    rows = [example() for _ in range(50)] + [example(REASONED)]
    with pytest.raises(UserError, match="rewrites the answer"):
        check_template(load(STRIPPED), rows)


def test_an_answer_that_joins_the_header_is_refused(load):
    assert "t-1: the chat template renders a prompt differently" in verdict(load, CHATML, example("\n#### 5"))


def test_a_row_that_holds_the_end_token_is_refused(load):
    assert "t-1 holds <|im_end|>" in verdict(load, CHATML, example("5<|im_end|>\n#### 5"))


def test_the_end_of_a_harmony_turn_comes_after_its_text(load):
    tokenizer = load(HARMONY)
    prompt, whole = TemplateCheck(tokenizer).ids(example())
    assert tokenizer.decode(whole[len(prompt) :]) == f"<|channel|>final<|message|>{ANSWER}<|return|>"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("qwen2_5", []),
        ("llama3_2", ["custom_tools", "date_string", "tools_in_user_message"]),
        ("gptoss", ["builtin_tools", "model_identity", "reasoning_effort"]),
        ("qwen3", ["enable_thinking"]),
        ("nemotron_3_super", ["content", "enable_thinking", "low_effort", "system_message", "truncate_history_thinking"]),
    ],
)
def test_the_arguments_that_a_template_reads(name, names):
    assert argument_names((TRL / f"{name}.jinja").read_text(encoding="utf-8")) == names


def test_an_argument_that_no_template_reads_is_a_fault(load):
    with pytest.raises(UserError, match=r"template_kwargs\.enable_thinkin: the chat template never reads it; it reads enable_th"):
        load(TRL / "qwen3.jinja", enable_thinkin=False)
    with pytest.raises(UserError, match="it reads no argument"):
        load(CHATML, enable_thinking=False)


VALUES = {"flag": True, "count": -3, "share": 0.5, "text": "a \"b\" 'c' {% d %} é\n\\"}


def test_an_argument_has_its_value_and_the_template_its_text(load):
    text = "\nx" + "".join(f"{{% if {name} is defined %}}{{{{ {name} }}}}|{{% endif %}}" for name in VALUES) + CHATML
    plain = load(text)
    messages = example().prompt
    rendered = plain.apply_chat_template(messages, tokenize=False, **VALUES)
    assert rendered.startswith('\nxTrue|-3|0.5|a "b"')
    assert chat_text(load(text, **VALUES), messages) == rendered


def test_arguments_are_saved_with_the_tokenizer(load, tmp_path):
    tokenizer = load(TRL / "qwen3_5_think.jinja", enable_thinking=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    prompt = chat_ids(again, example().prompt, add_generation_prompt=True)
    assert prompt == chat_ids(tokenizer, example().prompt, add_generation_prompt=True)
    assert again.decode(prompt).endswith("<think>\n\n</think>\n\n")


def test_an_adapter_is_asked_in_the_format_it_was_trained_in(load, tmp_path):
    load(TRL / "qwen3_5_think.jinja", enable_thinking=False).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "chat_template.jinja"
    check_same_template(load(TRL / "qwen3_5_think.jinja", enable_thinking=False), tmp_path / "adapter", [example()])
    check_same_template(load(file), tmp_path / "adapter", [example()])
    check_same_template(load(TRL / "qwen3_5_nothink.jinja"), tmp_path / "adapter", [example()])
    check_same_template(load(CHATML), tmp_path, [example()])
    with pytest.raises(UserError, match=f"set model.chat_template={file}"):
        check_same_template(load(CHATML), tmp_path / "adapter", [example()])


def test_the_hash_of_a_config_sees_arguments_and_stays_without(tmp_path):
    def sha(**model):
        data, model = {"path": "d"}, {"name_or_path": "m", **model}
        return config_sha256(EvalConfig.model_validate({"run_dir": "r", "model": model, "data": data}))

    assert sha() == sha(template_kwargs={}) == "cf0bb8236ec237e799c980174a7536973d509c8adfda02020c3e9a11d255e5aa"
    assert len({sha(), *(sha(template_kwargs={"enable_thinking": value}) for value in (False, 0, "false"))}) == 4


def test_arguments_from_the_command_line(tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text("run_dir: r\nmodel: {name_or_path: m}\ndata: {path: d}\n")
    config = load_config(file, ["model.template_kwargs.enable_thinking=false"], EvalConfig)
    assert config.model.template_kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"model\.template_kwargs\.tools: is not a setting"):
        load_config(file, ["model.template_kwargs.tools=x"], EvalConfig)
    with pytest.raises(ConfigError, match=r"model\.template_kwargs"):
        load_config(file, ["model.template_kwargs.enable_thinking=[1]"], EvalConfig)


def test_no_parser_stands_between_a_completion_and_its_reward(load, tmp_path):
    """TRL pays for what a tokenizer's response template parses, where there is one (grpo_trainer.py, `parse_response`)."""
    load(CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.response_template = {"type": "object"}
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).response_template
    assert load_tokenizer(Tokenizer(name_or_path=str(tmp_path))).response_template is None


# --- the templates of this project ------------------------------------------------------------------------------------

OWN = {
    "chatml_reasoning": "<|im_end|>",
    "deepseek_reasoning": f"<{BAR}end\u2581of\u2581sentence{BAR}>",
    "harmony": "<|return|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_our_templates_add_the_answer_and_its_end_and_nothing_else(load, name, system):
    row = example(system=system)
    assert verdict(load, OURS / f"{name}.jinja", row) == OWN[name]
    tokenizer = load(OURS / f"{name}.jinja")
    asked = chat_text(tokenizer, row.prompt, add_generation_prompt=True)
    said = chat_text(tokenizer, row.prompt + row.completion).removeprefix(asked)
    assert said.strip() == ANSWER + OWN[name]


@pytest.mark.parametrize("name", ["chatml_reasoning", "deepseek_reasoning"])
def test_our_reasoning_templates_keep_the_reasoning_of_an_answer(load, name):
    row = example(REASONED.removeprefix("<think>\n"), system=SYSTEM)
    assert verdict(load, OURS / f"{name}.jinja", row, enable_thinking=True) == OWN[name]
    tokenizer = load(OURS / f"{name}.jinja", enable_thinking=True)
    assert chat_text(tokenizer, row.prompt, add_generation_prompt=True).endswith("<think>\n")


@pytest.mark.parametrize(
    ("ours", "theirs", "system", "arguments"),
    [
        ("chatml_reasoning", "qwen3", SYSTEM, {"enable_thinking": False}),
        ("chatml_reasoning", "qwen3_5_nothink", None, {}),
        ("chatml_reasoning", "qwen3_6", SYSTEM, {"enable_thinking": False}),
        ("gemma", "gemma3", SYSTEM, {}),
        ("gemma", "gemma", None, {}),
    ],
)
def test_our_templates_render_as_the_models_own(load, ours, theirs, system, arguments):
    row = example(system=system)
    one, other = load(OURS / f"{ours}.jinja"), load(TRL / f"{theirs}.jinja", **arguments)
    for messages, prompt in ((row.prompt, True), (row.prompt + row.completion, False)):
        assert chat_text(one, messages, prompt) == chat_text(other, messages, prompt)


def test_our_deepseek_template_with_thinking_asks_as_r1s_own(load):
    row = example(system=SYSTEM)
    own = load(OURS / "deepseek_reasoning.jinja", enable_thinking=True)
    theirs = (TRL / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    assert chat_text(own, row.prompt, True) == chat_text(own, row.prompt, True, theirs)


def test_the_refusal_names_our_template_of_the_family(load):
    for text, system, name in (
        (MISTRAL, SYSTEM, "mistral"),
        (TRL / "gemma.jinja", SYSTEM, "gemma"),
        (TRL / "deepseek_r1_distill.jinja", None, "deepseek_reasoning"),
        (TRL / "qwen3_6.jinja", None, "chatml_reasoning"),
    ):
        assert f"(data_prep: tokenizer.chat_template) to configs/templates/{name}.jinja" in verdict(
            load, text, example(system=system)
        )
