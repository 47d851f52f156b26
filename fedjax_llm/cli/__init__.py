"""The command line, with one file for each family of commands."""
