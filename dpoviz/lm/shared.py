"""Score padded rows, one prompt with one answer each, in shared-prefix rows, token by token.

Trainers keep a batch as padded rows with a mask of the answers' tokens. Equal prompts among the rows, such as those of
the chosen and the rejected answer, are computed once here, and the scores are put back where the rows have them.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpoviz.lm.forward import predict_shared
from dpoviz.lm.packing import PrefixBatch, prefix_batch
from dpoviz.lm.scoring import log_softmax, token_entropies

_LOGITS_AT_ONCE = 2**25
"""Elements in one chunk of logits, 128 MiB in float32."""


class SharedRows(NamedTuple):
    """Padded rows, laid out in shared-prefix rows.

    Attributes:
        batch: the rows' prompts, each with one answer.
        scored: (R, T − 1) whether the token after each position belongs to an answer.
        order: (M,) index in `batch.targets` of each scored token, row by row.
    """

    batch: PrefixBatch
    scored: Tensor
    order: Tensor

    def to(self, device: torch.device | str) -> SharedRows:
        """Return the rows on another device."""
        return SharedRows(self.batch.to(device), self.scored.to(device), self.order.to(device))

    def put_back(self, values: Tensor) -> Tensor:
        """Return (R, T − 1) values of the targets where the rows have them, and 0 elsewhere; differentiable."""
        return values.new_zeros(self.scored.shape).masked_scatter(self.scored, values[self.order])


class TokenScores(NamedTuple):
    """Scores of tokens under the model; only `log_probs` carries a gradient, and only it is always computed.

    Attributes:
        log_probs: log-probability of the token, nats.
        entropy: entropy of the prediction, nats.
        log_sum_sq_probs: log Σ p² of the prediction.
        mean_logits: mean of the logits over the vocabulary.
        is_top1: whether the token has the largest logit.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def lay_out_rows(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, room: int) -> SharedRows:
    """Lay out padded rows; the first token of a row is never scored, because nothing predicts it.

    Args:
        input_ids: (R, T) token ids.
        attention_mask: (R, T) 0 for padding, at the end of a row.
        completion_mask: (R, T) 1 for the tokens of the answer, 0 for those of the prompt.
        room: maximum tokens per shared row, raised if one prompt with one answer is longer.
    """
    prompts, answers = [], []
    rows = (tensor.tolist() for tensor in (input_ids, attention_mask, completion_mask))
    for ids, there, answered in zip(*rows, strict=True):
        own = [(token, answer) for token, seen, answer in zip(ids, there, answered, strict=True) if seen]
        start = max(1, next((i for i, (_, answer) in enumerate(own) if answer), len(own)))
        tokens = [token for token, _ in own]
        prompts.append(tokens[:start])
        answers.append([tokens[start:] or tokens[:1]])  # a row without an answer gets one that is not put back
    batch = prefix_batch(prompts, answers, 0, room=room)
    scored = (completion_mask[:, 1:] * attention_mask[:, 1:]).bool()
    lengths = batch.owners.bincount()
    starts = (lengths.cumsum(0) - lengths)[batch.answers[:, 0]]
    counts = scored.sum(dim=1).cpu()
    order = torch.cat(
        [torch.arange(count) + start for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
    )
    return SharedRows(batch, scored, order).to(input_ids.device)


def share_prefixes(model: PreTrainedModel, fields: tuple[str, ...] = ()) -> None:
    """Let `model(shared_rows=...)` return the `TokenScores` of `SharedRows`, each (R, T − 1).

    The call goes through the model's own `forward`, so that wrappers which gather its weights or its gradients see it.
    All other calls are unchanged.

    Args:
        model: as in `score_rows`.
        fields: as in `score_rows`.
    """
    before = model.forward

    @functools.wraps(type(model).forward)  # other code reads the signature
    def forward(self, *args, shared_rows: SharedRows | None = None, **kwargs):
        if shared_rows is None:
            return before(*args, **kwargs)
        return score_rows(self, shared_rows, fields)

    model.forward = MethodType(forward, model)


def score_rows(model: PreTrainedModel, rows: SharedRows, fields: tuple[str, ...] = ()) -> TokenScores:
    """Return the `TokenScores` of rows, each (R, T − 1).

    Args:
        model: a causal language model that takes shared-prefix batches (`scoring.supports_shared_prefix`).
        rows: on the model's device.
        fields: names of the scores to compute besides `log_probs`.
    """
    found = predict_shared(model, rows.batch)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = found.head(states)
        logps = log_softmax(logits)
        with torch.no_grad():
            others = [_FIELDS[name](logits.detach(), logps.detach(), targets) for name in fields]
        return logps.gather(-1, targets[:, None]).squeeze(-1), *others

    targets = rows.batch.targets
    size = max(1, _LOGITS_AT_ONCE // model.config.get_text_config(decoder=True).vocab_size)
    parts = [
        # the backward pass makes a chunk's logits again, so that all of them are never in memory together
        checkpoint(score, states, own, use_reentrant=False)
        if torch.is_grad_enabled() and len(targets) > size
        else score(states, own)
        for states, own in zip(found.states.split(size), targets.split(size), strict=True)
    ]
    columns = [rows.put_back(torch.cat(column)) for column in zip(*parts, strict=True)]
    return TokenScores(columns[0], **dict(zip(fields, columns[1:], strict=True)))


_FIELDS = {
    "entropy": lambda logits, logps, targets: token_entropies(logps),
    "log_sum_sq_probs": lambda logits, logps, targets: (2 * logps).logsumexp(dim=-1),
    "mean_logits": lambda logits, logps, targets: logits.to(logps.dtype).mean(dim=-1),
    "is_top1": lambda logits, logps, targets: logits.argmax(dim=-1) == targets,
}
