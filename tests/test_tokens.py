"""Prompt and answer are cut as TRL cuts them, begin once and end once, whatever family the tokenizer is of."""

import copy
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from datetime import datetime
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.as_trl import ANSWERS, QUESTIONS, assistant, by_trl, by_us, user
from helpers.chat_tokenizers import CHATML, FAMILIES, GENERATION, byte_level
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
from transformers.utils import chat_template_utils

from dpoviz.data import chat_templates, tokens
from dpoviz.data.chat_templates import DATE, Chat, render
from dpoviz.data.tokens import (
    IDS,
    answer_end,
    digest,
    encode_prompts,
    end_id,
    highest_ids,
    token_counts,
    tokenize_pairs,
)
from dpoviz.lm.reference import reference_pass
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_answers

SYSTEM = {"role": "system", "content": "Be brief."}


def ended(pid):
    """True of a process that has ended, also where nobody has asked for its status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def chats(rows):
    """A data set of (messages, chosen, rejected), in our columns."""
    return Dataset.from_list(
        [
            {"prompt": str(m), "messages": m, "chosen": c, "rejected": r, "line": i}
            for i, (m, c, r) in enumerate(rows, 1)
        ]
    )


def texts(rows):
    return Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r, "line": i} for i, (p, c, r) in enumerate(rows, 1)]
    )


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "dpoviz.data.tokens"]


@pytest.fixture(scope="module")
def family():
    """The tokenizer of a family; a fresh one each time."""
    return lambda name: FAMILIES[name]()


# --- as TRL ---------------------------------------------------------------------------------------------------------

TEXTS = ["Question: 12?\nAnswer:", "A: ", "The capital is Par", "Paris.\n", "12"]
TOOLS = '[{"name": "weather", "parameters": {"city": {"type": "string"}}}]'


def layouts(name):
    """The rows of each layout that TRL documents, for a family."""
    ends = FAMILIES[name]().eos_token
    own = [(c, f"{r}{ends}") for c, r in ANSWERS[:2]] + [(f"{c}{ends}", f"{r}{ends}") for c, r in ANSWERS[2:]]
    found = {
        "text": [{"prompt": p, "chosen": c, "rejected": r} for p in TEXTS for c, r in ANSWERS],
        "text with its end": [{"prompt": p, "chosen": c, "rejected": r} for p in TEXTS for c, r in own],
        "implicit text": [
            {"chosen": f"{p} {c}", "rejected": f"{p} {r}"}
            for p in ("Question: 12? Answer:", "It is")
            for c, r in (("Paris.", "Rome."), ("42", "no idea"))
        ],
    }
    if FAMILIES[name]().chat_template:
        chat = [
            {"prompt": p, "chosen": [assistant(c)], "rejected": [assistant(r)]} for p in QUESTIONS for c, r in ANSWERS
        ]
        found["chat"] = chat
        found["implicit chat"] = [
            {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
            for row in chat
            if len(row["prompt"]) == 1
        ]
        found["tools"] = [{**row, "tools": TOOLS} for row in chat]
        found["template variables"] = [{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in chat]
        if name not in ("gemma", "llama-2"):  # they refuse it
            found["system"] = [{**row, "prompt": [SYSTEM, *row["prompt"]]} for row in chat]
    return found


CASES = [(name, layout) for name in FAMILIES for layout in layouts(name)]


class TestAsTRL:
    """TRL 1.16 is the slow twin: its own preparation of the data, row by row, no line of ours in it."""

    @pytest.fixture(autouse=True)
    def same_day(self, monkeypatch):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DATE))

    @pytest.mark.parametrize(("name", "layout"), CASES)
    def test_ids(self, name, layout, family):
        tokenizer, rows = family(name), layouts(name)[layout]
        for row, ours, theirs in zip(rows, by_us(tokenizer, rows), by_trl(tokenizer, rows), strict=True):
            assert ours[0] == theirs[0], row
            for own, other in zip(ours[1:], theirs[1:], strict=True):
                if name == "no-end" and "text" not in layout:
                    # TRL lets such an answer end with the template's newline, which a sampled one need not have
                    assert tokenizer.decode(own) == tokenizer.decode(other).removesuffix("\n") + tokenizer.eos_token
                    continue
                assert own == other[: len(own)], row
                # what TRL has behind our end is what every answer has there
                assert tokenizer.decode(other[len(own) :]) in BEHIND.get(name, ("",))

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")  # TRL's settings name it so
    def test_ids_of_the_trainer_itself(self, tmp_path, family):
        trl = pytest.importorskip("trl")
        tokenizer, rows = family("llama-3"), layouts("llama-3")["system"]
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1)
        )  # fmt: skip
        given = {"report_to": [], "max_length": None, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        args = trl.DPOConfig(output_dir=str(tmp_path), **given)
        trainer = trl.DPOTrainer(
            model, copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        found = trainer.train_dataset
        assert [[found[name][i] for name in IDS] for i in range(len(rows))] == by_us(tokenizer, rows)


BEHIND = {
    **dict.fromkeys(("chatml", "base-eos", "qwen-3", "no-generation-prompt", "gemma"), ("", "\n")),
    "always-generation-prompt": ("", "\n<|im_start|>assistant\n"),
    "phi-3": ("", "\n<|endoftext|>", " \n<|endoftext|>"),
    "t5": ("</s>",),
}
"""What TRL trains behind the first end token; nothing in the families that are not named."""


# --- ends and begins ------------------------------------------------------------------------------------------------

END = {
    "chatml": "<|im_end|>", "base-eos": "<|im_end|>", "llama-3": "<|eot_id|>", "llama-3-dated": "<|eot_id|>",
    "phi-3": "<|end|>", "llama-2": "</s>", "gemma": "<end_of_turn>", "qwen-3": "<|im_end|>", "deepseek": "<end>",
    "no-generation-prompt": "<|im_end|>", "always-generation-prompt": "<|im_end|>", "no-end": "<|endoftext|>",
}  # fmt: skip


def stops_half_the_time(tokenizer, end):
    """A model that draws one token with probability ½ at every place, and all others alike."""
    model = PhiForCausalLM(
        PhiConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                  num_attention_heads=1, max_position_embeddings=256)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(end)] = math.log(len(tokenizer) - 1)
    return model


class TestEnds:
    @pytest.mark.parametrize("name", END)
    @pytest.mark.parametrize("own", ["", "{end}", "{end}\n", "{end}{end}", "{eos}", "{end} {eos}\n"])
    def test_a_chats_answer_ends_once_as_the_template_ends_it(self, name, own, family):
        tokenizer, end = family(name), END[name]
        own = own.format(end=end, eos=tokenizer.eos_token)
        pairs = tokenize_pairs(chats([([user("Hi?")], "Paris." + own, "Rome.")]), tokenizer, 500)
        number = tokenizer.convert_tokens_to_ids(end)
        for side in ("chosen_ids", "rejected_ids"):
            assert pairs[side][0][-1] == number and pairs[side][0].count(number) == 1
        assert end_id(pairs) == answer_end(tokenizer, [user("Hi?")]) == number
        bare = tokenize_pairs(chats([([user("Hi?")], "Paris.", "Rome.")]), tokenizer, 500)
        assert all(pairs[column][0] == bare[column][0] for column in IDS)

    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("own", ["", "{eos}", "{eos}\n", "{eos}{eos}"])
    def test_a_texts_answer_ends_once_with_the_tokenizers_end(self, name, own, family):
        tokenizer = family(name)
        row = ("Question: 1?\nAnswer:", " one" + own.format(eos=tokenizer.eos_token), " two")
        pairs = tokenize_pairs(texts([row]), tokenizer, 500)
        for side in ("chosen_ids", "rejected_ids"):
            assert pairs[side][0].count(tokenizer.eos_token_id) == 1
        assert end_id(pairs) == answer_end(tokenizer) == tokenizer.eos_token_id

    def test_a_rendered_text_keeps_the_end_of_its_turn(self, family):
        tokenizer = family("base-eos")
        prompt = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        pairs = tokenize_pairs(texts([(prompt, "Paris.<|im_end|>", "Rome.<|im_end|>\n")]), tokenizer, 500)
        assert tokenizer.convert_ids_to_tokens(end_id(pairs)) == "<|im_end|>"
        chat = tokenize_pairs(chats([([user("Hi?")], "Paris.", "Rome.")]), tokenizer, 500)
        assert all(pairs[column][0] == chat[column][0] for column in IDS)

    def test_different_ends_are_refused_by_row(self, family):
        rows = [
            {"prompt": "Hi?", "messages": None, "chosen": "Paris.", "rejected": "Rome.", "line": 7},
            {"prompt": "Hi?", "messages": [user("Hi?")], "chosen": "Paris.", "rejected": "Rome.", "line": 9},
        ]
        tokenizer = family("llama-3")
        with pytest.raises(ValueError, match=r"answers that end with different tokens .*line 7.*line 9.*as_chat"):
            tokenize_pairs(Dataset.from_list(rows), tokenizer, 500)
        tokenizer.eos_token = "<|eot_id|>"  # the control
        assert end_id(tokenize_pairs(Dataset.from_list(rows), tokenizer, 500)) == tokenizer.eos_token_id

    def test_an_end_inside_is_said(self, family, caplog):
        tokenizer = family("chatml")
        pairs = tokenize_pairs(chats([([user("Hi?")], "Par<|im_end|>is", "Rome.")]), tokenizer, 500)
        assert tokenizer.decode(pairs["chosen_ids"][0]) == "Par<|im_end|>is<|im_end|>"
        assert any("line 1: an answer has its end token before its end" in text for text in warnings_of(caplog))

    def test_sampled_answers_stop_where_trained_ones_end(self, family):
        tokenizer = family("llama-3")
        model = stops_half_the_time(tokenizer, "<|eot_id|>")
        pairs = chats([([user(f"What is {i}?")], "Paris.", "Rome.") for i in range(4)])
        pairs = pairs.add_column("task", ["t"] * 4)
        scored = reference_pass(
            model, tokenizer, pairs, max_length=200, max_new_tokens=8, entropy_samples=16, progress=False
        )
        # 64 answers of which each hits the limit with probability 2^-8
        assert sum(scored["ref_entropy_truncated"]) / 4 < 0.1
        settings = {"max_new_tokens": 8, "pad_id": tokenizer.pad_token_id, "seed": 0}
        drawn = sample_answers(model, scored["prompt_ids"][:], 16, eos_id=end_id(scored), **settings)
        assert sum(drawn.truncated) < 7
        control = sample_answers(model, scored["prompt_ids"][:], 16, eos_id=tokenizer.eos_token_id, **settings)
        assert sum(control.truncated) > 57

    def test_both_answers_in_the_same_tokens_are_said(self, family, caplog):
        tokenize_pairs(chats([([user("Hi?")], "Paris.", " Paris.\n")]), family("llama-3"), 500)
        assert any("both answers give the same tokens" in text for text in warnings_of(caplog))


class TestBegins:
    @pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name]().bos_token])
    def test_once(self, name, family):
        tokenizer = family(name)
        bos = tokenizer.bos_token_id
        rows = [("Hi?", " a", " b"), (f"{tokenizer.bos_token}Hi?", " a", " b")]
        bare, rendered = tokenize_pairs(texts(rows), tokenizer, 500)["prompt_ids"][:]
        chat = tokenize_pairs(chats([([user("Hi?")], "a", "b")]), tokenizer, 500)["prompt_ids"][0]
        alone = encode_prompts(["Hi?", rows[1][0], ""], [None, None, [user("Hi?")]], tokenizer)
        of_a_chat = 0 if name == "phi-3" else 1  # its template writes none, and TRL adds none
        for ids, count in zip((bare, rendered, chat, *alone), (1, 1, of_a_chat, 1, 1, of_a_chat), strict=True):
            assert ids.count(bos) == count and (ids[0] == bos) == bool(count)

    @pytest.mark.parametrize("name", ["llama-3", "gemma", "chatml", "deepseek"])
    def test_a_rendered_chat_is_the_chat(self, name, family):
        """A text that somebody has put through the template already gives the tokens that the chat gives."""
        tokenizer = family(name)
        prompt = tokenizer.apply_chat_template([user("Hi?")], add_generation_prompt=True, tokenize=False)
        chat = encode_prompts([""], [[user("Hi?")]], tokenizer)
        assert encode_prompts([prompt], [None], tokenizer) == chat

    def test_a_prompt_by_itself_is_the_pairs_prompt(self, family):
        tokenizer = family("chatml")
        pairs = tokenize_pairs(chats([(q, "Paris.", "Rome.") for q in QUESTIONS]), tokenizer, 500)
        assert encode_prompts([""] * 3, QUESTIONS, tokenizer) == pairs["prompt_ids"][:]
        assert encode_prompts([], [], tokenizer) == []


class TestTheCut:
    def test_both_answers_have_the_same_prompt(self, family):
        """Of two common beginnings the shorter one: what is left belongs to the answers."""
        tokenizer = family("chatml")
        pairs = tokenize_pairs(texts([("It is: ", "Paris", "\nRome")]), tokenizer, 500)
        prompt, chosen, rejected = (pairs[column][0] for column in IDS)
        assert tokenizer.decode(prompt) == "It is:"
        assert tokenizer.decode(chosen) == " Paris<|im_end|>" and tokenizer.decode(rejected) == " \nRome<|im_end|>"

    @pytest.mark.parametrize(
        ("name", "row", "words"),
        [
            ("no-generation-prompt", ([user("Hi?")], "Paris.", "Rome."), ["'Ċ' | '<|im_start|>'", "'Ċ' | 'Paris'"]),
            ("llama-2", ([user("Hi?")], "Paris.", "Rome."), ["'▁' 'Paris'"]),
            ("deepseek", ([user("Hi?")], "Paris.", "Rome."), ["'<Assistant>' | 'Paris'", "'<Assistant>' '<'"]),
            ("chatml", ("It is: ", "Paris", "Rome"), ["':' | 'ĠParis'", "'Ġ' | 'Paris'"]),
        ],
    )
    def test_a_difference_is_said_once_and_shown(self, name, row, words, family, caplog):
        make = texts if isinstance(row[0], str) else chats
        tokenize_pairs(make([row] * 3), family(name), 500)
        (text,) = warnings_of(caplog)
        assert "line 1 and 2 more of 3 pairs" in text
        assert all(word in text for word in words)

    @pytest.mark.parametrize("name", ["chatml", "base-eos", "always-generation-prompt", "llama-3"])
    def test_nothing_is_said_where_nothing_differs(self, name, family, caplog):
        tokenize_pairs(chats([(q, c, r) for q in QUESTIONS for c, r in [("Paris.", "Rome.")]]), family(name), 500)
        assert warnings_of(caplog) == []

    def test_an_empty_prompt(self, family):
        pairs = texts([("A", "B", "C")])
        tokenizer = byte_level([], template=None, eos="<|endoftext|>")
        pairs = texts([(" ", "Paris", "Rome")])  # "ĠParis" is one token, and so is "ĠRome"
        with pytest.raises(ValueError, match=r"prompt: line 1 gives no token, or none that does not merge"):
            tokenize_pairs(pairs, tokenizer, 500)


# --- templates ------------------------------------------------------------------------------------------------------


class TestTemplates:
    @pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name]().chat_template])
    def test_as_the_tokenizer_renders_them(self, name, family, monkeypatch):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DATE))
        tokenizer = family(name)
        for messages in QUESTIONS:
            for prompt in (True, False):
                (found,) = render(tokenizer, [Chat(messages, prompt=prompt)])
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
                assert (found.text, found.refusal) == (text, None)

    @pytest.mark.parametrize(
        ("name", "messages", "words"),
        [
            ("gemma", [SYSTEM, user("Hi?")], "System role not supported"),
            ("llama-2", [user("Hi?"), user("Hi!")], "Conversation roles must alternate"),
            ("chatml", [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}], "can only concatenate str"),
        ],
    )
    def test_a_refusal_is_one_line_by_place_in_the_templates_words(self, name, messages, words, family):
        tokenizer = family(name)
        pairs = chats([(messages, "Paris.", "Rome.")]).add_column("file", ["pairs.jsonl"])
        with pytest.raises(ValueError) as error:
            tokenize_pairs(pairs, tokenizer, 500)
        message = str(error.value)
        assert message.startswith("pairs.jsonl, line 1: the chat template of ") and words in message
        assert "\n" not in message and "change the messages" in message
        with pytest.raises(ValueError, match="prompt 0: the chat template of"):
            encode_prompts([""], [messages], tokenizer)
        with pytest.raises(ValueError, match="the chat template of"):
            answer_end(tokenizer, messages)

    def test_refusals_are_counted(self, family):
        good, bad = ([user("Hi?")], "a", "b"), ([SYSTEM, user("Hi?")], "a", "b")
        with pytest.raises(ValueError, match=r"line 2 and 1 more of 4 pairs: .*System role"):
            tokenize_pairs(chats([good, bad, good, bad]), family("gemma"), 500)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
            ("{{ lipsum(n=10**9) }}", "does not end within"),
            ("{{ 'a' * 10**11 }}", "MemoryError"),
            (
                "{% set n = namespace(s='a' * 99) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
                "MemoryError",
            ),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
            ("{% if %}", "TemplateSyntaxError"),
            ("{{ ''.__class__.__mro__ }}", "SecurityError"),
            ("", "has no chat template"),
            ("nothing of the chat", "does not write the assistant's answer"),
        ],
    )
    def test_a_hostile_one_is_refused_in_one_line(self, template, words, family, monkeypatch):
        monkeypatch.setattr(chat_templates, "_SECONDS", 1.0)
        tokenizer = family("chatml")
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=words) as error:
            tokenize_pairs(chats([([user("Hi?")], "a", "b")]), tokenizer, 500)
        assert "\n" not in str(error.value)
        # and the next one is rendered as if nothing had been
        assert render(family("chatml"), [Chat([user("Hi?")])])[0].text == "<|im_start|>user\nHi?<|im_end|>\n"

    @pytest.mark.slow
    def test_the_process_ends_with_the_one_that_started_it(self):
        program = (
            "from dpoviz.data import chat_templates; from types import SimpleNamespace\n"
            "import sys; sys.path.insert(0, {tests!r}); from helpers.chat_tokenizers import FAMILIES\n"
            "chat_templates.render(FAMILIES['chatml'](), [chat_templates.Chat([{{'role': 'user', 'content': 'a'}}])])\n"
            "print(chat_templates._PROCESS.running.pid, flush=True); {last}"
        )
        for last in ("pass", "import os; os.kill(os.getpid(), 9)"):
            text = program.format(tests=os.path.dirname(__file__), last=last)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
            pid = int(done.stdout)
            for _ in range(600):  # it reads to the end of its input first
                if ended(pid):
                    break
                time.sleep(0.1)
            else:
                os.kill(pid, signal.SIGKILL)
                pytest.fail(f"the process goes on after {last!r}")
            assert done.stderr == ""

    def test_a_tokenizer_with_code_of_its_own(self, family):
        tokenizer = family("chatml")

        class Own(type(tokenizer)):
            def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
                if messages[0]["role"] == "system":
                    raise KeyError("system")
                return " / ".join(m["content"] for m in messages) + ("" if add_generation_prompt else "<|im_end|>")

        tokenizer.__class__ = Own
        (row,) = tokenize_pairs(chats([([user("Hi?")], "a", "b")]), tokenizer, 500)
        assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "Hi? / a<|im_end|>"
        with pytest.raises(ValueError, match=r"line 1: the chat template of .*KeyError: 'system'"):
            tokenize_pairs(chats([([SYSTEM, user("Hi?")], "a", "b")]), tokenizer, 500)

    def test_the_date_is_one_on_all_days(self, family, caplog, monkeypatch):
        tokenizer, rows = family("llama-3-dated"), chats([([user("Hi?")], "Paris.", "Rome.")])
        first = tokenize_pairs(rows, tokenizer, 500)
        assert f"Today is {DATE:%d %b %Y}." in tokenizer.decode(first["prompt_ids"][0])
        (text,) = warnings_of(caplog)
        assert "writes today's date; it is told 26 Jul 2024 on all days" in text
        tomorrow = datetime(2031, 1, 2)
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: tomorrow))
        control = tokenizer.apply_chat_template([user("Hi?")], tokenize=False)
        assert "02 Jan 2031" in control
        # what was cut yesterday is this tokenizer's, and cut again it is the same: a cache is found, a run goes on
        assert tokenize_pairs(first, tokenizer, 500)[:] == first[:]
        assert digest(tokenize_pairs(rows, tokenizer, 500)) == digest(first)

    def test_what_a_template_leaves_out_is_said(self, family, caplog):
        tokenizer = family("chatml")
        tokenizer.chat_template = (
            "{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1] + GENERATION
        )
        tokenize_pairs(chats([([SYSTEM, user("Hi?")], "a", "b"), ([user("Hi?")], "a", "b")]), tokenizer, 500)
        (text,) = warnings_of(caplog)
        assert text.startswith("line 1: the chat template of") and "leaves out or changes the system's message" in text

    def test_an_answers_thoughts_left_out_are_said(self, family, caplog):
        tokenize_pairs(chats([([user("Hi?")], "<think>hm</think>a", "b")]), family("deepseek"), 500)
        assert any("leaves out or changes the assistant's message" in text for text in warnings_of(caplog))

    def test_a_template_without_an_end(self, family, caplog):
        tokenizer = family("no-end")
        (row,) = tokenize_pairs(chats([([user("Hi?")], "a", "b")]), tokenizer, 500)
        assert tokenizer.decode(row["chosen_ids"]) == "a<|endoftext|>"
        (text,) = warnings_of(caplog)
        assert "writes no end token behind an answer; '<|endoftext|>' is put there" in text


class TestTools:
    ROW = ([user("Weather in Paris?")], "weather(Paris)", "I cannot.")

    @pytest.mark.parametrize("tools", [TOOLS, None, "[]", "null"])
    def test_stand_in_the_prompt(self, tools, family):
        tokenizer = family("chatml")
        pairs = chats([self.ROW] * 2).add_column("tools", [tools, TOOLS])
        text = tokenizer.decode(tokenize_pairs(pairs, tokenizer, 500)["prompt_ids"][0])
        assert ("Tools: [" in text) == (tools == TOOLS)

    def test_a_template_that_does_not_write_them(self, family, caplog):
        tokenize_pairs(chats([self.ROW] * 2).add_column("tools", [None, TOOLS]), family("llama-3"), 500)
        (text,) = warnings_of(caplog)
        assert text.startswith("line 2: the chat template of") and "does not write the tools" in text

    def test_beside_a_text(self, family):
        pairs = texts([("Weather?", "a", "b")]).add_column("tools", [TOOLS])
        with pytest.raises(ValueError, match=r"line 1: tools: got some beside a text, expected a chat.*as_chat"):
            tokenize_pairs(pairs, family("chatml"), 500)

    def test_that_are_no_json(self, family):
        pairs = chats([self.ROW]).add_column("tools", ["weather"])
        with pytest.raises(ValueError, match=r"line 1: tools .* are not JSON"):
            tokenize_pairs(pairs, family("chatml"), 500)


class TestKnown:
    """A token that was added, and a model that was not resized."""

    @pytest.fixture
    def model(self, make_model):
        return make_model(vocab=24)

    def test_in_the_pairs(self, model, tokenizer):
        tokenizer.add_tokens(["z"])
        pairs = Dataset.from_list([pair("a b", "c", "d z", 1) | {"task": "t"}])
        assert highest_ids(tokenize_pairs(pairs, tokenizer, 50)) == [5, 6, 24]
        with pytest.raises(ValueError, match=r"got token 24 .*expected 0 to 23.*resize_token_embeddings"):
            reference_pass(model, tokenizer, pairs, max_length=50, max_new_tokens=4, progress=False)

    @pytest.mark.parametrize("wrong", ["prompts", "answers", "pad_id"])
    def test_in_scoring(self, model, wrong):
        given = {"prompts": [[4, 5]], "answers": [[[6, 2], [7, 2]]], "pad_id": 0}
        score_answers(model, **given)
        given[wrong] = {"prompts": [[4, 24]], "answers": [[[6, 2], [24, 2]]], "pad_id": 24}[wrong]
        with pytest.raises(ValueError, match=r"got token 24 .*expected 0 to 23"):
            score_answers(model, **given)

    @pytest.mark.parametrize("wrong", ["prompts", "eos_id", "pad_id"])
    def test_in_sampling(self, model, wrong):
        given = {"prompts": [[4, 5]], "eos_id": 2, "pad_id": 0} | {wrong: [[4, 24]] if wrong == "prompts" else 24}
        with pytest.raises(ValueError, match=r"got token 24 .*expected 0 to 23"):
            sample_answers(model, k=2, max_new_tokens=2, seed=0, **given)


# --- by hand --------------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected, line):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": "t", "line": line}


class TestTokenizePairs:
    PAIRS = (pair("a b", "c", "d e", 1), pair("f", "g h i j", "k", 5))

    def test_ids_by_hand(self, tokenizer):
        pairs = Dataset.from_list(list(self.PAIRS))
        out = tokenize_pairs(pairs, tokenizer, max_length=6)
        a, end = 4, 2  # the tokenizer's numbers of "a" and of the end
        assert out["prompt_ids"][:] == [[a, a + 1], [a + 5]]
        assert out["chosen_ids"][:] == [[a + 2, end], [a + 6, a + 7, a + 8, a + 9, end]]
        assert out["rejected_ids"][:] == [[a + 3, a + 4, end], [a + 10, end]]
        assert [out[i]["prompt"] for i in range(2)] == pairs["prompt"][:]
        assert out["line"][:] == [1, 5]

    def test_counts(self, tokenizer):
        out = tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=6)
        assert token_counts(out).tolist() == [[2, 2, 3], [1, 5, 2]]
        assert token_counts(out.select([1])).tolist() == [[1, 5, 2]]

    def test_is_not_done_twice(self, tokenizer, monkeypatch):
        once = tokenize_pairs(Dataset.from_list(list(self.PAIRS) * 20), tokenizer, max_length=6)
        seen, own = [], tokens._cuts
        monkeypatch.setattr(tokens, "_cuts", lambda pairs, tokenizer: seen.append(len(pairs)) or own(pairs, tokenizer))
        assert tokenize_pairs(once, tokenizer, max_length=6)[:] == once[:]
        assert seen == [tokens._CHECKED] and tokens._CHECKED < len(once)
        with pytest.raises(ValueError, match=r"20 of 40 pairs are over max_length = 5 tokens"):
            tokenize_pairs(once, tokenizer, max_length=5)

    def test_ids_of_another_tokenizer_are_refused(self, tokenizer):
        out = tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=6)
        other = out.map(lambda row: {"chosen_ids": [*row["chosen_ids"][:-1], 3]})
        with pytest.raises(ValueError, match=r"pairs: have prompt_ids, .*, which are not this tokenizer's; remove"):
            tokenize_pairs(other, tokenizer, max_length=6)

    def test_special_tokens_open_the_prompt_and_never_an_answer(self, tokenizer):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        row = tokenize_pairs(Dataset.from_list([self.PAIRS[0]]), tokenizer, max_length=9)[0]
        assert (row["prompt_ids"], row["chosen_ids"]) == ([1, 4, 5], [6, 2])

    @pytest.mark.parametrize(("limit", "fits"), [(6, True), (5, False)])
    def test_the_limit_holds_prompt_answer_and_end(self, tokenizer, limit, fits):
        pairs = Dataset.from_list([self.PAIRS[1]])  # 1 + 4 + the end
        if fits:
            assert len(tokenize_pairs(pairs, tokenizer, limit)) == 1
        else:
            with pytest.raises(ValueError, match="1 of 1 pairs"):
                tokenize_pairs(pairs, tokenizer, limit)

    def test_too_long_is_refused_by_line_and_lengths(self, tokenizer):
        with pytest.raises(ValueError) as error:
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=5)
        message = str(error.value)
        assert "1 of 2 pairs are over max_length = 5 tokens" in message
        assert "line 5: prompt 1 + longer answer 5" in message
        assert "too_long='drop'" in message

    def test_the_rejected_answer_counts_as_well(self, tokenizer):
        with pytest.raises(ValueError, match="line 1: prompt 2 + longer answer 3".replace("+", r"\+")):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=4)

    def test_too_long_is_dropped_counted_and_named(self, tokenizer, caplog):
        with caplog.at_level(logging.WARNING, logger="dpoviz.data.tokens"):
            out = tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=5, too_long="drop")
        assert out["line"][:] == [1]
        (record,) = caplog.records
        assert "1 of 2 pairs" in record.getMessage()
        assert "line 5" in record.getMessage()

    def test_nothing_is_said_where_nothing_is_dropped(self, tokenizer, caplog):
        tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=6, too_long="drop")
        assert not caplog.records

    def test_not_all_are_dropped(self, tokenizer):
        with pytest.raises(ValueError, match=r"2 of 2 pairs are over max_length = 3(.|\n)*raise max_length$"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=3, too_long="drop")

    def test_rows_are_numbered_where_lines_are_not_known(self, tokenizer):
        pairs = Dataset.from_list(list(self.PAIRS)).remove_columns("line")
        with pytest.raises(ValueError, match="row 1: prompt 1"):
            tokenize_pairs(pairs, tokenizer, max_length=5)

    def test_a_tokenizer_without_an_end(self, tokenizer):
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="tokenizer: has no end token"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=9)

    def test_a_prompt_of_no_tokens(self, tokenizer):
        pairs = Dataset.from_list([*self.PAIRS, pair(" ", "a", "b", 9)])
        with pytest.raises(ValueError, match="prompt: line 9 gives no token"):
            tokenize_pairs(pairs, tokenizer, max_length=9)

    def test_an_unknown_policy_for_long_pairs(self, tokenizer):
        with pytest.raises(ValueError, match="too_long: got 'cut', expected 'refuse' or 'drop'"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=9, too_long="cut")


class TestDigest:
    ROWS: ClassVar = {
        "prompt": ["a", "b", "c"],
        "ids": [[1, 2], [3], []],
        "x": [[0.5], [1.0], [2.0]],
        "n": [1, None, 3],
        "messages": [None, [{"role": "user", "content": "a"}], None],
    }

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("prompt", ["a", "c", "b"]),
            ("ids", [[1], [2, 3], []]),  # the same numbers, cut otherwise
            ("ids", [[1, 2], [4], []]),
            ("x", [[0.5], [1.0], [2.0000001]]),
            ("n", [1, 2, None]),
            ("messages", [None, [{"role": "user", "content": "b"}], None]),
        ],
    )
    def test_any_other_value_gives_another(self, name, values):
        first = digest(Dataset.from_dict(self.ROWS))
        assert digest(Dataset.from_dict(self.ROWS | {name: values})) != first
        assert digest(Dataset.from_dict(self.ROWS | {name: values}), [n for n in self.ROWS if n != name]) == digest(
            Dataset.from_dict(self.ROWS), [n for n in self.ROWS if n != name]
        )

    def test_the_same_values_give_the_same_wherever_they_lie(self, tmp_path):
        rows = Dataset.from_dict(self.ROWS)
        rows.save_to_disk(str(tmp_path))
        twice = Dataset.from_dict({name: [*values, *values] for name, values in self.ROWS.items()})
        for other in (load_from_disk(str(tmp_path)), twice.select([3, 4, 2]), twice.select(range(3))):
            assert digest(other) == digest(rows)

    def test_a_thousand_rows_at_a_time(self):
        draw = random.Random(0)
        rows = Dataset.from_dict({"ids": [[draw.randrange(1000) for _ in range(100)] for _ in range(5000)]})
        tracemalloc.start()
        digest(rows)
        most = tracemalloc.get_traced_memory()[1]
        rows["ids"][:]
        assert most < 0.3 * tracemalloc.get_traced_memory()[1]  # the control: the rows as lists
        tracemalloc.stop()
