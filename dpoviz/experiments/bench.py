"""Time dpoviz against a peer on the same model and pairs, in turn; report medians with their range."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.beta import BetaNetwork
from dpoviz.data.records import load_pairs
from dpoviz.data.tokens import IDS, token_counts, tokenize_pairs
from dpoviz.experiments.config import TABLES, BenchConfig, WorldConfig
from dpoviz.experiments.real import load, score
from dpoviz.experiments.small import small_world
from dpoviz.lm.forward import CompiledLayers, predict_shared
from dpoviz.lm.models import tiny_tokenizer
from dpoviz.lm.packing import PrefixBatch, by_length, prefix_batch
from dpoviz.lm.processes import hidden, map_ahead, processes
from dpoviz.lm.sampling import sampling
from dpoviz.lm.scoring import context_length, lay_out_ahead, score_answers
from dpoviz.losses import Logps, dpo_loss, total_loss
from dpoviz.training.config import TrainConfig, alpha_for_mean
from dpoviz.training.state import adamw

PEER, PLAIN, OURS, LEARNED = "TRL DPOTrainer", "concatenated", "dpoviz, fixed β", "dpoviz, β(x) and four terms"
INSIDE = "TRL, shared prefix"
"""The methods whose training step is timed."""

COMPILED = ", compiled"
"""End of the name of a method whose layers are compiled."""

ALONE = "β(x) and its terms alone"
"""What a step adds to that of a fixed β: timed alone, because it is smaller than the noise of whole steps."""


def bench_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scored: Dataset,
    *,
    batch_size: int,
    repeats: int,
    max_length: int,
    compiled: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Time a DPO training step on the pairs of each task: forward, backward, clipping and AdamW on all weights.

    All methods use the same pairs in the same order and the same weights, which a learning rate of 0 leaves unchanged.
    The losses of those with a fixed β must agree.

    Args:
        model: a causal language model in float32 or bfloat16, on its device.
        tokenizer: its tokenizer.
        scored: pairs scored by `reference_pass`.
        batch_size: pairs per step, sampled from those of each task.
        repeats: timed steps of each method, in turn, after an untimed one; memory is measured in one more.
        max_length: length at which TRL truncates, in tokens; no pair is longer.
        compiled: also time TRL's step and ours with compiled layers.
        progress: show a bar.

    Returns:
        A row per task and method: task, who (the method), pairs, tokens (each prompt and answer once), seconds
        (median), low, high, pairs_per_second, operations (needed operations per second), ratio (TRL's time over this
        method's, median over repeats; NaN without TRL), over_fixed (this method's time over that of dpoviz with a
        fixed β, median over repeats), memory (peak increase, MiB), loss. `ALONE` is a part of a step:
        pairs_per_second, operations and ratio are NaN.

    Raises:
        FloatingPointError: the losses differ by more than rounding in float32 or bfloat16: the methods do not do the
            same work.
    """
    rows = []
    for task in sorted(set(scored["task"])):
        pairs = scored.filter(lambda row, task=task: row["task"] == task).shuffle(seed=0).select(range(batch_size))
        steps = _contestants(model, tokenizer, pairs, max_length, compiled)
        taken = _in_turn(steps, repeats, model.device, f"training steps, {task}" if progress else None)
        tolerance = 1e-4 if model.dtype == torch.float32 else 0.03
        other = (LEARNED, LEARNED + COMPILED, ALONE)
        same = {who: measured.result for who, measured in taken.items() if who not in other}
        if max(same.values()) - min(same.values()) > tolerance:
            raise FloatingPointError(f"{task}: the losses differ, {same}; expected the same work")
        prompts, answers = pairs["prompt_ids"][:], _answers(pairs[:])
        needed = 3 * forward_operations(model, prompts, answers)
        for who, measured in taken.items():
            seconds = measured.seconds
            rival = PEER + COMPILED * who.endswith(COMPILED)
            peer = taken[rival].seconds if rival in taken else []
            ratios = [a / b for a, b in zip(peer, seconds, strict=False)] if who != ALONE else []
            whole = 1 / statistics.median(seconds) if who != ALONE else float("nan")  # steps per second
            over = [b / a for a, b in zip(taken[OURS].seconds, seconds, strict=True)]
            rows.append(
                {
                    "task": task,
                    "who": who,
                    "pairs": batch_size,
                    "tokens": _tokens(prompts, answers),
                    "seconds": statistics.median(seconds),
                    "low": min(seconds),
                    "high": max(seconds),
                    "pairs_per_second": batch_size * whole,
                    "operations": needed * whole,
                    "ratio": statistics.median(ratios) if ratios else float("nan"),
                    "over_fixed": statistics.median(over),
                    "memory": measured.memory,
                    "loss": measured.result,
                }
            )
        del steps
        gc.collect()
    return pd.DataFrame(rows)


def _contestants(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int, compiled: bool = False
) -> dict[str, Callable[[], float]]:
    rows = pairs[:]
    prompts, answers, device = rows["prompt_ids"], _answers(rows), model.device

    def column(name: str) -> Tensor:
        return torch.tensor(rows[name], dtype=torch.float32, device=device)

    ref, x, entropy = [column("ref_chosen_logps"), column("ref_rejected_logps")], column("ref_features"), column(
        "ref_entropy"
    )  # fmt: skip
    config = TrainConfig.around(0.1, "standard")
    alpha = alpha_for_mean(rows["ref_entropy"], config.beta0)
    network = BetaNetwork(x.shape[1], beta0=config.beta0).to(device)
    if len(x) > 1:
        network.fit_running_statistics(x)

    pad_id = tokenizer.pad_token_id

    def lay_out(_: None) -> PrefixBatch:
        rows = lay_out_ahead(model, prompts, answers, pad_id)
        return rows.pinned() if device.type == "cuda" else rows

    laid_out = map_ahead(lay_out, repeat(None))  # by another thread, as in training

    def scored(shared: bool) -> Sequence[Tensor]:
        ahead = next(laid_out) if shared else None
        scores = score_answers(model, prompts, answers, pad_id=pad_id, shared_prefix=shared, laid_out=ahead)
        return scores.logps.unbind(dim=1)

    def fixed(shared: bool) -> Callable[[], Tensor]:
        beta = torch.full_like(ref[0], 0.1)
        return lambda: dpo_loss(*Logps(*scored(shared), *ref), beta, form="standard").losses.mean()

    def learned(logps: Sequence[Tensor]) -> Tensor:
        network.train()
        return total_loss(
            Logps(*logps, *ref),
            network(x),
            form="standard",
            regularization=config.regularization(alpha),
            ref_entropy=entropy,
            beta_fn=network,
            x=x,
            task=rows["task"],
        ).total

    def stepping(loss: Callable[[], Tensor], *modules: nn.Module) -> Callable[[], float]:
        optimizers = [adamw(module, 0.0) for module in modules]

        def step() -> float:
            model.train()
            value = loss()
            value.backward()
            for module, optimizer in zip(modules, optimizers, strict=True):
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            return value.item()

        return step

    trainers: dict[str, Callable[..., Callable[[], float] | None]] = {
        PEER: _trl,
        INSIDE: partial(_trl, shared_prefix=True),
    }
    peers = {who: make(model, tokenizer, pairs, max_length) for who, make in trainers.items()}
    calls = {who: step for who, step in peers.items() if step is not None} | {
        PLAIN: stepping(fixed(False), model),
        OURS: stepping(fixed(True), model),
        LEARNED: stepping(lambda: learned(scored(True)), model, network),
        ALONE: stepping(lambda: learned(ref), network),
    }
    if compiled:
        layers = CompiledLayers(model)
        calls |= {who + COMPILED: _inside(layers, calls[who]) for who in (PEER, OURS, LEARNED) if who in calls}
    return calls


def _inside(layers: CompiledLayers, call: Callable[[], float]) -> Callable[[], float]:
    def inside() -> float:
        with layers:
            return call()

    return inside


def _trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    max_length: int,
    shared_prefix: bool = False,
) -> Callable[[], float] | None:
    """Return a step of TRL's trainer, with precomputed reference log-probabilities; None if TRL is not installed.

    With `shared_prefix` it is that of `BetaDPOTrainer`, on shared-prefix rows.
    """
    try:
        import trl
    except ImportError:
        return None
    from dpoviz.trl import BetaDPOTrainer, trl_dataset

    settings = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(pairs), learning_rate=0.0, weight_decay=0.0,
        beta=0.1, max_length=max_length, precompute_ref_log_probs=True, gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16, report_to=[], disable_tqdm=True, dataloader_num_workers=0,
        use_cpu=model.device.type == "cpu",
    )  # fmt: skip
    counts = token_counts(pairs)
    longest = int((counts[:, 0] + counts[:, 1:].max(axis=1)).argmax())  # its rows are tried at this length
    data = trl_dataset(pairs).select_columns(["prompt", "chosen", "rejected"]).select([longest])
    make: Any = partial(BetaDPOTrainer, shared_prefix=True) if shared_prefix else trl.DPOTrainer
    trainer = make(model, args=settings, train_dataset=data, processing_class=tokenizer)
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as trainer.train() sets it
    # our tokens and our reference's scores: the losses agree only if TRL scores exactly these
    rows = pairs.select_columns([*IDS, "ref_chosen_logps", "ref_rejected_logps"]).to_list()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def step() -> float:
        loss = trainer.training_step(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


_KINDS = {
    "matrix": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "attention": ("attention",),
    "optimizer": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
}
"""Parts of the names of operators, by the kind of work."""


def profile_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scored: Dataset,
    *,
    batch_size: int,
    max_length: int,
    compiled: bool = False,
    steps: int = 3,
) -> pd.DataFrame:
    """Profile the training steps of `bench_steps` on pairs of all tasks together.

    Returns:
        A row per method: who, seconds (per step, under the profiler, which slows down a CPU), gpu (seconds that the GPU
        computed), copies (seconds that it copied between itself and the CPU), gpu_share (gpu over seconds), host
        (seconds in which the GPU did neither), kernels (launched per step); and the shares of the operators' own time,
        on a GPU that of its kernels: matrix, attention, optimizer, other, and top, the three operators with the most
        time. On a CPU gpu, copies and kernels are 0.
    """
    pairs = scored.shuffle(seed=0).select(range(batch_size))
    calls = _contestants(model, tokenizer, pairs, max_length, compiled)
    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    rows = []
    for who, call in calls.items():
        for _ in range(2):
            call()
        _wait(model.device)
        with profile(activities=activities) as found:
            began = time.perf_counter()
            for _ in range(steps):
                call()
            _wait(model.device)
            seconds = (time.perf_counter() - began) / steps
        rows.append({"who": who, "seconds": seconds, **_profiled(found, seconds, steps, on_gpu)})
    return pd.DataFrame(rows)


def _profiled(found: profile, seconds: float, steps: int, on_gpu: bool) -> dict[str, Any]:
    kernels = [event for event in found.events() or [] if event.device_type == DeviceType.CUDA]
    copied = [event for event in kernels if "memcpy" in event.name.lower()]
    took, copies = (1e-6 * sum(e.time_range.elapsed_us() for e in some) / steps for some in (kernels, copied))
    own: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # operators; a GPU's kernels are counted where they were launched
            kind = next((k for k, parts in _KINDS.items() if any(part in event.key for part in parts)), "other")
            took_itself = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            own[kind] += took_itself
            operators[event.key.removeprefix("aten::")] += took_itself
    whole = sum(own.values()) or 1
    shares: dict[str, Any] = {kind: own[kind] / whole for kind in (*_KINDS, "other")}
    shares["top"] = ", ".join(f"{name} {value / whole:.0%}" for name, value in operators.most_common(3))
    gpu = took - copies
    host = max(0.0, seconds - took)
    launched = (len(kernels) - len(copied)) / steps
    return {"gpu": gpu, "copies": copies, "gpu_share": gpu / seconds, "host": host, "kernels": launched, **shares}


@torch.no_grad()
def bench_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    batch_size: int,
    repeats: int,
    progress: bool = True,
) -> pd.DataFrame:
    """Time the scoring of log-probabilities, entropies and prompt features against a bare forward of the same tokens.

    The bare forward runs the model's layers on the same shared-prefix rows, and its head where an answer is predicted.

    Returns:
        Two rows: who, seconds (for all pairs, median over repeats), low, high, tokens_per_second, operations (needed
        operations per second), ratio (time over that of the bare forward, median over repeats), memory (MiB).
    """
    rows = pairs[:]
    answers, length = _answers(rows), token_counts(pairs).sum(axis=1).tolist()
    batches = by_length(length, batch_size)
    pad = tokenizer.pad_token_id

    def bare() -> None:
        for some in batches:
            batch = prefix_batch([rows["prompt_ids"][i] for i in some], [answers[i] for i in some], pad)
            batch = batch.to(model.device)
            found = predict_shared(model, batch)
            for part in found.states.split(512):
                found.head(part)

    def ours() -> None:
        for some in batches:
            score_answers(model, [rows["prompt_ids"][i] for i in some], [answers[i] for i in some], pad_id=pad,
                          entropy=True, features=True, shared_prefix=True)  # fmt: skip

    model.eval()
    said = "reference pass" if progress else None
    found = _in_turn({"bare forward": bare, "reference pass": ours}, repeats, model.device, said)
    work = (rows["prompt_ids"], answers)
    return _rows(found, "bare forward", tokens_per_second=_tokens(*work), operations=forward_operations(model, *work))


def bench_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, samples: int,
    new_tokens: int, repeats: int, at_once: Sequence[int] = (4, 8), compiled: bool = False, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Time entropies from sampled answers against `generate` alone, which gives no entropies.

    No answer ends before `new_tokens`, so that both sample the same number of tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: token ids.
        samples: answers per prompt.
        new_tokens: tokens per answer.
        repeats: timed calls of each, after an untimed one.
        at_once: batch sizes to try, in prompts.
        compiled: also time both with a cache of fixed size, for which `transformers` compiles the step on a GPU.

    Returns:
        A row per method and batch size: who, prompts (per batch), seconds (median), low, high, tokens_per_second (of
        the answers), operations (needed operations per second), ratio (time over that of `generate` at its best batch
        size), memory (MiB).
    """
    pad = tokenizer.pad_token_id
    config: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": new_tokens, "pad_token_id": pad,
                              "min_new_tokens": new_tokens, "num_return_sequences": samples}  # fmt: skip
    prompts = sorted(prompts, key=len)
    generate: Any = model.generate

    def parts(n: int) -> list[Sequence[Sequence[int]]]:
        return [prompts[start : start + n] for start in range(0, len(prompts), n)]

    @torch.no_grad()
    def peer(n: int, static: bool) -> None:
        settings = GenerationConfig(**config, cache_implementation="static" if static else None)
        for some in parts(n):
            width = max(map(len, some))
            ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in some], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=model.device)
            generate(input_ids=ids, attention_mask=mask, generation_config=settings)

    @torch.no_grad()
    def ours(n: int, static: bool) -> None:
        ends: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_id": None, "pad_id": pad, "static_cache": static}
        with sampling(model, prompts, samples, **ends, seed=0, scores=True) as sampler:
            for some in parts(n):
                sampler.draw(some)

    model.eval()
    calls = {(who + COMPILED * static, n): partial(call, n, static) for static in (False, True)[: 1 + compiled]
             for n in at_once for who, call in (("generate alone", peer), ("answers and entropies", ours))}  # fmt: skip
    taken = _in_turn(calls, repeats, model.device, "sampling" if progress else None)
    best = min((key for key in taken if key[0].startswith("generate alone")), key=lambda key: min(taken[key].seconds))
    tokens = len(prompts) * samples * new_tokens
    needed = forward_operations(model, prompts, [[[i] * new_tokens for i in range(samples)]] * len(prompts))
    rows = _rows(taken, best, tokens_per_second=tokens, operations=needed)
    rows[["who", "prompts"]] = rows["who"].to_list()
    return rows[["who", "prompts", *rows.columns[1:-1]]]


def bench_pairs(
    counts: Sequence[int] = (100, 1_000, 10_000, 100_000), *, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Measure time and memory of everything but the model, on generated pairs of about 600 characters.

    Returns:
        A row per number of pairs: pairs; read, tokens and batches (microseconds per pair to load and check, to
        tokenise, and to pack into batches of 32); memory (peak increase, MiB).
    """
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(300)]

    def text(n: int) -> str:
        return " ".join(draw.choices(words, k=n))

    def lay_out(pairs: Dataset) -> None:
        for start in range(0, len(pairs), 32):
            rows = pairs[start : start + 32]
            prefix_batch(rows["prompt_ids"], _answers(rows), 0)

    tokenizer = tiny_tokenizer([text(200) for _ in range(20)])
    rows = []
    for count in tqdm(counts, desc="growth with pairs", unit="number", disable=hidden(progress)):
        with tempfile.TemporaryDirectory() as folder, _memory(torch.device("cpu")) as peak:
            path, seconds = Path(folder) / "pairs.jsonl", []
            with path.open("w") as file:
                for i in range(count):
                    row = {"prompt": f"{i} {text(20)}", "chosen": text(30), "rejected": text(25), "task": "math"}
                    file.write(json.dumps(row) + "\n")
            found: object = path
            for part in (load_pairs, partial(tokenize_pairs, tokenizer=tokenizer, max_length=4096), lay_out):
                seconds.append(time.perf_counter())
                found = part(found)
            seconds.append(time.perf_counter())
            each = [1e6 * (b - a) / count for a, b in pairwise(seconds)]
            rows.append({"pairs": count, "read": each[0], "tokens": each[1], "batches": each[2], "memory": peak()})
    return pd.DataFrame(rows)


def bench_lengths(
    model: PreTrainedModel, pad_id: int, *, repeats: int, longest: int = 256, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Time forward and backward passes of two random pairs whose prompts and answers have equal lengths, by length.

    Args:
        model: a causal language model.
        pad_id: id of the padding token.
        repeats: timed calls of each, after an untimed one.
        longest: tokens of the longest prompt, and of each of its answers.
        seed: random seed of the tokens.
        progress: show a bar.

    Returns:
        A row per length: length, tokens (computed), seconds (median), low, high, microseconds_per_token, operations
        (per second), memory (MiB).
    """
    some, longest = _random_tokens(model, longest, seed)
    lengths = [longest // 8, longest // 4, longest // 2, longest]
    growing = {n: (some(2, n), some(2, 2, n)) for n in lengths}
    return _growth(model, pad_id, "length", growing, repeats, progress).drop(columns="ratio")


def bench_shared_prompts(
    model: PreTrainedModel, pad_id: int, *, repeats: int, longest: int = 256, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Time forward and backward passes of eight random pairs by the number of different prompts.

    Args:
        model: a causal language model.
        pad_id: id of the padding token.
        repeats: timed calls of each, after an untimed one.
        longest: twice the tokens of a prompt, and eight times those of an answer.
        seed: random seed of the tokens.
        progress: show a bar.

    Returns:
        A row per number of different prompts: prompts, tokens and the columns of `bench_lengths`, with ratio (time over
        that of eight prompts, median over repeats).
    """
    some, longest = _random_tokens(model, longest, seed)
    prompts, answers = some(8, longest // 2), some(8, 2, longest // 8)
    sharing = {n: ([prompts[i % n] for i in range(8)], answers) for n in (8, 4, 2, 1)}
    return _growth(model, pad_id, "prompts", sharing, repeats, progress)


def _random_tokens(model: PreTrainedModel, longest: int, seed: int) -> tuple[Callable[..., list], int]:
    """Return a function that draws tokens of a shape, and the longest length of which twice fits the context."""
    draw = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings

    def some(*shape: int) -> list:
        return torch.randint(vocabulary, shape, generator=draw).tolist()

    return some, min(longest, (context_length(model) or 2 * longest) // 2)


def _growth(
    model: PreTrainedModel, pad_id: int, name: str, batches: dict[int, tuple], repeats: int, progress: bool
) -> pd.DataFrame:
    def step(batch: tuple) -> None:
        score_answers(model, *batch, pad_id=pad_id).logps.sum().backward()
        model.zero_grad()

    calls = {n: partial(step, batch) for n, batch in batches.items()}
    taken = _in_turn(calls, repeats, model.device, f"growth with {name}" if progress else None)
    table = _rows(taken, next(iter(calls)))
    table.insert(1, "tokens", [_tokens(*batch) for batch in batches.values()])
    table.insert(5, "microseconds_per_token", 1e6 * table["seconds"] / table["tokens"])
    needed = [3 * forward_operations(model, *batch) for batch in batches.values()]
    table.insert(6, "operations", needed / table["seconds"])
    return table.rename(columns={"who": name})


@torch.no_grad()
def bench_vocabulary(
    sizes: Sequence[int] = (49_152, 100_000, 150_000), *, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Time the reference's scores as the vocabulary grows: 16 prompts with two answers each, a model of width 64.

    Returns:
        A row per size: vocabulary, tokens, seconds, all_logits (MiB of all logits together), memory (peak increase,
        MiB).
    """
    rows = []
    for size in tqdm(sizes, desc="growth with the vocabulary", unit="size", disable=hidden(progress)):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=512)  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        prompts = torch.randint(size, (16, 60)).tolist()
        answers = torch.randint(size, (16, 2, 100)).tolist()
        score_answers(model, prompts[:1], answers[:1], pad_id=0)  # untimed: tries shared prefixes
        with _memory(torch.device("cpu")) as peak:
            began = time.perf_counter()
            score_answers(model, prompts, answers, pad_id=0, entropy=True, features=True)
            seconds = time.perf_counter() - began
        tokens = 16 * 2 * 100
        row = {"vocabulary": size, "tokens": tokens, "seconds": seconds, "all_logits": tokens * size * 4 / 2**20}
        rows.append({**row, "memory": peak()})
        del model
        gc.collect()
    return pd.DataFrame(rows)


def run_bench(config: BenchConfig, out: Path, *, cache_dir: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the tables of `bench` as they are finished, and save each in the folder as <name>.csv.

    Raises:
        ValueError: fewer pairs of a task than a batch, or as `experiments.real.load`.
    """
    if config.data:
        loaded = load(config.real())
        model, tokenizer, pairs = loaded.model, loaded.tokenizer, loaded.train
        limit = config.max_length
    else:
        world = small_world(WorldConfig(seed=config.seed), cache_dir=cache_dir)
        model, tokenizer, pairs = world.reference, world.tokenizer, world.train
        limit = model.config.max_position_embeddings
    few = [task for task, n in Counter(pairs["task"]).items() if n < config.batch_size]
    if few:
        raise ValueError(f"batch_size: got {config.batch_size}, but there are fewer pairs to train on of {few}")
    out.mkdir(parents=True, exist_ok=True)
    place: Any = _device(config.device)  # an annotation of transformers hides that a device will do
    model.to(place)
    model.to(getattr(torch, config.dtype))
    if config.data:
        pairs = score(config.real(), loaded, cache_dir=cache_dir).train
    names = ("batch_size", "repeats", "tables")
    sizes: dict[str, Any] = {"max_length": limit, "compiled": config.compile}
    sizes |= {name: getattr(config, name) for name in names}
    for name, table in bench(model, tokenizer, pairs, **sizes):
        table.to_csv(out / f"{name.replace(' ', '-')}.csv", index=False)
        yield name, table


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but PyTorch finds no GPU; expected auto or cpu")
    return processes().device if name == "auto" else torch.device(name, 0) if name == "cuda" else torch.device(name)


def bench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scored: Dataset,
    *,
    batch_size: int,
    repeats: int,
    max_length: int,
    samples: int = 4,
    new_tokens: int = 32,
    compiled: bool = False,
    tables: Sequence[str] = TABLES,
    progress: bool = True,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the table of each measurement, on one model and one set of scored pairs.

    Tables that time the model have a column share_of_matrix_rate: the needed operations per second
    (`forward_operations`) over the machine's `matrix_rate`.
    """
    mixed = scored.shuffle(seed=0)  # of all tasks
    some = mixed.select(range(min(len(mixed), 4 * batch_size)))
    on_gpu = model.device.type == "cuda"
    # a GPU samples from hundreds of prompts in the time of a few
    few, at_once = (512, (32, 512)) if on_gpu else (8, (4, 8))
    prompts = list({tuple(ids): list(ids) for ids in mixed["prompt_ids"]}.values())[:few]
    often: dict[str, Any] = {"repeats": repeats, "progress": progress}
    seldom = often | {"repeats": min(repeats, 3)}
    size: dict[str, Any] = {"batch_size": batch_size}
    step: dict[str, Any] = {**size, "max_length": max_length, "compiled": compiled}
    sampled: dict[str, Any] = {"samples": samples, "new_tokens": new_tokens, "at_once": at_once, "compiled": compiled}
    rate = matrix_rate(model.device, model.dtype, size=8192 if on_gpu else 2048)

    def shared(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(share_of_matrix_rate=table["operations"] / rate).drop(columns="operations")

    makers: dict[str, Callable[[], pd.DataFrame]] = {
        "steps": lambda: shared(bench_steps(model, tokenizer, scored, **step, **often)),
        "profile": lambda: profile_steps(model, tokenizer, scored, **step),
        "reference": lambda: shared(bench_reference(model, tokenizer, some, **size, **often)),
        "sampling": lambda: shared(bench_sampling(model, tokenizer, prompts, **sampled, **seldom)),
        "lengths": lambda: shared(bench_lengths(model, tokenizer.pad_token_id, **seldom)),
        "shared prompts": lambda: shared(bench_shared_prompts(model, tokenizer.pad_token_id, **seldom)),
        "pairs": lambda: bench_pairs(progress=progress),
        "vocabulary": lambda: bench_vocabulary(progress=progress),
    }
    for name in tables:
        yield name, makers[name]()


def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int = 2048, repeats: int = 5) -> float:
    """Return the floating-point operations per second of one large matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def forward_operations(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> float:
    """Return the floating-point operations that a forward pass needs; a training step needs three times as many.

    Counted once for each distinct prompt and each distinct answer to it: the linear layers on their tokens, the head
    where an answer is predicted, and attention to the tokens before.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    total = 0.0
    for prompt, own in _unique(prompts, answers).items():
        p, fed = len(prompt), [len(answer) - 1 for answer in own]
        seen = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in fed)
        total += 2 * linear * (p + sum(fed)) + 2 * head.weight.numel() * sum(map(len, own))
        total += 4 * config.num_hidden_layers * config.hidden_size * seen
    return total


def _unique(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt, own in zip(prompts, answers, strict=True):
        found.setdefault(tuple(prompt), set()).update(map(tuple, own))
    return found


def _tokens(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> int:
    """Return the number of tokens that the model must read: an answer's last one is only predicted."""
    unique = _unique(prompts, answers)
    return sum(len(prompt) + sum(len(answer) - 1 for answer in own) for prompt, own in unique.items())


def _answers(rows: Mapping[str, list]) -> list[list[list[int]]]:
    return [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]


class _Measured(NamedTuple):
    """The measurements of one method: seconds of each call, peak memory increase in MiB, last returned value."""

    seconds: list[float]
    memory: float
    result: Any


_Who = TypeVar("_Who", bound=Hashable)


def _in_turn(
    calls: Mapping[_Who, Callable[[], Any]], repeats: int, device: torch.device, said: str | None
) -> dict[_Who, _Measured]:
    """Time all calls in turn, each turn in a new order, after a turn that is not timed; `said` labels the bar.

    Memory is measured in an extra turn at the end: returning free memory first, so that the peak is visible, slows the
    allocations that follow.
    """
    seconds: dict[_Who, list[float]] = {who: [] for who in calls}
    memory, result = {}, {}
    order = random.Random(0)
    for turn in tqdm(range(repeats + 2), desc=said, unit="turn", disable=hidden(said is not None)):
        for who, call in order.sample(list(calls.items()), len(calls)):
            if turn <= repeats:
                gc.collect()
                began = time.perf_counter()
                call()
                _wait(device)
                if turn:
                    seconds[who].append(time.perf_counter() - began)
            else:
                with _memory(device) as peak:
                    result[who] = call()
                    _wait(device)
                memory[who] = peak()
    return {who: _Measured(seconds[who], memory[who], result[who]) for who in calls}


def _rows(taken: Mapping[_Who, _Measured], base: _Who, **amounts: float) -> pd.DataFrame:
    """Return a row per call; each of `amounts` of work becomes a column of work per second."""
    rows = []
    for who, (seconds, memory, _) in taken.items():
        ratios = [b / a for a, b in zip(taken[base].seconds, seconds, strict=True)]
        rows.append(
            {
                "who": who,
                "seconds": statistics.median(seconds),
                "low": min(seconds),
                "high": max(seconds),
                **{name: amount / statistics.median(seconds) for name, amount in amounts.items()},
                "ratio": statistics.median(ratios),
                "memory": memory,
            }
        )
    return pd.DataFrame(rows)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _memory(device: torch.device):
    """Yield a function that returns the peak increase of memory in MiB: allocated on a GPU, resident elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    page = os.sysconf("SC_PAGE_SIZE")
    resident = Path("/proc/self/statm")

    def now() -> int:
        return int(resident.read_text().split()[1]) * page

    _trim()
    before = peak = now()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.004):
            peak = max(peak, now())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: (peak - before) / 2**20
    finally:
        over.set()
        watcher.join()


def _trim() -> None:
    """Return free memory to the system if the C library can: what an earlier call left would hide a peak."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
