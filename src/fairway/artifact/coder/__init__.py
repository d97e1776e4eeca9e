"""Slot: from a group of integers to bytes and back.

A technique is a module with a frozen `Spec`,

    encode(group: Group, spec: Spec) -> bytes
    decode(blob: bytes, layout: GroupLayout) -> tuple of codes, one (rows, cols) int8 for each tensor of the layout

and, where the file's scales and float16 numbers are to be coded by their neighbours (squeeze's method 3),
`CODES_NUMBERS = True`.

Promise: decode gives back exactly what was encoded, on every machine and without the Spec; it produces no more than
the layout announces; bytes that no `encode` wrote raise ValueError or give other codes, and never run code.
"""
