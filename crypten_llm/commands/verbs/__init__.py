"""One file per command: ``HELP``, its ``options`` and its ``run``. None imports torch before it is run."""
