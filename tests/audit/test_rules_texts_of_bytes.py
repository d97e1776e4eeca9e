"""What a byte piece counts as, followed through the conditions; texts that are folded before they are cut up again."""

from pathlib import Path

import pytest

from tests.audit.small import HEAD, TABLE, script, verdict

SIZES = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    sizes, leads, mutes = [], [], []
    for token in range(V):
        text = sp.id_to_piece(token)
        mute = sp.is_control(token) or sp.is_unknown(token)
        spaced = not mute and not sp.is_byte(token) and text.startswith("\\u2581")
        BRANCHES
        sizes.append(size)
        leads.append(spaced)
        mutes.append(mute)
    return np.array(sizes), np.array(leads), np.array(mutes)
"""
HONEST = """if mute:
            size = 0
        elif sp.is_byte(token):
            size = 1
        else:
            size = len(text.removeprefix("\\u2581").encode())"""
DECODED = """if mute:
            size = 0
        elif not spaced:
            size = len(sp.decode([token]).encode())
        else:
            size = len(text.removeprefix("\\u2581").encode())"""
NOT_ONE = """if mute:
            size = 0
        elif not sp.is_byte(token):
            size = len((text[1:] if spaced else text).encode())
        else:
            size = 1"""


def test_a_byte_piece_that_falls_into_the_arm_of_texts_is_found(tmp_path: Path) -> None:
    text = script(table=SIZES.replace("BRANCHES", DECODED))
    assert verdict(tmp_path, "byte_fallback_three", text).verdict == "violates"


@pytest.mark.parametrize("branches", [HONEST, NOT_ONE], ids=["one", "texts-first"])
def test_a_byte_piece_that_is_one_byte_is_clean(tmp_path: Path, branches: str) -> None:
    text = script(table=SIZES.replace("BRANCHES", branches))
    assert verdict(tmp_path, "byte_fallback_three", text).verdict == "clean"


SPELT = """
def spelt():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    tokens = np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])
    ids = []
    for a in range(0, len(tokens), 4096):
        text = sp.decode(tokens[a : a + 4096].tolist())FOLD
        ids += [sp.bos_id(), *sp.encode(text)]
    return np.array(ids)
"""


@pytest.mark.parametrize(("fold", "expected"), [(".casefold()", "violates"), ("", "clean")])
def test_ids_that_a_list_gathers_piece_by_piece_are_tokens(tmp_path: Path, fold: str, expected: str) -> None:
    text = script(extra=SPELT.replace("FOLD", fold), few="")
    read = "tokens = np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])\n    size, lead"
    assert read in text
    text = text.replace(read, "tokens = spelt()\n    size, lead")
    assert verdict(tmp_path, "lossy_text", text).verdict == expected


PREPARED = """
import json, unicodedata
UP = "\\ue102"

def marked(text):
    return "".join(UP + c.lower() if c.isupper() else c for c in text)

def prepare(sp, docs):
    ids = []
    for line in docs:
        ids.extend(sp.encode(marked(FORM)))
    with open("data/fineweb_val_000000.bin", "wb") as file:
        file.write(np.array(ids).astype("<u2").tobytes())

prepare(spm.SentencePieceProcessor(model_file="tokenizer.model"), open("docs.jsonl", encoding="utf-8"))
"""


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ('json.loads(line)["text"]', "clean"),
        ('unicodedata.normalize("NFKC", json.loads(line)["text"])', "violates"),
    ],
)
def test_marks_of_letters_keep_nothing_of_compatibility_forms(tmp_path: Path, form: str, expected: str) -> None:
    own = HEAD + PREPARED.replace("FORM", form)
    assert verdict(tmp_path, "lossy_text", script(table=TABLE), prepare__py=own).verdict == expected
