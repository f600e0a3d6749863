"""DeepSpeed checkpoints of a run: written atomically, verified before loading.

A checkpoint is written under a temporary name. Once every file is on disk and listed in ``manifest.json`` with size
and SHA-256, the folder is renamed to ``checkpoints/step_000000500/`` and ``latest`` is updated. DeepSpeed writes
pickles, which can run code: a run loads only its own checkpoints, and only if their files match the manifest.
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
from distilspeed.trainer.errors import UserError, first_line, memory_errors_named
from distilspeed.trainer.files import FileRecord, files_below, sync_tree, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = ".incomplete"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Progress:
    """The progress of a run, over all ranks.

    Attributes:
        step: optimiser steps (updates of the parameters) taken.
        batches: global batches consumed; more than ``step`` if fp16 overflowed.
        tokens: real tokens in these batches.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0

    def after(self, is_update: bool, tokens: int) -> Self:
        """Return the progress after one more global batch, with ``tokens`` real tokens."""
        return replace(
            self, step=self.step + is_update, batches=self.batches + 1, tokens=self.tokens + tokens
        )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as described by its manifest."""

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
        """Read the manifest of a checkpoint.

        Raises:
            ValueError, KeyError, TypeError: the manifest is invalid.
            UserError: the checkpoint has another format version.
        """
        fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = fields["format_version"]
        if found != FORMAT_VERSION:
            raise UserError(
                "unsupported-format",
                f"the checkpoint {path} has format {found}, but this version reads {FORMAT_VERSION}; "
                "resume with the version that wrote it, or start over in another --output_dir",
            )
        files = tuple(FileRecord(**file) for file in fields["files"])
        return cls(path, Progress(**fields["progress"]), fields["world_size"], files)

    def damage(self) -> str | None:
        """Return what is wrong with the checkpoint; None if it holds exactly the files that were saved."""
        if self.path.is_symlink():
            return "it is a symbolic link"
        strange = {path.relative_to(self.path).as_posix() for path in files_below(self.path)}
        strange -= {MANIFEST, *(file.path for file in self.files)}
        if strange:
            return f"{min(strange)} is not in its {MANIFEST}"
        return next(filter(None, (file.damage(self.path) for file in self.files)), None)


class Checkpoints:
    """The folder ``checkpoints/`` of a run.

    Args:
        folder: created at the first save.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints of every ``keep_every`` steps.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def newest_good(self) -> Checkpoint | None:
        """Return the newest complete and unchanged checkpoint; None if the run has no checkpoint yet.

        Rank 0 searches, and every rank returns its result. Damaged checkpoints are reported and renamed.

        Raises:
            UserError: there are checkpoints, but all are damaged.
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
            except OSError as error:  # a failure of the disk or the network may be temporary
                raise UserError(
                    "unreadable-file",
                    f"cannot read the checkpoint {path}: {first_line(error)}; make it readable and try again",
                ) from error
            if problem is None:
                for bad, what in damaged:
                    logger.warning("the checkpoint %s is damaged: %s", bad, what)
                    _set_aside(bad)
                if damaged:
                    logger.warning("resuming from the previous checkpoint, %s", path)
                return checkpoint
            damaged.append((path, problem))
        if damaged:
            path, what = damaged[0]
            raise UserError(
                "damaged-checkpoint",
                f"every checkpoint in {self.folder} is damaged ({path.name}: {what}); "
                "restore one from a backup, or start over in another --output_dir",
            )
        return None

    def save(self, engine: deepspeed.DeepSpeedEngine, progress: Progress) -> None:
        """Save parameters, optimiser, schedule, loss scale and progress; called by every rank.

        Raises:
            UserError: the checkpoint cannot be written; earlier checkpoints are unchanged.
        """
        path = self.folder / _name(progress.step)
        beside = path.with_name(path.name + UNFINISHED)
        is_first = torch.distributed.get_rank() == 0
        with _errors_of_writing(beside):
            if is_first:
                self._remove_unfinished()
            engine.save_checkpoint(
                str(self.folder), tag=beside.name, save_latest=False
            )  # synchronises the ranks before and after
            if not is_first:
                return
            parts = len(list(beside.glob("*_optim_states.pt")))
            if engine.zero_optimization() and parts != torch.distributed.get_world_size():
                raise UserError(
                    "unshared-output",
                    f"{beside} has the optimiser states of {parts} of {torch.distributed.get_world_size()} ranks; "
                    "choose an --output_dir that all hosts share, and disable node-local or decoupled checkpoints",
                )
            for script in self.folder.glob("*.py"):
                script.chmod(0o644)  # DeepSpeed adds an executable conversion script
            sync_tree(beside)
            files = tuple(FileRecord.of(beside, file) for file in files_below(beside))
            checkpoint = Checkpoint(path, progress, torch.distributed.get_world_size(), files)
            write_text(beside / MANIFEST, checkpoint.to_json())
            beside.rename(path)
            write_text(self.folder / "latest", path.name)  # also syncs the folder
            for old in self._complete()[: -self.keep_last]:
                if not self.keep_every or _step(old) % self.keep_every:
                    shutil.rmtree(old.rename(old.with_name(old.name + UNFINISHED)))

    def load(self, engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> Progress:
        """Load a checkpoint into an engine that was made with ``config_to_load``; called by every rank.

        The engine keeps the settings of its own config for optimiser, schedule and clipping.

        Raises:
            UserError: DeepSpeed cannot load the checkpoint.
        """
        path = _universal(checkpoint) if engine.load_universal_checkpoint() else checkpoint.path
        try:
            # DeepSpeed's bf16 optimiser prints its progress.
            with (
                memory_errors_named(),
                _own_settings(engine, checkpoint.progress.step),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name)
        except UserError:
            raise
        except Exception as error:  # DeepSpeed does not convert the errors of what it calls
            raise UserError(
                "damaged-checkpoint",
                f"DeepSpeed cannot load the checkpoint {path}: {first_line(error)}; "
                "restore it from a backup, or start over in another --output_dir",
            ) from error
        if loaded is None:
            raise UserError(
                "damaged-checkpoint",
                f"DeepSpeed finds no checkpoint in {path}; "
                "restore it from a backup, or start over in another --output_dir",
            )
        if path != checkpoint.path:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                self._remove_unfinished()
        return checkpoint.progress

    def config_to_load(self, checkpoint: Checkpoint, config: ResolvedConfig) -> ResolvedConfig:
        """Return the DeepSpeed config of an engine that will load ``checkpoint``; called by every rank.

        ZeRO shards the optimiser states over the ranks. If the world size has changed since they were saved, this
        creates a universal checkpoint. ``load`` deletes it after loading.

        Raises:
            UserError: the universal checkpoint cannot be written.
        """
        if config.zero_stage == 0 or checkpoint.world_size == torch.distributed.get_world_size():
            return config
        if torch.distributed.get_rank() == 0:
            logger.info(
                "converting %s from %d ranks to %d",
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
        """Return the step of the newest checkpoint, damaged or not; 0 if there is none."""
        return max(map(_step, self._complete()), default=0)

    def _complete(self) -> list[Path]:
        """Return the folders of completed checkpoints, oldest first."""
        return sorted(self.folder.glob(_name(0).replace("0", "[0-9]")))

    def _remove_unfinished(self) -> None:
        """Remove leftovers of a process that was killed while it wrote or removed a checkpoint."""
        for path in self.folder.glob(f"*{UNFINISHED}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()  # the temporary file of write_text


@contextmanager
def _own_settings(engine: deepspeed.DeepSpeedEngine, steps: int) -> Iterator[None]:
    """Restore the engine's own settings after a checkpoint was loaded, which overwrites them.

    The schedule restarts and advances by ``steps``, so that it reaches the same learning rate, bit for bit.
    """
    of_states = ("params", "step")  # apex and DeepSpeed store the step count in the group
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
            # torch warns that the schedule advances before the optimiser.
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
    # DeepSpeed's command, called in this process. With one worker it starts no other process.
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
            f"DeepSpeed can convert only Adam's states to another number of ranks, and {checkpoint.path} has no "
            f"{error}; resume it on {checkpoint.world_size} ranks",
        ) from error
    (checkpoint.path.parent / "latest_universal").unlink()


@contextmanager
def _errors_of_writing(path: Path) -> Iterator[None]:
    """Convert errors of writing below ``path`` to UserError, and remove what was written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # When torch.save cannot write, it raises a RuntimeError that names this file of PyTorch.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            "unwritable-output",
            f"cannot write {path}: {first_line(error)}; free space there and continue with --resume",
        ) from error
