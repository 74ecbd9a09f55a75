"""The reference's columns against one forward a token; a cache that is met only by what made it."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.worlds import REFERENCE_SETTINGS as SETTINGS
from helpers.worlds import TEXTS as ROWS
from helpers.worlds import text_pairs as pairs

import dpoviz.lm.reference as module
from dpoviz.lm import cache as journal
from dpoviz.lm import entropy
from dpoviz.lm.entropy import estimate_entropy
from dpoviz.lm.reference import default_cache_dir, reference_pass
from dpoviz.lm.scoring import score_answers


@pytest.fixture
def model(make_model):
    return make_model("llama")


@pytest.fixture
def calls(monkeypatch):
    """Prompts of each scoring pass over pairs, and of each estimate of the entropy."""
    seen = {"scores": [], "entropies": []}
    score, estimate = module.score_answers, module.estimate_entropy

    def spy_score(model, prompts, *args, **kwargs):
        seen["scores"].append(prompts)
        return score(model, prompts, *args, **kwargs)

    def spy_estimate(model, prompts, **kwargs):
        seen["entropies"].append(prompts)
        return estimate(model, prompts, **kwargs)

    monkeypatch.setattr(module, "score_answers", spy_score)
    monkeypatch.setattr(module, "estimate_entropy", spy_estimate)
    return seen


class TestColumns:
    def test_log_probabilities_and_features_row_by_row(self, model, tokenizer, oracle):
        out = reference_pass(model, tokenizer, pairs(), **SETTINGS)
        assert [(row["prompt"], row["chosen"], row["rejected"]) for row in out] == ROWS
        for row in out:
            for side in ("chosen", "rejected"):
                exact = math.fsum(oracle(model, row["prompt_ids"], row[f"{side}_ids"])[0])
                # kept in float32: half of 2^-23, relative
                assert row[f"ref_{side}_logps"] == pytest.approx(exact, rel=1e-7)
            hidden = model.base_model(torch.tensor([row["prompt_ids"]])).last_hidden_state[0]
            # averaged in float32: a few roundings of 6e-8, of numbers of order 1
            np.testing.assert_allclose(row["ref_features"], hidden.mean(dim=0).detach().numpy(), rtol=0, atol=1e-6)

    def test_entropy_is_the_per_token_estimate_of_each_prompt(self, model, tokenizer):
        out = reference_pass(model, tokenizer, pairs(), seed=3, **SETTINGS)
        prompts = list(dict.fromkeys(tuple(ids) for ids in out["prompt_ids"]))
        drawn = estimate_entropy(
            model, prompts, samples=4, max_new_tokens=4, eos_id=2, pad_id=0, seed=3, batch_size=2
        )  # fmt: skip
        for row in out:
            i = prompts.index(tuple(row["prompt_ids"]))
            assert row["ref_entropy"] == pytest.approx(drawn.per_token.value[i].item(), rel=1e-7)
            assert row["ref_entropy_se"] == pytest.approx(drawn.per_token.se[i].item(), rel=1e-7)

    def test_all_estimates_of_each_prompt_and_their_errors(self, model, tokenizer):
        out = reference_pass(model, tokenizer, pairs(), seed=4, **SETTINGS)
        prompts = list(dict.fromkeys(tuple(ids) for ids in out["prompt_ids"]))
        drawn = estimate_entropy(
            model, prompts, samples=4, max_new_tokens=4, eos_id=2, pad_id=0, seed=4, batch_size=2
        )  # fmt: skip
        exact = {
            "ref_entropy_first_token": drawn.first_token.value,
            "ref_entropy_sequence": drawn.sequence.value,
            "ref_entropy_sequence_se": drawn.sequence.se,
            "ref_entropy_monte_carlo": drawn.monte_carlo.value,
            "ref_entropy_monte_carlo_se": drawn.monte_carlo.se,
            "ref_entropy_truncated": drawn.truncated,
        }
        for row in out:
            i = prompts.index(tuple(row["prompt_ids"]))
            for name, values in exact.items():
                assert row[name] == pytest.approx(values[i].item(), rel=1e-7), name
        assert {round(row["ref_entropy_truncated"] * 4) for row in out} & {1, 2, 3}  # or it could not be told

    def test_entropy_along_the_answers_row_by_row(self, model, tokenizer, oracle):
        out = reference_pass(model, tokenizer, pairs(), **SETTINGS)
        for row in out:
            for side in ("chosen", "rejected"):
                exact = math.fsum(oracle(model, row["prompt_ids"], row[f"{side}_ids"])[1])
                assert row[f"ref_{side}_entropy"] == pytest.approx(exact, rel=1e-7)  # kept in float32

    def test_a_uniform_model_has_log_v_a_token_and_a_deterministic_one_nothing(self, make_model, tokenizer):
        for factor, per_token in ((0, math.log(30)), (1e4, 0)):
            model = make_model("llama")
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(factor)
            for row in reference_pass(model, tokenizer, pairs(), **SETTINGS):
                for side in ("chosen", "rejected"):
                    teacher_forced = row[f"ref_{side}_entropy"] / len(row[f"{side}_ids"])
                    assert teacher_forced == pytest.approx(per_token, rel=1e-6, abs=1e-6)
                for name in ("ref_entropy", "ref_entropy_first_token"):
                    assert row[name] == pytest.approx(per_token, rel=1e-6, abs=1e-6)

    def test_entropies_along_the_answers_do_not_move_a_bit_of_the_rest(self, make_model, tokenizer, monkeypatch):
        model = make_model("llama", dtype=torch.float32)
        score, without = module.score_answers, []

        def spy(model, prompts, answers, **settings):
            assert settings["entropy"]
            without.append(score(model, prompts, answers, **{**settings, "entropy": False}))
            scores = score(model, prompts, answers, **settings)
            assert torch.equal(scores.logps, without[-1].logps)
            assert torch.equal(scores.features, without[-1].features)
            return scores

        monkeypatch.setattr(module, "score_answers", spy)
        reference_pass(model, tokenizer, pairs(), **SETTINGS)
        assert len(without) == 3

    def test_float32_and_flat(self, model, tokenizer):
        features = reference_pass(model, tokenizer, pairs(), **SETTINGS).features
        flat = [name for name in features if name.startswith("ref_") and name != "ref_features"]
        assert len(flat) == 12
        for name in flat:
            assert features[name].dtype == "float32"
        assert features["ref_features"].feature.dtype == "float32"

    def test_a_prompt_that_stands_twice_has_one_entropy(self, model, tokenizer, calls):
        out = reference_pass(model, tokenizer, pairs(), **SETTINGS)
        assert [len(prompts) for prompts in calls["entropies"]] == [4]  # of five rows
        for name in ("ref_entropy", "ref_entropy_se", "ref_entropy_sequence", "ref_features"):
            assert out[0][name] == out[2][name]
            assert out[0][name] != out[1][name]
        assert out[0]["ref_chosen_entropy"] != out[2]["ref_chosen_entropy"]

    def test_a_prompt_has_the_features_of_its_first_row_to_the_bit(self, model, tokenizer, monkeypatch):
        """Rows of another batch are summed in another order; here each batch is off by a little more."""
        own, batches = score_answers, itertools.count()

        def rounded(*args, **kwargs):
            scores = own(*args, **kwargs)
            return scores._replace(features=scores.features + 1e-5 * next(batches))

        monkeypatch.setattr("dpoviz.lm.reference.score_answers", rounded)
        out = reference_pass(model, tokenizer, pairs(), **SETTINGS | {"batch_size": 1})
        assert next(batches) == len(ROWS)
        assert out[0]["ref_features"] == out[2]["ref_features"]

    def test_entropy_and_features_depend_on_the_prompt_alone(self, model, tokenizer):
        other = [(prompt, rejected, "t s r q") for prompt, _, rejected in ROWS]
        a, b = (reference_pass(model, tokenizer, pairs(rows), **SETTINGS) for rows in (ROWS, other))
        for name in [name for name in a.column_names if name.startswith("ref_entropy")]:
            assert a[name][:] == b[name][:]
        assert a["ref_chosen_entropy"][:] != b["ref_chosen_entropy"][:]  # which is why it may not feed beta
        # other answers, other batches: rounding of 6e-8 on numbers of order 1
        np.testing.assert_allclose(a["ref_features"][:], b["ref_features"][:], rtol=0, atol=1e-6)
        assert a["ref_chosen_logps"][:] != b["ref_chosen_logps"][:]  # the control: the answers were others
        moved = reference_pass(model, tokenizer, pairs([("t s", c, r) for _, c, r in ROWS]), **SETTINGS)
        assert not np.allclose(a["ref_features"][:], moved["ref_features"][:], atol=0.1)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_stays_and_dropout_does_not_act(self, make_model, tokenizer, training):
        model = make_model("gpt2")  # dropout 0.1
        expected = reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]
        assert reference_pass(model.train(training), tokenizer, pairs(), **SETTINGS)[:] == expected
        assert model.training is training

    def test_padding_by_the_end_token_where_there_is_no_other(self, model, tokenizer):
        expected = reference_pass(model, tokenizer, pairs(), **SETTINGS)
        tokenizer.pad_token = None
        got = reference_pass(model, tokenizer, pairs(), **SETTINGS)
        for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_entropy"):
            assert got[name][:] == pytest.approx(expected[name][:], rel=1e-6)

    def test_log_probabilities_that_are_not_finite(self, model, tokenizer):
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer("t")["input_ids"][0]] = float("nan")
        rows = [ROWS[0], ("a", "t b", "c"), ROWS[1], ("t", "b", "c")]
        with pytest.raises(ValueError, match=r"log-probabilities are not finite in rows \[1, 3\] \(2 in all\)"):
            reference_pass(model, tokenizer, pairs(rows), **SETTINGS)

    def test_an_entropy_that_is_not_finite(self, model, tokenizer, monkeypatch):
        def broken(model, prompts, **kwargs):
            drawn = estimate_entropy(model, prompts, **kwargs)
            drawn.per_token.value[1] = float("nan")
            return drawn

        monkeypatch.setattr(module, "estimate_entropy", broken)
        with pytest.raises(ValueError, match=r"entropy is not finite at the prompt with tokens \[5\]"):  # "b"
            reference_pass(model, tokenizer, pairs(), **SETTINGS)

    def test_too_long(self, model, tokenizer, caplog):
        with pytest.raises(ValueError, match="2 of 5 pairs are over max_length = 8"):
            reference_pass(model, tokenizer, pairs(), **{**SETTINGS, "max_length": 8})
        out = reference_pass(model, tokenizer, pairs(), too_long="drop", **{**SETTINGS, "max_length": 8})
        assert out["line"][:] == [1, 2, 4]
        assert "they are left out" in caplog.text


class TestCache:
    @pytest.fixture
    def run(self, model, tokenizer, tmp_path, calls):
        """Runs once, and then says of a second run whether the reference had to work, and what got."""

        def once(rows=ROWS, **changes):
            before = len(calls["scores"])
            out = reference_pass(model, tokenizer, pairs(rows), cache_dir=tmp_path / "cache", **{**SETTINGS, **changes})
            return len(calls["scores"]) > before, out[:]

        assert once()[0]
        return once

    def test_the_second_run_reads(self, run, model, tokenizer):
        worked, kept = run()
        assert not worked
        assert kept == reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]

    def test_another_object_of_the_same_weights_reads(self, run, make_model, tokenizer, tmp_path, calls):
        before = len(calls["scores"])
        twin = make_model("llama")
        twin.config._name_or_path = "elsewhere"  # where it came from does not change what it is
        reference_pass(twin, tokenizer, pairs(), cache_dir=tmp_path / "cache", **SETTINGS)
        assert len(calls["scores"]) == before

    def test_a_changed_weight_is_a_miss(self, run, model):
        kept = run()[1]
        with torch.no_grad():
            model.lm_head.weight[5, 5] += 1e-6
        assert run()[0]
        with torch.no_grad():
            model.lm_head.weight[5] += 1
        worked, new = run()
        assert worked
        assert new["ref_chosen_logps"] != kept["ref_chosen_logps"]

    def test_a_changed_configuration_is_a_miss(self, run, model):
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
        assert run()[0]

    @pytest.mark.parametrize("column", [0, 1, 2])
    def test_a_changed_text_is_a_miss(self, run, column):
        rows = [list(row) for row in ROWS]
        rows[3][column] += " t"
        assert run([tuple(row) for row in rows])[0]

    def test_other_rows_are_a_miss(self, run):
        assert run(ROWS[:4])[0]
        assert run(ROWS[::-1])[0]

    @pytest.mark.parametrize("name", ["max_new_tokens", "entropy_samples", "seed", "max_length", "batch_size"])
    def test_a_changed_setting_is_a_miss(self, run, name):
        value = {**SETTINGS, "seed": 0}[name] + 1
        assert run(**{name: value})[0]
        assert not run(**{name: value})[0]

    def test_another_end_token_is_a_miss(self, run, tokenizer):
        tokenizer.eos_token = "<unk>"
        assert run()[0]

    def test_changed_code_is_a_miss(self, run, monkeypatch):
        monkeypatch.setattr(journal, "code_digest", lambda name: "another")
        assert run()[0]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(b"no Arrow file"),
            lambda file: file.write_bytes(file.read_bytes()[:-600]),
            lambda file: file.unlink(),
        ],
        ids=["emptied", "overwritten", "cut", "gone"],
    )
    @pytest.mark.parametrize("name", ["*.arrow", "state.json", "dataset_info.json"])
    def test_a_damaged_cache_is_said_and_mended(self, run, tmp_path, damage, name, caplog):
        kept = run()[1]
        (file,) = (tmp_path / "cache").glob(f"reference-*/{name}")
        damage(file)
        with caplog.at_level(logging.WARNING, logger=journal.__name__):
            worked, again = run()
        assert worked
        (line,) = caplog.messages
        assert str(file.parent) in line and f"{file.name} is " in line
        assert again == kept
        assert not run()[0]

    def test_an_interrupted_write_leaves_no_half_and_is_made_up_from_what_is_kept(
        self, model, tokenizer, tmp_path, monkeypatch, calls
    ):
        save = Dataset.save_to_disk

        def killed(self, path, **kwargs):
            save(self, path, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr(Dataset, "save_to_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        assert kinds(tmp_path) == ["entropy", "unfinished"]
        monkeypatch.setattr(Dataset, "save_to_disk", save)
        before = len(calls["scores"])
        out = reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        assert len(calls["scores"]) == before
        assert kinds(tmp_path) == ["entropy", "reference"]
        assert out[:] == reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]

    def test_without_a_folder_nothing_is_kept(self, model, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path))
        reference_pass(model, tokenizer, pairs(), **SETTINGS)
        assert list(tmp_path.iterdir()) == []


def kinds(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


class TestGoesOn:
    """A run that is killed at any batch, of either part, ends with the columns of one that was not."""

    @pytest.mark.parametrize("part", ["scores", "entropies"])
    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_killed(self, model, tokenizer, tmp_path, monkeypatch, part, done):
        whole = reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]
        where, name = {"scores": (module, "score_answers"), "entropies": (entropy, "_draw")}[part]
        work, count = getattr(where, name), [0]

        def counted(*args, **kwargs):
            count[0] += 1
            return work(*args, **kwargs)

        def killed(*args, **kwargs):
            if count[0] == done:
                raise KeyboardInterrupt
            return counted(*args, **kwargs)

        monkeypatch.setattr(where, name, killed)
        if done < 2 or part == "scores":  # four prompts are two batches
            with pytest.raises(KeyboardInterrupt):
                reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        monkeypatch.setattr(where, name, counted)
        assert reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)[:] == whole
        assert count[0] == {"scores": 3, "entropies": 2}[part]  # each batch once
        assert kinds(tmp_path) == ["entropy", "reference"]

    def test_a_damaged_batch_is_computed_again(self, model, tokenizer, tmp_path, monkeypatch, caplog):
        whole = reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]

        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "estimate_entropy", killed)
        with pytest.raises(KeyboardInterrupt):
            reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        monkeypatch.setattr(module, "estimate_entropy", estimate_entropy)
        file = sorted(tmp_path.glob("unfinished-*/*.npz"))[1]
        file.write_bytes(b"")
        assert reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)[:] == whole
        assert f"{file} cannot be read" in caplog.text

    def test_other_answers_to_the_same_prompts_sample_nothing(self, model, tokenizer, tmp_path, monkeypatch):
        whole = reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        monkeypatch.setattr(entropy, "_draw", lambda *args: pytest.fail("sampled again"))
        other = pairs([(prompt, rejected, chosen) for prompt, chosen, rejected in ROWS])
        out = reference_pass(model, tokenizer, other, cache_dir=tmp_path, **SETTINGS)
        assert out["ref_entropy"][:] == whole["ref_entropy"][:]
        assert out["ref_chosen_logps"][:] == whole["ref_rejected_logps"][:]

    def test_another_run_over_some_of_the_prompts_in_between(self, model, tokenizer, tmp_path, monkeypatch):
        whole = reference_pass(model, tokenizer, pairs(), **SETTINGS)[:]
        draw = entropy._draw
        monkeypatch.setattr(entropy, "_draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)
        monkeypatch.setattr(entropy, "_draw", draw)
        reference_pass(model, tokenizer, pairs(ROWS[1:4]), cache_dir=tmp_path, **SETTINGS)
        assert reference_pass(model, tokenizer, pairs(), cache_dir=tmp_path, **SETTINGS)[:] == whole


class TestContext:
    """The tiny model reads 64 tokens."""

    @pytest.fixture(autouse=True)
    def no_forward(self, model):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
            patch.setattr(type(model.base_model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
            yield

    def test_max_length_beyond_it(self, model, tokenizer):
        with pytest.raises(ValueError, match="max_length: got 65, but the model's context has 64 tokens; expected at"):
            reference_pass(model, tokenizer, pairs(), **{**SETTINGS, "max_length": 65})

    def test_a_prompt_that_leaves_no_room_for_an_answer(self, model, tokenizer):
        message = "max_new_tokens: got 58, but a prompt has 7 tokens and the model's context 64; expected at most 57"
        with pytest.raises(ValueError, match=message):
            reference_pass(model, tokenizer, pairs(), **{**SETTINGS, "max_new_tokens": 58})

    @pytest.mark.parametrize("change", [{"max_length": 64}, {"max_new_tokens": 57}])
    def test_what_just_fits_goes_on_to_the_model(self, model, tokenizer, change):
        with pytest.raises(pytest.fail.Exception, match="the model ran"):
            reference_pass(model, tokenizer, pairs(), **{**SETTINGS, **change})


class TestDefaultCacheDir:
    def test_from_the_environment_or_the_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path / "here"))
        assert default_cache_dir() == tmp_path / "here"
        monkeypatch.setenv("DPOVIZ_CACHE", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_cache_dir() == tmp_path / ".cache" / "dpoviz"
