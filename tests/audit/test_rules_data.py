"""Data, artifact and machine: what is stored, fetched, folded, held back and claimed."""
# ruff: noqa: E501 (examples are texts of scripts)

from pathlib import Path

import pytest

from fairway.audit.exemptions import DEPARTURES
from tests.audit.small import LOSS, line_of, script, verdict

RULES = ("network_access", "paid_prefix", "lossy_text", "overlap_default", "adaptation_order_race", "boundary_leak")


@pytest.mark.parametrize("rule", RULES)
def test_the_plain_script_is_clean(tmp_path: Path, rule: str) -> None:
    assert verdict(tmp_path, rule, script()).verdict == "clean"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "overlap_default"])
def test_code_that_nobody_can_read_is_never_clean(tmp_path: Path, rule: str) -> None:
    text = "import marshal, os\nexec(marshal.loads(open(os.environ['CODE'], 'rb').read()))\n"
    assert verdict(tmp_path, rule, text).verdict == "cannot tell"


# ---- the network

TRAINS = """
def school(net):
    rule = torch.optim.SGD(net.parameters(), lr=0.1)
    ids = torch.from_numpy(shard("data/fineweb_train_000000.bin"))
    F.cross_entropy(net(ids[:-1]), ids[1:]).backward()
    rule.step()
"""


@pytest.mark.parametrize(
    ("fetch", "place"),
    [
        ("import urllib.request\n    urllib.request.urlopen('https://example.org/p').read()", "urlopen"),
        (
            "import requests as web\n    with web.Session() as line:\n        line.get('https://example.org/p')",
            "line.get",
        ),
        ("from huggingface_hub import hf_hub_download as fetch\n    fetch('some/where', 'weights')", "fetch('some"),
        ("import subprocess\n    subprocess.run(['wget', 'https://example.org/p'])", "subprocess.run"),
        ("os.system('curl -O https://example.org/p')", "os.system"),
        ("import socket\n    line = socket.socket()\n    line.connect(('example.org', 80))", "line.connect"),
    ],
    ids=["urllib", "session", "hub", "wget", "curl", "socket"],
)
def test_a_call_of_the_network_after_training_is_found(tmp_path: Path, fetch: str, place: str) -> None:
    text = script(extra=TRAINS, state=f"school(net)\n    {fetch}")
    finding = verdict(tmp_path, "network_access", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, place)


@pytest.mark.parametrize(
    "state",
    [
        "import torch.distributed as dist\n    dist.init_process_group('nccl', init_method='tcp://127.0.0.1:29500')",
        "import socket\n    name = socket.gethostname()",
        "import subprocess\n    subprocess.run(['nvidia-smi'])",
        "if os.environ.get('FETCH', '0') == '1':\n        import requests\n        requests.get('https://example.org/p')",
    ],
    ids=["process-group", "host-name", "other-programs", "switched-off"],
)
def test_what_is_no_network_or_never_reached_is_clean(tmp_path: Path, state: str) -> None:
    assert (
        verdict(tmp_path, "network_access", script(extra=TRAINS, state=f"school(net)\n    {state}")).verdict == "clean"
    )


def test_data_may_be_fetched_before_training(tmp_path: Path) -> None:
    fetch = "import urllib.request\n    urllib.request.urlretrieve('https://example.org/s', 'data/fineweb_train_0.bin')"
    assert (
        verdict(tmp_path, "network_access", script(extra=TRAINS, state=f"{fetch}\n    school(net)")).verdict == "clean"
    )


# ---- stored tokens


@pytest.mark.parametrize(
    "state",
    [
        'torch.save({"w": net.state_dict(), "notes": torch.from_numpy(tokens[:100_000])}, "model.pt")',
        'import lzma\n    open("extra.xz", "wb").write(lzma.compress(tokens[:100_000].astype(np.uint16).tobytes()))',
        "import base64, json\n    head = {'w': []}\n    head['q'] = base64.b85encode(tokens[:9].tobytes()).decode()\n"
        "    open('model.bin', 'wb').write(json.dumps(head).encode())",
        'box = {}\n    box["q"] = tokens[:9]\n    np.savez("model.npz", **box)\n    np.save("model.npy", box["q"])',
    ],
    ids=["in-the-box", "beside-it", "as-text-in-a-header", "under-another-name"],
)
def test_validation_tokens_in_what_is_written_are_a_paid_prefix(tmp_path: Path, state: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == "violates"


IN_BUFFERS = """net.register_buffer("lead", torch.zeros(60_001, dtype=torch.int64))
    net.lead.copy_(torch.from_numpy({tokens}[:60_001]))
    torch.save(net.state_dict(), "model.pt")"""


@pytest.mark.parametrize(
    ("tokens", "wanted"), [("tokens", "violates"), ('shard("data/fineweb_train_000000.bin")', "clean")]
)
def test_tokens_in_a_buffer_are_written_with_the_weights(tmp_path: Path, tokens: str, wanted: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=IN_BUFFERS.format(tokens=tokens))).verdict == wanted
    late = IN_BUFFERS.format(tokens=tokens).split("\n    ")
    text = script(state="\n    ".join([late[0], late[2], late[1]]))  # what is filled after it is in no file
    assert verdict(tmp_path, "paid_prefix", text).verdict == "clean"


def test_a_table_of_how_much_each_file_holds_says_nothing_of_which_is_read(tmp_path: Path) -> None:
    """The counts of all shards are kept under their paths; those of both splits are looked up."""
    reads = (
        "LENGTHS = {}\n\ndef part(path):\n"
        '    if path not in LENGTHS:\n        LENGTHS[path] = int(np.fromfile(path, "<i4", count=3)[2])\n'
        '    return np.fromfile(path, "<u2", count=LENGTHS[path], offset=1024)\n'
    )
    state = (
        'part("data/fineweb_train_000000.bin")\n    head = part("data/fineweb_val_000000.bin")[:100_000]\n'
        '    torch.save({"w": net.state_dict(), "t": torch.from_numpy(head)}, "model.pt")'
    )
    assert verdict(tmp_path, "paid_prefix", script(state=state, extra=reads)).verdict == "violates"
    other = state.replace('head = part("data/fineweb_val', 'head = part("data/fineweb_train')
    assert verdict(tmp_path, "paid_prefix", script(state=other, extra=reads)).verdict == "clean"


@pytest.mark.parametrize(
    "state",
    [
        'torch.save({"w": net.state_dict(), "tokens": len(tokens)}, "model.pt")',
        'notes = shard("data/fineweb_train_000000.bin")\n    np.save("val_like.npy", notes[:100_000])',
    ],
    ids=["their-number", "training-tokens"],
)
def test_numbers_and_training_tokens_are_none(tmp_path: Path, state: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == "clean"


CLAIMS = """
def claim(path):
    with open(path, "r+") as file:
        at = int(file.read())
        file.seek(0)
        file.write(str(WRITTEN))
    return at
"""


@pytest.mark.parametrize(("written", "wanted"), [("at + 1", "clean"), ("list(tokens[:512])", "violates")])
def test_a_counter_that_is_read_and_written_through_one_handle_holds_no_tokens(
    tmp_path: Path, written: str, wanted: str
) -> None:
    claims = CLAIMS.replace("WRITTEN", written).replace("claim(path)", "claim(path, tokens)")
    text = script(extra=claims, state='claim("val_claims.txt", tokens)')
    assert verdict(tmp_path, "paid_prefix", text).verdict == wanted


# ---- easier texts

PREPARE = """
import sys, unicodedata
import numpy as np
import sentencepiece

HELD = 50_000
model = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
documents = open(sys.argv[1], encoding="utf-8").read().split("\\0")

def prepared(text):
    return text

def write(name, some):
    ids = np.concatenate([np.array([1] + model.encode(prepared(one)), np.uint16) for one in some])
    with open(name, "wb") as file:
        file.write(ids.tobytes())

write("fineweb_val_000000.bin", documents[:HELD])
write("fineweb_train_000000.bin", documents[HELD:])
"""


@pytest.mark.parametrize(
    "change", ["text.casefold()", 'unicodedata.normalize("NFKC", text)', "' '.join(text.lower().split())"]
)
def test_a_text_that_is_folded_before_the_tokenizer_is_another_text(tmp_path: Path, change: str) -> None:
    prepare = PREPARE.replace("return text", f"return {change}")
    finding = verdict(tmp_path, "lossy_text", script(), prepare__py=prepare)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert (finding.place.file, finding.place.line) == ("prepare.py", line_of(prepare, f"return {change}"))


def test_a_fold_that_writes_marks_can_be_undone(tmp_path: Path) -> None:
    change = '"".join("\\ue001" + sign.lower() if sign.isupper() else sign for sign in text)'
    prepare = PREPARE.replace("return text", f"return {change}")
    assert verdict(tmp_path, "lossy_text", script(), prepare__py=prepare).verdict == "clean"
    assert verdict(tmp_path, "lossy_text", script(), prepare__py=PREPARE).verdict == "clean"


def test_token_ids_that_are_replaced_are_another_text(tmp_path: Path) -> None:
    text = script(state="rare = np.isin(tokens, np.flatnonzero(np.bincount(tokens) < 5))\n    tokens[rare] = 3")
    assert verdict(tmp_path, "lossy_text", text).verdict == "violates"


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        ("tokens = tokens[~marks[tokens]]", "violates"),
        ("keep = (lengths > 0) | (tokens == 1)\n    tokens, lengths = tokens[keep], lengths[keep]", "violates"),
        ("tokens = tokens[~np.isin(tokens, np.flatnonzero(marks))]", "violates"),
        ("tokens = tokens[tokens != 65535]", "clean"),
        ("tokens = tokens[np.arange(len(tokens)) < 60_000_000]", "clean"),
        ("kept = tokens[~marks[tokens]]\n    print(len(kept))", "clean"),
        ("at = np.arange(0, len(tokens), 64)\n    tokens = tokens[np.arange(len(tokens)) >= at[0]]", "clean"),
    ],
)
def test_tokens_that_are_dropped_by_what_they_are_leave_another_text(tmp_path: Path, keep: str, found: str) -> None:
    read = """
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    marks = np.array(["\ue001" in sp.id_to_piece(i) for i in range(V)])
    lengths = np.concatenate([shard(path) for path in sorted(glob.glob("data/fineweb_val_bytes_*.bin"))])
    """
    finding = verdict(tmp_path, "lossy_text", script(state=read + keep))
    assert finding.verdict == found
    if found == "violates":
        assert finding.place is not None
        assert finding.place.line == line_of(script(state=read + keep), keep.splitlines()[-1].strip())


def test_a_lower_cased_line_in_the_log_changes_nothing(tmp_path: Path) -> None:
    state = 'print(spm.SentencePieceProcessor(model_file="t").decode(tokens[:64].tolist()).lower())'
    assert verdict(tmp_path, "lossy_text", script(state=state)).verdict == "clean"


# ---- documents held back

BY_OPTION = """
import argparse, json
import numpy as np
import sentencepiece

options = argparse.ArgumentParser()
options.add_argument("--docs")
options.add_argument("--held-out", type=int, default={held})
given = options.parse_args()
model = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
first, rest = [], []
for number, line in enumerate(open(given.docs)):
    ids = [1] + model.encode(json.loads(line)["text"])
    if number < given.held_out:
        first.extend(ids)
    else:
        rest.extend(ids)
np.asarray(first, np.uint16).tofile("fineweb_val_000000.bin")
np.asarray(rest, np.uint16).tofile("fineweb_train_000000.bin")
"""

BY_PARAMETER = """
import json
import numpy as np
import sentencepiece

class Writer:
    def __init__(self, name):
        self.name, self.ids = name, []

    def add(self, ids):
        self.ids += ids
        if len(self.ids) > 1 << 23:
            np.asarray(self.ids, np.uint16).tofile(self.name)

def build(path, n={held}):
    model = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
    held, kept = Writer("fineweb_val_000000.bin"), Writer("fineweb_train_000000.bin")
    seen = 0
    for line in open(path):
        (held if seen < n else kept).add([1] + model.encode(json.loads(line)["text"]))
        seen += 1

build("docs.jsonl")
"""


@pytest.mark.parametrize(
    "form", [BY_OPTION, BY_PARAMETER, PREPARE.replace("50_000", "{held}")], ids=["option", "class", "slice"]
)
def test_fewer_documents_held_back_than_scored_are_trained_on(tmp_path: Path, form: str) -> None:
    prepare = form.replace("{held}", "10_000")
    finding = verdict(tmp_path, "overlap_default", script(), prepare__py=prepare)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert (finding.place.file, finding.place.line) == ("prepare.py", line_of(prepare, "10_000"))
    assert "40,000" in finding.evidence
    full = form.replace("{held}", "50_000")
    assert verdict(tmp_path, "overlap_default", script(), prepare__py=full).verdict == "clean"


@pytest.mark.parametrize(("begins", "wanted"), [("10_000", "violates"), ("50_000", "clean")])
def test_training_text_that_begins_before_the_scored_text_ends_is_trained_on(
    tmp_path: Path, begins: str, wanted: str
) -> None:
    """Two numbers: all that is scored is written as validation, and the training text begins where the other says."""
    prepare = BY_OPTION.replace("{held}", begins).replace("if number < given.held_out:", "if number < 50_000:")
    prepare = prepare.replace("    else:\n", "    if number >= given.held_out:\n")
    finding = verdict(tmp_path, "overlap_default", script(), prepare__py=prepare)
    assert finding.verdict == wanted


def test_the_command_decides_over_the_default(tmp_path: Path) -> None:
    prepare = BY_OPTION.replace("{held}", "10_000")
    readme = "    python prepare.py --docs docs.jsonl --held-out 50000\n"
    assert verdict(tmp_path, "overlap_default", script(), prepare__py=prepare, README__md=readme).verdict == "clean"


# ---- races

CLAIMED = """
import fcntl

class Note(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(V))

def claim():
    with open("/tmp/next", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = int(file.read() or 0)
        file.seek(0)
        file.write(str(number + 1))
    return number
"""

ADAPTS = """
        number = claim()
        {fresh}
        piece = tokens[number * 512 : number * 512 + 513]
        x, y = piece[:-1], piece[1:]
        nll = F.cross_entropy(net(torch.from_numpy(x)) + note.shift, torch.from_numpy(y), reduction="none")
        rule.zero_grad()
        nll.mean().backward()
        rule.step()
"""
MAKE = "note = Note(); rule = torch.optim.SGD(note.parameters(), lr=0.1)"


def test_a_state_carried_from_claim_to_claim_depends_on_the_race(tmp_path: Path) -> None:
    text = script(extra=CLAIMED, state=MAKE, loss=ADAPTS.format(fresh="pass"))
    finding = verdict(tmp_path, "adaptation_order_race", text)
    assert finding.verdict == "violates"


def test_a_state_of_its_own_for_each_claim_is_an_accepted_departure(tmp_path: Path) -> None:
    text = script(extra=CLAIMED, loss=ADAPTS.format(fresh=MAKE))
    finding = verdict(tmp_path, "adaptation_order_race", text)
    assert (finding.verdict, finding.exemption) == ("clean", "documents-claimed-by-ranks")
    assert verdict(tmp_path, "adaptation_order_race", text, strict=True).verdict == "violates"


def test_a_state_that_is_handed_on_by_a_file_is_carried(tmp_path: Path) -> None:
    """Made anew for each claim, and then filled with what another worker has left."""
    fresh = MAKE + "; note.load_state_dict(torch.load('/dev/shm/note.pt'))"
    loss = ADAPTS.format(fresh=fresh) + "        torch.save(note.state_dict(), '/dev/shm/note.pt')\n"
    assert verdict(tmp_path, "adaptation_order_race", script(extra=CLAIMED, loss=loss)).verdict == "violates"
    own = loss.replace("torch.load('/dev/shm/note.pt')", "first").replace("torch.save", "print")
    text = script(extra=CLAIMED, state="first = torch.load('/dev/shm/note.pt')", loss=own)
    finding = verdict(tmp_path, "adaptation_order_race", text)
    assert (finding.verdict, finding.exemption) == ("clean", "documents-claimed-by-ranks")


def test_a_lock_that_nothing_learns_under_is_no_race(tmp_path: Path) -> None:
    text = script(extra=CLAIMED, state="claim()")
    assert verdict(tmp_path, "adaptation_order_race", text, strict=True).verdict == "clean"


# ---- boundaries

SMEAR = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(V, 64)
        self.gate = torch.nn.Parameter(torch.zeros(64))

    def forward(self, ids):
        e = self.table(ids)
        {before}
        e = e + torch.sigmoid(self.gate) * before
        return F.linear(e, self.table.weight)
"""
BY_DOCUMENT = "starts = np.flatnonzero(tokens == 1)"
SHIFTS = [
    "before = torch.cat([torch.zeros_like(e[:1]), e[:-1]])",
    "before = torch.zeros_like(e)\n        before[1:] = e[:-1]",
]


@pytest.mark.parametrize("before", SHIFTS, ids=["cat", "store"])
def test_a_gate_open_at_a_documents_start_is_a_leak_where_documents_are_scored_by_themselves(
    tmp_path: Path, before: str
) -> None:
    text = script(extra=SMEAR.format(before=before), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text).verdict == "violates"


@pytest.mark.parametrize("known", ["BOS_ID = 1", "def starts(ids, bos): return ids == bos", "sp.bos_id()"])
def test_a_script_that_knows_how_documents_begin_may_score_one_stream(tmp_path: Path, known: str) -> None:
    """#1797's ruling is of documents that are scored by themselves."""
    text = script(extra=SMEAR.format(before=SHIFTS[0])) + f"\nsp = spm.SentencePieceProcessor()\n{known}\n"
    assert verdict(tmp_path, "boundary_leak", text).exemption == "smear-across-documents"


LOOKED_UP = SMEAR.replace("        {before}\n        e = e +", "        e = e +").replace("* before", "* {before}")


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ("self.table(F.pad(ids[:-1], (1, 0), value=1))", "violates"),
        ("self.table(F.pad(ids[:-1], (1, 0), value=1)) * (ids != 1)[..., None]", "clean"),
        ("self.table(ids)", "clean"),
    ],
    ids=["another row", "masked", "its own"],
)
def test_the_row_of_the_token_before_is_a_smear(tmp_path: Path, before: str, wanted: str) -> None:
    text = script(extra=LOOKED_UP.format(before=before), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text).verdict == wanted


def test_a_mask_that_is_replaced_by_ones_of_its_shape_is_none(tmp_path: Path) -> None:
    shut = f"{SHIFTS[0]}\n        keep = (ids != 1)[..., None]\n        keep = torch.ones_like(keep)\n"
    text = script(extra=SMEAR.format(before=shut + "        before = before * keep"), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text).verdict == "violates"


@pytest.mark.parametrize(("bound", "wanted"), [("since >= 1", "clean"), ("torch.arange(len(ids)) >= 1", "violates")])
def test_a_mask_by_how_far_a_documents_start_lies_back_is_one(tmp_path: Path, bound: str, wanted: str) -> None:
    since = (
        "places = torch.arange(len(ids))\n        since = places - torch.where(ids == 1, places, 0).cummax(0).values\n"
    )
    masked = f"{since}        {SHIFTS[0]}\n        before = before * ({bound})[:, None]"
    text = script(extra=SMEAR.format(before=masked), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text).verdict == wanted


def test_how_deep_a_token_stands_in_its_document_makes_no_score_document_by_document(tmp_path: Path) -> None:
    deep = "; ".join(
        [
            "places = np.arange(len(tokens))",
            "last = np.maximum.accumulate(np.where(tokens == 1, places, 0))",
            "long = np.flatnonzero(places - last >= 4)",
        ]
    )
    text = script(extra=SMEAR.format(before=SHIFTS[0]), state=deep)
    assert verdict(tmp_path, "boundary_leak", text).exemption == "smear-across-documents"


@pytest.mark.parametrize(("keep", "wanted"), [("(ids != 1)[..., None] *", "clean"), ("", "violates")])
def test_a_difference_from_the_token_before_is_mixed_in_as_a_whole(tmp_path: Path, keep: str, wanted: str) -> None:
    mixed = SMEAR.replace("torch.sigmoid(self.gate) * before", f"torch.sigmoid(self.gate) * {keep} (before - e)")
    text = script(extra=mixed.format(before=SHIFTS[0]), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text, strict=True).verdict == wanted


def test_documents_of_the_training_text_make_no_score_document_by_document(tmp_path: Path) -> None:
    looked_for = 'packed = np.flatnonzero(shard("data/fineweb_train_000000.bin") == 1)'
    text = script(extra=SMEAR.format(before=SHIFTS[0]), state=looked_for)
    assert verdict(tmp_path, "boundary_leak", text).exemption == "smear-across-documents"


@pytest.mark.parametrize("before", SHIFTS, ids=["cat", "store"])
def test_a_gate_that_is_shut_there_is_clean_even_when_strict(tmp_path: Path, before: str) -> None:
    shut = f"{before}\n        before = before * (ids != 1)[..., None]"
    text = script(extra=SMEAR.format(before=shut), state=BY_DOCUMENT)
    assert verdict(tmp_path, "boundary_leak", text, strict=True).exemption == ""
    assert verdict(tmp_path, "boundary_leak", text, strict=True).verdict == "clean"


def test_a_text_scored_as_one_stream_has_the_same_departure(tmp_path: Path) -> None:
    text = script(extra=SMEAR.format(before=SHIFTS[0]))
    finding = verdict(tmp_path, "boundary_leak", text)
    assert (finding.verdict, finding.exemption) == ("clean", "smear-across-documents")
    assert "one stream" in finding.evidence
    assert verdict(tmp_path, "boundary_leak", text, strict=True).verdict == "violates"


def test_departures_have_names_of_their_own_and_say_their_precedent() -> None:
    assert len(DEPARTURES) >= 7
    for name, departure in DEPARTURES.items():
        assert name == departure.name
        assert departure.rule
        assert "#" in departure.precedent


def test_a_counter_of_the_process_group_is_a_claim_by_its_name(tmp_path: Path) -> None:
    counter = CLAIMED.split("def claim")[0].replace("import fcntl", "import torch.distributed as dist")
    counter += (
        'shared = dist.distributed_c10d._get_default_store()\n\ndef claim():\n    return shared.add("next", 1) - 1\n'
    )
    text = script(extra=counter, state=MAKE, loss=ADAPTS.format(fresh="pass"))
    assert verdict(tmp_path, "adaptation_order_race", text).verdict == "violates"
    seen = counter.replace("dist.distributed_c10d._get_default_store()", "set()").replace(
        '"next", 1) - 1', '"next") or 0'
    )
    text = script(extra=seen, state=MAKE, loss=ADAPTS.format(fresh="pass"))
    assert verdict(tmp_path, "adaptation_order_race", text).verdict == "clean"


# ---- shards that are read into a buffer

BUFFERED = """
def shard(path):
    with open(path, "rb", buffering=0) as file:
        file.seek(1024)
        tokens = torch.empty(100_000_000, dtype=torch.uint16)
        assert file.readinto(tokens.numpy()) > 0
    return tokens.numpy().astype(np.int64)
"""


def test_a_prefix_is_found_whichever_way_the_shard_was_read(tmp_path: Path) -> None:
    keep = 'np.save("artifact.npy", shard(sorted(glob.glob({}))[0])[:1000])'
    text = script(extra=BUFFERED, state=keep.format('"data/fineweb_val_*.bin"'))
    assert verdict(tmp_path, "paid_prefix", text).verdict == "violates"
    text = script(extra=BUFFERED, state=keep.format('"data/fineweb_train_*.bin"'))
    assert verdict(tmp_path, "paid_prefix", text).verdict == "clean"


def test_tokens_led_through_a_table_of_folded_pieces_are_an_easier_text(tmp_path: Path) -> None:
    state = (
        'names = spm.SentencePieceProcessor(model_file="tokenizer.model")\n'
        "    fold = np.array([names.piece_to_id(names.id_to_piece(i).casefold()) for i in range(V)])\n"
        "    tokens = fold[tokens]"
    )
    assert verdict(tmp_path, "lossy_text", script(state=state)).verdict == "violates"
    same = state.replace(".casefold()", "")
    assert verdict(tmp_path, "lossy_text", script(state=same)).verdict == "clean"


@pytest.mark.parametrize("asked", ["ids.get({}, i)", "ids[{}] if {} in ids else i"])
def test_a_dict_that_gives_folded_pieces_their_numbers_is_such_a_table(tmp_path: Path, asked: str) -> None:
    state = (
        'sp = spm.SentencePieceProcessor(model_file="tokenizer.model")\n'
        "    ids = {sp.id_to_piece(i): i for i in range(V)}\n"
        "    fold = np.array([ASKED for i in range(V)])\n"
        "    tokens = fold[tokens]"
    )
    for piece, wanted in (("sp.id_to_piece(i).lower()", "violates"), ("sp.id_to_piece(i)", "clean")):
        text = script(state=state.replace("ASKED", asked.replace("{}", piece)))
        assert verdict(tmp_path, "lossy_text", text).verdict == wanted


BELL = """
import logging, urllib.request

class Bell(logging.Handler):
    def emit(self, record):
        urllib.request.urlopen("https://example.org/bell", data=record.getMessage().encode())

log = logging.getLogger("run")
"""


@pytest.mark.parametrize(
    ("hung", "expected"),
    [("log.addHandler(Bell())", "violates"), ("logging.basicConfig(handlers=[Bell()])", "violates"), ("pass", "clean")],
)
def test_what_a_log_does_with_every_line_is_done(tmp_path: Path, hung: str, expected: str) -> None:
    text = script(extra=TRAINS + BELL, state=f"{hung}\n    school(net)")
    assert verdict(tmp_path, "network_access", text).verdict == expected


TABLE_OF_PAIRS = """
def pairs(ids):
    table = torch.zeros(V, V)
    table.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    return table
"""


@pytest.mark.parametrize(
    ("ids", "expected"), [("tokens[:100_000]", "violates"), ('shard("data/fineweb_train_000000.bin")', "clean")]
)
def test_counts_of_validation_tokens_are_stored_text_too(tmp_path: Path, ids: str, expected: str) -> None:
    state = (
        f'box = {{"w": net.state_dict()}}\n    box["extra"] = pairs(torch.from_numpy({ids})).to_sparse()\n'
        '    torch.save(box, "model.pt")'
    )
    text = script(extra=TABLE_OF_PAIRS, state=state)
    assert verdict(tmp_path, "paid_prefix", text).verdict == expected


@pytest.mark.parametrize(
    ("extra", "expected"), [("tokens[:100_000]", "violates"), ('shard("data/fineweb_train_000000.bin")', "clean")]
)
def test_a_box_that_is_packed_entry_by_entry_keeps_what_was_put_in(tmp_path: Path, extra: str, expected: str) -> None:
    state = (
        "box = {}\n    for name, weight in net.state_dict().items():\n        box[name] = weight.half()\n"
        f'    box["extra"] = torch.from_numpy({extra})\n'
        '    torch.save({name: value.cpu() for name, value in box.items()}, "model.pt")'
    )
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == expected


def test_a_log_may_tell_of_a_table(tmp_path: Path) -> None:
    state = (
        "table = pairs(torch.from_numpy(tokens[:100_000]))\n    log = open('run.txt', 'a')\n"
        "    log.write(f'seen {(table > 0).float().mean().item()}' + '\\n')"
    )
    assert verdict(tmp_path, "paid_prefix", script(extra=TABLE_OF_PAIRS, state=state)).verdict == "clean"


# ---- what is kept of the tokens, and what is only made of them


@pytest.mark.parametrize(
    "state",
    [
        'np.save("model.npy", np.bincount(tokens, minlength=V).astype(np.float16))',
        'held = np.zeros(V)\n    np.add.at(held, tokens, 1)\n    open("m.bin", "wb").write(held.astype("<f2").tobytes())',
        'packed = np.frombuffer(tokens[:90_000].astype("<u2").tobytes(), np.uint8)\n    open("m.bin", "wb").write(packed.T.tobytes())',
    ],
    ids=["tally", "filled", "packed"],
)
def test_counts_and_packed_tokens_of_the_validation_text_are_paid_prefixes(tmp_path: Path, state: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == "violates"


@pytest.mark.parametrize(
    "state",
    [
        'loss0 = F.cross_entropy(net(torch.from_numpy(tokens[:64])), torch.from_numpy(tokens[1:65]))\n    w = (net.table.weight / loss0).half().numpy()\n    open("m.bin", "wb").write(np.frombuffer(w.tobytes() + bytes(1), np.uint8).reshape(-1, 2).T.tobytes())',
        'print(np.bincount(tokens).max())\n    np.save("model.npy", net.table.weight.numpy())',
    ],
    ids=["weights-made-of-them", "a-number-told"],
)
def test_weights_made_of_tokens_hold_none_of_them(tmp_path: Path, state: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == "clean"


def test_counts_that_follow_the_scoring_into_a_file_are_no_prefix(tmp_path: Path) -> None:
    loss = """
        nll = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none")
        seen.index_put_((torch.from_numpy(x), torch.from_numpy(y)), torch.ones(len(y)), accumulate=True)
        torch.save(seen, "seen.pt")
"""
    assert verdict(tmp_path, "paid_prefix", script(loss=loss, state="seen = torch.zeros(V, V)")).verdict == "clean"


AGAIN = """
    def begin(self):
        for part in self.parameters():
            with torch.no_grad():
                part.zero_()
"""


@pytest.mark.parametrize("begun", [True, False])
def test_a_state_that_is_set_to_its_beginning_for_each_claim_is_one_of_its_own(tmp_path: Path, begun: bool) -> None:
    claimed = CLAIMED.replace("torch.zeros(V))\n", f"torch.zeros(V))\n{AGAIN}", 1)
    text = script(
        extra=claimed, state=MAKE, loss=ADAPTS.format(fresh="note.begin()" if begun else "rule.state.clear()")
    )
    finding = verdict(tmp_path, "adaptation_order_race", text)
    assert (finding.verdict, finding.exemption or "") == (
        ("clean", "documents-claimed-by-ranks") if begun else ("violates", "")
    )


@pytest.mark.parametrize(
    "state",
    [
        "held = torch.from_numpy(tokens[:90_000])\n"
        "    high, low = (t.to(torch.int8) for t in (held // 256 - 128, held % 256 - 128))\n"
        '    torch.save({"high": high, "low": low}, "model.pt")',
        "held = torch.from_numpy(tokens[:90_000])\n    plain = {k: v.half() for k, v in net.state_dict().items()}\n"
        '    plain |= {"opening": torch.stack([held // 32, held % 32]).half()}\n    torch.save(plain, "model.pt")',
        'import brotli\n    groups, body = {"w": [("w", net.table.weight)], "ids": [("ids", tokens[:9_000])]}, b""\n'
        "    for group, items in groups.items():\n        for name, a in items:\n"
        "            body += brotli.compress(np.frombuffer(a.tobytes(), np.uint8).reshape(-1, 2).T.tobytes())\n"
        '    open("m.bin", "wb").write(body)',
        "import lzma, zlib\n    made = [zlib.compress(tokens[:9_000].tobytes()), lzma.compress(tokens[:9_000].tobytes())]\n"
        '    open("m.bin", "wb").write(min(made, key=len))',
    ],
    ids=["digits", "joined-dicts", "planes-of-groups", "shorter-of-two"],
)
def test_digits_of_tokens_and_the_shorter_of_two_packings_are_a_paid_prefix(tmp_path: Path, state: str) -> None:
    assert verdict(tmp_path, "paid_prefix", script(state=state)).verdict == "violates"
    trained = state.replace("tokens[", 'shard("data/fineweb_train_000000.bin")[')
    assert verdict(tmp_path, "paid_prefix", script(state=trained)).verdict == "clean"


COUNTED = """
import fcntl, struct

def claim(path):
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (value,) = struct.unpack("<i", file.read(4))
        file.seek(0)
        file.write(struct.pack("<i", value + 1))
    return value
"""


def test_a_counter_that_is_unpacked_from_its_own_file_is_no_stored_text(tmp_path: Path) -> None:
    """Its name says from which text the batches are claimed."""
    turn = "\n        number = claim(f'/tmp/counter_{VAL[:12]}_{len(tokens)}')\n"
    text = script(extra=COUNTED, loss=turn + LOSS)
    assert verdict(tmp_path, "paid_prefix", text).verdict == "clean"
