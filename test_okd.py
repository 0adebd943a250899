"""Tests of okd.py and eval.py by closed forms, golden numbers, a second way: tiny models, no downloads, no GPU."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections import Counter
from unittest import mock

os.environ |= dict(WANDB_MODE="offline", HF_HUB_OFFLINE="1")

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import eval as okd_eval
import okd

ROOT = pathlib.Path(__file__).parent
CPU, BF16, FP16 = (okd.Hardware(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # between peft and transformers

# Tiny models and data -------------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=384, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, bos_token_id=1, eos_token_id=1, pad_token_id=0)  # fmt: skip
DROPOUT = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=4, n_head=4, bos_token_id=1,
                                    eos_token_id=1, **dict.fromkeys(DROPOUT, 0.0)),
    "llama": transformers.LlamaConfig(**SHAPE),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8)}  # fmt: skip
PLAIN = {field.name for field in dataclasses.fields(okd.Args) if field.type is bool}  # flags without a value
per_session, demo_lines = pytest.fixture(scope="session"), [json.dumps(row) for row in okd.demo_rows(40, seed=1)]
tokenizer = per_session(lambda: okd.load_tokenizer("demo", okd.Args()))
jsonl = per_session(lambda folders: folders / "rows.jsonl")
examples = per_session(lambda tokenizer: okd.read_rows("demo", demo_lines, tokenizer, tiny_args()))
example = functools.partial(okd.Example, "", [""])  # of prompt_ids and response_ids
records = lambda folder: [json.loads(line) for line in open(folder / "metrics.jsonl")]
plain = lambda model, rows: plain_logits(model, *rows).log_softmax(-1)
gradients = lambda model: {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
gradient = lambda function, at: torch.autograd.functional.jacobian(lambda z: function(z).sum(), at)
random_logits = lambda *shape, seed: torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64) * 2
of_logits = lambda function, **own: lambda p, q: function(p.log_softmax(-1), q.log_softmax(-1), **own)
bound = lambda **flags: okd.bound_divergence(tiny_args(**flags), torch.tensor(0.6).double())
kl = lambda z_p, z_q, tau=1.0: tau**2 * kl_divergence(*(Categorical(logits=z / tau) for z in (z_p, z_q)))
changed = lambda old, new: {key for key, value in old.state_dict().items() if not value.equal(new.state_dict()[key])}


def tiny(family="gpt2", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family].__class__(**{**CONFIGS[family].to_dict(), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # a fresh head is nearly uniform: spread it, so that a wrong number shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_args(**changes):  # by way of the flags, so that what the flags do is tested along
    changes = dict(teacher="t", student="s", batch_size=4, epochs=99, eval_rows=8, score_rows=2, log_every=1,
                   lora_rank=4, max_length=96, max_new_tokens=6, rollouts=8) | changes  # fmt: skip
    flags = [["--" + name.replace("_", "-")] + [str(value)] * (name not in PLAIN) for name, value in changes.items()]
    return okd.parse(sum(flags, []))


@per_session
def folders(tmp_path_factory, tokenizer):  # of Hugging Face models, and the rows; GPT-2 has dropout
    root = tmp_path_factory.mktemp("models")
    (root / "rows.jsonl").write_text("".join(line + "\n" for line in demo_lines))
    for family, role in ((family, role) for family in ("gpt2", "llama", "opt") for role in ("teacher", "student")):
        model = tiny(family, 1 + (role == "student"), **DROPOUT if family == "gpt2" else {})
        model.save_pretrained(root / family / role), tokenizer.save_pretrained(root / family / role)
    return root


def with_module(model, args=None, top_layers=0, std=0.0):  # std > 0: already moved
    model = okd.add_lora(model.requires_grad_(False), args or tiny_args(), top_layers, seed=1)
    for name, parameter in model.named_parameters():
        if std and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def pair(args, family="gpt2", std=0.0, **changes):
    student, teacher = tiny(family, 1, **changes), tiny(family, 2, **changes).requires_grad_(False)
    return student, with_module(teacher, args, args.lora_top_layers, std) if args.teacher_moves else teacher


@pytest.fixture
def trained(examples, tokenizer, tmp_path_factory):
    def train(args, networks=None, steps=2, hw=CPU, rows=examples, dev=()):
        (student, teacher), folder = networks or pair(args), tmp_path_factory.mktemp("run")
        args = dataclasses.replace(args, max_steps=steps)
        okd.train(args, student, teacher, dict(train=rows, dev=list(dev)), tokenizer, hw, folder)
        return student, teacher, records(folder)

    return train


def wrap(monkeypatch, target, before=lambda *_, **__: None, after=lambda result, *_, **__: result):
    original = getattr(okd, target)  # its calls pass by before(*arguments), and after(result, *arguments), on their way

    def wrapped(*args, **kwargs):
        before(*args, **kwargs)
        return after(original(*args, **kwargs), *args, **kwargs)

    monkeypatch.setattr(okd, target, wrapped)


def plain_logits(model, *rows):  # before each response token, from one unpadded forward a row
    logits = [model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0] for row in rows]
    return torch.cat([each[len(row.prompt_ids) - 1 : -1].float() for each, row in zip(logits, rows)])


def assert_all_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for name in theirs:
        assert_close(ours[name], theirs[name], msg=name, **tolerance)


# Divergences ----------------------------------------------------------------------------------------------------------

Z_Q = torch.tensor([[1, 2, 0.5, -1, 0], [0.2, -0.3, 1.5, 0.7, -2], [3, 0, -1, 0.5, 0.25], [0, 1, 2, 3, 4]]).double()
Z_P = torch.tensor([[0.5, 1.5, 2, -0.5, -3], [-1, 0.4, 2.2, 0.1, 0.3], [-2, 1, 0.8, 0.6, 0], [4, 3, 2, 1, 0]]).double()
LOG_P, LOG_Q, LABELS = Z_P.log_softmax(-1), Z_Q.log_softmax(-1), torch.tensor([2, 2, 1, 0])
GOLDEN = [  # mean over the first three tokens, and where known each of them, or the last
    ("fkl", {}, 0.881736, [0.499399, 0.262005, 1.883805]), ("rkl", {}, 1.235699, [0.488304, 0.289318, 2.929474]),
    ("jsd", {"beta": 0.1}, 0.074367, []), ("jsd", {"beta": 0.5}, 0.198544, []), ("jsd", {"beta": 0.9}, 0.088625, []),
    ("tvd", {}, 0.494317, [0.410373, 0.266062, 0.806517]), ("frkl", {}, (0.881736 + 1.235699) / 2, []),
    ("sfkl", {"skew": 0.1}, 0.639753, [0.374244, 0.202914, 1.342102]), ("akl", {"mu": 0.5}, 1.111744, [2.560219]),
    ("srkl", {"skew": 0.1}, 0.693332, [0.355842, 0.216055, 1.508100]), ("taid", {"t": 0.4}, 1.531312, []),
    ("ab", {"alpha": 0.2, "beta": 0.7}, 1.216299, []), ("ab", {"alpha": 0.5, "beta": 0.5}, 0.896927, []),
    ("taid", {"t": 1.0}, 2.064631, []), ("cross_entropy", {}, 1.973134, [2.074438, 0.650948, 3.194016])]  # fmt: skip
BOUND = [("jsd", dict(beta=0.3)), ("sfkl", dict(skew=0.4)), ("srkl", dict(skew=0.4)), ("taid", {}), ("fkl", {}),
         ("ab", dict(ab_alpha=0.5, ab_beta=0.6)), ("rkl", {}), ("tvd", {})]  # fmt: skip
# Pairs of what must be equal. Of STEPS the head, up to the token that crosses mu, has a gap of 0.4, the tail of 0.2.
P, Q, FAR = LOG_P.exp(), LOG_Q.exp(), (torch.eye(4).double() * 100).log_softmax(-1)
STEPS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2]]).double().log()
IDENTITIES = {
    "fkl and rkl are torch's": lambda p, q: ([okd.fkl(p, q), okd.rkl(p, q)], [kl(p, q), kl(q, p)]),
    "fkl's slope in q": lambda p, q: (gradient(lambda z: of_logits(okd.fkl)(p, z), q), Q - P),
    "fkl's slope in p": lambda p, q: (gradient(lambda z: of_logits(okd.fkl)(z, q), p), P * (p - q - kl(p, q)[:, None])),
    "rkl's slope in q": lambda p, q: (gradient(lambda z: of_logits(okd.rkl)(p, z), q), Q * (q - p - kl(q, p)[:, None])),
    "jsd is symmetric at a half": lambda p, q: (okd.jsd(p, q, 0.5), okd.jsd(q, p, 0.5)),
    "jsd mirrors beta": lambda p, q: (okd.jsd(p, q, 0.3), okd.jsd(q, p, 0.7)),
    "jsd is at most log 2": lambda p, q: (okd.jsd(FAR, FAR.flip(0), 0.5), torch.full((4,), math.log(2)).double()),
    "fkl is a limit of jsd / beta": lambda p, q: (okd.jsd(p, q, 1e-6) / 1e-6, okd.fkl(p, q)),
    "fkl at the edge": lambda p, q: ([okd.jsd(p, q, 0), okd.sfkl(p, q, 0), okd.ab(p, q, 1, 0)], [okd.fkl(p, q)] * 3),
    "rkl at the edge": lambda p, q: ([okd.jsd(p, q, 1), okd.ab(p, q, 0, 1)], [okd.rkl(p, q)] * 2),
    "sfkl": lambda p, q: (okd.sfkl(p, q, 0.3), (P * (P / (0.3 * P + 0.7 * Q)).log()).sum(-1)),
    "srkl": lambda p, q: (okd.srkl(p, q, 0.3), (Q * (Q / (0.7 * P + 0.3 * Q)).log()).sum(-1)),
    "limits of ab": lambda p, q: tuple([okd.ab(p, q, 0.6, edge), okd.ab(p, q, edge, 0.6)] for edge in (0, 1e-7)),
    "mix": lambda p, q: (okd.mix(p, q, 0.2).exp(), 0.2 * P + 0.8 * Q),
    "akl: mu's token is in the head": lambda p, q: (okd.akl(*STEPS), (2 * okd.fkl(*STEPS) + okd.rkl(*STEPS)) / 3),
    "temperature keeps the slope's size": lambda p, q: (2 * ((q / 2).softmax(-1) - (p / 2).softmax(-1)),
        gradient(lambda z: bound(method="fkl", temperature=2.0)(p, z.log_softmax(-1)), q)),
    "rouge": lambda *_: (  # lcs("the cat sat", "the cat was sat on") = 3: precision 3/3, recall 3/5, F = 0.75
        [okd.rouge_l("the cat sat", ["the cat was sat on"]), okd.rouge_l("the cat sat", ["no", "the cat sat"]),
         okd.rouge_l("", ["the cat"]), okd.rouge_l("running dogs", ["run dog"])], [75.0, 100.0, 0, 100.0])}  # fmt: skip


@pytest.mark.parametrize("name, parameters, mean, last", GOLDEN)
def test_golden_numbers(name, parameters, mean, last):
    function = okd.DIVERGENCES.get(name, lambda _, log_q: okd.cross_entropy(log_q, LABELS[:3]))
    values = function(LOG_P[:3], LOG_Q[:3], **parameters)
    assert values.mean().item() == pytest.approx(mean, abs=1e-6)
    assert values[3 - len(last) :].tolist() == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("name", okd.DIVERGENCES)
def test_zero_at_the_teacher_positive_elsewhere_blind_to_a_constant_finite_and_with_the_right_gradients(name):
    function, zero = of_logits(okd.DIVERGENCES[name], **{"t": 0.6} if name == "taid" else {}), 0 * Z_P
    assert_close(function(Z_P, Z_P), Categorical(logits=Z_P).entropy() if name == "taid" else zero[:, 0])
    if name != "tvd":  # |x| has no gradient at 0; autograd's choice is 0 there, but for rounding
        assert_close(gradient(lambda q: function(Z_P, q), Z_P), zero, atol=1e-12, rtol=0)
    p, q = random_logits(50, 11, seed=1), random_logits(50, 11, seed=2)
    assert (function(p, q) > 0).all()
    assert_close(function(p + 3, q - 5), function(p, q))
    p, q = torch.zeros(2, 7), torch.zeros(2, 7)
    p[:, 1], q[0, 1], q[1, 4] = 1e4, 1e4, 1e4  # sharp, in float32
    assert function(p, q).isfinite().all() and gradient(lambda q: function(p, q), q).isfinite().all()
    p, q = random_logits(3, 6, seed=3).requires_grad_(), random_logits(3, 6, seed=4).requires_grad_()
    if name not in ("akl", "taid"):  # finite differences
        assert torch.autograd.gradcheck(function, (p, q))
    else:  # the weights of the one and the target of the other are constants: the truth holds them
        akl, fkl, rkl = (of_logits(each)(p, q) for each in (okd.akl, okd.fkl, okd.rkl))
        share, target = ((akl - rkl) / (fkl - rkl)).detach(), (0.4 * q + 0.6 * p).softmax(-1).detach()
        truth = share * fkl + (1 - share) * rkl if name == "akl" else -(target * q.log_softmax(-1)).sum(-1)
        assert_close(*(torch.autograd.grad(value.sum(), q)[0] for value in (function(p, q), truth)))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    assert_close(*IDENTITIES[name](LOG_P, LOG_Q), rtol=1e-4 if "limit" in name else 1e-7, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name, flags", BOUND, ids=[name for name, _ in BOUND])
def test_flags_reach_the_divergence_and_the_temperature_softens_both_sides(name, flags, temperature):
    own = {flag.removeprefix("ab_"): value for flag, value in flags.items()} | ({"t": 0.6} if name == "taid" else {})
    expected = temperature**2 * of_logits(okd.DIVERGENCES[name], **own)(Z_P / temperature, Z_Q / temperature)
    assert_close(bound(divergence=name, temperature=temperature, **flags)(LOG_P, LOG_Q), expected)


def test_taid_step_against_the_rule_written_out():
    scalars = dict(taid_t=torch.tensor(0.4), taid_momentum=torch.tensor(0.0), taid_loss=torch.tensor(math.inf))
    t, momentum, previous = 0.4, 0.0, math.inf
    for i, loss in enumerate([3.0, 2.5, 2.6, 1.0]):
        okd.taid_step(scalars, torch.tensor(loss), progress=i / 10, start=0.4)
        momentum = 0.99 * momentum + 0.01 * ((previous - loss) / previous if i else 0.0)
        t, previous = min(1.0, max(0.4 + 0.6 * i / 10, t + 5e-4 / (1 + math.exp(-momentum)) * (1 - t))), loss
        assert (scalars["taid_t"].item(), scalars["taid_momentum"].item()) == pytest.approx((t, momentum), abs=1e-6)
    okd.taid_step(scalars, torch.tensor(math.nan), progress=0.4)  # a skipped step
    assert scalars["taid_loss"] == 1.0 and scalars["taid_t"].isfinite() and scalars["taid_momentum"].isfinite()


@pytest.mark.parametrize("alpha, anchor", [(0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.35, 0.7), (1.0, 0.3)])
def test_the_teachers_gradient_is_that_of_eq_16_and_vanishes_at_the_mixture_of_gold_student_and_start(alpha, anchor):
    (p, q, p0), labels = (random_logits(5, 7, seed=seed).log_softmax(-1) for seed in (1, 2, 3)), torch.arange(5)
    mixture = ((1 - alpha) * F.one_hot(labels, 7).double() + alpha * q.exp() + anchor * p0.exp()) / (1 + anchor)
    loss = lambda z: okd.teacher_loss(z.log_softmax(-1), q, p0, labels, alpha, anchor)
    # KL(q || p_f) and KL(p_0 || p_f) pull p_f to q and to p_0, CE to the gold token, each with its weight
    assert_close(gradient(loss, p), (1 + anchor) * (p.exp() - mixture))
    if alpha > 0:  # else the mixture is one-hot, and no logits have it
        assert_close(gradient(loss, mixture.log()), torch.zeros_like(p), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_measures_are_those_of_torch_and_neither_loss_reaches_into_the_other_network(temperature):
    (p, q, p0), labels = (random_logits(6, 9, seed=seed).requires_grad_() for seed in (1, 2, 3)), torch.arange(6)
    log_p, log_q, log_p0 = (z.log_softmax(-1) for z in (p, q, p0))
    gold_p, gold_q = (-Categorical(logits=z).log_prob(labels) for z in (p, q))
    pull, back = kl(q, p, temperature), kl(p0, p, temperature)
    loss = functools.partial(okd.teacher_loss, log_p, log_q, log_p0, labels, temperature=temperature)
    assert_close([loss(alpha=0.0), loss(alpha=1.0)], [gold_p, pull])
    assert_close(loss(alpha=0.3, anchor=0.4), 0.7 * gold_p + 0.3 * pull + 0.4 * back)
    for weight in (0.0, 0.3, 1.0):
        student_loss = okd.student_loss(log_p, log_q, labels, okd.rkl, weight)
        assert_close(student_loss, (1 - weight) * kl(q, p) + weight * gold_q)
    student_loss = okd.student_loss(log_p, log_q, labels, okd.fkl, 0.5)
    for value, others in ((student_loss, (p, p0)), (loss(alpha=0.5, anchor=1.0), (q, p0))):
        assert torch.autograd.grad(value.sum(), others, allow_unused=True) == (None, None)
    expected = dict(fkl=kl(p0, q), rkl=kl(q, p0), drift=kl(p0, p), student_ce=gold_q, teacher_ce=gold_p,
                    student_entropy=Categorical(logits=q).entropy(), teacher_entropy=Categorical(logits=p).entropy(),
                    top1_agreement=(p0.argmax(-1) == q.argmax(-1)).float())  # fmt: skip
    assert_all_close(okd.measure(log_p, log_q, log_p0, labels), expected)


# Data -----------------------------------------------------------------------------------------------------------------

BARE = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSum.\n\n### Response:\n")  # fmt: skip
PAIRED = ("Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n### Instruction:\nSum.\n\n"
          "### Input:\n1 2\n\n### Response:\n")  # fmt: skip
FORMS = [
    (dict(prompt="p", response="r"), "p", ["r"]), (dict(instruction="Sum.", input="1 2", output="3"), PAIRED, ["3"]),
    (dict(instruction="Sum.", context="1 2", response="3"), PAIRED, ["3"]),  # as Dolly's own file has it
    (dict(instruction="Sum.", input="", output=["a", "b"], prompt="x"), BARE, ["a", "b"])]  # fmt: skip
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}TURN\n{% endfor %}{% if add_generation_prompt %}"
            "<assistant>{% if enable_thinking is false %}!{% endif %}{% endif %}")  # fmt: skip


def test_unusable_rows_are_dropped_and_counted_long_ones_cut_unread_fields_said_once(tokenizer, capsys, jsonl):
    data = okd.load_data(okd.Args(data=str(jsonl)), tokenizer)  # what is scored was neither trained on nor looked at
    assert len({row.prompt for rows in data.values() for row in rows}) == sum(map(len, data.values())) == 40
    (one := jsonl.with_name("one")).write_text(jsonl.read_text().splitlines()[0])
    assert [len(rows) for rows in okd.load_data(okd.Args(data=str(one)), tokenizer).values()] == [1, 1, 1]
    rows = [("ok", "yes"), ("x" * 9, "long prompt"), ("empty", ""), ("cut", "y" * 30)]
    lines = [json.dumps(dict(prompt=prompt, response=response, passage="input, or not?")) for prompt, response in rows]
    kept = okd.read_rows("here", lines, tokenizer, tiny_args(max_length=12, max_prompt_length=8))
    assert [row.prompt for row in kept] == ["ok", "cut"] and kept[0].response_ids[-1] == tokenizer.eos_token_id
    assert len(kept[1]) == 12 and tokenizer.eos_token_id not in kept[1].response_ids  # no false end
    assert len(kept[0].answered(list(range(5, 205)), 96)) == 96  # so is sampled text
    out = capsys.readouterr().out
    assert "here: 2 of 4 rows kept" in out and out.count("fields that are not read: passage") == 1


@pytest.mark.parametrize("row, prompt, references", FORMS)
def test_forms_of_rows_and_the_template_is_alpacas(row, prompt, references, tokenizer):
    read, ids = okd.read_row(row, tokenizer), tokenizer(references[0], add_special_tokens=False).input_ids
    assert (read.prompt, read.references) == (prompt, references)
    assert read.response_ids == [*ids, tokenizer.eos_token_id] and tokenizer.decode(read.prompt_ids) == prompt


@pytest.mark.parametrize("turn, stops", [("<extra_id_5>", [1, 264]), ("</s>", [1])])
def test_the_end_of_a_turn_comes_from_the_chat_template_is_the_target_and_stops_generation(turn, stops):
    tokenizer, chat = okd.load_tokenizer("demo", okd.Args()), [("user", "hi"), ("assistant", "yo")]
    assert okd.ends(tokenizer) == [1]  # without a template
    tokenizer.chat_template = TEMPLATE.replace("TURN", turn)
    row = okd.read_row(dict(messages=[dict(role=role, content=text) for role, text in chat]), tokenizer)
    assert (okd.ends(tokenizer), row.references) == (stops, ["yo"])
    assert row.prompt == f"<user>hi{turn}\n<assistant>!"  # !: told not to think first
    assert row.response_ids == [*tokenizer("yo", add_special_tokens=False).input_ids, stops[-1]]
    assert okd.read_row(dict(prompt="p", response="r"), tokenizer).response_ids[-1] == 1  # no turn, no end of one
    for end in stops:
        assert okd.generate(parrot(4.0, (70, 71, end)), tokenizer, [[80, 81], [82]], CPU, 9) == [[70, 71, end]] * 2


def test_prompt_and_response_are_tokenised_apart_and_the_template_is_that_of_the_hubs_rows(tokenizer):
    merge = lambda text, **_: mock.Mock(input_ids=[dict(a=5, b=6, ab=7)[text]])
    row = okd.read_row(dict(prompt="a", response="b"), mock.Mock(side_effect=merge, eos_token_id=0))
    assert (row.prompt_ids, row.response_ids) == ([5], [6, 0])
    folder = ROOT.parent / "shared" / "data" / "raw_format"
    if not folder.exists():
        pytest.skip("the samples in the hub's own format are not here")
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in open(path)]
    carried = [row for row in rows if "### Response:" in row.get("prompt", "")]
    assert carried and all(okd.read_row(row, tokenizer).prompt.strip() == row["prompt"].strip() for row in carried)


def test_demo_rows_are_seeded_and_share_no_prompt_and_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    rows = okd.demo_rows(1000, seed=0)
    assert rows == okd.demo_rows(1000, seed=0) and rows != okd.demo_rows(1000, seed=1)
    assert len({row["prompt"] for row in rows}) == 1000
    assert all(1 < len(set(row["response"])) == len(row["response"]) for row in rows)
    rows = [example([i], list(range((7 * i) % 31 + 1))) for i in range(100)]
    epoch = lambda seed, n: [okd.batch_of(rows, 10, seed, n * 10 + i) for i in range(10)]
    first = epoch(1, 0)
    assert sorted(row.prompt_ids[0] for batch in first for row in batch) == list(range(100))
    assert first == epoch(1, 0) and first != epoch(1, 1) and first != epoch(2, 0)
    assert all(len(max(batch, key=len)) - len(min(batch, key=len)) <= 5 for batch in first)  # of like length


def test_labels_are_the_next_tokens_and_eos_counts_and_micro_batches_hold_to_tokens_and_lose_no_row(examples):
    batch = okd.collate([example([1, 2, 3], [4, 5, 0]), example([1], [6, 0]), example([2, 3], [9])], "cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [1, 6, 0, 0, 0, 0], [2, 3, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [4, 5, 0, 6, 0, 9]  # both EOS targets, none of the padding, which is EOS, too
    assert batch.positions.tolist() == [2, 3, 4, 6, 7, 13] and batch.states is None and len(batch.rollout) == 0
    unpadded = lambda batches: sorted(row[: row.index(1) + 1] for batch in batches for row in batch.input_ids.tolist())
    args, rows = tiny_args(micro_batch_tokens=100), examples[:39]
    whole = sorted(row.prompt_ids + row.response_ids for row in rows)
    shares = [list(okd.micro_batches(rows, args, dataclasses.replace(CPU, rank=rank, world=3))) for rank in range(3)]
    assert len(set(map(len, shares))) == 1 and unpadded(sum(shares, [])) == whole
    assert all(len(piece.input_ids) == 1 or piece.input_ids.numel() <= 100 for piece in sum(shares, []))
    assert unpadded(okd.micro_batches(rows, args, dataclasses.replace(CPU, world=3), share=False)) == whole
    args.micro_batch_tokens = 1
    assert [len(piece.input_ids) for piece in okd.micro_batches(examples[:3], args, CPU)] == [1, 1, 1]


# Trunk, head and chunks against the plain way -------------------------------------------------------------------------

EXACT, ROUGH = dict(atol=1e-10, rtol=1e-7), dict(atol=1e-5, rtol=1e-5)
CLOSE = dict.fromkeys(CONFIGS, EXACT) | dict(gemma2=ROUGH, cohere=ROUGH)  # always a softmax or a norm in float32
CHUNKED = [(family, "jsd") for family in CONFIGS] + [("gpt2", name) for name in okd.DIVERGENCES if name != "jsd"]
backward = torch.Tensor.backward
as_is = lambda self: self if self.dtype == torch.float64 else self.to(torch.float32)
float64_head = pytest.fixture(lambda monkeypatch: monkeypatch.setattr(torch.Tensor, "float", as_is))
both_losses = lambda divergence=okd.fkl: lambda p, q, p0, labels, _: dict(
    student_loss=okd.student_loss(p, q, labels, divergence, 0.2),
    teacher_loss=okd.teacher_loss(p, q, p0, labels, 0.5, 0.3))  # fmt: skip


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_trunk_and_head_are_the_models_logits_whatever_the_padding(family, with_lora, examples, float64_head):
    model = tiny(family, dtype=torch.float64)
    model = with_module(model, tiny_args(lora_targets="all-linear"), 2, std=0.1) if with_lora else model
    rows = [*examples[:4], examples[4].answered([1], 96), example([5] * 60, [6] * 30)]  # the last one pads them all
    hidden, head = okd.trunk(model, okd.collate(rows, "cpu"))
    assert_close(head(hidden), plain_logits(model, *rows), **CLOSE[family])


@pytest.mark.parametrize("family, name", CHUNKED)
def test_chunks_give_the_plain_losses_and_gradients_of_both_networks(family, name, examples, float64_head, monkeypatch):
    losses, rows, close = both_losses(bound(divergence=name)), examples[:5], CLOSE[family]
    student, teacher = pair(tiny_args(lora_targets="all-linear"), family, 0.1, dtype=torch.float64)
    moving = [p for model in (student, teacher) for p in model.parameters() if p.requires_grad]
    batch = okd.collate(rows, "cpu")
    with torch.no_grad(), teacher.disable_adapter():
        log_p0 = plain(teacher, rows)
    terms = losses(plain(teacher, rows), plain(student, rows), log_p0, batch.labels, None)
    expected = {name: term.sum() for name, term in terms.items()}
    truth = torch.autograd.grad(sum(expected.values()), moving)
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)  # seven tokens a chunk
    sums = okd.run_batch(student, teacher, batch, CPU, losses, backward, need_p0=True)
    assert_all_close(sums, expected, **close)
    assert_close([p.grad for p in moving], list(truth), **close)


def test_in_bfloat16_chunks_give_the_plain_losses_to_its_rounding(examples, monkeypatch):
    student, teacher, rows = tiny(seed=1), tiny(seed=2, dtype=torch.bfloat16).requires_grad_(False), examples[:5]
    with BF16.autocast():
        expected = okd.fkl(plain(teacher, rows), plain(student, rows)).sum()
    truth = torch.autograd.grad(expected, list(student.parameters()))
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)
    batch, losses = okd.collate(rows, "cpu"), lambda log_p, log_q, *_: dict(loss=okd.fkl(log_p, log_q))
    sums = okd.run_batch(student, teacher, batch, BF16, losses, backward)
    assert_close(sums["loss"], expected.detach(), rtol=1e-2, atol=0)
    assert all((p.grad - wanted).norm() <= 0.02 * wanted.norm() for p, wanted in zip(student.parameters(), truth))


@pytest.mark.parametrize("device, times", [("cpu", 1), ("cuda", 8), ("mps", 8)])
def test_no_tensor_holds_more_logits_than_a_chunk_which_is_larger_off_the_cpu(device, times, examples, monkeypatch):
    vocab, size, seen, parts, hw = 1000, 5 * times, [], [], mock.MagicMock()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(getattr(each, "shape", ()) for each in torch.utils._pytree.tree_leaves(result))
            return result

    hw.device.type = device
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", vocab * 5)
    batch, (student, teacher) = okd.collate(examples, "cpu"), pair(tiny_args(), vocab_size=vocab)
    losses = lambda *logs: parts.append(len(logs[0])) or both_losses()(*logs) | okd.measure(*logs)
    with Watch():
        okd.run_batch(student, teacher, batch, hw, losses, backward, need_p0=True)
    largest = max(shape.numel() for shape in seen if shape[-1:] == (vocab,) and shape != (32, vocab))  # the head's
    assert okd.GPU_CHUNKS == 8 and largest == vocab * size and max(parts) == size
    assert len(batch.labels) == sum(parts) > 4 * size


def test_gpt2s_gelu_is_loaded_as_one_kernel_and_dropout_as_asked(folders):
    path, ids = str(folders / "gpt2" / "teacher"), torch.arange(40)[None]
    rates = lambda model: {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    original = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    student, teacher = (okd.load_model(path, "", tiny_args(), torch.float32, dropout=on) for on in (True, False))
    names = [model.config.activation_function for model in (original, student, teacher)]
    assert names == ["gelu_new", "gelu_pytorch_tanh", "gelu_pytorch_tanh"]
    assert_close(teacher(ids).logits, original(ids).logits, atol=1e-6, rtol=0)
    assert (rates(student), rates(teacher)) == ({0.1}, {0.0})


# Training: who moves, what a batch's split changes (nothing), precision -----------------------------------------------

QUERY_VALUE = {"self_attn.q_proj", "self_attn.v_proj"}
CARRY = [
    ("gpt2", [], 0, {"attn.c_attn"}, "0123"), ("llama", [], 0, QUERY_VALUE, "0123"),
    ("gpt2", [], 2, {"attn.c_attn"}, "23"), ("llama", [], 1, QUERY_VALUE, "3"),
    ("gpt2", ["--lora-targets=all-linear"], 0, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, "0123"),
    ("llama", ["--lora-targets=k_proj,o_proj"], 0, {"self_attn.k_proj", "self_attn.o_proj"}, "0123")]  # fmt: skip
MEASURED = {"fkl", "rkl", "student_ce", "teacher_ce", "student_entropy", "teacher_entropy", "top1_agreement", "drift"}
REPORTED = {"student_loss", "student_grad_norm", "lr", "phi", "taid_t", "skipped_steps", "tokens_per_s", "sampling_s",
            "peak_memory_gb"} | MEASURED  # fmt: skip


def test_all_of_the_student_moves_and_of_a_moving_teacher_its_lora_of_a_frozen_one_nothing(trained, examples):
    original, ends = plain(tiny(seed=2), examples[:4]), []
    for args in (tiny_args(method="rkl"), tiny_args(method="fkl"), tiny_args()):
        assert_close(plain(pair(args)[1], examples[:4]), original, atol=0, rtol=0)  # B = 0 at the start
        student, teacher, _ = trained(args)
        assert changed(pair(args)[0], student) == set(student.state_dict())
        assert changed(pair(args)[1], teacher) == {name for name in teacher.state_dict() if "lora_" in name}
        ends.append(dict(trained(args, steps=1)[0].named_parameters()))
    assert_all_close(*ends[1:], atol=1e-7, rtol=1e-5)  # to the student's first step it makes no difference
    with torch.no_grad(), teacher.disable_adapter():
        assert_close(plain(teacher, examples[:4]), original, atol=0, rtol=0)
    assert (plain(teacher, examples[:4]) - original).abs().max() > 1e-4


@pytest.mark.parametrize("family, flags, top_layers, names, layers", CARRY)
def test_which_layers_carry_lora_of_which_rank_and_scale(family, flags, top_layers, names, layers):
    args = [okd.parse(["--teacher", "t", *flags, *more]) for more in ([], ["--lora-scale", "2"])]
    model, twice = (with_module(tiny(family), each, top_layers) for each in args)
    carrying = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    found = {re.search(r"\.(\d+)\.(\w+\.\w+)$", name).groups() for name in carrying}
    assert found == {(layer, name) for layer in layers for name in names}
    for name, module in carrying.items():
        assert module.lora_A["default"].weight.size(0) == 32 and module.scaling["default"] == 1.0
        assert twice.get_submodule(name).scaling["default"] == 2.0


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_both_optimizers_follow_the_learning_rate_own_one_network_each_and_decay_no_norm(ratio, trained, monkeypatch):
    by_hand = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 96 / 97, 51: 49 / 97, 99: 1 / 97}  # three steps rise, 97 fall
    assert {step: okd.learning_rate(step, 100, 1.0) for step in by_hand} == pytest.approx(by_hand)
    few = [okd.learning_rate(step, 4, 2.0) for step in range(4)]
    assert few == [2.0, 1.5, 1.0, 0.5] and okd.learning_rate(0, 1, 1e-3) == 1e-3
    rates, by_hand = [], [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    wrap(monkeypatch, "update", after=lambda norm, optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]) or norm)
    lines = trained(tiny_args(lr=1e-3, **dict(teacher_lr_ratio=ratio) if ratio else {}), steps=4)[2]
    assert rates[::2] == pytest.approx(by_hand) and [line["train/lr"] for line in lines] == pytest.approx(by_hand)
    assert rates[1::2] == pytest.approx([rate * (ratio or 1) for rate in by_hand])
    (student, teacher), decay = pair(tiny_args()), {}
    for group in [group for model in (student, teacher) for group in okd.adamw(model, 0.1).param_groups]:
        decay |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
    expected = {id(p): 0.0 if name.endswith("bias") or "ln_" in name else 0.1 for name, p in student.named_parameters()}
    assert decay == expected | {id(p): 0.1 for name, p in teacher.named_parameters() if "lora_" in name}
    assert okd.Args().weight_decay == 0.0


@pytest.mark.parametrize("method", ["sft", "okd"])
def test_the_split_into_micro_batches_changes_nothing(method, trained, monkeypatch):
    monkeypatch.setattr(okd, "update", lambda optimizer, *_: torch.zeros(()))
    ends, args = [], tiny_args(method=method, batch_size=8, anchor=0.5)
    for tokens in (4096, 90, 60, 1):  # from one batch of eight ragged rows to one a row
        *networks, _ = trained(dataclasses.replace(args, micro_batch_tokens=tokens), steps=1)
        ends.append(gradients(torch.nn.ModuleDict(dict(zip(("student", "teacher"), networks)))))
    assert any(name.startswith("teacher") for name in ends[0]) == (method == "okd")
    for other in ends[1:]:
        assert_all_close(other, ends[0], atol=2e-7, rtol=1e-4)


def test_one_batch_can_be_learnt_by_heart_and_each_network_is_clipped_by_itself(trained, examples, monkeypatch):
    lines = trained(tiny_args(method="fkl", lr=5e-3), steps=60, rows=examples[:4])[2]
    assert lines[-1]["train/fkl"] < 0.2 * lines[0]["train/fkl"]
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self: None)  # so that what it stepped on is left
    *networks, (line,) = trained(tiny_args(max_grad_norm=1e-3), steps=1)
    for network in networks:
        assert math.hypot(*(p.norm() for p in gradients(network).values())) == pytest.approx(1e-3, rel=1e-3)
    assert line["train/student_grad_norm"] > 0.01 and line["train/teacher_grad_norm"] > 0.002  # before the clip


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("method", okd.METHODS)
def test_every_row_of_the_method_table_trains_with_the_same_metrics(method, family, trained, examples):
    args = tiny_args(method=method, select="last", eval_every=1, max_new_tokens=4)
    student, _, lines = trained(args, pair(args, family), dev=examples[:3])
    assert changed(tiny(family, 1), student)
    moving = {"teacher_loss", "teacher_grad_norm"} if method == "okd" else set()
    keys = [line.keys() - {"phase", "step"} for line in lines]
    assert keys[1::2] == [{f"train/{name}" for name in REPORTED | moving}] * 2
    assert keys[0::2] == [{f"dev/{name}" for name in MEASURED}] * 3
    assert (lines[3]["train/sampling_s"] > 0) == (method in ("imitkd", "gkd", "opd", "minillm"))  # distillm's phi is 0
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "phase")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_reported_numbers_are_the_plain_ones(temperature, trained, examples):
    args = tiny_args(batch_size=8, micro_batch_tokens=90, divergence="jsd", beta=0.3, student_ce_weight=0.25,
                     alpha=0.35, anchor=0.1, temperature=temperature)  # fmt: skip
    (student, teacher), rows, ce = pair(args, std=0.1), okd.batch_of(examples, 8, args.seed, 0), F.cross_entropy
    with torch.no_grad(), teacher.disable_adapter():
        z_0 = plain_logits(teacher, *rows)
    z_p, z_q = plain_logits(teacher, *rows).detach(), plain_logits(student, *rows).detach()
    labels = torch.tensor([token for row in rows for token in row.response_ids])
    soft = temperature**2 * okd.jsd(*((z / temperature).log_softmax(-1) for z in (z_p, z_q)), 0.3).mean()
    pull, back = kl(z_q, z_p, temperature).mean(), kl(z_0, z_p, temperature).mean()
    expected = dict(student_loss=0.75 * soft + 0.25 * ce(z_q, labels), student_ce=ce(z_q, labels),
                    teacher_loss=0.65 * ce(z_p, labels) + 0.35 * pull + 0.1 * back, teacher_ce=ce(z_p, labels),
                    drift=okd.fkl(z_0.log_softmax(-1), z_p.log_softmax(-1)).mean())  # fmt: skip
    (line,) = trained(args, (student, teacher), steps=1)[2]
    found = {name: line[f"train/{name}"] for name in expected}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("hw", [BF16, FP16], ids=["bf16", "fp16"])
def test_mixed_precision_keeps_float32_masters_and_follows_float32(hw, trained):
    lines = []
    for each in (CPU, hw):
        networks = tiny(seed=1), with_module(tiny(seed=2).to(each.dtype))
        student, teacher, found = trained(tiny_args(), networks, steps=3, hw=each)
        lines.append(found)
        assert changed(tiny(seed=1), student) == set(student.state_dict())
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        assert all(p.dtype == (CPU if "lora_" in name else each).dtype for name, p in teacher.named_parameters())
    for exact, rough in zip(*lines):
        for name in ("train/student_loss", "train/teacher_loss", "train/fkl", "train/student_ce"):
            assert rough[name] == pytest.approx(exact[name], rel=0.02), name


@pytest.mark.parametrize("hw", [CPU, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(hw, trained, monkeypatch):
    calls, seen, (student, teacher) = [], [], pair(args := tiny_args(lr=1e-2))
    wrap(monkeypatch, "student_loss", after=lambda loss, *_: loss * (1.0 if calls or calls.append(1) else math.nan))
    wrap(monkeypatch, "report", before=lambda log, run, phase, step, kind, metrics: seen.append(
        (float(metrics["skipped_steps"]), bool(changed(tiny(seed=1), student)))))  # fmt: skip
    trained(args, (student, teacher), steps=3, hw=hw)
    assert seen[0] == (1.0, False) and seen[-1] == (1.0, True)  # skipped so far, whether the student has moved
    assert all(p.isfinite().all() for p in student.parameters())


def test_the_readmes_forty_lines_take_the_step_that_okd_takes(trained, examples):
    (code,) = re.findall(r"```python\n([^`]*Algorithm 1.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert "okd" not in re.sub("#.*", "", code)
    student, teacher, (line,) = trained(args := tiny_args(lora_rank=32), steps=1)
    rows, pad = okd.batch_of(examples, 4, 1, 0), functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    input_ids = pad([torch.tensor(row.prompt_ids + row.response_ids) for row in rows])
    mask = pad([torch.arange(len(row)) >= len(row.prompt_ids) for row in rows])
    lent = dict(student=tiny(seed=1), teacher=tiny(seed=2), input_ids=input_ids, mask=mask, batches=[(input_ids, mask)])
    torch.manual_seed(args.seed)
    exec(compile(code, "README.md", "exec"), lent)
    assert changed(tiny(seed=1), lent["student"])
    for name, ours in dict(student=student, teacher=teacher).items():
        assert lent[f"{name}_loss"].item() == pytest.approx(line[f"train/{name}_loss"], rel=1e-6)
        assert_all_close(lent[name].state_dict(), ours.state_dict(), atol=1e-7, rtol=1e-5)


# Generating, scoring, and whose text ----------------------------------------------------------------------------------

SENTENCE = [70, 71, 72, 1]  # its last token is EOS
WHOSE = [
    ("fkl", {}, 0), ("okd", {}, 0), ("okd", dict(text="student", anchor=0.1), 1), ("fkl", dict(text="student"), 1),
    ("imitkd", {}, 1), ("opd", {}, 1), ("gkd", {}, 0.5),
    ("rkl", dict(text="student", sgo_fraction=0.2), 0.2)]  # fmt: skip


def parrot(scale, sentence=SENTENCE):
    """A GPT-2 whose weights are set by hand so that after any prompt it says `sentence`: a table of bigrams.
    Its one block adds nothing and token x is the x-th unit vector, which the last layer norm turns into a peak at x.
    The head's rows of all but the first token look at the peak of the token before, that of the first at a constant."""
    model = tiny(n_embd=384, n_layer=1, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(384))
        model.transformer.ln_f.bias[-1] = 10.0
        model.lm_head.weight[list(sentence), [-1, *sentence[:-1]]] = scale
    return model


def test_text_is_that_of_plain_forwards_greedy_left_padded_ended_sampled_by_the_seed_and_has_room(tokenizer):
    model, prompt, ids = tiny("gpt2", 5, initializer_range=0.2), [70, 80, 90], [70, 80, 90]  # sharp logits
    for _ in range(10):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    ending = lambda end: types.SimpleNamespace(eos_token_id=end)
    assert okd.generate(model, ending(383), [prompt], CPU, 10) == [ids[3:]]
    (response,) = okd.generate(model, ending(ids[4]), [prompt], CPU, 10)  # the second new token is the end
    assert response == (ids[3:5] if ids[3] != ids[4] else [ids[4]])
    draw = lambda seed: okd.generate(model, tokenizer, [prompt] * 3000, CPU, 1, 3000, sample=True, seed=seed)
    first, expected = draw(1), model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    assert first == draw(1) != draw(2)
    share = torch.bincount(torch.tensor(first).flatten(), minlength=384) / 3000
    assert_close(share, expected, atol=0.03, rtol=0)
    model, prompts = tiny("llama", 3), [[70], [70, 71, 80], [90, 91, 92, 93, 94]]
    singly = [okd.generate(model, tokenizer, [prompt], CPU, 12)[0] for prompt in prompts]
    assert okd.generate(model, tokenizer, prompts, CPU, 12) == singly
    long, short = tiny(seed=1), tiny(seed=2, n_positions=20)
    with pytest.raises(okd.UserError, match="a prompt of 20 tokens fills the positions"):
        okd.generate(short, tokenizer, [[70] * 20], CPU, 5)
    for model, teacher in ((short, long), (long, short)):
        assert len(okd.generate(model, tokenizer, [[70] * 17], CPU, 9, sample=True, teacher=teacher)[0]) <= 3


def test_a_models_own_generation_config_changes_no_text_and_comes_back_with_the_student(folders, tokenizer, tmp_path):
    paths, config = [folders / "gpt2" / "student", tmp_path / "own"], tmp_path / "own" / "generation_config.json"
    shutil.copytree(*paths)
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(repetition_penalty=5.0, min_p=0.3)))
    models = [okd.load_model(str(path), "student", okd.Args(), torch.float32) for path in paths]
    for sample in (False, True):
        texts = [okd.generate(model, tokenizer, [[70, 80], [90]], CPU, 30, sample=sample, seed=1) for model in models]
        assert texts[0] == texts[1]
    okd.save_model(models[1], tokenizer, tmp_path / "saved")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.repetition_penalty, saved.min_p, saved.eos_token_id) == (5.0, 0.3, [1])


def text_of(args, examples, tokenizer, student=None, teacher=None, steps=10, answer=None):  # by answer(step)
    state = dict(phi=args.sgo_fraction, replay=[], rollouts=[], sampling_s=0.0)
    text = okd.Text(args, student, teacher, examples, tokenizer, CPU, steps, state)
    if answer:
        text.answers = lambda rows, step, teacher=None: [row.answered(answer(step), 96) for row in rows]
    return text


@pytest.mark.parametrize("scale", [2.0, 0.2])
def test_sampled_text_ends_and_is_aligned_or_its_loss_were_unknown(scale, examples, tokenizer, trained, monkeypatch):
    hidden = (torch.eye(384).double()[[13, *SENTENCE[:-1]]] - 1 / 384) / math.sqrt(1 / 384 - 1 / 384**2 + 1e-5)
    logits, hidden[:, -1] = torch.zeros(4, 384).double(), hidden[:, -1] + 10
    logits[:, SENTENCE] = scale * hidden[:, [-1, *SENTENCE[:-1]]]  # by the closed form of layer norm on unit vectors
    known, args = F.cross_entropy(logits, torch.tensor(SENTENCE), reduction="none").tolist(), tiny_args(method="imitkd")
    rows = text_of(args, examples, tokenizer, parrot(2.0))(0)
    assert [row.response_ids for row in rows] == [SENTENCE] * 4  # the end among them
    monkeypatch.setattr(okd.Text, "answers", lambda self, *rest: rows)  # a hesitant parrot on the sure one's words
    args.student_ce_weight = 1.0  # which the command refuses: here it makes the loss a known number
    (line,) = trained(args, (parrot(scale), parrot(1.0)), steps=1)[2]
    assert line["train/student_loss"] == pytest.approx(sum(known) / 4, abs=1e-5)
    assert (max(known) < 1e-6) if scale == 2 else (min(known) > 1)
    assert okd.collate([examples[0].answered(SENTENCE, 96)], "cpu").labels.tolist() == SENTENCE


@pytest.mark.parametrize("method, flags, share", WHOSE)
def test_whose_text_follows_the_flags(method, flags, share, examples, tokenizer):
    text = text_of(tiny_args(method=method, **flags), examples, tokenizer, answer=lambda step: SENTENCE)
    own = [[row.response_ids == SENTENCE for row in text(step)] for step in range(400)]
    assert all(all(rows) or not any(rows) for rows in own)
    assert abs(sum(map(all, own)) - 400 * share) <= 3 * math.sqrt(400 * share * (1 - share))


def test_replay_buffer_is_first_in_first_out_and_distillm_uses_it_ever_more(examples, tokenizer, monkeypatch):
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 10)
    args, stale = tiny_args(method="opd", sgo_source="replay"), False
    text = text_of(args, examples, tokenizer, answer=lambda step: [100 + step, 1])
    for step in range(8):
        drawn = {row.response_ids[0] - 100 for row in text(step)}
        held = [row.response_ids[0] - 100 for row in text.state["replay"]]
        assert held == sorted(step for step in range(step + 1) for _ in range(4))[-10:] and drawn <= set(held)
        stale |= drawn != {step}
    assert stale  # not only what was just written
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 12)
    args, kinds = tiny_args(method="distillm"), []
    text = text_of(args, examples, tokenizer, steps=100, answer=lambda step: [100 + step, 1])
    phi_after = lambda loss: text.validated(loss) or text.state["phi"]
    phis = [phi_after(loss) for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.2, 2.19, 1.0, 2.31)]
    # the first is the reference, and only what is 0.1 over it hits: 2.1 and, with it as reference, 2.2, and then 2.31
    assert phis == pytest.approx([0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3])
    text.state["phi"] = 0.95
    assert phi_after(9.0) == 1.0
    text.state["phi"] = 0.6
    for step in range(100):
        full, r = len(text.state["replay"]) >= 12, random.Random(f"1, text of step {step}").random()
        kinds.append("data" if r >= 0.6 else "fresh" if r < 0.6 * (1 - step / 100) or not full else "replay")
        steps = {row.response_ids[0] - 100 for row in text(step) if len(row.response_ids) == 2}
        assert dict(data=not steps, fresh=steps == {step}, replay=bool(steps) and step not in steps)[kinds[-1]]
    assert set(kinds) == {"data", "fresh", "replay"} and kinds[60:].count("replay") > kinds[:40].count("replay")


def test_rollouts_carry_advantage_log_q_and_weight_of_every_token_and_come_anew_after_their_passes(examples, tokenizer):
    student, teacher = pair(args := tiny_args(method="minillm", micro_batch_tokens=60))
    text = text_of(args, examples, tokenizer, student, teacher)
    rows = [row.answered(ids, 96) for row, ids in zip(examples, ([70, 71, 1], [80, 1], [90, 91, 92, 93]))]
    ahead = lambda r: sum(0.95**k * reward for k, reward in enumerate(r)) / len(r)
    discounted = lambda rewards: [ahead(rewards.tolist()[t:]) for t in range(len(rewards))]
    rewards = random_logits(7, seed=5)
    assert okd.discounted_return(rewards, 0.95).tolist() == pytest.approx(discounted(rewards))
    judged, returns = text.judged(rows), []
    for row, got in zip(sorted(rows, key=len), judged):
        assert got.response_ids == row.response_ids
        log_p, log_q = (plain(model, [row])[range(len(got.rollout)), row.response_ids] for model in (teacher, student))
        returns += discounted(log_p - log_q)
        assert [value[1] for value in got.rollout] == pytest.approx(log_q.tolist(), abs=1e-5)
        weights = log_q.exp() / (0.2 * log_p.exp() + 0.8 * log_q.exp())
        assert [value[2] for value in got.rollout] == pytest.approx(weights.tolist(), rel=1e-4)
    flat = torch.tensor(returns)
    whitened = ((flat - flat.mean()) / flat.std(unbiased=False)).tolist()
    assert [value[0] for row in judged for value in row.rollout] == pytest.approx(whitened, abs=1e-3)
    assert okd.collate(judged, "cpu").rollout.shape == (9, 3)
    calls, text = [], text_of(tiny_args(method="minillm", rollouts=8), examples, tokenizer, teacher="T", steps=16)
    text.answers = lambda rows, step, teacher=None: calls.append((step, len(rows), teacher)) or rows
    text.judged = lambda rows: rows
    seen = [sorted(id(row) for rows in (text(step), text(step + 1)) for row in rows) for step in range(0, 16, 2)]
    assert calls == [(0, 8, "T"), (8, 8, "T")]  # two batches a pass, four passes
    assert seen[0] == seen[1] == seen[2] == seen[3] != seen[4]


def test_policy_gradient_is_that_of_the_expected_reward_and_clipped_pessimistically():
    z_p, z_q, rewards = torch.tensor([[0.3, -0.1], [0.1, 0.05], [0.7, -0.4]], dtype=torch.float64)
    log_p, log_q, labels = z_p.log_softmax(-1), z_q.log_softmax(-1), torch.tensor([0, 1])
    log_m = okd.mix(log_p, log_q, okd.TEACHER_SHARE)
    policy = lambda z, *rest: okd.policy_loss(z.log_softmax(-1).expand(len(rest[0]), 2), *rest)
    loss = lambda z: log_m.exp() * policy(z, labels, rewards, log_q, (log_q - log_m).exp())
    # by finite differences: the importance-weighted gradient, averaged over the mixture, is that of E_q[reward]
    expected, nudge = lambda z: (z.softmax(-1) * rewards).sum(-1), 1e-6 * torch.eye(2).double()
    finite = (expected(z_q + nudge) - expected(z_q - nudge)) / 2e-6
    assert (-gradient(loss, z_q)).tolist() == pytest.approx(finite.tolist(), rel=1e-6)
    (advantage, weight), z = torch.tensor([[1.0, 1, -1, -1], [1.5, 0.5, 1.5, 0.5]]).double(), torch.zeros(4, 2).double()
    rest = torch.zeros(4, dtype=torch.long), advantage, torch.full((4,), math.log(0.5)).double(), weight
    assert policy(z, *rest).tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])  # -min(w A, clip(w, 0.8, 1.2) A)
    assert gradient(lambda z: policy(z, *rest), z).any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_mixture_sampling_uses_p_and_q_of_plain_forwards_at_every_token(family, with_lora):
    student, teacher = tiny(family, 1), with_module(tiny(family, 2), std=0.1) if with_lora else tiny(family, 2)
    texts, new = [[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 92], [93, 94, 95]]
    processor = okd.Mixture(teacher, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]))
    for step in range(3):  # left-padded, cached, two prompts at once, against one unpadded forward for every prefix
        with torch.no_grad():
            logits = [[model(torch.tensor([text])).logits[0, -1] for text in texts] for model in (teacher, student)]
            p, q = map(torch.stack, logits)
            ids = torch.tensor([texts[0], [0, 0, 0, *texts[1]]])
            assert_close(processor(ids, q).exp(), 0.2 * p.softmax(-1) + 0.8 * q.softmax(-1), atol=1e-5, rtol=1e-4)
        texts = [[*text, words[step]] for text, words in zip(texts, new)]


def test_seqkd_trains_on_teacher_text_and_goes_on_with_it_or_not_at_all(job, tokenizer, monkeypatch):
    parrot(4.0).save_pretrained(job.path / "parrot"), tokenizer.save_pretrained(job.path / "parrot")
    flags = ["--teacher", job.path / "parrot", "--method", "seqkd", *NO_SFT, "--eval-rows", "0", "--save-every", "1"]
    seen, text, kept = [], job.folder / "teacher_text.json", job.path / "kept"
    with monkeypatch.context() as patch:
        wrap(patch, "run_batch", before=lambda student, teacher, batch, *rest: seen.append(batch.labels.tolist()))
        job.killed(2, *flags, target="run_batch")
    assert seen and all(labels == SENTENCE * 4 for labels in seen)
    text.rename(kept)
    assert "teacher_text.json, which this run trains on, is gone" in job.resume(code=2)
    kept.rename(text), job.resume()


def test_sample_batch_size_reaches_all_and_fresh_rollouts_have_ratio_1(job, monkeypatch):
    sizes, ratios = set(), []
    wrap(monkeypatch, "generate", before=lambda *args, **named: sizes.add(args[5]))
    wrap(monkeypatch, "policy_loss", before=lambda log_q, labels, advantage, sampled, *rest: ratios.append(
        (-okd.cross_entropy(log_q, labels) - sampled).abs().max().item()))  # fmt: skip
    for method in ("imitkd", "seqkd", "minillm"):
        flags = ["--method", method, "--sample-batch-size", "3", "--rollouts", "4", "--lr", "1e-2", *NO_SFT]
        job(*flags, "--output-dir", job.path / method)
    assert sizes == {3} and ratios[0] < 1e-4 < max(ratios)  # the second step is a second pass


# The command ----------------------------------------------------------------------------------------------------------


def run(main, capsys, *flags):
    """okd.main or eval.main in this process -> (exit code, stdout, stderr)."""
    try:
        code = main([str(flag) for flag in flags]) or 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


NO_SFT = ("--teacher-sft-epochs", "0", "--student-sft-epochs", "0")
LONG = (*"--max-steps 12 --epochs 9 --save-every 3 --log-every 2 --eval-every 5 --eval-rows 4".split(), *NO_SFT)


class Job:
    """okd.py by small flags and more, into `folder`; must exit with `code`. -> stdout, after a failure the stderr."""

    def __init__(self, folders, jsonl, tmp_path, capsys):
        self.folders, self.jsonl, self.path, self.folder = folders, jsonl, tmp_path, tmp_path / "run"
        self.capsys, self.family = capsys, "gpt2"
        self.resume = functools.partial(self.call, "--resume", self.folder)
        self.eval = functools.partial(self.call, main=okd_eval.main)

    def call(self, *flags, code=0, main=okd.main):
        got, out, err = run(main, self.capsys, *flags)
        assert got == code and (code == 0 or err.count("\n") == 1), err
        return err if code else out

    def flags(self, *more):
        pair = self.folders / self.family
        flags = ["--teacher", pair / "teacher", "--student", pair / "student", "--data", self.jsonl, "--device", "cpu",
                 "--output-dir", self.path / "run", "--cache-dir", self.path / "cache", "--precision", "fp32",
                 *"--max-steps 2 --batch-size 4 --max-length 96 --max-new-tokens 8 --score-rows 4".split(),
                 "--log-every", "1", "--lora-rank", "4"]  # fmt: skip
        return [str(flag) for flag in (*flags, *more)]

    def __call__(self, *more, code=0):
        return self.call(*self.flags(*more), code=code)

    def killed(self, number, *more, target="student_loss"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, number, target)
            self(*more)
        return self.capsys.readouterr().out


@pytest.fixture
def job(folders, jsonl, tmp_path, capsys):
    return Job(folders, jsonl, tmp_path, capsys)


def weights_of(folder, name="student/model.safetensors"):
    return safetensors.torch.load_file(folder / name)


def test_a_run_leaves_folders_that_load_everywhere_and_a_second_starts_from_the_same_bits(job):
    out, folder = job(), job.folder
    block = dict(re.findall(r"^([a-z_]+): (.*)$", out, re.M))
    assert block["method"] == "okd" and block["steps"] == "2" and re.search(r"\nstudent, okd +\d", out)
    assert {path.name for path in folder.iterdir() if "sft-" not in path.name} == {
        *"args.json metrics.jsonl models.json student teacher_lora".split()}  # fmt: skip
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "student").config.vocab_size == 384
    writer = transformers.pipeline("text-generation", model=str(folder / "student"), max_new_tokens=4)
    assert writer("shout ba\n")[0]["generated_text"].startswith("shout ba\n")
    adapter = json.loads((folder / "teacher_lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == block["teacher"] and adapter["lora_alpha"] == adapter["r"] == 4
    teacher = transformers.AutoModelForCausalLM.from_pretrained(block["teacher"])
    moved = peft.PeftModel.from_pretrained(teacher, folder / "teacher_lora")
    assert any(p.abs().sum() > 0 for name, p in moved.named_parameters() if "lora_B" in name)
    saved, final = json.loads((folder / "args.json").read_text()), records(folder)[-1]
    assert dict(method="okd", divergence="fkl", teacher_moves=True, precision="fp32").items() <= saved.items()
    assert {record["phase"] for record in records(folder)} == {"distil", "final"}
    assert {"final/rouge_l", "final/rouge_l_teacher", "final/rouge_l_start", "final/distil_s", "final/sampling_s",
            "final/selected_step", "final/dev_rouge_l", "final/dev_rouge_l_last"} <= final.keys()  # fmt: skip
    out = job("--output-dir", job.path / "other", "--method", "fkl")
    first, second = (records(job.path / name)[0] for name in ("run", "other"))
    assert out.count("fine-tuned before, kept in") == 2 and first == second and "dev/fkl" in first
    assert "holds a run" in job(code=2)


def test_fine_tuned_models_are_kept_by_what_determines_them_and_lora_is_merged_in_float32(job, tokenizer, tmp_path):
    touched, retrained, counts = tmp_path / "touched" / "teacher", tmp_path / "retrained" / "teacher", []
    shutil.copytree(job.folders / "gpt2" / "teacher", touched), os.utime(touched / "model.safetensors", (1, 1))
    tiny("gpt2", 9, **DROPOUT).save_pretrained(retrained), tokenizer.save_pretrained(retrained)
    for i, change in enumerate([(), ("--student-sft-lr", "5e-4"), ("--lora-rank", "2"), ("--seed", "3", "--lr", "1e-3"),
                                ("--teacher", touched), ("--teacher", retrained)]):  # fmt: skip
        job("--score-rows", "0", "--eval-rows", "0", "--max-steps", "1", *change, "--output-dir", tmp_path / f"run{i}")
        counts.append(tuple(len(list((tmp_path / "cache").glob(f"{role}-*"))) for role in ("student", "teacher")))
    # lr of the student's start: the student's; rank: the LoRA-tuned teacher's; seed, lr, time of the file: none
    assert counts == [(1, 1), (2, 1), (2, 2), (2, 2), (2, 2), (2, 3)]
    job.family, base = "llama", transformers.AutoModelForCausalLM.from_pretrained(job.folders / "llama" / "teacher")
    out = job("--precision", "bf16", "--teacher-sft-lr", "1e-2", "--cache-dir", tmp_path / "other")
    before, after = map(float, re.search(r"CE on dev rows ([\d.]+) with LoRA, ([\d.]+) merged", out).groups())
    assert after == pytest.approx(before, rel=0.02)
    (kept,) = (tmp_path / "other").glob("teacher-*")
    merged = peft.PeftModel.from_pretrained(base, job.folder / f"sft-{kept.name}").merge_and_unload().state_dict()
    for name, value in weights_of(kept, "model.safetensors").items():  # rounded once
        assert torch.equal(value, merged[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("select, kept", [("best", 2), ("last", 5)])
def test_the_student_with_the_best_look_is_kept_also_when_killed_between_looks(select, kept, job, monkeypatch):
    scores, weights = [1.0, 2.0, 9.0, 3.0, 3.0, 9.0 - 1e-9], []  # of the steps 0, 1, 2, 3, after the kill again 3, 4

    def evaluated(means, args, student, *rest):
        weights.append({name: p.clone() for name, p in student.state_dict().items()})
        return means | (dict(rouge_l=scores[len(weights) - 1]) if args.select == "best" else {})

    wrap(monkeypatch, "evaluate", after=evaluated)
    flags = ["--max-steps", "4", "--eval-every", "1", "--select", select, "--lr", "1e-2", "--save-every", "1"]
    job.killed(4, *LONG, *flags, target="run_batch"), job.resume()  # in step 4, after the look at 3
    assert all(torch.equal(value, weights[kept][name]) for name, value in weights_of(job.folder).items())
    assert [record["step"] for record in records(job.folder) if "dev/fkl" in record] == [0, 1, 2, 3, 4]
    best = {"final/selected_step": 2, "final/dev_rouge_l": 9.0, "final/dev_rouge_l_last": scores[-1]}
    assert select == "last" or best.items() <= records(job.folder)[-1].items()


def test_wandb_offline_gets_name_config_metrics_and_samples_and_one_that_does_not_start_is_one_line(job, monkeypatch):
    wandb, flags = pytest.importorskip("wandb"), job.flags("--track", *NO_SFT)
    subprocess.run([sys.executable, ROOT / "okd.py", *flags], check=True, capture_output=True, cwd=job.path)
    (file,) = job.folder.glob("wandb/offline-run-*/*.wandb")
    wanted = [b"train/student_loss", b"dev/fkl", b"final/rouge_l_start", b"samples", b"teacher_lr_ratio"]
    deadline = time.monotonic() + 10  # wandb's own process closes the file a little after ours has ended
    while (missing := [text for text in wanted if text not in file.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing and file.stem == "run-run"  # the run's id is its folder's name
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.CommError("unreachable")))
    assert "cannot start wandb" in job("--track", "--output-dir", job.path / "other", code=2)
    assert not (job.path / "cache").exists()  # nothing was trained before


@pytest.mark.parametrize("flags", [("--method", "fkl"), ("--method", "okd", "--lora-top-layers", "2")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_cached_teacher_states_change_no_number_and_are_shared(family, flags, job):
    job.family, ends, written = family, [], []
    for i, more in enumerate(((), ("--cache-teacher",), ("--cache-teacher",))):
        out = job("--max-steps", "12", "--output-dir", job.path / f"{i}", *NO_SFT, *flags, *more)
        written.append("GB to" in out), ends.append(weights_of(job.path / f"{i}"))
    assert_all_close(ends[1], ends[0], atol=2e-6, rtol=1e-4)
    assert written == [False, True, False] and all(torch.equal(ends[2][name], value) for name, value in ends[1].items())


def test_cached_states_spare_the_blocks_below_and_the_file_holds_what_it_should(examples, tmp_path):
    args, calls, found = tiny_args(cache_dir=tmp_path, cache_teacher=True, lora_top_layers=2, lr=1e-3), [], []
    (student, teacher), losses = pair(args, "llama"), lambda *logs: both_losses()(*logs) | okd.measure(*logs)
    rows = okd.with_states(args, teacher, "t", examples, CPU)
    (path,) = tmp_path.glob("states-*")
    assert path.stat().st_size == sum(map(len, examples)) * 32 * 4
    frozen = okd.with_states(tiny_args(method="fkl", cache_dir=tmp_path), tiny("llama", 2), "t", examples, CPU)
    assert [len(row.states) for row in frozen] == [len(row.response_ids) for row in examples]
    okd.blocks_of(teacher)[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    for batch in (okd.collate(part, "cpu") for part in (examples[5:9], rows[5:9])):
        calls.clear(), student.zero_grad(), teacher.zero_grad()
        sums = okd.run_batch(student, teacher, batch, CPU, losses, backward, True)
        found.append((len(calls), sums, gradients(teacher), gradients(student)))
    assert (found[0][0], found[1][0]) == (2, 0)  # for p_f and p_0; for neither
    for plain_ones, cached in zip(found[0][1:], found[1][1:]):
        assert_all_close(cached, plain_ones, atol=1e-5, rtol=1e-4)
    path.write_bytes(bytes(path.stat().st_size))
    for network, words in ((teacher, "off what the teacher computes"), (pair(tiny_args())[1], "nothing to keep")):
        with pytest.raises(okd.UserError, match=words):
            okd.with_states(args, network, "t", examples, CPU)


def test_tokenizers_may_differ_in_reserved_names_and_eos_and_heads_in_size_but_no_ordinary_token(job, tokenizer):
    from tokenizers import Tokenizer, models

    def words(*names, eos="<end>"):
        backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(("a", *names))}, unk_token="a"))
        backend.add_special_tokens([name for name in names if name.startswith("<")])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)

    ours, said = words("b", "c", "<end>", "<turn>"), lambda: job.capsys.readouterr().out
    assert okd.one_tokenizer(ours, ours) is ours and said() == ""
    assert okd.one_tokenizer(ours, words("b", "c", "<end>", "<reserved>")) is ours
    assert "the student gets the teacher's tokenizer" in said()
    assert okd.one_tokenizer(ours, words("b", "c", "<end>", "turn")) is ours and said()  # reserved in one of them
    assert okd.one_tokenizer(ours, words("b", "c", "<end>", "<turn>", eos="<turn>")) is ours
    assert "EOS is <end> and was <turn>, 0 reserved tokens differ" in said()
    with pytest.raises(okd.UserError, match=r"2 tokens of teacher and student differ, as \['c', 'x'\]"):
        okd.one_tokenizer(ours, words("b", "x", "<end>", "<turn>"))
    job.family, padded = "llama", job.path / "padded"
    tiny("llama", 1, vocab_size=400).save_pretrained(padded), tokenizer.save_pretrained(padded)
    assert "a head of 400 rows is cut to the 384 that both have" in job("--teacher", padded, *NO_SFT)


BAD = [  # content of the training file, or flags; what the one line says
    ("{}", "line 1 needs instruction and output, prompt and response, or messages"), ("", "no usable row among 0"),
    ('{"prompt": "a", "response": "b"}\n{"prompt": 1}', "line 2 needs instruction"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "not the assistant's"),
    ('{"prompt": "a\\ud800", "response": "b"}', "line 1 needs instruction"), ("{nonsense", "line 1 needs instruction"),
    ('{"prompt": "a", "response": ""}', "no usable row among 1"), ("--teacher-sft-lr -1", "--teacher-sft-lr is -1"),
    *((flags, "needs --anchor") for flags in ("--text student", "--text mixture", "--alpha 1")),
    ("--skew 1", "--skew is 1.0"), ("--ab-alpha 0 --ab-beta 0", "must be larger"), ("--max-steps -1", "is -1: it must"),
    ("--method gkd --student-ce-weight 0.5", "--student-ce-weight on student text"), ("--alpha 1.5", "--alpha is 1.5"),
    ("--lr 0", "--lr is 0.0: it must lie in"), ("--lr nan", "--lr is nan"), ("--lora-targets lm_head", "does not fit"),
    ("--method gkd --cache-teacher", "needs text that stays"), ("--lora-top-layers 9", "the teacher has only 4 layers"),
    ("--batch-size 0", "--batch-size is 0: it must"), ("--method distillm --eval-rows 0", "adaptive needs --eval-rows"),
    ("--cache-teacher", "needs --lora-top-layers"), ("--teacher ./no/such/folder", "cannot load the tokenizer of ./no"),
    ("--lora-targets q_projj", "--lora-targets q_projj does not fit: name some of c_attn, c_fc, c_proj"),
    ("--max-length 999", "--max-length 999 is more than the positions"), ("--output-dir file/run", "Not a directory"),
    ("--cache-dir file/run --teacher-sft-epochs 1", "Not a directory"), ("--shard", "--shard needs several processes"),
    ("--device cuda:77", "--device cuda:77 is not usable here"), ("--data nowhere.jsonl", "cannot read nowhere.jsonl"),
    ("--device toaster", "--device toaster is not usable here"), ("--teacher-quant 4bit", "cannot load the teacher"),
]  # fmt: skip


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_input_is_one_line_and_exit_2(bad, message, job, monkeypatch):
    rows, flags = ("", bad.split()) if bad.startswith("--") else (bad, ["--data", "file"])
    monkeypatch.chdir(job.path), (job.path / "file").write_text(rows)
    assert message in job(*NO_SFT, *flags, code=2) and not (job.folder / "student").exists()


def test_no_pickle_no_foreign_code_and_no_network_unless_something_is_missing_which_one_line_names(job, monkeypatch):
    loads = re.findall(r"torch\.load\((.*)\)", (ROOT / "okd.py").read_text() + (ROOT / "eval.py").read_text())
    assert len(loads) == 1 and "weights_only=True" in loads[0] and okd.Args().trust_remote_code is False
    flags = [flag for flag in job.flags() if flag not in ("--data", str(job.jsonl))]
    err = job.call(*flags, code=2)
    assert all(word in err for word in ("raw.jsonl", "MiniLLM/dolly", "HF_HOME"))
    err = job.call("--teacher", "nobody/nothing", "--student", "nobody/nothing", code=2)
    assert "nobody/nothing" in err and "HF_HOME" in err
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked for"))
    job()
    pickled = shutil.copytree(job.folders / "gpt2" / "teacher", job.path / "pickled")
    (pickled / "model.safetensors").unlink(), torch.save(tiny().state_dict(), pickled / "pytorch_model.bin")
    assert "cannot load the teacher" in job("--teacher", pickled, "--output-dir", job.path / "other", code=2)


def test_auto_is_bf16_where_the_hardware_is_fast_at_it_and_a_gpu_gets_its_number(monkeypatch):
    for unit, dtype in dict(amx_bf16=torch.bfloat16, avx512_bf16=torch.bfloat16, neither=torch.float32).items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
        assert okd.pick_hardware(okd.Args(device="cpu")).dtype == dtype
        assert okd.pick_hardware(okd.Args(device="cpu", precision="fp16")).dtype == torch.float16
    chosen, recent = [], lambda including_emulation: len(chosen) > 1
    for name, stub in dict(is_available=lambda: True, set_device=chosen.append, is_bf16_supported=recent).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    with FakeTensorMode():
        found = [okd.pick_hardware(okd.Args(device=name)) for name in ("auto", "cuda:1")]
    assert [str(hw.device) for hw in found] == list(map(str, chosen)) == ["cuda:0", "cuda:1"]
    assert [hw.dtype for hw in found] == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("method", ["okd", "taid", "akl", "sft"])
def test_between_reports_nothing_is_read_back_from_the_device(method, examples, tokenizer, tmp_path, monkeypatch):
    hw, args = okd.pick_hardware(okd.Args(device="cpu")), tiny_args(method=method, max_steps=2)
    hw.device, hw.now, hw.autocast = torch.device("meta"), time.perf_counter, mock.MagicMock()  # which has no values
    monkeypatch.setattr(okd, "report", print), monkeypatch.setattr(okd, "save_checkpoint", print)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: mock.Mock(param_groups=groups))
    student, teacher = (network.to("meta") for network in pair(args, "llama"))
    okd.train(args, student, teacher, dict(train=examples), tokenizer, hw, tmp_path)


def test_help_has_a_text_and_a_default_for_every_flag(job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    words = " ".join(job.call("--help").replace("│", " ").split())
    source = (ROOT / "okd.py").read_text().split("class Args:")[1]
    for field in dataclasses.fields(okd.Args):
        comment = re.search(rf"^    {field.name}: .*  # (.*)$", source, re.M)
        assert "--" + field.name.replace("_", "-") in words and (not comment or comment[1] in words), field.name
    assert words.count("(default:") >= len(dataclasses.fields(okd.Args))


# Survives: resume, faults, more than one process ----------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: no handler of the program sees it."""


def kill_at(monkeypatch, call, target="run_batch", instead=None):
    """The `call`-th call of okd.<target>, not counting looks at dev rows, ends the process, or does `instead`."""
    numbers = iter(range(1, 10**6))

    def before(*args, **named):
        if (target != "run_batch" or len(args) > 5) and next(numbers) == call:
            if instead is None:
                raise Killed
            instead()

    wrap(monkeypatch, target, before=before)


def timeless(folder):
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "peak_memory_gb"))} for line in records(folder)]


def assert_same_run(folder, expected):
    ours, theirs = weights_of(folder), weights_of(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert timeless(folder) == timeless(expected) and not (folder / "checkpoints").exists()


TWICE = [(8, "student_loss", "goes on after step [36]"), (4, "student_loss", "goes on after step [369]")]
KILLS = [  # flags; kills: the how-manieth call of what, and what the next attempt says
    ("okd", TWICE), ("taid", TWICE), ("gkd", TWICE), ("opd --sgo-source replay", TWICE),
    ("minillm --rollouts 4", TWICE), ("distillm --sgo-fraction 0.7", TWICE),
    ("okd --teacher-sft-epochs 1 --student-sft-epochs 1", [
        (6, "student_loss", "sft-teacher.*: goes on after step 3"), (14, "student_loss", "sft-student.* after step 6"),
        (12, "student_loss", "run: goes on after step 6"), (1, "finish", "run: goes on after step 12")]),
    # before and after the checkpoint of step 6 gets its name; the first six calls are for flags, models, and step 3
    ("okd", [(7, "force_to_disk", "goes on after step 3")]), ("okd", [(8, "force_to_disk", "goes on after step 6")]),
]  # fmt: skip


@pytest.mark.parametrize("flags, kills", KILLS)
def test_a_killed_run_ends_bit_identical_to_one_that_was_not(flags, kills, job, monkeypatch):
    """GPT-2 with dropout, killed between two checkpoints, in a save, a warm start, the scoring; weights and records."""
    monkeypatch.setattr(okd, "REPLAY_CAPACITY", 8)
    flags, synced = [*LONG, "--method", *flags.split()], []
    job(*flags, "--output-dir", job.path / "whole", "--cache-dir", job.path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        patch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        said = [job.killed(call, *flags, "--resume", job.folder, target=target) for call, target, _ in kills]
    assert all(re.search(words, out) for (*_, words), out in zip(kills, [*said[1:], job.resume()], strict=True)), said
    assert re.search(r"/step-00000003.pt.tmp-\d+\n.*/checkpoints$", "\n".join(synced), re.M)
    assert_same_run(job.folder, job.path / "whole")


def test_a_warm_start_that_was_killed_is_not_taken_for_one_of_another_recipe(job):
    flags, other = [*LONG, "--teacher-sft-epochs", "1"], ["--teacher-sft-lr", "1e-3", "--cache-dir", job.path / "other"]
    job(*flags, *other, "--output-dir", job.path / "whole")
    job.killed(6, *flags), job.resume("--teacher-sft-lr", "1e-3")
    assert_same_run(job.folder, job.path / "whole")


def test_resume_takes_the_last_whole_checkpoint_and_the_teacher_of_before_or_says_why_not_in_one_line(job, monkeypatch):
    flags, loaded = [*LONG, "--teacher-sft-epochs", "1"], []
    job(*flags, "--output-dir", job.path / "whole"), job.killed(11, *flags)
    before, last = sorted((job.folder / "checkpoints").iterdir())
    assert (before.name, last.name) == ("step-00000006.pt", "step-00000009.pt")
    whole, middle = last.read_bytes(), last.stat().st_size // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    wrap(monkeypatch, "load_model", before=lambda name, role, *rest, **named: loaded.append((role, name)))
    for harm, content in dict(flipped=flipped, truncated=whole[:100], empty=b"").items():
        folder = shutil.copytree(job.folder, job.path / harm)
        (folder / "checkpoints" / last.name).write_bytes(content), loaded.clear()
        code, out, err = run(okd.main, job.capsys, "--resume", folder, "--teacher-sft-lr", "1e-3")
        assert code == 0 and "step-00000009.pt is damaged" in err and "goes on after step 6" in out
        assert_same_run(folder, job.path / "whole")
        (kept,) = (job.path / "cache").glob("teacher-*")  # the other learning rate changed nothing
        assert ("teacher", str(kept)) in loaded
    moved = kept.rename(job.path / "elsewhere")
    assert f"cannot load the teacher {kept}" in job.resume("--teacher-sft-lr", "1e-3", code=2)
    moved.rename(kept), os.truncate(before, 100), os.truncate(last, 100)
    assert "holds a run" in job.call("--resume", job.path / "whole", code=2)
    assert "was begun in fp32: drop --precision" in job.resume("--precision", "fp16", code=2)
    code, _, err = run(okd.main, job.capsys, "--resume", job.folder)
    assert code == 2 and "every checkpoint in" in err and "Traceback" not in err
    (job.folder / "args.json").write_text("{oops")
    assert "not the folder of a run that can go on" in job.resume(code=2)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves_and_a_second_ends_at_once(number, code, job, monkeypatch):
    flags, then = [*LONG, "--save-every", "0"], []
    job(*flags, "--output-dir", job.path / "whole")
    with monkeypatch.context() as patch:
        send = lambda: (os.kill(os.getpid(), number), then.append(signal.getsignal(number)))
        kill_at(patch, 8, "student_loss", instead=send)
        assert f"step 8; python okd.py --resume {job.folder}" in job(*flags, code=code)
    assert then == [signal.SIG_DFL]  # whoever comes second is the system's business
    job.resume()
    assert_same_run(job.folder, job.path / "whole")


def test_up_to_ten_sigkills_at_random_moments_lose_nothing(job):
    many = [*LONG, "--max-steps", "120", "--epochs", "40", "--save-every", "2"]
    job(*many, "--output-dir", job.path / "whole")
    script = f"""
import okd, os, random, signal, time, torch
torch.set_num_threads(1)  # as here: sums depend on it
rng, kills = random.Random(5), 0
while not os.path.exists({str(job.folder / "student")!r}):
    if not (child := os.fork()):
        okd.main({job.flags(*many, "--resume", job.folder)!r})
        os._exit(0)
    if kills < 10:
        time.sleep(rng.uniform(0.4, 1.2))
        os.kill(child, signal.SIGKILL)
        kills += 1
    os.waitpid(child, 0)
print(kills)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0 and int(ended.stdout.split()[-1]) >= 1, ended.stderr[-2000:]
    assert_same_run(job.folder, job.path / "whole")


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(job, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # the system's own: writing really fails, amid a file
    with monkeypatch.context() as patch:
        kill_at(patch, 2, "save_checkpoint", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1])))
        err = job(*LONG, code=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (path,) = (job.folder / "checkpoints").iterdir()
    assert "cannot write" in err and path.name == "step-00000003.pt" and "goes on after step 3" in job.resume()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
@pytest.mark.parametrize("place", ["run_batch", "transformers.AutoModelForCausalLM.from_pretrained", "generate"])
def test_out_of_memory_is_called_what_it_is_wherever_it_comes(place, error, job, monkeypatch):
    monkeypatch.setattr(f"okd.{place}", lambda *_, **__: (_ for _ in ()).throw(error))
    err = job(*LONG, code=2)
    assert re.search("out of memory: lower --micro-batch-tokens.*--sample-batch-size", err) and "cannot load" not in err


@pytest.mark.parametrize("more", ["", "--shard --teacher-sft-epochs 1", "--batch-size 5"])
def test_two_processes_give_the_losses_and_weights_of_one_and_refuse_a_batch_that_they_cannot_share(more, job):
    job.family, one = "llama", job.path / "one"
    flags = [*LONG, *"--max-steps 6 --lr 1e-3 --save-every 4 --anchor 0.1".split(), *more.split()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", ROOT / "okd.py"]
    both = subprocess.run([*command, *job.flags(*flags)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    if "--batch-size" in more:
        assert both.returncode != 0 and "--batch-size 5 is no multiple of the 2 processes" in both.stderr
        return
    assert both.returncode == 0 and both.stdout.count("run: ") == 1 and "on 2 x cpu" in both.stdout, both.stderr[-3000:]
    job(*(flag for flag in flags if flag != "--shard"), "--output-dir", one, "--cache-dir", job.path / "other")
    for file in ("student/model.safetensors", "teacher_lora/adapter_model.safetensors"):
        assert_all_close(weights_of(job.folder, file), weights_of(one, file), atol=1e-5, rtol=1e-3)
    for ours, theirs in zip(timeless(job.folder), timeless(one), strict=True):
        assert ours.pop("phase") == theirs.pop("phase") and ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_fuzzed_rows_are_read_or_refused_in_one_line(tokenizer):
    rng, outcomes, args = random.Random(1), Counter(), tiny_args()
    junk = [None, True, -1, 1e400, "", " ", "\u0000", "x" * 300, "\ud800", [], [""], ["a", 1], {}, {"content": 1},
            "</s>", [{"role": "assistant", "content": "a"}] * 2, [{"role": "user"}], "<extra_id_0>"]  # fmt: skip
    wild = (b"\n", b'"', b"{", b"\xef\xbb\xbf", b"\\u", b"[" * 2000)
    names = ["instruction", "input", "context", "output", "prompt", "response", "messages", "text"]
    whole = "".join(json.dumps(row) + "\n" for row in okd.demo_rows(3, seed=1)).encode()
    for _ in range(2000):  # files: bytes flipped, cut, doubled; fields of every type
        if rng.random() < 0.5:
            content = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at, noise = rng.randrange(len(content) + 1), rng.randbytes(rng.randrange(5))
                content[at : at + rng.randrange(4)] = rng.choice((noise, *wild))
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


def test_fuzzed_flags_end_in_a_run_or_in_one_line(job, tmp_path):
    rng, codes = random.Random(2), Counter()
    fixed = """teacher student data output_dir cache_dir resume track device max_steps epochs rollouts max_new_tokens
        score_rows eval_rows eval_every sample_batch_size""".split()  # fmt: skip
    names = [field.name for field in dataclasses.fields(okd.Args) if field.name not in fixed]
    values = ["0", "1", "2", "-1", "1e9", "nan", "inf", "-inf", "0.5", "1e-300", "", "x", "None", "True", "9" * 20,
              "jsd", "student", "../x", "\u2603"]  # fmt: skip
    for number in range(70):
        job.path, few = tmp_path / str(number), ["--max-steps", "1", "--eval-rows", "2", "--score-rows", "1", *NO_SFT]
        drawn = [("--" + name.replace("_", "-"), rng.choice(values)) for name in rng.sample(names, rng.randrange(1, 3))]
        code, _, err = run(okd.main, job.capsys, *job.flags(*sum(drawn, ()), *few))
        codes[code] += 1
        assert code in (0, 2) and "Traceback" not in err, (drawn, err)
        assert (code == 0 or not (job.path / "run" / "student").exists()) and not list(job.path.rglob("*.tmp-*"))
    assert codes[0] > 5 and codes[2] > 20


# eval.py --------------------------------------------------------------------------------------------------------------


def test_eval_reproduces_a_rouge_l_computed_by_hand(job, tokenizer, monkeypatch):
    rows = [("a", "the cat was sat on", "the cat sat"), ("b", ["x", "one two"], "one two"), ("c", "y", "")]
    data, checkpoint = job.path / "set.jsonl", job.folders / "gpt2" / "student"
    data.write_text("".join(json.dumps(dict(prompt=prompt, response=gold)) + "\n" for prompt, gold, _ in rows))
    answers = {tokenizer(prompt).input_ids[0]: tokenizer(text).input_ids for prompt, _, text in rows}
    monkeypatch.setattr(okd, "generate", lambda model, _, prompts, *rest, **more: [answers[ids[0]] for ids in prompts])
    out = job.eval(checkpoint, "--data", data, "--greedy")
    (result,) = json.loads((checkpoint / "results.json").read_text())
    assert result["rouge_l"] == pytest.approx((75 + 100 + 0) / 3)
    assert (result["rows"], result["empty_outputs"], result["cut_prompts"]) == (3, 1, 0)
    greedy = dict(decoding="greedy", no_repeat_ngram_size=0, max_new_tokens=256, max_prompt_length=256)
    assert result["protocol"] == greedy and "58.33" in out and "decoding greedy" in out


def test_the_protocol_its_presets_its_six_gram_ban_and_long_prompts_that_lose_all_but_bos(tokenizer, monkeypatch):
    make = lambda **flags: okd_eval.protocol_of(okd_eval.Args(("x",), **flags))
    paper = dict(decoding="sampling", temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6, max_new_tokens=256,
                 max_prompt_length=256)  # fmt: skip
    assert make() == make(paper=True) == (paper, [10, 20, 30, 40, 50])
    assert make(greedy=True)[0]["no_repeat_ngram_size"] == 0 and make(greedy=True)[1] == [None]
    assert make(greedy=True, no_repeat_ngram_size=6)[0]["no_repeat_ngram_size"] == 6
    model, prompt = tiny("gpt2", 5), tokenizer("abc abc abc abc abc abc", add_special_tokens=False).input_ids
    (free,) = okd.generate(model, tokenizer, [prompt], CPU, 120)
    (ids,) = okd.generate(model, tokenizer, [prompt], CPU, 120, no_repeat_ngram_size=6)
    grams = lambda ids: [tuple(ids[i : i + 6]) for i in range(len(ids) - 5)]
    new = grams(prompt + ids)[len(prompt) - 5 :]
    assert len(set(new)) == len(new) and not set(new) & set(grams(prompt))  # the ban holds over prompt and answer
    assert len(set(grams(free))) < len(grams(free))  # without it this model does repeat itself
    lines = ['{"prompt": "abcdef", "response": "x"}', "", '{"prompt": "ab", "response": ["y", "z"]}']
    for bos, kept in ((None, "cdef"), (ord("a") + 3, "adef")):
        monkeypatch.setattr(type(tokenizer), "bos_token_id", bos, raising=False)
        examples, cut = okd_eval.examples_of(lines, tokenizer, "s", 4)
        assert [tokenizer.decode(e.prompt_ids) for e in examples] == [kept, "ab"] and cut == 1
        assert [(e.references, e.response_ids) for e in examples] == [(["x"], [123, 1]), (["y", "z"], [124, 1])]


def test_results_lie_beside_the_checkpoint_and_a_broken_evaluation_goes_on(job, tokenizer, monkeypatch):
    run_folder, folder = job.path / "runs" / "a", job.path / "model"
    (run_folder / "student").mkdir(parents=True), folder.mkdir(), (run_folder / "args.json").write_text("{}")
    where = lambda name: okd_eval.locate(str(name), okd_eval.Args(()))[1:]
    assert where(run_folder) == where(run_folder / "student") == (run_folder, run_folder)
    assert where(folder) == (None, folder) and where("org/name") == (None, pathlib.Path("results/org/name"))
    tiny("gpt2", 7).save_pretrained(folder), tokenizer.save_pretrained(folder)
    flags = [folder, "--data", job.jsonl, *"--limit 10 --max-new-tokens 5 --sample-batch-size 4 --seeds 1 2 1".split()]
    results, calls, original, score = folder / "results.json", [], okd.generate, functools.partial(job.eval, *flags)
    monkeypatch.setattr(okd, "rouge_l", lambda text, references: float(len(text)))  # what a tiny model writes scores 0
    score()
    (first,) = json.loads(results.read_text())
    mean = sum(first["scores"]) / 3
    assert first["scores"][0] == first["scores"][2] != first["scores"][1] and first["rouge_l"] == pytest.approx(mean)
    assert first["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in first["scores"]) / 2))
    path = folder / "generations" / first["generations"][0]
    lines = path.read_text().splitlines(True)
    monkeypatch.setattr(okd, "generate", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    os.utime(folder / "model.safetensors", (0, 0))  # times do not count
    assert score() and not calls
    path.write_text("".join(lines[:4]) + lines[4][:20]), results.unlink()  # killed while it wrote the second batch
    assert score() and sum(calls) == 6 and path.read_text() == "".join(lines)  # not the four rows that were whole
    assert json.loads(results.read_text())[0]["scores"] == first["scores"]
    tiny("gpt2", 8).save_pretrained(folder)  # other weights of the same shapes
    assert score() and sum(calls) == 26 and len(json.loads(results.read_text())) == 2


def test_token_metrics_against_numbers_by_hand():
    of = lambda *rows: okd_eval.token_metrics(*(row.log() for row in rows), torch.tensor([1]))
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    found, std = of(p, q), math.log(2) * math.sqrt(2) / 3  # of -2, -1, -2 in units of log 2
    known = dict(fkl=0.25 * math.log(2), rkl=0.25 * math.log(2), tvd=0.25, teacher_entropy=1.5 * math.log(2), std=std,
                 entropy_gap=0, top5_mass=1, tail_mass=0, uncertainty=0.75)  # fmt: skip
    assert {name: found[name].item() for name in known} == pytest.approx(known)
    assert found["top1_agreement"] == 0 and found["top5_overlap"] == 1
    p, share = torch.tensor([[9.0] * 5 + [0.0] * 95]).double().softmax(-1), math.exp(9) / (5 * math.exp(9) + 95)
    found = of(p, p.flip(1))
    known = dict(top5_mass_teacher=5 * share, top5_mass=5 * share / math.exp(9), uncertainty=1 - share)
    assert {name: found[name].item() for name in known} == pytest.approx(known) and found["top5_overlap"] == 0


def test_texts_are_measured_at_the_right_tokens_of_which_the_hard_are_the_half_less_likely_to_the_teacher(examples):
    student, teacher, args = tiny(seed=1), tiny(seed=2), okd_eval.Args(("x",), micro_batch_tokens=60)
    found = okd_eval.measure_texts(student, teacher, examples[:7], args, CPU)
    for i, row in enumerate(sorted(examples[:7], key=len)):
        p, q = plain_logits(teacher, row).detach(), plain_logits(student, row).detach()
        gold = p.softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None]).squeeze(-1)
        fkl, std = okd.fkl(p.log_softmax(-1), q.log_softmax(-1)), q.std(-1, correction=0)
        got = {name: found[name][i] for name in ("fkl", "std", "uncertainty")}
        assert_all_close(got, dict(fkl=fkl, std=std, uncertainty=1 - gold), atol=1e-5, rtol=1e-4)
    means = okd_eval.summary(found)
    bins = [part["tokens"] for name, part in means.items() if name.startswith("entropy")]
    assert means["all"]["tokens"] == sum(bins) == sum(len(row.response_ids) for row in examples[:7])
    uncertainty, fkl = (torch.tensor(values).split((3, 1)) for values in ([0.1, 0.9, 0.3, 0.8], [1.0, 2.0, 3.0, 4.0]))
    found = okd_eval.summary(dict(uncertainty=uncertainty, teacher_entropy=(torch.zeros(3), torch.ones(1)), fkl=fkl))
    assert found["hard"]["fkl"] == (2 + 4) / 2 and found["easy"]["fkl"] == (1 + 3) / 2 and found["all"]["fkl"] == 2.5
    assert found["hard"]["uncertainty"] == pytest.approx(0.85) and found["hard"]["tokens"] == 2
    assert found["entropy 0 to 0.5"]["fkl"] == 2 and found["entropy 1 to 2"]["tokens"] == 1


def test_excess_error_of_known_errors_and_of_texts_of_one_rule_whatever_the_protocol(job, monkeypatch):
    own, oracle = [torch.full((12,), 2.0), torch.full((30,), 2.0)], [torch.full((25,), 1.0)]
    assert okd_eval.excess_error(own, oracle) == {"10": pytest.approx(100.0), "25": pytest.approx(100.0)}
    assert okd_eval.excess_error(own, own)["10"] == pytest.approx(0.0)
    ragged = [torch.tensor([1.0] * 5 + [3.0] * 5), torch.tensor([2.0] * 5)]  # 5 x 1.5 + 5 x 3 against 10 x 1
    assert okd_eval.excess_error(ragged, oracle) == {"10": pytest.approx(125.0)}
    assert okd_eval.excess_error(own, [torch.zeros(25)]) == {}  # a student that is its teacher
    seen, original = [], okd.generate
    monkeypatch.setattr(okd, "generate", lambda *a, **k: seen.append((a[0], a[2], k)) or original(*a, **k))
    flags = ["--data", job.jsonl, "--output-dir", job.path, "--teacher", job.folders / "gpt2" / "teacher", "--greedy"]
    job.eval(job.folders / "gpt2" / "student", *flags, *"--no-repeat-ngram-size 6 --limit 3 --max-new-tokens 7".split())
    (_, _, protocol), own, oracle = seen
    assert not protocol["sample"] and own[0] is not oracle[0] and own[1:] == oracle[1:] and "seed" in own[2]
    assert dict(sample=True, temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=0).items() <= own[2].items()


def test_intervals_on_known_cases_and_methods_that_do_not_differ_are_told_apart_in_at_most_6_percent():
    alternating, apart = torch.tensor([[(-1.0) ** i for i in range(400)]] * 2), torch.tensor([[1.0] * 50, [3.0] * 50])
    assert okd_eval.interval(torch.full((2, 20), 1.5)) == (1.5, 1.5)
    assert okd_eval.interval(alternating) == pytest.approx((-2 / 20, 2 / 20), abs=0.02)  # bootstrap: 1.96 / sqrt(400)
    assert okd_eval.interval(apart) == pytest.approx((2 - 12.706, 2 + 12.706))  # paired t: 12.706 sqrt(2) / sqrt(2)
    for seeds, shared in ((2, 0), (3, 0), (5, 0), (2, 20), (3, 20), (5, 20)):  # deviation of noise common to all seeds
        draw, trials, wrong = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0)), 1000, 0
        for _ in range(trials):
            differences = 2**0.5 * draw(seeds, 1) + 20 * draw(seeds, 400) + shared * draw(1, 400)
            low, high = okd_eval.interval(differences, draws=200)
            wrong += not low <= 0 <= high
        assert wrong / trials <= 0.06, (seeds, shared)


def made_up_run(root, method, seed, scores, **flags):
    """A run folder as okd.py leaves it, with a score per row -> what eval.py knows of it once it is scored."""
    folder, flags = root / "-".join(map(str, (method, seed, *flags.values()))), dict(method=method, seed=seed, **flags)
    (folder / "student").mkdir(parents=True), (folder / "generations").mkdir()
    lines = [{"phase": "distil", "step": 0, "dev/fkl": 2.0},
             {"phase": "distil", "step": 9, "train/tokens_per_s": 100.0, "train/peak_memory_gb": 2.5},
             {"phase": "final", "final/distil_s": 10.0 + seed, "final/sampling_s": 4.0}]  # fmt: skip
    rows = [dict(row=row, score=score) for row, score in enumerate(scores)]
    for file, content in {"args.json": [flags], "metrics.jsonl": lines, "generations/g.jsonl": rows}.items():
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in content))
    checkpoint = okd_eval.Checkpoint.__new__(okd_eval.Checkpoint)
    result = dict(data="d", rouge_l=sum(scores) / len(scores), std=None, generations=["g.jsonl"], rows=4, protocol={})
    vars(checkpoint).update(name=str(folder), folder=folder, results=[result], flags=flags)
    checkpoint.costs, checkpoint.curve = okd_eval.read_logs(checkpoint)
    return checkpoint


def test_comparison_and_figure_of_made_up_runs_and_which_flags_make_another_method(tmp_path, monkeypatch):
    made = [("fkl", 1, 10, 0.1), ("fkl", 2, 12, 0.1), ("okd", 1, 15, 0.1), ("okd", 2, 17, 0.1), ("rkl", 1, 8, 0.1),
            ("rkl", 2, 14, 0.1), ("rkl", 1, 0, 1.0), ("jsd", 3, 0, 0.1)]  # fmt: skip
    runs = [made_up_run(tmp_path, m, seed, [first + 10.0 * i for i in range(4)], lr=lr) for m, seed, first, lr in made]
    markdown, comparison = okd_eval.compare(okd_eval.Args((), data=("d",), baseline="fkl"), runs)
    assert [entry["method"] for entry in comparison] == ["fkl", "okd", "rkl", "rkl lr=1.0", "jsd"]
    fkl, moving, rkl, alone, jsd = comparison
    assert (fkl["rouge_l"], fkl["seconds"], fkl["peak_memory_gb"], rkl["difference"]) == (26, 11.5, 2.5, 0)
    assert (moving["interval"], moving["paired_seeds"], moving["difference"]) == ((5, 5), [1, 2], 5)
    assert fkl["std_training"] == pytest.approx(math.sqrt(2))
    assert moving["distinguishable"] and not rkl["distinguishable"]
    assert alone["verdict"] == "-10.00, one training seed" and alone["distinguishable"] is alone["interval"] is None
    assert jsd["verdict"] == "no training seed in common" and markdown.count("not distinguishable") == 1
    with pytest.raises(okd.UserError, match="no such method among the runs"):
        okd_eval.compare(okd_eval.Args((), baseline="gkd"), runs)
    for name, text, labels in (("eval_every", "adaptive", 2), ("eval_every", "data", 1), ("eval_rows", "adaptive", 2),
                               ("eval_rows", "data", 1), ("select", "data", 2), ("log_every", "adaptive", 1),
                               ("seed", "data", 1)):  # fmt: skip
        twins = [types.SimpleNamespace(flags=dict(method="m", seed=1, text=text) | {name: value}) for value in (1, 2)]
        assert len(okd_eval.grouped(twins)) == labels, (name, text)
    scored, figures, panels = [], [], ("std", "fkl", "top1_agreement")
    for m, s, value in (("okd", 1, 1.0), ("okd", 2, 3.0), ("fkl", 1, 5.0)):
        gold = {part: dict.fromkeys(panels, value + i) for i, part in enumerate(("all", "hard", "easy"))}
        scored.append(types.SimpleNamespace(flags=dict(method=m, seed=s), results=[dict(distribution=dict(gold=gold))]))
    monkeypatch.setattr(okd_eval.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    okd_eval.draw_analysis(scored, tmp_path)  # a bar per method, the mean of its runs
    assert [[bar.get_height() for bar in axes.patches] for axes in figures[0].axes] == 3 * [[2, 3, 4, 5, 6, 7]]


def test_a_run_and_its_adapted_teacher_are_scored_and_shown(job, monkeypatch):
    pages, out_dir, plain = [], job.path / "out", job.folder / "teacher_lora"
    page = types.SimpleNamespace(summary={}, log=pages.append, finish=lambda: None)
    begin, table = lambda **k: pages.append(k) or page, lambda *a: a
    fake = types.SimpleNamespace(init=begin, Table=table, Image=str, log=print, finish=print)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    job("--track"), pages.clear()
    flags = ["--data", job.jsonl, "--output-dir", out_dir, *"--limit 4 --greedy --max-new-tokens 12 --show 1".split()]
    out = job.eval(job.folder, plain, *flags, "--teacher", job.folders / "gpt2" / "teacher", "--track")
    (result,), (adapted,) = (json.loads((f / "results.json").read_text()) for f in (job.folder, plain))
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
    assert "| okd | 1 |" in " ".join(job.eval(job.folder, "--compare", *flags).split())
    assert {path.suffix for path in out_dir.glob("comparison.*")} == {".json", ".md", ".png"}


BAD_EVAL = [  # a file of the run and its content, flags, message
    ("args.json", "{oops", "", "args.json is damaged"), ("results.json", "{oops", "", "results.json is damaged"),
    ("metrics.jsonl", "", "--compare", "--compare needs runs that have ended: metrics.jsonl of"),
    ("student", "", "", "is a run without a student"), ("rows.jsonl", "{oops", "", "rows.jsonl, line 1 needs"),
    ("rows.jsonl", "\n", "", "no rows"), ("rows.jsonl", '{"prompt": "", "response": "x"}', "", "the prompt is empty"),
    ("", "", "--data nowhere", "no data set or file nowhere"), ("", "", "--greedy --paper", "two protocols"),
    ("", "", "--greedy --seeds 1", "--seeds change nothing"), ("", "", "--top-p 1.5", "--top-p is 1.5"),
    ("", "", "--limit 0", "--limit is 0: it must lie in [1, 1e+09]"), ("", "", "--teacher ./no/one", "no/one"),
    ("", "", "--temperature 0", "--temperature is 0.0"),
]  # fmt: skip


@pytest.mark.parametrize("file, content, flags, message", BAD_EVAL)
def test_what_eval_refuses_is_one_line_and_exit_2(file, content, flags, message, job):
    folder = made_up_run(job.path, "fkl", 1, [1.0]).folder
    (folder / "student").rmdir(), (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}')
    if file != "student":
        (folder / "student").symlink_to(job.folders / "gpt2" / "student")
        (folder / (file or "unread")).write_text(content)
    assert message in job.eval(folder, "--data", folder / "rows.jsonl", *flags.split(), code=2)
