"""Reading arbitrary bytes and values gives a valid corpus or config, or a UserError."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.engine.config_auto import resolve_deepspeed_config
from distilspeed.trainer.engine.config_batch import resolve_batch_equation
from distilspeed.trainer.engine.config_check import check_deepspeed_config
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
GOOD_CONFIG = json.loads(CONFIGS[0].read_text())
MANIFEST = "manifest.json"
BOUNDED = settings(
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", 1, 0, -1, 1e-4, "AdamW", "cpu", "fp16", 10**30])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutations(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """A valid JSON object with up to three values replaced, removed or added anywhere inside."""
    mutated = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = mutated
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else "new"
            inner = place[key] if keys else None
            if not (isinstance(inner, dict | list) and inner) or draw(st.booleans()):
                break
            place = inner
        if keys and draw(st.integers(0, 3)) == 0:
            del place[key]
        elif isinstance(place, dict) and draw(st.integers(0, 3)) == 0:
            place[draw(st.text(max_size=8))] = draw(values)
        elif keys or isinstance(place, dict):
            place[key] = draw(values)
    return mutated


# --- the DeepSpeed config -------------------------------------------------------------------------------


def read_and_resolve(path: Path) -> None:
    """Read, resolve and check a config, as a run does."""
    config = read_deepspeed_config(path)
    batch = resolve_batch_equation(config, 2)
    check_deepspeed_config(resolve_deepspeed_config(config, batch, 100, None), 100)


@BOUNDED
@given(content=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b"\xef\xbb\xbf{}")
def test_any_bytes_are_a_config_or_a_user_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read_and_resolve(path)


FULL_CONFIG = GOOD_CONFIG | {
    "fp16": {"enabled": False, "loss_scale": 0},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": None},
    "tensorboard": {"enabled": False, "output_path": "logs"},
    "flops_profiler": {"enabled": False, "profile_step": 2},
    "checkpoint": {"tag_validation": "Warn"},
    "aio": {"block_size": 4096},
    "data_efficiency": {"enabled": False, "data_sampling": {"enabled": False}},
    "steps_per_print": 10,
}


@BOUNDED
@given(config=mutations(FULL_CONFIG))
@example(config=FULL_CONFIG)
def test_a_mutated_config_resolves_or_is_a_user_error(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    if config == FULL_CONFIG:
        read_and_resolve(path)
    with contextlib.suppress(UserError):
        read_and_resolve(path)


@BOUNDED
@given(key=st.text(min_size=1), value=values, section=st.sampled_from(["", *FULL_CONFIG]))
def test_an_unknown_key_is_always_refused(key: str, value: object, section: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(FULL_CONFIG))
    place = config[section] if isinstance(config.get(section), dict) else config
    place[f"my {key}"] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError):  # some values are refused before the key
        read_and_resolve(path)


# --- the corpus -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied_corpus_dir(small_corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_corpus_dir, tmp_path_factory.mktemp("fuzz") / "corpus"))


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Any:
    """Replace the file's content until the block ends."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def files_of(corpus: Path) -> list[Path]:
    return [corpus / record["path"] for record in json.loads((corpus / MANIFEST).read_text())["files"]]


@BOUNDED
@given(content=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
@example(content=b'{"format_version": 1}')
@example(content=b"[" * 100_000)
def test_any_manifest_is_a_corpus_or_a_user_error(content: bytes, copied_corpus_dir: Path) -> None:
    with replaced(copied_corpus_dir / MANIFEST, content), contextlib.suppress(UserError):
        open_corpus(copied_corpus_dir)


@BOUNDED
@given(data=st.data())
def test_a_mutated_manifest_is_a_corpus_or_a_user_error(data: st.DataObject, copied_corpus_dir: Path) -> None:
    good = json.loads((copied_corpus_dir / MANIFEST).read_text())
    mutated = json.dumps(data.draw(mutations(good))).encode()
    with replaced(copied_corpus_dir / MANIFEST, mutated), contextlib.suppress(UserError):
        open_corpus(copied_corpus_dir)


@BOUNDED
@given(data=st.data())
def test_other_content_is_a_corpus_or_a_user_error(data: st.DataObject, copied_corpus_dir: Path) -> None:
    """The content has the same size, and checksums are not verified, so only reading can find the damage."""
    path = data.draw(st.sampled_from(files_of(copied_corpus_dir)))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.binary(min_size=1, max_size=64))[: len(content) - start]
    with (
        replaced(path, content[:start] + other + content[start + len(other) :]),
        contextlib.suppress(UserError),
    ):
        open_corpus(copied_corpus_dir)


@BOUNDED
@given(data=st.data())
def test_verifying_checksums_finds_any_flipped_byte(data: st.DataObject, copied_corpus_dir: Path) -> None:
    path = data.draw(st.sampled_from(files_of(copied_corpus_dir)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with replaced(path, bytes(content)), raises_user_error("damaged-corpus"):
        open_corpus(copied_corpus_dir, verify_checksums=True)
    open_corpus(copied_corpus_dir)
