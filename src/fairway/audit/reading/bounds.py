"""How much is read: a submission must never cost more than this, whatever it holds."""

FILE_BYTES = 20_000_000  # of one script: the challenge's 16,000,000 bytes as base85 inside one text
CODE_CHARACTERS = 600_000  # outside string literals: a tree takes about 200 bytes for each; a real script has 160,000
TREE_DEPTH = 250  # of nested nodes: rules may walk a tree by recursion; a real script has 30
UNPACKED_BYTES = 32_000_000  # of any one value: a decompression bomb stops here
UNPACKED_TOTAL = 256_000_000  # bytes of all values made on the way
LAYERS = 8  # texts within texts
STEPS = 300_000  # expressions evaluated for one submission, about two seconds
STEPS_TO_START = 10_000  # of a script that executes no text but may start a program: real ones ask for the GPU's name
INTEGER_BITS = 8_000_000
LOG_BYTES = 8_000_000  # of one log, from its head and its tail
FILES = 2_000  # of one folder
