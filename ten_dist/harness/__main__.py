"""`python -m ten_dist.harness`: lm_eval's own command line, which knows `--model ten_dist`.

For releases of lm_eval that do not look for the models of other packages.
"""

import sys

import lm_eval.models  # noqa: F401 - where nothing is registered, lm_eval adds its models
from lm_eval.__main__ import cli_evaluate

import ten_dist.harness.run_model  # noqa: F401 - registers itself
from ten_dist.console import complain
from ten_dist.errors import EXIT_CONFIGURATION_ERROR, ConfigurationError

try:
    cli_evaluate()
except ConfigurationError as error:
    complain(str(error))
    sys.exit(EXIT_CONFIGURATION_ERROR)
