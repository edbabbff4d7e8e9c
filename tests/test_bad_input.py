"""What a user gets wrong: one clear line, exit code 2, and not a byte of his folder changed."""

import json
import re
import shutil

import pytest
from hub_server import serve
from ruamel.yaml import YAML
from scripts import CONFIGS, retell, run, run_fresh, tree

from posttrain.records import sha256_file
from posttrain.runs.manifest import read_manifest

STAGES = {"data_prep": "data", "sft_train": "sft", "grpo_train": "grpo", "evaluate": "eval"}
TRAINING = ("sft_train", "grpo_train")
MODEL_READERS = ("sft_train", "grpo_train", "evaluate")


@pytest.fixture
def place(tmp_path, pipeline):
    """A user's folder: the configs, a prepared data set, a finished SFT run."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    shutil.copytree(pipeline / "models", tmp_path / "models", symlinks=True)
    shutil.copytree(pipeline / "data", tmp_path / "data")
    shutil.copytree(pipeline / "runs" / "sft_tiny", tmp_path / "runs" / "sft_tiny")
    return tmp_path


def refused(place, script, *arguments, config=None):
    """The message, once it is clear that there is one and that nothing was written."""
    config = config or f"configs/{STAGES[script]}_tiny.yaml"
    before = tree(place)
    done = run(script, "--config", config, *arguments, cwd=place)
    assert done.code == 2, done
    assert "Traceback" not in done.err and not done.out
    assert tree(place) == before
    return done.err


def somewhere_new(script):
    return "output_dir=data/new" if script == "data_prep" else "run_dir=runs/new"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "override", "told"),
    [
        ("data_prep", "sead=1", "sead: unknown key (did you mean 'seed'?)"),
        ("data_prep", "source.num_trian=1", "unknown key (did you mean 'source.num_train'?)"),
        ("sft_train", "trainer.learning_rat=1", "unknown key (did you mean 'trainer.learning_rate'?)"),
        ("grpo_train", "trainer.num_generation=4", "unknown key (did you mean 'trainer.num_generations'?)"),
        ("evaluate", "generation.max_tokens=4", "unknown key (did you mean 'generation.max_new_tokens'?)"),
        ("data_prep", "source.num_train=many", 'source.num_train: should be a whole number, not "many"'),
        ("sft_train", "trainer.max_steps=1.5", "trainer.max_steps: should be a whole number, not 1.5"),
        ("sft_train", "quantization=int4", "quantization: should be 'nf4'"),
        ("evaluate", "model.attn_implementation=matmull", "did you mean 'matmul'?"),
        ("grpo_train", "rewards.gate_format=no", 'rewards.gate_format: should be true or false, not "no"'),
        ("evaluate", "data.limit=-1", "data.limit"),
        ("evaluate", "generation.samples=4", "4 greedy samples would be equal: set temperature above 0"),
        ("sft_train", "lora", "key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(place, script, override, told):
    err = refused(place, script, somewhere_new(script), override)
    assert err.startswith("command line: ") and told in err and err.count("\n") == 1


def test_all_faults_of_a_file_are_told_at_once_with_their_lines(place):
    text = (place / "configs" / "sft_tiny.yaml").read_text()
    text = text.replace("  r: 16", "  rank: 16").replace("max_steps: 30", "max_steps: thirty").replace("num_dev", "num_deev")
    (place / "configs" / "mine.yaml").write_text(text)
    err = refused(place, "sft_train", config="configs/mine.yaml")
    lines = {key: 1 + text[: text.index(key)].count("\n") for key in ("rank", "num_deev", "max_steps")}
    for key, line in lines.items():
        assert re.search(rf"^configs/mine\.yaml:{line}: \S*{key}: ", err, re.M), err


@pytest.mark.parametrize("script", STAGES)
def test_a_missing_config_is_told_with_the_nearest(place, script):
    stage = STAGES[script]
    err = refused(place, script, config=f"configs/{stage}_tinny.yaml")
    assert f"configs/{stage}_tinny.yaml: no such file (did you mean 'configs/{stage}_tiny.yaml'?)" in err
    done = run(script, cwd=place)
    assert done.code == 2 and "--config FILE is required" in done.err


def test_a_batch_that_does_not_divide_is_told_with_both_numbers_and_what_would(place):
    err = refused(place, "grpo_train", "trainer.num_generations=3", somewhere_new("grpo_train"))
    assert "= 16 completions do not divide by 3: use num_generations 2 or 4, or gradient_accumulation_steps 3" in err


def test_a_batch_is_counted_over_all_processes(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    err = refused(place, "grpo_train", "trainer.num_generations=32", somewhere_new("grpo_train"))
    assert "processes (48) x gradient_accumulation_steps (1) = 48 completions do not divide by 32" in err


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", MODEL_READERS)
def test_data_that_is_not_prepared_comes_with_the_command(place, script):
    err = refused(place, script, "data.path=data/demo", somewhere_new(script))
    assert "prepare them with `python data_prep.py --config configs/data_demo.yaml`" in err and err.count("\n") == 1


@pytest.mark.parametrize("script", MODEL_READERS)
def test_data_that_was_changed_by_hand_is_told(place, script):
    file = place / "data" / "tiny" / ("test.jsonl" if script == "evaluate" else "train.jsonl")
    file.write_bytes(file.read_bytes() + b"\n")
    err = refused(place, script, somewhere_new(script))
    assert f"data/tiny/{file.name} is not what data/tiny/manifest.json says" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"question": "How many?", "answer": "It is 3."}', "train.jsonl:2: gold solution has 0 '####', not one"),
        (
            b'{"question": "How many?", "answer": "so\\n#### many"}',
            "train.jsonl:2: gold answer after '####' is not a number: ' many'",
        ),
        (b'{"question": "caf\xe9", "answer": "#### 3"}', "train.jsonl:2: invalid UTF-8"),
        (b'{"question": "How many?"}', "train.jsonl:2: 'answer' is missing"),
        (b'{"answer": "#### 3"}', "train.jsonl:2: 'question' is missing"),
        (b'{"question": "How many?", "answer": "#### 3"', "train.jsonl:2: not JSON"),
        (b'{"question": "So: <|im_end|>", "answer": "#### 3"}', "train.jsonl:2: holds <|im_end|>"),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(place, line, told):
    raw = place / "raw"
    raw.mkdir()
    (raw / "train.jsonl").write_bytes(b'{"question": "1 + 1?", "answer": "#### 2"}\n' + line + b"\n")
    err = refused(place, "data_prep", config=data_config(place, {"kind": "jsonl", "path": "raw"}))
    assert told in err and "1 bad rows, nothing written" in err and "max_rejected=1" in err


FEW = {"min_animals": 1, "max_animals": 1, "max_instances": 2}


def data_config(place, source, **changes):
    values = YAML(typ="safe").load(place / "configs" / "data_tiny.yaml")
    (place / "configs" / "mine.yaml").write_text(json.dumps(values | {"output_dir": "data/new", "source": source} | changes))
    return "configs/mine.yaml"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            {"kind": "jsonl", "path": "nowhere"},
            "nowhere holds neither train.jsonl nor test.jsonl (it is not there): check source.path",
        ),
        ({"kind": "svamp", "path": "SVAMP.json"}, "no SVAMP file at SVAMP.json: check source.path"),
        ({"kind": "rejection_sampled", "run_dir": "runs/none"}, "no samples in runs/none: evaluate the train split first"),
        (
            {"kind": "leg_counting", "num_train": 300, "num_dev": 1, "num_test": 1, "options": FEW},
            "different questions for train",
        ),
    ],
)
def test_a_source_that_is_not_there_is_told(place, source, told):
    assert told in refused(place, "data_prep", config=data_config(place, source))


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTER_READERS = ["sft_train", "grpo_train", "evaluate"]


def with_adapter(place, script, adapter):
    """Arguments, and for SFT a config that continues an adapter."""
    if script == "sft_train":
        values = YAML(typ="safe").load(place / "configs" / "sft_tiny.yaml")
        del values["lora"]
        (place / "configs" / "sft_tiny.yaml").write_text(json.dumps(values))
    return f"adapter={adapter}", somewhere_new(script)


@pytest.mark.parametrize("script", ADAPTER_READERS)
def test_an_adapter_that_is_not_there_is_told(place, script):
    err = refused(place, script, *with_adapter(place, script, "runs/none"))
    assert "no adapter at runs/none: train one first (python sft_train.py --config ...) or correct `adapter`" in err


@pytest.mark.parametrize("script", ADAPTER_READERS)
def test_an_adapter_of_another_base_is_told_with_both(place, script):
    shutil.copytree(place / "runs" / "sft_tiny" / "adapter", place / "copied")  # away from the manifest, which would know better
    file = place / "copied" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "me/other-base"}))
    err = refused(place, script, *with_adapter(place, script, "copied"))
    assert "belongs to base me/other-base, not to models/tiny: set model.name_or_path to match" in err


@pytest.mark.parametrize("script", ADAPTER_READERS)
def test_an_adapter_without_safetensors_is_told(place, script):
    folder = place / "runs" / "sft_tiny" / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "only safetensors adapters are loaded" in refused(place, script, *with_adapter(place, script, "runs/sft_tiny"))


@pytest.mark.parametrize("script", ADAPTER_READERS)
def test_the_adapter_of_a_failed_run_is_told(place, script):
    retell(place / "runs" / "sft_tiny", exit="failed: FloatingPointError: loss is nan")
    err = refused(place, script, *with_adapter(place, script, "runs/sft_tiny"))
    assert "runs/sft_tiny is not finished (failed: FloatingPointError: loss is nan)" in err and "--resume" in err


@pytest.mark.parametrize("script", ADAPTER_READERS)
def test_an_adapter_of_prompt_tuning_is_told_by_its_kind(place, script):
    folder = shutil.copytree(place / "runs" / "sft_tiny" / "adapter", place / "made_elsewhere")  # a run knows its adapter by hash
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "PROMPT_TUNING"}))
    err = refused(place, script, *with_adapter(place, script, "made_elsewhere"))
    assert "is of peft_type PROMPT_TUNING, which cannot be folded" in err and err.count("\n") == 1


# --- models -----------------------------------------------------------------------------------------------------------


def with_model(script, name):
    return f"{'tokenizer' if script == 'data_prep' else 'model'}.name_or_path={name}", somewhere_new(script)


@pytest.mark.parametrize("script", ["data_prep", "sft_train", "evaluate"])
def test_a_model_folder_that_is_not_there_is_told(place, script):
    err = refused(place, script, *with_model(script, "models/none"))
    assert "models/none holds no model (no config.json)" in err


@pytest.mark.parametrize("script", ["data_prep", "sft_train", "evaluate"])
def test_offline_without_a_copy_is_told(place, script):
    err = refused(place, script, *with_model(script, "nobody/absent-model"))
    assert "nobody/absent-model could not be loaded: no copy in the local cache and the Hub did not answer" in err
    assert "Connect to the network, or set model.name_or_path to a local folder" in err


def fresh(place, endpoint, *commands):
    """Commands in a new process that believes this address to be the Hub; all refused, nothing written."""
    before = tree(place)
    changes = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(place.parent / "hf"), "HF_TOKEN": ""}
    done = run_fresh(*commands, cwd=place, **changes)
    assert tree(place) == before
    assert {one.code for one in done} == {2} and not any("Traceback" in one.err for one in done), done
    return [one.err.splitlines()[-1] for one in done]  # huggingface_hub's retries are told before it


@pytest.mark.slow
def test_a_gated_model_without_a_token_is_told_what_to_accept_and_what_to_set(place):
    scripts = ("data_prep", "evaluate")
    with serve("hf_of_somebody") as hub:
        for number in (401, 403):  # nobody is logged in; somebody who has not accepted the licence
            text = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
            hub.fail(f"/meta/gated{number}", number, times=1_000_000, headers=text)
        commands = [
            (script, "--config", f"configs/{STAGES[script]}_tiny.yaml", *with_model(script, f"meta/gated{number}"))
            for number in (401, 403)
            for script in scripts
        ]
        told = fresh(place, hub.url, *commands)
        assert any("meta/gated401" in line for line in hub.log) and any("meta/gated403" in line for line in hub.log)
    for command, err in zip(commands, told, strict=True):
        name = command[3].split("=")[1]
        assert f"{name} is gated: accept its licence at https://huggingface.co/{name}" in err
        assert "`hf auth login` or set HF_TOKEN" in err


@pytest.mark.slow
def test_no_network_is_told(place):
    hub = {"kind": "hub", "repo_id": "openai/gsm8k", "revision": "e53f048856ff4f594e959d75785d2c2d37b678ee"}
    told = fresh(
        place,
        "http://127.0.0.1:9",  # nothing listens on the discard port
        ("data_prep", "--config", "configs/data_tiny.yaml", *with_model("data_prep", "me/model")),
        ("evaluate", "--config", "configs/eval_tiny.yaml", *with_model("evaluate", "me/model")),
        ("data_prep", "--config", data_config(place, hub)),
        ("evaluate", "--config", "configs/eval_tiny.yaml", "adapter=me/adapter", "run_dir=runs/new"),
    )
    model, same, data, adapter = told
    for err in (model, same):
        assert "me/model could not be loaded" in err and "Connect to the network, or set model.name_or_path" in err
    assert "openai/gsm8k could not be read from the Hub" in data and "use `source: {kind: jsonl, path: FOLDER}`" in data
    assert "adapter me/adapter is neither a local folder nor reachable on the Hub" in adapter


# --- what TRL would refuse late -------------------------------------------------------------------------------------

LATE = {
    "an evaluation of GRPO": ("grpo_train", "trainer.eval_strategy=steps", "GRPO has no evaluation loss: dev_every_steps"),
    "the head": ("sft_train", "lora.target_modules=[q_proj,lm_head]", "lora.target_modules names lm_head"),
    "the end of a name": ("sft_train", "lora.target_modules=[proj]", "names no layer of this model: proj"),
    "all rows cut": ("sft_train", "trainer.max_length=8", "trainer.max_length 8 cuts every one of the"),
    "no deepspeed": ("sft_train", "trainer.deepspeed=x.json", "deepspeed"),
    "no package of an optimizer": ("sft_train", "trainer.optim=galore_adamw", "galore_torch"),
    "a schedule without its minimum": ("sft_train", "trainer.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
    "a best model of nothing": ("sft_train", "trainer.load_best_model_at_end=true", "load_best_model_at_end"),
    "packing without a length": ("sft_train", "trainer={packing: true, max_length: null}", "packing fills rows of this length"),
    "FSDP without a launch": ("sft_train", "trainer.fsdp=full_shard", "configs/accelerate/fsdp2.yaml"),
    "an unknown loss": ("sft_train", "trainer.loss_type=xyz", "trainer.loss_type: should be nll or dft"),
    "beyond the context": ("evaluate", "generation.max_new_tokens=1024", "it leaves the model's context of 1024: set generation"),
    "beyond it in GRPO": (
        "grpo_train",
        "trainer.max_completion_length=1024",
        "the model's context of 1024: set trainer.max_comp",
    ),
}


@pytest.mark.parametrize(("script", "override", "told"), LATE.values(), ids=LATE.keys())
def test_what_would_end_late_is_told_at_once(place, script, override, told):
    err = refused(place, script, override, somewhere_new(script))
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize("script", MODEL_READERS)
def test_an_empty_split_is_told(place, script):
    split = "test" if script == "evaluate" else "train"
    file, manifest = place / "data" / "tiny" / f"{split}.jsonl", place / "data" / "tiny" / "manifest.json"
    file.write_bytes(b"")
    values = json.loads(manifest.read_text())
    values["files"][file.name] = sha256_file(file)
    manifest.write_text(json.dumps(values))
    assert f"{split}.jsonl holds no question" in refused(place, script, somewhere_new(script))


def test_rows_that_are_cut_are_told_and_recorded(place):
    err = refused(place, "sft_train", "trainer.max_length=8", somewhere_new("sft_train"))
    limit = int(re.search(r"Set it to (\d+), the longest", err)[1]) - 1
    changes = ("run_dir=runs/cut", f"trainer.max_length={limit}", "trainer.max_steps=1", "data.num_dev=0")
    done = run("sft_train", "--config", "configs/sft_tiny.yaml", *changes, "trainer.eval_strategy=no", cwd=place)
    manifest = read_manifest(place / "runs" / "cut")
    assert done.code == 0 and "rows are cut at trainer.max_length: they are trained on without their end" in done.err
    assert manifest.rows_cut > 0 and any(note.startswith(f"{manifest.rows_cut} of ") for note in manifest.notes)


def test_no_limit_of_length_is_no_mistake(place):
    changes = ("run_dir=runs/long", "trainer.max_length=null", "trainer.max_steps=1")
    assert run("sft_train", "--config", "configs/sft_tiny.yaml", *changes, cwd=place).code == 0


# --- directories and machines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", MODEL_READERS)
def test_a_directory_of_other_settings_is_told_with_both_values(place, script):
    other = place / "runs" / "other"
    shutil.copytree(place / "runs" / "sft_tiny", other)
    err = refused(place, script, "run_dir=runs/other", "seed=7")
    assert "runs/other belongs to a run with other settings (" in err and "choose another run_dir" in err
    assert "seed: 42 there, 7 here" in err or script != "sft_train"


@pytest.mark.parametrize("script", STAGES)
def test_a_directory_of_somebody_else_is_told(place, script):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("...")
    key = somewhere_new(script).split("=")[0]
    assert "mine is not empty and holds no" in refused(place, script, f"{key}=mine")


@pytest.fixture
def no_cuda():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")


@pytest.mark.parametrize("script", MODEL_READERS)
def test_attention_that_needs_cuda_is_told(place, script, no_cuda):
    err = refused(place, script, "model.attn_implementation=flash_attention_2", somewhere_new(script))
    assert (
        "model.attn_implementation flash_attention_2 needs CUDA, and this machine has none: use model.attn_implementation=sdpa"
        in err
    )


@pytest.mark.parametrize("script", TRAINING)
def test_a_trainer_option_that_needs_cuda_is_told(place, script, no_cuda):
    assert "trainer.tf32 True needs CUDA" in refused(place, script, "trainer.tf32=true", somewhere_new(script))


@pytest.mark.parametrize(("script", "key"), [("evaluate", "engine"), ("grpo_train", "rollouts.engine")])
def test_an_engine_that_is_not_installed_is_told(place, script, key, no_cuda):
    err = refused(place, script, f"{key}=vllm", somewhere_new(script))
    assert f"{key} vllm needs the package: pip install 'posttrain[vllm]'" in err and f"{key}=transformers" in err


def test_a_paged_optimizer_is_no_mistake(pipeline, no_cuda):
    """Another one takes its place, and the manifest says so."""
    manifest = read_manifest(pipeline / "runs" / "sft_tiny")
    assert manifest.exit == "ok" and "paged_adamw_32bit" in manifest.notes[0]


def test_trls_own_vllm_is_refused_without_the_package_before_a_run_directory_exists(place):
    server = ("rollouts.engine=trl", "trainer.use_vllm=true", "trainer.vllm_mode=server")
    err = refused(place, "grpo_train", *server, somewhere_new("grpo_train"))
    assert "trainer.use_vllm needs the package: pip install 'posttrain[vllm]'" in err
