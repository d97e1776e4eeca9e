"""`python -m fairway`, which torchrun starts."""

from fairway.cli import main

if __name__ == "__main__":
    main()
