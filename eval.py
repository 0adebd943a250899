"""Score checkpoints with Rouge-L, say how, and turn many runs into one table and one picture.

    python eval.py runs/<name> gpt2 --data dolly self-inst --greedy        # checkpoints: runs, folders, hub ids, adapters
    python eval.py runs/<name> --teacher path/to/teacher                   # how much of the teacher's distribution it has
    python eval.py runs/* --compare --baseline fkl                         # methods over training seeds, with intervals

A published Rouge-L depends on decoding options that papers seldom state, so the protocol is printed and stored with every
score. `--paper` (the default) is that of the published KD results on Dolly: sampling at temperature 1 from the whole
distribution, no 6-gram twice, 256 new tokens, the mean over five decoding seeds. `--greedy` is one deterministic pass.
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import peft
import torch
import transformers
import tyro
from tqdm.auto import tqdm

import okd
from okd import UserError

# name: (dataset repository on the hub, file, rows used)
SETS = {
    "dolly": ("MiniLLM/dolly", "valid.jsonl", None),
    "self-inst": ("MiniLLM/self-inst", "valid.jsonl", None),
    "vicuna": ("MiniLLM/Vicuna", "valid.jsonl", None),
    "sinst": ("MiniLLM/sinst", "11_/valid.jsonl", None),  # references of 11 or more words
    "uinst": ("MiniLLM/uinst", "11_/valid.jsonl", 10_000),
}


@dataclass
@okd.documented
class Args:
    """Score checkpoints with Rouge-L; print the protocol, one table, and write results.json beside each checkpoint."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders (their student), model folders, hub ids, or PEFT adapters (on the base that their config names)"""
    data: tuple[str, ...] = ("dolly",)
    """dolly, self-inst, vicuna, sinst, uinst (from the hub), demo (okd.py's test split), or paths of JSONL files"""
    limit: int | None = None
    """score the first so many rows of each set"""

    # -- protocol --
    paper: bool = False
    """preset: sample at temperature 1, no_repeat_ngram_size 6, seeds 10 20 30 40 50 (the default)"""
    greedy: bool = False
    """preset: one deterministic pass, no n-gram ban"""
    temperature: float = 1.0
    """of sampling"""
    top_p: float = 1.0
    """sample from the smallest set of tokens with this mass"""
    top_k: int = 0
    """sample from the so many likeliest tokens; 0: from all"""
    no_repeat_ngram_size: int | None = None
    """no n-gram of this size twice in prompt and answer; 0: no ban (6 with --paper, 0 with --greedy)"""
    seeds: tuple[int, ...] | None = None
    """decoding seeds (10 20 30 40 50; none with --greedy)"""
    max_new_tokens: int = 256
    """longest answer"""
    max_prompt_length: int = 256
    """longer prompts lose their beginning, and are counted"""

    # -- more than a score --
    teacher: str | None = None
    """compare every checkpoint's distribution with this model's, on gold text and on the checkpoint's own"""
    compare: bool = False
    """group the runs by method over training seeds; write comparison.md, comparison.json and comparison.png"""
    baseline: str | None = None
    """with --compare: the method that the others are paired with (unset: the first run's)"""
    output_dir: str = "results"
    """where --compare writes, and where the results of hub ids are kept"""
    show: int = 0
    """print so many answers of all checkpoints side by side"""
    track: bool = False
    """put scores, the comparison and its figure on the runs' wandb pages"""

    # -- hardware --
    batch_size: int = 32
    """prompts at once"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    precision: okd.Precision = "auto"
    """of weights and activations"""
    trust_remote_code: bool = False
    """run code that a model repository brings along; off unless you read that code"""


def protocol_of(args):
    """Flags -> everything that a score depends on besides checkpoint, set and seed. Raises UserError."""
    if args.paper and args.greedy:
        raise UserError("--paper and --greedy are two protocols: choose one")
    if args.greedy and args.seeds:
        raise UserError("--seeds change nothing with --greedy")
    if not args.checkpoints:
        raise UserError("name at least one checkpoint: a run folder, a model folder or a hub id")
    for name, low in dict(max_new_tokens=1, max_prompt_length=1, limit=1, batch_size=1, no_repeat_ngram_size=0, top_k=0, show=0).items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}; it must be above 0 (for the argmax: --greedy)")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p is {args.top_p}; it must lie in (0, 1]")
    ban = args.no_repeat_ngram_size if args.no_repeat_ngram_size is not None else 0 if args.greedy else 6
    sampling = {} if args.greedy else dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    return dict(decoding="greedy" if args.greedy else "sampling", **sampling, no_repeat_ngram_size=ban,
                max_new_tokens=args.max_new_tokens, max_prompt_length=args.max_prompt_length)  # fmt: skip


def decoding_seeds(args):
    """One pass per seed; the single greedy pass has none."""
    return [None] if args.greedy else list(args.seeds or (10, 20, 30, 40, 50))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and sets
# ---------------------------------------------------------------------------------------------------------------------


def model_folder(checkpoint):
    """A run folder stands for its student. Raises UserError for a run that has none."""
    folder = pathlib.Path(checkpoint)
    if (folder / "student").is_dir():
        return str(folder / "student")
    if (folder / "args.json").exists():
        raise UserError(f"{checkpoint} is a run without a student: it has not ended")
    okd.check_source(checkpoint)
    if folder.is_dir() and not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise UserError(f"{checkpoint} is neither a run folder nor a model: it has no config.json")
    return checkpoint


def run_folder(checkpoint):
    """The run that a checkpoint belongs to, or None."""
    folder = pathlib.Path(checkpoint)
    return next((f for f in (folder, folder.parent) if (f / "args.json").exists()), None)


def results_path(checkpoint, args):
    """results.json of a run's student lies in the run's folder, of another local model in its own, of a hub id below results/."""
    folder = pathlib.Path(model_folder(checkpoint))
    if folder.name == "student" and run_folder(folder):
        return folder.parent / "results.json"
    return (folder if folder.is_dir() else pathlib.Path(args.output_dir) / checkpoint) / "results.json"


def load_checkpoint(source, args, hw):
    """-> (model in eval mode on the device, tokenizer). An adapter is put on the base that its config names."""
    if not (pathlib.Path(source) / "adapter_config.json").exists():
        model = okd.load_model(source, "checkpoint", args, hw.dtype)
        return model.to(hw.device), okd.load_tokenizer(source, args)
    base = json.loads((pathlib.Path(source) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{source}: adapter_config.json names no base model")
    model = okd.load_model(base, "adapter's base", args, hw.dtype)
    model = peft.PeftModel.from_pretrained(model, source).merge_and_unload()
    return model.eval().to(hw.device), okd.load_tokenizer(base, args)


def load_rows(source, args):
    """A set's name or a JSONL path -> (line number, object) rows."""
    if source == "demo":
        rows = okd.demo_splits()["test"]
    elif source in SETS:
        repo, file, most = SETS[source]
        rows = okd.read_jsonl(okd.hub_file(repo, file))[:most]
    else:
        if not os.path.exists(source):
            raise UserError(f"no data set or file {source}: give one of {', '.join([*SETS, 'demo'])}, or a path of a JSONL file")
        rows = okd.read_jsonl(source)
    if not rows:
        raise UserError(f"{source}: no rows")
    return rows[: args.limit]


def examples_of(rows, tokenizer, source, limit):
    """Rows -> (Examples whose response is the first reference and EOS, how many prompts were cut)."""
    examples, cut = [], 0
    for number, row in rows:
        text, answers, ids = okd.read_prompt(number, row, tokenizer, source)
        if not ids:
            raise UserError(f"{source}, line {number}: the prompt is empty")
        cut += len(ids) > limit
        response_ids = tokenizer(answers[0], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        examples.append(okd.Example(text, answers, ids[-limit:], response_ids))
    return examples, cut


def fits(example, model):
    """The example cut to the model's positions; a gold text may be longer than any answer."""
    room = okd.positions(model) - len(example.prompt_ids)
    return example if len(example.response_ids) <= room else dataclasses.replace(example, response_ids=example.response_ids[:room])


# ---------------------------------------------------------------------------------------------------------------------
# Answers and their score. What is written is kept, row by row, so an interrupted evaluation goes on where it stopped
# ---------------------------------------------------------------------------------------------------------------------


def answer(model, tokenizer, examples, protocol, seed, hw, batch_size, path, label):
    """One decoding pass -> one record per row: prompt, reference, output, score, ids. Kept in `path` batch by batch.

    The seed of a batch depends on its place alone, so an evaluation that was interrupted writes what an unbroken one does."""
    options = {name: protocol[name] for name in ("temperature", "top_p", "top_k", "no_repeat_ngram_size") if name in protocol}
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt_ids))
    records = kept_records(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, tqdm(total=len(examples), initial=len(records), desc=label, disable=not sys.stderr.isatty()) as bar:
        for number, start in enumerate(range(0, len(order), batch_size)):
            batch = order[start : start + batch_size]
            if all(i in records for i in batch):
                continue
            ids = okd.generate(model, tokenizer, [examples[i].prompt_ids for i in batch], hw, protocol["max_new_tokens"], batch_size,
                               sample=protocol["decoding"] == "sampling", seed=okd.part_seed(seed or 0, number), **options)  # fmt: skip
            for i, response in zip(batch, ids):
                text = tokenizer.decode(response, skip_special_tokens=True).strip()
                score = okd.rouge_l(text, examples[i].references)
                records[i] = dict(row=i, prompt=examples[i].prompt, reference=examples[i].references[0], output=text, score=score, ids=response)
            file.write("".join(json.dumps(records[i]) + "\n" for i in batch))
            file.flush()
            bar.update(len(batch))
    return [records[i] for i in range(len(examples))]


def kept_records(path):
    """{row: record} of one decoding pass; a row that an interruption had written twice is there once."""
    return {record["row"]: record for record in okd.whole_lines(path)}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    okd.write_text(path, json.dumps(value, indent=2) + "\n")


def read_results(path):
    try:
        results = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(results, list) or not all(isinstance(r, dict) and "key" in r for r in results):
            raise ValueError("not a list of results")
        return results
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({okd.one_line(error)[:80]}): delete it, it is written anew") from error


def evaluate_checkpoint(checkpoint, sets, protocol, args, hw, teacher):
    """-> one result per set, from results.json where it is finished already; the rest is generated, scored and stored."""
    source, path = model_folder(checkpoint), results_path(checkpoint, args)
    seeds = decoding_seeds(args)
    stored, loaded, mine = {result["key"]: result for result in read_results(path)}, None, []
    for name, rows in sets.items():
        model_key = okd.short_hash([okd.fingerprint(source), [row for _, row in rows], protocol, str(hw.dtype), hw.device.type, args.batch_size])
        key = okd.short_hash([model_key, seeds, args.teacher and okd.fingerprint(args.teacher)])
        folder = path.parent / "generations"
        if key not in stored or not all((folder / f).exists() for f in stored[key]["generations"]):
            model, tokenizer = loaded = loaded or load_checkpoint(source, args, hw)
            examples, cut = examples_of(rows, tokenizer, name, args.max_prompt_length)
            room = okd.positions(model) - max(len(example.prompt_ids) for example in examples)
            if room < protocol["max_new_tokens"]:
                print(f"{checkpoint} on {name}: answers end at {room} new tokens, where the model's positions do")
            start, passes, files = time.perf_counter(), [], []
            for seed in seeds:
                file = f"{okd.short_name(name)}-{model_key}-{'greedy' if seed is None else f'seed{seed}'}.jsonl"
                label = f"{pathlib.PurePath(checkpoint).name} {name}" + ("" if seed is None else f" seed {seed}")
                passes.append(answer(model, tokenizer, examples, protocol, seed, hw, args.batch_size, folder / file, label))
                files.append(file)
            scores = [statistics.fmean(record["score"] for record in records) for records in passes]
            stored[key] = dict(
                key=key, data=name, rouge_l=statistics.fmean(scores), std=statistics.stdev(scores) if len(scores) > 1 else None,
                scores=scores, seeds=seeds, rows=len(rows), cut_prompts=cut,
                empty_outputs=sum(not record["output"] for records in passes for record in records),
                seconds=time.perf_counter() - start, protocol=protocol, dtype=str(hw.dtype), generations=files,
            )  # fmt: skip
            if teacher is not None:
                stored[key]["distribution"] = distribution(args, model, teacher, tokenizer, examples, passes[0], protocol, hw)
            write_json(path, list(stored.values()))
        mine.append(stored[key])
    return mine


# ---------------------------------------------------------------------------------------------------------------------
# How much of the teacher's distribution the student has
# ---------------------------------------------------------------------------------------------------------------------

TOP_K = (5, 10, 50)
ENTROPY_BINS = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)  # of the teacher, nats
LENGTHS = (10, 25, 50, 100, 150, 200, 250)  # where exposure bias is read


def token_metrics(p_logits, q_logits):
    """(N, V) logits of teacher and student -> {name: (N,)}. KLs and entropies in nats, everything else a share."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    teacher_entropy = -(p * log_p).sum(-1)
    metrics = dict(fkl=okd.kl(log_p, log_q), rkl=okd.kl(log_q, log_p), jsd=okd.jsd(p_logits, q_logits, 0.5), tvd=okd.tvd(p_logits, q_logits),
                   top1_agreement=(p.argmax(-1) == q.argmax(-1)).to(p), teacher_entropy=teacher_entropy,
                   entropy_gap=-(q * log_q).sum(-1) - teacher_entropy)  # fmt: skip
    for k in TOP_K:
        k_ = min(k, p.shape[-1])
        top_p, top_q = p.topk(k_, -1).indices, q.topk(k_, -1).indices
        metrics[f"top{k}_overlap"] = (top_p[:, :, None] == top_q[:, None, :]).any(-1).to(p).mean(-1)
        metrics[f"top{k}_mass"] = q.gather(-1, top_p).sum(-1)  # what q gives to p's likeliest tokens
        metrics[f"top{k}_mass_teacher"] = p.gather(-1, top_p).sum(-1)
    metrics["tail_mass"] = 1 - metrics[f"top{TOP_K[-1]}_mass"]  # what q gives to all others
    metrics["tail_mass_teacher"] = 1 - metrics[f"top{TOP_K[-1]}_mass_teacher"]
    return metrics


@torch.no_grad()
def measure_texts(model, teacher, tokenizer, examples, hw, tokens=4096):
    """Examples -> list of {name: (n,) values of its response tokens}, one dict per example, in order."""
    vocab, found = min(okd.head_rows(model), okd.head_rows(teacher)), [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    while order:
        size = max(1, tokens // len(examples[order[-1]]))
        order, part = order[:-size], order[-size:]
        chunks = []

        def keep(p0_logits, p_logits, q_logits, labels, rollout, chunks=chunks):
            chunks.append(token_metrics(p_logits, q_logits))
            return {}

        okd.run_batch(model, teacher, okd.collate([examples[i] for i in part], tokenizer.pad_token_id).to(hw.device), vocab, hw, keep)
        lengths = [len(examples[i].response_ids) for i in part]
        columns = {name: torch.cat([chunk[name] for chunk in chunks]).cpu().split(lengths) for name in chunks[0]}
        for row, i in enumerate(part):
            found[i] = {name: values[row] for name, values in columns.items()}
    return found


def summary(rows):
    """Token means over all rows, and the KLs by bins of the teacher's entropy."""
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    means = {name: values.mean().item() for name, values in columns.items()}
    bins = []
    for low, high in zip(ENTROPY_BINS, ENTROPY_BINS[1:]):
        inside = (columns["teacher_entropy"] >= low) & (columns["teacher_entropy"] < high)
        values = {name: columns[name][inside].mean().item() for name in ("fkl", "rkl", "tvd", "top1_agreement")} if inside.any() else {}
        bins.append(dict(teacher_entropy_from=low, teacher_entropy_below=None if high == math.inf else high, tokens=int(inside.sum()), **values))
    return dict(tokens=len(columns["fkl"]), **means, by_teacher_entropy=bins)


def excess_error(own, oracle, lengths=LENGTHS):
    """Exposure bias: (R(l) - l eps(l)) / (l eps(l)) in percent, at several lengths l. Gu et al. 2023 (MiniLLM), section 3.3.

    R(l) = sum_{t <= l} E KL(p || q) along the student's own text; l eps(l) the same along the teacher's. 0: the student errs on
    its own text no more than on the teacher's. own, oracle: lists of (n,) KLs; a position counts the rows that reach it."""

    def accumulated(rows):
        longest, totals, total = max(map(len, rows)), [], 0.0
        for t in range(longest):
            there = [row[t].item() for row in rows if len(row) > t]
            total += sum(there) / len(there)
            totals.append(total)
        return totals

    own, oracle = accumulated(own), accumulated(oracle)
    return {length: 100 * (own[length - 1] / oracle[length - 1] - 1) for length in lengths if length <= min(len(own), len(oracle))}


def distribution(args, model, teacher, tokenizer, examples, records, protocol, hw):
    """Comparison with the teacher on gold text and on the student's own, and the exposure bias."""
    teacher_model, teacher_tokenizer = teacher
    okd.check_same_tokenizer(teacher_tokenizer, tokenizer)
    gold = measure_texts(model, teacher_model, tokenizer, [fits(example, model) for example in examples], hw)
    write = lambda ids: [dataclasses.replace(e, response_ids=i) for e, i in zip(examples, ids) if i]  # noqa: E731
    own = measure_texts(model, teacher_model, tokenizer, write([record["ids"] for record in records]), hw)
    oracle_ids = okd.generate(teacher_model, tokenizer, [e.prompt_ids for e in examples], hw, protocol["max_new_tokens"], args.batch_size, sample=True, seed=0)
    oracle = measure_texts(model, teacher_model, tokenizer, write(oracle_ids), hw)
    return dict(teacher=args.teacher, gold=summary(gold), own=summary(own),
                excess_error_percent=excess_error([row["fkl"] for row in own], [row["fkl"] for row in oracle]))  # fmt: skip


def print_distribution(results):
    names = ("fkl", "rkl", "jsd", "tvd", "top1_agreement", "top10_overlap", "top50_mass", "entropy_gap", "tail_mass")
    rows = [(checkpoint, result["data"], text, *(f"{result['distribution'][text][name]:.3f}" for name in names))
            for checkpoint, mine in results.items() for result in mine for text in ("gold", "own")]  # fmt: skip
    print("\n" + okd.format_table(("checkpoint", "set", "text", *names), rows))
    for checkpoint, mine in results.items():
        for result in mine:
            errors = result["distribution"]["excess_error_percent"]
            print(f"{checkpoint} on {result['data']}: excess accumulated error, % by length: "
                  + (", ".join(f"{length}: {value:.1f}" for length, value in errors.items()) or "texts too short"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of runs
# ---------------------------------------------------------------------------------------------------------------------

NOT_SETTINGS = okd.CHANGEABLE | {"seed", "log_every", "eval_every", "eval_rows", "score_rows"}


def read_run(checkpoint):
    """A run folder -> its flags and what it logged. Raises UserError."""
    folder = run_folder(checkpoint)
    if folder is None:
        raise UserError(f"--compare needs run folders of okd.py; {checkpoint} has no args.json")
    try:
        flags = json.loads((folder / "args.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        flags["method"], flags["seed"]
        trained = [line for line in lines if line["phase"] == "distil" and "train/tokens_per_s" in line]
        final = next(line for line in reversed(lines) if line["phase"] == "final")
        costs = dict(seconds=final["time/distil_s"], sampling_s=final["time/sampling_s"],
                     tokens_per_s=statistics.median(line["train/tokens_per_s"] for line in trained),
                     peak_memory_gb=max(line["train/peak_memory_gb"] for line in trained))  # fmt: skip
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise UserError(f"{folder}: args.json or metrics.jsonl is missing, damaged or unfinished ({type(error).__name__}: {okd.one_line(error)[:80]})") from error
    curve = [(line["step"], line["dev/fkl"]) for line in lines if line["phase"] == "distil" and "dev/fkl" in line]
    return dict(folder=folder, flags=flags, costs=costs, curve=curve)


def group_runs(runs):
    """Runs -> {label: runs that differ in nothing but the training seed}. A label is the method, and what tells its groups apart."""
    groups = {}
    for run in runs:
        alike = [other for other in runs if other["flags"]["method"] == run["flags"]["method"]]
        names = [name for name in run["flags"] if name not in NOT_SETTINGS and any(other["flags"].get(name) != run["flags"][name] for other in alike)]
        label = " ".join([run["flags"]["method"], *(f"{name}={run['flags'][name]}" for name in names)])
        groups.setdefault(label, []).append(run)
    return groups


def row_scores(run, result):
    """(rows,) scores of a run, the mean over its decoding seeds."""
    passes = [kept_records(run["results"].parent / "generations" / file) for file in result["generations"]]
    return [statistics.fmean(records[row]["score"] for records in passes) for row in range(result["rows"])]


def bootstrap(differences, draws=2000, seed=0):
    """Differences, a list of rows for every training seed -> (mean, low, high): 95 % percentile interval, seeds and rows resampled."""
    rng, values = random.Random(seed), []
    for _ in range(draws):
        seeds = rng.choices(differences, k=len(differences))
        rows = rng.choices(range(len(differences[0])), k=len(differences[0]))
        values.append(sum(rowwise[i] for rowwise in seeds for i in rows) / (len(seeds) * len(rows)))
    values.sort()
    mean = statistics.fmean(value for rowwise in differences for value in rowwise)
    return mean, values[int(0.025 * draws)], values[int(0.975 * draws) - 1]


def compare(args, results):
    """Runs and their results -> comparison.md, .json and, with matplotlib, .png in --output-dir. -> the markdown."""
    runs = [read_run(checkpoint) | dict(mine=mine, results=results_path(checkpoint, args)) for checkpoint, mine in results.items()]
    groups = group_runs(runs)
    baseline = next((label for label, members in groups.items() if args.baseline in (label, members[0]["flags"]["method"])), None)
    if args.baseline and baseline is None:
        raise UserError(f"--baseline {args.baseline}: no such method among the runs, which are {', '.join(groups)}")
    baseline = baseline or next(iter(groups))
    comparison, markdown = [], []
    for index, name in enumerate(args.data):
        scored = {label: {run["flags"]["seed"]: row_scores(run, run["mine"][index]) for run in members} for label, members in groups.items()}
        rows = []
        for label, members in groups.items():
            means = [run["mine"][index]["rouge_l"] for run in members]
            decoding = [run["mine"][index]["std"] for run in members if run["mine"][index]["std"] is not None]
            costs = {cost: statistics.fmean(run["costs"][cost] for run in members) for cost in members[0]["costs"]}
            entry = dict(data=name, method=label, training_seeds=sorted(scored[label]), rouge_l=statistics.fmean(means),
                         std_training=statistics.stdev(means) if len(means) > 1 else None,
                         std_decoding=statistics.fmean(decoding) if decoding else None, **costs)  # fmt: skip
            common = sorted(scored[label].keys() & scored[baseline].keys())
            verdict = "baseline"
            if label != baseline and common:
                differences = [[a - b for a, b in zip(scored[label][seed], scored[baseline][seed])] for seed in common]
                mean, low, high = bootstrap(differences)
                entry |= dict(difference=mean, interval=[low, high], paired_seeds=common, distinguishable=not low <= 0 <= high)
                verdict = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + (" not distinguishable" if low <= 0 <= high else "")
            elif label != baseline:
                verdict = "no training seed in common"
            comparison.append(entry)
            show = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
            rows.append((label, len(members), show(entry["rouge_l"]), show(entry["std_training"]), show(entry["std_decoding"]), verdict,
                         f"{costs['seconds']:.1f}", f"{costs['sampling_s']:.1f}", f"{costs['tokens_per_s']:.0f}", f"{costs['peak_memory_gb']:.2f}"))  # fmt: skip
        header = ("method", "runs", "Rouge-L", "± training", "± decoding", f"against {baseline} (95 %)", "training s", "sampling s", "tokens/s", "peak GB")
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
        protocol = ", ".join(f"{key} {value}" for key, value in runs[0]["mine"][index]["protocol"].items())
        markdown += [f"### {name}: {runs[0]['mine'][index]['rows']} rows, {protocol}", "", *lines, ""]
    markdown.append("± training: standard deviation over training seeds; ± decoding: over decoding seeds of one checkpoint, averaged. "
                    "Differences are paired by training seed and row; the interval is a bootstrap over both.")  # fmt: skip
    folder = pathlib.Path(args.output_dir)
    write_json(folder / "comparison.json", comparison)
    (folder / "comparison.md").write_text("\n".join(markdown) + "\n")
    draw(groups, comparison, args.data[0], folder / "comparison.png")
    return "\n".join(markdown), comparison


def draw(groups, comparison, name, path):
    """Quality against training time, and the learning curves. Without matplotlib: a line that says so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no figure: matplotlib is not installed")
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for number, (label, members) in enumerate(groups.items()):
        style = dict(color=f"C{number % 10}", marker="osD^v"[number // 10 % 5])
        entry = next(entry for entry in comparison if entry["method"] == label and entry["data"] == name)
        left.errorbar(entry["seconds"], entry["rouge_l"], yerr=entry["std_training"] or 0, capsize=3, label=label, **style)
        left.annotate(label, (entry["seconds"], entry["rouge_l"]), textcoords="offset points", xytext=(6, 5), fontsize=8)
        curves = [dict(run["curve"]) for run in members]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        right.plot(steps, [statistics.fmean(curve[step] for curve in curves) for step in steps], label=label, markersize=3, **style)
    left.set(xlabel="training time, s", ylabel=f"Rouge-L on {name}", title="quality against cost (bars: training seeds)")
    right.set(xlabel="step", ylabel="dev KL(p_0 ‖ q), nats per token", title="learning curves (mean over training seeds)")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def track(args, results, comparison):
    """Scores, the comparison and its figure onto the wandb pages of the runs. Runs that were not tracked are named."""
    import wandb

    for checkpoint, mine in results.items():
        folder = run_folder(checkpoint)
        page = folder / "wandb.json" if folder else None
        if page is None or not page.exists():
            print(f"{checkpoint}: was not tracked, so there is no wandb page to put its scores on")
            continue
        run = wandb.init(**json.loads(page.read_text()), resume="allow", dir=str(folder))
        for result in mine:
            run.summary[f"eval/{okd.short_name(result['data'])}/{result['protocol']['decoding']}/rouge_l"] = result["rouge_l"]
        if comparison:
            run.log({"comparison": wandb.Table(list(comparison[0]), [[str(entry.get(k)) for k in comparison[0]] for entry in comparison])})
            figure = pathlib.Path(args.output_dir) / "comparison.png"
            if figure.exists():
                run.log({"comparison_figure": wandb.Image(str(figure))})
        run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def show_answers(args, results):
    """--show: the first answers of every checkpoint, side by side."""
    for index, name in enumerate(args.data):
        texts = {checkpoint: kept_records(results_path(checkpoint, args).parent / "generations" / mine[index]["generations"][0])
                 for checkpoint, mine in results.items()}  # fmt: skip
        first = next(iter(texts.values()))
        for record in [first[row] for row in range(min(args.show, len(first)))]:
            print(f"\n[{name} {record['row'] + 1}] {record['prompt'].strip()}\n  reference: {record['reference']}")
            for checkpoint, records in texts.items():
                print(f"  {checkpoint} ({records[record['row']]['score']:.1f}): {records[record['row']]['output']}")


def evaluate(args):
    protocol = protocol_of(args)
    hw = okd.pick_hardware(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sets = {source: load_rows(source, args) for source in args.data}
    for checkpoint in args.checkpoints:
        model_folder(checkpoint)
        read_results(results_path(checkpoint, args))
        if args.compare:
            read_run(checkpoint)
    seeds = "" if args.greedy else f", seeds {' '.join(map(str, decoding_seeds(args)))}"
    print("protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()) + seeds
          + "; Rouge-L F x 100 with stemmer, best reference")  # fmt: skip
    teacher = load_checkpoint(model_folder(args.teacher), args, hw) if args.teacher else None

    results = {checkpoint: evaluate_checkpoint(checkpoint, sets, protocol, args, hw, teacher) for checkpoint in args.checkpoints}
    table = [(checkpoint, result["data"], f"{result['rouge_l']:.2f}" + ("" if result["std"] is None else f" ± {result['std']:.2f}"), result["rows"],
              result["cut_prompts"], result["empty_outputs"], f"{result['seconds']:.1f}") for checkpoint, mine in results.items() for result in mine]  # fmt: skip
    print(okd.format_table(("checkpoint", "set", "Rouge-L", "rows", "cut prompts", "empty outputs", "seconds"), table))
    if len(decoding_seeds(args)) > 1:
        print("± is the standard deviation over decoding seeds of one checkpoint, not over training seeds.")
    if args.teacher:
        print_distribution(results)
    comparison = None
    if args.compare:
        markdown, comparison = compare(args, results)
        print(f"\n{markdown}\nwritten to {args.output_dir}/comparison.md, comparison.json, comparison.png")
    show_answers(args, results)
    if args.track:
        track(args, results, comparison)


def main(argv=None):
    okd.run_command(evaluate, Args, "eval.py", argv)


if __name__ == "__main__":
    main()
