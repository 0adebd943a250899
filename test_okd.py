"""Tests of okd.py and eval.py: tiny models, no downloads, no GPU."""

import contextlib
import copy
import dataclasses
import errno
import gzip
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields

# HF_HUB_OFFLINE is read when the hub's library is imported.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")

import huggingface_hub
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
import wandb
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from wandb.proto.wandb_internal_pb2 import Record

import eval as okd_eval
import okd

torch.set_num_threads(1)

ROOT = pathlib.Path(__file__).parent
CPU = okd.pick_hardware("cpu", "fp32")
BF16 = okd.pick_hardware("cpu", "bf16")
FP16 = okd.pick_hardware("cpu", "fp16")
VOCAB_SIZE = 257  # of the demo's tokenizer: bytes and EOS
EOS = 256

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,  # deeper than the decoder
    "num_attention_heads": 4,
    "image_size": 28,
}
GEMMA4 = {
    **SHAPE,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
MORE_SHAPE = {  # what a family needs besides SHAPE
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "llama4_text": {**MOE, "intermediate_size_mlp": 48},
    "mixtral": MOE,
    "qwen3_moe": {**MOE, "num_experts_per_tok": 2},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3": {"text_config": SHAPE, "vision_config": VISION},
    "granite": {"logits_scaling": 4.0},
    "deepseek_v3": MLA,
    "gpt_oss": MOE,
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "lm_head_multiplier": 0.5,
    },
    "gemma4": {"text_config": GEMMA4, "vision_config": VISION, "audio_config": None},
}

# -----------------------------------------------------------------------------
# Models


def tiny_config(family, **changes):
    shape = {**SHAPE, **MORE_SHAPE.get(family, {}), **changes}
    return transformers.AutoConfig.for_model(family, **shape)


def tiny_model(family="gpt2", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():  # a fresh head is nearly uniform: spread it, so that errors show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def with_lora(model, std=0.2, rank=4, scale=2.0, seed=0):
    """LoRA whose B is filled, as if it had been trained."""
    model = okd.add_lora(model, rank, scale, seed=seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def tiny_pair(args, family="gpt2", lora_std=0.0, dtype=torch.float32):
    """(student, teacher)"""
    student = tiny_model(family, seed=1)
    teacher = tiny_model(family, seed=2, dtype=dtype).requires_grad_(False)
    if args.teacher_moves:
        teacher = with_lora(teacher, lora_std, args.lora_rank, args.lora_scale, args.seed)
    return student, teacher


def plain_logits(model, rows):
    """(N, V) logits before every response token, from one unpadded forward per row."""
    logits = []
    for row in rows:
        input_ids = torch.tensor([row.prompt_ids + row.response_ids])
        first = len(row.prompt_ids) - 1
        logits.append(model(input_ids=input_ids, use_cache=False).logits[0, first:-1].float())
    return torch.cat(logits)


def plain_log_probs(model, rows):
    return plain_logits(model, rows).log_softmax(-1)


def changed(before, after):
    """Names of the weights in which two models differ."""
    after = after.state_dict()
    return {name for name, value in before.state_dict().items() if not value.equal(after[name])}


def gradients_of(*networks):
    params = [p for network in networks for p in network.parameters()]
    return [p.grad.clone() for p in params if p.grad is not None]


def gradient(function, at):
    at = at.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(at).sum(), at)
    return result


# -----------------------------------------------------------------------------
# Arguments, data, runs

SMALL = (
    "--teacher t --student s --batch-size 4 --epochs 99 --log-every 1 --eval-rows 8 "
    "--score-rows 2 --lora-rank 4 --max-length 96 --max-new-tokens 6"
)


def make_args(flags="", **changes):
    """Args from command-line flags, as a text or by name, so that parsing is tested, too."""
    argv = f"{SMALL} {flags}".split()
    for name, value in changes.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return okd.parse_args(argv)


def make_row(prompt_ids, response_ids):
    return okd.Example(1, "", [""], prompt_ids, response_ids, EOS)


def user_error(message):
    return pytest.raises(okd.UserError, match=message)


def cases(table):
    """parametrize by a table with | between its cells; its first line names the columns."""
    names, *rows = [re.split(r"\s*\|\s*", line.strip()) for line in table.strip().splitlines()]
    return pytest.mark.parametrize(names, rows)


def blocks(name, text):
    """parametrize by blocks of lines, each behind "# id"; a backslash continues a line."""
    parts = text.replace("\\\n", "").strip("# \n").split("\n\n# ")
    ids, values = zip(*[part.split("\n", maxsplit=1) for part in parts], strict=True)
    return pytest.mark.parametrize(name, values, ids=ids)


two_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def labels_of(rows):
    return torch.tensor(sum([row.response_ids for row in rows], []))


@pytest.fixture(scope="session")
def tokenizer():
    return okd.load_tokenizer("demo")


@pytest.fixture(scope="session")
def examples(tokenizer):
    lines = map(json.dumps, okd.demo_rows(40, seed=1))
    return okd.read_rows("demo", lines, tokenizer, 96, 96)


@pytest.fixture
def train(examples, tokenizer, tmp_path_factory):
    """train(args, ...) trains tiny networks; returns (student, teacher, metrics.jsonl)."""

    def run(args, networks=None, num_steps=2, hw=CPU, rows=examples, dev_rows=(), run_dir=None):
        student, teacher = networks or tiny_pair(args)
        run_dir = run_dir or tmp_path_factory.mktemp("run")
        args = dataclasses.replace(args, max_steps=num_steps)
        data = okd.Data(tokenizer, [EOS], rows, list(dev_rows), [])
        state = okd.TrainState(phi=args.sgo_fraction)
        okd.train(args, state, student, teacher, data, hw, run_dir)
        return student, teacher, read_metrics(run_dir)

    return run


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(run_dir):
    return read_jsonl(run_dir / "metrics.jsonl")


@pytest.fixture
def calls_of(monkeypatch):
    """calls_of(name): (arguments, options, result) of all calls of okd's `name` from now on."""

    def record(name, owner=okd):
        function = getattr(owner, name)
        calls = []

        def recorded(*args, **options):
            result = function(*args, **options)
            calls.append((args, options, result))
            return result

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return record


# -----------------------------------------------------------------------------
# Divergences

Z_P = torch.tensor(
    [
        [0.5, 1.5, 2, -0.5, -3],
        [-1, 0.4, 2.2, 0.1, 0.3],
        [-2, 1, 0.8, 0.6, 0],
    ],
    dtype=torch.float64,
)
Z_Q = torch.tensor(
    [
        [1, 2, 0.5, -1, 0],
        [0.2, -0.3, 1.5, 0.7, -2],
        [3, 0, -1, 0.5, 0.25],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([2, 2, 1])
LOG_P = Z_P.log_softmax(-1)
LOG_Q = Z_Q.log_softmax(-1)
P = LOG_P.exp()
Q = LOG_Q.exp()
KL_PQ = kl_divergence(Categorical(P), Categorical(Q))
KL_QP = kl_divergence(Categorical(Q), Categorical(P))
TAID_T = 0.6
TAID_TARGET = (0.4 * Z_Q + 0.6 * Z_P).softmax(-1)

every_divergence = pytest.mark.parametrize("name", okd.DIVERGENCES)


def random_logits(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def divergence(name, z_p, z_q):
    parameters = {"t": TAID_T} if name == "taid" else {}
    return okd.DIVERGENCES[name](z_p.log_softmax(-1), z_q.log_softmax(-1), **parameters)


GOLDEN = """
line         | mean
fkl          | 0.881736
rkl          | 1.235699
frkl         | 1.058718
jsd  0.1     | 0.074367
jsd  0.5     | 0.198544
jsd  0.9     | 0.088625
tvd          | 0.494317
sfkl 0.1     | 0.639753
srkl 0.1     | 0.693332
akl  0.5     | 1.111744
ab   0.2 0.7 | 1.216299
ab   0.5 0.5 | 0.896927
taid 0.4     | 1.531312
taid 1.0     | 2.064631
"""


def value_of(line):
    """A divergence with its parameters, as "jsd 0.1" -> its values, (3,)."""
    name, *parameters = line.split()
    return okd.DIVERGENCES[name](LOG_P, LOG_Q, *map(float, parameters))


@cases(GOLDEN)
def test_divergence_has_the_golden_mean(line, mean):
    assert value_of(line).mean().item() == pytest.approx(float(mean), abs=1e-6)


@pytest.mark.parametrize("line", ["fkl", "jsd 0", "sfkl 0", "ab 1 0"])
def test_this_divergence_is_kl_of_p(line):
    assert_close(value_of(line), KL_PQ)


@pytest.mark.parametrize("line", ["rkl", "jsd 1", "srkl 0", "ab 0 1"])
def test_this_divergence_is_kl_of_q(line):
    assert_close(value_of(line), KL_QP)


@every_divergence
def test_divergence_is_least_at_the_teacher(name):
    def loss(z_q):
        return divergence(name, Z_P, z_q)

    least = Categorical(P).entropy() if name == "taid" else torch.zeros_like(KL_PQ)
    assert_close(loss(Z_P), least)
    assert_close(gradient(loss, Z_P), torch.zeros_like(Z_P), atol=1e-12, rtol=0)


@every_divergence
def test_divergence_of_sharp_distributions_is_finite(name):
    peaks = 1e4 * torch.eye(7)
    z_p = peaks[[1, 1]]
    z_q = peaks[[1, 4]]

    def loss(z):
        return divergence(name, z_p, z)

    assert loss(z_q).isfinite().all()
    assert gradient(loss, z_q).isfinite().all()


@pytest.mark.parametrize("name", sorted(okd.DIVERGENCES.keys() - {"akl", "taid"}))
def test_gradients_are_those_of_finite_differences(name):
    z_p = random_logits(3, 6, seed=3).requires_grad_()
    z_q = random_logits(3, 6, seed=4).requires_grad_()

    def loss(z_p, z_q):
        return divergence(name, z_p, z_q)

    assert torch.autograd.gradcheck(loss, (z_p, z_q))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fkl", Q - P),
        ("rkl", Q * (LOG_Q - LOG_P - KL_QP[:, None])),
        ("taid", Q - TAID_TARGET),
    ],
)
def test_gradient_in_q_is_the_closed_form(name, expected):
    def loss(z):
        return divergence(name, Z_P, z)

    assert_close(gradient(loss, Z_Q), expected)


def test_ab_at_beta_zero_is_its_limit():
    limit = okd.ab(LOG_P, LOG_Q, 0.6, 1e-7)
    assert_close(okd.ab(LOG_P, LOG_Q, 0.6, 0), limit, rtol=1e-5, atol=0)


def test_akl_weighs_by_the_gaps_as_constants():
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    log_q = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()

    def akl(z):
        return okd.akl(log_p, z.log_softmax(-1))

    def expected(z):  # gaps: .3 + .1 over the head, the first two tokens, .1 + .1 over the tail
        log_q = z.log_softmax(-1)
        return (2 * okd.fkl(log_p, log_q) + okd.rkl(log_p, log_q)) / 3

    assert_close(gradient(akl, log_q), gradient(expected, log_q))


def test_taid_schedule_follows_its_rule():
    taid = okd.TAID_START
    t = 0.4
    trend = 0.0
    previous = 3.0  # the first step has no change yet
    for step, loss in enumerate([3.0, 2.5, 2.6, 1.0]):
        taid = okd.taid_schedule(torch.as_tensor(taid), torch.tensor(loss), progress=step / 10)
        trend = 0.99 * trend + 0.01 * (previous - loss) / previous
        faster = t + 5e-4 / (1 + math.exp(-trend)) * (1 - t)
        t = max(0.4 + 0.6 * step / 10, faster)
        previous = loss
        assert taid.tolist() == pytest.approx([t, trend, loss], abs=1e-6)


# -----------------------------------------------------------------------------
# Losses

LOG_P0 = random_logits(3, 5, seed=5).log_softmax(-1)


def test_gradient_at_a_temperature_keeps_its_size():
    def loss(z):
        return okd.student_loss(LOG_P, z.log_softmax(-1), LABELS, temperature=2.0)

    soft_p = (Z_P / 2).softmax(-1)
    soft_q = (Z_Q / 2).softmax(-1)
    assert_close(gradient(loss, Z_Q), 2 * (soft_q - soft_p))


def test_student_loss_weighs_divergence_and_cross_entropy():
    loss = okd.student_loss(LOG_P, LOG_Q, LABELS, "jsd", {"beta": 0.3}, ce_weight=0.2)
    expected = 0.8 * okd.jsd(LOG_P, LOG_Q, 0.3) + 0.2 * okd.cross_entropy(LOG_Q, LABELS)
    assert_close(loss, expected)


PARAMETERS = """
flags                                         | expected
--divergence jsd --beta 0.3                   | {"beta": 0.3}
--divergence srkl --skew 0.4                  | {"skew": 0.4}
--divergence ab --ab-alpha 0.5 --ab-beta 0.6  | {"alpha": 0.5, "beta": 0.6}
--divergence taid                             | {"t": 0.6}
"""


@cases(PARAMETERS)
def test_flags_reach_their_divergence(flags, expected):
    assert okd.divergence_parameters(make_args(flags), TAID_T) == json.loads(expected)


def test_teacher_loss_is_equation_16_with_anchor():
    loss = okd.teacher_loss(LOG_P, LOG_Q, LOG_P0, LABELS, 0.3, 0.4, temperature=2.0)
    p, q, p0 = [Categorical(logits=z / 2) for z in (LOG_P, LOG_Q, LOG_P0)]
    gold = okd.cross_entropy(LOG_P, LABELS)
    expected = 0.7 * gold + 4 * (0.3 * kl_divergence(q, p) + 0.4 * kl_divergence(p0, p))
    assert_close(loss, expected)


@pytest.mark.parametrize(("alpha", "anchor"), [(0.0, 0.0), (1.0, 0.0), (0.35, 0.7)])
def test_teacher_moves_towards_the_mixture(alpha, anchor):
    gold = torch.nn.functional.one_hot(LABELS, 5)
    mixture = ((1 - alpha) * gold + alpha * Q + anchor * LOG_P0.exp()) / (1 + anchor)

    def loss(z):
        return okd.teacher_loss(z.log_softmax(-1), LOG_Q, LOG_P0, LABELS, alpha, anchor)

    assert_close(gradient(loss, Z_P), (1 + anchor) * (P - mixture))


def test_policy_gradient_is_that_of_the_expected_reward():
    z_p, z_q, rewards = random_logits(3, 2, seed=6) / 10
    tokens = torch.tensor([0, 1])  # the whole vocabulary, so an expectation is a weighted sum
    log_q = z_q.log_softmax(-1)
    log_mixture = okd.mix(z_p.log_softmax(-1), log_q, okd.TEACHER_SHARE)
    weights = (log_q - log_mixture).exp()

    def expected_loss(z):  # over tokens drawn from the mixture, corrected by importance weights
        log_probs = z.log_softmax(-1).expand(2, 2)
        losses = okd.policy_loss(log_probs, tokens, rewards, log_q, weights)
        return (log_mixture.exp() * losses).sum()

    def expected_reward(z):  # over tokens drawn from q
        return (z.softmax(-1) * rewards).sum()

    assert_close(gradient(expected_loss, z_q), -gradient(expected_reward, z_q))


CLIPPED = """
advantage | weight | loss | moves
 1        | 1.5    | -1.2 | False
 1        | 0.5    | -0.5 | True
-1        | 1.5    |  1.5 | True
-1        | 0.5    |  0.8 | False
"""


@cases(CLIPPED)
def test_policy_loss_is_clipped_where_that_enlarges_it(advantage, weight, loss, moves):
    def policy_loss(z):  # q has not moved from 0.5: the ratio is the weight
        log_q = z.log_softmax(-1)
        values = (float(advantage), math.log(0.5), float(weight))
        return okd.policy_loss(log_q, torch.tensor([0]), *values)

    z = torch.zeros(1, 2)
    assert policy_loss(z).item() == pytest.approx(float(loss))
    assert str(bool(gradient(policy_loss, z).any())) == moves


# -----------------------------------------------------------------------------
# The method table


METHODS = """
sft       fkl   data      False  1.0  0.0
fkl       fkl   data      False  0.0  0.0
rkl       rkl   data      False  0.0  0.0
frkl      frkl  data      False  0.0  0.0
jsd       jsd   data      False  0.0  0.0
tvd       tvd   data      False  0.0  0.0
sfkl      sfkl  data      False  0.0  0.0
srkl      srkl  data      False  0.0  0.0
akl       akl   data      False  0.0  0.0
ab        ab    data      False  0.0  0.0
taid      taid  data      False  0.0  0.0
seqkd     fkl   teacher   False  1.0  0.0
imitkd    fkl   student   False  0.0  1.0
gkd       jsd   student   False  0.0  0.5
opd       rkl   student   False  0.0  1.0
distillm  srkl  adaptive  False  0.0  0.0
minillm   rkl   mixture   False  0.0  0.0
okd       fkl   data      True   0.0  0.0
"""


@pytest.mark.parametrize("line", METHODS.strip().splitlines())
def test_method_sets_the_columns_of_its_row(line):
    method, *row = line.split()
    args = make_args(method=method)
    names = ("divergence", "text", "teacher_moves", "student_ce_weight", "sgo_fraction")
    assert [str(getattr(args, name)) for name in names] == row


LABELLED = """
flags                                         | label
--method fkl --temperature 2                  | fkl temperature=2.0
--method gkd --sgo-fraction 0.5               | gkd
--divergence jsd --beta 0.1                   | okd divergence=jsd beta=0.1
--method fkl --seed 3 --micro-batch-tokens 9  | fkl
"""


@cases(LABELLED)
def test_label_names_what_differs_from_the_defaults(flags, label):
    args = okd.parse_args(["--teacher", "t", *flags.split()])
    assert okd.run_label(args) == label


METRICS = """
phase step
train/student_loss train/student_grad_norm train/lr train/phi train/loss_scale
train/sampling_s train/process_peak_gb train/tokens train/training_s train/tokens_per_s
dev/fkl dev/rkl dev/student_ce dev/teacher_ce dev/frozen_teacher_ce
dev/student_entropy dev/teacher_entropy dev/top1_agreement dev/drift
"""
OWN_METRICS = {"okd": "train/teacher_loss train/teacher_grad_norm", "taid": "train/taid_t"}


@two_families
@pytest.mark.parametrize("method", okd.METHODS)
def test_method_trains_and_reports_as_all_do(method, family, train, examples):
    args = make_args("--select last --eval-every 1 --max-new-tokens 4", method=method)
    student, _, records = train(args, tiny_pair(args, family), dev_rows=examples[:3])
    assert changed(tiny_model(family, seed=1), student) == set(student.state_dict())
    found = set()
    for record in records:
        assert all(math.isfinite(value) for name, value in record.items() if "/" in name)
        found |= record.keys()
    assert found == set((METRICS + OWN_METRICS.get(method, "")).split())


# -----------------------------------------------------------------------------
# Batches


def test_labels_are_shifted_and_eos_is_a_target():
    batch = okd.collate([make_row([1, 2], [3, 0]), make_row([1], [4])], "cpu")
    # Padding is 0, too, which is EOS here: it is told apart by lengths, not by ids.
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [1, 4, 0, 0]]
    assert batch.labels.tolist() == [3, 0, 4]
    assert batch.positions.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("num_rows", "longest", "max_tokens", "sizes"),
    [
        (52, 16, 9999, [52, 1]),  # 520 tokens, and 16 is more than 1.5 times 10
        (52, 15, 9999, [53]),
        (51, 16, 9999, [52]),  # 510 tokens are too few for a micro-batch of their own
        (2, 10, 1, [1, 1, 1]),  # rows above the limit
    ],
)
def test_micro_batches_are_cut_by_length(num_rows, longest, max_tokens, sizes):
    rows = [make_row([1], [2] * 9)] * num_rows + [make_row([1], [2] * (longest - 1))]
    batches = okd.micro_batches(rows, max_tokens, CPU)
    assert [len(batch.input_ids) for batch in batches] == sizes


def test_processes_share_rows_in_equally_many_micro_batches(examples):
    shares = []
    for rank in range(3):
        hw = dataclasses.replace(CPU, rank=rank, world=3)
        shares.append(list(okd.micro_batches(examples[:39], 100, hw)))
    assert len(shares[0]) == len(shares[1]) == len(shares[2])
    assert all(batch.input_ids.numel() <= 100 for batch in sum(shares, []))
    labels = torch.cat([batch.labels for batch in sum(shares, [])])
    assert labels.sort()[0].equal(labels_of(examples[:39]).sort()[0])


def epoch_of(rows, batch_size, epoch, seed=1):
    steps = len(rows) // batch_size
    first = epoch * steps
    return [okd.batch_of(rows, batch_size, seed, step) for step in range(first, first + steps)]


def test_each_epoch_is_a_permutation_of_its_own():
    orders = set()
    for epoch, seed in ((0, 1), (1, 1), (0, 2), (0, 1)):
        orders.add(tuple(sum(epoch_of(range(40), 10, epoch, seed), [])))
    assert [sorted(order) for order in orders] == [list(range(40))] * 3


def test_over_epochs_every_response_token_weighs_the_same():
    """With rows of like length in a batch, a token of a long row would weigh 30 times less."""
    rows = [[2] * length for length in range(1, 41)]
    weights = [0.0] * 41
    for epoch in range(100):
        for batch in epoch_of(rows, 8, epoch):
            for row in batch:
                weights[len(row)] += 1 / sum(map(len, batch))
    for length in range(1, 41):  # beside seven other rows of 20.5 tokens in the mean
        assert weights[length] == pytest.approx(100 / (length + 7 * 20.5), rel=0.15)


# -----------------------------------------------------------------------------
# One micro-batch against plain forwards


def backpropagate(args, student, teacher, rows, hw=CPU):
    """One micro-batch by okd -> the means of its losses."""
    batch = okd.collate(rows, "cpu")
    num_tokens = len(batch.labels)
    scaler = okd.make_scaler(hw)
    sums = okd.train_micro_batch(args, student, teacher, batch, hw, scaler, num_tokens, TAID_T)
    return [total / num_tokens for total in sums.values()]


def plain_losses(args, student, teacher, rows):
    """Means of L_S and L_T over the response tokens."""
    labels = labels_of(rows)
    log_p = plain_log_probs(teacher, rows)
    log_q = plain_log_probs(student, rows)
    with torch.no_grad(), teacher.disable_adapter():
        log_p0 = plain_log_probs(teacher, rows)
    parameters = okd.divergence_parameters(args, TAID_T)
    weights = (args.student_ce_weight, args.temperature)
    student_loss = okd.student_loss(log_p, log_q, labels, args.divergence, parameters, *weights)
    weights = (args.alpha, args.anchor, args.temperature)
    teacher_loss = okd.teacher_loss(log_p, log_q, log_p0, labels, *weights)
    return student_loss.mean(), teacher_loss.mean()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(okd, "LOGITS_PER_CHUNK", 7 * VOCAB_SIZE)  # seven tokens


ALL_LOSSES = "--student-ce-weight 0.25 --temperature 2 --alpha 0.35 --anchor 0.1 --beta 0.3"
CASES = [("gpt2", name, CPU) for name in okd.DIVERGENCES]
CASES += [("llama", "fkl", CPU), ("gemma2", "fkl", CPU), ("gpt2", "fkl", BF16)]
CASES += [("llama", "fkl", BF16)]


@pytest.mark.parametrize(("family", "name", "hw"), CASES)
def test_chunked_gradients_are_those_of_plain_forwards(family, name, hw, examples, small_chunks):
    args = make_args(ALL_LOSSES, divergence=name)
    networks = tiny_pair(args, family, lora_std=0.1, dtype=hw.dtype)
    losses = backpropagate(args, *networks, examples[:5], hw)
    found = gradients_of(*networks)

    for network in networks:
        network.zero_grad()
    with hw.autocast():
        expected = plain_losses(args, *networks, examples[:5])
    sum(expected).backward()
    tolerance = 1e-4 if hw is CPU else 0.03
    assert_close(losses, [loss.detach() for loss in expected], rtol=tolerance, atol=0)
    for ours, plain in zip(found, gradients_of(*networks), strict=True):
        assert (ours - plain).norm() <= tolerance * plain.norm()


@pytest.fixture
def kept_gradients(monkeypatch):
    """The gradients that an optimizer stepped on are left."""

    def keep(optimizer):
        pass

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", keep)


@pytest.mark.parametrize("method", ["sft", "okd"])
@pytest.mark.parametrize("tokens", [1, 60, 90])
def test_split_into_micro_batches_changes_no_gradient(method, tokens, train, kept_gradients):
    gradients = []
    for max_tokens in (4096, tokens):
        flags = f"--method {method} --batch-size 8 --anchor 0.5 --max-grad-norm 0"
        *networks, _ = train(make_args(flags, micro_batch_tokens=max_tokens), num_steps=1)
        gradients.append(gradients_of(*networks))
    assert_close(gradients[1], gradients[0], atol=2e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "tokens", "num_tokens", "size"),
    [
        ("cpu", 5, 11, 6),  # no remainder of one
        ("cpu", 0, 2, 1),
        ("cuda", 200, 3200, 1600),
        ("mps", 5, 2048, 1024),
    ],
)
def test_tokens_make_two_chunks(device, tokens, num_tokens, size, monkeypatch):
    monkeypatch.setattr(okd, "LOGITS_PER_CHUNK", tokens * VOCAB_SIZE)
    hw = okd.Hardware(torch.device(device), torch.float32)
    chunks = okd.split_into_chunks(num_tokens, tiny_model(), hw)
    assert chunks == [slice(0, size), slice(size, 2 * size)]


def test_head_sees_one_chunk_at_a_time(examples, small_chunks, calls_of):
    calls = calls_of("log_probs", okd.Trunk)
    args = make_args("--method fkl")
    backpropagate(args, *tiny_pair(args), examples[:5])
    assert max(len(log_probs) for *_, log_probs in calls) <= 7 * 1.5


def test_evaluation_is_the_mean_of_plain_metrics(examples):
    args = make_args("--micro-batch-tokens 60 --select last")
    student, teacher = tiny_pair(args, lora_std=0.1)
    rows = examples[:8]
    found = okd.evaluate(args, student, teacher, rows, None, CPU)
    p = Categorical(logits=plain_logits(teacher, rows))
    q = Categorical(logits=plain_logits(student, rows))
    with teacher.disable_adapter():
        p0 = Categorical(logits=plain_logits(teacher, rows))
    labels = labels_of(rows)
    expected = {
        "fkl": kl_divergence(p0, q),
        "rkl": kl_divergence(q, p0),
        "student_ce": -q.log_prob(labels),
        "teacher_ce": -p.log_prob(labels),
        "frozen_teacher_ce": -p0.log_prob(labels),
        "student_entropy": q.entropy(),
        "teacher_entropy": p.entropy(),
        "top1_agreement": (p0.mode == q.mode).float(),
        "drift": kl_divergence(p0, p),
    }
    means = {name: values.mean().item() for name, values in expected.items()}
    assert found == pytest.approx(means, rel=1e-4)


def test_score_is_the_mean_rouge_of_answers(examples, tokenizer, monkeypatch):
    def generate(*_):
        return [examples[0].response_ids, [EOS]]

    monkeypatch.setattr(okd, "generate", generate)
    data = okd.Data(tokenizer, [EOS], [], [], [])
    assert okd.score(make_args(), None, examples[:2], data, CPU) == pytest.approx(50.0)


def test_end_token_is_no_part_of_an_answer(tokenizer, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<done>"])  # not marked special, so that decode() writes it
    end = tokenizer.convert_tokens_to_ids("<done>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<done>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    row = okd.read_row({"messages": messages}, tokenizer)
    assert (row.references, row.end_id) == (["yes"], end)
    monkeypatch.setattr(okd, "generate", lambda *_: [[*b"no", end]])
    data = okd.Data(tokenizer, [EOS, end], [], [], [])
    assert okd.score(make_args(), None, [row], data, CPU) == 0.0


# -----------------------------------------------------------------------------
# Cached states


def cached(rows, teacher, hw=CPU):
    rows = [dataclasses.replace(row) for row in rows]
    okd.cache_states(teacher, rows, hw)
    return rows


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT narrows its last states
def test_cached_states_are_those_before_response_tokens(family, examples):
    teacher = tiny_model(family)
    row = cached(examples, teacher)[7]
    states = teacher.model(torch.tensor([row.prompt_ids + row.response_ids])).last_hidden_state[0]
    assert_close(row.states, states[len(row.prompt_ids) - 1 : -1].detach())


@pytest.mark.parametrize("method", ["fkl", "taid", "gkd"])
def test_cached_states_change_no_loss(method, train, examples):
    args = make_args("--lr 1e-3 --max-new-tokens 3", method=method)
    losses = []
    for rows in (examples, cached(examples, tiny_pair(args)[1])):
        _, _, records = train(args, num_steps=6, rows=rows)
        losses.append([record["train/student_loss"] for record in records])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_cached_teacher_runs_for_sampled_text_alone(train, examples, calls_of):
    args = make_args("--method gkd --max-new-tokens 3")
    student, teacher = tiny_pair(args)
    rows = cached(examples, teacher)
    sampled = calls_of("respond", okd.Sampler)
    modes = modes_of(teacher)
    train(args, (student, teacher), num_steps=8, rows=rows)
    assert 8 > len(modes) == len(sampled) > 0


# -----------------------------------------------------------------------------
# Who moves


def test_of_a_moving_teacher_its_module_moves(train):
    args = make_args()
    _, teacher, _ = train(args)
    module = {name for name in teacher.state_dict() if "lora_" in name}
    assert changed(tiny_pair(args)[1], teacher) == module


def test_of_a_frozen_teacher_nothing_moves(train):
    _, teacher, _ = train(make_args("--method fkl"))
    assert changed(tiny_model(seed=2), teacher) == set()


def modes_of(network):
    """A list of (in train mode, in autocast) of every forward pass from now on."""
    modes = []

    def record(block, inputs):
        modes.append((block.training, torch.is_autocast_enabled("cpu")))

    okd.blocks_of(network)[0].register_forward_pre_hook(record)
    return modes


@pytest.mark.parametrize(
    ("method", "student_mode", "teacher_mode"),
    [
        ("fkl", (True, True), (False, False)),  # a frozen teacher is in bfloat16 already
        ("okd", (True, True), (False, True)),
        ("minillm", (False, True), (False, False)),  # without dropout its ratio is exact
    ],
)
def test_teacher_has_no_dropout_and_frozen_no_autocast(method, student_mode, teacher_mode, train):
    args = make_args(method=method)
    networks = tiny_pair(args, dtype=torch.bfloat16)
    modes = [modes_of(network) for network in networks]
    train(args, networks, num_steps=1, hw=BF16)
    assert modes[0][-1] == student_mode
    assert modes[1][-1] == teacher_mode


# -----------------------------------------------------------------------------
# Optimization

every_precision = pytest.mark.parametrize("hw", [CPU, BF16, FP16], ids=["fp32", "bf16", "fp16"])


def test_learning_rate_rises_and_falls_linearly():
    by_hand = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 96 / 97, 51: 49 / 97, 99: 1 / 97}
    found = {step: okd.learning_rate(step, 100, 1.0) for step in by_hand}
    assert found == pytest.approx(by_hand)


def test_each_network_has_its_own_learning_rate(train, calls_of):
    calls = calls_of("optimizer_step")
    train(make_args("--lr 1e-3 --teacher-lr-ratio 0.2"), num_steps=2)
    assert [args[2] for args, *_ in calls] == pytest.approx([1e-3, 2e-4, 5e-4, 1e-4])


def test_norms_and_biases_do_not_decay():
    student = tiny_model()
    decayed, others = okd.make_optimizer(student, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for name, parameter in student.named_parameters():
        group = others if name.endswith("bias") or "ln_" in name else decayed
        assert any(parameter is each for each in group["params"])


def take_step(gradient, hw):
    """One step on weights of 1 with lr 0.5 and decay 0.2 -> weights, norm."""
    layer = torch.nn.Linear(len(gradient), 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    scaler = okd.make_scaler(hw)
    optimizer = okd.make_optimizer(layer, weight_decay=0.2)
    scaler.scale(layer(torch.tensor(gradient))).backward()
    norm = okd.optimizer_step(optimizer, scaler, 0.5, 1.0, hw)
    assert layer.weight.grad is None
    return layer.weight[0].tolist(), norm.item()


@every_precision
def test_first_step_of_adamw_is_the_learning_rate(hw):
    weights, norm = take_step([3.0, -4.0], hw)
    assert weights == pytest.approx([0.9 - 0.5, 0.9 + 0.5])
    assert norm == pytest.approx(5.0)  # before clipping, and not scaled


@every_precision
def test_a_gradient_that_is_not_finite_is_skipped(hw):
    weights, _ = take_step([math.nan, 1.0], hw)
    assert weights == [1.0, 1.0]


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0])
def test_each_network_is_clipped_by_itself(max_grad_norm, train, kept_gradients):
    *networks, records = train(make_args(max_grad_norm=max_grad_norm), num_steps=1)
    for network, name in zip(networks, ("student", "teacher"), strict=True):
        norms = [grad.norm() for grad in gradients_of(network)]
        before = records[0][f"train/{name}_grad_norm"]
        assert before > 2e-3
        assert math.hypot(*norms) == pytest.approx(max_grad_norm or before, rel=1e-3)


def test_training_survives_a_gradient_that_is_not_finite(train, monkeypatch):
    student_loss = okd.student_loss
    factors = iter([1.0, math.nan, 1.0, 1.0])

    def broken_once(*args):
        return student_loss(*args) * next(factors)

    monkeypatch.setattr(okd, "student_loss", broken_once)
    _, _, records = train(make_args("--method taid"), num_steps=4)
    assert [math.isnan(record["train/student_loss"]) for record in records] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("num_rows", "broken", "name"),
    [(0, 0, "student_loss"), (2, 0, "student_ce"), (2, 1, "teacher_ce")],
)
def test_first_loss_of_nan_is_the_users_error(num_rows, broken, name, train, examples):
    args = make_args("--method fkl --select last")
    networks = tiny_pair(args)
    networks[broken].lm_head.weight.data.fill_(math.nan)
    with user_error(f"the first {name} is nan: some weights are not finite"):
        train(args, networks, dev_rows=examples[:num_rows])


@every_precision
def test_mixed_precision_keeps_float32_weights(hw, train):
    args = make_args()
    student, teacher, _ = train(args, tiny_pair(args, dtype=hw.dtype), hw=hw)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    for name, weight in teacher.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else hw.dtype)


@two_families
@pytest.mark.parametrize("hw", [BF16, FP16], ids=["bf16", "fp16"])
def test_mixed_precision_follows_float32(hw, family, train, examples):
    args = make_args("--method okd --lr 1e-3 --select last --eval-every 3")
    values = []
    for each in (CPU, hw):
        networks = tiny_pair(args, family, dtype=each.dtype)
        _, _, records = train(args, networks, 3, each, dev_rows=examples[:4])
        items = [item for record in records for item in record.items()]
        values.append([value for name, value in items if name.endswith(("_loss", "_ce"))])
    assert values[1] == pytest.approx(values[0], rel=0.02)


@pytest.mark.parametrize("method", ["okd", "taid", "akl", "sft"])
def test_nothing_is_read_back_between_reports(method, train, calls_of, monkeypatch):
    """Tensors of the meta device have no values: reading one back fails."""

    def plain_optimizer(model, weight_decay):  # a fused one needs a real device
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def no_scaler(hw):
        return torch.amp.GradScaler(enabled=False)

    def no_autocast(*_, **__):
        return contextlib.nullcontext()

    hw = okd.Hardware(torch.device("meta"), torch.float32)
    hw.now = time.perf_counter
    monkeypatch.setattr(okd, "make_optimizer", plain_optimizer)
    monkeypatch.setattr(okd, "make_scaler", no_scaler)
    monkeypatch.setattr(torch, "autocast", no_autocast)
    args = make_args("--log-every 9", method=method)
    networks = [network.to("meta") for network in tiny_pair(args, "llama")]
    steps = calls_of("learning_rate")
    with pytest.raises(RuntimeError, match="meta"):
        train(args, networks, num_steps=3, hw=hw)
    assert len(steps) == 3  # it fails where it should: in the report of the last step


def test_readmes_forty_lines_take_the_step_of_okd(train, examples):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*Algorithm 1.*?)```", readme, re.DOTALL)
    assert "okd" not in re.sub("#.*", "", code)
    args = make_args("--lora-rank 32 --micro-batch-tokens 60")
    *networks, records = train(args, num_steps=1)
    batch = okd.collate(okd.batch_of(examples, 4, args.seed, 0), "cpu")
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    mask.view(-1)[batch.positions + 1] = True
    names = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2)}
    names["batches"] = [(batch.input_ids, mask)]
    torch.manual_seed(args.seed)
    exec(compile(code, "README.md", "exec"), names)
    for name, network in zip(("student", "teacher"), networks, strict=True):
        loss = names[f"{name}_loss"].item()
        assert loss == pytest.approx(records[0][f"train/{name}_loss"], rel=1e-6)
        assert_close(names[name].state_dict(), network.state_dict(), atol=1e-7, rtol=1e-5)


# -----------------------------------------------------------------------------
# The text of a step


class Writer:
    """Stands in for the sampler: its responses are the step and EOS; rollouts stay as they are."""

    def __init__(self):
        self.calls = []

    def respond(self, rows, step):
        return [row.with_response([step, EOS], 96) for row in rows]

    def rollout(self, rows, step):
        self.calls.append((step, len(rows)))
        return rows


def written_at(rows):
    """The steps at which Writer wrote these rows; empty for gold text."""
    return {row.response_ids[0] for row in rows if len(row.response_ids) == 2}


SHARES = """
flags                                     | share
--method okd                              | 0
--method gkd                              | 0.5
--method okd --text student --anchor 0.1  | 1
--method opd --sgo-fraction 0.2           | 0.2
"""


@cases(SHARES)
def test_student_text_has_its_share_of_steps(flags, share, examples):
    args = make_args(flags)
    share = float(share)
    state = okd.TrainState(phi=args.sgo_fraction)
    own = 0
    for step in range(400):
        steps = written_at(okd.select_rows(args, step, 400, examples, state, Writer()))
        assert steps in (set(), {step})
        own += len(steps)
    assert own == pytest.approx(400 * share, abs=120 * share * (1 - share))


def make_sampler(args, monkeypatch, responses, networks=(None, None)):
    """A sampler whose students generate `responses`."""

    def generate(*_, **__):
        return responses

    monkeypatch.setattr(okd, "generate", generate)
    state = okd.TrainState()
    return okd.Sampler(args, state, *networks, [EOS], CPU)


def test_student_text_keeps_prompts_and_is_cut(examples, monkeypatch):
    args = make_args("--method imitkd")
    sampler = make_sampler(args, monkeypatch, [list(range(200)), [7, EOS]])
    rows = sampler.respond(examples[:2], step=0)
    assert [row.prompt_ids for row in rows] == [row.prompt_ids for row in examples[:2]]
    assert rows[0].response_ids == list(range(96 - len(examples[0].prompt_ids)))
    assert rows[1].response_ids == [7, EOS]


def test_adaptive_text_follows_the_rule_of_distillm(examples, monkeypatch):
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 12)
    args = make_args("--method distillm")
    state = okd.TrainState(phi=0.6)
    kinds = set()
    newest = []
    for step in range(100):
        is_full = len(state.replay) == 12
        r = random.Random(f"1, text of step {step}").random()
        rows = okd.select_rows(args, step, 100, examples, state, Writer())
        steps = written_at(rows)
        if r >= 0.6:
            assert steps == set()
            kinds.add("gold")
        elif is_full and r >= 0.6 * (1 - step / 100):
            assert steps - {step} == steps != set()
            kinds.add("replay")
        else:
            assert steps == {step}
            kinds.add("fresh")
            newest = (newest + rows)[-12:]
        assert state.replay == newest
    assert kinds == {"gold", "replay", "fresh"}


def test_phi_rises_when_the_dev_loss_does():
    state = okd.TrainState(phi=0.75)
    phis = []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.15, 2.22, 2.19, 1.0, 2.33):
        okd.raise_phi(state, loss)
        phis.append(state.phi)
    # 2.11 is 0.1 above 2.0, then 2.22 above 2.11 and 2.33 above 2.22
    assert phis == pytest.approx([0.75, 0.75, 0.75, 0.85, 0.85, 0.95, 0.95, 0.95, 1.0])


def test_each_evaluation_of_distillm_may_raise_phi(train, examples, calls_of):
    calls = calls_of("raise_phi")
    args = make_args("--method distillm --eval-every 1 --select last")
    _, _, records = train(args, num_steps=2, dev_rows=examples[:1])
    losses = [record["dev/student_ce"] for record in records[::2]]
    assert [args[1] for args, *_ in calls] == losses


def test_rollouts_serve_four_passes(examples, monkeypatch):
    monkeypatch.setattr(okd, "NUM_ROLLOUTS", 8)
    args = make_args("--method minillm")
    state = okd.TrainState()
    writer = Writer()
    drawn = []
    for step in range(16):
        drawn += okd.select_rows(args, step, 16, examples, state, writer)
    numbers = [row.number for row in drawn]
    passes = [set(numbers[i : i + 8]) for i in range(0, 64, 8)]
    assert writer.calls == [(0, 8), (8, 8)]
    assert passes == [passes[0]] * 4 + [passes[4]] * 4
    assert not passes[0] & passes[4]


def test_returns_are_discounted_and_divided_by_length():
    rewards = random_logits(7, seed=5)
    expected = []
    for t in range(7):
        ahead = rewards[t:]
        discounts = 0.95 ** torch.arange(len(ahead))
        expected.append((discounts * ahead).mean().item())
    assert okd.discounted_returns(rewards).tolist() == pytest.approx(expected)


@pytest.fixture
def rollouts(examples, monkeypatch):
    """(rollouts of three known responses, (N,) log p, (N,) log q by plain forwards)."""
    args = make_args("--method minillm --micro-batch-tokens 60")
    responses = [[70, 71, EOS], [80, EOS], [90, 91, 92, 93]]
    networks = tiny_pair(args)
    rows = make_sampler(args, monkeypatch, responses, networks).rollout(examples[:3], step=0)
    assert sorted(row.response_ids for row in rows) == responses
    labels = labels_of(rows)
    log_q, log_p = [-okd.cross_entropy(plain_log_probs(net, rows), labels) for net in networks]
    return rows, log_p.detach(), log_q.detach()


def test_rollouts_carry_log_q_and_importance_weight(rollouts):
    rows, log_p, log_q = rollouts
    _, found_log_q, weights = okd.collate(rows, "cpu").rollout.unbind(1)
    assert_close(found_log_q, log_q)
    assert_close(weights, log_q.exp() / (0.2 * log_p.exp() + 0.8 * log_q.exp()))


def test_advantages_are_whitened_returns(rollouts):
    rows, log_p, log_q = rollouts
    rewards = (log_p - log_q).split([len(row.response_ids) for row in rows])
    returns = torch.cat([okd.discounted_returns(values) for values in rewards])
    expected = (returns - returns.mean()) / returns.std(unbiased=False)
    assert_close(okd.collate(rows, "cpu").rollout[:, 0], expected, atol=1e-4, rtol=0)


def test_minillm_adds_its_policy_loss(rollouts):
    rows, _, _ = rollouts
    args = make_args("--method minillm")
    student, teacher = tiny_pair(args)
    (loss,) = backpropagate(args, student, teacher, rows)
    log_p = plain_log_probs(teacher, rows)
    log_q = plain_log_probs(student, rows)
    rollout = okd.collate(rows, "cpu").rollout.unbind(1)
    expected = okd.rkl(log_p, log_q) + okd.policy_loss(log_q, labels_of(rows), *rollout)
    assert_close(loss, expected.mean().detach())


# -----------------------------------------------------------------------------
# Generation


def next_logits(model, *texts):
    """(B, V) logits behind each text, from one unpadded forward each."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in texts])


def plain_greedy(model, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_logits(model, ids).argmax().item())
    return ids[len(prompt) :]


def sharp_model(family="gpt2", **changes):
    return tiny_model(family, seed=5, initializer_range=0.2, **changes)


@two_families
def test_greedy_text_is_that_of_plain_forwards(family):
    model = sharp_model(family)
    prompts = [[70], [70, 71, 80], [90, 91, 92, 93, 94]]  # of unequal length: padded on the left
    expected = [plain_greedy(model, prompt, 10) for prompt in prompts]
    assert okd.generate(model, prompts, [0], CPU, 10) == expected


def test_every_stop_id_ends_a_response():
    model = sharp_model()
    ids = plain_greedy(model, [70, 80, 90], 10)
    for stop_id in set(ids):
        end = ids.index(stop_id) + 1
        assert okd.generate(model, [[70, 80, 90]], [0, stop_id], CPU, 10) == [ids[:end]]


def shares_of(model, **options):
    """Share of each token among 3000 that are sampled behind the prompt 70."""
    options["do_sample"] = True
    responses = okd.generate(model, [[70]] * 3000, [EOS], CPU, 1, 3000, **options)
    return torch.bincount(torch.tensor(responses).flatten(), minlength=VOCAB_SIZE) / 3000


def test_sampled_tokens_follow_the_models_distribution():
    model = sharp_model()
    assert_close(shares_of(model), next_logits(model, [70])[0].softmax(-1), atol=0.03, rtol=0)


def test_sampled_mixture_has_a_fifth_of_the_teacher():
    student = tiny_model()
    student.lm_head.weight.data.zero_()  # uniform
    teacher = tiny_model(tie_word_embeddings=False)
    teacher.transformer.ln_f.bias.data.fill_(1.0)
    teacher.lm_head.weight.data[65] = 9.0  # always says 65
    share = shares_of(student, teacher=teacher)[65].item()
    assert share == pytest.approx(0.2 + 0.8 / VOCAB_SIZE, abs=0.03)


def test_sampling_is_a_function_of_the_seed():
    first, again, other = [shares_of(tiny_model(), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_long_prompt_shortens_no_others_response():
    model = tiny_model(max_position_embeddings=20)
    prompts = [[70] * 3, [70] * 17]
    responses = okd.generate(model, prompts, [EOS], CPU, 9, batch_size=1)
    assert [len(ids) for ids in responses] == [9, 3]


def test_room_is_also_that_of_the_mixtures_teacher():
    teacher = tiny_model(max_position_embeddings=20)
    (ids,) = okd.generate(tiny_model(), [[70] * 17], [EOS], CPU, 9, teacher=teacher)
    assert len(ids) == 3


def test_a_prompt_without_room_is_refused():
    with user_error("a prompt of 20 tokens leaves no room"):
        okd.generate(tiny_model(max_position_embeddings=20), [[70] * 20], [EOS], CPU, 5)


@pytest.mark.parametrize("method", ["fkl", "okd"])
@two_families
def test_mixture_is_that_of_plain_forwards(family, method):
    """Left-padded, cached, two texts at once, against one unpadded forward for every prefix."""
    student, teacher = tiny_pair(make_args(method=method), family, lora_std=0.1)
    texts = [[70, 71, 72, 73, 74], [80, 81]]
    input_ids, mask = okd.left_pad(texts, 0, "cpu")
    mixture = okd.TeacherMixture(teacher, mask)
    for new_token in (90, 91, 92):
        z_p = next_logits(teacher, *texts)
        z_q = next_logits(student, *texts)
        with torch.no_grad():
            found = mixture(input_ids, z_q).exp()
        expected = 0.2 * z_p.softmax(-1) + 0.8 * z_q.softmax(-1)
        assert_close(found, expected, atol=1e-5, rtol=1e-4)
        texts = [[*ids, new_token] for ids in texts]
        input_ids = torch.nn.functional.pad(input_ids, (0, 1), value=new_token)


# -----------------------------------------------------------------------------
# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def gpu_train(train, monkeypatch):
    """As train, on the GPU; losses and steps fail when they wait for the device."""

    def without_waiting(function):
        def wrapped(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return wrapped

    for name in ("train_micro_batch", "optimizer_step"):
        monkeypatch.setattr(okd, name, without_waiting(getattr(okd, name)))

    def run(args, precision, rows, **options):
        hw = okd.pick_hardware("cuda", precision)
        networks = [network.to(hw.device) for network in tiny_pair(args, dtype=hw.dtype)]
        if args.method == "fkl":
            rows = cached(rows, networks[1], hw)
        return train(args, networks, num_steps=4, hw=hw, rows=rows, **options)

    return run


@needs_gpu
@pytest.mark.parametrize("method", ["okd", "fkl", "gkd", "minillm", "taid"])
def test_on_a_gpu_nothing_waits_for_the_device(method, gpu_train, examples):
    _, _, records = gpu_train(make_args(method=method), "fp16", examples)
    assert all(math.isfinite(record["train/student_loss"]) for record in records)


@needs_gpu
def test_a_gpu_and_a_cpu_agree(gpu_train, train, examples):
    args = make_args("--method fkl")
    losses = []
    for _, _, records in (gpu_train(args, "fp32", examples), train(args, num_steps=4)):
        losses.append([record["train/student_loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@needs_gpu
def test_on_a_gpu_a_killed_run_resumes(gpu_train, examples, tmp_path):
    args = make_args("--method okd --save-minutes 1e-9")
    unbroken, _, _ = gpu_train(args, "fp32", examples)
    with killed("learning_rate", 3):
        gpu_train(args, "fp32", examples, run_dir=tmp_path)
    resumed, _, records = gpu_train(args, "fp32", examples, run_dir=tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert_close(resumed.state_dict(), unbroken.state_dict(), atol=1e-6, rtol=1e-4)


# -----------------------------------------------------------------------------
# Chat templates, one of each kind, and the tokens that they need beside the demo's

SPECIAL = [
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
]
NOT_SPECIAL = ["<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_call>", "\n"]

TEMPLATES = {}
TEMPLATES["chatml"] = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""
TEMPLATES["llama3"] = """
{%- if not date_string is defined %}
{%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{{- bos_token + '<|start|>system\n\nToday: ' + date_string + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start|>' + m.role + '\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant\n\n' }}
{%- endif %}"""
TEMPLATES["gemma"] = """
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}
{%- endif %}"""
TEMPLATES["qwen3"] = """
{%- for m in messages %}
{%- set content = m.content or '' %}
{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""
TEMPLATES["gpt-oss"] = """
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>' }}
{%- if m.tool_calls %}
{{- 'commentary<|message|>' + m.tool_calls[0].function | tojson + '<|call|>' }}
{%- else %}
{{- 'final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif %}
{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant' }}
{%- endif %}"""
TEMPLATES["phi3"] = """
{%- for m in messages %}
{{- '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant\n' }}
{%- else %}
{{- eos_token }}
{%- endif %}"""
TEMPLATES["needs system"] = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn, please') }}{% endif %}"
    + TEMPLATES["chatml"]
)
TEMPLATES["one question"] = (
    "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    + TEMPLATES["qwen3"]
)
TEMPLATES["opens a thought"] = TEMPLATES["chatml"].replace(
    "assistant\n' }}", "assistant\n<think>\n' }}"
)
for role in ("system", "user"):
    TEMPLATES[f"skips {role}"] = TEMPLATES["chatml"].replace(
        "messages %}", f"messages if m.role != '{role}' %}}"
    )
TEMPLATES["no end"] = TEMPLATES["chatml"].replace("<|im_end|>", "")
TEMPLATES["knows tools"] = "{# developer, tool_calls #}{{ tools is none }}" + TEMPLATES["chatml"]

TEMPLATES["dated"] = "{{ date_string + strftime_now(', %A %d %B %H:%M') }}" + TEMPLATES["chatml"]

DATES = {
    "strftime_now('%d %b %Y')": "'26 Jul 2024'",
    "strftime_now('%Y-%m-%d')": "'2024-07-26'",
}
CLOSING = {  # what a template writes behind the end of the last turn
    "chatml": "\n",
    "llama3": "",
    "gemma": "\n",
    "qwen3": "\n",
    "gpt-oss": "",
    "phi3": "\n<|endoftext|>",
}


def chat_tokenizer(template):
    tokenizer = okd.demo_tokenizer()
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def read(line, template="chatml"):
    """A JSON line -> (prompt, response) as text, decoded from the ids."""
    tokenizer = chat_tokenizer(template)
    example = okd.read_row(json.loads(line), tokenizer)
    return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.response_ids)


def refusal(line, template="chatml"):
    with pytest.raises(okd.UserError) as error:
        read(line, template)
    return str(error.value)


def alpaca(instruction, context=""):
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        f"{middle}### Response:\n"
    )


def pair(prompt="ask", response="say", **fields):
    return {"prompt": prompt, "response": response, **fields}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -----------------------------------------------------------------------------
# The rows of public bug reports

# The chat template, the row, the prompt, and behind >>> the response.
ROW_CASES = r"""
# chinese
chatml
{"prompt": "问题0：", "response": "巴黎是法国的首都。"}
问题0：
>>> 巴黎是法国的首都。<|endoftext|>

# content_parts
chatml
{"messages": [{"role": "user", "content": [{"type": "text", "text": "Capital of "},
 {"type": "text", "text": "France? 0"}]},
 {"role": "assistant", "content": "Paris."}]}
<|im_start|>user
Capital of France? 0<|im_end|>
<|im_start|>assistant

>>> Paris.<|im_end|>

# input_nan
chatml
{"instruction": "Name a colour.", "input": NaN, "output": "red"}
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
Name a colour.

### Response:

>>> red<|endoftext|>

# multi_turn
qwen3
{"messages": [{"role": "system", "content": "Be brief."},
 {"role": "user", "content": "A?"},
 {"role": "assistant", "content": "a."},
 {"role": "user", "content": "B?"},
 {"role": "assistant", "content": "b."}]}
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
A?<|im_end|>
<|im_start|>assistant
a.<|im_end|>
<|im_start|>user
B?<|im_end|>
<|im_start|>assistant
<think>

</think>


>>> b.<|im_end|>

# plain
chatml
{"prompt": "say 0:", "response": "answer 0 cat"}
say 0:
>>> answer 0 cat<|endoftext|>

# plain_chat
gpt-oss
{"messages": [{"role": "user", "content": "Capital of France? 0"},
 {"role": "assistant", "content": "Paris."}]}
<|start|>system<|message|>Date: 2024-07-26<|end|><|start|>user<|message|>Capital of France? 0\
<|end|><|start|>assistant
>>> <|channel|>final<|message|>Paris.<|return|>

# prompt_ends_in_eos
chatml
{"prompt": "Does money buy happiness?<|endoftext|>", "response": "It depends."}
Does money buy happiness?<|endoftext|>
>>> It depends.<|endoftext|>

# reasoning_content
qwen3
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "2", "reasoning_content": "add two and 0"}]}
<|im_start|>user
2+0?<|im_end|>
<|im_start|>assistant

>>> <think>
add two and 0
</think>

2<|im_end|>

# reasoning_content, gpt-oss
gpt-oss
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "2", "reasoning_content": "add two and 0"}]}
<|start|>system<|message|>Date: 2024-07-26<|end|><|start|>user<|message|>2+0?<|end|>\
<|start|>assistant
>>> <|channel|>analysis<|message|>add two and 0<|end|><|start|>assistant<|channel|>final\
<|message|>2<|return|>

# think_in_content
qwen3
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "<think>\nadd two and 0\n</think>\n\n2"}]}
<|im_start|>user
2+0?<|im_end|>
<|im_start|>assistant

>>> <think>
add two and 0
</think>

2<|im_end|>

# think_in_content, chatml
chatml
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "<think>\nadd two and 0\n</think>\n\n2"}]}
<|im_start|>user
2+0?<|im_end|>
<|im_start|>assistant

>>> <think>
add two and 0
</think>

2<|im_end|>

# thought that is set anew
qwen3
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "<think>add two and 0</think>2"}]}
<|im_start|>user
2+0?<|im_end|>
<|im_start|>assistant

>>> <think>
add two and 0
</think>

2<|im_end|>

# tool_call_last
qwen3
{"messages": [{"role": "user", "content": "Weather in Paris?"},
 {"role": "assistant", "content": "Let me look.",
 "tool_calls": [{"type": "function", "function":
 {"name": "get", "arguments": {"city": "Paris"}}}]}],
 "tools": [{"type": "function", "function": {"name": "get", "parameters": {}}}]}
<|im_start|>user
Weather in Paris?<|im_end|>
<|im_start|>assistant
<think>

</think>


>>> Let me look.
<tool_call>
{"name": "get", "arguments": {"city": "Paris"}}
</tool_call><|im_end|>

# tool call without content
gpt-oss
{"messages": [{"role": "user", "content": "Weather?"},
 {"role": "assistant", "content": null,
 "tool_calls": [{"type": "function", "function":
 {"name": "get", "arguments": {"city": "Paris"}}}]}]}
<|start|>system<|message|>Date: 2024-07-26<|end|><|start|>user<|message|>Weather?<|end|>\
<|start|>assistant
>>> <|channel|>commentary<|message|>{"name": "get", "arguments": {"city": "Paris"}}<|call|>
"""


@blocks("case", ROW_CASES)
def test_row_has_this_prompt_and_response(case):
    template, line, text = re.split(r"\n(?! )", case, maxsplit=2)
    assert "\n>>> ".join(read(line, template)) == text


# What the message says, and the row.
# What the message says, and the row.
REFUSED = r"""
# content is a number
content is 42
{"messages": [{"role": "user", "content": 42}, {"role": "assistant", "content": "a"}]}

# content is null
content is None
{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}

# content is an image
'text'
{"messages": [{"role": "user", "content": [{"type": "image"}]}]}

# unknown role
the role 'judge'
{"messages": [{"role": "judge", "content": "a"}]}

# no answer
not the assistant's
{"messages": [{"role": "user", "content": "a"}]}

# no question
empty conversation
{"messages": [{"role": "assistant", "content": "a"}]}

# input_and_context
context is a second input
{"instruction": "Answer.", "input": "Who won?", "context": "Brazil won in 2002.",
 "output": "Brazil"}

# prompt_and_context
input has no place beside prompt
{"prompt": "Who won?", "context": "Brazil won in 1990.", "response": "Brazil"}

# output and response
response is a second output
{"prompt": "a", "output": "b", "response": "c"}

# messages and response
output has no place beside messages
{"messages": [{"role": "user", "content": "a"}], "response": "b"}

# messages and conversations
conversations is a second messages
{"messages": [{"role": "user", "content": "a"}], "conversations": [{"from": "human"}]}

# system beside instruction
system has no place beside instruction
{"system": "Be brief.", "instruction": "a", "output": "b"}

# history
history has no place
{"history": [["a", "b"]], "prompt": "c", "response": "d"}

# tools beside prompt
tools has no place beside prompt
{"prompt": "a", "tools": [{"name": "get"}], "response": "b"}

# input is a list
list found
{"instruction": "Sort.", "input": ["b", "a"], "output": "a b"}

# instruction is an object
dict found
{"instruction": {"text": "Sort."}, "input": "", "output": "a b"}

# input is 0
int found
{"instruction": "a", "input": 0, "output": "b"}

# output is an object
dict found
{"prompt": "a", "output": {"text": "b"}}

# a reference is null
NoneType found
{"prompt": "a", "output": ["b", null]}

# half a surrogate pair
surrogates
{"prompt": "a", "output": ["b", "\ud83d"]}

# lost thought
does not write 'add two and 0'
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "2", "reasoning_content": "add two and 0"}]}

# lost thought of gpt-oss
does not write 'add two and 0'
{"messages": [{"role": "user", "content": "2+0?"},
 {"role": "assistant", "content": "2", "thinking": "add two and 0"}]}

# lost tool call
does not write tools
{"messages": [{"role": "user", "content": "a"},
 {"role": "assistant", "content": "b",
 "tool_calls": [{"function": {"name": "get"}}]}]}

# lost tools
does not write tools
{"messages": [{"role": "user", "content": "a"},
 {"role": "assistant", "content": "b"}],
 "tools": [{"type": "function", "function": {"name": "get"}}]}
"""


@blocks("case", REFUSED)
def test_row_is_refused(case):
    message, line = case.split("\n", maxsplit=1)
    assert message in refusal(line)


SAME_TEXT = """
# context
{"instruction": "a", "context": "c", "response": "b"}

# rendered
{"instruction": "a", "input": "c", "output": "b", "prompt": "rendered"}

# completion
{"instruction": "a", "input": "c", "completion": ["b", "d"], "messages": null}
"""


@blocks("line", SAME_TEXT)
def test_forms_of_texts_make_alpacas_prompt(line):
    assert read(line) == (alpaca("a", "c"), "b<|endoftext|>")


AB = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
SAME_CHAT = """
# TRL
{"prompt": [{"role": "user", "content": "a"}],
 "completion": [{"role": "assistant", "content": "b"}]}

# ShareGPT
{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}

# conversations
{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

# beside prompt
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
 "prompt": "a"}
"""


@blocks("line", SAME_CHAT)
def test_forms_of_chats_are_messages(line):
    assert read(line) == read(AB)


def test_long_row_is_read_uncut():
    response = "the cat sat on the mat. " * 90
    line = json.dumps({"prompt": "say 0: ", "response": response})
    assert read(line) == ("say 0: ", response + "<|endoftext|>")


def test_all_outputs_are_references():
    example = okd.read_row({"prompt": "a", "output": ["b", "c"]}, okd.demo_tokenizer())
    assert example.references == ["b", "c"]


# -----------------------------------------------------------------------------
# The whole conversation


SYSTEM = AB.replace("[", '[{"role": "system", "content": "Be brief."}, ')
DEVELOPER = SYSTEM.replace("system", "developer")
SPACED = [line.replace('"a"', '" a "').replace('"b"', r'"b\n"') for line in (AB, SYSTEM)]


@pytest.mark.parametrize("line", SPACED, ids=["no system", "system"])
@pytest.mark.parametrize("template", CLOSING)
def test_ids_are_the_templates_own(template, line):
    tokenizer = chat_tokenizer(template)
    row = json.loads(line)
    example = okd.read_row(row, tokenizer)
    for call, date in DATES.items():
        tokenizer.chat_template = tokenizer.chat_template.replace(call, date)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, enable_thinking=False)
    text = text.removesuffix(CLOSING[template])
    assert example.prompt_ids + example.response_ids == tokenizer(text).input_ids


def test_template_may_demand_a_system_turn():
    assert read(SYSTEM, "needs system") == read(SYSTEM)


def test_missing_system_turn_is_one_line():
    assert "a system turn, please" in refusal(AB, "needs system")


def test_prompt_that_opens_a_thought_is_refused():
    assert "prompt otherwise than" in refusal(AB, "opens a thought")


def test_response_continues_an_opened_thought():
    thought = AB.replace('"b"', r'"<think>\nhm\n</think>\n\nb"')
    assert read(thought, "opens a thought")[1] == "hm\n</think>\n\nb<|im_end|>"


@pytest.mark.parametrize(("role", "text"), [("system", "Be brief."), ("user", "Why?")])
def test_template_that_skips_a_turn_is_refused(role, text):
    assert f"does not write '{text}'" in refusal(SYSTEM.replace('"a"', '"Why?"'), f"skips {role}")


def test_templates_read_no_clock():
    assert read(AB, "dated")[0].startswith("26 Jul 2024, Friday 26 July 12:00")


def test_template_without_end_is_refused():
    assert "no added token" in refusal(AB, "no end")


def test_template_may_refuse_a_further_turn():
    assert read(AB, "one question") == read(AB, "qwen3")


def test_developer_is_system_where_unknown():
    assert read(DEVELOPER) == read(SYSTEM)


def test_developer_stays_where_known():
    assert read(DEVELOPER, "knows tools")[0].startswith("True<|im_start|>developer\n")


def test_tools_reach_the_template():
    line = AB[:-1] + ', "tools": [{"name": "get"}]}'
    assert read(line, "knows tools")[0].startswith("False<|im_start|>")


def test_tokenizer_without_template_is_refused():
    with user_error("the tokenizer has no chat template"):
        okd.read_row(json.loads(AB), okd.demo_tokenizer())


def test_chat_reference_is_decoded_as_answers_are():
    example = okd.read_row(json.loads(AB), chat_tokenizer("gpt-oss"))
    assert example.references == ["finalb"]


def test_reading_does_not_change_the_row():
    row = json.loads(DEVELOPER)
    okd.read_row(row, chat_tokenizer("chatml"))
    assert row == json.loads(DEVELOPER)


# -----------------------------------------------------------------------------
# Borders of texts


def sentencepiece_like(template):
    """In a text it knows "Pa" and "ris", at the start of one "▁Paris"."""
    pieces = ["?", "▁Paris", "Pa", "ris", "▁", "(", "a"]
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
    inner = tokenizers.Tokenizer(model)
    spaces = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.pre_tokenizer = spaces
    inner.add_special_tokens(["<s>", "</s>"])
    ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    post = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
    inner.post_processor = post
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


# What the tokenizer puts around a text; prompt, response; their tokens.
BORDERS = """
added        | prompt | response  | p          | r
$A           | (      | Paris     | ▁ (        | Pa ris </s>
<s> $A       | (      | Paris     | <s> ▁ (    | Pa ris </s>
<s> $A       | <s>(   | Paris     | <s> (      | Pa ris </s>
<s> $A       |        | Paris     | <s>        | ▁Paris </s>
$A </s>      | (      | Paris     | ▁ (        | Pa ris </s>
$A </s>      | (</s>  | Paris     | ▁ ( </s>   | Pa ris </s>
<s> $A </s>  | (      | Paris</s> | <s> ▁ (    | Pa ris </s>
$A           | Pa     | ris       | ▁ Pa       | ▁ ris </s>
"""


@cases(BORDERS)
def test_texts_begin_and_end_once(added, prompt, response, p, r):
    tokenizer = sentencepiece_like(added)
    example = okd.read_row(pair(prompt, response), tokenizer)
    ids = (example.prompt_ids, example.response_ids)
    assert [" ".join(tokenizer.convert_ids_to_tokens(part)) for part in ids] == [p, r]


def test_stop_ids_are_eos_and_ends_of_turns():
    tokenizer = chat_tokenizer("chatml")
    rows = [okd.read_row(row, tokenizer) for row in (json.loads(AB), pair())]
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert okd.stop_ids(tokenizer, rows * 2) == ends


# -----------------------------------------------------------------------------
# Files


def read_rows(rows, max_prompt_length=8, max_length=12, template="chatml"):
    lines = [json.dumps(row) for row in rows]
    return okd.read_rows("here", lines, chat_tokenizer(template), max_prompt_length, max_length)


KEPT = {
    "prompt at the limit": (pair("p" * 8), True),
    "prompt above the limit": (pair("p" * 9), False),
    "no prompt": (pair(""), False),
    "no response": (pair(response=""), False),
    "blank response": (pair(response=" \n"), False),
}


@pytest.mark.parametrize(("row", "kept"), KEPT.values(), ids=KEPT)
def test_row_is_kept_or_dropped(row, kept):
    numbers = [example.number for example in read_rows([row, pair()])]
    assert numbers == ([1, 2] if kept else [2])


def test_prompt_leaves_room_for_a_response():
    assert [len(row) for row in read_rows([pair("p" * 6), pair("pppp")], 8, 6)] == [6]


def test_response_is_cut_to_max_length():
    (row,) = read_rows([pair("ask", "r" * 20)])
    assert bytes(row.response_ids) == b"r" * 9


NOTES = {
    "too long": (pair("p" * 9), "2 dropped: prompt of over 8 tokens (--max-prompt-length)"),
    "long chat": (json.loads(AB), "2 dropped: conversation of over 8 tokens (--max-prompt-length)"),
    "no prompt": (pair(""), "2 dropped: no prompt"),
    "no response": (pair(response=""), "2 dropped: no response"),
    "unread field": (pair(id=3), "2 with id, which is not read"),
    "cut": (pair("ask", "r" * 20), "2 cut to --max-length"),
    "Chinese": (pair("ask", "都"), "2 compared by characters (Rouge-L)"),
}


@pytest.mark.parametrize(("row", "note"), NOTES.values(), ids=NOTES)
def test_note_counts_what_happened(row, note, capsys):
    read_rows([row, row, pair()])
    assert capsys.readouterr().out.count(note) == 1


def test_context_turns_are_counted(capsys):
    long_chat = {"messages": json.loads(AB)["messages"] * 2}
    read_rows([long_chat, long_chat, json.loads(AB)], 999, 9999)
    assert "; 2 assistant turns are context" in capsys.readouterr().out


def test_no_row_left_says_why():
    with user_error("1 with answer, which is not read; .*; 1 dropped: no prompt"):
        read_rows([{"question": "ask", "answer": "say"}])


@pytest.mark.parametrize("line", ["{", "[1]", "3"])
def test_line_without_object_is_named(line):
    with user_error("here, line 3: it is not a JSON object"):
        okd.read_rows("here", [LINE, "", line], okd.demo_tokenizer(), 8, 12)


def test_refused_row_is_named():
    with user_error("here, line 2: content is 3"):
        read_rows([pair(), {"messages": [{"role": "user", "content": 3}]}])


LINE = json.dumps(pair())
FORMATS = {
    "JSON array": f"[{LINE}]".encode(),
    "gzip": gzip.compress(LINE.encode()),
    "UTF-16": LINE.encode("utf-16"),
    "UTF-16 without mark": LINE.encode("utf-16-le"),
}


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_other_formats_are_refused(content, tmp_path):
    (tmp_path / "rows").write_bytes(content)
    with user_error("rows is in another format: make it JSONL, UTF-8"):
        okd.read_lines(tmp_path / "rows")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_lines_end_at_line_feeds_only(mark, tmp_path):
    (tmp_path / "rows").write_bytes(mark + '{"a": "\u2028"}\r\n{}'.encode())
    assert okd.read_lines(tmp_path / "rows") == ['{"a": "\u2028"}\r', "{}"]


# -----------------------------------------------------------------------------
# Train, dev, test


def split(rows):
    return okd.split_lines([json.dumps(row) for row in rows])


MANY = [pair(f"ask {i}", "say") for i in range(2000)]


def test_a_twentieth_each_is_held_out():
    parts = list(split(MANY).values())
    shares = [parts.count(part) / 2000 for part in PARTS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.015)


def test_part_depends_on_no_other_row():
    parts = split(MANY)
    fewer = split(MANY[1000:])
    assert fewer == {n: parts[n + 1000] for n in fewer}


PARTS = ["train", "dev", "test"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10, 30])
def test_parts_are_filled_in_order(size):
    for start in range(0, 1990, size):
        assert set(split(MANY[start : start + size]).values()) == set(PARTS[:size])


HASHED_ALIKE = """
# response
{"prompt": "a", "response": "b"}
{"prompt": "a", "response": "c"}

# other field
{"id": 1, "prompt": "a"}
{"prompt": "a", "id": 2}

# chat
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}

# key order
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"messages": [{"content": "a", "role": "user"}, {"role": "assistant", "content": "b"}]}
"""


@blocks("lines", HASHED_ALIKE)
def test_one_prompt_has_one_hash(lines):
    one, other = map(okd.prompt_hash, lines.split("\n"))
    assert one == other


HASHED_APART = """
# prompt
{"prompt": "a", "response": "b"}
{"prompt": "b", "response": "b"}

# input
{"instruction": "a", "input": "b"}
{"instruction": "a", "input": "c"}

# chat
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}
"""


@blocks("lines", HASHED_APART)
def test_other_prompts_have_other_hashes(lines):
    one, other = map(okd.prompt_hash, lines.split("\n"))
    assert one != other


def load_file(path, max_prompt_length=99):
    return vars(okd.load_data("teacher", path, okd.demo_tokenizer(), max_prompt_length, 99))


@pytest.fixture
def mixed(tmp_path):
    """400 prompts of 8 to 26 bytes, every other one twice."""
    rows = [pair(f"{i:08}" + "x" * (i % 19), f"say {i}") for i in range(400)]
    return write_jsonl(tmp_path / "rows.jsonl", rows + rows[::2])


def prompts_of(data):
    prompts = {}
    for part in PARTS:
        prompts[part] = {row.prompt for row in data[part]}
    return prompts


def test_no_prompt_is_in_two_parts(mixed):
    prompts = prompts_of(load_file(mixed))
    assert sum(map(len, prompts.values())) == 400


def test_every_row_is_in_a_part(mixed):
    data = load_file(mixed)
    assert sum(len(data[part]) for part in PARTS) == 600


def test_dropped_rows_move_no_other(mixed):
    everything = prompts_of(load_file(mixed))
    short = prompts_of(load_file(mixed, max_prompt_length=12))
    for part, prompts in everything.items():
        assert short[part] == {prompt for prompt in prompts if len(prompt) <= 12}


def test_test_lines_are_the_test_rows(mixed):
    data = load_file(mixed)
    prompts = [json.loads(line)["prompt"] for line in data["test_lines"]]
    assert prompts == [row.prompt for row in data["test"]]


def test_held_out_rows_follow_their_hashes(mixed):
    lines = [json.dumps({"prompt": row.prompt}) for row in load_file(mixed)["dev"]]
    assert lines == sorted(lines, key=okd.prompt_hash)


def test_no_training_row_left_is_refused(tmp_path):
    rows = [pair("a"), pair("c"), pair("b", "")]  # the largest hash is in train
    with user_error("no row is left to train on"):
        load_file(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_dolly_is_split_as_published(monkeypatch):
    def hub_lines(repo, file):
        return [json.dumps(pair(f"{file} {i}")) for i in range(1005)]

    monkeypatch.setattr(okd, "hub_lines", hub_lines)
    data = load_file(None)
    ends = [data["dev"][-1].prompt, data["train"][0].prompt, data["test"][0].prompt]
    assert ends == ["raw.jsonl 999", "raw.jsonl 1000", "valid.jsonl 0"]


def test_hub_that_is_offline_is_one_line():
    with user_error("cannot get raw.jsonl of the dataset MiniLLM/dolly"):
        okd.hub_lines("MiniLLM/dolly", "raw.jsonl")


# -----------------------------------------------------------------------------
# The demo's rows, tokenizers, Rouge-L


def test_demo_parts_share_no_prompt():
    data = vars(okd.load_data("demo", None, okd.demo_tokenizer(), 99, 99))
    parts = [data[part] for part in (*PARTS, "pretraining")]
    assert [len(rows) for rows in parts] == [400, 200, 1200, 4000]
    assert len({row.prompt for rows in parts for row in rows}) == 5800


def test_demo_rows_are_known():
    first, second = okd.demo_rows(2, seed=0)
    assert first == pair("spell maku\n", ["m-a-k-u", "m a k u", "letters m a k u"])
    assert second == pair("first of ri, tufi\n", ["it is ri", "ri", "the first is ri"])


def test_demo_tokenizer_adds_nothing():
    text = " two  words\né都😀, it 's .\x00\t"
    tokenizer = okd.demo_tokenizer()
    ids = tokenizer(text).input_ids
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = okd.demo_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with user_error("no EOS"):
        okd.load_tokenizer(str(tmp_path))


def test_reserved_tokens_may_differ(capsys):
    teacher = chat_tokenizer("chatml")
    student = okd.demo_tokenizer()
    student.add_tokens([*SPECIAL, *NOT_SPECIAL, "<reserved>"], special_tokens=True)
    assert okd.one_tokenizer(teacher, student) is teacher
    assert "teacher's tokenizer" in capsys.readouterr().out


ROUGE = """
prediction| references | score
巴黎是首都。 | 巴黎是首都      | 100
巴黎         | 巴黎是首都      | 57.142857
МОСКВА       | москва          | 100
की            | का               | 50
Paris        | 巴黎 / Paris!   | 100
GPT 好       | GPT 都          | 100
a            | !?              | 0
"""


@cases(ROUGE)
def test_rouge_of_other_scripts(prediction, references, score):
    found = okd.rouge_l(prediction, references.split(" / "))
    assert found == pytest.approx(float(score))


# -----------------------------------------------------------------------------
# Families

# Path of the blocks and, in each block, the modules that --lora-targets auto names.
# Path of the blocks and, in each block, the modules that --lora-targets auto names.
TARGETS = """
gpt2                transformer.h attn.c_attn
gpt_neo             transformer.h attn.attention.q_proj attn.attention.v_proj
gpt_neox            gpt_neox.layers attention.query_key_value
gptj                transformer.h attn.q_proj attn.v_proj
opt                 model.decoder.layers self_attn.q_proj self_attn.v_proj
bloom               transformer.h self_attention.query_key_value
mpt                 transformer.blocks attn.Wqkv
falcon              transformer.h self_attention.query_key_value
llama               model.layers self_attn.q_proj self_attn.v_proj
llama4_text         model.layers self_attn.q_proj self_attn.v_proj
mistral             model.layers self_attn.q_proj self_attn.v_proj
mixtral             model.layers self_attn.q_proj self_attn.v_proj
qwen2               model.layers self_attn.q_proj self_attn.v_proj
qwen3               model.layers self_attn.q_proj self_attn.v_proj
qwen3_moe           model.layers self_attn.q_proj self_attn.v_proj
gemma2              model.layers self_attn.q_proj self_attn.v_proj
gemma3              model.language_model.layers self_attn.q_proj self_attn.v_proj
phi                 model.layers self_attn.q_proj self_attn.v_proj
phi3                model.layers self_attn.qkv_proj
olmo2               model.layers self_attn.q_proj self_attn.v_proj
smollm3             model.layers self_attn.q_proj self_attn.v_proj
granite             model.layers self_attn.q_proj self_attn.v_proj
cohere              model.layers self_attn.q_proj self_attn.v_proj
deepseek_v3         model.layers self_attn.q_b_proj self_attn.kv_b_proj
gpt_oss             model.layers self_attn.q_proj self_attn.v_proj
mamba               backbone.layers mixer.in_proj
falcon_h1           model.layers self_attn.q_proj self_attn.v_proj
gemma4              model.language_model.layers self_attn.q_proj self_attn.v_proj
modernbert-decoder  model.layers attn.q_proj attn.v_proj
"""
FAMILIES = dict(line.split(maxsplit=1) for line in TARGETS.strip().splitlines())
ROWS = [make_row([11, 12, 13, 14, 15, 16], [21, 22, 23, EOS]), make_row([31, 32], [41, EOS])]

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@every_family
def test_decoder_and_head_equal_an_unpadded_forward(family, adapted):
    model = tiny_model(family)
    if adapted:
        model = with_lora(model)
    found = okd.Trunk(model, okd.collate(ROWS, "cpu"), CPU).log_probs(slice(None))
    assert_close(found, plain_log_probs(model, ROWS), rtol=1e-4, atol=1e-4)


@every_family
def test_exactly_the_lora_of_top_blocks_trains(family):
    model = okd.add_lora(tiny_model(family), rank=4, scale=1.0, top_layers=2)
    trained = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            trained.add(name.removeprefix("base_model.model.").split(".lora_")[0])
    blocks, *names = FAMILIES[family].split()
    assert trained == {f"{blocks}.{number}.{name}" for number in (2, 3) for name in names}


@every_family
def test_a_saved_model_loads_with_equal_logits(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path, "student")
    assert_close(plain_logits(loaded, ROWS), plain_logits(model, ROWS), rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# LoRA


def test_hybrid_models_get_targets_block_by_block():
    linear_attention = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    model = tiny_model("qwen3_5_text", **linear_attention, **sizes)
    assert set(okd.lora_modules(model, "auto", top_layers=2)) == {
        "model.layers.2.linear_attn.in_proj_qkv",
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
    }


def last_names(modules):
    return {path.split(".")[-1] for path in modules}


def test_all_linear_leaves_experts_and_routers_out():
    modules = okd.lora_modules(tiny_model("mixtral"), "all-linear", top_layers=0)
    assert last_names(modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_all_linear_leaves_the_head_out():
    modules = okd.lora_modules(tiny_model(), "all-linear", top_layers=0)
    assert last_names(modules) == {"c_attn", "c_proj", "c_fc"}


def test_named_targets_are_matched_by_last_name():
    modules = okd.lora_modules(tiny_model("llama"), "o_proj,down_proj", top_layers=1)
    assert modules == ["model.layers.3.self_attn.o_proj", "model.layers.3.mlp.down_proj"]


MISFITS = """
family      | targets       | top_layers | message
llama       | q_proj,c_attn | 0          | down_proj.*q_proj
llama       | lm_head       | 0          | down_proj.*q_proj
llama       | q_(proj       | 0          | down_proj.*q_proj
llama       | auto          | 5          | only 4 layers
deepseek_v3 | all-linear    | 0          | peft .*layers.0.mlp.down_proj
mamba       | out_proj      | 0          | does not fit
"""


@cases(MISFITS)
def test_lora_that_does_not_fit_is_refused(family, targets, top_layers, message):
    with user_error(message):
        okd.add_lora(tiny_model(family), 4, 1.0, targets, int(top_layers))


def test_a_model_without_decoder_is_refused():
    with user_error("bert"):
        okd.decoder_of(tiny_model("bert"))


# -----------------------------------------------------------------------------
# Loading and saving


@pytest.fixture
def adapter(tmp_path):
    """The folder of a model's LoRA; its base lies beside it."""
    model = with_lora(tiny_model())
    tiny_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}))


def edit_weights(path, change):
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def load_folder(folder, role="teacher", dtype=torch.float32):
    return okd.load_model(str(folder), role, dtype)


def compiled(weights):
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def headless(weights):
    del weights["lm_head.weight"]


def shorter(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"][:9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled, "lacks 39 weights"),
        (headless, "lacks 1 weights .*'lm_head.weight'"),
        (shorter, "lacks 1 weights .*'lm_head.weight'"),
    ],
)
def test_a_folder_that_lacks_weights_is_refused(change, message, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    edit_weights(tmp_path / "model.safetensors", change)
    with user_error(message):
        load_folder(tmp_path)


def test_extra_weights_load_with_a_note(tmp_path, capsys):
    def add_value_head(weights):
        weights["value_head.weight"] = torch.zeros(1, 32)

    tiny_model().save_pretrained(tmp_path)
    edit_weights(tmp_path / "model.safetensors", add_value_head)
    load_folder(tmp_path)
    note = "1 weights have no place in the model, such as ['value_head.weight']"
    assert note in capsys.readouterr().out


def test_pickled_weights_are_refused(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with user_error("cannot load the teacher .*HF_HOME"):
        load_folder(tmp_path)


def test_an_adapter_is_merged_onto_its_base(adapter):
    merged = load_folder(adapter)
    assert not isinstance(merged, peft.PeftModel)
    assert_close(plain_logits(merged, ROWS), plain_logits(with_lora(tiny_model()), ROWS))


def test_every_weight_of_a_merged_student_trains(adapter):
    student = load_folder(adapter, "student")
    assert all(weight.requires_grad for weight in student.parameters())


def test_an_adapter_is_merged_before_rounding(adapter):
    rounded = load_folder(adapter, dtype=torch.bfloat16).state_dict()
    exact = load_folder(adapter).bfloat16().state_dict()
    assert_close(rounded, exact, rtol=0, atol=0)


def test_merging_leaves_rotary_frequencies_in_float32(tmp_path):
    with_lora(tiny_model("llama")).save_pretrained(tmp_path)
    merged = okd.merge_adapter(tiny_model("llama"), tmp_path, torch.bfloat16)
    assert merged.model.rotary_emb.inv_freq.dtype == torch.float32


def beside_weights(folder):
    tiny_model().save_pretrained(folder)


def without_base(folder):
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)


def one_weight_less(folder):
    edit_weights(folder / "adapter_model.safetensors", dict.popitem)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (beside_weights, "both whole weights and an adapter"),
        (without_base, "base_model_name_or_path"),
        (one_weight_less, "does not fit its base model, such as .*lora_"),
    ],
)
def test_a_broken_adapter_is_refused(damage, message, adapter):
    damage(adapter)
    with user_error(message):
        load_folder(adapter)


def test_a_student_without_trainable_weight_is_refused():
    with user_error("no trainable weights"):
        okd.make_optimizer(tiny_model().requires_grad_(False), 0.0)


@pytest.fixture
def penalized(tmp_path):
    """A model that came with generation options of its own."""
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    return load_folder(tmp_path)


def test_the_folders_generation_config_is_never_sampled_with(penalized):
    assert penalized.generation_config.to_diff_dict().keys() == {"transformers_version"}


def test_saving_keeps_generation_config_with_our_stops(penalized, tmp_path):
    tokenizer = okd.demo_tokenizer()
    tokenizer.chat_template = {"default": "", "tool_use": ""}  # written into a folder
    okd.save_model(penalized, tokenizer, tmp_path / "saved", [1, 5])
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.repetition_penalty, saved.eos_token_id) == (1.5, [1, 5])


def test_router_logits_are_switched_off(tmp_path):
    tiny_model("mixtral", output_router_logits=True).save_pretrained(tmp_path)
    assert load_folder(tmp_path).config.output_router_logits is False


def test_gelu_new_is_computed_in_one_kernel(tmp_path):
    tiny_model(activation_function="gelu_new").save_pretrained(tmp_path)
    assert load_folder(tmp_path).config.activation_function == "gelu_pytorch_tanh"


# -----------------------------------------------------------------------------
# Before any training: what the configs tell


def check(folder, config, max_length=64):
    config.save_pretrained(folder)
    okd.empty_model(str(folder), "student", ROWS, okd.demo_tokenizer(), max_length)


def test_a_token_beyond_the_head_is_named(tmp_path):
    with user_error("of the data has number 256"):
        check(tmp_path, tiny_config("llama", vocab_size=256))


def test_rows_beyond_the_positions_are_refused(tmp_path):
    with user_error("--max-length 65"):
        check(tmp_path, transformers.MptConfig(max_seq_len=64), max_length=65)


def test_an_adapter_has_its_bases_config(adapter):
    assert okd.load_config(str(adapter), "student").model_type == "gpt2"


def test_bloom_has_no_last_position():
    assert okd.max_positions(transformers.BloomConfig()) == float("inf")


@pytest.mark.parametrize("family", ["rwkv", "bart", "recurrent_gemma", "zamba2"])
def test_a_family_that_misreads_padding_is_refused(family, tmp_path):
    with user_error(f"is a {family}"):
        check(tmp_path, transformers.AutoConfig.for_model(family))


# -----------------------------------------------------------------------------
# Runs: flags are texts

SHORT_RUN = (
    "--device cpu --precision fp32 --max-length 64 --max-new-tokens 6 --batch-size 4 --epochs 99 "
    "--max-steps 6 --log-every 1 --eval-every 3 --eval-rows 4 --score-rows 2 --lora-rank 2 "
    "--teacher-sft-epochs 0 --student-sft-epochs 0 --save-minutes 0"
)
SAVE_EACH_STEP = "--save-minutes 1e-9"
SHORT_EVAL = "--max-new-tokens 5 --precision fp32 --sample-batch-size 2 --limit 5"


def call(flags, code=0, program=okd):
    """program.main must exit with `code`. Returns what it prints; an error is one line."""
    out = io.StringIO()
    err = io.StringIO()
    found = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main(flags.split())
        except SystemExit as end:
            found = end.code
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
    out = out.getvalue()
    err = err.getvalue()
    assert found == code, err
    if code == 2:
        assert err.count("\n") == 1 + err.count("skipped: ")
    return out + err


class Job:
    """One command: okd.py, or eval.py, on small models, which lie in a folder of its own."""

    def __init__(self, folders, path, family="gpt2"):
        self.path = path
        self.folder = path / "run"
        self.cache = path / "cache"
        self.models = shutil.copytree(folders / family, path / "models")
        self.student = self.models / "student"
        self.rows = self.models / "rows.jsonl"
        self.flags = (
            f"{SHORT_RUN} --teacher {self.models}/teacher --student {self.student} "
            f"--data {self.rows} --output-dir {self.folder} --cache-dir {self.cache}"
        )

    def __call__(self, more="", code=0):
        return call(f"{self.flags} {more}", code)

    def resume(self, more="", code=0):
        return call(f"--resume {self.folder} {more}", code)

    def evaluate(self, more="--greedy", checkpoints=""):
        """Scores the student, and other checkpoints, on the first five rows."""
        flags = f"--data {self.rows} --output-dir {self.path}/results {SHORT_EVAL} {more}"
        return call(f"{checkpoints} {self.student} {flags}", program=okd_eval)

    def results(self):
        return read_json(self.student / "results.json")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama"):
        for seed, role in enumerate(("teacher", "student")):
            model = tiny_model(family, seed)
            model.config.resid_pdrop = 0.1  # GPT-2 has dropout: a resumed run repeats it
            model.save_pretrained(root / family / role)
            tokenizer.save_pretrained(root / family / role)
        write_jsonl(root / family / "rows.jsonl", okd.demo_rows(60, seed=1))
    return root


@pytest.fixture
def job(folders, tmp_path):
    return Job(folders, tmp_path)


@pytest.fixture(scope="session")
def whole(folders, tmp_path_factory):
    """A run that was not interrupted."""
    job = Job(folders, tmp_path_factory.mktemp("whole"))
    job()
    return job


@pytest.fixture(scope="session")
def begun(folders, tmp_path_factory):
    job = Job(folders, tmp_path_factory.mktemp("begun"))
    with killed("learning_rate", 4):
        job(SAVE_EACH_STEP)
    return job


@pytest.fixture
def stopped(begun, job):
    """A run of which three steps are done."""
    shutil.copytree(begun.folder, job.folder)
    return job


class Killed(BaseException):
    """Stands for kill -9: no handler of the program sees it."""


def die():
    raise Killed


def on_call(monkeypatch, target, number, action, owner=okd):
    """Before call `number` of okd's `target`, action() runs."""
    original = getattr(owner, target)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(target)
        if len(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, target, wrapped)


@contextlib.contextmanager
def killed(target, number=1):
    """The run inside ends before call `number` of okd.<target>. A step calls learning_rate once."""
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, target, number, die)
        with pytest.raises(Killed):
            yield


def send_twice(number):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def nap():
    time.sleep(0.4)


def read_json(path):
    return json.loads(path.read_text())


def weights_of(folder, model="*"):
    """Of the student, of the online module, or of both."""
    weights = {}
    for path in folder.glob(f"{model}/*.safetensors"):
        weights |= safetensors.torch.load_file(path)
    return weights


def timeless(folder):
    """metrics.jsonl without times and memory."""
    records = []
    for record in read_metrics(folder):
        records.append({k: v for k, v in record.items() if not k.endswith(("_s", "_gb"))})
    return records


def assert_same_run(folder, expected):
    assert_close(weights_of(folder), weights_of(expected), rtol=0, atol=0)
    assert timeless(folder) == timeless(expected)
    assert not (folder / "checkpoint.pt").exists()


# -----------------------------------------------------------------------------
# The folder of a run


def test_run_leaves_these_files(whole):
    names = {path.name for path in whole.folder.iterdir()}
    left = {"args.json", "models.json", "metrics.jsonl", "test.jsonl", "student", "teacher_lora"}
    assert names == {".lock", *left}


def test_runs_of_one_second_get_two_folders(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "NOW")
    job.flags = job.flags.replace(f"--output-dir {job.folder}", "")
    for _ in range(2):
        job("--max-steps 1 --eval-rows 0 --score-rows 0")
    assert len(list(tmp_path.glob("runs/okd-student-teacher-s1-NOW-????"))) == 2


def test_given_folder_that_exists_is_refused(job):
    job.folder.mkdir()
    assert "choose another --output-dir, or --resume " in job(code=2)
    assert list(job.folder.iterdir()) == []


def test_test_rows_are_left_as_they_were(whole):
    lines = (whole.folder / "test.jsonl").read_text().splitlines()
    assert lines == load_file(whole.rows)["test_lines"]
    assert set(lines) < set(whole.rows.read_text().splitlines())


# -----------------------------------------------------------------------------
# What a run leaves


def test_model_card_says_how_it_was_made(whole):
    card = huggingface_hub.ModelCard.load(whole.folder / "student" / "README.md")
    assert card.data.base_model is None  # a folder, which the hub would refuse
    final = read_metrics(whole.folder)[-1]
    for text in ("- method: okd", str(whole.rows), f"- rouge_l: {final['final/rouge_l']:.6g}"):
        assert text in card.text


def test_student_keeps_the_dtype_it_came_in(job):
    tiny_model(dtype=torch.bfloat16).save_pretrained(job.student)
    job("--max-steps 1")
    dtypes = {weight.dtype for weight in weights_of(job.folder, "student").values()}
    assert dtypes == {torch.bfloat16}


def test_pipeline_answers_as_the_run_did(job):
    """All rows have one response, which the student learns by heart."""
    write_jsonl(job.rows, [{**row, "response": "yes"} for row in read_jsonl(job.rows)])
    job("--method sft --lr 1e-2 --max-steps 40 --eval-every 40")
    assert read_metrics(job.folder)[-1]["final/rouge_l"] == 100
    pipeline = transformers.pipeline("text-generation", model=str(job.folder / "student"))
    prompt = read_jsonl(job.folder / "test.jsonl")[0]["prompt"]
    assert pipeline(prompt)[0]["generated_text"] == prompt + "yes"


def test_module_loads_from_another_working_directory(job, monkeypatch):
    monkeypatch.chdir(job.models)
    job("--teacher teacher --lr 1e-2")
    monkeypatch.chdir(job.path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(job.folder / "teacher_lora")
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert_close(loaded, weights_of(job.folder, "teacher_lora"))


def test_best_student_survives_a_kill(job, monkeypatch):
    original = okd.evaluate
    students = []

    def evaluate(args, student, *rest):
        students.append(copy.deepcopy(student.state_dict()))
        best = len(students) == 3  # before step 0, 1, 2
        return {**original(args, student, *rest), "rouge_l": float(best)}

    monkeypatch.setattr(okd, "evaluate", evaluate)
    with killed("learning_rate", 5):
        job(f"--eval-every 1 {SAVE_EACH_STEP}")
    job.resume()
    assert read_metrics(job.folder)[-1]["final/dev_step"] == 2
    for name, weight in weights_of(job.folder, "student").items():
        assert_close(weight, students[2][name], rtol=0, atol=0)


# -----------------------------------------------------------------------------
# Killed and resumed


@pytest.mark.parametrize("method", ["okd", "taid", "gkd", "distillm --sgo-fraction 0.7", "minillm"])
def test_killed_run_ends_bit_identical(method, job, monkeypatch):
    """Killed within a step, and between its report and its checkpoint."""
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 8)
    monkeypatch.setattr(okd, "NUM_ROLLOUTS", 4)
    flags = f"--method {method} {SAVE_EACH_STEP}"
    job(f"{flags} --output-dir {job.path}/whole")
    with killed("learning_rate", 3):
        job(flags)
    with killed("save_checkpoint", 2):
        job.resume()
    assert "resumed after step 3" in job.resume()
    assert_same_run(job.folder, job.path / "whole")


def test_kill_before_the_first_checkpoint_begins_again(job, whole):
    with killed("learning_rate", 4):
        job()
    job.resume()
    assert_same_run(job.folder, whole.folder)


def test_killed_warm_starts_and_end_are_resumed(job):
    flags = f"--teacher-sft-epochs 3 --student-sft-epochs 3 {SAVE_EACH_STEP}"
    job(f"{flags} --output-dir {job.path}/whole --cache-dir {job.path}/other")
    with killed("learning_rate", 2):
        job(flags)
    with killed("learning_rate", 5):  # two steps of the teacher, three of the student
        job.resume()
    with killed("model_card"):  # its last record and its adapter are written
        job.resume()
    assert "resumed after step 6" in job.resume()
    assert_same_run(job.folder, job.path / "whole")


SIGKILLS = """
import os, random, signal, sys, time
import torch
import okd

first, run, log_size = sys.argv[1:]
torch.set_num_threads(1)
train = okd.train
okd.train = None  # what is imported up to here need not be imported by each child
try:
    okd.main(first.split())
except TypeError:
    okd.train = train
    os.closerange(3, 100)  # gives up the folder's lock, as the end of a process does
moments = random.Random(5)
for kill in range(4):
    child = os.fork()
    if child == 0:
        okd.main(["--resume", run])
        os._exit(0)
    enough = int(log_size) * (kill + moments.random()) / 5
    while not os.path.exists(run + "/metrics.jsonl"):
        time.sleep(0.001)
    while os.path.getsize(run + "/metrics.jsonl") < enough:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_sigkills_at_random_moments_lose_nothing(job):
    flags = f"--max-steps 20 {SAVE_EACH_STEP}"
    expected = job.path / "whole"
    job(f"{flags} --output-dir {expected}")
    log_size = (expected / "metrics.jsonl").stat().st_size
    command = [sys.executable, "-uc", SIGKILLS, f"{job.flags} {flags}", job.folder, str(log_size)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=200)
    assert ended.stdout.count(b"resumed after step") >= 2, ended.stderr[-2000:]
    job.resume()
    assert_same_run(job.folder, expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_saves(number, code, job, whole, monkeypatch):
    """It comes twice at once, as from torchrun."""
    with monkeypatch.context() as patch:
        on_call(patch, "learning_rate", 3, lambda: send_twice(number))
        assert f"stopped after step 3; python okd.py --resume {job.folder}" in job(code=code)
    assert "resumed after step 3" in job.resume()
    assert_same_run(job.folder, whole.folder)


def test_resume_of_a_running_run_is_refused(stopped):
    locker = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", locker, str(stopped.folder / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        assert "another process is running" in stopped.resume(code=2)


def test_signal_in_the_last_evaluation_is_heard(job, whole, monkeypatch):
    with monkeypatch.context() as patch:
        on_call(patch, "evaluate", 3, lambda: send_twice(signal.SIGTERM))
        job(code=143)
    job.resume()
    assert_same_run(job.folder, whole.folder)


def test_full_disk_keeps_the_old_checkpoint(job, whole, monkeypatch):
    def fail():  # as torch's writer does
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        on_call(patch, "save", 3, fail, torch)
        assert "No space left on device" in job(SAVE_EACH_STEP, code=2)
    assert list(job.folder.glob("*.tmp")) == []
    assert "resumed after step 2" in job.resume()
    assert_same_run(job.folder, whole.folder)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_damaged_checkpoint_is_one_line(size, stopped):
    os.truncate(stopped.folder / "checkpoint.pt", size)
    assert "checkpoint.pt is damaged" in stopped.resume(code=2)


def test_shortened_metrics_are_refused_not_padded(stopped):
    os.truncate(stopped.folder / "metrics.jsonl", 100)
    assert "metrics.jsonl is shorter" in stopped.resume(code=2)
    assert (stopped.folder / "metrics.jsonl").stat().st_size == 100


def test_record_cut_in_the_middle_is_reported_again(stopped, whole):
    with open(stopped.folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "dist')
    stopped.resume()
    assert_same_run(stopped.folder, whole.folder)


# -----------------------------------------------------------------------------
# What a resumed run accepts

FIXED = "--method fkl|--seed 2|--data x|--lr 1|--alpha 0|--teacher x|--lora-rank 3|--shard"


@pytest.mark.parametrize("flag", FIXED.split("|"))
def test_resume_takes_no_other_flag(flag, stopped):
    before = [path.stat().st_mtime_ns for path in sorted(stopped.folder.rglob("*"))]
    assert f"{flag.split()[0]}: a resumed run keeps its flags" in stopped.resume(flag, code=2)
    assert [path.stat().st_mtime_ns for path in sorted(stopped.folder.rglob("*"))] == before


def test_allowed_flags_take_effect(stopped):
    stopped.resume("--log-every 2 --save-minutes 1 --device cpu")
    steps = [r["step"] for r in read_metrics(stopped.folder) if "train/lr" in r]
    assert steps == [1, 2, 3, 4, 6]


def test_resume_checks_the_ranges(stopped):
    assert "--log-every is 0" in stopped.resume("--log-every 0", code=2)


def test_flags_that_save_memory_are_said(stopped):
    flags = "--micro-batch-tokens 64 --sample-batch-size 1 --gradient-checkpointing"
    assert "may differ by rounding" in stopped.resume(flags)


def test_resume_needs_a_run(tmp_path):
    assert "no run was begun there" in call(f"--resume {tmp_path}", code=2)


def test_run_that_ended_is_not_resumed(whole):
    assert "this run has ended" in whole.resume(code=2)


def test_resume_refuses_another_number_of_processes(stopped):
    path = stopped.folder / "args.json"
    edit_json(path, began_with={**read_json(path)["began_with"], "processes": 2})
    assert "processes changed since the run began (then 2, now 1)" in stopped.resume(code=2)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_resume_refuses_other_weights(role, job):
    with killed("train"):
        job()
    tiny_model(seed=9).save_pretrained(job.models / role)
    assert f"{role} changed since the run began" in job.resume(code=2)


def test_resume_refuses_other_rows(job):
    with killed("train"):
        job()
    job.rows.write_text(job.rows.read_text().replace("shout", "shoot", 1))
    assert "rows changed since the run began" in job.resume(code=2)


def test_resume_takes_a_copy_of_the_models(job):
    with killed("train"):
        job()
    for path in job.models.rglob("*"):
        os.utime(path, (1, 1))
    job.resume()


def test_resume_refuses_other_fine_tuned_weights(job):
    with killed("load_networks"):
        job("--student-sft-epochs 1")
    (folder,) = job.cache.glob("student-*")
    tiny_model(seed=9).save_pretrained(folder)
    assert "student changed since the run began" in job.resume(code=2)


def test_resume_needs_the_fine_tuned_models(job):
    with killed("load_networks"):
        job("--student-sft-epochs 1")
    shutil.rmtree(job.cache)
    assert "is gone" in job.resume(code=2)


def test_lost_teacher_text_is_sampled_the_same(job):
    with killed("learning_rate", 2):
        job(f"--method seqkd {SAVE_EACH_STEP}")
    path = job.folder / "teacher_text.json"
    responses = read_json(path)["responses"]
    path.unlink()
    job.resume()
    assert read_json(path)["responses"] == responses


# -----------------------------------------------------------------------------
# Warm start

WARM = "--teacher-sft-epochs 1 --student-sft-epochs 1 --max-steps 1 --eval-rows 0 --score-rows 0"


@pytest.fixture(scope="session")
def warm(folders, tmp_path_factory):
    """A run that has fine-tuned teacher and student."""
    job = Job(folders, tmp_path_factory.mktemp("warm"))
    job.flags += f" {WARM}"
    job()
    return job


def test_methods_flags_do_not_change_warm_starts(warm, tmp_path):
    flags = "--method fkl --batch-size 2 --weight-decay 0.1 --max-grad-norm 0.5 --max-steps 2"
    flags += " --lora-rank 3 --lora-scale 2 --lora-targets all-linear --lora-top-layers 1 --seed 2"
    warm(f"{flags} --output-dir {tmp_path}/run --cache-dir {tmp_path}")
    for folder in warm.cache.iterdir():
        ours = weights_of(tmp_path, folder.name)
        assert_close(ours, weights_of(warm.cache, folder.name), rtol=0, atol=0)


def test_warm_starts_are_found_with_their_seconds(warm, tmp_path):
    out = warm(f"--method fkl --output-dir {tmp_path}/run")
    assert out.count("fine-tuned before, kept in") == 2
    assert read_json(tmp_path / "run" / "models.json") == read_json(warm.folder / "models.json")


@pytest.mark.parametrize("name", ["epochs 2", "lr 5e-4"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_warm_start_follows_its_own_flags(role, name, warm, tmp_path):
    warm(f"--{role}-sft-{name} --output-dir {tmp_path}/run")
    before = read_json(warm.folder / "models.json")
    after = read_json(tmp_path / "run" / "models.json")
    assert [r for r in ("teacher", "student") if after[r] != before[r]] == [role]


def test_edited_config_is_fine_tuned_anew(job):
    flags = f"{WARM} --teacher-sft-epochs 0"
    job(flags)
    edit_json(job.student / "config.json", layer_norm_epsilon=1e-6)
    job(f"{flags} --output-dir {job.path}/other")
    assert len(list(job.cache.glob("student-*"))) == 2


def test_every_byte_of_a_file_counts(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2**22))
    before = okd.fingerprint(str(tmp_path))
    path.write_bytes(bytes(2**22 - 1) + b"a")
    assert okd.fingerprint(str(tmp_path)) != before


def test_weights_not_finite_are_never_kept(job):
    model = tiny_model()
    model.transformer.wpe.weight.data[-1] = math.nan  # a position that no row reaches
    model.save_pretrained(job.student)
    flags = f"{WARM} --teacher-sft-epochs 0"
    assert "weights are not finite; they are not kept" in job(flags, code=2)
    assert list(job.cache.iterdir()) == []


# -----------------------------------------------------------------------------
# Costs and precision


def test_seconds_of_teacher_text_are_counted(job, monkeypatch):
    on_call(monkeypatch, "generate", 3, nap)  # after the scores of teacher and start
    job("--method seqkd")
    final = read_metrics(job.folder)[-1]
    assert 0.4 < final["final/sampling_s"] < final["final/distil_s"]


def test_seconds_of_cached_states_are_counted(job, monkeypatch):
    on_call(monkeypatch, "cache_states", 1, nap)
    job("--method fkl --cache-teacher")
    assert read_metrics(job.folder)[-1]["final/distil_s"] > 0.4


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True)])
def test_fp32_leaves_tf32_off(precision, tf32, monkeypatch):
    matmul = types.SimpleNamespace(allow_tf32=False)
    cudnn = types.SimpleNamespace(allow_tf32=True)  # torch's defaults
    monkeypatch.setattr(torch.cuda, "set_device", print)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with FakeTensorMode():
        okd.pick_hardware("cuda:0", precision)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)


# -----------------------------------------------------------------------------
# Weights & Biases


def values_of(updates):
    """wandb's updates -> {name: value}"""
    items = [item for update in updates for item in update.update]
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


@pytest.fixture(scope="session")
def tracked(folders, tmp_path_factory):
    """(folder, wandb's records) of a run that was killed once."""
    job = Job(folders, tmp_path_factory.mktemp("tracked"))
    job.folder = job.path / "run#1"
    with killed("save_checkpoint", 5):
        job(f"--track --method fkl --temperature 2 {SAVE_EACH_STEP} --output-dir {job.folder}")
    wandb.finish()  # wandb's own process outlives the kill
    job.resume("--track --log-every 2")
    records = []
    for path in sorted(job.folder.glob("wandb/offline-run-*/*.wandb")):
        records += read_wandb(path)
    return job.folder, records


def test_wandb_has_every_step_once(tracked):
    _, records = tracked
    steps = [record.history.step.num for record in records if record.HasField("history")]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_wandb_groups_runs_by_label(tracked):
    folder, records = tracked
    label = read_json(folder / "args.json")["label"]
    groups = {record.run.run_group for record in records if record.HasField("run")}
    assert groups == {label}


def test_wandb_has_the_flags(tracked):
    folder, records = tracked
    record = read_json(folder / "args.json")
    assert record["label"].startswith("fkl temperature=2.0")
    assert record.items() <= values_of(each.run.config for each in records).items()


def test_wandb_id_is_legal_and_ones_own(tracked):
    _, records = tracked
    (name,) = {record.run.run_id for record in records if record.HasField("run")}
    assert re.fullmatch(r"[0-9a-f]{16}", name)


def test_wandb_summary_has_the_final_scores(tracked):
    folder, records = tracked
    final = read_metrics(folder)[-1]
    del final["phase"], final["step"]
    assert final.items() <= values_of(each.summary for each in records).items()


def test_wandb_that_cannot_start_is_one_line(job, monkeypatch):
    on_call(monkeypatch, "init", 1, full_disk, wandb)
    assert "wandb cannot start; continue with --resume" in job(f"--track {WARM}", code=2)
    assert not job.cache.exists()
    job.resume("--no-track")
    assert weights_of(job.folder)


class BrokenWandb:
    summary = None

    def log(self, record, step):
        pass


def test_wandb_failing_at_the_end_loses_nothing(job, monkeypatch):
    monkeypatch.setattr(okd, "start_wandb", lambda record, run_dir: BrokenWandb())
    assert "wandb failed" in job("--track --max-steps 1")
    assert weights_of(job.folder)


# -----------------------------------------------------------------------------
# Help and mistakes


def test_every_flag_has_a_help_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(call("--help").replace("│", " ").split())
    for field in fields(okd.Args):
        flag = field.name.replace("_", "-")
        assert re.search(rf"--{flag}[ ,].*?[a-z]+ [a-z]+.*?\(default:", text)
    assert "(default: 0.0001)" in text  # of the real job, not of the demo


MISTAKES = """
flags                                    | message
--alpha 1.5                              | --alpha is 1.5: it must lie in [0, 1]
--lr nan                                 | --lr is nan
--batch-size 0                           | --batch-size is 0
--ab-alpha 0 --ab-beta 0                 | both 0
--text student                           | needs --anchor
--method fkl --sgo-fraction 0.5          | --text student or adaptive
--method gkd --student-ce-weight 0.5     | there is no gold token
--method distillm --eval-rows 0          | needs --eval-rows
--cache-teacher                          | the states of a moving teacher change
--shard                                  | --shard needs several processes
--device toaster                         | --device toaster cannot be used here
--data nowhere.jsonl                     | cannot read nowhere.jsonl
--teacher ./nowhere                      | cannot load the tokenizer of ./nowhere
--max-length 999                         | --max-length 999: the student has only
--lora-targets q_projj                   | --lora-targets q_projj: name some of
--lora-top-layers 9                      | the model has only 4 layers
"""


@cases(MISTAKES)
def test_mistakes_are_one_line_before_any_training(flags, message, job):
    assert message in job(f"{WARM} {flags}", code=2)
    assert not job.folder.exists()
    assert not job.cache.exists()


def test_other_tokenizer_is_one_line(job):
    transformers.ByT5Tokenizer().save_pretrained(job.student)
    assert "teacher and student differ in tokens" in job(code=2)


def test_out_of_memory_names_the_flags(job, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError

    on_call(monkeypatch, "train_micro_batch", 1, fail)
    line = job(code=2)
    assert "out of memory: lower --micro-batch-tokens or --sample-batch-size" in line


def test_a_lost_connection_is_said(capsys):
    with pytest.raises(SystemExit), okd.one_line_errors(""):
        raise OSError("Connection reset by peer")
    assert "reset by peer" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("flags", ["--anchor 0.1", "--shard --teacher-sft-epochs 1"])
def test_two_processes_equal_one(flags, folders, tmp_path):
    job = Job(folders, tmp_path, "llama")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2"
    command = f"{sys.executable} {torchrun} {okd.__file__} {job.flags} {flags}"
    ended = subprocess.run(command.split(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one = tmp_path / "one"
    job(f"{flags.replace('--shard', '')} --output-dir {one} --cache-dir {tmp_path}/other")
    assert_close(weights_of(job.folder), weights_of(one), atol=1e-5, rtol=1e-3)
    for ours, theirs in zip(timeless(job.folder), timeless(one), strict=True):
        assert ours.pop("phase") == theirs.pop("phase")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_sharded_block_is_whole_only_while_it_runs():
    okd.dist.init_process_group("fake", store=okd.dist.HashStore(), rank=0, world_size=2)
    model = tiny_model().requires_grad_(False)
    okd.shard_blocks(model, dataclasses.replace(CPU, world=2))
    model(torch.tensor([[1]]))
    okd.dist.destroy_process_group()
    assert {type(weight) for weight in okd.blocks_of(model).parameters()} == {DTensor}


def write_run(folder, label="fkl", seed=1, problem="p", eval_steps=(0, 10), **flags):
    """A finished run without its student; dev/fkl is 10 x seed - step."""
    folder.mkdir(parents=True)
    flags.update(label=label, method=label.split()[0], seed=seed, wandb_id=folder.name)
    lines = [f'{{"phase": "distil", "step": {i}, "dev/fkl": {10 * seed - i}}}' for i in eval_steps]
    lines.append('{"phase": "final", "final/distil_s": 10.0, "final/rouge_l": 7.0}')
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / "models.json").write_text(f'{{"problem": {{"teacher": "{problem}", "data": "d"}}}}')
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return flags


def make_checkpoint(folder, scores=(1.0,), **run):
    """A run as eval.py knows it once the set "d" is scored: a score per row."""
    flags = write_run(folder, **run)
    (folder / "generations").mkdir()
    records = [{"row": row, "score": score} for row, score in enumerate(scores)]
    write_jsonl(folder / "generations" / "g", records)
    name = folder.name
    problem = okd_eval.read_json(folder / "models.json")["problem"]
    label = flags["label"]
    checkpoint = okd_eval.Checkpoint(name, label, name, folder, flags, problem, None, [], CPU, 1)
    mean = sum(scores) / len(scores)
    checkpoint.results["d"] = {"data": "d", "rouge_l": mean, "std": None, "generations": ["g"]}
    return checkpoint


def compare(runs, baseline=None):
    """{label: entry}, and the notes"""
    comparison = okd_eval.plan_comparison(*okd_eval.pick_runs(runs), baseline)
    entries = okd_eval.compare_set(comparison, "d")
    return {entry["method"]: entry for entry in entries}, "\n".join(comparison.notes)


# -----------------------------------------------------------------------------
# Scores, protocol, sets


def test_rouge_l_by_hand(job, monkeypatch):
    answers = {b"a": b"The cats sat.", b"b": b"one two", b"c": b""}

    def generate(model, prompts, *args, **options):
        return [list(answers[bytes(ids)]) for ids in prompts]

    monkeypatch.setattr(okd, "generate", generate)
    references = {"a": "the cat was sat on", "b": ["x", "one two"], "c": "y"}
    write_jsonl(job.rows, [pair(*item) for item in references.items()])
    assert "58.33" in job.evaluate()
    (result,) = job.results()
    assert result["rouge_l"] == pytest.approx((75 + 100 + 0) / 3)  # "cats" is stemmed
    assert (result["rows"], result["empty_outputs"], result["cut_prompts"]) == (3, 1, 0)


def test_default_protocol_is_that_of_published_results():
    protocol, seeds = okd_eval.protocol_of(okd_eval.Args(("x",)))
    assert protocol == {
        "decoding": "sampling",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "no_repeat_ngram_size": 6,
        "max_new_tokens": 256,
        "max_prompt_length": 256,
        "limit": None,
    }
    assert seeds == [10, 20, 30, 40, 50]


def test_greedy_is_one_pass_without_a_ban():
    protocol, seeds = okd_eval.protocol_of(okd_eval.Args(("x",), greedy=True))
    assert (protocol["decoding"], protocol["no_repeat_ngram_size"]) == ("greedy", 0)
    assert seeds == [0]


@pytest.mark.parametrize(("bos", "kept"), [("x", b"cdef"), ("a", b"adef")])
def test_long_prompts_lose_their_beginning_but_bos(bos, kept):
    tokenizer = okd.demo_tokenizer()
    tokenizer.bos_token = bos
    lines = [json.dumps(pair("abcdef")), "", json.dumps(pair("ab"))]
    examples, num_cut = okd_eval.read_examples("set", lines, tokenizer, 4)
    assert [bytes(example.prompt_ids) for example in examples] == [kept, b"ab"]
    assert num_cut == 1


def test_a_run_is_scored_on_its_own_rows(tmp_path):
    run = make_checkpoint(tmp_path / "run", data="train.jsonl", teacher="demo")
    write_jsonl(run.folder / "test.jsonl", [pair()] * 3)
    ((name, lines),) = okd_eval.default_sets(run, 2).items()
    assert lines == [json.dumps(pair())] * 2
    assert name not in okd_eval.default_sets(run, 1)  # a set of other rows


def test_a_run_of_the_demo_gets_its_rows(tmp_path):
    run = make_checkpoint(tmp_path / "run", data=None, teacher="demo")
    assert len(okd_eval.default_sets(run, 1)["demo"]) == 1


def test_stop_tokens_of_the_models_folder_count(tokenizer):
    model = tiny_model()
    model.own_generation_config = transformers.GenerationConfig(eos_token_id=[7, 8])
    checkpoint = types.SimpleNamespace(tokenizer=tokenizer, model=model)
    assert okd_eval.stop_ids_of(checkpoint, []) == [EOS, 7, 8]


# -----------------------------------------------------------------------------
# Results: stored, resumed, shared


def test_an_interrupted_pass_is_resumed_exactly(job, calls_of):
    job.evaluate("--seeds 3")
    (path,) = (job.student / "generations").glob("*.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:10])  # killed while it wrote a second batch
    (job.student / "results.json").unlink()
    calls = calls_of("generate")
    job.evaluate("--seeds 3")
    assert path.read_bytes() == whole
    assert [len(responses) for *_, responses in calls] == [2, 1]  # not the first batch


def test_a_stored_score_is_not_computed_again(job, calls_of):
    job.evaluate()
    calls = calls_of("generate")
    job.evaluate()
    assert calls == []


def test_an_edited_config_makes_a_new_score(job):
    job.evaluate()
    edit_json(job.student / "config.json", layer_norm_epsilon=0.5)
    job.evaluate()
    one, other = job.results()
    assert one["key"] != other["key"]


def test_two_processes_keep_each_others_results(job, monkeypatch):
    def store():  # meanwhile, in another process
        (job.student / "results.json").write_text('[{"key": "other", "rouge_l": 1}]')

    on_call(monkeypatch, "rouge_l", 1, store)
    job.evaluate()
    other, own = job.results()
    assert (other["key"], own["data"]) == ("other", str(job.rows))


# -----------------------------------------------------------------------------
# What cannot be scored


def test_what_cannot_be_scored_is_named(job):
    unfinished = job.path / "unfinished"
    damaged = job.path / "damaged"
    write_run(unfinished)
    write_run(damaged)
    (damaged / "student").mkdir()
    (damaged / "args.json").write_text("{")
    out = job.evaluate(checkpoints=f"{unfinished} {damaged}")
    assert f"skipped: {unfinished}: UserError: the run has not finished" in out
    assert f"skipped: {damaged}: UserError: {damaged}/args.json is damaged" in out
    assert len(job.results()) == 1


def test_prompts_beyond_the_positions_are_named(job):
    long = job.path / "long.jsonl"
    write_jsonl(long, [pair("x" * 256)])
    out = job.evaluate(f"--greedy --data {long} {job.rows}")
    assert f"skipped: {job.student} on {long}: UserError: " in out
    assert [result["data"] for result in job.results()] == [str(job.rows)]


def test_nothing_scored_is_exit_code_2(tmp_path):
    write_run(tmp_path / "unfinished")
    rows = write_jsonl(tmp_path / "rows.jsonl", [pair()])
    assert "nothing was scored" in call(f"{tmp_path}/unfinished --data {rows}", 2, okd_eval)


EVAL_MISTAKES = """
flags                      | message
--greedy --paper           | two protocols
--greedy --seeds 1         | --seeds does not go with
--paper --temperature 0.5  | --temperature does not go with
--paper --no-repeat-ngram-size 3 | --no-repeat-ngram-size does not go with
--top-p 1.5                | --top-p must lie in
--limit -1                 | at least 1
--data nowhere.jsonl       | nowhere.jsonl
--compare                  | --compare needs runs
"""


@cases(EVAL_MISTAKES)
def test_mistakes_in_evaluation_are_one_line(flags, message):
    assert message in call(f"demo {flags}", 2, okd_eval)


# -----------------------------------------------------------------------------
# Distribution of the teacher


def metrics_of(p, q, token):
    log_p, log_q = [torch.tensor([x], dtype=torch.float64).log() for x in (p, q)]
    metrics = okd_eval.token_metrics(log_p, log_q, log_p, torch.tensor([token]))
    return {name: value.item() for name, value in metrics.items()}


def test_token_metrics_of_three_words_by_hand():
    log2 = math.log(2)
    expected = {
        "fkl": 0.25 * log2,
        "rkl": 0.25 * log2,
        "tvd": 0.25,
        "student_ce": log2,
        "teacher_entropy": 1.5 * log2,
        "entropy_gap": 0.0,
        "uncertainty": 0.75,  # 1 - p(token)
        "top1_agreement": 0.0,
        # log q is -2, -1, -2 in units of log 2: variance 2/9
        "std": log2 * math.sqrt(2) / 3,
    }
    metrics = metrics_of(p=[0.5, 0.25, 0.25], q=[0.25, 0.5, 0.25], token=1)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_top_k_metrics_of_a_mirror_image():
    p = torch.tensor([9.0] * 50 + [0.0] * 50).softmax(-1)
    metrics = metrics_of(p.tolist(), p.flip(0).tolist(), token=1)
    assert metrics["top5_overlap"] == 0.0
    assert metrics["tail_mass"] == pytest.approx(p[:50].sum().item())


def test_heads_of_two_sizes_share_a_vocabulary():
    metrics = metrics_of(p=[0.5, 0.25, 0.25], q=[0.1, 0.2, 0.1, 0.6], token=1)
    assert metrics["student_ce"] == pytest.approx(math.log(2))


def test_texts_are_measured_at_response_tokens(examples):
    student = tiny_model(seed=1)
    teacher = tiny_model(seed=2)
    found = okd_eval.measure_texts(student, teacher, examples[:5], 100, CPU)
    for row, values in zip(sorted(examples[:5], key=len), found["fkl"], strict=True):
        expected = okd.fkl(plain_log_probs(teacher, [row]), plain_log_probs(student, [row]))
        assert_close(values, expected.detach(), atol=1e-5, rtol=1e-4)


def test_hard_tokens_are_the_teachers_less_likely_half():
    uncertainty = torch.tensor([0.1, 0.9, 0.3, 0.8]).split((3, 1))
    fkl = torch.tensor([1.0, 2.0, 3.0, 4.0]).split((3, 1))
    means = okd_eval.summary({"uncertainty": uncertainty, "fkl": fkl})
    assert [means[part]["fkl"] for part in ("all", "hard", "easy")] == [2.5, 3.0, 2.0]


def test_excess_error_of_known_errors():
    own = [torch.tensor([1.0] * 5 + [3.0] * 5), torch.tensor([2.0] * 5)]
    oracle = [torch.full((25,), 1.0)]  # 5 x 1.5 + 5 x 3 against 10 x 1
    assert okd_eval.excess_error(own, oracle) == {"10": pytest.approx(125.0)}


def test_both_authors_write_by_one_rule(job, calls_of):
    calls = calls_of("generate")
    # Of a run, its teacher is meant.
    write_jsonl(job.models / "models.json", [{"teacher": f"{job.models}/teacher"}])
    job.evaluate(f"--greedy --no-repeat-ngram-size 6 --limit 2 --teacher {job.models}")
    protocol, own, oracle = [options for _, options, _ in calls]
    assert own == oracle
    assert (protocol["do_sample"], protocol["no_repeat_ngram_size"]) == (False, 6)
    assert (own["do_sample"], own["no_repeat_ngram_size"]) == (True, 0)


@pytest.fixture
def analysed(tmp_path):
    """Two runs of fkl whose every metric is 1 and 3."""
    runs = []
    for value in (1.0, 3.0):
        run = make_checkpoint(tmp_path / f"run{value}")
        part = dict.fromkeys(okd_eval.SHOWN, value)
        gold = dict.fromkeys(("all", "hard", "easy"), part)
        found = {"gold": gold, "own": gold, "excess_error_percent": {"10": 10 * value}}
        run.results["d"]["distribution"] = found
        runs.append(run)
    return runs


def test_teacher_table_has_a_row_per_method(analysed):
    *_, row = okd_eval.distribution_table(analysed, "d").splitlines()
    assert row.split()[:7] == ["|", "fkl", "|", "2", "|", "2.000", "2.000"]
    assert "10: 20" in row


def test_analysis_figure_says_what_it_shows(analysed, calls_of, tmp_path):
    calls = calls_of("savefig", okd_eval.Figure)
    okd_eval.draw_analysis(analysed, "d", tmp_path / "analysis.png")
    (((figure, _), *_),) = calls
    assert [bar.get_height() for bar in figure.axes[0].patches] == 3 * [2.0]
    text = figure.get_suptitle()
    assert "± 1 standard deviation over training seeds" in text
    assert "Hard (easy): the half of the tokens" in text


# -----------------------------------------------------------------------------
# Comparison over training seeds


def test_interval_over_rows_is_the_bootstraps():
    alternating = torch.tensor([1.0, -1.0]).repeat(2, 200)
    expected = 1.96 / math.sqrt(400)
    assert okd_eval.interval(alternating) == pytest.approx([-expected, expected], abs=0.02)


def test_interval_over_seeds_is_paired_t():
    apart = torch.tensor([[1.0] * 50, [3.0] * 50])
    assert okd_eval.interval(apart) == pytest.approx([2 - 12.706, 2 + 12.706])


# label, seed, score
RUNS = (
    "fkl 1 10, fkl 2 12, okd 1 15, okd 2 17, rkl 1 8, rkl 2 14, jsd 1 0, tvd 3 0, "
    "ab 1 11, ab 2 13, ab 3 99"
)


def test_verdicts_of_known_scores(tmp_path):
    runs = []
    for run in RUNS.split(", "):
        label, seed, score = run.split()
        scores = [int(score) - 0.5, int(score) + 0.5]
        runs.append(make_checkpoint(tmp_path / run, scores, label=label, seed=int(seed)))
    entries, _ = compare(runs)
    verdicts = {label: entry["verdict"] for label, entry in entries.items()}
    assert verdicts == {
        "fkl": "baseline",
        "okd": "+5.00 [+5.00, +5.00]",
        "rkl": "+0.00 [-25.41, +25.41], not distinguishable",
        "jsd": "-10.00, one training seed",
        "tvd": "none: the baseline has no run of this seed and problem",
        "ab": "+1.00 [+1.00, +1.00], 2 seeds in common",
    }
    assert entries["fkl"]["std_training"] == pytest.approx(math.sqrt(2))


def test_only_runs_of_one_problem_are_compared(tmp_path):
    fkl = make_checkpoint(tmp_path / "a", [1.0])
    okd = make_checkpoint(tmp_path / "b", [3.0], label="okd")
    other = make_checkpoint(tmp_path / "c", [7.0], label="okd", problem="another")
    entries, notes = compare([fkl, okd, other])
    assert notes == "runs differ in teacher: only runs of the same teacher are compared"
    verdicts = {label: entry["verdict"] for label, entry in entries.items()}
    assert verdicts == {
        "fkl, teacher p": "baseline",
        "okd, teacher p": "+2.00, one training seed",
        "okd, teacher another": "none: the baseline has no run of this seed and problem",
    }


def test_of_equal_seeds_the_later_counts(tmp_path):
    later = make_checkpoint(tmp_path / "later", [5.0])
    earlier = make_checkpoint(tmp_path / "earlier", [1.0])
    os.utime(tmp_path / "earlier" / "args.json", (0, 0))
    entries, notes = compare([later, earlier])
    assert (entries["fkl"]["runs"], entries["fkl"]["rouge_l"]) == (1, 5.0)
    assert "later counts, not earlier" in notes


def test_a_student_of_step_0_is_named(tmp_path):
    run = make_checkpoint(tmp_path / "a")
    write_jsonl(run.folder / "metrics.jsonl", [{"phase": "final", "final/dev_step": 0}])
    assert "a kept the student of step 0" in compare([run])[1]


def runs_of(*labels):
    return [types.SimpleNamespace(label=x, flags={"method": x.split()[0]}) for x in labels]


def test_baseline_is_the_exact_label_first():
    runs = runs_of("fkl temperature=2.0", "fkl", "okd alpha=0.1")
    assert okd_eval.pick_baseline(runs, "fkl") == "fkl"
    assert okd_eval.pick_baseline(runs, "okd") == "okd alpha=0.1"
    assert okd_eval.pick_baseline(runs, None) == "fkl temperature=2.0"


def test_a_baseline_of_two_labels_is_refused():
    with user_error(r"must be one of these labels: fkl temperature=2\.0"):
        okd_eval.pick_baseline(runs_of("fkl temperature=2.0", "fkl lr=0.1"), "fkl")


def test_a_run_with_fewer_evals_keeps_curves_long(tmp_path):
    one = make_checkpoint(tmp_path / "a", seed=1, eval_steps=(0, 5, 10))
    other = make_checkpoint(tmp_path / "b", seed=2, eval_steps=(0, 10))
    steps, curves = okd_eval.learning_curves([one, other])
    assert steps == [0, 5, 10]
    assert curves.tolist() == [[10, 5, 0], [20, 15, 10]]


def test_comparison_is_written_and_printed(job):
    runs = [job.path / "one", job.path / "two"]
    for seed, run in enumerate(runs, start=1):
        write_run(run, seed=seed)
        shutil.copytree(job.student, run / "student")
    out = job.evaluate("--greedy --compare", f"{runs[0]} {runs[1]}")
    markdown = (job.path / "results" / "comparison.md").read_text()
    assert markdown in out
    (entry,) = read_json(job.path / "results" / "comparison.json")
    assert entry["training_seeds"] == [1, 2]
    assert (job.path / "results" / "comparison.png").exists()


# -----------------------------------------------------------------------------
# Weights & Biases: what its offline files hold


def read_wandb(path):
    """The records of a .wandb file, which is a LevelDB log."""
    wandb.teardown()  # waits until all is written
    data = path.read_bytes()
    position = 7
    content = b""
    records = []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # too small for a header
            position += room
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        content += data[position + 7 : position + 7 + length]
        if data[position + 6] in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(content))
            content = b""
        position += 7 + length
    return records


def test_pages_get_scores_and_keep_final(tmp_path):
    run = make_checkpoint(tmp_path / "run")
    (run.folder / "wandb").mkdir()
    (run.folder / "results.json").write_text(
        """[{"key": "k", "data": "d.jsonl", "seeds": [0], "rouge_l": 2.5,
        "protocol": {"decoding": "greedy", "max_new_tokens": 5, "limit": null}}]"""
    )
    okd_eval.track([run], [], [], tmp_path)
    (path,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    summary = values_of(each.summary for each in read_wandb(path))
    assert summary["final/rouge_l"] == 7.0
    assert summary["eval/d_jsonl/decoding_greedy_max_new_tokens_5_seeds_0_/rouge_l"] == 2.5
    assert path.name == "run-run.wandb"  # the page of the run, by its wandb_id


def test_comparison_has_a_page_of_its_own(tmp_path):
    entries = [{"data": "d", "method": "fkl", "runs": 2, "rouge_l": 2.5}]
    figure = tmp_path / "comparison.png"
    okd_eval.Figure().savefig(figure)
    okd_eval.track([], entries, [figure], tmp_path)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert read_json(path)["data"][0][:4] == ["d", "fkl", 2, 2.5]


def test_failing_wandb_is_a_last_line(job, monkeypatch):
    on_call(monkeypatch, "track", 1, full_disk, okd_eval)
    assert job.evaluate("--greedy --track").splitlines()[-1].startswith("wandb failed: ")


TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_FLAGS = {"nproc-per-node"}  # torchrun's

every_text = pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@every_text
def test_python_blocks_compile(path):
    for block in python_blocks(path):
        compile(block, path.name, "exec")


@every_text
def test_relative_links_exist(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@every_text
def test_flags_exist(path):
    known = set(OTHER_FLAGS)
    for args in (okd.Args, okd_eval.Args):
        known |= {field.name.replace("_", "-") for field in dataclasses.fields(args)}
    for script in (ROOT / "docs").glob("*.py"):
        known |= set(re.findall('"--([a-z-]+)"', script.read_text()))
    named = re.findall(r"(?<![\w-])--([a-z][a-z-]+)", path.read_text())
    assert set(named) <= known


# Micro-batches of two and one, with different numbers of tokens.
RESPONSES = [make_row([*b"ab"], [*answer, EOS]) for answer in (b"c", b"defg", b"hi")]


def test_trainer_takes_the_plain_loss(tmp_path):
    names = {}
    exec(python_blocks(ROOT / "docs" / "borrow.md")[1], names)
    rows = []
    for row in RESPONSES:
        labels = [-100, -100, *row.response_ids]
        rows.append({"input_ids": row.prompt_ids + row.response_ids, "labels": labels})
    tokenizer = okd.demo_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    steps = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    teacher = tiny_model(seed=1, vocab_size=264)  # heads of two sizes, as padded vocabularies have
    student = tiny_model(seed=2)
    log_p = plain_logits(teacher, RESPONSES)[:, :VOCAB_SIZE].log_softmax(-1)
    expected = okd.rkl(log_p, plain_log_probs(student, RESPONSES)).mean().item()
    trainer = names["DistillationTrainer"](
        teacher,
        divergence="rkl",
        model=student,
        args=steps,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
