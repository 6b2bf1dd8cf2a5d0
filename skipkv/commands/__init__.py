"""The subcommands, one file each: ``add(parser)`` says what it takes, ``run(args)`` does it and returns the status."""
