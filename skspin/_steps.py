"""The steps inside estimators that are made of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sklearn.compose import ColumnTransformer
from sklearn.pipeline import FeatureUnion, Pipeline

from skspin._transformer import LLMActivationTransformer


def activation_steps(step: Any) -> Iterator[LLMActivationTransformer]:
    """Find the fitted activation transformers in pipelines, column transformers and unions."""
    if isinstance(step, LLMActivationTransformer):
        yield step
    elif isinstance(step, Pipeline):
        for _, member in step.steps:
            yield from activation_steps(member)
    elif isinstance(step, ColumnTransformer):
        for _, member, _ in step.transformers_:
            yield from activation_steps(member)
    elif isinstance(step, FeatureUnion):
        for _, member in step.transformer_list:
            yield from activation_steps(member)


def flatten(pipeline: Pipeline) -> Iterator[Any]:
    """List the steps of a pipeline in order, those of pipelines inside it among them."""
    for _, step in pipeline.steps:
        if isinstance(step, Pipeline):
            yield from flatten(step)
        else:
            yield step
