"""A compressed file is the text: what is written comes back byte for byte, and nothing else ever does."""

import inspect
import random
import struct
import zlib
from dataclasses import replace

import pytest
import torch
from bench import mutations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairway.artifact import open_artifact, seal
from fairway.artifact.container import PackSpec
from fairway.base.devices import threads
from fairway.base.errors import ArtifactError, RecipeError
from fairway.base.specs import build
from fairway.model import GPT
from fairway.score import ScoreSpec, compress, decompress, exact, settings_for
from fairway.score.codec import files as codec_files
from fairway.score.codec import format

ENGLISH = b"The coder narrows an interval, symbol by symbol; what is likely costs little. " * 6
SCRIPTS = "Straße, Ёлка, 漢字かな交じり, مرحبا بالعالم, नमस्ते दुनिया 🦊\n" * 3


@pytest.fixture(scope="module")
def artifact(files):
    return open_artifact(files[1])


@pytest.fixture(scope="module")
def plain(artifact):
    return settings_for(artifact, adapt=False, lanes=1)


@pytest.fixture(scope="module")
def rolling(artifact):
    """One file of two segments, the first in two parts of two lanes each; and its text."""
    text = inspect.getsource(inspect).encode()[70_000:70_900]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_files, "SEGMENT", 700)
        patch.setattr(codec_files, "BLOCK_BYTES", 120)
        coded = compress(artifact, text, settings_for(artifact, adapt=False, lanes=4), groups=2)
    return coded, text


def comes_back(artifact, text, spec, groups=2):
    coded = compress(artifact, text, spec, groups=groups)
    assert decompress(artifact, coded.content) == text
    return coded


def taken(content):
    header, start = format.read_header(content, "own")
    return header, format.read_segments(content, start, header, "own")


# Any bytes come back


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The tiny artifact of the mutations: width 8, context 16; it adapts."""
    path = tmp_path_factory.mktemp("golden") / "tiny.fw"
    mutations.tiny_artifact(path)
    return open_artifact(path)


TRIED: list[bytes] = []


@settings(max_examples=1000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=12), st.text(max_size=6).map(lambda text: text.encode()), st.binary(max_size=20)))
def test_a_thousand_drawn_byte_strings_come_back(golden, text):
    TRIED.append(text)
    comes_back(golden, text, settings_for(golden, adapt=False, lanes=3))


def test_it_was_a_thousand_drawn_byte_strings():
    """Counted, since a property may be tried less often than it says."""
    if not TRIED:
        pytest.skip("the test above was not run")
    assert len(TRIED) >= 1000
    assert len(set(TRIED)) > 700


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"x", b"\0", b"\xff", b"\n", b"no final newline", b"one line\r\nand another\r\n", b"\0" * 60),
        *(ENGLISH, SCRIPTS.encode(), SCRIPTS.encode("utf-16"), SCRIPTS.encode()[1:-2], b"\x80\xbf\xc0\xaf\xed\xa0\x80"),
        *(
            inspect.getsource(random).encode()[:700],
            random.Random(0).randbytes(500),
            b"  \t leading",
            b" ",
            b"\xe2\x96\x81",
        ),
    ],
    ids=[
        *("empty", "one byte", "a NUL", "a byte of no text", "a newline", "no final newline", "CRLF", "NULs"),
        *("English", "five scripts", "UTF-16", "cut UTF-8", "invalid UTF-8"),
        *("source code", "random bytes", "spaces", "a space", "the sign for a space"),
    ],
)
def test_any_kind_of_bytes_comes_back(artifact, plain, text):
    comes_back(artifact, text, plain)


def test_a_repeated_text_comes_back(artifact):
    """In many lanes: a quarter of the seconds."""
    comes_back(artifact, b"ab" * 5000, settings_for(artifact, adapt=False, lanes=32))


def test_an_empty_file_is_a_header_alone(artifact, plain):
    for spec in (plain, settings_for(artifact, adapt=True)):
        coded = comes_back(artifact, b"", spec)
        assert (coded.tokens, coded.word_bytes, coded.framing_bytes) == (0, 0, len(coded.content))


def test_segments_lanes_and_groups_come_back(artifact, rolling):
    coded, text = rolling
    _, segments = taken(coded.content)
    assert [len(segment.parts) for segment in segments] == [2, 2]
    assert [part.lanes for part in segments[0].parts] == [2, 2]
    assert len(segments[0].parts[0].blocks) > 1
    assert decompress(artifact, coded.content) == text


@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_a_text_of_about_a_segment_comes_back(artifact, plain, monkeypatch, edge):
    monkeypatch.setattr(codec_files, "SEGMENT", 100)
    coded = comes_back(artifact, (ENGLISH + ENGLISH)[: 200 + edge], plain)
    assert len(taken(coded.content)[1]) == 2 + (edge > 0)


@pytest.mark.parametrize(("size", "lanes"), [(1, 1), (100, 1), (5_000, 1), (20_000, 6), (1_000_000, 32), (10**9, 32)])
def test_a_longer_text_has_more_lanes(artifact, size, lanes):
    """16 contexts of 64 tokens of about 3 bytes for each, 32 lanes at most."""
    assert settings_for(artifact, adapt=False, text_bytes=size).lanes == lanes
    assert settings_for(artifact, adapt=True, text_bytes=size).lanes == 1


def test_more_lanes_than_tokens_are_one(artifact):
    coded = comes_back(artifact, b"abc", settings_for(artifact, adapt=False, lanes=32))
    assert [part.lanes for segment in taken(coded.content)[1] for part in segment.parts] == [1]


def test_parts_are_decoded_in_processes_of_their_own(artifact, rolling, monkeypatch):
    monkeypatch.setattr("fairway.score.codec.jobs.ALONE", 0)
    coded, text = rolling
    assert decompress(artifact, coded.content, processes=2) == text


# Every way to read a text


WAYS = {
    "plain": {"windows": "plain"},
    "plain in lanes": {"windows": "plain", "lanes": 3},
    "sliding": {"windows": {"kind": "sliding", "stride": 16}},
    "sliding in lanes": {"windows": {"kind": "sliding", "stride": 24}, "lanes": 2},
    "rolling, another context": {"windows": "rolling", "context": 20},
    "temperature": {"windows": "rolling", "temperature": 1.3},
    "the stage quantized": {"windows": "plain", "result": "quantized"},
    "slot": {"windows": {"kind": "sliding", "stride": 16}, "result": "adapted", "adapt": {"kind": "slot", "steps": 3}},
    "slot in lanes": {
        "windows": {"kind": "sliding", "stride": 32},
        "lanes": 2,
        "result": "adapted",
        "adapt": {"kind": "slot", "steps": 2},
    },
}
TTT = {"kind": "ttt", "chunk": 96, "epochs": 2, "batch": 2, "micro_batch": 1, "lr": 0.003}
for _windows in ("rolling", "plain", {"kind": "sliding", "stride": 16}):
    for _lanes in (1, 2):
        _name = _windows if isinstance(_windows, str) else "sliding"
        WAYS[f"learning, {_name}, {_lanes} lanes"] = {
            "windows": _windows,
            "lanes": _lanes,
            "result": "adapted",
            "adapt": TTT,
        }


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_text_comes_back(artifact, way):
    spec = build(ScoreSpec, WAYS[way])
    coded = comes_back(artifact, inspect.getsource(inspect).encode()[70_000:70_600], spec)
    if "learning" in way:
        assert coded.updates >= 3
    else:
        assert coded.updates == 0


def test_learning_as_the_artifact_says_crosses_updates(artifact):
    text = inspect.getsource(inspect).encode()[70_000:71_800]
    coded = comes_back(artifact, text, settings_for(artifact, adapt=True))
    assert coded.updates >= 2
    without = compress(artifact, text, settings_for(artifact, adapt=False, lanes=1))
    assert coded.coded_bits < without.coded_bits, "and it helps: this model is hardly trained"


def test_an_artifact_that_names_no_adaptation_cannot_adapt(artifact, tmp_path):
    seal(
        tmp_path / "still.fw",
        artifact.tensors,
        artifact.model_spec,
        artifact.vocab,
        artifact.tokenizer,
        {"score": {}},
        PackSpec(),
    )
    with pytest.raises(RecipeError, match=r"still\.fw: names no adaptation; leave --adapt out"):
        settings_for(open_artifact(tmp_path / "still.fw"), adapt=True)


# The file is what it says


@pytest.mark.parametrize("adapt", [False, True])
def test_words_are_as_long_as_the_distributions_say(artifact, adapt):
    text = inspect.getsource(inspect).encode()[70_000:72_500]
    coded = compress(artifact, text, settings_for(artifact, adapt))
    parts = sum(len(segment.parts) for segment in taken(coded.content)[1])
    assert coded.coded_bits <= 8 * coded.word_bytes <= 1.0005 * coded.coded_bits + 64 * parts
    assert abs(coded.coded_bits / coded.ideal_bits - 1) < 0.0005
    assert coded.word_bytes + coded.framing_bytes == len(coded.content)
    assert coded.text_bytes == len(text)
    words = sum(len(part.words) for segment in taken(coded.content)[1] for part in segment.parts)
    assert coded.word_bytes == words


@pytest.mark.parametrize("adapt", [False, True])
def test_the_same_text_gives_the_same_file(artifact, adapt):
    spec = settings_for(artifact, adapt)
    assert compress(artifact, ENGLISH, spec).content == compress(artifact, ENGLISH, spec).content


def test_two_threads_write_what_one_thread_reads(artifact):
    """Long enough that torch does share the work."""
    text = inspect.getsource(inspect).encode()[60_000:65_000]
    with threads(2):
        coded = compress(artifact, text, settings_for(artifact, adapt=False, lanes=8))
    with threads(1):
        assert decompress(artifact, coded.content) == text


# Roundings near a boundary


def noisy(monkeypatch, size):
    """Every logit of the model is moved by up to `size`."""
    real, chance = GPT.logits, torch.Generator().manual_seed(0)

    def logits(self, hidden, last=None):
        found = real(self, hidden, last)
        return found + size * (2 * torch.rand(found.shape, generator=chance, dtype=found.dtype) - 1)

    monkeypatch.setattr(GPT, "logits", logits)


def test_a_decoder_takes_over_the_roundings_that_are_listed(artifact, plain, monkeypatch):
    """With a margin of 1/64 of a step every 32nd logit is listed; noise of a quarter of that moves many of them."""
    with monkeypatch.context() as patch:
        patch.setattr(exact, "MARGIN", 1 / 64)
        content = compress(artifact, ENGLISH[:150], plain).content
    near = [entry for segment in taken(content)[1] for part in segment.parts for b in part.blocks for entry in b.near]
    assert len(near) > 100
    noisy(monkeypatch, 1 / 64 / 64 / 4)
    assert decompress(artifact, content) == ENGLISH[:150]
    header, segments = taken(content)
    bare = [
        replace(s, parts=tuple(replace(p, blocks=tuple(replace(b, near=()) for b in p.blocks)) for p in s.parts))
        for s in segments
    ]
    with pytest.raises(ArtifactError, match="segment 0: block 0"):
        decompress(artifact, format.pack(header, bare))


def test_noise_of_other_machines_changes_nothing_and_larger_noise_is_refused(artifact, plain, monkeypatch):
    content = compress(artifact, ENGLISH, plain).content
    with monkeypatch.context() as patch:
        noisy(patch, 1e-12)
        assert decompress(artifact, content) == ENGLISH
    with monkeypatch.context() as patch:
        noisy(patch, 1e-3)
        with pytest.raises(ArtifactError, match="segment 0: block 0"):
            decompress(artifact, content)


def test_a_rounding_that_no_machine_would_take_is_refused(artifact, plain):
    header, segments = taken(compress(artifact, ENGLISH, plain).content)
    part = segments[0].parts[0]
    for near, says in (((0, 3, 1 << 40), "listed as"), ((0, 1 << 40, 0), "symbol 1099511627776")):
        block = replace(part.blocks[0], near=(near,))
        forged = [replace(segments[0], parts=(replace(part, blocks=(block, *part.blocks[1:])),))]
        with pytest.raises(ArtifactError, match=f"segment 0: block 0: exact: .*{says}"):
            decompress(artifact, format.pack(header, forged))


def test_a_machine_that_learns_otherwise_is_refused_before_anything_is_decoded(artifact, monkeypatch):
    content = compress(artifact, ENGLISH, settings_for(artifact, adapt=True)).content
    monkeypatch.setattr("fairway.score.codec.files.trial", lambda *_: "0123456789abcdef")
    monkeypatch.setattr("fairway.score.codec.files.run_jobs", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ArtifactError, match=r"was written where learning rounds otherwise \(torch .*; here torch "):
        decompress(artifact, content)


def test_a_state_that_turns_out_another_is_refused(artifact):
    text = inspect.getsource(inspect).encode()[70_000:70_500]
    spec = build(ScoreSpec, WAYS["learning, rolling, 1 lanes"])
    header, segments = taken(compress(artifact, text, spec).content)
    part = segments[0].parts[0]
    block = replace(part.blocks[0], state=bytes(8))
    forged = [replace(segments[0], parts=(replace(part, blocks=(block, *part.blocks[1:])),))]
    with pytest.raises(ArtifactError, match="segment 0: block 0: the adapted state is another one here"):
        decompress(artifact, format.pack(header, forged))


# Refusals


def mutated_words(content):
    """The words of segment 0, part 1 exchanged for others, every checksum right."""
    header, segments = taken(content)
    parts = list(segments[0].parts)
    parts[1] = replace(parts[1], words=random.Random(0).randbytes(len(parts[1].words)))
    return format.pack(header, [replace(segments[0], parts=tuple(parts)), *segments[1:]])


def test_words_that_were_exchanged_are_refused_by_the_block(artifact, rolling):
    with pytest.raises(ArtifactError, match=r"^case\.fwc: segment 0, part 1: block 0: .*damaged"):
        decompress(artifact, mutated_words(rolling[0].content), "case.fwc")


def test_another_artifact_is_refused(artifact, rolling, golden):
    with pytest.raises(ArtifactError, match=rf"case\.fwc: was compressed with the artifact {artifact.sha256[:12]}"):
        decompress(golden, rolling[0].content, "case.fwc")


def test_every_truncation_is_refused_and_says_where(artifact, rolling):
    content = rolling[0].content
    for length in range(len(content)):
        with pytest.raises(ArtifactError, match=r"^case\.fwc: (magic|header|segment \d): "):
            decompress(artifact, content[:length], "case.fwc")


def test_every_altered_byte_is_refused_and_says_where(artifact, rolling):
    content = rolling[0].content
    for place in range(len(content)):
        altered = content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        with pytest.raises(ArtifactError, match=r"^case\.fwc: (magic|version|header|segment \d): "):
            decompress(artifact, altered, "case.fwc")


def test_bytes_after_the_end_are_refused(artifact, rolling):
    with pytest.raises(ArtifactError, match=r"case\.fwc: end: 3 bytes follow"):
        decompress(artifact, rolling[0].content + b"abc", "case.fwc")


def test_another_version_and_other_files_are_refused(artifact, rolling):
    content = rolling[0].content
    with pytest.raises(ArtifactError, match="version: 2 is not 1"):
        decompress(artifact, content[:7] + b"\2" + content[8:])
    for other in (b"", b"FWC", b"PK\3\4" + bytes(100), b"FAIRWAY\1" + bytes(100)):
        with pytest.raises(ArtifactError, match="no file that fairway compressed"):
            decompress(artifact, other)


def test_words_of_another_part_are_refused(artifact, rolling):
    header, (first, *others) = taken(rolling[0].content)
    one, two = first.parts
    swapped = replace(first, parts=(replace(one, words=two.words), replace(two, words=one.words)))
    with pytest.raises(ArtifactError, match="segment 0, part 0: block 0"):
        decompress(artifact, format.pack(header, [swapped, *others]))


def test_segments_in_another_order_are_another_text(artifact, rolling):
    """Only a checksum over the header's could tell, and whoever forges one forges both: it is a sound file."""
    coded, text = rolling
    header, segments = taken(coded.content)
    assert decompress(artifact, format.pack(header, segments[::-1])) == text[700:] + text[:700]


# Forged headers, their checksums right


def settings_of(changed):
    def forge(header, segments):
        return replace(header, settings={**header.settings, **changed}), segments

    return forge


def header_of(**values):
    return lambda header, segments: (replace(header, **values), segments)


def part_of(text_bytes=None, count=None, **values):
    def forge(header, segments):
        first, *others = segments
        part = first.parts[0]
        new = replace(part, **values, **({"blocks": part.blocks[:1] * count} if count else {}))
        first = replace(first, text_bytes=text_bytes or first.text_bytes, parts=(new, *first.parts[1:]))
        whole = [first, *others]
        return replace(header, text_bytes=sum(segment.text_bytes for segment in whole)), whole

    return forge


SLOT = {"kind": "slot", "steps": 2}
ABSURD = {
    "2^40 segments": header_of(segments=1 << 40),
    "a negative number of segments": header_of(segments=-1),
    "2^60 bytes": header_of(text_bytes=1 << 60),
    "bytes that are no number": header_of(text_bytes="9"),
    "a stage that does not exist": header_of(stage="perfect"),
    "the stage of float weights": header_of(stage="float"),
    "a stage that is a list": header_of(stage=[]),
    "a stage that learns, without a fingerprint": header_of(stage="adapted"),
    "a fingerprint where nothing learns": header_of(machine="0" * 16),
    "control characters": header_of(wrote="\x1b[2J\n"),
    "half a character": header_of(wrote="\ud800"),
    "a chunk of a proof": header_of(chunk=1),
    "a chunk that is no number": header_of(chunk="1"),
    "settings that are a list": header_of(settings=[1]),
    "a setting that does not exist": settings_of({"oracle": True}),
    "a setting that breaks the line": settings_of({"a\nb\x1b[2J": 1}),
    "a setting that is not the file's": settings_of({"block_tokens": 1 << 40}),
    "temperature NaN": settings_of({"temperature": float("nan")}),
    "temperature infinity": settings_of({"temperature": float("inf")}),
    "temperature 0": settings_of({"temperature": 0}),
    "temperature true": settings_of({"temperature": True}),
    "temperature 2^70": settings_of({"temperature": 1 << 70}),
    "context -1": settings_of({"context": -1}),
    "context 2^70": settings_of({"context": 1 << 70}),
    "context 2^40": settings_of({"context": 1 << 40}),
    "unknown windows": settings_of({"windows": "oracle"}),
    "windows outside the package": settings_of({"windows": "..adapt.ttt"}),
    "windows that are a number": settings_of({"windows": 7}),
    "stride 0": settings_of({"windows": {"kind": "sliding", "stride": 0}}),
    "stride 2^70": settings_of({"windows": {"kind": "sliding", "stride": 1 << 70}}),
    "an unknown technique": settings_of({"adapt": "peek"}),
    "a technique that is null": settings_of({"adapt": None}),
    "a key that breaks the line": settings_of({"adapt": {"kind": "ttt", "a\nb": 1}}),
    "0 tokens": part_of(targets=0, whole=0),
    "2^62 tokens": part_of(text_bytes=1 << 61, targets=1 << 61, whole=1 << 61),
    "2^62 tokens of a text": part_of(whole=1 << 62),
    "2^40 tokens of a text": part_of(whole=1 << 40),
    "2^33 tokens of a text": part_of(whole=1 << 33),
    "no lane": part_of(lanes=0),
    "2^40 lanes": part_of(whole=1 << 40, lanes=1 << 40),
    "2^20 lanes": part_of(whole=1 << 20, lanes=1 << 20),
    "block 0": part_of(block=0),
    "block 2^40": part_of(block=1 << 40),
    "10 million tokens in as many lanes": part_of(
        1 << 24, 80, targets=10 << 20, whole=10 << 20, lanes=10 << 20, block=1 << 17
    ),
}
ABSURD_LEARNING = {
    "2^40 epochs": settings_of({"adapt": {**TTT, "epochs": 1 << 40}}),
    "chunk 2^70": settings_of({"adapt": {**TTT, "chunk": 1 << 70}}),
    "a rate that is not a number": settings_of({"adapt": {**TTT, "lr": float("nan")}}),
    "an infinite rate": settings_of({"adapt": {**TTT, "lr": float("inf")}}),
    "betas 2 and 3": settings_of({"adapt": {**TTT, "betas": [2.0, 3.0]}}),
    "eps -1": settings_of({"adapt": {**TTT, "eps": -1.0}}),
    "momentum -1": settings_of({"adapt": {**TTT, "optimizer": "sgd", "momentum": -1.0}}),
    "no fingerprint": header_of(machine=""),
    "another fingerprint": header_of(machine="x"),
    "nothing learns": settings_of({"adapt": "none"}),
    "2^40 steps of slot": lambda header, segments: (
        replace(header, machine="", settings={"adapt": {**SLOT, "steps": 1 << 40}, "windows": "plain"}),
        segments,
    ),
}


def quickly_refused(artifact, forge, content):
    header, segments = forge(*taken(content))
    packed = format.pack(header, segments)
    held = mutations.peak()
    with mutations.at_most(5.0), pytest.raises(ArtifactError, match=r"^case\.fwc: ") as caught:
        decompress(artifact, packed, "case.fwc")
    assert mutations.peak() - held < 300, "MB"
    assert str(caught.value).isprintable(), "one line, and no control character"


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_headers_are_refused_at_once(artifact, rolling, what):
    quickly_refused(artifact, ABSURD[what], rolling[0].content)


@pytest.fixture(scope="module")
def learned(artifact):
    text = inspect.getsource(inspect).encode()[70_000:70_400]
    return compress(artifact, text, build(ScoreSpec, WAYS["learning, rolling, 2 lanes"])).content


@pytest.mark.parametrize("what", ABSURD_LEARNING)
def test_absurd_headers_of_files_that_learn_are_refused_at_once(artifact, learned, what):
    quickly_refused(artifact, ABSURD_LEARNING[what], learned)


@pytest.mark.parametrize("depth", [50, 600, 960, 5000, 400_000])
def test_deep_json_is_refused(artifact, rolling, depth):
    from fairway.artifact.squeeze import squeeze

    deep = b'{"stage":"sliding","text_bytes":0,"segments":0,"settings":{"adapt":' + b"[" * depth + b"]" * depth + b"}}"
    raw = bytes.fromhex(artifact.sha256) + squeeze(deep)
    content = b"FWCODED\1" + struct.pack("<II", len(raw), zlib.crc32(raw)) + raw
    with pytest.raises(ArtifactError, match=r"^case\.fwc: header: "):
        decompress(artifact, content, "case.fwc")


def test_what_nobody_could_decode_is_not_written(artifact):
    spec = build(ScoreSpec, {"result": "adapted", "windows": "plain", "adapt": {**TTT, "epochs": 101}})
    with pytest.raises(RecipeError, match=r"adapt\.epochs = 101: at most 100"):
        compress(artifact, ENGLISH, spec)


# Mutations: 300 here, 10,000 in bench/mutations.py


@pytest.fixture(scope="module")
def originals(golden):
    return mutations.originals(golden.path)


def test_no_mutation_is_decoded_wrongly_or_breaks_the_decoder(golden, originals, tmp_path):
    drawn = list(mutations.cases(golden.path.read_bytes(), originals, 300, seed=20))
    assert sum(case.honest for case in drawn) == 150
    tallies = mutations.run(iter(drawn), tmp_path, limit=20.0)
    assert [what for tally in tallies.values() for _, what in tally.wrong] == []
    assert {kind for kind, _ in tallies} == {*mutations.DAMAGE, *mutations.FORGERY}
    assert sum(tally.refused for tally in tallies.values()) > 200
    assert sum(tally.same + tally.other for (_, honest), tally in tallies.items() if not honest) > 5
    assert max(tally.megabytes for tally in tallies.values()) < 500


def test_the_originals_of_the_mutations_decode(golden, originals):
    """And hold what is to be mutated."""
    assert all(decompress(golden, one.content) == one.text for one in originals)
    parts = [part for one in originals for segment in taken(one.content)[1] for part in segment.parts]
    assert max(len(part.blocks) for part in parts) > 2
    assert max(part.lanes for part in parts) > 1
    assert all(part.blocks[0].near for part in parts)
    assert any(part.blocks[0].state for part in parts)
