"""Publishing, with the real command and a Hub on 127.0.0.1: what is sent, what never is, and every failure."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import made_runs
import pytest
from commands import run_command
from conftest import ROOT
from hub_server import serve
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from scripts import run

from posttrain.config.schema import Model, SftConfig, TrainData
from posttrain.errors import UserError
from posttrain.hub.card import model_card
from posttrain.hub.reading import read_release
from posttrain.hub.redaction import portable, refuse_private_text
from posttrain.hub.release import Base, Request
from posttrain.hub.repository import all_files
from posttrain.lineage.command import lineage_of
from posttrain.models.checkpoint import weights_hash
from posttrain.records import sha256_file
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import open_run
from posttrain.runs.manifest import parent_of

TOKEN = "hf_canaryCanaryCanaryCanaryCanary42"
REPO = "me/llama-gsm8k"
BASE = "me/tiny-base"
PUBLISHED = {
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "README.md", "training_manifest.json", "lineage.json", "prompt.json", ".gitattributes",
}  # fmt: skip
VARIANTS = {
    *(f"merged/{name}" for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")),
    *(f"merged/{name}" for name in ("tokenizer_config.json", "chat_template.jinja", "fidelity.json", "export.json")),
    *(f"gguf-q8_0/{name}" for name in ("model-q8_0.gguf", "fidelity.json", "export.json")),
}
DECOYS = (
    "adapter/training_args.bin", "adapter/optimizer.pt", "adapter/README.md", "adapter/adapter_model.bin",
    "adapter/notes.txt", "adapter/.env", "checkpoints/checkpoint-2/optimizer.pt", "metrics.jsonl", "samples.jsonl",
    "wandb/run-1/files/config.yaml", "train.log", ".env",
)  # fmt: skip


# --- runs as training leaves them -------------------------------------------------------------------------------------


def finished_run(folder, model_dir, data_dir, name_or_path, *, stage="sft", parent=None, merge=False, command=None):
    """A run directory with a real adapter of the tiny model, written by the code that training writes it with."""
    from peft import PeftModel

    from posttrain.config.schema import Lora
    from posttrain.models import adapter_modes, adapters
    from posttrain.models.base import load_base
    from posttrain.models.chat import load_tokenizer

    lora = Lora(r=4, alpha=8, target_modules=["q_proj", "v_proj"])
    source = Model(name_or_path=str(model_dir))
    config = SftConfig(
        run_dir=str(folder),
        model=source.model_copy(update={"name_or_path": name_or_path}),
        lora=lora,
        data=TrainData(path=str(data_dir)),
        quantization="none",
        trainer={"learning_rate": 1e-4},
    )
    tokenizer = load_tokenizer(source)
    with open_run(config, stage, str(folder), resume=False) as run:
        base = load_base(source, "none", tokenizer)
        identity = config.model.model_dump() | {"quantization": "none"}
        if parent:
            sha256 = adapters.adapter_sha256(parent / "adapter")
            above, chain = parent_of(parent / "adapter", sha256)
            run.record(parent=above, chain=chain)
        if merge:
            start = adapters.load_adapter(base, parent / "adapter", trainable=True)
            model = adapter_modes.merged_with_new(start, lora, tokenizer, folder / "merged_base", 0)
            identity["name_or_path"] = str(folder / "merged_base")
        else:
            base.name_or_path = base.config._name_or_path = name_or_path
            model = adapters.new_adapter(base, lora, tokenizer, 0)
        assert isinstance(model, PeftModel)
        train_a_little(model, seed=len(str(folder.name)))
        model.save_pretrained(folder / "adapter", selected_adapters=["default"])
        tokenizer.save_pretrained(folder / "adapter")
        if command:
            run.record(command=command)
        sha256 = adapters.adapter_sha256(folder / "adapter")
        run.record(model=identity, data=data_entry(data_dir, "train"), adapter_sha256=sha256)
    for decoy in DECOYS:
        (folder / decoy).parent.mkdir(parents=True, exist_ok=True)
        (folder / decoy).write_text(f"decoy {decoy}")
    return folder


def train_a_little(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


COMMANDS = {
    "sft": "python sft_train.py --config configs/sft_llama3.2-3b.yaml data.path=/home/ann/private/gsm8k",
    "grpo": f"python grpo_train.py --config ~/secret-project/grpo.yaml adapter=runs/sft_run seed=7 x={TOKEN}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, tiny_data_dir):
    """SFT and GRPO on a base from the Hub, GRPO on a merged base, SFT on a base from a folder. Never written to."""
    root = tmp_path_factory.mktemp("runs")
    parts = (tiny_model_dir, tiny_data_dir)
    sft = finished_run(root / "sft_run", *parts, BASE, command=COMMANDS["sft"])
    finished_run(root / "grpo_run", *parts, BASE, stage="grpo", parent=sft, command=COMMANDS["grpo"])
    finished_run(root / "merged_run", *parts, BASE, stage="grpo", parent=sft, merge=True)
    finished_run(root / "local_run", *parts, str(tiny_model_dir))
    return root


@pytest.fixture
def run_dir(runs, tmp_path):
    return copy_of(runs / "grpo_run", tmp_path)


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / run.name)


def evaluation(folder, run, questions, right, **changes):
    """An evaluation run of this run's adapter, in which the first `right` questions are solved."""
    manifest = json.loads((run / "manifest.json").read_text())
    rows = [
        {"id": str(i), "split": "test", "question": text, "answer": "72", "num_steps": 2, "prompt": text} | {"prompt_sha256": "0"}
        for i, text in enumerate(questions)
    ]
    predictions = [made_runs.predict(row, 0, "#### 72" if i < right else "#### 5", "stop") for i, row in enumerate(rows)]
    made = made_runs.manifest("eval", folder.name, manifest["chain"], adapter_sha256=manifest["adapter_sha256"])
    return made_runs.write_eval(folder, rows, predictions, made | {"model": manifest["model"]} | changes)


def artefact(folder, run, base_dir=None):
    """An artefact as `python -m posttrain.export` leaves it: a merged folder of a base, or a file that stands for a GGUF."""
    folder.mkdir(parents=True)
    manifest = json.loads((run / "manifest.json").read_text())
    if base_dir:
        merge_into(folder, base_dir, run / "adapter")
    else:
        (folder / "model-q8_0.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    measured = {"kl_mean": 1e-5, "top1_agreement": 0.999, "greedy_equal": 0.98, "faults": [], "accuracy": {"sentence": "Level."}}
    (folder / "fidelity.json").write_text(json.dumps(measured))
    (folder / "README.md").write_text("decoy: the artefact's own card")
    files = {name: {"size": 1, "sha256": sha256_file(folder / name)} for name in os.listdir(folder)}
    made = {
        "format": "merged" if base_dir else "gguf",
        "into": "trained",
        "quant": None if base_dir else "q8_0",
        "parent": {"run_dir": str(run), "adapter_sha256": manifest["adapter_sha256"]},
        "chain": [*manifest["chain"], {key: manifest[key] for key in ("stage", "name", "adapter_sha256", "data")}],
        "base": manifest["model"],
        "command": f"python -m posttrain.export {run} --format merged",
        "files": files,
    }
    (folder / "export.json").write_text(json.dumps(made))
    return folder


def merge_into(folder, base_dir, adapter_dir):
    from posttrain.models import adapters
    from posttrain.models.base import load_base
    from posttrain.models.chat import load_tokenizer

    settings = Model(name_or_path=str(base_dir))
    tokenizer = load_tokenizer(settings)
    adapters.merge(adapters.load_adapter(load_base(settings, "none", tokenizer), adapter_dir, False)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def artefacts(runs, tiny_model_dir):
    """A merged folder and a GGUF file of the GRPO run."""
    run = runs / "grpo_run"
    return artefact(runs / "made/merged", run, tiny_model_dir), artefact(runs / "made/gguf-q8_0", run)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with serve(TOKEN) as running:
        yield running
        assert TOKEN.encode() not in running.received


def environment(server, tmp_path, **changes):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    ours = {
        "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9",  # nothing listens on the discard port
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
    }
    return {key: value for key, value in (kept | ours | changes).items() if value is not None}


def execute(command, server, tmp_path, **changes):
    """Run a command against the server. Nothing that it prints or writes may hold the token."""
    before = holding_the_token(tmp_path)
    python, *words = command
    assert python == sys.executable
    done = run_command(words, ROOT, environment(server, tmp_path, **changes))
    assert TOKEN not in done.stdout + done.stderr
    assert holding_the_token(tmp_path) == before
    return done


def holding_the_token(folder):
    return [file for file in files_below(folder) if TOKEN.encode() in file.read_bytes()]


def files_below(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def push(run, server, tmp_path, *options, repo_id=REPO, **changes):
    before = {file: sha256_file(file) for file in files_below(run)}
    command = [sys.executable, "-m", "posttrain.hub", str(run), "--repo-id", repo_id, *map(str, options)]
    done = execute(command, server, tmp_path, **changes)
    assert {file: sha256_file(file) for file in files_below(run)} == before, "a push may not touch the run"
    assert "Traceback" not in done.stderr
    return done


def readme(server, repo_id=REPO):
    return server.repos[repo_id].files["README.md"].decode()


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_exactly_the_named_files_are_sent_in_one_commit(run_dir, server, tmp_path):
    done = push(run_dir, server, tmp_path)
    repo = server.repos[REPO]
    assert (done.returncode, done.stdout) == (0, f"{server.url}/{REPO}\n")
    assert set(repo.files) == PUBLISHED
    assert repo.private
    assert len(repo.commits) == 1
    for name in PUBLISHED - {"README.md", "training_manifest.json", "lineage.json", "prompt.json", ".gitattributes"}:
        assert repo.files[name] == (run_dir / "adapter" / name).read_bytes()
    assert b"decoy" not in server.received


def test_the_same_command_again_changes_nothing(run_dir, server, tmp_path):
    push(run_dir, server, tmp_path)
    before = dict(server.repos[REPO].files)
    done = push(run_dir, server, tmp_path)
    assert (done.returncode, server.repos[REPO].files, len(server.repos[REPO].commits)) == (0, before, 1)
    assert sum(request.startswith("PUT") for request in server.log) == 1


def test_another_adapter_replaces_the_first(runs, server, tmp_path):
    push(runs / "sft_run", server, tmp_path)
    push(runs / "grpo_run", server, tmp_path)
    weights = server.repos[REPO].files["adapter_model.safetensors"]
    assert weights == (runs / "grpo_run/adapter/adapter_model.safetensors").read_bytes()
    assert len(server.repos[REPO].commits) == 2


def test_a_push_between_look_and_commit_is_looked_at_again(runs, server, tmp_path):
    """Another push of another run at once: a repository never holds parts of both."""
    push(runs / "sft_run", server, tmp_path)
    look = server.url and type(server).next_fault

    def meanwhile(self, request):
        if request.startswith("POST") and request.endswith("/commit/main") and "late.txt" not in self.repos[REPO].files:
            self.repos[REPO].files["late.txt"] = b"of another push"
        return look(self, request)

    type(server).next_fault = meanwhile
    try:
        done = push(runs / "grpo_run", server, tmp_path)
    finally:
        type(server).next_fault = look
    assert done.returncode == 0, done.stderr
    assert sum("/commit/main" in request for request in server.log) == 3


def test_public_only_when_asked_for(run_dir, server, tmp_path):
    assert push(run_dir, server, tmp_path, "--public").returncode == 0
    assert not server.repos[REPO].private
    done = push(run_dir, server, tmp_path, "--private")
    assert done.returncode == 2
    assert "there already and public" in done.stderr


def test_the_manifest_says_what_was_done_and_not_where(run_dir, server, tmp_path):
    push(run_dir, server, tmp_path)
    text = server.repos[REPO].files["training_manifest.json"].decode()
    manifest, local = json.loads(text), json.loads((run_dir / "manifest.json").read_text())
    for key in ("adapter_sha256", "config_sha256", "commit", "versions", "hardware", "seed", "seconds"):
        assert manifest[key] == local[key]
    assert manifest["command"] == "python grpo_train.py --config grpo.yaml adapter=runs/sft_run seed=7 x=***"
    assert manifest["chain"][0]["adapter_sha256"] == local["parent"]["adapter_sha256"]
    for published in (text, readme(server)):
        assert not re.search(r"""["' =](/|~)\w""", published)
        assert str(tmp_path) not in published
        assert "/home/" not in published


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/models/llama", "llama"),
        ("python /opt/x/sft_train.py --config=/home/ann/c.yaml a=1", "python sft_train.py --config=c.yaml a=1"),
        ("'/home/ann/my runs/x'", "'my runs/x'"),
        ("~/x/y.yaml ~ann/z ../../ann/q", "y.yaml z q"),
        ("file:///home/ann/data", "data"),
        ("data/gsm8k runs/a/adapter ./configs/x.yaml", "data/gsm8k runs/a/adapter ./configs/x.yaml"),
        ("meta-llama/Llama-3.2-3B https://huggingface.co/a/b", "meta-llama/Llama-3.2-3B https://huggingface.co/a/b"),
        ("https://ann:pass@hub.example/a", "https://***@hub.example/a"),
        ("48/2 = 24 tok/s, and/or </s> <|eot_id|> N/A", "48/2 = 24 tok/s, and/or </s> <|eot_id|> N/A"),
        ({"a": ["/x/y", 1, None, True]}, {"a": ["y", 1, None, True]}),
    ],
)
def test_paths_of_this_machine_are_cut(text, shown):
    assert portable(text) == shown


def test_secrets_of_the_environment_are_blotted(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert portable(f"x={TOKEN} 0123456789abcdef false") == "x=*** *** false"


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(run_dir, server, tmp_path):
    push(run_dir, server, tmp_path)
    data, text = ModelCard(readme(server)).data, readme(server)
    assert (data.base_model, data.library_name, data.pipeline_tag) == (BASE, "peft", "text-generation")
    assert set(data.tags) >= {"lora", "grpo"}
    assert data.get("license") is None  # unknown family: nothing is claimed
    assert "Chain: base -> SFT -> GRPO." in text
    assert "sft_train.py --config configs/sft_llama3.2-3b.yaml data.path=gsm8k\npython grpo_train.py" in text
    assert json.loads((run_dir / "manifest.json").read_text())["commit"] in text
    assert "Not evaluated" in text


def test_the_cards_python_loads_the_adapter_from_the_hub(runs, server, tmp_path, tiny_model_dir):
    """The code block of the published card, unchanged, in a process of its own, with nothing but the Hub."""
    server.create(BASE, files={file.name: file.read_bytes() for file in tiny_model_dir.iterdir()})
    push(runs / "grpo_run", server, tmp_path)
    assert_same_policy(loaded_by_card(server, tmp_path), tiny_model_dir, runs / "grpo_run/adapter")


@pytest.mark.slow
def test_an_adapter_of_the_hub_comes_with_the_template_it_was_trained_in(runs, server, tmp_path):
    """`check_same_template` looks for it beside the weights."""
    push(runs / "grpo_run", server, tmp_path)
    code = f"from posttrain.models.adapters import resolve_adapter as get; print(*(f.name for f in get('{REPO}').iterdir()))"
    done = execute([sys.executable, "-c", code], server, tmp_path)
    assert set(done.stdout.split()) == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}, done.stderr


def loaded_by_card(server, tmp_path):
    """Runs the card's code; the logits of its model after its prompt, which it answers with at least one token."""
    code = re.search(r"```python\n(.*?)```", readme(server), re.DOTALL)[1]
    code += "\nassert output.shape[1] > inputs['input_ids'].shape[1]"
    code += "\nprint('LOGITS', model(**inputs).logits[0, -1].tolist())"
    done = execute([sys.executable, "-c", code], server, tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("LOGITS ")[1])


def assert_same_policy(logits, base_dir, adapter_dir):
    """These logits are those of base and adapter as the project itself loads them, up to the rounding of bf16."""
    import torch

    from posttrain.models import adapters
    from posttrain.models.base import load_base
    from posttrain.models.chat import chat_ids, load_tokenizer
    from posttrain.models.policy_copy import PolicyCopy

    settings = Model(name_or_path=str(base_dir))
    tokenizer = load_tokenizer(settings)
    prompt = chat_ids(tokenizer, [{"role": "user", "content": "..."}], add_generation_prompt=True)
    base = load_base(settings, "none", tokenizer)
    alone = base(torch.tensor([prompt])).logits[0, -1].float()
    model = PolicyCopy(adapters.load_adapter(base, adapter_dir, trainable=False)).refresh()
    ours, published = model(torch.tensor([prompt])).logits[0, -1].float(), torch.tensor(logits)
    assert (published - ours).abs().mean() < 0.1 * (published - alone).abs().mean()


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, [f'from_pretrained("{BASE}", dtype=torch.bfloat16)'], ["BitsAndBytes", "revision="]),
        ({"quantization": "nf4"}, ["AutoTokenizer, BitsAndBytesConfig", 'quant_type="nf4"', "quantization_config=nf4)"], []),
        ({"revision": "abc"}, [f'from_pretrained("{BASE}", revision="abc", dtype='], []),
        ({"hub_id": None, "revision": "abc"}, ['from_pretrained("PATH_OF_THE_BASE", dtype='], ["abc"]),
        ({"merged": Path("m"), "quantization": "nf4"}, ['snapshot_download(adapter) + "/merged_base", dtype='], ["BitsAnd"]),
    ],
    ids=["16 bits", "NF4", "a revision", "a folder", "merged"],
)
def test_the_cards_python_fits_the_base(runs, changes, said, unsaid):
    release = read_release(Request(runs / "grpo_run", REPO))
    text = model_card(replace(release, base=replace(release.base, **changes)))
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "the card", "exec")
    assert all(part in code for part in said) and not any(part in code for part in unsaid)


@pytest.mark.parametrize(
    ("changes", "said"), [({}, ""), ({"num_processes": 2, "launcher": "torchrun"}, "2 processes by torchrun, ")]
)
def test_the_card_says_of_how_many_processes_a_run_was(runs, changes, said):
    release = read_release(Request(runs / "grpo_run", REPO))
    text = model_card(replace(release, manifest=replace(release.manifest, **changes)))
    assert re.findall(r"cores of .*?, (.*)torch \d", text) == [said]


def test_what_a_run_says_is_never_taken_for_the_template(runs):
    release = read_release(Request(runs / "grpo_run", REPO))
    text = model_card(replace(release, manifest=replace(release.manifest, name="{{ seed }} {% if %} {# #} <b>")))
    assert "\n- grpo `{{ seed }} {% if %} {# #} <b>`: adapter `" in text


def test_a_base_from_a_folder_is_named_only_when_its_id_is_given(runs, server, tmp_path):
    push(runs / "local_run", server, tmp_path)
    files = server.repos[REPO].files
    assert ModelCard(readme(server)).data.base_model is None
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    push(runs / "local_run", server, tmp_path, "--base-model", BASE)
    assert ModelCard(readme(server)).data.base_model == BASE
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    local = json.loads((runs / "local_run/adapter/adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == local | {"base_model_name_or_path": BASE}


def test_what_the_llama_licence_asks_for(runs, server, tmp_path):
    llama = ("--base-model", "meta-llama/Llama-3.2-1B")
    assert "begins with Llama" in push(runs / "local_run", server, tmp_path, *llama, repo_id="me/solver").stderr
    assert "begins with Llama" not in push(runs / "local_run", server, tmp_path, *llama).stderr
    assert ModelCard(readme(server)).data.license == "llama3.2"
    assert "Built with Llama." in readme(server)
    done = push(runs / "sft_run", server, tmp_path, *llama)
    assert (done.returncode, f"trained on {BASE}" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("meta-llama/Llama-3.2-3B", "llama3.2"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("models/smollm2-135m-instruct", "apache-2.0"),
        ("HuggingFaceTB/SmolLM2-1.7B", "apache-2.0"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-3B", None),
        ("Qwen/Qwen2.5-Math-72B", None),
        ("Qwen/Qwen3-4B", "apache-2.0"),
        ("me/mystery-1b", None),
    ],
)
def test_license_follows_the_family_of_the_base(name, license):
    assert Base(name, None, None, "none", None).license == license


def test_gsm8k_scores_are_those_of_the_evaluation(runs, server, tmp_path, gsm8k_dir):
    run_dir = runs / "grpo_run"
    questions = [json.loads(line)["question"] for line in (gsm8k_dir / "test.jsonl").open(encoding="utf-8")]
    folder = evaluation(tmp_path / "eval_gsm8k", run_dir, questions, right=601)
    assert push(run_dir, server, tmp_path, "--eval", folder).returncode == 0
    assert set(server.repos[REPO].files) == PUBLISHED | {".eval_results/gsm8k.yaml"}
    [entry] = YAML(typ="safe").load(server.repos[REPO].files[".eval_results/gsm8k.yaml"])
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"}
    assert entry["value"] == pytest.approx(601 / 1319, abs=1e-6)
    assert "0.4289-0.4826" in entry["notes"]
    [result] = ModelCard(readme(server)).data.eval_results
    assert (result.dataset_type, result.metric_value) == ("openai/gsm8k", entry["value"])
    assert "| this adapter | gsm8k (test) | 1,319 | 45.56% [42.89%, 48.26%] |" in readme(server)
    assert json.loads((folder / "manifest.json").read_text())["command"] in readme(server)
    # Another adapter under the same name takes the score of the first one away.
    assert push(runs / "sft_run", server, tmp_path).returncode == 0
    assert set(server.repos[REPO].files) == PUBLISHED


@pytest.mark.parametrize("change", ["one question less", "another question", "other data"])
def test_only_all_of_gsm8ks_test_questions_are_a_gsm8k_score(runs, server, tmp_path, gsm8k_dir, change):
    questions = [json.loads(line)["question"] for line in (gsm8k_dir / "test.jsonl").open(encoding="utf-8")]
    questions = {
        "one question less": questions[1:],
        "another question": ["2+2?", *questions[1:]],
        "other data": [f"{i}+{i}?" for i in range(1319)],
    }[change]
    folder = evaluation(tmp_path / "eval", runs / "sft_run", questions, right=10)
    assert push(runs / "sft_run", server, tmp_path, "--eval", folder).returncode == 0
    assert ".eval_results/gsm8k.yaml" not in server.repos[REPO].files
    assert ModelCard(readme(server)).data.eval_results is None
    assert f"| {len(questions):,} |" in readme(server)


def test_evaluations_along_the_chain_are_rows_of_one_table(runs, server, tmp_path):
    questions = [f"{i}+{i}?" for i in range(50)]
    grpo = runs / "grpo_run"
    sft = evaluation(tmp_path / "eval_sft", runs / "sft_run", questions, right=20)
    best = evaluation(tmp_path / "eval_grpo", grpo, questions, right=30)
    base = evaluation(tmp_path / "eval_base", grpo, questions, right=2, adapter_sha256=None)
    assert push(grpo, server, tmp_path, "--eval", base, sft, best).returncode == 0
    assert re.findall(r"\| (base|sft \(sft_run\)|this adapter) \|.*? (\d+\.\d+)% \[", readme(server)) == [
        ("base", "4.00"), ("sft (sft_run)", "40.00"), ("this adapter", "60.00"),
    ]  # fmt: skip
    assert "first" not in readme(server)


def test_an_evaluation_of_a_merged_folder_is_called_one(runs, server, tmp_path):
    """evaluate.py gives it the folder's own hash, and the adapter as its parent."""
    grpo, questions = runs / "grpo_run", [f"{i}+{i}?" for i in range(50)]

    def of_folder(name, made_of):
        sha256 = json.loads((runs / made_of / "manifest.json").read_text())["adapter_sha256"]
        model = {"name_or_path": f"/x/{name}", "quantization": "none"}
        said = {"adapter_sha256": "e" * 64, "parent": {"run_dir": made_of, "adapter_sha256": sha256}, "model": model}
        return evaluation(tmp_path / name, grpo, questions, right=20, **said)

    done = push(grpo, server, tmp_path, "--eval", of_folder("merged-original", "grpo_run"), of_folder("merged", "sft_run"))
    assert done.returncode == 0, done.stderr
    assert "| this adapter, as the folder merged-original |" in readme(server)
    assert "| sft (sft_run), as the folder merged |" in readme(server)
    stranger = evaluation(
        tmp_path / "other", grpo, questions, right=1, adapter_sha256="e" * 64, parent={"adapter_sha256": "d" * 64}
    )
    assert "neither this adapter nor one it grew from" in push(grpo, server, tmp_path, "--eval", stranger).stderr


def test_a_subset_is_called_one(runs, server, tmp_path):
    folder = evaluation(tmp_path / "eval", runs / "sft_run", [f"{i}?" for i in range(20)], right=5)
    results = json.loads((folder / "results.json").read_text()) | {"subset": "first 20 of 1,319"}
    (folder / "results.json").write_text(json.dumps(results))
    push(runs / "sft_run", server, tmp_path, "--eval", folder)
    assert "gsm8k (test, first 20 of 1,319)" in readme(server)
    assert ModelCard(readme(server)).data.eval_results is None


# --- variants, predictions, and what a download can prove ----------------------------------------------------------


def test_variants_are_folders_of_one_repository_in_one_commit(runs, artefacts, server, tmp_path):
    done = push(runs / "grpo_run", server, tmp_path, "--with", *artefacts)
    repo = server.repos[REPO]
    assert (done.returncode, len(repo.commits), set(repo.files)) == (0, 1, PUBLISHED | VARIANTS), done.stderr
    assert b"decoy" not in server.received and str(tmp_path).encode() not in repo.files["merged/export.json"]
    assert "| gguf-q8_0 | gguf q8_0 trained | 0.0 MB | 1e-05 | 99.90% | 98.0% | the same but for rounding" in readme(server)
    assert 'allow_patterns="merged/*"' in readme(server) and "llama-server -m llama-gsm8k/gguf-q8_0/model-q8_0.gguf" in readme(
        server
    )
    assert push(runs / "grpo_run", server, tmp_path, "--with", *artefacts).returncode == 0 and len(repo.commits) == 1
    # A push that does not name them is of no variant: theirs may be of another adapter.
    done = push(runs / "grpo_run", server, tmp_path)
    assert (set(repo.files), done.stderr.count("takes it away")) == (PUBLISHED, 2)


def drop(name):
    return lambda folder: (folder / name).unlink()


def spoil(name, content=b"other"):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


def of_another(folder):
    made = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(made | {"parent": {"run_dir": "x", "adapter_sha256": "f" * 64}}))


def with_secret(folder):
    (folder / "model-q8_0.gguf").write_bytes(b"GGUF" * 999 + TOKEN.encode())
    made = json.loads((folder / "export.json").read_text())
    made["files"]["model-q8_0.gguf"]["sha256"] = sha256_file(folder / "model-q8_0.gguf")
    (folder / "export.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("model-q8_0.gguf"), "is missing or not what was exported"),
        (drop("fidelity.json"), "is missing or not what was exported"),
        (drop("export.json"), "holds no artefact"),
        (spoil("export.json", b"{}"), "is not that of an artefact"),
        (of_another, "was made of adapter ffffffffffff"),
        (with_secret, "would publish a secret"),
        (lambda folder: folder.rename(folder.with_name("a b")), "cannot be a folder of the repository under that name"),
    ],
    ids=["changed", "lost", "no artefact", "no record", "of another adapter", "a token inside", "its name"],
)
def test_an_artefact_that_is_not_what_was_exported_is_refused(runs, artefacts, tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(artefacts[1], tmp_path / "made/gguf")
    change(folder)
    with pytest.raises(UserError, match=message):
        variants = tuple((tmp_path / "made").iterdir())
        refuse_private_text(all_files(read_release(Request(runs / "grpo_run", REPO, variants=variants))))


def test_two_artefacts_of_one_name_are_refused(runs, artefacts):
    with pytest.raises(UserError, match="two artefacts are called merged"):
        read_release(Request(runs / "grpo_run", REPO, variants=(artefacts[0], artefacts[0])))


def evaluated_twice(runs, tmp_path, num=50):
    questions, grpo = [f"{i}+{i}?" for i in range(num)], runs / "grpo_run"
    return (
        evaluation(tmp_path / "eval_sft", runs / "sft_run", questions, right=10),
        evaluation(tmp_path / "eval_grpo", grpo, questions, right=30),
    )


@pytest.mark.parametrize(
    "fault",
    [
        None,
        pytest.param("POST /api/models/dataset:.*/commit/", marks=pytest.mark.slow),
        pytest.param("POST /api/models/me/.*/commit/", marks=pytest.mark.slow),
    ],
)
def test_predictions_are_a_data_set_of_their_own(runs, server, tmp_path, fault):
    """Whichever of the two commits fails, the same command ends with one commit in each repository."""
    folders = evaluated_twice(runs, tmp_path)
    options = ("--eval", *folders, "--predictions")
    if fault:
        server.fail(fault, "reset")
        assert push(runs / "grpo_run", server, tmp_path, *options).returncode == 75
    done = push(runs / "grpo_run", server, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    repo, data = server.repos[REPO], server.repos[f"dataset:{REPO}-predictions"]
    assert (len(repo.commits), len(data.commits), data.private) == (1, 1, True)
    assert set(data.files) == {"eval_sft.jsonl", "eval_grpo.jsonl", "README.md", ".gitattributes"}
    rows = [json.loads(line) for line in data.files["eval_grpo.jsonl"].decode().splitlines()]
    assert sum(row["correct"] for row in rows) == 30 and rows[3]["question"] == "3+3?" and rows[3]["completion"] == "#### 72"
    front = YAML(typ="safe").load(data.files["README.md"].decode().split("---")[1])
    assert [config["data_files"][0]["path"] for config in front["configs"]] == ["eval_sft.jsonl", "eval_grpo.jsonl"]
    assert "license" not in front and "Training on them makes every later score" in data.files["README.md"].decode()
    assert f"https://huggingface.co/datasets/{REPO}-predictions" in readme(server)


def test_predictions_without_an_evaluation_are_refused(run_dir, server, tmp_path):
    done = push(run_dir, server, tmp_path, "--predictions")
    assert (done.returncode, "name them with --eval" in done.stderr, server.log) == (2, True, [])


def test_two_evaluations_of_one_name_are_no_data_set(runs, server, tmp_path):
    twice = [evaluation(tmp_path / place / "eval", runs / "grpo_run", ["1?"], right=1) for place in ("one", "two")]
    done = push(runs / "grpo_run", server, tmp_path, "--predictions", "--eval", *twice)
    assert (done.returncode, server.log) == (2, []) and "two evaluations are called eval" in done.stderr


def test_the_card_has_paired_tests_limits_and_the_whole_chain(runs, tmp_path):
    text = model_card(read_release(Request(runs / "grpo_run", REPO, evals=evaluated_twice(runs, tmp_path))))
    manifest = json.loads((runs / "grpo_run/manifest.json").read_text())
    assert "- this adapter is 40.00 points above sft (sft_run) (20.00 % -> 60.00 %, n = 50," in text and "exact McNemar p" in text
    assert "## Limits" in text and "Nothing was trained or measured for safety" in text
    for link in (*manifest["chain"], manifest):
        assert f"adapter `{link['adapter_sha256']}`, of tiny train `{link['data']['sha256'][:12]}`" in text
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 4 --lora-modules llama-gsm8k={REPO}" in text


@pytest.fixture(scope="module")
def download(runs, artefacts, tmp_path_factory):
    """What `hf download` leaves of a push, as all_files sends it. Never written to."""
    folder = tmp_path_factory.mktemp("download") / "llama-gsm8k"
    for name, content in all_files(read_release(Request(runs / "grpo_run", REPO, variants=artefacts))).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def states(folder):
    return {link.stage: (link.state, link.why) for link in lineage_of(folder)}


def test_a_download_proves_its_chain(download):
    found = states(download)
    assert list(found) == ["base", "sft", "grpo", "gguf-q8_0", "merged"]
    assert [state for state, _ in found.values()] == ["unchecked", "unchecked", "whole", "whole", "whole"]
    assert "its weights are not here" in found["sft"][1]
    assert list(states(download / "merged")) == ["base", "sft", "grpo", "merged"]  # one of its folders alone


def test_a_variant_without_its_repository_has_its_own_record_alone(download, tmp_path):
    shutil.copytree(download / "merged", tmp_path / "merged")
    found = states(tmp_path / "merged")
    assert found["merged"][0] == "whole" and found["sft"] == found["grpo"] == (
        "unchecked",
        "only the artefact's own record says so",
    )


def other_byte(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 64
        (folder / name).write_bytes(bytes(content))

    return change


def told(name, change):
    def rewrite(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return rewrite


OTHER = "e" * 64
BROKEN = {
    "weights": (other_byte("adapter_model.safetensors"), "grpo", "its weights are others"),
    "alpha": (told("adapter_config.json", lambda v: v.update(lora_alpha=99)), "grpo", "adapter_config.json has changed since"),
    "template": (other_byte("chat_template.jinja"), "grpo", "chat_template.jinja has changed since"),
    "its record": (told("training_manifest.json", lambda v: v.update(adapter_sha256=OTHER)), "grpo", "its weights are others"),
    "its parent": (
        told("training_manifest.json", lambda v: v["parent"].update(adapter_sha256=OTHER)), "grpo", "two different adapters",
    ),
    "the run before": (
        told("lineage.json", lambda v: v["runs"][0].update(adapter_sha256=OTHER)), "grpo", "and sft_run holds eeeeeeeeeeee",
    ),
    "merged weights": (other_byte("merged/model.safetensors"), "merged", "model.safetensors has changed since"),
    "of another": (
        told("merged/export.json", lambda v: v["parent"].update(adapter_sha256=OTHER)), "merged", "made of adapter eeeeeeeeeeee",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "stage", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_link_is_named(download, tmp_path, change, stage, why):
    folder = shutil.copytree(download, tmp_path / "down")
    change(folder)
    state, said = states(folder)[stage]
    assert (state, why in said) == ("broken", True), said


def test_a_download_answers_as_the_run_does(runs, tmp_path, tiny_model_dir):
    question = ("How many apples are there in 3 bags of 4?", "--max-new-tokens", "8")
    folder = tmp_path / "down"
    folder.mkdir()
    for name, content in all_files(read_release(Request(runs / "local_run", REPO))).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    manifest, weights = folder / "training_manifest.json", weights_hash(Model(name_or_path=str(tiny_model_dir)))
    record = json.loads(manifest.read_text())
    there, here = run("posttrain.chat.command", runs / "local_run", *question), run("posttrain.chat.command", folder, *question)
    assert (there.code, here.code) == (0, 2) and "name it with --base" in here.err
    here = run("posttrain.chat.command", folder, "--base", tiny_model_dir, *question)
    assert here.out.split("\n", 1)[1] == there.out.split("\n", 1)[1]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/tiny-base"}))
    for recorded, code in ((weights, 0), ("e" * 16, 2)):  # under another name, the hash of the base decides
        manifest.write_text(json.dumps(record | {"model": record["model"] | {"weights": recorded}}))
        assert run("posttrain.chat.command", folder, "--base", tiny_model_dir, *question).code == code


# --- the card beside the run's own files ----------------------------------------------------------------------------


def test_a_finished_adapter_says_what_it_is_and_where_its_base_lies(sft, tiny_model_dir):
    folder, manifest = sft / "adapter", json.loads((sft / "manifest.json").read_text())
    text, config = (folder / "README.md").read_text(), json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_model_dir), None)
    assert all(hash in text for hash in (manifest["model"]["weights"], manifest["model"]["fingerprint"]))
    assert manifest["adapter_sha256"][:12] in text and "More Information Needed" not in text
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f'adapter = "{folder}"' in code and f'from_pretrained("{tiny_model_dir}"' in code
    assert "README.md" not in manifest["adapter_files"]  # users write their own over it


def test_a_checkpoint_has_a_card_that_is_part_of_it(tiny):
    from posttrain.runs.integrity import damage

    with tiny.sft({"save_strategy": "steps", "save_steps": 1}) as trainer:
        trainer.keep_in(trainer.run)
        trainer.train()
        folder = trainer.run.folder / "checkpoints" / "checkpoint-1"
    text = (folder / "README.md").read_text()
    assert str(folder) in text and "supervised fine-tuning" in text and damage(folder) is None
    (folder / "README.md").write_text("other")
    assert "README.md" in damage(folder)


def test_a_base_of_the_hub_is_named_with_the_commit_that_was_loaded(tmp_path, load, tokenizer):
    from posttrain.config.schema import Lora
    from posttrain.models.adapters import load_adapter, new_adapter

    def base():
        model = load()
        model.name_or_path = model.config._name_or_path = "me/tiny-base"
        model.config._commit_hash = "a" * 40
        return model

    model = new_adapter(base(), Lora(r=2, alpha=2, target_modules=["q_proj"]), tokenizer, 0)
    model.save_pretrained(tmp_path)
    for loaded in (model, load_adapter(base(), tmp_path, trainable=True)):
        loaded.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny-base", "a" * 40)


# --- an adapter on a merged base --------------------------------------------------------------------------------------


def test_an_adapter_on_a_merged_base_goes_with_its_base(runs, server, tmp_path):
    merged = runs / "merged_run"
    done = push(merged, server, tmp_path)
    assert (done.returncode, server.log) == (2, [])
    assert "add --with-base" in done.stderr
    assert push(merged, server, tmp_path, "--with-base").returncode == 0
    files = server.repos[REPO].files
    base = {"config.json", "generation_config.json", "model.safetensors"}
    names = {*base, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == PUBLISHED | {f"merged_base/{name}" for name in names}
    assert "does not fit the original base" in readme(server)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert_same_policy(loaded_by_card(server, tmp_path), merged / "merged_base", merged / "adapter")


# --- refused before anything is sent ----------------------------------------------------------------------------------


def change_manifest(**values):
    def change(run):
        file = run / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def append(name, text):
    return lambda run: (run / name).write_text((run / name).read_text() + text)


def other_weights(run):
    file = run / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(bytes(content))


REFUSED = {
    "no run": (lambda run: shutil.rmtree(run), "holds no run"),
    "an interrupted run": (change_manifest(exit="running"), r"is not finished \(running\)"),
    "a failed run": (change_manifest(exit="failed: OutOfMemoryError"), "--resume"),
    "an evaluation": (change_manifest(stage="eval"), "which has no adapter: give one of sft_train.py or grpo_train.py"),
    "only a pickle": (drop("adapter/adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "no adapter config": (drop("adapter/adapter_config.json"), "has no adapter_config.json"),
    "weights of another run": (other_weights, "is not what .* finished with"),
    "a token in a file": (append("adapter/chat_template.jinja", f"{{# {TOKEN} #}}"), "would publish a token"),
    "a path in a file": (append("adapter/chat_template.jinja", f"{{# {Path.home()}/x #}}"), "would publish a path"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_sent(run_dir, server, tmp_path, change, message):
    change(run_dir)
    done = push(run_dir, server, tmp_path)
    assert (done.returncode, server.log, done.stdout) == (2, [], "")
    assert re.search(message, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("repo_id", ["model", "me/a/b", "./runs/x", "/tmp/x"])
def test_a_repository_that_cannot_be_one_is_refused(run_dir, server, tmp_path, repo_id):
    done = push(run_dir, server, tmp_path, repo_id=repo_id)
    assert (done.returncode, server.log) == (2, [])
    assert "OWNER/NAME" in done.stderr


def test_numbers_of_another_adapter_are_refused(runs, server, tmp_path):
    folder = evaluation(tmp_path / "eval", runs / "grpo_run", ["1?"], right=1)
    sft = runs / "sft_run"
    assert "neither this adapter nor one it grew from" in push(sft, server, tmp_path, "--eval", folder).stderr
    stranger = {"adapter_sha256": None, "model": {"name_or_path": "another/base"}}
    base = evaluation(tmp_path / "base", sft, ["1?"], right=1, **stranger)
    assert push(sft, server, tmp_path, "--eval", base).returncode == 2
    unfinished = evaluation(tmp_path / "half", sft, ["1?"], right=1, exit="running")
    assert "is not finished" in push(sft, server, tmp_path, "--eval", unfinished).stderr
    assert "no finished evaluation" in push(sft, server, tmp_path, "--eval", tmp_path).stderr
    assert server.log == []


# --- failures of the Hub ----------------------------------------------------------------------------------------------

CREATE, PREUPLOAD, COMMIT = "POST /api/repos/create", "POST .*/preupload/", "POST .*/commit/"
GATED = {"headers": {"X-Error-Code": "GatedRepo"}}
FAILURES = {
    "token refused": ([CREATE, 401], 2, "does not accept the token.*hf auth login.*HF_TOKEN"),
    "may not create": ([CREATE, 403], 2, "may not write to me/llama-gsm8k.*write access to me"),
    "may not write": ([COMMIT, 403], 2, "may not write to me/llama-gsm8k"),
    "gated": ([PREUPLOAD, 403, GATED], 2, "gated: accept its terms at https://huggingface.co/me/llama-gsm8k"),
    "gone": ([PREUPLOAD, 404, {"headers": {"X-Error-Code": "RepoNotFound"}}], 2, "not there or hidden"),
    "bad card": (["POST /api/validate-yaml", 400, {"text": "license is unknown"}], 2, "refuses it"),
    "quota": ([COMMIT, 402, {"text": "Private storage is full"}], 2, r"status 402 \(Private storage is full\)"),
    "down at the start": ([CREATE, 500], 75, "status 500"),
    "down at the end": ([COMMIT, 503, {"text": "maintenance"}], 75, r"status 503 \(maintenance\)"),
    "busy": ([COMMIT, 429], 75, "status 429"),
    "commit race": ([COMMIT, 412], 75, "status 412"),
    "cut off in the commit": ([COMMIT, "reset"], 75, "connection to the Hub broke"),
    "commit done, response lost": ([COMMIT, "lose the response"], 75, "connection to the Hub broke"),
    "cut off at the start": ([CREATE, "reset"], 75, "connection to the Hub broke"),
}


@pytest.mark.parametrize(("fault", "code", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_one_line_and_the_next_try_succeeds(run_dir, artefacts, server, tmp_path, fault, code, message):
    pattern, action, details = [*fault, {}][:3]
    server.fail(pattern, action, **details)
    done = push(run_dir, server, tmp_path, "--with", *artefacts)
    [line] = [text for text in done.stderr.splitlines() if text.startswith("hub: ")]
    assert (done.returncode, done.stdout) == (code, "")
    assert re.search(message, line)
    assert ("try again with" in line) == (code == 75)
    again = shlex.split(line.split("try again with: ")[1]) if code == 75 else None
    if again:
        retried = execute([sys.executable, *again[1:]], server, tmp_path)
    else:
        retried = push(run_dir, server, tmp_path, "--with", *artefacts)
    assert retried.returncode == 0, retried.stderr
    assert set(server.repos[REPO].files) == PUBLISHED | VARIANTS
    assert len(server.repos[REPO].commits) == 1
    weights = server.repos[REPO].files["adapter_model.safetensors"]
    assert hashlib.sha256(weights).hexdigest() == sha256_file(run_dir / "adapter/adapter_model.safetensors")


PASSING = {
    "errors before the upload": [PREUPLOAD, 500, 2],
    "busy before the upload": [PREUPLOAD, 429, 1],
    "errors of the storage": ["PUT /blobs/", 503, 2],
    "cut off in a file": ["PUT /blobs/", "reset", 1],
    "file kept, response lost": ["PUT /blobs/", "lose the response", 1],
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_passing_failure_is_waited_out(run_dir, artefacts, server, tmp_path, fault):
    pattern, action, times = fault
    server.fail(pattern, action, times=times)
    assert push(run_dir, server, tmp_path, "--with", *artefacts).returncode == 0
    large = 3 if "blobs" in pattern else 1  # weights of the adapter, of the merged model, and the GGUF
    assert sum(re.match(pattern, request) is not None for request in server.log) == times + large
    assert set(server.repos[REPO].files) == PUBLISHED | VARIANTS
    assert len(server.repos[REPO].commits) == 1


def test_no_network_no_token_offline(run_dir, tmp_path):
    done = push(run_dir, None, tmp_path)
    assert (done.returncode, "check the network" in done.stderr) == (75, True)
    done = push(run_dir, None, tmp_path, HF_TOKEN=None)
    assert (done.returncode, "hf auth login" in done.stderr) == (2, True)
    done = push(run_dir, None, tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, "unset it" in done.stderr) == (2, True)


# --- at the end of training -------------------------------------------------------------------------------------------

AT_THE_END = "import sys, pathlib, posttrain.hub.push as hub; hub.push_or_explain(pathlib.Path(sys.argv[1]), sys.argv[2], True)"


def end_training(run, server, tmp_path, repo_id=REPO):
    return execute([sys.executable, "-c", AT_THE_END, str(run), repo_id], server, tmp_path)


@pytest.mark.parametrize("action", [None, 401, 403, 500, "reset"])
def test_a_training_run_stays_finished_and_says_how_to_push_it(run_dir, server, tmp_path, action):
    if action:
        server.fail(CREATE, action)
    before = {file: sha256_file(file) for file in files_below(run_dir)}
    done = end_training(run_dir, server, tmp_path)
    assert done.returncode == 0
    assert {file: sha256_file(file) for file in files_below(run_dir)} == before
    if action is None:
        assert done.stdout == f"pushed to {server.url}/{REPO}\n"
        return
    reason, again = done.stderr.strip().splitlines()[-2:]
    assert reason.startswith("hub: not pushed: ")
    command = shlex.split(again.split("push it with: ")[1])
    assert command[0] == "python"
    assert execute([sys.executable, *command[1:]], server, tmp_path).returncode == 0
    assert set(server.repos[REPO].files) == PUBLISHED


@pytest.mark.parametrize("repo_id", ["not an id", REPO])
def test_nothing_at_all_is_raised(run_dir, server, tmp_path, repo_id):
    (run_dir / "config.yaml").write_bytes(b"\xff{")
    assert end_training(run_dir, server, tmp_path, repo_id).returncode == 0
    shutil.rmtree(run_dir)
    done = end_training(run_dir, server, tmp_path, repo_id)
    assert (done.returncode, "push it with" in done.stderr) == (0, True)


def test_after_merge_and_new_the_command_pushes_the_base_too(runs, server, tmp_path):
    done = end_training(runs / "merged_run", server, tmp_path)
    command = shlex.split(done.stderr.split("push it with: ")[1])
    assert command[-1] == "--with-base"
    assert execute([sys.executable, *command[1:]], server, tmp_path).returncode == 0
    assert "merged_base/model.safetensors" in server.repos[REPO].files


def test_the_quick_hash_is_the_adapters_identity(runs):
    from posttrain.models.adapters import adapter_sha256
    from posttrain.runs.integrity import weights_sha256

    folder = runs / "grpo_run/adapter"
    assert weights_sha256(folder / "adapter_model.safetensors") == adapter_sha256(folder)
