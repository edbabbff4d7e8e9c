"""Every YAML in configs/: it loads, its commands parse, it fits its neighbours, TRL accepts its trainer."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from posttrain.config.load import from_command_line, load
from posttrain.config.schema import DataConfig, EvalConfig, GrpoConfig, Settings, SftConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS: dict[str, type[Settings]] = {
    "data": DataConfig,
    "sft": SftConfig,
    "grpo": GrpoConfig,
    "eval": EvalConfig,
}
SCRIPTS: dict[str, type[Settings]] = {
    "data_prep.py": DataConfig,
    "sft_train.py": SftConfig,
    "grpo_train.py": GrpoConfig,
    "evaluate.py": EvalConfig,
}
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))
STAGES = [file for file in FILES if not file.startswith("configs/accelerate/")]
RECOMMENDED = [file for file in STAGES if "/recommended/" in file]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@functools.cache  # settings are frozen
def config(file: str, *overrides: str) -> Any:
    return load(file, overrides, SCHEMAS[Path(file).name.split("_")[0]])


def all_of(cls: type[Settings]) -> list[Any]:
    return [found for file in STAGES if isinstance(found := config(file), cls)]


def header(file: str) -> list[str]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#") for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))]]


def commands(file: str) -> Iterator[list[str]]:
    """The commands in a file's first lines, continued lines joined."""
    for line in "\n".join(header(file)).replace("\\\n", " ").splitlines():
        if line.startswith(("   python ", "   accelerate ")):
            yield shlex.split(line)


def run(command: list[str]) -> Settings:
    script = next(i for i, word in enumerate(command) if word in SCRIPTS)
    return from_command_line(SCRIPTS[command[script]], None, command[script + 1 :])[0]


# --- one file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_the_first_lines_say_what_it_is_for_and_how_to_run_it(file: str) -> None:
    assert re.fullmatch(r" [A-Z].*[.?:]", header(file)[0])
    assert header(file)[1].startswith(("   python ", "   accelerate "))
    parsed = list(commands(file))
    assert any(file in command for command in parsed)
    for command in parsed:
        run(command)


@pytest.mark.parametrize("file", STAGES)
def test_run_directories_are_named_after_the_file(file: str) -> None:
    stem = file.removeprefix("configs/").removesuffix(".yaml")
    settings = config(file)
    if isinstance(settings, DataConfig):
        assert settings.output_dir == f"data/{settings.name}"
    else:
        named = re.search(r"(?m)^run_dir: (.*)$", Path(file).read_text(encoding="utf-8"))
        assert named and named[1].removesuffix("_{adapter}") == f"runs/{stem}"


@pytest.mark.parametrize("file", STAGES)
def test_files_that_it_names_are_there(file: str) -> None:
    settings = config(file)
    block = settings.tokenizer if isinstance(settings, DataConfig) else settings.model
    assert block.chat_template is None or Path(block.chat_template).is_file()
    assert block.revision is None or re.fullmatch("[0-9a-f]{40}", block.revision)
    assert block.revision or block.name_or_path.startswith("models/")  # a model of the Hub is pinned


@pytest.mark.parametrize("file", STAGES)
def test_no_line_is_a_default_in_disguise(file: str) -> None:
    assert "default" not in Path(file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [file for file in STAGES if Path(file).name.startswith(("sft", "grpo"))])
def test_trl_accepts_the_trainer_block(file: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    settings = config(file)
    build = trl.SFTConfig if isinstance(settings, SftConfig) else trl.GRPOConfig
    built = build(output_dir=str(tmp_path), use_cpu=True, **settings.trainer)
    assert all(getattr(built, key) == value for key, value in settings.trainer.items())


@pytest.mark.parametrize("file", RECOMMENDED)
def test_every_recommended_value_has_its_reason(file: str) -> None:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    blocks = {"lora:", "rewards:", "rollouts:", "trainer:", "generation:"}
    inside, covered = False, 0
    for line in lines:
        if line.strip().startswith("#"):
            covered = 2  # one comment may speak for two keys that belong together
        elif not line.startswith(" "):
            inside = line in blocks
        else:
            assert not inside or covered or "  # " in line, line
            covered -= covered > 0


# --- files beside each other --------------------------------------------------------------------------------


def test_no_two_runs_share_a_directory() -> None:
    run_dirs = [settings.run_dir for cls in (SftConfig, GrpoConfig, EvalConfig) for settings in all_of(cls)]
    assert len(set(run_dirs)) == len(run_dirs) >= 20


@pytest.mark.parametrize("file", [file for file in STAGES if not Path(file).name.startswith("data")])
def test_its_data_set_is_made_by_a_config(file: str) -> None:
    settings = config(file)
    (made_by, *_) = [data for data in all_of(DataConfig) if data.output_dir == settings.data.path]
    if isinstance(settings, SftConfig | GrpoConfig) and made_by.source.kind in (
        "leg_counting",
        "gsm_symbolic",
    ):
        assert settings.data.num_dev <= made_by.source.num_dev
        assert (settings.data.num_train or 0) <= made_by.source.num_train


@pytest.mark.parametrize("file", [file for file in STAGES if Path(file).name.startswith(("grpo", "eval"))])
def test_its_adapter_is_trained_by_a_config_on_the_same_base(file: str) -> None:
    settings = config(file)
    trained = {run.run_dir: run for cls in (SftConfig, GrpoConfig) for run in all_of(cls)}
    evaluations = [cast(EvalConfig, run(command)) for command in commands(file) if "evaluate.py" in command]
    adapters = [settings.adapter, *(evaluation.adapter for evaluation in evaluations)]
    for adapter in filter(None, adapters):
        assert (trained[adapter].model, trained[adapter].quantization) == (
            settings.model,
            settings.quantization,
        )


@pytest.mark.parametrize("file", [file for file in RECOMMENDED if Path(file).name.startswith("grpo")])
def test_the_pass_rates_it_reads_are_sampled_by_the_command_above_it(file: str) -> None:
    settings = config(file)
    if settings.data.pass_rate is None:
        pytest.skip("it trains on every question")
    first = run(next(commands(file)))
    assert isinstance(first, EvalConfig) and first.run_dir == settings.data.pass_rate.run_dir
    assert (first.data.path, first.data.split, first.adapter) == (
        settings.data.path,
        "train",
        settings.adapter,
    )
    assert first.generation.samples >= 8 and first.generation.temperature == settings.trainer.get("temperature", 1.0)
    assert settings.data.pass_rate.low < 1 / first.generation.samples


# --- what was published -------------------------------------------------------------------------------------

SFT = {
    "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 4, "max_length": 512,
    "gradient_accumulation_steps": 4, "optim": "paged_adamw_32bit", "gradient_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "file, targets, num_epochs",
    [("sft_attention_1epoch", ATTENTION, 1), ("sft_llama3.2-3b", ALL_LINEAR, 2)],
)
def test_reproduction_of_sft(file: str, targets: list[str], num_epochs: int) -> None:
    settings = config(f"configs/{file}.yaml")
    lora = settings.lora
    assert (settings.model.name_or_path, settings.quantization) == ("meta-llama/Llama-3.2-3B", "nf4")
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (32, 64, 0.1, targets)
    assert settings.trainer.items() >= {**SFT, "num_train_epochs": num_epochs}.items()
    assert (settings.data.num_train, settings.tracking) == (None, "wandb")


def test_reproduction_of_grpo() -> None:
    settings = config("configs/grpo_llama3.2-3b.yaml")
    sft = config("configs/sft_llama3.2-3b.yaml")
    published = {"num_generations": 8, "temperature": 0.8, "beta": 0.04, "learning_rate": 3e-5}
    assert settings.trainer.items() >= published.items()
    assert (settings.lora.r, settings.lora.alpha, settings.lora.target_modules) == (
        sft.lora.r,
        32,
        ALL_LINEAR,
    )
    assert (settings.adapter, settings.adapter_mode) == (sft.run_dir, "rescale")
    assert (settings.data.num_train, settings.rewards.correctness, settings.rewards.format) == (
        1000,
        1.0,
        0.2,
    )
    assert (settings.rewards.gate_format, settings.tracking) == (False, "wandb")


@pytest.mark.parametrize(
    "file, model",
    [("eval_gsm8k", "meta-llama/Llama-3.2-3B"), ("eval_instruct", "meta-llama/Llama-3.2-3B-Instruct")],
)
def test_reproduction_of_the_evaluations(file: str, model: str) -> None:
    settings = config(f"configs/{file}.yaml")
    assert (settings.model.name_or_path, settings.adapter, settings.quantization) == (model, None, "nf4")
    assert (settings.data.path, settings.data.split, settings.data.limit) == ("data/gsm8k", "test", None)
    assert (settings.generation.samples, settings.generation.temperature) == (1, 0.0)


# --- accelerate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("multinode", "MULTI_GPU")])
def test_accelerate_reads_its_profiles(name: str, kind: str) -> None:
    reader = pytest.importorskip("accelerate.commands.config.config_args")
    profile = reader.load_config_from_file(f"configs/accelerate/{name}.yaml")
    assert (profile.distributed_type, profile.mixed_precision) == (kind, "bf16")
    assert profile.num_machines == (2 if name == "multinode" else 1)
    assert kind != "FSDP" or profile.fsdp_config["fsdp_version"] == 2
