"""Opening a file imports no compiler: dynamo and sympy are 2 s of processor time in every process that scores or
decodes."""

import subprocess
import sys

PROGRAM = """
import sys
from fairway.artifact.header import skeleton
from fairway.recipe import load
for name in ("b6", "b7", "baseline", "pocket", "wiki"):
    recipe = load(name)
    skeleton(recipe.model, recipe.data.tokenizer.vocab)
    heavy = {"sympy", "torch._dynamo"} & set(sys.modules)
    assert not heavy, f"{name}: its model imports {heavy}"
"""


def test_the_model_of_no_recipe_imports_a_compiler():
    """In a process of its own, since optimisers import it too."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
