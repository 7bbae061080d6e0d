"""`--split-sentences`: NLTK's punkt, as Megatron's tool uses it, without a download."""

from dataclasses import dataclass
from typing import Any

from megatron_smlp.errors import DataError

# Megatron cuts a text before punkt sees it, which affects the sentences at the cuts.
PIECE_CHARACTERS = 1_000_000
DOWNLOAD = "python -c \"import nltk; nltk.download('punkt_tab')\""


@dataclass(frozen=True)
class SentenceSettings:
    """Megatron's `--lang` and `--keep-newlines`."""

    language: str = "english"
    keep_newlines: bool = False


class Splitter:
    """Splits texts of one language into sentences.

    Raises:
        DataError: punkt's data is missing; the message says how to get it.
    """

    def __init__(self, settings: SentenceSettings) -> None:
        from nltk.tokenize.punkt import PunktTokenizer

        try:
            self.punkt: Any = PunktTokenizer(settings.language)
        except (LookupError, OSError):
            raise DataError(
                f"--split-sentences --lang {settings.language}: NLTK has no punkt_tab data for it; "
                f"download it with: {DOWNLOAD}, or set NLTK_DATA to a folder that has "
                f"tokenizers/punkt_tab/{settings.language}"
            ) from None
        if settings.keep_newlines:
            self.punkt = _keep_newlines(self.punkt)

    def split(self, text: str) -> list[str]:
        pieces = (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in self.punkt.tokenize(piece)]


def _keep_newlines(punkt: Any) -> Any:
    """Return a splitter with the same parameters that keeps the white space after a sentence.

    Punkt looks for the next token after white space; here the match of the sentence's end includes
    the white space instead, so that newlines are not lost.
    """
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer

    class NewlineKeepingVars(PunktLanguageVars):
        _period_context_fmt = (
            r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"
        )

    return PunktSentenceTokenizer(train_text=punkt._params, lang_vars=NewlineKeepingVars())
