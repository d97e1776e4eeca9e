"""File x text -> bits per byte: in an order fixed beforehand, each position paid once, before it is learned from."""

from fairway.score.baselines import baselines, baselines_with_train
from fairway.score.evaluate import StageScore, evaluate, score_opened
from fairway.score.harness import drive, normalise
from fairway.score.ledger import Ledger
from fairway.score.library import distributions, score_text, spec_of, tokens_of
from fairway.score.predictor import Block, Predictor, Tape, WindowPredictor
from fairway.score.probe import Finding, Report, examine, probe, state_hash
from fairway.score.sample import sample
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.stream import Stream, Unit, Windows, optimizer_steps

__all__ = [
    "Block",
    "Finding",
    "Ledger",
    "Predictor",
    "Report",
    "ScoreSpec",
    "Stage",
    "StageScore",
    "Stream",
    "Tape",
    "Unit",
    "WindowPredictor",
    "Windows",
    "baselines",
    "baselines_with_train",
    "distributions",
    "drive",
    "evaluate",
    "examine",
    "normalise",
    "optimizer_steps",
    "probe",
    "sample",
    "score_opened",
    "score_text",
    "spec_of",
    "state_hash",
    "tokens_of",
]
