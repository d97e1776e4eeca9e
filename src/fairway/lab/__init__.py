"""Many runs: what is made of them, and handed in."""
