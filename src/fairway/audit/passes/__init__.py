"""What the trace says of the passes over the validation tokens: which number is the score, and what had learned before."""
