"Toy tokenizers that have the special tokens of a family, and a tiny model."
import re
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from ftkit.data.families import template, template_names

FAMILIES = [n for n in template_names() if n not in ("tokenizer", "text")]
TOKEN = re.compile(r"<\|[^<>|'\n]+\|>|<｜[^<>｜'\n]+｜>|</?[^<>|/'\s]+>|\[gMASK\]|sop\b")
TEXTS = ["the sky is blue", "user assistant system", "What colour is the sky at night?", "天空"]


def special_tokens(name):
    "Those in the code of a template, and those at which it stops."
    t = template(name)
    return list(dict.fromkeys([*TOKEN.findall(t.jinja), *t.stop, t.bos]))


def toy(special=(), bos="<s>", eos="</s>", adds_bos=False, weak=(), metaspace=None,
        chat_template=None):
    "A tokenizer of bytes, or with `metaspace` (first, always) of pieces as in SentencePiece."
    special = list(dict.fromkeys(["<unk>", "<pad>", bos, eos, *special]))
    tok = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if metaspace:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        tok.decoder = decoders.Metaspace(prepend_scheme=metaspace)
        alphabet = ["\n", *map(chr, range(33, 127))]
    else:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=len(special) + 300, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False))
    if adds_bos: tok.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    out = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=bos, eos_token=eos,
                                  pad_token="<pad>", unk_token="<unk>")
    out.add_tokens([AddedToken(t, special=False) for t in weak])
    out.chat_template = chat_template
    return out


def family_toy(name, **kwargs):
    "A tokenizer for the family of that name."
    t = template(name)
    return toy(special_tokens(name), bos=t.bos or "<s>", eos=t.eos or "</s>", **kwargs)


SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny_llama(dtype=torch.float32, **kwargs):
    "The same random Llama each time, in eval mode."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | kwargs)).to(dtype).eval()
