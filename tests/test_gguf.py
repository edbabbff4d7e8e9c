"""GGUF files, written and read: what llama.cpp computes of them is what transformers computes of the model."""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import CHATML, ROOT, tiny_tokenizer, word_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import gguf_model
from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.export.ollama import modelfile, pieces_of
from posttrain.generation.guard import difference
from posttrain.models.folded import FoldedWeights
from posttrain.models.pre_tokenizers import pre_tokenizer_of, rule_of

gguf = pytest.importorskip("gguf", reason="gguf is not installed: make setup")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
MODELS = {
    "Llama": ("LlamaConfig", {}),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Llama 3's positions": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "Llama with YaRN": ("LlamaConfig", {"rope_parameters": YARN}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "Gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "Gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}),
    "Gemma3": ("Gemma3TextConfig", GEMMA),
}


def make(name, folder, tokenizer=None):
    """A tiny model folder that says something else at every token."""
    tokenizer = tokenizer or tiny_tokenizer()
    if name.startswith("Qwen"):  # its class in transformers cuts texts by this rule, whatever tokenizer.json says
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer_of("qwen2")
    class_name, changes = MODELS[name]
    config = getattr(transformers, class_name)(
        **SIZES | changes | {"vocab_size": len(tokenizer) + 5, "eos_token_id": tokenizer.eos_token_id}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif not (config.tie_word_embeddings and "embed" in parameter_name):
            parameter.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_tokenizer():
    """A vocabulary as Gemma's: spaces are a sign, what has no token is bytes, nothing is cut before merging."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<pad>", "<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[*specials, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    bpe.train_from_iterator([row["question"] for row in word_problems(200, seed=1)], trainer)
    parts = json.loads(bpe.to_str())
    parts["added_tokens"] = [one for one in parts["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|endoftext|>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def written(folder, file, dtype=torch.float32, name="float32"):
    from posttrain.export.gguf_file import write_gguf
    from posttrain.models.chat import load_tokenizer

    settings = Model(name_or_path=str(folder), dtype=name)
    tokenizer = load_tokenizer(settings)
    write_gguf(FoldedWeights(settings, "none", None), tokenizer, file, "tiny", dtype)
    return tokenizer


TEXTS = [row["question"] for row in word_problems(3, seed=7)] + [
    "Zoë  paid 12345 for\n\n 3 déjà-vus'll 🚀!",
    "<|im_start|>user\n2<|im_end|>",
]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from posttrain.export import runtimes
    from posttrain.export.runtimes import LlamaCpp, Transformers

    monkeypatch.setattr(runtimes, "AT_ONCE", 2)  # so that a prompt takes the seat of an answer that has ended
    tokenizer = written(make(name, tmp_path / "model"), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = Transformers(model, tokenizer)
    with LlamaCpp(tmp_path / "model.gguf", tokenizer.eos_token_id, max(map(len, prompts)) + 12) as theirs:
        assert [theirs.tokenize(text) for text in TEXTS] == prompts
        answers = theirs.answer(prompts, 12).tokens
        for prompt, answer in zip(prompts, answers, strict=True):
            found = theirs.logits(prompt, answer)
            apart = difference(found[None], ours.logits(prompt, answer)[None])
            assert apart.relative < 0.005, (len(prompt), apart)  # llama.cpp keeps keys and values in fp16
            assert found.argmax(-1).tolist() == answer  # decoded together, a token a step


def test_a_vocabulary_as_gemmas_gives_the_same_tokens(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from posttrain.export.runtimes import LlamaCpp

    tokenizer = written(make("Gemma2", tmp_path / "model", sentencepiece_tokenizer()), tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", tokenizer.eos_token_id, 256) as theirs:
        assert [theirs.tokenize(text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", ["Llama, tied", "Qwen2"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_llama_cpps_quantizer_takes_the_file(name, quant, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from posttrain.export.runtimes import LlamaCpp, quantize

    tokenizer = written(make(name, tmp_path / "model"), tmp_path / "whole.gguf", torch.bfloat16, "bfloat16")
    quantize(tmp_path / "whole.gguf", tmp_path / "small.gguf", quant)
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "whole.gguf").stat().st_size
    with LlamaCpp(tmp_path / "small.gguf", tokenizer.eos_token_id, 64) as theirs:
        assert theirs.logits([5, 6, 7], [8, 9]).isfinite().all()


def test_a_file_says_where_to_stop_and_how_to_render(tmp_path):
    tokenizer = written(make("Llama", tmp_path / "model"), tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.eot_token_id"] == stop
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.add_bos_token"] is False


REFUSED = [
    ("MixtralConfig", {}, "MixtralForCausalLM is not written as GGUF"),
    ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "has windows in other layers"),
    ("Gemma3TextConfig", GEMMA | {"layer_types": ["full_attention"] * 6}, "has windows in other layers"),
    ("Gemma2Config", GEMMA | {"query_pre_attn_scalar": 32}, "has query_pre_attn_scalar 32"),
    (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "has positions of type dynamic",
    ),
    ("LlamaConfig", {"hidden_act": "gelu"}, "has the activation gelu"),
    ("Gemma2Config", GEMMA | {"hidden_activation": "silu"}, "has the activation silu"),
    ("LlamaConfig", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "has positions with beta_fast 16"),
    ("LlamaConfig", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "has positions with attention_factor 1.5"),
    ("Qwen3Config", {"attention_bias": True}, "has biases in its attention"),
]


@pytest.mark.parametrize(("class_name", "changes", "line"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(class_name, changes, line):
    from posttrain.export.gguf_file import check_architecture

    config = getattr(transformers, class_name)(**SIZES | changes)
    with pytest.raises(UserError, match=line):
        check_architecture(config, class_name.replace("TextConfig", "Config").replace("Config", "ForCausalLM"))


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_rule_has_one_name(rule):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer_of(rule)
    assert rule_of(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]) == rule


def test_a_rule_without_a_name_is_refused():
    with pytest.raises(UserError, match="cuts texts by a rule that is not known here"):
        rule_of({"type": "Whitespace"})
    with pytest.raises(UserError, match=r"tokenizer.ggml.pre is tekken"):
        pre_tokenizer_of("tekken")


# --- Ollama -----------------------------------------------------------------------------------------------------------

DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"


def test_a_modelfile_says_the_template_in_gos_words(tmp_path):
    tokenizer = tiny_tokenizer()
    assert modelfile(tokenizer, "model.gguf") == (
        'FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "assistant" }}'
        '<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
    )


def test_a_token_that_the_runtime_adds_is_not_in_the_template_too(llama3_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    tokenizer.chat_template = (ROOT / "configs" / "templates" / "llama3.jinja").read_text(encoding="utf-8")
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    text = modelfile(tokenizer, "model.gguf")
    assert ("<|begin_of_text|>" in text) is not begins and 'stop "<|eot_id|>"' in text


def test_a_default_system_prompt_is_kept():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DEFAULT + CHATML
    assert pieces_of(tokenizer).default_system == "Be good."
    assert 'SYSTEM """Be good."""' in modelfile(tokenizer, "model.gguf")


@pytest.mark.parametrize(
    ("template", "system", "said", "turn"),
    [
        (DEFAULT + CHATML, None, "Be good.", False),
        (DEFAULT + CHATML, "Be brief.", "Be brief.", False),
        (DEFAULT + CHATML, "", None, True),  # an empty turn is what the policy was measured with, and not the template's default
        (CHATML, "", None, True),
        (CHATML, None, None, False),
    ],
)
def test_the_system_prompt_is_that_of_the_runs_own_prompts(template, system, said, turn):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = modelfile(tokenizer, "model.gguf", system)
    assert re.findall(r'SYSTEM """(.*?)"""', text) == ([said] if said else [])
    empty = '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\n<|im_end|>\n{{ end }}{{ range .Messages }}'
    assert (empty in text) is turn
    with pytest.raises(UserError, match="use --format gguf"):
        modelfile(tokenizer, "model.gguf", 'Say """.')


@pytest.mark.parametrize(("name", "joined"), [("llama3", False), ("gemma", True), ("mistral", True), ("plain", False)])
def test_our_templates_are_said(name, joined):
    """What is said renders as the template does: `pieces_of` compares."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = (ROOT / "configs" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    pieces = pieces_of(tokenizer)
    assert (set(pieces.around), pieces.joined) == ({"system", "user", "assistant"}, joined)


def test_a_template_that_drops_earlier_thoughts_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last or message['role'] != 'assistant' else '') +"
    )
    with pytest.raises(UserError, match="use --format gguf, which keeps the template as it is"):
        pieces_of(tokenizer)


# --- a file as a base -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Qwen2", "Qwen3", "Gemma2", "Gemma3"])
def test_a_file_becomes_the_model_that_it_was_made_of(name, tmp_path):
    vocabulary = sentencepiece_tokenizer() if name.startswith("Gemma") else None
    tokenizer = written(make(name, tmp_path / "model", vocabulary), tmp_path / "model.gguf")
    gguf_model.convert(tmp_path / "model.gguf", tmp_path / "back")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float()
    assert there.config.tie_word_embeddings == model.config.tie_word_embeddings
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(there(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_matrix_that_is_there_twice_is_one(tmp_path):
    """As in Qwen2.5-Coder-0.5B's q4_k_m: the embedding in 5 bits, the head of the tied model in 8."""
    from gguf.quants import dequantize, quantize

    written(make("Llama, tied", tmp_path / "model"), tmp_path / "model.gguf")
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).named_parameters())
    matrix = whole["model.embed_tokens.weight"].detach().numpy()
    ends = {"token_embd.weight": "Q5_0", "output.weight": "Q8_0"}
    copy_with(tmp_path / "model.gguf", tmp_path / "twice.gguf", {name: (matrix, kind) for name, kind in ends.items()})
    gguf_model.convert(tmp_path / "twice.gguf", tmp_path / "back")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert there.config.tie_word_embeddings and there.lm_head.weight is there.model.embed_tokens.weight
    kind = gguf.GGMLQuantizationType.Q8_0
    finer = torch.from_numpy(dequantize(quantize(matrix, kind), kind)).bfloat16()
    assert torch.equal(there.lm_head.weight, finer)


def test_two_matrices_stay_two(tmp_path):
    written(make("Llama", tmp_path / "model"), tmp_path / "model.gguf")
    assert gguf_model.tied_matrix(gguf.GGUFReader(tmp_path / "model.gguf")) is None


def copy_with(source, target, tensors):
    """A GGUF file again, with some tensors in another quantization, or more of them."""
    from gguf.quants import quantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, (matrix, kind) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gguf_model", *map(str, arguments)])
    gguf_model.main()


def test_a_file_is_read_only_if_its_hash_is_the_one_asked_for(tmp_path, monkeypatch, capsys):
    from posttrain.records import sha256_file

    file = tmp_path / "model.gguf"
    written(make("Llama", tmp_path / "model"), file)
    with pytest.raises(UserError, match=rf"has sha256 {sha256_file(file)}, not 00ff"):
        run_main(monkeypatch, file, tmp_path / "back", "--sha256", "00FF")
    assert not (tmp_path / "back").exists()
    run_main(monkeypatch, file, tmp_path / "back", "--sha256", sha256_file(file).upper())
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'back'}\n")
    with pytest.raises(UserError, match="back is there already"):
        run_main(monkeypatch, file, tmp_path / "back")


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "is not there"), (b"PK\x03\x04", "is no GGUF file"), (b"GGUF\x09\x00\x00\x00" + bytes(64), "cannot be read as GGUF")],
)
def test_what_is_no_file_of_the_kind_is_refused(content, line, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=line):
        run_main(monkeypatch, tmp_path / "x.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_of_another_family_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="is of architecture mamba: only llama, qwen2"):
        gguf_model.convert(tmp_path / "x.gguf", tmp_path / "back")


def test_an_export_for_ollama_is_a_file_and_its_modelfile(sft, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from test_export import request, with_data

    from posttrain.export.command import export

    run = with_data(shutil.copytree(sft, tmp_path / "run"))
    (found,) = export(request(run, tmp_path / "out", "ollama", "f16"))
    assert found.runtime == "llama.cpp" and found.same_prompts and not found.faults
    assert found.top1_agreement > 0.9 and found.kl_mean < 0.01
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile", "README.md", "export.json", "fidelity.json", "run-f16.gguf",
    ]  # fmt: skip
    assert "ollama create" in (tmp_path / "out" / "README.md").read_text()


def test_one_file_in_two_folders_is_asked_once(sft, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from test_export import request, with_data

    from posttrain.export.command import export
    from posttrain.export.runtimes import LlamaCpp
    from posttrain.export.source import Target

    opened, begin = [], LlamaCpp.__init__
    monkeypatch.setattr(LlamaCpp, "__init__", lambda self, file, *rest: (opened.append(file.name), begin(self, file, *rest))[1])
    run = with_data(shutil.copytree(sft, tmp_path / "run"))
    kinds = [("gguf", "f16"), ("ollama", "f16"), ("gguf", "q8_0")]
    targets = tuple(Target(kind, quant, "trained", tmp_path / f"{kind}-{quant}") for kind, quant in kinds)
    one, same, other = export(request(run, tmp_path / "out", targets=targets))
    assert opened == ["run-f16.gguf", "run-q8_0.gguf"]
    assert (one.kl_mean, one.greedy_equal, one.tokens_per_second) == (same.kl_mean, same.greedy_equal, same.tokens_per_second)
    assert same.artefact == "ollama-f16" and same.accuracy["sentence"].startswith("ollama-f16") and other.kl_mean != one.kl_mean


def test_an_untied_head_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    from posttrain.export.gguf_file import check_writable

    monkeypatch.setitem(MODELS, "Gemma2", ("Gemma2Config", GEMMA | {"tie_word_embeddings": False}))
    weights = FoldedWeights(Model(name_or_path=str(make("Gemma2", tmp_path)), dtype="float32"), "none", None)
    with pytest.raises(UserError, match=r"no place for lm_head\.weight: use --format merged"):
        check_writable(weights)


def test_what_llama_cpp_says_of_a_file_is_told(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    from posttrain.export.runtimes import LlamaCpp

    written(make("Llama", tmp_path / "model"), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"does not load this model as GGUF \(.*\w.*\): use --format merged"):
        LlamaCpp(tmp_path / "half.gguf", 0, 64)
