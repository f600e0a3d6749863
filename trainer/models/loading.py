"""Load teachers, make students, and check that models fit the corpus."""

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
    PreTrainedConfig,
    PreTrainedModel,
)

from distilspeed.trainer.corpus.format import Corpus, load_tokenizer, tokenizer_hash
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.families.registry import checked_family, checked_teacher_family, family_of
from distilspeed.trainer.families.vocabulary import is_tied
from distilspeed.trainer.models.flops import model_shape

logger = logging.getLogger(__name__)

# Options of every model call here; they override values that a config has from another use.
CALLED_WITH = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,
}

# In the names of a pooler's weights, in all families that have one.
POOLER = "pooler."

# File names that transformers' tokenizers save.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
)


def select_teacher_layers(teacher: PreTrainedConfig, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """Return the teacher layers that a student starts from: ``chosen`` if given, else its family's default.

    Raises:
        UserError: ``chosen`` is empty, or a layer is out of range, repeated or out of order.
    """
    if chosen is None:
        return family_of(teacher).default_layers(teacher)
    num_layers = teacher.num_hidden_layers
    if not chosen or any(not 0 <= layer < num_layers for layer in chosen):
        raise UserError(
            "bad-argument",
            f"--student_layers {_listed(chosen)} does not fit a teacher of {num_layers} layers; "
            f"choose from 0 to {num_layers - 1}",
        )
    if any(first >= second for first, second in itertools.pairwise(chosen)):
        raise UserError(
            "bad-argument",
            f"--student_layers {_listed(chosen)} is not in increasing order; sort the layers and name each once",
        )
    return tuple(chosen)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "(none)"


def load_language_model(role: str, name: str) -> PreTrainedModel:
    """Load a model of any family with its head: float32, evaluation mode, on the CPU.

    Args:
        role: name of the model in error messages, for example "teacher".
        name: a hub id or a local folder in Hugging Face's format, with safetensors weights.

    Raises:
        UserError: the model cannot be loaded, has missing or non-finite weights, or has an unsupported architecture.
    """
    family = checked_family(_load(AutoConfig, role, name), f"the {role} {name}")
    _refuse_pickles(role, Path(name), family.model_class.__name__)
    model, loading = _load(
        family.model_class,
        role,
        name,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # reported below in one line; transformers would print many
        output_loading_info=True,
    )
    _check_shapes(f"the {role} {name}", loading)
    if loading["missing_keys"]:
        raise UserError(
            "damaged-model", _missing_weights(f"the {role} {name}", model, sorted(loading["missing_keys"]))
        )
    _check_finite(f"the {role} {name}", model)
    # transformers leaves a decoder untied that was saved with other values than the embeddings.
    model.config.tie_word_embeddings = is_tied(model)
    return model.eval()


def _check_shapes(model_name: str, loading: dict[str, Any]) -> None:
    for weight, found, expected in sorted(loading["mismatched_keys"])[:1]:
        raise UserError(
            "damaged-model",
            f"{model_name} has {weight} of shape {list(found)}, but its config.json needs {list(expected)}; "
            "use the config of these weights",
        )


def _check_finite(model_name: str, model: PreTrainedModel) -> None:
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            raise UserError(
                "damaged-model",
                f"{model_name} has NaN or infinite weights ({weight}); save it again or choose another model",
            )


def _missing_weights(model_name: str, model: PreTrainedModel, missing: Sequence[str]) -> str:
    tied = model._tied_weights_keys or {}
    twins = tied | {second: first for first, second in tied.items()}
    twins_are_there = all(twins.get(weight, weight) not in missing for weight in missing)
    if not model.config.tie_word_embeddings and twins_are_there:
        return (
            f'{model_name} has no {", ".join(missing)}, and its config.json has "tie_word_embeddings": false; '
            "set it to true, and transformers ties exactly the missing weights"
        )
    return (
        f"{model_name} has missing weights ({', '.join(missing[:3])}, …); give a language model with its head"
    )


def _refuse_pickles(role: str, folder: Path, model_class: str) -> None:
    pickles, whole = sorted(folder.glob("pytorch_model*.bin")), sorted(folder.glob("*.safetensors"))
    if pickles and not whole:
        raise UserError(
            "pickled-weights",
            f"the {role} {folder} has only pickled weights ({pickles[0].name}), and pickles can run code; "
            f"if you trust them, convert them: {model_class}.from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(FOLDER)",
        )


def load_teacher(name: str) -> PreTrainedModel:
    """Load a frozen teacher with :func:`load_language_model`; no parameter requires a gradient.

    Raises:
        UserError: as there, and if the architecture or a setting cannot be distilled.
    """
    checked_teacher_family(_load(AutoConfig, "teacher", name), f"the teacher {name}")
    return load_language_model("teacher", name).requires_grad_(False)


def make_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Make a student, float32, initialised from the teacher's ``layers``; it is tied if the teacher's weights are."""
    family = family_of(teacher.config)
    config = family.student_config(teacher.config, layers)
    config.tie_word_embeddings = is_tied(teacher)
    student = family.model_class.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    student.load_state_dict(family.student_weights(teacher, layers))
    return student


def model_from_config(name: str, seed: int) -> PreTrainedModel:
    """Make a language model with random weights, float32, from a config file, folder or hub id.

    Raises:
        UserError: the config cannot be loaded, or its model cannot be built or run on packed rows.
    """
    config = _load(AutoConfig, "student's config", name)
    family = checked_family(config, f"--student_config {name}")
    torch.manual_seed(seed)
    try:
        return family.model_class.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # a bad config value can raise any type
        raise UserError(
            "unusable-model",
            f"cannot build a model from --student_config {name}: {first_line(error)}; correct the config",
        ) from error


@dataclass(frozen=True)
class Head:
    """The head that a task puts on a pre-trained encoder.

    Attributes:
        model_class: transformers Auto class of encoder and head, for example AutoModelForSequenceClassification.
        num_labels: number of outputs: one per class, 1 for regression, 2 for the start and end of a span.
        problem_type: transformers' name of the loss, for model classes with several losses ("regression").
        labels: names of the classes, one per output; () if they have none.
    """

    model_class: Any
    num_labels: int
    problem_type: str | None = None
    labels: tuple[str, ...] = ()


def make_with_head(role: str, name: str, head: Head) -> PreTrainedModel:
    """Make a model with a task's head and random weights, float32, from a model's config.

    The head overrides the config's values for another task (problem type, number and names of labels).

    Raises:
        UserError: the config cannot be loaded, is not an encoder's, or no such model can be built from it.
    """
    config = _load(AutoConfig, role, name)
    if checked_family(config, f"the {role} {name}").objective == "causal":
        raise UserError(
            "unsupported-model",
            f"the {role} {name} is a causal language model, and tasks fine-tune encoders; choose an encoder",
        )
    config.problem_type, config.num_labels = head.problem_type, head.num_labels
    if head.labels:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {label: number for number, label in enumerate(head.labels)}
    try:
        return head.model_class.from_config(config, dtype=torch.float32)
    except Exception as error:  # a bad config value can raise any type
        raise UserError(
            "unusable-model",
            f"cannot build a {head.model_class.__name__} from the config of the {role} {name}: {first_line(error)}; "
            "correct its config.json",
        ) from error


def load_with_head(name: str, head: Head) -> PreTrainedModel:
    """Load a model's pre-trained encoder and put a new head on it, even if the model has a head.

    Raises:
        UserError: as :func:`make_with_head`, or weights cannot be loaded, are missing, of other shapes or not finite.
    """
    model = make_with_head("model", name, head)
    _refuse_pickles("model", Path(name), "AutoModel")
    encoder, loading = _load(
        AutoModel,
        "model",
        name,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # AutoModel gives BERT a pooler, which models with a head on tokens do not have.
    needed = model.base_model.state_dict().keys()
    _check_shapes(f"the model {name}", loading)
    # A pooler is part of the head: masked language models have none, and it starts from random weights.
    missing = sorted(
        weight for weight in loading["missing_keys"] if weight in needed and POOLER not in weight
    )
    if missing:
        raise UserError(
            "damaged-model",
            f"the model {name} has missing weights ({', '.join(missing[:3])}, …); use the config of these weights",
        )
    _check_finite(f"the model {name}", encoder)
    weights = encoder.state_dict()
    model.base_model.load_state_dict({weight: weights[weight] for weight in needed})
    return model


def load_fine_tuned(name: str, head: Head) -> PreTrainedModel:
    """Load a frozen model with its own head for a task: float32, evaluation mode, on the CPU.

    Raises:
        UserError: the model cannot be loaded, has no such head, or has other classes or another order of them.
    """
    checked_family(_load(AutoConfig, "teacher", name), f"the teacher {name}")
    _refuse_pickles("teacher", Path(name), head.model_class.__name__)
    model, loading = _load(
        head.model_class,
        "teacher",
        name,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            "damaged-model",
            f"the teacher {name} is not fine-tuned on the task: it has no {missing[0]}; fine-tune it first",
        )
    config = model.config
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    are_named = head.labels and labels != [f"LABEL_{number}" for number in range(config.num_labels)]
    are_others = [label.lower() for label in labels] != [label.lower() for label in head.labels]
    if config.num_labels != head.num_labels or (are_named and are_others):
        found = ", ".join(labels)
        wanted = ", ".join(head.labels) or f"{head.num_labels} outputs"
        raise UserError(
            "unsupported-model",
            f"the teacher {name} is fine-tuned on another task: its outputs are {found}, and the task's {wanted}; "
            "choose a teacher of this task",
        )
    return model.eval().requires_grad_(False)


def check_fits_corpus(role: str, name: str, model: PreTrainedModel, corpus: Corpus) -> None:
    """Raise a UserError unless the model fits the corpus: objective, tokenizer, size of vocabulary, enough positions.

    Without tokenizer files, only the vocabulary size is compared; see :func:`warn_without_tokenizer`.
    """
    manifest, shape = corpus.manifest, model_shape(model.config)
    objective = family_of(model.config).objective
    if objective != manifest.objective:
        raise UserError(
            "objective-mismatch",
            f"the {role} {name} is a {objective} language model, but the corpus {corpus.path} was prepared for "
            f"{manifest.objective} ones; prepare a corpus with this model's tokenizer",
        )
    if _has_tokenizer(name):
        _check_same_tokenizer(role, name, corpus)
    if shape.vocab_size < manifest.vocab_size:
        raise UserError(
            "tokenizer-mismatch",
            f"the {role} {name} has a vocabulary of {shape.vocab_size} tokens, but the corpus's tokenizer has "
            f"{manifest.vocab_size}; choose a model with this tokenizer",
        )
    if shape.positions < manifest.seq_length:
        raise UserError(
            "rows-too-long",
            f"the corpus has rows of {manifest.seq_length} tokens, but the {role} {name} has only "
            f"{shape.positions} positions; prepare the corpus with --seq_length {shape.positions} or less",
        )


def warn_without_tokenizer(role: str, name: str) -> None:
    """Log a warning if the model has no tokenizer that :func:`check_fits_corpus` could compare."""
    if not _has_tokenizer(name):
        logger.warning(
            "the %s %s has no tokenizer files; only its vocabulary size was compared "
            "with the corpus's tokenizer",
            role,
            name,
        )


def _has_tokenizer(name: str) -> bool:
    """Return whether a model's folder has any tokenizer file; True for every hub id."""
    folder = Path(name)
    return not folder.exists() or any(
        file.is_file() for pattern in TOKENIZER_FILES for file in folder.glob(pattern)
    )


def _check_same_tokenizer(role: str, name: str, corpus: Corpus) -> None:
    tokenizer = load_tokenizer(name)
    if tokenizer_hash(tokenizer) != corpus.manifest.tokenizer_hash:
        raise UserError(
            "tokenizer-mismatch",
            f"the corpus was prepared with another tokenizer than that of the {role} {name}; "
            f"prepare it with --tokenizer {name}",
        )


def _load(auto_class: Any, role: str, name: str, **options: Any) -> Any:
    try:
        # The default makes transformers ask at the terminal whether to run the repository's code.
        return auto_class.from_pretrained(name, trust_remote_code=False, **CALLED_WITH, **options)
    except Exception as error:  # the hub, the file system, safetensors and transformers raise many types
        raise UserError(
            "unusable-model",
            f"cannot load the {role} {name}: {first_line(error)}; give a folder or hub id with safetensors weights",
        ) from error
