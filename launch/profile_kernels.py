"""Profile the fused losses against their peers: time, GB/s, share of the machine's copy bandwidth, peak memory.

    python launch/profile_kernels.py --tokens 4096 --dtype fp16 --output_dir runs/profile

Prints a table; with --output_dir also writes profile.json and roofline.png.

    python launch/profile_kernels.py --tune [--vocab_size 30522]

chooses tile and warps of the loss kernel and writes them into kernels/implementation/launch_configs.json: by timing for
the GPU of this machine, by the compiler's figures for all others. Entries that were timed elsewhere are kept.
"""

import argparse
import os
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distilspeed.kernels.profiling.settings import ProfileError, ProfileSettings
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made, write_text
from distilspeed.trainer.job.command import PlainParser, run_command, show_log, with_default


def main() -> None:
    options = _parse_arguments()
    if options.pop("tune", False):
        _tune(**options)
        return
    output_dir, trace = options.pop("output_dir", None), options.pop("trace", False)
    if trace and output_dir is None:
        raise UserError("missing-argument", "--trace needs a folder for trace.json; give --output_dir")
    # PyTorch's profiler, which measures the memory, would print log lines to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # After the parsing, because importing torch takes seconds.
    from distilspeed.kernels.profiling.profile import profile_kernels

    show_log(facts_on_stderr=True)
    try:
        settings = ProfileSettings(**options)
        if output_dir is None:
            print(profile_kernels(settings).table())
        else:
            _profile_to_folder(settings, output_dir, trace)
    except ProfileError as error:
        raise UserError("bad-argument", str(error)) from error


def _tune(vocab_size: int = ProfileSettings.vocab_size, **others: Any) -> None:
    if others:
        raise UserError(
            "conflicting-arguments",
            f"--tune takes no other flag than --vocab_size; leave out --{next(iter(others))}",
        )
    if vocab_size < 1:
        raise UserError("bad-argument", "--vocab_size must be at least 1")
    from distilspeed.kernels.implementation.launch_configs import TABLE_FILE
    from distilspeed.kernels.profiling.tuning import make_table, table_as_json

    unwritable = next(
        (path for path in (TABLE_FILE, TABLE_FILE.parent) if not os.access(path, os.W_OK)), None
    )
    if unwritable is not None:
        raise UserError(
            "unwritable-output", f"cannot write {unwritable}: no permission; tune from a checkout of your own"
        )
    if find_spec("triton") is None:
        raise UserError("missing-package", "--tune needs triton; install it")
    table = make_table(vocab_size)
    try:
        write_text(TABLE_FILE, table_as_json(table))
    except OSError as error:
        raise UserError(
            "unwritable-output", f"cannot write {TABLE_FILE}: {error}; tune from a checkout of your own"
        ) from error
    for entry in table:
        print(
            f"sm_{entry.architecture} {8 * entry.dtype_bytes}-bit {entry.pass_name}: tile {entry.tile}, "
            f"{entry.num_warps} warps, {entry.registers} registers; {entry.chosen_by}"
        )


def _profile_to_folder(settings: ProfileSettings, output_dir: Path, trace: bool) -> None:
    """Profile, print the table and write the files; check before measuring that they can be written."""
    from distilspeed.kernels.profiling.profile import profile_kernels
    from distilspeed.kernels.profiling.report import write_profile

    if find_spec("matplotlib") is None:
        raise UserError(
            "missing-package", "roofline.png needs matplotlib; install it, or leave out --output_dir"
        )
    check_unoccupied(output_dir)
    with parents_made(output_dir), folder_written_whole(output_dir) as folder:
        profile = profile_kernels(settings, trace_file=folder / "trace.json" if trace else None)
        print(profile.table())
        write_profile(profile, folder)


def _parse_arguments() -> dict[str, Any]:
    """Return the given options by their names in ``ProfileSettings``; options left out keep its defaults."""
    # Without HfArgumentParser: this command needs only torch and triton.
    parser = PlainParser(
        prog="launch/profile_kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    for each in fields(ProfileSettings):
        options: dict[str, Any] = dict(each.metadata)
        options["help"] = with_default(options["help"], None if each.default is MISSING else each.default)
        add(f"--{each.name}", **options)
    add("--output_dir", type=Path, metavar="DIR", help="a new folder for profile.json and roofline.png")
    add("--tune", action="store_true", help="write the table of kernel launches instead of profiling")
    add("--trace", action="store_true", help="also write trace.json, a Chrome trace of one round")
    add("--debug", action="store_true", help="show the traceback of an error")
    options = vars(parser.parse_args())
    options.pop("debug", None)
    return options


if __name__ == "__main__":
    run_command(main)
