"""Tests of okd.py and eval.py: closed forms, golden numbers, a second way of computing it; values and gradients.

    pytest                # tiny models from configs, no downloads, no GPU
"""

import dataclasses
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
import time
from collections import Counter

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import safetensors.torch
import torch
import transformers

import eval as okd_eval
import okd

ROOT = pathlib.Path(__file__).parent
CPU = okd.Hardware(torch.device("cpu"), torch.float32)
torch.set_num_threads(2)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # between peft and transformers

# ---------------------------------------------------------------------------------------------------------------------
# Tiny models and data
# ---------------------------------------------------------------------------------------------------------------------

LLAMA_SHAPE = dict(vocab_size=384, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                   intermediate_size=48, max_position_embeddings=256, bos_token_id=1, eos_token_id=1, pad_token_id=0)  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=1),
    "llama": transformers.LlamaConfig(**LLAMA_SHAPE),
    "opt": transformers.OPTConfig(vocab_size=384, hidden_size=32, num_hidden_layers=4, ffn_dim=48, num_attention_heads=4,
                                  word_embed_proj_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=1, pad_token_id=0),
    "gemma2": transformers.Gemma2Config(**LLAMA_SHAPE, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": transformers.CohereConfig(**LLAMA_SHAPE, logit_scale=0.25),
    "qwen3": transformers.Qwen3Config(**LLAMA_SHAPE, head_dim=8),
}  # fmt: skip


NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def tiny(family="gpt2", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family].__class__(**{**CONFIGS[family].to_dict(), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # a fresh head is nearly uniform: spread it, so that a wrong number shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_args(**changes):
    return okd.resolve(okd.Args(**{**dict(batch_size=4, epochs=1, eval_rows=8, score_rows=2, log_every=1, lora_rank=4, max_new_tokens=6, rollouts=8), **changes}))


@pytest.fixture(scope="session")
def tokenizer():
    return okd.load_tokenizer("demo", okd.Args())


@pytest.fixture(scope="session")
def examples(tokenizer):
    return okd.encode(list(enumerate(okd.demo_rows(40, seed=1), 1)), tokenizer, tiny_args(), "demo")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Tiny teacher and student of three families, as local Hugging Face folders."""
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama", "opt"):
        for role, seed in (("teacher", 1), ("student", 2)):
            tiny(family, seed).save_pretrained(root / family / role)
            tokenizer.save_pretrained(root / family / role)
    return root


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in okd.demo_rows(40, seed=1)))
    return path


def random_logits(*shape, seed=0, dtype=torch.float64, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def silent_report(phase, step, metrics, bar=None):
    pass


def train_tiny(args, student, teacher, examples, tokenizer, steps=2, vocab=384, report=silent_report, hw=CPU, dev=None):
    data = dict(train=examples, dev=dev or [])
    return okd.train(args, "distil", student, teacher, data, tokenizer, vocab, hw, report, args.lr, steps, args.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Divergences
# ---------------------------------------------------------------------------------------------------------------------

Z_Q = torch.tensor([[1, 2, 0.5, -1, 0], [0.2, -0.3, 1.5, 0.7, -2], [3, 0, -1, 0.5, 0.25], [0, 1, 2, 3, 4]], dtype=torch.float64)
Z_P = torch.tensor([[0.5, 1.5, 2, -0.5, -3], [-1, 0.4, 2.2, 0.1, 0.3], [-2, 1, 0.8, 0.6, 0], [4, 3, 2, 1, 0]], dtype=torch.float64)
LABELS, MASK = torch.tensor([2, 2, 1, 0]), torch.tensor([True, True, True, False])

GOLDEN_MEANS = [
    ("fkl", {}, 0.881736), ("rkl", {}, 1.235699), ("jsd", {"beta": 0.1}, 0.074367), ("jsd", {"beta": 0.5}, 0.198544),
    ("jsd", {"beta": 0.9}, 0.088625), ("tvd", {}, 0.494317), ("frkl", {}, (0.881736 + 1.235699) / 2),
    ("sfkl", {"skew": 0.1}, 0.639753), ("srkl", {"skew": 0.1}, 0.693332), ("akl", {"mu": 0.5}, 1.111744),
    ("ab", {"alpha": 0.2, "beta": 0.7}, 1.216299), ("ab", {"alpha": 0.5, "beta": 0.5}, 0.896927),
    ("taid", {"t": 0.4}, 1.531312), ("taid", {"t": 1.0}, 2.064631),
]  # fmt: skip
GOLDEN_TOKENS = [
    ("fkl", {}, [0.499399, 0.262005, 1.883805]), ("rkl", {}, [0.488304, 0.289318, 2.929474]),
    ("tvd", {}, [0.410373, 0.266062, 0.806517]), ("sfkl", {}, [0.374244, 0.202914, 1.342102]),
    ("srkl", {}, [0.355842, 0.216055, 1.508100]), ("akl", {}, [None, None, 2.560219]),
]  # fmt: skip
EVERY = [(name, {"t": 0.6} if name == "taid" else {}) for name in okd.DIVERGENCES]
every_divergence = pytest.mark.parametrize("name, parameters", EVERY, ids=[name for name, _ in EVERY])


def divergence(name, parameters):
    return lambda p, q: okd.DIVERGENCES[name][0](p, q, **parameters)


@pytest.mark.parametrize("name, parameters, golden", GOLDEN_MEANS)
def test_golden_mean_over_the_mask(name, parameters, golden):
    value = divergence(name, parameters)(Z_P[MASK], Z_Q[MASK]).mean()
    assert value.item() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("name, parameters, golden", GOLDEN_TOKENS)
def test_golden_tokens(name, parameters, golden):
    values = divergence(name, parameters)(Z_P[MASK], Z_Q[MASK]).tolist()
    assert all(expected is None or value == pytest.approx(expected, abs=1e-6) for value, expected in zip(values, golden))


def test_golden_cross_entropy():
    values = okd.cross_entropy(Z_Q[MASK], LABELS[MASK])
    assert values.tolist() == pytest.approx([2.074438, 0.650948, 3.194016], abs=1e-6)


def test_fkl_and_rkl_are_those_of_torch_distributions():
    p, q = (torch.distributions.Categorical(logits=z) for z in (Z_P, Z_Q))
    torch.testing.assert_close(okd.fkl(Z_P, Z_Q), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(okd.rkl(Z_P, Z_Q), torch.distributions.kl_divergence(q, p))


@every_divergence
def test_zero_gradient_and_zero_value_where_the_student_is_the_teacher(name, parameters):
    q = Z_P.clone().requires_grad_()
    value = divergence(name, parameters)(Z_P, q)
    entropy = torch.distributions.Categorical(logits=Z_P).entropy()
    torch.testing.assert_close(value.detach(), entropy if name == "taid" else torch.zeros(4, dtype=torch.float64))
    if name != "tvd":  # |x| has no gradient at 0; autograd's choice is 0 there too
        (gradient,) = torch.autograd.grad(value.sum(), q)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@every_divergence
def test_positive_elsewhere_and_blind_to_a_constant_on_all_logits(name, parameters):
    p, q = random_logits(50, 11, seed=1), random_logits(50, 11, seed=2)
    function = divergence(name, parameters)
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
def test_student_gradient_against_finite_differences(name, parameters):
    p, q = random_logits(3, 6, seed=3), random_logits(3, 6, seed=4).requires_grad_()
    function = divergence(name, parameters)
    if name == "akl":  # its weights are constants, so the truth is the weighted sum with the weights held
        share = ((okd.akl(p, q) - okd.rkl(p, q)) / (okd.fkl(p, q) - okd.rkl(p, q))).detach()
        function = lambda p, q: share * okd.fkl(p, q) + (1 - share) * okd.rkl(p, q)  # noqa: E731
        (mine,), (truth,) = (torch.autograd.grad(f(p, q).sum(), q) for f in (okd.akl, function))
        torch.testing.assert_close(mine, truth)
    if name == "taid":  # so is its target
        target = ((1 - 0.6) * q.detach() + 0.6 * p).softmax(-1)
        function = lambda p, q: -(target * q.log_softmax(-1)).sum(-1)  # noqa: E731
        (mine,), (truth,) = (torch.autograd.grad(f(p, q).sum(), q) for f in (divergence(name, parameters), function))
        torch.testing.assert_close(mine, truth)
    assert torch.autograd.gradcheck(lambda q: function(p, q), q)


def test_gradient_of_fkl_is_q_minus_p_and_to_the_teacher_it_keeps_the_entropy():
    p, q = Z_P.clone().requires_grad_(), Z_Q.clone().requires_grad_()
    value = okd.fkl(p, q)
    to_p, to_q = torch.autograd.grad(value.sum(), (p, q))
    torch.testing.assert_close(to_q, (q.softmax(-1) - p.softmax(-1)).detach())
    gap = p.log_softmax(-1) - q.log_softmax(-1)
    torch.testing.assert_close(to_p, (p.softmax(-1) * (gap - value[:, None])).detach())


def test_gradient_of_rkl():
    q = Z_Q.clone().requires_grad_()
    value = okd.rkl(Z_P, q)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    gap = q.log_softmax(-1) - Z_P.log_softmax(-1)
    torch.testing.assert_close(gradient, (q.softmax(-1) * (gap - value[:, None])).detach())


def test_jsd_is_symmetric_at_a_half_below_log_2_and_tends_to_fkl():
    torch.testing.assert_close(okd.jsd(Z_P, Z_Q, 0.5), okd.jsd(Z_Q, Z_P, 0.5))
    torch.testing.assert_close(okd.jsd(Z_P, Z_Q, 0.3), okd.jsd(Z_Q, Z_P, 0.7))
    far = torch.eye(4, dtype=torch.float64) * 100
    assert (okd.jsd(far, far.flip(0), 0.5) <= math.log(2)).all()
    torch.testing.assert_close(okd.jsd(Z_P, Z_Q, 1e-6) / 1e-6, okd.fkl(Z_P, Z_Q), rtol=1e-4, atol=0)
    torch.testing.assert_close(okd.jsd(Z_P, Z_Q, 0), okd.fkl(Z_P, Z_Q))
    torch.testing.assert_close(okd.jsd(Z_P, Z_Q, 1), okd.rkl(Z_P, Z_Q))


def test_skewed_kls_against_mixtures_of_probabilities():
    p, q = Z_P.softmax(-1), Z_Q.softmax(-1)
    m = 0.3 * p + 0.7 * q
    torch.testing.assert_close(okd.sfkl(Z_P, Z_Q, 0.3), (p * (p / m).log()).sum(-1))
    m = 0.7 * p + 0.3 * q
    torch.testing.assert_close(okd.srkl(Z_P, Z_Q, 0.3), (q * (q / m).log()).sum(-1))
    torch.testing.assert_close(okd.sfkl(Z_P, Z_Q, 0), okd.fkl(Z_P, Z_Q))


def test_ab_has_fkl_and_rkl_as_limits_and_its_closed_forms_are_limits():
    torch.testing.assert_close(okd.ab(Z_P, Z_Q, 1, 0), okd.fkl(Z_P, Z_Q))
    torch.testing.assert_close(okd.ab(Z_P, Z_Q, 0, 1), okd.rkl(Z_P, Z_Q))
    for alpha, beta in ((0.6, 0), (0, 0.6)):
        near = okd.ab(Z_P, Z_Q, alpha or 1e-7, beta or 1e-7)
        torch.testing.assert_close(okd.ab(Z_P, Z_Q, alpha, beta), near, rtol=1e-5, atol=0)


def test_akl_puts_the_token_that_crosses_mu_into_the_head():
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64), torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    head, tail = abs(0.4 - 0.1) + abs(0.3 - 0.2), abs(0.2 - 0.3) + abs(0.1 - 0.4)  # mu = 0.5: 0.4 < 0.5 <= 0.7
    by_hand = (head * okd.fkl(p.log(), q.log()) + tail * okd.rkl(p.log(), q.log())) / (head + tail)
    torch.testing.assert_close(okd.akl(p.log(), q.log(), mu=0.5), by_hand)


def test_temperature_softens_both_sides_and_keeps_the_gradients_size():
    q = Z_Q.clone().requires_grad_()
    value = okd.softened(okd.fkl, Z_P, q, 2.0)
    torch.testing.assert_close(value.detach(), 4 * okd.fkl(Z_P / 2, Z_Q / 2))
    (gradient,) = torch.autograd.grad(value.sum(), q)
    torch.testing.assert_close(gradient, 2 * ((Z_Q / 2).softmax(-1) - (Z_P / 2).softmax(-1)))


def test_taid_step_against_the_rule_written_out():
    state = dict(t=torch.tensor(0.4), momentum=torch.tensor(0.0), loss=torch.tensor(math.inf))
    losses, t, momentum, previous = [3.0, 2.5, 2.6, 1.0], 0.4, 0.0, None
    for i, loss in enumerate(losses):
        okd.taid_step(state, torch.tensor(loss), progress=i / 10, start=0.4)
        change = 0.0 if previous is None else (previous - loss) / (previous + 1e-15)
        momentum = 0.99 * momentum + 0.01 * change
        delta = 5e-4 / (1 + math.exp(-momentum)) * (1 - t)
        t, previous = min(1.0, max(0.4 + 0.6 * i / 10, t + delta)), loss
        assert state["t"].item() == pytest.approx(t, abs=1e-6)
    assert t > 0.4 + 0.6 * 3 / 10 - 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# The two losses of OKD
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam, anchor", [(0.5, 0.0), (0.0, 0.0), (2.0, 0.7)])
def test_the_teachers_gradient_pulls_it_to_the_mixture_of_gold_student_and_start(lam, anchor):
    p, q, p0 = random_logits(5, 7, seed=1).requires_grad_(), random_logits(5, 7, seed=2), random_logits(5, 7, seed=3)
    labels = torch.tensor([0, 1, 2, 3, 4])
    loss = okd.teacher_loss(p, q, p0, labels, 1.0, lam, anchor, "qp", 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), p)
    gold = torch.nn.functional.one_hot(labels, 7).double()
    mixture = (gold + lam * q.softmax(-1) + anchor * p0.softmax(-1)) / (1 + lam + anchor)
    torch.testing.assert_close(gradient, (1 + lam + anchor) * (p.softmax(-1) - mixture).detach())


def test_teacher_kl_directions():
    labels = LABELS
    qp, pq = (okd.teacher_loss(Z_P, Z_Q, Z_P, labels, 0.0, 2.0, 0.0, way, 1.0) for way in ("qp", "pq"))
    torch.testing.assert_close(qp, 2 * okd.rkl(Z_P, Z_Q))  # rkl(p, q) = KL(q || p)
    torch.testing.assert_close(pq, 2 * okd.fkl(Z_P, Z_Q))


def test_neither_loss_reaches_into_the_other_network():
    p, q, p0 = (z.clone().requires_grad_() for z in (Z_P, Z_Q, Z_P))
    loss = okd.student_loss(p, q, LABELS, okd.fkl, 0.5).sum()
    assert torch.autograd.grad(loss, (p, p0), allow_unused=True) == (None, None)
    loss = okd.teacher_loss(p, q, p0, LABELS, 1.0, 1.0, 1.0, "qp", 1.0).sum()
    assert torch.autograd.grad(loss, (q, p0), allow_unused=True) == (None, None)


def test_student_loss_weighs_divergence_and_gold_text():
    value = okd.student_loss(Z_P, Z_Q, LABELS, okd.rkl, 0.3)
    torch.testing.assert_close(value, 0.7 * okd.rkl(Z_P, Z_Q) + 0.3 * okd.cross_entropy(Z_Q, LABELS))


def test_lam_schedules():
    assert [okd.lam_at(x, 2.0, "rise") for x in (0, 0.5, 1)] == [0, 1, 2]
    assert [okd.lam_at(x, 2.0, "fall") for x in (0, 0.5, 1)] == [2, 1, 0]
    assert okd.lam_at(0.3, 2.0, "constant") == 2


def test_measure_against_torch_distributions():
    p0, p, q = (random_logits(6, 9, seed=s) for s in (1, 2, 3))
    labels = torch.arange(6)
    sums = okd.measure(p0, p, q, labels)
    d0, dp, dq = (torch.distributions.Categorical(logits=z) for z in (p0, p, q))
    kl = torch.distributions.kl_divergence
    expected = dict(fkl=kl(d0, dq), rkl=kl(dq, d0), student_ce=-dq.log_prob(labels), teacher_ce=-dp.log_prob(labels),
                    student_entropy=dq.entropy(), teacher_entropy=dp.entropy(), drift=kl(d0, dp),
                    top1_agreement=(p0.argmax(-1) == q.argmax(-1)).float())  # fmt: skip
    assert sums.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(sums[name], expected[name].sum(), msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def example(prompt, response):
    return okd.Example("", [""], prompt, response)


def test_labels_are_the_next_tokens_and_eos_counts_even_where_pad_is_eos():
    eos = 7
    batch = okd.collate([example([1, 2, 3], [4, 5, eos]), example([1], [6, eos])], pad_id=eos)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, eos], [1, 6, eos, eos, eos, eos]]
    assert batch.mask.tolist() == [[False, False, True, True, True, False], [True, True, False, False, False, False]]
    assert batch.labels.tolist() == [4, 5, eos, 6, eos]  # both EOS targets, none of the padding
    assert batch.positions.tolist() == [2, 3, 4, 6, 7]


def test_encode_drops_what_cannot_be_trained_on_and_counts_it(tokenizer, capsys):
    args = tiny_args(max_length=12, max_prompt_length=8)
    rows = [("ok", "yes"), ("x" * 9, "long prompt"), ("empty", ""), ("cut", "y" * 30)]
    rows = [(i, dict(prompt=p, response=r)) for i, (p, r) in enumerate(rows)]
    kept = okd.encode(rows, tokenizer, args, "here")
    assert [e.prompt for e in kept] == ["ok", "cut"]
    assert kept[0].response_ids[-1] == tokenizer.eos_token_id
    assert len(kept[1]) == 12 and tokenizer.eos_token_id not in kept[1].response_ids  # cut: no false end
    assert "kept 2 of 4 rows, dropped 1 with a prompt over 8 tokens, 1 with an empty response" in capsys.readouterr().out


def test_prompt_and_response_are_tokenised_apart(tokenizer):
    class Merging:  # a tokenizer that merges "ab" wherever it sees it
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return transformers.BatchEncoding(dict(input_ids=[99 if part == "ab" else ord(part) for part in re.findall("ab|.", text)]))

    (kept,) = okd.encode([(1, dict(prompt="a", response="b"))], Merging(), tiny_args(), "x")
    assert kept.prompt_ids == [ord("a")] and kept.response_ids == [ord("b"), 0]


def test_template_is_alpacas():
    assert okd.alpaca_prompt("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert okd.alpaca_prompt("Sum.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_row_formats(tokenizer):
    assert okd.render(dict(prompt="p", response="r"), tokenizer) == ("p", ["r"], False)
    assert okd.render(dict(instruction="i", input="", output=["a", "b"], prompt="x"), tokenizer)[:2] == (okd.alpaca_prompt("i"), ["a", "b"])
    chat = okd.load_tokenizer("demo", okd.Args())
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    messages = [dict(role="user", content="hi"), dict(role="assistant", content="yo")]
    assert okd.render(dict(messages=messages), chat) == ("<user>hi<assistant>", ["yo"], True)


def test_template_equals_the_prompt_that_the_hubs_rows_carry(tokenizer):
    folder = ROOT.parent / "shared" / "data" / "raw_format"
    if not folder.exists():
        pytest.skip("the samples in the hub's own format are not here")
    rows = [row for path in sorted(folder.glob("*.jsonl")) for _, row in okd.read_jsonl(path)]
    carried = [row for row in rows if "prompt" in row and "### Response:" in row["prompt"]]
    assert carried
    for row in carried:
        assert okd.render(row, tokenizer)[0].strip() == row["prompt"].strip()


def test_demo_rows_are_seeded_and_share_no_prompt():
    rows = okd.demo_rows(1000, seed=0)
    assert rows == okd.demo_rows(1000, seed=0) and rows != okd.demo_rows(1000, seed=1)
    assert len({row["prompt"] for row in rows}) == 1000
    assert all(1 < len(set(row["response"])) == len(row["response"]) for row in rows)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_seed_and_epoch():
    lengths = [(7 * i) % 31 for i in range(100)]
    epoch = lambda seed, number: [okd.batch_indices(lengths, 10, seed, number * 10 + i) for i in range(10)]  # noqa: E731
    assert sorted(sum(epoch(1, 0), [])) == list(range(100))
    assert epoch(1, 0) == epoch(1, 0) and epoch(1, 0) != epoch(1, 1) and epoch(1, 0) != epoch(2, 0)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch(1, 0)]
    assert max(spread) <= 5  # rows of like length stand together


# ---------------------------------------------------------------------------------------------------------------------
# Trunk, head and chunks against the plain way
# ---------------------------------------------------------------------------------------------------------------------


def plain_logits(model, batch, vocab=None):
    """Logits of everything, with an attention mask, then the rows that predict a response token."""
    lengths = batch.mask.size(1) - batch.mask.flip(1).float().argmax(1)  # the last predicting position + 1
    attention = torch.arange(batch.mask.size(1))[None] <= lengths[:, None]
    logits = model(input_ids=batch.input_ids, attention_mask=attention.long()).logits
    return logits[batch.mask].float() if logits.dtype != torch.float64 else logits[batch.mask]


@pytest.fixture
def float64_head(monkeypatch):
    """`head` ends in float32; for comparisons to 1e-10 let float64 through."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else self.to(torch.float32))


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_trunk_and_head_are_the_models_logits(family, with_lora, examples, float64_head):
    model = tiny(family, dtype=torch.float64)
    if with_lora:
        model = okd.add_online_module(model, tiny_args(lora_top_layers=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    batch = okd.collate(examples[:5], 0)
    fast = okd.head(model, okd.hidden_states(model, batch), 384)
    torch.testing.assert_close(fast, plain_logits(model, batch), atol=1e-10, rtol=1e-8)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("name", okd.DIVERGENCES)
def test_chunks_give_the_plain_losses_and_gradients_of_both_networks(family, name, examples, float64_head, monkeypatch):
    args = tiny_args(divergence=name, anchor=0.3, student_ce_weight=0.2)
    state = dict(t=torch.tensor(0.6, dtype=torch.float64))
    divergence = okd.bind_divergence(args, state)
    batch, student = okd.collate(examples[:5], 0), tiny(family, 1, torch.float64)
    teacher = okd.add_online_module(tiny(family, 2, torch.float64).requires_grad_(False), args)
    for key, parameter in teacher.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)

    def losses(p0, p, q, labels, rollout=None):
        return dict(student_loss=okd.student_loss(p, q, labels, divergence, 0.2),
                    teacher_loss=okd.teacher_loss(p, q, p0, labels, 1.0, 0.5, 0.3, "qp", 1.0))  # fmt: skip

    p, q = plain_logits(teacher, batch), plain_logits(student, batch)
    with torch.no_grad(), teacher.disable_adapter():
        p0 = plain_logits(teacher, batch)
    plain = losses(p0, p, q, batch.labels)
    (plain["student_loss"].sum() + plain["teacher_loss"].sum()).backward()
    expected = gradients(student), gradients(teacher)
    student.zero_grad(), teacher.zero_grad()

    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)  # seven tokens a chunk
    sums = okd.run_batch(student, teacher, batch, 384, CPU, losses, lambda total: total.backward(), True, True)
    for key in plain:
        torch.testing.assert_close(sums[key], plain[key].sum().detach(), atol=1e-10, rtol=1e-8)
    for got, want in zip((gradients(student), gradients(teacher)), expected):
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-10, rtol=1e-7, msg=key)


def test_in_bfloat16_chunks_give_the_plain_losses_to_its_rounding(examples, monkeypatch):
    hw, batch = okd.Hardware(torch.device("cpu"), torch.bfloat16), okd.collate(examples[:5], 0)
    student, teacher = tiny(seed=1), tiny(seed=2, dtype=torch.bfloat16)
    losses = lambda p0, p, q, labels, rollout: dict(loss=okd.fkl(p, q))  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        p, q = plain_logits(teacher, batch), plain_logits(student, batch)
    plain = okd.fkl(p.detach(), q).sum()
    plain.backward()
    expected = gradients(student)
    student.zero_grad()
    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", 384 * 7)
    sums = okd.run_batch(student, teacher, batch, 384, hw, losses, lambda total: total.backward())
    torch.testing.assert_close(sums["loss"], plain.detach(), rtol=1e-2, atol=0)
    for name, gradient in gradients(student).items():
        assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_gelu_is_gpt2s(dtype):
    model = tiny("gpt2", dtype=dtype)
    ids = torch.arange(40)[None]
    plain, fused = model(ids).logits, okd.fuse_gelu(model)(ids).logits
    assert any(isinstance(module, torch.nn.GELU) for module in model.modules())
    torch.testing.assert_close(fused, plain, atol={torch.float32: 1e-6, torch.float64: 1e-13}[dtype], rtol=1e-6)
    assert model.config.activation_function == "gelu_new"  # what is saved is still GPT-2


def test_a_single_token_response_is_one_position(examples, float64_head):
    model, row = tiny(dtype=torch.float64), okd.with_response(examples[0], [1], 96)
    batch = okd.collate([row, examples[1]], 1)
    assert len(batch.labels) == 1 + len(examples[1].response_ids)
    torch.testing.assert_close(okd.head(model, okd.hidden_states(model, batch), 384), plain_logits(model, batch), atol=1e-10, rtol=1e-8)


def test_micro_batches_hold_to_tokens_and_rows_and_lose_none(examples):
    args = tiny_args(micro_batch_tokens=100, micro_batch_size=3)
    pieces = okd.micro_batches(examples, args)
    assert sorted(id(row) for piece in pieces for row in piece) == sorted(map(id, examples))
    assert all(len(piece) <= 3 and len(piece) * max(map(len, piece)) <= 100 for piece in pieces)
    assert okd.micro_batches([], args) == []
    assert [len(piece) for piece in okd.micro_batches(examples[:3], tiny_args(micro_batch_tokens=1))] == [1, 1, 1]


def test_no_tensor_holds_more_logits_than_a_chunk(examples, monkeypatch):
    """The largest live (..., V) tensor, counted and not timed: not the whole batch's, in either network, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocab, rows, seen = 1000, 5, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.shape[-1:] == (vocab,) and value.shape != (32, vocab):  # the head's weight
                    seen.append(value.numel())
            return result

    monkeypatch.setattr(okd, "CHUNK_ELEMENTS", vocab * rows)
    args, batch = tiny_args(), okd.collate(examples[:4], 0)
    student = tiny(seed=1, vocab_size=vocab, **NO_DROPOUT)
    teacher = okd.add_online_module(tiny(seed=2, vocab_size=vocab).requires_grad_(False), args)

    def losses(p0, p, q, labels, rollout):
        return dict(student_loss=okd.jsd(p.detach(), q), teacher_loss=okd.teacher_loss(p, q, p0, labels, 1.0, 0.5, 0.3, "qp", 1.0))

    with Watch():
        okd.run_batch(student, teacher, batch, vocab, CPU, losses, lambda total: total.backward(), True, True, True)
    assert len(batch.labels) > 4 * rows and max(seen) == vocab * rows


def test_gradient_checkpointing_changes_no_gradient(examples):
    """Also the moving teacher's, which has to be in train mode for it: its dropout is 0."""
    found = []
    for recompute in (False, True):
        args = tiny_args()
        student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2, **NO_DROPOUT).requires_grad_(False)
        teacher = okd.add_online_module(teacher, args)
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        if recompute:
            okd.recompute_activations(student.train(), teacher)
            assert teacher.training
        losses = lambda p0, p, q, labels, rollout: dict(  # noqa: E731
            student_loss=okd.fkl(p.detach(), q), teacher_loss=okd.cross_entropy(p, labels))  # fmt: skip
        okd.run_batch(student, teacher, okd.collate(examples[:4], 0), 384, CPU, losses, lambda total: total.backward(), True)
        found.append((gradients(student), gradients(teacher)))
    for plain, recomputed in zip(*found):
        assert plain.keys() == recomputed.keys()
        for name in plain:
            torch.testing.assert_close(plain[name], recomputed[name])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_the_cached_trunk_gives_the_losses_and_gradients_of_the_full_forward(family, examples, tokenizer, tmp_path, capsys):
    args = tiny_args(lora_top_layers=2, cache_dir=str(tmp_path), cache_teacher_trunk=True)
    student, teacher = tiny(family, 1), okd.add_online_module(tiny(family, 2).requires_grad_(False), args)
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = okd.cache_trunk(args, teacher, "t", examples, tokenizer, CPU)
    size = sum(map(len, examples)) * 32 * 4
    assert f"{size / 1e9:.2f} GB, written" in capsys.readouterr().out
    (path,) = tmp_path.glob("trunk-*.bin")
    assert path.stat().st_size == size
    blocks, lowest, calls = *okd.moving_block(teacher), []
    assert lowest == 2
    losses = lambda p0, p, q, labels, rollout: dict(  # noqa: E731
        student_loss=okd.fkl(p.detach(), q), teacher_loss=okd.teacher_loss(p, q, p0, labels, 1.0, 0.5, 0.3, "qp", 1.0))  # fmt: skip
    found = []
    watch = blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for part in (examples[5:9], rows[5:9]):
        student.zero_grad(), teacher.zero_grad(), calls.clear()
        sums = okd.run_batch(student, teacher, okd.collate(part, 0), 384, CPU, losses, lambda total: total.backward(), True, True, True)
        found.append((sums, gradients(teacher), gradients(student), len(calls)))
    watch.remove()
    assert found[0][3] == 2 and found[1][3] == 0  # the lowest block ran for p_f and p_0, and then for neither
    for plain, cached in zip(found[0][:3], found[1][:3]):
        assert plain.keys() == cached.keys() and len(plain) > 5
        for name in plain:
            torch.testing.assert_close(cached[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)
    okd.cache_trunk(args, teacher, "t", examples, tokenizer, CPU)
    assert "kept" in capsys.readouterr().out


def test_a_cached_trunk_that_is_not_the_models_is_refused(examples, tokenizer, tmp_path):
    args = tiny_args(lora_top_layers=2, cache_dir=str(tmp_path), cache_teacher_trunk=True)
    teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    okd.cache_trunk(args, teacher, "t", examples, tokenizer, CPU)
    (path,) = tmp_path.glob("trunk-*.bin")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(okd.UserError, match="differ from a full forward"):
        okd.cache_trunk(args, teacher, "t", examples, tokenizer, CPU)
    args.lora_top_layers = 4
    with pytest.raises(okd.UserError, match="nothing below it to keep"):
        okd.cache_trunk(args, okd.add_online_module(tiny(seed=2).requires_grad_(False), args), "t", examples, tokenizer, CPU)


def test_the_teacher_is_loaded_without_dropout(folders):
    path = folders / "gpt2" / "teacher"
    args = tiny_args()
    rates = lambda model: {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}  # noqa: E731
    assert rates(okd.load_model(str(path), "student", args, torch.float32)) == {0.1}
    assert rates(okd.load_model(str(path), "teacher", args, torch.float32, dropout=False)) == {0.0}


def test_padding_changes_nothing(examples, float64_head):
    model = tiny(dtype=torch.float64)
    batch = okd.collate(examples[:3], 0)
    wider = okd.collate(examples[:3] + [example([5] * 60, [6] * 30)], 0)
    narrow, wide = (okd.head(model, okd.hidden_states(model, b), 384) for b in (batch, wider))
    torch.testing.assert_close(wide[: len(narrow)], narrow, atol=1e-10, rtol=1e-8)


def test_vocabulary_is_cut_to_what_both_heads_have(examples, tokenizer):
    teacher, student = tiny(seed=1, vocab_size=400).requires_grad_(False), tiny(seed=2, vocab_size=392)
    batch = okd.collate(examples[:4], 0)
    losses = lambda p0, p, q, labels, rollout: dict(student_loss=okd.fkl(p, q))  # noqa: E731
    sums = okd.run_batch(student, teacher, batch, 392, CPU, losses)
    expected = okd.fkl(plain_logits(teacher, batch)[:, :392], plain_logits(student, batch)).sum()
    torch.testing.assert_close(sums["student_loss"], expected.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Training: who moves, what a batch's split changes (nothing), precision
# ---------------------------------------------------------------------------------------------------------------------


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def test_a_frozen_teacher_is_bit_identical_after_training(examples, tokenizer):
    student, teacher = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    before, start = snapshot(teacher), snapshot(student)
    train_tiny(tiny_args(method="rkl"), student, teacher, examples, tokenizer)
    assert not changed(before, teacher) and changed(start, student) == set(start)


@pytest.mark.parametrize("top_layers, carry", [(None, {2, 3}), (0, {0, 1, 2, 3}), (1, {3})])
def test_a_moving_teacher_differs_only_in_its_lora(examples, tokenizer, top_layers, carry):
    args = tiny_args(method="okd", lora_top_layers=top_layers)
    teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    before = snapshot(teacher)
    train_tiny(args, tiny(seed=1), teacher, examples, tokenizer)
    moved = changed(before, teacher)
    assert moved == {name for name in before if "lora_" in name}
    layers = {int(re.search(r"\.h\.(\d+)\.", name)[1]) for name in moved}
    assert layers == carry


def test_with_the_module_off_the_moved_teacher_is_the_one_it_was(examples, tokenizer):
    args, batch = tiny_args(method="okd"), okd.collate(examples[:4], 0)
    original = plain_logits(tiny(seed=2), batch)
    teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    torch.testing.assert_close(plain_logits(teacher, batch), original, atol=0, rtol=0)  # B = 0 at the start
    train_tiny(args, tiny(seed=1), teacher, examples, tokenizer)
    with torch.no_grad(), okd.module_off(teacher):
        torch.testing.assert_close(plain_logits(teacher, batch), original, atol=0, rtol=0)
    assert (plain_logits(teacher, batch) - original).abs().max() > 1e-4


def test_the_students_first_step_is_the_same_whether_or_not_the_teacher_moves(examples, tokenizer):
    ends = []
    for moves in (False, True):
        args = tiny_args(method="fkl", teacher_moves=moves)
        student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2).requires_grad_(False)
        train_tiny(args, student, okd.add_online_module(teacher, args) if moves else teacher, examples, tokenizer, steps=1)
        ends.append(student)
    for a, b in zip(ends[0].parameters(), ends[1].parameters()):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("every, moves", [(1, 4), (2, 2), (3, 2)])
def test_the_module_steps_on_every_nth_batch(examples, tokenizer, every, moves, monkeypatch):
    args = tiny_args(update_teacher_every=every)
    teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    seen, watched = [], next(p for name, p in teacher.named_parameters() if "lora_B" in name)

    def report(phase, step, metrics, bar=None):
        seen.append(watched.detach().clone())

    train_tiny(args, tiny(seed=1), teacher, examples, tokenizer, steps=4, report=report)
    seen = [torch.zeros_like(watched), *seen]
    assert sum(not torch.equal(a, b) for a, b in zip(seen, seen[1:])) == moves


def test_a_reported_teacher_loss_is_the_mean_over_the_steps_that_have_one(examples, tokenizer):
    lines = {}
    for log_every in (1, 4):
        args, lines[log_every] = tiny_args(method="okd", update_teacher_every=2, log_every=log_every), []
        teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
        train_tiny(args, tiny(seed=1), teacher, examples, tokenizer, steps=4,
                   report=lambda phase, step, metrics, bar=None, kept=lines[log_every]: kept.append(metrics))  # fmt: skip
    for name, steps in (("train/teacher_loss", 2), ("train/teacher_grad_norm", 2), ("train/student_loss", 4)):
        values = [line[name] for line in lines[1] if name in line]
        assert len(values) == steps and lines[4][0][name] == pytest.approx(sum(values) / steps, rel=1e-5)


@pytest.mark.parametrize("method", ["sft", "okd"])
def test_the_split_into_micro_batches_changes_nothing(examples, tokenizer, method, monkeypatch):
    """One batch of eight ragged rows gives the gradient of four of two, of both networks."""
    ends = []
    for split in ({}, dict(micro_batch_size=2), dict(micro_batch_size=3), dict(micro_batch_tokens=90)):
        args = tiny_args(method=method, batch_size=8, **split, max_grad_norm=0, anchor=0.5)
        student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2).requires_grad_(False)
        teacher = okd.add_online_module(teacher, args) if args.teacher_moves else teacher
        captured = {}

        def capture(parameters, max_norm, captured=captured):
            captured[len(captured)] = [p.grad.clone() for p in parameters]
            return torch.zeros(())

        with monkeypatch.context() as patch:
            patch.setattr(okd, "clip", capture)
            train_tiny(args, student, teacher, examples, tokenizer, steps=1)
        ends.append(captured)
    assert len(ends[0]) == (2 if method == "okd" else 1)
    for other in ends[1:]:
        for network in other:
            for a, b in zip(ends[0][network], other[network]):
                torch.testing.assert_close(a, b, atol=2e-7, rtol=1e-4)


def test_one_batch_can_be_learnt_by_heart(examples, tokenizer):
    args, losses = tiny_args(method="fkl", lr=3e-3, warmup=0.0), []
    student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2).requires_grad_(False)
    train_tiny(args, student, teacher, examples[:4], tokenizer, steps=60,
               report=lambda phase, step, metrics, bar=None: losses.append(metrics["train/fkl"]))  # fmt: skip
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("method", okd.METHODS)
def test_every_row_of_the_method_table_trains_with_the_same_metrics(method, family, examples, tokenizer):
    args, reports = tiny_args(method=method), []
    student, teacher = tiny(family, 1), tiny(family, 2).requires_grad_(False)
    teacher = okd.add_online_module(teacher, args) if args.teacher_moves else teacher
    start = snapshot(student)
    train_tiny(args, student, teacher, examples, tokenizer, steps=3, dev=examples[:8],
               report=lambda phase, step, metrics, bar=None: reports.append(metrics))  # fmt: skip
    assert changed(start, student)
    train_names = {name for report in reports for name in report if name.startswith("train/")}
    common = {"student_loss", "student_grad_norm", "fkl", "rkl", "student_ce", "teacher_ce", "student_entropy", "teacher_entropy",
              "top1_agreement", "drift", "lr", "tokens_per_s", "step_s", "peak_memory_gb", "skipped_steps"}  # fmt: skip
    assert {f"train/{name}" for name in common} <= train_names
    assert all("time/sampling_s" in report for report in reports if "train/lr" in report)
    assert (reports[-2]["time/sampling_s"] > 0) == (method in ("imitkd", "gkd", "minillm"))  # distillm's phi starts at 0
    extra = {"okd": {"teacher_loss", "teacher_grad_norm", "lam"}, "taid": {"taid_t"}, "distillm": {"phi"}}.get(method, set())
    assert train_names == {f"train/{name}" for name in common | extra}
    assert all(math.isfinite(value) for report in reports for value in report.values())


def test_the_first_reported_loss_is_the_plain_one(examples, tokenizer):
    """The loop's number, recomputed with plain forwards: rows, mask, denominator and weights are right together."""
    args, reports = tiny_args(method="okd", batch_size=8, micro_batch_size=3, divergence="jsd", beta=0.3, student_ce_weight=0.25), []
    student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2).requires_grad_(False)
    rows = [examples[i] for i in okd.batch_indices([len(e) for e in examples], 8, args.seed, 0)]
    batch = okd.collate(rows, 0)
    p, q = plain_logits(teacher, batch), plain_logits(student, batch)
    student_loss = (0.75 * okd.jsd(p, q, 0.3) + 0.25 * okd.cross_entropy(q, batch.labels)).mean().item()
    teacher_loss = (okd.cross_entropy(p, batch.labels) + 0.5 * okd.fkl(q, p)).mean().item()
    train_tiny(args, student, okd.add_online_module(teacher, args), examples, tokenizer, steps=1,
               report=lambda phase, step, metrics, bar=None: reports.append(metrics))  # fmt: skip
    assert reports[0]["train/student_loss"] == pytest.approx(student_loss, rel=1e-5)
    assert reports[0]["train/teacher_loss"] == pytest.approx(teacher_loss, rel=1e-5)


def test_the_temperature_flag_reaches_both_losses(examples, tokenizer):
    args, reports = tiny_args(method="okd", batch_size=8, temperature=2.0), []
    student, teacher = tiny(seed=1, **NO_DROPOUT), tiny(seed=2).requires_grad_(False)
    batch = okd.collate([examples[i] for i in okd.batch_indices([len(e) for e in examples], 8, args.seed, 0)], 0)
    p, q = plain_logits(teacher, batch), plain_logits(student, batch)
    train_tiny(args, student, okd.add_online_module(teacher, args), examples, tokenizer, steps=1,
               report=lambda phase, step, metrics, bar=None: reports.append(metrics))  # fmt: skip
    assert reports[0]["train/student_loss"] == pytest.approx(4 * okd.fkl(p / 2, q / 2).mean().item(), rel=1e-5)
    teacher_loss = (okd.cross_entropy(p, batch.labels) + 0.5 * 4 * okd.fkl(q / 2, p / 2)).mean().item()
    assert reports[0]["train/teacher_loss"] == pytest.approx(teacher_loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_float32_masters_and_follows_float32(dtype, examples, tokenizer):
    reports = {}
    for hw in (CPU, okd.Hardware(torch.device("cpu"), dtype)):
        args = tiny_args(method="okd")
        student = tiny(seed=1, **NO_DROPOUT)
        teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False).to(hw.dtype), args)
        start, lines = snapshot(student), []
        train_tiny(args, student, teacher, examples, tokenizer, steps=3, hw=hw, report=lambda phase, step, metrics, bar=None, lines=lines: lines.append(metrics))
        assert all(p.dtype == torch.float32 for p in student.parameters())
        assert all((p.dtype == torch.float32) == ("lora_" in name) or hw is CPU for name, p in teacher.named_parameters())
        assert changed(start, student) == set(start)
        reports[hw.dtype] = lines
    for exact, rough in zip(reports[torch.float32], reports[dtype]):
        for name in ("train/student_loss", "train/teacher_loss", "train/fkl", "train/student_ce"):
            assert rough[name] == pytest.approx(exact[name], rel=0.02), name


def test_one_optimizer_owns_the_student_the_other_the_module():
    args = tiny_args()
    teacher = okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    optimizer = okd.adamw(teacher, 1e-3, 0.1)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in teacher.named_parameters() if "lora_" in name}
    student = tiny()
    decay = {id(p): group["weight_decay"] for group in okd.adamw(student, 1e-3, 0.1).param_groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "ln_" in name else 0.1), name


def test_learning_rate_rises_then_falls_on_a_cosine_to_1e_7():
    rates = [okd.learning_rate(step, 100, 1e-3, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-7)
    assert rates[10 + 89 // 2] == pytest.approx(0.5e-3, rel=0.02)
    assert okd.learning_rate(0, 1, 1e-3, 0.0) == pytest.approx(1e-3)


def test_a_collapse_is_a_teacher_further_from_its_start_than_the_student_ever_was():
    first = dict(fkl=1.0, student_ce=2.0)
    assert okd.collapsed(first, dict(drift=1.5, student_ce=2.5)) == 1.0
    assert okd.collapsed(first, dict(drift=1.5, student_ce=1.5)) == 0.0
    assert okd.collapsed(first, dict(drift=0.5, student_ce=2.5)) == 0.0


def test_reverse_kl_student_and_following_teacher_collapse_and_the_guard_sees_it(examples, tokenizer):
    args = tiny_args(method="okd", divergence="rkl", teacher_ce_weight=0.0, anchor=1e-6, lam=1.0, teacher_kl="pq",
                     lr=0.02, teacher_lr_ratio=1.0, eval_every=40)  # fmt: skip
    teacher, lines = okd.add_online_module(tiny(seed=2).requires_grad_(False), args), []
    result = train_tiny(args, tiny(seed=1), teacher, examples, tokenizer, steps=40, dev=examples[:8],
                        report=lambda phase, step, metrics, bar=None: lines.append(metrics))  # fmt: skip
    assert result["last_dev"]["collapsed"] == okd.collapsed(result["first_dev"], result["last_dev"])
    assert result["last_dev"]["drift"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Generating and scoring
# ---------------------------------------------------------------------------------------------------------------------


def test_a_left_padded_batch_writes_what_single_prompts_write(tokenizer):
    model = tiny("llama", 3)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "some words", "many more words than that")]
    together = okd.generate(model, tokenizer, prompts, CPU, 12)
    assert together == [okd.generate(model, tokenizer, [prompt], CPU, 12)[0] for prompt in prompts]


def test_greedy_generation_is_the_argmax_of_plain_forwards_and_keeps_eos(tokenizer):
    model, prompt = tiny("gpt2", 5), [70, 80, 90]
    ids = list(prompt)
    for _ in range(10):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert okd.generate(model, tokenizer, [prompt], CPU, 10) == [ids[3:]]
    second = ids[4]  # make the second new token the end: it is kept, nothing follows
    tokenizer = type("T", (), dict(eos_token_id=second, pad_token_id=second))
    (response,) = okd.generate(model, tokenizer, [prompt], CPU, 10)
    assert response == (ids[3:5] if ids[3] != second else [second])


def test_sampling_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(tokenizer):
    model, prompts = tiny("gpt2", 5), [[70, 80], [90], [100, 101, 102]]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    draw = lambda seed: okd.generate(model, tokenizer, prompts, CPU, 8, sample=True, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state())


def test_rouge_l_by_hand():
    # lcs("the cat sat", "the cat was sat on") = 3: precision 3/3, recall 3/5, F = 0.75
    assert okd.rouge_l("the cat sat", ["the cat was sat on"]) == pytest.approx(75.0)
    assert okd.rouge_l("the cat sat", ["no", "the cat sat"]) == pytest.approx(100.0)  # the best reference counts
    assert okd.rouge_l("", ["the cat"]) == 0.0
    assert okd.rouge_l("running dogs", ["run dog"]) == pytest.approx(100.0)  # the stemmer


# ---------------------------------------------------------------------------------------------------------------------
# Whose text
# ---------------------------------------------------------------------------------------------------------------------

SENTENCE = [70, 71, 72, 1]  # its last token is EOS


def parrot(scale):
    """A GPT-2 whose weights are set by hand so that after any prompt it says SENTENCE: a table of bigrams.

    Its one block adds nothing and token x is the x-th unit vector, which the last layer norm turns into a peak at x. The
    head's rows of 71, 72 and EOS look at the peaks of 70, 71 and 72, that of 70 at a constant in the last dimension."""
    size = 384
    model = tiny(n_embd=size, n_layer=1, tie_word_embeddings=False, **NO_DROPOUT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.transformer.ln_f.bias[-1] = 10.0
        for token, column in PARROT_HEAD:
            model.lm_head.weight[token, column] = scale
    return model


PARROT_HEAD = [(71, 70), (72, 71), (1, 72), (70, -1)]


def parrot_cross_entropy(scale):
    """-log q(next token) of the parrot at the four tokens of SENTENCE, from the closed form of layer norm on a unit vector."""
    n, losses = 384, []
    for before, after in ((13, 70), (70, 71), (71, 72), (72, 1)):
        hidden = torch.full((n,), -1 / n, dtype=torch.float64)
        hidden[before] += 1
        hidden /= math.sqrt(1 / n - 1 / n**2 + 1e-5)
        hidden[-1] += 10
        logits = torch.zeros(n, dtype=torch.float64)
        for token, column in PARROT_HEAD:
            logits[token] = scale * hidden[column]
        losses.append(-logits.log_softmax(-1)[after].item())
    return losses


def text_of(args, examples, tokenizer, student=None, teacher=None, steps=10, seed=1):
    return okd.Text(args, student, teacher, examples, tokenizer, 384, CPU, seed, steps)


@pytest.mark.parametrize("scale", [2.0, 0.2])
def test_sampled_text_is_aligned_and_ends_in_eos_so_the_parrots_loss_is_the_known_one(scale, examples, tokenizer, monkeypatch):
    args, reports, student = tiny_args(method="imitkd", student_ce_weight=1.0), [], parrot(2.0)
    rows = text_of(args, examples, tokenizer, student)(0)
    assert [row.response_ids for row in rows] == [SENTENCE] * 4  # EOS among them
    if scale < 2:  # a hesitant parrot is trained on what the sure one wrote
        monkeypatch.setattr(okd.Text, "answer", lambda self, *rest: rows)
    train_tiny(args, parrot(scale), parrot(1.0), examples, tokenizer, steps=1, report=lambda phase, step, metrics, bar=None: reports.append(metrics))
    known = parrot_cross_entropy(scale)
    assert reports[0]["train/student_loss"] == pytest.approx(sum(known) / 4, abs=1e-5)
    assert (max(known) < 1e-6) if scale == 2 else (min(known) > 1)


def test_first_token_of_sampled_text_is_a_target(examples, tokenizer):
    row = okd.with_response(examples[0], SENTENCE, 96)
    batch = okd.collate([row], 1)  # pad is EOS here
    assert batch.labels.tolist() == SENTENCE


def test_sampled_text_is_cut_to_max_length(examples):
    row = okd.with_response(examples[0], list(range(5, 205)), 96)
    assert len(row) == 96


def test_whose_text_follows_the_column(examples, tokenizer, monkeypatch):
    monkeypatch.setattr(okd.Text, "answer", lambda self, rows, step, teacher=None: [okd.with_response(row, SENTENCE, 96) for row in rows])
    own = lambda rows: all(row.response_ids == SENTENCE for row in rows)  # noqa: E731
    gold = lambda rows: not any(row.response_ids == SENTENCE for row in rows)  # noqa: E731
    for method in ("fkl", "sft", "okd", "taid"):
        assert all(gold(text_of(tiny_args(method=method), examples, tokenizer)(step)) for step in range(10))
    assert all(own(text_of(tiny_args(method="imitkd"), examples, tokenizer)(step)) for step in range(10))
    assert all(own(text_of(tiny_args(method="okd", text="student", sgo_fraction=1.0), examples, tokenizer)(step)) for step in range(10))
    text = text_of(tiny_args(method="gkd"), examples, tokenizer)
    batches = [text(step) for step in range(400)]
    assert all(own(rows) or gold(rows) for rows in batches)
    assert abs(sum(map(own, batches)) - 200) < 3 * math.sqrt(400 * 0.25)  # half of them, within three sigma


def numbered(tokenizer, examples, monkeypatch):
    """Answers that carry the number of their step, so that a test sees where a row comes from."""
    monkeypatch.setattr(okd.Text, "answer", lambda self, rows, step, teacher=None: [okd.with_response(row, [100 + step, 1], 96) for row in rows])
    return lambda rows: {row.response_ids[0] - 100 for row in rows if len(row.response_ids) == 2}


def test_replay_buffer_is_first_in_first_out_and_keeps_its_capacity(examples, tokenizer, monkeypatch):
    steps_of = numbered(tokenizer, examples, monkeypatch)
    args = tiny_args(method="gkd", sgo_fraction=1.0, sgo_source="replay", replay_capacity=10)
    text, drawn = text_of(args, examples, tokenizer), []
    for step in range(8):
        drawn.append(steps_of(text(step)))
        held = [row.response_ids[0] - 100 for row in text.state["replay"]]
        assert held == sorted(step for step in range(step + 1) for _ in range(4))[-10:]
        assert drawn[-1] <= set(held)
    assert any(steps != {i} for i, steps in enumerate(drawn))  # not only what was just written


def test_distillm_draws_fresh_text_until_the_buffer_is_full_then_replays_ever_more_often(examples, tokenizer, monkeypatch):
    steps_of = numbered(tokenizer, examples, monkeypatch)
    text = text_of(tiny_args(method="distillm", replay_capacity=12), examples, tokenizer, steps=100)
    kinds = []
    text.state["phi"] = 0.6
    for step in range(100):
        full, r = len(text.state["replay"]) >= 12, text.chance(step).random()
        expected = "data" if r >= 0.6 else "fresh" if r < 0.6 * (1 - step / 100) or not full else "replay"
        steps = steps_of(text(step))
        kinds.append(expected)
        if expected == "data":
            assert not steps
        elif expected == "fresh":
            assert steps == {step}
        else:
            assert steps and step not in steps
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
    slow = []
    for t in range(7):
        total = 0.0
        for k in range(t, 7):
            total += 0.95 ** (k - t) * rewards[k].item()
        slow.append(total / (7 - t))
    assert okd.discounted_return(rewards, 0.95).tolist() == pytest.approx(slow)


def test_rollouts_carry_advantage_log_q_and_weight_of_every_token(examples, tokenizer):
    student, teacher = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    args = tiny_args(method="minillm", micro_batch_size=2)
    text = text_of(args, examples, tokenizer, student, teacher)
    rows = [okd.with_response(row, ids, 96) for row, ids in zip(examples, ([70, 71, 1], [80, 1], [90, 91, 92, 93]))]
    judged = text.judge(rows)
    returns, order = [], sorted(rows, key=len)
    for row in order:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (teacher, student))
        start, log_p, log_q = len(row.prompt_ids), [], []
        for i, token in enumerate(row.response_ids):
            log_p.append(p[start + i - 1, token].item())
            log_q.append(q[start + i - 1, token].item())
        rewards = [a - b for a, b in zip(log_p, log_q)]
        n = len(rewards)
        returns.append([sum(0.95 ** (k - t) * rewards[k] for k in range(t, n)) / (n - t) for t in range(n)])
        got = next(j for j in judged if j.response_ids == row.response_ids).rollout
        assert [value[1] for value in got] == pytest.approx(log_q, abs=1e-5)
        weights = [math.exp(b) / (0.2 * math.exp(a) + 0.8 * math.exp(b)) for a, b in zip(log_p, log_q)]
        assert [value[2] for value in got] == pytest.approx(weights, rel=1e-4)
    flat = torch.tensor(sum(returns, []))
    whitened = ((flat - flat.mean()) / flat.std(unbiased=False)).tolist()
    assert sum(([value[0] for value in row.rollout] for row in judged), []) == pytest.approx(whitened, abs=1e-3)
    batch = okd.collate(judged, 1)
    assert batch.rollout.shape == (9, 3)


def test_policy_gradient_is_that_of_the_expected_reward_by_finite_differences():
    """Two tokens, drawn from the mixture: the importance-weighted gradient, averaged over it, is that of E_q[reward]."""
    z_p, rewards = torch.tensor([0.3, -0.1], dtype=torch.float64), torch.tensor([0.7, -0.4], dtype=torch.float64)
    z_q = torch.tensor([0.1, 0.05], dtype=torch.float64, requires_grad=True)
    log_p, log_q = z_p.log_softmax(-1), z_q.detach().log_softmax(-1)
    log_m = okd.mix(log_p, log_q, okd.TEACHER_SHARE)
    labels = torch.tensor([0, 1])
    loss = okd.policy_loss(z_q.expand(2, 2), labels, rewards, log_q, (log_q - log_m).exp())
    (gradient,) = torch.autograd.grad((log_m.exp() * loss).sum(), z_q)
    expected = lambda z: (z.softmax(-1) * rewards).sum().item()  # noqa: E731
    for i in range(2):
        nudge = torch.zeros(2, dtype=torch.float64)
        nudge[i] = 1e-6
        finite = (expected(z_q.detach() + nudge) - expected(z_q.detach() - nudge)) / 2e-6
        assert -gradient[i].item() == pytest.approx(finite, rel=1e-6)


def test_policy_loss_clips_the_ratio_times_the_weight_pessimistically():
    z = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    log_q = torch.full((4,), math.log(0.5), dtype=torch.float64)
    advantage, weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), torch.tensor([1.5, 0.5, 1.5, 0.5]).double()
    loss = okd.policy_loss(z, labels, advantage, log_q, weight)
    assert loss.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])  # -min(w A, clip(w, 0.8, 1.2) A)
    loss.sum().backward()
    assert [bool(row.abs().sum() > 0) for row in z.grad] == [False, True, True, False]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_mixture_sampling_uses_p_and_q_of_plain_forwards_at_every_token(family, with_lora):
    """Left-padded, cached, two prompts at once, against one unpadded forward for every prefix."""
    student, teacher = tiny(family, 1), tiny(family, 2)
    teacher = okd.add_online_module(teacher, tiny_args()) if with_lora else teacher
    prompts, new = [[70, 71, 72, 73, 74], [80, 81]], [[90, 91, 92], [93, 94, 95]]
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    processor = okd.NextTokens(380, teacher, attention)
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    for step in range(3):
        plain = lambda model: torch.stack([model(input_ids=torch.tensor([p + n[:step]])).logits[0, -1] for p, n in zip(prompts, new)])  # noqa: E731
        with torch.no_grad():
            q = plain(student)
            got = processor(ids, q)
            p_probabilities, q_probabilities = plain(teacher)[:, :380].softmax(-1), q[:, :380].softmax(-1)
        torch.testing.assert_close(got[:, :380].exp(), 0.2 * p_probabilities + 0.8 * q_probabilities, atol=1e-5, rtol=1e-4)
        assert (got[:, 380:] == -math.inf).all()
        ids = torch.cat([ids, torch.tensor([[n[step]] for n in new])], dim=1)


def test_minillm_samples_anew_after_its_passes(examples, tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(okd.Text, "answer", lambda self, rows, step, teacher=None: calls.append((step, len(rows), teacher)) or rows)
    monkeypatch.setattr(okd.Text, "judge", lambda self, rows: rows)
    text = text_of(tiny_args(method="minillm", rollouts=8, rollout_passes=3, batch_size=4), examples, tokenizer, teacher="T", steps=12)
    seen = [text(step) for step in range(12)]
    assert calls == [(0, 8, "T"), (6, 8, "T")]  # two batches a pass, three passes
    ids = lambda batches: sorted(id(row) for rows in batches for row in rows)  # noqa: E731
    assert ids(seen[0:2]) == ids(seen[2:4]) == ids(seen[4:6]) != ids(seen[6:8])


def test_seqkd_trains_on_the_teachers_text(folders, tokenizer, jsonl, tmp_path, capsys, monkeypatch):
    parrot(4.0).save_pretrained(tmp_path / "parrot")
    tokenizer.save_pretrained(tmp_path / "parrot")
    seen, original = [], okd.run_batch
    monkeypatch.setattr(okd, "run_batch", lambda s, t, batch, *rest, **named: seen.append(batch.labels.tolist()) or original(s, t, batch, *rest, **named))
    flags = [*small_flags(folders, jsonl, tmp_path), "--teacher", tmp_path / "parrot", "--method", "seqkd", "--eval-rows", "0",
             "--teacher-sft-epochs", "0", "--student-sft-epochs", "0"]  # fmt: skip
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    assert seen and all(labels == SENTENCE * 4 for labels in seen)


def test_the_teachers_text_goes_on_where_its_writing_stopped(examples, tokenizer, tmp_path, monkeypatch):
    args, teacher, written = tiny_args(method="seqkd", cache_dir=str(tmp_path), batch_size=1), tiny(seed=2), []
    original = okd.generate
    monkeypatch.setattr(okd, "generate", lambda *a, **k: written.append(len(a[2])) or original(*a, **k))
    write = lambda: okd.teacher_text(args, teacher, "t", examples, tokenizer, 384, CPU)[0]  # noqa: E731
    whole = write()
    assert sum(written) == len(examples) and any(row.response_ids != gold.response_ids for row, gold in zip(whole, examples))
    (path,) = tmp_path.glob("text-*.jsonl")
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:2]) + lines[2][:7])  # killed in the middle of the third chunk
    written.clear()
    assert [row.response_ids for row in write()] == [row.response_ids for row in whole]
    assert sum(written) == len(examples) - 16
    written.clear()
    write()
    assert not written


def test_policy_gradient_needs_rollouts(folders, jsonl, tmp_path, capsys):
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--policy-gradient", "True")
    assert code == 2 and "--policy-gradient needs the rollouts of --text mixture" in err


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def run(capsys, *flags):
    """okd.main in this process -> (exit code, stdout, stderr)."""
    code = 0
    try:
        okd.main([str(flag) for flag in flags])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def small_flags(folders, jsonl, tmp_path, family="gpt2"):
    return ["--teacher", folders / family / "teacher", "--student", folders / family / "student", "--data", jsonl,
            "--output-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache", "--max-steps", "2", "--batch-size", "4",
            "--max-length", "96", "--max-new-tokens", "8", "--score-rows", "4", "--device", "cpu"]  # fmt: skip


def test_a_run_leaves_folders_that_load_everywhere(folders, jsonl, tmp_path, capsys):
    code, out, err = run(capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 0, err
    assert "Rouge-L" in out and "student, warm start" in out and "student, okd" in out
    folder = tmp_path / "run"
    student = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    writer = transformers.pipeline("text-generation", model=str(folder / "student"), max_new_tokens=4)
    assert writer("shout ba\n")[0]["generated_text"].startswith("shout ba\n")
    assert student.config.vocab_size == 384
    (teacher_folder,) = (tmp_path / "cache").glob("teacher-*")
    adapter = json.loads((folder / "teacher_lora" / "adapter_config.json").read_text())
    assert pathlib.Path(adapter["base_model_name_or_path"]) == teacher_folder
    teacher = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    moved = peft.PeftModel.from_pretrained(teacher, folder / "teacher_lora")
    assert any(p.abs().sum() > 0 for name, p in moved.named_parameters() if "lora_B" in name)
    saved = json.loads((folder / "args.json").read_text())
    assert saved["method"] == "okd" and saved["divergence"] == "fkl" and saved["teacher_moves"] is True
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"teacher sft", "student sft", "distil", "final"}
    assert {"final/rouge_l", "final/rouge_l_teacher", "time/distil_s"} <= lines[-1].keys()

    # A second method starts from the same bits, and does not train them again.
    code, out, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--output-dir", tmp_path / "other", "--method", "fkl")
    assert code == 0 and out.count("warm start kept in") == 2
    first, second = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("run", "other"))
    dev = [next(line for line in lines if "dev/fkl" in line) for lines in (first, second)]
    assert {k: v for k, v in dev[0].items() if k.startswith("dev/")} == {k: v for k, v in dev[1].items() if k.startswith("dev/")}
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 2 and "already holds a run" in err


def test_the_warm_start_key_changes_with_what_determines_the_weights(folders, jsonl, tmp_path, capsys):
    flags = small_flags(folders, jsonl, tmp_path) + ["--score-rows", "0", "--eval-rows", "0"]
    for i, change in enumerate([(), ("--lr", "2e-4"), ("--sft-seed", "5"), ("--lora-rank", "2"), ("--seed", "3")]):
        assert run(capsys, *flags, *change, "--output-dir", tmp_path / f"run{i}")[0] == 0
    # lr: the student's; sft seed: both; rank: the LoRA-tuned teacher's; seed: none
    assert len(list((tmp_path / "cache").glob("student-*"))) == 3
    assert len(list((tmp_path / "cache").glob("teacher-*"))) == 3


def test_wandb_offline_run_gets_name_config_summary_and_samples(folders, jsonl, tmp_path):
    flags = [*small_flags(folders, jsonl, tmp_path), "--track", "--wandb-group", "the-group"]
    subprocess.run([sys.executable, ROOT / "okd.py", *flags], check=True, capture_output=True, cwd=tmp_path)
    (wandb_file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    wanted = [b"train/student_loss", b"dev/fkl", b"rouge_l_warm_start", b"samples", b"update_teacher_every", b"the-group"]
    for _ in range(100):  # wandb's own process closes the file a little after ours has ended
        missing = [text for text in wanted if text not in wandb_file.read_bytes()]
        if not missing:
            break
        time.sleep(0.1)
    assert not missing


def test_zero_epochs_skip_both_warm_starts(folders, jsonl, tmp_path, capsys):
    flags = [*small_flags(folders, jsonl, tmp_path), "--teacher-sft-epochs", "0", "--student-sft-epochs", "0"]
    code, out, _ = run(capsys, *flags)
    assert code == 0 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("method", ["fkl", "okd", "gkd"])
def test_benchmark_prints_speed_and_keeps_nothing(method, folders, jsonl, tmp_path, capsys):
    code, out, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--benchmark", "3", "--method", method, "--lora-top-layers", "2")
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 3 and figures["step_s_min"] <= figures["step_s_median"] <= figures["step_s_max"]
    assert 0 < figures["response_tokens_per_s"] < figures["tokens_per_s"] and figures["peak_memory_gb"] > 0
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_flops_against_a_count_by_hand(examples):
    rows = examples[:2]
    tokens, responses = sum(map(len, rows)), sum(len(row.response_ids) for row in rows)
    blocks = 4 * (32 * 96 + 32 * 32 + 2 * 32 * 128)  # attention in, attention out, the two layers of the MLP
    attention = sum(2 * 4 * 32 * len(row) ** 2 for row in rows)
    forward = 2 * blocks * tokens + attention + 2 * 384 * 32 * responses
    half = (2 * blocks * tokens + attention) / 2 + 2 * 384 * 32 * responses
    student, teacher = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    assert okd.step_flops(tiny_args(method="sft"), student, None, rows) == 3 * forward
    assert okd.step_flops(tiny_args(method="fkl"), student, teacher, rows) == 4 * forward
    args = tiny_args(method="okd", lora_top_layers=2)
    assert okd.step_flops(args, student, okd.add_online_module(teacher, args), rows) == 4 * forward + half


def test_compile_reaches_the_blocks_and_changes_no_number(folders, jsonl, tmp_path, capsys, monkeypatch):
    compiled, original = [], torch.nn.Module.compile

    def eager(self, **options):  # the graph is captured and run without a C++ compiler
        compiled.append(type(self).__name__)
        original(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    losses = []
    for i, flags in enumerate([(), ("--compile",)]):
        code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path, "llama"), "--output-dir", tmp_path / f"run{i}", "--log-every", "1", *flags)
        assert code == 0, err
        lines = [json.loads(line) for line in (tmp_path / f"run{i}" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/student_loss"] for line in lines if line["phase"] == "distil" and "train/student_loss" in line])
    assert compiled == ["LlamaDecoderLayer"] * 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


GOOD_LINE = b'{"prompt": "a", "response": "b"}\n'
BAD_FILES = [
    (GOOD_LINE + b"{oops\n", "line 2: not valid JSONL"),
    (GOOD_LINE + b"\xff\xfe{}\n", "line 2: not valid JSONL"),
    (b"[1, 2]\n", "line 1: not valid JSONL (not a JSON object)"),
    (GOOD_LINE + b'{"instruction": "a"}\n', "line 2: it has a prompt but no 'output' or 'response'"),
    (b'{"text": "a"}\n', "line 1: it needs 'instruction' and 'output', or 'prompt' and 'response', or 'messages'"),
    (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: its 'messages' must end in a turn of the assistant"),
    (b'{"prompt": "a", "response": ""}\n' * 3, "no usable rows (3 read, dropped "),
    (b"", "no usable rows (0 read)"),
]


@pytest.mark.parametrize("content, message", BAD_FILES)
def test_bad_data_is_one_line_and_exit_2(content, message, folders, jsonl, tmp_path, capsys):
    path = bad(tmp_path, "bad.jsonl", content)
    code, out, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--data", path)
    assert code == 2 and message in err and err.count("\n") == 1 and str(path) in err
    assert not (tmp_path / "run").exists()


BAD_FLAGS = [
    (["--beta", "1.5"], "--beta is 1.5; it must lie in [0, 1]"),
    (["--skew", "1"], "--skew is 1.0; it must lie in [0, 1)"),
    (["--temperature", "0"], "--temperature is 0.0; it must lie in (0, inf)"),
    (["--ab-alpha", "0", "--ab-beta", "0"], "--ab-alpha and --ab-beta are both 0"),
    (["--ab-alpha", "-1"], "--ab-alpha is -1.0"),
    (["--mu", "nan"], "--mu is nan"),
    (["--teacher-ce-weight", "0"], "--lam > 0 with neither --teacher-ce-weight nor --anchor"),
    (["--lam", "0", "--teacher-ce-weight", "0"], "are all 0"),
    (["--cache-teacher-trunk", "--method", "fkl"], "--cache-teacher-trunk needs a moving teacher"),
    (["--cache-teacher-trunk", "--lora-top-layers", "0"], "whose --lora-top-layers is not 0"),
    (["--cache-teacher-trunk", "--lora-top-layers", "2", "--text", "student"], "needs text that stays the same"),
    (["--batch-size", "0"], "--batch-size is 0; it must lie in [1, 2147483648]"),
    (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
    (["--teacher", "./no/such/folder"], "no model folder ./no/such/folder"),
    (["--lora-targets", "q_projj"], "--lora-targets q_projj: no such layer in the teacher, which has c_attn, c_fc, c_proj"),
    (["--lora-top-layers", "9"], "the teacher has only 4 layers"),
    (["--max-length", "999", "--max-prompt-length", "99"], "--max-length 999 is more than the 256 positions"),
    (["--max-length", "600", "--max-prompt-length", "600"], "leaves no room for a response"),
    (["--device", "cuda:77"], "--device cuda:77 is not usable here"),
    (["--device", "toaster"], "--device toaster is not usable here"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_one_line_and_exit_2(flags, message, folders, jsonl, tmp_path, capsys):
    code, out, err = run(capsys, *small_flags(folders, jsonl, tmp_path), *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "student").exists()


def test_unequal_tokenizers_are_refused(folders, jsonl, tmp_path, capsys):
    other = tmp_path / "other"
    tiny("gpt2", 1).save_pretrained(other)
    transformers.ByT5Tokenizer(extra_ids=10).save_pretrained(other)
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--student", other)
    assert code == 2 and "different tokenizers" in err and err.count("\n") == 1


def test_without_a_network_one_line_names_the_repository_and_the_file(folders, tmp_path, capsys):
    flags = [f for f in small_flags(folders, "x", tmp_path) if f not in ("--data", "x")]
    code, _, err = run(capsys, *flags)
    assert code == 2 and "raw.jsonl" in err and "MiniLLM/dolly" in err and "HF_HOME" in err and err.count("\n") == 1
    code, _, err = run(capsys, "--teacher", "nobody/nothing", "--student", "nobody/nothing")
    assert code == 2 and "nobody/nothing" in err and "tokenizer.json" in err and "HF_HOME" in err and err.count("\n") == 1


def test_trust_remote_code_is_said_aloud(folders, jsonl, tmp_path, capsys):
    _, out, _ = run(capsys, *small_flags(folders, jsonl, tmp_path), "--trust-remote-code", "--data", "nowhere.jsonl")
    assert "trust_remote_code is on" in out


def test_precision_auto_is_bf16_only_where_the_cpu_is_fast_at_it():
    hw = okd.pick_hardware(okd.Args(device="cpu"))
    assert hw.dtype == (torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32)
    assert okd.pick_hardware(okd.Args(device="cpu", precision="fp16")).dtype == torch.float16


def test_inline_metadata_is_requirements_txt():
    block = re.search(r"# /// script\n(.*?)# ///", (ROOT / "okd.py").read_text(), re.S)[1]
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert re.findall(r'"([^"]+)"', block.split("dependencies")[1]) == requirements


def test_help_has_a_text_for_every_flag():
    text = subprocess.run([sys.executable, ROOT / "okd.py", "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}).stdout
    for field in dataclasses.fields(okd.Args):
        assert "--" + field.name.replace("_", "-") in text, field.name
    assert text.count("(default:") >= len(dataclasses.fields(okd.Args))


# ---------------------------------------------------------------------------------------------------------------------
# Survives: resume, faults, more than one process
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: no handler of the program sees it."""


def long_flags(folders, jsonl, tmp_path, *more, family="gpt2"):
    return [*small_flags(folders, jsonl, tmp_path, family), "--max-steps", "12", "--epochs", "9", "--save-every", "3", "--log-every", "2",
            "--eval-every", "5", "--eval-rows", "4", "--teacher-sft-epochs", "0", "--student-sft-epochs", "0", *more]  # fmt: skip


def kill_at(monkeypatch, call, target="run_batch", error=Killed):
    """The `call`-th call of okd.<target> ends the process, as far as the program can tell."""
    original, calls = getattr(okd, target), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error("killed")
        return original(*args, **kwargs)

    monkeypatch.setattr(okd, target, counted)


def weights_of(folder, name="student/model.safetensors"):
    return safetensors.torch.load_file(folder / name)


def metrics_of(folder):
    """metrics.jsonl without what a clock or the machine decides."""
    clocks = {"seconds", "train/tokens_per_s", "train/step_s", "train/peak_memory_gb", "time/sampling_s"}
    return [{k: v for k, v in json.loads(line).items() if k not in clocks and not k.endswith("_s")} for line in open(folder / "metrics.jsonl")]


def assert_same_run(folder, expected):
    ours, theirs = weights_of(folder), weights_of(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics_of(folder) == metrics_of(expected)
    assert not (folder / "checkpoints").exists()


RESUMED = {
    "okd": [], "taid": [], "gkd": [], "minillm": ["--rollout-passes", "2", "--rollouts", "8"],
    "distillm": ["--sgo-fraction", "0.7", "--replay-capacity", "8"], "gkd-replay": ["--sgo-source", "replay"],
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_killed_ends_bit_identical_to_one_that_was_not(name, folders, jsonl, tmp_path, capsys, monkeypatch):
    """GPT-2 with dropout, killed between two checkpoints and again later; weights, metrics and the number of records."""
    flags = ["--method", name.split("-")[0], *RESUMED[name]]
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a", *flags))[0] == 0
    for number, call in enumerate((8, 4)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, call, "student_loss")
            run(capsys, *(long_flags(folders, jsonl, tmp_path / "b", *flags) if number == 0 else ["--resume", tmp_path / "b" / "run"]))
    code, out, _ = run(capsys, "--resume", tmp_path / "b" / "run")
    assert code == 0 and re.search(r"goes on after step [369]", out)
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_a_kill_in_a_warm_start_or_in_the_scoring_loses_nothing_either(folders, jsonl, tmp_path, capsys, monkeypatch):
    warm = ["--teacher-sft-epochs", "1", "--student-sft-epochs", "1"]
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a", *warm))[0] == 0
    first = long_flags(folders, jsonl, tmp_path / "b", *warm)
    again = ["--resume", tmp_path / "b" / "run"]
    said = ""
    for flags, target, call in ((first, "student_loss", 6), (again, "student_loss", 14), (again, "student_loss", 12), (again, "summarize", 1)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, call, target)
            run(capsys, *flags)
        said += capsys.readouterr().out
    code, out, _ = run(capsys, *again)
    assert code == 0 and "teacher sft: goes on after step 3" in said + out and "student sft: goes on after step 6" in said + out
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


# A save packs the tensors, forces three files and their folder to the disk, renames it, and forces the folder above.
MOMENTS = {"before a byte is written": ("pack", 2, 1), "before the rename": ("force_to_disk", 8, 2), "after the rename": ("force_to_disk", 10, 2)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_inside_a_save_leaves_the_checkpoint_before(moment, folders, jsonl, tmp_path, capsys, monkeypatch):
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a"))[0] == 0
    target, call, left = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(okd.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        kill_at(patch, call, target)
        run(capsys, *long_flags(folders, jsonl, tmp_path / "b"))
    kept = sorted(path.name for path in (tmp_path / "b" / "run" / "checkpoints").iterdir())
    assert kept[0] == "distil-00000003" and len(kept) == left
    code, out, _ = run(capsys, "--resume", tmp_path / "b" / "run")
    assert code == 0 and f"goes on after step {6 if moment == 'after the rename' else 3}" in out
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "flipped tensors": lambda path: flip(path / "tensors.safetensors"),
    "flipped state": lambda path: flip(path / "state.json"),
    "truncated": lambda path: os.truncate(path / "tensors.safetensors", 100),
    "a file gone": lambda path: (path / "state.json").unlink(),
    "no sums": lambda path: (path / "sha256.json").write_text("{"),
}


@pytest.fixture
def killed_at_step_ten(folders, jsonl, tmp_path, capsys, monkeypatch):
    """A run folder with the checkpoints of steps 6 and 9, beside that of an unbroken run."""
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a"))[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 11, "student_loss")
        run(capsys, *long_flags(folders, jsonl, tmp_path / "b"))
    folder = tmp_path / "b" / "run"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["distil-00000006", "distil-00000009"]  # --keep 2
    return folder, tmp_path / "a" / "run"


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_used(harm, killed_at_step_ten, capsys):
    folder, expected = killed_at_step_ten
    HARM[harm](folder / "checkpoints" / "distil-00000009")
    code, out, err = run(capsys, "--resume", folder)
    assert code == 0 and "distil-00000009 is damaged" in err and "goes on after step 6" in out
    assert_same_run(folder, expected)


def test_with_every_checkpoint_damaged_one_line_says_so(killed_at_step_ten, capsys):
    folder, _ = killed_at_step_ten
    for path in (folder / "checkpoints").iterdir():
        HARM["truncated"](path)
    code, _, err = run(capsys, "--resume", folder)
    assert code == 2 and "every checkpoint in" in err and "Traceback" not in err


def test_what_may_and_may_not_be_resumed(killed_at_step_ten, folders, jsonl, tmp_path, capsys):
    folder, expected = killed_at_step_ten
    code, _, err = run(capsys, "--resume", folder, "--lr", "0.5")
    assert code == 2 and "--lr is 0.0001 in the run that goes on" in err
    code, _, err = run(capsys, "--resume", expected)
    assert code == 2 and "has ended" in err
    code, _, err = run(capsys, "--resume", tmp_path / "nothing")
    assert code == 2 and "args.json cannot be read" in err
    code, out, _ = run(capsys, "--resume", folder, "--micro-batch-size", "1", "--keep", "1")  # where and how may change
    assert code == 0 and "goes on after step 9" in out


def test_resume_auto_goes_on_with_the_same_flags_or_begins(folders, jsonl, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in long_flags(folders, jsonl, tmp_path / "b") if flag not in ("--output-dir", tmp_path / "b" / "run")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5, "student_loss")
        run(capsys, *flags, "--resume", "auto")
    assert len(list(tmp_path.glob("runs/*/args.json"))) == 1
    code, out, _ = run(capsys, *flags, "--resume", "auto", "--seed", "2", "--output-dir", "runs/other")  # other flags: another run
    assert code == 0 and "goes on" not in out
    code, out, _ = run(capsys, *flags, "--resume", "auto")
    assert code == 0 and "goes on after step 3" in out and len(list(tmp_path.glob("runs/*/args.json"))) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, folders, jsonl, tmp_path, capsys, monkeypatch):
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a", "--save-every", "0"))[0] == 0
    with monkeypatch.context() as patch:
        original, calls = okd.student_loss, []

        def signalled(*args, **kwargs):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        patch.setattr(okd, "student_loss", signalled)
        got, _, err = run(capsys, *long_flags(folders, jsonl, tmp_path / "b", "--save-every", "0"))
    folder = tmp_path / "b" / "run"
    assert got == code and f"go on with: python okd.py --resume {folder}" in err and "after step 8" in err
    assert run(capsys, "--resume", folder)[0] == 0
    assert_same_run(folder, tmp_path / "a" / "run")


def test_a_signal_while_a_model_loads_is_no_bad_model(folders, jsonl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 143 and f"stopped by SIGTERM; go on with: python okd.py --resume {tmp_path / 'run'}" in err and "cannot load" not in err


def test_a_second_signal_ends_at_once(monkeypatch):
    ends, signals = [], okd.Signals()
    monkeypatch.setattr(os, "_exit", ends.append)
    with pytest.raises(okd.Stopped), signals.finish_step():
        signals.handle(signal.SIGTERM, None)
        assert not ends
        signals.handle(signal.SIGTERM, None)
        assert ends == [143]
    with pytest.raises(okd.Stopped):  # outside a training there is no step to finish
        okd.Signals().handle(signal.SIGINT, None)


def test_real_kills_at_random_moments_lose_nothing(folders, jsonl, tmp_path, capsys):
    """SIGKILL after a random time, up to ten times, to a process that was forked with okd imported, until the run has ended."""
    flags = [str(flag) for flag in long_flags(folders, jsonl, tmp_path / "a", "--max-steps", "200", "--epochs", "40", "--save-every", "2")]
    assert run(capsys, *flags)[0] == 0
    script = f"""
import os, random, signal, sys, time
import torch; torch.set_num_threads(2)  # as here: sums depend on it
import okd
rng, folder = random.Random(5), {str(tmp_path / "b" / "run")!r}
first = {[str(flag) for flag in long_flags(folders, jsonl, tmp_path / "b", "--max-steps", "200", "--epochs", "40", "--save-every", "2")]!r}
kills = 0
while not os.path.exists(folder + "/student"):
    flags = ["--resume", folder] if os.path.exists(folder + "/args.json") else first
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        okd.main(flags)
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
    ours, theirs = weights_of(tmp_path / "b" / "run"), weights_of(tmp_path / "a" / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(folders, jsonl, tmp_path, capsys, monkeypatch):
    """The limit on file sizes is the system's: writing really fails, in the middle of a file."""
    resource = pytest.importorskip("resource")
    original, limits = okd.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_at_six(self, step, *rest):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            original(self, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if step == 6:
            assert [path.name for path in self.folder.iterdir()] == ["distil-00000003"]  # nothing half-written, the old one there

    monkeypatch.setattr(okd.Checkpoints, "save", full_at_six)
    code, _, err = run(capsys, *long_flags(folders, jsonl, tmp_path))
    assert code == 0 and "distil-00000006 could not be written" in err and (tmp_path / "run" / "student").is_dir()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(dtype, examples, tokenizer, monkeypatch):
    """The student does not move on the first step, and does on those after it."""
    original, steps, seen = okd.student_loss, [], []

    def sometimes_nan(*args):
        steps.append(1)
        return original(*args) * (math.nan if len(steps) == 1 else 1.0)

    args = tiny_args(method="okd", micro_batch_tokens=10**6, lr=1e-2)
    student, teacher = tiny(seed=1), okd.add_online_module(tiny(seed=2).requires_grad_(False), args)
    before = snapshot(student)
    monkeypatch.setattr(okd, "student_loss", sometimes_nan)

    def report(phase, step, metrics, bar=None):
        seen.append((metrics["train/skipped_steps"], changed(before, student) != set()))

    train_tiny(args, student, teacher, examples, tokenizer, steps=3, report=report, hw=okd.Hardware(torch.device("cpu"), dtype))
    assert seen[0] == (1.0, False) and seen[-1][1] and math.isfinite(sum(p.sum().item() for p in student.parameters()))


def test_a_training_that_only_skips_stops_with_the_last_good_weights(folders, jsonl, tmp_path, capsys, monkeypatch):
    original, steps = okd.student_loss, []

    def nan_from_the_fifth(*args):
        steps.append(1)
        return original(*args) * (math.nan if len(steps) >= 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(okd, "student_loss", nan_from_the_fifth)
        patch.setattr(okd, "MAX_SKIPPED", 4)
        code, _, err = run(capsys, *long_flags(folders, jsonl, tmp_path, "--log-every", "1"))
    assert code == 2 and "step 8: the last 4 gradients were not finite" in err and "Traceback" not in err
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert records[-1]["train/student_loss"] is None and records[-1]["train/skipped_steps"] == 4
    kept = safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / "distil-00000008" / "tensors.safetensors")
    assert all(value.isfinite().all() for name, value in kept.items() if name != "taid/loss")
    code, out, _ = run(capsys, "--resume", tmp_path / "run")
    assert code == 0 and "goes on after step 8" in out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_a_line_that_names_the_flags(error, folders, jsonl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(okd, "run_batch", lambda *_, **__: (_ for _ in ()).throw(error))
    code, _, err = run(capsys, *long_flags(folders, jsonl, tmp_path))
    assert code == 2 and "--micro-batch-tokens" in err and f"--resume {tmp_path / 'run'}" in err and "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(folders, jsonl, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = small_flags(folders, jsonl, tmp_path)
    for flag in ("--output-dir", "--cache-dir"):
        bad_flags = [*flags[: flags.index(flag) + 1], tmp_path / "file" / "run", *flags[flags.index(flag) + 2 :]]
        code, _, err = run(capsys, *bad_flags)
        assert code == 2 and "Not a directory" in err and "Traceback" not in err
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_wandb_that_is_not_there_does_not_stop_the_run(folders, jsonl, tmp_path, capsys, monkeypatch):
    import wandb

    def unreachable(*args, **kwargs):
        raise wandb.errors.CommError("network is unreachable")

    monkeypatch.setattr(wandb, "init", unreachable)
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path), "--track")
    assert code == 0 and "the run goes on without it" in err and (tmp_path / "run" / "student").is_dir()


def test_a_resumed_run_keeps_its_wandb_id(folders, jsonl, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5, "student_loss")
        run(capsys, *long_flags(folders, jsonl, tmp_path, "--track"))
    first = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert run(capsys, "--resume", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == first and first["id"]


def test_a_quantized_teacher_without_the_package_is_one_line(folders, jsonl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(okd.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, *long_flags(folders, jsonl, tmp_path, "--teacher-quant", "4bit"))
    assert code == 2 and "pip install bitsandbytes" in err


def torchrun(processes, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", str(ROOT / "okd.py"), *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


PARALLEL = {
    "okd": ["--anchor", "0.1"], "okd sharded": ["--anchor", "0.1", "--shard"], "gkd": ["--method", "gkd"],
}  # fmt: skip


@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_give_the_losses_and_weights_of_one(name, folders, jsonl, tmp_path, capsys):
    """Batches of 5 rows, so that one process goes without a row now and then; Llama has no dropout."""
    flags = ["--batch-size", "5", "--max-steps", "6", "--lr", "1e-3", "--save-every", "4", *PARALLEL[name]]
    alone = [flag for flag in flags if flag != "--shard"]
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a", *alone, family="llama"))[0] == 0
    done = torchrun(2, *long_flags(folders, jsonl, tmp_path / "b", *flags, family="llama"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 x cpu" in done.stdout and done.stdout.count("run: ") == 1
    one, two = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for file in ["student/model.safetensors"] + ["teacher_lora/adapter_model.safetensors"] * ("okd" in name):
        ours, theirs = weights_of(two, file), weights_of(one, file)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-3)
    for ours, theirs in zip(metrics_of(two), metrics_of(one), strict=True):
        assert ours.pop("phase") == theirs.pop("phase")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(folders, jsonl, tmp_path, capsys, monkeypatch):
    flags = ["--max-steps", "8", "--lr", "1e-3"]
    assert run(capsys, *long_flags(folders, jsonl, tmp_path / "a", *flags, family="llama"))[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6, "student_loss")
        run(capsys, *long_flags(folders, jsonl, tmp_path / "b", *flags, family="llama"))
    done = torchrun(2, "--resume", tmp_path / "b" / "run", "--shard")
    assert done.returncode == 0 and "goes on after step 3" in done.stdout, done.stderr[-3000:]
    for name, value in weights_of(tmp_path / "a" / "run").items():
        torch.testing.assert_close(weights_of(tmp_path / "b" / "run")[name], value, atol=1e-5, rtol=1e-3)


def test_every_process_gets_as_many_pieces_and_each_row_goes_to_one(examples):
    for count in (1, 5, 8):
        shares = [okd.micro_batches(examples[:count], tiny_args(micro_batch_tokens=100), dataclasses.replace(CPU, rank=rank, world=3)) for rank in range(3)]
        assert len({len(share) for share in shares}) == 1
        rows = [row for share in shares for piece in share for row in piece]
        assert sorted(id(row) for row in rows if row.response_ids) == sorted(map(id, examples[:count]))
        assert all(len(piece) * max(map(len, piece)) <= 100 for share in shares for piece in share)


def test_a_batch_without_a_target_has_zero_gradients(examples):
    student, teacher = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    batch = okd.collate([okd.without_target(examples[0])], 0)
    sums = okd.run_batch(student, teacher, batch, 384, CPU, lambda p0, p, q, *_: dict(loss=okd.fkl(p, q)), lambda total: total.backward())
    assert not sums and len(batch.labels) == 0 and all(not g.any() for g in gradients(student).values()) and gradients(student)


def test_a_rows_sampled_text_does_not_depend_on_its_batch_and_follows_the_distribution(tokenizer):
    model, prompts = tiny("llama", 5), [[70 + i, 80, 90] for i in range(6)]
    draw = lambda **options: okd.generate(model, tokenizer, prompts, CPU, 8, sample=True, seed=3, vocab=384, **options)  # noqa: E731
    assert draw(batch_size=6) == draw(batch_size=2) and draw() != okd.generate(model, tokenizer, prompts, CPU, 8, sample=True, seed=4, vocab=384)
    scores = torch.tensor([[0.0, 1.0, 2.0, -math.inf, 0.5, 9.0]]).expand(4000, -1)
    tokens = okd.NextTokens(5, None, None, range(4000))(None, scores).argmax(-1)
    share = torch.bincount(tokens, minlength=6) / 4000
    torch.testing.assert_close(share, torch.cat([scores[0, :5].softmax(-1), torch.zeros(1)]), atol=0.025, rtol=0)
    assert share[3] == share[5] == 0


def test_no_pickle_no_network_and_no_foreign_code_by_default(folders, jsonl, tmp_path, capsys, monkeypatch):
    for file in ("okd.py", "eval.py"):
        source = (ROOT / file).read_text()
        assert "import torch" in source and not re.search(r"\bpickle\b|torch\.(load|save)\(|(?<![.\w])eval\(", source)
    assert okd.Args().trust_remote_code is False

    def refused(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert run(capsys, *small_flags(folders, jsonl, tmp_path))[0] == 0
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


def test_weights_in_pickle_are_not_loaded(folders, jsonl, tmp_path, capsys):
    shutil.copytree(folders / "gpt2" / "teacher", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    flags = [tmp_path / "pickled" if flag == folders / "gpt2" / "teacher" else flag for flag in small_flags(folders, jsonl, tmp_path)]
    code, _, err = run(capsys, *flags)
    assert code == 2 and "cannot load the teacher" in err and "Traceback" not in err


def test_fuzzed_rows_are_read_or_refused_in_one_line(tokenizer, tmp_path):
    """Three thousand files of damaged JSONL: bytes flipped, cut, doubled; fields of every type."""
    rng, path, outcomes = random.Random(1), tmp_path / "rows.jsonl", Counter()
    junk = [None, True, -1, 1e400, "", " ", "\u0000", "x" * 300, "\ud800", [], [""], ["a", 1], {}, {"content": 1}, [{"role": "assistant", "content": "a"}] * 2,
            [{"role": "user"}], "</s>", "<extra_id_0>"]  # fmt: skip
    names = ["instruction", "input", "output", "prompt", "response", "messages", "text"]
    for _ in range(3000):
        if rng.random() < 0.5:
            content = "".join(json.dumps(row) + "\n" for row in okd.demo_rows(3, seed=rng.randrange(99))).encode()
            content = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(content) + 1)
                content[at : at + rng.randrange(4)] = rng.choice((rng.randbytes(rng.randrange(5)), b"\n", b'"', b"{", b"\xef\xbb\xbf", b"\\u", b"[" * 2000))
        else:
            row = {name: rng.choice(junk) for name in rng.sample(names, rng.randrange(len(names)))}
            content = json.dumps(row).encode() + rng.choice((b"", b"\n", b"\r\n"))
        path.write_bytes(content)
        try:
            rows = okd.encode(okd.read_jsonl(path), tokenizer, tiny_args(), str(path))
            assert rows and all(row.prompt_ids and row.response_ids for row in rows)
            outcomes["read"] += 1
        except okd.UserError as error:
            assert "\n" not in str(error), content
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 100


def test_fuzzed_flags_end_in_a_run_or_in_one_line(folders, jsonl, tmp_path, capsys):
    rng = random.Random(2)
    fields = [field for field in dataclasses.fields(okd.Args) if field.name not in ("teacher", "student", "data", "output_dir", "cache_dir", "track",
              "device", "max_steps", "benchmark", "epochs", "compile", "rollouts", "max_new_tokens", "score_rows", "eval_rows")]  # fmt: skip
    values = ["0", "1", "2", "-1", "1e9", "nan", "inf", "-inf", "0.5", "1e-300", "", "x", "None", "True", "99999999999999999999", "jsd", "student", "../x", "\u2603"]
    codes = Counter()
    for number in range(120):
        flags = small_flags(folders, jsonl, tmp_path / str(number))
        for field in rng.sample(fields, rng.randrange(1, 3)):
            flags += ["--" + field.name.replace("_", "-"), rng.choice(values)]
        code, _, err = run(capsys, *flags, "--max-steps", "1", "--eval-rows", "2", "--score-rows", "1", "--teacher-sft-epochs", "0", "--student-sft-epochs", "0")
        codes[code] += 1
        assert code in (0, 2), (flags, err)
        assert "Traceback" not in err, flags
        folder = tmp_path / str(number) / "run"
        assert code == 0 or not (folder / "student").exists()
        assert not list((tmp_path / str(number)).rglob("*.tmp-*"))
    assert codes[0] > 5 and codes[2] > 30


# ---------------------------------------------------------------------------------------------------------------------
# eval.py
# ---------------------------------------------------------------------------------------------------------------------


def run_eval(capsys, *flags):
    code = 0
    try:
        okd_eval.main([str(flag) for flag in flags])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def scripted(tokenizer, answers):
    """A model that answers the i-th prompt (by its first id) with a given text, whatever else it is."""

    def generate(model, tokenizer_, prompts, hw, max_new_tokens, batch_size=32, sample=False, seed=0, **options):
        return [tokenizer(answers[prompt[0]], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for prompt in prompts]

    return generate


def test_eval_reproduces_a_rouge_l_computed_by_hand(folders, tokenizer, tmp_path, capsys, monkeypatch):
    rows = [dict(prompt="a", response="the cat was sat on"), dict(prompt="b", response=["x", "one two"]), dict(prompt="c", response="y")]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = lambda text: tokenizer(text).input_ids[0]  # noqa: E731
    answers = {first("a"): "the cat sat", first("b"): "one two", first("c"): ""}
    monkeypatch.setattr(okd, "generate", scripted(tokenizer, answers))
    checkpoint = folders / "gpt2" / "student"
    code, out, err = run_eval(capsys, checkpoint, "--data", data, "--greedy")
    assert code == 0, err
    (result,) = json.loads((checkpoint / "results.json").read_text())
    assert result["rouge_l"] == pytest.approx((75 + 100 + 0) / 3)
    assert (result["rows"], result["empty_outputs"], result["cut_prompts"]) == (3, 1, 0)
    assert result["protocol"] == dict(decoding="greedy", no_repeat_ngram_size=0, max_new_tokens=256, max_prompt_length=256)
    assert "58.33" in out and "decoding greedy" in out


def test_eval_presets():
    make = lambda **flags: okd_eval.protocol_of(okd_eval.Args(("x",), **flags))  # noqa: E731
    paper = dict(decoding="sampling", temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6, max_new_tokens=256, max_prompt_length=256)
    assert make() == make(paper=True) == paper
    assert make(greedy=True)["no_repeat_ngram_size"] == 0
    assert make(greedy=True, no_repeat_ngram_size=6)["no_repeat_ngram_size"] == 6


def test_eval_of_runs_is_seeded_and_keeps_mean_and_std_over_decoding_seeds(folders, jsonl, tmp_path, capsys):
    flags = ["--data", jsonl, "--limit", "5", "--max-new-tokens", "6", "--seeds", "1", "2", "1", "--batch-size", "3"]
    code, out, err = run_eval(capsys, folders / "llama" / "student", *flags)
    assert code == 0, err
    (result,) = json.loads((folders / "llama" / "student" / "results.json").read_text())
    assert result["scores"][0] == result["scores"][2] and len(result["scores"]) == 3
    mean = sum(result["scores"]) / 3
    assert result["rouge_l"] == pytest.approx(mean)
    assert result["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in result["scores"]) / 2))


def test_results_lie_beside_the_checkpoint(tmp_path):
    run_folder, plain = tmp_path / "runs" / "a", tmp_path / "model"
    (run_folder / "student").mkdir(parents=True), plain.mkdir()
    (run_folder / "args.json").write_text("{}")
    (plain / "config.json").write_text("{}"), (run_folder / "student" / "config.json").write_text("{}")
    path = lambda checkpoint: okd_eval.results_path(str(checkpoint), okd_eval.Args(()))  # noqa: E731
    assert path(run_folder) == path(run_folder / "student") == run_folder / "results.json"
    assert path(plain) == plain / "results.json"
    assert path("org/name") == pathlib.Path("results/org/name/results.json")


def test_the_six_gram_ban_holds_over_prompt_and_answer(tokenizer):
    model, prompt = tiny("gpt2", 5), tokenizer("abc abc abc abc abc abc", add_special_tokens=False).input_ids
    free = okd.generate(model, tokenizer, [prompt], CPU, 120)[0]
    (ids,) = okd.generate(model, tokenizer, [prompt], CPU, 120, no_repeat_ngram_size=6)
    grams = lambda ids: [tuple(ids[i : i + 6]) for i in range(len(ids) - 5)]  # noqa: E731
    new = grams(prompt + ids)[len(prompt) - 5 :]
    assert len(set(new)) == len(new) and not set(new) & set(grams(prompt))
    assert len(set(grams(free))) < len(grams(free))  # without the ban this model does repeat itself


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer):
    rows = [(1, dict(prompt="abcdef", response="x")), (2, dict(prompt="ab", response=["y", "z"]))]
    examples, cut = okd_eval.examples_of(rows, tokenizer, "s", 4)
    assert [tokenizer.decode(e.prompt_ids) for e in examples] == ["cdef", "ab"] and cut == 1
    assert [e.references for e in examples] == [["x"], ["y", "z"]]
    assert [e.response_ids for e in examples] == [[123, 1], [124, 1]]  # gold text and EOS


BAD_EVAL = [
    (["--data", "nowhere"], "no data set or file nowhere"),
    (["--greedy", "--paper"], "two protocols"),
    (["--greedy", "--seeds", "1"], "--seeds change nothing with --greedy"),
    (["--limit", "0"], "--limit is 0; it must be at least 1"),
    (["--temperature", "0"], "--temperature is 0.0"),
]


@pytest.mark.parametrize("flags, message", BAD_EVAL)
def test_bad_eval_flags_are_one_line_and_exit_2(flags, message, folders, jsonl, capsys):
    code, _, err = run_eval(capsys, folders / "gpt2" / "student", "--data", jsonl, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_missing_checkpoint_is_one_line_and_exit_2(jsonl, capsys):
    code, _, err = run_eval(capsys, "./no/such/run", "--data", jsonl)
    assert code == 2 and "no model folder ./no/such/run" in err and err.count("\n") == 1


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_is_not_done_again(folders, jsonl, tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "model"
    tiny("gpt2", 7).save_pretrained(checkpoint)
    okd.load_tokenizer("demo", okd.Args()).save_pretrained(checkpoint)
    flags = [checkpoint, "--data", jsonl, "--limit", "10", "--max-new-tokens", "5", "--seeds", "1", "--batch-size", "4"]
    assert run_eval(capsys, *flags)[0] == 0
    (path,), first = (checkpoint / "generations").glob("*.jsonl"), (checkpoint / "results.json").read_text()
    unbroken = okd.whole_lines(path)
    calls, original = [], okd.generate
    monkeypatch.setattr(okd, "generate", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    assert run_eval(capsys, *flags)[0] == 0 and not calls
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:4]) + lines[4][:20])  # killed while the second of three batches was written
    (checkpoint / "results.json").unlink()
    assert run_eval(capsys, *flags)[0] == 0
    assert sum(calls) == 6  # rows 5 to 10 of the order, the four that were whole not again
    by_row = lambda records: sorted(records, key=lambda record: record["row"])  # noqa: E731
    assert by_row(okd.whole_lines(path)) == by_row(unbroken)
    again = json.loads((checkpoint / "results.json").read_text())
    assert [r["scores"] for r in again] == [r["scores"] for r in json.loads(first)]


def test_token_metrics_against_numbers_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64), torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    metrics = {name: value.item() for name, value in okd_eval.token_metrics(p.log(), q.log()).items()}
    assert metrics["fkl"] == pytest.approx(0.25 * math.log(2)) and metrics["rkl"] == pytest.approx(0.25 * math.log(2))
    assert metrics["tvd"] == pytest.approx(0.25) and metrics["top1_agreement"] == 0
    assert metrics["teacher_entropy"] == pytest.approx(1.5 * math.log(2)) and metrics["entropy_gap"] == pytest.approx(0)
    assert metrics["top5_overlap"] == 1 and metrics["top5_mass"] == pytest.approx(1) and metrics["tail_mass"] == pytest.approx(0)
    p = torch.full((1, 100), 0.0, dtype=torch.float64)
    p[0, :5] = 9.0
    q = p.flip(1)
    metrics = {name: value.item() for name, value in okd_eval.token_metrics(p, q).items()}
    share = math.exp(9) / (5 * math.exp(9) + 95)
    assert metrics["top5_overlap"] == 0 and metrics["top5_mass_teacher"] == pytest.approx(5 * share)
    assert metrics["top5_mass"] == pytest.approx(5 * share / math.exp(9))


def test_texts_are_measured_at_the_right_tokens_and_in_order(examples, tokenizer):
    student, teacher = tiny(seed=1), tiny(seed=2)
    found = okd_eval.measure_texts(student, teacher, tokenizer, examples[:7], CPU, tokens=60)
    for row, values in zip(examples[:7], found):
        batch = okd.collate([row], 0)
        torch.testing.assert_close(values["fkl"], okd.fkl(plain_logits(teacher, batch), plain_logits(student, batch)).detach(), atol=1e-5, rtol=1e-4)
    means = okd_eval.summary(found)
    assert means["tokens"] == sum(bin["tokens"] for bin in means["by_teacher_entropy"]) == sum(len(e.response_ids) for e in examples[:7])


def test_excess_error_of_known_errors():
    own, oracle = [torch.full((12,), 2.0), torch.full((30,), 2.0)], [torch.full((25,), 1.0)]
    assert okd_eval.excess_error(own, oracle) == {10: pytest.approx(100.0), 25: pytest.approx(100.0)}
    assert okd_eval.excess_error(own, own)[10] == pytest.approx(0.0)


def test_bootstrap_on_known_cases():
    assert okd_eval.bootstrap([[1.5] * 20, [1.5] * 20]) == (1.5, 1.5, 1.5)
    mean, low, high = okd_eval.bootstrap([[(-1.0) ** i for i in range(400)]])
    assert mean == 0 and low == pytest.approx(-2 / 20, abs=0.02) and high == pytest.approx(2 / 20, abs=0.02)  # 1.96 / sqrt(400)


def made_up_run(root, method, seed, scores, lr=1e-4):
    """A run folder with a score per row, as okd.py and eval.py would leave it -> (folder, its results)."""
    folder = root / f"{method}-{seed}-{lr}"
    (folder / "student").mkdir(parents=True), (folder / "generations").mkdir()
    (folder / "student" / "config.json").write_text("{}")
    (folder / "args.json").write_text(json.dumps(dict(method=method, seed=seed, lr=lr)))
    lines = [dict(phase="distil", step=0, **{"dev/fkl": 2.0}), dict(phase="distil", step=9, **{"dev/fkl": 1.0 / (seed + 1)}),
             dict(phase="distil", step=9, **{"train/tokens_per_s": 100.0, "train/peak_memory_gb": 2.5}),
             dict(phase="final", step=0, **{"time/distil_s": 10.0 + seed, "time/sampling_s": 4.0})]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [dict(row=row, score=score, prompt="p", reference="r", output="o") for row, score in enumerate(scores)]
    (folder / "generations" / "g.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder), [dict(key="k", data="d", rouge_l=sum(scores) / len(scores), std=None, generations=["g.jsonl"], rows=len(scores), protocol={})]


def test_comparison_of_made_up_runs(tmp_path):
    runs = dict([made_up_run(tmp_path, "fkl", 1, [10.0, 20.0, 30.0, 40.0]), made_up_run(tmp_path, "fkl", 2, [12.0, 22.0, 32.0, 42.0]),
                 made_up_run(tmp_path, "okd", 1, [15.0, 25.0, 35.0, 45.0]), made_up_run(tmp_path, "okd", 2, [17.0, 27.0, 37.0, 47.0]),
                 made_up_run(tmp_path, "rkl", 1, [9.0, 21.0, 29.0, 41.0]), made_up_run(tmp_path, "rkl", 1, [0.0] * 4, lr=1.0)])  # fmt: skip
    args = okd_eval.Args((), data=("d",), baseline="fkl", output_dir=str(tmp_path / "out"))
    markdown, comparison = okd_eval.compare(args, runs)
    rows = {entry["method"]: entry for entry in comparison}
    assert list(rows) == ["fkl", "okd", "rkl lr=0.0001", "rkl lr=1.0"]
    assert rows["fkl"]["rouge_l"] == 26 and rows["fkl"]["std_training"] == pytest.approx(math.sqrt(2)) and rows["fkl"]["seconds"] == 11.5
    assert rows["okd"]["interval"] == [5, 5] and rows["okd"]["distinguishable"] and rows["okd"]["paired_seeds"] == [1, 2]
    assert rows["rkl lr=0.0001"]["difference"] == 0 and not rows["rkl lr=0.0001"]["distinguishable"]
    assert markdown.count("not distinguishable") == 1 and rows["fkl"]["peak_memory_gb"] == 2.5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.md", "comparison.json", "comparison.png"}
    with pytest.raises(okd.UserError, match="no such method among the runs"):
        okd_eval.compare(dataclasses.replace(args, baseline="gkd"), runs)


def test_a_run_and_its_adapted_teacher_are_scored_compared_and_shown(folders, jsonl, tmp_path, capsys):
    code, _, err = run(capsys, *small_flags(folders, jsonl, tmp_path))
    assert code == 0, err
    flags = ["--data", jsonl, "--limit", "4", "--greedy", "--max-new-tokens", "5", "--output-dir", tmp_path / "out", "--show", "1"]
    code, out, err = run_eval(capsys, tmp_path / "run", tmp_path / "run" / "teacher_lora", *flags, "--teacher", folders / "gpt2" / "teacher")
    assert code == 0, err
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(result["distribution"]) == {"teacher", "gold", "own", "excess_error_percent"}
    assert result["distribution"]["gold"]["fkl"] > 0 and "excess accumulated error" in out and "reference:" in out
    (adapted,) = json.loads((tmp_path / "run" / "teacher_lora" / "results.json").read_text())
    assert adapted["distribution"]["gold"]["fkl"] < result["distribution"]["gold"]["fkl"]  # it is still close to the teacher
    code, out, err = run_eval(capsys, tmp_path / "run", "--compare", *flags)
    assert code == 0 and "| okd | 1 |" in out, err
    assert (tmp_path / "out" / "comparison.md").exists()


DAMAGE = [
    ("results.json", "{oops", "results.json is damaged"),
    ("args.json", "{oops", "args.json or metrics.jsonl is missing, damaged or unfinished"),
    ("metrics.jsonl", "", "args.json or metrics.jsonl is missing, damaged or unfinished"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE)
def test_damaged_run_folders_are_one_line_and_exit_2(name, content, message, tmp_path, jsonl, capsys):
    folder, _ = made_up_run(tmp_path, "fkl", 1, [1.0])
    (pathlib.Path(folder) / name).write_text(content)
    code, _, err = run_eval(capsys, folder, "--data", jsonl, "--compare")
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_run_that_has_not_ended_is_one_line_and_exit_2(tmp_path, jsonl, capsys):
    (tmp_path / "args.json").write_text("{}")
    code, _, err = run_eval(capsys, tmp_path, "--data", jsonl)
    assert code == 2 and "is a run without a student" in err and err.count("\n") == 1
