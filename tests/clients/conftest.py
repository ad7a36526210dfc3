"""What is here is run by hand: each script says what it needs and how."""

collect_ignore_glob = ["*.py"]
