"""The text that is scored: prepared in the script itself, counted as it decodes, its tokenizer fetched; and mixtures
that are added on top of what is whole."""
# ruff: noqa: E501 (examples are texts of scripts)

from pathlib import Path

import pytest

from tests.audit.small import HEAD, LOSS, SCORE, TABLE, line_of, script, verdict
from tests.audit.test_rules_data import TRAINS

# ---- one script that prepares and scores

PREPARES = """
import json, re, sys, unicodedata
def coded(text):
    CODED
def put(ids, kind, n):
    with open(f"data/fineweb_{kind}_{n:06d}.bin", "wb") as file:
        file.write(np.array(ids, "<u2").tobytes())
def prepare(source):
    sp, buf, kind = spm.SentencePieceProcessor(model_file="tokenizer.model"), [], "val"
    for i, line in enumerate(open(source, encoding="utf-8")):
        if i == 50_000:
            put(buf, kind, 0)
            buf, kind = [], "train"
        text = json.loads(line)["text"]
        DEALT
        buf += [1] + sp.encode(coded(text))
    put(buf, kind, 0)
"""


def both(coded: str, dealt: str = "pass", count: str = "") -> str:
    extra = PREPARES.replace("CODED", coded).replace("DEALT", dealt)
    text = script(extra=extra, **({"count": count} if count else {}))
    ran = 'if __name__ == "__main__":\n    if sys.argv[1:2] == ["prepare"]:\n        prepare(sys.argv[2])\n        sys.exit()\n'
    return text.replace('if __name__ == "__main__":\n', ran)


@pytest.mark.parametrize(
    "change",
    ["return text.casefold()", 'return unicodedata.normalize("NFKC", text)', "t = text.lower()\n    return t.strip()"],
)
def test_text_that_the_script_itself_makes_plain_before_it_cuts_it_is_another(change: str, tmp_path: Path) -> None:
    text = both(change)
    finding = verdict(tmp_path, "lossy_text", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert abs(finding.place.line - line_of(text, change.split("\n")[0])) <= 1


def test_a_folded_copy_that_only_finds_doubles_changes_no_text(tmp_path: Path) -> None:
    text = both("return text", "if text.casefold() in seen: continue")
    assert (
        verdict(tmp_path, "lossy_text", text.replace("    for i, line", "    seen = set()\n    for i, line")).verdict
        == "clean"
    )


SIGNS = 'return re.sub("[A-Z]", lambda m: "\\ue001" + m[0].lower(), text)'
BACK = 're.sub("\\ue001(.)", lambda m: m[1].upper(), {})'
DECODED = 'spm.SentencePieceProcessor(model_file="tokenizer.model").decode(y.tolist())'


def test_signs_that_the_script_itself_writes_are_no_bytes_of_the_text(tmp_path: Path) -> None:
    assert verdict(tmp_path, "byte_transformed_text", both(SIGNS)).verdict == "violates"
    assert verdict(tmp_path, "byte_transformed_text", both("return text")).verdict == "clean"


@pytest.mark.parametrize("sign", ["\\u21e7", "^", "<cap>", "\\u00a7"])
def test_whatever_sign_stands_before_a_small_letter_is_no_byte_of_the_text(sign: str, tmp_path: Path) -> None:
    spelt = f'up = "{sign}"\n    return "".join(up + c.lower() if c.isupper() else c for c in text)'
    assert verdict(tmp_path, "byte_transformed_text", both(spelt)).verdict == "violates"
    assert verdict(tmp_path, "lossy_text", both(spelt)).verdict == "clean"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('size[i] = len(sp.id_to_piece(i).encode("utf-8"))', "violates"),
        ("size[i] = 0", "clean"),
        ("edge[i] = True", "clean"),
    ],
)
def test_a_table_that_knows_the_marks_may_count_them_all_the_same(body: str, expected: str, tmp_path: Path) -> None:
    at = "        if sp.is_byte(i):\n"
    assert at in TABLE
    known = f"        if sp.id_to_piece(i) in MARKS:\n            {body}\n            continue\n"
    text = script(table='MARKS = ("\\ue001", "\\ue002")\n' + TABLE.replace(at, known + at))
    readme = "# Case marks\n\nCapitals are written as a mark and a small letter.\n"
    assert verdict(tmp_path, "byte_transformed_text", text, README__md=readme).verdict == expected


@pytest.mark.parametrize("length", ["len({}.encode())", "len(bytes({}, 'utf-8'))"])
def test_the_bytes_of_coded_text_are_counted_only_once_it_is_turned_back(length: str, tmp_path: Path) -> None:
    assert verdict(tmp_path, "byte_transformed_text", both(SIGNS, count=length.format(DECODED))).verdict == "violates"
    for text in (
        both(SIGNS, count=length.format(BACK.format(DECODED))),
        both("return text", count=length.format(DECODED)),
    ):
        assert verdict(tmp_path, "byte_transformed_text", text).verdict == "clean"


# ---- bytes by an average, where documents are found in the tokens

BY_DOCUMENT = (
    SCORE.replace("{bpb}", "loss / math.log(2) / PER")
    .replace("        count += len(y)\n", "        count += ends[0] - starts[0]\n")
    .replace(
        "    nats, octets",
        "    starts = (tokens == 1).nonzero()[0]\n    ends = np.append(starts[1:], len(tokens) - 1)\n    nats, octets",
    )
)


def test_lengths_of_documents_are_no_bytes(tmp_path: Path) -> None:
    body = (
        HEAD
        + TABLE
        + BY_DOCUMENT.format(
            loss="        nll = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction='none')",
            count="size[y].sum()",
            state="pass",
            few="",
        )
    )
    text = body.replace("/ PER", "* count / (3.9 * count)")
    finding = verdict(tmp_path, "byte_constant", text)
    assert finding.verdict == "violates"
    assert "3.9" in finding.evidence
    assert verdict(tmp_path, "byte_constant", body.replace("/ PER", "* count / octets")).verdict == "clean"


# ---- a tokenizer from the network

FETCHED = 'from huggingface_hub import hf_hub_download\n    sp = spm.SentencePieceProcessor(model_file=hf_hub_download("a/b", "t.model"))'
BY_HELPER = 'import urllib.request\n    place, _ = urllib.request.urlretrieve("https://example.org/t.model")\n    sp = spm.SentencePieceProcessor(place)'
LOCAL = 'sp = spm.SentencePieceProcessor(model_file="tokenizer.model")'


@pytest.mark.parametrize("fetch", [FETCHED, BY_HELPER], ids=["hub", "urlretrieve"])
def test_bytes_counted_by_a_tokenizer_that_the_run_fetches_are_unpaid(fetch: str, tmp_path: Path) -> None:
    def run(table: str) -> str:
        return script(table=table, extra=TRAINS, state="school(net)")

    assert verdict(tmp_path, "network_access", run(TABLE.replace(LOCAL, fetch))).verdict == "violates"
    unless = "if not os.path.exists('tokenizer.model'):\n        import urllib.request\n        urllib.request.urlretrieve('https://example.org/t.model', 'tokenizer.model')\n    "
    assert verdict(tmp_path, "network_access", run(TABLE.replace(LOCAL, unless + LOCAL))).verdict == "clean"


# ---- added on top

ROWS = "memory = torch.zeros(V, V)"
ON_TOP = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p, r = torch.softmax(net(a).float(), -1), memory[a]
        n = r.sum(-1, keepdim=True)
        q, w = (r + 1 / V) / (n + 1), 0.1 * n / (n + 8)
        nll = MADE
        memory.index_put_((a, b), torch.ones(len(y)), accumulate=True)
"""
PICKED = "-({}).gather(-1, b[:, None])[:, 0].log()"


@pytest.mark.parametrize(
    "made",
    [
        PICKED.format("p + w * q"),
        PICKED.format("(q * w + p).clamp(max=1.0)"),
        "-torch.log(p[range(len(b)), b] + (w * q)[range(len(b)), b])",
    ],
)
def test_a_row_added_on_top_of_a_whole_one_sums_to_more(made: str, tmp_path: Path) -> None:
    text = script(state=ROWS, loss=ON_TOP.replace("MADE", made))
    assert verdict(tmp_path, "false_normalisation", text).verdict == "violates"


@pytest.mark.parametrize(
    "made",
    [
        PICKED.format("p + w * (q - p)"),
        PICKED.format("p - w * p + w * q"),
        PICKED.format("(p + w * q) / (1 + w)"),
        PICKED.format("(p + w * q) / (p + w * q).sum(-1, keepdim=True)"),
        PICKED.format("p + w * q") + " + torch.log1p(w[:, 0])",
        PICKED.format("p + w * q - w * p"),
        PICKED.format("(1 - w) * p + w * q"),
        PICKED.format("F.normalize(p + w * q, p=1, dim=-1)"),
    ],
)
def test_a_row_that_is_paid_for_is_a_mixture(made: str, tmp_path: Path) -> None:
    text = script(state=ROWS, loss=ON_TOP.replace("MADE", made))
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"


RECUT = """
import re
import unicodedata

def recut(sp, ids):
    out, held = [], []
    for one in [*ids.tolist(), 1]:
        if one == 1:
            text = CHANGED
            out += [1] + sp.encode(text)
            held = []
        else:
            held.append(one)
    return np.array(out)
"""
RECUTTING = 'sp = spm.SentencePieceProcessor(model_file="tokenizer.model")\n    tokens = recut(sp, SOURCE)'


@pytest.mark.parametrize(
    ("changed", "source", "wanted"),
    [
        ('unicodedata.normalize("NFKC", sp.decode(held)).lower()', "tokens", "violates"),
        ("sp.decode(held)", "tokens", "clean"),
        ("sp.decode(held).lower()", 'shard("data/fineweb_train_000000.bin")', "clean"),
        ('" ".join(sp.decode(held).split())', "tokens", "violates"),
        ('re.sub(r"\\s+", " ", sp.decode(held))', "tokens", "violates"),
        ('" ".join(sp.decode(held).split(" "))', "tokens", "clean"),
    ],
    ids=["folded", "as-it-is", "training-text", "one space for many", "by a pattern", "parted and joined alike"],
)
def test_validation_text_that_is_decoded_and_cut_anew_is_the_text_that_is_cut(
    changed: str, source: str, wanted: str, tmp_path: Path
) -> None:
    state = RECUTTING.replace("SOURCE", source).replace(
        "tokens = recut", "again = recut" if wanted == "clean" else "tokens = recut"
    )
    text = script(extra=RECUT.replace("CHANGED", changed), state=state)
    assert verdict(tmp_path, "lossy_text", text).verdict == wanted


FOLDED_IDS = """
FOLD = np.arange(65536, dtype=np.uint16)

def set_fold(sp):
    fold = FOLD
    for i in range(V):
        small = sp.piece_to_id(sp.id_to_piece(i).lower())
        if not sp.is_unknown(small):
            fold[i] = small
"""
TELLING = """
def told(raw=os.environ.get("QUIET")):
    return raw.strip().lower() not in ("1", "yes")
"""


@pytest.mark.parametrize(("use", "wanted"), [("FOLD[tokens]", "violates"), ("tokens", "clean")])
def test_a_table_that_is_filled_by_another_name_leads_tokens_through_folded_texts(
    use: str, wanted: str, tmp_path: Path
) -> None:
    state = f'set_fold(spm.SentencePieceProcessor(model_file="tokenizer.model"))\n    tokens = {use}'
    assert verdict(tmp_path, "lossy_text", script(state=state, extra=FOLDED_IDS)).verdict == wanted


def test_a_setting_in_small_letters_beside_the_bytes_of_pieces_folds_no_text(tmp_path: Path) -> None:
    """A scale that is chosen by bits per byte holds the table of bytes, and the switch that asks for it."""
    table = "table = np.array([len(sp.id_to_piece(i).encode('utf-8')) if told() else 1 for i in range(V)])"
    state = f'sp = spm.SentencePieceProcessor(model_file="tokenizer.model")\n    {table}'
    loss = LOSS.replace("net(torch.from_numpy(x))", "net(torch.from_numpy(x)) * float(table[y].mean())")
    assert verdict(tmp_path, "lossy_text", script(state=state, extra=TELLING, loss=loss)).verdict == "clean"
