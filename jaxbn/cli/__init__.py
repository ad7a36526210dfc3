"""The commands of `jaxbn`, one module each.

The top of a command's module is cheap to import and has three names: `DESCRIPTION`,
`add_arguments(parser)` and `run(args)`, which returns an exit code.
"""
