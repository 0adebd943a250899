"""Online knowledge distillation (OKD) for autoregressive language models, in one file.

    python okd.py                                     # a built-in demo: no network, no GPU
    python okd.py --teacher gpt2-xl --student gpt2    # the real job; --method fkl: a baseline
    python okd.py --resume runs/NAME                  # continue a run that was stopped or killed
    torchrun --nproc-per-node=4 okd.py --teacher ...  # data parallel

A frozen teacher carries a small LoRA adapter, the *online module*. Student and module are trained
at the same time, on the same batches, from one forward pass of each network. With p_f the teacher
with its module, p_0 the teacher without it, q the student, y the gold token and sg the
stop-gradient, the losses per response token are

    student   L_S = (1 - w) D(sg[p_f], q) + w CE(q, y)
    teacher   L_T = alpha KL(sg[q] || p_f) + (1 - alpha) CE(p_f, y) + mu KL(p_0 || p_f)

Equation 17 of Rao et al. 2024 (arXiv:2409.12512v2) is L_S with w = 0 and D = KL(p_f || q), equation
16 is L_T with mu = 0, and Algorithm 1 is the training loop below. The paper does not state alpha,
the scale of the module, the temperature and the learning rates it chose: the defaults here are
ours. Not in the paper, and off by default, are w, other divergences D and the anchor mu.

Every baseline is one row of a table and runs in the same loop, on the same data, from the same
start. Where one leaves its paper, a comment says so. The file is read from top to bottom:
divergences, methods, losses, flags, training loop, one micro-batch, evaluation, the text of a step,
generation, data, batches, models, warm start, processes and disk, main.
"""

import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import secrets
import shlex
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

# Let CUDA's allocator grow its segments, which reduces fragmentation, unless the user chose
# otherwise. torch reads this when it is imported.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import huggingface_hub
import peft
import psutil
import torch
import torch.distributed as dist
import transformers
import tyro
from rouge_score.rouge_scorer import RougeScorer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import find_adapter_config_file

# -----------------------------------------------------------------------------
# Divergences
#
# p is the teacher, q the student. Each function takes two (..., V) tensors of float32
# log-probabilities and returns one number per token (...). Mixtures are taken in log space: in
# probabilities, a sharp distribution gives 0 * -inf = NaN.


def fkl(log_p, log_q):
    """Forward KL(p || q): q must cover all that p does. Hinton et al. 2015, arXiv:1503.02531.

    The term sum p log p, which published code drops, has no gradient for a frozen teacher, but has
    one for a teacher that moves.
    """
    # log_q - log_p, not the reverse: for a frozen p the backward pass needs one (n, V) copy less.
    return 0 - (log_p.exp() * (log_q - log_p)).sum(-1)


def rkl(log_p, log_q):
    """Reverse KL(q || p): q may settle on one mode of p. Gu et al. 2023, arXiv:2306.08543."""
    return fkl(log_q, log_p)


def frkl(log_p, log_q):
    """(KL(p || q) + KL(q || p)) / 2, the fixed form of AKL. Wu et al. 2024, arXiv:2404.02657."""
    return (fkl(log_p, log_q) + rkl(log_p, log_q)) / 2


def mix(log_p, log_q, share):
    """log(share p + (1 - share) q), for 0 < share < 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jsd(log_p, log_q, beta=0.5):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    By convention fkl at beta = 0 and rkl at beta = 1. Agarwal et al. 2023 (GKD), arXiv:2306.13649,
    equation 1.
    """
    if beta == 0:
        return fkl(log_p, log_q)
    if beta == 1:
        return rkl(log_p, log_q)
    log_m = mix(log_p, log_q, beta)
    return beta * fkl(log_p, log_m) + (1 - beta) * fkl(log_q, log_m)


def tvd(log_p, log_q):
    """Total variation, 1/2 sum |p - q|. Wen et al. 2023, arXiv:2307.15190."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def sfkl(log_p, log_q, skew=0.1):
    """KL(p || skew p + (1 - skew) q): finite where q is 0. Ko et al. 2024, arXiv:2402.03898."""
    if skew == 0:
        return fkl(log_p, log_q)
    return fkl(log_p, mix(log_p, log_q, skew))


def srkl(log_p, log_q, skew=0.1):
    """KL(q || (1 - skew) p + skew q): finite where p is 0. Ko et al. 2024, arXiv:2402.03898."""
    return sfkl(log_q, log_p, skew)


def akl(log_p, log_q, head_mass=0.5):
    """fkl and rkl, weighted by sum |p - q| over the head and over the tail of p.

    The head is the smallest set of p's likeliest tokens whose mass is at least head_mass, as in
    the paper (the authors' code leaves the last of them out). Wu et al. 2024, arXiv:2404.02657.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < head_mass
        tiny = torch.finfo(gap.dtype).tiny
        head_weight = (gap * in_head).sum(-1) / gap.sum(-1).clamp_min(tiny)
    return head_weight * fkl(log_p, log_q) + (1 - head_weight) * rkl(log_p, log_q)


def ab(log_p, log_q, alpha=0.2, beta=0.7):
    """The alpha-beta divergence; (1, 0) is fkl and (0, 1) is rkl.

    -1 / (alpha beta) sum [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta)], with its limit where one of them is 0.
    Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011.
    """
    if alpha == 0:
        return ab(log_q, log_p, beta, alpha)
    if beta == 0:
        p_power = (alpha * log_p).exp()
        q_power = (alpha * log_q).exp()
        return (p_power * alpha * (log_p - log_q) - p_power + q_power).sum(-1) / alpha**2
    total = alpha + beta
    cross = (alpha * log_p + beta * log_q).exp()
    p_power = alpha / total * (total * log_p).exp()
    q_power = beta / total * (total * log_q).exp()
    return (p_power + q_power - cross).sum(-1) / (alpha * beta)


def taid(log_p, log_q, t):
    """Cross-entropy to softmax((1 - t) sg[z_q] + t z_p), a target that moves from q to p.

    Shing et al. 2025 (TAID), arXiv:2501.16937, equation 3.
    """
    target = torch.lerp(log_q.detach(), log_p, t).softmax(-1)
    return -(target * log_q).sum(-1)


TAID_START = (0.4, 0.0, math.inf)


def taid_schedule(schedule, loss, progress, delta=5e-4, momentum=0.99):
    """(t, trend of the loss, last loss) after a step of TAID's algorithm 1, from TAID_START.

    t rises at least linearly, and faster while the loss falls. The three stay on the device, as one
    tensor.
    """
    t, trend, last_loss = schedule
    loss = torch.where(loss.isfinite(), loss, last_loss)  # else the step was skipped
    change = (last_loss - loss) / (last_loss + 1e-15)
    change = change.nan_to_num(0.0)  # inf / inf in the first step: no change yet
    trend = momentum * trend + (1 - momentum) * change
    faster = t + delta * trend.sigmoid() * (1 - t)
    linear = TAID_START[0] + (1 - TAID_START[0]) * progress
    return torch.stack([faster.clamp(min=linear, max=1), trend, loss])


DIVERGENCES = {f.__name__: f for f in (fkl, rkl, frkl, jsd, tvd, sfkl, srkl, akl, ab, taid)}

# -----------------------------------------------------------------------------
# Methods: a divergence, the text it is measured on, and whether the teacher moves


@dataclass
class Method:
    divergence: str
    text: str = "data"
    teacher_moves: bool = False
    student_ce_weight: float = 0.0
    sgo_fraction: float = 0.0  # share of batches with student-generated output


# Each divergence makes a method by itself: on gold text, from a frozen teacher.
METHODS = {name: Method(name) for name in DIVERGENCES}
METHODS.update(
    sft=Method("fkl", student_ce_weight=1.0),  # cross-entropy on the gold text, no teacher
    seqkd=Method("fkl", text="teacher", student_ce_weight=1.0),  # Kim & Rush 2016, 1606.07947
    imitkd=Method("fkl", text="student", sgo_fraction=1.0),  # Lin et al. 2020, arXiv:2009.07253
    gkd=Method("jsd", text="student", sgo_fraction=0.5),  # Agarwal et al. 2023, arXiv:2306.13649
    opd=Method("rkl", text="student", sgo_fraction=1.0),  # on-policy distillation
    distillm=Method("srkl", text="adaptive"),  # Ko et al. 2024, arXiv:2402.03898
    minillm=Method("rkl", text="mixture"),  # Gu et al. 2023, arXiv:2306.08543
    okd=Method("fkl", teacher_moves=True),  # Rao et al. 2024, arXiv:2409.12512
)

# -----------------------------------------------------------------------------
# Losses, per token


def cross_entropy(log_q, labels):
    """(N, V) log-probabilities, (N,) tokens -> (N,) -log q(token)."""
    return torch.nn.functional.nll_loss(log_q, labels, reduction="none")


def at_temperature(log_p, temperature):
    if temperature == 1:
        return log_p
    return (log_p / temperature).log_softmax(-1)


def student_loss(
    log_p, log_q, labels, divergence="fkl", parameters=None, ce_weight=0.0, temperature=1.0
):
    """L_S = (1 - w) D(sg[p], q) + w CE(q, y), (N,). Equation 17 has w = 0 and D = KL(p || q).

    w is ce_weight; `parameters` are the divergence's own keyword arguments. No gradient reaches the
    teacher; log_p may be None when w = 1. Divergences are taken at the temperature and multiplied
    by its square, which keeps the size of the gradient (Hinton et al. 2015).
    """
    if ce_weight == 1:
        return cross_entropy(log_q, labels)
    soft_p = at_temperature(log_p.detach(), temperature)
    soft_q = at_temperature(log_q, temperature)
    values = DIVERGENCES[divergence](soft_p, soft_q, **(parameters or {}))
    loss = (1 - ce_weight) * temperature**2 * values
    if ce_weight > 0:
        loss = loss + ce_weight * cross_entropy(log_q, labels)
    return loss


def teacher_loss(log_p, log_q, log_p0, labels, alpha=0.5, anchor=0.0, temperature=1.0):
    """L_T = alpha KL(sg[q] || p) + (1 - alpha) CE(p, y) + anchor KL(p_0 || p), (N,): equation 16.

    No gradient reaches the student or p_0. For a fixed q the best p is the mixture
    ((1 - alpha) y + alpha q + anchor p_0) / (1 + anchor): the teacher moves towards what the
    student can represent. The anchor is not in the paper; log_p0 may be None when it is 0.
    """
    loss = (1 - alpha) * cross_entropy(log_p, labels)
    soft_p = at_temperature(log_p, temperature)
    if alpha > 0:
        soft_q = at_temperature(log_q.detach(), temperature)
        loss = loss + alpha * temperature**2 * fkl(soft_q, soft_p)
    if anchor > 0:
        soft_p0 = at_temperature(log_p0.detach(), temperature)
        loss = loss + anchor * temperature**2 * fkl(soft_p0, soft_p)
    return loss


def policy_loss(log_q, labels, advantage, sampled_log_q, weight, clip=0.2):
    """MiniLLM's clipped policy gradient, (N,). Gu et al. 2023, arXiv:2306.08543, algorithm 1.

    The ratio q / q_when_sampled is multiplied by the importance weight q / (0.2 p + 0.8 q) of the
    mixture that the token was drawn from.
    """
    ratio = (-cross_entropy(log_q, labels) - sampled_log_q).exp() * weight
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def divergence_parameters(args, taid_t):
    """The keyword arguments of --divergence."""
    if args.divergence == "jsd":
        return {"beta": args.beta}
    if args.divergence in ("sfkl", "srkl"):
        return {"skew": args.skew}
    if args.divergence == "ab":
        return {"alpha": args.ab_alpha, "beta": args.ab_beta}
    if args.divergence == "taid":
        return {"t": taid_t}
    return {}


def eval_metrics(log_p, log_q, log_p0, labels):
    """What every evaluation reports, whatever the method trains on; (N,) each, in nats."""
    return {
        "fkl": fkl(log_p0, log_q),  # to the frozen teacher p_0, also when the teacher moves
        "rkl": rkl(log_p0, log_q),
        "student_ce": cross_entropy(log_q, labels),
        "teacher_ce": cross_entropy(log_p, labels),
        "frozen_teacher_ce": cross_entropy(log_p0, labels),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "top1_agreement": (log_p0.argmax(-1) == log_q.argmax(-1)).float(),
        "drift": fkl(log_p0, log_p),  # how far the module has moved the teacher
    }


# -----------------------------------------------------------------------------
# Flags. The comment beside one, or above it, is its --help.


@dataclass
class Args:
    """Online knowledge distillation (Rao et al. 2024, arXiv:2409.12512v2) and its baselines.

    Without --teacher a built-in demo runs, with settings of its own; the defaults below are those
    with --teacher.
    """

    # -- models and data --
    teacher: str = "demo"  # hub id or local folder; an adapter is merged onto its base
    student: str = "gpt2"  # hub id or local folder; must share the teacher's tokenizer
    # JSONL of training rows: instruction, input, output; prompt, response (or completion); or
    # messages, whose last assistant turn is the response. Unset: Dolly, from the hub
    data: str | None = None
    max_length: int = 512  # tokens of prompt and response; a longer response is cut
    max_prompt_length: int = 256  # rows with a longer prompt are dropped, and counted
    max_new_tokens: int = 256  # longest response, when sampling and when scoring
    # -- the method: a row of the method table, and flags that override its columns --
    method: Literal[tuple(METHODS)] = "okd"  # the next five flags override its parts
    divergence: Literal[tuple(DIVERGENCES)] | None = None  # loss between teacher and student
    # what the student trains on: data (gold responses); teacher (its responses, sampled once);
    # student (its own, sampled at each step); adaptive (DistiLLM: gold, sampled or replayed);
    # mixture (MiniLLM: rollouts of teacher and student mixed)
    text: Literal["data", "teacher", "student", "adaptive", "mixture"] | None = None
    teacher_moves: bool | None = None  # whether the teacher's online module is trained
    student_ce_weight: float | None = None  # share of cross-entropy in the student's loss
    sgo_fraction: float | None = None  # probability of student-generated output (SGO)
    temperature: float = 1.0  # softmax temperature of both networks in the loss, not in sampling
    beta: float = 0.5  # jsd: the teacher's share of the mixture; at 0 it is fkl, at 1 rkl
    skew: float = 0.1  # sfkl: share of p mixed into q; srkl: of q into p
    ab_alpha: float = 0.2  # ab: exponent of p
    ab_beta: float = 0.7  # ab: exponent of q
    # -- the online module --
    alpha: float = 0.5  # teacher's loss: alpha KL(student || teacher) + (1 - alpha) CE
    anchor: float = 0.0  # weight of KL(p_0 || teacher), p_0 without its module; not in the paper
    teacher_lr_ratio: float = 1.0  # learning rate of the module / of the student
    lora_rank: int = 32  # rank of the module
    lora_scale: float = 1.0  # s in equation 15: peft's lora_alpha / rank
    lora_targets: str = "auto"  # auto (query and value), all-linear, or names: q_proj,v_proj
    lora_top_layers: int = 0  # module on the top layers only, which is cheaper; 0: on all
    cache_teacher: bool = False  # run a frozen teacher once, keep its states in host memory
    # -- warm start: both learn the gold text first, once for all runs; batches of 32 --
    teacher_sft: Literal["lora", "full"] = "lora"  # train LoRA, which is merged, or all weights
    teacher_sft_epochs: float = 3  # 0 for a teacher that is fine-tuned already
    teacher_sft_lr: float = 2e-4  # peak learning rate of the teacher's fine-tuning
    student_sft_epochs: float = 3  # 0 for a student that is fine-tuned already
    student_sft_lr: float = 1e-4  # peak learning rate of the student's fine-tuning
    cache_dir: str = "runs/.cache"  # where the fine-tuned models are kept
    # -- optimization --
    epochs: float = 20  # of distillation
    max_steps: int = 0  # stop after this many steps of distillation; 0: no limit
    batch_size: int = 32  # rows of an optimizer step, over all processes; the paper's: 8, 16, 32
    micro_batch_tokens: int = 4096  # tokens in memory at once, padding included; changes no loss
    sample_batch_size: int = 64  # prompts in memory at once, when sampling and when scoring
    lr: float = 1e-4  # peak learning rate; the paper's: 5e-4, 1e-4, 5e-5 (up to 1B parameters)
    weight_decay: float = 0.0  # AdamW's weight decay, not on biases and norms
    max_grad_norm: float = 1.0  # gradient clipping, for each network by itself; 0: none
    gradient_checkpointing: bool = False  # recompute the student's activations: less memory
    # -- the run --
    seed: int = 1  # of data order, sampling, dropout and the module's initial weights
    output_dir: str | None = None  # a new folder; unset: runs/METHOD-STUDENT-TEACHER-sSEED-TIME
    # continue the run in this folder, with its own flags; only --device, --track, --log-every,
    # --save-minutes, --micro-batch-tokens, --sample-batch-size, --gradient-checkpointing may change
    resume: str | None = None
    save_minutes: float = 10  # between checkpoints; 0: only at the end and on SIGTERM or SIGINT
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # of autocast and of frozen weights; trained weights, softmax and losses are float32. auto:
    # bf16 where it is fast, else fp16 on CUDA and fp32 elsewhere
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    shard: bool = False  # under torchrun: split the frozen teacher over the processes
    log_every: int = 10  # steps between two reports
    eval_every: int = 0  # steps between two evaluations on the dev rows; 0: an epoch
    eval_rows: int = 100  # dev rows evaluated
    select: Literal["best", "last"] = "best"  # student to save: best dev Rouge-L, or last
    score_rows: int = 100  # test rows scored with Rouge-L before and after
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_MODE are read


# The demo is in the paper's regime: the teacher is fine-tuned on the rows the student is taught on.
DEMO = Args(
    student="demo",
    max_length=96,
    max_new_tokens=48,
    teacher_sft="full",
    teacher_sft_epochs=30,
    teacher_sft_lr=1e-3,
    student_sft_epochs=70,
    student_sft_lr=2e-3,
    epochs=40,
    lr=2e-3,
    precision="fp32",
    log_every=50,
    eval_every=100,
    score_rows=400,
)

# What may be given with --resume: it changes results at most by rounding, and sampled text with it.
RESUME_FLAGS = (
    "resume device track log_every save_minutes micro_batch_tokens sample_batch_size "
    "gradient_checkpointing"
)
# The problem that a run works on, and what concerns the run alone: no part of a method's label.
NOT_IN_LABEL = RESUME_FLAGS + (
    " method teacher student data max_length max_prompt_length max_new_tokens teacher_sft "
    "teacher_sft_epochs teacher_sft_lr student_sft_epochs student_sft_lr cache_dir cache_teacher "
    "seed output_dir shard score_rows"
)

RANGES = [  # lowest, highest, flags
    (0, 1, "alpha beta student_ce_weight sgo_fraction"),
    (0, 0.999, "skew"),
    (
        0,
        1e9,
        "anchor ab_alpha ab_beta weight_decay max_grad_norm seed eval_every eval_rows score_rows "
        "save_minutes teacher_sft_epochs student_sft_epochs max_steps lora_top_layers",
    ),
    (1e-9, 1e9, "temperature lr teacher_lr_ratio epochs lora_scale teacher_sft_lr student_sft_lr"),
    (
        1,
        1e9,
        "batch_size micro_batch_tokens sample_batch_size log_every lora_rank max_new_tokens "
        "max_prompt_length",
    ),
    (2, 1e9, "max_length"),
]


class UserError(Exception):
    """A mistake that the user can fix: printed as one line, with exit code 2."""


def parse_args(argv):
    """Flags -> Args. A column of the method table that no flag sets comes from the method's row."""
    args = tyro.cli(Args, args=argv, prog="okd.py")
    if args.resume is not None:
        return resumed_args(argv, args.resume)
    if args.teacher == "demo":
        args = tyro.cli(Args, args=argv, default=DEMO)
    row = METHODS[args.method]
    if args.text == "student" and args.sgo_fraction is None:  # also for a row of gold text
        args.sgo_fraction = row.sgo_fraction or 1.0
    for column, value in asdict(row).items():
        if getattr(args, column) is None:
            setattr(args, column, value)

    check_ranges(args)
    if args.ab_alpha == 0 and args.ab_beta == 0:
        raise UserError("--ab-alpha and --ab-beta are both 0: one of them must be larger")
    sampled_text = args.text in ("student", "adaptive", "mixture")
    if sampled_text and args.student_ce_weight > 0:
        raise UserError("--student-ce-weight: on the student's own text there is no gold token")
    if args.sgo_fraction > 0 and args.text not in ("student", "adaptive"):
        raise UserError("--sgo-fraction: --text student or adaptive is needed")
    if args.teacher_moves and args.anchor == 0 and (sampled_text or args.alpha == 1):
        raise UserError(
            "a moving teacher needs --anchor, or gold text and --alpha below 1: else teacher and "
            "student only copy each other"
        )
    if args.cache_teacher and args.teacher_moves:
        raise UserError("--cache-teacher: the states of a moving teacher change with every step")
    if args.gradient_checkpointing and args.text == "mixture":
        raise UserError("--gradient-checkpointing is not possible with --text mixture")
    return args


def check_ranges(args):
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            if not low <= value <= high:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {value}: it must lie in [{low}, {high:g}]")


def resumed_args(argv, folder):
    """The flags that the run began with, and those of RESUME_FLAGS that were given now."""
    with explaining(f"--resume {folder}: no run was begun there"):
        stored = read_json(Path(folder, "args.json"))
        begun = Args(**{f.name: stored[f.name] for f in fields(Args)})
    begun.output_dir = folder
    begun.precision = stored["began_with"]["precision"]
    args = tyro.cli(Args, args=argv, default=begun)
    check_ranges(args)
    changed = {name for name, value in asdict(args).items() if value != getattr(begun, name)}
    fixed = changed - {*RESUME_FLAGS.split()}
    if fixed:
        flag = min(fixed).replace("_", "-")
        raise UserError(f"--{flag}: a resumed run keeps its flags; begin another run instead")
    if changed & {"micro_batch_tokens", "sample_batch_size", "gradient_checkpointing"}:
        print("the resumed run may differ by rounding, and in sampled text")
    return args


def run_label(args):
    """The method and every setting that differs from its default: 'fkl temperature=2.0'."""
    defaults = DEMO if args.teacher == "demo" else Args()
    parts = [args.method]
    for name, value in asdict(args).items():
        default = getattr(METHODS[args.method], name, getattr(defaults, name))
        if name not in NOT_IN_LABEL.split() and value != default:
            parts.append(f"{name}={value}")
    return " ".join(parts)


# -----------------------------------------------------------------------------
# The training loop


@dataclass
class TrainState:
    """All that changes in a run besides weights and optimizers."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training: neither evaluations nor checkpoints count
    sampling_seconds: float = 0.0
    log_bytes: int = 0  # size of metrics.jsonl at the checkpoint: a resumed run cuts it there
    first_eval: dict | None = None
    best_eval: dict | None = None
    taid: tuple | torch.Tensor = TAID_START
    # What selects the text of a step:
    phi: float = 0.0  # probability that a step trains on student text
    reference_loss: float | None = None  # DistiLLM: the dev loss when phi was last raised
    replay: list = field(default_factory=list)  # Examples
    rollouts: list = field(default_factory=list)  # Examples


def train(args, state, student, teacher, data, hw, run_dir, phase="distil", wandb_run=None):
    """Train the student and, with args.teacher_moves, the teacher's online module: Algorithm 1.

    Every method runs here. `state` is that of a run that begins; a checkpoint in run_dir takes its
    place. teacher may be None for supervised fine-tuning without evaluations. Returns the final
    state; the student keeps the weights of its best evaluation, or of the last step. Raises
    UserError when the first losses are not finite; exits with 128 + n on signal n.
    """
    dev_rows = data.dev[: args.eval_rows]
    steps_per_epoch = max(1, len(data.train) // args.batch_size)
    num_steps = max(1, round(args.epochs * steps_per_epoch))
    if args.max_steps > 0:
        num_steps = min(num_steps, args.max_steps)
    eval_every = args.eval_every or steps_per_epoch

    networks = torch.nn.ModuleDict({"student": student})
    if args.teacher_moves:
        networks["teacher"] = teacher
    if args.gradient_checkpointing:
        with explaining("--gradient-checkpointing: the student's model family cannot do it"):
            student.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = {name: make_optimizer(net, args.weight_decay) for name, net in networks.items()}
    scaler = make_scaler(hw)
    # Without a divergence the teacher is not needed for the losses.
    teacher_in_loss = teacher if args.student_ce_weight < 1 or args.teacher_moves else None

    run_dir.mkdir(parents=True, exist_ok=True)
    best_weights = None
    stateful = {**optimizers, "scaler": scaler}
    if (run_dir / "checkpoint.pt").exists():
        state, best_weights = load_checkpoint(run_dir, networks, stateful)
        print(f"{run_dir}: resumed after step {state.step}")
    state.taid = torch.as_tensor(state.taid, device=hw.device)
    log_path = run_dir / "metrics.jsonl"
    last_known = cut_log(log_path, state.log_bytes, hw)
    reporter = Reporter(log_path, phase, state, num_steps, hw, wandb_run, last_known)
    sampler = Sampler(args, state, student, teacher, data.stop_ids, hw)

    signals = [0]  # 0: none yet
    handlers = record_signals(signals)
    last_save = time.monotonic()
    clock = hw.now()
    for step in range(state.step, num_steps + 1):
        # Evaluate: before the first step, every eval_every steps, after the last one.
        if dev_rows and (step % eval_every == 0 or step == num_steps):
            state.seconds += hw.now() - clock
            metrics = evaluate(args, student, teacher, dev_rows, data, hw)
            record = {"step": step, **metrics}
            if step == 0:
                require_finite(metrics, ["student_ce", "teacher_ce"], phase)
                state.first_eval = record
            reporter.report("dev", metrics)
            best = state.best_eval
            if args.select == "last" or best is None or metrics["rouge_l"] >= best["rouge_l"]:
                state.best_eval = record
                if args.select == "best":
                    weights = trainable_weights(networks)
                    best_weights = {name: w.to("cpu", copy=True) for name, w in weights.items()}
            if args.text == "adaptive":
                raise_phi(state, metrics["student_ce"])
            clock = hw.now()
        if step == num_steps:
            break

        # Text. Data order, sampling and dropout depend on seed and step alone: a resume is exact.
        torch.manual_seed(hash((args.seed, step, hw.rank)))
        rows = select_rows(args, step, num_steps, data.train, state, sampler)
        num_tokens = sum(len(row.response_ids) for row in rows)

        # Losses and gradients of both networks, from one forward pass of each.
        sums = Counter()
        # The teacher stays in eval mode: its gradient needs no dropout. Without dropout MiniLLM's
        # ratio q / q_when_sampled is exact.
        student.train(args.text != "mixture")
        for batch in micro_batches(rows, args.micro_batch_tokens, hw):
            losses = train_micro_batch(
                args, student, teacher_in_loss, batch, hw, scaler, num_tokens, state.taid[0]
            )
            sums.update(losses)  # a Counter adds
        student.eval()
        metrics = {name: total / num_tokens for name, total in hw.total(sums).items()}

        # Step.
        lr = learning_rate(step, num_steps, args.lr)
        for name, optimizer in optimizers.items():
            network_lr = lr * args.teacher_lr_ratio if name == "teacher" else lr
            grad_norm = optimizer_step(optimizer, scaler, network_lr, args.max_grad_norm, hw)
            metrics[f"{name}_grad_norm"] = grad_norm
        scaler.update(None if hw.dtype == torch.float16 else 1.0)
        if args.divergence == "taid":
            progress = step / max(1, num_steps - 1)
            state.taid = taid_schedule(state.taid, metrics["student_loss"], progress)
            metrics["taid_t"] = state.taid[0]
        state.tokens += sum(len(row) for row in rows)
        state.step = step + 1

        # All processes stop after the same step, and save when it is time in the first one.
        save_due = hw.rank == 0 and 0 < args.save_minutes < (time.monotonic() - last_save) / 60
        stop_signal, save_due = max(hw.gather((max(signals), save_due)))
        is_last = state.step == num_steps
        reporting = is_last or state.step % args.log_every == 0
        saving = is_last or stop_signal or save_due
        if reporting or saving:
            now = hw.now()
            state.seconds += now - clock
            clock = now

        # Report. Between reports no tensor is read back, so we never wait for the GPU.
        if reporting:
            if state.step <= args.log_every:
                require_finite(metrics, ["student_loss", "teacher_loss"], phase)
            metrics["lr"] = lr
            metrics["phi"] = state.phi
            metrics["loss_scale"] = scaler.get_scale()  # fp16: halved by every skipped step
            metrics["sampling_s"] = state.sampling_seconds
            metrics.update(hw.peak_memory())
            metrics["tokens"] = state.tokens
            metrics["training_s"] = state.seconds
            metrics["tokens_per_s"] = state.tokens / state.seconds  # of the run so far
            reporter.report("train", metrics)

        # Save.
        if saving:
            if hw.rank == 0:
                state.log_bytes = log_path.stat().st_size
                save_checkpoint(run_dir, networks, stateful, state, best_weights)
            hw.barrier()
            last_save = time.monotonic()
            clock = hw.now()
        if stop_signal:
            break

    for number, handler in handlers.items():
        signal.signal(number, handler)
    stop_signal = max(hw.gather(max(signals)))  # also one that came during the last evaluation
    if stop_signal:
        start = "python" if hw.world == 1 else f"torchrun --nproc-per-node={hw.world}"
        print(
            f"{phase}: stopped after step {state.step}; {start} okd.py --resume {args.output_dir}"
        )
        sys.exit(128 + stop_signal)
    if best_weights is not None:
        kept = state.best_eval["step"]
        print(f"kept: the student of step {kept}, the best by dev Rouge-L (else --select last)")
        networks.load_state_dict(best_weights, strict=False)
    return state


def record_signals(signals):
    """From now on SIGTERM and SIGINT only add their number to `signals`. Returns the old handlers.

    The loop then finishes its step, saves a checkpoint and exits. Further signals change nothing:
    torchrun passes on to its workers what the whole job has received. SIGKILL ends a run at once;
    what came after the last checkpoint is lost.
    """

    def record(number, frame):
        signals.append(number)

    return {n: signal.signal(n, record) for n in (signal.SIGTERM, signal.SIGINT)}


def make_optimizer(model, weight_decay):
    """AdamW; norms and biases, the one-dimensional weights, do not decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise UserError("the student has no trainable weights")
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True)


def make_scaler(hw):
    """A gradient scaler for every precision: it skips the step of a non-finite gradient.

    With a fused optimizer it decides on the device: no tensor is read back. Only fp16 needs the
    scale itself; elsewhere it is kept at 1.
    """
    scale = 2.0**16 if hw.dtype == torch.float16 else 1.0
    return torch.amp.GradScaler(hw.device.type, init_scale=scale)


def optimizer_step(optimizer, scaler, lr, max_grad_norm, hw):
    """One clipped step on the gradients of all processes. Returns the norm before clipping."""
    params = []
    for group in optimizer.param_groups:
        group["lr"] = lr
        params += group["params"]
    if hw.world > 1:
        sum_gradients(params)
    scaler.unscale_(optimizer)  # also looks for inf and NaN, which clipping would spread or hide
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf)
    scaler.step(optimizer)
    optimizer.zero_grad()
    return grad_norm


def sum_gradients(params):
    """Over the processes, in one exchange. A sum: losses are divided by the tokens of all."""
    for p in params:
        if p.grad is None:  # unused in this process, but perhaps not in the others
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in params]
    total = parameters_to_vector(gradients)
    dist.all_reduce(total)
    vector_to_parameters(total, gradients)


def learning_rate(step, num_steps, peak, warmup=0.03):
    """Linear warm-up over the first 3 % of the steps, then linear decay to 0, as in the paper."""
    warmup_steps = round(warmup * num_steps)
    rising = (step + 1) / (warmup_steps + 1)
    falling = (num_steps - step) / (num_steps - warmup_steps)
    return peak * min(rising, falling)


@dataclass
class Reporter:
    """One dict of metrics, three readers: metrics.jsonl, wandb with --track, and the console.

    A resumed run reports again what came after its checkpoint; wandb has it up to last_known.
    """

    log_path: Path
    phase: str
    state: TrainState
    num_steps: int
    hw: "Hardware"
    wandb_run: object
    last_known: tuple  # step, and whether it is an evaluation, which comes after the step's report

    def report(self, kind, metrics):
        if self.hw.rank > 0:
            return
        step = self.state.step
        record = write_record(self.log_path, self.phase, step, kind, metrics)
        if self.wandb_run is not None and (step, kind == "dev") > self.last_known:
            self.wandb_run.log(record, step=step)

        where = f"{self.phase} step {step} of {self.num_steps}"
        if kind == "dev":
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{where}, dev: {shown}", flush=True)
        else:
            minutes_left = self.state.seconds / step * (self.num_steps - step) / 60
            print(
                f"{where}: loss {metrics['student_loss']:.4f}, "
                f"{metrics['tokens_per_s']:.0f} tokens/s, {minutes_left:.1f} minutes left",
                flush=True,
            )


def write_record(path, phase, step, kind, metrics):
    """A line of metrics.jsonl. Here we wait for the device."""
    record = {"phase": phase, "step": step}
    for name, value in metrics.items():
        record[f"{kind}/{name}"] = float(value)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def require_finite(metrics, names, phase):
    """Raises UserError for a loss that is not finite: training could not fix it."""
    for name in names:
        value = float(metrics.get(name, 0.0))
        if not math.isfinite(value):
            raise UserError(
                f"{phase}: the first {name} is {value}: some weights are not finite, or the "
                "activations overflow (then --precision fp32 helps)"
            )


def trainable_weights(networks):
    return {name: p.data for name, p in networks.named_parameters() if p.requires_grad}


def save_checkpoint(run_dir, networks, stateful, state, best_weights):
    """All that training changes; load_checkpoint reads it back."""
    checkpoint = {
        "weights": trainable_weights(networks),
        "best_weights": best_weights,
        "stateful": {name: item.state_dict() for name, item in stateful.items()},
        "state": state,
    }
    sync(run_dir / "metrics.jsonl")  # or a power cut could leave it shorter than log_bytes
    with whole_file(run_dir / "checkpoint.pt") as file:
        torch.save(checkpoint, file)


def load_checkpoint(run_dir, networks, stateful):
    """-> (state, best weights). Raises UserError when the checkpoint is damaged."""
    path = run_dir / "checkpoint.pt"
    classes = torch.serialization.safe_globals([TrainState, Example])
    with explaining(f"{path} is damaged, so this run cannot be resumed"), classes:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        networks.load_state_dict(checkpoint["weights"], strict=False)
        for name, item in stateful.items():
            item.load_state_dict(checkpoint["stateful"][name])
    return checkpoint["state"], checkpoint["best_weights"]


def cut_log(path, size, hw):
    """Cut metrics.jsonl to its size at the checkpoint, since what came later is reported again.

    Returns which record was the last before the cut, see Reporter. Raises UserError when records of
    the time before the checkpoint are missing.
    """
    path.touch()
    log = path.read_bytes()
    if len(log) < size:
        raise UserError(f"{path} is shorter than at the last checkpoint: records were lost")
    if hw.rank == 0:
        os.truncate(path, size)
    records = log[: log.rfind(b"\n") + 1].splitlines()  # the last one may be cut in the middle
    if not records:
        return -1, False
    last = json.loads(records[-1])
    return last["step"], "dev/fkl" in last


# -----------------------------------------------------------------------------
# One micro-batch: two trunks, then heads and losses over chunks of tokens, then back

LOGITS_PER_CHUNK = 2**23  # on a CPU: 32 MB in float32, which its cache nearly holds
# Each chunk costs kernel launches and one gradient of the whole head: a GPU takes larger ones.
GPU_FACTOR = 8
GPU_MIN_TOKENS = 1024


class Trunk:
    """One forward pass of a model without its head; the head then runs on a few tokens at a time.

    Logits are by far the largest tensors: 4096 tokens of GPT-2's vocabulary take 0.8 GB in float32,
    for each network, and again for log_softmax and for the gradient. So the loss of one chunk of
    tokens at a time is backpropagated into `leaf`, a detached copy of the hidden states, and
    `backward` sends the gradient collected there through the trunk, once. Nothing is recomputed.
    """

    def __init__(self, model, batch, hw, states=None):
        if states is None:
            # The weights of a frozen network are in hw.dtype already: autocast is only overhead.
            frozen = not any(p.requires_grad for p in model.parameters())
            with hw.autocast(enabled=not frozen):
                # No attention mask: padding is on the right, and attention is causal.
                output = decoder_of(model)(input_ids=batch.input_ids, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)  # (B * T, H)
            states = hidden.index_select(0, batch.positions)  # (N, H), each predicts a label
        self.hidden = states
        self.leaf = states.detach().requires_grad_(states.requires_grad)
        self.head = head_of(model)

    def log_probs(self, chunk):
        """(n, V) float32 log-probabilities of the labels in the slice `chunk`."""
        hidden = self.leaf[chunk].unsqueeze(0)
        logits = self.head(inputs_embeds=hidden, use_cache=False).logits.squeeze(0)
        return logits.float().log_softmax(-1)

    def backward(self):
        if self.leaf.grad is not None:
            self.hidden.backward(self.leaf.grad)


def run_trunks(student, teacher, batch, hw, need_p0=False):
    """{name: Trunk} of q, the student; p, the teacher; p0, the teacher with its module off."""
    trunks = {"q": Trunk(student, batch, hw)}
    if teacher is not None:
        trunks["p"] = Trunk(teacher, batch, hw, batch.states)
        if need_p0:
            with torch.no_grad(), teacher.disable_adapter():
                trunks["p0"] = Trunk(teacher, batch, hw)
    return trunks


def chunks_of(trunks, batch, model, hw):
    """Yield (labels, rollout, log_p, log_q, log_p0) chunk by chunk; log-probabilities are (n, V).

    A frozen teacher's p_0 is p.
    """
    for chunk in split_into_chunks(len(batch.labels), model, hw):
        log_probs = {name: trunk.log_probs(chunk) for name, trunk in trunks.items()}
        log_p = log_probs.get("p")
        log_p0 = log_probs.get("p0", log_p)
        yield batch.labels[chunk], batch.rollout[chunk], log_p, log_probs["q"], log_p0


def split_into_chunks(num_tokens, model, hw):
    """Slices of about LOGITS_PER_CHUNK logits each, all of one size: none is a small remainder."""
    size = LOGITS_PER_CHUNK / vocab_size(model)
    if hw.device.type != "cpu":
        size = max(size * GPU_FACTOR, GPU_MIN_TOKENS)
    num_chunks = max(1, round(num_tokens / max(1, size)))
    size = math.ceil(num_tokens / num_chunks)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def train_micro_batch(args, student, teacher, batch, hw, scaler, num_tokens, taid_t):
    """Forward and backward of one micro-batch, for both networks. teacher is None for SFT.

    Returns {name: sum over its tokens}, tensors on the device. num_tokens is that of the whole
    batch, so that its split into micro-batches changes no gradient.
    """
    parameters = divergence_parameters(args, taid_t)
    sums = Counter()
    with hw.autocast():  # one region: the head's weight is cast once for all chunks
        need_p0 = args.teacher_moves and args.anchor > 0
        trunks = run_trunks(student, teacher, batch, hw, need_p0)
        for labels, rollout, log_p, log_q, log_p0 in chunks_of(trunks, batch, student, hw):
            loss = student_loss(
                log_p,
                log_q,
                labels,
                args.divergence,
                parameters,
                args.student_ce_weight,
                args.temperature,
            )
            if len(rollout) > 0:  # MiniLLM
                loss = loss + policy_loss(log_q, labels, *rollout.unbind(1))
            loss = loss.sum()
            sums["student_loss"] += loss.detach()
            if args.teacher_moves:
                loss_t = teacher_loss(
                    log_p, log_q, log_p0, labels, args.alpha, args.anchor, args.temperature
                ).sum()
                sums["teacher_loss"] += loss_t.detach()
                # Each loss detaches the other network, so one backward serves both.
                loss = loss + loss_t
            scaler.scale(loss / num_tokens).backward()

    for trunk in trunks.values():
        trunk.backward()
    return sums


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def measure(student, teacher, rows, hw, max_tokens, need_p0=False, metrics=eval_metrics):
    """{name: values of all response tokens, (N,)}, rows in the order of sorted(rows, key=len).

    `metrics` maps (log_p, log_q, log_p0, labels) of some tokens to {name: (n,) values}. Every
    process measures all rows.
    """
    parts = {}
    for batch in micro_batches(rows, max_tokens, hw, share=False):
        with hw.autocast():
            trunks = run_trunks(student, teacher, batch, hw, need_p0)
            for labels, _, *log_probs in chunks_of(trunks, batch, student, hw):
                for name, values in metrics(*log_probs, labels).items():
                    parts.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def evaluate(args, student, teacher, rows, data, hw):
    """Means per token of eval_metrics on the dev rows; with --select best, also Rouge-L."""
    measured = measure(student, teacher, rows, hw, args.micro_batch_tokens, args.teacher_moves)
    result = {name: values.mean().item() for name, values in measured.items()}
    if args.select == "best":
        result["rouge_l"] = score(args, student, rows, data, hw)
    return result


def score(args, model, rows, data, hw):
    """Mean Rouge-L of greedy answers to the prompts of rows."""
    prompts = [row.prompt_ids for row in rows]
    responses = generate(
        model, prompts, data.stop_ids, hw, args.max_new_tokens, args.sample_batch_size
    )
    total = 0.0
    for row, ids in zip(rows, responses, strict=True):
        text_ids = [token for token in ids if token not in data.stop_ids]
        answer = data.tokenizer.decode(text_ids, skip_special_tokens=True)
        total += rouge_l(answer, row.references)
    return total / len(rows)


class CharacterTokenizer:
    """Letters, marks and numbers of every script; rouge_score itself knows a to z and 0 to 9."""

    def tokenize(self, text):
        return [c for c in text.lower() if unicodedata.category(c)[0] in "LMN"]


def on_characters(reference):
    """Whether Rouge-L compares characters: when most of the reference's are not ASCII."""
    found = CharacterTokenizer().tokenize(reference)
    return sum(not c.isascii() for c in found) > len(found) / 2


def rouge_l(prediction, references):
    """F of Rouge-L times 100, with the stemmer, against the best reference. Lin 2004."""
    scores = []
    for reference in references:
        tokenizer = CharacterTokenizer() if on_characters(reference) else None
        scorer = RougeScorer(["rougeL"], use_stemmer=True, tokenizer=tokenizer)
        scores.append(scorer.score(reference, prediction)["rougeL"].fmeasure)
    return 100 * max(scores)


# -----------------------------------------------------------------------------
# The text that a step trains on (--text), one function for each source

REPLAY_CAPACITY = 1000  # rows of DistiLLM's replay buffer, first in, first out
NUM_ROLLOUTS = 256  # rows that MiniLLM samples at a time
ROLLOUT_PASSES = 4  # MiniLLM's passes over them before new ones are sampled


def select_rows(args, step, num_steps, train_rows, state, sampler):
    """The rows of one optimizer step: a function of seed, step and state, so a resume is exact.

    With probability phi the student answers the prompts itself: always in ImitKD (Lin et al. 2020,
    arXiv:2009.07253), for half of the batches in GKD (Agarwal et al. 2023, arXiv:2306.13649), more
    and more often in DistiLLM. phi is 0 for the other texts.
    """
    batch_size = min(args.batch_size, len(train_rows))
    if args.text == "mixture":
        return minillm_text(args, step, batch_size, train_rows, state, sampler)
    gold = batch_of(train_rows, batch_size, args.seed, step)
    rng = random.Random(f"{args.seed}, text of step {step}")
    r = rng.random()
    if r >= state.phi:
        return gold  # with --text teacher, these are the teacher's responses already
    if args.text == "adaptive":
        return adaptive_text(gold, step, num_steps, r, rng, state, sampler)
    return sampler.respond(gold, step)


def batch_of(rows, batch_size, seed, step):
    """The rows of batch number `step`: each epoch is a random permutation, a batch a slice of it.

    An epoch leaves out the rows that are left at its end, different ones each time.
    """
    epoch, index = divmod(step, len(rows) // batch_size)
    order = permutation(len(rows), f"{seed}, epoch {epoch}")
    return [rows[i] for i in order[index * batch_size : (index + 1) * batch_size]]


@functools.lru_cache(maxsize=2)
def permutation(size, seed):
    return random.Random(seed).sample(range(size), size)


def teacher_text(args, state, teacher, data, hw, run_dir):
    """The rows with the teacher's responses for the gold ones (SeqKD), sampled once in a run.

    Kim & Rush 2016, arXiv:1606.07947, who search with a beam; here they are sampled.
    """
    path = run_dir / "teacher_text.json"
    if not hw.gather(path.exists())[0]:
        rows = Sampler(args, state, teacher, None, data.stop_ids, hw).respond(data.train, step=0)
        responses = [row.response_ids for row in rows]
        if hw.rank == 0:
            text = {"seconds": state.sampling_seconds, "responses": responses}
            write_file(path, json.dumps(text))
        hw.barrier()
    text = read_json(path)
    state.seconds = state.sampling_seconds = text["seconds"]
    pairs = zip(data.train, text["responses"], strict=True)
    return [replace(row, response_ids=ids) for row, ids in pairs]


def adaptive_text(gold, step, num_steps, r, rng, state, sampler):
    """The student's text, fresh or, ever more often, replayed; r < phi is drawn uniformly.

    Ko et al. 2024 (DistiLLM), arXiv:2402.03898, algorithm 1.
    """
    buffer_is_full = len(state.replay) >= REPLAY_CAPACITY
    if buffer_is_full and r >= state.phi * (1 - step / num_steps):
        return rng.sample(state.replay, min(len(gold), len(state.replay)))
    fresh = sampler.respond(gold, step)
    state.replay = (state.replay + fresh)[-REPLAY_CAPACITY:]
    return fresh


def raise_phi(state, dev_loss, margin=0.1, increment=0.1):
    """DistiLLM: phi grows when the dev loss is `margin` above that of the last increase."""
    if state.reference_loss is None:
        state.reference_loss = dev_loss
    if dev_loss >= state.reference_loss + margin:
        state.phi = min(1.0, state.phi + increment)
        state.reference_loss = dev_loss


def minillm_text(args, step, batch_size, train_rows, state, sampler):
    """Rollouts of the mixture, used for ROLLOUT_PASSES passes before new ones are sampled.

    Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    batches_per_pass = max(1, min(NUM_ROLLOUTS, len(train_rows)) // batch_size)
    round_number, step_in_round = divmod(step, batches_per_pass * ROLLOUT_PASSES)
    if step_in_round == 0:
        rows = []
        for i in range(batches_per_pass):
            batch_number = round_number * batches_per_pass + i
            rows += batch_of(train_rows, batch_size, args.seed, batch_number)
        state.rollouts = sampler.rollout(rows, step)
    return batch_of(state.rollouts, batch_size, f"{args.seed}, {round_number}", step_in_round)


@dataclass
class Sampler:
    """Samples a model's responses to the prompts of rows, or rollouts for MiniLLM."""

    args: Args
    state: TrainState
    model: torch.nn.Module
    teacher: torch.nn.Module
    stop_ids: list[int]
    hw: "Hardware"

    def respond(self, rows, step, teacher=None):
        """The same prompts with sampled responses; with a teacher, sampled from the mixture."""
        start = self.hw.now()
        responses = generate(
            self.model,
            [row.prompt_ids for row in rows],
            self.stop_ids,
            self.hw,
            self.args.max_new_tokens,
            self.args.sample_batch_size,
            do_sample=True,
            seed=hash((self.args.seed, step)),
            teacher=teacher,
        )
        self.state.sampling_seconds += self.hw.now() - start
        return [
            row.with_response(ids, self.args.max_length)
            for row, ids in zip(rows, responses, strict=True)
        ]

    def rollout(self, rows, step):
        """Samples of the mixture, with (advantage, log q, importance weight) of every token."""
        rows = self.respond(rows, step, teacher=self.teacher)
        rows.sort(key=len)  # the order in which micro_batches takes them
        measured = measure(
            self.model,
            self.teacher,
            rows,
            self.hw,
            self.args.micro_batch_tokens,
            metrics=sampled_log_probs,
        )
        log_p = measured["log_p"].cpu()
        log_q = measured["log_q"].cpu()

        lengths = [len(row.response_ids) for row in rows]
        rewards = (log_p - log_q).split(lengths)
        returns = torch.cat([discounted_returns(rewards_of_row) for rewards_of_row in rewards])
        # Whitened over response tokens; the authors' code counts padding, too.
        advantages = (returns - returns.mean()) / (returns.std(unbiased=False) + 1e-8)
        weights = (log_q - mix(log_p, log_q, TEACHER_SHARE)).exp()
        rollouts = torch.stack([advantages, log_q, weights], dim=1).split(lengths)
        return [replace(row, rollout=r.tolist()) for row, r in zip(rows, rollouts, strict=True)]


def sampled_log_probs(log_p, log_q, log_p0, labels):
    return {"log_p": -cross_entropy(log_p, labels), "log_q": -cross_entropy(log_q, labels)}


def discounted_returns(rewards, gamma=0.95):
    """(n,) r -> (n,) R_t = sum_{k >= t} gamma^(k - t) r_k / (n - t). The paper starts at t + 1."""
    returns = []
    running = 0.0
    for tokens_left, reward in enumerate(reversed(rewards.tolist()), start=1):
        running = reward + gamma * running
        returns.append(running / tokens_left)
    return torch.tensor(returns[::-1])


# -----------------------------------------------------------------------------
# Generation

TEACHER_SHARE = 0.2  # of the mixture that MiniLLM samples from


@torch.no_grad()
def generate(
    model,
    prompts,
    stop_ids,
    hw,
    max_new_tokens=256,
    batch_size=64,
    do_sample=False,
    seed=0,
    teacher=None,
    **options,
):
    """Prompts -> responses, both lists of token ids; a response includes its end token, if any.

    do_sample samples at temperature 1 from the full distribution; with a teacher, from the mixture
    of both. `options` go to GenerationConfig. The processes split the prompts; each gets all
    responses. Raises UserError for a prompt that leaves no room in the model's positions.
    """
    if do_sample:
        options.setdefault("top_k", 0)  # else transformers keeps the likeliest 50
    positions = max_positions(model.config)
    if teacher is not None:
        positions = min(positions, max_positions(teacher.config))
    torch.manual_seed(hash((seed, hw.rank)))
    # Longest prompts first: if the memory is too small, that shows at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    order += order[-1:] * (-len(order) % hw.world)  # padded: equally many for each
    mine = order[hw.rank :: hw.world]
    responses = {}
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        input_ids, mask = left_pad([prompts[i] for i in indices], stop_ids[0], hw.device)
        # The longest prompt of all processes at this time.
        room = room_for_response(len(prompts[order[start * hw.world]]), positions, max_new_tokens)
        config = transformers.GenerationConfig(
            do_sample=do_sample,
            max_new_tokens=room,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            **options,
        )
        processors = []
        if teacher is not None:
            processors.append(TeacherMixture(teacher, mask))
        with hw.autocast():
            output = model.generate(
                input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                synced_gpus=hw.world > 1,  # a sharded model runs in all processes or in none
            )
        new_tokens = output[:, input_ids.size(1) :].tolist()
        for i, tokens in zip(indices, new_tokens, strict=True):
            responses[i] = cut_after_end(tokens, stop_ids)

    for part in hw.gather(responses):
        responses.update(part)
    return [responses[i] for i in range(len(prompts))]


def room_for_response(prompt_length, positions, max_new_tokens):
    room = positions - prompt_length
    if room < 1:
        raise UserError(f"a prompt of {prompt_length} tokens leaves no room for a response")
    if room < max_new_tokens:
        print_once(f"some prompts leave positions for fewer than {max_new_tokens} new tokens")
    return min(room, max_new_tokens)


def left_pad(prompts, pad_id, device):
    """Lists of ids -> (B, T) ids and attention mask; the new tokens follow on the right."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    input_ids = input_ids.to(device)
    is_padding = input_ids < 0
    return input_ids.masked_fill(is_padding, pad_id), (~is_padding).long()


def cut_after_end(tokens, stop_ids):
    """Drops the padding of a row that ended early: all after its first end token."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: position + 1]
    return tokens


class TeacherMixture(transformers.LogitsProcessor):
    """Turns the student's scores into log(0.2 p + 0.8 q). The teacher has a KV cache of its own."""

    def __init__(self, teacher, mask):
        self.teacher = teacher
        self.mask = mask
        self.cache = None

    def __call__(self, input_ids, scores):
        if self.cache is None:  # the whole prompt first, then one token at a time
            new_ids = input_ids
        else:
            new_ids = input_ids[:, -1:]
            self.mask = torch.cat([self.mask, torch.ones_like(new_ids)], dim=1)
        position_ids = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        output = self.teacher(
            input_ids=new_ids,
            attention_mask=self.mask,
            position_ids=position_ids[:, -new_ids.size(1) :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise UserError("--text mixture needs a teacher whose family has a KV cache")
        log_p = output.logits[:, -1].float().log_softmax(-1)
        log_q = scores.float().log_softmax(-1)
        return mix(log_p, log_q, TEACHER_SHARE)


print_once = functools.cache(print)  # it remembers what was printed


# -----------------------------------------------------------------------------
# Data: a JSON line becomes an Example. What is prompt and what is response is decided here


@dataclass
class Example:
    """One prompt with its response."""

    number: int  # line in its file, from 1
    prompt: str
    references: list[str]  # every valid response; the first is the one trained on
    prompt_ids: list[int]
    response_ids: list[int]  # ends in end_id, unless it was cut to --max-length
    end_id: int
    rollout: list | None = None  # MiniLLM, per response token: advantage, log q, importance weight
    states: torch.Tensor | None = None  # --cache-teacher: the teacher's, (response tokens, H)

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)

    def with_response(self, ids, max_length):
        """The same prompt with another response, cut to max_length tokens in all."""
        ids = ids[: max_length - len(self.prompt_ids)]
        return replace(self, response_ids=ids, rollout=None, states=None)


@dataclass
class Data:
    """The rows of a run, and how they were encoded."""

    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: list[int] = field(default_factory=list)  # what ends a response
    train: list[Example] = field(default_factory=list)
    dev: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    test_lines: list[str] = field(default_factory=list)  # of --data, as they stand in the file
    pretraining: list[Example] = field(default_factory=list)  # of the demo's teacher


ALIASES = {
    "conversations": "messages",
    "context": "input",
    "response": "output",
    "completion": "output",
}
FORMS = {  # the field that decides the form: all that it reads
    "messages": {"messages", "tools"},
    "instruction": {"instruction", "input", "output"},
    "prompt": {"prompt", "output"},
}
# Text of the conversation: an error where a row's form does not read it.
CONTENT_FIELDS = {"instruction", "input", "output", "tools", "system", "history"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"}
FIXED_DATE = (  # a template that writes today's date would change the prompts overnight
    "{% macro strftime_now(format) %}{{ format | replace('%Y', '2024') | replace('%m', '07')"
    " | replace('%d', '26') | replace('%B', 'July') | replace('%b', 'Jul')"
    " | replace('%A', 'Friday') | replace('%H', '12') | replace('%M', '00') }}{% endmacro %}\n"
)


def read_row(row, tokenizer, number=1):
    """A row -> Example. Raises UserError when it cannot be read. The forms are

    instruction, perhaps with input or context, and output: Alpaca's template;
    prompt and output: the texts as they are;
    messages, perhaps with tools, or ShareGPT's conversations, or TRL's prompt and completion as
    lists of messages: the chat template. The last turn is the response, all others are context.

    output may be called response or completion, and may be a list of valid texts. A text that
    contains a control token (<|im_end|>) is read with that token, as transformers does.
    """
    with explaining("it cannot be read"):
        prompt, responses, _ = parse_row(row)
        if isinstance(prompt, list):
            messages = prompt + responses
            prompt, ids, response_ids = encode_chat(tokenizer, messages, row.get("tools") or None)
            responses = [tokenizer.decode(response_ids[:-1], skip_special_tokens=True)]
        else:
            ids, response_ids = encode_pair(tokenizer, prompt, responses[0])
            probe = tokenizer("a").input_ids
            start = probe[: probe.index(encode(tokenizer, "a")[0])]  # what begins a text: BOS
            if ids[: len(start)] != start:
                ids = start + ids
            if response_ids[-1:] != [tokenizer.eos_token_id]:
                response_ids.append(tokenizer.eos_token_id)
        return Example(number, prompt, responses, ids, response_ids, end_id=response_ids[-1])


def parse_row(row):
    """-> (prompt, responses, fields that are not read): texts, or for a chat messages."""
    fields = {}
    for name, value in row.items():
        place = ALIASES.get(name, name)
        if value in (None, "") or value != value:  # pandas writes NaN for nothing
            continue
        if place in fields:
            raise UserError(f"{name} is a second {place}: keep one of them")
        fields[place] = value
    if isinstance(fields.get("prompt"), list) and "messages" not in fields:  # TRL
        fields["messages"] = fields.pop("prompt") + fields.pop("output")
    form = next((name for name in FORMS if name in fields), "prompt")
    unread = fields.keys() - FORMS[form]
    if unread & CONTENT_FIELDS:
        raise UserError(
            f"{min(unread & CONTENT_FIELDS)} has no place beside {form}: write one text "
            "(context counts as input, response and completion as output)"
        )
    if form == "messages":
        messages = [parse_message(turn) for turn in fields["messages"]]
        return messages[:-1], messages[-1:], unread

    responses = fields.pop("output", "")
    if not isinstance(responses, list):
        responses = [responses]
    texts = {name: fields[name] for name in fields.keys() - unread}
    with explaining("a field does not hold text"):
        "".join([*texts.values(), *responses]).encode()
    if form == "prompt":
        return texts.get("prompt", ""), responses, unread
    template = ALPACA_WITH_INPUT if "input" in texts else ALPACA
    return template.format(**texts), responses, unread


def parse_message(turn):
    """OpenAI's or ShareGPT's turn -> a message with a known role and a text as content."""
    role = turn.get("role", turn.get("from"))
    role = SHAREGPT.get(role, role)
    content = turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise UserError(f"the role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and (content is not None or not turn.get("tool_calls")):
        raise UserError(f"content is {content!r}, not text")
    return {**turn, "role": role, "content": content}


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_pair(tokenizer, prompt, response):
    """Encoded as one; apart where a token spans the border, since generation starts there."""
    prompt_ids = encode(tokenizer, prompt)
    ids = encode(tokenizer, prompt + response)
    if ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, ids[len(prompt_ids) :]
    return prompt_ids, encode(tokenizer, response)


def encode_chat(tokenizer, messages, tools=None):
    """-> (rendered prompt, its ids, ids of the response: all that the template writes after it).

    The prompt asks for an answer without a thought (Qwen3), unless the row holds a thought.
    """
    with explaining("the tokenizer has no chat template: use an instruct model's, or plain text"):
        template = tokenizer.get_chat_template(tools=tools)

    def render(messages, **options):
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=FIXED_DATE + template,
            date_string="26 Jul 2024",
            tokenize=False,
            **options,
        )

    if messages[-1]["role"] != "assistant":
        raise UserError("the last message is not the assistant's")
    for message in messages:
        if (tools or message.get("tool_calls")) and "tool_calls" not in template:
            raise UserError("the chat template does not write tools")
        if message["role"] == "tool" and "tool" not in template:
            raise UserError("the chat template does not write the role tool")
        if message["role"] == "developer" and "developer" not in template:
            message["role"] = "system"
    for options in ({"enable_thinking": False}, {}):
        prompt = render(messages[:-1], add_generation_prompt=True, **options)
        conversation = render(messages, **options)
        if conversation.startswith(prompt):
            break
    else:
        raise UserError("the chat template renders the prompt otherwise than the conversation")
    check_written(messages, conversation)

    longer = ""
    with contextlib.suppress(Exception):  # some templates refuse a user turn after a tool call
        longer = render([*messages, {"role": "user", "content": "?"}], **options)
    prompt_ids, response_ids = encode_pair(tokenizer, prompt, conversation[len(prompt) :])
    # commonprefix takes lists of ids, too
    shared = os.path.commonprefix([prompt_ids + response_ids, encode(tokenizer, longer)])
    turn = end_of_turn(tokenizer, response_ids, shared[len(prompt_ids) :])
    return prompt, prompt_ids, turn


def check_written(messages, conversation):
    """Raises UserError for what the template leaves out of the conversation; it may trim texts.

    Earlier answers are not checked, since templates drop their thoughts; nor are tools' results,
    which they rewrite.
    """
    texts = [m["content"] for m in messages if m["role"] in ("system", "user")]
    for name in ("content", "reasoning_content", "thinking", "reasoning"):
        texts += re.split("</?think>", messages[-1].get(name) or "")
    for text in texts:
        if conversation.count(text.strip()) < texts.count(text):
            raise UserError(f"the chat template does not write {text.strip()[:60]!r}")


def end_of_turn(tokenizer, response_ids, shared):
    """The response up to the end of its turn, less white space after its last added token.

    shared: what stays when a user turn follows, so without what closes a whole conversation
    (Phi-3: EOS after <|end|>). It does not count when it lacks text (a thought, which templates
    drop from earlier turns) or an end (gpt-oss ends the last turn alone in <|return|>).
    """
    whole = tokenizer.decode(response_ids, skip_special_tokens=True)
    for ids in (shared, response_ids):
        while ids and not tokenizer.decode(ids[-1:]).strip():
            ids = ids[:-1]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.strip() == whole.strip() and set(ids[-1:]) & tokenizer.added_tokens_decoder.keys():
            return ids
    raise UserError("the chat template ends the response in no added token, such as EOS")


def stop_ids(tokenizer, rows):
    """The ids that end a response: EOS, and those in which the rows' responses end."""
    ends = {row.end_id for row in rows} - {tokenizer.eos_token_id}
    return [tokenizer.eos_token_id, *sorted(ends)]


def read_line(source, number, line, tokenizer):
    """A JSON line -> (row, Example). Raises UserError that names file and line."""
    try:
        with explaining("it is not a JSON object"):
            row = dict(json.loads(line))
        return row, read_row(row, tokenizer, number)
    except UserError as error:
        raise UserError(f"{source}, line {number}: {error}") from error


def read_rows(source, lines, tokenizer, max_prompt_length, max_length):
    """JSON lines -> Examples that can be trained on, cut to max_length tokens.

    Prints what was dropped and why, which fields are not read, which turns are context. Raises
    UserError for a line that cannot be read, or when no row is left.
    """
    longest = min(max_prompt_length, max_length - 1)
    flag = "--max-prompt-length" if longest == max_prompt_length else "--max-length"
    kept = []
    notes = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, example = read_line(source, number, line, tokenizer)
        prompt, _, unread = parse_row(row)
        for name in sorted(unread):
            notes[f"with {name}, which is not read"] += 1
        roles = [turn["role"] for turn in prompt if isinstance(turn, dict)]
        notes["assistant turns are context"] += roles.count("assistant")
        if not example.prompt_ids:
            notes["dropped: no prompt"] += 1
        elif not example.references[0].strip():
            notes["dropped: no response"] += 1
        elif len(example.prompt_ids) > longest:
            kind = "conversation" if roles else "prompt"
            notes[f"dropped: {kind} of over {longest} tokens ({flag})"] += 1
        else:
            notes["cut to --max-length"] += len(example) > max_length
            notes["compared by characters (Rouge-L)"] += on_characters(example.references[0])
            kept.append(example.with_response(example.response_ids, max_length))
    summary = f"{source}: {len(kept)} rows"
    for what, count in notes.items():
        if count > 0:
            summary += f"; {count} {what}"
    if not kept:
        raise UserError(f"{summary}; so no row is left")
    print(summary)
    return kept


def read_lines(path):
    """A file -> its lines. Raises UserError for another format than JSONL."""
    with explaining(f"cannot read {path}"):
        content = Path(path).read_bytes()
    with explaining(f"{path} is in another format: make it JSONL, UTF-8 with one object a line"):
        text = content.decode("utf-8-sig")
        if text.lstrip()[:1] != "{" or "\0" in text:
            raise ValueError(f"it begins with {text[:20]!r}")
    return text.split("\n")


def hub_lines(repo, file):
    with explaining(f"cannot get {file} of the dataset {repo}: give --data, or set HF_HOME"):
        path = huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    return read_lines(path)


def prompt_hash(line):
    """By a row's prompt as it stands in the file: no tokenizer, no response, no other field."""
    prompt, _, _ = parse_row(json.loads(line))
    return digest(prompt)


def split_lines(lines):
    """JSON lines -> {line number: "train", "dev" or "test"}, in the order of their hashes.

    Dev and test that would be empty take the smallest hashes; the largest is always in train.
    """
    hashes = {n: prompt_hash(line) for n, line in enumerate(lines, start=1) if line.strip()}
    order = sorted(set(hashes.values()))[:-1]
    dev_end = max(1, sum(h < "0d" for h in order[:-1]))  # 13 of 256 hashes: 5 %
    test_end = max(dev_end + 1, sum(h < "1a" for h in order))
    parts = dict.fromkeys(order[:test_end], "test")
    parts.update(dict.fromkeys(order[:dev_end], "dev"))
    return {n: parts.get(hashes[n], "train") for n in sorted(hashes, key=hashes.get)}


def load_data(teacher, source, tokenizer, max_prompt_length, max_length):
    """-> Data: the rows of the JSONL file `source`; else of the demo for its teacher, or Dolly.

    Of a file, dev and test rows are in the order of a hash: the first of them are a random sample.
    """
    data = Data(tokenizer)
    limits = (tokenizer, max_prompt_length, max_length)
    if teacher == "demo":
        rows = read_rows("demo", map(json.dumps, demo_rows(5800, seed=0)), *limits)
        data.pretraining = rows[1800:]
    if source is not None:
        lines = read_lines(source)
        kept = {row.number: row for row in read_rows(source, lines, *limits)}
        for number, split in split_lines(lines).items():
            if number in kept:
                getattr(data, split).append(kept[number])
        data.test_lines = [lines[row.number - 1] for row in data.test]
    elif teacher == "demo":
        data.test = rows[:1200]
        data.dev = rows[1200:1400]
        data.train = rows[1400:1800]
    else:  # split as in published results
        rows = read_rows("Dolly", hub_lines("MiniLLM/dolly", "raw.jsonl"), *limits)
        data.dev = [row for row in rows if row.number <= 1000]
        data.train = [row for row in rows if row.number > 1000]
        data.test = read_rows("Dolly, test", hub_lines("MiniLLM/dolly", "valid.jsonl"), *limits)
    if not data.train:
        raise UserError(f"{source}: no row is left to train on")
    data.stop_ids = stop_ids(tokenizer, data.train + data.dev + data.test)
    return data


DEMO_TASKS = (  # prompt | three ways to answer
    "shout {a}\n|{loud}!|{loud}|we shout {loud}",
    "double {a}\n|{a} {a}|{a} and {a}|twice: {a} {a}",
    "spell {a}\n|{dashed}|{spaced}|letters {spaced}",
    "first of {a}, {b}\n|{a}|it is {a}|the first is {a}",
    "swap {a}, {b}\n|{b}, {a}|{b} then {a}|{b} before {a}",
    "larger of {pair}\n|{y}|it is {y}|{y} is larger",
)


def demo_word(rng):
    length = rng.choice((1, 2, 2))
    return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(length))


def demo_rows(count, seed):
    """Rows of six tasks on made-up words, no prompt twice; wordings are drawn 6 : 3 : 2."""
    rng = random.Random(seed)
    rows = {}
    while len(rows) < count:
        a = demo_word(rng)
        b = demo_word(rng)
        x, y = sorted(rng.sample(range(10, 100), 2))
        pair = rng.choice((f"{x}, {y}", f"{y}, {x}"))
        task = rng.choice(DEMO_TASKS).format(
            a=a,
            b=b,
            y=y,
            pair=pair,
            loud=a.upper(),
            dashed="-".join(a),
            spaced=" ".join(a),
        )
        prompt, *answers = task.split("|")
        drawn = rng.choices(answers, weights=(6, 3, 2))[0]
        answers.remove(drawn)
        rows.setdefault(prompt, {"prompt": prompt, "response": [drawn, *answers]})
    return list(rows.values())


def demo_tokenizer():
    """Bytes as ids 0 to 255, and EOS. It adds nothing to a text."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    return transformers.GPT2Tokenizer(vocab=vocab, merges=[])


def load_tokenizer(name):
    if name == "demo":
        return demo_tokenizer()
    with explaining(f"cannot load the tokenizer of {name}: give a folder with one, or a hub id"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token, so no response could end")
    return tokenizer


def one_tokenizer(teacher, student):
    """The teacher's, for both. UserError when more than EOS and reserved tokens differ."""
    different = teacher.get_vocab().items() ^ student.get_vocab().items()
    added = [*teacher.added_tokens_decoder.items(), *student.added_tokens_decoder.items()]
    reserved = {token_id for token_id, token in added if token.special}
    ordinary = sorted({token for token, token_id in different if token_id not in reserved})
    if ordinary:
        raise UserError(
            f"teacher and student differ in tokens, such as {ordinary[:5]}: take two models of one "
            "family"
        )
    if different or teacher.eos_token != student.eos_token:
        print(f"both use the teacher's tokenizer; the student's had EOS {student.eos_token}")
    return teacher


# -----------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B, T), right-padded to the longest row
    positions: torch.Tensor  # (N,) indices into B * T of the tokens before a response token
    labels: torch.Tensor  # (N,) those response tokens, row by row: shifted here and nowhere else
    rollout: torch.Tensor  # (N, 3) of MiniLLM's rollouts, empty for other text
    states: torch.Tensor | None = None  # (N, H) of the teacher, with --cache-teacher


def collate(rows, device):
    """Examples -> Batch. Masks come from lengths, not from ids: padding may be EOS, a target."""
    rows_ids = [torch.tensor(row.prompt_ids + row.response_ids) for row in rows]
    in_response = [torch.arange(len(row)) >= len(row.prompt_ids) for row in rows]
    input_ids = pad_sequence(rows_ids, batch_first=True)
    in_response = pad_sequence(in_response, batch_first=True)
    positions = in_response.flatten().nonzero().squeeze(1) - 1
    labels = input_ids[in_response]
    rollout = torch.tensor([values for row in rows for values in row.rollout or []])
    tensors = [input_ids, positions, labels, rollout]
    if rows[0].states is not None:
        states = torch.cat([row.states for row in rows])
        tensors.append(states.pin_memory() if device.type == "cuda" else states)
    return Batch(*[tensor.to(device, non_blocking=True) for tensor in tensors])


def micro_batches(rows, max_tokens, hw, share=True):
    """Yield Batches of at most max_tokens with padding, or of one row; short rows come first.

    Little is padded: a piece that has 512 tokens takes no row 1.5 times as long as its shortest.
    With share, each process gets its part of the rows, in equally many pieces; the number of rows
    must be a multiple of that of the processes.
    """
    rows = sorted(rows, key=len)
    rank = hw.rank if share else 0
    world = hw.world if share else 1
    pieces = []
    shortest = 0
    tokens = 0
    # All processes cut alike, by the longest of the rows that they take at the same time.
    for row, longest in zip(rows[rank::world], rows[world - 1 :: world], strict=True):
        length = len(longest)
        uneven = length > 1.5 * shortest and tokens >= 512
        if not pieces or uneven or (len(pieces[-1]) + 1) * length > max_tokens:
            pieces.append([])
            shortest = length
            tokens = 0
        pieces[-1].append(row)
        tokens += length
    for piece in pieces:
        yield collate(piece, hw.device)


@torch.no_grad()
def cache_states(teacher, rows, hw):
    """Give each row its frozen teacher's last hidden states, (response tokens, H).

    They are computed once, in an order and in micro-batches that depend on the rows alone, so that
    a resumed run computes the same bits, and kept in host memory: one tensor, a view per row. Under
    torchrun every process holds all of them. Raises UserError when they do not fit.
    """
    rows = sorted(rows, key=len)
    lengths = [len(row.response_ids) for row in rows]
    width = Trunk(teacher, collate(rows[:1], hw.device), hw).hidden.size(1)
    shape = (sum(lengths), width)
    needed = math.prod(shape) * hw.dtype.itemsize * hw.world / 1e9
    free = min(hw.gather(free_memory(hw.world))) / 1e9
    sizes = f"--cache-teacher needs {needed:.2f} GB of host memory; {free:.2f} GB are free"
    print(sizes)
    if needed > free:
        raise UserError(sizes)
    states = torch.empty(shape, dtype=hw.dtype)
    start = 0
    for batch in micro_batches(rows, 4096, hw, share=False):
        end = start + len(batch.labels)
        states[start:end] = Trunk(teacher, batch, hw).hidden
        start = end
    for row, view in zip(rows, states.split(lengths), strict=True):
        row.states = view


def free_memory(num_processes):
    """Bytes that the processes may still take: of the machine, or of its container."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists():
        most = float(limit.read_text().replace("max", "inf"))
        free = min(free, most - num_processes * psutil.Process().memory_info().rss)
    return free


# -----------------------------------------------------------------------------
# Models

WHERE_MODELS_ARE = "give a local folder with *.safetensors, or a hub id, or set HF_HOME"
# Left padding changes their logits (most), they look at later tokens (xlm, xlnet, prophetnet), or
# their blocks share weights, so that a merge adds LoRA several times (zamba).
UNSUPPORTED = (
    "bart bigbird_pegasus blenderbot blenderbot-small deepseek_v4 marian mbart mvp pegasus plbart "
    "prophetnet recurrent_gemma rwkv trocr whisper xlm xlnet xlstm zamba zamba2"
)


def load_model(name, role, dtype):
    """Hub id, local folder or "demo" -> causal language model on the CPU, in eval mode.

    An adapter is merged onto its base. Raises UserError unless every weight is found.
    """
    with explaining(f"cannot load the {role} {name}: {WHERE_MODELS_ARE}"):
        base = base_of(name)
        if base:
            return merge_adapter(load_model(base, role, torch.float32), name, dtype)
        config = load_config(name, role)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
        if name == "demo":
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = load_weights(name, config, dtype)
    model.own_generation_config = model.generation_config  # written by save_model
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def load_weights(name, config, dtype):
    """from_pretrained alone would give random numbers to the weights that the files lack."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported
    )
    missing = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    unused = sorted(report["unexpected_keys"])
    if unused:
        print(f"{name}: {len(unused)} weights have no place in the model, such as {unused[:3]}")
    if missing:
        raise UserError(f"{name} lacks {len(missing)} weights of its model, such as {missing[:3]}")
    return model


def base_of(name):
    """The model that an adapter was trained on; None where `name` is no adapter."""
    if name == "demo" or find_adapter_config_file(name) is None:
        return None
    if list(Path(name).glob("model*.safetensors")):
        raise UserError(
            f"{name} holds both whole weights and an adapter: delete one of the two, or merge them "
            "by peft's merge_and_unload() and save the result"
        )
    base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise UserError(f"adapter_config.json in {name} has no base_model_name_or_path")
    return base


def merge_adapter(model, folder, dtype):
    """Merges an adapter into a float32 model on the CPU, then casts the model to dtype."""
    model = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
    report = model.load_adapter(folder, "default", torch_device="cpu")
    wrong = report.missing_keys + report.unexpected_keys
    if wrong:
        raise UserError(f"the adapter {folder} does not fit its base model, such as {wrong[:3]}")
    return cast(model.merge_and_unload().requires_grad_(True), dtype)


def cast(model, dtype):
    """Casts the weights in place; not the buffers: rotary frequencies stay float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def save_model(model, tokenizer, folder, stop_ids):
    """Writes a folder for from_pretrained.

    generation_config.json is the one that the model came with, but stops at stop_ids.
    """
    with explaining(f"cannot write {folder}"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    generation_config = model.own_generation_config
    generation_config.eos_token_id = stop_ids
    path = folder / "generation_config.json"
    path.write_text(generation_config.to_json_string())  # save_pretrained refuses some of the hub's
    for path in folder.rglob("*"):  # some tokenizers write a folder of chat templates
        if path.is_file():
            sync(path)


def load_config(name, role):
    """The config of a model; an adapter has its base model's."""
    if name == "demo":
        return demo_config(role)
    # generate() fails in models that also return their routers' logits.
    config = transformers.AutoConfig.from_pretrained(
        base_of(name) or name, output_router_logits=False
    )
    family = config.get_text_config(decoder=True).model_type
    if family in UNSUPPORTED.split():
        raise UserError(f"the {role} {name} is a {family}, which okd cannot use")
    return config


def demo_config(role):
    """GPT-2 over 256 bytes and an end token."""
    width, num_layers = (128, 3) if role == "teacher" else (64, 2)
    return transformers.GPT2Config(
        vocab_size=257,
        n_positions=256,
        n_embd=width,
        n_layer=num_layers,
        n_head=4,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def empty_model(name, role, rows, tokenizer, max_length):
    """A model without its weights. Raises UserError where okd cannot use it for these rows."""
    with explaining(f"cannot use the {role} {name}: {WHERE_MODELS_ARE}"), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(load_config(name, role))
        blocks_of(model)
    positions = max_positions(model.config)
    if max_length > positions:
        raise UserError(f"--max-length {max_length}: the {role} has only {positions} positions")
    largest = max(max(row.prompt_ids + row.response_ids) for row in rows)
    if largest >= vocab_size(model):
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"token {token!r} of the data has number {largest}, but the {role} knows only "
            f"{vocab_size(model)}: resize its embeddings, or use the tokenizer that it came with"
        )
    return model


def max_positions(config):
    """Most tokens of prompt and response together; infinite where a family has no limit."""
    config = config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", math.inf)


def vocab_size(model):
    """Rows of the head, which may be more than the tokenizer's tokens."""
    return model.get_output_embeddings().weight.size(0)


def decoder_of(model):
    """The module from token ids to last hidden states: the one that holds the blocks.

    get_decoder() is another module for some families (Llama 4, ModernBERT).
    """
    model_type = model.config.get_text_config(decoder=True).model_type
    for module in model.modules():
        is_model = isinstance(module, transformers.PreTrainedModel)
        if is_model and module.config.model_type == model_type and module_lists(module):
            return module
    raise UserError(f"okd cannot train a {model_type}: it finds no decoder with a list of blocks")


def blocks_of(model):
    """The ModuleList of the decoder's blocks, the lowest first."""
    return max(module_lists(decoder_of(model)), key=len)


def module_lists(module):
    return [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]


class Decoded(BaseModelOutputWithPast):
    """A decoder's output. Whatever else a family's head reads (router logits, ...) is None."""

    def __getattr__(self, name):
        return None


def given_states(*_, inputs_embeds=None, **__):
    """A decoder's forward that returns the hidden states that it is given."""
    return Decoded(last_hidden_state=inputs_embeds)


def head_of(model):
    """What the model does after its decoder, as a module that shares the model's parameters.

    head(inputs_embeds=states[None], use_cache=False).logits is (1, n, V) for states (n, H). It is
    the family's own forward with a stand-in for the decoder, so that tied weights, scales and soft
    caps are right for every family. Only the modules on the path to the decoder are copied: it
    takes 0.1 ms, so every micro-batch makes its own, and none is stale after a resize or LoRA.
    """
    if isinstance(model, peft.PeftModel):  # its own forward takes no states for MPT
        model = model.get_base_model()  # LoRA never sits on the head
    decoder = decoder_of(model)
    path = next(path for path, module in model.named_modules() if module is decoder)
    head = shallow_copy(model)
    parent = head
    for name in path.split("."):
        child = shallow_copy(getattr(parent, name))
        # Heads call the decoder, or what is around it (Gemma 4: image features).
        if model.get_output_embeddings() not in child.modules():
            child.forward = given_states
        setattr(parent, name, child)
        parent = child
    return head


def shallow_copy(module):
    """A module with the same parameters and submodules, in which submodules can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


# --lora-targets auto: query and value, else what holds them fused, else the whole attention: the
# first of these that a module of the block matches.
AUTO_TARGETS = (
    r"\.(q_proj|q_b_proj|v_proj|kv_b_proj)$",
    r"\.(query|value)$",
    r"\.(c_attn|query_key_value|qkv_proj|Wqkv)$",
    r"\.(in_proj|in_proj_qkv|in_proj_qkvz)$",
    "attn|attention",
)
NO_LORA = r"expert|router|indexer|\.gate(\.|$)"


def lora_modules(model, targets, top_layers):
    """Full paths of the linear modules in the decoder's top blocks (0: all) that get LoRA.

    targets: "auto", "all-linear", or last names of modules with commas between them. Raises
    UserError where a name fits nothing.
    """
    blocks = blocks_of(model)
    if top_layers > len(blocks):
        raise UserError(f"--lora-top-layers {top_layers}: the model has only {len(blocks)} layers")
    paths = {module: path for path, module in model.named_modules()}
    chosen = []
    known = set()
    for block in blocks[-top_layers:]:
        linear = []
        for module in block.modules():
            path = paths[module]
            is_linear = isinstance(module, (torch.nn.Linear, transformers.Conv1D))
            if is_linear and not re.search(NO_LORA, path):
                linear.append(path)
                known.add(path.split(".")[-1])
        chosen += targets_of(linear, targets)
    unknown = {*targets.split(",")} - {"auto", "all-linear"} - known
    if unknown or not chosen:
        raise UserError(f"--lora-targets {targets}: name some of {sorted(known)}")
    return chosen


def targets_of(paths, targets):
    """Of the paths of one block's linear modules those that --lora-targets means."""
    names = "|".join(re.escape(name) for name in targets.split(","))
    patterns = [rf"\.({names})$"]
    if targets == "auto":
        patterns = AUTO_TARGETS
    if targets == "all-linear":
        patterns = [""]
    for pattern in patterns:
        chosen = [path for path in paths if re.search(pattern, path)]
        if chosen:
            return chosen
    return []


def add_lora(model, rank, scale, targets="auto", top_layers=0, seed=0):
    """Eq. 15: LoRA on the linear modules that `targets` names. B starts at 0, so that p_f = p_0."""
    paths = lora_modules(model, targets, top_layers)
    torch.manual_seed(seed)
    with explaining(f"--lora-targets {targets} does not fit"):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=scale * rank, target_modules=paths
        )
        model = peft.get_peft_model(model, config)
    modules = model.get_base_model().named_modules()
    # In a family with experts, peft reads a name such as up_proj as that of the experts.
    wrong = {path for path, module in modules if hasattr(module, "lora_A")} ^ set(paths)
    if wrong:
        raise UserError(f"--lora-targets {targets}: peft reads it otherwise at {sorted(wrong)[:3]}")
    return model.eval()


# -----------------------------------------------------------------------------
# Warm start: teacher and student first learn the gold text, once for all runs


WARM_START_BATCH = 32  # its recipe is fixed but for epochs and learning rate


def warm_start(args, role, source, data, epochs, lr, hw):
    """Fine-tune the model at `source` on gold text. Returns (folder it is kept in, seconds).

    What is kept depends on model, rows, epochs, learning rate and precision. The rest of the recipe
    is fixed, so that no flag that differs between methods changes the teacher or the start. Raises
    UserError when the fine-tuned weights are not finite.
    """
    if epochs == 0:
        return source, 0.0
    # The demo's teacher begins with random weights, which LoRA could not train.
    use_lora = role == "teacher" and args.teacher_sft == "lora" and source != "demo"
    recipe = [role, fingerprint(source), epochs, lr, str(hw.dtype), hw.device.type, use_lora]
    recipe += [ids_of(data.train), torch.__version__, transformers.__version__]
    cache = Path(args.cache_dir)
    folder = cache / f"{role}-{Path(source).name}-{digest(recipe)}"
    work_dir = Path(args.output_dir) / folder.name
    if hw.gather(folder.exists())[0]:
        (work_dir / "checkpoint.pt").unlink(missing_ok=True)  # another run was faster
        print(f"{role}: fine-tuned before, kept in {folder}")
        return str(folder), read_json(folder / "warm_start.json")["seconds"]

    with explaining(f"--cache-dir {cache} cannot be written: choose another"):
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    sft_args = replace(
        args,
        **asdict(METHODS["sft"]),
        epochs=epochs,
        lr=lr,
        batch_size=WARM_START_BATCH,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=0,
        eval_rows=0,
        seed=0,
    )
    if use_lora:
        model = add_lora(load_model(source, role, hw.dtype), rank=32, scale=1.0)
        if args.shard:
            shard_blocks(model, hw)
    else:
        model = load_model(source, role, torch.float32)
    model = model.to(hw.device)
    state = train(sft_args, TrainState(), model, None, data, hw, work_dir, phase=f"{role}_sft")

    if hw.rank == 0:
        # In a temporary folder of the cache: a rename is atomic, and the first to finish wins.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as temporary:
            temporary = Path(temporary)
            if use_lora:
                model.save_pretrained(temporary / "adapter")
                base = load_model(source, role, torch.float32)
                model = merge_adapter(base, temporary / "adapter", hw.dtype)
            if not all(p.isfinite().all() for p in model.parameters()):
                raise UserError(f"{role}: the fine-tuned weights are not finite; they are not kept")
            save_model(model, data.tokenizer, temporary / "model", data.stop_ids)
            seconds = json.dumps({"seconds": state.seconds})
            (temporary / "model" / "warm_start.json").write_text(seconds)
            with contextlib.suppress(OSError):  # another run was first
                (temporary / "model").rename(folder)
        (work_dir / "checkpoint.pt").unlink()
    hw.barrier()
    return str(folder), state.seconds


def ids_of(rows):
    return [[row.prompt_ids, row.response_ids] for row in rows]


def identity(teacher, student, rows):
    """Digests of two models and of rows, the same for copies on another machine."""
    return {
        "teacher": digest(fingerprint(teacher)),
        "student": digest(fingerprint(student)),
        "rows": digest(ids_of(rows)),
    }


def digest(value):
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(source):
    """What identifies a model: the contents of its files, or a hub id with its commit."""
    folder = Path(source)
    if source == "demo":
        return [source]
    base = base_of(source)
    stamps = []
    if not folder.is_dir():
        name = "adapter_config.json" if base else "config.json"
        file = huggingface_hub.hf_hub_download(source, name)
        stamps = [source, Path(file).parent.name]  # snapshots/COMMIT/config.json
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.name not in ("results.json", "README.md", "warm_start.json"):
            stamps.append([path.name, file_digest(path, path.stat().st_mtime_ns)])
    if base:
        stamps += fingerprint(base)
    return stamps


@functools.cache
def file_digest(path, time_changed):
    """Read once in a process, unless the file has changed since."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# Processes and disk

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Hardware:
    """The device, the precision, and this process among those that torchrun started."""

    device: torch.device
    dtype: torch.dtype  # of autocast and of frozen weights
    rank: int = 0
    world: int = 1

    def autocast(self, enabled=True):
        enabled = enabled and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def total(self, sums):
        """{name: scalar tensor} of this process -> summed over all, which have the same names."""
        totals = torch.stack([*sums.values()])
        if self.world > 1:
            dist.all_reduce(totals)
        return dict(zip(sums, totals, strict=True))

    def gather(self, value):
        """The values of all processes, in every process. All wait for the last one."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self):
        self.gather(None)

    def now(self):
        """Seconds, once the device has done all its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def peak_memory(self):
        """{metric: GB}: on CUDA the allocator's since distillation began, else the process's."""
        if self.device.type == "cuda":
            return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"process_peak_gb": peak / 1e9}


def pick_hardware(device="auto", precision="auto"):
    """Flags -> Hardware. Raises UserError for a device that cannot be used."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    name = device
    if device == "auto":
        name = getattr(torch.accelerator.current_accelerator(True), "type", "cpu")
    if world > 1 and name.startswith("cuda"):  # a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explaining(f"--device {device} cannot be used here"):
        torch_device = torch.empty(1, device=name).device  # with an index
        on_gpu = torch_device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(torch_device)
            # --precision fp32 means no TF32
            torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
            torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if precision == "auto":
        precision = fast_precision(torch_device)
    skip_input_checks()
    if torch_device.type == "cpu":
        transformers.AttentionInterface.register("sdpa", attention_on_cpu)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    rank = int(os.environ.get("RANK", 0))
    return Hardware(torch_device, PRECISIONS[precision], rank, world)


def skip_input_checks():
    """In every forward pass transformers would read tensors back from the device.

    It looks for packed rows, which do not exist here, and for padding, which is on the right and
    never seen.
    """
    transformers.masking_utils.find_packed_sequence_indices = no_check
    transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask = no_check


def no_check(*_):
    return None


def attention_on_cpu(module, query, key, value, attention_mask, **options):
    """In float32 where there is a backward pass, which in bf16 takes 2 to 4 times as long."""
    if not query.requires_grad:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast("cpu", enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(value.dtype), weights


def fast_precision(device):
    """bf16 where it is fast, else fp16 on CUDA and fp32 elsewhere.

    On a CPU bf16 takes a sixth of float32's time with AMX, half of it with AVX-512's bf16, and ten
    times it with neither.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if units.get("amx_bf16") or units.get("avx512_bf16") else "fp32"


def shard_blocks(model, hw):
    """Split the frozen weights of a teacher's blocks over the processes (FSDP2).

    They are whole while their block runs. LoRA stays as it is, for optimizer and checkpoints.
    """
    mesh = init_device_mesh(hw.device.type, (hw.world,))
    for block in blocks_of(model):
        trainable = {p for p in block.parameters() if p.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trainable)


@contextlib.contextmanager
def whole_file(path):
    """A file to write that gets its name when all of it is on the disk: never half there."""
    temporary = path.with_name(f"{path.name}.tmp")  # a run's folder belongs to one run
    try:
        with explaining(f"cannot write {path}"):
            with open(temporary, "wb") as file:
                yield file
            sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, text):
    with whole_file(path) as file:
        file.write(text.encode())


def read_json(path):
    return json.loads(path.read_text())


def sync(path):
    """Force a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def out_of_memory(error):
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


@contextlib.contextmanager
def explaining(what):
    """Turns any error inside, but running out of memory, into a UserError that begins with what."""
    try:
        yield
    except Exception as error:  # models, templates and libraries raise errors of any type
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} ({message[:200]})") from error


@contextlib.contextmanager
def one_line_errors(program):
    """What the user can fix, or a disk or device refuses, is one line, and exit code 2."""
    signal.signal(signal.SIGTERM, exit_on_signal)  # so that temporary files are removed
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        hint = ""
        if dist.is_initialized() and "by peer" in str(error):
            sys.exit(2)  # the connection to another process broke, which says why
        if out_of_memory(error):
            hint = "out of memory: lower --micro-batch-tokens or --sample-batch-size: "
        elif not isinstance(error, (UserError, OSError)):
            raise
        message = " ".join(str(error).split())
        print(f"{program}: {hint}{message[:400]}", file=sys.stderr)
        sys.exit(2)


def exit_on_signal(number, frame):
    sys.exit(128 + number)


# -----------------------------------------------------------------------------
# main


def distil(args):
    """The whole job. Raises UserError."""
    hw = pick_hardware(args.device, args.precision)
    if hw.rank > 0:  # only the first process prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    if args.shard and (hw.world == 1 or args.text == "mixture" or args.teacher_sft == "full"):
        raise UserError(
            "--shard needs several processes (torchrun), --teacher-sft lora and a --text other "
            "than mixture"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|fan_in_fan_out)")
    data, record = prepare(args, hw)
    run_dir = open_folder(args, record, data, hw)
    wandb_run = None
    if args.track and hw.rank == 0:
        wandb_run = start_wandb(record, run_dir)

    models = warm_starts(args, data, hw, run_dir)
    teacher, student = load_networks(args, models, hw)
    state = TrainState(phi=args.sgo_fraction)
    test_rows = data.test[: args.score_rows]
    rouge_l = {}
    if test_rows:
        rouge_l["rouge_l_teacher"] = score(args, teacher, test_rows, data, hw)
        rouge_l["rouge_l_start"] = score(args, student, test_rows, data, hw)
    if hw.device.type == "cuda":  # the peak is then that of the method
        torch.cuda.reset_peak_memory_stats()
    if args.text == "teacher":
        data.train = teacher_text(args, state, teacher, data, hw, run_dir)
    if args.cache_teacher:
        start = hw.now()
        cache_states(teacher, data.train + data.dev[: args.eval_rows], hw)
        state.seconds += hw.now() - start
    state = train(args, state, student, teacher, data, hw, run_dir, wandb_run=wandb_run)

    # Saved, and so scored, in the dtype that the student was published in.
    student = cast(student, load_config(args.student, "student").dtype or torch.float32)
    if test_rows:
        rouge_l["rouge_l"] = score(args, student, test_rows, data, hw)
    if hw.rank == 0:
        final = final_metrics(state, rouge_l, hw)
        finish(args, record, models, final, student, teacher, data, run_dir, wandb_run)
    hw.barrier()  # no process ends before the student is saved


def prepare(args, hw):
    """Tokenizer, rows and all checks that need no weights: before hours of training, not after.

    Returns (data, the content of args.json). Raises UserError when a model cannot take
    the rows, or when a resumed run finds other models, rows or processes than it began with.
    """
    tokenizer = one_tokenizer(load_tokenizer(args.teacher), load_tokenizer(args.student))
    data = load_data(args.teacher, args.data, tokenizer, args.max_prompt_length, args.max_length)
    rows = data.train + data.dev + data.test
    print(f"train, dev, test: {len(data.train)}, {len(data.dev)}, {len(data.test)} rows")
    sizes = [args.batch_size]
    if args.teacher_sft_epochs + args.student_sft_epochs > 0:
        sizes.append(WARM_START_BATCH)
    for size in sizes:
        if min(size, len(data.train)) % hw.world > 0:
            raise UserError(f"{hw.world} processes cannot share batches of {size} rows")
    if args.text == "adaptive" and not data.dev[: args.eval_rows]:
        raise UserError("--text adaptive needs --eval-rows: phi depends on the evaluations")
    empty_model(args.student, "student", rows, tokenizer, args.max_length)
    teacher = empty_model(args.teacher, "teacher", rows, tokenizer, args.max_length)
    if args.teacher_sft == "lora" and args.teacher_sft_epochs > 0:
        lora_modules(teacher, "auto", 0)
    if args.teacher_moves:
        lora_modules(teacher, args.lora_targets, args.lora_top_layers)

    began_with = {
        **identity(args.teacher, args.student, rows),
        "processes": hw.world,
        "precision": next(name for name in PRECISIONS if PRECISIONS[name] == hw.dtype),
    }
    if args.resume:
        record = read_json(Path(args.resume, "args.json"))
        require_same(record["began_with"], began_with, args.resume)
        return data, record
    if args.output_dir is None:
        models = f"{Path(args.student).name}-{Path(args.teacher).name}"
        stamp = f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        args.output_dir = hw.gather(f"runs/{args.method}-{models}-s{args.seed}-{stamp}")[0]
    record = {
        "label": run_label(args),
        "command": shlex.join(["python", *sys.argv]),
        "wandb_id": secrets.token_hex(8),
        "began_with": began_with,
        **asdict(args),
    }
    return data, record


def open_folder(args, record, data, hw):
    """The run's folder: a new one, so that two runs never share it, or that of --resume."""
    folder = Path(args.output_dir)
    if hw.rank > 0:  # warm_starts waits for the first process
        return folder
    if not args.resume:
        with explaining(f"choose another --output-dir, or --resume {folder}"):
            folder.mkdir(parents=True)
        if data.test_lines:
            write_file(folder / "test.jsonl", "\n".join(data.test_lines) + "\n")
        write_file(folder / "args.json", json.dumps(record, indent=2) + "\n")
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)  # open until the process ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is running in {folder}") from None
    except OSError:
        print(f"{folder} is on a file system without locks: run it in one process only")
    if (folder / "student").exists():
        raise UserError(f"--resume {folder}: this run has ended")
    return folder


def require_same(stored, found, run_dir):
    """Raises UserError when a resumed run would not be the run that began."""
    for name, value in found.items():
        if stored[name] != value:
            raise UserError(
                f"{run_dir}: {name} changed since the run began (then {stored[name]}, now "
                f"{value}): restore what it began with, or begin another run"
            )


def start_wandb(record, run_dir):
    """A group is a method with its settings, so that its runs are the seeds. Raises UserError."""
    hint = f"--resume {run_dir} with WANDB_MODE=offline or --no-track"
    with explaining(f"wandb cannot start; continue with {hint}"):
        import wandb  # only tracked runs need it

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "okd"),
            id=record["wandb_id"],
            name=run_dir.name,
            group=record["label"],
            job_type="train",
            config=record,
            save_code=True,
            resume="allow",
            dir=run_dir,
        )


def warm_starts(args, data, hw, run_dir):
    """Fine-tunes teacher and student, or finds them in the cache. Returns models.json's content.

    A resumed run has the models that it began with; raises UserError when they are gone.
    """
    path = run_dir / "models.json"
    if hw.gather(path.exists())[0]:
        models = read_json(path)
        with explaining(f"{run_dir}: a fine-tuned model that this run began with is gone"):
            found = identity(models["teacher"], models["student"], data.train)
        require_same(models["problem"], found, run_dir)
        return models

    teacher = args.teacher
    if teacher == "demo":  # it learns from more rows than the student will see
        pretraining = replace(data, train=data.pretraining)
        teacher, _ = warm_start(args, "teacher", teacher, pretraining, 8, 1e-3, hw)
    teacher, teacher_seconds = warm_start(
        args, "teacher", teacher, data, args.teacher_sft_epochs, args.teacher_sft_lr, hw
    )
    student, student_seconds = warm_start(
        args, "student", args.student, data, args.student_sft_epochs, args.student_sft_lr, hw
    )
    models = {
        "teacher": teacher,
        "teacher_seconds": teacher_seconds,
        "student": student,
        "student_seconds": student_seconds,
        "problem": {  # two runs can be compared when these agree
            **identity(teacher, student, data.train),
            "test": digest(ids_of(data.test)),
            "max_length": args.max_length,
            "max_new_tokens": args.max_new_tokens,
        },
    }
    if hw.rank == 0:
        write_file(path, json.dumps(models, indent=2) + "\n")
    return models


def load_networks(args, models, hw):
    """(teacher, student) on the device: the teacher frozen, with its online module if it moves."""
    teacher = load_model(models["teacher"], "teacher", hw.dtype).requires_grad_(False)
    student = load_model(models["student"], "student", torch.float32)
    size = min(vocab_size(teacher), vocab_size(student))
    for model in (teacher, student):  # a family may pad its vocabulary to several sizes
        if vocab_size(model) > size:
            print(f"a head of {vocab_size(model)} rows is cut to the {size} that both models have")
            model.resize_token_embeddings(size)
    if args.teacher_moves:
        teacher = add_lora(
            teacher,
            args.lora_rank,
            args.lora_scale,
            args.lora_targets,
            args.lora_top_layers,
            args.seed,
        )
    if args.shard:
        shard_blocks(teacher, hw)
    return teacher.to(hw.device), student.to(hw.device)


def final_metrics(state, rouge_l, hw):
    """The last record of metrics.jsonl; what was not measured is left out."""
    final = {
        "steps": state.step,
        "distil_s": state.seconds,
        "sampling_s": state.sampling_seconds,
        "tokens_per_s": state.tokens / state.seconds,
        **hw.peak_memory(),
        **rouge_l,
    }
    for prefix, record in (("start_dev_", state.first_eval), ("dev_", state.best_eval)):
        for name, value in (record or {}).items():
            final[prefix + name] = value
    return final


def finish(args, record, models, final, student, teacher, data, run_dir, wandb_run):
    """Save what the run leaves, then print its table. wandb comes last, since it may fail."""
    if args.teacher_moves:
        save_adapter(teacher, models["teacher"], data.tokenizer, run_dir / "teacher_lora")
    last_record = write_record(run_dir / "metrics.jsonl", "final", final["steps"], "final", final)
    temporary = run_dir / "student.tmp"
    save_model(student, data.tokenizer, temporary, data.stop_ids)
    (temporary / "README.md").write_text(model_card(args, record, models, final))
    temporary.rename(run_dir / "student")  # a run with a student has ended
    (run_dir / "checkpoint.pt").unlink()

    numbers = {**models, **final}
    print_table(args.method, args.teacher_moves, numbers)
    print(f"run: {run_dir}")
    if wandb_run is not None:
        try:
            wandb_run.summary.update(last_record)
            wandb_run.finish()
        except Exception as error:
            print(f"wandb failed, the run is in {run_dir}: {error}", file=sys.stderr)


def print_table(method, teacher_moves, numbers):
    """The numbers that have been measured, one row for each network."""
    rows = [
        ("teacher", "rouge_l_teacher dev_frozen_teacher_ce - teacher_seconds"),
        ("student, start", "rouge_l_start start_dev_student_ce start_dev_fkl student_seconds"),
        (f"student, {method}", "rouge_l dev_student_ce dev_fkl distil_s"),
    ]
    if teacher_moves:
        rows.insert(1, ("teacher, adapted", "- dev_teacher_ce dev_drift -"))
    print(f"\n{'':20}{'Rouge-L':>10}{'dev CE':>10}{'dev KL':>10}{'seconds':>10}")
    for title, names in rows:
        line = f"{title:20}"
        for name in names.split():
            line += f"{numbers[name]:10.3f}" if name in numbers else f"{'-':>10}"
        print(line)


def save_adapter(teacher, base, tokenizer, folder):
    """The online module as a PEFT adapter. It names its base so that it loads from anywhere."""
    if os.path.isdir(base):
        base = os.path.abspath(base)
    teacher.peft_config["default"].base_model_name_or_path = base
    teacher.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlibrary_name: peft\n---\n\nThe online module of a teacher, trained with okd.py. "
        f"Its base is the fine-tuned teacher, {base}.\n"
    )


def model_card(args, record, models, final):
    """README.md of the student, with the metadata that the hub reads."""
    data = args.data or ("the demo's" if args.teacher == "demo" else "Dolly")
    base = ""
    if not os.path.isdir(args.student):  # the hub refuses other names than its own
        base = f"base_model: {args.student}\n"
    scores = "\n".join(f"- {name}: {value:.6g}" for name, value in final.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [knowledge-distillation, okd]
---

# {args.student}, distilled

- method: {record["label"]}
- teacher: {args.teacher}, fine-tuned: {models["teacher"]}
- data: {data}
- command: `{record["command"]}`
{scores}
"""


def main(argv=None):
    code = 0
    try:
        with one_line_errors("okd.py"):
            distil(parse_args(sys.argv[1:] if argv is None else argv))
    except SystemExit as error:
        if not dist.is_initialized():
            raise
        code = error.code
    if dist.is_initialized():
        # Without Python's own end: a thread of gloo that then asks for the interpreter aborts the
        # process, and NCCL may wait for processes that have failed.
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
