"""`python -m rlhf_lightning.cli`, as torchrun's lines have it, and the script `rlhf-lightning`."""

import sys

from rlhf_lightning.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
