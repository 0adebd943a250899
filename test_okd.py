"""Tests of okd.py and eval.py: closed forms, golden numbers, a second way of computing it; values and gradients.

pytest                # tiny models from configs, no downloads, no GPU
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import eval as okd_eval
import okd

ROOT = pathlib.Path(__file__).parent
CPU = okd.Hardware(torch.device("cpu"), torch.float32)
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # between peft and transformers

# Tiny models and data -------------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=384, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=256, bos_token_id=1, eos_token_id=1,
             pad_token_id=0)  # fmt: skip
DROPOUT = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=4, n_head=4, bos_token_id=1,
                                    eos_token_id=1, **dict.fromkeys(DROPOUT, 0.0)),
    "llama": transformers.LlamaConfig(**SHAPE),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
}  # fmt: skip


def tiny(family="gpt2", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family].__class__(**{**CONFIGS[family].to_dict(), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # a fresh head is nearly uniform: spread it, so that a wrong number shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_args(**changes):
    """Args by way of the flags, so that what the flags do is tested along."""
    changes = dict(teacher="t", student="s", batch_size=4, epochs=99, eval_rows=8, score_rows=2, log_every=1,
                   lora_rank=4,
                   max_length=96, max_new_tokens=6, rollouts=8) | changes  # fmt: skip
    flags = [["--" + name.replace("_", "-")] + [str(value)] * (name not in PLAIN) for name, value in changes.items()]
    return okd.parse(sum(flags, []))


PLAIN = {field.name for field in dataclasses.fields(okd.Args) if field.type is bool}  # flags without a value


@pytest.fixture(scope="session")
def tokenizer():
    return okd.load_tokenizer("demo", okd.Args())


@pytest.fixture(scope="session")
def examples(tokenizer):
    return okd.read_rows("demo", map(json.dumps, okd.demo_rows(40, seed=1)), tokenizer, tiny_args())


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Tiny teacher and student of three families, as local Hugging Face folders. GPT-2 has dropout."""
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama", "opt"):
        for role, seed in (("teacher", 1), ("student", 2)):
            tiny(family, seed, **DROPOUT if family == "gpt2" else {}).save_pretrained(root / family / role)
            tokenizer.save_pretrained(root / family / role)
    return root


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in okd.demo_rows(40, seed=1)))
    return path


def example(prompt, response):
    return okd.Example("", [""], prompt, response)


def with_module(model, args=None, top_layers=0, std=0.0):
    """The frozen model with its online module; std > 0: already moved."""
    model = okd.add_lora(model.requires_grad_(False), args or tiny_args(), top_layers, seed=1)
    for name, parameter in model.named_parameters():
        if std and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def pair(args, family="gpt2", **changes):
    teacher = tiny(family, 2, **changes).requires_grad_(False)
    return tiny(family, 1, **changes), with_module(
        teacher, args, args.lora_top_layers
    ) if args.teacher_moves else teacher


def train_tiny(args, student, teacher, examples, tokenizer, steps=2, hw=CPU, dev=()):
    """okd.train -> the records of metrics.jsonl."""
    args = dataclasses.replace(args, max_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        okd.train(args, student, teacher, dict(train=examples, dev=list(dev)), tokenizer, hw, folder)
        return records(folder)


def records(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def wrap(monkeypatch, target, before=None, after=None):
    """Calls of okd.<target> pass by before(*arguments), and after(result, *arguments), on their way."""
    original = getattr(okd, target)

    def wrapped(*args, **kwargs):
        before(*args, **kwargs) if before else None
        result = original(*args, **kwargs)
        return after(result, *args, **kwargs) if after else result

    monkeypatch.setattr(okd, target, wrapped)


def random_logits(*shape, seed=0, dtype=torch.float64, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


# Divergences ----------------------------------------------------------------------------------------------------------

Z_Q = torch.tensor([[1, 2, 0.5, -1, 0], [0.2, -0.3, 1.5, 0.7, -2], [3, 0, -1, 0.5, 0.25], [0, 1, 2, 3, 4]]).double()
Z_P = torch.tensor([[0.5, 1.5, 2, -0.5, -3], [-1, 0.4, 2.2, 0.1, 0.3], [-2, 1, 0.8, 0.6, 0], [4, 3, 2, 1, 0]]).double()
LOG_P, LOG_Q, LABELS = Z_P.log_softmax(-1), Z_Q.log_softmax(-1), torch.tensor([2, 2, 1, 0])

GOLDEN = [  # mean over the first three tokens, and where known each of them
    ("fkl", {}, 0.881736, [0.499399, 0.262005, 1.883805]), ("rkl", {}, 1.235699, [0.488304, 0.289318, 2.929474]),
    ("jsd", {"beta": 0.1}, 0.074367, None), ("jsd", {"beta": 0.5}, 0.198544, None),
    ("jsd", {"beta": 0.9}, 0.088625, None),
    ("tvd", {}, 0.494317, [0.410373, 0.266062, 0.806517]), ("frkl", {}, (0.881736 + 1.235699) / 2, None),
    ("sfkl", {"skew": 0.1}, 0.639753, [0.374244, 0.202914, 1.342102]), ("akl", {"mu": 0.5}, 1.111744, None),
    ("srkl", {"skew": 0.1}, 0.693332, [0.355842, 0.216055, 1.508100]),
    ("ab", {"alpha": 0.2, "beta": 0.7}, 1.216299, None),
    ("ab", {"alpha": 0.5, "beta": 0.5}, 0.896927, None), ("taid", {"t": 0.4}, 1.531312, None),
    ("taid", {"t": 1.0}, 2.064631, None), ("cross_entropy", {}, 1.973134, [2.074438, 0.650948, 3.194016]),
]  # fmt: skip
EVERY = [(name, {"t": 0.6} if name == "taid" else {}) for name in okd.DIVERGENCES]
every_divergence = pytest.mark.parametrize("name, parameters", EVERY, ids=list(okd.DIVERGENCES))


def divergence(name, parameters):
    """The shipped function, of logits."""
    return lambda p, q: okd.DIVERGENCES[name](p.log_softmax(-1), q.log_softmax(-1), **parameters)


@pytest.mark.parametrize("name, parameters, mean, tokens", GOLDEN)
def test_golden_numbers(name, parameters, mean, tokens):
    if name == "cross_entropy":
        values = okd.cross_entropy(LOG_Q[:3], LABELS[:3])
    else:
        values = okd.DIVERGENCES[name](LOG_P[:3], LOG_Q[:3], **parameters)
    assert values.mean().item() == pytest.approx(mean, abs=1e-6)
    assert tokens is None or values.tolist() == pytest.approx(tokens, abs=1e-6)
    assert name != "akl" or values[2].item() == pytest.approx(2.560219, abs=1e-6)


def test_fkl_and_rkl_are_those_of_torch_distributions():
    p, q = (torch.distributions.Categorical(logits=z) for z in (Z_P, Z_Q))
    torch.testing.assert_close(okd.fkl(LOG_P, LOG_Q), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(okd.rkl(LOG_P, LOG_Q), torch.distributions.kl_divergence(q, p))


@every_divergence
def test_zero_with_zero_gradient_at_the_teacher_positive_elsewhere_blind_to_a_constant(name, parameters):
    function, q = divergence(name, parameters), Z_P.clone().requires_grad_()
    value = function(Z_P, q)
    floor = torch.distributions.Categorical(logits=Z_P).entropy() if name == "taid" else torch.zeros(4).double()
    torch.testing.assert_close(value.detach(), floor)
    if name != "tvd":  # |x| has no gradient at 0; autograd's choice is 0 there, but for rounding
        (gradient,) = torch.autograd.grad(value.sum(), q)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    p, q = random_logits(50, 11, seed=1), random_logits(50, 11, seed=2)
    assert (function(p, q) > 0).all()
    torch.testing.assert_close(function(p + 3, q - 5), function(p, q))


@every_divergence
def test_finite_in_float32_with_sharp_logits_values_and_gradients(name, parameters):
    p, q = torch.zeros(2, 7), torch.zeros(2, 7)
    p[:, 1], q[0, 1], q[1, 4] = 1e4, 1e4, 1e4
    q.requires_grad_()
    value = divergence(name, parameters)(p, q)
    value.sum().backward()
    assert value.isfinite().all() and q.grad.isfinite().all()


@every_divergence
def test_gradients_of_both_arguments_against_finite_differences(name, parameters):
    p, q = random_logits(3, 6, seed=3).requires_grad_(), random_logits(3, 6, seed=4).requires_grad_()
    function = divergence(name, parameters)
    if name in (
        "akl",
        "taid",
    ):  # the weights of the one and the target of the other are constants: the truth holds them
        akl, fkl, rkl = (divergence(each, {})(p, q) for each in ("akl", "fkl", "rkl"))
        share, target = ((akl - rkl) / (fkl - rkl)).detach(), (0.4 * q.detach() + 0.6 * p.detach()).softmax(-1)
        truth = share * fkl + (1 - share) * rkl if name == "akl" else -(target * q.log_softmax(-1)).sum(-1)
        (mine,), (expected,) = (torch.autograd.grad(value.sum(), q) for value in (function(p, q), truth))
        torch.testing.assert_close(mine, expected)
    else:
        assert torch.autograd.gradcheck(function, (p, q))


def test_gradients_of_fkl_and_rkl_in_closed_form_and_to_the_teacher_fkl_keeps_the_entropy():
    p, q = Z_P.clone().requires_grad_(), Z_Q.clone().requires_grad_()
    fkl, rkl = divergence("fkl", {})(p, q), divergence("rkl", {})(p, q)
    to_p, to_q = torch.autograd.grad(fkl.sum(), (p, q))
    torch.testing.assert_close(to_q, LOG_Q.exp() - LOG_P.exp())
    torch.testing.assert_close(to_p, (LOG_P.exp() * (LOG_P - LOG_Q - fkl[:, None])).detach())
    (to_q,) = torch.autograd.grad(rkl.sum(), q)
    torch.testing.assert_close(to_q, (LOG_Q.exp() * (LOG_Q - LOG_P - rkl[:, None])).detach())


P, Q, FAR = LOG_P.exp(), LOG_Q.exp(), (torch.eye(4).double() * 100).log_softmax(-1)
IDENTITIES = {
    "jsd is symmetric at a half": lambda: (okd.jsd(LOG_P, LOG_Q, 0.5), okd.jsd(LOG_Q, LOG_P, 0.5)),
    "jsd mirrors beta": lambda: (okd.jsd(LOG_P, LOG_Q, 0.3), okd.jsd(LOG_Q, LOG_P, 0.7)),
    "jsd is at most log 2": lambda: (okd.jsd(FAR, FAR.flip(0), 0.5), torch.full((4,), math.log(2)).double()),
    "jsd / beta tends to fkl": lambda: (okd.jsd(LOG_P, LOG_Q, 1e-6) / 1e-6, okd.fkl(LOG_P, LOG_Q)),
    "jsd is fkl at 0": lambda: (okd.jsd(LOG_P, LOG_Q, 0), okd.fkl(LOG_P, LOG_Q)),
    "jsd is rkl at 1": lambda: (okd.jsd(LOG_P, LOG_Q, 1), okd.rkl(LOG_P, LOG_Q)),
    "sfkl": lambda: (okd.sfkl(LOG_P, LOG_Q, 0.3), (P * (P / (0.3 * P + 0.7 * Q)).log()).sum(-1)),
    "srkl": lambda: (okd.srkl(LOG_P, LOG_Q, 0.3), (Q * (Q / (0.7 * P + 0.3 * Q)).log()).sum(-1)),
    "sfkl is fkl at 0": lambda: (okd.sfkl(LOG_P, LOG_Q, 0), okd.fkl(LOG_P, LOG_Q)),
    "ab is fkl at (1, 0)": lambda: (okd.ab(LOG_P, LOG_Q, 1, 0), okd.fkl(LOG_P, LOG_Q)),
    "ab is rkl at (0, 1)": lambda: (okd.ab(LOG_P, LOG_Q, 0, 1), okd.rkl(LOG_P, LOG_Q)),
    "ab has a limit in beta": lambda: (okd.ab(LOG_P, LOG_Q, 0.6, 0), okd.ab(LOG_P, LOG_Q, 0.6, 1e-7)),
    "ab has a limit in alpha": lambda: (okd.ab(LOG_P, LOG_Q, 0, 0.6), okd.ab(LOG_P, LOG_Q, 1e-7, 0.6)),
    "mix": lambda: (okd.mix(LOG_P, LOG_Q, 0.2).exp(), 0.2 * P + 0.8 * Q),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    torch.testing.assert_close(
        *IDENTITIES[name](), rtol=1e-4 if "tends" in name or "limit" in name else 1e-7, atol=1e-9
    )


def test_akl_puts_the_token_that_crosses_mu_into_the_head():
    p, q = (torch.tensor([row]).double().log() for row in ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]))
    head, tail = abs(0.4 - 0.1) + abs(0.3 - 0.2), abs(0.2 - 0.3) + abs(0.1 - 0.4)  # mu = 0.5: 0.4 < 0.5 <= 0.7
    assert okd.akl(p, q).item() == pytest.approx((head * okd.fkl(p, q) + tail * okd.rkl(p, q)).item() / (head + tail))


BOUND = [("jsd", dict(beta=0.3)), ("sfkl", dict(skew=0.4)), ("srkl", dict(skew=0.4)),
         ("ab", dict(ab_alpha=0.5, ab_beta=0.6)),
         ("taid", {}), ("fkl", {}), ("rkl", {}), ("tvd", {})]  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name, flags", BOUND, ids=[name for name, _ in BOUND])
def test_flags_reach_the_divergence_and_the_temperature_softens_both_sides(name, flags, temperature):
    bound = okd.bound_divergence(
        tiny_args(divergence=name, temperature=temperature, **flags), torch.tensor(0.6).double()
    )
    own = {flag.removeprefix("ab_"): value for flag, value in flags.items()} | ({"t": 0.6} if name == "taid" else {})
    expected = temperature**2 * divergence(name, own)(Z_P / temperature, Z_Q / temperature)
    torch.testing.assert_close(bound(LOG_P, LOG_Q), expected)


def test_temperature_keeps_the_gradients_size():
    q, bound = Z_Q.clone().requires_grad_(), okd.bound_divergence(tiny_args(method="fkl", temperature=2.0), None)
    (gradient,) = torch.autograd.grad(bound(LOG_P, q.log_softmax(-1)).sum(), q)
    torch.testing.assert_close(gradient, 2 * ((Z_Q / 2).softmax(-1) - (Z_P / 2).softmax(-1)))


def test_taid_step_against_the_rule_written_out():
    scalars = dict(taid_t=torch.tensor(0.4), taid_momentum=torch.tensor(0.0), taid_loss=torch.tensor(math.inf))
    losses, t, momentum, previous = [3.0, 2.5, 2.6, 1.0], 0.4, 0.0, None
    for i, loss in enumerate(losses):
        okd.taid_step(scalars, torch.tensor(loss), progress=i / 10, start=0.4)
        change = 0.0 if previous is None else (previous - loss) / (previous + 1e-15)
        momentum = 0.99 * momentum + 0.01 * change
        delta = 5e-4 / (1 + math.exp(-momentum)) * (1 - t)
        t, previous = min(1.0, max(0.4 + 0.6 * i / 10, t + delta)), loss
        assert scalars["taid_t"].item() == pytest.approx(t, abs=1e-6)
    okd.taid_step(scalars, torch.tensor(math.nan), progress=0.4)  # a skipped step
    assert scalars["taid_loss"] == 1.0 and scalars["taid_t"].isfinite() and scalars["taid_momentum"].isfinite()


# The two losses of OKD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, anchor", [(0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.35, 0.7), (1.0, 0.3)])
def test_the_teachers_gradient_is_that_of_eq_16_and_vanishes_at_the_mixture_of_gold_student_and_start(alpha, anchor):
    p, q, p0 = random_logits(5, 7, seed=1), random_logits(5, 7, seed=2), random_logits(5, 7, seed=3)
    labels = torch.tensor([0, 1, 2, 3, 4])
    gold = F.one_hot(labels, 7).double()
    mixture = ((1 - alpha) * gold + alpha * q.softmax(-1) + anchor * p0.softmax(-1)) / (1 + anchor)

    def gradient(p):
        p = p.clone().requires_grad_()
        loss = okd.teacher_loss(p.log_softmax(-1), q.log_softmax(-1), p0.log_softmax(-1), labels, alpha, anchor)
        return torch.autograd.grad(loss.sum(), p)[0]

    # KL(q || p_f) and KL(p_0 || p_f) pull p_f to q and to p_0, CE to the gold token, each with its weight
    torch.testing.assert_close(gradient(p), (1 + anchor) * (p.softmax(-1) - mixture))
    if alpha > 0:  # else the mixture is one-hot, and no logits have it
        torch.testing.assert_close(gradient(mixture.log()), torch.zeros_like(p), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teachers_loss_in_closed_form_for_alpha_0_and_1_and_an_anchor(temperature):
    soft_p, soft_q, soft_0 = ((z / temperature).log_softmax(-1) for z in (Z_P, Z_Q, Z_P.flip(0)))
    loss = functools.partial(okd.teacher_loss, LOG_P, LOG_Q, LOG_P.flip(0), LABELS, temperature=temperature)
    gold, pull = -LOG_P[range(4), LABELS], temperature**2 * (soft_q.exp() * (soft_q - soft_p)).sum(-1)
    back = temperature**2 * (soft_0.exp() * (soft_0 - soft_p)).sum(-1)
    torch.testing.assert_close(loss(alpha=0.0), gold)
    torch.testing.assert_close(loss(alpha=1.0), pull)
    torch.testing.assert_close(loss(alpha=0.3, anchor=0.4), 0.7 * gold + 0.3 * pull + 0.4 * back)


def test_neither_loss_reaches_into_the_other_network():
    p, q, p0 = (z.clone().requires_grad_() for z in (LOG_P, LOG_Q, LOG_P))
    loss = okd.student_loss(p, q, LABELS, okd.fkl, 0.5).sum()
    assert torch.autograd.grad(loss, (p, p0), allow_unused=True) == (None, None)
    loss = okd.teacher_loss(p, q, p0, LABELS, 0.5, 1.0, 2.0).sum()
    assert torch.autograd.grad(loss, (q, p0), allow_unused=True) == (None, None)


def test_student_loss_weighs_divergence_and_gold_text():
    gold = -LOG_Q[range(4), LABELS]
    for weight in (0.0, 0.3, 1.0):
        value = okd.student_loss(LOG_P, LOG_Q, LABELS, okd.rkl, weight)
        torch.testing.assert_close(value, (1 - weight) * okd.rkl(LOG_P, LOG_Q) + weight * gold)


def test_measure_against_torch_distributions():
    z_0, z_p, z_q = (random_logits(6, 9, seed=s) for s in (1, 2, 3))
    labels, kl = torch.arange(6), torch.distributions.kl_divergence
    sums = okd.measure(z_p.log_softmax(-1), z_q.log_softmax(-1), z_0.log_softmax(-1), labels)
    d0, dp, dq = (torch.distributions.Categorical(logits=z) for z in (z_0, z_p, z_q))
    expected = dict(fkl=kl(d0, dq), rkl=kl(dq, d0), student_ce=-dq.log_prob(labels), teacher_ce=-dp.log_prob(labels),
                    student_entropy=dq.entropy(), teacher_entropy=dp.entropy(), drift=kl(d0, dp),
                    top1_agreement=(z_0.argmax(-1) == z_q.argmax(-1)).float())  # fmt: skip
    assert sums.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(sums[name], expected[name].sum(), msg=name)


# Data -----------------------------------------------------------------------------------------------------------------


def test_labels_are_the_next_tokens_and_eos_counts_even_where_pad_is_eos():
    eos = 0  # what rows are padded with
    batch = okd.collate([example([1, 2, 3], [4, 5, eos]), example([1], [6, eos]), example([2, 3], [9])], "cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, eos], [1, 6, eos, eos, eos, eos], [2, 3, 9, eos, eos, eos]]
    assert batch.labels.tolist() == [4, 5, eos, 6, eos, 9]  # both EOS targets, none of the padding, the first token
    assert batch.positions.tolist() == [2, 3, 4, 6, 7, 13] and batch.states is None and len(batch.rollout) == 0


def test_rows_that_cannot_be_trained_on_are_dropped_and_counted_and_long_ones_cut(tokenizer, capsys):
    rows = [("ok", "yes"), ("x" * 9, "long prompt"), ("empty", ""), ("cut", "y" * 30)]
    lines = [json.dumps(dict(prompt=prompt, response=response)) for prompt, response in rows]
    kept = okd.read_rows("here", lines, tokenizer, tiny_args(max_length=12, max_prompt_length=8))
    assert [row.prompt for row in kept] == ["ok", "cut"] and kept[0].response_ids[-1] == tokenizer.eos_token_id
    assert len(kept[1]) == 12 and tokenizer.eos_token_id not in kept[1].response_ids  # no false end
    assert "here: 2 of 4 rows kept" in capsys.readouterr().out
    assert len(kept[0].answered(list(range(5, 205)), 96)) == 96  # so is sampled text


def test_prompt_and_response_are_tokenised_apart():
    class Merging:  # a tokenizer that merges "ab" wherever it sees it
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            ids = [99 if part == "ab" else ord(part) for part in re.findall("ab|.", text)]
            return transformers.BatchEncoding(dict(input_ids=ids))

    row = okd.read_row(dict(prompt="a", response="b"), Merging())
    assert row.prompt_ids == [ord("a")] and row.response_ids == [ord("b"), 0]


PLAIN_PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nSum.\n\n### Response:\n")  # fmt: skip
INPUT_PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nSum.\n\n"
                "### Input:\n1 2\n\n### Response:\n")  # fmt: skip
FORMS = [
    (dict(prompt="p", response="r"), "p", ["r"]),
    (dict(instruction="Sum.", input="", output=["a", "b"], prompt="x"), PLAIN_PROMPT, ["a", "b"]),
    (dict(instruction="Sum.", input="1 2", output="3"), INPUT_PROMPT, ["3"]),
    (
        dict(instruction="Sum.", context="1 2", response="3"),
        INPUT_PROMPT,
        ["3"],
    ),  # as databricks-dolly-15k.jsonl has it
]


@pytest.mark.parametrize("row, prompt, references", FORMS)
def test_forms_of_rows_and_the_template_is_alpacas(row, prompt, references, tokenizer):
    read = okd.read_row(row, tokenizer)
    assert (read.prompt, read.references) == (prompt, references)
    ids = tokenizer(references[0], add_special_tokens=False).input_ids
    assert read.response_ids == [*ids, tokenizer.eos_token_id] and tokenizer.decode(read.prompt_ids) == prompt


def test_fields_that_are_not_read_are_said_once(tokenizer, capsys):
    line = json.dumps(dict(instruction="i", output="o", passage="an input under a name that nobody reads"))
    okd.read_rows("file", [line, line], tokenizer, tiny_args(max_length=512))
    assert capsys.readouterr().out.count("fields that are not read: passage") == 1


TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}TURN\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}!"
            "{% endif %}{% endif %}")  # fmt: skip


@pytest.mark.parametrize("turn, stops", [("<extra_id_5>", [1, 264]), ("</s>", [1])])
def test_the_end_of_a_turn_comes_from_the_chat_template_is_the_target_and_stops_generation(turn, stops):
    """A template that could think first is told not to: the ! of its prompt."""
    tokenizer = okd.load_tokenizer("demo", okd.Args())
    assert okd.ends(tokenizer) == [1]  # without a template
    tokenizer.chat_template = TEMPLATE.replace("TURN", turn)
    messages = [dict(role="user", content="hi"), dict(role="assistant", content="yo")]
    row = okd.read_row(dict(messages=messages), tokenizer)
    assert okd.ends(tokenizer) == stops
    assert row.prompt == f"<user>hi{turn}\n<assistant>!" and row.references == ["yo"]
    assert row.response_ids == [*tokenizer("yo", add_special_tokens=False).input_ids, stops[-1]]
    assert okd.read_row(dict(prompt="p", response="r"), tokenizer).response_ids[-1] == 1  # no turn, no end of one
    for end in stops:
        assert okd.generate(parrot(4.0, (70, 71, end)), tokenizer, [[80, 81], [82]], CPU, 9) == [[70, 71, end]] * 2


def test_template_equals_the_prompt_that_the_hubs_rows_carry(tokenizer):
    folder = ROOT.parent / "shared" / "data" / "raw_format"
    if not folder.exists():
        pytest.skip("the samples in the hub's own format are not here")
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in open(path)]
    carried = [row for row in rows if "### Response:" in row.get("prompt", "")]
    assert carried
    for row in carried:
        assert okd.read_row(row, tokenizer).prompt.strip() == row["prompt"].strip()


def test_demo_rows_are_seeded_and_share_no_prompt():
    rows = okd.demo_rows(1000, seed=0)
    assert rows == okd.demo_rows(1000, seed=0) and rows != okd.demo_rows(1000, seed=1)
    assert len({row["prompt"] for row in rows}) == 1000
    assert all(1 < len(set(row["response"])) == len(row["response"]) for row in rows)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_seed_and_epoch():
    rows = [example([5], list(range((7 * i) % 31 + 1))) for i in range(100)]
    number = {id(row): i for i, row in enumerate(rows)}

    def epoch(seed, n):
        return [[number[id(row)] for row in okd.batch_of(rows, 10, seed, n * 10 + i)] for i in range(10)]

    assert sorted(sum(epoch(1, 0), [])) == list(range(100))
    assert epoch(1, 0) == epoch(1, 0) and epoch(1, 0) != epoch(1, 1) and epoch(1, 0) != epoch(2, 0)
    spread = [max(len(rows[i]) for i in batch) - min(len(rows[i]) for i in batch) for batch in epoch(1, 0)]
    assert max(spread) <= 5  # rows of like length stand together


def test_micro_batches_hold_to_tokens_lose_no_row_and_are_as_many_for_each_process(examples):
    held = lambda pieces: [list(map(tuple, piece.input_ids.tolist())) for piece in pieces]  # noqa: E731
    args, rows = tiny_args(micro_batch_tokens=100), examples[:39]
    whole = sorted(tuple(row.prompt_ids + row.response_ids) for row in rows)
    unpadded = lambda pieces: sorted(row[: row.index(1) + 1] for piece in held(pieces) for row in piece)  # noqa: E731
    shares = [list(okd.micro_batches(rows, args, dataclasses.replace(CPU, rank=rank, world=3))) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1 and unpadded(sum(shares, [])) == whole
    assert all(len(piece.input_ids) == 1 or piece.input_ids.numel() <= 100 for share in shares for piece in share)
    assert unpadded(okd.micro_batches(rows, args, dataclasses.replace(CPU, world=3), share=False)) == whole
    single = okd.micro_batches(examples[:3], tiny_args(micro_batch_tokens=1), CPU)
    assert [len(piece.input_ids) for piece in single] == [1, 1, 1]


# Trunk, head and chunks against the plain way -------------------------------------------------------------------------


def plain_logits(model, *rows):
    """Of the positions before each response token, from one unpadded forward a row."""
    logits = [model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0] for row in rows]
    return torch.cat([each[len(row.prompt_ids) - 1 : -1].float() for each, row in zip(logits, rows)])


def plain(model, rows):
    return plain_logits(model, *rows).log_softmax(-1)


@pytest.fixture
def float64_head(monkeypatch):
    """The head ends in float32; for comparisons to 1e-10 let float64 through."""
    as_is = lambda self: self if self.dtype == torch.float64 else self.to(torch.float32)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", as_is)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_all_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **tolerance)


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_trunk_and_head_are_the_models_logits_whatever_the_padding(family, with_lora, examples, float64_head):
    """Rows of unlike length, one with a response of a single token, beside one that pads them all."""
    model = tiny(family, dtype=torch.float64)
    model = with_module(model, tiny_args(lora_targets="all-linear"), 2, std=0.1) if with_lora else model
    rows = [*examples[:4], examples[4].answered([1], 96), example([5] * 60, [6] * 30)]
    hidden, head = okd.trunk(model, okd.collate(rows, "cpu"))
    torch.testing.assert_close(head(hidden), plain_logits(model, *rows), **CLOSE.get(family, EXACT))


def both_losses(alpha=0.5, anchor=0.3, ce_weight=0.2, divergence=okd.fkl):
    def losses(log_p, log_q, log_p0, labels, rollout):
        return dict(student_loss=okd.student_loss(log_p, log_q, labels, divergence, ce_weight),
                    teacher_loss=okd.teacher_loss(log_p, log_q, log_p0, labels, alpha, anchor))  # fmt: skip

    return losses


def backward(loss):
    loss.backward()


EXACT = dict(atol=1e-10, rtol=1e-7)
# Whatever the weights are, these take a softmax or a norm in float32.
CLOSE = dict(gemma2=dict(atol=1e-5, rtol=1e-5), cohere=dict(atol=1e-5, rtol=1e-5))
CHUNKED = [(family, "jsd") for family in CONFIGS] + [("gpt2", name) for name in okd.DIVERGENCES if name != "jsd"]


@pytest.mark.parametrize("family, name", CHUNKED)
def test_chunks_give_the_plain_losses_and_gradients_of_both_networks(family, name, examples, float64_head, monkeypatch):
    bound = okd.bound_divergence(tiny_args(divergence=name), torch.tensor(0.6, dtype=torch.float64))
    losses, rows, student = both_losses(divergence=bound), examples[:5], tiny(family, 1, torch.float64)
    teacher = with_module(tiny(family, 2, torch.float64), tiny_args(lora_targets="all-linear"), std=0.1)
    batch, close = okd.collate(rows, "cpu"), CLOSE.get(family, EXACT)
    with torch.no_grad(), teacher.disable_adapter():
        log_p0 = plain(teacher, rows)
    expected = losses(plain(teacher, rows), plain(student, rows), log_p0, batch.labels, None)
    sum(term.sum() for term in expected.values()).backward()
    truth = gradients(student), gradients(teacher)
    student.zero_grad(), teacher.zero_grad()
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)  # seven tokens a chunk
    sums = okd.run_batch(student, teacher, batch, CPU, losses, backward, moves=True, need_p0=True)
    assert_all_close(sums, {key: term.sum().detach() for key, term in expected.items()}, **close)
    for model, want in zip((student, teacher), truth):
        assert_all_close(gradients(model), want, **close)


def test_in_bfloat16_chunks_give_the_plain_losses_to_its_rounding(examples, monkeypatch):
    hw, rows = okd.Hardware(torch.device("cpu"), torch.bfloat16), examples[:5]
    student, teacher = tiny(seed=1), tiny(seed=2, dtype=torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = okd.fkl(plain(teacher, rows), plain(student, rows)).sum()
    expected.backward()
    truth = gradients(student)
    student.zero_grad()
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)
    losses = lambda log_p, log_q, *_: dict(loss=okd.fkl(log_p, log_q))  # noqa: E731
    sums = okd.run_batch(student, teacher, okd.collate(rows, "cpu"), hw, losses, backward)
    torch.testing.assert_close(sums["loss"], expected.detach(), rtol=1e-2, atol=0)
    for name, gradient in gradients(student).items():
        assert (gradient - truth[name]).norm() <= 0.02 * truth[name].norm(), name


def test_no_tensor_holds_more_logits_than_a_chunk(examples, monkeypatch):
    """Of all (..., V) tensors, in both networks, forward and backward."""
    vocab, rows, seen = 1000, 5, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.shape[-1:] == (vocab,) and value.shape != (32, vocab):
                    seen.append(value.numel())  # not the head's weight
            return result

    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", vocab * rows)
    batch, student = okd.collate(examples[:4], "cpu"), tiny(seed=1, vocab_size=vocab)
    teacher = with_module(tiny(seed=2, vocab_size=vocab))
    with Watch():
        okd.run_batch(student, teacher, batch, CPU, both_losses(), backward, moves=True, need_p0=True, look=True)
    assert len(batch.labels) > 4 * rows and max(seen) == vocab * rows


@pytest.mark.parametrize("device, times", [("cpu", 1), ("cuda", 8), ("mps", 8)])
def test_chunks_off_the_cpu_are_larger(device, times, examples, monkeypatch):
    seen, hw = [], types.SimpleNamespace(device=types.SimpleNamespace(type=device), autocast=contextlib.nullcontext)
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 5)
    losses = lambda log_p, log_q, log_p0, labels, rollout: seen.append(len(labels)) or {}  # noqa: E731
    okd.run_batch(tiny(), None, okd.collate(examples[:9], "cpu"), hw, losses)
    assert (
        okd.GPU_CHUNKS == 8 and max(seen) == 5 * times and sum(seen) == sum(len(e.response_ids) for e in examples[:9])
    )


def test_gpt2s_gelu_is_loaded_as_one_kernel_and_dropout_as_asked(folders):
    path, ids = str(folders / "gpt2" / "teacher"), torch.arange(40)[None]
    rates = lambda model: {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}  # noqa: E731
    loaded = okd.load_model(path, "teacher", tiny_args(), torch.float32, dropout=False)
    original = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert original.config.activation_function == "gelu_new"
    assert loaded.config.activation_function == "gelu_pytorch_tanh"
    torch.testing.assert_close(loaded(ids).logits, original.eval()(ids).logits, atol=1e-6, rtol=0)
    assert rates(loaded) == {0.0} and rates(okd.load_model(path, "student", tiny_args(), torch.float32)) == {0.1}


# Training: who moves, what a batch's split changes (nothing), precision -----------------------------------------------


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def test_a_frozen_teacher_is_bit_identical_after_training(examples, tokenizer):
    student, teacher = pair(args := tiny_args(method="rkl"))
    before, start = snapshot(teacher), snapshot(student)
    train_tiny(args, student, teacher, examples, tokenizer)
    assert not changed(before, teacher) and changed(start, student) == set(start)


def test_a_moving_teacher_differs_only_in_its_lora_and_without_it_is_the_one_it_was(examples, tokenizer):
    student, teacher = pair(args := tiny_args())
    original, before = plain(tiny(seed=2), examples[:4]), snapshot(teacher)
    torch.testing.assert_close(plain(teacher, examples[:4]), original, atol=0, rtol=0)  # B = 0 at the start
    train_tiny(args, student, teacher, examples, tokenizer)
    assert changed(before, teacher) == {name for name in before if "lora_" in name}
    with torch.no_grad(), teacher.disable_adapter():
        torch.testing.assert_close(plain(teacher, examples[:4]), original, atol=0, rtol=0)
    assert (plain(teacher, examples[:4]) - original).abs().max() > 1e-4


ALL = {0, 1, 2, 3}
CARRY = [
    ("gpt2", {}, 0, {"attn.c_attn"}, ALL), ("llama", {}, 0, {"self_attn.q_proj", "self_attn.v_proj"}, ALL),
    ("llama", {}, 1, {"self_attn.q_proj", "self_attn.v_proj"}, {3}), ("gpt2", {}, 2, {"attn.c_attn"}, {2, 3}),
    ("gpt2", dict(lora_targets="all-linear"), 0, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, ALL),
    ("llama", dict(lora_targets="k_proj,o_proj"), 0, {"self_attn.k_proj", "self_attn.o_proj"}, ALL),
]  # fmt: skip


@pytest.mark.parametrize("family, flags, top_layers, names, layers", CARRY)
def test_which_layers_carry_lora_of_which_rank_and_scale(family, flags, top_layers, names, layers):
    args = okd.parse(["--teacher", "t", *sum(([f"--{k.replace('_', '-')}", v] for k, v in flags.items()), [])])
    model = with_module(tiny(family), args, top_layers)
    found = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    split = [re.search(r"\.(\d+)\.(\w+\.\w+)$", name).groups() for name in found]
    assert {(int(layer), name) for layer, name in split} == {(layer, name) for layer in layers for name in names}
    for module in (model.get_submodule(name) for name in found):
        assert module.lora_A["default"].weight.size(0) == 32 and module.scaling["default"] == 1.0
    (module,) = [model.get_submodule(name) for name in list(found)[:1]]
    twice = with_module(tiny(family), dataclasses.replace(args, lora_scale=2.0), top_layers)
    assert twice.get_submodule(list(found)[0]).scaling["default"] == 2.0


def test_the_students_first_step_is_the_same_whether_or_not_the_teacher_moves(examples, tokenizer):
    ends = []
    for moves in (False, True):
        student, teacher = pair(args := tiny_args(method="fkl", teacher_moves=moves))
        train_tiny(args, student, teacher, examples, tokenizer, steps=1)
        ends.append(dict(student.named_parameters()))
    assert_all_close(*ends, atol=1e-7, rtol=1e-5)


def test_learning_rate_rises_over_3_percent_and_falls_on_a_line_to_0():
    by_hand = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 96 / 97, 51: 49 / 97, 99: 1 / 97}  # three steps rise, 97 fall
    assert {step: okd.learning_rate(step, 100, 1.0) for step in by_hand} == pytest.approx(by_hand)
    assert [okd.learning_rate(step, 4, 2.0) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert okd.learning_rate(0, 1, 1e-3) == 1e-3


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_both_optimizers_step_at_one_learning_rate_unless_told_otherwise(ratio, examples, tokenizer, monkeypatch):
    rates, (student, teacher) = [], pair(args := tiny_args(lr=1e-3, **dict(teacher_lr_ratio=ratio) if ratio else {}))
    wrap(monkeypatch, "update", after=lambda norm, optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]) or norm)
    lines = train_tiny(args, student, teacher, examples, tokenizer, steps=4)
    by_hand = [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert rates[::2] == pytest.approx(by_hand) and [line["train/lr"] for line in lines] == pytest.approx(by_hand)
    assert rates[1::2] == pytest.approx([rate * (ratio or 1) for rate in by_hand])


def test_one_optimizer_owns_the_student_the_other_the_module_and_norms_do_not_decay():
    teacher, student = with_module(tiny(seed=2)), tiny()
    owned = {id(p) for group in okd.adamw(teacher, 0.1).param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in teacher.named_parameters() if "lora_" in name}
    decay = {id(p): group["weight_decay"] for group in okd.adamw(student, 0.1).param_groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "ln_" in name else 0.1), name
    assert okd.Args().weight_decay == 0.0


@pytest.mark.parametrize("method", ["sft", "okd"])
def test_the_split_into_micro_batches_changes_nothing(method, examples, tokenizer, monkeypatch):
    """One batch of eight ragged rows gives the gradient of many smaller ones, of both networks."""
    ends = []
    for tokens in (4096, 90, 60, 1):
        args = tiny_args(method=method, batch_size=8, micro_batch_tokens=tokens, anchor=0.5)
        (student, teacher), captured = pair(args), {}
        with monkeypatch.context() as patch:
            patch.setattr(okd, "update", lambda optimizer, *_: torch.zeros(()))
            train_tiny(args, student, teacher, examples, tokenizer, steps=1)
        captured = gradients(student) | ({f"teacher {k}": v for k, v in gradients(teacher).items()})
        ends.append(captured)
    assert any(name.startswith("teacher") for name in ends[0]) == (method == "okd")
    for other in ends[1:]:
        assert_all_close(other, ends[0], atol=2e-7, rtol=1e-4)


def test_each_network_is_clipped_by_itself(examples, tokenizer, monkeypatch):
    norms, (student, teacher) = [], pair(args := tiny_args(max_grad_norm=1e-3))

    def total(optimizer):
        return math.sqrt(sum(p.grad.pow(2).sum() for group in optimizer.param_groups for p in group["params"]))

    original = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: norms.append(total(self)) or original(self, *a, **k)
    )
    (line,) = train_tiny(args, student, teacher, examples, tokenizer, steps=1)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert (
        line["train/student_grad_norm"] > 0.01 and line["train/teacher_grad_norm"] > 0.002
    )  # reported before the clip


def test_one_batch_can_be_learnt_by_heart(examples, tokenizer):
    student, teacher = pair(args := tiny_args(method="fkl", lr=5e-3))
    lines = train_tiny(args, student, teacher, examples[:4], tokenizer, steps=60)
    assert lines[-1]["train/fkl"] < 0.2 * lines[0]["train/fkl"]


COMMON = {"student_loss", "student_grad_norm", "lr", "phi", "taid_t", "skipped_steps", "tokens_per_s", "sampling_s",
          "peak_memory_gb"}  # fmt: skip
MEASURED = {"fkl", "rkl", "student_ce", "teacher_ce", "student_entropy", "teacher_entropy", "top1_agreement", "drift"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("method", okd.METHODS)
def test_every_row_of_the_method_table_trains_with_the_same_metrics(method, family, examples, tokenizer):
    args = tiny_args(method=method, select="last", eval_every=1, max_new_tokens=4)
    student, teacher = pair(args, family)
    start = snapshot(student)
    lines = train_tiny(args, student, teacher, examples, tokenizer, dev=examples[:3])
    assert changed(start, student)
    moving = {"teacher_loss", "teacher_grad_norm"} if method == "okd" else set()
    names = {f"train/{name}" for name in COMMON | MEASURED | moving}
    assert [line.keys() - {"phase", "step"} for line in lines[1::2]] == [names] * 2
    assert [line.keys() - {"phase", "step"} for line in lines[0::2]] == [{f"dev/{name}" for name in MEASURED}] * 3
    assert (lines[3]["train/sampling_s"] > 0) == (method in ("imitkd", "gkd", "opd", "minillm"))  # distillm's phi is 0
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "phase")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_reported_numbers_are_the_plain_ones(temperature, examples, tokenizer):
    """The loop's numbers by plain forwards: rows, mask, denominator, weights and temperature are right together."""
    args = tiny_args(batch_size=8, micro_batch_tokens=90, divergence="jsd", beta=0.3, student_ce_weight=0.25,
                     alpha=0.35,
                     anchor=0.1, temperature=temperature)  # fmt: skip
    student, teacher = pair(args)
    for name, parameter in teacher.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    rows, tau = okd.batch_of(examples, 8, args.seed, 0), temperature
    with torch.no_grad(), teacher.disable_adapter():
        z_0 = plain_logits(teacher, *rows)
    z_p, z_q = plain_logits(teacher, *rows).detach(), plain_logits(student, *rows).detach()
    labels = torch.tensor([token for row in rows for token in row.response_ids])
    ce, kl = F.cross_entropy, lambda a, b: tau**2 * okd.fkl((a / tau).log_softmax(-1), (b / tau).log_softmax(-1)).mean()
    soft = okd.jsd((z_p / tau).log_softmax(-1), (z_q / tau).log_softmax(-1), 0.3).mean()
    expected = dict(student_loss=0.75 * tau**2 * soft + 0.25 * ce(z_q, labels),
                    drift=kl(z_0, z_p) if tau == 1 else None,
                    teacher_loss=0.65 * ce(z_p, labels) + 0.35 * kl(z_q, z_p) + 0.1 * kl(z_0, z_p),
                    student_ce=ce(z_q, labels), teacher_ce=ce(z_p, labels))  # fmt: skip
    (line,) = train_tiny(args, student, teacher, examples, tokenizer, steps=1)
    expected = {f"train/{name}": value.item() for name, value in expected.items() if value is not None}
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_float32_masters_and_follows_float32(dtype, examples, tokenizer):
    lines, args = {}, tiny_args()
    for hw in (CPU, okd.Hardware(torch.device("cpu"), dtype)):
        student, teacher = tiny(seed=1), with_module(tiny(seed=2).to(hw.dtype))
        start = snapshot(student)
        lines[hw.dtype] = train_tiny(args, student, teacher, examples, tokenizer, steps=3, hw=hw)
        assert all(p.dtype == torch.float32 for p in student.parameters()) and changed(start, student) == set(start)
        assert all(
            p.dtype == (torch.float32 if "lora_" in name else hw.dtype) for name, p in teacher.named_parameters()
        )
    for exact, rough in zip(lines[torch.float32], lines[dtype]):
        for name in ("train/student_loss", "train/teacher_loss", "train/fkl", "train/student_ce"):
            assert rough[name] == pytest.approx(exact[name], rel=0.02), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(dtype, examples, tokenizer, monkeypatch):
    """The student does not move on the first step, and does on those after it."""
    calls, seen, (student, teacher) = [], [], pair(args := tiny_args(lr=1e-2))
    before = snapshot(student)
    wrap(monkeypatch, "student_loss", after=lambda loss, *_: loss * (1.0 if calls or calls.append(1) else math.nan))
    wrap(monkeypatch, "report", before=lambda log, run, phase, step, kind, metrics: seen.append(
        (float(metrics["skipped_steps"]), bool(changed(before, student)))))  # fmt: skip
    train_tiny(args, student, teacher, examples, tokenizer, steps=3, hw=okd.Hardware(torch.device("cpu"), dtype))
    assert seen[0] == (1.0, False) and seen[-1] == (1.0, True)
    assert all(p.isfinite().all() for p in student.parameters())


def test_the_readmes_forty_lines_take_the_step_that_okd_takes(examples, tokenizer):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = next(block for block in blocks if "Algorithm 1" in block)
    assert "okd" not in re.sub("#.*", "", code)
    args, rows = tiny_args(lora_rank=32), okd.batch_of(examples, 4, 1, 0)
    student, teacher = pair(args)
    expected = train_tiny(args, student, teacher, examples, tokenizer, steps=1)[0]
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.prompt_ids + row.response_ids) for row in rows], True)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, len(row.prompt_ids) : len(row)] = True
    lent = dict(student=tiny(seed=1), teacher=tiny(seed=2), input_ids=input_ids, mask=mask, batches=[(input_ids, mask)])
    torch.manual_seed(args.seed)
    exec(compile(code, "README.md", "exec"), lent)
    for name in ("student_loss", "teacher_loss"):
        assert float(lent[name]) == pytest.approx(expected[f"train/{name}"], rel=1e-6)
    assert changed(snapshot(tiny(seed=1)), lent["student"])
    assert_all_close(lent["student"].state_dict(), student.state_dict(), atol=1e-7, rtol=1e-5)
    assert_all_close(lent["teacher"].state_dict(), teacher.state_dict(), atol=1e-7, rtol=1e-5)


# Generating and scoring -----------------------------------------------------------------------------------------------

SENTENCE = (70, 71, 72, 1)  # its last token is EOS


def parrot_head(sentence):
    return [(sentence[0], -1), *((after, before) for before, after in zip(sentence, sentence[1:]))]


def parrot(scale, sentence=SENTENCE):
    """A GPT-2 whose weights are set by hand so that after any prompt it says `sentence`: a table of bigrams.

    Its one block adds nothing and token x is the x-th unit vector, which the last layer norm turns into a peak at x.
    The head's rows of all but the first token look at the peak of the token before, that of the first at a constant."""
    size = 384
    model = tiny(n_embd=size, n_layer=1, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.transformer.ln_f.bias[-1] = 10.0
        for token, column in parrot_head(sentence):
            model.lm_head.weight[token, column] = scale
    return model


def parrot_cross_entropy(scale):
    """-log q of the parrot at the tokens of SENTENCE, from the closed form of layer norm on a unit vector."""
    size, losses = 384, []
    for before, after in zip((13, *SENTENCE), SENTENCE):
        hidden = torch.full((size,), -1 / size).double()
        hidden[before] += 1
        hidden /= math.sqrt(1 / size - 1 / size**2 + 1e-5)
        hidden[-1] += 10
        logits = torch.zeros(size).double()
        for token, column in parrot_head(SENTENCE):
            logits[token] = scale * hidden[column]
        losses.append(-logits.log_softmax(-1)[after].item())
    return losses


def test_a_left_padded_batch_writes_what_single_prompts_write(tokenizer):
    model = tiny("llama", 3)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "some words", "many more words")]
    together = okd.generate(model, tokenizer, prompts, CPU, 12)
    assert together == [okd.generate(model, tokenizer, [prompt], CPU, 12)[0] for prompt in prompts]


def test_greedy_generation_is_the_argmax_of_plain_forwards_and_keeps_the_end():
    model, prompt = tiny("gpt2", 5), [70, 80, 90]
    ids = list(prompt)
    for _ in range(10):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    ending = lambda end: types.SimpleNamespace(eos_token_id=end)  # noqa: E731
    assert okd.generate(model, ending(383), [prompt], CPU, 10) == [ids[3:]]
    (response,) = okd.generate(model, ending(ids[4]), [prompt], CPU, 10)  # the second new token is the end
    assert response == (ids[3:5] if ids[3] != ids[4] else [ids[4]])


def test_sampling_is_a_function_of_the_seed_and_follows_the_distribution(tokenizer):
    model, prompts = tiny("gpt2", 5), [[70, 80]] * 3000
    draw = lambda seed: okd.generate(model, tokenizer, prompts, CPU, 1, 3000, sample=True, seed=seed)  # noqa: E731
    first = draw(1)
    assert first == draw(1) != draw(2)
    share = torch.bincount(torch.tensor(first).flatten(), minlength=384) / 3000
    expected = model(input_ids=torch.tensor([[70, 80]])).logits[0, -1].softmax(-1)
    torch.testing.assert_close(share, expected.detach(), atol=0.03, rtol=0)


def test_a_prompt_that_leaves_no_room_is_refused_also_when_only_the_student_is_too_short(tokenizer):
    long, short = tiny(seed=1), tiny(seed=2, n_positions=20)
    with pytest.raises(okd.UserError, match="a prompt of 20 tokens fills the positions"):
        okd.generate(short, tokenizer, [[70] * 20], CPU, 5)
    for model, teacher in ((short, long), (long, short)):
        (response,) = okd.generate(model, tokenizer, [[70] * 17], CPU, 9, sample=True, teacher=teacher)
        assert len(response) <= 3


def test_a_models_own_generation_config_changes_no_text_and_comes_back_with_the_student(folders, tokenizer, tmp_path):
    plain, own = folders / "gpt2" / "student", tmp_path / "own"
    shutil.copytree(plain, own)
    config = json.loads((own / "generation_config.json").read_text()) | dict(repetition_penalty=5.0, min_p=0.3)
    (own / "generation_config.json").write_text(json.dumps(config))
    models = [okd.load_model(str(path), "student", okd.Args(), torch.float32) for path in (plain, own)]
    for sample in (False, True):
        texts = [okd.generate(model, tokenizer, [[70, 80], [90]], CPU, 30, sample=sample, seed=1) for model in models]
        assert texts[0] == texts[1]
    okd.save_model(models[1], tokenizer, tmp_path / "saved")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.repetition_penalty, saved.min_p, saved.eos_token_id) == (5.0, 0.3, [1])


def test_rouge_l_by_hand():
    # lcs("the cat sat", "the cat was sat on") = 3: precision 3/3, recall 3/5, F = 0.75
    assert okd.rouge_l("the cat sat", ["the cat was sat on"]) == pytest.approx(75.0)
    assert okd.rouge_l("the cat sat", ["no", "the cat sat"]) == pytest.approx(100.0)  # the best reference counts
    assert okd.rouge_l("", ["the cat"]) == 0.0
    assert okd.rouge_l("running dogs", ["run dog"]) == pytest.approx(100.0)  # the stemmer


# Whose text -----------------------------------------------------------------------------------------------------------


def text_of(args, examples, tokenizer, student=None, teacher=None, steps=10):
    state = dict(phi=args.sgo_fraction, reference=None, replay=[], rollouts=[], sampling_s=0.0)
    return okd.Text(args, student, teacher, examples, tokenizer, CPU, steps, state)


def answering(monkeypatch, response):
    """okd.Text.answers without a model: response(step) for every prompt."""
    answers = lambda self, rows, step, teacher=None: [row.answered(response(step), 96) for row in rows]  # noqa: E731
    monkeypatch.setattr(okd.Text, "answers", answers)


@pytest.mark.parametrize("scale", [2.0, 0.2])
def test_sampled_text_is_aligned_and_ends_so_the_parrots_loss_is_the_known_one(scale, examples, tokenizer, monkeypatch):
    args, student = tiny_args(method="imitkd"), parrot(2.0)
    rows = text_of(args, examples, tokenizer, student)(0)
    assert [row.response_ids for row in rows] == [list(SENTENCE)] * 4  # the end among them
    monkeypatch.setattr(okd.Text, "answers", lambda self, *rest: rows)  # a hesitant parrot on the sure one's words
    args.student_ce_weight = 1.0  # which the command refuses: here it makes the loss a known number
    known = parrot_cross_entropy(scale)
    record = train_tiny(args, parrot(scale), parrot(1.0), examples, tokenizer, steps=1)[0]
    assert record["train/student_loss"] == pytest.approx(sum(known) / 4, abs=1e-5)
    assert (max(known) < 1e-6) if scale == 2 else (min(known) > 1)


def test_sampled_text_is_cut_to_max_length_and_all_of_it_is_a_target(examples):
    assert len(examples[0].answered(list(range(5, 205)), 96)) == 96
    assert okd.collate([examples[0].answered(list(SENTENCE), 96)], "cpu").labels.tolist() == list(SENTENCE)


WHOSE = [
    ("fkl", {}, 0), ("okd", {}, 0), ("imitkd", {}, 1), ("opd", {}, 1), ("gkd", {}, 0.5),
    ("okd", dict(text="student", anchor=0.1), 1), ("fkl", dict(text="student"), 1),
    ("rkl", dict(text="student", sgo_fraction=0.2), 0.2),
]  # fmt: skip


@pytest.mark.parametrize("method, flags, share", WHOSE)
def test_whose_text_follows_the_flags(method, flags, share, examples, tokenizer, monkeypatch):
    answering(monkeypatch, lambda step: list(SENTENCE))
    text = text_of(tiny_args(method=method, **flags), examples, tokenizer)
    own = [[row.response_ids == list(SENTENCE) for row in text(step)] for step in range(400)]
    assert all(all(rows) or not any(rows) for rows in own)
    assert abs(sum(map(all, own)) - 400 * share) <= 3 * math.sqrt(400 * share * (1 - share))


def test_replay_buffer_is_first_in_first_out_and_keeps_its_capacity(examples, tokenizer, monkeypatch):
    answering(monkeypatch, lambda step: [100 + step, 1])
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 10)
    text, drawn = text_of(tiny_args(method="opd", sgo_source="replay"), examples, tokenizer), []
    for step in range(8):
        drawn.append({row.response_ids[0] - 100 for row in text(step)})
        held = [row.response_ids[0] - 100 for row in text.state["replay"]]
        assert held == sorted(step for step in range(step + 1) for _ in range(4))[-10:]
        assert drawn[-1] <= set(held)
    assert any(steps != {i} for i, steps in enumerate(drawn))  # not only what was just written


def test_distillm_draws_fresh_text_until_the_buffer_is_full_then_replays_ever_more(examples, tokenizer, monkeypatch):
    answering(monkeypatch, lambda step: [100 + step, 1])
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 12)
    text, kinds = text_of(tiny_args(method="distillm"), examples, tokenizer, steps=100), []
    text.state["phi"] = 0.6
    for step in range(100):
        full, r = len(text.state["replay"]) >= 12, random.Random(f"1, text of step {step}").random()
        kinds.append("data" if r >= 0.6 else "fresh" if r < 0.6 * (1 - step / 100) or not full else "replay")
        steps = {row.response_ids[0] - 100 for row in text(step) if len(row.response_ids) == 2}
        assert dict(data=not steps, fresh=steps == {step}, replay=bool(steps) and step not in steps)[kinds[-1]]
    assert {"data", "fresh", "replay"} == set(kinds)
    assert kinds[60:].count("replay") > kinds[:40].count("replay")


def test_phi_grows_by_a_tenth_when_the_validation_loss_rose_by_a_tenth(examples, tokenizer):
    text, phis = text_of(tiny_args(method="distillm"), examples, tokenizer), []
    for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.2, 2.19, 1.0, 2.31):
        text.validated(loss)
        phis.append(round(text.state["phi"], 6))
    #                 first: reference 2.0, below 2.1 nothing; 2.1 hits (reference 2.1), 2.2 hits (2.2), 2.31 hits
    assert phis == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3]
    text.state["phi"] = 0.95
    text.validated(9.0)
    assert text.state["phi"] == 1.0


def test_return_against_a_loop():
    rewards = random_logits(7, seed=5)
    slow = [sum(0.95 ** (k - t) * rewards[k].item() for k in range(t, 7)) / (7 - t) for t in range(7)]
    assert okd.discounted_return(rewards, 0.95).tolist() == pytest.approx(slow)


def test_rollouts_carry_advantage_log_q_and_weight_of_every_token(examples, tokenizer):
    student, teacher = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    text = text_of(tiny_args(method="minillm", micro_batch_tokens=60), examples, tokenizer, student, teacher)
    rows = [row.answered(ids, 96) for row, ids in zip(examples, ([70, 71, 1], [80, 1], [90, 91, 92, 93]))]
    judged, returns = text.judged(rows), []
    for row in sorted(rows, key=len):
        p, q = (plain_logits(model, row).log_softmax(-1) for model in (teacher, student))
        log_p, log_q = ([log[i, token].item() for i, token in enumerate(row.response_ids)] for log in (p, q))
        rewards, n = [a - b for a, b in zip(log_p, log_q)], len(log_p)
        returns += [sum(0.95 ** (k - t) * rewards[k] for k in range(t, n)) / (n - t) for t in range(n)]
        got = next(other for other in judged if other.response_ids == row.response_ids).rollout
        assert [value[1] for value in got] == pytest.approx(log_q, abs=1e-5)
        weights = [math.exp(b) / (0.2 * math.exp(a) + 0.8 * math.exp(b)) for a, b in zip(log_p, log_q)]
        assert [value[2] for value in got] == pytest.approx(weights, rel=1e-4)
    flat = torch.tensor(returns)
    whitened = ((flat - flat.mean()) / flat.std(unbiased=False)).tolist()
    assert sum(([value[0] for value in row.rollout] for row in judged), []) == pytest.approx(whitened, abs=1e-3)
    assert okd.collate(judged, "cpu").rollout.shape == (9, 3)


def test_at_the_first_pass_over_fresh_rollouts_the_ratio_is_1_although_the_model_has_dropout(
    folders, jsonl, tmp_path, capsys, monkeypatch
):
    seen = []
    wrap(monkeypatch, "policy_loss", before=lambda log_q, labels, advantage, sampled, *rest: seen.append(
        (-okd.cross_entropy(log_q, labels) - sampled).abs().max().item()))  # fmt: skip
    flags = [*small_flags(folders, jsonl, tmp_path), "--method", "minillm", "--rollouts", "4", "--lr", "1e-2"]
    code, _, err = run(okd.main, capsys, *flags, *NO_SFT)
    assert code == 0, err
    assert seen[0] < 1e-4 < max(seen)  # the second step is a second pass


def test_policy_gradient_is_that_of_the_expected_reward_by_finite_differences():
    """Two tokens of the mixture: the importance-weighted gradient, averaged over it, is that of E_q[reward]."""
    z_p, rewards = torch.tensor([0.3, -0.1]).double(), torch.tensor([0.7, -0.4]).double()
    z_q = torch.tensor([0.1, 0.05], dtype=torch.float64, requires_grad=True)
    log_p, log_q = z_p.log_softmax(-1), z_q.detach().log_softmax(-1)
    log_m, labels = okd.mix(log_p, log_q, okd.TEACHER_SHARE), torch.tensor([0, 1])
    loss = okd.policy_loss(z_q.log_softmax(-1).expand(2, 2), labels, rewards, log_q, (log_q - log_m).exp())
    (gradient,) = torch.autograd.grad((log_m.exp() * loss).sum(), z_q)
    expected = lambda z: (z.softmax(-1) * rewards).sum().item()  # noqa: E731
    for i in range(2):
        nudge = torch.zeros(2).double()
        nudge[i] = 1e-6
        finite = (expected(z_q.detach() + nudge) - expected(z_q.detach() - nudge)) / 2e-6
        assert -gradient[i].item() == pytest.approx(finite, rel=1e-6)


def test_policy_loss_clips_the_ratio_times_the_weight_pessimistically():
    z = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    log_q, labels = torch.full((4,), math.log(0.5)).double(), torch.zeros(4, dtype=torch.long)
    advantage, weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), torch.tensor([1.5, 0.5, 1.5, 0.5]).double()
    loss = okd.policy_loss(z.log_softmax(-1), labels, advantage, log_q, weight)
    assert loss.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])  # -min(w A, clip(w, 0.8, 1.2) A)
    loss.sum().backward()
    assert [bool(row.abs().sum() > 0) for row in z.grad] == [False, True, True, False]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_mixture_sampling_uses_p_and_q_of_plain_forwards_at_every_token(family, with_lora):
    """Left-padded, cached, two prompts at once, against one unpadded forward for every prefix."""
    student, teacher = tiny(family, 1), tiny(family, 2)
    teacher = with_module(teacher, std=0.1) if with_lora else teacher
    prompts, new = [[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 92], [93, 94, 95]]
    processor = okd.Mixture(teacher, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]))
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    for step in range(3):
        texts = [torch.tensor([prompt + words[:step]]) for prompt, words in zip(prompts, new)]
        with torch.no_grad():
            p, q = (
                torch.stack([model(input_ids=text).logits[0, -1] for text in texts]) for model in (teacher, student)
            )
            got = processor(ids, q)
        torch.testing.assert_close(got.exp(), 0.2 * p.softmax(-1) + 0.8 * q.softmax(-1), atol=1e-5, rtol=1e-4)
        ids = torch.cat([ids, torch.tensor([[words[step]] for words in new])], dim=1)


def test_minillm_samples_anew_after_its_passes(examples, tokenizer, monkeypatch):
    calls = []
    keep = lambda self, rows, step, teacher=None: calls.append((step, len(rows), teacher)) or rows  # noqa: E731
    monkeypatch.setattr(okd.Text, "answers", keep)
    monkeypatch.setattr(okd.Text, "judged", lambda self, rows: rows)
    text = text_of(tiny_args(method="minillm", rollouts=8), examples, tokenizer, teacher="T", steps=16)
    seen = [sorted(id(row) for rows in (text(step), text(step + 1)) for row in rows) for step in range(0, 16, 2)]
    assert calls == [(0, 8, "T"), (8, 8, "T")]  # two batches a pass, four passes
    assert seen[0] == seen[1] == seen[2] == seen[3] != seen[4]


def test_seqkd_trains_on_the_teachers_text_and_goes_on_with_it_or_not_at_all(
    folders, jsonl, tmp_path, capsys, monkeypatch
):
    parrot(4.0).save_pretrained(tmp_path / "parrot")
    okd.load_tokenizer("demo", okd.Args()).save_pretrained(tmp_path / "parrot")
    flags = [*small_flags(folders, jsonl, tmp_path), "--teacher", tmp_path / "parrot", "--method", "seqkd", *NO_SFT,
             "--eval-rows", "0", "--save-every", "1"]  # fmt: skip
    seen = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        wrap(patch, "run_batch", before=lambda student, teacher, batch, *rest: seen.append(batch.labels.tolist()))
        kill_at(patch, 2)
        run(okd.main, capsys, *flags)
    assert seen and all(labels == list(SENTENCE) * 4 for labels in seen)
    (tmp_path / "run" / "teacher_text.json").rename(tmp_path / "kept")
    code, _, err = run(okd.main, capsys, "--resume", tmp_path / "run")
    assert code == 2 and "teacher_text.json, which this run trains on, is gone" in err
    (tmp_path / "kept").rename(tmp_path / "run" / "teacher_text.json")
    assert run(okd.main, capsys, "--resume", tmp_path / "run")[0] == 0


def test_sample_batch_size_reaches_training_text_seqkd_and_scoring(folders, jsonl, tmp_path, capsys, monkeypatch):
    sizes = set()
    wrap(monkeypatch, "generate", before=lambda *args, **named: sizes.add(args[5]))
    for method in ("imitkd", "seqkd", "minillm"):
        flags = [
            *small_flags(folders, jsonl, tmp_path / method),
            "--method",
            method,
            *NO_SFT,
            "--sample-batch-size",
            "3",
        ]
        assert run(okd.main, capsys, *flags)[0] == 0
    assert sizes == {3}


# The command ----------------------------------------------------------------------------------------------------------


def run(main, capsys, *flags):
    """okd.main or eval.main in this process -> (exit code, stdout, stderr)."""
    code = 0
    try:
        main([str(flag) for flag in flags])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


NO_SFT = ("--teacher-sft-epochs", "0", "--student-sft-epochs", "0")


def small_flags(folders, jsonl, tmp_path, family="gpt2"):
    return ["--teacher", folders / family / "teacher", "--student", folders / family / "student", "--data", jsonl,
            "--output-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache", "--max-steps", "2",
            "--batch-size", "4", "--max-length", "96", "--max-new-tokens", "8", "--score-rows", "4", "--device", "cpu",
            "--precision", "fp32", "--log-every", "1", "--lora-rank", "4"]  # fmt: skip


def test_a_run_leaves_folders_that_load_everywhere_and_a_second_starts_from_the_same_bits(
    folders, jsonl, tmp_path, capsys
):
    code, out, err = run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 0, err
    block = dict(line.split(": ", 1) for line in out.splitlines() if re.match(r"[a-z_]+: ", line))
    assert block["method"] == "okd" and block["steps"] == "2" and re.search(r"\nstudent, okd +\d", out)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "models.json", "student",
                                                         "student_sft", "teacher_lora", "teacher_sft"}  # fmt: skip
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "student").config.vocab_size == 384
    writer = transformers.pipeline("text-generation", model=str(folder / "student"), max_new_tokens=4)
    assert writer("shout ba\n")[0]["generated_text"].startswith("shout ba\n")
    adapter = json.loads((folder / "teacher_lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == block["teacher"] and adapter["lora_alpha"] == adapter["r"] == 4
    teacher = transformers.AutoModelForCausalLM.from_pretrained(block["teacher"])
    moved = peft.PeftModel.from_pretrained(teacher, folder / "teacher_lora")
    assert any(p.abs().sum() > 0 for name, p in moved.named_parameters() if "lora_B" in name)
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["method"], saved["divergence"], saved["teacher_moves"], saved["precision"]) == (
        "okd",
        "fkl",
        True,
        "fp32",
    )
    assert {record["phase"] for record in records(folder)} == {"distil", "final"}
    final = records(folder)[-1]
    assert {"final/rouge_l", "final/rouge_l_teacher", "final/rouge_l_start", "final/distil_s", "final/sampling_s",
            "final/selected_step", "final/dev_rouge_l", "final/dev_rouge_l_last"} <= final.keys()  # fmt: skip

    flags = [*small_flags(folders, jsonl, tmp_path), "--output-dir", tmp_path / "other", "--method", "fkl"]
    code, out, err = run(okd.main, capsys, *flags)
    assert code == 0 and out.count("fine-tuned before, kept in") == 2, err
    first, second = (records(tmp_path / name)[0] for name in ("run", "other"))
    assert first == second and "dev/fkl" in first
    code, _, err = run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 2 and "holds a run" in err


def test_the_cache_key_changes_with_what_determines_the_weights_and_with_nothing_else(folders, jsonl, tmp_path, capsys):
    flags = [*small_flags(folders, jsonl, tmp_path), "--score-rows", "0", "--eval-rows", "0", "--max-steps", "1"]
    touched, retrained = tmp_path / "touched", tmp_path / "retrained"
    shutil.copytree(folders / "gpt2" / "teacher", touched / "teacher")
    tiny("gpt2", 9, **DROPOUT).save_pretrained(retrained / "teacher")
    okd.load_tokenizer("demo", okd.Args()).save_pretrained(retrained / "teacher")
    os.utime(touched / "teacher" / "model.safetensors", (1, 1))
    counts = []
    for i, change in enumerate([(), ("--student-sft-lr", "5e-4"), ("--lora-rank", "2"), ("--seed", "3", "--lr", "1e-3"),
                                ("--teacher", touched / "teacher"), ("--teacher", retrained / "teacher")]):  # fmt: skip
        assert run(okd.main, capsys, *flags, *change, "--output-dir", tmp_path / f"run{i}")[0] == 0
        counts.append(tuple(len(list((tmp_path / "cache").glob(f"{role}-*"))) for role in ("student", "teacher")))
    # lr of the student's start: the student's; rank: the LoRA-tuned teacher's; seed, lr, time of the file: none
    assert counts == [(1, 1), (2, 1), (2, 2), (2, 2), (2, 2), (2, 3)]


@pytest.mark.parametrize("select, kept", [("best", 2), ("last", 4)])
def test_the_student_with_the_best_look_is_kept_also_when_killed_between_looks(
    select, kept, folders, jsonl, tmp_path, capsys, monkeypatch
):
    scores, weights = {0: 1.0, 1: 2.0, 2: 9.0, 3: 3.0, 4: 9.0 - 1e-9}, {}

    def keep(log, wandb_run, phase, step, kind, metrics):
        if kind == "dev":
            weights[step] = looked[-1]

    looked, state = [], dict(step=0)

    def evaluated(means, args, student, *rest):
        step = len(looked) if not killed else state["step"]
        looked.append({name: p.clone() for name, p in student.state_dict().items()})
        state["step"] = step + 1
        return means | (dict(rouge_l=scores[step]) if args.select == "best" else {})

    killed = False
    wrap(monkeypatch, "evaluate", after=evaluated)
    wrap(monkeypatch, "report", before=keep)
    flags = [*long_flags(folders, jsonl, tmp_path), "--max-steps", "4", "--eval-every", "1", "--select", select,
             "--lr", "1e-2", "--save-every", "1"]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)  # in step 4, after the look at 3
        run(okd.main, capsys, *flags)
    killed, state["step"] = True, 3
    code, _, err = run(okd.main, capsys, "--resume", tmp_path / "run")
    assert code == 0, err
    student = weights_of(tmp_path / "run")
    assert all(torch.equal(value, weights[kept][name]) for name, value in student.items())
    final = records(tmp_path / "run")[-1]
    if select == "best":
        assert (final["final/selected_step"], final["final/dev_rouge_l"]) == (2, 9.0)
        assert final["final/dev_rouge_l_last"] == scores[4]


def test_a_lora_tuned_teacher_is_merged_in_float32_and_rounded_once(folders, jsonl, tmp_path, capsys):
    flags = [*small_flags(folders, jsonl, tmp_path, "llama"), "--precision", "bf16", "--teacher-sft-lr", "1e-2"]
    code, out, err = run(okd.main, capsys, *flags)
    assert code == 0, err
    before, after = map(float, re.search(r"CE on dev rows ([\d.]+) with LoRA, ([\d.]+) merged", out).groups())
    assert after == pytest.approx(before, rel=0.02)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama" / "teacher")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "teacher_sft").merge_and_unload()
    (kept,) = (tmp_path / "cache").glob("teacher-*")
    for name, value in weights_of(kept, "model.safetensors").items():
        assert torch.equal(value, merged.state_dict()[name].to(torch.bfloat16)), name


def test_wandb_offline_gets_name_config_metrics_and_samples(folders, jsonl, tmp_path):
    flags = [*map(str, small_flags(folders, jsonl, tmp_path)), "--track", *NO_SFT]
    subprocess.run([sys.executable, ROOT / "okd.py", *flags], check=True, capture_output=True, cwd=tmp_path)
    (wandb_file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    wanted = [b"train/student_loss", b"dev/fkl", b"final/rouge_l_start", b"samples", b"teacher_lr_ratio"]
    for _ in range(100):  # wandb's own process closes the file a little after ours has ended
        missing = [text for text in wanted if text not in wandb_file.read_bytes()]
        if not missing:
            break
        time.sleep(0.1)
    assert not missing and wandb_file.stem == "run-run"  # the run's id is its folder's name


def test_a_wandb_that_does_not_start_is_one_line_before_anything_is_trained(
    folders, jsonl, tmp_path, capsys, monkeypatch
):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.CommError("unreachable")))
    code, _, err = run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path), "--track")
    assert code == 2 and "cannot start wandb" in err and err.count("\n") == 1 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flags", [("--method", "fkl"), ("--method", "okd", "--lora-top-layers", "2")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_cached_teacher_states_change_no_number_and_are_shared(family, flags, folders, jsonl, tmp_path, capsys):
    ends, files = [], []
    for name, more in (("plain", ()), ("cached", ("--cache-teacher",)), ("again", ("--cache-teacher",))):
        basic = [*small_flags(folders, jsonl, tmp_path, family), "--cache-dir", tmp_path / "cache", "--max-steps", "12"]
        code, out, err = run(okd.main, capsys, *basic, "--output-dir", tmp_path / name, *NO_SFT, *flags, *more)
        assert code == 0, err
        files.append("GB to" in out)
        ends.append(weights_of(tmp_path / name))
    assert files == [False, True, False]  # written once
    assert_all_close(ends[1], ends[0], atol=2e-6, rtol=1e-4)
    assert all(torch.equal(ends[2][name], value) for name, value in ends[1].items())


def test_cached_states_spare_the_blocks_below_and_the_file_holds_what_it_should(examples, tmp_path):
    args, calls = tiny_args(cache_dir=tmp_path, cache_teacher=True, lora_top_layers=2, lr=1e-3), []
    student, teacher = pair(args, "llama")
    rows = okd.with_states(args, teacher, "t", examples, CPU)
    (path,) = tmp_path.glob("states-*")
    assert path.stat().st_size == sum(map(len, examples)) * 32 * 4
    frozen = okd.with_states(tiny_args(method="fkl", cache_dir=tmp_path), tiny("llama", 2), "t", examples, CPU)
    assert [len(row.states) for row in frozen] == [len(row.response_ids) for row in examples]
    watch = okd.blocks_of(teacher)[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for part in (examples[5:9], rows[5:9]):
        calls.clear(), student.zero_grad(), teacher.zero_grad()
        batch = okd.collate(part, "cpu")
        sums = okd.run_batch(student, teacher, batch, CPU, both_losses(), backward, True, True, True)
        found.append((sums, gradients(teacher), gradients(student), len(calls)))
    watch.remove()
    assert (found[0][3], found[1][3]) == (2, 0)  # for p_f and p_0; for neither
    for plain_ones, cached in zip(found[0][:3], found[1][:3]):
        assert_all_close(cached, plain_ones, atol=1e-5, rtol=1e-4)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(okd.UserError, match="off what the teacher computes"):
        okd.with_states(args, teacher, "t", examples, CPU)
    with pytest.raises(okd.UserError, match="nothing to keep"):
        okd.with_states(args, pair(tiny_args())[1], "t", examples, CPU)


def vocabulary(names):
    """A tokenizer of words: {name: id}, those in <> special."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict.fromkeys(["a"], 0) | names, unk_token="a"))
    backend.add_special_tokens([name for name in names if name.startswith("<")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_tokenizers_may_differ_in_reserved_names_and_eos_but_in_no_ordinary_token(capsys):
    ours = vocabulary({"b": 1, "c": 2, "<end>": 3, "<turn>": 4})
    renamed = vocabulary({"b": 1, "c": 2, "<end>": 3, "<reserved>": 4})
    assert okd.one_tokenizer(ours, ours) is ours and capsys.readouterr().out == ""
    assert okd.one_tokenizer(ours, renamed) is ours
    assert "the student gets the teacher's tokenizer" in capsys.readouterr().out
    base = vocabulary({"b": 1, "c": 2, "<end>": 3, "<turn>": 4})
    base.eos_token = "<turn>"
    assert okd.one_tokenizer(ours, base) is ours
    assert "EOS is <end> and was <turn>, 0 reserved tokens differ" in capsys.readouterr().out
    with pytest.raises(okd.UserError, match=r"2 tokens of teacher and student differ, as \['c', 'x'\]"):
        okd.one_tokenizer(ours, vocabulary({"b": 1, "x": 2, "<end>": 3, "<turn>": 4}))


def test_heads_of_two_sizes_are_cut_to_what_they_share(folders, jsonl, tmp_path, capsys):
    tiny("llama", 1, vocab_size=400).save_pretrained(tmp_path / "padded")
    okd.load_tokenizer("demo", okd.Args()).save_pretrained(tmp_path / "padded")
    flags = [*small_flags(folders, jsonl, tmp_path, "llama"), "--teacher", tmp_path / "padded", *NO_SFT]
    code, out, err = run(okd.main, capsys, *flags)
    assert code == 0 and "heads of [400, 384] rows are cut to the 384 they share" in out, err


BAD = [  # rows of the training file, or flags, and what the one line says
    ("{}", [], "line 1 needs instruction and output, prompt and response, or messages"),
    ('{"prompt": "a", "response": "b"}\n{"prompt": 1}', [], "line 2 needs instruction"),
    ("{nonsense", [], "line 1 needs instruction"), ("", [], "no usable row among 0"),
    ('{"prompt": "a", "response": ""}', [], "no usable row among 1"),
    ('{"messages": [{"role": "user", "content": "a"}]}', [], "not the assistant's"),
    ('{"prompt": "a\\ud800", "response": "b"}', [], "line 1 needs instruction"),
    (None, ["--lr", "0"], "--lr is 0.0: it must lie in"), (None, ["--lr", "nan"], "--lr is nan"),
    (None, ["--batch-size", "0"], "--batch-size is 0: it must lie in [1"),
    (None, ["--teacher-sft-lr", "-1"], "--teacher-sft-lr is -1"),
    (None, ["--alpha", "1"], "--alpha 1 needs --anchor"), (None, ["--alpha", "1.5"], "--alpha is 1.5"),
    (None, ["--text", "student"], "a moving teacher needs --anchor on student text"),
    (None, ["--text", "mixture"], "a moving teacher needs --anchor on student text"),
    (None, ["--method", "gkd", "--student-ce-weight", "0.5"], "--student-ce-weight on student text"),
    (None, ["--method", "gkd", "--sgo-fraction", "0"], "--text student with --sgo-fraction 0"),
    (None, ["--method", "distillm", "--eval-rows", "0"], "--text adaptive needs --eval-rows"),
    (None, ["--method", "gkd", "--cache-teacher"], "--cache-teacher needs text that stays"),
    (None, ["--cache-teacher"], "--cache-teacher needs --lora-top-layers"),
    (None, ["--shard"], "--shard needs several processes"),
    (None, ["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (None, ["--teacher", "./no/such/folder"], "cannot load the tokenizer of ./no/such/folder"),
    (None, ["--lora-targets", "q_projj"], "--lora-targets q_projj does not fit: name some of c_attn, c_fc, c_proj"),
    (None, ["--lora-top-layers", "9"], "the teacher has only 4 layers"),
    (None, ["--max-length", "999"], "--max-length 999 is more than the positions"),
    (None, ["--device", "cuda:77"], "--device cuda:77 is not usable here"),
    (None, ["--device", "toaster"], "--device toaster is not usable here"),
    (None, ["--teacher-quant", "4bit"], "cannot load the teacher"),
]  # fmt: skip


@pytest.mark.parametrize("rows, flags, message", BAD)
def test_bad_input_is_one_line_and_exit_2(rows, flags, message, folders, jsonl, tmp_path, capsys):
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text(rows)
        flags = ["--data", tmp_path / "rows.jsonl"]
    code, _, err = run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path), *NO_SFT, *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "student").exists()


def test_without_a_network_one_line_names_what_is_missing(folders, tmp_path, capsys):
    flags = [flag for flag in small_flags(folders, "x", tmp_path) if flag not in ("--data", "x")]
    code, _, err = run(okd.main, capsys, *flags)
    assert code == 2 and err.count("\n") == 1
    assert all(word in err for word in ("raw.jsonl", "MiniLLM/dolly", "HF_HOME"))
    code, _, err = run(okd.main, capsys, "--teacher", "nobody/nothing", "--student", "nobody/nothing")
    assert code == 2 and "nobody/nothing" in err and "HF_HOME" in err and err.count("\n") == 1


def test_no_pickle_no_network_and_no_foreign_code_by_default(folders, jsonl, tmp_path, capsys, monkeypatch):
    loads = re.findall(r"torch\.load\((.*)\)", (ROOT / "okd.py").read_text() + (ROOT / "eval.py").read_text())
    assert len(loads) == 1 and "weights_only=True" in loads[0] and okd.Args().trust_remote_code is False
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked for"))
    assert run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path))[0] == 0
    shutil.copytree(folders / "gpt2" / "teacher", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    flags = [*small_flags(folders, jsonl, tmp_path / "2"), "--teacher", tmp_path / "pickled"]
    code, _, err = run(okd.main, capsys, *flags)
    assert code == 2 and "cannot load the teacher" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "units, dtype", [(("amx_bf16",), torch.bfloat16), (("avx512_bf16",), torch.bfloat16), ((), torch.float32)]
)
def test_precision_auto_is_bf16_where_the_cpu_is_fast_at_it(units, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    assert okd.pick_hardware(okd.Args(device="cpu")).dtype == dtype
    assert okd.pick_hardware(okd.Args(device="cpu", precision="fp16")).dtype == torch.float16


def test_no_forward_asks_whether_rows_are_packed_for_that_would_wait_for_the_device(examples):
    asked = torch.arange(6)[None].expand(2, -1)
    okd.pick_hardware(okd.Args(device="cpu"))
    with TorchDispatchCounter() as counter:
        assert transformers.masking_utils.find_packed_sequence_indices(asked) is None
        okd.trunk(tiny("llama"), okd.collate(examples[:3], "cpu"))
    assert not {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"} & counter.names


class TorchDispatchCounter(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = getattr(self, "names", set()) | {function._schema.name}
        return function(*args, **(kwargs or {}))


def test_help_has_a_text_and_a_default_for_every_flag():
    environment = {**os.environ, "COLUMNS": "250"}
    done = subprocess.run([sys.executable, ROOT / "okd.py", "--help"], capture_output=True, text=True, env=environment)
    words = " ".join(done.stdout.replace("│", " ").split())
    source = (ROOT / "okd.py").read_text().split("class Args:")[1]
    for field in dataclasses.fields(okd.Args):
        assert "--" + field.name.replace("_", "-") in words, field.name
        comment = re.search(rf"^    {field.name}: .*  # (.*)$", source, re.M)
        assert comment is None or comment[1] in words, field.name
    assert words.count("(default:") >= len(dataclasses.fields(okd.Args))


# Survives: resume, faults, more than one process ----------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: no handler of the program sees it."""


def long_flags(folders, jsonl, tmp_path, *more, family="gpt2"):
    return [*small_flags(folders, jsonl, tmp_path, family), "--max-steps", "12", "--epochs", "9", "--save-every", "3",
            "--log-every", "2", "--eval-every", "5", "--eval-rows", "4", *NO_SFT, *more]  # fmt: skip


def kill_at(monkeypatch, call, target="run_batch"):
    """The `call`-th call of okd.<target>, looks at the dev rows not counted, ends the process for all it can tell."""
    calls = []

    def before(*args, **named):
        if target == "run_batch" and "losses" not in named and len(args) < 5:
            return  # a look at the dev rows
        calls.append(1)
        if len(calls) == call:
            raise Killed

    wrap(monkeypatch, target, before=before)


def weights_of(folder, name="student/model.safetensors"):
    return safetensors.torch.load_file(folder / name)


def timeless(folder):
    """metrics.jsonl without what a clock or the machine decides."""
    clocks = {"train/tokens_per_s", "train/peak_memory_gb", "final/tokens_per_s", "final/peak_memory_gb"}
    return [{k: v for k, v in record.items() if k not in clocks and not k.endswith("_s")} for record in records(folder)]


def assert_same_run(folder, expected):
    ours, theirs = weights_of(folder), weights_of(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert timeless(folder) == timeless(expected) and not (folder / "checkpoints").exists()


RESUMED = dict(okd=[], taid=[], gkd=[], opd=["--sgo-source", "replay"], minillm=["--rollouts", "4"],
               distillm=["--sgo-fraction", "0.7"])  # fmt: skip


@pytest.mark.parametrize("method", RESUMED)
def test_a_killed_run_ends_bit_identical_to_one_that_was_not(method, folders, jsonl, tmp_path, capsys, monkeypatch):
    """GPT-2 with dropout, killed between two checkpoints and again later; weights, metrics, number of records."""
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 8)
    flags = ["--method", method, *RESUMED[method]]
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a", *flags))[0] == 0
    first, again = long_flags(folders, jsonl, tmp_path / "b", *flags), ["--resume", tmp_path / "b" / "run"]
    for call, asked in ((8, first), (4, again)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, call, "student_loss")
            run(okd.main, capsys, *asked)
    code, out, _ = run(okd.main, capsys, "--resume", tmp_path / "b" / "run")
    assert code == 0 and re.search(r"goes on after step [369]", out)
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_resume_begins_where_nothing_is_and_kills_in_warm_start_and_scoring_lose_nothing(
    folders, jsonl, tmp_path, capsys, monkeypatch
):
    warm = ["--teacher-sft-epochs", "1", "--student-sft-epochs", "1"]
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a", *warm))[0] == 0
    folder, said = tmp_path / "b" / "run", ""
    first = [*long_flags(folders, jsonl, tmp_path / "b", *warm), "--resume", folder]
    for target, call in (("student_loss", 6), ("student_loss", 14), ("student_loss", 12), ("finish", 1)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, call, target)
            run(okd.main, capsys, *first)
        said += capsys.readouterr().out
    code, out, _ = run(okd.main, capsys, *first)
    said += out
    assert code == 0 and "teacher_sft: goes on after step 3" in said and "student_sft: goes on after step 6" in said
    assert_same_run(folder, tmp_path / "a" / "run")


# A save forces its file to the disk, takes the name, and forces the folder; the second save is that of step 6.
@pytest.mark.parametrize("moment, call, after", [("before the rename", 3, 3), ("after the rename", 4, 6)])
def test_a_kill_inside_a_save_leaves_a_whole_checkpoint(
    moment, call, after, folders, jsonl, tmp_path, capsys, monkeypatch
):
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a"))[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        calls = []

        def counted(path, *rest, original=os.fsync):
            if os.readlink(f"/proc/self/fd/{path}").find("checkpoints") > 0:
                calls.append(1)
            if len(calls) == call:
                raise Killed(moment)
            original(path)

        patch.setattr(os, "fsync", counted)
        patch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "b"))
    code, out, _ = run(okd.main, capsys, "--resume", tmp_path / "b" / "run")
    assert code == 0 and f"goes on after step {after}" in out
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {"flipped": flip, "truncated": lambda path: os.truncate(path, 100), "empty": lambda path: os.truncate(path, 0)}


@pytest.fixture
def killed_at_step_ten(folders, jsonl, tmp_path, capsys, monkeypatch):
    """A run folder with the checkpoints of steps 6 and 9, beside that of an unbroken run."""
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a"))[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 11, "student_loss")
        run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "b"))
    folder = tmp_path / "b" / "run"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000006.pt", "step-00000009.pt"]
    return folder, tmp_path / "a" / "run"


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_used(harm, killed_at_step_ten, capsys):
    folder, expected = killed_at_step_ten
    HARM[harm](folder / "checkpoints" / "step-00000009.pt")
    code, out, err = run(okd.main, capsys, "--resume", folder)
    assert code == 0 and "step-00000009.pt is damaged" in err and "goes on after step 6" in out
    assert_same_run(folder, expected)


def test_what_cannot_be_resumed_is_one_line(killed_at_step_ten, tmp_path, capsys):
    folder, expected = killed_at_step_ten
    for flags, message in (
        ([expected], "holds a run"),
        ([folder, "--precision", "fp16"], "was begun in fp32: drop --precision"),
    ):
        code, _, err = run(okd.main, capsys, "--resume", *flags)
        assert code == 2 and message in err and err.count("\n") == 1
    for path in (folder / "checkpoints").iterdir():
        HARM["truncated"](path)
    code, _, err = run(okd.main, capsys, "--resume", folder)
    assert code == 2 and "every checkpoint in" in err and "Traceback" not in err
    (folder / "args.json").write_text("{oops")
    code, _, err = run(okd.main, capsys, "--resume", folder)
    assert code == 2 and "not the folder of a run that can go on" in err


def test_a_resumed_run_has_the_teacher_it_began_with_or_none(folders, jsonl, tmp_path, capsys, monkeypatch):
    flags = [*long_flags(folders, jsonl, tmp_path), "--teacher-sft-epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5, "teacher_loss")
        run(okd.main, capsys, *flags)
    (kept,) = (tmp_path / "cache").glob("teacher-*")
    kept.rename(tmp_path / "elsewhere")
    code, _, err = run(okd.main, capsys, "--resume", tmp_path / "run", "--teacher-sft-lr", "1e-3")
    assert code == 2 and f"was begun from {kept}, which is gone" in err and err.count("\n") == 1
    (tmp_path / "elsewhere").rename(kept)
    loaded = []
    wrap(monkeypatch, "load_model", before=lambda name, role, *rest, **named: loaded.append((role, name)))
    assert run(okd.main, capsys, "--resume", tmp_path / "run", "--teacher-sft-lr", "1e-3")[0] == 0
    assert ("teacher", str(kept)) in loaded and len(list((tmp_path / "cache").glob("teacher-*"))) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves_and_a_second_ends_at_once(
    number, code, folders, jsonl, tmp_path, capsys, monkeypatch
):
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a", "--save-every", "0"))[0] == 0
    with monkeypatch.context() as patch:
        original, calls = okd.student_loss, []

        def signalled(*args, **kwargs):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), number)
                assert signal.getsignal(number) == signal.SIG_DFL  # whoever comes second is the system's business
            return original(*args, **kwargs)

        patch.setattr(okd, "student_loss", signalled)
        got, _, err = run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "b", "--save-every", "0"))
    folder = tmp_path / "b" / "run"
    assert got == code and f"step 8; python okd.py --resume {folder}" in err
    assert run(okd.main, capsys, "--resume", folder)[0] == 0
    assert_same_run(folder, tmp_path / "a" / "run")


def test_real_kills_at_random_moments_lose_nothing(folders, jsonl, tmp_path, capsys):
    """SIGKILL after a random time, up to ten times, to a process forked with okd imported, until it has ended."""
    many = ["--max-steps", "120", "--epochs", "40", "--save-every", "2"]
    flags = [[*map(str, long_flags(folders, jsonl, tmp_path / name, *many))] for name in ("a", "b")]
    assert run(okd.main, capsys, *flags[0])[0] == 0
    folder = tmp_path / "b" / "run"
    script = f"""
import os, random, signal, sys, time
import torch; torch.set_num_threads(1)  # as here: sums depend on it
import okd
rng, kills = random.Random(5), 0
while not os.path.exists({str(folder / "student")!r}):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        okd.main({flags[1] + ["--resume", str(folder)]!r})
        os._exit(0)
    if kills < 10:
        time.sleep(rng.uniform(0.4, 1.2))
        os.kill(child, signal.SIGKILL)
        kills += 1
    os.waitpid(child, 0)
print(kills)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 1
    assert_same_run(folder, tmp_path / "a" / "run")


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(folders, jsonl, tmp_path, capsys, monkeypatch):
    """The limit on file sizes is the system's: writing really fails, in the middle of a file."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    wrap(monkeypatch, "save_checkpoint", before=lambda folder, networks, optimizers, scaler, scalars, state, *rest:
         state["step"] == 6 and resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1])))  # fmt: skip
    code, _, err = run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "cannot write" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003.pt"]
    monkeypatch.undo()
    code, out, _ = run(okd.main, capsys, "--resume", tmp_path / "run")
    assert code == 0 and "goes on after step 3" in out


MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", MEMORY)
@pytest.mark.parametrize("target", ["run_batch", "load_model", "generate"])
def test_out_of_memory_is_called_what_it_is_wherever_it_comes(
    target, error, folders, jsonl, tmp_path, capsys, monkeypatch
):
    if target == "load_model":
        monkeypatch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(error)
        )
    else:
        monkeypatch.setattr(okd, target, lambda *_, **__: (_ for _ in ()).throw(error))
    code, _, err = run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path))
    assert code == 2 and "out of memory: lower --micro-batch-tokens" in err and "--sample-batch-size" in err
    assert "cannot load" not in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(folders, jsonl, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flag in ("--output-dir", "--cache-dir"):
        flags = [*small_flags(folders, jsonl, tmp_path / flag), flag, tmp_path / "file" / "run"]
        code, _, err = run(okd.main, capsys, *flags)
        assert code == 2 and "Not a directory" in err and err.count("\n") == 1


def torchrun(processes, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
               str(ROOT / "okd.py"), *map(str, flags)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("more", [(), ("--shard", "--teacher-sft-epochs", "1")], ids=["okd", "sharded"])
def test_two_processes_give_the_losses_and_weights_of_one(more, folders, jsonl, tmp_path, capsys):
    flags = ["--max-steps", "6", "--lr", "1e-3", "--save-every", "4", "--anchor", "0.1", *more]
    alone = [flag for flag in flags if flag != "--shard"]
    assert run(okd.main, capsys, *long_flags(folders, jsonl, tmp_path / "a", *alone, family="llama"))[0] == 0
    done = torchrun(2, *long_flags(folders, jsonl, tmp_path / "b", *flags, family="llama"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 x cpu" in done.stdout and done.stdout.count("run: ") == 1
    one, two = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for file in ("student/model.safetensors", "teacher_lora/adapter_model.safetensors"):
        assert_all_close(weights_of(two, file), weights_of(one, file), atol=1e-5, rtol=1e-3)
    for ours, theirs in zip(timeless(two), timeless(one), strict=True):
        assert ours.pop("phase") == theirs.pop("phase")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(folders, jsonl, tmp_path):
    done = torchrun(2, *small_flags(folders, jsonl, tmp_path), "--batch-size", "5")
    assert done.returncode != 0 and "--batch-size 5 is no multiple of the 2 processes" in done.stderr


def test_fuzzed_rows_are_read_or_refused_in_one_line(tokenizer, tmp_path):
    """Two thousand files of damaged JSONL: bytes flipped, cut, doubled; fields of every type."""
    rng, outcomes, args = random.Random(1), Counter(), tiny_args()
    junk = [None, True, -1, 1e400, "", " ", "\u0000", "x" * 300, "\ud800", [], [""], ["a", 1], {}, {"content": 1},
            "</s>",
            [{"role": "assistant", "content": "a"}] * 2, [{"role": "user"}], "<extra_id_0>"]  # fmt: skip
    names = ["instruction", "input", "context", "output", "prompt", "response", "messages", "text"]
    whole = "".join(json.dumps(row) + "\n" for row in okd.demo_rows(3, seed=1)).encode()
    for _ in range(2000):
        if rng.random() < 0.5:
            content = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at, wild = rng.randrange(len(content) + 1), rng.randbytes(rng.randrange(5))
                content[at : at + rng.randrange(4)] = rng.choice(
                    (wild, b"\n", b'"', b"{", b"\xef\xbb\xbf", b"\\u", b"[" * 2000)
                )
        else:
            row = {name: rng.choice(junk) for name in rng.sample(names, rng.randrange(len(names)))}
            content = json.dumps(row).encode() + rng.choice((b"", b"\n", b"\r\n"))
        try:
            rows = okd.read_rows("here", bytes(content).splitlines(True), tokenizer, args)
            assert rows and all(row.prompt_ids and row.response_ids for row in rows)
            outcomes["read"] += 1
        except okd.UserError as error:
            assert "\n" not in str(error), content
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 100


def test_fuzzed_flags_end_in_a_run_or_in_one_line(folders, jsonl, tmp_path, capsys):
    rng, codes = random.Random(2), Counter()
    fixed = {"teacher", "student", "data", "output_dir", "cache_dir", "resume", "track", "device", "max_steps",
             "epochs",
             "rollouts", "max_new_tokens", "score_rows", "eval_rows", "eval_every", "sample_batch_size"}  # fmt: skip
    names = [field.name for field in dataclasses.fields(okd.Args) if field.name not in fixed]
    values = ["0", "1", "2", "-1", "1e9", "nan", "inf", "-inf", "0.5", "1e-300", "", "x", "None", "True", "9" * 20,
              "jsd",
              "student", "../x", "\u2603"]  # fmt: skip
    for number in range(70):
        flags = small_flags(folders, jsonl, tmp_path / str(number))
        for name in rng.sample(names, rng.randrange(1, 3)):
            flags += ["--" + name.replace("_", "-"), rng.choice(values)]
        few = ["--max-steps", "1", "--eval-rows", "2", "--score-rows", "1", *NO_SFT]
        code, _, err = run(okd.main, capsys, *flags, *few)
        codes[code] += 1
        assert code in (0, 2) and "Traceback" not in err, (flags, err)
        assert code == 0 or not (tmp_path / str(number) / "run" / "student").exists()
        assert not list((tmp_path / str(number)).rglob("*.tmp-*"))
    assert codes[0] > 5 and codes[2] > 20


# eval.py --------------------------------------------------------------------------------------------------------------


def test_eval_reproduces_a_rouge_l_computed_by_hand(folders, tokenizer, tmp_path, capsys, monkeypatch):
    rows = [("a", "the cat was sat on"), ("b", ["x", "one two"]), ("c", "y")]
    data, checkpoint = tmp_path / "set.jsonl", folders / "gpt2" / "student"
    data.write_text("".join(json.dumps(dict(prompt=prompt, response=response)) + "\n" for prompt, response in rows))
    answers = {tokenizer(prompt).input_ids[0]: tokenizer(text).input_ids for prompt, text in
               (("a", "the cat sat"), ("b", "one two"), ("c", ""))}  # fmt: skip
    monkeypatch.setattr(okd, "generate", lambda model, _, prompts, *rest, **more: [answers[ids[0]] for ids in prompts])
    code, out, err = run(okd_eval.main, capsys, checkpoint, "--data", data, "--greedy")
    assert code == 0, err
    (result,) = json.loads((checkpoint / "results.json").read_text())
    assert result["rouge_l"] == pytest.approx((75 + 100 + 0) / 3)
    assert (result["rows"], result["empty_outputs"], result["cut_prompts"]) == (3, 1, 0)
    greedy = dict(decoding="greedy", no_repeat_ngram_size=0, max_new_tokens=256, max_prompt_length=256)
    assert result["protocol"] == greedy and "58.33" in out and "decoding greedy" in out


def test_eval_presets():
    make = lambda **flags: okd_eval.protocol_of(okd_eval.Args(("x",), **flags))  # noqa: E731
    paper = dict(decoding="sampling", temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6, max_new_tokens=256,
                 max_prompt_length=256)  # fmt: skip
    assert make() == make(paper=True) == (paper, [10, 20, 30, 40, 50])
    assert make(greedy=True)[0]["no_repeat_ngram_size"] == 0 and make(greedy=True)[1] == [None]
    assert make(greedy=True, no_repeat_ngram_size=6)[0]["no_repeat_ngram_size"] == 6


def test_the_six_gram_ban_holds_over_prompt_and_answer(tokenizer):
    model, prompt = tiny("gpt2", 5), tokenizer("abc abc abc abc abc abc", add_special_tokens=False).input_ids
    free = okd.generate(model, tokenizer, [prompt], CPU, 120)[0]
    (ids,) = okd.generate(model, tokenizer, [prompt], CPU, 120, no_repeat_ngram_size=6)
    grams = lambda ids: [tuple(ids[i : i + 6]) for i in range(len(ids) - 5)]  # noqa: E731
    new = grams(prompt + ids)[len(prompt) - 5 :]
    assert len(set(new)) == len(new) and not set(new) & set(grams(prompt))
    assert len(set(grams(free))) < len(grams(free))  # without the ban this model does repeat itself


@pytest.mark.parametrize("bos, kept", [(None, "cdef"), (ord("a") + 3, "adef")])
def test_long_prompts_lose_their_beginning_but_not_bos_and_are_counted(tokenizer, monkeypatch, bos, kept):
    monkeypatch.setattr(type(tokenizer), "bos_token_id", bos, raising=False)
    lines = ['{"prompt": "abcdef", "response": "x"}', "", '{"prompt": "ab", "response": ["y", "z"]}']
    examples, cut = okd_eval.examples_of(lines, tokenizer, "s", 4)
    assert [tokenizer.decode(e.prompt_ids) for e in examples] == [kept, "ab"] and cut == 1
    assert [e.references for e in examples] == [["x"], ["y", "z"]]
    assert [e.response_ids for e in examples] == [[123, 1], [124, 1]]  # gold text and EOS


def test_results_lie_beside_the_checkpoint(tmp_path):
    run_folder, plain = tmp_path / "runs" / "a", tmp_path / "model"
    (run_folder / "student").mkdir(parents=True), plain.mkdir(), (run_folder / "args.json").write_text("{}")
    where = lambda name: okd_eval.locate(str(name), okd_eval.Args(()))[1:]  # noqa: E731
    assert where(run_folder) == where(run_folder / "student") == (run_folder, run_folder)
    assert where(plain) == (None, plain) and where("org/name") == (None, pathlib.Path("results/org/name"))


def test_an_evaluation_goes_on_where_it_was_interrupted(tokenizer, jsonl, tmp_path, capsys, monkeypatch):
    model_folder, limits = tmp_path / "model", "--limit 10 --max-new-tokens 5 --sample-batch-size 4".split()
    tiny("gpt2", 7).save_pretrained(model_folder), tokenizer.save_pretrained(model_folder)
    flags = [model_folder, "--data", jsonl, *limits, "--seeds", 1, 2, 1]
    results, calls, original = model_folder / "results.json", [], okd.generate
    monkeypatch.setattr(okd, "rouge_l", lambda text, references: float(len(text)))  # what a tiny model writes scores 0
    code, out, err = run(okd_eval.main, capsys, *flags)
    assert code == 0, err
    (first,) = json.loads(results.read_text())
    mean = sum(first["scores"]) / 3
    assert first["scores"][0] == first["scores"][2] != first["scores"][1] and first["rouge_l"] == pytest.approx(mean)
    assert first["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in first["scores"]) / 2))
    path = model_folder / "generations" / first["generations"][0]
    lines = path.read_text().splitlines(True)
    monkeypatch.setattr(okd, "generate", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    os.utime(model_folder / "model.safetensors", (0, 0))  # times do not count
    assert run(okd_eval.main, capsys, *flags)[0] == 0 and not calls
    path.write_text("".join(lines[:4]) + lines[4][:20]), results.unlink()  # killed while it wrote the second batch
    assert run(okd_eval.main, capsys, *flags)[0] == 0
    assert sum(calls) == 6 and path.read_text() == "".join(lines)  # the four rows that were whole, not again
    assert json.loads(results.read_text())[0]["scores"] == first["scores"]
    tiny("gpt2", 8).save_pretrained(model_folder)  # other weights of the same shapes
    assert run(okd_eval.main, capsys, *flags)[0] == 0 and sum(calls) == 26 and len(json.loads(results.read_text())) == 2


def test_token_metrics_against_numbers_by_hand():
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    found = {name: value.item() for name, value in okd_eval.token_metrics(p.log(), q.log(), torch.tensor([1])).items()}
    assert found["fkl"] == pytest.approx(0.25 * math.log(2)) and found["rkl"] == pytest.approx(0.25 * math.log(2))
    assert found["tvd"] == pytest.approx(0.25) and found["top1_agreement"] == 0
    assert found["teacher_entropy"] == pytest.approx(1.5 * math.log(2)) and found["entropy_gap"] == pytest.approx(0)
    assert found["top5_overlap"] == 1 and found["top5_mass"] == pytest.approx(1)
    assert found["tail_mass"] == pytest.approx(0) and found["uncertainty"] == pytest.approx(0.75)
    assert found["std"] == pytest.approx(math.log(2) * math.sqrt(2) / 3)  # of -2, -1, -2 in units of log 2
    p = torch.full((1, 100), 0.0, dtype=torch.float64)
    p[0, :5] = 9.0
    found = {
        name: v.item()
        for name, v in okd_eval.token_metrics(p.log_softmax(-1), p.flip(1).log_softmax(-1), torch.tensor([0])).items()
    }
    share = math.exp(9) / (5 * math.exp(9) + 95)
    assert found["top5_overlap"] == 0 and found["top5_mass_teacher"] == pytest.approx(5 * share)
    assert found["top5_mass"] == pytest.approx(5 * share / math.exp(9))
    assert found["uncertainty"] == pytest.approx(1 - share)


def test_texts_are_measured_at_the_right_tokens(examples):
    student, teacher, args = tiny(seed=1), tiny(seed=2), okd_eval.Args(("x",), micro_batch_tokens=60)
    found = okd_eval.measure_texts(student, teacher, examples[:7], args, CPU)
    for i, row in enumerate(sorted(examples[:7], key=len)):
        p, q = plain_logits(teacher, row).detach(), plain_logits(student, row).detach()
        torch.testing.assert_close(found["fkl"][i], okd.fkl(p.log_softmax(-1), q.log_softmax(-1)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["std"][i], q.std(-1, correction=0), atol=1e-5, rtol=1e-4)
        gold = p.softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(found["uncertainty"][i], 1 - gold, atol=1e-5, rtol=1e-4)
    means = okd_eval.summary(found)
    bins = [part["tokens"] for name, part in means.items() if name.startswith("entropy")]
    assert means["all"]["tokens"] == sum(bins) == sum(len(row.response_ids) for row in examples[:7])


def test_hard_tokens_are_the_half_that_the_teacher_finds_less_likely():
    uncertainty, fkl = (torch.tensor(values).split((3, 1)) for values in ([0.1, 0.9, 0.3, 0.8], [1.0, 2.0, 3.0, 4.0]))
    found = okd_eval.summary(dict(uncertainty=uncertainty, teacher_entropy=(torch.zeros(3), torch.ones(1)), fkl=fkl))
    assert found["hard"]["fkl"] == (2 + 4) / 2 and found["easy"]["fkl"] == (1 + 3) / 2 and found["all"]["fkl"] == 2.5
    assert found["hard"]["uncertainty"] == pytest.approx(0.85) and found["hard"]["tokens"] == 2
    assert found["entropy 0 to 0.5"]["fkl"] == 2 and found["entropy 1 to 2"]["tokens"] == 1


def test_excess_error_of_known_errors():
    own, oracle = [torch.full((12,), 2.0), torch.full((30,), 2.0)], [torch.full((25,), 1.0)]
    assert okd_eval.excess_error(own, oracle) == {"10": pytest.approx(100.0), "25": pytest.approx(100.0)}
    assert okd_eval.excess_error(own, own)["10"] == pytest.approx(0.0)
    ragged = [torch.tensor([1.0] * 5 + [3.0] * 5), torch.tensor([2.0] * 5)]  # 5 x 1.5 + 5 x 3 against 10 x 1
    assert okd_eval.excess_error(ragged, oracle) == {"10": pytest.approx(125.0)}
    assert okd_eval.excess_error(own, [torch.zeros(25)]) == {}  # a student that is its teacher


def test_exposure_bias_compares_texts_of_one_rule_whatever_the_protocol(folders, jsonl, tmp_path, capsys, monkeypatch):
    seen, original = [], okd.generate
    monkeypatch.setattr(okd, "generate", lambda *a, **k: seen.append((a[0], a[2], k)) or original(*a, **k))
    flags = ["--data", jsonl, "--teacher", folders / "gpt2" / "teacher", "--output-dir", tmp_path, "--greedy"]
    code, _, err = run(okd_eval.main, capsys, folders / "gpt2" / "student", *flags, "--limit", 3, "--max-new-tokens", 7)
    assert code == 0, err
    (_, _, protocol), own, oracle = seen
    assert not protocol["sample"] and own[0] is not oracle[0] and own[1:] == oracle[1:]
    rule = dict(sample=True, temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=0)
    assert {name: own[2][name] for name in rule} == rule and "seed" in own[2]


def test_intervals_on_known_cases():
    assert okd_eval.interval(torch.full((2, 20), 1.5)) == (1.5, 1.5)
    low, high = okd_eval.interval(torch.tensor([[(-1.0) ** i for i in range(400)]] * 2))  # of the bootstrap
    assert low == pytest.approx(-2 / 20, abs=0.02) and high == pytest.approx(2 / 20, abs=0.02)  # 1.96 / sqrt(400)
    low, high = okd_eval.interval(torch.tensor([[1.0] * 50, [3.0] * 50]))  # paired t: 2 +- 12.706 sqrt(2) / sqrt(2)
    assert (low, high) == (pytest.approx(2 - 12.706), pytest.approx(2 + 12.706))


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_methods_that_do_not_differ_are_told_apart_in_at_most_6_percent(seeds, shared):
    """Training seeds of standard deviation 1, rows of 20, a part of the rows' noise common to all seeds."""
    chance, trials, wrong = torch.Generator().manual_seed(0), 1000, 0
    draw = lambda *shape: torch.randn(*shape, generator=chance)  # noqa: E731
    for _ in range(trials):
        differences = 2**0.5 * draw(seeds, 1) + 20 * draw(seeds, 400) + shared * draw(1, 400)
        low, high = okd_eval.interval(differences, draws=200)
        wrong += not low <= 0 <= high
    assert wrong / trials <= 0.06


def made_up_run(root, method, seed, scores, **flags):
    """A run folder as okd.py leaves it, with a score per row -> what eval.py knows of it once it is scored."""
    folder, flags = root / "-".join(map(str, (method, seed, *flags.values()))), dict(method=method, seed=seed, **flags)
    (folder / "student").mkdir(parents=True), (folder / "generations").mkdir()
    distil = [{"step": 0, "dev/fkl": 2.0}, {"step": 9, "train/tokens_per_s": 100.0, "train/peak_memory_gb": 2.5}]
    lines = [dict(phase="distil", **line) for line in distil]
    lines.append({"phase": "final", "final/distil_s": 10.0 + seed, "final/sampling_s": 4.0})
    rows = [dict(row=row, score=score) for row, score in enumerate(scores)]
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "generations" / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = okd_eval.Checkpoint.__new__(okd_eval.Checkpoint)
    result = dict(data="d", rouge_l=sum(scores) / len(scores), std=None, generations=["g.jsonl"], rows=4, protocol={})
    vars(checkpoint).update(name=str(folder), folder=folder, results=[result], flags=flags)
    checkpoint.costs, checkpoint.curve = okd_eval.read_logs(checkpoint)
    return checkpoint


def test_comparison_of_made_up_runs(tmp_path):
    made = [("fkl", 1, 10, 0.1), ("fkl", 2, 12, 0.1), ("okd", 1, 15, 0.1), ("okd", 2, 17, 0.1), ("rkl", 1, 8, 0.1),
            ("rkl", 2, 14, 0.1), ("rkl", 1, 0, 1.0), ("jsd", 3, 0, 0.1)]  # fmt: skip
    runs = [made_up_run(tmp_path, m, seed, [first + 10.0 * i for i in range(4)], lr=lr) for m, seed, first, lr in made]
    args = okd_eval.Args((), data=("d",), baseline="fkl")
    markdown, comparison = okd_eval.compare(args, runs)
    rows = {entry["method"]: entry for entry in comparison}
    assert list(rows) == ["fkl", "okd", "rkl", "rkl lr=1.0", "jsd"]
    assert rows["fkl"]["rouge_l"] == 26 and rows["fkl"]["std_training"] == pytest.approx(math.sqrt(2))
    assert rows["fkl"]["seconds"] == 11.5 and rows["fkl"]["peak_memory_gb"] == 2.5
    assert rows["okd"]["interval"] == (5, 5) and rows["okd"]["distinguishable"]
    assert rows["okd"]["paired_seeds"] == [1, 2] and rows["okd"]["difference"] == 5
    assert rows["rkl"]["difference"] == 0 and not rows["rkl"]["distinguishable"]
    alone = rows["rkl lr=1.0"]
    assert alone["verdict"] == "-10.00, one training seed" and alone["distinguishable"] is alone["interval"] is None
    assert rows["jsd"]["verdict"] == "no training seed in common" and markdown.count("not distinguishable") == 1
    with pytest.raises(okd.UserError, match="no such method among the runs"):
        okd_eval.compare(okd_eval.Args((), baseline="gkd"), runs)


@pytest.mark.parametrize("name, text, labels", [
    ("eval_every", "adaptive", 2), ("eval_rows", "adaptive", 2), ("eval_every", "data", 1), ("eval_rows", "data", 1),
    ("select", "data", 2), ("log_every", "adaptive", 1), ("seed", "data", 1),
])  # fmt: skip
def test_which_flags_make_another_method(name, text, labels):
    made = [types.SimpleNamespace(flags=dict(method="m", seed=1, text=text) | {name: value}) for value in (1, 2)]
    assert len(okd_eval.grouped(made)) == labels


def test_the_figure_has_a_bar_per_method_the_mean_of_its_runs(monkeypatch, tmp_path):
    def scored(method, seed, value):
        means = (dict.fromkeys(("std", "fkl", "top1_agreement"), value + i) for i in range(3))
        gold = dict(zip(("all", "hard", "easy"), means, strict=True))
        return types.SimpleNamespace(flags=dict(method=method, seed=seed), results=[dict(distribution=dict(gold=gold))])

    figures = []
    monkeypatch.setattr(okd_eval.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    okd_eval.draw_analysis([scored("okd", 1, 1.0), scored("okd", 2, 3.0), scored("fkl", 1, 5.0)], tmp_path)
    assert [[bar.get_height() for bar in axes.patches] for axes in figures[0].axes] == 3 * [[2, 3, 4, 5, 6, 7]]


def test_a_run_and_its_adapted_teacher_are_scored_and_shown(folders, jsonl, tmp_path, capsys, monkeypatch):
    code, _, err = run(okd.main, capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 0, err
    pages, out_dir, plain = [], tmp_path / "out", tmp_path / "run" / "teacher_lora"
    args_json = tmp_path / "run" / "args.json"
    args_json.write_text(json.dumps(json.loads(args_json.read_text()) | dict(track=True)))
    page = types.SimpleNamespace(summary={}, log=pages.append, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **k: pages.append(k) or page, Table=lambda *a: a, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = ["--data", jsonl, "--output-dir", out_dir, *"--limit 4 --greedy --max-new-tokens 12 --show 1".split()]
    teacher = ["--teacher", folders / "gpt2" / "teacher", "--track"]
    code, out, err = run(okd_eval.main, capsys, tmp_path / "run", plain, *flags, *teacher)
    assert code == 0, err
    (result,), (adapted,) = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", plain))
    found, gold = result["distribution"], result["distribution"]["gold"]
    assert set(found) == {"teacher", "gold", "own", "excess_error_percent"} and "10" in found["excess_error_percent"]
    assert gold["hard"]["uncertainty"] > gold["all"]["uncertainty"] > gold["easy"]["uncertainty"]
    assert gold["all"]["fkl"] == pytest.approx((gold["hard"]["fkl"] + gold["easy"]["fkl"]) / 2, rel=0.05)
    assert adapted["distribution"]["gold"]["all"]["fkl"] < gold["all"]["fkl"]  # it is still close to the teacher
    row = "| hard | " + " | ".join([str(gold["hard"]["tokens"])] + [f"{gold['hard'][n]:.3f}" for n in okd_eval.SHOWN])
    assert row in " ".join(out.split()) and "excess accumulated error" in out and "reference:" in out
    assert (out_dir / "analysis.png").exists() and f"{plain}: was not tracked" in out
    assert page.summary == {"eval/rows.jsonl/greedy/rouge_l": result["rouge_l"]} and pages[0]["id"] == "run"
    assert pages[1] == {"analysis_figure": str(out_dir / "analysis.png")}
    code, out, err = run(okd_eval.main, capsys, tmp_path / "run", "--compare", *flags)
    assert code == 0 and "| okd | 1 |" in " ".join(out.split()), err
    assert {path.suffix for path in out_dir.glob("comparison.*")} == {".json", ".md", ".png"}


BAD_EVAL = [  # a file of the run and its content, flags, message
    ("args.json", "{oops", "", "args.json is damaged"), ("results.json", "{oops", "", "results.json is damaged"),
    ("metrics.jsonl", "", "--compare", "--compare needs runs that have ended: metrics.jsonl of"),
    ("student", None, "", "is a run without a student"), ("rows.jsonl", "{oops", "", "rows.jsonl, line 1 needs"),
    ("rows.jsonl", "\n", "", "no rows"), ("rows.jsonl", '{"prompt": "", "response": "x"}', "", "the prompt is empty"),
    (None, None, "--data nowhere", "no data set or file nowhere"), (None, None, "--greedy --paper", "two protocols"),
    (None, None, "--greedy --seeds 1", "--seeds change nothing"), (None, None, "--top-p 1.5", "--top-p is 1.5"),
    (None, None, "--limit 0", "--limit is 0: it must lie in [1, 1e+09]"), (None, None, "--teacher ./no/one", "no/one"),
    (None, None, "--temperature 0", "--temperature is 0.0"),
]  # fmt: skip


@pytest.mark.parametrize("file, content, flags, message", BAD_EVAL)
def test_what_eval_refuses_is_one_line_and_exit_2(file, content, flags, message, folders, tmp_path, capsys):
    folder = made_up_run(tmp_path, "fkl", 1, [1.0]).folder
    (folder / "student").rmdir(), (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}')
    if file != "student":
        (folder / "student").symlink_to(folders / "gpt2" / "student")
        (folder / (file or "unread")).write_text(content or "")
    code, _, err = run(okd_eval.main, capsys, folder, "--data", folder / "rows.jsonl", *flags.split())
    assert code == 2 and message in err and err.count("\n") == 1
