"""Text <-> a file that an artifact decodes: the same predictor and the same stream as the score's."""

from fairway.score.codec.files import Coded, compress, decompress, settings_for
from fairway.score.codec.part import Encoded, decode_part, encode_part, trial

__all__ = [
    "Coded",
    "Encoded",
    "compress",
    "decode_part",
    "decompress",
    "encode_part",
    "settings_for",
    "trial",
]
