"""Names for ``--task`` that stand for other tasks; imports nothing slow, because parsers use it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

GLUE_PREFIX = "glue/"
# The tasks by their names on the hub, and the folders of GLUE's own files.
GLUE_FOLDERS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}


def expand_glue(names: Sequence[str], glue_dir: Path | None) -> Iterator[str]:
    """Yield the names with "glue" replaced by its nine tasks, and tasks of GLUE by their folders in ``glue_dir``."""
    for name in names:
        of_glue = GLUE_FOLDERS if name == "glue" else [name.removeprefix(GLUE_PREFIX)]
        for task in of_glue:
            if name != "glue" and not (name.startswith(GLUE_PREFIX) and task in GLUE_FOLDERS):
                yield name
            elif glue_dir is None:
                yield GLUE_PREFIX + task
            else:
                yield str(glue_dir / GLUE_FOLDERS[task])
