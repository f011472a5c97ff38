"""The command line: ``surgery VERB MODEL``. Only click is imported here; each command imports what it needs."""

from __future__ import annotations

import os
import sys

import click

from surgery.cli.commands import bench, compare, decompose, export, inspect, recompose
from surgery.cli.report import bisect, plan, report
from surgery.errors import SurgeryError

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-surgery", prog_name="surgery")
def cli() -> None:
    """Decompose, recompose and time exported neural networks.

    MODEL is a torch.export archive (.pt2), recognised by its content; or a state dict with --model
    package.module:factory; or, with --trust, a pickled module. Nothing in an untrusted file is run.
    """


for command in (inspect, decompose, recompose, export, bench, compare, report, plan, bisect):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every failure is one line and an exit status (2: input, 1: ours, 130: interrupted)."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("surgery: interrupted; nothing was written", err=True)
        sys.exit(130)
    except SurgeryError as error:
        click.echo(f"surgery: {error}", err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; say nothing at exit
        sys.exit(1)
    except Exception as error:  # the last resort: a bug of ours, still no bare traceback
        if os.environ.get("SURGERY_DEBUG"):
            raise
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
        click.echo(
            f"surgery: internal error: {type(error).__name__}: {line}; set SURGERY_DEBUG=1 for the traceback", err=True
        )
        sys.exit(1)
