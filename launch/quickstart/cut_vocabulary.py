"""Cut a BERT's vocabulary to the pieces that a text uses most. The quickstart's teacher was made with it.

    python launch/quickstart/cut_vocabulary.py --model DIR --text books.txt --vocab_size 8192 --output_dir DIR

The text's single characters all stay, so a word that loses its piece is spelt in smaller ones.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made
from distilspeed.trainer.job.arguments import Settings, setting
from distilspeed.trainer.job.command import quiet_libraries, run_command

if TYPE_CHECKING:
    from transformers import BertTokenizer


# Weights with a row per piece of the vocabulary.
OF_PIECES = {
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "cls.predictions.decoder.weight",
}
OF_TOKENIZER = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "model_max_length")


@dataclass(frozen=True, kw_only=True)
class CutVocabularyArguments(Settings):
    """The command line of ``launch/quickstart/cut_vocabulary.py``."""

    model: Path = setting(metavar="DIR", help="folder of a BertForMaskedLM and its tokenizer")
    text: Path = setting(metavar="FILE", help="plain text")
    vocab_size: int = setting(at_least=1, help="pieces to keep")
    output_dir: Path = setting(metavar="DIR", help="a new folder for the smaller model and its tokenizer")


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(
        CutVocabularyArguments, prog="launch/quickstart/cut_vocabulary.py", description=__doc__
    ).parse()
    output_dir: Path = arguments.output_dir
    check_unoccupied(output_dir)
    quiet_libraries()
    with parents_made(output_dir), folder_written_whole(output_dir) as folder:
        cut_vocabulary(arguments, folder)


def cut_vocabulary(arguments: CutVocabularyArguments, folder: Path) -> None:
    """Write the smaller model and its tokenizer to a folder."""
    # After the parsing, because these take seconds.
    from transformers import BertForMaskedLM, BertTokenizer

    from distilspeed.trainer.models.loading import load_language_model

    model = load_language_model("model", str(arguments.model))
    if not isinstance(model, BertForMaskedLM):
        raise UserError(
            "unusable-model", f"{arguments.model} is not a BERT; give one with its WordPiece tokenizer"
        )
    tokenizer = BertTokenizer.from_pretrained(arguments.model)
    try:
        with arguments.text.open(encoding="utf-8") as lines:
            pieces = kept_pieces(tokenizer, lines, arguments.vocab_size)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "unreadable-file", f"cannot read {arguments.text}: {first_line(error)}; give plain text"
        ) from error
    rows = tokenizer.convert_tokens_to_ids(pieces)
    weights = {
        name: weight[rows] if name in OF_PIECES else weight for name, weight in model.state_dict().items()
    }
    model.config.vocab_size = len(pieces)
    model.config.pad_token_id = pieces.index(tokenizer.pad_token)
    smaller = BertForMaskedLM(model.config)
    smaller.load_state_dict(weights)
    smaller.save_pretrained(folder)
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name in OF_TOKENIZER}
    BertTokenizer(vocab=vocabulary, **settings).save_pretrained(folder)


def kept_pieces(tokenizer: "BertTokenizer", lines: Iterable[str], size: int) -> list[str]:
    """Return the pieces to keep in the order of their ids: special tokens, characters, then the most frequent."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(tokenizer.tokenize(line))
    ids = tokenizer.get_vocab()
    characters = sorted(set("".join(counts)))
    spellings = [prefix + character for character in characters for prefix in ("", "##")]
    needed = {piece for piece in (*tokenizer.all_special_tokens, *spellings) if piece in ids}
    if len(needed) > size:
        raise UserError(
            "bad-argument", f"--vocab_size must be at least {len(needed)}, to spell every word of the text"
        )
    frequent = (piece for piece, _ in counts.most_common())
    kept = list(dict.fromkeys([*needed, *frequent]))[:size]
    return sorted(kept, key=ids.__getitem__)


if __name__ == "__main__":
    run_command(main)
