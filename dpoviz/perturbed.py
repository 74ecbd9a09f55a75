"""Epsilon-DPO's look at a pair under perturbed logits."""

from __future__ import annotations


def perturbed_directions(policy, reference, prompts, answers, *, epsilon, pad_id):
    raise NotImplementedError
