"""phi3c models: list the short names of models."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes none."""


def main(args: argparse.Namespace) -> int:
    """Print the aliases, one a line: name, what it is, where it comes from."""
    from phi3c.hub import ALIASES, DEFAULT_MODEL, DEMO_BYTES, DEMO_REQUIREMENT

    for name, alias in ALIASES.items():
        default = " (default)" if name == DEFAULT_MODEL else ""
        print(f"{name:14} {alias.description}{default}\n{'':14} {alias.repo}/{alias.file}")
    print(f"{'demo':14} SmolLM2-135M-Instruct, Q4_1, {DEMO_BYTES / 1e6:.0f} MB")
    print(f"{'':14} {DEMO_REQUIREMENT} from the package index")
    return 0
