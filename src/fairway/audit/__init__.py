"""Other people's scores: what breaks which rule where, with the evidence, and "cannot tell" where that is the truth."""
