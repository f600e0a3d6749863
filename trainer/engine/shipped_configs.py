"""The DeepSpeed configs that ship with the package, found by their names, such as ``v100x8_fp16``."""

from pathlib import Path

# Next to trainer/, both in a checkout and in the installed package.
FOLDER = Path(__file__).parents[2] / "ds_configs"


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_config(path: Path) -> Path:
    """Return ``path``, or the shipped config of that name if ``path`` is not a file."""
    if not path.is_file() and str(path) in shipped_configs():
        return FOLDER / f"{path}.json"
    return path
