"""Scores checkpoints with Rouge-L, says by which protocol, and compares runs of okd.py.

    python eval.py runs/* --compare                          # methods over their training seeds
    python eval.py runs/* --compare --data dolly self-inst   # the same on other test sets
    python eval.py runs/NAME gpt2 --greedy                   # runs, folders, hub ids, adapters
    python eval.py runs/* --teacher TEACHER                  # how close each comes to the teacher

A Rouge-L depends on decoding options that papers seldom state, so the protocol is printed and
stored with every score. --paper (the default) is the protocol of the published results on Dolly;
--greedy is a single deterministic pass. --teacher gives the analysis of Rao et al. 2024
(arXiv:2409.12512), figures 2 and 5, and the exposure bias.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Literal

import numpy as np
import torch
import transformers
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import okd

SETS = {  # repository on the hub, file; 11_: references of 11 or more words
    "dolly": ("MiniLLM/dolly", "valid.jsonl"),
    "self-inst": ("MiniLLM/self-inst", "valid.jsonl"),
    "vicuna": ("MiniLLM/Vicuna", "valid.jsonl"),
    "sinst": ("MiniLLM/sinst", "11_/valid.jsonl"),
    "uinst": ("MiniLLM/uinst", "11_/valid.jsonl"),
}


@dataclass
class Args:
    """Score checkpoints with Rouge-L, and compare runs of okd.py."""

    # run folders, model folders, hub ids or PEFT adapters; a run stands for its student
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    # test sets: dolly, self-inst, vicuna, sinst, uinst, demo, or JSONL files. Without this flag:
    # the test rows that a run of okd.py --data has kept, the demo's for a run of the demo, or dolly
    data: tuple[str, ...] = ()
    limit: int | None = None  # score only the first LIMIT rows of each set
    # -- protocol --
    paper: bool = False  # what holds unless another protocol is given: temperature 1, five seeds
    greedy: bool = False  # one deterministic pass, repetition allowed
    temperature: float = 1.0  # sampling temperature
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability mass
    top_k: int = 0  # sample from the TOP_K likeliest tokens; 0: from all
    # no n-gram of this length comes twice in prompt and answer; 0: no ban. Unset: 6; greedy: 0
    no_repeat_ngram_size: int | None = None
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)  # decoding seeds; the score is their mean
    max_new_tokens: int = 256  # longest answer
    max_prompt_length: int = 256  # longer prompts lose their beginning, and are counted
    # -- analysis --
    compare: bool = False  # compare methods over training seeds, with intervals and a figure
    baseline: str | None = None  # label or method to compare with; unset: that of the first run
    teacher: str | None = None  # compare with this fine-tuned teacher, or with that of this run
    show: int = 0  # print the first SHOW answers of all checkpoints
    track: bool = False  # add the scores to the wandb pages of tracked runs
    output_dir: str = "results"  # comparison and figures, and results of hub ids
    # -- hardware --
    sample_batch_size: int = 64  # prompts answered at once
    micro_batch_tokens: int = 4096  # tokens at once through checkpoint and teacher
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of weights and activations


SAMPLING = ("temperature", "top_p", "top_k")
OPTIONS = (*SAMPLING, "no_repeat_ngram_size")  # of generate()


def check_flags(args):
    if args.paper and args.greedy:
        raise okd.UserError("--paper and --greedy are two protocols: choose one")
    fixed = ()
    if args.paper or args.greedy:
        fixed = (*SAMPLING, "seeds")
    if args.paper:
        fixed = (*OPTIONS, "seeds")
    for name in fixed:
        if getattr(args, name) != getattr(Args, name):
            flag = name.replace("_", "-")
            raise okd.UserError(f"--{flag} does not go with --paper or --greedy")
    sizes = [args.max_prompt_length, args.max_new_tokens, args.sample_batch_size]
    if args.limit is not None:
        sizes.append(args.limit)
    if min(sizes) < 1:
        raise okd.UserError("limit, lengths and batch size must be at least 1")
    if not args.seeds or len({*args.seeds}) < len(args.seeds):
        raise okd.UserError("--seeds must be one or more different numbers")
    if not 0 < args.top_p <= 1 or args.temperature <= 0:
        raise okd.UserError("--top-p must lie in (0, 1], and --temperature above 0")


def protocol_of(args):
    """Flags -> (all that a score depends on besides checkpoint, set and seed; decoding seeds)."""
    protocol = {"decoding": "greedy" if args.greedy else "sampling"}
    if not args.greedy:
        for name in SAMPLING:
            protocol[name] = getattr(args, name)
    protocol["no_repeat_ngram_size"] = args.no_repeat_ngram_size
    if args.no_repeat_ngram_size is None:
        protocol["no_repeat_ngram_size"] = 0 if args.greedy else 6
    for name in ("max_new_tokens", "max_prompt_length", "limit"):
        protocol[name] = getattr(args, name)
    seeds = [0] if args.greedy else list(args.seeds)  # greedy answers depend on no seed
    return protocol, seeds


# -----------------------------------------------------------------------------
# Files


def read_json(path, by_line=False):
    """The content of a JSON file, or the list of a JSONL file's records. Raises UserError."""
    content = path.read_bytes()
    try:
        if by_line:
            return [json.loads(line) for line in content.splitlines()]
        return json.loads(content)
    except ValueError as error:
        raise okd.UserError(f"{path} is damaged ({error})") from error


@contextlib.contextmanager
def locked(path):
    """The open file, once no other process holds it; a killed process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextlib.contextmanager
def skipping(what):
    """What cannot be scored is named, and the rest is scored."""
    try:
        yield
    except (okd.UserError, OSError, ValueError, LookupError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"skipped: {what}: {message}", file=sys.stderr)


def short_hash(value):
    text = json.dumps(value, sort_keys=True, default=vars)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# -----------------------------------------------------------------------------
# Test sets


@functools.cache
def load_lines(source, limit):
    """Name of a set, or path of a JSONL file -> its lines. Raises UserError."""
    if source == "demo":
        rows = okd.load_data("demo", None, okd.load_tokenizer("demo"), 256, 512).test
        lines = [json.dumps({"prompt": row.prompt, "response": row.references}) for row in rows]
    elif source in SETS:
        lines = okd.hub_lines(*SETS[source])[:10_000]  # of uinst, as in published results
    else:
        lines = okd.read_lines(source)
    return lines[:limit]


def read_examples(source, lines, tokenizer, max_prompt_length):
    """JSON lines -> (Examples, how many prompts were cut to max_prompt_length). Raises UserError.

    The question stands at the end of a prompt, so it is the beginning that goes, but not BOS, which
    begins every text that a model has seen. (Published code drops the end or the row.)
    """
    examples = []
    num_cut = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _, example = okd.read_line(source, number, line, tokenizer)
            ids = example.prompt_ids
            if not ids:
                raise okd.UserError(f"{source}, line {number}: the prompt is empty")
            if len(ids) > max_prompt_length:
                kept = ids[-max_prompt_length:]
                if ids[0] == tokenizer.bos_token_id:
                    kept[0] = ids[0]
                example = replace(example, prompt_ids=kept)
                num_cut += 1
            examples.append(example)
    if not examples:
        raise okd.UserError(f"{source} has no rows")
    return examples, num_cut


# -----------------------------------------------------------------------------
# Checkpoints


@dataclass
class Checkpoint:
    """A model to score, and the run of okd.py that made it, if any."""

    name: str
    label: str  # of the run: method and settings; the name of other models
    source: str  # folder or hub id of the model
    folder: Path  # of results.json and generations/; the run's own
    flags: dict  # args.json of the run; empty for other models
    problem: dict  # of the run, from models.json: digests of models and rows, lengths
    tokenizer: object
    key: list  # what its answers depend on besides prompt, protocol and seed
    hw: object
    batch_size: int
    sets: dict = field(default_factory=dict)  # {name: lines} to score
    results: dict = field(default_factory=dict)  # {name of a set: result}

    @functools.cached_property
    def model(self):  # loaded when needed, which finished evaluations never do
        model = okd.load_model(self.source, "model", self.hw.dtype)
        return model.to(self.hw.device)


def locate(name, output_dir):
    """Checkpoint -> (folder or hub id of its model, folder of its results). Raises UserError."""
    path = Path(name)
    if (path / "args.json").exists():
        if not (path / "student").is_dir():
            raise okd.UserError("the run has not finished: it has no student yet")
        return str(path / "student"), path
    return name, path if path.is_dir() else Path(output_dir, name)


def open_checkpoint(name, args, hw):
    """Everything but the weights. Raises UserError."""
    source, folder = locate(name, args.output_dir)
    flags = {}
    problem = {}
    if (folder / "args.json").exists():
        flags = read_json(folder / "args.json")
        problem = read_json(folder / "models.json")["problem"]
    tokenizer = okd.load_tokenizer(source)
    batch_size = args.sample_batch_size
    key = [okd.fingerprint(source), str(hw.dtype), hw.device.type, batch_size]
    label = flags.get("label", name)
    return Checkpoint(name, label, source, folder, flags, problem, tokenizer, key, hw, batch_size)


def default_sets(checkpoint, limit):
    """{name: lines} of what a checkpoint is scored on without --data."""
    if checkpoint.flags.get("data"):
        lines = load_lines(checkpoint.folder / "test.jsonl", limit)
        return {f"test-{short_hash(lines)}": lines}  # each --data of okd.py has its own
    name = "demo" if checkpoint.flags.get("teacher") == "demo" else "dolly"
    return {name: load_lines(name, limit)}


# -----------------------------------------------------------------------------
# Answers and scores


def stop_ids_of(checkpoint, examples):
    """EOS, the ends of these rows' responses, and the stop tokens that the model's folder names."""
    stop_ids = okd.stop_ids(checkpoint.tokenizer, examples)
    own = checkpoint.model.own_generation_config.eos_token_id
    if own is not None:
        stop_ids += np.ravel(own).tolist()
    return stop_ids


def decode(checkpoint, data, examples, protocol, seed):
    """One decoding pass over a set -> the name of its file in generations/, a line per row.

    The file grows by batches whose random numbers depend on their place alone, so an interrupted
    pass is resumed and ends as an uninterrupted one does.
    """
    size = checkpoint.batch_size
    options = {name: protocol[name] for name in OPTIONS if name in protocol}
    digest = short_hash([checkpoint.key, examples, protocol])
    file_name = f"{Path(data).name}-{protocol['decoding']}-{seed}-{digest}.jsonl"

    # Longest prompts first: if the memory is too small, that shows at once.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids), reverse=True)
    with locked(checkpoint.folder / "generations" / file_name) as file:
        num_done = drop_unfinished_batch(file, size, len(order))
        for start in tqdm(range(num_done, len(order), size), file_name, disable=None):
            rows = order[start : start + size]
            stop_ids = stop_ids_of(checkpoint, examples)
            responses = okd.generate(
                checkpoint.model,
                [examples[row].prompt_ids for row in rows],
                stop_ids,
                checkpoint.hw,
                protocol["max_new_tokens"],
                size,
                do_sample=protocol["decoding"] == "sampling",
                seed=hash((seed, start // size)),
                **options,
            )
            for row, ids in zip(rows, responses, strict=True):
                example = examples[row]
                text_ids = [token for token in ids if token not in stop_ids]
                text = checkpoint.tokenizer.decode(text_ids, skip_special_tokens=True).strip()
                record = {
                    "row": row,
                    "prompt": example.prompt,
                    "reference": example.references[0],
                    "output": text,
                    "score": okd.rouge_l(text, example.references),
                    "ids": ids,
                }
                file.write(json.dumps(record).encode() + b"\n")
            file.flush()
    return file_name


def drop_unfinished_batch(file, size, num_rows):
    """Cuts the file after its last whole batch. Returns the number of rows that it then holds."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    num_done = sum(line.endswith(b"\n") for line in lines)
    if num_done < num_rows:
        num_done -= num_done % size
    file.truncate(len(b"".join(lines[:num_done])))
    return num_done


def read_answers(checkpoint, file_name):
    """The records of one decoding pass, in the order of the set's rows."""
    records = read_json(checkpoint.folder / "generations" / file_name, by_line=True)
    return sorted(records, key=lambda record: record["row"])


def spread(values):
    """Standard deviation; None for less than two values."""
    return stdev(values) if len(values) > 1 else None


def evaluate(checkpoint, data, protocol, seeds, teacher, micro_batch_tokens):
    """Result on one set: from results.json, or decoded, scored and stored there."""
    lines = checkpoint.sets[data]
    longest = protocol["max_prompt_length"]
    examples, num_cut = read_examples(data, lines, checkpoint.tokenizer, longest)
    teacher_key = teacher.key if teacher is not None else None
    key = short_hash([checkpoint.key, examples, protocol, seeds, teacher_key])
    generations = checkpoint.folder / "generations"
    stored = read_results(checkpoint.folder).get(key)
    if stored and all((generations / name).exists() for name in stored["generations"]):
        return stored

    start = time.perf_counter()
    files = [decode(checkpoint, data, examples, protocol, seed) for seed in seeds]
    scores = []
    num_empty = 0
    for file_name in files:
        records = read_answers(checkpoint, file_name)
        scores.append(fmean(record["score"] for record in records))
        num_empty += sum(not record["output"] for record in records)
    result = {
        "key": key,
        "data": data,
        "rouge_l": fmean(scores),
        "std": spread(scores),
        "scores": scores,
        "seeds": seeds,
        "rows": len(examples),
        "cut_prompts": num_cut,
        "empty_outputs": num_empty,
        "seconds": time.perf_counter() - start,
        "protocol": protocol,
        "dtype": str(checkpoint.hw.dtype),
        "generations": files,
    }
    if teacher is not None:
        result["distribution"] = distribution(
            checkpoint, teacher, data, examples, protocol, micro_batch_tokens
        )
    with locked(generations / ".lock"):  # another process may have stored a result meanwhile
        results = read_results(checkpoint.folder)
        results[key] = result
        text = json.dumps(list(results.values()), indent=2)
        okd.write_file(checkpoint.folder / "results.json", text)
    return result


def read_results(folder):
    """{key: result} of results.json."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    return {result["key"]: result for result in read_json(path)}


# -----------------------------------------------------------------------------
# How close a checkpoint is to the teacher (Rao et al. 2024, figures 2 and 5)

LENGTHS = (10, 25, 50, 100, 150, 200, 250)  # where the exposure bias is read
DRAWN = {
    "std": "standard deviation of logits",
    "fkl": "KL(teacher‖student), nats",
    "top1_agreement": "top-1 agreement with the teacher",
}
SHOWN = (*DRAWN, "rkl", "top10_overlap", "entropy_gap")


def token_metrics(log_p, log_q, log_p0, labels):
    """(N, V) log-probabilities of teacher and checkpoint, (N,) tokens -> {name: (N,)}.

    KLs, cross-entropies and entropies in nats; `std` in logits; the others are shares. A family may
    pad its heads to several sizes: the distributions are those over the tokens that both have.
    """
    size = min(log_p.size(-1), log_q.size(-1))
    log_p = log_p[:, :size].log_softmax(-1)
    log_q = log_q[:, :size].log_softmax(-1)
    p = log_p.exp()
    q = log_q.exp()
    metrics = {}
    for name in ("fkl", "rkl", "jsd", "tvd"):
        metrics[name] = okd.DIVERGENCES[name](log_p, log_q)
    metrics["teacher_entropy"] = -(p * log_p).sum(-1)
    metrics["entropy_gap"] = -(q * log_q).sum(-1) - metrics["teacher_entropy"]
    index = labels[:, None]
    metrics["student_ce"] = -log_q.gather(-1, index).squeeze(-1)
    metrics["uncertainty"] = 1 - p.gather(-1, index).squeeze(-1)  # Rao et al., eq. 4
    # Over the vocabulary; that of the logits, which differ from log q by a constant.
    metrics["std"] = log_q.std(-1, correction=0)
    metrics["top1_agreement"] = (p.argmax(-1) == q.argmax(-1)).to(p)
    for k in (5, 10, 50):
        top_p = p.topk(min(k, size)).indices
        top_q = q.topk(min(k, size)).indices
        found = (top_p[:, :, None] == top_q[:, None, :]).any(-1)
        metrics[f"top{k}_overlap"] = found.to(p).mean(-1)
    metrics["tail_mass"] = 1 - q.gather(-1, top_p).sum(-1)  # q beyond p's 50 likeliest tokens
    return metrics


def measure_texts(student, teacher, examples, max_tokens, hw):
    """Examples -> {name: (n,) values of every example's response tokens}, short examples first."""
    # Gold text may be longer than any answer.
    longest = min(okd.max_positions(student.config), okd.max_positions(teacher.config), 10**9)
    rows = [row.with_response(row.response_ids, longest) for row in examples]
    measured = okd.measure(student, teacher, rows, hw, max_tokens, metrics=token_metrics)
    lengths = [len(row.response_ids) for row in sorted(rows, key=len)]
    return {name: values.cpu().split(lengths) for name, values in measured.items()}


def summary(measured):
    """{part: means over its tokens}: all; hard and easy, the halves to which the teacher gives
    lower and higher probabilities (a middle token is in both)."""
    columns = {name: torch.cat(values) for name, values in measured.items()}
    order = columns["uncertainty"].argsort(descending=True, stable=True)
    half = (len(order) + 1) // 2
    means = {}
    for part, tokens in (("all", order), ("hard", order[:half]), ("easy", order[-half:])):
        means[part] = {name: values[tokens].mean().item() for name, values in columns.items()}
    return means


def accumulated_error(rows):
    """(n,) KLs of every row -> [sum over t <= l of the mean over the rows that reach t]."""
    means = []
    for values in itertools.zip_longest(*[row.tolist() for row in rows]):
        means.append(fmean(value for value in values if value is not None))
    return list(itertools.accumulate(means))


def excess_error(own, oracle):
    """Exposure bias: {length l: (R(l) - l eps(l)) / (l eps(l)) in percent}. arXiv:2306.08543, 3.3.

    R(l) accumulates KL(p || q) along the checkpoint's own text, l eps(l) along the teacher's. 0: no
    more errors on its own text. own, oracle: a (n,) tensor of KLs for every row.
    """
    own = accumulated_error(own)
    oracle = accumulated_error(oracle)
    percent = {}
    for length in LENGTHS:
        if length <= min(len(own), len(oracle)) and oracle[length - 1] > 0:
            percent[str(length)] = 100 * (own[length - 1] / oracle[length - 1] - 1)
    return percent


def distribution(checkpoint, teacher, data, examples, protocol, max_tokens):
    """Comparison with the teacher on gold text and on own text, and the exposure bias.

    Both authors write by one rule whatever the protocol: temperature 1, nothing cut off or banned,
    the same seed.
    """
    rule = dict(protocol, decoding="sampling", no_repeat_ngram_size=0)
    rule.update(temperature=1.0, top_p=1.0, top_k=0)
    texts = [examples]
    for author in (checkpoint, teacher):
        records = read_answers(author, decode(author, data, examples, rule, seed=0))
        answered = zip(examples, records, strict=True)
        texts.append([replace(row, response_ids=record["ids"]) for row, record in answered])
    models = (checkpoint.model, teacher.model)
    gold, own, oracle = [measure_texts(*models, rows, max_tokens, checkpoint.hw) for rows in texts]
    return {
        "teacher": teacher.name,
        "gold": summary(gold),
        "own": summary(own),
        "excess_error_percent": excess_error(own["fkl"], oracle["fkl"]),
    }


def by_label(checkpoints, data):
    """{label: the checkpoints that were scored on the set}, in the order of the command line."""
    groups = {}
    for checkpoint in checkpoints:
        if data in checkpoint.results:
            groups.setdefault(checkpoint.label, []).append(checkpoint)
    return groups


def gold_values(group, data, part, name):
    return [run.results[data]["distribution"]["gold"][part][name] for run in group]


def distribution_table(checkpoints, data):
    """A row per label: the means over its runs."""
    rows = []
    for label, group in by_label(checkpoints, data).items():
        row = [label, len(group)]
        for name in SHOWN:
            means = []
            for part in ("all", "hard", "easy"):
                means.append(f"{fmean(gold_values(group, data, part, name)):.3f}")
            row.append(" ".join(means))
        found = [run.results[data]["distribution"] for run in group]
        row.append(fmean(each["own"]["all"]["fkl"] for each in found))
        errors = []
        for length in found[0]["excess_error_percent"]:
            there = [each["excess_error_percent"].get(length, math.nan) for each in found]
            errors.append(f"{length}: {fmean(there):.0f}")
        row.append(", ".join(errors))
        rows.append(row)
    title = f"### {data}, gold responses: all, hard, easy tokens"
    header = ["method", "runs", *SHOWN, "fkl on own text", "excess error, % (by length)"]
    return f"\n{title}\n\n{table(header, rows)}"


def draw_analysis(checkpoints, data, path):
    """Rao et al. 2024, Fig. 5: a bar per label."""
    groups = by_label(checkpoints, data)
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    parts = ("all", "hard", "easy")
    width = 0.8 / len(groups)
    for axes, (name, title) in zip(figure.subplots(1, 3), DRAWN.items(), strict=True):
        for number, (label, group) in enumerate(groups.items()):
            values = [gold_values(group, data, part, name) for part in parts]
            axes.bar(
                np.arange(3) + (number + 0.5) * width - 0.4,
                [fmean(each) for each in values],
                width,
                yerr=[spread(each) or 0 for each in values],
                capsize=2,
                label=label,
            )
        axes.set(title=title, xticks=range(3), xticklabels=parts)
    figure.suptitle(
        f"Gold responses of {data}. Hard (easy): the half of the tokens to which the teacher gives "
        f"the lower (higher) probability.\n{BARS}"
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


BARS = "Means over runs; error bars and bands: ± 1 standard deviation over training seeds."

# -----------------------------------------------------------------------------
# Comparison of runs over training seeds

# Quantiles of the t distribution at 0.975 for 1, 2, ... degrees of freedom; beyond, the last one,
# which is wider.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COSTS = {
    "distil_s": "training s",
    "sampling_s": "sampling s",
    "tokens_per_s": "tokens/s",
    "peak_memory_gb": "peak GB",
}
COLUMNS = {
    "method": "method",
    "runs": "runs",
    "rouge_l": "Rouge-L",
    "std_training": "± training",
    "std_decoding": "± decoding",
    "verdict": "difference (95 %)",
    **COSTS,
}


def pick_runs(checkpoints):
    """-> (checkpoints that count, notes for the reader).

    Of runs with one label and seed the one that began last counts. Runs that solve different
    problems are not seeds of one method: then their labels say which problem it is.
    """
    runs = [checkpoint for checkpoint in checkpoints if checkpoint.problem]
    names = runs[0].problem if runs else ()
    notes = []
    for name in names:
        values = {run.problem.get(name) for run in runs}
        if len(values) > 1:
            notes.append(f"runs differ in {name}: only runs of the same {name} are compared")
            for run in runs:
                run.label += f", {name} {run.problem.get(name)}"
    counted = {}
    for checkpoint in checkpoints:
        label = checkpoint.label
        seed = checkpoint.flags.get("seed")
        twin = counted.setdefault((label, seed), checkpoint)
        if twin is not checkpoint:
            earlier, later = sorted([twin, checkpoint], key=began_at)
            counted[label, seed] = later
            notes.append(f"{label}, seed {seed}: {later.name} counts, not {earlier.name}")
    return list(counted.values()), notes


@dataclass
class Comparison:
    runs: list  # one per label and training seed
    baseline: str  # a label
    notes: list  # lines for the reader


def plan_comparison(checkpoints, notes, baseline):
    """Which runs are compared, and with which label. Raises UserError."""
    runs = []
    notes = [*notes]
    for checkpoint in checkpoints:
        with skipping(f"{checkpoint.name} in the comparison"):
            if read_final(checkpoint).get("final/dev_step") == 0:
                notes.append(f"{checkpoint.name} kept the student of step 0, which is untrained")
            runs.append(checkpoint)
    if not runs:
        raise okd.UserError("--compare needs runs of okd.py that have finished")
    return Comparison(runs, pick_baseline(runs, baseline), notes)


def began_at(checkpoint):
    return (checkpoint.folder / "args.json").stat().st_mtime


def pick_baseline(runs, baseline):
    """A label: the one of this name, or the only one of this method; None: that of the first run"""
    methods = {run.label: run.flags["method"] for run in runs}
    if baseline is None:
        return runs[0].label
    if baseline in methods:
        return baseline
    labels = [label for label, method in methods.items() if method == baseline]
    if len(labels) != 1:
        raise okd.UserError(f"--baseline must be one of these labels: {', '.join(methods)}")
    return labels[0]


def read_log(run):
    return read_json(run.folder / "metrics.jsonl", by_line=True)


def read_final(run):
    """The last record of a finished run. Raises UserError."""
    final = read_log(run)[-1]
    if final["phase"] != "final":
        raise okd.UserError("the run has not finished: metrics.jsonl has no final record")
    return final


def row_scores(checkpoint, data):
    """(rows,) Rouge-L of every row, the mean over decoding seeds."""
    passes = []
    for file_name in checkpoint.results[data]["generations"]:
        passes.append([record["score"] for record in read_answers(checkpoint, file_name)])
    return torch.tensor(passes).mean(0)


def interval(differences, num_draws=2000):
    """(seeds, rows) differences of two methods, at least two seeds -> [low, high] of their mean.

    At 95 %, the wider of two: a bootstrap over seeds and rows, which is too narrow for few seeds,
    and paired t over the means of seeds, which does not know that these share their rows.
    """
    generator = torch.Generator().manual_seed(0)
    num_seeds, num_rows = differences.shape
    seeds = torch.randint(num_seeds, (num_draws, num_seeds), generator=generator)
    rows = torch.randint(num_rows, (num_draws, num_rows), generator=generator)
    drawn = differences[seeds].mean(1).gather(1, rows).mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()

    means = differences.mean(1)
    center = means.mean().item()
    quantile = T_975[min(num_seeds - 1, len(T_975)) - 1]
    half = quantile * means.std().item() / math.sqrt(num_seeds)
    if high - low > 2 * half:
        return [low, high]
    return [center - half, center + half]


def compare_set(comparison, data):
    """An entry per label on one set: its score, its costs, and the verdict."""
    groups = by_label(comparison.runs, data)
    entries = []
    for label, runs in groups.items():
        scores = [run.results[data]["rouge_l"] for run in runs]
        entry = {
            "data": data,
            "method": label,
            "runs": len(runs),
            "training_seeds": [run.flags["seed"] for run in runs],
            "rouge_l": fmean(scores),
            "std_training": spread(scores),
            "std_decoding": mean_or_none([run.results[data]["std"] for run in runs]),
        }
        finals = [read_final(run) for run in runs]
        for name in COSTS:
            entry[name] = mean_or_none([final.get(f"final/{name}") for final in finals])
        if label == comparison.baseline:
            entry["verdict"] = "baseline"
        else:
            baseline_runs = groups.get(comparison.baseline, [])
            entry.update(paired_difference(runs, baseline_runs, data))
        entries.append(entry)
    return entries


def mean_or_none(values):
    return None if None in values else fmean(values)


def paired_difference(runs, baseline_runs, data):
    differences = []
    for run, other in itertools.product(runs, baseline_runs):
        if run.flags["seed"] == other.flags["seed"] and run.problem == other.problem:
            differences.append(row_scores(run, data) - row_scores(other, data))
    if not differences:
        return {"verdict": "none: the baseline has no run of this seed and problem"}
    values = torch.stack(differences)
    mean = values.mean().item()
    found = {"difference": mean}
    if len(differences) == 1:  # a better method, or a luckier run
        found["verdict"] = f"{mean:+.2f}, one training seed"
        return found
    low, high = interval(values)
    found["interval"] = [low, high]
    found["verdict"] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    if len(differences) < len(runs):
        found["verdict"] += f", {len(differences)} seeds in common"
    if low <= 0 <= high:
        found["verdict"] += ", not distinguishable"
    return found


def table(header, rows):
    """Values -> a Markdown table with aligned columns."""
    cells = [list(map(cell, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = map(str.ljust, row, widths)
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def values_of(entries, names):
    return [list(map(entry.get, names)) for entry in entries]


def cell(value):
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def learning_curves(runs):
    """(steps, (runs, steps) KL(p_0 || q) on dev rows). A run with fewer evals is interpolated."""
    curves = []
    for run in runs:
        records = [record for record in read_log(run) if "dev/fkl" in record]
        if records:
            curves.append({record["step"]: record["dev/fkl"] for record in records})
    steps = sorted(set().union(*curves))
    rows = [np.interp(steps, list(curve), list(curve.values())) for curve in curves]
    return steps, np.array(rows)


def draw_comparison(comparison, entries, path):
    """Rouge-L against training time, and the learning curves."""
    data = entries[0]["data"]
    groups = by_label(comparison.runs, data)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for entry in entries:
        points = left.errorbar(
            entry["distil_s"],
            entry["rouge_l"],
            yerr=entry["std_training"] or 0,
            fmt="o",
            capsize=3,
            label=entry["method"],
        )
        color = points[0].get_color()
        steps, curves = learning_curves(groups[entry["method"]])
        if steps:
            mean = curves.mean(0)
            std = curves.std(0, ddof=1) if len(curves) > 1 else 0
            right.plot(steps, mean, color=color)
            right.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2)
    left.set(xlabel="training time, s", ylabel=f"Rouge-L on {data}")
    right.set(xlabel="training step", ylabel="KL(teacher‖student) on dev rows, nats")
    figure.suptitle(BARS)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path)


# -----------------------------------------------------------------------------
# Weights & Biases


def track(checkpoints, entries, figures, output_dir):
    """Scores onto the pages of the runs, comparison and figures onto a page of their own."""
    import wandb

    os.environ.setdefault("WANDB_PROJECT", "okd")
    for checkpoint in checkpoints:
        flags = checkpoint.flags
        folder = checkpoint.folder
        if not flags or not (folder / "wandb").is_dir():
            print(f"{checkpoint.name} was not tracked: it has no wandb page")
            continue
        page_id = flags["wandb_id"]
        with wandb.init(id=page_id, resume="allow", dir=folder, config=flags) as page:
            # Syncing an offline run replaces the page's summary: what stood there is put again.
            for record in read_log(checkpoint):
                page.summary.update(record)
            for result in read_results(folder).values():
                page.summary[wandb_name(result)] = result["rouge_l"]
    if figures:
        with wandb.init(job_type="eval", name="comparison", dir=output_dir) as page:
            for figure in figures:
                page.log({figure.stem: wandb.Image(str(figure))})
            if entries:
                names = ["data", *COLUMNS]
                page.log({"comparison_table": wandb.Table(names, values_of(entries, names))})


def wandb_name(result):
    """eval/SET/PROTOCOL/rouge_l, of the characters that wandb can sort and filter by."""
    protocol = dict(result["protocol"], seeds=result["seeds"])
    words = [f"{name} {value}" for name, value in protocol.items() if value is not None]
    return re.sub(r"[^\w/]+", "_", f"eval/{result['data']}/{' '.join(words)}/rouge_l")


# -----------------------------------------------------------------------------
# The whole job


def show_answers(checkpoints, data, count):
    """The first answers to the questions of a set, side by side."""
    answers = {}
    for checkpoint in checkpoints:
        if data in checkpoint.results:
            file_name = checkpoint.results[data]["generations"][0]
            answers[checkpoint.name] = read_answers(checkpoint, file_name)
    for records in itertools.islice(zip(*answers.values(), strict=True), count):
        print(f"\n[{data} {records[0]['row'] + 1}] {records[0]['prompt'].strip()}")
        print(f"  reference: {records[0]['reference']}")
        for name, record in zip(answers, records, strict=True):
            print(f"  {name} ({record['score']:.1f}): {record['output']}")


def score_table(checkpoints):
    header = ["checkpoint", "set", "Rouge-L", "± decoding", "rows", "cut prompts", "empty", "s"]
    names = ["data", "rouge_l", "std", "rows", "cut_prompts", "empty_outputs", "seconds"]
    rows = []
    for checkpoint in checkpoints:
        for values in values_of(checkpoint.results.values(), names):
            rows.append([checkpoint.name, *values])
    return table(header, rows)


def report_comparison(comparison, sets, protocol, folder):
    """Prints and writes comparison.md, .json and .png. Returns the entries."""
    text = f"Rouge-L by {protocol}; difference from {comparison.baseline}\n"
    entries = []
    for data in sets:
        of_set = compare_set(comparison, data)
        if of_set and not entries:
            draw_comparison(comparison, of_set, folder / "comparison.png")
        entries += of_set
        text += f"\n### {data}\n\n{table(COLUMNS.values(), values_of(of_set, COLUMNS))}\n"
    for note in (*comparison.notes, PLUS_MINUS):
        text += f"\n{note}\n"
    okd.write_file(folder / "comparison.md", text)
    okd.write_file(folder / "comparison.json", json.dumps(entries, indent=2))
    print(f"\n{text}\nwritten: {folder}/comparison.md, comparison.json, comparison.png")
    return entries


PLUS_MINUS = (
    "±: standard deviation over training seeds, and over decoding seeds of one checkpoint. "
    "Intervals: bootstrap over paired training seeds and rows, or paired t over seeds, the wider."
)


def open_all(args, hw):
    """The checkpoints that can be opened, with their sets, and the teacher. Raises UserError."""
    teacher = None
    if args.teacher:
        name = args.teacher
        if Path(name, "models.json").exists():
            name = read_json(Path(name, "models.json"))["teacher"]
        teacher = open_checkpoint(name, args, hw)
    given = {source: load_lines(source, args.limit) for source in args.data}
    checkpoints = []
    for name in dict.fromkeys(args.checkpoints):
        with skipping(name):
            checkpoint = open_checkpoint(name, args, hw)
            if teacher is not None:
                okd.one_tokenizer(teacher.tokenizer, checkpoint.tokenizer)
            checkpoint.sets = given or default_sets(checkpoint, args.limit)
            checkpoints.append(checkpoint)
    return checkpoints, teacher


def evaluate_all(args):
    """The whole job. Raises UserError."""
    check_flags(args)
    protocol, seeds = protocol_of(args)
    hw = okd.pick_hardware(args.device, args.precision)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    checkpoints, teacher = open_all(args, hw)
    # Before scoring, which may take hours.
    counted, notes = pick_runs(checkpoints)
    comparison = plan_comparison(counted, notes, args.baseline) if args.compare else None

    words = ", ".join(f"{name} {value}" for name, value in protocol.items())
    words += f", seeds {seeds}, {hw.dtype} on {hw.device.type}"
    print(
        f"protocol: {words}; Rouge-L: F x 100 with stemmer, best reference, mean over rows; on "
        "characters where most letters and digits of a reference are not ASCII"
    )
    for checkpoint in checkpoints:
        for data in checkpoint.sets:
            with skipping(f"{checkpoint.name} on {data}"):
                checkpoint.results[data] = evaluate(
                    checkpoint, data, protocol, seeds, teacher, args.micro_batch_tokens
                )
        vars(checkpoint).pop("model", None)  # the next one needs the room
    sets = list(dict.fromkeys(itertools.chain(*[each.results for each in checkpoints])))
    if not sets:
        raise okd.UserError("nothing was scored: name runs, model folders or hub ids")
    print(score_table(checkpoints))

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    entries = []
    if teacher is not None:
        for data in sets:
            print(distribution_table(counted, data))
        print("", *notes, sep="\n")
        figures.append(folder / "analysis.png")
        draw_analysis(counted, sets[0], figures[-1])
        print(f"\nwritten: {figures[-1]}")
    if comparison is not None:
        entries = report_comparison(comparison, sets, words, folder)
        figures.append(folder / "comparison.png")
    for data in sets:
        show_answers(checkpoints, data, args.show)
    if args.track:
        try:
            track(checkpoints, entries, figures, folder)
        except Exception as error:  # wandb raises what it likes; all else is written
            print(f"wandb failed: {' '.join(str(error).split())}", file=sys.stderr)


def main(argv=None):
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    with okd.one_line_errors("eval.py"):
        evaluate_all(tyro.cli(Args, args=argv, prog="eval.py", config=config))


if __name__ == "__main__":
    main()
