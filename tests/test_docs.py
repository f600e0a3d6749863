"""README and docs: links lead somewhere, flags exist, and the codes of errors are complete."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from distilspeed.trainer.errors import UserErrorCode

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(path for path in (ROOT / "launch").glob("*.py") if path.stem != "quickstart_data")
COMMANDS.append(ROOT / "launch" / "benchmarks" / "task_from_text.py")
# Flags of launchers, sbatch, srun (--kill-on-bad-exit, up to its first hyphen) and launch/test.sh.
OF_OTHERS = {"--num_gpus", "--array", "--nodes", "--hostfile", "--kill", "--module", "--nproc_per_node"}
OF_OTHERS |= {"--max_restarts", "--multi_gpu", "--num_processes", "--full", "--from_scratch"}
OF_OTHERS |= {"--no"}  # of pip's --no-deps
# The left column has the other project's flags.
MIGRATION_ROW = re.compile(r"^\|.*?\|")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    helps = [
        subprocess.run([sys.executable, command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in COMMANDS
    ]
    return set(re.findall(r"--[a-z]\w+", " ".join(helps))) | OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page: Path, known_flags: set[str]) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    if page.name == "migration.md":
        lines = [MIGRATION_ROW.sub("", line) for line in lines]
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", "\n".join(lines)))
    assert named <= known_flags


def test_the_table_of_errors_has_every_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    codes = re.findall(r"`(.*?)`", " ".join(first_cells))
    assert sorted(codes) == sorted(get_args(UserErrorCode))
