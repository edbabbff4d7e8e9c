"""Settings: every key of every schema, every way to get a file wrong, and the same verdicts as TRL itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest

from posttrain.config.load import ConfigError, config_sha256, dump, from_command_line, load
from posttrain.config.messages import known_keys
from posttrain.config.schema import (
    DataConfig,
    EvalConfig,
    EvalData,
    GrpoConfig,
    Model,
    Rewards,
    Settings,
    SftConfig,
    Source,
    TrainData,
)
from posttrain.config.trl_batches import group_problems
from posttrain.config.trl_fields import SET_BY_POSTTRAIN, trl_fields

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 8, "alpha": 16, "target_modules": ["q_proj"]}
TRAIN: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"name_or_path": "m"},
    "data": {"path": "data/x"},
    "trainer": {},
}
PROMPT = {"instruction": "{question}"}
DATA = {"name": "x", "output_dir": "data/x", "prompt": PROMPT, "tokenizer": {"name_or_path": "m"}}
SOURCES: list[dict[str, Any]] = [
    {"kind": "hub", "repo_id": "a/b", "revision": "0" * 40},
    {"kind": "jsonl", "path": "raw"},
    {"kind": "files", "path": "raw", "fields": {"question": "q", "answer": "a"}},
    {"kind": "leg_counting", "num_train": 1, "num_dev": 1, "num_test": 1},
    {"kind": "made_choice", "num_train": 1, "num_dev": 1, "num_test": 1},
    {"kind": "svamp", "path": "raw"},
    {"kind": "rejection_sampled", "run_dir": "runs/x"},
]
VALID: list[tuple[type[Settings], dict[str, Any]]] = [
    (SftConfig, {**TRAIN, "lora": LORA}),
    (GrpoConfig, {**TRAIN, "adapter": "runs/sft"}),
    (EvalConfig, {"run_dir": "runs/x", "model": {"name_or_path": "m"}, "data": {"path": "data/x"}}),
    *((DataConfig, {**DATA, "source": source}) for source in SOURCES),
]
IDS = ["sft", "grpo", "eval", "hub", "jsonl", "files", "generator", "made", "svamp", "rejection_sampled"]
by_schema = pytest.mark.parametrize("cls, valid", VALID, ids=IDS)


def to_lines(block: dict[str, Any], indent: str = "") -> Iterator[str]:
    """YAML with every key on a line of its own."""
    for key, value in block.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from to_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {json.dumps(value)}"


def replaced(block: dict[str, Any], path: str, value: Any, rename: str | None = None) -> dict[str, Any]:
    """A copy in which the key at `path` holds `value`, under another name where one is given."""
    first, _, rest = path.partition(".")
    if rest:
        return {**block, first: replaced(block.get(first) or {}, rest, value, rename)}
    return {**{key: old for key, old in block.items() if key != first}, rename or first: value}


def faults_of(tmp_path: Path, cls: type[Settings], document: dict[str, Any] | str, *overrides: str) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(document if isinstance(document, str) else "\n".join(to_lines(document)), encoding="utf-8")
    try:
        load(file, overrides, cls)
    except ConfigError as error:
        return str(error).replace(str(file), "c.yaml").splitlines()
    return []


def line_of(document: dict[str, Any], path: str) -> int:
    marked = list(to_lines(replaced(document, path, "here it is")))
    return marked.index(next(line for line in marked if "here it is" in line)) + 1


def keys_of(cls: type[Settings], valid: dict[str, Any]) -> list[str]:
    """The keys of the schema, less those of the other kinds of source."""
    if cls is not DataConfig:
        return known_keys(cls)
    members = {member.model_fields["kind"].annotation: member for member in get_args(Source)}
    own = next(member for kinds, member in members.items() if valid["source"]["kind"] in get_args(kinds))
    return [k for k in known_keys(cls) if not k.startswith("source.") or k.split(".")[1] in own.model_fields]


# --- every key ----------------------------------------------------------------------------------------------


@by_schema
def test_valid(tmp_path: Path, cls: type[Settings], valid: dict[str, Any]) -> None:
    assert faults_of(tmp_path, cls, valid) == []


def test_the_table_covers_every_schema_and_source() -> None:
    stages = {DataConfig, SftConfig, GrpoConfig, EvalConfig}
    assert {cls for cls, _ in VALID} == stages
    assert {source["kind"] for source in SOURCES} | {"gsm_symbolic", "made_yes_no", "made_algebra"} == {
        kind for member in get_args(Source) for kind in get_args(member.model_fields["kind"].annotation)
    }
    assert len(known_keys(GrpoConfig)) > 180 and "trainer.num_generations" in known_keys(GrpoConfig)
    assert "trainer.warmup_steps" in known_keys(SftConfig) and "trainer.beta" not in known_keys(SftConfig)


@by_schema
def test_every_misspelt_key_is_named_with_its_line(tmp_path: Path, cls: type[Settings], valid: dict[str, Any]) -> None:
    for path in keys_of(cls, valid):
        block, _, key = path.rpartition(".")
        middle = max(1, len(key) // 2)
        typo = key[:middle] + key[middle - 1] + key[middle:]
        document = replaced(valid, path, 1, rename=typo)
        where = f"{block}.{typo}".removeprefix(".")
        expected = f"c.yaml:{line_of(document, where)}: {where}: unknown key (did you mean {path!r}?)"
        if path == "source.kind":  # without it nothing is known of the block
            expected = f"c.yaml:{line_of(document, 'source')}: source.kind: missing"
        assert expected in faults_of(tmp_path, cls, document)


def accepted_types(node: dict[str, Any], definitions: dict[str, Any]) -> set[str]:
    """The JSON types that are fine as such, whatever the value: an enumeration accepts no type."""
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[1]]
    members = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if members or "enum" in node or "const" in node:
        return set().union(*(accepted_types(member, definitions) for member in members))
    return {"number", "integer"} if node["type"] == "number" else {node["type"]}


@cache
def schema_of(cls: type[Settings]) -> dict[str, Any]:
    return cls.model_json_schema()


def schema_at(cls: type[Settings], path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of one key. Of several blocks that hold such a key, the first."""
    schema = schema_of(cls)
    nodes = [schema]
    for part in path.split("."):
        nodes = [child for node in nodes for child in children(node, part, schema["$defs"])]
    return nodes[0], schema["$defs"]


def children(node: dict[str, Any], name: str, definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[1]]
    if name in node.get("properties", {}):
        yield node["properties"][name]
    for member in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from children(member, name, definitions)


WRONG = {"array": [1], "string": "wide", "integer": 3, "boolean": True, "object": {"wide": 1}, "number": 0.5}


@by_schema
def test_every_value_of_a_wrong_type_is_named_with_its_line(tmp_path: Path, cls: type[Settings], valid: dict[str, Any]) -> None:
    for path in keys_of(cls, valid):
        for kind in WRONG.keys() - accepted_types(*schema_at(cls, path)):
            document = replaced(valid, path, WRONG[kind])
            start = f"c.yaml:{line_of(document, path)}: {path}"
            if (
                "fields" in valid.get("source", {}) and path == "source.path" and kind == "object"
            ):  # it may be one, and what is in it is wrong
                start = f"c.yaml:{line_of(document, path) + 1}: source.path.wide"
            faults = faults_of(tmp_path, cls, document)
            assert any(fault.startswith(start) and "should be" in fault for fault in faults), (
                path,
                kind,
                faults,
            )


# --- files and overrides that are wrong ---------------------------------------------------------------------

GOOD = "run_dir: runs/x\nmodel: {name_or_path: m}\ndata: {path: data/x}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghijklmnop")
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "1: the file is empty"),
        ("# nothing\n", "1: the file is empty"),
        ("- a\n- b\n", "1: expected `key: value` lines"),
        ("seed\n", "1: expected `key: value` lines"),
        (GOOD + "name: [a\n", "5: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        (GOOD + "\tname: a\n", "4: not valid YAML: while scanning for the next token, found character '\\t'"),
        (GOOD + "name: a\x01b\n", "4: not valid YAML: a control character"),
        (GOOD + "---\nname: a\n", "4: not valid YAML: expected a single document in the stream"),
        (GOOD + "name: " + "[" * 2000, "1: not valid YAML: nested too deeply"),
        (GOOD + "seed: 1\nseed: 2\n", "5: seed: duplicate key, first given on line 4"),
        (GOOD + "generation: {samples: 1, samples: 1}\n", "4: generation.samples: duplicate key"),
        (GOOD + "name: &x a\n", "4: name: anchors and aliases are not supported: write the value of &x out"),
        (GOOD + "name: !!python/object:os.system ls\n", "4: name: the tag tag:yaml.org,2002:python/object"),
        (GOOD + "name: !!binary aGk=\n", "4: name: the tag tag:yaml.org,2002:binary is not supported"),
        (GOOD + "<<: {seed: 1}\n", "4: <<: unknown key"),
        (GOOD + "? [a, b]\n: 1\n", "4: ?: unknown key"),
        (GOOD + "no: 1\n", "4: no: unknown key"),
        (GOOD + "seed: no\n", '4: seed: should be a whole number, not "no"'),
        (GOOD + "seed: 1.0\n", "4: seed: should be a whole number, not 1.0"),
        (GOOD + "seed: -1\n", "4: seed: should be greater than or equal to 0, not -1"),
        (
            GOOD + "generation: {temperature: .inf}\n",
            "4: generation.temperature: should be a finite number, not Inf",
        ),
        (GOOD + "generation:\n  samples: 4\n", "5: generation.samples: 4 greedy samples would be equal"),
        (
            GOOD + "engine: trl\n",
            "4: engine: should be 'transformers', 'continuous_batching' or 'vllm', not \"trl\"",
        ),
        (
            GOOD + "quantization: nf\n",
            "4: quantization: should be 'nf4', 'nf4_unpacked' or 'none', not \"nf\" (did you",
        ),
        (GOOD + "top_p: 1\n", "4: top_p: unknown key (did you mean 'generation.top_p'?)"),
        (GOOD + "xylophone: 5\n", "4: xylophone: unknown key"),
        (
            GOOD.replace("m}", "m, dtype: 3}"),
            "2: model.dtype: should be 'bfloat16', 'float32' or 'float16', not 3",
        ),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, expected: str) -> None:
    (fault,) = faults_of(tmp_path, EvalConfig, text)
    assert fault.startswith(f"c.yaml:{expected}")


def test_missing_keys_are_reported_at_the_block_that_lacks_them(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, EvalConfig, "seed: 1\n\nmodel:\n  dtype: float16\n")
    assert faults == [
        "c.yaml:1: run_dir: missing",
        "c.yaml:1: data: missing",
        "c.yaml:3: model.name_or_path: missing",
    ]


def test_wrong_bytes_and_paths(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"# a\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml:2: not UTF-8 text: byte 0xe9$"):
        load(tmp_path / "latin.yaml", [], EvalConfig)
    with pytest.raises(ConfigError, match=r"latni.yaml: no such file \(did you mean '.*latin.yaml'\?\)$"):
        load(tmp_path / "latni.yaml", [], EvalConfig)
    with pytest.raises(ConfigError, match=r"cannot be read as a file: Is a directory$"):
        load(tmp_path, [], EvalConfig)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(tmp_path / "bom.yaml", [], EvalConfig).run_dir == "runs/x"


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    assert "anchors and aliases are not supported" in faults_of(tmp_path, EvalConfig, BOMB)[0]  # 9^15 texts if expanded


@pytest.mark.parametrize(
    "override, expected",
    [
        ("sead=1", "sead: unknown key (did you mean 'seed'?)"),
        ("seed=two", 'seed: should be a whole number, not "two"'),
        ("seed=", "seed: should be a whole number, not null"),
        ("seed.deep=1", 'seed: should be a whole number, not {"deep": 1}'),
        ("model=m", 'model: should be a block of keys, not "m"'),
        ("generation.top_p=2", "generation.top_p: should be less than or equal to 1, not 2"),
        (
            "generation.samples=3",
            "generation.samples: 3 greedy samples would be equal: set temperature above 0",
        ),
        ("seed=&a 1", "seed: anchors and aliases are not supported: write the value of &a out"),
        ("seed=a: b: c", "seed: not valid YAML: mapping values are not allowed here"),
        ("seed=*a", "seed: not valid YAML: found undefined alias 'a'"),
        ("seed", "expected key=value, not 'seed'"),
        ("=1", "expected key=value, not '=1'"),
        ("model..dtype=float16", "expected key=value, not 'model..dtype=float16'"),
        (
            "model={name_or_path: a, name_or_path: b}",
            "model.name_or_path: duplicate key",
        ),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, expected: str) -> None:
    assert faults_of(tmp_path, EvalConfig, GOOD, override) == [f"command line: {expected}"]


def test_everything_wrong_is_said_at_once_in_order(tmp_path: Path) -> None:
    text = """\
run_dir: 3
model:
  name_or_path: m
  dtpe: float16
lora: {r: 0, alpha: 1.5, target_modules: []}
adapter: a
seed: 1
seed: 2
trainer:
  learning_rat: 1
  seed: 3
  bf16: yes
  optim: adamw_torc
"""
    faults = faults_of(tmp_path, GrpoConfig, text, "tracking=wandbb", "x", "rewards.format=much")
    assert [fault.rpartition(" (")[0] or fault for fault in faults] == [
        "c.yaml:1: run_dir: should be text, not 3",
        "c.yaml:1: data: missing",
        "c.yaml:4: model.dtpe: unknown key",
        "c.yaml:5: lora.r: should be greater than 0, not 0",
        "c.yaml:5: lora.alpha: should be a whole number, not 1.5",
        "c.yaml:5: lora.target_modules: should be a list of at least one item, not []",
        "c.yaml:8: seed: duplicate key, first given on line 7",
        "c.yaml:10: trainer.learning_rat: unknown key",
        "c.yaml:11: trainer.seed: posttrain sets this itself: use seed",
        'c.yaml:12: trainer.bf16: should be true or false, not "yes"',
        'c.yaml:13: trainer.optim: should be one of 41 known values, not "adamw_torc"',
        "command line: expected key=value, not 'x'",
        "command line: tracking: should be 'wandb', 'trackio', 'tensorboard' or 'mlflow' or 'none' or a list, not \"wandbb\"",
        'command line: rewards.format: should be a number, not "much"',
    ]


# --- YAML 1.2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, read",
    [
        ("2e-4", 2e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1", 1.0),
        ("0x10", 16.0),
        ("010", 10.0),
        ("1_000", 1000.0),
    ],
)
def test_numbers(tmp_path: Path, written: str, read: float) -> None:
    (tmp_path / "c.yaml").write_text(GOOD + f"generation: {{temperature: {written}}}", encoding="utf-8")
    in_file = load(tmp_path / "c.yaml", [], EvalConfig)
    given = load(tmp_path / "c.yaml", [f"generation.temperature={written}"], EvalConfig)
    assert in_file == given and given.generation.temperature == read and isinstance(given.generation.temperature, float)


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "2026-11-24", "1:30", "=", "<<", "a#b", "~a", "Norway: no"])
def test_text_stays_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(GOOD, encoding="utf-8")
    written = json.dumps(text) if ": " in text else text
    assert load(tmp_path / "c.yaml", [f"name={written}"], EvalConfig).name == text


def test_an_override_replaces_the_whole_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD + "adapter: runs/x\nseed: nonsense\n", encoding="utf-8")
    config = load(
        tmp_path / "c.yaml",
        ["adapter=null", "model={name_or_path: b}", "model.dtype=float16", "seed=1", "seed=2"],
        EvalConfig,
    )
    assert (config.adapter, config.model.name_or_path, config.model.dtype, config.seed) == (
        None,
        "b",
        "float16",
        2,
    )


# --- rules over several keys --------------------------------------------------------------------------------


NOT_WHOLE_GROUPS = (
    "trainer.num_generations: per_device_train_batch_size x processes (8) x gradient_accumulation_steps (1) "
    "= 8 completions do not divide by 3: use num_generations 2 or 4, or gradient_accumulation_steps 3"
)


@pytest.mark.parametrize(
    "cls, changes, expected",
    [
        (SftConfig, {"lora": None}, "quantization: lora null trains all weights, and nf4 cannot be trained"),
        (SftConfig, {"compile": True, "model": {"name_or_path": "m", "kernels": "liger"}}, "model.kernels: compile fuses"),
        (SftConfig, {"adapter": "runs/x"}, "lora: an adapter that is continued keeps its shape"),
        (GrpoConfig, {"lora": LORA}, "lora: adapter_mode continue keeps the adapter's shape"),
        (GrpoConfig, {"adapter_mode": "merge_and_new"}, "lora: missing: adapter_mode merge_and_new"),
        (GrpoConfig, {"adapter_mode": "merge_and_new", "lora": LORA}, None),
        (
            GrpoConfig,
            {"data": {"path": "x", "pass_rate": {"run_dir": "r", "low": 0.9}}},
            "data.pass_rate.low: low 0.9",
        ),
        (GrpoConfig, {"trainer": {"num_generations": 3}}, NOT_WHOLE_GROUPS),
        (GrpoConfig, {"trainer": {"use_vllm": True}}, "trainer.use_vllm: needs rollouts.engine trl"),
        (GrpoConfig, {"trainer": {"use_vllm": True}, "rollouts": {"engine": "trl"}}, None),
        (
            GrpoConfig,
            {"trainer": {"beta": 0.1}, "rollouts": {"skip_zero_signal": True}},
            "rollouts.skip_zero_signal: n",
        ),
        (GrpoConfig, {"adapter_mode": "rescale"}, "lora: missing: adapter_mode rescale needs the shape"),
        (DataConfig, {"prompt": {"instruction": "question"}}, "prompt.instruction: must contain {question}"),
        (
            DataConfig,
            {"prompt": {**PROMPT, "style": "few_shot"}},
            "prompt.num_shots: style few_shot needs at least 1",
        ),
        (
            DataConfig,
            {"prompt": {**PROMPT, "num_shots": 2}},
            "prompt.num_shots: style chat shows no solved examples",
        ),
        (
            DataConfig,
            {"prompt": {**PROMPT, "shots": "shots.jsonl"}},
            "prompt.shots: style chat shows no solved examples",
        ),
        (
            DataConfig,
            {"source": {**SOURCES[0], "revision": "main"}},
            "source.revision: should be a full commit id",
        ),
        (
            DataConfig,
            {"source": {**SOURCES[1], "repo_id": "a/b"}},
            "source.repo_id: does not go with this source.kind",
        ),
        (DataConfig, {"answer": {"form": "Answer:"}}, "answer.form: must be one line that contains {answer} once"),
        (DataConfig, {"answer": {"form": "{answer}"}}, "answer.form: needs two signs or more before {answer}"),
        (DataConfig, {"answer": {"form": "so\n#### {answer}"}}, "answer.form: must be one line"),
        (DataConfig, {"answer": {"form": r"Answer:\s*{answer}"}}, "answer.form: is plain text, and this looks like a regular"),
        (DataConfig, {"answer": {"form": "(?i)answer: {answer}"}}, "answer.form: is plain text, and this looks like"),
        (DataConfig, {"answer": {"form": "Answer: .*{answer}"}}, "answer.form: is plain text, and this looks like"),
        (DataConfig, {"answer": {"form": r"so $\displaystyle\widehat{{answer}}$ (right?)..."}}, None),
        (DataConfig, {"answer": {"options": ["A", "B"]}}, "answer.options: kind number has no list of answers"),
        (DataConfig, {"answer": {"kind": "choice", "options": ["A", "b"]}}, "answer.options: 'b' is no capital letter"),
        (DataConfig, {"answer": {"kind": "text", "options": ["yes", "Yes"]}}, "answer.options: holds an answer twice"),
        (DataConfig, {"answer": {"kind": "text", "options": ["yes"]}}, "answer.options: one answer alone"),
        (DataConfig, {"answer": {"kind": "letter"}}, "answer.kind: should be 'number', 'choice', 'text' or 'expression'"),
        (
            DataConfig,
            {"prompt": {**PROMPT, "system": 'End with a last line "Answer: 42".'}},
            "prompt.system: asks for 'Answer:', and the solutions end in '#### {answer}': "
            "set answer.form to 'Answer: {answer}', or change the prompt",
        ),
        (
            DataConfig,
            {"prompt": {"instruction": "{question} Put it after ####."}, "answer": {"form": "Answer: {answer}"}},
            "prompt.instruction: asks for '####', and the solutions end in 'Answer: {answer}'",
        ),
        (DataConfig, {"prompt": {"instruction": r"{question} Use \boxed{}."}}, r"prompt.instruction: asks for '\\boxed', and"),
        (DataConfig, {"prompt": {"instruction": "Question: {question}\nAnswer:"}}, None),
        (DataConfig, {"prompt": {"instruction": "{question} Answer: it. End with ####."}}, None),
        (DataConfig, {"prompt": {"instruction": "{question} Answer: it."}, "answer": {"form": "Answer: {answer}"}}, None),
        (DataConfig, {"source": {"kind": "hubb"}}, "source.kind: should be one of"),
    ],
)
def test_rules(tmp_path: Path, cls: type[Settings], changes: dict[str, Any], expected: str) -> None:
    valid = next(valid for schema, valid in VALID if schema is cls)
    faults = faults_of(tmp_path, cls, {**valid, **changes})
    assert len(faults) == (expected is not None)
    assert all(fault.split(": ", 1)[1].startswith(expected) for fault in faults)


def test_rules_hold_without_a_file() -> None:
    with pytest.raises(pydantic.ValidationError, match="missing: the shape of the new adapter"):
        SftConfig(run_dir="x", model=Model(name_or_path="m"), data=TrainData(path="x"))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Rewards().format = 0.5


@pytest.mark.parametrize(
    "run_dir, adapter, expected",
    [
        ("runs/e_{adapter}", None, "runs/e_base"),
        ("runs/e_{adapter}", "runs/sft", "runs/e_sft"),
        ("runs/e_{adapter}", "runs/sft/adapter", "runs/e_sft"),
        ("runs/e_{adapter}", "runs/sft/adapter/", "runs/e_sft"),
        ("runs/e_{adapter}", "me/sft", "runs/e_sft"),
        ("runs/e", "me/sft", "runs/e"),
    ],
)
def test_one_run_dir_for_each_adapter(run_dir: str, adapter: str | None, expected: str) -> None:
    config = EvalConfig(
        run_dir=run_dir,
        adapter=adapter,
        model=Model(name_or_path="m"),
        data=EvalData(path="x"),
    )
    assert config.run_dir == expected


# --- agreement with TRL -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl")


@pytest.mark.parametrize("name", ["SFTConfig", "GRPOConfig"])
def test_fields_are_those_that_trl_has_when_imported(trl: Any, name: str) -> None:
    imported = {field.name: field for field in dataclasses.fields(getattr(trl, name)) if field.init}
    read = trl_fields(name)
    assert read.keys() == imported.keys()
    for key, field in read.items():
        if field.default is not None:
            assert field.default == imported[key].default, key
        if imported[key].default is not dataclasses.MISSING:
            pydantic.TypeAdapter(field.type).validate_python(plain(imported[key].default), strict=True)


def plain(value: Any) -> Any:
    return getattr(value, "value", value)  # an enumeration's text


def trl_accepts(trl: Any, tmp_path: Path, trainer: dict[str, Any]) -> bool:
    try:
        trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **trainer)
    except ValueError as error:
        assert "generat" in str(error), error
        return False
    return True


def test_group_rules_are_those_of_trl(trl: Any, tmp_path: Path) -> None:
    verdicts = []
    for batch, steps, group, size, per_generation in itertools.product(
        (1, 3, 8), (1, 2, 6), (1, 2, 8), (None, 6, 24), (None, 2, 4)
    ):
        trainer: dict[str, Any] = {"per_device_train_batch_size": batch, "num_generations": group}
        trainer |= {"gradient_accumulation_steps": steps}
        trainer |= {"generation_batch_size": size, "steps_per_generation": per_generation}
        accepted = trl_accepts(trl, tmp_path, trainer)
        assert (not list(group_problems(trainer))) == accepted, trainer
        verdicts.append(accepted)
    assert 20 < sum(verdicts) < len(verdicts) - 20  # both verdicts are met often


@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_nearest_valid_values_are_valid_and_nearest(monkeypatch: pytest.MonkeyPatch, num_processes: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    for batch, steps, group in itertools.product((1, 2, 3, 8), (1, 2, 5), (2, 4, 7, 8)):
        trainer = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "num_generations": group,
        }
        total = batch * steps * num_processes
        found = dict(group_problems(trainer))
        assert bool(found) == (total % group != 0)
        if found:
            text = found["num_generations"]
            assert f"= {total} completions do not divide by {group}" in text
            values = [int(word) for word in text.split("gradient_accumulation_steps ")[-1].split(" or ")]
            valid = [n for n in range(1, 100) if batch * num_processes * n % group == 0]
            assert set(values) == {*[n for n in valid if n < steps][-1:], next(n for n in valid if n > steps)}


def test_evaluation_batches_hold_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = {"eval_strategy": "steps", "per_device_eval_batch_size": 6}
    ((key, text),) = group_problems(trainer)
    assert key == "per_device_eval_batch_size" and text.endswith("6 does not divide by 8 generations: use 8")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert list(group_problems(trainer)) == []
    ((_, text),) = group_problems({**trainer, "num_generations_eval": 5})
    assert text.endswith("24 does not divide by 5 generations: use 5 or 10")


@pytest.mark.parametrize("key", sorted(SET_BY_POSTTRAIN))
def test_keys_that_posttrain_sets_are_refused_with_the_one_to_use(tmp_path: Path, key: str) -> None:
    (fault,) = faults_of(tmp_path, GrpoConfig, {**VALID[1][1], "trainer": {key: 1}})
    assert fault == f"c.yaml:7: trainer.{key}: posttrain sets this itself: use {SET_BY_POSTTRAIN[key]}"
    (named, *_) = SET_BY_POSTTRAIN[key].split(",")[0].split(" ")
    assert named in known_keys(GrpoConfig) or named in ("the", "--resume")


# --- the way back -------------------------------------------------------------------------------------------

NASTY = [
    *(
        "no",
        "1e-4",
        "null",
        "~",
        "",
        " a ",
        "a: b",
        "#",
        "'",
        '"',
        "\\",
        "a\nb\n",
        "\n",
        "\tx",
        "é",
        "数",
        "😀",
    ),
    *(
        "\x85",
        "\u2028",
        "\ufeff",
        "\x7f",
        "{question}",
        "- a",
        "&a",
        "*a",
        "!x",
        "%",
        "@",
        "`",
        "2026-11-24",
        "0x1F",
    ),
    *("1_000", "true", "a" * 300, "word " * 60),
]


def test_a_comment_in_an_override_is_told_and_cuts_nothing(tmp_path: Path) -> None:
    """YAML ends a plain value at " #": the prompt would have been "{question} End with"."""
    file = tmp_path / "data.yaml"
    file.write_text((ROOT / "configs" / "data_tiny.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for text in ("Ask {question} End with #### and the number.", "#### {question}"):
        with pytest.raises(ConfigError, match="YAML takes the # for the begin of a comment: quote the value") as told:
            load(file, [f"prompt.instruction={text}"], DataConfig)
        quoted = shlex.split(str(told.value).partition("quote the value, ")[2])
        assert load(file, quoted, DataConfig).prompt.instruction == text
    assert load(file, ["prompt.system=a#b"], DataConfig).prompt.system == "a#b"


def test_a_path_begins_at_home_and_nothing_else_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh leaves the tilde of `run_dir=~/x` as it is, and bash that of `data.path=~/x`: a folder `~` came of it."""
    monkeypatch.setenv("HOME", "/home/ann")
    file = ROOT / "configs" / "eval_tiny.yaml"
    config = load(file, ["run_dir=~/runs/{adapter}", "data.path=~/data", "adapter=a/b~"], EvalConfig)
    assert (config.run_dir, config.data.path, config.adapter) == ("/home/ann/runs/b~", "/home/ann/data", "a/b~")
    for path, name in (("$HOME/x", "$HOME"), ("x/${RUN}", "${RUN}"), ("runs/{split}", "{split}")):
        with pytest.raises(ConfigError, match=re.escape(f"run_dir: {name} is not filled in here: write it out")):
            load(file, [f"run_dir={path}"], EvalConfig)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_dump_loads_back(tmp_path: Path, text: str) -> None:
    source = {"kind": "gsm_symbolic", "num_train": 1, "num_dev": 1, "num_test": 1}
    values = {
        "name": text,
        "output_dir": text.strip("{}"),
        "source": {**source, "options": {"a": text, "b": 1e-5, "c": 3}},
        "prompt": {"system": text, "instruction": text + "{question}"},
        "tokenizer": {"name_or_path": text.strip("{}")},
        "dev_fraction": 1e-7,
    }
    config = DataConfig.model_validate(values)
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    again = load(tmp_path / "c.yaml", [], DataConfig)
    assert again == config and config_sha256(again) == config_sha256(config)


@by_schema
def test_dump_of_every_schema_loads_back(tmp_path: Path, cls: type[Settings], valid: dict[str, Any]) -> None:
    config = cls.model_validate(valid)
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "c.yaml", [], cls) == config


@by_schema
def test_the_hash_sees_what_changes_results_and_nothing_else(cls: type[Settings], valid: dict[str, Any]) -> None:
    sha = config_sha256(cls.model_validate(valid))
    assert sha == config_sha256(cls.model_validate(dict(reversed(valid.items()))))
    elsewhere = {"output_dir": "d"} if cls is DataConfig else {"run_dir": "d"}
    elsewhere |= {"name": "n"} if cls is EvalConfig else {}
    elsewhere |= {"tracking": "wandb"} if cls in (SftConfig, GrpoConfig) else {}
    assert sha == config_sha256(cls.model_validate({**valid, **elsewhere}))
    assert sha != config_sha256(cls.model_validate({**valid, "seed": 7}))
    if cls in (SftConfig, GrpoConfig):
        assert sha == config_sha256(cls.model_validate({**valid, "hub": {"repo_id": "me/x"}}))
        assert sha != config_sha256(cls.model_validate({**valid, "trainer": {"learning_rate": 1e-3}}))


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "c.yaml").write_text(GOOD, encoding="utf-8")
    return str(tmp_path / "c.yaml")


def test_flags_and_overrides_in_any_order(file: str) -> None:
    argv = ["seed=1", "--dry-run", "--config", file, "name=no", "--regrade", "generation.temperature=-0.0"]
    config, args = from_command_line(EvalConfig, "doc", argv, regrade="grade anew")
    assert (config.seed, config.name) == (1, "no")
    assert (args.dry_run, args.regrade, args.resume) == (True, True, False)


def test_print_config_loads_back(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_command_line(EvalConfig, "doc", ["--config", file, "seed=9", "--print-config"])
    assert end.value.code == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(tmp_path / "again.yaml", [], EvalConfig) == load(file, ["seed=9"], EvalConfig)


def test_schema_lists_trl_keys_and_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_command_line(SftConfig, "doc", ["--schema"])
    assert end.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["trainer"]["properties"]["learning_rate"]["type"] == "number"
    assert "cosine" in schema["properties"]["trainer"]["properties"]["lr_scheduler_type"]["enum"]


@pytest.mark.parametrize("argv", [[], ["--confg", "x"], ["--dry"], ["--regrade"], ["--config"]])
def test_wrong_flags_end_with_2(argv: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_command_line(SftConfig, "doc", argv)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


SCRIPT = """
import atexit, sys
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy"}
atexit.register(lambda: print(*sorted(HEAVY & sys.modules.keys())))
from posttrain.config.load import from_command_line
from posttrain.config.schema import GrpoConfig
from_command_line(GrpoConfig, __doc__)
"""


@pytest.mark.parametrize("override, code", [("seed=1", 0), ("trainer.learning_rat=1", 2), ("trainer.num_generations=7", 2)])
def test_a_fast_process_that_imports_nothing_heavy_and_writes_nothing(tmp_path: Path, override: str, code: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "c.yaml").write_text("\n".join(to_lines(VALID[1][1])), encoding="utf-8")
    command = [sys.executable, "-B", "script.py", "--config", "c.yaml", override]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == code and done.stdout == "\n"
    assert ": trainer." in done.stderr or code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "script.py"]
