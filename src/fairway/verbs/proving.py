"""Is the score honest? Its proof, its probe, and what dishonest scoring would claim."""

import json as json_text
import re
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fairway import steps
from fairway.artifact import open_artifact
from fairway.base.devices import choose
from fairway.base.errors import HonestyError, RecipeError
from fairway.base.files import read, write
from fairway.base.ranks import Ranks
from fairway.outcome import proof_rows
from fairway.score import ChunkProof
from fairway.score import diagnose as diagnosed
from fairway.score import probe as probed
from fairway.score.booking import read_booked
from fairway.score.chunks import decode_chunk as decoded_chunk
from fairway.verbs.opening import ranks_on, recipe_of, run_of
from fairway.verbs.printing import table


def prove(folder: Path, slice_: str, full: bool, chunks: int, nonce: str, as_json: bool) -> None:
    if (bool(slice_) + full + bool(chunks)) > 1:
        raise RecipeError("fairway prove: one of --slice, --full and --chunks; leave the others out")
    if bool(chunks) != bool(nonce):
        raise RecipeError("fairway prove: --chunks K and --nonce TEXT go together; the nonce draws the chunks")
    size = 0 if full else _size(slice_) if slice_ else None
    chosen = recipe_of(folder)
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        if chunks:
            read_booked(folder)  # refuses before any text is read
        text = steps.prepare(chosen, opened)
        if chunks:
            found = steps.prove_chunks(chosen, text.held_out, opened, chunks, nonce)
            _show_chunks(found, as_json)
            return
        size = size if size is not None or chosen.proof_bytes else 8_000
        proof = steps.prove(chosen, text.held_out, opened, size)
        assert proof is not None
        steps.book_proof(opened, proof)
    if as_json:
        print(json_text.dumps(proof.plain(), indent=2))
    else:
        table("proof", "", proof_rows(proof.plain()))
        print(
            f"proven: {proof.text_bytes:,} bytes decoded from {proof.file_bytes:,}, byte for byte, by another process"
        )


def decode_chunk(file: Path, artifact: Path, state: Path, before: Path, out: Path) -> None:
    opened = open_artifact(artifact)
    write(out, decoded_chunk(opened, read(file), read(state), read(before), str(file)))


def probe(folder: Path, flips: int, tokens: int, device: str, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with ranks_on(device) as (ranks, target), run_of(chosen, folder.parent, ranks, as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        reports = probed(
            folder / steps.ARTIFACT,
            text.held_out,
            chosen.score,
            opened,
            device=target,
            targets=tokens,
            flips=flips,
        )
    if not ranks.first:
        return
    if as_json:
        print(json_text.dumps([asdict(report) for report in reports], indent=2))
    else:
        findings = [(report.stage, one) for report in reports for one in report.findings]
        shown = [
            (
                f"{stage}: {one.check}",
                f"{one.worst:.3g}",
                f"allowed {one.allowed:.3g}" + ("" if one.honest else "  BROKEN"),
            )
            for stage, one in findings
        ]
        table("check", "nats moved", shown)
    broken = [report.stage for report in reports if not report.honest]
    if broken:
        raise HonestyError(f"{folder}: stage {broken[0]} reads what it scores; this is no score")


def diagnose(folder: Path, tokens: int, device: str, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        found = diagnosed(folder / steps.ARTIFACT, text.held_out, chosen.score, opened, tokens, device=choose(device))
    if as_json:
        print(json_text.dumps({"score": False, "variants": [asdict(one) for one in found]}, indent=2))
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("not a score", "claimed", "honest", "gain"):
        drawn.add_column(title, justify="left" if title == "not a score" else "right")
    drawn.add_column("caught by")
    for one in found:
        gain = one.honest_bits_per_byte - one.claimed_bits_per_byte
        caught = ", ".join(one.caught_by) or "NOTHING"
        claimed, honest = f"{one.claimed_bits_per_byte:.4f}", f"{one.honest_bits_per_byte:.4f}"
        drawn.add_row(one.name, claimed, honest, f"{gain:+.4f}", caught)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)
    print("bits per byte that each would claim, beside the honest figure for the same tokens: not a score, any of them")


def _show_chunks(found: ChunkProof, as_json: bool) -> None:
    if as_json:
        print(json_text.dumps(found.plain(), indent=2))
        return
    table(
        "proof",
        "",
        [
            ("chunks", f"{len(found.chunks)} of {found.of_chunks}", ", ".join(map(str, found.chunks))),
            ("decoded", f"{found.text_bytes:,} bytes", f"from files of {found.file_bytes:,}, by other processes"),
            ("bits per byte", f"{found.bits_per_byte:.4f}", f"{found.gap_percent:+.3f} % over the ideal code length"),
            ("steps taken again", f"{found.replayed:,}", "each ends in the state that was booked"),
            ("books", found.books_sha256[:16], "what the chunks were drawn from, with the nonce"),
            ("seconds", f"{found.seconds:.1f}", ""),
        ],
    )
    print(f"one false step among {found.of_chunks} is caught with a chance of about {100 * found.catches:.1f} %")


def _size(text: str) -> int:
    """8KB, 1.5MB or a plain number of bytes; KB = 1,000 bytes."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|)", text.strip(), re.IGNORECASE)
    size = float(parts[1]) * {"": 1, "B": 1, "KB": 1_000, "MB": 1_000_000}[parts[2].upper()] if parts else 0
    if not 1 <= size < 1e15:
        raise RecipeError(f"--slice {text}: a size is expected, such as 8KB or 1MB")
    return int(size)
