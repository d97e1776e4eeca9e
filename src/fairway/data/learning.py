"""A tokenizer learned from training text, where the recipe gives none: SentencePiece BPE."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sentencepiece

from fairway.base.errors import DataError
from fairway.base.slots import module_of
from fairway.data.tokenizer import TokenizerSpec

_WITH_BYTES = 300  # pieces from which on 256 of them are bytes: fewer would leave no room for characters


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) learns its tokenizer."""
    return not recipe["data"]["tokenizer"]["model"]


def train(documents: Sequence[bytes], spec: TokenizerSpec) -> bytes:
    """A SentencePiece model (its serialised proto) from a sample of the documents; the same text, the same model."""
    transform = module_of(spec.transform)
    model, sample = io.BytesIO(), [transform.apply(text) for text in _sample(documents, spec.sample_bytes)]
    kept, operators = alphabet(sample, spec), transform.SYMBOLS
    own: dict[str, Any] = {"user_defined_symbols": list(operators)} if operators else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample, kept + "".join(operators)),
            model_writer=model,
            model_type="bpe",
            vocab_size=spec.vocab,
            character_coverage=1.0,  # the alphabet is chosen already
            split_by_whitespace=not spec.across_words,
            max_sentencepiece_length=spec.longest_piece,
            byte_fallback=spec.vocab >= _WITH_BYTES,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Runs of spaces as pieces: 4.9 % fewer tokens on the Python documentation. Pieces that mix letters
            # with signs and line ends: 1.0 % fewer again.
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            split_by_number=False,
            unk_id=0,
            bos_id=1,
            eos_id=-1,  # a document ends where the next one's BOS stands
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 30,
            minloglevel=2,
            **own,
        )
    except (RuntimeError, OSError) as error:
        why = str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(" .") or "too little text"
        raise DataError(
            f"tokenizer: no {spec.vocab} pieces could be learned from this text ({why}); "
            "set data.tokenizer.vocab lower, or give more text"
        ) from error
    return model.getvalue()


def alphabet(sample: Iterable[str], spec: TokenizerSpec) -> str:
    """The characters that may have pieces: the most frequent that cover the sample, half of the vocabulary at most.

    SentencePiece would refuse a text with more characters than pieces (Chinese at 1,024); here the rest are bytes.
    """
    counts: Counter[str] = Counter()
    for text in sample:
        counts.update(text)
    for refused in (*_REFUSED, *module_of(spec.transform).SYMBOLS):
        counts.pop(refused, None)
    needed, kept = spec.coverage * counts.total(), list[str]()
    most = (spec.vocab - (256 if spec.vocab >= _WITH_BYTES else 2)) // 2
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if needed <= 0 or len(kept) >= most:
            break
        kept.append(character)
        needed -= count
    return "".join(kept if " " in kept or " " not in counts else [*kept, " "])


_REFUSED = "\u2581\u2585\x00"  # ▁ and NUL never enter SentencePiece, and its trainer keeps ▅ for itself


def _sample(documents: Sequence[bytes], sample_bytes: int) -> Iterator[str]:
    """Valid text: blocks of 64 KB at most, spread evenly over the documents where these hold more than the sample."""
    total, block, passed, taken = sum(map(len, documents)), 1 << 16, 0, 0
    for document in documents:
        for first in range(0, len(document), block):
            part = document[first : first + block]
            if taken * total <= passed * sample_bytes:
                taken += len(part)
                yield part.decode("utf-8", "ignore")
            passed += len(part)


def _sentences(sample: Iterable[str], kept: str) -> Iterator[str]:
    """What the trainer reads: runs of the alphabet's characters."""
    runs = re.compile(f"[{re.escape(kept)}]+") if kept else re.compile("(?!)")
    for text in sample:
        yield from runs.findall(text)
