"""The reasoning model in the box: checkpoint, steering vector, problems, and the script that trained it."""
