"""Scores of models on benchmarks: one module a family of tasks, one for each way of running a model."""
