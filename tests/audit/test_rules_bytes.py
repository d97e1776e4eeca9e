"""Bytes: each token's bytes are counted once and as they are, whichever way the script writes it."""

from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.rules import byte_double_space
from fairway.audit.submission import opened
from tests.audit.small import COUNT, HEAD, LOSS, TABLE, line_of, script, verdict, verdicts

RULES = ("byte_double_space", "byte_missing_mark", "byte_fallback_three", "byte_constant", "byte_transformed_text")

COMPREHENSION = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    pieces = [sp.id_to_piece(i) for i in range(V)]
    edge = np.array([sp.is_control(i) or sp.is_unknown(i) for i in range(V)])
    lead = np.array([p[:1] == "▁" for p in pieces]) & ~edge
    bare = [p.lstrip("▁") for p in pieces]
    size = np.array([0 if edge[i] else 1 if sp.is_byte(i) else len(p.encode()) for i, p in enumerate(bare)])
    return size, lead, edge
"""

METHOD = """
class Ruler:
    def __init__(self, processor):
        self.processor = processor

    def measure(self, number):
        if self.processor.is_control(number):
            return 0, False, True
        if self.processor.is_byte(number):
            return 1, False, False
        text = self.processor.id_to_piece(number)
        return len(text.removeprefix("▁").encode("utf-8")), text.startswith("▁"), False

    def columns(self):
        return [np.array(column) for column in zip(*[self.measure(i) for i in range(V)])]

def tables():
    size, lead, edge = Ruler(spm.SentencePieceProcessor(model_file="tokenizer.model")).columns()
    return size, lead, edge
"""


@pytest.mark.parametrize("table", [TABLE, COMPREHENSION, METHOD], ids=["loop", "comprehension", "class"])
@pytest.mark.parametrize("rule", RULES)
def test_a_canonical_count_is_clean_in_every_style(tmp_path: Path, rule: str, table: str) -> None:
    assert verdict(tmp_path, rule, script(table=table)).verdict == "clean"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [('piece.replace("\\u2581", " ")', "clean"), ('(" " + piece).replace("\\u2581", " ")', "violates")],
)
def test_marks_within_a_piece_are_no_leading_space(tmp_path: Path, text: str, wanted: str) -> None:
    table = TABLE.replace('len(piece.encode("utf-8"))', f'len({text}.encode("utf-8"))')
    assert table != TABLE
    assert verdict(tmp_path, "byte_double_space", script(table=table)).verdict == wanted


def test_a_space_in_several_rows_of_sums_is_one_for_each_token(tmp_path: Path) -> None:
    """Asked of the terms alone: a trial, where it comes to an end, would clear it by its bytes."""
    adding = "\n        add(sums[len(x) % 2], nll.sum(), " + COUNT + ")\n"
    helper = "def add(row, *more):\n    row += torch.stack([torch.as_tensor(each) for each in more])\n"
    text = script(
        loss=LOSS + adding,
        state="sums = torch.zeros(2, 2)",
        bpb="sums.sum(0).tolist()[0] / math.log(2) / sums.sum(0).tolist()[1]",
        extra=helper,
    )
    (tmp_path / "train_gpt.py").write_text(text, encoding="utf-8")
    assert byte_double_space._by_terms(Case(opened(tmp_path))).verdict == "clean"


# ---- the space twice


def test_a_space_in_the_marks_place_is_counted_in_the_table(tmp_path: Path) -> None:
    put = TABLE.replace("piece = piece[1:]", 'piece = " " + piece[1:]')
    assert put != TABLE
    assert verdict(tmp_path, "byte_double_space", script(table=put)).verdict == "violates"


@pytest.mark.parametrize(
    ("table", "count", "place"),
    [
        (
            TABLE.replace('len(piece.encode("utf-8"))', 'len(piece.encode("utf-8")) + int(lead[i])'),
            COUNT,
            "+ int(lead[i])",
        ),
        (TABLE.replace("piece = piece[1:]", 'piece = piece.replace("\\u2581", " ")'), COUNT, "piece.replace("),
        (TABLE.replace("return size, lead", "size = size + lead\n    return size, lead"), COUNT, "size = size + lead"),
        (TABLE, f"{COUNT} + lead[y].sum()", "lead[y].sum()"),
        (METHOD.replace('removeprefix("▁")', 'replace("▁", " ")'), COUNT, 'replace("▁"'),
        (COMPREHENSION.replace('lstrip("▁")', 'replace("▁", " ")'), COUNT, 'replace("▁"'),
    ],
    ids=["in-the-store", "as-a-space", "vectorised", "in-the-loop", "in-a-method", "in-a-comprehension"],
)
def test_a_space_in_the_table_and_in_the_loop_is_counted_twice(
    tmp_path: Path, table: str, count: str, place: str
) -> None:
    text = script(table=table, count=count)
    finding = verdict(tmp_path, "byte_double_space", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, place)  # where it is counted without asking what stands before


def test_a_space_that_the_table_counts_and_the_loop_takes_off_again_is_counted_once(tmp_path: Path) -> None:
    table = TABLE.replace("piece = piece[1:]", 'piece = piece.replace("\\u2581", " ")')
    text = script(table=table, count="size[y].sum() - (lead[y] & edge[x]).sum()")
    assert verdict(tmp_path, "byte_double_space", text).verdict == "clean"


SPACED = TABLE.replace("sp.id_to_piece(i)", 'sp.id_to_piece(i).replace("\u2581", " ")').replace(
    'startswith("\\u2581")', 'startswith(" ")'
)


BY_BOOL = (
    TABLE[: TABLE.index("        if piece.startswith")]
    + """        lead[i] = piece.startswith("\u2581")
        size[i] = len(piece[int(lead[i]) :].replace("\u2581", " ").encode("utf-8"))
    return size, lead, edge
"""
)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (SPACED, "clean"),
        (SPACED.replace("piece = piece[1:]", "piece = piece"), "violates"),
        (METHOD.replace('removeprefix("▁")', 'replace("▁", " ").lstrip()'), "clean"),
        (BY_BOOL, "clean"),
        (BY_BOOL.replace("piece[int(lead[i]) :]", "piece"), "violates"),
    ],
    ids=["cut-off", "kept", "stripped", "cut-off-by-whether-it-is-there", "kept-besides"],
)
def test_a_mark_that_is_made_a_space_and_cut_off_again_is_counted_once(
    tmp_path: Path, table: str, expected: str
) -> None:
    assert verdict(tmp_path, "byte_double_space", script(table=table)).verdict == expected


# ---- the mark


@pytest.mark.parametrize(
    "table",
    [
        TABLE.replace("            lead[i] = True\n            piece = piece[1:]\n", "            lead[i] = True\n"),
        METHOD.replace('removeprefix("▁")', 'removeprefix("_")'),
        COMPREHENSION.replace('lstrip("▁")', "strip()"),
    ],
    ids=["never-taken-off", "another-sign", "white-space-alone"],
)
def test_a_piece_measured_with_its_mark_has_two_bytes_too_many(tmp_path: Path, table: str) -> None:
    finding = verdict(tmp_path, "byte_missing_mark", script(table=table))
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(script(table=table), "encode(")


def test_the_marks_bytes_may_be_taken_off_by_arithmetic(tmp_path: Path) -> None:
    table = TABLE.replace("piece = piece[1:]", "size[i] = -3").replace("size[i] = len", "size[i] += len")
    assert verdict(tmp_path, "byte_missing_mark", script(table=table)).verdict == "clean"


# ---- byte pieces


@pytest.mark.parametrize(
    "table",
    [
        TABLE.replace("        if sp.is_byte(i):\n            size[i] = 1\n            continue\n", ""),
        TABLE.replace("size[i] = 1\n", "size[i] = 3\n"),
        COMPREHENSION.replace("1 if sp.is_byte(i) else ", ""),
        METHOD.replace("return 1, False", 'return len("\\ufffd".encode()), False'),
    ],
    ids=["no-branch", "three", "comprehension", "the-replacement-sign"],
)
def test_a_byte_piece_that_is_measured_as_a_text_counts_three(tmp_path: Path, table: str) -> None:
    assert verdict(tmp_path, "byte_fallback_three", script(table=table)).verdict == "violates"


@pytest.mark.parametrize("byte", ["len(bytes([int(p[3:5], 16)]))", "len(bytes.fromhex(p[3:5]))"])
@pytest.mark.parametrize("rule", ["byte_missing_mark", "byte_fallback_three"])
def test_a_byte_piece_may_be_measured_by_the_number_in_its_name(tmp_path: Path, rule: str, byte: str) -> None:
    table = COMPREHENSION.replace("1 if sp.is_byte(i) else", "NUMBER if sp.is_byte(i) else").replace(
        "[0 if edge[i] else NUMBER", f"[0 if edge[i] else {byte}"
    )
    table = table.replace("for i, p in enumerate(bare)", "for i, p in enumerate(pieces)").replace(
        "len(p.encode())", "len(bare[i].encode())"
    )
    assert verdict(tmp_path, rule, script(table=table)).verdict == "clean"


def test_byte_pieces_may_be_told_by_their_shape(tmp_path: Path) -> None:
    table = TABLE.replace("if sp.is_byte(i):", 'if sp.id_to_piece(i).startswith("<0x"):')
    assert verdict(tmp_path, "byte_fallback_three", script(table=table)).verdict == "clean"


# ---- constants


@pytest.mark.parametrize(
    "bpb",
    [
        "loss / math.log(2) / 4.3",
        "nats / math.log(2) / (count * 2.44)",
        "loss / math.log(2) * 0.41",
        'nats / math.log(2) / (count * float(os.environ.get("RATIO", "4.3")))',
    ],
)
def test_bytes_that_nobody_counted_are_a_constant(tmp_path: Path, bpb: str) -> None:
    text = script(bpb=bpb)
    finding = verdict(tmp_path, "byte_constant", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "return loss, ")


@pytest.mark.parametrize(
    ("octets", "wanted"), [("torch.full_like(nll, 2.47)", "violates"), ("torch.from_numpy(size[y])", "clean")]
)
def test_an_array_of_one_number_for_all_tokens_counts_no_bytes(tmp_path: Path, octets: str, wanted: str) -> None:
    """Also where they are summed by document, in a column beside the losses."""
    loss = f"{LOSS}        book[at % 4, 1] += {octets}[nll >= 0].sum()\n"
    text = script(loss=loss, state="book = torch.zeros(4, 3)", bpb="nats / math.log(2) / book.sum(0)[1].item()")
    assert verdict(tmp_path, "byte_constant", text).verdict == wanted


def test_what_a_count_lies_on_is_no_count_of_bytes(tmp_path: Path) -> None:
    live = "at < torch.arange(len(y), device=ids.device)"
    loss = f"{LOSS}        ids = torch.from_numpy(piece)\n        live = {live}\n        count += live.sum().item()\n"
    text = script(loss=loss, bpb="nats / math.log(2) / (count * 2.44)").replace("count += len(y)", "pass")
    assert verdict(tmp_path, "byte_constant", text).verdict == "violates"


def test_a_number_that_a_helper_asks_the_environment_for_is_named_where_its_default_stands(tmp_path: Path) -> None:
    helper = """
def number(name, default):
    return float(os.environ.get(name, default))

class Settings:
    per_token = number("PER_TOKEN", 2.436)
"""
    count = "torch.full_like(nll, Settings.per_token).sum().item()"
    text = script(extra=helper, count=count)
    found = verdict(tmp_path, "byte_constant", text)
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, '"PER_TOKEN", 2.436')


def test_a_constant_that_only_checks_the_count_is_no_denominator(tmp_path: Path) -> None:
    loss = "        assert abs(count * 2.44 - octets) < 1e9\n" + LOSS
    assert verdict(tmp_path, "byte_constant", script(loss=loss)).verdict == "clean"


def test_the_known_total_of_the_split_is_no_guess(tmp_path: Path) -> None:
    assert verdict(tmp_path, "byte_constant", script(bpb="nats / math.log(2) / 151_080_891")).verdict == "clean"
    assert verdict(tmp_path, "byte_constant", script(bpb="nats / math.log(2) / 151_999_999")).verdict == "suspect"


def test_infinity_is_no_number_of_bytes(tmp_path: Path) -> None:
    """What a best score begins with."""
    assert verdict(tmp_path, "byte_constant", script(bpb="nats / math.log(2) / float('inf')")).verdict != "suspect"


def test_only_the_reported_number_counts(tmp_path: Path) -> None:
    text = script() + '    print(f"about {loss / math.log(2):.3f} bits per token")\n'
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


# ---- transformed texts


def test_pieces_of_a_case_transformed_text_are_no_bytes_of_the_original(tmp_path: Path) -> None:
    finding = verdict(
        tmp_path, "byte_transformed_text", script(), README__md="Tokens are CaseOps, U+E001 marks capitals."
    )
    assert finding.verdict == "violates"


def test_marks_by_another_name_are_those_of_a_transform(tmp_path: Path) -> None:
    said = "Lossless case marks before capitalised words; data: fineweb10B_casemarks."
    assert verdict(tmp_path, "byte_transformed_text", script(), README__md=said).verdict == "violates"
    said = "SP8192, case-marks-free"
    assert verdict(tmp_path, "byte_transformed_text", script(), README__md=said).verdict == "clean"


def test_a_mask_that_reads_the_tokens_is_no_sidecar(tmp_path: Path) -> None:
    """Bytes are still those of the pieces, whatever tells which of them count."""
    count = "((size[y] + (lead[y] & ~edge[x])) * (tokens[at + 1 : at + 513] >= 0)).sum()"
    said = "Tokens are CaseOps, U+E001 marks capitals."
    assert verdict(tmp_path, "byte_transformed_text", script(count=count), README__md=said).verdict == "violates"


@pytest.mark.parametrize("said", ["SP8192 without CaseOps", "SP8192, CaseOps-free", "SP8192, no case ops"])
def test_a_transform_that_a_readme_says_it_does_without_is_none(tmp_path: Path, said: str) -> None:
    assert verdict(tmp_path, "byte_transformed_text", script(), README__md=said).verdict == "clean"


def test_a_sidecar_of_original_bytes_is_the_right_denominator(tmp_path: Path) -> None:
    state = 'side = np.concatenate([shard(path) for path in sorted(glob.glob("data/fineweb_val_bytes_*.bin"))])'
    text = script(state=state, count="side[at + 1 : at + 513].sum()")
    readme = "Tokens are CaseOps, U+E001 marks capitals."
    assert verdict(tmp_path, "byte_transformed_text", text, README__md=readme).verdict == "clean"


def test_a_space_that_is_added_to_a_sidecar_is_counted_twice(tmp_path: Path) -> None:
    """A sidecar has the bytes of the original text, every space among them."""
    side = 'side = np.concatenate([shard(path) for path in sorted(glob.glob("data/fineweb_val_bytes_*.bin"))])'
    state = f"{side}\n    side += lead[tokens]"
    honest = verdict(tmp_path, "byte_double_space", script(state=side, count="side[at + 1 : at + 513].sum()"))
    found = verdict(tmp_path, "byte_double_space", script(state=state, count="side[at + 1 : at + 513].sum()"))
    assert (honest.verdict, found.verdict) == ("clean", "violates")


def test_bytes_of_a_folded_text_are_not_those_of_the_original(tmp_path: Path) -> None:
    state = 'texts = open("docs.txt").read().split("\\0")'
    text = script(state=state, count="sum(len(one.lower().encode()) for one in texts)")
    assert verdict(tmp_path, "byte_transformed_text", text).verdict == "violates"
    text = script(state=state, count="sum(len(one.encode()) for one in texts)")
    assert verdict(tmp_path, "byte_transformed_text", text).verdict == "clean"


# ---- other ways to the same counts

ROWS = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    rows = []
    for i in range(V):
        match (sp.is_control(i) or sp.is_unknown(i), sp.is_byte(i), sp.id_to_piece(i)):
            case (True, _, _):
                rows.append((0, False, True))
            case (_, True, _):
                rows.append((1, False, False))
            case (_, _, str(text)) if text.startswith("▁"):
                rows.append((len(text[1:].encode()), True, False))
            case (_, _, text):
                rows.append((len(text.encode()), False, False))
    return [np.array(column) for column in zip(*rows)]
"""

SPELT = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    spelt, mute = {}, {i for i in range(V) if sp.is_control(i) or sp.is_unknown(i)}
    for i in set(range(V)) - mute:
        spelt[i] = b"?" if sp.is_byte(i) else sp.id_to_piece(i).replace("▁", " ").encode()
    return spelt, mute, mute
"""
PICKED = "(size[y] + (lead[y] & ~edge[x]))[y < V].sum()"
SPELT_COUNT = "sum(len(size[t]) - (size[t][:1] == b' ' and p in edge) for p, t in zip(x.tolist(), y.tolist()))"

LESS_THREE = TABLE.replace("            piece = piece[1:]\n", "").replace(
    'len(piece.encode("utf-8"))', 'len(piece.encode("utf-8")) - 3 * piece.startswith("▁")'
)


@pytest.mark.parametrize(
    ("table", "count"),
    [(ROWS, COUNT), (SPELT, SPELT_COUNT), (LESS_THREE, COUNT), (TABLE, PICKED)],
    ids=["match", "spelt", "less-three", "picked-by-a-mask"],
)
def test_honest_counts_in_other_shapes_are_clean(tmp_path: Path, table: str, count: str) -> None:
    text = script(table=table, count=count)
    assert {rule: found.verdict for rule, found in verdicts(tmp_path, RULES, text).items()} == dict.fromkeys(
        RULES, "clean"
    )


@pytest.mark.parametrize(
    ("rule", "table", "count"),
    [
        ("byte_double_space", ROWS.replace("(len(text[1:].encode())", "(1 + len(text[1:].encode())"), COUNT),
        ("byte_fallback_three", ROWS.replace("rows.append((1,", "rows.append((len(sp.decode([i]).encode()),"), COUNT),
        ("byte_fallback_three", SPELT.replace('b"?"', '"\\ufffd".encode()'), SPELT_COUNT),
        ("byte_missing_mark", SPELT.replace('.replace("▁", " ")', ""), SPELT_COUNT),
        ("byte_missing_mark", TABLE.replace("            piece = piece[1:]\n", ""), COUNT),
        ("byte_double_space", LESS_THREE.replace("- 3 *", "- 2 *"), COUNT),
    ],
    ids=["space-twice", "decoded-sign", "sign-in-a-table", "spelt-with-mark", "told-but-kept", "less-two"],
)
def test_the_same_shapes_with_a_fault_are_not(tmp_path: Path, rule: str, table: str, count: str) -> None:
    assert verdict(tmp_path, rule, script(table=table, count=count)).verdict == "violates"


def test_bytes_given_to_marks_of_the_transform_by_weight_are_added(tmp_path: Path) -> None:
    state = 'side = np.concatenate([shard(path) for path in sorted(glob.glob("data/fineweb_val_bytes_*.bin"))])'
    marks = "np.isin(tokens[at + 1 : at + 513], [4, 5, 6, 7])"
    text = script(state=state, count=f"(side[at + 1 : at + 513] + 3 * {marks}).sum()")
    assert verdict(tmp_path, "byte_transformed_text", text).verdict == "violates"


def test_the_mean_of_two_scores_assumes_no_bytes(tmp_path: Path) -> None:
    text = script() + "    second = evaluate(Net())[1]\n    print(f'val_bpb {0.5 * (bpb + second):.5f}')\n"
    assert verdict(tmp_path, "byte_constant", text).verdict == "clean"


APPENDED = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    own, space, special = [], [], []
    for i in range(V):
        special.append(sp.is_control(i) or sp.is_unknown(i))
        piece = "" if special[-1] else sp.id_to_piece(i)
        space.append(piece.startswith("\\u2581"))
        if sp.is_byte(i):
            own.append({byte})
        else:
            own.append(len(piece.removeprefix("\\u2581").encode("utf-8")))
    return np.array(own), np.array(space), np.array(special)
"""


@pytest.mark.parametrize(("byte", "expected"), [("1", "clean"), ('len("\\ufffd".encode("utf-8"))', "violates")])
def test_a_list_that_grows_piece_by_piece_counts_a_byte_piece_once(tmp_path: Path, byte: str, expected: str) -> None:
    text = script(table=APPENDED.replace("{byte}", byte))
    assert verdict(tmp_path, "byte_fallback_three", text).verdict == expected


SUMMED_UP = """
from typing import NamedTuple

class Totals(NamedTuple):
    nats: float
    count: int
    octets: float

def pieces(net, tokens):
    size, lead, edge = tables()
    for at in range(0, len(tokens) - 1, 512):
        x, y = tokens[at : at + 512], tokens[at + 1 : at + 513]
        nll = F.cross_entropy(net(torch.from_numpy(x)).float(), torch.from_numpy(y), reduction="sum")
        yield Totals(nll.item(), len(y), COUNT)

def total(each):
    return Totals(*map(sum, zip(*each)))

sums = total(pieces(Net(), np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])))
print(f"val_bpb {sums.nats / math.log(2) / sums.octets:.5f}")
"""


def test_totals_that_are_summed_column_by_column_are_read(tmp_path: Path) -> None:
    text = HEAD + TABLE + SUMMED_UP.replace("COUNT", COUNT)
    assert verdict(tmp_path, "byte_double_space", text).verdict == "clean"
    text = HEAD + TABLE + SUMMED_UP.replace("COUNT", f"{COUNT} + lead[y].sum()")
    assert verdict(tmp_path, "byte_double_space", text).verdict == "violates"


JOINED = """
import json, re, sys
import sentencepiece as spm

JOINER = "\\u2060"

def changed(text):
    return CHANGE

sp = spm.SentencePieceProcessor(model_file=sys.argv[2])
with open(sys.argv[1]) as lines:
    ids = [token for line in lines for token in sp.encode(changed(json.loads(line)["text"]))]
"""


@pytest.mark.parametrize(
    "change", ['re.sub("[0-9]{2,}", lambda found: JOINER.join(found.group()), text)', 'text.replace("A", JOINER + "a")']
)
def test_marks_that_no_reader_sees_are_no_bytes_of_the_original(tmp_path: Path, change: str) -> None:
    beside = {"prepare__py": JOINED.replace("CHANGE", change)}
    finding = verdict(tmp_path, "byte_transformed_text", script(), **beside)
    assert finding.verdict == "violates"
    freed = TABLE.replace("size[i] = len(piece", 'size[i] = len(piece.replace("\\u2060", "")')
    assert verdict(tmp_path, "byte_transformed_text", script(table=freed), **beside).verdict == "clean"


@pytest.mark.parametrize(
    "comment", ["# a capital is U+E001 and a small letter", "DATA = './data/fineweb10B_sp1024_caps'"]
)
def test_marks_of_capitals_that_a_script_names_are_bytes_of_no_original(tmp_path: Path, comment: str) -> None:
    text = script(extra=f"{comment}\n").replace(
        'model_file="tokenizer.model"',
        f'model_file="{"tokenizer_caps_bpe" if "DATA" in comment else "tokenizer"}.model"',
    )
    assert verdict(tmp_path, "byte_transformed_text", text).verdict == "violates"
    assert verdict(tmp_path, "byte_transformed_text", script()).verdict == "clean"


OWN_MARKS = """
CAP = "^"

def marked(ids):
    out, sp = [], spm.SentencePieceProcessor(model_file="tokenizer.model")
    for start in range(0, len(ids), 4096):
        text = sp.decode(ids[start : start + 4096].tolist()).replace(CAP, CAP + CAP)
        out.extend(sp.encode(re.sub("[A-Z]", WRITTEN, text)))
    return np.array(out)
"""


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("lambda found: CAP + found.group(0).lower()", "violates"),
        ('lambda found: f"{CAP}{found.group(0).casefold()}"', "violates"),
        ("lambda found: found.group(0)", "clean"),
    ],
)
def test_marks_of_capitals_that_a_function_writes_are_bytes_of_no_original(
    tmp_path: Path, written: str, wanted: str
) -> None:
    text = script(extra=OWN_MARKS.replace("WRITTEN", written), few="")
    read = "glob.glob(VAL))])\n"
    assert read in text
    text = text.replace(read, f"{read}    tokens = marked(tokens)\n").replace("import glob,", "import glob, re,")
    found = verdict(tmp_path, "byte_transformed_text", text)
    assert found.verdict == wanted
    # Where the script writes the marks itself, its table of bytes is what it always was: that line is to be changed.
    assert found.place is None if wanted == "clean" else "[A-Z]" in text.splitlines()[found.place.line - 1]


@pytest.mark.parametrize("change", ['text.replace("\\ufeff", "")', 're.sub(f"[{JOINER}\\u200b]", "", text)'])
def test_marks_that_are_taken_out_are_written_nowhere(tmp_path: Path, change: str) -> None:
    beside = {"prepare__py": JOINED.replace("CHANGE", change)}
    assert verdict(tmp_path, "byte_transformed_text", script(), **beside).verdict == "clean"
