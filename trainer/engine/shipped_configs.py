"""The DeepSpeed configs that ship with the package, found by their bare names: ``v100x8_fp16``."""

from pathlib import Path

# Beside trainer/, in a checkout and in the installed package.
FOLDER = Path(__file__).parents[2] / "ds_configs"


def shipped_configs() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_config(path: Path) -> Path:
    """The file that ``path`` is, or else the one that ships under that name; ``path`` itself where there is neither."""
    if not path.is_file() and str(path) in shipped_configs():
        return FOLDER / f"{path}.json"
    return path
