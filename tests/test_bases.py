"""Which base an adapter belongs to, and which checkpoint can be one: before weights are loaded and a directory is made."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import retell
from tiny_training import LORA, finished_sft

from posttrain.config.load import config_sha256
from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.models.adapter_checks import check_adapter_fits, check_start
from posttrain.models.adapters import resolve_adapter, targets_met
from posttrain.models.base import fingerprint, load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.checkpoint import check_base, check_context, norms_hash, skeleton, weights_hash
from posttrain.runs.manifest import read_manifest, refuse_unfinished


@pytest.fixture
def run(sft, tmp_path):
    """A finished run of its own."""
    shutil.copytree(sft, tmp_path / "run")
    retell(tmp_path / "run", exit="ok")
    return tmp_path / "run"


def base_at(tiny_model_dir, folder, change=None):
    shutil.copytree(tiny_model_dir, folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: change(name, tensor) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    return Model(name_or_path=str(folder))


def merged_fine_tune(name, tensor):
    return tensor + 0.01 if "q_proj" in name else tensor


def another(name, tensor):
    return tensor * 2


def old(run):
    """The run as an earlier version left it."""
    model = read_manifest(run).model
    retell(run, model={key: model[key] for key in model if key not in ("weights", "tokenizer", "template")})


def test_a_copy_of_the_base_is_the_base(run, tiny_model_dir, tmp_path):
    copy = base_at(tiny_model_dir, tmp_path / "elsewhere")
    assert check_adapter_fits(run / "adapter", copy, load_tokenizer(copy)).r == 4
    old(run)
    assert check_adapter_fits(run / "adapter", copy, load_tokenizer(copy)).r == 4


def test_the_base_that_was_named_may_be_gone_or_on_the_hub(run, tiny_model_dir, tmp_path):
    copy = base_at(tiny_model_dir, tmp_path / "elsewhere")
    retell(run, model=read_manifest(run).model | {"name_or_path": "somebody/tiny"})
    assert check_adapter_fits(run / "adapter", copy).r == 4


def test_a_base_cut_into_other_files_is_the_same(tiny_model_dir, settings, load, tmp_path):
    load().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert weights_hash(Model(name_or_path=str(tmp_path))) == weights_hash(settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_the_norms_of_the_files_are_those_of_the_loaded_base(load, settings, dtype):
    assert norms_hash(settings, dtype) == fingerprint(load(dtype=dtype))


WRONG = {
    "another base": (another, False, r"belongs to base .*: set model.name_or_path to match \(its weights are not those"),
    "another base, said to be the same": (another, True, "its weights are not those"),
    "a merged fine-tune": (merged_fine_tune, False, "same norms and may be a fine-tune of the other"),
}


@pytest.mark.parametrize(("change", "same_base", "told"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("at_its_place", [False, True])
def test_a_wrong_base_is_refused(run, tiny_model_dir, tmp_path, change, same_base, told, at_its_place):
    wrong = base_at(tiny_model_dir, tmp_path / "wrong", change).model_copy(update={"same_base": same_base})
    if at_its_place:  # the folder that was named holds other weights now
        retell(run, model=read_manifest(run).model | {"name_or_path": wrong.name_or_path})
    with pytest.raises(UserError, match=told):
        check_adapter_fits(run / "adapter", wrong)


def test_a_merged_base_is_not_taken_for_its_base_by_its_norms(run, tiny_model_dir, tmp_path):
    old(run)
    merged = base_at(tiny_model_dir, tmp_path / "merged_base", merged_fine_tune)
    with pytest.raises(UserError, match="may be a fine-tune of the other"):
        check_adapter_fits(run / "adapter", merged)


def test_same_base_says_that_another_form_is_the_same(run, tiny_model_dir, tmp_path):
    other = base_at(tiny_model_dir, tmp_path / "other", merged_fine_tune)
    assert check_adapter_fits(run / "adapter", other.model_copy(update={"same_base": True})).r == 4


def test_an_adapter_without_a_run_has_a_name_alone(run, settings, tiny_model_dir, tmp_path):
    folder = shutil.copytree(run / "adapter", tmp_path / "foreign" / "x" / "adapter")
    copy = base_at(tiny_model_dir, tmp_path / "elsewhere")
    assert check_adapter_fits(folder, settings).r == 4
    with pytest.raises(UserError, match=r"belongs to base .*, or model.same_base=true if these are the same weights"):
        check_adapter_fits(folder, copy)
    assert check_adapter_fits(folder, copy.model_copy(update={"same_base": True})).r == 4


def test_same_base_is_recorded_and_changes_no_hash_of_settings(tiny, settings):
    said = tiny.sft_config(model={"name_or_path": settings.name_or_path, "same_base": True})
    plain = tiny.sft_config()
    assert config_sha256(said.model_copy(update={"run_dir": "r"})) == config_sha256(plain.model_copy(update={"run_dir": "r"}))
    with tiny.sft({}, model={"name_or_path": settings.name_or_path, "same_base": True}) as trainer:
        assert trainer.run.manifest.model["same_base"] is True
    assert "same_base" not in read_manifest(finished_sft(tiny)).model


def test_another_vocabulary_is_refused(run, settings):
    tokenizer = load_tokenizer(settings)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="another vocabulary"):
        check_adapter_fits(run / "adapter", settings, tokenizer)
    assert check_adapter_fits(run / "adapter", settings.model_copy(update={"same_base": True}), tokenizer).r == 4


# --- runs that did not finish -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "failed: UserError: training left every adapter weight as it was"])
def test_the_adapter_of_a_run_that_did_not_finish_is_refused(run, status):
    assert refuse_unfinished(run / "adapter") is None
    checkpoint = shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-2")
    retell(run, exit=status)
    with pytest.raises(UserError, match=r"is not finished \(.*\), and its adapter is no result: finish the run with --resume"):
        refuse_unfinished(run / "adapter")
    assert "checkpoint of a run that has not finished" in refuse_unfinished(checkpoint)
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="is not finished"):
        resolve_adapter(str(run))


def test_an_adapter_that_training_did_not_change_is_not_written(tiny, sft):
    with tiny.sft({"max_steps": 1, "learning_rate": 0.0}) as trainer, pytest.raises(UserError, match="left every adapter"):
        from posttrain.training.checkpoints import save_adapter

        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, trainer.run.manifest.start_sha256)
    assert not (trainer.run.folder / "adapter").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_with_the_way_to_convert(tiny_model_dir, tmp_path, tokenizer):
    folder = tmp_path / "binonly"
    shutil.copytree(tiny_model_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors: only safetensors are loaded. Convert it: python -c"):
        check_base(Model(name_or_path=str(folder)), "none", tokenizer)


def test_a_folder_without_weights_is_refused(tiny_model_dir, tmp_path, tokenizer):
    shutil.copytree(tiny_model_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="bare holds no weights: download the model whole"):
        check_base(Model(name_or_path=str(tmp_path / "bare")), "none", tokenizer)


def without_a_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def saying(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def holding(**changes):
    """Other tensors: `change(tensors)` for a name of the file, a new one where there is none."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: make(tensors) for name, make in changes.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def with_one(name, value):
    def make(tensors):
        tensor = tensors[name].clone()
        tensor.view(-1)[-1] = value
        return tensor

    return holding(**{name: make})


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
DAMAGED = {  # what is wrong with a folder -> what is told
    "a tensor is missing": (without_a_layer, "has no tensor model.layers.1.mlp.up_proj.weight: get a whole copy"),
    "a layer is missing": (saying(num_hidden_layers=3), "has no tensor model.layers.2."),
    "a layer too many": (saying(num_hidden_layers=1), r"has model.layers.1.\S+, which its config.json has no place for \(9 such"),
    "a bias that nothing adds": (
        holding(**{"model.layers.0.self_attn.q_proj.bias": lambda _: torch.zeros(64)}),
        r"has model.layers.0.self_attn.q_proj.bias, which its config.json has no place for \(1 such",
    ),
    "a norm of another family": (
        holding(**{"model.layers.0.self_attn.q_norm.weight": lambda _: torch.ones(16)}),
        "has model.layers.0.self_attn.q_norm.weight, which its config.json has no place for",
    ),
    "NaN": (with_one(UP, float("nan")), f"has NaN or infinity in {UP}: its training has diverged"),
    "infinity": (with_one(NORM, float("-inf")), f"has NaN or infinity in {NORM}"),
    "two ends that are said to be one": (
        holding(**{"lm_head.weight": lambda tensors: tensors[EMBEDDING] * 2}),
        "holds lm_head.weight and model.embed_tokens.weight with different values",
    ),
    "another width": (saying(intermediate_size=96), r"has model.layers.0.mlp.\w+.weight as \(.*, where its config.json says"),
    "cut off": (cut_off, "model.safetensors cannot be read .*: get a whole copy"),
    "an unknown family": (saying(model_type="foobar"), "transformers cannot read its config.json .*foobar"),
    "no family": (saying(model_type=""), "transformers cannot read its config.json"),
    "a number as text": (saying(num_hidden_layers="2"), "cannot read its config.json .*expected int, got str"),
    "a list of pad tokens": (saying(pad_token_id=[0]), "cannot read its config.json .*pad_token_id"),
    "an unknown dtype": (saying(dtype="float17"), "cannot read its config.json .*float17"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read .*not a valid JSON file"),
    "code of its own": (
        saying(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "cannot read its config.json",
    ),
}


@pytest.mark.parametrize(("change", "told"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_base_is_told_and_nothing_is_drawn_at_random(change, told, tiny_model_dir, tmp_path):
    settings = base_at(tiny_model_dir, tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(UserError, match=told):
        check_base(settings, "none", load_tokenizer(settings))


LEFT_OUT = {  # what nothing reads and no model is another for
    "buffers": holding(**{"model.layers.0.self_attn.rotary_emb.inv_freq": lambda _: torch.ones(8)}),
    "a tied head twice": holding(**{"lm_head.weight": lambda tensors: tensors[EMBEDDING].clone()}),
    "a vision tower": holding(
        **{"vision_tower.layers.7.weight": lambda _: torch.ones(8), "model.mtp.norm.weight": lambda _: torch.ones(8)}
    ),
    "a layer ahead": lambda folder: (
        saying(num_nextn_predict_layers=1)(folder),
        holding(**{"model.layers.2.eh_proj.weight": lambda _: torch.ones(8)})(folder),
    ),
}


@pytest.mark.parametrize("change", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_no_model_of_the_family_reads_may_be_in_its_files(change, tiny_model_dir, tmp_path):
    settings = base_at(tiny_model_dir, tmp_path / "base")
    change(tmp_path / "base")
    check_base(settings, "none", load_tokenizer(settings))
    load_base(settings, "none", load_tokenizer(settings))


def test_a_weight_beyond_the_dtype_of_the_run_is_told(tiny_model_dir, tmp_path):
    settings = base_at(tiny_model_dir, tmp_path / "base")
    with_one(UP, 1e5)(tmp_path / "base")
    check_base(settings, "none", load_tokenizer(settings))
    with pytest.raises(UserError, match=rf"has 99840 in {UP}, beyond float16: set model.dtype=bfloat16"):
        check_base(settings.model_copy(update={"dtype": "float16"}), "none", load_tokenizer(settings))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_number_is_told(run, settings, tiny_model_dir, tmp_path, value):
    folder = shutil.copytree(run / "adapter", tmp_path / "foreign" / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    tokenizer = load_tokenizer(settings)
    with pytest.raises(UserError, match=f"adapter .* has NaN or infinity in {name}: its training has diverged"):
        check_start(folder, settings, "none", skeleton(settings), tokenizer, train=True, stores=False)


def test_experts_and_layers_that_nothing_reads_are_told(tmp_path, tokenizer):
    from families import make_model

    settings = Model(name_or_path=str(make_model("Mixtral", tmp_path / "base", tokenizer)), dtype="float32")
    check_base(settings, "none", tokenizer)
    saying(num_hidden_layers=3)(tmp_path / "base")
    with pytest.raises(
        UserError, match="has model.layers.3.block_sparse_moe.experts.0.w1.weight, which its config.json has no place"
    ):
        check_base(settings, "none", tokenizer)
    with pytest.raises(UserError, match="has model.layers.3.input_layernorm.weight, which its config.json has no place"):
        load_base(settings, "none", tokenizer)
    saying(num_hidden_layers=4, num_local_experts=2)(tmp_path / "base")
    with pytest.raises(UserError, match="has model.layers.0.mlp.experts.down_proj as .*4, 64, 128.*, where its config.json says"):
        load_base(settings, "none", tokenizer)


def test_what_is_drawn_at_random_is_told_of_families_stored_otherwise_too(settings, tokenizer, tiny_model_dir, tmp_path):
    base_at(tiny_model_dir, tmp_path / "base")
    without_a_layer(tmp_path / "base")
    with pytest.raises(UserError, match=r"no tensor model.layers.1.mlp.up_proj.weight \(1 are missing\): get a whole copy"):
        load_base(settings.model_copy(update={"name_or_path": str(tmp_path / "base")}), "none", tokenizer)


def test_a_base_stored_without_its_prefix_is_whole(tiny_model_dir, tmp_path):
    settings = base_at(tiny_model_dir, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t for n, t in tensors.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"}
    )
    check_base(settings, "none", load_tokenizer(settings))


FORMS = {
    "nf4 as none": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "none", "packed as NF4 already"),
    "nf4 as nf4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", None),
    "fp4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "nf4", r"is quantized \(bitsandbytes\)"),
    "int8": ("bitsandbytes", {"load_in_8bit": True}, "none", r"is quantized \(bitsandbytes\)"),
    "gptq": ("gptq", {"bits": 4}, "none", r"is quantized \(gptq\).*set model.name_or_path to the unquantized original"),
    "awq": ("awq", {"bits": 4}, "nf4", r"is quantized \(awq\)"),
    "fp8": ("fp8", {}, "none", r"is quantized \(fp8\)"),
}


@pytest.mark.parametrize(("method", "more", "quantization", "told"), FORMS.values(), ids=FORMS.keys())
def test_a_quantized_checkpoint_is_refused_by_its_form(tiny_model_dir, tmp_path, tokenizer, method, more, quantization, told):
    file = shutil.copytree(tiny_model_dir, tmp_path / "q") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method} | more}))
    settings = Model(name_or_path=str(tmp_path / "q"))
    if told is None:
        check_base(settings, quantization, tokenizer)
    else:
        with pytest.raises(UserError, match=told):
            check_base(settings, quantization, tokenizer)


def test_tokens_without_a_row_are_refused_where_the_template_has_them(settings):
    tokenizer = load_tokenizer(settings)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|never|>"]})
    check_base(settings, "none", tokenizer)  # Gemma3's tokenizer has such a token, too
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|never|>")
    with pytest.raises(UserError, match=r"rows, none for <\|never\|> \d+: resize the model"):
        check_base(settings, "none", tokenizer)


def test_the_context_is_1024(settings):
    base = skeleton(settings)
    check_context(base, 1000, 24, "generation.max_new_tokens")
    with pytest.raises(UserError, match="set generation.max_new_tokens to 24 or less"):
        check_context(base, 1000, 25, "generation.max_new_tokens")
    with pytest.raises(UserError, match="shorten the prompts"):
        check_context(base, 2000, 1, "generation.max_new_tokens")


# --- targets ----------------------------------------------------------------------------------------------------------

TARGETS = {
    "the end of a name": (["proj"], "names no layer of this model: proj"),
    "the head": (["q_proj", "lm_head"], "names lm_head"),
    "the embedding": (["embed_tokens"], "names embed_tokens"),
    "a block": (["mlp"], "names a LlamaMLP: name the linear layers inside it"),
}


@pytest.mark.parametrize(("targets", "told"), TARGETS.values(), ids=TARGETS.keys())
def test_a_target_that_takes_no_adapter_is_refused(settings, targets, told):
    with pytest.raises(UserError, match=told):
        targets_met(skeleton(settings), Lora(**LORA | {"target_modules": targets}))


def test_targets_are_counted_as_peft_meets_them(settings):
    base = skeleton(settings)
    assert targets_met(base, Lora(**LORA | {"target_modules": ["q_proj", "mlp.up_proj"]})) == {"q_proj": 2, "mlp.up_proj": 2}
    every = Lora(**LORA | {"target_modules": "all-linear"})
    assert every.target_modules == ["all-linear"]
    assert targets_met(base, every) == dict.fromkeys(LORA["target_modules"], 2)


def test_all_linear_is_what_peft_trains(tiny):
    with tiny.sft(lora=LORA | {"target_modules": "all-linear"}) as trainer:
        assert {n.split(".")[-4] for n, p in trainer.model.named_parameters() if "lora_A" in n} == {*LORA["target_modules"]}


def test_a_base_loads_after_its_skeleton_was_looked_at(settings, tokenizer):
    check_base(settings, "none", tokenizer)
    assert not load_base(settings, "none", tokenizer).get_input_embeddings().weight.is_meta
