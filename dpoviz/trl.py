"""The objective and every rule inside TRL's `DPOTrainer`, for users who already train with it (the extra `trl`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dpoviz.beta import Beta, BetaNetwork, ConstantBeta, MadeFor
from dpoviz.data.tokens import token_counts
from dpoviz.forms import scale
from dpoviz.lm.forward import context_length, language_model
from dpoviz.lm.scoring import FEATURES, supports_shared_prefix
from dpoviz.lm.shared import SharedRows, lay_out_rows, share_prefixes
from dpoviz.losses import gradients_on_beta
from dpoviz.regularizers import Penalties, Regularization, penalties
from dpoviz.rules import Observation, PromptRule, Rule, RuleOutput
from dpoviz.training.batch import ANSWER_ENTROPY, REWARD_MARGIN, answer_entropy
from dpoviz.training.config import TrainConfig
from dpoviz.training.observe import perturbed_directions
from dpoviz.training.probes import Models, first_prompts, means_by_task, sampled_kl
from dpoviz.training.state import adamw
from dpoviz.trl_held_out import ROW, HeldOutPairs, cannot_keep, number_rows

logger = logging.getLogger(__name__)

COLUMNS = ("task", "ref_entropy", "ref_features")
"""The columns that a beta may read in addition to the pair; `reference_pass` computes them."""

OF_ANSWERS = "ref_answer_entropy"
"""The column that MallowsPO reads: the reference's entropy along the answers, in nats per token."""

_SETTINGS = (
    *("form", "initial_scale", "scale_min", "scale_max", "alpha", "lambda_range", "lambda_smoothness"),
    *("lambda_consistency", "lambda_entropy", "beta_learning_rate", "beta_max_norm", "max_new_tokens", "probe_prompts"),
)
"""The settings of `TrainConfig` that the trainer reads; `args` has the others."""

_READ = {"task": "task", "ref_entropy": "ref_entropy", "x": "ref_features", "answer_entropy": OF_ANSWERS,
         "reward_margin": REWARD_MARGIN}  # fmt: skip
"""The column of each input that a rule may read."""


def trl_dataset(scored: Dataset) -> Dataset:
    """Return scored pairs in TRL's layout, together with the columns that beta reads.

    Args:
        scored: the return value of `reference_pass`.

    Returns:
        A data set with the columns prompt, chosen and rejected, ref_chosen_logps and ref_rejected_logps, `COLUMNS`,
        ref_entropy_se, `OF_ANSWERS` where the pass measured it, and reward_margin where the pairs have it. The first
        three are chat messages if the prompts are chats, and texts otherwise. The reference's log-probabilities are of
        dpoviz's tokens. For chats TRL tokenises differently, so `BetaDPOTrainer` computes its own.

    Raises:
        ValueError: the data set mixes texts and chats, which TRL does not accept.
    """
    chats = [bool(own) for own in scored["messages"]] if "messages" in scored.column_names else [False]
    if any(chats) and not all(chats):
        raise ValueError(
            f"scored: {sum(chats)} of {len(chats)} prompts are chats, expected all or none: TRL's sets hold one kind; "
            "dpoviz.data.as_chat turns texts into chats"
        )
    texts = ("prompt", "chosen", "rejected")
    more = [name for name in (REWARD_MARGIN,) if name in scored.column_names]
    kept = scored.select_columns([*texts, *COLUMNS, "ref_entropy_se", "ref_chosen_logps", "ref_rejected_logps", *more])
    if set(ANSWER_ENTROPY) <= set(scored.column_names):
        read = scored.select_columns([*ANSWER_ENTROPY, "chosen_ids", "rejected_ids"])[:]
        kept = kept.add_column(OF_ANSWERS, answer_entropy(read).tolist())
    if not any(chats):
        return kept

    def as_messages(rows: dict[str, list]) -> dict[str, list]:
        return {name: [[{"role": "assistant", "content": answer}] for answer in rows[name]] for name in texts[1:]}

    answers = kept.select_columns(list(texts[1:])).map(as_messages, batched=True, desc="answers as messages")
    prompts = scored.select_columns(["messages"]).rename_column("messages", "prompt")
    return concatenate_datasets([prompts, answers, kept.remove_columns(list(texts))], axis=1)


@dataclass
class _Collator:
    """The trainer's batch, plus the columns that beta reads for each pair."""

    own: Callable[[list[dict]], Mapping]

    def __call__(self, examples: list[dict]) -> dict:
        more: dict[str, Any] = {
            name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
            for name in ("ref_entropy", "ref_features", OF_ANSWERS, REWARD_MARGIN)
            if name in examples[0]
        }
        if ROW in examples[0]:
            more[ROW] = torch.tensor([example[ROW] for example in examples])
        if "task" in examples[0]:
            more["task"] = [example["task"] for example in examples]
        return {**self.own(examples), **more}


def _require_columns(name: str, data: Dataset | IterableDataset | dict | None, needed: list[str]) -> None:
    if isinstance(data, dict):
        for key, part in data.items():
            _require_columns(f"{name}[{key!r}]", part, needed)
    elif data is not None and needed:
        columns = data.column_names or list(next(iter(data)))  # a stream may not know its column names
        missing = [column for column in needed if column not in columns]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what trl_dataset returns")


class _Known:
    """Stands for a model whose scores of a batch are known already."""

    def __init__(self, model, outputs) -> None:
        self.model, self.outputs = model, outputs

    def __call__(self, *args, fused_lm_head: bool = False, shared_rows: SharedRows | None = None, **kwargs):
        return self.outputs if fused_lm_head else self.model(*args, **kwargs)


class _Alone:
    """Stands for an accelerator in a computation that the other processes do not share."""

    def __init__(self, accelerator) -> None:
        self.accelerator = accelerator

    def __getattr__(self, name: str):
        return getattr(self.accelerator, name)

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


class BetaDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with any beta or rule, in either form, and the regularisers of a beta that is trained.

        L = L_TRL(s·h) + L_range + L_smooth + L_consistency + L_entropy

    L_TRL is TRL's loss with s of each pair in place of its one beta. Rewards, margins and the other loss types follow,
    except "aot" and "aot_unpaired", which sort the batch before multiplying by beta. The regularisers (the derivation,
    §5) are added if beta is trainable. A rule sees each micro-batch as a batch.

    Logged in addition to TRL's numbers, as means over the batch: beta/<task>, s/<task>, logratio/chosen/<task> and
    logratio/rejected/<task> (log π/π_ref, nats), kl/<task> (for a rule that observes it), loss/<term> for each
    regulariser, and pull/<term>/<task>, the fraction of each term, "dpo" among them, in the pulls on beta (their
    absolute values; see `gradients_on_beta`).

    Of the prompts of eval_dataset, β, s, h and the pulls at each evaluation are kept beside each saved beta, in the
    folder _run, in the files of a run (`dpoviz.trl_held_out`); `load_run` opens them.

    Several processes have one beta, initialised from the main process; rules, batch norm and regularisers see the
    batch of all processes. FSDP and DeepSpeed may shard the policy; every process holds all of beta. A rule that reads
    both models' logits or samples answers (`EpsilonDPO`, `DualKL`) needs them whole.

    Args:
        model: as in `DPOTrainer`. All other arguments of `DPOTrainer` are passed by name.
        beta: any `Beta` or `Rule`; None: a constant, `config.beta0`. A trainable one is trained together with the
            policy by a separate AdamW, with its own learning rate (on the policy's schedule) and its own gradient
            clipping.
        config: the form, the range, the weights of the regularisers, beta's learning rate and maximum gradient norm,
            and how KL is sampled; `args` has the rest. Its `initial_scale` sets the units of the range, of alpha and of
            the weights, so `beta` should start at `config.beta0`. None: the standard form, around `args.beta`.
        shared_prefix: compute each prompt once for both of its answers, with the same results. Falls back to TRL's
            rows, with a warning, where the model cannot take them.
        train_dataset: a data set with the columns that beta reads, as `trl_dataset` returns it; a `ConstantBeta`,
            `BetaDPO`, `EpsilonDPO` and `LSC` read none. For a stream, `config.alpha` is required if the entropy term
            is on.

    Raises:
        ValueError: a data set lacks those columns; the rule is not defined in the form; there is no alpha for a stream;
            a loss type sorts the batch and beta is not constant; a rule that needs the reference in training does not
            have it, or not whole; float16 is used under DeepSpeed; or several processes precompute the reference of
            an in-memory data set, for which TRL writes no file that they could share.
    """

    _tag_names = [*DPOTrainer._tag_names, "dpoviz"]  # noqa: RUF012
    _own_columns = (*COLUMNS, OF_ANSWERS, REWARD_MARGIN, ROW)
    args: DPOConfig
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    _signature_columns: Any  # None until it is first asked for

    def __init__(
        self,
        model,
        *,
        beta: Beta | Rule | None = None,
        config: TrainConfig | None = None,
        shared_prefix: bool = False,
        train_dataset: Dataset | IterableDataset | None = None,
        **kwargs,
    ) -> None:
        if config is None:
            args = kwargs.get("args")
            config = TrainConfig.around(0.1 if args is None else args.beta, "standard")
        if beta is None:
            beta = ConstantBeta(config.beta0)
        self.config, self.beta_module = config, beta
        self.rule = rule = beta if isinstance(beta, Rule) else PromptRule(beta)
        if rule.form not in (None, config.form):
            raise ValueError(f"beta: {type(rule).__name__} is defined in the {rule.form} form, got {config.form!r}")
        if beta.made_for is not None:
            beta.require_made_for(form=config.form)
        self.learns = rule.trainable
        self._needed = self._columns()
        _require_columns("train_dataset", train_dataset, self._needed)
        _require_columns("eval_dataset", kwargs.get("eval_dataset"), self._needed)
        self.regularization = self._weights(train_dataset) if self.learns else None
        self._shared_prefix, self._sharing = shared_prefix, False
        self._longest: float = 0  # prompt and answer, in tokens; inf if unknown
        self._measured_kl = -1  # the step in which a rule last observed it
        super().__init__(model, train_dataset=train_dataset, **kwargs)
        self._check_trainer()
        rule.to(self.accelerator.device).load_state_dict(broadcast(rule.state_dict()))  # of the main process
        if self.learns:
            self.beta_optimizer = adamw(rule, config.beta_learning_rate)
        self.data_collator = _Collator(self.data_collator)
        self._best_step: int | None = None  # the step of the beta that was loaded at the end, if it is not the last
        self._evaluates = False  # all of eval_dataset
        self._held_out = self._keep_held_out()

    def _columns(self) -> list[str]:
        """Return the columns that the rule and its regularisers read."""
        reads = set(self.rule.reads)
        if self.learns:
            reads |= {"ref_entropy"} if self.config.lambda_entropy > 0 else set()
            reads |= {"task"} if self.config.lambda_consistency > 0 else set()
        reads |= self.rule.needs
        return [column for read, column in _READ.items() if read in reads]

    def _weights(self, train_dataset: Dataset | IterableDataset | None) -> Regularization:
        """Return the penalties' weights, with alpha computed from the data if the configuration leaves it open."""
        config = self.config
        entropy: Any = None
        if config.alpha is None and config.lambda_entropy > 0 and train_dataset is not None:
            if isinstance(train_dataset, IterableDataset):
                raise ValueError("config.alpha: got None, expected a number; a stream's mean entropy is unknown")
            entropy = train_dataset["ref_entropy"][:]
        known = config.alpha is not None or entropy is not None
        weights = config.regularization(config.alpha_for(entropy) if known else None)
        return weights if isinstance(self.beta_module, BetaNetwork) else replace(weights, smoothness=0.0)

    def _check_trainer(self) -> None:
        """Raise for what TRL's trainer is set to do and this beta cannot."""
        name = type(self.beta_module).__name__
        sorting = [own for own in self.loss_types if own.startswith("aot")]
        if sorting and not isinstance(self.beta_module, ConstantBeta):
            raise ValueError(f"args.loss_type: got {sorting[0]!r}, which sorts pairs apart from their beta; expected "
                             "another, or a ConstantBeta")  # fmt: skip
        if self.learns and self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16":
            raise ValueError("args.fp16: got float16, expected bf16 or float32: DeepSpeed scales the loss internally")
        if not self.rule.needs & {"direction", "kl"}:
            return
        if self._in_pieces():
            raise ValueError(f"beta: {name} reads both models' logits in training, expected FSDP and ZeRO-3 to be off")
        peft = is_peft_model(self.model)
        if self.ref_model is None and not peft:
            raise ValueError(f"args.precompute_ref_log_probs: got True, but {name} reads the reference in training; "
                             "expected False, or a ref_model")  # fmt: skip
        if self.ref_model is None and "ref" in self.accelerator.unwrap_model(self.model).peft_config:
            raise ValueError(f"model: got an adapter to train on, but {name} reads the reference, which is then an "
                             "adapter too; expected the model and a peft_config, or a ref_model")  # fmt: skip
        if self._is_vision_dataset or (self.args.max_length is not None and self.args.truncation_mode == "keep_end"):
            raise ValueError(f"train_dataset: got images, or prompts to be cut at their start, expected texts cut at "
                             f"their end: {name} reads each prompt once for both answers")  # fmt: skip
        if "kl" in self.rule.needs and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(f"train_dataset: got a stream, expected a Dataset: {name} samples answers to its prompts")

    def _keep_held_out(self) -> HeldOutPairs | None:
        """Number the pairs of eval_dataset, and return what the main process keeps of them; None elsewhere."""
        data: Any = self.eval_dataset
        if not data:
            return None
        why = "it has images" if self._is_vision_dataset else cannot_keep(data)
        if why:
            logger.warning("eval_dataset: %s; nothing of its single pairs is kept", why)
            return None
        self.eval_dataset = number_rows(data)
        if not self.is_world_process_zero():
            return None
        args, tokens = self.args, self._tokenizer
        plain = self.loss_types == ["sigmoid"] and args.f_divergence_type == "reverse_kl"
        plain = plain and not (args.label_smoothing or args.use_weighting or args.ld_alpha)
        return HeldOutPairs(
            data, self.rule, self.config, self.regularization, seed=args.seed, plain=plain,
            eos_token=tokens.eos_token, device=self.accelerator.device,
        )  # fmt: skip

    def _in_pieces(self) -> bool:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._own_columns if name not in self._signature_columns]

    def _prepare_dataset(self, dataset, *args, **kwargs):
        found = super()._prepare_dataset(dataset, *args, **kwargs)
        if self._shared_prefix:
            settings = kwargs.get("args") or args[1]  # self.args is not there yet
            most = math.inf if settings.max_length is None else settings.max_length
            if isinstance(found, Dataset):
                counts = token_counts(found)
                most = min(most, int((counts[:, 0] + counts[:, 1:].max(axis=1)).max())) if len(counts) else 0
            self._longest = max(self._longest, most)
        return found

    def _compute_loss(self, model, inputs, return_outputs):
        columns, inputs = self._split(inputs)
        rows = columns.pop(ROW, None)  # of pairs of eval_dataset
        outputs = self._scores(model, inputs)
        if not self.precompute_ref_logps:
            ref = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
        ratios = self._log_ratios(model, outputs, inputs)
        observation = self._observe(columns, inputs, ratios)
        self.rule.train(self.model.training)
        output = self.rule(observation)  # of the whole batch, on every process
        if rows is not None and self._evaluates:
            self._keep_scores(rows, inputs, ratios, output.beta)
        size = len(inputs["ref_chosen_logps"])
        own = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        s = scale(output.beta, self.config.form)[own]
        loss, found = self._loss_of_trl(_Known(model, outputs), inputs, s, return_outputs)
        if output.smoothing is not None:
            raise ValueError(
                f"beta: {type(self.rule).__name__} smooths labels, which this trainer does for all pairs alike; set "
                "label_smoothing, or train with dpoviz.training.loop"
            )
        if output.weight is not None:
            loss = self._weighted(outputs, inputs, s, output.weight[own], output.divisor)
        added = self._penalties(output, observation)
        self._log_beta(output, observation, ratios, loss, added)
        total = loss + sum(added.terms.values())
        return (total, found) if return_outputs else total

    def _keep_scores(self, rows: Tensor, inputs: dict[str, Any], ratios: Tensor, beta: Tensor) -> None:
        ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)
        rows, ref = self.accelerator.gather(rows), self.accelerator.gather(ref)
        if self._held_out is not None:
            self._held_out.add(rows, ratios, ref, beta.detach())

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the columns that beta reads, and the rest, laid out in shared-prefix rows if that was asked for."""
        rest = {name: value for name, value in inputs.items() if name not in self._own_columns}
        if "shared_rows" not in rest and self._shares():
            masks = (rest["attention_mask"], rest["completion_mask"])
            rest["shared_rows"] = lay_out_rows(rest["input_ids"], *masks, room=2 * int(self._longest))
        return {name: inputs[name] for name in self._own_columns if name in inputs}, rest

    def _scores(self, model, inputs: dict[str, Any]) -> Any:
        """Return the policy's scores of the tokens, from the call that TRL makes."""
        kept = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        given = {name: value for name, value in inputs.items() if name not in kept}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**given, use_cache=False, labels=labels, fused_lm_head=True)

    def _log_ratios(self, model, outputs, inputs: dict[str, Any]) -> Tensor:
        """Return (B, 2) log π/π_ref of chosen and rejected, of all processes, without a gradient."""
        logps = super().compute_ref_log_probs(_Known(model, outputs), inputs)  # sums over tokens as TRL does
        ref = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.accelerator.gather(torch.stack([a - b for a, b in zip(logps, ref, strict=True)], dim=1).detach())

    def _observe(self, columns: dict[str, Any], inputs: dict[str, Any], ratios: Tensor) -> Observation:
        """Return the rule's observation of the batch of all processes."""
        gathered = {name: self.accelerator.gather(v) for name, v in columns.items() if isinstance(v, Tensor)}
        nothing = ratios.new_zeros(len(ratios))
        extras: dict[str, Any] = {}
        if "answer_entropy" in self.rule.needs:
            vocabulary = self.model.config.get_text_config().vocab_size
            extras["answer_entropy"] = gathered[OF_ANSWERS] / math.log(vocabulary)
        if "reward_margin" in self.rule.needs:
            extras["reward_margin"] = gathered[REWARD_MARGIN]
        if "direction" in self.rule.needs:
            extras["direction"] = self.accelerator.gather(self._directions(inputs))
        if "kl" in self.rule.needs and self.model.training:
            extras["kl"] = self._kl()
        return Observation(
            h=ratios[:, 0] - ratios[:, 1],
            x=gathered.get("ref_features", nothing[:, None]),
            task=gather_object(list(columns["task"])) if "task" in columns else ["all"] * len(ratios),
            ref_entropy=gathered.get("ref_entropy", nothing),
            **extras,
        )

    def _models(self) -> Models:
        policy = self.accelerator.unwrap_model(self.model)
        reference = policy if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        return Models(policy, reference, self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)

    def _directions(self, inputs: dict[str, Any]) -> Tensor:
        prompts, answers = [], []
        masks = (inputs[name].bool() for name in ("attention_mask", "completion_mask"))
        for ids, there, answered in zip(inputs["input_ids"], *masks, strict=True):
            prompts.append(ids[there & ~answered].tolist())
            answers.append(ids[there & answered].tolist())
        models, size = self._models(), len(prompts) // 2
        pairs = [list(pair) for pair in zip(answers[:size], answers[size:], strict=True)]
        assert models.reference is not None
        return perturbed_directions(
            models.policy, models.reference, prompts[:size], pairs, epsilon=self.rule.epsilon, pad_id=models.pad_id
        )

    def _kl(self) -> dict[str, float] | None:
        """Return the KL of each task every `rule.every` steps, in the first micro-batch; None otherwise."""
        step = self.state.global_step
        if step % self.rule.every or step == self._measured_kl:
            return None
        self._measured_kl = step
        data, config = self.train_dataset, self.config
        assert isinstance(data, Dataset)  # others are refused
        task = data["task"][:] if "task" in data.column_names else ["all"] * len(data)
        prompts, tasks = first_prompts(data["prompt_ids"], task, config.probe_prompts)
        found = sampled_kl(
            self._models(), prompts, tasks, max_new_tokens=config.max_new_tokens, seed=config.seed + step
        )
        return {name.removeprefix("kl/"): value for name, value in found.items() if name.startswith("kl/")}

    def _loss_of_trl(
        self, model, inputs: dict[str, Any], s: Tensor, return_outputs: bool = False
    ) -> tuple[Tensor, Any]:
        """Return TRL's loss with a factor s per pair, and the model's outputs if they are asked for."""
        # every loss of the parent class multiplies by self.beta; a (B,) tensor there gives each pair its own factor
        before, self.beta, self.precompute_ref_logps = (self.beta, self.precompute_ref_logps), s, True  # type: ignore[assignment]
        try:
            found = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.beta, self.precompute_ref_logps = before
        return found if return_outputs else (found, None)

    def _weighted(self, outputs, inputs: dict[str, Any], s: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        """Return the process's part of the mean of TRL's losses with a weight per pair; it averages to Σ w·ℓ/Σ w."""
        found: Tensor = 0.0 * outputs.log_probs.sum()  # of a process whose pairs are all left out
        fields = {name: value for name, value in _fields(outputs).items() if isinstance(value, Tensor) and value.ndim}
        kept = ("input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        with self._aside():
            for value in weight.unique():
                rows = (weight == value).nonzero().flatten()
                of = {len(weight): rows, 2 * len(weight): torch.cat([rows, rows + len(weight)])}
                if value > 0:
                    known = SimpleNamespace(**{name: v[of[len(v)]] for name, v in fields.items()})
                    part = {name: inputs[name][of[len(inputs[name])]] for name in kept}
                    loss, _ = self._loss_of_trl(_Known(None, known), part, s[rows])
                    found = found + value * len(rows) * loss
        found = found * self.accelerator.num_processes / total
        return found + self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else found

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave TRL's metrics, and the other processes, out of a computation."""
        kept = (self.accelerator, self._metrics, self._total_train_tokens, self.aux_loss_enabled)
        self.accelerator, self.aux_loss_enabled = _Alone(self.accelerator), False
        self._metrics = {mode: type(own)(list) for mode, own in self._metrics.items()}
        try:
            yield
        finally:
            self.accelerator, self._metrics, self._total_train_tokens, self.aux_loss_enabled = kept

    def _penalties(self, output: RuleOutput, observation: Observation) -> Penalties:
        if self.regularization is None:
            return Penalties({}, torch.zeros_like(output.beta))
        return penalties(
            output.beta,
            self.regularization,
            ref_entropy=observation.ref_entropy,
            beta_fn=self.beta_module,
            x=observation.x,
            task=observation.task,
        )

    def _log_beta(
        self, output: RuleOutput, observation: Observation, ratios: Tensor, loss: Tensor, added: Penalties
    ) -> None:
        beta, task = output.beta.detach(), observation.task
        row = {f"loss/{name}": term.item() for name, term in added.terms.items()}
        for name, values in (
            ("beta", beta),
            ("s", scale(beta, self.config.form)),
            ("logratio/chosen", ratios[:, 0]),
            ("logratio/rejected", ratios[:, 1]),
        ):
            row |= means_by_task(name, values.tolist(), task)
        row |= {f"kl/{name}": value for name, value in (observation.kl or {}).items()}
        if output.beta.requires_grad and set(self.loss_types) != {"sft"}:  # which has no beta
            terms = {"dpo": loss, **added.terms}
            objective: Any = SimpleNamespace(terms=terms, squared_gradients=added.squared_gradients.detach())
            pulls = gradients_on_beta(objective, output.beta)
            row |= self._fractions(pulls, task)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in row.items():
            metrics[name].append(value)

    def _fractions(self, pulls: dict[str, Tensor], task: Sequence[str]) -> dict[str, float]:
        """Return the fraction of each term in the pulls on the betas of each task."""
        # a process has the gradient of its own pairs' loss, times the number of processes
        pulls["dpo"] = self.accelerator.reduce(pulls["dpo"], reduction="mean")
        means = {term: means_by_task("", pull.abs().tolist(), task) for term, pull in pulls.items()}
        whole = {name: sum(own[name] for own in means.values()) for name in means["dpo"]}
        return {
            f"pull/{term}{name}": value / whole[name]
            for term, own in means.items()
            for name, value in own.items()
            if whole[name] > 0
        }

    def _shares(self) -> bool:
        """Return whether batches are laid out in shared-prefix rows; say so once where they cannot be."""
        if not self._shared_prefix:
            return False
        models = [model for model in (self.model, self.ref_model) if model is not None]
        why = self._cannot_share(models)
        if why:
            self._shared_prefix = False
            logger.warning("shared_prefix: %s; TRL's own rows are used, one for each answer", why)
        elif not self._sharing:
            self._sharing = True
            fields = ("entropy", "mean_logits", "is_top1", *(["log_sum_sq_probs"] if self.use_weighting else []))
            for model in models:
                own = language_model(self.accelerator.unwrap_model(model, keep_fp32_wrapper=True))
                share_prefixes(own, fields if model is self.model else ())
        return self._shared_prefix

    def _cannot_share(self, models: list) -> str:
        """Return why batches cannot be laid out in shared-prefix rows; "" if they can."""
        if self._in_pieces():
            # accelerate's FSDP2 holds the last norm and the head as one piece: after the backward pass of the head,
            # which is called once more here, it frees the weights of both, and that of the norm reads freed memory
            return "FSDP or ZeRO-3 has cut up the model"
        if self._is_vision_dataset:
            return "the data set has images"
        if self.aux_loss_enabled:
            return "the routers' loss is computed on TRL's own rows (args.router_aux_loss_coef=0 turns it off)"
        for model in models:
            try:
                own = language_model(self.accelerator.unwrap_model(model, keep_fp32_wrapper=True))
                self._longest = min(self._longest, context_length(own) or math.inf)
                if self._longest == math.inf:
                    return "the length of a stream's rows is unknown (args.max_length says it)"
                with _without_autocast(own):
                    right = supports_shared_prefix(own, int(self._longest), 2 * int(self._longest))
                if not right:
                    return f"{type(own).__name__} gives other scores there than by itself"
            except ValueError as error:  # an adapter of prompts, or no causal language model
                return str(error)
        return ""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # TRL computes these on its own tokens, which in a chat include what the template adds after the end of a turn
        found = dataset.column_names or []  # a stream may not know its column names; TRL refuses streams here
        ours = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column in found]
        if found and self.accelerator.num_processes > 1 and not dataset.cache_files:
            raise ValueError(
                f"{name}_dataset: is in memory; with args.precompute_ref_log_probs and several processes expected one "
                "on disk, where they share the file that TRL writes beside it; use save_to_disk and load_from_disk"
            )
        return super()._precompute_ref_logps(dataset.remove_columns(ours) if ours else dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, self._split(inputs)[1])

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            _require_columns("eval_dataset", eval_dataset, self._needed)
        if eval_dataset is not None:  # another set, or within the evaluation of several
            return super().evaluate(eval_dataset, *args, **kwargs)
        self._evaluates = True
        try:
            found = super().evaluate(None, *args, **kwargs)
        finally:
            self._evaluates = False
        if self._held_out is not None:
            self._held_out.end_evaluation(self.state.global_step)
        return found

    def training_step(self, *args, **kwargs) -> Tensor:
        group = self.optimizer.param_groups[0]  # read before the step: DeepSpeed's engine also advances the schedule
        start = group.get("initial_lr", self.args.learning_rate)
        rate = self.config.beta_learning_rate * (float(group["lr"]) / start if start else 1.0)
        loss = super().training_step(*args, **kwargs)
        if self.learns and self.accelerator.sync_gradients:
            self._step_beta(rate)
        return loss

    def _step_beta(self, learning_rate: float) -> None:
        """Step beta with its own optimizer, because those of FSDP and DeepSpeed know only the policy's weights."""
        (group,), scaler = self.beta_optimizer.param_groups, self.accelerator.scaler
        for weight in group["params"]:
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = self.accelerator.reduce(own, reduction="mean")
            if scaler is not None:  # float16: the loss was multiplied by this before backward
                weight.grad /= scaler.get_scale()
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.beta_max_norm)
        if norm.isfinite():  # a single non-finite step would ruin beta for good
            group["lr"] = learning_rate
            self.beta_optimizer.step()
        self.beta_optimizer.zero_grad()

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None  # transformers fills it in
            about, known = self._about(), self.beta_module.made_for
            if known is None:  # else it was trained before, and knows its reference
                self.beta_module.made_for = MadeFor(self.config.form, str(about["reference"]), None, FEATURES)
            self.beta_module.save(Path(folder) / "beta", **about)
            if self._held_out is not None:
                step = self.state.global_step if self._best_step is None else self._best_step
                self._held_out.write(Path(folder), step, self._facts())
        super().save_model(output_dir, *args, **kwargs)

    def _about(self) -> dict[str, str | None]:
        """Return what the card and config.json say of beta besides its arguments."""
        reference = self.model if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        return {"form": self.config.form, "paper": self.rule.paper, "reference": reference.config._name_or_path or None}

    def _facts(self) -> dict[str, Any]:
        """Return what run.json says of a run, as far as this trainer has it."""
        form, config, args = self.config.form, self.config, self.args
        found: dict[str, Any] = {name: {form: getattr(config, name)} for name in ("beta0", "beta_min", "beta_max")}
        alpha = None if self.regularization is None else self.regularization.alpha
        batch = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        own = {name: getattr(config, name) for name in _SETTINGS} | {"batch_size": batch, "seed": args.seed}
        if isinstance(self.train_dataset, Dataset):
            found["training pairs"] = len(self.train_dataset)
        return {**found, "alpha": {} if alpha is None else {form: alpha}, "baseline": None, "training": {form: own}}

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / "README.md"
            card.write_text(card.read_text(encoding="utf-8") + self._section(), encoding="utf-8")

    def _section(self) -> str:
        """Return the section of the model card about beta."""
        about, name = self._about(), self.hub_model_id or self.args.output_dir
        return f"""
## β

The loss is scaled per pair by [dpoviz](https://pypi.org/project/dpoviz), whose β is in the folder `beta`.

- Rule: {type(self.beta_module).__name__} ([arXiv:{about["paper"]}](https://arxiv.org/abs/{about["paper"]}))
- Form: {about["form"]} (h is multiplied by {"1/β" if about["form"] == "inverse" else "β"})
- Reference: {about["reference"]}

```python
from transformers import AutoModelForCausalLM
from dpoviz import load_beta
policy, beta = AutoModelForCausalLM.from_pretrained("{name}"), load_beta("{name}")
```
"""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.learns and self.args.should_save:
            torch.save(self.beta_optimizer.state_dict(), Path(output_dir) / "beta" / "optimizer.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # always called, unlike _load_from_checkpoint
        self._best_step = None
        if checkpoint is not None:
            self._load_beta(checkpoint)
            if self._held_out is not None:
                self._held_out.restore(Path(checkpoint))
            saved = Path(checkpoint) / "beta" / "optimizer.pt"
            if self.learns and saved.is_file():  # absent with save_only_model
                self.beta_optimizer.load_state_dict(torch.load(saved, weights_only=True))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_beta(self.state.best_model_checkpoint)
        self._best_step = self.state.best_global_step
        if self._held_out is not None:  # log-ratios of the best policy, not of the last
            self._held_out.restore(Path(self.state.best_model_checkpoint), steps=False)

    def _load_beta(self, checkpoint: str) -> None:
        self.beta_module.load_state_dict(load_file(Path(checkpoint) / "beta" / "model.safetensors"))


def _fields(outputs) -> dict[str, Any]:
    """Return the fields of a model's output, TRL's or ours, by name."""
    return dict(outputs) if isinstance(outputs, dict) else outputs._asdict()


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Take away the half precision that accelerate puts around a model's forward, in which no trial is exact."""
    wrapped, own = model.forward, getattr(model, "_original_forward", None)
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped
