"""What the trace says of the passes over the validation tokens: which number is the score, what had learned before."""
