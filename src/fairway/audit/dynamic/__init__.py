"""A submission at work, sealed: it is told the text token by token, and says a distribution before each.

This is the one part of the audit that executes somebody else's code, in a process of its own without network, with
limits of time and memory. The process that asks holds the text and the ledger. `--dynamic MODULE:OBJECT` names what
makes a fresh predictor, in the submission's folder. Two interfaces are understood.

Plain, without fairway: `OBJECT()` gives something with

    vocab            the number of tokens
    predict()        -> (vocab,) natural logarithms of the chances of the next token, after all that was told
    told(token)      the next token, told once it is paid

fairway's own (fairway.score.predictor.Predictor): `OBJECT(tape, stream)` gives something with `vocab`, `predict(unit)`
and `perceive(unit)`; a `steps(unit)` beside them lets a slice be decoded. `OBJECT.stream(targets)` may give the
`Stream`; else it has plain windows of `OBJECT.context` tokens (256) and an update every `OBJECT.chunk` (0: none). Here
the tokens of a unit must be told before it is predicted, as its inputs; the probe finds a predictor that uses them.

Either may have `state()`, all that it changes, and `caches`, names of attributes that predicting may change; without
`state` every attribute is hashed. Text, ledger, sums, probe and decoding are in the hands of the asking process; the
hash of the state is taken in the submission's process, and can be no stronger than that.

`checks.examine` runs it all; nothing is imported here, for the sealed process should start without torch.
"""
