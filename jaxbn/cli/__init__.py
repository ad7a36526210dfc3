"""The commands of `python -m jaxbn`, one module each.

A command module is cheap to import and has four names: `SUMMARY`, `DESCRIPTION`,
`add_arguments(parser)` and `run(args)`, which imports what it needs and returns an
exit code.
"""
