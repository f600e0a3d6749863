"""``--push_to_hub``: upload the finished student to a repository on the Hugging Face hub (or ``HF_ENDPOINT``)."""

import logging
import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from distilspeed.trainer.errors import UserError, first_line

logger = logging.getLogger(__name__)


def check_can_push(repo_id: str) -> None:
    """Raise a UserError if an upload is certain to fail; checked before training, without contacting the hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            "bad-argument", f"--push_to_hub {repo_id}: {first_line(error)}; give NAME or OWNER/NAME"
        ) from error
    if is_offline_mode():
        raise UserError(
            "unusable-hub",
            "--push_to_hub needs the hub, but HF_HUB_OFFLINE is set; unset it, or omit the flag",
        )
    if get_token() is None:
        raise UserError(
            "unusable-hub",
            "--push_to_hub needs a hub token; set HF_TOKEN, or log in with `hf auth login`",
        )


def push_student(folder: Path, repo_id: str) -> None:
    """Upload a student's folder; create the repository if it does not exist.

    Raises:
        UserError: the upload failed; names the folder, which is kept, and the command that repeats the upload.
    """
    try:
        hub = HfApi()
        repository = hub.create_repo(repo_id, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Student trained with distilspeed"
        )
    except Exception as error:  # from the hub, its client, the network or the file system
        again = shlex.join(["hf", "upload", repo_id, str(folder)])
        raise UserError(
            "unusable-hub",
            f"the student in {folder} was not uploaded: {first_line(error)}; repeat it with `{again}`",
        ) from error
    logger.info("student uploaded to %s", repository)
