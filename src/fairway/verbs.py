"""What each verb of the command line does, and how its answer is printed."""

import json as json_text
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fairway import doctor as doctor_checks
from fairway import pipeline, recipe, steps
from fairway.artifact import open_artifact
from fairway.base import recipes, slots
from fairway.base.clock import Stopwatch
from fairway.base.devices import Device, choose
from fairway.base.errors import DataError, FairwayError, HonestyError, RecipeError
from fairway.base.files import read, write
from fairway.base.journal import Run, new_folder, point_latest
from fairway.base.ranks import Ranks
from fairway.model import GPT, parameter_count
from fairway.outcome import Outcome, proof_rows, rows
from fairway.recipe import Recipe
from fairway.score import ChunkProof, score_text, settings_for
from fairway.score import compress as compressed
from fairway.score import decompress as decompressed
from fairway.score import diagnose as diagnosed
from fairway.score import probe as probed
from fairway.score import sample as sampled
from fairway.score.booking import read_booked
from fairway.score.chunks import decode_chunk as decoded_chunk

SLOTS = (
    "data.sources",
    "data.loaders",
    "model.attention",
    "model.mlp",
    "model.embed",
    "train.optim",
    "train.objective",
    "quant.rounding",
    "artifact.coder",
    "score.windows",
    "score.adapt",
)


def run(
    name: str | None,
    overrides: tuple[str, ...],
    seeds: str,
    resume: Path | None,
    device: str,
    runs: Path,
    as_json: bool,
) -> None:
    """The whole way, for one recipe or one folder to resume, once for each seed."""
    if (name is None) == (resume is None):
        raise RecipeError("fairway run: name a recipe, or a run folder with --resume")
    if resume is not None and seeds:
        raise RecipeError("--seeds: a resumed run keeps its own seed; leave it out, or start new runs")
    if resume is not None:
        chosen = [_of_folder(resume, overrides)]
    else:
        loaded = recipe.load(str(name), overrides)
        chosen = [replace(loaded, seed=seed) for seed in _seeds(seeds)] or [loaded]
    outcomes = []
    with _ranks(device) as (ranks, target):
        for one in chosen:
            with _run(one, runs, ranks, quiet=as_json, folder=resume) as opened:
                outcomes.append(pipeline.run(one, opened, target))
                if ranks.first and opened.folder is not None:
                    point_latest(opened.folder.resolve())
                    if not as_json:
                        show(outcomes[-1], opened.folder)
    if ranks.first:
        _show_seeds(outcomes, as_json)


def train(name: str, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool) -> None:
    chosen = recipe.load(name, overrides)
    with _ranks(device) as (ranks, target), _run(chosen, runs, ranks, as_json) as opened:
        steps.begin(chosen, opened, target)
        text = steps.prepare(chosen, opened)
        steps.train(chosen, text, opened, target)
        steps.calibrate(chosen, text, opened, target)
        if ranks.first:
            facts = {"run": str(opened.folder), **opened.facts["train"], "calibration": opened.facts["calibration"]}
            _answer(facts, f"trained: {opened.folder}; next: fairway quantize {opened.folder}", as_json)


def quantize(folder: Path, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
        steps.quantize(chosen, opened, target)
        if ranks.first:
            fact = opened.facts["quant"]
            line = f"quantised: {fact['entropy_bytes']:,} bytes by entropy; next: fairway pack {folder}"
            _answer({"run": str(folder), **fact}, line, as_json)


def pack(folder: Path, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _run(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        steps.pack(chosen, steps.stored_tokenizer(opened), opened)
        fact = opened.facts["artifact"]
    if not as_json:
        table = [(section, f"{size:,}", "") for section, size in fact["sections"].items()]
        _table("section", "bytes", [*table, ("file", f"{fact['bytes']:,}", "weighed")])
    line = f"packed: {folder / steps.ARTIFACT}; next: fairway score {folder}"
    _answer({"run": str(folder), **fact}, line, as_json)


def score(target: Path, artifact: Path | None, device: str, as_json: bool) -> None:
    if artifact is None:
        _score_run(target, device, as_json)
        return
    with _ranks(device) as (ranks, chosen):
        quiet, text = Run(ranks=ranks, quiet=as_json), read(target)
        if not text:
            raise DataError(f"{target}: 0 bytes, nothing to score; name a file with text in it")
        found = score_text(open_artifact(artifact), text, run=quiet, device=chosen, lossy="score_decoded")
    if ranks.first:
        if as_json:
            print(json_text.dumps(asdict(found), indent=2))
        else:
            print(
                f"{found.bits_per_byte:.4f} bits per byte: {found.code_length_bits / 8:,.0f} bytes for "
                f"{found.text_bytes:,} ({found.stage}, {found.seconds:.1f} s)"
                + ("; of the text the tokens decode to" if found.decoded else "")
            )


def _score_run(folder: Path, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        scores = steps.score(chosen, text.held_out, opened, target)
        proof = steps.prove(chosen, text.held_out, opened)
        outcome = steps.close(chosen, text, scores, proof, opened)
    if ranks.first:
        if as_json:
            print(outcome.json(), end="")
        else:
            show(outcome, folder)


def prove(folder: Path, slice_: str, full: bool, chunks: int, nonce: str, as_json: bool) -> None:
    if (bool(slice_) + full + bool(chunks)) > 1:
        raise RecipeError("fairway prove: one of --slice, --full and --chunks; leave the others out")
    if bool(chunks) != bool(nonce):
        raise RecipeError("fairway prove: --chunks K and --nonce TEXT go together; the nonce draws the chunks")
    size = 0 if full else _size(slice_) if slice_ else None
    chosen = _of_folder(folder)
    with _run(chosen, folder.parent, Ranks(), as_json, folder) as opened:
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
        _table("proof", "", proof_rows(proof.plain()))
        print(
            f"proven: {proof.text_bytes:,} bytes decoded from {proof.file_bytes:,}, byte for byte, by another process"
        )


def compress(file: str, artifact: Path, out: str, adapt: bool, lanes: int, as_json: bool) -> None:
    quiet = as_json or out == "-"
    if as_json and out == "-":
        raise RecipeError(
            "fairway compress: --json and the file cannot both go to standard output; name a file with -o"
        )
    opened, watch = open_artifact(artifact), Stopwatch().start()
    text = _take(file)
    coded = compressed(opened, text, settings_for(opened, adapt, lanes, len(text)), Run(quiet=quiet), processes=0)
    _give(out, coded.content)
    seconds = watch.stop()
    facts = {key: value for key, value in asdict(coded).items() if key != "content"}
    facts |= {"file_bytes": len(coded.content), "seconds": round(seconds, 3)}
    if not quiet or as_json:
        share = f", {8 * len(coded.content) / len(text):.4f} bits per byte" if text else ""
        line = f"{out}: {len(text):,} bytes -> {len(coded.content):,}{share}; {seconds:.1f} s"
        _answer(facts, line, as_json)


def decompress(file: str, artifact: Path, out: str, as_json: bool) -> None:
    quiet = as_json or out == "-"
    if as_json and out == "-":
        raise RecipeError(
            "fairway decompress: --json and the text cannot both go to standard output; name a file with -o"
        )
    opened, watch = open_artifact(artifact), Stopwatch().start()
    content = _take(file)
    text = decompressed(opened, content, "standard input" if file == "-" else file, Run(quiet=quiet), processes=0)
    _give(out, text)
    seconds = watch.stop()
    if not quiet or as_json:
        facts = {"file_bytes": len(content), "text_bytes": len(text), "seconds": round(seconds, 3)}
        _answer(facts, f"{out}: {len(content):,} bytes -> {len(text):,}; {seconds:.1f} s", as_json)


def decode_chunk(file: Path, artifact: Path, state: Path, before: Path, out: Path) -> None:
    opened = open_artifact(artifact)
    write(out, decoded_chunk(opened, read(file), read(state), read(before), str(file)))


def probe(folder: Path, flips: int, tokens: int, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
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
        table = [
            (
                f"{stage}: {one.check}",
                f"{one.worst:.3g}",
                f"allowed {one.allowed:.3g}" + ("" if one.honest else "  BROKEN"),
            )
            for stage, one in findings
        ]
        _table("check", "nats moved", table)
    broken = [report.stage for report in reports if not report.honest]
    if broken:
        raise HonestyError(f"{folder}: stage {broken[0]} reads what it scores; this is no score")


def diagnose(folder: Path, tokens: int, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _run(chosen, folder.parent, Ranks(), as_json, folder) as opened:
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


def sample(artifact: Path, prompt: str, tokens: int, temperature: float, seed: int, device: str, as_json: bool) -> None:
    opened = open_artifact(artifact)
    if as_json:
        text = "".join(sampled(opened, prompt, tokens, temperature, seed, choose(device)))
        _answer({"prompt": prompt, "text": text, "seed": seed}, "", as_json)
        return
    sys.stdout.write(prompt)
    for piece in sampled(opened, prompt, tokens, temperature, seed, choose(device)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def doctor(as_json: bool) -> None:
    checks = doctor_checks.report()
    if as_json:
        print(json_text.dumps([asdict(check) for check in checks], indent=2))
        return
    remarks = ["; ".join(filter(None, (check.found, check.remedy))) for check in checks]
    _table("what", "state", [(c.name, c.state, remark) for c, remark in zip(checks, remarks, strict=True)])


def list_recipes(as_json: bool) -> None:
    home = recipe.recipes_folder()
    if home is None:
        raise RecipeError("recipes: no folder of that name here; run from a checkout, or name a .toml file")
    listed = []
    for path in sorted(home.glob("*.toml")):
        one = recipe.load(str(path))
        listed.append(
            {
                "name": one.name,
                "params": _params(one),
                "budget_bytes": one.budget.artifact_bytes,
                "summary": one.summary,
            }
        )
    if as_json:
        print(json_text.dumps(listed, indent=2))
        return
    _table("recipe", "parameters", [(str(r["name"]), f"{r['params']:,}", str(r["summary"])) for r in listed])


def list_techniques(as_json: bool) -> None:
    found = {slot: slots.kinds(f"fairway.{slot}") for slot in SLOTS}
    if as_json:
        print(json_text.dumps(found, indent=2))
        return
    _table("slot", "", [(slot, "", ", ".join(names)) for slot, names in found.items()])


def show(outcome: Outcome, folder: Path | None) -> None:
    """The table that ends a run."""
    _table(f"{outcome.recipe}, seed {outcome.seed}", "bits per byte", rows(outcome))
    proof = outcome.proof
    proven = "not proven"
    if proof is not None:
        proven = f"{proof['text_bytes']:,} bytes decoded from a file of {proof['file_bytes']:,}"
    print(
        f"score {outcome.bits_per_byte:.4f} ({outcome.result}; {proven}) on {outcome.text_bytes:,} bytes held out"
        + (" (as decoded by the tokenizer)" if outcome.decoded_text else "")
        + f"; run folder {folder}"
    )


def _show_seeds(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        whole: Any = [asdict(outcome) for outcome in outcomes]
        print(json_text.dumps(whole[0] if len(whole) == 1 else whole, indent=2))
    elif len(outcomes) > 1:
        scores = [outcome.bits_per_byte for outcome in outcomes]
        print(f"{len(scores)} seeds: {statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f} bits per byte")


def _show_chunks(found: ChunkProof, as_json: bool) -> None:
    if as_json:
        print(json_text.dumps(found.plain(), indent=2))
        return
    _table(
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


def _take(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == "-" else read(Path(name))


def _give(name: str, content: bytes) -> None:
    if name == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write(Path(name), content)


def _answer(facts: dict[str, Any], line: str, as_json: bool) -> None:
    """A verb's answer: facts for programs, or one line for people."""
    print(json_text.dumps(facts, indent=2) if as_json else line)


def _table(what: str, value: str, table: list[tuple[str, str, str]]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column(what)
    drawn.add_column(value, justify="right")
    drawn.add_column("")
    for row in table:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


def _params(one: Recipe) -> int:
    """The parameters of a recipe's model, counted without allocating it."""
    with torch.device("meta"):
        return parameter_count(GPT(one.model, one.data.tokenizer.vocab))


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"--seeds {text}: whole numbers with commas between them, as in 1337,42,2025") from None


def _of_folder(folder: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The resolved recipe of a run folder."""
    path = folder / steps.RECIPE
    if not path.exists():
        raise RecipeError(f"{folder}: no run folder ({steps.RECIPE} is missing); name one under runs/")
    return recipes.load(Recipe, path, overrides)


@contextmanager
def _ranks(device: str) -> Iterator[tuple[Ranks, Device]]:
    ranks = Ranks.start(cuda=device != "cpu" and torch.cuda.is_available())
    try:
        yield ranks, choose(device, ranks.local_rank)
    finally:
        ranks.stop()


def _run(one: Recipe, root: Path, ranks: Ranks, quiet: bool = False, folder: Path | None = None) -> Run:
    """The run of a folder, a new one where none is given; every rank has the same."""
    if folder is None:
        made = ""
        if ranks.first:
            try:
                made = str(new_folder(root, one.name, one.seed))
            except FairwayError as error:
                made = f"error: {error}"
        made = ranks.share_text(made)
        if made.startswith("error: "):
            raise RecipeError(made.removeprefix("error: "))
        folder = Path(made)
    return Run(folder, ranks, quiet)
