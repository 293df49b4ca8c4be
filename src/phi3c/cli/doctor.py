"""phi3c doctor: show what phi3c sees of this machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the facts that a bug report needs."""
    facts = diagnose()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name.replace('_', ' '):18} {'unknown' if text is None else text}")
    return 0


def diagnose() -> dict[str, object]:
    """Collect versions, instruction sets, threads, memory and folders as plain JSON values."""
    from huggingface_hub import constants

    import phi3c
    from phi3c import hub
    from phi3c.memory import total_memory
    from phi3c.threads import default_threads

    threads = default_threads()
    return {
        "phi3c": phi3c.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "platform": platform.platform(),
        **_instruction_sets(),
        "threads": threads.count,
        "thread_derivation": threads.derivation,
        "memory_bytes": total_memory(),
        "phi3c_cache": str(hub.cache_folder()),
        "hub_cache": constants.HF_HUB_CACHE,
        "hub_endpoint": constants.ENDPOINT + (" (offline)" if constants.HF_HUB_OFFLINE else ""),
        **_dependencies(),
    }


def _instruction_sets() -> dict[str, object]:
    try:
        from phi3c.cpu import cpu_info

        info = cpu_info()
    except ImportError as error:
        return {"instruction_sets": None, "chosen": f"the extension cannot be loaded: {error}"}
    return {
        "instruction_sets": list(info.available_isas),
        "chosen": info.isa,
        "cpu_features": list(info.features),
    }


def _dependencies() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("numpy", "tokenizers", "huggingface_hub", "jinja2"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions
