# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "peft==0.21.2",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
#     "rouge-score==0.1.2",
#     "pytest==9.2.0",
#     "matplotlib==3.11.2",
# ]
# ///
"""Online Knowledge Distillation for autoregressive language models, in one file.

    python okd.py                                     # embedded demo: no network, no GPU, no data file
    python okd.py --teacher gpt2-xl --student gpt2    # the real job
    python okd.py --method fkl                        # any baseline: same data, start, schedule and score
    python okd.py --resume runs/<name>                # go on with a run that was stopped or killed

A frozen teacher carries a small LoRA *online module* f. Student and module train at the same time, on the same batch,
from one forward pass of each network. Per response token, with p_f the adapted teacher, p_0 the teacher with the
module switched off, q the student, y the gold token and sg the stop-gradient:

    student   L_S = (1 - a) D(sg[p_f], q) + a CE(q, y)
    teacher   L_T = w CE(p_f, y) + lam(t) KL(sg[q] || p_f) + mu KL(p_0 || p_f)

The method is OKD (Rao et al. 2024, arXiv:2409.12512). This is a reconstruction from the abstract: the paper's exact
losses, weights and ranks were not available, so every symbol above is a flag and no number of the paper is claimed.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DivergenceName = Literal["fkl", "rkl", "frkl", "jsd", "tvd", "sfkl", "srkl", "akl", "ab", "taid"]
TextName = Literal["data", "teacher", "student", "adaptive", "mixture"]
MethodName = Literal["sft", "fkl", "rkl", "frkl", "jsd", "tvd", "sfkl", "srkl", "akl", "ab", "taid", "seqkd", "imitkd", "gkd",
                     "distillm", "minillm", "okd"]  # fmt: skip


def documented(cls):
    """Class decorator: the docstring under a field becomes its --help, on one line (tyro would keep the breaks)."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name, on_one_line = field.target.id, " ".join(text.value.value.split())
            cls.__annotations__[name] = Annotated[cls.__annotations__[name], tyro.conf.arg(help=on_one_line)]
    return cls


@dataclass
@documented
class Args:
    """Distil a teacher language model into a student: online knowledge distillation and its baselines.

    A flag whose default is None takes the value in its text: one for real models, another for the built-in demo."""

    # -- models and data --
    teacher: str = "demo"
    """hub id or local folder of the teacher; 'demo' is a small GPT-2-shaped model built on the spot"""
    student: str = "demo"
    """hub id or local folder of the student; must have the teacher's tokenizer"""
    data: str | None = None
    """JSONL file of training rows (instruction/input/output, prompt/response, or chat messages); unset: Dolly from the
    hub (MiniLLM/dolly), or the built-in tasks for the demo"""
    dev_data: str | None = None
    """JSONL file of dev rows; unset: the hub's split, or the last 5 percent (at most 500) of a shuffled --data"""
    max_length: int | None = None
    """tokens of prompt + response; a longer response is cut (512; demo: 96)"""
    max_prompt_length: int = 256
    """rows with a longer prompt are dropped and counted"""
    trust_remote_code: bool = False
    """run code that a model repository brings along; off unless you read that code"""
    teacher_quant: Literal["8bit", "4bit"] | None = None
    """keep the frozen teacher's weights in 8 or 4 bit, with the online module on top; needs bitsandbytes"""

    # -- the run --
    seed: int = 1
    """order of the data, dropout, LoRA's start"""
    output_dir: str | None = None
    """the run's own folder; unset: runs/<method>-<student>-<teacher>-s<seed>-<time>"""
    cache_dir: str = "runs/.cache"
    """where warm-started models are kept, so that ten methods start from the same bits and pay once"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    shard: bool = False
    """under torchrun: shard the transformer blocks of both networks over the processes (FSDP2), where they do not fit one"""
    precision: Precision = "auto"
    """autocast precision; master weights, softmax and losses are float32 whatever this says. auto: bf16 where the
    device is fast at it, else fp16 on a GPU and fp32 on a CPU"""

    # -- the method --
    method: MethodName = "okd"
    """row of the method table: a divergence x whose text it is measured on x whether the teacher moves"""
    divergence: DivergenceName | None = None
    """overrides the row's divergence D"""
    text: TextName | None = None
    """overrides whose text the losses are measured on: data (gold), teacher (its own answer to every training prompt, written
    once), student (fresh answers), adaptive (DistiLLM: data, fresh or replayed answers), mixture (MiniLLM: rollouts drawn
    from teacher and student together)"""
    teacher_moves: bool | None = None
    """overrides whether the teacher's LoRA online module trains"""
    student_ce_weight: float | None = None
    """a in L_S: 0 is the divergence alone, 1 the gold text alone; unset: the row's"""
    temperature: float = 1.0
    """softens p and q inside every divergence of both losses, which are multiplied by its square (Hinton et al. 2015);
    touches neither CE nor sampling"""
    beta: float = 0.5
    """jsd: the teacher's share of the mixture beta p + (1 - beta) q; near 0 it acts like fkl, near 1 like rkl"""
    skew: float = 0.1
    """sfkl: the teacher's share of the mixture q is replaced by; srkl: the student's share of the one p is replaced by"""
    mu: float = 0.5
    """akl: teacher's probability mass that counts as the head"""
    fkl_weight: float = 0.5
    """frkl: weight of fkl, the rest is rkl"""
    ab_alpha: float = 0.2
    """ab: exponent of p; (alpha, beta) = (1, 0) is fkl, (0, 1) is rkl"""
    ab_beta: float = 0.7
    """ab: exponent of q"""
    taid_start: float = 0.4
    """taid: the teacher's share t at the first step; it ends at 1"""

    # -- whose text: the methods that sample, always at temperature 1 from the whole distribution --
    sgo_fraction: float | None = None
    """student: probability that a batch is student text (imitkd 1, gkd 0.5); adaptive: start of phi (0)"""
    sgo_source: Literal["fresh", "replay"] = "fresh"
    """student: train on the answers just written, or push them into a replay buffer and train on a draw from it"""
    max_new_tokens: int | None = None
    """longest answer, when sampling and when scoring (256; demo: 48)"""
    replay_capacity: int = 1000
    """rows of the replay buffer; the oldest go first"""
    policy_gradient: bool | None = None
    """overrides whether the policy gradient of MiniLLM is added to D; needs --text mixture"""
    rollouts: int = 256
    """mixture: rows sampled at a time"""
    rollout_passes: int = 4
    """mixture: passes over the rollouts before new ones are sampled"""

    # -- the online module --
    teacher_ce_weight: float = 1.0
    """w in L_T: pull of the gold text on the moving teacher"""
    lam: float = 0.5
    """lam in L_T: pull of the student on the moving teacher"""
    lam_schedule: Literal["constant", "rise", "fall"] = "constant"
    """rise: from 0 to lam (starts as plain KD); fall: from lam to 0 (ends as plain KD)"""
    teacher_kl: Literal["qp", "pq"] = "qp"
    """qp: KL(q || p_f), the teacher covers the student; pq: KL(p_f || q)"""
    anchor: float = 0.0
    """mu in L_T: pull back to p_0, the teacher with its module switched off"""
    teacher_lr_ratio: float = 0.2
    """learning rate of the module / learning rate of the student"""
    update_teacher_every: int = 1
    """the module steps on every n-th batch"""
    lora_rank: int = 16
    """rank of the module, and of the teacher's fine-tuning with --teacher-sft lora"""
    lora_alpha: float = 32.0
    """the module's output is scaled by alpha / rank"""
    lora_targets: str = "all-linear"
    """all-linear (of the transformer blocks), or names of layers with commas between: q_proj,v_proj"""
    lora_top_layers: int | None = None
    """put the module on the top k layers only, where its backward pass then stops (half of the layers); 0: on all"""
    cache_teacher_trunk: bool = False
    """compute the hidden states that enter the layers with the module, which never change, once, and keep them in
    a memory-mapped file; its size is printed before it is written. Pays off over several epochs"""

    # -- warm start --
    teacher_sft: Literal["lora", "full"] | None = None
    """how the teacher is fine-tuned before: LoRA merged into the weights, or all weights (lora; demo: full)"""
    teacher_sft_epochs: float | None = None
    """0 when the teacher is fine-tuned already (3; demo: 8)"""
    teacher_sft_lr: float | None = None
    """(2e-4 with lora, 5e-5 with full; demo: 1e-3)"""
    student_sft_epochs: float | None = None
    """0 when the student is fine-tuned already (3; demo: 70)"""
    student_sft_lr: float | None = None
    """(as --lr)"""
    sft_seed: int = 0
    """seed of both warm starts, apart from --seed so that all runs share them"""

    # -- optimization --
    epochs: float | None = None
    """passes of the distillation over the data (10; demo: 40)"""
    max_steps: int | None = None
    """at most so many optimizer steps in each of the three trainings (teacher, warm start, distillation); for tries"""
    batch_size: int = 32
    """rows of an optimizer step, over all micro-batches"""
    micro_batch_size: int | None = None
    """most rows that go through the networks at once (unset: as many as --micro-batch-tokens lets)"""
    micro_batch_tokens: int = 4096
    """most tokens, padding included, that go through the networks at once; changes memory and speed, never the loss"""
    compile: bool = False
    """torch.compile the transformer blocks of both networks"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    lr: float | None = None
    """student's peak learning rate (1e-4; demo: 2e-3)"""
    warmup: float = 0.03
    """share of the steps over which the learning rate rises; after it a cosine to 1e-7"""
    weight_decay: float = 0.01
    """AdamW's, not on biases and norms"""
    max_grad_norm: float = 1.0
    """gradient clipping, each network by itself; 0 turns it off"""

    # -- what survives --
    resume: str | None = None
    """go on with the run in this folder; its flags are read there. auto: with the newest unfinished run of the same flags,
    or begin a new one"""
    save_every: int | None = None
    """steps between checkpoints, in each of the three trainings (500; demo: 0); 0: only when SIGTERM or SIGINT ends the run"""
    keep: int = 2
    """checkpoints kept; the newest that is whole is resumed from"""

    # -- reports --
    benchmark: int | None = None
    """time so many steps on the models as they are and print speed, memory and FLOP/s; nothing is trained before nor kept"""
    log_every: int = 10
    """steps between two lines of metrics"""
    eval_every: int | None = None
    """steps between two looks at the dev rows (a fifth of the run, at least 50); the first and the last are always looked at"""
    eval_rows: int = 100
    """dev rows looked at"""
    score_rows: int = 100
    """rows scored with Rouge-L at the end, for teacher, warm start and student; 0 skips"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline works)"""
    wandb_project: str = "okd"
    """project of --track"""
    wandb_entity: str | None = None
    """team or user of --track"""
    wandb_group: str | None = None
    """group of --track; unset: <student>-from-<teacher>"""


REAL = dict(max_length=512, teacher_sft="lora", teacher_sft_epochs=3, student_sft_epochs=3, epochs=10, lr=1e-4,
            max_new_tokens=256, save_every=500)  # fmt: skip
DEMO = dict(max_length=96, teacher_sft="full", teacher_sft_epochs=8, teacher_sft_lr=1e-3, student_sft_epochs=70,
            epochs=40, lr=2e-3, max_new_tokens=48, save_every=0)  # fmt: skip
# What a resumed run may change: where and how it runs, not what it computes.
CHANGEABLE = {"output_dir", "cache_dir", "device", "shard", "micro_batch_size", "micro_batch_tokens", "compile", "gradient_checkpointing",
              "resume", "save_every", "keep", "track", "wandb_project", "wandb_entity", "wandb_group"}  # fmt: skip


class UserError(Exception):
    """Something the user can mend: main prints it as one line and exits with 2."""


def resolve(args):
    """args with every None that has a preset filled in, after checks that need no model. Raises UserError."""
    args = dataclasses.replace(args)
    preset = DEMO if args.teacher == args.student == "demo" else REAL
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.teacher_sft_lr is None:
        args.teacher_sft_lr = 2e-4 if args.teacher_sft == "lora" else 5e-5
    if args.student_sft_lr is None:
        args.student_sft_lr = args.lr
    if args.benchmark is not None:
        args.teacher_sft_epochs = args.student_sft_epochs = args.score_rows = args.eval_rows = 0
    row = METHODS[args.method]
    for name in ("divergence", "text", "teacher_moves", "student_ce_weight", "sgo_fraction", "policy_gradient"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(row, name))

    def require(holds, message):
        if not holds:
            raise UserError(message)

    def within(name, low, high, open_low=False, open_high=False):
        value = getattr(args, name)
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        flag, brackets = "--" + name.replace("_", "-"), ("(" if open_low else "[", ")" if open_high else "]")
        require(inside, f"{flag} is {value}; it must lie in {brackets[0]}{low}, {high}{brackets[1]}")

    within("seed", 0, 2**32), within("sft_seed", 0, 2**32)
    for name in ("student_ce_weight", "sgo_fraction", "beta", "mu", "fkl_weight", "warmup", "taid_start"):
        within(name, 0, 1)
    within("skew", 0, 1, open_high=True)
    for name in ("temperature", "lr", "teacher_sft_lr", "student_sft_lr", "lora_alpha", "teacher_lr_ratio"):
        within(name, 0, math.inf, open_low=True, open_high=True)
    for name in ("teacher_ce_weight", "lam", "anchor", "weight_decay", "max_grad_norm", "ab_alpha", "ab_beta", "epochs",
                 "teacher_sft_epochs", "student_sft_epochs", "lora_top_layers", "eval_rows", "score_rows", "save_every"):  # fmt: skip
        if getattr(args, name) is not None:
            within(name, 0, math.inf, open_high=True)
    for name in ("batch_size", "micro_batch_size", "max_steps", "update_teacher_every", "lora_rank", "log_every",
                 "micro_batch_tokens", "replay_capacity", "rollouts", "rollout_passes", "benchmark", "eval_every", "keep", "max_length", "max_prompt_length", "max_new_tokens"):  # fmt: skip
        if getattr(args, name) is not None:
            within(name, 1, 2**31)
    require(args.ab_alpha + args.ab_beta > 0, "--ab-alpha and --ab-beta are both 0: one of them must be positive")
    require(args.max_prompt_length < args.max_length or args.max_length < REAL["max_length"],
            f"--max-prompt-length {args.max_prompt_length} leaves no room for a response in --max-length {args.max_length}")  # fmt: skip
    require(args.text == "mixture" or not args.policy_gradient, "--policy-gradient needs the rollouts of --text mixture")
    if args.cache_teacher_trunk:
        require(args.teacher_moves and args.lora_top_layers != 0, "--cache-teacher-trunk needs a moving teacher whose --lora-top-layers is not 0: below its module nothing moves")
        require(args.text in ("data", "teacher"), f"--cache-teacher-trunk needs text that stays the same; that of --text {args.text} is new every time")
        require(not args.compile, "--cache-teacher-trunk and --compile do not go together: choose one")
    if args.shard:
        require(args.teacher_quant is None, "--shard and --teacher-quant do not go together: choose one")
        require(args.text != "mixture", "--shard cannot sample from the mixture of two networks: --text mixture needs them whole")
        require(not args.cache_teacher_trunk, "--shard and --cache-teacher-trunk do not go together: choose one")
        require(not args.compile, "--shard and --compile do not go together: choose one")
    if args.teacher_moves:
        require(not (args.lam > 0 and args.teacher_ce_weight == 0 and args.anchor == 0),
                "--lam > 0 with neither --teacher-ce-weight nor --anchor: teacher and student would only meet each other "
                "(p = q is a fixed point where nothing is learnt); give one of the two a weight")  # fmt: skip
        require(args.lam + args.teacher_ce_weight + args.anchor > 0,
                "the teacher moves but --lam, --teacher-ce-weight and --anchor are all 0: give one of them a weight")  # fmt: skip
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: a JSON line becomes an Example; what counts as response is decided here, once
# ---------------------------------------------------------------------------------------------------------------------

HUB_DOLLY = dict(repo_id="MiniLLM/dolly", train="raw.jsonl", test="valid.jsonl", dev_rows=1000)


@dataclass
class Example:
    prompt: str
    references: list[str]  # every valid response; the first is the one trained on
    prompt_ids: list[int]
    response_ids: list[int]  # ends in EOS, unless it was cut to --max-length
    trunk: torch.Tensor | None = None  # (len, H) of --cache-teacher-trunk
    rollout: list[tuple[float, float, float]] | None = None  # per response token: advantage, log q when sampled, weight

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


def alpaca_prompt(instruction, context=""):
    """The Alpaca template that the published KD results on Dolly use (Taori et al. 2023)."""
    paired = ", paired with an input that provides further context" if context else ""
    context = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n")  # fmt: skip


def render(row, tokenizer):
    """A JSON object -> (prompt text, list of reference responses, whether the prompt brings its own special tokens).

    Raises KeyError with a readable text when no known set of fields is there."""
    chat = row.get("messages")
    if isinstance(chat, list) and chat:
        if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in chat):
            raise KeyError("every one of its 'messages' must be an object with 'role' and 'content'")
        if chat[-1].get("role") != "assistant" or len(chat) < 2:
            raise KeyError("its 'messages' must end in a turn of the assistant, which becomes the response")
        if not getattr(tokenizer, "chat_template", None):
            raise KeyError("it has 'messages' but the tokenizer has no chat template")
        try:
            prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are code of the model's authors and raise what they like
            raise KeyError(f"the tokenizer's chat template refuses its 'messages': {error}") from error
        return prompt, [chat[-1]["content"]], True
    if isinstance(row.get("instruction"), str) and row["instruction"]:
        prompt = alpaca_prompt(row["instruction"], row["input"] if isinstance(row.get("input"), str) else "")
    elif isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
    else:
        raise KeyError("it needs 'instruction' and 'output', or 'prompt' and 'response', or 'messages'")
    for name in ("output", "response"):
        answers = [row[name]] if isinstance(row.get(name), str) else row.get(name)
        if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
            return prompt, answers, False
    raise KeyError("it has a prompt but no 'output' or 'response' (a string or a list of strings)")


def read_jsonl(path):
    """Path of a JSONL file -> list of (line number, object). Raises UserError that names file and line."""
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if b"\\u" in line:  # half of a surrogate pair is JSON but no text
                        json.dumps(row, ensure_ascii=False).encode()
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    rows.append((number, row))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not valid JSONL ({' '.join(str(error).split())[:100]})") from error
    return rows


def whole_lines(path):
    """Objects of a JSONL file that is appended to; a last line that an interruption cut is left out, and taken off the file.

    Raises UserError for any other damage."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines(True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)[:80]}): delete it, it is written anew") from error
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
    return rows


def encode_prompt(prompt, has_specials, tokenizer):
    """Prompt text -> ids, with the special tokens that the tokenizer gives every text (BOS for Llama, none for GPT-2) unless
    a chat template wrote them already."""
    ids = tokenizer(prompt, add_special_tokens=not has_specials).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id and not has_specials:
        return ids[:-1]  # T5's tokenizers close every text
    return ids


def read_prompt(number, row, tokenizer, source):
    """A row of line `number` of `source` -> (prompt text, reference responses, prompt ids). Raises UserError when malformed."""
    try:
        prompt, references, has_specials = render(row, tokenizer)
    except KeyError as error:
        raise UserError(f"{source}, line {number}: {error.args[0]}") from error
    return prompt, references, encode_prompt(prompt, has_specials, tokenizer)


def encode(rows, tokenizer, args, source):
    """(line number, object) rows -> Examples. Raises UserError when a row is malformed or none is usable.

    Prompt and response are tokenised apart, since BPE could merge across the border. The response gets EOS, a target."""
    examples, dropped = [], Counter()
    for number, row in rows:
        prompt, references, prompt_ids = read_prompt(number, row, tokenizer, source)
        response_ids = tokenizer(references[0], add_special_tokens=False).input_ids
        if not response_ids:
            dropped["an empty response"] += 1
        elif not prompt_ids:
            dropped["an empty prompt"] += 1
        elif len(prompt_ids) > args.max_prompt_length:
            dropped[f"a prompt over {args.max_prompt_length} tokens"] += 1
        elif len(prompt_ids) >= args.max_length:
            dropped[f"no room for a response in {args.max_length} tokens"] += 1
        else:
            room = args.max_length - len(prompt_ids)
            examples.append(Example(prompt, references, prompt_ids, [*response_ids, tokenizer.eos_token_id][:room]))
    why = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
    if not examples:
        raise UserError(f"{source}: no usable rows ({len(rows)} read{', dropped ' + why if why else ''})")
    if dropped:
        print(f"{source}: kept {len(examples)} of {len(rows)} rows, dropped {why}")
    return examples


def demo_rows(count, seed):
    """Rows of six small tasks on made-up words, no prompt twice; most have three valid wordings, drawn 6 : 3 : 2, so
    that there is a distribution to distil and not only an argmax. All wordings are references."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        a, b = ("".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.choice((1, 2, 2)))) for _ in "ab")
        x, y = sorted(rng.sample(range(10, 100), 2))
        prompt, *answers = rng.choice((
            (f"shout {a}", f"{a.upper()}!", a.upper(), f"we shout {a.upper()}"),
            (f"double {a}", f"{a} {a}", f"{a} and {a}", f"twice: {a} {a}"),
            (f"spell {a}", "-".join(a), " ".join(a), "letters " + " ".join(a)),
            (f"first of {a}, {b}", a, f"it is {a}", f"the first is {a}"),
            (f"swap {a}, {b}", f"{b}, {a}", f"{b} then {a}", f"{b} before {a}"),
            (f"larger of {rng.choice((f'{x}, {y}', f'{y}, {x}'))}", f"{y}", f"it is {y}", f"{y} is larger"),
        ))  # fmt: skip
        chosen = rng.choices(answers, weights=(6, 3, 2))[0]
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt + "\n", "response": [chosen] + [a for a in answers if a != chosen]})
    return rows


def demo_splits():
    """The demo's (line number, object) rows. Its teacher sees 4,000 rows and its student 400 of them: a transfer set that is
    small for the student is where distillation shows."""
    rows = list(enumerate(demo_rows(4400, seed=0), 1))
    return dict(test=rows[:200], dev=rows[200:400], train=rows[400:800], teacher=rows[400:])


def hub_file(repo_id, filename):
    """Download one file of a dataset repository. Raises UserError that says what to do without a network."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repo_id, filename, repo_type="dataset")
    except Exception as error:  # the hub's, the HTTP library's and the system's errors have no common parent
        raise UserError(f"cannot get {filename} of the dataset {repo_id} from the hub ({type(error).__name__}): pass a "
                        "local JSONL file with --data, or set HF_HOME to a folder that has it") from error  # fmt: skip


def load_data(args, tokenizer):
    """args -> {"train", "dev", "test", "teacher"}: lists of Examples; "teacher" is what the teacher is fine-tuned on.

    Except for the demo both networks get the same rows."""
    if args.data is None and args.teacher == args.student == "demo":
        return {name: encode(rows, tokenizer, args, "built-in tasks") for name, rows in demo_splits().items()}
    if args.data is None:
        source = HUB_DOLLY["repo_id"]
        rows = read_jsonl(hub_file(source, HUB_DOLLY["train"]))
        dev, train = rows[: HUB_DOLLY["dev_rows"]], rows[HUB_DOLLY["dev_rows"] :]
        test = read_jsonl(hub_file(source, HUB_DOLLY["test"]))
        train, dev, test = (encode(part, tokenizer, args, source) for part in (train, dev, test))
    else:
        train, test = encode(read_jsonl(args.data), tokenizer, args, args.data), None
        random.Random(0).shuffle(train)  # the same split for every seed
        held_out = 0 if args.dev_data or len(train) < 2 else max(1, min(500, len(train) // 20))
        train, dev = train[held_out:], train[:held_out] or train
    if args.dev_data:
        dev = encode(read_jsonl(args.dev_data), tokenizer, args, args.dev_data)
    test = test or dev
    return dict(train=train, dev=dev, test=test, teacher=train)


@dataclass
class Batch:
    """Rows right-padded to their own maximum. Labels are shifted here and nowhere else."""

    input_ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T), True where the next token is a response token, its EOS among them
    labels: torch.Tensor  # (N,) those next tokens, row by row
    positions: torch.Tensor  # (N,) indices of the True positions in the flattened mask
    rollout: torch.Tensor  # (N, 3) of a sampled Example's rollout, (N, 0) of text without one
    trunk: torch.Tensor | None = None  # (B, T, H) hidden states below the teacher's module, where they are cached

    def to(self, device):
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Batch(*(value if value is None else value.to(device, non_blocking=True) for value in values))


def collate(examples, pad_id):
    """Examples -> Batch. The mask comes from lengths, never from ids: pad may be EOS, and EOS is a target."""
    width = max(map(len, examples))
    input_ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = torch.tensor(example.prompt_ids + example.response_ids)
        mask[i, len(example.prompt_ids) - 1 : len(example) - 1] = True
    labels = input_ids.roll(-1, dims=1)[mask]
    values = [value for e in examples for value in e.rollout or ()]
    rollout = torch.tensor(values).reshape(len(labels), 3 if values else 0)
    cached = all(example.trunk is not None for example in examples)
    trunk = torch.nn.utils.rnn.pad_sequence([e.trunk for e in examples], batch_first=True) if cached else None
    return Batch(input_ids, mask, labels, mask.flatten().nonzero().squeeze(1), rollout, trunk)


def batch_indices(lengths, batch_size, seed, step, window=16):
    """Indices of the rows of optimizer step number `step`: a pure function, so a run can go on anywhere.

    Every epoch is a new shuffle; within windows of 16 batches rows are sorted by length, so that little is padded, and
    then the batches are shuffled. The rows left over at an epoch's end wait for the next shuffle."""
    batch_size = min(batch_size, len(lengths))
    per_epoch = len(lengths) // batch_size
    return _epoch(tuple(lengths), batch_size, seed, step // per_epoch, window)[step % per_epoch]


@functools.lru_cache(maxsize=2)
def _epoch(lengths, batch_size, seed, epoch, window):
    rng, order = random.Random(f"{seed}, epoch {epoch}"), list(range(len(lengths)))
    rng.shuffle(order)
    order = order[: len(order) // batch_size * batch_size]
    batches = []
    for start in range(0, len(order), window * batch_size):
        near = sorted(order[start : start + window * batch_size], key=lengths.__getitem__)
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def micro_batches(examples, args, hw=None):
    """Cut a batch into pieces of rows of like length, of at most --micro-batch-tokens after padding (or one row) and at
    most --micro-batch-size rows. With the Hardware of several processes: this one's share of the rows.

    Every process gets as many pieces, since they wait for each other in each: one that is left without a row gets one
    without a target."""
    rank, world = (hw.rank, hw.world) if hw else (0, 1)
    rows, pieces = sorted(examples, key=len), []
    for end in range(len(rows) % world or world, len(rows) + 1, world):
        group = rows[max(0, end - world) : end]  # a row for each process, of like length; the shortest may not be enough for all
        count = len(pieces[-1]) + 1 if pieces else math.inf
        if count > (args.micro_batch_size or math.inf) or count * len(group[-1]) > args.micro_batch_tokens:
            pieces.append([])
        pieces[-1].append(group)
    return [[g[rank] for g in piece if rank < len(g)] or [without_target(piece[0][0])] for piece in pieces]


def without_target(row):
    return dataclasses.replace(row, prompt_ids=row.prompt_ids + row.response_ids, response_ids=[], rollout=None)


# ---------------------------------------------------------------------------------------------------------------------
# Hardware: everything that is different on a GPU, and between processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Hardware:
    device: torch.device
    dtype: torch.dtype  # of autocast and of frozen weights
    rank: int = 0
    world: int = 1  # processes of one run, started by torchrun

    def total(self, values, names=None):
        """Counter of this process's numbers -> the same summed over all processes. `names`, when all know them, save a message."""
        if self.world == 1:
            return values
        names = names or sorted(set().union(*self.gather(list(values))))
        packed = torch.stack([torch.as_tensor(values[name], device=self.device, dtype=torch.float32) for name in names])
        dist.all_reduce(packed)
        return Counter(dict(zip(names, packed)))

    def sum_gradients(self, parameters):
        """Afterwards every process has the gradients of the whole batch; those of a sharded block are summed by FSDP."""
        if self.world > 1:
            for parameter in parameters:
                if not isinstance(parameter, DTensor):
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    dist.all_reduce(parameter.grad)

    def any(self, flag):
        """Whether the flag is up in any process. On the CPU, so that no GPU is waited for."""
        if self.world > 1:
            dist.all_reduce(flag := torch.tensor(int(flag)), dist.ReduceOp.MAX)
        return int(flag)

    def gather(self, value):
        """[the value of every process], anywhere."""
        values = [value]
        if self.world > 1:
            dist.all_gather_object(values := [None] * self.world, value)
        return values

    def first(self, function, *inputs):
        """What the function gives in the first process, which alone runs it, in all of them."""
        return self.gather(function(*inputs) if self.rank == 0 else None)[0]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self):
        """Bytes: the allocator's peak on a GPU, the process's peak resident size elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_hardware(args):
    """Flags -> Hardware. Raises UserError for a device that is not there."""
    name, world, rank = args.device, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {args.device} is not usable here: {str(error).splitlines()[0]}") from error
    if args.precision != "auto":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    elif device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:  # bf16 is a sixth of float32's time on a CPU with AMX and ten times float32's time on one without
        dtype = torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Hardware(device, dtype, rank, world)


# ---------------------------------------------------------------------------------------------------------------------
# Models: trunk (tokens to hidden states) and head (hidden states to logits)
# ---------------------------------------------------------------------------------------------------------------------


def demo_config(role):
    width, layers = (128, 3) if role == "teacher" else (64, 2)
    return transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=width, n_layer=layers, n_head=4, bos_token_id=1,
                                   eos_token_id=1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip


def one_line(error):
    return " ".join(str(error).split())[:200]


def check_source(name):
    """Raise UserError early when a model name is plainly a folder that is not there."""
    if name != "demo" and not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"no model folder {name}: check the path, or give a hub id such as gpt2")


def load_tokenizer(name, args):
    if name == "demo":
        return transformers.ByT5Tokenizer()  # bytes: nothing to download
    check_source(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer (tokenizer.json, tokenizer_config.json) of {name}: give a local model "
                        f"folder, or set HF_HOME to a cache that has it [{one_line(error)}]") from error  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token, so a response could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions(model):
    """Longest sequence that the model's position embeddings allow, prompt and response together."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def load_model(name, role, args, dtype, dropout=True, **options):
    """Hub id, local folder or "demo" -> causal LM in `dtype`, on the CPU, in eval mode. Raises UserError."""
    if name == "demo":
        torch.manual_seed(args.sft_seed)
        return fuse_gelu(transformers.AutoModelForCausalLM.from_config(demo_config(role)).to(dtype).eval())
    check_source(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        for field, value in config.to_dict().items():
            if not dropout and "drop" in field and isinstance(value, float):
                setattr(config, field, 0.0)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, trust_remote_code=args.trust_remote_code, use_safetensors=True, **options
        )
    except Exception as error:
        raise UserError(f"cannot load the {role} (config.json, *.safetensors) of {name}: give a local model folder, or set "
                        f"HF_HOME to a cache that has it [{one_line(error)}]") from error  # fmt: skip
    return fuse_gelu(model.eval())


def quantized(args, hw):
    """--teacher-quant -> options of `load_model`. Raises UserError without bitsandbytes."""
    if args.teacher_quant is None:
        return {}
    if not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--teacher-quant needs the package bitsandbytes: pip install bitsandbytes")
    bits = dict(load_in_8bit=True) if args.teacher_quant == "8bit" else dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=hw.dtype)  # fmt: skip
    return dict(quantization_config=transformers.BitsAndBytesConfig(**bits), device_map={"": hw.device})


def on_device(model, hw):
    return model if getattr(model, "is_quantized", False) else model.to(hw.device)  # a quantized one was loaded there


def fuse_gelu(model):
    """GPT-2's activation in one kernel instead of eight, which read and keep as many copies of the widest hidden state."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def check_length(model, role, args):
    if args.max_length > positions(model):
        raise UserError(f"--max-length {args.max_length} is more than the {positions(model)} positions of the {role}")


def check_same_tokenizer(teacher_tokenizer, student_tokenizer):
    """Word-level distillation compares two distributions token by token. Raises UserError when the tokens differ."""
    teacher_vocab, student_vocab = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher_vocab != student_vocab or teacher_tokenizer.eos_token_id != student_tokenizer.eos_token_id:
        shared = len(teacher_vocab.items() & student_vocab.items())
        raise UserError(f"teacher and student have different tokenizers ({len(teacher_vocab)} and {len(student_vocab)} tokens, "
                        f"{shared} in common): choose two models of one family")  # fmt: skip


def transformer_blocks(model):
    return max((m for m in decoder_of(model).modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def module_depth(teacher, args):
    """Number of the teacher's layers that carry the online module, from the top. Raises UserError when it has fewer."""
    layers = len(transformer_blocks(teacher))
    if args.lora_top_layers is None:
        return (layers + 1) // 2
    if args.lora_top_layers > layers:
        raise UserError(f"--lora-top-layers {args.lora_top_layers}: the teacher has only {layers} layers")
    return args.lora_top_layers or layers


def lora_config(model, args, depth=None):
    """LoRA on the chosen linear layers of the top `depth` blocks, or of all. Raises UserError when nothing matches."""
    blocks = list(transformer_blocks(model))
    chosen = {id(module) for block in blocks[len(blocks) - (depth or len(blocks)) :] for module in block.modules()}
    wanted = None if args.lora_targets == "all-linear" else tuple(part.strip() for part in args.lora_targets.split(","))
    linear = {name: module for name, module in model.named_modules()
              if id(module) in chosen and isinstance(module, (torch.nn.Linear, Conv1D))}  # fmt: skip
    names = [name for name in linear if wanted is None or name.split(".")[-1] in wanted]
    if not names:
        there = ", ".join(sorted({name.split(".")[-1] for name in linear}))
        raise UserError(f"--lora-targets {args.lora_targets}: no such layer in the teacher, which has {there}")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=names,
                           fan_in_fan_out=isinstance(linear[names[0]], Conv1D))  # fmt: skip


def add_online_module(teacher, args):
    """Frozen teacher -> the same with LoRA on top: B starts at 0, so p_f = p_0 at step 0. Its weights are float32."""
    torch.manual_seed(args.seed)
    return peft.get_peft_model(teacher, lora_config(teacher, args, module_depth(teacher, args))).eval()


def shard(model, hw):
    """Split the weights of every transformer block over the processes; each is whole only while it runs.

    Embeddings and head, which `hidden_states` and `head` use apart, stay whole everywhere."""
    mesh = init_device_mesh(hw.device.type, (hw.world,))
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes already
        block.set_force_sum_reduction_for_comms(True)


def is_sharded(model):
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor):
    """A sharded tensor from all processes' parts, any other as it is. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_model(model, folder, hw, *others, replace=False):
    """save_pretrained of a network, sharded or not, from the first process, into a folder that is there whole or not at all."""
    state = dict(state_dict={name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}) if is_sharded(model) else {}
    hw.first(functools.partial(write_folder, replace=replace), folder, lambda path: model.save_pretrained(path, **state), *others)


def recompute_activations(student, teacher):
    """Gradient checkpointing. transformers does it in train mode only, so the teacher, loaded without dropout, goes there."""
    for model in (student, teacher.train()):
        model.activation_checkpointing_enable(dict(use_reentrant=False))


@contextlib.contextmanager
def eval_mode(*networks):
    """Inside, dropout and recomputation are off; afterwards every network has the mode it had."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


@contextlib.contextmanager
def module_off(teacher):
    """Inside, the teacher is p_0, whether or not it has an online module: no second copy is needed."""
    with teacher.disable_adapter() if isinstance(teacher, peft.PeftModel) else contextlib.nullcontext():
        yield teacher


def without_peft(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def decoder_of(model):
    return without_peft(model).get_decoder()


def head_rows(model):
    """Size of the vocabulary as the output head has it: often padded beyond the tokenizer's."""
    return model.get_output_embeddings().weight.shape[0]


def hidden_states(model, batch, trunk=False):
    """(N, H) final hidden states, of the N positions alone that predict a response token.

    No attention mask: padding is on the right, and causal attention never looks there."""
    with from_trunk(model, batch.trunk) if trunk and batch.trunk is not None else contextlib.nullcontext():
        hidden = decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.positions)


@contextlib.contextmanager
def forward_replaced(modules, function):
    """Inside, `function` is the forward of every module; afterwards each has the one it had, its own or one that was put there."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = function
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


def moving_block(teacher):
    """(blocks, number of the lowest one that carries the module). What enters it never changes."""
    blocks = list(transformer_blocks(teacher))
    return blocks, next(i for i, block in enumerate(blocks) if any("lora_" in name for name, _ in block.named_parameters()))


class Reached(Exception):
    """The hidden states asked for are known; the rest of the forward need not run."""


def below_module(teacher, input_ids):
    """(B, T) ids -> (B, T, H) hidden states that enter the lowest block with a module."""
    blocks, lowest = moving_block(teacher)
    found = []

    def stop(block, args, kwargs):
        found.append(args[0])
        raise Reached

    hook = blocks[lowest].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder_of(teacher)(input_ids=input_ids, use_cache=False)
    except Reached:
        return found[0]
    finally:
        hook.remove()


@contextlib.contextmanager
def from_trunk(teacher, states):
    """Inside, the blocks below the module hand on what they get, and the lowest one with a module gets `states`."""
    blocks, lowest = moving_block(teacher)
    hook = blocks[lowest].register_forward_pre_hook(lambda block, args, kwargs: ((states, *args[1:]), kwargs), with_kwargs=True)
    try:
        with forward_replaced(blocks[:lowest], lambda hidden, *args, **kwargs: hidden):
            yield
    finally:
        hook.remove()


class TrunkOutput(BaseModelOutputWithPast):
    def __getattr__(self, name):  # what a family's forward hands on besides: cross attentions, router logits, ...
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head(model, hidden, vocab):
    """(N, H) hidden states -> (N, vocab) float32 logits.

    Runs the family's own forward with the trunk replaced by `hidden`, so that tied weights, scales and soft caps are the
    family's business and not ours."""
    with forward_replaced([decoder_of(model)], lambda *args, **kwargs: TrunkOutput(last_hidden_state=hidden[None])):
        logits = model(input_ids=hidden.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits.flatten(0, 1)
    # A view where it can be one: the backward of a slice would fill another (N, V).
    return (logits if logits.size(1) == vocab else logits[:, :vocab]).float()


# ---------------------------------------------------------------------------------------------------------------------
# Divergences. p is the teacher, q the student: two (..., V) float32 logits in, one number per token (...) out.
# Mixtures are taken in log space: through probabilities a sharp logit gives 0 * -inf.
# ---------------------------------------------------------------------------------------------------------------------


def kl(log_p, log_q):
    """KL(p || q) = sum_v p_v (log p_v - log q_v), of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mix(log_p, log_q, share):
    """log(share p + (1 - share) q), for 0 < share < 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def fkl(p_logits, q_logits):
    """KL(p || q): q must cover all that p does. Hinton et al. 2015, arXiv:1503.02531.

    With the entropy of p, which published code drops: its gradient is 0 for a frozen teacher but not for a moving one."""
    return kl(p_logits.log_softmax(-1), q_logits.log_softmax(-1))


def rkl(p_logits, q_logits):
    """KL(q || p): q may settle on one mode of p. Gu et al. 2023 (MiniLLM), arXiv:2306.08543."""
    return fkl(q_logits, p_logits)


def frkl(p_logits, q_logits, weight=0.5):
    """weight KL(p || q) + (1 - weight) KL(q || p): both directions. The fixed form of what AKL adapts, arXiv:2404.02657."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)


def jsd(p_logits, q_logits, beta=0.5):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; fkl at beta = 0, rkl at beta = 1.

    Bounded where fkl and rkl are not. Agarwal et al. 2023 (GKD), arXiv:2306.13649, eq. 1."""
    if beta in (0, 1):
        return rkl(p_logits, q_logits) if beta else fkl(p_logits, q_logits)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    log_m = mix(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def tvd(p_logits, q_logits):
    """1/2 sum |p - q|: the mass that has to move; symmetric, at most 1. Wen et al. 2023 (f-distill), arXiv:2307.15190."""
    return 0.5 * (p_logits.softmax(-1) - q_logits.softmax(-1)).abs().sum(-1)


def sfkl(p_logits, q_logits, skew=0.1):
    """KL(p || skew p + (1 - skew) q): fkl that a zero of q cannot blow up. Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return kl(log_p, mix(log_p, log_q, skew) if skew else log_q)


def srkl(p_logits, q_logits, skew=0.1):
    """KL(q || (1 - skew) p + skew q): rkl that a zero of p cannot blow up. Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""
    return sfkl(q_logits, p_logits, skew)


def akl(p_logits, q_logits, mu=0.5):
    """fkl and rkl weighted by the gap sum |p - q| in the head and in the tail of p: fkl mends heads, rkl tails.

    The head is the smallest set of the teacher's likeliest tokens with mass >= mu; the token that crosses mu belongs to it
    (paper), while the authors' file puts it in the tail. Wu et al. 2024, arXiv:2404.02657."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < mu
        head_gap, tail_gap = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
        share = head_gap / (head_gap + tail_gap).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


def ab(p_logits, q_logits, alpha=0.2, beta=0.7):
    """-1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)].

    (1, 0) is fkl and (0, 1) is rkl, taken in closed form, as is any other pair with one zero.
    Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    if alpha == 0:
        log_p, log_q, alpha, beta = log_q, log_p, beta, alpha
    if beta == 0:
        p_power, q_power = (alpha * log_p).exp(), (alpha * log_q).exp()
        return (p_power * (alpha * (log_p - log_q)) - p_power + q_power).sum(-1) / alpha**2
    total = alpha + beta
    cross = (alpha * log_p + beta * log_q).exp()
    powers = alpha * (total * log_p).exp() + beta * (total * log_q).exp()
    return (powers / total - cross).sum(-1) / (alpha * beta)


def taid(p_logits, q_logits, t):
    """Cross-entropy to softmax((1 - t) sg[z_q] + t z_p): the target walks from student to teacher as t goes to 1.

    Shing et al. 2025, arXiv:2501.16937, eq. 3; how t moves is in `taid_step`."""
    target = torch.lerp(q_logits.detach(), p_logits, t).softmax(-1)
    return -(target * q_logits.log_softmax(-1)).sum(-1)


def taid_step(state, loss, progress, start, end=1.0, delta=5e-4, momentum=0.99):
    """t moves at least linearly, and faster while the loss falls (TAID, algorithm 1). All tensors: no wait for the GPU."""
    loss = torch.where(torch.isfinite(loss), loss, state["loss"])  # a step that is skipped
    relative = (state["loss"] - loss) / (state["loss"] + 1e-15)
    relative = torch.where(torch.isfinite(state["loss"]), relative, torch.zeros_like(relative))  # first step: no change yet
    state["momentum"] = momentum * state["momentum"] + (1 - momentum) * relative
    faster = state["t"] + delta * state["momentum"].sigmoid() * (1 - state["t"])
    state["t"] = faster.clamp(min=start + (end - start) * progress, max=end)
    state["loss"] = loss


# name: (function, {its parameter: the flag})
DIVERGENCES = {
    "fkl": (fkl, {}),
    "rkl": (rkl, {}),
    "frkl": (frkl, {"weight": "fkl_weight"}),
    "jsd": (jsd, {"beta": "beta"}),
    "tvd": (tvd, {}),
    "sfkl": (sfkl, {"skew": "skew"}),
    "srkl": (srkl, {"skew": "skew"}),
    "akl": (akl, {"mu": "mu"}),
    "ab": (ab, {"alpha": "ab_alpha", "beta": "ab_beta"}),
    "taid": (taid, {}),  # its t is state, not a flag
}

# ---------------------------------------------------------------------------------------------------------------------
# The method table. A method = a divergence x whose text it is measured on x whether the teacher moves.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    divergence: DivergenceName
    text: TextName = "data"
    teacher_moves: bool = False
    student_ce_weight: float = 0.0
    sgo_fraction: float = 0.0
    policy_gradient: bool = False
    paper: str = ""


METHODS = {
    "sft": Method("fkl", student_ce_weight=1.0, paper="cross-entropy on the gold text, no teacher"),
    "fkl": Method("fkl", paper="Hinton et al. 2015, arXiv:1503.02531"),
    "rkl": Method("rkl", paper="Gu et al. 2023, arXiv:2306.08543"),
    "frkl": Method("frkl", paper="fixed form of AKL, arXiv:2404.02657"),
    "jsd": Method("jsd", paper="Agarwal et al. 2023, arXiv:2306.13649"),
    "tvd": Method("tvd", paper="Wen et al. 2023, arXiv:2307.15190"),
    "sfkl": Method("sfkl", paper="Ko et al. 2024, arXiv:2402.03898"),
    "srkl": Method("srkl", paper="Ko et al. 2024, arXiv:2402.03898"),
    "akl": Method("akl", paper="Wu et al. 2024, arXiv:2404.02657"),
    "ab": Method("ab", paper="Wang et al. 2025, arXiv:2505.04560"),
    "taid": Method("taid", paper="Shing et al. 2025, arXiv:2501.16937"),
    "seqkd": Method("fkl", text="teacher", student_ce_weight=1.0, paper="Kim & Rush 2016, arXiv:1606.07947"),
    "imitkd": Method("fkl", text="student", sgo_fraction=1.0, paper="Lin et al. 2020, arXiv:2009.07253"),
    "gkd": Method("jsd", text="student", sgo_fraction=0.5, paper="Agarwal et al. 2023, arXiv:2306.13649"),
    "distillm": Method("srkl", text="adaptive", paper="Ko et al. 2024, arXiv:2402.03898"),
    "minillm": Method("rkl", text="mixture", policy_gradient=True, paper="Gu et al. 2023, arXiv:2306.08543"),
    "okd": Method("fkl", teacher_moves=True, paper="Rao et al. 2024, arXiv:2409.12512"),
}
assert set(DIVERGENCES) == set(DivergenceName.__args__) and set(METHODS) == set(MethodName.__args__)


def bind_divergence(args, taid_state):
    """Flags -> D(p_logits, q_logits), with parameters and temperature bound."""
    function, flags = DIVERGENCES[args.divergence]
    parameters = {name: getattr(args, flag) for name, flag in flags.items()}
    if args.divergence == "taid":
        parameters["t"] = taid_state["t"]
    return functools.partial(softened, functools.partial(function, **parameters), temperature=args.temperature)


def softened(divergence, p_logits, q_logits, temperature):
    """temperature^2 D(z_p / temperature, z_q / temperature): the square keeps the gradient's size (Hinton et al. 2015)."""
    if temperature == 1:
        return divergence(p_logits, q_logits)
    return divergence(p_logits / temperature, q_logits / temperature) * temperature**2


def cross_entropy(logits, labels):
    """(N, V) logits, (N,) gold tokens -> (N,) -log of the gold token's probability."""
    return F.cross_entropy(logits, labels, reduction="none")


def student_loss(p_logits, q_logits, labels, divergence, ce_weight, rollout=None):
    """L_S per token, (N,), plus the policy gradient where the tokens are rollouts. Nothing flows into the teacher."""
    loss = 0
    if ce_weight < 1:
        loss = (1 - ce_weight) * divergence(p_logits.detach(), q_logits)
    if ce_weight > 0:
        loss = loss + ce_weight * cross_entropy(q_logits, labels)
    if rollout is not None and rollout.size(1):
        loss = loss + policy_loss(q_logits, labels, *rollout.unbind(1))
    return loss


def policy_loss(q_logits, labels, advantage, sampled_log_q, weight, clip=0.2):
    """Clipped policy gradient of MiniLLM, per token: the ratio q / q_when_sampled times the importance weight
    q / (share p + (1 - share) q) of the mixture that the token was drawn from. arXiv:2306.08543, eq. 5 and algorithm 1."""
    ratio = (-cross_entropy(q_logits, labels) - sampled_log_q).exp() * weight
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def teacher_loss(p_logits, q_logits, p0_logits, labels, ce_weight, lam, anchor, kl_direction, temperature):
    """L_T per token, (N,). Nothing flows into the student, nor into p_0.

    For a fixed q and direction qp the best p_f per token is (ce_weight d + lam q + anchor p_0) / (ce_weight + lam + anchor),
    d being the gold token: the module draws the teacher toward what the student can follow."""
    loss, log_p = 0, p_logits.log_softmax(-1)
    soft_p = log_p if temperature == 1 else (p_logits / temperature).log_softmax(-1)  # one softmax for all terms, mostly
    if ce_weight > 0:
        loss = -ce_weight * log_p.gather(-1, labels[:, None]).squeeze(-1)
    if lam > 0:
        soft_q = (q_logits.detach() / temperature).log_softmax(-1)
        loss = loss + lam * temperature**2 * (kl(soft_p, soft_q) if kl_direction == "pq" else kl(soft_q, soft_p))
    if anchor > 0:
        loss = loss + anchor * temperature**2 * kl((p0_logits.detach() / temperature).log_softmax(-1), soft_p)
    return loss


@torch.no_grad()
def measure(p0_logits, p_logits, q_logits, labels):
    """Sums over tokens of what every method reports, whatever it trains on. Entropies and KLs in nats."""
    log_p0, log_p, log_q = (logits.log_softmax(-1) for logits in (p0_logits, p_logits, q_logits))
    gold = labels[:, None]
    values = dict(
        fkl=kl(log_p0, log_q),  # to the frozen teacher p_0, also when the teacher moves
        rkl=kl(log_q, log_p0),
        student_ce=-log_q.gather(-1, gold),
        teacher_ce=-log_p.gather(-1, gold),
        student_entropy=-(log_q.exp() * log_q).sum(-1),
        teacher_entropy=-(log_p.exp() * log_p).sum(-1),
        top1_agreement=(log_p0.argmax(-1) == log_q.argmax(-1)).float(),
        drift=kl(log_p0, log_p),
    )
    return {name: value.sum() for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# One micro-batch: two trunks, then heads, losses and their gradients over chunks of tokens, then back through the trunks
# ---------------------------------------------------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**23  # logits of one network alive at once: 32 MB in float32, whatever the batch and the vocabulary


def run_batch(student, teacher, batch, vocab, hw, losses=None, backward=None, teacher_trains=False, need_p0=False, look=False):
    """Forward, and with `backward` also back-propagate, one Batch. -> {name: sum over its tokens}, tensors on the device.

    losses(p0_logits, p_logits, q_logits, labels, rollout) -> {name: (n,) losses}; what flows back is their sum. The gradient with
    respect to the hidden states is collected chunk by chunk and sent through each trunk once, so no more than
    CHUNK_ELEMENTS logits per network live at a time. `look` adds what `measure` measures. teacher may be None."""
    with hw.autocast():
        hidden = {"q": hidden_states(student, batch)}
        if teacher is not None:
            with torch.set_grad_enabled(teacher_trains and backward is not None):
                hidden["p"] = hidden_states(teacher, batch, trunk=True)
            if need_p0:
                with torch.no_grad(), module_off(teacher):
                    hidden["p0"] = hidden_states(teacher, batch, trunk=True)
    leaves = {name: h.detach().requires_grad_(h.requires_grad) for name, h in hidden.items()}

    sums, rows = Counter(), max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, len(batch.labels), rows):
        part = slice(start, start + rows)
        labels, logits = batch.labels[part], {"p": None}
        with hw.autocast():
            for name, leaf in leaves.items():
                logits[name] = head(student if name == "q" else teacher, leaf[part], vocab)
        p, q, p0 = logits["p"], logits["q"], logits.get("p0", logits["p"])
        terms = losses(p0, p, q, labels, batch.rollout[part]) if losses else {}
        if backward:
            backward(sum(term.sum() for term in terms.values()))
        for name, term in terms.items():
            sums[name] += term.detach().sum()
        if look:
            sums.update(measure(p0, p, q, labels) if p is not None else {"student_ce": cross_entropy(q.detach(), labels).sum()})
    if backward:
        moving = [name for name, leaf in leaves.items() if leaf.requires_grad]
        gradients = [torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad for name in moving]
        torch.autograd.backward([hidden[name] for name in moving], gradients)
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# Generating and scoring
# ---------------------------------------------------------------------------------------------------------------------


def part_seed(seed, part):
    """Seed of one part of a job, so that the part comes out the same wherever the job was interrupted."""
    return (seed * 1_000_003 + part) % 2**63


@torch.no_grad()
def generate(model, tokenizer, prompts, hw, max_new_tokens, batch_size=32, sample=False, seed=0, vocab=None, teacher=None, **options):
    """Lists of prompt ids -> lists of response ids, in the same order; EOS, where one was written, is kept.

    Left-padded batches of prompts of like length, KV cache, eval mode, never beyond the model's positions. sample=True draws
    at temperature 1 from the whole distribution, and the same seed draws the same text. With `vocab` the first so many
    tokens are kept to, a row's text depends on its number and not on the batch it stands in, and with a teacher every token
    is drawn from TEACHER_SHARE p + (1 - TEACHER_SHARE) q. `options` go to transformers' GenerationConfig. Several processes
    share the prompts, and each gets all responses."""
    room = positions(model) - max(map(len, prompts))
    config = transformers.GenerationConfig(
        max_new_tokens=int(min(max_new_tokens, room)), do_sample=sample and vocab is None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **(dict(temperature=1.0, top_p=1.0, top_k=0) if sample and vocab is None else {}) | options,
    )  # fmt: skip
    responses, networks = {}, [network for network in (model, teacher) if network is not None]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # out of memory at once or never
    order += order[:1] * (-len(order) % hw.world)  # as many for each process: in sharded networks they wait for each other
    order = order[hw.rank :: hw.world]
    devices = [hw.device] if hw.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), hw.autocast(), eval_mode(*networks):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in rows)
            input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(rows):
                input_ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                attention_mask[row, width - len(prompts[i]) :] = 1
            input_ids, attention_mask = input_ids.to(hw.device), attention_mask.to(hw.device)
            drawn = [NextTokens(vocab, teacher, attention_mask, [part_seed(seed, i) for i in rows] if sample else None)] if vocab else []
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config,
                                    logits_processor=drawn, synced_gpus=is_sharded(model))  # fmt: skip
            for i, ids in zip(rows, output[:, width:].tolist()):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                responses[i] = ids[:end]
    responses = functools.reduce(dict.__or__, hw.gather(responses))
    return [responses[i] for i in range(len(prompts))]


def rouge_l(prediction, references):
    """Rouge-L F times 100, with the stemmer, the best over the references. Lin 2004; rouge-score's implementation."""
    return 100 * _rouge_scorer().score_multi(references, prediction)["rougeL"].fmeasure


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def score(args, model, tokenizer, examples, hw):
    """-> (mean Rouge-L of greedy answers, the answers)."""
    ids = generate(model, tokenizer, [example.prompt_ids for example in examples], hw, args.max_new_tokens)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = [rouge_l(text, example.references) for text, example in zip(texts, examples)]
    return sum(scores) / len(scores), texts


def format_table(header, rows):
    """Cells to one string: first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# Whose text: every source gives the rows of one optimizer step
# ---------------------------------------------------------------------------------------------------------------------

TEACHER_SHARE = 0.2  # of the mixture that MiniLLM samples from
GAMMA = 0.95  # MiniLLM's discount


class NextTokens(transformers.LogitsProcessor):
    """Keeps to the shared vocabulary, with a teacher mixes its distribution in, and with seeds draws: token by token.

    The teacher has its own KV cache and reads every new token once. Every row has its own random numbers, so that its text
    is the same in any batch and any process; what is drawn alone keeps a finite score, for a greedy search to find."""

    def __init__(self, vocab, teacher, attention_mask, seeds=None):
        self.vocab, self.teacher, self.mask, self.cache = vocab, teacher, attention_mask, None
        self.chances = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
        self.positions = teacher is not None and "position_ids" in inspect.signature(without_peft(teacher).forward).parameters

    def __call__(self, input_ids, scores):
        log_q = scores[:, : self.vocab].float().log_softmax(-1)
        if self.teacher is not None:
            self.mask = F.pad(self.mask, (0, input_ids.size(1) - self.mask.size(1)), value=1)
            inputs = dict(input_ids=input_ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            if self.positions:  # not with ALiBi
                inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)
            if self.cache is not None:
                inputs |= {name: inputs[name][:, -1:] for name in ("input_ids", "position_ids") if name in inputs}
            output = self.teacher(**inputs)
            self.cache = output.past_key_values
            log_q = mix(output.logits[:, -1, : self.vocab].float().log_softmax(-1), log_q, TEACHER_SHARE)
        if self.chances:
            mass = log_q.exp().cumsum(-1)
            draw = torch.stack([torch.rand(1, generator=chance) for chance in self.chances]).to(mass.device) * mass[:, -1:]
            token = torch.searchsorted(mass, draw, right=True).clamp_max(self.vocab - 1)
            log_q = torch.full_like(log_q, -math.inf).scatter(1, token, 0.0)
        return F.pad(log_q, (0, scores.size(1) - self.vocab), value=-math.inf)


class Text:
    """The rows that the losses are measured on, by `args.text`. `state` is all that a resume needs: the rest depends on the
    seed and the step alone."""

    def __init__(self, args, student, teacher, rows, tokenizer, vocab, hw, seed, steps):
        self.args, self.student, self.teacher, self.rows = args, student, teacher, rows
        self.tokenizer, self.vocab, self.hw, self.seed, self.steps = tokenizer, vocab, hw, seed, steps
        self.lengths, self.sampling_s = tuple(len(row) for row in rows), 0.0
        self.state = dict(phi=args.sgo_fraction, reference=None, replay=[], rollouts=[])

    def __call__(self, step):
        source = dict(data=self.data, teacher=self.data, student=self.written, adaptive=self.adaptive, mixture=self.mixture)
        return source[self.args.text](step)  # the teacher's text was put in place of the gold one by `teacher_text`

    def saved_state(self):
        rows = {name: [dataclasses.asdict(row) for row in self.state[name]] for name in ("replay", "rollouts")}
        return self.state | rows | dict(sampling_s=self.sampling_s)

    def load_state(self, saved):
        self.sampling_s = saved.pop("sampling_s")
        self.state = saved | {name: [Example(**row) for row in saved[name]] for name in ("replay", "rollouts")}

    def chance(self, step):
        """Random numbers of this step, whatever was drawn before."""
        return random.Random(f"{self.seed}, text of step {step}")

    def data(self, step):
        return [self.rows[i] for i in batch_indices(self.lengths, self.args.batch_size, self.seed, step)]

    def written(self, step):
        """Student text with probability --sgo-fraction, else data. Lin et al. 2020 (ImitKD), Agarwal et al. 2023 (GKD)."""
        rows, chance = self.data(step), self.chance(step)
        if chance.random() >= self.args.sgo_fraction:
            return rows
        rows = self.answer(rows, step)
        if self.args.sgo_source == "fresh":
            return rows
        self.push(rows)
        return self.replayed(chance)

    def adaptive(self, step):
        """DistiLLM: student text with probability phi, and ever more often replayed than fresh. Ko et al. 2024, algorithm 1."""
        rows, chance, phi = self.data(step), self.chance(step), self.state["phi"]
        r = chance.random()
        if r >= phi:
            return rows
        if r < phi * (1 - step / self.steps) or len(self.state["replay"]) < self.args.replay_capacity:
            rows = self.answer(rows, step)
            self.push(rows)
            return rows
        return self.replayed(chance)

    def mixture(self, step):
        """MiniLLM: rollouts from the mixture of teacher and student, gone through --rollout-passes times."""
        size = min(self.args.batch_size, len(self.rows))
        per_pass = max(1, min(self.args.rollouts, len(self.rows)) // size)
        round_, within = divmod(step, per_pass * self.args.rollout_passes)
        if within == 0:
            prompts = sum((self.data(round_ * per_pass + i) for i in range(per_pass)), [])
            self.state["rollouts"] = self.judge(self.answer(prompts, step, self.teacher))
        rollouts = self.state["rollouts"]
        return [rollouts[i] for i in batch_indices([len(row) for row in rollouts], size, f"{self.seed}, {round_}", within)]

    def answer(self, rows, step, teacher=None):
        """The student's own words (with a teacher: the mixture's) to the prompts of `rows`, as rows."""
        start, args = time.perf_counter(), self.args
        responses = generate(self.student, self.tokenizer, [row.prompt_ids for row in rows], self.hw, args.max_new_tokens,
                             args.batch_size, True, part_seed(self.seed, step), self.vocab, teacher)  # fmt: skip
        self.hw.synchronize()
        self.sampling_s += time.perf_counter() - start
        return [with_response(row, ids, args.max_length) for row, ids in zip(rows, responses)]

    def push(self, rows):
        self.state["replay"] = [*self.state["replay"], *rows][-self.args.replay_capacity :]

    def replayed(self, chance):
        replay = self.state["replay"]
        return chance.sample(replay, min(self.args.batch_size, len(replay)))

    def judge(self, rows):
        """Rollouts -> the same with advantage, log q and importance weight of every response token."""
        start, log_p, log_q = time.perf_counter(), [], []
        rows = sorted(rows, key=len)

        def keep(p0_logits, p_logits, q_logits, labels, rollout):
            log_p.append(-cross_entropy(p_logits, labels))
            log_q.append(-cross_entropy(q_logits, labels))
            return {}

        with torch.no_grad(), eval_mode(self.student):
            for part in micro_batches(rows, self.args):
                run_batch(self.student, self.teacher, collate(part, self.tokenizer.pad_token_id).to(self.hw.device), self.vocab, self.hw, keep)
        log_p, log_q = torch.cat(log_p).cpu(), torch.cat(log_q).cpu()
        weight = (log_q - mix(log_p, log_q, TEACHER_SHARE)).exp()
        lengths = [len(row.response_ids) for row in rows]
        advantage = whiten(torch.cat([discounted_return(r, GAMMA) for r in (log_p - log_q).split(lengths)]))
        values = torch.stack([advantage, log_q, weight], dim=1).split(lengths)
        self.sampling_s += time.perf_counter() - start
        return [dataclasses.replace(row, rollout=value.tolist() if self.args.policy_gradient else None) for row, value in zip(rows, values)]

    def validated(self, loss, patience=0.1, step=0.1):
        """DistiLLM: phi grows when the validation loss has risen by `patience` over its reference, which is then replaced."""
        if self.state["reference"] is None:
            self.state["reference"] = loss
        elif loss >= self.state["reference"] + patience:
            self.state["phi"], self.state["reference"] = min(1.0, self.state["phi"] + step), loss


def with_response(row, response_ids, max_length):
    return dataclasses.replace(row, response_ids=response_ids[: max_length - len(row.prompt_ids)], trunk=None, rollout=None)


def discounted_return(rewards, gamma):
    """(n,) rewards of one response -> (n,) R_t = sum_{k >= t} gamma^(k - t) r_k / (n - t), MiniLLM's length-normalised return.

    r_t itself is in R_t, as in the authors' code; the paper's long-term part starts at r_(t+1)."""
    steps = torch.arange(len(rewards))
    discount = gamma ** (steps[None, :] - steps[:, None]).clamp_min(0) * (steps[None, :] >= steps[:, None])
    return discount.to(rewards) @ rewards / (len(rewards) - steps)


def whiten(values):
    """Mean 0, variance 1, over response tokens (the authors' code counts padding too)."""
    return (values - values.mean()) / (values.std(unbiased=False) + 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def adamw(model, lr, weight_decay):
    """Fused AdamW over what is trainable. Norms and biases, the 1-D weights, are not decayed; sharded weights stand apart."""
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            group = groups.setdefault((p.ndim >= 2, isinstance(p, DTensor)), dict(params=[], weight_decay=weight_decay if p.ndim >= 2 else 0.0))
            group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=lr, fused=True)


def clip(parameters, max_norm):
    """Scale all gradients, sharded or not, so that together their norm is at most max_norm. -> the norm before."""
    kinds = [[p for p in parameters if p.grad is not None and isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]
    norm = torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def learning_rate(step, steps, peak, warmup, floor=1e-7):
    """Linear to the peak over the first `warmup` share of the steps, then a cosine to the floor at the last step."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    progress = (step - rising) / max(1, steps - 1 - rising)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def lam_at(progress, lam, schedule):
    """lam of L_T when `progress` in [0, 1] of the run is over."""
    return lam * {"constant": 1.0, "rise": progress, "fall": 1.0 - progress}[schedule]


class Stopped(BaseException):  # past every `except Exception`, as KeyboardInterrupt is
    """SIGTERM or SIGINT came. Everything is on disk."""

    def __init__(self, number, where=""):
        super().__init__(number)
        self.number, self.text = number, f"stopped by {signal.Signals(number).name}{where}"


class Signals:
    """The first SIGTERM or SIGINT lets a training finish its step and save; a second one ends the process at once."""

    def __init__(self):
        self.received, self.deferred = 0, False

    def handle(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            raise Stopped(number)

    @contextlib.contextmanager
    def handled(self):
        self.received = 0
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def finish_step(self):
        """Inside, a signal waits for the loop to ask for it."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.received:
            raise Stopped(self.received)


SIGNALS = Signals()
MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which a training stops


@SIGNALS.finish_step()
def train(args, phase, student, teacher, data, tokenizer, vocab, hw, report, lr, steps, seed, keeper=None):
    """Train the student, and the teacher's module with it when args.teacher_moves. `args` says which method.

    Same batches, schedule and optimizer for every method. With a `keeper` it goes on from the newest checkpoint and writes
    its own. -> what the run's table shows. Raises Stopped after a signal, UserError when no gradient is finite any more."""
    device = hw.device
    hw.reset_peak_memory()  # that of a warm start is not this training's
    student.train()  # the teacher stays in eval mode: a dropped-out teacher would be another teacher every step
    optimizers = {"student": (student, adamw(student, lr, args.weight_decay))}
    if args.teacher_moves:
        optimizers["teacher"] = (teacher, adamw(teacher, lr * args.teacher_lr_ratio, args.weight_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=hw.dtype == torch.float16)
    taid_state = dict(t=torch.tensor(args.taid_start, device=device), momentum=torch.zeros((), device=device),
                      loss=torch.full((), math.inf, device=device))  # fmt: skip
    skipped = dict(total=torch.zeros((), device=device), in_a_row=torch.zeros((), device=device))
    text = Text(args, student, teacher, data["train"], tokenizer, vocab, hw, seed, steps)
    eval_every = args.eval_every or max(50, steps // 5)

    def new_window():  # since the last report: sums, how often each was added to, tokens, steps, start
        return dict(sums=Counter(), seen=Counter(), tokens=0, steps=0, start=time.perf_counter())

    def dev():
        return evaluate(args, student, teacher, data["dev"][: args.eval_rows], tokenizer, vocab, hw)

    # Where to begin. The order of the data, the text and the dropout of a step depend on its number and the seed alone.
    state = dict(step=0, start=time.perf_counter(), evaluation_s=0.0, first_dev=None, last_dev=None, window=new_window())
    if keeper is not None and (found := keeper.load()):
        tensors, state = found
        unpack(tensors, optimizers, taid=taid_state, skipped=skipped)
        scaler.load_state_dict(state["scaler"]), text.load_state(state["text"])
        late = time.perf_counter() - state["clock"]  # every process has its own zero
        state["start"] += late
        state["window"] |= {name: Counter(state["window"][name]) for name in ("sums", "seen")} | dict(start=state["window"]["start"] + late)
    elif data.get("dev") and args.eval_rows and teacher is not None:
        state["first_dev"] = state["last_dev"] = dev()
        text.validated(state["first_dev"]["student_ce"])
        state["evaluation_s"] = time.perf_counter() - state["start"]
        report(phase, 0, {f"dev/{name}": value for name, value in state["first_dev"].items()})
        state["window"] = new_window()
    timed = []  # (rows, seconds of the step so far) for --benchmark
    bar = tqdm(range(state["step"], steps), desc=phase, initial=state["step"], total=steps, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    for step in bar:
        window = state["window"]

        # Whose text.
        torch.manual_seed(part_seed(part_seed(seed, step), hw.rank))
        examples = text(step)
        tokens = sum(len(example.response_ids) for example in examples)  # of the whole batch, whatever its split

        # Which terms. A network that no term and no report asks for does not run.
        progress = step / max(1, steps - 1)
        lam = lam_at(progress, args.lam, args.lam_schedule)
        look = (step + 1) % args.log_every == 0 or step == steps - 1
        teacher_trains = args.teacher_moves and step % args.update_teacher_every == 0
        divergence = bind_divergence(args, taid_state)

        def losses(p0_logits, p_logits, q_logits, labels, rollout):
            terms = {"student_loss": student_loss(p_logits, q_logits, labels, divergence, args.student_ce_weight, rollout)}
            if teacher_trains:
                terms["teacher_loss"] = teacher_loss(p_logits, q_logits, p0_logits, labels, args.teacher_ce_weight, lam,
                                                     args.anchor, args.teacher_kl, args.temperature)  # fmt: skip
            return terms

        # Both losses from one forward of each network. Neither reaches into the other network, so one backward serves.
        asked = teacher if look or teacher_trains or args.student_ce_weight < 1 else None
        need_p0 = asked is not None and args.teacher_moves and (look or (teacher_trains and args.anchor > 0))
        sums, looked = Counter(), Counter()
        for rows in micro_batches(examples, args, hw):
            part = run_batch(student, asked, collate(rows, tokenizer.pad_token_id).to(device), vocab, hw, losses,
                             lambda total: scaler.scale(total / tokens).backward(), teacher_trains, need_p0, look)  # fmt: skip
            for name, value in part.items():
                (sums if name.endswith("_loss") else looked)[name] += value
        sums = hw.total(sums, ["student_loss", "teacher_loss"][: 1 + teacher_trains])

        # Step. The module walks at its own, smaller rate. A step whose gradient is not finite is skipped on the device.
        no_step = torch.zeros((), device=device)
        for name, (model, optimizer) in optimizers.items():
            if name == "teacher" and not teacher_trains:
                continue
            rate = learning_rate(step, steps, lr, args.warmup) * (args.teacher_lr_ratio if name == "teacher" else 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            trainable = [p for p in model.parameters() if p.requires_grad]
            hw.sum_gradients(trainable)
            scaler.unscale_(optimizer)
            norm = clip(trainable, args.max_grad_norm or math.inf)
            window["seen"][f"{name}_grad_norm"] += 1
            window["sums"][f"{name}_grad_norm"] += norm
            if not scaler.is_enabled():  # what a GradScaler tells a fused optimizer
                optimizer.found_inf = (~norm.isfinite()).float()
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            no_step = torch.maximum(no_step, (~norm.isfinite()).float())
        scaler.update()
        skipped["total"] += no_step
        skipped["in_a_row"] = (skipped["in_a_row"] + 1) * no_step
        if args.divergence == "taid":
            taid_step(taid_state, sums["student_loss"] / tokens, progress, args.taid_start)

        # Report. Between reports nothing is read back from the device, so a GPU is never waited for.
        for name, value in sums.items():
            window["sums"][name] += value / tokens
        window["seen"].update(sums.keys())  # the teacher's terms may be there on every n-th step only
        window["tokens"] += sum(map(len, examples))
        window["steps"] += 1
        if look:
            hw.synchronize()
            seconds = time.perf_counter() - window["start"]
            metrics = {name: float(value) / window["seen"][name] for name, value in window["sums"].items()}
            metrics |= {name: float(value) / tokens for name, value in hw.total(looked).items()}
            metrics |= dict(lr=learning_rate(step, steps, lr, args.warmup), tokens_per_s=window["tokens"] / seconds, step_s=seconds / window["steps"],
                            peak_memory_gb=hw.peak_memory() / 1e9, skipped_steps=float(skipped["total"]))  # fmt: skip
            if args.teacher_moves:
                metrics["lam"] = lam
            if args.text == "adaptive":
                metrics["phi"] = text.state["phi"]
            if args.divergence == "taid" and args.student_ce_weight < 1:
                metrics["taid_t"] = float(taid_state["t"])
            so_far = {"time/sampling_s": text.sampling_s}
            report(phase, step + 1, {f"train/{name}": value for name, value in metrics.items()} | so_far, bar)
        if state["first_dev"] is not None and ((step + 1) % eval_every == 0 or step == steps - 1):
            dev_start = time.perf_counter()
            now = dev()
            text.validated(now["student_ce"])
            state["last_dev"] = now | dict(collapsed=collapsed(state["first_dev"], now))
            report(phase, step + 1, {f"dev/{name}": value for name, value in state["last_dev"].items()}, bar)
            state["evaluation_s"] += time.perf_counter() - dev_start
        if args.benchmark:
            hw.synchronize()
            timed.append((examples, time.perf_counter()))
        if look:  # the clock of the next window starts after the looks at the dev rows
            state["window"] = window = new_window()

        # Survive.
        state["step"] = step + 1
        stuck = look and skipped["in_a_row"] >= MAX_SKIPPED
        signalled = hw.any(SIGNALS.received)
        if keeper is not None and (stuck or signalled or (args.save_every and (step + 1) % args.save_every == 0)):
            window["sums"] = Counter({name: float(value) for name, value in window["sums"].items()})
            state |= dict(clock=time.perf_counter(), scaler=scaler.state_dict(), text=text.saved_state())
            keeper.save(step + 1, pack(optimizers, taid=taid_state, skipped=skipped), state)
        if stuck:
            raise UserError(f"{phase}, step {step + 1}: the last {int(skipped['in_a_row'])} gradients were not finite, and their steps were skipped. The "
                            "weights of the last good step are kept; try a smaller --lr or --lam, or --precision fp32")  # fmt: skip
        if signalled:
            raise Stopped(signalled, f" after step {step + 1} of {phase}")
    bar.close()
    student.eval()
    seconds = time.perf_counter() - state["start"] - state["evaluation_s"]
    return dict(seconds=seconds, sampling_s=text.sampling_s, timed=timed, first_dev=state["first_dev"], last_dev=state["last_dev"])


@torch.no_grad()
def evaluate(args, student, teacher, examples, tokenizer, vocab, hw):
    """Means over the response tokens of `examples` of everything in `measure`, the student's dropout off."""
    sums = Counter()
    with eval_mode(student):
        for rows in micro_batches(examples, args, hw):
            batch = collate(rows, tokenizer.pad_token_id).to(hw.device)
            sums.update(run_batch(student, teacher, batch, vocab, hw, need_p0=args.teacher_moves, look=True))
    tokens = sum(len(example.response_ids) for example in examples)
    return {name: float(value) / tokens for name, value in hw.total(sums).items()}


def collapsed(first, now):
    """1.0 when teacher and student met far away from the teacher's knowledge: the module has drifted from p_0 further
    than the student was from it at the start, and the student predicts the gold text worse than at the start."""
    return float(now["drift"] > first["fkl"] and now["student_ce"] > first["student_ce"])


# ---------------------------------------------------------------------------------------------------------------------
# What stays on disk
# ---------------------------------------------------------------------------------------------------------------------


class Report:
    """One dict of metrics, three readers: the progress bar (or the console), metrics.jsonl, and wandb under --track."""

    def __init__(self, folder, wandb_run=None):
        self.path = folder / "metrics.jsonl" if folder else pathlib.Path(os.devnull)
        self.wandb_run, self.printed = wandb_run, {}
        records = whole_lines(self.path)  # of a run that goes on
        self.start = time.perf_counter() - (records[-1]["seconds"] if records else 0.0)
        self.file = open(self.path, "a", buffering=1)

    def cut_back(self, phase, step):
        """Forget what a run that goes on will report again: this phase after `step`, and the end."""
        records = whole_lines(self.path)
        kept = [r for r in records if r["phase"] not in (phase, "final") or (r["phase"] == phase and r["step"] <= step)]
        if len(kept) < len(records):
            self.file.close()
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self.file = open(self.path, "a", buffering=1)
            self.start += records[-1]["seconds"] - (kept[-1]["seconds"] if kept else 0.0)

    def __call__(self, phase, step, metrics, bar=None):
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}
        record = dict(phase=phase, step=step, seconds=round(time.perf_counter() - self.start, 3), **finite)
        try:
            self.file.write(json.dumps(record) + "\n")
            if self.wandb_run is not None and phase == "distil":
                self.wandb_run.log(metrics | {"step": step})
        except Exception as error:  # a full disk, a wandb that has gone: training matters more than its log
            print(f"a report at step {step} was lost ({one_line(error)}); the run goes on", file=sys.stderr)
        shown = {name.split("/")[1]: f"{value:.3g}" for name, value in metrics.items()
                 if name.split("/")[1] in ("student_loss", "teacher_loss", "student_ce", "fkl", "tokens_per_s")}  # fmt: skip
        if bar is not None and not bar.disable:
            if any(name.startswith("train/") for name in metrics):
                bar.set_postfix(shown, refresh=False)
        elif bar is not None and (bar.total is None or step * 5 // bar.total != self.printed.get(phase)):
            self.printed[phase] = step * 5 // bar.total
            kind = " (dev)" if "dev/fkl" in metrics else ""
            print(f"  {phase} step {step}/{bar.total}{kind}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


def write_text(path, text):
    """The file is there whole, the old one or the new one, at any moment."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_folder(folder, *savers, replace=False):
    """Call every saver on a temporary folder, force it to the disk, rename: the folder is there whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for save in savers:
            save(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            force_to_disk(path)
        if replace and folder.exists():
            shutil.rmtree(folder)
        if not folder.exists():  # else another process was faster, with the same content
            temporary.rename(folder)
            force_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def force_to_disk(path):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def pack(optimizers, **states):
    """Everything that training changes -> {name: tensor on the CPU}. All processes must ask for it."""
    tensors = {f"{group}/{name}": value for group, state in states.items() for name, value in state.items()}
    for network, (model, optimizer) in optimizers.items():
        for name, p in model.named_parameters():
            if p.requires_grad:
                values = dict(weight=p.detach(), **optimizer.state[p])
                tensors |= {f"{network}/{name}/{what}": value for what, value in values.items()}
    return {name: whole(tensor).cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def unpack(tensors, optimizers, **states):
    """The inverse of `pack`, into networks and optimizers as they are sharded now."""
    for group, state in states.items():
        for name, value in state.items():
            state[name] = tensors[f"{group}/{name}"].to(value.device)
    for network, (model, optimizer) in optimizers.items():
        for name, p in model.named_parameters():
            if p.requires_grad:
                values = {what: tensors.get(f"{network}/{name}/{what}") for what in ("weight", "step", "exp_avg", "exp_avg_sq")}
                values = {what: value.to(p.device) for what, value in values.items() if value is not None}
                if isinstance(p, DTensor):
                    values = {what: distribute_tensor(value, p.device_mesh, p.placements) if value.ndim else value for what, value in values.items()}
                p.copy_(values.pop("weight"))
                optimizer.state[p] = values


class Checkpoints:
    """The last --keep states of one training: <run>/checkpoints/<phase>-<step> with tensors.safetensors, state.json and the
    sha256 of both. An older one goes only when a newer one is on the disk whole."""

    def __init__(self, folder, phase, args, hw, report):
        self.folder, self.phase, self.keep, self.hw, self.report = folder / "checkpoints", phase, args.keep, hw, report
        self.stem = phase.replace(" ", "-")

    def paths(self):
        return sorted(self.folder.glob(f"{self.stem}-{'[0-9]' * 8}"))

    def save(self, step, tensors, values):
        if self.hw.rank:
            return

        def write(path):
            safetensors.torch.save_file(tensors, path / "tensors.safetensors")
            (path / "state.json").write_text(json.dumps(values))
            (path / "sha256.json").write_text(json.dumps(self.sums(path)))

        path = self.folder / f"{self.stem}-{step:08d}"
        try:
            write_folder(path, write)
        except (OSError, safetensors.SafetensorError) as error:
            print(f"{path} could not be written ({one_line(error)}); the run goes on, and what was kept before stays", file=sys.stderr)
        else:
            for old in self.paths()[: -self.keep]:
                shutil.rmtree(old)

    def clear(self):
        for path in self.paths() if self.hw.rank == 0 else []:
            shutil.rmtree(path)

    def load(self):
        """-> (tensors, values) of the newest whole checkpoint, or None without any. Raises UserError when all are damaged."""
        path = self.hw.first(self.newest)
        values = json.loads((path / "state.json").read_text()) if path else None
        if self.hw.rank == 0:
            self.report.cut_back(self.phase, values["step"] if path else -1)
        if path:
            print(f"{self.phase}: goes on after step {values['step']}, from {path}")
            return safetensors.torch.load_file(path / "tensors.safetensors"), values

    def newest(self):
        for left in self.folder.glob("*.tmp-*"):  # of a save that was killed
            shutil.rmtree(left)
        paths = self.paths()
        for path in reversed(paths):
            with contextlib.suppress(OSError, ValueError):
                if json.loads((path / "sha256.json").read_text()) == self.sums(path):
                    return path
            print(f"{path} is damaged and was put aside; the one before it is used", file=sys.stderr)
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
        if paths:
            raise UserError(f"every checkpoint in {self.folder} is damaged; without --resume the run begins anew, in another folder")

    @staticmethod
    def sums(path):
        found = {}
        for name in ("tensors.safetensors", "state.json"):
            digest = hashlib.sha256()
            with open(path / name, "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
            found[name] = digest.hexdigest()
        return found


def fingerprint(name):
    """A model's name and, of a local folder, the state of its weights, configs and tokenizer, not of results kept beside them."""
    files = sorted(pathlib.Path(name).iterdir()) if os.path.isdir(name) else []
    files = [file for file in files if file.suffix == ".safetensors" or re.search("config|tokenizer", file.name)]
    return [name, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]


def fingerprint_rows(rows):
    return hashlib.sha256(json.dumps([(row.prompt_ids, row.response_ids) for row in rows]).encode()).hexdigest()


def short_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def cache_key(**determinants):
    return short_hash(determinants | dict(versions=[torch.__version__, transformers.__version__]))


def teacher_text(args, teacher, source, rows, tokenizer, vocab, hw):
    """The rows with the teacher's sampled answers in place of the gold ones (SeqKD), and the seconds it took to write them.

    Kept in the cache, chunk by chunk, so that an interrupted writing goes on where it stopped; the seed of a chunk does not
    depend on where that was."""
    sampling = dict(seed=args.seed, max_new_tokens=args.max_new_tokens, max_length=args.max_length, batch_size=args.batch_size)
    key = cache_key(source=fingerprint(source), data=fingerprint_rows(rows), vocab=vocab, hardware=[hw.device.type, str(hw.dtype)], **sampling)
    path = pathlib.Path(args.cache_dir).resolve() / f"text-{short_name(args.teacher)}-{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk, start = 8 * args.batch_size, time.perf_counter()
    written = hw.first(whole_lines, path)
    chunks = range(len(written) * chunk, len(rows), chunk)
    with open(path if hw.rank == 0 else os.devnull, "a") as file:
        for first in tqdm(chunks, desc="teacher writes", disable=not sys.stderr.isatty() or not chunks, dynamic_ncols=True):
            prompts = [row.prompt_ids for row in rows[first : first + chunk]]
            written.append(generate(teacher, tokenizer, prompts, hw, args.max_new_tokens, args.batch_size, True, part_seed(args.seed, first), vocab))
            file.write(json.dumps(written[-1]) + "\n")
            file.flush()
    responses = [ids for chunk_ids in written for ids in chunk_ids]
    return [with_response(row, ids, args.max_length) for row, ids in zip(rows, responses)], time.perf_counter() - start


@torch.no_grad()
def cache_trunk(args, teacher, source, rows, tokenizer, hw):
    """Rows with a view of the memory-mapped file that holds their hidden states below the teacher's module.

    Raises UserError when the module is on all layers, the disk is too small, or a forward from the file is not the full one."""
    if moving_block(teacher)[1] == 0:
        raise UserError("--cache-teacher-trunk: the module is on all of the teacher's layers, so there is nothing below it to keep")
    with hw.autocast():
        probe = below_module(teacher, collate(rows[:1], tokenizer.pad_token_id).input_ids.to(hw.device))
    tokens, (width, dtype) = sum(map(len, rows)), (probe.shape[-1], probe.dtype)
    key = cache_key(source=fingerprint(source), data=fingerprint_rows(rows), layers=module_depth(teacher, args), hardware=[hw.device.type, str(hw.dtype)])
    path = pathlib.Path(args.cache_dir).resolve() / f"trunk-{short_name(args.teacher)}-{key}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    size, there = tokens * width * probe.element_size(), path.exists()
    print(f"teacher trunk: {tokens} tokens x {width} in {str(dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB, {'kept' if there else 'written'} in {path}")
    if not there and size > shutil.disk_usage(path.parent).free:
        raise UserError(f"--cache-teacher-trunk needs {size / 1e9:.2f} GB in {path.parent}, where less is free: choose another --cache-dir")
    temporary = path if there else path.with_name(f"{path.name}.tmp-{os.getpid()}")
    states = torch.from_file(str(temporary), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
    rows = [dataclasses.replace(row, trunk=trunk) for row, trunk in zip(rows, states.split([len(row) for row in rows]))]
    if not there:
        for part in tqdm(micro_batches(rows, args), desc="teacher trunk", disable=not sys.stderr.isatty(), dynamic_ncols=True):
            input_ids = collate([dataclasses.replace(row, trunk=None) for row in part], tokenizer.pad_token_id).input_ids
            with hw.autocast():
                hidden = below_module(teacher, input_ids.to(hw.device))
            for row, values in zip(part, hidden):
                row.trunk.copy_(values[: len(row)])
        temporary.rename(path)
    batch = collate(rows[: min(8, len(rows))], tokenizer.pad_token_id).to(hw.device)
    with hw.autocast():
        full, short = hidden_states(teacher, batch), hidden_states(teacher, batch, trunk=True)
    difference = ((full - short).norm() / full.norm()).item()  # another padding may round differently, no more
    if not difference < {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(hw.dtype, 1e-4):
        raise UserError(f"--cache-teacher-trunk: the teacher's hidden states from {path} differ from a full forward by {difference:.1e} of their "
                        "norm; delete the file, or leave the flag out for this kind of model")  # fmt: skip
    return rows


def warm_start(args, role, data, tokenizer, hw, report, folder):
    """Fine-tune `role` on gold text unless a model with the same key is kept already. -> (its name or folder, seconds).

    The key holds all that determines the weights; the weights are always read back from disk, so that a run which trained
    them and one which found them start from the same bits."""
    name, full = getattr(args, role), role == "student" or args.teacher_sft == "full"
    epochs, lr = getattr(args, f"{role}_sft_epochs"), getattr(args, f"{role}_sft_lr")
    if epochs == 0 and name != "demo":
        return name, 0.0
    rows = data["teacher" if role == "teacher" else "train"]
    key = cache_key(
        role=role, full=full, epochs=epochs, lr=lr, source=fingerprint(name), data=fingerprint_rows(rows),
        config=demo_config(role).to_dict() if name == "demo" else None, hardware=[hw.device.type, str(hw.dtype)],
        lora=None if full else [args.lora_rank, args.lora_alpha, args.lora_targets, args.teacher_quant],
        training=[getattr(args, f) for f in ("max_steps", "batch_size", "warmup", "weight_decay", "max_grad_norm", "sft_seed")],
    )  # fmt: skip
    kept = pathlib.Path(args.cache_dir).resolve() / f"{role}-{short_name(name)}-{key}"
    if hw.first(kept.exists):
        print(f"{role}: warm start kept in {kept}")
        return str(kept), 0.0
    model = load_model(name, role, args, torch.float32 if full else hw.dtype, **({} if full else quantized(args, hw)))
    model = on_device(model, hw)
    check_length(model, role, args)
    if not full:
        torch.manual_seed(args.sft_seed)
        model = peft.get_peft_model(model, lora_config(model, args))
    if args.shard:
        shard(model, hw)
    steps = count_steps(args, len(rows), epochs)
    sft = dataclasses.replace(args, method="sft", text="data", divergence="fkl", student_ce_weight=1.0, teacher_moves=False,
                              policy_gradient=False)  # fmt: skip
    phase = f"{role} sft"
    keeper = Checkpoints(folder, phase, args, hw, report) if folder else None
    result = train(sft, phase, model, None, dict(train=rows), tokenizer, head_rows(model), hw, report, lr, steps, args.sft_seed, keeper)
    save_model(model if full else merged(model, name, role, args, hw), kept, hw, tokenizer.save_pretrained)
    if keeper:
        keeper.clear()
    return str(kept), result["seconds"]


def merged(model, name, role, args, hw):
    """The LoRA of a fine-tuned network merged into its base: when that was sharded or quantized, into a fresh copy."""
    if not (args.shard or args.teacher_quant):
        return model.merge_and_unload()
    weights = {key: whole(value.detach()).cpu() for key, value in model.named_parameters() if "lora_" in key}
    base = load_model(name, role, args, hw.dtype)
    model = peft.get_peft_model(base, lora_config(base, args))
    model.load_state_dict(weights, strict=False)
    return model.merge_and_unload()


def count_steps(args, rows, epochs):
    steps = max(1, round(epochs * rows / min(args.batch_size, rows))) if epochs else 0
    return min(steps, args.max_steps or steps)


def short_name(name):
    return re.sub(r"[^A-Za-z0-9._-]+", "-", pathlib.PurePath(name).name).strip("-.") or "model"


def start_wandb(args, folder):
    """A run of Weights & Biases whose config is the flags, whose name is the folder's; the one it had, when it goes on.

    Without a connection the run is logged offline, or not at all: it goes on anyway."""
    import wandb

    kept = folder / "wandb.json"
    known = json.loads(kept.read_text()) if kept.exists() else dict(project=args.wandb_project, entity=args.wandb_entity)
    group = args.wandb_group or f"{short_name(args.student)}-from-{short_name(args.teacher)}"
    options = dict(**known, group=group, name=folder.name, config=dataclasses.asdict(args), dir=str(folder), save_code=True,
                   resume="allow" if "id" in known else None)  # fmt: skip
    for mode in (None, "offline"):
        try:
            run = wandb.init(**options, mode=mode)
        except Exception as error:  # wandb's own, the HTTP library's or the system's
            print(f"wandb is not reachable ({one_line(error)}): " + ("trying offline" if mode is None else "the run goes on without it"), file=sys.stderr)
            continue
        run.define_metric("*", step_metric="step")
        kept.write_text(json.dumps(dict(id=run.id, project=args.wandb_project, entity=args.wandb_entity)) + "\n")
        return run


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def distil(args):
    """The whole job: data, warm starts, distillation, scores. -> the run's folder. Raises UserError."""
    args = resolve(args)
    hw = pick_hardware(args)
    if args.cache_teacher_trunk and hw.world > 1:
        raise UserError("--cache-teacher-trunk works in one process")
    if args.shard and hw.world == 1:
        raise UserError("--shard needs several processes: torchrun --nproc-per-node=N okd.py ...")
    if args.shard and hw.dtype == torch.float16:
        raise UserError("--shard works in bf16 and fp32: choose a --precision")
    if hw.rank:  # one process speaks, and one writes
        sys.stdout = open(os.devnull, "w")
    stamp = hw.first(time.strftime, "%m%d-%H%M%S")
    folder = pathlib.Path(args.output_dir or f"runs/{args.method}-{short_name(args.student)}-{short_name(args.teacher)}-s{args.seed}-{stamp}")
    if not args.resume and hw.first(lambda: folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"{folder} already holds a run or other files: choose another --output-dir, or go on with --resume {folder}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between peft and transformers, not us
    if args.trust_remote_code:
        print("trust_remote_code is on: code from the model repositories will run")

    tokenizer, student_tokenizer = load_tokenizer(args.teacher, args), load_tokenizer(args.student, args)
    check_same_tokenizer(tokenizer, student_tokenizer)
    data = load_data(args, tokenizer)
    print(f"{args.method} on {f'{hw.world} x ' if hw.world > 1 else ''}{hw.device} in {str(hw.dtype).removeprefix('torch.')}: "
          + ", ".join(f"{len(data[split])} {split}" for split in ("train", "dev", "test")) + " rows")  # fmt: skip
    if args.benchmark or hw.rank:
        report = Report(None)
    else:
        checkpoints = folder / "checkpoints"  # there until the run has ended
        checkpoints.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        report = Report(folder, start_wandb(args, folder) if args.track else None)
    try:
        run(args, folder, data, tokenizer, student_tokenizer, hw, report)
    except (Stopped, RuntimeError, MemoryError) as error:
        go_on = "" if args.benchmark else f"; go on with: python okd.py --resume {folder}"
        if isinstance(error, Stopped):
            error.text = "" if hw.rank else error.text + go_on
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError("out of memory: lower --micro-batch-tokens (training) or --batch-size (sampling and scoring, too), or use "
                            f"--gradient-checkpointing, --precision bf16, --teacher-quant or --shard{go_on}") from error  # fmt: skip
        raise
    if not args.benchmark:
        hw.first(shutil.rmtree, folder / "checkpoints")
    return folder


def run(args, folder, data, tokenizer, student_tokenizer, hw, report):
    """`distil` once flags, data and folder are known to be good."""
    kept_in = None if args.benchmark else folder
    teacher_source, teacher_s = warm_start(args, "teacher", data, tokenizer, hw, report, kept_in)
    student_source, student_s = warm_start(args, "student", data, tokenizer, hw, report, kept_in)
    teacher = load_model(teacher_source, "teacher", args, hw.dtype, dropout=False, **quantized(args, hw)).requires_grad_(False)
    student = load_model(student_source, "student", args, torch.float32)
    teacher, student = on_device(teacher, hw), on_device(student, hw)
    check_length(teacher, "teacher", args), check_length(student, "student", args)
    vocabs = [head_rows(model) for model in (teacher, student)]
    vocab = min(vocabs)
    if vocabs[0] != vocabs[1]:
        print(f"heads of {vocabs[0]} (teacher) and {vocabs[1]} (student) rows: both are cut to the {vocab} they share")
    if args.teacher_moves:
        teacher = add_online_module(teacher, args)
    if args.shard:
        shard(teacher, hw), shard(student, hw)

    clock, test = time.perf_counter(), data["test"][: args.score_rows]
    scores = {"teacher": score(args, teacher, tokenizer, test, hw),
              "student, warm start": score(args, student, tokenizer, test, hw)} if test else {}  # fmt: skip
    scoring_s = time.perf_counter() - clock
    writing_s = 0.0
    if args.text == "teacher":
        data["train"], writing_s = teacher_text(args, teacher, teacher_source, data["train"], tokenizer, vocab, hw)
    if args.cache_teacher_trunk:
        data["train"] = cache_trunk(args, teacher, teacher_source, data["train"], tokenizer, hw)
    if args.gradient_checkpointing:
        recompute_activations(student, teacher)
    if args.compile:
        for block in (*transformer_blocks(student), *transformer_blocks(teacher)):
            block.compile(dynamic=True)
    if args.benchmark:
        return print_benchmark(args, student, teacher, data, tokenizer, vocab, hw, report)
    steps = count_steps(args, len(data["train"]), args.epochs)
    keeper = Checkpoints(folder, "distil", args, hw, report)
    result = train(args, "distil", student, teacher, data, tokenizer, vocab, hw, report, args.lr, steps, args.seed, keeper)
    result["sampling_s"] += writing_s
    result["seconds"] += writing_s
    save_model(student, folder / "student", hw, student_tokenizer.save_pretrained, replace=True)  # one of before a resume
    if args.teacher_moves:
        save_model(teacher, folder / "teacher_lora", hw, replace=True)
    if test:
        clock = time.perf_counter()
        scores[f"student, {args.method}"] = score(args, student, tokenizer, test, hw)
        scoring_s += time.perf_counter() - clock
    summarize(args, folder, report, scores, result, dict(teacher=teacher_s, warm=student_s, scoring=scoring_s), test)


def resumed(flags, argv):
    """Flags with --resume -> those of the run to go on with; as they are, when `auto` finds none. Raises UserError."""
    folder = unfinished(flags) if flags.resume == "auto" else pathlib.Path(flags.resume)
    if folder is None:
        return dataclasses.replace(flags, resume=None)
    stored = stored_flags(folder)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"the run in {folder} has ended: there is nothing to go on with")
    asked = tyro.cli(Args, args=argv, default=stored, prog="okd.py")
    changed = [name for name in differing(asked, stored) if name not in CHANGEABLE]
    if flags.resume != "auto" and changed:
        raise UserError(f"--{changed[0].replace('_', '-')} is {getattr(stored, changed[0])} in the run that goes on, and stays so; "
                        "start another run to change it")  # fmt: skip
    return dataclasses.replace(asked, output_dir=str(folder))


def stored_flags(folder):
    """The args.json of a run's folder -> Args. Raises UserError."""
    try:
        return Args(**json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run that can go on: its args.json cannot be read ({one_line(error)})") from error


def differing(one, other):
    return [field.name for field in dataclasses.fields(Args) if getattr(one, field.name) != getattr(other, field.name)]


def unfinished(flags):
    """The newest run with these flags, in --output-dir or runs/, that has not ended; or None."""
    found = [pathlib.Path(flags.output_dir)] if flags.output_dir else pathlib.Path("runs").glob("*")
    found = [folder for folder in found if (folder / "args.json").exists() and (folder / "checkpoints").is_dir()]
    for folder in sorted(found, key=lambda folder: (folder / "args.json").stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):
            if set(differing(resolve(flags), stored_flags(folder))) <= CHANGEABLE:
                return folder


def summarize(args, folder, report, scores, result, seconds, test):
    """Print the table of the run, and what it means; the same numbers go to metrics.jsonl and wandb."""
    first, last = result["first_dev"] or {}, result["last_dev"] or {}
    name = f"student, {args.method}"
    times = {"teacher": seconds["teacher"], "student, warm start": seconds["warm"], name: result["seconds"]}
    dev_ce = {"teacher": first.get("teacher_ce"), "student, warm start": first.get("student_ce"), name: last.get("student_ce")}
    dev_fkl = {"teacher": 0.0 if first else None, "student, warm start": first.get("fkl"), name: last.get("fkl")}
    rouge = {row: scores[row][0] if row in scores else None for row in times}
    sampling = {"teacher": None, "student, warm start": None, name: result["sampling_s"]}
    show = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"  # noqa: E731
    rows = [(row, show(rouge[row], 2), show(dev_ce[row], 3), show(dev_fkl[row], 3), show(times[row], 1), show(sampling[row], 1)) for row in times]
    print("\n" + format_table(("", "Rouge-L", "dev CE", "dev KL(p_0||q)", "training s", "of it sampling"), rows))
    if scores:
        print(f"Rouge-L: greedy, {len(test)} test rows; scoring took {seconds['scoring']:.1f} s.")
    if 0.0 in times.values():
        print("0.0 s of training: found in the cache, or not asked for.")
    final = dict(rouge_l_teacher=rouge["teacher"], rouge_l_warm_start=rouge["student, warm start"], rouge_l=rouge[name])
    if scores:
        gain, gap = rouge[name] - rouge["student, warm start"], rouge["teacher"] - rouge["student, warm start"]
        verdict = "gained" if gain > 0 else "did NOT gain: it lost" if gain < 0 else "gained nothing:"
        print(f"{args.method} {verdict} {abs(gain):.2f} points over the warm start; the teacher is {gap:.2f} above it.")
    if last.get("collapsed"):
        print(f"COLLAPSE: the module drifted {last['drift']:.3f} nats from p_0, further than the student was at the start "
              f"({first['fkl']:.3f}), and the student's dev CE rose. Raise --teacher-ce-weight or --anchor, lower --lam.")  # fmt: skip
    report("final", 0, {f"final/{k}": v for k, v in final.items()} | {f"time/{k}_s": v for k, v in times_of(seconds, result).items()})
    if report.wandb_run is not None:
        import wandb

        columns = ["prompt", "reference", *scores]
        samples = zip(test[:20], *(texts[:20] for _, texts in scores.values()))
        table = wandb.Table(columns, [[e.prompt, e.references[0], *texts] for e, *texts in samples])
        report.wandb_run.log({"samples": table} if scores else {})
        report.wandb_run.summary.update(final | {f"dev/{k}": v for k, v in last.items()})
        report.wandb_run.finish()
    print(f"run: {folder}")


def print_benchmark(args, student, teacher, data, tokenizer, vocab, hw, report, warmup=3):
    """Time --benchmark steps, reports included, and print what they cost."""
    peak, steps = matmul_peak(hw), warmup + args.benchmark
    result = train(args, "benchmark", student, teacher, data, tokenizer, vocab, hw, report, args.lr, steps, args.seed)
    steps, clock = result["timed"][warmup:], [end for _, end in result["timed"]]
    seconds = sorted(b - a for a, b in zip(clock[warmup - 1 :], clock[warmup:]))
    total = clock[-1] - clock[warmup - 1]
    tokens, responses = (sum(sum(map(size, rows)) for rows, _ in steps) for size in (len, lambda row: len(row.response_ids)))
    flops = sum(step_flops(args, student, teacher, rows) for rows, _ in steps) / total
    lines = dict(method=args.method, steps=len(steps), tokens_per_s=round(tokens / total, 1), response_tokens_per_s=round(responses / total, 1),
                 step_s_mean=round(total / len(steps), 4), step_s_median=round(seconds[len(seconds) // 2], 4), step_s_min=round(seconds[0], 4), step_s_max=round(seconds[-1], 4),
                 sampling_s=round(result["sampling_s"], 2), peak_memory_gb=round(hw.peak_memory() / 1e9, 3), gflops=round(flops / 1e9, 2),
                 matmul_peak_gflops=round(peak / 1e9, 2), share_of_peak=round(flops / peak, 3))  # fmt: skip
    print(json.dumps(lines))


def step_flops(args, student, teacher, rows):
    """Model FLOPs that one step needs, sampling, reports, optimizer and padding not counted.

    Forward: 2 per weight of the blocks and token, 2 layers width T^2 of causal attention per row, 2 width V of the head per
    response token. The student's backward is twice its forward; the moving teacher's, whose weights get no gradient, once
    the forward of the layers under its module."""

    def forward(model, depth=1.0):
        weights = sum(p.numel() for name, p in transformer_blocks(model).named_parameters() if p.ndim == 2 and "lora_" not in name)
        layers, width = len(transformer_blocks(model)), model.get_output_embeddings().weight.shape[1]
        trunk = sum(2 * weights * len(row) + 2 * layers * width * len(row) ** 2 for row in rows)
        return depth * trunk + sum(2 * width * head_rows(model) * len(row.response_ids) for row in rows)

    flops = 3 * forward(student)
    if args.student_ce_weight < 1 or args.teacher_moves:
        flops += forward(teacher)
    if args.teacher_moves:
        flops += forward(teacher, module_depth(teacher, args) / len(transformer_blocks(teacher)))
        if args.anchor:
            flops += forward(teacher)
    return flops


def matmul_peak(hw):
    """FLOP/s of a large square matmul in the run's precision: what this machine can do."""
    n, best = 8192 if hw.device.type == "cuda" else 2048, math.inf
    a = torch.randn(n, n, device=hw.device).to(hw.dtype)
    for _ in range(6):
        hw.synchronize()
        start = time.perf_counter()
        a @ a
        hw.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def times_of(seconds, result):
    return dict(teacher_sft=seconds["teacher"], student_sft=seconds["warm"], distil=result["seconds"], sampling=result["sampling_s"],
                scoring=seconds["scoring"])  # fmt: skip


def run_command(job, flags, program, argv):
    """Parse argv into `flags` and run the job. A UserError, or a file that cannot be read or written, is one line and exit
    code 2; a signal ends with 128 + its number."""
    args = tyro.cli(flags, args=argv, prog=program)
    try:
        with SIGNALS.handled():
            job(resumed(args, argv) if getattr(args, "resume", None) else args)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, safetensors.SafetensorError) as error:
        print(f"{program}: {one_line(error)}: check the path, its permissions and the room on its disk", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if stop.text:
            print(f"{program}: {stop.text}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    run_command(distil, Args, "okd.py", argv)


if __name__ == "__main__":
    main()
