"""File x text -> bits per byte: in an order fixed beforehand, each position paid once, before it is learned from."""

from fairway.score.baselines import baselines, baselines_with_train
from fairway.score.chunks import ChunkProof, prove_chunks
from fairway.score.codec import Coded, compress, decompress, settings_for
from fairway.score.diagnose import Variant, diagnose
from fairway.score.evaluate import StageScore, evaluate, score_opened
from fairway.score.exact_teller import Exact
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.library import distributions, score_text, tokens_of
from fairway.score.predictor import Adapter, Block, Predictor, WindowPredictor
from fairway.score.probe import Finding, Report, examine, probe
from fairway.score.proof import Proof, prove
from fairway.score.sample import sample
from fairway.score.spec import ScoreSpec, Stage, spec_of
from fairway.score.state import state_hash
from fairway.score.stream import Stream, Unit, Windows, optimizer_steps
from fairway.score.tape import Tape
from fairway.score.tellers import Softmax, Teller, normalise

__all__ = [
    "Adapter",
    "Block",
    "ChunkProof",
    "Coded",
    "Exact",
    "Finding",
    "Ledger",
    "Predictor",
    "Proof",
    "Report",
    "ScoreSpec",
    "Softmax",
    "Stage",
    "StageScore",
    "Stream",
    "Tape",
    "Teller",
    "Unit",
    "Variant",
    "WindowPredictor",
    "Windows",
    "baselines",
    "baselines_with_train",
    "compress",
    "decompress",
    "diagnose",
    "distributions",
    "drive",
    "evaluate",
    "examine",
    "normalise",
    "optimizer_steps",
    "probe",
    "prove",
    "prove_chunks",
    "sample",
    "score_opened",
    "score_text",
    "settings_for",
    "spec_of",
    "state_hash",
    "tokens_of",
]
