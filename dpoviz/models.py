"""Language models: the tiny one that is trained here, offline, in about a minute."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

PAD, EOS = "<pad>", "<eos>"
_IGNORED = -100  # the label that cross_entropy skips by default


def tiny_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from `texts`: reads any text, digits one by one, no download.

    Args:
        texts: what the merges are counted on.
        vocab_size: at least 258, the bytes and two special tokens; digits stay single.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size: came {vocab_size}, expected at least {len(alphabet) + 2}")
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def tiny_lm(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
) -> LlamaForCausalLM:
    """An untrained Llama of about a million parameters for `tokenizer`; the same weights for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        # wider weights and faster rotations than a large model's: both let the copying of a prompt's words and
        # numbers form within a thousand steps instead of several thousand
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fit_lm(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Ordinary language modelling: one pass over the demonstrations, cross-entropy on the answers and their end.

    AdamW, cosine schedule with a warm-up over the first 5 %, gradients clipped at norm 1. Batches hold answers
    of about the same length, so that little is padded; the order of the batches is drawn.

    Args:
        model: trained in place, in evaluation mode afterwards.
        demonstrations: (prompt, answer) texts.

    Returns:
        The loss of each step, in nats per token.
    """
    rows = _tokenize(tokenizer, demonstrations)
    batches = list(_batches(rows, batch_size, random.Random(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    model.train()
    losses = []
    bar = tqdm(batches, desc="reference: language modelling", unit="step", disable=not progress)
    for batch in bar:
        ids, labels = _collate(batch, tokenizer.pad_token_id)
        # padding is on the right, so a causal model needs no mask to be blind to it
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, demonstrations: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer([prompt for prompt, _ in demonstrations])["input_ids"]
    answers = tokenizer([answer for _, answer in demonstrations])["input_ids"]
    return [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def _batches(rows: list, size: int, rng: random.Random) -> Iterator[list]:
    """Rows of about one length together: sorted within pools of 32 batches, the pool's batches in drawn order."""
    rng.shuffle(rows)
    for start in range(0, len(rows), 32 * size):
        pool = sorted(rows[start : start + 32 * size], key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (pool[s : s + size] for s in starts)


def _collate(batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) + len(a) for p, a in batch)
    ids = [p + a + [pad_id] * (width - len(p) - len(a)) for p, a in batch]
    labels = [[_IGNORED] * len(p) + a + [_IGNORED] * (width - len(p) - len(a)) for p, a in batch]
    return torch.tensor(ids), torch.tensor(labels)
