"""Accuracy of a base model, an instruct model or an adapter on a prepared data set, with its uncertainty.

    python evaluate.py --config configs/eval_gsm8k.yaml                                           # the base model
    python evaluate.py --config configs/eval_gsm8k.yaml adapter=runs/grpo_llama3.2-3b run_dir=runs/eval_grpo
    python evaluate.py --config configs/eval_gsm8k.yaml generation.samples=8 generation.temperature=0.8   # pass@k, maj@k
    python evaluate.py --config configs/eval_gsm8k.yaml data.limit=100 run_dir=runs/try           # labelled as a subset
    python evaluate.py --config configs/eval_gsm8k.yaml --regrade         # every number again, from predictions.jsonl alone
    accelerate launch --config_file configs/accelerate/ddp.yaml evaluate.py --config ...     # several GPUs
    torchrun --nproc_per_node 2 evaluate.py --config ...                                     # several processes on CPUs

Predictions are written as they come. After an interruption at any moment the same command goes on, and its results are the
same bytes as without it: the questions fix the batches, and seed, batch, row and step fix every draw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.load import from_command_line
from posttrain.config.schema import EvalConfig
from posttrain.console import answering
from posttrain.errors import UserError, exit_on_user_error
from posttrain.evaluation import summary
from posttrain.evaluation.predictions import PartFiles, grade_completion, regraded
from posttrain.records import Example, Prediction, read_jsonl, read_rows, sha256_text, write_atomic, write_jsonl
from posttrain.runs.alone import alone
from posttrain.runs.contents import check_contents, content_hashes
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import Run, check_reusable, open_run
from posttrain.runs.manifest import parent_of, parent_of_model, read_manifest, refuse_unfinished, refuse_unfinished_model, run_of
from posttrain.runs.process import num_processes, use_one_gpu
from posttrain.tasks import gsm8k
from posttrain.tasks.answers import grader_of, other_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What of the manifest stands in results.json: what was measured and with what, nothing of how the run went.
PROVENANCE = (
    "model", "adapter_sha256", "parent", "chain", "engine", "decoding", "generation", "batch_size", "data", "seed", "commit",
    "dirty", "versions", "hardware",
)  # fmt: skip

TRACKED = 50  # completions of the table that trackers get

# What to say where an engine would decode another model.
OTHER_ENGINE = {
    "transformers": "use engine=continuous_batching",
    "continuous_batching": "use engine=transformers",
    "vllm": "use engine=transformers",
}


def main() -> None:
    config, args = from_command_line(
        EvalConfig, __doc__, plans=True, regrade="recompute every number from predictions.jsonl, no model"
    )
    if args.regrade:
        return regrade(Path(config.run_dir))
    data = data_entry(config.data.path, config.data.split)
    examples = read_jsonl(Path(config.data.path, f"{config.data.split}.jsonl"), Example)
    asked = examples[: config.data.limit]
    if not asked:
        raise UserError(f"{config.data.path}/{config.data.split}.jsonl has no question: choose another data.split")
    if args.dry_run:
        from posttrain.training.dry_run import show_eval_dry_run
        from posttrain.training.machines import find_machine

        machine = find_machine(args.gpu) if args.gpu else None
        return show_eval_dry_run(config, asked, grader_of(data.get("answer")), machine)
    check_reusable(config, config.run_dir, resume=True)
    refuse_other_answers(config.run_dir, data)
    use_one_gpu()

    from posttrain.generation.supported import check_engine
    from posttrain.models.chat import chat_ids, load_tokenizer
    from posttrain.models.checkpoint import check_base
    from posttrain.models.template_check import check_same_template, check_template
    from posttrain.training.before import check_questions
    from posttrain.training.room import check_room

    check_engine(config.model, config.engine, OTHER_ENGINE[config.engine])
    tokenizer = load_tokenizer(config.model)
    check_template(tokenizer, asked)
    base = check_base(config.model, config.quantization, tokenizer)
    check_questions(config, base, tokenizer, asked)
    check_room(config, base, None, len(asked))
    prompts = [chat_ids(tokenizer, example.prompt, add_generation_prompt=True) for example in asked]
    adapter, origin = find_adapter(config, data, base, tokenizer)
    begun_with = refuse_unfinished(adapter) if adapter else refuse_unfinished_model(config.model.name_or_path)
    if adapter:
        check_same_template(tokenizer, adapter, asked)
    with open_run(config, "eval", config.run_dir, resume=True) as run:
        run.say(f"{config.model.name_or_path} + {config.adapter or 'no adapter'} on {len(asked)} questions of {data['name']}")
        run.record(data=data | {"size": len(examples)}, limit=config.data.limit, **origin)
        for note in filter(None, (begun_with, *other_answers(origin.get("chain", []), data))):
            run.note(note)
        policy = load_policy(config, adapter, tokenizer, prompts, run)
        write_questions(asked, tokenizer, run)
        parts = PartFiles(run.folder, grader_of(data.get("answer")), policy_key(run), run.manifest.completions_sha256)
        predict(config, asked, prompts, policy, tokenizer, parts, run)
        if run.is_main:
            predictions = parts.gather(
                asked, config.generation.samples, lambda rows: run.record(**content_hashes(run.folder, rows))
            )
            run.record(generated_seconds=run.seconds)
            results = write_results(run.folder, predictions)
            tell_trackers(config, adapter, run, asked, predictions, results)


def find_adapter(config: EvalConfig, data: dict[str, Any], base: Any, tokenizer: Any) -> tuple[Path | None, dict[str, Any]]:
    """The adapter's folder, and what the manifest says of it, or of a model whose weights a run has all trained.

    Raises:
        UserError: there is none, it belongs to another base, its training saw the questions, or the run began with another.
    """
    from posttrain.models import adapter_checks, adapters
    from posttrain.runs.integrity import adapter_hashes

    folder = adapters.resolve_adapter(config.adapter) if config.adapter else None
    parent: dict[str, Any] | None
    if folder:
        stores = config.engine == "vllm"
        adapter_checks.check_start(folder, config.model, config.quantization, base, tokenizer, train=False, stores=stores)
        sha256: str | None = adapters.adapter_sha256(folder)
        parent, chain = parent_of(folder, str(sha256))
    else:
        parent, chain, sha256 = parent_of_model(config.model.name_or_path)
    refuse_contaminated(chain, data)
    adapter_checks.check_begun(config.run_dir, config.model, folder)
    if not sha256:
        return None, {}
    origin = {"parent": parent, "chain": chain, "adapter_sha256": sha256}
    return folder, origin | ({"parent_files": adapter_hashes(folder)} if folder else {})


def load_policy(config: EvalConfig, adapter: Path | None, tokenizer: Any, prompts: list[list[int]], run: Run) -> PreTrainedModel:
    """The plain model to generate with, compared with the one it was made of; what that is goes into the manifest."""
    from posttrain.generation.guard import EngineGuard
    from posttrain.models.policy import open_policy
    from posttrain.models.policy_copy import PolicyCopy

    model, identity = open_policy(config.model, config.quantization, tokenizer, adapter, trainable=False)
    run.record(model=identity, engine=config.engine, generation=config.generation.model_dump())
    policy = PolicyCopy(model).model
    guard = EngineGuard(OTHER_ENGINE["transformers"], run.record)
    guard(config.engine, policy, model, prompts, config.generation.max_new_tokens)
    return policy


def refuse_contaminated(chain: list[dict[str, Any]], data: dict[str, Any]) -> None:
    """A score on questions that training has seen means nothing."""
    trained = [link["name"] for link in chain if gsm8k.gives_away_its_test_set(link.get("data") or {})]
    if trained and gsm8k.is_gsm8k(data):
        raise UserError(
            f"{', '.join(trained)} trained on gsm_symbolic, whose templates are GSM8K test questions: not scored on GSM8K"
        )


def refuse_other_answers(run_dir: str, data: dict[str, Any]) -> None:
    """A run that goes on must not get a second grader for its second half."""
    begun = read_manifest(run_dir) if Path(run_dir, "manifest.json").is_file() else None
    before, now = (grader_of(entry.get("answer")) for entry in (begun.data if begun else data, data))
    if before != now:
        raise UserError(f"{run_dir} was begun with grader {before.name}, and its data now has {now.name}: choose another run_dir")


def write_questions(asked: list[Example], tokenizer: Any, run: Run) -> None:
    """The questions as the model saw them: with them and predictions.jsonl every number can be computed again."""
    if not run.is_main:
        return
    rows = []
    for example in asked:
        prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, tokenize=False)
        kept = {name: getattr(example, name) for name in ("id", "split", "question", "answer", "num_steps")}
        rows.append(kept | {"prompt": prompt, "prompt_sha256": sha256_text(prompt)})
    write_jsonl(run.folder / "questions.jsonl", rows)


# --- generation -------------------------------------------------------------------------------------------------------


def predict(
    config: EvalConfig,
    asked: list[Example],
    prompts: list[list[int]],
    policy: Any,
    tokenizer: Any,
    parts: PartFiles,
    run: Run,
) -> None:
    """Generate this process's share of what is missing, batch by batch."""
    from posttrain.generation.engines import engine_batches, plan_batches
    from posttrain.generation.loop import Sampling

    generation = config.generation
    sampling = Sampling(generation.max_new_tokens, generation.temperature, generation.top_p, generation.samples, config.seed)
    size = batch_size(config, prompts, policy, run)
    share = parts.pending(plan_batches([len(prompt) for prompt in prompts], size), asked, generation.samples)
    if parts.passed_over:
        run.note(f"{parts.passed_over} rows on disk are damaged or of another policy: their questions are answered again")
    todo = sum(len(batch) for _, batch in share)
    run.say(f"answering {todo} questions in batches of {size}, at most {generation.max_new_tokens} tokens each")
    with answering(todo):
        for indices, completions, _ in engine_batches(config.engine, policy, prompts, sampling, tokenizer, share):
            parts.append(
                grade_completion(
                    asked[i],
                    sample,
                    tokenizer.decode(one.ids, skip_special_tokens=True),
                    one.finish,
                    len(one.ids),
                    parts.grader,
                )
                for i, samples in zip(indices, completions, strict=True)
                for sample, one in enumerate(samples)
            )
            answering.finished(len(indices))
            run.beat()


def policy_key(run: Run) -> str:
    """What tells this run's answers from those of another model, adapter or setting."""
    manifest = run.manifest
    return sha256_text(f"{manifest.config_sha256} {manifest.adapter_sha256} {manifest.model.get('fingerprint')}")[:16]


def batch_size(config: EvalConfig, prompts: list[list[int]], policy: Any, run: Run) -> int:
    """The batch size, chosen once and kept in the manifest: with another one some logits would round differently."""
    from posttrain.generation.engines import auto_batch_size

    size = config.generation.batch_size
    if size == "auto":
        longest = max(map(len, prompts)) + config.generation.max_new_tokens
        size = run.manifest.batch_size or auto_batch_size(policy, longest, config.generation.samples, num_processes())
    run.record(batch_size=size)
    return size


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(folder: Path, predictions: list[Prediction]) -> dict[str, Any]:
    """results.json, made of questions, predictions and manifest alone; the numbers on the console.

    Nothing in results.json depends on how often the run was interrupted: the manifest alone has the run's times and command.
    """
    manifest = read_manifest(folder)
    questions = list(read_rows(folder / "questions.jsonl"))
    data = manifest.data
    results = summary.summarize(questions, predictions, dataset=data["name"], limit=manifest.limit, dataset_size=data["size"])
    results["provenance"] = {key: getattr(manifest, key) for key in PROVENANCE}
    results["prompts_sha256"] = sha256_text("".join(question["prompt_sha256"] for question in questions))
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(headline(manifest.name, results))
    print(f"wrote {folder}; next, with other evaluations of these questions: python -m posttrain.report {folder}")
    return results


def tell_trackers(
    config: EvalConfig,
    adapter: Path | None,
    run: Run,
    asked: list[Example],
    predictions: list[Prediction],
    results: dict[str, Any],
) -> None:
    """The numbers and some completions, at the last step of the training that made the adapter."""
    made_in = run_of(adapter) if adapter else None
    made = read_manifest(made_in) if made_in else None
    run.track(config.tracking, config.model_dump(mode="json"), made)
    step, title = (made and made.steps) or 0, f"test/{results['dataset']}"
    run.trackers.row(step, {f"{title}/{name}": value for name, value in summary.numbers(results).items()})
    questions = {example.id: example for example in asked}
    rows = []
    for row in predictions[:TRACKED]:
        example = questions[row.id]
        told = {"question": example.question, "completion": row.completion, "value": row.value, "gold": example.answer}
        rows.append(told | {"correct": row.correct, "finish": row.finish})
    run.trackers.table(title, step, rows)


def headline(name: str, results: dict[str, Any]) -> str:
    lenient, strict = results["accuracy"]["lenient"], results["accuracy"]["strict"]
    subset = f" ({results['subset']})" if results["subset"] else ""
    return (
        f"{name}: {summary.with_interval(lenient)} of {results['n']} on {results['dataset']}{subset}; "
        f"strict {strict['value']:.2%}, format {results['format_ok']['value']:.2%}, truncated {results['truncated']['value']:.2%}"
    )


def regrade(folder: Path) -> None:
    """Every verdict and number again, from questions.jsonl and predictions.jsonl; no model is loaded.

    Raises:
        UserError: there is no finished evaluation, or questions or completions are not those that it ended with.
    """
    if not all((folder / name).is_file() for name in ("manifest.json", "questions.jsonl", "predictions.jsonl")):
        raise UserError(f"{folder} holds no finished evaluation: run it without --regrade first")
    rows = read_jsonl(folder / "predictions.jsonl", Prediction)
    check_contents(folder, read_manifest(folder), rows)
    examples = {
        row["id"]: Example(row["id"], row["split"], row["question"], [], [], row["answer"], row["num_steps"])
        for row in read_rows(folder / "questions.jsonl")
    }
    if unknown := {row.id for row in rows} - examples.keys():
        raise UserError(f"{folder}/predictions.jsonl answers {min(unknown)}, which questions.jsonl does not ask: restore both")
    grader = grader_of(read_manifest(folder).data.get("answer"))
    predictions = [regraded(row, examples[row.id], grader) for row in rows]
    with alone(folder, "run_dir", appears=False):
        write_jsonl(folder / "predictions.jsonl", predictions)
        write_results(folder, predictions)


if __name__ == "__main__":
    exit_on_user_error(main)
