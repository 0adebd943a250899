"""Online Knowledge Distillation (OKD) for autoregressive language models, in one file.

    python okd.py                                     # built-in demo: no network, no GPU, no data file
    python okd.py --teacher gpt2-xl --student gpt2    # the real job; --method fkl, gkd, ...: a baseline, all else alike
    python okd.py --resume runs/NAME                  # go on with a run that was stopped or killed
    torchrun --nproc-per-node=4 okd.py --teacher ...  # data parallel; --shard splits a teacher too large for one device

A frozen teacher carries a small LoRA *online module*. Student and module train at the same time, on the same batch,
from one forward pass of each network. Per response token, with p_f the teacher with its module and p_0 without, q the
student, y the gold token and sg the stop-gradient:

    student   L_S = (1 - a) D(sg[p_f], q) + a CE(q, y)                                   eq. 17: a = 0, D = KL(p_f || q)
    teacher   L_T = alpha KL(sg[q] || p_f) + (1 - alpha) CE(p_f, y) + mu KL(p_0 || p_f)  eq. 16: mu = 0

It follows Rao et al. 2024 (arXiv:2409.12512v2), equations 15 to 17 and Algorithm 1. Not stated there and chosen here:
alpha, the module's scale, the temperature, the learning rates. Ours, and off by default: a, another D, the anchor mu.
Every baseline is a row of one table and trains in the same loop; where one leaves its paper, the line there says so.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple
from unittest import mock

import huggingface_hub
import peft
import torch
import torch.distributed as dist
import transformers
import tyro
from rouge_score.rouge_scorer import RougeScorer
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# Divergences ----------------------------------------------------------------------------------------------------------
# p is the teacher, q the student: two (..., V) float32 log-probabilities in, one number per token (...) out.
# Mixtures are taken in log space: through probabilities a sharp distribution gives 0 * -inf.


def fkl(log_p, log_q):
    """KL(p || q) = sum_v p_v (log p_v - log q_v): q must cover all that p does. Hinton et al. 2015, arXiv:1503.02531.
    With the entropy of p, which published code drops: its gradient is 0 for a frozen teacher, not for a moving one."""
    return 0 - (log_p.exp() * (log_q - log_p)).sum(-1)  # this way round the gradient of q is not copied to negate it


def rkl(log_p, log_q):
    """KL(q || p): q may settle on one mode of p. Gu et al. 2023 (MiniLLM), arXiv:2306.08543."""
    return fkl(log_q, log_p)


def frkl(log_p, log_q):
    """(KL(p || q) + KL(q || p)) / 2: the fixed form of what AKL adapts. Wu et al. 2024, arXiv:2404.02657."""
    return (fkl(log_p, log_q) + rkl(log_p, log_q)) / 2


def mix(log_p, log_q, share):
    """log(share p + (1 - share) q), for 0 < share < 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jsd(log_p, log_q, beta=0.5):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; fkl at beta = 0, rkl at 1. Bounded where they
    are not. Agarwal et al. 2023 (GKD), arXiv:2306.13649, eq. 1."""
    if beta in (0, 1):
        return rkl(log_p, log_q) if beta else fkl(log_p, log_q)
    log_m = mix(log_p, log_q, beta)
    return beta * fkl(log_p, log_m) + (1 - beta) * fkl(log_q, log_m)


def tvd(log_p, log_q):
    """1/2 sum |p - q|: the mass that has to move; symmetric, at most 1. Wen et al. 2023, arXiv:2307.15190."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def sfkl(log_p, log_q, skew=0.1):
    """KL(p || skew p + (1 - skew) q): fkl that a zero of q cannot blow up. Ko et al. 2024, arXiv:2402.03898."""
    return fkl(log_p, mix(log_p, log_q, skew) if skew else log_q)


def srkl(log_p, log_q, skew=0.1):
    """KL(q || (1 - skew) p + skew q): rkl that a zero of p cannot blow up. Ko et al. 2024, arXiv:2402.03898."""
    return sfkl(log_q, log_p, skew)


def akl(log_p, log_q, mu=0.5):
    """fkl and rkl weighted by the gap sum |p - q| in head and tail of p: fkl mends heads, rkl tails. Head: the smallest
    set of p's likeliest tokens with mass >= mu (the authors' file: < mu). Wu et al. 2024, arXiv:2404.02657."""
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < mu
        share = (gap * in_head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * fkl(log_p, log_q) + (1 - share) * rkl(log_p, log_q)


def ab(log_p, log_q, alpha=0.2, beta=0.7):
    """-1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)] and
    its limits: (1, 0) is fkl, (0, 1) rkl. Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011."""
    if alpha == 0:
        log_p, log_q, alpha, beta = log_q, log_p, beta, alpha
    if beta == 0:
        p_power, q_power = (alpha * log_p).exp(), (alpha * log_q).exp()
        return (p_power * (alpha * (log_p - log_q)) - p_power + q_power).sum(-1) / alpha**2
    total, cross = alpha + beta, (alpha * log_p + beta * log_q).exp()
    powers = alpha * (total * log_p).exp() + beta * (total * log_q).exp()
    return (powers / total - cross).sum(-1) / (alpha * beta)


def taid(log_p, log_q, t):
    """CE to softmax((1 - t) sg[z_q] + t z_p), which walks from q to p. Shing et al. 2025, arXiv:2501.16937, eq. 3."""
    return -(torch.lerp(log_q.detach(), log_p, t).softmax(-1) * log_q).sum(-1)


def taid_step(scalars, loss, progress, start=0.4, end=1.0, delta=5e-4, momentum=0.99):
    """t moves at least linearly, and faster while the loss falls (TAID, algorithm 1). On the device, no wait."""
    before, loss = scalars["taid_loss"], torch.where(loss.isfinite(), loss, scalars["taid_loss"])  # else: skipped step
    relative = ((before - loss) / (before + 1e-15)).nan_to_num(0.0)  # first step, from infinity: no change yet
    scalars["taid_momentum"] = momentum * scalars["taid_momentum"] + (1 - momentum) * relative
    faster = scalars["taid_t"] + delta * scalars["taid_momentum"].sigmoid() * (1 - scalars["taid_t"])
    scalars |= dict(taid_t=faster.clamp(min=start + (end - start) * progress, max=end), taid_loss=loss)


DIVERGENCES = dict(fkl=fkl, rkl=rkl, frkl=frkl, jsd=jsd, tvd=tvd, sfkl=sfkl, srkl=srkl, akl=akl, ab=ab, taid=taid)

# The method table: a method = a divergence x whose text it is measured on x whether the teacher moves -----------------

Method = functools.partial(dict, text="data", teacher_moves=False, student_ce_weight=0.0, sgo_fraction=0.0)
METHODS = {
    "sft": Method(divergence="fkl", student_ce_weight=1.0),  # cross-entropy on the gold text, no teacher
    **{name: Method(divergence=name) for name in DIVERGENCES},  # fkl, rkl, ..., taid: on gold text, a frozen teacher
    "seqkd": Method(divergence="fkl", text="teacher", student_ce_weight=1.0),  # Kim & Rush 2016, arXiv:1606.07947
    "imitkd": Method(divergence="fkl", text="student", sgo_fraction=1.0),  # Lin et al. 2020, arXiv:2009.07253
    "gkd": Method(divergence="jsd", text="student", sgo_fraction=0.5),  # Agarwal et al. 2023, arXiv:2306.13649
    "opd": Method(divergence="rkl", text="student", sgo_fraction=1.0),  # on-policy distillation, as used since 2025
    "distillm": Method(divergence="srkl", text="adaptive"),  # Ko et al. 2024, arXiv:2402.03898
    "minillm": Method(divergence="rkl", text="mixture"),  # Gu et al. 2023, arXiv:2306.08543
    "okd": Method(divergence="fkl", teacher_moves=True),  # Rao et al. 2024, arXiv:2409.12512
}

# The losses, per token ------------------------------------------------------------------------------------------------

cross_entropy = functools.partial(torch.nn.functional.nll_loss, reduction="none")  # of (N, V) log q, (N,) tokens
at_temperature = lambda log_p, temperature: log_p if temperature == 1 else (log_p / temperature).log_softmax(-1)


def student_loss(log_p, log_q, labels, divergence, ce_weight, rollout=()):
    """L_S, (N,): eq. 17 for ce_weight 0 and fkl. Nothing flows into the teacher. Rollouts add their policy gradient."""
    loss = (1 - ce_weight) * divergence(log_p.detach(), log_q) if ce_weight < 1 else 0
    if ce_weight > 0:
        loss = loss + ce_weight * cross_entropy(log_q, labels)
    if len(rollout):
        loss = loss + policy_loss(log_q, labels, *rollout.unbind(1))
    return loss


def teacher_loss(log_p, log_q, log_p0, labels, alpha, anchor=0.0, temperature=1.0):
    """L_T, (N,): eq. 16, and the anchor. Nothing flows into the student, nor into p_0. For a fixed q the best p_f is
    ((1 - alpha) y + alpha q + anchor p_0) / (1 + anchor): the module leans to what the student can follow."""
    loss, log_p = (1 - alpha) * cross_entropy(log_p, labels), at_temperature(log_p, temperature)
    if alpha > 0:
        loss = loss + alpha * temperature**2 * fkl(at_temperature(log_q.detach(), temperature), log_p)
    if anchor > 0:
        loss = loss + anchor * temperature**2 * fkl(at_temperature(log_p0.detach(), temperature), log_p)
    return loss


def policy_loss(log_q, labels, advantage, sampled_log_q, weight, clip=0.2):
    """Clipped policy gradient of MiniLLM: the ratio q / q_when_sampled times the importance weight
    q / (share p + (1 - share) q) of the mixture that the token was drawn from. arXiv:2306.08543, eq. 5, algorithm 1."""
    ratio = (-cross_entropy(log_q, labels) - sampled_log_q).exp() * weight
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def bound_divergence(args, taid_t):
    """Flags -> temperature^2 D(p, q at temperature). The square keeps the gradient's size (Hinton et al. 2015)."""
    own = dict(jsd=[args.beta], sfkl=[args.skew], srkl=[args.skew], ab=[args.ab_alpha, args.ab_beta], taid=[taid_t])
    own, heat = own.get(args.divergence, []), functools.partial(at_temperature, temperature=args.temperature)
    return lambda log_p, log_q: args.temperature**2 * DIVERGENCES[args.divergence](heat(log_p), heat(log_q), *own)


@torch.no_grad()
def measure(log_p, log_q, log_p0, labels, *_):
    """What every method reports, whatever it trains on, each (N,). Entropies and KLs in nats."""
    return dict(
        fkl=fkl(log_p0, log_q),  # to the frozen teacher p_0, also when the teacher moves
        rkl=rkl(log_p0, log_q),
        student_ce=cross_entropy(log_q, labels),
        teacher_ce=cross_entropy(log_p, labels),
        student_entropy=-(log_q.exp() * log_q).sum(-1),
        teacher_entropy=-(log_p.exp() * log_p).sum(-1),
        top1_agreement=(log_p0.argmax(-1) == log_q.argmax(-1)).float(),
        drift=fkl(log_p0, log_p),  # of the module
    )


# Flags: the comment beside one, or right above it, is its --help ------------------------------------------------------


@dataclass
class Args:
    """Online knowledge distillation (Rao et al. 2024, arXiv:2409.12512v2, equations 15 to 17) and its baselines."""

    # -- models and data --
    teacher: str = "gpt2-xl"  # hub id or local folder; without this flag the built-in demo runs, by flags of its own
    student: str = "gpt2"  # hub id or local folder; needs the teacher's tokens
    data: str | None = None  # JSONL of training rows, as `read_row` reads them; unset: Dolly from the hub
    max_length: int = 512  # tokens of prompt + response; a longer response is cut
    max_prompt_length: int = 256  # rows with a longer prompt are dropped
    max_new_tokens: int = 256  # longest answer, when sampling and when scoring
    trust_remote_code: bool = False  # run code that a model repository brings along
    teacher_quant: Literal["8bit", "4bit"] | None = None  # the frozen teacher's weights; needs bitsandbytes
    # -- the method: a row of the table, and what overrides its columns --
    method: Literal[tuple(METHODS)] = "okd"  # row of the method table
    divergence: Literal[tuple(DIVERGENCES)] | None = None  # D in L_S
    # whose: data (gold), teacher, student, adaptive (DistiLLM: gold, fresh or replayed), mixture (MiniLLM's rollouts)
    text: Literal["data", "teacher", "student", "adaptive", "mixture"] | None = None
    teacher_moves: bool | None = None  # whether the teacher's online module trains
    student_ce_weight: float | None = None  # a in L_S: 1 is the text alone, whose next token is y; not for its own text
    sgo_fraction: float | None = None  # student: probability that a batch is student text; adaptive: start of phi
    sgo_source: Literal["fresh", "replay"] = "fresh"  # student: the answers just written, or a draw from a buffer
    rollouts: int = 256  # mixture: rows sampled at a time
    temperature: float = 1.0  # softens p and q in the divergences of both losses; touches neither CE nor sampling
    beta: float = 0.5  # jsd: the teacher's share of the mixture; near 0 it acts like fkl, near 1 like rkl
    skew: float = 0.1  # sfkl, srkl: how much of the one distribution is mixed into the other
    ab_alpha: float = 0.2  # ab: exponent of p; (alpha, beta) = (1, 0) is fkl, (0, 1) is rkl
    ab_beta: float = 0.7  # ab: exponent of q
    # -- the online module --
    alpha: float = 0.5  # alpha in L_T: pull of the student; 1 - alpha: of the text, whose next token is y
    anchor: float = 0.0  # mu in L_T, ours: pull back to p_0, the teacher with its module switched off
    teacher_lr_ratio: float = 1.0  # learning rate of the module / of the student; the paper has one for both
    lora_rank: int = 32  # of the module, and of the teacher's fine-tuning with --teacher-sft lora
    lora_scale: float = 1.0  # s in eq. 15; peft's lora_alpha is this times the rank
    lora_targets: str = "auto"  # auto: query and value, by peft's table; all-linear; or names: q_proj,v_proj,o_proj
    lora_top_layers: int = 0  # the module on the top k blocks alone, which is cheaper; 0: on all
    cache_teacher: bool = False  # keep the teacher's states on disk (`with_states`): changes speed and no number
    # -- warm start: both learn the gold text first, once for all runs, so that ten methods start from the same bits --
    teacher_sft: Literal["lora", "full"] = "lora"  # LoRA merged into the weights, or all weights
    teacher_sft_epochs: float = 3  # 0 when the teacher is fine-tuned already
    teacher_sft_lr: float = 2e-4  # peak learning rate
    student_sft_epochs: float = 3  # 0 when the student is fine-tuned already
    student_sft_lr: float = 1e-4  # peak learning rate
    cache_dir: str = "runs/.cache"  # where they, and what --cache-teacher keeps, are found again
    # -- optimization --
    epochs: float = 20  # passes of the distillation over the data
    max_steps: int = 0  # at most so many optimizer steps in each training, for tries; 0: no limit
    batch_size: int = 32  # rows of an optimizer step, over all micro-batches and processes; the paper's grid: 8, 16, 32
    micro_batch_tokens: int = 4096  # most at once, padding included; changes memory and speed, never the loss
    sample_batch_size: int = 128  # prompts answered at once, when sampling and when scoring
    lr: float = 1e-4  # student's peak learning rate; the paper's grid up to 1B parameters: 5e-4, 1e-4, 5e-5
    weight_decay: float = 0.0  # AdamW's, not on biases and norms
    max_grad_norm: float = 1.0  # gradient clipping, each network by itself; 0 turns it off
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    # -- the run --
    seed: int = 1  # order of the data, sampled text, dropout, the module's start
    output_dir: str | None = None  # the run's own folder; unset: runs/METHOD-STUDENT-TEACHER-sSEED-TIME
    resume: str | None = None  # go on with the run in this folder, by the flags in its args.json; or begin it there
    save_every: int = 500  # steps between checkpoints; 0: only when SIGTERM or SIGINT ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # of autocast; weights, softmax and losses stay float32. auto: bf16 where it is fast, else fp16 (GPU) or fp32 (CPU)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    shard: bool = False  # under torchrun: split the frozen teacher's blocks over the processes (FSDP2)
    log_every: int = 10  # steps between two lines of metrics
    eval_every: int = 0  # steps between two looks at the dev rows; 0: an epoch
    eval_rows: int = 100  # dev rows looked at
    select: Literal["best", "last"] = "best"  # student kept: of the look with the best Rouge-L; last: no look scores
    score_rows: int = 100  # test rows scored with Rouge-L at the end: teacher, warm start and student
    track: bool = False  # log to Weights & Biases, whose own variables work, too: WANDB_MODE=offline, WANDB_PROJECT


# The demo follows the paper: the teacher is fine-tuned on the very rows that the student is distilled on.
DEMO = Args(teacher="demo", student="demo", max_length=96, max_new_tokens=48, epochs=40, lr=2e-3, precision="fp32",
            teacher_sft="full", teacher_sft_epochs=30, teacher_sft_lr=1e-3, student_sft_epochs=70, student_sft_lr=2e-3,
            eval_every=100, save_every=0)  # fmt: skip

RANGES = (  # lowest, highest, flags
    (0, 1, "alpha beta student_ce_weight sgo_fraction"),
    (0, 0.999, "skew"),  # at 1 both sides are the teacher
    (0, 1e9, "anchor ab_alpha ab_beta weight_decay max_grad_norm save_every seed eval_every eval_rows score_rows"),
    (0, 1e9, "teacher_sft_epochs student_sft_epochs lora_top_layers max_steps"),
    (1e-9, 1e9, "temperature lr teacher_lr_ratio epochs lora_scale teacher_sft_lr student_sft_lr"),
    (1, 1e9, "batch_size micro_batch_tokens sample_batch_size log_every lora_rank max_new_tokens rollouts"),
)


def parse(argv):
    """Flags -> Args, the method's row in every column that no flag overrides. Raises UserError."""
    named = {flag.split("=")[0] for flag in argv}
    args = tyro.cli(Args, args=argv, default=Args() if "--teacher" in named else DEMO, prog="okd.py")
    if args.resume and (stored := pathlib.Path(args.resume, "args.json")).exists():
        with blaming(f"{args.resume} is not the folder of a run that can go on"):
            begun = Args(**json.loads(stored.read_text()))
        args = tyro.cli(Args, args=argv, default=begun, prog="okd.py")
        refuse(args.precision != begun.precision, f"{args.resume} was begun in {begun.precision}: drop --precision")
    row = dict(METHODS[args.method])
    row["sgo_fraction"] = row["sgo_fraction"] or float(args.text == "student")  # whoever asks for that text gets it
    args = replace(args, **{column: value for column, value in row.items() if getattr(args, column) is None})
    for low, high, names in RANGES:
        for name, value in ((name, getattr(args, name)) for name in names.split()):
            refuse(not low <= value <= high, f"--{name.replace('_', '-')} is {value}: it must lie in [{low}, {high}]")
    refuse(args.ab_alpha == args.ab_beta == 0, "--ab-alpha 0 with --ab-beta 0: one of them must be larger")
    own, free = args.text in ("student", "adaptive", "mixture"), args.teacher_moves and args.anchor == 0
    refuse(free and (own or args.alpha == 1), "--alpha 1, as student text, needs --anchor: else p = q is a fixed point")
    refuse(own and args.student_ce_weight > 0, "--student-ce-weight on student text: y is the student's own token")
    refuse(args.text == "adaptive" and not args.eval_rows, "--text adaptive needs --eval-rows, by which phi grows")
    refuse(args.cache_teacher and (own or args.shard), "--cache-teacher needs text that stays, and no --shard")
    return args


class UserError(Exception):
    """Something the user can mend: one line, and exit code 2."""


def refuse(wrong, why):
    if wrong:
        raise UserError(why)


@contextlib.contextmanager
def blaming(what):
    """An error inside is the user's to mend: one line that says what and why. Running out of memory is not."""
    try:
        yield
    except Exception as error:  # models, templates, hub and HTTP library raise what they like
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{what} ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})") from error


# The loop -------------------------------------------------------------------------------------------------------------


def train(args, student, teacher, data, tokenizer, hw, folder, phase="distil", wandb=None):
    """Algorithm 1: train the student, and with args.teacher_moves the teacher's module. One loop for every method.
    Goes on from the checkpoint in `folder` when there is one. -> the state at the end. Exits after a signal."""
    networks = torch.nn.ModuleDict(dict(student=student) | (dict(teacher=teacher) if args.teacher_moves else {}))
    for network in networks.values() if args.gradient_checkpointing else ():
        network.activation_checkpointing_enable(dict(use_reentrant=False))
    moving = {name: p.data for name, p in networks.named_parameters() if p.requires_grad}
    optimizers = {name: adamw(network, args.weight_decay) for name, network in networks.items()}
    scaler = torch.amp.GradScaler(hw.device.type, enabled=hw.dtype == torch.float16)
    scalars = dict(taid_t=0.4, taid_momentum=0.0, taid_loss=math.inf, skipped_steps=0.0)
    scalars = {name: torch.tensor(value, device=hw.device) for name, value in scalars.items()}
    state = dict(step=0, seconds=0.0, tokens=0, logged=0, first=None, best=None, last=None, sampling_s=0.0,
                 phi=args.sgo_fraction, replay=[], rollouts=[])  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    state, best = load_checkpoint(folder, networks, optimizers | dict(scaler=scaler), scalars) or (state, None)
    log = open(os.devnull if hw.rank else folder / "metrics.jsonl", "a", buffering=1)
    log.truncate(state["logged"]) if hw.rank == 0 else None  # what follows is reported again
    dev, per_epoch = data.get("dev", [])[: args.eval_rows], max(1, len(data["train"]) // args.batch_size)
    steps = min(max(1, round(args.epochs * per_epoch)), args.max_steps or sys.maxsize)
    text = Text(args, student, teacher, data["train"], tokenizer, hw, steps, state)
    clock, seen, signals = time.perf_counter(), state["tokens"], []
    start = clock - state["seconds"]
    on_signals(lambda number, frame: signals.append(number) or on_signals(signal.SIG_DFL))  # a second one ends at once

    for step in tqdm(range(state["step"], steps + 1), phase, steps, initial=state["step"], disable=hw.rank > 0 or None):
        # A look at the dev rows, the first before any step, the last after all of them. The clocks stand still.
        if dev and (step % (args.eval_every or per_epoch) == 0 or step == steps):
            pause = hw.now()
            now = evaluate(args, student, teacher, dev, tokenizer, hw)
            state |= dict(first=state["first"] or now, last=now)
            if args.select == "last" or now["rouge_l"] >= (state["best"] or now)["rouge_l"]:
                state["best"] = now | dict(step=step)
                best = {name: p.to("cpu", copy=True) for name, p in moving.items()} if args.select == "best" else None
            text.validated(now["student_ce"])
            report(log, wandb, phase, step, "dev", now)
            start, clock = start + hw.now() - pause, clock + hw.now() - pause
        if step == steps:
            break

        # Whose text. Order, sampling and dropout of a step depend on seed and step alone: a resume needs no more.
        torch.manual_seed(hash((args.seed, step, hw.rank)))  # of integers: the same in every process
        rows = text(step)
        tokens = sum(len(row.response_ids) for row in rows)  # of the whole batch, however it is split

        # Who is asked. A network that neither a loss nor a report needs does not run.
        look = (step + 1) % args.log_every == 0 or step + 1 == steps
        asked = teacher if look or args.teacher_moves or args.student_ce_weight < 1 else None
        need_p0 = args.teacher_moves and (look or args.anchor > 0)
        divergence = bound_divergence(args, scalars["taid_t"])

        def losses(log_p, log_q, log_p0, labels, rollout):
            terms = {"student_loss": student_loss(log_p, log_q, labels, divergence, args.student_ce_weight, rollout)}
            if args.teacher_moves:
                weights = args.alpha, args.anchor, args.temperature
                terms["teacher_loss"] = teacher_loss(log_p, log_q, log_p0, labels, *weights)
            return terms | (measure(log_p, log_q, log_p0, labels) if look and teacher else {})

        # Both losses from one forward of each network. Neither reaches into the other, so one backward serves both.
        sums, backward = Counter(), lambda loss: scaler.scale(loss / tokens).backward()
        networks.train()  # elsewhere in eval mode; the teacher was loaded without dropout
        for batch in micro_batches(rows, args, hw):
            sums.update(run_batch(student, asked, batch, hw, losses, backward, need_p0))
        networks.eval()
        means = {name: value / tokens for name, value in hw.total(sums).items()}

        # Two steps. One whose gradient is not finite is skipped, on the device, and counted.
        rate, norms = learning_rate(step, steps, args.lr), {}
        for name, optimizer in optimizers.items():
            own = rate * (args.teacher_lr_ratio if name == "teacher" else 1)
            norms[f"{name}_grad_norm"] = update(optimizer, scaler, own, args.max_grad_norm, hw)
        scaler.update()
        scalars["skipped_steps"] += 1.0 - torch.stack(list(norms.values())).isfinite().all().float()
        if args.divergence == "taid":
            taid_step(scalars, means["student_loss"], step / max(1, steps - 1))

        # Report. Between reports nothing is read back from the device, so a GPU is never waited for.
        state["tokens"] += sum(map(len, rows))
        if look:
            means |= norms | {name: scalars[name] for name in ("taid_t", "skipped_steps")} | dict(lr=rate)
            means |= {name: state[name] for name in ("phi", "sampling_s")} | dict(peak_memory_gb=hw.peak_gb())
            means["tokens_per_s"] = (state["tokens"] - seen) / (hw.now() - clock)
            report(log, wandb, phase, step + 1, "train", means)
            seen, clock = state["tokens"], hw.now()

        # Survive.
        stop = max(hw.gather(signals[-1] if signals else 0))
        if stop or step + 1 == steps or (args.save_every and (step + 1) % args.save_every == 0):
            state |= dict(step=step + 1, seconds=hw.now() - start, logged=log.tell(), peak_memory_gb=hw.peak_gb())
            save_checkpoint(folder, moving, optimizers | dict(scaler=scaler), scalars, state, best, hw)
        if stop:
            print(f"stopped in {phase}, step {step + 1}; python okd.py --resume {args.output_dir}", file=sys.stderr)
            sys.exit(128 + stop)
    on_signals(signal.SIG_DFL)
    networks.load_state_dict(best or {}, strict=False)
    return state


@torch.no_grad()
def evaluate(args, student, teacher, rows, tokenizer, hw):
    """Means over the response tokens of `rows` of all in `measure`; with --select best, Rouge-L of greedy answers."""
    sums = Counter()
    for batch in micro_batches(rows, args, hw, share=False):  # every process looks at all of them
        sums.update(run_batch(student, teacher, batch, hw, measure, need_p0=args.teacher_moves))
    means = {name: float(value) / sum(len(row.response_ids) for row in rows) for name, value in sums.items()}
    return means | (dict(rouge_l=score(args, student, tokenizer, rows, hw)[0]) if args.select == "best" else {})


def adamw(model, weight_decay):
    """Fused AdamW over what is trainable; the 1-D weights, norms and biases, do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decaying = dict(params=[p for p in trainable if p.ndim > 1], weight_decay=weight_decay)
    others = dict(params=[p for p in trainable if p.ndim < 2], weight_decay=0.0)
    return torch.optim.AdamW([decaying, others], fused=True)


def update(optimizer, scaler, rate, max_norm, hw):
    """One clipped step on the gradients of all processes. -> their norm; when that is not finite nothing moves."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters if hw.world > 1 else ():
        dist.all_reduce(p.grad)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~norm.isfinite()).float()  # then a fused optimizer skips; a GradScaler in use sets its own
    scaler.step(optimizer)
    optimizer.zero_grad()
    return norm


def learning_rate(step, steps, peak, warmup=0.03):
    """A line up to the peak over the first 3 % of the steps, as in the OKD paper, then a line down to 0 at the end."""
    rising = round(warmup * steps)
    return peak * min((step + 1) / (rising + 1), (steps - step) / (steps - rising))


# One micro-batch: two trunks, then heads, losses and gradients over chunks of tokens, then back through the trunks ----

CHUNK_ELEMENTS = 2**23  # logits of one network alive at once on a CPU: 32 MB in float32, which its cache nearly holds
GPU_CHUNKS = 8  # times as many elsewhere, where each chunk costs kernel launches and a (V, H) gradient
# A decoder's output; what a family's head reads besides (cross attentions, router logits, ...) is None.
Decoded = type("Decoded", (transformers.modeling_outputs.BaseModelOutputWithPast,), dict(__getattr__=lambda *_: None))


def trunk(model, batch, states=None):
    """-> ((N, H) hidden states of the N positions that predict a response token, head: such rows -> float32 logits).
    No attention mask: padding is on the right, and causal attention never looks there. The head is the family's own
    forward with its decoder replaced, so that tied weights, scales and soft caps are the family's business. `states`,
    from `with_states`: (N, H) are the hidden states already; (B, T, H) enter the lowest block that carries LoRA."""
    decoder = model.get_decoder()
    if states is None or states.ndim == 3:
        with contextlib.ExitStack() as stack:
            for block in blocks_of(model)[: lowest_lora(model)] if states is not None else ():
                stack.enter_context(mock.patch.object(block, "forward", lambda *_, **__: states))
            hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1).index_select(0, batch.positions)

    def head(rows):
        with mock.patch.object(decoder, "forward", lambda *_, **__: Decoded(last_hidden_state=rows[None])):
            return model(input_ids=batch.input_ids[:1, :1], use_cache=False).logits[0].float()

    return states, head


def run_batch(student, teacher, batch, hw, losses, backward=lambda loss: None, need_p0=False):
    """Forward, and with `backward` back-propagate, one Batch. -> {name: sum over its tokens}, tensors on the device.
    losses(log_p, log_q, log_p0, labels, rollout) -> {name: (n,) values}; their sum is differentiated. The gradient of
    the hidden states is collected chunk by chunk and sent through each trunk once, so that only so many logits of a
    network live at a time, and each is normalised once. teacher may be None."""
    sums, size = Counter(), CHUNK_ELEMENTS * (1 if hw.device.type == "cpu" else GPU_CHUNKS)
    size = max(1, size // student.get_output_embeddings().weight.size(0))
    with hw.autocast():  # one region, so that a head is cast once for all chunks
        trunks = {"q": trunk(student, batch)}
        if teacher is not None:
            trunks["p"] = trunk(teacher, batch, batch.states)
            if need_p0:  # no second copy of the teacher: its module is switched off
                with torch.no_grad(), teacher.disable_adapter():
                    trunks["p0"] = trunk(teacher, batch, batch.states)
        leaves = {name: hidden.detach().requires_grad_(hidden.requires_grad) for name, (hidden, _) in trunks.items()}
        for part in (slice(start, start + size) for start in range(0, len(batch.labels), size)):
            log = {name: trunks[name][1](leaf[part]).log_softmax(-1) for name, leaf in leaves.items()}
            terms = losses(log.get("p"), log["q"], log.get("p0", log.get("p")), batch.labels[part], batch.rollout[part])
            backward(sum(term.sum() for term in terms.values()))
            sums.update({name: term.detach().sum() for name, term in terms.items()})
    if moving := [name for name, leaf in leaves.items() if leaf.grad is not None]:
        torch.autograd.backward([trunks[name][0] for name in moving], [leaves[name].grad for name in moving])
    return sums


# Whose text: the rows of one optimizer step; sampling is at temperature 1 from the whole distribution -----------------

TEACHER_SHARE = 0.2  # of the mixture that MiniLLM samples from
ROLLOUT_PASSES = 4  # MiniLLM's passes over its rollouts before new ones are sampled
REPLAY_CAPACITY = 1000  # rows of DistiLLM's buffer; the oldest go first


class Text:
    """The rows that the losses are measured on, by `args.text`. What it changes is in `state`, which is saved."""

    def __init__(self, args, student, teacher, rows, tokenizer, hw, steps, state):
        self.args, self.student, self.teacher, self.rows, self.tokenizer = args, student, teacher, rows, tokenizer
        self.hw, self.steps, self.state, self.size = hw, steps, state, min(args.batch_size, len(rows))
        self.gold = functools.partial(batch_of, rows, self.size, args.seed)

    def __call__(self, step):
        """Gold text (or the teacher's, put in its place before), or with probability phi the student's. student: phi is
        --sgo-fraction, the text fresh or from a replay buffer (Lin et al. 2020, ImitKD; Agarwal et al. 2023, GKD).
        adaptive: phi grows, and fresh text gives way to replayed text (Ko et al. 2024, DistiLLM, algorithm 1).
        mixture: rollouts of teacher and student mixed, gone through ROLLOUT_PASSES times (Gu et al. 2023, MiniLLM)."""
        if self.args.text == "mixture":
            per_pass = max(1, min(self.args.rollouts, len(self.rows)) // self.size)
            round_, within = divmod(step, per_pass * ROLLOUT_PASSES)
            if within == 0:
                prompts = [row for i in range(per_pass) for row in self.gold(round_ * per_pass + i)]
                self.state["rollouts"] = self.judged(self.answers(prompts, step, self.teacher))
            return batch_of(self.state["rollouts"], self.size, f"{self.args.seed}, {round_}", within)
        chance, rows = random.Random(f"{self.args.seed}, text of step {step}"), self.gold(step)
        r, phi, adaptive = chance.random(), self.state["phi"], self.args.text == "adaptive"
        if r >= phi or self.args.text in ("data", "teacher"):
            return rows
        fresh = not adaptive or len(self.state["replay"]) < REPLAY_CAPACITY or r < phi * (1 - step / self.steps)
        if fresh:
            rows = self.answers(rows, step)
            self.state["replay"] = [*self.state["replay"], *rows][-REPLAY_CAPACITY:]
        if fresh and (adaptive or self.args.sgo_source == "fresh"):
            return rows
        return chance.sample(self.state["replay"], min(self.size, len(self.state["replay"])))

    def answers(self, rows, step, teacher=None):
        """The student's own words (with a teacher: the mixture's) to the prompts of `rows`, as rows."""
        args, start, prompts = self.args, time.perf_counter(), [row.prompt_ids for row in rows]
        how = args.max_new_tokens, args.sample_batch_size, True, hash((args.seed, step)), teacher
        ids = generate(self.student, self.tokenizer, prompts, self.hw, *how)
        self.state["sampling_s"] += time.perf_counter() - start
        return [row.answered(response, args.max_length) for row, response in zip(rows, ids)]

    @torch.no_grad()
    def judged(self, rows):
        """Rollouts -> the same with advantage, log q and importance weight of every response token."""
        rows, found = sorted(rows, key=len), []
        keep = lambda p, q, _, labels, __: found.append([-cross_entropy(x, labels) for x in (p, q)]) or {}
        for batch in micro_batches(rows, self.args, self.hw, share=False):
            run_batch(self.student, self.teacher, batch, self.hw, keep)
        (log_p, log_q), lengths = (torch.cat(log).cpu() for log in zip(*found)), [len(row.response_ids) for row in rows]
        weight = (log_q - mix(log_p, log_q, TEACHER_SHARE)).exp()
        returns = torch.cat([discounted_return(rewards) for rewards in (log_p - log_q).split(lengths)])
        advantage = (returns - returns.mean()) / (returns.std(unbiased=False) + 1e-8)  # authors: padding, too
        values = torch.stack([advantage, log_q, weight], dim=1).split(lengths)
        return [replace(row, rollout=value.tolist()) for row, value in zip(rows, values)]

    def validated(self, loss, patience=0.1, step=0.1):
        """DistiLLM: phi grows when the validation loss is `patience` over its reference, which is then replaced."""
        reference = self.state.setdefault("reference", loss)
        if self.args.text == "adaptive" and loss >= reference + patience:
            self.state |= dict(phi=min(1.0, self.state["phi"] + step), reference=loss)


def discounted_return(rewards, gamma=0.95):
    """(n,) rewards -> (n,) returns R_t = sum_{k >= t} gamma^(k - t) r_k / (n - t) of MiniLLM (paper: from t + 1 on)."""
    ahead = torch.arange(len(rewards)) - torch.arange(len(rewards))[:, None]
    return (gamma ** ahead.abs()).triu().to(rewards) @ rewards / torch.arange(len(rewards), 0, -1)


@torch.no_grad()
def generate(model, tokenizer, prompts, hw, new_tokens, batch_size=128, sample=False, seed=0, teacher=None, **options):
    """Lists of prompt ids -> lists of response ids, in the same order; the end token, where one was written, is kept.
    sample=True draws, with a teacher from TEACHER_SHARE p + (1 - TEACHER_SHARE) q. `options` go to GenerationConfig.
    The processes share the prompts, and each gets all responses. Raises UserError for a prompt that leaves no room."""
    longest = max(map(len, prompts))
    room = min(positions(network) for network in (model, teacher) if network) - longest
    refuse(room < 1, f"a prompt of {longest} tokens fills the positions of the model: no room for an answer")
    options, stops = (dict(temperature=1.0, top_p=1.0, top_k=0) if sample else {}) | options, ends(tokenizer)
    config = transformers.GenerationConfig(do_sample=sample, max_new_tokens=int(min(new_tokens, room)), **options,
                                           eos_token_id=stops, pad_token_id=stops[0])  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # out of memory at once or never
    order += order[:1] * (-len(order) % hw.world)  # as many for each process: a sharded network makes them wait
    mine, answers = order[hw.rank :: hw.world], {}
    torch.manual_seed(hash((seed, hw.rank)))
    for rows in (mine[start : start + batch_size] for start in range(0, len(mine), batch_size)):
        ids = pad_sequence([torch.tensor(prompts[i]) for i in rows], True, -1, "left").to(hw.device)
        mask, ids = (ids >= 0).long(), ids.masked_fill(ids < 0, stops[0])
        # generate() would fill what we leave open from the model's own file: repetition penalty, min_p, ...
        with hw.autocast(), mock.patch.object(model, "generation_config", config):
            output = model.generate(ids, config, [Mixture(teacher, mask)] if teacher else [], attention_mask=mask,
                                    synced_gpus=isinstance(blocks_of(model)[0], FSDPModule))  # fmt: skip
        for i, response in zip(rows, output[:, ids.size(1) :].tolist()):
            answers[i] = response[: next((t + 1 for t, token in enumerate(response) if token in stops), None)]
    answers = functools.reduce(dict.__or__, hw.gather(answers))
    return [answers[i] for i in range(len(prompts))]


class Mixture(transformers.LogitsProcessor):
    """Mixes the teacher's next-token distribution into the student's; the teacher keeps a KV cache of its own."""

    def __init__(self, teacher, attention_mask):
        self.teacher, self.mask, self.cache = teacher, attention_mask, None

    def __call__(self, input_ids, scores):
        new = slice(None if self.cache is None else -1, None)
        self.mask = torch.nn.functional.pad(self.mask, (0, input_ids.size(1) - self.mask.size(1)), value=1)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)[:, new]
        output = self.teacher(input_ids=input_ids[:, new], attention_mask=self.mask, position_ids=places,
                              past_key_values=self.cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        self.cache = output.past_key_values
        return mix(output.logits[:, -1].float().log_softmax(-1), scores.float().log_softmax(-1), TEACHER_SHARE)


def rouge_l(prediction, references):
    """Rouge-L F times 100, with the stemmer, the best over the references. Lin 2004; rouge-score's implementation."""
    return 100 * RougeScorer(["rougeL"], use_stemmer=True).score_multi(references, prediction)["rougeL"].fmeasure


def score(args, model, tokenizer, rows, hw):
    """-> (mean Rouge-L of greedy answers, the answers)."""
    prompts, size = [row.prompt_ids for row in rows], args.sample_batch_size
    answers = tokenizer.batch_decode(generate(model, tokenizer, prompts, hw, args.max_new_tokens, size), True)
    return sum(rouge_l(answer, row.references) for answer, row in zip(answers, rows)) / len(rows), answers


# Data: a JSON line becomes an Example; what counts as response is decided here, once ----------------------------------

CHAT = dict(tokenize=False, enable_thinking=False)  # a model that could think first (Qwen3) is to answer at once
ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{}\n\n{}### Response:\n")  # fmt: skip


@dataclass
class Example:
    prompt: str
    references: list[str]  # every valid response; the first is the one trained on
    prompt_ids: list[int]
    response_ids: list[int]  # ends in an end token, unless it was cut to --max-length
    rollout: list | None = None  # per response token: advantage, log q when sampled, importance weight
    states: torch.Tensor | None = None  # of the teacher, from `with_states`

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)

    def answered(self, ids, max_length):
        return replace(self, response_ids=ids[: max_length - len(self.prompt_ids)], rollout=None, states=None)


def read_row(row, tokenizer):
    """A JSON object -> Example, or any error. Forms: instruction, input or context, output or response (by Alpaca's
    template); prompt, response; messages that end in the assistant's (by the chat template). Outputs may be a list."""
    end = tokenizer.eos_token_id
    if chat := row.get("messages"):
        if chat[-1]["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        references, end = chat[-1]["content"], ends(tokenizer)[-1]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **CHAT)
    else:
        context, instruction = row.get("input") or row.get("context"), row.get("instruction")
        paired = ", paired with an input that provides further context" if context else ""
        context = f"### Input:\n{context}\n\n" if context else ""
        prompt = ALPACA.format(paired, instruction, context) if instruction else row["prompt"]
        references = row["output"] if "output" in row else row["response"]
    references = [references] if isinstance(references, str) else references
    "".join([prompt, *references]).encode()  # TypeError for what is no text, UnicodeError for half a surrogate pair
    prompt_ids = tokenizer(prompt, add_special_tokens=not chat).input_ids  # BOS for Llama, none for GPT-2
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not chat:
        prompt_ids = prompt_ids[:-1]  # T5's tokenizers close every text
    # Prompt and response are tokenised apart: BPE could merge across the border. The end is a target.
    response_ids = tokenizer(references[0], add_special_tokens=False).input_ids
    return Example(prompt, references, prompt_ids, [*response_ids, end])


def ends(tokenizer):
    """Ids that end a response: EOS, and the special token by which the chat template ends a turn, if it is another."""
    stops, turns = [tokenizer.eos_token_id], [dict(role="user", content="?"), dict(role="assistant", content="answer")]
    with contextlib.suppress(Exception):  # no template, or one that refuses these turns: rows of chats will say so
        after = tokenizer.apply_chat_template(turns, **CHAT).rpartition("answer")[2]
        after, added = tokenizer(after, add_special_tokens=False).input_ids, tokenizer.added_tokens_decoder
        stops += [token for token in after if token in added and added[token].special][:1]
    return list(dict.fromkeys(stops))


def read_rows(source, lines, tokenizer, args):
    """JSON lines -> Examples that can be trained on. Raises UserError for a malformed line, or when no row is left."""
    rows, unread, longest = [], set(), min(args.max_prompt_length, args.max_length - 1)
    for number, line in enumerate(lines, 1):
        with blaming(f"{source}, line {number} needs instruction and output, prompt and response, or messages"):
            if line.strip():
                rows.append(read_row(row := json.loads(line), tokenizer))
                unread |= row.keys() - {"instruction", "input", "context", "output", "prompt", "response", "messages"}
    kept = [row.answered(row.response_ids, args.max_length) for row in rows
            if 0 < len(row.prompt_ids) <= longest and len(row.response_ids) > 1]  # fmt: skip
    if unread:
        print(f"{source}: fields that are not read: {', '.join(sorted(unread))[:200]}")
    if len(kept) < len(rows):
        print(f"{source}: {len(kept)} of {len(rows)} rows kept; the others have no response, or no or a long prompt")
    refuse(not kept, f"{source}: no usable row among {len(rows)}")
    return kept


def hub_lines(repo, file):
    with blaming(f"cannot get {file} of the dataset {repo} from the hub: give --data, or set HF_HOME"):
        return open(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"), "rb").readlines()


def load_data(args, tokenizer):
    """-> {"train", "dev", "test"}: lists of Examples, and for the demo "pretraining"."""
    read, data = functools.partial(read_rows, tokenizer=tokenizer, args=args), {}
    if args.teacher == "demo":
        rows = read("built-in tasks", map(json.dumps, demo_rows(5800, seed=0)))
        data = dict(test=rows[:1200], dev=rows[1200:1400], train=rows[1400:1800], pretraining=rows[1800:])
    if args.data:
        with blaming(f"cannot read {args.data}"):
            rows = read(args.data, open(args.data, "rb"))
        random.Random(0).shuffle(rows)  # the same split for every seed
        held_out = min(500, math.ceil(len(rows) / 20))  # each, for looks and for the score
        test, dev, train_rows = rows[:held_out], rows[held_out : 2 * held_out], rows[2 * held_out :]
        data |= dict(train=train_rows or rows, dev=dev or rows, test=test)
    elif not data:  # the splits of the published results
        raw, valid = (hub_lines("MiniLLM/dolly", file) for file in ("raw.jsonl", "valid.jsonl"))
        parts = dict(train=raw[1000:], dev=raw[:1000], test=valid)
        data = {name: read("MiniLLM/dolly", lines) for name, lines in parts.items()}
    return data


def demo_rows(count, seed):
    """Six tasks on made-up words, no prompt twice; wordings drawn 6 : 3 : 2, so that there is more than an argmax."""
    rng, rows = random.Random(seed), {}
    syllable = lambda: rng.choice("bdfgklmnprst") + rng.choice("aeiou")
    while len(rows) < count:
        a, b = ("".join(syllable() for _ in range(rng.choice((1, 2, 2)))) for _ in "ab")
        x, y = sorted(rng.sample(range(10, 100), 2))
        prompt, *answers = rng.choice((
            (f"shout {a}", f"{a.upper()}!", a.upper(), f"we shout {a.upper()}"),
            (f"double {a}", f"{a} {a}", f"{a} and {a}", f"twice: {a} {a}"),
            (f"spell {a}", "-".join(a), " ".join(a), "letters " + " ".join(a)),
            (f"first of {a}, {b}", a, f"it is {a}", f"the first is {a}"),
            (f"swap {a}, {b}", f"{b}, {a}", f"{b} then {a}", f"{b} before {a}"),
            (f"larger of {rng.choice((f'{x}, {y}', f'{y}, {x}'))}", f"{y}", f"it is {y}", f"{y} is larger"),
        ))  # fmt: skip
        answers.sort(key=rng.choices(answers, weights=(6, 3, 2))[0].__ne__)  # the drawn one first
        rows.setdefault(prompt, {"prompt": prompt + "\n", "response": answers})
    return list(rows.values())


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B, T), right-padded to the longest row
    positions: torch.Tensor  # (N,) indices into B * T of the tokens that are followed by a response token
    labels: torch.Tensor  # (N,) those response tokens, row by row: shifted here and nowhere else
    rollout: torch.Tensor  # (N, 3) of sampled rows, empty for others
    states: torch.Tensor | None = None  # of the teacher, where they were kept: (N, H) or (B, T, H)


def collate(rows, device):
    """Examples -> Batch. Everything comes from lengths, nothing from ids: pad may be EOS, and EOS is a target."""
    input_ids = pad_sequence([torch.tensor(row.prompt_ids + row.response_ids) for row in rows], True)
    response = pad_sequence([torch.arange(len(row)) >= len(row.prompt_ids) for row in rows], True)
    rollout, states = [values for row in rows for values in row.rollout or ()], [row.states for row in rows]
    tensors = [input_ids, response.flatten().nonzero().squeeze(1) - 1, input_ids[response], torch.tensor(rollout)]
    if states[0] is not None:  # of all positions, or of those with a label
        tensors.append(pad_sequence(states, True) if len(states[0]) == len(rows[0]) else torch.cat(states))
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def batch_of(rows, size, seed, step, window=16):
    """The rows of optimizer step number `step`: a pure function, so a run can go on anywhere. Each epoch shuffles anew;
    within windows of 16 batches rows are sorted by length, so that little is padded; then the batches are shuffled."""
    number, within = divmod(step, len(rows) // size)
    order, batches = shuffles(len(rows), size, f"{seed}, epoch {number}")
    start, place = (batches[within] // window) * window * size, (batches[within] % window) * size
    return sorted((rows[i] for i in order[start : start + window * size]), key=len)[place : place + size]


@functools.lru_cache(maxsize=2)
def shuffles(rows, size, seed):  # the rows left over at its end wait for the next epoch
    rng, batches = random.Random(seed), rows // size
    return rng.sample(range(rows), batches * size), rng.sample(range(batches), batches)


def micro_batches(rows, args, hw, share=True):
    """Batches of like rows, of at most --micro-batch-tokens with padding or one row. share: of this process's part."""
    rows, (rank, world), pieces = sorted(rows, key=len), (hw.rank, hw.world) if share else (0, 1), [[]]
    assert len(rows) % world == 0, "as many rows for each process, since the loss counts the tokens of all"
    for row, longest in zip(rows[rank::world], rows[world - 1 :: world]):
        if pieces[-1] and (len(pieces[-1]) + 1) * len(longest) > args.micro_batch_tokens:
            pieces.append([])
        pieces[-1].append(row)
    return (collate(piece, hw.device) for piece in pieces)


# Models ---------------------------------------------------------------------------------------------------------------

positions = lambda model: getattr(model.config, "max_position_embeddings", None) or math.inf  # of prompt and response
blocks_of = lambda model: max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
lowest_lora = lambda model: min(model.peft_config["default"].layers_to_transform)  # below, nothing moves


def load_tokenizer(name, args):
    if name == "demo":
        return transformers.ByT5Tokenizer()  # bytes: nothing to download
    with blaming(f"cannot load the tokenizer of {name}: give a local model folder or a hub id, or set HF_HOME"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        refuse(tokenizer.eos_token_id is None, f"the tokenizer of {name} has no EOS token, so no response could end")
        return tokenizer


def one_tokenizer(ours, theirs):
    """The teacher's tokenizer, for both. Raises UserError when more than EOS and reserved tokens differ."""
    differ = ours.get_vocab().items() ^ theirs.get_vocab().items()
    reserved = {i for each in (ours, theirs) for i, token in each.added_tokens_decoder.items() if token.special}
    ordinary = sorted({token for token, number in differ if number not in reserved})
    refuse(ordinary, f"different tokenizers: {len(ordinary)} tokens of teacher and student differ, as {ordinary[:5]}")
    if differ or ours.eos_token != theirs.eos_token:
        print(f"the student gets the teacher's tokenizer: EOS is {ours.eos_token} and was {theirs.eos_token}, "
              f"{len(dict(differ))} reserved tokens differ")  # fmt: skip
    return ours


def load_model(name, role, args, dtype, hw=None, dropout=True):
    """Hub id, local folder or "demo" -> causal LM in `dtype`, on the CPU; with `hw` as --teacher-quant says."""
    if name == "demo":
        torch.manual_seed(0)
        width, layers = (128, 3) if role == "teacher" else (64, 2)
        config = transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=width, n_layer=layers, n_head=4,
                                         bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0,
                                         attn_pdrop=0.0, activation_function="gelu_pytorch_tanh")  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with blaming(f"cannot load the {role} {name}: give a local folder with *.safetensors or a hub id, or set HF_HOME"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        if not dropout:
            config.update({k: 0.0 for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)})
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel instead of eight
        options = dict(config=config, dtype=dtype, trust_remote_code=args.trust_remote_code, use_safetensors=True)
        if args.teacher_quant and hw:  # with 8bit nobody reads what begins with bnb_4bit
            bnb = {f"load_in_{args.teacher_quant}": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            options |= dict(quantization_config=transformers.BitsAndBytesConfig(**bnb), device_map={"": hw.device})
        return transformers.AutoModelForCausalLM.from_pretrained(name, **options).eval()


def save_model(model, tokenizer, path):
    """A folder for from_pretrained; the generation_config that the model came with then stops where we do."""
    model.save_pretrained(path), tokenizer.save_pretrained(path)
    model.generation_config.eos_token_id = ends(tokenizer)
    (path / "generation_config.json").write_text(model.generation_config.to_json_string())


def add_lora(model, args, top, seed):
    """Eq. 15: LoRA on the layers that --lora-targets names, in the top blocks (0: all). B starts at 0: p_f = p_0."""
    blocks, linear = blocks_of(model), (torch.nn.Linear, transformers.Conv1D)
    refuse(top > len(blocks), f"--lora-top-layers {top}: the teacher has only {len(blocks)} layers")
    names = sorted({name.split(".")[-1] for name, module in blocks.named_modules() if isinstance(module, linear)})
    targets = {"auto": None, "all-linear": names}.get(args.lora_targets, args.lora_targets.split(","))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=args.lora_scale * args.lora_rank,
                             target_modules=targets, layers_to_transform=[*range(len(blocks))][-top:])  # fmt: skip
    misfit = f"--lora-targets {args.lora_targets} does not fit: name some of {', '.join(names)}"
    refuse(not set(targets or ()) <= set(names), misfit)  # nor the head: p_0 would have it, too
    torch.manual_seed(seed)
    with blaming(misfit):  # auto, of a family that peft's table lacks
        return peft.get_peft_model(model, config).eval()


def place(model, hw, shard=False):
    """The model on its device. shard: its blocks' frozen weights are split over the processes, whole while they run."""
    for block in blocks_of(model) if shard else ():  # LoRA stays plain, for optimizer, clipping and checkpoints
        fully_shard(block, ignored_params={p for p in block.parameters() if p.requires_grad})
    return model if getattr(model, "is_quantized", False) else model.to(hw.device)  # that one was loaded there


def fine_tuned(args, dev, tokenizer, hw, folder, role, source, rows, epochs, lr, lora):
    """Fine-tune the model at `source` on gold text, once for all runs. -> {role: where it is kept, role_s: seconds}."""
    if epochs == 0:
        return {role: source, f"{role}_s": 0.0}
    sft = replace(args, **METHODS["sft"], method="sft", seed=0, epochs=epochs, lr=lr, select="last")
    recipe = "epochs lr max_steps batch_size weight_decay max_grad_norm precision".split()
    recipe += "lora_rank lora_scale lora_targets teacher_quant".split() if lora else []
    kept = cache_path(args, role, source, [lora, *(getattr(sft, flag) for flag in recipe)], rows, hw)
    if hw.gather(kept.exists())[0]:
        print(f"{role}: fine-tuned before, kept in {kept}")
        return {role: str(kept), f"{role}_s": 0.0}
    work = folder / f"sft-{kept.name}"  # one for each recipe, so that a resume never takes one training for another
    model = load_model(source, role, args, hw.dtype if lora else torch.float32, hw if lora else None)
    model = place(add_lora(model, args, 0, seed=0) if lora else model, hw, shard=args.shard and lora)
    seconds = train(sft, model, None, dict(train=rows), tokenizer, hw, work, phase=f"{role}_sft")["seconds"]
    gold_ce = lambda model: evaluate(sft, model, model, dev, tokenizer, hw)["student_ce"]
    before = gold_ce(model) if lora else None
    if lora and hw.rank == 0:  # into a fresh copy, for this one may be sharded or quantized; in float32, rounded once
        model.save_pretrained(work)
        model = peft.PeftModel.from_pretrained(load_model(source, role, args, torch.float32), work)
        model = place(model.merge_and_unload(), hw)
        for weight in model.parameters():  # buffers, such as rotary frequencies, are float32 in every model
            weight.data = weight.data.to(hw.dtype)
        print(f"{role}: CE on dev rows {before:.4f} with LoRA, {gold_ce(model):.4f} merged")
    write_whole(kept, functools.partial(save_model, model, tokenizer), hw)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)
    return {role: str(kept), f"{role}_s": seconds}


def cache_path(args, what, source, recipe, rows, hw):
    """Where --cache-dir keeps what model, recipe, rows and machine determine."""
    key = what, fingerprint(source), recipe, [(row.prompt_ids, row.response_ids) for row in rows], hw.device.type
    digest = hashlib.sha256(json.dumps([key, torch.__version__, transformers.__version__]).encode()).hexdigest()[:12]
    folder = pathlib.Path(args.cache_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{what}-{pathlib.PurePath(source).name}-{digest}"


def fingerprint(source):
    """A local model by its content, the size and every so many bytes of each weight file; another by its name."""
    files = ((str(path), path.stat().st_size) for path in sorted(pathlib.Path(source).glob("*.safetensors")))
    read = functools.partial(torch.from_file, dtype=torch.uint8)
    return [[size, read(path, size=size)[:: size // 2**16 + 1].tolist()] for path, size in files] or source


def teacher_text(args, teacher, rows, tokenizer, hw, folder):
    """The rows with the teacher's sampled answers in place of the gold ones (SeqKD), written once a run."""
    kept, prompts = folder / "teacher_text.json", [row.prompt_ids for row in rows]
    if not hw.gather(kept.exists())[0]:
        refuse((folder / "checkpoints").exists(), f"{kept}, which this run trains on, is gone: begin another")
        ids = generate(teacher, tokenizer, prompts, hw, args.max_new_tokens, args.sample_batch_size, True, args.seed)
        write_whole(kept, lambda path: path.write_text(json.dumps(ids)), hw)
    return [row.answered(ids, args.max_length) for row, ids in zip(rows, json.loads(kept.read_text()))]


@torch.no_grad()
def with_states(args, teacher, source, rows, hw):
    """--cache-teacher: the rows with views of a memory-mapped file of teacher states that never change: of a frozen
    teacher the last (n, H) of the response, which leaves its head to run; of a moving one the (T, H) that enter the
    lowest block with LoRA, which leaves those above. Raises UserError when it can't, or is wrong."""
    order, cut = sorted(rows, key=len), lowest_lora(teacher) if args.teacher_moves else None  # None: it is frozen
    refuse(cut == 0, "--cache-teacher needs --lora-top-layers: below a module on all layers there is nothing to keep")

    def states(part):
        entering, watched = [], blocks_of(teacher)[cut or 0]
        with hw.autocast(), watched.register_forward_pre_hook(lambda _, given: entering.extend(given[0])):
            last = trunk(teacher, collate(part, hw.device))[0]
        return (last if cut is None else torch.cat([x[: len(row)] for x, row in zip(entering, part)])).to(hw.dtype)

    def fill(temporary):
        size = max(1, args.micro_batch_tokens // len(order[-1]))
        with open(temporary, "wb") as file:
            for start in tqdm(range(0, len(order), size), "teacher's states", disable=None):
                file.write(states(order[start : start + size]).cpu().view(torch.uint8).numpy())

    probe, lengths = states(order[:8]), [len(row.response_ids) if cut is None else len(row) for row in order]
    shape = sum(lengths), probe.size(-1)
    path = cache_path(args, "states", source, [cut, str(hw.dtype), args.teacher_quant], order, hw)
    if not hw.gather(path.exists())[0]:
        needed, free = math.prod(shape) * probe.element_size() / 1e9, shutil.disk_usage(path.parent).free / 1e9
        print(f"teacher's states: {needed:.2f} GB to {path}, where {free:.1f} GB are free")
        refuse(needed > free, f"--cache-teacher needs {needed:.2f} GB in {path.parent}: choose another --cache-dir")
        write_whole(path, fill, hw)
    file = torch.from_file(str(path), True, math.prod(shape), dtype=hw.dtype).view(shape)
    error = ((file[: len(probe)].to(hw.device) - probe).norm() / probe.norm()).item()
    limit = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(hw.dtype, 1e-4)  # another padding may round differently
    refuse(not error <= limit, f"--cache-teacher: {path} is {error:.0e} off what the teacher computes: delete it")
    views = dict(zip(map(id, order), file.split(lengths)))
    return [replace(row, states=views[id(row)]) for row in rows]


# Processes, disk, signals ---------------------------------------------------------------------------------------------

PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
out_of_memory = lambda e: isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)
on_signals = lambda handler: [signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)]


@dataclass
class Hardware:  # the device, the precision, and this process among those that torchrun started
    device: torch.device
    dtype: torch.dtype  # of autocast and of frozen weights
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def total(self, sums):  # {name: this process's sum, a tensor} -> the same over all processes, which have all names
        packed = torch.stack([sums[name].float() for name in sorted(sums)])
        if self.world > 1:
            dist.all_reduce(packed)
        return dict(zip(sorted(sums), packed))

    def gather(self, value):  # -> [the value of every process], everywhere; all wait for the last
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def now(self):  # seconds, when the device has done what it was asked for
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_gb(self):  # the allocator's peak on a GPU, the process's peak resident size elsewhere
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def pick_hardware(args):
    """Flags -> Hardware; --precision auto becomes what it stands for. Raises for a device that is not there."""
    name, world = args.device, int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and name == "cuda" else name
    device = torch.empty(1, device=name).device  # with an index, which torch.cuda.set_device asks for
    # On a CPU bf16 takes a sixth of float32's time with AMX, half of it with AVX-512's bf16, ten times it with neither.
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    auto = "bf16" if units.get("amx_bf16") or units.get("avx512_bf16") else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        auto = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.precision = auto if args.precision == "auto" else args.precision
    # Rows are never packed here; to see that, transformers would read a tensor back from the device in every forward.
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # objects go between CPUs
        atexit.register(dist.destroy_process_group)
    return Hardware(device, PRECISIONS[args.precision], dist.get_rank() if world > 1 else 0, world)


def report(log, wandb, phase, step, kind, metrics):
    """One dict of metrics, three readers: metrics.jsonl, wandb under --track, the console but for training."""
    record = dict(phase=phase, step=step) | {f"{kind}/{name}": float(value) for name, value in metrics.items()}
    log.write(json.dumps(record) + "\n")
    if wandb is not None:
        wandb.log(record)
    if kind == "dev":
        tqdm.write(f"{phase} step {step}, dev: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def save_checkpoint(folder, moving, stateful, scalars, state, best, hw):
    """All that training changes: weights, the best of them, optimizers, loss scaler, scalars, `state`. Keeps two."""
    saved = dict(weights=moving, best=best, scalars=scalars, state=json.dumps(state, default=vars),
                 stateful={name: each.state_dict() for name, each in stateful.items()})  # fmt: skip
    folder = folder / "checkpoints"
    write_whole(folder / f"step-{state['step']:08}.pt", functools.partial(torch.save, saved), hw)
    for path in sorted(folder.glob("*.pt"))[:-2] if hw.rank == 0 else ():
        path.unlink()


def load_checkpoint(folder, networks, stateful, scalars):
    """The inverse, of the newest checkpoint that is whole. -> (state, best), or None without one. Raises UserError."""
    there = sorted((folder / "checkpoints").glob("*.pt"), reverse=True)
    for path in there:
        with contextlib.suppress(zipfile.BadZipFile):
            if zipfile.ZipFile(path).testzip() is None:
                break
        print(f"{path} is damaged: the one before it is used", file=sys.stderr)
    else:
        return refuse(there, f"every checkpoint in {folder} is damaged: begin in another folder")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    networks.load_state_dict(saved["weights"], strict=False)
    for name, each in stateful.items():
        each.load_state_dict(saved["stateful"][name])
    scalars |= {name: value.to(scalars[name].device) for name, value in saved["scalars"].items()}
    state = json.loads(saved["state"], object_hook=lambda d: Example(**d) if "prompt_ids" in d else d)
    print(f"{folder}: goes on after step {state['step']}")
    return state, saved["best"]


def write_whole(path, write, hw):
    """The first process does write(temporary path), forces it to the disk and names it: never half there. All wait."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with blaming(f"cannot write {path}"):
        try:
            if hw.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(temporary)
                force_to_disk(*temporary.rglob("*"), temporary)
                if not path.is_dir():  # else another run was faster, with the same content
                    temporary.replace(path)
                force_to_disk(path.parent)
        finally:  # the disk is full, or another run was faster
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    hw.gather("written")


def force_to_disk(*paths):
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor), os.close(descriptor)


# main -----------------------------------------------------------------------------------------------------------------


def distil(args):
    """The whole job: data, warm starts, distillation, scores. Raises UserError."""
    with blaming(f"--device {args.device} is not usable here"):
        hw = pick_hardware(args)
    if hw.rank:  # one process speaks, and one writes
        sys.stdout = open(os.devnull, "w")
    refuse(args.shard and (hw.world == 1 or args.text == "mixture" or args.teacher_sft == "full"),
           "--shard needs several processes, --teacher-sft lora, and text of one network")  # fmt: skip
    pair = [pathlib.PurePath(name).name for name in (args.student, args.teacher)]
    stamp = hw.gather(time.strftime("%m%d-%H%M%S"))[0]
    args.output_dir = args.resume or args.output_dir or f"runs/{args.method}-{'-'.join(pair)}-s{args.seed}-{stamp}"
    folder = pathlib.Path(args.output_dir)
    refuse(hw.gather((folder / "student").exists() if args.resume else folder.exists())[0],
           f"{folder} holds a run: choose another --output-dir, or --resume one that has not ended")  # fmt: skip
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|fan_in_fan_out).*")  # of peft
    tokenizer = one_tokenizer(load_tokenizer(args.teacher, args), load_tokenizer(args.student, args))
    data = load_data(args, tokenizer)
    size = min(args.batch_size, len(data["train"]))
    refuse(size % hw.world, f"--batch-size {size} is no multiple of the {hw.world} processes")
    print(f"{args.method} on {hw.world} x {hw.device} in {hw.dtype}:", {name: len(rows) for name, rows in data.items()})
    write_whole(folder / "args.json", lambda path: path.write_text(json.dumps(asdict(args), indent=2) + "\n"), hw)
    wandb = None
    if args.track and hw.rank == 0:
        name = dict(project=os.environ.get("WANDB_PROJECT", "okd"), group="-from-".join(pair), name=folder.name)
        with blaming("cannot start wandb: set WANDB_MODE=offline, or leave --track out"):
            import wandb

            wandb.init(**name, id=folder.name, resume="allow", config=asdict(args), dir=folder)

    # Both learn the gold text, or are found where they were kept. A run that goes on has what it began with.
    record, rows, lora = folder / "models.json", data["train"], args.teacher_sft == "lora"
    if not hw.gather(record.exists())[0]:
        tune, source = functools.partial(fine_tuned, args, data["dev"], tokenizer, hw, folder), args.teacher
        if source == "demo":  # it knows its trade before it is fine-tuned on the rows that the student will see
            source = tune("teacher", source, data["pretraining"], 8, 1e-3, lora=False)["teacher"]
        used = tune("teacher", source, rows, args.teacher_sft_epochs, args.teacher_sft_lr, lora)
        used |= tune("student", args.student, rows, args.student_sft_epochs, args.student_sft_lr, lora=False)
        write_whole(record, lambda path: path.write_text(json.dumps(used)), hw)
    sources = json.loads(record.read_text())

    teacher = load_model(sources["teacher"], "teacher", args, hw.dtype, hw, dropout=False).requires_grad_(False)
    # With dropout MiniLLM's ratio q / q_when_sampled would be noise, which its clip turns into no gradient.
    student = load_model(sources["student"], "student", args, torch.float32, dropout=args.text != "mixture")
    refuse(args.max_length > min(positions(teacher), positions(student)),
           f"--max-length {args.max_length} is more than the positions of the teacher or the student")  # fmt: skip
    heads = {model.get_output_embeddings().weight.size(0): model for model in (teacher, student)}
    if len(heads) > 1:  # padded to two sizes
        print(f"a head of {max(heads)} rows is cut to the {min(heads)} that both have")
        heads[max(heads)].resize_token_embeddings(min(heads))
    if args.teacher_moves:
        teacher = add_lora(teacher, args, args.lora_top_layers, args.seed)
    teacher, student = place(teacher, hw, args.shard), place(student, hw)

    test = data["test"][: args.score_rows]
    rouge = functools.partial(score, args, tokenizer=tokenizer, rows=test, hw=hw)
    scores = dict(rouge_l_teacher=rouge(teacher), rouge_l_start=rouge(student)) if test else {}
    if args.text == "teacher":
        data["train"] = teacher_text(args, teacher, data["train"], tokenizer, hw, folder)
    if args.cache_teacher:
        data["train"] = with_states(args, teacher, sources["teacher"], data["train"], hw)
    end = train(args, student, teacher, data, tokenizer, hw, folder, wandb=wandb)
    scores |= dict(rouge_l=rouge(student)) if test else {}
    if hw.rank == 0:
        finish(args, folder, end | sources, scores, test, wandb)
        if args.teacher_moves:
            teacher.save_pretrained(folder / "teacher_lora", save_embedding_layers=False)
    write_whole(folder / "student", functools.partial(save_model, student, tokenizer), hw)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a run with a student has ended
    print(f"run: {folder}")


def finish(args, folder, end, scores, test, wandb):
    """The run's table, a block to grep, and the same numbers as the last record of metrics.jsonl and on wandb."""
    first, best, last = (end[look] or {} for look in ("first", "best", "last"))
    rouge = {name: mean for name, (mean, _) in scores.items()}
    print(f"\n{'':20}{'Rouge-L':>10}{'dev CE':>10}{'dev KL':>10}{'seconds':>10}")
    for name, *values in (
        ("teacher", rouge.get("rouge_l_teacher"), first.get("teacher_ce"), 0, end["teacher_s"]),
        ("student, start", rouge.get("rouge_l_start"), first.get("student_ce"), first.get("fkl"), end["student_s"]),
        (f"student, {args.method}", rouge.get("rouge_l"), best.get("student_ce"), best.get("fkl"), end["seconds"]),
    ):
        print(f"{name:20}" + "".join(f"{math.nan if value is None else value:10.3f}" for value in values))
    final = dict(steps=end["step"], distil_s=end["seconds"], sampling_s=end["sampling_s"],
                 tokens_per_s=end["tokens"] / end["seconds"], peak_memory_gb=end["peak_memory_gb"]) | rouge  # fmt: skip
    final |= {f"dev_{name}": best[name] for name in ("fkl", "student_ce", "rouge_l") if name in best}
    final |= dict(dev_rouge_l_last=last["rouge_l"], selected_step=best["step"]) if "rouge_l" in best else {}
    named = dict(method=args.method, seed=args.seed, teacher=end["teacher"]) | final
    print("\n".join(f"{name}: {value}" for name, value in named.items()))
    with open(folder / "metrics.jsonl", "a") as log:
        report(log, wandb, "final", end["step"], "final", final)
    if wandb is not None:
        rows = zip(test[:20], *(answers for _, answers in scores.values()))
        rows = [[row.prompt, row.references[0], *answers] for row, *answers in rows]
        wandb.log({"samples": wandb.Table(["prompt", "reference", *scores], rows)})
        wandb.finish()


def command(job, program):
    """Run the job. What the user can mend, and what a disk or a device refuses, is one line and exit code 2."""
    try:
        job()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not (isinstance(error, (UserError, OSError)) or out_of_memory(error)):
            raise
        hint = "out of memory: lower --micro-batch-tokens (training) or --sample-batch-size (sampling and scoring): "
        print(f"{program}: {hint * out_of_memory(error)}{' '.join(str(error).split())[:400]}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    command(lambda: distil(parse(sys.argv[1:] if argv is None else argv)), "okd.py")


if __name__ == "__main__":
    main()
