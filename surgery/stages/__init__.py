"""Stages: a model cut into parts that run one after another, on one machine or on several."""
