"""The tutorials' own code, as they print it but for its formatting, and what is claimed about it.

Chinese comments and prints are left out; names, constants, order of operations and mistakes are theirs.
"""
