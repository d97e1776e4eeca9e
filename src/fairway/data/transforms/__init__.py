"""Slot: what a text becomes before its tokenizer sees it. Promise: any text comes back, and bytes are always counted in
the original. A transform is a `Spec`, `apply(text)` and SYMBOLS, the pieces that its tokenizer must hold for it."""
