"""Score checkpoints with Rouge-L, and say how.

    python eval.py runs/<name> [more checkpoints, model folders or hub ids] --data dolly --greedy

A published Rouge-L depends on decoding options that papers seldom state, so the protocol is printed and stored with every
score. `--paper` (the default) is that of the published KD results on Dolly: sampling at temperature 1 from the whole
distribution, no 6-gram twice, 256 new tokens, the mean over five decoding seeds. `--greedy` is one deterministic pass.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import transformers
import tyro

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
class Args:
    """Score checkpoints with Rouge-L; print the protocol, one table, and write results.json beside each checkpoint."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders, model folders or hub ids"""
    data: tuple[str, ...] = ("dolly",)
    """dolly, self-inst, vicuna, sinst, uinst (from the hub), demo (okd.py's test split), or paths of JSONL files"""
    paper: bool = False
    """preset: sample at temperature 1, no_repeat_ngram_size 6, seeds 10 20 30 40 50 (the default)"""
    greedy: bool = False
    """preset: one deterministic pass, no n-gram ban"""
    no_repeat_ngram_size: int | None = None
    """no n-gram of this size twice in prompt and answer; 0: no ban (6 with --paper, 0 with --greedy)"""
    seeds: tuple[int, ...] | None = None
    """decoding seeds (10 20 30 40 50; none with --greedy)"""
    temperature: float = 1.0
    """of sampling"""
    max_new_tokens: int = 256
    """longest answer"""
    max_prompt_length: int = 256
    """longer prompts lose their beginning, and are counted"""
    limit: int | None = None
    """score the first so many rows of each set"""
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
    for name, low in (("max_new_tokens", 1), ("max_prompt_length", 1), ("limit", 1), ("batch_size", 1), ("no_repeat_ngram_size", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}; it must be above 0 (for the argmax: --greedy)")
    ban = args.no_repeat_ngram_size if args.no_repeat_ngram_size is not None else 0 if args.greedy else 6
    sampling = {} if args.greedy else dict(temperature=args.temperature, top_p=1.0, top_k=0)
    return dict(decoding="greedy" if args.greedy else "sampling", **sampling, no_repeat_ngram_size=ban,
                max_new_tokens=args.max_new_tokens, max_prompt_length=args.max_prompt_length)  # fmt: skip


def model_folder(checkpoint):
    """A run folder stands for its student."""
    student = pathlib.Path(checkpoint) / "student"
    return str(student) if student.is_dir() else checkpoint


def results_path(checkpoint):
    """results.json of a run lies in the run's folder, of another local model in its own, of a hub id below results/."""
    folder = pathlib.Path(model_folder(checkpoint))
    if (folder.parent / "args.json").exists() and folder.name == "student":
        return folder.parent / "results.json"
    return (folder if folder.is_dir() else pathlib.Path("results") / checkpoint) / "results.json"


def load_rows(source, args):
    """A set's name or a JSONL path -> (line number, object) rows."""
    limit = args.limit
    if source == "demo":
        rows = list(enumerate(okd.demo_rows(4400, seed=0)[:200], 1))
    elif source in SETS:
        repo, file, most = SETS[source]
        rows = okd.read_jsonl(okd.hub_file(repo, file))[:most]
    else:
        if not os.path.exists(source):
            raise UserError(f"no data set or file {source}: give one of {', '.join([*SETS, 'demo'])}, or a path of a JSONL file")
        rows = okd.read_jsonl(source)
    if not rows:
        raise UserError(f"{source}: no rows")
    return rows[:limit]


def prompts_of(rows, tokenizer, source, limit):
    """-> (prompt ids, references, how many prompts were cut)."""
    prompts, references, cut = [], [], 0
    for number, row in rows:
        try:
            text, answers, has_specials = okd.render(row, tokenizer)
        except KeyError as error:
            raise UserError(f"{source}, line {number}: {error.args[0]}") from error
        ids = okd.encode_prompt(text, has_specials, tokenizer)
        if not ids:
            raise UserError(f"{source}, line {number}: the prompt is empty")
        cut += len(ids) > limit
        prompts.append(ids[-limit:])
        references.append(answers)
    return prompts, references, cut


def score(model, tokenizer, prompts, references, protocol, seed, hw, batch_size):
    """One decoding pass -> (Rouge-L of every row, texts)."""
    options = {name: protocol[name] for name in ("temperature", "top_p", "top_k", "no_repeat_ngram_size") if name in protocol}
    ids = okd.generate(model, tokenizer, prompts, hw, protocol["max_new_tokens"], batch_size,
                       sample=protocol["decoding"] == "sampling", seed=seed or 0, **options)  # fmt: skip
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return [okd.rouge_l(text, answers) for text, answers in zip(texts, references)], texts


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def evaluate(args):
    protocol = protocol_of(args)
    seeds = [None] if args.greedy else list(args.seeds or (10, 20, 30, 40, 50))
    hw = okd.pick_hardware(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sets = {source: load_rows(source, args) for source in args.data}
    for checkpoint in args.checkpoints:
        okd.check_source(model_folder(checkpoint))
    print("protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items())
          + ("" if args.greedy else f", seeds {' '.join(map(str, seeds))}")
          + "; Rouge-L F x 100 with stemmer, best reference")  # fmt: skip

    table = []
    for checkpoint in args.checkpoints:
        source = model_folder(checkpoint)
        tokenizer = okd.load_tokenizer(source, args)
        model = okd.load_model(source, "checkpoint", args, hw.dtype).to(hw.device)
        results = []
        for name, rows in sets.items():
            prompts, references, cut = prompts_of(rows, tokenizer, name, args.max_prompt_length)
            room = okd.positions(model) - max(map(len, prompts))
            if room < protocol["max_new_tokens"]:
                print(f"{checkpoint} on {name}: answers end at {room} new tokens, where the model's positions do")
            start, scores, empty = time.perf_counter(), [], 0
            for seed in seeds:
                values, texts = score(model, tokenizer, prompts, references, protocol, seed, hw, args.batch_size)
                scores.append(statistics.fmean(values))
                empty += sum(not text for text in texts)
            seconds = time.perf_counter() - start
            mean, std = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else None
            results.append(dict(data=name, rouge_l=mean, std=std, scores=scores, seeds=seeds, rows=len(rows), cut_prompts=cut,
                                empty_outputs=empty, seconds=seconds, protocol=protocol, dtype=str(hw.dtype)))  # fmt: skip
            shown = f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
            table.append((checkpoint, name, shown, len(rows), cut, empty, f"{seconds:.1f}"))
        write_json(results_path(checkpoint), results)
    print(okd.format_table(("checkpoint", "set", "Rouge-L", "rows", "cut prompts", "empty outputs", "seconds"), table))
    if len(seeds) > 1:
        print("± is the standard deviation over decoding seeds of one checkpoint, not over training seeds.")


def main(argv=None):
    args = tyro.cli(Args, args=argv, prog="eval.py")
    try:
        evaluate(args)
    except UserError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
