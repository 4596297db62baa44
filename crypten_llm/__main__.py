"""``python -m crypten_llm``: hands over to the command line."""

import sys

from crypten_llm.commands.cli import main

sys.exit(main())
