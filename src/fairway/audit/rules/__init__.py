"""The rules: a folder is the registry, one file for one rule."""
