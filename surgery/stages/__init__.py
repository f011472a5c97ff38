"""Stages: a model cut into parts that run one after another, on several devices or machines, and joined again."""
