"""`python -m awq_ext`: the command line."""

from awq_ext.cli import program

program()
