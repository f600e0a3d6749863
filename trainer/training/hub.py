"""``--push_to_hub``: the finished student goes to a repository of the Hugging Face hub (or of ``HF_ENDPOINT``)."""

import logging
import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from distilspeed.trainer.errors import UserError, first_line

logger = logging.getLogger(__name__)


def check_can_push(repo_id: str) -> None:
    """Raise UserError where an upload is bound to fail: known before training, without asking the hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            "bad-argument", f"--push_to_hub {repo_id}: {first_line(error)}; give NAME or OWNER/NAME"
        ) from error
    if is_offline_mode():
        raise UserError(
            "unusable-hub",
            "--push_to_hub needs the hub and HF_HUB_OFFLINE is set; unset it or leave out the flag",
        )
    if get_token() is None:
        raise UserError(
            "unusable-hub",
            "--push_to_hub needs a token of the hub; set HF_TOKEN, or log in with `hf auth login`",
        )


def push_student(folder: Path, repo_id: str) -> None:
    """Upload a student's folder; the repository is made where there is none.

    Raises:
        UserError: it could not be uploaded; names the folder, which stays, and the command that repeats the upload.
    """
    try:
        hub = HfApi()
        repository = hub.create_repo(repo_id, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Student trained with distilspeed"
        )
    except Exception as error:  # of the hub, its client, the network, the file system
        again = shlex.join(["hf", "upload", repo_id, str(folder)])
        raise UserError(
            "unusable-hub",
            f"the student in {folder} was not uploaded: {first_line(error)}; repeat it with `{again}`",
        ) from error
    logger.info("student uploaded to %s", repository)
