"""`python -m sfllm_cli` is `sfllm`."""

import sys

from sfllm_cli.main import main

sys.exit(main())
