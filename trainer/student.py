"""Teacher and student models: loading the one, making the other."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    PreTrainedModel,
)

from distilspeed.trainer.corpus import Corpus, tokenizer_hash
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families import check_teacher_config, student_config, student_state_dict

# DistilBERT-base takes these of BERT-base's 12 layers (Sanh et al. 2019, original code).
DISTILBERT_LAYERS_OF_12 = (0, 2, 4, 7, 9, 11)


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
            f"--student_layers {_listed(chosen)} does not fit a teacher of {num_layers} layers; "
            f"choose from 0 to {num_layers - 1}"
        )
    if any(first >= second for first, second in itertools.pairwise(chosen)):
        raise UserError(f"--student_layers {_listed(chosen)} must rise from each to the next")
    return tuple(chosen)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "(none)"


def load_teacher(name: str) -> BertForMaskedLM:
    """Load a frozen teacher: float32, in evaluation mode, no parameter requires a gradient.

    Args:
        name: a hub id or a local folder in Hugging Face's format, with safetensors weights.

    Raises:
        UserError: it cannot be loaded, lacks an MLM head or is of an architecture that is not distilled.
    """
    check_teacher_config(_load(AutoConfig, name))
    teacher, report = _load(
        AutoModelForMaskedLM,
        name,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise UserError(
            f"the teacher {name} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, …); "
            "it must be a masked language model with its head"
        )
    return teacher.eval().requires_grad_(False)


def make_student(teacher: BertForMaskedLM, layers: Sequence[int]) -> DistilBertForMaskedLM:
    """The student at its start: float32, initialised from the teacher's ``layers``; tied where the teacher is."""
    config = student_config(teacher.config, len(layers))
    student = DistilBertForMaskedLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    student.load_state_dict(student_state_dict(teacher, layers))
    return student


def model_from_config(name: str, vocab_size: int, seed: int) -> PreTrainedModel:
    """A masked language model with random weights, float32, from a config file, folder or hub id."""
    config = _load(AutoConfig, name)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"--student_config {name} has a vocabulary of {config.vocab_size}, "
            f"the corpus's tokenizer one of {vocab_size}; set its vocab_size"
        )
    torch.manual_seed(seed)
    try:
        return AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"--student_config {name} is no masked language model: {error}") from error


def check_teacher_fits_corpus(name: str, teacher: BertForMaskedLM, corpus: Corpus) -> None:
    """Raise a UserError unless the teacher was trained with the tokenizer that made the corpus.

    A local teacher folder without a tokenizer is judged by the size of its vocabulary alone.
    """
    manifest = corpus.manifest
    if not Path(name).is_dir() or (Path(name) / "tokenizer.json").exists():
        found = tokenizer_hash(_load(AutoTokenizer, name))
        if found != manifest.tokenizer_hash:
            raise UserError(
                f"the corpus was made with another tokenizer than the teacher's; "
                f"run launch/prepare_data.py with --tokenizer {name}"
            )
    if teacher.config.vocab_size < manifest.vocab_size:
        raise UserError(
            f"the corpus's tokenizer has {manifest.vocab_size} tokens, the teacher's embeddings "
            f"{teacher.config.vocab_size}; choose the teacher that goes with the tokenizer"
        )
    check_positions(teacher, corpus, name)


def check_positions(model: PreTrainedModel, corpus: Corpus, name: str) -> None:
    """Raise a UserError if the corpus's rows are longer than the model has positions."""
    positions = model.config.max_position_embeddings
    if corpus.manifest.seq_length > positions:
        raise UserError(
            f"the corpus has rows of {corpus.manifest.seq_length} tokens, {name} only {positions} positions; "
            f"prepare it with --seq_length {positions} or less"
        )


def _load(auto_class, name: str, **options):  # type: ignore[no-untyped-def]
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load {name}: {first_line}") from error
