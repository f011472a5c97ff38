"""The group of all commands. Only click is imported here; each command imports what it needs."""

from __future__ import annotations

import click

from surgery.cli.commands import bench, compare, export, inspect, recompose
from surgery.cli.decompose import decompose
from surgery.cli.report import bisect, plan, report
from surgery.cli.split import join, split

__all__ = ["cli"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-surgery", prog_name="surgery")
def cli() -> None:
    """Decompose, recompose and time exported neural networks.

    MODEL is a torch.export archive (.pt2) or an ONNX model (.onnx), recognised by its content; or a state dict with
    --model package.module:factory; or, with --trust, a pickled module. Nothing in an untrusted file is run.
    """


for command in (inspect, decompose, recompose, export, bench, compare, report, plan, bisect, split, join):
    cli.add_command(command)
