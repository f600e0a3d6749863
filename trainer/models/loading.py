"""Teacher and student models: loading the one, making the other."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)

from distilspeed.trainer.corpus.format import Corpus, load_tokenizer, tokenizer_hash
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.families.registry import checked_family, checked_teacher_family, family_of
from distilspeed.trainer.families.vocabulary import is_tied
from distilspeed.trainer.models.flops import model_shape

logger = logging.getLogger(__name__)

# DistilBERT-base takes these of BERT-base's 12 layers (Sanh et al. 2019, original code).
DISTILBERT_LAYERS_OF_12 = (0, 2, 4, 7, 9, 11)

# How a model is called here, whatever its config has left over from another use.
CALLED_WITH = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,
}

# Files of a tokenizer, by the names that transformers' tokenizers give them.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
)


def select_teacher_layers(num_layers: int, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """The teacher layers a student starts from: ``chosen``, or half of them, evenly spread with both ends.

    Raises:
        UserError: a layer is out of range, repeated or out of order, or none is chosen.
    """
    if chosen is None:
        if num_layers == 12:
            return DISTILBERT_LAYERS_OF_12
        kept = max(1, num_layers // 2)
        return tuple(int(i * (num_layers - 1) / max(1, kept - 1) + 0.5) for i in range(kept))
    if not chosen or any(not 0 <= layer < num_layers for layer in chosen):
        raise UserError(
            "bad-argument",
            f"--student_layers {_listed(chosen)} does not fit a teacher of {num_layers} layers; "
            f"choose from 0 to {num_layers - 1}",
        )
    if any(first >= second for first, second in itertools.pairwise(chosen)):
        raise UserError("bad-argument", f"--student_layers {_listed(chosen)} must rise from each to the next")
    return tuple(chosen)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "(none)"


def load_masked_language_model(role: str, name: str) -> PreTrainedModel:
    """Load a model of any family with its MLM head: float32, evaluation mode, on the CPU.

    Args:
        role: what the error calls it, for example "teacher".
        name: a hub id or a local folder in Hugging Face's format, with safetensors weights.

    Raises:
        UserError: it cannot be loaded, lacks weights or has such as are not finite, or is of another architecture.
    """
    _refuse_pickles(role, Path(name))
    family = checked_family(_load(AutoConfig, role, name), f"the {role} {name}")
    model, loading = _load(
        family.model_class,
        role,
        name,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # which are told below, not in a report of many lines
        output_loading_info=True,
    )
    for weight, found, expected in sorted(loading["mismatched_keys"])[:1]:
        raise UserError(
            "damaged-model",
            f"the {role} {name} has {weight} of shape {list(found)}, and its config.json says {list(expected)}; "
            "give the config that goes with the weights",
        )
    if loading["missing_keys"]:
        raise UserError(
            "damaged-model", _missing_weights(f"the {role} {name}", model, sorted(loading["missing_keys"]))
        )
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            raise UserError(
                "damaged-model",
                f"the {role} {name} has NaN or infinite weights ({weight}); save it again or choose another",
            )
    return model.eval()


def _missing_weights(model_name: str, model: PreTrainedModel, missing: Sequence[str]) -> str:
    tied = model._tied_weights_keys or {}
    twins = tied | {second: first for first, second in tied.items()}
    twins_are_there = all(twins.get(weight, weight) not in missing for weight in missing)
    if not model.config.tie_word_embeddings and twins_are_there:
        return (
            f'{model_name} lacks {", ".join(missing)}, and its config.json has "tie_word_embeddings": false; '
            "set it to true: transformers then ties what is missing and nothing else"
        )
    return f"{model_name} lacks weights ({', '.join(missing[:3])}, …); give a masked language model with its head"


def _refuse_pickles(role: str, folder: Path) -> None:
    pickles, whole = sorted(folder.glob("pytorch_model*.bin")), sorted(folder.glob("*.safetensors"))
    if pickles and not whole:
        raise UserError(
            "pickled-weights",
            f"the {role} {folder} has pickled weights alone ({pickles[0].name}), and pickles can run code; "
            "if you trust them, convert them: AutoModelForMaskedLM.from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(FOLDER)",
        )


def load_teacher(name: str) -> PreTrainedModel:
    """Load a frozen teacher: as :func:`load_masked_language_model`, and no parameter requires a gradient.

    Raises:
        UserError: also for an architecture or a setting that cannot be distilled.
    """
    checked_teacher_family(_load(AutoConfig, "teacher", name), f"the teacher {name}")
    return load_masked_language_model("teacher", name).requires_grad_(False)


def make_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """The student at its start: float32, initialised from the teacher's ``layers``; tied where the teacher is.

    What the teacher's config says of tying does not count: transformers keeps a decoder that was saved beside
    other embeddings.
    """
    family = family_of(teacher.config)
    config = family.student_config(teacher.config, layers)
    config.tie_word_embeddings = is_tied(teacher)
    student = family.model_class.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    student.load_state_dict(family.student_weights(teacher, layers))
    return student


def model_from_config(name: str, seed: int) -> PreTrainedModel:
    """A masked language model with random weights, float32, from a config file, folder or hub id.

    Raises:
        UserError: there is no such config, or its model cannot be run on packed rows.
    """
    config = _load(AutoConfig, "student's config", name)
    family = checked_family(config, f"--student_config {name}")
    torch.manual_seed(seed)
    try:
        return family.model_class.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # a config is checked by what its values lead to
        raise UserError(
            "unusable-model",
            f"--student_config {name} makes no masked language model: {first_line(error)}; correct the config",
        ) from error


@dataclass(frozen=True)
class Head:
    """What a task puts on a pre-trained encoder.

    Attributes:
        model_class: transformers' Auto class of encoder and head, for example AutoModelForSequenceClassification.
        num_labels: the head's outputs: one a class, 1 for a number, 2 for the start and end of a span.
        problem_type: transformers' name of the loss, for a class that has several ("regression").
    """

    model_class: Any
    num_labels: int
    problem_type: str | None = None


def make_with_head(role: str, name: str, head: Head) -> PreTrainedModel:
    """A model with a task's head, from a model's config and with random weights; float32.

    What the config says of another task (kind of problem, number and names of labels) does not count.

    Raises:
        UserError: the config makes no such model.
    """
    config = _load(AutoConfig, role, name)
    config.problem_type, config.num_labels = head.problem_type, head.num_labels
    try:
        return head.model_class.from_config(config, dtype=torch.float32)
    except Exception as error:  # a config is checked by what its values lead to
        raise UserError(
            "unusable-model",
            f"the {role} {name} makes no {head.model_class.__name__}: {first_line(error)}; correct its config.json",
        ) from error


def load_with_head(name: str, head: Head) -> PreTrainedModel:
    """A model's pre-trained encoder with a new head, whether or not the model comes with one."""
    model = make_with_head("model", name, head)
    encoder = _load(AutoModel, "model", name, dtype=torch.float32, use_safetensors=True).state_dict()
    # AutoModel gives BERT a pooler, which heads on tokens have no use for.
    model.base_model.load_state_dict({weight: encoder[weight] for weight in model.base_model.state_dict()})
    return model


def check_fits_corpus(role: str, name: str, model: PreTrainedModel, corpus: Corpus) -> None:
    """Raise a UserError unless the model has the corpus's tokenizer, its vocabulary and positions for its rows.

    A model without a tokenizer is judged by the size of its vocabulary alone; see :func:`warn_without_tokenizer`.
    """
    manifest, shape = corpus.manifest, model_shape(model.config)
    if _has_tokenizer(name):
        _check_same_tokenizer(role, name, corpus)
    if shape.vocab_size < manifest.vocab_size:
        raise UserError(
            "tokenizer-mismatch",
            f"the {role} {name} has a vocabulary of {shape.vocab_size} tokens, the corpus's tokenizer one of "
            f"{manifest.vocab_size}; choose the model that goes with the tokenizer",
        )
    if shape.positions < manifest.seq_length:
        raise UserError(
            "rows-too-long",
            f"the corpus has rows of {manifest.seq_length} tokens, the {role} {name} only "
            f"{shape.positions} positions; prepare it with --seq_length {shape.positions} or less",
        )


def warn_without_tokenizer(role: str, name: str) -> None:
    """Log a warning where :func:`check_fits_corpus` had no tokenizer to compare."""
    if not _has_tokenizer(name):
        logger.warning(
            "the %s %s has no tokenizer files; only the size of its vocabulary was compared "
            "with the corpus's tokenizer",
            role,
            name,
        )


def _has_tokenizer(name: str) -> bool:
    """Whether a model comes with any file of a tokenizer; a hub id always counts as one that does."""
    folder = Path(name)
    return not folder.exists() or any(
        file.is_file() for pattern in TOKENIZER_FILES for file in folder.glob(pattern)
    )


def _check_same_tokenizer(role: str, name: str, corpus: Corpus) -> None:
    tokenizer = load_tokenizer(name)
    if tokenizer_hash(tokenizer) != corpus.manifest.tokenizer_hash:
        raise UserError(
            "tokenizer-mismatch",
            f"the corpus was made with another tokenizer than that of the {role} {name}; "
            f"prepare it with --tokenizer {name}",
        )


def _load(auto_class: Any, role: str, name: str, **options: Any) -> Any:
    try:
        # False, because unless told transformers asks at the terminal whether to run a repository's code.
        return auto_class.from_pretrained(name, trust_remote_code=False, **CALLED_WITH, **options)
    except Exception as error:  # the hub's, the file system's, safetensors' and transformers' own
        raise UserError(
            "unusable-model",
            f"cannot load the {role} {name}: {first_line(error)}; give a folder or hub id with safetensors weights",
        ) from error
