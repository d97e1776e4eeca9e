"""The steps of a run. Each reads the products of those before it from the run folder, and writes its own there whole;
one whose product is there already does nothing, so that `--resume` goes on where a run stopped.
"""

from fairway.steps.closing import book_proof, close, prove, prove_chunks
from fairway.steps.code import Code, export
from fairway.steps.making import Check, begin, calibrate, pack, prepare, quantize, stored_tokenizer, train
from fairway.steps.overlapping import refuse_overlap
from fairway.steps.products import ARTIFACT, HESSIANS, INTEGERS, RECIPE, SCORE, WEIGHTS, Text
from fairway.steps.scoring import score

__all__ = [
    "ARTIFACT",
    "HESSIANS",
    "INTEGERS",
    "RECIPE",
    "SCORE",
    "WEIGHTS",
    "Check",
    "Code",
    "Text",
    "begin",
    "book_proof",
    "calibrate",
    "close",
    "export",
    "pack",
    "prepare",
    "prove",
    "prove_chunks",
    "quantize",
    "refuse_overlap",
    "score",
    "stored_tokenizer",
    "train",
]
