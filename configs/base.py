"""The defaults as they are: `--config=base`; `mor/config.py` lists every field."""

from mor import config

get_config = config.default
