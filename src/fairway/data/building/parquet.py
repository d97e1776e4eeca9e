"""Parquet as a source of text (the extra `parquet`): one column, row by row."""

from collections.abc import Iterator

from fairway.base.errors import DataError, RecipeError
from fairway.data.building.listing import File, shown, unreadable
from fairway.data.building.reading import Segment

_ROWS = 256  # taken at once


def segments(file: File, column: str) -> Iterator[Segment]:
    """The texts of a column; a row without one is an empty document. DataError where there is no such column, or the
    file is damaged; RecipeError where the extra is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RecipeError(
            f"{shown(file.name)}: reading Parquet needs the extra: pip install 'fairway[parquet]'"
        ) from None
    assert file.path is not None
    try:
        with parquet.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            _check(file, schema, column, pyarrow)
            row, rows = 0, max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False):
                texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                read = file.bytes * (row + len(texts)) // rows
                yield Segment(file.number, file.name, False, row, [text or b"" for text in texts], read)
                row += len(texts)
    except OSError as error:
        if error.errno:
            raise unreadable(file.path, error) from error
        raise _damaged(file, error) from error
    except pyarrow.ArrowException as error:
        raise _damaged(file, error) from error


def _check(file: File, schema: "object", column: str, pyarrow: "object") -> None:
    names, types = list(schema.names), pyarrow.types  # type: ignore[attr-defined]
    if column not in names:
        listed = ", ".join(map(shown, names[:8])) or "none"
        raise DataError(f"{shown(file.name)}: no column {column!r}; set --text-key to one of its own: {listed}")
    kind = schema.field(column).type  # type: ignore[attr-defined]
    if not (
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    ):
        raise DataError(
            f"{shown(file.name)}: column {column!r} holds {kind}, not text; set --text-key to one that does"
        )


def _damaged(file: File, error: Exception) -> DataError:
    why = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{shown(file.name)}: no Parquet file, or a damaged one ({why}); fetch it again")
