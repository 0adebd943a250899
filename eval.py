"""Score checkpoints with Rouge-L, say how, and turn many runs into one table and one picture.

    python eval.py runs/<name> gpt2 --data dolly self-inst --greedy   # checkpoints: runs, folders, hub ids, adapters
    python eval.py runs/* --teacher path/to/teacher                   # what each has of the teacher's distribution
    python eval.py runs/* --compare --baseline fkl                    # methods over training seeds, with intervals

A published Rouge-L depends on decoding options that papers seldom state: the protocol is printed and kept with every
score. `--paper` (the default) is that of the published results on Dolly, `--greedy` is one deterministic pass.
`--teacher` gives the analysis of Rao et al. 2024 (arXiv:2409.12512), figures 2 and 5, and the exposure bias.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import statistics
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import peft
import torch
import transformers
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import okd

SETS = {  # dataset repository on the hub, file; 11_: references of 11 or more words
    "dolly": ("MiniLLM/dolly", "valid.jsonl"), "self-inst": ("MiniLLM/self-inst", "valid.jsonl"),
    "vicuna": ("MiniLLM/Vicuna", "valid.jsonl"), "sinst": ("MiniLLM/sinst", "11_/valid.jsonl"),
    "uinst": ("MiniLLM/uinst", "11_/valid.jsonl"),
}  # fmt: skip


@dataclass
class Args:
    """Score checkpoints with Rouge-L; print the protocol and a table, write results.json beside each checkpoint."""

    # run folders (their student), model folders, hub ids, or PEFT adapters (on the base that their config names)
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    # dolly, self-inst, vicuna, sinst, uinst (from the hub), demo (test rows of okd.py's demo), or JSONL files
    data: tuple[str, ...] = ("dolly",)
    limit: int | None = None  # score the first so many rows of each set
    # -- protocol --
    paper: bool = False  # preset: temperature 1, no_repeat_ngram_size 6, seeds 10 20 30 40 50 (the default)
    greedy: bool = False  # preset: one deterministic pass, no n-gram ban
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0  # sample from the smallest set of tokens with this mass
    top_k: int = 0  # sample from the so many likeliest tokens; 0: from all
    no_repeat_ngram_size: int | None = None  # none twice in prompt and answer (6; with --greedy 0: no ban)
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)  # of decoding; none with --greedy
    max_new_tokens: int = 256  # longest answer
    max_prompt_length: int = 256  # longer prompts lose their beginning, all but BOS, and are counted
    # -- more than a score --
    teacher: str | None = None  # p_0, a run's teacher as fine-tuned: what each checkpoint has of its distribution
    compare: bool = False  # methods over training seeds: comparison.md, comparison.json, comparison.png
    baseline: str | None = None  # with --compare: the method that the others are paired with (the first run's)
    output_dir: str = "results"  # where comparison and figures go, and where the results of hub ids are kept
    show: int = 0  # print so many answers of all checkpoints side by side
    track: bool = False  # put scores, comparison and figures on the wandb pages of tracked runs
    # -- hardware --
    sample_batch_size: int = 128  # prompts at once
    micro_batch_tokens: int = 4096  # most tokens that go through student and teacher at once
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of weights and activations
    trust_remote_code: bool = False  # run code that a model repository brings along
    teacher_quant = None  # no flag, but okd.py's functions look for it


def protocol_of(args):
    """Flags -> (all that a score depends on besides checkpoint, set and seed; decoding seeds). Raises UserError."""
    if args.paper and args.greedy:
        raise okd.UserError("--paper and --greedy are two protocols: choose one")
    if args.greedy and args.seeds != Args.seeds:
        raise okd.UserError("--seeds change nothing with --greedy")
    if not args.checkpoints:
        raise okd.UserError("name at least one checkpoint: a run folder, a model folder or a hub id")
    for name, low in dict(no_repeat_ngram_size=0, top_k=0, show=0, max_new_tokens=1, max_prompt_length=1, limit=1,
                          sample_batch_size=1, micro_batch_tokens=1, temperature=1e-9, top_p=1e-9).items():  # fmt: skip
        value, high = getattr(args, name), 1 if name == "top_p" else 1e9
        if value is not None and not low <= value <= high:
            raise okd.UserError(f"--{name.replace('_', '-')} is {value}: it must lie in [{low}, {high:g}]")
    ban = args.no_repeat_ngram_size if args.no_repeat_ngram_size is not None else 0 if args.greedy else 6
    sampling = {} if args.greedy else dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    protocol = dict(decoding="greedy" if args.greedy else "sampling", **sampling, no_repeat_ngram_size=ban,
                    max_new_tokens=args.max_new_tokens, max_prompt_length=args.max_prompt_length)  # fmt: skip
    return protocol, [None] if args.greedy else list(args.seeds or Args.seeds)


# Sets and checkpoints -------------------------------------------------------------------------------------------------


def load_lines(source, args):
    """A set's name or a JSONL path -> its lines. Raises UserError."""
    if source == "demo":
        rows = okd.load_data(okd.DEMO, okd.load_tokenizer("demo", args))["test"]
        lines = [json.dumps(dict(prompt=row.prompt, response=row.references)) for row in rows]
    elif source in SETS:
        lines = okd.hub_lines(*SETS[source])[:10_000]  # uinst has more, of which published results use so many
    else:
        with okd.blaming(f"no data set or file {source}: {', '.join([*SETS, 'demo'])} or the path of a JSONL file"):
            lines = pathlib.Path(source).read_bytes().splitlines()
    if not any(line.strip() for line in lines[: args.limit]):
        raise okd.UserError(f"{source}: no rows")
    return lines[: args.limit]


def examples_of(lines, tokenizer, source, limit):
    """JSON lines -> (Examples with prompts of at most `limit` tokens, how many prompts were cut). Raises UserError."""
    examples, cut = [], 0
    for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
        with okd.blaming(f"{source}, line {number} needs instruction and output, prompt and response, or messages"):
            examples.append(okd.read_row(json.loads(line), tokenizer))
        ids = examples[-1].prompt_ids
        if not ids:
            raise okd.UserError(f"{source}, line {number}: the prompt is empty")
        if len(ids) > limit:  # the question stands at the end; but no model has seen a text without its BOS
            bos, cut = ids[:1] if ids[0] == tokenizer.bos_token_id else [], cut + 1
            examples[-1] = replace(examples[-1], prompt_ids=bos + ids[len(ids) - limit + len(bos) :])
    return examples, cut


def locate(name, args):
    """A checkpoint -> (folder or hub id of the model, its run's folder or None, where its results lie: in the run's
    folder, in another local model's own, below --output-dir for a hub id). A run stands for its student."""
    folder = pathlib.Path(name)
    if (folder / "student").is_dir():
        folder = folder / "student"
    elif (folder / "args.json").exists():
        raise okd.UserError(f"{name} is a run without a student: it has not ended")
    run = folder.parent if folder.name == "student" and (folder.parent / "args.json").exists() else None
    return str(folder), run, run or (folder if folder.is_dir() else pathlib.Path(args.output_dir) / folder)


class Checkpoint:
    """A model to be looked at. It is loaded when first asked for, which finished evaluations never do."""

    def __init__(self, name, args, hw):
        self.name, self.args, self.hw, self.results = name, args, hw, []
        self.source, run, self.folder = locate(name, args)
        with okd.blaming(f"{run}: args.json is damaged"):
            self.flags = dict(method=name, seed=None) | (json.loads((run / "args.json").read_text()) if run else {})
        path, adapter = self.folder / "results.json", pathlib.Path(self.source) / "adapter_config.json"
        with okd.blaming(f"{path} is damaged: delete it, it is written anew"):
            self.stored = {result["key"]: result for result in (json.loads(path.read_text()) if path.exists() else [])}
        with okd.blaming(f"{adapter} names no base model"):
            self.base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else None
        self.tokenizer = okd.load_tokenizer(self.base or self.source, args)
        # What an answer depends on besides prompt, protocol and seed, by content: no time, no place in the file system.
        self.key = [okd.fingerprint(part) for part in (self.source, self.base) if part]
        self.key += [str(hw.dtype), hw.device.type, args.sample_batch_size]

    @functools.cached_property
    def model(self):
        """In eval mode, on the device. An adapter is merged in float32 and cast once: bf16 rounds much of it away."""
        source, dtype = (self.base, torch.float32) if self.base else (self.source, self.hw.dtype)
        model = okd.load_model(source, "model", self.args, dtype)
        if self.base:
            with okd.blaming(f"cannot put the adapter {self.source} on {self.base}"):
                model = peft.PeftModel.from_pretrained(model, self.source).merge_and_unload()
            for weight in model.parameters():  # buffers stay as they are: rotary frequencies are float32 in every model
                weight.data = weight.data.to(self.hw.dtype)
        return model.eval().to(self.hw.device)

    def records(self, file):
        """{row: record} of one decoding pass. A last line that an interruption cut is taken off the file."""
        path = self.folder / "generations" / file
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        with okd.blaming(f"{path} is damaged: delete it, it is written anew"):
            return {record["row"]: record for record in map(json.loads, whole)}

    def row_scores(self, index):
        """Rouge-L of every row of a set, the mean over decoding seeds."""
        passes = [self.records(file) for file in self.results[index]["generations"]]
        return [statistics.fmean(records[row]["score"] for records in passes) for row in sorted(passes[0])]

    def answers(self, data, examples, protocol, seed):
        """One decoding pass over a set -> (file, a record per row). The file grows by batches whose seeds depend on
        their place alone: what was interrupted goes on where it stopped, and writes what an unbroken pass does."""
        options = {k: v for k, v in protocol.items() if k in ("temperature", "top_p", "top_k", "no_repeat_ngram_size")}
        size, label = self.args.sample_batch_size, f"{pathlib.PurePath(data).name}-{'greedy' if seed is None else seed}"
        file = f"{label}-{short_hash([self.key, examples, protocol])}.jsonl"
        records, order = self.records(file), sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt_ids))
        (self.folder / "generations").mkdir(parents=True, exist_ok=True)
        with open(self.folder / "generations" / file, "a") as kept:
            for start in tqdm(range(0, len(order), size), f"{pathlib.PurePath(self.name).name} {label}", disable=None):
                batch = order[start : start + size]
                if all(i in records for i in batch):
                    continue
                prompts, chance = [examples[i].prompt_ids for i in batch], hash((seed or 0, start // size))
                ids = okd.generate(self.model, self.tokenizer, prompts, self.hw, protocol["max_new_tokens"], size,
                                   sample=protocol["decoding"] == "sampling", seed=chance, **options)  # fmt: skip
                for i, response in zip(batch, ids, strict=True):
                    text = self.tokenizer.decode(response, skip_special_tokens=True).strip()
                    record = dict(row=i, prompt=examples[i].prompt, reference=examples[i].references[0], output=text)
                    records[i] = record | dict(score=okd.rouge_l(text, examples[i].references), ids=response)
                kept.write("".join(json.dumps(records[i]) + "\n" for i in batch))
                kept.flush()
        return file, [records[i] for i in range(len(examples))]

    def evaluate(self, sets, protocol, seeds, teacher):
        """One result per set, from results.json where it is finished; the rest is written, scored and stored."""
        for data, lines in sets.items():
            examples, cut = examples_of(lines, self.tokenizer, data, protocol["max_prompt_length"])
            key = short_hash([self.key, examples, protocol, seeds, teacher and [teacher.name, teacher.key]])
            files = self.stored.get(key, {}).get("generations", [])
            if not files or not all((self.folder / "generations" / file).exists() for file in files):
                room = okd.positions(self.model) - max(len(example.prompt_ids) for example in examples)
                if room < protocol["max_new_tokens"]:
                    print(f"{self.name} on {data}: answers end at {room} new tokens, where the model's positions do")
                start = time.perf_counter()
                files, passes = zip(*(self.answers(data, examples, protocol, seed) for seed in seeds), strict=True)
                scores = [statistics.fmean(record["score"] for record in records) for records in passes]
                std = statistics.stdev(scores) if len(scores) > 1 else None
                empty = sum(not record["output"] for records in passes for record in records)
                self.stored[key] = dict(
                    key=key, data=data, rouge_l=statistics.fmean(scores), std=std, scores=scores, seeds=seeds,
                    rows=len(examples), cut_prompts=cut, empty_outputs=empty, seconds=time.perf_counter() - start,
                    protocol=protocol, dtype=str(self.hw.dtype), generations=files,
                    distribution=teacher and distribution(self, teacher, data, examples, protocol))  # fmt: skip
                results = json.dumps(list(self.stored.values()), indent=2) + "\n"
                okd.write_whole(self.folder / "results.json", lambda path, text=results: path.write_text(text), self.hw)
            self.results.append(self.stored[key])
        vars(self).pop("model", None)  # the next one needs the room


def short_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=vars).encode()).hexdigest()[:12]


# How much of the teacher's distribution the student has ---------------------------------------------------------------

LENGTHS = (10, 25, 50, 100, 150, 200, 250)  # where exposure bias is read
SHOWN = "uncertainty student_ce std fkl rkl jsd tvd top1_agreement top10_overlap entropy_gap tail_mass".split()


def token_metrics(log_p, log_q, labels):
    """(N, V) log-probabilities of teacher and student, (N,) tokens -> {name: (N,)}. KLs, entropies in nats; shares."""
    p, q = log_p.exp(), log_q.exp()
    teacher_entropy = -(p * log_p).sum(-1)
    metrics = dict(fkl=okd.fkl(log_p, log_q), rkl=okd.rkl(log_p, log_q), jsd=okd.jsd(log_p, log_q, 0.5),
                   tvd=okd.tvd(log_p, log_q), top1_agreement=(p.argmax(-1) == q.argmax(-1)).to(p),
                   teacher_entropy=teacher_entropy, entropy_gap=-(q * log_q).sum(-1) - teacher_entropy)  # fmt: skip
    metrics["std"] = log_q.std(-1, correction=0)  # over the vocabulary: that of the logits, which differ by a constant
    metrics |= dict(student_ce=okd.cross_entropy(log_q, labels), teacher_ce=okd.cross_entropy(log_p, labels))
    metrics["uncertainty"] = -(-metrics["teacher_ce"]).expm1()  # 1 - p(token): Rao et al., eq. 4
    for k in (5, 10, 50):
        top_p, top_q = (x.topk(min(k, x.size(-1)), -1).indices for x in (p, q))
        metrics[f"top{k}_overlap"] = (top_p[:, :, None] == top_q[:, None, :]).any(-1).to(p).mean(-1)
        metrics[f"top{k}_mass"] = q.gather(-1, top_p).sum(-1)  # what q gives to p's likeliest tokens
        metrics[f"top{k}_mass_teacher"] = p.gather(-1, top_p).sum(-1)
    metrics["tail_mass"] = 1 - metrics["top50_mass"]  # what q gives to all others
    return metrics


@torch.no_grad()
def measure_texts(model, teacher, examples, args, hw):
    """Examples -> {name: a tuple of the (n,) values of every example's response tokens, short examples first}."""
    longest = int(min(okd.positions(model), okd.positions(teacher), 1e9))  # gold text may be longer than any answer
    rows, parts = sorted((row.answered(row.response_ids, longest) for row in examples), key=len), []

    def keep(log_p, log_q, log_p0, labels, rollout):
        vocab = min(log_p.size(-1), log_q.size(-1))  # one family pads its heads to several sizes
        parts.append(token_metrics(*(log[:, :vocab].log_softmax(-1) for log in (log_p, log_q)), labels))
        return {}

    for batch in okd.micro_batches(rows, args, hw, share=False):
        okd.run_batch(model, teacher, batch, hw, keep)
    lengths = [len(row.response_ids) for row in rows]  # sorted as `micro_batches` sorts
    return {name: torch.cat([part[name] for part in parts]).cpu().split(lengths) for name in parts[0]}


def summary(measured):
    """{part: token means}: all; the halves that p_0 finds hard and easy; bins of the teacher's entropy."""
    columns = {name: torch.cat(values) for name, values in measured.items()}
    order, entropy = columns["uncertainty"].argsort(descending=True, stable=True), columns["teacher_entropy"]
    parts = dict(all=order, hard=order[: (len(order) + 1) // 2], easy=order[len(order) // 2 :])  # a middle one is both
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 3), (3, math.inf)):  # nats
        parts[f"entropy {low} to {high}"] = ((entropy >= low) & (entropy < high)).nonzero().flatten()
    return {part: dict(tokens=len(chosen), **{name: values[chosen].mean().item() for name, values in columns.items()})
            for part, chosen in parts.items() if len(chosen)}  # fmt: skip


def excess_error(own, oracle):
    """Exposure bias: {length l: (R(l) - l eps(l)) / (l eps(l)) in percent}. Gu et al. 2023 (MiniLLM), section 3.3.

    R(l) = sum_{t <= l} E KL(p || q) along the student's own text, over the rows that reach t; l eps(l) is the same on
    the teacher's text. 0: it errs no more on its own. own, oracle: a (n,) tensor of KLs for every row."""
    totals = []
    for rows in (own, oracle):
        positions = itertools.zip_longest(*(row.tolist() for row in rows))
        means = (statistics.fmean(x for x in there if x is not None) for there in positions)
        totals.append(list(itertools.accumulate(means)))
    lengths = [n for n in LENGTHS if n <= min(map(len, totals)) and totals[1][n - 1] > 0]
    return {str(n): 100 * (totals[0][n - 1] / totals[1][n - 1] - 1) for n in lengths}


def distribution(checkpoint, teacher, data, examples, protocol):
    """Comparison with the teacher on gold text and on the student's own, and the exposure bias. That compares texts, so
    both write by one rule whatever the protocol: temperature 1, nothing cut off or banned, the same seed."""
    rule = protocol | dict(decoding="sampling", temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=0)
    texts, models = [examples], (checkpoint.model, teacher.model)
    for author in (checkpoint, teacher):
        _, records = author.answers(data, examples, rule, 0)
        texts.append([replace(e, response_ids=record["ids"]) for e, record in zip(examples, records, strict=True)])
    gold, own, oracle = (measure_texts(*models, text, teacher.args, teacher.hw) for text in texts)
    errors = excess_error(own["fkl"], oracle["fkl"])
    return dict(teacher=teacher.name, gold=summary(gold), own=summary(own), excess_error_percent=errors)


def distribution_tables(checkpoints):
    """The comparison with the teacher of all checkpoints side by side, and their exposure bias."""
    rows, errors = [], []
    for checkpoint in checkpoints:
        for result in checkpoint.results:
            found, place = result["distribution"], (checkpoint.name, result["data"])
            shown = {part: found["gold"][part] for part in ("all", "hard", "easy")} | {"own text": found["own"]["all"]}
            for part, means in shown.items():
                rows.append((*place, part, means["tokens"], *(f"{means[name]:.3f}" for name in SHOWN)))
            percent = (f"{length}: {value:.1f}" for length, value in found["excess_error_percent"].items())
            errors.append(f"{checkpoint.name} on {result['data']}: {', '.join(percent) or 'texts too short'}")
    return "\n".join([table(["checkpoint", "set", "part", "tokens", *SHOWN], rows), "",
                      "excess accumulated error on the own text, percent by length", *errors])  # fmt: skip


# Comparison of runs ---------------------------------------------------------------------------------------------------

# Two runs that differ only in these are one method, trained twice.
NOT_SETTINGS = set("""seed output_dir resume cache_dir cache_teacher device shard gradient_checkpointing save_every
    micro_batch_tokens sample_batch_size log_every score_rows track""".split())  # fmt: skip
# Quantiles of the t distribution at 0.975 for 1, 2, ... degrees of freedom; beyond the last that one, which is wider.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def read_logs(checkpoint):
    """A run -> (what it cost, {step: KL(p_0 || q) on the dev rows}). Raises UserError."""
    with okd.blaming(f"--compare needs runs that have ended: metrics.jsonl of {checkpoint.name} is missing or damaged"):
        lines = list(map(json.loads, (checkpoint.folder / "metrics.jsonl").read_text().splitlines()))
        final, distil = ([line for line in lines if line["phase"] == phase] for phase in ("final", "distil"))
        trained = [line for line in distil if "train/tokens_per_s" in line]
        costs = dict(seconds=final[-1]["final/distil_s"], sampling_s=final[-1]["final/sampling_s"],
                     tokens_per_s=statistics.median(line["train/tokens_per_s"] for line in trained),
                     peak_memory_gb=max(line["train/peak_memory_gb"] for line in trained))  # fmt: skip
        return costs, {line["step"]: line["dev/fkl"] for line in distil if "dev/fkl" in line}


def grouped(checkpoints):
    """-> {label: checkpoints}: the method, or the name, and the settings in which a run differs from most of it."""
    groups, everyone = {}, [checkpoint.flags for checkpoint in checkpoints]
    for checkpoint, flags in zip(checkpoints, everyone, strict=True):
        # A look at the dev rows changes what is trained on where DistiLLM adapts to it, and only there.
        ignored = NOT_SETTINGS | (set() if flags.get("text") == "adaptive" else {"eval_every", "eval_rows"})
        alike = [other for other in everyone if other["method"] == flags["method"]]
        usual = {name: statistics.mode(str(other.get(name)) for other in alike) for name in flags}
        told = (f"{name}={value}" for name, value in flags.items() if name not in ignored and str(value) != usual[name])
        label = " ".join([flags["method"], *told])
        groups.setdefault(label, []).append(checkpoint)
    return groups


def interval(differences, draws=2000):
    """(seeds, rows) differences of two methods, at least two seeds -> (low, high) of their mean at 95 %: the wider of a
    bootstrap over seeds and rows, too narrow for few seeds, and of paired t over the means of seeds, which does not
    know that these share their rows."""
    generator, (seeds, rows), means = torch.Generator().manual_seed(0), differences.shape, differences.mean(1)
    drawn = differences[torch.randint(seeds, (draws, seeds), generator=generator)].mean(1)
    drawn = drawn.gather(1, torch.randint(rows, (draws, rows), generator=generator)).mean(1).sort().values.tolist()
    half = T_975[min(seeds - 1, len(T_975)) - 1] * means.std().item() / math.sqrt(seeds)
    bootstrap = drawn[int(0.025 * draws)], drawn[int(0.975 * draws) - 1]
    paired = means.mean().item() - half, means.mean().item() + half
    return max(bootstrap, paired, key=lambda ends: ends[1] - ends[0])


def compare(args, checkpoints):
    """Runs that were scored -> (markdown, one entry per set and label). Raises UserError."""
    groups, comparison, markdown = grouped(checkpoints), [], []
    named = [label for label, runs in groups.items() if args.baseline in (None, label, runs[0].flags["method"])]
    if not named:
        raise okd.UserError(f"--baseline {args.baseline}: no such method among the runs, which are {', '.join(groups)}")
    header = dict(method="method", runs="runs", rouge_l="Rouge-L", std_training="± training", std_decoding="± decoding",
                  verdict=f"against {named[0]} (95 %)", seconds="training s", sampling_s="sampling s",
                  tokens_per_s="tokens/s", peak_memory_gb="peak GB")  # fmt: skip
    for index, data in enumerate(args.data):
        entries = [compared(label, runs, groups[named[0]], index) for label, runs in groups.items()]
        rows = [[f"{entry[name]:.2f}" if isinstance(entry[name], float) else entry[name] or "-" for name in header]
                for entry in entries]  # fmt: skip
        result = checkpoints[0].results[index]
        protocol = ", ".join(f"{name} {value}" for name, value in result["protocol"].items())
        markdown += [f"### {data}: {result['rows']} rows, {protocol}", table(header.values(), rows)]
        comparison += entries
    markdown.append("±: standard deviations over training seeds, and over decoding seeds of one checkpoint. Intervals: "
                    "bootstrap over paired training seeds and rows, or paired t over seeds, the wider.\n")  # fmt: skip
    return "\n\n".join(markdown), comparison


def compared(label, runs, baseline, index):
    """The runs of one label on one set, by themselves and against the baseline's."""
    results = [run.results[index] for run in runs]
    means, decoding = ([result[n] for result in results if result[n] is not None] for n in ("rouge_l", "std"))
    ours, theirs = ({run.flags["seed"]: run.row_scores(index) for run in group} for group in (runs, baseline))
    common = sorted(ours.keys() & theirs.keys()) if runs is not baseline else []
    verdict = "baseline" if runs is baseline else "no training seed in common"
    entry = dict(data=results[0]["data"], method=label, runs=len(runs), training_seeds=sorted(ours),
                 rouge_l=statistics.fmean(means), std_training=statistics.stdev(means) if len(means) > 1 else None,
                 std_decoding=statistics.fmean(decoding) if decoding else None, paired_seeds=common,
                 difference=None, interval=None, distinguishable=None, verdict=verdict)  # fmt: skip
    entry |= {name: statistics.fmean(run.costs[name] for run in runs) for name in runs[0].costs}
    if common:
        differences = torch.tensor([ours[seed] for seed in common]) - torch.tensor([theirs[seed] for seed in common])
        mean = entry["difference"] = differences.mean().item()
        entry["verdict"] = f"{mean:+.2f}, one training seed"  # a better method, or a luckier run
    if len(common) > 1:
        low, high = entry["interval"] = interval(differences)
        entry["distinguishable"] = not low <= 0 <= high
        entry["verdict"] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + ", not distinguishable" * (low <= 0 <= high)
    return entry


def table(header, rows):
    """Cells -> a Markdown table with aligned columns."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def draw_comparison(checkpoints, comparison, path):
    """Quality against training time, and the learning curves."""
    figure, groups = Figure(figsize=(12, 4.8), layout="constrained"), grouped(checkpoints)
    left, right = figure.subplots(1, 2)
    for number, (entry, (label, runs)) in enumerate(zip(comparison, groups.items(), strict=False)):  # of the first set
        style = dict(color=f"C{number % 10}", marker="osD^v"[number // 10 % 5], label=label)
        left.errorbar(entry["seconds"], entry["rouge_l"], yerr=entry["std_training"] or 0, capsize=3, **style)
        steps = sorted(set.intersection(*(set(run.curve) for run in runs)))
        right.plot(steps, [statistics.fmean(run.curve[step] for run in runs) for step in steps], markersize=3, **style)
    left.set(xlabel="training time, s (bars: training seeds)", ylabel=f"Rouge-L on {comparison[0]['data']}")
    right.set(xlabel="step", ylabel="dev KL(p_0 ‖ q), nats (mean over training seeds)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_analysis(checkpoints, path):
    """Rao et al. 2024, Fig. 5, on the first set. A bar per method, the mean of its runs, or per other checkpoint."""
    figure, groups = Figure(figsize=(15, 4.2), layout="constrained"), grouped(checkpoints)
    panels = dict(std="std of the student's logits", fkl="KL(p_0 ‖ q), nats", top1_agreement="top-1 agreement with p_0")
    parts, width = ("all", "hard", "easy"), 0.8 / len(groups)
    for panel, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for number, (label, members) in enumerate(groups.items()):
            gold = [member.results[0]["distribution"]["gold"] for member in members]
            heights = [statistics.fmean(found[part][name] for found in gold) for part in parts]
            panel.bar([place + (number + 0.5) * width - 0.4 for place in range(3)], heights, width, label=label)
        panel.set(title=title, xticks=range(3), xticklabels=parts)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def track(checkpoints, comparison, figures):
    """Scores, the comparison and figures onto the wandb pages of the runs. What was not tracked is named."""
    import wandb

    for checkpoint in checkpoints:
        if not checkpoint.flags.get("track"):
            print(f"{checkpoint.name}: was not tracked, so there is no wandb page to put its scores on")
            continue
        project, run, scores = os.environ.get("WANDB_PROJECT", "okd"), checkpoint.folder.resolve().name, {}
        for result in checkpoint.results:
            name = f"eval/{pathlib.PurePath(result['data']).name}/{result['protocol']['decoding']}/rouge_l"
            scores[name] = result["rouge_l"]
        with okd.blaming("--track does not work here"):
            page = wandb.init(project=project, id=run, resume="allow", dir=checkpoint.folder)
            page.summary.update(scores)
            page.log({f"{figure.stem}_figure": wandb.Image(str(figure)) for figure in figures})
            if comparison:
                cells = [list(map(str, entry.values())) for entry in comparison]
                page.log({"comparison": wandb.Table(list(comparison[0]), cells)})
            page.finish()


def evaluate(args):
    """The whole job: every checkpoint on every set, then tables, figures, pages. Raises UserError."""
    protocol, seeds = protocol_of(args)
    with okd.blaming(f"--device {args.device} is not usable here"):
        hw = okd.pick_hardware(args)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    sets = {source: load_lines(source, args) for source in args.data}
    checkpoints = [Checkpoint(name, args, hw) for name in dict.fromkeys(args.checkpoints)]
    teacher = args.teacher and Checkpoint(args.teacher, args, hw)
    for checkpoint in checkpoints:  # before any of them is scored, which may take hours
        if args.compare:
            checkpoint.costs, checkpoint.curve = read_logs(checkpoint)
        if teacher:
            okd.one_tokenizer(teacher.tokenizer, checkpoint.tokenizer)
    said = ", ".join(f"{name} {value}" for name, value in (protocol | dict(seeds=seeds)).items() if value != [None])
    print(f"protocol: {said}; Rouge-L F x 100 with stemmer, best reference")
    rows, folder, comparison, figures = [], pathlib.Path(args.output_dir), None, []
    for checkpoint in checkpoints:
        checkpoint.evaluate(sets, protocol, seeds, teacher)
        for result in checkpoint.results:
            score = f"{result['rouge_l']:.2f}" + (f" ± {result['std']:.2f}" if len(seeds) > 1 else "")
            numbers = (result[name] for name in ("rows", "cut_prompts", "empty_outputs", "seconds"))
            rows.append((checkpoint.name, result["data"], score, *map(round, numbers)))
    print(table(("checkpoint", "set", "Rouge-L ± decoding", "rows", "cut prompts", "empty outputs", "seconds"), rows))
    if teacher or args.compare:
        folder.mkdir(parents=True, exist_ok=True)
    if teacher:
        figures.append(folder / "analysis.png")
        draw_analysis(checkpoints, figures[-1])
        print(f"\n{distribution_tables(checkpoints)}\n\nwritten: {figures[-1]}")
    if args.compare:
        figures.append(folder / "comparison.png")
        markdown, comparison = compare(args, checkpoints)
        draw_comparison(checkpoints, comparison, figures[-1])
        (folder / "comparison.md").write_text(markdown)
        (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
        print(f"\n{markdown}\nwritten: {folder}/comparison.md, comparison.json, comparison.png")
    for index, data in enumerate(args.data if args.show else ()):
        texts = [(c.name, c.records(c.results[index]["generations"][0])) for c in checkpoints]
        for row, record in sorted(texts[0][1].items())[: args.show]:
            print(f"\n[{data} {row + 1}] {record['prompt'].strip()}\n  reference: {record['reference']}")
            for name, records in texts:
                print(f"  {name} ({records[row]['score']:.1f}): {records[row]['output']}")
    if args.track:
        track(checkpoints, comparison, figures)


def main(argv=None):
    okd.command(lambda: evaluate(tyro.cli(Args, args=argv, prog="eval.py")), "eval.py")


if __name__ == "__main__":
    main()
