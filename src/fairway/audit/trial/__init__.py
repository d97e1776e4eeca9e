"""A trial: the script's own arithmetic over tokens, worked out for a short made-up text.

The flow analysis (audit/flow) knows what a value is made of, whatever the numbers are. Some questions are about the
numbers: does every target count exactly once, is a target learned from before it is scored, does a table of bytes
count the space twice. A reviewer answers them by working the script through for a short text, by hand. So does this
folder: a small machine of our own walks the tree of the script over real integers, lists, dicts and arrays of token
ids, and knows nothing of weights. A model, a file of weights, an optimiser, a library nobody named here are `UNKNOWN`;
what the model says of a target is a loss that knows which target it is of. Nothing of the script is executed: each
operation is one of this folder's, and steps, sizes and depths are bounded.

    run(script, settings) -> Trial      what was said at the end, and how often each target of the text counts in it

A trial that meets something it cannot work out says so and accuses nobody.
"""

from fairway.audit.trial.machine import in_pairs, run
from fairway.audit.trial.told import Trial

__all__ = ["Trial", "in_pairs", "run"]
