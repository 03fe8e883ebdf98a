"""Write a checkpoint of a well-known shape with random weights, and a toy tokenizer.

    python tools/make_checkpoint.py FOLDER llama3-8b
    python tools/make_checkpoint.py FOLDER llama3-70b-nf4      in four bits, 40 GB
    python tools/make_checkpoint.py FOLDER tiny --device cpu

For benchmarks without a network. Tensors are drawn and written one shard at a time, so a model may
be larger than the memory. The same seed gives the same weights on the same kind of device. A folder
that is complete is left alone. Behind -nf4 all layers have the same weights, in four bits as
bitsandbytes stores them: drawn and quantized once, and written as often as there are layers.
"""
import argparse, json, re, shutil, sys, time, zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LLAMA3 = dict(vocab_size=128256, rope_theta=500000., max_position_embeddings=8192)
LLAMA2 = dict(vocab_size=32000, max_position_embeddings=4096)
QWEN = dict(kind="qwen2", rope_theta=1e6, max_position_embeddings=32768)
MIXTRAL = dict(kind="mixtral", vocab_size=32000, num_local_experts=8, num_experts_per_tok=2)
# hidden, intermediate, layers, heads, heads of keys and values
SHAPES = {"llama3-8b": (4096, 14336, 32, 32, 8, LLAMA3),
          "llama3-70b": (8192, 28672, 80, 64, 8, LLAMA3),
          "llama2-7b": (4096, 11008, 32, 32, 32, LLAMA2),
          "qwen2.5-7b": (3584, 18944, 28, 28, 4, QWEN | dict(vocab_size=152064)),
          "qwen2.5-0.5b": (896, 4864, 24, 14, 2,
                           QWEN | dict(vocab_size=151936, tie_word_embeddings=True)),
          "mixtral-small": (1024, 3584, 8, 16, 4, MIXTRAL),
          "tiny": (64, 128, 2, 4, 2, dict(vocab_size=512))}
FOUR = "-nf4"


def config_of(shape):
    "The transformers configuration of a shape."
    from transformers import AutoConfig
    *numbers, more = SHAPES[shape.removesuffix(FOUR)]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")
    more = dict(tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2) | more
    kind = more.pop("kind", "llama")
    out = AutoConfig.for_model(kind, **dict(zip(names, numbers)), **more, dtype="bfloat16")
    out.architectures = [f"{kind.capitalize()}ForCausalLM"]
    if shape.endswith(FOUR):
        from ftkit.quant.qtensor import quantization_config
        out.quantization_config = quantization_config(4)
    return out


def layout(config):
    "(name, shape) of each tensor, as the authors' checkpoints have them: experts one by one."
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    skip = "lm_head.weight" if config.tie_word_embeddings else None
    for name, t in model.state_dict().items():
        if name == skip: continue
        if t.ndim < 3: yield name.replace("mlp.gate.", "block_sparse_moe.gate."), tuple(t.shape)
        else:
            at = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")[0]
            wide, deep = config.intermediate_size, config.hidden_size
            parts = dict(w2=(deep, wide))
            if "gate_up" in name: parts = dict(w1=(wide, deep), w3=(wide, deep))
            for e in range(len(t)):
                for k, shape in parts.items(): yield f"{at}.{e}.{k}.weight", shape


def draw(name, shape, seed, device):
    "Norms are ones, biases small, matrices normal with a deviation of 0.02."
    import torch
    if len(shape) == 1 and not name.endswith("bias"): return torch.ones(shape, dtype=torch.bfloat16)
    g = torch.Generator(device).manual_seed(seed*1_000_003 + zlib.crc32(name.encode()))
    t = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=g)
    return t.cpu()


def drawn(config, seed, device):
    "(name, tensor) of all that is to be written."
    four = getattr(config, "quantization_config", None)
    known = {}
    for name, shape in layout(config):
        inside = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        if not (four and inside): yield name, draw(name, shape, seed, device); continue
        at, part = inside.groups()
        if part not in known: known[part] = in_four_bits(draw(name, shape, seed, device), device)
        for end, t in known[part].items(): yield name + end, t


def in_four_bits(t, device):
    "The tensors of a matrix in four bits, by the ends of their names; others stay as they are."
    if t.ndim < 2: return {"": t}
    from ftkit.quant.qtensor import quantize
    return quantize(t.to(device)).to("cpu").tensors("", "")


def write_shards(folder, config, seed, device, limit):
    "All tensors, in files of at most `limit` bytes unless one is larger, none twice in a file."
    from safetensors.torch import save_file
    where, shard, size, files = {}, {}, 0, []

    def flush():
        files.append(f"model-{len(files) + 1:05}.safetensors")
        save_file(shard, folder/files[-1], metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, files[-1]))
        shard.clear()
    total = 0
    for name, t in drawn(config, seed, device):
        again = any(t is other for other in shard.values())
        if shard and (again or size + t.nbytes > limit): flush(); size = 0
        shard[name], size, total = t, size + t.nbytes, total + t.nbytes
    flush()
    index = dict(metadata=dict(total_size=total), weight_map=where)
    (folder/"model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def write_tokenizer(folder, words):
    "w4, w5, … are words."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8192,
                            **named).save_pretrained(folder)


def make(folder, shape, seed=0, device="cpu", limit=4*2**30):
    "Write a checkpoint unless it is there; its folder."
    folder = Path(folder)
    if (folder/"complete").exists(): return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, begin = config_of(shape), time.perf_counter()
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    size = write_shards(folder, config, seed, device, limit)
    (folder/"complete").write_text(f"{shape}, seed {seed}\n")
    print(f"{folder}: {size/1e9:.2f} GB in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return folder


def main():
    import torch
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("shape", choices=[*SHAPES, *(name + FOUR for name in SHAPES)])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to draw")
    args = parser.parse_args()
    make(args.folder, args.shape, args.seed, args.device)


if __name__ == "__main__": main()
