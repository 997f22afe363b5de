"""Print docs/cli.md: every command with its help, as the command line itself gives it."""

from __future__ import annotations

import click

from layerlake.cli import cli


def walk(command: click.Command, context: click.Context) -> None:
    """Print a command's help, then those of its subcommands."""
    print(f"\n## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                walk(child, click.Context(child, info_name=name, parent=context, terminal_width=100))


def main() -> None:
    """Print the page."""
    print("# The command line\n\nWritten by `make docs`; do not edit.")
    walk(cli, click.Context(cli, info_name="layerlake", terminal_width=100))


if __name__ == "__main__":
    main()
