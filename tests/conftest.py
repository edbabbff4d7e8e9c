"""What every test may use: a tiny real Llama with a real tokenizer, a data set of data_prep.py, GSM8K if it is here.

Nothing is downloaded: the process is offline unless a test starts one of its own.
"""

import functools
import importlib
import json
import os
import random
import signal
from pathlib import Path

import hypothesis
import pytest

# This holds whatever the caller has set. One thread: sums in another order round differently, two test processes share the
# cores, and a process that is forked after OpenMP's threads have started waits for them for ever. Processes that tests start
# import this checkout, whichever one is installed.
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])))),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
# All tests run on the CPU, also on a machine with a GPU. Only those marked gpu do not: make gpu-tests.
if os.environ.get("POSTTRAIN_GPU_TESTS") != "1":
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
os.environ |= ENVIRONMENT

# A shell ignores SIGINT for what it runs in the background, and a command that is tested would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two processes share the cores, and others may keep them busy: no test may depend on how long an example takes.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="make gpu-tests, on a machine with a GPU"))


@pytest.fixture(scope="session", autouse=True)
def own_names():
    """What transformers' modules hold that Liger puts its own in, noted before a fixture of any scope has loaded a model."""
    import torch

    if not torch.cuda.is_available():
        return []
    from posttrain.kernels.liger import MODEL_TYPES

    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in MODEL_TYPES]
    return [(module, dict(vars(module))) for module in modules]


@pytest.fixture(autouse=True)
def plain_models(request, own_names):
    """After a test on a GPU, models are transformers' own again.

    Liger puts its classes and functions in the place of transformers' for the whole process, and they run on a GPU alone.
    """
    yield
    if request.node.get_closest_marker("gpu"):
        for module, names in own_names:
            vars(module).update(names)


CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PEOPLE = ("Maya", "Tom", "Ines", "Jamal", "Olga", "Wei", "Priya", "Luca", "Amara", "Noah", "Zoë", "José")
THINGS = ("apples", "stickers", "marbles", "books", "tickets", "cookies", "pencils", "shells", "coins", "stamps")
PLACES = ("at the market", "in the attic", "from a neighbour", "after school", "on Saturday", "for the party")


def word_problem(rng):
    """A question of one to four steps in GSM8K's schema, with calculator marks and `####`."""
    person, thing, place = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(PLACES)
    total = rng.randint(3, 40)
    told, working = [f"{person} has {total} {thing}."], []
    for _ in range(rng.randint(1, 4)):
        other, before = rng.randint(2, 30), total
        if rng.random() < 0.5 or other >= total:
            total += other
            told.append(f"{person} finds {other} more {thing} {place}.")
            working.append(f"Then there are {before}+{other}=<<{before}+{other}={total}>>{total} {thing}.")
        else:
            total -= other
            told.append(f"{person} gives {other} of them to a friend {place}.")
            working.append(f"That leaves {before}-{other}=<<{before}-{other}={total}>>{total} {thing}.")
    told.append(f"How many {thing} does {person} have now?")
    return {"question": " ".join(told), "answer": "\n".join([*working, f"#### {total}"])}


def word_problems(count, seed):
    rng, found = random.Random(seed), {}
    while len(found) < count:
        row = word_problem(rng)
        found[row["question"]] = row
    return list(found.values())


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def make_tiny_model(folder):
    """A Llama of two layers with random weights in bf16 and a tokenizer of its own, in ChatML, as a model folder.

    Its tokenizer's end token is `<|endoftext|>`, as in a base model; the template ends a turn with `<|im_end|>`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """A tokenizer of 1,024 tokens, in ChatML; a new one at each call, for tests that add to it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer.from_str(trained_on_word_problems())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", model_max_length=1024)
    tokenizer.chat_template = CHATML
    return tokenizer


@functools.cache
def trained_on_word_problems():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = word_problems(400, seed=1)
    bpe.train_from_iterator([row["question"] + "\n" + row["answer"] for row in rows], trainer)
    return bpe.to_str()


@pytest.fixture(scope="session")
def tiny_jsonl_dir(tmp_path_factory):
    """60 training and 20 test word problems as GSM8K's own two files."""
    folder = tmp_path_factory.mktemp("raw")
    rows = word_problems(80, seed=2)
    for split, part in (("train", rows[:60]), ("test", rows[60:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory, tiny_model_dir, tiny_jsonl_dir):
    """The word problems as data_prep.py prepares them: 44 train, 16 dev, 20 test examples."""
    from scripts import run

    folder = tmp_path_factory.mktemp("data") / "tiny"
    config = folder.parent / "data.yaml"
    config.write_text(f"""name: tiny
output_dir: {folder}
source:
  kind: jsonl
  path: {tiny_jsonl_dir}
dev_fraction: 0.2
prompt:
  instruction: '{{question}} End with "#### answer".'
tokenizer:
  name_or_path: {tiny_model_dir}
""")
    done = run("data_prep", "--config", config)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, tiny_model_dir):
    """A folder in which data_prep, SFT, GRPO and three evaluations have run on the tiny configs."""
    from scripts import tiny_pipeline

    folder = tmp_path_factory.getbasetemp() / "pipeline"
    tiny_pipeline(folder, tiny_model_dir)
    return folder


# --- models and trainers on the tiny Llama ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_model_dir):
    from posttrain.config.schema import Model

    return Model(name_or_path=str(tiny_model_dir))


@pytest.fixture(scope="module")
def tokenizer(settings):
    from posttrain.models.chat import load_tokenizer

    return load_tokenizer(settings)


@pytest.fixture(scope="module")
def fp32_settings(settings):
    """For tests in which equal means equal."""
    return settings.model_copy(update={"dtype": "float32"})


@pytest.fixture(scope="module")
def plain_tokenizer(settings):
    """`tokenizer`, for test files that have one of their own of that name."""
    from posttrain.models.chat import load_tokenizer

    return load_tokenizer(settings)


@pytest.fixture(scope="module")
def load(settings, tokenizer):
    """Loads the base in one of its forms, with changes to its settings."""
    from posttrain.models.base import load_base

    def load(form="none", **changes):
        return load_base(settings.model_copy(update=changes), form, tokenizer)

    return load


@pytest.fixture(scope="session")
def tiny(tiny_model_dir, tiny_data_dir, tmp_path_factory):
    """Makes configs and trainers of both stages."""
    from tiny_training import Tiny

    return Tiny(tiny_model_dir, tiny_data_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def fp32(tiny_model_dir):
    """Settings of a run in which equal means equal."""
    return {"model": {"name_or_path": str(tiny_model_dir), "dtype": "float32"}, "quantization": "none"}


@pytest.fixture(scope="session")
def sft(tiny):
    """The run directory of a finished SFT."""
    from tiny_training import finished_sft

    return finished_sft(tiny)


@pytest.fixture(scope="session")
def sft_with_tokens(tiny):
    from tiny_training import LORA, finished_sft

    return finished_sft(tiny, lora=LORA | {"train_special_tokens": "always"})


@pytest.fixture(params=["plain", "with token rows"])
def any_sft(request, sft, sft_with_tokens):
    return sft if request.param == "plain" else sft_with_tokens


# --- real data and tokenizers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama3_tokenizer_dir(tmp_path_factory):
    """Llama-3's tokenizer as the base model ships it: ends on `<|end_of_text|>`, has no pad token and no template."""
    folder = tmp_path_factory.mktemp("llama3")
    from published import of_llama_models

    of_llama_models(b"", folder)
    return folder


def real_data(name):
    path = Path(os.environ.get("POSTTRAIN_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"{path} is not here: set POSTTRAIN_DATA to a folder that holds {name}")
    return path


@pytest.fixture(scope="session")
def gsm8k_dir():
    """The folder with GSM8K's train.jsonl and test.jsonl."""
    return real_data("gsm8k")


@pytest.fixture(scope="session")
def svamp_file():
    return real_data("svamp/SVAMP.json")
