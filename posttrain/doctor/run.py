"""What one config asks for: its base, its data, room for it, and who is told."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from posttrain.config.load import ConfigError, load
from posttrain.config.schema import DataConfig, EvalConfig, GrpoConfig, SftConfig, trackers_of
from posttrain.doctor.findings import Check, Finding
from posttrain.places import looks_local
from posttrain.tracking import knows_wandb

RunConfig: TypeAlias = SftConfig | GrpoConfig | EvalConfig
STAGES: tuple[type[Any], ...] = (SftConfig, GrpoConfig, EvalConfig, DataConfig)


def read(path: str, overrides: Sequence[str]) -> RunConfig | DataConfig:
    """The settings, as the stage that they fit.

    Raises:
        ConfigError: they fit none; the text has the faults of the stage that they fit best.
    """
    errors = list[ConfigError]()
    for stage in STAGES:
        try:
            return load(path, overrides, stage)
        except ConfigError as error:
            errors.append(error)
    raise min(errors, key=lambda error: str(error).count("\n"))


def checks(config: RunConfig | DataConfig) -> dict[str, Check]:
    if isinstance(config, DataConfig):
        return {"source": functools.partial(source, config), "tokenizer": functools.partial(tokenizer, config)}
    named: dict[str, Check] = {
        "base": functools.partial(base, config),
        "data": functools.partial(data, config),
        "adapter": functools.partial(adapter, config),
        "computed by": functools.partial(computed_by, config),
        "room": functools.partial(room, config),
    }
    return named | {"tracking": functools.partial(tracking, config)}


def source(config: DataConfig) -> Iterator[Finding]:
    from posttrain.tasks.sources import read_source

    found = read_source(config)
    yield Finding("ok", "source", f"{config.source.kind}, {len(found.rows)} rows")


def tokenizer(config: DataConfig) -> Iterator[Finding]:
    from posttrain.models.chat import load_tokenizer

    loaded = load_tokenizer(config.tokenizer)
    yield Finding("ok", "tokenizer", f"{config.tokenizer.name_or_path}, its template ends a turn with {loaded.eos_token}")


def base(config: RunConfig) -> Iterator[Finding]:
    """Config, tokenizer and template, which a gated model gives to nobody without a token. Weights are not downloaded."""
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.checkpoint import check_base, check_rows_for, skeleton
    from posttrain.models.special_tokens import template_specials

    loaded = load_tokenizer(config.model)
    local = looks_local(config.model.name_or_path)
    model = check_base(config.model, config.quantization, loaded) if local else skeleton(config.model)
    check_rows_for(model, loaded, [template_specials(loaded), [loaded.pad_token_id]])
    weights = model.num_parameters()
    size = f"{weights / 1e9:.2f} billion weights" if weights > 1e8 else f"{weights:,} weights"
    where = "" if local else "; weights that are not in the cache come with the first run"
    yield Finding("ok", "base", f"{config.model.name_or_path}, {size}, {config.quantization}, stops on {loaded.eos_token}{where}")


def data(config: RunConfig) -> Iterator[Finding]:
    from posttrain.runs.data_sets import data_entry, read_data_manifest

    split = config.data.split if isinstance(config, EvalConfig) else "train"
    data_entry(config.data.path, split)
    counts = " ".join(f"{name} {count}" for name, count in read_data_manifest(config.data.path)["counts"].items())
    yield Finding("ok", "data", f"{config.data.path}, as it was prepared: {counts}")


def adapter(config: RunConfig) -> Iterator[Finding]:
    from posttrain.models.adapters import adapter_sha256, resolve_adapter
    from posttrain.runs.manifest import refuse_unfinished

    if config.adapter is None:
        return
    folder = resolve_adapter(config.adapter)
    note = refuse_unfinished(folder)
    told = f"{folder}, sha256 {adapter_sha256(folder):.12}"
    yield Finding("warning", "adapter", told, note) if note else Finding("ok", "adapter", told)


def computed_by(config: RunConfig) -> Iterator[Finding]:
    """Attention, layers and decoding that this run will have on this machine, if the machine can do what it asks for."""
    import torch

    from posttrain.generation.decoder import way
    from posttrain.generation.supported import check_engine
    from posttrain.kernels.liger import why_not_liger
    from posttrain.models.base import device, fastest_attention
    from posttrain.models.checkpoint import skeleton
    from posttrain.runs.directory import check_machine

    check_machine(config)
    asked = config.model.attn_implementation
    attention = fastest_attention(device()) if asked == "auto" else asked
    model = skeleton(config.model).to(getattr(torch, config.model.dtype))
    reason = "they need CUDA" if device().type != "cuda" else why_not_liger(model)
    fused = config.model.kernels != "torch" and reason is None
    model.kernels, model.decoding = "liger" if fused else "torch", config.model.decoding
    engine = _engine(config)
    check_engine(config.model, engine, "choose another engine, or another model")
    decoding = f"{engine} ({way(model)})" if engine == "transformers" else engine
    told = f"attention {attention}, layers {'by Liger' if fused else 'by torch'}, engine {decoding}"
    if not fused and device().type == "cuda" and config.model.kernels != "torch":
        yield Finding("warning", "computed by", f"{told}; no fused kernels: {reason}", "it is slower and takes more memory")
    else:
        yield Finding("ok", "computed by", told)


def _engine(config: RunConfig) -> str:
    """What makes completions; SFT makes those of dev questions."""
    if isinstance(config, EvalConfig):
        return config.engine
    return config.rollouts.engine if isinstance(config, GrpoConfig) else "transformers"


def room(config: RunConfig) -> Iterator[Finding]:
    """Memory for the weights, disk for the checkpoints: what the plan takes for certain, beside what is free."""
    from posttrain.models.adapters import resolve_adapter
    from posttrain.models.checkpoint import skeleton
    from posttrain.runs.data_sets import read_data_manifest
    from posttrain.training.plans import gib
    from posttrain.training.room import base_bytes, check_room, free_memory, nearest

    model = skeleton(config.model)
    folder = resolve_adapter(config.adapter) if config.adapter else None
    check_room(config, model, folder, read_data_manifest(config.data.path)["counts"].get("train", 0))
    free = free_memory()
    memory = f"{gib(free)} of memory are free" if free is not None else "the system does not say how much memory is free"
    disk = gib(shutil.disk_usage(nearest(Path(config.run_dir))).free)
    told = f"the base takes {gib(base_bytes(config, model))}, {memory}; {disk} of disk are free; --dry-run estimates the rest"
    yield Finding("ok", "room", told)


def tracking(config: RunConfig) -> Iterator[Finding]:
    names = trackers_of(config.tracking)
    if not names:
        yield Finding("ok", "tracking", "the curves stay in the run directory")
    for name in names:
        if importlib.util.find_spec(name) is None:
            yield Finding("broken", "tracking", f"the package {name} is not installed", f"pip install {name}")
        elif name == "wandb" and not knows_wandb():
            yield Finding("warning", "tracking", "wandb without a login logs offline", "wandb login, or `wandb sync` afterwards")
        else:
            yield Finding("ok", "tracking", name)
