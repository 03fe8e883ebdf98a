"Four bits against bitsandbytes, transformers and peft: the same codes, files, outputs, gradients."
import json, os, subprocess, sys
from copy import deepcopy
from itertools import product
from pathlib import Path
import pytest
from fractions import Fraction

import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, DeepseekV2Config,
                          DeepseekV2ForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig,
                          Qwen2MoeForCausalLM)
from ftkit.core import FtkitError
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.quant.linear import (QExperts, QLinear, dequantize_model, frozen_linear, is_experts,
                                quantize_model)
from ftkit.quant.nf4 import BLOCKS, VALUES, dequantize_blocks, quantize_blocks
from ftkit.quant.qtensor import (QTensor, bits_per_weight, dequantize_scales, dynamic_map,
                                 _scale_borders, quantize, quantize_scales)

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning",
                                        "ignore::DeprecationWarning")
DTYPES = torch.float32, torch.float16, torch.bfloat16
SHAPES = (1,), (3, 5), (64, 64), (7, 129), (130, 100), (3, 63, 5)
IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
# rows are whole blocks: on a CPU with AVX512 bitsandbytes misreads the scales of others
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
cpu_kernels = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them itself")
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="transformers quantizes on the GPU")


def pairs(*choices): return list(product(*choices))


def weights(shape, dtype=torch.float32, seed=0, zeros=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    w = 0.02*torch.randn(shape, generator=g)
    w.view(-1)[:zeros] = 0
    return w.to(device, dtype)


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[k].cpu(), theirs[k].cpu())
                                            for k in ours)


def layout(codes, state):
    "What bitsandbytes stores."
    return {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}


# ------------------------------------------------------------ to the last bit as bitsandbytes

@pytest.mark.parametrize("kind, dtype", pairs(VALUES, DTYPES))
def test_codes_and_scales(kind, dtype):
    for i, (block, shape) in enumerate(pairs(BLOCKS, SHAPES)):
        w = weights(shape, dtype, i, zeros=block if i % 3 else 0)
        if i % 5 == 0: w.view(-1)[-(w.numel() % block or block):] = 0
        codes, state = bnb.functional.quantize_4bit(w, blocksize=block, quant_type=kind)
        ours = quantize_blocks(w, kind, block)
        assert torch.equal(ours[0], codes) and torch.equal(ours[1], state.absmax), (block, shape)
        if shape[-1] % block and shape[-1] % 2 == 0: continue  # see SIZES
        theirs = bnb.functional.dequantize_4bit(codes, state).reshape(shape)
        assert torch.equal(dequantize_blocks(*ours, shape, kind, block, dtype), theirs)


@pytest.mark.parametrize("kind, dtype", pairs(VALUES, DTYPES))
def test_double_quantization(kind, dtype):
    for i, (block, shape) in enumerate(pairs((32, 64, 1024), (*SHAPES[:-1], (1000, 1024)))):
        w = weights(shape, dtype, i, zeros=block if i % 3 else 0)
        theirs = bnb.functional.quantize_4bit(w, blocksize=block, quant_type=kind,
                                              compress_statistics=True)
        ours = quantize(w, kind, block)
        assert equal(ours.tensors(), layout(*theirs)), (block, shape)
        state = theirs[1]
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(dequantize_scales(ours.absmax, ours.nested_absmax, ours.offset), scales)
        if shape[-1] % block: continue
        # in float16 some processors multiply in another order: the last bit
        assert_close(ours.dequantize(), bnb.functional.dequantize_4bit(*theirs), atol=0,
                     rtol=2**-10*(dtype == torch.float16))


def test_the_map_of_scales():
    assert torch.equal(dynamic_map(), bnb.functional.create_dynamic_map())
    for kind in VALUES:
        table = bnb.functional.get_4bit_type(kind, "cpu")
        assert torch.equal(quantize(weights((8, 64)), kind).tensors()["weight.quant_map"], table)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), kind=st.sampled_from(list(VALUES)), block=st.sampled_from(BLOCKS),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), double=st.booleans(),
       scale=st.floats(-30, 30))
def test_any_size(n, kind, block, dtype, seed, double, scale):
    w = (weights((n,), seed=seed)*2.0**scale).to(dtype)
    if not w.isfinite().all(): return
    theirs = bnb.functional.quantize_4bit(w, blocksize=block, quant_type=kind,
                                          compress_statistics=double)
    ours = quantize(w, kind, block, double)
    assert equal(ours.tensors(), layout(*theirs))
    assert torch.equal(QTensor.from_tensors(ours.tensors()).dequantize(), ours.dequantize())


def as_c_reads(text):
    "The float32 nearest to a decimal, rounded once; by way of Python's float it would be twice."
    found = torch.tensor(float(text))
    near = [found, *(found.nextafter(torch.tensor(to)) for to in (9., -9.))]
    return min(near, key=lambda t: abs(Fraction(t.item()) - Fraction(text)))


def tree(kind, x):
    "The decision trees of bitsandbytes on CUDA, as lists of borders."
    if kind == "nf4":
        borders = """-0.8480964004993439 -0.6106329262256622 -0.4599952697753906
            -0.33967943489551544 -0.23460740596055984 -0.13791173323988914 -0.045525018125772476
            0.03979014977812767 0.1202552504837513 0.2035212516784668 0.2920137718319893
            0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"""
        return sum((x > as_c_reads(b)).int() for b in borders.split())
    borders = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    place = sum((x.abs() > torch.tensor(b)).int() for b in borders)
    return torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])[place] + 8*(x < 0)


@pytest.mark.parametrize("kind", VALUES)
def test_borders_of_cuda(kind):
    values = torch.tensor(sorted(VALUES[kind]))
    middles = (values[:-1] + values[1:])/2
    typed = torch.tensor([0.00260417, 0.20833333, 0.29166667, 0.583333, 0.8333333])
    edge = torch.cat([middles, typed, -typed, torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1.0, -1.0])])
    near = [edge.nextafter(torch.tensor(to)) for to in (9., -9.)]
    x = torch.cat([edge, *near, torch.rand(5000)*2 - 1]).clamp(-1, 1)
    x = F.pad(x, (0, -len(x) % 63))
    rows = F.pad(x.view(-1, 63), (0, 1), value=1.0)  # each block has the scale 1
    codes = quantize_blocks(rows, kind, 64, like="cuda")[0].view(-1)
    codes = torch.stack([codes >> 4, codes & 15], 1).view(-1)
    assert torch.equal(codes.int(), tree(kind, rows.view(-1)).int())


def search(code, x):
    "The search of bitsandbytes on CUDA for one of 256 values."
    pivot, upper, lower = 127, 255, 0
    for i in (64, 32, 16, 8, 4, 2, 1):
        if x > code[pivot]: lower, pivot = pivot, pivot + i
        else: upper, pivot = pivot, pivot - i
    if x > code[pivot]: return upper if x > (code[upper] + code[pivot])*0.5 else pivot
    return lower if x < (code[lower] + code[pivot])*0.5 else pivot


def test_scales_of_cuda():
    code = dynamic_map()
    middles = (code[:-1] + code[1:])*0.5
    near = [middles.nextafter(torch.tensor(to)) for to in (9., -9.)]
    x = torch.cat([middles, *near, code, torch.rand(700)*2 - 1])
    assert torch.bucketize(x, _scale_borders("cpu")).tolist() == [search(code, v) for v in x]
    scales = torch.rand(700)
    codes, nested, mean = quantize_scales(scales, like="cuda")
    scaled = (scales - mean)*(1/nested).repeat_interleave(256)[:700]
    assert codes.tolist() == [search(code, v) for v in scaled]


@cuda
@pytest.mark.parametrize("turn, how", enumerate(pairs(VALUES, DTYPES, (False, True))))
def test_bitsandbytes_on_cuda(turn, how):
    kind, dtype, double = how
    blocks = {64, BLOCKS[turn % len(BLOCKS)]}  # each block size is compiled anew
    for i, (block, shape) in enumerate(pairs(blocks, (*SHAPES[turn % 2:-1], (512, 1024)))):
        w = weights(shape, dtype, i, zeros=block if i % 3 else 0, device="cuda")
        codes, state = bnb.functional.quantize_4bit(w, blocksize=block, quant_type=kind,
                                                    compress_statistics=double)
        ours = quantize(w, kind, block, double)
        assert equal(ours.tensors(), layout(codes, state)), (block, shape)
        assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(codes, state))
        plain = quantize_blocks(w, kind, block)  # without Triton, up to the hardware's reciprocal
        assert (plain[0] != ours.codes).float().mean() < 1e-3


@cuda
def test_quantizing_on_cuda_waits_for_nothing_and_needs_little():
    w = weights((4096, 4096), torch.bfloat16, device="cuda")
    quantize(w).dequantize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try: q = quantize(w); q.dequantize(torch.bfloat16)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 3*w.nbytes


KERNELS = """
import torch
from ftkit.kernels.nf4 import dequantize_kernel, quantize_kernel
from ftkit.quant.nf4 import BLOCKS, VALUES, dequantize_blocks, quantize_blocks
from ftkit.quant.qtensor import dynamic_map, quantize
g = torch.Generator().manual_seed(0)
for kind in VALUES:
    for block in BLOCKS:
        for shape in (1,), (5, 13), (3, 700), (80, 80):
            w = torch.randn(shape, generator=g)
            w.view(-1)[:block] *= len(shape) == 1
            ours, theirs = quantize_kernel(w, kind, block), quantize_blocks(w, kind, block, "cuda")
            assert all(map(torch.equal, ours, theirs)), (kind, block, shape)
            out = dequantize_kernel(*theirs, torch.empty(shape), kind, block)
            assert torch.equal(out, dequantize_blocks(*theirs, shape, kind, block))
            if len(shape) == 1: continue
            wide = torch.full((shape[0], shape[1] + 16), 7.)
            dequantize_kernel(*theirs, wide[:, :shape[1]], kind, block)
            assert torch.equal(wide[:, :shape[1]], out) and (wide[:, shape[1]:] == 7).all()
            factors = torch.rand(shape[0], generator=g)
            scaled = dequantize_kernel(*theirs, torch.empty(shape), kind, block, factors=factors)
            torch.testing.assert_close(scaled, out*factors[:, None])
    q = quantize(torch.randn(5, 96, 64, generator=g), kind)
    matrix = quantize(torch.randn(50, 192, generator=g), kind)
    for part in q, *(q[e] for e in range(5)), matrix, matrix[7:31], matrix[49:]:
        out = dequantize_kernel(part.codes, part.absmax, torch.empty(part.shape), kind, 64,
                                part.nested_absmax, part.offset, dynamic_map(), part.first)
        assert torch.equal(out, part.dequantize())
print("same")
"""


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ftkit.kernels.nf4 import _bytes_kernel, _quantize_kernel, _words_kernel

def compiled(kernel, arch, types, **constants):
    signature = types | {k: "constexpr" for k in constants}
    even = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t != "first"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options=dict(enable_fp_fusion=False)).asm["ptx"]

tables = dict(nested="*fp32", offset="*fp32", values="*fp32", table="*fp32", factors="*fp32")
sizes = dict(n="i32", n_bytes="i32")
for arch in 75, 80, 90:
    for out, double, strided in (("bf16", True, False), ("fp16", False, True),
                                 ("fp8e4nv", True, False)):
        if out == "fp8e4nv" and arch < 89: continue
        types = dict(absmax="*u8" if double else "*fp32", **tables, out=f"*{out}")
        flags = dict(BLOCK=64, DOUBLE=double, ROWS=out == "fp8e4nv")
        ptx = compiled(_words_kernel, arch, dict(codes="*i32", **types, n_words="i32",
            stride="i32", first="i32"), COLUMNS=4096, WORDS=128, STRIDED=strided,
            SHUFFLE=True, **flags)
        assert "fma.rn.f32" not in ptx  # product and sum are rounded one by one
        assert f"st.global.v{2 if flags['ROWS'] else 4}.b32" in ptx and "st.shared" not in ptx
        ptx = compiled(_bytes_kernel, arch, dict(codes="*u8", **types, **sizes, columns="i32",
            stride="i32", first="i32"), BYTES=2048, **flags)
        assert "fma.rn.f32" not in ptx
    if arch == 75: continue
    ptx = compiled(_quantize_kernel, arch, dict(
        w="*bf16", codes="*u8", absmax="*fp32", borders="*fp32", order="*u8", **sizes),
        BLOCK=64, ROWS=64, FAST=True)
    assert "rcp.approx.ftz.f32" in ptx
print("compiled")
"""


@cpu_kernels
@pytest.mark.parametrize("program, interpret, says", [(KERNELS, "1", "same"),
                                                      (COMPILED, "0", "compiled")])
def test_kernels_without_a_gpu(program, interpret, says, tmp_path):
    pytest.importorskip("triton")
    program = (tmp_path/"program.py").write_text(program) and tmp_path/"program.py"
    root = str(Path(__file__).parent.parent)
    env = os.environ | dict(TRITON_INTERPRET=interpret, TRITON_CACHE_DIR=str(tmp_path),
                            PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == says, done.stderr[-2000:]


# ------------------------------------------------------------ sizes

def test_bits_per_weight():
    w = torch.randn(1024, 4096)
    assert bits_per_weight(quantize(w)) == pytest.approx(4 + 8/64 + 32/(64*256), abs=1e-4)
    assert bits_per_weight(quantize(w, double=False)) == 4.5
    coarse = quantize(w, block=128)
    assert bits_per_weight(coarse) == pytest.approx(4 + 8/128 + 32/(128*256), abs=1e-4)


def test_slices_change_nothing(monkeypatch):
    w = weights((300, 129), torch.float16)
    whole = quantize_blocks(w), dequantize_blocks(*quantize_blocks(w), w.shape)
    monkeypatch.setattr("ftkit.quant.nf4.SLICE", 4096)
    codes, scales = quantize_blocks(w)
    assert torch.equal(codes, whole[0][0]) and torch.equal(scales, whole[0][1])
    assert torch.equal(dequantize_blocks(codes, scales, w.shape), whole[1])


# ------------------------------------------------------------ layers and models

def llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | kwargs)).to(dtype)


def reloaded(folder, dtype):
    "The toy as from_pretrained makes it, which keeps the frequencies of positions in float32."
    if not folder.exists(): llama(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def linear4bit(linear, compute_dtype, kind="nf4"):
    "The layer of bitsandbytes; in training mode, since else its CPU program rounds the scales."
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                            compute_dtype=compute_dtype, quant_type=kind)
    new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False,
                                   quant_type=kind, module=new).to("cpu")
    new.bias = None if linear.bias is None else nn.Parameter(linear.bias.data.clone())
    return new.train()


@pytest.mark.parametrize("bias, own, dtype", pairs((True, False), (None, torch.bfloat16,
                                                                    torch.float32), DTYPES))
def test_linear_is_that_of_bitsandbytes(bias, own, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 192, bias=bias, dtype=dtype)
    ours = QLinear.from_linear(linear, compute_dtype=own)
    theirs = linear4bit(linear, own or dtype)
    x, g = torch.randn(2, 5, 128, dtype=dtype), torch.randn(2, 5, 192, dtype=dtype)
    results = []
    for layer in ours, theirs:
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.backward(g)
        results.append((out, inputs.grad))
    for a, b in zip(*results):
        # a 16-bit weight computed in another type: bitsandbytes rounds it to 16 bits on the way
        # back (and not on the way there), ftkit on neither
        exact = own in (None, dtype) or dtype == torch.float32
        assert a.dtype == b.dtype and (torch.equal(a, b) if exact else (a - b).abs().max() < 0.1)


def test_autocast_is_that_of_bitsandbytes():
    linear = nn.Linear(128, 192)
    x = torch.randn(5, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for own in torch.bfloat16, torch.float32:
            ours = QLinear.from_linear(linear, compute_dtype=own)(x)
            theirs = linear4bit(linear, own)(x)
            assert ours.dtype == theirs.dtype == torch.float32
            if own == torch.bfloat16: assert torch.equal(ours, theirs)
        plain = QLinear.from_linear(linear)(x)
        assert plain.dtype == torch.bfloat16
    assert_close(plain, QLinear.from_linear(linear)(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_lora_gradients_are_those_of_peft():
    peft = pytest.importorskip("peft")
    ours, theirs = quantize_model(llama()), llama()
    for name, m in list(theirs.named_modules()):
        if type(m) is nn.Linear and name != "lm_head":
            theirs.set_submodule(name, linear4bit(m, torch.float32))
    theirs.is_loaded_in_4bit = True
    ours = add_lora(ours, LoraConfig(r=4, alpha=8, dropout=0)).train()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj")).train()
    kinds = {type(m).__name__ for m in theirs.modules() if "lora" in type(m).__module__}
    assert "Linear4bit" in kinds
    g = torch.Generator().manual_seed(1)
    grads = {}
    for n, p in ours.named_parameters():
        if not p.requires_grad: continue
        layer, _, factor = n.rpartition(".")
        other = theirs.get_parameter(f"base_model.model.{layer}.lora_{factor}.default.weight")
        p.data.copy_(0.1*torch.randn(p.shape, generator=g))
        other.data.copy_(p.data)
        grads[n] = p, other
    assert len(grads) == 2*7*2
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
    for loss in losses: loss.backward()
    assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for name, (a, b) in grads.items(): assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7), name


def test_nothing_of_a_weights_size_is_kept():
    q = quantize(torch.randn(256, 128))
    sizes = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t,
                                                     lambda t: t)
    with watch:
        frozen_linear(torch.randn(3, 128, requires_grad=True), q)
    assert sizes == []
    experts = QExperts.from_experts(moe(Qwen2MoeForCausalLM)[0].model.layers[0].mlp.experts)
    x, chosen = torch.randn(7, 64, requires_grad=True), torch.randint(0, 4, (7, 2))
    with watch:
        experts(x, chosen, torch.rand(7, 2))
    assert max(sizes) <= 7*2*64


def test_checkpointing_and_copies():
    torch.manual_seed(0)
    body = nn.Sequential(*[QLinear.from_linear(nn.Linear(64, 64)) for _ in range(3)])
    x = torch.randn(4, 64, requires_grad=True)
    plain, = torch.autograd.grad(body(x).square().sum(), x)
    for reentrant in True, False:
        x.grad = None
        checkpoint(body, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(x.grad, plain)
    assert torch.equal(deepcopy(body)(x), body(x))


def test_types_do_not_touch_the_scales():
    model = quantize_model(llama())
    before = {n: b.clone() for n, b in model.named_buffers() if "_proj" in n}
    assert before and any(n.endswith("nested_absmax") for n in before)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64),
                   lambda m: m.float(), deepcopy):
        model = change(model)
        after = {n: b for n, b in model.named_buffers() if "_proj" in n}
        assert equal(after, before)
        assert all(after[n].dtype == before[n].dtype for n in after)
    model = model.bfloat16()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


def test_empty_then_filled():
    full = quantize_model(llama(torch.bfloat16))
    with torch.device("meta"): empty = quantize_model(llama(torch.bfloat16))
    assert all(b.is_meta for n, b in empty.named_buffers() if "_proj" in n)
    layer = empty.model.layers[1].mlp.down_proj
    layer.load_qtensor(full.model.layers[1].mlp.down_proj.qtensor())
    assert torch.equal(layer.weight, full.model.layers[1].mlp.down_proj.weight)
    assert list(empty.state_dict()) == list(full.state_dict())
    empty.load_state_dict(full.state_dict(), assign=True)
    assert equal(empty.state_dict(), full.state_dict())


# ------------------------------------------------------------ files of others

FOUR = dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")


@cpu_only
@pytest.mark.parametrize("kind", VALUES)
def test_our_folder_loads_with_bitsandbytes(kind, tmp_path):
    ours = quantize_model(reloaded(tmp_path/"plain", torch.bfloat16), kind=kind)
    ours.save_pretrained(tmp_path/"ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"ours").train()
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)


@cpu_only
@pytest.mark.parametrize("kind, double", pairs(VALUES, (True, False)))
def test_a_bnb_4bit_checkpoint_loads_here(kind, double, tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path/"plain")
    four = FOUR | dict(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path/"plain", quantization_config=BitsAndBytesConfig(**four), dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path/"bnb")
    quantize_model(llama(torch.bfloat16), kind=kind, double=double).save_pretrained(tmp_path/"ours")
    stored = load_file(tmp_path/"bnb/model.safetensors")
    assert equal(stored, load_file(tmp_path/"ours/model.safetensors"))  # the same file, in short
    a, b = (json.loads((tmp_path/f/"config.json").read_text()) for f in ("bnb", "ours"))
    assert a["quantization_config"] == b["quantization_config"]
    with torch.device("meta"): empty = quantize_model(llama(torch.bfloat16), double=not double)
    empty.load_state_dict(stored, assign=True)
    assert empty.model.layers[0].mlp.up_proj.qtensor().double == double


def test_a_damaged_checkpoint_says_what_is_wrong():
    stored = quantize(weights((64, 64))).tensors("a.b.")
    for key, message in ((".absmax", "absmax: the tensor is missing"),
                         (".nested_absmax", "nested_absmax: the tensor is missing"),
                         (".nested_quant_map", "nested_quant_map: the tensor is missing"),
                         (".quant_map", "quant_map: the tensor is missing"),
                         ("", "a.b.weight: the tensor is missing")):
        left = {k: v for k, v in stored.items() if k != f"a.b.weight{key}"}
        with pytest.raises(FtkitError, match=message): QTensor.from_tensors(left, "a.b.")
    wrong = stored | {"a.b.weight": stored["a.b.weight"][:-1]}
    with pytest.raises(FtkitError, match=r"a.b.weight, codes: expected uint8 of shape \(2048, 1\)"):
        QTensor.from_tensors(wrong, "a.b.")


# ------------------------------------------------------------ eight bits

@cpu_only
def test_eight_bits_are_those_of_transformers(tmp_path):
    ours = quantize_model(reloaded(tmp_path/"plain", torch.float16), bits=8)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"plain", quantization_config=eight,
                                                  dtype=torch.float16)
    assert type(ours.model.layers[0].mlp.up_proj) is bnb.nn.Linear8bitLt
    assert type(ours.lm_head) is nn.Linear
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.equal(a, b), name
    assert_close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits, rtol=0, atol=0)
    assert ours.config.quantization_config["load_in_8bit"]
    tuned = add_lora(ours.float(), LoraConfig(r=4, alpha=8)).train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in tuned.named_parameters() if n.endswith(".B")]
    assert all(g is not None and g.count_nonzero() for g in grads)


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(FtkitError, match="Use 4 or 8"): quantize_model(llama(), bits=2)


# ------------------------------------------------------------ experts

def moe(kind, implementation="eager", dtype=torch.float32):
    torch.manual_seed(0)
    common = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = {
        MixtralForCausalLM: lambda: MixtralConfig(**SIZES, num_local_experts=4,
                                                  num_experts_per_tok=2),
        Qwen2MoeForCausalLM: lambda: Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=64, decoder_sparse_step=1),
        DeepseekV2ForCausalLM: lambda: DeepseekV2Config(
            **SIZES | dict(num_key_value_heads=4), n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, n_shared_experts=1, kv_lora_rank=32, q_lora_rank=None,
            qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=0,
            n_group=None, topk_group=None, topk_method="greedy"),
        GptOssForCausalLM: lambda: GptOssConfig(**common, intermediate_size=64, head_dim=16,
                                                num_local_experts=4, num_experts_per_tok=2),
    }[kind]()
    config._experts_implementation = implementation
    model = kind(config).to(dtype)
    for p in model.parameters(): nn.init.normal_(p, std=0.05)
    return model, [n for n, m in model.named_modules() if is_experts(m)]


MIXTURES = MixtralForCausalLM, Qwen2MoeForCausalLM, DeepseekV2ForCausalLM, GptOssForCausalLM


@pytest.mark.parametrize("implementation", ("eager", "grouped_mm", "batched_mm"))
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_those_of_transformers(kind, implementation):
    model, names = moe(kind, implementation)
    assert len(names) == 2
    quantize_model(model)
    assert all(isinstance(model.get_submodule(n), QExperts) for n in names)
    plain = dequantize_model(deepcopy(model))
    assert [n for n, m in plain.named_modules() if is_experts(m)] == names
    results = []
    for m in model, plain:
        embeds = m.get_input_embeddings()(IDS).detach().requires_grad_()
        out = m(inputs_embeds=embeds, labels=IDS)
        out.loss.backward()
        routers = [p.grad for n, p in m.named_parameters()
                   if n.endswith((".gate.weight", ".router.weight"))]
        results.append([out.logits, embeds.grad, *routers])
    assert len(results[0]) == 4
    for a, b in zip(*results): assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_experts_take_four_bits():
    model, names = moe(MixtralForCausalLM)
    before = sum(p.numel() for n in names for p in model.get_submodule(n).parameters())
    quantize_model(model)
    held = sum(b.nbytes for n in names for b in model.get_submodule(n).buffers())
    assert 4.12 < 8*held/before < 4.2
    assert not [n for n, p in model.named_parameters() if p.ndim == 3]


def test_experts_in_bfloat16_and_autocast():
    model, names = moe(Qwen2MoeForCausalLM, dtype=torch.bfloat16)
    quantize_model(model)
    plain = dequantize_model(deepcopy(model))
    a, b = (m.get_submodule(names[0]) for m in (model, plain))
    x, chosen = torch.randn(11, 64, dtype=torch.bfloat16), torch.randint(0, 4, (11, 2))
    weights = torch.rand(11, 2)
    assert a(x, chosen, weights).dtype == torch.bfloat16
    assert_close(a(x, chosen, weights), b(x, chosen, weights), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(a(x.float(), chosen, weights), b(x.float(), chosen, weights),
                     rtol=2e-2, atol=2e-2)


def test_an_adapter_can_wrap_an_experts_projection():
    model, names = moe(Qwen2MoeForCausalLM)
    experts = quantize_model(model).get_submodule(names[0])
    A, B = torch.randn(4, 2, 64)*0.1, torch.randn(4, 64, 2)*0.1
    plain = experts.to_experts()
    plain.gate_up_proj.data += B @ A
    gate_up = experts.gate_up
    experts.gate_up = lambda x, e: gate_up(x, e) + x @ A[e].T @ B[e].T
    x, chosen, weights = torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    assert_close(experts(x, chosen, weights), plain(x, chosen, weights), rtol=1e-4, atol=1e-5)


def test_experts_through_a_file(tmp_path):
    experts = QExperts.from_experts(moe(MixtralForCausalLM)[0].model.layers[0].mlp.experts)
    save_file(experts.state_dict(), tmp_path/"x.safetensors")
    with torch.device("meta"):
        empty = QExperts.from_experts(moe(MixtralForCausalLM)[0].model.layers[0].mlp.experts)
    empty.load_state_dict(load_file(tmp_path/"x.safetensors"), assign=True)
    assert equal(empty.state_dict(), experts.state_dict())


def test_experts_that_do_not_divide_into_blocks_are_named():
    model, _ = moe(Qwen2MoeForCausalLM)
    with pytest.raises(FtkitError, match="mlp.experts, block: one expert has 64·32 = 2048"):
        quantize_model(nn.ModuleDict({"mlp": model.model.layers[0].mlp}), block=4096)
