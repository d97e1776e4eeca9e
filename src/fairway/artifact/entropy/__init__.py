"""What the entropy coders of the slot share: integer tables, lanes, the streams, and what is known before a code is.

Everything that decides a decoded symbol is integer arithmetic, so that every machine decodes the same.
"""
