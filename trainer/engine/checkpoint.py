"""Checkpoints of a run: DeepSpeed's own, written whole or not at all, checked before they are used.

``checkpoints/step_000000500/`` appears by renaming, with every file on disk and listed with size and SHA-256 in
``manifest.json``; ``latest`` names it only then. What DeepSpeed writes are pickles, so only a run's own are loaded,
and of those only what the manifest lists, unchanged.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import deepspeed
import torch.distributed
from deepspeed.checkpoint import ds_to_universal

from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import FileRecord, files_below, sync_tree, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = ".incomplete"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Progress:
    """How far a run has come, over all ranks.

    Attributes:
        step: optimiser steps, which are updates of the parameters.
        batches: global batches taken: more than steps where fp16 has overflowed.
        tokens: real tokens of these batches.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0

    def after(self, is_update: bool, tokens: int) -> Self:
        """With another global batch of ``tokens`` real tokens."""
        return replace(
            self, step=self.step + is_update, batches=self.batches + 1, tokens=self.tokens + tokens
        )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its manifest describes it."""

    path: Path
    progress: Progress
    world_size: int
    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        del fields["path"]
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """``ValueError``, ``KeyError`` or ``TypeError`` for what is no manifest; UserError for other formats."""
        fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = fields["format_version"]
        if found != FORMAT_VERSION:
            raise UserError(
                "unsupported-format",
                f"the checkpoint {path} has format {found}, and this version reads {FORMAT_VERSION}; "
                "go on with the version that wrote it, or start anew with another --output_dir",
            )
        files = tuple(FileRecord(**file) for file in fields["files"])
        return cls(path, Progress(**fields["progress"]), fields["world_size"], files)

    def damage(self) -> str | None:
        """What is wrong with it; None: it holds what was saved, and nothing else."""
        if self.path.is_symlink():
            return "it is a link to another folder"
        strange = {path.relative_to(self.path).as_posix() for path in files_below(self.path)}
        strange -= {MANIFEST, *(file.path for file in self.files)}
        if strange:
            return f"{min(strange)} does not belong to it"
        return next(filter(None, (file.damage(self.path) for file in self.files)), None)


class Checkpoints:
    """The folder ``checkpoints/`` of a run.

    Args:
        folder: made at the first save.
        keep_last: how many are kept, the newest ones.
        keep_every: those of every so many steps are kept, too.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and unchanged, on every rank what rank 0 found; None: there is none yet.

        What is damaged is said, and set aside under another name.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        found: list[Checkpoint | None] = [None]
        if torch.distributed.get_rank() == 0:
            found = [self._find_newest_good()]
        torch.distributed.broadcast_object_list(found)
        return found[0]

    def _find_newest_good(self) -> Checkpoint | None:
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._complete()):
            try:
                checkpoint = Checkpoint.read(path)
                problem = checkpoint.damage()
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                problem = f"its {MANIFEST} cannot be read: {first_line(error)}"
            except OSError as error:  # the disk's or the network's, which may pass
                raise UserError(
                    "unreadable-file",
                    f"the checkpoint {path} cannot be read: {first_line(error)}; make it readable and try again",
                ) from error
            if problem is None:
                for bad, what in damaged:
                    logger.warning("the checkpoint %s is damaged: %s", bad, what)
                    _set_aside(bad)
                if damaged:
                    logger.warning("%s is used, the one before", path)
                return checkpoint
            damaged.append((path, problem))
        if damaged:
            path, what = damaged[0]
            raise UserError(
                "damaged-checkpoint",
                f"no checkpoint in {self.folder} is whole ({path.name}: {what}); "
                "bring one back from a copy, or start anew with another --output_dir",
            )
        return None

    def save(self, engine: deepspeed.DeepSpeedEngine, progress: Progress) -> None:
        """Save parameters, optimiser, schedule, loss scale and progress; called by every rank.

        Raises:
            UserError: it cannot be written; the earlier ones are as they were.
        """
        path = self.folder / _name(progress.step)
        beside = path.with_name(path.name + UNFINISHED)
        is_first = torch.distributed.get_rank() == 0
        with _errors_of_writing(beside):
            if is_first:
                self._remove_unfinished()
            engine.save_checkpoint(
                str(self.folder), tag=beside.name, save_latest=False
            )  # begins and ends in step
            if not is_first:
                return
            parts = len(list(beside.glob("*_optim_states.pt")))
            if engine.zero_optimization() and parts != torch.distributed.get_world_size():
                raise UserError(
                    "unshared-output",
                    f"{beside} has the states of {parts} of {torch.distributed.get_world_size()} ranks; "
                    "choose an --output_dir that all hosts share, and no node-local or decoupled checkpoints",
                )
            for script in self.folder.glob("*.py"):
                script.chmod(0o644)  # DeepSpeed's tools for its checkpoints, which it makes executable
            sync_tree(beside)
            files = tuple(FileRecord.of(beside, file) for file in files_below(beside))
            checkpoint = Checkpoint(path, progress, torch.distributed.get_world_size(), files)
            write_text(beside / MANIFEST, checkpoint.to_json())
            beside.rename(path)
            write_text(self.folder / "latest", path.name)  # which syncs the folder
            for old in self._complete()[: -self.keep_last]:
                if not self.keep_every or _step(old) % self.keep_every:
                    shutil.rmtree(old.rename(old.with_name(old.name + UNFINISHED)))

    def load(self, engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> Progress:
        """Load a checkpoint into an engine that was made with ``config_to_load``; called by every rank.

        The engine keeps its own settings of optimiser, schedule and clipping: those of its config.

        Raises:
            UserError: DeepSpeed cannot load it.
        """
        path = _universal(checkpoint) if engine.load_universal_checkpoint() else checkpoint.path
        try:
            # DeepSpeed's optimiser for bf16 prints where it is.
            with _own_settings(engine, checkpoint.progress.step), contextlib.redirect_stdout(io.StringIO()):
                loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name)
        except Exception as error:  # DeepSpeed raises whatever it came upon
            raise UserError(
                "damaged-checkpoint", f"the checkpoint {path} cannot be loaded: {first_line(error)}"
            ) from error
        if loaded is None:
            raise UserError("damaged-checkpoint", f"DeepSpeed finds no checkpoint in {path}")
        if path != checkpoint.path:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                self._remove_unfinished()
        return checkpoint.progress

    def config_to_load(self, checkpoint: Checkpoint, config: ResolvedConfig) -> ResolvedConfig:
        """The DeepSpeed config of an engine that is to load ``checkpoint``; called by every rank.

        ZeRO shares the optimiser's states out over the ranks. Where their number is another than that of the ranks
        that saved them, this makes a universal checkpoint, which goes again when it has been loaded.

        Raises:
            UserError: there is no room for it.
        """
        if config.zero_stage == 0 or checkpoint.world_size == torch.distributed.get_world_size():
            return config
        if torch.distributed.get_rank() == 0:
            logger.info(
                "%s is from %d ranks: it is laid out anew for %d",
                checkpoint.path,
                checkpoint.world_size,
                torch.distributed.get_world_size(),
            )
            with _errors_of_writing(_universal(checkpoint)):
                self._remove_unfinished()
                _make_universal(checkpoint)
        torch.distributed.barrier()
        return config.with_sections(checkpoint=config.section("checkpoint") | {"load_universal": True})

    def newest_step(self) -> int:
        """The step of the newest checkpoint, good or not; 0: there is none."""
        return max(map(_step, self._complete()), default=0)

    def _complete(self) -> list[Path]:
        """The folders that were completed, from oldest to newest."""
        return sorted(self.folder.glob(_name(0).replace("0", "[0-9]")))

    def _remove_unfinished(self) -> None:
        """Remove what was being written, or removed, when a process was killed."""
        for path in self.folder.glob(f"*{UNFINISHED}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()  # of a file that was being replaced (write_text)


@contextmanager
def _own_settings(engine: deepspeed.DeepSpeedEngine, steps: int) -> Iterator[None]:
    """Give an engine its own settings back after a checkpoint, which brings those it was saved with.

    The schedule is taken ``steps`` further from its start: to the rate, bit for bit, that it has reached.
    """
    of_states = ("params", "step")  # apex and DeepSpeed count steps in the group
    optimizer, schedule = engine.basic_optimizer, engine.lr_scheduler
    groups = [
        {key: value for key, value in group.items() if key not in of_states}
        for group in optimizer.param_groups
    ]
    start = copy.deepcopy(schedule.state_dict()) if schedule else {}
    yield
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    if schedule:
        schedule.load_state_dict(start)
        with warnings.catch_warnings():
            # torch's, that a schedule advances before its optimiser has.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(steps):
                schedule.step()
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _universal(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.with_name(f"{checkpoint.path.name}.universal{UNFINISHED}")


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _make_universal(checkpoint: Checkpoint) -> None:
    # DeepSpeed's command, in this process: one worker, for which it starts none.
    arguments = argparse.Namespace(
        input_folder=str(checkpoint.path),
        output_folder=str(_universal(checkpoint)),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except KeyError as error:
        raise UserError(
            "changed-ranks",
            f"DeepSpeed lays out Adam's states alone for another number of ranks, and {checkpoint.path} has no "
            f"{error}; resume it on {checkpoint.world_size} ranks",
        ) from error
    (checkpoint.path.parent / "latest_universal").unlink()


@contextmanager
def _errors_of_writing(path: Path) -> Iterator[None]:
    """Turn errors of writing below ``path`` into UserError, and remove what was written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save's errors are RuntimeErrors out of this file of PyTorch's; other ones are not of writing.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            "unwritable-output",
            f"cannot write {path}: {first_line(error)}; make room there and go on with --resume",
        ) from error
