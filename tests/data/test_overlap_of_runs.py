"""A run says in its journal how many held-out documents it trains on, and refuses more than its bound."""

import json
from itertools import count

import numpy as np
import pytest

from fairway import steps
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.data.sources.shards import write_shard
from fairway.data.splits import share_of
from fairway.recipe import load
from tests.tiny.way import TINY, run_tiny

WORDS = "a run of words that is long enough to be a document of its own, number"


def prepared(folder, *overrides):
    """The fact that `prepare` books."""
    chosen = load(str(TINY), (f"data.path={folder}", *overrides))
    run = Run()
    steps.prepare(chosen, run, steps.refuse_overlap)
    return run.facts["overlap"]


def text_of(folder, twins):
    """Documents on both sides of a split by hash; `twins` held-out ones stand in training in capitals."""
    numbers, made, pairs = count(), [], 0
    while pairs < twins or len(made) < 60:
        document = f"<doc>{WORDS} {next(numbers)}\n".encode()
        other = document.replace(b"words", b"WORDS")
        if pairs < twins and share_of(document) < 0.5 <= share_of(other):
            made += [document, other]
            pairs += 1
        elif pairs == twins:
            made.append(document)
    (folder / "text.txt").write_bytes(b"".join(made))
    return made


def by_documents(*overrides):
    source = 'data.source={kind = "text", by = "documents", separator = "<doc>", valid_fraction = 0.5}'
    return (source, "data.tokenizer.vocab=300", *overrides)


def test_text_without_shared_documents_says_so(tmp_path):
    made = text_of(tmp_path, 0)
    fact = prepared(tmp_path / "text.txt", *by_documents())
    held_out = sum(share_of(document) < 0.5 for document in made)
    assert (fact["shared"], fact["share"], fact["limit"]) == (0, 0.0, 0.0)
    assert (fact["held_out_documents"], fact["compared"]) == (held_out, "folded text")


def test_text_that_differs_in_case_alone_is_shared_and_refused(tmp_path):
    made = text_of(tmp_path, 3)
    held_out = sum(share_of(document) < 0.5 for document in made)
    with pytest.raises(
        DataError, match=rf"3 of {held_out} held-out documents .*data\.overlap_limit = 0: take"
    ) as caught:
        prepared(tmp_path / "text.txt", *by_documents())
    assert "\n" not in str(caught.value)
    fact = prepared(tmp_path / "text.txt", *by_documents("data.overlap_limit=0.5"))
    assert (fact["shared"], fact["limit"], fact["share"]) == (3, 0.5, 3 / held_out)


def test_text_with_equal_documents_is_refused_unless_a_bound_is_stated(tmp_path):
    same = f"<doc>{WORDS}\n" * 2 + "".join(f"<doc>{WORDS} {i}\n" for i in range(20)) + f"<doc>{WORDS}\n"
    (tmp_path / "text.txt").write_text(same)
    words = ('data.source={kind = "text", separator = "<doc>", valid_fraction = 0.3}', "data.tokenizer.vocab=300")
    with pytest.raises(DataError, match=r"1 of 7 held-out documents .*: take them out"):
        prepared(tmp_path / "text.txt", *words)
    assert prepared(tmp_path / "text.txt", *words, "data.overlap_limit=0.3")["shared"] == 1


def shards_of(folder, tokenizer, leaked, held_out=40):
    """Training shards in which `leaked` of the held-out documents stand, one of them across two shards."""
    generator = np.random.default_rng(4)
    made = [np.append(tokenizer.bos, generator.integers(5, 400, 60)).astype(np.uint16) for _ in range(200)]
    valid, train = made[:held_out], [*made[held_out:], *made[:leaked]]
    tokens = np.concatenate(train)
    for number, part in enumerate(np.split(tokens, [2000, len(tokens) - 30])):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(valid))
    (folder / "t.model").write_bytes(tokenizer.model)
    return "data.source=shards", "data.tokenizer.vocab=400", "data.tokenizer.model=t.model"


def test_shards_are_compared_document_by_document(tmp_path, tokenizer):
    words = shards_of(tmp_path, tokenizer, 32)
    with pytest.raises(DataError, match=r"32 of 40 held-out documents \(80\.00%\) .*the first is number 0; .*0\.01"):
        prepared(tmp_path, *words)
    fact = prepared(tmp_path, *words, "data.overlap_limit=1.0")
    assert (fact["shared"], fact["held_out_documents"], fact["compared"]) == (32, 40, "tokens")


def test_a_few_shared_documents_of_shards_are_a_fact_and_no_refusal(tmp_path, tokenizer):
    words = shards_of(tmp_path, tokenizer, 1, held_out=100)
    fact = prepared(tmp_path, *words)
    assert (fact["shared"], fact["share"], fact["limit"]) == (1, 0.01, 0.01)
    with pytest.raises(DataError, match="1 of 100"):
        prepared(tmp_path, *words, "data.overlap_limit=0.0")


def test_dev_is_what_is_compared_where_it_is_scored(tmp_path, tokenizer):
    words = shards_of(tmp_path, tokenizer, 20)
    assert prepared(tmp_path, *words, "data.held_out=dev")["shared"] == 0


def test_a_run_ends_before_it_trains_and_its_journal_says_why(tmp_path):
    text_of(tmp_path, 3)
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="held-out documents"):
        run_tiny(folder, f"data.path={tmp_path / 'text.txt'}", *by_documents())
    facts = [json.loads(row) for row in (folder / "journal.jsonl").read_text().splitlines()]
    assert next(row for row in facts if row["fact"] == "overlap")["shared"] == 3
    assert not (folder / "weights.safetensors").exists()


def test_a_completed_run_has_the_fact(tiny_run):
    facts = [json.loads(row) for row in (tiny_run / "journal.jsonl").read_text().splitlines()]
    found = next(row for row in facts if row["fact"] == "overlap")
    assert (found["shared"], found["limit"]) == (0, 0.0)


@pytest.mark.parametrize("limit", ["-0.1", "1.5", "nan"])
def test_a_bound_that_is_no_share_is_refused(limit):
    with pytest.raises(RecipeError, match=r"overlap_limit"):
        load(str(TINY), (f"data.overlap_limit={limit}",))
