# ruff: noqa: E402 (a library must be loaded before torch)
"""Counts the GPU memory of training, without a GPU.

    python docs/memory.py          # a markdown table, in a few minutes
    python docs/memory.py check    # the counter against torch's profiler, on real tensors

The training step of okd.py runs on fake tensors: they have a shape, a dtype and device "cuda", but
no content. The bytes of all that are alive are added up; the peak is over two optimizer steps. Not
counted: the CUDA context, fragmentation in the allocator, scratch memory of kernels and cuBLAS,
evaluation and generation. Needs g++ and the CPU build of torch.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import pathlib
import subprocess
import sys
import tempfile
import warnings
import weakref

# Autograd asks CUDA for its current stream even if tensors are fake, and in a CPU build nobody
# answers. This library does.
STUB = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
};
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
"""
with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    command = f"g++ -std=c++20 -shared -fPIC -I{home}/include -x c++ - -L{home}/lib -ltorch_cpu"
    command += f" -lc10 -Wl,-rpath,{home}/lib -o {folder}/stub.so"
    subprocess.run(command.split(), input=STUB, text=True, check=True)
    ctypes.CDLL(f"{folder}/stub.so")

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, LlamaConfig, Qwen2Config

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import okd

# Config class, width, layers, heads, heads of keys, inner width, vocabulary, one matrix for
# embedding and head. Qwen2.5 7B has a head of 152064 rows, which okd.load_networks cuts.
SHAPES = {
    "GPT-2 XL": (GPT2Config, 1600, 48, 25, 25, 6400, 50257, True),
    "GPT-2": (GPT2Config, 768, 12, 12, 12, 3072, 50257, True),
    "Llama-3.2 3B": (LlamaConfig, 3072, 28, 24, 8, 8192, 128256, True),
    "Llama-3.2 1B": (LlamaConfig, 2048, 16, 32, 8, 8192, 128256, True),
    "Qwen2.5 7B": (Qwen2Config, 3584, 28, 28, 4, 18944, 151936, False),
    "Qwen2.5 0.5B": (Qwen2Config, 896, 24, 14, 2, 4864, 151936, True),
    "small": (GPT2Config, 256, 4, 4, 4, 1024, 8191, True),
    "tiny": (GPT2Config, 128, 2, 4, 4, 512, 8191, True),
}
PAIRS = [
    ("GPT-2 XL", "GPT-2"),
    ("Llama-3.2 3B", "Llama-3.2 1B"),
    ("Qwen2.5 7B", "Qwen2.5 0.5B"),
]
METHODS = ["sft", "fkl", "fkl --cache-teacher", "okd", "okd --lora-top-layers {quarter}"]
# Tokens of the 32 rows of a batch, half of them response: Dolly's mean of 146. Of the micro-batches
# the second is nearly full, 4056 tokens, and runs while the gradients of the first are held.
LENGTHS = [78] * 8 + [169] * 24


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations made on a device, now and at the peak."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.alive = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata  # its address: views have their tensor's
        if key not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size


def yes():
    return True


def no():
    return False


def flash_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=None, **_):
    """What a GPU runs for these arguments: no (T, T) matrix. A CPU build would not choose it."""
    assert attn_mask is None
    assert is_causal
    if torch.is_autocast_enabled("cuda"):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    assert query.dtype == torch.bfloat16
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def pretend_gpu():
    """Autocast and GradScaler work as on a GPU with bf16; attention is FlashAttention's."""
    torch.cuda.amp.common.amp_definitely_not_available = no
    torch.cuda.is_bf16_supported = yes
    torch.nn.functional.scaled_dot_product_attention = flash_attention
    okd.skip_input_checks()


def build(name, dtype):
    """A model of that shape, without weights."""
    kind, width, layers, heads, kv_heads, inner, vocab, tied = SHAPES[name]
    config = kind(  # each class takes what it knows
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        activation_function="gelu_pytorch_tanh",  # as in okd.load_model
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_batches(args, dtype):
    """The micro-batches of a step, on the CPU. What the tokens are does not matter."""
    rows = []
    for number, length in enumerate(LENGTHS):
        half = length // 2
        row = okd.Example(number, "", [], [0] * half, [0] * (length - half), end_id=0)
        if args.cache_teacher:
            row.states = torch.zeros(length - half, SHAPES[args.teacher][1], dtype=dtype)
        rows.append(row)
    cpu = okd.Hardware(torch.device("cpu"), dtype)
    return list(okd.micro_batches(rows, args.micro_batch_tokens, cpu))


def count(teacher_name, student_name, method, hw, meter):
    """Two optimizer steps as in okd.train. Returns bytes of (weights, optimizers)."""
    flags = f"--method {method}".split()
    args = okd.parse_args(["--teacher", teacher_name, "--student", student_name, *flags])
    batches = make_batches(args, hw.dtype)
    num_tokens = sum(len(batch.labels) for batch in batches)
    teacher = build(teacher_name, hw.dtype).requires_grad_(False)
    student = build(student_name, torch.float32).train()
    networks = [student]
    if args.teacher_moves:
        teacher = okd.add_lora(teacher, args.lora_rank, 1.0, "auto", args.lora_top_layers)
        networks.append(teacher)
    loss_teacher = None if method == "sft" else teacher
    fake = contextlib.nullcontext()
    if hw.device.type == "cuda":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, meter, torch.autograd.set_multithreading_enabled(False):
        for model in (teacher, student):
            model.to_empty(device=hw.device)
            model.tie_weights()
        weights = meter.now
        optimizers = [okd.make_optimizer(network, args.weight_decay) for network in networks]
        scaler = okd.make_scaler(hw)
        for _ in range(2):
            for batch in batches:
                tensors = [x if x is None else x.to(hw.device) for x in batch]
                okd.train_micro_batch(
                    args, student, loss_teacher, okd.Batch(*tensors), hw, scaler, num_tokens, 0.0
                )
            del tensors
            for optimizer in optimizers:
                okd.optimizer_step(optimizer, scaler, args.lr, args.max_grad_norm, hw)
            scaler.update(1.0)
        return weights, meter.now - weights


def num_parameters(name):
    return sum(weight.numel() for weight in build(name, torch.float32).parameters())


def print_table():
    """What is held between two steps, weights and optimizers, and the peak."""
    pretend_gpu()
    hw = okd.Hardware(torch.device("cuda"), torch.bfloat16)
    print("| teacher, student | --method | weights, GB | optimizers, GB | peak, GB |")
    print("|---|---|---:|---:|---:|")
    for teacher, student in PAIRS:
        sizes = f"{num_parameters(teacher) / 1e6:.0f}M, {num_parameters(student) / 1e6:.0f}M"
        for method in METHODS:
            method = method.format(quarter=SHAPES[teacher][2] // 4)
            meter = Meter("cuda")
            weights, optimizers = count(teacher, student, method, hw, meter)
            numbers = " | ".join(f"{n / 1e9:.2f}" for n in (weights, optimizers, meter.peak))
            print(f"| {teacher}, {student} ({sizes}) | `{method}` | {numbers} |", flush=True)


def check():
    """The peak by the meter and by torch's profiler, on real tensors in float32 on the CPU."""
    hw = okd.Hardware(torch.device("cpu"), torch.float32)
    for method in METHODS[:4]:
        meter = Meter("cpu")
        count("small", "tiny", method, hw, meter)
        with torch.profiler.profile(profile_memory=True) as profile:
            count("small", "tiny", method, hw, Meter("none"))
        changes = []  # when, and by how many bytes
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                changes.append((event.start_ns(), event.nbytes()))
        peak = max(itertools.accumulate(size for _, size in sorted(changes)))
        print(f"{method}: {meter.peak / 1e6:.1f} MB, by the profiler {peak / 1e6:.1f} MB")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["check"]:
        check()
    else:
        print_table()
