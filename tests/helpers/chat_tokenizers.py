"""Tokenizers as the families of chat models have them, made offline from a few sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris and that of Italy is Rome.",
    "Question: what is 12 + 30? Answer: 42.",
    "user assistant system tool You are a helpful assistant.",
    "Paris.\n\nRome.\n",
] * 3

GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATED = LLAMA_3.replace("{{ bos_token }}", "{{ bos_token + 'Today is ' + strftime_now('%d %b %Y') + '.' }}")

PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% elif (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# the last turn's thoughts are kept, empty ones are written; the prompt opens them where thinking is asked for
QWEN_3 = (
    TOOLS + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set thought = '' %}{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<Assistant>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)

NO_END = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


def byte_level(special: Sequence[str], *, template: str | None, eos: str, bos: str | None = None, opens: bool = False):
    """Byte-level BPE: GPT-2, Llama 3, Qwen."""
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False),
    )
    return _finished(core, special, template, eos, bos, opens)


def sentencepiece(special: Sequence[str], *, template: str | None, eos: str, bos: str, prefix: bool):
    """BPE with a ▁ for each blank, over whole texts: Llama 2 and Phi 3 with one in front of a text, Gemma without."""
    core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    blank = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefix else blank
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=460, special_tokens=["<pad>", "<unk>", *bytes_], max_token_length=6, show_progress=False
        ),
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    found = _finished(core, special, template, eos, bos, opens=True)
    if not prefix:  # Gemma has runs of newlines among its added tokens
        found.add_tokens([AddedToken("\n\n", normalized=False)])
    return found


def _finished(core, special, template, eos, bos, opens):
    found = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", clean_up_tokenization_spaces=False)
    # special, but named nowhere: as the turns' tokens of Llama 3 and Phi 3 are
    names = dict.fromkeys([*special, eos, *([bos] if bos else [])])
    found.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    found.eos_token, found.chat_template = eos, template
    if bos:
        found.bos_token = bos
    if opens:
        found.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, found.convert_tokens_to_ids(bos))]
        )
    return found


def ends_every_text():
    """T5's way: an end token behind every text."""
    found = byte_level([], template=None, eos="</s>")
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", found.eos_token_id)]
    )
    return found


_TURNS = ("<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": lambda: byte_level(_TURNS, template=TOOLS + CHATML + GENERATION, eos="<|im_end|>"),
    "base-eos": lambda: byte_level(_TURNS, template=CHATML + GENERATION, eos="<|endoftext|>"),
    "llama-3": lambda: byte_level(
        _LLAMA_3, template=LLAMA_3, eos="<|end_of_text|>", bos="<|begin_of_text|>", opens=True
    ),
    "llama-3-dated": lambda: byte_level(
        _LLAMA_3, template=DATED, eos="<|end_of_text|>", bos="<|begin_of_text|>", opens=True
    ),
    "phi-3": lambda: sentencepiece(
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        template=PHI_3,
        eos="<|endoftext|>",
        bos="<s>",
        prefix=True,
    ),
    "llama-2": lambda: sentencepiece([], template=LLAMA_2, eos="</s>", bos="<s>", prefix=True),
    "gemma": lambda: sentencepiece(
        ["<start_of_turn>", "<end_of_turn>"], template=GEMMA, eos="<eos>", bos="<bos>", prefix=False
    ),
    "qwen-3": lambda: byte_level((*_TURNS, "<think>", "</think>"), template=QWEN_3, eos="<|im_end|>"),
    "no-generation-prompt": lambda: byte_level(_TURNS, template=CHATML, eos="<|im_end|>"),
    "always-generation-prompt": lambda: byte_level(
        _TURNS, template=CHATML + "{{ '<|im_start|>assistant\n' }}", eos="<|im_end|>"
    ),
    "deepseek": lambda: byte_level(
        ["<User>", "<Assistant>"], template=DEEPSEEK, eos="<end>", bos="<begin>", opens=True
    ),
    "no-end": lambda: byte_level([], template=NO_END, eos="<|endoftext|>"),
    "t5": ends_every_text,
}
"""A tokenizer of each family; "always-generation-prompt" puts one behind an answer too."""
